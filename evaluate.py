"""Measure a model: its accuracy with an interval, what its zooms contribute, how two runs differ.

    python evaluate.py                                          # tiny model, held-out toy scenes
    python evaluate.py --checkpoint runs/rl/checkpoint --zoom all       # the zoom controls
    python evaluate.py --model qwen2.5-vl-3b --data screenspot.jsonl --images DIR
    python evaluate.py --data screenspot.jsonl --predictions texts.jsonl    # answers of any model
    python evaluate.py --compare runs/a runs/b                  # two runs over the same questions

The folder --out holds one run: summary.json (the numbers), episodes.jsonl (one row per episode)
and report.html. Rows are written batch by batch, so the same command continues after a stop.

The zoom modes are the experiment. If a model answers as well when it may not zoom, when every crop
is painted black, or when every crop shows another object than the one called for, then its zooms do
not help it.

The rules of rewards.py decide what is right. An answer that cannot be read is wrong, and counted
as wrong_format; a web action that is half right is wrong. The options of --data are shown in a
random order, because some benchmarks always put the right one first.

Left out: live web tasks and masks as targets, which need a browser and a segmentation model.

Words:  run: all episodes of one zoom mode, or of --predictions    row: a dict about one episode
"""
import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable, Literal

import appendix                     # before torch: Ctrl-C is one line from here on
import torch
from tqdm import tqdm

import data
import rewards
import zoom_rollout
from appendix import averages, evaluation_run, evidence, faults, prefix, ranks, run
from appendix.episode_rows import is_right, right, token_texts, verdict
from appendix.episode_rows import record    # used by appendix/rl_run.py, as evaluate.record
from appendix.weights import largest_prompt_image, note_on_tiny
from model import is_tiny
from zoom_rollout import RolloutConfig

# Said after Ctrl-C, and after an error of the disk.
SAVED = "the episodes so far are kept: the same command goes on from there"
# Zoom mode: the label of its run.
MODES = {"on": "zoom allowed", "off": "zoom forbidden", "black": "crops painted black",
         "wrong": "crops of another object"}
# Prompt style: the reward recipe (rewards.RECIPES) that scores its episodes.
STYLE_RECIPES = {"zoom": "vigorl-zoom", "think": "vigorl", "boxes": "univg-r1"}


@dataclass
class Config:
    model: str = "tiny"         # name of a model (model.MODELS) or checkpoint folder
    checkpoint: str = ""        # checkpoint folder, in place of --model
    seed: int = 0               # random seed for scenes, order of options and sampling
    plain: bool = False         # plain KV cache, no behaviour counts, no report page

    # the questions
    task: Literal[data.TASKS] = "search"                # toy task
    difficulty: Literal[data.DIFFICULTIES] = "medium"   # difficulty of the toy scenes
    data: str = ""              # JSONL file of questions, in place of the toy world
    images: str = ""            # image folder of --data; empty: the folder of the file
    n: int = 0                  # number of questions; 0: 200 toy scenes, or all of --data
    shuffle: bool = True        # options of --data in a random order (drawn from --seed)
    circular: bool = False      # one question per rotation of the options
    samples: int = 1            # episodes per question; above 1: pass@k for k = 1, 2, 4, ...

    # the episodes
    zoom: Literal[*MODES, "all"] = "on"                 # zoom mode, see evaluate.MODES
    style: Literal["", "zoom", "think", "boxes"] = ""   # prompt style; empty: chosen to fit
    crop_from: Literal["source", "seen"] = "source"     # source of crops: stored image or fed copy
    temperature: float = 0.0    # sampling temperature; 0: greedy
    max_zooms: int = 3          # crops per episode, after which an answer is forced
    template: bool = False      # first turn opened with a tool call, as in train_rl.py --template
    max_new_tokens: int = 64    # tokens per turn; 512 for a released model
    max_pixels: int = 0         # pixels of a prompt image as fed; 0: the model's default
    batch: int = 64             # episodes at a time, halved when GPU memory runs out

    # answers that exist already
    predictions: str = ""       # file of answers, such as {"id", "text"}; replaces a model's
    form: Literal[evaluation_run.FORMS] = "id"          # layout of that file
    answers: Literal[evaluation_run.ANSWERS] = "plain"  # spelling of points in its texts
    convention: Literal[evaluation_run.UNITS] = "source"    # unit of coordinates in its texts
    compare: str = ""           # two folders, A B, as written by --out; compared by question

    # the output
    drawn: int = 500            # episodes per section of the report page, at most
    fresh: bool = False         # permission to overwrite results of other settings in --out
    out: str = "runs/evaluate"  # folder of this run: its summary, episodes and report


