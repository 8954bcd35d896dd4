"""The scripts as a user runs them: what a run leaves behind, that a run goes on where it stopped
bit for bit, and that wrong use is answered in one line. Most commands run in this process (a start
costs seconds), with the script's own `if __name__` block.

    python -m pytest tests/test_scripts.py            # about a minute
    python -m pytest tests/test_scripts.py --slow     # and the claim of the README, for three
                                                        seeds: minutes each
"""
import json, os, pathlib, random, re, runpy, shlex, shutil, signal, subprocess, sys, time

import pytest
import torch
from safetensors.torch import load_file, save_file

import data, evaluate, model, train_rl, train_sft, zoom_rollout
from appendix import metrics, prefix, recipes, rl_options, rl_run, tiny
from appendix import run as files_and_folders
from conftest import ROOT

SMALL = ("--num-prompts 4 --blind-prompts 1 --group-size 4 --max-new-tokens 40 --sft-n 16 "
         "--eval-n 4 --difficulty hard --traces oracle")
STEP = re.compile(r"^step +\d", re.M)

# -----------------------------------------------------------------------------
# running

def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}

def start(command, folder, **env):
    """The script as a process of its own."""
    name, *args = shlex.split(command)
    return subprocess.Popen([sys.executable, os.path.join(ROOT, name), *args], cwd=folder,
                            env=environment(**env), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def finish(process, timeout=900):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err

def until(process, text):
    """Read its lines up to the one that begins with `text`."""
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(text):
            return
    pytest.fail(f"no line {text!r} in\n{seen}{process.stderr.read()}")

@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """script("train_rl.py --steps 2") -> (status, stdout, stderr), in this process; so is
    script("-m appendix.tiny"). A traceback is the test's own failure."""
    monkeypatch.chdir(tmp_path)

    def run(command):
        name, *args = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [name, *args])
        capsys.readouterr()
        before, status = signal.getsignal(signal.SIGINT), 0
        try:
            if name == "-m":
                monkeypatch.setattr(sys, "argv", args)
                runpy.run_module(args[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(os.path.join(ROOT, name), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
            if isinstance(status, str):                     # what the interpreter does with a text
                print(status, file=sys.stderr)
                status = 1
        except KeyboardInterrupt:
            pytest.fail("a KeyboardInterrupt gets through: the user sees a traceback")
        finally:
            signal.signal(signal.SIGINT, before)
        return status, *capsys.readouterr()
    return run

def works(result):
    status, out, err = result
    assert status == 0 and "error" not in err and "Traceback" not in err, err
    return out

def refused(result, *said):
    """Status 2, one line that says all of `said`, and no step taken."""
    status, out, err = result
    lines = err.strip().splitlines()
    assert status == 2 and lines and "Traceback" not in err, err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(s in lines[-1] for s in said), f"{lines[-1]}\nshould say {said}"
    assert not STEP.search(out), "training had begun"
    return lines[-1]

# -----------------------------------------------------------------------------
# files

def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f] if str(path).endswith(".jsonl") else json.load(f)

def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """questions.jsonl with its images, traces.jsonl, and much that is broken: rows, images, traces,
    model folders."""
    folder = tmp_path_factory.mktemp("files")
    vlm, rng = model.load("tiny", quiet=True), random.Random(0)
    samples = data.toy("search", "train", 12, "scripts", "easy")
    for i, s in enumerate(samples):
        s.id = f"q{i}"
    data.write_jsonl(str(folder / "questions.jsonl"), samples)
    write(folder / "traces.jsonl", *({"id": s.id, "turns": train_sft.oracle(vlm, s, rng, 3)}
                                     for s in samples for _ in range(4)))

    good = read(folder / "questions.jsonl")[0]
    (folder / "text.png").write_text("not an image")
    (folder / "half.png").write_bytes((folder / "questions_0_0.png").read_bytes()[:600])
    for name, row in BAD_ROWS.items():
        row = row[0]
        write(folder / f"{name}.jsonl", {**good, "id": "first"},
              row if isinstance(row, str) else {**good, **row})
    for name, (row, _) in BAD_TRACES.items():
        write(folder / f"{name}.jsonl",
              {"id": "q0", "turns": ["<think> x </think>\n<answer> lined </answer>"]}, row)
    write(folder / "empty.jsonl")
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00{}")

    tiny = model.MODELS["tiny"].path
    for name in BAD_MODELS:
        shutil.copytree(tiny, folder / name)
    (folder / "no-card" / "vlm.json").unlink()
    (folder / "broken-card" / "vlm.json").write_text('{"name": "tiny", ')
    write(folder / "short-card" / "vlm.json", {"name": "tiny"})
    (folder / "no-weights" / "model.safetensors").unlink()
    half = (folder / "half-weights" / "model.safetensors")
    half.write_bytes(half.read_bytes()[:100_000])
    write(folder / "bert" / "config.json",
          {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32})
    weights = load_file(os.path.join(tiny, "model.safetensors"))
    layer = next(k for k in weights if "layers.1.mlp.up_proj" in k)
    save_file({k: v for k, v in weights.items() if k != layer},
              folder / "a-layer-less" / "model.safetensors", {"format": "pt"})
    save_file({**weights, layer: weights[layer][:-8].clone()},
              folder / "other-shape" / "model.safetensors", {"format": "pt"})
    return folder

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of six steps, in a process of its own -> (its folder, stdout)."""
    folder = tmp_path_factory.mktemp("whole")
    status, out, err = finish(start(f"train_rl.py {SMALL} --steps 6 --save-every 4", folder))
    assert status == 0, err
    return folder / "runs" / "rl", out

# -----------------------------------------------------------------------------
# what a run leaves behind

def test_a_run_leaves_its_record(whole):
    """Claim: everything that the README and the docstring promise lies in runs/NAME, and the files
    agree with each other."""
    run, out = whole
    assert {p.name for p in run.iterdir()} == {
        "config.json", "metrics.jsonl", "episodes.jsonl", "report.html", "summary.json",
        "held_out.jsonl", "checkpoint"}
    summary, rows, episodes = (read(run / name)
                               for name in ("summary.json", "metrics.jsonl", "episodes.jsonl"))
    assert {"seconds", "accuracy_before", "accuracy_after", "accuracy_no_zoom",
            "accuracy_black_crop", "chance", "zooms_per_episode", "logp_gap_max"} <= set(summary)
    assert (all(0 <= summary[k] <= 1 for k in summary if k.startswith("accuracy"))
            and 0.25 <= summary["chance"] <= 1
            and summary["seconds"] > 0)
    assert (summary["logp_gap_max"] == max(r["logp_gap_max"] for r in rows) < 1e-3
            and any(r["logp_gap_max"] > 0 for r in rows))
    assert ([r["step"] for r in rows] == list(range(6))
            and [e["step"] for e in episodes] == [i // 2 for i in range(12)])
    # the best, the worst
    assert all(a["reward_components"]["reward"] >= b["reward_components"]["reward"]
               for a, b in zip(episodes[::2], episodes[1::2]))
    assert len(STEP.findall(out)) == 6 and out.startswith("settings: ") and "num_prompts = 4" in out
    assert f"reward {rows[0]['reward']:.3f}" in out and " ent " in out and "min left" in out
    config = read(run / "config.json")
    assert ((config["num_prompts"], config["lr"], config["recipe"])
            == (4, train_rl.Config.lr, "vigorl-zoom"))
    report = (run / "report.html").read_text()
    assert "before RL" in report and report.count("after RL") >= 4 and "<polyline" in report
    (latest,) = re.findall(r"<h2>one group of step (\d)</h2>", report)
    assert ("<h3>step 1</h3>" in report and f"<h3>step {latest}</h3>" in report
            and 1 < report.count('class="lesson"') <= 2)
    # with what it was worth, token by token
    group = report.split(f"<h2>one group of step {latest}</h2>")[1].split("</section>")[0]
    assert (group.count("<article") == config["group_size"]
            and group.count("each with advantage") >= 2 and "<s>" in group)
    assert f"{summary['accuracy_after']:.1%}" in out and f"{summary['accuracy_no_zoom']:.1%}" in out

def test_a_line_fits_the_screen(whole):
    """Claim: what a step prints has at most 120 columns, even of a large model in a long run."""
    assert all(len(line) <= 120 for line in whole[1].splitlines() if STEP.match(line))
    row = {**read(whole[0] / "metrics.jsonl")[-1], "step": 499, "length": 4321.0,
           "frac_zero_std": 1.0, "grad_norm": 123.45, "skipped": 0, "seconds": 1234.5}
    assert len(metrics.log_line(row, 999, 1234.5)) <= 120

def test_a_checkpoint_is_a_model(whole, script):
    """Claim: runs/rl/checkpoint is read by evaluate.py and, warm start off, trained on by
    train_rl.py."""
    run, _ = whole
    out = works(script(f"evaluate.py --model {run}/checkpoint --zoom all --temperature 1 --n 4 "
                       "--max-new-tokens 40 --difficulty easy --out out"))
    assert all(mode in out for mode in evaluate.MODES.values())
    assert (set(read("out/summary.json")["modes"]) == set(evaluate.MODES)
            and len(read("out/episodes.jsonl")) == 16)
    works(script(f"train_rl.py {SMALL} --model {run}/checkpoint --traces '' --steps 1 --name more"))
    assert len(read("runs/more/metrics.jsonl")) == 1 and os.path.exists("runs/more/report.html")

# What the chapters stand on. Everything else in the appendix may be deleted, with --plain and
# traces from the oracle.
GROUND_FLOOR = [
    "__init__", "motion", "mixture", "terminal", "run", "ranks", "optimizer", "memory", "files",
    "prefix", "graphs", "metrics", "recipes", "rl_options", "rl_run", "rows", "split", "faults",
    "parts", "running", "attention", "vision", "tower", "weights", "evaluation_run",
    "episode_rows", "averages", "evidence"]

@pytest.mark.slow
@pytest.mark.parametrize("command", [
    "train_rl.py --num-prompts 4 --blind-prompts 1 --group-size 4 --sft-n 16 --eval-n 4 --steps 2",
    "train_sft.py --n 16", "evaluate.py --n 4"], ids=["rl", "sft", "evaluate"])
def test_the_chapters_stand_alone(tmp_path, command):
    """Claim: with --plain the chapters need of the appendix its ground floor only. Bug: a chapter
    imports the rest at its top, or in a branch that no flag asked for."""
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), tmp_path)
    shutil.copytree(os.path.join(ROOT, "checkpoints"), tmp_path / "checkpoints")
    (tmp_path / "appendix").mkdir()
    for name in GROUND_FLOOR:
        shutil.copy(os.path.join(ROOT, "appendix", f"{name}.py"), tmp_path / "appendix")
    traces = "" if command.startswith("evaluate") else "--traces oracle"
    name, *flags = shlex.split(
        f"{command} --plain {traces} --max-new-tokens 40 --difficulty easy")
    done = subprocess.run([sys.executable, name, *flags], cwd=tmp_path,
                          env=environment(PYTHONPATH=""), text=True, capture_output=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    run = tmp_path / "runs" / {"train_rl.py": "rl", "train_sft.py": "sft",
                               "evaluate.py": "evaluate"}[name]
    summary = read(run / "summary.json")
    assert not (run / "report.html").exists()
    if name == "train_rl.py":
        assert (len(read(run / "metrics.jsonl")) == 2
                and {"accuracy_before", "accuracy_after"} <= set(summary))
    assert ((run / "checkpoint" / "model.safetensors").exists()
            or name == "evaluate.py" and summary["n"] == 4)

@pytest.mark.slow
@pytest.mark.parametrize("task", data.TASKS)
def test_every_toy_task(script, task):
    """Claim: two steps of each task run from the command line, with the recipe that suits the
    task."""
    out = works(script(f"train_rl.py --task {task} --steps 2 --num-prompts 8 --group-size 4 "
                       "--max-new-tokens 40 --eval-n 4 --sft-n 48 --sft-epochs 4 --sft-batch 4 "
                       "--sft-lr 2e-3 --name a"))
    summary, rows = read("runs/a/summary.json"), read("runs/a/metrics.jsonl")
    assert len(rows) == 2 and all(
        r["accuracy"] > 0 and r["grad_norm"] > 0 and r["logp_gap_max"] < 1e-3 for r in rows)
    least = {"search": 0.25, "relation": 0.5}.get(task, 0.0)
    assert least <= summary["chance"] <= (1 if least else 0)
    assert (("accuracy_no_zoom" in summary) == (task == "search")
            and ("iou" in rows[0]) == (data.TASK_RECIPES[task] == "univg-r1"))
    assert (read("runs/a/config.json")["recipe"] == data.TASK_RECIPES[task]
            and "held-out accuracy" in out)

def test_own_data(files, script):
    """Claim: --data trains on a file, after a warm start on traces for its rows; one row in ten is
    held out and never trained on."""
    out = works(script(f"train_rl.py {SMALL} --data {files}/questions.jsonl "
                       f"--traces {files}/traces.jsonl --steps 3"))
    # Bug: it learned from those of the held-out row
    assert ("warm start: 44 traces" in out
            and len(read("runs/rl/config.json")["held_out"]) == 1)
    held, asked = (read("runs/rl/summary.json")["n"],
                   {e["id"] for e in read("runs/rl/episodes.jsonl")})
    assert held == 1 and len(asked) >= 3 and len(read("runs/rl/metrics.jsonl")) == 3
    cfg = train_rl.Config(data="x", eval_n=4)
    rows = data.read_jsonl(f"{files}/questions.jsonl")
    test, train = rl_run.split(cfg, data.SIDE, rows)
    assert [s.id for s in test] == read("runs/rl/config.json")["held_out"]
    assert (len(test) == held
            and not {s.id for s in test} & ({s.id for s in train} | asked)
            and len(test) + len(train) == 12)

@pytest.mark.slow
def test_warm_start_by_itself(files, script):
    """Claim: train_sft.py fine-tunes on the oracle's traces or on a file's, keeps the traces, and
    evaluate.py reads the checkpoint."""
    works(script("train_sft.py --traces oracle --n 32 --name a"))
    summary, traces = read("runs/a/summary.json"), read("runs/a/traces.jsonl")
    assert (summary["traces"] == len(traces) == 32
            and 0 < summary["loss_last"] < 5 and 0 < summary["held_out_loss"] < 5)
    works(script(f"train_sft.py --data {files}/questions.jsonl --traces {files}/traces.jsonl "
                 "--epochs 2 --name b"))
    # one question of twelve, and its four traces, are held out
    assert read("runs/b/summary.json")["traces"] == 44
    held_out, = read("runs/b/config.json")["held_out"]
    told = [t["id"] for t in read(files / "traces.jsonl")]
    assert ([t["id"] for t in read("runs/b/traces.jsonl")] == [i for i in told if i != held_out]
            and "held_out_accuracy" in read("runs/b/summary.json"))
    works(script(f"evaluate.py --checkpoint runs/b/checkpoint --data {files}/questions.jsonl "
                 "--n 3 --max-new-tokens 40"))
    assert read("runs/evaluate/summary.json")["n"] == 3
    weights = [load_file(f"{folder}/model.safetensors")
               for folder in (model.MODELS["tiny"].path, "runs/a/checkpoint", "runs/b/checkpoint")]
    for k, base in weights[0].items():          # the tower is frozen, the rest has moved
        assert torch.equal(weights[1][k].float(), base.float()) == ("visual" in k), k
    assert any(not torch.equal(weights[1][k], weights[2][k]) for k in weights[1])

@pytest.mark.slow
def test_pretraining_makes_a_model(tmp_path, monkeypatch, capsys):
    """Claim: appendix.tiny writes a model folder with a card, into whatever --out names. Four steps
    teach nothing, but all is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(
        "tiny.py --steps 4 --second-steps 2 --third-steps 2 --out mine"))
    monkeypatch.setattr(tiny.skills, "measure",
                        lambda vlm, measure=tiny.skills.measure: measure(vlm, 4))
    tiny.main()
    vlm = model.load("mine")
    assert "python -m appendix.tiny" in (tmp_path / "mine" / "README.md").read_text()
    assert vlm.name == "tiny" and 5e5 < sum(p.numel() for p in vlm.model.parameters()) < 1.5e6
    weights = load_file("mine/model.safetensors")
    assert {v.dtype for v in weights.values()} == {torch.bfloat16}
    assert sorted(os.listdir()) == ["mine"]                 # nothing half written beside it

def test_data_commands(files, script):
    """Claim: draw, show and convert do what the README says; what convert writes, show reads."""
    works(script("data.py draw search 4 --out scenes --split train"))
    assert len([f for f in os.listdir("scenes") if f.endswith(".png")]) >= 4
    out = works(script("data.py show scenes/search.jsonl"))
    assert data.SYSTEM["zoom"] in out and "What is the pattern of the" in out and "4 rows" in out
    rows = [{"img_filename": "questions_0_0.png", "bbox": [10, 20, 30, 40],
             "instruction": "open it", "data_type": "icon"}]
    with open("web.json", "w") as f:
        json.dump(rows, f)
    works(script(f"data.py convert screenspot web.json out/web.jsonl --images {files}"))
    (row,) = read("out/web.jsonl")
    assert (row["targets"] == [{"image": 0, "box": [10, 20, 40, 60]}]
            and row["answer_type"] == "point")
    assert "open it" in works(script("data.py show out/web.jsonl"))
    write_predictions = [{"id": row["id"], "text": "<answer> (12, 22) </answer>"}]
    with open("texts.jsonl", "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in write_predictions)
    works(script("evaluate.py --data out/web.jsonl --predictions texts.jsonl --out out"))
    assert read("out/summary.json")["correct"] == 1

def test_shipped_weights():
    """Claim: checkpoints/tiny is at most 3 MB, about a million parameters, whole, and says how it
    was made."""
    folder = model.MODELS["tiny"].path
    sizes = {f: os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder)}
    assert (sum(sizes.values()) <= 3e6
            and not [f for f in sizes if f.endswith((".tmp", ".old", ".bin", ".pt", ".pkl"))])
    vlm = model.load("tiny", quiet=True)
    n = sum(p.numel() for p in vlm.model.parameters())
    card = open(os.path.join(folder, "README.md")).read()
    assert (0.7e6 < n < 1.5e6 and f"{n:,} parameters" in card
            and "python -m appendix.tiny" in card and f"of {len(vlm.tokenizer)} tokens" in card)

# -----------------------------------------------------------------------------
# stopping and going on

def weights_of(run):
    return {**load_file(f"{run}/checkpoint/model.safetensors"),
            **{f"optimizer {k}": v
               for k, v in load_file(f"{run}/checkpoint/optimizer.safetensors").items()}}

def same_run(a, b):
    """Bit for bit: weights, optimizer, the rows but for their times, the episodes, the summary."""
    a_weights, b_weights = weights_of(a), weights_of(b)
    assert a_weights.keys() == b_weights.keys() and len(a_weights) > 100
    assert not [k for k, v in a_weights.items() if not torch.equal(v, b_weights[k])]
    timeless = lambda row: {
        k: v for k, v in row.items()
        if "seconds" not in k and "per_s" not in k and "share_" not in k}
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert ([timeless(r) for r in read(f"{a}/{name}")]
                == [timeless(r) for r in read(f"{b}/{name}")]), name
    assert timeless(read(f"{a}/summary.json")) == timeless(read(f"{b}/summary.json"))

@pytest.mark.slow
def test_resume_after_a_kill(whole, tmp_path):
    """Bug: a run killed between two checkpoints goes on with the rows of the lost step counted
    twice, with other prompts, another learning rate, or an optimizer that forgot. The checkpoint is
    of step 4; the kill comes in step 7, before the next one."""
    killed = start(f"train_rl.py {SMALL} --steps 99 --save-every 4", tmp_path)
    until(killed, "step    6/")
    killed.kill()
    killed.communicate()
    run = tmp_path / "runs" / "rl"
    assert (read(run / "checkpoint" / "state.json")["step"] == 4
            and len(read(run / "metrics.jsonl")) >= 5)
    status, out, err = finish(
        start(f"train_rl.py {SMALL} --steps 6 --save-every 4 --resume", tmp_path))
    assert status == 0 and len(STEP.findall(out)) == 2, err
    same_run(whole[0], run)

RESUMED = {
    "kl, minibatches":
        "--kl-coef 0.5 --num-minibatches 2 --aggregate sequence --difficulty-weight exp",
    "bf16, own data":
        "--dtype bfloat16 --data {files}/questions.jsonl --traces {files}/traces.jsonl --lr 1e-3"}

@pytest.mark.slow                               # test_resume_equals_unbroken is the quick one
@pytest.mark.parametrize("flags", RESUMED.values(), ids=RESUMED)
def test_resume_is_bit_exact(files, script, flags):
    """Bug: after a resume the KL reference is the trained policy, the fp32 masters are the rounded
    weights, the order of the file's rows begins again."""
    command = f"train_rl.py {SMALL} {flags.format(files=files)}"
    works(script(f"{command} --name whole --steps 3"))
    works(script(f"{command} --name parts --steps 1"))
    half = weights_of("runs/parts")
    out = works(script(f"{command} --name parts --steps 3 --resume"))
    assert len(STEP.findall(out)) == 2
    same_run("runs/whole", "runs/parts")
    assert any(not torch.equal(v, half[k])
               for k, v in weights_of("runs/parts").items() if "optimizer" not in k)
    if "kl-coef" in flags:                      # a reference that moved along would pull nowhere
        assert read("runs/parts/metrics.jsonl")[-1]["kl"] > 0

def test_resume_after_a_torn_row(whole, script):
    """Bug: a run that died while it wrote a row (a full disk, a power cut) cannot be resumed for
    that half row."""
    shutil.copytree(whole[0], "runs/rl")
    with open("runs/rl/metrics.jsonl", "a") as f:
        f.write('{"step": 6, "rew')
    works(script(f"train_rl.py {SMALL} --steps 7 --save-every 4 --resume"))
    assert [r["step"] for r in read("runs/rl/metrics.jsonl")] == list(range(7))

@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, script):
    """Claim: Ctrl-C finishes the step, saves it, says how to go on; and with what it says, and more
    steps, it goes on."""
    process = start(f"train_rl.py {SMALL} --steps 500 --save-every 100 --name mine", tmp_path)
    until(process, "step   1/")
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 0 and "Traceback" not in err, err
    hint = re.search(r"continue with: (.*)", out)[1]
    assert "--name mine" in hint and "--resume" in hint
    done = read(tmp_path / "runs/mine/checkpoint/state.json")["step"]
    assert 1 <= done < 99 and not (tmp_path / "runs/mine/summary.json").exists()
    out = works(script(f"train_rl.py {hint} --steps {done + 1}"))
    assert (STEP.findall(out)
            and (len(read("runs/mine/metrics.jsonl")) == done + 1
                 == read("runs/mine/checkpoint/state.json")["step"]))
    assert read("runs/mine/summary.json")["n"] == 4

