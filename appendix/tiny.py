"""How the tiny model was made: a vision-language model of a million parameters, from nothing.

    python -m appendix.tiny                              # -> checkpoints/tiny, hours on two cores
    python -m appendix.tiny --steps 4 --out runs/mine    # the same, far too short, to try it

Pointing alone hardly teaches a small model to see, because the name that it must write stands in
the question. A mixture in which the image is needed to predict the text does. So a *lesson* is a
chat about one scene: list what is there, name what is at a point, point to it, box it, compare, and
tell what a crop shows. *Drills* in the form of the zoom protocol follow, each told where to zoom.
Where to zoom for a question, when, and when to answer is left for the warm start and for RL.
"""
import functools
import math
import os
import random
import re
import time
from dataclasses import dataclass, replace

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data
import model
import rewards
import train_sft
import zoom_rollout
from appendix import prefix, ranks, run, weights
from appendix.optimizer import AdamW
from zoom_rollout import Episode, TurnOptions


@dataclass
class Config:
    steps: int = 16_000         # optimizer steps of the lessons; the drills take an eighth of them
    out: str = ""               # folder of the finished model (default: checkpoints/tiny)
    seed: int = 0               # random seed for weights, scenes and lessons


# --------------------------------------------------------------------------------------------------
# the model: the Qwen2.5-VL architecture at a thousandth of its size

TINY = dict(hidden=128, layers=3, heads=4, kv_heads=2, mlp=384, vocab=640,
            vision=64, vision_layers=2, vision_mlp=128, vision_heads=4)
ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 30.0}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
# What the tokenizer never merges across: digits are single tokens, words keep their space.
PIECES = r", | ?\(|\)[.,]?|\p{N}| ?\p{L}+|\n| ?[^\s\p{L}\p{N}]+|\s+"


def make_tiny(texts, phrases, seed=0):
    """A tiny model with random weights and a tokenizer of its own -> PrefixVLM.

    texts, phrases: see make_tokenizer.
    """
    tokenizer = make_tokenizer(texts, phrases)
    config = make_model_config(tokenizer)
    torch.manual_seed(seed)
    net = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for p in net.parameters():
        if p.ndim >= 2:         # with transformers' deviation of 0.02 this width hardly learns
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    spec = model.MODELS["tiny"]
    size = {"shortest_edge": 4 * 28 ** 2, "longest_edge": spec.max_pixels}
    processor = weights.Qwen2VLImageProcessorPil(size=size)
    return prefix.PrefixVLM(net, tokenizer, processor, "tiny", spec)


def make_tokenizer(texts, phrases):
    """A byte-level BPE tokenizer.

    texts: its corpus. phrases: strings that never vary (prompts, tags, the JSON of a tool call);
    each becomes one token, so that a small model spends its capacity on what does vary.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=TINY["vocab"] - len(SPECIAL) - len(phrases), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    longest_first = sorted(phrases, key=len, reverse=True)
    bpe.add_tokens([AddedToken(phrase, normalized=False) for phrase in longest_first])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, extra_special_tokens=SPECIAL[1:])


def make_model_config(tokenizer):
    """The sizes of TINY in transformers' terms."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    text = dict(
        vocab_size=len(tokenizer), hidden_size=TINY["hidden"], intermediate_size=TINY["mlp"],
        num_hidden_layers=TINY["layers"], num_attention_heads=TINY["heads"],
        num_key_value_heads=TINY["kv_heads"], rope_parameters=dict(ROPE), tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"])
    vision = dict(
        depth=TINY["vision_layers"], hidden_size=TINY["vision"],
        intermediate_size=TINY["vision_mlp"], num_heads=TINY["vision_heads"],
        out_hidden_size=TINY["hidden"], patch_size=14, window_size=112,
        fullatt_block_indexes=list(range(TINY["vision_layers"])))
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])


# --------------------------------------------------------------------------------------------------
# lessons: chats about one scene

FIRST_SCENES = dict(objects=(1, 2), radius=(46, 60))    # as in data.DIFFICULTY


@dataclass
class LessonPicture:
    """What a lesson is about: a scene with its objects, and the model's view of it."""
    rng: random.Random
    scene: dict
    view: model.View

    def objects(self):
        return self.scene["objects"]

    def left_to_right(self):
        return sorted(self.objects(), key=lambda o: o["center"][0])


