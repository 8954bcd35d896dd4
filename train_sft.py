"""The warm start: find traces, fine-tune on them. And, for the tiny model, the eyes that come before.

    python train_sft.py                       # fine-tune the tiny model on traces of the toy world -> runs/sft/checkpoint
    python train_sft.py --traces traces.jsonl --data questions.jsonl --model qwen2.5-vl-3b
    python train_sft.py --pretrain            # make checkpoints/tiny again from nothing

RL can only reward what the policy sometimes does, so both papers begin with supervised fine-tuning on traces in the right
form. Here a trace is the list of the assistant's turns, {"id": ..., "turns": [...]}, one JSON object a line, whoever wrote
them; `zoom_rollout.replay` turns it into the very episode that a rollout would have made, crops and all, and the loss falls
on the assistant's tokens only.

Left out so far: ViGoRL finds its traces by tree search with a 72B teacher, UniVG-R1 has a teacher write three chains per
sample. `oracle` stands in for both: it knows the toy scene, and it is a bad example on purpose (see there).
"""
import json, math, os, random, re, time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from tqdm import tqdm

import data, model, rewards, zoom_rollout
from data import Sample
from zoom_rollout import Episode


@dataclass
class Config:
    model: str = "tiny"             # a name of model.MODELS or a checkpoint folder
    name: str = "sft"               # the run: runs/NAME
    traces: str = "oracle"          # "oracle" (toy world), or a JSONL file of {"id", "turns"} for the rows of --data
    task: Literal[data.TASKS] = "search"        # toy task
    difficulty: Literal[tuple(data.DIFFICULTY)] = "medium"      # of the toy world
    data: str = ""                  # JSONL of questions instead of the toy world
    images: str = ""                # folder of the images of --data (default: the file's own)
    recipe: Literal["", "vigorl-zoom", "vigorl", "univg-r1"] = ""       # whose prompt; empty: what suits the task
    n: int = 1200                   # traces from the oracle
    epochs: int = 1                 # passes over the traces
    batch: int = 8                  # traces per optimizer step
    lr: float = 5e-4                # peak learning rate, cosine with warm-up (ViGoRL on a 3B: 1e-6, UniVG-R1: 5e-6)
    max_zooms: int = 3              # crops per episode
    max_pixels: int = 0             # of a prompt image as fed; 0: the model's default
    seed: int = 0                   # of scenes, traces and order
    pretrain: bool = False          # make the tiny model from nothing instead: --steps, --out
    steps: int = 16_000             # of pretraining
    out: str = ""                   # of pretraining (default: checkpoints/tiny)


# ----------------------------------------------------------------------------------------------------------------------
# Traces

def oracle(vlm, sample, rng, max_zooms=3):
    """A trace for a toy sample from its ground truth -> the assistant's turns. For `search` it knows every object but not
    what looking is for: it goes to a random object, often stops at a wrong one and reports that one's pattern, and now and
    then guesses at once, or because it was forced to. The form is right, the behavior is not: that is left for RL to find.
    In the other tasks one trace in three is about a random object."""
    scene, view = sample.meta["scenes"][0], vlm.view(sample.images[0])
    objects = scene["objects"]

    def near(o, view=view):
        x, y = (c + rng.uniform(-0.15, 0.15) * o["radius"] for c in o["center"])
        return view.from_source(x, y)

    if sample.category == ["search"]:
        if rng.random() < 0.25 or max_zooms == 0:
            thought = data.FORCE if rng.random() < 0.7 else f"<think> The {objects[0]['name']} may be at {near(objects[0])}. </think>\n<answer>"
            return [f"{thought} {rng.choice(sample.options)} </answer>"]
        turns, order, before = [], rng.sample(objects, len(objects)), ""   # `before`: what the last crop showed
        for k, o in enumerate(order[:max_zooms]):
            x, y = near(o)
            turns.append(f"<think>{before} The {o['name']} may be at ({x}, {y}). </think>\n{data.tool_call(x, y)}")
            before = f" This is the {o['name']}, {o['pattern']}."
            if o is objects[0] or k + 1 == min(max_zooms, len(order)) or rng.random() < 0.6:
                break
        if len(turns) == max_zooms:
            return turns + [f"{data.FORCE} {o['pattern']} </answer>"]
        return turns + [f"<think>{before[:-1]}, at ({x}, {y}). </think>\n<answer> {o['pattern']} </answer>"]
    if sample.category == ["boxes"]:
        t = sample.targets[0]
        view = vlm.view(sample.images[t["image"]])
        others = sample.meta["scenes"][t["image"]]["objects"]
        o = rng.choice(others) if rng.random() < 0.33 else next(o for o in others if data.object_box(o) == t["box"])
        return [f"<think> The {o['name']} is at {near(o, view)}. </think>\n<answer>{corners(view, data.object_box(o))}</answer>"]
    if sample.category == ["relation"]:
        a, b = (next(o for o in objects if data.object_box(o) == e["box"]) for e in sample.meta["evidence"])
        option = rng.choice(sample.options) if rng.random() < 0.33 else sample.options[sample.answer]
        return [f"<think> The {a['name']} is at {near(a)}. The {b['name']} is at {near(b)}. </think>\n<answer> {option} </answer>"]
    o = rng.choice(objects) if rng.random() < 0.33 else objects[0]
    return [f"<think> The {o['name']} is at {near(o)}. </think>\n<answer> {near(o)} </answer>"]


