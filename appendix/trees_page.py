"""Search trees as one HTML page: an outline to open and close, beside the image with the points.

    write_trees_page("trees.html", "trees.jsonl", {sample id: (Sample, View)})

A line of the outline is a step: the numbers of its points in the image, its thought, how many
outcomes were seen below it (N), their mean (Q), and the answers in which its rollouts ended.
Nothing runs in the page and nothing is fetched.
"""
from dataclasses import dataclass

from appendix import files, page

# Characters of one thought or answer that the page shows, and pixels of a side of its pictures.
LONGEST_STEP = 1000
MAX_SIDE = 480


@dataclass
class ShownStep:
    number: int                         # of its point in the image; 0 if it names none
    thought: str


@dataclass
class ShownNode:
    """A node of the outline, with its subtree."""
    steps: list                         # list[ShownStep]; none at the root
    visits: int
    value: float
    ends: list                          # of its rollouts: [(the answer is right, answer)]
    children: list                      # list[ShownNode]


@dataclass
class ShownTree:
    """A tree as templates/trees.html shows it."""
    question: str
    options: list
    picture: page.Picture
    radius: float                       # of a point, in source pixels
    points: list                        # [(x, y)] in source pixels, in the order of their numbers
    root: ShownNode


def write_trees_page(path, log, samples, most=40):
    """Draw the first trees of a log as one HTML file.

    log: JSONL file of trees (tree_search.outline). samples: {id: (Sample, View)} of the trees to
    draw, at most `most` of them.
    """
    album = page.Album()
    trees = []
    for _, row in files.read_rows(log):
        sample, view = samples.get(row.get("id"), (None, None))
        if sample and row.get("digest") == files.digest(sample) and len(trees) < most:
            trees.append(show_tree(album, row, view))
    page.write_html(path, "trees.html", "trees.css", trees=trees)


def show_tree(album, row, view):
    """A row of the log -> ShownTree. Its picture goes into the album."""
    points = []                         # of all steps, in the model's coordinates
    root = show_node(row["tree"], points)
    return ShownTree(
        question=row["question"], options=row["options"], picture=album.add(view.source, MAX_SIDE),
        radius=max(view.source.size) / 28, points=[view.to_source(*point) for point in points],
        root=root)


def show_node(node, points):
    """A node of a tree (JSON) -> ShownNode. Appends the points of its subtree to `points`."""
    steps = []
    for thought, point in node["steps"]:
        number = 0
        if point:
            points.append(point)
            number = len(points)
        steps.append(ShownStep(number, page.clip(thought, LONGEST_STEP)))
    ends = []
    for rollout in node["rollouts"]:
        answer = page.clip(rollout["answer"] or "broken", LONGEST_STEP)
        ends.append((rollout["reward"] == 1, answer))
    children = [show_node(child, points) for child in node["children"]]
    return ShownNode(steps, node["visits"], node["value"], ends, children)
