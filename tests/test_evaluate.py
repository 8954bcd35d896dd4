"""evaluate.py: intervals, averages and comparisons, predictions from the command line, a run that goes on where it stopped, what an
episode did, and a report that nothing written by a model can break. At the end MUTATIONS puts bugs into evaluate.py.

    python -m pytest tests/test_evaluate.py        # no model is loaded
"""
import base64, hashlib, io, json, os, random, re, subprocess, sys, time
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from conftest import Server, check_mutation, names

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data, evaluate, rewards, zoom_rollout
from data import Sample
from zoom_rollout import Episode, Turn

EVIL = """<script>alert(1)</script>"><img src=x onerror=alert(1)></style></svg></pre><!-- ' onload='x' javascript:alert(1) &lt;b&gt; ${7*7}"""


# ----------------------------------------------------------------------------------------------------------------------
# Fakes: real dataclasses, small pictures, no model

def photo(w=200, h=100, color=(90, 120, 60)):
    im = Image.new("RGB", (w, h), color)
    im.paste((200, 40, 40), (w // 2, h // 2, w // 2 + 20, h // 2 + 10))
    return im


def choice(id="c", image=None, **more):
    return Sample(id, [image or photo()], "Which pattern?", "choice", ["lined", "checked"], 1, category=["toy"], **more)


def point(id="p", image=None, **more):
    return Sample(id, [image or photo()], "Click it.", "point", targets=[{"image": 0, "box": [100, 50, 120, 60]}], category=["web", "icon"], **more)


def episode(sample, *turns, recipe="vigorl-zoom", scale=(2.0, 4.0), stop="answer"):
    frames = [(*scale, *data.image(sample, i).size) for i in range(len(sample.images))]
    e = Episode(sample, [1, 2, 3], [False, True, True], [0.0, -0.1, -0.2], [], list(turns), stop, frames, advantage=0.5)
    e.parts = rewards.score(sample, e.text, e.turns, recipe, frames, 3)
    return e


def zoomed(sample=None, answer="checked"):
    """Turn 1 zooms at (55, 14) of a 100 x 25 fed image: source (110, 56). Turn 2 leaves the image, turn 3 answers."""
    return episode(sample or choice(), Turn("<think> at (55, 14) </think>\n" + data.tool_call(55, 14), (55, 14), (90, 36, 130, 76)),
                   Turn("<think> at (999, 1) </think>\n" + data.tool_call(999, 1), (999, 1), None, "The coordinate (999, 1) lies outside the image."),
                   Turn(data.FORCE + f" {answer} </answer>", forced=True))


class Page(HTMLParser):
    """Tags with their attributes, and the text between them, as a browser would find them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.said, self.source = [], "", open(path, encoding="utf-8").read()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, text):
        self.said += text

    def all(self, tag, **attrs):
        return [found for name, found in self.tags if name == tag and all(found.get(k.rstrip("_")) == v for k, v in attrs.items())]


def page(tmp_path, episodes, **more):
    path = str(tmp_path / "report.html")
    evaluate.report(path, more.pop("title", "A title"), episodes if episodes and isinstance(episodes[0], tuple) else [("all", episodes)], **more)
    return Page(path)


# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("correct, n, low, high", [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1),
                                                   (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)])
def test_wilson_against_published_values(correct, n, low, high):
    assert evaluate.wilson(correct, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_is_symmetric_inside_0_1_and_shrinks_with_n():
    for n in (1, 7, 40):
        for k in range(n + 1):
            low, high = evaluate.wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1
            assert evaluate.wilson(n - k, n) == pytest.approx((1 - high, 1 - low))
    widths = [evaluate.wilson(n // 2, n)[1] - evaluate.wilson(n // 2, n)[0] for n in (10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)


def test_summarise_counts_by_category():
    row = lambda accuracy, *category, **more: {"id": "x", "category": list(category), "accuracy": accuracy, "wrong_format": 0.0, **more}
    s = evaluate.summarise([row(1.0, "web", "icon"), row(0.0, "web", "text", wrong_format=1.0), row(1.0, "mobile", "icon"), row(0.0, "mobile", "icon")])
    assert (s["n"], s["correct"], s["accuracy"], s["wrong_format"]) == (4, 2, 0.5, 1)
    assert (s["low"], s["high"]) == evaluate.wilson(2, 4)
    assert list(s["categories"]) == ["web", "icon", "text", "mobile"]
    assert {k: (c["n"], c["correct"]) for k, c in s["categories"].items()} == {"web": (2, 1), "icon": (3, 2), "text": (1, 0), "mobile": (2, 1)}
    assert s["categories"]["text"]["wrong_format"] == 1 and "mean_iou" not in s and "hidden" not in s
    assert json.loads(json.dumps(s)) == s                                      # plain numbers only


def test_summarise_boxes_partial_credit_hidden_gold_and_nothing():
    row = lambda **more: {"id": "x", "category": [], "wrong_format": 0.0, **more}
    s = evaluate.summarise([row(accuracy=0.7, iou=0.7), row(accuracy=0.3, iou=0.3), row(accuracy=1.0, iou=0.5)])    # univg-r1: accuracy is the IoU
    assert (s["correct"], s["mean_iou"]) == (2, pytest.approx(0.5))
    assert evaluate.summarise([row(accuracy=0.5)])["correct"] == 0                      # half of a web action is no right answer
    s = evaluate.summarise([row(accuracy=0.0, hidden=1.0), row(accuracy=1.0)])          # BLINK's test split: no gold, no mistake
    assert (s["n"], s["correct"], s["hidden"]) == (1, 1, 1)
    assert (evaluate.summarise([])["n"], evaluate.summarise([])["accuracy"]) == (0, 0.0)


def test_right_means_the_same_for_every_recipe():
    box = Sample("b", [photo()], "Box it.", "box", targets=[{"image": 0, "box": [0, 0, 100, 100]}])
    for recipe in ("univg-r1", "vigorl", "accuracy"):
        for edge, right in ((100, True), (51, True), (49, False)):
            e = episode(box, Turn(f"<think> x </think>\n<answer> (0, 0),({edge}, 100) </answer>"), recipe=recipe, scale=(1, 1))
            assert evaluate.is_right(e.parts) == right, (recipe, edge)


def test_paired_against_hand_numbers():
    """McNemar: 10 against 2 of 12 is 2 (1 + 12 + 66) / 4096; the rest by hand from Bonett and Price."""
    a = {i: i < 42 for i in range(100)}                                        # right: 0..41
    b = {i: 2 <= i < 52 for i in range(100)}                                   # loses 2, wins 10
    found = evaluate.paired(a, b)
    assert {k: found[k] for k in ("n", "both", "only_a", "only_b", "neither", "difference")} == dict(
        n=100, both=40, only_a=2, only_b=10, neither=48, difference=0.08)
    assert (found["p"], found["low"], found["high"]) == pytest.approx((0.03857, 0.00816, 0.14870), abs=1e-5)
    back = evaluate.paired(b, a)
    assert (back["p"], back["low"], back["high"]) == pytest.approx((found["p"], -found["high"], -found["low"]))
    same = evaluate.paired(a, a)
    assert same["p"] == 1 and same["low"] < 0 < same["high"]                   # no difference seen is not no difference
    large = evaluate.paired({i: i % 2 == 0 for i in range(9000)}, {i: i % 2 == 1 or i < 200 for i in range(9000)})
    assert (large["only_a"], large["only_b"]) == (4400, 4500) and 0.28 < large["p"] < 0.31          # z = 1.05; nothing overflows
    assert evaluate.paired({1: True, 2: False}, {2: True, 3: True})["n"] == 1  # the questions that both have


def rows(benchmark, *cells):
    """(category, right, wrong) ... -> rows for summarise."""
    return [{"id": "x", "category": list(category), "accuracy": float(i < good), "wrong_format": 0.0, "benchmark": benchmark}
            for category, good, bad in cells for i in range(good + bad)]


def test_each_benchmark_averages_by_its_own_rule():
    """Bug: BLINK's micro accuracy printed as its score; the two differ whenever tasks differ in size."""
    blink = evaluate.summarise(rows("blink", (["Counting"], 1, 0), (["Jigsaw"], 0, 9)))
    assert (blink["accuracy"], blink["average"], blink["average_of"]) == (0.1, 0.5, "2 of 14 cells")
    spot = rows("screenspot", (["web", "icon"], 1, 1), (["web", "text"], 3, 0), (["mobile", "icon"], 0, 1), (["mobile", "text"], 1, 0))
    assert evaluate.summarise(spot)["average"] == pytest.approx((0.5 + 1 + 0 + 1) / 4) and evaluate.summarise(spot)["average_of"] == "4 of 6 cells"
    assert evaluate.summarise([{**r, "benchmark": "screenspot_parquet"} for r in spot])["average_of"] == "4 of 6 cells"
    cells = evaluate.summarise(spot)["categories"]
    assert [(name, part["n"], part["correct"]) for name, part in cells.items() if part["n"] < 6] == [
        ("web", 5, 4), ("icon", 3, 1), ("web, icon", 2, 1), ("text", 4, 4), ("web, text", 3, 3), ("mobile", 2, 1), ("mobile, icon", 1, 0), ("mobile, text", 1, 1)]
    assert evaluate.summarise([{**r, "benchmark": "refcoco"} for r in spot])["average_of"] == "2 cells"
    for micro in ("screenspot_v2", "screenspot_pro", "vstar", "sat"):
        s = evaluate.summarise([{**r, "benchmark": micro} for r in spot])
        assert s["average"] == s["accuracy"] == 5 / 7 and s["average_of"] == "all questions"
    assert evaluate.summarise(rows("mine", (["a"], 1, 1)))["average_of"] == "all questions" and "average" not in evaluate.summarise(rows(None, (["a"], 1, 1)))
    assert "average" not in evaluate.summarise(spot + rows("blink", (["Counting"], 1, 0)))
    hidden = rows("blink", (["Jigsaw"], 0, 3))
    assert evaluate.summarise(rows("blink", (["Counting"], 1, 0)) + [{**r, "hidden": 1.0} for r in hidden])["average"] == 1


def test_overlap_of_exactly_one_half_and_at_each_threshold():
    """MIG-Bench counts it, VLM-R1 does not."""
    box = lambda overlap, benchmark="mig_bench": {"id": "x", "category": ["region"], "accuracy": overlap, "iou": overlap, "wrong_format": 0.0, "benchmark": benchmark}
    assert evaluate.summarise([box(0.5)])["average"] == 1 and evaluate.summarise([box(0.5, "vlm-r1")])["average"] == 0
    assert evaluate.summarise([box(0.51, "vlm-r1")])["correct"] == 1
    s = evaluate.summarise([box(v) for v in (0.2, 0.3, 0.5, 0.6, 0.7, 0.9)])
    assert s["iou_at"] == {"0.3": pytest.approx(5 / 6), "0.5": pytest.approx(4 / 6), "0.7": pytest.approx(2 / 6)}


def test_rotations_of_a_question_are_one_piece_of_evidence():
    """Bug: asking each question four times made the interval half as wide."""
    row = lambda of, right: {"id": "x", "of": of, "category": [], "accuracy": float(right), "wrong_format": 0.0}
    s = evaluate.summarise([row(str(q), q % 2 and (q % 4 == 1 or r)) for q in range(40) for r in range(4)])
    assert (s["n"], s["correct"]) == (160, 40 + 30) and (s["low"], s["high"]) == evaluate.wilson(70 / 4, 40)
    assert s["all_rotations"] == 10 / 40


# ----------------------------------------------------------------------------------------------------------------------
# Options in another order

def gold_first(n=400, options=4):
    return [Sample(f"q{i}", ["x.png"], "Which?", "choice", [f"option {k}" for k in range(options)], 0) for i in range(n)]


def test_an_always_first_answer_scores_chance_once_options_are_permuted():
    """Bug: V* and SAT put the right option first; a model that says "A" to all scores 100 %."""
    said = lambda samples: evaluate.summary_of(evaluate.from_predictions(samples, {s.id: "<answer> A </answer>" for s in samples}))
    assert said(gold_first())["accuracy"] == 1
    s = said(evaluate.arrange(gold_first(), seed=0))
    assert s["low"] < 0.25 < s["high"] and s["n"] == 400
    circular = said(evaluate.arrange(gold_first(50), seed=0, circular=True))
    assert (circular["n"], circular["accuracy"], circular["all_rotations"]) == (200, 0.25, 0)
    right = said(evaluate.arrange(gold_first(50, options=2), 0, True))
    assert right["accuracy"] == 0.5


def test_arrange_moves_the_gold_along():
    samples = gold_first(50) + [point("p", "x.png"), Sample("h", ["x.png"], "?", "choice", ["a", "b"], None)]
    for circular, count in ((False, 50), (True, 200)):
        arranged = evaluate.arrange(samples, 3, circular)
        choices = [s for s in arranged if s.answer_type == "choice" and s.answer is not None]
        assert len(choices) == count and len({s.id for s in arranged}) == len(arranged)
        assert all(s.options[s.answer] == "option 0" and [f"option {k}" for k in s.meta["order"]] == s.options for s in choices)
        assert {s.answer for s in choices} == {0, 1, 2, 3} and next(s for s in arranged if s.id == "p") == samples[50]
        assert all(s.answer is None for s in arranged if s.id.startswith("h"))
        for s in choices[:8]:
            e = evaluate.from_predictions([s], {s.id: "B"})[0]
            assert evaluate.right(e) == (s.meta["order"][1] == 0)
    assert evaluate.arrange(samples[7:9], 3) == evaluate.arrange(samples, 3)[7:9]      # by seed and id, whatever stands around it
    assert evaluate.arrange(samples, 4) != evaluate.arrange(samples, 3) and samples == gold_first(50) + samples[50:]


def test_random_choice_lands_on_chance():
    rng, samples = random.Random(5), evaluate.arrange(gold_first(3000), 1)
    s = evaluate.summary_of(evaluate.from_predictions(samples, {s.id: f"<answer> {rng.choice(s.options)} </answer>" for s in samples}))
    assert s["low"] < 0.25 < s["high"] and s["high"] - s["low"] < 0.04 and s["wrong_format"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# What an episode did

def thought(*lines, sample=None, crops=()):
    return evaluate.behaviour(episode(sample or choice(), Turn("<think> " + "\n".join(lines) + " </think>\n<answer> x </answer>"), scale=(1, 1)))


@pytest.mark.parametrize("lines, want", [
    (["The cat is at (10, 10).", "Its tail at (20, 15)."], dict(regions=1)),                        # 11 pixels apart of 200: one place
    (["The cat is at (10, 10).", "A dog at (150, 80)."], dict(regions=2)),
    (["First I look at the cat (10, 10)."], dict(regions=1, subgoals=1)),
    (["First I look at the cat.", "It sits at (10, 10)."], dict(regions=1)),                        # a plan without a point is not grounded
    (["The cat (10, 10).", "A dog (150, 80).", "The cat again (12, 12)."], dict(regions=2, verification=1)),
    (["The cat (10, 10).", "The cat (12, 12)."], dict(regions=1)),                                  # staying is no return
    (["Let me verify the cat at (10, 10)."], dict(regions=1, subgoals=1, verification=1)),
    (["The cat (10, 10).", "Wait, that is a dog.", "The cat is at (150, 80)."], dict(regions=2, backtracking=1)),
    (["The cat (10, 10) is not there, it is at (150, 80)."], dict(regions=2, backtracking=1)),
    (["The cat (10, 10).", "Actually it is at (12, 12).", "A dog (150, 80)."], dict(regions=2)),    # the correction stayed in place
    (["At (500, 10) and (-3, 4)."], dict(regions=0)),                                               # outside the image
    (["Nothing to see; wait, check first."], dict(regions=0)),
])
def test_behaviour_follows_its_rules(lines, want):
    assert thought(*lines) == dict(subgoals=0, verification=0, backtracking=0) | want


def test_behaviour_reads_zooms_and_own_words_only():
    far = Turn("<think> there </think>\n" + data.tool_call(5, 5), (5, 5), (0, 0, 40, 40))
    assert evaluate.behaviour(zoomed())["regions"] == 1                        # a point named and zoomed into; (999, 1) is outside
    e = episode(choice(), *zoomed().turns[:1], far, *zoomed().turns[:1])
    assert {k: evaluate.behaviour(e)[k] for k in ("regions", "verification")} == dict(regions=2, verification=1)
    assert evaluate.behaviour(episode(choice(), Turn(data.FORCE + " checked </answer>", forced=True))) == {}
    assert evaluate.behaviour(episode(choice(), Turn("first check (10, 10)"))) == {}               # no thought
    e = episode(choice(), Turn("<think>" + "((1, 1) wait " * 400_000), Turn("<think>" * 700_000))
    began = time.process_time()
    evaluate.behaviour(e)
    assert time.process_time() - began < 2                                     # 10 MB


def test_pointing_counts_points_where_the_box_is_known():
    known = choice(meta={"evidence": [{"image": 0, "box": [100, 50, 120, 60]}]})
    assert thought("At (110, 55).", "Then (10, 10).", sample=known)["pointed"] == 1
    assert thought("At (110, 55).", "Then (10, 10).", sample=known)["points"] == 2
    e = zoomed(known)                                                          # its zoom at source (110, 56); its thoughts do not count
    assert (evaluate.behaviour(e)["points"], evaluate.behaviour(e)["pointed"]) == (1, 1)
    s = evaluate.summary_of([e, zoomed(choice()), episode(known, Turn("<think> (1, 1) </think>"))])
    assert (s["points"], s["pointing"], s["regions"]) == (2, 0.5, 1) and "points" not in evaluate.behaviour(zoomed())
    two = Sample("t", [photo(), photo()], "?", "point", targets=[{"image": 1, "box": [0, 0, 9, 9]}])
    assert "points" not in thought("At (5, 5).", sample=two)                   # of which image?


# ----------------------------------------------------------------------------------------------------------------------
# A judge that counts the same

def counted(*numbers):
    return json.dumps(dict(zip(evaluate.COUNTS, numbers)))


def ask(replies, *episodes):
    """The judge says these -> (the prompts it was sent, what it counted)"""
    prompts = []

    class Judge:
        model, url = "big-model", "nowhere"

        def ask(self, jobs, temperature):
            prompts.extend(text for _, _, text in jobs)
            return replies[:len(jobs)]
    evaluate.ask_judge(Judge(), {"a run": list(episodes)})
    return prompts, [getattr(e, "judged", None) for e in episodes]


def test_the_judge_is_told_what_the_rules_are():
    """Bug: judge and rules count different things, or the judge sees points in other coordinates than the thoughts'."""
    rules = " ".join(evaluate.behaviour.__doc__.replace(" (MARKERS)", "").split())
    for name in evaluate.COUNTS:
        said = re.search(rf"^- {name}: ([^;\n]*)", evaluate.JUDGE, re.M)[1]
        assert f"{name} {said} " in rules
    silent = episode(choice(), Turn("checked"))
    (prompt,), _ = ask([""], silent, zoomed())
    assert "x from 0 to 100, y from 0 to 25" in prompt and "Which pattern?" in prompt and '{"regions": ...' in prompt and "within a tenth" in prompt
    assert prompt.endswith("\n1. at (55, 14)\n2. It zooms into (55, 14).\n3. at (999, 1)") and evaluate.NEAR == 0.1


@pytest.mark.parametrize("reply, want", [(counted(3, 2, 1, 0), [3, 2, 1, 0]), (f"A draft: {counted(9, 9, 9, 9)}. So:\n```json\n{counted(3, 2, 1, 0)}\n```", [3, 2, 1, 0]),
                                         ("I see three places.", None), ("", None), (counted(3, 2, 1), None), (counted(3, 2, 1, -1), None), (counted(3, 2, 1, 0.5), None),
                                         (counted(3, 2, 1, 10 ** 9), None), (counted(3, 2, 1, "many"), None), (counted(3, 2, 1, 0)[:-1], None)])
def test_only_four_counts_are_a_reply(reply, want):
    _, (silent, judged) = ask([reply], episode(choice(), Turn("checked")), zoomed())
    assert silent is None and judged == (dict(zip(evaluate.COUNTS, want)) if want else {})


def test_agreement_by_hand():
    """Regions by the rules: 1, 1, 1; by the judge: 1, 1, 2. Same in 2 of 3, which is what chance would give; the fourth reply is no count."""
    episodes = [zoomed() for _ in range(5)]
    ask([counted(1, 0, 0, 0), counted(1, 1, 0, 0), counted(2, 0, 0, 0), "?"], *episodes[:4])
    found = evaluate.agreement(episodes)
    assert (found["n"], found["unjudged"]) == (3, 1)
    assert found["regions"] == pytest.approx(dict(judge=4 / 3, rules=1, same=2 / 3, chance=2 / 3))
    assert found["subgoals"] == pytest.approx(dict(judge=1 / 3, rules=0, same=2 / 3, chance=2 / 3)) and found["backtracking"]["same"] == 1
    assert evaluate.agreement(episodes[3:]) == {"n": 0, "unjudged": 1}


# ----------------------------------------------------------------------------------------------------------------------
# A run

class Eyes:
    """A vlm for the rollouts that are faked here."""
    def text(self, ids):
        return "".join({1: "<|image_pad|>", 2: "look", 3: " there"}[i] for i in ids)


class View:
    features, deep, source, fed = "big", "big", "big", (100, 25)


def fake_rollout(monkeypatch, answer=lambda sample, zoom: "checked", fail=lambda samples: None):
    """-> the list of calls: (ids, seed, views, options)"""
    calls = []

    def rollout(vlm, samples, group_size, *, seed, views=None, **options):
        fail(samples)
        calls.append(([s.id for s in samples], seed, views, options))
        episodes = [zoomed(s, answer(s, options["zoom"])) for s in samples]
        for e in episodes:
            e.views = [View()]
        return episodes
    monkeypatch.setattr(zoom_rollout, "rollout", rollout)
    return calls


def test_run_scores_in_order_and_keeps_memory_small(monkeypatch):
    """Batches, seeds and views must go to the rollout together; thousands of decoded screenshots must not stay in memory."""
    calls, saved = fake_rollout(monkeypatch), []
    samples = [choice(str(i)) for i in range(5)]
    episodes = evaluate.run(Eyes(), samples, zoom="black", seed=7, batch=2, progress=False, save=saved.append, keep=2, max_new_tokens=9)
    assert [e.sample.id for e in episodes] == list("01234") and all(e.parts["accuracy"] == 1 for e in episodes)
    assert [(ids, seed) for ids, seed, _, _ in calls] == [(["0", "1"], 7), (["2", "3"], 9), (["4"], 11)]
    assert calls[0][3] == dict(zoom="black", style="zoom", temperature=0.0, skip=0, max_zooms=3, max_new_tokens=9)
    assert all(e.views == [] for e in episodes) and [e for batch in saved for e in batch] == episodes
    assert [bool(e.pieces) for e in episodes] == [True, True, False, False, False]
    assert episodes[4].looked == {"zoom": "black", "crop_from": "source", "fed": (100, 25)}
    calls.clear()
    episodes = evaluate.run(Eyes(), samples, batch=2, progress=False, views=[[i] for i in range(5)])
    assert [views for _, _, views, _ in calls] == [[[0], [1]], [[2], [3]], [[4]]]
    assert all(e.views[0].features == "big" for e in episodes)                 # the caller's views stay encoded


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    def fail(samples):
        if len(samples) > 2:
            raise torch.cuda.OutOfMemoryError
    calls = fake_rollout(monkeypatch, fail=fail)
    samples = [choice(str(i)) for i in range(5)]
    assert [e.sample.id for e in evaluate.run(Eyes(), samples, batch=8, progress=False)] == list("01234")
    assert [ids for ids, *_ in calls] == [["0", "1"], ["2", "3"], ["4"]]
    fake_rollout(monkeypatch, fail=lambda samples: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()))
    with pytest.raises(torch.cuda.OutOfMemoryError):                           # one episode does not fit: no endless loop
        evaluate.run(Eyes(), samples, batch=8, progress=False)


def test_record_is_one_json_row():
    row = json.loads(json.dumps(evaluate.record(zoomed())))
    assert (row["answer"], row["options"], row["stop"], row["advantage"], row["tokens"]) == ("checked", ["lined", "checked"], "answer", 0.5, 2)
    assert row["turns"][0]["crop"] == [90, 36, 130, 76] and row["turns"][0]["point"] == [55, 14] and row["turns"][2]["forced"]
    assert row["turns"][1]["error"] and row["parts"]["accuracy"] == 1
    assert evaluate.record(episode(point(), Turn("")))["answer"] == "(100, 50, 120, 60)"
    assert row["verdict"] == "right" and row["frames"] == [[2, 4, 200, 100]]


def test_an_episode_comes_back_from_its_row():
    """What a stopped run has written is drawn and counted as if it had never stopped."""
    e = zoomed()
    e.looked, e.pieces = {"zoom": "black", "crop_from": "seen", "fed": [100, 25]}, [["a", -0.1], ["b", None]]
    back = evaluate.restore(json.loads(json.dumps(evaluate.record(e))), e.sample)
    assert evaluate.summary_of([back]) == evaluate.summary_of([e]) and evaluate.card({}, back) == evaluate.card({}, e)
    assert evaluate.record(back) == evaluate.record(e) and back.turns == e.turns


# ----------------------------------------------------------------------------------------------------------------------
# --predictions, from the command line

@pytest.fixture
def bench(tmp_path):
    """Two clicks and a choice on 200 x 100 and 400 x 50 pictures. -> (data file, function that runs the command line)"""
    photo().save(tmp_path / "a.png")
    photo(400, 50).save(tmp_path / "b.png")
    wide = Sample("p2", ["b.png"], "Click it.", "point", targets=[{"image": 0, "box": [300, 10, 330, 20]}], category=["web", "text"])
    data.write_jsonl(str(tmp_path / "bench.jsonl"), [point("p1", "a.png"), wide, choice("c1", "a.png")])

    def run(rows, *flags):
        lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
        (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
        evaluate.main(["--data", str(tmp_path / "bench.jsonl"), "--predictions", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "out"), *flags])
        return json.load(open(tmp_path / "out" / "summary.json"))
    return tmp_path, run


def texts(p1, p2, c1="checked"):
    return [{"id": "p1", "text": p1}, {"id": "p2", "text": f"<think> (1, 1) </think>\n<answer> {p2} </answer>"}, {"id": "c1", "text": c1}]


def test_gold_as_prediction_is_all_right(bench, capsys):
    folder, run = bench
    s = run(texts("(110, 55)", "[315, 15]"))
    assert (s["n"], s["correct"], s["accuracy"], s["wrong_format"]) == (3, 3, 1.0, 0)
    assert (s["low"], s["high"]) == evaluate.wilson(3, 3)
    assert {k: c["n"] for k, c in s["categories"].items()} == {"web": 2, "icon": 1, "text": 1, "toy": 1}
    out = capsys.readouterr().out
    assert re.search(r"^predictions +3 +3 +100\.0% +43\.8% to 100\.0% +0$", out, re.M), out
    assert re.search(r"^  icon +1 +1 ", out, re.M)
    rows = [json.loads(line) for line in open(folder / "out" / "episodes.jsonl")]
    assert [r["id"] for r in rows] == ["p1", "p2", "c1"] and rows[1]["turns"][0]["text"].startswith("<think>")
    assert "predictions" in open(folder / "out" / "report.html").read()


@pytest.mark.parametrize("convention, p1, p2", [("source", "(110, 55)", "(315, 15)"), ("0-1000", "(550, 550)", "(787, 300)"), ("0-1", "(0.55, 0.55)", "(0.787, 0.3)"),
                                                ("fed", "(92, 46)", "(265, 8)")])
def test_convention_is_a_flag_and_never_guessed(bench, convention, p1, p2):
    """The right place in one convention is another place in the others. fed: 200 x 100 -> 168 x 84, 400 x 50 -> 336 x 28."""
    _, run = bench
    flags = ["--max-pixels", str(28 * 28 * 21)] if convention == "fed" else []
    assert run(texts(p1, p2), "--convention", convention, *flags)["correct"] == 3
    for other in {"source", "0-1000", "0-1"} - {convention}:
        s = run(texts(p1, p2), "--convention", other)
        assert (s["correct"], s["wrong_format"]) == (1, 0)                     # the choice has no coordinates; the points miss


def test_fed_pixels_are_those_of_the_family(tmp_path, monkeypatch, capsys):
    """Bug: sides rounded to multiples of 28 for a model whose patches make it 32. A photo of 900 x 500 is fed as 896 x 504, or as 896 x 512."""
    photo(900, 500).save(tmp_path / "a.png")
    data.write_jsonl(str(tmp_path / "b.jsonl"), [point(image="a.png")])
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "p", "text": "(110, 55)"}))
    heights = {}
    for name in ("qwen2.5-vl-3b", "qwen3-vl-2b"):
        monkeypatch.setattr(evaluate, "record", lambda e: heights.update({name: e.frames[0][1]}) or {})
        evaluate.main(["--data", str(tmp_path / "b.jsonl"), "--predictions", str(tmp_path / "t.jsonl"), "--convention", "fed", "--model", name, "--out", str(tmp_path / name)])
        assert f"pixels of the image as fed to {name}, 2,850,000 at most" in capsys.readouterr().out
    assert heights == {"qwen2.5-vl-3b": 500 / 504, "qwen3-vl-2b": 500 / 512}


