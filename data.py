"""What is asked: samples, a toy world that draws its own, readers of published files, and the prompts.

A `Sample` is a question about one or more images with an answer that a rule can check. It comes from one of
  - the toy world below: four tasks drawn from a seed, so that everything in this repository runs without a download;
  - a JSONL file in the one normalised layout that the whole repository reads (`read_jsonl`);
  - a published file or folder, turned into that layout by `python data.py convert NAME PATH OUT` (NAME: see CONVERTERS).

    python data.py draw search 4 --out scenes      # PNGs, the crops that answer them, and scenes/search.jsonl
    python data.py show scenes/search.jsonl        # the rows as text, with the whole prompt of the first
    python data.py convert screenspot web.json out.jsonl --images DIR --check

Boxes and points here are always pixels of the stored image, (x1, y1, x2, y2). What the model reads and writes is
another frame (it sees a resized image); `model.View` is the only place that maps between the two.
"""
import argparse, collections, glob, io, json, os, pickle, random, re, sys, zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np
from PIL import Image
from tqdm import tqdm

Image.MAX_IMAGE_PIXELS = 200_000_000        # screenshots of several screens are legitimate; a decompression bomb is not


class DataError(ValueError):
    """Bad input, in one line: which file, which row, what was expected."""


@dataclass
class Sample:
    """One question. `images` are paths, PIL images or the bytes of image files, in prompt order; `answer` is an index into `options` (choice),
    a list of accepted strings (text), or None when `targets` hold the answer (point, box) or it is hidden."""
    id: str
    images: list
    question: str                                   # no image token, no option list, no format sentence
    answer_type: str                                # "point" | "box" | "choice" | "text"
    options: list = field(default_factory=list)     # in the order in which the model reads them
    answer: object = None
    targets: list = field(default_factory=list)     # [{"image": 0, "box": [x1, y1, x2, y2]}], pixels of the stored image;
                                                    # and "polygon": its corners in order, where not all of the box is right
    category: list = field(default_factory=list)
    meta: dict = field(default_factory=dict)        # "evidence": boxes that show the answer; "question_boxes": boxes quoted in the question


# ----------------------------------------------------------------------------------------------------------------------
# The toy world. Objects have a color, a shape and a fine pattern. The pattern's period is 4 pixels, and a model reads the
# image shrunk by 4 or more: every pattern averages to the same flat color there, so *what* and *where* can be seen in the
# overview, and the pattern only in a crop of the source. (tests/test_data.py measures it: swap a pattern, compare pixels.)
# The ground turns red towards the right and green towards the bottom: rotary attention knows relative positions only, and the
# color of the ground tells a small model where in the image a patch is.

COLORS = {"red": (235, 40, 40), "green": (40, 165, 70), "blue": (50, 90, 225),
          "yellow": (250, 225, 40), "purple": (150, 60, 185), "white": (235, 235, 235)}
SHAPES = {"circle": (1, 1, lambda u, v: np.hypot(u, v)),                        # half width, half height, gauge: <= 1 inside
          "square": (0.85, 0.85, lambda u, v: np.maximum(abs(u), abs(v)) / 0.85),
          "triangle": (1, 0.9, lambda u, v: np.maximum(v, 1.8 * abs(u) - v) / 0.9)}
