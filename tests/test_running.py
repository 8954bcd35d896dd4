"""Does it show how many episodes ran at a time? Rollouts under many bounds on the cache, shared and
plain; what is sampled must be the same. At the end MUTATIONS puts bugs into appendix/running.py and
requires the named test to fail.
"""
from collections import deque
from types import SimpleNamespace

import pytest
import torch

import data, model, zoom_rollout
from appendix import parts, prefix, running
from conftest import check_mutation, names
from test_model import both, plainly
from test_zoom_rollout import assert_same, oblige
from zoom_rollout import Episode, RolloutConfig, Row

class Watch:
    """Rollouts of one model, and what they did: rows that began, rows that were put aside or began
    beside others, slots of the largest cache."""
    def __init__(self, vlm, monkeypatch, bold=False):
        self.bold = bold                        # rows begin as if they needed nothing
        self.vlm = vlm
        reserve, forward, watch = model.KVCache.reserve, vlm.forward, self

        class Watched(running.Running):
            def expected_slots(self):
                return 0 if watch.bold else super().expected_slots()

            def go_on(self, responses, positions, waiting):
                watch.rounds.append(len(self.rows))
                super().go_on(responses, positions, waiting)

            def put_aside(self, staying, responses, waiting):
                before = len(waiting)
                super().put_aside(staying, responses, waiting)
                assert (all(row.prompt_copy == 0 for row in waiting)
                        and all(self.rows[b].prompt_copy > 0 for b in staying))
                watch.aside += len(waiting) - before

            def admit(self, waiting):
                before = len(self.rows)
                super().admit(waiting)
                watch.beside += 0 < before < len(self.rows)

            def prefill(self, cache, chunks, positions, views):
                if (cache is self.cache
                        and parts.padded_tokens(chunks) > self.config.prefill_tokens):
                    watch.orders.append([len(chunk) for chunk in chunks])
                return super().prefill(cache, chunks, positions, views)

            def begin(self, rows):
                watch.again += sum(row.own_tokens() > 0 for row in rows)
                return super().begin(rows)

        def watched_reserve(cache, n):
            reserve(cache, n)
            held = ([cache, cache.prompts] if isinstance(cache, prefix.SharedCache)
                    else [cache])
            self.slots = max(self.slots, sum(c.keys[0].shape[0] * c.keys[0].shape[2] for c in held))

        monkeypatch.setattr(running, "ROUND_TOKENS", 4)
        monkeypatch.setattr(zoom_rollout, "Running", Watched)
        monkeypatch.setattr(model.KVCache, "reserve", watched_reserve)
        monkeypatch.setattr(
            vlm, "forward",
            lambda ids, *more: (self.tokens.append(ids.shape[1]), forward(ids, *more))[1])

    def run(self, bound, prefill_tokens=16384, max_new_tokens=9):
        (self.rounds, self.aside, self.beside, self.again,
         self.slots, self.tokens, self.orders) = [], 0, 0, 0, 0, [], []
        config = RolloutConfig(max_zooms=1, max_new_tokens=max_new_tokens, seed=2,
                               max_batch_tokens=bound, prefill_tokens=prefill_tokens)
        return zoom_rollout.rollout(self.vlm, data.toy("search", "train", 4, 7), 6, config)

@both
@pytest.mark.parametrize("bold", [True, pytest.param(False, marks=pytest.mark.slow)])
@torch.no_grad()
def test_what_is_sampled_does_not_depend_on_room(models, plain, bold, monkeypatch):
    """Bug: a row that waits, begins beside others, or is put aside and begins again, loses a token
    or a crop, or samples with another's random numbers; the cache is larger than it may be. From
    all rows at once down to one."""
    vlm = plainly(models["qwen2.5"], plain)
    oblige(vlm, monkeypatch)
    watch = Watch(vlm, monkeypatch, bold)
    first = watch.run(10 ** 9)
    assert watch.rounds[0] == 24 and watch.aside == watch.again == 0
    aside = beside = 0
    for bound in (3000, 1000, 600, 400, 1):
        assert_same(watch.run(bound), first)
        assert watch.slots <= bound or watch.rounds == [1] * len(watch.rounds)
        assert watch.aside == watch.again
        aside += watch.aside
        beside += watch.beside
    assert (aside > 0) == bold and (beside > 0) == (not plain) and max(watch.rounds) == 1

