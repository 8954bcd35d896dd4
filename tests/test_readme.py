"""Do the two READMEs speak of this repository? Their commands parse, their files, functions, flags
and headings exist, and the plan of the house is kept: what stands at the top level, who imports
whom, no line wider than a reader's screen.
"""
import argparse, ast, dataclasses, glob, importlib, inspect, os, re, shlex, subprocess, sys

import pytest

import evaluate, model, train_rl, train_sft
from appendix import metrics, optimizer, run, tiny
from conftest import ROOT
from test_scripts import GROUND_FLOOR

MODULES = ("data", "rewards", "grpo", "model", "zoom_rollout", "train_sft", "train_rl", "evaluate")
APPENDIX = sorted(os.path.basename(f)[:-3]
                  for f in glob.glob(os.path.join(ROOT, "appendix", "*.py")))
FILES = [*(f"{m}.py" for m in MODULES), *(f"appendix/{m}.py" for m in APPENDIX)]
TESTS = sorted("tests/" + os.path.basename(f)
               for f in glob.glob(os.path.join(ROOT, "tests", "*.py")))
# the last four come with torch and transformers
PACKAGES = {"torch", "transformers", "PIL", "numpy", "tqdm", "safetensors", "tokenizers", "jinja2",
            "markupsafe"}
# which chapters a chapter may import at its top
ARROWS = {"data": set(), "rewards": set(), "grpo": set(), "model": set(),
          "zoom_rollout": {"model", "data"},
          "train_sft": {"data", "rewards", "grpo", "model", "zoom_rollout"},
          "evaluate": {"data", "rewards", "grpo", "model", "zoom_rollout"},
          "train_rl": {"data", "rewards", "grpo", "model", "zoom_rollout", "train_sft",
                       "evaluate"}}
OUTSIDE = {"data": {"PIL", "numpy", "tqdm"}, "rewards": set(), "grpo": {"torch"}}
TOP = {"README.md", "LICENSE", "requirements.txt", "tests", "checkpoints", "appendix",
       *(f"{m}.py" for m in MODULES)}
# what a reader puts in for the README's capitals and for a loop's variable
STANDS_FOR = {"NAME": "screenspot", "IN": "a.json", "PATH": "a.json", "OUT": "b.jsonl",
              "DIR": "images", "FILE.jsonl": "f.jsonl", "$s": "0"}

def text_of(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()

README, LONG, COURSE = (text_of("README.md"), text_of("appendix/README.md"),
                        text_of("appendix/course.md"))

def section(title):
    """The text under a heading of the README that begins with `title`."""
    found = re.search(rf"^##+ {title}[^\n]*\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found, f"README has no heading {title!r}"
    return found[1]

def quoted(text):
    """What stands in `backticks`."""
    return re.findall(r"`([^`\n]+)`", text)

def commands():
    """(where, script or -m module, arguments) of each `python ...` in the READMEs, the course and
    the docstrings of all files."""
    out = []
    for where in ("README.md", "appendix/README.md", "appendix/course.md", *FILES):
        text = text_of(where)
        text = text if where.endswith(".md") else ast.get_docstring(ast.parse(text)) or ""
        text = text.replace("\\\n", " ")
        for name, arguments in re.findall(r"(?<!\w)python ((?:-m )?[\w./]+)([^`\n#&|;,()]*)", text):
            if name.endswith(".py") or name.startswith("-m appendix."):
                arguments = (re.split(r"  +|\. ", arguments.rstrip(". "))[0]
                             if not arguments.startswith("  ") else "")
                out.append((where, name, arguments.strip()))
    return [c for c in dict.fromkeys(out) if c[1] != "FILE.py"]

# -----------------------------------------------------------------------------
# commands and flags

class Parsed(Exception):
    pass

@pytest.mark.parametrize("where, name, arguments", commands(),
                         ids=[f"{w}: {s} {a}".strip() for w, s, a in commands()])
def test_a_command_parses(where, name, arguments, monkeypatch):
    """Bug: a documented flag that was renamed. Each script's own parser reads the command; nothing
    is run."""
    if name.endswith(".py"):
        assert os.path.exists(os.path.join(ROOT, name))
    args = [STANDS_FOR.get(a, a).replace("$s", "0") for a in shlex.split(arguments)]
    real = argparse.ArgumentParser.parse_args

    def parse(self, *given, **more):
        real(self, *given, **more)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [name, *args])
    with pytest.raises(Parsed):
        importlib.import_module(name.removeprefix("-m ").removesuffix(".py")).main()

def test_there_are_commands():
    """Claim: a reader with a laptop, one with a GPU and one who wants proof find theirs; each
    script with a main is shown."""
    shown = {name for where, name, _ in commands() if where == "README.md"}
    assert {"train_rl.py", "train_sft.py", "evaluate.py", "data.py", "-m appendix.figures"} <= shown
    assert ({"-m appendix.speed", "-m appendix.tiny", "-m appendix.sweep"}
            <= {name for _, name, _ in commands()})
    assert "python -m pytest" in README and len(commands()) >= 30

def test_flags_exist():
    """Bug: prose that names a flag which no script has."""
    flags = {f"--{f.name.replace('_', '-')}"
             for m in (train_rl, train_sft, evaluate, tiny)
             for f in dataclasses.fields(m.Config)}
    flags |= (set(re.findall(r'"(--[a-z-]+)"', "".join(map(text_of, FILES))))
              | {"--slow", "--help", "--index-url"})
    flags |= {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}     # torchrun's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README + LONG + COURSE))
    assert len(named) > 40 and not named - flags

@pytest.mark.parametrize("module", (train_rl, train_sft, evaluate, tiny), ids=lambda m: m.__name__)
def test_every_field_is_explained(module, capsys):
    """Claim: `--help` explains every field and gives its default."""
    with pytest.raises(SystemExit):
        run.parse_config(module.Config, ["--help"], module.__doc__)
    told = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(module.Config):
        assert re.search(rf"--{f.name.replace('_', '-')}\b[^(]*\w \w", told), f.name
    assert told.count("(default: ") >= len(dataclasses.fields(module.Config))

def test_the_traces_and_models_are_the_defaults():
    """Bug: the default changes, the README's number stays."""
    said = {int(n.replace(",", "")) for n in re.findall(r"on ([\d,]+) traces", README)}
    assert said == {train_rl.Config.sft_n}
    assert all(f"`{name}`" in README for name in model.MODELS if name != "tiny")

# -----------------------------------------------------------------------------
# names

@pytest.mark.parametrize("where", ["README.md", "appendix/README.md", "appendix/course.md"])
def test_files_exist(where):
    """Claim: what a README names or links is there: sources, tests, the shipped weights, pictures,
    headings."""
    text, folder = text_of(where), os.path.dirname(where)
    named = [q.split(" ")[0] for q in quoted(text)]
    sources = {n for n in named if n.endswith(".py") and n != "FILE.py"}
    known = set(FILES) | {f"{m}.py" for m in APPENDIX} | set(TESTS)
    assert sources and not sources - known
    links = {link for link in re.findall(r'\]\(([^)\s]+)\)', text) if "://" not in link}
    links |= set(re.findall(r'(?:src|srcset)="([^"]+)"', text))
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(folder, path)) if path else where
        assert os.path.exists(os.path.join(ROOT, target)), link
        if anchor:
            headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                        for h in re.findall(r"^#+ (.*)$", text_of(target), re.M)}
            assert anchor in headings, link

