"""What is asked: samples, a toy world that draws its own, readers of published files, and the prompts.

A `Sample` is a question about one or more images with an answer that a rule can check. It comes from one of
  - the toy world below: four tasks drawn from a seed, so that everything in this repository runs without a download;
  - a JSONL file in the one normalised layout that the whole repository reads (`read_jsonl`);
  - a published file, turned into that layout by `python data.py convert NAME IN OUT`.

    python data.py draw search 4 --out scenes      # PNGs, the crops that answer them, and scenes/search.jsonl
    python data.py show scenes/search.jsonl        # the rows as text, with the whole prompt of the first
    python data.py convert screenspot web.json out.jsonl --images DIR

Boxes and points here are always pixels of the stored image, (x1, y1, x2, y2). What the model reads and writes is
another frame (it sees a resized image); `model.View` is the only place that maps between the two.
"""
import argparse, hashlib, json, os, random, re, sys, zlib
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
    """One question. `images` are paths or PIL images in prompt order; `answer` is an index into `options` (choice),
    a list of accepted strings (text), or None when `targets` hold the answer (point, box) or it is hidden."""
    id: str
    images: list
    question: str                                   # no image token, no option list, no format sentence
    answer_type: str                                # "point" | "box" | "choice" | "text"
    options: list = field(default_factory=list)     # in the order in which the model reads them
    answer: object = None
    targets: list = field(default_factory=list)     # [{"image": 0, "box": [x1, y1, x2, y2]}], pixels of the stored image
    category: list = field(default_factory=list)
    meta: dict = field(default_factory=dict)


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
SIDE = 448                                                                     # pixels of a source image in the tiny world
TASKS = ("search", "point", "relation", "boxes")


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


RECIPES = {"search": "vigorl-zoom", "point": "vigorl", "relation": "vigorl", "boxes": "univg-r1"}      # how a toy task is rewarded
ASK = {"search": ask_search, "point": ask_point, "relation": ask_relation, "boxes": ask_boxes}


def split_scene(rng, split, **look):
    """`make_scene` until one belongs to the split, by a hash of what it shows: one in five to test."""
    while True:
        scene = make_scene(rng, **look)
        shows = sorted((o["name"], o["center"]) for o in scene["objects"])
        if (zlib.crc32(repr(shows).encode()) % 5 == 0) == (split == "test"):
            return scene


def toy(task, split, n, seed=0, difficulty="medium", side=SIDE):
    """n samples of a toy task. `split` is "train" or "test", which can never share a scene, whatever the seeds."""
    if task not in ASK:
        raise DataError(f"unknown toy task {task!r}: expected one of {', '.join(TASKS)}")
    if difficulty not in DIFFICULTY:
        raise DataError(f"unknown difficulty {difficulty!r}: expected one of {', '.join(DIFFICULTY)}")
    rng = random.Random(f"{task}/{split}/{seed}")
    new_scene = lambda names=None: split_scene(rng, split, **DIFFICULTY[difficulty], side=side, names=names)
    samples = []
    for i in range(n):
        scenes, asked = ASK[task](rng, new_scene)
        meta = {"scenes": scenes, **asked.pop("meta", {})}
        samples.append(Sample(f"{task}/{split}/{seed}/{i}", [draw(s) for s in scenes], category=[task], meta=meta, **asked))
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
TOOL_OPEN, TOOL_CLOSE = '<tool_call>\n{"name": "search_coordinate", "arguments": {"coordinate": [', "]}}\n</tool_call>"
OBSERVE = ("<observation>\nHere is the crop of the image centered on the coordinate:\n", "\n</observation>")   # around the crop
REFUSE = "<observation>\n{error}\n</observation>"
FORCE = "<think> I have looked enough and answer now. </think>\n<answer>"        # opens the turn after the last allowed zoom


# Strings that never vary; the tiny model's tokenizer gives each one token (model.make_tiny).
PHRASES = [*SYSTEM.values(), *FORMAT.values(), TOOL_OPEN, TOOL_CLOSE, *OBSERVE, FORCE, "<think>", " </think>\n", "<answer>", " </answer>",
           "system\n", "user\n", "assistant\n", "\nAnswer Choices:\n", "What is the pattern of the"]


def prompt(sample, style="zoom"):
    """-> (system text, user text that follows the images). style: a key of SYSTEM."""
    text = sample.question
    if sample.options:
        text += "\nAnswer Choices:\n" + "\n".join(f"{chr(65 + i)}. {o}" for i, o in enumerate(sample.options))
    return SYSTEM[style], text + "\n" + FORMAT[sample.answer_type]


def tool_call(x, y):
    return f"{TOOL_OPEN}{x}, {y}{TOOL_CLOSE}"


# ----------------------------------------------------------------------------------------------------------------------
# Files: one normalised JSONL, and the layouts that turn into it