def test_missing_and_unreadable_predictions_count_as_wrong_format(bench, capsys):
    _, run = bench
    s = run([{"id": "p2", "text": "(315, 15)"}, {"id": "p1", "text": "somewhere on the left"}])
    assert (s["n"], s["correct"], s["wrong_format"]) == (3, 1, 2)
    assert s["categories"]["toy"] == {"n": 1, "correct": 0, "accuracy": 0.0, "low": 0.0, "high": pytest.approx(0.7935, abs=1e-4), "wrong_format": 1}
    assert "1 of 3 samples have no prediction" in capsys.readouterr().out


@pytest.mark.parametrize("row, said", [('{"id": "p1", "text": ', "line 2: not JSON"), ('["p1", "x"]', "line 2: field 'id' is missing"),
                                       ({"text": "x"}, "line 2: field 'id' is missing"), ({"id": "p1"}, "line 2: field 'text' is missing"),
                                       ({"id": "p1", "text": 7}, "line 2: field 'text' is 7; expected str"),
                                       ({"id": "c1", "text": "lined"}, "line 2: id 'c1' has a prediction already"),
                                       ({"id": "p9", "text": "x"}, "line 2: id 'p9' is not in the data; expected one of its 3 ids, such as 'p1'")])
def test_a_bad_row_is_named(bench, capsys, row, said):
    folder, run = bench
    with pytest.raises(SystemExit) as stop:
        run([{"id": "c1", "text": "checked"}, row])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: {folder}/texts.jsonl, {said}" in err and err.count("\n") == 1
    assert not os.path.exists(folder / "out" / "summary.json")


