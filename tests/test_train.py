"""Training at size: memory, several ranks, bad gradients, and runs that are killed. Each must give
what the plain way gives. At the end MUTATIONS puts bugs into train_rl.py and what it stands on, one
line each.

    python -m pytest tests/test_train.py            # seconds
    python -m pytest tests/test_train.py --slow     # and twenty SIGKILLs: minutes
"""
import copy, dataclasses, json, os, random, shlex, shutil, signal, socket, subprocess, sys, time
import traceback, zlib
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import data, evaluate, grpo, model, rewards, train_rl, train_sft, zoom_rollout
import test_scripts
from appendix import evaluation_run, prefix, ranks, recipes, run, speed, weights
from appendix.optimizer import AdamW
from conftest import ROOT, check_mutation, close, names
from test_scripts import script
from test_train_step import Asked, in_a_new_folder, main_of

SMALL = ("train_rl.py --num-prompts 4 --blind-prompts 1 --group-size 4 --max-new-tokens 40 "
         "--sft-n 16 --eval-n 4 --difficulty easy --traces oracle")

# -----------------------------------------------------------------------------
# memory

def test_plan_of_a_3b(capsys, monkeypatch):
    """Claim: the README's figures for Qwen2.5-VL-3B: 3.75 G parameters, 3.09 G of them trained; one
    80 GB card, or, offloaded, 40 GB."""
    vlm = speed.speed_setup.random_weights("qwen2.5-vl-3b", "meta")
    n, trained = (sum(p.numel() for p in vlm.model.parameters()),
                  sum(p.numel() for p in vlm.parameters()))
    assert n == pytest.approx(3.754e9, rel=1e-3) and trained == pytest.approx(3.086e9, rel=1e-3)
    monkeypatch.setattr(sys, "argv", ["speed.py", "plan", "--model", "qwen2.5-vl-3b"])
    speed.main()
    peaks = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert peaks["80 GB"] <= 70 and peaks["40 GB"] <= 36 and peaks["evaluation"] <= 40
    # its long tables stand there
    with open(os.path.join(ROOT, "appendix", "README.md"), encoding="utf-8") as f:
        text = f.read()
    assert all(f"{p:.1f}" in text for p in peaks.values())

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_is_the_same_optimizer(dtype):
    """Bug: the weights on the device do not follow the masters on the CPU,
    or the gradients stay."""
    made = []
    for offload in (False, True):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 8, dtype=dtype))
        optimizer = AdamW([p], 1e-2, offload=offload)
        assert (optimizer.masters[0] is p) == (dtype == torch.float32 and not offload)
        for i in range(5):
            (p.float() ** 2 * (i + 1)).sum().backward()
            optimizer.step(1e-2)
            assert p.grad is None and optimizer.masters[0].grad is None
        made.append((p.detach(), optimizer.tensors()["0.exp_avg"]))
    assert (torch.equal(made[0][0], made[1][0])
            and torch.equal(made[0][1], made[1][1])
            and (made[0][0] != torch.linspace(-1, 1, 8, dtype=dtype)).all())

