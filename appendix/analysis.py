"""What an episode did, as counts: regions, subgoals, verification, backtracking, pointing.

ViGoRL (section A6) had a language model count these in the text. Here they are rules on words and
points, which anyone can check by hand; what they miss, they miss for every run alike.

    describe(episodes)      fills the field `behaviour` of each
    behaviour(e)            the rules

A step is a sentence of a thought, or a zoom. A region is all that lies within NEAR of a point.
"""
import math
import re
from dataclasses import dataclass

import data
import rewards
from appendix import files

# Radius of a region, as a share of the longer side of the image.
NEAR = 0.1
# Words that mark a step as one of a kind.
MARKERS = {
    "subgoals": re.compile(
        r"\b(?:first|next|let me|let's|let us|i will|i'll|i need to|i should|look for|to find)\b",
        re.IGNORECASE),
    "verification": re.compile(
        r"\b(?:check|verif\w+|confirm\w*|make sure|look again|closer look|re-?examin\w*)\b",
        re.IGNORECASE),
    "backtracking": re.compile(
        r"\b(?:wait|actually|instead|mistaken|reconsider|go back|not (?:here|there|it|this)|wrong|"
        r"on second thought)\b",
        re.IGNORECASE),
}
# The counts that every thinking episode has.
COUNTS = ("regions", *MARKERS)
# Characters of a turn that are read.
LIMIT = 100_000


@dataclass
class PointedStep:
    """One step of an episode."""
    words: str                  # the sentence; "" for a zoom
    points: list                # [(x, y)], source pixels of the first image; only points inside it


def describe(episodes):
    """Fill `behaviour` of each episode."""
    for e in episodes:
        e.behaviour = behaviour(e)


def behaviour(e):
    """What an episode did -> {name: count}; {} if it thought nothing.

    regions       different regions that its steps name
    subgoals      steps that say what to do next (MARKERS) and name a point
    verification  steps that return to a region that had been left, or that say they check
                  (MARKERS) and name a point
    backtracking  steps that name another region than the step before, after words of correction
                  (MARKERS) in or before them
    points        where an object's box is known: points of the zooms, or of the thoughts if there
                  are no zooms
    pointed       those of them that lie inside a box
    """
    all_steps = steps(e)
    if not all_steps:
        return {}
    num_regions, visits = find_regions(all_steps, NEAR * longer_side(e, all_steps))
    found = {"regions": num_regions}
    for name in MARKERS:
        found[name] = 0

    seen = set()                                        # regions named so far
    last = None                                         # the region named last
    doubt = False                                       # words of correction since then
    for step, here in zip(all_steps, visits):
        says = {name: bool(marker.search(step.words)) for name, marker in MARKERS.items()}
        doubt = doubt or says["backtracking"]
        if not here:
            continue
        returns = any(region in seen and region != last for region in here)
        before = here[0] if last is None else last
        moves = any(region != before for region in here)
        found["subgoals"] += says["subgoals"]
        found["verification"] += says["verification"] or returns
        found["backtracking"] += doubt and moves
        seen.update(here)
        last = here[-1]
        doubt = False
    return found | pointing_behaviours(e.sample, all_steps)


# --------------------------------------------------------------------------------------------------
# steps

def steps(e):
    """The steps of an episode in order -> list[PointedStep]."""
    found = []
    for turn in e.turns:
        for sentence in own_sentences(turn):
            points = [(float(x), float(y)) for x, y in rewards.POINT.findall(sentence)]
            found.append(PointedStep(sentence, source_points(points, e.frames)))
        if turn.crop:
            found.append(PointedStep("", source_points([turn.point], e.frames)))
    return found


def own_sentences(turn):
    """The sentences of a turn's thoughts, without the words that the environment gave it."""
    text = turn.text
    if turn.forced and text.startswith(data.FORCE):
        text = text[len(data.FORCE):]
    parts = rewards.TAG.split(text[:LIMIT])             # words, tag, words, tag, ..., words
    sentences = []
    for tag, words in zip(parts[1::2], parts[2::2]):
        if tag.lower() == "<think>":
            sentences += re.split(r"(?<=[.!?;])\s+|\n+", words)
    return [sentence for sentence in sentences if sentence.strip()]


def source_points(points, frames):
    """Points in the model's convention -> source pixels of the first image, without those outside.

    No frames: the points are in source pixels already.
    """
    sx, sy = frames[0][:2] if frames else (1, 1)
    return [(x * sx, y * sy) for x, y in points if rewards.inside((x, y), frames[:1])]


# --------------------------------------------------------------------------------------------------
# regions

def longer_side(e, all_steps):
    """The longer side of the first image in source pixels; if unknown, the largest coordinate."""
    if e.frames:
        return max(e.frames[0][2:])
    values = []
    for step in all_steps:
        for point in step.points:
            values += point
    return max(values, default=1)


def find_regions(all_steps, radius):
    """-> (number of regions, [the regions that each step names, as numbers]).

    A point belongs to the first region whose first point is within the radius.
    """
    centers = []
    visits = []
    for step in all_steps:
        here = []
        for point in step.points:
            region = region_of(point, centers, radius)
            if region == len(centers):
                centers.append(point)
            here.append(region)
        visits.append(here)
    return len(centers), visits


def region_of(point, centers, radius):
    """The number of the first center near the point; len(centers) if there is none."""
    for k, center in enumerate(centers):
        if math.dist(point, center) <= radius:
            return k
    return len(centers)


# --------------------------------------------------------------------------------------------------
# pointing

def pointing_behaviours(sample, all_steps):
    """-> {"points", "pointed"}, see behaviour(); {} where no box is known, or of several images."""
    boxes = known_boxes(sample, 0) if len(sample.images) == 1 else []
    if not boxes:
        return {}
    of_zooms = []
    of_all = []
    for step in all_steps:
        of_all += step.points
        if not step.words:
            of_zooms += step.points
    points = of_zooms or of_all
    pointed = sum(in_any(point, boxes) for point in points)
    return {"points": len(points), "pointed": pointed}


def in_any(point, boxes):
    x, y = point
    return any(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in boxes)


def known_boxes(sample, image):
    """Where the answer to a sample lies in image number `image` -> list of boxes, source pixels.

    These are its targets, and what a toy scene or a data set calls evidence. Evidence has no fixed
    form, so what is no box is left out.
    """
    evidence = sample.meta.get("evidence")
    marks = list(sample.targets)
    if isinstance(evidence, list):
        marks += evidence
    boxes = []
    for mark in marks:
        if not isinstance(mark, dict) or mark.get("image", 0) != image:
            continue
        if files.is_numbers(mark.get("box"), 4):
            boxes.append([float(v) for v in mark["box"]])
    return boxes
