"""The exercises: a function is blanked and put back, the tests named in the list exist and bite,
and every bug of the hunt is one that the tests know. With --slow every exercise is solved and
failed, every hunt shows its symptom and is graded.
"""
import ast, importlib, os, re

import pytest

from appendix import exercises, metrics
from appendix.exercise_list import BUGS, EXERCISES, Bug
from appendix.files import DataError
from conftest import ROOT

SOURCE = '''
import math


class C:
    @property
    def area(self):
        """The area.

        In pixels.
        """
        # comment
        w = 1
        return w * 2

    def other(self):
        return 3


def f(x):
    return x + 1


TABLE = {"a": f(1)}
'''

def test_a_function_is_blanked_and_put_back():
    """Claim: signature, decorators and docstring stay, the body goes; put back, the source is what
    it was."""
    blank = exercises.blanked(SOURCE, "C.area")
    assert (exercises.BLANK in blank and "In pixels." in blank and "w = 1" not in blank
            and "# comment" not in blank and "return 3" in blank)
    ast.parse(blank)
    assert exercises.with_function(
        blank, "C.area", exercises.function_text(SOURCE, "C.area")) == SOURCE
    blank = exercises.blanked(SOURCE, "f")
    assert "return x + 1" not in blank and "TABLE" in blank
    with pytest.raises(DataError, match="no function g"):
        exercises.function_text(SOURCE, "g")

def test_a_bug_is_planted_once():
    assert "return x - 1" in exercises.with_bug(SOURCE, "f", "x + 1", "x - 1")
    assert '{"a": f(2)}' in exercises.with_bug(SOURCE, "TABLE", "f(1)", "f(2)")
    with pytest.raises(DataError, match="0 times"):
        exercises.with_bug(SOURCE, "f", "x + 2", "x - 1")

def spelled(code):
    """Code without spaces and with one kind of quotes."""
    return "".join(code.split()).replace('"', "'")

def mutations():
    """{(module:function, old, new): names of the tests that it turns red} of all test files."""
    found = {}
    for name in sorted(os.listdir(os.path.join(ROOT, "tests"))):
        if name.startswith("test_") and name != "test_exercises.py":
            module = importlib.import_module(name[:-3])
            for target, old, new, test, *_ in getattr(module, "MUTATIONS", []):
                found.setdefault((target, spelled(old), spelled(new)), set()).add(
                    f"tests/{name}::{test.__name__}")
    return found

def test_every_bug_is_one_that_the_tests_know():
    """Bug: a hunt whose `check` is green before anything is repaired. Each bug stands in a list of
    MUTATIONS, which proves that the tests named for it turn red."""
    known = mutations()
    for bug in BUGS:
        tests = known.get(
            (f"{bug.module}:{bug.function}", spelled(bug.old), spelled(bug.new)), set())
        assert set(bug.tests) & tests, f"{bug.name}: no MUTATIONS of {bug.tests} has it"

def test_the_list_is_about_the_code_as_it_is():
    """Claim: every function and every test that the list names exists, and every test has a claim
    to show; every bug stands where the list says."""
    names = [thing.name for thing in (*EXERCISES, *BUGS)]
    assert len(set(names)) == len(names) and len(EXERCISES) >= 18 and len(BUGS) >= 10
    for exercise in EXERCISES:
        source = exercises.read(os.path.join(ROOT, exercises.source_path(exercise.module)))
        assert exercises.BLANK in exercises.blanked(source, exercise.function)
        assert ast.get_docstring(exercises.find_function(source, exercise.function)), exercise.name
        assert all(map(exercises.claim_of, exercise.tests)), exercise.name
    for bug in BUGS:
        source = exercises.read(os.path.join(ROOT, exercises.source_path(bug.module)))
        exercises.with_bug(source, bug.function, bug.old, bug.new)
        assert all(map(exercises.claim_of, bug.tests)), bug.name