def test_rows_begin_by_what_they_use(models, monkeypatch):
    """Bug: rows are counted by their worst case though none comes near it: 33 at a time where there
    is room for 80. Turns may have 200 tokens, and have a few."""
    vlm = models["qwen2.5"]
    oblige(vlm, monkeypatch)
    watch, bound = Watch(vlm, monkeypatch), 3500
    first = watch.run(10 ** 9, max_new_tokens=200)
    worst = bound // parts.most_slots(vlm, RolloutConfig(max_zooms=1, max_new_tokens=200))
    assert_same(watch.run(bound, max_new_tokens=200), first)
    assert worst < 8 and max(watch.rounds) > 1.5 * worst and watch.aside == 0

def test_a_long_prefill_is_cut_where_padding_is_least(models, monkeypatch):
    """Bug: rows that read one token are padded to a crop's length though they do not fit beside it;
    more tokens than allowed at once."""
    vlm = models["qwen2.5"]
    oblige(vlm, monkeypatch)
    watch = Watch(vlm, monkeypatch)
    first = watch.run(10 ** 9)
    at_once = max(watch.tokens)
    assert_same(watch.run(10 ** 9, prefill_tokens=200), first)
    assert max(watch.tokens) <= 200 < at_once
    assert watch.orders and all(lengths == sorted(lengths) for lengths in watch.orders)

def waiting_rows(sizes, prompt=10):
    """Rows of groups of these sizes; all prompts are as long."""
    rows = []
    for p, size in enumerate(sizes):
        one = Episode(None, ids=[p] * prompt)
        rows += [Row(Episode(None, ids=list(one.ids)), one, None) for _ in range(size)]
    return rows

@pytest.mark.parametrize("sizes, bound, want", [
    ([3, 3, 3], 10 ** 6, 9),
    ([3, 3, 3], 2 * (10 + 3 * 20), 6),
    ([3, 3, 3], 2 * (10 + 3 * 20) - 1, 3),
    ([3, 3], 10 + 2 * 20, 2),
    ([3, 3], 1, 1)])
def test_groups_begin_whole(models, sizes, bound, want):
    """Bug: a group is torn though there is no need, and its prompt is computed twice; one that
    cannot fit as a whole never begins."""
    one = running.Running(models["qwen2.5"], RolloutConfig(style="think", max_new_tokens=40,
                                                           max_batch_tokens=bound))
    rows = waiting_rows(sizes)
    waiting = deque(rows)
    assert one.expected_slots() == 20 and one.round_tokens == 40
    one.config = RolloutConfig(style="think", max_new_tokens=10, max_batch_tokens=bound)
    one.longest = 20
    assert one.take(waiting) == rows[:want] and list(waiting) == rows[want:]

def test_what_a_row_is_expected_to_need(models):
    """Claim: half of the worst case until as many rows have ended as began; then what the longest
    so far needed."""
    one = running.Running(models["qwen2.5"], RolloutConfig(style="think", max_new_tokens=1000))
    one.began, one.longest = 2, 120
    found = []
    for one.ended in (0, 1, 2):
        found.append(one.expected_slots())
    assert found == [500, 500, 120] and one.round_tokens == 256

def test_what_rows_need_to_read(models):
    """Bug: a row of 90 tokens that reads one more and a row of 20 that reads a crop of 70: the
    rectangle has 89 + 70 slots meanwhile."""
    one = running.Running(models["qwen2.5"], RolloutConfig(style="think", max_new_tokens=40))
    rows = waiting_rows([2])
    for row, own in zip(rows, (90, 20)):
        row.episode.ids += [5] * own
    assert (one.needed_slots(rows, [[5], [5] * 70]) == 89 + 70
            and one.needed_slots(rows) == 90 + 40 == one.needed_slots(rows, [[5], [5]]))

