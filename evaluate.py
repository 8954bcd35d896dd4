"""How good is it, and show me: accuracy with its interval, the controls, and a report that draws where the model looked.

    python evaluate.py                                                   # the tiny model, held-out toy scenes
    python evaluate.py --checkpoint runs/rl/checkpoint --zoom all        # zoom allowed, forbidden, and with black crops
    python evaluate.py --model qwen2.5-vl-3b --data screenspot.jsonl --images DIR
    python evaluate.py --data screenspot.jsonl --predictions texts.jsonl # any model's answers; none is loaded here
    python evaluate.py --compare runs/a runs/b                           # two runs over the same questions, paired

Every run writes into --out: summary.json (the numbers), episodes.jsonl (every episode, one row each, batch by batch: the same
command goes on where it was stopped) and report.html. The three zoom modes are the experiment: if a model answers as well when
it may not zoom, or when every crop is painted black, then its zooms are decoration.

--predictions takes JSONL rows {"id", "text"}. Which coordinates the texts are written in is said by --convention and never
guessed from their size: (500, 300) is a fine point in any of them.

What could not be read is wrong, and counted as wrong_format; a web action that is half right is wrong. Options of --data are
shown in an order drawn from --seed and the sample's id, because some benchmarks always put the right one first.

What is right is decided by rules that can be read. --judge URL only counts, beside the rules, what an episode did (behaviour, ask_judge).

Left out: live web tasks, masks as targets.
"""
import base64, functools, hashlib, html, io, json, math, os, random, re, sys
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

import data, model, rewards, zoom_rollout
from zoom_rollout import Episode, Turn

DRAWN = 24                      # episodes per section of a report that is not told another number
MODES = {"on": "zoom allowed", "off": "zoom forbidden", "black": "crops painted black"}
RECIPES = {"zoom": "vigorl-zoom", "think": "vigorl", "boxes": "univg-r1"}


@dataclass
class Config:
    model: str = "tiny"                                     # name of a model, or a checkpoint folder
    checkpoint: str = ""                                    # a checkpoint folder, in place of --model
    task: Literal[data.TASKS] = "search"                    # toy task
    difficulty: Literal[data.DIFFICULTIES] = "medium"      # of the toy scenes
    data: str = ""                                          # JSONL of samples; empty: the toy world
    images: str = ""                                        # folder that image paths start from; empty: the JSONL's own
    n: int = 0                                              # how many samples; 0: 200 toy samples, or all of --data
    shuffle: bool = True                                    # show the options of --data in an order drawn from --seed and the id
    circular: bool = False                                  # ask a choice once for every rotation of its options
    predictions: str = ""                                   # JSONL of {"id", "text"}: score these, load no model
    convention: Literal["source", "fed", "0-1000", "0-1"] = "source"  # of --predictions: pixels as stored, pixels as fed to --model, relative
    compare: str = ""                                       # two --out folders, A B: who is right where the other is not
    zoom: Literal["on", "off", "black", "all"] = "on"       # allowed, forbidden, answered with black crops; all: the three in turn
    style: Literal["", "zoom", "think", "boxes"] = ""       # of the prompt; empty: the toy task's; for --data boxes if all ask for one, else zoom
    crop_from: Literal["source", "seen"] = "source"         # crops from the stored image, or from the copy that the model was fed
    temperature: float = 0.0                                # 0: greedy
    max_zooms: int = 3                                      # after so many the answer is forced
    max_new_tokens: int = 64                                # per turn; 512 for a real model
    max_pixels: int = 0                                     # of an image as fed; 0: the model's own
    batch: int = 64                                         # episodes at a time; halved whenever the GPU's memory does not hold them
    seed: int = 0                                           # of the toy scenes, of the order of options and of sampling
    drawn: int = 500                                        # episodes per section of the report, at most
    judge: str = ""                                         # an OpenAI-compatible server (http://HOST:PORT/v1) that also counts what the rules of behaviour() count
    judge_model: str = ""                                   # which model of that server; empty: its first
    fresh: bool = False                                     # overwrite what another run left in --out
    out: str = "runs/evaluate"                              # folder for summary.json, episodes.jsonl and report.html


# ----------------------------------------------------------------------------------------------------------------------
# Numbers

# Benchmarks that average over cells: how many levels of the category (coarse to fine) make a cell, how many cells there are
# (0: that depends on the file). In every other benchmark each question counts alike.
CELLS = {"blink": (1, 14), "mig_bench": (1, 10), "mig_bench_revised": (1, 10), "robospatial": (1, 3), "screenspot": (2, 6), "refcoco": (1, 0)}


def wilson(correct, n, z=1.96):
    """The 95 % interval of a share, (low, high) in [0, 1]; Wilson 1927, JASA 22, p. 209. Unlike p +- z sqrt(p (1 - p) / n)
    it stays inside [0, 1] and is honest at 0 % and 100 %: ten right of ten means "at least 72 %"."""
    if n == 0:
        return 0.0, 1.0
    p, s = correct / n, z * z / n
    center, half = (p + s / 2) / (1 + s), math.sqrt(s * (p * (1 - p) + s / 4)) / (1 + s)
    return max(0.0, center - half), min(1.0, center + half)


def paired(a, b, z=1.96):
    """Two runs over the same questions, {id: right?} each -> what B gains and loses against A. p: McNemar's exact test: only the
    questions that one run alone gets right tell the two apart, and a coin would split those evenly. low, high: the 95 % interval
    of the difference B - A, after Bonett and Price 2012 (one more of each kind in n + 2 questions), never of width 0."""
    ids = [i for i in a if i in b]
    n, both = len(ids), sum(a[i] and b[i] for i in ids)
    only_a, only_b = sum(a[i] for i in ids) - both, sum(b[i] for i in ids) - both
    m, term, tail = only_a + only_b, 1, 1
    for k in range(min(only_a, only_b)):                                       # whole numbers: floats overflow from m = 1024 on
        term = term * (m - k) // (k + 1)
        tail += term
    lost, won = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = z * math.sqrt((lost + won - (won - lost) ** 2) / (n + 2))
    return dict(n=n, both=both, only_a=only_a, only_b=only_b, neither=n - both - m, difference=(only_b - only_a) / max(n, 1),
                low=max(-1.0, won - lost - half), high=min(1.0, won - lost + half), p=min(1.0, 2 * tail / 2 ** m))


def is_right(parts, benchmark=None):
    """Right or wrong, whatever the recipe pays: a box from IoU 0.5 on (in VLM-R1's files: above it), the rest when wholly right."""
    if "iou" not in parts:
        return parts["accuracy"] >= 1 - 1e-6
    return parts["iou"] > 0.5 + 1e-6 if benchmark == "vlm-r1" else parts["iou"] >= 0.5 - 1e-6


def right(e):
    return is_right(e.parts, e.sample.meta.get("benchmark"))


def verdict(e):
    return "" if "accuracy" not in e.parts or e.parts.get("hidden") else "right" if right(e) else "wrong"


def mean(values):
    return sum(values) / len(values)


def count(rows):
    """Rows of summarise -> counts, accuracy and its interval, means. Hidden gold is left out of n."""
    scored = [r for r in rows if not r.get("hidden")]
    n, correct = len(scored), sum(is_right(r, r.get("benchmark")) for r in scored)
    asked = len({r.get("of", i) for i, r in enumerate(scored)})                # the rotations of a question are one piece of evidence
    low, high = wilson(correct / max(n, 1) * asked, asked)
    unreadable = int(sum(r["wrong_format"] for r in scored))
    out = dict(n=n, correct=correct, accuracy=correct / max(n, 1), low=low, high=high, wrong_format=unreadable)
    if overlaps := [r["iou"] for r in scored if "iou" in r]:
        out |= {"mean_iou": mean(overlaps), "iou_at": {t: mean([o >= float(t) - 1e-6 for o in overlaps]) for t in ("0.3", "0.5", "0.7")}}
    for name in ("zooms", *COUNTS):
        if values := [r[name] for r in scored if name in r]:
            out[name] = mean(values)
    if points := sum(r.get("points", 0) for r in scored):
        out |= {"points": points, "pointing": sum(r.get("pointed", 0) for r in scored) / points}
    return out | ({"hidden": len(rows) - n} if len(rows) > n else {})


