"""A step of RL and the loop around it, on a random tiny model: the gradient against one written out
by hand, what a step leaves out, how a run is resumed. At the end MUTATIONS puts bugs into
train_rl.py and what it stands on, and requires the named test to fail.

The rewards are given by hand (a random model earns none), so every group's advantages are known.
"""
import contextlib, copy, dataclasses, itertools, json, math, os, random, re, shlex, signal
import statistics, sys, tempfile, time, zlib
from dataclasses import replace
from unittest import mock

import pytest
import torch
from PIL import Image

import data, evaluate, grpo, model, rewards, train_rl, train_sft, zoom_rollout
from appendix import metrics as step_metrics
from appendix import (averages, evidence, group_view, prefix, recipes, report, rl_options, rl_run,
                      run, split)
from conftest import check_mutation, close, names
from safetensors.torch import load_file

SAMPLES = data.toy("search", "train", 3)
# 3 prompts x 4; the last has no signal
REWARDS = [1.0, 0.0, 0.0, 0.5,  0.0, 1.0, 1.0, 1.0,  0.25, 0.25, 0.25, 0.25]

@pytest.fixture(scope="module")
def vlm(models):
    return models["qwen2.5"]

def flat(vlm):
    """The gradients as one vector, cleared."""
    out = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                     for p in vlm.parameters()])
    for p in vlm.model.parameters():
        p.grad = None
    return out

class Recorder:
    """In the optimizer's place: keeps gradients and learning rates, and changes nothing."""
    def __init__(self, vlm):
        self.vlm, self.grads, self.lrs = vlm, [], []

    def step(self, lr, clip=1.0):
        self.lrs.append(lr)
        self.grads.append(flat(self.vlm))
        return self.grads[-1].norm().item()

def given(values):
    """In the place of rewards.score: these rewards, in order; above 0.5 is right."""
    it = iter(values)
    return lambda *_, **__: (lambda v: {"reward": v, "accuracy": float(v > 0.5),
                                        "format": 1.0})(next(it))

def run_step(vlm, values=REWARDS, step=5, ref=None, samples=SAMPLES, **flags):
    """train_step on real rollouts of five tokens a turn -> metrics, episodes, recorder"""
    cfg = train_rl.Config(**{
        **dict(recipe="vigorl-zoom", group_size=4, blind_prompts=0, max_new_tokens=5,
               max_zooms=1, temperature=0.7),
        **flags})
    recorder = Recorder(vlm)
    flat(vlm)
    with (mock.patch.object(rewards, "score", given(values))
          if values else contextlib.nullcontext()):
        metrics, episodes = train_rl.train_step(vlm, ref, recorder, Asked(cfg, samples), cfg, step)
        rl_run.stop_if_nothing_succeeds(episodes, step)
    return metrics, episodes, recorder

class Asked:
    """Questions whose first round is given; dynamic sampling's rounds are the toy world's."""
    def __init__(self, cfg, samples):
        self.samples = samples
        self.fresh = train_rl.Questions(cfg, data.SIDE)

    def of_step(self, step, again=0):
        return self.fresh.of_step(step, again) if again else self.samples

def standardized(group):
    mean, std = statistics.mean(group), statistics.stdev(group)
    return [(r - mean) / (std + 1e-6) for r in group]

def loss_by_hand(vlm, episodes, A, aggregate):
    """- sum A logp over tokens / tokens; over episodes of means / episodes; over tokens /
    (all 12 episodes * 2 turns of 5 tokens)"""
    logprobs, _, mask = vlm.logprobs(episodes, 0.7)
    per_token = -torch.tensor(A)[:, None] * logprobs
    return {"token": per_token.sum() / mask.sum(),
            "sequence": (per_token.sum(1) / mask.sum(1)).mean(),
            "constant": per_token.sum() / 120}[aggregate]

# -----------------------------------------------------------------------------
# a step of RL

@pytest.mark.parametrize("micro_tokens", [1, 10 ** 6])
@pytest.mark.parametrize("aggregate", list(grpo.AGGREGATES))
def test_gradient_of_a_step(vlm, aggregate, micro_tokens):
    """Bug: an advantage on the wrong episode, a mean over each micro-batch, groups without a signal
    left out of the count. On-policy the gradient is REINFORCE's, whatever the micro-batch: with 1
    every episode is run alone."""
    metrics, episodes, recorder = run_step(vlm, aggregate=aggregate, micro_tokens=micro_tokens)
    A = standardized(REWARDS[:4]) + standardized(REWARDS[4:8])
    close([e.advantage for e in episodes], A + [0.0] * 4, 1e-5)
    assert [e.sample for e in episodes] == [s for s in SAMPLES for _ in range(4)]
    loss_by_hand(vlm, episodes, A + [0.0] * 4, aggregate).backward()
    (got,) = recorder.grads
    close(got, flat(vlm), 1e-3)
    assert (metrics["frac_zero_std"] == pytest.approx(1 / 3)
            and metrics["reward"] == pytest.approx(statistics.mean(REWARDS)))
    assert (metrics["accuracy"] == pytest.approx(4 / 12)
            and metrics["grad_norm"] == pytest.approx(got.norm().item(), rel=1e-4))

@pytest.mark.parametrize("aggregate", list(grpo.AGGREGATES))
def test_a_penalty_of_nothing_changes_nothing(vlm, aggregate):
    """Bug: without a KL term groups without a signal were not counted, so the gradient was another
    than with one of 1e-30."""
    for flags in ({}, {"mask_negative": True}):
        gradients = [
            run_step(vlm, aggregate=aggregate, ref=vlm, kl_coef=kl_coef, **flags)[2].grads[0]
            for kl_coef in (0.0, 1e-30)]
        close(*gradients, 1e-5)

@pytest.mark.parametrize("flags", [
    dict(blind_prompts=1),
    dict(blind_prompts=1, kl_coef=0.1, papo_coef=0.1, micro_tokens=1),
], ids=["default", "three passes"])
def test_plain_gives_the_same_step(vlm, flags):
    """Claim: --plain, where every episode holds its own prompt, samples the same tokens and gives
    the same numbers, to rounding."""
    plain = model.VLM(vlm.model, vlm.tokenizer, vlm.processor, vlm.name, vlm.spec)
    assert not isinstance(plain, prefix.PrefixVLM) and isinstance(vlm, prefix.PrefixVLM)
    steps = [run_step(policy, ref=policy, **flags) for policy in (vlm, plain)]
    (metrics, episodes, recorder), (plain_metrics, plain_episodes, plain_recorder) = steps
    assert ([e.ids for e in episodes] == [e.ids for e in plain_episodes]
            and [e.turns for e in episodes] == [e.turns for e in plain_episodes])
    close(plain_recorder.grads[0], recorder.grads[0], 1e-3)
    for name, value in metrics.items():
        if ("_per_s" not in name and "share_" not in name
                and name not in ("seconds", "logp_gap", "logp_gap_max")):
            assert plain_metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert plain_metrics["logp_gap_max"] < 1e-4

