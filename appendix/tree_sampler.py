"""Samples the steps of tree search: many paths, one batch, no token computed twice.

A step is a thought that names one point. In the zoom protocol it is a turn; in a single turn it
ends where the parenthesis of a point closes. What a path has said is read here as steps and an
answer, with the environment of every rollout.

Shapes:  B paths of a batch   V vocabulary
"""
import re
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

import data
import rewards
import zoom_rollout
from appendix import parts
from appendix.chains import points_in
from zoom_rollout import Episode, TurnOptions


class Step(NamedTuple):
    thought: str
    point: tuple            # (x, y) as the model writes it; None: a thought before the answer


@dataclass
class Path:
    """A conversation so far, read as steps, and what is needed to continue it."""
    tree: int                           # number of the question: its prompt in the cache
    episode: Episode
    steps: list = field(default_factory=list)       # list[Step]
    answer: str = None
    over: bool = False                  # it has answered, or its last step is broken
    must_answer: bool = False           # no steps left: the opening of an answer is written already
    kept: list = None                   # keys and values beyond the prompt, see prefix.keep_row
    logits: torch.Tensor = None         # (V,) of the next token
    position: int = 0                   # of the next token

    def add_step(self, step, must_answer):
        self.steps.append(step)
        self.must_answer = must_answer

    def finish(self, answer):
        """The path ends here; answer None: its last step is broken."""
        self.over = True
        self.answer = answer

    def hold(self, kept, logits, position):
        """Store what sampling needs to continue this path."""
        self.kept = kept
        self.logits = logits
        self.position = position

    def release(self):
        """Free what `hold` stored; the path is not continued any more."""
        self.kept = None
        self.logits = None