PATTERNS = {"lined": lambda x, y: y // 2 % 2, "barred": lambda x, y: x // 2 % 2,
            "slanted": lambda x, y: (x + y) // 2 % 2, "checked": lambda x, y: (x // 2 + y // 2) % 2}
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
DIFFICULTY = {"easy": dict(objects=(2, 2), radius=(44, 56), alike=False),      # how many objects; radius in 1/448 of the side;
              "medium": dict(objects=(3, 4), radius=(38, 52), alike=False),    # may two have the same color?
              "hard": dict(objects=(5, 6), radius=(30, 44), alike=True)}
DIFFICULTIES = (*DIFFICULTY, "mixed")                                          # mixed: every question draws one of the three
SIDE = 448                                                                     # pixels of a source image in the tiny world
TASKS = ("search", "point", "relation", "boxes", "find", "video")


def make_scene(rng, objects, radius, alike=True, side=SIDE, names=None):
    """A scene is data (JSON), not pixels: {"side", "objects": [{name, pattern, center, radius}]}."""
    n = len(names) if names else rng.randint(*objects)
    if not names:
        names = rng.sample(NAMES, n) if alike else [f"{c} {rng.choice(list(SHAPES))}" for c in rng.sample(list(COLORS), n)]
    placed = []
    while len(placed) < n:
        r = rng.randint(*radius) * side // SIDE
        x, y = (rng.randint(r + 4, side - r - 4) for _ in "xy")
        if all((x - o["center"][0]) ** 2 + (y - o["center"][1]) ** 2 > (1.1 * (r + o["radius"])) ** 2 for o in placed):
            placed.append(dict(name=names[len(placed)], pattern=rng.choice(list(PATTERNS)), center=[x, y], radius=r))
        elif rng.random() < 0.01:                                              # painted into a corner: start over
            placed = []
    return {"side": side, "objects": placed}


def object_box(o):
    half_w, half_h, _ = SHAPES[o["name"].split()[1]]
    (x, y), r = o["center"], o["radius"]
    return [x - half_w * r, y - half_h * r, x + half_w * r, y + half_h * r]


_ground = {}


def draw(scene):
    """Scene -> PIL image, side x side pixels."""
    side = scene["side"]
    if side not in _ground:
        ramp = np.linspace(15, 240, side, dtype=np.float32)
        red, green = np.broadcast_to(ramp, (side, side)), np.broadcast_to(ramp[:, None], (side, side))
        _ground[side] = np.stack([red, green, np.full_like(red, 110)], -1).astype(np.uint8)            # (side, side, 3)
    canvas = _ground[side].copy()
    for o in scene["objects"]:
        (cx, cy), r, (color, shape) = o["center"], o["radius"], o["name"].split()
        y, x = np.mgrid[cy - r:cy + r + 1, cx - r:cx + r + 1]
        gauge = SHAPES[shape][2]((x - cx) / r, (y - cy) / r)[..., None]         # (2r+1, 2r+1, 1)
        stripe = PATTERNS[o["pattern"]](x, y)[..., None] - 0.5
        # The pattern fades towards the rim: cut off sharply, it would leave a trace of itself in the shrunken outline.
        paint = (0.68 + 0.64 * stripe * (4 * (0.88 - gauge)).clip(0, 1)) * np.array(COLORS[color])
        window = np.s_[cy - r:cy + r + 1, cx - r:cx + r + 1]
        canvas[window] = np.where(gauge > 1, canvas[window], np.where(gauge > 0.88, 0, paint)).astype(np.uint8)
    return Image.fromarray(canvas)


def ask_search(rng, new_scene):
    """Visual search: the answer is a detail that the overview does not hold."""
    scene = new_scene()
    o = scene["objects"][0]
    options = rng.sample(list(PATTERNS), len(PATTERNS))
    return [scene], dict(question=f"What is the pattern of the {o['name']}?", answer_type="choice", options=options,
                         answer=options.index(o["pattern"]), meta={"evidence": [{"image": 0, "box": object_box(o)}]})


def ask_point(rng, new_scene):
    """Web grounding: click the named thing."""
    scene = new_scene()
    o = scene["objects"][0]
    return [scene], dict(question=f"Click the {o['name']}.", answer_type="point", targets=[{"image": 0, "box": object_box(o)}])


def ask_relation(rng, new_scene):
    """Spatial reasoning: a two-option question about where two objects stand."""
    while True:                                                                # not a matter of a pixel
        scene = new_scene()
        a, b = scene["objects"][:2]
        axis = rng.randrange(2)
        gap = a["center"][axis] - b["center"][axis]
        if abs(gap) > 0.12 * scene["side"]:
            break
    words = [("left", "right"), ("above", "below")][axis]
    options = rng.sample(words, 2)
    return [scene], dict(question=f"Where is the {a['name']}, seen from the {b['name']}?", answer_type="choice", options=options,
                         answer=options.index(words[gap > 0]),
                         meta={"evidence": [{"image": 0, "box": object_box(o)} for o in (a, b)]})


def ask_boxes(rng, new_scene):
    """Several images: the first shows one thing; find it in one of the others (the question names which)."""
    shown, scenes = new_scene(names=[rng.choice(NAMES)]), []
    name, target = shown["objects"][0]["name"], rng.randint(1, rng.randint(1, 2))
    for i in range(1, rng.randint(target, 2) + 1):
        while True:
            scene = new_scene()
            names = [o["name"] for o in scene["objects"]]
            if (i == target) == (name in names):
                break
        scenes.append(scene)
    o = next(o for o in scenes[target - 1]["objects"] if o["name"] == name)
    return [shown] + scenes, dict(question=f"Find the object of image 1 in image {target + 1}.", answer_type="box",
                                  targets=[{"image": target, "box": object_box(o)}])


def ask_find(rng, new_scene):
    """The same, but nobody says in which image it is, and the answer must: {"name_image": True} asks for it and scores it."""
    scenes, asked = ask_boxes(rng, new_scene)
    return scenes, {**asked, "question": "Find the object of image 1 in another image.", "meta": {"name_image": True}}


def ask_video(rng, new_scene):
    """Frames of a video as images, everything on its way: where is the named thing in the frame that is asked for?"""
    drift = {}
    def move(o, side):
        step = drift.setdefault(o["name"], [rng.choice((-1, 1)) * rng.randint(side // 14, side // 6) for _ in "xy"])
        step[:] = [d if o["radius"] + 4 <= c + d <= side - o["radius"] - 4 else -d for c, d in zip(o["center"], step)]     # off the wall
        return {**o, "center": [c + d for c, d in zip(o["center"], step)]}
    frames = [new_scene()]
    while len(frames) < 3:
        frames.append(new_scene(made={"side": frames[-1]["side"], "objects": [move(o, frames[-1]["side"]) for o in frames[-1]["objects"]]}))
        if frames[-1] is None:                                                 # two things collide, or the frame is of the other split
            drift, frames = {}, [new_scene()]
    target = rng.randrange(3)
    o = frames[target]["objects"][0]
    return frames, dict(question=f"These are frames of a video. Find the {o['name']} in image {target + 1}.", answer_type="box",
                        targets=[{"image": target, "box": object_box(o)}])


# how a toy task is rewarded
RECIPES = {"search": "vigorl-zoom", "point": "vigorl", "relation": "vigorl", "boxes": "univg-r1", "find": "univg-r1", "video": "univg-r1"}
ASK = {"search": ask_search, "point": ask_point, "relation": ask_relation, "boxes": ask_boxes, "find": ask_find, "video": ask_video}


def split_scene(rng, split, made=None, **look):
    """`make_scene` until one belongs to the split, by a hash of what it shows: one in five to test. made: this scene, or None if
    it does not belong, or if things in it stand too close."""
    while True:
        scene = made or make_scene(rng, **look)
        shows = sorted((o["name"], o["center"]) for o in scene["objects"])
        if (zlib.crc32(repr(shows).encode()) % 5 == 0) == (split == "test") and (not made or apart(scene["objects"])):
            return scene
        if made:
            return None


def apart(objects):
    return all(sum((u - v) ** 2 for u, v in zip(a["center"], b["center"])) > (1.1 * (a["radius"] + b["radius"])) ** 2
               for i, a in enumerate(objects) for b in objects[:i])


def toy(task, split, n, seed=0, difficulty="medium", side=SIDE):
    """n samples of a toy task. `split` is "train" or "test", which can never share a scene, whatever the seeds."""
    if task not in ASK:
        raise DataError(f"unknown toy task {task!r}: expected one of {', '.join(TASKS)}")
    if difficulty not in DIFFICULTIES:
        raise DataError(f"unknown difficulty {difficulty!r}: expected one of {', '.join(DIFFICULTIES)}")
    if side < 28:
        raise DataError(f"a scene of {side} x {side} pixels has no room for its objects; expected sides of 28 or more")
    rng, level, samples = random.Random(f"{task}/{split}/{seed}"), difficulty, []
    new_scene = lambda names=None, made=None: split_scene(rng, split, made, **DIFFICULTY[level], side=side, names=names)
    for i in range(n):
        if difficulty == "mixed":
            level = rng.choice(list(DIFFICULTY))
        scenes, asked = ASK[task](rng, new_scene)
        meta, category = {"scenes": scenes, **asked.pop("meta", {})}, [task] + [level] * (difficulty == "mixed")
        samples.append(Sample(f"{task}/{split}/{seed}/{i}", [draw(s) for s in scenes], category=category, meta=meta, **asked))
    return samples


# ----------------------------------------------------------------------------------------------------------------------
# The prompts. There is one builder, used by warm start, RL and evaluation alike. The wording is ours; the protocol
# (tags, tool name and JSON, observation, points in pixels) is ViGoRL's, so its checkpoints understand it.

SYSTEM = {
    "zoom": "Answer the question about the image by looking. In each turn, reason about ONE place inside <think> </think>, naming its "
            "coordinate (x, y). Then either zoom into a new place:\n<tool_call>\n{\"name\": \"search_coordinate\", \"arguments\": "
            "{\"coordinate\": [x, y]}}\n</tool_call>\nor, once you are sure, answer:\n<answer> your answer </answer>\n"
            "Small details show only in the zoomed crop. Never name the same coordinate twice.",
    "think": "Answer the question about the image by looking. Reason step by step inside one pair of <think> </think> tags and anchor "
             "every step to a coordinate (x, y) of the image. Then answer:\n<answer> your answer </answer>",
    "boxes": "You are a helpful assistant.",
}
STYLES = {"vigorl-zoom": "zoom", "vigorl": "think", "univg-r1": "boxes"}         # recipe (rewards.RECIPES) -> its prompt
FORMAT = {
    "point": "Answer with the point (x, y).",
    "box": "First output the thinking process in <think> </think> tags and then output the bounding box in <answer> </answer> tags "
           "as (x1, y1),(x2, y2).",
    "choice": "Answer with the text of the option.",
    "text": "Answer briefly.",
}
NAME_IMAGE = " Before the box, name its image, as in image 1: (x1, y1),(x2, y2)."        # where the answer's image is scored too
TOOL_OPEN, TOOL_CLOSE = '<tool_call>\n{"name": "search_coordinate", "arguments": {"coordinate": [', "]}}\n</tool_call>"
OBSERVE = ("<observation>\nHere is the crop of the image centered on the coordinate:\n", "\n</observation>")   # around the crop
REFUSE = "<observation>\n{error}\n</observation>"
FORCE = "<think> I have looked enough and answer now. </think>\n<answer>"        # opens the turn after the last allowed zoom


# Strings that never vary; the tiny model's tokenizer gives each one token (model.make_tiny).
PHRASES = [*SYSTEM.values(), *FORMAT.values(), TOOL_OPEN, TOOL_CLOSE, *OBSERVE, FORCE, "<think>", " </think>\n", "<answer>", " </answer>",
           "system\n", "user\n", "assistant\n", "\nAnswer Choices:\n", "What is the pattern of the"]


QUESTION_BOX = re.compile(r"<\|box_start\|>\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)<\|box_end\|>")


def question(sample, frames=None):
    """The question as this model reads it: a box that it quotes (meta "question_boxes") stands in it as the model writes boxes.
    frames: (sx, sy, ...) of each image, a source pixel being (x * sx, y * sy); None: source pixels."""
    boxes = iter(sample.meta.get("question_boxes", []))

    def write(quoted):
        t = next(boxes, None)
        if t is None:
            return quoted[0]
        scale = frames[t["image"]][:2] if frames else (1, 1)
        return "({}, {}),({}, {})".format(*(round(v / k) for v, k in zip(t["box"], (*scale, *scale))))
    return QUESTION_BOX.sub(write, sample.question)


def prompt(sample, style="zoom", frames=None):
    """-> (system text, user text that follows the images). style: a key of SYSTEM. frames: see `question`."""
    text = question(sample, frames)
    if sample.options:
        text += "\nAnswer Choices:\n" + "\n".join(f"{chr(65 + i)}. {o}" for i, o in enumerate(sample.options))
    return SYSTEM[style], text + "\n" + FORMAT[sample.answer_type] + NAME_IMAGE * bool(sample.meta.get("name_image"))


def tool_call(x, y):
    return f"{TOOL_OPEN}{x}, {y}{TOOL_CLOSE}"


# ----------------------------------------------------------------------------------------------------------------------
# Files: one normalised JSONL, and the layouts that turn into it

def open_image(source, where="", size_only=False, check=False):
    """A path, or the bytes of a file -> RGB PIL image, or a DataError that names it and the row. size_only: its (width, height),
    from its head; with check, all of the file is read too, a JPEG at an eighth of its size, which costs little."""
    name = "image" if isinstance(source, bytes) else f"image {source}"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as im:
            size = im.size
            if check:
                im.draft("L", (im.width // 8, im.height // 8))
                im.load()
            if size_only:
                return size
            im.load()                                                          # decode now: a truncated file fails here, not mid-run
            if im.mode in ("RGBA", "LA", "P"):                                 # transparent pixels are white, as on a screen
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            return im.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{where}{name} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise DataError(f"{where}{name} cannot be read ({e}); expected a whole PNG or JPEG file") from None


def image(sample, i):
    """Source image i of a sample as RGB PIL."""
    return sample.images[i] if isinstance(sample.images[i], Image.Image) else open_image(sample.images[i], f"sample {sample.id}: ")


def check_images(samples):
    """Every image once, before any work: a broken one in the last row must not end a run in the middle. -> {image: (width, height)}"""
    first = {im: f"sample {s.id}: " for s in samples for im in s.images if not isinstance(im, Image.Image)}
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda item: open_image(*item, size_only=True, check=True), first.items())
        return dict(zip(first, tqdm(read, "images", len(first), disable=None, leave=False)))


def rows_of(path):
    """(where, row) for each row of a .jsonl, .json or .parquet file; `where` names file and line for error messages."""
    try:
        if str(path).endswith(".parquet"):
            try:
                import pyarrow.parquet
            except ImportError:
                raise DataError(f"{path} is a parquet file; to read it: pip install pyarrow") from None
            with pyarrow.parquet.ParquetFile(path) as f:
                rows = [row for batch in f.iter_batches(100) for row in batch.to_pylist()]
            return [(f"{path}, row {i + 1}: ", r) for i, r in enumerate(rows)]
        with open(path, encoding="utf-8") as f:
            if str(path).endswith(".json"):
                rows = json.load(f)
                rows = rows.get("rows", [rows]) if isinstance(rows, dict) else rows
                if not isinstance(rows, list):
                    raise DataError(f"{path}: holds {rows!r:.60}; expected a list of rows")
                return [(f"{path}, record {i + 1}: ", r) for i, r in enumerate(rows)]
            out = []
            for n, line in enumerate(f, 1):
                if line.strip():
                    try:
                        out.append((f"{path}, line {n}: ", json.loads(line)))
                    except json.JSONDecodeError as e:
                        raise DataError(f"{path}, line {n}: not JSON ({e.msg} at column {e.colno}); expected one object per line") from None
            return out
    except json.JSONDecodeError as e:
        raise DataError(f"{path}: not JSON ({e.msg} at line {e.lineno})") from None
    except DataError:
        raise
    except (OSError, ValueError, NotImplementedError) as e:                    # not there, not text, not parquet
        raise DataError(f"cannot read {path}: {e}") from None


def need(row, key, kind, where):
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}field {key!r} is {'missing' if value is None else f'{value!r:.60}'}; expected {expected}")
    return value


def numbers(value, n, where, name):
    if not (isinstance(value, (list, tuple)) and len(value) == n and all(isinstance(v, (int, float)) and -1e9 < v < 1e9 for v in value)):
        raise DataError(f"{where}{name} is {value!r:.60}; expected {n} numbers")
    return [float(v) for v in value]


def parse_row(row, where, root):
    """One row of the normalised JSONL -> Sample."""
    answer_type = need(row, "answer_type", str, where)
    if answer_type not in FORMAT:
        raise DataError(f"{where}answer_type is {answer_type!r}; expected one of {', '.join(FORMAT)}")
    paths = need(row, "images", list, where)
    if not paths or not all(isinstance(p, (str, bytes)) for p in paths):
        raise DataError(f"{where}field 'images' is {paths!r:.60}; expected a list of file names")
    optional = {key: need(row, key, kind, where) if row.get(key) is not None else kind()
                for key, kind in (("options", list), ("targets", list), ("category", list), ("meta", dict))}
    files = [p if isinstance(p, bytes) else os.path.join(root, p) for p in paths]
    s = Sample(where if row.get("id") is None else str(row["id"]), files, need(row, "question", str, where), answer_type,
               answer=row.get("answer"), **optional)
    if isinstance(s.answer, str) and answer_type == "text":
        s.answer = [s.answer]
    accepted = s.answer if answer_type == "text" and s.answer is not None else []
    for name, value in (("options", s.options), ("category", s.category), ("answer", accepted)):
        if not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise DataError(f"{where}field {name!r} is {value!r:.60}; expected a list of strings")
    known = s.answer is None or type(s.answer) is int and s.answer in range(len(s.options))
    if answer_type == "choice" and (len(s.options) < 2 or not known):
        raise DataError(f"{where}answer is {s.answer!r:.60} with {len(s.options)} options; expected an index into at least two options")
    if answer_type in ("point", "box") and not s.targets:
        raise DataError(f"{where}field 'targets' is empty; a {answer_type} question needs at least one target box")
    for t in s.targets + (need(s.meta, "question_boxes", list, where) if "question_boxes" in s.meta else []):
        index = t.get("image", 0) if isinstance(t, dict) else None
        if type(index) is not int or index not in range(len(paths)):
            expected = f"{{'image': 0..{len(paths) - 1}, 'box': [x1, y1, x2, y2]}}"
            raise DataError(f"{where}box {t!r:.60} names no image of this row; expected {expected}")
        w, h = open_image(s.images[index], where, size_only=True) if {"norm_box", "norm_polygon"} & set(t) else (1, 1)
        if "norm_box" in t:                                                    # 0-1 of the image: needs its size
            t["box"] = [v * k for v, k in zip(numbers(t.pop("norm_box"), 4, where, "norm_box"), (w, h, w, h))]
        key = "norm_polygon" if "norm_polygon" in t else "polygon"
        if key in t:
            corners = [numbers(corner, 2, where, "corner") for corner in need(t, key, list, where)]
            t.pop(key)
            t["polygon"] = [[x * w, y * h] for x, y in corners]
            t["box"] = [f(axis) for f in (min, max) for axis in zip(*t["polygon"])]
        t["image"], t["box"] = index, numbers(t.get("box"), 4, where, "box")
    return s


def read_jsonl(path, images=None):
    """The normalised JSONL, or ViGoRL's rows (problem, answer, images; or image, conversations), or UniVG-R1's RL rows
    (question, answer, images) -> list[Sample]. Image paths are relative to `images`, by default the file's own folder. Raises DataError."""
    root = images or os.path.dirname(os.path.abspath(path))
    samples = []
    for where, row in rows_of(path):
        if isinstance(row, dict) and "answer_type" not in row:
            if "problem" in row or "conversations" in row:
                row = from_vigorl(row, where)
            elif "answer" in row and "images" in row:
                row = from_univg(row, where)
        samples.append(parse_row(row, where, root))
        for p in samples[-1].images:
            if not os.path.exists(p):
                raise DataError(f"{where}image {p} does not exist (paths are relative to {root}; --images DIR names another folder)")
    if not samples:
        raise DataError(f"{path} holds no rows")
    return samples


def check_writable(path):
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise DataError(f"cannot write {path}: {folder} is no folder that can be written into")


def write_jsonl(path, samples):
    """Normalised rows, all or none; images that are no files yet (PIL, or the bytes of one) are written beside it."""
    check_writable(path)
    stem, lines = os.path.splitext(os.path.abspath(path))[0], []
    os.makedirs(os.path.dirname(stem), exist_ok=True)
    for n, s in enumerate(samples):
        row, row["images"] = asdict(Sample(**{**vars(s), "images": []})), []
        for i, im in enumerate(s.images):
            if not isinstance(im, str):
                kind = {b"\xff\xd8": "jpg", b"\x89P": "png"}.get(im[:2]) if isinstance(im, bytes) else None
                name = f"{stem}_{n}_{i}.{kind or 'png'}"
                if kind:                                                       # as published: no pixel changes
                    with open(name, "wb") as f:
                        f.write(im)
                else:
                    image(s, i).save(name)
                im = os.path.basename(name)
            row["images"].append(im)
        lines.append(json.dumps(row) + "\n")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(lines)
    os.replace(path + ".tmp", path)


# ----------------------------------------------------------------------------------------------------------------------
# Published layouts. A reader makes (where, row) of what was downloaded, a function makes a normalised row of a row: both, and
# the layout of the coordinates, are named by CONVERTERS below. Numbers never decide how they are read.

def target(row, key, layout, where, image=0):
    """Four numbers in a named layout ("xywh px", "xyxy px", "xyxy 0-1", "xyxy 0-1000") -> a target. They cannot tell which
    layout they are in, but they can contradict one."""
    (a, b, c, d), (order, unit) = numbers(row.get(key), 4, where, key), layout.split()
    low, high = {"px": (1.5, 1e9), "0-1": (-1, 1.5), "0-1000": (1.5, 1500)}[unit]
    if not low < max(a, b, c, d) <= high:
        raise DataError(f"{where}{key} {row[key]} cannot be {layout}; expected another file, or another NAME (python data.py convert --help)")
    box = [a, b, a + c, b + d] if order == "xywh" else [a, b, c, d]
    return {"image": image, **({"box": box} if unit == "px" else {"norm_box": [v / (1000 if unit == "0-1000" else 1) for v in box]})}


def option_index(answer, options, where):
    """The place of the gold among the options: by its text, else by its letter, "B" or "(B)"."""
    index = next((i for i, o in enumerate(options) if o.lower() == answer.strip().lower()), None)
    letter = re.fullmatch(r"\(?([A-Z])\)?", answer.strip().upper())
    if index is None and letter:
        index = ord(letter[1]) - 65
    if index is None or index >= len(options):
        raise DataError(f"{where}answer {answer!r:.60} is none of the options {options}")
    return index


def either(row, *keys):
    """The first of these names that the row uses: copies of one benchmark differ in them."""
    return next((key for key in keys if row.get(key) is not None), keys[0])


def published_rows(path, root):
    """A file; or a folder: every .json, .jsonl and .parquet file in it."""
    files = [os.path.join(folder, f) for folder, _, names in sorted(os.walk(path)) for f in sorted(names)
             if f.endswith((".json", ".jsonl", ".parquet")) and not f.startswith(".")]
    if os.path.isdir(path) and not files:
        raise DataError(f"{path} holds no .json, .jsonl or .parquet file")
    for file in files or [path]:
        yield from rows_of(file)


def from_vigorl(row, where, layout="xyxy px"):
    """ViGoRL's RL rows (problem, answer, images) and evaluation rows (image, conversations): option text or letter,
    "(x1, y1, x2, y2)", or a web action."""
    if "conversations" in row:
        said = need(row, "conversations", list, where)
        if len(said) != 2:
            raise DataError(f"{where}field 'conversations' has {len(said)} entries; expected a question and its answer")
        problem, answer = (need(turn, "value", str, where) for turn in said)
        row = {**row, "problem": problem, "answer": answer, "images": [row.get("image")]}
    text, answer = need(row, "problem", str, where).replace("<image>", "").strip(), need(row, "answer", str, where)
    out = {"id": row.get("id"), "images": need(row, either(row, "images", "image_paths"), list, where)}
    head, *tail = re.split(r"\n(?:Answer Choices:\n)?(?=\(?A[.)] )", text, maxsplit=1)
    box = re.fullmatch(r"\(\s*(-?\d+),\s*(-?\d+),\s*(-?\d+),\s*(-?\d+)\s*\)", answer.strip())
    if tail:
        options = [o.strip() for o in re.findall(r"^\(?[A-Z][.)] (.*)$", tail[0], re.M)]
        return {**out, "question": re.sub(r"^Question: ", "", head), "answer_type": "choice", "options": options,
                "answer": option_index(answer, options, where)}
    if box:
        return {**out, "question": re.sub(r"^Description: ", "", text), "answer_type": "point",
                "targets": [target({"answer": [int(v) for v in box.groups()]}, "answer", layout, where)]}
    web = text.startswith("OBJECTIVE:")
    return {**out, "question": text, "answer_type": "text", "answer": [answer], "meta": {"matcher": "web_action"} if web else {}}


def vstar_rows(path, root):
    """test_questions.jsonl; or the two folders that are evaluated (of four), where a .json stands beside each .jpg."""
    folders = [path, os.path.join(path, "direct_attributes"), os.path.join(path, "relative_position")]
    files = [file for folder in folders for file in sorted(glob.glob(os.path.join(glob.escape(folder), "*.json")))]
    for file in files if os.path.isdir(path) else [path]:
        image = os.path.splitext(os.path.abspath(file))[0] + ".jpg"
        beside = {"image": os.path.relpath(image, root), "category": os.path.basename(os.path.dirname(image))}
        for where, row in rows_of(file):
            yield where, {**beside, **row} if isinstance(row, dict) else row


def from_vstar(row, where, layout):
    """test_questions.jsonl has shuffled, lettered options; in the per-image files the gold is always the first."""
    out = {"id": row.get("question_id"), "images": [row["image"]], "category": [row.get("category")]}
    if "text" in row:
        asked = from_vigorl({"problem": row["text"], "answer": need(row, "label", str, where), "images": []}, where)
        if asked["answer_type"] != "choice":
            raise DataError(f"{where}text is {row['text']!r:.60}; expected a question with options (A), (B), ...")
        return {**asked, **out}
    boxes = [target({"bbox": box}, "bbox", layout, where) for box in need(row, "bbox", list, where)]
    return {**out, "question": need(row, "question", str, where), "answer_type": "choice", "options": need(row, "options", list, where),
            "answer": 0, "meta": {"evidence": boxes}}


def from_blink(row, where, layout):
    """idx "val_Counting_7", prompt, choices, image_1 to image_4, answer "(B)" (of the test split: hidden)."""
    text = re.sub(r"<img [^>]*>", "", need(row, either(row, "prompt", "query"), str, where))
    head, _, tail = text.partition("\nSelect from the following choices")
    options = [str(o) for o in need(row, "choices", list, where)] if "choices" in row else re.findall(r"^\([A-Z]\) (.*\S)", tail, re.M)
    answer = None if row.get("answer") in (None, "", "hidden") else option_index(need(row, "answer", str, where), options, where)
    images = row.get("images") or [row[f"image_{i}"] for i in (1, 2, 3, 4) if row.get(f"image_{i}")]
    split, _, task = str(row.get("idx", "")).rpartition("_")[0].partition("_")
    return {"id": row.get("idx"), "images": images, "question": head.strip(), "answer_type": "choice", "options": options, "answer": answer,
            "category": [c for c in (task, split) if c]}


def from_sat(row, where, layout):
    """The gold is always the first answer. Each copy has its own name for the images, and one for the answers."""
    clean = lambda option: str(option).replace(" in the first frame", "").strip()
    options = [clean(o) for o in need(row, either(row, "answers", "answer_choices"), list, where)]
    question, kind = need(row, "question", str, where), need(row, "question_type", str, where)
    if kind == "ego_movement":                                                 # the question takes it for known
        question = "The first image shows the start of a video, the second its end. " + question
    answer = option_index(clean(need(row, "correct_answer", str, where)), options, where)
    return {"images": row.get(either(row, "images", "image_bytes", "img_paths")), "question": question, "answer_type": "choice",
            "options": options, "answer": answer, "category": [kind]}


def from_robospatial(row, where, layout):
    """Yes or no; or a free place, given by its corners (x, y) on 0-1, in no order: taken around their middle."""
    answer, kind = need(row, "answer", str, where), need(row, "category", str, where)
    question = re.split(r"\s+(?:Answer yes or no|Your answer should be formatted)", need(row, "question", str, where))[0]
    out = {"images": [row.get("img")], "question": question, "category": [kind]}
    if kind != "context":
        return {**out, "answer_type": "choice", "options": ["yes", "no"], "answer": option_index(answer, ["yes", "no"], where)}
    corners = np.array(re.findall(r"\(\s*(-?\d*\.?\d+)\s*,\s*(-?\d*\.?\d+)\s*\)", answer), float).reshape(-1, 2)
    if len(corners) == 0 or not (abs(corners - 0.5) <= 1).all():
        raise DataError(f"{where}answer is {answer!r:.60}; expected corners (x, y) on 0-1")
    around = np.arctan2(*(corners - corners.mean(0)).T[::-1])
    meta = {"published_wrong": "fewer than three corners"} if len(corners) < 3 else {}
    return {**out, "answer_type": "point", "targets": [{"image": 0, "norm_polygon": corners[around.argsort()].tolist()}], "meta": meta}


def from_one_box(row, where, layout, answer_type="box"):
    """One image, question and box: LISA- and LLMSeg-Grounding (of nested boxes the first four numbers count), RefCOCO, VLM-R1."""
    key = either(row, "bbox", "boxes", "solution")
    box = row.get(key)
    if isinstance(box, list) and all(isinstance(part, list) for part in box):
        box = sum(box, [])[:4]
    return {"id": row.get("id"), "images": [row.get(either(row, "image", "img_filename", "image_path"))],
            "question": need(row, either(row, "instruction", "sent", "problem", "question"), str, where), "answer_type": answer_type,
            "targets": [target({key: box}, key, layout, where)], "category": [row["split"]] if row.get("split") else []}


def from_screenspot(row, where, layout="xywh px"):
    """ScreenSpot, -v2 and -Pro, whose rows also say the image's size: one of its boxes begins at y = -1 and is clamped."""
    out = from_one_box(row, where, layout, "point")
    if layout == "xyxy px":
        w, h = numbers(row.get("img_size"), 2, where, "img_size")
        out["targets"][0]["box"] = [min(max(v, 0), side) for v, side in zip(out["targets"][0]["box"], (w, h, w, h))]
        return {**out, "category": [row.get("group"), row.get("application"), row.get("ui_type")]}
    platform = need(row, either(row, "img_filename", "file_name"), str, where).split("_")[0].replace("pc", "desktop")
    return {**out, "category": [platform, str(row.get("data_type"))]}


ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]


def named_image(text, n):
    """The image, 0-based, that a question about n images asks about: the last "k-th image" in the text, or None."""
    found = re.findall(r"(\d+)(?:st|nd|rd|th)? image\b|image[ -](\d+)|(" + "|".join(ORDINALS) + r") image\b", text.lower())
    index = [int(a or b) - 1 if a or b else ORDINALS.index(c) for a, b, c in found]
    return next((i for i in reversed(index) if 0 <= i < n), None)


def from_univg(row, where, layout="xyxy 0-1000"):
    """UniVG-R1's RL rows and MIG-Bench. Which image the box is in follows from the task (MIG-Bench), or from the words. Boxes that
    a question quotes are on 0-1000 in all these files; they lie in the image that was named last, mostly the first."""
    question, paths = need(row, "question", str, where).replace("<image>", "").strip(), need(row, "images", list, where)
    task = row.get("task")
    implied = {"region": 0, "correspondence": 1, "diff": 1, "view_diff": 1, "refer_grounding": 1}
    image = implied.get(str(task), named_image(str(row.get("additional_info")) if task == "group_grounding" else question, len(paths)))
    place = target(row, "answer", layout, where, len(paths) - 1 if image is None else image)
    x1, y1, x2, y2 = place["norm_box"]
    meta = {"image_unnamed": True} if image is None and len(paths) > 1 else {} # the last one: a guess, and marked as one
    meta |= {} if x1 < x2 and y1 < y2 else {"published_wrong": "its box is inverted"}
    quoted = [{"image": named_image(question[:box.start()], len(paths)) or 0, "norm_box": [int(v) / 1000 for v in box.groups()]}
              for box in QUESTION_BOX.finditer(question)]
    meta |= {"question_boxes": quoted} if quoted else {}
    return {"id": row.get("id"), "images": paths, "question": question, "answer_type": "box", "category": [task] if task else [],
            "targets": [place], "meta": meta}


def mgrounding_rows(path, root):
    """MGrounding-630k, which UniVG-R1 was trained on: of a conversation, every question whose reply is a box. The reply names the image."""
    for where, row in published_rows(path, root):
        said = [need(turn, "value", str, where) for turn in need(row, "conversations", list, where)]
        boxes = [re.search(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)", reply) for reply in said[1::2]]
        if not any(boxes):
            raise DataError(f"{where}no reply of the conversation holds a box (x1,y1),(x2,y2)")
        for k, (asked, reply, box) in enumerate(zip(said[::2], said[1::2], boxes)):
            if box:
                yield where, {"id": f"{row.get('id')}_{k}", "images": row.get("images"), "question": asked, "task": "group_grounding",
                              "answer": [int(v) for v in box.groups()], "additional_info": reply}


def revos_rows(path, root):
    """`frames` are places in the sorted list of the video's files: made into ReasonVOS's list of paths."""
    for where, row in published_rows(path, root):
        video, frames = need(row, "video_id", str, where), need(row, "frames", list, where)
        folder = os.path.join(root, video)
        files = [f for f in os.listdir(folder) if re.search(r"\d", f) and not f.startswith(".")] if os.path.isdir(folder) else []
        files.sort(key=lambda f: (int(re.search(r"\d+", f)[0]), f))
        paths = [os.path.join(video, files[i] if i in range(len(files)) else f"(frame {i})") for i in frames]
        yield where, {**row, "image_list": paths}


def from_video(row, where, layout):
    """ReVOS and ReasonVOS: the box of the third frame, as a list or as a string of numbers."""
    paths, boxes = need(row, "image_list", list, where), need(row, "bbox_list", list, where)
    if min(len(paths), len(boxes)) < 3:
        raise DataError(f"{where}{len(paths)} frames and {len(boxes)} boxes; expected three or more: the question is about the third")
    box = [float(v) for v in re.findall(r"-?\d+(?:\.\d+)?", boxes[2])] if isinstance(boxes[2], str) else boxes[2]
    question = "The images are frames of one video, in order. Locate in the third image: " + need(row, "question", str, where)
    return {"images": paths, "question": question, "answer_type": "box",
            "targets": [target({"bbox_list": box}, "bbox_list", layout, where, 2)]}


class PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers. A pickle that asks for anything else asks to run code."""
    def find_class(self, module, name):
        raise DataError(f"it asks for {module}.{name}; expected nothing but lists, dicts, strings and numbers")


def refcoco_rows(path, root):
    """refs(...).p with instances.json beside it -> a row per sentence. The file names in the pickle exist nowhere."""
    try:
        with open(path, "rb") as f:
            refs = PlainUnpickler(f, encoding="latin1").load()
    except Exception as e:                                                     # a broken pickle may raise anything
        raise DataError(f"cannot read {path}: {e}") from None
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), "instances.json")
    (where, instances), *_ = rows_of(beside) or [(f"{beside}: ", None)]
    images, boxes = ({need(r, "id", int, where): r for r in need(instances, key, list, where)} for key in ("images", "annotations"))
    for i, ref in enumerate(need({"refs": refs}, "refs", list, f"{path}: ")):
        where = f"{path}, ref {i + 1}: "
        image, box = images.get(need(ref, "image_id", int, where)), boxes.get(need(ref, "ann_id", int, where))
        if not image or not box:
            raise DataError(f"{where}{beside} lacks its {'box' if image else 'image'}; expected the one published with this file")
        for sentence in need(ref, "sentences", list, where):
            yield where, {"id": f"{ref.get('ref_id')}_{need(sentence, 'sent_id', int, where)}", "sent": sentence.get("sent"),
                          "bbox": box.get("bbox"), "image": image.get("file_name"), "split": ref.get("split")}


def refcoco_parquet_rows(path, root):
    """lmms-lab's copy: a row is an object with all its sentences. Without image bytes, the COCO name is in its file name."""
    for where, row in published_rows(path, root):
        name = re.sub(r"_\d+\.jpg$", ".jpg", need(row, "file_name", str, where))
        for i, sent in enumerate(need(row, "answer", list, where)):
            yield where, {"id": f"{row.get('question_id')}_{i}", "sent": sent, "bbox": row.get("bbox"), "image": row.get("image") or name}


SCREENSPOT = {"mobile": 502, "desktop": 334, "web": 436}
MIG = {"region": 1203, "common_object": 816, "object_tracking": 550, "diff": 528, "group_grounding": 499, "multi_view": 288,
       "correspondence": 117, "reasoning": 101, "refer_grounding": 99, "view_diff": 94}
BLINK = {"Art_Style": 117, "Counting": 120, "Forensic_Detection": 132, "Functional_Correspondence": 130, "IQ_Test": 150, "Jigsaw": 150,
         "Multi-view_Reasoning": 133, "Object_Localization": 122, "Relative_Depth": 124, "Relative_Reflectance": 134,
         "Semantic_Correspondence": 139, "Spatial_Relation": 143, "Visual_Correspondence": 172, "Visual_Similarity": 135}
# name: (reader, function, layout of the file's coordinates, rows published: by category, or the possible totals under "")
CONVERTERS = {
    "vstar": (vstar_rows, from_vstar, "xywh px", {"direct_attributes": 115, "relative_position": 76}),
    "blink": (published_rows, from_blink, "", BLINK),                          # of the val split: --only val
    "sat": (published_rows, from_sat, "", {"": (150, 4000, 4001)}),            # real test; synthetic val
    "robospatial": (published_rows, from_robospatial, "xy 0-1", {"compatibility": 105, "configuration": 123, "context": 122}),
    "screenspot": (published_rows, from_screenspot, "xywh px", SCREENSPOT),
    "screenspot_parquet": (published_rows, from_screenspot, "xyxy 0-1", SCREENSPOT),
    "screenspot_v2": (published_rows, from_screenspot, "xywh px", {"": (1272,)}),
    "screenspot_pro": (published_rows, from_screenspot, "xyxy px",
                       {"Dev": 299, "Creative": 341, "CAD": 261, "Scientific": 254, "Office": 230, "OS": 196}),
    "vigorl": (published_rows, from_vigorl, "xyxy px", {}),
    "univg-r1": (published_rows, from_univg, "xyxy 0-1000", {}),
    "mgrounding": (mgrounding_rows, from_univg, "xyxy 0-1000", {}),
    "mig_bench": (published_rows, from_univg, "xyxy 0-1", MIG),
    "mig_bench_revised": (published_rows, from_univg, "xyxy 0-1000", {**MIG, "common_object": 815, "group_grounding": 485, "reasoning": 97}),
    "lisa": (published_rows, from_one_box, "xyxy px", {"": (200, 779)}),
    "llmseg": (published_rows, from_one_box, "xyxy px", {}),
    "revos": (revos_rows, from_video, "xyxy px", {}),
    "reasonvos": (published_rows, from_video, "xyxy px", {"": (458,)}),
    "refcoco": (refcoco_rows, from_one_box, "xywh px",                         # RefCOCO, RefCOCO+ or RefCOCOg
                {"val": (10834, 10758, 4896), "testA": (5657, 5726, 0), "testB": (5095, 4889, 0), "test": (0, 9602)}),
    "refcoco_parquet": (refcoco_parquet_rows, from_one_box, "xywh px", {}),
    "vlm-r1": (published_rows, from_one_box, "xyxy px", {}),
}


def convert(name, path, images=None, skip_missing=False, only=""):
    """A published file -> (samples, rows counted by category, the missing image of each row that was skipped)."""
    reader, function, layout, _ = CONVERTERS[name]
    root = os.path.abspath(images or (path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))))
    samples, counts, taken, missing = [], collections.Counter(), set(), []
    for n, (where, row) in enumerate(reader(path, root)):
        if not isinstance(row, dict):
            raise DataError(f"{where}{row!r:.60}; expected an object with fields")
        row = function(row, where, layout)
        row["category"] = [str(name) for name in row.get("category", [])]
        if only and only not in row["category"]:
            continue
        counts.update(["", *row["category"]])
        row["images"] = [im.get("bytes") or im.get("path") if isinstance(im, dict) else im for im in need(row, "images", list, where)]
        absent = [im for im in row["images"] if isinstance(im, str) and not os.path.isfile(os.path.join(root, im))]
        if absent and not skip_missing:
            raise DataError(f"{where}image {absent[0]} is not in {root} (--images DIR names another folder, --skip-missing skips such rows)")
        if absent:
            missing.append(absent[0])
            continue
        if row.get("id") is None or str(row["id"]) in taken:                   # predictions are matched by id
            row["id"] = f"{name}/{n}"
        row["meta"] = {**row.get("meta", {}), "benchmark": name}
        samples.append(parse_row(row, where, root))
        taken.add(samples[-1].id)
    if not samples:
        of, has = f" of category {only!r}" if only else "", f" with its images in {root}" if missing else ""
        raise DataError(f"{path} holds no rows{of}{has}; expected the published file{'' if has else ' of ' + name}")
    return samples, counts, missing


def gold_text(s):
    """The gold answer, as a model that answers in pixels of the stored image would say it."""
    if s.answer_type in ("point", "box"):
        t = s.targets[0]
        corners = t["box"][:2], t["box"][2:]
        said = corners if s.answer_type == "box" else [np.mean(t.get("polygon", corners), 0)]
        return f"<answer> {','.join(f'({x:.6f}, {y:.6f})' for x, y in said)} </answer>"
    return f"<answer> {s.options[s.answer] if s.answer_type == 'choice' else s.answer[0]} </answer>"


def impossible(s):
    """Why not even its gold answer would be scored as right, or "". rewards.score is the judge, but this file does not know
    rewards.py: tests/test_benchmarks.py holds the two to each other."""
    if s.answer_type in ("point", "box"):
        x1, y1, x2, y2 = box = s.targets[0]["box"]
        if not (x1 < x2 and y1 < y2 if s.answer_type == "box" else x1 <= x2 and y1 <= y2):
            return f"its box {box} is inverted or empty"
        if s.answer_type == "point" and "polygon" in s.targets[0]:
            xs, ys = np.transpose(s.targets[0]["polygon"])
            return "" if abs(xs @ np.roll(ys, 1) - ys @ np.roll(xs, 1)) > 1e-6 else "its polygon has no area"
        return f"the center of its box {box} is outside the image" if s.answer_type == "point" and min(x1 + x2, y1 + y2) < 0 else ""
    if s.answer in (None, []):
        return "hidden"
    said = gold_text(s)[len("<answer>"):-len("</answer>")]
    return "" if said.strip() and "answer>" not in said else f"its gold {said!r:.60} is empty or holds a tag"


def check(name, samples, counts):
    """Hold what was converted to what was published, and every box to its image. Prints what it finds; a fault is a DataError."""
    print(f"checking {len(samples)} rows and their images ...")
    whole = {category: n if isinstance(n, tuple) else (n,) for category, n in CONVERTERS[name][3].items()}
    if part := [f"{counts[c]} of {' or '.join(map(str, n))} {c or 'rows'}" for c, n in whole.items() if counts[c] not in n]:
        print(f"  not the whole file: {', '.join(part)}")
    faults, sizes, beyond = [], check_images(samples), [0.0]
    wrong = [(s, why) for s in samples if (why := impossible(s)) not in ("", "hidden")]
    hidden = sum(impossible(s) == "hidden" for s in samples)
    for s in samples:
        for t in s.targets + s.meta.get("question_boxes", []):
            (w, h), (x1, y1, x2, y2) = sizes[s.images[t["image"]]], t["box"]
            beyond.append(max(-x1 / w, -y1 / h, x2 / w - 1, y2 / h - 1))
            if beyond[-1] > 0.05:                                              # MIG-Bench's worst is 0.048
                faults.append(f"{s.id}: its box {t['box']} leaves its image, which is {w} x {h} (another layout? another image?)")
        if len({" ".join(o.casefold().split()) for o in s.options}) < len(s.options):
            faults.append(f"{s.id}: two of its options read the same: {s.options}")
    faults += [f"{s.id}: {why}" for s, why in wrong if "published_wrong" not in s.meta]
    print(f"  {len(sizes)} images read; no box leaves its image by more than {max(beyond):.1%} of its side")
    unnamed = sum("image_unnamed" in s.meta for s in samples)
    if unnamed:
        print(f"  {unnamed} rows do not say in which image their box is; the last one is taken")
    if len(samples) > 9 and all(s.answer_type == "choice" and s.answer == 0 for s in samples):
        print("  the gold is always the first option: ask with the options shuffled")
    print(f"  {len(samples) - len(wrong) - hidden} of {len(samples)} gold answers would be scored as right" + f", {hidden} are hidden" * (hidden > 0))
    for s, why in wrong:
        print(f"    not {s.id}: {why}")
    if faults:
        raise DataError(f"{len(faults)} faults, such as {'; '.join(faults[:5])}")


# ----------------------------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description="Draw, show and convert data.")
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("draw", help="draw toy samples as PNG and JSONL")
    p.add_argument("task", choices=TASKS), p.add_argument("n", type=int)
    p.add_argument("--out", default="scenes"), p.add_argument("--seed", type=int, default=0)
    p.add_argument("--split", choices=("train", "test"), default="test"), p.add_argument("--side", type=int, default=SIDE)
    p.add_argument("--difficulty", choices=DIFFICULTY, default="medium")
    p = sub.add_parser("show", help="print a JSONL file's questions")
    p.add_argument("file"), p.add_argument("--images", default=None), p.add_argument("-n", type=int, default=5)
    layouts = "".join(f"\n  {name:20} {layout or 'none'}" for name, (_, _, layout, _) in CONVERTERS.items())
    p = sub.add_parser("convert", help="turn a published file or folder into the normalised JSONL",
                       formatter_class=argparse.RawTextHelpFormatter, epilog="NAME, and the layout of the coordinates in its files:" + layouts)
    p.add_argument("name", choices=CONVERTERS, metavar="NAME"), p.add_argument("path"), p.add_argument("out")
    p.add_argument("--images", default=None, help="folder that image paths start from; else that of PATH")
    p.add_argument("--only", default="", help="one category: a split, a task, a platform")
    p.add_argument("--skip-missing", action="store_true", help="leave out the rows whose images are not there")
    p.add_argument("--check", action="store_true", help="hold rows, images and boxes to what was published; write OUT.gold.jsonl")
    args = parser.parse_args()
    if getattr(args, "n", 1) < 1:
        parser.error(f"n is {args.n}; expected 1 or more")
    if args.command == "draw":
        out = os.path.join(args.out, f"{args.task}.jsonl")
        check_writable(out)                                                    # before the work, not after it
        write_jsonl(out, toy(args.task, args.split, args.n, args.seed, args.difficulty, args.side))
        print(f"{args.n} {args.task} samples in {out}")
    elif args.command == "show":
        samples = read_jsonl(args.file, args.images)
        print("\n\n".join(prompt(samples[0])), "\n")
        for s in samples[:args.n]:
            answer = s.targets or (s.options[s.answer] if s.options and s.answer is not None else s.answer)
            print(f"{s.id} | {s.answer_type} | {s.question} {s.options or ''} -> {answer}")
        print(f"{len(samples)} rows")
    else:
        source, out = os.path.realpath(args.path), os.path.realpath(args.out)
        if os.path.isdir(out) or out == source or out.startswith(os.path.join(source, "")):
            raise DataError(f"{args.out} is a folder, or is part of what is converted; expected another file to write")
        check_writable(args.out)
        samples, counts, missing = convert(args.name, args.path, args.images, args.skip_missing, args.only)
        if args.check:
            check(args.name, samples, counts)
        write_jsonl(args.out, samples)
        print(f"{len(samples)} rows -> {args.out}; coordinates read as {CONVERTERS[args.name][2] or 'none'}"
              + (f"; {len(missing)} rows left out for want of an image, such as {missing[0]}" if missing else ""))
        if args.check:
            gold = os.path.splitext(args.out)[0] + ".gold.jsonl"
            with open(gold, "w", encoding="utf-8") as f:
                f.writelines(json.dumps({"id": s.id, "text": gold_text(s)}) + "\n" for s in samples if not impossible(s))
            print(f"to see the gold answers scored: python evaluate.py --data {args.out} --predictions {gold}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