def open_image(path, where="", check=False):
    """A path -> RGB PIL image, or a DataError that names the file (and the row that wants it)."""
    try:
        with Image.open(path) as im:
            if check:                                                          # a JPEG at an eighth of its size: reads it all, costs little
                im.draft("L", (im.width // 8, im.height // 8))
            im.load()                                                          # decode now: a truncated file fails here, not mid-run
            if check:
                return None
            if im.mode in ("RGBA", "LA", "P"):                                 # transparent pixels are white, as on a screen
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            return im.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{where}image {path} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise DataError(f"{where}image {path} cannot be read ({e}); expected a whole PNG or JPEG file") from None


def image(sample, i):
    """Source image i of a sample as RGB PIL."""
    return sample.images[i] if isinstance(sample.images[i], Image.Image) else open_image(sample.images[i], f"sample {sample.id}: ")


def check_images(samples):
    """Every image once, before any work: a broken one in the last row must not end a run in the middle."""
    tasks = {path: f"sample {s.id}: " for s in samples for path in s.images if not isinstance(path, Image.Image)}
    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(lambda task: open_image(*task, check=True), tasks.items()), "images", len(tasks), disable=None, leave=False):
            pass


def rows_of(path):
    """(where, row) for each row of a .jsonl or .json file; `where` names file and line for error messages."""
    try:
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
    except (OSError, UnicodeDecodeError) as e:
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
    if not paths or not all(isinstance(p, str) for p in paths):
        raise DataError(f"{where}field 'images' is {paths!r:.60}; expected a list of file names")
    optional = {key: need(row, key, kind, where) if row.get(key) is not None else kind()
                for key, kind in (("options", list), ("targets", list), ("category", list), ("meta", dict))}
    s = Sample(str(row.get("id", where)), [os.path.join(root, p) for p in paths], need(row, "question", str, where), answer_type,
               answer=row.get("answer"), **optional)
    if isinstance(s.answer, str) and answer_type == "text":
        s.answer = [s.answer]
    accepted = s.answer if answer_type == "text" and s.answer is not None else []
    for name, value in (("options", s.options), ("category", s.category), ("answer", accepted)):
        if not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise DataError(f"{where}field {name!r} is {value!r:.60}; expected a list of strings")
    if answer_type == "choice" and (len(s.options) < 2 or not (s.answer is None or type(s.answer) is int and s.answer in range(len(s.options)))):
        raise DataError(f"{where}answer is {s.answer!r:.60} with {len(s.options)} options; expected an index into at least two options")
    if answer_type in ("point", "box") and not s.targets:
        raise DataError(f"{where}field 'targets' is empty; a {answer_type} question needs at least one target box")
    for t in s.targets:
        index = t.get("image", 0) if isinstance(t, dict) else None
        if index not in range(len(paths)):
            raise DataError(f"{where}target {t!r:.60} names no image of this row; expected {{'image': 0..{len(paths) - 1}, 'box': [x1, y1, x2, y2]}}")
        if "norm_box" in t:                                                    # 0-1 of the image: needs its size
            w, h = open_image(s.images[index], where).size
            t["box"] = [v * k for v, k in zip(numbers(t.pop("norm_box"), 4, where, "norm_box"), (w, h, w, h))]
        t["image"], t["box"] = index, numbers(t.get("box"), 4, where, "target box")
    return s


def read_jsonl(path, images=None):
    """The normalised JSONL, or ViGoRL's RL rows (problem, answer, images), or UniVG-R1's (question, answer, images)
    -> list[Sample]. Image paths are relative to `images`, by default the file's own folder. Raises DataError."""
    root = images or os.path.dirname(os.path.abspath(path))
    samples = []
    for where, row in rows_of(path):
        if isinstance(row, dict) and "answer_type" not in row:
            if "problem" in row:
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


def write_jsonl(path, samples):
    """Normalised rows; PIL images are written as PNG beside the file."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        for s in samples:
            row, row["images"] = asdict(Sample(**{**vars(s), "images": []})), []
            for i, im in enumerate(s.images):
                if isinstance(im, Image.Image):
                    name = f"{s.id.replace('/', '_')}_{i}.png"
                    im.save(os.path.join(folder, name))
                    im = name
                row["images"].append(im)
            f.write(json.dumps(row) + "\n")
    os.replace(path + ".tmp", path)


def from_vigorl(row, where):
    """ViGoRL RL rows: option text or letter, "(x1, y1, x2, y2)" in pixels, or a web action."""
    text, answer = need(row, "problem", str, where).replace("<image>", "").strip(), need(row, "answer", str, where)
    out = {"id": str(row.get("id", where)), "images": need(row, "images", list, where)}
    head, *tail = re.split(r"\n(?:Answer Choices:\n)?(?=\(?A[.)] )", text, maxsplit=1)
    box = re.fullmatch(r"\(\s*(-?\d+),\s*(-?\d+),\s*(-?\d+),\s*(-?\d+)\s*\)", answer.strip())
    if tail:
        options = [o.strip() for o in re.findall(r"^\(?[A-Z][.)] (.*)$", tail[0], re.M)]
        index = next((i for i, o in enumerate(options) if o.lower() == answer.strip().lower()), None)
        if index is None and re.fullmatch(r"[A-Z]", answer.strip().upper()):
            index = ord(answer.strip().upper()) - 65
        if index is None or index >= len(options):
            raise DataError(f"{where}answer {answer!r} is none of the options {options}")
        return {**out, "question": re.sub(r"^Question: ", "", head), "answer_type": "choice", "options": options, "answer": index}
    if box:
        return {**out, "question": re.sub(r"^Description: ", "", text), "answer_type": "point",
                "targets": [{"image": 0, "box": [float(v) for v in box.groups()]}]}
    web = text.startswith("OBJECTIVE:")
    return {**out, "question": text, "answer_type": "text", "answer": [answer], "meta": {"matcher": "web_action"} if web else {}}


ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]


def named_image(question, n):
    """The image that a multi-image question asks about, 0-based: the last "k-th image" it names, else the last image."""
    found = re.findall(r"(\d+)(?:st|nd|rd|th)? image|image[ -](\d+)|(" + "|".join(ORDINALS) + ") image", question.lower())
    index = [int(a or b) - 1 if a or b else ORDINALS.index(c) for a, b, c in found]
    return next((i for i in reversed(index) if 0 <= i < n), n - 1)


def from_univg(row, where, scale=1000.0):
    """UniVG-R1 RL rows: a box on 0-1000 of the image that the question names."""
    question, paths = need(row, "question", str, where).replace("<image>", "").strip(), need(row, "images", list, where)
    box = [v / scale for v in numbers(row.get("answer"), 4, where, "answer")]
    return {"id": str(row.get("id", where)), "images": paths, "question": question, "answer_type": "box",
            "category": [row["task"]] if "task" in row else [], "targets": [{"image": named_image(question, len(paths)), "norm_box": box}]}


def from_mig(row, where, scale=1.0):
    """MIG-Bench: a box on 0-1 (the original file; UniVG-R1's revised one: 0-1000) of an image that the task implies."""
    out = from_univg(row, where, scale)
    if scale == 1.0 and max(out["targets"][0]["norm_box"]) > 1.5:
        raise DataError(f"{where}answer {row['answer']} is not on 0-1; is this the revised file? Its name here is mig_bench_revised")
    fixed = {"region": 0, "correspondence": 1, "diff": 1, "view_diff": 1, "refer_grounding": 1}
    text = str(row.get("additional_info")) if row.get("task") == "group_grounding" else out["question"]
    out["targets"][0]["image"] = fixed.get(str(row.get("task")), named_image(text, len(out["images"])))
    return out


def from_screenspot(row, where):
    """ScreenSpot and ScreenSpot-v2 json: boxes are (x, y, width, height) in pixels."""
    name = need(row, "img_filename", str, where)
    x, y, w, h = numbers(row.get("bbox"), 4, where, "bbox")
    return {"id": f"{name}/{row.get('instruction')}", "images": [name], "question": need(row, "instruction", str, where),
            "answer_type": "point", "targets": [{"image": 0, "box": [x, y, x + w, y + h]}],
            "category": [name.split("_")[0], str(row.get("data_type"))]}


CONVERTERS = {"vigorl": from_vigorl, "univg-r1": from_univg, "screenspot": from_screenspot, "mig_bench": from_mig,
              "mig_bench_revised": lambda row, where: from_mig(row, where, 1000.0)}


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
    p = sub.add_parser("convert", help="turn a published file into the normalised JSONL")
    p.add_argument("name", choices=CONVERTERS), p.add_argument("file"), p.add_argument("out"), p.add_argument("--images", default=None)
    args = parser.parse_args()
    if args.command == "draw":
        samples = toy(args.task, args.split, args.n, args.seed, args.difficulty, args.side)
        write_jsonl(os.path.join(args.out, f"{args.task}.jsonl"), samples)
        print(f"{len(samples)} {args.task} samples in {args.out}/{args.task}.jsonl")
    elif args.command == "show":
        samples = read_jsonl(args.file, args.images)
        print("\n\n".join(prompt(samples[0])), "\n")
        for s in samples[:args.n]:
            answer = s.targets or (s.options[s.answer] if s.options and s.answer is not None else s.answer)
            print(f"{s.id} | {s.answer_type} | {s.question} {s.options or ''} -> {answer}")
        print(f"{len(samples)} rows")
    else:
        root = args.images or os.path.dirname(os.path.abspath(args.file))
        samples = [parse_row(CONVERTERS[args.name](row, where), where, os.path.abspath(root)) for where, row in rows_of(args.file)]
        write_jsonl(args.out, samples)
        print(f"{len(samples)} rows -> {args.out}")


if __name__ == "__main__":
    try:
        main()
    except DataError as e:
        sys.exit(f"error: {e}")