def test_wrong_use_is_one_line(bench, capsys):
    folder, run = bench
    good = texts("(110, 55)", "(315, 15)")
    for flags, said in ((["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"), (["--batch", "0"], "--batch and --max-new-tokens must be at least 1"),
                        (["--circular"], "--circular asks a model again"), (["--compare", "x"], "--compare needs two folders"),
                        (["--predictions", "nowhere.jsonl"], "cannot read nowhere.jsonl"), (["--out", "/proc/x"], "cannot write into /proc/x"),
                        (["--judge", "localhost:8000"], "--judge is 'localhost:8000'; expected an address"),
                        (["--convention", "fed", "--model", "other"], "--convention fed needs --max-pixels")):
        with pytest.raises(SystemExit) as stop:
            run(good, *flags)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: " + said) and err.count("\n") == 1, err
    data.write_jsonl(str(folder / "bench.jsonl"), [choice("c1", "a.png"), choice("c1", "b.png")])
    with pytest.raises(SystemExit):
        run([])
    assert "holds the id 'c1' twice" in capsys.readouterr().err


@pytest.mark.parametrize("kind, text, right, unreadable", [
    ("point", "<answer> (110, 55) </answer> no, <answer> (3, 3) </answer>", 0, 0), ("point", "<answer> (3, 3) </answer> <answer> (110, 55) </answer>", 1, 0),
    ("point", '```json\n[{"point_2d": [110, 55], "label": "(3, 3)"}]\n```', 1, 0), ("point", "<answer> (110.4, 55.0) </answer>", 1, 0),
    ("point", "<answer> (-110, 55) </answer>", 0, 0), ("point", "<answer> (110, 55), (3, 3) </answer>", 0, 0), ("point", "<answer> left </answer>", 0, 1),
    ("point", "<answer> (1e2, 55) </answer>", 0, 1), ("point", "x" * 10_000_000 + "<answer> (110, 55) </answer>", 1, 0),
    ("point", "<answer> (NaN, inf) </answer>", 0, 1), ("point", EVIL, 0, 1), ("point", "(" * 3_000_000, 0, 1),
    ("box", "<think> (100, 50),(120, 60) </think>", 0, 1), ("box", "<think> (100, 50),(120, 60) </think> <answer> (0, 0),(9, 9) </answer>", 0, 0),
    ("box", "<think> (0, 0),(9, 9) </think> <answer> (100, 50),(120, 60) </answer>", 1, 0), ("box", "<answer> (120, 60),(100, 50) </answer>", 0, 0),
    ("box", '{"bbox_2d": [100, 50, 120, 60.0]}', 1, 0), ("box", "<answer> (-100, -50),(120, 60) </answer>", 0, 0), ("box", "<answer> (110, 55) </answer>", 0, 1),
    ("choice", "<answer> lined </answer> <answer> checked </answer>", 1, 0), ("choice", "<answer> lined or checked </answer>", 0, 0),
    ("choice", "<answer>" + EVIL + "</answer>", 0, 0), ("choice", "<answer> B) lined </answer>", 0, 0), ("choice", "", 0, 1)])
def test_adversarial_predictions_are_scored_by_the_rule(kind, text, right, unreadable):
    samples = {"point": point(image="x.png"), "choice": choice(image="x.png"),
               "box": Sample("b", ["x.png"], "Box it.", "box", targets=[{"image": 0, "box": [100, 50, 120, 60]}])}
    e = evaluate.from_predictions([samples[kind]], {samples[kind].id: text})[0]
    assert (evaluate.right(e), e.parts["wrong_format"]) == (right, unreadable)
    assert evaluate.record(e)["verdict"] == ("right" if right else "wrong")


def test_ten_thousand_predictions_in_ten_seconds():
    """No image exists here; none may be opened."""
    samples = [point(str(i), "x.png") if i % 2 else choice(str(i), "x.png") for i in range(10_000)]
    said = {s.id: f"<think> First look at ({i % 200}, 50). " + "It is here, at (110, 55). " * 10 + "</think> <answer> (110, 55) </answer>" for i, s in enumerate(samples)}
    began = time.process_time()
    episodes = evaluate.from_predictions(samples, said)
    s = evaluate.summary_of(episodes)
    assert [evaluate.record(e) for e in episodes] and time.process_time() - began < 10
    assert (s["n"], s["correct"], s["wrong_format"], s["subgoals"]) == (10_000, 5_000, 0, 1)


CAT = "<think> First the cat (10, 10). Wait, the dog (150, 80). </think>\n<answer> checked </answer>"


def test_judge(bench, capsys):
    """Claim: what thought something is judged; the counts stand beside the rules' in rows, summary, report and on the screen; the same command
    asks for nothing twice, and without --judge nothing changes."""
    folder, run = bench
    plain, rows = run(texts("(110, 55)", "(315, 15)", CAT)), texts("(110, 55)", "(315, 15)", CAT)
    read = lambda: [json.loads(line) for line in open(folder / "out" / "episodes.jsonl")]
    before = read()
    with Server(lambda text: counted(3, 1, 0, 1) if "the cat" in text else "No idea.") as server:
        s = run(rows, "--judge", server.url)
        assert [b["temperature"] for b in server.asked] == [0.0] * 2 and {b["model"] for b in server.asked} == {"big-model"}
        assert run(rows, "--judge", server.url) == s and len(server.asked) == 2
        run(rows, "--judge", server.url, "--judge-model", "another")
        assert [b["model"] for b in server.asked[2:]] == ["another"] * 2       # another judge, other replies
    judged = s.pop("judged")
    assert s == plain and (judged["n"], judged["unjudged"]) == (1, 1)
    assert judged["regions"] == dict(judge=3, rules=2, same=0, chance=0) and judged["backtracking"] == dict(judge=1, rules=1, same=1, chance=1)
    after = read()
    assert [r.pop("judged", None) for r in after] == [None, {}, dict(zip(evaluate.COUNTS, (3, 1, 0, 1)))] and after == before
    assert len(open(folder / "out" / "judge.jsonl").readlines()) == 4
    line = "regions 3.00 (rules 2.00; same 0%, by chance 0%)"
    assert f"judge, predictions (1, 1 unjudged): {line}, subgoals 1.00" in capsys.readouterr().out
    assert line[8:] in Page(folder / "out" / "report.html").said


def test_a_judge_that_dies(bench, capsys, hurry):
    """Claim: a dead server is one clear line, before any work; one that dies half way too, and what it said is not asked for again."""
    folder, run = bench
    rows = texts("(110, 55)", "(315, 15)", CAT)
    with pytest.raises(SystemExit) as stop:                                    # nobody listens there
        run(rows, "--judge", "http://127.0.0.1:9/v1")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: judge at http://127.0.0.1:9/v1/models: URLError") and err.count("\n") == 1
    assert not (folder / "out" / "episodes.jsonl").exists()
    with Server(lambda text: counted(1, 1, 1, 1), lambda n: 401 if n > 1 else None) as server, pytest.raises(SystemExit) as stop:
        run(rows, "--judge", server.url)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "HTTP 401" in err and err.count("\n") == 1 and not (folder / "out" / "summary.json").exists()
    with Server(lambda text: counted(1, 1, 1, 1)) as server:
        assert run(rows, "--judge", server.url)["judged"]["n"] == 2 and len(server.asked) == 1
    (folder / "out" / "judge.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(SystemExit):
        run(rows, "--judge", "http://127.0.0.1:9/v1")
    assert "judge.jsonl holds a line that is no reply of a judge" in capsys.readouterr().err


def test_a_finished_run_can_be_judged(tmp_path, monkeypatch):
    """Bug: --judge counts as another setting, and the model must be asked again; or only the first of the zoom modes is judged."""
    monkeypatch.setattr(evaluate.model, "load", lambda *_, **__: Eyes())
    calls = fake_rollout(monkeypatch)
    command = ["--data", choices(tmp_path, 2), "--zoom", "all", "--out", str(tmp_path / "out")]
    whole = evaluate.main(command)
    calls.clear()
    with Server(lambda text: counted(1, 0, 0, 0)) as server:
        s = evaluate.main([*command, "--judge", server.url])
        assert not calls and len(server.asked) == 6                            # three modes of two questions
    assert {zoom: part.pop("judged")["n"] for zoom, part in s["modes"].items()} == dict(on=2, off=2, black=2)
    assert s.pop("judged")["regions"] == dict(judge=1, rules=1, same=1, chance=1) and s == whole
    assert evaluate.main(command) == whole and not calls


def test_compare(bench, capsys):
    """Two models over the same questions, from the command line."""
    folder, run = bench
    a, b, out = (str(folder / name) for name in "abc")
    for to, rows in ((a, texts("(110, 55)", "(3, 3)", "lined")), (b, texts("(110, 55)", "(315, 15)", "checked"))):
        run(rows)
        os.rename(folder / "out", to)
    capsys.readouterr()
    found = evaluate.main(["--compare", a, b, "--out", out])
    assert {k: found[k] for k in ("n", "both", "only_a", "only_b", "neither", "p")} == dict(n=3, both=1, only_a=0, only_b=2, neither=0, p=0.5)
    assert json.load(open(f"{out}/compare.json"))["difference"] == pytest.approx(2 / 3)
    assert f"right only in {a}: 0; only in {b}: 2; in both: 1" in capsys.readouterr().out
    rows = [json.loads(line) for line in open(f"{b}/episodes.jsonl")]
    for change, said in (([{**r, "question": "?"} for r in rows], "not the same data"), ([{**r, "id": "z"} for r in rows], "share no question"),
                         ([{"step": 1}], "line 1: field 'run' is missing")):
        open(f"{b}/episodes.jsonl", "w").writelines(json.dumps(r) + "\n" for r in change)
        with pytest.raises(SystemExit):
            evaluate.main(["--compare", a, b, "--out", out])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["--compare", a, str(folder / "nowhere")])
    assert "cannot read" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Runs that stop and go on

def choices(folder, n=7):
    photo().save(folder / "a.png")
    data.write_jsonl(str(folder / "c.jsonl"), [Sample(f"c{i}", ["a.png"], "?", "choice", ["lined", "checked", "barred"], 1, category=[f"k{i % 2}"])
                                               for i in range(n)])
    return str(folder / "c.jsonl")


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, monkeypatch, capsys):
    """Bug: a run killed after hours starts from nothing, or counts a question twice."""
    monkeypatch.setattr(evaluate.model, "load", lambda *_, **__: Eyes())
    file, stop = choices(tmp_path), []

    def fail(samples):
        if samples[0].id == "c4" and stop:
            raise KeyboardInterrupt
    calls = fake_rollout(monkeypatch, lambda s, zoom: "checked" if s.id in ("c1", "c5") else "lined", fail)
    command = lambda out, *more: ["--data", file, "--batch", "2", "--seed", "3", "--out", str(tmp_path / out), *more]
    whole = evaluate.main(command("whole"))
    assert [seed for _, seed, _, _ in calls] == [3, 5, 7, 9] and whole["correct"] == 2
    calls.clear()
    stop.append(1)
    with pytest.raises(SystemExit):
        evaluate.main(command("cut"))
    path = tmp_path / "cut" / "episodes.jsonl"
    assert [json.loads(line)["id"] for line in open(path)] == ["c0", "c1", "c2", "c3"] and not (tmp_path / "cut" / "summary.json").exists()
    open(path, "a").write('{"run": "zoom allowed", "id": "c4", "que')           # killed in the middle of a row
    stop.clear()
    calls.clear()
    assert evaluate.main(command("cut")) == whole
    assert [(ids, seed) for ids, seed, _, _ in calls] == [(["c4", "c5"], 7), (["c6"], 9)]
    assert open(path).read() == open(tmp_path / "whole" / "episodes.jsonl").read()
    assert open(tmp_path / "cut" / "report.html").read() == open(tmp_path / "whole" / "report.html").read()
    calls.clear()
    assert evaluate.main(command("cut", "--drawn", "1")) == whole and not calls          # finished: nothing is asked again
    capsys.readouterr()
    os.utime(file, (1, 1))                                                     # the same name, another file
    for more, said in ((["--temperature", "1"], "temperature (0.0 there, 1.0 here)"), ([], "the file of --data")):
        with pytest.raises(SystemExit):
            evaluate.main(command("cut", *more))
        err = capsys.readouterr().err
        assert f"error: {tmp_path}/cut holds a run with other settings" in err and said in err and "--fresh" in err and err.count("\n") == 1
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(SystemExit):                                            # nor may predictions overwrite it
        evaluate.main(command("cut", "--predictions", str(tmp_path / "p.jsonl")))
    assert evaluate.main(command("cut", "--fresh")) == whole and len(calls) == 4


