"""What the tiny model is taught before any warm start: chats about pictures, and drills.

Pointing alone hardly teaches a small model to see, because the name that it must write stands in
the question. A mixture in which the image is needed to predict the text does. So a *lesson* is a
chat about one scene or several: list what is there, name what is at a point, point, box, compare,
find the image that shows a thing, tell what a crop shows. A *drill* is an episode in the form that
a task asks for; where it zooms, its question says where to, by numbers or by a name.

The questions of the tasks are never asked here. The warm start and RL must find where to zoom for
a question, when, and when to answer. All scenes are of the train split.
"""
import functools
import math
import random
from dataclasses import dataclass

import data
import model
import train_sft
import zoom_rollout
from zoom_rollout import Episode

# What comes when: steps of pretraining, and shares.
CROWDED = 800                   # 0.2 + step / CROWDED is the share of scenes beyond the first look
SEVERAL_FROM = 1600             # step at which the lessons about several images reach their share
SEVERAL_IMAGES = 0.4            # this share of the lessons; it rises from 0
DRILLS_FROM = 3200              # step from which on there are drills
DRILLS = 0.15                   # their share of the episodes
LATE = DRILLS_FROM              # a step at which all of this has come

# The second stage of pretraining: this share of the episodes are drills.
SECOND_DRILLS = 0.4
NAMED = 0.2                     # share of their zooms that are asked for by name, not by numbers

# The third stage, in which a zoom is never asked for by name.
THIRD_DRILLS = 0.5              # share of the episodes that are drills
MENTIONED = 0.5                 # share of their zooms whose question names a thing to no purpose

# How the scenes of a lesson look. "first" has few and large objects.
LOOKS = {"first": dict(objects=(1, 2), radius=(46, 60)), **data.DIFFICULTY}


def draw_episode(vlm, rng, step):
    """-> Episode of this step, a lesson or a drill; the loss is on the assistant's tokens."""
    if step >= DRILLS_FROM and rng.random() < DRILLS:
        return zoom_drill(vlm, rng, named=0.0)
    return lesson(vlm, rng, step, FIRST)


def draw_second(vlm, rng, step):
    """-> Episode of the second stage: more drills, and in the forms of all protocols."""
    if rng.random() >= SECOND_DRILLS:
        return lesson(vlm, rng, LATE, SECOND)
    make = pick(rng, [(zoom_drill, 4), (think_drill, 3), (box_drill, 3)])
    return make(vlm, rng, NAMED) if make is zoom_drill else make(vlm, rng)


def draw_third(vlm, rng, step):
    """-> Episode of the third stage: half of them drills, also with options to choose from."""
    if rng.random() >= THIRD_DRILLS:
        return lesson(vlm, rng, LATE, THIRD)
    make = pick(rng, [(zoom_drill, 4), (choice_drill, 4), (box_drill, 3)])
    return make(vlm, rng, 0.0, MENTIONED) if make is zoom_drill else make(vlm, rng)


# --------------------------------------------------------------------------------------------------
# a lesson

@dataclass
class Picture:
    """A scene, and the model's view of it."""
    scene: dict
    view: model.View

    @property
    def objects(self):
        return self.scene["objects"]

    def left_to_right(self):
        return sorted(self.objects, key=lambda o: o["center"][0])

    def named(self, name):
        """The object of this name, or None."""
        return next((o for o in self.objects if o["name"] == name), None)


def lesson(vlm, rng, step, mixture):
    """-> Episode of one or two questions and their answers, which are what is learned."""
    episode = start_chat(vlm)
    draw = functools.partial(new_scene, rng, step, mixture)
    if rng.random() < SEVERAL_IMAGES * min(1, step / SEVERAL_FROM):
        ask = pick(rng, mixture.about_several)
        exchange(vlm, episode, *ask(vlm, rng, draw))
        return episode
    picture = show(vlm, draw())
    ask = pick(rng, mixture.about_one)
    if ask is read_crop:
        if rng.random() < 0.3:                  # a crop after the whole picture, as in a rollout
            exchange(vlm, episode, *point_to(rng, picture))
        exchange(vlm, episode, *read_crop(vlm, rng, picture))
    else:
        exchange(vlm, episode, *ask(rng, picture))
    return episode


