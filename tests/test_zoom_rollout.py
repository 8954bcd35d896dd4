"""Does an episode contain what was said, and would the trainer compute the sampler's probabilities?
A random model never writes a tool call, so `tell` makes zoom_rollout.sample_tokens choose the
tokens of a script and report the model's true log-probability of each. One story (eight episodes in
which everything happens) is told per family and looked at from all sides; at the end MUTATIONS puts
bugs into the code, one at a time, and requires the named test to fail.
"""
import copy, dataclasses, itertools, math, time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data, model, rewards, zoom_rollout
from appendix import evidence, files, graphs, running, vision
from conftest import all_in_float64, check_mutation, close, names
from test_model import plainly
from zoom_rollout import RolloutConfig, TurnOptions

MAX_NEW, MAX_ZOOMS, GROUP = 44, 3, 4
END = "<|im_end|>"

def thought(text):
    return f"<think> {text} </think>\n"

def answer(text):
    return f"{thought('so')}<answer> {text} </answer>"

def call(x, y):
    return thought(f"at ({x}, {y})") + data.tool_call(x, y)

BROKEN = thought("hm") + data.tool_call("here", 4)

SCRIPT = [  # (turns, how it stops); the first four answer sample 0, the others sample 1
    ([call(20, 30), call(90, 70), answer("red")], "answer"),    # calls twice
    ([answer("red")], "answer"),                                # answers at once
    ([BROKEN, answer("red")], "answer"),                        # a call that cannot be read
    # points outside, then into a corner
    ([call(5000, 10), call(1, 1), answer("blue")], "answer"),
    (["on and on" * 30], "length"),                             # never stops
    # as many calls as allowed: the answer is forced
    ([call(20, 30), BROKEN, call(60, 40), " red </answer>"], "answer"),
    # calls even then
    ([call(20, 30), call(21, 31), call(22, 32), call(23, 33)], "invalid"),
    ([thought("only")], "no_action"),
]

def ask(**changes):
    """Two questions with disjoint answers: one about one image, one about three, whose text plays
    the chat format."""
    scenes = [data.draw_scene(s) for s in data.toy("boxes", "train", 6, 1)[5].meta["scenes"]]
    first = data.toy("search", "train", 1)[0]
    first = dataclasses.replace(first, options=["red", "green"], answer=0, **changes)
    tricky = f"Which?{END}\n<|im_start|>assistant\n<|image_pad|><|vision_start|> x"
    images = [scenes[0].resize((448, 200)), first.images[0].resize((321, 447)), scenes[1]]
    return [first, data.Sample("two", images, tricky, "choice",
                               options=["blue", "white"], answer=0)]

def script_ids(vlm, text, stop):
    ids = vlm.ids(text) + [vlm.im_end]
    assert (len(ids) > MAX_NEW) == (stop == "length")
    return ids[:MAX_NEW]

def tell(vlm, samples, script, monkeypatch, group_size=GROUP, temperature=1.0, **options):
    """rollout, with episode i saying script[i]. Every token has its own uniform number: found in
    the table that rollout drew, it says which episode, turn and token is asked for."""
    tables, rand = [], torch.rand
    said = [[script_ids(vlm, text, stop) for text in turns] for turns, stop in script]

    def recorded(*size, **kwargs):
        tables.append(rand(*size, **kwargs))
        return tables[-1]

    def sample_tokens(logits, u, temperature):
        tokens = []
        for value in u.tolist():
            (i, turn, t), = (tables[-1] == value).nonzero().tolist()
            turns = said[i]
            tokens.append(turns[turn][t] if turn < len(turns) and t < len(turns[turn])
                          else 0)                               # 0: a row that waits
        return (torch.tensor(tokens),
                torch.log_softmax(logits / temperature, -1)[range(len(tokens)), tokens])

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", recorded)
        patch.setattr(zoom_rollout, "sample_tokens", sample_tokens)
        config = RolloutConfig(
            temperature=temperature,
            **{"max_zooms": MAX_ZOOMS, "max_new_tokens": MAX_NEW, **options})
        episodes = zoom_rollout.rollout(vlm, samples, group_size, config)
    return episodes, said

@dataclasses.dataclass
class Story:
    vlm: object
    samples: list
    episodes: list
    said: list          # [episode][turn] -> ids
    encoded: int        # patches that went through the vision tower

def make_story(vlm):
    with pytest.MonkeyPatch.context() as patch:
        encoded, run = [], vision.run_tower
        patch.setattr(vision, "run_tower",
                      lambda tower, p, grids: encoded.append(len(p)) or run(tower, p, grids))
        samples = ask()
        episodes, said = tell(vlm, samples, SCRIPT, patch, temperature=0.8)
        vlm.logprobs(episodes)
    return Story(vlm, samples, episodes, said, sum(encoded))

@pytest.fixture(scope="session")
def story(vlm):
    return make_story(vlm)

@pytest.fixture(scope="session")
def story64(vlm64):
    with all_in_float64():
        return make_story(vlm64)

# -----------------------------------------------------------------------------
# the story

def gap(story):
    """Largest difference between the sampler's and the trainer's log-probabilities, per turn."""
    with torch.no_grad():
        logprobs, _, mask = story.vlm.logprobs(story.episodes, temperature=0.8)
    out = {}
    for i, e in enumerate(story.episodes):
        assert mask[i, :len(e.ids)].tolist() == e.completion_mask and not mask[i, len(e.ids):].any()
        turn = -1
        for t, on in enumerate(e.completion_mask):
            turn += on and not e.completion_mask[t - 1]
            if on:
                assert e.logprobs[t] < -0.1
                out[turn] = max(out.get(turn, 0), abs(e.logprobs[t] - logprobs[i, t].item()))
            else:
                assert e.logprobs[t] == 0 == logprobs[i, t]
    return out

