"""
The report and the trees page: nothing that a model or a data file wrote can run in them, every mark is drawn where it belongs, and
they stay light. No model is loaded. At the end MUTATIONS puts bugs into appendix/report.py, card.py and page.py.
"""
import base64, hashlib, io, json, re
from html.parser import HTMLParser

import pytest
from PIL import Image

import evaluate
from appendix import card, files, page, report, trees_page
from conftest import check_mutation, names
from data import Sample
from test_evaluate import EVIL, choice, episode, photo, point, zoomed
from zoom_rollout import Turn


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


def written(tmp_path, episodes, **more):
    path = str(tmp_path / "report.html")
    sections = episodes if episodes and isinstance(episodes[0], tuple) else [("all", episodes)]
    report.write_report(path, report.Report(more.pop("title", "A title"), sections, **more))
    return Page(path)


# The report

def test_nothing_from_data_or_model_can_run(tmp_path):
    """Every text that a model or a data file controls is tried; the page must hold it as text and as nothing else."""
    s = Sample(EVIL, [photo()], EVIL, "choice", [EVIL, "b"], 0, category=[EVIL], meta={"evidence": [{"box": [EVIL] * 4}, EVIL, {"box": [1, 2, 3, 4], "image": EVIL}]})
    e = episode(s, Turn(EVIL + "<answer>" + EVIL + "</answer>", (1, 1), (0, 0, 9, 9), EVIL), stop=EVIL)
    e.reward_components[EVIL], e.token_texts = 1.0, [[EVIL, -0.5], [EVIL, None]]
    text = Sample(EVIL, [photo()], EVIL, "text", answer=[EVIL], category=[EVIL])
    p = written(tmp_path, [(EVIL, [e, episode(text, Turn(EVIL))])], title=EVIL, curves=[{"step": i, EVIL: i} for i in range(3)], table=[("", [EVIL]), (EVIL, [EVIL])],
             settings={EVIL: EVIL})
    seen = zoomed()
    seen.token_texts = [["a", -0.5], ["b", None]]
    plain = written(tmp_path, [("a", [seen, zoomed()])], curves=[{"step": i, "a": i} for i in range(3)], table=[("", ["a"]), ("a", ["a"])], settings={"a": "b"})
    assert {tag for tag, _ in p.tags} <= {tag for tag, _ in plain.tags}        # no tag that the page does not use anyway
    assert p.source.count("<script>") == p.source.count("</script>") == 1 and f"<script>{page.source_of('report.js')}</script>" in p.source
    assert p.all("article")[0]["data-id"] == EVIL == p.all("article")[0]["data-category"]
    assert p.said.count("<script>alert(1)</script>") > 15                      # and the texts are there, as text
    assert not [a for _, attrs in p.tags for a in attrs if a.startswith("on")]
    assert page.TEMPLATES.from_string("{{ x }}").render(x="\"'<&") == "&#34;&#39;&lt;&amp;"      # safe inside an attribute too
    assert len(p.all("article")) == 2 and p.source.count("</style>") == 1 and "<!--" not in p.source


def test_page_needs_nothing_from_outside_and_allows_one_script(tmp_path):
    """The policy holds the hash of the page's own script: whatever else may get in cannot run."""
    p = written(tmp_path, [zoomed()], curves=[{"step": i, "reward": i} for i in range(3)])
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
    p = written(tmp_path, [("before", group), ("after", group)])
    pictures = p.all("image")
    assert len(pictures) == 4                                                  # two prompt images, and the crop of each
    assert len(p.all("svg", class_="picture")) == 16 and p.source.count("data:image/") == 4
    assert {u["href"] for u in p.all("use")} == {"#" + i["id"] for i in pictures}
    assert sorted((i["width"], i["height"]) for i in pictures) == [("200", "100"), ("300", "200"), ("40", "40"), ("40", "40")]


