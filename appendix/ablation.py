"""UniVG-R1's ablation (its table 4) in miniature: what RL and its difficulty weight add.

    python -m appendix.ablation run 0 1 2 3 4 --steps 60    # runs of these seeds that are missing
    python -m appendix.ablation                             # the tables, from what has been run

Runs go to runs/ablation and take minutes each on two cores. All RL runs of a seed begin at the same
warm start and see the same prompts, and accuracies are of the same 200 held-out questions. Flags
after the seeds go to every RL run.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

import train_rl
from appendix import recipes, run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BASELINE = "SFT + GRPO"
# What is compared: flags of train_rl.py. "RL only" starts without the warm start.
VARIANTS = {
    "RL only": ["--difficulty-weight", "none"],
    BASELINE: ["--difficulty-weight", "none"],
    "SFT + GRPO, exp": ["--difficulty-weight", "exp"],
    "SFT + GRPO, exp normalised": ["--difficulty-weight", "exp", "--difficulty-normalize"],
    "SFT + GRPO, power": ["--difficulty-weight", "power"],
    "SFT + GRPO, log": ["--difficulty-weight", "log"],
}
# The 97.5 % quantile of Student's t, by number of seeds.
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
             10: 2.262}
MOST_SEEDS = 100


# --------------------------------------------------------------------------------------------------
# runs

def run_name(variant, seed):
    """--name of a run: ablation/grpo-exp-3, for example."""
    short = variant.replace("SFT + ", "").replace(", ", "-").replace(" ", "-").lower()
    return f"ablation/{short}-{seed}"


def summary_path(variant, seed):
    return os.path.join("runs", run_name(variant, seed), "summary.json")


def run_script(script, name, *flags):
    """Run a script of ours, unless the run of that name is there."""
    if os.path.exists(os.path.join("runs", name, "summary.json")):
        return
    print(f"{script} {' '.join(flags)}", flush=True)
    command = [sys.executable, os.path.join(ROOT, script)]
    command += ["--name", name, "--recipe", "univg-r1", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run_seed(seed, more):
    """The warm start of a seed, then all variants. more: flags for all RL runs."""
    warm = f"ablation/sft-{seed}"
    world = ["--task", "boxes", "--difficulty", "mixed"]
    run_script("train_sft.py", warm, *world, "--seed", str(seed))
    for variant, flags in VARIANTS.items():
        folder = "tiny" if variant == "RL only" else f"runs/{warm}/checkpoint"
        run_script("train_rl.py", run_name(variant, seed), "--model", folder, "--traces", "",
                   "--seed", str(seed), *flags, *more)


# --------------------------------------------------------------------------------------------------
# the tables

def read_summaries(variant):
    """{seed: summary.json} of the runs that are there."""
    found = {}
    for seed in range(MOST_SEEDS):
        path = summary_path(variant, seed)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                found[seed] = json.load(f)
    return found


def figures(summary, when):
    """The row of one run. when: "before" or "after" RL."""
    levels = summary["levels"]
    return {
        "Acc@0.5": summary[f"accuracy_{when}"],
        "easy": levels["easy"][f"accuracy_{when}"],
        "medium": levels["medium"][f"accuracy_{when}"],
        "hard": levels["hard"][f"accuracy_{when}"],
        "mean IoU": summary[f"mean_iou_{when}"],
    }


def mean_and_interval(values, form="{:.1%}"):
    """The mean, and half the width of its 95 % interval over seeds."""
    mean = form.format(statistics.mean(values))
    if len(values) not in STUDENT_T:
        return f"{mean} ± nan"
    half = STUDENT_T[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {form.format(half).lstrip('+')}"


def collect():
    """{row of the table: {seed: figures}}."""
    rows = {"SFT only": {}}
    for variant in VARIANTS:
        summaries = read_summaries(variant)
        rows[variant] = {seed: figures(s, "after") for seed, s in summaries.items()}
        if variant == BASELINE:
            rows["SFT only"] = {seed: figures(s, "before") for seed, s in summaries.items()}
    return {variant: seeds for variant, seeds in rows.items() if seeds}


def difference(seeds, baseline, column):
    """Mean difference from the baseline over the seeds that both have."""
    common = [seed for seed in seeds if seed in baseline]
    values = [seeds[seed][column] - baseline[seed][column] for seed in common]
    return mean_and_interval(values, "{:+.1%}") if values else ""


def print_tables():
    """The figures of each variant, then the differences from the baseline."""
    rows = collect()
    if not rows:
        print("no runs in runs/ablation: python -m appendix.ablation run 0 1 2")
        return
    columns = ["Acc@0.5", "easy", "medium", "hard", "mean IoU"]
    print_cells("", columns)
    print("|---" * 6 + "|")
    for variant, seeds in rows.items():
        cells = []
        for column in columns:
            values = [row[column] for row in seeds.values()]
            form = "{:.3f}" if column == "mean IoU" else "{:.1%}"
            cells.append(mean_and_interval(values, form))
        print_cells(variant, cells)
    print()
    print_cells(f"difference from {BASELINE}", ["Acc@0.5", "hard"])
    print("|---" * 3 + "|")
    baseline = rows.pop(BASELINE, {})
    for variant, seeds in rows.items():
        print_cells(variant, [difference(seeds, baseline, c) for c in ("Acc@0.5", "hard")])
    print(f"\nseeds: {', '.join(map(str, baseline))}")


def print_cells(label, cells):
    print(f"| {label} | {' | '.join(cells)} |")


def parse(argv=None):
    """-> (namespace with `what` and `seeds`, flags for the RL runs, which train_rl has read)."""
    parser = run.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("what", nargs="?", choices=["run", "table"], default="table")
    parser.add_argument("seeds", nargs="*", type=int, help="seeds to run")
    args, more = parser.parse_known_args(argv)
    run.parse_config(train_rl.Config, more, train_rl.__doc__, presets=recipes.presets,
                     positive=train_rl.POSITIVE)                # a bad flag ends it here
    return args, more


def main():
    args, more = parse()
    if args.what == "table":
        print_tables()
    for seed in args.seeds:
        run_seed(seed, more)


if __name__ == "__main__":
    with run.exit_on_error(interrupted="interrupted; runs that are finished are kept: the same "
                                       "command makes those that are missing"):
        main()