def test_options_are_permuted_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.model, "load", lambda *_, **__: Eyes())
    fake_rollout(monkeypatch, lambda s, zoom: "B")
    file = choices(tmp_path, 30)
    command = lambda out, *more: evaluate.main(["--data", file, "--out", str(tmp_path / out), "--drawn", "0", *more])
    assert command("as published", "--no-shuffle")["accuracy"] == 1
    assert 0 < command("permuted")["correct"] < 30
    circular = command("circular", "--circular")
    assert (circular["n"], circular["correct"], circular["chance"]) == (90, 30, pytest.approx(1 / 3))
    assert len({json.loads(line)["id"] for line in open(tmp_path / "circular" / "episodes.jsonl")}) == 90


def test_a_real_model_may_say_more(tmp_path, monkeypatch, capsys):
    """Bug: a thought of a real model is cut off after the 64 tokens that the tiny one needs, and counts as unreadable."""
    monkeypatch.setattr(evaluate.model, "load", lambda *_, **__: Eyes())
    calls, file = fake_rollout(monkeypatch), choices(tmp_path)
    for n, (more, length) in enumerate([([], 64), (["--model", "qwen3-vl-2b"], 512), (["--model", "qwen3-vl-2b", "--max-new-tokens", "9"], 9)]):
        evaluate.main(["--data", file, "--out", str(tmp_path / str(n)), *more])
        assert calls.pop()[3]["max_new_tokens"] == length
    assert "max_new_tokens = 512" in capsys.readouterr().out