def test_micro_batches_add_up_in_fp32():
    """Bug: bf16 gradients: of 1,000 equal micro-batches all are rounded away after the 256th."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    AdamW([p], 1e-2)
    for _ in range(1000):
        p.sum().backward()
    assert (p.grad == 1000).all()

def test_out_of_memory_is_answered(script, monkeypatch):
    """Claim: not a traceback but the knobs, in the order in which they cost least."""
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(prefix.PrefixVLM, "logprobs", full)
    said = test_scripts.refused(script(f"{SMALL}"), "out of memory", "2.00 GiB", "--resume")
    assert (said.index("--recompute") < said.index("--micro-tokens")
            < said.index("--max-batch-tokens") < said.index("--offload"))
    said = test_scripts.refused(script("train_sft.py --traces oracle --n 16"),
                                "out of memory", "2.00 GiB")
    assert (said.index("--recompute") < said.index("--micro-tokens")
            < said.index("--trees") < said.index("--offload"))

@pytest.mark.parametrize("command", [SMALL, "train_sft.py --traces oracle --n 16"])
def test_warm_start_obeys_the_memory_knobs(script, monkeypatch, command):
    """Bug: a run that fits a card in RL runs out of memory before, in the warm start."""
    def micro_batches(vlm, episodes, tokens):
        asked.update(tokens=tokens, recompute=vlm.recompute)
        raise data.DataError("seen")
    asked = {}
    def seen(self, *args, real=AdamW.__init__, **flags):
        asked.update(flags)
        real(self, *args, **flags)
    monkeypatch.setattr(AdamW, "__init__", seen)
    monkeypatch.setattr(prefix.PrefixVLM, "micro_batches", micro_batches)
    test_scripts.refused(script(f"{command} --micro-tokens 777 --offload --recompute"), "seen")
    assert asked["tokens"] == 777 and asked["offload"] and asked["recompute"]

# -----------------------------------------------------------------------------
# bad gradients

def test_bad_gradients_stop_the_run(models, capsys):
    """Claim: a step whose gradient is not finite changes nothing and is shown; after five in a row
    the run says why it stops, and the checkpoint is as it was. One bad step alone does
    not stop it."""
    bad = iter([False, True, False] + [True] * 5)
    def poisoned(self, lr, clip=1.0, real=AdamW.step):
        if next(bad):
            next(p for p in self.params if p.grad is not None).grad.fill_(float("nan"))
        return real(self, lr, clip)
    with in_a_new_folder(), mock.patch.object(AdamW, "step", poisoned):
        run.replace_folder(models["qwen2.5"].save("random"), "random")
        with pytest.raises(SystemExit):
            main_of("--name bad --steps 20 --save-every 3 --control random")
        out, err = capsys.readouterr()
        assert ("not finite in 5 steps in a row" in err and "--lr" in err and "step 6" in err
                and out.count("SKIPPED") == 6)
        rows = test_scripts.read("runs/bad/metrics.jsonl")
        assert [row["skipped"] for row in rows] == [0, 1, 0, 1, 1, 1, 1, 1]
        weights = load_file("runs/bad/checkpoint/model.safetensors")
        assert (json.load(open("runs/bad/checkpoint/state.json"))["step"] == 6
                and all(w.isfinite().all() for w in weights.values()))

# -----------------------------------------------------------------------------
# ranks

def on_ranks(n, job, folder):
    """job() in n processes that torchrun might have started -> what each returned (JSON)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    children = []
    for rank in range(n):
        if not (pid := os.fork()):
            status = 1
            try:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                ranks.start()
                with open(os.path.join(folder, f"{n}.{rank}.json"), "w") as f:
                    json.dump(job(), f)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * n
    return [json.load(open(os.path.join(folder, f"{n}.{rank}.json"))) for rank in range(n)]

def fresh(vlm):
    return prefix.PrefixVLM(copy.deepcopy(vlm.model), vlm.tokenizer, vlm.processor, vlm.name,
                            vlm.spec)

def score(sample, text, *more, real=rewards.score, **options):
    """In the place of rewards.score: a number that the episode's own text decides; the fourth
    prompt's are all equal."""
    v = 0.5 if sample.id.endswith("3") else zlib.crc32(text.encode()) % 4 / 3
    return {**real(sample, text, *more, **options), "reward": v, "accuracy": float(v > 0.5)}

def one_step(vlm, micro_tokens=10 ** 6, prompts=5, group_size=4, **flags):
    """A step of RL -> the clipped gradient (as Adam's first moment holds it), the metrics, the
    questions of this rank."""
    own = fresh(vlm)
    with torch.no_grad():
        for p in own.parameters():                          # the reference is another model
            p *= 1.02
    cfg = train_rl.Config(recipe="vigorl-zoom", group_size=group_size, num_prompts=prompts,
                          blind_prompts=2, max_new_tokens=5, max_zooms=1,
                          micro_tokens=micro_tokens, lr=1e-6, **flags)
    optimizer = AdamW(own.parameters(), 1e-6)
    with mock.patch.object(rewards, "score", score):
        metrics, episodes = train_rl.train_step(
            own, vlm, optimizer, Asked(cfg, data.toy("search", "train", prompts)), cfg, 3)
    moment = torch.cat([optimizer.opt.state[m]["exp_avg"].flatten() for m in optimizer.masters])
    return moment[::29].tolist(), metrics, [(e.sample.id, e.ids) for e in episodes]

