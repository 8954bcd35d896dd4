"""Published files -> rows of our JSONL: small readers, and the table CONVERTERS that names them.

A benchmark is read in two steps. Its row in CONVERTERS names both:
  read(path, root)              yields (where, row) for every row of a file (or of a folder, if
                                the row in CONVERTERS says so);
                                root: the folder that image paths are relative to
  to_row(row, where, layout)    makes one row of our JSONL (appendix/rows.py) of it
`where` begins every error message: "web.json, record 7: ". All functions raise DataError.

`layout` says how the file writes a box: order and unit, "xywh px" or "xyxy 0-1000". CONVERTERS
states it; the numbers never decide how they are read, but they may contradict it (`box_target`).

To add a benchmark: write to_row, add a line to CONVERTERS, and run
`python data.py convert NAME PATH OUT --check` (appendix/convert.py).
"""
import glob
import os
import pickle
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Callable

import numpy as np

from appendix.files import DataError, need, need_numbers, read_rows
from data import QUESTION_BOX


# --------------------------------------------------------------------------------------------------
# what the readers share

# The largest number of a box in a unit: above the first, at most the second.
LARGEST = {"px": (1.5, 1e9), "0-1": (-1, 1.5), "0-1000": (1.5, 1500)}


def box_target(box, name, layout, where, image=0):
    """Four numbers in a layout -> a target with "box" (pixels) or "norm_box" (0 to 1).

    name: the field that they come from, for the message if they cannot be in that layout.
    """
    order, unit = layout.split()
    if box is None:
        raise DataError(f"{where}field {name!r} is missing; expected a box of four numbers")
    a, b, c, d = need_numbers(box, 4, where, name)
    low, high = LARGEST[unit]
    if not low < max(a, b, c, d) <= high:
        raise DataError(f"{where}{name} {box} cannot be {layout}; expected another file, "
                        "or another NAME (python data.py convert --help)")
    corners = [a, b, c, d]
    if order == "xywh":
        corners = [a, b, a + c, b + d]
    if unit == "px":
        return {"image": image, "box": corners}
    if unit == "0-1000":
        corners = [v / 1000 for v in corners]
    return {"image": image, "norm_box": corners}


def option_index(answer, options, where):
    """The place of the right option: found by its text, else by its letter, "B" or "(B)"."""
    said = answer.strip()
    for i, option in enumerate(options):
        if option.lower() == said.lower():
            return i
    letter = re.fullmatch(r"\(?([A-Z])\)?", said.upper())
    if letter:
        index = ord(letter[1]) - ord("A")
        if index < len(options):
            return index
    raise DataError(f"{where}answer {answer!r:.60} is none of the options {options}")


def used_key(row, *keys):
    """The first of these keys that the row uses: copies of one benchmark differ in their names.

    If it uses none of them, it is the first key, by which the field is then reported missing.
    """
    for key in keys:
        if row.get(key) is not None:
            return key
    return keys[0]


def image_under(row, where, *keys):
    """The image of a row under the first of these keys that it uses.

    It is a path, the bytes of a file, or, in parquet files, a dict that holds them.
    """
    key = used_key(row, *keys)
    image = row.get(key)
    if isinstance(image, (str, bytes, dict)):
        return image
    found = "missing" if image is None else f"{image!r:.60}"
    raise DataError(f"{where}field {key!r} is {found}; expected an image")


def published_rows(path, root):
    return read_rows(path)


# --------------------------------------------------------------------------------------------------
# ViGoRL

# Options begin on a line of their own: "A. yes", "A) yes", "(A) yes".
OPTIONS_BEGIN = re.compile(r"\n(?:Answer Choices:\n)?(?=\(?A[.)] )")
OPTION = re.compile(r"^\(?[A-Z][.)] (.*)$", re.M)
FOUR_NUMBERS = re.compile(r"\(\s*(-?\d+),\s*(-?\d+),\s*(-?\d+),\s*(-?\d+)\s*\)")


