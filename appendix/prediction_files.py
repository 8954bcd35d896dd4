"""The files in which people have predictions -> {id of a question: text}.

    --form            what the file holds                     how a text finds its question
    id                rows {"id", "text"}                     by the id
    dict              {id: text}                              by the id
    order             rows {"text"}, or texts                 the n-th text answers question n
    question          rows {"image", "question", "text"}      by the image and the question
    screenspot-pro    what its evaluator writes: "details"    the same; "pred" is the answer
    vlm-r1            what its evaluator writes: "results"    the same

A form is named by the flag and never guessed. Every row is checked: half of a file scored by
mistake would look like a bad model. All functions raise DataError.
"""
import os
from dataclasses import dataclass

from appendix import files
from appendix.evaluation_run import NO_ANSWER
from appendix.files import DataError, need

# What an evaluator has written holds the questions that it asked, and no others are scored.
PUBLISHED_FORMS = ("screenspot-pro", "vlm-r1")


def read_predictions(path, samples, form="id"):
    """A file of predictions -> {id: text}. form: a key of FORMS."""
    known = {s.id for s in samples}
    texts = {}
    for where, name, text in FORMS[form](path, samples):
        if name not in known:
            raise DataError(f"{where}id {name!r} is not in the data; expected one of its "
                            f"{len(known)} ids, such as {samples[0].id!r}")
        if name in texts:
            raise DataError(f"{where}id {name!r} has a prediction already; "
                            "expected one row per id")
        texts[name] = text
    if not texts:
        raise DataError(f"{path} holds no predictions")
    return texts


# --------------------------------------------------------------------------------------------------
# by the id, or by the order: (path, samples) -> (where, id, text) of each row

def by_id(path, samples):
    for where, row in files.read_rows(path):
        if not isinstance(row, dict) or row.get("id") is None:
            others = ", ".join(form for form in FORMS if form != "id")
            raise DataError(f"{where}field 'id' is missing; expected rows {{\"id\", \"text\"}}, or "
                            f"the --form of this file ({others})")
        name = need(row, "id", (str, int), where)
        yield where, str(name), need(row, "text", str, where)


def by_key(path, samples):
    for where, row in files.read_rows(path):
        if not isinstance(row, dict):
            raise DataError(f"{where}{row!r:.60}; expected {{id: text}}")
        for name in row:
            yield where, name, need(row, name, str, where)


def by_order(path, samples):
    rows = files.read_rows(path)
    if len(rows) != len(samples):
        raise DataError(f"{path} holds {len(rows)} texts for {len(samples)} questions; "
                        "--form order needs a text for each")
    for (where, row), s in zip(rows, samples):
        text = row if isinstance(row, str) else need(row, "text", str, where)
        yield where, s.id, text


# --------------------------------------------------------------------------------------------------
# by the image and the question

@dataclass
class Said:
    """A text, and what its file says about the question."""
    where: str
    text: str
    image: str
    question: str
    box: object = None          # the right box (x1, y1, x2, y2), if the file repeats it


def by_question(path, samples):
    said = []
    for where, row in files.read_rows(path):
        text = need(row, "text", str, where)
        if "image" not in row and isinstance(row.get("images"), list):
            row = {**row, "image": next(iter(row["images"]), None)}     # the first one
        image = need(row, "image", str, where)
        said.append(Said(where, text, image, need(row, "question", str, where)))
    return match(said, samples)


def by_screenspot_pro(path, samples):
    """A row has the model's text, and the point that its evaluator read in it, which is scored."""
    said = []
    for where, row in rows_under("details", path):
        image = need(row, "img_path", str, where)
        question = need(row, "prompt_to_evaluate", str, where)
        answer = NO_ANSWER                              # "pred" is null: none could be read
        if row.get("pred") is not None:
            x, y = files.need_numbers(row["pred"], 2, where, "pred")
            answer = f"\n<answer> ({x:.12f}, {y:.12f}) </answer>"
        text = f"{row.get('raw_response') or ''}{answer}"
        said.append(Said(where, text, image, question, row.get("bbox")))
    return match(said, samples)


def by_vlm_r1(path, samples):
    said = []
    for where, row in rows_under("results", path):
        text = need(row, "model_output", str, where)
        image = need(row, "image", str, where)
        question = need(row, "question", str, where)
        said.append(Said(where, text, image, question, row.get("ground_truth")))
    return match(said, samples)


def rows_under(key, path):
    """The rows of a JSON file that holds one object, in the list under this key."""
    found = files.read_rows(path)
    where, report = found[0] if found else (f"{path}: ", None)
    rows = need(report, key, list, where)
    return [(f"{path}, {key} {i}: ", row) for i, row in enumerate(rows, 1)]


def match(said, samples):
    """list[Said] -> (where, id, text), for the question with the same image and the same words.

    Of questions that have both in common, the one with the box that the file repeats is taken, then
    the one whose image path agrees in more folders, then the first.
    """
    waiting = {}                                        # (file name, words): [samples]
    for s in samples:
        if not isinstance(s.images[0], str):
            raise DataError(f"sample {s.id} has an image without a file name; expected another "
                            "--form, because this one finds a question by its image")
        waiting.setdefault(name_of(s.images[0], s.question), []).append(s)
    for a in said:
        name = name_of(a.image, a.question)
        if name not in waiting:
            raise DataError(f"{a.where}the data asks no {a.question!r:.60} about {name[0]}; its "
                            f"first question is {samples[0].question!r:.60} about "
                            f"{os.path.basename(samples[0].images[0])}")
        if not waiting[name]:
            raise DataError(f"{a.where}the question {a.question!r:.60} about {name[0]} has a "
                            "prediction already; expected one row per question")
        best = max(waiting[name], key=lambda s: likeness(a, s))
        waiting[name].remove(best)
        yield a.where, best.id, a.text


def name_of(image, question):
    return folders_of(image)[-1], " ".join(question.split())


def folders_of(path):
    """The parts of a path, of any system: the last one is the file name."""
    return path.replace("\\", "/").split("/")


def likeness(a, s):
    """(does the box agree, how many of the last parts of the image's path agree)"""
    same_box = False
    if files.is_numbers(a.box, 4) and s.targets:
        same_box = all(abs(u - v) <= 1 for u, v in zip(a.box, s.targets[0]["box"]))
    parts = 0
    for ours, theirs in zip(reversed(folders_of(s.images[0])), reversed(folders_of(a.image))):
        if ours != theirs:
            break
        parts += 1
    return same_box, parts


FORMS = {
    "id": by_id,
    "dict": by_key,
    "order": by_order,
    "question": by_question,
    "screenspot-pro": by_screenspot_pro,
    "vlm-r1": by_vlm_r1,
}
