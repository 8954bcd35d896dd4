"""Convert a published file to our JSONL, and check the result.

    python data.py convert screenspot web.json out.jsonl --images DIR --check

`convert` runs a benchmark's reader (appendix/benchmarks.py) over a file. `check` compares what came
out with what was published: the number of rows, every box with the size of its image, and whether
the right answers, given back as predictions, would be scored as right.
"""
import collections
import os

import numpy as np

import data
from appendix import benchmarks
from appendix.files import DataError, check_images, need


# --------------------------------------------------------------------------------------------------
# convert

def convert(name, path, images=None, skip_missing=False, only=""):
    """A published file or folder -> (samples, counts, missing). Raises DataError.

    images: the folder that image paths are relative to; by default that of the file.
    skip_missing: leave out rows whose images are not there, instead of stopping.
    only: take the rows of one category.
    counts: Counter of rows by category; the total is counts[""]. Rows left out count too.
    missing: for each row left out, the first image that is not there.
    """
    converter = benchmarks.CONVERTERS[name]
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    root = os.path.abspath(images or folder)
    samples = []
    counts = collections.Counter()
    taken = set()                                   # ids
    missing = []
    for n, (where, published) in enumerate(converter.read(path, root)):
        if not isinstance(published, dict):
            raise DataError(f"{where}{published!r:.60}; expected an object with fields")
        row = converter.to_row(published, where, converter.layout)
        row["category"] = [str(category) for category in row.get("category", [])]
        if only and only not in row["category"]:
            continue
        counts.update(["", *row["category"]])

        row["images"] = [unwrap(image) for image in need(row, "images", list, where)]
        absent = first_missing(row["images"], root)
        if absent is not None:
            if not skip_missing:
                raise DataError(f"{where}image {absent} is not in {root} (--images DIR names "
                                "another folder, --skip-missing skips such rows)")
            missing.append(absent)
            continue

        if row.get("id") is None or str(row["id"]) in taken:    # predictions are matched by id
            row["id"] = f"{name}/{n}"
        row["meta"] = {**row.get("meta", {}), "benchmark": name}
        sample = data.parse_row(row, where, root)
        samples.append(sample)
        taken.add(sample.id)
    if not samples:
        raise DataError(nothing_found(name, path, only, root if missing else ""))
    return samples, counts, missing


def unwrap(image):
    """An image of a parquet file, {"bytes", "path"}, -> its bytes or path."""
    if isinstance(image, dict):
        return image.get("bytes") or image.get("path")
    return image


def first_missing(images, root):
    """The first path that is no file below `root`; None if all are."""
    for image in images:
        if isinstance(image, str) and not os.path.isfile(os.path.join(root, image)):
            return image
    return None


def nothing_found(name, path, only, root):
    """The message for a file without rows. root: the image folder, if images were missing."""
    message = f"{path} holds no rows"
    if only:
        message += f" of category {only!r}"
    if root:
        return message + f" with its images in {root}; expected the published file"
    return message + f"; expected the published file of {name}"


# --------------------------------------------------------------------------------------------------
# gold answers

def gold_prediction(s):
    """The right answer, as a model would write it that answers in pixels of the stored image."""
    return f"<answer> {gold_text(s)} </answer>"


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
# check

def check(name, samples, counts):
    """Compare what was converted with what was published. Prints a report; faults: DataError."""
    print(f"checking {len(samples)} rows and their images ...")
    print_incomplete(name, counts)

    sizes = check_images(samples)
    worst = 0.0
    faults = []
    for s in samples:
        for target in boxes_of(s):
            worst = max(worst, overhang(target["box"], sizes[s.images[target["image"]]]))
        faults += faults_of(s, sizes)
    print(f"  {len(sizes)} images read; "
          f"no box leaves its image by more than {worst:.1%} of its side")
    print_hints(samples)

    wrong = []
    hidden = 0
    for s in samples:
        why = why_unscorable(s)
        if why == "hidden":
            hidden += 1
        elif why:
            wrong.append((s, why))
    right = len(samples) - len(wrong) - hidden
    and_hidden = f", {hidden} are hidden" if hidden else ""
    print(f"  {right} of {len(samples)} gold answers would be scored as right{and_hidden}")
    for s, why in wrong:
        print(f"    not {s.id}: {why}")
        if "published_wrong" not in s.meta:
            faults.append(f"{s.id}: {why}")
    if faults:
        raise DataError(f"{len(faults)} faults, such as {'; '.join(faults[:5])}")


def print_incomplete(name, counts):
    """Name the categories that have another number of rows than was published."""
    parts = []
    for category, published in benchmarks.CONVERTERS[name].published.items():
        possible = published if isinstance(published, tuple) else (published,)
        if counts[category] not in possible:
            expected = " or ".join(str(n) for n in possible)
            parts.append(f"{counts[category]} of {expected} {category or 'rows'}")
    if parts:
        print(f"  not the whole file: {', '.join(parts)}")


def print_hints(samples):
    unnamed = sum("image_unnamed" in s.meta for s in samples)
    if unnamed:
        print(f"  {unnamed} rows do not say in which image their box is; the last one is taken")
    always_first = all(s.answer_type == "choice" and s.answer == 0 for s in samples)
    if always_first and len(samples) > 9:
        print("  the gold is always the first option: ask with the options shuffled")


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
        width, height = sizes[s.images[target["image"]]]
        if overhang(target["box"], (width, height)) > 0.05:     # MIG-Bench's worst is 0.048
            faults.append(f"{s.id}: its box {target['box']} leaves its image, which is "
                          f"{width} x {height} (another layout? another image?)")
    different = {" ".join(option.casefold().split()) for option in s.options}
    if len(different) < len(s.options):
        faults.append(f"{s.id}: two of its options read the same: {s.options}")
    return faults