def test_every_appendix_file_is_in_its_table():
    """Bug: a file that the map of the house does not know."""
    table = LONG.split("## Files")[1].split("## Metrics")[0]
    assert ({f"{m}.py" for m in APPENDIX if m != "__init__"}
            == {q for q in quoted(table)
                if q.endswith(".py") and "/" not in q and q != "data.py"})

def resolve(name):
    """`module.function`, `module.Class.method`, or a name of train_rl."""
    head, *rest = name.split(".")
    if head in MODULES:
        value = importlib.import_module(head)
    elif rest and head in APPENDIX and not hasattr(train_rl, head):
        value = importlib.import_module(f"appendix.{head}")
    else:
        value = getattr(train_rl, head)
    for part in rest:
        value = getattr(value, part)
    return value

def test_functions_exist():
    """Bug: a function is renamed and a README still sends the reader to the old name."""
    named = [q for q in quoted(README + LONG + COURSE)
             if re.fullmatch(rf"(?:{'|'.join((*MODULES, *APPENDIX))})(?:\.\w+)+", q)
             and not q.endswith((".py", ".jsonl", ".html"))]
    assert len(named) >= 12
    for name in named:
        resolve(name)

def test_the_seven_steps():
    """Claim: the README's seven steps are the seven comments of train_step, in order, and each
    calls the functions that the README names for it."""
    steps = re.findall(r"^(\d)\. \*\*(.+?)\*\* \((.*?)\)\.", section("GRPO in seven steps"), re.M)
    assert [n for n, *_ in steps] == list("1234567")
    source = inspect.getsource(train_rl.train_step)
    comments = re.findall(r"^ +# (\d)\. (.*)$", source, re.M)
    assert [n for n, _ in comments] == list("1234567")
    for (n, title, functions), (_, comment) in zip(steps, comments):
        assert comment.lower().startswith(title.lower()), (title, comment)
        code = re.split(r"^ +# \d\. ", source.split(f"# {n}. ")[1], maxsplit=1, flags=re.M)[0]
        first, *called = quoted(functions)
        name = first.split(".")[-1]
        assert callable(resolve(first)) and f"{name}(" in code, (n, first)
        for callee in called:                           # the arrow: the first calls the second
            assert (callable(resolve(callee))
                    and f"{callee.split('.')[-1]}(" in inspect.getsource(
                        inspect.getmodule(resolve(first)))), (n, callee)

