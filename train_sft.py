"""The warm start: find traces, turn them into episodes, fine-tune on them.

    python train_sft.py                         # traces by tree search -> runs/sft/checkpoint
    python train_sft.py --show 3                # search, print three traces, draw the trees
    python train_sft.py --traces oracle         # traces from the ground truth of the toy world
    python train_sft.py --traces traces.jsonl --data questions.jsonl --model qwen2.5-vl-3b
    python train_sft.py --traces teacher --teacher http://127.0.0.1:8000/v1 --data questions.jsonl
    python train_sft.py --plain --traces oracle # the chapters alone: plain log-probabilities

RL can only reward what the policy sometimes does, so both papers begin with supervised fine-tuning
on traces in the right form. A trace is the list of the assistant's turns, in a file one object
{"id", "turns"} per line. `zoom_rollout.replay` turns it into the very episode that a rollout would
have made, crops included, and the loss is on the assistant's tokens only. Traces come from a file,
from the toy world's `oracle` (a bad example on purpose), from tree search (ViGoRL: no teacher, and
no truth but the answers; appendix/tree_search.py), from a `path` per question without a search, or
from a teacher that is shown the answer (UniVG-R1; appendix/teacher.py).

Left out: packing of unrelated traces into one row (a batch is split into parts of limited size).

Shapes:  B episodes of a micro-batch   T tokens
"""
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import appendix                     # before torch: Ctrl-C is one line from here on
import torch
from tqdm import tqdm

import data
import rewards
import zoom_rollout
from appendix import evidence, faults, files, memory, mixture, prefix, ranks, run
from appendix.optimizer import AdamW
from appendix.split import hold_out
from appendix.weights import largest_prompt_image, note_on_tiny
from model import is_tiny
from zoom_rollout import RolloutConfig, Trace


@dataclass
class Config:
    model: str = "tiny"         # name of a model (model.MODELS) or checkpoint folder
    name: str = "sft"           # name of the run; its folder is runs/NAME
    fresh: bool = False         # permission to overwrite an earlier run of this name
    seed: int = 0               # random seed for scenes, traces and their order
    plain: bool = False         # plain log-probabilities; no tree search
    show: int = 0               # traces to print in place of fine-tuning; 0: fine-tune
    preset: Literal["", "vigorl"] = ""                  # settings of the original search

    # the questions
    task: Literal[data.TASKS] = "search"                # toy task
    also: Literal["", *data.TASKS] = ""                 # toy task of every second question
    difficulty: Literal[data.DIFFICULTIES] = "medium"   # difficulty of the toy scenes
    recipe: Literal["", *data.PROMPT_STYLES] = ""       # recipe of the prompt; empty: by task
    data: str = ""              # JSONL file of questions, in place of the toy world
    images: str = ""            # image folder of --data (default: the folder of the file)
    max_pixels: int = 0         # pixels of a prompt image as fed; 0: the model's default

    # the traces
    traces: str = "mcts"        # source: "mcts", "path", "oracle", "teacher" or a JSONL file
    n: int = 30                 # traces from the toy world (boxes: 1200)
    target: Literal["full", "answer", "ungrounded"] = "full"    # learned part: trace_tools.retarget
    max_zooms: int = 3          # crops per episode

    # the fine-tuning
    epochs: int = 1             # passes over the traces
    batch: int = 8              # traces per optimizer step
    lr: float = 5e-4            # peak learning rate (3B: ViGoRL 1e-6, UniVG-R1 5e-6)
    micro_tokens: int = 4096    # tokens per forward and backward pass; no effect on the gradient
    recompute: bool = False     # recomputed layers in the backward pass: less memory, more time
    offload: bool = False       # optimizer state on the CPU: 12 bytes per parameter less on the GPU

    # the tree search (--traces mcts)
    simulations: int = 4        # simulations per tree: select, expand, play out, back up
    children: int = 3           # next steps tried from a node
    tries: int = 2              # rounds of sampling until there are so many different ones
    rollouts: int = 1           # rollouts from each new child to an answer
    depth: int = 3              # steps of a path, after which it must answer
    rollout_steps: int = 3      # steps of a rollout, after which it must answer
    exploration: float = 1.0    # c of UCT
    min_distance: float = 10.0  # distance from every earlier point that makes a step a new one
    temperature: float = 1.0    # sampling temperature of the search and of a teacher
    max_new_tokens: int = 48    # tokens per step
    crops: bool = True          # crops shown during the search (the original searches without)
    direct: int = 1             # direct chains per tree, at most
    corrected: int = 0          # chains per tree, at most, that go wrong first (see the README)
    recovery: str = "Not this." # text between the wrong and the right part of a corrected chain
    repeat_prefix: bool = False # restart of a corrected chain at the question (as in the original)
    reorder: float = 0.0        # share of zoom traces whose first call moves to a later place
    trees: int = 64             # trees per batch

    # the teacher (--traces teacher)
    teacher: str = ""           # model, checkpoint or http://HOST:PORT/v1; empty: the policy itself
    teacher_model: str = ""     # name of the endpoint's model; empty: its first
    chains: int = 3             # chains of thought per question, of which the best is kept
    teacher_tokens: int = 1024  # tokens of a reply, at most
    timeout: float = 120.0      # seconds that an endpoint may take to reply
    retries: int = 4            # further attempts after a request that failed


