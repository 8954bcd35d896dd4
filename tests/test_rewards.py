"""rewards.py, by tables. "Bug:" names the failure of an original (or of a regular expression) that
a test guards against.

The fakes have the fields that rewards.py reads and nothing else: a sample, and the turns of an
episode.
"""
import itertools
import math
import time
from types import SimpleNamespace

import pytest

import data
from conftest import check_mutation, names
from rewards import RECIPES, Bonuses, iou, parse_answer, score

# -----------------------------------------------------------------------------
# fakes

def sample(answer_type, answer=None, targets=(), options=(), **meta):
    targets = [t if isinstance(t, dict) else {"image": 0, "box": list(t)} for t in targets]
    return SimpleNamespace(answer_type=answer_type, answer=answer, targets=targets,
                           options=list(options), meta=meta)

POINT = sample("point", targets=[(10, 20, 30, 40)])
BOX = sample("box", targets=[(0, 0, 100, 100)])
CHOICE = sample("choice", 0, options=["left", "right"])
TEXT = sample("text", ["red"])

def hidden(answer_type):
    return sample(answer_type, options=["left", "right"])

def look(x, y, think="", worked=True):
    """A turn that zooms at (x, y)."""
    call = f'{{"name": "search_coordinate", "arguments": {{"coordinate": [{x}, {y}]}}}}'
    return SimpleNamespace(
        text=f"<think> {think} </think>\n<tool_call>\n{call}\n</tool_call>",
        point=(x, y), forced=False, crop=(0, 0, 9, 9) if worked else None,
        error=None if worked else "outside the image")

def say(text):
    """A turn that makes no call."""
    return SimpleNamespace(text=text, point=None, crop=None, error=None, forced=False)

def answer(said, think="so"):
    return say(f"<think> {think} </think>\n<answer>{said}</answer>")

def reward_of(sample, turns, recipe, **options):
    turns = turns if isinstance(turns, list) else [say(turns)]
    options.setdefault("bonuses", Bonuses(distinct=0.2))
    return score(sample, "\n".join(turn.text for turn in turns), turns, recipe, **options)

def is_right(sample, said, **options):
    return reward_of(sample, f"<answer>{said}</answer>", "accuracy", **options)["accuracy"]

# -----------------------------------------------------------------------------
# parse_answer

POINTS = [
    ("<answer>(3, 4)</answer>", (3, 4)),
    ("<answer> [3, 4] </answer>", (3, 4)),
    # Bug: no DOTALL, a line break hid the answer
    ("<answer>\n( 3 ,\n4 )\n</answer>", (3, 4)),
    ("<answer>(3.5, .25)</answer>", (3.5, 0.25)),           # Bug: int() only, floats scored 0
    ("<answer>(-3, +4.5)</answer>", (-3, 4.5)),             # Bug: minus signs were skipped over
    ("<answer>Point: (3, 4).</answer>", (3, 4)),
    ('<answer>{"point_2d": [3, 4], "label": "a"}</answer>', (3, 4)),
    # numbers in the label
    ('<answer>```json\n[{"label": "key (1, 2)", "point_2d": [3, 4]}]\n```</answer>', (3, 4)),
    ("<answer>(10, 20, 30, 40)</answer>", (20, 30)),        # a box counts by its center
    ("<answer>(10,20),(30,40)</answer>", (10, 20)),         # Bug: two points were glued into a box
    ("<answer>[204,315], [678,315]</answer>", (204, 315)),
    # RoboSpatial's own list
    ("<answer>[(0.41, 0.55), (0.81, 0.57)]</answer>", (0.41, 0.55)),
    ("first (9, 9), then\n(1, 2), (3, 4), (5, 6) it is", (1, 2)),
    # loose talk: the last list, its first point
    ("first (9, 9); now (1, 2), (3, 4), (5, 6) it is", (1, 2)),
    ('<answer>{"bbox_2d": [10, 20, 30, 40]}</answer>', (20, 30)),
    ("<|box_start|>(10,20),(30,40)<|box_end|>", (20, 30)),
    # Bug: loose beat marked
    ("<|box_start|>(230,345),(300,385)<|box_end|>, that is (230, 345)", (265, 365)),
    # two answers: the last tag
    ("<answer>(1, 2)</answer><answer>(3, 4)</answer>", (3, 4)),
    ("<answer>(1, 2)<answer>(3, 4)</answer>", (3, 4)),      # nested
    ("<answer>(3, 4)</answer></answer>", (3, 4)),
    ("<answer>(3, 4)</answer> and <answer>(5, 6", (3, 4)),  # the second never closes
    ("<answer>(3, 4) or (5, 6)</answer>", (3, 4)),          # hedging in a tag: its start
    ("<answer>none</answer> (3, 4)", None),                 # the tag is the answer, and it has none
    ("</answer>(3, 4)<answer>", (3, 4)),
    ("(3, 4)", (3, 4)),
    ("I thought of (1, 2), it is (3, 4)", (3, 4)),          # loose talk: its end
    ("<think>(1, 2)</think> (3, 4)", (3, 4)),
    ("<think>(1, 2)</think>", None),                        # Bug: points in a thought were answers
    ("<think>(1, 2) and on and", None),                     # ... also in one that was cut off
    ("<think>a</think><answer>(3, 4)", (3, 4)),             # cut off before </answer>
    # a zoom is no answer
    ('<think>a</think>\n<tool_call>{"arguments": {"coordinate": [3, 4]}}</tool_call>', None),
    ('<think>a</think>\n<tool_call>{"arguments": {"coordinate": [3, 4]}}', None),
    ("<think>a</think><tool_call>[1, 2]</tool_call> sorry: nothing", None),
    ("<tool_call>[1, 2]</tool_call> (3, 4)", (3, 4)),
    ("<answer>(3; 4)</answer>", None),
    ("<answer>3, 4</answer>", None),
    ("<answer>(3)</answer>", None),
    ("<answer>(3, 4, 5)</answer>", None),
    ("<answer>(3, 4, 5, 6, 7)</answer>", None),
    ("<answer>(1.2.3, 4)</answer>", None),
    ("<answer>(nan, 4)</answer>", None),
    ("<answer>(inf, -inf)</answer>", None),
    ('<answer>{"point_2d": [NaN, Infinity]}</answer>', None),
    # Bug: int() refuses 5000 digits: a crash
    (f"<answer>({'9' * 5000}, 4)</answer>", None),
    (f"<answer>({'9' * 300}, {'9' * 300}, {'9' * 309}, 1)</answer>", None),
    ("<answer></answer>", None),
    ("<answer>", None),
    ("", None),
]

