"""How an episode unfolds: sample a turn, call the tool, look at the crop, go on.

    rollout(vlm, samples, group_size) -> list[Episode], the episodes of a prompt side by side

    prompt -> turn -> crop -> turn -> crop -> ... -> turn with the answer

A turn is written by `sample_turn`, a crop comes from `env_step`, `unfold` alternates the two.
Sampling is written out here, with a cache, in place of transformers' `generate`. A prompt with its
image runs through the model once for its whole group, and before a new turn only the tokens of the
observation do. Tokens in, tokens out: what was sampled is never decoded and encoded again, and
`completion_mask` records which tokens the policy chose.

Left out of ViGoRL: sampling a turn again after a call that cannot be read (the paper's code goes on
from a broken prompt); the red dot on web crops; the filter of prompts by length in characters.

Shapes:  P prompts   G episodes per prompt   B rows, one per running episode   V vocabulary
"""
import json
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import torch
from PIL import Image

import data
from appendix import evidence, files
from appendix.running import Running

# Opens the first turn with a tool call, of which the policy only writes the point (--template).
TEMPLATE = "<think> First I look closer. </think>\n" + data.TOOL_OPEN


# --------------------------------------------------------------------------------------------------
# episodes

@dataclass
class Turn:
    """What the assistant wrote in one turn, and what its tool call led to."""
    text: str                       # tags included, without <|im_end|>
    point: tuple = None             # (x, y) of the tool call, in the model's own coordinates
    crop: tuple = None              # window shown for it, in source pixels of image 0
    error: str = None               # message in place of a crop, if the call was invalid
    forced: bool = False            # does the turn open with the injected data.FORCE?


@dataclass
class Trace:
    """A conversation to learn from: the assistant's turns as text."""
    sample: data.Sample
    turns: list                     # texts
    kind: str = ""                  # how it was found


@dataclass
class Episode:
    """One conversation, as the trainer needs it and as the report draws it."""
    sample: data.Sample
    ids: list = field(default_factory=list)             # all tokens: prompt, turns, observations
    completion_mask: list = field(default_factory=list) # True where the policy chose the token
    logprobs: list = field(default_factory=list)        # of tokens the policy chose; else 0.0
    views: list = field(default_factory=list)           # model.View, in the order of their tokens
    turns: list = field(default_factory=list)
    finish_reason: str = ""                 # "answer", "no_action", "invalid" or "length"
    frames: list = field(default_factory=list)  # per prompt image: (*view.scale, width, height)
    reward_components: dict = field(default_factory=dict)       # rewards.score(...)
    advantage: float = 0.0
    difficulty_weight: float = 1.0          # of its question, a factor of the advantage
    behaviour: dict = field(default_factory=dict)       # counts, by appendix/analysis.py
    token_texts: list = field(default_factory=list)     # tokens as text, for the report
    shown_as: dict = field(default_factory=dict)        # how crops were made, for the report

    @property
    def text(self):
        return "\n".join(t.text for t in self.turns)

    def append_sampled(self, ids, logprobs=None):
        """Append tokens that the policy chose, <|im_end|> included."""
        self.ids += ids
        self.completion_mask += [True] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)

    def append_given(self, ids, views=()):
        """Append tokens of the prompt or the environment, and the views among them."""
        self.ids += ids
        self.completion_mask += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.views += views

    def append_turn(self, turn, finish_reason=""):
        """Record a turn whose tokens are appended already. finish_reason: why it is the last."""
        self.turns.append(turn)
        self.finish_reason = finish_reason

    def copy(self):
        """A copy that can be continued separately. It shares the views and their features."""
        return Episode(self.sample, list(self.ids), list(self.completion_mask), list(self.logprobs),
                       list(self.views), list(self.turns), frames=self.frames)