def summarise(rows):
    """rows: dicts with id, category (a list), accuracy, wrong_format, where they apply iou, benchmark, of (see arrange), zooms and
    what behaviour() found -> count() in all and per category, and the average by the benchmark's own definition."""
    copies = {str(r.get("benchmark") or "").removesuffix("_parquet") for r in rows}      # another file of the same benchmark
    name = copies.pop() if len(copies) == 1 else ""
    levels, expected = CELLS.get(name, (0, 1))
    cells, parts = {}, {}
    for r in rows:
        cell = tuple(r["category"][:levels])
        if not r.get("hidden"):
            cells.setdefault(cell, []).append(is_right(r, name))
        for label in dict.fromkeys([*r["category"], *([", ".join(cell)] if levels > 1 else [])]):
            parts.setdefault(label, []).append(r)
    out = count(rows) | {"categories": {label: count(part) for label, part in parts.items()}}
    if name:
        out |= {"benchmark": name, "average": mean([mean(c) for c in cells.values()]) if cells else 0.0,
                "average_of": f"{len(cells)}{f' of {expected}' if expected else ''} cells" if levels else "all questions"}
    rotations = {}
    for r in rows:
        if "of" in r and not r.get("hidden"):
            rotations.setdefault(r["of"], []).append(is_right(r))
    return out | ({"all_rotations": mean([all(hits) for hits in rotations.values()])} if rotations else {})


def summary_of(episodes):
    return summarise(rows_of(episodes))


def rows_of(episodes):
    """What summarise() needs of episodes, as JSON."""
    looked = lambda e: {"zooms": sum(t.crop is not None for t in e.turns)} if e.ids else {}        # a prediction has no tokens
    meta = lambda e: {k: e.sample.meta[k] for k in ("benchmark", "of") if isinstance(e.sample.meta.get(k), str)}
    return [{"id": e.sample.id, "category": e.sample.category, **meta(e), **looked(e), **behaviour(e), **e.parts} for e in episodes]


# ----------------------------------------------------------------------------------------------------------------------
# What the papers analyse. ViGoRL (section A6) had a language model count these in the text; here they are rules on words and
# points, which anyone can check. A step is a sentence of a thought, or a zoom; a place is all that lies within NEAR of a point.

NEAR = 0.1                      # of the image's longer side
MARKERS = {"subgoals": re.compile(r"\b(?:first|next|let me|let's|let us|i will|i'll|i need to|i should|look for|to find)\b", re.I),
           "verification": re.compile(r"\b(?:check|verif\w+|confirm\w*|make sure|look again|closer look|re-?examin\w*)\b", re.I),
           "backtracking": re.compile(r"\b(?:wait|actually|instead|mistaken|reconsider|go back|not (?:here|there|it)|wrong|on second thought)\b", re.I)}
COUNTS = ("regions", *MARKERS)


def steps_of(e, limit=100_000):
    """-> [(words, points)] of the sentences of the thoughts and of the zooms (no words), in order. Points: source pixels of image 1."""
    sx, sy = e.frames[0][:2] if e.frames else (1, 1)
    inside = lambda points: [(x * sx, y * sy) for x, y in points if rewards.inside((x, y), e.frames[:1])]
    steps = []
    for t in e.turns:
        own = t.text[len(data.FORCE):] if t.forced and t.text.startswith(data.FORCE) else t.text   # given words are not its own
        parts = rewards.TAG.split(own[:limit])
        thoughts = [said for tag, said in zip(parts[1::2], parts[2::2]) if tag.lower() == "<think>"]
        sentences = [s for thought in thoughts for s in re.split(r"(?<=[.!?;])\s+|\n+", thought) if s.strip()]
        steps += [(s, inside((float(x), float(y)) for x, y in rewards.POINT.findall(s))) for s in sentences]
        steps += [("", inside([t.point]))] if t.crop else []
    return steps


def behaviour(e):
    """What an episode did, as counts; {} where nothing was thought. A point outside the image is no point.
      regions       places that its steps name
      subgoals      steps that say what to do next (MARKERS) and name a point
      verification  steps that return to a place that had been left, or that say they check (MARKERS) and name a point
      backtracking  steps that name another place than the step before, after words of correction (MARKERS) in or before them
      points, pointed   where an object's box is known: the points (of the zooms, else of the thoughts), and those inside a box"""
    steps = steps_of(e)
    if not steps:
        return {}
    named = [p for _, points in steps for p in points]
    side = max(e.frames[0][2:]) if e.frames else max((v for p in named for v in p), default=1)     # size unknown: what the points span
    found, places, seen, last, doubt = dict.fromkeys(MARKERS, 0), [], set(), None, False
    for words, points in steps:
        says = {name: bool(marker.search(words)) for name, marker in MARKERS.items()}
        doubt, at = doubt or says["backtracking"], []
        for p in points:
            at.append(next((k for k, q in enumerate(places) if math.dist(p, q) <= NEAR * side), len(places)))
            places += [p] if at[-1] == len(places) else []
        if at:
            found["subgoals"] += says["subgoals"]
            found["verification"] += says["verification"] or any(k in seen and k != last for k in at)
            found["backtracking"] += doubt and any(k != (at[0] if last is None else last) for k in at)
            seen, last, doubt = seen | set(at), at[-1], False
    found = {"regions": len(places), **found}
    boxes = list(boxes_in(e.sample, 0)) if len(e.sample.images) == 1 else []
    if boxes:
        points = [p for words, points in steps if not words for p in points] or named
        found |= {"points": len(points), "pointed": sum(any(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in boxes) for x, y in points)}
    return found


# behaviour()'s rules in words, for a language model. Text only, as in the paper: a point is judged by what is said of it.
JUDGE = """Below is what a model thought, step by step, while it answered a question about an image. (x, y) is a point{size}. Count:
- regions: places that its steps name; all points within a tenth of the image's longer side are one place, a point outside the image is no point
- subgoals: steps that say what to do next and name a point
- verification: steps that return to a place that had been left, or that say they check and name a point
- backtracking: steps that name another place than the step before, after words of correction in or before them
Reply with four numbers as JSON and nothing else: {{"regions": ..., "subgoals": ..., "verification": ..., "backtracking": ...}}

Question: {question}
{steps}"""


def ask_judge(endpoint, runs):
    """Every episode that thought something gets `judged`: the four counts, or {} where the reply could not be read. The thoughts are
    what a model wrote: they may sway the judge, but move nothing else than these counts."""
    asked = [(label, e, steps) for label, episodes in runs.items() for e in episodes if (steps := steps_of(e))]
    jobs = []
    for label, e, steps in asked:
        sx, sy, w, h = e.frames[0] if e.frames else (1, 1, 0, 0)                # told in the coordinates of the thoughts
        told = [words.strip() or f"It zooms into {numbers((points[0][0] / sx, points[0][1] / sy))}." for words, points in steps if words or points]
        jobs.append((f"{label}/{e.sample.id}", [], JUDGE.format(
            size=f", x from 0 to {w / sx:.0f}, y from 0 to {h / sy:.0f}" if w else "", question=data.question(e.sample, e.frames),
            steps="\n".join(f"{i}. {step}" for i, step in enumerate(told, 1)))))
    print(f"judge: {endpoint.model} at {endpoint.url} reads {len(jobs)} of {sum(map(len, runs.values()))} episodes, those that thought something")
    for (_, e, _), reply in zip(asked, endpoint.ask(jobs, 0.0)):
        said = re.findall(r"\{[^{}]*\}", reply)[-1:]                           # after whatever else it wrote
        found = {k: int(n) for k, n in re.findall(r'"(\w+)"\s*:\s*(\d{1,3})\s*[,}]', "".join(said))}
        e.judged = {k: found[k] for k in COUNTS} if found.keys() >= set(COUNTS) else {}