@pytest.mark.parametrize("bound, want", [(4 * (10 + 50), True), (4 * (10 + 50) - 1, False)])
def test_rows_that_begin_beside_others_are_as_wide(models, bound, want):
    """Bug: the cache of the rows that run has 50 slots; rows that begin beside them are counted by
    what they will need themselves, and the joined cache is larger than it may be."""
    one = running.Running(models["qwen2.5"], RolloutConfig(style="think", max_new_tokens=10,
                                                           max_batch_tokens=bound))
    first, others = waiting_rows([1, 1, 1, 1])[:1], waiting_rows([1, 1, 1])
    one.rows, one.cache = first, SimpleNamespace(keys=[torch.zeros(1, 1, 50, 1)])
    assert one.can_begin(first + others) == want
    one.rows = []
    assert one.can_begin(others)

# -----------------------------------------------------------------------------
# do the tests bite?

RUNNING = "appendix.running:Running"
SHARED = test_what_is_sampled_does_not_depend_on_room, dict(plain=False, bold=True)

MUTATIONS = [
    (f"{RUNNING}.begin", "row.episode.views[len(row.prompt.views):]", "row.episode.views", *SHARED),
    (f"{RUNNING}.begin", "row.episode.ids[len(row.prompt.ids):]",
     "row.episode.ids[len(row.prompt.ids):-1]", *SHARED),
    (f"{RUNNING}.begin", "torch.where(has_said[:, None], own_logits, logits)", "logits", *SHARED),
    (f"{RUNNING}.admit", "torch.cat([self.logits, logits])", "torch.cat([logits, self.logits])",
     *SHARED),
    (f"{RUNNING}.admit", "self.rows and not self.vlm.shares_prompts", "self.rows", *SHARED),
    (f"{RUNNING}.put_aside", "len(staying) > 1", "False", *SHARED),
    (f"{RUNNING}.put_aside", "waiting.appendleft(last)", "pass", *SHARED),
    (f"{RUNNING}.put_aside", "last.continues(0)", "pass", *SHARED),
    (f"{RUNNING}.needed_slots", "max(max(own) + self.round_tokens, cached + read)",
     "max(own) + self.round_tokens", test_what_rows_need_to_read, {}),
    (f"{RUNNING}.can_begin", "max(self.expected_slots(), self.needed_slots(rows), held)",
     "max(self.needed_slots(rows), held)",
     test_groups_begin_whole, dict(sizes=[3, 3], bound=50, want=2)),
    (f"{RUNNING}.can_begin", "self.cache.keys[0].shape[2] if self.rows else 0", "0",
     test_rows_that_begin_beside_others_are_as_wide, dict(bound=4 * (10 + 50) - 1, want=False)),
    (f"{RUNNING}.fits", "num_prompts = len({row.prompt_copy or id(row.prompt) for row in rows})",
     "pass", test_groups_begin_whole, dict(sizes=[3, 3], bound=50, want=2)),
    (f"{RUNNING}.expected_slots", "parts.most_slots(self.vlm, self.config) // 2",
     "parts.most_slots(self.vlm, self.config)", test_what_a_row_is_expected_to_need, {}),
    (f"{RUNNING}.go_on", "staying.sort(key=lambda b: len(responses[b][0]))", "pass",
     test_a_long_prefill_is_cut_where_padding_is_least, {}),
    (f"{RUNNING}.prefill", "self.config.prefill_tokens", "10 ** 9",
     test_a_long_prefill_is_cut_where_padding_is_least, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, models):
    """Bug: a test that no bug can turn red."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_mutation(target, old, new, test, arguments, {
            "models": lambda: models, "monkeypatch": lambda: monkeypatch})