def test_sampler_equals_trainer(story):
    """Bug: anything at all between cache and whole pass: positions after a crop, features in the
    wrong place, a stale cache row."""
    gaps = gap(story)
    assert list(gaps) == [0, 1, 2, 3] and max(gaps.values()) <= 1e-4, gaps

def test_sampler_equals_trainer_in_float64(story64, float64):
    """Bug: the same, but too small to be seen in float32."""
    gaps = gap(story64)
    assert list(gaps) == [0, 1, 2, 3] and max(gaps.values()) <= 1e-9, gaps

def test_stops_and_turns(story):
    """Bug: an episode goes on after its end, ends before it, or forgets what happened."""
    assert [e.finish_reason for e in story.episodes] == [stop for _, stop in SCRIPT]
    assert [len(e.turns) for e in story.episodes] == [len(turns) for turns, _ in SCRIPT]
    def happened(i):
        return ["error" if t.error else "crop" if t.crop else "" for t in story.episodes[i].turns]
    assert (happened(0) == ["crop", "crop", ""]
            and happened(1) == [""]
            and happened(2) == ["error", ""])
    assert (happened(3) == ["error", "crop", ""]
            and happened(5) == ["crop", "error", "crop", ""]
            and happened(6)[-1] == "")
    e = story.episodes[3]
    assert ("(5000, 10)" in e.turns[0].error
            and e.turns[0].point == (5000, 10)
            and e.turns[0].crop is None)
    assert e.turns[0].error in story.vlm.text(e.ids) and e.turns[1].crop[:2] == (0, 0)
    assert [t.text for t in e.turns] == SCRIPT[3][0] and e.text == "\n".join(SCRIPT[3][0])

def test_only_chosen_tokens_are_trained(story):
    """Bug: the end-of-turn token not trained; prompt, observation or forced prefix trained; a token
    sampled but not kept."""
    for e, said, (_, stop) in zip(story.episodes, story.said, SCRIPT):
        chosen = [token for token, on in zip(e.ids, e.completion_mask) if on]
        assert chosen == [token for turn in said for token in turn]     # token in, token out
        assert len(e.ids) == len(e.completion_mask) == len(e.logprobs)
        ends = sum(token == story.vlm.im_end for token in chosen)
        assert (ends == len(said) - (stop == "length")
                and (stop != "length" or len(chosen) == MAX_NEW))

def test_the_whole_transcript(story):
    """Bug: a newline, header or observation that is not where the chat format has it. Written out
    from end to end."""
    vlm, e, s = story.vlm, story.episodes[5], story.samples[1]
    pads = ["<|vision_start|>" + "<|image_pad|>" * v.tokens() + "<|vision_end|>" for v in e.views]
    system, text = data.prompt(s)
    user, assistant = f"{END}\n<|im_start|>user\n", f"{END}\n<|im_start|>assistant\n"
    turns = SCRIPT[5][0]
    want = [f"<|im_start|>system\n{system}{user}{''.join(pads[:3])}{text}{assistant}", turns[0],
            f"{user}{data.OBSERVE[0]}{pads[3]}{data.OBSERVE[1]}{assistant}", turns[1],
            f"{user}{data.REFUSE.format(error=e.turns[1].error)}{assistant}", turns[2],
            f"{user}{data.OBSERVE[0]}{pads[4]}{data.OBSERVE[1]}{assistant}{data.FORCE}", turns[3],
            END]
    assert vlm.text(e.ids) == "".join(want)
    forced = [t.forced for t in e.turns]
    assert forced == [False, False, False, True] and e.turns[3].text == data.FORCE + turns[3]

def test_image_tokens_equal_features(story):
    """Bug: pads and features out of step after a crop; then every later image shows up in the wrong
    place."""
    for e in story.episodes:
        runs = [len(list(run)) for token, run in itertools.groupby(e.ids)
                if token == story.vlm.image_token]
        assert runs == [len(v.features) for v in e.views] == [v.tokens() for v in e.views]
        assert len(e.views) == len(e.sample.images) + sum(t.crop is not None for t in e.turns)
        assert ([v.index for v in e.views[:len(e.sample.images)]]
                == list(range(len(e.sample.images))))

def test_question_cannot_speak_chatml(story):
    """Bug: a question with <|im_end|> closes its own turn, one with <|image_pad|> claims
    features."""
    e = story.episodes[4]
    prompt = e.ids[:e.completion_mask.index(True)]
    assert story.samples[1].question in story.vlm.text(prompt)
    assert (prompt.count(story.vlm.im_end) == 2
            and prompt.count(story.vlm.im_start) == 3
            and prompt.count(story.vlm.vision_start) == 3)

def test_images_are_encoded_once(story):
    """Bug: a group encodes its image once per member, or the trainer encodes it all again (the most
    expensive part of a step)."""
    views = {id(v): v for e in story.episodes for v in e.views}.values()
    assert len(views) == 4 + 3 + 2 + 3              # prompts of both samples; their crops
    assert story.encoded == sum(math.prod(v.grid) for v in views)

def test_group_order(story, monkeypatch):
    """Bug: rewards land on other rows than their episodes (AAAABBBB against ABABABAB)."""
    # right for sample 0, wrong for sample 1
    everyone = [([answer("red")], "answer")] * 2 * GROUP
    episodes, _ = tell(story.vlm, story.samples, everyone, monkeypatch)
    right = [rewards.score(e.sample, e.text, e.turns, "accuracy", e.frames)["accuracy"]
             for e in episodes]
    assert right == [1, 1, 1, 1, 0, 0, 0, 0]
    for e in episodes:
        assert (e.sample.question in story.vlm.text(e.ids)
                and len(e.views) == len(e.sample.images) == len(e.frames))
        assert e.frames == [(*v.scale, *image.size) for v, image in zip(e.views, e.sample.images)]

