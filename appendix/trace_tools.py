"""Tools for traces, each behind a flag of train_sft.py.

    show_traces     --show N: print them
    draw_trees      --traces mcts: the page of the search trees
    retarget        --target answer or ungrounded: learn a part of them only
    draw_again      --traces FILE without --data: the toy questions that a file is about
"""
import os
import re

import data
from appendix import files
from zoom_rollout import Trace


def show_traces(traces):
    """Print traces; the points of their thoughts are numbered in the order in which they come."""
    for trace in traces:
        sample = trace.sample
        right = sample.answer or sample.targets
        if sample.options and sample.answer is not None:
            right = sample.options[sample.answer]
        print(f"\n{sample.id}  {trace.kind}")
        print(f"{sample.question}  {' / '.join(sample.options)}   (right: {right})")
        numbers = {}                                    # "(x,y)": its number
        for turn in trace.turns:
            text = re.sub(r"\(-?\d+, ?-?\d+\)", lambda m: with_number(m, numbers), turn)
            print("  " + text.replace("\n", "\n  "))


def with_number(match, numbers):
    """A point of the text and its number, a new one if the point is new."""
    number = numbers.setdefault(match[0].replace(" ", ""), len(numbers) + 1)
    return f"{match[0]}[{number}]"


def draw_trees(vlm, folder, traces, counts, cfg):
    """trees.html: the search trees of the questions that have traces. cfg: train_sft.Config."""
    from appendix import trees_page
    samples = {}                                        # {sample id: (Sample, View)}
    for trace in traces:
        view = vlm.view(files.sample_image(trace.sample, 0))
        samples[trace.sample.id] = (trace.sample, view)
    log = os.path.join(folder, "trees.jsonl")
    trees_page.write_trees_page(os.path.join(folder, "trees.html"), log, samples, cfg)
    print(f"{len(traces)} traces from {counts['solved']} of {counts['trees']} questions; "
          f"{folder}/trees.html draws the trees, {log} holds them")


def retarget(trace, target):
    """A trace -> what is learned of it. Two targets are baselines of the papers:

    full        all of it
    answer      the answer alone (SFT-direct)
    ungrounded  the reasoning and the answer in one turn, without a point and so without a zoom
    """
    if target == "full":
        return trace
    text = "\n".join(trace.turns)
    answer = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    turn = f"<answer> {answer} </answer>"
    if target == "ungrounded":
        thoughts = re.findall(r"<think>(.*?)</think>", text, re.S)
        thought = " ".join(thought.strip() for thought in thoughts)
        thought = re.sub(r",?(?: (?:may be|is))?(?: at)? ?\([^()]*\d\)", "", thought)
        turn = f"<think> {thought} </think>\n{turn}"
    return Trace(trace.sample, [turn], trace.kind)


def draw_again(rows, difficulty, side):
    """Rows of a trace file, [(where, row)] -> the toy questions that they are about, list[Sample].

    An id is task/split/seed/number, and that, the difficulty and the side are all there is to a
    toy question. Raises DataError for other ids.
    """
    wanted = {}                                         # {task/split/seed: questions to draw}
    for where, row in rows:
        if not isinstance(row, dict):                   # refused later, as a row without turns
            continue
        name = row.get("id")
        stream, _, number = str(name).rpartition("/")
        is_toy = stream.split("/")[0] in data.TASKS and stream.count("/") >= 2
        if not is_toy or not number.isdigit():
            raise files.DataError(f"{where}id {name!r} is no question of the toy world; traces "
                                  "about the rows of a file need that file: --data FILE.jsonl")
        wanted[stream] = max(int(number) + 1, wanted.get(stream, 0))
    samples = []
    for stream, n in wanted.items():
        task, split, seed = stream.split("/", 2)
        samples += data.toy(task, split, n, seed, difficulty, side)
    return samples