def read_traces(path, samples):
    """Trace rows -> [(sample, turns)], each matched to its question by id."""
    by_id, out = {s.id: s for s in samples}, []
    for where, row in data.rows_of(path):
        turns = data.need(row, "turns", list, where)
        if not turns or not all(isinstance(t, str) for t in turns):
            raise data.DataError(f"{where}field 'turns' is {turns!r:.60}; expected the assistant's turns as a list of strings")
        if str(row.get("id")) not in by_id:
            raise data.DataError(f"{where}id {row.get('id')!r} is no row of the questions")
        out.append((by_id[str(row["id"])], turns))
    if not out:
        raise data.DataError(f"{path} holds no traces")
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning

def finetune(vlm, episodes, lr, epochs=1, batch=8, seed=0, progress=True):
    """Cross-entropy on the assistant's tokens. -> the loss of each step. AdamW; cosine with 10 % warm-up."""
    # A form never seen before starts with huge gradients; beta2 = 0.95 forgets their size in 20 steps, 0.999 not in this run.
    optimizer, rng, losses = model.AdamW(vlm.parameters(), lr, betas=(0.9, 0.95)), random.Random(seed), []
    steps = epochs * math.ceil(len(episodes) / batch)
    bar = tqdm(total=steps, desc="warm start", disable=None if progress else True, leave=False)
    for _ in range(epochs):
        order = rng.sample(range(len(episodes)), len(episodes))
        for i in range(0, len(order), batch):
            chosen = [episodes[j] for j in order[i:i + batch]]
            tokens = sum(sum(e.sampled) for e in chosen)
            loss = 0.0
            for part in vlm.micro_batches(chosen[model.mine(len(chosen))]):
                logprobs, _, _ = vlm.logprobs(part)
                (-logprobs.sum() / tokens).backward()                      # tokens of the whole batch: micro-batches add up
                loss -= logprobs.sum().item() / tokens
            step = len(losses)
            optimizer.step(lr * min((step + 1) / (0.1 * steps + 1), 0.5 * (1 + math.cos(math.pi * step / steps))))
            losses.append(model.total(loss)[0])
            bar.update(), bar.set_postfix(loss=f"{loss:.3f}")
    bar.close()
    return losses


@torch.no_grad()
def held_out_loss(vlm, episodes):
    parts = [vlm.logprobs(part) for part in vlm.micro_batches(episodes)]
    return -sum(p[0].sum().item() for p in parts) / sum(p[2].sum().item() for p in parts)


