"""How good is it, and show me: accuracy with its interval, the controls, and a report that draws where the model looked.

    python evaluate.py                                                   # the tiny model, held-out toy scenes
    python evaluate.py --checkpoint runs/default/checkpoint --zoom all   # zoom allowed, forbidden, and with black crops
    python evaluate.py --model qwen2.5-vl-3b --data screenspot.jsonl --images DIR
    python evaluate.py --data screenspot.jsonl --predictions texts.jsonl # any model's answers; none is loaded here

Every run writes into --out: summary.json (the numbers), episodes.jsonl (every episode, one row each) and report.html.
The three zoom modes are the experiment: if a model answers as well when it may not zoom, or when every crop is painted
black, then its zooms are decoration.

--predictions takes JSONL rows {"id", "text"}. Which coordinates the texts are written in is said by --convention and never
guessed from their size: (500, 300) is a fine point in any of them.

Left out until its own issue: the benchmarks' own file formats and macro averages (data.py converts some), shuffled options,
the paired comparison of two runs on the same questions, resuming, and a rating mode for people. Each needs more than a flag,
and none changes what stands here. A web action that is half right counts as wrong.
"""
import base64, html, io, json, math, os, re
from dataclasses import asdict, dataclass
from typing import Literal

from PIL import Image
from tqdm import tqdm

import data, model, rewards, zoom_rollout
from zoom_rollout import Episode, Turn

DRAWN = 24                      # episodes per section of the report; all of them stand in episodes.jsonl
MODES = {"on": "zoom allowed", "off": "zoom forbidden", "black": "crops painted black"}
RECIPES = {"zoom": "vigorl-zoom", "think": "vigorl", "boxes": "univg-r1"}


@dataclass
class Config:
    model: str = "tiny"                                     # name of a model, or a checkpoint folder
    checkpoint: str = ""                                    # a checkpoint folder, in place of --model
    task: Literal[data.TASKS] = "search"                    # toy task
    difficulty: Literal[tuple(data.DIFFICULTY)] = "medium"  # of the toy scenes
    data: str = ""                                          # JSONL of samples; empty: the toy world
    images: str = ""                                        # folder that image paths start from; empty: the JSONL's own
    n: int = 0                                              # how many samples; 0: 200 toy samples, or all of --data
    predictions: str = ""                                   # JSONL of {"id", "text"}: score these, load no model
    convention: Literal["source", "fed", "0-1000", "0-1"] = "source"  # of --predictions: pixels as stored, pixels as fed to --model, relative
    zoom: Literal["on", "off", "black", "all"] = "on"       # allowed, forbidden, answered with black crops; all: the three in turn
    style: Literal["", "zoom", "think", "boxes"] = ""       # of the prompt; empty: what suits the toy task, zoom for --data
    crop_from: Literal["source", "seen"] = "source"         # crops from the stored image, or from the copy that the model was fed
    temperature: float = 0.0                                # 0: greedy
    max_zooms: int = 3                                      # after so many the answer is forced
    max_new_tokens: int = 64                                # per turn
    max_pixels: int = 0                                     # of an image as fed; 0: the model's own
    batch: int = 64                                         # episodes at a time
    seed: int = 0                                           # of the toy scenes and of sampling
    out: str = "runs/evaluate"                              # folder for summary.json, episodes.jsonl and report.html


# ----------------------------------------------------------------------------------------------------------------------
# Numbers

def wilson(correct, n, z=1.96):
    """The 95 % interval of a share, (low, high) in [0, 1]; Wilson 1927, JASA 22, p. 209. Unlike p +- z sqrt(p (1 - p) / n)
    it stays inside [0, 1] and is honest at 0 % and 100 %: ten right of ten means "at least 72 %"."""
    if n == 0:
        return 0.0, 1.0
    p, s = correct / n, z * z / n
    center, half = (p + s / 2) / (1 + s), math.sqrt(s * (p * (1 - p) + s / 4)) / (1 + s)
    return max(0.0, center - half), min(1.0, center + half)


def is_right(parts):
    """Right or wrong, whatever the recipe pays: a box from IoU 0.5 on, anything else when it is wholly right."""
    return parts["iou"] >= 0.5 - 1e-6 if "iou" in parts else parts["accuracy"] >= 1 - 1e-6


