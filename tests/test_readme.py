"""
Does the README speak of this repository? Its commands parse, its files, functions, flags and metrics exist, its line counts are
the files', and the plan of the house (what stands at the top level, who imports whom) is kept.
"""
import argparse, ast, dataclasses, importlib, inspect, os, re, shlex, subprocess, sys

import pytest

import data, evaluate, model, train_rl, train_sft
from conftest import ROOT

MODULES = ("data", "rewards", "grpo", "model", "zoom_rollout", "train_sft", "train_rl", "evaluate")
GROUND, PACKAGES = set(), {"torch", "transformers", "PIL", "numpy", "tqdm", "safetensors", "tokenizers"}     # the last two come with transformers
ARROWS = {"data": GROUND, "rewards": GROUND, "grpo": GROUND, "model": GROUND, "zoom_rollout": {"model", "data"},
          "train_sft": {"data", "rewards", "grpo", "model", "zoom_rollout"}, "evaluate": {"data", "rewards", "grpo", "model", "zoom_rollout"},
          "train_rl": {"data", "rewards", "grpo", "model", "zoom_rollout", "train_sft", "evaluate"}}
OUTSIDE = {"data": {"PIL", "numpy", "tqdm", "pyarrow"}, "rewards": set(), "grpo": {"torch"}}
TOP = {"README.md", "LICENSE", "requirements.txt", "tests", "checkpoints", *(f"{m}.py" for m in MODULES)}
# what a reader puts in for the README's capitals and for a loop's variable
STANDS_FOR = {"NAME": "screenspot", "IN": "a.json", "OUT": "b.jsonl", "DIR": "images", "FILE.jsonl": "f.jsonl", "FILE.JSONL": "f.jsonl", "$s": "0"}

def text_of(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()

README = text_of("README.md")

def section(title):
    """The text under a heading that begins with `title`."""
    found = re.search(rf"^##+ {title}[^\n]*\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found, f"README has no heading {title!r}"
    return found[1]

def quoted(text):
    """What stands in `backticks`."""
    return re.findall(r"`([^`\n]+)`", text)

def commands():
    """(where, script, arguments) of each `python X.py ...` in the README and in the docstrings of the scripts."""
    out = []
    for where in ("README.md", *(f"{m}.py" for m in MODULES)):
        text = README if where == "README.md" else ast.get_docstring(ast.parse(text_of(where))) or ""
        out += [(where, *found) for found in re.findall(r"python ([\w/]+\.py)([^`\n#&|;,]*?)(?=[`\n#&|;,]|\. |$)", text)]
    return [c for c in dict.fromkeys(out) if c[1] != "FILE.py"]

# -----------------------------------------------------------------------------
# commands and flags

class Parsed(Exception):
    pass

@pytest.mark.parametrize("where, script, arguments", commands(), ids=[f"{w}: {s}{a}".strip() for w, s, a in commands()])
def test_a_command_parses(where, script, arguments, monkeypatch):
    """Bug: a documented flag that was renamed. Each script's own parser reads the command; nothing is run."""
    assert os.path.exists(os.path.join(ROOT, script))
    if os.path.dirname(script):
        return
    args = [STANDS_FOR.get(a, a).replace("$s", "0") for a in shlex.split(arguments)]
    real = argparse.ArgumentParser.parse_args

    def parse(self, *given, **more):
        real(self, *given, **more)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [script, *args])
    with pytest.raises(Parsed):
        importlib.import_module(script[:-3]).main()

def test_there_are_commands():
    """Claim: a reader with a laptop, one with a GPU and one who wants proof find theirs; each script with a main is shown."""
    shown = {script for where, script, _ in commands() if where == "README.md"}
    assert {"train_rl.py", "train_sft.py", "evaluate.py", "data.py"} <= shown and "python -m pytest" in README and len(commands()) >= 15

def test_flags_exist():
    """Bug: prose that names a flag which no script has."""
    flags = {f"--{f.name.replace('_', '-')}" for m in (train_rl, train_sft, evaluate) for f in dataclasses.fields(m.Config)}
    flags |= set(re.findall(r'"(--[a-z-]+)"', inspect.getsource(data.main) + text_of("tests/benchmark.py"))) | {"--slow", "--help"}
    flags |= {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}     # torchrun's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert len(named) > 8 and not named - flags

@pytest.mark.parametrize("module", (train_rl, train_sft, evaluate), ids=lambda m: m.__name__)
def test_every_field_is_explained(module, capsys):
    """Claim: `--help` explains every field and gives its default."""
    with pytest.raises(SystemExit):
        model.cli(module.Config, ["--help"], module.__doc__)
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

def test_files_exist():
    """Claim: what the README names or links is there: sources, tests, the shipped weights, pictures, its own headings."""
    named = [q.split(" ")[0] for q in quoted(README)]
    files = {n for n in named if n.endswith(".py") and n != "FILE.py" or n.startswith(("checkpoints/", "tests/", ".github/"))}
    links = {link for link in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', README) for link in link if link and "://" not in link}
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.M)}
    assert files and not [f for f in files | {l for l in links if l[0] != "#"} if not os.path.exists(os.path.join(ROOT, f))]
    assert not {l[1:] for l in links if l[0] == "#"} - anchors

def resolve(name):
    """`module.function`, `module.Class.method`, or a name of train_rl."""
    head, *rest = name.split(".")
    value = importlib.import_module(head) if head in MODULES else getattr(train_rl, head)
    for part in rest:
        value = getattr(value, part)
    return value