# Fields that must be above 0.
POSITIVE = ("n", "epochs", "batch", "micro_tokens", "simulations", "children", "tries", "rollouts",
            "rollout_steps", "max_new_tokens", "trees", "chains", "teacher_tokens", "timeout")
# Defaults of every model that is not tiny.
REAL = dict(traces="oracle", lr=5e-6, max_new_tokens=512, micro_tokens=16384, recompute=True)
# ViGoRL's search, in which a 72B model writes whole sentences. The paper says 20 simulations, the
# code says 8. Its 5 steps of a rollout include the answer; ours do not.
VIGORL = dict(
    simulations=20, children=3, tries=1, rollouts=2, depth=10, rollout_steps=5, exploration=2.0,
    min_distance=1.0, max_new_tokens=512, crops=False, reorder=0.2, direct=10, corrected=10,
    recovery="Wait, this seems off. Let's try something else.")


def presets(cfg):
    """Defaults that depend on the flags."""
    defaults = searchable(cfg)
    if not is_tiny(cfg.model):
        defaults = defaults | REAL
    if cfg.preset == "vigorl":
        defaults = defaults | VIGORL
    return defaults


def recipe_of(cfg):
    """--recipe; if empty, vigorl-zoom for the questions of --data, else that of the toy task."""
    if cfg.recipe:
        return cfg.recipe
    return "vigorl-zoom" if cfg.data else data.TASK_RECIPES[cfg.task]


def searchable(cfg, n="n"):
    """Defaults where there is nothing to search (boxes take one turn). n: name of that field."""
    if data.PROMPT_STYLES[recipe_of(cfg)] == "boxes":
        return {"traces": "oracle", n: 1200}
    return {}


# --------------------------------------------------------------------------------------------------
# find traces

def find_traces(vlm, cfg, style, questions=None, side=data.SIDE, folder="", held_out=()):
    """-> (list[Trace], counts for the summary).

    style: prompt style; questions: list[Sample] in place of the toy world, whose scenes have `side`
    pixels a side; folder: where trees and paid replies are kept, empty: nowhere; held_out: samples
    not to train on; traces about them in a file of traces are left out.
    """
    if cfg.traces == "path":                            # a tree that is one path: the baseline
        cfg = replace(cfg, traces="mcts", simulations=1, children=1, tries=1, rollouts=1)
    if cfg.traces in ("mcts", "teacher") and ranks.world_size() > 1:
        run.fail(f"--traces {cfg.traces} runs in one process: make traces with train_sft.py first "
                 "and share the training with --traces FILE.jsonl")
    if cfg.traces == "mcts":
        from appendix import tree_search
        log = os.path.join(folder, "trees.jsonl") if folder else ""
        return tree_search.search_traces(vlm, cfg, style, questions, side, log)
    if cfg.traces == "teacher":
        from appendix import teacher
        log = os.path.join(folder, "replies.jsonl") if folder else ""
        return teacher.teacher_traces(vlm, cfg, style, questions, side, log)
    if cfg.traces == "oracle":
        rng = random.Random(f"traces/{cfg.seed}")
        samples = mixture.toy_questions(cfg, "train", cfg.n, f"sft{cfg.seed}", side)
        return [Trace(s, oracle(vlm, s, rng, cfg.max_zooms)) for s in samples], {}
    skip = {s.id for s in held_out}
    return read_traces(cfg.traces, questions, cfg.difficulty, side, skip), {}


