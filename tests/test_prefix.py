"""A group's prompt computed once: PrefixVLM against the plain VLM with the same weights. Logits
while sampling, whole rollouts, log-probabilities, gradients, micro-batches. At the end MUTATIONS
puts bugs into appendix/prefix.py and its neighbours, one at a time, and requires the named test to
fail.
"""
import copy, random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data, zoom_rollout
from appendix import parts, prefix
from conftest import check_mutation, close, names
from test_model import SIZES, batch, encoded, picture, plainly
from zoom_rollout import Episode, RolloutConfig, TurnOptions

# -----------------------------------------------------------------------------
# sampling

def shared(vlm, group, keep):
    """Logits after a prompt, a chunk and two tokens: plain rows with prompts of their own,
    prefilled, and rows that share, decoded."""
    with torch.no_grad():
        prompts = encoded(vlm, batch(vlm))[:3]
        said, caches = (
            torch.randint(5, 200, (len(group), 6), generator=torch.Generator().manual_seed(0)), [])
        for share in (False, True):
            one = plainly(vlm, not share)
            cache = one.new_cache(3)
            _, positions = one.prefill(cache, [e.ids for e in prompts], [0] * 3,
                                       [v for e in prompts for v in e.views])
            cache = cache.branch(torch.tensor(group))
            assert isinstance(cache, prefix.SharedCache) == share
            logits, positions = one.prefill(
                cache, [row[:2 + i % 3].tolist() for i, row in enumerate(said)],
                [positions[g] for g in group])
            cache.keep_rows(torch.tensor(keep))
            positions, out = [positions[i] for i in keep], [logits]
            cache.reserve(3)
            for t in (4, 5):
                if share:
                    out.append(one.decode_step(cache, said[keep, t], torch.tensor(positions),
                                               torch.ones(len(keep), dtype=torch.bool)))
                else:
                    out.append(one.prefill(cache, said[keep, t:t + 1].tolist(), positions)[0])
                positions = [p + 1 for p in positions]
            caches.append(out)
    return caches

@pytest.mark.parametrize("group, keep", [([0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5]),
                                         ([0, 0, 0, 1, 2, 2], [5, 1, 0]),
                                         ([2, 0, 2, 0, 1, 0], [3, 0, 2, 5])])
def test_shared_prompt_equals_own(vlm64, float64, group, keep):
    """Bug: a prompt that is attended to once for its group weighs too much or too little, or is
    another group's."""
    for own, once in zip(*shared(vlm64, group, keep)):
        close(once.softmax(-1), own.softmax(-1), 1e-9)

@pytest.mark.parametrize("plain", [True, False], ids=["plain", "prefix"])
@torch.no_grad()
def test_long_prefill_in_parts(vlm64, float64, plain, monkeypatch):
    """Bug: a part of the rows gets another part's images or positions, or writes into a copy of the
    cache; more tokens than allowed run at once. Prompts, then chunks of other lengths, in one pass
    and in parts; a row that is longer is a part by itself."""
    one, sizes = plainly(vlm64, plain), []
    forward, episodes, said = (one.forward, encoded(one, batch(one)),
                               [[5] * n for n in (3, 1, 9, 4, 2, 7)])
    monkeypatch.setattr(one, "forward", lambda ids, *more: (
        sizes.append(ids.numel()), forward(ids, *more))[1])
    views, longest = [v for e in episodes for v in e.views], max(len(e.ids) for e in episodes)
    found = []
    for bound in (10 ** 9, 2 * longest, 13, 1):
        sizes.clear()
        cache = one.new_cache(5)
        logits, after = parts.prefill(one, cache, [e.ids for e in episodes], [0] * 5, views, bound)
        rows = cache.branch(torch.tensor(group := [0, 1, 1, 2, 3, 4]))
        again, ends = parts.prefill(one, rows, said, [after[g] for g in group], (), bound)
        assert (len(sizes) == {10 ** 9: 2, 2 * longest: 3, 13: 9, 1: 11}[bound]
                and all(n <= max(bound, longest) for n in sizes))
        found.append((logits, again, after, ends))
    for logits, again, after, ends in found[1:]:
        (close(logits.softmax(-1), found[0][0].softmax(-1), 1e-9),
         close(again.softmax(-1), found[0][1].softmax(-1), 1e-9))
        assert (after, ends) == found[0][2:]

