"""Traces from a teacher (UniVG-R1, 2505.14231, section 3): cold-start chains of thought.

    python train_sft.py --traces teacher --teacher http://127.0.0.1:8000/v1 --data questions.jsonl

A strong model is shown the question and its answer, and writes several chains of reasoning that
lead from one to the other. Chains that cannot be read, that end in another answer, or that give
away that the answer was known are dropped; of the rest a judge, the same model, keeps the best.

Left out: UniVG-R1's own prompt for each of its tasks; here one prompt asks for the answer type.
"""
import re
import zlib
from typing import NamedTuple

import torch

import data
import rewards
import zoom_rollout
from appendix import files, parts, prefix
from appendix.chains import points_in, to_turns
from appendix.endpoint import Endpoint
from zoom_rollout import Trace, TurnOptions

TEACH = """\
Look carefully at {images}. Question: {question}
The answer is {answer}. Pretend that you do not know it, and describe the reasoning that leads \
from the question to it, as if you found it yourself. {how} \
Name every place that you look at as (x, y), x from 0 to {width} and y from 0 to {height}. \
Do not say that an answer was given. Write nothing but
<think> your reasoning </think>
<answer> {answer} </answer>"""
HOW = {
    "point": "First describe the thing that is asked for, then find it, then give its center.",
    "box": ("First say what each image shows, then which object is meant and what gives it away, "
            "then where its edges are."),
    "choice": ("First find what the question names, then look at it closely, "
               "then compare the options."),
    "text": "First find what the question names, then look at it closely, then conclude.",
}
JUDGE = """\
Question: {question}
The right answer is {answer}. Which of these chains of reasoning is the best: true to the image, \
complete, each step following from the one before? Reply with its number and nothing else.
{chains}"""
# Words that give away that the answer was known.
LEAK = re.compile(
    r"\b(given|provided|supplied|stated|known|correct|ground[- ]?truth|target|reference) "
    r"(answer|box|bounding box|coordinates?|point|option|label)\b"
    r"|\bground[- ]?truth\b|\bpretend|\bI (?:was|am|have been) (?:told|given)\b", re.I)
FAULTS = ("unparsed", "wrong", "leaked")


class Reply(NamedTuple):
    thought: str
    answer: str
    fault: str = ""         # one of FAULTS, or empty: it can be used


# --------------------------------------------------------------------------------------------------
# traces

def teacher_traces(vlm, cfg, style, questions=None, side=data.SIDE, log=""):
    """The best chain for each question -> (list[Trace], counts).

    questions: list[Sample]; None: cfg.n toy questions, of scenes with `side` pixels a side. log:
    JSONL file that keeps the replies of an endpoint. Raises DataError if no chain can be used.
    """
    samples = questions
    if not samples:
        samples = data.toy(cfg.task, "train", cfg.n, f"sft{cfg.seed}", cfg.difficulty, side)
    teacher = find_teacher(cfg, vlm, log)
    views = {}                                          # {sample id: its views}
    fields = {}                                         # {sample id: what its prompts say}
    for s in samples:
        views[s.id] = prompt_views(vlm, s)
        fields[s.id] = prompt_fields(vlm, s, views[s.id])

    jobs = []
    for s in samples:
        for k in range(cfg.chains):
            key = f"{s.id}/{files.digest(s)}/chain{k}/{cfg.seed}"
            jobs.append((key, views[s.id], TEACH.format(**fields[s.id])))
    replies = teacher.ask(jobs, cfg.temperature)
    usable, lost = sort_replies(samples, views, replies, cfg.chains)
    faults = ", ".join(f"{n} {fault}" for fault, n in lost.items())
    print(f"teacher: {len(jobs)} chains for {len(samples)} questions; {faults}; "
          f"{len(usable)} questions have one")
    if not usable:
        raise files.DataError(f"no chain of the teacher can be used: of {len(jobs)}, {faults}")

    best = judge_chains(teacher, samples, views, fields, usable, cfg.seed)
    traces = []
    for s in samples:
        if s.id in best:
            steps = steps_of(best[s.id].thought)
            turns = to_turns(steps, best[s.id].answer, style, cfg.max_zooms, cfg.min_distance)
            traces.append(Trace(s, turns, "taught"))
    return traces, {"questions": len(samples), "chains": len(jobs), **lost}


def find_teacher(cfg, vlm, log):
    """What has the method ask([(key, views, text)], temperature) -> replies."""
    if cfg.teacher.startswith(("http://", "https://")):
        return Endpoint(cfg.teacher, cfg.teacher_model, log, cfg.teacher_tokens, cfg.timeout,
                        cfg.retries)
    model = prefix.load_vlm(cfg.teacher) if cfg.teacher else vlm
    return LocalModel(model, cfg.teacher_tokens)


def sort_replies(samples, views, replies, num_chains):
    """Read num_chains replies per sample -> ({sample id: usable replies}, {fault: how many})."""
    usable = {}
    lost = dict.fromkeys(FAULTS, 0)
    for i, s in enumerate(samples):
        frames = [(*view.scale, *view.source.size) for view in views[s.id]]
        for text in replies[i * num_chains:(i + 1) * num_chains]:
            reply = read_reply(text, s, frames)
            if reply.fault:
                lost[reply.fault] += 1
            else:
                usable.setdefault(s.id, []).append(reply)
    return usable, lost