def agreement(episodes):
    """Judge and rules over the episodes that both counted -> the means of both, the share of episodes in which they count the same, and
    the share in which they would by chance: most counts are 0, and two that never look agree on that."""
    asked = [e for e in episodes if hasattr(e, "judged")]
    both, out = [(e.judged, behaviour(e)) for e in asked if e.judged], {}
    for k in COUNTS if both else ():
        a, b = [judged[k] for judged, _ in both], [rules[k] for _, rules in both]
        out[k] = dict(judge=mean(a), rules=mean(b), same=mean([x == y for x, y in zip(a, b)]), chance=sum(a.count(x) for x in b) / len(both) ** 2)
    return {"n": len(both), "unjudged": len(asked) - len(both), **out}


# ----------------------------------------------------------------------------------------------------------------------
# Asking a model

def arrange(samples, seed, circular=False):
    """Choices with their options in another order: one drawn from seed and id, or (circular) each rotation as a sample of its
    own. meta["order"][k] is the published index of the option shown k-th; meta["of"] the id that rotations share."""
    out = []
    for s in samples:
        n = len(s.options)
        if s.answer_type != "choice":
            out.append(s)
            continue
        orders = [[*range(r, n), *range(r)] for r in range(n)] if circular else [random.Random(f"{seed}/{s.id}").sample(range(n), n)]
        for r, order in enumerate(orders):
            out.append(replace(s, id=f"{s.id}@{r}" if circular else s.id, options=[s.options[k] for k in order],
                               answer=None if s.answer is None else order.index(s.answer),
                               meta={**s.meta, "order": order, **({"of": s.id} if circular else {})}))
    return out


def pieces(vlm, e):
    """The tokens after the prompt: [text, log-probability], or [text, None] for a stretch that the policy did not choose."""
    out, given = [], []
    for token, sampled, logprob in list(zip(e.ids, e.sampled, e.logprobs))[e.sampled.index(True):]:
        if not sampled:
            given.append(token)
            continue
        out += [[re.sub(r"(?:<\|image_pad\|>)+", "[image]", vlm.text(given)), None]] if given else []
        out, given = out + [[vlm.text([token]), round(logprob, 4)]], []
    return out


def run(vlm, samples, zoom="on", style="zoom", recipe="vigorl-zoom", temperature=0.0, seed=0, batch=64, progress=True,
        max_zooms=3, views=None, save=None, keep=DRAWN, numbers=None, **options):
    """One scored episode per sample. zoom: a key of MODES; save(episodes) is called with every batch; the tokens of the first
    `keep` are kept as text for the report; options: rollout's. -> list[Episode] in the order of the samples; of several ranks
    each has its share of them.
    numbers: those of the samples, where others come before or between them. A sample's number and the first `batch` decide its
    random numbers, so that ranks, a resume and smaller batches change nothing."""
    mine, block = model.mine(len(samples)), batch
    numbers = list(numbers or range(len(samples)))[mine]
    samples, views, episodes, score = samples[mine], views and views[mine], [], 0
    with tqdm(total=len(samples), desc=MODES[zoom], unit=" questions", disable=None if progress else True) as bar:
        while (i := len(episodes)) < len(samples):
            start, skip = divmod(numbers[i], block)
            n = 1                                                              # neighbours that belong to one block
            while n < min(batch, block - skip) and numbers[i + n:i + n + 1] == [numbers[i] + n]:
                n += 1
            try:
                new = zoom_rollout.rollout(vlm, samples[i:i + n], 1, zoom=zoom, style=style, temperature=temperature, seed=seed + start * block,
                                           skip=skip, max_zooms=max_zooms, views=views and views[i:i + n], **options)
            except torch.cuda.OutOfMemoryError:
                if n == 1:
                    raise
                new, batch = [], n // 2
            if not new:                                                        # here nothing refers to what the failed batch held
                torch.cuda.empty_cache()
                continue
            for e in new:
                e.parts = rewards.score(e.sample, e.text, e.turns, recipe, e.frames, max_zooms)
                e.looked = {"zoom": zoom, "crop_from": options.get("crop_from", "source"), "fed": e.views[0].fed}
                e.pieces = pieces(vlm, e) if len(episodes) < keep else []
                e.views = e.views if views else []                             # thousands of questions: keep no features and no pixels
                episodes.append(e)
                score += right(e)
            if save:
                save(new)
            bar.update(len(new))
            bar.set_postfix_str(f"accuracy {score / len(episodes):.1%}")
    return episodes


# ----------------------------------------------------------------------------------------------------------------------
# Predictions: texts that any model wrote

def read_predictions(path, samples):
    """JSONL of {"id", "text"} -> {id: text}. Every row is checked: scoring half of a file by mistake looks like a bad model."""
    known, texts = {s.id for s in samples}, {}
    for where, row in data.rows_of(path):
        name, text = str(data.need(row, "id", (str, int), where)), data.need(row, "text", str, where)
        if name not in known:
            raise data.DataError(f"{where}id {name!r} is not in the data; expected one of its {len(known)} ids, such as {samples[0].id!r}")
        if name in texts:
            raise data.DataError(f"{where}id {name!r} has a prediction already; expected one row per id")
        texts[name] = text
    if not texts:
        raise data.DataError(f"{path} holds no predictions")
    return texts


def from_predictions(samples, texts, convention="source", max_pixels=0, factor=28):
    """Scored episodes of one turn each. A sample without a prediction is an answer that cannot be read. max_pixels and factor: of an
    image as fed, how many pixels and of what its sides are multiples (Qwen2.5-VL: 28, Qwen3-VL: 32)."""
    episodes = []
    for s in samples:
        frames = []                                                            # source pixels: no image need be opened
        for im in s.images if convention != "source" else ():
            w, h = im.size if isinstance(im, Image.Image) else data.open_image(im, f"sample {s.id}: ", size_only=True)
            fed_h, fed_w = model.smart_resize(h, w, factor, 4 * factor ** 2, max_pixels) if convention == "fed" else (1, 1)
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


def record(e):
    """An episode as one readable JSON row: a line of episodes.jsonl. A point times (sx, sy) of frames[0] is a source pixel."""
    turns = [{"text": t.text, "point": t.point, "crop": t.crop, "error": t.error, "forced": t.forced} for t in e.turns]
    return {"id": e.sample.id, "question": e.sample.question, "options": e.sample.options, "answer": gold(e.sample), "turns": turns,
            "stop": e.stop, "verdict": verdict(e), "parts": e.parts, "advantage": e.advantage, "tokens": sum(e.sampled), "behaviour": behaviour(e),
            "frames": e.frames, "looked": getattr(e, "looked", {}), "pieces": getattr(e, "pieces", []), **({"judged": e.judged} if hasattr(e, "judged") else {})}


def restore(row, sample):
    """record() backwards: the episode as the summary and the report need it."""
    turns, n = [Turn(**{k: tuple(v) if isinstance(v, list) else v for k, v in t.items()}) for t in row["turns"]], row["tokens"]
    e = Episode(sample, [0] * n, [True] * n, [0.0] * n, [], turns, row["stop"], [*map(tuple, row["frames"])], row["parts"], row["advantage"])
    e.looked, e.pieces = row["looked"], row["pieces"]
    return e


def left_over(config):
    """What a run with the same settings has left in --out -> {section: rows}. Other settings, or other files behind the same
    names, are refused; what predictions alone made is made again in seconds, and overwritten."""
    path, saved, rows = os.path.join(config.out, "episodes.jsonl"), os.path.join(config.out, "config.json"), {}
    if model.rank():
        model.meet()                                                           # rank 0 puts the file in order first
    now = {k: v for k, v in asdict(config).items() if k not in ("out", "drawn", "batch", "fresh", "compare", "judge", "judge_model")}
    for name in ("data", "predictions", "checkpoint", "model"):
        file = os.path.join(now[name], "model.safetensors") if name in ("checkpoint", "model") else now[name]
        if now[name] and os.path.isfile(file):
            now[f"the file of --{name}"] = [os.path.getsize(file), os.path.getmtime(file)]
    if os.path.exists(saved) and os.path.exists(path) and os.path.getsize(path) and not config.fresh:      # an empty file has nothing to lose
        then = model.read_json(saved)
        differ = [f"{k} ({then.get(k)!r} there, {now.get(k)!r} here)" for k in dict.fromkeys([*now, *then]) if then.get(k) != now.get(k)]
        if differ and not then.get("predictions"):
            raise data.DataError(f"{config.out} holds a run with other settings: {', '.join(differ[:3])}; "
                                 "name another --out, or overwrite it with --fresh")
        with open(path, encoding="utf-8") as f:
            for row in (json.loads(line) for line in f if not differ and line.endswith("\n")):     # the last may have been cut off
                rows.setdefault(row["run"], []).append(row)
    if model.rank() == 0:
        model.write_json(saved, now)
        model.write_text(path, "".join(json.dumps(row) + "\n" for group in rows.values() for row in group))
        model.meet()
    model.meet()                                                               # none adds a row before all have read
    return rows


