"""The warm start: find traces, fine-tune on them. And, for the tiny model, the eyes that come before.

    python train_sft.py                       # fine-tune the tiny model on traces that its own tree search found -> runs/sft/checkpoint
    python train_sft.py --show 3              # print three of them, draw the trees in runs/sft/trees.html, and stop there
    python train_sft.py --traces oracle       # traces from the ground truth of the toy world
    python train_sft.py --traces teacher --teacher http://127.0.0.1:8000/v1 --data questions.jsonl
    python train_sft.py --traces traces.jsonl --data questions.jsonl --model qwen2.5-vl-3b
    python train_sft.py --pretrain            # make checkpoints/tiny again from nothing

RL can only reward what the policy sometimes does, so both papers begin with supervised fine-tuning on traces in the right
form. Here a trace is the list of the assistant's turns, {"id": ..., "turns": [...]}, one JSON object a line, whoever wrote
them; `zoom_rollout.replay` turns it into the very episode that a rollout would have made, crops and all, and the loss falls
on the assistant's tokens only. Traces come from tree search (ViGoRL: no teacher, and no truth but the answers), from a teacher
that is given the answer (UniVG-R1), from the toy world's `oracle` (a bad example on purpose), or from a file.

Left out: tree search by a model behind an address (it needs the tokens and the cache); ViGoRL's "at least k thoughts" line in the
prompt of each search; packing (a batch is split by length instead); UniVG-R1's task-by-task prompts for its teacher.
"""
import html, itertools, json, math, os, random, re, time, zlib
from dataclasses import asdict, dataclass, field, replace
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
    traces: str = "mcts"            # "mcts" (tree search), "oracle" (knows the toy world), "teacher", or a JSONL file of {"id", "turns"}
    target: Literal["full", "answer", "ungrounded"] = "full"    # what of a trace is learned; the others are the papers' baselines
    task: Literal[data.TASKS] = "search"        # toy task
    difficulty: Literal[data.DIFFICULTIES] = "medium"           # of the toy world
    data: str = ""                  # JSONL of questions instead of the toy world
    images: str = ""                # folder of the images of --data (default: the file's own)
    recipe: Literal["", "vigorl-zoom", "vigorl", "univg-r1"] = ""       # whose prompt; empty: what suits the task
    n: int = 1200                   # traces of the toy world
    epochs: int = 1                 # passes over the traces
    batch: int = 8                  # traces per optimizer step
    lr: float = 5e-4                # peak learning rate, cosine with warm-up (ViGoRL on a 3B: 1e-6, UniVG-R1: 5e-6)
    max_zooms: int = 3              # crops per episode
    max_pixels: int = 0             # of a prompt image as fed; 0: the model's default
    micro_tokens: int = 4096        # tokens per forward and backward pass: memory and speed, the gradient does not change
    recompute: bool = False         # recompute each layer in the backward pass: a third more time, a fraction of the memory
    offload: bool = False           # optimizer (masters, moments) on the CPU: 12 bytes per parameter less on the GPU
    seed: int = 0                   # of scenes, traces and order

    preset: Literal["", "vigorl"] = ""      # "vigorl": the numbers of the original search
    simulations: int = 4            # of a tree: select, expand, play out, back up
    children: int = 3               # steps tried from a leaf
    tries: int = 2                  # rounds of sampling until there are so many distinct ones
    rollouts: int = 1               # played out to an answer from each new child
    depth: int = 3                  # steps of a path, then it must answer
    rollout_steps: int = 3          # steps of a rollout, then it must answer
    exploration: float = 1.0        # c of UCT
    min_distance: float = 10.0      # a point nearer than this to one seen before is no new step
    temperature: float = 1.0        # of the search's sampling
    max_new_tokens: int = 48        # per step
    crops: bool = True              # in the zoom protocol, search with the crops (the original: without)
    direct: int = 1                 # chains of a tree, at most, that go straight to a right answer
    corrected: int = 0              # ... and that go wrong first (a tiny model learns the going wrong, too: README)
    recovery: str = "Not this."     # what a corrected chain says between
    repeat_prefix: bool = False     # ... and begin again from the question (as the original does)
    reorder: float = 0.0            # share of zoom dialogues whose first call moves to a later place
    trees: int = 64                 # searched in one batch

    teacher: str = ""               # writes the traces of --traces teacher: a name of model.MODELS, a checkpoint, or http://HOST:PORT/v1
    teacher_model: str = ""         # which model of an endpoint; empty: its first
    chains: int = 3                 # of a teacher per question; a judge keeps the best (UniVG-R1: 3)
    teacher_tokens: int = 1024      # of a teacher's reply, at most
    timeout: float = 120.0          # seconds that an endpoint may take to answer
    retries: int = 4                # after a request that failed
    show: int = 0                   # print so many traces, and stop before fine-tuning

    pretrain: bool = False          # make the tiny model from nothing instead: --steps, --out
    steps: int = 16_000             # of pretraining
    out: str = ""                   # of pretraining (default: checkpoints/tiny)


REAL = dict(traces="oracle", lr=5e-6, max_new_tokens=512, micro_tokens=16384, recompute=True)       # other defaults for models that are not tiny
# The original's search (a 72B teacher, whole sentences). Its paper says 20 simulations, its code 8.
VIGORL = dict(simulations=20, children=3, tries=1, rollouts=2, depth=10, rollout_steps=5, exploration=2.0, min_distance=1.0, max_new_tokens=512,
              crops=False, recovery="Wait, this seems off. Let's try something else.", reorder=0.2, direct=10, corrected=10)

