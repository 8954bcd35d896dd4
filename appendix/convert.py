"""Convert a published file to our JSONL, and check the result.

    python data.py convert screenspot web.json out.jsonl --images DIR --check

`convert` runs a benchmark's reader (appendix/benchmarks.py) over a file. `check` compares what came
out with what was published: the number of rows, every box with the size of its image, and whether
the right answers, given back as predictions, would be scored as right.
"""
import collections
import fnmatch
import os

import data
from appendix import benchmarks
from appendix.faults import boxes_of, faults_of, gold_text, overhang, why_unscorable
from appendix.files import DataError, check_images, need


MOST_PARTS = 5      # categories that are named where numbers of rows differ


# --------------------------------------------------------------------------------------------------
# convert

def convert(name, path, images=None, skip_missing=False, only="", files=""):
    """A published file or folder -> (samples, counts, missing). Raises DataError.

    images: the folder that image paths are relative to; by default that of the file.
    skip_missing: leave out rows whose images are not there, instead of stopping.
    only: take the rows of one category.
    files: of a folder, take the files of these names (with *, as in a shell).
    counts: Counter of rows by category, for `check`; the total is counts[""]. Rows whose image is
    missing count too.
    missing: for each row left out, the first image that is not there.
    """
    converter = benchmarks.CONVERTERS[name]
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    root = os.path.abspath(images or folder)
    samples = []
    counts = collections.Counter()
    categories = {}                                 # those of all rows, in order
    taken = set()                                   # ids
    missing = []
    for n, (where, published) in enumerate(published_rows(converter, path, root, files)):
        if not isinstance(published, dict):
            raise DataError(f"{where}{published!r:.60}; expected an object with fields")
        row = converter.to_row(published, where, converter.layout)
        row["category"] = [str(category) for category in row.get("category", [])]
        categories |= dict.fromkeys(row["category"])
        if only and only not in row["category"]:
            continue
        if not converter.split or converter.split in row["category"]:
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
        raise DataError(nothing_found(name, path, only, root if missing else "", categories))
    return samples, counts, missing


def published_rows(converter, path, root, files):
    """All (where, row) of a file, or of the files that are taken from a folder, which are named."""
    if not os.path.isdir(path) or not converter.endings:
        if files:
            raise DataError(f"--files chooses among the files of a folder; {path} is read as it is")
        yield from converter.read(path, root)
        return
    names = files_of(path, converter.endings, files)
    print(f"files read from {path} (--files chooses): {', '.join(names)}")
    for name in names:
        yield from converter.read(os.path.join(path, name), root)


def files_of(path, endings, pattern):
    """The files of a folder, and of the folders in it, that have one of these endings -> paths.

    pattern: take those only whose name, or path below the folder, matches it; "": all.
    """
    found = []
    for folder, _, names in sorted(os.walk(path)):
        for name in sorted(names):
            if name.endswith(endings) and not name.startswith("."):
                found.append(os.path.relpath(os.path.join(folder, name), path))
    if not found:
        raise DataError(f"{path} holds no file that ends in {', '.join(endings)}")
    if not pattern:
        return found
    matching = []
    for file in found:
        if fnmatch.fnmatch(file, pattern) or fnmatch.fnmatch(os.path.basename(file), pattern):
            matching.append(file)
    if not matching:
        raise DataError(f"no file of {path} matches --files {pattern!r}; it has {', '.join(found)}")
    return matching


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


def nothing_found(name, path, only, root, categories):
    """The message for a file of which no row is left. root: the folder, if images were missing."""
    message = f"{path} holds no rows"
    if only:
        message += f" of category {only!r}"
    if root:
        return message + f" with its images in {root}; expected the published file"
    if only:
        return message + f"; its categories: {', '.join(categories) or 'none'}"
    return message + f"; expected the published file of {name}"


# --------------------------------------------------------------------------------------------------
# gold answers

def gold_prediction(s):
    """The right answer, as a model would write it that answers in pixels of the stored image."""
    return f"<answer> {gold_text(s)} </answer>"


# --------------------------------------------------------------------------------------------------
# check

def check(name, samples, counts, only=""):
    """Compare what was converted with what was published. Prints a report; faults: DataError."""
    print(f"checking {len(samples)} rows and their images ...")
    print_incomplete(name, counts, only)

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


def print_incomplete(name, counts, only=""):
    """Say in one line which categories have another number of rows than was published.

    Rows of other categories than `only` were not asked for, and are not missing.
    """
    converter = benchmarks.CONVERTERS[name]
    published = converter.published
    if only and only != converter.split:
        published = {c: n for c, n in published.items() if c == only}
    parts = []
    for category, number in published.items():
        possible = number if isinstance(number, tuple) else (number,)
        if counts[category] not in possible:
            expected = " or ".join(str(n) for n in possible)
            parts.append(f"{counts[category]} of {expected} {category or 'rows'}")
    if not parts:
        return
    other = same_numbers(name, counts)
    if other:
        print(f"  the numbers of rows are those of {other}, not of {name}: is NAME right?")
        return
    if len(parts) > MOST_PARTS:
        parts[MOST_PARTS:] = [f"and {len(parts) - MOST_PARTS} more"]
    said = ", ".join(parts)
    if len(published) > 1 and all(isinstance(number, int) for number in published.values()):
        said = f"{counts['']} of {sum(published.values())} rows ({said})"
    print(f"  not the whole file: {said}")


def same_numbers(name, counts):
    """Another NAME, of the same layout, that was published with these numbers of rows; or ""."""
    own = benchmarks.CONVERTERS[name]
    for other, converter in benchmarks.CONVERTERS.items():
        if other == name or (converter.to_row, converter.layout) != (own.to_row, own.layout):
            continue
        there = [category for category in converter.published if counts[category]]
        if there and all(counts[category] == converter.published[category] for category in there):
            return other
    return ""


def print_hints(samples):
    unnamed = sum("image_unnamed" in s.meta for s in samples)
    if unnamed:
        print(f"  {unnamed} rows do not say in which image their box is; the last one is taken")
    always_first = all(s.answer_type == "choice" and s.answer == 0 for s in samples)
    if always_first and len(samples) > 9:
        print("  the gold is always the first option: ask with the options shuffled")
