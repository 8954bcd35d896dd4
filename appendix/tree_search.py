"""Traces by tree search (ViGoRL, 2505.23678, section 3.1): the policy is its own teacher.

    python train_sft.py                     # search, then fine-tune on what was found
    python train_sft.py --show 3            # search, print three traces, draw the trees

A node is one step of reasoning: a thought that names one point. Each simulation walks down to a
promising node (select), lets the policy write several next steps (expand), plays each of them out
to an answer, and tells all nodes above whether that answer was right (back up). Nobody judges the
steps themselves: a point is good if it leads to right answers. UCT: Kocsis and Szepesvari (2006).

The trees of many questions grow in lockstep, so that their steps share one sampling batch, and
every path keeps its keys and values, so that no token is computed twice.

Left out: search by a model behind an address (it needs the tokens and the cache), and ViGoRL's line
"use at least k thoughts" in the prompt of each search.
"""
import itertools
import math
import os
import random
import time
from dataclasses import dataclass, field, replace

from tqdm import tqdm

import data
import rewards
from appendix import files, mixture, run
from appendix.chains import is_far, linearise, to_turns
from appendix.tree_sampler import Path, Sampler
from zoom_rollout import Trace

# The settings that a tree depends on: trees of an interrupted search are used again by a search
# with the same settings only.
SEARCH_SETTINGS = (
    "simulations", "children", "tries", "rollouts", "depth", "rollout_steps", "exploration",
    "min_distance", "temperature", "max_new_tokens", "seed", "difficulty", "max_pixels")


# --------------------------------------------------------------------------------------------------
# the tree

@dataclass
class Node:
    """A path, and what the search has found out about its last step."""
    path: Path
    parent: "Node" = None
    children: list = field(default_factory=list)
    visits: int = 0                     # N: outcomes seen at and below this node
    value: float = 0.0                  # Q: their mean
    rollouts: list = field(default_factory=list)    # list[Path]: played out from here to an answer
    closed: bool = False                # nothing is left to try here or below

    def add_child(self, path):
        """An answer is a leaf for good, so its node is closed from the beginning."""
        self.children.append(Node(path, parent=self, closed=path.answer is not None))

    def add_outcome(self, reward):
        self.visits += 1
        self.value += (reward - self.value) / self.visits

    def close(self):
        self.closed = True


# --------------------------------------------------------------------------------------------------
# the four moves: select, expand, play out, back up

def tree_search(vlm, samples, style, cfg, seed=0):
    """One tree per sample, all in lockstep -> (the roots, the Sampler, which counted tokens).

    style: prompt style of the search, "zoom" or "think"; cfg: train_sft.Config.
    """
    sampler = Sampler(vlm, samples, style, cfg, seed)
    roots = [Node(path) for path in sampler.prompt_paths]
    for _ in range(cfg.simulations):
        # select: one node per tree from which nothing was tried yet
        leaves = []
        for root in roots:
            leaf = select(root, cfg.exploration)
            if leaf is not None:
                leaves.append(leaf)

        # expand: what is rejected is sampled again, cfg.tries times in all
        for _ in range(cfg.tries):
            expand(sampler, leaves, cfg)
        new = []
        for leaf in leaves:
            new += leaf.children
            leaf.path.release()
            if not leaf.children:                       # every step tried from here was rejected
                leaf.close()

        # play out to an answer, and back up
        play_out(sampler, new, cfg)
    return roots, sampler


def select(root, exploration):
    """Walk down by UCT to a node from which nothing was tried yet; None if there is none left.

    A node whose children are all closed is closed too, and the walk begins again. (The original
    goes back to such a node for ever, and spends most simulations on answers it knows.) The root
    may be closed without any children: then every step from it was rejected.
    """
    node = root
    while node.children and not root.closed:
        open_children = [child for child in node.children if not child.closed]
        if open_children:
            node = max(open_children, key=lambda child: uct(child, exploration))
        else:
            node.close()
            node = root
    return None if root.closed else node


def uct(node, exploration):
    """Q + c sqrt(ln(N_parent + 1) / (N + 1)): the mean outcome, and more for the rarely tried."""
    rarity = math.log(node.parent.visits + 1) / (node.visits + 1)
    return node.value + exploration * math.sqrt(rarity)