GUESSES = 0.5                   # share of the oracle's traces that answer at random


def oracle(vlm, sample, rng, max_zooms=3):
    """A trace for a toy sample from its ground truth -> the assistant's turns.

    Its form is right, its behaviour is not: that is left for RL to find. In every task but `search`
    half of the traces (GUESSES) answer with a random object or option.
    """
    write = ORACLES[sample.category[0]]
    return write(vlm, sample, rng, max_zooms)


def oracle_of_search(vlm, sample, rng, max_zooms):
    """It knows where every object is, but does not look for the right one.

    It zooms into random objects, often stops at a wrong one and reports that one's pattern. One
    trace in four guesses without a zoom.
    """
    objects = sample.meta["scenes"][0]["objects"]       # the first one is asked about
    view = vlm.view(sample.images[0])
    if rng.random() < 0.25 or max_zooms == 0:
        opening = data.FORCE                            # as if no zoom were allowed
        if rng.random() >= 0.7:
            o = objects[0]
            thought = f"The {o['name']} may be at {near(o, view, rng)}."
            opening = f"<think> {thought} </think>\n<answer>"
        return [f"{opening} {rng.choice(sample.options)} </answer>"]

    order = rng.sample(objects, len(objects))[:max_zooms]
    turns = []
    seen = ""                                           # what the last crop showed
    for o in order:
        x, y = near(o, view, rng)
        thought = f"<think>{seen} The {o['name']} may be at ({x}, {y}). </think>"
        turns.append(f"{thought}\n{data.tool_call(x, y)}")
        seen = f" This is the {o['name']}, {o['pattern']}."
        if o is objects[0] or len(turns) == len(order) or rng.random() < 0.6:
            break
    # The answer is about the last crop: o, x, y and seen are those of the last pass of the loop.
    opening = data.FORCE                                # if all zooms are used up
    if len(turns) < max_zooms:                          # seen[:-1]: without its full stop
        opening = f"<think>{seen[:-1]}, at ({x}, {y}). </think>\n<answer>"
    turns.append(f"{opening} {o['pattern']} </answer>")
    return turns


def oracle_of_relation(vlm, sample, rng, max_zooms):
    objects = sample.meta["scenes"][0]["objects"]
    view = vlm.view(sample.images[0])
    a, b = [object_in(e["box"], objects) for e in sample.meta["evidence"]]
    guess = rng.random() < GUESSES
    option = rng.choice(sample.options) if guess else sample.options[sample.answer]
    thought = f"The {a['name']} is at {near(a, view, rng)}. "
    thought += f"The {b['name']} is at {near(b, view, rng)}."
    return [f"<think> {thought} </think>\n<answer> {option} </answer>"]


def oracle_of_point(vlm, sample, rng, max_zooms):
    objects = sample.meta["scenes"][0]["objects"]
    view = vlm.view(sample.images[0])
    o = rng.choice(objects) if rng.random() < GUESSES else objects[0]
    thought = f"The {o['name']} is at {near(o, view, rng)}."
    return [f"<think> {thought} </think>\n<answer> {near(o, view, rng)} </answer>"]


