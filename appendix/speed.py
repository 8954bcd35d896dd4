"""Speed and memory, measured against peers in the same run, on the same weights and prompts.

    python -m appendix.speed rollout            # our sampler and transformers' `generate`
    python -m appendix.speed train              # the update, and a whole step
    python -m appendix.speed search             # tree search against single paths
    python -m appendix.speed plan --model qwen2.5-vl-3b     # memory of a model, without having it
    python -m appendix.speed gpu                # everything that a GPU can tell, in nine minutes

    python -m appendix.speed rollout --prompts 2 --image-tokens 1024 --new-tokens 64
    python -m appendix.speed train --model mid --prompts 2 --image-tokens 1024 --new-tokens 96

The last line of the output is one JSON object. `--random` measures the shape of a released model
with random weights. On a CPU set OMP_NUM_THREADS=1 for a clean figure.

rollout: sampled tokens per second, with the end of the turn disabled so that both sides do equal
work; first one turn, then two zooms, where the peer is a loop around `generate` that sends the
whole conversation again each turn. Rounds alternate and a ratio is the median over rounds. Then
what was computed and what the peer computes, and the largest gap between the log-probabilities of
sampler and trainer. On CUDA also with graphs, and the share of the measured copy bandwidth that
decoding would need if each step read the text model's weights and the whole cache once.

train: the update (log-probabilities and gradient) of episodes with zooms, a group's prompt computed
once (packed) or every episode by itself (plain): time, peak memory, and the largest gap between the
gradients relative to the largest gradient. Then a whole GRPO step of one turn, with drawn rewards.
Without `--micro-tokens` the update is one pass, so that peaks can be compared, and the step has the
micro-batches of train_rl.py.

search: see speed_search.py. gpu: see speed_gpu.py. plan: the parts of memory.memory_plan for the
settings in PLANS.

Where TRL is installed (see speed_trl.py), rollout and train measure it too. Without it, rollout
leaves its fields out and train writes null.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import sys
from dataclasses import replace
from functools import partial

import torch

import evaluate
import train_rl
import train_sft
import zoom_rollout
from appendix import (
    evaluation_run, memory, recipes, rl_run, run, speed_gpu, speed_peers, speed_search, speed_setup,
    speed_train)
from appendix.speed_setup import Load, Rounds

# Settings of `plan`: flags of train_rl.py, or None for evaluate.py; tokens of the longest prompt.
PLANS = {
    "80 GB": ("", 450),
    "40 GB": ("--offload --micro-tokens 8192 --max-batch-tokens 131072", 450),
    "univg-r1": ("--recipe univg-r1 --data FILE", 18_000),         # five images of 2.85 MP
    "vigorl-zoom": ("--recipe vigorl-zoom --data FILE", 3750),     # one
    "evaluation": (None, 3750),
}


# --------------------------------------------------------------------------------------------------
# rollout

def measure_rollout(args):
    """-> the fields of the JSON line; prints as it goes."""
    vlm = speed_setup.load_model(args)
    vlm, samples = speed_setup.toy_questions(vlm, args.prompts, args.image_tokens)
    vlm = speed_setup.share_weights(vlm, speed_setup.EndlessVLM)

    one_turn = Load(samples, args.group, 1, args.new_tokens)
    rounds, work, naive = compare_rollouts(vlm, one_turn, args.rounds)
    print_rollouts("one turn", one_turn, rounds, work, naive)
    result = {
        "ours_tokens_per_second": one_turn.sampled_tokens / rounds.median("ours"),
        "hf_tokens_per_second": one_turn.sampled_tokens / rounds.median("generate"),
        "ratio_hf": rounds.ratio("generate", "ours"),
    }
    episodes = speed_setup.our_turns(vlm, one_turn, 0)[::args.group]
    gap = logprob_gap(vlm, episodes)
    if vlm.device.type == "cuda":
        seconds = min(rounds.median("ours"), rounds.median("with graphs"))
        result["graphs_tokens_per_second"] = one_turn.sampled_tokens / rounds.median("with graphs")
        result["bandwidth_fraction"] = bandwidth_fraction(vlm, episodes, one_turn, seconds)

    two_zooms = Load(samples, args.group, 3, args.new_tokens // 3)
    rounds, work, naive = compare_rollouts(vlm, two_zooms, args.rounds)
    print_rollouts("two zooms", two_zooms, rounds, work, naive)
    result["ratio_hf_zoom"] = rounds.ratio("generate", "ours")
    result["vision_patches_saved"] = 1 - work["patches"] / naive["patches"]
    result["prefill_tokens_saved"] = 1 - work["tokens"] / naive["tokens"]
    episodes = speed_setup.our_turns(vlm, two_zooms, 0)[::args.group]
    gap = max(gap, logprob_gap(vlm, episodes))

    if importlib.util.find_spec("trl"):
        result |= compare_trl_generation(vlm, one_turn, args.rounds)
    result["max_logprob_gap"] = gap
    return result


def compare_rollouts(vlm, load, num_rounds):
    """Our rollouts and the peer's in alternation -> (Rounds, our work, the peer's work).

    Work is {"tokens": prefilled, "patches": seen by the vision tower} of one round.
    """
    sides = {"ours": speed_setup.our_turns, "generate": speed_peers.generate_turns}
    if vlm.device.type == "cuda":
        sides["with graphs"] = partial(speed_setup.our_turns, graphs=True)
    rounds = Rounds()
    for _ in range(num_rounds + 1):
        for name, roll_out in sides.items():
            before = dict(vlm.work)
            talks = rounds.time(name, partial(roll_out, vlm, load))
            if name == "ours":
                work = {kind: n - before[kind] for kind, n in vlm.work.items()}
                naive = zoom_rollout.naive_work(vlm, talks)
    return rounds, work, naive


def print_rollouts(label, load, rounds, work, naive):
    speeds = []
    for name in rounds.seconds:
        speeds.append(f"{name} {load.sampled_tokens / rounds.median(name):,.0f} tokens/s")
    ratio = rounds.ratio("generate", "ours")
    print(f"{label:10s}{'   '.join(speeds)}   ratio {ratio:.1f}")
    print(f"{'':10s}prefilled {work['tokens']:,} tokens instead of {naive['tokens']:,}, "
          f"encoded {work['patches']:,} patches instead of {naive['patches']:,}")


@torch.no_grad()
def logprob_gap(vlm, episodes):
    """The largest |sampler - trainer| log-probability of a sampled token."""
    logprobs, _, mask = vlm.logprobs(episodes)                                      # (B, T)
    old_logprobs = train_rl.sampler_logprobs(episodes, logprobs)                    # (B, T)
    return (logprobs - old_logprobs).abs()[mask].max().item()


def bandwidth_fraction(vlm, episodes, load, seconds):
    """Bytes that decoding must read per second, over the bandwidth of a copy.

    episodes: one of each prompt, since the group shares the prompt's slots. A turn in the middle of
    its decoding has half its tokens. seconds: those of the whole rollout.
    """
    slots = sum(len(e.ids) for e in episodes) + load.sampled_tokens / 2
    needed = speed_setup.decode_bytes(vlm, slots) * load.turn_tokens
    return needed / seconds / speed_setup.copy_bandwidth(vlm.device)


def compare_trl_generation(vlm, load, num_rounds):
    """The generation of TRL's GRPO steps (one turn) against ours -> fields of the result."""
    from appendix import speed_trl
    rounds = Rounds()
    ours = partial(rounds.time, "ours", partial(speed_setup.our_turns, vlm, load))
    times = speed_trl.trl_steps(vlm, load, num_rounds + 1, rounds.clock, ours)
    rounds.seconds["TRL"] = times.generation
    own_speed = load.sampled_tokens / rounds.median("ours")
    their_speed = load.sampled_tokens / rounds.median("TRL")
    ratio = rounds.ratio("TRL", "ours")
    print(f"TRL       one turn: ours {own_speed:,.0f} tokens/s   "
          f"its generation {their_speed:,.0f} tokens/s   ratio {ratio:.1f}")
    return {"trl_tokens_per_second": their_speed, "ratio_trl": ratio}


