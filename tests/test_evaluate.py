"""evaluate.py: intervals, averages and comparisons, predictions from the command line, a run that
goes on where it stopped. The report is in test_report.py, what an episode did in test_analysis.py.
At the end MUTATIONS puts bugs into evaluate.py and its parts.

    python -m pytest tests/test_evaluate.py        # no model is loaded
"""
import copy, itertools, json, math, os, random, re, subprocess, sys, time

import pytest
import torch
from PIL import Image

from conftest import ROOT, check_mutation, names

import data, evaluate, rewards, zoom_rollout
from appendix import (agent_answers, analysis, card, episode_rows, evaluation_run, files, page,
                      predictions, prefix)
from data import Sample
from evaluate import RunOptions
from zoom_rollout import Episode, RolloutConfig, Turn

EVIL = ("""<script>alert(1)</script>"><img src=x onerror=alert(1)></style></svg></pre>"""
        """<!-- ' onload='x' javascript:alert(1) &lt;b&gt; ${7*7}""")


# --------------------------------------------------------------------------------------------------
# Fakes: real dataclasses, small pictures, no model

def photo(w=200, h=100, color=(90, 120, 60)):
    im = Image.new("RGB", (w, h), color)
    im.paste((200, 40, 40), (w // 2, h // 2, w // 2 + 20, h // 2 + 10))
    return im


def choice(id="c", image=None, **more):
    return Sample(id, [image or photo()], "Which pattern?", "choice", ["lined", "checked"], 1,
                  category=["toy"], **more)


def point(id="p", image=None, **more):
    return Sample(id, [image or photo()], "Click it.", "point",
                  targets=[{"image": 0, "box": [100, 50, 120, 60]}], category=["web", "icon"],
                  **more)


def episode(sample, *turns, recipe="vigorl-zoom", scale=(2.0, 4.0), stop="answer"):
    frames = [(*scale, *files.sample_image(sample, i).size) for i in range(len(sample.images))]
    e = Episode(sample, [1, 2, 3], [False, True, True], [0.0, -0.1, -0.2], [], list(turns), stop,
                frames, advantage=0.5)
    e.reward_components = rewards.score(sample, e.text, e.turns, recipe, frames, 3)
    return e


def zoomed(sample=None, answer="checked"):
    """Turn 1 zooms at (55, 14) of a 100 x 25 fed image: source (110, 56). Turn 2 leaves the image,
    turn 3 answers."""
    return episode(
        sample or choice(),
        Turn("<think> at (55, 14) </think>\n" + data.tool_call(55, 14), (55, 14),
             (90, 36, 130, 76)),
        Turn("<think> at (999, 1) </think>\n" + data.tool_call(999, 1), (999, 1), None,
             "The coordinate (999, 1) lies outside the image."),
        Turn(data.FORCE + f" {answer} </answer>", forced=True))


# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("correct, n, low, high", [
    (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1),
    (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)])