@pytest.mark.slow
def test_an_earlier_run_is_safe(script):
    """Bug: the same --name once more destroyed the first run: step 0 over its checkpoint, an old
    report beside new rows."""
    command = f"train_rl.py {SMALL} --steps 2 --name mine"
    works(script(command))
    before = {p.name: p.read_bytes() for p in pathlib.Path("runs/mine").iterdir() if p.is_file()}
    refused(script(command), "runs/mine holds an earlier run", "--resume", "--fresh")
    refused(script(f"{command} --resume --steps 1"), "has done 2 steps already")
    assert before == {p.name: p.read_bytes()
                      for p in pathlib.Path("runs/mine").iterdir() if p.is_file()}
    works(script(f"{command} --fresh --steps 1"))
    assert (len(read("runs/mine/metrics.jsonl")) == 1
            and read("runs/mine/checkpoint/state.json")["step"] == 1)
    works(script("train_sft.py --traces oracle --n 8 --name warm"))
    refused(script("train_sft.py --traces oracle --n 8 --name warm"),
            "runs/warm holds an earlier run", "--fresh")
    works(script("train_sft.py --traces oracle --n 8 --name warm --fresh"))

def test_a_policy_gone_nan_stops(script):
    """Bug: weights of 1e38 sampled nan to the end, and the report died of them."""
    refused(script(f"train_rl.py {SMALL} --lr 1e38 --steps 9"),
            "not finite", "smaller --lr", "runs/rl/checkpoint")
    assert (read("runs/rl/checkpoint/state.json")["step"] == 0
            and len(read("runs/rl/metrics.jsonl")) < 3)

