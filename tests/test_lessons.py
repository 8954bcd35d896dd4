"""The tiny model's pretraining: what it is taught, what it is asked, the optimizer, and the loop
that can be stopped."""
import collections
import functools
import itertools
import os
import random
import re
import shlex
import sys

import pytest
import torch

import data
from appendix import lessons, muon, skills, tiny
from appendix.files import DataError

PLACE = re.compile(r"(\w+ \w+) \((\d+), (\d+)\)")

@pytest.fixture
def vlm(models):
    """One family is enough: what is taught does not depend on it."""
    return models["qwen2.5"]

@pytest.fixture
def draw():
    rng = random.Random("scenes")
    return functools.partial(lessons.new_scene, rng, lessons.LATE, lessons.FIRST)

@pytest.fixture
def scenes_drawn(monkeypatch):
    """Every scene of which a picture is made."""
    drawn, draw_scene = [], data.draw_scene
    monkeypatch.setattr(data, "draw_scene", lambda scene: drawn.append(scene) or draw_scene(scene))
    return drawn

def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]

def text_of(vlm, episode):
    return vlm.text([token for token in episode.ids if token != vlm.image_token])

# -----------------------------------------------------------------------------
# what is taught

def test_no_held_out_scene_is_taught(vlm, scenes_drawn):
    """Bug: a scene of the test split in a lesson or a drill, a frame of a video included."""
    rng = random.Random(0)
    for _ in range(150):
        lessons.draw_episode(vlm, rng, rng.randrange(6000))
        lessons.draw_second(vlm, rng, 0)
        lessons.draw_third(vlm, rng, 0)
    assert len(scenes_drawn) > 200 and {data.split_of(scene) for scene in scenes_drawn} == {"train"}

def test_no_question_of_a_task_is_asked(vlm):
    """Bug: a lesson asks what a task asks; RL would have nothing to teach."""
    openings = {"What is the pattern": "search", "Click": "point", "Where is": "relation",
                "Find the": "boxes, find, video", "frames of": "video", "How many": "count"}
    for opening in openings:                    # or this test is about another wording
        assert any(opening in data.toy(task, "train", 1)[0].question
                   for task in data.TASKS), opening
    rng = random.Random(1)
    for _ in range(400):
        draw = rng.choice((lessons.draw_episode, lessons.draw_second, lessons.draw_third))
        text = text_of(vlm, draw(vlm, rng, rng.randrange(6000)))
        assert not [opening for opening in openings if opening in text], text

@pytest.mark.parametrize("named", [0.0, 0.5])
def test_drills_say_where_to_zoom(vlm, named):
    """Bug: a call that is not what the question asks for; names where numbers are wanted, which is
    what RL has to teach."""
    rng = random.Random(2)
    kinds = collections.Counter()
    for _ in range(60):
        e = lessons.zoom_drill(vlm, rng, named)
        places = e.sample.question.removeprefix("Zoom into ").rstrip(".").split(", then ")
        calls = [turn for turn in e.turns if turn.crop]
        for place, turn in zip(places, calls):
            if place.startswith("the "):
                assert f"{place.capitalize()} may be at" in turn.text
            else:
                assert (turn.text.count(place) == 1
                        and numbers(turn.text.partition("coordinate")[2]) == numbers(place))
            kinds[place.startswith("the ")] += 1
        assert len(calls) in (0, len(places))
        kinds[len(calls), "zooms"] += 1
    assert ({(0, "zooms"), (1, "zooms"), (2, "zooms")} <= set(kinds)
            and kinds[False] > 10
            and (kinds[True] > 10) == (named > 0))