def test_no_signal_is_not_run(vlm):
    """Claim: groups of equal rewards cost no forward pass, unless a KL term pulls on them too;
    none at all: no update."""
    for flags, values, expected in (({}, REWARDS, 8),
                                    ({"kl_coef": 0.1, "ref": vlm}, REWARDS, 12),
                                    ({}, [1.0] * 12, 0)):
        with mock.patch.object(vlm, "logprobs", side_effect=vlm.logprobs) as seen:
            metrics, _, recorder = run_step(vlm, values, **flags)
        assert (sum(len(c.args[0]) for c in seen.call_args_list)
                == expected * (2 if flags else 1))
        assert len(recorder.grads) == (expected > 0)
    assert (metrics["frac_zero_std"] == 1
            and metrics["grad_norm"] == metrics["logp_gap"] == metrics["train_tokens_per_s"] == 0)
    # an average episode is no group without a signal
    assert run_step(vlm, [1.0, 0.0, 0.5, 0.5] * 3)[0]["frac_zero_std"] == 0

def test_sampler_and_trainer_agree_and_it_would_show(vlm):
    """Claim: logp_gap is rounding when both use the same temperature; one episode whose
    log-probabilities are off by 0.5 shows."""
    metrics, episodes, _ = run_step(vlm)
    assert (0 < metrics["logp_gap"] <= metrics["logp_gap_max"] < 1e-4
            and metrics["clipfrac"] == 0 < metrics["entropy"])
    episodes[2].logprobs = [lp - 0.5 * s
                            for lp, s in zip(episodes[2].logprobs, episodes[2].completion_mask)]
    with mock.patch.object(zoom_rollout, "rollout", return_value=episodes):
        metrics, *_ = run_step(vlm)
    assert (metrics["logp_gap_max"] == pytest.approx(0.5, abs=1e-3)
            and metrics["logp_gap"] == pytest.approx(0.5 / 8, rel=0.3))
    assert metrics["clipfrac"] == 0             # A < 0 and the ratio above: on its way back

def test_minibatches_split_the_step(vlm):
    """Bug: every minibatch sees all episodes, or some are seen by none."""
    metrics, episodes, recorder = run_step(vlm, num_minibatches=3)
    assert len(recorder.grads) == 3 and recorder.lrs == [train_rl.Config.lr] * 3
    with mock.patch.object(vlm, "logprobs", side_effect=vlm.logprobs) as seen:
        run_step(vlm, num_minibatches=3)
    parts = [c.args[0] for c in seen.call_args_list]
    ids = [tuple(e.ids) for part in parts for e in part]
    assert (all(len(part) <= 4 for part in parts)       # 4 of 12, less those without a signal
            and sorted(ids) == sorted(tuple(e.ids) for e in episodes[:8]))
    assert metrics["logp_gap_max"] < 1e-4

def test_learning_rate_warms_up(vlm):
    lrs = [run_step(vlm, step=step, lr=0.3)[2].lrs[0] for step in (0, 1, 2, 9)]
    assert lrs == pytest.approx([0.1, 0.2, 0.3, 0.3])

def test_blind_prompts(vlm):
    """Claim: the first blind prompts must answer at once, the others may zoom; the groups stay in
    the order of the prompts. A recipe without zooms has none, and they are never all there is."""
    metrics, episodes, _ = run_step(vlm, blind_prompts=2)
    assert [e.sample for e in episodes] == [s for s in SAMPLES for _ in range(4)]
    assert [e.turns[0].forced for e in episodes] == [True] * 8 + [False] * 4
    close([e.advantage for e in episodes],
          standardized(REWARDS[:4]) + standardized(REWARDS[4:8]) + [0.0] * 4, 1e-5)
    for flags in (dict(recipe="vigorl", blind_prompts=2), dict(blind_prompts=3)):
        assert not any(e.turns[0].forced for e in run_step(vlm, **flags)[1])

def test_difficulty_weight_multiplies_the_groups_advantages(vlm):
    """UniVG-R1: the group that is right one time in four counts more than that which is
    right three times."""
    _, plain, _ = run_step(vlm)
    _, hard, _ = run_step(vlm, difficulty_weight="exp")
    factor = [h.advantage / p.advantage for h, p in zip(hard[:8], plain[:8])]
    # the third group's are equal, none is right
    phi = [torch.exp(torch.tensor(1 - m)) for m in [0.25] * 4 + [0.75] * 4 + [0] * 4]
    close(factor, phi[:8], 1e-4)
    log, normalized, _ = run_step(vlm, difficulty_weight="exp", difficulty_normalize=True)
    close([n.advantage / p.advantage for n, p in zip(normalized[:8], plain[:8])],
          [3 * w / (phi[0] + phi[4] + phi[8]) for w in phi[:8]], 1e-4)
    assert log["weight"] == pytest.approx(1)

@pytest.mark.parametrize("flags", [
    {},
    dict(difficulty_weight="exp", difficulty_normalize=True),
    dict(advantage_scale="none", difficulty_weight="power"),
], ids=str)
def test_the_report_of_a_group_adds_up_to_the_step(vlm, flags):
    """Claim: of every group, what the lesson of the report shows (mean, deviation, weight) leads to
    the advantages that the step used."""
    _, episodes, _ = run_step(vlm, **flags)
    for g in range(0, 12, 4):
        tries = episodes[g:g + 4]
        lesson = group_view.make_lesson(6, tries, train_rl.Config(group_size=4, **flags))
        assert ([scaled * lesson.weight for scaled in lesson.scaled]
                == pytest.approx([e.advantage for e in tries], abs=1e-6))
        divisor = lesson.deviation + 1e-6 if lesson.is_divided else 1
        assert ([(e.reward_components["reward"] - lesson.mean) / divisor for e in tries]
                == pytest.approx(lesson.scaled, abs=1e-4))
        assert not any(group_view.note_on(lesson, k) for k in range(4)) and all(lesson.counted)

def test_kl_pulls_towards_the_reference(vlm):
    """Bug: the penalty's sign. With the policy as its own reference nothing is added; with another,
    kl_coef times the k3 gradient."""
    metrics, episodes, recorder = run_step(vlm, REWARDS[:8], samples=SAMPLES[:2])
    same, _, with_self = run_step(vlm, REWARDS[:8], samples=SAMPLES[:2], ref=vlm, kl_coef=0.5)
    close(with_self.grads[0], recorder.grads[0], 1e-4)
    assert same["kl"] == pytest.approx(0, abs=1e-9)
    other = prefix.PrefixVLM(copy.deepcopy(vlm.model), vlm.tokenizer, vlm.processor,
                             vlm.name, vlm.spec)
    with torch.no_grad():
        other.model.lm_head.weight.mul_(1.3)
    pulled, _, with_other = run_step(vlm, REWARDS[:8], samples=SAMPLES[:2], ref=other, kl_coef=0.5)
    logprobs, _, mask = vlm.logprobs(episodes, 0.7)
    penalty = (grpo.kl_penalty(logprobs, other.logprobs(episodes, 0.7)[0], "k3", mask).sum()
               / mask.sum())
    penalty.backward()
    close(with_other.grads[0] - recorder.grads[0], 0.5 * flat(vlm), 1e-2)
    assert (pulled["kl"] == pytest.approx(penalty.item(), rel=1e-3)
            and all(p.grad is None for p in other.model.parameters()))

def test_over_turn(vlm):
    """Claim: an episode that a limit cut off gets advantage 0 (mask), and its reward does not move
    the others' either (exclude). To have had to answer at once is no such thing."""
    s, answer = SAMPLES[0], "<think> It is at (50, 50). </think>\n<answer> lined </answer>"
    call, forced = (f"<think> It may be at (50, 50). </think>\n{data.tool_call(50, 50)}",
                    f"{data.FORCE} lined </answer>")
    values = [1.0, 0.0, 0.5, 0.0]
    for over_turn, A in (("train", standardized(values)),
                         ("mask", standardized(values)),
                         ("exclude", standardized([1.0, 0.5]))):
        episodes = [zoom_rollout.replay(vlm, s, turns, max_zooms=1)
                    for turns in ([call, answer], [call, forced], [forced], [answer])]
        episodes[3].finish_reason = "length"
        with mock.patch.object(zoom_rollout, "rollout", return_value=episodes):
            run_step(vlm, values, samples=[s], over_turn=over_turn)
        want = (A if over_turn == "train"
                else [A[0], 0, A[2], 0] if over_turn == "mask"
                else [A[0], 0, A[1], 0])
        close([e.advantage for e in episodes], want, 1e-5)

