"""`python -m appendix.speed gpu`: what a GPU can tell, measured by one command in nine minutes.

    python -m appendix.speed gpu                                # on the GPU
    python -m appendix.speed gpu --shape tiny --device cpu      # a rehearsal without one

It needs no released weights: speed and memory depend on shapes alone, so the weights are random and
nothing is written to the disk. The shape is that of Qwen2.5-VL-3B, or a smaller one where the
memory plan says that it does not fit (SHAPES).

The parts run one after the other, each within its own seconds (PARTS). A part that fails, lacks
memory or takes too long is noted in one line; what it had measured by then is kept, and the next
part begins. Each part prints a table in Markdown. The last line is one JSON object with everything.
If a part failed, the status is 1.

    card      the card, its memory, the bandwidth of a copy, and how the shape was chosen
    tests     the tests that need a GPU (`pytest -m cuda`)
    model     random weights on the card
    decode    time of a decoding step, and its bandwidth share: the bytes of weights and cache that
              the step must read, over what the card could read in that time
    rollout   one turn beside transformers' `generate`, with cuDNN's attention and without it
    update    log-probabilities and gradient, packed and plain, with cuDNN's attention and without
    step      one whole GRPO step with several turns: time, peak memory beside the plan, and the
              arithmetic for ViGoRL's step of 128 prompts x 8 episodes
    graphs    decoding and rollout with CUDA graphs, beside the same without them
    kernels   kernels launched and waits for the GPU, per decoding step

Random weights never call the tool. So in `step` every turn has the same length, and the environment
responds as if each had named a random point (`zoom_anyway`).
"""
import contextlib
import gc
import glob
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable
from unittest import mock

import torch

import data
import model
import train_rl
import zoom_rollout
from appendix import (
    memory, prefix, ranks, rl_run, run, speed_peers, speed_setup, speed_train)
from appendix.speed_setup import Load, Rounds
from appendix.weights import ROOT

GB = 1e9
# Bytes per second that a card can read, from the makers' data sheets. The first name that is part
# of the card's name counts.
PEAK_BANDWIDTH = {
    "GH200": 4.0e12, "H200": 4.8e12, "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "H100": 3.35e12,
    "B200": 8.0e12, "A100-SXM4-80GB": 2.04e12, "A100 80GB": 1.94e12, "A100": 1.56e12,
    "L40S": 0.864e12, "L40": 0.864e12, "L4": 0.3e12, "A10G": 0.6e12, "A10": 0.6e12,
    "RTX A6000": 0.768e12, "RTX 6000 Ada": 0.96e12, "RTX 5090": 1.79e12, "RTX 4090": 1.01e12,
    "RTX 3090": 0.936e12,
}


# --------------------------------------------------------------------------------------------------
# what is measured

@dataclass(frozen=True)
class Shape:
    """A model with random weights, the work it does, and the memory settings of its GRPO step."""
    model: str                  # a name of speed_setup.TEXT_SIZES, or "tiny"
    micro_tokens: int           # tokens per forward and backward pass
    max_batch_tokens: int       # cache slots of a rollout
    offload: bool = False       # optimizer state on the CPU
    recompute: bool = True      # recomputed layers in the backward pass
    image_tokens: int = 1024    # tokens of a prompt image; 0: the model's default
    group: int = 8              # episodes per prompt
    prompts: int = 8            # prompts of a rollout of one turn
    new_tokens: int = 128       # sampled tokens of such a rollout
    update_prompts: int = 2     # prompts of an update
    step_prompts: int = 16      # prompts of a GRPO step
    zooms: int = 4              # crops per episode of an update or a step
    turn_tokens: int = 120      # sampled tokens per turn of these


# Tokens of a prompt beside those of its image, about.
TEXT_TOKENS = 200
# The first one that fits is taken, see `choose_shape`.
SHAPES = (
    Shape("qwen2.5-vl-3b", micro_tokens=16384, max_batch_tokens=262144),
    Shape("qwen2.5-vl-3b", micro_tokens=8192, max_batch_tokens=131072, offload=True),
    Shape("qwen2.5-vl-3b-short", micro_tokens=4096, max_batch_tokens=65536),
    Shape("qwen2.5-vl-3b-short", micro_tokens=4096, max_batch_tokens=65536, offload=True),
)
TINY = Shape("tiny", micro_tokens=4096, max_batch_tokens=65536, recompute=False, image_tokens=0,
             group=2, prompts=2, new_tokens=6, update_prompts=2, step_prompts=2, zooms=1,
             turn_tokens=3)