def compare(a, b, out):
    """Two folders that evaluate.py wrote; of --zoom all, the section with zoom allowed counts."""
    def read(folder):
        found = data.rows_of(os.path.join(folder, "episodes.jsonl"))
        rows = [{key: data.need(row, key, str, where) for key in ("run", "id", "verdict", "question")} for where, row in found]
        return {r["id"]: r for r in rows if r["run"] == rows[0]["run"] and r["verdict"]}
    runs = {a: read(a), b: read(b)}
    both = [i for i in runs[a] if i in runs[b]]
    for i in both:
        asked, other = (rows[i]["question"] for rows in runs.values())
        if asked != other:
            raise data.DataError(f"id {i!r} asks {asked!r:.60} in {a}, {other!r:.60} in {b}: not the same data")
    if not both:
        raise data.DataError(f"{a} and {b} share no question that both have been scored on")
    hits = [{i: rows[i]["verdict"] == "right" for i in both} for rows in (runs[a], runs[b])]
    found = {"a": a, "b": b, **paired(*hits)}
    for (folder, rows), hit in zip(runs.items(), hits):
        score, (low, high) = sum(hit.values()), wilson(sum(hit.values()), len(both))
        rest = f"; {len(rows) - len(both)} questions that the other lacks are left out" if len(rows) > len(both) else ""
        print(f"{folder}: {score} of {len(both)} right, {score / len(both):.1%} ({low:.1%} to {high:.1%}){rest}")
    print(f"right only in {a}: {found['only_a']}; only in {b}: {found['only_b']}; in both: {found['both']}; in neither: {found['neither']}\n"
          f"difference {found['difference']:+.1%} (95 % interval {found['low']:+.1%} to {found['high']:+.1%}), McNemar's exact p = {found['p']:.2g}")
    model.write_json(os.path.join(model.make_dir(out), "compare.json"), found)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The program

def samples_of(config):
    """-> (samples, what they are)"""
    if config.data:
        what, samples = config.data, data.read_jsonl(config.data, config.images or None)[:config.n or None]
    else:
        what = f"toy {config.task}, {config.difficulty}"
        samples = data.toy(config.task, "test", config.n or 200, config.seed, config.difficulty)
    known = set()
    for s in samples:                                                          # rows are found again by their id
        if s.id in known:
            raise data.DataError(f"the data holds the id {s.id!r} twice; every sample needs an id of its own")
        known.add(s.id)
    if config.circular or config.shuffle and config.data and not config.predictions:                 # toy options are shuffled already
        samples = arrange(samples, config.seed, config.circular)
    return samples, what


def episodes_of(config, samples):
    """The runs that the config asks for -> {label: list[Episode]}; of several, zoom allowed comes first. Rows are written as
    they are made."""
    def write(label, episodes):
        with open(os.path.join(config.out, "episodes.jsonl"), "ab", buffering=0) as f:        # in one piece: ranks share the file
            f.write("".join(json.dumps({"run": label, **record(e)}) + "\n" for e in episodes).encode())

    if config.predictions:
        known, texts = model.MODELS.get(config.model), read_predictions(config.predictions, samples)
        limit, factor = config.max_pixels or (known.max_pixels if known else 0), 32 if known and known.convention == "thousand" else 28
        if config.convention == "fed" and not limit:
            raise data.DataError("--convention fed needs --max-pixels, or a --model whose images are of known size")
        read_as = {"source": "pixels of the stored image", "fed": f"pixels of the image as fed to {config.model}, {limit:,} at most",
                   "0-1000": "0 to 1000", "0-1": "0 to 1"}
        print(f"coordinates of the predictions: {read_as[config.convention]}")
        if len(texts) < len(samples):
            print(f"{len(samples) - len(texts)} of {len(samples)} samples have no prediction: counted as wrong format")
        episodes = from_predictions(samples, texts, config.convention, limit, factor)
        left_over(config)                                                      # refuses to overwrite what a model took long to say
        if model.rank() == 0:
            open(os.path.join(config.out, "episodes.jsonl"), "w").close()
            write("predictions", episodes)
        return {"predictions": episodes}
    runs, rows, vlm = {}, left_over(config), None
    for zoom in MODES if config.zoom == "all" and config.style == "zoom" else ["on" if config.zoom == "all" else config.zoom]:
        label = MODES[zoom]
        done = {row["id"]: row for row in rows.get(label, [])}
        numbers = [i for i, s in enumerate(samples) if s.id not in done]
        rest = [samples[i] for i in numbers]
        if done:
            print(f"{label}: {len(done)} episodes are in {config.out} already, {len(rest)} are left")
        if rest and not vlm:
            data.check_images(rest)
            vlm = model.load(config.checkpoint or config.model, max_pixels=config.max_pixels)
        new = rest and run(vlm, rest, zoom, config.style, RECIPES[config.style], config.temperature, config.seed, config.batch, numbers=numbers,
                           max_zooms=config.max_zooms, max_new_tokens=config.max_new_tokens, crop_from=config.crop_from,
                           save=functools.partial(write, label), keep=config.drawn - len(done))
        done |= {row["id"]: row for row in model.gather([record(e) for e in new])}
        runs[label] = [restore(done[s.id], s) for s in samples]
    return runs


def summary_of_runs(runs):
    """{label: episodes} -> (the first run's summary, with all runs and what zooming won and lost if there are several, the summaries)"""
    parts = {label: summary_of(episodes) | ({"judged": agreement(episodes)} if any(hasattr(e, "judged") for e in episodes) else {})
             for label, episodes in runs.items()}
    summary, samples = dict(next(iter(parts.values()))), [e.sample for e in next(iter(runs.values()))]
    if all(s.answer_type == "choice" for s in samples):
        summary["chance"] = mean([1 / len(s.options) for s in samples])
    if len(parts) > 1:
        hits = {zoom: {e.sample.id: right(e) for e in runs[label] if verdict(e)} for zoom, label in MODES.items()}
        without, black = paired(hits["off"], hits["on"]), paired(hits["black"], hits["on"])
        summary |= {"modes": {zoom: parts[label] for zoom, label in MODES.items()}, "paired": {"off": without, "black": black},
                    "zoom_gain": without["only_b"] / max(summary["n"], 1), "zoom_harm": without["only_a"] / max(summary["n"], 1)}
    return summary, parts