def pick(rng, weighted):
    values, weights = zip(*weighted)
    return rng.choices(values, weights=weights)[0]


def new_scene(rng, step, mixture, names=None):
    """A scene of the train split: at first with few and large objects, later with more."""
    level = "first"
    if rng.random() <= 0.2 + step / CROWDED:
        level = pick(rng, mixture.levels)
    return data.split_scene(rng, "train", **LOOKS[level], names=names)


def show(vlm, scene, index=0):
    return Picture(scene, vlm.view(data.draw_scene(scene), index))


def start_chat(vlm):
    """-> Episode that holds a system message and nothing else yet."""
    episode = Episode(None)
    episode.append_given(vlm.chat("system", data.SYSTEM["boxes"]))      # it asks for no form
    return episode


def exchange(vlm, episode, question, answer):
    """Append a user message, a list of texts and views, and the assistant's answer to it."""
    views = [part for part in question if isinstance(part, model.View)]
    message = vlm.chat("user", *question) + vlm.chat("assistant", open=True)
    episode.append_given(message, views)
    episode.append_sampled(vlm.ids(answer) + [vlm.im_end])
    episode.append_given(vlm.ids("\n"))


def place(picture, o):
    """An object's name and center, as the model writes points."""
    x, y = picture.view.from_source(*o["center"])
    return f"{o['name']} ({x}, {y})"


def box(picture, o):
    """An object's name and box."""
    return f"{o['name']} {train_sft.box_text(data.object_box(o), picture.view)}"


# --------------------------------------------------------------------------------------------------
# lessons about one image: (rng, picture) -> (question, answer)

def list_objects(rng, picture):
    places = [place(picture, o) for o in picture.left_to_right()]
    return [picture.view, "List the objects."], ", ".join(places)


def point_to(rng, picture):
    o = rng.choice(picture.objects)
    return [picture.view, f"Point to the {o['name']}."], place(picture, o)


def name_at(rng, picture):
    """The question names a point somewhere in the object."""
    o = rng.choice(picture.objects)
    spot = [c + round(rng.uniform(-0.5, 0.5) * o["radius"]) for c in o["center"]]
    x, y = picture.view.from_source(*spot)
    return [picture.view, f"What is at ({x}, {y})?"], o["name"]


def list_alike(rng, picture):
    """All objects of one color, or of one shape, and their number."""
    if rng.random() < 0.8:
        word = rng.choice(rng.choice(picture.objects)["name"].split())
    else:                                       # perhaps there is none
        word = rng.choice([*data.COLORS, *data.SHAPES])
    alike = [o for o in picture.left_to_right() if word in o["name"]]
    places = [place(picture, o) for o in alike] or ["nothing"]
    return [picture.view, f"What is {word}?"], f"{', '.join(places)}: {len(alike)}"


def box_object(rng, picture):
    o = rng.choice(picture.objects)
    return [picture.view, f"Box the {o['name']}."], box(picture, o)


def compare(rng, picture):
    """Which of two objects is further to one side? Both are located first."""
    if len(picture.objects) < 2:
        return name_at(rng, picture)
    a, b = rng.sample(picture.objects, 2)
    axis = rng.randrange(2)
    if abs(a["center"][axis] - b["center"][axis]) < 0.05 * picture.scene["side"]:
        axis = 1 - axis                         # no question that a pixel decides
    sign = rng.choice((-1, 1))
    side = {(0, -1): "left", (0, 1): "right", (1, -1): "up", (1, 1): "down"}[axis, sign]
    further = max(a, b, key=lambda o: sign * o["center"][axis])
    question = f"Which is further {side}, the {a['name']} or the {b['name']}?"
    places = f"{place(picture, a)}, {place(picture, b)}"
    return [picture.view, question], f"{places}: {further['name']}"