# --------------------------------------------------------------------------------------------------
# intervals

def wilson(correct, n, z=1.96):
    """The 95 % interval of a share, `correct` of n -> (low, high), both in [0, 1].

    Wilson 1927, JASA 22, p. 209. With p the share and s = z^2 / n it is

        (p + s/2 +- sqrt(s (p (1 - p) + s/4))) / (1 + s).

    Unlike p +- z sqrt(p (1 - p) / n) it stays inside [0, 1], and at 0 % and 100 % it keeps a width:
    ten right of ten means "at least 72 %". Of no questions nothing is known: (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    s = z * z / n
    center = (p + s / 2) / (1 + s)
    half = math.sqrt(s * (p * (1 - p) + s / 4)) / (1 + s)
    return max(0.0, center - half), min(1.0, center + half)


def paired(a, b, z=1.96):
    """Compare runs A and B over the same questions, {id: right or not} each -> {name: number}.

    difference: accuracy of B minus that of A. low, high: its 95 % interval (Bonett and Price 2012).
    The interval is computed as if there were two more questions, one that only A gets right and one
    that only B does; so its width is never 0. p: see `mcnemar`.
    """
    ids = [i for i in a if i in b]
    n = len(ids)
    both = sum(a[i] and b[i] for i in ids)
    only_a = sum(a[i] for i in ids) - both
    only_b = sum(b[i] for i in ids) - both
    # The shares that only A and only B get right, the two extra questions included.
    share_a = (only_a + 1) / (n + 2)
    share_b = (only_b + 1) / (n + 2)
    center = share_b - share_a
    half = z * math.sqrt((share_a + share_b - center ** 2) / (n + 2))
    return {
        "n": n,
        "both": both,                                   # questions that both get right
        "only_a": only_a,
        "only_b": only_b,
        "neither": n - both - only_a - only_b,
        "difference": (only_b - only_a) / max(n, 1),
        "low": max(-1.0, center - half),
        "high": min(1.0, center + half),
        "p": mcnemar(only_a, only_b),
    }


def mcnemar(only_a, only_b):
    """McNemar's exact test, two-sided -> p.

    It looks at the m questions that exactly one run gets right. If the runs are equally good, each
    of the m falls to A or to B like the toss of a coin. p is the probability that m tosses split
    at least as unevenly: 2 * (the sum of "m choose k" for k = 0 ... min(only_a, only_b)) / 2^m.
    """
    m = only_a + only_b
    term = 1                                            # m choose 0
    tail = 1                                            # the sum of the terms so far
    for k in range(min(only_a, only_b)):
        term = term * (m - k) // (k + 1)                # m choose k + 1, an integer: no overflow
        tail += term
    return min(1.0, 2 * tail / 2 ** m)


def pass_at_k(n, c, k):
    """Pass@k: the probability that any of k answers is right, if c of n sampled ones are.

    1 - (n - c choose k) / (n choose k): the share of the sets of k, out of the n, that hold a right
    one. Chen et al. 2021 (2107.03374), eq. 1. It is unbiased; 1 - (1 - c / n)^k is too small.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# --------------------------------------------------------------------------------------------------
# the summary of a run

# The counts that are averaged over episodes. appendix/analysis.py makes all but the zooms.
AVERAGED = ("zooms", "regions", "subgoals", "verification", "backtracking")


def summary_rows(episodes):
    """Episodes -> the rows of `summarise`: one flat dict per episode, ready for JSON.

    Each row has an id, a category (a list), the behaviour counts and the reward components
    (accuracy, wrong_format, ...). Some rows also have
      benchmark: its name
      zooms: number of crops
      saw: did the crops show what the answer depends on (appendix/evidence.py)? Only where the
           policy might zoom, and crops were not black
      of: with --circular, the id of the question, which all its rotations share
      sample_of: with --samples, the same for the samples of a question
    """
    rows = []
    for e in episodes:
        row = {"id": e.sample.id, "category": e.sample.category}
        for key in ("benchmark", "of", "sample_of"):
            if isinstance(e.sample.meta.get(key), str):
                row[key] = e.sample.meta[key]
        if e.ids:                                       # predictions have no tokens and no zooms
            row["zooms"] = sum(turn.crop is not None for turn in e.turns)
            seen = evidence.saw(e)
            if seen is not None and could_see(e):
                row["saw"] = seen
        rows.append(row | e.behaviour | e.reward_components)
    return rows