def test_wilson_against_published_values(correct, n, low, high):
    """Claim: the interval of published tables, also for none, all, and no question at all."""
    assert evaluate.wilson(correct, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_is_symmetric_inside_0_1_and_shrinks_with_n():
    """Claim: it holds the share and stays inside 0 to 1; right and wrong exchanged mirror it; more
    questions make it narrower."""
    for n in (1, 7, 40):
        for k in range(n + 1):
            low, high = evaluate.wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1
            assert evaluate.wilson(n - k, n) == pytest.approx((1 - high, 1 - low))
    widths = [evaluate.wilson(n // 2, n)[1] - evaluate.wilson(n // 2, n)[0]
              for n in (10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)


def test_summarise_counts_by_category():
    row = lambda accuracy, *category, **more: {
        "id": "x", "category": list(category), "accuracy": accuracy, "wrong_format": 0.0, **more}
    s = evaluate.summarise([
        row(1.0, "web", "icon"), row(0.0, "web", "text", wrong_format=1.0),
        row(1.0, "mobile", "icon"), row(0.0, "mobile", "icon")])
    assert (s["n"], s["correct"], s["accuracy"], s["wrong_format"]) == (4, 2, 0.5, 1)
    assert (s["low"], s["high"]) == evaluate.wilson(2, 4)
    assert list(s["categories"]) == ["web", "icon", "text", "mobile"]
    assert {k: (c["n"], c["correct"]) for k, c in s["categories"].items()} == {
        "web": (2, 1), "icon": (3, 2), "text": (1, 0), "mobile": (2, 1)}
    assert (s["categories"]["text"]["wrong_format"] == 1
            and "mean_iou" not in s and "hidden" not in s)
    assert json.loads(json.dumps(s)) == s                                      # plain numbers only


def test_summarise_boxes_partial_credit_hidden_gold_and_nothing():
    row = lambda **more: {"id": "x", "category": [], "wrong_format": 0.0, **more}
    # univg-r1: accuracy is the IoU
    s = evaluate.summarise([
        row(accuracy=0.7, iou=0.7), row(accuracy=0.3, iou=0.3), row(accuracy=1.0, iou=0.5)])
    assert (s["correct"], s["mean_iou"]) == (2, pytest.approx(0.5))
    # half of a web action is no right answer
    assert evaluate.summarise([row(accuracy=0.5)])["correct"] == 0
    # BLINK's test split: no gold, no mistake
    s = evaluate.summarise([row(accuracy=0.0, hidden=1.0), row(accuracy=1.0)])
    assert (s["n"], s["correct"], s["hidden"]) == (1, 1, 1)
    assert (evaluate.summarise([])["n"], evaluate.summarise([])["accuracy"]) == (0, 0.0)


def test_right_means_the_same_for_every_recipe():
    box = Sample("b", [photo()], "Box it.", "box", targets=[{"image": 0, "box": [0, 0, 100, 100]}])
    for recipe in ("univg-r1", "vigorl", "accuracy"):
        for edge, right in ((100, True), (51, True), (49, False)):
            e = episode(box, Turn(f"<think> x </think>\n<answer> (0, 0),({edge}, 100) </answer>"),
                        recipe=recipe, scale=(1, 1))
            assert evaluate.is_right(e.reward_components) == right, (recipe, edge)


def test_paired_against_hand_numbers():
    """McNemar: 10 against 2 of 12 is 2 (1 + 12 + 66) / 4096; the rest by hand from Bonett and
    Price."""
    a = {i: i < 42 for i in range(100)}                                        # right: 0..41
    b = {i: 2 <= i < 52 for i in range(100)}                                   # loses 2, wins 10
    found = evaluate.paired(a, b)
    assert ({k: found[k] for k in ("n", "both", "only_a", "only_b", "neither", "difference")}
            == dict(n=100, both=40, only_a=2, only_b=10, neither=48, difference=0.08))
    assert (found["p"], found["low"], found["high"]) == pytest.approx(
        (0.03857, 0.00816, 0.14870), abs=1e-5)
    back = evaluate.paired(b, a)
    assert (back["p"], back["low"], back["high"]) == pytest.approx(
        (found["p"], -found["high"], -found["low"]))
    same = evaluate.paired(a, a)
    # no difference seen is not no difference
    assert same["p"] == 1 and same["low"] < 0 < same["high"]
    large = evaluate.paired({i: i % 2 == 0 for i in range(9000)},
                            {i: i % 2 == 1 or i < 200 for i in range(9000)})
    # z = 1.05; nothing overflows
    assert (large["only_a"], large["only_b"]) == (4400, 4500) and 0.28 < large["p"] < 0.31
    # the questions that both have
    assert evaluate.paired({1: True, 2: False}, {2: True, 3: True})["n"] == 1


def rows(benchmark, *cells):
    """(category, right, wrong) ... -> rows for summarise."""
    return [{"id": "x", "category": list(category), "accuracy": float(i < good),
             "wrong_format": 0.0, "benchmark": benchmark}
            for category, good, bad in cells for i in range(good + bad)]


def test_each_benchmark_averages_by_its_own_rule():
    """Bug: BLINK's micro accuracy printed as its score; the two differ whenever tasks differ in
    size."""
    blink = evaluate.summarise(rows("blink", (["Counting"], 1, 0), (["Jigsaw"], 0, 9)))
    assert (blink["accuracy"], blink["average"], blink["average_of"]) == (0.1, 0.5, "2 of 14 cells")
    spot = rows("screenspot", (["web", "icon"], 1, 1), (["web", "text"], 3, 0),
                (["mobile", "icon"], 0, 1), (["mobile", "text"], 1, 0))
    assert (evaluate.summarise(spot)["average"] == pytest.approx((0.5 + 1 + 0 + 1) / 4)
            and evaluate.summarise(spot)["average_of"] == "4 of 6 cells")
    assert evaluate.summarise(
        [{**r, "benchmark": "screenspot_parquet"} for r in spot])["average_of"] == "4 of 6 cells"
    cells = evaluate.summarise(spot)["categories"]
    assert ([(name, part["n"], part["correct"]) for name, part in cells.items() if part["n"] < 6]
            == [("web", 5, 4), ("icon", 3, 1), ("web, icon", 2, 1),
                ("text", 4, 4), ("web, text", 3, 3),
                ("mobile", 2, 1), ("mobile, icon", 1, 0), ("mobile, text", 1, 1)])
    assert evaluate.summarise(
        [{**r, "benchmark": "refcoco"} for r in spot])["average_of"] == "2 cells"
    for micro in ("screenspot_v2", "screenspot_pro", "vstar", "sat"):
        s = evaluate.summarise([{**r, "benchmark": micro} for r in spot])
        assert s["average"] == s["accuracy"] == 5 / 7 and s["average_of"] == "all questions"
    assert (evaluate.summarise(rows("mine", (["a"], 1, 1)))["average_of"] == "all questions"
            and "average" not in evaluate.summarise(rows(None, (["a"], 1, 1))))
    assert "average" not in evaluate.summarise(spot + rows("blink", (["Counting"], 1, 0)))
    hidden = rows("blink", (["Jigsaw"], 0, 3))
    assert evaluate.summarise(rows("blink", (["Counting"], 1, 0))
                              + [{**r, "hidden": 1.0} for r in hidden])["average"] == 1


def test_overlap_of_exactly_one_half_and_at_each_threshold():
    """MIG-Bench counts it, VLM-R1 does not."""
    box = lambda overlap, benchmark="mig_bench": {
        "id": "x", "category": ["region"], "accuracy": overlap, "iou": overlap,
        "wrong_format": 0.0, "benchmark": benchmark}
    assert (evaluate.summarise([box(0.5)])["average"] == 1
            and evaluate.summarise([box(0.5, "vlm-r1")])["average"] == 0)
    assert evaluate.summarise([box(0.51, "vlm-r1")])["correct"] == 1
    s = evaluate.summarise([box(v) for v in (0.2, 0.3, 0.5, 0.6, 0.7, 0.9)])
    assert s["iou_at"] == {
        "0.3": pytest.approx(5 / 6), "0.5": pytest.approx(4 / 6), "0.7": pytest.approx(2 / 6)}


def test_rotations_of_a_question_are_one_piece_of_evidence():
    """Bug: asking each question four times made the interval half as wide."""
    row = lambda of, right: {
        "id": "x", "of": of, "category": [], "accuracy": float(right), "wrong_format": 0.0}
    s = evaluate.summarise([row(str(q), q % 2 and (q % 4 == 1 or r))
                            for q in range(40) for r in range(4)])
    assert ((s["n"], s["correct"]) == (160, 40 + 30)
            and (s["low"], s["high"]) == evaluate.wilson(70 / 4, 40))
    assert s["all_rotations"] == 10 / 40


# --------------------------------------------------------------------------------------------------
# Options in another order

def gold_first(n=400, options=4):
    return [Sample(f"q{i}", ["x.png"], "Which?", "choice",
                   [f"option {k}" for k in range(options)], 0)
            for i in range(n)]


def test_an_always_first_answer_scores_chance_once_options_are_permuted():
    """Bug: V* and SAT put the right option first; a model that says "A" to all scores 100 %."""
    said = lambda samples: evaluate.summary_of(predictions.from_predictions(
        samples, {s.id: "<answer> A </answer>" for s in samples}))
    assert said(gold_first())["accuracy"] == 1
    s = said(evaluation_run.arrange(gold_first(), seed=0))
    assert s["low"] < 0.25 < s["high"] and s["n"] == 400
    circular = said(evaluation_run.arrange(gold_first(50), seed=0, circular=True))
    assert (circular["n"], circular["accuracy"], circular["all_rotations"]) == (200, 0.25, 0)
    right = said(evaluation_run.arrange(gold_first(50, options=2), 0, True))
    assert right["accuracy"] == 0.5


def test_arrange_moves_the_gold_along():
    samples = gold_first(50) + [
        point("p", "x.png"), Sample("h", ["x.png"], "?", "choice", ["a", "b"], None)]
    untouched = copy.deepcopy(samples)
    for circular, count in ((False, 50), (True, 200)):
        arranged = evaluation_run.arrange(samples, 3, circular)
        choices = [s for s in arranged if s.answer_type == "choice" and s.answer is not None]
        assert len(choices) == count and len({s.id for s in arranged}) == len(arranged)
        assert all(s.options[s.answer] == "option 0"
                   and [f"option {k}" for k in s.meta["order"]] == s.options for s in choices)
        assert ({s.answer for s in choices} == {0, 1, 2, 3}
                and next(s for s in arranged if s.id == "p") == samples[50])
        assert all(s.answer is None for s in arranged if s.id.startswith("h"))
        for s in choices[:8]:
            e = predictions.from_predictions([s], {s.id: "B"})[0]
            assert evaluate.right(e) == (s.meta["order"][1] == 0)
    # by seed and id, whatever stands around it
    assert evaluation_run.arrange(samples[7:9], 3) == evaluation_run.arrange(samples, 3)[7:9]
    assert (evaluation_run.arrange(samples, 4) != evaluation_run.arrange(samples, 3)
            and samples == untouched)


def test_random_choice_lands_on_chance():
    rng, samples = random.Random(5), evaluation_run.arrange(gold_first(3000), 1)
    s = evaluate.summary_of(predictions.from_predictions(
        samples, {s.id: f"<answer> {rng.choice(s.options)} </answer>" for s in samples}))
    assert s["low"] < 0.25 < s["high"] and s["high"] - s["low"] < 0.04 and s["wrong_format"] == 0


# --------------------------------------------------------------------------------------------------
# A run

class Eyes:
    """A vlm for the rollouts that are faked here."""
    def text(self, ids):
        return "".join({1: "<|image_pad|>", 2: "look", 3: " there"}[i] for i in ids)


class View:
    features, deep, source, fed = "big", "big", "big", (100, 25)


def fake_rollout(monkeypatch, answer=lambda sample, zoom: "checked", fail=lambda samples: None):
    """-> the list of calls: (ids, seed, views, config, first_sample)"""
    calls = []

    def rollout(vlm, samples, group_size, config, first_sample=0, views=None):
        fail(samples)
        calls.append(([s.id for s in samples], config.seed, views, config, first_sample))
        episodes = [zoomed(s, answer(s, config.zoom)) for s in samples]
        for e in episodes:
            e.views = [View()]
        return episodes
    monkeypatch.setattr(zoom_rollout, "rollout", rollout)
    return calls


def run_episodes(samples, config=RolloutConfig(temperature=0.0), **options):
    return evaluate.run_episodes(Eyes(), samples, config, RunOptions(progress=False, **options))


def test_run_scores_in_order_and_keeps_memory_small(monkeypatch):
    """Batches, seeds and views must go to the rollout together; thousands of decoded screenshots
    must not stay in memory."""
    calls, saved = fake_rollout(monkeypatch), []
    samples = [choice(str(i)) for i in range(5)]
    config = RolloutConfig(zoom="black", temperature=0.0, seed=7, max_new_tokens=9)
    episodes = run_episodes(samples, config, batch=2, save=saved.append, keep=2)
    assert ([e.sample.id for e in episodes] == list("01234")
            and all(e.reward_components["accuracy"] == 1 for e in episodes))
    assert [(ids, seed) for ids, seed, *_ in calls] == [
        (["0", "1"], 7), (["2", "3"], 9), (["4"], 11)]
    assert (calls[0][3] == config
            == RolloutConfig(style="zoom", zoom="black", temperature=0.0, max_zooms=3,
                             max_new_tokens=9, seed=7)
            and calls[0][4] == 0)
    assert (all(e.views == [] for e in episodes)
            and [e for batch in saved for e in batch] == episodes)
    assert [bool(e.token_texts) for e in episodes] == [True, True, False, False, False]
    assert episodes[4].shown_as == {
        "zoom": "black", "zoom_limit": 3, "crop_from": "source", "fed": (100, 25)}
    calls.clear()
    episodes = run_episodes(samples, batch=2, views=[[i] for i in range(5)])
    assert [views for _, _, views, *_ in calls] == [[[0], [1]], [[2], [3]], [[4]]]
    # the caller's views stay encoded
    assert all(e.views[0].features == "big" for e in episodes)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    def fail(samples):
        if len(samples) > 2:
            raise torch.cuda.OutOfMemoryError
    calls = fake_rollout(monkeypatch, fail=fail)
    samples = [choice(str(i)) for i in range(5)]
    assert [e.sample.id for e in run_episodes(samples, batch=8)] == list("01234")
    assert [ids for ids, *_ in calls] == [["0", "1"], ["2", "3"], ["4"]]
    fake_rollout(monkeypatch,
                 fail=lambda samples: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()))
    # one episode does not fit: no endless loop
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run_episodes(samples, batch=8)


def test_record_is_one_json_row():
    row = json.loads(json.dumps(evaluate.record(zoomed())))
    assert (row["answer"], row["options"], row["finish_reason"], row["advantage"],
            row["tokens"]) == ("checked", ["lined", "checked"], "answer", 0.5, 2)
    assert (row["turns"][0]["crop"] == [90, 36, 130, 76] and row["turns"][0]["point"] == [55, 14]
            and row["turns"][2]["forced"])
    assert row["turns"][1]["error"] and row["reward_components"]["accuracy"] == 1
    assert evaluate.record(episode(point(), Turn("")))["answer"] == "(100, 50, 120, 60)"
    assert row["verdict"] == "right" and row["frames"] == [[2, 4, 200, 100]]


def test_an_episode_comes_back_from_its_row():
    """What a stopped run has written is drawn and counted as if it had never stopped."""
    e = zoomed()
    e.shown_as, e.token_texts = (
        {"zoom": "black", "crop_from": "seen", "fed": [100, 25]}, [["a", -0.1], ["b", None]])
    back = episode_rows.restore(json.loads(json.dumps(evaluate.record(e))), e.sample)
    assert (evaluate.summary_of([back]) == evaluate.summary_of([e])
            and card.make_card(page.Album(), back, 640) == card.make_card(page.Album(), e, 640))
    assert evaluate.record(back) == evaluate.record(e) and back.turns == e.turns


def test_token_texts_tell_chosen_tokens_from_given_ones():
    e = Episode(choice(), [9, 9, 2, 1, 1, 3, 2, 3, 1],
                [False, False, True, False, False, False, True, True, False],
                [0, 0, -0.5, 0, 0, 0, -0.25, -1.0, 0], [])
    assert evaluate.token_texts(Eyes(), e) == [
        ["look", -0.5], ["[image] there", None], ["look", -0.25], [" there", -1.0]]


# --------------------------------------------------------------------------------------------------
# --predictions, from the command line

@pytest.fixture
def bench(tmp_path):
    """Two clicks and a choice on 200 x 100 and 400 x 50 pictures. -> (data file, function that runs
    the command line)"""
    photo().save(tmp_path / "a.png")
    photo(400, 50).save(tmp_path / "b.png")
    wide = Sample("p2", ["b.png"], "Click it.", "point",
                  targets=[{"image": 0, "box": [300, 10, 330, 20]}], category=["web", "text"])
    data.write_jsonl(str(tmp_path / "bench.jsonl"),
                     [point("p1", "a.png"), wide, choice("c1", "a.png")])

    def run(rows, *flags):
        lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
        (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
        evaluate.main(["--data", str(tmp_path / "bench.jsonl"),
                       "--predictions", str(tmp_path / "texts.jsonl"),
                       "--out", str(tmp_path / "out"), *flags])
        return json.load(open(tmp_path / "out" / "summary.json"))
    return tmp_path, run


def texts(p1, p2, c1="checked"):
    return [{"id": "p1", "text": p1},
            {"id": "p2", "text": f"<think> (1, 1) </think>\n<answer> {p2} </answer>"},
            {"id": "c1", "text": c1}]


def test_gold_as_prediction_is_all_right(bench, capsys):
    folder, run = bench
    s = run(texts("(110, 55)", "[315, 15]"))
    assert (s["n"], s["correct"], s["accuracy"], s["wrong_format"]) == (3, 3, 1.0, 0)
    assert (s["low"], s["high"]) == evaluate.wilson(3, 3)
    assert {k: c["n"] for k, c in s["categories"].items()} == {
        "web": 2, "icon": 1, "text": 1, "toy": 1}
    out = capsys.readouterr().out
    assert re.search(r"^predictions +3 +3 +100\.0% +43\.8% to 100\.0% +0$", out, re.M), out
    assert re.search(r"^  icon +1 +1 ", out, re.M)
    rows = [json.loads(line) for line in open(folder / "out" / "episodes.jsonl")]
    assert ([r["id"] for r in rows] == ["p1", "p2", "c1"]
            and rows[1]["turns"][0]["text"].startswith("<think>"))
    assert "predictions" in open(folder / "out" / "report.html").read()


@pytest.mark.parametrize("convention, p1, p2", [
    ("source", "(110, 55)", "(315, 15)"), ("0-1000", "(550, 550)", "(787, 300)"),
    ("0-1", "(0.55, 0.55)", "(0.787, 0.3)"), ("fed", "(92, 46)", "(265, 8)")])
def test_convention_is_a_flag_and_never_guessed(bench, convention, p1, p2):
    """The right place in one convention is another place in the others. fed: 200 x 100 -> 168 x 84,
    400 x 50 -> 336 x 28."""
    _, run = bench
    flags = ["--max-pixels", str(28 * 28 * 21)] if convention == "fed" else []
    assert run(texts(p1, p2), "--convention", convention, *flags)["correct"] == 3
    for other in {"source", "0-1000", "0-1"} - {convention}:
        s = run(texts(p1, p2), "--convention", other)
        # the choice has no coordinates; the points miss
        assert (s["correct"], s["wrong_format"]) == (1, 0)


def test_fed_pixels_are_those_of_the_family(tmp_path, monkeypatch, capsys):
    """Bug: sides rounded to multiples of 28 for a model whose patches make it 32. A photo of
    900 x 500 is fed as 896 x 504, or as 896 x 512."""
    photo(900, 500).save(tmp_path / "a.png")
    data.write_jsonl(str(tmp_path / "b.jsonl"), [point(image="a.png")])
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "p", "text": "(110, 55)"}))
    heights = {}
    for name in ("qwen2.5-vl-3b", "qwen3-vl-2b"):
        monkeypatch.setattr(evaluation_run, "record",
                            lambda e: heights.update({name: e.frames[0][1]}) or {})
        evaluate.main(["--data", str(tmp_path / "b.jsonl"),
                       "--predictions", str(tmp_path / "t.jsonl"), "--convention", "fed",
                       "--model", name, "--out", str(tmp_path / name)])
        assert f"pixels of the image as fed to {name}, 2,850,000 at most" in capsys.readouterr().out
    assert heights == {"qwen2.5-vl-3b": 500 / 504, "qwen3-vl-2b": 500 / 512}