def show(config, what, runs, summary, parts):
    """The same table on the screen and in the report: a row for each run, and below it one for each category that is not all there is."""
    what += f"; chance {summary['chance']:.1%}" if "chance" in summary else ""
    if "zoom_gain" in summary:
        what += f"; zoom gain {summary['zoom_gain']:.1%}, zoom harm {summary['zoom_harm']:.1%} (right only with it, right only without)"
    rows = []
    for label, s in parts.items():
        rows += [(label, s)] + [(f"  {name}", part) for name, part in s["categories"].items() if part["n"] < s["n"]]
        if "average" in s:
            what += f"; {label}: the average of {s['benchmark']} is {s['average']:.1%} (mean of {s['average_of']})"
    width = max(len(label) for label, _ in rows)
    print(f"\n{what}\n{'':{width}}  {'n':>6}  {'correct':>7}  {'accuracy':>8}  {'95 % interval':>16}  wrong format")
    for label, s in rows:
        print(f"{label:{width}}  {s['n']:6}  {s['correct']:7}  {s['accuracy']:8.1%}  {s['low']:6.1%} to {s['high']:6.1%}  {s['wrong_format']:12}")
    more = [k for k in ("mean_iou", "zooms", *COUNTS, "pointing") if any(k in s for _, s in rows)]
    table = [("", ["accuracy, 95 % interval", "questions", "wrong format", *(k.replace("_", " ") for k in more)])]
    table += [(label, [s, s["n"], s["wrong_format"], *(f"{s[k]:.2f}" if k in s else "" for k in more)]) for label, s in rows]
    for label, j in ((label, s["judged"]) for label, s in parts.items() if "judged" in s):
        words = {k: f"{j[k]['judge']:.2f} (rules {j[k]['rules']:.2f}; same {j[k]['same']:.0%}, by chance {j[k]['chance']:.0%})" for k in COUNTS if k in j}
        known = f"{j['n']}" + f", {j['unjudged']} unjudged" * (j["unjudged"] > 0)
        print(f"judge, {label} ({known}): {', '.join(f'{k} {said}' for k, said in words.items())}")
        table.append((f"judge, {label}", ["", known, "", *(words.get(k, "") for k in more)]))
    settings = {k: v for k, v in asdict(config).items() if v != getattr(Config, k) and k not in ("data", "out", "fresh")}
    report(os.path.join(config.out, "report.html"), f"How well does {config.predictions or config.checkpoint or config.model} look?",
           list(runs.items()), table=table, settings={"on": what} | settings, drawn=config.drawn)
    print(f"\n-> {config.out}/report.html, summary.json, episodes.jsonl")


def evaluate(config):
    if min(config.batch, config.max_new_tokens) < 1 or min(config.n, config.max_zooms, config.temperature, config.drawn) < 0:
        raise data.DataError("--batch and --max-new-tokens must be at least 1; --n, --max-zooms, --temperature and --drawn at least 0")
    if config.circular and config.predictions:
        raise data.DataError("--circular asks a model again; --predictions are answers to the options in their published order")
    if config.compare:
        if len(folders := config.compare.split(os.pathsep)) != 2:
            raise data.DataError("--compare needs two folders, as in --compare runs/a runs/b")
        return compare(*folders, config.out)
    samples, what = samples_of(config)
    if not config.style and config.data:                                       # a box may be in any image, a crop is of the first
        config.style = "boxes" if all(s.answer_type == "box" for s in samples) else "zoom"
    config.style = config.style or data.STYLES[data.RECIPES[config.task]]
    model.make_dir(config.out)                                                 # before the work, not after it
    if config.judge and not config.judge.startswith(("http://", "https://")):
        raise data.DataError(f"--judge is {config.judge!r}; expected an address, such as http://127.0.0.1:8000/v1")
    path, log = (os.path.join(config.out, name) for name in ("episodes.jsonl", "judge.jsonl"))
    judge = model.Endpoint("judge", config.judge, config.judge_model, data.DataError, log) if config.judge and model.rank() == 0 else None
    runs = episodes_of(config, samples)
    if judge:
        ask_judge(judge, runs)
        model.write_text(path, "".join(json.dumps({"run": label, **record(e)}) + "\n" for label, episodes in runs.items() for e in episodes))
    summary, parts = summary_of_runs(runs)
    if model.rank():
        return summary
    model.write_json(os.path.join(config.out, "summary.json"), summary)
    show(config, what, runs, summary, parts)
    return summary


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--compare" in argv:                                                    # the one flag that takes two values
        i = argv.index("--compare")
        argv[i + 1:i + 3] = [os.pathsep.join(argv[i + 1:i + 3])]
    model.start_ranks()
    try:
        longer = lambda config: {} if model.is_tiny(config.checkpoint or config.model) else {"max_new_tokens": 512}
        return evaluate(model.cli(Config, argv, __doc__, presets=longer))
    except data.DataError as e:
        model.fail(str(e))
    except KeyboardInterrupt:
        model.fail("interrupted; the same command goes on from there")


# ----------------------------------------------------------------------------------------------------------------------
# The report. One file, nothing fetched, no script but SCRIPT. Whatever comes from data or from a model goes through esc().

def esc(text, limit=4000):
    text = str(text)
    return html.escape(text[:limit], quote=True) + (f" [and {len(text) - limit:,} more characters]" if len(text) > limit else "")


def report(path, title, episodes, curves=None, table=None, settings=None, drawn=DRAWN, max_bytes=18_000_000):
    """Write the run as one HTML file that can be opened anywhere.

    episodes: [(label, list[Episode])], a section each. curves: the rows of metrics.jsonl. table: [(label, cells)], its first
    row the head, its cells text or summarise()'s dicts; of a long one, the rows with an indented label are folded away.
    settings: a dict. At most `drawn` episodes of a section, the first ones and not the best, and at most `max_bytes` of them
    in all."""
    album, cards, states, size = {}, [[] for _ in episodes], [], 0
    side = 640 if sum(min(len(group), drawn) for _, group in episodes) <= 200 else 448             # many pictures are stored smaller
    turns = [(i, group[k]) for k in range(drawn) for i, (_, group) in enumerate(episodes) if k < len(group)]     # sections take turns
    for i, e in tqdm(turns, "drawing", unit=" episodes", leave=False, disable=None):
        if size > max_bytes:
            break
        known = len(album)
        cards[i].append(card(album, e, side))
        states.append(verdict(e))
        size += len(cards[i][-1]) + sum(len(element[-1]) for element in list(album.values())[known:])

    links, filters, sections = "", "", ""
    for i, (label, group) in enumerate(episodes):
        hits = [verdict(e) == "right" for e in group if verdict(e)]
        low, high = wilson(sum(hits), len(hits))
        many = len({e.sample.id for e in group}) > 1                           # questions, not tries of one
        interval = f", 95 % interval {low:.1%} to {high:.1%}" if many else ""
        score = f"{sum(hits)} of {len(hits)} right ({mean(hits):.1%}{interval}). " if hits else ""
        rest = f"The first {len(cards[i])} are drawn, {len(group) - len(cards[i])} are left out." if len(cards[i]) < len(group) else ""
        links += f'<a href="#s{i}">{esc(label, 60)}</a>'
        sections += f'<section id="s{i}"><h2>{esc(label)}</h2><div class="dim">{score}{rest}</div>{"".join(cards[i])}</section>'
    body = f"<h1>{esc(title)}</h1>"
    body += f'<p class="settings">{" ".join(f"<span>{esc(k)} <b>{esc(v, 400)}</b></span>" for k, v in (settings or {}).items())}</p>'
    if table:
        (_, head), *rows = [(label, f"<tr><th>{esc(label)}</th>{''.join(map(cell, cells))}</tr>") for label, cells in table]
        head = f'<thead>{head.replace("td>", "th>")}</thead>'
        grid = lambda rows: f'<div class="scroll"><table class="numbers">{head}{"".join(rows)}</table></div>'
        body += grid(row for label, row in rows if len(rows) <= 12 or not label.startswith(" "))
        if len(rows) > 12 and any(label.startswith(" ") for label, _ in rows):
            body += f"<details><summary>by category</summary>{grid(row for _, row in rows)}</details>"
    if lines := charts(curves or []):
        body += f'<h2>Learning curves</h2><div class="dim">By step. Faint: the values; bold: their running mean, whose end is the number.</div>{lines}'
    if sections:
        for state, n in (("all", len(states)), ("right", states.count("right")), ("wrong", states.count("wrong"))):
            body += f'<input type="radio" name="show" id="{state}"{" checked" if state == "all" else ""} aria-label="show {state}">'
            filters += f'<label for="{state}">{state} {n}</label>'
        body += f"<nav><div>{links}</div><div>{filters}</div></nav>{LEGEND}{sections}"
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    pictures = "".join(element for *_, element in album.values())
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{esc(title)}</title><style>{CSS}</style></head>
<body><svg width="0" height="0" class="album" aria-hidden="true"><defs>{pictures}</defs></svg>
<main>{body}<footer>Written by evaluate.py. One file, nothing fetched.</footer></main><script>{SCRIPT}</script></body></html>"""
    model.write_text(path, page)


def cell(value):
    """Text, or one of summarise()'s dicts: its accuracy, with the interval as numbers and as a bar."""
    if not isinstance(value, dict):
        return f"<td>{esc(value)}</td>"
    a, low, high = (100 * value[k] for k in ("accuracy", "low", "high"))
    rect = lambda kind, x, width: f'<rect class="{kind}" x="{x:.2f}" width="{width:.2f}" height="5"/>'
    return (f'<td><b>{a:.1f} %</b> <small>{low:.1f} to {high:.1f}</small><svg class="bar" viewBox="0 0 100 5" preserveAspectRatio="none">'
            f'{rect("track", 0, 100)}{rect("range", low, high - low)}{rect("share", 0.985 * a, 1.5)}</svg></td>')


