"""A run as one HTML file that can be opened anywhere: table, learning curves, episodes.

    write_report("report.html", Report("A title", [("before", episodes), ("after", episodes)]))

Nothing is fetched, and no script runs but templates/report.js, which the page allows by its hash.
The page works without it: what it adds are menus, keys, and a mode in which people rate points.
"""
import base64
import hashlib
import json
import math
import time
from dataclasses import dataclass, field

from markupsafe import Markup
from tqdm import tqdm

import evaluate
from appendix import card, episode_rows, group_view, metrics, page

# Of a longer table, the rows with an indented label are folded away.
MOST_ROWS = 12
# Of more curves, the others are folded away.
MOST_CURVES = 8
# Pixels of a side of a picture, at most.
MAX_SIDE = 640
# With more cards than this, the pictures are stored smaller.
MANY_CARDS = 200


def today():
    return time.strftime("%Y-%m-%d")


@dataclass
class Report:
    """What write_report shows.

    A cell of the table is text or a number, or a summary (evaluate.summarise), of which accuracy
    and interval are shown. Of a section the first episodes are drawn, not the best.
    """
    title: str
    sections: list                      # [(label, list[Episode])]
    curves: list = None                 # rows of metrics.jsonl
    table: list = None                  # [(label, cells)], the first row is the head
    settings: dict = None               # shown below the title
    run: str = ""                       # name of the run
    date: str = field(default_factory=today)
    num_questions: int = 0              # 0: not shown
    chance: float = 0.0                 # see averages.chance; 0: not shown
    notes: dict = None                  # {label of a section, row or column: what it shows}
    meanings: dict = None               # {text in the head of the table: what it means}
    lessons: list = ()                  # list[group_view.Lesson]: groups of a training run
    drawn: int = 24                     # episodes drawn per section, at most
    max_bytes: int = 18_000_000         # size of all drawn episodes, at most


def write_report(path, report):
    """Write a Report as one HTML file, atomically. Rank 0 writes."""
    album = page.Album()
    sections = draw_sections(report, album)
    lessons = [group_view.draw_lesson(album, lesson, MAX_SIDE) for lesson in report.lessons]
    verdicts = []
    for section in sections:
        verdicts += section.verdicts
    table, folded_table = split_table(report.table or [])
    charts = draw_charts(report.curves or [])
    script = page.source_of("report.js")
    page.write_html(
        path, "report.html", ("report.css", "group.css"),
        title=report.title, facts=facts_of(report), settings=report.settings or {},
        table=table, folded_table=folded_table, table_notes=table_notes(report),
        charts=charts[:MOST_CURVES], folded_charts=charts[MOST_CURVES:], frame=FRAME,
        legend=legend_of(report, charts, sections), hints=hints_of(report),
        lessons=lessons, sections=sections, counts=count_verdicts(verdicts),
        rated=fingerprint(report),
        pictures=album.pictures.values(), script=script, script_hash=sha256(script))