# --------------------------------------------------------------------------------------------------
# The forms and spellings that predictions come in

def write_file(path, obj):
    path.write_text(json.dumps(obj))
    return str(path)


def scored(folder, path, *flags):
    return evaluate.main(["--data", str(folder / "bench.jsonl"), "--predictions", path,
                          "--out", str(folder / "forms"), "--fresh", *flags])


def test_forms_of_predictions(bench):
    """Claim: each form that --form names finds the same questions: by id, by order, by image and
    question, in the files of two evaluators."""
    folder, run = bench
    three = ["(110, 55)", "(315, 15)", "checked"]
    questions = [("a.png", "Click it."), ("b.png", "Click it."), ("a.png", "Which pattern?")]
    rows = [{"image": f"other/{image}", "question": q, "text": t}
            for (image, q), t in zip(questions, three)]
    for form, held in {
            "dict": dict(zip(["p1", "p2", "c1"], three)), "order": three, "question": rows[::-1],
            "vlm-r1": {"results": [
                {"image": r["image"], "question": r["question"], "model_output": r["text"]}
                for r in rows]}}.items():
        assert (scored(folder, write_file(folder / "f.json", held), "--form", form)["correct"]
                == 3), form
    details = [
        {"img_path": "x/a.png", "prompt_to_evaluate": "Click it.", "raw_response": "so",
         "pred": [0.55, 0.55]},
        {"img_path": "x/b.png", "prompt_to_evaluate": "Click it.", "raw_response": "(0.7875, 0.3)",
         "pred": None}]
    s = scored(folder, write_file(folder / "f.json", {"details": details}),
               "--form", "screenspot-pro", "--convention", "0-1")
    # its evaluator's reading counts; what it did not ask is left out
    assert (s["n"], s["correct"], s["wrong_format"]) == (2, 1, 1)


