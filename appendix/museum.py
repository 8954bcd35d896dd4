"""A museum of real bugs: what went wrong in published code for RL with images, beside what we do.

    python -m appendix.museum               # every exhibit: effect, their result, ours
    python -m appendix.museum crop          # those whose name contains "crop"

Each exhibit is the faulty logic, written anew in as few lines as show it, and our own with the same
inputs. tests/test_museum.py holds a claim about each that ours meets and the faulty one does not.
Nobody is blamed: these are projects good enough to be read closely. Sources: V = ViGoRL's code
(Gabesarch/grounded-rl e7970c0), U = UniVG-R1's (AMAP-ML/UniVG-R1 44868ea), R = VLM-R1
(om-ai-lab/VLM-R1 90052f4); others are named with their thread.
"""
import argparse
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Callable

import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import data
import evaluate
import grpo
import rewards
import zoom_rollout
from appendix import evaluation_run, run, tree_search
from appendix.vision import View


@dataclass(frozen=True)
class Exhibit:
    """One bug: faulty and ours take the same inputs, of which `example` is one."""
    name: str
    source: str
    effect: str                                         # in one sentence
    faulty: Callable
    ours: Callable
    example: tuple


# --------------------------------------------------------------------------------------------------
# what is trained on

def mask_by_search(parts):
    """parts: [(text, who wrote it)] -> which parts are trained on. Masks one known sentence.

    The sentence that is injected was changed later, the one that is searched for was not.
    """
    known = "I've reached the maximum number of image crops"
    return [known not in text and not text.startswith("<observation>") for text, _ in parts]


def mask_by_provenance(parts):
    """The same from who wrote each part, as Episode.append_sampled and append_given record it."""
    episode = zoom_rollout.Episode(sample=None)
    for _, author in parts:
        if author == "policy":
            episode.append_sampled([0])
        else:
            episode.append_given([0])
    return episode.completion_mask


def weights_of_device_batch(accuracy):
    """accuracy (P, G) of one device -> weight of each prompt, from the mean of the whole batch."""
    return torch.exp(1 - accuracy.mean()).expand(len(accuracy))


def weights_of_groups(accuracy):
    return grpo.difficulty_weights(accuracy, "exp")


def weight_that_unlearns(mean_accuracy):
    """UniVG-R1's log weight of a group."""
    return -math.log(0.02 + mean_accuracy)


def weight_that_stops(mean_accuracy):
    return grpo.difficulty_weights(torch.tensor([[mean_accuracy]]), "log").item()


def advantages_with_cut_episodes(reward, finished):
    """An episode that ran out of turns has no gradient, but its 0 still lowers the group's mean."""
    return grpo.group_advantages(reward) * finished


def advantages_of_finished(reward, finished):
    return grpo.group_advantages(reward, finished=finished)


# --------------------------------------------------------------------------------------------------
# rewards

@dataclass(frozen=True)
class Zoom:
    """A turn that zooms into a point."""
    point: tuple
    text: str = ""
    crop: tuple = (0, 0, 1, 1)
    error: str = None


def reward_without_cap(right, well_formed, num_crops):
    """ViGoRL's multi-turn reward; every further distinct crop adds 0.2 to the form."""
    form = 1 + 0.2 * max(0, num_crops - 1) if well_formed else 0
    return 0.6 * right + 0.4 * form


def reward_with_cap(right, well_formed, num_crops):
    turns = []
    for k in range(num_crops):
        call = data.tool_call(100 * k, 100 * k)
        turns.append(Zoom((100 * k, 100 * k), f"<think> At (1, 1). </think>\n{call}"))
    answer = "<think> At (1, 1). </think>\n<answer> a </answer>"
    turns.append(zoom_rollout.Turn(answer if well_formed else "a"))
    found = {"accuracy": float(right)}
    sample = data.Sample("x", [], "?", "choice", options=["a", "b"], answer=0)
    bonuses = rewards.Bonuses(distinct=0.2)
    parts = rewards.vigorl_zoom(found, sample=sample, turns=turns, frames=[(1, 1, 999, 999)],
                                max_zooms=4, bonuses=bonuses)
    return parts["reward"]