@torch.no_grad()
def test_rows_that_join(vlm64, float64):
    """Bug: rows that begin beside others continue the wrong prompt, or lose slots because theirs
    are fewer or more. Two rows of prompts 0 and 1 have tokens of their own when three rows of
    prompts 2 and 0 join; then one leaves, and all go on."""
    prompts = encoded(vlm64, batch(vlm64))[:3]
    def begin(numbers, group, said):
        cache = vlm64.new_cache(len(numbers))
        _, after = vlm64.prefill(cache, [prompts[p].ids for p in numbers], [0] * len(numbers),
                                 [v for p in numbers for v in prompts[p].views])
        cache = cache.branch(torch.tensor(group))
        _, ends = vlm64.prefill(cache, said, [after[g] for g in group])
        return cache, ends

    (cache, ends), said = (begin([0, 1], [1, 0], [[5, 6, 7], [8]]),
                           [[5, 6, 7], [8], [9], [10, 11, 12, 13], [14]])
    other, more = begin([2, 0], [0, 1, 0], said[2:])
    cache.join(other)
    keep, of = [0, 1, 3, 4], [1, 0, 2, 0, 2]
    cache.keep_rows(torch.tensor(keep))
    got, _ = vlm64.prefill(cache, [[20 + b] for b in keep], [(ends + more)[b] for b in keep])
    wholes = [prompts[of[b]].ids + said[b] + [20 + b] for b in keep]
    want, _ = plainly(vlm64).prefill(plainly(vlm64).new_cache(4), wholes, [0] * 4,
                                     [v for b in keep for v in prompts[of[b]].views])
    close(got.softmax(-1), want.softmax(-1), 1e-9)

@torch.no_grad()
def test_kept_rows_resume(vlm64, float64):
    """Bug: a path of a search tree goes on from another path's tokens, or from its own with some
    missing. Rows are kept, the cache is left, and a new one, with empty rows among them, goes on
    where they stood."""
    prompts, said = encoded(vlm64, batch(vlm64))[:2], [[5, 6, 7], [8, 9, 10, 11, 12]]
    cache = vlm64.new_cache(2)
    first, positions = vlm64.prefill(cache, [e.ids for e in prompts], [0, 0],
                                     [v for e in prompts for v in e.views])
    rows = cache.branch(torch.tensor([1, 0]))
    _, after = vlm64.prefill(rows, said, [positions[1], positions[0]])
    kept = [rows.keep_row(0), rows.keep_row(1)]
    again = cache.resume([kept[1], None, kept[0], kept[1]], torch.tensor([0, 1, 1, 0]))
    assert again.lengths.tolist() == [5, 0, 3, 5]
    got, _ = vlm64.prefill(again, [[20], [21, 22], [23], [24]],
                           [after[1], positions[1], after[0], after[1]])
    wholes = [prompts[0].ids + said[1] + [20], prompts[1].ids + [21, 22],
              prompts[1].ids + said[0] + [23], prompts[0].ids + said[1] + [24]]
    views = [v for i in (0, 1, 1, 0) for v in prompts[i].views]
    want, _ = vlm64.prefill(vlm64.new_cache(4), wholes, [0] * 4, views)
    close(got.softmax(-1), want.softmax(-1), 1e-9)

