"""What the tiny model can do before any warm start: plain questions about held-out scenes.

    python -m appendix.skills                       # the shipped model
    python -m appendix.skills --model FOLDER --n 500

Every skill asks the question of a lesson (appendix/lessons.py) about scenes of the test split,
which no lesson has shown. The replies are greedy.
"""
import functools
import random
import re
from dataclasses import dataclass

import torch

import data
import model
import rewards
import zoom_rollout
from appendix import lessons, prefix, run
from zoom_rollout import TurnOptions


@dataclass
class Config:
    model: str = "tiny"         # name of a model or checkpoint folder
    n: int = 200                # questions per skill
    seed: int = 0               # random seed of the scenes


# --------------------------------------------------------------------------------------------------
# when a reply is right: (reply, the lesson's answer) -> bool; both in the model's coordinates

def same(reply, answer):
    return reply == answer


def near_enough(reply, answer):
    """A point within 8 pixels of the center in x and in y, of the image as it is fed.

    As fed, the radius of a medium object is 9 to 13 pixels, that of a hard one 7 to 11.
    """
    said, right = integers(reply), integers(answer)
    return len(said) == 2 and all(abs(s - r) <= 8 for s, r in zip(said, right))


def overlaps(reply, answer):
    """A box with an IoU of 0.5 or more, and the same image if one is named."""
    said, right = integers(reply), integers(answer)
    if len(said) != len(right):
        return False
    return said[:-4] == right[:-4] and rewards.iou(said[-4:], right[-4:]) >= 0.5


def same_end(reply, answer):
    """The number or word at the end."""
    return reply.rpartition(": ")[2] == answer.rpartition(": ")[2]


def integers(text):
    return [int(digits) for digits in re.findall(r"\d+", text)]


# --------------------------------------------------------------------------------------------------
# the skills

# name: (lesson, difficulty of the scenes, when a reply is right)
SKILLS = {
    "point": (lessons.point_to, "medium", near_enough),
    "point, hard scenes": (lessons.point_to, "hard", near_enough),
    "read a crop": (lessons.read_crop, "medium", same),
    "how many of a color or shape, after naming them": (lessons.list_alike, "hard", same_end),
    "on which side": (lessons.side_of, "medium", same_end),
    "box": (lessons.box_object, "medium", overlaps),
    "box, hard scenes": (lessons.box_object, "hard", overlaps),
    "box in one of several images": (lessons.box_in_one_image, "medium", overlaps),
    "box what image 1 shows": (lessons.box_what_is_shown, "medium", overlaps),
    "which image has what image 1 shows": (lessons.name_then_image, "medium", overlaps),
}


def measure(vlm, n=200, seed=0):
    """-> {skill: share of n questions that are answered right}"""
    return {name: accuracy(vlm, name, n, seed) for name in SKILLS}


def accuracy(vlm, name, n=200, seed=0):
    ask, level, is_right = SKILLS[name]
    rng = random.Random(f"{name}/{seed}")
    draw = functools.partial(data.split_scene, rng, "test", **data.DIFFICULTY[level])
    questions = []
    answers = []
    for _ in range(n):
        question, answer = ask_lesson(ask, vlm, rng, draw)
        questions.append(question)
        answers.append(answer)
    replies = answer_greedily(vlm, questions)
    return sum(is_right(*pair) for pair in zip(replies, answers)) / n


def ask_lesson(ask, vlm, rng, draw):
    """The question and the answer of a lesson of any kind."""
    if ask in lessons.KINDS_ABOUT_SEVERAL:
        return ask(vlm, rng, draw)
    picture = lessons.show(vlm, draw())
    if ask is lessons.read_crop:
        return ask(vlm, rng, picture)
    return ask(rng, picture)


def answer_greedily(vlm, questions, max_new_tokens=48):
    """One-turn answers in the lessons' plain chat. questions: lists of texts and views -> texts."""
    chats = []
    views = []
    for question in questions:
        chat = vlm.chat("system", data.SYSTEM["boxes"]) + vlm.chat("user", *question)
        chats.append(chat + vlm.chat("assistant", open=True))
        views += [part for part in question if isinstance(part, model.View)]
    cache = vlm.new_cache(len(questions))
    logits, positions = vlm.prefill(cache, chats, [0] * len(chats), views)
    u = torch.zeros(len(questions), max_new_tokens)     # no randomness is needed
    options = TurnOptions(max_new_tokens, temperature=0)
    turns, _, _ = zoom_rollout.sample_turn(vlm, cache, logits, positions, u, options)
    return [vlm.text(ids[:-1]) for ids in turns]


def main():
    cfg = run.parse_config(Config, description=__doc__, positive=("n",))
    vlm = prefix.load_vlm(cfg.model)
    for name in SKILLS:
        print(f"{accuracy(vlm, name, cfg.n, cfg.seed):6.1%}  {name}", flush=True)


if __name__ == "__main__":
    with run.exit_on_error():
        main()