def card(album, e, side=640):
    """One episode: the pictures on the left, the conversation on the right."""
    s, state, zooms, does = e.sample, verdict(e), sum(t.crop is not None for t in e.turns), behaviour(e)
    said = answered(e)[1] or "nothing readable"
    said = said if isinstance(said, str) else numbers(said)
    tick = '<b class="tick"> ✓</b>'
    options = "".join(f"<li{' class=gold' * (i == s.answer)}>{chr(65 + i)}. {esc(o)}{tick * (i == s.answer)}</li>" for i, o in enumerate(s.options))
    facts = [", ".join(map(str, s.category)), f"{zooms} zoom{'s' * (zooms != 1)}", f"{sum(e.sampled)} tokens" if e.ids else "",
             f"ended by: {e.stop}", *(f"{k} {does[k]}" for k in MARKERS if does.get(k)), f"advantage {e.advantage:+.2f}" if e.advantage else ""]
    facts = "".join(f"<span>{esc(fact, 60)}</span>" for fact in facts if fact)
    names = "".join(f"<th>{esc(k.replace('_', ' '))}</th>" for k in e.parts)
    values = "".join(f"<td>{v:.3g}</td>" for v in e.parts.values())
    pictures = "".join(picture(album, e, i, side) for i in range(len(s.images)))
    turns = "".join(turn(album, e, n, t) for n, t in enumerate(e.turns, 1))
    for_script = f'data-id="{esc(s.id)}" data-category="{esc(chr(10).join(map(str, s.category)))}" data-zooms="{zooms}"'
    return f"""<article class="{state}" tabindex="-1" {for_script}>
<header>{f'<span class="badge">{state}</span>' if state else ""}<b>{esc(s.id, 120)}</b>{facts}</header>
<div class="columns"><div class="pictures{" many" if len(s.images) > 1 else ""}">{pictures}</div>
<div><p class="question">{esc(data.question(s, e.frames))}</p>{f'<ul class="options">{options}</ul>' if options else ""}{turns}
<div class="result"><p class="said">answered <b>{esc(said, 200)}</b></p><p>expected <b>{esc(gold(s), 200)}</b></p>
<table class="parts"><tr>{names}</tr><tr>{values}</tr></table></div>{tokens(e)}</div></div></article>"""


def answered(e):
    """What the episode answered: (image that it is about, words or source pixels or None)."""
    said = rewards.parse_answer(e.text, e.sample.answer_type)
    image = e.sample.targets[0]["image"] if e.sample.targets else 0
    return image, tuple(rewards.to_source(said, image, e.frames)) if isinstance(said, tuple) else said


def turn(album, e, n, t):
    def tagged(text):
        return re.sub(r"&lt;/?(?:think|answer|tool_call)&gt;", r'<span class="tag">\g<0></span>', esc(text))

    given = data.FORCE if t.forced and t.text.startswith(data.FORCE) else ""
    out = f'<div class="turn t{n % 6}{"" if t.point else " plain"}"><span class="number">{n}</span><pre>'
    out += (f'<span class="given">{tagged(given)}</span>' if given else "") + tagged(t.text[len(given):]) + "</pre>"
    if t.crop:
        name, w, h = embed(album, crop_of(e, t), 256)
        small = " small" if max(w, h) <= 160 else ""                           # enlarged as squares, not blurred
        out += (f'<figure><svg class="crop{small}" viewBox="0 0 {w} {h}" role="img" aria-label="crop {n}"><use href="#{name}"/></svg>'
                f"<figcaption>{numbers(t.crop[:2])} to {numbers(t.crop[2:])}</figcaption></figure>")
    if t.error:
        out += f'<div class="note">{esc(t.error)}</div>'
    if t.forced:
        out += '<div class="note">No zooms left: the faint words were given, the rest it wrote.</div>'
    return out + "</div>"


def tokens(e, limit=2000):
    """What the policy chose, shaded by its probability, and what it was given, faint."""
    chosen = [piece for piece in getattr(e, "pieces", []) if piece[1] is not None]
    if not chosen:
        return ""
    shade = lambda p: f'class="p{min(int(5 * p), 4)}" title="{p:.3f}"'
    token = lambda text, logp: f"<s>{esc(text)}</s>" if logp is None else f"<i {shade(math.exp(logp))}>{esc(text)}</i>"
    sure, weight = math.exp(mean([p for _, p in chosen])), f", each with advantage {e.advantage:+.2f}" if e.advantage else ""
    return (f'<details><summary>tokens: {len(chosen)} chosen at a mean probability of {sure:.2f}{weight}</summary>'
            f'<pre class="tokens">{"".join(token(*piece) for piece in e.pieces[:limit])}</pre></details>')


def embed(album, image, side):
    """Put a picture, or the file at a path, into the album, {picture: (id, width, height, element)}, where it stands once however
    often it is drawn. It keeps its size in source pixels, so everything drawn over it is in source pixels too."""
    key = image if isinstance(image, str) else (image.size, hash(image.tobytes()))
    if key not in album:
        image = opened(image) if isinstance(image, str) else image
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


@functools.lru_cache(4)
def opened(path):
    return data.open_image(path)


def crop_of(e, t):
    """The crop of turn t as the model saw it: black if it was painted black, blurred if it was cut from what the model was fed."""
    source, looked = e.sample.images[0], getattr(e, "looked", {})
    source = source if isinstance(source, Image.Image) else opened(source)
    if looked.get("zoom") == "black":
        source = Image.new("RGB", source.size)
    if looked.get("crop_from") == "seen":
        source = source.resize(looked["fed"], Image.Resampling.BICUBIC).resize(source.size, Image.Resampling.BICUBIC)
    return source.crop(tuple(map(round, t.crop)))


def boxes_in(sample, i):
    """Where the answer lies in image i: targets, and what a toy scene or a data set calls evidence (free form: checked here)."""
    evidence = sample.meta.get("evidence")
    for t in sample.targets + (evidence if isinstance(evidence, list) else []):
        try:
            if t.get("image", 0) == i:
                yield data.numbers(t.get("box"), 4, "", "box")
        except (AttributeError, data.DataError):
            pass


