"""An episode as a row of JSON, and back.

    verdict(e)              was the answer right?
    record(e)               episode -> row, readable by a person
    restore(row, sample)    row -> episode, without its tokens
"""
import re
from dataclasses import asdict

from zoom_rollout import Episode, Turn

# --------------------------------------------------------------------------------------------------
# right or wrong

def is_right(components, benchmark=None):
    """Is an episode right? Decided by its reward components, the same way for every reward recipe.

    A box is right if its IoU is 0.5 or more (in the files of VLM-R1: more than 0.5). Any other
    answer is right if its accuracy is 1. The 1e-6 allows for rounding.
    """
    if "iou" not in components:
        return components["accuracy"] >= 1 - 1e-6
    if benchmark == "vlm-r1":
        return components["iou"] > 0.5 + 1e-6
    return components["iou"] >= 0.5 - 1e-6


def right(e):
    return is_right(e.reward_components, e.sample.meta.get("benchmark"))


def verdict(e):
    """-> "right" or "wrong"; "" for an episode without a score, or whose right answer is hidden."""
    if "accuracy" not in e.reward_components or e.reward_components.get("hidden"):
        return ""
    return "right" if right(e) else "wrong"


# --------------------------------------------------------------------------------------------------
# in words

def gold_words(sample):
    """The right answer ("gold") as words."""
    if sample.targets:
        boxes = []
        for target in sample.targets:
            image = f" in image {target['image'] + 1}" if len(sample.images) > 1 else ""
            boxes.append(numbers_text(target["box"]) + image)
        return " or ".join(boxes)
    if sample.answer is None:
        return "hidden"
    if sample.answer_type == "choice":
        return sample.options[sample.answer]
    return " or ".join(sample.answer)


def numbers_text(values):
    """A point or a box as text, such as "(12, 30.5)"."""
    return f"({', '.join(f'{round(v, 1):g}' for v in values)})"


def token_texts(vlm, e):
    """The tokens between the first and the last that the policy chose -> [[text, log-probability]].

    Neighbouring tokens that the policy did not choose become one entry, whose log-probability is
    None. The tokens of an image in it become the text "[image]".
    """
    texts = []
    given = []                                          # tokens not chosen, since the last chosen
    first = e.completion_mask.index(True)
    for i in range(first, len(e.ids)):
        if not e.completion_mask[i]:
            given.append(e.ids[i])
            continue
        if given:
            text = re.sub(r"(?:<\|image_pad\|>)+", "[image]", vlm.text(given))
            texts.append([text, None])
            given = []
        texts.append([vlm.text([e.ids[i]]), round(e.logprobs[i], 4)])
    return texts


# --------------------------------------------------------------------------------------------------
# episode -> row, row -> episode

def record(e):
    """An episode as one readable row of episodes.jsonl.

    The point of a turn is in the coordinates that the model wrote. Multiplied by (sx, sy), the
    first two numbers of frames[0], it is in pixels of the stored image.
    """
    return {
        "id": e.sample.id,
        "question": e.sample.question,
        "options": e.sample.options,
        "answer": gold_words(e.sample),                 # the right one
        "turns": [asdict(turn) for turn in e.turns],
        "finish_reason": e.finish_reason,
        "verdict": verdict(e),
        "reward_components": e.reward_components,
        "advantage": e.advantage,
        "tokens": sum(e.completion_mask),               # tokens that the policy chose
        "behaviour": e.behaviour,
        "frames": e.frames,
        "shown_as": e.shown_as,
        "token_texts": e.token_texts,
    }


def restore(row, sample):
    """The episode of a row, with all that the summary and the report need.

    The row has only the number of tokens that the policy chose. The episode gets that many, with
    ids and log-probabilities of 0.
    """
    n = row["tokens"]
    turns = []
    for turn in row["turns"]:
        values = {}
        for name, value in turn.items():                # JSON has turned tuples into lists
            values[name] = tuple(value) if isinstance(value, list) else value
        turns.append(Turn(**values))
    return Episode(
        sample, ids=[0] * n, completion_mask=[True] * n, logprobs=[0.0] * n, turns=turns,
        finish_reason=row["finish_reason"], frames=[tuple(frame) for frame in row["frames"]],
        reward_components=row["reward_components"], advantage=row["advantage"],
        behaviour=row["behaviour"], token_texts=row["token_texts"], shown_as=row["shown_as"])
