"""Search trees as one HTML page: an outline to open and close, beside the image with the points.

    write_trees_page("trees.html", "trees.jsonl", {sample id: (Sample, View)}, cfg)

A line of the outline is a step: the numbers of its points in the image, its thought, how many
outcomes were seen below it (N), their mean (Q), and the answers in which its rollouts ended. The
chains that became traces are marked. Nothing runs in the page and nothing is fetched.
"""
from dataclasses import dataclass
from typing import NamedTuple

from appendix import files, page
from appendix.chains import linearise

# Characters of one thought or answer that the page shows, and pixels of a side of its pictures.
LONGEST_STEP = 1000
MAX_SIDE = 480


class Way(NamedTuple):
    """What is left, below a node, of the way of a chosen chain."""
    steps: list                         # [[thought, point]]
    answer: str                         # None: the wrong way of a corrected chain

    @property
    def mark(self):
        return "detour" if self.answer is None else "chosen"

    def ends_in(self, rollout):
        """Is this rollout the end of the way?"""
        if self.steps != rollout["steps"]:
            return False
        if self.answer is None:
            return rollout["answer"] is not None and rollout["reward"] < 1
        return rollout["answer"] == self.answer


@dataclass
class ShownStep:
    number: int                         # of its point in the image; 0 if it names none
    thought: str


@dataclass
class ShownPoint:
    x: float                            # in the model's coordinates, then in source pixels
    y: float
    mark: str                           # "chosen", "detour" or ""


@dataclass
class ShownEnd:
    """Where a rollout ended."""
    is_right: bool
    answer: str
    mark: str                           # "chosen", "detour" or ""
    steps: list                         # list[ShownStep] on the way to it, of one that is marked


@dataclass
class ShownNode:
    """A node of the outline, with its subtree."""
    steps: list                         # list[ShownStep]; none at the root
    visits: int
    value: float
    mark: str                           # "chosen", "detour" or ""
    ends: list                          # list[ShownEnd], one for each rollout
    children: list                      # list[ShownNode]


@dataclass
class ShownTree:
    """A tree as templates/trees.html shows it."""
    question: str
    options: list
    picture: page.Picture
    radius: float                       # of a point, in source pixels
    points: list                        # list[ShownPoint] in source pixels, by their numbers
    root: ShownNode


def write_trees_page(path, log, samples, cfg, most=40):
    """Draw the first trees of a log as one HTML file.

    log: JSONL file of trees (tree_search.outline). samples: {id: (Sample, View)} of the trees to
    draw, at most `most` of them. cfg: train_sft.Config, which says how many chains were chosen.
    """
    album = page.Album()
    trees = []
    for _, row in files.read_rows(log):
        sample, view = samples.get(row.get("id"), (None, None))
        if sample and row.get("digest") == files.digest(sample) and len(trees) < most:
            trees.append(show_tree(album, row, view, linearise(row, cfg)))
    page.write_html(path, "trees.html", ("report.css", "trees.css"), trees=trees)


def show_tree(album, row, view, chosen):
    """A row of the log -> ShownTree. Its picture goes into the album. chosen: list[Chain]."""
    ways = []
    for chain in chosen:
        ways.append(Way(chain.way, chain.answer))
        if chain.detour:
            ways.append(Way(chain.detour, None))
    points = []                         # of all steps, in the model's coordinates
    root = show_node(row["tree"], points, ways)
    for point in points:
        point.x, point.y = view.to_source(point.x, point.y)
    return ShownTree(
        question=row["question"], options=row["options"], picture=album.add(view.source, MAX_SIDE),
        radius=max(view.source.size) / 28, points=points, root=root)


def show_node(node, points, ways):
    """A node of a tree (JSON) -> ShownNode. Appends the points of its subtree to `points`.

    ways: list[Way], the ways that pass through its parent.
    """
    here = [follow(way, node) for way in ways]
    here = [rest for rest in here if rest]
    mark = mark_of(here)
    steps = show_steps(node["steps"], points, mark)
    ends = [show_end(rollout, points, here) for rollout in node["rollouts"]]
    children = [show_node(child, points, here) for child in node["children"]]
    return ShownNode(steps, node["visits"], node["value"], mark, ends, children)


def follow(way, node):
    """What is left of a way below a node (JSON); None if it does not go through it to its end."""
    n = len(node["steps"])
    if way.steps[:n] != node["steps"]:
        return None
    rest = Way(way.steps[n:], way.answer)
    ends_here = any(map(rest.ends_in, node["rollouts"]))
    goes_on = any(follow(rest, child) for child in node["children"])
    return rest if ends_here or goes_on else None


def show_end(rollout, points, ways):
    """A rollout (JSON) -> ShownEnd. The steps of one that is marked are shown, the others' not."""
    mark = mark_of([way for way in ways if way.ends_in(rollout)])
    steps = show_steps(rollout["steps"], points, mark) if mark else []
    answer = page.clip(rollout["answer"] or "broken", LONGEST_STEP)
    return ShownEnd(rollout["reward"] == 1, answer, mark, steps)


def mark_of(ways):
    """"chosen" if one of the ways is the way to a right answer, else "detour"; "" without any."""
    marks = [way.mark for way in ways]
    if "chosen" in marks:
        return "chosen"
    return "detour" if marks else ""


def show_steps(steps, points, mark):
    """Steps (JSON) -> list[ShownStep]. Appends their points to `points`."""
    shown = []
    for thought, point in steps:
        number = 0
        if point:
            points.append(ShownPoint(*point, mark))
            number = len(points)
        shown.append(ShownStep(number, page.clip(thought, LONGEST_STEP)))
    return shown