def side_of(rng, picture):
    """On which side of one object is another? Both are located first."""
    if len(picture.objects) < 2:
        return name_at(rng, picture)
    a, b = rng.sample(picture.objects, 2)
    dx, dy = [p - q for p, q in zip(a["center"], b["center"])]
    if abs(dx) > abs(dy):
        kinds, side = "left or right", "left" if dx < 0 else "right"
    else:
        kinds, side = "above or below", "above" if dy < 0 else "below"
    question = f"Is the {a['name']} {kinds} of the {b['name']}?"
    return [picture.view, question], f"{place(picture, a)}, {place(picture, b)}: {side}"


def read_crop(vlm, rng, picture):
    """What is in the middle of a crop? Shown in the words of an observation."""
    before, after = data.OBSERVE
    crop, seen = show_crop(vlm, rng, picture.view, picture.objects)
    return [before, crop, after], seen


def show_crop(vlm, rng, view, objects):
    """A crop as a rollout makes it, mostly of an object and off center -> (crop, what is there).

    What is in the middle counts; a piece of another object may stand at the edge.
    """
    width, height = view.source.size
    x = rng.randrange(width)
    y = rng.randrange(height)
    if rng.random() < 0.15 and is_empty(x, y, objects):
        return zoom_rollout.crop(vlm, view, x, y), "nothing"
    o = rng.choice(objects)
    x, y = [c + round(rng.uniform(-0.7, 0.7) * o["radius"]) for c in o["center"]]
    return zoom_rollout.crop(vlm, view, x, y), f"{o['name']}, {o['pattern']}"


def is_empty(x, y, objects):
    """Is the source pixel (x, y) far from all objects?"""
    return all(math.dist((x, y), o["center"]) > 1.8 * o["radius"] for o in objects)


# --------------------------------------------------------------------------------------------------
# lessons about several images: (vlm, rng, draw) -> (question, answer)

def box_what_is_shown(vlm, rng, draw):
    """Image 1 shows one object alone: box it in the image whose number is given."""
    pictures, name, found = several_pictures(vlm, rng, draw)
    views = [p.view for p in pictures]
    picture = pictures[found]
    question = f"Box in image {found + 1} what image 1 shows."
    return [*views, question], box(picture, picture.named(name))


def which_other_image(vlm, rng, draw):
    """Image 1 shows one object alone: which other image has it, and where?"""
    pictures, name, found = several_pictures(vlm, rng, draw)
    views = [p.view for p in pictures]
    picture = pictures[found]
    answer = f"image {found + 1}: {box(picture, picture.named(name))}"
    return [*views, "Which other image has what image 1 shows?"], answer


def box_in_one_image(vlm, rng, draw):
    """Two or three images, perhaps frames in which the same things move: box in one of them."""
    if rng.random() < 0.5:
        frames, _ = data.ask_video(rng, draw)
        rng.shuffle(frames)
        scenes = frames[:rng.randint(2, 3)]
    else:
        scenes = [draw() for _ in range(rng.randint(2, 3))]
    pictures = [show(vlm, scene, i) for i, scene in enumerate(scenes)]
    i = rng.randrange(len(pictures))
    o = rng.choice(pictures[i].objects)
    views = [p.view for p in pictures]
    return [*views, f"Box the {o['name']} in image {i + 1}."], box(pictures[i], o)


def several_pictures(vlm, rng, draw):
    """-> (pictures, the name of the first one's only object, the index of the other that has it)"""
    scenes, asked = data.ask_boxes(rng, draw)
    pictures = [show(vlm, scene, i) for i, scene in enumerate(scenes)]
    return pictures, scenes[0]["objects"][0]["name"], asked["targets"][0]["image"]


def name_then_image(vlm, rng, draw):
    """As `which_other_image`; the thing is named before its image."""
    pictures, name, found = several_pictures(vlm, rng, draw)
    views = [p.view for p in pictures]
    picture = pictures[found]
    corners = train_sft.box_text(data.object_box(picture.named(name)), picture.view)
    question = "What does image 1 show, and where else is it?"
    return [*views, question], f"{name}: image {found + 1}: {corners}"


@dataclass(frozen=True)
class Mixture:
    """The kinds of lessons, and of their scenes; each with how frequent it is."""
    about_one: tuple
    about_several: tuple
    levels: tuple