def test_twin_questions_are_told_apart(tmp_path):
    """Bug: of two questions with one text about one image (RefCOCO has some), each gets the other's
    answer. The box that a result file repeats tells them apart, then the folder of the image, then
    the order."""
    photo().save(tmp_path / "a.png")
    boxes = [[10, 10, 30, 30], [50, 50, 70, 70]]
    samples = [Sample(f"b{i}", ["a.png"], "left guy", "box", targets=[{"image": 0, "box": b}])
               for i, b in enumerate(boxes)]
    data.write_jsonl(str(tmp_path / "bench.jsonl"), samples)
    rows = [{"image": "a.png", "question": "left  guy", "ground_truth": b,
             "model_output": f'```json\n[{{"bbox_2d": {b}}}]\n```'} for b in boxes[::-1]]
    assert scored(tmp_path, write_file(tmp_path / "r.json", {"accuracy": 1.0, "results": rows}),
                  "--form", "vlm-r1")["correct"] == 2
    plain = [{"image": "a.png", "question": "left guy", "text": str(b)} for b in boxes]
    assert scored(tmp_path, write_file(tmp_path / "q.json", plain),
                  "--form", "question")["correct"] == 2
    folders = [Sample(f"f{i}", [str(tmp_path / f"{i}" / "a.png")], "?", "text", answer=[str(i)])
               for i in range(2)]
    # as Windows writes it
    rows = [{"image": f"x\\{i}\\a.png", "question": "?", "text": str(i)} for i in (1, 0)]
    assert predictions.read_predictions(
        write_file(tmp_path / "q.json", rows), folders, "question") == {"f1": "1", "f0": "0"}


def test_any_text_is_read_in_linear_time():
    """Bug: a text of spaces or digits takes a convention minutes."""
    began = time.process_time()
    for answers in agent_answers.PATTERNS:
        for part in (" ", "1", "1, ", "pyautogui.click(", '"coordinate": [', "<point>",
                     "<point x='", "</think>"):
            for head in ("", "pyautogui.click(", "pyautogui.click(1", "pyautogui.click(x",
                         '"coordinate":', '"coordinate": [', "<point>", "<point>1", "<point x='"):
                agent_answers.as_plain(head + part * (50_000 // len(part)), answers)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("form, held, said", [
    ("order", ["a"], "holds 1 texts for 3 questions"), ("dict", {"p1": 3}, "p1"),
    ("id", ["a"], "--form of this file"),
    ("question", [{"image": "a.png", "question": "Who?", "text": "x"}], "asks no 'Who"),
    ("vlm-r1", {"details": []}, "results"),
    ("question", [{"image": "b.png", "question": "Click it.", "text": "x"}] * 2,
     "has a prediction already")])
def test_a_form_that_does_not_fit_is_one_line(bench, capsys, form, held, said):
    folder, run = bench
    with pytest.raises(SystemExit) as stop:
        scored(folder, write_file(folder / "f.json", held), "--form", form)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and len(err.strip().splitlines()) == 1, err


CLICKS = [                                      # convention, text, what it says in the plain form
    ("pyautogui", "pyautogui.click(x=467, y=109)", "(467, 109)"),
    ("pyautogui", "```\npyautogui.click(467, 109.5)\n```", "(467, 109.5)"),
    ("pyautogui", "<think> pyautogui.click(1, 1) </think> pyautogui.moveTo(5, 6)", "(5, 6)"),
    ("pyautogui", "(467, 109)", ""),
    ("tool-call",
     '{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [467, 109]}}',
     "(467, 109)"),
    ("tool-call", "<think> at (3, 4) </think> I am done", ""),
    ("bare", "467, 109", "(467, 109)"), ("bare", "<answer>467,109</answer>", "(467, 109)"),
    ("bare", "It is at 467, 109 or so", ""), ("bare", "1, 2, 3, 4", "(1, 2, 3, 4)"),
    ("point-tag", "<point>467 109</point>", "(467, 109)"),
    ("point-tag", '<point x="46.7" y="10.9" alt="a cart">a cart</point>', "(46.7, 10.9)"),
    ("point-tag", "467, 109", "")]


@pytest.mark.parametrize("answers, text, said", CLICKS)
def test_clicks_of_agents(answers, text, said):
    """Claim: a named convention reads its own spelling and nothing else; the first click counts,
    thoughts do not."""
    assert rewards.answer_part(agent_answers.as_plain(text, answers))[0].strip() == said


def test_a_convention_is_named_and_never_guessed(bench):
    folder, run = bench
    rows = texts("pyautogui.click(x=110, y=55)", "pyautogui.click(315, 15)")
    assert (run(rows, "--answers", "pyautogui")["correct"] == 3
            and run(rows, "--answers", "bare")["correct"] == 1)
    assert run(rows)["correct"] < 3


def test_many_unreadable_answers_are_shown(bench, capsys):
    """Claim: where many answers cannot be read, the program says so and shows one; where most,
    three, and the conventions."""
    folder, run = bench
    run(texts("pyautogui.moveTo()", "nowhere", "none"))
    out = capsys.readouterr().out
    assert ("3 of 3 answers cannot be read" in out and "pyautogui.moveTo()" in out
            and "none" in out and "known: plain, pyautogui" in out)
    run(texts("(110, 55)", "nowhere"))
    out = capsys.readouterr().out
    assert "1 of 3 answers cannot be read" in out and "nowhere" in out and "known:" not in out
    run(texts("(110, 55)", "(315, 15)"))
    assert "cannot be read" not in capsys.readouterr().out