def from_vigorl(row, where, layout="xyxy px"):
    """RL rows (problem, answer, images) and evaluation rows (image, conversations).

    The answer is the text or letter of an option, a box "(x1, y1, x2, y2)" in which to point,
    or a text, such as a web action.
    """
    if "conversations" in row or "image" in row and "problem" not in row:
        row = as_problem(row, where)
    text = need(row, "problem", str, where).replace("<image>", "").strip()
    answer = need(row, "answer", str, where)
    images = need(row, used_key(row, "images", "image_paths"), list, where)
    out = {"id": row.get("id"), "images": images}

    head, *tail = OPTIONS_BEGIN.split(text, maxsplit=1)
    if tail:
        options = [option.strip() for option in OPTION.findall(tail[0])]
        out["question"] = head.removeprefix("Question: ")
        out["answer_type"] = "choice"
        out["options"] = options
        out["answer"] = option_index(answer, options, where)
        return out

    box = FOUR_NUMBERS.fullmatch(answer.strip())
    if box:
        corners = [int(v) for v in box.groups()]
        out["question"] = text.removeprefix("Description: ")
        out["answer_type"] = "point"
        out["targets"] = [box_target(corners, "answer", layout, where)]
        return out

    out["question"] = text
    out["answer_type"] = "text"
    out["answer"] = [answer]
    if text.startswith("OBJECTIVE:"):
        out["meta"] = {"matcher": "web_action"}
    return out


def as_problem(row, where):
    """An evaluation row (a question and its answer as a conversation) as an RL row."""
    said = need(row, "conversations", list, where)
    if len(said) != 2:
        raise DataError(f"{where}field 'conversations' has {len(said)} entries; "
                        "expected a question and its answer")
    problem = need(said[0], "value", str, where)
    answer = need(said[1], "value", str, where)
    images = [image_under(row, where, "image")]
    return {**row, "problem": problem, "answer": answer, "images": images}


# --------------------------------------------------------------------------------------------------
# V*

def vstar_rows(path, root):
    """test_questions.jsonl, or the folder: a .json file beside each .jpg.

    Of the four folders of the benchmark the two that are evaluated are read.
    """
    files = [path]
    if os.path.isdir(path):
        files = []
        for folder in (path, os.path.join(path, "direct_attributes"),
                       os.path.join(path, "relative_position")):
            files += sorted(glob.glob(os.path.join(glob.escape(folder), "*.json")))
    for file in files:
        image = os.path.splitext(os.path.abspath(file))[0] + ".jpg"
        category = os.path.basename(os.path.dirname(image))
        known = {"image": os.path.relpath(image, root), "category": category}
        for where, row in read_rows(file):
            yield where, {**known, **row} if isinstance(row, dict) else row


def from_vstar(row, where, layout):
    """The .jsonl has shuffled, lettered options; in the .json files the first one is right."""
    out = {
        "id": row.get("question_id"),
        "images": [row["image"]],
        "category": [row.get("category")],
    }
    if "text" in row or "label" in row:
        text = need(row, "text", str, where)
        label = need(row, "label", str, where)
        asked = from_vigorl({"problem": text, "answer": label, "images": []}, where)
        if asked["answer_type"] != "choice":
            raise DataError(f"{where}text is {text!r:.60}; "
                            "expected a question with options (A), (B), ...")
        return {**asked, **out}
    boxes = need(row, "bbox", list, where)
    out["question"] = need(row, "question", str, where)
    out["answer_type"] = "choice"
    out["options"] = need(row, "options", list, where)
    out["answer"] = 0
    out["meta"] = {"evidence": [box_target(box, "bbox", layout, where) for box in boxes]}
    return out


# --------------------------------------------------------------------------------------------------
# BLINK, SAT, RoboSpatial

def from_blink(row, where, layout):
    """idx "val_Counting_7", prompt, choices, image_1 to image_4, answer "(B)" or "hidden"."""
    text = need(row, used_key(row, "prompt", "query"), str, where)
    text = re.sub(r"<img [^>]*>", "", text)
    head, _, tail = text.partition("\nSelect from the following choices")
    if "choices" in row:
        options = [str(option) for option in need(row, "choices", list, where)]
    else:
        options = re.findall(r"^\([A-Z]\) (.*\S)", tail, re.M)
    answer = None                                   # hidden, as in the test split
    if row.get("answer") not in (None, "", "hidden"):
        answer = option_index(need(row, "answer", str, where), options, where)
    images = row.get("images")
    if not images:
        image_under(row, where, "image_1")          # there is one at least
        images = [row[f"image_{i}"] for i in (1, 2, 3, 4) if row.get(f"image_{i}")]
    name = str(row.get("idx", "")).rpartition("_")[0]       # val_Counting
    split, _, task = name.partition("_")
    return {
        "id": row.get("idx"),
        "images": images,
        "question": head.strip(),
        "answer_type": "choice",
        "options": options,
        "answer": answer,
        "category": [category for category in (task, split) if category],
    }