EVERYTHING = dict(group_size=2, aggregate="sequence", kl_coef=0.1, papo_coef=0.1, num_minibatches=2,
                  resample=2, difficulty_weight="exp", difficulty_normalize=True)

@pytest.mark.parametrize("flags", [dict(), EVERYTHING], ids=["default", "everything"])
def test_ranks_and_micro_batches_change_nothing(models, tmp_path, flags):
    """Bug: a normaliser of one rank's or one micro-batch's tokens, gradients clipped before they
    are added, a prompt that two ranks ask, other random numbers on another rank, a metric of rank 0
    alone; weights scaled, minibatches dealt or dull groups refilled by each rank for itself, an
    image blackened by its place in the micro-batch."""
    vlm = models["qwen2.5"]
    (want, metrics, asked), (other, _, _) = (one_step(vlm, **flags),
                                             one_step(vlm, micro_tokens=1, **flags))
    shares = on_ranks(2, lambda: one_step(vlm, **flags), tmp_path)
    close(torch.tensor(other), torch.tensor(want), 1e-4)
    assert all(shares) and metrics["grad_norm"] > 1 and metrics["skipped"] == 0  # it was clipped
    assert (metrics.get("resampled", 1) > 0
            and sum(v for k, v in metrics.items() if k.startswith("share_")) == pytest.approx(1))
    for got, same, _ in shares:
        close(torch.tensor(got), torch.tensor(want), 1e-4)
        for k in metrics:
            if "_per_s" not in k and "share_" not in k and k != "seconds":
                assert same[k] == pytest.approx(metrics[k], rel=1e-3, abs=1e-6), k
    told = [(name, ids) for _, _, episodes in shares for name, ids in episodes]
    assert (sorted(map(repr, told)) == sorted(repr(tuple(e)) for e in asked)
            and len(told) == 5 * flags.get("group_size", 4))
    assert all(len({name for name, _ in episodes}) in (2, 3) for _, _, episodes in shares)

def test_two_ranks_fine_tune_as_one(models, tmp_path):
    """Bug: each rank learns its half of the batch alone, or the reported loss is one rank's."""
    vlm, rng = models["qwen2.5"], random.Random(0)
    pairs = [(s, train_sft.oracle(vlm, s, rng, 3)) for s in data.toy("search", "train", 5)]
    def job():
        own = fresh(vlm)
        cfg = train_sft.Config(lr=1e-4, epochs=1, batch=3)
        losses = train_sft.finetune(
            own, [zoom_rollout.replay(own, s, turns) for s, turns in pairs], cfg, progress=False)
        return losses, [p.detach().double().sum().item() for p in own.parameters()]
    losses, sums = job()
    for got, same in on_ranks(2, job, tmp_path):
        assert (got == pytest.approx(losses, rel=1e-4)
                and same == pytest.approx(sums, rel=1e-3, abs=1e-2))