def summarise(rows):
    """rows: dicts with id, category (a list), accuracy, wrong_format, iou for boxes, zooms if there were any to make -> counts,
    accuracy and its interval, means; in all and per category. A question whose gold is hidden is left out of n."""
    def count(rows):
        scored = [r for r in rows if not r.get("hidden")]
        n, correct = len(scored), sum(is_right(r) for r in scored)
        low, high = wilson(correct, n)
        out = dict(n=n, correct=correct, accuracy=correct / max(n, 1), low=low, high=high,
                   wrong_format=int(sum(r["wrong_format"] for r in scored)))
        overlaps = [r["iou"] for r in scored if "iou" in r]
        out |= {"mean_iou": sum(overlaps) / len(overlaps)} if overlaps else {}
        out |= {"zooms": sum(r["zooms"] for r in scored) / max(n, 1)} if any("zooms" in r for r in scored) else {}
        return out | ({"hidden": len(rows) - n} if n < len(rows) else {})

    names = dict.fromkeys(name for r in rows for name in r["category"])        # in order of appearance
    return count(rows) | {"categories": {name: count([r for r in rows if name in r["category"]]) for name in names}}


def summary_of(episodes):
    looked = lambda e: {"zooms": sum(t.crop is not None for t in e.turns)} if e.ids else {}        # a prediction has no tokens
    return summarise(model.gather([{"id": e.sample.id, "category": e.sample.category, **looked(e), **e.parts} for e in episodes]))


def run(vlm, samples, zoom="on", style="zoom", recipe="vigorl-zoom", temperature=0.0, seed=0, batch=64, progress=True,
        max_zooms=3, views=None, **options):
    """One scored episode per sample. zoom: a key of MODES; options: rollout's. -> list[Episode] in the order of the samples (of
    several ranks, each has its share)"""
    episodes, right = [], 0
    with tqdm(total=len(samples), desc=MODES[zoom], unit=" questions", disable=None if progress else True) as bar:
        for i in range(0, len(samples), batch):
            asked, seen = samples[i:i + batch], views and views[i:i + batch]
            mine = model.mine(len(asked))
            new = zoom_rollout.rollout(vlm, asked[mine], 1, zoom=zoom, style=style, temperature=temperature, seed=seed + i, skip=mine.start,
                                       max_zooms=max_zooms, views=seen and seen[mine], **options) if asked[mine] else []
            for e in new:
                e.parts = rewards.score(e.sample, e.text, e.turns, recipe, e.frames, max_zooms)
                right += is_right(e.parts)
                episodes.append(e)
                for v in e.views if views is None else ():                     # thousands of questions: keep no features, and
                    v.features = v.deep = None                                 # pixels only where the report will draw them
                    v.source = v.source if len(episodes) <= DRAWN else None
            bar.update(len(asked))
            bar.set_postfix_str(f"accuracy {right / max(len(episodes), 1):.1%}")
    return episodes


# ----------------------------------------------------------------------------------------------------------------------
# Predictions: texts that any model wrote

def read_predictions(path, samples):
    """JSONL of {"id", "text"} -> {id: text}. Every row is checked: scoring half of a file by mistake looks like a bad model."""
    known, texts = set(), {}
    for s in samples:
        if s.id in known:
            raise data.DataError(f"the data holds the id {s.id!r} twice; --predictions needs an id of its own for every sample")
        known.add(s.id)
    for where, row in data.rows_of(path):
        name, text = str(data.need(row, "id", (str, int), where)), data.need(row, "text", str, where)
        if name not in known:
            raise data.DataError(f"{where}id {name!r} is not in the data; expected one of its {len(known)} ids, such as {samples[0].id!r}")
        if name in texts:
            raise data.DataError(f"{where}id {name!r} has a prediction already; expected one row per id")
        texts[name] = text
    return texts


def from_predictions(samples, texts, convention="source", max_pixels=0):
    """Scored episodes of one turn each. A sample without a prediction is an answer that cannot be read."""
    episodes = []
    for s in samples:
        frames = []                                                            # source pixels: no image need be opened
        for i in range(len(s.images) if convention != "source" else 0):
            w, h = data.image(s, i).size
            fed_h, fed_w = model.smart_resize(h, w, 28, 4 * 28 ** 2, max_pixels) if convention == "fed" else (1, 1)
            unit_w, unit_h = {"fed": (fed_w, fed_h), "0-1000": (1000, 1000), "0-1": (1, 1)}[convention]
            frames.append((w / unit_w, h / unit_h, w, h))
        e = Episode(s, [], [], [], [], [Turn(texts.get(s.id, ""))], "prediction" if s.id in texts else "no prediction", frames)
        e.parts = rewards.score(s, e.text, e.turns, "accuracy", frames or None)
        episodes.append(e)
    return episodes


# ----------------------------------------------------------------------------------------------------------------------
# Files

def numbers(values):
    return f"({', '.join(f'{round(v, 1):g}' for v in values)})"


def gold(sample):
    """The right answer as words."""
    if sample.targets:
        return " or ".join(numbers(t["box"]) + (f" in image {t['image'] + 1}" if len(sample.images) > 1 else "") for t in sample.targets)
    if sample.answer is None:
        return "hidden"
    return sample.options[sample.answer] if sample.answer_type == "choice" else " or ".join(sample.answer)


