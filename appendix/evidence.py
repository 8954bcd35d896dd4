"""Right for the right reason: did the policy see what its answer depends on?

A right answer may be luck. Toy scenes, and the rows of V*Bench, say where the evidence lies
(meta["evidence"]: boxes); an episode saw it if its crops show the middle of every such box.
"""
import math


def saw(episode):
    """Did the crops of an episode show all of the evidence? -> bool; None if it is not known."""
    targets = episode.sample.meta.get("evidence")
    if not isinstance(targets, list) or not targets:
        return None
    if not all(isinstance(target, dict) and "box" in target for target in targets):
        return None                                     # something else of this name, in own data
    for target in targets:
        x1, y1, x2, y2 = target["box"]
        if not is_shown((x1 + x2) / 2, (y1 + y2) / 2, episode.turns):
            return False
    return True


def is_shown(x, y, turns):
    """Is the source pixel (x, y) of image 0 in a crop of any turn?"""
    for turn in turns:
        if turn.crop is not None:
            left, top, right, bottom = turn.crop
            if left <= x <= right and top <= y <= bottom:
                return True
    return False


def elsewhere(sample, x, y, size):
    """A place that a call for the source pixel (x, y) of image 0 did not ask for -> (x, y).

    The control `wrong` of evaluate.py shows it. In a toy scene it is the middle of the object that
    lies furthest from (x, y). Where no scene is known, it lies half the image's width and half its
    height away. size: width and height of the image.
    """
    scenes = sample.meta.get("scenes")
    if not scenes:
        width, height = size
        return (x + width / 2) % width, (y + height / 2) % height
    centers = [o["center"] for o in scenes[0]["objects"]]
    return max(centers, key=lambda center: math.dist(center, (x, y)))


def right_and_saw(rows, is_right):
    """Rows of evaluate.summary_rows -> shares of the rows whose evidence is known.

    {} where none is known, and without a zoom tool. An episode that did not zoom saw nothing.
    """
    known = [r for r in rows if "saw" in r]
    if not known:
        return {}
    counts = {"saw": 0, "right_and_saw": 0, "right_not_saw": 0, "wrong_though_saw": 0}
    for r in known:
        right = is_right(r, r.get("benchmark"))
        counts["saw"] += r["saw"]
        counts["right_and_saw"] += right and r["saw"]
        counts["right_not_saw"] += right and not r["saw"]
        counts["wrong_though_saw"] += r["saw"] and not right
    return {name: number / len(known) for name, number in counts.items()}


def share_that_saw(episodes):
    """The share of episodes that saw their evidence; None if no crop was made or none is known.

    Episodes without crops count too, as those that did not see.
    """
    if not any(turn.crop for e in episodes for turn in e.turns):
        return None
    seen = [saw(e) for e in episodes]
    known = [value for value in seen if value is not None]
    return sum(known) / len(known) if known else None