def test_metrics(models):
    """Claim: metrics.GLOSSARY has the meaning of every key of a row of metrics.jsonl, and what it
    calls a rate lies between 0 and 1."""
    import data
    vlm, found = models["qwen2.5"], {}
    adam = optimizer.AdamW(vlm.parameters(), 1e-3)
    for task, flags in (
            ("search", dict(curiosity=0.5, overlong=2, evidence_bonus=0.1, zoom_cost=0.1)),
            ("boxes", dict(difficulty_weight="exp", resample=1, papo_coef=0.01,
                           mismatch="truncate"))):
        cfg = train_rl.Config(recipe=data.TASK_RECIPES[task], task=task, num_prompts=2,
                              group_size=1, blind_prompts=1, max_new_tokens=2, max_zooms=1, **flags)
        row, _ = train_rl.train_step(vlm, None, adam, train_rl.Questions(cfg, data.SIDE), cfg, 1)
        found |= row
    assert set(found) == set(metrics.GLOSSARY)
    assert all(0 <= value <= 1 + 1e-9
               for key, value in found.items() if metrics.GLOSSARY[key].is_rate)
    assert (list(metrics.CONTROLS) == list(evaluate.MODES)
            and "`GLOSSARY`" in text_of("appendix/README.md").split("## Metrics")[1].split("##")[0])

# -----------------------------------------------------------------------------
# the house

def top_imports(source):
    """Names imported at the top of a file: "torch", "data", "appendix.run"."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.name if alias.name.startswith("appendix")
                       else alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module == "appendix":
            yield from (f"appendix.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module if node.module.startswith("appendix")
                   else node.module.split(".")[0])

@pytest.mark.parametrize("module", MODULES)
def test_arrows_run_one_way(module):
    """Claim: data, rewards and grpo stand on the ground; nobody imports a trainer but the RL loop;
    of the appendix a chapter imports the ground floor at its top; nothing but the pinned
    packages."""
    found = set(top_imports(text_of(f"{module}.py"))) - set(sys.stdlib_module_names)
    assert found & set(MODULES) <= ARROWS[module]
    assert ({name for name in found if name.startswith("appendix")}
            <= {"appendix"} | {f"appendix.{name}" for name in GROUND_FLOOR})
    outside = {name for name in found if not name.startswith("appendix")} - set(MODULES)
    assert outside <= OUTSIDE.get(module, PACKAGES)
    assert (module != "rewards" and module != "grpo"
            or not [name for name in found if name.startswith("appendix")])

def test_no_circle():
    """Claim: no file imports, over whatever others, itself."""
    edges = {}
    for name in FILES:
        module = name[:-3].replace("/", ".")
        edges[module] = {m for m in top_imports(text_of(name))
                         if m in MODULES or m.startswith("appendix.")}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path, module])
        if module not in done and module in edges:
            path.append(module)
            for other in sorted(edges[module]):
                visit(other)
            path.pop()
            done.add(module)
    for module in edges:
        visit(module)

def test_requirements_are_pinned_and_said():
    pinned = dict(line.split("==") for line in text_of("requirements.txt").split())
    used = ({name for f in FILES for name in top_imports(text_of(f))}
            & PACKAGES - {"safetensors", "tokenizers", "jinja2", "markupsafe"})
    assert {n.replace("PIL", "pillow") for n in used} | {"pytest"} == set(pinned)
    said = re.search(r"Dependencies: (.*?)(?:,? and nothing else|\.)", README, re.S)[1]
    assert set(re.findall(r"\w+", said)) == set(pinned)

def test_top_level_is_the_plan():
    """Claim: no utils.py, no stray file; tests/ holds tests and what they stand on."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode or not git.stdout:
        pytest.skip("not a git checkout")
    files = git.stdout.split()
    assert {f.split("/")[0] for f in files if f[0] != "."} == TOP
    assert {f.split("/")[1] for f in files if f.startswith("checkpoints/")} == {"tiny"}
    assert all(re.fullmatch(r"tests/(test_\w+|conftest|pretend_gpu)\.py", f)
               for f in files if f.startswith("tests/"))

@pytest.mark.parametrize("name", [*FILES, *TESTS])
def test_lines_fit_the_screen(name):
    """Claim: at most 100 columns, in chapters, appendix and tests."""
    wide = [n for n, line in enumerate(text_of(name).splitlines(), 1) if len(line) > 100]
    assert not wide

def test_the_readme_is_short():
    """Claim: at most 220 lines."""
    assert README.count("\n") <= 220

def test_no_comment_is_left_to_fill_in():
    """Bug: a placeholder ships."""
    assert not re.findall(r"TODO|FIXME|XXX|FILES-TABLE|FIGURE:",
                          README + LONG + COURSE + "".join(map(text_of, FILES)))
    assert not re.findall(r"^<!-- [\w-]+ -->\n\n(?=#|\Z|[A-Z])", README, re.M), (
        "a section is still empty")