def test_boxes_are_asked_for_without_zooms(tmp_path, monkeypatch):
    """Bug: a benchmark of boxes across images is asked to zoom, which the tool can do in the first image alone."""
    monkeypatch.setattr(evaluate.model, "load", lambda *_, **__: Eyes())
    calls = fake_rollout(monkeypatch, lambda s, zoom: "(1, 2),(3, 4)")
    photo().save(tmp_path / "a.png")
    box = Sample("b", ["a.png"], "Box it.", "box", targets=[{"image": 0, "box": [100, 50, 120, 60]}])
    for n, (samples, more, style) in enumerate([([box], [], "boxes"), ([box], ["--style", "zoom"], "zoom"), ([box, point(image="a.png")], [], "zoom")]):
        data.write_jsonl(str(tmp_path / "d.jsonl"), samples)
        evaluate.main(["--data", str(tmp_path / "d.jsonl"), "--zoom", "all", "--out", str(tmp_path / str(n)), *more])
        assert {options["style"] for *_, options in calls} == {style} and len(calls) == (1 if style == "boxes" else 3)
        calls.clear()


def test_zoom_gain_and_harm(tmp_path, monkeypatch):
    """Right only with zoom; right only without; and black crops beside them."""
    monkeypatch.setattr(evaluate.model, "load", lambda *_, **__: Eyes())
    hits = {"on": {"c0", "c1", "c2", "c3"}, "off": {"c3", "c4"}, "black": {"c0"}}
    fake_rollout(monkeypatch, lambda s, zoom: "checked" if s.id in hits[zoom] else "lined")
    s = evaluate.main(["--data", choices(tmp_path), "--zoom", "all", "--out", str(tmp_path / "out")])
    assert (s["zoom_gain"], s["zoom_harm"]) == (pytest.approx(3 / 7), pytest.approx(1 / 7))
    assert (s["paired"]["off"]["only_b"], s["paired"]["off"]["only_a"], s["paired"]["black"]["only_b"]) == (3, 1, 3)
    assert s["modes"]["on"]["accuracy"] == s["accuracy"] == 4 / 7 and s["modes"]["black"]["correct"] == 1
    assert "zoom gain 42.9%, zoom harm 14.3%" in open(tmp_path / "out" / "report.html").read()


