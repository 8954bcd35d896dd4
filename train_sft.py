"""The warm start: find traces, fine-tune on them. And, for the tiny model, the eyes that come before.

    python train_sft.py                                  # fine-tune the tiny model on traces of the toy world
    python train_sft.py --pretrain                       # make checkpoints/tiny again from nothing
"""
import json, math, os, random, sys, time
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

import data, model, zoom_rollout
from data import Sample
from zoom_rollout import Episode


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining. Pointing alone hardly teaches a small model to look: the name it must say stands in the prompt. A mixture in
# which the image must be read to predict the text does. So a lesson is a chat about one scene: list what is there, name
# what is at a point, point to, box, compare, and say what a crop shows. No lesson zooms, thinks or answers in tags: that
# behavior is the warm start's and RL's to teach.

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


def lesson(vlm, rng):
    """-> Episode whose sampled tokens are the teacher's answers."""
    def new_scene(names=None):
        return data.make_scene(rng, **data.DIFFICULTY[rng.choice(list(data.DIFFICULTY))], names=names)

    e = Episode(None, [], [], [], [])
    e.say(vlm, vlm.chat("system", data.SYSTEM["boxes"]), sampled=False)

    def ask(answer, *question):
        views = [p for p in question if isinstance(p, model.View)]
        e.say(vlm, vlm.chat("user", *question) + vlm.chat("assistant", open=True), views=views, sampled=False)
        e.say(vlm, vlm.ids(answer) + [vlm.im_end])
        e.say(vlm, vlm.ids("\n"), sampled=False)

    if rng.random() < 0.2:                                                 # several images
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
        _, asked = data.ask_relation(rng, lambda: {**scene, "objects": rng.sample(objects, len(objects))})
        a, b = ([p for p in objects if data.object_box(p) == ev["box"]][0] for ev in asked["meta"]["evidence"])
        text = data.prompt(Sample("", [], **asked))[1]
        return text, f"{a['name']} {at(view, a)}, {b['name']} {at(view, b)}: {asked['options'][asked['answer']]}"

    everything = ", ".join(f"{o['name']} {at(view, o)}" for o in left_to_right)
    todo = rng.choices([point, name, box, alike, relation], weights=[3, 2, 1.5, 1, 1.5], k=3) + ["crop", "crop"]
    rng.shuffle(todo)
    todo = (["list"] if rng.random() < 0.6 else []) + todo
    for i, kind in enumerate(todo):
        o, first = rng.choice(objects), [view] if i == 0 else []
        if kind == "list":
            ask(everything, *first, "List the objects.")
        elif kind == "crop":
            crop, seen = show(vlm, rng, view, objects)
            ask(seen, *first, data.OBSERVE[0], crop, data.OBSERVE[1])
        else:
            try:
                question, answer = kind(o)
            except IndexError:
                continue
            ask(answer, *first, question)
    return e


class Lessons(torch.utils.data.IterableDataset):
    """An endless stream of batches, drawn in a worker process while the model trains."""

    def __init__(self, vlm, seed, batch):
        self.vlm, self.seed, self.batch = vlm, seed, batch

    def __iter__(self):
        rng = random.Random(self.seed)
        torch.set_num_threads(1)
        while True:
            pool = sorted((lesson(self.vlm, rng) for _ in range(4 * self.batch)), key=lambda e: len(e.ids))   # little padding
            batches = [pool[i:i + self.batch] for i in range(0, len(pool), self.batch)]
            for episodes in rng.sample(batches, 4):
                for v in (v for e in episodes for v in e.views):
                    self.vlm.patchify(v)
                    v.source = None
                yield episodes


def pretrain(out, steps, seed=0, batch=16, lr=1.5e-3, save_every=500):
    rng = random.Random(seed)
    texts = []
    stub = model.make_tiny(["a"], data.PHRASES)
    for i in range(600):
        texts.append(stub.text([t for t in lesson(stub, rng).ids if t != stub.image_token]))
    texts += [" The may be at. Look at. This is nothing, not the. Click the"] * 200
    texts += [data.prompt(s)[1] for t in data.TASKS for s in data.toy(t, "train", 30)]
    vlm = model.make_tiny(texts, data.PHRASES, seed)
    vlm.model.requires_grad_(True)
    params = list(vlm.model.parameters())
    print(f"pretraining {sum(p.numel() for p in params) / 1e6:.2f} M parameters, vocabulary {len(vlm.tokenizer)}")
    optimizer = model.AdamW(params, lr, betas=(0.9, 0.98), weight_decay=0.01)
    began, stream = time.time(), iter(torch.utils.data.DataLoader(Lessons(vlm, seed, batch), batch_size=None, num_workers=1, prefetch_factor=4))
    log = []
    for step in range(steps):
        episodes = next(stream)
        vlm.encode([v for e in episodes for v in e.views], grad=True)
        logprobs, _, mask = vlm.logprobs(episodes)
        loss = -logprobs.sum() / mask.sum()
        loss.backward()
        scale = min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.step(lr * scale)
        log.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps} | loss {sum(log[-100:]) / 100:.4f} | {(time.time() - began) / (step + 1):.3f} s/step | "
                  f"tokens {sum(len(e.ids) for e in episodes)} ({int(mask.sum())} taught) | {(time.time() - began) / 60:.1f} min", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            model.replace_folder(vlm.save(out), out)
    return vlm


if __name__ == "__main__":
    if "--pretrain" in sys.argv:
        torch.set_num_threads(2)
        pretrain(sys.argv[2], int(sys.argv[3]))
