"""The README's result tables, sample episode and pictures, from runs that happened.

    for s in 0 1 2; do python train_rl.py --name seed$s --seed $s; done
    python train_sft.py                     # the policy before RL: the same traces, the same seed
    python -m appendix.figures runs/seed0 runs/seed1 runs/seed2
    python -m appendix.figures --table runs/univg0 runs/univg1 runs/univg2      # the table alone

The first prints the table and one question before and after RL, and writes .github/curve.svg and
.github/before-after.gif (see moving.py).
"""
import argparse
import json
import os
import statistics

from appendix import moving, run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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
    moving.show(moving.WARM_START, after, os.path.join(folder, "before-after.gif"))


if __name__ == "__main__":
    with run.exit_on_error(interrupted="interrupted"):
        main()