@pytest.mark.slow
def test_as_a_script(bench):
    folder, _ = bench
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts("(110, 55)", "(3, 3)")))
    out = subprocess.run([sys.executable, "evaluate.py", "--data", folder / "bench.jsonl", "--predictions", folder / "texts.jsonl", "--out", folder / "out"],
                         cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0 and out.stderr == "", out.stderr
    assert "66.7%" in out.stdout and json.load(open(folder / "out" / "summary.json"))["correct"] == 2


def test_toy_task_takes_predictions_too(tmp_path, capsys):
    samples = data.toy("search", "test", 4, seed=3)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"id": s.id, "text": s.options[s.answer]}) + "\n" for s in samples))
    s = evaluate.main(["--n", "4", "--seed", "3", "--predictions", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out")])
    assert (s["correct"], s["chance"]) == (4, 0.25) and "chance 25.0%" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# The report

def test_nothing_from_data_or_model_can_run(tmp_path):
    """Every text that a model or a data file controls is tried; the page must hold it as text and as nothing else."""
    s = Sample(EVIL, [photo()], EVIL, "choice", [EVIL, "b"], 0, category=[EVIL], meta={"evidence": [{"box": [EVIL] * 4}, EVIL, {"box": [1, 2, 3, 4], "image": EVIL}]})
    e = episode(s, Turn(EVIL + "<answer>" + EVIL + "</answer>", (1, 1), (0, 0, 9, 9), EVIL), stop=EVIL)
    e.parts[EVIL], e.pieces = 1.0, [[EVIL, -0.5], [EVIL, None]]
    text = Sample(EVIL, [photo()], EVIL, "text", answer=[EVIL], category=[EVIL])
    p = page(tmp_path, [(EVIL, [e, episode(text, Turn(EVIL))])], title=EVIL, curves=[{"step": i, EVIL: i} for i in range(3)], table=[("", [EVIL]), (EVIL, [EVIL])],
             settings={EVIL: EVIL})
    seen = zoomed()
    seen.pieces = [["a", -0.5], ["b", None]]
    plain = page(tmp_path, [("a", [seen, zoomed()])], curves=[{"step": i, "a": i} for i in range(3)], table=[("", ["a"]), ("a", ["a"])], settings={"a": "b"})
    assert {tag for tag, _ in p.tags} <= {tag for tag, _ in plain.tags}        # no tag that the page does not use anyway
    assert p.source.count("<script>") == p.source.count("</script>") == 1 and f"<script>{evaluate.SCRIPT}</script>" in p.source
    assert p.all("article")[0]["data-id"] == EVIL == p.all("article")[0]["data-category"]
    assert p.said.count("<script>alert(1)</script>") > 15                      # and the texts are there, as text
    assert not [a for _, attrs in p.tags for a in attrs if a.startswith("on")]
    assert evaluate.esc("\"'<&") == "&quot;&#x27;&lt;&amp;"                      # safe inside an attribute too
    assert len(p.all("article")) == 2 and p.source.count("</style>") == 1 and "<!--" not in p.source


def test_page_needs_nothing_from_outside_and_allows_one_script(tmp_path):
    """The policy holds the hash of the page's own script: whatever else may get in cannot run."""
    p = page(tmp_path, [zoomed()], curves=[{"step": i, "reward": i} for i in range(3)])
    policy = p.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    script = re.search(r"<script>(.*?)</script>", p.source, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}';" in policy and "img-src data:" in policy
    assert policy.count("unsafe") == 1 and "style-src 'unsafe-inline'" in policy
    assert len(p.all("script")) == 1 and not p.all("script")[0] and not p.all("link") and not p.all("iframe")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function|setTimeout", script)
    links = [attrs[k] for _, attrs in p.tags for k in ("href", "src") if k in attrs]
    assert links and all(link.startswith(("#", "data:image/")) for link in links)
    assert "://" not in p.source and "url(" not in p.source and "@import" not in p.source
    ids = [attrs["id"] for _, attrs in p.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link[0] == "#"} <= set(ids)


def test_a_picture_is_embedded_once(tmp_path):
    path = str(tmp_path / "same.png")
    photo(300, 200).save(path)
    same = photo()
    group = [zoomed(choice(str(i), same)) for i in range(4)] + [zoomed(choice("copy", same.copy()))] + [zoomed(choice(str(i), path)) for i in range(3)]
    p = page(tmp_path, [("before", group), ("after", group)])
    pictures = p.all("image")
    assert len(pictures) == 4                                                  # two prompt images, and the crop of each
    assert len(p.all("svg", class_="picture")) == 16 and p.source.count("data:image/") == 4
    assert {u["href"] for u in p.all("use")} == {"#" + i["id"] for i in pictures}
    assert sorted((i["width"], i["height"]) for i in pictures) == [("200", "100"), ("300", "200"), ("40", "40"), ("40", "40")]


def test_large_pictures_shrink_but_keep_source_coordinates(tmp_path):
    noise = Image.effect_noise((3000, 1500), 80).convert("RGB")
    s = Sample("big", [noise], "Click it.", "point", targets=[{"image": 0, "box": [2000, 1000, 2100, 1040]}])
    e = episode(s, Turn("t", (500, 250), (1818, 818, 2182, 1182)), Turn("<answer> (512, 256) </answer>"), scale=(4.0, 4.0))
    p = page(tmp_path, [e])
    assert p.all("svg", class_="picture")[0]["viewbox"] == "0 0 3000 1500"
    assert [(i["width"], i["height"]) for i in p.all("image")] == [("3000", "1500"), ("364", "364")]
    files = [Image.open(io.BytesIO(base64.b64decode(i["href"].split(",")[1]))) for i in p.all("image")]
    assert [f.size for f in files] == [(640, 320), (256, 256)] and files[0].format == "JPEG"
    assert p.all("circle", cx="2000", cy="1000") and p.all("rect", class_="t1", x="1818", y="818", width="364", height="364")
    assert p.all("rect", class_="gold", x="2000", y="1000", width="100", height="40")
    assert p.all("path", class_="said")[0]["d"].startswith("M1982 958")        # a cross of half width 66 around (2048, 1024)


def test_overlay_maps_points_with_the_frame(tmp_path):
    e = zoomed(choice(meta={"evidence": [{"image": 0, "box": [100, 50, 120, 60]}]}))
    p = page(tmp_path, [e])
    assert [(c["cx"], c["cy"]) for c in p.all("circle")] == [("110", "56")]    # x * 2, y * 4; the point outside is not drawn
    assert p.all("rect", class_="t1", x="90", y="36", width="40", height="40")
    assert p.all("rect", class_="gold", x="100", y="50", width="20", height="10")
    for said in ("The coordinate (999, 1) lies outside the image.", "ended by: answer", "advantage +0.50", "2 tokens", "1 zoom", "toy", "(90, 36) to (130, 76)",
                 "No zooms left", "Which pattern?", "B. checked ✓"):
        assert said in p.said, said
    assert p.all("article", class_="right") and p.all("span", class_="given") and p.all("li", class_="gold")


def test_boxes_are_drawn_in_the_image_they_are_about(tmp_path):
    s = Sample("b", [photo(), photo(80, 60), photo(60, 80)], "Find it.", "box", targets=[{"image": 1, "box": [10, 10, 30, 30]}])
    e = episode(s, Turn("<think> x </think>\n<answer> (6, 3),(14, 8) </answer>"), recipe="univg-r1")
    p = page(tmp_path, [e])
    second = p.source.split('class="picture"')[2]
    assert p.source.count('class="gold"') == p.source.count('class="said" x') == 1
    assert '<rect class="gold" x="10" y="10" width="20" height="20"/>' in second
    assert '<rect class="said" x="12" y="12" width="16" height="20"/>' in second and "image 2" in second
    assert "(12, 12, 28, 32)" in p.said and "(10, 10, 30, 30) in image 2" in p.said


def test_huge_and_inverted_answers_are_drawn_inside_or_not_at_all(tmp_path):
    box = Sample("b", [photo()], "Box it.", "box", targets=[{"image": 0, "box": [10, 10, 30, 30]}])
    p = page(tmp_path, [episode(point(), Turn("a", (10 ** 400, 5), None, "outside"), Turn(f"<answer> ({'9' * 300}, -4) </answer>")),
                        episode(box, Turn("<answer> (90, 20),(-5, -7) </answer>")), episode(point("q"), Turn("\ud800 half a pair, \x00 \u202e"))])
    assert len(p.all("article", class_="wrong")) == 3 and not p.all("circle") and not p.all("path")
    assert p.all("rect", class_="said")[0] == {"class": "said", "x": "0", "y": "0", "width": "180", "height": "80"}


def test_crop_is_shown_as_the_model_saw_it(tmp_path):
    """The black control must look black in the report too, and a crop of the shrunken copy blurred."""
    def crop(image=None, **looked):
        e = zoomed(choice(image=image))
        e.looked = looked
        p = page(tmp_path, [e])
        return Image.open(io.BytesIO(base64.b64decode(p.all("image")[1]["href"].split(",")[1]))).convert("L")
    assert crop(zoom="black").size == (40, 40) and crop(zoom="black").getextrema() == (0, 0)
    fine = Image.effect_noise((200, 100), 90).convert("RGB")
    spread = lambda im: im.getextrema()[1] - im.getextrema()[0]
    assert spread(crop(fine, zoom="on", crop_from="seen", fed=(20, 10))) < spread(crop(fine, zoom="on", crop_from="source", fed=(20, 10))) / 2


def test_tokens_are_shown_with_their_probability(tmp_path):
    e = zoomed()
    e.pieces = [["sure", -0.001], ["<unsure>", -3.0], ["a crop", None], ["half", -0.7]]
    p = page(tmp_path, [e, zoomed()])
    assert [(i["class"], i["title"]) for i in p.all("i")] == [("p4", "0.999"), ("p0", "0.050"), ("p2", "0.497")] and len(p.all("s")) == 1
    assert "3 chosen at a mean probability of 0.29, each with advantage +0.50" in p.said and "<unsure>" in p.said and len(p.all("details")) == 1


def test_pieces_tell_chosen_tokens_from_given_ones():
    e = Episode(choice(), [9, 9, 2, 1, 1, 3, 2, 3, 1], [False, False, True, False, False, False, True, True, False], [0, 0, -0.5, 0, 0, 0, -0.25, -1.0, 0], [])
    assert evaluate.pieces(Eyes(), e) == [["look", -0.5], ["[image] there", None], ["look", -0.25], [" there", -1.0]]


def test_cards_carry_what_the_menus_filter_by(tmp_path):
    p = page(tmp_path, [zoomed(Sample("two", [photo()], "?", "choice", ["lined", "checked"], 1, category=["web", "icon"])), episode(point(), Turn("x"))])
    assert [(a["data-id"], a["data-category"], a["data-zooms"], a["tabindex"]) for a in p.all("article")] == [("two", "web\nicon", "1", "-1"), ("p", "web\nicon", "0", "-1")]
    assert not p.all("select") and not p.all("button")                         # the script makes them: without it nothing is dead


def test_five_hundred_episodes_are_light(tmp_path):
    """500 noisy pictures would be 60 MB; shared ones cost nothing, and every section gets its share of the room."""
    shared = [Image.effect_noise((448, 448), 90).convert("RGB") for _ in range(3)]
    p = page(tmp_path, [("all", [zoomed(choice(str(i), shared[i % 3])) for i in range(500)])], drawn=500)
    assert len(p.all("article")) == 500 and len(p.source) < 3_000_000
    noise = [Image.effect_noise((200, 200), 90).convert("RGB") for _ in range(40)]
    group = lambda k: [zoomed(choice(f"{k}{i}", im.rotate(90 * k))) for i, im in enumerate(noise)]
    p = page(tmp_path, [(str(k), group(k)) for k in range(3)], drawn=500, max_bytes=600_000)
    drawn = [part.count("<article") for part in p.source.split("<section")[1:]]
    assert len(p.source) < 800_000 and min(drawn) > 1 and max(drawn) - min(drawn) <= 1


def test_report_says_what_it_leaves_out_and_stays_light(tmp_path):
    group = [zoomed(choice(str(i)), "checked" if i % 3 else "lined") for i in range(30)]
    p = page(tmp_path, [("many", group)])
    assert len(p.all("article")) == evaluate.DRAWN == 24
    assert "The first 24 are drawn, 6 are left out." in p.said and "20 of 30 right" in p.said
    long = [episode(choice(str(i)), Turn("x" * 3_000_000)) for i in range(3)]
    p = page(tmp_path, long)
    assert len(p.source) < 100_000 and "[and 2,996,000 more characters]" in p.said
    noisy = [zoomed(choice(str(i), Image.effect_noise((640, 640), 90))) for i in range(12)]
    p = page(tmp_path, noisy, max_bytes=1_000_000)
    assert len(p.source) < 1_400_000 and 1 < len(p.all("article")) < 12
    assert f"The first {len(p.all('article'))} are drawn" in p.said


def test_filter_counts_and_sections(tmp_path):
    p = page(tmp_path, [("before", [zoomed(answer="lined"), zoomed(answer="lined")]), ("after", [zoomed()]), ("nobody", [])])
    assert [i["id"] for i in p.all("input", type="radio")] == ["all", "right", "wrong"] and "checked" in p.all("input")[0]
    for label in ("all 3", "right 1", "wrong 2", "before", "after", "0 of 2 right"):
        assert label in p.said
    hidden = Sample("h", [photo()], "?", "choice", ["a", "b"], None)
    p = page(tmp_path, [episode(hidden, Turn("<answer> a </answer>"))])
    assert not p.all("span", class_="badge") and "hidden" in p.said            # neither right nor wrong


def test_curves(tmp_path):
    rows = [{"step": 10 * i, "reward": i / 4, "flat": 0.0, "note": "text", "rare": i if i % 2 else None, "bad": float("nan")} for i in range(9)]
    p = page(tmp_path, [], curves=rows + [{"step": 90, "reward": float("inf")}])
    assert [re.match(r"[a-z]+", f)[0] for f in p.source.split("<figcaption>")[1:]] == ["reward", "rare", "flat"]
    raw, smooth = p.all("polyline")[:2]
    xy = [tuple(map(float, q.split(","))) for q in raw["points"].split()]
    assert len(xy) == 9 and [x for x, _ in xy] == sorted(x for x, _ in xy) and [y for _, y in xy] == sorted((y for _, y in xy), reverse=True)
    assert raw["points"] == smooth["points"]                                   # nine values are too few to smooth
    assert "80" in p.said and all(0 <= x <= 300 and 0 <= y <= 150 for x, y in xy)
    many = page(tmp_path, [], curves=[{"step": i, **{f"m{k}": i * k for k in range(11)}} for i in range(1000)])
    assert "3 more" in many.said and many.all("details")
    assert not page(tmp_path, [], curves=[{"step": 1, "reward": 1.0}]).all("figure")            # one point is no curve


def test_table_of_summaries(tmp_path):
    summary = evaluate.summarise([{"id": "x", "category": [], "accuracy": float(i < 50), "wrong_format": 0.0} for i in range(100)])
    p = page(tmp_path, [], table=[("", ["before", "after"]), ("search", [summary, "n/a"])])
    assert "50.0 %" in p.said and "40.4 to 59.6" in p.said and "n/a" in p.said
    assert p.all("rect", class_="range")[0] | {"height": ""} == {"class": "range", "x": "40.38", "width": "19.23", "height": ""}


def test_a_long_table_is_folded(tmp_path):
    """Bug: a hundred rows of categories before the first episode."""
    table = lambda n: [("", ["accuracy"]), ("zoom allowed", ["50"]), *((f"  kind {i}", ["50"]) for i in range(n))]
    assert not page(tmp_path, [], table=table(11)).all("details")
    long = page(tmp_path, [], table=table(12))
    before, after = long.source.split("<details>")
    assert "zoom allowed" in before and "kind 3" not in before and "zoom allowed" in after and "kind 11" in after and len(long.all("table")) == 2


def test_a_polygon_is_drawn_as_one(tmp_path):
    corners = [[20.0, 10.0], [60.0, 10.0], [80.0, 40.0]]
    s = Sample("free", [photo()], "Where is room?", "point", targets=[{"image": 0, "box": [20.0, 10.0, 80.0, 40.0], "polygon": corners}])
    p = page(tmp_path, [episode(s, Turn("<answer> (900, 900) </answer>"))])
    assert [path["d"] for path in p.all("path", class_="gold")] == ["M20 10L60 10L80 40Z"] and not p.all("rect", class_="gold")


# ----------------------------------------------------------------------------------------------------------------------
# Do the tests bite? Each line puts one bug into evaluate.py; the named test must fail.

MUTATIONS = [
    ("s * (p * (1 - p) + s / 4)", "s * p * (1 - p)", test_wilson_against_published_values, dict(correct=10, n=10, low=0.7225, high=1)),
    ("(1 + s), math.sqrt", "1, math.sqrt", test_wilson_is_symmetric_inside_0_1_and_shrinks_with_n, {}),
    ('parts["iou"] >= 0.5 - 1e-6', 'parts["iou"] > 0.4', test_right_means_the_same_for_every_recipe, {}),
    ('parts["accuracy"] >= 1 - 1e-6', 'parts["accuracy"] > 0', test_summarise_boxes_partial_credit_hidden_gold_and_nothing, {}),
    ('[r["iou"] for r in scored if "iou" in r]', '[r["iou"] for r in scored if is_right(r)]', test_summarise_boxes_partial_credit_hidden_gold_and_nothing, {}),
    ('dict.fromkeys([*r["category"],', 'dict.fromkeys([*r["category"][:1],', test_summarise_counts_by_category, {}),
    ('{"max_new_tokens": 512}', "{}", test_a_real_model_may_say_more, {}),
    ('"boxes" if all(', '"zoom" if all(', test_boxes_are_asked_for_without_zooms, {}),
    ("seed=seed + start * block,", "seed=seed,", test_run_scores_in_order_and_keeps_memory_small, {}),
    ("views=views and views[i:i + n]", "views=views", test_run_scores_in_order_and_keeps_memory_small, {}),
    ("e.views if views else []", "e.views", test_run_scores_in_order_and_keeps_memory_small, {}),
    ("sx, sy = e.frames[i][:2] if e.frames else (1, 1)", "sx, sy = 1, 1", test_overlay_maps_points_with_the_frame, {}),
    ("math.sqrt(s * (p * (1 - p) + s / 4))", "math.sqrt(s * p * (1 - p))", test_wilson_is_symmetric_inside_0_1_and_shrinks_with_n, {}),
    ("only_b=only_b, neither", "only_b=only_a, neither", test_paired_against_hand_numbers, {}),
    ("term * (m - k) // (k + 1)", "term * (m - k) / (k + 1)", test_paired_against_hand_numbers, {}),
    ("min(1.0, 2 * tail / 2 ** m)", "min(1.0, tail / 2 ** m)", test_paired_against_hand_numbers, {}),
    ('"screenspot": (2, 6)', '"screenspot": (1, 3)', test_each_benchmark_averages_by_its_own_rule, {}),
    ('[", ".join(cell)] if levels > 1', '[", ".join(cell)] if levels > 2', test_each_benchmark_averages_by_its_own_rule, {}),
    ("len(rows) <= 12 or not label.startswith(\" \")", "True", test_a_long_table_is_folded, {}),
    ('if outline := outlines.get(tuple(box)):', "if outline := None:", test_a_polygon_is_drawn_as_one, {}),
    ('32 if known and known.convention == "thousand" else 28', "28", test_fed_pixels_are_those_of_the_family, {}),
    ('"blink": (1, 14)', '"blink": (0, 1)', test_each_benchmark_averages_by_its_own_rule, {}),
    ('if benchmark == "vlm-r1" else', "if False else", test_overlap_of_exactly_one_half_and_at_each_threshold, {}),
    ('len({r.get("of", i) for i, r in enumerate(scored)})', "n", test_rotations_of_a_question_are_one_piece_of_evidence, {}),
    ('order.index(s.answer),', 's.answer,', test_arrange_moves_the_gold_along, {}),
    ('random.Random(f"{seed}/{s.id}")', "random.Random(seed)", test_an_always_first_answer_scores_chance_once_options_are_permuted, {}),
    ("k in seen and k != last", "k in seen", test_behaviour_follows_its_rules, dict(lines=["The cat (10, 10).", "The cat (12, 12)."], want=dict(regions=1))),
    ("at[-1], False", "at[-1], doubt", test_behaviour_follows_its_rules,
     dict(lines=["The cat (10, 10).", "Actually it is at (12, 12).", "A dog (150, 80)."], want=dict(regions=2))),
    ("if rewards.inside((x, y), e.frames[:1])]", "]", test_behaviour_follows_its_rules, dict(lines=["At (500, 10) and (-3, 4)."], want=dict(regions=0))),
    ("t.text[len(data.FORCE):] if t.forced and", "t.text if t.forced and", test_behaviour_reads_zooms_and_own_words_only, {}),
    ("if not words for p in points] or named", "if not words for p in points] + named", test_pointing_counts_points_where_the_box_is_known, {}),
    ("if not sampled:", "if False:", test_pieces_tell_chosen_tokens_from_given_ones, {}),
    ('looked.get("zoom") == "black"', "False", test_crop_is_shown_as_the_model_saw_it, {}),
    ("html.escape(text[:limit], quote=True)", "html.escape(text[:limit], quote=False)", test_nothing_from_data_or_model_can_run, {}),
    ('data-id="{esc(s.id)}"', 'data-id="{s.id}"', test_nothing_from_data_or_model_can_run, {}),
    ("{esc(text)}</i>", "{text}</i>", test_nothing_from_data_or_model_can_run, {}),
    ("SCRIPT.encode()).digest()", "CSS.encode()).digest()", test_page_needs_nothing_from_outside_and_allows_one_script, {}),
    ("numbers((points[0][0] / sx, points[0][1] / sy))", "numbers(points[0])", test_the_judge_is_told_what_the_rules_are, {}),
    ("{k: found[k] for k in COUNTS} if found.keys() >= set(COUNTS) else {}", "found", test_only_four_counts_are_a_reply, dict(reply=counted(3, 2, 1), want=None)),
    ('reply)[-1:] ', 'reply)[:1] ', test_only_four_counts_are_a_reply, dict(reply=f"{counted(9, 9, 9, 9)} {counted(3, 2, 1, 0)}", want=[3, 2, 1, 0])),
    ("for judged, _ in both], [rules[k]", "for _, judged in both], [rules[k]", test_agreement_by_hand, {}),
    ("sum(a.count(x) for x in b)", "sum(b.count(x) for x in b)", test_agreement_by_hand, {}),
    ('"judge", "judge_model")}', '"judge_model")}', test_a_finished_run_can_be_judged, {}),
    ("for k in range(drawn) for i, (_, group) in enumerate(episodes) if", "for i, (_, group) in enumerate(episodes) for k in range(drawn) if", test_five_hundred_episodes_are_light, {}),
]


@pytest.mark.parametrize("old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(old, new, test, arguments, tmp_path, monkeypatch, capsys):
    """Bug: a test that no bug can turn red."""
    fixtures = {"tmp_path": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    check_mutation("evaluate", old, new, test, arguments, lambda _: {k: lambda v=v: v for k, v in fixtures.items()}, monkeypatch)
