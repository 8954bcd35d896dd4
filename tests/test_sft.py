"""
The warm start: what the oracle writes, traces in files, what is learned of a trace, the gradient of
fine-tuning against one written out by hand, that the seed decides. At the end MUTATIONS puts bugs
into the code, one at a time, and requires the named test to fail.
"""
import copy, json, random, re, subprocess, sys
from dataclasses import replace
from unittest import mock

import pytest
import torch

import data, evaluate, model, rewards, train_sft, zoom_rollout
from appendix import chains, prefix, trace_tools
from conftest import ROOT, check_mutation, close, names
from zoom_rollout import Trace

ASKED = data.toy("search", "train", 2, "search tests")
A, B = (10, 10), (40, 10)

@pytest.fixture(scope="module")
def vlm(models):
    return models["qwen2.5"]

def traces(vlm, n=6, task="search", seed=0, max_zooms=3):
    rng = random.Random(seed)
    return [Trace(s, train_sft.oracle(vlm, s, rng, max_zooms))
            for s in data.toy(task, "train", n, seed)]

def replayed(vlm, **more):
    return [zoom_rollout.replay(vlm, t.sample, t.turns) for t in traces(vlm, **more)]

# -----------------------------------------------------------------------------
# the oracle

def test_oracle_of_search(vlm):
    """Claim: its form is right and its aim is not. Every crop shows the object that the turn names,
    which never comes twice; what is said of a crop is true; it stops at the right object, and often
    at a wrong one; forced answers come after max_zooms."""
    stopped_at, answers, lengths = [], [], []
    for s, turns in ((t.sample, t.turns) for t in traces(vlm, 80, max_zooms=2)):
        e = zoom_rollout.replay(vlm, s, turns, max_zooms=2)
        assert (e.finish_reason == "answer" and len(e.turns) == len(turns)
                and [t.text for t in e.turns] == turns)
        objects = {o["name"]: o for o in s.meta["scenes"][0]["objects"]}
        looks, named = [t for t in e.turns if "<tool_call>" in t.text], []
        for k, t in enumerate(looks):
            named.append(re.search(r"The (\w+ \w+) may be at", t.text)[1])
            (x1, y1, x2, y2), (x, y) = t.crop, objects[named[-1]]["center"]
            assert x1 <= x <= x2 and y1 <= y <= y2 and t.error is None
            said = re.search(r"This is the (\w+ \w+), (\w+)[.,]", e.turns[k + 1].text)
            assert (said is None and e.turns[k + 1].forced
                    or said.groups() == (named[-1], objects[named[-1]]["pattern"]))
        assert (len(set(named)) == len(named) <= 2
                and s.meta["scenes"][0]["objects"][0]["name"] not in named[:-1])
        assert e.turns[-1].forced == (len(looks) == 2 or turns[0].startswith(data.FORCE))
        said = rewards.parse_answer(e.text, "choice")
        assert said in s.options and (not named or said == objects[named[-1]]["pattern"])
        stopped_at.append(named and named[-1] == s.meta["scenes"][0]["objects"][0]["name"])
        answers.append(said == s.options[s.answer])
        lengths.append(len(looks))
    # gave up at a wrong object
    assert sum(n == 1 and not right for n, right in zip(lengths, stopped_at)) > 10
    assert (set(lengths) == {0, 1, 2}
            and 0.2 < sum(map(bool, stopped_at)) / 80 < 0.7
            and 0.25 < sum(answers) / 80 < 0.8)

@pytest.mark.parametrize("task", ["point", "relation", "boxes", "find", "video", "count"])
def test_oracle_of_the_other_tasks(vlm, task):
    """Claim: all in the recipe's form, some wrong on purpose."""
    recipe = data.TASK_RECIPES[task]
    episodes = [zoom_rollout.replay(vlm, t.sample, t.turns, data.PROMPT_STYLES[recipe])
                for t in traces(vlm, 60, task)]
    parts = [rewards.score(e.sample, e.text, e.turns, recipe, e.frames) for e in episodes]
    assert (all(p["format"] == 1 for p in parts)
            and all(e.finish_reason == "answer" for e in episodes))
    assert 0.5 < sum(map(evaluate.is_right, parts)) / 60 < 1

# -----------------------------------------------------------------------------
# traces in files

