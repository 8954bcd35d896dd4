"""Rows that cannot be right: no answer to them would be scored as right, or two would be.

`check_samples` refuses them before a run begins; `data.py convert` reports them if it is asked to
--check (appendix/convert.py). A row that was published with its fault says meta "published_wrong"
and passes.
"""
import numpy as np

from appendix.files import IN_MEMORY, DataError, check_images

MOST_SHOWN = 20


def check_samples(samples):
    """Read every image and check every row -> {path or bytes of an image: (width, height)}.

    Raises DataError with all faults in one list.
    """
    sizes = check_images(samples)
    faults = []
    for s in samples:
        if "published_wrong" in s.meta:
            continue
        why = why_unscorable(s)
        if why not in ("", "hidden"):
            faults.append(f"sample {s.id}: {why}")
        faults += [f"sample {fault}" for fault in faults_of(s, sizes)]
    raise_faults(faults, "rows cannot be used")
    return sizes


def raise_faults(faults, what):
    """Raise a DataError if there are faults: a single one as it is, several as a list."""
    if not faults:
        return
    if len(faults) == 1:
        raise DataError(faults[0])
    shown = faults[:MOST_SHOWN]
    if len(faults) > len(shown):
        shown.append(f"and {len(faults) - len(shown)} more")
    raise DataError(f"{len(faults)} {what}:\n  " + "\n  ".join(shown))


# --------------------------------------------------------------------------------------------------
# the right answer

def gold_text(s):
    if s.answer_type == "choice":
        return s.options[s.answer]
    if s.answer_type == "text":
        return s.answer[0]
    target = s.targets[0]
    x1, y1, x2, y2 = target["box"]
    points = [(x1, y1), (x2, y2)]
    if s.answer_type == "point":
        points = [np.mean(target.get("polygon", points), 0)]
    return ",".join(f"({x:.6f}, {y:.6f})" for x, y in points)


def why_unscorable(s):
    """Why not even the right answer would be scored as right, or "". "hidden": it is not known.

    These rules name the reason; tests/test_benchmarks.py compares them with rewards.score.
    """
    if s.answer_type == "box":
        return why_bad_box(s.targets[0]["box"])
    if s.answer_type == "point":
        return why_bad_place(s.targets[0])
    if s.answer is None or s.answer == []:
        return "hidden"
    gold = gold_text(s)
    if not gold.strip() or "answer>" in gold:
        # As it stands in its tags.
        return f"its gold {f' {gold} '!r:.60} is empty or holds a tag"
    return ""


def why_bad_box(box):
    x1, y1, x2, y2 = box
    if x1 < x2 and y1 < y2:
        return ""
    return f"its box {box} is inverted or empty"


def why_bad_place(target):
    """For a point: a box may be as thin as a line."""
    x1, y1, x2, y2 = target["box"]
    if x1 > x2 or y1 > y2:
        return f"its box {target['box']} is inverted or empty"
    if "polygon" in target:
        has_area = twice_area(target["polygon"]) > 1e-6
        return "" if has_area else "its polygon has no area"
    if x1 + x2 < 0 or y1 + y2 < 0:
        return f"the center of its box {target['box']} is outside the image"
    return ""


def twice_area(corners):
    """The shoelace formula."""
    xs, ys = np.transpose(corners)
    return abs(xs @ np.roll(ys, 1) - ys @ np.roll(xs, 1))


# --------------------------------------------------------------------------------------------------
# boxes and options

def boxes_of(s):
    return s.targets + s.meta.get("question_boxes", [])


def overhang(box, size):
    """How far a box leaves its image, as a fraction of the side; negative inside."""
    x1, y1, x2, y2 = box
    width, height = size
    return max(-x1 / width, -y1 / height, x2 / width - 1, y2 / height - 1)


def faults_of(s, sizes):
    """What is wrong with a sample's boxes and options, in words."""
    faults = []
    for target in boxes_of(s):
        width, height = size_of(s.images[target["image"]], sizes)
        if overhang(target["box"], (width, height)) > 0.05:     # MIG-Bench's worst is 0.048
            faults.append(f"{s.id}: its box {target['box']} leaves its image, which is "
                          f"{width} x {height} (another layout? another image?)")
    different = {" ".join(option.casefold().split()) for option in s.options}
    if len(different) < len(s.options):
        faults.append(f"{s.id}: two of its options read the same: {s.options}")
    return faults


def size_of(image, sizes):
    """(width, height) of an image; sizes: those of files and bytes."""
    return image.size if isinstance(image, IN_MEMORY) else sizes[image]
