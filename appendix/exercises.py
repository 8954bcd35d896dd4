"""Exercises cut from the living code and graded by its own tests, and a bug hunt.

    python -m appendix.exercises list           # all exercises and bugs
    python -m appendix.exercises start 1        # a chapter in which one function is blank
    python -m appendix.exercises check 1        # run the tests that guard the function
    python -m appendix.exercises solution 1     # the function as it is, and what its tests say
    python -m appendix.exercises start bug1     # a copy of the project with a bug, and its symptom
    python -m appendix.exercises hint bug1      # the file; asked again, the function
    python -m appendix.exercises show bug1      # run your copy again: is the symptom gone?
    python -m appendix.exercises check bug1     # is it repaired?

Everything happens in the folder exercises/ below the working directory; no other file is touched.
The list itself is in appendix/exercise_list.py; it holds the answers of the hunt.

An exercise is graded in a copy of the project: your function takes the place of the original, and
the tests named in the list run there. So an exercise is always about the code as it is now. Only
the function itself is taken over: helpers and imports must stand inside it.
"""
import argparse
import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import xml.etree.ElementTree
from dataclasses import dataclass

from tqdm import tqdm

from appendix import run
from appendix.exercise_list import BUGS, EXERCISES
from appendix.files import DataError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = "exercises"
BLANK = 'raise NotImplementedError("write this function")'
MOST_MINUTES = 10               # for the tests of one exercise, after which they are stopped
# What a hunt's copy leaves out: where the bugs are written down.
ANSWERS = ("exercise_list.py", "exercises.py", "tests")


def left_out(folder, names):
    """For shutil.copytree: what a copy leaves out, such as texts and Python environments."""
    patterns = shutil.ignore_patterns(".*", "__pycache__", "runs", "exercises", "scenes", "*.md")
    environments = {name for name in names
                    if os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))}
    return patterns(folder, names) | environments


def left_out_of_a_hunt(folder, names):
    return left_out(folder, names) | set(ANSWERS)


# --------------------------------------------------------------------------------------------------
# functions in source files

def source_path(module):
    """"grpo" -> grpo.py, "appendix.tree_search" -> appendix/tree_search.py, below the project."""
    return module.replace(".", os.sep) + ".py"


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


@functools.lru_cache(maxsize=64)
def syntax_tree(source):
    return ast.parse(source)


def find_function(source, name):
    """The syntax tree of a function or "Class.method". Raises DataError."""
    node = syntax_tree(source)
    for part in name.split("."):
        found = [child for child in node.body
                 if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name == part]
        if not found:
            raise DataError(f"there is no function {name} any more; expected it to stay in place")
        node = found[0]
    return node


def line_span(node):
    """First and last line of a function, decorators included, counted from 1."""
    first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
    return first, node.end_lineno


def function_text(source, name):
    first, last = line_span(find_function(source, name))
    return "\n".join(source.split("\n")[first - 1:last])


def blanked(source, name):
    """The source with the body of a function blank; its signature and docstring stay."""
    node = find_function(source, name)
    lines = source.split("\n")
    body = node.body
    has_docstring = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    # Comments between the docstring and the first statement belong to the body.
    first = body[0].end_lineno + 1 if has_docstring else body[0].lineno
    indent = " " * body[0].col_offset
    return "\n".join(lines[:first - 1] + [indent + BLANK] + lines[node.end_lineno:])


def with_function(source, name, text):
    """The source with a function replaced by the same function from another text."""
    first, last = line_span(find_function(source, name))
    lines = source.split("\n")
    return "\n".join(lines[:first - 1] + text.split("\n") + lines[last:])


def with_bug(source, name, old, new):
    """The source with `old` replaced by `new` in a function or in a statement NAME = ...

    Raises DataError if it does not stand there exactly once.
    """
    lines = source.split("\n")
    first, last = span_of_definition(source, name)
    text = "\n".join(lines[first - 1:last])
    if text.count(old) != 1:
        raise DataError(f"{old!r} stands in {name} {text.count(old)} times, expected once: "
                        "the bug needs another place")
    return "\n".join(lines[:first - 1] + text.replace(old, new).split("\n") + lines[last:])


def span_of_definition(source, name):
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.lineno, node.end_lineno
    return line_span(find_function(source, name))


# --------------------------------------------------------------------------------------------------
# exercises

def exercise_folder(name):
    return os.path.join(FOLDER, name)