def expand(sampler, leaves, cfg):
    """Sample the next steps that each leaf lacks of cfg.children; the new ones become children."""
    wanted = []
    for leaf in leaves:
        wanted += [leaf] * (cfg.children - len(leaf.children))
    limits = [cfg.depth] * len(wanted)
    paths = sampler.step([leaf.path for leaf in wanted], limits)
    for leaf, path in zip(wanted, paths):
        if is_new(path, leaf, cfg.min_distance):
            leaf.add_child(path)


def is_new(path, leaf, min_distance):
    """Is the last step of `path` worth a node below `leaf`?

    It must be whole, and its point must be min_distance or more away from those of the steps before
    and of the siblings; an answer must differ from those of the siblings. (The original compares
    strings: (50, 50) and (51, 50) are two places to it.)
    """
    siblings = [child.path for child in leaf.children]
    if path.answer is not None:
        return path.answer not in [sibling.answer for sibling in siblings]
    if path.over:
        return False
    seen = [step.point for step in leaf.path.steps]
    seen += [sibling.steps[-1].point for sibling in siblings if sibling.answer is None]
    return is_far(path.steps[-1].point, seen, min_distance)


def play_out(sampler, children, cfg):
    """Continue each child cfg.rollouts times to an answer; every outcome is backed up.

    A rollout may take cfg.rollout_steps steps, and no more than the depth of the tree; then it must
    answer. (The original counts the answer as a step.)
    """
    running = []                                        # (child, path)
    for child in children:
        running += [(child, child.path)] * cfg.rollouts
    while running:
        unfinished = []
        limits = []
        for child, path in running:
            if path.over:
                child.rollouts.append(path)
                backup(child, outcome(path))
            else:
                unfinished.append((child, path))
                limits.append(min(cfg.depth, len(child.path.steps) + cfg.rollout_steps))
        paths = sampler.step([path for _, path in unfinished], limits)
        running = [(child, path) for (child, _), path in zip(unfinished, paths)]


def outcome(path):
    """1 if the answer is right, else 0: the only judgement in the search."""
    if path.answer is None:
        return 0.0
    sample = path.episode.sample
    answer = rewards.parse_answer(f"<answer>{path.answer}</answer>", sample.answer_type)
    accuracy = rewards.judge(answer, sample, path.episode.frames)["accuracy"]
    return float(accuracy >= 1 - rewards.EPS)


def backup(node, reward):
    """Tell the node and all above it."""
    while node is not None:
        node.add_outcome(reward)
        node = node.parent


# --------------------------------------------------------------------------------------------------
# a tree as JSON

def outline(root):
    """A tree as JSON: what a person wants to see of it, and what `linearise` needs."""
    sample = root.path.episode.sample
    return {"id": sample.id, "question": sample.question, "options": sample.options,
            "tree": outline_node(root, 0)}


def outline_node(node, above):
    """A node with its subtree. above: number of steps that its parent's path has."""
    here = len(node.path.steps)
    rollouts = []
    for path in node.rollouts:
        rollouts.append({"steps": as_lists(path.steps[here:]), "answer": path.answer,
                         "reward": outcome(path)})
    return {"steps": as_lists(node.path.steps[above:]), "answer": node.path.answer,
            "visits": node.visits, "value": round(node.value, 3), "rollouts": rollouts,
            "children": [outline_node(child, here) for child in node.children]}


def as_lists(steps):
    return [[thought, point] for thought, point in steps]


# --------------------------------------------------------------------------------------------------
# traces