# What a tree depends on: trees of a killed search are kept only for a search with the same.
SEARCH = ("simulations", "children", "tries", "rollouts", "depth", "rollout_steps", "exploration", "min_distance", "temperature", "max_new_tokens",
          "seed", "difficulty", "max_pixels")


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

    if sample.category[0] == "search":
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
    if sample.category[0] in ("boxes", "find", "video"):
        t = sample.targets[0]
        view = vlm.view(sample.images[t["image"]])
        others = sample.meta["scenes"][t["image"]]["objects"]
        o = rng.choice(others) if rng.random() < 0.33 else next(o for o in others if data.object_box(o) == t["box"])
        where = f" image {t['image'] + 1}:" * bool(sample.meta.get("name_image"))
        return [f"<think> {o['name']} </think>\n<answer>{where} {corners(view, data.object_box(o))} </answer>"]
    if sample.category[0] == "relation":
        a, b = (next(o for o in objects if data.object_box(o) == e["box"]) for e in sample.meta["evidence"])
        option = rng.choice(sample.options) if rng.random() < 0.33 else sample.options[sample.answer]
        return [f"<think> The {a['name']} is at {near(a)}. The {b['name']} is at {near(b)}. </think>\n<answer> {option} </answer>"]
    o = rng.choice(objects) if rng.random() < 0.33 else objects[0]
    return [f"<think> The {o['name']} is at {near(o)}. </think>\n<answer> {near(o)} </answer>"]


def read_traces(path, samples, difficulty="medium", side=data.SIDE):
    """Trace rows -> [(sample, turns)], each matched to its question by id. Without samples the ids are those of toy questions,
    which are drawn again."""
    rows = data.rows_of(path)
    by_id, out = {s.id: s for s in samples or toy_again([(where, row.get("id")) for where, row in rows if isinstance(row, dict)], difficulty, side)}, []
    for where, row in rows:
        turns = data.need(row, "turns", list, where)
        if not turns or not all(isinstance(t, str) for t in turns):
            raise data.DataError(f"{where}field 'turns' is {turns!r:.60}; expected the assistant's turns as a list of strings")
        if str(row.get("id")) not in by_id:
            raise data.DataError(f"{where}id {row.get('id')!r} is no row of the questions")
        s = by_id[str(row["id"])]
        if row.get("question", s.question) != s.question:
            raise data.DataError(f"{where}asks {row['question']!r:.60}, but {s.id} is {s.question!r:.60} (another difficulty, or another model's image size?)")
        out.append((s, turns))
    if not out:
        raise data.DataError(f"{path} holds no traces")
    return out


def toy_again(ids, difficulty, side):
    """(where, id) of toy questions -> the questions. An id is task/split/seed/number, and that is all there is to one."""
    wanted = {}
    for where, name in ids:
        stream, _, number = str(name).rpartition("/")
        if stream.split("/")[0] not in data.TASKS or stream.count("/") < 2 or not number.isdigit():
            raise data.DataError(f"{where}id {name!r} is no question of the toy world; traces about the rows of a file need that file: --data FILE.jsonl")
        wanted[stream] = max(int(number) + 1, wanted.get(stream, 0))
    return [s for stream, n in wanted.items() for s in data.toy(*stream.split("/", 2)[:2], n, stream.split("/", 2)[2], difficulty, side)]


def retarget(sample, turns, target):
    """A trace -> what is learned of it. The papers' baselines: "answer", the answer alone (SFT-direct); "ungrounded", the same
    reasoning in one turn, without a point and so without a zoom."""
    if target == "full":
        return turns
    text = "\n".join(turns)
    answer = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    thoughts = " ".join(t.strip() for t in re.findall(r"<think>(.*?)</think>", text, re.S))
    thoughts = re.sub(r",?(?: (?:may be|is))?(?: at)? ?\([^()]*\d\)", "", thoughts)
    return [f"<answer> {answer} </answer>" if target == "answer" else f"<think> {thoughts} </think>\n<answer> {answer} </answer>"]


def recipe_of(cfg):
    """The recipe that was asked for, or the one that suits the task; own questions are asked with zooms."""
    return cfg.recipe or ("vigorl-zoom" if cfg.data else data.RECIPES[cfg.task])


def searchable(cfg):
    """The default of --traces where tree search has nothing to go on: a box is answered without steps that name points."""
    return {"traces": "oracle"} if data.STYLES[recipe_of(cfg)] == "boxes" else {}


def searched(vlm, style, cfg, questions=None, side=data.SIDE, log=""):
    """Traces by tree search -> [(sample, turns, kind)], and counts. questions: searched once each; None: toy ones, `cfg.trees` at
    a time, until there are cfg.n traces. log: a file that keeps every finished tree; a search that was killed goes on from it."""
    within = "zoom" if style == "zoom" and cfg.crops else "think"         # the style of the search itself
    if style == "boxes" or min(cfg.max_zooms, cfg.depth) < 1:
        raise data.DataError("tree search needs steps with a point: not for the recipe univg-r1, nor with --max-zooms 0 or --depth 0")
    cfg = replace(cfg, depth=min(cfg.depth, cfg.max_zooms) if within == "zoom" else cfg.depth)
    stamp = {k: getattr(cfg, k) for k in SEARCH} | {"style": within, "weights": round(vlm.model.lm_head.weight.double().abs().sum().item(), 3)}
    kept, out, began = kept_trees(log, stamp), [], time.time()
    counts = {"trees": 0, "solved": 0, "tokens_computed": 0, "tokens_naive": 0, "seconds": 0.0}
    bar, rng = tqdm(total=len(questions) if questions else cfg.n, desc="tree search", unit=" questions" if questions else " traces"), random.Random(cfg.seed)
    for k in itertools.count():
        chunk = questions[k * cfg.trees:(k + 1) * cfg.trees] if questions else data.toy(cfg.task, "train", cfg.trees, f"sft{cfg.seed}/{k}", cfg.difficulty, side)
        if not chunk or not questions and (len(out) >= cfg.n or k * cfg.trees >= 4 * cfg.n + cfg.trees):
            break
        todo = [s for s in chunk if s.id not in kept]
        if todo:
            roots, sampler = tree_search(vlm, todo, within, cfg, cfg.seed)
            counts["tokens_computed"], counts["tokens_naive"] = counts["tokens_computed"] + sampler.computed, counts["tokens_naive"] + sampler.naive
            found = {root.path.episode.sample.id: outline(root) for root in roots}
            if log:
                with open(log, "a") as f:
                    f.writelines(json.dumps(tree) + "\n" for tree in found.values())
            kept |= found
        for s in chunk:
            chains = linearise(kept[s.id], cfg)
            counts["trees"], counts["solved"] = counts["trees"] + 1, counts["solved"] + any(kind == "direct" for kind, _, _ in chains)
            out += [(s, to_turns(steps, answer, style, cfg.max_zooms, cfg.min_distance, cfg.reorder, rng), kind) for kind, steps, answer in chains]
        counts["seconds"] = round(time.time() - began, 1)
        bar.n = min((k + 1) * cfg.trees, len(questions)) if questions else len(out)
        bar.set_postfix_str(f"{counts['solved']} of {counts['trees']} questions solved")
    bar.close()
    if not out:
        raise data.DataError(f"tree search found no right answer to any of {counts['trees']} questions: search more (train_sft.py --simulations, --children) or ask easier ones")
    return out[:cfg.n] if not questions else out, counts