def start(exercise):
    """Write exercises/NAME/FILE.py: the chapter with the function blank."""
    source = read(os.path.join(ROOT, source_path(exercise.module)))
    path = attempt_path(exercise)
    if os.path.exists(path):
        raise DataError(f"{path} is there already; remove it to begin again")
    run.make_dir(os.path.dirname(path))
    run.write_text(path, blanked(source, exercise.function))
    line = find_function(read(path), exercise.function).lineno
    number = EXERCISES.index(exercise) + 1
    print(f"{textwrap.fill(exercise.question, 90)}\n\n"
          f"{textwrap.fill('Read first: ' + exercise.read_first, 90)}\n"
          f"Write {exercise.function} in {path}, line {line} (about {exercise.minutes} minutes),\n"
          f"then: python -m appendix.exercises check {number}\n"
          "Its docstring and the comments around it say what goes in and what comes out.\n"
          "Only this function is graded: put helpers and imports inside it.")


def attempt_path(exercise):
    return os.path.join(exercise_folder(exercise.name), os.path.basename(
        source_path(exercise.module)))


def check(exercise):
    """Grade an attempt -> True if all tests pass. Prints what is wrong first."""
    path = attempt_path(exercise)
    if not os.path.exists(path):
        number = EXERCISES.index(exercise) + 1
        raise DataError(f"{path} is missing; begin with: python -m appendix.exercises start "
                        f"{number}")
    text = attempt_text(path, exercise.function)
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(ROOT, copy, ignore=left_out, dirs_exist_ok=True)
        print(f"running {tests_in_words(exercise)} with your {exercise.function} ...", flush=True)
        place = os.path.join(copy, source_path(exercise.module))
        run.write_text(place, with_function(read(place), exercise.function, text))
        failure = first_failure(copy, exercise.tests)
    print(failure or f"Right. {tests_in_words(exercise)} passed. Compare with: "
                     f"python -m appendix.exercises solution {EXERCISES.index(exercise) + 1}")
    return not failure


def tests_in_words(exercise):
    return f"{len(exercise.tests)} test{'s' if len(exercise.tests) > 1 else ''}"


def attempt_text(path, function):
    """The reader's function. Raises DataError where it cannot be read."""
    source = read(path)
    try:
        text = function_text(source, function)
    except SyntaxError as e:
        raise DataError(f"{path}, line {e.lineno}: {e.msg}") from None
    if BLANK in text:
        raise DataError(f"{function} in {path} is still blank")
    return text


def solution(exercise):
    """Print the function as it is, and the claims of the tests that guard it."""
    print(function_text(read(os.path.join(ROOT, source_path(exercise.module))), exercise.function))
    print("\nThe tests that guard it:")
    for test in exercise.tests:
        print(textwrap.indent(textwrap.fill(f"{test.split('::')[1]} {about(claim_of(test))}", 90),
                              "    "))


# --------------------------------------------------------------------------------------------------
# tests