# --------------------------------------------------------------------------------------------------
# plan

def plan(args):
    """The memory plans of a released model in bf16, counted from shapes on the meta device.

    -> {setting: GB at the peak}
    """
    vlm = speed_setup.random_weights(args.model, "meta")
    plans = {}
    offloads = set()
    for setting, (flags, prompt_tokens) in PLANS.items():
        options = plan_options(vlm, args.model, flags, prompt_tokens)
        plans[setting] = memory.memory_plan(vlm, options)
        if options.offload:
            offloads.add(setting)
    print(f"{args.model}, GB".ljust(20) + "".join(f"{setting:>16}" for setting in plans))
    for part in plans["80 GB"]:
        cells = []
        for setting, sizes in plans.items():
            on_cpu = part == "optimizer" and setting in offloads
            cells.append(f"{sizes[part] / 1e9:12.1f}{' CPU' if on_cpu else '    '}")
        print(f"{part:20}{''.join(cells)}")
    return {setting: sizes["peak"] / 1e9 for setting, sizes in plans.items()}


def plan_options(vlm, model_name, flags, prompt_tokens):
    """-> memory.MemoryOptions of train_rl.py with these flags; flags None: of evaluate.py."""
    argv = ["--model", model_name]
    with contextlib.redirect_stdout(io.StringIO()):     # else the settings are printed
        if flags is None:
            cfg = run.parse_config(evaluate.Config, argv, presets=evaluate.presets)
            return evaluation_run.memory_options(vlm, replace(cfg, style="zoom"), prompt_tokens)
        argv += flags.split()
        cfg = run.parse_config(train_rl.Config, argv, presets=recipes.presets)
    cfg = replace(cfg, recipe=train_sft.recipe_of(cfg))
    return rl_run.memory_options(vlm, cfg, prompt_tokens)


