"""Figures for slides, as SVG, each computed by the functions that it is about.

    python -m appendix.slides runs/rl           # all of them -> runs/slides
    python -m appendix.slides                   # those that need no run
    python -m appendix.slides runs/rl --before runs/sft/checkpoint

    clip.svg        the clipped loss of a token over the ratio, for an advantage above 0 and below 0
    push.svg        how hard each loss pushes a token, over the ratio
    advantages.svg  the advantage of a right and of a wrong answer, over how many of 8 are right
    weights.svg     the difficulty weights over the mean accuracy of a group
    kl.svg          the KL estimators over log(ref / pi)
    run.svg         what a run learned, step by step
    algorithm-light.svg, algorithm-dark.svg     with --before: see picture.py
"""
import argparse
import json
import math
import os
from dataclasses import dataclass

import torch

import grpo
from appendix import figures, picture, run
from appendix.picture import words

CLIP_LOW, CLIP_HIGH = 0.2, 0.28         # the defaults of train_rl.py
COLORS = ("#2447c5", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#846300", "#c2255c")
# Metrics of run.svg, if the run has them: all are shares.
RATES = {"accuracy": "right", "accuracy_blind": "right, where it may not zoom",
         "saw": "crops show the evidence", "frac_zero_std": "groups without a signal"}


# --------------------------------------------------------------------------------------------------
# a plot

WIDTH, HEIGHT = 900, 500
LEFT, RIGHT, TOP, BOTTOM = 80, 590, 60, 430         # of the diagram


@dataclass
class Plot:
    """Some lines over one axis. x, y: (lowest, highest). lines: {label: [(x, y)]}."""
    title: str
    x_label: str
    y_label: str
    x: tuple
    y: tuple
    lines: dict


def svg_of(plot):
    """Plot -> SVG, with a legend on the right."""
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        words(LEFT, 36, plot.title, "#1f2328", 22, weight="bold"),
        words((LEFT + RIGHT) / 2, HEIGHT - 18, plot.x_label, "#1f2328", 17, "middle"),
        words(LEFT, TOP - 6, plot.y_label, "#59636e", 15),
    ]
    for k in range(5):
        x, y = tick(plot.x, k), tick(plot.y, k)
        left, top = place(plot, x, y)
        svg.append(f'<path d="M{LEFT} {top:.1f}H{RIGHT}M{left:.1f} {TOP}V{BOTTOM}" '
                   'stroke="#e3e6ea"/>')
        svg.append(words(LEFT - 10, top + 5, f"{y:g}", "#59636e", 15, "end"))
        svg.append(words(left, BOTTOM + 22, f"{x:g}", "#59636e", 15, "middle"))
    svg.append(f'<clipPath id="inside"><path d="M{LEFT} {TOP - 3}H{RIGHT}V{BOTTOM + 3}H{LEFT}z"/>'
               '</clipPath>')
    for n, (label, points) in enumerate(plot.lines.items()):
        color = COLORS[n % len(COLORS)]
        drawn = " ".join(f"{left:.1f},{top:.1f}" for left, top in
                         (place(plot, x, y) for x, y in points))
        # Lines that lie on each other stay visible: the first is the widest.
        width = 3 + 1.5 * max(0, 2 - n)
        svg.append(f'<polyline fill="none" stroke="{color}" stroke-width="{width}" '
                   f'clip-path="url(#inside)" points="{drawn}"/>')
        y = TOP + 26 * n + 10
        svg.append(f'<path d="M{RIGHT + 24} {y}h26" stroke="{color}" stroke-width="{width}"/>')
        svg.append(words(RIGHT + 60, y + 6, label, "#1f2328", 17))
    return "\n".join([*svg, "</svg>"]) + "\n"


def tick(ends, k):
    """The k-th of five values from the lowest to the highest."""
    return ends[0] + (ends[1] - ends[0]) * k / 4


def place(plot, x, y):
    """Values -> pixels from the left and from the top."""
    across = (x - plot.x[0]) / (plot.x[1] - plot.x[0])
    up = (y - plot.y[0]) / (plot.y[1] - plot.y[0])
    return LEFT + (RIGHT - LEFT) * across, BOTTOM - (BOTTOM - TOP) * up


def spread(low, high, n=201):
    """n values from low to high."""
    return [low + (high - low) * i / (n - 1) for i in range(n)]


# --------------------------------------------------------------------------------------------------
# the figures

