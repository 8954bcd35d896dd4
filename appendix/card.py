"""One episode as a card of the report: pictures with marks on them, turns, result, tokens.

    make_card(album, episode, max_side) -> Card         templates/card.html turns it into markup

Coordinates. A point that the model wrote is in the model's own convention; times (sx, sy) of the
image's frame it is in pixels of the image as stored (source pixels). So are all marks.

Points. That of a tool call is drawn as a disc with the number of its turn. The points that the
thoughts name are smaller, and numbered in the order of the text.
"""
import math
import re
from dataclasses import dataclass

from markupsafe import Markup
from PIL import Image

import data
import rewards
from appendix import analysis, episode_rows, page

TAG = re.compile(r"(</?(?:think|answer|tool_call)>)")
# What a text may say that is no thought.
ACTIONS = ("<answer>", "<tool_call>", "<observation>")
# Pixels of the longer side of a crop in the page, and tokens of an episode in the page.
CROP_SIDE = 256
MOST_TOKENS = 2000
# A crop of at most so many pixels a side is enlarged as squares, not blurred.
SMALL_CROP = 160


@dataclass
class Mark:
    """Something drawn over a picture, in source pixels: a rectangle, a path, or a point."""
    kind: str                           # "gold", "said", or "t0" to "t5", the color of a turn;
                                        # "named" before the color: a point of a thought
    x: float = 0.0                      # left edge of a rectangle, or center of a point
    y: float = 0.0                      # top edge of a rectangle, or center of a point
    width: float = 0.0                  # of a rectangle
    height: float = 0.0                 # of a rectangle
    path: Markup = Markup("")           # of a path: its SVG data, which are letters and numbers
    label: str = ""                     # of a point: the number written on it
    title: str = ""                     # of a point: what it is, in words
    radius: float = 0.0                 # of a point

    @property
    def font_size(self):
        """Of the label: three characters fit only if they are smaller."""
        return self.radius * (1.37 if len(self.label) < 3 else 1.05)


@dataclass
class NamedPoint:
    """A point that a thought names: where it lies, and where its words stand in the turn's text."""
    turn: int                           # from 1 on
    start: int                          # of its words
    end: int                            # of its words
    x: float                            # source pixels
    y: float                            # source pixels
    label: str = ""                     # number of its mark
    mark: str = ""                      # the mark: "named" and a color, or a color: that of a zoom


@dataclass
class Words:
    """A part of a text."""
    text: str
    kind: str = ""                      # "tag", or the mark of a point in a picture
    label: str = ""                     # of a point: the number on its mark


@dataclass
class MarkedPicture:
    """A prompt image with marks on it."""
    picture: page.Picture
    number: int                         # from 1 on
    marks: list                         # list[Mark], the last one on top


@dataclass
class ShownCrop:
    """What a turn's tool call showed."""
    picture: page.Picture
    small: bool
    corners: str                        # its place in the first image, in words


@dataclass
class ShownTurn:
    number: int                         # from 1 on
    color: str                          # "t0" to "t5"
    names_point: bool
    given: list                         # list[Words] that the environment gave it
    own: list                           # list[Words] that it wrote
    crop: ShownCrop                     # or None
    error: str
    forced: bool


@dataclass
class ShownTokens:
    """The tokens after the prompt, with the probability of those that the policy chose."""
    num_chosen: int
    mean_probability: float             # geometric mean
    tokens: list                        # [(text, probability)]; probability None: given, not chosen


@dataclass
class Card:
    """An episode as templates/card.html shows it."""
    id: str
    verdict: str                        # "right", "wrong", or "" if the gold is hidden
    category: list                      # for the script: the menu of categories
    zooms: int                          # for the script: the menu of zooms
    facts: list                         # of the header, in words
    pictures: list                      # list[MarkedPicture]
    question: str
    options: list                       # [("A. red", is the right one)]
    turns: list                         # list[ShownTurn]
    said: str
    expected: str
    components: dict                    # {name: value} of the reward
    tokens: ShownTokens                 # or None
    advantage: float                    # 0 if there was none


