"""Is a toy question answered where it says, and can the answer not be seen without zooming? Are
published files read in the right frame, and is a broken one refused with its file, its row and what
was expected? At the end MUTATIONS puts bugs into data.py and what it reads files with.
"""
import collections, contextlib, copy, dataclasses, io, itertools, json, os, random, re, zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import data
from appendix import benchmarks, faults, files, page, split
from conftest import check_mutation, names

N = 60

def toy(task, split="train", n=N, seed=0, difficulty="medium"):
    """data.toy without its pictures: most of what can be wrong is in the scene, and drawing takes
    all the time."""
    draw, data.draw_scene = data.draw_scene, lambda scene: None
    try:
        return data.toy(task, split, n, seed, difficulty)
    finally:
        data.draw_scene = draw

def objects(sample, i=0):
    return {o["name"]: o for o in sample.meta["scenes"][i]["objects"]}

# -----------------------------------------------------------------------------
# the toy world: what is right

def test_search_answer():
    """Bug: the gold is another object's pattern, or the options are shuffled without it."""
    for s in toy("search"):
        name = s.question.removeprefix("What is the pattern of the ").removesuffix("?")
        o = objects(s)[name]
        assert (s.answer_type == "choice"
                and s.options[s.answer] == o["pattern"]
                and sorted(s.options) == sorted(data.PATTERNS))
        assert s.meta["evidence"] == [{"image": 0, "box": data.object_box(o)}]
        period = data.PATTERNS[o["pattern"]](*np.mgrid[:8, :8][::-1])               # [y, x]
        across, along = ((period != np.roll(period, 2, 1)).any(),
                         (period != np.roll(period, 2, 0)).any())
        assert (along, across) == {"lined": (1, 0), "barred": (0, 1),
                                   "slanted": (1, 1), "checked": (1, 1)}[o["pattern"]]

def test_point_answer():
    """Bug: the target box is another object's, or not on the object: at its center the picture must
    have its color."""
    for s in data.toy("point", "train", 12):
        o, (target,) = (objects(s)[s.question.removeprefix("Click the ").removesuffix(".")],
                        s.targets)
        x1, y1, x2, y2 = target["box"]
        assert s.answer_type == "point" and target["image"] == 0
        x, y = round((x1 + x2) / 2), round((y1 + y2) / 2)
        # two periods of any pattern
        seen = np.asarray(s.images[0]).astype(float)[y - 4:y + 4, x - 4:x + 4].mean((0, 1))
        alike = {name: np.dot(seen, color) / np.linalg.norm(color)
                 for name, color in data.COLORS.items()}
        assert o["name"].startswith(max(alike, key=alike.get)), (o["name"], alike)

def test_relation_answer():
    """Bug: left and right (or above and below: y grows downwards) exchanged; a question that a
    pixel decides."""
    asked = collections.Counter()
    for s in toy("relation"):
        a, b = (objects(s)[name]
                for name in s.question.removeprefix("Where is the ").removesuffix("?").split(
                    ", seen from the "))
        (ax, ay), (bx, by), said = a["center"], b["center"], s.options[s.answer]
        dx, dy = ax - bx, ay - by
        gap = {"left": -dx, "right": dx, "above": -dy, "below": dy}[said]
        assert (gap > 0.12 * data.SIDE
                and set(s.options) in ({"left", "right"}, {"above", "below"}))
        asked[said] += 1
    assert len(asked) == 4 and min(asked.values()) >= 5

def test_boxes_answer():
    """Bug: the shown object is in none or two of the other images, or the target is not the image
    that the question names."""
    kinds = collections.Counter()
    for s in toy("boxes") + toy("boxes", "test", 20, difficulty="hard"):
        (name, o), = objects(s).items()
        (target,), i = s.targets, int(
            s.question.removeprefix("Find the object of image 1 in image ").removesuffix(".")) - 1
        assert (s.answer_type == "box" and target["image"] == i
                and 2 <= len(s.images) == len(s.meta["scenes"]) <= 3)
        assert ([name in objects(s, k) for k in range(1, len(s.images))]
                == [k == i for k in range(1, len(s.images))])
        assert target["box"] == data.object_box(objects(s, i)[name])
        kinds[len(s.images), i] += 1
    assert set(kinds) == {(2, 1), (3, 1), (3, 2)} and min(kinds.values()) >= 10

def test_find_answer():
    """Bug: the question gives the image away, or nothing asks the answer for it."""
    questions = {s.question for s in toy("find")}
    assert (len(questions) == 1
            and not re.findall("image [23]", questions.pop())
            and {s.targets[0]["image"] for s in toy("find")} == {1, 2})
    for s in toy("find"):
        (name, _), = objects(s).items()
        (target,) = s.targets
        assert (s.meta.get("name_image")
                and target["box"] == data.object_box(objects(s, target["image"])[name]))
        assert [name in objects(s, k) for k in range(1, len(s.images))].count(True) == 1

def test_video_answer():
    """Bug: the box of another frame; frames that jump, or stand still; a thing that leaves, or runs
    into another."""
    asked = collections.Counter()
    for s in toy("video", "train", 30) + toy("video", "test", 6, difficulty="hard"):
        name, i = re.fullmatch(
            r"These are frames of a video. Find the (\w+ \w+) in image (\d).", s.question).groups()
        i, (target,) = int(i) - 1, s.targets
        assert (target == {"image": i, "box": data.object_box(objects(s, i)[name])}
                and len(s.images) == 3)
        for a, b in ((0, 1), (1, 2)):
            assert objects(s, a).keys() == objects(s, b).keys()
            moved = [np.abs(np.subtract(objects(s, b)[n]["center"], o["center"]))
                     for n, o in objects(s, a).items()]
            assert (max(m.max() for m in moved) <= data.SIDE // 6
                    and np.mean(moved) > data.SIDE / 28)
        asked[i] += 1
    assert set(asked) == {0, 1, 2} and min(asked.values()) >= 5

