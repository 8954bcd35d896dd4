"""What is asked: samples, a toy world that draws its own, the prompts, and JSONL in and out.

A `Sample` is a question about one or more images, with an answer that a rule can check. Its source:
  - the toy world below: seven tasks drawn from a seed, so that nothing has to be downloaded;
  - a JSONL file in the one layout that the whole repository reads (`read_jsonl`);
  - a published file, converted to that layout (appendix/benchmarks.py knows twenty of them).

    python data.py draw search 4 --out scenes      # PNG images and scenes/search.jsonl
    python data.py show scenes/search.jsonl        # the rows as text, and the prompt of the first
    python data.py convert screenspot web.json out.jsonl --images DIR --check

Boxes and points are always pixels of the stored image: (x, y), (x1, y1, x2, y2). The model sees a
resized image and uses coordinates of its own; only `model.View` maps between the two.

Shapes:  side: width and height of a toy image in pixels   r: radius of an object in pixels
"""
import functools
import json
import os
import random
import re
import sys
import zlib
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from PIL import Image

from appendix import faults, files, motion, rows
from appendix.files import DataError, check_writable, read_rows


@dataclass
class Sample:
    """One question.

    images: paths, PIL images or the bytes of image files, in prompt order.
    answer: an index into `options` (choice); a list of accepted strings (text); None when `targets`
        hold the answer (point, box), or when the answer is hidden.
    targets: [{"image": 0, "box": [x1, y1, x2, y2]}]; "image" counts from 0. A target may also have
        a "polygon", its corners in order, if only a part of the box is right.
    meta: whatever else is known. "evidence": boxes that show the answer; "question_boxes": boxes
        that the question quotes; "name_image": the answer must name the image of its box.
    """
    id: str
    images: list
    question: str               # without image tokens, options and format sentence
    answer_type: str            # "point", "box", "choice" or "text"
    options: list = field(default_factory=list)     # in the order in which the model reads them
    answer: object = None
    targets: list = field(default_factory=list)
    category: list = field(default_factory=list)    # names under which results are counted
    meta: dict = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------
# the toy world: scenes and pictures
#
# An object has a color, a shape and a fine pattern. The pattern repeats every 4 pixels, and a model
# reads the image shrunk by 4 or more: there every pattern averages to the same flat color. So the
# overview shows what is where, and only a crop of the stored image shows the pattern.
# (tests/test_data.py measures this: it swaps a pattern and compares pixels.)
#
# The ground turns red towards the right and green towards the bottom. Rotary attention knows only
# relative positions; the color of the ground tells a small model where in the image a patch is.