def make_card(album, episode, max_side):
    """An episode -> Card. Its pictures go into the album, at most max_side pixels a side."""
    sample = episode.sample
    points = named_points(episode, album.add(sample.images[0], max_side))
    pictures = []
    for i in range(len(sample.images)):
        pictures.append(marked_picture(album, episode, i, points, max_side))
    turns = []
    for number, turn in enumerate(episode.turns, 1):
        of_turn = [point for point in points if point.turn == number]
        turns.append(shown_turn(album, episode, number, turn, of_turn))
    options = []
    for i, option in enumerate(sample.options):
        options.append((f"{chr(65 + i)}. {option}", i == sample.answer))
    zooms = sum(turn.crop is not None for turn in episode.turns)
    return Card(
        id=sample.id, verdict=episode_rows.verdict(episode), category=sample.category, zooms=zooms,
        facts=facts_of(episode, zooms), pictures=pictures,
        question=data.question(sample, episode.frames), options=options, turns=turns,
        said=answer_in_words(episode), expected=episode_rows.gold_words(sample),
        components=episode.reward_components, tokens=shown_tokens(episode.token_texts),
        advantage=episode.advantage)


def facts_of(episode, zooms):
    """What the header says beside the verdict and the id."""
    facts = [", ".join(map(str, episode.sample.category))]
    facts.append(f"{zooms} zoom" if zooms == 1 else f"{zooms} zooms")
    if episode.ids:
        facts.append(f"{sum(episode.completion_mask)} tokens")
    facts.append(f"ended by: {episode.finish_reason}")
    counts = episode.behaviour or analysis.behaviour(episode)
    for name in analysis.MARKERS:
        if counts.get(name):
            facts.append(f"{name} {counts[name]}")
    if episode.advantage:
        facts.append(f"advantage {episode.advantage:+.2f}")
    return [fact for fact in facts if fact]


# --------------------------------------------------------------------------------------------------
# the answer

def answer_given(episode):
    """What the episode answered -> (image that it is about, words or source pixels or None)."""
    sample = episode.sample
    answer = rewards.parse_answer(episode.text, sample.answer_type)
    image = sample.targets[0]["image"] if sample.targets else 0
    if isinstance(answer, tuple):
        answer = tuple(rewards.to_source(answer, image, episode.frames))
    return image, answer


def answer_in_words(episode):
    _, answer = answer_given(episode)
    if isinstance(answer, tuple):
        return episode_rows.numbers_text(answer)
    return answer or "nothing readable"


# --------------------------------------------------------------------------------------------------
# points that the thoughts name

def named_points(episode, picture):
    """The points (x, y) that the thoughts name, inside the first image -> list[NamedPoint].

    In the order of the text; a place named again has the number that it had, and so has the place
    of a zoom. None if there are several images, because a thought does not say which one it means.
    """
    if len(episode.sample.images) > 1:
        return []
    marks = {}                          # {(x, y): (mark, label)}
    for mark in point_marks(episode, picture, 0.0):
        marks[mark.x, mark.y] = (mark.kind, mark.label)
    points = []
    for number, turn in enumerate(episode.turns, 1):
        new = 0                         # places that this turn is the first to name
        for point in points_of_turn(episode, picture, number, turn):
            if (point.x, point.y) not in marks:
                new += 1
                label = str(new) if len(episode.turns) == 1 else f"{number}.{new}"
                marks[point.x, point.y] = (f"named {color_of(number)}", label)
            point.mark, point.label = marks[point.x, point.y]
            points.append(point)
    return points


def points_of_turn(episode, picture, number, turn):
    """The points inside the first image that a turn names, without those of its answer or call.

    -> list[NamedPoint], not yet labelled. Only the words that the page shows are read.
    """
    sx, sy = episode.frames[0][:2] if episode.frames else (1, 1)
    text = turn.text[:len(given_words(turn)) + page.LONGEST]
    answer = untagged_answer(episode)
    points = []
    for start, end in thoughts_of(text):
        for found in rewards.POINT.finditer(text, start, end):
            x, y = float(found[1]) * sx, float(found[2]) * sy
            is_inside = 0 <= x <= picture.width and 0 <= y <= picture.height
            if is_inside and (x, y) not in answer:
                points.append(NamedPoint(number, found.start(), found.end(), x, y))
    return points