SHAPE_NAMES = ("tiny", *dict.fromkeys(shape.model for shape in SHAPES))


class Bench:
    """What the parts share. A part that needs a model calls `need_vlm`."""

    def __init__(self, device, shape=None):
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.shape = shape                              # None: `card` chooses it
        self.vlm = None                                 # EndlessVLM, made by `model`
        self.samples = []                               # shape.step_prompts questions

    def need_vlm(self):
        if self.vlm is None:
            raise RuntimeError("there is no model, because an earlier part failed")
        return self.vlm

    def load(self, prompts, turns, turn_tokens):
        """The first `prompts` questions as a Load."""
        return Load(self.samples[:prompts], self.shape.group, turns, turn_tokens)


def gpu(args):
    """-> the fields of the JSON line; prints as it goes."""
    device = args.device
    if device == "auto":
        device = "cuda"
    if device != "cpu":
        if not torch.cuda.is_available():
            run.fail("appendix.speed gpu measures a GPU, and torch sees no CUDA GPU here; "
                     "`--shape tiny --device cpu` rehearses it without one")
        torch.cuda.set_device(torch.device(device).index or 0)
    elif args.shape != "tiny":
        run.fail("on a CPU only --shape tiny is small enough; expected --shape tiny --device cpu")
    return run_parts(Bench(device, shape_called(args.shape)), PARTS)


def shape_called(name):
    """The value of --shape -> Shape, or None: the part `card` chooses one."""
    if name == "tiny":
        return TINY
    return next((shape for shape in SHAPES if shape.model == name), None)


# --------------------------------------------------------------------------------------------------
# running the parts

@dataclass(frozen=True)
class Part:
    """One measurement. measure(bench, found) fills the dict `found` as it goes."""
    name: str
    seconds: int                # it is stopped after so many
    measure: Callable
    needs_gpu: bool = False


class OutOfTime(BaseException):
    """Raised inside a part that has used up its seconds. No `except Exception` swallows it."""


def run_parts(bench, parts):
    """Run the parts in order, whatever happens in them -> the fields of the JSON line."""
    began = time.monotonic()
    result = {"what": "gpu", "parts": {}, "failed": {}}
    for part in parts:
        print(f"\n### {part.name}\n", flush=True)
        if part.needs_gpu and not bench.on_gpu:
            print("Not measured: this part needs a GPU.")
            continue
        found = {}
        result["parts"][part.name] = found
        part_began = time.monotonic()
        why = run_part(part, bench, found)
        found["seconds"] = time.monotonic() - part_began
        if why:
            result["failed"][part.name] = why
            print(f"\nNot finished after {found['seconds']:.0f} s: {why}", flush=True)
        free_memory(bench)
    result["shape"] = bench.shape.model if bench.shape else None
    result["seconds"] = time.monotonic() - began
    print(f"\n{len(result['parts'])} parts, {len(result['failed'])} of them not finished, "
          f"{result['seconds']:.0f} s\n")
    return result


def run_part(part, bench, found):
    """Run one part within its seconds -> why it did not come to its end; "" if it did.

    cuDNN's attention, which builds a plan for every new shape, is off unless the part turns it on.
    """
    try:
        with time_limit(part.seconds), cudnn_attention(False):
            part.measure(bench, found)
    except OutOfTime:
        return "its time was over"
    except (Exception, SystemExit) as e:                # a part must never end the program
        return run.one_line(f"{type(e).__name__}: {e}", 300)
    return ""


@contextlib.contextmanager
def time_limit(seconds):
    """Raise OutOfTime in the block after so many seconds. (Windows has no such alarm.)"""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(signal_number, frame):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free_memory(bench):
    """Let go of what a part, finished or not, has left behind: gradients, caches, features."""
    if bench.vlm is not None:
        bench.vlm.model.zero_grad(set_to_none=True)
    gc.collect()
    if bench.on_gpu:
        with contextlib.suppress(RuntimeError):         # after an illegal access all calls fail
            torch.cuda.empty_cache()