def test_a_mention_is_no_order(vlm):
    """Claim: in the third stage the question may name a thing, and the zooms go where the numbers
    say all the same."""
    rng = random.Random(3)
    mentions = 0
    for _ in range(40):
        e = lessons.zoom_drill(vlm, rng, 0.0, 0.5)
        said, _, places = e.sample.question.rpartition("Zoom into ")
        assert "the " not in places and re.fullmatch(r"(There is a \w+ \w+\. )?", said)
        for place, turn in zip(places.rstrip(".").split(", then "),
                               [turn for turn in e.turns if turn.crop]):
            assert numbers(turn.text.partition("coordinate")[2]) == numbers(place)
        mentions += bool(said)
    assert 10 < mentions < 30

def parts_of(e):
    """The one turn of a drill -> (thought, answer)"""
    thought, _, answer = e.turns[0].text.partition(" </think>\n<answer> ")
    return thought, answer.removesuffix(" </answer>")

def places_in(vlm, e, scene):
    """{name: center as the model reads points}"""
    return {o["name"]: vlm.view(e.sample.images[0]).from_source(*o["center"])
            for o in scene["objects"]}

def test_drills_without_zooms_are_true(vlm, scenes_drawn):
    """Bug: an answer in another form than the task's, or that does not follow from the thought; a
    box of another thing."""
    rng = random.Random(5)
    kinds = collections.Counter()
    for _ in range(60):
        scenes_drawn.clear()
        e = lessons.think_drill(vlm, rng)
        thought, answer = parts_of(e)
        at = places_in(vlm, e, scenes_drawn[0])
        for name, x, y in re.findall(r"The (\w+ \w+) is at \((\d+), (\d+)\)", thought):
            assert (abs(int(x) - at[name][0]) + abs(int(y) - at[name][1])
                    <= (40 if vlm.spec.convention == "thousand" else 5))
        if e.sample.options:
            (ax, ay), (bx, by) = [
                at[name] for name in re.findall(r"the (\w+ \w+)", e.sample.question)]
            true = {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}
            assert true[answer] and set(e.sample.options) in ({"left", "right"}, {"above", "below"})
        else:
            assert answer == (", ".join(re.findall(r"The (\w+ \w+) is", thought)) or "nothing")
        kinds["options", bool(e.sample.options)] += 1
    counted = collections.Counter()
    for _ in range(150):
        scenes_drawn.clear()
        e = lessons.choice_drill(vlm, rng)
        thought, answer = parts_of(e)
        options = e.sample.options
        assert (answer in options
                and len(set(options)) == len(options)
                and any(set(options) <= set(kind) for kind in lessons.OPTIONS))
        at = places_in(vlm, e, scenes_drawn[0])
        named = re.findall(r"The (\w+ \w+) is at", thought)
        assert set(named) <= set(at)
        if re.fullmatch(r"What is \w+\?", e.sample.question) and answer.isdigit():
            counted[len(named) == int(answer)] += 1
    assert counted[True] > 2 * counted[False] > 0
    for _ in range(40):
        scenes_drawn.clear()
        e = lessons.box_drill(vlm, rng)
        name, where, corners = re.fullmatch(
            r"<think> (\w+ \w+) </think>\n<answer> (image \d: )?(\(.*\)) </answer>",
            e.turns[0].text).groups()
        assert (bool(where) == bool(e.sample.meta.get("name_image"))
                == ("Which other image" in e.sample.question))
        image = numbers(where or e.sample.question)[0] - 1
        o, = [o for o in scenes_drawn[image]["objects"] if o["name"] == name]
        assert corners == lessons.train_sft.box_text(
            data.object_box(o), vlm.view(e.sample.images[image]))
        kinds["image", bool(where)] += 1
    assert len(kinds) == 4 and min(kinds.values()) >= 5

