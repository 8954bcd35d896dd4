"""UniVG-R1's ablation (its table 4) in miniature: what RL adds to the warm start, and what the difficulty weight adds to RL.

    python tests/ablation.py run 0 1 2 3 4 --steps 60      # these seeds, what is missing of them -> runs/ablation (minutes per run on two cores)
    python tests/ablation.py                   # the README's table, from the runs that are there

All RL runs of a seed begin at the same warm start and see the same prompts; accuracies are of the same 200 held-out questions.
"""
import json, os, statistics, subprocess, sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNS = "ablation"
VARIANTS = {"RL only": "none", "SFT + GRPO": "none", "SFT + GRPO, exp": "exp", "SFT + GRPO, exp normalised": "exp --difficulty-normalize",
            "SFT + GRPO, power": "power", "SFT + GRPO, log": "log"}
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}      # Student's t, 97.5 %, by number of seeds


def name_of(variant, seed):
    return f"{RUNS}/{variant.replace('SFT + ', '').replace(', ', '-').replace(' ', '-').lower()}-{seed}"


def run(script, name, *flags):
    if os.path.exists(os.path.join("runs", name, "summary.json")):
        return
    print(f"{script} {' '.join(flags)}", flush=True)
    subprocess.run([sys.executable, os.path.join(ROOT, script), "--name", name, "--recipe", "univg-r1", *flags], check=True, stdout=subprocess.DEVNULL)


def run_seed(seed, more):
    """more: flags for all RL runs, such as --steps 60."""
    start = f"{RUNS}/sft-{seed}"
    run("train_sft.py", start, "--task", "boxes", "--difficulty", "mixed", "--seed", seed)
    for variant, weight in VARIANTS.items():
        folder = "tiny" if variant == "RL only" else f"runs/{start}/checkpoint"
        run("train_rl.py", name_of(variant, seed), "--model", folder, "--traces", "", "--seed", seed, "--difficulty-weight", *weight.split(), *more)


def mean(values, form="{:.1%}"):
    """With its 95 % interval over seeds."""
    m = statistics.mean(values)
    half = T[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in T else float("nan")
    return f"{form.format(m)} ± {form.format(half)}"


def table():
    found = {}                                                                 # variant -> {seed: summary}
    for variant in VARIANTS:
        for seed in range(100):
            path = os.path.join("runs", name_of(variant, seed), "summary.json")
            if os.path.exists(path):
                found.setdefault(variant, {})[seed] = json.load(open(path))
    plain = found.get("SFT + GRPO", {})
    get = lambda s, when: (s[f"accuracy_{when}"], *(s["levels"][level][f"accuracy_{when}"] for level in ("easy", "medium", "hard")), s[f"mean_iou_{when}"])
    rows = {"SFT only": {seed: get(s, "before") for seed, s in plain.items()}}
    rows |= {variant: {seed: get(s, "after") for seed, s in seeds.items()} for variant, seeds in found.items()}
    print("| | seeds | Acc@0.5 | easy | medium | hard | mean IoU | Acc@0.5, less GRPO's | hard, less GRPO's |\n|" + "---|" * 9)
    for variant, seeds in rows.items():
        columns = list(zip(*seeds.values()))
        less = [mean([v[i] - rows["SFT + GRPO"][seed][i] for seed, v in seeds.items() if seed in plain], "{:+.1%}").replace("± +", "± ") for i in (0, 3)]
        cells = [mean(c) for c in columns[:4]] + [mean(columns[4], "{:.3f}")] + (["", ""] if variant == "SFT + GRPO" else less)
        print(f"| {variant} | {len(seeds)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        seeds = [a for a in sys.argv[2:] if a.isdigit() and "--" not in sys.argv[sys.argv.index(a) - 1]]
        for seed in seeds:
            run_seed(seed, sys.argv[2 + len(seeds):])
    else:
        table()