def oracle_of_count(vlm, sample, rng, max_zooms):
    view = vlm.view(sample.images[0])
    objects = sample.meta["scenes"][0]["objects"]
    guess = rng.random() < GUESSES
    option = rng.choice(sample.options) if guess else sample.options[sample.answer]
    counted = [object_in(e["box"], objects) for e in sample.meta["evidence"]]
    thought = " ".join(f"The {o['name']} is at {near(o, view, rng)}." for o in counted)
    return [f"<think> {thought} </think>\n<answer> {option} </answer>"]


def oracle_of_boxes(vlm, sample, rng, max_zooms):
    """Tasks whose answer is a box in one of several images."""
    target = sample.targets[0]
    view = vlm.view(sample.images[target["image"]])
    objects = sample.meta["scenes"][target["image"]]["objects"]
    guess = rng.random() < GUESSES
    o = rng.choice(objects) if guess else object_in(target["box"], objects)
    where = f" image {target['image'] + 1}:" if sample.meta.get("name_image") else ""
    answer = f"{where} {box_text(data.object_box(o), view)}"
    return [f"<think> {o['name']} </think>\n<answer>{answer} </answer>"]


ORACLES = {"search": oracle_of_search, "relation": oracle_of_relation, "point": oracle_of_point,
           "boxes": oracle_of_boxes, "find": oracle_of_boxes, "video": oracle_of_boxes,
           "count": oracle_of_count}


def object_in(box, objects):
    return next(o for o in objects if data.object_box(o) == box)


def box_text(box, view):
    """A box of source pixels, as the model writes it."""
    x1, y1 = view.from_source(*box[:2])
    x2, y2 = view.from_source(*box[2:])
    return f"({x1}, {y1}),({x2}, {y2})"


def near(o, view, rng):
    """A point near the center of an object, as the model writes it -> (x, y)."""
    return view.from_source(*[c + rng.uniform(-0.15, 0.15) * o["radius"] for c in o["center"]])


# --------------------------------------------------------------------------------------------------
# traces in files

def read_traces(path, samples, difficulty="medium", side=data.SIDE, skip=()):
    """Rows {"id", "turns"} -> list[Trace], each matched to its question by id. Raises DataError.

    samples: the questions; None: the ids are those of toy questions, which are drawn again. skip:
    ids of questions whose traces are left out.
    """
    rows = files.read_rows(path)
    if not samples:
        from appendix import trace_tools
        samples = trace_tools.draw_again(rows, difficulty, side)
    by_id = {s.id: s for s in samples}
    traces = []
    for where, row in rows:
        turns = files.need(row, "turns", list, where)
        if not turns or not all(isinstance(turn, str) for turn in turns):
            raise files.DataError(f"{where}field 'turns' is {turns!r:.60}; expected the "
                                  "assistant's turns as a list of strings")
        if str(row.get("id")) in skip:
            continue
        sample = by_id.get(str(row.get("id")))
        if sample is None:
            raise files.DataError(f"{where}id {row.get('id')!r} is no row of the questions")
        if row.get("question", sample.question) != sample.question:
            raise files.DataError(
                f"{where}asks {row['question']!r:.60}, but {sample.id} is {sample.question!r:.60} "
                "(another difficulty, or another model's image size?)")
        traces.append(Trace(sample, turns))
    if not traces:
        raise files.DataError(f"{path} holds no traces about the {len(by_id)} questions that are "
                              "trained on")
    return traces


# --------------------------------------------------------------------------------------------------
# fine-tune

def warm_start(vlm, cfg, style, questions=None, side=data.SIDE, held_out=()):
    """Find traces and fine-tune on them, in place -> (the loss of each step, list[Trace])."""
    traces, _ = find_traces(vlm, cfg, style, questions, side, held_out=held_out)
    traces = learned_parts(traces, cfg.target)
    return finetune(vlm, replay_all(vlm, traces, style, cfg.max_zooms), cfg), traces


def learned_parts(traces, target):
    """The traces, or the part of each that --target names."""
    if target == "full":
        return traces
    from appendix import trace_tools
    return [trace_tools.retarget(trace, target) for trace in traces]