def from_sat(row, where, layout):
    """Questions about one or two views of a room. Copies differ in the names of their fields."""
    published = need(row, used_key(row, "answers", "answer_choices"), list, where)
    options = [clean_sat_option(option) for option in published]
    answer = clean_sat_option(need(row, "correct_answer", str, where))
    question = need(row, "question", str, where)
    kind = need(row, "question_type", str, where)
    if kind == "ego_movement":                      # the question takes this for known
        question = "The first image shows the start of a video, the second its end. " + question
    return {
        "images": need(row, used_key(row, "images", "image_bytes", "img_paths"), list, where),
        "question": question,
        "answer_type": "choice",
        "options": options,
        "answer": option_index(answer, options, where),
        "category": [kind],
    }


def clean_sat_option(option):
    return str(option).replace(" in the first frame", "").strip()


def from_robospatial(row, where, layout):
    """Yes or no; or, in category "context", a free place, given by its corners on 0-1."""
    answer = need(row, "answer", str, where)
    kind = need(row, "category", str, where)
    text = need(row, "question", str, where)
    out = {
        "images": [image_under(row, where, "img")],
        "question": re.split(r"\s+(?:Answer yes or no|Your answer should be formatted)", text)[0],
        "category": [kind],
    }
    if kind != "context":
        out["answer_type"] = "choice"
        out["options"] = ["yes", "no"]
        out["answer"] = option_index(answer, ["yes", "no"], where)
        return out
    corners = corners_of_text(answer, where)
    out["answer_type"] = "point"
    out["targets"] = [{"image": 0, "norm_polygon": in_order(corners).tolist()}]
    if len(corners) < 3:
        out["meta"] = {"published_wrong": "fewer than three corners"}
    return out


def corners_of_text(answer, where):
    """"[(0.25, 0.5), (.75, 1)]" -> array (n, 2)."""
    pairs = re.findall(r"\(\s*(-?\d*\.?\d+)\s*,\s*(-?\d*\.?\d+)\s*\)", answer)
    corners = np.array(pairs, float).reshape(-1, 2)
    if len(corners) == 0 or not (abs(corners - 0.5) <= 1).all():
        raise DataError(f"{where}answer is {answer!r:.60}; expected corners (x, y) on 0-1")
    return corners


def in_order(corners):
    """Corners (n, 2), published in any order, sorted by their angle around their mean."""
    dx, dy = (corners - corners.mean(0)).T
    return corners[np.arctan2(dy, dx).argsort()]


# --------------------------------------------------------------------------------------------------
# one image, one box: LISA- and LLMSeg-Grounding, VLM-R1, RefCOCO, ScreenSpot

def from_one_box(row, where, layout, keys="image sent bbox"):
    """One image, one question, one box. Of nested boxes the first four numbers count.

    keys: how this layout calls the three. Copies of it may use the names of another one.
    """
    image, question, box_key = keys.split()
    box_key = used_key(row, box_key, "bbox", "boxes", "solution")
    box = row.get(box_key)
    if isinstance(box, list) and box and all(isinstance(part, list) for part in box):
        box = sum(box, [])[:4]
    question_key = used_key(row, question, "instruction", "sent", "problem", "question")
    return {
        "id": row.get("id"),
        "images": [image_under(row, where, image, "image", "img_filename", "image_path")],
        "question": need(row, question_key, str, where),
        "answer_type": "box",
        "targets": [box_target(box, box_key, layout, where)],
        "category": [row["split"]] if row.get("split") else [],
    }


# UniVG-R1's zero-shot files, and VLM-R1's.
from_lisa = partial(from_one_box, keys="image_path instruction boxes")
from_llmseg = partial(from_one_box, keys="image_path question bbox")
from_vlm_r1 = partial(from_one_box, keys="image problem solution")


SCREENSHOT_KEYS = "img_filename instruction bbox"


def from_screenspot(row, where, layout="xywh px"):
    """ScreenSpot and ScreenSpot-v2: point at what is named. The category is the platform."""
    file = need(row, used_key(row, "img_filename", "file_name"), str, where)
    out = from_one_box(row, where, layout, SCREENSHOT_KEYS)
    out["answer_type"] = "point"
    platform = file.split("_")[0].replace("pc", "desktop")
    out["category"] = [platform, str(row.get("data_type"))]
    return out