def thoughts_of(text):
    """The parts of a turn that are no answer and no tool call -> [(start, end)] in its text.

    A text without tags, as other models write it, is all thought.
    """
    spans = []
    start = 0
    is_thought = True
    for tag in rewards.TAG.finditer(text):
        if is_thought:
            spans.append((start, tag.start()))
        start = tag.end()
        is_thought = tag[0].lower() not in ACTIONS
    if is_thought:
        spans.append((start, len(text)))
    return spans


def untagged_answer(episode):
    """The point, or the corners of the box, that is the answer of a text without <answer>."""
    _, answer = answer_given(episode)
    if "<answer>" in episode.text or not isinstance(answer, tuple):
        return []
    return [answer[:2], answer[2:]]


# --------------------------------------------------------------------------------------------------
# turns and tokens

def given_words(turn):
    """The beginning of a turn that the environment wrote; "" if there is none."""
    return data.FORCE if turn.forced and turn.text.startswith(data.FORCE) else ""


def shown_turn(album, episode, number, turn, points):
    """points: list[NamedPoint] of this turn."""
    given = given_words(turn)
    crop = None
    if turn.crop:
        picture = album.add(crop_as_seen(album, episode, turn), CROP_SIDE)
        small = max(picture.width, picture.height) <= SMALL_CROP
        corner = episode_rows.numbers_text(turn.crop[:2])
        opposite = episode_rows.numbers_text(turn.crop[2:])
        crop = ShownCrop(picture, small, f"{corner} to {opposite}")
    return ShownTurn(
        number=number, color=color_of(number), names_point=bool(turn.point),
        given=split_tags(given), own=split_points(turn.text, len(given), points), crop=crop,
        error=turn.error, forced=turn.forced)


def color_of(number):
    """The CSS class of a turn. The stylesheet has six colors, so the seventh turn has the first."""
    return f"t{number % 6}"


def split_points(text, start, points):
    """A turn's text from `start` on, cut to the length that a page shows -> list[Words]."""
    end = start + page.LONGEST
    parts = []
    for point in points:
        parts += split_tags(text[start:point.start])
        parts.append(Words(text[point.start:point.end], point.mark, point.label))
        start = point.end
    parts += split_tags(text[start:end])
    if len(text) > end:
        parts.append(Words(page.left_out(text[end - page.LONGEST:])))
    return parts


def split_tags(text):
    """A text -> list[Words], its tags by themselves."""
    parts = []
    for part in TAG.split(text):
        if part:
            parts.append(Words(part, "tag" if TAG.fullmatch(part) else ""))
    return parts


def crop_as_seen(album, episode, turn):
    """The crop of a turn as the model saw it -> PIL image.

    Black if it was painted black; blurred if it was cut from the copy that the model was fed.
    """
    image = album.open(episode.sample.images[0])
    shown_as = episode.shown_as
    if shown_as.get("zoom") == "black":
        image = Image.new("RGB", image.size)
    if shown_as.get("crop_from") == "seen":
        fed = image.resize(shown_as["fed"], Image.Resampling.BICUBIC)
        image = fed.resize(image.size, Image.Resampling.BICUBIC)
    return image.crop(tuple(map(round, turn.crop)))


def shown_tokens(token_texts):
    """[(text, log-probability or None)] -> ShownTokens; None if the policy chose no token."""
    chosen = [logprob for _, logprob in token_texts if logprob is not None]
    if not chosen:
        return None
    tokens = []
    for text, logprob in token_texts[:MOST_TOKENS]:
        tokens.append((text, None if logprob is None else math.exp(logprob)))
    return ShownTokens(len(chosen), math.exp(sum(chosen) / len(chosen)), tokens)


# --------------------------------------------------------------------------------------------------
# pictures