def test_all_images_are_read_before_the_first_mode(tmp_path, monkeypatch):
    """Bug: only the images of samples that the first mode still lacked were checked."""
    checked = []
    samples = [choice(f"c{i}") for i in range(3)]
    monkeypatch.setattr(
        evaluate, "load_model",
        lambda cfg, samples: checked.append([s.id for s in samples]) or object())
    monkeypatch.setattr(
        evaluation_run.EpisodeFile, "missing",
        lambda self, label, samples: [0] if label == evaluate.MODES["on"] else [0, 2])
    monkeypatch.setattr(evaluate, "run_episodes", lambda *_: [])
    monkeypatch.setattr(evaluation_run.EpisodeFile, "collect", lambda *_: [])
    evaluate.run_modes(evaluate.Config(zoom="all", style="zoom", out=str(tmp_path)), samples)
    assert checked == [["c0", "c2"]]


def test_folders_with_colons_compare(bench, capsys):
    """Bug: --compare split its two folders at the colon of a path."""
    folder, run = bench
    run(texts("(110, 55)", "(315, 15)"))
    (folder / "out").rename(folder / "a:b")
    run(texts("(110, 55)", "(1, 1)"))
    found = evaluate.main(
        ["--compare", str(folder / "a:b"), str(folder / "out"), "--out", str(folder / "d")])
    assert (found["only_a"], found["only_b"], found["n"]) == (1, 0, 3)


def test_missing_and_unreadable_predictions_count_as_wrong_format(bench, capsys):
    _, run = bench
    s = run([{"id": "p2", "text": "(315, 15)"}, {"id": "p1", "text": "somewhere on the left"}])
    assert (s["n"], s["correct"], s["wrong_format"]) == (3, 1, 2)
    assert s["categories"]["toy"] == {
        "n": 1, "correct": 0, "accuracy": 0.0, "low": 0.0,
        "high": pytest.approx(0.7935, abs=1e-4), "wrong_format": 1}
    assert "1 of 3 samples have no prediction" in capsys.readouterr().out


@pytest.mark.parametrize("row, said", [
    ('{"id": "p1", "text": ', "line 2: not JSON"),
    ('["p1", "x"]', "line 2: field 'id' is missing"),
    ({"text": "x"}, "line 2: field 'id' is missing"),
    ({"id": "p1"}, "line 2: field 'text' is missing"),
    ({"id": "p1", "text": 7}, "line 2: field 'text' is 7; expected str"),
    ({"id": "c1", "text": "lined"}, "line 2: id 'c1' has a prediction already"),
    ({"id": "p9", "text": "x"},
     "line 2: id 'p9' is not in the data; expected one of its 3 ids, such as 'p1'")])
def test_a_bad_row_is_named(bench, capsys, row, said):
    folder, run = bench
    with pytest.raises(SystemExit) as stop:
        run([{"id": "c1", "text": "checked"}, row])
    err = capsys.readouterr().err
    assert (stop.value.code == 2 and f"error: {folder}/texts.jsonl, {said}" in err
            and err.count("\n") == 1)
    assert not os.path.exists(folder / "out" / "summary.json")


