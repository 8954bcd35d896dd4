"""`python -m appendix.speed train`: the update, packed and plain, and a whole GRPO step.

Seconds are those of the processor on a CPU, summed over threads, because a busy machine hardly
changes them; on a GPU they are those of the wall.
"""
import ctypes
import gc
import importlib.util
import os
import random
import statistics
import time
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch

import model
import train_rl
from appendix import memory, ranks, speed_setup
from appendix.optimizer import AdamW
from appendix.speed_setup import Load, Rounds


def train(args):
    """-> the fields of the JSON line; prints as it goes."""
    vlm = speed_setup.load_model(args)
    vlm, samples = speed_setup.toy_questions(vlm, args.prompts, args.image_tokens)
    endless = speed_setup.share_weights(
        vlm, speed_setup.EndlessVLM, recompute=args.recompute)
    load = Load(samples, args.group, args.turns, args.new_tokens // args.turns)
    rollouts = Rounds(clock_of(vlm.device))
    for _ in range(2):                                  # the first one warms up
        episodes = rollouts.time("ours", partial(speed_setup.our_turns, endless, load))
    result = compare_updates(vlm, episodes, args, rollouts.median("ours"))
    result |= {"step_seconds": None, "trl_step_seconds": None, "ratio_trl": None}
    if args.step:
        one_turn = Load(samples, args.group, 1, args.new_tokens)
        result |= compare_steps(endless, one_turn, args)
    return result


def clock_of(device):
    return time.process_time if device.type == "cpu" else ranks.synchronized_time


# --------------------------------------------------------------------------------------------------
# the update

def compare_updates(vlm, episodes, args, rolling):
    """The update packed and plain in alternation -> fields of the result.

    rolling: seconds that the rollout of the episodes took, for the estimate of a large step.
    """
    ways = {}
    for name, vlm_class in (("packed", type(vlm)), ("plain", model.VLM)):
        ways[name] = speed_setup.share_weights(vlm, vlm_class, recompute=args.recompute)
    rng = random.Random(0)
    advantages = {id(e): rng.uniform(-1, 1) for e in episodes}
    rounds = Rounds(clock_of(vlm.device))
    peaks = {name: [] for name in ways}
    gradients = {}
    for r in range(args.rounds + 1):                    # the first round warms up
        for name, way in ways.items():
            peak = PeakBytes(vlm.device)
            rounds.time(name, partial(
                policy_backward, way, episodes, advantages, args.micro_tokens))
            peaks[name].append(peak.since_begin())
            if r == 0:
                gradients[name] = [p.grad.float().cpu() for p in vlm.parameters()]
            vlm.model.zero_grad(set_to_none=True)
        if r == 0:
            gap = gradient_gap(gradients["packed"], gradients["plain"])
            gradients.clear()
    peak = {name: statistics.median(sizes[1:]) for name, sizes in peaks.items()}
    result = {
        "packed_speedup": rounds.ratio("plain", "packed"),
        "packed_memory_ratio": peak["plain"] / peak["packed"],
        "max_grad_gap": gap,
    }
    print_updates(episodes, args, rounds, peak, result)
    print_large_step(rolling, rounds.median("packed"), args.prompts)
    return result


def policy_backward(vlm, episodes, advantages, micro_tokens, number_of_round):
    """Add the gradient of a step to the parameters. advantages: {id(episode): number}.

    micro_tokens 0: all episodes in one pass.
    """
    tokens = sum(sum(e.completion_mask) for e in episodes)
    for micro_batch in vlm.micro_batches(episodes, micro_tokens or 10 ** 9):
        logprobs, _, _ = vlm.logprobs(micro_batch)                                  # (B, T)
        own = [advantages[id(e)] for e in micro_batch]
        own = torch.tensor(own, device=vlm.device)                                  # (B,)
        loss = -(own[:, None] * logprobs).sum() / tokens
        loss.backward()


def gradient_gap(gradients, expected):
    """The largest difference of two lists of gradients, relative to the largest one expected."""
    gap = max((a - b).abs().max().item() for a, b in zip(gradients, expected))
    return gap / max(b.abs().max().item() for b in expected)


def print_updates(episodes, args, rounds, peak, result):
    prompt = episodes[0].completion_mask.index(True)
    print(f"update    {args.prompts} prompts x {args.group} episodes of {len(episodes[0].ids):,} "
          f"tokens, {prompt:,} of them the prompt")
    for name, size in peak.items():
        print(f"{'':10s}{name} {rounds.median(name):.2f} s, {size / 1e9:.2f} GB")
    print(f"{'':10s}packed is {result['packed_speedup']:.1f} times faster; "
          f"gradients differ by {result['max_grad_gap']:.0e}")


def print_large_step(rolling, updating, prompts):
    """What a step of 128 prompts, as ViGoRL's, would take."""
    seconds = (rolling + updating) * 128 / prompts
    print(f"{'':10s}their rollout {rolling:.2f} s; a step of 128 prompts would take "
          f"({rolling:.2f} + {updating:.2f}) x 128 / {prompts} = {seconds:,.0f} s")


# --------------------------------------------------------------------------------------------------
# memory

class PeakBytes:
    """The largest number of bytes in use since this object was made, beyond those in use then.

    On a CPU the bytes are those of the process. Linux only, which can forget a process's peak.
    """

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.before = process_bytes()
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")

    def since_begin(self):
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() - self.before
        with open("/proc/self/status") as f:
            peak = next(line for line in f if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 - self.before


def process_bytes():
    """Bytes of this process in memory, after freed memory went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as f:
        pages = int(f.read().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


# --------------------------------------------------------------------------------------------------
# a whole step

@dataclass(frozen=True)
class FixedQuestions:
    """The same prompts in every step, in place of train_rl.Questions."""
    samples: list

    def of_step(self, step, again=0):
        return self.samples


def one_turn_config(load, args):
    """The settings of a step of one turn."""
    return train_rl.Config(
        recipe="vigorl", num_prompts=len(load.samples), group_size=load.group,
        max_new_tokens=load.turn_tokens, offload=args.offload,
        micro_tokens=args.micro_tokens or train_rl.Config.micro_tokens)


class OurSteps:
    """Our GRPO steps, one for each call of next()."""

    def __init__(self, vlm, samples, cfg):
        self.vlm = vlm                                  # an EndlessVLM
        self.cfg = cfg                                  # train_rl.Config
        self.questions = FixedQuestions(samples)
        self.optimizer = AdamW(vlm.parameters(), 1e-6, offload=cfg.offload)
        self.rewards = partial(draw_rewards, random.Random(0))
        self.rounds = Rounds(clock_of(vlm.device))
        self.row = {}                                   # metrics of the last step
        self.episodes = []                              # those of the last step

    def next(self):
        with mock.patch.object(train_rl, "score_episodes", self.rewards):
            self.row, self.episodes = self.rounds.time("ours", self.step)
        for e in self.episodes:
            assert sum(e.completion_mask) == train_rl.episode_limit(self.cfg)

    def step(self, number):
        return train_rl.train_step(
            self.vlm, None, self.optimizer, self.questions, self.cfg, number)


def draw_rewards(rng, episodes, cfg):
    """Random rewards, so that every group has a gradient. Stands in for train_rl.score_episodes."""
    for e in episodes:
        e.reward_components = {"reward": rng.random(), "accuracy": 1.0, "format": 1.0}


def compare_steps(vlm, load, args):
    """Whole steps of one turn, ours and TRL's in alternation -> fields of the result."""
    ours = OurSteps(vlm, load.samples, one_turn_config(load, args))
    rounds = ours.rounds
    if vlm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if not importlib.util.find_spec("trl"):
        for _ in range(args.rounds + 1):
            ours.next()
        print_step(ours, load)
        return {"step_seconds": rounds.median("ours")}
    from appendix import speed_trl
    theirs = speed_trl.trl_steps(vlm, load, args.rounds + 1, rounds.clock, ours.next)
    rounds.seconds["TRL"] = theirs.steps
    ratio = rounds.ratio("TRL", "ours")
    print_step(ours, load)
    print(f"TRL       the same, prompts of {theirs.prompt_lengths[0]:,}: "
          f"{rounds.median('TRL'):.2f} s   ratio {ratio:.1f}")
    return {"step_seconds": rounds.median("ours"), "trl_step_seconds": rounds.median("TRL"),
            "ratio_trl": ratio}


def print_step(ours, load):
    shares = []
    for key, value in ours.row.items():
        if key.startswith("share_"):
            shares.append(f"{key.removeprefix('share_')} {value:.0%}")
    peak = ""
    if ours.vlm.device.type == "cuda":
        peak = f"; peak memory {memory.peak_memory() / 1e9:.1f} GB"
    prompt = ours.episodes[0].completion_mask.index(True)
    print(f"share of the step: {', '.join(shares)}{peak}")
    print(f"step      {len(load.samples)} prompts x {load.group} answers of {load.turn_tokens} "
          f"tokens, prompts of {prompt:,}: {ours.rounds.median('ours'):.2f} s")