def answered(e):
    """What the episode answered: (image that it is about, words or source pixels or None)."""
    said = rewards.parse_answer(e.text, e.sample.answer_type)
    image = e.sample.targets[0]["image"] if e.sample.targets else 0
    return image, tuple(rewards.to_source(said, image, e.frames)) if isinstance(said, tuple) else said


def record(e):
    """An episode as one readable JSON row: a line of episodes.jsonl."""
    turns = [{"text": t.text, "point": t.point, "crop": t.crop, "error": t.error, "forced": t.forced} for t in e.turns]
    return {"id": e.sample.id, "question": e.sample.question, "options": e.sample.options, "answer": gold(e.sample), "turns": turns,
            "stop": e.stop, "parts": e.parts, "advantage": e.advantage, "tokens": sum(e.sampled)}


CSS = """
:root { color-scheme:light dark; --page:#f6f5f1; --card:#fff; --ink:#20242b; --dim:#6b7079; --line:#e3e0d8; --soft:#f1efe9; --accent:#3457c9;
  --good:#16794c; --good-soft:#e2f3ea; --bad:#b03a2e; --bad-soft:#fae7e3; --warn:#8a5a00; --warn-soft:#fdf1d8;
  --serif:"Iowan Old Style","Palatino Linotype",Palatino,Georgia,"Liberation Serif",serif; --sans:system-ui,"Segoe UI",Roboto,"Liberation Sans",sans-serif;
  --mono:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace }
@media (prefers-color-scheme:dark) { :root { --page:#14161a; --card:#1c1f25; --ink:#e5e5e1; --dim:#989da7; --line:#2e323a; --soft:#23272e;
  --accent:#8fa9ff; --good:#6fd3a2; --good-soft:#17352a; --bad:#f09a8c; --bad-soft:#3f2220; --warn:#e9bd67; --warn-soft:#3a2e17 } }
* { box-sizing:border-box }
html { scroll-padding-top:4rem }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 var(--sans); overflow-wrap:anywhere; font-variant-numeric:tabular-nums }
main { max-width:1180px; margin:auto; padding:3rem 1.5rem 5rem }
h1 { font:600 2.3rem/1.15 var(--serif); letter-spacing:-.01em; margin:0 }
h2 { font:600 1.45rem/1.2 var(--serif); margin:3.2rem 0 .2rem }
b { font-weight:600 }
small, .dim, footer { color:var(--dim); font-size:.84rem }
a { color:var(--accent); text-decoration:none } a:hover { text-decoration:underline }
footer { margin-top:4rem }

.settings { margin:.8rem 0 0; color:var(--dim); font-size:.86rem } .settings span { margin-right:1.1em } .settings b { color:var(--ink); font-weight:500 }
.scroll { overflow-x:auto; margin-top:1.8rem }
.numbers { background:var(--card); border:1px solid var(--line); border-radius:10px; border-spacing:0; overflow-wrap:normal }
.numbers th, .numbers td { text-align:left; font-weight:400; vertical-align:top; padding:.6rem 1.4rem .6rem 1.1rem; border-top:1px solid var(--line) }
.numbers th { white-space:pre } .numbers thead * { color:var(--dim); font-size:.84rem; border-top:0 } .numbers b { font-size:1.05rem }
.bar { display:block; width:12rem; height:7px; margin-top:.35rem }
.track { fill:var(--line) } .range { fill:var(--accent); opacity:.4 } .share { fill:var(--accent) }

.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(255px,1fr)); gap:.9rem; margin-top:1rem }
.chart { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:.75rem .8rem .4rem; margin:0 } .chart svg { display:block }
.chart figcaption { display:flex; justify-content:space-between; font-size:.88rem }
.chart line { stroke:var(--line) } .chart text { font-size:10.5px; fill:var(--dim) }
.chart polyline { fill:none; stroke:var(--accent); stroke-linejoin:round } .chart .raw { opacity:.3 } .chart .smooth { stroke-width:1.9 }
.chart circle { fill:transparent } .chart circle:hover { fill:var(--accent) }
summary { cursor:pointer; color:var(--accent); margin-top:1rem; font-size:.9rem }

input[name=show] { position:absolute; opacity:0 }
nav { position:sticky; top:0; z-index:2; display:flex; flex-wrap:wrap; gap:.3rem 1.4rem; align-items:center; margin:2.6rem -1.5rem 1rem;
  padding:.7rem 1.5rem; background:var(--page); border-bottom:1px solid var(--line); font-size:.9rem }
nav p { margin:0 auto 0 0; display:flex; flex-wrap:wrap; gap:.2rem 1.2rem }
nav label { cursor:pointer; color:var(--dim); padding:.15rem .8rem; border-radius:99px }
#all:checked ~ nav [for=all], #right:checked ~ nav [for=right], #wrong:checked ~ nav [for=wrong] { background:var(--ink); color:var(--page) }
input:focus-visible ~ nav label { box-shadow:0 0 0 1.5px var(--accent) }
#right:checked ~ section article:not(.right), #wrong:checked ~ section article:not(.wrong) { display:none }

article { background:var(--card); border:1px solid var(--line); border-radius:12px; margin-top:1.1rem; overflow:hidden; break-inside:avoid }
article > header { display:flex; flex-wrap:wrap; gap:.2rem 1rem; align-items:center; padding:.55rem 1.2rem; border-bottom:1px solid var(--line);
  font-size:.86rem; color:var(--dim) }
article > header b { color:var(--ink); margin-right:auto }
.badge { padding:.05rem .7rem; border-radius:99px; font-weight:600 }
.right .badge { background:var(--good-soft); color:var(--good) } .wrong .badge { background:var(--bad-soft); color:var(--bad) }
.columns { display:grid; grid-template-columns:minmax(0,5fr) minmax(0,8fr); gap:1.6rem; padding:1.2rem }
.pictures { display:grid; gap:.7rem; align-content:start } .pictures.many { grid-template-columns:1fr 1fr }
.picture { display:block; width:100%; max-height:34rem; border-radius:6px; background:var(--soft) }
.picture rect, .picture path { fill:none; stroke:var(--hue); stroke-width:2.2; vector-effect:non-scaling-stroke }
.picture .under { stroke:#000b; stroke-width:4.4 } .picture .gold { stroke:#fff; stroke-dasharray:5 4 }
.picture .said { stroke:#ff5d4d; stroke-width:3 } .right .picture .said { stroke:#46e08f }
.picture circle { fill:var(--hue); stroke:#000b; vector-effect:non-scaling-stroke } .picture text { font-weight:700; text-anchor:middle; fill:#111 }
.t1 { --hue:#ff9a2e } .t2 { --hue:#3cc0ff } .t3 { --hue:#ff70b5 } .t4 { --hue:#b49bff } .t5 { --hue:#f6dc3a } .t0 { --hue:#4fe0ac }

.question { font:1.2rem/1.35 var(--serif); margin:0 0 .6rem; white-space:pre-wrap }
.options { list-style:none; display:flex; flex-wrap:wrap; gap:.4rem; padding:0; margin:0 0 .4rem; font-size:.88rem }
.options li { border:1px solid var(--line); border-radius:7px; padding:.1rem .65rem } .options .gold { border-color:var(--good); color:var(--good) }
.turn { display:grid; grid-template-columns:1.7rem minmax(0,1fr) auto; gap:.2rem .8rem; padding:.85rem 0; border-top:1px solid var(--line) }
.turn:first-of-type { margin-top:1rem }
.number { width:1.6rem; height:1.6rem; border-radius:50%; background:var(--hue); color:#111; font:700 .85rem/1.6rem var(--sans); text-align:center }
.plain .number { background:var(--soft); color:var(--dim) }
pre { margin:.1rem 0 0; font:.82rem/1.55 var(--mono); white-space:pre-wrap } .tag { color:var(--dim) } .given { opacity:.55 }
.turn figure { margin:0; text-align:center } .turn figcaption { font-size:.72rem; color:var(--dim); margin-top:.15rem; white-space:nowrap }
.crop { width:136px; border-radius:6px; border:2px solid var(--hue); background:#000; display:block } .small { image-rendering:pixelated }
.note { grid-column:2 / -1; justify-self:start; font-size:.84rem; padding:.25rem .7rem; border-radius:7px; background:var(--warn-soft); color:var(--warn) }
.result { display:flex; flex-wrap:wrap; gap:.5rem 1.4rem; align-items:center; border-top:1px solid var(--line); padding-top:.7rem;
  font-size:.84rem; color:var(--dim) }
.result p { margin:0 } .result p b { display:block; font-size:1rem; color:var(--ink) } .right .said b { color:var(--good) } .wrong .said b { color:var(--bad) }
.parts { margin-left:auto; text-align:right; border-spacing:0 } .parts td { font-size:1rem; color:var(--ink) }
.parts th, .parts td { font-weight:400; padding:0 0 0 1rem; overflow-wrap:normal }
@media (max-width:760px) { main { padding:1.6rem .9rem 3rem } nav { margin-inline:-.9rem; padding-inline:.9rem } h1 { font-size:1.75rem }
  .charts { grid-template-columns:1fr 1fr; gap:.5rem }
  .columns { grid-template-columns:minmax(0,1fr) } .turn { grid-template-columns:1.7rem minmax(0,1fr) }
  .turn figure { grid-column:2; justify-self:start } }
"""