def torchrun(n, command, folder):
    """`torchrun --nproc-per-node n command`"""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n),
         *shlex.split(os.path.join(ROOT, command))],
        cwd=folder, env=test_scripts.environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def test_two_ranks_are_one_run(models, tmp_path):
    """Bug: both ranks write, none does, or what they wrote is not the run
    that one process makes."""
    with in_a_new_folder():
        run.replace_folder(models["qwen2.5"].save("random"), "random")
        flags = "--steps 2 --kl-coef 0.3"
        main_of(f"--name one {flags}")
        on_ranks(2, lambda: main_of(f"--name two {flags}"), tmp_path)
        one, two = (test_scripts.read(f"runs/{name}/metrics.jsonl") for name in ("one", "two"))
        assert ([row["step"] for row in two] == [0, 1]
                and two[0]["reward"] == pytest.approx(one[0]["reward"]))
        assert two[1]["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=1e-2)
        assert (len(test_scripts.read("runs/two/episodes.jsonl")) == 4
                and os.listdir("runs/two/checkpoint") == os.listdir("runs/one/checkpoint"))
        a, b = (test_scripts.read(f"runs/{name}/summary.json") for name in ("one", "two"))
        assert a.keys() == b.keys() and a["accuracy_before"] == b["accuracy_before"]

def test_two_ranks_evaluate_as_one(models, tmp_path, monkeypatch):
    """Bug: a question is asked twice or by nobody, the interval is of one rank's half, the last
    rank has nothing to ask and waits."""
    monkeypatch.chdir(tmp_path)
    run.replace_folder(models["qwen2.5"].save("random"), "random")
    command = ("--checkpoint random --batch 2 --max-new-tokens 4 --max-zooms 0 --n 5 --zoom all "
               "--temperature 1 --out").split()
    with mock.patch.object(rewards, "score", score):
        one, two = (evaluate.main([*command, "one"]),
                    on_ranks(2, lambda: evaluate.main([*command, "two"]), tmp_path))
        assert one["n"] == 5 and two == [one, one] == [test_scripts.read("two/summary.json")] * 2
        lines = open("two/episodes.jsonl").readlines()
        with open("two/episodes.jsonl", "w") as f:          # killed in the second mode, in a row
            f.writelines([*lines[:5], *random.Random(0).sample(lines[5:10], 3), lines[11][:99]])
        assert on_ranks(2, lambda: evaluate.main([*command, "two"]), tmp_path) == [one, one]
    rows = [sorted(test_scripts.read(f"{name}/episodes.jsonl"),
                   key=lambda row: (row["run"], row["id"]))
            for name in ("one", "two")]
    assert rows[0] == rows[1] and len(rows[0]) == 5 * len(evaluate.MODES)

def test_a_rank_that_dies_ends_the_run(models, tmp_path, capfd):
    """Bug: the others wait for it for ever."""
    def dies(*_):
        raise RuntimeError("out of luck")
    def job():
        signal.alarm(60)                                    # were it to hang, by this
        with mock.patch.object(grpo, "group_advantages",
                               dies if ranks.rank() else grpo.group_advantages):
            return one_step(models["qwen2.5"])
    with pytest.raises(AssertionError, match=r"\[256, 256\]"):  # two errors, no alarm
        on_ranks(2, job, tmp_path)
    assert "out of luck" in capfd.readouterr().err

@pytest.mark.slow
def test_torchrun(tmp_path):
    """Claim: `torchrun --nproc-per-node 2 train_rl.py` is one run: one line per step, one folder,
    whole files, two processes' work. And a rank that dies ends it with its error, at once."""
    status, out, err = test_scripts.finish(torchrun(2, f"{SMALL} --steps 2", tmp_path), timeout=300)
    assert status == 0, err
    folder = tmp_path / "runs" / "rl"
    assert (len(test_scripts.STEP.findall(out)) == 2 and out.count("held-out accuracy") == 1
            and "warm start" in out)
    assert ([row["step"] for row in test_scripts.read(folder / "metrics.jsonl")] == [0, 1]
            and (folder / "summary.json").exists())
    assert json.load(open(folder / "checkpoint" / "state.json"))["step"] == 2
    (tmp_path / "dies.py").write_text(f"""import os, sys; sys.path.insert(0, {ROOT!r})
import grpo, train_rl
if os.environ["RANK"] == "1":
    def group_advantages(*_): raise RuntimeError("out of luck")
    grpo.group_advantages = group_advantages
train_rl.main()""")
    status, out, err = test_scripts.finish(
        torchrun(2, f"{tmp_path}/dies.py {SMALL[12:]}", tmp_path), timeout=300)
    # a hang would run into the timeout
    assert status != 0 and "out of luck" in err and not test_scripts.STEP.search(out)

# -----------------------------------------------------------------------------
# crashes

class Crash(BaseException):
    pass

def crashing(monkeypatch, at):
    """From now on the write number `at` happens by half, and then the process is gone."""
    count = iter(range(10 ** 6))
    def half(real, spoil):
        def write(*args, **more):
            if next(count) == at:
                spoil(*args)
                raise Crash
            return real(*args, **more)
        return write
    def half_a_file(tensors, path, *_):
        with open(path, "wb") as f:
            f.write(b"half")
    def half_a_folder(path, **_):
        for name in sorted(os.listdir(path))[::2] if os.path.isdir(path) else ():
            os.remove(os.path.join(path, name))
    nothing = lambda *_, **__: None
    monkeypatch.setattr(run, "save_file", half(run.save_file, half_a_file))
    monkeypatch.setattr(shutil, "rmtree", half(shutil.rmtree, half_a_folder))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, half(getattr(os, name), nothing))
    return count