FIRST = Mixture(
    about_one=((list_objects, 6), (point_to, 6), (name_at, 2), (list_alike, 3), (box_object, 4),
               (compare, 2), (read_crop, 3)),
    about_several=((box_what_is_shown, 3), (which_other_image, 3), (box_in_one_image, 3)),
    levels=(("first", 2), ("easy", 3), ("medium", 5), ("hard", 3)))
SECOND = Mixture(
    about_one=((list_objects, 4), (point_to, 7), (name_at, 1), (list_alike, 5), (box_object, 6),
               (side_of, 4), (read_crop, 2)),
    about_several=((box_what_is_shown, 3), (name_then_image, 4), (box_in_one_image, 3)),
    levels=(("easy", 2), ("medium", 5), ("hard", 4)))
THIRD = Mixture(
    about_one=((list_objects, 3), (point_to, 7), (name_at, 1), (list_alike, 7), (box_object, 6),
               (side_of, 4), (read_crop, 2)),
    about_several=((box_what_is_shown, 2), (name_then_image, 7), (box_in_one_image, 3)),
    levels=SECOND.levels)
KINDS_ABOUT_SEVERAL = {
    ask for mixture in (FIRST, SECOND, THIRD) for ask, _ in mixture.about_several}


# --------------------------------------------------------------------------------------------------
# drills: the forms of the three protocols
#
# An instruction-tuned model brings this along: it can write a tool call, read what comes back, pick
# an option when it must answer, and answer in the tags that a prompt asks for.

def zoom_drill(vlm, rng, named, mentioned=0.0):
    """-> Episode in the zoom protocol whose question says where to zoom.

    named: share of the places that are given by the name of a thing, in place of its coordinates;
    mentioned: share of the questions that name a thing without asking to look at it.
    """
    level = rng.choice(("easy", "medium", "medium", "hard"))
    scene = data.split_scene(rng, "train", **data.DIFFICULTY[level])
    image = data.draw_scene(scene)
    view = vlm.view(image)
    chosen = rng.sample(scene["objects"], rng.randint(1, 2))
    forced = rng.random() < 0.2
    options = rng.sample(list(data.PATTERNS), len(data.PATTERNS))
    spots = [train_sft.near(o, view, rng) for o in chosen]
    places = []
    for o, spot in zip(chosen, spots):
        # The first stage names none. No random number is drawn there, so its episodes stay as they
        # were when the shipped model was made.
        by_name = named and rng.random() < named
        places.append(f"the {o['name']}" if by_name else str(spot))
    question = f"Zoom into {', then '.join(places)}."
    if mentioned and rng.random() < mentioned:
        question = f"There is a {rng.choice(scene['objects'])['name']}. {question}"
    sample = data.Sample("", [image], question, "choice", options)

    if forced and rng.random() < 0.5:           # no zoom allowed: any option
        answer = f"{data.FORCE} {rng.choice(options)} </answer>"
        return zoom_rollout.replay(vlm, sample, [answer])
    turns = []
    seen = ""                                   # what the crop before showed
    for o, (x, y) in zip(chosen, spots):
        thought = f"<think>{seen} The {o['name']} may be at ({x}, {y}). </think>"
        turns.append(f"{thought}\n{data.tool_call(x, y)}")
        seen = f" This is the {o['name']}, {o['pattern']}."
    opening = data.FORCE                        # the answer is about the last crop
    if not forced:
        opening = f"<think>{seen[:-1]}, at ({x}, {y}). </think>\n<answer>"
    turns.append(f"{opening} {o['pattern']} </answer>")
    max_zooms = len(chosen) if forced else 3
    return zoom_rollout.replay(vlm, sample, turns, max_zooms=max_zooms)