def test_negative_advantages_masked(vlm):
    _, episodes, recorder = run_step(vlm, REWARDS[:8], samples=SAMPLES[:2], mask_negative=True)
    A = [max(a, 0) for a in standardized(REWARDS[:4]) + standardized(REWARDS[4:8])]
    close([e.advantage for e in episodes], A, 1e-5)
    loss_by_hand(vlm, episodes, A, "token").backward()
    close(recorder.grads[0], flat(vlm), 1e-3)

def test_bonuses_are_part_of_the_reward(vlm):
    """Claim: curiosity and the price of length are added to the recipe's reward before the group is
    compared, in one place: report and rows show them."""
    s, answer = SAMPLES[0], "<think> It is at (50, 50). </think>\n<answer> lined </answer>"
    call = f"<think> It may be at (50, 50). </think>\n{data.tool_call(50, 50)}"
    for flags, bonus in (
            (dict(zoom_cost=0.07), lambda e: -0.07 * (len(e.turns) > 1)),
            (dict(curiosity=0.5), lambda e: 0.5 * (0.3 - 0.25) * (len(e.turns) > 1)),
            (dict(overlong=60, max_new_tokens=40),
             lambda e: max(-1, min(0, (80 - 60 - sum(e.completion_mask)) / 60)))):
        episodes = [zoom_rollout.replay(vlm, s, turns)
                    for turns in ([call, answer], [answer], [answer], [answer])]
        with mock.patch.object(zoom_rollout, "rollout", return_value=episodes):
            metrics, *_ = run_step(vlm, [1.0, 0.0, 0.0, 0.5], samples=[s], **flags)
        values = [v + bonus(e) for v, e in zip([1.0, 0.0, 0.0, 0.5], episodes)]
        close([e.advantage for e in episodes], standardized(values), 1e-4)
        assert metrics["reward"] == pytest.approx(sum(values) / 4) != 1.5 / 4
        (name,) = set(flags) & {"zoom_cost", "curiosity", "overlong"}
        assert metrics[name] == pytest.approx(sum(map(bonus, episodes)) / 4)
        for e, value in zip(episodes, values):
            assert (e.reward_components["reward"] == pytest.approx(value)
                    and e.reward_components[name] == pytest.approx(bonus(e)))

def test_evidence(vlm):
    """Claim: an episode saw its evidence if the middle of every evidence box lies in one of its
    crops; unknown without evidence. --evidence-bonus pays for it, whatever the answer; the shares
    of a summary add up."""
    s = SAMPLES[0]
    x1, y1, x2, y2 = s.meta["evidence"][0]["box"]
    view = vlm.view(s.images[0])
    x, y = view.from_source((x1 + x2) / 2, (y1 + y2) / 2)
    far = view.from_source(*[
        0.1 * side if middle > side / 2 else 0.9 * side
        for middle, side in zip(((x1 + x2) / 2, (y1 + y2) / 2), s.images[0].size)])
    answer = "<think> It is at (50, 50). </think>\n<answer> lined </answer>"
    look = lambda *at: f"<think> It may be at ({at[0]}, {at[1]}). </think>\n{data.tool_call(*at)}"
    episodes = [zoom_rollout.replay(vlm, s, turns)
                for turns in ([look(x, y), answer], [look(*far), answer], [answer],
                              [look(*far), look(x, y), answer])]
    assert [evidence.saw(e) for e in episodes] == [True, False, False, True]
    assert (evidence.share_that_saw(episodes) == 0.5
            and evidence.share_that_saw(episodes[2:3]) is None)
    both = replace(episodes[0], sample=replace(
        s, meta={"evidence": [*s.meta["evidence"], {"image": 0, "box": [0, 0, 1, 1]}]}))
    assert (evidence.saw(both) is False
            and evidence.saw(replace(both, sample=replace(s, meta={}))) is None)
    with mock.patch.object(zoom_rollout, "rollout", return_value=episodes):
        metrics, *_ = run_step(vlm, [1.0, 0.0, 0.0, 0.5], samples=[s], evidence_bonus=0.3)
    close([e.advantage for e in episodes], standardized([1.3, 0.0, 0.0, 0.8]), 1e-4)
    assert metrics["saw"] == 0.5 and metrics["evidence"] == pytest.approx(0.15)
    rows = [{"saw": saw, "zooms": 1, "right": right}
            for saw, right in ((True, True), (True, False), (False, True), (False, False))]
    assert (set(evidence.right_and_saw([*rows, {"right": True}], lambda r, _: r["right"]).values())
            == {0.5, 0.25})
    assert evidence.right_and_saw([{"right": True}], lambda r, _: r["right"]) == {}
    odd = [replace(s, meta={"evidence": value})
           for value in ([], "text", ["text"], [{"image": 0}])]
    assert [evidence.saw(replace(episodes[0], sample=sample)) for sample in odd] == [None] * 4

@pytest.mark.parametrize("how, seen", [
    (dict(zoom="on"), True),
    (dict(zoom="off"), False),
    (dict(zoom="black"), False),
    (dict(style="think"), False),
], ids=str)
def test_who_could_see(vlm, how, seen):
    """Bug: a policy that never zooms has no `saw`, so its seeds drop out of a mean; a black crop,
    or a prompt without a tool, counts as a look."""
    s = SAMPLES[0]
    x1, y1, x2, y2 = s.meta["evidence"][0]["box"]
    x, y = vlm.view(s.images[0]).from_source((x1 + x2) / 2, (y1 + y2) / 2)
    answer = f"<think> It is at (50, 50). </think>\n<answer> {s.options[s.answer]} </answer>"
    call = f"<think> It may be at ({x}, {y}). </think>\n{data.tool_call(x, y)}"
    for turns, expected in (([call, answer], 1.0), ([answer], 0.0)):
        e = zoom_rollout.replay(vlm, s, turns)
        evaluate.finish_episode(vlm, e, zoom_rollout.RolloutConfig(**how),
                                evaluate.RunOptions(), False)
        summary = evaluate.summary_of([e])
        assert ((summary.get("saw"), summary.get("right_and_saw"))
                == ((expected, expected) if seen else (None, None)))

def test_every_turn_is_scored(vlm):
    """Bug: the answer is looked for in the first turn alone, so that an episode that zooms
    is never right."""
    s = SAMPLES[0]
    answer = f"<think> It is at (50, 50). </think>\n<answer> {s.options[s.answer]} </answer>"
    call = f"<think> It may be at (50, 50). </think>\n{data.tool_call(50, 50)}"
    episodes = [zoom_rollout.replay(vlm, s, turns)
                for turns in ([answer], [call, answer], [call, call, answer])]
    train_rl.score_episodes(episodes, train_rl.Config(recipe="vigorl-zoom", group_size=3))
    assert [e.reward_components["reward"] for e in episodes] == [1, 1, 1]