def test_traces_belong_to_their_questions(tmp_path):
    samples = [data.Sample(str(i), [], f"q{i}", "text") for i in range(4)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"id": i, "turns": [f"turn {i}"]}) + "\n"
                            for i in (2, "0", 2)))
    got = train_sft.read_traces(str(path), samples)
    assert [(t.sample.id, t.turns) for t in got] == [
        ("2", ["turn 2"]), ("0", ["turn 0"]), ("2", ["turn 2"])]
    path.write_text('{"id": "7", "turns": ["x"]}\n')
    with pytest.raises(data.DataError, match="line 1: id '7'"):
        train_sft.read_traces(str(path), samples)

def test_toy_questions_come_back_by_id(tmp_path):
    """Claim: a file of traces is enough: the toy questions that it is about are drawn again, pixel
    for pixel."""
    samples = data.toy("search", "train", 3, "sft0/7", "easy")
    f = tmp_path / "t.jsonl"
    write = lambda *rows: f.write_text("".join(json.dumps(r) + "\n" for r in rows))
    write(*({"id": s.id, "question": s.question, "turns": ["x"]}
            for s in (samples[2], samples[0])))
    got = [t.sample for t in train_sft.read_traces(str(f), None, "easy")]
    assert ([s.id for s in got] == [samples[2].id, samples[0].id]
            and got[0].images[0].tobytes() == samples[2].images[0].tobytes())
    write({"id": samples[2].id, "question": "What is the pattern of the pink egg?",
           "turns": ["x"]})
    with pytest.raises(data.DataError, match="line 1: asks .*difficulty"):
        train_sft.read_traces(str(f), None, "easy")
    for name in ("q1", "search/train/x", "dance/train/0/1", None):
        write({"id": name, "turns": ["x"]})
        with pytest.raises(data.DataError, match="line 1: id .*--data"):
            train_sft.read_traces(str(f), None, "easy")

def test_written_traces_are_read_again(vlm, tmp_path):
    """Claim: traces.jsonl of a run is a file that --traces takes."""
    made, path = traces(vlm, 4), str(tmp_path / "traces.jsonl")
    train_sft.write_traces(path, made)
    assert ([(t.sample.id, t.turns) for t in train_sft.read_traces(path, [])]
            == [(t.sample.id, t.turns) for t in made])
    train_sft.write_traces(path, [replace(made[0], kind="direct")])
    with open(path) as f:
        assert list(json.loads(f.read())) == ["id", "question", "options", "kind", "turns"]

def test_retarget():
    """Claim: SFT-direct has the answer alone, the ungrounded chain no coordinate and no call."""
    turns = chains.to_turns([["The red circle may be at (10, 10).", A],
                             ["This is the red circle, lined, at (11, 10)", None]],
                            "lined", "zoom")
    retarget = lambda turns, target: trace_tools.retarget(
        Trace(ASKED[0], turns, "direct"), target)
    assert retarget(turns, "full").turns == turns
    assert retarget(turns, "answer") == Trace(ASKED[0], ["<answer> lined </answer>"], "direct")
    assert retarget(turns, "ungrounded").turns == [
        "<think> The red circle. This is the red circle, lined. </think>\n"
        "<answer> lined </answer>"]
    forced = [turns[0], f"{data.FORCE} lined </answer>"]
    assert retarget(forced, "answer").turns == ["<answer> lined </answer>"]

def test_a_path_is_a_tree_that_is_one_path(vlm, monkeypatch):
    """Claim: --traces path searches with one simulation, one child, one rollout, in the same form;
    nothing else differs."""
    from appendix import tree_search
    asked = []
    monkeypatch.setattr(tree_search, "search_traces",
                        lambda vlm, cfg, *_: asked.append(cfg) or ([], {}))
    plain = train_sft.Config(seed=3)
    for source in ("path", "mcts"):
        train_sft.find_traces(vlm, replace(plain, traces=source), "think")
    assert asked == [
        replace(plain, traces="mcts", simulations=1, children=1, tries=1, rollouts=1), plain]

def test_traces_are_shown(capsys):
    """Claim: points are numbered, the same point by the same number."""
    turns = chains.to_turns([["At (10, 10).", A], ["At (40, 10).", B]], "lined", "zoom")
    trace_tools.show_traces([Trace(ASKED[0], turns, "direct")])
    out = capsys.readouterr().out
    assert ("At (10, 10)[1]." in out and '"coordinate": [10, 10]}' in out
            and "At (40, 10)[2]." in out
            and ASKED[0].question in out and "(right: " in out)

def test_one_question_in_twenty_is_held_out():
    """Claim: the last ones, with all their traces; of a single question, none."""
    of = lambda *ids: [Trace(data.Sample(str(i), [], "?", "text"), ["x"]) for i in ids]
    held = lambda traces: {t.sample.id for t in train_sft.hold_out_traces(traces)[1]}
    assert (held(of(1, 1, 1)) == set() and held(of(1, 2, 2, 1)) == {"2"}
            and held(of(*range(40), *range(40))) == {"38", "39"})
    learned, out = train_sft.hold_out_traces(of(1, 2, 2, 1))
    assert [t.sample.id for t in learned] == ["1", "1"] and len(out) == 2