def test_a_seed_without_end(script):
    refused(script("train_rl.py --seed 99999999999999999999"),
            "--seed is 99999999999999999999; expected a value below 2^32")

@pytest.mark.parametrize("name", ["train_sft.py --n 4", "evaluate.py --n 4", "train_rl.py"])
def test_ctrl_c_before_the_loop_is_no_traceback(script, monkeypatch, name):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(prefix, "load_vlm", interrupt)
    refused(script(name), "interrupted")

COMMANDS = ["train_rl.py", "train_sft.py", "evaluate.py", "data.py",
            *(f"-m appendix.{name}" for name in ("figures", "speed", "sweep", "tiny"))]

@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_and_does_nothing(script, command):
    """Bug: a command without options ran when it was asked for help; one rewrote README.md."""
    status, out, err = script(f"{command} --help")
    assert status == 0 and "usage:" in out and not err and os.listdir() == []

def test_ctrl_c_during_imports_is_one_line(tmp_path):
    """Claim: from the first line of a script on, Ctrl-C says so in one line; a real error keeps its
    traceback."""
    code = "import appendix; {}; import nonsense_that_is_not_there"
    for error, said in (("raise KeyboardInterrupt", "error: interrupted"),
                        ("pass", "No module named 'nonsense_that_is_not_there'")):
        done = subprocess.run([sys.executable, "-c", code.format(error)], cwd=ROOT, text=True,
                              capture_output=True)
        assert done.returncode != 0 and done.stderr.strip().splitlines()[-1].endswith(said)
        assert ("Traceback" in done.stderr) == (error == "pass")

