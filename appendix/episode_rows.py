"""An episode as a row of JSON: was it right, what is kept of it, and the way back.

    record(e)               the row, readable by a person
    restore(row, sample)    the episode again, without its tokens
"""
import re
from dataclasses import asdict

from zoom_rollout import Episode, Turn

# --------------------------------------------------------------------------------------------------
# right or wrong

def is_right(components, benchmark=None):
    """Right or wrong by an episode's reward components, whatever the recipe pays for it.

    A box is right from IoU 0.5 on (in VLM-R1's files: above it), anything else if wholly right.
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
    """The right answer as words."""
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
    """A point or a box as text: (12, 30.5)."""
    return f"({', '.join(f'{round(v, 1):g}' for v in values)})"


def token_texts(vlm, e):
    """The tokens after the prompt -> [[text, log-probability]].

    A stretch of tokens that the policy did not choose is one entry, with None.
    """
    texts = []
    given = []                                          # tokens of the present stretch
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
# there and back

def record(e):
    """An episode as one readable row of episodes.jsonl.

    The point of a turn is in the model's convention: times (sx, sy) of frames[0] it is in pixels
    of the stored image.
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
    """The episode of a row, as far as the summary and the report need it: without its tokens."""
    n = row["tokens"]
    turns = []
    for turn in row["turns"]:
        values = {}
        for name, value in turn.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        turns.append(Turn(**values))
    return Episode(
        sample, ids=[0] * n, completion_mask=[True] * n, logprobs=[0.0] * n, turns=turns,
        finish_reason=row["finish_reason"], frames=[tuple(frame) for frame in row["frames"]],
        reward_components=row["reward_components"], advantage=row["advantage"],
        behaviour=row["behaviour"], token_texts=row["token_texts"], shown_as=row["shown_as"])