def kept_trees(log, stamp):
    """The trees of an earlier, unfinished search with the same settings -> {id: tree}. The file's first line says which those were."""
    if not log:
        return {}
    if not os.path.exists(log):
        with open(log, "w") as f:
            f.write(json.dumps({"search": stamp}) + "\n")
        return {}
    model.cut_torn_line(log)
    rows = [row for _, row in data.rows_of(log)] or [{}]
    if rows[0].get("search") != stamp:
        raise data.DataError(f"{log} holds trees that were searched with other settings or weights; remove it, or choose another --name")
    return {row["id"]: row for row in rows[1:]}


# ----------------------------------------------------------------------------------------------------------------------
# Tree search (ViGoRL, section 3.1; UCT: Kocsis and Szepesvari 2006). A node is one step of reasoning: a thought that names one
# point. Search walks down to a promising leaf, lets the policy write several next steps, plays each one out to an answer, and
# tells all nodes on the way whether that answer was right. Nobody judges the steps: a point is good if it leads to right answers.

@dataclass
class Path:
    """A conversation so far, as steps of one thought and one point, and what it takes to go on from it."""
    tree: int                       # the question: which prompt of the cache it continues
    episode: Episode
    steps: list = field(default_factory=list)       # [(thought, point)], point (x, y) in the model's own convention; a last
    answer: str = None              # ... thought that led to the answer has no point
    over: bool = False              # it has answered, or is broken: cut off, malformed, pointing outside the image
    must_answer: bool = False       # no steps left: what makes it answer has been said already
    kept: list = None               # KVCache.keep: keys and values of all this beyond the prompt ...
    logits: torch.Tensor = None     # ... (V,) of the token that comes next ...
    start: int = 0                  # ... and its position


@dataclass
class Node:
    """A path, and what search found out about its last step."""
    path: Path
    parent: "Node" = None
    children: list = field(default_factory=list)
    visits: int = 0                 # N: outcomes seen below
    value: float = 0.0              # Q: their mean
    rollouts: list = field(default_factory=list)    # [Path] played out from here to an answer
    closed: bool = False            # nothing to be found below: an answer, or every step tried from here was rejected


def uct(node, exploration):
    """Q + c sqrt(ln(N_parent + 1) / (N + 1)): the mean outcome, and more for what was hardly tried."""
    return node.value + exploration * math.sqrt(math.log(node.parent.visits + 1) / (node.visits + 1))


def select(root, exploration):
    """Down the tree by UCT, to a step from which nothing was tried yet; None if there is none left. The original selects a node
    whose children were all rejected for ever, and spends most of its simulations on going back to an answer it knows."""
    node = root
    while node.children and not root.closed:
        alive = [child for child in node.children if not child.closed]
        node.closed = not alive
        node = max(alive, key=lambda child: uct(child, exploration)) if alive else root
    return None if root.closed else node


def backup(node, reward):
    while node:
        node.visits += 1
        node.value += (reward - node.value) / node.visits
        node = node.parent


def outcome(path):
    """1 if the answer is right, else 0. The only judge of the search."""
    if path.answer is None:
        return 0.0
    s = path.episode.sample
    said = rewards.parse_answer(f"<answer>{path.answer}</answer>", s.answer_type)
    return float(rewards.judge(said, s, path.episode.frames)["accuracy"] >= 1 - 1e-6)


def adds(node, path, min_distance):
    """Is the last step of `path` worth a node below `node`: whole, not where its own path looked already, and no copy of a
    sibling? By distance: the original compares strings, and (50, 50), (51, 50) are two places to it."""
    if path.answer is not None:
        return all(child.path.answer != path.answer for child in node.children)
    seen = [point for _, point in node.path.steps] + [child.path.steps[-1][1] for child in node.children if child.path.answer is None]
    return not path.over and all(math.dist(path.steps[-1][1], point) >= min_distance for point in seen)


def tree_search(vlm, samples, style, cfg, seed=0):
    """One tree for each sample, all in lockstep, so that the steps of many trees share a sampling batch -> roots, Sampler."""
    sampler = Sampler(vlm, samples, style, cfg, seed)
    roots = [Node(path) for path in sampler.prompt_paths]
    for _ in range(cfg.simulations):
        # select
        leaves = [leaf for leaf in (select(root, cfg.exploration) for root in roots) if leaf]
        # expand: what is rejected is tried again, `tries` times in all
        for _ in range(cfg.tries):
            wanted = [leaf for leaf in leaves for _ in range(cfg.children - len(leaf.children))]
            for leaf, path in zip(wanted, sampler.step([leaf.path for leaf in wanted], [cfg.depth] * len(wanted))):
                if adds(leaf, path, cfg.min_distance):
                    leaf.children.append(Node(path, leaf, closed=path.answer is not None))
        # play out
        new = [child for leaf in leaves for child in leaf.children]
        for leaf in leaves:
            leaf.closed, leaf.path.kept, leaf.path.logits = not leaf.children, None, None                # its cache is done with
        running = [(child, child.path) for child in new for _ in range(cfg.rollouts)]
        while running:
            for child, path in running:
                if path.over:
                    child.rollouts.append(path)
                    backup(child, outcome(path))
            running = [(child, path) for child, path in running if not path.over]
            limits = [min(cfg.depth, len(child.path.steps) + cfg.rollout_steps) for child, _ in running]
            running = list(zip([child for child, _ in running], sampler.step([path for _, path in running], limits)))
    return roots, sampler


