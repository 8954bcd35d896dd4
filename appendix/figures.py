"""The README's result tables, sample episode and pictures, from runs that happened.

    for s in 0 1 2; do python train_rl.py --name seed$s --seed $s; done
    python train_sft.py                     # the policy before RL: the same traces, the same seed
    python -m appendix.figures runs/seed0 runs/seed1 runs/seed2
    python -m appendix.figures --table runs/univg0 runs/univg1 runs/univg2      # the table alone

The first prints the table and one question before and after RL, and writes .github/curve.svg and
.github/episode.png.
"""
import argparse
import json
import os
import statistics
import textwrap

from PIL import Image, ImageDraw, ImageFont

import data
import zoom_rollout
from appendix import prefix, run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WARM_START = "runs/sft/checkpoint"
# Rows of the table: key of summary.json, label, format. Runs that lack a key leave its row out.
ROWS = [
    ("accuracy_before", "accuracy, after the warm start", "{:.1%}"),
    ("accuracy_after", "accuracy, after RL", "{:.1%}"),
    ("accuracy_no_zoom", "after RL, no zoom allowed", "{:.1%}"),
    ("accuracy_black_crop", "after RL, crops painted black", "{:.1%}"),
    ("mean_iou_before", "mean IoU, after the warm start", "{:.3f}"),
    ("mean_iou_after", "mean IoU, after RL", "{:.3f}"),
    ("zooms_per_episode", "zooms per episode", "{:.2f}"),
    ("logp_gap_max", "largest gap sampler - trainer", "{:.2g}"),
    ("seconds", "seconds", "{:.0f}"),
]


# --------------------------------------------------------------------------------------------------
# the table

def table_values(summary):
    """{label: (number, format)} of one run, with its levels of difficulty."""
    values = {}
    for key, label, form in ROWS:
        if key in summary:
            values[label] = summary[key], form
    for level, part in summary.get("levels", {}).items():
        for when, label in (("before", "after the warm start"), ("after", "after RL")):
            values[f"{level} scenes, {label}"] = part[f"accuracy_{when}"], "{:.1%}"
    return values


def print_run_table(runs):
    """Mean ± standard deviation over the runs, and the number of each run."""
    columns = []
    for run in runs:
        with open(os.path.join(run, "summary.json"), encoding="utf-8") as f:
            columns.append(table_values(json.load(f)))
    print(f"| | mean ± s.d. | {', '.join(os.path.basename(run) for run in runs)} |")
    print("|---|---|---|")
    for label, (_, form) in columns[0].items():
        values = [column[label][0] for column in columns]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = ", ".join(form.format(v) for v in values)
        mean = form.format(statistics.mean(values))
        print(f"| {label} | {mean} ± {form.format(spread)} | {each} |")


# --------------------------------------------------------------------------------------------------
# the learning curves

WIDTH = 720                     # of the picture, in pixels
HEIGHT = 260
PANEL_WIDTH = 300               # of a diagram
PANEL_HEIGHT = HEIGHT - 60
TOP = 30                        # of a diagram, from the top of the picture
PANELS = [("accuracy", "answers right, training"),
          ("accuracy_blind", "the same, where it may not zoom")]
THIN = 'stroke="#9db4f0" stroke-width="1"'              # one run
THICK = 'stroke="#2447c5" stroke-width="2.5"'           # the mean


def draw_curves(runs, path):
    """Training accuracy by step, with and without zooming: a thin line per run, and their mean."""
    rows = []
    for run in runs:
        with open(os.path.join(run, "metrics.jsonl"), encoding="utf-8") as f:
            rows.append([json.loads(line) for line in f])
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           'font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']
    for number, (key, title) in enumerate(PANELS):
        left = 40 + number * 360
        svg.append(f'<text x="{left}" y="18" font-weight="bold">{title}</text>')
        svg += curve_panel([[row[key] for row in run] for run in rows], left)
    svg.append("</svg>")
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(svg))


def curve_panel(series, left):
    """One diagram as lines of SVG. series: the numbers of each run, step by step, from 0 to 1."""
    steps = min(map(len, series))
    svg = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = y_of_accuracy(tick)
        svg.append(f'<path d="M{left} {y:.1f}h{PANEL_WIDTH}" stroke="#ddd"/>'
                   f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#666">'
                   f'{tick:g}</text>')
    lines = [smooth(numbers[:steps]) for numbers in series]
    for numbers in lines:
        svg.append(polyline(numbers, left, THIN))
    mean = [statistics.mean(numbers) for numbers in zip(*lines)]
    svg.append(polyline(mean, left, THICK))
    right = left + PANEL_WIDTH
    svg.append(f'<text x="{left}" y="{HEIGHT - 10}" fill="#666">step 1</text>'
               f'<text x="{right}" y="{HEIGHT - 10}" text-anchor="end" fill="#666">'
               f'step {steps}</text>')
    return svg


def y_of_accuracy(value):
    return TOP + PANEL_HEIGHT * (1 - value)


def smooth(numbers):
    """The mean of five neighbours."""
    out = []
    for i in range(len(numbers)):
        out.append(statistics.mean(numbers[max(0, i - 2):i + 3]))
    return out