def warm_start(vlm, style, traces="oracle", task="search", questions=None, n=1200, epochs=1, batch=8, lr=5e-4, difficulty="medium",
               max_zooms=3, side=data.SIDE, seed=0):
    """Find traces, fine-tune on them (in place). -> (the loss of each step, the traces [(sample, turns)])."""
    rng = random.Random(f"traces/{seed}")
    if traces == "oracle":
        pairs = [(s, oracle(vlm, s, rng, max_zooms)) for s in data.toy(task, "train", n, f"sft{seed}", difficulty, side)]
    else:
        pairs = read_traces(traces, questions)
    return finetune(vlm, [zoom_rollout.replay(vlm, s, turns, style, max_zooms) for s, turns in pairs], lr, epochs, batch, seed), pairs


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining. Pointing alone hardly teaches a small model to look: the name it must say stands in the prompt. A mixture in
# which the image must be read to predict the text does. So a lesson is a chat about one scene: list what is there, name
# what is at a point, point to, box, compare, and say what a crop shows. Then come drills in the protocol's form, told
# where to zoom. Where to zoom for a question, when, and when to answer is left for the warm start and RL.

def at(view, o):
    x, y = view.from_source(*o["center"])
    return f"({x}, {y})"


def corners(view, box):
    x1, y1, x2, y2 = (*view.from_source(*box[:2]), *view.from_source(*box[2:]))
    return f"({x1}, {y1}),({x2}, {y2})"


def show(vlm, rng, view, objects):
    """A crop as a rollout would make it, mostly of an object, off center -> (crop view, what it shows)."""
    x, y = (rng.randrange(side) for side in view.source.size)
    if rng.random() < 0.15 and all(math.hypot(x - o["center"][0], y - o["center"][1]) > 1.8 * o["radius"] for o in objects):
        return zoom_rollout.crop(vlm, view, x, y), "nothing"
    o = rng.choice(objects)
    x, y = (c + round(rng.uniform(-0.7, 0.7) * o["radius"]) for c in o["center"])
    return zoom_rollout.crop(vlm, view, x, y), f"{o['name']}, {o['pattern']}"


def lesson(vlm, rng, progress=1.0):
    """-> Episode whose sampled tokens are the teacher's answers. Lessons begin with one or two large objects; crowded scenes
    come in as `progress` goes from 0 to 1."""
    def new_scene(names=None):
        level = "first" if rng.random() > 0.2 + progress else rng.choices(("first", "easy", "medium", "hard"), (2, 3, 4, 1))[0]
        look = dict(objects=(1, 2), radius=(46, 60)) if level == "first" else data.DIFFICULTY[level]
        return data.split_scene(rng, "train", **look, names=names)

    e = Episode(None, [], [], [], [])
    e.say(vlm, vlm.chat("system", data.SYSTEM["boxes"]), sampled=False)

    def ask(answer, *question):
        views = [p for p in question if isinstance(p, model.View)]
        e.say(vlm, vlm.chat("user", *question) + vlm.chat("assistant", open=True), views=views, sampled=False)
        e.say(vlm, vlm.ids(answer) + [vlm.im_end])
        e.say(vlm, vlm.ids("\n"), sampled=False)

    if rng.random() < 0.05:                                                # several images
        scenes, asked = data.ask_boxes(rng, new_scene)
        views = [vlm.view(data.draw(s), i) for i, s in enumerate(scenes)]
        t = asked["targets"][0]
        ask(f"{scenes[0]['objects'][0]['name']} {corners(views[t['image']], t['box'])}", *views, asked["question"])
        return e
    scene = new_scene()
    objects, view = scene["objects"], vlm.view(data.draw(scene))
    left_to_right = sorted(objects, key=lambda o: o["center"][0])

    def point(o):
        return f"Point to the {o['name']}.", f"{o['name']} {at(view, o)}"

    def name(o):
        x, y = view.from_source(*(c + round(rng.uniform(-0.5, 0.5) * o["radius"]) for c in o["center"]))
        return f"What is at ({x}, {y})?", o["name"]

    def box(o):
        return f"Box the {o['name']}.", f"{o['name']} {corners(view, data.object_box(o))}"

    def alike(o):
        word = rng.choice(o["name"].split())
        return f"What is {word}?", ", ".join(f"{p['name']} {at(view, p)}" for p in left_to_right if word in p["name"])

    def relation(o):
        if len(objects) < 2:
            return name(o)
        _, asked = data.ask_relation(rng, lambda: {**scene, "objects": rng.sample(objects, len(objects))})
        a, b = ([p for p in objects if data.object_box(p) == ev["box"]][0] for ev in asked["meta"]["evidence"])
        text = data.prompt(Sample("", [], **asked))[1]
        return text, f"{a['name']} {at(view, a)}, {b['name']} {at(view, b)}: {asked['options'][asked['answer']]}"

    def everything(o):
        return "List the objects.", ", ".join(f"{o['name']} {at(view, o)}" for o in left_to_right)

    kind = rng.choices([everything, point, name, alike, box, relation, show], weights=[6, 5, 2, 1, 2, 1, 4])[0]
    if kind is show:
        crop, seen = show(vlm, rng, view, objects)
        if rng.random() < 0.5:                                             # as in a rollout: after a look at the whole
            question, said = point(rng.choice(objects))
            ask(said, view, question)
        ask(seen, data.OBSERVE[0], crop, data.OBSERVE[1])
    else:
        question, said = kind(rng.choice(objects))
        ask(said, view, question)
    return e


