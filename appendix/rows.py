"""One row of our JSONL, checked: every fault ends in one line that names the file and the row.

    {"id": "7", "images": ["a.png"], "question": "Which way?", "answer_type": "choice",
     "options": ["left", "right"], "answer": 1}

Required: images, question, answer_type, and what that type asks for. Optional: id, options, answer,
targets, category, meta (see data.Sample). A target's box is in pixels of the stored image. Where a
published file has it as a fraction of the image, the row may say "norm_box" or "norm_polygon"
instead (0 to 1), and it is converted here, where the size of the image is known.
"""
import os

from appendix.files import DataError, need, need_numbers, open_image, sample_image


def sample_fields(row, where, root):
    """A row -> the fields of its Sample, as a dict. The row itself is not changed."""
    answer_type = need(row, "answer_type", str, where)
    if answer_type not in READ_ANSWER:
        raise DataError(f"{where}answer_type is {answer_type!r}; "
                        f"expected one of {', '.join(READ_ANSWER)}")
    images = read_images(row, where, root)
    fields = {
        # A row without an id is named by its file and line.
        "id": where if row.get("id") is None else str(row["id"]),
        "images": images,
        "question": need(row, "question", str, where),
        "answer_type": answer_type,
        "options": read_strings(row, "options", where),
        "targets": read_targets(optional(row, "targets", list, where), images, where),
        "category": read_strings(row, "category", where),
        "meta": read_meta(row, images, where),
    }
    fields["answer"] = READ_ANSWER[answer_type](row.get("answer"), fields, where)
    return fields


# --------------------------------------------------------------------------------------------------
# the answer, by answer type: function(answer, the other fields, where) -> answer

def read_place(answer, fields, where):
    """A point or a box: the targets hold the answer."""
    if not fields["targets"]:
        raise DataError(f"{where}field 'targets' is empty; "
                        f"a {fields['answer_type']} question needs at least one target box")
    return answer


def read_choice(answer, fields, where):
    """The index of an option; None if it is hidden."""
    options = fields["options"]
    is_index = type(answer) is int and answer in range(len(options))
    if len(options) < 2 or not (is_index or answer is None):
        raise DataError(f"{where}answer is {answer!r:.60} with {len(options)} options; "
                        "expected an index into at least two options")
    return answer


def read_text(answer, fields, where):
    """A list of accepted strings; one string is a list of one; None if it is hidden."""
    if answer is None:
        return None
    if isinstance(answer, str):
        return [answer]
    if not is_strings(answer):
        raise DataError(f"{where}field 'answer' is {answer!r:.60}; expected a list of strings")
    return list(answer)


READ_ANSWER = {"point": read_place, "box": read_place, "choice": read_choice, "text": read_text}


# --------------------------------------------------------------------------------------------------
# the other fields

def optional(row, key, kind, where):
    """row[key], which must be of the type `kind`; an empty one if it is missing."""
    if row.get(key) is None:
        return kind()
    return need(row, key, kind, where)


def is_strings(value):
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def read_strings(row, key, where):
    value = optional(row, key, list, where)
    if not is_strings(value):
        raise DataError(f"{where}field {key!r} is {value!r:.60}; expected a list of strings")
    return list(value)


def read_images(row, where, root):
    """The images, paths joined to the folder `root`; bytes of image files stay as they are."""
    images = need(row, "images", list, where)
    if not images or not all(isinstance(image, (str, bytes)) for image in images):
        raise DataError(f"{where}field 'images' is {images!r:.60}; expected a list of file names")
    return [os.path.join(root, im) if isinstance(im, str) else im for im in images]


def read_meta(row, images, where):
    meta = dict(optional(row, "meta", dict, where))
    if "question_boxes" in meta:
        boxes = need(meta, "question_boxes", list, where)
        meta["question_boxes"] = read_targets(boxes, images, where)
    return meta


def read_targets(targets, images, where):
    return [read_target(target, images, where) for target in targets]


def read_target(target, images, where):
    """A checked target -> {"image", "box"}, in pixels; with "polygon" if the row has one.

    The box of a polygon is the smallest one around it.
    """
    index = target.get("image", 0) if isinstance(target, dict) else None
    if type(index) is not int or index not in range(len(images)):
        expected = f"{{'image': 0..{len(images) - 1}, 'box': [x1, y1, x2, y2]}}"
        raise DataError(f"{where}box {target!r:.60} names no image of this row; "
                        f"expected {expected}")
    out = dict(target)
    if "norm_box" in target:
        x1, y1, x2, y2 = read_shares(out.pop("norm_box"), where)
        width, height = open_image(images[index], where, size_only=True)
        out["box"] = [x1 * width, y1 * height, x2 * width, y2 * height]
    if "norm_polygon" in target:
        corners = read_corners(target, "norm_polygon", where)
        del out["norm_polygon"]
        width, height = open_image(images[index], where, size_only=True)
        out["polygon"] = [[x * width, y * height] for x, y in corners]
        out["box"] = bounds(out["polygon"])
    elif "polygon" in target:
        out["polygon"] = read_corners(target, "polygon", where)
        out["box"] = bounds(out["polygon"])
    out["image"] = index
    out["box"] = need_numbers(out.get("box"), 4, where, "box")
    return out


def read_shares(box, where):
    """A norm_box. It may leave its image by as much as appendix/faults.py allows, 5 % of a side."""
    shares = need_numbers(box, 4, where, "norm_box")
    if not -0.05 <= min(shares) <= max(shares) <= 1.05:
        raise DataError(f"{where}norm_box is {box}; expected shares of the image's sides, 0 to 1 "
                        "(\"box\" is in pixels)")
    return shares


def read_corners(target, key, where):
    corners = need(target, key, list, where)
    if not corners:
        raise DataError(f"{where}{key} is []; expected its corners (x, y)")
    return [need_numbers(corner, 2, where, "corner") for corner in corners]


def bounds(corners):
    """The smallest box around the corners."""
    xs = [x for x, _ in corners]
    ys = [y for _, y in corners]
    return [min(xs), min(ys), max(xs), max(ys)]


# --------------------------------------------------------------------------------------------------
# output

def write_image(sample, i, stem):
    """Write image i of a sample to stem.jpg or stem.png -> the name of the file in its folder."""
    content = sample.images[i]
    kind = None
    if isinstance(content, bytes):
        kind = {b"\xff\xd8": "jpg", b"\x89P": "png"}.get(content[:2])
    path = f"{stem}.{kind or 'png'}"
    if kind:                            # as published: no pixel changes
        with open(path, "wb") as f:
            f.write(content)
    else:
        sample_image(sample, i).save(path)
    return os.path.basename(path)