@dataclass(frozen=True)
class RolloutConfig:
    """How episodes unfold. The fields of the same name in a script's Config are the flags."""
    style: str = "zoom"                 # style of the prompt; only "zoom" has a tool
    zoom: str = "on"                    # "on", "off": no zooms, "black" or "wrong" crops
    max_zooms: int = 3                  # tool calls per episode, failed ones included
    template: bool = False              # first turns that open with TEMPLATE
    max_new_tokens: int = 64            # tokens per turn
    temperature: float = 1.0            # sampling temperature; 0: the most probable token
    crop_from: str = "source"           # source of crops: stored image, or "seen": the fed copy
    seed: int = 0                       # random seed of the sampled tokens
    max_batch_tokens: int = 262_144     # slots of the cache (3B model: 36 kB each)
    prefill_tokens: int = 16_384        # tokens of prompts or observations in one forward pass
    compiled: bool = False              # compiled kernels while decoding
    graphs: bool = False                # CUDA graphs while decoding

    @property
    def zoom_limit(self):
        """Tool calls that an episode may make before it must answer."""
        return self.max_zooms if self.style == "zoom" and self.zoom != "off" else 0

    def opening(self, number):
        """The given words that turn `number` (from 0) begins with; "" if the policy writes all.

        data.FORCE asks for the answer where no zoom is left. TEMPLATE stands in for a warm start:
        MGPO (2507.05920) forces a call, then an answer.
        """
        may_be_forced = self.style == "zoom" or self.zoom == "off"
        if may_be_forced and number == self.zoom_limit:
            return data.FORCE
        return TEMPLATE if self.template and number == 0 else ""


def begin(vlm, sample, style="zoom", views=None):
    """The episode that holds a sample's prompt, up to the open assistant turn.

    views: the prompt's own views, if there are some already. Raises DataError for an image that
    cannot be fed (1 x 1000 pixels, say).
    """
    if views is None:
        views = []
        for i in range(len(sample.images)):
            image = files.sample_image(sample, i)
            try:
                views.append(vlm.view(image, i))
            except ValueError as e:
                raise data.DataError(f"sample {sample.id}: {e}") from None
    frames = [(*view.scale, *view.source.size) for view in views]
    system, text = data.prompt(sample, style, frames)
    episode = Episode(sample, frames=frames)
    episode.append_given(vlm.chat("system", system))
    episode.append_given(vlm.chat("user", *views, text), views)
    episode.append_given(vlm.chat("assistant", open=True))
    return episode


# --------------------------------------------------------------------------------------------------
# the environment: what a turn leads to

def crop(vlm, view, x, y, crop_from="source", black=False):
    """The tool: a square window of spec.window source pixels around source pixel (x, y) -> View.

    Where the window would stick out, it is moved inside the image (ViGoRL clips it and then
    squashes what is left). It is fed at spec.crop_side pixels a side. Its start is rounded down to
    a multiple of 4 pixels, except at the right and lower edge of an image: so the toy world's fine
    patterns look the same in every crop, which a small model learns fast.

    crop_from "source": cut from the image as stored, so that a zoom brings new pixels; "seen": from
    the copy that the model was fed, as in the paper's training code. black: the control that shows
    what zooming is worth, a crop without content.
    """
    source = view.source
    if crop_from == "seen":
        source = source.resize(view.fed, Image.Resampling.BICUBIC)
        source = source.resize(view.source.size, Image.Resampling.BICUBIC)
    if black:
        source = Image.new("RGB", source.size)
    width = min(vlm.spec.window, source.width)
    height = min(vlm.spec.window, source.height)
    left = window_start(x, width, source.width)
    top = window_start(y, height, source.height)
    fed = fed_length(vlm, width), fed_length(vlm, height)
    return vlm.view(source, view.index, (left, top, left + width, top + height), fed)


def window_start(center, length, side):
    """Where a window of this length around `center` begins: at a multiple of 4, rounded down."""
    start = max(round(center - length / 2), 0)
    start = start // 4 * 4
    return min(start, side - length)                    # the window stays inside the image