def test_functions_exist():
    """Bug: a function is renamed and the README still sends the reader to the old name."""
    named = [q for q in quoted(README) if re.fullmatch(rf"(?:{'|'.join(MODULES)})(?:\.\w+)+", q) and not q.endswith(".py")]
    assert len(named) >= 8
    for name in named:
        resolve(name)

def test_the_seven_steps():
    """Claim: the README's numbers are the code's. 1 and 7 stand in main, around the call of train_step, which holds 2 to 6; each
    step has its title and its line, and calls the functions that the README names for it."""
    steps = re.findall(r"^(\d)\. \*\*(.+?)\*\*:?(?: \((.*?)line (\d+)\))", section("GRPO in seven steps"), re.M)
    assert [n for n, *_ in steps] == list("1234567")
    source = text_of("train_rl.py")
    for n, _, _, line in steps:
        assert source.splitlines()[int(line) - 1].strip().startswith(f"# {n}. "), f"step {n}: python tests/figures.py mends the numbers"
    steps = [step[:3] for step in steps]
    comments = re.findall(r"^ +# (\d)\. (.*)$", source, re.M)
    assert sorted(n for n, _ in comments) == list("1234567")
    for (n, title, functions), (_, comment) in zip(steps, sorted(comments)):
        assert comment.lower().startswith(title.lower()), (title, comment)
        code = re.split(r"^ +# \d\. ", source.split(f"# {n}. ")[1], maxsplit=1, flags=re.M)[0]
        for name in quoted(functions):
            assert callable(resolve(name)) and f"{name.split('.')[-1]}(" in code, (n, name)
    assert sum(bool(quoted(functions)) for _, _, functions in steps) == 6
    inside = lambda f: re.findall(r"^ +# (\d)\. ", inspect.getsource(f), re.M)
    assert inside(train_rl.train_step) == list("23456") and inside(train_rl.main) == list("17")
    assert re.search(r"# 1\. .*?train_step\(.*?# 7\. ", inspect.getsource(train_rl.main), re.S)

def test_metrics(models):
    """Claim: the glossary explains every key of a row of metrics.jsonl, and no other."""
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in section("Metrics").splitlines() if line.startswith("| `")]
    glossary = [name for names in rows for name in names]
    vlm, keys = models["qwen2.5"], set()
    optimizer = model.AdamW(vlm.parameters(), 1e-3)
    for task, flags in (("search", {}), ("boxes", dict(difficulty_weight="exp", resample=1, papo_coef=0.01))):
        cfg = train_rl.Config(recipe=data.RECIPES[task], task=task, group_size=1, blind_prompts=1, max_new_tokens=2, max_zooms=1, **flags)
        metrics, _ = train_rl.train_step(vlm, None, optimizer, data.toy(task, "train", 2), cfg, 1)
        keys |= set(metrics)
    assert len(glossary) == len(set(glossary)) and set(glossary) == keys - {"step"}

# -----------------------------------------------------------------------------
# the house

def test_line_counts():
    """Claim: the table of files has every source file once, with its number of lines (`python tests/figures.py` mends it)."""
    table = dict(re.findall(r"^\| `(\w+\.py)` \| [^|]+ \| (\d+) \|$", section("The files"), re.M))
    assert set(table) == {f"{m}.py" for m in MODULES}
    assert {f: int(n) for f, n in table.items()} == {f: text_of(f).count("\n") for f in table}

def imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]

@pytest.mark.parametrize("module", MODULES)
def test_arrows_run_one_way(module):
    """Claim: data, rewards and grpo stand on the ground; nobody imports a trainer but the RL loop; nothing but the pinned packages."""
    found = set(imports(text_of(f"{module}.py"))) - set(sys.stdlib_module_names)
    assert found & set(MODULES) <= ARROWS[module]
    assert found - set(MODULES) <= OUTSIDE.get(module, PACKAGES)

def test_requirements_are_pinned_and_said():
    pinned = dict(line.split("==") for line in text_of("requirements.txt").split())
    used = {name for m in MODULES for name in imports(text_of(f"{m}.py"))} & PACKAGES - {"safetensors", "tokenizers"}
    assert {"PIL": "pillow"}.get("PIL") in pinned and {n.replace("PIL", "pillow") for n in used} | {"pytest"} == set(pinned)
    said = re.search(r"Dependencies: (.*?)(?:,? and nothing else|\.)", README, re.S)[1]
    assert set(re.findall(r"\w+", said)) == set(pinned)

def test_top_level_is_the_plan():
    """Claim: no utils.py, no package, no stray file."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode or not git.stdout:
        pytest.skip("not a git checkout")
    top = {f.split("/")[0] for f in git.stdout.split()}
    assert {t for t in top if t[0] != "."} == TOP and {f.split("/")[1] for f in git.stdout.split() if f.startswith("checkpoints/")} == {"tiny"}
    assert not [m for m in MODULES if re.search(r"^class \w+\((?!ValueError|pickle\.Unpickler|torch\.utils\.data)", text_of(f"{m}.py"), re.M)]        # no base classes

def test_no_comment_is_left_to_fill_in():
    """Bug: a placeholder (an HTML comment with nothing after it, a TODO) ships."""
    assert not re.findall(r"TODO|FIXME|XXX", README + "".join(text_of(f"{m}.py") for m in MODULES))
    assert not re.findall(r"^<!-- [\w-]+ -->\n\n(?=#|\Z|[A-Z])", README, re.M), "a section is still empty"