# -----------------------------------------------------------------------------
# fine-tuning

def flat(vlm):
    """The gradients as one vector, cleared."""
    out = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                     for p in vlm.parameters()])
    for p in vlm.model.parameters():
        p.grad = None
    return out

class Recorder:
    """In the optimizer's place: keeps gradients and learning rates, and changes nothing."""
    def __init__(self, vlm):
        self.vlm, self.grads, self.lrs = vlm, [], []

    def step(self, lr, clip=1.0):
        self.lrs.append(lr)
        self.grads.append(flat(self.vlm))
        return self.grads[-1].norm().item()

@pytest.mark.parametrize("alone", [False, True])
def test_gradient_of_the_warm_start(vlm, alone):
    """Bug: prompts or observations are learned; tokens are averaged per micro-batch; the order is
    the file's in every epoch."""
    episodes, made = replayed(vlm), []
    def split(self, chosen, max_tokens=0):
        made.append([id(e) for e in chosen])
        return [[e] for e in chosen] if alone else [chosen]
    recorder = Recorder(vlm)
    flat(vlm)
    with (mock.patch.object(train_sft, "AdamW", lambda *_, **__: recorder),
          mock.patch.object(type(vlm), "micro_batches", split)):
        losses = train_sft.finetune(vlm, episodes, train_sft.Config(lr=1.0, epochs=2, batch=6),
                                    progress=False)
    logprobs, _, mask = vlm.logprobs(episodes)
    loss = -logprobs.sum() / sum(sum(e.completion_mask) for e in episodes)
    loss.backward()
    close(recorder.grads[0], flat(vlm), 1e-3)
    # nothing was updated: the same loss again
    assert losses == pytest.approx([loss.item()] * 2, rel=1e-4)
    assert set(made[0]) == set(made[1]) == set(map(id, episodes)) and made[0] != made[1]
    assert recorder.lrs == pytest.approx([1 / 1.2, 0.5])

def test_the_warm_start_learns(vlm):
    """Claim: a few traces are learned by heart; the vision tower stays as it is; a batch that does
    not divide them loses none; what was seen of a batch is not kept."""
    own = prefix.PrefixVLM(copy.deepcopy(vlm.model), vlm.tokenizer, vlm.processor, vlm.name,
                           vlm.spec)
    tower = copy.deepcopy(own.model.model.visual.state_dict())
    episodes = replayed(own, n=5)
    before = train_sft.held_out_loss(own, episodes)
    losses = train_sft.finetune(own, episodes, train_sft.Config(lr=2e-3, epochs=10, batch=2),
                                progress=False)
    assert all(v.features is None for e in episodes for v in e.views)
    assert len(losses) == 10 * 3 and train_sft.held_out_loss(own, episodes) < 0.5 * before
    assert all(torch.equal(v, tower[k]) for k, v in own.model.model.visual.state_dict().items())
    logprobs, _, mask = vlm.logprobs(episodes)
    assert train_sft.held_out_loss(vlm, episodes) == pytest.approx(
        -logprobs.sum().item() / mask.sum().item(), rel=1e-4)

def test_plain_learns_the_same(vlm):
    """Claim: --plain changes memory and time, not what is learned."""
    losses = []
    for vlm_class in (model.VLM, prefix.PrefixVLM):
        own = vlm_class(copy.deepcopy(vlm.model), vlm.tokenizer, vlm.processor, vlm.name, vlm.spec)
        losses.append(train_sft.finetune(own, replayed(own, n=5),
                                         train_sft.Config(lr=1e-3, epochs=2, batch=2),
                                         progress=False))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

def test_warm_start_is_decided_by_its_seed(vlm):
    """Claim: the same seed draws the same traces; they are scenes of the train split, and episodes
    of the style that RL will use."""
    with mock.patch.object(train_sft, "finetune", return_value=[0.0]) as finetune:
        found = [
            train_sft.warm_start(
                vlm, train_sft.Config(traces="oracle", n=16, seed=seed, max_zooms=2), "zoom")[1]
            for seed in (0, 0, 1)]
    text = lambda found: [(t.sample.id, t.turns) for t in found]
    assert (text(found[0]) == text(found[1]) != text(found[2])
            and all("/train/" in t.sample.id for t in found[0]))
    episodes = finetune.call_args_list[0].args[1]
    expected = [zoom_rollout.replay(vlm, t.sample, t.turns, "zoom", 2) for t in found[0]]
    assert ([e.ids for e in episodes] == [e.ids for e in expected]
            and [e.completion_mask for e in episodes] == [e.completion_mask for e in expected])