@pytest.mark.slow
def test_start_check_solution(tmp_path, monkeypatch, capsys):
    """Claim: a blank, a wrong and a right attempt are told apart, in words; nothing is written
    outside exercises/."""
    monkeypatch.chdir(tmp_path)
    exercise = exercises.find("iou")
    path = exercises.attempt_path(exercise)
    with pytest.raises(DataError, match="is missing; begin with"):
        exercises.check(exercise)
    exercises.start(exercise)
    assert "line " in capsys.readouterr().out and os.listdir(tmp_path) == ["exercises"]
    with pytest.raises(DataError, match="there already"):
        exercises.start(exercise)
    with pytest.raises(DataError, match="still blank"):
        exercises.check(exercise)
    source = exercises.read(path)
    with open(path, "w") as f:
        f.write(source.replace(exercises.BLANK, "return 0.5 ("))
    with pytest.raises(DataError, match=r"rewards.py, line \d+"):
        exercises.check(exercise)
    with open(path, "w") as f:
        f.write(source.replace(exercises.BLANK, "return 0.5"))
    assert exercises.check(exercise) is False
    out = capsys.readouterr().out
    assert "Not yet. test_iou_by_hand fails" in out and "What happened:\n        assert" in out
    exercises.solution(exercise)
    assert "def iou(a, b):" in capsys.readouterr().out

@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_every_exercise_is_graded(exercise, tmp_path, monkeypatch, capsys):
    """Claim: the original body passes, a body that returns its first argument does not."""
    monkeypatch.chdir(tmp_path)
    path = exercises.attempt_path(exercise)
    exercises.start(exercise)
    blank = exercises.read(path)
    original = exercises.function_text(
        exercises.read(os.path.join(ROOT, exercises.source_path(exercise.module))),
        exercise.function)
    with open(path, "w") as f:
        f.write(exercises.with_function(blank, exercise.function, original))
    assert exercises.check(exercise), capsys.readouterr().out
    first = exercises.find_function(blank, exercise.function).args.args[0].arg
    with open(path, "w") as f:
        f.write(blank.replace(exercises.BLANK, f"return {first}"))
    assert not exercises.check(exercise)

# -----------------------------------------------------------------------------
# the bug hunt

def first(result, name):
    return result.rows[0][name]

def last(result, name):
    return result.rows[-1][name]

# What the reader of a hunt sees, as a claim about the healthy and the buggy run.
SYMPTOMS = {
    "the-reward-falls": lambda h, b: (last(b, "accuracy") < first(b, "accuracy") - 0.2
                                      and last(h, "accuracy") > first(h, "accuracy")),
    "no-signal": lambda h, b: (last(b, "grad_norm") == 0 < last(h, "grad_norm")
                               and last(b, "frac_zero_std") < 1),
    "paid-for-nothing": lambda h, b: (last(b, "reward") >= first(b, "reward") > 0.85
                                      and last(b, "accuracy") < last(h, "accuracy") - 0.15),
    "zooming-dies": lambda h, b: (last(b, "zooms") < first(b, "zooms") / 2
                                  and last(h, "zooms") > 0.8),
    "cut-off": lambda h, b: last(b, "clipped_ratio") > 0.9 and last(h, "clipped_ratio") < 0.1,
    "the-kl-explodes": lambda h, b: last(b, "kl") > max(0.5, 10 * last(h, "kl")),
    "crops-off": lambda h, b: b.summary["saw"] < h.summary["saw"] - 0.2,
    "resume-repeats": lambda h, b: ((h.steps_run, b.steps_run) == (8, 9)
                                    and last(h, "step") == last(b, "step") == 7),
    "two-temperatures": lambda h, b: (first(b, "logp_gap") > 0.01 > 100 * first(h, "logp_gap")
                                      and last(b, "clipfrac") > last(h, "clipfrac") == 0),
    "the-control-zooms": lambda h, b: (b.summary["accuracy_no_zoom"]
                                       > h.summary["accuracy_no_zoom"] + 0.3),
}

def test_every_bug_has_a_symptom():
    assert set(SYMPTOMS) == {bug.name for bug in BUGS}
    known = set(metrics.GLOSSARY) | {"steps run", "accuracy_after", "accuracy_no_zoom"}
    assert all(set(bug.look_at) <= known for bug in BUGS)

