"""evaluate.py: intervals, counts, predictions from the command line, and a report that nothing written by a model can break.

    python -m pytest tests/test_evaluate.py        # no model is loaded
"""
import base64, io, json, os, re, subprocess, sys
from html.parser import HTMLParser

import pytest
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data, evaluate, rewards, zoom_rollout
from data import Sample
from evaluate import is_right, record, report, summarise, wilson
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
    report(path, more.pop("title", "A title"), episodes if episodes and isinstance(episodes[0], tuple) else [("all", episodes)], **more)
    return Page(path)


# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("correct, n, low, high", [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1),
                                                   (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)])
def test_wilson_against_published_values(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_is_symmetric_inside_0_1_and_shrinks_with_n():
    for n in (1, 7, 40):
        for k in range(n + 1):
            low, high = wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1
            assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))
    widths = [wilson(n // 2, n)[1] - wilson(n // 2, n)[0] for n in (10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)


def test_summarise_counts_by_category():
    row = lambda accuracy, *category, **more: {"id": "x", "category": list(category), "accuracy": accuracy, "wrong_format": 0.0, **more}
    s = summarise([row(1.0, "web", "icon"), row(0.0, "web", "text", wrong_format=1.0), row(1.0, "mobile", "icon"), row(0.0, "mobile", "icon")])
    assert (s["n"], s["correct"], s["accuracy"], s["wrong_format"]) == (4, 2, 0.5, 1)
    assert (s["low"], s["high"]) == wilson(2, 4)
    assert list(s["categories"]) == ["web", "icon", "text", "mobile"]
    assert {k: (c["n"], c["correct"]) for k, c in s["categories"].items()} == {"web": (2, 1), "icon": (3, 2), "text": (1, 0), "mobile": (2, 1)}
    assert s["categories"]["text"]["wrong_format"] == 1 and "mean_iou" not in s and "hidden" not in s
    assert json.loads(json.dumps(s)) == s                                      # plain numbers only


def test_summarise_boxes_partial_credit_hidden_gold_and_nothing():
    row = lambda **more: {"id": "x", "category": [], "wrong_format": 0.0, **more}
    s = summarise([row(accuracy=0.7, iou=0.7), row(accuracy=0.3, iou=0.3), row(accuracy=1.0, iou=0.5)])    # univg-r1: accuracy is the IoU
    assert (s["correct"], s["mean_iou"]) == (2, pytest.approx(0.5))
    assert summarise([row(accuracy=0.5)])["correct"] == 0                      # half of a web action is no right answer
    s = summarise([row(accuracy=0.0, hidden=1.0), row(accuracy=1.0)])          # BLINK's test split: no gold, no mistake
    assert (s["n"], s["correct"], s["hidden"]) == (1, 1, 1)
    assert (summarise([])["n"], summarise([])["accuracy"]) == (0, 0.0)


def test_right_means_the_same_for_every_recipe():
    box = Sample("b", [photo()], "Box it.", "box", targets=[{"image": 0, "box": [0, 0, 100, 100]}])
    for recipe in ("univg-r1", "vigorl", "accuracy"):
        for edge, right in ((100, True), (51, True), (49, False)):
            e = episode(box, Turn(f"<think> x </think>\n<answer> (0, 0),({edge}, 100) </answer>"), recipe=recipe, scale=(1, 1))
            assert is_right(e.parts) == right, (recipe, edge)


def test_run_scores_in_order_and_keeps_memory_small(monkeypatch):
    """Batches, seeds and views must go to the rollout together; thousands of decoded screenshots must not stay in memory."""
    class View:
        features, deep, source = "big", "big", "big"
    calls = []

    def rollout(vlm, samples, group_size, *, seed, views, **options):
        calls.append((len(samples), seed, views, options))
        episodes = [zoomed(s) for s in samples]
        for e in episodes:
            e.views = [View()]
        return episodes
    monkeypatch.setattr(zoom_rollout, "rollout", rollout)
    monkeypatch.setattr(evaluate, "DRAWN", 2)
    samples = [choice(str(i)) for i in range(5)]
    episodes = evaluate.run(None, samples, zoom="black", seed=7, batch=2, progress=False, max_new_tokens=9)
    assert [e.sample.id for e in episodes] == list("01234") and all(e.parts["accuracy"] == 1 for e in episodes)
    assert [(n, seed) for n, seed, _, _ in calls] == [(2, 7), (2, 9), (1, 11)]
    assert calls[0][3] == dict(zoom="black", style="zoom", temperature=0.0, max_zooms=3, max_new_tokens=9, skip=0)
    assert all(e.views[0].features is None for e in episodes)
    assert [e.views[0].source for e in episodes] == ["big", "big", None, None, None]
    calls.clear()
    episodes = evaluate.run(None, samples, batch=2, progress=False, views=[[i] for i in range(5)])
    assert [views for _, _, views, _ in calls] == [[[0], [1]], [[2], [3]], [[4]]]
    assert all(e.views[0].features == "big" for e in episodes)                 # the caller's views stay encoded


def test_record_is_one_json_row():
    row = json.loads(json.dumps(record(zoomed())))
    assert (row["answer"], row["options"], row["stop"], row["advantage"], row["tokens"]) == ("checked", ["lined", "checked"], "answer", 0.5, 2)
    assert row["turns"][0]["crop"] == [90, 36, 130, 76] and row["turns"][0]["point"] == [55, 14] and row["turns"][2]["forced"]
    assert row["turns"][1]["error"] and row["parts"]["accuracy"] == 1
    assert record(episode(point(), Turn("")))["answer"] == "(100, 50, 120, 60)"


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
    assert (s["low"], s["high"]) == wilson(3, 3)
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
                        (["--predictions", "nowhere.jsonl"], "cannot read nowhere.jsonl"), (["--out", "/proc/x"], "cannot write into /proc/x"),
                        (["--convention", "fed", "--model", "other"], "--convention fed needs --max-pixels")):
        with pytest.raises(SystemExit) as stop:
            run(good, *flags)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: " + said) and err.count("\n") == 1, err
    data.write_jsonl(str(folder / "bench.jsonl"), [choice("c1", "a.png"), choice("c1", "b.png")])
    with pytest.raises(SystemExit):
        run([])
    assert "holds the id 'c1' twice" in capsys.readouterr().err


def test_as_a_script(bench):
    folder, _ = bench
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts("(110, 55)", "(3, 3)")))
    out = subprocess.run([sys.executable, "evaluate.py", "--data", folder / "bench.jsonl", "--predictions", folder / "texts.jsonl", "--out", folder / "out"],
                         cwd=ROOT, capture_output=True, text=True, timeout=120)
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
    e.parts[EVIL] = 1.0
    text = Sample(EVIL, [photo()], EVIL, "text", answer=[EVIL], category=[EVIL])
    p = page(tmp_path, [(EVIL, [e, episode(text, Turn(EVIL))])], title=EVIL, curves=[{"step": i, EVIL: i} for i in range(3)], table=[("", [EVIL]), (EVIL, [EVIL])],
             settings={EVIL: EVIL})
    plain = page(tmp_path, [("a", [zoomed(), zoomed()])], curves=[{"step": i, "a": i} for i in range(3)], table=[("", ["a"]), ("a", ["a"])], settings={"a": "b"})
    assert {tag for tag, _ in p.tags} <= {tag for tag, _ in plain.tags}        # no tag that the page does not use anyway
    assert p.said.count("<script>alert(1)</script>") > 15                      # and the texts are there, as text
    assert not [a for _, attrs in p.tags for a in attrs if a.startswith("on")]
    assert evaluate.esc("\"'<&") == "&quot;&#x27;&lt;&amp;"                      # safe inside an attribute too
    assert len(p.all("article")) == 2 and p.source.count("</style>") == 1 and "<!--" not in p.source