# ----------------------------------------------------------------------------------------------------------------------
# The report. One file, no script, nothing fetched. Whatever comes from data or from a model goes through esc().

def esc(text, limit=4000):
    text = str(text)
    return html.escape(text[:limit], quote=True) + (f" [and {len(text) - limit:,} more characters]" if len(text) > limit else "")


def embed(album, key, image, side=640):
    """Put a picture into the album, {key: (id, width, height, element)}, where it stands once however often it is drawn.
    It keeps its size in source pixels, so everything drawn over it is in source pixels too."""
    if key not in album:
        small, files = image.copy(), {}
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for kind, options in (("png", {}), ("jpeg", {"quality": 86})):
            small.save(buffer := io.BytesIO(), kind, **options)
            files[kind] = buffer.getvalue()
        kind = "png" if len(files["png"]) < max(60_000, len(files["jpeg"])) else "jpeg"
        (w, h), name = image.size, f"p{len(album)}"
        album[key] = (name, w, h, f'<image id="{name}" width="{w}" height="{h}" preserveAspectRatio="none" '
                                  f'href="data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"/>')
    return album[key][:3]


def pixels(image):
    return image.size, hash(image.tobytes())


def boxes_in(sample, i):
    """Where the answer lies in image i: targets, and what a toy scene or a data set calls evidence (free form: checked here)."""
    evidence = sample.meta.get("evidence")
    for t in sample.targets + (evidence if isinstance(evidence, list) else []):
        try:
            if t.get("image", 0) == i:
                yield data.numbers(t.get("box"), 4, "", "box")
        except (AttributeError, data.DataError):
            pass