def finetune(vlm, episodes, cfg, progress=True):
    """Cross-entropy on the assistant's tokens -> the loss of each step.

    Each rank takes its share of every batch. progress: show a bar.
    """
    # The first gradients are huge, because this form of text is new to the model. AdamW divides by
    # a running mean of their squares. With beta2 = 0.95 it forgets the first ones in about 20
    # steps; with 0.999 it would need more steps than this run has.
    optimizer = AdamW(vlm.parameters(), cfg.lr, betas=(0.9, 0.95), offload=cfg.offload)
    rng = random.Random(cfg.seed)
    steps = cfg.epochs * math.ceil(len(episodes) / cfg.batch)
    losses = []
    no_bar = None if progress else True                 # None: a bar in a terminal only
    with tqdm(total=steps, desc="warm start", disable=no_bar, leave=False) as bar:
        for _ in range(cfg.epochs):
            order = rng.sample(episodes, len(episodes))
            for first in range(0, len(order), cfg.batch):
                batch = order[first:first + cfg.batch]
                loss = backward(vlm, batch, cfg.micro_tokens)
                optimizer.step(cfg.lr * schedule(len(losses), steps))
                losses.append(ranks.all_reduce([loss])[0])
                for e in batch:
                    for view in e.views:                # features of all traces would not fit
                        view.drop_features()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
    return losses


def backward(vlm, batch, micro_tokens):
    """Add the gradient of the mean loss per token of the batch -> this rank's part of the loss."""
    # Tokens of the whole batch, so that the sum over ranks and micro-batches is the mean.
    tokens = sum(sum(e.completion_mask) for e in batch)
    share = batch[ranks.shard(len(batch))]
    total = 0.0
    for micro_batch in vlm.micro_batches(share, micro_tokens):
        logprobs, _, _ = vlm.logprobs(micro_batch)                              # (B, T)
        (-logprobs.sum() / tokens).backward()
        total -= logprobs.sum().item() / tokens
    return total