def table(*rows):
    """Print rows of a Markdown table, (what, value) each."""
    print("| | |\n|---|---|")
    for what, value in rows:
        print(f"| {what} | {value} |")
    print(flush=True)


@contextlib.contextmanager
def cudnn_attention(allowed):
    """May attention use cuDNN's kernels in this block?"""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# --------------------------------------------------------------------------------------------------
# card, tests, model

def measure_card(bench, found):
    found["card"] = torch.cuda.get_device_name() if bench.on_gpu else "CPU"
    found["torch"] = torch.__version__
    memory_size = torch.cuda.mem_get_info()[1] if bench.on_gpu else host_bytes()
    found["memory_gb"] = memory_size / GB
    if bench.shape is None:
        bench.shape = choose_shape(memory_size, host_bytes())
    found["shape"] = bench.shape.model
    found["offload"] = bench.shape.offload
    size = 2 ** 30 if bench.on_gpu else 2 ** 24
    found["copy_bytes_per_second"] = speed_setup.copy_bandwidth(bench.device, size)
    found["peak_bytes_per_second"] = peak_bandwidth(found["card"])
    peak = found["peak_bytes_per_second"]
    table(("card", found["card"]),
          ("torch", found["torch"]),
          ("memory", f"{found['memory_gb']:.0f} GB"),
          ("bandwidth, data sheet", f"{peak / GB:,.0f} GB/s" if peak else "not known here"),
          ("bandwidth of a copy", f"{found['copy_bytes_per_second'] / GB:,.0f} GB/s"),
          ("shape", found["shape"] + (", optimizer on the CPU" if found["offload"] else "")))


def peak_bandwidth(card):
    """Bytes per second from the data sheet of a card, None if PEAK_BANDWIDTH does not have it."""
    return next((peak for name, peak in PEAK_BANDWIDTH.items() if name in card), None)


def host_bytes():
    """Memory of this machine, in bytes."""
    return os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_shape(card_bytes, cpu_bytes):
    """The first of SHAPES whose plan fits into 92 % of the card's memory; else the last."""
    for shape in SHAPES:
        vlm = speed_setup.random_weights(shape.model, "meta")
        plan = step_plan(vlm, shape, shape.image_tokens + TEXT_TOKENS)
        fits_cpu = not shape.offload or plan["optimizer"] < 0.7 * cpu_bytes
        if plan["peak"] < 0.92 * card_bytes and fits_cpu:
            return shape
    return SHAPES[-1]


