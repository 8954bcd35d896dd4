"""From the runs of a sweep to its table: means over seeds, differences between arms, curves.

An arm's interval is that of its mean over seeds, by Student's t. The difference between two arms is
taken seed by seed, over the same held-out questions; arms that begin alike share a warm start, too.
So what such arms have in common drops out. With one seed the interval is that of the questions.
"""
import json
import math
import os
import statistics
from dataclasses import dataclass

from markupsafe import Markup

import evaluate
from appendix import page, run

# The 97.5 % quantile of Student's t, by degrees of freedom.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306,
             9: 2.262, 10: 2.228}


def student_t(df):
    """The 97.5 % quantile of Student's t. Beyond the table an expansion, right to 0.003."""
    if df in STUDENT_T:
        return STUDENT_T[df]
    z = 1.959964
    return z + (z ** 3 + z) / (4 * df) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * df ** 2)


# --------------------------------------------------------------------------------------------------
# figures

@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval. low and high are nan if there was one value only."""
    mean: float
    low: float
    high: float


def interval_over_seeds(values):
    """Numbers, one per seed -> Interval of their mean, by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = student_t(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def figures_of(r):
    """A finished run -> a row of table.json: arm, seed, and all figures of its summary.json."""
    summary = run.read_json(os.path.join(r.folder, "summary.json"), "accuracy_after")
    return {"arm": r.arm, "seed": r.seed, **summary}


def read_answers(r, mode="on"):
    """held_out.jsonl of a run -> {id of the question: right or not} in one zoom mode."""
    answers = {}
    with open(os.path.join(r.folder, "held_out.jsonl"), encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            if row["mode"] == mode:
                answers[row["id"]] = bool(row["right"])
    return answers


def paired_difference(arm, first):
    """Accuracy of an arm minus that of the first arm -> Interval.

    arm, first: {seed: {id: right or not}}. Only seeds that both have count, and within a seed the
    questions that both answered.
    """
    seeds = [seed for seed in arm if seed in first and arm[seed].keys() & first[seed].keys()]
    if not seeds:                                       # of other tasks, for example
        return None
    comparisons = [evaluate.paired(first[seed], arm[seed]) for seed in seeds]
    if len(seeds) == 1:
        only = comparisons[0]
        return Interval(only["difference"], only["low"], only["high"])
    return interval_over_seeds([c["difference"] for c in comparisons])


# --------------------------------------------------------------------------------------------------
# the table

def write(folder, plan, runs, failed):
    """Write table.json, table.md and curves.svg; print the table -> the rows of table.json."""
    rows = [figures_of(r) for r in runs]
    for r, message in failed:
        rows.append({"arm": r.arm, "seed": r.seed, "failed": message})
    lines = table_lines(plan, runs, failed)
    run.write_text(os.path.join(folder, "table.md"), "\n".join(lines) + "\n")
    run.write_text(os.path.join(folder, "curves.svg"), draw_curves(plan, runs))
    path = os.path.join(folder, "table.json")
    run.write_json(path, rows)
    print("\n" + "\n".join(lines) + "\n\n" + path)
    return rows


def table_lines(plan, runs, failed):
    """The table in Markdown, one row per arm."""
    lines = ["| arm | seeds | before RL | after RL | difference from the first arm | seconds |",
             "|---|---|---|---|---|---|"]
    answers = {}                                        # {arm: {seed: {id: right or not}}}
    for r in runs:
        answers.setdefault(r.arm, {})[r.seed] = read_answers(r)
    first = plan.arms[0].label
    for arm in plan.arms:
        rows = [figures_of(r) for r in runs if r.arm == arm.label]
        if not rows:
            lines.append(f"| {arm.label} | 0 | | failed | | |")
            continue
        before = interval_over_seeds([row["accuracy_before"] for row in rows])
        after = interval_over_seeds([row["accuracy_after"] for row in rows])
        seconds = statistics.mean(row["seconds"] for row in rows)
        difference = ""
        if arm.label != first and first in answers:
            found = paired_difference(answers[arm.label], answers[first])
            difference = points(found) if found else ""
        lines.append(f"| {arm.label} | {len(rows)} | {before.mean:.1%} | {percent(after)} | "
                     f"{difference} | {seconds:.0f} |")
    note = "Mean over seeds with its 95 % interval (Student's t), in percent; differences in points"
    if len(plan.seeds) == 1:
        note = "One seed: the interval of a difference is that of the questions alone"
    elif failed:
        note += "; of an arm that has one seed in common with the first, that of the questions"
    lines += ["", f"{note}. Seeds: {', '.join(map(str, plan.seeds))}."]
    if failed:
        lines.append(f"{len(failed)} runs failed and are left out.")
    return lines


def percent(interval):
    """An interval of a share: "95.3 % [93.1, 97.5]"."""
    if math.isnan(interval.low):
        return f"{interval.mean:.1%}"
    return f"{interval.mean:.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points(interval):
    """An interval of a difference of shares, in percentage points: "+1.5 [-0.4, +3.4]"."""
    if math.isnan(interval.low):
        return f"{100 * interval.mean:+.1f}"
    return (f"{100 * interval.mean:+.1f} "
            f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]")


# --------------------------------------------------------------------------------------------------
# the curves

WIDTH = 640                     # of the picture
HEIGHT = 320
LEFT = 44                       # room for the labels of the axis
BOTTOM = 36
TOP = 14
RIGHT = 190                     # room for the legend
COLORS = ("#2447c5", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#846300", "#495057")


@dataclass(frozen=True)
class Curve:
    """A line of templates/curves.svg: its points, and the outline of its band, if it has one."""
    label: str
    color: str
    dash: str                   # "none": a solid line
    mean: Markup
    band: Markup
    y_of_label: float


def draw_curves(plan, runs, name="accuracy"):
    """A metric of metrics.jsonl by step -> SVG. Each arm: its mean, and a band from the lowest to
    the highest seed, both smoothed over five steps."""
    curves = []
    last_step = 1
    for arm in plan.arms:
        series = [smooth(read_metric(r, name)) for r in runs if r.arm == arm.label]
        steps = min(map(len, series), default=0)
        columns = list(zip(*[values[:steps] for values in series]))
        curves.append((arm.label, columns if steps > 1 else []))
        last_step = max(last_step, steps)
    drawn = []
    for number, (label, columns) in enumerate(curves):
        mean = [statistics.mean(column) for column in columns]
        low = [min(column) for column in columns]
        high = [max(column) for column in columns]
        band = outline_points(high, last_step) + outline_points(low, last_step)[::-1]
        drawn.append(make_curve(number, label, outline_points(mean, last_step), band))
    return render(drawn, "step 1", f"step {last_step}")


def draw_lines(lines, first, last):
    """Lines of shares at evenly spaced places, [(label, values)] -> SVG.

    first, last: what stands below the two ends of the axis.
    """
    drawn = []
    for number, (label, values) in enumerate(lines):
        points = outline_points(values, len(values))
        drawn.append(make_curve(number, label, points, []))
    return render(drawn, first, last)


def make_curve(number, label, mean, band):
    """The number-th Curve of a picture; after the last color they begin again, dashed."""
    dash = "5 3" if number >= len(COLORS) else "none"
    return Curve(label, COLORS[number % len(COLORS)], dash, Markup(" ".join(mean)),
                 Markup(" ".join(band)), TOP + 16 * number + 10)


def render(curves, first, last):
    ticks = [(value, y_of(value)) for value in (0, 0.25, 0.5, 0.75, 1)]
    shown = [curve for curve in curves if curve.mean]
    return page.render("curves.svg", curves=shown, ticks=ticks, first=first, last=last,
                       width=WIDTH, height=HEIGHT, left=LEFT, right=WIDTH - RIGHT,
                       bottom=HEIGHT - BOTTOM)


def read_metric(r, name):
    with open(os.path.join(r.folder, "metrics.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [row[name] for row in rows if name in row]


def smooth(values):
    """The mean of each value and its two neighbours on each side."""
    out = []
    for i in range(len(values)):
        out.append(statistics.mean(values[max(0, i - 2):i + 3]))
    return out


def outline_points(values, last_step):
    """Shares by step -> points of an SVG line."""
    width = WIDTH - LEFT - RIGHT
    points = []
    for i, value in enumerate(values):
        x = LEFT + width * i / max(last_step - 1, 1)
        points.append(f"{x:.1f},{y_of(value):.1f}")
    return points


def y_of(share):
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)