def schedule(step, steps):
    """Factor on the peak learning rate: 10 % linear warm-up, then a cosine to 0."""
    warm_up = (step + 1) / (0.1 * steps + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(warm_up, cosine)


# --------------------------------------------------------------------------------------------------
# measure

@torch.no_grad()
def held_out_loss(vlm, episodes, micro_tokens=4096):
    """Mean cross-entropy per token of the assistant."""
    total = 0.0
    tokens = 0
    for micro_batch in vlm.micro_batches(episodes, micro_tokens):
        logprobs, _, mask = vlm.logprobs(micro_batch)                           # (B, T)
        total -= logprobs.sum().item()
        tokens += mask.sum().item()
    return total / tokens


@torch.no_grad()
def held_out_accuracy(vlm, samples, style, cfg):
    """The share of greedy answers that are right."""
    config = RolloutConfig(style=style, max_zooms=cfg.max_zooms, temperature=0.0,
                           max_new_tokens=cfg.max_new_tokens)
    right = 0
    for first in range(0, len(samples), 64):
        for e in zoom_rollout.rollout(vlm, samples[first:first + 64], config=config):
            components = rewards.score(e.sample, e.text, e.turns, "accuracy", e.frames)
            right += components["accuracy"] >= 1 - rewards.EPS
    return right / len(samples)


# --------------------------------------------------------------------------------------------------
# the run

def main():
    began = time.time()
    ranks.start()
    cfg = run.parse_config(Config, description=__doc__, presets=presets, positive=POSITIVE)
    folder = run.make_dir(os.path.join("runs", cfg.name))
    run.lock(folder)
    run.refuse_to_overwrite(folder, ("checkpoint", "summary.json"), cfg.fresh)
    if cfg.data and cfg.traces == "oracle":
        run.fail("the oracle knows the toy world only: --data needs --traces mcts, teacher or "
                 "FILE.jsonl")
    rows = data.read_jsonl(cfg.data, cfg.images or None) if cfg.data else []
    faults.check_samples(rows)
    note_on_tiny(cfg.model, rows, "train_sft.py")
    style = data.PROMPT_STYLES[recipe_of(cfg)]
    max_pixels = largest_prompt_image(cfg.model, cfg)
    vlm = prefix.load_vlm(
        cfg.model, plain=cfg.plain, max_pixels=max_pixels, recompute=cfg.recompute)
    held_out_rows, rows = hold_out(rows, max(len(rows) // 20, 1), cfg.seed)
    config = {**asdict(cfg), "held_out": [s.id for s in held_out_rows]}
    run.write_json(os.path.join(folder, "config.json"), config)

    # 1. traces
    traces, counts = find_traces(vlm, cfg, style, rows, vlm.toy_side, folder, held_out_rows)
    traces = learned_parts(traces, cfg.target)
    write_traces(os.path.join(folder, "traces.jsonl"), traces)
    if cfg.traces == "mcts":
        from appendix import trace_tools
        trace_tools.draw_trees(vlm, folder, traces, counts, cfg)
    if cfg.show:
        from appendix import trace_tools
        trace_tools.show_traces(traces[:cfg.show])
        return

    # 2. episodes
    held_out_traces = []
    if not rows:
        traces, held_out_traces = hold_out_traces(traces)
    learned = replay_all(vlm, traces, style, cfg.max_zooms)
    held_out = replay_all(vlm, held_out_traces, style, cfg.max_zooms)

    # 3. fine-tune
    losses = finetune(vlm, learned, cfg)
    if ranks.rank() > 0:
        return
    checkpoint = os.path.join(folder, "checkpoint")
    run.replace_folder(vlm.save(checkpoint), checkpoint)

    # 4. measure
    summary = {"traces": len(learned) + len(held_out), "loss_first": losses[0],
               "loss_last": losses[-1], "saw": evidence.share_that_saw(learned), **counts}
    if held_out:
        summary["held_out_loss"] = held_out_loss(vlm, held_out)
    asked = held_out_rows
    if not rows:
        asked = mixture.toy_questions(cfg, "test", 64, cfg.seed, vlm.toy_side)
    if asked:
        summary["held_out_accuracy"] = held_out_accuracy(vlm, asked, style, cfg)
    summary["seconds"] = round(time.time() - began, 1)
    known = {name: value for name, value in summary.items() if value is not None}
    run.write_json(os.path.join(folder, "summary.json"), known)
    print(f"{summary}\n{checkpoint} is ready: python evaluate.py --model {checkpoint}")


def write_traces(path, traces):
    """Rows that `read_traces` reads again, with what a person wants to know."""
    rows = []
    for trace in traces:
        row = {"id": trace.sample.id, "question": trace.sample.question,
               "options": trace.sample.options}
        if trace.kind:
            row["kind"] = trace.kind
        row["turns"] = trace.turns
        rows.append(json.dumps(row) + "\n")
    run.write_text(path, "".join(rows))


def hold_out_traces(traces):
    """-> (traces to learn, held-out traces: those about the last twentieth of the toy questions).

    At least one question is held out, unless there is only one.
    """
    ids = list(dict.fromkeys(trace.sample.id for trace in traces))
    n = max(len(ids) // 20, 1) if len(ids) > 1 else 0
    last = set(ids[len(ids) - n:])
    learned = [trace for trace in traces if trace.sample.id not in last]
    return learned, [trace for trace in traces if trace.sample.id in last]


def replay_all(vlm, traces, style, max_zooms):
    """list[Trace] -> list[Episode]"""
    return [zoom_rollout.replay(vlm, t.sample, t.turns, style, max_zooms) for t in traces]


if __name__ == "__main__":
    KNOBS = (f"{memory.KNOBS['activations']}; of a search, a smaller --trees; "
             f"{memory.KNOBS['optimizer']}; a smaller model")
    SAVED = "finished trees and paid replies are kept: the same command continues from there"
    with run.exit_on_error(out_of_memory=KNOBS, interrupted=f"interrupted; {SAVED}", saved=SAVED):
        main()
