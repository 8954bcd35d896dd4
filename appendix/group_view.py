"""One group as a lesson: what GRPO does with several tries at the same question.

    lesson = make_lesson(step, episodes, cfg)       the numbers, from rewards to advantages
    draw_lesson(album, lesson, max_side)            the picture and the tries, as markup

The advantage that is shown is the one that the step trained with, which is stored in the episode.
The numbers on the way to it come from the functions that the step calls: grpo.group_advantages and
rl_options.counted_episodes.
"""
import math
import statistics
from dataclasses import dataclass, replace

import torch

import data
import grpo
from appendix import card, episode_rows, page, rl_options

# Characters of one try that the lesson shows.
LONGEST_TRY = 240
# Two advantages that differ by less are the same but for rounding.
ROUNDING = 1e-4
# A disc that would hide another is moved outwards on so many rings, at most.
RINGS = 5
# Width of the bar of an advantage, in units of its drawing. Zero stands in the middle.
BAR = 100


@dataclass
class Lesson:
    """A group of G episodes, and the numbers between its rewards and its advantages."""
    step: int                           # number of the step, from 1 on
    episodes: list                      # list[Episode], all of one question
    mean: float                         # of the rewards of the episodes that count
    deviation: float                    # their standard deviation (unbiased)
    counted: list                       # G bools: does the episode count in mean and deviation?
    above_mean: list                    # G numbers: reward minus mean
    scaled: list                        # G numbers: the same divided by the deviation, if it is
    is_divided: bool                    # by the deviation? Not with --advantage-scale none
    weight_kind: str                    # --difficulty-weight
    weight: float                       # the difficulty weight that the step gave the question
    accuracy: float                     # mean accuracy of the group, on which the weight depends


def make_lesson(step, episodes, cfg):
    """The episodes of a group, trained on already, -> Lesson. cfg is train_rl.Config."""
    values = [float(e.reward_components["reward"]) for e in episodes]
    reward = torch.tensor([values])                                             # (1, G)
    counted = rl_options.counted_episodes(episodes, cfg)                        # (1, G) or None
    counts = [True] * len(episodes) if counted is None else counted[0].tolist()
    kept = [value for value, counts_here in zip(values, counts) if counts_here]
    accuracies = [float(e.reward_components["accuracy"]) for e in episodes]
    return Lesson(
        step, episodes, mean=statistics.fmean(kept or [0.0]),
        deviation=statistics.stdev(kept) if len(kept) > 1 else 0.0, counted=counts,
        above_mean=grpo.group_advantages(reward, "none", counted)[0].tolist(),
        scaled=grpo.group_advantages(reward, cfg.advantage_scale, counted)[0].tolist(),
        is_divided=cfg.advantage_scale == "std", weight_kind=cfg.difficulty_weight,
        weight=episodes[0].difficulty_weight, accuracy=statistics.fmean(accuracies))


# --------------------------------------------------------------------------------------------------
# drawing

@dataclass
class Try:
    """An episode of the group as templates/group.html shows it."""
    number: int                         # from 1 on; its points in the picture have it too
    direction: str                      # "up", "down" or "even": what the step does with it
    verdict: str                        # "right", "wrong", or "" if the gold is hidden
    text: str                           # what it wrote, in short
    answer: str
    reward: float
    above_mean: float
    scaled: float
    advantage: float                    # the one that the step trained with
    note: str                           # why the advantage is not what the columns before say
    bar_x: float                        # left edge of the bar of the advantage
    bar_width: float


def draw_lesson(album, lesson, max_side):
    """A Lesson -> markup. Its pictures go into the album, at most max_side pixels a side."""
    tries = []
    longest = max(abs(e.advantage) for e in lesson.episodes) or 1.0
    for k in range(len(lesson.episodes)):
        tries.append(shown_try(lesson, k, longest))
    sample = lesson.episodes[0].sample
    pictures = [shared_picture(album, lesson, i, max_side) for i in range(len(sample.images))]
    question = data.question(sample, lesson.episodes[0].frames)
    return page.render("group.html", lesson=lesson, tries=tries, pictures=pictures, bar=BAR,
                       question=question, options=sample.options,
                       gold=episode_rows.gold_words(sample))


def shown_try(lesson, k, longest):
    """Episode k of the group -> Try. longest: the advantage whose bar fills its half."""
    e = lesson.episodes[k]
    advantage = e.advantage
    half = BAR / 2 * abs(advantage) / longest
    return Try(
        number=k + 1, direction=direction_of(e), verdict=episode_rows.verdict(e),
        text=page.clip(in_short(e), LONGEST_TRY), answer=card.answer_in_words(e),
        reward=e.reward_components["reward"], above_mean=lesson.above_mean[k],
        scaled=lesson.scaled[k], advantage=advantage, note=note_on(lesson, k),
        bar_x=BAR / 2 - half if advantage < 0 else BAR / 2, bar_width=half)