def picture(album, e, i):
    """Prompt image i with the places where the model looked, the windows it was shown, the gold and the answer."""
    source = e.sample.images[i]
    key = source if isinstance(source, str) else pixels(source)
    name, w, h = album[key][:3] if key in album else embed(album, key, data.image(e.sample, i))
    sx, sy = e.frames[i][:2] if e.frames else (1, 1)
    many = len(e.sample.images) > 1
    unit, marks = max(w, h) / (60 if many else 100), []                        # several images are drawn smaller

    def rect(box, kind):
        (x1, x2), (y1, y2) = sorted(box[0::2]), sorted(box[1::2])
        shape = f'x="{x1:.6g}" y="{y1:.6g}" width="{x2 - x1:.6g}" height="{y2 - y1:.6g}"'
        marks.append(f'<rect class="under" {shape}/><rect class="{kind}" {shape}/>')

    for box in boxes_in(e.sample, i):
        rect(box, "gold")
    for n, t in enumerate(e.turns if i == 0 else (), 1):
        if t.crop:
            rect(t.crop, f"t{n % 6}")
    for n, t in enumerate(e.turns if i == 0 else (), 1):                       # on top of every window
        if t.point and 0 <= t.point[0] <= w / sx and 0 <= t.point[1] <= h / sy:
            x, y = t.point[0] * sx, t.point[1] * sy
            marks.append(f'<g class="t{n % 6}"><title>turn {n}: ({x:.0f}, {y:.0f})</title><circle cx="{x:.6g}" cy="{y:.6g}" r="{2.7 * unit:.4g}"/>'
                         f'<text x="{x:.6g}" y="{y + 1.35 * unit:.6g}" font-size="{3.7 * unit:.4g}">{n}</text></g>')
    image, said = answered(e)
    if i == image and e.sample.answer_type == "box" and said:
        rect([min(max(v, 0), side) for v, side in zip(said, (w, h, w, h))], "said")
    if i == image and e.sample.answer_type == "point" and said and 0 <= said[0] <= w and 0 <= said[1] <= h:
        (x, y), r = said, 2.2 * unit
        cross = f'd="M{x - r:.6g} {y - r:.6g}l{2 * r:.6g} {2 * r:.6g}m0 {-2 * r:.6g}l{-2 * r:.6g} {2 * r:.6g}"'
        marks.append(f'<path class="under" {cross}/><path class="said" {cross}/>')
    caption = f"<small>image {i + 1}</small>" if many else ""
    return (f'<div><svg class="picture" viewBox="0 0 {w} {h}" role="img" aria-label="image {i + 1}"><use href="#{name}"/>'
            f'{"".join(marks)}</svg>{caption}</div>')