def first_failure(folder, tests):
    """Run tests of a copy of the project -> "" if all pass, else what is wrong first, in words."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                   f"--junitxml={report.name}", *tests]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
        try:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True,
                                  timeout=60 * MOST_MINUTES)
        except subprocess.TimeoutExpired:
            return (f"Not yet. The tests did not end within {MOST_MINUTES} minutes: "
                    "does the function loop for ever?")
        if done.returncode == 0:
            return ""
        tests_by_name = {test.split("::")[1]: test for test in tests}
        for case in cases_in(report.name):
            for problem in [*case.findall("failure"), *case.findall("error")]:
                name = case.get("name").split("[")[0]
                if name in tests_by_name:
                    claim = claim_of(tests_by_name[name])
                    return in_words(name, claim, problem.get("message") or "")
    return f"The tests could not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def cases_in(path):
    """The cases in a JUnit report; none where pytest ended before it could write one."""
    try:
        return list(xml.etree.ElementTree.parse(path).iter("testcase"))
    except xml.etree.ElementTree.ParseError:
        return []


def claim_of(test):
    """The docstring of "tests/test_grpo.py::test_name" as one paragraph."""
    path, name = test.split("::")
    node = find_function(read(os.path.join(ROOT, path)), name)
    return " ".join((ast.get_docstring(node) or "").split())


def in_words(name, claim, message):
    """What the first failing test is about, and what it saw."""
    message = "\n".join(message.strip().split("\n")[:6])[:600]
    what_happened = textwrap.indent(message, "        ")
    return (f"Not yet. {name} fails.\n"
            f"{textwrap.indent(textwrap.fill('It ' + about(claim), 90), '    ')}\n"
            f"    What happened:\n{what_happened}")


def about(claim):
    """The docstring of a test as the end of a sentence about it."""
    if claim.startswith("Bug: "):
        return f"guards against this: {claim.removeprefix('Bug: ')}"
    return f"checks this: {claim.removeprefix('Claim: ')}"


# --------------------------------------------------------------------------------------------------
# the bug hunt

def start_bug(bug):
    """Copy the project with a bug in it to exercises/NAME, then show its symptom."""
    folder = exercise_folder(bug.name)
    if os.path.exists(folder):
        raise DataError(f"{folder} is there already; remove it to begin again")
    shutil.copytree(ROOT, folder, ignore=left_out_of_a_hunt)
    plant(bug, folder)
    print(f"{textwrap.fill(bug.story, 90)}\n\nTwo runs at once, one to two minutes:")
    show_bug(bug)
    number = BUGS.index(bug) + 1
    print(f"\nOne line of the copy in {folder} is wrong: in a chapter, or in a file of appendix/.\n"
          f"Repair it there, then: python -m appendix.exercises check bug{number}\n"
          f"Where to look:        python -m appendix.exercises hint bug{number}\n"
          f"The symptom again:    python -m appendix.exercises show bug{number}")


def plant(bug, folder):
    path = os.path.join(folder, source_path(bug.module))
    run.write_text(path, with_bug(read(path), bug.function, bug.old, bug.new))


def show_bug(bug):
    """Run the bug's command with our code and with the reader's copy -> both results, printed."""
    folder = started(bug)
    healthy = f"{folder}-healthy"
    lines = [" ".join(("python", *bug.command))]
    if bug.then:
        lines.append(" ".join(("python", *bug.command[:1], *bug.then)))
    print("\n".join(lines))
    results = run_both(bug, healthy, folder)
    print_side_by_side(bug, *results)
    for out in (healthy, folder):
        page = os.path.join(out, "runs", "bug", "report.html")
        if os.path.exists(page):
            print(f"its episodes: {page}")
    return results


def started(bug):
    """The folder of a hunt. Raises DataError if it has not begun."""
    folder = exercise_folder(bug.name)
    if not os.path.exists(folder):
        raise DataError(f"{folder} is missing; begin with: python -m appendix.exercises start "
                        f"bug{BUGS.index(bug) + 1}")
    return folder


@dataclass
class Result:
    """What a run left. rows: of metrics.jsonl. steps_run: lines of the log that report a step."""
    rows: list
    summary: dict
    steps_run: int
    last_words: str                                     # the last line of its log


def run_both(bug, healthy, folder):
    """Run the bug's command with our code and with the buggy copy, at once -> two Results."""
    for out in (healthy, folder):
        os.makedirs(out, exist_ok=True)
        run.write_text(os.path.join(out, "log.txt"), "")
    script, *flags = bug.command
    run_at_once(script, [*flags, "--fresh"], healthy, folder, "both runs")
    if bug.then:
        run_at_once(script, bug.then, healthy, folder, "both, again")
    return [read_result(out) for out in (healthy, folder)]