def test_wrong_use_is_one_line(bench, capsys):
    folder, run = bench
    good = texts("(110, 55)", "(315, 15)")
    for flags, said in (
            (["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
            (["--batch", "0"], "--batch, --max-new-tokens and --samples must be at least 1"),
            (["--circular"], "--circular asks a model again"),
            (["--compare", "x"], "--compare needs two different folders"),
            (["--compare", "x", "./x"], "--compare needs two different folders"),
            (["--predictions", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
            (["--out", "/proc/x"], "cannot write into /proc/x"),
            (["--convention", "fed", "--model", "other"], "--convention fed needs --max-pixels")):
        with pytest.raises(SystemExit) as stop:
            run(good, *flags)
        err = capsys.readouterr().err
        assert (stop.value.code == 2 and err.startswith("error: " + said)
                and err.count("\n") == 1), err
    data.write_jsonl(str(folder / "bench.jsonl"), [choice("c1", "a.png"), choice("c1", "b.png")])
    with pytest.raises(SystemExit):
        run([])
    assert "bench.jsonl, line 2: the id 'c1' is that of an earlier row" in capsys.readouterr().err


@pytest.mark.parametrize("kind, text, right, unreadable", [
    ("point", "<answer> (110, 55) </answer> no, <answer> (3, 3) </answer>", 0, 0),
    ("point", "<answer> (3, 3) </answer> <answer> (110, 55) </answer>", 1, 0),
    ("point", '```json\n[{"point_2d": [110, 55], "label": "(3, 3)"}]\n```', 1, 0),
    ("point", "<answer> (110.4, 55.0) </answer>", 1, 0),
    ("point", "<answer> (-110, 55) </answer>", 0, 0),
    ("point", "<answer> (110, 55), (3, 3) </answer>", 1, 0),
    ("point", "<answer> left </answer>", 0, 1), ("point", "<answer> (1e2, 55) </answer>", 0, 1),
    ("point", "x" * 10_000_000 + "<answer> (110, 55) </answer>", 1, 0),
    ("point", "<answer> (NaN, inf) </answer>", 0, 1), ("point", EVIL, 0, 1),
    ("point", "(" * 3_000_000, 0, 1),
    ("box", "<think> (100, 50),(120, 60) </think>", 0, 1),
    ("box", "<think> (100, 50),(120, 60) </think> <answer> (0, 0),(9, 9) </answer>", 0, 0),
    ("box", "<think> (0, 0),(9, 9) </think> <answer> (100, 50),(120, 60) </answer>", 1, 0),
    ("box", "<answer> (120, 60),(100, 50) </answer>", 0, 0),
    ("box", '{"bbox_2d": [100, 50, 120, 60.0]}', 1, 0),
    ("box", "<answer> (-100, -50),(120, 60) </answer>", 0, 0),
    ("box", "<answer> (110, 55) </answer>", 0, 1),
    ("choice", "<answer> lined </answer> <answer> checked </answer>", 1, 0),
    ("choice", "<answer> lined or checked </answer>", 0, 1),
    ("choice", "<answer>" + EVIL + "</answer>", 0, 1),
    ("choice", "<answer> B) lined </answer>", 0, 1), ("choice", "", 0, 1)])
def test_adversarial_predictions_are_scored_by_the_rule(kind, text, right, unreadable):
    samples = {"point": point(image="x.png"), "choice": choice(image="x.png"),
               "box": Sample("b", ["x.png"], "Box it.", "box",
                             targets=[{"image": 0, "box": [100, 50, 120, 60]}])}
    e = predictions.from_predictions([samples[kind]], {samples[kind].id: text})[0]
    assert (evaluate.right(e), e.reward_components["wrong_format"]) == (right, unreadable)
    assert evaluate.record(e)["verdict"] == ("right" if right else "wrong")


@pytest.mark.slow
def test_ten_thousand_predictions_in_ten_seconds():
    """No image exists here; none may be opened."""
    samples = [point(str(i), "x.png") if i % 2 else choice(str(i), "x.png") for i in range(10_000)]
    said = {
        s.id: (f"<think> First look at ({i % 200}, 50). " + "It is here, at (110, 55). " * 10
               + "</think> <answer> (110, 55) </answer>")
        for i, s in enumerate(samples)}
    began = time.process_time()
    episodes = predictions.from_predictions(samples, said)
    analysis.describe(episodes)
    s = evaluate.summary_of(episodes)
    assert [evaluate.record(e) for e in episodes] and time.process_time() - began < 10
    assert (s["n"], s["correct"], s["wrong_format"], s["subgoals"]) == (10_000, 5_000, 5_000, 1)


def test_compare(bench, capsys):
    """Two models over the same questions, from the command line."""
    folder, run = bench
    a, b, out = (str(folder / name) for name in "abc")
    for to, rows in ((a, texts("(110, 55)", "(3, 3)", "lined")),
                     (b, texts("(110, 55)", "(315, 15)", "checked"))):
        run(rows)
        os.rename(folder / "out", to)
    capsys.readouterr()
    found = evaluate.main(["--compare", a, b, "--out", out])
    assert {k: found[k] for k in ("n", "both", "only_a", "only_b", "neither", "p")} == dict(
        n=3, both=1, only_a=0, only_b=2, neither=0, p=0.5)
    assert json.load(open(f"{out}/compare.json"))["difference"] == pytest.approx(2 / 3)
    assert f"right only in {a}: 0; only in {b}: 2; in both: 1" in capsys.readouterr().out
    rows = [json.loads(line) for line in open(f"{b}/episodes.jsonl")]
    for change, said in (([{**r, "question": "?"} for r in rows], "not the same data"),
                         ([{**r, "id": "z"} for r in rows], "share no question"),
                         ([{"step": 1}], "line 1: field 'run' is missing")):
        open(f"{b}/episodes.jsonl", "w").writelines(json.dumps(r) + "\n" for r in change)
        with pytest.raises(SystemExit):
            evaluate.main(["--compare", a, b, "--out", out])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["--compare", a, str(folder / "nowhere")])
    assert "cannot read" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Runs that stop and go on

def choices(folder, n=7):
    photo().save(folder / "a.png")
    data.write_jsonl(str(folder / "c.jsonl"), [
        Sample(f"c{i}", ["a.png"], "?", "choice", ["lined", "checked", "barred"], 1,
               category=[f"k{i % 2}"])
        for i in range(n)])
    return str(folder / "c.jsonl")


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, monkeypatch, capsys):
    """Bug: a run killed after hours starts from nothing, or counts a question twice."""
    monkeypatch.setattr(prefix, "load_vlm", lambda *_, **__: Eyes())
    file, stop = choices(tmp_path), []

    def fail(samples):
        if samples[0].id == "c4" and stop:
            raise KeyboardInterrupt
    calls = fake_rollout(
        monkeypatch, lambda s, zoom: "checked" if s.id in ("c1", "c5") else "lined", fail)
    command = lambda out, *more: [
        "--data", file, "--batch", "2", "--seed", "3", "--out", str(tmp_path / out), *more]
    whole = evaluate.main(command("whole"))
    assert [seed for _, seed, *_ in calls] == [3, 5, 7, 9] and whole["correct"] == 2
    calls.clear()
    stop.append(1)
    with pytest.raises(SystemExit):
        evaluate.main(command("cut"))
    path = tmp_path / "cut" / "episodes.jsonl"
    assert ([json.loads(line)["id"] for line in open(path)] == ["c0", "c1", "c2", "c3"]
            and not (tmp_path / "cut" / "summary.json").exists())
    # killed in the middle of a row
    open(path, "a").write('{"run": "zoom allowed", "id": "c4", "que')
    stop.clear()
    calls.clear()
    assert evaluate.main(command("cut")) == whole
    assert [(ids, seed) for ids, seed, *_ in calls] == [(["c4", "c5"], 7), (["c6"], 9)]
    assert open(path).read() == open(tmp_path / "whole" / "episodes.jsonl").read()
    pages = [re.sub(f"run (<b>)?{name}", "", open(tmp_path / name / "report.html").read())
             for name in ("cut", "whole")]
    assert pages[0] == pages[1]
    calls.clear()
    # finished: nothing is asked again
    assert evaluate.main(command("cut", "--drawn", "1")) == whole and not calls
    capsys.readouterr()
    os.utime(file, (1, 1))                                      # the same name, another file
    for more, said in ((["--temperature", "1"], "temperature (0.0 there, 1.0 here)"),
                       ([], "the file of --data")):
        with pytest.raises(SystemExit):
            evaluate.main(command("cut", *more))
        err = capsys.readouterr().err
        assert (f"error: {tmp_path}/cut holds a run with other settings" in err and said in err
                and "--fresh" in err and err.count("\n") == 1)
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(SystemExit):                             # nor may predictions overwrite it
        evaluate.main(command("cut", "--predictions", str(tmp_path / "p.jsonl")))
    assert evaluate.main(command("cut", "--fresh")) == whole and len(calls) == 4


def test_an_image_that_vanishes_names_what_is_kept(tmp_path, monkeypatch, capsys):
    """Bug: an evaluation that loses an image after hours does not say that its episodes are
    kept."""
    monkeypatch.setattr(prefix, "load_vlm", lambda *_, **__: Eyes())

    def fail(samples):
        if samples[0].id == "c4":
            raise files.DataError("image a.png does not exist")
    fake_rollout(monkeypatch, fail=fail)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--data", choices(tmp_path), "--batch", "2", "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err == (
        "error: image a.png does not exist. the episodes so far are kept: "
        "the same command goes on from there\n")
    assert len(open(tmp_path / "out" / "episodes.jsonl").readlines()) == 4


def test_a_full_disk_ends_in_one_line(tmp_path, monkeypatch, capsys):
    """Bug: a disk that takes a part of the rows is taken for one that took them all; or the message
    names no file."""
    monkeypatch.setattr(prefix, "load_vlm", lambda *_, **__: Eyes())
    fake_rollout(monkeypatch)
    path, written = str(tmp_path / "out" / "episodes.jsonl"), []

    class Disk:
        """It takes nine bytes at a time, and so many in all."""
        room = 10 ** 9

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, content):
            if len(written) >= self.room:
                raise OSError(28, "No space left on device")
            written.extend(content[:9])
            return len(content[:9])
    opened = lambda name, *more, **options: (
        Disk() if str(name) == path and more == ("ab",) else open(name, *more, **options))
    monkeypatch.setattr(evaluation_run, "open", opened, raising=False)
    command = ["--data", choices(tmp_path), "--batch", "2", "--out", str(tmp_path / "out"),
               "--plain"]
    evaluate.main(command)
    assert ([json.loads(line)["id"] for line in bytes(written).decode().splitlines()]
            == [f"c{i}" for i in range(7)])
    Disk.room = len(written) + 50
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*command, "--fresh"])
    err = capsys.readouterr().err
    assert (stop.value.code == 2
            and err.startswith(f"error: {path}: No space left on device. "
                               "the episodes so far are kept")
            and err.count("\n") == 1)