def test_a_bonus_that_nothing_pays_is_refused(script):
    """Bug: flags of bonuses were ignored by recipes without a zoom."""
    for flag in ("--distinct-bonus 0.2", "--tool-bonus 1", "--curiosity 0.5", "--zoom-cost 0.1"):
        refused(script(f"train_rl.py --task boxes {flag}"), flag.split()[0], "has none")
    refused(script("train_rl.py --overlong 999"), "--overlong is 999", "192 tokens")
    refused(script("train_rl.py --mismatch ignore --num-minibatches 2"),
            "--mismatch ignore", "expected --num-minibatches 1")

def test_a_template_is_a_warm_start(script):
    """Claim: --template, which stands in for a warm start, makes no traces unless they are asked
    for; without a tool it is refused."""
    parsed = lambda *flags: files_and_folders.parse_config(
        train_rl.Config, ["--template", *flags], presets=recipes.presets)
    assert parsed().traces == "" and parsed("--traces", "oracle").traces == "oracle"
    for flags in ("--task relation", "--max-zooms 0"):
        refused(script(f"train_rl.py --template {flags}"), "--template", "--max-zooms")

def test_a_note_where_the_tiny_model_gets_other_images(script, files):
    """Claim: rows of a file that are no toy scenes get a note with the path that works; toy scenes
    do not."""
    image = next(p for p in os.listdir(files) if p.startswith("questions_"))
    write(pathlib.Path("own.jsonl"),
          {"id": "a", "images": [image], "question": "Which?", "answer_type": "choice",
           "options": ["x", "y"], "answer": 0})
    out = works(script(f"evaluate.py --data own.jsonl --images {files} --max-new-tokens 4"))
    assert "knows the toy world only" in out and "data.py draw search" in out
    assert "toy world only" not in works(script(
        f"evaluate.py --data {files}/questions.jsonl --n 1 --max-new-tokens 4 --out o2"))