@pytest.mark.slow
def test_the_chapter_stands_alone():
    """Claim: with --plain and the oracle the warm start needs the chapters and the ground floor
    only."""
    code = (
        "import sys, data, train_sft; from appendix import prefix; "
        "vlm = prefix.load_vlm('tiny', plain=True, quiet=True);"
        "train_sft.warm_start(vlm, train_sft.Config(traces='oracle', n=2, plain=True), 'zoom');"
        "print([name for name in sys.modules if name.startswith('appendix.')])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                         check=True).stdout
    assert not set(re.findall(r"appendix\.(\w+)", out)) & {
        "tree_search", "tree_sampler", "chains", "teacher", "endpoint", "tiny", "trace_tools",
        "trees_page"}

# -----------------------------------------------------------------------------
# mutations

MUTATIONS = [  # where, old code, new code, the test that must fail, its arguments
    ("train_sft:backward", "sum(sum(e.completion_mask) for e in batch)",
     "sum(len(e.ids) for e in batch)", test_gradient_of_the_warm_start, dict(alone=False)),
    ("train_sft:backward", "(-logprobs.sum() / tokens).backward()",
     "(-logprobs.sum() / (logprobs != 0).sum()).backward()",
     test_gradient_of_the_warm_start, dict(alone=True)),
    ("train_sft:finetune", "rng.sample(episodes, len(episodes))",
     "list(episodes)", test_gradient_of_the_warm_start, dict(alone=False)),
    ("train_sft:schedule", "0.5 * (1 + math.cos(math.pi * step / steps))",
     "1.0", test_gradient_of_the_warm_start, dict(alone=False)),
    ("train_sft:finetune", "range(0, len(order), cfg.batch)",
     "range(0, len(order) - cfg.batch + 1, cfg.batch)", test_the_warm_start_learns, {}),
    ("train_sft:finetune", "view.drop_features()", "pass", test_the_warm_start_learns, {}),
    ("train_sft:held_out_loss", "tokens += mask.sum().item()",
     "tokens += len(micro_batch)", test_the_warm_start_learns, {}),
    ("train_sft:oracle_of_search",
     "o is objects[0] or len(turns) == len(order) or rng.random() < 0.6",
     "len(turns) == len(order) or rng.random() < 0.6", test_oracle_of_search, {}),
    ("train_sft:oracle_of_search",
     "o is objects[0] or len(turns) == len(order) or rng.random() < 0.6",
     "o is objects[0] or len(turns) == len(order)", test_oracle_of_search, {}),
    ("train_sft:oracle_of_search", "rng.sample(objects, len(objects))",
     "rng.choices(objects, k=len(objects))", test_oracle_of_search, {}),
    ("train_sft:oracle_of_search", """turns.append(f"{opening} {o['pattern']} </answer>")""",
     """turns.append(f"{opening} {objects[0]['pattern']} </answer>")""", test_oracle_of_search, {}),
    ("train_sft:oracle_of_point", "rng.choice(objects) if rng.random() < GUESSES else objects[0]",
     "objects[0]", test_oracle_of_the_other_tasks, dict(task="point")),
    ("train_sft:oracle_of_relation", "rng.choice(sample.options)",
     "sample.options[sample.answer]", test_oracle_of_the_other_tasks, dict(task="relation")),
    ("train_sft:read_traces", 'by_id.get(str(row.get("id")))',
     "samples[len(traces)]", test_traces_belong_to_their_questions, {}),
    ("train_sft:read_traces", 'row.get("question", sample.question) != sample.question',
     "False", test_toy_questions_come_back_by_id, {}),
    ("train_sft:find_traces", 'mixture.toy_questions(cfg, "train", cfg.n, f"sft{cfg.seed}", side)',
     'mixture.toy_questions(cfg, "test", cfg.n, f"sft{cfg.seed}", side)',
     test_warm_start_is_decided_by_its_seed, {}),
    ("train_sft:replay_all", "zoom_rollout.replay(vlm, t.sample, t.turns, style, max_zooms)",
     "zoom_rollout.replay(vlm, t.sample, t.turns, style)",
     test_warm_start_is_decided_by_its_seed, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, vlm, tmp_path_factory):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {
        "vlm": lambda: vlm, "tmp_path": lambda: tmp_path_factory.mktemp("mutant")})