COLORS = {
    "red": (235, 40, 40), "green": (40, 165, 70), "blue": (50, 90, 225),
    "yellow": (250, 225, 40), "purple": (150, 60, 185), "white": (235, 235, 235),
}
# Each shape: half its width, half its height (both in radii), and its gauge. (u, v) is the offset
# from the center in radii. The gauge is 0 near the center, 1 on the outline, more outside.
SHAPES = {
    "circle": (1, 1, lambda u, v: np.hypot(u, v)),
    "square": (0.85, 0.85, lambda u, v: np.maximum(abs(u), abs(v)) / 0.85),
    "triangle": (1, 0.9, lambda u, v: np.maximum(v, 1.8 * abs(u) - v) / 0.9),
}
PATTERNS = {    # 0 (dark) or 1 (bright) at pixel (x, y)
    "lined": lambda x, y: y // 2 % 2,
    "barred": lambda x, y: x // 2 % 2,
    "slanted": lambda x, y: (x + y) // 2 % 2,
    "checked": lambda x, y: (x // 2 + y // 2) % 2,
}
NAMES = [f"{name} {shape}" for name in COLORS for shape in SHAPES]
SIDE = 448                      # default width and height of a toy image in pixels
# objects: the fewest and the most. radius: the smallest and the largest, in pixels at side SIDE.
# alike: may two objects have the same color?
DIFFICULTY = {
    "easy": dict(objects=(2, 2), radius=(44, 56), alike=False),
    "medium": dict(objects=(3, 4), radius=(38, 52), alike=False),
    "hard": dict(objects=(5, 6), radius=(30, 44), alike=True),
}
DIFFICULTIES = (*DIFFICULTY, "mixed")               # mixed: every question draws one of the three


def make_scene(rng, objects, radius, alike=True, side=SIDE, names=None):
    """A random scene: {"side", "objects": [{name, pattern, center, radius}]}, plain JSON.

    The arguments are those of DIFFICULTY; names: the objects to place, instead of random ones.
    """
    names = names or random_names(rng, rng.randint(*objects), alike)
    placed = []
    while len(placed) < len(names):
        r = rng.randint(*radius) * side // SIDE
        x = rng.randint(r + 4, side - r - 4)
        y = rng.randint(r + 4, side - r - 4)
        if all(apart((x, y), r, o) for o in placed):
            pattern = rng.choice(list(PATTERNS))
            placed.append(dict(name=names[len(placed)], pattern=pattern, center=[x, y], radius=r))
        elif rng.random() < 0.01:                   # perhaps no room is left: start over
            placed = []
    return {"side": side, "objects": placed}


def random_names(rng, n, alike):
    """n different objects; no two of the same color unless `alike`."""
    if alike:
        return rng.sample(NAMES, n)
    return [f"{color} {rng.choice(list(SHAPES))}" for color in rng.sample(list(COLORS), n)]


def apart(center, r, o):
    """Is a circle clear of the object `o`, with a tenth of their radii between them?"""
    dx = center[0] - o["center"][0]
    dy = center[1] - o["center"][1]
    return dx ** 2 + dy ** 2 > (1.1 * (r + o["radius"])) ** 2


def object_box(o):
    half_width, half_height, _ = SHAPES[o["name"].split()[1]]
    x, y = o["center"]
    r = o["radius"]
    return [x - half_width * r, y - half_height * r, x + half_width * r, y + half_height * r]


def draw_scene(scene):
    """Scene -> RGB PIL image, side x side pixels."""
    canvas = ground(scene["side"]).copy()                                   # (side, side, 3)
    for o in scene["objects"]:
        cx, cy = o["center"]
        r = o["radius"]
        color, shape = o["name"].split()
        window = np.s_[cy - r:cy + r + 1, cx - r:cx + r + 1]
        y, x = np.mgrid[window]                                             # (2r+1, 2r+1) each
        gauge = SHAPES[shape][2]((x - cx) / r, (y - cy) / r)[..., None]     # (2r+1, 2r+1, 1)
        stripe = PATTERNS[o["pattern"]](x, y)[..., None] - 0.5              # -0.5 or 0.5
        # A pattern cut off at the outline would not average to a flat color there, and so would
        # show in the shrunk image. So it fades out first: fade is 1 inside, 0 from gauge 0.88 on.
        fade = (4 * (0.88 - gauge)).clip(0, 1)
        brightness = 0.68 + 0.64 * stripe * fade                            # 0.36 to 1
        paint = brightness * np.array(COLORS[color])                        # (2r+1, 2r+1, 3)
        paint = np.where(gauge > 0.88, 0, paint)                            # a black outline
        canvas[window] = np.where(gauge > 1, canvas[window], paint).astype(np.uint8)
    return Image.fromarray(canvas)


def image_of(scene):
    """The drawn scene; one of a side above SIDE, for a larger model, is drawn only when needed."""
    side = scene["side"]
    if side <= SIDE:
        return draw_scene(scene)
    return files.LazyImage((side, side), functools.partial(draw_scene, scene))


@functools.lru_cache(maxsize=4)
def ground(side):
    """The empty picture: uint8 (side, side, 3)."""
    ramp = np.linspace(15, 240, side, dtype=np.float32)
    red = np.broadcast_to(ramp, (side, side))
    green = np.broadcast_to(ramp[:, None], (side, side))
    blue = np.full_like(red, 110)
    return np.stack([red, green, blue], -1).astype(np.uint8)


# --------------------------------------------------------------------------------------------------
# the toy world: questions
#
# ask_*(rng, new_scene) -> (scenes, the fields of the Sample that ask about them).
# new_scene() draws a scene of the wanted split and difficulty; new_scene(names=[...]), one of these
# objects. Except in boxes and find, the question is about the first object of a scene.

def target(o, image=0):
    return {"image": image, "box": object_box(o)}


def ask_search(rng, new_scene):
    """Visual search: the answer is a detail that the overview does not show."""
    scene = new_scene()
    o = scene["objects"][0]
    options = rng.sample(list(PATTERNS), len(PATTERNS))
    return [scene], dict(
        question=f"What is the pattern of the {o['name']}?", answer_type="choice", options=options,
        answer=options.index(o["pattern"]), meta={"evidence": [target(o)]})


def ask_point(rng, new_scene):
    """Web grounding: click the named object."""
    scene = new_scene()
    o = scene["objects"][0]
    question = f"Click the {o['name']}."
    return [scene], dict(question=question, answer_type="point", targets=[target(o)])


def ask_relation(rng, new_scene):
    """Spatial reasoning: where is one object, seen from another?"""
    while True:
        scene = new_scene()
        a, b = scene["objects"][:2]
        axis = rng.randrange(2)
        gap = a["center"][axis] - b["center"][axis]
        if abs(gap) > 0.12 * scene["side"]:         # no question that a pixel decides
            break
    words = [("left", "right"), ("above", "below")][axis]       # y grows downwards
    options = rng.sample(words, 2)
    return [scene], dict(
        question=f"Where is the {a['name']}, seen from the {b['name']}?", answer_type="choice",
        options=options, answer=options.index(words[gap > 0]),
        meta={"evidence": [target(a), target(b)]})


def ask_boxes(rng, new_scene):
    """Several images: the first shows one object. Find it in another, whose number is given."""
    shown = new_scene(names=[rng.choice(NAMES)])
    name = shown["objects"][0]["name"]
    highest = rng.randint(1, 2)                     # two draws: 1 is three times as likely as 2
    image = rng.randint(1, highest)                 # the image that holds the object, from 0
    last = rng.randint(image, 2)                    # the last image, from 0
    scenes = [shown]
    for i in range(1, last + 1):
        while True:
            scene = new_scene()
            names = [o["name"] for o in scene["objects"]]
            if (i == image) == (name in names):     # there, and nowhere else
                break
        scenes.append(scene)
    found = [o for o in scenes[image]["objects"] if o["name"] == name]
    return scenes, dict(
        question=f"Find the object of image 1 in image {image + 1}.", answer_type="box",
        targets=[target(found[0], image)])


def ask_find(rng, new_scene):
    """As `ask_boxes`, but the number is not given: the answer must name the image, too."""
    scenes, asked = ask_boxes(rng, new_scene)
    question = "Find the object of image 1 in another image."
    return scenes, {**asked, "question": question, "meta": {"name_image": True}}


def ask_video(rng, new_scene):
    """Three frames of a video in which everything moves: find an object in one of them."""
    frames = [new_scene()]
    steps = {}
    while len(frames) < 3:
        frame = motion.next_frame(rng, frames[-1], steps)
        if no_collision(frame) and split_of(frame) == split_of(frames[0]):
            frames.append(frame)
        else:                                       # start over
            frames = [new_scene()]
            steps = {}
    image = rng.randrange(3)
    o = frames[image]["objects"][0]
    question = f"These are frames of a video. Find the {o['name']} in image {image + 1}."
    return frames, dict(question=question, answer_type="box", targets=[target(o, image)])


def no_collision(scene):
    for i, a in enumerate(scene["objects"]):
        if not all(apart(a["center"], a["radius"], b) for b in scene["objects"][:i]):
            return False
    return True


def ask_count(rng, new_scene):
    """Counting: the answer is sure after a look at every thing of one color."""
    color = rng.choice(list(COLORS))
    n = rng.randint(1, 3)
    names = [f"{color} {shape}" for shape in rng.sample(list(SHAPES), n)]
    others = [name for name in NAMES if color not in name]
    names += rng.sample(others, rng.choice((4, 5)) - n)     # their sum says nothing about n
    scene = new_scene(names=names)
    options = rng.sample(["1", "2", "3"], 3)
    return [scene], dict(
        question=f"How many {color} things are there?", answer_type="choice", options=options,
        answer=options.index(str(n)), meta={"evidence": [target(o) for o in scene["objects"][:n]]})


# A new task is an ask_* function, a line in ASK and in TASK_RECIPES, and traces to begin with: a
# function in train_sft.ORACLES.
ASK = {"search": ask_search, "point": ask_point, "relation": ask_relation,
       "boxes": ask_boxes, "find": ask_find, "video": ask_video, "count": ask_count}
TASKS = tuple(ASK)
# The default recipe of each task, a key of rewards.RECIPES.
TASK_RECIPES = {"search": "vigorl-zoom", "point": "vigorl", "relation": "vigorl",
                "boxes": "univg-r1", "find": "univg-r1", "video": "univg-r1", "count": "vigorl"}


def split_of(scene):
    """Is a scene "test" (one in five) or "train"? Its objects decide, not the seed."""
    shown = sorted((o["name"], o["center"]) for o in scene["objects"])
    return "test" if zlib.crc32(repr(shown).encode()) % 5 == 0 else "train"


def split_scene(rng, split, **look):
    """A random scene of the split; look: the other arguments of `make_scene`."""
    while True:
        scene = make_scene(rng, **look)
        if split_of(scene) == split:
            return scene


def toy(task, split, n, seed=0, difficulty="medium", side=SIDE):
    """n samples of a toy task; split: "train" or "test", which share no scene under any seed."""
    for what, value, known in (("toy task", task, TASKS), ("split", split, ("train", "test")),
                               ("difficulty", difficulty, DIFFICULTIES)):
        if value not in known:
            raise DataError(f"unknown {what} {value!r}: expected one of {', '.join(known)}")
    if side < 28:
        raise DataError(f"a scene of {side} x {side} pixels has no room for its objects; "
                        "expected sides of 28 or more")
    rng = random.Random(f"{task}/{split}/{seed}")
    level = difficulty
    samples = []
    for i in range(n):
        if difficulty == "mixed":
            level = rng.choice(list(DIFFICULTY))
        new_scene = functools.partial(split_scene, rng, split, side=side, **DIFFICULTY[level])
        scenes, asked = ASK[task](rng, new_scene)
        images = [image_of(scene) for scene in scenes]
        meta = {"scenes": scenes, **asked.pop("meta", {})}
        category = [task, level] if difficulty == "mixed" else [task]
        name = f"{task}/{split}/{seed}/{i}"
        samples.append(Sample(name, images, category=category, meta=meta, **asked))
    return samples


# --------------------------------------------------------------------------------------------------
# the prompt
#
# One builder for warm start, RL and evaluation. The wording is ours. The protocol (tags, name and
# JSON of the tool, observation, points in pixels) is ViGoRL's, so that its checkpoints know it.

SYSTEM = {
    "zoom": (
        "Answer the question about the image by looking. In each turn, reason about ONE place "
        "inside <think> </think>, naming its coordinate (x, y). "
        "Then either zoom into a new place:\n"
        "<tool_call>\n"
        '{"name": "search_coordinate", "arguments": {"coordinate": [x, y]}}\n'
        "</tool_call>\n"
        "or, once you are sure, answer:\n<answer> your answer </answer>\n"
        "Small details show only in the zoomed crop. Never name the same coordinate twice."),
    "think": (
        "Answer the question about the image by looking. Reason step by step inside one pair of "
        "<think> </think> tags and anchor every step to a coordinate (x, y) of the image. "
        "Then answer:\n<answer> your answer </answer>"),
    "boxes": "You are a helpful assistant.",
}
PROMPT_STYLES = {               # by recipe
    "vigorl-zoom": "zoom", "vigorl": "think", "vigorl-ungrounded": "think", "univg-r1": "boxes"}
FORMAT = {
    "point": "Answer with the point (x, y).",
    "box": (
        "First output the thinking process in <think> </think> tags and then output the bounding "
        "box in <answer> </answer> tags as (x1, y1),(x2, y2)."),
    "choice": "Answer with the text of the option.",
    "text": "Answer briefly.",
}
NAME_IMAGE = " Before the box, name its image, as in image 1: (x1, y1),(x2, y2)."
TOOL_OPEN = '<tool_call>\n{"name": "search_coordinate", "arguments": {"coordinate": ['
TOOL_CLOSE = "]}}\n</tool_call>"
OBSERVE = (                     # before and after the crop
    "<observation>\nHere is the crop of the image centered on the coordinate:\n",
    "\n</observation>",
)
REFUSE = "<observation>\n{error}\n</observation>"
# FORCE opens the turn that follows the last allowed zoom.
FORCE = "<think> I have looked enough and answer now. </think>\n<answer>"

# Strings that never vary: the tokenizer of the tiny model has one token for each.
PHRASES = [
    *SYSTEM.values(), *FORMAT.values(), TOOL_OPEN, TOOL_CLOSE, *OBSERVE, FORCE, "<think>",
    " </think>\n", "<answer>", " </answer>", "system\n", "user\n", "assistant\n",
    "\nAnswer Choices:\n", "What is the pattern of the",
]
# A box as UniVG-R1's questions quote it: <|box_start|>(x1,y1),(x2,y2)<|box_end|>
QUESTION_BOX = re.compile(r"<\|box_start\|>\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)<\|box_end\|>")


def question(sample, frames=None):
    """The question, with the boxes that it quotes (meta "question_boxes") as this model reads them.

    frames: of each image (sx, sy, ...), the scale from the model's coordinates to source pixels:
    the model's (x, y) is the source pixel (x * sx, y * sy). None: write source pixels.
    """
    text = sample.question
    quotes = list(zip(QUESTION_BOX.finditer(text), sample.meta.get("question_boxes", [])))
    for quote, place in reversed(quotes):           # from the end: the others keep their places
        sx, sy = frames[place["image"]][:2] if frames else (1, 1)
        x1, y1, x2, y2 = place["box"]
        written = f"({round(x1 / sx)}, {round(y1 / sy)}),({round(x2 / sx)}, {round(y2 / sy)})"
        text = text[:quote.start()] + written + text[quote.end():]
    return text


def prompt(sample, style="zoom", frames=None):
    """-> (system text, user text after the images). style: a key of SYSTEM; frames: as above."""
    text = question(sample, frames)
    if sample.options:
        text += "\nAnswer Choices:"
        for code, option in enumerate(sample.options, ord("A")):
            text += f"\n{chr(code)}. {option}"
    text += "\n" + FORMAT[sample.answer_type]
    if sample.meta.get("name_image"):
        text += NAME_IMAGE
    return SYSTEM[style], text


def tool_call(x, y):
    return f"{TOOL_OPEN}{x}, {y}{TOOL_CLOSE}"


# --------------------------------------------------------------------------------------------------
# JSONL

def parse_row(row, where, root):
    """One row of our JSONL -> Sample. Image paths are relative to `root`. Raises DataError."""
    return Sample(**rows.sample_fields(row, where, root))


def read_jsonl(path, images=None):
    """Our JSONL, or ViGoRL's or UniVG-R1's RL rows -> list[Sample]. Raises DataError.

    images: the folder that image paths are relative to; by default that of the file. A row without
    an id is called FILE:1, FILE:2, ... by its place.
    """
    root = images or os.path.dirname(os.path.abspath(path))
    samples = {}                                    # id: sample
    wrong = []                                      # messages
    for n, (where, row) in enumerate(read_rows(path), 1):
        try:
            sample = read_sample(row, where, root, f"{os.path.basename(path)}:{n}")
            if sample.id in samples:
                raise DataError(f"{where}the id {sample.id!r} is that of an earlier row, too; "
                                "every row needs an id of its own")
            samples[sample.id] = sample
        except DataError as e:
            wrong.append(str(e))
    faults.raise_faults(wrong, f"rows of {path} are wrong")
    if not samples:
        raise DataError(f"{path} holds no rows")
    return list(samples.values())


def read_sample(row, where, root, name):
    """A row of our layout or of the papers' -> Sample. name: its id if it has none."""
    if isinstance(row, dict) and "answer_type" not in row:
        from appendix import benchmarks
        row = benchmarks.from_papers(row, where)
    sample = parse_row(row, where, root)
    for file in sample.images:
        if isinstance(file, str) and not os.path.exists(file):
            raise DataError(f"{where}image {file} does not exist (paths are relative to {root}; "
                            "--images DIR names another folder)")
    return sample if row.get("id") is not None else replace(sample, id=name)


def write_jsonl(path, samples):
    """Write all rows or none. PIL images and bytes are saved as image files beside `path`."""
    check_writable(path)
    stem = os.path.splitext(os.path.abspath(path))[0]
    os.makedirs(os.path.dirname(stem), exist_ok=True)
    lines = []
    for n, sample in enumerate(samples):
        row = asdict(replace(sample, images=[]))
        for i, image in enumerate(sample.images):
            if not isinstance(image, str):
                image = rows.write_image(sample, i, f"{stem}_{n}_{i}")
            row["images"].append(image)
        lines.append(json.dumps(row) + "\n")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(lines)
    os.replace(path + ".tmp", path)


def main():
    """`python data.py draw | show | convert`, see above. Raises DataError."""
    from appendix import data_commands
    data_commands.main()


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