def lesson(vlm, rng, progress=1.0):
    """-> Episode of one or two questions and their answers, which are what is learned.

    progress: from 0 at the beginning to 1; crowded scenes become more frequent with it.
    """
    episode = start_chat(vlm)
    if rng.random() < 0.05:
        ask_about_several_images(vlm, episode, rng, progress)
        return episode
    scene = new_scene(rng, progress)
    picture = LessonPicture(rng, scene, vlm.view(data.draw_scene(scene)))
    questions, weights = zip(*LESSONS)
    question_about = rng.choices(questions, weights=weights)[0]
    if question_about is read_crop:
        crop, seen = show_crop(vlm, rng, picture.view, picture.objects())
        if rng.random() < 0.5:                  # as in a rollout: after a look at the whole image
            question, answer = point_to(picture, rng.choice(picture.objects()))
            exchange(vlm, episode, [picture.view, question], answer)
        read_crop(vlm, episode, crop, seen)
    else:
        question, answer = question_about(picture, rng.choice(picture.objects()))
        exchange(vlm, episode, [picture.view, question], answer)
    return episode


def new_scene(rng, progress, names=None):
    """A scene of the train split: at first with few and large objects, later with more."""
    level = "first"
    if rng.random() <= 0.2 + progress:
        level = rng.choices(("first", "easy", "medium", "hard"), (2, 3, 4, 1))[0]
    look = FIRST_SCENES if level == "first" else data.DIFFICULTY[level]
    return data.split_scene(rng, "train", **look, names=names)


def start_chat(vlm):
    """-> Episode that holds a system message and nothing else yet."""
    episode = Episode(None)
    episode.append_given(vlm.chat("system", data.SYSTEM["boxes"]))
    return episode


def exchange(vlm, episode, question, answer):
    """Append a user message, a list of texts and views, and the assistant's answer to it."""
    views = [part for part in question if isinstance(part, model.View)]
    message = vlm.chat("user", *question) + vlm.chat("assistant", open=True)
    episode.append_given(message, views)
    episode.append_sampled(vlm.ids(answer) + [vlm.im_end])
    episode.append_given(vlm.ids("\n"))


# Each of these takes a picture and one of its objects -> (question, answer).

def list_objects(picture, o):
    places = [f"{p['name']} {center(picture.view, p)}" for p in picture.left_to_right()]
    return "List the objects.", ", ".join(places)


def point_to(picture, o):
    return f"Point to the {o['name']}.", f"{o['name']} {center(picture.view, o)}"


def name_at(picture, o):
    """The question names a point somewhere in the object."""
    spot = [c + round(picture.rng.uniform(-0.5, 0.5) * o["radius"]) for c in o["center"]]
    x, y = picture.view.from_source(*spot)
    return f"What is at ({x}, {y})?", o["name"]


def list_alike(picture, o):
    """All objects of one color, or of one shape."""
    word = picture.rng.choice(o["name"].split())
    alike = [p for p in picture.left_to_right() if word in p["name"]]
    return f"What is {word}?", ", ".join(f"{p['name']} {center(picture.view, p)}" for p in alike)


def box_object(picture, o):
    place = train_sft.box_text(data.object_box(o), picture.view)
    return f"Box the {o['name']}.", f"{o['name']} {place}"


def compare(picture, o):
    """Where does one object stand, seen from another? Both are located first."""
    rng = picture.rng
    objects = picture.objects()
    if len(objects) < 2:
        return name_at(picture, o)
    _, asked = data.ask_relation(
        rng, lambda: {**picture.scene, "objects": rng.sample(objects, len(objects))})
    places = []
    for evidence in asked["meta"]["evidence"]:
        p = next(p for p in objects if data.object_box(p) == evidence["box"])
        places.append(f"{p['name']} {center(picture.view, p)}")
    _, question = data.prompt(data.Sample("", [], **asked), "zoom")
    return question, f"{', '.join(places)}: {asked['options'][asked['answer']]}"


def read_crop(vlm, episode, crop, seen):
    """What does a crop show? Shown in the words of an observation."""
    before, after = data.OBSERVE
    exchange(vlm, episode, [before, crop, after], seen)


# The kinds of lessons and how frequent they are. `lesson` calls read_crop with a crop.
LESSONS = [(list_objects, 6), (point_to, 5), (name_at, 2), (list_alike, 1), (box_object, 2),
           (compare, 1), (read_crop, 4)]