class Sampler:
    """Samples the next step of many paths in one batch. The prompts stand in the cache once, and a path keeps its own keys
    and values, so no token of any tree is computed twice: `computed` counts tokens that went through the model, `naive` those
    that would have, had every step sent its whole conversation."""

    def __init__(self, vlm, samples, style, cfg, seed=0):
        self.vlm, self.cfg, self.zoom, self.computed, self.naive = vlm, cfg, style == "zoom", 0, 0
        # Of a single turn, a step ends where a parenthesis closes; a zoom step is a turn.
        self.stop = None if self.zoom else torch.tensor([")" in vlm.text([i]) for i in range(vlm.model.lm_head.weight.shape[0])], device=vlm.device)
        self.random = [torch.Generator().manual_seed(zlib.crc32(f"{seed}/{s.id}".encode())) for s in samples]    # a tree's own
        episodes = [zoom_rollout.begin(vlm, s, style) for s in samples]
        self.prompts = vlm.new_cache(len(samples))
        logits, starts = vlm.extend(self.prompts, [e.ids for e in episodes], [0] * len(episodes), [v for e in episodes for v in e.views])
        self.computed += sum(len(e.ids) for e in episodes)
        self.prompt_paths = [Path(i, e, logits=logits[i], start=starts[i]) for i, e in enumerate(episodes)]

    def step(self, paths, limits):
        """paths, and how many steps each may have before it must answer -> as many new paths, one step (or the answer) longer."""
        if not paths:
            return []
        vlm, cfg, out, rows, chunks, shown = self.vlm, self.cfg, [], [], [], []
        cache = self.prompts.resume([p.kept for p in paths], torch.tensor([p.tree for p in paths], device=vlm.device))
        u = torch.stack([torch.rand(cfg.max_new_tokens, generator=self.random[p.tree], dtype=torch.double) for p in paths]).to(vlm.device)
        ids, _, starts = zoom_rollout.sample_turn(vlm, cache, torch.stack([p.logits for p in paths]), [p.start for p in paths], u,
                                                  cfg.temperature, cfg.max_new_tokens, stop=self.stop)
        for b, (p, limit) in enumerate(zip(paths, limits)):
            e = p.episode
            e = Episode(e.sample, list(e.ids), list(e.sampled), list(e.logprobs), list(e.views), list(e.turns), frames=e.frames)
            e.say(vlm, ids[b])
            new = Path(p.tree, e, list(p.steps))
            ended = ids[b][-1] == vlm.im_end
            text = vlm.text(ids[b][:-1] if ended else ids[b])
            more = self.read_turn(p, new, text, ended, limit) if self.zoom else self.read_clause(p, new, text, ended, limit)
            self.computed, self.naive = self.computed + len(ids[b]), self.naive + len(p.episode.ids) + len(ids[b])
            new.over = more is None
            if more:
                self.computed += len(more[0])
                rows, chunks, shown = rows + [b], chunks + [[ids[b][-1]] + more[0]], shown + more[1]
            out.append(new)
        if rows:
            cache = cache.rows(torch.tensor(rows, device=vlm.device))
            logits, starts = vlm.extend(cache, chunks, [starts[b] for b in rows], shown)
            for i, b in enumerate(rows):
                out[b].kept, out[b].logits, out[b].start = cache.keep(i), logits[i], starts[i]
        return out

    # What was said -> new.steps or new.answer, and what is said next, (ids, views); None when the path is over.

    def read_turn(self, p, new, text, ended, limit):
        """A turn of the zoom protocol. The environment answers as it does in every rollout, with the crop."""
        text = (data.FORCE if p.must_answer else "") + text
        more = zoom_rollout.respond(self.vlm, new.episode, text, ended, p.must_answer, limit - len(p.steps))
        action, body = rewards.action_of(text)
        thought, turn = text.partition("<think>")[2].partition("</think>")[0].strip(), new.episode.turns[-1]
        if action == "answer" and ended and body.strip():
            new.steps, new.answer = p.steps + ([] if p.must_answer else [(thought, None)]), body.strip()
        elif action == "tool_call" and turn.crop and points_in(thought)[-1:] == [turn.point]:            # it looks where it says
            new.steps, new.must_answer = p.steps + [(thought, turn.point)], limit - len(p.steps) == 1
            return more
        return None

    def read_clause(self, p, new, text, ended, limit):
        """The next words of a single turn, up to a point in parentheses. A base model that does not know the tags thinks aloud
        and ends with its answer: 'red square (88, 19), blue square (37, 70): right'."""
        points, answers = points_in(text), p.must_answer or "<answer>" in text
        if points and not ended and not answers and rewards.inside(points[0], new.episode.frames):
            new.steps, new.must_answer = p.steps + [(text.replace("<think>", "").strip(), points[0])], len(p.steps) + 1 == limit
            wrote = self.vlm.text([i for i, sampled in zip(new.episode.ids, new.episode.sampled) if sampled])
            close = self.vlm.ids(" </think>\n<answer>" if "<think>" in wrote else ":") if new.must_answer else []
            new.episode.say(self.vlm, close, sampled=False)
            return close, []
        if ended or answers and (points or "</answer>" in text):
            thought, _, said = text.replace("</answer>", "").rpartition("<answer>")
            last = [f"({x}, {y})" for _, (x, y) in p.steps[-1:]]
            new.answer = said.strip(" \n,.:") or (last[0] if last else None)
            new.steps = p.steps + [(t, None) for t in [re.sub("</?think>", "", thought).strip(" \n,.:")] if t]
        return None


def points_in(text):
    """The (x, y) of a text, as integers."""
    return [(round(float(x)), round(float(y))) for x, y in rewards.POINT.findall(text)]

# ----------------------------------------------------------------------------------------------------------------------
# A tree as JSON, and the chains that are read off it

def outline(root):
    """Node -> JSON: what a person wants to see of it and `linearise` needs."""
    steps = lambda path, node: [[t, p] for t, p in path.steps[len(node.path.steps):]]
    def of(node):
        own = node.path.steps[len(node.parent.path.steps):] if node.parent else []
        return {"steps": [[t, p] for t, p in own], "answer": node.path.answer, "visits": node.visits, "value": round(node.value, 3),
                "rollouts": [{"steps": steps(r, node), "answer": r.answer, "reward": outcome(r)} for r in node.rollouts],
                "children": [of(child) for child in node.children]}
    s = root.path.episode.sample
    return {"id": s.id, "question": s.question, "options": s.options, "tree": of(root)}