def test_large_pictures_shrink_but_keep_source_coordinates(tmp_path):
    noise = Image.effect_noise((3000, 1500), 80).convert("RGB")
    s = Sample("big", [noise], "Click it.", "point", targets=[{"image": 0, "box": [2000, 1000, 2100, 1040]}])
    e = episode(s, Turn("t", (500, 250), (1818, 818, 2182, 1182)), Turn("<answer> (512, 256) </answer>"), scale=(4.0, 4.0))
    p = written(tmp_path, [e])
    assert p.all("svg", class_="picture")[0]["viewbox"] == "0 0 3000 1500"
    assert [(i["width"], i["height"]) for i in p.all("image")] == [("3000", "1500"), ("364", "364")]
    files = [Image.open(io.BytesIO(base64.b64decode(i["href"].split(",")[1]))) for i in p.all("image")]
    assert [f.size for f in files] == [(640, 320), (256, 256)] and files[0].format == "JPEG"
    assert p.all("circle", cx="2000", cy="1000") and p.all("rect", class_="t1", x="1818", y="818", width="364", height="364")
    assert p.all("rect", class_="gold", x="2000", y="1000", width="100", height="40")
    assert p.all("path", class_="said")[0]["d"].startswith("M1982 958")        # a cross of half width 66 around (2048, 1024)


def test_overlay_maps_points_with_the_frame(tmp_path):
    e = zoomed(choice(meta={"evidence": [{"image": 0, "box": [100, 50, 120, 60]}]}))
    p = written(tmp_path, [e])
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
    p = written(tmp_path, [e])
    second = " ".join(p.source.split('class="picture"')[2].split())
    assert p.source.count('class="gold"') == " ".join(p.source.split()).count('class="said" x') == 1
    assert '<rect class="gold" x="10" y="10" width="20" height="20"/>' in second
    assert '<rect class="said" x="12" y="12" width="16" height="20"/>' in second and "image 2" in second
    assert "(12, 12, 28, 32)" in p.said and "(10, 10, 30, 30) in image 2" in p.said


def test_huge_and_inverted_answers_are_drawn_inside_or_not_at_all(tmp_path):
    box = Sample("b", [photo()], "Box it.", "box", targets=[{"image": 0, "box": [10, 10, 30, 30]}])
    p = written(tmp_path, [episode(point(), Turn("a", (10 ** 400, 5), None, "outside"), Turn(f"<answer> ({'9' * 300}, -4) </answer>")),
                        episode(box, Turn("<answer> (90, 20),(-5, -7) </answer>")), episode(point("q"), Turn("\ud800 half a pair, \x00 \u202e"))])
    assert len(p.all("article", class_="wrong")) == 3 and not p.all("circle") and not p.all("path")
    assert p.all("rect", class_="said")[0] == {"class": "said", "x": "0", "y": "0", "width": "180", "height": "80"}


def test_crop_is_shown_as_the_model_saw_it(tmp_path):
    """The black control must look black in the report too, and a crop of the shrunken copy blurred."""
    def crop(image=None, **looked):
        e = zoomed(choice(image=image))
        e.shown_as = looked
        p = written(tmp_path, [e])
        return Image.open(io.BytesIO(base64.b64decode(p.all("image")[1]["href"].split(",")[1]))).convert("L")
    assert crop(zoom="black").size == (40, 40) and crop(zoom="black").getextrema() == (0, 0)
    fine = Image.effect_noise((200, 100), 90).convert("RGB")
    spread = lambda im: im.getextrema()[1] - im.getextrema()[0]
    assert spread(crop(fine, zoom="on", crop_from="seen", fed=(20, 10))) < spread(crop(fine, zoom="on", crop_from="source", fed=(20, 10))) / 2


def test_tokens_are_shown_with_their_probability(tmp_path):
    e = zoomed()
    e.token_texts = [["sure", -0.001], ["<unsure>", -3.0], ["a crop", None], ["half", -0.7]]
    p = written(tmp_path, [e, zoomed()])
    assert [(i["class"], i["title"]) for i in p.all("i")] == [("p4", "0.999"), ("p0", "0.050"), ("p2", "0.497")] and len(p.all("s")) == 1
    assert "3 chosen at a mean probability of 0.29, each with advantage +0.50" in " ".join(p.said.split()) and "<unsure>" in p.said and len(p.all("details")) == 1