def could_see(episode):
    """Might an episode zoom, and would its crops show anything? See finish_episode."""
    how = episode.shown_as
    return how.get("zoom_limit", 0) > 0 and how.get("zoom") != "black"


def summarise(rows):
    """The rows of a run -> its summary.

    It holds the numbers of `count`, for all rows and for each category, and some averages.
    """
    benchmark = averages.benchmark_of(rows)
    parts = {}                                          # category: rows
    for r in rows:
        for category in averages.categories_of(r, benchmark):
            parts.setdefault(category, []).append(r)
    summary = count(rows)
    summary["categories"] = {category: count(part) for category, part in parts.items()}
    averaged = averages.benchmark_average(rows) | averages.all_rotations(rows)
    return summary | averaged | pass_at(rows)


def pass_at(rows):
    """With --samples -> {"pass_at": {"1": mean over the questions of pass@1, "2": ..., "4": ...}}

    {} if no question was sampled more than once.
    """
    questions = {}                                      # id: [right or not]
    for r in rows:
        if "sample_of" in r and not r.get("hidden"):
            questions.setdefault(r["sample_of"], []).append(is_right(r, r.get("benchmark")))
    if not questions:
        return {}
    found = {}
    k = 1
    while k <= min(map(len, questions.values())):
        found[str(k)] = mean([pass_at_k(len(hits), sum(hits), k) for hits in questions.values()])
        k *= 2
    return {"pass_at": found}


def count(rows):
    """Rows -> {name: number}. Rows whose right answer is not published (hidden) are left out."""
    scored = [r for r in rows if not r.get("hidden")]
    n = len(scored)
    correct = sum(is_right(r, r.get("benchmark")) for r in scored)
    accuracy = correct / max(n, 1)
    # The interval is that of independent questions. The rotations or samples of a question are not:
    # they share r["of"] or r["sample_of"] and count as one. Other rows are counted by their index.
    questions = len({r.get("of", r.get("sample_of", i)) for i, r in enumerate(scored)})
    low, high = wilson(accuracy * questions, questions)
    found = {"n": n, "correct": correct, "accuracy": accuracy, "low": low, "high": high}
    found["wrong_format"] = int(sum(r["wrong_format"] for r in scored))
    overlaps = [r["iou"] for r in scored if "iou" in r]
    if overlaps:
        found["mean_iou"] = mean(overlaps)
        found["iou_at"] = {t: share_from(float(t), overlaps) for t in ("0.3", "0.5", "0.7")}
    for name in AVERAGED:
        values = [r[name] for r in scored if name in r]
        if values:
            found[name] = mean(values)
    found |= evidence.right_and_saw(scored, is_right)
    # Of all points that the model wrote: the share inside a target box.
    points = sum(r.get("points", 0) for r in scored)
    if points:
        found["points"] = points
        found["pointing"] = sum(r.get("pointed", 0) for r in scored) / points
    if len(rows) > n:
        found["hidden"] = len(rows) - n
    return found


def mean(values):
    return sum(values) / len(values)


def share_from(threshold, overlaps):
    """The share of overlaps that reach a threshold, up to rounding."""
    return mean([overlap >= threshold - 1e-6 for overlap in overlaps])


def summary_of(episodes):
    return summarise(summary_rows(episodes))


# --------------------------------------------------------------------------------------------------
# run a model

@dataclass(frozen=True)
class RunOptions:
    """What run_episodes does besides rolling out."""
    recipe: str = "vigorl-zoom" # reward recipe that scores the episodes
    batch: int = 64             # episodes at a time
    keep: int = 24              # episodes, the first ones, that keep their tokens as text
    save: Callable = None       # function that is called with the episodes of each batch
    numbers: list = None        # index of each sample in the whole data; None: samples are all
    views: list = None          # encoded prompt images of each sample; then episodes keep theirs
    progress: bool = True       # progress bar
    plain: bool = False         # no behaviour counts