def run_at_once(script, flags, healthy, folder, label):
    """Start a script in both folders and wait, with a bar that counts steps of the RL loop."""
    processes = []
    for root, out in ((ROOT, healthy), (folder, folder)):
        root = os.path.abspath(root)
        command = [sys.executable, os.path.join(root, script), *flags, "--name=bug"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        with open(os.path.join(out, "log.txt"), "a", encoding="utf-8") as log:
            processes.append(subprocess.Popen(command, cwd=out, env=env, stdout=log,
                                              stderr=subprocess.STDOUT))
    before = steps_in_log(healthy) + steps_in_log(folder)
    with tqdm(desc=label, unit=" steps", disable=None, leave=False) as bar:
        while any(process.poll() is None for process in processes):
            time.sleep(0.5)
            bar.update(steps_in_log(healthy) + steps_in_log(folder) - before - bar.n)


def steps_in_log(out):
    return len(re.findall(r"^step +\d", read(os.path.join(out, "log.txt")), re.M))


def read_result(out):
    """The Result of the run in a folder; without rows or summary if it ended before it had any."""
    rows = []
    summary = {}
    metrics = os.path.join(out, "runs", "bug", "metrics.jsonl")
    if os.path.exists(metrics):
        rows = [json.loads(line) for line in read(metrics).splitlines()]
    path = os.path.join(out, "runs", "bug", "summary.json")
    if os.path.exists(path):
        summary = json.loads(read(path))
    lines = read(os.path.join(out, "log.txt")).strip().splitlines()
    return Result(rows, summary, steps_in_log(out), lines[-1] if lines else "")


def print_side_by_side(bug, healthy, buggy):
    """The figures that show the symptom: first and last step of metrics, then the summary."""
    print(f"\n{'':28}{'healthy':>12}{'buggy':>12}")
    for name in bug.look_at:
        for label, values in figures_of(name, healthy, buggy):
            print(f"{label:28}{figure(values[0]):>12}{figure(values[1]):>12}")
    for label, result in (("healthy", healthy), ("buggy", buggy)):
        if not result.summary:
            print(f"the {label} run came to no end: {result.last_words}")


def figures_of(name, *results):
    """A name of look_at -> [(label, a value or None for each result)]."""
    if name == "steps run":
        return [(name, [result.steps_run for result in results])]
    if any(name in result.summary for result in results):
        return [(name, [result.summary.get(name) for result in results])]
    found = []
    for label, place in (("first step", 0), ("last step", -1)):
        values = [result.rows[place].get(name) if result.rows else None for result in results]
        found.append((f"{name}, {label}", values))
    return found


def figure(value):
    return "none" if value is None else f"{value:.3g}"


def check_bug(bug):
    """Is the bug repaired? Runs the test that knows it, with the reader's copy -> True or False.

    What the test is about would give the bug away, so a failure says no more than that.
    """
    folder = os.path.abspath(started(bug))
    path = os.path.join(folder, source_path(bug.module))
    try:
        ast.parse(read(path))
    except SyntaxError as e:
        raise DataError(f"{path}, line {e.lineno}: {e.msg}") from None
    print("running the test that knows this bug ...", flush=True)
    with tempfile.TemporaryDirectory() as whole:        # the project, and over it the reader's copy
        shutil.copytree(ROOT, whole, ignore=left_out, dirs_exist_ok=True)
        shutil.copytree(folder, whole, ignore=left_out, dirs_exist_ok=True)
        failure = first_failure(whole, bug.tests)
    if failure:
        print("Not yet: the test still fails. For a hint: python -m appendix.exercises hint "
              f"bug{BUGS.index(bug) + 1}")
        return False
    print(f"Found and repaired. In {source_path(bug.module)}, {bug.function}, the copy had\n"
          f"    {bug.new}\nin place of\n    {bug.old}\n{textwrap.fill(bug.lesson, 90)}")
    return True


def hint(bug):
    """First the file, then the function."""
    path = os.path.join(started(bug), "hints.txt")
    asked = os.path.exists(path)
    if asked:
        print(f"{source_path(bug.module)}, {bug.function}")
    else:
        run.write_text(path, "1")
        print(source_path(bug.module))


# --------------------------------------------------------------------------------------------------
# the command line

def show_list():
    print("Exercises: a function is blank, you write it\n")
    for number, exercise in enumerate(EXERCISES, 1):
        title = f"{number:3}  {exercise.name} ({exercise.minutes} minutes, "
        print(f"{title}{source_path(exercise.module)})")
        print(textwrap.indent(textwrap.fill(exercise.question, 90), "     "))
    print("\nBugs: a copy of the project with one wrong line, and its symptom\n")
    for number, bug in enumerate(BUGS, 1):
        print(f"  bug{number}  {bug.name}: {bug.symptom}")


def find(word):
    """"3" -> the third exercise, "bug3" -> the third bug; names work too. Raises DataError."""
    found = re.fullmatch(r"(bug)?(\d{1,3})", word)
    things = BUGS if found and found[1] else EXERCISES
    if found and 1 <= int(found[2]) <= len(things):
        return things[int(found[2]) - 1]
    for thing in [*EXERCISES, *BUGS]:
        if thing.name == word:
            return thing
    raise DataError(f"there is no exercise {word!r}; expected 1 to {len(EXERCISES)} or bug1 to "
                    f"bug{len(BUGS)}")


EXERCISE_ACTIONS = {"start": start, "check": check, "solution": solution}
BUG_ACTIONS = {"start": start_bug, "show": show_bug, "hint": hint, "check": check_bug}


def main(argv=None):
    parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["list", "start", "check", "solution", "hint", "show"])
    parser.add_argument("which", nargs="?", default="",
                        help="a number such as 3 or bug3, or a name")
    args = parser.parse_args(argv)
    if args.what == "list":
        return show_list()
    if not args.which:
        raise DataError(f"{args.what} needs an exercise or a bug, such as 3 or bug3; see list")
    thing = find(args.which)
    is_bug = thing in BUGS
    actions = BUG_ACTIONS if is_bug else EXERCISE_ACTIONS
    if args.what not in actions:
        raise DataError(f"{args.what} is for {'exercises' if is_bug else 'bugs'}; "
                        f"expected {', '.join(actions)}")
    passed = actions[args.what](thing)
    if args.what == "check" and not passed:
        sys.exit(1)


if __name__ == "__main__":
    with run.exit_on_error(interrupted="interrupted"):
        main()