def from_screenspot_pro(row, where, layout):
    """ScreenSpot-Pro. A box of it begins at y = -1: boxes are clamped to the size of the image."""
    out = from_one_box(row, where, layout, SCREENSHOT_KEYS)
    out["answer_type"] = "point"
    width, height = need_numbers(row.get("img_size"), 2, where, "img_size")
    x1, y1, x2, y2 = out["targets"][0]["box"]
    box = [clamp(x1, width), clamp(y1, height), clamp(x2, width), clamp(y2, height)]
    out["targets"] = [{"image": 0, "box": box}]
    out["category"] = [row.get("group"), row.get("application"), row.get("ui_type")]
    return out


def clamp(v, high):
    return min(max(v, 0), high)


# --------------------------------------------------------------------------------------------------
# RefCOCO, RefCOCO+, RefCOCOg

class PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers. A pickle that asks for anything else asks to run code."""
    def find_class(self, module, name):
        raise DataError(f"it asks for {module}.{name}; "
                        "expected nothing but lists, dicts, strings and numbers")


def load_plain_pickle(path):
    try:
        with open(path, "rb") as f:
            return PlainUnpickler(f, encoding="latin1").load()      # written by Python 2
    except Exception as e:                          # a broken pickle may raise anything
        raise DataError(f"cannot read {path}: {e}") from None


def refcoco_rows(path, root):
    """refs(...).p with instances.json beside it -> a row per sentence.

    The file names in the pickle exist nowhere; the images have those of instances.json.
    """
    refs = load_plain_pickle(path)
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), "instances.json")
    found = read_rows(beside)
    instances_where, instances = found[0] if found else (f"{beside}: ", None)
    images = by_id(instances, "images", instances_where)
    annotations = by_id(instances, "annotations", instances_where)

    for i, ref in enumerate(need({"refs": refs}, "refs", list, f"{path}: ")):
        where = f"{path}, ref {i + 1}: "
        image = images.get(need(ref, "image_id", int, where))
        annotation = annotations.get(need(ref, "ann_id", int, where))
        if not image or not annotation:
            raise DataError(f"{where}{beside} lacks its {'box' if image else 'image'}; "
                            "expected the one published with this file")
        for sentence in need(ref, "sentences", list, where):
            yield where, {
                "id": f"{ref.get('ref_id')}_{need(sentence, 'sent_id', int, where)}",
                "sent": sentence.get("sent"),
                "bbox": annotation.get("bbox"),
                "image": image.get("file_name"),
                "split": ref.get("split"),
            }


def by_id(instances, key, where):
    """{id: entry} of a list in instances.json"""
    entries = need(instances, key, list, where)
    return {need(entry, "id", int, where): entry for entry in entries}


def refcoco_parquet_rows(path, root):
    """lmms-lab's copy: a row is an object with all its sentences -> a row per sentence.

    Without the bytes of an image, its COCO name follows from its file name.
    """
    for where, row in published_rows(path, root):
        file = need(row, "file_name", str, where)
        coco_name = re.sub(r"_\d+\.jpg$", ".jpg", file)
        for i, sentence in enumerate(need(row, "answer", list, where)):
            yield where, {
                "id": f"{row.get('question_id')}_{i}",
                "sent": sentence,
                "bbox": row.get("bbox"),
                "image": row.get("image") or coco_name,
            }


# --------------------------------------------------------------------------------------------------
# several images: UniVG-R1, MGrounding-630k, MIG-Bench

ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]
# "2nd image", "image-2", "second image"
IMAGE_NAME = re.compile(
    r"(\d+)(?:st|nd|rd|th)? image\b|image[ -](\d+)|(" + "|".join(ORDINALS) + r") image\b")
# The image that a task of MIG-Bench asks about, whatever the words.
IMPLIED_IMAGE = {"region": 0, "correspondence": 1, "diff": 1, "view_diff": 1, "refer_grounding": 1}


def asked_image(text, n):
    """The image, 0-based, that a text about n images names last; None if it names none of them."""
    for number, hyphenated, ordinal in reversed(IMAGE_NAME.findall(text.lower())):
        if ordinal:
            index = ORDINALS.index(ordinal)
        else:
            index = int(number or hyphenated) - 1
        if 0 <= index < n:
            return index
    return None


def from_univg(row, where, layout="xyxy 0-1000"):
    """UniVG-R1's RL rows and MIG-Bench. The task (MIG-Bench) or the words tell the box's image."""
    question = need(row, "question", str, where).replace("<image>", "").strip()
    paths = need(row, "images", list, where)
    task = row.get("task")
    said = question
    if task == "group_grounding":
        said = str(row.get("additional_info"))
    image = IMPLIED_IMAGE.get(str(task), asked_image(said, len(paths)))

    meta = {}
    if image is None:                               # a guess, and marked as one
        image = len(paths) - 1
        if len(paths) > 1:
            meta["image_unnamed"] = True
    place = box_target(row.get("answer"), "answer", layout, where, image)
    x1, y1, x2, y2 = place["norm_box"]
    if not (x1 < x2 and y1 < y2):
        meta["published_wrong"] = "its box is inverted"
    quoted = quoted_boxes(question, len(paths))
    if quoted:
        meta["question_boxes"] = quoted
    return {
        "id": row.get("id"),
        "images": paths,
        "question": question,
        "answer_type": "box",
        "category": [task] if task else [],
        "targets": [place],
        "meta": meta,
    }


def quoted_boxes(question, n):
    """The boxes that a question about n images quotes, as targets.

    They are on 0-1000 in all these files, and lie in the image named last before them.
    """
    targets = []
    for quote in QUESTION_BOX.finditer(question):
        image = asked_image(question[:quote.start()], n) or 0
        targets.append({"image": image, "norm_box": [int(v) / 1000 for v in quote.groups()]})
    return targets


def mgrounding_rows(path, root):
    """MGrounding-630k: of a conversation, every question whose reply is a box -> UniVG-R1's rows.

    The reply also names the image.
    """
    for where, row in published_rows(path, root):
        turns = need(row, "conversations", list, where)
        said = [need(turn, "value", str, where) for turn in turns]
        boxes = 0
        for k, (question, reply) in enumerate(zip(said[::2], said[1::2])):
            box = re.search(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)", reply)
            if not box:
                continue
            boxes += 1
            yield where, {
                "id": f"{row.get('id')}_{k}",
                "images": row.get("images"),
                "question": question,
                "task": "group_grounding",
                "answer": [int(v) for v in box.groups()],
                "additional_info": reply,
            }
        if boxes == 0:
            raise DataError(f"{where}no reply of the conversation holds a box (x1,y1),(x2,y2)")


# --------------------------------------------------------------------------------------------------
# frames of a video: ReVOS, ReasonVOS

def revos_rows(path, root):
    """ReVOS: `frames` are places in the sorted list of a video's files -> ReasonVOS's rows."""
    for where, row in published_rows(path, root):
        video = need(row, "video_id", str, where)
        frames = need(row, "frames", list, where)
        files = frame_files(os.path.join(root, video))
        paths = []
        for i in frames:
            name = files[i] if i in range(len(files)) else f"(frame {i})"
            paths.append(os.path.join(video, name))
        yield where, {**row, "image_list": paths}


def frame_files(folder):
    """The numbered files of a folder, in the order of their numbers."""
    if not os.path.isdir(folder):
        return []
    numbered = []
    for name in os.listdir(folder):
        number = re.search(r"\d+", name)
        if number and not name.startswith("."):
            numbered.append((int(number[0]), name))
    return [name for _, name in sorted(numbered)]


def from_video(row, where, layout):
    """The question is about the third frame. Its box is a list or a string of numbers."""
    paths = need(row, "image_list", list, where)
    boxes = need(row, "bbox_list", list, where)
    if len(paths) < 3 or len(boxes) < 3:
        raise DataError(f"{where}{len(paths)} frames and {len(boxes)} boxes; "
                        "expected three or more: the question is about the third")
    box = boxes[2]
    if isinstance(box, str):
        box = [float(v) for v in re.findall(r"-?\d+(?:\.\d+)?", box)]
    place = box_target(box, "bbox_list", layout, where, image=2)
    return {
        "images": paths,
        "question": ("The images are frames of one video, in order. Locate in the third image: "
                     + need(row, "question", str, where)),
        "answer_type": "box",
        "targets": [place],
    }


# --------------------------------------------------------------------------------------------------
# the table

@dataclass(frozen=True)
class Converter:
    """How one published file is read, see the top of this file.

    published: the number of rows that it should have, by category; under "" the possible totals.
    """
    read: Callable
    to_row: Callable
    layout: str                 # order and unit of its coordinates; "" if it has none
    published: dict = field(default_factory=dict)
    split: str = ""             # the category that `published` is about; "": all rows
    # Endings of the files that are taken from a folder; () if `read` takes the folder itself.
    endings: tuple = (".json", ".jsonl", ".parquet")


VSTAR = {"direct_attributes": 115, "relative_position": 76}
BLINK = {                       # of the val split
    "Art_Style": 117, "Counting": 120, "Forensic_Detection": 132, "Functional_Correspondence": 130,
    "IQ_Test": 150, "Jigsaw": 150, "Multi-view_Reasoning": 133, "Object_Localization": 122,
    "Relative_Depth": 124, "Relative_Reflectance": 134, "Semantic_Correspondence": 139,
    "Spatial_Relation": 143, "Visual_Correspondence": 172, "Visual_Similarity": 135,
}
SAT = {"": (150, 4000, 4001)}   # real test; synthetic val
ROBOSPATIAL = {"compatibility": 105, "configuration": 123, "context": 122}
SCREENSPOT = {"mobile": 502, "desktop": 334, "web": 436}
SCREENSPOT_V2 = {"mobile": 501, "desktop": 334, "web": 437}
SCREENSPOT_PRO = {
    "Dev": 299, "Creative": 341, "CAD": 261, "Scientific": 254, "Office": 230, "OS": 196,
}
MIG = {
    "region": 1203, "common_object": 816, "object_tracking": 550, "diff": 528,
    "group_grounding": 499, "multi_view": 288, "correspondence": 117, "reasoning": 101,
    "refer_grounding": 99, "view_diff": 94,
}
MIG_REVISED = {**MIG, "common_object": 815, "group_grounding": 485, "reasoning": 97}
REFCOCO = {                     # RefCOCO, RefCOCO+, RefCOCOg
    "val": (10834, 10758, 4896), "testA": (5657, 5726, 0), "testB": (5095, 4889, 0),
    "test": (0, 9602),
}

CONVERTERS = {
    "vstar": Converter(vstar_rows, from_vstar, "xywh px", VSTAR, endings=()),
    "blink": Converter(published_rows, from_blink, "", BLINK, split="val"),
    "sat": Converter(published_rows, from_sat, "", SAT),
    "robospatial": Converter(published_rows, from_robospatial, "xy 0-1", ROBOSPATIAL),
    "screenspot": Converter(published_rows, from_screenspot, "xywh px", SCREENSPOT),
    "screenspot_parquet": Converter(published_rows, from_screenspot, "xyxy 0-1", SCREENSPOT),
    "screenspot_v2": Converter(published_rows, from_screenspot, "xywh px", SCREENSPOT_V2),
    "screenspot_pro": Converter(published_rows, from_screenspot_pro, "xyxy px", SCREENSPOT_PRO),
    "vigorl": Converter(published_rows, from_vigorl, "xyxy px"),
    "univg-r1": Converter(published_rows, from_univg, "xyxy 0-1000"),
    "mgrounding": Converter(mgrounding_rows, from_univg, "xyxy 0-1000"),
    "mig_bench": Converter(published_rows, from_univg, "xyxy 0-1", MIG),
    "mig_bench_revised": Converter(published_rows, from_univg, "xyxy 0-1000", MIG_REVISED),
    "lisa": Converter(published_rows, from_lisa, "xyxy px", {"": (200, 779)}),
    "llmseg": Converter(published_rows, from_llmseg, "xyxy px"),
    "revos": Converter(revos_rows, from_video, "xyxy px"),
    "reasonvos": Converter(published_rows, from_video, "xyxy px", {"": (458,)}),
    "refcoco": Converter(refcoco_rows, from_one_box, "xywh px", REFCOCO, endings=(".p",)),
    "refcoco_parquet": Converter(refcoco_parquet_rows, from_one_box, "xywh px"),
    "vlm-r1": Converter(published_rows, from_vlm_r1, "xyxy px"),
}


def from_papers(row, where):
    """A row of ViGoRL's or UniVG-R1's RL files -> ours; any other row as it is.

    ViGoRL's rows have "problem" or "conversations"; UniVG-R1's have "answer" and "images".
    """
    if "problem" in row or "conversations" in row:
        return from_vigorl(row, where)
    if "answer" in row and "images" in row:
        return from_univg(row, where)
    return row