def zooms_counted_anywhere(points, frames):
    """How many different places were looked at, where no point is compared with the image."""
    return len(set(points))


def zooms_counted_inside(points, frames):
    turns = []
    for point in points:
        error = None if rewards.inside(point, frames) else "outside"
        turns.append(Zoom(point, data.tool_call(*point), crop=None if error else (0, 0, 1, 1),
                          error=error))
    bonuses = rewards.Bonuses(distinct=0.2)
    kept = rewards.distinct_bonus(turns, len(points), bonuses)
    any_worked = any(turn.error is None for turn in turns)
    further = round(kept / 0.2)                         # the bonus pays 0.2 for each
    return further + any_worked


def iou_minus_one(a, b):
    """1 is taken off x2 and y2 before the boxes are compared, and added to the overlap's sides."""
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[2] - 1, b[2] - 1), min(a[3] - 1, b[3] - 1)
    overlap = 0
    if left < right and top < bottom:
        overlap = (right - left + 1) * (bottom - top + 1)
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return overlap / (area - overlap)


def match_half_folded(said, gold):
    """Only one side of the comparison is in lower case."""
    return float(said.lower() == gold.strip())


def match_substring(said, gold):
    """The judge of the tree search: is the right answer anywhere in what was said?"""
    def bare(text):
        return re.sub(r"\W", "", text).lower()
    return float(bare(gold) in bare(said))


def answer_on_one_line(text):
    """The answer of a transcript; the dot of the pattern does not match a line break."""
    found = re.search(r"<answer>(.*?)</answer>", text)
    return found[1].strip() if found else None


def answer_on_any_line(text):
    return rewards.parse_answer(text, "text")


def stop_anywhere(said, gold):
    """The kind of a web action, by looking for words in this order, anywhere in it."""
    for word in ("go_back", "stop", "scroll", "click", "type"):
        if word in said:
            return float(word in gold)
    return 0.0


def typed_text_ignored(said, gold):
    """The first bracket of type [12] [red shoes] is the element; the text is never compared."""
    same_word = said.split()[0] == gold.split()[0]
    same_element = re.search(r"\[(.*?)\]", said)[1] == re.search(r"\[(.*?)\]", gold)[1]
    return 0.5 * same_word + 0.5 * same_element


def any_point_grounds(text, frames):
    """A thought is grounded if it names any point, on the image or not."""
    return bool(re.search(r"\(\d+, \d+\)", text))


def valid_points_ground(text, frames):
    return rewards.grounded(text, frames)


# --------------------------------------------------------------------------------------------------
# crops and coordinates

def crop_clipped(size, center, length):
    """The window around a point, cut off where it leaves the image -> (left, top, right, bottom).

    It is then resized to a square, so near a border the picture is squashed.
    """
    (x, y), half = center, length // 2
    return (max(x - half, 0), max(y - half, 0), min(x + half, size[0]), min(y + half, size[1]))


def crop_moved(size, center, length):
    left = zoom_rollout.window_start(center[0], length, size[0])
    top = zoom_rollout.window_start(center[1], length, size[1])
    return left, top, left + length, top + length


def crop_in_wrong_frame(stored, fed, point):
    """The model's point, in the image as it was fed, taken for one in the image as stored."""
    return point


def crop_in_right_frame(stored, fed, point):
    view = View(Image.new("RGB", stored), fed, "pixels")
    return view.to_source(*point)


class StaleSizes:
    """Small images are enlarged, but the line that resizes stands outside the `if`."""

    def __init__(self):
        self.size = None                                # of the last small image

    def feed(self, size):
        if min(size) < 28:
            scale = 28 / min(size)
            self.size = (round(size[0] * scale), round(size[1] * scale))
        return self.size or size                        # later images get the size of that one


def sizes_with_stale(sizes):
    """Sizes of images -> the sizes at which they are fed."""
    feeder = StaleSizes()
    return [feeder.feed(size) for size in sizes]


def sizes_each_its_own(sizes):
    """By the rule that model.VLM.view feeds images by: no side changes the next image's."""
    fed = [smart_resize(height, width, 28, 28 * 28) for width, height in sizes]
    return [(width, height) for height, width in fed]


