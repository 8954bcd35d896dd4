"""Convert a published file to our JSONL, and check the result.

    python data.py convert screenspot web.json out.jsonl --images DIR --check

`convert` runs a benchmark's reader (appendix/benchmarks.py) over a file. `check` compares what came
out with what was published: the number of rows, every box with the size of its image, and whether
the right answers, given back as predictions, would be scored as right.
"""
import collections
import os

import data
from appendix import benchmarks
from appendix.faults import boxes_of, faults_of, gold_text, overhang, why_unscorable
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