def marked_picture(album, episode, image, points, max_side):
    """Prompt image number `image` with its marks: gold, windows, points, answer.

    points: list[NamedPoint] of the episode, which lie in the first image.
    """
    sample = episode.sample
    picture = album.add(sample.images[image], max_side)
    # Several images are drawn smaller, so what is drawn over them is larger.
    unit = max(picture.width, picture.height) / (60 if len(sample.images) > 1 else 100)
    marks = gold_marks(sample, image)
    if image == 0:                      # the tool zooms into the first image only
        marks += window_marks(episode.turns)
        marks += thought_marks(points, 2.1 * unit)
        marks += point_marks(episode, picture, 2.7 * unit)
    marks += answer_marks(episode, image, picture, 2.2 * unit)
    return MarkedPicture(picture, image + 1, marks)


def gold_marks(sample, image):
    """Where the answer lies: the outline of a target that has one, else its box."""
    outlines = {}
    for target in sample.targets:
        if "polygon" in target:
            outlines[tuple(target["box"])] = target["polygon"]
    marks = []
    for box in analysis.known_boxes(sample, image):
        corners = outlines.get(tuple(box))
        if corners:
            marks.append(Mark("gold", path=polygon_path(corners)))
        else:
            marks.append(rect_mark("gold", box))
    return marks


def window_marks(turns):
    """What each crop showed."""
    marks = []
    for number, turn in enumerate(turns, 1):
        if turn.crop:
            marks.append(rect_mark(color_of(number), turn.crop))
    return marks


def point_marks(episode, picture, radius):
    """The points that the turns zoomed into or tried to, those inside the image."""
    sx, sy = episode.frames[0][:2] if episode.frames else (1, 1)
    marks = []
    for number, turn in enumerate(episode.turns, 1):
        if turn.point is None:
            continue
        x, y = turn.point               # may be a whole number too large for a float
        if 0 <= x <= picture.width / sx and 0 <= y <= picture.height / sy:
            marks.append(Mark(
                color_of(number), x=x * sx, y=y * sy, label=str(number),
                title=f"turn {number}: {pixel_text(x * sx, y * sy)}", radius=radius))
    return marks


def thought_marks(points, radius):
    """The points that the thoughts name, each place once, without those of a zoom."""
    marks = {}                          # {label: Mark}
    for point in points:
        if point.mark.startswith("named"):
            title = f"named in turn {point.turn}: {pixel_text(point.x, point.y)}"
            mark = Mark(point.mark, x=point.x, y=point.y, label=point.label, title=title,
                        radius=radius)
            marks.setdefault(point.label, mark)
    return list(marks.values())


def pixel_text(x, y):
    """A point as whole pixels, such as "(12, 31)"."""
    return f"({round(x)}, {round(y)})"


def answer_marks(episode, image, picture, radius):
    """The answer, if it is a box or a point in this image. What lies outside is not drawn."""
    answer_image, answer = answer_given(episode)
    if image != answer_image or not isinstance(answer, tuple):
        return []
    if episode.sample.answer_type == "box":
        sides = (picture.width, picture.height, picture.width, picture.height)
        box = [min(max(value, 0), side) for value, side in zip(answer, sides)]
        return [rect_mark("said", box)]
    x, y = answer
    if 0 <= x <= picture.width and 0 <= y <= picture.height:
        return [Mark("said", path=cross_path(x, y, radius))]
    return []


def rect_mark(kind, box):
    """A box (x1, y1, x2, y2) as a Mark. Its corners may stand in any order."""
    left, right = sorted(box[0::2])
    top, bottom = sorted(box[1::2])
    return Mark(kind, x=left, y=top, width=right - left, height=bottom - top)


def polygon_path(corners):
    """[(x, y)] -> SVG path data: move to the first corner, lines to the others, close."""
    points = [f"{page.short(x)} {page.short(y)}" for x, y in corners]
    return Markup("M" + "L".join(points) + "Z")


def line_path(x1, y1, x2, y2):
    """SVG path data of a straight line."""
    return polygon_path([(x1, y1), (x2, y2)])


def cross_path(x, y, radius):
    """SVG path data of two diagonals through (x, y): move, line, move, line."""
    left = page.short(x - radius)
    top = page.short(y - radius)
    side = page.short(2 * radius)
    return Markup(f"M{left} {top}l{side} {side}m0 -{side}l-{side} {side}")