# --------------------------------------------------------------------------------------------------
# search and evaluation

def visits_with_closed_node(simulations):
    """A tree of two leaves. One has a high value, but all its continuations were rejected.

    -> how often each is visited. The closed one looks best, is chosen, and gives nothing.
    """
    best, other = search_tree()
    visits = {"closed": 0, "open": 0}
    for _ in range(simulations):
        chosen = max((best, other), key=lambda node: tree_search.uct(node, 0.1))
        visits["closed" if chosen is best else "open"] += 1
    return visits


def visits_without_closed_node(simulations):
    best, other = search_tree()
    visits = {"closed": 0, "open": 0}
    for _ in range(simulations):
        chosen = tree_search.select(best.parent, 0.1)
        visits["closed" if chosen is best else "open"] += 1
    return visits


def search_tree():
    """-> (a closed leaf of value 1, an open leaf of value 0), below one root."""
    unfinished = SimpleNamespace(answer=None)
    root = tree_search.Node(unfinished)
    root.add_child(unfinished)
    root.add_child(unfinished)
    best, other = root.children
    tree_search.backup(best, 1.0)
    tree_search.backup(other, 0.0)
    best.close()
    return best, other


def accuracy_of_survivors(outcomes):
    """outcomes: right, wrong, or None where the request failed. Failures go into another file."""
    answered = [outcome for outcome in outcomes if outcome is not None]
    return sum(answered) / len(answered)


def accuracy_of_all(outcomes):
    rows = []
    for i, outcome in enumerate(outcomes):
        rows.append({"id": i, "category": [], "accuracy": float(outcome or 0),
                     "wrong_format": float(outcome is None)})
    return evaluate.count(rows)["accuracy"]


def accuracy_of_always_a(num_questions, seed):
    """What a model that always answers A gets where the right option always comes first."""
    questions = right_first(num_questions)
    return sum(s.answer == 0 for s in questions) / num_questions


def accuracy_of_always_a_shuffled(num_questions, seed):
    questions = evaluation_run.arrange(right_first(num_questions), seed)
    return sum(s.answer == 0 for s in questions) / num_questions


def right_first(num_questions):
    """Questions like those of V*Bench as published: the right option comes first."""
    questions = []
    for i in range(num_questions):
        questions.append(data.Sample(f"q{i}", [], "?", "choice", options=list("abcd"), answer=0))
    return questions


# --------------------------------------------------------------------------------------------------
# the catalogue