def test_a_checkpoint_survives_a_crash_at_any_write(models, tmp_path, monkeypatch):
    """Bug: between two writes there is a moment in which no whole checkpoint can be found."""
    vlm, folder = fresh(models["qwen2.5"]), str(tmp_path / "checkpoint")
    weight, optimizer = vlm.parameters()[0], AdamW(vlm.parameters(), 1e-3)
    def mark(step):
        with torch.no_grad():
            weight.fill_(step)
        run.save_checkpoint(folder, vlm, optimizer, {"step": step})
    mark(0)
    seen = set()
    for at in range(100):
        with monkeypatch.context() as patch:
            crashing(patch, at)
            try:
                mark(at + 1)
                break                                       # there are no more writes than that
            except Crash:
                pass
        run.restore_folder(folder)
        resumed = model.load(folder, quiet=True)
        state = run.load_checkpoint(folder, AdamW(resumed.parameters(), 1e-3))
        assert (state["step"] in (max(seen | {0}), at + 1)
                and (resumed.parameters()[0] == state["step"]).all())
        seen.add(state["step"])
    assert at >= 6 and len(seen) >= 2 and os.listdir(tmp_path) == ["checkpoint"]

def test_rows_survive_a_crash(tmp_path, monkeypatch):
    """Bug: metrics.jsonl is emptied first and written again afterwards."""
    path = str(tmp_path / "rows.jsonl")
    run.append_rows(path, [{"step": i} for i in range(5)])
    with open(path, "a") as f:
        f.write('{"step": 5, "re')
    with monkeypatch.context() as patch:
        crashing(patch, 0)
        with pytest.raises(Crash):
            run.keep_rows_before(path, 3)
    assert len(open(path).readlines()) == 6
    run.keep_rows_before(path, 3)
    assert test_scripts.read(path) == [{"step": i} for i in range(3)]
    run.keep_rows_before(path, 0)
    assert test_scripts.read(path) == []