def direction_of(e):
    """Does the step make the episode more likely ("up"), less likely ("down"), or neither?"""
    if e.advantage == 0:
        return "even"
    return "up" if e.advantage > 0 else "down"


def note_on(lesson, k):
    """Why the advantage of episode k is not scaled * weight; "" if it is."""
    if not lesson.counted[k]:
        return "a limit cut it off, so it counts in nothing (--over-turn exclude)"
    if abs(lesson.episodes[k].advantage - lesson.scaled[k] * lesson.weight) < ROUNDING:
        return ""
    return "set to 0 by --over-turn or --mask-negative"


def in_short(e):
    """The thoughts of an episode and what its tool calls led to, without tags and answer."""
    parts = []
    for number, turn in enumerate(e.turns, 1):
        begins = len(card.given_words(turn))
        for start, end in card.thoughts_of(turn.text):
            parts.append(turn.text[max(start, begins):end].strip())
        if turn.crop:
            parts.append(f"→ zoom at {episode_rows.numbers_text(turn.point)}.")
        elif turn.error:
            parts.append(f"→ {turn.error}")
        if turn.forced and number > 1:
            parts.append("No zooms left.")
    return " ".join(part for part in parts if part)


# --------------------------------------------------------------------------------------------------
# the picture that all tries share

def shared_picture(album, lesson, image, max_side):
    """Prompt image number `image` with the gold, and the points and answers of all tries."""
    sample = lesson.episodes[0].sample
    picture = album.add(sample.images[image], max_side)
    # Several images are drawn smaller, so what is drawn over them is larger.
    radius = max(picture.width, picture.height) / (27 if len(sample.images) > 1 else 45)
    marks = card.gold_marks(sample, image)
    discs = []
    for number, e in enumerate(lesson.episodes, 1):
        marks += box_marks(e, image, picture)
        discs += answer_discs(e, number, image, picture, radius)
        if image == 0:
            discs += point_discs(e, number, picture, radius)
    return card.MarkedPicture(picture, image + 1, marks + spread(discs, picture))


def spread(discs, picture):
    """Discs -> marks in which no disc hides another. A moved disc has a line to its place."""
    lines = []
    moved = []
    for disc in discs:
        x, y = free_place(disc, moved, picture)
        if (x, y) != (disc.x, disc.y):
            lines.append(card.Mark(disc.kind, path=card.line_path(disc.x, disc.y, x, y)))
        moved.append(replace(disc, x=x, y=y))
    return lines + moved


def free_place(disc, others, picture):
    """The place nearest to a disc, on rings around it, where it overlaps no other disc."""
    for ring in range(RINGS):
        for k in range(max(1, 8 * ring)):
            angle = 2 * math.pi * k / max(1, 8 * ring)
            x = disc.x + 2.1 * disc.radius * ring * math.cos(angle)
            y = disc.y + 2.1 * disc.radius * ring * math.sin(angle)
            is_inside = 0 <= x <= picture.width and 0 <= y <= picture.height
            distances = [math.dist((x, y), (other.x, other.y)) for other in others]
            if is_inside and min(distances, default=math.inf) >= 2 * disc.radius:
                return x, y
    return disc.x, disc.y


def point_discs(e, number, picture, radius):
    """The points that a try zoomed into or named in its thoughts, each place once."""
    places = {}                         # {(x, y): what it is}
    for mark in card.point_marks(e, picture, radius):
        places[mark.x, mark.y] = f"try {number}, {mark.title}"
    for point in card.named_points(e, picture):
        title = f"try {number}, named: {card.pixel_text(point.x, point.y)}"
        places.setdefault((point.x, point.y), title)
    return [disc(e, number, x, y, title, radius) for (x, y), title in places.items()]


def disc(e, number, x, y, title, radius):
    """A point with the number of its try, in the color of what the step does with the try."""
    return card.Mark(direction_of(e), x=x, y=y, label=str(number), title=title, radius=radius)


def box_marks(e, image, picture):
    """The answer of a try, if it is a box in this image."""
    if e.sample.answer_type != "box":
        return []
    boxes = card.answer_marks(e, image, picture, radius=0)
    return [replace(box, kind=direction_of(e)) for box in boxes]


def answer_discs(e, number, image, picture, radius):
    """The number of a try: on the point that it answers, or a corner of the box, in this image."""
    about, answer = card.answer_given(e)
    if image != about or not isinstance(answer, tuple):
        return []
    x, y = answer[:2]
    for box in box_marks(e, image, picture):
        x, y = box.x, box.y             # the upper left corner of what is drawn
    if not (0 <= x <= picture.width and 0 <= y <= picture.height):
        return []
    title = f"try {number}, answer: {episode_rows.numbers_text(answer)}"
    return [disc(e, number, x, y, title, radius)]