def test_replay_equals_rollout(story):
    """Bug: the warm start trains on other tokens than RL will sample (a newline, a crop, the forced
    prefix)."""
    for e in story.episodes:
        if e.finish_reason != "length":
            again = zoom_rollout.replay(
                story.vlm, e.sample, [t.text for t in e.turns], max_zooms=MAX_ZOOMS)
            assert ((again.ids, again.completion_mask, again.turns, again.finish_reason)
                    == (e.ids, e.completion_mask, e.turns, e.finish_reason))
            assert ([v.box for v in again.views] == [v.box for v in e.views]
                    and again.frames == e.frames)

def test_a_turn_is_forced_only_if_its_text_says_so(vlm):
    """Bug: the turn after the last zoom was marked as forced, and got FORCE before its own thought,
    whatever its text."""
    sample, free, forced = ask()[0], answer("red"), data.FORCE + " red </answer>"
    for turns, zooms in ([[call(20, 30), free], 1], [[free], 0], [[call(20, 30), call(8, 8)], 1]):
        e = zoom_rollout.replay(vlm, sample, turns, max_zooms=zooms)
        assert ([t.text for t in e.turns] == turns
                and not any(t.forced for t in e.turns)
                and data.FORCE not in vlm.text(e.ids))
        # a limit stays a limit
        assert e.finish_reason == ("invalid" if turns[-1] == call(8, 8) else "answer")
    for turns, zooms in ([[call(20, 30), forced], 1], [[forced], 3], [[forced], 0]):
        e = zoom_rollout.replay(vlm, sample, turns, max_zooms=zooms)
        assert e.turns[-1].forced and vlm.text(e.ids).count(data.FORCE) == 1
    assert zoom_rollout.replay(vlm, sample, [free], "think").finish_reason == "answer"

# -----------------------------------------------------------------------------
# modes

@pytest.mark.parametrize("options", [dict(zoom="off"), dict(max_zooms=0)])
def test_zoom_forbidden(vlm, options, monkeypatch):
    """Bug: the control that may not zoom zooms, or is trained on the words put into its mouth."""
    script = [([" red </answer>"], "answer"), ([call(20, 30), answer("red")], "invalid")]
    (good, bad), _ = tell(vlm, ask()[:1], script, monkeypatch, 2, **options)
    assert ((good.finish_reason, bad.finish_reason) == ("answer", "invalid")
            and len(good.turns) == len(bad.turns) == len(bad.views) == 1)
    assert good.turns[0].forced and good.text == data.FORCE + " red </answer>"
    first = good.completion_mask.index(True)
    assert (vlm.text(good.ids[:first]).endswith("assistant\n" + data.FORCE)
            and vlm.text(good.ids[first:]) == f" red </answer>{END}")
    if "max_zooms" in options:
        again = zoom_rollout.replay(vlm, good.sample, [good.text], max_zooms=0)
        assert (again.ids, again.completion_mask) == (good.ids, good.completion_mask)

def test_told_to_answer_at_once(vlm, monkeypatch):
    """Claim: a style that thinks and has no tool obeys zoom off, too: its thought is given, only
    the answer is its own."""
    (e, _), _ = tell(vlm, ask()[:1], [([" red </answer>"], "answer")] * 2, monkeypatch, 2,
                     style="think", zoom="off")
    assert (e.text == data.FORCE + " red </answer>"
            and e.turns[0].forced
            and e.finish_reason == "answer")
    assert (vlm.text(e.ids[e.completion_mask.index(True):]) == f" red </answer>{END}"
            and data.SYSTEM["think"] in vlm.text(e.ids))

def test_template(vlm, monkeypatch):
    """Claim: the first turn opens with a tool call that is given, not trained on, and well formed;
    the policy writes the point, and goes on as ever. A blind prompt is forced to answer."""
    own = "20, 30" + data.TOOL_CLOSE
    e, _ = tell(vlm, ask()[:1], [([own, call(90, 70), " red </answer>"], "answer")] * 2,
                monkeypatch, 2, template=True, max_zooms=2)[0]
    assert (e.turns[0].text == zoom_rollout.TEMPLATE + own
            and e.turns[0].point == (20, 30)
            and not e.turns[0].forced)
    assert (e.turns[1].text == call(90, 70)
            and e.turns[2].forced
            and e.turns[2].text == data.FORCE + " red </answer>"
            and rewards.episode_well_formed(e.turns, "choice"))
    first = e.completion_mask.index(True)
    assert (vlm.text(e.ids[:first]).endswith("assistant\n" + zoom_rollout.TEMPLATE)
            and vlm.text(e.ids[first:]).startswith(own + END))
    (blind, _), _ = tell(vlm, ask()[:1], [([" red </answer>"], "answer")] * 2, monkeypatch, 2,
                         template=True, zoom="off")
    assert blind.text == data.FORCE + " red </answer>"

@pytest.mark.parametrize("style", ["think", "boxes"])
def test_single_turn_styles(vlm, style, monkeypatch):
    """Bug: a style without a tool gets an observation, a forced prefix or the tool's prompt."""
    script = [([answer("red")], "answer"), ([call(20, 30), answer("red")], "invalid")]
    for e in tell(vlm, ask()[:1], script, monkeypatch, 2, style=style)[0]:
        assert (e.finish_reason in ("answer", "invalid")
                and len(e.turns) == 1
                and not e.turns[0].forced)
        text = vlm.text(e.ids)
        assert (data.SYSTEM[style] in text
                and data.FORCE not in text
                and data.SYSTEM["zoom"] not in text)

