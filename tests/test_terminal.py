"""What a run says in the terminal: the plan, one question before and after, what to try next."""
import shlex
import sys
import types

import pytest

import data
import evaluate
import train_rl
import zoom_rollout
from appendix import run, speedrun, terminal

def episodes_that_say(vlm, *answers):
    """One zoom into a place, then an answer, for one question per answer; "right" and "wrong" are
    replaced by options."""
    out = []
    for s, answer in zip(data.toy("search", "test", len(answers)), answers):
        option = s.options[s.answer if answer == "right" else s.answer - 1]
        texts = [f"<think> The red square may be at (20, 30). </think>\n{data.tool_call(20, 30)}",
                 f"<think> This is it. </think>\n<answer> {option} </answer>"]
        e = zoom_rollout.replay(vlm, s, texts)
        evaluate.finish_episode(vlm, e, zoom_rollout.RolloutConfig(),
                                evaluate.RunOptions(recipe="vigorl-zoom"), False)
        out.append(e)
    return out

def test_the_same_question_before_and_after(vlm, capsys):
    """Bug: an example that was right already, or another question after RL;
    a crop or the answer is missing."""
    before = episodes_that_say(vlm, "right", "wrong", "wrong")
    sample_id = terminal.wrong_one(before)
    assert sample_id == before[1].sample.id
    terminal.print_example(before, "before RL", sample_id)
    said = capsys.readouterr().out
    s = before[1].sample
    assert f"before RL: {s.question} (right: {s.options[s.answer]})" in said and "  wrong\n" in said
    assert ("The red square may be at (20, 30)" in said and "zoom into (20, 30)" in said
            and "This is it." in said)
    assert (f"answer: {s.options[s.answer - 1]}\n" in said and "<" not in said
            and max(len(line) for line in said.splitlines()) < 100)
    terminal.print_example(episodes_that_say(vlm, "right", "right", "wrong"), "after RL", sample_id)
    said = capsys.readouterr().out
    assert s.question in said and "  right\n" in said
    before[1].turns[0].error = "too far"
    assert terminal.action_text(before[1].turns[0]) == "a call that was refused: too far"
    before[1].turns[1].text = "<think> This is"
    assert terminal.action_text(before[1].turns[1]) == "no answer"
    terminal.print_example(before, "after RL", "no such question")
    assert not capsys.readouterr().out
    assert terminal.wrong_one(before[:1]) == before[0].sample.id and terminal.wrong_one([]) is None

@pytest.mark.parametrize("flags, says, does_not", [
    ({}, ["find 30 traces by tree search", "60 steps", "16 prompts x 8 episodes"], []),
    ({"traces": "oracle", "steps": 7}, ["traces (oracle)", "7 steps"], ["tree search"]),
    ({"traces": ""}, ["60 steps"], ["traces"])])
def test_plan(capsys, flags, says, does_not):
    terminal.print_plan(train_rl.Config(**flags))
    said = " ".join(capsys.readouterr().out.split())
    assert all(part in said for part in says) and not any(part in said for part in does_not), said

def test_next_commands_are_valid(capsys):
    """Bug: a command that the scripts refuse, or that repeats the run."""
    for task in data.TASKS:
        terminal.print_next(train_rl.Config(name="a b", task=task))
        commands = [shlex.split(line)
                    for line in capsys.readouterr().out.splitlines()
                    if line.startswith("  python")]
        scripts = {"evaluate.py": evaluate, "train_rl.py": train_rl}
        seen = set()
        for _, script, *args in commands:
            if script in scripts:
                seen.add(script)
                cfg = run.parse_config(scripts[script].Config, args)
                assert getattr(cfg, "task", "") != task or script == "evaluate.py"
        assert seen == set(scripts)
    capsys.readouterr()
    terminal.print_next(train_rl.Config(model="qwen2.5-vl-3b"))
    assert not capsys.readouterr().out

# -----------------------------------------------------------------------------
# the speedrun

@pytest.fixture
def fake_run(monkeypatch):
    """A run whose held-out accuracy is 0.5 + 0.1 per measurement; every part of it takes a second
    of a false clock."""
    now, calls = [0.0], []
    monkeypatch.setattr(speedrun.time, "perf_counter", lambda: now[0])

    def does(name):
        def part(*args, **more):
            now[0] += 1
            calls.append(name)
            if name == "measure":
                summary = {"accuracy": 0.4 + 0.1 * calls.count("measure")}
                return {"on": types.SimpleNamespace(summary=summary)}
            return types.SimpleNamespace(toy_side=448, parameters=lambda: [])
        return part
    for module, names in ((speedrun.rl_run, ("load_policy", "fine_tune_on_traces", "measure")),
                          (train_rl, ("train_step",)),
                          (speedrun, ("AdamW",))):
        for name in names:
            monkeypatch.setattr(module, name, does(name))
    monkeypatch.setattr(speedrun.rl_run, "split", lambda *args: ([], []))
    return calls

def test_the_clock_runs_while_something_is_learned(fake_run):
    """Bug: seconds of loading or measuring count; a run that never gets there is given a time;
    steps past the mark."""
    seconds, steps, accuracy = speedrun.speedrun(train_rl.Config(steps=60), target=0.69, every=5)
    assert steps == 10 and abs(accuracy - 0.7) < 1e-9 and fake_run.count("train_step") == 10
    assert seconds == 2 + 10                    # warm start, optimizer; ten steps
    fake_run.clear()
    assert speedrun.speedrun(train_rl.Config(steps=8), target=0.99, every=4)[:2] == (None, 8)
    assert fake_run.count("train_step") == 8 and fake_run.count("measure") == 3

def test_the_settings_are_those_of_a_run(monkeypatch, fake_run):
    """Bug: the recipe stayed empty, as on the command line, and the first measurement failed."""
    asked = []
    monkeypatch.setattr(speedrun, "speedrun",
                        lambda cfg, *flags: asked.append(cfg) or (1.0, 5, 0.9))
    monkeypatch.setattr(sys, "argv", ["speedrun", "--seeds", "3", "--task", "relation"])
    speedrun.main()
    assert [(cfg.recipe, cfg.seed) for cfg in asked] == [("vigorl", 3)]

@pytest.mark.parametrize("flags, says", [
    ("--target 1.5", "--target"), ("--every 0", "--every"), ("--seeds 1,1", "--seeds"),
    ("--kl-coef 0.1", "--kl-coef"), ("--lr fast", "--lr")])
def test_bad_flags_of_the_speedrun(monkeypatch, capsys, flags, says):
    monkeypatch.setattr(sys, "argv", ["speedrun", *flags.split()])
    with pytest.raises(SystemExit):
        with run.exit_on_error():
            speedrun.main()
    assert says in capsys.readouterr().err
