"""The course's texts against the code: equations name functions that exist and that name the
equation, the table of symptoms names flags and metrics that exist, every stop of the course is
whole, the notebook's cells run.
"""
import ast, contextlib, dataclasses, importlib, io, json, os, re, sys

import pytest
from PIL import Image

import data, evaluate, train_rl, train_sft
from appendix import exercises, metrics, run, sweep
from appendix.exercise_list import EXERCISES
from conftest import ROOT

def rows(name):
    """The cells of the table of a Markdown file of the appendix."""
    with open(os.path.join(ROOT, "appendix", name), encoding="utf-8") as f:
        lines = [line.strip() for line in f if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]

def text_of(name):
    """The docstring of "module.function"; of a table in capitals, its source with comments."""
    module, _, function = name.rpartition(".")
    source = exercises.read(os.path.join(ROOT, exercises.source_path(module)))
    if function.isupper():
        first, last = exercises.span_of_definition(source, function)
        return "\n".join(source.split("\n")[first - 1:last])
    return (ast.get_docstring(exercises.find_function(source, function))
            + ast.get_docstring(ast.parse(source)))

@pytest.mark.parametrize("paper, equation, what, function", rows("equations.md"),
                         ids=lambda cell: cell.strip("`")[:30])
def test_equations_lead_to_functions(paper, equation, what, function):
    """Claim: the function exists, its docstring (or its file's) names the paper, and the equation
    by number."""
    name = function.strip("`")
    text = " ".join(text_of(name).split())
    assert hasattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
    paper_name, _, number = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", paper).rpartition(", ")
    assert (number in text
            or re.search(rf"\b{re.escape(paper_name)}\b", text)), f"{name} does not name {paper}"
    if re.match(r"eq\.|p\.|figure", equation):
        assert equation in text, f"{name} does not name {equation}"

# -----------------------------------------------------------------------------
# the twelve stops (test_readme.py holds their commands, functions, files and headings)

def stops():
    """[(number, its lines)] of course.md."""
    parts = re.split(r"^## (\d+)\. ", open_course(), flags=re.M)[1:]
    return [(int(number), text) for number, text in zip(parts[::2], parts[1::2])]

def open_course():
    with open(os.path.join(ROOT, "appendix", "course.md"), encoding="utf-8") as f:
        return f.read()

def test_every_stop_is_whole():
    """Claim: twelve stops, each with something to read, a command, something to look at and to see,
    and two questions whose answers are folded away."""
    assert [number for number, _ in stops()] == list(range(1, 13))
    for number, text in stops():
        for part in ("**Read** ", "\n    python ", "**Look at** ", "**You should see** "):
            assert text.count(part) >= 1, (number, part)
        questions = re.findall(r"<details>\n<summary>(.+?)</summary>\n\n(.+?)\n</details>", text,
                               re.S)
        assert len(questions) == text.count("<details>") == 2, number
        assert all("?" in question for question, _ in questions), number

def test_the_chapters_come_in_order():
    """Claim: stop n reads chapter n; the last four are studies, which run sweeps."""
    chapters = ("data", "rewards", "grpo", "model", "zoom_rollout", "train_sft", "train_rl",
                "evaluate")
    for (number, text), chapter in zip(stops(), chapters):
        assert f"`{chapter}." in text.split("**Read** ")[1].split("\n\n")[0], number
    for number, text in stops()[8:]:
        assert text.startswith("Study: ") and "python -m appendix.sweep " in text, number

def test_the_lecture_takes_ninety_minutes():
    """Claim: the last column adds up, and names the stops that have a line for it."""
    minutes = {int(number): int(lecture) if lecture.strip() else 0
               for number, lecture in re.findall(
                   r"^\| \[(\d+)\]\(#.*?\) \|.*?\| *\d+ *\|([\d ]*)\|$", open_course(), re.M)}
    assert sorted(minutes) == list(range(1, 13)) and sum(minutes.values()) == 90
    assert ([number for number, text in stops() if "*Lecture.*" in text]
            == [number for number, n in minutes.items() if n])

def test_exercises_of_the_course():
    """Claim: a stop's exercises exist and are about what it reads; no exercise is left out."""
    names = {e.name: e for e in EXERCISES}
    named = [name
             for _, text in stops()
             for part in re.findall(
                 r"\*\*Practise\*\* with the exercises? (.+?)\.(?:\n\n| This)", text, re.S)
             for name in re.findall(r"`([\w-]+)`", part)]
    assert sorted(named) == sorted(names)

def test_tests_that_a_stop_runs():
    """Bug: `-k` names tests that are gone, and pytest runs none of them."""
    for path, words in re.findall(r'-m pytest (\S+) -v -k "(.+?)"', open_course()):
        tests = re.findall(r"^def (test_\w+)", exercises.read(os.path.join(ROOT, path)), re.M)
        for word in words.split(" or "):
            assert any(word in test for test in tests), word