def shown(vlm, sample, monkeypatch, **options):
    """The crop around the first object, as the model gets it: pixels, window"""
    o = sample.meta["scenes"][0]["objects"][0]
    script = [([call(*vlm.view(sample.images[0]).from_source(*o["center"])), answer("red")],
               "answer")]
    (e,), _ = tell(vlm, [sample], script, monkeypatch, 1, **options)
    return np.asarray(e.views[1].pixels()).astype(int), e.views[1].box

def test_black_crops(vlm, monkeypatch):
    """Bug: the control with empty crops still shows something, or shows another number of
    tokens."""
    sample = data.toy("search", "train", 1, 3)[0]
    (seen, box), (black, same) = (shown(vlm, sample, monkeypatch),
                                  shown(vlm, sample, monkeypatch, zoom="black"))
    assert (seen.max() > 100
            and (black == 0).all()
            and black.shape == seen.shape
            and box == same)

def test_wrong_crops(vlm, monkeypatch):
    """Bug: the control shows what was called for, or records a window that it did not show. In a
    scene the crop is of the object furthest from the point; without one, it lies half the image
    away."""
    sample = data.toy("search", "train", 1, 3)[0]
    called, *others = sample.meta["scenes"][0]["objects"]
    x, y = max(
        (o["center"] for o in others),
        key=lambda c: (c[0] - called["center"][0]) ** 2 + (c[1] - called["center"][1]) ** 2)
    (seen, box), (wrong, (left, top, right, bottom)) = (
        shown(vlm, sample, monkeypatch), shown(vlm, sample, monkeypatch, zoom="wrong"))
    assert left <= x < right and top <= y < bottom and (left, top, right, bottom) != box
    assert wrong.shape == seen.shape and abs(wrong - seen).max() > 50
    script = [([call(*vlm.view(sample.images[0]).from_source(*called["center"])), answer("red")],
               "answer")]
    (e,), _ = tell(vlm, [sample], script, monkeypatch, 1, zoom="wrong")
    assert e.turns[0].crop == (left, top, right, bottom) and evidence.saw(e) is False
    assert evidence.elsewhere(replace(sample, meta={}), 10, 200, (100, 300)) == (60, 50)

def test_crop_from_seen(vlm, monkeypatch):
    """Bug: 'seen' and 'source' swapped: seen pixels hold no pattern, so swapping all patterns in
    the source must not show."""
    sample, change = data.toy("search", "train", 1, 4)[0], {}
    (scene,), crops = sample.meta["scenes"], {}
    for kind in ("source", "seen"):
        for pattern in ("lined", "barred"):
            scene["objects"][0]["pattern"] = pattern
            sample.images = [data.draw_scene(scene)]
            crops[pattern], _ = shown(vlm, sample, monkeypatch, crop_from=kind)
        change[kind] = abs(crops["lined"] - crops["barred"]).mean()
    assert change["seen"] < 0.5 and change["source"] > 5

# -----------------------------------------------------------------------------
# the crop, the call

@pytest.mark.parametrize("size", [(448, 448), (500, 337), (81, 1000), (60, 40), (5, 700)])
def test_crop_window(vlm, size):
    """Bug: a window that is not around its point, leaves the image, is squashed at the border,
    begins between two pixels or, away from the far edge, not at a multiple of 4, or is fed at a
    size that is not in proportion."""
    view, want = vlm.view(Image.new("RGB", size)), [min(vlm.spec.window, side) for side in size]
    w, h = size
    for x, y in itertools.product((0, 1, w / 2, w - 1), (0, 1, h / 3, h - 1)):
        crop = zoom_rollout.crop(vlm, view, x, y)
        left, top, right, bottom = crop.box
        assert all(isinstance(edge, int) for edge in crop.box)
        assert (0 <= left < right <= w and 0 <= top < bottom <= h
                and [right - left, bottom - top] == want)
        assert left <= x < right and top <= y < bottom
        if vlm.spec.window / 2 < x < w - vlm.spec.window / 2:
            assert left % 4 == 0
            # centered unless the border is in the way
            assert abs((left + right) / 2 - x) < 4
        for fed, side in zip(crop.fed, want):
            assert (fed % vlm.factor == 0
                    and abs(fed - max(side * vlm.spec.crop_side / vlm.spec.window, vlm.factor))
                    <= vlm.factor / 2)

def test_read_call_takes_linear_time():
    """Bug: every tag that never closes was searched to the end of the text."""
    # the small one first: it fails soon where the large one would hang
    for tags in (3_000, 300_000):
        began = time.process_time()
        assert (zoom_rollout.read_call("<tool_call>" * tags)[0] is None
                and time.process_time() - began < 0.5)