def run_episodes(vlm, samples, config, options=RunOptions()):
    """One scored episode per sample -> list[Episode], in order. Each rank does a share of them.

    config: zoom_rollout.RolloutConfig. All samples are numbered (options.numbers). Each
    options.batch of them form a block: with a batch of 64, sample 70 has place 6 in block 1.
    The random numbers of an episode depend only on the seed of its block and on its place there.
    So the number of ranks, a halved batch and a stop in between change no random number.
    """
    share = ranks.shard(len(samples))
    numbers = list(options.numbers or range(len(samples)))[share]
    samples = samples[share]
    views = options.views[share] if options.views else None
    limit = options.batch                               # episodes at a time
    episodes = []
    correct = 0
    no_bar = None if options.progress else True         # None: a bar in a terminal only
    with tqdm(total=len(samples), desc=mode_label(config.zoom, config.style == "zoom"),
              unit=" questions", disable=no_bar) as bar:
        while len(episodes) < len(samples):
            i = len(episodes)                           # the next sample
            block, place = divmod(numbers[i], options.batch)
            # The next rollout: n samples with consecutive numbers, all from the same block.
            n = num_consecutive(numbers[i:], min(limit, options.batch - place))
            block_config = replace(config, seed=config.seed + block * options.batch)
            prompt_views = views[i:i + n] if views else None
            new = roll_out(vlm, samples[i:i + n], block_config, place, prompt_views)
            if new is None:                             # out of memory: try half as many
                limit = n // 2
                continue
            for e in new:
                keep_tokens = len(episodes) < options.keep
                finish_episode(vlm, e, config, options, keep_tokens)
                episodes.append(e)
                correct += right(e)
            if not options.plain:
                from appendix import analysis
                analysis.describe(new)
            if options.save:
                options.save(new)
            bar.update(n)
            bar.set_postfix_str(f"accuracy {correct / len(episodes):.1%}")
    return episodes


def num_consecutive(numbers, limit):
    """How many of the numbers, counted from the first, are consecutive; at most `limit`."""
    n = 1
    while n < min(limit, len(numbers)) and numbers[n] == numbers[0] + n:
        n += 1
    return n


def roll_out(vlm, samples, config, first_sample, views):
    """One episode per sample, or None if GPU memory runs out. With one sample that is an error."""
    try:
        return zoom_rollout.rollout(
            vlm, samples, 1, config, first_sample=first_sample, views=views)
    except torch.cuda.OutOfMemoryError:
        if len(samples) == 1:
            raise
    # Only after `except`: inside it the error still holds the tensors of the failed batch.
    torch.cuda.empty_cache()
    return None


def finish_episode(vlm, e, config, options, keep_tokens):
    """Score an episode, store what the report shows of it, and drop its large encoded images."""
    e.reward_components = rewards.score(
        e.sample, e.text, e.turns, options.recipe, e.frames, config.max_zooms)
    e.shown_as = {"zoom": config.zoom, "zoom_limit": config.zoom_limit,
                  "crop_from": config.crop_from, "fed": e.views[0].fed}
    if keep_tokens:
        e.token_texts = token_texts(vlm, e)
    if not options.views:
        e.views = []


# --------------------------------------------------------------------------------------------------
# the episodes that are asked for

def mode_label(mode, can_zoom):
    """How tables call a mode. can_zoom: does the prompt have the zoom tool?"""
    return MODES[mode] if can_zoom else "one turn"


def run_modes(cfg, samples):
    """The samples in each mode of --zoom -> {label: list[Episode]}. Saved episodes are reused."""
    modes = [cfg.zoom]
    if cfg.zoom == "all":                               # only the style "zoom" has a zoom tool
        modes = list(MODES) if cfg.style == "zoom" else ["on"]
    file = evaluation_run.EpisodeFile(cfg)
    numbers = {zoom: file.missing(MODES[zoom], samples) for zoom in modes}
    asked = sorted({i for left in numbers.values() for i in left})
    vlm = load_model(cfg, [samples[i] for i in asked]) if asked else None
    runs = {}
    for zoom in modes:
        label = MODES[zoom]
        left = [samples[i] for i in numbers[zoom]]
        new = []
        if left:
            config = replace(run.pick_fields(cfg, RolloutConfig), zoom=zoom)
            options = RunOptions(
                recipe=STYLE_RECIPES[cfg.style], batch=cfg.batch, numbers=numbers[zoom],
                keep=cfg.drawn - (len(samples) - len(left)), plain=cfg.plain,
                save=partial(file.add, label))
            with evaluation_run.said_on_error(SAVED):
                new = run_episodes(vlm, left, config, options)
        runs[label] = file.collect(label, new, samples)
    return runs


