"""`python -m appendix.speed search`: tree search against single paths of the same cost.

For how many questions does tree search find a trace that is whole and ends right, and for how many
do k single paths (pass@k), k being as many as fit into the tokens that the search computed? The
paths are sampled step by step like those of the tree, so both need the same form. `as policy` is
one plain rollout in the policy's own prompt and form. In brackets: the share of questions for which
a right trace also looked at the place that the answer depends on; the rest is luck. `naive`: tokens
if every step had sent its whole conversation. Right ends: the share of the single paths, and of the
tree's rollouts, that end right.
"""
import statistics
import time

import data
import rewards
import train_sft
import zoom_rollout
from appendix import evidence, speed_setup, tree_search

TASKS = ("search", "relation")
DIFFICULTIES = ("medium", "hard")


def search(args):
    """-> the fields of the JSON line; prints a line for each task and difficulty."""
    vlm = speed_setup.load_model(args)
    cfg = train_sft.Config()
    totals = {"traces": 0, "seconds": 0.0, "tokens_computed": 0, "tokens_naive": 0}
    rows = []
    print(f"{'':18s}{'as policy':>10s}{'top-1':>11s}{'pass@k':>11s}{'  k':5s}{'tree search':>12s}"
          f"{'tokens':>9s}{'naive':>9s}  right ends: paths, rollouts")
    for task in TASKS:
        for difficulty in DIFFICULTIES:
            row, cost = compare_samplers(vlm, task, difficulty, cfg, args)
            for key in totals:
                totals[key] += cost[key]
            rows.append(row)
            print_row(row, cost)
    return {
        "traces_per_second": round(totals["traces"] / totals["seconds"], 2),
        "tokens_computed": totals["tokens_computed"],
        "tokens_naive": totals["tokens_naive"],
        "correct_share_mcts": mean_of(rows, "mcts"),
        "correct_share_sampling": mean_of(rows, "pass_k"),
        "correct_share_top1": mean_of(rows, "top1"),
        "rows": rows,
    }


def mean_of(rows, key):
    return round(statistics.mean(row[key] for row in rows), 3)


def compare_samplers(vlm, task, difficulty, cfg, args):
    """Search and sample one kind of question -> (row of the table, what the search cost)."""
    samples = data.toy(
        task, "train", args.prompts, f"benchmark{args.seed}", difficulty, vlm.toy_side)
    style = data.PROMPT_STYLES[data.TASK_RECIPES[task]]

    began = time.perf_counter()
    roots, sampler = tree_search.tree_search(vlm, samples, style, cfg, args.seed)
    cost = {"seconds": time.perf_counter() - began, "traces": 0,
            "tokens_computed": sampler.computed, "tokens_naive": sampler.naive}
    for root in roots:
        cost["traces"] += len(tree_search.linearise(tree_search.outline(root), cfg))
    found = [rollouts_below(root) for root in roots]

    once, tokens = single_paths(vlm, samples, style, cfg, 1, args.seed + 1)
    prompts = sum(len(zoom_rollout.begin(vlm, s, style).ids) for s in samples)
    k = max(1, round((sampler.computed - prompts) / (tokens - prompts)))
    several, _ = single_paths(vlm, samples, style, cfg, k, args.seed + 2)

    row = {"task": task, "difficulty": difficulty, "k": k,
           "as_policy": as_policy(vlm, samples, task, style, cfg, args.seed),
           "right_paths": share_right(several), "right_rollouts": share_right(found)}
    for name, paths in (("top1", once), ("pass_k", several), ("mcts", found)):
        row[name] = share_solved(paths)
        row[f"{name}_saw"] = share_solved_by_looking(paths) if task == "search" else row[name]
    return row, cost


def rollouts_below(node):
    """All paths that were played out from a node of the tree, and from those below it."""
    paths = list(node.rollouts)
    for child in node.children:
        paths += rollouts_below(child)
    return paths


def single_paths(vlm, samples, style, cfg, k, seed):
    """k paths for each sample, in the steps of the search but without a tree.

    -> (a list of k paths for each sample, tokens computed)
    """
    sampler = tree_search.Sampler(vlm, samples, style, cfg, seed)
    paths = []
    for path in sampler.prompt_paths:
        paths += [path] * k
    while True:
        going = [i for i, path in enumerate(paths) if not path.over]
        if not going:
            break
        longer = sampler.step([paths[i] for i in going], [cfg.depth] * len(going))
        for i, path in zip(going, longer):
            paths[i] = path
    groups = [paths[first:first + k] for first in range(0, len(paths), k)]
    return groups, sampler.computed


def as_policy(vlm, samples, task, style, cfg, seed):
    """The share of plain rollouts, one per question, that are right and in the right form."""
    config = zoom_rollout.RolloutConfig(
        style=style, max_new_tokens=cfg.max_new_tokens, seed=seed)
    right = 0.0
    for e in zoom_rollout.rollout(vlm, samples, config=config):
        components = rewards.score(
            e.sample, e.text, e.turns, data.TASK_RECIPES[task], e.frames, config.max_zooms)
        right += components["accuracy"] * components["format"]
    return right / len(samples)


def share_solved(groups):
    """The share of questions with a path that ends right."""
    return statistics.mean(any(map(tree_search.outcome, paths)) for paths in groups)


def share_solved_by_looking(groups):
    """The share of questions with a path that ends right and looked at the evidence."""
    solved = []
    for paths in groups:
        right = [path for path in paths if tree_search.outcome(path)]
        solved.append(any(evidence.saw(path.episode) for path in right))
    return statistics.mean(solved)


def share_right(groups):
    """The share of all paths that end right."""
    outcomes = []
    for paths in groups:
        outcomes += map(tree_search.outcome, paths)
    return statistics.mean(outcomes)


def print_row(row, cost):
    cells = {}
    for name in ("top1", "pass_k", "mcts"):
        saw = f" ({row[f'{name}_saw']:.0%})" if row["task"] == "search" else ""
        cells[name] = f"{row[name]:.0%}{saw}"
    label = f"{row['task']}, {row['difficulty']}"
    k = f"  {row['k']}"
    print(f"{label:18s}{row['as_policy']:10.0%}{cells['top1']:>11s}{cells['pass_k']:>11s}{k:5s}"
          f"{cells['mcts']:>12s}{cost['tokens_computed']:9,}{cost['tokens_naive']:9,}"
          f"{row['right_paths']:8.0%}{row['right_rollouts']:8.0%}", flush=True)