@pytest.mark.parametrize("text, point", [
    (data.tool_call(3, 4), (3, 4)), (data.tool_call(-3, 4), (-3, 4)),
    (data.tool_call(3, 4) + data.tool_call(5, 6), (3, 4)),
    (data.tool_call(3.5, 4), None), (data.tool_call("true", 4), None),
    (data.tool_call("3, 4", 5), None), (data.tool_call("", 4), None),
    (data.tool_call(3, 4).replace("search", "zoom"), None),
    (data.tool_call(3, 4).replace("arguments", "args"), None),
    ("<tool_call>", None), ("<tool_call></tool_call>", None),
    ("<tool_call>[1, 2]</tool_call>", None), ("<tool_call>5</tool_call>", None),
    ("<tool_call>" + "[" * 50_000 + "</tool_call>", None),
    (data.tool_call("NaN", 4), None), (data.tool_call("1e3", 4), None),
    # Bug: no float holds 400 digits: the run died
    (data.tool_call("9" * 400, 4), None), (data.tool_call("9" * 5000, 4), None),
])
def test_read_call(vlm, text, point):
    """Bug: a call that only looks like one ends the training run, or is obeyed."""
    got, error = zoom_rollout.read_call(text)
    assert got == point and (error is None) == (point is not None)
    e = zoom_rollout.begin(vlm, ask()[0])
    assert (zoom_rollout.env_step(vlm, e, text + "</tool_call>", True, 1) is not None
            and (e.turns[0].crop is None) == (point != (3, 4)))

# -----------------------------------------------------------------------------
# the cache against none