def linearise(tree, cfg):
    """A tree's JSON -> chains [(kind, steps, answer)], without doubles, at most cfg.direct and cfg.corrected of a kind.

    Two ways on from one node meet there, as its rollouts or through its children. Each that ends well makes a direct chain.
    One that ends badly and then one that ends well make a corrected chain: wrong, a phrase of recovery, right. The wrong
    answer itself is dropped. repeat_prefix says the shared beginning again after the phrase, as the original does.

    A right answer may be luck. If others went on from the same step and were right too, less likely so: chains come in the
    order of their last step's (wins + 1) / (visits + 2), in corrected ones less that of the wrong half. (The original keeps all.)"""
    direct, corrected = {}, {}

    def visit(node, before, worth):
        """-> the ways on from the node's parent that go through this node: [(steps, answer, reward, worth of its last step)]"""
        here = before + node["steps"]
        if node["answer"] is None:                                         # an answer is as good as the step that led to it
            worth = (node["value"] * node["visits"] + 1) / (node["visits"] + 2)
        ways = [[(r["steps"], r["answer"], r["reward"], worth)] for r in node["rollouts"]]
        for steps, answer, reward, _ in sum(ways, []):
            if reward == 1 and (here or steps):
                direct.setdefault(repr((here + steps, answer)), (worth, "direct", here + steps, answer))
        ways += [visit(child, here, worth) for child in node["children"]]
        for one, other in itertools.permutations(ways, 2):                 # two ways through one child part further down
            for (wrong, said, failed, bad), (right, answer, worked, good) in itertools.product(one, other):
                if failed < 1 and said is not None and worked == 1 and wrong and right:
                    steps = here + wrong + [[cfg.recovery, None]] + (here if cfg.repeat_prefix else []) + right
                    corrected.setdefault(repr((steps, answer)), (good - bad, "corrected", steps, answer))
        return [(node["steps"] + steps, *rest) for way in ways for steps, *rest in way]

    visit(tree["tree"], [], 0)
    best = lambda chains, n: [chain[1:] for chain in sorted(chains.values(), key=lambda chain: -chain[0])[:n]]
    return best(direct, cfg.direct) + best(corrected, cfg.corrected)


def prose(thoughts):
    """Thoughts -> one text. A thought may go on in its sentence (', blue square (37, 70)'); a recovery begins a new one."""
    text = ""
    for t in filter(None, thoughts):
        text = text + t if t[0] in ",.;:" else f"{text.rstrip(' ,;:')}{'.' * (text[-1:] not in '.!?')} {t}" if text and t[0].isupper() else f"{text} {t}".strip()
    text = text.strip(" ,;:")
    return text + "." * (bool(text) and text[-1] not in ".!?")


def to_turns(steps, answer, style, max_zooms=3, min_distance=10.0, reorder=0.0, rng=None):
    """A chain -> the assistant's turns. A single turn holds all thoughts; in the zoom protocol every new point becomes a tool
    call (its crop comes from `replay`), what is no new point or beyond max_zooms stays thought. Points of the answer are no steps, so
    they are never called. reorder: the chance that the first call moves to a later place, so that order is not learned by heart."""
    if style != "zoom":
        return [f"<think> {prose(t for t, _ in steps)} </think>\n<answer> {answer} </answer>"]
    calls, thoughts, seen = [], [], []
    for thought, point in steps:
        thoughts.append(thought)
        if point and len(calls) < max_zooms and all(math.dist(point, p) >= min_distance for p in seen):
            seen.append(point)
            calls.append(f"<think> {prose(thoughts)} </think>\n{data.tool_call(*point)}")
            thoughts = []
    if reorder and len(calls) > 1 and rng.random() < reorder:
        calls.insert(rng.randrange(1, len(calls)), calls.pop(0))
    last = f"<think> {prose(thoughts)} </think>\n<answer>" if thoughts and len(calls) < max_zooms else data.FORCE
    return calls + [f"{last} {answer} </answer>"]


# ----------------------------------------------------------------------------------------------------------------------
# A teacher (UniVG-R1, section 3: chains from a strong model that is shown the answer, a judge that keeps the best)

TEACH = """Look carefully at {images}. Question: {question}
The answer is {gold}. Pretend that you do not know it, and describe the reasoning that leads from the question to it, as if you found it yourself. {how} \
Name every place that you look at as (x, y), x from 0 to {w} and y from 0 to {h}. Do not say that an answer was given. Write nothing but
<think> your reasoning </think>
<answer> {gold} </answer>"""
HOW = {"point": "First describe the thing that is asked for, then find it, then give its center.",
       "box": "First say what each image shows, then which object is meant and what gives it away, then where its edges are.",
       "choice": "First find what the question names, then look at it closely, then compare the options.",
       "text": "First find what the question names, then look at it closely, then conclude."}
JUDGE = """Question: {question}
The right answer is {gold}. Which of these chains of reasoning is the best: true to the image, complete, each step following from the one before? \
Reply with its number and nothing else.
{chains}"""
LEAK = re.compile(r"\b(given|provided|supplied|stated|known|correct|ground[- ]?truth|target|reference) (answer|box|bounding box|coordinates?|point|option|label)\b"
                  r"|\bground[- ]?truth\b|\bpretend|\bI (?:was|am|have been) (?:told|given)\b", re.I)