def test_predictions_replace_their_rows_at_once(bench, monkeypatch, capsys):
    """Bug: the rows of the earlier scoring are gone before those of the next one are written."""
    folder, run = bench
    run(texts("(110, 55)", "(315, 15)"))
    before = open(folder / "out" / "episodes.jsonl").read()
    monkeypatch.setattr(evaluation_run, "record", lambda e: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main(["--data", str(folder / "bench.jsonl"),
                       "--predictions", str(folder / "texts.jsonl"), "--out", str(folder / "out")])
    assert open(folder / "out" / "episodes.jsonl").read() == before


@pytest.mark.parametrize("line", [
    "{garbled", "[1]", '{"run": "zoom allowed"}', '{"run": ["x"], "id": "c0"}', "\x00\x00"])
def test_a_garbled_row_is_named(tmp_path, monkeypatch, capsys, line):
    """Bug: a line of episodes.jsonl that is no row ends the next run with a traceback."""
    monkeypatch.setattr(prefix, "load_vlm", lambda *_, **__: Eyes())
    fake_rollout(monkeypatch)
    command = ["--data", choices(tmp_path), "--out", str(tmp_path / "out"), "--plain"]
    evaluate.main(command)
    path = tmp_path / "out" / "episodes.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], line, *rows[1:]]) + "\n")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(command)
    err = capsys.readouterr().err
    assert (stop.value.code == 2 and f"error: {path}, line 2 is " in err
            and "--fresh" in err and err.count("\n") == 1)
    assert evaluate.main([*command, "--fresh"])["n"] == 7


def test_long_drawing_names_the_flag(bench, monkeypatch, capsys):
    """Claim: who waits for the page is told of --drawn 0; who does not wait is not."""
    folder, run = bench
    real = evaluation_run.write_page
    for wait in (0.3, 0):
        monkeypatch.setattr(evaluation_run, "LONG_DRAWING", 0.05 if wait else 60)
        monkeypatch.setattr(evaluation_run, "write_page",
                            lambda *more: time.sleep(wait) or real(*more))
        run(texts("(110, 55)", "(315, 15)"))
        assert ("drawing takes long: the same command with --drawn 0"
                in capsys.readouterr().out) == bool(wait)


def test_options_are_permuted_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(prefix, "load_vlm", lambda *_, **__: Eyes())
    fake_rollout(monkeypatch, lambda s, zoom: "B")
    file = choices(tmp_path, 30)
    command = lambda out, *more: evaluate.main(
        ["--data", file, "--out", str(tmp_path / out), "--drawn", "0", *more])
    assert command("as published", "--no-shuffle")["accuracy"] == 1
    assert 0 < command("permuted")["correct"] < 30
    circular = command("circular", "--circular")
    # one text is right in all
    assert (circular["n"], circular["correct"], circular["chance"]) == (90, 30, 1)
    assert len({json.loads(line)["id"]
                for line in open(tmp_path / "circular" / "episodes.jsonl")}) == 90


def test_a_real_model_may_say_more(tmp_path, monkeypatch, capsys):
    """Bug: a thought of a real model is cut off after the 64 tokens that the tiny one needs, and
    counts as unreadable."""
    monkeypatch.setattr(prefix, "load_vlm", lambda *_, **__: Eyes())
    monkeypatch.setattr(evaluation_run, "print_memory", lambda *_: None)
    calls, file = fake_rollout(monkeypatch), choices(tmp_path)
    for n, (more, length) in enumerate([
            ([], 64), (["--model", "qwen3-vl-2b"], 512),
            (["--model", "qwen3-vl-2b", "--max-new-tokens", "9"], 9)]):
        evaluate.main(["--data", file, "--out", str(tmp_path / str(n)), *more])
        assert calls.pop()[3].max_new_tokens == length
    assert "max_new_tokens = 512" in capsys.readouterr().out


def test_boxes_are_asked_for_without_zooms(tmp_path, monkeypatch):
    """Bug: a benchmark of boxes across images is asked to zoom, which the tool can do in the first
    image alone."""
    monkeypatch.setattr(prefix, "load_vlm", lambda *_, **__: Eyes())
    calls = fake_rollout(monkeypatch, lambda s, zoom: "(1, 2),(3, 4)")
    photo().save(tmp_path / "a.png")
    box = Sample("b", ["a.png"], "Box it.", "box",
                 targets=[{"image": 0, "box": [100, 50, 120, 60]}])
    for n, (samples, more, style) in enumerate([
            ([box], [], "boxes"), ([box], ["--style", "zoom"], "zoom"),
            ([box, point(image="a.png")], [], "zoom")]):
        data.write_jsonl(str(tmp_path / "d.jsonl"), samples)
        evaluate.main(["--data", str(tmp_path / "d.jsonl"), "--zoom", "all",
                       "--out", str(tmp_path / str(n)), *more])
        assert ({config.style for *_, config, _ in calls} == {style}
                and len(calls) == (1 if style == "boxes" else 4))
        calls.clear()


def test_zoom_gain_and_harm(tmp_path, monkeypatch):
    """Right only with zoom; right only without; and black crops beside them."""
    monkeypatch.setattr(prefix, "load_vlm", lambda *_, **__: Eyes())
    hits = {"on": {"c0", "c1", "c2", "c3"}, "off": {"c3", "c4"}, "black": {"c0"},
            "wrong": {"c0", "c3", "c4"}}
    fake_rollout(monkeypatch, lambda s, zoom: "checked" if s.id in hits[zoom] else "lined")
    s = evaluate.main(
        ["--data", choices(tmp_path), "--zoom", "all", "--out", str(tmp_path / "out")])
    assert (s["zoom_gain"], s["zoom_harm"]) == (pytest.approx(3 / 7), pytest.approx(1 / 7))
    assert (s["paired"]["off"]["only_b"], s["paired"]["off"]["only_a"],
            s["paired"]["black"]["only_b"]) == (3, 1, 3)
    assert (s["paired"]["wrong"]["only_b"], s["paired"]["wrong"]["only_a"],
            list(s["paired"])) == (2, 1, ["off", "black", "wrong"])
    assert (s["modes"]["on"]["accuracy"] == s["accuracy"] == 4 / 7
            and s["modes"]["black"]["correct"] == 1)
    assert "zoom gain 42.9%, zoom harm 14.3%" in open(tmp_path / "out" / "report.html").read()


def test_pass_at_k_is_unbiased():
    """Claim: Chen et al. 2021, eq. 1, is the share of the sets of k among n answers that hold a
    right one; its mean over the draws of n coins is 1 - (1 - p)^k exactly. The plug-in estimate is
    too small."""
    for n, c, k in itertools.product((4, 5), (0, 1, 3, 4), (1, 2, 4)):
        sets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(any, sets)) / len(sets))
    p, n, k = 0.3, 6, 4
    expected = sum(math.comb(n, c) * p ** c * (1 - p) ** (n - c) * evaluate.pass_at_k(n, c, k)
                   for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k)


def test_samples_of_a_question(tmp_path, monkeypatch):
    """Claim: --samples 4 asks every question four times under ids of its own, gives pass@1, 2, 4,
    and counts a question as one in the interval. It needs a temperature."""
    monkeypatch.setattr(prefix, "load_vlm", lambda *_, **__: Eyes())
    fake_rollout(monkeypatch,
                 lambda s, zoom: "checked" if s.id in ("c0#0", "c0#1", "c1#3") else "lined")
    out = str(tmp_path / "out")
    command = ["--data", choices(tmp_path, 3), "--no-shuffle", "--samples", "4", "--out", out]
    for refused in ([], ["--temperature", "1", "--circular"]):
        with pytest.raises(SystemExit):
            evaluate.main([*command, *refused])
    s = evaluate.main([*command, "--temperature", "1"])
    assert s["n"] == 12 and s["accuracy"] == 0.25 and "all_rotations" not in s
    assert s["pass_at"] == pytest.approx({"1": 0.25, "2": (5 / 6 + 1 / 2) / 3, "4": 2 / 3})
    assert (s["low"], s["high"]) == pytest.approx(evaluate.wilson(0.75, 3))
    assert f"pass@4 {2 / 3:.1%}" in open(tmp_path / "out" / "report.html").read()
    assert "pass_at" not in evaluate.main(
        ["--data", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "one")])