def run_cuda_tests(bench, found):
    """The tests marked `cuda`, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    done = subprocess.run(command + cuda_test_files(), cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    for count, verdict in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]):
        found[verdict] = int(count)
    rows = [("tests marked `cuda`", lines[-1].strip("= "))]
    found["failures"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    for failure in found["failures"]:
        rows.append(("", run.one_line(failure, 200)))
    table(*rows)
    if done.returncode:
        raise RuntimeError(f"pytest ended with status {done.returncode}: {lines[-1]}")


def cuda_test_files():
    """The test files that have tests for a GPU."""
    files = []
    for path in sorted(glob.glob(os.path.join(ROOT, "tests", "test_*.py"))):
        with open(path, encoding="utf-8") as f:
            if "@pytest.mark.cuda" in f.read():
                files.append(path)
    return files


def make_model(bench, found):
    """Random weights on the device, and the questions."""
    shape = bench.shape
    if shape.model == "tiny":
        vlm = prefix.load_vlm("tiny", device=str(bench.device), quiet=True)
    else:
        vlm = speed_setup.random_weights(shape.model, str(bench.device))
    vlm, bench.samples = speed_setup.toy_questions(vlm, shape.step_prompts, shape.image_tokens)
    bench.vlm = speed_setup.share_weights(
        vlm, speed_setup.EndlessVLM, recompute=shape.recompute)
    found["parameters"] = sum(p.numel() for p in vlm.model.parameters())
    found["dtype"] = str(vlm.dtype)[6:]
    prompt = zoom_rollout.begin(bench.vlm, bench.samples[0])
    found["prompt_tokens"] = len(prompt.ids)
    table(("parameters", f"{found['parameters'] / 1e6:,.0f} M, {found['dtype']}"),
          ("tokens of a prompt", f"{found['prompt_tokens']:,}"))


# --------------------------------------------------------------------------------------------------
# decode, rollout

def measure_decode(bench, found, graphs=False):
    """Seconds of a decoding step of prompts x group rows, and the share of the bandwidth."""
    vlm = bench.need_vlm()
    load = bench.load(bench.shape.prompts, 1, bench.shape.new_tokens)
    rows = len(load.samples) * load.group
    n = load.turn_tokens
    prompts = [zoom_rollout.begin(vlm, sample) for sample in load.samples]
    cache, logits, positions = speed_setup.prefill_prompts(vlm, prompts, load.group)
    u = torch.rand(rows, n, dtype=torch.double).to(bench.device)
    options = zoom_rollout.TurnOptions(n, graphs=graphs)
    seconds = []
    for _ in range(2):                                  # the first one warms up
        began = ranks.synchronized_time()
        _, _, positions = zoom_rollout.sample_turn(vlm, cache, logits, positions, u, options)
        seconds.append(ranks.synchronized_time() - began)
    per_step = seconds[-1] / n
    # In the second turn a row holds those n tokens of the first, and half of its own on average.
    slots = sum(len(e.ids) for e in prompts) + rows * n * 1.5
    needed = speed_setup.decode_bytes(vlm, slots)
    found["rows"] = rows
    found["step_milliseconds"] = per_step * 1e3
    found["step_gb_read"] = needed / GB
    peak = peak_bandwidth(torch.cuda.get_device_name()) if bench.on_gpu else None
    found["bandwidth_share"] = needed / per_step / peak if peak else None
    share = f"{found['bandwidth_share']:.1%}" if peak else "the card's bandwidth is not known"
    table((f"a decoding step of {rows} rows", f"{found['step_milliseconds']:.2f} ms"),
          ("weights and cache that it must read", f"{found['step_gb_read']:.2f} GB"),
          ("share of the card's bandwidth", share))


def measure_rollouts(bench, found):
    """Rollouts of one turn and transformers' `generate`, with cuDNN's attention and without.

    Ours come first: `generate` gives every episode its own prompt and may lack memory.
    """
    vlm = bench.need_vlm()
    load = bench.load(bench.shape.prompts, 1, bench.shape.new_tokens)
    print(f"{len(load.samples)} prompts x {load.group} episodes of {load.turn_tokens} tokens\n")
    sides = (("ours", speed_setup.our_turns), ("generate", speed_peers.generate_turns))
    for name, roll_out in sides:
        for setting, allowed in (("no_cudnn", False), ("cudnn", True)):
            rounds = Rounds()
            with cudnn_attention(allowed):
                for _ in range(3):                      # the first round warms up
                    rounds.time(name, partial(roll_out, vlm, load))
            speed = load.sampled_tokens / rounds.median(name)
            found[f"{name}_tokens_per_second_{setting}"] = speed
            table((f"{name}, {setting.replace('_', ' ')}", f"{speed:,.0f} tokens/s"))
    for setting in ("no_cudnn", "cudnn"):
        theirs = found[f"generate_tokens_per_second_{setting}"]
        found[f"ratio_{setting}"] = found[f"ours_tokens_per_second_{setting}"] / theirs
    table(("ratio, no cudnn", f"{found['ratio_no_cudnn']:.1f}"),
          ("ratio, cudnn", f"{found['ratio_cudnn']:.1f}"))


def measure_graphs(bench, found):
    """Decoding and rollout with CUDA graphs. The rollout without them is measured beside it."""
    vlm = bench.need_vlm()
    measure_decode(bench, found, graphs=True)
    load = bench.load(bench.shape.prompts, 1, bench.shape.new_tokens)
    rounds = Rounds()
    for _ in range(3):
        rounds.time("eager", partial(speed_setup.our_turns, vlm, load))
        rounds.time("graphs", partial(speed_setup.our_turns, vlm, load, graphs=True))
    found["eager_tokens_per_second"] = load.sampled_tokens / rounds.median("eager")
    found["graphs_tokens_per_second"] = load.sampled_tokens / rounds.median("graphs")
    found["ratio"] = rounds.ratio("eager", "graphs")
    table(("rollout without graphs", f"{found['eager_tokens_per_second']:,.0f} tokens/s"),
          ("rollout with graphs", f"{found['graphs_tokens_per_second']:,.0f} tokens/s"),
          ("ratio", f"{found['ratio']:.2f}"))


def count_kernels(bench, found):
    """Kernel launches and waits for the GPU, per decoding step: a long turn minus a short one."""
    vlm = bench.need_vlm()
    short = launches(vlm, bench.load(2, 1, 8))
    long = launches(vlm, bench.load(2, 1, 24))
    for name in short:
        found[f"{name}_per_step"] = (long[name] - short[name]) / (24 - 8)
    table(("kernels launched per decoding step", f"{found['kernels_per_step']:,.0f}"),
          ("waits for the GPU per decoding step", f"{found['waits_per_step']:.2f}"))


def launches(vlm, load):
    """Calls of the CUDA runtime during a rollout -> {"kernels": launched, "waits": for the GPU}."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        speed_setup.our_turns(vlm, load, 0)
    counts = {"kernels": 0, "waits": 0}
    for event in profile.key_averages():
        if re.match(r"(cuda|cu)Launch\w*Kernel", event.key):
            counts["kernels"] += event.count
        if "Synchronize" in event.key:
            counts["waits"] += event.count
    return counts