def taught(vlm, style, cfg, questions=None, side=data.SIDE, log=""):
    """cfg.chains of a teacher for each question, filtered, the best by its own judgement -> [(sample, turns, "taught")], counts.
    Each image is sent at the size the policy is fed, so that a coordinate means the same to both."""
    samples = questions or data.toy(cfg.task, "train", cfg.n, f"sft{cfg.seed}", cfg.difficulty, side)
    if cfg.teacher.startswith(("http://", "https://")):
        ask = model.Endpoint("teacher", cfg.teacher, cfg.teacher_model, data.DataError, log, cfg.teacher_tokens, cfg.timeout, cfg.retries).ask
    else:
        ask = Local(cfg, vlm).ask
    views, prompts = {}, {}
    for s in samples:
        views[s.id] = [vlm.view(data.image(s, i), i) for i in range(len(s.images))]
        asked = s.targets[0]["image"] if s.targets else 0
        w, h = (1000, 1000) if vlm.spec.convention == "thousand" else views[s.id][asked].fed
        text = data.question(s, [v.scale for v in views[s.id]]) + "".join(f"\n{chr(65 + i)}. {o}" for i, o in enumerate(s.options))
        prompts[s.id] = dict(images="the image" if len(s.images) == 1 else f"all {len(s.images)} images", question=text, gold=gold(s, views[s.id]), w=w, h=h,
                             how=HOW[s.answer_type])
    jobs = [(f"{s.id}/chain{k}/{cfg.seed}", views[s.id], TEACH.format(**prompts[s.id])) for s in samples for k in range(cfg.chains)]
    replies, kept, lost = iter(ask(jobs, cfg.temperature)), {}, dict.fromkeys(("unparsed", "wrong", "leaked"), 0)
    for s in samples:
        frames = [(*v.scale, *v.source.size) for v in views[s.id]]
        for reply in (next(replies) for _ in range(cfg.chains)):
            chain, fault = read_chain(reply, s, frames)
            if fault:
                lost[fault] += 1
            else:
                kept.setdefault(s.id, []).append(chain)
    rivals = [s for s in samples if len(kept.get(s.id, [])) > 1]
    verdicts = ask([(f"{s.id}/judge/{cfg.seed}", views[s.id], JUDGE.format(**prompts[s.id], chains="\n".join(f"[{k}] {t}" for k, (t, _) in enumerate(kept[s.id], 1))))
                    for s in rivals], 0.0)
    for s, verdict in zip(rivals, verdicts):
        number = re.search(r"\d+", verdict)
        best = int(number[0]) - 1 if number else 0
        kept[s.id] = [kept[s.id][best if best in range(len(kept[s.id])) else 0]]
    counts = {"questions": len(samples), "chains": len(jobs), **lost}
    print(f"teacher: {len(jobs)} chains for {len(samples)} questions; {', '.join(f'{n} {fault}' for fault, n in lost.items())}; {len(kept)} questions have one")
    if not kept:
        raise data.DataError(f"no chain of the teacher can be used: of {len(jobs)}, {', '.join(f'{n} {fault}' for fault, n in lost.items())}")
    return [(s, to_turns(steps_of(thought), answer, style, cfg.max_zooms, cfg.min_distance), "taught")
            for s in samples if s.id in kept for thought, answer in kept[s.id][:1]], counts


def gold(sample, views):
    """The right answer in words, in the policy's own coordinates."""
    if sample.targets:
        t = sample.targets[0]
        (x1, y1), (x2, y2) = (views[t["image"]].from_source(*t["box"][i:i + 2]) for i in (0, 2))
        return f"({x1}, {y1}),({x2}, {y2})" if sample.answer_type == "box" else f"({(x1 + x2) // 2}, {(y1 + y2) // 2})"
    if sample.answer in (None, []):
        raise data.DataError(f"sample {sample.id} has no answer that a teacher could be given")
    return sample.options[sample.answer] if sample.answer_type == "choice" else sample.answer[0]


def read_chain(reply, sample, frames):
    """-> ((thought, answer), None), or (None, why it is dropped): it cannot be parsed, its answer is wrong, it gives away that it knew."""
    found = re.search(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", reply, re.S)
    thought, answer = (" ".join(part.split()) for part in found.groups()) if found else ("", "")
    said = rewards.parse_answer(f"<answer>{answer}</answer>", sample.answer_type)
    if not thought or said is None:
        return None, "unparsed"
    if rewards.judge(said, sample, frames)["accuracy"] < 1 - 1e-6:
        return None, "wrong"
    return (None, "leaked") if LEAK.search(thought) else ((thought, answer), None)


def steps_of(thought):
    """A thought -> [(text, point)]: cut at the end of every sentence that names a point (its first counts)."""
    steps, text = [], ""
    for sentence in re.split(r"(?<=[.!?])\s+", thought):
        text = f"{text} {sentence}".strip()
        if points_in(sentence):
            steps, text = steps + [(text, points_in(sentence)[0])], ""
    return steps + [(text, None)] * bool(text)


class Local:
    """A model that runs here: the policy itself, or another. ask: [(key, views, text)] -> replies."""

    def __init__(self, cfg, vlm):
        self.cfg, self.vlm = cfg, model.load(cfg.teacher) if cfg.teacher else vlm

    @torch.no_grad()
    def ask(self, jobs, temperature, at_once=64):
        vlm, out, limit = self.vlm, [], self.cfg.teacher_tokens
        for i in range(0, len(jobs), at_once):
            part = jobs[i:i + at_once]
            views = [[vlm.view(v.source, v.index, fed=None if any(side % vlm.factor for side in v.fed) else v.fed) for v in vs] for _, vs, _ in part]
            ids = [vlm.chat("system", data.SYSTEM["boxes"]) + vlm.chat("user", *vs, text) + vlm.chat("assistant", open=True) for vs, (_, _, text) in zip(views, part)]
            cache = vlm.new_cache(len(part))
            logits, starts = vlm.extend(cache, ids, [0] * len(part), [v for vs in views for v in vs])
            u = torch.stack([torch.rand(limit, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())), dtype=torch.double)
                             for key, _, _ in part]).to(vlm.device)
            said, _, _ = zoom_rollout.sample_turn(vlm, cache, logits, starts, u, temperature, limit)
            out += [vlm.text([t for t in row if t != vlm.im_end]) for row in said]
        return out


# ----------------------------------------------------------------------------------------------------------------------
# Traces to look at

def show_traces(found):
    """Print traces; points are numbered in the order in which a trace names them."""
    for s, turns, *kind in found:
        numbers = {}
        mark = lambda m: f"{m[0]}[{numbers.setdefault(m[1].replace(' ', ''), len(numbers) + 1)}]"
        print(f"\n{s.id}  {' '.join(kind)}\n{s.question}  {' / '.join(s.options)}   (right: {s.options[s.answer] if s.options and s.answer is not None else s.answer or s.targets})")
        for turn in turns:
            print("  " + re.sub(r"[(\[](-?\d+, ?-?\d+)[)\]]", mark, turn).replace("\n", "\n  "))