# --------------------------------------------------------------------------------------------------
# the command line

def parse(argv=None):
    parser = run.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["rollout", "train", "search", "plan", "gpu"])
    add("--model", default="tiny", help="name of a model, or checkpoint folder")
    add("--random", action="store_true", help="random weights in the shape of --model")
    add("--device", default="auto", help="cpu or cuda")
    add("--shape", default="", choices=["", *speed_gpu.SHAPE_NAMES],
        help="shape of the random weights; empty: the largest that fits (gpu)")
    add("--prompts", type=int, default=16, help="prompts (search: questions of each kind)")
    add("--group", type=int, default=8, help="episodes per prompt")
    add("--image-tokens", type=int, default=0, help="tokens of an image; 0: the model's default")
    add("--new-tokens", type=int, default=48, help="sampled tokens per episode")
    add("--rounds", type=int, default=3, help="measured rounds, after one to warm up")
    add("--turns", type=int, default=3, help="turns of the episodes of an update (train)")
    add("--micro-tokens", type=int, default=0, help="tokens per forward and backward pass (train)")
    add("--recompute", action="store_true", help="recomputed layers in the backward pass (train)")
    add("--offload", action="store_true", help="optimizer state on the CPU (train)")
    add("--step", action=argparse.BooleanOptionalAction, default=True,
        help="measure a whole step too (train)")
    add("--seed", type=int, default=0, help="random seed of the questions (search)")
    args = parser.parse_args(argv)
    least = dict(prompts=1, group=1, new_tokens=1, rounds=1, turns=1, image_tokens=0,
                 micro_tokens=0)
    for name, smallest in least.items():
        value = getattr(args, name)
        if value < smallest:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} is {value}; expected {smallest} or more")
    return args


def rounded(result):
    """Numbers with three digits, for the JSON line."""
    if isinstance(result, dict):
        return {key: rounded(value) for key, value in result.items()}
    return float(f"{result:.3g}") if isinstance(result, float) else result


COMMANDS = {"rollout": measure_rollout, "train": speed_train.train, "search": speed_search.search,
            "plan": plan, "gpu": speed_gpu.gpu}


def main():
    args = parse()
    result = COMMANDS[args.what](args)
    print(json.dumps(rounded(result)))
    if result.get("failed"):                            # parts of `gpu`
        sys.exit(1)


if __name__ == "__main__":
    with run.exit_on_error(interrupted="interrupted"):
        main()