def test_turns_that_a_rollout_would_cut_are_said(capsys):
    vlm = model.load("tiny", quiet=True)
    sample = data.toy("search", "train", 1)[0]
    rl_options.warn_of_long_turns(
        vlm, [zoom_rollout.Trace(sample, ["<think> a b c </think>", "x"])], 3)
    assert "1 of 2 turns" in capsys.readouterr().out
    rl_options.warn_of_long_turns(vlm, [zoom_rollout.Trace(sample, ["x"])], 99)
    assert capsys.readouterr().out == ""

# -----------------------------------------------------------------------------
# wrong use

BAD_ROWS = {
    "json": ('{"id": "second", "images": ', ["json.jsonl, line 2: not JSON"]),
    "list": ('["a"]', ["list.jsonl, line 2: field 'answer_type' is missing"]),
    "question": ({"question": None}, ["question.jsonl, line 2: field 'question' is missing"]),
    "type": ({"answer_type": "smell"}, ["type.jsonl, line 2: answer_type is 'smell'"]),
    "answer": ({"answer": 9}, ["answer.jsonl, line 2: answer is 9"]),
    "target": ({"answer_type": "point", "targets": [{"image": 3, "box": [0, 0, 1, 1]}]},
               ["target.jsonl, line 2: box"]),
    "nothing": ({"images": ["nowhere.png"]},
                ["nothing.jsonl, line 2: image", "nowhere.png does not exist"])}

