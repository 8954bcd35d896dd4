"""The speedrun: seconds until held-out accuracy reaches a mark, from the shipped model.

    python -m appendix.speedrun                             # the default run, seeds 0, 1 and 2
    python -m appendix.speedrun --sft-n 1200 --seeds 0      # flags of train_rl.py
    python -m appendix.speedrun --target 0.95 --every 2

The clock runs while traces are found, the warm start learns and RL steps are taken. It stands still
while the held-out questions are asked: before RL and after every --every steps. The first measured
accuracy at or above --target ends the run.

The rules of the table in appendix/README.md: two cores, `search` at medium difficulty, the shipped
checkpoint, no held-out scene in anything that trains, three seeds.
"""
import argparse
import statistics
import time
from dataclasses import replace

import train_rl
import train_sft
from appendix import rl_run, run, sweep
from appendix.optimizer import AdamW


class Stopwatch:
    """Adds up the seconds spent inside `with` it."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *error):
        self.seconds += time.perf_counter() - self.began


def speedrun(cfg, target, every):
    """One run -> (seconds, RL steps, held-out accuracy); seconds is None if it never got there.

    cfg: train_rl.Config; cfg.eval_n held-out questions decide.
    """
    vlm = rl_run.load_policy(cfg)
    held_out, _ = rl_run.split(cfg, vlm.toy_side, [])
    clock = Stopwatch()
    with clock:
        rl_run.fine_tune_on_traces(vlm, [], held_out, cfg)
        questions = train_rl.Questions(cfg, vlm.toy_side)
        optimizer = AdamW(vlm.parameters(), cfg.lr, weight_decay=cfg.weight_decay)
    for step in range(cfg.steps + 1):
        if step % every == 0 or step == cfg.steps:
            measured = rl_run.measure(vlm, cfg, held_out, f"step {step}, {clock.seconds:.1f} s",
                                      modes=["on"])
            accuracy = measured["on"].summary["accuracy"]
            if accuracy >= target:
                return clock.seconds, step, accuracy
        if step < cfg.steps:
            with clock:
                train_rl.train_step(vlm, None, optimizer, questions, cfg, step)
    return None, cfg.steps, accuracy


def parse(argv=None):
    """-> (flags of the speedrun, flags of train_rl.py)"""
    parser = argparse.ArgumentParser(
        prog="python -m appendix.speedrun", allow_abbrev=False,
        description=__doc__.partition("\n\n")[0],
        epilog="All other flags are those of train_rl.py.")
    parser.add_argument("--target", type=float, default=0.9, help="accuracy to reach (default 0.9)")
    parser.add_argument("--every", type=int, default=5,
                        help="RL steps between measurements (default 5)")
    parser.add_argument("--seeds", default=sweep.SEEDS,
                        help=f"random seeds (default {sweep.SEEDS})")
    return parser.parse_known_args(argv)


def main():
    flags, others = parse()
    if not 0 < flags.target <= 1 or flags.every < 1:
        run.fail("expected a --target between 0 and 1 and an --every of 1 or more")
    seeds = sweep.seeds_of(flags.seeds)
    cfg = sweep.parsed(others)
    cfg = replace(cfg, recipe=train_sft.recipe_of(cfg))
    train_rl.check(cfg)
    if cfg.data or cfg.kl_coef or cfg.resume:
        run.fail("the speedrun is about the toy world, without --data, --kl-coef and --resume")
    seconds = []
    for seed in seeds:
        took, steps, accuracy = speedrun(replace(cfg, seed=seed), flags.target, flags.every)
        if took is None:
            print(f"seed {seed}: {accuracy:.1%} after {steps} steps, the mark was not reached")
        else:
            print(f"seed {seed}: {accuracy:.1%} after {took:.1f} s, {steps} RL steps", flush=True)
            seconds.append(took)
    if len(seconds) == len(seeds):
        print(f"seconds to {flags.target:.0%}: {statistics.mean(seconds):.1f} "
              f"({min(seconds):.1f} to {max(seconds):.1f})")


if __name__ == "__main__":
    with run.exit_on_error(interrupted="interrupted"):
        main()