def picture(album, e, i, side):
    """Prompt image i with the places where the model looked, the windows it was shown, the gold and the answer."""
    name, w, h = embed(album, e.sample.images[i], side)
    sx, sy = e.frames[i][:2] if e.frames else (1, 1)
    many = len(e.sample.images) > 1
    unit, marks = max(w, h) / (60 if many else 100), []                        # several images are drawn smaller

    def mark(tag, shape, kind):                                                # on a darker copy of itself: seen on any ground
        marks.append(f'<{tag} class="under of-{kind}" {shape}/><{tag} class="{kind}" {shape}/>')

    def rect(box, kind):
        (x1, x2), (y1, y2) = sorted(box[0::2]), sorted(box[1::2])
        mark("rect", f'x="{x1:.6g}" y="{y1:.6g}" width="{x2 - x1:.6g}" height="{y2 - y1:.6g}"', kind)

    outlines = {tuple(t["box"]): t["polygon"] for t in e.sample.targets if "polygon" in t}
    for box in boxes_in(e.sample, i):
        if outline := outlines.get(tuple(box)):
            mark("path", f'd="M{"L".join(f"{x:.6g} {y:.6g}" for x, y in outline)}Z"', "gold")
        else:
            rect(box, "gold")
    looks = list(enumerate(e.turns, 1)) if i == 0 else []
    for n, t in looks:
        if t.crop:
            rect(t.crop, f"t{n % 6}")
    for n, t in looks:                                                         # on top of every window
        if t.point and 0 <= t.point[0] <= w / sx and 0 <= t.point[1] <= h / sy:
            x, y = t.point[0] * sx, t.point[1] * sy
            marks.append(f'<g class="t{n % 6}"><title>turn {n}: ({x:.0f}, {y:.0f})</title><circle cx="{x:.6g}" cy="{y:.6g}" r="{2.7 * unit:.4g}"/>'
                         f'<text x="{x:.6g}" y="{y + 1.35 * unit:.6g}" font-size="{3.7 * unit:.4g}">{n}</text></g>')
    image, said = answered(e)
    if i == image and e.sample.answer_type == "box" and said:
        rect([min(max(v, 0), side) for v, side in zip(said, (w, h, w, h))], "said")
    if i == image and e.sample.answer_type == "point" and said and 0 <= said[0] <= w and 0 <= said[1] <= h:
        (x, y), r = said, 2.2 * unit
        mark("path", f'd="M{x - r:.6g} {y - r:.6g}l{2 * r:.6g} {2 * r:.6g}m0 {-2 * r:.6g}l{-2 * r:.6g} {2 * r:.6g}"', "said")
    caption = f"<small>image {i + 1}</small>" if many else ""
    return (f'<div><svg class="picture" viewBox="0 0 {w} {h}" role="img" aria-label="image {i + 1}"><use href="#{name}"/>'
            f'{"".join(marks)}</svg>{caption}</div>')


def chart(name, points, w=300, h=150):
    """points [(step, value)] -> a line chart: the raw values faint, their running mean on top, between the lowest and the highest."""
    xs, ys = zip(*points)
    low, high, k = min(ys), max(ys), len(ys) // 16
    means = [mean(ys[max(0, i - k):i + k + 1]) for i in range(len(ys))]
    X = lambda x: f"{44 + (w - 52) * (x - xs[0]) / ((xs[-1] - xs[0]) or 1):.1f}"
    Y = lambda y: f"{h - 24 - (h - 34) * ((y - low) / (high - low) if high > low else 0.5):.1f}"            # a flat line stands in the middle
    line = lambda kind, values: f'<polyline class="{kind}" points="{" ".join(f"{X(x)},{Y(y)}" for x, y in zip(xs, values))}"/>'
    edges = "".join(f'<line x1="44" x2="{w - 8}" y1="{Y(y)}" y2="{Y(y)}"/><text x="39" y="{Y(y)}" dy="3" text-anchor="end">{y:.3g}</text>'
                    for y in dict.fromkeys((low, high)))
    words = "".join(f'<text x="{X(x)}" y="{h - 7}" text-anchor="{side}">{x:g}</text>' for x, side in ((xs[0], "start"), (xs[-1], "end")))
    return (f'<figure class="chart"><figcaption>{esc(name)}<b>{means[-1]:.3g}</b></figcaption>'
            f'<svg viewBox="0 0 {w} {h}">{edges}{line("raw", ys)}{line("smooth", means)}{words}</svg></figure>')


def charts(curves, first=8):
    """The rows of metrics.jsonl -> a chart for each number in them; the first ones open, the others behind a click."""
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    series = {}
    for i, row in enumerate(curves):
        for name, value in row.items():
            if number(value) and name != "step":
                series.setdefault(name, []).append((row.get("step", i), value))
    flat = lambda item: len({value for _, value in item[1]}) == 1              # what never changes comes last
    drawn = [chart(name, points) for name, points in sorted(series.items(), key=flat) if len(points) > 1]
    grid = lambda part: f'<div class="charts">{"".join(part)}</div>'
    more = f"<details><summary>{len(drawn) - first} more</summary>{grid(drawn[first:])}</details>" if len(drawn) > first else ""
    return grid(drawn[:first]) + more if drawn else ""


LEGEND = """<p class="dim">Numbers are the points that the model named to zoom into, rectangles of the same color what each crop showed it; the
dashed outline is where the answer lies, a cross or a thick box what the model answered. Coordinates inside a text are the model's own, all others
are pixels of the stored image. Keys: j and k for the next and the last episode, tab and arrows for all else.</p>"""