PROJECT = {
    "loop.py": '''
def next_step(done):
    """The step that follows."""
    return done
''',
    "train.py": '''
import json, os, sys
from loop import next_step
folder = "runs/bug"
os.makedirs(folder, exist_ok=True)
last = 4 if "--resume" in sys.argv else 2
done = 2 if "--resume" in sys.argv else 0
for step in range(next_step(done), last):
    print(f"step {step + 1:3}/{last} reward 0.5", flush=True)
    with open(f"{folder}/metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": step, "reward": 0.25 * step}) + chr(10))
if "--resume" in sys.argv and next_step(0) == 0:
    open(f"{folder}/summary.json", "w").write('{"accuracy_after": 0.75}')
    open(f"{folder}/report.html", "w").close()
print("the end")
''',
}

def test_a_hunt(tmp_path, monkeypatch, capsys):
    """Claim: the symptom stands beside a healthy run, which a second start continues; the first
    hint is the file, the second the function; a repaired copy shows no symptom; the project itself
    is not touched. Here the project is two short files."""
    project, work = tmp_path / "project", tmp_path / "work"
    project.mkdir(), work.mkdir()
    for name, text in PROJECT.items():
        (project / name).write_text(text)
    bug = Bug("off", "a step is missing", "Four steps, a stop, and a step is missing.",
              "loop", "next_step", "return done", "return done + 1",
              ("train.py", "--fast"), ("steps run", "reward", "accuracy_after"), (), "Count.",
              then=("--resume",))
    monkeypatch.chdir(work)
    monkeypatch.setattr(exercises, "ROOT", str(project))
    monkeypatch.setattr(exercises, "BUGS", [bug])
    with pytest.raises(DataError, match="begin with"):
        exercises.show_bug(bug)
    exercises.start_bug(bug)
    out = capsys.readouterr().out
    assert (re.search(r"^steps run +4 +2$", out, re.M)
            and re.search(r"^reward, first step +0 +0.25$", out, re.M))
    assert (re.search(r"^accuracy_after +0.75 +none$", out, re.M)
            and "the buggy run came to no end: the end" in out)
    assert ("python train.py --fast\npython train.py --resume\n" in out
            and out.count("report.html") == 1)
    exercises.main(["hint", "bug1"]), exercises.main(["hint", "bug1"])
    assert capsys.readouterr().out == "loop.py\nloop.py, next_step\n"
    with pytest.raises(DataError, match="is for exercises; expected start, show, hint, check"):
        exercises.main(["solution", "bug1"])
    copy = work / "exercises" / "off" / "loop.py"
    failing = iter(["It guards against this: the bug", ""])
    monkeypatch.setattr(exercises, "first_failure", lambda folder, tests: next(failing))
    with pytest.raises(SystemExit):
        exercises.main(["check", "off"])
    out = capsys.readouterr().out
    # the test's claim would give it away
    assert "Not yet" in out and "hint bug1" in out and "guards" not in out
    copy.write_text("def next_step(done):\n    return (")
    with pytest.raises(DataError, match="loop.py, line 2"):
        exercises.main(["check", "off"])
    copy.write_text(PROJECT["loop.py"])
    exercises.main(["check", "off"])
    assert "Found and repaired. In loop.py, next_step" in capsys.readouterr().out
    exercises.main(["show", "off"])
    assert re.search(r"^steps run +4 +4$", capsys.readouterr().out, re.M)
    assert (os.listdir(work) == ["exercises"]
            and set(os.listdir(project)) - {"__pycache__"} == set(PROJECT))

@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_bug_shows_and_is_graded(bug, tmp_path, monkeypatch, capsys):
    """Claim: the symptom shows; `check` is red before the repair and green after it."""
    monkeypatch.chdir(tmp_path)
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(exercises, "show_bug",
                      lambda bug, real=exercises.show_bug: seen.append(real(bug)))
        exercises.start_bug(bug)
    assert SYMPTOMS[bug.name](*seen[0]), capsys.readouterr().out
    assert not exercises.check_bug(bug)
    path = os.path.join(exercises.exercise_folder(bug.name), exercises.source_path(bug.module))
    with open(path, "w") as f:
        f.write(exercises.read(os.path.join(ROOT, exercises.source_path(bug.module))))
    assert exercises.check_bug(bug), capsys.readouterr().out
