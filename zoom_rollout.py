"""How an episode unfolds: sample a turn, call the tool, look, go on.

    rollout(vlm, samples, group_size) -> list[Episode]        all of sample 0, then all of sample 1, ...

The sampler is written by hand: a KV cache instead of `generate`. A group's prompt (its image above all) runs through the
model once and its cache is handed to all members; a new turn runs only the tokens of the observation. Tokens in, tokens
out: what was sampled is never decoded and encoded again, and the mask of trained tokens records who wrote each token.

Not here, from ViGoRL: resampling of a turn after an unparsable call (its own code goes on from a broken prompt); the red
dot on web crops; the character-length filter of prompts.
"""
import json, math, re
from dataclasses import dataclass, field
from functools import partial

import torch
from PIL import Image

import data


@dataclass
class Turn:
    """What the assistant wrote in one turn and what its tool call led to."""
    text: str                       # tags included, without <|im_end|>
    point: tuple = None             # (x, y) of the tool call, in the model's own convention
    crop: tuple = None              # the window shown for it, source pixels of image 0
    error: str = None               # said instead of a crop when the call was invalid
    forced: bool = False            # the turn opens with the injected data.FORCE


@dataclass
class Episode:
    """One conversation, as the trainer needs it and as the report draws it."""
    sample: data.Sample
    ids: list                       # every token: prompt, turns, observations
    sampled: list                   # True exactly where the policy chose the token, its end-of-turn token included
    logprobs: list                  # the sampler's log-probability of each sampled token, 0.0 elsewhere
    views: list                     # model.View, in the order in which their tokens stand in `ids`
    turns: list = field(default_factory=list)
    stop: str = ""                  # "answer" | "no_action" | "invalid" | "length"
    frames: list = field(default_factory=list)     # per prompt image: (sx, sy, width, height), see rewards.py
    parts: dict = field(default_factory=dict)      # rewards.score(...)
    advantage: float = 0.0

    @property
    def text(self):
        return "\n".join(t.text for t in self.turns)

    def say(self, vlm, ids, logprobs=None, views=(), sampled=True):
        """Append tokens: the policy's (sampled) or the environment's."""
        self.ids += ids
        self.sampled += [sampled] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)
        self.views += views


def begin(vlm, sample, style="zoom", views=None):
    """The episode that holds a sample's prompt, up to the open assistant turn."""
    try:
        views = views or [vlm.view(data.image(sample, i), i) for i in range(len(sample.images))]
    except ValueError as e:                                                        # an image of 1 x 1000 pixels, say
        raise data.DataError(str(e) if isinstance(e, data.DataError) else f"sample {sample.id}: {e}") from None
    frames = [(*v.scale, *v.source.size) for v in views]
    system, text = data.prompt(sample, style, frames)
    e = Episode(sample, [], [], [], [], frames=frames)
    e.say(vlm, vlm.chat("system", system) + vlm.chat("user", *views, text) + vlm.chat("assistant", open=True), views=views, sampled=False)
    return e