@pytest.mark.parametrize("config", [
    RolloutConfig(max_zooms=2, max_new_tokens=9, seed=1),
    RolloutConfig(max_new_tokens=5, seed=2, zoom="off"),
    RolloutConfig(max_zooms=1, max_new_tokens=6, seed=3, max_batch_tokens=700),
], ids=["zoom", "off", "parts"])
def test_rollouts_are_the_same(vlm64, float64, config, monkeypatch):
    """Bug: --plain samples other tokens. Calls, crops and groups that shrink (a random model's
    turns are read as calls by their tokens)."""
    def obliging(vlm, episode, text, *rest, real=zoom_rollout.env_step):
        a, b = (episode.ids * 2)[-2:]
        return real(vlm, episode,
                    data.tool_call(a % 100, b % 100) if a % 4 else "<answer> </answer>",
                    True, *rest[1:])

    monkeypatch.setattr(zoom_rollout, "env_step", obliging)
    samples = data.toy("search", "train", 3, 7)
    runs = [zoom_rollout.rollout(plainly(vlm64, plain), samples, 4, config)
            for plain in (True, False)]
    assert len({len(e.turns) for e in runs[0]}) > 1 or config.zoom == "off"
    assert ([(e.ids, e.completion_mask, e.turns) for e in runs[0]]
            == [(e.ids, e.completion_mask, e.turns) for e in runs[1]])
    close([lp for e in runs[1] for lp in e.logprobs],
          [lp for e in runs[0] for lp in e.logprobs], 1e-9)

def test_a_prompt_is_kept_once(vlm):
    """Claim: the cache of a group holds its prompt once, and after rows have left only the prompts
    that are still needed. Bug: a rollout's prompts stand in memory twice while some leave; of
    `resume`, they stay, because a tree search goes on from all of them."""
    group = torch.tensor([0, 0, 0, 1, 1, 2])
    for takes_over in (True, False):
        cache = vlm.new_cache(3)
        vlm.prefill(cache, [[5] * 40, [6] * 30, [7] * 20], [0, 0, 0])
        rows = cache.branch(group) if takes_over else cache.resume([None] * 6, group)
        assert (rows.prompts is cache
                and rows.keys[0].shape[2] == 0
                and cache.keys[0].shape[:1] == (3,))
        vlm.prefill(rows, [[5] * n for n in (2, 3, 9, 4, 5, 3)], [40, 40, 40, 30, 30, 20])
        rows.keep_rows(torch.tensor([5, 1, 0]))
        assert rows.prompts.lengths.tolist() == [40, 20] and rows.group.tolist() == [1, 0, 0]
        # and no slots that nobody uses
        assert rows.lengths.tolist() == [3, 3, 2] and rows.keys[0].shape[2] == 3
        assert cache.lengths.tolist() == ([40, 20] if takes_over else [40, 30, 20])
    assert plainly(vlm).new_cache(3).branch(torch.tensor([0, 0, 2])).keys[0].shape[0] == 3

@pytest.mark.cuda
@pytest.mark.parametrize("plain", [True, False])
def test_graph_on_cuda(models, plain):
    """Bug: a captured step that reads what has moved since, or that advances rows which wait."""
    single = models["qwen2.5"]
    vlm = type(plainly(single, plain))(copy.deepcopy(single.model).to("cuda"), single.tokenizer,
                                       single.processor, single.name, single.spec)
    out = []
    for graphs in (False, True):
        cache = vlm.new_cache(3)
        logits, positions = vlm.prefill(cache, [[5, 6, 7], [8, 9], [10]], [0] * 3)
        cache = cache.branch(torch.tensor([0, 1, 2], device="cuda"))
        u = torch.rand(3, 24, generator=torch.Generator().manual_seed(1), dtype=torch.double).cuda()
        out.append(zoom_rollout.sample_turn(vlm, cache, logits, positions, u,
                                            TurnOptions(24, graphs=graphs)))
    assert out[0][0] == out[1][0] and out[0][2] == out[1][2]

# -----------------------------------------------------------------------------
# training