def sha256(text):
    """The hash of a script as a content security policy wants it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def fingerprint(report):
    """A hash of all episodes: the name under which a browser keeps what people rated of them.

    The same page written again finds its ratings; a run that was made again has none.
    """
    episodes = []
    for label, group in report.sections:
        episodes += [(label, str(e.sample.id), e.text) for e in group]
    return sha256(json.dumps(episodes))


# --------------------------------------------------------------------------------------------------
# what explains the page

def facts_of(report):
    """What stands below the title -> [(name, value, what it means)]."""
    facts = []
    if report.run:
        facts.append(("run", report.run, ""))
    facts.append(("written", report.date, ""))
    if report.num_questions:
        facts.append(("questions", f"{report.num_questions:,}", metrics.SUMMARY_GLOSSARY["n"]))
    if report.chance:
        facts.append(("chance", f"{report.chance:.1%}", metrics.SUMMARY_GLOSSARY["chance"]))
    return facts


def hints_of(report):
    """What the heads of columns and rows say when the pointer rests on them -> {head: words}."""
    return (report.notes or {}) | (report.meanings or {})


def table_notes(report):
    """The notes on the columns and the rows of the table -> [(label, note)], in their order."""
    notes = report.notes or {}
    labels = []
    for k, (label, cells) in enumerate(report.table or []):
        labels += cells if k == 0 else [label]
    return [(label, notes[label]) for label in dict.fromkeys(labels) if label in notes]


def legend_of(report, charts, sections):
    """All names that the page shows -> {name: what it means}."""
    legend = dict(report.meanings or {})
    if report.chance:
        legend["chance"] = metrics.SUMMARY_GLOSSARY["chance"]
    names = [chart.name for chart in charts]
    for section in sections:
        names += section.components
    for name in names:
        if name in metrics.GLOSSARY:
            legend[name] = metrics.GLOSSARY[name].meaning
    return legend


# --------------------------------------------------------------------------------------------------
# sections

@dataclass
class Section:
    """A labelled group of episodes, as templates/report.html shows it."""
    label: str
    note: str                           # what it shows
    num_episodes: int
    score: str                          # how many of them are right, in words
    counts: dict                        # verdicts of all its episodes, see count_verdicts
    components: list                    # names of the parts of the reward
    verdicts: list                      # of the episodes drawn
    cards: list                         # of the episodes drawn, as Markup

    @property
    def left_out(self):
        return self.num_episodes - len(self.cards)

    @property
    def drawn_counts(self):
        return count_verdicts(self.verdicts)


def draw_sections(report, album):
    """The sections of a report -> list[Section]. Their pictures go into the album."""
    sections = []
    for label, episodes in report.sections:
        sections.append(empty_section(label, episodes, (report.notes or {}).get(label, "")))
    order = drawing_order(report.sections, report.drawn)
    max_side = MAX_SIDE if len(order) <= MANY_CARDS else 448
    num_bytes = 0                       # of the cards; those of the pictures are in the album
    for i, k in tqdm(order, "drawing", unit=" episodes", leave=False, disable=None):
        if num_bytes + album.num_bytes > report.max_bytes:
            break
        section = sections[i]
        _, episodes = report.sections[i]
        html = page.render("card.html", card=card.make_card(album, episodes[k], max_side))
        section.cards.append(html)
        section.verdicts.append(episode_rows.verdict(episodes[k]))
        num_bytes += len(html)
    return sections


def empty_section(label, episodes, note):
    """A Section without its cards."""
    components = {}                     # a dict keeps the order
    for e in episodes:
        components |= e.reward_components
    counts = count_verdicts([episode_rows.verdict(e) for e in episodes])
    return Section(label, note, len(episodes), score_in_words(episodes), counts, list(components),
                   verdicts=[], cards=[])


def count_verdicts(verdicts):
    """-> {"all", "right", "wrong"}: how many there are. Some may be neither right nor wrong."""
    return {
        "all": len(verdicts),
        "right": verdicts.count("right"),
        "wrong": verdicts.count("wrong"),
    }


def drawing_order(sections, drawn):
    """-> [(number of the section, number of the episode in it)], at most `drawn` of a section.

    Sections take turns, so that each has its share when there is no room for all.
    """
    order = []
    for k in range(drawn):
        for i, (_, episodes) in enumerate(sections):
            if k < len(episodes):
                order.append((i, k))
    return order


def score_in_words(episodes):
    """How many episodes are right; "" if none of them has a verdict."""
    verdicts = [episode_rows.verdict(e) for e in episodes]
    n = len(verdicts) - verdicts.count("")
    if n == 0:
        return ""
    correct = verdicts.count("right")
    interval = ""
    if len({e.sample.id for e in episodes}) > 1:        # questions, not several tries of one
        low, high = evaluate.wilson(correct, n)
        interval = f", 95 % interval {low:.1%} to {high:.1%}"
    return f"{correct} of {n} right ({correct / n:.1%}{interval})."


# --------------------------------------------------------------------------------------------------
# the table

@dataclass
class Table:
    head: tuple                         # (label, cells)
    rows: list                          # [(label, cells)]


def split_table(rows):
    """[(label, cells)] -> (Table, Table of all rows to fold away). None where there is none."""
    if not rows:
        return None, None
    head, *body = rows
    is_long = len(body) > MOST_ROWS
    short = []
    for label, cells in body:
        if not is_long or not label.startswith(" "):
            short.append((label, cells))
    folded = Table(head, body) if len(short) < len(body) else None
    return Table(head, short), folded


# --------------------------------------------------------------------------------------------------
# learning curves

@dataclass(frozen=True)
class Frame:
    """Size of a chart and the room around its lines, in units of its drawing."""
    width: int = 300
    height: int = 150
    left: int = 54                      # room for a number of MOST_CHARACTERS, beside the lines
    right: int = 8
    top: int = 10
    bottom: int = 24


FRAME = Frame()
# Characters of a number beside a chart, at most.
MOST_CHARACTERS = 7


@dataclass
class Chart:
    """A line chart, in units of its drawing (FRAME)."""
    name: str
    meaning: str                        # "" if metrics.GLOSSARY does not know the name
    last: str                           # the last value of the running mean
    levels: list                        # [(y, value in words)]: the ends of the axis
    ends: list                          # [(x, step, anchor of the text)]: the first and last step
    values: Markup                      # points of the line of values
    means: Markup                       # points of the line of their running mean


def draw_charts(rows):
    """Rows of metrics.jsonl -> list[Chart], one for each number with two values or more.

    In the order of the rows; those that never change come last.
    """
    series = {}                                         # name: [(step, value)]
    for i, row in enumerate(rows):
        for name, value in row.items():
            if name != "step" and is_finite_number(value):
                series.setdefault(name, []).append((row.get("step", i), value))
    moving = []
    flat = []
    for name, points in series.items():
        if len(points) < 2:
            continue
        values = {value for _, value in points}
        group = flat if len(values) == 1 else moving
        group.append(draw_chart(name, points))
    return moving + flat


def is_finite_number(value):
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def draw_chart(name, points):
    """[(step, value)] -> Chart: the raw values and their running mean."""
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    means = running_mean(values, radius=len(values) // 16)
    first, last = steps[0], steps[-1]
    metric = metrics.GLOSSARY.get(name, metrics.Metric(""))
    low, high = axis_of(metric, values)
    width = FRAME.width - FRAME.left - FRAME.right
    xs = [FRAME.left + width * share(step, first, last, otherwise=0.0) for step in steps]
    levels = []
    for value in dict.fromkeys((low, high)):
        levels.append((round(height_of(value, low, high), 1), short_number(value)))
    return Chart(
        name, metric.meaning, short_number(means[-1]), levels,
        ends=[(xs[0], first, "start"), (xs[-1], last, "end")],
        values=line_points(xs, values, low, high), means=line_points(xs, means, low, high))


def axis_of(metric, values):
    """-> (lowest, highest value of the axis): 0 and 1 for a rate, else those of the values.

    From the lowest value to the highest, a rate that falls from 1 to 0.9 would look like a cliff.
    """
    if metric.is_rate:
        return min(0, *values), max(1, *values)
    return min(values), max(values)


def short_number(value):
    """A number with up to three digits, in at most MOST_CHARACTERS characters."""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if len(text) <= MOST_CHARACTERS and "e" not in text:
        return text
    for digits in (2, 1, 0):                            # 2.57e-4, then 2.6e-4, then 3e-4
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
        if len(text) <= MOST_CHARACTERS:
            break
    return text


def running_mean(values, radius):
    """The mean of each value and of up to `radius` neighbours on each side."""
    means = []
    for i in range(len(values)):
        window = values[max(0, i - radius):i + radius + 1]
        means.append(sum(window) / len(window))
    return means


def share(value, low, high, otherwise):
    """How far a value lies on the way from low to high, 0 to 1; `otherwise` if they are equal."""
    return (value - low) / (high - low) if high > low else otherwise


def height_of(value, low, high):
    """The y of a value; y counts from the top. A flat line stands in the middle."""
    height = FRAME.height - FRAME.top - FRAME.bottom
    return FRAME.height - FRAME.bottom - height * share(value, low, high, otherwise=0.5)


def line_points(xs, values, low, high):
    """The points of an SVG polyline, which are numbers and commas."""
    points = [f"{x:.1f},{height_of(value, low, high):.1f}" for x, value in zip(xs, values)]
    return Markup(" ".join(points))
