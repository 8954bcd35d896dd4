"""The report and the trees page: nothing that a model or a data file wrote can run in them, every
mark is drawn where it belongs, and they stay light. No model is loaded. At the end MUTATIONS puts
bugs into appendix/report.py and the files that it draws with.
"""
import base64, hashlib, io, json, re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from PIL import Image

import data, evaluate, train_rl
from appendix import (chains, evaluation_run, files, group_view, metrics, page, predictions, report,
                      rl_run, trees_page)
from conftest import check_mutation, names
from data import Sample
from test_evaluate import EVIL, choice, episode, photo, point, zoomed
from zoom_rollout import Turn


class Page(HTMLParser):
    """Tags with their attributes, and the text between them, as a browser would find them; `said`
    is the text that is shown, without styles and scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.said, self.shown = [], "", True
        self.source = open(path, encoding="utf-8").read()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.shown = tag not in ("style", "script")

    def handle_endtag(self, tag):
        self.shown = True

    def handle_data(self, text):
        if self.shown:
            self.said += text

    def all(self, tag, **attrs):
        return [found for name, found in self.tags
                if name == tag and all(found.get(k.rstrip("_")) == v for k, v in attrs.items())]


def written(tmp_path, episodes, **more):
    path = str(tmp_path / "report.html")
    sections = episodes if episodes and isinstance(episodes[0], tuple) else [("all", episodes)]
    report.write_report(path, report.Report(more.pop("title", "A title"), sections, **more))
    return Page(path)


# The report

def test_nothing_from_data_or_model_can_run(tmp_path):
    """Every text that a model or a data file controls is tried; the page must hold it as text and
    as nothing else."""
    s = Sample(EVIL, [photo()], EVIL, "choice", [EVIL, "b"], 0, category=[EVIL],
               meta={"evidence": [{"box": [EVIL] * 4}, EVIL,
                                  {"box": [1, 2, 3, 4], "image": EVIL}]})
    e = episode(s, Turn(EVIL + "<answer>" + EVIL + "</answer>", (1, 1), (0, 0, 9, 9), EVIL),
                stop=EVIL)
    e.reward_components[EVIL], e.token_texts = 1.0, [[EVIL, -0.5], [EVIL, None]]
    text = Sample(EVIL, [photo()], EVIL, "text", answer=[EVIL], category=[EVIL])
    p = written(tmp_path, [(EVIL, [e, episode(text, Turn(EVIL))])], title=EVIL,
                curves=[{"step": i, EVIL: i} for i in range(3)],
                table=[("", [EVIL]), (EVIL, [EVIL])], settings={EVIL: EVIL})
    seen = zoomed()
    seen.token_texts = [["a", -0.5], ["b", None]]
    plain = written(tmp_path, [("a", [seen, zoomed()])],
                    curves=[{"step": i, "a": i} for i in range(3)],
                    table=[("", ["a"]), ("a", ["a"])], settings={"a": "b"})
    # no tag that the page does not use anyway
    assert {tag for tag, _ in p.tags} <= {tag for tag, _ in plain.tags}
    assert (p.source.count("<script>") == p.source.count("</script>") == 1
            and f"<script>{page.source_of('report.js')}</script>" in p.source)
    assert p.all("article")[0]["data-id"] == EVIL == p.all("article")[0]["data-category"]
    assert p.said.count("<script>alert(1)</script>") > 15       # and the texts are there, as text
    assert not [a for _, attrs in p.tags for a in attrs if a.startswith("on")]
    # safe inside an attribute too
    assert page.TEMPLATES.from_string("{{ x }}").render(x="\"'<&") == "&#34;&#39;&lt;&amp;"
    assert len(p.all("article")) == 2 and p.source.count("</style>") == 1 and "<!--" not in p.source


def test_page_needs_nothing_from_outside_and_allows_one_script(tmp_path):
    """The policy holds the hash of the page's own script: whatever else may get in cannot run."""
    p = written(tmp_path, [zoomed()], curves=[{"step": i, "reward": i} for i in range(3)])
    policy = p.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    script = re.search(r"<script>(.*?)</script>", p.source, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert ("default-src 'none'" in policy
            and f"script-src 'sha256-{digest}';" in policy
            and "img-src data:" in policy)
    assert policy.count("unsafe") == 1 and "style-src 'unsafe-inline'" in policy
    assert (len(p.all("script")) == 1 and not p.all("script")[0]
            and not p.all("link") and not p.all("iframe"))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function|setTimeout", script)
    links = [attrs[k] for _, attrs in p.tags for k in ("href", "src") if k in attrs]
    assert links and all(link.startswith(("#", "data:image/")) for link in links)
    assert "://" not in p.source and "url(" not in p.source and "@import" not in p.source
    ids = [attrs["id"] for _, attrs in p.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link[0] == "#"} <= set(ids)


def test_a_picture_is_embedded_once(tmp_path):
    path = str(tmp_path / "same.png")
    photo(300, 200).save(path)
    same = photo()
    group = ([zoomed(choice(str(i), same)) for i in range(4)]
             + [zoomed(choice("copy", same.copy()))]
             + [zoomed(choice(str(i), path)) for i in range(3)])
    p = written(tmp_path, [("before", group), ("after", group)])
    pictures = p.all("image")
    assert len(pictures) == 4                       # two prompt images, and the crop of each
    assert len(p.all("svg", class_="picture")) == 16 and p.source.count("data:image/") == 4
    assert {u["href"] for u in p.all("use")} == {"#" + i["id"] for i in pictures}
    assert sorted((i["width"], i["height"]) for i in pictures) == [
        ("200", "100"), ("300", "200"), ("40", "40"), ("40", "40")]


def test_large_pictures_shrink_but_keep_source_coordinates(tmp_path):
    noise = Image.effect_noise((3000, 1500), 80).convert("RGB")
    s = Sample("big", [noise], "Click it.", "point",
               targets=[{"image": 0, "box": [2000, 1000, 2100, 1040]}])
    e = episode(s, Turn("t", (500, 250), (1818, 818, 2182, 1182)),
                Turn("<answer> (512, 256) </answer>"), scale=(4.0, 4.0))
    p = written(tmp_path, [e])
    assert p.all("svg", class_="picture")[0]["viewbox"] == "0 0 3000 1500"
    assert [(i["width"], i["height"]) for i in p.all("image")] == [("3000", "1500"), ("364", "364")]
    files = [Image.open(io.BytesIO(base64.b64decode(i["href"].split(",")[1])))
             for i in p.all("image")]
    assert [f.size for f in files] == [(640, 320), (256, 256)] and files[0].format == "JPEG"
    assert (p.all("circle", cx="2000", cy="1000")
            and p.all("rect", class_="t1", x="1818", y="818", width="364", height="364"))
    assert p.all("rect", class_="gold", x="2000", y="1000", width="100", height="40")
    # a cross of half width 66 around (2048, 1024)
    assert p.all("path", class_="said")[0]["d"].startswith("M1982 958")


def test_overlay_maps_points_with_the_frame(tmp_path):
    e = zoomed(choice(meta={"evidence": [{"image": 0, "box": [100, 50, 120, 60]}]}))
    p = written(tmp_path, [e])
    # x * 2, y * 4; the point outside is not drawn
    assert [(c["cx"], c["cy"]) for c in p.all("circle")] == [("110", "56")]
    assert p.all("rect", class_="t1", x="90", y="36", width="40", height="40")
    assert p.all("rect", class_="gold", x="100", y="50", width="20", height="10")
    for said in ("The coordinate (999, 1) lies outside the image.", "ended by: answer",
                 "advantage +0.50", "2 tokens", "1 zoom", "toy", "(90, 36) to (130, 76)",
                 "No zooms left", "Which pattern?", "B. checked ✓"):
        assert said in p.said, said
    assert (p.all("article", class_="right")
            and p.all("span", class_="given")
            and p.all("li", class_="gold"))


def test_boxes_are_drawn_in_the_image_they_are_about(tmp_path):
    s = Sample("b", [photo(), photo(80, 60), photo(60, 80)], "Find it.", "box",
               targets=[{"image": 1, "box": [10, 10, 30, 30]}])
    e = episode(s, Turn("<think> x </think>\n<answer> (6, 3),(14, 8) </answer>"), recipe="univg-r1")
    p = written(tmp_path, [e])
    second = " ".join(p.source.split('class="picture"')[2].split())
    assert p.source.count('class="gold"') == " ".join(p.source.split()).count('class="said" x') == 1
    assert '<rect class="gold" x="10" y="10" width="20" height="20"/>' in second
    assert ('<rect class="said" x="12" y="12" width="16" height="20"/>' in second
            and "image 2" in second)
    assert "(12, 12, 28, 32)" in p.said and "(10, 10, 30, 30) in image 2" in p.said


def test_huge_and_inverted_answers_are_drawn_inside_or_not_at_all(tmp_path):
    box = Sample("b", [photo()], "Box it.", "box", targets=[{"image": 0, "box": [10, 10, 30, 30]}])
    p = written(tmp_path, [
        episode(point(), Turn("a", (10 ** 400, 5), None, "outside"),
                Turn(f"<answer> ({'9' * 300}, -4) </answer>")),
        episode(box, Turn("<answer> (90, 20),(-5, -7) </answer>")),
        episode(point("q"), Turn("\ud800 half a pair, \x00 \u202e"))])
    assert len(p.all("article", class_="wrong")) == 3 and not p.all("circle") and not p.all("path")
    assert p.all("rect", class_="said")[0] == {
        "class": "said", "x": "0", "y": "0", "width": "180", "height": "80"}


def test_crop_is_shown_as_the_model_saw_it(tmp_path):
    """The black control must look black in the report too, and a crop of the shrunken copy
    blurred."""
    def crop(image=None, **looked):
        e = zoomed(choice(image=image))
        e.shown_as = looked
        p = written(tmp_path, [e])
        return Image.open(io.BytesIO(
            base64.b64decode(p.all("image")[1]["href"].split(",")[1]))).convert("L")
    assert crop(zoom="black").size == (40, 40) and crop(zoom="black").getextrema() == (0, 0)
    fine = Image.effect_noise((200, 100), 90).convert("RGB")
    spread = lambda im: im.getextrema()[1] - im.getextrema()[0]
    assert (spread(crop(fine, zoom="on", crop_from="seen", fed=(20, 10)))
            < spread(crop(fine, zoom="on", crop_from="source", fed=(20, 10))) / 2)


def test_tokens_are_shown_with_their_probability(tmp_path):
    e = zoomed()
    e.token_texts = [["sure", -0.001], ["<unsure>", -3.0], ["a crop", None], ["half", -0.7]]
    p = written(tmp_path, [e, zoomed()])
    assert ([(i["class"], i["title"]) for i in p.all("i")]
                == [("p4", "0.999"), ("p0", "0.050"), ("p2", "0.497")]
            and len(p.all("s")) == 1)
    assert ("3 chosen at a mean probability of 0.29, each with advantage +0.50"
                in " ".join(p.said.split())
            and "<unsure>" in p.said)
    assert len([d for d in p.all("details") if d.get("class") != "legend"]) == 1


def test_cards_carry_what_the_menus_filter_by(tmp_path):
    p = written(tmp_path, [
        zoomed(Sample("two", [photo()], "?", "choice", ["lined", "checked"], 1,
                      category=["web", "icon"])),
        episode(point(), Turn("x"))])
    assert ([(a["data-id"], a["data-category"], a["data-zooms"], a["tabindex"])
             for a in p.all("article")]
            == [("two", "web\nicon", "1", "-1"), ("p", "web\nicon", "0", "-1")])
    # the script makes them: without it nothing is dead
    assert not p.all("select") and not p.all("button")

@pytest.mark.slow
def test_five_hundred_episodes_are_light(tmp_path):
    """500 noisy pictures would be 60 MB; shared ones cost nothing, and every section gets its share
    of the room."""
    shared = [Image.effect_noise((448, 448), 90).convert("RGB") for _ in range(3)]
    p = written(tmp_path, [("all", [zoomed(choice(str(i), shared[i % 3])) for i in range(500)])],
                drawn=500)
    assert len(p.all("article")) == 500 and len(p.source) < 3_000_000
    noise = [Image.effect_noise((200, 200), 90).convert("RGB") for _ in range(40)]
    group = lambda k: [zoomed(choice(f"{k}{i}", im.rotate(90 * k))) for i, im in enumerate(noise)]
    p = written(tmp_path, [(str(k), group(k)) for k in range(3)], drawn=500, max_bytes=600_000)
    drawn = [part.count("<article") for part in p.source.split("<section")[1:]]
    assert len(p.source) < 800_000 and min(drawn) > 1 and max(drawn) - min(drawn) <= 1


def test_report_says_what_it_leaves_out_and_stays_light(tmp_path):
    group = [zoomed(choice(str(i)), "checked" if i % 3 else "lined") for i in range(30)]
    p = written(tmp_path, [("many", group)])
    assert len(p.all("article")) == report.Report.drawn == 24
    assert "The first 24 are drawn, 6 are left out." in p.said and "20 of 30 right" in p.said
    long = [episode(choice(str(i)), Turn("x" * 3_000_000)) for i in range(3)]
    p = written(tmp_path, long)
    assert len(p.source) < 100_000 and "[and 2,996,000 more characters]" in p.said
    noisy = [zoomed(choice(str(i), Image.effect_noise((640, 640), 90))) for i in range(12)]
    p = written(tmp_path, noisy, max_bytes=1_000_000)
    assert len(p.source) < 1_400_000 and 1 < len(p.all("article")) < 12
    assert f"The first {len(p.all('article'))} are drawn" in p.said


def test_filter_counts_and_sections(tmp_path):
    p = written(tmp_path, [("before", [zoomed(answer="lined"), zoomed(answer="lined")]),
                           ("after", [zoomed()]), ("nobody", [])])
    assert ([i["id"] for i in p.all("input", type="radio")] == ["all", "right", "wrong"]
            and "checked" in p.all("input")[0])
    for label in ("all 3", "right 1", "wrong 2", "before", "after", "0 of 2 right"):
        assert label in p.said
    hidden = Sample("h", [photo()], "?", "choice", ["a", "b"], None)
    p = written(tmp_path, [episode(hidden, Turn("<answer> a </answer>"))])
    # neither right nor wrong
    assert not p.all("span", class_="badge") and "hidden" in p.said


def test_curves(tmp_path):
    rows = [{"step": 10 * i, "reward": i / 4, "flat": 0.0, "note": "text",
             "rare": i if i % 2 else None, "bad": float("nan")}
            for i in range(9)]
    p = written(tmp_path, [], curves=rows + [{"step": 90, "reward": float("inf")}])
    assert ([re.match(r"[a-z]+", f)[0] for f in p.source.split("<figcaption>")[1:]]
            == ["reward", "rare", "flat"])
    raw, smooth = p.all("polyline")[:2]
    xy = [tuple(map(float, q.split(","))) for q in raw["points"].split()]
    assert (len(xy) == 9
            and [x for x, _ in xy] == sorted(x for x, _ in xy)
            and [y for _, y in xy] == sorted((y for _, y in xy), reverse=True))
    assert raw["points"] == smooth["points"]                    # nine values are too few to smooth
    assert "80" in p.said and all(0 <= x <= 300 and 0 <= y <= 150 for x, y in xy)
    many = written(tmp_path, [], curves=[
        {"step": i, **{f"m{k}": i * k for k in range(11)}} for i in range(1000)])
    assert "3 more" in many.said and many.all("details")
    # one point is no curve
    assert not written(tmp_path, [], curves=[{"step": 1, "reward": 1.0}]).all("figure")


@pytest.mark.parametrize("value, shown", [
    (0.000257, "2.57e-4"), (-0.000257, "-2.6e-4"), (0.9375, "0.938"), (1.0, "1"), (0, "0"),
    (60.4375, "60.4"), (4814.0, "4,814"), (1234567.0, "1.23e6"), (3.2398e-7, "3.24e-7"),
    (-1e-300, "-1e-300"), (-2.25e300, "-2e300"), (0.001, "0.001"), (1e-5, "1e-5")])
def test_a_number_beside_a_chart_has_room(tmp_path, value, shown):
    """Bug: labels lost their first digits (0.000257 read 000257). 6.8 units is the width of a digit
    in the widest of our fonts."""
    assert (report.short_number(value) == shown
            and float(shown.replace(",", "")) == pytest.approx(value, rel=0.26))
    p = written(tmp_path, [], curves=[{"step": i, "gap": value + i} for i in range(2)])
    labels = [
        (float(t["x"]), text)
        for t, text in zip(p.all("text"),
                           re.findall(r"<text[^>]*>\s*([^<]*?)\s*</text>", p.source))
        if t["text-anchor"] == "end"
    ][:2]
    assert labels[0][1] == shown and all(0 <= x - 6.8 * len(text) for x, text in labels)


def test_rates_are_drawn_from_0_to_1(tmp_path):
    """Bug: an accuracy that falls from 1 to 0.9 looked like a fall to nothing. What is no rate
    fills its chart, as before."""
    p = written(tmp_path, [], curves=[
        {"step": i, "accuracy": 1 - i / 20, "length": 1 - i / 20} for i in range(3)])
    heights = [[float(q.split(",")[1]) for q in line["points"].split()]
               for line in p.all("polyline")[::2]]
    assert (heights[0][0] == 10
            and heights[0][-1] == pytest.approx(10 + 0.1 * 116, abs=0.06)
            and heights[1] == [10, 68, 126])
    first, second = p.source.split('<figure class="chart"')[1:]
    assert (re.findall(r'text-anchor="end">([^<]*)<', first)[:2] == ["0", "1"]
            and re.findall(r'text-anchor="end">([^<]*)<', second)[:2] == ["0.9", "1"])
    # no line leaves its chart
    assert (report.axis_of(metrics.GLOSSARY["iou"], [0.2, 1.5]) == (0, 1.5)
            and not metrics.GLOSSARY["reward"].is_rate)


def test_every_name_has_its_meaning(tmp_path):
    """Claim: what a name of a chart, of a part of the reward or of a column means stands in the
    page: on hover, and folded away."""
    curves = [{"step": i, "frac_zero_std": i / 4, "my_own": i} for i in range(3)]
    p = written(tmp_path, [zoomed()], curves=curves,
                table=[("", ["wrong format"]), ("zoom allowed", [3])],
                meanings={"wrong format": "cannot be read"}, notes={"zoom allowed": "May zoom."})
    assert ([f.get("title") for f in p.all("figure", class_="chart")]
            == [metrics.GLOSSARY["frac_zero_std"].meaning, None])
    assert [t.get("title") for t in p.all("th")][1:3] == ["cannot be read", "May zoom."]
    legend = p.source.split('<details class="legend">')[1].split("</details>")[0]
    explained = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", legend))
    assert (explained["frac_zero_std"] == metrics.GLOSSARY["frac_zero_std"].meaning
            and explained["wrong format"] == "cannot be read")
    assert set(zoomed().reward_components) <= set(explained) and "my_own" not in explained
    assert not written(tmp_path, []).all("details")             # no names, no legend


def test_the_page_says_what_it_is_and_what_each_control_proves(tmp_path):
    """Claim: the title has the run, the date, the number of questions and chance; a sentence says
    what each row, column and section shows."""
    notes = rl_run.report_notes(list(evaluate.MODES))
    sections = [("before RL", [zoomed()]),
                *((f"after RL, {label}", [zoomed()]) for label in evaluate.MODES.values())]
    table = [("", list(evaluate.MODES.values())),
             ("before RL", [1, 2, 3, 4]),
             ("after RL", [1, 2, 3, 4])]
    p = written(tmp_path, sections, run="my run", num_questions=1200, chance=0.25,
                date="2026-01-31", notes=notes, table=table)
    assert ("<title>A title, run my run, written 2026-01-31, questions 1,200, chance 25.0%</title>"
                in p.source
            and "<b>2026-01-31</b>" in p.source)
    assert metrics.SUMMARY_GLOSSARY["chance"] in [s.get("title") for s in p.all("span")]
    assert (re.findall(r"<dt>(.*?)</dt>", p.source.split('class="notes"')[1].split("</dl>")[0])
            == [*evaluate.MODES.values(), "before RL", "after RL"])
    purposes = re.findall(r'<p class="purpose">(.*?)</p>', p.source)
    assert purposes == [notes["before RL"], *(metrics.CONTROLS[mode] for mode in evaluate.MODES)]
    # a recipe without zooms has no control
    assert set(rl_run.report_notes(["on"])) == {"before RL", "after RL"}
    bare = written(tmp_path, [zoomed()])
    assert ("<title>A title, written 20" in bare.source
            and "questions" not in bare.source.split("</title>")[0]
            and "purpose" not in bare.source.split("</style>")[1])


def test_the_fourth_control_is_asked_only_with_its_flag(monkeypatch):
    """Bug: the default run spends time on crops of another object, or the flag does not reach the
    summary."""
    asked = []
    monkeypatch.setattr(evaluate, "run_episodes", lambda vlm, samples, config, options: (
        asked.append(config.zoom) or [zoomed()]))
    plain = train_rl.Config(recipe="vigorl-zoom")
    assert list(rl_run.measure(None, plain, [], "x")) == asked == ["on", "off", "black"]
    measured = rl_run.measure(None, replace(plain, eval_wrong=True), [], "x")
    assert list(measured) == list(evaluate.MODES)
    after = {mode: m.summary for mode, m in measured.items()}
    assert (metrics.summarise_run(after, after, [], [], 1)["accuracy_wrong_crop"]
            == after["wrong"]["accuracy"])
    assert list(rl_run.measure(
        None, train_rl.Config(recipe="univg-r1", eval_wrong=True), [], "x")) == ["on"]


def test_sections_are_counted_apart(tmp_path):
    """Bug: only one count, of all sections together: before, after and without zooms."""
    before, after = [zoomed(answer="lined")] * 30, [zoomed()] * 20 + [zoomed(answer="lined")]
    p = written(tmp_path, [("before", before), ("after", after), ("nobody", [])])
    counts = [" ".join(re.sub("<.*?>", "", a).split())
              for a in re.findall(r"<a href=\"#s\d\">(.*?)</a>", p.source, re.S)]
    assert counts == ["before 0 right, 30 wrong", "after 20 right, 1 wrong", "nobody"]
    said = " ".join(p.said.split())
    assert ("The first 24 are drawn, 6 are left out. Of those drawn: 0 right, 24 wrong." in said
            and "all 45" in said)


def test_ratings_are_kept_for_these_episodes_only(tmp_path):
    """Claim: the same episodes have the same key, however many are drawn; other texts have another.
    The rater sees neither verdict nor run."""
    key = lambda *episodes, **more: (
        written(tmp_path, list(episodes), **more).all("main")[0]["data-rated"])
    assert (key(zoomed(), zoomed())
            == key(zoomed(), zoomed(), drawn=1, title="another", run="x", date="y"))
    assert len({key(zoomed()), key(zoomed(answer="lined")), key(zoomed(choice("other"))),
                key(("one", [zoomed()])), key(zoomed(), zoomed())}) == 5
    p = written(tmp_path, [zoomed()])
    assert ("dataset.rated" in p.source
            and "localStorage.setItem(storageKey" in p.source
            and "catch" in p.source)
    hidden = "".join(re.findall(r"([^{}]*\.rating[^{}]*)\{\s*display: none;\s*\}",
                                page.source_of("report.css")))
    for what in ("main > :not(nav, section)", "section > :not(article)", "nav :is(a, label)",
                 "header span", ".tick", ".result", "details", ".gold", ".said"):
        assert what in hidden, what
    # else the filter shows the verdict
    assert "getElementById('all').checked = true" in p.source


def test_a_cell_carries_the_head_of_its_column(tmp_path):
    """Bug: on a phone of 390 pixels the last columns were cut. There each cell stands below the
    head of its column."""
    p = written(tmp_path, [],
                table=[("", ["accuracy", "questions"]), ("a", [1, 2]), ("b", ["", 4])])
    assert [t["data-head"] for t in p.all("td")] == ["accuracy", "questions"] * 2
    # an empty cell is :empty, and so not shown
    assert ("content: attr(data-head)" in p.source
            and '<td data-head="accuracy"></td>' in p.source)


def test_the_page_of_an_evaluation_explains_its_columns(tmp_path):
    cfg = evaluate.Config(out=str(tmp_path / "ev"), style="zoom", zoom="all")
    (tmp_path / "ev").mkdir()
    runs = {label: [zoomed(), zoomed(choice("d"), "lined")] for label in evaluate.MODES.values()}
    for e in sum(runs.values(), []):
        e.behaviour = {"regions": 1, "subgoals": 0, "verification": 0, "backtracking": 0,
                       "points": 1, "pointed": 1}
    summary, summaries = evaluate.summarise_runs(runs)
    evaluation_run.write_page(cfg, "toy", runs, evaluation_run.table_rows(summaries), summary)
    p = Page(str(tmp_path / "ev" / "report.html"))
    # the right answer is always "checked"
    assert "run ev, written" in p.source and "questions 2, chance 100.0%</title>" in p.source
    heads = [t for t in p.all("th")[1:] if "title" in t]
    assert (len(heads) == 9 + 4
            and (re.findall(r'class="purpose">(.*?)</p>', p.source)
                 == list(metrics.CONTROLS.values())))


def test_table_of_summaries(tmp_path):
    summary = evaluate.summarise([
        {"id": "x", "category": [], "accuracy": float(i < 50), "wrong_format": 0.0}
        for i in range(100)])
    p = written(tmp_path, [], table=[("", ["before", "after"]), ("search", [summary, "n/a"])])
    assert "50.0 %" in p.said and "40.4 to 59.6" in p.said and "n/a" in p.said
    assert (p.all("rect", class_="range")[0] | {"height": ""}
            == {"class": "range", "x": "40.38", "width": "19.23", "height": ""})


def test_a_long_table_is_folded(tmp_path):
    """Bug: a hundred rows of categories before the first episode."""
    table = lambda n: [("", ["accuracy"]), ("zoom allowed", ["50"]),
                       *((f"  kind {i}", ["50"]) for i in range(n))]
    assert not written(tmp_path, [], table=table(11)).all("details")
    long = written(tmp_path, [], table=table(12))
    before, after = long.source.split("<details>")
    assert ("zoom allowed" in before and "kind 3" not in before
            and "zoom allowed" in after and "kind 11" in after
            and len(long.all("table")) == 2)


def spots(p):
    """-> (points of the pictures as (class, cx, cy, number),
    points of the texts as (number, words))"""
    drawn = re.findall(r'<g class="([^"]+)">\s*<title>[^<]*</title>\s*'
                       r'<circle cx="([^"]+)" cy="([^"]+)"[^>]*/>\s*'
                       r'<text[^>]*>([^<]+)</text>', p.source)
    return drawn, re.findall(r'<span class="spot [^"]+" data-n="([^"]+)">([^<]+)</span>', p.source)


def test_points_of_thoughts_are_drawn(tmp_path):
    """Bug: the picture of a single turn was empty though its thought names points. They are
    numbered in the order of the text, in the frame in which they were said; what lies off the image
    is not drawn, nor what the answer or a tool call says; the gold box is still a box."""
    text = ("<think> The red at (10, 5), the blue at (30.5, 20), again (10, 5), "
            "not (500, 5), (-1, 5), ({}, 5). </think>\n"
            "<answer> (44, 13) </answer>").format("9" * 400)
    p = written(tmp_path, [episode(point(), Turn(text), recipe="vigorl")])
    drawn, said = spots(p)
    # x * 2, y * 4
    assert drawn == [("named t1", "20", "20", "1"), ("named t1", "61", "80", "2")]
    assert said == [("1", "(10, 5)"), ("2", "(30.5, 20)"), ("1", "(10, 5)")]
    assert (p.all("rect", class_="gold", x="100", y="50", width="20", height="10")
            and len(p.all("path", class_="said")) == 1)
    conversation = "".join(HTMLText(p.source.split("<pre>")[1].split("</pre>")[0]).parts)
    # the words of the text are what they were
    assert conversation == text and "(500, 5)" in conversation
    several = Sample("b", [photo(), photo()], "Which?", "choice", ["a", "b"], 0)
    assert not written(tmp_path, [
        episode(several, Turn("<think> (1, 2) </think>\n<answer> a </answer>"),
                recipe="vigorl")]).all("circle")


class HTMLText(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.parts = []
        self.feed(source)

    def handle_data(self, text):
        self.parts.append(text)


def test_a_thought_that_names_the_point_of_a_zoom_has_its_number(tmp_path):
    """Claim: the place of a zoom is one disc with the number of its turn; another place in a
    thought of turn 3 is 3.1."""
    call = "<think> Maybe (55, 14) or (60, 14). </think>\n" + data.tool_call(55, 14)
    e = episode(choice(), Turn(call, (55, 14), (90, 36, 130, 76)),
                Turn("<think> It was (60, 14), (55, 14), now (8, 8). </think>\n"
                     "<answer> checked </answer>"))
    drawn, said = spots(written(tmp_path, [e]))
    assert drawn == [("named t1", "120", "56", "1.1"),
                     ("named t2", "16", "32", "2.1"),
                     ("t1", "110", "56", "1")]
    assert [n for n, _ in said] == ["1", "1.1", "1.1", "1", "2.1"]
    forced = episode(choice(), Turn(data.FORCE + " (3, 3) </answer>", forced=True))
    assert spots(written(tmp_path, [forced])) == ([], [])


@pytest.mark.parametrize("convention, said, at", [("source", "(50, 20)", ("50", "20")),
                                                  ("0-1000", "(250, 200)", ("50", "20")),
                                                  ("0-1", "(0.25, 0.2)", ("50", "20"))])
def test_points_of_predictions_are_drawn(tmp_path, convention, said, at):
    """Bug: empty pictures. A text of any model, without tags, names its points in the convention of
    the file; its answer is no thought."""
    samples = [choice("a"), point("p")]
    texts = {"a": f"I see it at {said}, so: checked", "p": f"{said}"}
    first, second = predictions.from_predictions(samples, texts, convention)
    drawn, _ = spots(written(tmp_path, [first]))
    assert drawn == [("named t1", *at, "1")]
    p = written(tmp_path, [second])
    assert spots(p) == ([], []) and len(p.all("path", class_="said")) == 1


# The group of a step

def group(rewards_, advantages, weight=1.0, sample=None, answers="checked"):
    """Tries at one question, with what a step has stored in them."""
    episodes = []
    for k, (reward, advantage) in enumerate(zip(rewards_, advantages)):
        e = episode(sample or choice(),
                    Turn(f"<think> Try {k} at ({10 * k + 5}, 5). </think>\n"
                         f"<answer> {answers} </answer>"), recipe="vigorl")
        e.reward_components |= {"reward": reward, "accuracy": float(reward == 1)}
        e.advantage, e.difficulty_weight = advantage, weight
        episodes.append(e)
    return episodes


def rows_of(p):
    """The tries of a lesson -> [(class, texts of the cells)]"""
    rows = re.findall(r'<tr class="(\w+)">(.*?)</tr>', p.source.split('class="tries"')[1], re.S)
    return [(kind, [" ".join(re.sub("<[^>]*>", " ", cell).split())
                    for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)])
            for kind, row in rows]


def test_a_group_shows_how_rewards_become_advantages(tmp_path):
    """Claim: the image once, the tries in a row, and for each the numbers on the way from its
    reward to the advantage of the step."""
    values = [1.0, 0.5, 0.0, 0.5]               # mean 0.5, unbiased deviation 1 / sqrt(6) = 0.408
    cfg = train_rl.Config(group_size=4, difficulty_weight="exp")
    tries = group(values, [a * 2.0 for a in (1.224742, 0, -1.224742, 0)], weight=2.0)
    p = written(tmp_path, [], lessons=[group_view.make_lesson(7, tries, cfg)])
    assert [(kind, cells[0], *cells[3:]) for kind, cells in rows_of(p)] == [
        ("up", "1", "1", "+0.500", "+1.225", "+2.449", "+2.449"),
        ("even", "2", "0.5", "+0.000", "+0.000", "+0.000", "+0.000"),
        ("down", "3", "0", "-0.500", "-1.225", "-2.449", "-2.449"),
        ("even", "4", "0.5", "+0.000", "+0.000", "+0.000", "+0.000")]
    text = " ".join(p.said.split())
    for said in ("step 7", "tried 4 times", "Mean of the group: 0.500",
                 "Standard deviation: 0.408", "Difficulty weight (exp): 2.000",
                 "mean accuracy of the group is 0.250"):
        assert said in text, said
    assert (len(p.all("image")) == len(p.all("svg", class_="picture")) == 1
            and [d[0] for d in spots(p)[0]] == ["up", "even", "down", "even"])
    assert [(d[1], d[2], d[3]) for d in spots(p)[0]] == [
        ("10", "20", "1"), ("30", "20", "2"), ("50", "20", "3"), ("70", "20", "4")]
    assert [(r["x"], r["width"]) for r in p.all("rect", class_="push")] == [
        ("50", "50"), ("50", "0"), ("0", "50"), ("50", "0")]
    plain = written(tmp_path, [], lessons=[
        group_view.make_lesson(7, group(values, [0.5, 0, -0.5, 0]),
                               train_rl.Config(group_size=4, advantage_scale="none"))])
    assert (len(rows_of(plain)[0][1]) == 6
            and "not divided" in plain.said
            and "Difficulty" not in plain.said)


def test_a_group_shows_the_advantage_that_the_step_used(tmp_path):
    """Bug: an advantage computed again for the page. What the step stored is shown; where a flag
    changed it, the page says so."""
    cfg = train_rl.Config(group_size=4, mask_negative=True)
    p = written(tmp_path, [], lessons=[
        group_view.make_lesson(1, group([1.0, 0.0, 0.0, 0.0], [1.4999, 0, 0, 0]), cfg)])
    assert [cells[-1] for _, cells in rows_of(p)] == [
        "+1.500", *["+0.000 set to 0 by --over-turn or --mask-negative"] * 3]
    cut = group([1.0, 0.0, 0.0, 0.5], [0.707106, -0.707106, 0, 0])
    cut[2].finish_reason = cut[3].finish_reason = "length"
    lesson = group_view.make_lesson(1, cut, train_rl.Config(group_size=4, over_turn="exclude"))
    assert ((lesson.mean, lesson.counted) == (0.5, [True, True, False, False])
            and lesson.deviation == pytest.approx(0.5 ** 0.5))
    assert (lesson.above_mean == [0.5, -0.5, 0, 0]
            and lesson.scaled == pytest.approx([0.707106, -0.707106, 0, 0], abs=1e-5))
    p = written(tmp_path, [], lessons=[lesson])
    assert (["--over-turn exclude" in cells[-1] for _, cells in rows_of(p)]
            == [False, False, True, True])


def test_discs_of_a_group_hide_no_other(tmp_path):
    """Bug: eight tries at one place were one disc. A line leads from a disc that was moved to its
    place."""
    same = group([1.0] + [0.0] * 7, [2.4] + [-0.35] * 7)
    for e in same:
        e.turns = [Turn("<think> at (50, 12) </think>\n<answer> checked </answer>")]
    p = written(tmp_path, [], lessons=[group_view.make_lesson(1, same, train_rl.Config())])
    places = [(float(c["cx"]), float(c["cy"])) for c in p.all("circle")]
    radius = float(p.all("circle")[0]["r"])
    assert (len(places) == 8
            and places[0] == (100, 48)
            and all(((a - c) ** 2 + (b - d) ** 2) ** 0.5 >= 2 * radius - 1e-3
                    for i, (a, b) in enumerate(places)
                    for c, d in places[:i]))
    lines = [path["d"] for path in p.all("path", class_="down")]
    assert len(lines) == 7 and all(line.startswith("M100 48L") for line in lines)


def test_a_group_that_answers_with_boxes_or_points(tmp_path):
    s = Sample("b", [photo(), photo()], "Box it.", "box",
               targets=[{"image": 1, "box": [10, 10, 30, 30]}])
    tries = group([1.0, 0.0], [0.7, -0.7], sample=s, answers="(6, 3),(14, 8)")
    p = written(tmp_path, [], lessons=[
        group_view.make_lesson(1, tries, train_rl.Config(group_size=2))])
    assert ([p.all("rect", class_=kind)[0]["x"] for kind in ("up", "down", "gold")]
                == ["12", "12", "10"]
            and [d[:3] for d in spots(p)[0]][0] == ("up", "12", "12"))
    tries = group([1.0, 0.0], [0.7, -0.7], sample=point(), answers="(55, 14)")
    p = written(tmp_path, [], lessons=[
        group_view.make_lesson(1, tries, train_rl.Config(group_size=2))])
    # the thought and the answer of each
    assert ("up", "110", "56", "1") in spots(p)[0] and len(spots(p)[0]) == 4


def test_groups_of_the_first_and_the_latest_step_with_a_signal():
    """Claim: the report shows two groups at most; a step whose rewards are all equal in each group
    changes nothing; no views are kept."""
    cfg, kept = train_rl.Config(group_size=2), []
    for step, advantages in enumerate([[0, 0, 0, 0], [0, 0, 0.7, -0.7], [0.1, -0.1, 0, 0],
                                       [1, -1, 0.5, -0.5], [0, 0, 0, 0]]):
        episodes = group([0.0] * 4, advantages)
        for k, e in enumerate(episodes):
            e.views, e.sample.id = [SimpleNamespace(fed=(9, 9))], f"{step}/{k // 2}"
        kept = rl_run.groups_to_show(kept, step, episodes, cfg)
        assert all(e.views for e in episodes)
    assert ([(step, [e.sample.id for e in tries]) for step, tries in kept]
            == [(2, ["1/1"] * 2), (4, ["3/0"] * 2)])
    assert (not any(e.views for _, tries in kept for e in tries)
            and kept[0][1][0].shown_as == {"crop_from": "source", "fed": (9, 9)})


def test_a_polygon_is_drawn_as_one(tmp_path):
    corners = [[20.0, 10.0], [60.0, 10.0], [80.0, 40.0]]
    s = Sample("free", [photo()], "Where is room?", "point",
               targets=[{"image": 0, "box": [20.0, 10.0, 80.0, 40.0], "polygon": corners}])
    p = written(tmp_path, [episode(s, Turn("<answer> (900, 900) </answer>"))])
    assert ([path["d"] for path in p.all("path", class_="gold")] == ["M20 10L60 10L80 40Z"]
            and not p.all("rect", class_="gold"))


# --------------------------------------------------------------------------------------------------
# The trees page

def test_trees_are_drawn(models, tmp_path):
    """Claim: the drawing escapes what it is given and runs nothing; points are numbered in the
    order of the outline."""
    from test_search import ASKED, WORKED, config
    vlm = models["qwen2.5"]
    log, path = tmp_path / "trees.jsonl", tmp_path / "trees.html"
    evil = {**WORKED, "id": ASKED[0].id, "digest": files.digest(ASKED[0]),
            "question": "<script>alert(1)</script>", "options": ["<b>"]}
    other = {**evil, "digest": "that of another file's question with this id"}
    log.write_text("".join(json.dumps(row) + "\n" for row in ({"search": {}}, other, evil)))
    trees_page.write_trees_page(
        str(path), str(log), {ASKED[0].id: (ASKED[0], vlm.view(ASKED[0].images[0]))}, config())
    text = path.read_text()
    assert ("<script" not in text
            and "&lt;script&gt;" in text
            and "&lt;b&gt;" in text
            and "default-src 'none'" in text)
    assert (text.count("<circle") == 3
            and text.count("<details") == 2
            and "N 3 Q 0.67" in text
            and '<span class="wrong">bad</span>' in text)
    # the clothes of the report; a phone cuts nothing
    style = text.split("<style>")[1].split("</style>")[0]
    assert ("prefers-color-scheme: dark" in style
            and re.search(r"\.outline \{ overflow-wrap: anywhere; \}", style)
            and "var(--good-soft)" in style)
    assert not re.search(
        r"#[0-9a-f]{3,8}\b",
        (page.source_of("trees.css").replace("--hue: #c8ccd4", "")
         .replace("--hue: #46e08f", "").replace("--hue: #ff8a7a", "")))


def marks_of(node):
    """A ShownNode -> (mark, marks of its ends, the same of its children)"""
    return node.mark, [end.mark for end in node.ends], [marks_of(child) for child in node.children]


def test_the_chosen_chains_are_marked(models):
    """Claim: of the worked tree the chain A B "good" became a trace, so its nodes, its points and
    the ends that say it are marked, and those of the wrong way that the corrected trace takes. Bug:
    a sibling that begins alike is marked too."""
    from test_search import A, ASKED, C, WORKED, config, rollout, tree_node
    shown = lambda tree, **flags: trees_page.show_tree(
        page.Album(), tree, models["qwen2.5"].view(ASKED[0].images[0]),
        chains.linearise(tree, config(**flags)))
    tree = shown(WORKED, direct=1, corrected=0)
    assert marks_of(tree.root) == ("chosen", [], [
        ("chosen", [""], [("chosen", ["chosen", "chosen"], [])]),
        ("", [""], [])])
    assert [point.mark for point in tree.points] == ["chosen", "chosen", ""]
    tree = shown(WORKED, direct=0, corrected=1)                 # D, then A B
    assert marks_of(tree.root) == ("chosen", [], [
        ("chosen", [""], [("chosen", ["chosen", "chosen"], [])]),
        ("detour", ["detour"], [])])
    # and A C, then B: the steps of a marked rollout are shown, with their points
    tree = shown(WORKED, direct=0, corrected=9)
    assert (tree.root.children[0].ends[0].mark == "detour"
            and [s.thought for s in tree.root.children[0].ends[0].steps] == [f"look {C}."]
            and len(tree.points) == 4)
    twins = {**WORKED, "tree": tree_node(children=[
        tree_node(A, rollouts=[rollout(answer=said, reward=right)])
        for said, right in (("bad", 0.0), ("good", 1.0))])}
    assert marks_of(shown(twins).root)[2] == [("", [""], []), ("chosen", ["chosen"], [])]
    none = {**WORKED, "tree": tree_node(children=[
        tree_node(A, rollouts=[rollout(answer="bad", reward=0.0)])])}
    assert marks_of(shown(none).root)[0] == ""


def test_steps_carry_the_numbers_of_their_points():
    leaf = {"steps": [["a", [1, 2]], ["b", None]], "visits": 1, "value": 1.0,
            "rollouts": [], "children": []}
    points = []
    root = trees_page.show_node({**leaf, "steps": [], "children": [leaf, leaf]}, points, ways=[])
    assert ([(point.x, point.y) for point in points] == [(1, 2), (1, 2)]
            and [[s.number for s in child.steps] for child in root.children] == [[1, 0], [2, 0]])


# --------------------------------------------------------------------------------------------------
# Do the tests bite? Each row puts one bug into the report; the named test must fail.

MUTATIONS = [
    ("appendix.card:point_marks", "episode.frames[0][:2] if episode.frames else (1, 1)",
     "(1, 1)", test_overlay_maps_points_with_the_frame, {}),
    ("appendix.report:split_table", "len(body) > MOST_ROWS",
     "False", test_a_long_table_is_folded, {}),
    ("appendix.card:gold_marks", "outlines.get(tuple(box))",
     "None", test_a_polygon_is_drawn_as_one, {}),
    ("appendix.card:crop_as_seen", "shown_as.get('zoom') == 'black'",
     "False", test_crop_is_shown_as_the_model_saw_it, {}),
    ("appendix.card:crop_as_seen", "shown_as.get('crop_from') == 'seen'",
     "False", test_crop_is_shown_as_the_model_saw_it, {}),
    ("appendix.page:clip_unless_markup", "value if isinstance(value, Markup) else clip(value)",
     "Markup(clip(value))", test_nothing_from_data_or_model_can_run, {}),
    ("appendix.page:clip", "text[:limit] + left_out(text, limit)",
     "Markup(text[:limit] + left_out(text, limit))", test_nothing_from_data_or_model_can_run, {}),
    ("appendix.report:sha256", "hashlib.sha256(text.encode())",
     "hashlib.sha256(text[1:].encode())",
     test_page_needs_nothing_from_outside_and_allows_one_script, {}),
    ("appendix.report:drawing_order",
     "for k in range(drawn):\n"
     "    for i, (_, episodes) in enumerate(sections):\n"
     "        if k < len(episodes):\n"
     "            order.append((i, k))",
     "for i, (_, episodes) in enumerate(sections):\n"
     "    for k in range(drawn):\n"
     "        if k < len(episodes):\n"
     "            order.append((i, k))",
     test_five_hundred_episodes_are_light, {}),
    ("appendix.report:height_of",
     "FRAME.height - FRAME.bottom - height * share(value, low, high, otherwise=0.5)",
     "FRAME.top + height * share(value, low, high, otherwise=0.5)", test_curves, {}),
    ("appendix.report:axis_of", "metric.is_rate", "False", test_rates_are_drawn_from_0_to_1, {}),
    ("appendix.report:short_number", "len(text) <= MOST_CHARACTERS and 'e' not in text",
     "True", test_a_number_beside_a_chart_has_room, {"value": 0.000257, "shown": "2.57e-4"}),
    ("appendix.report:legend_of", "names += section.components",
     "pass", test_every_name_has_its_meaning, {}),
    ("appendix.report:fingerprint", "(label, str(e.sample.id), e.text)",
     "(label, str(e.sample.id))", test_ratings_are_kept_for_these_episodes_only, {}),
    ("appendix.report:empty_section", "episode_rows.verdict(e)",
     "''", test_sections_are_counted_apart, {}),
    ("appendix.trees_page:show_steps", "number = len(points)",
     "number = len(points) - 1", test_steps_carry_the_numbers_of_their_points, {}),
    ("appendix.trees_page:follow", "rest if ends_here or goes_on else None",
     "rest", test_the_chosen_chains_are_marked, {}),
    ("appendix.trees_page:show_tree", "ways.append(Way(chain.detour, None))",
     "pass", test_the_chosen_chains_are_marked, {}),
    ("appendix.card:points_of_turn", "episode.frames[0][:2] if episode.frames else (1, 1)",
     "(1, 1)", test_points_of_thoughts_are_drawn, {}),
    ("appendix.card:points_of_turn", "is_inside and (x, y) not in answer",
     "(x, y) not in answer and x < 9e9", test_points_of_thoughts_are_drawn, {}),
    ("appendix.card:points_of_turn", "is_inside and (x, y) not in answer",
     "is_inside", test_points_of_predictions_are_drawn,
     dict(convention="source", said="(50, 20)", at=("50", "20"))),
    ("appendix.card:thoughts_of", "tag[0].lower() not in ACTIONS",
     "True", test_points_of_thoughts_are_drawn, {}),
    ("appendix.card:named_points", "len(episode.sample.images) > 1",
     "False", test_points_of_thoughts_are_drawn, {}),
    ("appendix.card:named_points", "point_marks(episode, picture, 0.0)",
     "[]", test_a_thought_that_names_the_point_of_a_zoom_has_its_number, {}),
    ("appendix.group_view:make_lesson", "grpo.group_advantages(reward, 'none', counted)",
     "grpo.group_advantages(reward, 'none')",
     test_a_group_shows_the_advantage_that_the_step_used, {}),
    ("appendix.group_view:shown_try", "advantage = e.advantage",
     "advantage = lesson.scaled[k]", test_a_group_shows_the_advantage_that_the_step_used, {}),
    ("appendix.group_view:make_lesson", "episodes[0].difficulty_weight",
     "1.0", test_a_group_shows_how_rewards_become_advantages, {}),
    ("appendix.group_view:spread", "free_place(disc, moved, picture)",
     "(disc.x, disc.y)", test_discs_of_a_group_hide_no_other, {}),
    ("appendix.rl_run:groups_to_show", "earlier[:1] + [(step + 1, light)]",
     "[(step + 1, light)]", test_groups_of_the_first_and_the_latest_step_with_a_signal, {}),
    ("appendix.rl_run:groups_to_show", "advantage_range(group) == 0",
     "False", test_groups_of_the_first_and_the_latest_step_with_a_signal, {}),
]


@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, models, tmp_path):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments,
                   {"tmp_path": lambda: tmp_path, "models": lambda: models})