def group_of(vlm, members, images=1, turns=1, seed=0, forced=False):
    """Episodes that continue one prompt: random turns, each but the last followed by a crop of a
    size of its own."""
    rng, e = random.Random(seed), Episode(None)
    views = [vlm.view(picture(SIZES[(seed + i) % 4], seed + i), i) for i in range(images)]
    e.append_given(vlm.chat("user", "Look.", *views, f"Which is {seed}?")
                   + vlm.chat("assistant", open=True), views)
    if forced:
        e.append_given(vlm.ids(data.FORCE))
    out = []
    for m in range(members):
        out.append(e.copy())
        for turn in range(turns if m else 1):                   # the first has no crop at all
            out[-1].append_sampled(
                [rng.randrange(vlm.im_start) for _ in range(rng.randrange(3, 12))] + [vlm.im_end])
            if turn + 1 < turns and m:
                side = vlm.factor * rng.randrange(1, 4)
                crop = vlm.view(views[0].source, 0, (1, 2, 33, 34), (side, vlm.factor))
                out[-1].append_given(vlm.chat("user", data.OBSERVE[0], crop)
                                     + vlm.chat("assistant", open=True), [crop])
    return out

def groups_of(vlm):
    """Two groups (one of two images, three turns), an episode without an image, and all of them
    mixed."""
    return random.Random(0).sample(
        a := (group_of(vlm, 3, 2, 3, 1) + group_of(vlm, 4, 1, 2, 2, forced=True)
              + group_of(vlm, 1, 0, 1, 3)), len(a))

def gradient(vlm, loss):
    return torch.cat([
        torch.zeros_like(p).flatten() if g is None else g.flatten()
        for p, g in zip(vlm.parameters(),
                        torch.autograd.grad(loss, vlm.parameters(), allow_unused=True))])

@pytest.mark.parametrize("recompute", [False, True])
def test_shared_equals_plain(vlm64, float64, recompute):
    """Bug: a continuation sees its neighbour, misses part of its prompt, has the wrong positions or
    crops; the prompt hears from one member only; a recomputed layer is another one. Values and
    gradients against every episode by itself, in float64."""
    episodes, plain = groups_of(vlm64), plainly(vlm64)
    want, entropy, mask = plain.logprobs(episodes, 0.7)
    weights = torch.rand(mask.shape)                            # every token pulls differently
    expected = gradient(plain, (want * weights).sum())
    sizes, packing = [], prefix.PrefixVLM(vlm64.model, vlm64.tokenizer, vlm64.processor, vlm64.name,
                                          vlm64.spec, recompute)
    real = packing.forward
    packing.forward = lambda ids, *more: (sizes.append(ids.shape[1]), real(ids, *more))[1]
    got, same_entropy, same_mask = packing.logprobs(episodes, 0.7, chunk=5)
    found = gradient(packing, (got * weights).sum())
    assert (torch.equal(mask, same_mask)
            and [m[:len(e.ids)].tolist() for m, e in zip(mask, episodes)]
                == [e.completion_mask for e in episodes])
    close(got, want, 1e-9), close(same_entropy, entropy, 1e-9), close(found, expected, 1e-9)
    # and it is computed once
    prompts = {tuple(e.ids[:e.completion_mask.index(True)]) for e in episodes}
    assert sizes == [sum(len(e.ids) - e.completion_mask.index(True) for e in episodes)
                     + sum(map(len, prompts))]

def test_each_alone_equals_together(vlm64, float64):
    """Bug: a group is packed right only while it is whole, or only when there is one."""
    episodes = groups_of(vlm64)
    with torch.no_grad():
        together, entropy, mask = vlm64.logprobs(episodes)
        for b, e in enumerate(episodes):
            alone, its_entropy, its_mask = vlm64.logprobs([e])
            n = len(e.ids)
            close(together[b, :n], alone[0], 1e-9), close(entropy[b, :n], its_entropy[0], 1e-9)
            assert (torch.equal(mask[b, :n], its_mask[0])
                    and not mask[b, n:].any()
                    and (together[b][~mask[b]] == 0).all())

def test_what_counts_as_shared(vlm):
    """Bug: equal ids are taken for an equal prompt though the image is another; the second image is
    not looked at."""
    a, b, c = (group_of(vlm, 2, 2, 1, 4) for _ in range(3))
    assert a[0].ids[:20] == b[0].ids[:20]
    # the first image is the same, the second is not
    c[0].views[0], c[1].views[0] = a[0].views[0], a[0].views[0]
    n = a[0].completion_mask.index(True)
    assert vlm.group_by_prompt(a + b + c) == [(n, [0, 1]), (n, [2, 3]), (n, [4, 5])]
    assert vlm.group_by_prompt([a[0], b[0], a[1]]) == [(n, [0, 2]), (len(b[0].ids), [1])]