def test_count_answer():
    """Bug: a number that is not theirs, or one that the number of all things gives away."""
    numbers = collections.defaultdict(set)
    for s in toy("count"):
        color, = re.fullmatch(r"How many (\w+) things are there\?", s.question).groups()
        named = [o for o in objects(s).values() if o["name"].split()[0] == color]
        assert s.options[s.answer] == str(len(named)) and sorted(s.options) == ["1", "2", "3"]
        assert [t["box"] for t in s.meta["evidence"]] == [data.object_box(o) for o in named]
        numbers[len(objects(s))].add(len(named))
    assert numbers == {4: {1, 2, 3}, 5: {1, 2, 3}}

def test_mixed_difficulty():
    """Bug: one level for the whole stream, or samples that do not say theirs."""
    n = collections.Counter(len(s.meta["scenes"][0]["objects"])
                            for s in toy("search", n=N, difficulty="mixed"))
    assert set(n) == {2, 3, 4, 5, 6}
    for s in toy("search", n=60, difficulty="mixed"):
        low, high = data.DIFFICULTY[s.category[1]]["objects"]
        assert s.category[0] == "search" and low <= len(s.meta["scenes"][0]["objects"]) <= high
    assert toy("search")[0].category == ["search"]
    assert min(collections.Counter(
        s.category[1] for s in toy("boxes", n=90, difficulty="mixed")).values()) > 15

@pytest.mark.parametrize("task", ["search", "relation", "count"])
def test_options_are_shuffled(task):
    """Bug: the gold option is always first (SAT, V*): a model learns to say the first."""
    samples = toy(task, n=N)
    counts = np.bincount([s.answer for s in samples], minlength=len(samples[0].options))
    expected = N / len(counts)
    assert abs(counts - expected).max() < 4 * expected ** 0.5

def test_scenes():
    """Bug: two objects of one name (two right answers), or of one color where none may be alike;
    objects that overlap, a box outside the image."""
    hard = toy("search", difficulty="hard")
    for s in itertools.chain(*map(toy, data.TASKS), hard, toy("search", difficulty="easy")):
        for scene in s.meta["scenes"]:
            placed = scene["objects"]
            assert scene["side"] == data.SIDE
            alike = s in hard or s.category == ["count"]
            assert (len({o["name"] if alike else o["name"].split()[0] for o in placed})
                    == len(placed))
            for o in placed:
                x1, y1, x2, y2 = data.object_box(o)
                assert 0 <= x1 < x2 <= data.SIDE and 0 <= y1 < y2 <= data.SIDE
            for a, b in itertools.combinations(placed, 2):
                assert (np.hypot(*np.subtract(a["center"], b["center"]))
                        > a["radius"] + b["radius"])

def test_pictures():
    """Bug: a picture of another scene, size or mode than its question is about."""
    for s in data.toy("boxes", "test", 3):
        for scene, image in zip(s.meta["scenes"], s.images, strict=True):
            assert (image.size == (data.SIDE, data.SIDE)
                    and image.mode == "RGB"
                    and image == data.draw_scene(scene))

def test_object_boxes_fit():
    """Bug: a box that is too large or too small for its shape: a hit on the object misses, or the
    other way round."""
    empty = np.asarray(data.draw_scene({"side": 448, "objects": []})).astype(int)
    for name in data.NAMES:
        o = dict(name=name, pattern="lined", center=[200, 230], radius=50, phase=[0, 0])
        ys, xs = np.nonzero(
            abs(np.asarray(data.draw_scene({"side": 448, "objects": [o]})) - empty).max(-1) > 0)
        assert np.abs(np.subtract(
            data.object_box(o), [xs.min(), ys.min(), xs.max(), ys.max()])).max() <= 2, name

def test_difficulty():
    """Bug: a difficulty that does nothing."""
    def mean(level):
        scenes = [s.meta["scenes"][0]["objects"] for s in toy("search", difficulty=level)]
        return (np.mean([len(o) for o in scenes]),
                np.mean([o["radius"] for scene in scenes for o in scene]))
    (n_easy, r_easy), (n_medium, r_medium), (n_hard, r_hard) = map(mean, ("easy", "medium", "hard"))
    assert n_easy + 1 <= n_medium <= n_hard - 1 and r_easy > r_medium + 2 > r_hard + 4

@pytest.mark.parametrize("task", data.TASKS)
def test_splits_share_no_scene(task):
    """Bug: a held-out scene was trained on, or would be under another seed: the split must follow
    from the scene alone."""
    def looks(split, seed):
        return [repr(sorted((o["name"], o["center"]) for o in scene["objects"]))
                for s in toy(task, split, 40, seed) for scene in s.meta["scenes"]]
    train, test = (looks(split, 0) + looks(split, 1) for split in ("train", "test"))
    assert ({zlib.crc32(look.encode()) % 5 == 0 for look in test} == {True}
            and not set(train) & set(test))
    assert {zlib.crc32(look.encode()) % 5 == 0 for look in train} == {False}
    assert len(set(looks("train", 0)) & set(looks("train", 1))) == 0    # another seed, other scenes