def test_resume_between_two_renames(tmp_path, monkeypatch):
    """Bug: --resume looks for the run's settings in a checkpoint that a crash has left without its
    name, before it gets it back."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/cut/checkpoint.old")
    run.write_json("runs/cut/checkpoint.old/state.json",
                   {"step": 3, "before": {}, "seconds": 1.0, "config": {"lr": 0.02, "name": "cut"}})
    assert (recipes.presets(train_rl.Config(name="cut", resume=True)) == {"lr": 0.02}
            and os.listdir("runs/cut") == ["checkpoint"])

@pytest.mark.slow
def test_twenty_kills(tmp_path):
    """Claim: SIGKILL at twenty random moments, each followed by --resume, costs at most one
    checkpoint interval each, and in the end nothing: the weights are those of a run that nobody
    killed."""
    command, rng = f"{SMALL} --steps 24 --save-every 3", random.Random(0)
    whole = test_scripts.start(f"{command} --name whole", tmp_path)
    began = time.time()
    assert test_scripts.finish(whole)[0] == 0
    whole, folder, kills = time.time() - began, tmp_path / "runs" / "rl", 0
    def state():                                # the step of the last checkpoint; -1: there is none
        found = [json.load(open(folder / name / "state.json"))["step"]
                 for name in ("checkpoint", "checkpoint.old")
                 if (folder / name).exists()]
        return found[0] if found else -1
    while kills < 20:
        process = test_scripts.start(
            f"{command} --name rl {'--resume' if state() >= 0 else ''}", tmp_path)
        time.sleep(rng.uniform(0, whole))
        process.kill()
        out, err = process.communicate()
        assert "error" not in err, err
        kills += 1
        steps = [int(line.split()[1].split("/")[0])
                 for line in out.splitlines()
                 if test_scripts.STEP.match(line)]
        print(f"kill {kills}: in step {steps[-1] + 1 if steps else None}, saved {state()}")
        assert not steps or steps[-1] - 3 <= state() <= steps[-1]
        if (folder / "summary.json").exists():              # done: the next ones kill a new run
            test_scripts.same_run(tmp_path / "runs" / "whole", folder)
            shutil.rmtree(folder)
    status, _, err = test_scripts.finish(test_scripts.start(
        f"{command} --name rl {'--resume' if state() >= 0 else ''}", tmp_path))
    assert status == 0, err
    test_scripts.same_run(tmp_path / "runs" / "whole", folder)

def test_disk_is_checked_before_the_work(script, monkeypatch):
    """Bug: after the warm start the disk is full, because a checkpoint stands beside the one before
    it. The message has the numbers."""
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=17_000_000))
    vlm = prefix.load_vlm("tiny", quiet=True)
    weights = 4 * sum(p.numel() for p in vlm.model.parameters())
    checkpoint = weights + 8 * sum(p.numel() for p in vlm.parameters())
    assert 17_000_000 < 2 * checkpoint and 2 * weights < 17_000_000
    said = test_scripts.refused(script(SMALL), f"a checkpoint takes {checkpoint / 1e9:.1f} GB",
                                "0.0 GB are free", "--weights-only")
    assert "warm start" not in said

def test_weights_only(script):
    """Claim: --weights-only leaves the optimizer out; the model can be used, and --resume says why
    it cannot go on."""
    assert script(f"{SMALL} --steps 2 --weights-only --name light")[0] == 0
    files = os.listdir("runs/light/checkpoint")
    assert ("model.safetensors" in files and "state.json" in files
            and not {"optimizer.safetensors", "rng.safetensors"} & set(files))
    test_scripts.refused(script("train_rl.py --name light --resume --steps 4"),
                         "holds weights only", "--model runs/light/checkpoint")
    prefix.load_vlm("runs/light/checkpoint", quiet=True)

def test_ranks_wait_for_a_slow_disk(monkeypatch):
    """Bug: NCCL gives up after ten minutes, while rank 0 still writes a checkpoint."""
    seen = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks.dist, "init_process_group",
                        lambda backend, timeout: seen.update(timeout=timeout))
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 0)
    ranks.start()
    assert seen["timeout"].total_seconds() >= 3600

def test_toy_scenes_of_a_real_model(script, monkeypatch):
    """Bug: warm start and evaluation drew scenes of 6,720 pixels a side for a 3B model, or of 448,
    whose patterns show without a zoom."""
    for name, side in (("tiny", 448), ("qwen2.5-vl-3b", 1792), ("qwen3-vl-2b", 1792)):
        for config in (train_rl.Config, train_sft.Config, evaluate.Config):
            cfg = config(model=name)
            assert 4 * weights.largest_prompt_image(name, cfg) ** 0.5 == side
            assert weights.largest_prompt_image(name, dataclasses.replace(cfg, data="x.jsonl")) == 0
            assert weights.largest_prompt_image(
                name, dataclasses.replace(cfg, max_pixels=999)) == 999
        asked, _ = evaluation_run.load_samples(evaluate.Config(model=name, n=1, max_pixels=50_000))
        assert asked[0].images[0].size == (side, side)
    asked = []
    monkeypatch.setattr(
        prefix, "load_vlm",
        lambda *_, max_pixels, **__: asked.append(max_pixels) or run.fail("seen"))
    for command in ("train_rl.py", "train_sft.py", "evaluate.py"):
        test_scripts.refused(script(f"{command} --model qwen2.5-vl-3b"), "seen")
    assert asked == [weights.TOY_PIXELS] * 3

def test_settings_of_the_papers_reach_the_update():
    """Claim: ViGoRL's recipe warms up for 5 % of its 500 steps and decays weights; image sizes of a
    recipe hold for --data only."""
    of = lambda **flags: recipes.presets(train_rl.Config(model="qwen2.5-vl-3b", **flags))
    for recipe, pixels in (("vigorl", 4_194_304), ("univg-r1", 401_408)):
        assert (of(recipe=recipe, data="x.jsonl")["max_pixels"] == pixels
                and "max_pixels" not in of(recipe=recipe))
    assert all((of(recipe=r)["warmup_steps"], of(recipe=r)["weight_decay"]) == (25, 0.01)
               for r in ("vigorl", "vigorl-zoom"))
    rates = [train_rl.learning_rate(train_rl.Config(lr=1.0, warmup_steps=25), step)
             for step in (0, 11, 24, 99)]
    assert (rates == [1 / 25, 12 / 25, 1, 1]
            and train_rl.learning_rate(train_rl.Config(lr=1.0, warmup_steps=0), 0) == 1)
    assert "max_pixels" in recipes.PAPERS["vigorl"][1]      # and reading it did not take it out

# -----------------------------------------------------------------------------
# do the tests bite?

MUTATIONS = [
    ("appendix.optimizer:AdamW.__init__",
     "p.grad_dtype = torch.float32 if p.dtype == torch.bfloat16 else p.dtype", "pass",
     test_micro_batches_add_up_in_fp32, {}),
    ("appendix.optimizer:AdamW.update", "p.copy_(m)", "pass",
     test_offload_is_the_same_optimizer, dict(dtype=torch.bfloat16)),
    ("appendix.ranks:all_reduce_gradients", "dist.all_reduce(p.grad)", "pass",
     test_ranks_and_micro_batches_change_nothing, dict(flags={})),
    ("train_rl:loss_denominator", "ranks.all_reduce([count])[0]", "count",
     test_ranks_and_micro_batches_change_nothing, dict(flags={})),
    ("train_rl:roll_out_share",
     "sample_groups(vlm, samples[share], cfg, config, first + share.start)",
     "sample_groups(vlm, samples[share], cfg, config, first)",
     test_ranks_and_micro_batches_change_nothing, dict(flags={})),
    ("train_rl:split_minibatches", "sorted(ranks.gather(list(own)))", "sorted(own)",
     test_ranks_and_micro_batches_change_nothing, dict(flags=EVERYTHING)),
    ("train_rl:prompt_weights", "weights[first:first + len(accuracy)]", "weights[:len(accuracy)]",
     test_ranks_and_micro_batches_change_nothing, dict(flags=EVERYTHING)),
    ("train_rl:prompt_weights", "torch.tensor(ranks.gather(accuracy.tolist()))",
     "accuracy[None].expand(2, -1, -1).flatten(0, 1)",
     test_ranks_and_micro_batches_change_nothing, dict(flags=EVERYTHING)),
    ("appendix.rl_options:blindfold", 'f"{step}/{e.sample.id}/{view.index}/{view.box}"',
     'f"{step}/{len(dark_views)}"',
     test_ranks_and_micro_batches_change_nothing, dict(flags=EVERYTHING)),
    ("appendix.recipes:presets", "run.restore_folder(checkpoint)", "pass",
     test_resume_between_two_renames, {}),
    ("evaluate:run_episodes", "config.seed + block * options.batch",
     "config.seed + share.start + i", test_two_ranks_evaluate_as_one, {}),
    ("evaluate:run_episodes", "options.numbers or range(len(samples))", "range(len(samples))",
     test_two_ranks_evaluate_as_one, {}),
    ("train_rl:roll_out_share", "ranks.shard(len(samples))", "slice(0, len(samples))",
     test_ranks_and_micro_batches_change_nothing, dict(flags={})),
    ("appendix.run:replace_folder", "os.rename(folder, old)", "shutil.rmtree(folder)",
     test_a_checkpoint_survives_a_crash_at_any_write, {}),
    ("appendix.run:restore_folder", "os.rename(old, folder)", "pass",
     test_a_checkpoint_survives_a_crash_at_any_write, {}),
    ("appendix.run:replace_folder", "os.path.exists(folder)", "True",
     test_a_checkpoint_survives_a_crash_at_any_write, {}),
    ("appendix.run:write_text", "tmp = path + '.tmp'", "tmp = path",
     test_rows_survive_a_crash, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, models, tmp_path, capsys, monkeypatch):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {
        "models": lambda: models, "tmp_path": lambda: tmp_path,
        "capsys": lambda: capsys, "monkeypatch": lambda: monkeypatch})