def fed_length(vlm, length):
    """Pixels at which `length` source pixels of a crop are fed: a multiple of vlm.factor."""
    side = max(vlm.spec.crop_side // vlm.factor, 1) * vlm.factor
    return max(round(side * length / vlm.spec.window / vlm.factor), 1) * vlm.factor


def read_call(text):
    """The first tool call of a turn -> ((x, y), None), or (None, what was wrong with it)."""
    unreadable = (None, "The tool call could not be read.")
    after_tag = text.partition("<tool_call>")[2]
    body, closed, _ = after_tag.partition("</tool_call>")
    if not closed:
        return unreadable
    try:
        call = json.loads(body)
        x, y = call["arguments"]["coordinate"]
        name = call["name"]
    except (TypeError, KeyError, ValueError, RecursionError):
        return unreadable
    for number in (x, y):
        if type(number) is not int or abs(number) >= 1e6:
            return unreadable
    if name != "search_coordinate":
        return unreadable
    return (x, y), None


def finish_reason(text, ended, zooms_left):
    """Why an episode is over after this turn; "" if it is not."""
    if not ended:
        return "length"
    if "</answer>" in text:
        return "answer"
    if "<tool_call>" not in text:
        return "no_action"
    return "" if zooms_left else "invalid"


def env_step(vlm, episode, text, ended, zooms_left, forced=False, config=RolloutConfig()):
    """What the environment does after the turn `text`, whose tokens the episode holds already.

    It records the turn. Then the episode is over, or it appends the observation and the header of
    the next turn. ended: did the turn end with <|im_end|>? forced: does it open with data.FORCE?
    zooms_left: tool calls allowed, the one in this turn included.
    -> (ids appended, their new views), or None if the episode is over.
    """
    reason = finish_reason(text, ended, zooms_left)
    if reason:
        episode.append_turn(Turn(text, forced=forced), reason)
        return None

    view = episode.views[0]                             # the tool zooms into the first image
    point, error = read_call(text)
    if point:
        x, y = view.to_source(*point)
        if not (0 <= x < view.source.width and 0 <= y < view.source.height):
            error = f"The coordinate {point} lies outside the image."
    if error:
        episode.append_turn(Turn(text, point, error=error, forced=forced))
        new_views = []
        message = vlm.chat("user", data.REFUSE.format(error=error))
    else:
        if config.zoom == "wrong":
            x, y = evidence.elsewhere(episode.sample, x, y, view.source.size)
        shown = crop(vlm, view, x, y, config.crop_from, black=config.zoom == "black")
        episode.append_turn(Turn(text, point, shown.box, forced=forced))
        new_views = [shown]
        message = vlm.chat("user", data.OBSERVE[0], shown, data.OBSERVE[1])
    ids = vlm.ids("\n") + message + vlm.chat("assistant", open=True)
    if zooms_left == 1:                                 # that was the last: now it must answer
        ids = ids + vlm.ids(data.FORCE)
    episode.append_given(ids, new_views)
    return ids, new_views


def replay(vlm, sample, texts, style="zoom", max_zooms=3):
    """The assistant's turns as texts -> the Episode in which the policy writes just these.

    The turn after the last zoom is forced only if its text opens with data.FORCE.
    """
    can_zoom = style == "zoom"
    episode = begin(vlm, sample, style)
    if can_zoom and texts[0].startswith(data.FORCE):    # a trace in which no zoom was allowed
        max_zooms = 0
        episode.append_given(vlm.ids(data.FORCE))
    for k, (text, next_text) in enumerate(zip(texts, [*texts[1:], ""])):
        forced = can_zoom and k == max_zooms and text.startswith(data.FORCE)
        written = text.removeprefix(data.FORCE) if forced else text
        episode.append_sampled(vlm.ids(written) + [vlm.im_end])
        zooms_left = max_zooms - k if can_zoom else 0
        if zooms_left == 1 and not next_text.startswith(data.FORCE):
            zooms_left = 2                              # so env_step does not force the next turn
        if env_step(vlm, episode, text, True, zooms_left, forced) is None:
            break
    return episode


# --------------------------------------------------------------------------------------------------
# sampling

def sample_tokens(logits, u, temperature):
    """Inverse transform sampling: logits (B, V), u (B,) uniform -> tokens (B,), logprobs (B,).

    Each token of each episode has a uniform number of its own, drawn before the rollout begins. So
    it does not matter which other rows still run. No top-p or top-k: the trainer could not
    reproduce the log-probabilities, which are those at this temperature. Temperature 0 takes the
    likeliest token (log-probabilities: at 1). Sums are in double: however close to 1 a uniform
    number is, no token of probability 0 may be chosen.
    """
    p = torch.softmax(logits / (temperature or 1.0), -1)                                # (B, V)
    if temperature == 0:
        tokens = p.argmax(-1)
    else:
        total = p.cumsum(-1, dtype=torch.double)                                        # (B, V)
        level = u[:, None] * total[:, -1:]              # choose the first token with total > level
        tokens = torch.searchsorted(total, level, right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[1] - 1)
    return tokens, p.gather(1, tokens[:, None])[:, 0].log()


@dataclass(frozen=True)
class TurnOptions:
    max_new_tokens: int                 # tokens of a turn
    temperature: float = 1.0
    budgets: list = None                # tokens that each row may still write; None: max_new_tokens
    patience: int = 0                   # stop when no more than this many rows still write
    stop_tokens: torch.Tensor = None    # bool (V,): further tokens that end a row (tree search)
    compiled: bool = False              # compiled kernels
    graphs: bool = False                # CUDA graphs


def sample_turn(vlm, cache, logits, positions, u, options):
    """Sample one assistant turn for every row, token by token.

    logits (B, V) of the first token; positions: B next positions; u (B, max_new_tokens) uniform.
    -> ids and logprobs, a list per row, and the position of each row's last token. That token
    (mostly <|im_end|>, which is sampled, counted and trained like any other) is not in the cache
    yet: the caller adds it together with what follows it.

    A row that has ended waits for the others, until no more than `patience` rows still write. Those
    are left in the middle of their turn. What a waiting row samples is dropped (`written`).
    """
    device = vlm.device
    B = len(positions)
    n = options.max_new_tokens
    positions = torch.tensor(positions, device=device)                                  # (B,)
    budgets = torch.tensor(options.budgets or [n] * B, device=device)                   # (B,)
    ids = torch.zeros(B, n, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, n, device=device)
    written = torch.zeros(B, dtype=torch.long, device=device)
    live = torch.ones(B, dtype=torch.bool, device=device)
    # Everything stays on the device. To find out whether all rows have ended, the CPU must wait
    # for the GPU. So on a GPU that is checked every 8 tokens only.
    check_every = 1 if device.type == "cpu" else 8
    cache.reserve(n)
    decode_step = decoder(vlm, cache, options)
    for t in range(n):
        tokens, token_logprobs = sample_tokens(logits, u[:, t], options.temperature)
        ids[:, t] = tokens
        logprobs[:, t] = token_logprobs
        written += live
        ended = tokens == vlm.im_end
        if options.stop_tokens is not None:
            ended = ended | options.stop_tokens[tokens]
        live = live & ~ended & (written < budgets)
        if t + 1 == n:
            break
        if (t + 1) % check_every == 0 and live.sum() <= options.patience:
            break
        logits = decode_step(tokens, positions, live)
        positions = positions + live
    lengths = written.tolist()
    return first_of_each(ids, lengths), first_of_each(logprobs, lengths), positions.tolist()


def decoder(vlm, cache, options):
    """The function that computes the next logits: tokens, positions, live (B,) -> (B, V)."""
    step = partial(vlm.decode_step, cache)
    if options.compiled:
        from appendix.graphs import compiled_decode_step
        step = compiled_decode_step(vlm, cache)
    if options.graphs:
        from appendix.graphs import captured_decode_step
        step = captured_decode_step(vlm, cache, step)
    return step


def first_of_each(values, lengths):
    """values (B, n) -> B lists: the first lengths[b] values of row b."""
    return [row[:length] for row, length in zip(values.tolist(), lengths)]


# --------------------------------------------------------------------------------------------------
# rollout

@torch.no_grad()
def rollout(vlm, samples, group_size=1, config=RolloutConfig(), first_sample=0, views=None):
    """group_size episodes for each sample -> list[Episode], those of a sample side by side.

    After max_zooms tool calls the next turn opens with data.FORCE and must answer; these injected
    tokens are not trained on. Styles without a tool ("think", "boxes") end with their first turn.

    first_sample: the place of samples[0] in the batch of all ranks. Every episode of the batch has
    random numbers of its own, so neither ranks nor memory change what is sampled.
    views: the prompt views of each sample, if they are encoded already.
    """
    prompts = []
    for i, sample in enumerate(samples):
        prompt = begin(vlm, sample, config.style, views[i] if views else None)
        prompt.append_given(vlm.ids(config.opening(0)))
        prompts.append(prompt)
    episodes = []
    for prompt in prompts:
        for _ in range(group_size):
            episodes.append(prompt.copy())

    before = first_sample * group_size                  # episodes of other ranks
    u = torch.rand(before + len(episodes), config.zoom_limit + 1, config.max_new_tokens,
                   dtype=torch.double, generator=torch.Generator().manual_seed(config.seed))
    u = u[before:]                                      # (P * G, turns, tokens of a turn)
    rows = []
    for i, episode in enumerate(episodes):
        rows.append(Row(episode, prompts[i // group_size], u[i]))
    unfold(vlm, rows, config)
    return episodes


@dataclass(eq=False)
class Row:
    """An episode that is still running; a row of the cache holds its tokens."""
    episode: Episode
    prompt: Episode                 # what it begins with, the same object for the whole group
    u: torch.Tensor                 # (turns, tokens of a turn): uniform, one for each token
    written: int = 0                # tokens of the present turn so far
    prompt_copy: int = 0            # number of the copy of its prompt in the cache; 0: not there

    def continues(self, prompt_copy):
        self.prompt_copy = prompt_copy

    def own_tokens(self):
        """How many tokens stand behind its prompt."""
        return len(self.episode.ids) - len(self.prompt.ids)

    def append(self, ids, logprobs):
        self.episode.append_sampled(ids, logprobs)
        self.written += len(ids)

    def next_numbers(self):
        """The uniform numbers of this turn, shifted so that the next token's comes first."""
        return self.u[len(self.episode.turns)].roll(-self.written)

    def take_turn(self, ended, vlm):
        """The text of a turn that is over. The next one begins at 0 tokens."""
        ids = self.episode.ids[-self.written:]
        self.written = 0
        return vlm.text(ids[:-1] if ended else ids)


def unfold(vlm, rows, config):
    """Run the episodes of all rows to their ends, as many at a time as the cache has room for."""
    waiting = deque(rows)
    running = Running(vlm, config)
    while waiting or running.rows:
        # Rows begin as far as there is room. A prompt runs through the model once for its group.
        running.admit(waiting)

        # Every row writes, until nearly all have ended their turns.
        ids, logprobs, positions = sample_rows(vlm, running, config)

        # The environment responds to turns that have ended; some episodes are over.
        responses = []
        for row, own_ids, own_logprobs in zip(running.rows, ids, logprobs):
            row.append(own_ids, own_logprobs)
            response = respond(vlm, row, config)
            if response is not None:
                observation, crops = response
                response = own_ids[-1:] + observation, crops    # the last token is not cached yet
            responses.append(response)

        # The rows that go on read the responses.
        running.go_on(responses, positions, waiting)


def sample_rows(vlm, running, config):
    """`sample_turn` for running rows, some of which may be in the middle of their turn."""
    rows = running.rows
    budgets = [config.max_new_tokens - row.written for row in rows]
    n = min(max(budgets), running.round_tokens)
    options = TurnOptions(n, config.temperature, budgets, patience=len(rows) // 8,
                          compiled=config.compiled, graphs=config.graphs)
    u = torch.stack([row.next_numbers()[:n] for row in rows]).to(vlm.device)
    return sample_turn(vlm, running.cache, running.logits, running.positions, u, options)


def respond(vlm, row, config):
    """The environment's response to a row -> (ids, views), or None if the episode is over.

    It is that of `env_step` if the turn is over, and empty if the row is still writing.
    """
    episode = row.episode
    ended = episode.ids[-1] == vlm.im_end
    if not ended and row.written < config.max_new_tokens:
        return [], []
    zooms_left = config.zoom_limit - len(episode.turns)
    opening = config.opening(len(episode.turns))
    text = opening + row.take_turn(ended, vlm)
    return env_step(vlm, episode, text, ended, zooms_left, opening == data.FORCE, config)


# --------------------------------------------------------------------------------------------------
# what the cache saves

def naive_work(vlm, episodes):
    """What a sampler without a cache across turns would have run -> {"tokens", "patches"}.

    Such a sampler runs the whole conversation again each turn, for every member of a group, as TRL
    and both papers' code do. tokens: prefilled; patches: seen by the vision tower. `vlm.work` has
    the same counts for our sampler.
    """
    work = {"tokens": 0, "patches": 0}
    for episode in episodes:
        mask = episode.completion_mask
        for t in range(1, len(mask)):
            if mask[t] and not mask[t - 1]:             # a turn begins
                work["tokens"] += t
                image_tokens = episode.ids[:t].count(vlm.image_token)
                work["patches"] += image_tokens * vlm.processor.merge_size ** 2
    return work