def judge_chains(teacher, samples, views, fields, usable, seed):
    """Where a question has several usable chains, the teacher picks -> {sample id: its Reply}."""
    best = {name: replies[0] for name, replies in usable.items()}
    rivals = [s for s in samples if len(usable.get(s.id, [])) > 1]
    jobs = []
    for s in rivals:
        chains = [f"[{k}] {reply.thought}" for k, reply in enumerate(usable[s.id], 1)]
        text = JUDGE.format(**fields[s.id], chains="\n".join(chains))
        jobs.append((f"{s.id}/{files.digest(s)}/judge/{seed}", views[s.id], text))
    for s, verdict in zip(rivals, teacher.ask(jobs, temperature=0.0)):
        number = re.search(r"\d{1,9}", verdict)
        if number and 1 <= int(number[0]) <= len(usable[s.id]):         # else the first one stays
            best[s.id] = usable[s.id][int(number[0]) - 1]
    return best


# --------------------------------------------------------------------------------------------------
# what the teacher is sent

def prompt_views(vlm, sample):
    """Each image at the size the policy is fed, so that a coordinate means the same to both."""
    images = [files.sample_image(sample, i) for i in range(len(sample.images))]
    return [vlm.view(image, i) for i, image in enumerate(images)]


def prompt_fields(vlm, sample, views):
    """The fields of TEACH and JUDGE for a sample -> dict."""
    question = data.question(sample, [view.scale for view in views])
    for letter, option in enumerate(sample.options, ord("A")):
        question += f"\n{chr(letter)}. {option}"
    asked = sample.targets[0]["image"] if sample.targets else 0
    width, height = views[asked].fed
    if vlm.spec.convention == "thousand":
        width, height = 1000, 1000
    images = "the image" if len(sample.images) == 1 else f"all {len(sample.images)} images"
    return dict(images=images, question=question, answer=answer_to_show(sample, views),
                how=HOW[sample.answer_type], width=width, height=height)


def answer_to_show(sample, views):
    """The right answer in words, in the policy's own coordinates."""
    if sample.targets:
        target = sample.targets[0]
        view = views[target["image"]]
        x1, y1 = view.from_source(*target["box"][:2])
        x2, y2 = view.from_source(*target["box"][2:])
        if sample.answer_type == "box":
            return f"({x1}, {y1}),({x2}, {y2})"
        return f"({(x1 + x2) // 2}, {(y1 + y2) // 2})"
    if sample.answer in (None, []):
        raise files.DataError(f"sample {sample.id} has no answer that a teacher could be given")
    if sample.answer_type == "choice":
        return sample.options[sample.answer]
    return sample.answer[0]


# --------------------------------------------------------------------------------------------------
# what the teacher writes

def read_reply(text, sample, frames):
    """-> Reply. frames: see rewards.py."""
    found = re.search(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", text, re.S)
    if not found:
        return Reply("", "", "unparsed")
    thought, answer = [" ".join(part.split()) for part in found.groups()]
    value = rewards.parse_answer(f"<answer>{answer}</answer>", sample.answer_type)
    if not thought or value is None:
        return Reply(thought, answer, "unparsed")
    if rewards.judge(value, sample, frames)["accuracy"] < 1 - rewards.EPS:
        return Reply(thought, answer, "wrong")
    if LEAK.search(thought):
        return Reply(thought, answer, "leaked")
    return Reply(thought, answer)


def steps_of(thought):
    """A thought -> [(text, point)], cut after every sentence that names a point; its first counts.

    The point of what is left at the end is None.
    """
    steps = []
    text = ""
    for sentence in re.split(r"(?<=[.!?])\s+", thought):
        text = f"{text} {sentence}".strip()
        points = points_in(sentence)
        if points:
            steps.append((text, points[0]))
            text = ""
    if text:
        steps.append((text, None))
    return steps


class LocalModel:
    """A teacher that runs here: the policy itself, or another model."""

    def __init__(self, vlm, max_tokens):
        self.vlm = vlm
        self.max_tokens = max_tokens

    @torch.no_grad()
    def ask(self, jobs, temperature, at_once=64):
        """[(key, views, text)] -> replies in the order of the jobs. The key seeds the sampling."""
        replies = []
        for first in range(0, len(jobs), at_once):
            replies += self.ask_batch(jobs[first:first + at_once], temperature)
        return replies

    def ask_batch(self, jobs, temperature):
        vlm = self.vlm
        chats = []
        all_views = []
        random_numbers = []
        for key, views, text in jobs:
            views = [self.own_view(view) for view in views]
            chat = vlm.chat("system", data.SYSTEM["boxes"]) + vlm.chat("user", *views, text)
            chats.append(chat + vlm.chat("assistant", open=True))
            all_views += views
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            random_numbers.append(
                torch.rand(self.max_tokens, generator=generator, dtype=torch.double))
        cache = vlm.new_cache(len(jobs))
        logits, positions = parts.prefill(vlm, cache, chats, [0] * len(jobs), all_views)
        u = torch.stack(random_numbers).to(vlm.device)                      # (B, max_tokens)
        options = TurnOptions(self.max_tokens, temperature)
        turns, _, _ = zoom_rollout.sample_turn(vlm, cache, logits, positions, u, options)
        return [vlm.text([token for token in ids if token != vlm.im_end]) for ids in turns]

    def own_view(self, view):
        """A view of the policy -> one of this model, at the policy's size if that is possible."""
        fits = all(side % self.vlm.factor == 0 for side in view.fed)
        return self.vlm.view(view.source, view.index, fed=view.fed if fits else None)
