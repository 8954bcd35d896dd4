"""How an episode unfolds: sample a turn, call the tool, look, go on.

    rollout(vlm, samples, group_size) -> list[Episode]        all of sample 0, then all of sample 1, ...

The sampler is written by hand: a KV cache instead of `generate`. A group's prompt (its image above all) runs through the
model once and its cache is handed to all members; a new turn runs only the tokens of the observation. Tokens in, tokens
out: what was sampled is never decoded and encoded again, and the mask of trained tokens records who wrote each token.

Not here, from ViGoRL: resampling of a turn after an unparsable call (its own code goes on from a broken prompt); the red
dot on web crops; the character-length filter of prompts. Every row of a round waits for the slowest one.
"""
import json, math, random, re
from dataclasses import dataclass, field

import torch
from PIL import Image

import data


@dataclass
class Turn:
    """What the assistant wrote in one turn and what its tool call led to."""
    text: str                       # tags included, without <|im_end|>
    point: tuple = None             # (x, y) of the tool call, in the model's own convention
    crop: tuple = None              # the window shown for it, source pixels of image 0
    error: str = None               # said instead of a crop when the call was invalid
    forced: bool = False            # the turn opens with the injected data.FORCE


@dataclass
class Episode:
    """One conversation, as the trainer needs it and as the report draws it."""
    sample: data.Sample
    ids: list                       # every token: prompt, turns, observations
    sampled: list                   # True exactly where the policy chose the token, its end-of-turn token included
    logprobs: list                  # the sampler's log-probability of each sampled token, 0.0 elsewhere
    views: list                     # model.View, in the order in which their tokens stand in `ids`
    turns: list = field(default_factory=list)
    stop: str = ""                  # "answer" | "no_action" | "invalid" | "length"
    frames: list = field(default_factory=list)     # per prompt image: (sx, sy, width, height), see rewards.py
    parts: dict = field(default_factory=dict)      # rewards.score(...)
    advantage: float = 0.0

    @property
    def text(self):
        return "\n".join(t.text for t in self.turns)

    def say(self, vlm, ids, logprobs=None, views=(), sampled=True):
        """Append tokens: the policy's (sampled) or the environment's."""
        self.ids += ids
        self.sampled += [sampled] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)
        self.views += views


def begin(vlm, sample, style="zoom", views=None):
    """The episode that holds a sample's prompt, up to the open assistant turn."""
    views = views or [vlm.view(data.image(sample, i), i) for i in range(len(sample.images))]
    system, text = data.prompt(sample, style)
    e = Episode(sample, [], [], [], [], frames=[(*v.scale, *v.source.size) for v in views])
    e.say(vlm, vlm.chat("system", system) + vlm.chat("user", *views, text) + vlm.chat("assistant", open=True), views=views, sampled=False)
    return e


def crop(vlm, view, x, y, crop_from="source", black=False):
    """The tool. A square window of `spec.window` source pixels around the source pixel (x, y), moved inside the image where
    it would stick out (ViGoRL clips it and then squashes what is left), fed at `spec.crop` pixels a side.

    crop_from "source": cut from the image as stored, so a zoom brings new pixels; "seen": from the copy that the model was
    fed, as in the paper's training code. black: the control that shows what zooming is worth: a crop without content."""
    source = view.source
    if crop_from == "seen":
        source = source.resize(view.fed, Image.Resampling.BICUBIC).resize(source.size, Image.Resampling.BICUBIC)
    if black:
        source = Image.new("RGB", source.size)
    w, h = min(vlm.spec.window, source.width), min(vlm.spec.window, source.height)
    left, top = min(max(round(x - w / 2), 0), source.width - w), min(max(round(y - h / 2), 0), source.height - h)
    side = max(vlm.spec.crop // vlm.factor, 1) * vlm.factor
    fed = (max(round(side * w / vlm.spec.window / vlm.factor), 1) * vlm.factor, max(round(side * h / vlm.spec.window / vlm.factor), 1) * vlm.factor)
    return vlm.view(source, view.index, (left, top, left + w, top + h), fed)