BOXES = [
    ("<answer>(1,2),(3,4)</answer>", (1, 2, 3, 4)),
    # Bug: spaces and line breaks were refused
    ("<answer>\n(1, 2),\n(3, 4)\n</answer>", (1, 2, 3, 4)),
    ("<answer>(1, 2, 3, 4)</answer>", (1, 2, 3, 4)),
    ("<answer>[1, 2, 3, 4]</answer>", (1, 2, 3, 4)),
    ("<answer>[[1, 2], [3, 4]]</answer>", (1, 2, 3, 4)),
    # Bug: int('0.25') zeroed float baselines
    ("<answer>[0.25, .5, 1., -2]</answer>", (0.25, 0.5, 1, -2)),
    ("<answer><|box_start|>(1,2),(3,4)<|box_end|></answer>", (1, 2, 3, 4)),
    ('<answer>```json\n[\n{"bbox_2d": [1, 2, 3, 4], "label": "[9, 9, 9, 9]"}\n]\n```</answer>',
     (1, 2, 3, 4)),
    ('<answer>{"label": "[9, 9, 9, 9]", "bbox_2d": [1, 2, 3, 4]}</answer>', (1, 2, 3, 4)),
    # Bug: tags in a label hid the box
    ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "<think>left chair</think>"}]\n```',
     (1, 2, 3, 4)),
    ("<answer>(9, 9) is the corner of (1,2),(3,4)</answer>", (1, 2, 3, 4)),
    # inverted: parsed as said, worth nothing
    ("<answer>(30,40),(10,20)</answer>", (30, 40, 10, 20)),
    ("<answer>(0,0),(5000,5000)</answer>", (0, 0, 5000, 5000)),  # no clamp
    ("<think>(5,6),(7,8)</think> It's in the third image. (1,2),(3,4)", (1, 2, 3, 4)),
    # Bug: MIG-Bench's parser reads the thought
    ("<think>(5,6),(7,8)</think>", None),
    ("<answer>(1, 2)</answer>", None),
    ("<answer>(1,2) (3,4)</answer>", None),
    ("<answer>(1,2),(3,4</answer>", None),
    (f"<answer>(1,2),(3,{'9' * 5000})</answer>", None),
]

WORDS = [
    ("<answer> right </answer>", "right"),
    ("<answer>\nthe red\nbus\n</answer>", "the red\nbus"),  # Bug: no DOTALL
    ("<answer>a</answer> <answer>b</answer>", "b"),
    ("<think>x</think> right", "right"),
    ("<think>x</think><answer>right", "right"),
    ("right", "right"),
    # text that looks like a special token is text
    ("<answer>a<|im_end|>b</answer>", "a<|im_end|>b"),
    ("<answer>(1, 2)</answer>", "(1, 2)"),
    ("<think>only a thought", None),
    ("<think>x</think>\n<tool_call>{}</tool_call>", None),
    ("<answer> \n </answer>", None),
    ("  ", None),
]

@pytest.mark.parametrize("text, value", POINTS)
def test_parse_point(text, value):
    """Claim: the point in the last answer tag, else the last one that the text says outside
    thoughts and calls; else None."""
    assert parse_answer(text, "point") == value

@pytest.mark.parametrize("text, value", BOXES)
def test_parse_box(text, value):
    """Claim: four numbers in one bracket, or two corners, where the answer stands; two points or a
    box in a thought are no box."""
    assert parse_answer(text, "box") == value

@pytest.mark.parametrize("text, value", WORDS)
def test_parse_choice_and_text(text, value):
    """Claim: what the last answer tag holds, without the space around it; else what is said outside
    thoughts and calls; else None."""
    assert parse_answer(text, "choice") == parse_answer(text, "text") == value

# what a search could choke on, many times over: half-open shapes, tags that never meet, runs of one
# character
HOSTILE = ["<think>", "</think><answer>", "<answer></answer>", "(", "(1,", "(1,1)", "(1,1),(",
           '"bbox_2d":[', "9", " "]

@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("wrap", [
    "<think></think>{}",
    *(pytest.param(w, marks=pytest.mark.slow)
      for w in ("<think>{}</think>", "<think></think><answer>({}</answer>")),
])
def test_time_is_linear_on_three_megabytes(unit, wrap):
    """Bug: patterns like <think>.*?</think>\\s*<answer>.*?</answer> take quadratic time on what a
    policy may write."""
    # the small one first: it fails soon where the large one would hang
    for size, seconds in [(100_000, 0.5), (3_000_000, 1)]:
        text = wrap.format(unit * (size // len(unit)))
        for judged, recipe in [(POINT, "vigorl"), (BOX, "univg-r1"), (CHOICE, "accuracy")]:
            # of this process: the machine may be busy with other things
            begin = time.process_time()
            reward_of(judged, text, recipe)
            assert time.process_time() - begin < seconds

# -----------------------------------------------------------------------------
# accuracy: points and boxes

@pytest.mark.parametrize("said, right", [
    ("(20, 30)", 1),
    ("(10, 20)", 1), ("(30, 40)", 1), ("(30, 20)", 1),      # edges and corners included
    ("(9.99, 30)", 0), ("(30.01, 30)", 0), ("(20, 40.01)", 0), ("(20, 19)", 0), ("(-20, -30)", 0),
    ("(0, 0, 40, 60)", 1),                                  # a box by its center
    ("(0, 0), (40, 60)", 0), ("(20, 30), (0, 0)", 1),       # two points: the first
    ("(30, 20) or (20, 30)", 1), ("nowhere", 0),
])
def test_point_in_box_edges_included(said, right):
    assert is_right(POINT, said) == right

def test_point_may_hit_any_target():
    two = sample("point", targets=[(0, 0, 5, 5), (50, 50, 60, 60)])
    assert [is_right(two, said) for said in ("(1, 1)", "(55, 55)", "(20, 20)")] == [1, 1, 0]

def test_point_is_mapped_by_the_frame_of_the_targets_image():
    """Bug: 28-px rounding and resizing were ignored: the answer and the gold stood in different
    frames."""
    second = sample("point", targets=[{"image": 1, "box": [100, 100, 200, 200]}])
    # a 0-1000 answer on a 400 x 500 image
    frames = [(1.0, 1.0, 50, 50), (0.4, 0.5, 400, 500)]
    assert is_right(second, "(300, 300)", frames=frames) == 1       # (120, 150)
    assert is_right(second, "(150, 150)", frames=frames) == 0       # (60, 75)
    assert is_right(second, "(250, 200)", frames=frames) == 1       # the corner itself
    assert is_right(second, "(249, 200)", frames=frames) == 0

@pytest.mark.parametrize("size, grid", [(1, 3), (1, 10), (2560, 1000), (1443, 1000), (1348, 1372)])
def test_edges_stay_inclusive_under_a_rounded_scale(size, grid):
    """Bug: 3 * 0.1 > 0.3: rounding pushes a point on the edge out of its box, a box on the
    threshold below it."""
    scale = size / grid
    for k in range(1, 300):
        edge, frames = k * size / grid, [(scale, scale, k * size / grid, k * size / grid)]
        assert is_right(sample("point", targets=[(0, 0, edge, edge)]),
                        f"({k}, {k})", frames=frames) == 1
        assert is_right(sample("point", targets=[(edge, edge, 9e9, 9e9)]),
                        f"({k}, {k})", frames=frames) == 1
        assert is_right(sample("box", targets=[(0, 0, edge, edge)]),
                        f"(0, 0), ({k}, {k / 2})", frames=frames) == 1

def test_point_outside_the_image_is_never_right():
    """A published target may reach over the edge (ScreenSpot-Pro has y1 = -1); nothing can be
    clicked there."""
    over = sample("point", targets=[(90, -5, 110, 15)])
    # the second image is another matter
    frames = [(1, 1, 100, 100), (1, 1, 500, 500)]
    assert [is_right(over, said, frames=frames)
            for said in ("(95, 5)", "(100, 0)", "(101, 5)", "(95, -1)")] == [1, 1, 0, 0]

IOUS = [
    ((0, 0, 10, 10), (0, 0, 10, 10), 1),
    ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),         # half a shift: 50 / 150
    ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
    ((0, 0, 10, 10), (0, 0, 10, 5), 0.5),
    ((2, 2, 4, 4), (0, 0, 10, 10), 0.04),
    ((0, 0, 10, 10), (10, 0, 20, 10), 0),            # they touch
    ((0, 0, 10, 10), (20, 20, 30, 30), 0),
    ((0, 0, 10, 10), (9.5, 0, 19.5, 10), 5 / 195),   # Bug: -1/+1 drops overlaps of up to a unit
    ((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5), 1),         # Bug: ... and with it every 0-1 box
    ((0, 0, 10, 10), (10, 10, 0, 0), 0),             # inverted twice: the area would be positive
    ((0, 0, 10, 10), (10, 0, 0, 10), 0),
    ((0, 0, 10, 10), (5, 0, 5, 10), 0),              # no area
    ((5, 5, 5, 5), (5, 5, 5, 5), 0),                 # Bug: 0 / 0
    ((0, 0, 1000, 1000), (0, 0, 5000, 5000), 0.04),  # no clamp
    ((0, 0, 10, 10), (-1e308, -1e308, 1e308, 1e308), 0),
]

@pytest.mark.parametrize("a, b, value", IOUS)
def test_iou_by_hand(a, b, value):
    """Claim: overlap by union, worked out by hand; 0 where a box is inverted or has no area; the
    order of the boxes does not matter."""
    assert iou(a, b) == pytest.approx(value) == iou(b, a)

@pytest.mark.parametrize("said, soft, hard", [
    ("(0,0),(100,100)", 1, 1), ("(0,0),(100,50)", 0.5, 1), ("(0,0),(100,49)", 0.49, 0),
    ("(100,100),(0,0)", 0, 0), ("(50, 50)", 0, 0), ("[0, 0, 100, 80]", 0.8, 1),
    (f"(0,0),({'9' * 308},{'9' * 308})", 0, 0),
])
def test_box_accuracy_is_soft_for_univg_and_a_threshold_elsewhere(said, soft, hard):
    for recipe in RECIPES:
        parts = reward_of(BOX, [answer(said)], recipe)
        assert parts["iou"] == pytest.approx(soft)
        assert parts["accuracy"] == pytest.approx(soft if recipe == "univg-r1" else hard)

def test_box_takes_the_best_target_in_its_own_frame():
    both = sample("box", targets=[{"image": 0, "box": [0, 0, 10, 10]},
                                  {"image": 1, "box": [100, 100, 200, 200]}])
    frames = [(1, 1, 50, 50), (2, 4, 400, 800)]
    assert reward_of(both, "(50,25),(100,50)", "accuracy", frames=frames)["iou"] == 1
    assert reward_of(both, "(0,0),(10,5)", "accuracy", frames=frames)["iou"] == 0.5

# -----------------------------------------------------------------------------
# accuracy: words

CHOICES = [  # options, gold index, said, right
    (["left", "right"], 1, "right", 1),
    (["left", "right"], 1, "RIGHT", 1),
    # Bug: a gold with a capital could never score
    (["Closer", "Further"], 0, "closer", 1),
    (["Chair was moved left", "no"], 0, "Chair was moved left", 1),
    (["left", "right"], 1, "B. right", 1), (["left", "right"], 1, "(B) right", 1),
    (["left", "right"], 1, "b) right", 1),
    (["left", "right"], 1, "B", 1), (["left", "right"], 1, "(b)", 1),
    (["left", "right"], 1, "B.", 1), (["left", "right"], 1, "A", 0),
    # no such option
    (["left", "right"], 1, "E", 0), (["left", "right"], 1, "(Z)", 0),
    # letter and text name two options: none
    (["left", "right"], 1, "A. right", 0), (["left", "right"], 0, "A. right", 0),
    (["left", "right"], 1, "A or B", 0), (["left", "right"], 1, "right or left", 0),
    # Bug: "gold in prediction" matched substrings
    (["no", "no objects moved"], 0, "no objects moved", 0),
    (["no", "no objects moved"], 1, "no", 0),
    (["a car", "a bus"], 0, "a", 1),    # a lone letter, though a gold contains it
    # a text that is an option is not a letter
    (["B", "A"], 0, "B", 1), (["B", "A"], 0, "A", 0), (["B", "A"], 1, "a", 1),
    (["B", "A"], 0, "A. B", 1), (["B", "A"], 0, "B. A", 0),
    (["a) b", "c"], 0, "A) b", 1),      # an option that looks like prefix and text
    (["yes", "no"], 0, "Yes.", 1), (["two  dogs", "one dog"], 0, "two\ndogs", 1),
    (["red", "red"], 1, "red", 1),      # the same text twice
    (["<|im_end|>", "b"], 0, "<|im_end|>", 1),
]

@pytest.mark.parametrize("options, gold, said, right", CHOICES)
def test_choice(options, gold, said, right):
    assert is_right(sample("choice", gold, options=options), said) == right

# what a text says -> the option it names; None: unreadable. Options: yes, no
READINGS = [
    ("yes", 0), ("No.", 1), ("**yes**", 0), ("`no`", 1), ("yes</s>", 0), ("<s> yes", 0),
    ("no<|im_end|>", 1),
    ("The answer is (A).", 0), ("the correct answer is: **(B)**", 1), ("Answer: yes", 0),
    ("Final answer: no", 1), ("Option A", 0),
    ("A: yes", 0), ("B) no", 1), ("(a)", 0), ("A. It fits.", 0),
    ("I would say that the answer is B, because it is near.", 1),
    ("The dog is on the left, so (B) is right.", 1), ("option b", 1), ("(B) (B)", 1),
    ("Yes, it can fit there.", 0), ("Look at it. No, it cannot.", 1), ("No: there is no room", 1),
    ("I cannot tell.", None), ("No idea", None), ("yes or no", None), ("(A) or (B)", None),
    ("Yes. No.", None), ("A. no", None), ("(A) no", None),
    ("(E)", None), ("Answer: C", None), ("The answer is a red one", None), ("answer", None),
    ("A car is there", None), ("y", None),
]

@pytest.mark.parametrize("said, option", READINGS)
def test_what_a_choice_names(said, option):
    """Bug: what a person reads without doubt was wrong, and what names no option was not
    unreadable."""
    for gold in (0, 1):
        parts = reward_of(sample("choice", gold, options=["yes", "no"]), said, "accuracy")
        assert ((parts["accuracy"], parts["wrong_format"])
                == (float(option == gold), float(option is None)))

@pytest.mark.parametrize("accepted, said, right", [
    (["red"], "red", 1), (["Red"], "rED", 1), (["red", "crimson"], "Crimson.", 1),
    (["a red bus"], "a  red\n bus", 1),
    (["red"], "reddish", 0), (["red"], "not red", 0), (["Straße"], "STRASSE", 1),
    (["<|im_end|>"], "<|im_end|>", 1),
    (["12"], "9" * 5000, 0),
])
def test_text_equals_any_accepted_string(accepted, said, right):
    assert is_right(sample("text", accepted), said) == right

ACTIONS = [  # gold, said, worth
    ("click [12]", "click [12]", 1), ("click [12]", "Click [ 12 ].", 1),
    ("click [12]", "click [13]", 0.5), ("click [12]", "hover [12]", 0.5),
    ("click [12]", "click", 0.5), ("click [12]", "I would click [12]", 0.5),
    ("click [12]", "", 0), ("click [12]", "[12]", 0.5),
    ("type [12] [red shoes]", "type [12] [red shoes]", 1),
    ("type [12] [red shoes]", "type [12] [Red  Shoes] [1]", 1),  # "press enter" is optional
    ("type [12] [red shoes] [1]", "type [12] [red shoes]", 1),
    ("type [12] [red shoes]", "type [12] [blue hat]", 0.75),     # Bug: typed text was never scored
    ("type [12] [red shoes]", "type [7] [red shoes]", 0.75),
    ("type [12] [red shoes]", "type [12]", 0.75),
    ("type [12] [red shoes]", "click [12]", 0.25),
    # Bug: 'stop' was looked for before 'type'
    ("type [12] [bus stop]", "type [12] [bus stop]", 1),
    ("type [12] [bus stop]", "stop", 0),
    ("type [3] [how to scroll]", "scroll [down]", 0),
    ("scroll [down]", "scroll [down]", 1), ("scroll [down]", "scroll [up]", 0.5),
    ("go_back", "go_back", 1), ("go_back", "Go_Back", 1), ("go_back", "click [1]", 0),
    ("go_back", "do not go_back", 0),
    # Bug: the answer of a stop was never scored
    ("stop [42]", "stop [42]", 1), ("stop [42]", "stop [41]", 0.5),
]

@pytest.mark.parametrize("gold, said, worth", ACTIONS)
def test_web_action(gold, said, worth):
    judged = sample("text", [gold], matcher="web_action")
    assert is_right(judged, said) == worth

def test_web_action_takes_the_best_accepted_action():
    assert is_right(sample("text", ["click [1]", "scroll [down]"], matcher="web_action"),
                    "scroll [down]") == 1

# -----------------------------------------------------------------------------
# what every recipe says

@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_returns_the_same_core(recipe):
    for judged in (POINT, BOX, CHOICE, TEXT):
        for turns in ([], [say("")], [say("garbage")], [answer("(20, 30)")],
                      [look(1, 2), answer("red")]):
            parts = reward_of(judged, turns, recipe)
            assert {"reward", "accuracy", "format", "wrong_format"} <= set(parts)
            assert all(type(value) is float and math.isfinite(value)
                       for value in parts.values()), parts
            assert ("iou" in parts) == (judged is BOX)

@pytest.mark.parametrize("answer_type", ["point", "box", "choice", "text"])
def test_hidden_gold_is_said_and_never_right(answer_type):
    said = "left" if answer_type == "choice" else "(1,2),(3,4)"
    parts = reward_of(hidden(answer_type), [answer(said)], "accuracy")
    assert parts["hidden"] == 1 and parts["accuracy"] == 0 and parts["wrong_format"] == 0
    # gold 0 is a gold
    assert "hidden" not in reward_of(CHOICE, [answer("left")], "accuracy")

def test_wrong_format_tells_no_answer_from_a_wrong_one():
    assert reward_of(POINT, "no idea", "accuracy") == {
        "reward": 0, "accuracy": 0, "format": 0, "wrong_format": 1}
    assert reward_of(POINT, "(1, 1)", "accuracy") == {
        "reward": 0, "accuracy": 0, "format": 1, "wrong_format": 0}

def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(ValueError, match="vigorl-zoom"):
        reward_of(POINT, "", "vigrol")

# -----------------------------------------------------------------------------
# vigorl: 0.5 A + 0.5 F C

IMAGE = [(1, 1, 100, 100)]
GOOD = "<think> the sign at (5, 5) </think>\n<answer> (20, 30) </answer>"

SINGLE = [  # text, accuracy, format, grounded, reward
    (GOOD, 1, 1, 1, 1.0),
    # Bug: white space around cost the format
    (f"\n {GOOD} \n", 1, 1, 1, 1.0),
    (GOOD.replace("\n", ""), 1, 1, 1, 1.0),
    (GOOD.replace("\n", " \n\n "), 1, 1, 1, 1.0),
    (GOOD.replace("(20, 30)", "(1, 1)"), 0, 1, 1, 0.5),
    (GOOD.replace("(20, 30)", "(20.5, 30)"), 1, 1, 1, 1.0),           # Bug: a float answer scored 0
    (GOOD.replace("(20, 30)", "(20,\n30)"), 1, 1, 1, 1.0),
    (GOOD.replace("(20, 30)", "at (20, 30)"), 1, 0, 1, 0.5),          # a point and nothing else
    (GOOD.replace("(20, 30)", "(0, 0, 40, 60)"), 1, 0, 1, 0.5),
    (GOOD.replace("(20, 30)", ""), 0, 0, 1, 0.0),
    (GOOD + GOOD, 1, 0, 1, 0.5),                                      # two of each
    # Bug: .*? let a second answer through
    (GOOD + "<answer>(20, 30)</answer>", 1, 0, 1, 0.5),
    (GOOD.replace("<think>", "<think><think>"), 1, 0, 1, 0.5),        # nested
    (GOOD.replace("<think>", "<think> <THINK>"), 1, 0, 1, 0.5),       # ... in capitals
    (GOOD.replace("sign", "<answer>(1, 1)</answer>"), 1, 0, 1, 0.5),  # an answer inside the thought
    (GOOD.replace("sign", "<observation>"), 1, 0, 1, 0.5),            # plays the environment
    (GOOD.replace("</think>", ""), 1, 0, 1, 0.5),                     # unclosed
    (GOOD.replace("</answer>", ""), 1, 0, 1, 0.5),
    # stray text
    (GOOD + " done", 1, 0, 1, 0.5), ("Well: " + GOOD, 1, 0, 1, 0.5),
    (GOOD.replace("\n", " so "), 1, 0, 1, 0.5),
    ("(20, 30)", 1, 0, 0, 0.5), ("", 0, 0, 0, 0.0),
    (GOOD.replace("(5, 5)", "left"), 1, 1, 0, 0.5),                   # no point in the thought
    (GOOD.replace("(5, 5)", "(100, 0)"), 1, 1, 1, 1.0),               # on the edge of the image
    # Bug: floats and spaces did not count
    (GOOD.replace("(5, 5)", "( 5.5 , 5 )"), 1, 1, 1, 1.0),
    # Bug: any numbers at all counted as grounded
    (GOOD.replace("(5, 5)", "(101, 5)"), 1, 1, 0, 0.5),
    (GOOD.replace("(5, 5)", "(5, 5), then (-5, 5)"), 1, 1, 0, 0.5),   # one outside is enough
    (GOOD.replace("(5, 5)", f"(5, 5), ({'9' * 5000}, 5)"), 1, 1, 0, 0.5),
    (GOOD.replace("(5, 5)", "[5, 5]"), 1, 1, 0, 0.5),                 # the convention is (x, y)
]

@pytest.mark.parametrize("text, accuracy, form, grounded, reward", SINGLE)
def test_vigorl_single_turn(text, accuracy, form, grounded, reward):
    parts = reward_of(POINT, text, "vigorl", frames=IMAGE)
    assert ((parts["accuracy"], parts["format"], parts["grounded"], parts["reward"])
            == (accuracy, form, grounded, reward))

def test_vigorl_ungrounded():
    """Claim: the baseline pays accuracy and form, 0.5 each, with or without a point in the
    thought."""
    for thought, answer, reward in (("so", "(15, 25)", 1), ("(1, 1)", "(15, 25)", 1),
                                    ("so", "(5, 5)", 0.5), ("so", "nowhere", 0)):
        text = f"<think> {thought} </think><answer> {answer} </answer>"
        found = reward_of(POINT, text, "vigorl", frames=IMAGE)
        assert (reward_of(POINT, text, "vigorl-ungrounded", frames=IMAGE)["reward"]
                == 0.5 * found["accuracy"] + 0.5 * found["format"]
                == reward), text

def test_vigorl_form_for_every_answer_type():
    def form(judged, said):
        return reward_of(
            judged, f"<think>(1, 1)</think><answer>{said}</answer>", "vigorl")["format"]
    assert form(BOX, " (1, 2), (3, 4) ") == 1 and form(BOX, "(1, 2)") == 0
    assert form(CHOICE, "left") == 1 and form(CHOICE, " \n ") == 0
    assert form(TEXT, "a\nred <|im_end|> bus") == 1

def test_a_thought_may_point_into_any_image_of_the_prompt():
    frames = [(1, 1, 100, 100), (1, 1, 300, 50)]
    for said, grounded in [("(50, 90)", 1), ("(250, 40)", 1), ("(250, 90)", 0)]:
        assert (reward_of(POINT, f"<think>{said}</think>", "vigorl", frames=frames)["grounded"]
                == grounded)

def test_without_frames_only_negative_points_are_outside():
    assert [reward_of(POINT, f"<think>{said}</think>", "vigorl")["grounded"]
            for said in ("(5000, 5000)", "(-1, 5)")] == [1, 0]

# -----------------------------------------------------------------------------
# vigorl-zoom: 0.6 A + 0.4 F (1 + distinct)

RIGHT, WRONG = answer("(20, 30)"), answer("(1, 1)")
FAR = [look(100 * i, 0) for i in range(9)]      # zooms that are all 100 apart

@pytest.mark.parametrize("turns, form", [
    ([RIGHT], 1), ([FAR[0], RIGHT], 1), (FAR[:4] + [RIGHT], 1),
    ([], 0), ([say("")], 0), ([say("(20, 30)")], 0),
    ([FAR[0]], 0),                                    # never answers
    ([RIGHT, FAR[0]], 0), ([RIGHT, RIGHT], 0),        # goes on after the answer
    ([look(1, 1, worked=False), RIGHT], 0),           # Bug: points out of the image were accepted
    ([say(FAR[0].text), RIGHT], 0),                   # a call that could not be read
    ([say("<think> hm </think>"), RIGHT], 0),         # a turn without an action
    ([answer(""), RIGHT], 0), ([FAR[0], answer(" \n ")], 0),
    ([FAR[0], answer("around (20, 30)")], 0),
    ([FAR[0], say("<answer>(20, 30)</answer>")], 0),  # no thought
    ([FAR[0], say("so: " + RIGHT.text)], 0), ([FAR[0], say(RIGHT.text + "!")], 0),  # stray text
    ([FAR[0], say(f" {RIGHT.text}\n")], 1),
])
def test_zoom_grammar(turns, form):
    """Claim: format is 1 if every turn but the last is a thought and a call that worked, and the
    last a thought and an answer; else 0."""
    assert reward_of(POINT, turns, "vigorl-zoom")["format"] == form

@pytest.mark.parametrize("shape", [
    "{0}\n<answer>(20, 30)</answer>",   # call and answer in one turn
    "{0}\n{0}",                         # two calls
    "<think> a </think>{0}", "<think> a </think> hm <tool_call>{{}}</tool_call>",
    "hm {0}", "{0} hm", "{0}<observation></observation>",
])
def test_zoom_turn_is_one_thought_and_one_call(shape):
    crowded = look(1, 1)
    crowded.text = shape.format(crowded.text)
    assert reward_of(POINT, [crowded, RIGHT], "vigorl-zoom")["format"] == 0

@pytest.mark.parametrize("points, distinct", [
    ([], 0), ([(0, 0)], 0), ([(0, 0), (10, 0)], 0.2), ([(0, 0), (9.99, 0)], 0),
    ([(0, 0), (6, 8)], 0.2), ([(0, 0), (7, 7)], 0),   # Euclidean
    ([(0, 0), (0, 0), (0, 0), (0, 0)], 0),
    ([(0, 0), (50, 0), (5, 0)], 0.2),                 # far from the last is not far from all
    ([(0, 0), (6, 0), (12, 0)], 0.2),                 # greedy: the dropped one is no neighbor
    ([(0, 0), (50, 0), (0, 50)], 0.4), ([(0, 0), (50, 0), (0, 50), (50, 50)], 0.4), # the cap
])
def test_distinct_bonus(points, distinct):
    parts = reward_of(POINT, [look(x, y) for x, y in points] + [RIGHT], "vigorl-zoom")
    assert parts["distinct"] == pytest.approx(distinct)
    assert parts["reward"] == pytest.approx(0.6 + 0.4 * (1 + distinct))

def test_distinct_bonus_ignores_zooms_that_failed():
    """Bug: points out of the image earned the bonus."""
    assert reward_of(POINT, [look(0, 0), look(900, 900, worked=False), RIGHT],
                     "vigorl-zoom")["distinct"] == 0

def test_distinct_bonus_stops_at_the_zooms_allowed():
    """Bug: no cap."""
    got = [reward_of(POINT, FAR + [RIGHT], "vigorl-zoom", max_zooms=n,
                     bonuses=Bonuses(distinct=0.1))["distinct"]
           for n in range(7)]
    assert got == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.4, 0.4])

def test_distinct_bonus_is_not_paid_for_a_broken_format():
    parts = reward_of(POINT, FAR[:3] + [say("(20, 30)")], "vigorl-zoom")
    assert parts["distinct"] == 0.4 and parts["format"] == 0 and parts["reward"] == 0.6

def test_distinct_bonus_knobs():
    turns = [look(0, 0), look(30, 0), RIGHT]
    assert reward_of(POINT, turns, "vigorl-zoom",
                     bonuses=Bonuses(distinct=0))["reward"] == pytest.approx(1)
    assert reward_of(POINT, turns, "vigorl-zoom",
                     bonuses=Bonuses(min_distance=31, distinct=0.2))["distinct"] == 0

def test_right_always_beats_wrong():
    """Bug: a wrong answer with 4 distinct crops (0.64) out-scored a right one with a broken format
    (0.60)."""
    rewards = {True: [], False: []}
    spots = [(0, 0), (5, 0), (100, 0), (0, 100), (100, 100), (200, 0)]
    zooms = [[look(*spot, think="(1, 1)") for spot in path]
             for n in range(7)
             for path in itertools.combinations(spots, n)]
    zooms += [path + [look(7, 7, worked=False)] for path in zooms] + [FAR]
    knobs = [dict(max_zooms=n, bonuses=Bonuses(distinct=bonus))
             for n in (0, 1, 2, 4, 9)
             for bonus in (0, 0.2, 5)]
    for path, knob, last in itertools.product(
            zooms, knobs, (RIGHT, WRONG, say(RIGHT.text + "!"), say("(20, 30)"), say("?"))):
        parts = reward_of(POINT, path + [last], "vigorl-zoom", **knob)
        rewards[parts["accuracy"] == 1].append(parts["reward"])
    assert max(rewards[False]) == pytest.approx(0.56) and min(rewards[True]) == pytest.approx(0.6)
    assert max(rewards[True]) == pytest.approx(1.16) and min(rewards[False]) == 0

def test_grounded_is_the_share_of_turns_with_a_point_in_the_image():
    turns = [look(1, 1, think="(50, 50)"), look(2, 2, think="(500, 50)"), look(3, 3),
             answer("(20, 30)", think="at (20, 30)")]
    assert reward_of(POINT, turns, "vigorl-zoom", frames=IMAGE)["grounded"] == 0.5

def test_the_forced_last_turn_counts_like_any_other():
    forced = say(f"{data.FORCE} (20, 30) </answer>")
    assert reward_of(POINT, FAR[:4] + [forced], "vigorl-zoom")["format"] == 1

# -----------------------------------------------------------------------------
# vigorl-zoom: the conditional tool bonus (DeepEyes)

def test_tool_bonus_is_for_right_answers_that_looked():
    """Bug: paid for zooming as such: the policy zooms and guesses."""
    right, wrong = answer("left"), answer("right")
    reward = lambda *turns, bonus=1.2: reward_of(
        CHOICE, list(turns), "vigorl-zoom", bonuses=Bonuses(tool=bonus, distinct=0))["reward"]
    assert reward(look(9, 9), right) == pytest.approx(1 + 1.2) and reward(right) == pytest.approx(1)
    assert reward(look(9, 9), wrong) == reward(wrong) == pytest.approx(0.4)
    # a call that led to nothing
    assert reward(look(9, 9, worked=False), right) == pytest.approx(0.6)
    assert reward(look(9, 9), right, bonus=0) == pytest.approx(1)

# -----------------------------------------------------------------------------
# univg-r1: IoU + F

BOXED = "<think>the sign</think><answer>(0,0),(100,50)</answer>"

UNIVG = [  # text, iou, format
    (BOXED, 0.5, 1), (BOXED.replace("100,50", "100,100"), 1, 1),
    (BOXED.replace("><answer", ">\n<answer"), 0.5, 1), (BOXED + "\n", 0.5, 1),
    (BOXED.replace(",", ", "), 0.5, 1),
    # Bug: inner spaces and line breaks were refused
    (BOXED.replace("(", " ( ").replace(")", " )\n"), 0.5, 1),
    (BOXED + " \n\n", 0.5, 1),                              # Bug: ... and white space at the end
    # free before the thought, as in the original
    ("Sure. " + BOXED, 0.5, 1), ("<think>a</think>" + BOXED, 0.5, 1),
    (BOXED + " done", 0.5, 0), (BOXED.replace("><answer", "> so <answer"), 0.5, 0),
    (BOXED.replace("<think>", ""), 0.5, 0), (BOXED.replace("</think>", ""), 0.5, 0),
    (BOXED.replace("</answer>", ""), 0.5, 0),
    # it can be read, the format is another
    (BOXED.replace("(0,0),(100,50)", "[0, 0, 100, 50]"), 0.5, 0),
    (BOXED.replace("50", "50.0"), 0.5, 0), (BOXED.replace("(0,0)", "(-0,0)"), 0.5, 0),
    (BOXED.replace("(0,0)", "(5000,5000)"), 0, 1),          # inverted
    (BOXED.replace("(100,50)", "(0,0)"), 0, 1),             # no area
    (BOXED.replace("100,50", "5000,5000"), 0.0004, 1),      # no clamp
    (BOXED.replace("100,50", f"{'9' * 5000},50"), 0, 1),
    # two boxes: the first, as in the original
    (BOXED.replace("</answer>", ",(0,0),(100,100)</answer>"), 0.5, 0),
    (BOXED + BOXED.replace("50", "100"), 1, 1),             # two answers: the last
    (BOXED.replace("(0,0),(100,50)", ""), 0, 0), ("(0,0),(100,50)", 0.5, 0), ("", 0, 0),
    ("<think>(0,0),(100,100)</think>", 0, 0),               # a box only in the thought
]

@pytest.mark.parametrize("text, soft, form", UNIVG)
def test_univg(text, soft, form):
    parts = reward_of(BOX, text, "univg-r1")
    assert ((parts["iou"], parts["accuracy"], parts["format"])
            == (pytest.approx(soft), pytest.approx(soft), form))
    assert parts["reward"] == pytest.approx(soft + form)

IN_2 = sample("box", targets=[{"image": 1, "box": [0, 0, 100, 100]}], name_image=True)

@pytest.mark.parametrize("said, iou, form", [
    ("image 2: (0, 0),(100, 100)", 1, 1), (" image 2: (0, 0),(50, 100) ", 0.5, 1),
    # Bug: a right box in the wrong image is paid
    ("image 1: (0, 0),(100, 100)", 0, 1),
    ("(0, 0),(100, 100)", 0, 0),        # it was asked for
    ("image two: (0, 0),(100, 100)", 0, 0), ("image 2 (0, 0),(100, 100)", 1, 0),
    ("image 2: (0, 0),(100, 100), not image 1", 1, 0)])
def test_the_answers_image(said, iou, form):
    parts = reward_of(IN_2, f"<think> image 1 </think>\n<answer>{said}</answer>", "univg-r1")
    assert ((parts["iou"], parts["accuracy"], parts["format"], parts["wrong_format"])
            == (iou, iou, form, 0))
    assert is_right(IN_2, said) == (iou >= 0.5)

def test_the_answers_image_among_several_targets():
    """Bug: the box of one target in the image of another."""
    both = sample("box", targets=[{"image": 0, "box": [0, 0, 10, 10]},
                                  {"image": 1, "box": [50, 50, 90, 90]}], name_image=True)
    assert [is_right(both, said)
            for said in ("image 2: (50, 50),(90, 90)", "image 1: (0, 0),(10, 10)",
                         "image 1: (50, 50),(90, 90)")] == [1, 1, 0]
    assert len(both.targets) == 2       # the sample is as it was

def test_without_name_image_the_format_has_none():
    assert reward_of(BOX, "<think> so </think>\n<answer>image 1: (0, 0),(100, 100)</answer>",
                     "univg-r1")["format"] == 0

def test_univg_compares_in_source_pixels():
    """A 0-1000 answer against a gold in pixels: a gold rescaled in one place and not in another is
    off silently."""
    on_second = sample("box", targets=[{"image": 1, "box": [64, 48, 320, 240]}])
    frames = [(0.1, 0.1, 100, 100), (0.64, 0.48, 640, 480)]
    said = "<think>a</think><answer>(100,100),(500,500)</answer>"
    assert reward_of(on_second, said, "univg-r1", frames=frames)["reward"] == pytest.approx(2)

# -----------------------------------------------------------------------------
# do the tests bite? Each row puts one bug into rewards.py; the named test must fail.

def row(table, text):
    """The row of a table that begins with this text."""
    return next(values for values in table if values[0] == text)

def single(text):
    return dict(zip(("text", "accuracy", "form", "grounded", "reward"), row(SINGLE, text)))

def boxed(text):
    return dict(zip(("text", "soft", "form"), row(UNIVG, text)))

MUTATIONS = [
    ("rewards:answer_part", 'text.rfind("<answer>", 0, max(0, last_end))',
     'text.find("<answer>", 0, max(0, last_end))', test_parse_point,
     dict(text="<answer>(1, 2)</answer><answer>(3, 4)</answer>", value=(3, 4))),
    ("rewards:answer_part", 're.split(r"</(?:think|tool_call)>", text)[-1]',
     "text", test_parse_point, dict(text="<think>(1, 2)</think> (3, 4)", value=(3, 4))),
    ("rewards:find_shape", "if take_first: break",
     "pass", test_parse_point, dict(text="<answer>(3, 4) or (5, 6)</answer>", value=(3, 4))),
    ("rewards:find_shape", "(MARKED, loose)",
     "(loose, MARKED)", test_parse_box,
     dict(text='<answer>{"note": "[9, 9, 9, 9]", "bbox_2d": [1, 2, 3, 4]}</answer>',
          value=(1, 2, 3, 4))),
    ("rewards:parse_answer", 'LABEL.sub("", text)',
     "text", test_parse_box, dict(zip(("text", "value"), BOXES[9]))),
    ("rewards:find_shape", "POINTS if answer_type == 'point' else SHAPE",
     "SHAPE", test_parse_point,
     dict(text="<answer>[204,315], [678,315]</answer>", value=(204, 315))),
    ("rewards:parse_answer", "if not all(map(math.isfinite, values)): return None",
     "pass", test_parse_point, dict(text=f"<answer>({'9' * 5000}, 4)</answer>", value=None)),
    ("rewards:point_in_target", 'x1 - EPS <= x <= x2 + EPS',
     'x1 < x < x2', test_point_in_box_edges_included, dict(said="(10, 20)", right=1)),
    ("rewards:point_in_target", "inside(point, frame)",
     "True", test_point_outside_the_image_is_never_right, {}),
    ("rewards:EPS", "1e-6",
     "0.0", test_edges_stay_inclusive_under_a_rounded_scale, dict(size=1, grid=10)),
    ("rewards:area", "max(0.0, x2 - x1) * max(0.0, y2 - y1)",
     "(x2 - x1) * (y2 - y1)", test_iou_by_hand, dict(zip(("a", "b", "value"), IOUS[9]))),
    ("rewards:iou", "area_a + area_b - overlap",
     "area_a + area_b", test_iou_by_hand, dict(zip(("a", "b", "value"), IOUS[1]))),
    ("rewards:named_option", "if text in texts: return texts.index(text)",
     "pass", test_choice, dict(options=["B", "A"], gold=0, said="B", right=1)),
    ("rewards:named_option", "len(named) == 1",
     "named", test_what_a_choice_names, dict(said="(A) or (B)", option=None)),
    ("rewards:named_option", "words.append(first[2])",
     "pass", test_what_a_choice_names, dict(said="(A) no", option=None)),
    ("rewards:judge", "named_option(value, sample.options)",
     "named_option(value, sample.options) or 0", test_what_a_choice_names,
     dict(said="I cannot tell.", option=None)),
    ("rewards:web_action", "0.5 * same / len(gold_arguments)",
     "0.5 * (arguments[:1] == gold_arguments[:1])", test_web_action,
     dict(gold="type [12] [red shoes]", said="type [12] [blue hat]", worth=0.75)),
    ("rewards:action_of", "if gap.strip(): return None, ''",
     "pass", test_vigorl_single_turn, single(GOOD.replace("\n", " so "))),
    ("rewards:grounded", "all(inside((float(x), float(y)), frames) for x, y in named)",
     "True", test_vigorl_single_turn, single(GOOD.replace("(5, 5)", "(5, 5), then (-5, 5)"))),
    ("rewards:zooms_well",
     "action == 'tool_call' and turn.crop is not None and turn.error is None",
     "action == 'tool_call'", test_distinct_bonus_ignores_zooms_that_failed, {}),
    ("rewards:distinct_bonus", "min(distances, default=math.inf)",
     "min(distances[-1:], default=math.inf)", test_distinct_bonus,
     dict(points=[(0, 0), (50, 0), (5, 0)], distinct=0.2)),
    ("rewards:vigorl_zoom", "0.6 * found['accuracy']",
     "0.6 * (1 - found['wrong_format'])", test_right_always_beats_wrong, {}),
    ("rewards:episode_well_formed",
     "all(map(zooms_well, turns[:-1])) and answers_well(turns[-1].text, answer_type)",
     "answers_well(turns[0].text, answer_type)", test_zoom_grammar,
     dict(turns=[FAR[0], RIGHT], form=1)),
    ("rewards:distinct_bonus", "min(0.4, bonuses.distinct * further)",
     "bonuses.distinct * further", test_right_always_beats_wrong, {}),
    ("rewards:distinct_bonus", "min(len(kept), max_zooms)",
     "len(kept)", test_distinct_bonus_stops_at_the_zooms_allowed, {}),
    ("rewards:vigorl_zoom", "0.4 * form * (1 + distinct)",
     "0.4 * (form + distinct)", test_distinct_bonus_is_not_paid_for_a_broken_format, {}),
    ("rewards:vigorl_zoom", "found['accuracy'] >= 1 and any(map(zooms_well, turns))",
     "any(map(zooms_well, turns))", test_tool_bonus_is_for_right_answers_that_looked, {}),
    ("rewards:univg_r1", r'rf"{image}{corner},{corner}</answer>\s*"',
     r'rf"{image}{corner},{corner}</answer>.*"', test_univg, boxed(BOXED + " done")),
    ("rewards:score", "found['iou'] = 0.0",
     "pass", test_the_answers_image, dict(said="image 1: (0, 0),(100, 100)", iou=0, form=1)),
    ("rewards:score", "judged = copy.copy(sample)",
     "judged = sample", test_the_answers_image_among_several_targets, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {})