class Sampler:
    """Samples the next step of many paths in one batch.

    The cache holds each prompt once, and each path its own keys and values beyond the prompt.
    computed: tokens that went through the model; naive: tokens that would have, had every step been
    sampled from its whole conversation anew.
    """

    def __init__(self, vlm, samples, style, cfg, seed=0):
        self.vlm = vlm
        self.is_zoom = style == "zoom"
        # A step is a turn of the zoom protocol; in a single turn it ends with a ")".
        stop_tokens = None if self.is_zoom else tokens_with(")", vlm)
        self.options = TurnOptions(cfg.max_new_tokens, cfg.temperature, stop_tokens=stop_tokens)
        self.generators = [seeded_generator(f"{seed}/{s.id}") for s in samples]     # one per tree
        episodes = [zoom_rollout.begin(vlm, s, style) for s in samples]
        views = [view for e in episodes for view in e.views]
        self.prompts = vlm.new_cache(len(samples))
        logits, positions = parts.prefill(
            vlm, self.prompts, [e.ids for e in episodes], [0] * len(samples), views)
        self.prompt_paths = []                          # the paths of the roots
        for i, e in enumerate(episodes):
            self.prompt_paths.append(Path(i, e, logits=logits[i], position=positions[i]))
        self.computed = sum(len(e.ids) for e in episodes)
        self.naive = 0

    def step(self, paths, limits):
        """Continue each path by one step or its answer -> as many new paths.

        limits: for each path, how many steps it may have before it must answer.
        """
        if not paths:
            return []
        group = torch.tensor([path.tree for path in paths], device=self.vlm.device)
        cache = self.prompts.resume([path.kept for path in paths], group)
        logits = torch.stack([path.logits for path in paths])                       # (B, V)
        positions = [path.position for path in paths]
        turns, _, positions = zoom_rollout.sample_turn(
            self.vlm, cache, logits, positions, self.random_numbers(paths), self.options)

        new_paths = []
        added = []                          # per path: (ids, views) to read, or None: it is over
        for path, limit, ids in zip(paths, limits, turns):
            new = self.copy_with(path, ids)
            added.append(self.read(path, new, ids, limit))
            new_paths.append(new)
            self.computed += len(ids)
            self.naive += len(path.episode.ids) + len(ids)
        self.prepare(cache, new_paths, turns, added, positions)
        return new_paths

    def random_numbers(self, paths):
        """Uniform numbers (B, max_new_tokens), each row from the generator of its tree."""
        rows = []
        for path in paths:
            generator = self.generators[path.tree]
            rows.append(torch.rand(
                self.options.max_new_tokens, generator=generator, dtype=torch.double))
        return torch.stack(rows).to(self.vlm.device)

    def copy_with(self, path, ids):
        """A copy of the path whose episode has the sampled `ids` behind it."""
        episode = path.episode.copy()
        episode.append_sampled(ids)
        return Path(path.tree, episode, list(path.steps))

    def read(self, path, new, ids, limit):
        """Read the sampled ids as a step or an answer into `new`.

        -> what is appended before `new` goes on, (ids, views); None if it is over.
        """
        ended = ids[-1] == self.vlm.im_end
        text = self.vlm.text(ids[:-1] if ended else ids)
        if self.is_zoom:
            return self.read_turn(path, new, text, ended, limit)
        return self.read_clause(path, new, text, ended, limit)

    def read_turn(self, path, new, text, ended, limit):
        """A turn of the zoom protocol: the environment answers it as in every rollout."""
        if path.must_answer:
            text = data.FORCE + text
        zooms_left = limit - len(path.steps)
        observation = zoom_rollout.env_step(
            self.vlm, new.episode, text, ended, zooms_left, forced=path.must_answer)
        turn = new.episode.turns[-1]
        action, body = rewards.action_of(text)
        thought = text.partition("<think>")[2].partition("</think>")[0].strip()
        if action == "answer" and ended and body.strip():
            if not path.must_answer:
                new.add_step(Step(thought, None), must_answer=False)
            new.finish(body.strip())
            return None
        looks_where_it_says = points_in(thought)[-1:] == [turn.point]
        if action == "tool_call" and turn.crop is not None and looks_where_it_says:
            new.add_step(Step(thought, turn.point), must_answer=zooms_left == 1)
            return observation
        new.finish(None)
        return None

    def read_clause(self, path, new, text, ended, limit):
        """The next words of a single turn: up to a point in parentheses, or the answer.

        A base model that does not know the tags thinks aloud and ends with its answer:
        "red square (88, 19), blue square (37, 70): right".
        """
        points = points_in(text)
        answers = path.must_answer or "<answer>" in text
        if points and not ended and not answers and rewards.inside(points[0], new.episode.frames):
            thought = text.replace("<think>", "").strip()
            new.add_step(Step(thought, points[0]), must_answer=len(path.steps) + 1 == limit)
            opening = self.open_answer(new.episode) if new.must_answer else []
            return opening, []
        if ended or answers and (points or "</answer>" in text):
            thought, answer = read_ending(text, path.steps)
            if thought:
                new.add_step(Step(thought, None), must_answer=False)
            new.finish(answer)
        else:
            new.finish(None)
        return None

    def open_answer(self, episode):
        """Append what makes a single turn answer now -> its ids."""
        sampled = [i for i, chosen in zip(episode.ids, episode.completion_mask) if chosen]
        uses_tags = "<think>" in self.vlm.text(sampled)
        ids = self.vlm.ids(" </think>\n<answer>" if uses_tags else ":")
        episode.append_given(ids)
        return ids

    def prepare(self, cache, new_paths, turns, added, positions):
        """Run what was added to the paths that go on, and store what continuing them needs.

        The last token of a turn is not in the cache yet: it goes in with what follows it.
        """
        rows = [b for b, addition in enumerate(added) if addition is not None]
        if not rows:
            return
        chunks = []
        views = []
        for b in rows:
            ids, new_views = added[b]
            chunks.append([turns[b][-1], *ids])
            views += new_views
            self.computed += len(ids)
        cache.keep_rows(torch.tensor(rows, device=self.vlm.device))
        logits, positions = parts.prefill(
            self.vlm, cache, chunks, [positions[b] for b in rows], views)
        for i, b in enumerate(rows):
            new_paths[b].hold(cache.keep_row(i), logits[i], positions[i])


def tokens_with(character, vlm):
    """Which tokens contain the character? -> bool (V,)."""
    size = vlm.model.lm_head.weight.shape[0]
    found = [character in vlm.text([token]) for token in range(size)]
    return torch.tensor(found, device=vlm.device)


def seeded_generator(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def read_ending(text, steps):
    """The last words of a single turn -> (thought before the answer, answer or None).

    Where nothing follows the last point, that point is the answer.
    """
    thought, _, answer = text.replace("</answer>", "").rpartition("<answer>")
    thought = re.sub("</?think>", "", thought).strip(" \n,.:")
    answer = answer.strip(" \n,.:")
    if not answer and steps:
        x, y = steps[-1].point
        answer = f"({x}, {y})"
    return thought, answer or None