def test_micro_batches(vlm):
    """Bug: an episode is lost or run twice; a part is larger than the memory that was granted; a
    group is torn though it fits."""
    episodes = groups_of(vlm)
    cost = lambda part: sum(n + sum(len(part[b].ids) - n for b in members)
                            for n, members in vlm.group_by_prompt(part))
    for tokens in (1, 100, 300, cost(episodes) - 1, cost(episodes), 10 ** 6):
        parts = vlm.micro_batches(episodes, tokens)
        assert sorted(id(e) for part in parts for e in part) == sorted(map(id, episodes))
        assert all(len(part) == 1 or cost(part) <= tokens for part in parts)
        assert len(parts) == {
            1: 8, cost(episodes) - 1: 2, cost(episodes): 1, 10 ** 6: 1}.get(tokens, len(parts))
        for part in parts:
            vlm.encode([v for e in part for v in e.views])
            assert vlm.pack(part).ids.shape == (1, cost(part))  # what it costs is what is run
    assert vlm.micro_batches([], 9) == []

@pytest.mark.parametrize("tokens", [1, 200, 10 ** 6])
def test_gradients_add_up(vlm64, float64, tokens):
    """Claim: the gradient does not depend on how plain or packed micro-batches are cut."""
    episodes, plain = groups_of(vlm64), plainly(vlm64)
    expected = gradient(plain, plain.logprobs(episodes)[0].sum())
    for vlm in (plain, vlm64):
        parts = vlm.micro_batches(episodes, tokens)
        assert (len(parts) == 1) == (tokens == 10 ** 6)
        close(sum(gradient(vlm, vlm.logprobs(part)[0].sum()) for part in parts), expected, 1e-9)

@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_equals_plain_on_cuda(models, dtype):
    """Bug: the GPU's attention kernel aligns the causal mask at the other corner."""
    vlm = models["qwen2.5"]
    vlm = prefix.PrefixVLM(copy.deepcopy(vlm.model).to("cuda", dtype), vlm.tokenizer, vlm.processor,
                           vlm.name, vlm.spec)
    episodes, plain = groups_of(vlm), plainly(vlm)
    want, _, mask = plain.logprobs(episodes)
    expected = gradient(plain, want.sum() / mask.sum())
    got, _, _ = vlm.logprobs(episodes)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    close(got, want, tolerance), close(gradient(vlm, got.sum() / mask.sum()), expected, tolerance)

def test_places_of_rows(models):
    """Claim: the docstring's example; free places repeat row 0, and what is taken to the places and
    back is as it was."""
    cache = models["qwen2.5"].new_cache(2)
    cache.lengths = torch.tensor([1, 1])
    rows = prefix.SharedCache(cache, torch.tensor([0, 1, 0, 0]), [], [],
                              torch.zeros(4, dtype=torch.long))
    assert (rows.place_of_row.tolist() == [0, 3, 1, 2]
            and rows.row_at_place.tolist() == [0, 2, 3, 1, 0, 0]
            and not rows.in_order)
    x = torch.randn(4, 2, 3, 5)
    assert (rows.to_prompts(x).shape == (2, 2, 9, 5)
            and torch.equal(rows.to_rows(rows.to_prompts(x)), x))
    assert prefix.SharedCache(cache, torch.tensor([0, 0, 1, 1]), [], [],
                              torch.zeros(4, dtype=torch.long)).in_order

class Largest(TorchDispatchMode):
    """Notes the largest block of memory that an operation writes."""
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out