def test_plain_counts_no_behaviour_and_draws_no_page(tmp_path, monkeypatch, capsys):
    """Claim: --plain loads the plain cache and leaves the rest of the appendix alone; the accuracy
    is the same."""
    loaded = []
    monkeypatch.setattr(prefix, "load_vlm", lambda *_, plain, **__: loaded.append(plain) or Eyes())
    fake_rollout(monkeypatch)
    out = tmp_path / "out"
    behaviours = lambda: [json.loads(line)["behaviour"] for line in open(out / "episodes.jsonl")]
    whole = evaluate.main(["--data", choices(tmp_path, 3), "--out", str(out)])
    assert (behaviours()[0]["regions"] == 1 and whole["regions"] == 1
            and (out / "report.html").exists())
    os.remove(out / "report.html")
    plain = evaluate.main(
        ["--data", str(tmp_path / "c.jsonl"), "--out", str(out), "--plain", "--fresh"])
    assert (behaviours() == [{}] * 3 and not (out / "report.html").exists()
            and loaded == [False, True])
    assert "report.html" not in capsys.readouterr().out.split("settings")[2]
    assert (plain["accuracy"] == whole["accuracy"]
            and whole.keys() - plain.keys() == {*analysis.COUNTS})


@pytest.mark.slow
def test_as_a_script(bench):
    folder, _ = bench
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in texts("(110, 55)", "(3, 3)")))
    out = subprocess.run(
        [sys.executable, "evaluate.py", "--data", folder / "bench.jsonl",
         "--predictions", folder / "texts.jsonl", "--out", folder / "out"],
        cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0 and out.stderr == "", out.stderr
    assert ("66.7%" in out.stdout
            and json.load(open(folder / "out" / "summary.json"))["correct"] == 2)


def test_toy_task_takes_predictions_too(tmp_path, capsys):
    samples = data.toy("search", "test", 4, seed=3)
    (tmp_path / "t.jsonl").write_text("".join(
        json.dumps({"id": s.id, "text": s.options[s.answer]}) + "\n" for s in samples))
    s = evaluate.main(["--n", "4", "--seed", "3", "--predictions", str(tmp_path / "t.jsonl"),
                       "--out", str(tmp_path / "out")])
    assert (s["correct"], s["chance"]) == (4, 0.75) and "chance 75.0%" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Do the tests bite? Each line puts one bug into evaluate.py or its parts; the named test must fail.

MUTATIONS = [
    ("evaluate:wilson", "s * (p * (1 - p) + s / 4)",
     "s * p * (1 - p)", test_wilson_against_published_values,
     dict(correct=10, n=10, low=0.7225, high=1)),
    ("evaluate:wilson", "(p + s / 2) / (1 + s)",
     "(p + s / 2) / 1", test_wilson_is_symmetric_inside_0_1_and_shrinks_with_n, {}),
    ("evaluate:wilson", "math.sqrt(s * (p * (1 - p) + s / 4))",
     "math.sqrt(s * p * (1 - p))", test_wilson_is_symmetric_inside_0_1_and_shrinks_with_n, {}),
    ("appendix.prediction_files:likeness", "parts += 1",
     "pass", test_twin_questions_are_told_apart, {}),
    ("appendix.prediction_files:likeness", "abs(u - v) <= 1",
     "False", test_twin_questions_are_told_apart, {}),
    ("appendix.prediction_files:match", "waiting[name].remove(best)",
     "pass", test_twin_questions_are_told_apart, {}),
    ("appendix.evaluation_run:EpisodeFile.add", "content[f.write(content):]",
     "f.write(content) and b''", test_a_full_disk_ends_in_one_line, {}),
    ("appendix.evaluation_run:said_on_error", "raise DataError(f'{e}. {saved}') from None",
     "raise", test_an_image_that_vanishes_names_what_is_kept, {}),
    ("appendix.episode_rows:is_right", 'components["iou"] >= 0.5 - 1e-6',
     'components["iou"] > 0.4', test_right_means_the_same_for_every_recipe, {}),
    ("appendix.episode_rows:is_right", 'components["accuracy"] >= 1 - 1e-6',
     'components["accuracy"] > 0', test_summarise_boxes_partial_credit_hidden_gold_and_nothing, {}),
    ("appendix.episode_rows:is_right", 'benchmark == "vlm-r1"',
     "False", test_overlap_of_exactly_one_half_and_at_each_threshold, {}),
    ("evaluate:count", '[r["iou"] for r in scored if "iou" in r]',
     '[r["iou"] for r in scored if is_right(r)]',
     test_summarise_boxes_partial_credit_hidden_gold_and_nothing, {}),
    ("evaluate:count", 'len({r.get("of", r.get("sample_of", i)) for i, r in enumerate(scored)})',
     "n", test_rotations_of_a_question_are_one_piece_of_evidence, {}),
    ("evaluate:count", 'r.get("sample_of", i)', "i", test_samples_of_a_question, {}),
    ("evaluate:pass_at_k", "1 - math.comb(n - c, k) / math.comb(n, k)",
     "1 - (1 - c / n) ** k", test_pass_at_k_is_unbiased, {}),
    ("evaluate:pass_at", "pass_at_k(len(hits), sum(hits), k)",
     "pass_at_k(len(hits), sum(hits), 1)", test_samples_of_a_question, {}),
    ("appendix.averages:categories_of", 'list(row["category"])',
     'list(row["category"][:1])', test_summarise_counts_by_category, {}),
    ("appendix.averages:categories_of", "levels > 1",
     "levels > 2", test_each_benchmark_averages_by_its_own_rule, {}),
    ("appendix.averages:CELLS", "(2, 6)",
     "(1, 3)", test_each_benchmark_averages_by_its_own_rule, {}),
    ("appendix.averages:CELLS", "(1, 14)",
     "(0, 1)", test_each_benchmark_averages_by_its_own_rule, {}),
    ("evaluate:paired", "only_b = sum(b[i] for i in ids) - both",
     "only_b = only_a", test_paired_against_hand_numbers, {}),
    ("evaluate:mcnemar", "term * (m - k) // (k + 1)",
     "term * (m - k) / (k + 1)", test_paired_against_hand_numbers, {}),
    ("evaluate:mcnemar", "min(1.0, 2 * tail / 2 ** m)",
     "min(1.0, tail / 2 ** m)", test_paired_against_hand_numbers, {}),
    ("evaluate:presets", '{"max_new_tokens": 512}', "{}", test_a_real_model_may_say_more, {}),
    ("appendix.evaluation_run:style_of", '"boxes" if only_boxes else "zoom"',
     '"zoom"', test_boxes_are_asked_for_without_zooms, {}),
    ("evaluate:run_episodes", "config.seed + block * options.batch",
     "config.seed", test_run_scores_in_order_and_keeps_memory_small, {}),
    ("evaluate:run_episodes", "views[i:i + n]",
     "views", test_run_scores_in_order_and_keeps_memory_small, {}),
    ("evaluate:finish_episode", "if not options.views:\n    e.views = []",
     "pass", test_run_scores_in_order_and_keeps_memory_small, {}),
    ("appendix.predictions:predicted_episodes",
     '32 if spec and spec.convention == "thousand" else 28',
     "28", test_fed_pixels_are_those_of_the_family, {}),
    ("appendix.evaluation_run:with_order", "order.index(s.answer)",
     "s.answer", test_arrange_moves_the_gold_along, {}),
    ("appendix.evaluation_run:arrange", 'random.Random(f"{seed}/{s.id}")',
     "random.Random(seed)",
     test_an_always_first_answer_scores_chance_once_options_are_permuted, {}),
    ("appendix.episode_rows:token_texts", "not e.completion_mask[i]",
     "False", test_token_texts_tell_chosen_tokens_from_given_ones, {}),
    ("evaluate:run_episodes", "not options.plain",
     "True", test_plain_counts_no_behaviour_and_draws_no_page, {}),
]


@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, tmp_path, monkeypatch, capsys):
    """Bug: a test that no bug can turn red."""
    fixtures = {"tmp_path": lambda: tmp_path, "monkeypatch": lambda: monkeypatch,
                "capsys": lambda: capsys}
    check_mutation(target, old, new, test, arguments, fixtures)