CUT = torch.tensor([[True, True, True, False]])         # the last episode ran out of turns
EXHIBITS = [
    Exhibit("injected text is trained on", "V, rollout_multiturn.py",
            "The sentence that forces an answer gets a policy gradient, as if it had been sampled.",
            mask_by_search, mask_by_provenance,
            ([("I look.", "policy"), ("I'll now provide my final answer.", "environment"),
              ("yes", "policy")],)),
    Exhibit("the difficulty weight of a device's batch", "U, grpo_trainer.py",
            "With more than one group on a device, easy and hard prompts get the same weight.",
            weights_of_device_batch, weights_of_groups,
            (torch.tensor([[0.0, 0.0], [1.0, 1.0]]),)),
    Exhibit("the log weight that unlearns", "U, grpo_trainer.py",
            "Above a mean IoU of 0.98 the weight is negative: right answers become less likely.",
            weight_that_unlearns, weight_that_stops, (1.0,)),
    Exhibit("cut episodes lower the mean", "Mini-o3, core_algos.py",
            "Episodes that ran out of turns are masked but score 0, which lifts all the others.",
            advantages_with_cut_episodes, advantages_of_finished,
            (torch.tensor([[1.0, 1.0, 1.0, 0.0]]), CUT)),
    Exhibit("the zoom bonus without a cap", "V, string_match_multiturn",
            "Wrong with four crops (0.64) earns more than right in a broken form (0.60).",
            reward_without_cap, reward_with_cap, (False, True, 4)),
    Exhibit("zooms outside the image count", "V, string_match_multiturn",
            "The bonus for distinct places is paid for points beyond the border.",
            zooms_counted_anywhere, zooms_counted_inside,
            ([(10, 10), (900, 900), (2000, 2000)], [(1, 1, 100, 100)])),
    Exhibit("x2 - 1 in the IoU", "U, qwen_module.py",
            "An overlap that is one unit wide counts as none.",
            iou_minus_one, rewards.iou, ((0, 0, 1, 100), (0, 0, 1, 100))),
    Exhibit("gold that is not folded", "V, string_match_grounded_thinking",
            "A right answer with a capital letter, such as Closer, can never score.",
            match_half_folded, rewards.same_words, ("Closer", "Closer")),
    Exhibit("a judge by substring", "V, judge.py",
            "\"yes and no\" is right whether the answer is yes or no.",
            match_substring, rewards.same_words, ("yes and no", "no")),
    Exhibit("an answer over two lines", "V, string_match_grounded_thinking",
            "A line break inside <answer> loses the answer.",
            answer_on_one_line, answer_on_any_line, ("<answer> left\n</answer>",)),
    Exhibit("stop, found anywhere", "V, web_action",
            "Typing \"bus stop\" is right where the task should have been stopped.",
            stop_anywhere, rewards.web_action, ("type [12] [bus stop]", "stop [yes]")),
    Exhibit("typed text that nobody reads", "V, web_action",
            "Any text typed into the right element is right.",
            typed_text_ignored, rewards.web_action, ("type [12] [hats]", "type [12] [shoes]")),
    Exhibit("any point grounds", "V, *_grounded_thinking",
            "A thought that names a point far outside the image counts as grounded.",
            any_point_grounds, valid_points_ground,
            ("<think> At (5000, 5000). </think>\n<answer> a </answer>", [(1, 1, 100, 100)])),
    Exhibit("crops squashed at the border", "V, _get_point_crop",
            "Near a border the window is cut off and stretched to a square: things change shape.",
            crop_clipped, crop_moved, ((400, 400), (0, 200), 100)),
    Exhibit("crops in the wrong frame", "DeepEyes, issue 141",
            "Points in the resized image cut crops from the stored one: 12 % off, in that report.",
            crop_in_wrong_frame, crop_in_right_frame, ((800, 400), (400, 200), (100, 50))),
    Exhibit("a stale size", "R and U, grpo_trainer.py",
            "After one image below 28 pixels, all later images are shrunk to its size.",
            sizes_with_stale, sizes_each_its_own, ([(300, 200), (14, 14), (300, 200)],)),
    Exhibit("a search that returns to a closed node", "V, MCTS",
            "A node whose continuations were all rejected is chosen again and again.",
            visits_with_closed_node, visits_without_closed_node, (8,)),
    Exhibit("failures leave the denominator", "V, evaluation",
            "Questions whose request failed are written elsewhere, and the accuracy rises.",
            accuracy_of_survivors, accuracy_of_all, ([True, False, None, None],)),
    Exhibit("the right option comes first", "DeepEyes, V* options",
            "A model that always answers A solves the benchmark.",
            accuracy_of_always_a, accuracy_of_always_a_shuffled, (400, 0)),
]


def show(exhibit):
    """One exhibit as text."""
    theirs = exhibit.faulty(*exhibit.example)
    ours = exhibit.ours(*exhibit.example)
    return (f"{exhibit.name} ({exhibit.source})\n    {exhibit.effect}\n"
            f"    there: {in_short(theirs)}\n    here:  {in_short(ours)}\n")


def in_short(value):
    """A result as text; numbers that are not whole with three digits."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(in_short, value))}]"
    return str(value)


def main(argv=None):
    parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="show exhibits whose name contains it")
    word = parser.parse_args(argv).word
    chosen = [exhibit for exhibit in EXHIBITS if word in exhibit.name]
    if not chosen:
        names = "; ".join(exhibit.name for exhibit in EXHIBITS)
        run.fail(f"no exhibit's name contains {word!r}; they are: {names}")
    for exhibit in chosen:
        print(show(exhibit))


if __name__ == "__main__":
    main()