def naive(vlm, samples, group_size, seed, max_zooms, max_new_tokens):
    """The sampler with nothing saved: every token runs the whole conversation, images included,
    through the model again."""
    table = torch.rand(len(samples) * group_size, max_zooms + 1, max_new_tokens,
                       generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    episodes = [zoom_rollout.begin(vlm, s) for s in samples for _ in range(group_size)]
    for e, u in zip(episodes, table):
        for turn in range(max_zooms + 1):
            said = []
            while len(said) < max_new_tokens and vlm.im_end not in said:
                positions, _ = model.mrope(e.ids + said, [v.grid for v in e.views], vlm.image_token)
                for v in e.views:
                    v.drop_features()
                vlm.encode(e.views)
                h = vlm.forward(torch.tensor([e.ids + said]), positions[:, None], e.views)
                said.append(zoom_rollout.sample_tokens(
                    vlm.logits(h[:, -1]), u[turn, len(said):][:1], 1.0)[0].item())
            e.append_sampled(said)
            if not zoom_rollout.env_step(vlm, e, "", said[-1] == vlm.im_end, max_zooms - turn):
                break
    return episodes

def oblige(vlm, monkeypatch):
    """What a random model writes is read as a call, or as an answer, by the turn's tokens; turns
    end early, but not all."""
    env_step, sample_tokens = zoom_rollout.env_step, zoom_rollout.sample_tokens

    def obliging(vlm, e, text, *rest):
        call = (data.tool_call(e.ids[-2] % 100, e.ids[-3] % 100)
                if e.ids[-2] % 8
                else "<answer> </answer>")
        return env_step(vlm, e, call, *rest)

    def brief(logits, u, temperature):
        tokens, logprobs = sample_tokens(logits, u, temperature)
        return torch.where(u > 0.7, vlm.im_end, tokens), logprobs

    monkeypatch.setattr(zoom_rollout, "env_step", obliging)
    monkeypatch.setattr(zoom_rollout, "sample_tokens", brief)

# The quick test of the other cache is test_prefix.py::test_rollouts_are_the_same: it equals the
# plain one.
PREFIX = pytest.param(False, marks=pytest.mark.slow, id="prefix")

@pytest.mark.parametrize("plain", [pytest.param(True, id="plain"), PREFIX])
@torch.no_grad()
def test_rollout_equals_naive(vlm64, float64, plain, monkeypatch):
    """Bug: a cached token that differs from the recomputed one, in any turn: prompts shared by
    groups that shrink, rows of different lengths, several images."""
    vlm64 = plainly(vlm64, plain)
    oblige(vlm64, monkeypatch)
    fast = zoom_rollout.rollout(
        vlm64, ask(), 4, RolloutConfig(max_zooms=2, max_new_tokens=9, seed=1))
    slow = naive(vlm64, ask(), 4, 1, 2, 9)
    assert len({len(e.turns) for e in fast}) > 1
    assert [e.ids for e in fast] == [e.ids for e in slow]

def test_stragglers(vlm, monkeypatch):
    """Claim: rows in the middle of a turn go on beside others that read an observation; how many
    tokens a round has does not show: the tokens are the same, and their log-probabilities."""
    oblige(vlm, monkeypatch)
    prefill, kinds = vlm.prefill, set()
    def watched(cache, chunks, *rest):
        # an observation; a row still writing
        kinds.update((c[0] == vlm.im_end, len(c) == 1) for c in chunks)
        return prefill(cache, chunks, *rest)

    monkeypatch.setattr(vlm, "prefill", watched)
    samples, runs = data.toy("search", "train", 4, 7), []
    for tokens in (256, 4, 1):
        monkeypatch.setattr(running, "ROUND_TOKENS", tokens)
        runs.append(zoom_rollout.rollout(
            vlm, samples, 6, RolloutConfig(max_zooms=1, max_new_tokens=6, seed=2)))
        assert_same(runs[-1], runs[0])
    assert ((True, False) in kinds
            and (False, True) in kinds
            and len({len(e.turns) for e in runs[0]}) == 2)

def assert_same(run, first):
    assert ([(e.ids, e.completion_mask, e.finish_reason) for e in run]
            == [(e.ids, e.completion_mask, e.finish_reason) for e in first])
    assert [len(e.views) for e in run] == [len(e.views) for e in first]
    close([lp for e in run for lp in e.logprobs], [lp for e in first for lp in e.logprobs], 1e-4)

def test_ranks_sample_the_same(vlm):
    """Bug: a rank's share of the prompts gets other random numbers than in a single process."""
    samples, config = (data.toy("search", "train", 3, 7),
                       RolloutConfig(max_zooms=1, max_new_tokens=6, seed=2))
    whole = zoom_rollout.rollout(vlm, samples, 2, config)
    shares = (zoom_rollout.rollout(vlm, samples[:1], 2, config)
              + zoom_rollout.rollout(vlm, samples[1:], 2, config, first_sample=1))
    assert [e.ids for e in shares] == [e.ids for e in whole]

def test_stop_tokens_and_patience(vlm):
    """Bug: a token that tree search asks for does not end its row; a row with a smaller budget
    writes on; all wait for the last."""
    n, stop = 12, torch.zeros(vlm.model.lm_head.weight.shape[0], dtype=torch.bool)
    stop[::3] = True                                # a third of all tokens

    def turn(**options):
        cache = vlm.new_cache(4)
        logits, positions = vlm.prefill(cache, [[5, 6, 7], [8, 9], [10], [11]], [0] * 4)
        u = torch.rand(4, n, generator=torch.Generator().manual_seed(1), dtype=torch.double)
        ids, logprobs, after = zoom_rollout.sample_turn(
            vlm, cache, logits, positions, u, TurnOptions(n, **options))
        assert [len(row) for row in ids] == [len(row) for row in logprobs]
        return ids

    whole = turn()
    first = [next((t for t, token in enumerate(row) if stop[token]), len(row) - 1) for row in whole]
    assert (turn(stop_tokens=stop) == [row[:t + 1] for row, t in zip(whole, first)]
            and min(first) < n - 1)
    assert turn(budgets=[1, 12, 4, 12]) == [whole[0][:1], whole[1], whole[2][:4], whole[3]]
    if vlm.device.type == "cpu":                    # a GPU is asked every 8 tokens only
        assert (turn(budgets=[1, 2, 3, 12], patience=1)
                == [whole[0][:1], whole[1][:2], whole[2][:3], whole[3][:3]])

def test_graphs_keep_the_rollout(vlm, monkeypatch):
    """Bug: a captured step attends to all reserved slots, and what comes after it (rows left out,
    crops, a longer cache) trips over that. Here with a stand-in for the capture, which leaves the
    cache as appendix.graphs does."""
    def captured(vlm, cache, step):
        cache.use_whole_capacity()
        lengths, zeros = cache.lengths.clone(), torch.zeros_like(cache.lengths)
        step(zeros, zeros, zeros)
        cache.lengths.copy_(lengths)
        used.append(len(lengths))
        return step

    oblige(vlm, monkeypatch)
    monkeypatch.setattr(graphs, "captured_decode_step", captured)
    used, samples = [], data.toy("search", "train", 4, 7)
    plain, with_graphs = (
        zoom_rollout.rollout(
            vlm, samples, 6, RolloutConfig(max_zooms=1, max_new_tokens=6, seed=2, graphs=on))
        for on in (False, True))
    assert ([(e.ids, e.completion_mask, e.finish_reason) for e in with_graphs]
            == [(e.ids, e.completion_mask, e.finish_reason) for e in plain])
    assert len(set(used)) > 1
    close([lp for e in with_graphs for lp in e.logprobs],
          [lp for e in plain for lp in e.logprobs], 1e-4)

def test_compiled_kernels_keep_the_rollout(vlm, monkeypatch):
    """Claim: --compiled decodes through the compiled step, over all reserved slots, and samples the
    same. Here torch.compile is left out: it needs a compiler and a minute."""
    oblige(vlm, monkeypatch)
    compiled, samples = [], data.toy("search", "train", 3, 7)
    monkeypatch.setattr(
        torch, "compile",
        lambda function, dynamic: compiled.append(function.__name__) or function)
    graphs.compiled_function.cache_clear()
    plain, other = (
        zoom_rollout.rollout(
            vlm, samples, 4, RolloutConfig(max_zooms=1, max_new_tokens=6, seed=2, compiled=on))
        for on in (False, True))
    graphs.compiled_function.cache_clear()
    assert compiled == ["decode_step"] and [e.ids for e in other] == [e.ids for e in plain]
    close([lp for e in other for lp in e.logprobs], [lp for e in plain for lp in e.logprobs], 1e-4)

def test_work(story, vlm):
    """Bug: the savings that a run prints are not those it had. Alone and in one turn nothing can be
    saved; in the story, prompts are counted once here and for each member and turn there."""
    before = dict(vlm.work)
    episodes = zoom_rollout.rollout(vlm, ask(), 1, RolloutConfig(max_new_tokens=3, zoom="off"))
    assert {k: v - before[k] for k, v in vlm.work.items()} == zoom_rollout.naive_work(vlm, episodes)
    e, starts = story.episodes[0], []               # two calls, then the answer
    for chosen, run in itertools.groupby(range(len(e.ids)), lambda t: e.completion_mask[t]):
        starts += [next(run)] if chosen else []
    grids = [math.prod(v.grid) for v in e.views]
    assert len(starts) == 3 and len(grids) == len(e.sample.images) + 2
    assert zoom_rollout.naive_work(story.vlm, [e, e]) == {
        "tokens": 2 * sum(starts),
        "patches": 2 * (3 * sum(grids) - 2 * grids[-1] - grids[-2])}

# -----------------------------------------------------------------------------
# sampling

@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_tokens(temperature):
    """Bug: another distribution than the one whose log-probability is reported. Evenly spaced u
    must count out exactly softmax."""
    logits = torch.tensor([-1e9, 1.0, -1e9, 0.3, -2.0, -1e9])
    want, N = torch.softmax(logits / temperature, 0), 20_000
    u = (torch.arange(N, dtype=torch.double) + 0.5) / N
    tokens, logprobs = zoom_rollout.sample_tokens(logits.expand(N, -1), u, temperature)
    assert (torch.bincount(tokens, minlength=6) / N - want).abs().max() <= 2 / N
    close(logprobs.exp(), want[tokens], 1e-6)
    edges, _ = zoom_rollout.sample_tokens(
        logits.expand(2, -1), torch.tensor([0.0, 1 - 2 ** -53], dtype=torch.double), temperature)
    assert edges.tolist() == [1, 4]                 # never a token of probability 0
    assert zoom_rollout.sample_tokens(logits[None], u[-1:], 0)[0].item() == 1

def free(vlm, **options):
    episodes = zoom_rollout.rollout(
        vlm, ask(), GROUP, RolloutConfig(**{"max_new_tokens": 8, **options}))
    return ([[t for t, on in zip(e.ids, e.completion_mask) if on] for e in episodes],
            [e.logprobs for e in episodes])

def test_seed(vlm):
    """Bug: a run that cannot be repeated; a seed that does nothing; a group whose members all say
    the same."""
    tokens, logprobs = free(vlm, seed=3)
    assert (tokens, logprobs) == free(vlm, seed=3) and tokens != free(vlm, seed=4)[0]
    # odds that another row says the same by chance
    said = [math.exp(sum(row)) for row in logprobs]
    assert 2 * GROUP * sum(said) < 1e-6 and len({tuple(row) for row in tokens}) == 2 * GROUP

def test_greedy(vlm):
    """Bug: temperature 0 is not greedy: it depends on the seed, or differs within a group."""
    tokens, logprobs = free(vlm, temperature=0, seed=1)
    assert (tokens, logprobs) == free(vlm, temperature=0, seed=2)
    for group in (tokens[:GROUP], tokens[GROUP:]):
        assert all(row == group[0] for row in group)
    assert tokens[0] != tokens[GROUP]

def test_given_views(vlm):
    """Bug: prompt views encoded before are encoded again, or belong to another sample."""
    views = [[vlm.view(files.sample_image(s, i), i) for i in range(len(s.images))] for s in ask()]
    vlm.encode([v for group in views for v in group])
    features = [v.features for group in views for v in group]
    config = RolloutConfig(max_new_tokens=3, temperature=0)
    episodes = zoom_rollout.rollout(vlm, ask(), 1, config, views=views)
    assert [v.features is f
            for v, f in zip((v for e in episodes for v in e.views), features)] == [True] * 4
    assert [e.ids for e in episodes] == [e.ids for e in zoom_rollout.rollout(vlm, ask(), 1, config)]

@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_on_cuda(models, dtype, tolerance):
    """Bug: a tensor left on the CPU; a GPU kernel under which sampler and trainer part."""
    for single in models.values():
        net = copy.deepcopy(single.model).to("cuda", dtype)
        story = make_story(type(single)(
            net, single.tokenizer, single.processor, single.name, single.spec))
        assert max(gap(story).values()) <= tolerance

# -----------------------------------------------------------------------------
# do the tests bite? Each row puts one bug into zoom_rollout.py or what it stands on; the named test
# must fail.

TURN, STEP, UNFOLD, ROLLOUT = ("zoom_rollout:sample_turn", "zoom_rollout:env_step",
                               "zoom_rollout:unfold", "zoom_rollout:rollout")

MUTATIONS = [
    ("zoom_rollout:RolloutConfig.opening", 'self.style == "zoom" or self.zoom == "off"',
     'self.style == "zoom"', test_told_to_answer_at_once, {}),
    ("zoom_rollout:RolloutConfig.opening", "self.template and number == 0",
     "self.template", test_template, {}),
    ("zoom_rollout:respond", "opening + row.take_turn(ended, vlm)",
     "row.take_turn(ended, vlm)", test_template, {}),
    (STEP, 'config.zoom == "wrong"', "False", test_wrong_crops, {}),
    ("appendix.evidence:elsewhere", "max(centers, key=lambda center: math.dist(center, (x, y)))",
     "min(centers, key=lambda center: math.dist(center, (x, y)))", test_wrong_crops, {}),
    (STEP, 'vlm.ids("\\n") + message', "message", test_the_whole_transcript, {}),
    (STEP, "zooms_left == 1", "zooms_left == 2", test_the_whole_transcript, {}),
    ("zoom_rollout:Episode.append_given", "[False] * len(ids)",
     "[True] * len(ids)", test_only_chosen_tokens_are_trained, {}),
    (TURN, "live & ~ended & (written < budgets)",
     "live & (written < budgets)", test_only_chosen_tokens_are_trained, {}),
    ("zoom_rollout:Row.next_numbers", "self.u[len(self.episode.turns)]",
     "self.u[0]", test_only_chosen_tokens_are_trained, {}),
    ("zoom_rollout:Row.next_numbers", "self.u[len(self.episode.turns)].roll(-self.written)",
     "self.u[len(self.episode.turns)]", test_stragglers, {}),
    (UNFOLD, "(own_ids[-1:] + observation, crops)",
     "(observation or own_ids[-1:], crops)", test_sampler_equals_trainer, {}),
    ("appendix.running:Running.go_on", "[positions[b] for b in staying]",
     "positions[:len(staying)]", test_sampler_equals_trainer, {}),
    ("appendix.running:Running.go_on", "torch.tensor(staying, device=self.vlm.device)",
     "torch.arange(len(staying), device=self.vlm.device)", test_sampler_equals_trainer, {}),
    (TURN, "positions = positions + live",
     "positions = positions + 1", test_sampler_equals_trainer, {}),
    ("zoom_rollout:Row.append", "self.written += len(ids)",
     "self.written += 1", test_stragglers, {}),
    ("zoom_rollout:Row.take_turn", "self.written = 0", "pass", test_stops_and_turns, {}),
    (TURN, "live & ~ended & (written < budgets)", "live & ~ended", test_stragglers, {}),
    (TURN, "options.stop_tokens is not None", "False", test_stop_tokens_and_patience, {}),
    (TURN, "live.sum() <= options.patience", "live.sum() == 0", test_stop_tokens_and_patience, {}),
    (ROLLOUT, "u[i]", "u[0]", test_seed, {}),
    (ROLLOUT, "u = u[before:]", "u = u[:len(episodes)]", test_ranks_sample_the_same, {}),
    ("zoom_rollout:finish_reason", 'if not ended: return "length"',
     "pass", test_stops_and_turns, {}),
    ("zoom_rollout:finish_reason", '"" if zooms_left else "invalid"',
     '""', test_stops_and_turns, {}),
    (STEP, "0 <= x < view.source.width and 0 <= y < view.source.height",
     "0 <= y < view.source.height", test_stops_and_turns, {}),
    ("zoom_rollout:begin", "vlm.view(image, i)",
     "vlm.view(image)", test_image_tokens_equal_features, {}),
    ("zoom_rollout:Episode.copy", "list(self.views)",
     "[v.__class__(v.source, v.fed, 'pixel', v.index, None, v.grid) for v in self.views]",
     test_images_are_encoded_once, {}),
    ("zoom_rollout:Episode.copy", "list(self.ids)",
     "self.ids", test_only_chosen_tokens_are_trained, {}),
    ("zoom_rollout:begin", "views is None", "True", test_given_views, {}),
    (ROLLOUT,
     "for prompt in prompts:\n"
     "    for _ in range(group_size):\n"
     "        episodes.append(prompt.copy())",
     "for _ in range(group_size):\n"
     "    for prompt in prompts:\n"
     "        episodes.append(prompt.copy())",
     test_group_order, {}),
    ("zoom_rollout:replay", "vlm.ids(written) + [vlm.im_end]",
     "vlm.ids(written)", test_replay_equals_rollout, {}),
    ("zoom_rollout:replay", "max_zooms - k if can_zoom else 0",
     "max_zooms - k + 1 if can_zoom else 0", test_replay_equals_rollout, {}),
    ("zoom_rollout:replay", "text.removeprefix(data.FORCE) if forced else text",
     "text", test_replay_equals_rollout, {}),
    ("zoom_rollout:RolloutConfig.zoom_limit", 'self.style == "zoom" and self.zoom != "off"',
     'self.style == "zoom"', test_zoom_forbidden, dict(options=dict(zoom="off"))),
    ("zoom_rollout:replay", "can_zoom and texts[0].startswith(data.FORCE)",
     "False", test_zoom_forbidden, dict(options=dict(max_zooms=0))),
    ("zoom_rollout:replay", "can_zoom and k == max_zooms and text.startswith(data.FORCE)",
     "can_zoom and k == max_zooms",
     test_a_turn_is_forced_only_if_its_text_says_so, {}),
    ("zoom_rollout:replay", "zooms_left == 1 and not next_text.startswith(data.FORCE)",
     "False", test_a_turn_is_forced_only_if_its_text_says_so, {}),
    ("zoom_rollout:RolloutConfig.zoom_limit", 'self.style == "zoom" and self.zoom != "off"',
     'self.zoom != "off"', test_single_turn_styles, dict(style="think")),
    ("zoom_rollout:crop", "if black: source = Image.new('RGB', source.size)",
     "pass", test_black_crops, {}),
    ("zoom_rollout:crop", 'crop_from == "seen"', 'crop_from != "seen"', test_crop_from_seen, {}),
    ("zoom_rollout:window_start", "min(start, side - length)",
     "start", test_crop_window, dict(size=(500, 337))),
    ("zoom_rollout:window_start", "round(center - length / 2)",
     "round(center)", test_crop_window, dict(size=(448, 448))),
    ("zoom_rollout:crop", "window_start(y, height, source.height)",
     "window_start(x, height, source.height)", test_crop_window, dict(size=(448, 448))),
    ("zoom_rollout:crop", "min(vlm.spec.window, source.height)",
     "vlm.spec.window", test_crop_window, dict(size=(60, 40))),
    ("zoom_rollout:crop", "fed_length(vlm, height)",
     "fed_length(vlm, width)", test_crop_window, dict(size=(5, 700))),
    ("zoom_rollout:read_call", "type(number) is not int or abs(number) >= 1e6",
     "type(number) is not int",
     test_read_call, dict(text=data.tool_call("9" * 400, 4), point=None)),
    ("zoom_rollout:sample_tokens", "temperature or 1.0",
     "1.0", test_sample_tokens, dict(temperature=0.5)),
    ("zoom_rollout:sample_tokens", "torch.searchsorted(total, level, right=True)",
     "torch.searchsorted(total, level)", test_sample_tokens, dict(temperature=1.0)),
    ("zoom_rollout:sample_tokens", "temperature == 0", "temperature < 0", test_greedy, {}),
    (ROLLOUT, "torch.Generator().manual_seed(config.seed)",
     "torch.Generator().manual_seed(0)", test_seed, {}),
    ("zoom_rollout:naive_work", "mask[t] and not mask[t - 1]", "mask[t]", test_work, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, models, monkeypatch):
    """Bug: a test that no bug can turn red."""
    vlm = models["qwen2.5"]
    check_mutation(target, old, new, test, arguments, {
        "vlm": lambda: vlm, "story": lambda: make_story(vlm), "monkeypatch": lambda: monkeypatch})