def token_loss(ratio, advantage, kind="grpo"):
    """The loss of one token with this ratio -> (loss, -gradient by its log-probability)."""
    old = torch.tensor([[-1.0]])
    logprob = (old + torch.tensor(ratio).log()).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = grpo.policy_loss(logprob, old, torch.tensor([advantage]), mask, CLIP_LOW, CLIP_HIGH,
                            kind)
    loss.sum().backward()
    return loss.item(), -logprob.grad.item()


def clip():
    lines = {}
    for label, advantage in (("advantage 1", 1.0), ("advantage -1", -1.0)):
        lines[label] = [(r, token_loss(r, advantage)[0]) for r in spread(0.4, 1.6)]
    return Plot("The clip: two of its four cases have no gradient", "ratio = pi / pi_old",
                "loss of a token", (0.4, 1.6), (-1.6, 1.6), lines)


def push():
    lines = {}
    for kind in grpo.LOSSES:
        lines[kind] = [(r, token_loss(r, 1.0, kind)[1]) for r in spread(0.2, 2.2)]
    return Plot("How hard a loss pushes a token with advantage 1", "ratio = pi / pi_old",
                "minus the gradient by its log-probability", (0.2, 2.2), (0.0, 2.0), lines)


def advantages(group_size=8):
    lines = {}
    for scale in ("std", "none"):
        for label, column in (("right", 0), ("wrong", -1)):
            points = []
            for right in range(1, group_size):
                rewards = torch.tensor([[1.0] * right + [0.0] * (group_size - right)])
                points.append((right, grpo.group_advantages(rewards, scale)[0, column].item()))
            lines[f"{label}, scale {scale}"] = points
    return Plot("A rare success counts more", f"right answers of {group_size}", "advantage",
                (0, group_size), (-3, 3), lines)


def weights():
    lines = {}
    for kind in grpo.WEIGHTS:
        points = []
        for m in spread(0.0, 1.0):
            accuracy = torch.tensor([[m]])
            points.append((m, grpo.difficulty_weights(accuracy, kind).item()))
        lines[kind] = points
    return Plot("How much a prompt counts", "mean accuracy m of its group", "difficulty weight",
                (0.0, 1.0), (0.0, 4.0), lines)


def kl():
    lines = {}
    for kind in ("k1", "k2", "k3"):
        points = []
        for d in spread(-2.0, 2.0):
            penalty = grpo.kl_penalty(torch.zeros(1, 1), torch.tensor([[d]]), kind)
            points.append((d, penalty.item()))
        lines[kind] = points
    return Plot("Three estimators of the same KL", "log(ref / pi) of a sampled token", "penalty",
                (-2.0, 2.0), (-2.0, 6.0), lines)


def rows_of(folder):
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def learning(rows):
    """Rows of metrics.jsonl -> the shares of RATES that they have, smoothed over five steps."""
    lines = {}
    for name, label in RATES.items():
        having = [row for row in rows if name in row]
        if having:
            values = figures.smooth([row[name] for row in having])
            lines[label] = [(row["step"] + 1, value) for row, value in zip(having, values)]
    last = 4 * math.ceil(len(rows) / 4)                 # four steps of the axis are whole numbers
    return Plot("What a run learned", "step", "share", (0, last), (0.0, 1.0), lines)


FIGURES = {"clip": clip, "push": push, "advantages": advantages, "weights": weights, "kl": kl}


def main(argv=None):
    parser = run.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="", help="run folder, for run.svg")
    parser.add_argument("--before", default="", help="policy that acts in algorithm-*.svg")
    parser.add_argument("--out", default="runs/slides", help="folder of the figures")
    args = parser.parse_args(argv)
    if args.run and not os.path.exists(os.path.join(args.run, "metrics.jsonl")):
        run.fail(f"{args.run} holds no metrics.jsonl; expected the folder of a run, such as "
                 "runs/rl")
    drawn = {name: make() for name, make in FIGURES.items()}
    if args.run:
        drawn["run"] = learning(rows_of(args.run))
    folder = run.make_dir(args.out)
    for name, plot in drawn.items():
        run.write_text(os.path.join(folder, f"{name}.svg"), svg_of(plot))
    if args.before:
        picture.write_variants(picture.load(args.before), folder)
    print(f"{folder} holds {', '.join(sorted(os.listdir(folder)))}")


if __name__ == "__main__":
    with run.exit_on_error(interrupted="interrupted"):
        main()