def drill(vlm, rng):
    """-> Episode in the zoom protocol, told where to zoom: what an instruction-tuned model brings along (it can write a tool
    call, read what comes back, and pick an option when it must answer), but not what a question calls for."""
    scene = data.split_scene(rng, "train", **data.DIFFICULTY[rng.choice(("easy", "medium", "medium"))])
    image = data.draw(scene)
    view, chosen, forced = vlm.view(image), rng.sample(scene["objects"], rng.randint(1, 2)), rng.random() < 0.2
    options = rng.sample(list(data.PATTERNS), len(data.PATTERNS))
    spots = [view.from_source(*(c + rng.uniform(-0.15, 0.15) * o["radius"] for c in o["center"])) for o in chosen]
    where = [f"the {o['name']}" if rng.random() < 0.7 else str(spot) for o, spot in zip(chosen, spots)]
    sample = Sample("", [image], f"Zoom into {', then '.join(where)}.", "choice", options)
    if forced and rng.random() < 0.5:                                      # without a look: any option
        return zoom_rollout.replay(vlm, sample, [f"{data.FORCE} {rng.choice(options)} </answer>"])
    turns, before = [], ""
    for o, (x, y) in zip(chosen, spots):
        turns.append(f"<think>{before} The {o['name']} may be at ({x}, {y}). </think>\n{data.tool_call(x, y)}")
        before = f" This is the {o['name']}, {o['pattern']}."
    opening = data.FORCE if forced else f"<think>{before[:-1]}, at ({x}, {y}). </think>\n<answer>"
    return zoom_rollout.replay(vlm, sample, turns + [f"{opening} {o['pattern']} </answer>"], max_zooms=len(turns) if forced else 3)


class Lessons(torch.utils.data.IterableDataset):
    """An endless stream of batches, drawn in a worker process while the model trains. make(vlm, rng, progress) -> Episode"""

    def __init__(self, vlm, make, seed, batch, ramp):
        self.vlm, self.make, self.seed, self.batch, self.ramp = vlm, make, seed, batch, ramp

    def __iter__(self):
        rng, made = random.Random(self.seed), 0
        torch.set_num_threads(1)
        while True:
            pool = [self.make(self.vlm, rng, min(1.0, made / self.ramp)) for _ in range(4 * self.batch)]
            pool, made = sorted(pool, key=lambda e: len(e.ids)), made + 4                                     # little padding
            batches = [pool[i:i + self.batch] for i in range(0, len(pool), self.batch)]
            for episodes in rng.sample(batches, 4):
                for v in (v for e in episodes for v in e.views):
                    self.vlm.patchify(v)
                    v.source = None
                yield episodes


def drills_and_lessons(vlm, rng, progress):
    return drill(vlm, rng) if rng.random() < 0.6 else lesson(vlm, rng)


