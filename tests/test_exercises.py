"""
The exercises: a function is blanked and put back, the tests named in the list exist and bite, and every bug of the hunt is one that
the tests know. With --slow every exercise is solved and failed, as a reader would.
"""
import ast, importlib, os

import pytest

from appendix import exercises
from appendix.exercise_list import BUGS, EXERCISES
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
    """Claim: signature, decorators and docstring stay, the body goes; put back, the source is what it was."""
    blank = exercises.blanked(SOURCE, "C.area")
    assert exercises.BLANK in blank and "In pixels." in blank and "w = 1" not in blank and "# comment" not in blank and "return 3" in blank
    ast.parse(blank)
    assert exercises.with_function(blank, "C.area", exercises.function_text(SOURCE, "C.area")) == SOURCE
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
                found.setdefault((target, spelled(old), spelled(new)), set()).add(f"tests/{name}::{test.__name__}")
    return found

def test_every_bug_is_one_that_the_tests_know():
    """Bug: a hunt whose `check` is green before anything is repaired. Each bug stands in a list of MUTATIONS, which proves that the
    tests named for it turn red."""
    known = mutations()
    for bug in BUGS:
        tests = known.get((f"{bug.module}:{bug.function}", spelled(bug.old), spelled(bug.new)), set())
        assert set(bug.tests) & tests, f"{bug.name}: no MUTATIONS of {bug.tests} has it"

def test_the_list_is_about_the_code_as_it_is():
    """Claim: every function and every test that the list names exists, and every test has a claim to show; every bug stands where the list
    says."""
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

def test_start_check_solution(tmp_path, monkeypatch, capsys):
    """Claim: a blank, a wrong and a right attempt are told apart, in words; nothing is written outside exercises/."""
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
    original = exercises.function_text(exercises.read(os.path.join(ROOT, exercises.source_path(exercise.module))), exercise.function)
    with open(path, "w") as f:
        f.write(exercises.with_function(blank, exercise.function, original))
    assert exercises.check(exercise), capsys.readouterr().out
    first = exercises.find_function(blank, exercise.function).args.args[0].arg
    with open(path, "w") as f:
        f.write(blank.replace(exercises.BLANK, f"return {first}"))
    assert not exercises.check(exercise)