CSS = """
:root { color-scheme:light dark; --page:#f6f5f1; --card:#fff; --ink:#20242b; --dim:#6b7079; --line:#e3e0d8; --soft:#f1efe9; --accent:#3457c9;
  --good:#16794c; --good-soft:#e2f3ea; --bad:#b03a2e; --bad-soft:#fae7e3; --warn:#8a5a00; --warn-soft:#fdf1d8; --sans:system-ui,"Segoe UI",sans-serif;
  --serif:"Iowan Old Style",Palatino,Georgia,"Liberation Serif",serif; --mono:ui-monospace,Menlo,Consolas,"Liberation Mono",monospace }
@media (prefers-color-scheme:dark) { :root { --page:#14161a; --card:#1c1f25; --ink:#e5e5e1; --dim:#989da7; --line:#2e323a; --soft:#23272e;
  --accent:#8fa9ff; --good:#6fd3a2; --good-soft:#17352a; --bad:#f09a8c; --bad-soft:#3f2220; --warn:#e9bd67; --warn-soft:#3a2e17 } }
* { box-sizing:border-box } html { scroll-padding-top:5rem } b { font-weight:600 } a { color:var(--accent); text-decoration:none } a:hover { text-decoration:underline }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 var(--sans); overflow-wrap:anywhere; font-variant-numeric:tabular-nums }
main { max-width:1180px; margin:auto; padding:3rem 1.5rem 5rem } footer { margin-top:4rem } small, .dim, footer { color:var(--dim); font-size:.84rem }
h1 { font:600 2.3rem/1.15 var(--serif); letter-spacing:-.01em; margin:0 } h2 { font:600 1.45rem/1.2 var(--serif); margin:3.2rem 0 .2rem }
.settings { margin:.8rem 0 0; color:var(--dim); font-size:.86rem } .settings span { margin-right:1.1em } .settings b { color:var(--ink); font-weight:500 }
.scroll { overflow-x:auto; margin-top:1.8rem }
.numbers { background:var(--card); border:1px solid var(--line); border-radius:10px; border-spacing:0; overflow-wrap:normal }
.numbers th, .numbers td { text-align:left; font-weight:400; vertical-align:top; padding:.6rem .8rem; border-top:1px solid var(--line) }
.numbers th { white-space:pre } .numbers thead * { color:var(--dim); font-size:.84rem; border-top:0 } .numbers b { font-size:1.05rem }
.bar { display:block; width:10rem; height:7px; margin-top:.35rem } .track { fill:var(--line) } .range { fill:var(--accent); opacity:.4 } .share { fill:var(--accent) }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(255px,1fr)); gap:.9rem; margin-top:1rem }
.chart { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:.75rem .8rem .4rem; margin:0 } .chart svg { display:block }
.chart figcaption { display:flex; justify-content:space-between; font-size:.88rem } .chart line { stroke:var(--line) } .chart text { font-size:10.5px; fill:var(--dim) }
.chart polyline { fill:none; stroke:var(--accent); stroke-linejoin:round } .chart .raw { opacity:.3 } .chart .smooth { stroke-width:1.9 }
summary { cursor:pointer; color:var(--accent); margin-top:1rem; font-size:.9rem }
input[name=show], .album { position:absolute; opacity:0 }
nav { position:sticky; top:0; z-index:2; margin:2.6rem -1.5rem 1rem; padding:.7rem 1.5rem; background:var(--page); border-bottom:1px solid var(--line); font-size:.9rem }
nav, nav div { display:flex; flex-wrap:wrap; gap:.3rem .8rem; align-items:center } nav div + div { margin-left:auto } nav label { cursor:pointer; color:var(--dim); padding:.15rem .6rem; border-radius:99px }
select, button { font:inherit; color:inherit; background:var(--card); border:1px solid var(--line); border-radius:7px; padding:.15rem .6rem }
#all:checked ~ nav [for=all], #right:checked ~ nav [for=right], #wrong:checked ~ nav [for=wrong] { background:var(--ink); color:var(--page) }
input:focus-visible ~ nav label, article:focus { box-shadow:0 0 0 1.5px var(--accent); outline:0 }
#right:checked ~ section article:not(.right), #wrong:checked ~ section article:not(.wrong) { display:none }
article { background:var(--card); border:1px solid var(--line); border-radius:12px; margin-top:1.1rem; overflow:hidden; break-inside:avoid }
article > header { display:flex; flex-wrap:wrap; gap:.2rem 1rem; padding:.55rem 1.2rem; border-bottom:1px solid var(--line); font-size:.86rem; color:var(--dim) }
article > header b { color:var(--ink); margin-right:auto } .badge { padding:.05rem .7rem; border-radius:99px; font-weight:600 }
.right .badge { background:var(--good-soft); color:var(--good) } .wrong .badge { background:var(--bad-soft); color:var(--bad) }
.columns { display:grid; grid-template-columns:minmax(0,5fr) minmax(0,8fr); gap:1.6rem; padding:1.2rem }
.pictures { display:grid; gap:.7rem; align-content:start } .pictures.many { grid-template-columns:1fr 1fr }
.picture { display:block; width:100%; max-height:34rem; border-radius:6px; background:var(--soft) } .picture text { font-weight:700; text-anchor:middle; fill:#111 }
.picture rect, .picture path { fill:none; stroke:var(--hue); stroke-width:2.2; vector-effect:non-scaling-stroke } .picture .gold { stroke:#fff; stroke-dasharray:5 4 }
.picture .under { stroke:#000b; stroke-width:4.4 } .picture .said { stroke:#ff5d4d; stroke-width:3 } .right .picture .said { stroke:#46e08f }
.picture circle { fill:var(--hue); stroke:#000b; vector-effect:non-scaling-stroke }
.t1 { --hue:#ff9a2e } .t2 { --hue:#3cc0ff } .t3 { --hue:#ff70b5 } .t4 { --hue:#b49bff } .t5 { --hue:#f6dc3a } .t0 { --hue:#4fe0ac }
.question { font:1.2rem/1.35 var(--serif); margin:0 0 .6rem; white-space:pre-wrap } .options { list-style:none; display:flex; flex-wrap:wrap; gap:.4rem; padding:0 }
.options li { border:1px solid var(--line); border-radius:7px; padding:.1rem .65rem; font-size:.88rem } .options .gold { border-color:var(--good); color:var(--good) }
.turn { display:grid; grid-template-columns:1.7rem minmax(0,1fr) auto; gap:.2rem .8rem; padding:.85rem 0; border-top:1px solid var(--line) }
.turn:first-of-type { margin-top:1rem } .plain .number { background:var(--soft); color:var(--dim) }
.number { width:1.6rem; height:1.6rem; border-radius:50%; background:var(--hue); color:#111; font:700 .85rem/1.6rem var(--sans); text-align:center }
pre { margin:.1rem 0 0; font:.82rem/1.55 var(--mono); white-space:pre-wrap } .tag { color:var(--dim) } .given, s { opacity:.55; text-decoration:none }
.turn figure { margin:0; text-align:center } .turn figcaption { font-size:.72rem; color:var(--dim); margin-top:.15rem; white-space:nowrap }
.crop { width:136px; border-radius:6px; border:2px solid var(--hue); background:#000; display:block } .small { image-rendering:pixelated }
.note, fieldset { grid-column:2 / -1; justify-self:start; font-size:.84rem; padding:.25rem .7rem; border:0; border-radius:7px; background:var(--warn-soft); color:var(--warn) }
fieldset { background:var(--soft); color:var(--ink) } fieldset label { margin-left:.8rem } legend { float:left } body:not(.rating) fieldset { display:none }
.rating :is(header span, .tick, .result, details, .picture .gold, .picture .said, .of-gold, .of-said) { display:none }
.rating article:not(:has(fieldset)) { display:none } .rating .options .gold { border-color:var(--line); color:inherit }
.tokens i { font-style:normal; border-bottom:2px solid var(--line) } .p0 { background:#f0604080 } .p1 { background:#f0904066 } .p2 { background:#f0b04050 } .p3 { background:#f0d04033 }
.result { display:flex; flex-wrap:wrap; gap:.5rem 1.4rem; align-items:center; border-top:1px solid var(--line); padding-top:.7rem; font-size:.84rem; color:var(--dim) }
.result p { margin:0 } .result p b { display:block; font-size:1rem; color:var(--ink) } .right .said b { color:var(--good) } .wrong .said b { color:var(--bad) }
.parts { margin-left:auto; text-align:right; border-spacing:0 } .parts th, .parts td { font-weight:400; padding:0 0 0 1rem } .parts td { font-size:1rem; color:var(--ink) }
@media (max-width:760px) { main { padding:1.6rem .9rem 3rem } nav { margin-inline:-.9rem; padding-inline:.9rem } .charts { grid-template-columns:1fr 1fr; gap:.5rem }
  .columns { grid-template-columns:minmax(0,1fr) } .turn { grid-template-columns:1.7rem minmax(0,1fr) } .turn figure { grid-column:2; justify-self:start } }
"""

# The page's only script, allowed by its hash: menus for category and zooms, j and k, and the rating mode, which hides what
# would sway the rater and asks what ViGoRL's human study asked. It builds elements from text and never reads text as HTML.
SCRIPT = r"""
const cards = [...document.querySelectorAll('article')], bar = document.querySelector('nav div + div'), tests = []
const make = (tag, props, ...inside) => { const made = Object.assign(document.createElement(tag), props); made.append(...inside); return made }
function menu(what, of) {
  const values = [...new Set(cards.flatMap(of))].sort()
  if (values.length < 2) return
  const box = make('select', {ariaLabel: what, onchange: () => cards.forEach(c => c.hidden = !tests.every(test => test(c)))},
    ...['', ...values].map(v => make('option', {value: v}, v || 'any ' + what)))
  tests.push(c => !box.value || of(c).includes(box.value))
  bar.append(box)
}
function ask(turn, what, text, values, n) {
  turn.append(make('fieldset', {}, make('legend', {}, text), ...values.map(value =>
    make('label', {}, make('input', {type: 'radio', name: what + n, className: what, value}), ' ' + value))))
}
function rate() {
  save.hidden = !document.body.classList.toggle('rating')
  document.querySelectorAll('.turn:not(.plain):not(:has(fieldset))').forEach((turn, n) => {
    ask(turn, 'right', 'Is this point right?', ['yes', 'no', 'unsure'], n)
    ask(turn, 'helps', 'Does it help? (1: not at all, 5: very much)', ['1', '2', '3', '4', '5'], n)
  })
}
function download() {
  const said = (turn, what) => turn.querySelector('.' + what + ':checked')?.value ?? null
  const ratings = [...document.querySelectorAll('.turn:has(:checked)')].map(turn => {
    const card = turn.closest('article'), section = turn.closest('section')
    return {section: section.querySelector('h2').textContent, id: card.dataset.id,
            episode: [...section.querySelectorAll('article')].indexOf(card) + 1, turn: +turn.querySelector('.number').textContent,
            right: said(turn, 'right'), helps: +said(turn, 'helps') || null}
  })
  const file = new Blob([JSON.stringify({report: document.title, ratings}, null, 1)], {type: 'application/json'})
  make('a', {href: URL.createObjectURL(file), download: 'ratings.json'}).click()
}
const save = make('button', {hidden: true, onclick: download}, 'save ratings')
if (bar) {
  menu('category', c => c.dataset.category.split('\n'))
  menu('zooms', c => [c.dataset.zooms + (c.dataset.zooms == 1 ? ' zoom' : ' zooms')])
  if (document.querySelector('.turn:not(.plain)')) bar.append(make('button', {onclick: rate}, 'rate points'), save)
}
document.addEventListener('keydown', e => {
  const shown = cards.filter(c => c.offsetParent), step = {j: 1, k: -1}[e.key]
  if (step && !e.ctrlKey && !e.metaKey && !e.altKey && e.target.tagName != 'SELECT') shown[shown.indexOf(e.target.closest('article')) + step]?.focus()
})
"""


if __name__ == "__main__":
    main()