def test_lessons_about_one_image_are_true(vlm, draw):
    """Bug: a place of another object, a number that is not theirs, the wrong side."""
    rng = random.Random(3)
    for _ in range(40):
        picture = lessons.show(vlm, draw())
        at = {o["name"]: picture.view.from_source(*o["center"]) for o in picture.objects}
        _, answer = lessons.list_objects(rng, picture)
        listed = PLACE.findall(answer)
        assert ({name: (int(x), int(y)) for name, x, y in listed} == at
                and [int(x) for _, x, _ in listed] == sorted(x for x, _ in at.values()))
        (_, question), answer = lessons.point_to(rng, picture)
        (name, x, y), = PLACE.findall(answer)
        assert name in question and at[name] == (int(x), int(y))
        (_, question), answer = lessons.name_at(rng, picture)
        x, y = picture.view.to_source(*numbers(question))
        o = picture.named(answer)
        assert max(abs(x - o["center"][0]), abs(y - o["center"][1])) < 0.5 * o["radius"] + 4
        (_, question), answer = lessons.list_alike(rng, picture)
        word = question.split()[-1].rstrip("?")
        alike = {name for name in at if word in name.split()}
        assert ({name for name, _, _ in PLACE.findall(answer)} == alike
                and answer.endswith(f": {len(alike)}"))
        (_, question), answer = lessons.box_object(rng, picture)
        x1, y1, x2, y2 = numbers(answer)
        cx, cy = at[re.findall(r"the (\w+ \w+)", question)[0]]
        assert x1 < cx < x2 and y1 < cy < y2
        (_, question), answer = lessons.compare(rng, picture)
        if len(at) > 1:
            side, a, b = re.fullmatch(
                r"Which is further (\w+), the (\w+ \w+) or the (\w+ \w+)\?", question).groups()
            axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[side]
            further = answer.rpartition(": ")[2]
            other = b if further == a else a
            assert sign * at[further][axis] >= sign * at[other][axis]
            (_, question), answer = lessons.side_of(rng, picture)
            a, b = re.findall(r"the (\w+ \w+)", question)
            side = answer.rpartition(": ")[2]
            (ax, ay), (bx, by) = at[a], at[b]
            assert {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}[side]
            across, down = abs(ax - bx), abs(ay - by)
            assert (abs(across - down) <= 4             # near a diagonal both would be true
                    or (across > down) == (side in ("left", "right")))

@pytest.mark.parametrize("ask", sorted(lessons.KINDS_ABOUT_SEVERAL, key=lambda ask: ask.__name__))
def test_lessons_about_several_images_are_true(vlm, draw, scenes_drawn, ask):
    """Bug: the box of another image."""
    rng = random.Random(4)
    asked = set()
    for _ in range(30):
        scenes_drawn.clear()
        question, answer = ask(vlm, rng, draw)
        views, text = question[:-1], question[-1]
        image = numbers(answer if "image" in answer else text)[0] - 1
        name = re.findall(r"(\w+ \w+)(?:: image \d:)? \(", answer)[0]
        o, = [o for o in scenes_drawn[image]["objects"] if o["name"] == name]
        assert numbers(answer)[-4:] == numbers(
            lessons.train_sft.box_text(data.object_box(o), views[image]))
        assert [view.index for view in views] == list(range(len(views)))
        if ask is not lessons.box_in_one_image:
            assert [o["name"] for o in scenes_drawn[0]["objects"]] == [name]
        asked.add((len(views), image))
    assert len(asked) >= 3

# -----------------------------------------------------------------------------
# what it can do

@pytest.mark.parametrize("name", skills.SKILLS)
def test_skills_tell_right_from_wrong(vlm, monkeypatch, scenes_drawn, name):
    """Bug: a reply is never compared, or with something else; a scene that a lesson may have
    shown."""
    expected, ask = [], skills.ask_lesson
    def remember(*args):
        question, answer = ask(*args)
        expected.append(answer)
        return question, answer
    monkeypatch.setattr(skills, "ask_lesson", remember)
    monkeypatch.setattr(skills, "answer_greedily", lambda vlm, questions: list(expected))
    assert (skills.accuracy(vlm, name, 12) == 1
            and {data.split_of(scene) for scene in scenes_drawn} == {"test"})
    monkeypatch.setattr(skills, "answer_greedily",
                        lambda vlm, questions: ["purple circle (0, 0),(1, 1): 9"] * 12)
    assert skills.accuracy(vlm, name, 12) == 0