def pretrain(out, steps=16_000, seed=0):
    """The tiny model from nothing -> its folder `out`: lessons, then a shorter course of drills among lessons."""
    rng, stub, began = random.Random(seed), model.make_tiny(["a"], data.PHRASES), time.time()
    texts = [stub.text([t for t in lesson(stub, rng).ids if t != stub.image_token]) for _ in range(2000)]
    texts += [" The may be at. Look at. This is nothing, not the. Click the Image 1 shows. It lined barred slanted checked"] * 200   # and the traces' words
    texts += [data.prompt(s)[1] for t in data.TASKS for s in data.toy(t, "train", 30)]
    vlm = model.make_tiny(texts, data.PHRASES, seed)
    vlm.model.requires_grad_(True)                                         # here the vision tower learns too
    learn(vlm, lesson, steps, 1.5e-3, seed)
    model.replace_folder(vlm.save(out), out)                               # a first look need not wait for the drills
    learn(vlm, drills_and_lessons, steps // 8, 8e-4, seed)
    ship(vlm, out, steps, seed, (time.time() - began) / 60)


def learn(vlm, make, steps, lr, seed, batch=24):
    """Next-token loss on the teacher's words; the learning rate goes up, stays, and falls to 0 in the last 30 % of the steps."""
    params, began, log = list(vlm.model.parameters()), time.time(), []
    print(f"{make.__name__}: {sum(p.numel() for p in params) / 1e6:.2f} M parameters, vocabulary {len(vlm.tokenizer)}, {steps} steps")
    # A wide input moves its output a lot per unit of lr: patches have 1176 values, hidden states 128.
    optimizer = model.AdamW(params, lr, betas=(0.9, 0.98), weight_decay=0.01, scale=lambda p: min(1.0, 128 / p[0].numel()) ** 0.5)
    lessons = Lessons(vlm, make, seed, batch, 0.1 * steps)
    stream = iter(torch.utils.data.DataLoader(lessons, batch_size=None, num_workers=1, prefetch_factor=4))
    for step in range(steps):
        episodes = next(stream)
        vlm.encode([v for e in episodes for v in e.views], grad=True)
        logprobs, _, mask = vlm.logprobs(episodes)
        loss = -logprobs.sum() / mask.sum()
        loss.backward()
        optimizer.step(lr * min(1, (step + 1) / 100, (steps - step) / (0.3 * steps)))
        log.append(loss.item())
        if (step + 1) % 100 == 0:
            spent = (time.time() - began) / (step + 1)
            print(f"step {step + 1}/{steps} | loss {sum(log[-100:]) / 100:.4f} | {spent:.3f} s/step | {spent * (steps - step - 1) / 60:.0f} min left", flush=True)


def ship(vlm, out, steps, seed, minutes):
    """Round to bf16 (half the size), measure, and save with a model card."""
    vlm.model.to(torch.bfloat16).to(torch.float32)
    vlm.model.eval()
    measured = skills(vlm)
    vlm.model.to(torch.bfloat16)
    tmp = vlm.save(out, seed=seed, steps=steps, skills=measured)
    with open(os.path.join(tmp, "README.md"), "w") as f:
        f.write(f"""# The tiny VLM

The Qwen2.5-VL architecture with {sum(p.numel() for p in vlm.model.parameters()):,} parameters ({", ".join(f"{k} {v}" for k, v in model.TINY.items())}), bf16, and a
byte-level BPE of {len(vlm.tokenizer)} tokens. Made from nothing, seed {seed}, {steps} steps in {minutes:.0f} minutes on two CPU cores, by

    python train_sft.py --pretrain

What it can do, greedily, on 200 fresh toy scenes each (`train_sft.skills`; no warm start, no tool, plain questions):

{chr(10).join(f"- {skill}: {rate:.1%}" for skill, rate in measured.items())}

It knows nothing but the toy world of `data.py`. It can write a tool call when told where to zoom, and read the crop; it has never seen the search
question, nor been told what zooming is good for.
""")
    model.replace_folder(tmp, out)
    print(measured)


def skills(vlm, n=200, seed=0):
    """What the tiny model can do before any warm start, greedily, on fresh scenes -> dict of rates."""
    rng, ask = random.Random(seed), {"point": [], "read a crop": [], "box": []}
    for s in data.toy("point", "test", n, f"skills{seed}"):
        o, view = s.meta["scenes"][0]["objects"][0], vlm.view(s.images[0])
        crop, seen = show(vlm, rng, view, [o])
        inside = lambda x, y, o=o, view=view: all(abs(a - b) <= o["radius"] for a, b in zip(view.to_source(x, y), o["center"]))
        ask["point"].append(((view, f"Point to the {o['name']}."), lambda said, f=inside: len(p := numbers(said)) == 2 and f(*p)))
        ask["read a crop"].append(((data.OBSERVE[0], crop, data.OBSERVE[1]), lambda said, seen=seen: said == seen))
    for s in data.toy("boxes", "test", n, f"skills{seed}"):
        views, t = [vlm.view(im, i) for i, im in enumerate(s.images)], s.targets[0]
        right = lambda said, v=views[t["image"]], box=t["box"]: len(p := numbers(said)) == 4 and rewards.iou([*v.to_source(*p[:2]), *v.to_source(*p[2:])], box) >= 0.5
        ask["box"].append(((*views, s.question), right))
    return {skill: sum(right(said) for said, (_, right) in zip(answer(vlm, [q for q, _ in pairs]), pairs)) / n for skill, pairs in ask.items()}


def numbers(text):
    return [int(v) for v in re.findall(r"\d+", text)]


def answer(vlm, questions, max_new_tokens=24):
    """Greedy one-turn answers in the lessons' plain chat."""
    cache, views = vlm.new_cache(len(questions)), [p for q in questions for p in q if isinstance(p, model.View)]
    ids = [vlm.chat("system", data.SYSTEM["boxes"]) + vlm.chat("user", *q) + vlm.chat("assistant", open=True) for q in questions]
    logits, starts = vlm.extend(cache, ids, [0] * len(ids), views)
    said, _, _ = zoom_rollout.sample_turn(vlm, cache, logits, starts, torch.zeros(len(ids), max_new_tokens), 0, max_new_tokens)
    return [vlm.text(i[:-1]) for i in said]


def main():
    model.start_ranks()
    cfg = model.cli(Config, description=__doc__, presets=lambda c: {} if model.is_tiny(c.model) else {"lr": 5e-6}, positive=("n", "epochs", "batch", "steps"))
    if cfg.pretrain:
        folder = cfg.out or model.MODELS["tiny"].path
        model.make_dir(os.path.dirname(os.path.abspath(folder)))
        return pretrain(folder, cfg.steps, cfg.seed)
    began, run = time.time(), model.make_dir(os.path.join("runs", cfg.name))
    rows = data.read_jsonl(cfg.data, cfg.images or None) if cfg.data else None
    if bool(rows) != (cfg.traces != "oracle"):
        model.fail("the oracle knows the toy world only: --data needs --traces FILE.jsonl" if rows else
                   f"--traces {cfg.traces} are about the rows of a file: name it with --data FILE.jsonl")
    data.check_images(rows or [])
    recipe = cfg.recipe or ("vigorl-zoom" if cfg.data else data.RECIPES[cfg.task])
    vlm = model.load(cfg.model, max_pixels=cfg.max_pixels)
    model.write_json(os.path.join(run, "config.json"), asdict(cfg))
    losses, pairs = warm_start(vlm, data.STYLES[recipe], cfg.traces, cfg.task, rows, cfg.n, cfg.epochs, cfg.batch, cfg.lr, cfg.difficulty,
                               cfg.max_zooms, vlm.toy_side, cfg.seed)
    if model.rank():
        return
    with open(os.path.join(run, "traces.jsonl"), "w") as f:
        f.writelines(json.dumps({"id": s.id, "question": s.question, "options": s.options, "turns": turns}) + "\n" for s, turns in pairs)
    model.replace_folder(vlm.save(os.path.join(run, "checkpoint")), os.path.join(run, "checkpoint"))
    summary = {"traces": len(pairs), "loss_first": losses[0], "loss_last": losses[-1], "seconds": round(time.time() - began, 1)}
    if not cfg.data:
        rng = random.Random(f"held out/{cfg.seed}")
        test = [(s, oracle(vlm, s, rng, cfg.max_zooms)) for s in data.toy(cfg.task, "test", 64, cfg.seed, cfg.difficulty, vlm.toy_side)]
        summary["held_out_loss"] = held_out_loss(vlm, [zoom_rollout.replay(vlm, s, t, data.STYLES[recipe], cfg.max_zooms) for s, t in test])
    model.write_json(os.path.join(run, "summary.json"), summary)
    print(f"{summary}\n{run}/checkpoint is ready: python evaluate.py --model {run}/checkpoint")


if __name__ == "__main__":
    try:
        main()
    except data.DataError as e:
        model.fail(str(e))
    except KeyboardInterrupt:
        model.fail("interrupted; nothing was saved")