def load_model(cfg, samples):
    """Read all images, so that a broken one ends the program before the work; load the model."""
    sizes = faults.check_samples(samples)               # of the images
    name = cfg.checkpoint or cfg.model
    note_on_tiny(name, samples, "evaluate.py")
    vlm = prefix.load_vlm(name, plain=cfg.plain, max_pixels=largest_prompt_image(name, cfg))
    evaluation_run.print_memory(vlm, cfg, samples, sizes)
    return vlm


def run_predictions(cfg, samples):
    """Score the answers of --predictions -> {"predictions": list[Episode]}."""
    from appendix import predictions
    episodes = predictions.predicted_episodes(cfg, samples)
    if not cfg.plain:
        from appendix import analysis
        analysis.describe(episodes)
    file = evaluation_run.EpisodeFile(cfg)              # refuses to overwrite a model's answers
    file.overwrite("predictions", episodes)
    return {"predictions": episodes}


# --------------------------------------------------------------------------------------------------
# the results

def summarise_runs(runs):
    """{label: episodes} -> (the content of summary.json, {label: summary of that run})

    summary.json holds the summary of the first run, and the zoom controls if there are more runs.
    """
    summaries = {label: summary_of(episodes) for label, episodes in runs.items()}
    first = next(iter(runs))
    summary = dict(summaries[first])
    samples = [e.sample for e in runs[first]]
    if all(s.answer_type == "choice" for s in samples):
        summary["chance"] = averages.chance(samples)    # accuracy without looking at the image
    if len(runs) > 1:
        summary |= zoom_controls(runs, summaries)
    return summary, summaries


def zoom_controls(runs, summaries):
    """Compare the run with zooms to those of the other modes.

    zoom_gain: share of questions that are right with zooms, wrong without. zoom_harm: the reverse.
    """
    hits = {}                                           # zoom mode: {id: right or not}
    for zoom, label in MODES.items():
        hits[zoom] = {e.sample.id: right(e) for e in runs[label] if verdict(e)}
    on = hits.pop("on")
    comparisons = {zoom: paired(without, on) for zoom, without in hits.items()}
    n = max(summaries[MODES["on"]]["n"], 1)
    return {
        "modes": {zoom: summaries[label] for zoom, label in MODES.items()},
        "paired": comparisons,
        "zoom_gain": comparisons["off"]["only_b"] / n,
        "zoom_harm": comparisons["off"]["only_a"] / n,
    }


def compare_runs(a, b, out):
    """Compare the runs in two folders with `paired`: print the numbers, write compare.json."""
    hits_a, hits_b = evaluation_run.shared_verdicts(a, b)
    found = {"a": a, "b": b, **paired(hits_a, hits_b)}
    interval_a = wilson(sum(hits_a.values()), found["n"])
    interval_b = wilson(sum(hits_b.values()), found["n"])
    evaluation_run.print_comparison(found, interval_a, interval_b)
    run.write_json(os.path.join(run.make_dir(out), "compare.json"), found)
    return found


# --------------------------------------------------------------------------------------------------
# the program

def evaluate(cfg):
    """Do what the flags ask for -> the content of summary.json, or of compare.json."""
    evaluation_run.check_flags(cfg)
    if cfg.compare:
        a, b = cfg.compare.split(evaluation_run.BETWEEN_FOLDERS)
        return compare_runs(a, b, cfg.out)

    samples, title = evaluation_run.load_samples(cfg)
    cfg = replace(cfg, style=evaluation_run.style_of(cfg, samples))
    run.lock(run.make_dir(cfg.out))                     # an error here comes before the long work
    runs = run_predictions(cfg, samples) if cfg.predictions else run_modes(cfg, samples)
    summary, summaries = summarise_runs(runs)
    if ranks.rank() == 0:
        run.write_json(os.path.join(cfg.out, "summary.json"), summary)
        evaluation_run.show(cfg, title, runs, summary, summaries)
    return summary


def presets(cfg):
    """Defaults that depend on the model: a released one needs more tokens than the tiny one."""
    return {} if is_tiny(cfg.checkpoint or cfg.model) else {"max_new_tokens": 512}


def main(argv=None):
    argv = evaluation_run.join_folders(sys.argv[1:] if argv is None else argv)
    ranks.start()
    with run.exit_on_error(out_of_memory=evaluation_run.KNOBS,
                           interrupted=f"interrupted; {SAVED}", saved=SAVED):
        return evaluate(run.parse_config(Config, argv, __doc__, presets=presets))


if __name__ == "__main__":
    main()