def turn(album, e, n, t):
    def tagged(text):
        return re.sub(r"&lt;/?(?:think|answer|tool_call)&gt;", r'<span class="tag">\g<0></span>', esc(text))

    given = data.FORCE if t.forced and t.text.startswith(data.FORCE) else ""
    out = f'<div class="turn t{n % 6}{"" if t.point else " plain"}"><span class="number">{n}</span><pre>'
    out += (f'<span class="given">{tagged(given)}</span>' if given else "") + tagged(t.text[len(given):]) + "</pre>"
    if t.crop:                                                                 # as the model saw it, black if it was painted black
        seen = next((v.source for v in reversed(e.views) if v.source is not None and tuple(v.box) == tuple(t.crop)), None)
        shown = (seen or data.image(e.sample, 0)).crop(tuple(map(round, t.crop)))
        name, w, h = embed(album, pixels(shown), shown, 256)
        small = " small" if max(w, h) <= 160 else ""                           # enlarged as squares, not blurred
        out += (f'<figure><svg class="crop{small}" viewBox="0 0 {w} {h}" role="img" aria-label="crop {n}"><use href="#{name}"/></svg>'
                f"<figcaption>{numbers(t.crop[:2])} to {numbers(t.crop[2:])}</figcaption></figure>")
    if t.error:
        out += f'<div class="note">{esc(t.error)}</div>'
    if t.forced:
        out += '<div class="note">No zooms left: the faint words were given, the rest it wrote.</div>'
    return out + "</div>"


def verdict(e):
    return "" if "accuracy" not in e.parts or e.parts.get("hidden") else "right" if is_right(e.parts) else "wrong"


def card(album, e):
    """One episode: the pictures on the left, the conversation on the right."""
    s, state = e.sample, verdict(e)
    said = answered(e)[1] or "nothing readable"
    said = said if isinstance(said, str) else numbers(said)
    options = "".join(f"<li{' class=gold' * (i == s.answer)}>{chr(65 + i)}. {esc(o)}{' ✓' * (i == s.answer)}</li>" for i, o in enumerate(s.options))
    zooms = sum(t.crop is not None for t in e.turns)
    facts = [", ".join(map(str, s.category)), f"{zooms} zoom{'s' * (zooms != 1)}", f"{sum(e.sampled)} tokens" if e.ids else "", f"ended by: {e.stop}",
             f"advantage {e.advantage:+.2f}" if e.advantage else ""]
    names = "".join(f"<th>{esc(k.replace('_', ' '))}</th>" for k in e.parts)
    values = "".join(f"<td>{v:.3g}</td>" for v in e.parts.values())
    pictures, turns = "".join(picture(album, e, i) for i in range(len(s.images))), "".join(turn(album, e, n, t) for n, t in enumerate(e.turns, 1))
    return f"""<article class="{state}"><header>{f'<span class="badge">{state}</span>' if state else ""}<b>{esc(s.id, 120)}</b>
{"".join(f"<span>{esc(fact, 60)}</span>" for fact in facts if fact)}</header>
<div class="columns"><div class="pictures{" many" if len(s.images) > 1 else ""}">{pictures}</div>
<div><p class="question">{esc(s.question)}</p>{f'<ul class="options">{options}</ul>' if options else ""}{turns}
<div class="result"><p class="said">answered <b>{esc(said, 200)}</b></p><p>expected <b>{esc(gold(s), 200)}</b></p>
<table class="parts"><tr>{names}</tr><tr>{values}</tr></table></div></div></div></article>"""