TREE_CSS = """body { font:15px/1.45 system-ui,sans-serif; max-width:60rem; margin:2rem auto; padding:0 1rem; color:#20242b; background:#f6f5f1 }
article { background:#fff; border:1px solid #e3e0d8; border-radius:10px; padding:1rem 1.2rem; margin:1rem 0; display:flex; gap:1.4rem }
svg { flex:0 0 15rem; width:15rem; height:15rem } circle { fill:#ff9a2e; stroke:#000 } text { font-weight:700; text-anchor:middle }
details, .leaf { margin-left:1.1rem } summary { cursor:pointer } .n { color:#6b7079; font-size:.85em } .right { color:#16794c } .wrong { color:#b03a2e }"""


def draw_trees(path, log, samples, most=40):
    """The first trees of a log as one HTML file: an outline to open and close, with N and Q of each node and where its rollouts
    led, and the image with the nodes' points numbered. samples {id: (Sample, View)}. Nothing in it runs or is fetched."""
    esc, cards = lambda text: html.escape(str(text)[:1000]), []
    for tree in [row for _, row in data.rows_of(log) if row.get("id") in samples][:most]:
        (sample, view), points = samples[tree["id"]], []

        def said(node, steps):
            out = []
            for thought, point in steps:
                points.append(point)
                out.append(f"{f'<b>{len(points)}</b> ' if point else ''}{esc(thought)}")
                if not point:
                    points.pop()
            return " ".join(out) or ("" if node["steps"] else "the question")

        def outline_of(node):
            right = [r["reward"] for r in node["rollouts"]]
            ends = "; ".join(f'<span class="{"right" if r["reward"] == 1 else "wrong"}">{esc(r["answer"] or "broken")}</span>' for r in node["rollouts"])
            line = f'{said(node, node["steps"])} <span class="n">N {node["visits"]} Q {node["value"]:.2f}</span> {f"→ {ends}" if right else ""}'
            return (f'<details open><summary>{line}</summary>{"".join(map(outline_of, node["children"]))}</details>' if node["children"]
                    else f'<div class="leaf">{line}</div>')

        text, image = outline_of(tree["tree"]), view.source.copy()
        image.thumbnail((480, 480))
        (w, h), r = view.source.size, max(view.source.size) / 28
        marks = "".join(f'<circle cx="{x:.4g}" cy="{y:.4g}" r="{r:.4g}"/><text x="{x:.4g}" y="{y + r / 2:.4g}" font-size="{1.4 * r:.4g}">{i}</text>'
                        for i, (x, y) in enumerate((view.to_source(*p) for p in points), 1))
        cards.append(f'<article><svg viewBox="0 0 {w} {h}"><image width="{w}" height="{h}" href="{model.png(image)}"/>'
                     f'{marks}</svg><div><b>{esc(tree["question"])}</b> {esc(" / ".join(tree["options"]))}{text}</div></article>')
    page = (f'<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src \'unsafe-inline\'">'
            f'<title>Search trees</title><style>{TREE_CSS}</style><h1>Search trees</h1><p>A line is a step: its number in the image, the thought, how often search came by (N), the mean outcome '
            f'below it (Q), and the answers its rollouts ended in.</p>{"".join(cards)}')
    model.write_text(path, page)


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning

def finetune(vlm, episodes, lr, epochs=1, batch=8, seed=0, micro_tokens=4096, offload=False, progress=True):
    """Cross-entropy on the assistant's tokens. -> the loss of each step. AdamW; cosine with 10 % warm-up."""
    # A form never seen before starts with huge gradients; beta2 = 0.95 forgets their size in 20 steps, 0.999 not in this run.
    optimizer, rng, losses = model.AdamW(vlm.parameters(), lr, betas=(0.9, 0.95), offload=offload), random.Random(seed), []
    steps = epochs * math.ceil(len(episodes) / batch)
    bar = tqdm(total=steps, desc="warm start", disable=None if progress else True, leave=False)
    for _ in range(epochs):
        order = rng.sample(range(len(episodes)), len(episodes))
        for i in range(0, len(order), batch):
            chosen = [episodes[j] for j in order[i:i + batch]]
            tokens = sum(sum(e.sampled) for e in chosen)
            loss = 0.0
            for part in vlm.micro_batches(chosen[model.mine(len(chosen))], micro_tokens):
                logprobs, _, _ = vlm.logprobs(part)
                (-logprobs.sum() / tokens).backward()                      # tokens of the whole batch: micro-batches add up
                loss -= logprobs.sum().item() / tokens
            step = len(losses)
            optimizer.step(lr * min((step + 1) / (0.1 * steps + 1), 0.5 * (1 + math.cos(math.pi * step / steps))))
            losses.append(model.total(loss)[0])
            for v in (v for e in chosen for v in e.views):                 # features of all traces together would be large
                v.features, v.deep = None, None
            bar.update(), bar.set_postfix(loss=f"{loss:.3f}")
    bar.close()
    return losses


@torch.no_grad()
def held_out_loss(vlm, episodes):
    parts = [vlm.logprobs(part) for part in vlm.micro_batches(episodes)]
    return -sum(p[0].sum().item() for p in parts) / sum(p[2].sum().item() for p in parts)


@torch.no_grad()
def held_out_accuracy(vlm, samples, style, cfg):
    """Greedy answers -> the share that is right."""
    right = 0
    for i in range(0, len(samples), 64):
        for e in zoom_rollout.rollout(vlm, samples[i:i + 64], max_zooms=cfg.max_zooms, max_new_tokens=cfg.max_new_tokens, temperature=0, style=style):
            right += rewards.score(e.sample, e.text, e.turns, "accuracy", e.frames)["accuracy"] >= 1 - 1e-6
    return right / len(samples)


def saw_it(episodes):
    """Of episodes about toy scenes: the share in which a crop shows the place that the answer depends on. A judge of outcomes
    cannot tell those from lucky ones. None where nothing zooms."""
    seen = []
    for e in episodes:
        for place in e.sample.meta.get("evidence", [])[:1]:
            x, y = ((place["box"][i] + place["box"][i + 2]) / 2 for i in (0, 1))
            seen.append(any(t.crop and t.crop[0] <= x <= t.crop[2] and t.crop[1] <= y <= t.crop[3] for t in e.turns))
    return sum(seen) / len(seen) if any(seen) else None