READERS = ["train_rl.py --traces '' --data", "train_sft.py --traces x --data",
           "evaluate.py --data", "data.py show"]

@pytest.mark.parametrize("reader", READERS, ids=[r.split()[0] for r in READERS])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(files, script, name, reader):
    refused(script(f"{reader} {files}/{name}.jsonl"), *BAD_ROWS[name][1])

@pytest.mark.parametrize("reader", READERS, ids=[r.split()[0] for r in READERS])
def test_a_bad_file_is_named(files, script, reader):
    refused(script(f"{reader} nowhere.jsonl"), "nowhere.jsonl", "No such file")
    refused(script(f"{reader} {files}/empty.jsonl"), "empty.jsonl holds no rows")
    refused(script(f"{reader} {files}/binary.jsonl"), "binary.jsonl")
    refused(script(f"{reader} {files}"), str(files))        # a folder

@pytest.mark.parametrize("image", ["text.png", "half.png"])
@pytest.mark.parametrize("command", [
    "train_rl.py --traces '' --num-prompts 1 --group-size 2 --blind-prompts 0 --eval-n 1 "
    "--max-new-tokens 8",
    "train_rl.py --traces {files}/traces.jsonl",
    "train_sft.py --traces {files}/traces.jsonl",
    "evaluate.py"], ids=["rl", "rl warm", "sft", "evaluate"])
