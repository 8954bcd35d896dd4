"""
Training at size: a group's prompt computed once, many micro-batches, recomputed layers, several ranks, bad gradients, and runs that
are killed. Each must give what the plain way gives. At the end MUTATIONS puts bugs into model.py and train_rl.py, one line each.

    python -m pytest tests/test_train.py            # seconds
    python -m pytest tests/test_train.py --slow     # and twenty SIGKILLs: minutes
"""
import copy, random

import pytest
import torch

import data, model, zoom_rollout
from conftest import check_mutation, close, names
from test_model import picture, SIZES
from zoom_rollout import Episode

# -----------------------------------------------------------------------------
# a prompt computed once

def group_of(vlm, members, images=1, turns=1, seed=0, forced=False):
    """Episodes that continue one prompt: random turns, each but the last followed by a crop of a size of its own."""
    rng, e = random.Random(seed), Episode(None, [], [], [], [])
    views = [vlm.view(picture(SIZES[(seed + i) % 4], seed + i), i) for i in range(images)]
    e.say(vlm, vlm.chat("user", "Look.", *views, f"Which is {seed}?") + vlm.chat("assistant", open=True), views=views, sampled=False)
    if forced:
        e.say(vlm, vlm.ids(data.FORCE), sampled=False)
    out = []
    for m in range(members):
        out.append(Episode(None, list(e.ids), list(e.sampled), list(e.logprobs), list(e.views)))
        for turn in range(turns if m else 1):                                          # the first has no crop at all
            out[-1].say(vlm, [rng.randrange(vlm.im_start) for _ in range(rng.randrange(3, 12))] + [vlm.im_end])
            if turn + 1 < turns and m:
                side = vlm.factor * rng.randrange(1, 4)
                crop = vlm.view(views[0].source, 0, (1, 2, 33, 34), (side, vlm.factor))
                out[-1].say(vlm, vlm.chat("user", data.OBSERVE[0], crop) + vlm.chat("assistant", open=True), views=[crop], sampled=False)
    return out

def groups_of(vlm):
    """Two groups (one of two images, three turns), an episode without an image, and all of them mixed."""
    return random.Random(0).sample(a := group_of(vlm, 3, 2, 3, 1) + group_of(vlm, 4, 1, 2, 2, forced=True) + group_of(vlm, 1, 0, 1, 3), len(a))

def gradient(vlm, loss):
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                      for p, g in zip(vlm.parameters(), torch.autograd.grad(loss, vlm.parameters(), allow_unused=True))])

@pytest.mark.parametrize("recompute", [False, True])
def test_shared_equals_plain(vlm64, float64, recompute):
    """Bug: a continuation sees its neighbour, misses part of its prompt, has the wrong positions or crops; the prompt hears from one
    member only; a recomputed layer is another one. Values and gradients against every episode by itself, in float64."""
    episodes = groups_of(vlm64)
    want, entropy, mask = vlm64.logprobs(episodes, 0.7, share=False)
    weights = torch.rand(mask.shape)                                                   # every token pulls differently
    expected = gradient(vlm64, (want * weights).sum())
    sizes, vlm64.recompute = [], recompute
    try:
        real = vlm64.forward
        vlm64.forward = lambda ids, *more: (sizes.append(ids.shape[1]), real(ids, *more))[1]
        got, same_entropy, same_mask = vlm64.logprobs(episodes, 0.7, chunk=5)
        found = gradient(vlm64, (got * weights).sum())
    finally:
        vlm64.recompute = False
        del vlm64.forward
    assert torch.equal(mask, same_mask) and [m[:len(e.ids)].tolist() for m, e in zip(mask, episodes)] == [e.sampled for e in episodes]
    close(got, want, 1e-9), close(same_entropy, entropy, 1e-9), close(found, expected, 1e-9)
    prompts = {tuple(e.ids[:e.sampled.index(True)]) for e in episodes}                 # and it is computed once
    assert sizes == [sum(len(e.ids) - e.sampled.index(True) for e in episodes) + sum(map(len, prompts))]

def test_what_counts_as_shared(vlm):
    """Bug: equal ids are taken for an equal prompt though the image is another; the second image is not looked at."""
    a, b, c = (group_of(vlm, 2, 2, 1, 4) for _ in range(3))
    assert a[0].ids[:20] == b[0].ids[:20]
    c[0].views[0], c[1].views[0] = a[0].views[0], a[0].views[0]                        # the first image is the same, the second is not
    n = a[0].sampled.index(True)
    assert vlm.shared(a + b + c) == [(n, [0, 1]), (n, [2, 3]), (n, [4, 5])]
    assert vlm.shared([a[0], b[0], a[1]]) == [(n, [0, 2]), (len(b[0].ids), [1])]

def test_micro_batches(vlm):
    """Bug: an episode is lost or run twice; a part is larger than the memory that was granted; a group is torn though it fits."""
    episodes = groups_of(vlm)
    cost = lambda part: sum(n + sum(len(part[b].ids) - n for b in members) for n, members in vlm.shared(part))
    for tokens in (1, 100, 300, cost(episodes) - 1, cost(episodes), 10 ** 6):
        parts = vlm.micro_batches(episodes, tokens)
        assert sorted(id(e) for part in parts for e in part) == sorted(map(id, episodes))
        assert all(len(part) == 1 or cost(part) <= tokens for part in parts)
        assert len(parts) == {1: 8, cost(episodes) - 1: 2, cost(episodes): 1, 10 ** 6: 1}.get(tokens, len(parts))
    assert vlm.micro_batches([], 9) == []