def search_traces(vlm, cfg, style, questions=None, side=data.SIDE, log=""):
    """Traces by tree search -> (list[Trace], counts).

    questions: searched once each; None: toy questions, cfg.trees at a time, until there are cfg.n
    traces. side: pixels of a side of a toy scene. log: JSONL file that keeps every finished tree,
    with which an interrupted search continues; empty: none.
    """
    within = "zoom" if style == "zoom" and cfg.crops else "think"       # style of the search itself
    check_searchable(vlm, style, cfg)
    if within == "zoom":
        cfg = replace(cfg, depth=min(cfg.depth, cfg.max_zooms))
    trees = kept_trees(log, search_settings(vlm, cfg, within))          # {digest: tree}
    traces = []
    counts = {"trees": 0, "solved": 0, "tokens_computed": 0, "tokens_naive": 0, "seconds": 0.0}
    began = time.time()
    rng = random.Random(cfg.seed)                                       # for --reorder
    with tqdm(total=len(questions) if questions else cfg.n, desc="tree search",
              unit=" questions" if questions else " traces") as bar:
        for number in itertools.count():
            batch = next_batch(cfg, questions, side, number, len(traces))
            if not batch:
                break
            digests = [files.digest(sample) for sample in batch]
            new = [s for s, digest in zip(batch, digests) if digest not in trees]
            if new:
                trees |= grow_trees(vlm, new, within, cfg, log, counts)
            for sample, digest in zip(batch, digests):
                chains = linearise(trees[digest], cfg)
                counts["trees"] += 1
                counts["solved"] += any(chain.kind == "direct" for chain in chains)
                for chain in chains:
                    turns = to_turns(chain.steps, chain.answer, style, cfg.max_zooms,
                                     cfg.min_distance, cfg.reorder, rng)
                    traces.append(Trace(sample, turns, chain.kind))
            counts["seconds"] = round(time.time() - began, 1)
            solved = f"{counts['solved']} of {counts['trees']} questions solved"
            bar.set_postfix_str(solved, refresh=False)
            bar.update((counts["trees"] if questions else len(traces)) - bar.n)
    if not traces:
        raise files.DataError(
            f"tree search found no right answer to any of {counts['trees']} questions: search more "
            "(train_sft.py --simulations, --children) or ask easier ones")
    return traces if questions else traces[:cfg.n], counts


def check_searchable(vlm, style, cfg):
    if style == "boxes" or cfg.max_zooms < 1 or cfg.depth < 1:
        raise files.DataError("tree search needs steps with a point: not for the recipe univg-r1, "
                              "nor with --max-zooms 0 or --depth 0")
    if not vlm.shares_prompts:
        raise files.DataError("tree search needs the shared cache of appendix/prefix.py: leave out "
                              "--plain, or pass --traces oracle")


def next_batch(cfg, questions, side, number, num_traces):
    """The samples of batch `number`; an empty list when the search is over."""
    first = number * cfg.trees
    if questions:
        return questions[first:first + cfg.trees]
    if num_traces >= cfg.n or first >= 16 * cfg.n + cfg.trees:          # enough, or hopeless
        return []
    seed = f"sft{cfg.seed}/{number}"
    return mixture.toy_questions(cfg, "train", cfg.trees, seed, side)


def grow_trees(vlm, samples, style, cfg, log, counts):
    """Search, log and count -> {digest of the sample: tree}."""
    roots, sampler = tree_search(vlm, samples, style, cfg, cfg.seed)
    counts["tokens_computed"] += sampler.computed
    counts["tokens_naive"] += sampler.naive
    trees = {}
    for sample, root in zip(samples, roots):
        digest = files.digest(sample)
        trees[digest] = {"digest": digest, **outline(root)}
    if log:
        run.append_rows(log, trees.values())
    return trees


def search_settings(vlm, cfg, style):
    """What the trees depend on: settings, style and weights."""
    settings = {name: getattr(cfg, name) for name in SEARCH_SETTINGS}
    weights = vlm.model.lm_head.weight.double().abs().sum().item()
    return {**settings, "style": style, "weights": round(weights, 3)}


def kept_trees(log, settings):
    """The trees of an earlier, interrupted search with the same settings -> {digest: tree}.

    The first line of the log holds the settings; the log is begun if there is none.
    """
    if not log:
        return {}
    if not os.path.exists(log):
        run.append_rows(log, [{"search": settings}])
        return {}
    run.cut_torn_line(log)
    rows = [row for _, row in files.read_rows(log)]
    if not rows or rows[0].get("search") != settings:
        raise files.DataError(f"{log} holds trees that were searched with other settings or "
                              "weights; remove it, or choose another --name")
    return {row.get("digest"): row for row in rows[1:]}
