"""The pictures: the algorithm as SVG from a group of episodes, the moving image of two episodes,
and the figures for slides. The episodes are written by hand, so every number in a picture is known.
"""
import math
import re
import xml.etree.ElementTree as xml

import pytest
import torch
from PIL import Image

import data, grpo, zoom_rollout
from appendix import moving, picture, slides
from conftest import close

SVG = "{http://www.w3.org/2000/svg}"

def turns_of(sample, answer, vlm, well_formed=True):
    """Zoom into the object that is asked about, then answer."""
    x, y = vlm.view(sample.images[0]).from_source(*sample.meta["scenes"][0]["objects"][0]["center"])
    thought = f"<think> It may be at ({x}, {y}). </think>\n"
    last = f"{thought}<answer> {answer} </answer>"
    return [thought + data.tool_call(x, y), last if well_formed else last + " well"]

@pytest.fixture(scope="module")
def group(models):
    """Eight tries of a question: four right, two wrong, one right and one wrong
    in a broken form."""
    vlm = models["qwen2.5"]
    sample = data.toy("search", "train", 1, "picture")[0]
    right = sample.options[sample.answer]
    wrong = sample.options[sample.answer - 1]
    tries = [(wrong, True), *[(right, True)] * 4, (wrong, True), (right, False), (wrong, False)]
    episodes = [zoom_rollout.replay(vlm, sample, turns_of(sample, answer, vlm, form))
                for answer, form in tries]
    for n, e in enumerate(episodes):
        e.logprobs = [-0.25 * (n + 1) * chosen for chosen in e.completion_mask]
    return picture.score(episodes)

def test_the_group_is_scored_as_in_training(group):
    """Claim: rewards and advantages are those of the recipe and of grpo; the try that is drawn is
    the first right one that looked."""
    assert [round(r, 6) for r in group.rewards] == [0.4, 1, 1, 1, 1, 0.4, 0.6, 0]
    close(group.advantages, grpo.group_advantages(torch.tensor([group.rewards]))[0], 1e-6)
    assert group.shown == 1

def test_pieces_are_the_episode(models, group):
    """Bug: a token left out, or one of the environment drawn as the policy's."""
    vlm, e = models["qwen2.5"], group.episodes[1]
    pieces = picture.pieces_of(vlm, e)
    chosen = [p for p in pieces if p.logprob is not None]
    assert len(chosen) == sum(e.completion_mask) and all(p.logprob == -0.5 for p in chosen)
    given = [p for p in pieces if p.logprob is None]
    assert (len(given) == 1
            and given[0].tokens + len(chosen) + e.completion_mask.index(True) == len(e.ids))
    call = "".join(p.text for p in pieces if p.in_call)
    assert (call.startswith("<tool_call>") and call.endswith("</tool_call>")
            and re.search(r"\[\d+,\d+\]", call))

@pytest.mark.parametrize("variant", picture.VARIANTS)
def test_the_picture_holds_the_numbers(models, group, variant):
    """Claim: valid SVG without anything from outside; every text lies inside; all rewards and
    advantages stand in it, and a mask of 1 for each token that the policy chose."""
    root = xml.fromstring(picture.draw(models["qwen2.5"], group, picture.VARIANTS[variant]))
    assert not re.search(r'(?:href|src)="(?!data:|#)', xml.tostring(root).decode())
    width, height = [float(n) for n in root.get("viewBox").split()[2:]]
    texts = list(root.iter(f"{SVG}text"))
    for text in texts:
        assert 0 <= float(text.get("x")) <= width and 0 < float(text.get("y")) < height
        assert float(text.get("font-size")) >= 11
    said = [text.text for text in texts]
    for advantage, reward in zip(group.advantages, group.rewards):
        assert f"{advantage:+.2f}" in said and f"r = {reward:.1f}" in said
    assert (said.count("1")
            - sum(p.text == "1"
                  for p in picture.pieces_of(models["qwen2.5"], group.episodes[1]))
            == sum(group.episodes[1].completion_mask))
    assert group.sample.question in said

def test_any_group_can_be_drawn(models):
    """Bug: a group in which nobody zoomed, or whose first try called in vain, ends in an error."""
    vlm, sample = models["qwen2.5"], data.toy("search", "train", 1, "picture")[0]
    blind = zoom_rollout.replay(
        vlm, sample, ["<think> I guess. </think>\n<answer> lined </answer>"])
    outside = zoom_rollout.replay(
        vlm, sample, [f"<think> There. </think>\n{data.tool_call(900, 900)}",
                      *turns_of(sample, "lined", vlm)])
    for episodes, observations in (([blind, blind], []),
                                   ([outside, blind], ["an error", "a crop"])):
        svg = picture.draw(vlm, picture.score(episodes), picture.LIGHT)
        xml.fromstring(svg)
        assert re.findall(r"tokens: (an error|a crop)", svg) == observations
        assert set(re.findall(r'href="#(crop\d)"', svg)) == set(re.findall(r'id="(crop\d)"', svg))

def luminance(color):
    channels = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)