def crop(vlm, view, x, y, crop_from="source", black=False):
    """The tool. A square window of `spec.window` source pixels around the source pixel (x, y), moved inside the image where
    it would stick out (ViGoRL clips it and then squashes what is left), fed at `spec.crop` pixels a side. It begins at a multiple
    of 4 pixels: the toy world's fine patterns then look the same in every crop, which is what a small model can learn fast.

    crop_from "source": cut from the image as stored, so a zoom brings new pixels; "seen": from the copy that the model was
    fed, as in the paper's training code. black: the control that shows what zooming is worth: a crop without content."""
    source = view.source
    if crop_from == "seen":
        source = source.resize(view.fed, Image.Resampling.BICUBIC).resize(source.size, Image.Resampling.BICUBIC)
    if black:
        source = Image.new("RGB", source.size)
    w, h = min(vlm.spec.window, source.width), min(vlm.spec.window, source.height)
    left, top = (min(max(round(c - s / 2), 0) // 4 * 4, size - s) for c, s, size in ((x, w, source.width), (y, h, source.height)))
    side = max(vlm.spec.crop // vlm.factor, 1) * vlm.factor
    fed = (max(round(side * w / vlm.spec.window / vlm.factor), 1) * vlm.factor, max(round(side * h / vlm.spec.window / vlm.factor), 1) * vlm.factor)
    return vlm.view(source, view.index, (left, top, left + w, top + h), fed)


def read_call(text):
    """The first tool call of a turn -> ((x, y), None), or (None, what was wrong with it)."""
    call = re.search(r"<tool_call>(.*?)</tool_call>", text, re.S)
    try:
        x, y = json.loads(call[1])["arguments"]["coordinate"]
        assert type(x) is int and type(y) is int and max(abs(x), abs(y)) < 1e6 and json.loads(call[1])["name"] == "search_coordinate"
        return (x, y), None
    except (TypeError, KeyError, ValueError, AssertionError, RecursionError):
        return None, "The tool call could not be read."


def draw(logits, u, temperature):
    """Sample by inverse transform: logits (B, V), u (B,) uniform -> tokens (B,), their log-probabilities (B,).

    One uniform number, fixed before the rollout begins, decides each token of each episode: which rows are still running
    changes nothing for the others. No top-p or top-k: the trainer could not reproduce the log-probabilities."""
    p = torch.softmax(logits / (temperature or 1.0), -1)                                       # (B, V)
    if temperature == 0:
        tokens = p.argmax(-1)
    else:
        total = p.cumsum(-1, dtype=torch.double)
        tokens = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return tokens, p.gather(1, tokens[:, None])[:, 0].log()


def sample_turn(vlm, cache, logits, starts, u, temperature, max_new_tokens, graphs=False, left=None, patience=0, stop=None):
    """One assistant turn for every row, token by token. logits (B, V) of the first token, u (B, max_new_tokens), left: how many
    tokens each row may still write (default: all of max_new_tokens).

    -> ids and logprobs per row, the position of each row's last token. That token (mostly <|im_end|>, which is sampled, counted
    and trained like any other) is not yet in the cache: it goes in with what follows it. Rows that have ended wait, until no
    more than `patience` rows still write; these are then left in the middle of their turn, to go on beside the others.
    Everything stays on the device; on a GPU the question whether all have ended, which waits for it, is put every 8 tokens.
    graphs: model.VLM.graph. stop (V,): tokens that end a row too, which tree search asks for."""
    B, positions = len(starts), torch.tensor(starts, device=vlm.device)
    left = torch.tensor(left or [max_new_tokens] * B, device=vlm.device)             # (B,)
    ids, logps = torch.zeros(B, max_new_tokens, dtype=torch.long, device=vlm.device), torch.zeros(B, max_new_tokens, device=vlm.device)
    n, live = torch.zeros_like(positions), torch.ones_like(positions)                # (B,) tokens so far; 1 while the turn goes on
    cache.reserve(max_new_tokens)
    step, ask = vlm.graph(cache, B) if graphs else partial(vlm.decode, cache), 8 if vlm.device.type == "cuda" else 1
    for t in range(max_new_tokens):
        tokens, logps[:, t] = draw(logits, u[:, t], temperature)
        ids[:, t] = tokens
        n += live
        live = live * (tokens != vlm.im_end) * (n < left) * (1 if stop is None else ~stop[tokens])
        if t + 1 == max_new_tokens or (t + 1) % ask == 0 and live.sum() <= patience:
            break
        logits = step(tokens, positions, live)
        positions = positions + live
    cut = lambda x: [row[:k] for row, k in zip(x.tolist(), n.tolist())]
    return cut(ids), cut(logps), positions.tolist()


def respond(vlm, e, text, ended=True, forced=False, zooms_left=1, crop_from="source", black=False):
    """The environment's move after the turn `text` (whose tokens `e` holds already): record the turn, then either stop
    the episode or append the observation, up to the open header of the next turn.

    -> the ids appended and their new views, or None if the episode is over (e.stop says why)."""
    turn = Turn(text, forced=forced)
    e.turns.append(turn)
    e.stop = ("length" if not ended else "answer" if "</answer>" in text else "no_action" if "<tool_call>" not in text
              else "" if zooms_left else "invalid")
    if e.stop:
        return None
    view, shown = e.views[0], []
    turn.point, turn.error = read_call(text)
    if turn.point:
        x, y = view.to_source(*turn.point)
        if not (0 <= x < view.source.width and 0 <= y < view.source.height):
            turn.error = f"The coordinate {turn.point} lies outside the image."
    if turn.error:
        message = vlm.chat("user", data.REFUSE.format(error=turn.error))
    else:
        shown = [crop(vlm, view, x, y, crop_from, black)]
        turn.crop = shown[0].box
        message = vlm.chat("user", data.OBSERVE[0], *shown, data.OBSERVE[1])
    ids = vlm.ids("\n") + message + vlm.chat("assistant", open=True) + (vlm.ids(data.FORCE) if zooms_left == 1 else [])
    e.say(vlm, ids, views=shown, sampled=False)
    return ids, shown


def replay(vlm, sample, texts, style="zoom", max_zooms=3):
    """A trace (the assistant's turns as text) -> the Episode that would have produced it, for supervised fine-tuning."""
    e = begin(vlm, sample, style)
    max_zooms = 0 if texts[0].startswith(data.FORCE) else max_zooms                 # a trace in which no zoom was allowed
    if style == "zoom" and max_zooms == 0:
        e.say(vlm, vlm.ids(data.FORCE), sampled=False)
    for k, text in enumerate(texts):
        forced = style == "zoom" and k == max_zooms
        e.say(vlm, vlm.ids(text[len(data.FORCE):] if forced and text.startswith(data.FORCE) else text) + [vlm.im_end])
        if respond(vlm, e, text, True, forced, max_zooms - k if style == "zoom" else 0) is None:
            break
    return e


@torch.no_grad()
def rollout(vlm, samples, group_size=1, *, max_zooms=3, max_new_tokens=64, temperature=1.0, seed=0, style="zoom", zoom="on",
            crop_from="source", views=None, max_batch_tokens=262_144, skip=0, graphs=False):
    """group_size episodes for each sample.

    max_zooms: after so many calls (those that fail count too) the next turn opens with data.FORCE and must answer; its
    injected tokens are not trained on. zoom: "on"; "off" forces the answer in the first turn; "black" shows empty crops.
    views: the samples' own prompt views, if already encoded. Single-turn styles ("think", "boxes") end with their first turn.
    max_batch_tokens: cache slots at once (of a 3B model 36 kB each): what does not fit is run in parts, with the same result.
    skip: how many samples of the same batch come before these (other ranks run them): each keeps its own random numbers.
    graphs: on a GPU, decode with captured CUDA graphs."""
    limit = max_zooms if style == "zoom" and zoom != "off" else 0
    prompts = [begin(vlm, s, style, views and views[i]) for i, s in enumerate(samples)]
    if style == "zoom" and limit == 0:
        for e in prompts:
            e.say(vlm, vlm.ids(data.FORCE), sampled=False)
    share = [p for p in range(len(prompts)) for _ in range(group_size)]
    episodes = [Episode(e.sample, list(e.ids), list(e.sampled), list(e.logprobs), list(e.views), frames=e.frames)
                for e in (prompts[p] for p in share)]
    u = torch.rand(skip * group_size + len(share), limit + 1, max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    u = u[skip * group_size:].to(vlm.device)
    growth = (limit + 1) * max_new_tokens + limit * ((vlm.spec.crop // vlm.factor) ** 2 + 64)           # of one episode, at most
    parts, size = [[]], 0
    for i, p in enumerate(share):
        new = not parts[-1] or share[i - 1] != p                                    # a prompt's episodes stand together
        if parts[-1] and size + new * len(prompts[p].ids) + growth > max_batch_tokens:
            parts, size, new = parts + [[]], 0, True
        parts[-1].append(i)
        size += new * len(prompts[p].ids) + growth
    for part in parts:
        first = share[part[0]]
        unfold(vlm, prompts[first:share[part[-1]] + 1], [share[i] - first for i in part], [episodes[i] for i in part], u[part],
               temperature, style, zoom, limit, crop_from, graphs)
    return episodes


def unfold(vlm, prompts, group, episodes, u, temperature, style, zoom, limit, crop_from, graphs=False):
    """Run `episodes`, which hold their prompts, to their ends. group: the prompt of each; u (B, limit + 1, max_new_tokens)."""
    cache = vlm.new_cache(len(prompts))
    logits, starts = vlm.extend(cache, [e.ids for e in prompts], [0] * len(prompts), [v for e in prompts for v in e.views])
    cache, logits, starts = cache.share(torch.tensor(group, device=vlm.device)), logits[group], [starts[p] for p in group]
    active, written, longest = list(range(len(episodes))), [0] * len(episodes), u.shape[2]      # row b of the cache is episode active[b]
    while True:
        done = torch.tensor([written[i] for i in active], device=vlm.device)                   # tokens of the turn that are there already
        turns = torch.tensor([len(episodes[i].turns) for i in active], device=vlm.device)
        ahead = (done[:, None] + torch.arange(longest, device=vlm.device)).clamp(max=longest - 1)
        numbers = u[torch.tensor(active, device=vlm.device)[:, None], turns[:, None], ahead]   # (B, longest)
        ids, logps, starts = sample_turn(vlm, cache, logits, starts, numbers, temperature, longest - min(written[i] for i in active), graphs,
                                         left=[longest - written[i] for i in active], patience=len(active) // 8)
        rows, chunks, shown = [], [], []
        for b, i in enumerate(active):
            e = episodes[i]
            e.say(vlm, ids[b], logps[b])
            written[i] += len(ids[b])
            ended, forced = ids[b][-1] == vlm.im_end, style == "zoom" and len(e.turns) == limit
            if ended or written[i] >= longest:
                text = (data.FORCE if forced else "") + vlm.text(e.ids[-written[i]:][:-1] if ended else e.ids[-written[i]:])
                answer = respond(vlm, e, text, ended, forced, limit - len(e.turns), crop_from, zoom == "black")
                written[i] = 0
            else:
                answer = [], []                                                     # still writing: goes on beside the others
            if answer:
                rows.append(b)
                chunks.append(ids[b][-1:] + answer[0])
                shown += answer[1]
        if not rows:
            return
        cache, active, starts = cache.rows(torch.tensor(rows, device=vlm.device)), [active[b] for b in rows], [starts[b] for b in rows]
        logits, starts = vlm.extend(cache, chunks, starts, shown)


def naive_work(vlm, episodes):
    """What a sampler runs that sends the whole conversation again each turn, for every member of a group, as TRL and both
    papers' code do -> {"tokens": prefilled, "patches": seen by the vision tower}. `vlm.work` counts what this one ran."""
    work = {"tokens": 0, "patches": 0}
    for e in episodes:
        for t in (t for t, on in enumerate(e.sampled) if on and not e.sampled[t - 1]):          # a turn begins
            work["tokens"] += t
            work["patches"] += e.ids[:t].count(vlm.image_token) * vlm.processor.merge_size ** 2
    return work