def test_a_step_copies_no_prompt():
    """Bug: every row gets a copy of its prompt's keys: right, and as slow as a cache in which each
    row holds its own."""
    P, B, K, R, S, d = 2, 16, 2, 2, 64, 32
    prompts = prefix.PromptCache([torch.randn(P, K, S, d)], [torch.randn(P, K, S, d)],
                                 torch.tensor([S, S // 2]))
    cache = prefix.SharedCache(prompts, torch.arange(B) % P, [torch.zeros(B, K, 0, d)],
                               [torch.zeros(B, K, 0, d)], torch.zeros(B, dtype=torch.long))
    cache.reserve(1)
    cache.place(1)
    q, k, v = torch.randn(B, 1, K * R, d), torch.randn(B, 1, K, d), torch.randn(B, 1, K, d)
    with Largest() as largest:
        assert cache.attend(0, q, k, v).shape == q.shape
    assert 0 < largest.bytes < B * K * S * d * q.element_size()

# -----------------------------------------------------------------------------
# do the tests bite? Each row puts in one bug; the named test must fail.

SHARED, PACKED, PREFIX = ("appendix.prefix:SharedCache", "appendix.prefix:Packed",
                          "appendix.prefix:PrefixVLM")
WHOLE, SHRINKS, MIXED = (dict(group=[0, 0, 1, 1, 2, 2], keep=[0, 1, 2]),
                         dict(group=[0, 0, 0, 1, 2, 2], keep=[5, 1, 0]),
                         dict(group=[2, 0, 1, 0, 1, 2], keep=[0, 1, 2]))

MUTATIONS = [
    (f"{SHARED}.to_rows", "x if self.in_order else x[self.place_of_row]",
     "x[:len(self.place_of_row)]", test_shared_prompt_equals_own, SHRINKS),
    (f"{SHARED}.keep_rows", "prompts.keep_rows(used)",
     "pass", test_shared_prompt_equals_own, dict(group=[0, 0, 0, 1, 2, 2], keep=[5, 1])),
    (f"{SHARED}.to_prompts", "not self.in_order",
     "len(x) != self.num_places", test_shared_prompt_equals_own, MIXED),
    (f"{SHARED}.place", "slots < self.prompts.lengths[self.group, None, None, None]",
     "slots <= self.prompts.lengths[self.group, None, None, None]",
     test_shared_prompt_equals_own, SHRINKS),
    (f"{SHARED}.assign", "(same_group & earlier).sum(1)",
     "(same_group & earlier).sum(1) // 2", test_shared_prompt_equals_own, WHOLE),
    (f"{SHARED}.attend_one_token", "self.to_rows(group_scores)",
     "q @ prompt_keys[self.group].mT", test_a_step_copies_no_prompt, {}),
    (f"{SHARED}.attend_one_token", "torch.cat([prompt_scores, own_scores], -1) + self.mask",
     "torch.cat([prompt_scores, own_scores], -1)", test_shared_prompt_equals_own, WHOLE),
    (f"{SHARED}.attend_chunk", "prompt_values[p].expand(copies)",
     "prompt_values[0].expand(copies)", test_shared_prompt_equals_own, WHOLE),
    (f"{SHARED}.attend_chunk", "self.mask[rows]",
     "self.mask[:len(rows)]", test_shared_prompt_equals_own, SHRINKS),
    ("model:VLM.decode_step", "cache.advance(live)", "pass", test_shared_prompt_equals_own, WHOLE),
    (f"{SHARED}.place", "torch.ones(n, n, dtype=torch.bool, device=device).tril()",
     "torch.ones(n, n, dtype=torch.bool, device=device)", test_shared_prompt_equals_own, WHOLE),
    (f"{SHARED}.join", "other.group + len(self.prompts.lengths)",
     "other.group", test_rows_that_join, {}),
    ("appendix.prefix:stack_rows", "torch.cat([cache.lengths, other.lengths])",
     "torch.cat([cache.lengths, cache.lengths, other.lengths])"
     "[-len(cache.lengths) - len(other.lengths):].clamp(max=1)",
     test_rows_that_join, {}),
    (f"{SHARED}.part", "self.group[rows]",
     "0 * self.group[rows]", test_long_prefill_in_parts, dict(plain=False)),
    ("appendix.prefix:PromptRow.attend", "self.cache.values[layer][p, :, :length] = own_v[0]",
     "self.cache.values[layer][0, :, :length] = own_v[0]", test_shared_prompt_equals_own, WHOLE),
    (f"{PREFIX}.prefill", "lengths.cumsum(0) - 1",
     "lengths.cumsum(0) - lengths",
     test_rollouts_are_the_same, dict(config=RolloutConfig(max_new_tokens=5, zoom="off"))),
    ("appendix.parts:prefill", "positions[rows]",
     "positions[:len(part)]", test_long_prefill_in_parts, dict(plain=True)),
    ("appendix.parts:prefill", "cache.reserve(max(len(chunk) for chunk in chunks))",
     "cache.reserve(1)", test_long_prefill_in_parts, dict(plain=True)),
    ("appendix.parts:row_slices", "longest * (b + 1 - first) > max_tokens",
     "longest * (b - first) > max_tokens", test_long_prefill_in_parts, dict(plain=True)),
    (f"{SHARED}.keep_rows",
     "PromptCache(list(prompts.keys), list(prompts.values), prompts.lengths)",
     "prompts", test_a_prompt_is_kept_once, {}),
    (f"{SHARED}.keep_rows", "not self.owns_prompts", "True", test_a_prompt_is_kept_once, {}),
    (f"{SHARED}.keep_row", "(keys[row, :, :n].clone(), values[row, :, :n].clone())",
     "(keys[row, :, :n - 1].clone(), values[row, :, :n - 1].clone())", test_kept_rows_resume, {}),
    ("appendix.prefix:PromptCache.resume", "values[layer][b, :, :lengths[b]] = row[layer][1]",
     "values[layer][0, :, :lengths[b]] = row[layer][1]", test_kept_rows_resume, {}),
    ("model:KVCache.branch", "self.rows(group)",
     "self.rows(0 * group)",
     test_rollouts_are_the_same, dict(config=RolloutConfig(max_new_tokens=5, zoom="off"))),
    (f"{PACKED}.attend_rests", "attention.attend_continued(q, k, v)",
     "attention.attend(q, k, v)", test_shared_equals_plain, dict(recompute=False)),
    ("appendix.attention:attend_continued", "causal_lower_right(q.shape[2], k.shape[2])",
     "None", test_shared_equals_plain, dict(recompute=False)),
    (f"{PACKED}.attend_rests", "prompt_k.expand(copies)",
     "prompt_k.detach().expand(copies)", test_shared_equals_plain, dict(recompute=False)),
    (f"{PACKED}.attend_rests", "prompt_v.expand(copies)",
     "prompt_v.detach().expand(copies)", test_shared_equals_plain, dict(recompute=False)),
    (f"{PREFIX}.pack", "views += e.views[num_views:]",
     "views += e.views", test_shared_equals_plain, dict(recompute=False)),
    (f"{PREFIX}.pack", "positions.append(own_positions[:, prompt_length:])",
     "positions.append(own_positions[:, :len(rest)])",
     test_shared_equals_plain, dict(recompute=False)),
    (f"{PREFIX}.pack", "prompt_indices + list(range(len(ids), len(ids) + len(rest)))",
     "list(range(prompt_indices[0], prompt_indices[0] + len(e.ids)))",
     test_shared_equals_plain, dict(recompute=False)),
    ("appendix.prefix:sampled_indices", "predictors.append(own[t - 1])",
     "predictors.append(own[t])", test_shared_equals_plain, dict(recompute=False)),
    (f"{PREFIX}.group_by_prompt", "(tuple(prompt), *map(id, views))",
     "(tuple(prompt),)", test_what_counts_as_shared, {}),
    (f"{PREFIX}.micro_batches", "not parts or prompt_cost + rest_length > room",
     "not parts or prompt_cost + rest_length >= room", test_micro_batches, {}),
    (f"{PREFIX}.micro_batches", "room -= prompt_cost + rest_length",
     "room -= rest_length", test_micro_batches, {}),
    (f"{PREFIX}.micro_batches", "prompt_cost = 0", "pass", test_micro_batches, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, models, models64, monkeypatch):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {
        "vlm": lambda: models["qwen2.5"], "vlm64": lambda: models64["qwen2.5"],
        "monkeypatch": lambda: monkeypatch})