def test_tolerances():
    assert (skills.near_enough("red square (40, 40)", "red square (48, 32)")
            and not skills.near_enough("red square (40, 40)", "red square (49, 40)"))
    assert (skills.overlaps("a b (0, 0),(10, 10)", "a b (0, 0),(10, 20)")
            and not skills.overlaps("a b (0, 0),(10, 9)", "a b (0, 0),(10, 20)"))
    assert not skills.overlaps("image 2: a b (0, 0),(10, 10)", "image 3: a b (0, 0),(10, 10)")
    assert (skills.same_end("red square (1, 2): 1", "red circle (5, 6): 1")
            and not skills.same_end("red square (1, 2): 1", "red square (1, 2): 2"))

# -----------------------------------------------------------------------------
# the optimizer and the loop

def test_muon_is_torchs():
    """Claim: torch.optim.Muon's updates, in fp32 rather than bf16, for several shapes, tall and
    wide."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape))
            for shape in ((32, 16), (16, 32), (32, 16), (16, 16))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    first = [p.detach().clone() for p in ours]
    optimizer = muon.Muon(ours, 0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q, start in zip(ours, theirs, first):
        assert (p - q).norm() < 0.02 * (q - start).norm()

def test_orthogonal():
    """Claim: singular values near 1, whatever they were."""
    torch.manual_seed(0)
    s = torch.linalg.svdvals(muon.orthogonal(torch.randn(3, 40, 24)))
    assert 0.6 < s.min() and s.max() < 1.3

def test_every_parameter_is_trained_once(vlm):
    matrices, others = tiny.split_parameters(vlm.model)
    both = [id(p) for p in matrices + others]
    assert (len(set(both)) == len(both) == len(list(vlm.model.parameters()))
            and all(p.ndim == 2 for p in matrices))
    assert (any(p is vlm.model.get_input_embeddings().weight for p in others)
            and len(matrices) > 30)

def test_the_stream_can_start_anywhere(vlm):
    """Bug: a run that goes on sees other lessons than one that was never stopped."""
    whole = list(itertools.islice(iter(tiny.Stream(vlm, lessons.draw_episode, 0, 12, 0)), 7))
    rest = list(itertools.islice(iter(tiny.Stream(vlm, lessons.draw_episode, 0, 12, 5)), 2))
    assert ([[e.ids for e in batch] for batch in rest]
            == [[e.ids for e in batch] for batch in whole[5:]])
    assert len({str([e.ids for e in batch]) for batch in whole}) == 7

def run_pretraining(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", shlex.split("tiny.py " + flags))
    tiny.main()

@pytest.mark.slow
def test_a_killed_pretraining_goes_on(tmp_path, monkeypatch):
    """Bug: state that is not saved. Stopped at 6 of 8 steps, then continued: the same weights as in
    one go."""
    drills = "--second-steps 2 --third-steps 2"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny.skills, "measure", lambda vlm: {})
    monkeypatch.setattr(tiny, "BATCH", 4)
    run_pretraining(monkeypatch, f"--steps 8 --out whole {drills}")
    run_pretraining(monkeypatch, f"--steps 8 --out parts --until 6 {drills}")
    assert not (tmp_path / "parts").exists() and (tmp_path / "parts.state1").exists()
    with pytest.raises(DataError, match="other settings"):
        tiny.pretrain("parts", tiny.Config(steps=9))
    run_pretraining(monkeypatch, f"--steps 8 --out parts {drills}")
    assert ((tmp_path / "whole/model.safetensors").read_bytes()
            == (tmp_path / "parts/model.safetensors").read_bytes())
    assert sorted(os.listdir(tmp_path)) == ["parts", "whole"]