def test_a_control_has_no_bonus():
    """Bug: --control with --zoom-cost dropped the cost without a word."""
    for flags in (dict(zoom_cost=0.1), dict(evidence_bonus=0.1), dict(overlong=5),
                  dict(reward_parts="format")):
        rl_options.check_options(train_rl.Config(recipe="vigorl-zoom", **flags), 99)
        with pytest.raises(SystemExit):
            rl_options.check_options(
                train_rl.Config(recipe="vigorl-zoom", control="random", **flags), 99)

def test_control_rewards(vlm):
    """Claim: the reward of a control is a coin that the seed decides, the form alone, or 1 for a
    well-formed wrong answer."""
    s = SAMPLES[0]
    right, wrong = (f"<think> It is at (50, 50). </think>\n<answer> {o} </answer>"
                    for o in (s.options[s.answer], s.options[s.answer - 1]))
    episodes = [zoom_rollout.replay(vlm, s, [text]) for text in (right, wrong, "lined", right)]
    def rewards_with(control, seed=0):
        cfg = train_rl.Config(control=control, recipe="vigorl-zoom", seed=seed, group_size=4)
        train_rl.score_episodes(episodes, cfg)
        return [e.reward_components["reward"] for e in episodes]
    assert rewards_with("format") == [1, 1, 0, 1] and rewards_with("inverted") == [0, 1, 0, 0]
    coins = [rewards_with("random", seed) for seed in range(40)]
    assert (coins == [rewards_with("random", seed) for seed in range(40)]
            and {v for c in coins for v in c} == {0, 1})
    assert 50 < sum(map(sum, coins)) < 110 and any(c[0] != c[3] for c in coins)

def test_a_sampler_of_another_precision(vlm):
    """Claim: a bf16 sampler shows in logp_gap, and images are encoded anew for the trainer. ignore
    has REINFORCE's gradient, as if both agreed; truncate weights each token by
    min(trainer / sampler, cap), by hand; ratio has the same weights where nothing is clipped."""
    grads = {}
    for mismatch, cap in (("ratio", 2.0), ("ignore", 2.0), ("truncate", 1.0), ("truncate", 50.0)):
        metrics, episodes, recorder = run_step(
            vlm, sampler_dtype="bfloat16", mismatch=mismatch, importance_cap=cap,
            clip_low=1.0, clip_high=50.0)
        assert (1e-4 < metrics["logp_gap"] < 0.2
                and vlm.dtype == torch.float32
                and metrics["tokens_run"] > 0)
        assert all(view.features.dtype == torch.float32
                   for e in episodes if e.advantage for view in e.views)
        logprobs, _, mask = vlm.logprobs(episodes, 0.7)
        weights = (torch.ones_like(logprobs) if mismatch == "ignore"
                   else (logprobs - train_rl.sampler_logprobs(episodes, logprobs)
                         ).exp().detach().clamp(max=cap))
        A = torch.tensor([e.advantage for e in episodes])[:, None]
        (-(weights * A * logprobs)[mask].sum() / mask.sum()).backward()
        close(recorder.grads[0], flat(vlm), 1e-3)
        assert metrics.get("importance", 1) == pytest.approx(
            weights[mask & (A != 0)].mean().item() if mismatch == "truncate" else 1, rel=1e-4)
        grads[mismatch, cap] = recorder.grads[0]
    assert run_step(vlm)[0]["logp_gap"] < 1e-4
    for one, other in itertools.combinations(grads, 2):
        same = {one, other} == {("ratio", 2.0), ("truncate", 50.0)}
        assert torch.allclose(grads[one], grads[other], rtol=1e-3, atol=1e-6) == same

def test_reward_parts():
    """Claim: --reward-parts replaces the recipe's reward by a sum of its components; hit is the IoU
    cut at one half. Another name is refused before any work."""
    s = data.toy("boxes", "test", 1)[0]
    x1, y1, x2, y2 = map(round, s.targets[0]["box"])
    episodes = [
        zoom_rollout.Episode(s, turns=[
            zoom_rollout.Turn(f"{thought}<answer>({x1},{y1}),({x2},{bottom})</answer>")])
        for thought, bottom in (("<think>so</think>", y2),
                                ("<think>so</think>", y2 - round(0.2 * (y2 - y1))),
                                ("", y1 + 2))]
    for parts, expected in (("", lambda c: c["iou"] + c["format"]),
                            ("hit,format", lambda c: c["hit"] + c["format"]),
                            ("iou", lambda c: c["iou"])):
        train_rl.score_episodes(episodes, train_rl.Config(
            reward_parts=parts, recipe="univg-r1", task="boxes", group_size=3))
        found = [e.reward_components for e in episodes]
        assert ([c["reward"] for c in found] == [expected(c) for c in found]
                and [c["hit"] for c in found] == [1, 1, 0])
    assert 0.5 < found[1]["iou"] < 0.9 and [c["format"] for c in found] == [1, 1, 0]
    for recipe, parts in itertools.product(rl_options.REWARD_PARTS, ("iou", "distinct", "format")):
        cfg = train_rl.Config(recipe=recipe, reward_parts=parts)
        with (contextlib.nullcontext() if parts in rl_options.REWARD_PARTS[recipe]
              else pytest.raises(SystemExit)):
            rl_options.check_options(cfg, 99)
    assert set(rl_options.REWARD_PARTS) == set(rewards.RECIPES) - {"accuracy"}

def test_a_bonus_is_a_signal(vlm):
    """Bug: dynamic sampling replaced groups that differ in their bonus alone."""
    s, answer = SAMPLES[0], "<think> It is at (50, 50). </think>\n<answer> lined </answer>"
    longer = answer.replace("(50, 50)", "(50, 50), I think")
    episodes = [zoom_rollout.replay(vlm, s, [text]) for text in (answer, longer, answer, answer)]
    with mock.patch.object(zoom_rollout, "rollout", return_value=episodes):
        metrics, *_ = run_step(vlm, [0.5] * 8, samples=[s], resample=1, overlong=60,
                               max_new_tokens=40, step=1)
    assert metrics["frac_zero_std"] == 0 and metrics["resampled"] == 0

