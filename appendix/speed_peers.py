"""The peer of the rollouts: transformers' `generate`, which sends everything again each turn.

This is how TRL and both papers' code roll out: every member of a group brings its own image, and
with tools the whole conversation is computed again for each turn.
"""
import random

import torch

import zoom_rollout
from appendix.speed_setup import observation


def generate_turns(vlm, load, seed):
    """The conversations of a speed_setup.Load -> [(ids, views)], P * G of them.

    vlm is an EndlessVLM: the tokens that it never samples are suppressed here, too.
    """
    rng = random.Random(seed)
    talks = []
    for sample in load.samples:
        for _ in range(load.group):
            prompt = zoom_rollout.begin(vlm, sample)
            talks.append((list(prompt.ids), list(prompt.views)))
    for turn in range(load.turns):
        sampled = generate(vlm, talks, load.turn_tokens)
        if turn + 1 < load.turns:
            talks = [add_turn(vlm, talk, ids, rng) for talk, ids in zip(talks, sampled)]
    return talks


def generate(vlm, talks, new_tokens):
    """One call of `generate` for all conversations -> the new ids of each."""
    pad = vlm.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    width = max(len(ids) for ids, _ in talks)
    rows = [[pad] * (width - len(ids)) + ids for ids, _ in talks]           # left padding
    ids = torch.tensor(rows, device=vlm.device)                             # (B, width)
    views = []
    for _, own in talks:
        views += own
    images = [view.pixels() for view in views]
    pixels = vlm.processor(images, do_resize=False, return_tensors="pt")["pixel_values"]
    out = vlm.model.generate(
        input_ids=ids,
        attention_mask=(ids != pad).long(),
        mm_token_type_ids=(ids == vlm.image_token).long(),
        pixel_values=pixels.to(vlm.device, vlm.dtype),
        image_grid_thw=torch.tensor([view.grid for view in views], device=vlm.device),
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        min_new_tokens=new_tokens, max_new_tokens=new_tokens,
        suppress_tokens=vlm.never_sampled.tolist(), pad_token_id=pad)
    return out[:, width:].tolist()


def add_turn(vlm, talk, sampled, rng):
    """A conversation (ids, views), and what was sampled -> the conversation with its next crop."""
    ids, views = talk
    more, crop = observation(vlm, views[0], rng)
    return ids + sampled + more, views + [crop]