def ask_about_several_images(vlm, episode, rng, progress):
    """The first image shows one object; box it in another image."""
    scenes, asked = data.ask_boxes(rng, functools.partial(new_scene, rng, progress))
    views = [vlm.view(data.draw_scene(scene), i) for i, scene in enumerate(scenes)]
    target = asked["targets"][0]
    name = scenes[0]["objects"][0]["name"]
    answer = f"{name} {train_sft.box_text(target['box'], views[target['image']])}"
    exchange(vlm, episode, [*views, asked["question"]], answer)


def show_crop(vlm, rng, view, objects):
    """A crop as a rollout makes it, mostly of an object and off center -> (crop, what it shows)."""
    width, height = view.source.size
    x = rng.randrange(width)
    y = rng.randrange(height)
    if rng.random() < 0.15 and is_empty(x, y, objects):
        return zoom_rollout.crop(vlm, view, x, y), "nothing"
    o = rng.choice(objects)
    x, y = [c + round(rng.uniform(-0.7, 0.7) * o["radius"]) for c in o["center"]]
    return zoom_rollout.crop(vlm, view, x, y), f"{o['name']}, {o['pattern']}"


def is_empty(x, y, objects):
    """Is the source pixel (x, y) far from all objects?"""
    return all(math.dist((x, y), o["center"]) > 1.8 * o["radius"] for o in objects)


def center(view, o):
    """The center of an object, as the model writes points."""
    x, y = view.from_source(*o["center"])
    return f"({x}, {y})"


# --------------------------------------------------------------------------------------------------
# drills: the zoom protocol, told where to zoom

def drill(vlm, rng):
    """-> Episode in the zoom protocol whose question says where to zoom.

    An instruction-tuned model brings this along: it can write a tool call, read what comes back and
    pick an option when it must answer. What a question calls for is not taught.
    """
    level = rng.choice(("easy", "medium", "medium"))
    scene = data.split_scene(rng, "train", **data.DIFFICULTY[level])
    image = data.draw_scene(scene)
    view = vlm.view(image)
    chosen = rng.sample(scene["objects"], rng.randint(1, 2))
    forced = rng.random() < 0.2
    options = rng.sample(list(data.PATTERNS), len(data.PATTERNS))
    spots = [train_sft.near(o, view, rng) for o in chosen]
    places = []
    for o, spot in zip(chosen, spots):
        places.append(f"the {o['name']}" if rng.random() < 0.7 else str(spot))
    question = f"Zoom into {', then '.join(places)}."
    sample = data.Sample("", [image], question, "choice", options)

    if forced and rng.random() < 0.5:           # no zoom allowed: any option
        answer = f"{data.FORCE} {rng.choice(options)} </answer>"
        return zoom_rollout.replay(vlm, sample, [answer])
    turns = []
    seen = ""                                   # what the crop before showed
    for o, (x, y) in zip(chosen, spots):
        thought = f"<think>{seen} The {o['name']} may be at ({x}, {y}). </think>"
        turns.append(f"{thought}\n{data.tool_call(x, y)}")
        seen = f" This is the {o['name']}, {o['pattern']}."
    opening = data.FORCE                        # the answer is about the last crop
    if not forced:
        opening = f"<think>{seen[:-1]}, at ({x}, {y}). </think>\n<answer>"
    turns.append(f"{opening} {o['pattern']} </answer>")
    max_zooms = len(chosen) if forced else 3
    return zoom_rollout.replay(vlm, sample, turns, max_zooms=max_zooms)


def drill_or_lesson(vlm, rng, progress):
    return drill(vlm, rng) if rng.random() < 0.6 else lesson(vlm, rng)


# --------------------------------------------------------------------------------------------------
# pretraining

# Words of the traces and questions that no lesson contains; the tokenizer should know them.
TRACE_WORDS = (" The may be at. Look at. This is nothing, not the. Click the Image 1 shows. "
               "It lined barred slanted checked")
BATCH = 24                                      # episodes per step


