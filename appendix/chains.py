"""From a search tree to traces: the chains of steps that end right, and the turns they become.

    tree --linearise--> chains of (thought, point) and an answer --to_turns--> the assistant's turns

Pure functions of JSON and text (ViGoRL, 2505.23678, section 3.1). A direct chain goes straight to
a right answer. A corrected chain goes wrong first: from one node a wrong way, a phrase of recovery,
and a right way.
"""
import itertools
import math
from dataclasses import dataclass, replace

import data
import rewards


# --------------------------------------------------------------------------------------------------
# the chains of a tree
#
# A *way* leads on from a node to the end of a rollout that was played out there or further down.
# The ways that go through one child, or that are one rollout of the node, form a *branch*.

@dataclass(frozen=True)
class Way:
    steps: list             # [[thought, point]] from the node on
    answer: str             # None: it broke off
    reward: float           # 1: the answer is right
    support: float          # of the last node on the way, see `support`


@dataclass(frozen=True)
class Chain:
    """One line of reasoning from the question to a right answer."""
    kind: str               # "direct", or "corrected": it goes wrong first
    steps: list             # [[thought, point]]
    answer: str
    support: float          # how well the tree supports it: more is better
    way: list               # the steps to that answer, without the wrong way
    detour: list = None     # of a corrected chain: the steps from the question to the wrong answer


def linearise(tree, cfg):
    """The chains of a tree (the JSON of `outline`), the best supported first -> list[Chain].

    At most cfg.direct direct and cfg.corrected corrected ones, no two alike. (The original keeps
    all.)
    """
    root = tree["tree"]
    above = support(root, 0.0)
    direct = best(direct_chains(root, [], above), cfg.direct)
    corrected = best(corrected_chains(root, [], above, cfg), cfg.corrected)
    return direct + corrected


def support(node, of_parent):
    """(wins + 1) / (visits + 2) of a node's rollouts, with wins = Q N.

    A right answer may be luck. It is less likely so if others that continued the same step were
    right too. An answer has the support of the step that led to it.
    """
    if node["answer"] is not None:
        return of_parent
    wins = node["value"] * node["visits"]
    return (wins + 1) / (node["visits"] + 2)


def direct_chains(node, before, node_support):
    """Yield the ways to a right answer, through this node and through those below it.

    before: the steps that lead to the node.
    """
    before = before + node["steps"]
    for rollout in node["rollouts"]:
        steps = before + rollout["steps"]
        if rollout["reward"] == 1 and steps:
            yield Chain("direct", steps, rollout["answer"], node_support, way=steps)
    for child in node["children"]:
        yield from direct_chains(child, before, support(child, node_support))


def corrected_chains(node, before, node_support, cfg):
    """Yield chains that take a wrong way from some node, say so, and take a right one.

    The wrong answer itself is left out. cfg.recovery: what is said between the two.
    cfg.repeat_prefix: then begin again from the question, as the original does. It pairs only
    rollouts that began at the same node, never ways through two children, so it has far fewer.
    """
    before = before + node["steps"]
    for child in node["children"]:
        yield from corrected_chains(child, before, support(child, node_support), cfg)
    # Two ways through the same child part further down: there they are two branches.
    for first, second in itertools.permutations(branches(node, node_support), 2):
        for wrong, right in itertools.product(first, second):
            failed = wrong.answer is not None and wrong.reward < 1
            if failed and right.reward == 1 and wrong.steps and right.steps:
                again = before if cfg.repeat_prefix else []
                steps = before + wrong.steps + [[cfg.recovery, None]] + again + right.steps
                yield Chain(
                    "corrected", steps, right.answer, right.support - wrong.support,
                    way=before + right.steps, detour=before + wrong.steps)


def branches(node, node_support):
    """The ways on from a node, by branch -> list[list[Way]]."""
    out = []
    for r in node["rollouts"]:
        out.append([Way(r["steps"], r["answer"], r["reward"], node_support)])
    for child in node["children"]:
        ways = []
        for branch in branches(child, support(child, node_support)):
            ways += [replace(way, steps=child["steps"] + way.steps) for way in branch]
        out.append(ways)
    return out


def best(chains, n):
    """The n best supported chains; of those that say the same, the first that was found."""
    different = {}
    for chain in chains:
        different.setdefault(repr((chain.steps, chain.answer)), chain)
    return sorted(different.values(), key=lambda chain: -chain.support)[:n]


# --------------------------------------------------------------------------------------------------
# a chain as the assistant's turns

def to_turns(steps, answer, style, max_zooms=3, min_distance=10.0, reorder=0.0, rng=None):
    """A chain -> the assistant's turns as text.

    A single turn holds all thoughts. In the zoom protocol every new point becomes a tool call (its
    crop comes from zoom_rollout.replay); what names no new point, or comes after max_zooms calls,
    stays a thought. Points of the answer are no steps, so they never become calls.
    reorder: chance that the first call moves to a later place, so that no order is learned by heart
    """
    if style != "zoom":
        thought = prose([thought for thought, _ in steps])
        return [f"<think> {thought} </think>\n<answer> {answer} </answer>"]
    calls = []
    called = []                                         # the points of the calls
    thoughts = []                                       # since the last call
    for thought, point in steps:
        thoughts.append(thought)
        has_room = len(calls) < max_zooms
        if point is not None and has_room and is_far(point, called, min_distance):
            calls.append(f"<think> {prose(thoughts)} </think>\n{data.tool_call(*point)}")
            called.append(point)
            thoughts = []
    if reorder and len(calls) > 1 and rng.random() < reorder:
        place = rng.randrange(1, len(calls))
        calls.insert(place, calls.pop(0))
    opening = data.FORCE                                # no zoom is left, or nothing to think
    if thoughts and len(calls) < max_zooms:
        opening = f"<think> {prose(thoughts)} </think>\n<answer>"
    return [*calls, f"{opening} {answer} </answer>"]


def prose(thoughts):
    """Thoughts -> one text. A capital letter begins a new sentence, punctuation continues one."""
    text = ""
    for thought in thoughts:
        if not thought:
            continue
        if thought[0] in ",.;:":
            text = text + thought
        elif text and thought[0].isupper():
            text = f"{with_period(text)} {thought}"
        else:
            text = f"{text} {thought}".strip()
    return with_period(text.strip(" ,;:"))


def with_period(text):
    """The text as a finished sentence."""
    ends = text == "" or text[-1] in ".!?"
    return text.rstrip(" ,;:") + ("" if ends else ".")


# --------------------------------------------------------------------------------------------------
# points

def points_in(text):
    """The points (x, y) of a text, as pairs of integers, without those too large for a float."""
    pairs = [(float(x), float(y)) for x, y in rewards.POINT.findall(text)]
    return [(round(x), round(y)) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def is_far(point, others, min_distance):
    return all(math.dist(point, other) >= min_distance for other in others)