def test_an_image_that_cannot_be_read(files, tmp_path, script, command, image):
    """Not a missing file but a broken one, in the last of twelve rows: it must not end a run in the
    middle."""
    rows = read(files / "questions.jsonl")
    rows[-1]["images"] = [image]
    write(tmp_path / "q.jsonl", *rows)
    refused(script(f"{command.format(files=files)} --data q.jsonl --images {files}"),
            image, "cannot be read")

BAD_TRACES = {
    "t-json": ('{"id": ', "t-json.jsonl, line 2: not JSON"),
    "t-missing": ({"id": "q0"}, "t-missing.jsonl, line 2: field 'turns' is missing"),
    "t-empty": ({"id": "q0", "turns": []}, "t-empty.jsonl, line 2: field 'turns' is []"),
    "t-text": ({"id": "q0", "turns": [3]}, "t-text.jsonl, line 2: field 'turns' is [3]"),
    "t-list": ([1], "t-list.jsonl, line 2: field 'turns' is missing"),
    "t-id": ({"id": "q99", "turns": ["x"]},
             "t-id.jsonl, line 2: id 'q99' is no row of the questions")}

@pytest.mark.parametrize("trainer", ["train_rl.py", "train_sft.py"])
@pytest.mark.parametrize("name", BAD_TRACES)
def test_a_bad_trace_is_named(files, script, name, trainer):
    refused(script(f"{trainer} --data {files}/questions.jsonl --traces {files}/{name}.jsonl"),
            BAD_TRACES[name][1])

@pytest.mark.parametrize("trainer", ["train_rl.py", "train_sft.py"])
def test_traces_that_fit_nothing(files, script, trainer):
    refused(script(f"{trainer} --data {files}/questions.jsonl --traces nowhere.jsonl"),
            "nowhere.jsonl")
    refused(script(f"{trainer} --data {files}/questions.jsonl --traces {files}/empty.jsonl"),
            "empty.jsonl holds no traces")
    # traces of a file, but no file of questions
    refused(script(f"{trainer} --traces {files}/traces.jsonl"), "--data")
    # the oracle knows the toy world only
    refused(script(f"{trainer} --data {files}/questions.jsonl --traces oracle"), "--traces")

BAD_MODELS = {
    "no-card": ["no-card", "vlm.json"],
    "broken-card": ["broken-card", "vlm.json"],
    "short-card": ["short-card", "vlm.json"],
    "no-weights": ["cannot load", "no-weights"],
    "half-weights": ["cannot load", "half-weights"],
    "bert": ["cannot load", "bert"],
    "a-layer-less": ["cannot load", "a-layer-less"],
    "other-shape": ["cannot load", "other-shape"]}

@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_checkpoint_that_is_none_or_another_models(files, script, name):
    """Bug (a-layer-less): weights that the file does not hold are drawn at random, and the run goes
    on with them."""
    refused(script(f"evaluate.py --n 1 --model {files}/{name}"), *BAD_MODELS[name])
    refused(script(f"train_rl.py --traces '' --model {files}/{name}"), *BAD_MODELS[name])

@pytest.mark.parametrize("name", ["train_rl.py", "train_sft.py", "evaluate.py"])
def test_flags(script, name):
    refused(script(f"{name} --modle tiny"), "unrecognized arguments: --modle")
    # no abbreviations: a flag means what it says
    refused(script(f"{name} --mod tiny"), "unrecognized arguments: --mod")
    refused(script(f"{name} --seed many"), "--seed", "many")
    refused(script(f"{name} --task sreach"), "sreach", "search", "relation")
    refused(script(f"{name} --difficulty harder"), "harder", "hard")
    refused(script(f"{name} --model gpt"),
            "unknown model 'gpt'", "tiny", "qwen2.5-vl-3b", "a checkpoint folder")

@pytest.mark.parametrize("command, said", [
    ("train_rl.py --recipe x", ["--recipe"]),
    ("train_sft.py --recipe x", ["recipe"]),
    ("train_rl.py --kl k4", ["--kl"]),
    ("train_rl.py --dtype int8", ["--dtype"]),
    ("data.py draw serach 3", ["serach", "search"]),
    ("data.py convert x a b", ["x", "screenspot"]),
    ("data.py", ["command"])])
def test_choices(script, command, said):
    refused(script(command), *said)