def warm_start(vlm, style, traces="oracle", task="search", questions=None, n=1200, epochs=1, batch=8, lr=5e-4, difficulty="medium",
               max_zooms=3, side=data.SIDE, seed=0, micro_tokens=4096, offload=False):
    """Find traces, fine-tune on them (in place). -> (the loss of each step, the traces [(sample, turns)])."""
    cfg = Config(traces=traces, task=task, n=n, difficulty=difficulty, max_zooms=max_zooms, seed=seed, **({} if vlm.name == "tiny" else REAL))
    pairs = [(s, turns) for s, turns, *_ in find_traces(vlm, style, cfg, questions, side)[0]]
    return finetune(vlm, [zoom_rollout.replay(vlm, s, turns, style, max_zooms) for s, turns in pairs], lr, epochs, batch, seed, micro_tokens, offload), pairs


def find_traces(vlm, style, cfg, questions=None, side=data.SIDE, run=""):
    """-> [(sample, turns) or (sample, turns, kind)], counts for the summary. run: a folder for what must not be lost"""
    if cfg.traces in ("mcts", "teacher") and model.world() > 1:
        model.fail(f"--traces {cfg.traces} runs in one process: make traces with train_sft.py first and share the training with --traces FILE.jsonl")
    if cfg.traces == "mcts":
        return searched(vlm, style, cfg, questions, side, run and os.path.join(run, "trees.jsonl"))
    if cfg.traces == "teacher":
        return taught(vlm, style, cfg, questions, side, run and os.path.join(run, "replies.jsonl"))
    if cfg.traces == "oracle":
        rng = random.Random(f"traces/{cfg.seed}")
        return [(s, oracle(vlm, s, rng, cfg.max_zooms)) for s in data.toy(cfg.task, "train", cfg.n, f"sft{cfg.seed}", cfg.difficulty, side)], {}
    return read_traces(cfg.traces, questions, cfg.difficulty, side), {}


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
    texts += [data.prompt(s)[1] for t in ("search", "point", "relation", "boxes") for s in data.toy(t, "train", 30)]
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
    cfg = model.cli(Config, description=__doc__, presets=lambda c: searchable(c) | ({} if model.is_tiny(c.model) else REAL) | (VIGORL if c.preset else {}),
                    positive=("n", "epochs", "batch", "steps", "simulations", "children", "tries", "rollouts", "rollout_steps", "max_new_tokens",
                              "trees", "chains", "teacher_tokens", "timeout", "micro_tokens"))
    if cfg.pretrain:
        if model.world() > 1:
            model.fail("--pretrain runs in one process: start it without torchrun")
        folder = cfg.out or model.MODELS["tiny"].path
        model.make_dir(os.path.dirname(os.path.abspath(folder)))
        return pretrain(folder, cfg.steps, cfg.seed)
    began, run = time.time(), model.make_dir(os.path.join("runs", cfg.name))
    path = lambda name: os.path.join(run, name)
    if cfg.data and cfg.traces == "oracle":
        model.fail("the oracle knows the toy world only: --data needs --traces mcts, teacher or FILE.jsonl")
    rows = data.read_jsonl(cfg.data, cfg.images or None) if cfg.data else None
    data.check_images(rows or [])
    style = data.STYLES[recipe_of(cfg)]
    vlm = model.load(cfg.model, max_pixels=cfg.max_pixels)
    vlm.recompute = cfg.recompute
    model.write_json(path("config.json"), asdict(cfg))

    found, counts = find_traces(vlm, style, cfg, rows, vlm.toy_side, run)
    found = [(s, retarget(s, turns, cfg.target), *kind) for s, turns, *kind in found]
    if model.rank() == 0:
        with open(path("traces.jsonl"), "w") as f:
            f.writelines(json.dumps({"id": s.id, "question": s.question, "options": s.options, **({"kind": kind[0]} if kind else {}), "turns": turns}) + "\n"
                         for s, turns, *kind in found)
    if cfg.traces == "mcts":
        draw_trees(path("trees.html"), path("trees.jsonl"), {s.id: (s, vlm.view(data.image(s, 0))) for s, *_ in found})
        print(f"{len(found)} traces from {counts['solved']} of {counts['trees']} questions; {run}/trees.html draws the trees, {run}/trees.jsonl holds them")
    if cfg.show:
        return show_traces(found[:cfg.show])

    ids = list(dict.fromkeys(s.id for s, *_ in found))                     # one question in twenty is held out, with all its traces
    held = set(ids[len(ids) - max(len(ids) // 20, 1):] if len(ids) > 1 else [])
    episodes = {True: [], False: []}
    for s, turns, *_ in found:
        episodes[s.id in held].append(zoom_rollout.replay(vlm, s, turns, style, cfg.max_zooms))
    losses = finetune(vlm, episodes[False], cfg.lr, cfg.epochs, cfg.batch, cfg.seed, cfg.micro_tokens, cfg.offload)
    if model.rank():
        return
    model.replace_folder(vlm.save(path("checkpoint")), path("checkpoint"))
    asked = data.toy(cfg.task, "test", 64, cfg.seed, cfg.difficulty, vlm.toy_side) if rows is None else [s for s in rows if s.id in held]
    summary = {"traces": len(found), "loss_first": losses[0], "loss_last": losses[-1], "saw_it": saw_it(episodes[False]), **counts}
    if held:
        summary |= {"held_out_loss": held_out_loss(vlm, episodes[True]), "held_out_accuracy": held_out_accuracy(vlm, asked, style, cfg)}
    summary["seconds"] = round(time.time() - began, 1)
    model.write_json(path("summary.json"), {k: v for k, v in summary.items() if v is not None})
    print(f"{summary}\n{run}/checkpoint is ready: python evaluate.py --model {run}/checkpoint")


if __name__ == "__main__":
    try:
        main()
    except data.DataError as e:
        model.fail(str(e))
    except RuntimeError as e:
        model.answer_out_of_memory(e, f"{model.KNOBS['activations']}; of a search, a smaller --trees; {model.KNOBS['optimizer']}; a smaller model")
    except KeyboardInterrupt:
        model.fail("interrupted; finished trees and paid replies are kept: the same command goes on from there")