def test_refill(vlm):
    """Claim: groups without a signal give way, in place, to groups of prompts that the step has not
    asked, as long as there are some and rounds are left; blind groups stay. Bug: an endless loop
    where nothing has a signal."""
    flat_group, live = [0.5] * 4, [1.0, 0.0, 0.0, 0.5]
    metrics, episodes, _ = run_step(
        vlm, flat_group + live + flat_group + flat_group + live * 9, resample=2)
    assert metrics["resampled"] == 2 + 1 and metrics["frac_zero_std"] == 0
    ids = [e.sample.id for e in episodes[::4]]
    assert ids == ["search/train/rl0/5/2/0", SAMPLES[1].id, "search/train/rl0/5/1/1"]
    assert all(e.sample.id == ids[i // 4] for i, e in enumerate(episodes))
    metrics, episodes, _ = run_step(vlm, flat_group * 99, resample=2)
    assert (metrics["resampled"] == 6 and metrics["frac_zero_std"] == 1
            and episodes[0].sample.id == "search/train/rl0/5/2/0")
    metrics, episodes, _ = run_step(
        vlm, flat_group * 2 + live + live * 9, resample=1, blind_prompts=1)
    assert (metrics["resampled"] == 1 and episodes[0].sample is SAMPLES[0]
            and "resampled" not in run_step(vlm)[0])

def test_papo_pushes_away_from_the_blindfolded(vlm):
    """Bug: the sign; or the second look is the first. The term's gradient alone (all rewards
    equal), against one by hand whose images are painted black where the patches are; the policy's
    own views stay whole."""
    metrics, episodes, recorder = run_step(vlm, [1.0] * 4, samples=SAMPLES[:1], papo_coef=0.5)
    blind = rl_options.blindfold(vlm, episodes, 5)
    view, dark = episodes[0].views[0], blind[0].views[0]
    black = vlm.view(Image.new("RGB", (448, 448)))
    vlm.patchify(black), vlm.patchify(view)
    hidden = (dark.patches == black.patches).all(1)
    assert (0.3 < hidden.float().mean() < 0.9
            and (dark.patches[~hidden] == view.patches[~hidden]).all()
            and view is not dark)
    logprobs, _, mask = vlm.logprobs(episodes, 0.7)
    masked = vlm.logprobs(blind, 0.7)[0]
    gain = (torch.exp(masked - logprobs) - 1 - (masked - logprobs))[mask].sum() / mask.sum()
    (-0.5 * gain).backward()
    close(recorder.grads[0], flat(vlm), 1e-3)
    assert metrics["perception"] == pytest.approx(gain.item(), rel=1e-3) and gain > 0

def test_shares_of_easy_and_hard(vlm):
    """Figure 3 of UniVG-R1: by the mean IoU of the group, not by episodes."""
    assert (step_metrics.difficulty_shares(torch.tensor([0.71, 0.7, 0.3, 0.29, 0.0]))
            == {"easy": (1, 5), "medium": (2, 5), "hard": (2, 5)})
    boxes = data.toy("boxes", "train", 2)
    it = iter([1.0, 0.0, 1.0, 0.9, 0.0, 0.5, 0.0, 0.0])
    score = lambda *_, **__: (lambda v: {"reward": v, "accuracy": v, "iou": v,
                                         "format": 1.0})(next(it))
    with mock.patch.object(rewards, "score", score):
        metrics, *_ = run_step(vlm, None, samples=boxes, recipe="univg-r1")
    assert ((metrics["easy"], metrics["medium"], metrics["hard"]) == (0.5, 0, 0.5)
            and metrics["iou"] == pytest.approx(3.4 / 8))
    assert "easy" not in run_step(vlm)[0]

def test_recipes_hold_the_papers_numbers(capsys):
    """Claim: a recipe is a set of field values, printed; flags win over it; it changes a tiny
    model's algorithm and not its step size; without one nothing changes."""
    config = lambda *flags: run.parse_config(
        train_rl.Config, list(flags), train_rl.__doc__, recipes.presets)
    tiny = config("--recipe", "univg-r1")
    assert "difficulty_weight = 'exp'" in capsys.readouterr().out
    assert ((tiny.task, tiny.difficulty, tiny.kl_coef, tiny.kl, tiny.clip_low, tiny.clip_high,
             tiny.aggregate, tiny.advantage_scale, tiny.group_size, tiny.num_minibatches,
             tiny.lr, tiny.steps)
            == ("boxes", "mixed", 0.04, "k3", 0.2, 0.2,
                "sequence", "std", 8, 1,
                train_rl.Config.lr, 150))
    large = config("--recipe", "univg-r1", "--model", "qwen2.5-vl-7b")
    assert ((large.lr, large.num_prompts, large.max_new_tokens, large.sft_lr, large.temperature,
             large.kl_coef, large.steps)
            == (1e-6, 16, 256, 5e-6, 1, 0.04, 625))
    zoom, single = (config("--recipe", recipe, "--model", "qwen2.5-vl-3b")
                    for recipe in ("vigorl-zoom", "vigorl"))
    assert all((c.lr, c.num_prompts, c.kl_coef, c.clip_low, c.clip_high,
                c.loss, c.aggregate, c.steps)
               == (1e-6, 128, 0.01, 0.2, 0.28, "dual-clip", "token", 500)
               for c in (zoom, single))
    assert ((zoom.group_size, single.group_size, zoom.num_minibatches, single.num_minibatches,
             zoom.clip_grad, single.clip_grad)
            == (8, 5, 16, 2, 0.2, 1))
    assert (zoom.distinct_bonus, zoom.max_zooms) == (0.2, 4)
    assert config("--recipe", "univg-r1", "--kl-coef", "0", "--task", "search").kl_coef == 0
    own = [config("--data", "q.jsonl", *flags).traces
           for flags in ((),
                         ("--model", "qwen2.5-vl-3b"),
                         ("--model", "qwen2.5-vl-3b", "--traces", "t.jsonl"))]
    assert own == ["mcts", "", "t.jsonl"] and (
        config("--model", "qwen2.5-vl-3b").traces == "oracle")  # which knows the toy world only
    assert (config() == train_rl.Config()
            and all(set(a) | set(b) <= set(vars(tiny)) for a, b in recipes.PAPERS.values()))

def test_metrics_count_what_happened(vlm):
    """Four replayed episodes: a zoom and an answer, a call outside the image, an answer at once,
    one that was cut."""
    s, answer = SAMPLES[0], "<think> It is at (50, 50). </think>\n<answer> lined </answer>"
    call = lambda x, y: f"<think> It may be at ({x}, {y}). </think>\n{data.tool_call(x, y)}"
    episodes = [zoom_rollout.replay(vlm, s, turns)
                for turns in ([call(50, 50), answer], [call(999, 1), answer], [answer], [answer])]
    episodes[3].finish_reason = "length"
    with mock.patch.object(zoom_rollout, "rollout", return_value=episodes):
        metrics, _, _ = run_step(vlm, None, samples=[s])
    assert ((metrics["zooms"], metrics["valid_calls"],
             metrics["clipped_ratio"], metrics["skipped"]) == (0.25, 0.5, 0.25, 0))
    assert (metrics["length"] == sum(sum(e.completion_mask) for e in episodes) / 4
            and metrics["step"] == 5)
    for part in ("reward", "format", "grounded", "distinct"):
        assert metrics[part] == pytest.approx(
            statistics.mean(e.reward_components[part] for e in episodes)), part

def test_nothing_to_reinforce_is_said_at_the_first_step_only(vlm, capsys):
    with pytest.raises(SystemExit):
        run_step(vlm, [0.2, 0.1] * 6, step=0)
    assert "none of the 12 rollouts" in capsys.readouterr().err
    run_step(vlm, [0.2, 0.1] * 6, step=1)       # a bad step later on is no reason to stop
    run_step(vlm, [0.2, 0.9] * 6, step=0)

# -----------------------------------------------------------------------------
# the loop around it

def test_questions_depend_on_seed_and_step_only(vlm):
    """Bug: a resumed run asks other questions; an epoch asks one twice; every epoch has
    the same order."""
    toy = train_rl.Questions(train_rl.Config(num_prompts=4, seed=3), vlm.toy_side)
    other = train_rl.Questions(train_rl.Config(num_prompts=4, seed=4), vlm.toy_side)
    ids = lambda step, questions=toy: [s.id for s in questions.of_step(step)]
    assert ids(1) == ids(1) != ids(0) and ids(1) != ids(1, other)
    shown = lambda step: [s.meta["scenes"] for s in toy.of_step(step)]
    assert shown(1) == shown(1) != shown(2) and all("/train/" in i for i in ids(7))
    rows = [data.Sample(str(i), [], "", "text") for i in range(10)]
    own = train_rl.Questions(train_rl.Config(num_prompts=4, seed=3, data="file"),
                             vlm.toy_side, rows)
    asked = [i for step in range(5) for i in ids(step, own)]                   # two epochs
    assert (sorted(asked[:10]) == sorted(asked[10:]) == [str(i) for i in range(10)]
            and asked[:10] != asked[10:])
    assert ids(2, own) == asked[8:12]

def test_held_out_rows_are_not_trained_on(vlm):
    rows = [data.Sample(str(i), [f"{i}.png"], "", "text") for i in range(30)]
    test, train = rl_run.split(train_rl.Config(data="file"), vlm.toy_side, rows)
    assert (len(test) == 3 and len(train) == 27
            and {s.id for s in test + train} == {s.id for s in rows})
    test, train = rl_run.split(train_rl.Config(eval_n=5), vlm.toy_side, [])
    assert len(test) == 5 and train == [] and all("/test/" in s.id for s in test)
    with pytest.raises(data.DataError, match="share their images"):
        rl_run.split(train_rl.Config(data="file"), vlm.toy_side,
                     [data.Sample(str(i), ["a.png"], "", "text") for i in range(9)])

def test_rows_that_share_an_image_stay_on_one_side():
    """Bug: the same image was in training and held out."""
    rng = random.Random(0)
    for seed in range(20):
        rows = [
            data.Sample(str(i), [
                f"{i % 17}.png",
                *rng.choices(["x.png", "./y.png", "y.png", f"own{i}.png"], k=rng.randint(0, 1)),
            ], "", "text")
            for i in range(60)]
        held, others = split.hold_out(rows, 6, seed)
        images = lambda samples: {os.path.realpath(image) for s in samples for image in s.images}
        assert (held and others and not images(held) & images(others)
                and {s.id for s in held + others} == {s.id for s in rows})
    pairs = [data.Sample(f"{i}/{k}", [f"{i}.png"], "", "text")
             for i in range(10) for k in range(2)]
    assert (len(split.hold_out(pairs, 5, 0)[0]) == 4            # whole pairs;
            and len(split.hold_out(pairs, 1, 0)[0]) == 2)       # the smallest group at least
    assert (split.hold_out(pairs, 5, 0) == split.hold_out(pairs, 5, 0)
            != split.hold_out(pairs, 5, 1))
    assert (split.hold_out(pairs[:2], 1, 0) == ([], pairs[:2])
            and split.hold_out([], 1, 0) == ([], []))
    many = [data.Sample(str(i), [f"{i}.png", "all.png"] if i else ["0.png"], "", "text")
            for i in range(20_000)]
    began = time.process_time()
    assert len(split.image_groups(many)) == 2 and time.process_time() - began < 2

def test_two_tasks_in_turn(vlm):
    """Claim: --also asks a second task in every other question: of a step, held out, and in the
    warm start, whose oracle knows both; the questions of the first task stay what they are."""
    cfg = train_rl.Config(also="relation", num_prompts=4, eval_n=3)
    alone = train_rl.Questions(replace(cfg, also=""), 448).of_step(2)
    for found in (train_rl.Questions(cfg, 448).of_step(2), rl_run.split(cfg, 448, [])[0]):
        assert ([s.category[0] for s in found]
                    == ["search", "relation", "search", "relation"][:len(found)]
                and len({s.id for s in found}) == len(found))
    assert ([s.id for s in alone][::2]
            == [s.id for s in train_rl.Questions(cfg, 448).of_step(2)][::2])
    seen = []
    with mock.patch.object(train_sft, "finetune",
                           lambda vlm, episodes, cfg: seen.extend(episodes) or [0.0, 0.0]):
        rl_run.fine_tune_on_traces(
            vlm, [], [], replace(cfg, traces="oracle", sft_n=4, recipe="vigorl-zoom"))
    assert ([e.sample.category[0] for e in seen] == ["search", "relation"] * 2
            and "is at" in seen[1].text and "<tool_call>" not in seen[1].text)

def test_the_warm_start_learns_what_the_run_names(vlm):
    """Claim: --sft-target and --sft-corrected reach the warm start; the answers alone are
    learned alone."""
    seen, asked = [], []
    find = train_sft.find_traces
    with (
        mock.patch.object(train_sft, "finetune",
                          lambda vlm, episodes, cfg: seen.extend(episodes) or [0.0, 0.0]),
        mock.patch.object(train_sft, "find_traces",
                          lambda vlm, cfg, *a, **k: asked.append(cfg) or find(vlm, cfg, *a, **k)),
    ):
        rl_run.fine_tune_on_traces(vlm, [], [], train_rl.Config(
            task="relation", recipe="vigorl-ungrounded", traces="oracle", sft_n=3,
            sft_target="answer", sft_corrected=2))
    assert (all(re.fullmatch(r"<answer> \w+ </answer>", e.text) for e in seen)
            and len(seen) == 3 and asked[0].corrected == 2)

def test_more_pixels_show_the_same_scene(vlm):
    """Bug: --max-pixels made the scenes larger, so a finer overview showed nothing new."""
    own = model.VLM(vlm.model, vlm.tokenizer, vlm.processor, "tiny",
                    replace(model.MODELS["tiny"], max_pixels=224 * 224))
    assert own.toy_side == data.SIDE and own.view(Image.new("RGB", (448, 448))).fed == (224, 224)

def test_chance():
    """Bug: in a file where "yes" is right three times of four, a model that always says so
    is no better than chance."""
    kinds = [data.Sample("", [], "", "choice", ["a", "b"]), data.Sample("", [], "", "point")]
    four = [data.Sample("", [], "", "choice", list("abcd"), i) for i in range(3)]
    assert averages.chance(four + kinds) == pytest.approx(1.25 / 5)
    often = [data.Sample("", [], "", "choice", ["yes", "no"], int(i == 0)) for i in range(4)]
    assert (averages.chance(often) == 0.75
            and averages.chance(often[:2]) == 0.5
            and averages.chance(kinds[1:]) == 0)

@contextlib.contextmanager
def in_a_new_folder():
    before = os.getcwd(), signal.getsignal(signal.SIGINT)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before[0]), signal.signal(signal.SIGINT, before[1])

def main_of(flags):
    """train_rl.main() on the random model in ./random, with rewards that the
    episode's own text decides."""
    def score(sample, text, *more, real=rewards.score, **options):
        v = float(zlib.crc32(text.encode()) % 2)
        return {**real(sample, text, *more, **options), "reward": v, "accuracy": v}
    command = ("train_rl.py --model random --traces '' --num-prompts 3 --group-size 4 "
               f"--blind-prompts 1 --max-new-tokens 3 --eval-n 1 --lr 0.01 {flags}")
    with (mock.patch.object(rewards, "score", score),
          mock.patch.object(report, "write_report"),
          mock.patch.object(sys, "argv", shlex.split(command))):
        train_rl.main()

def test_resume_equals_unbroken(vlm):
    """Bug: a resumed run does a step twice or not at all, forgets Adam's moments, or takes the
    trained policy for the reference."""
    with in_a_new_folder():
        run.replace_folder(vlm.save("random"), "random")
        main_of("--name whole --steps 3 --kl-coef 0.3")
        main_of("--name parts --steps 2 --kl-coef 0.3")
        # a step after the checkpoint, lost in a crash
        with open("runs/parts/metrics.jsonl", "r+") as f:
            f.write(f.readlines()[-1].replace('"step": 1', '"step": 2'))
        main_of("--name parts --steps 3 --resume --kl-coef 0.3")
        rows = [[{k: v for k, v in json.loads(line).items()
                  if "second" not in k and "_s" != k[-2:] and k[:6] != "share_"}
                 for line in open(f"runs/{name}/metrics.jsonl")]
                for name in ("whole", "parts")]
        assert len(rows[0]) == 3 and rows[0] == rows[1] and rows[0][2]["kl"] > 0
        for file in ("model", "optimizer"):
            whole, parts = (load_file(f"runs/{name}/checkpoint/{file}.safetensors")
                            for name in ("whole", "parts"))
            assert (whole.keys() == parts.keys()
                    and not [k for k, v in whole.items() if not torch.equal(v, parts[k])])

def test_an_end_by_episodes(vlm):
    """Claim: --max-episodes ends RL, and the run, after the step that reaches it, those that
    dynamic sampling replaced included; a resumed run counts on from where it was."""
    with in_a_new_folder():
        run.replace_folder(vlm.save("random"), "random")
        count = lambda name: [json.loads(line)["sampled"]
                              for line in open(f"runs/{name}/metrics.jsonl")]
        main_of("--name whole --steps 9 --max-episodes 13")
        each = count("whole")[0]
        assert (count("whole") == [each] * math.ceil(13 / each)
                and os.path.exists("runs/whole/summary.json"))
        main_of("--name parts --steps 1 --max-episodes 13")
        main_of("--name parts --steps 9 --max-episodes 13 --resume")
        assert (count("parts") == count("whole")
                and run.read_json("runs/parts/checkpoint/state.json")["step"]
                    == len(count("whole")))
    metrics, *_ = run_step(vlm, [0.5] * 99, resample=1)
    assert metrics["sampled"] == 24 and run_step(vlm)[0]["sampled"] == 12

def test_what_a_resumed_run_may_change(tmp_path, capsys):
    """Bug: a run goes on with another learning rate, and config.json tells of one of the two."""
    cfg = train_rl.Config()
    (tmp_path / "state.json").write_text(json.dumps(
        {"config": vars(cfg), "step": 4, "before": {}, "seconds": 1.0}))
    other = dataclasses.replace(cfg, steps=99, resume=True, micro_tokens=1, offload=True)
    assert rl_run.resumable(str(tmp_path), other)["step"] == 4
    for changed in ({"lr": 1.0}, {"seed": 1}, {"model": "x"}):
        with pytest.raises(SystemExit):
            rl_run.resumable(str(tmp_path), dataclasses.replace(cfg, **changed))
        assert f"{next(iter(changed))} (" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rl_run.resumable(str(tmp_path / "nowhere"), cfg)

# -----------------------------------------------------------------------------
# mutations

MUTATIONS = [
    ("appendix.rl_options:choose_parts",
     "sum(parts[name] for name in cfg.reward_parts.split(','))",
     "parts[cfg.reward_parts.split(',')[0]]", test_reward_parts, {}),
    ("train_rl:main", "run_log.is_over(step)", "False", test_an_end_by_episodes, {}),
    ("appendix.rl_run:RunLog.save", "self.progress.sampled", "0", test_an_end_by_episodes, {}),
    ("appendix.rl_options:add_group_bonuses", "-cfg.zoom_cost * zooms",
     "cfg.zoom_cost * zooms", test_bonuses_are_part_of_the_reward, {}),
    ("appendix.mixture:toy_questions", "others[1::2]", "others[::2]", test_two_tasks_in_turn, {}),
    ("train_sft:warm_start", "learned_parts(traces, cfg.target)",
     "traces", test_the_warm_start_learns_what_the_run_names, {}),
    ("appendix.weights:toy_side", "MODELS.get(name, spec)",
     "spec", test_more_pixels_show_the_same_scene, {}),
    ("train_rl:grpo_loss", 'cfg.mismatch == "ratio"',
     'cfg.mismatch != "ignore"', test_a_sampler_of_another_precision, {}),
    ("grpo:importance_weights", "logprobs.detach() - sampled_logprobs",
     "sampled_logprobs - logprobs.detach()", test_a_sampler_of_another_precision, {}),
    ("grpo:importance_weights", "gap.exp().clamp(max=cap)",
     "gap.exp()", test_a_sampler_of_another_precision, {}),
    ("appendix.rl_options:hand_over", "view.drop_features()",
     "pass", test_a_sampler_of_another_precision, {}),
    ("appendix.rl_options:hand_over", "vlm.work[kind] += done",
     "pass", test_a_sampler_of_another_precision, {}),
    ("train_rl:grpo_loss", "grpo.aggregate(per_token, mask, cfg.aggregate, denominator)",
     "grpo.aggregate(per_token, mask, cfg.aggregate)",
     test_gradient_of_a_step, dict(aggregate="token", micro_tokens=1)),
    ("train_rl:loss_denominator", "count = len(minibatch)",
     "count = sum(sum(e.completion_mask) for e in minibatch)",
     test_gradient_of_a_step, dict(aggregate="sequence", micro_tokens=1)),
    ("train_rl:loss_denominator", "len(minibatch) * episode_limit(cfg)",
     "sum(e.advantage != 0 for e in minibatch) * episode_limit(cfg)",
     test_gradient_of_a_step, dict(aggregate="constant", micro_tokens=1)),
    ("train_rl:episode_limit", "1 + cfg.max_zooms * can_zoom",
     "1 + 0 * can_zoom",
     test_gradient_of_a_step, dict(aggregate="constant", micro_tokens=1)),
    ("train_rl:grpo_loss", "[e.advantage for e in micro_batch]",
     "[e.advantage for e in micro_batch[::-1]]",
     test_gradient_of_a_step, dict(aggregate="token", micro_tokens=10 ** 6)),
    ("train_rl:train_step", "grpo_loss(vlm, ref, micro_batch, denominator, cfg, step, log)",
     "grpo_loss(vlm, ref, minibatch[:len(micro_batch)], denominator, cfg, step, log)",
     test_gradient_of_a_step, dict(aggregate="token", micro_tokens=1)),
    ("train_rl:score_episodes", "e.text", "e.turns[0].text", test_every_turn_is_scored, {}),
    ("train_rl:store_advantages", "e.advantage = advantage",
     "e.advantage = 0 * advantage",
     test_gradient_of_a_step, dict(aggregate="token", micro_tokens=10 ** 6)),
    ("train_rl:store_advantages", "advantages.flatten()",
     "advantages.T.flatten()",
     test_gradient_of_a_step, dict(aggregate="token", micro_tokens=10 ** 6)),
    ("train_rl:store_advantages", "e.difficulty_weight = weight",
     "pass", test_the_report_of_a_group_adds_up_to_the_step,
     dict(flags=dict(difficulty_weight="exp", difficulty_normalize=True))),
    ("train_rl:with_gradient", "e.advantage != 0", "True", test_no_signal_is_not_run, {}),
    ("train_rl:loss_denominator", "sum(sum(e.completion_mask) for e in minibatch)",
     "sum(sum(e.completion_mask) for e in minibatch if e.advantage)",
     test_gradient_of_a_step, dict(aggregate="token", micro_tokens=10 ** 6)),
    ("appendix.metrics:step_metrics", "(advantages == 0).all(1)",
     "(advantages == 0).any(1)", test_no_signal_is_not_run, {}),
    ("train_rl:with_gradient", "if cfg.kl_coef > 0 or cfg.papo_coef > 0: return minibatch",
     "pass", test_no_signal_is_not_run, {}),
    ("train_rl:grpo_loss", "vlm.logprobs(micro_batch, cfg.temperature)",
     "vlm.logprobs(micro_batch)", test_sampler_and_trainer_agree_and_it_would_show, {}),
    ("train_rl:sampler_logprobs", "torch.tensor(e.logprobs)",
     "like[b, :len(e.ids)].detach()", test_sampler_and_trainer_agree_and_it_would_show, {}),
    ("train_rl:split_minibatches", "order[m::cfg.num_minibatches]",
     "order", test_minibatches_split_the_step, {}),
    ("train_rl:split_minibatches", "order[m::cfg.num_minibatches]",
     "order[m * 2:m * 2 + 2]", test_minibatches_split_the_step, {}),
    ("train_rl:learning_rate", "min(1, (step + 1) / max(1, cfg.warmup_steps))",
     "min(1, step / max(1, cfg.warmup_steps))", test_learning_rate_warms_up, {}),
    ("train_rl:roll_out", "'off'", "'on'", test_blind_prompts, {}),
    ("train_rl:roll_out", "samples[:num_blind]", "samples[-num_blind:]", test_blind_prompts, {}),
    ("train_rl:num_blind_prompts", "can_zoom and num_prompts > cfg.blind_prompts",
     "can_zoom", test_blind_prompts, {}),
    ("train_rl:train_step", "advantages * weights[:, None]",
     "advantages + 0 * weights[:, None]",
     test_difficulty_weight_multiplies_the_groups_advantages, {}),
    ("train_rl:grpo_loss", "per_token + cfg.kl_coef * penalty",
     "per_token - cfg.kl_coef * penalty", test_kl_pulls_towards_the_reference, {}),
    ("appendix.metrics:step_metrics", "e.finish_reason == 'length'",
     "e.finish_reason == 'answer'", test_metrics_count_what_happened, {}),
    ("appendix.metrics:step_metrics", "crops, len(calls)",
     "crops, len(seeing)", test_metrics_count_what_happened, {}),
    ("appendix.rl_run:stop_if_nothing_succeeds", "if step > 0: return",
     "pass", test_nothing_to_reinforce_is_said_at_the_first_step_only, {}),
    ("train_rl:Questions.of_step", 'f"rl{cfg.seed}/{step}"',
     'f"rl{step}"', test_questions_depend_on_seed_and_step_only, {}),
    ("train_rl:Questions.of_step", 'f"/{again}"', '""', test_refill, {}),
    ("train_rl:dynamic_sampling", "len({e.reward_components['reward'] for e in group}) == 1",
     "len({e.reward_components['reward'] for e in group}) > 1", test_refill, {}),
    ("train_rl:dynamic_sampling", "new[k * G:(k + 1) * G]", "new[:G]", test_refill, {}),
    ("train_rl:dynamic_sampling", "range(1, cfg.resample + 1)",
     "range(1, cfg.resample)", test_refill, {}),
    ("train_rl:dynamic_sampling", "range(batch.first_seeing, len(batch.episodes), G)",
     "range(0, len(batch.episodes), G)", test_refill, {}),
    ("appendix.rl_options:mask_advantages", "finished_by_themselves(episodes)",
     "~finished_by_themselves(episodes)", test_over_turn, {}),
    ("appendix.rl_options:counted_episodes", "cfg.over_turn != 'exclude'",
     "True", test_over_turn, {}),
    ("appendix.rl_options:finished_by_themselves", "e.turns[-1].forced and len(e.turns) > 1",
     "e.turns[-1].forced", test_over_turn, {}),
    ("appendix.rl_options:mask_advantages", "advantages.clamp(min=0)",
     "advantages.clamp(max=0)", test_negative_advantages_masked, {}),
    ("appendix.rl_options:add_bonus", "e.reward_components['reward'] += value",
     "e.reward_components['reward'] -= value", test_bonuses_are_part_of_the_reward, {}),
    ("appendix.rl_options:add_group_bonuses", "grpo.overlong(lengths, episode_limit, cfg.overlong)",
     "grpo.overlong(lengths, cfg.max_new_tokens, cfg.overlong)",
     test_bonuses_are_part_of_the_reward, {}),
    ("train_rl:grpo_loss", "per_token - cfg.papo_coef * gain",
     "per_token + cfg.papo_coef * gain", test_papo_pushes_away_from_the_blindfolded, {}),
    ("appendix.rl_options:blindfold",
     "torch.rand(len(dark.patches), 1, generator=generator) < share",
     "torch.rand(len(dark.patches), 1, generator=generator) < 0",
     test_papo_pushes_away_from_the_blindfolded, {}),
    ("appendix.rl_options:blindfold", "dark.patches.masked_fill_(hidden, 0)",
     "dark.patches.masked_fill_(hidden, 128)", test_papo_pushes_away_from_the_blindfolded, {}),
    ("appendix.metrics:difficulty_shares", "iou > 0.7",
     "iou > 0.5", test_shares_of_easy_and_hard, {}),
    ("train_rl:prompt_weights",
     "grpo.difficulty_weights(accuracy_of_all, cfg.difficulty_weight, cfg.difficulty_normalize)",
     "grpo.difficulty_weights(accuracy_of_all, cfg.difficulty_weight)",
     test_difficulty_weight_multiplies_the_groups_advantages, {}),
    ("appendix.recipes:presets", "REAL | algorithm | scale",
     "REAL | algorithm", test_recipes_hold_the_papers_numbers, {}),
    ("appendix.recipes:presets", "train_sft.searchable(cfg, 'sft_n') | algorithm",
     "train_sft.searchable(cfg, 'sft_n') | algorithm | scale",
     test_recipes_hold_the_papers_numbers, {}),
    ("train_rl:Questions.row", 'random.Random(f"{self.cfg.seed}/{epoch}")',
     "random.Random(self.cfg.seed)", test_questions_depend_on_seed_and_step_only, {}),
    ("appendix.rl_run:split", "return held_out, train_rows",
     "return held_out, rows", test_held_out_rows_are_not_trained_on, {}),
    ("appendix.rl_run:split", "'test'", "'train'", test_held_out_rows_are_not_trained_on, {}),
    ("appendix.averages:chance", "1 / len(s.options) if s.options else 0.0",
     "1 / len(s.options) if s.options else 1.0", test_chance, {}),
    ("appendix.rl_run:resumable", "key not in FREE",
     "key not in (*FREE, 'lr')", test_what_a_resumed_run_may_change, {}),
    ("appendix.rl_run:RunLog.begin", "run.load_checkpoint(self.path('checkpoint'), self.optimizer)",
     "pass", test_resume_equals_unbroken, {}),
    ("appendix.rl_run:RunLog.begin", "run.keep_rows_before(self.path(name), self.progress.step)",
     "run.keep_rows_before(self.path(name), self.progress.step + 1)",
     test_resume_equals_unbroken, {}),
    ("train_rl:main", "range(progress.step, cfg.steps)",
     "range(cfg.steps)", test_resume_equals_unbroken, {}),
    ("appendix.rl_run:RunLog.stops_after", "self.save(done)",
     "self.save(row['step'])", test_resume_equals_unbroken, {}),
    ("appendix.rl_run:load_reference",
     "prefix.load_vlm(path, plain=cfg.plain, device=cfg.device, dtype=cfg.dtype, "
     "max_pixels=vlm.spec.max_pixels, quiet=True)",
     "prefix.load_vlm(os.path.join(run_folder(cfg), 'checkpoint') if cfg.resume else cfg.model, "
     "quiet=True)", test_resume_equals_unbroken, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, vlm, tmp_path, capsys):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {
        "vlm": lambda: vlm, "tmp_path": lambda: tmp_path, "capsys": lambda: capsys})