def pretrain(folder, steps=16_000, seed=0):
    """Make the tiny model from nothing and save it: lessons, then drills among lessons."""
    began = time.time()
    vlm = make_tiny(tokenizer_corpus(seed), data.PHRASES, seed)
    vlm.model.requires_grad_(True)              # here the vision tower learns too
    learn(vlm, lesson, steps, 1.5e-3, seed)
    run.replace_folder(vlm.save(folder), folder)        # can be tried while the drills go on
    learn(vlm, drill_or_lesson, steps // 8, 8e-4, seed)
    ship(vlm, folder, steps, seed, (time.time() - began) / 60)


def tokenizer_corpus(seed):
    """Texts for make_tokenizer: 2000 lessons, words of the traces, and prompts."""
    rng = random.Random(seed)
    stub = make_tiny(["a"], data.PHRASES)       # knows single bytes and the phrases
    texts = []
    for _ in range(2000):
        ids = lesson(stub, rng).ids
        texts.append(stub.text([token for token in ids if token != stub.image_token]))
    texts += [TRACE_WORDS] * 200
    for task in ("search", "point", "relation", "boxes"):
        for sample in data.toy(task, "train", 30):
            _, question = data.prompt(sample, "zoom")
            texts.append(question)
    return texts


def learn(vlm, make, steps, lr, seed):
    """Next-token loss on the answers, in `steps` steps.

    make: (vlm, rng, progress) -> Episode. The learning rate rises in 100 steps, stays at lr, and
    falls to 0 in the last 30 % of the steps.
    """
    params = list(vlm.model.parameters())
    count = sum(p.numel() for p in params)
    print(f"{make.__name__}: {count / 1e6:.2f} M parameters, "
          f"vocabulary {len(vlm.tokenizer)}, {steps} steps")
    optimizer = AdamW(params, lr, betas=(0.9, 0.98), weight_decay=0.01, scale=by_width)
    stream = Lessons(vlm, make, seed, ramp=0.1 * steps)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=4)
    batches = iter(loader)
    losses = []
    began = time.time()
    for step in range(steps):
        episodes = next(batches)
        vlm.encode([view for e in episodes for view in e.views], grad=True)
        logprobs, _, mask = vlm.logprobs(episodes)                              # (B, T)
        loss = -logprobs.sum() / mask.sum()
        loss.backward()
        rise = (step + 1) / 100
        fall = (steps - step) / (0.3 * steps)
        optimizer.step(lr * min(1, rise, fall))
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = (time.time() - began) / (step + 1)
            print(f"step {step + 1}/{steps} | loss {sum(losses[-100:]) / 100:.4f} | "
                  f"{seconds:.3f} s/step | {seconds * (steps - step - 1) / 60:.0f} min left",
                  flush=True)


def by_width(p):
    """A factor on the learning rate of a parameter.

    A wide input moves its output a lot per unit of learning rate: a patch has 1176 values, a hidden
    state 128.
    """
    return min(1.0, 128 / p[0].numel()) ** 0.5


class Lessons(torch.utils.data.IterableDataset):
    """An endless stream of batches, drawn in a worker process while the model trains.

    ramp: drawn pools of four batches after which `progress` is 1.
    """

    def __init__(self, vlm, make, seed, ramp):
        self.vlm = vlm
        self.make = make
        self.seed = seed
        self.ramp = ramp

    def __iter__(self):
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        batches_drawn = 0
        while True:
            progress = min(1.0, batches_drawn / self.ramp)
            pool = [self.make(self.vlm, rng, progress) for _ in range(4 * BATCH)]
            pool.sort(key=lambda e: len(e.ids))         # little padding
            batches = [pool[i:i + BATCH] for i in range(0, len(pool), BATCH)]
            batches_drawn += 4
            for episodes in rng.sample(batches, 4):
                yield [self.ready_to_send(e) for e in episodes]

    def ready_to_send(self, episode):
        """The episode with cut patches in place of source images, which take long to send."""
        views = []
        for view in episode.views:
            self.vlm.patchify(view)
            light = model.View(None, view.fed, self.vlm.spec.convention, view.index, view.box,
                               view.grid)
            light.set_patches(view.patches)
            views.append(light)
        return replace(episode, views=views)


# --------------------------------------------------------------------------------------------------
# the finished model

CARD = """# The tiny VLM

The Qwen2.5-VL architecture with {parameters:,} parameters ({sizes}), bf16, and a
byte-level BPE of {vocabulary} tokens. Made from nothing, seed {seed}, {steps} steps in \
{minutes:.0f} minutes on two CPU cores, by

    python -m appendix.tiny

What it can do, greedily, on 200 fresh toy scenes each (`appendix.tiny.skills`; no warm start, no \
tool, plain questions):

{skills}

It knows nothing but the toy world of `data.py`. It can write a tool call when told where to zoom, \
and read the crop; it has never seen the search
question, nor been told what zooming is good for.
"""