def test_cards_carry_what_the_menus_filter_by(tmp_path):
    p = written(tmp_path, [zoomed(Sample("two", [photo()], "?", "choice", ["lined", "checked"], 1, category=["web", "icon"])), episode(point(), Turn("x"))])
    assert [(a["data-id"], a["data-category"], a["data-zooms"], a["tabindex"]) for a in p.all("article")] == [("two", "web\nicon", "1", "-1"), ("p", "web\nicon", "0", "-1")]
    assert not p.all("select") and not p.all("button")                         # the script makes them: without it nothing is dead


def test_five_hundred_episodes_are_light(tmp_path):
    """500 noisy pictures would be 60 MB; shared ones cost nothing, and every section gets its share of the room."""
    shared = [Image.effect_noise((448, 448), 90).convert("RGB") for _ in range(3)]
    p = written(tmp_path, [("all", [zoomed(choice(str(i), shared[i % 3])) for i in range(500)])], drawn=500)
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
    p = written(tmp_path, [("before", [zoomed(answer="lined"), zoomed(answer="lined")]), ("after", [zoomed()]), ("nobody", [])])
    assert [i["id"] for i in p.all("input", type="radio")] == ["all", "right", "wrong"] and "checked" in p.all("input")[0]
    for label in ("all 3", "right 1", "wrong 2", "before", "after", "0 of 2 right"):
        assert label in p.said
    hidden = Sample("h", [photo()], "?", "choice", ["a", "b"], None)
    p = written(tmp_path, [episode(hidden, Turn("<answer> a </answer>"))])
    assert not p.all("span", class_="badge") and "hidden" in p.said            # neither right nor wrong


def test_curves(tmp_path):
    rows = [{"step": 10 * i, "reward": i / 4, "flat": 0.0, "note": "text", "rare": i if i % 2 else None, "bad": float("nan")} for i in range(9)]
    p = written(tmp_path, [], curves=rows + [{"step": 90, "reward": float("inf")}])
    assert [re.match(r"[a-z]+", f)[0] for f in p.source.split("<figcaption>")[1:]] == ["reward", "rare", "flat"]
    raw, smooth = p.all("polyline")[:2]
    xy = [tuple(map(float, q.split(","))) for q in raw["points"].split()]
    assert len(xy) == 9 and [x for x, _ in xy] == sorted(x for x, _ in xy) and [y for _, y in xy] == sorted((y for _, y in xy), reverse=True)
    assert raw["points"] == smooth["points"]                                   # nine values are too few to smooth
    assert "80" in p.said and all(0 <= x <= 300 and 0 <= y <= 150 for x, y in xy)
    many = written(tmp_path, [], curves=[{"step": i, **{f"m{k}": i * k for k in range(11)}} for i in range(1000)])
    assert "3 more" in many.said and many.all("details")
    assert not written(tmp_path, [], curves=[{"step": 1, "reward": 1.0}]).all("figure")            # one point is no curve


def test_table_of_summaries(tmp_path):
    summary = evaluate.summarise([{"id": "x", "category": [], "accuracy": float(i < 50), "wrong_format": 0.0} for i in range(100)])
    p = written(tmp_path, [], table=[("", ["before", "after"]), ("search", [summary, "n/a"])])
    assert "50.0 %" in p.said and "40.4 to 59.6" in p.said and "n/a" in p.said
    assert p.all("rect", class_="range")[0] | {"height": ""} == {"class": "range", "x": "40.38", "width": "19.23", "height": ""}


def test_a_long_table_is_folded(tmp_path):
    """Bug: a hundred rows of categories before the first episode."""
    table = lambda n: [("", ["accuracy"]), ("zoom allowed", ["50"]), *((f"  kind {i}", ["50"]) for i in range(n))]
    assert not written(tmp_path, [], table=table(11)).all("details")
    long = written(tmp_path, [], table=table(12))
    before, after = long.source.split("<details>")
    assert "zoom allowed" in before and "kind 3" not in before and "zoom allowed" in after and "kind 11" in after and len(long.all("table")) == 2