def ticks(low, high):
    """About four round numbers that span low..high."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 4)
    return [step * i for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def chart(name, points, w=300, h=150):
    """points [(step, value)] -> a line chart: the raw values faint, their running mean on top, a title under the pointer."""
    xs, ys = zip(*points)
    low, high = min(ys), max(ys)
    if high - low <= 1e-9 * max(abs(low), abs(high)):                          # a flat line stands in the middle
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    marks, k, every = ticks(low, high), len(ys) // 16, 1 + len(ys) // 150
    means = [sum(part) / len(part) for part in (ys[max(0, i - k):i + k + 1] for i in range(len(ys)))]
    X = lambda x: f"{36 + (w - 44) * (x - xs[0]) / ((xs[-1] - xs[0]) or 1):.1f}"
    Y = lambda y, down=0: f"{h - 20 - (h - 28) * (y - marks[0]) / (marks[-1] - marks[0]) + down:.1f}"
    line = lambda values: " ".join(f"{X(x)},{Y(y)}" for x, y in zip(xs, values))
    out = "".join(f'<line x1="36" x2="{w - 8}" y1="{Y(m)}" y2="{Y(m)}"/><text x="31" y="{Y(m, 3)}" text-anchor="end">{m:.6g}</text>' for m in marks)
    out += "".join(f'<text x="{X(x)}" y="{h - 5}" text-anchor="{side}">{x:g}</text>' for x, side in ((xs[0], "start"), (xs[-1], "end")))
    out += f'<polyline class="raw" points="{line(ys)}"/><polyline class="smooth" points="{line(means)}"/>'
    out += "".join(f'<circle cx="{X(x)}" cy="{Y(y)}" r="4"><title>step {x:g}: {y:.5g}</title></circle>' for x, y in points[::every])
    return f'<figure class="chart"><figcaption>{esc(name)}<b>{means[-1]:.3g}</b></figcaption><svg viewBox="0 0 {w} {h}">{out}</svg></figure>'


def charts(curves, first=8):
    """The rows of metrics.jsonl -> a chart for each number in them; the first ones open, the others behind a click."""
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    names = dict.fromkeys(k for row in curves for k in row if k != "step")
    series = {k: [(row.get("step", i), row[k]) for i, row in enumerate(curves) if number(row.get(k))] for k in names}
    drawn = [chart(k, points) for k, points in series.items() if len(points) > 1]
    grid = lambda charts: f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    more = f"<details><summary>{len(drawn) - first} more</summary>{grid(drawn[first:])}</details>" if len(drawn) > first else ""
    return grid(drawn[:first]) + more


def cell(value):
    """Text, or one of summarise()'s dicts: its accuracy, with the interval as numbers and as a bar."""
    if not isinstance(value, dict):
        return f"<td>{esc(value)}</td>"
    a, low, high = (100 * value[k] for k in ("accuracy", "low", "high"))
    rect = lambda kind, x, width: f'<rect class="{kind}" x="{x:.2f}" width="{width:.2f}" height="5"/>'
    return (f'<td><b>{a:.1f} %</b> <small>{low:.1f} to {high:.1f}</small><svg class="bar" viewBox="0 0 100 5" preserveAspectRatio="none">'
            f'{rect("track", 0, 100)}{rect("range", low, high - low)}{rect("share", 0.985 * a, 1.5)}</svg></td>')


def report(path, title, episodes, curves=None, table=None, settings=None, drawn=DRAWN, max_bytes=18_000_000):
    """Write the run as one HTML file that can be opened anywhere.

    episodes: [(label, list[Episode])], a section each. curves: the rows of metrics.jsonl. table: [(label, cells)], its first
    row the head, its cells text or summarise()'s dicts. settings: a dict. At most `drawn` episodes of a section, the first
    ones and not the best, and at most `max_bytes` of them in all."""
    album, sections, links, states, size = {}, [], [], [], 0
    for i, (label, group) in enumerate(episodes):
        cards = []
        for e in group[:drawn]:
            if size > max_bytes:
                break
            known = len(album)
            cards.append(card(album, e))
            states.append(verdict(e))
            size += len(cards[-1]) + sum(len(element[-1]) for element in list(album.values())[known:])
        of = [e for e in group if verdict(e)]
        right = sum(verdict(e) == "right" for e in of)
        low, high = wilson(right, len(of))
        score = f"{right} of {len(of)} right ({right / len(of):.1%}, 95 % interval {low:.1%} to {high:.1%}). " if of else ""
        rest = f"The first {len(cards)} are drawn, {len(group) - len(cards)} are left out." if len(cards) < len(group) else ""
        links.append(f'<a href="#s{i}">{esc(label, 60)}</a>')
        sections.append(f'<section id="s{i}"><h2>{esc(label)}</h2><div class="dim">{score}{rest}</div>{"".join(cards)}</section>')
    head = ""
    if table:
        first, *rows = [f"<tr><th>{esc(label)}</th>{''.join(map(cell, cells))}</tr>" for label, cells in table]
        head = f'<div class="scroll"><table class="numbers"><thead>{first.replace("td>", "th>")}</thead>{"".join(rows)}</table></div>'
    radios = "".join(f'<input type="radio" name="show" id="{k}"{" checked" if k == "all" else ""}>' for k in ("all", "right", "wrong"))
    labels = "".join(f'<label for="{k}">{k} {states.count(k) if k != "all" else len(states)}</label>' for k in ("all", "right", "wrong"))
    lines, pictures = charts(curves or []), "".join(p[-1] for p in album.values())
    settings = " ".join(f"<span>{esc(k)} <b>{esc(v, 80)}</b></span>" for k, v in (settings or {}).items())
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<title>{esc(title)}</title><style>{CSS}</style></head><body>
<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>{pictures}</defs></svg>
<main><h1>{esc(title)}</h1><p class="settings">{settings}</p>{head}"""
    if lines:
        page += f"""<h2>Learning curves</h2><div class="dim">By step. Faint: the values; bold: their running mean, whose end is the number.</div>{lines}"""
    if sections:
        page += f"""{radios}<nav><p>{"".join(links)}</p>{labels}</nav>