def test_every_arm_of_a_study_is_a_run():
    """Claim: all arms of the course's sweeps are settings that train_rl.py takes."""
    commands = re.findall(r"^    python -m appendix\.sweep (.+)$", open_course(), re.M)
    assert len(commands) >= 5
    for command in commands:
        args, axes, shared = sweep.parse(command.split())
        plan = sweep.Plan("name", sweep.arms_of(axes),
                          sweep.seeds_of(args.seeds or sweep.SEEDS), shared)
        runs, _ = sweep.runs_of(plan)
        assert len(runs) == len(plan.arms) * len(plan.seeds) >= 4

# -----------------------------------------------------------------------------
# the notebook

SHORT = {"TRACES": 16, "STEPS": 2, "PROMPTS": 4, "QUESTIONS": 4}

def run_cell(source, names):
    """A cell as Jupyter runs it -> the value of its last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), names)

def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Claim: the cells run in order without Jupyter; they show pictures, an episode, a group with
    its advantages and a curve; no output is stored, and nothing is written beside the notebook."""
    with open(os.path.join(ROOT, "appendix", "course.ipynb"), encoding="utf-8") as f:
        cells = json.load(f)["cells"]
    assert all(cell["cell_type"] != "code" or not cell["outputs"] for cell in cells)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names, shown = {"__name__": "__main__"}, []
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            shown.append(run_cell(source, names))
            if "STEPS = " in source:
                assert set(SHORT) <= set(names)
                names |= SHORT
    out = capsys.readouterr().out
    assert (out.count("advantage ") == 8 and "<think>" in out
            and len(re.findall(r"^step +\d", out, re.M)) == 2)
    drawings = [x for x in shown if hasattr(x, "_repr_svg_")]
    images = [x for x in shown if isinstance(x, Image.Image)]
    assert (len(drawings) == 2 and all(d._repr_svg_().startswith("<svg") for d in drawings)
            and len(images) == 3)
    assert images[0].size == (data.SIDE, data.SIDE) and images[1].size == names["view"].fed
    assert out.count("95 % interval") == 2 * len(evaluate.MODES) and not os.listdir(tmp_path)

def test_the_notebook_is_short():
    """Claim: thin: no cell has more than twenty lines, no line more than 100 columns, and no
    library but the repository's is imported."""
    with open(os.path.join(ROOT, "appendix", "course.ipynb"), encoding="utf-8") as f:
        cells = [("".join(c["source"]), c["cell_type"]) for c in json.load(f)["cells"]]
    for source, kind in cells:
        assert max(map(len, source.split("\n"))) <= 100
        if kind == "code":
            assert source.count("\n") < 20
            modules = {node.module or ""
                       for node in ast.walk(ast.parse(source))
                       if isinstance(node, ast.ImportFrom)}
            modules |= {a.name
                        for node in ast.walk(ast.parse(source))
                        if isinstance(node, ast.Import)
                        for a in node.names}
            known = {"data", "train_sft", "train_rl", "zoom_rollout", "evaluate", "appendix",
                     "appendix.optimizer"}
            assert modules <= known | set(sys.stdlib_module_names)

# -----------------------------------------------------------------------------
# when it does not learn

CONFIGS = (train_rl.Config, train_sft.Config, evaluate.Config)

def takes(config, words):
    """Does the script take `--flag` or `--flag value`?"""
    name = words[0].removeprefix("--").replace("-", "_")
    field = next((f for f in dataclasses.fields(config) if f.name == name), None)
    if field is None:
        return False
    value = words[1:] or ([] if field.type is bool else [str(field.default)])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            run.make_parser(config, "").parse_args(
                [f"{words[0]}={value[0]}" if value else words[0]])
    except SystemExit:
        return False
    return True

@pytest.mark.parametrize("symptom, look_at, cause, what_to_do", rows("troubleshooting.md"),
                         ids=lambda cell: cell[:40])
def test_symptoms_lead_to_metrics_and_flags(symptom, look_at, cause, what_to_do):
    """Bug: the table sends a reader to a metric or a flag that was renamed."""
    keys = (set(metrics.GLOSSARY) | set(metrics.SUMMARY_GLOSSARY) | set(metrics.FAITHFULNESS)
            | {"held_out"})
    files = {"metrics.jsonl", "config.json", "summary.json", "evaluate.py"}
    for quoted in re.findall(r"`([^`]+)`", " ".join((symptom, look_at, cause, what_to_do))):
        if "--" in quoted:
            words = quoted.split()
            if words[0].endswith(".py"):
                words = words[1:]
            assert any(takes(config, words) for config in CONFIGS), quoted
        else:
            assert quoted in keys | files, quoted
    assert "`" in look_at or re.search(r"report|plan|prompt", look_at), "nothing to look at"

def test_symptoms_are_those_that_people_report():
    """Claim: at least eighteen symptoms, none twice; most name the threads in which people
    reported them."""
    symptoms = [row[0] for row in rows("troubleshooting.md")]
    assert len(set(symptoms)) == len(symptoms) >= 18
    assert sum(bool(re.search(r"\([A-Za-z].* \d+", symptom)) for symptom in symptoms) >= 8