# --------------------------------------------------------------------------------------------------
# update, step

def measure_update(bench, found):
    """The gradient of episodes with zooms: packed and plain, with cuDNN's attention and without."""
    endless = bench.need_vlm()
    shape = bench.shape
    load = bench.load(shape.update_prompts, shape.zooms + 1, shape.turn_tokens)
    episodes = speed_setup.our_turns(endless, load, 0)
    rng = random.Random(0)
    advantages = {id(e): rng.uniform(-1, 1) for e in episodes}
    tokens = sum(len(e.ids) for e in episodes)
    print(f"{len(load.samples)} prompts x {load.group} episodes of {len(episodes[0].ids):,} tokens "
          f"in {load.turns} turns\n")
    ways = (("packed", prefix.PrefixVLM, False), ("packed_cudnn", prefix.PrefixVLM, True),
            ("plain", model.VLM, False))
    rows = []
    for name, vlm_class, allowed in ways:
        vlm = speed_setup.share_weights(endless, vlm_class, recompute=shape.recompute)
        seconds, peak = time_update(vlm, episodes, advantages, shape.micro_tokens, allowed)
        found[f"{name}_seconds"] = seconds
        found[f"{name}_peak_gb"] = peak / GB
        rows.append((name.replace("_", ", "), f"{seconds:.2f} s, {tokens / seconds:,.0f} tokens/s, "
                                              f"{peak / GB:.2f} GB beyond the weights"))
    found["packed_speedup"] = found["plain_seconds"] / found["packed_seconds"]
    table(*rows, ("packed is faster", f"{found['packed_speedup']:.1f} times"))


def time_update(vlm, episodes, advantages, micro_tokens, cudnn):
    """-> (median seconds of two updates after one to warm up, peak bytes of the last)."""
    rounds = Rounds(speed_train.clock_of(vlm.device))
    with cudnn_attention(cudnn):
        for _ in range(3):
            peak = speed_train.PeakBytes(vlm.device)
            rounds.time("update", partial(
                speed_train.policy_backward, vlm, episodes, advantages, micro_tokens))
            most = peak.since_begin()
            vlm.model.zero_grad(set_to_none=True)
    return rounds.median("update"), most


def step_config(shape):
    """The settings of the measured GRPO step: ViGoRL's with zooms, but for the length of turns."""
    return train_rl.Config(
        recipe="vigorl-zoom", num_prompts=shape.step_prompts, group_size=shape.group,
        blind_prompts=0, max_zooms=shape.zooms, max_new_tokens=shape.turn_tokens,
        micro_tokens=shape.micro_tokens, max_batch_tokens=shape.max_batch_tokens,
        recompute=shape.recompute, offload=shape.offload)


def step_plan(vlm, shape, prompt_tokens):
    """The memory plan of that step."""
    options = rl_run.memory_options(vlm, step_config(shape), prompt_tokens)
    return memory.memory_plan(vlm, options)