def think_drill(vlm, rng):
    """-> Episode that names points step by step, then answers: a comparison or a list."""
    picture = show(vlm, data.split_scene(rng, "train", **data.DIFFICULTY["hard"]))
    ask = rng.choice((side_of, list_alike))
    (_, question), answer = ask(rng, picture)
    names, thoughts = locate(rng, picture, answer)
    if ask is side_of:
        said = answer.rpartition(": ")[2]
        options = rng.sample(kind_of_option(said), 2)
        sample = data.Sample("", [picture.view.source], question, "choice", options)
    else:
        said = ", ".join(names) or "nothing"
        sample = data.Sample("", [picture.view.source], question, "text")
    turn = f"<think> {thoughts} </think>\n<answer> {said} </answer>"
    return zoom_rollout.replay(vlm, sample, [turn], style="think")


def locate(rng, picture, answer):
    """The objects that an answer names, in its order -> (their names, thoughts with points)"""
    named = [o for o in picture.objects if o["name"] in answer]
    named.sort(key=lambda o: answer.index(o["name"]))
    steps = []
    for o in named:
        x, y = train_sft.near(o, picture.view, rng)
        steps.append(f"The {o['name']} is at ({x}, {y}).")
    return [o["name"] for o in named], " ".join(steps)


def choice_drill(vlm, rng):
    """-> Episode that names points step by step, then chooses one of the options.

    Some of the options have nothing to do with the question; then any of them is chosen.
    """
    picture = show(vlm, data.split_scene(rng, "train", **data.DIFFICULTY["hard"]))
    ask = rng.choice((side_of, compare, name_at, list_alike))
    (_, question), answer = ask(rng, picture)
    _, thoughts = locate(rng, picture, answer)
    said = answer.rpartition(": ")[2]
    if rng.random() < 0.4:
        said = rng.choice(rng.choice(OPTIONS))
    turn = f"<think> {thoughts} </think>\n<answer> {said} </answer>"
    options = options_with(rng, said)
    sample = data.Sample("", [picture.view.source], question, "choice", options)
    return zoom_rollout.replay(vlm, sample, [turn], style="think")


# Kinds of options.
OPTIONS = (("left", "right"), ("above", "below"), tuple("0123456"),
           [f"{color} {shape}" for color in data.COLORS for shape in data.SHAPES])


def kind_of_option(said):
    return next(kind for kind in OPTIONS if said in kind)


def options_with(rng, said):
    """Options of the kind of an answer, among them the answer, in random order."""
    kind = kind_of_option(said)
    size = min(len(kind), rng.choice((2, 3, 4)))
    others = rng.sample([option for option in kind if option != said], size - 1)
    return rng.sample([said, *others], size)


def box_drill(vlm, rng):
    """-> Episode that names a thing, then answers with its box, and with its image if asked."""
    ask = rng.choice((box_what_is_shown, which_other_image, box_in_one_image))
    draw = functools.partial(new_scene, rng, LATE, SECOND)
    (*views, question), answer = ask(vlm, rng, draw)
    image, _, place = answer.rpartition(": ")               # "image 2", or nothing
    name, _, corners = place.partition(" (")
    corners = f"({corners}"
    where = f"{image}: " if image else ""
    turn = f"<think> {name} </think>\n<answer> {where}{corners} </answer>"
    meta = {"name_image": True} if image else {}
    images = [view.source for view in views]
    sample = data.Sample("", images, question, "box", meta=meta)
    return zoom_rollout.replay(vlm, sample, [turn], style="boxes")


# Words of traces and questions that few lessons or none contain; the tokenizer should know them.
TRACE_WORDS = (" The may be at. Look at. This is nothing, not the. Click the Image 1 shows. "
               "How many things are there seen from above below left right. "
               "It lined barred slanted checked")


def tokenizer_corpus(stub, seed=0):
    """Texts to learn a tokenizer from: 2000 lessons, words of the traces, and prompts.

    stub: a model whose tokenizer knows single bytes.
    """
    rng = random.Random(seed)
    texts = []
    for _ in range(2000):
        ids = lesson(stub, rng, LATE, FIRST).ids
        texts.append(stub.text([token for token in ids if token != stub.image_token]))
    texts += [TRACE_WORDS] * 200
    for task in data.TASKS:
        for sample in data.toy(task, "train", 30):
            _, question = data.prompt(sample, "zoom")
            texts.append(question)
    return texts