def polyline(numbers, left, style):
    points = []
    for i, value in enumerate(numbers):
        x = left + PANEL_WIDTH * i / max(len(numbers) - 1, 1)
        points.append(f"{x:.1f},{y_of_accuracy(value):.1f}")
    return f'<polyline fill="none" {style} points="{" ".join(points)}"/>'


# --------------------------------------------------------------------------------------------------
# an episode, before and after RL

EPISODE_SIZE = (1000, 300)      # of a drawn episode, in pixels
SCENE_SIDE = 280                # of the drawn scene
CROP_SIDE = 112                 # of a drawn crop
LABELS = ("after the warm start", "after RL")
COLORS = ("#ff8c1a", "#1ac6ff", "#d94cff")


def draw_episodes(before, after, path, seed=0):
    """The same held-out question before and after RL, sampled with the same random numbers.

    before, after: checkpoint folders. The question is the first of fifty with a wrong option before
    and the right one after.
    """
    policies = [prefix.load_vlm(folder, quiet=True) for folder in (before, after)]
    for i, sample in enumerate(data.toy("search", "test", 50, f"figure{seed}")):
        config = zoom_rollout.RolloutConfig(seed=i)
        pair = [zoom_rollout.rollout(vlm, [sample], config=config)[0] for vlm in policies]
        first, second = [chosen_option(e) for e in pair]
        right = sample.options[sample.answer]
        if first not in (None, second) and second == right:
            break
    print_episodes(sample, pair)
    width, height = EPISODE_SIZE
    page = Image.new("RGB", (width, 2 * height))
    for n, (e, label) in enumerate(zip(pair, LABELS)):
        page.paste(draw_episode(e, f"{label}: {sample.question}"), (0, height * n))
    page.save(path)


def print_episodes(sample, pair):
    """The table of the README: what both episodes thought, and what they did."""
    print(f"\n*{sample.question}* (right: {sample.options[sample.answer]})\n")
    print(f"| turn | {' | '.join(LABELS)} |")
    print("|---|---|---|")
    for n in range(max(len(e.turns) for e in pair)):
        turns = [e.turns[n] if n < len(e.turns) else None for e in pair]
        print(f"| {n + 1} | {' | '.join(map(thought_of, turns))} |")
        print(f"| | {' | '.join(map(action_text, turns))} |")


def thought_of(turn):
    if turn is None:
        return ""
    return turn.text.partition("<think>")[2].partition("</think>")[0].strip()


def action_text(turn):
    if turn is None:
        return ""
    if turn.point:
        return f"zoom into {turn.point}"
    answer = turn.text.partition("<answer>")[2].partition("</answer>")[0].strip()
    return f"answer: {answer}"


def chosen_option(episode):
    """The option that an episode answered with, or None."""
    for option in episode.sample.options:
        if f"<answer> {option} </answer>" in episode.turns[-1].text:
            return option
    return None


def draw_episode(e, label):
    """The scene with the points that were named and the windows that were seen; words; crops."""
    page = Image.new("RGB", EPISODE_SIZE, "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(14)
    bold = ImageFont.load_default(17)
    scene = e.views[0].source
    page.paste(scene.resize((SCENE_SIDE, SCENE_SIDE), Image.Resampling.LANCZOS), (10, 10))
    pen.text((310, 10), label, "black", bold)
    y = 40
    crops = [view for view in e.views if view.box != e.views[0].box]
    for n, turn in enumerate(e.turns):
        for line in wrapped_lines(turn.text):
            pen.text((310, y), line, "#222", font)
            y += 17
        y += 8
        if turn.crop:
            draw_crop(page, pen, turn, crops.pop(0), n)
    return page


def wrapped_lines(text):
    lines = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, 62) or [""]
    return lines


def draw_crop(page, pen, turn, view, n):
    """The window of turn n on the scene, and beside it what it showed."""
    scale = SCENE_SIDE / view.source.width
    color = COLORS[n % len(COLORS)]
    bold = ImageFont.load_default(17)
    pen.rectangle([10 + value * scale for value in turn.crop], outline=color, width=3)
    left, top = turn.crop[:2]
    pen.text((14 + left * scale, 12 + top * scale), str(n + 1), color, bold)
    crop = view.source.crop(view.box)
    x = EPISODE_SIZE[0] - CROP_SIDE - 12
    y = 10 + 120 * n
    page.paste(crop.resize((CROP_SIDE, CROP_SIDE), Image.Resampling.NEAREST), (x, y))
    pen.rectangle((x, y, x + CROP_SIDE, y + CROP_SIDE), outline=color, width=3)


# --------------------------------------------------------------------------------------------------

def parse(argv=None):
    parser = run.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--table", action="store_true", help="print the table, draw nothing")
    return parser.parse_args(argv)


def main():
    args = parse()
    print_run_table(args.runs)
    if args.table:
        return
    folder = os.path.join(ROOT, ".github")
    os.makedirs(folder, exist_ok=True)
    draw_curves(args.runs, os.path.join(folder, "curve.svg"))
    after = os.path.join(args.runs[0], "checkpoint")
    draw_episodes(WARM_START, after, os.path.join(folder, "episode.png"))


if __name__ == "__main__":
    with run.exit_on_error(interrupted="interrupted"):
        main()