def test_a_polygon_is_drawn_as_one(tmp_path):
    corners = [[20.0, 10.0], [60.0, 10.0], [80.0, 40.0]]
    s = Sample("free", [photo()], "Where is room?", "point", targets=[{"image": 0, "box": [20.0, 10.0, 80.0, 40.0], "polygon": corners}])
    p = written(tmp_path, [episode(s, Turn("<answer> (900, 900) </answer>"))])
    assert [path["d"] for path in p.all("path", class_="gold")] == ["M20 10L60 10L80 40Z"] and not p.all("rect", class_="gold")


# ----------------------------------------------------------------------------------------------------------------------
# The trees page

def test_trees_are_drawn(models, tmp_path):
    """Claim: the drawing escapes what it is given and runs nothing; points are numbered in the order of the outline."""
    from test_search import ASKED, WORKED
    vlm = models["qwen2.5"]
    log, path = tmp_path / "trees.jsonl", tmp_path / "trees.html"
    evil = {**WORKED, "id": ASKED[0].id, "digest": files.digest(ASKED[0]), "question": "<script>alert(1)</script>", "options": ["<b>"]}
    other = {**evil, "digest": "that of another file's question with this id"}
    log.write_text("".join(json.dumps(row) + "\n" for row in ({"search": {}}, other, evil)))
    trees_page.write_trees_page(str(path), str(log), {ASKED[0].id: (ASKED[0], vlm.view(ASKED[0].images[0]))})
    text = path.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "&lt;b&gt;" in text and "default-src 'none'" in text
    assert text.count("<circle") == 3 and text.count("<details") == 2 and "N 3 Q 0.67" in text and '<span class="wrong">bad</span>' in text


def test_steps_carry_the_numbers_of_their_points():
    leaf = {"steps": [["a", [1, 2]], ["b", None]], "visits": 1, "value": 1.0, "rollouts": [], "children": []}
    points = []
    root = trees_page.show_node({**leaf, "steps": [], "children": [leaf, leaf]}, points)
    assert points == [[1, 2], [1, 2]] and [[s.number for s in child.steps] for child in root.children] == [[1, 0], [2, 0]]


# ----------------------------------------------------------------------------------------------------------------------
# Do the tests bite? Each row puts one bug into the report; the named test must fail.

MUTATIONS = [
    ("appendix.card:point_marks", "episode.frames[0][:2] if episode.frames else (1, 1)", "(1, 1)", test_overlay_maps_points_with_the_frame, {}),
    ("appendix.report:split_table", "len(body) > MOST_ROWS", "False", test_a_long_table_is_folded, {}),
    ("appendix.card:gold_marks", "outlines.get(tuple(box))", "None", test_a_polygon_is_drawn_as_one, {}),
    ("appendix.card:crop_as_seen", "shown_as.get('zoom') == 'black'", "False", test_crop_is_shown_as_the_model_saw_it, {}),
    ("appendix.card:crop_as_seen", "shown_as.get('crop_from') == 'seen'", "False", test_crop_is_shown_as_the_model_saw_it, {}),
    ("appendix.page:clip_unless_markup", "value if isinstance(value, Markup) else clip(value)", "Markup(clip(value))", test_nothing_from_data_or_model_can_run, {}),
    ("appendix.page:clip", "text[:limit] + left_out(text, limit)", "Markup(text[:limit] + left_out(text, limit))", test_nothing_from_data_or_model_can_run, {}),
    ("appendix.report:sha256", "hashlib.sha256(text.encode())", "hashlib.sha256(text[1:].encode())", test_page_needs_nothing_from_outside_and_allows_one_script, {}),
    ("appendix.report:drawing_order",
     "for k in range(drawn):\n    for i, (_, episodes) in enumerate(sections):\n        if k < len(episodes):\n            order.append((i, k))",
     "for i, (_, episodes) in enumerate(sections):\n    for k in range(drawn):\n        if k < len(episodes):\n            order.append((i, k))",
     test_five_hundred_episodes_are_light, {}),
    ("appendix.report:height_of", "FRAME.height - FRAME.bottom - height * share(value, low, high, otherwise=0.5)",
     "FRAME.top + height * share(value, low, high, otherwise=0.5)", test_curves, {}),
    ("appendix.trees_page:show_node", "number = len(points)", "number = len(points) - 1", test_steps_carry_the_numbers_of_their_points, {}),
]


@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, tmp_path):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {"tmp_path": lambda: tmp_path})