def ship(vlm, folder, steps, seed, minutes):
    """Round to bf16 (half the size), measure, and save with a model card."""
    vlm.model.to(torch.bfloat16).to(torch.float32)
    vlm.model.eval()
    measured = skills(vlm)
    vlm.model.to(torch.bfloat16)
    tmp = vlm.save(folder, seed=seed, steps=steps, skills=measured)
    card = CARD.format(
        parameters=sum(p.numel() for p in vlm.model.parameters()),
        sizes=", ".join(f"{name} {size}" for name, size in TINY.items()),
        vocabulary=len(vlm.tokenizer), seed=seed, steps=steps, minutes=minutes,
        skills="\n".join(f"- {skill}: {rate:.1%}" for skill, rate in measured.items()))
    with open(os.path.join(tmp, "README.md"), "w") as f:
        f.write(card)
    run.replace_folder(tmp, folder)
    print(measured)


def skills(vlm, n=200, seed=0):
    """What the tiny model can do before any warm start, greedily -> {skill: share that is right}.

    n: fresh scenes for each skill.
    """
    scenes = data.toy("point", "test", n, f"skills{seed}")
    several = data.toy("boxes", "test", n, f"skills{seed}")
    return {"point": pointing_accuracy(vlm, scenes),
            "read a crop": reading(vlm, scenes, random.Random(seed)),
            "box": boxing(vlm, several)}


def pointing_accuracy(vlm, samples):
    """How often does it point into the box around the circle of an object that is named?"""
    questions = []
    for s in samples:
        o = s.meta["scenes"][0]["objects"][0]
        questions.append([vlm.view(s.images[0]), f"Point to the {o['name']}."])
    right = 0
    for s, (view, _), reply in zip(samples, questions, answer_greedily(vlm, questions)):
        o = s.meta["scenes"][0]["objects"][0]
        point = integers(reply)
        if len(point) == 2:
            x, y = view.to_source(*point)
            cx, cy = o["center"]
            right += abs(x - cx) <= o["radius"] and abs(y - cy) <= o["radius"]
    return right / len(samples)


def reading(vlm, samples, rng):
    """How often does it say what a crop shows?"""
    before, after = data.OBSERVE
    questions = []
    expected = []
    for s in samples:
        o = s.meta["scenes"][0]["objects"][0]
        crop, seen = show_crop(vlm, rng, vlm.view(s.images[0]), [o])
        questions.append([before, crop, after])
        expected.append(seen)
    replies = answer_greedily(vlm, questions)
    return sum(reply == seen for reply, seen in zip(replies, expected)) / len(samples)


def boxing(vlm, samples):
    """How often does its box overlap the right one with an IoU of 0.5 or more?"""
    questions = []
    for s in samples:
        views = [vlm.view(image, i) for i, image in enumerate(s.images)]
        questions.append([*views, s.question])
    right = 0
    for s, question, reply in zip(samples, questions, answer_greedily(vlm, questions)):
        target = s.targets[0]
        view = question[target["image"]]
        box = integers(reply)
        if len(box) == 4:
            box = [*view.to_source(*box[:2]), *view.to_source(*box[2:])]
            right += rewards.iou(box, target["box"]) >= 0.5
    return right / len(samples)


def integers(text):
    return [int(digits) for digits in re.findall(r"\d+", text)]


def answer_greedily(vlm, questions, max_new_tokens=24):
    """One-turn answers in the lessons' plain chat. questions: lists of texts and views -> texts."""
    chats = []
    views = []
    for question in questions:
        chat = vlm.chat("system", data.SYSTEM["boxes"]) + vlm.chat("user", *question)
        chats.append(chat + vlm.chat("assistant", open=True))
        views += [part for part in question if isinstance(part, model.View)]
    cache = vlm.new_cache(len(questions))
    logits, positions = vlm.prefill(cache, chats, [0] * len(chats), views)
    u = torch.zeros(len(questions), max_new_tokens)     # no randomness is needed
    options = TurnOptions(max_new_tokens, temperature=0)
    turns, _, _ = zoom_rollout.sample_turn(vlm, cache, logits, positions, u, options)
    return [vlm.text(ids[:-1]) for ids in turns]


# --------------------------------------------------------------------------------------------------

def main():
    ranks.start()
    cfg = run.parse_config(Config, description=__doc__, positive=("steps",))
    if ranks.world_size() > 1:
        run.fail("pretraining runs in one process: start it without torchrun")
    folder = cfg.out or model.MODELS["tiny"].path
    run.make_dir(os.path.dirname(os.path.abspath(folder)))
    pretrain(folder, cfg.steps, cfg.seed)


if __name__ == "__main__":
    with run.exit_on_error(interrupted="interrupted"):
        main()