def test_seed():
    """Bug: the same seed draws other samples (a resumed run asks other questions), in pixels or in
    words."""
    first, second = (data.toy("search", "train", 5, "a/1") for _ in range(2))
    # PIL images compare by pixels
    assert first == second and first != data.toy("search", "train", 5, "a/2")
    assert [s.id for s in first] == [s.id for s in data.toy("search", "train", 7, "a/1")[:5]]
    with pytest.raises(data.DataError, match="search, point, relation, boxes"):
        data.toy("serach", "train", 1)
    with pytest.raises(data.DataError, match="easy, medium, hard"):
        data.toy("search", "train", 1, difficulty="extreme")

@pytest.mark.parametrize("side", [448, 896])
def test_overview_hides_the_pattern(side):
    """Bug: the answer can be read without zooming. One scene, each pattern: what is fed must not
    change, a crop of it must."""
    worst, mean, least = 0, 0, 255
    rng = random.Random(5)
    for _ in range(2 if side > 448 else 8):
        scene = data.make_scene(rng, **data.DIFFICULTY["easy"], side=side)
        o = scene["objects"][0]
        box, shrunk, crops = [round(v) for v in data.object_box(o)], [], []
        for pattern in data.PATTERNS:
            o["pattern"] = pattern
            image = data.draw_scene(scene)
            shrunk.append(np.asarray(
                image.resize((side // 4, side // 4), Image.Resampling.BICUBIC)).astype(int))
            crops.append(np.asarray(image.crop(box)).astype(int))
        for i, j in itertools.combinations(range(4), 2):
            x1, y1, x2, y2 = (v // 4 for v in box)
            change = abs(shrunk[i] - shrunk[j])
            worst, mean = max(worst, change.max()), max(mean, change[y1:y2, x1:x2].mean())
            least = min(least, abs(crops[i] - crops[j]).max())
    assert worst <= 10 and mean <= 1.5 and least > 60, (worst, mean, least)

# -----------------------------------------------------------------------------
# prompts

@pytest.mark.parametrize("task", data.TASKS)
def test_prompt(task):
    """Bug: the prompt leaks the answer (it must not change with it), loses the options, or has
    another format sentence."""
    for s in toy(task)[:10]:
        system, text = data.prompt(s, data.PROMPT_STYLES[data.TASK_RECIPES[task]])
        asks_for = {k: v for k, v in s.meta.items() if k == "name_image"}
        blind = dataclasses.replace(s, answer=None, targets=[], meta=asks_for, images=[],
                                    category=[], id="")
        assert data.prompt(blind, data.PROMPT_STYLES[data.TASK_RECIPES[task]]) == (system, text)
        assert (system in data.SYSTEM.values()
                and text.startswith(s.question)
                and text.endswith("\n" + data.FORMAT[s.answer_type]
                                  + data.NAME_IMAGE * (task == "find")))
        lettered = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", s.options))
        assert text.count("Answer Choices:" + lettered) == bool(s.options)
        patterns = sum(text.count(p) for p in data.PATTERNS)
        assert patterns == (4 if task == "search" else 0)

def test_tool_call_is_json():
    """Bug: the tool call that the warm start teaches is not the one the system prompt shows, or is
    no JSON."""
    call = data.tool_call(12, 345)
    inside = call.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert (json.loads(inside)
            == {"name": "search_coordinate", "arguments": {"coordinate": [12, 345]}})
    assert data.tool_call("x", "y") in data.SYSTEM["zoom"]

# -----------------------------------------------------------------------------
# files: published layouts

@pytest.fixture
def folder(tmp_path):
    for name, size in [("a.png", (200, 100)), ("b.png", (400, 300)), ("c.png", (50, 80))]:
        Image.new("RGB", size, "red").save(tmp_path / name)
    return tmp_path

def write(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                            for row in rows))
    return str(path)

GOOD = {"id": "x", "images": ["a.png"], "question": "Which?", "answer_type": "choice",
        "options": ["left", "right"], "answer": 1}

def test_round_trip(folder):
    """Bug: a field lost on the way to disk and back; a picture that is not the one drawn."""
    samples = ([s for task in data.TASKS for s in data.toy(task, "train", 2)]
               + data.read_jsonl(write(folder, GOOD)))
    samples.append(data.Sample("é/日", [samples[0].images[0]], "What?\n<|im_end|>", "text",
                               answer=["a", "b"]))
    path = str(folder / "new" / "out.jsonl")
    data.write_jsonl(path, samples)
    for old, new in zip(samples, data.read_jsonl(path), strict=True):
        assert dataclasses.replace(new, images=[]) == dataclasses.replace(old, images=[])
        assert ([files.sample_image(new, i) for i in range(len(new.images))]
                == [files.sample_image(old, i) for i in range(len(old.images))])
    assert not [f for f in os.listdir(folder / "new") if f.endswith(".tmp")]

CHOICES = ("<image>\nQuestion: Is the cup left?\nAnswer Choices:\nA. Yes, left\nB. no\n"
           "Answer with the text of the option.")
LETTERS = ("<image>\nWhat material?\n(A) rubber\n(B) cotton\n(C) tin\n"
           "Answer with the option's letter from the given choices directly.")

@pytest.mark.parametrize("problem, answer, want", [
    (CHOICES, "no", dict(answer_type="choice", question="Is the cup left?",
                         options=["Yes, left", "no"], answer=1)),
    (CHOICES, "yes, Left", dict(answer=0)),     # Bug: only one side was case-folded
    (LETTERS, "B", dict(answer_type="choice", question="What material?",
                        options=["rubber", "cotton", "tin"], answer=1)),
    (LETTERS, " c ", dict(answer=2)),
    ("<image>\nDescription: the red button", "(10, 20, 30, 40)",
     dict(answer_type="point", question="the red button",
          targets=[{"image": 0, "box": [10, 20, 30, 40]}])),
    ("<image>\nOBJECTIVE: buy\n\nPREVIOUS ACTIONS: \nNone\n\nIMAGE:\n", "click [12]",
     dict(answer_type="text", answer=["click [12]"], meta={"matcher": "web_action"})),
    ("<image>\nWhat color?", "red",
     dict(answer_type="text", question="What color?", answer=["red"], meta={})),
])
def test_vigorl_rows(folder, problem, answer, want):
    """Bug: a row taken for another kind; the instruction or the next option inside an option; the
    letter for the text."""
    s, = data.read_jsonl(write(
        folder, {"problem": problem, "answer": answer, "images": ["a.png"]}))
    for key, value in want.items():
        assert getattr(s, key) == value
    assert "<image>" not in s.question and s.images == [str(folder / "a.png")]

MANY = ["a.png", "b.png", "c.png"]

@pytest.mark.parametrize("name, row, image, box", [
    ("univg-r1", {"question": "<image>\n<image>\n<image>\nFind it in the second image.",
                  "answer": [100, 200, 500, 1000]}, 1, [40, 60, 200, 300]),
    # none named: the last
    ("univg-r1", {"question": "Find it.", "answer": [100, 200, 500, 1000]}, 2, [5, 16, 25, 80]),
    ("mig_bench", {"task": "common_object", "question": "Locate this object in the 1th image. ",
                   "answer": [0.1, 0.2, 0.5, 1]}, 0, [20, 20, 100, 100]),
    ("mig_bench", {"task": "region", "question": "The third image ...",
                   "answer": [0, 0, 0.5, 0.5]}, 0, [0, 0, 100, 50]),
    ("mig_bench", {"task": "diff", "question": "Find the difference.",
                   "answer": [0, 0, 0.5, 0.5]}, 1, [0, 0, 200, 150]),
    ("mig_bench", {"task": "group_grounding", "question": "Where?", "answer": [0, 0, 1, 1],
                   "additional_info": "in the 3th image"}, 2, [0, 0, 50, 80]),
    ("mig_bench", {"task": "reasoning",
                   "question": "What in Image-2 is like Image-1? Locate it in the second image.",
                   "answer": [0, 0, 1, 1]}, 1, [0, 0, 400, 300]),
])
def test_boxes_of_several_images(folder, name, row, image, box):
    """Bug: 0-1 taken for 0-1000, or either for pixels; scaled by the size of another image than the
    one asked about."""
    row = {**row, "images": MANY}
    converter = benchmarks.CONVERTERS[name]
    s = data.parse_row(converter.to_row(row, "here: ", converter.layout), "here: ", str(folder))
    assert (s.answer_type == "box"
            and s.targets == [{"image": image, "box": pytest.approx(box)}]
            and "<image>" not in s.question)
    if name == "univg-r1":
        assert data.read_jsonl(write(folder, row))[0].targets == s.targets

def test_screenspot(folder):
    """Bug: xywh read as xyxy (w > x and h > y here: guessing would get it wrong)."""
    rows = [{"img_filename": "a.png", "bbox": [10, 20, 100, 50], "instruction": "close",
             "data_type": "icon", "data_source": "windows"}]
    (folder / "web.json").write_text(json.dumps(rows))
    (where, row), = files.read_rows(str(folder / "web.json"))
    s = data.parse_row(benchmarks.from_screenspot(row, where), where, str(folder))
    assert (s.question, s.answer_type, s.category[1]) == ("close", "point", "icon")
    assert s.targets == [{"image": 0, "box": [10, 20, 110, 70]}]

def test_commands(folder, monkeypatch, capsys):
    """Bug: `python data.py` draws, converts or shows something that it cannot read back."""
    rows = [{"img_filename": "a.png", "bbox": [10, 20, 100, 50], "instruction": "close",
             "data_type": "icon"}]
    (folder / "web.json").write_text(json.dumps(rows))
    def run(*args):
        monkeypatch.setattr("sys.argv", ["data.py", *map(str, args)])
        data.main()
        return capsys.readouterr().out
    assert "3 boxes samples" in run("draw", "boxes", 3, "--out", folder / "scenes",
                                    "--difficulty", "hard")
    assert ("3 rows" in run("show", folder / "scenes" / "boxes.jsonl")
            and len(os.listdir(folder / "scenes")) > 6)
    assert "1 rows" in run("convert", "screenspot", folder / "web.json",
                           folder / "elsewhere" / "out.jsonl")
    assert "close" in run("show", folder / "elsewhere" / "out.jsonl")

# -----------------------------------------------------------------------------
# files: what is wrong is said

@pytest.mark.parametrize("change, expected", [
    ({"answer_type": None}, "'answer_type' is missing; expected str"),
    ({"answer_type": "poin"}, "expected one of point, box, choice, text"),
    ({"answer_type": 5}, "expected str"),
    ({"question": None}, "'question' is missing"), ({"question": ["x"]}, "expected str"),
    ({"images": None}, "'images' is missing"), ({"images": "a.png"}, "expected list"),
    ({"images": []}, "list of file names"), ({"images": [5]}, "list of file names"),
    ({"images": ["no.png"]}, "no.png does not exist"),
    ({"answer": 2}, "answer is 2 with 2 options; expected an index"),
    ({"answer": -1}, "index"), ({"answer": "1"}, "index"), ({"answer": 1.0}, "index"),
    ({"answer": True}, "index"), ({"answer": [1]}, "index"),
    ({"options": ["one"], "answer": 0}, "at least two options"), ({"options": None}, "0 options"),
    ({"options": "ab"}, "expected list"), ({"options": 5}, "expected list"),
    ({"options": [1, 2]}, "list of strings"),
    ({"answer_type": "point"}, "'targets' is empty"),
    ({"answer_type": "box", "targets": []}, "at least one target box"),
    ({"meta": {"question_boxes": 5}}, "expected list"),
    ({"meta": {"question_boxes": [{"image": 3}]}}, "names no image"),
    ({"targets": 5}, "expected list"), ({"targets": {"image": 0}}, "expected list"),
    ({"targets": [5]}, "names no image"),
    ({"targets": [{"image": 0.0, "box": [1, 2, 3, 4]}]}, "names no image"),
    ({"targets": [{"image": 1, "box": [1, 2, 3, 4]}]},
     "names no image of this row; expected {'image': 0..0"),
    ({"targets": [{"image": 0}]}, "box is None; expected 4 numbers"),
    ({"targets": [{"box": [1, 2, 3]}]}, "expected 4 numbers"),
    ({"targets": [{"box": [1, 2, 3, "4"]}]}, "4 numbers"),
    ({"targets": [{"box": [1, 2, 3, float("nan")]}]}, "4 numbers"),
    ({"targets": [{"box": [1, 2, 3, float("inf")]}]}, "4 numbers"),
    ({"targets": [{"norm_box": 5}]}, "norm_box is 5; expected 4"),
    ({"answer_type": "text", "answer": 5}, "list of strings"),
    ({"answer_type": "text", "answer": [5]}, "list of strings"),
    ({"meta": 5}, "expected dict"), ({"category": "web"}, "expected list"),
])
def test_bad_field(folder, change, expected):
    """Bug: a traceback, or training on nonsense, instead of one line: which file, which row, what
    was expected."""
    path = write(folder, GOOD, "", {**GOOD, **change})
    with pytest.raises(data.DataError) as e:
        data.read_jsonl(path)
    assert (str(e.value).startswith(f"{path}, line 3: ")
            and expected in str(e.value)
            and "\n" not in str(e.value))

@pytest.mark.parametrize("text, expected", [
    ("", "holds no rows"), ("\n \n", "holds no rows"),
    ('{"id": 1', "line 1: not JSON"), (json.dumps(GOOD) + "\n{,}\n", "line 2: not JSON"),
    ("[1, 2]", "line 1: field 'answer_type' is missing"), ("null", "line 1: "),
    ("\ufeff{}", "line 1: field 'answer_type' is missing"), ("\ufeff{", "line 1: not JSON"),
    ('{"problem": 5, "answer": "x", "images": ["a.png"]}',
     "line 1: field 'problem' is 5; expected str"),
    ('{"problem": "x"}', "line 1: field 'answer' is missing"),
    (json.dumps({"problem": CHOICES, "answer": "maybe", "images": ["a.png"]}),
     "line 1: answer 'maybe' is none of the options"),
    (json.dumps({"problem": CHOICES, "answer": "C", "images": ["a.png"]}),
     "line 1: answer 'C' is none of the options"),
    ('{"question": "x", "answer": [1, 2], "images": ["a.png"]}',
     "line 1: answer is [1, 2]; expected 4 numbers"),
])
def test_bad_file(folder, text, expected):
    """Bug: what is no list of questions is refused without a name and what was expected."""
    path = write(folder, text)
    with pytest.raises(data.DataError) as e:
        data.read_jsonl(path)
    assert str(e.value).startswith(path) and expected in str(e.value)

def test_all_faults_are_in_one_list(folder):
    """Bug: a file with ten faults is mended ten times. A twin id is a fault: traces and saved rows
    are found by it."""
    path = write(folder, GOOD, {**GOOD, "id": "y", "answer": 7},
                 GOOD, {**GOOD, "id": "z", "question": None})
    with pytest.raises(data.DataError) as e:
        data.read_jsonl(path)
    lines = str(e.value).splitlines()
    assert lines[0] == f"3 rows of {path} are wrong:" and len(lines) == 4
    assert ("line 2: answer is 7" in lines[1]
            and "line 3: the id 'x' is that of an earlier row" in lines[2]
            and "line 4: field 'question'" in lines[3])
    many = write(folder, *[{**GOOD, "id": str(i), "answer": 7} for i in range(50)])
    with pytest.raises(data.DataError) as e:
        data.read_jsonl(many)
    assert str(e.value).count("\n") == 21 and "and 30 more" in str(e.value)

def test_rows_without_an_id_get_one(folder):
    """Bug: their id was the path and line on this machine."""
    nameless = {k: v for k, v in GOOD.items() if k != "id"}
    assert ([s.id for s in data.read_jsonl(
                write(folder, nameless, "", {**GOOD, "id": 0}, nameless))]
            == ["rows.jsonl:1", "0", "rows.jsonl:3"])

BOX = {"id": "b", "images": ["a.png"], "question": "Where?", "answer_type": "box",
       "targets": [{"image": 0, "box": [10, 10, 50, 50]}]}

@pytest.mark.parametrize("row, said", [
    ({**BOX, "targets": [{"image": 0, "box": [150, 10, 250, 50]}]},
     "leaves its image, which is 200 x 100"),
    ({**BOX, "targets": [{"image": 0, "box": [50, 50, 10, 10]}]}, "inverted or empty"),
    ({**BOX, "answer_type": "point", "targets": [{"image": 0, "box": [50, 50, 10, 10]}]},
     "inverted or empty"),
    ({**GOOD, "options": ["left", "Left "]}, "read the same"),
    ({**GOOD, "options": ["left", ""]}, "its gold"),
    ({**GOOD, "answer_type": "text", "answer": [" "], "options": []}, "its gold"),
])
def test_rows_that_cannot_be_right_are_refused(folder, row, said):
    """Bug: --data trained on what `convert --check` refuses."""
    faults.check_samples(data.read_jsonl(write(folder, GOOD, BOX)))
    with pytest.raises(data.DataError, match=said) as e:
        faults.check_samples(data.read_jsonl(write(folder, row)))
    assert "\n" not in str(e.value) and f"sample {row['id']}: " in str(e.value)
    twice = write(folder, {**row, "id": "one"}, {**row, "id": "two"})
    with pytest.raises(data.DataError,
                       match="2 rows cannot be used:\n  sample one: .*\n  sample two: "):
        faults.check_samples(data.read_jsonl(twice))
    faults.check_samples(data.read_jsonl(
        write(folder, {**row, "meta": {"published_wrong": "so"}})))

def test_digest_tells_questions_apart(folder):
    """Bug: trees and paid replies of another file were used again, because the ids were alike."""
    sample = data.read_jsonl(write(folder, GOOD))[0]
    changes = [dict(question="What?"), dict(options=["left", "up"]), dict(answer=0),
               dict(images=[str(folder / "b.png")]),
               dict(targets=[{"image": 0, "box": [1, 2, 3, 4]}])]
    digests = {files.digest(dataclasses.replace(sample, **change)) for change in [{}, *changes]}
    assert (len(digests) == 6
            and files.digest(dataclasses.replace(sample, id="another", category=["x"])) in digests)
    toy = data.toy("search", "train", 2)
    assert (files.digest(toy[0]) == files.digest(data.toy("search", "train", 1)[0])
            != files.digest(toy[1]))

def test_no_file(folder):
    """Bug: a traceback for a file that is not there, not text or not a list."""
    (folder / "binary.jsonl").write_bytes(b"\x89PNG\xff\xfe")
    (write(folder, "5", name="five.json"), write(folder, "{,", name="broken.json"),
     write(folder, '{"rows": 5}', name="rows.json"))
    for name, expected in [("no.jsonl", "cannot read"), (".", "cannot read"),
                           ("binary.jsonl", "cannot read"), ("five.json", "expected a list"),
                           ("broken.json", "not JSON"), ("rows.json", "expected a list")]:
        with pytest.raises(data.DataError, match=expected) as e:
            data.read_jsonl(str(folder / name))
        assert str(folder / name) in str(e.value)

def test_large_scenes_are_drawn_when_needed(folder, monkeypatch):
    """Claim: the scenes of a large model are not held as pixels, and whatever takes an image takes
    them; small ones are as before."""
    drawn = []
    monkeypatch.setattr(data, "draw_scene", lambda scene, real=data.draw_scene: (
        drawn.append(scene["side"]) or real(scene)))
    files.made.cache_clear()
    small, = data.toy("search", "train", 1)
    large = data.toy("search", "train", 40, side=896)
    assert drawn == [448] and large[0].images[0].size == (896, 896) and drawn == [448]
    scene = large[0].meta["scenes"][0]
    whole = data.draw_scene(scene)
    image = files.sample_image(large[0], 0)
    assert (image.crop((10, 20, 300, 400)).tobytes() == whole.crop((10, 20, 300, 400)).tobytes()
            and image.width == image.height == 896)
    assert ([image.resize((96, 96)).tobytes(), image.tobytes()]
            == [whole.resize((96, 96)).tobytes(), whole.tobytes()])
    assert drawn == [448, 896, 896]             # here and once for all that was asked of it
    for s in large:
        s.images[0].tobytes()
    assert files.made.cache_info().currsize <= 32
    assert (files.digest(large[0]) != files.digest(large[1])
            and copy.copy(image).size == (896, 896))
    data.write_jsonl(str(folder / "large.jsonl"), large[:2])
    back = data.read_jsonl(str(folder / "large.jsonl"))
    assert files.sample_image(back[0], 0).tobytes() == whole.tobytes()
    faults.check_samples(large[:2])
    assert page.Album().add(image, 100).width == 896 and len(split.hold_out(large, 4, 0)[0]) == 4

@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_broken_image(folder, kind):
    """Bug: half an image is padded with gray and used, or ends in PIL's traceback, which names no
    row."""
    whole = io.BytesIO()
    data.toy("search", "train", 1)[0].images[0].resize((224, 224)).save(whole, kind)
    whole, rng = whole.getvalue(), random.Random(0)
    path = folder / f"i.{kind}"
    def opened(content):
        path.write_bytes(content)
        return files.open_image(str(path), "row 7: ")
    assert opened(whole).size == (224, 224)
    for n in ([0, 1, 10, len(whole) // 2, len(whole) - 100]
              + [rng.randrange(len(whole) - 100) for _ in range(40)]):
        with pytest.raises(data.DataError,
                           match=f"^row 7: image .*i.{kind} cannot be read .* "
                                 "expected a whole PNG or JPEG file$"):
            opened(whole[:n])
    for _ in range(60):                         # bytes changed: read, or refused in one line
        noisy = bytearray(whole)
        for _ in range(3):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        try:
            opened(bytes(noisy))
        except data.DataError:
            pass
    with pytest.raises(data.DataError, match="^sample two: image .* does not exist"):
        files.sample_image(data.Sample("two", [str(folder / "gone.png")], "", "text"), 0)

@pytest.mark.parametrize("values, kind, seen", [
    # Bug: all but black became white
    (np.array([[0, 257 * 10, 257 * 200, 65535]], np.uint16), "png", [0, 10, 200, 255]),
    # dark, but of 16 bits all the same
    (np.array([[0, 257 * 10]], np.uint16), "png", [0, 10]),
    (np.array([[0, 0.5, 1]], np.float32), "tiff", [0, 128, 255]),       # Bug: black
    (np.array([[0, 100, 200]], np.float32), "tiff", [0, 100, 200]),
    (np.array([[0, 65535]], np.int32), "tiff", [0, 255]),
])
def test_gray_of_any_range(folder, values, kind, seen):
    path = str(folder / f"deep.{kind}")
    Image.fromarray(values).save(path)
    assert [p[0] for p in np.asarray(files.open_image(path)).tolist()[0]] == seen

@pytest.mark.parametrize("value", [-5.0, 1e6, float("nan")])
def test_gray_of_no_known_range_is_refused(folder, value):
    path = str(folder / "deep.tiff")
    Image.fromarray(np.array([[0, value]], np.float32)).save(path)
    with pytest.raises(data.DataError, match="its gray values go from .* beyond 0 to 65535"):
        files.open_image(path)

def behind_the_pixels(png, kind):
    """A PNG file with its chunks of a type moved to its end."""
    moved, kept, at = b"", png[:8], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at:at + 4], "big")
        if png[at + 4:at + 8] == kind:
            moved += png[at:end]
        else:
            kept += (moved if png[at + 4:at + 8] == b"IEND" else b"") + png[at:end]
        at = end
    return kept

def test_the_size_of_a_png_is_read_from_its_head(monkeypatch):
    """Bug: PIL decodes every PNG to look for EXIF behind its pixels: the sizes of 24,000
    screenshots took ten minutes. And a PNG that does say how it was held, wherever it says it, has
    the size that it has when it is read."""
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}"

    def saved(text=None, zipped=False, **options):
        info, file = PngImagePlugin.PngInfo(), io.BytesIO()
        if text:
            add = info.add_itxt if text[0].startswith("XML") else info.add_text
            add(*text, zip=zipped)
        Image.new("RGB", (30, 20)).save(file, "png", pnginfo=info, **options)
        return file.getvalue()
    xmp = ("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>')
    turned = [saved(exif=exif), behind_the_pixels(saved(exif=exif), b"eXIf"),
              saved(xmp), saved(xmp, True),
              saved(("Raw profile type exif", raw)), saved(("Raw profile type exif", raw), True),
              behind_the_pixels(saved(xmp), b"iTXt")]
    for png in turned:
        assert files.open_image(png, size_only=True) == files.open_image(png).size == (20, 30)
    for png in (saved(), saved(("Title", "tiff")),
                saved((xmp[0], "<x exif:UserComment='Screenshot'/>"))):
        with monkeypatch.context() as patch:
            patch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: 1 / 0)
            assert files.open_image(png, size_only=True) == (30, 20)
        for cut in range(len(png)):
            with contextlib.suppress(files.DataError):
                files.open_image(png[:cut], size_only=True)

@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_stands_upright(folder, orientation):
    """Bug: EXIF's rotation was ignored, so boxes and picture did not fit."""
    from PIL import ImageOps
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(folder / "photo.png", exif=exif)
    path = str(folder / "photo.png")
    want = ImageOps.exif_transpose(Image.open(path))
    assert (files.open_image(path).tobytes() == want.tobytes()
            and files.open_image(path, size_only=True) == want.size)
    assert (want.size == (20, 40)) == (orientation > 4)

def test_transparency(folder):
    """Bug: transparent pixels turn black (a black screenshot)."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    for mode in ("RGBA", "P"):
        image.convert(mode).save(folder / "t.png", **(
            {"transparency": image.convert(mode).getpixel((1, 0))} if mode == "P" else {}))
        assert (list(np.asarray(files.open_image(str(folder / "t.png")))[0].tolist())
                == [[255, 0, 0], [255, 255, 255]])

# -----------------------------------------------------------------------------
# do the tests bite? Each row puts one bug into data.py or a reader; the named test must fail.

MUTATIONS = [
    ("data:ask_search", "options.index(o['pattern'])", "0", test_search_answer, {}),
    ("data:PATTERNS", "x // 2 % 2", "y // 2 % 2", test_search_answer, {}),
    ("data:ask_search", "rng.sample(list(PATTERNS), len(PATTERNS))",
     "[o['pattern']] + [p for p in PATTERNS if p != o['pattern']]",
     test_options_are_shuffled, dict(task="search")),
    ("data:object_box", "x, y = o['center']", "y, x = o['center']", test_point_answer, {}),
    ("data:ask_relation", "words[gap > 0]", "words[gap < 0]", test_relation_answer, {}),
    ("data:ask_boxes", "(i == image) == (name in names)",
     "i != image or name in names", test_boxes_answer, {}),
    ("data:ask_boxes", "target(found[0], image)", "target(found[0], 1)", test_boxes_answer, {}),
    ("data:random_names", "rng.sample(NAMES, n)",
     "[rng.choice(NAMES) for _ in range(n)]", test_scenes, {}),
    ("data:random_names", "rng.sample(list(COLORS), n)",
     "rng.choices(list(COLORS), k=n)", test_scenes, {}),
    ("data:apart", "(1.1 * (r + o['radius'])) ** 2", "r * o['radius']", test_scenes, {}),
    ("data:SHAPES", "(1, 0.9, lambda u, v: np.maximum(v, 1.8 * abs(u) - v) / 0.9)",
     "(1, 1, lambda u, v: np.maximum(v, 1.8 * abs(u) - v) / 0.9)",
     test_object_boxes_fit, {}),
    ("data:ask_video", "target(o, image)",
     "target(frames[0]['objects'][0], image)", test_video_answer, {}),
    ("appendix.motion:next_frame", "step[axis] = -step[axis]",
     "step[axis] = 0", test_video_answer, {}),
    ("data:ask_find", "{'name_image': True}", "{}", test_find_answer, {}),
    ("data:toy", "rng.choice(list(DIFFICULTY))", "list(DIFFICULTY)[0]", test_mixed_difficulty, {}),
    ("data:toy", "DIFFICULTY[level]", "DIFFICULTY['medium']", test_difficulty, {}),
    ("data:split_scene", "split_of(scene) == split",
     "True", test_splits_share_no_scene, dict(task="point")),
    ("data:ask_boxes", "(i == image) == (name in names)",
     "(i == image or name not in names) "
     "and (i != image or scene['objects'][0].update(name=name) is None)",
     test_splits_share_no_scene, dict(task="boxes")),
    ("data:toy", "random.Random(f'{task}/{split}/{seed}')", "random.Random()", test_seed, {}),
    ("data:PATTERNS", "lambda x, y: y // 2 % 2",
     "lambda x, y: y // 3 % 2", test_overview_hides_the_pattern, dict(side=448)),
    ("data:PATTERNS", "lambda x, y: y // 2 % 2", "lambda x, y: y % 2", test_search_answer, {}),
    ("data:prompt",
     "if sample.options:\n"
     "    text += '\\nAnswer Choices:'\n"
     "    for code, option in enumerate(sample.options, ord('A')):\n"
     "        text += f'\\n{chr(code)}. {option}'",
     "if sample.answer is not None:\n"
     "    text += '\\nAnswer Choices:'\n"
     "    for code, option in enumerate(sample.options, ord('A')):\n"
     "        text += f'\\n{chr(code)}. {option}'",
     test_prompt, dict(task="search")),
    ("appendix.benchmarks:option_index", "option.lower() == said.lower()", "option == said.lower()",
     test_vigorl_rows, dict(problem=CHOICES, answer="yes, Left", want=dict(answer=0))),
    ("appendix.benchmarks:box_target", "v / 1000", "v / 100", test_boxes_of_several_images,
     dict(name="univg-r1", row={"question": "Find it.", "answer": [100, 200, 500, 1000]},
          image=2, box=[5, 16, 25, 80])),
    ("appendix.rows:read_target",
     "width, height = open_image(images[index], where, size_only=True)\n"
     "out['box'] = [x1 * width, y1 * height, x2 * width, y2 * height]",
     "width, height = open_image(images[0], where, size_only=True)\n"
     "out['box'] = [x1 * width, y1 * height, x2 * width, y2 * height]",
     test_boxes_of_several_images,
     dict(name="univg-r1", row={"question": "Find it.", "answer": [100, 200, 500, 1000]},
          image=2, box=[5, 16, 25, 80])),
    ("appendix.benchmarks:box_target", "corners = [a, b, a + c, b + d]",
     "pass", test_screenspot, {}),
    ("appendix.files:orientation", "im.format == 'PNG'",
     "False", test_the_size_of_a_png_is_read_from_its_head, {}),
    ("appendix.files:may_tell_orientation",
     "kind == b'eXIf' or keyword == b'Raw profile type exif'",
     "kind == b'eXIf'", test_the_size_of_a_png_is_read_from_its_head, {}),
    ("appendix.files:may_tell_orientation", "text[:1] == b'\\1' or b'tiff:Orientation' in text",
     "b'tiff:Orientation' in text", test_the_size_of_a_png_is_read_from_its_head, {}),
    ("appendix.files:is_numbers", "-1e9 < v < 1e9", "True", test_bad_field,
     dict(change={"targets": [{"box": [1, 2, 3, float("nan")]}]}, expected="4 numbers")),
    ("appendix.files:open_image",
     "(OSError, SyntaxError, ValueError, Image.DecompressionBombError)",
     "(SyntaxError, Image.DecompressionBombError)",
     test_broken_image, dict(kind="jpeg")),
    ("data:toy", "image_of(scene)", "image_of(scenes[0])", test_pictures, {}),
    ("appendix.files:as_rgb", "im.mode in ('RGBA', 'LA', 'PA', 'P')",
     "False", test_transparency, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, folder, monkeypatch):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {
        "folder": lambda: folder, "monkeypatch": lambda: monkeypatch})