class ZoomSteps(speed_train.OurSteps):
    """GRPO steps in which every turn but the last ends with a zoom at a random point."""

    def step(self, number):
        respond = partial(zoom_anyway, random.Random(number), zoom_rollout.env_step)
        with mock.patch.object(zoom_rollout, "env_step", respond):
            return super().step(number)


def zoom_anyway(rng, env_step, vlm, episode, text, ended, zooms_left, *more, **named):
    """Stands in for zoom_rollout.env_step: whatever the turn says, it is read as a tool call.

    The last turn is read as an answer. The tokens of the episode stay those that were sampled.
    """
    view = episode.views[0]
    x = rng.randrange(view.source.width)
    y = rng.randrange(view.source.height)
    text = "<answer> red </answer>"
    if zooms_left > 0:
        text = data.tool_call(*view.from_source(x, y))
    return env_step(vlm, episode, text, True, zooms_left, *more, **named)


def measure_step(bench, found):
    """GRPO steps of several turns, and their peak memory beside the plan.

    First a step of a quarter of the prompts, which warms up, and counts if time allows no other.
    """
    vlm = bench.need_vlm()
    cfg = step_config(bench.shape)
    prompt_tokens = memory.longest_prompt(vlm, bench.samples, "zoom", sizes={})
    plan = step_plan(vlm, bench.shape, prompt_tokens)
    found["planned_gb"] = plan["peak"] / GB
    steps = ZoomSteps(vlm, bench.samples, cfg)
    for num_prompts in (max(cfg.num_prompts // 4, 1), cfg.num_prompts):
        steps.cfg = replace(cfg, num_prompts=num_prompts)
        steps.questions = speed_train.FixedQuestions(bench.samples[:num_prompts])
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        steps.next()
        note_step(bench, steps, found)
        show_step(found)


def note_step(bench, steps, found):
    """Write what the last step took into `found`."""
    row = steps.row
    found["prompts"] = steps.cfg.num_prompts
    found["group"] = steps.cfg.group_size
    found["step_seconds"] = row["seconds"]
    for key, value in row.items():
        if key.startswith("share_"):
            found[key.removeprefix("share_") + "_seconds"] = value * row["seconds"]
    found["roll_tokens_per_second"] = row["roll_tokens_per_s"]
    found["train_tokens_per_second"] = row["train_tokens_per_s"]
    found["episode_tokens"] = statistics.mean(len(e.ids) for e in steps.episodes)
    if bench.on_gpu:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / GB
        found["peak_over_plan"] = found["peak_gb"] / found["planned_gb"]
    # Rollout and update grow with the prompts; the optimizer's step, a part of the update, does
    # not, so this is an upper bound.
    found["seconds_of_128_prompts"] = found["step_seconds"] * 128 / steps.cfg.num_prompts


def show_step(found):
    work = (f"{found['prompts']} x {found['group']} episodes of "
            f"{found['episode_tokens']:,.0f} tokens")
    parts = [f"{name} {found[f'{name}_seconds']:.1f}" for name in ("rollout", "reward", "update")]
    peak = "needs a GPU"
    if "peak_gb" in found:
        peak = f"{found['peak_gb']:.1f} GB, {found['peak_over_plan']:.2f} times the plan"
    table((f"a step of {work}", f"{found['step_seconds']:.1f} s ({', '.join(parts)})"),
          ("peak memory", peak),
          ("peak memory, planned", f"{found['planned_gb']:.1f} GB"),
          ("a step of 128 prompts, at most",
           f"{found['step_seconds']:.1f} x 128 / {found['prompts']} = "
           f"{found['seconds_of_128_prompts']:,.0f} s"))


# Their seconds add up to less than nine minutes. What is most likely to break the GPU comes last.
PARTS = (
    Part("card", 20, measure_card),
    Part("tests", 70, run_cuda_tests),
    Part("model", 40, make_model),
    Part("decode", 25, measure_decode),
    Part("rollout", 80, measure_rollouts),
    Part("update", 50, measure_update),
    Part("step", 170, measure_step),
    Part("graphs", 40, measure_graphs, needs_gpu=True),
    Part("kernels", 30, count_kernels, needs_gpu=True),
)