@pytest.mark.parametrize("flag", [
    "num-prompts", "group-size", "num-minibatches", "max-new-tokens", "temperature", "save-every",
    "sft-n", "sft-batch", "sft-epochs", "eval-n"])
def test_sizes_that_cannot_be(script, monkeypatch, flag):
    """A zero (a division by the temperature, a modulus, an empty group) is refused at the start, by
    name, not after the warm start."""
    monkeypatch.setattr(zoom_rollout, "replay",
                        lambda *_, **__: pytest.fail("the warm start had begun"))
    refused(script(f"train_rl.py {SMALL} --{flag} 0"), f"--{flag}")

@pytest.mark.parametrize("flag", ["n", "batch", "epochs"])
def test_sizes_that_cannot_be_in_the_warm_start(script, monkeypatch, flag):
    monkeypatch.setattr(zoom_rollout, "replay",
                        lambda *_, **__: pytest.fail("the warm start had begun"))
    refused(script(f"train_sft.py --{flag} 0"), f"--{flag}")

@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without")
def test_no_such_device(script):
    refused(script("train_rl.py --device cuda"), "cuda")
    refused(script("train_rl.py --device gpu"), "gpu")

# this process has imported appendix.tiny already
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("command", [
    "train_rl.py", "train_sft.py", "evaluate.py", "evaluate.py --out runs/x/y",
    "-m appendix.tiny --out runs/tiny", "data.py draw search 1 --out runs/x",
    "data.py convert screenspot web.json runs/x.jsonl"])
def test_a_place_that_cannot_be_written(files, script, command):
    """A file stands where a folder should be (permissions would not stop root)."""
    shutil.copy(files / "questions_0_0.png", "questions_0_0.png")
    with open("runs", "w"), open("web.json", "w") as f:
        json.dump([{"img_filename": "questions_0_0.png", "bbox": [1, 2, 3, 4],
                    "instruction": "i"}], f)
    began = time.process_time()
    refused(script(command), "cannot write", "runs")
    assert time.process_time() - began < 10                 # before the work, not after it

def test_nothing_to_resume_and_another_runs_settings(whole, script):
    refused(script("train_rl.py --resume"), "nothing to resume", "runs/rl/checkpoint")
    shutil.rmtree("runs", ignore_errors=True)
    shutil.copytree(whole[0], "runs/rl")
    refused(script(f"train_rl.py {SMALL} --steps 9 --save-every 4 --resume --lr 1"),
            "lr", "0.0003 there, 1.0 here")
    refused(script(f"train_rl.py {SMALL} --steps 9 --save-every 4 --resume --task point"),
            "other settings", "task")
    assert len(read("runs/rl/metrics.jsonl")) == 6          # the old rows are still there
    state = "runs/rl/checkpoint/state.json"
    text = open(state).read()
    open(state, "w").write(text[:40])
    refused(script(f"train_rl.py {SMALL} --steps 9 --save-every 4 --resume"), "runs/rl/checkpoint")
    open(state, "w").write(text)
    with open("runs/rl/checkpoint/optimizer.safetensors", "r+b") as f:
        f.truncate(1000)
    refused(script(f"train_rl.py {SMALL} --steps 9 --save-every 4 --resume"), "runs/rl/checkpoint")
    assert len(read("runs/rl/metrics.jsonl")) == 6

def test_no_success_is_explained(tmp_path, script, models):
    """Claim: a policy that never succeeds (here: random weights) gets an explanation, not forty
    steps of nothing."""
    vlm = models["qwen2.5"]
    files_and_folders.replace_folder(vlm.save(str(tmp_path / "random")), str(tmp_path / "random"))
    refused(script(f"train_rl.py {SMALL} --model random --traces '' --max-new-tokens 4"),
            "none of the 16 rollouts", "--traces")

@pytest.mark.slow
@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}],
                         ids=["offline", "refused"])
def test_no_network(tmp_path, env):
    """Claim: the released weights without a network end in seconds, in a line that says where they
    would come from."""
    began = time.time()
    status, out, err = finish(
        start("evaluate.py --model qwen2.5-vl-3b --n 1", tmp_path, HF_HOME=str(tmp_path),
              no_proxy="127.0.0.1", **env),
        timeout=600)
    # above it: the hub's own retries
    refused((status, out, err.strip().splitlines()[-1]),
            "qwen2.5-vl-3b", "Hugging Face", "network")
    assert time.time() - began < 180

# -----------------------------------------------------------------------------
# the claim of the README

@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_run_learns_to_look(tmp_path, seed):
    """Claim: `python train_rl.py` learns to look; forbidden to, or shown black crops, what it has
    learned is worth nothing."""
    status, _, err = finish(start(f"train_rl.py --seed {seed}", tmp_path, OMP_NUM_THREADS=""),
                            timeout=3600)
    assert status == 0, err
    s = read(tmp_path / "runs/rl/summary.json")
    assert (s["accuracy_after"] >= 0.85
            and s["accuracy_after"] - s["accuracy_before"] >= 0.30), s
    assert (abs(s["accuracy_no_zoom"] - s["chance"]) <= 0.10
            and abs(s["accuracy_black_crop"] - s["chance"]) <= 0.10), s