<p class="dim">Numbers are the points that the model named to zoom into, rectangles of the same color what each crop showed it; the dashed box is where
the answer lies, a cross or a thick box what the model answered. Coordinates inside a text are the model's own, all others are pixels of the stored image.</p>
{"".join(sections)}"""
    page += "<footer>Written by evaluate.py. One file, no scripts, nothing fetched.</footer></main></body></html>"
    with open(path + ".tmp", "w", encoding="utf-8", errors="replace") as f:    # a model may write half a surrogate pair
        f.write(page)
    os.replace(path + ".tmp", path)


# ----------------------------------------------------------------------------------------------------------------------
def episodes_of(config, samples):
    """The runs that the config asks for -> {label: list[Episode]}; of several, zoom allowed comes first."""
    if config.predictions:
        texts = read_predictions(config.predictions, samples)
        known = model.MODELS.get(config.model)
        if config.convention == "fed" and not (config.max_pixels or known):
            raise data.DataError("--convention fed needs --max-pixels, or a --model whose images are of known size")
        if len(texts) < len(samples):
            print(f"{len(samples) - len(texts)} of {len(samples)} samples have no prediction: counted as wrong format")
        return {"predictions": from_predictions(samples, texts, config.convention, config.max_pixels or (known.max_pixels if known else 0))}
    vlm = model.load(config.checkpoint or config.model, max_pixels=config.max_pixels)
    modes = MODES if config.zoom == "all" and config.style == "zoom" else ["on" if config.zoom == "all" else config.zoom]
    return {MODES[zoom]: run(vlm, samples, zoom, config.style, RECIPES[config.style], config.temperature, config.seed, config.batch,
                             max_zooms=config.max_zooms, max_new_tokens=config.max_new_tokens, crop_from=config.crop_from)
            for zoom in modes}


def evaluate(config):
    if min(config.batch, config.max_new_tokens) < 1 or min(config.n, config.max_zooms, config.temperature) < 0:
        raise data.DataError("--batch and --max-new-tokens must be at least 1; --n, --max-zooms and --temperature at least 0")
    config.style = config.style or ("zoom" if config.data else data.STYLES[data.RECIPES[config.task]])
    if config.data:
        what, samples = config.data, data.read_jsonl(config.data, config.images or None)[:config.n or None]
    else:
        what, samples = f"toy {config.task}, {config.difficulty}", data.toy(config.task, "test", config.n or 200, config.seed, config.difficulty)
    model.make_dir(config.out)                                                 # before the work, not after it
    runs = episodes_of(config, samples)

    modes = {label: summary_of(episodes) for label, episodes in runs.items()}
    records = model.gather([{"run": label, **record(e)} for label, episodes in runs.items() for e in episodes])
    summary = dict(next(iter(modes.values())))
    if all(s.answer_type == "choice" for s in samples):
        summary["chance"] = sum(1 / len(s.options) for s in samples) / len(samples)
        what += f"; chance {summary['chance']:.1%}"
    if len(modes) > 1:
        summary["modes"] = {zoom: modes[label] for zoom, label in MODES.items()}
    if model.rank():
        return summary
    model.write_json(os.path.join(config.out, "summary.json"), summary)
    with open(os.path.join(config.out, "episodes.jsonl"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in records)

    rows = []                                                                  # a category has a row where it is not all there is
    for label, s in modes.items():
        rows += [(label, s)] + [(f"  {name}", part) for name, part in s["categories"].items() if part["n"] < s["n"]]
    width = max(len(label) for label, _ in rows)
    print(f"\n{what}\n{'':{width}}  {'n':>6}  {'correct':>7}  {'accuracy':>8}  {'95 % interval':>16}  wrong format")
    for label, s in rows:
        print(f"{label:{width}}  {s['n']:6}  {s['correct']:7}  {s['accuracy']:8.1%}  {s['low']:6.1%} to {s['high']:6.1%}  {s['wrong_format']:12}")
    table = [("", ["accuracy, 95 % interval", "questions", "wrong format"])] + [(label, [s, s["n"], s["wrong_format"]]) for label, s in rows]
    settings = {k: v for k, v in asdict(config).items() if v != getattr(Config, k) and k not in ("data", "out")}
    report(os.path.join(config.out, "report.html"), f"How well does {config.predictions or config.checkpoint or config.model} look?",
           list(runs.items()), table=table, settings={"on": what} | settings)
    print(f"\n-> {config.out}/report.html, summary.json, episodes.jsonl")
    return summary


def main(argv=None):
    model.start_ranks()
    config = model.cli(Config, argv, __doc__)
    try:
        return evaluate(config)
    except data.DataError as e:
        model.fail(str(e))


if __name__ == "__main__":
    main()