@pytest.mark.parametrize("palette", picture.VARIANTS.values(), ids=picture.VARIANTS)
def test_texts_stand_out(palette):
    """Claim: a contrast of 4.5 or more (WCAG AA) for every text on what lies below it."""
    for ground in (palette.page, palette.sampled, palette.call, palette.given):
        assert contrast(palette.ink, ground) >= 4.5
    for color in (palette.soft, palette.up, palette.down):
        assert contrast(color, palette.page) >= 4.5
    assert contrast(palette.soft, palette.given) >= 4.5

def test_a_policy_without_a_warm_start_is_refused(models, monkeypatch):
    samples = data.toy("search", "train", 1)
    monkeypatch.setattr(picture.data, "toy", lambda *_: samples)
    with pytest.raises(data.DataError, match="expected a policy after its warm start"):
        picture.find_group(models["qwen2.5"])

# -----------------------------------------------------------------------------
# the moving image

def test_moments_unfold_in_step(group):
    """Claim: words come one by one, a zoom shows after its words, both sides go on at once, and the
    time of the frames is that of the longer side."""
    e = group.episodes[1]
    moments = moving.moments_of(e)
    assert ([m.zooms for m in moments] == sorted(m.zooms for m in moments)
            and moments[-1].zooms == 1)
    assert (moments[0].text.strip() == "It" and moments[-1].is_over
            and "answer: " in moments[-1].text)
    short = moments[:3] + [moments[-1]]
    frames = moving.in_step(moments, short)
    assert frames[-1][:2] == (moments[-1], short[-1])
    assert sum(shown for *_, shown in frames) == sum(m.milliseconds for m in moments)
    assert [moments.index(a) for a, *_ in frames] == sorted(moments.index(a) for a, *_ in frames)

def test_the_moving_image_moves(group, tmp_path):
    """Claim: a GIF that ends with both verdicts, right in green and wrong in red."""
    path = tmp_path / "a.gif"
    moving.draw_moving(group.sample, [group.episodes[0], group.episodes[1]], str(path))
    with Image.open(path) as image:
        assert image.size == moving.SIZE and image.n_frames > 5
        first = image.convert("RGB")
        image.seek(image.n_frames - 1)
        last = image.convert("RGB")
        assert 0.5 * moving.END <= image.info["duration"]
    assert first.tobytes() != last.tobytes()
    verdicts = [last.crop((n * moving.PANEL + moving.SCENE + 20, 250, (n + 1) * moving.PANEL, 300))
                for n in range(2)]
    red, green = [sum(c[0] - c[1] for _, c in v.getcolors(10 ** 6) if max(c) - min(c) > 60)
                  for v in verdicts]
    assert red > 0 > green

def test_before_and_after_differ(models, group, monkeypatch):
    """Claim: the question is one that changes from a wrong option to the right one; without such a
    question the command says so."""
    wrong, right = group.episodes[0], group.episodes[1]
    monkeypatch.setattr(moving.data, "toy", lambda *_: [group.sample])
    answers = {"before": [wrong], "after": [right]}
    monkeypatch.setattr(moving.zoom_rollout, "rollout", lambda vlm, samples, config: answers[vlm])
    assert moving.before_and_after("before", "after") == (group.sample, [wrong, right])
    with pytest.raises(data.DataError, match="no question of fifty"):
        moving.before_and_after("after", "before")

# -----------------------------------------------------------------------------
# slides

def test_slides_are_the_formulas():
    """Claim: the lines are what the chapters compute: the four corners of the clip, the push of
    each loss, the weights."""
    assert (slides.token_loss(2.0, 1.0) == pytest.approx((-1.28, 0))
            and slides.token_loss(0.5, 1.0) == pytest.approx((-0.5, 0.5)))
    assert (slides.token_loss(0.5, -1.0) == pytest.approx((0.8, 0))
            and slides.token_loss(2.0, -1.0) == pytest.approx((2, -2)))
    assert (set(slides.push().lines) == set(grpo.LOSSES)
            and set(slides.weights().lines) == set(grpo.WEIGHTS))
    assert dict(slides.push().lines["reinforce"])[0.2] == pytest.approx(1)
    right = dict(slides.advantages().lines["right, scale none"])
    assert right[1] == pytest.approx(7 / 8) and right[7] == pytest.approx(1 / 8)

def test_slides_are_written(tmp_path, capsys):
    """Claim: each figure is valid SVG whose lines lie inside it; a run adds its curves; a folder
    that is no run is refused."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "metrics.jsonl").write_text('{"step": 0, "accuracy": 0.5}\n'
                                              '{"step": 1, "accuracy": 0.7}\n')
    slides.main([str(run_folder), "--out", str(tmp_path / "out")])
    for name in [*slides.FIGURES, "run"]:
        root = xml.parse(tmp_path / "out" / f"{name}.svg").getroot()
        lines = list(root.iter(f"{SVG}polyline"))
        numbers = [float(v) for line in lines for v in re.split("[, ]", line.get("points"))]
        assert numbers and all(map(math.isfinite, numbers))
        # the weight 1/m has no highest value
        assert all(line.get("clip-path") == "url(#inside)" for line in lines)
        assert root.find(f"{SVG}clipPath").get("id") == "inside"
    assert len(lines) == 1
    with pytest.raises(SystemExit):
        slides.main([str(tmp_path)])
    assert "expected the folder of a run" in capsys.readouterr().err