def test_page_needs_nothing_from_outside_and_forbids_scripts(tmp_path):
    p = page(tmp_path, [zoomed()], curves=[{"step": i, "reward": i} for i in range(3)])
    policy = p.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy and "script-src" not in policy and "img-src data:" in policy
    assert not p.all("script") and not p.all("link") and not p.all("iframe")
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
    """The black control must look black in the report too."""
    class View:
        source, box = Image.new("RGB", (200, 100)), (90, 36, 130, 76)
    e = zoomed()
    e.views = [View()]
    p = page(tmp_path, [e])
    crop = Image.open(io.BytesIO(base64.b64decode(p.all("image")[1]["href"].split(",")[1])))
    assert crop.size == (40, 40) and crop.convert("RGB").getextrema() == ((0, 0),) * 3


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
    assert [re.match(r"[a-z]+", f)[0] for f in p.source.split("<figcaption>")[1:]] == ["reward", "flat", "rare"]
    raw, smooth = p.all("polyline")[:2]
    xy = [tuple(map(float, q.split(","))) for q in raw["points"].split()]
    assert len(xy) == 9 and [x for x, _ in xy] == sorted(x for x, _ in xy) and [y for _, y in xy] == sorted((y for _, y in xy), reverse=True)
    assert raw["points"] == smooth["points"]                                   # nine values are too few to smooth
    assert "step 80: 2" in p.said and all(0 <= x <= 300 and 0 <= y <= 150 for x, y in xy)
    many = page(tmp_path, [], curves=[{"step": i, **{f"m{k}": i * k for k in range(11)}} for i in range(1000)])
    assert "3 more" in many.said and len(many.all("circle")) < 11 * 160 and many.all("details")
    assert not page(tmp_path, [], curves=[{"step": 1, "reward": 1.0}]).all("figure")            # one point is no curve


@pytest.mark.parametrize("low, high", [(0, 1), (0.31, 0.97), (-3e-6, 2e-6), (117, 120), (0, 99999), (-1, 0)])
def test_ticks_are_round_and_span_the_values(low, high):
    marks = evaluate.ticks(low, high)
    step = marks[1] - marks[0]
    assert 3 <= len(marks) <= 6 and marks[0] <= low + 1e-9 * step and marks[-1] >= high - 1e-9 * step
    assert float(f"{step:.0e}") == pytest.approx(step)                         # one digit


def test_table_of_summaries(tmp_path):
    summary = summarise([{"id": "x", "category": [], "accuracy": float(i < 50), "wrong_format": 0.0} for i in range(100)])
    p = page(tmp_path, [], table=[("", ["before", "after"]), ("search", [summary, "n/a"])])
    assert "50.0 %" in p.said and "40.4 to 59.6" in p.said and "n/a" in p.said
    assert p.all("rect", class_="range")[0] | {"height": ""} == {"class": "range", "x": "40.38", "width": "19.23", "height": ""}
