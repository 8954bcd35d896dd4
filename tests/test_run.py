"""What stands around a run: optimizer, checkpoints, files, the command line, how a script ends,
several ranks. At the end MUTATIONS puts bugs into appendix/run.py, optimizer.py and ranks.py, one
at a time, and requires the named test to fail.
"""
import dataclasses, json, math, os, random, signal, socket, subprocess, sys
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import train_sft
from appendix import files, prefix, ranks, run
from appendix.optimizer import AdamW
from conftest import check_mutation, close, names
from zoom_rollout import Episode

def episodes_of(vlm, n=3):
    """A picture, a question and random tokens as the answer, n times."""
    out = []
    for seed in range(n):
        rng, pixels = (random.Random(seed),
                       np.random.default_rng(seed).integers(0, 256, (97, 333, 3), dtype=np.uint8))
        view, e = vlm.view(Image.fromarray(pixels)), Episode(None)
        e.append_given(vlm.chat("user", "Look.", view, f"Which is {seed}?")
                       + vlm.chat("assistant", open=True), [view])
        e.append_sampled([rng.randrange(vlm.im_start) for _ in range(rng.randrange(3, 12))]
                         + [vlm.im_end])
        out.append(e)
    return out

# -----------------------------------------------------------------------------
# optimizer

def steps(optimizer, p, gradients, lr):
    for g in gradients:
        p.grad = g.to(p.grad_dtype)
        optimizer.step(lr, clip=1e9) if isinstance(optimizer, AdamW) else optimizer.step()
    return p.detach()

def test_small_updates_survive_bf16():
    """Bug: bf16 weights near 1 are 0.004 apart: 3000 steps of 1e-6 each are 3000 times nothing."""
    ours, plain = (torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2))
    optimizer, gradients = AdamW([ours], 1e-6, weight_decay=0), [torch.ones(8)] * 3000
    steps(optimizer, ours, gradients, 1e-6)
    steps(torch.optim.AdamW([plain], lr=1e-6, weight_decay=0), plain, gradients, 1e-6)
    assert (plain == 1).all() and (ours < 1).all()
    close(1 - optimizer.masters[0], torch.full((8,), 3e-3), 0.02)
    assert (torch.equal(ours, optimizer.masters[0].bfloat16())
            and optimizer.masters[0].dtype == torch.float32)

def test_adamw_is_torchs():
    """Bug: betas or weight decay differ from what the flags say."""
    gradients = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    ours, plain = (torch.nn.Parameter(torch.linspace(-1, 1, 15).view(5, 3)) for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    got = steps(AdamW([ours], **settings), ours, gradients, 1e-2)
    assert torch.equal(got, steps(torch.optim.AdamW([plain], fused=True, **settings),
                                  plain, gradients, 1e-2))

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_gradients_are_not_applied(dtype):
    """Bug: one nan gradient makes every weight nan; a large one is not clipped; gradients pile up
    over steps."""
    p = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = AdamW([p], 0.1)
    for bad in (math.nan, math.inf):
        p.grad = torch.tensor([1, bad, 0, 0], dtype=p.grad_dtype)
        assert (not optimizer.step(0.1) < math.inf
                and (p == 1).all() and p.grad is None
                and not optimizer.opt.state)
    p.grad = torch.full((4,), 50, dtype=p.grad_dtype)
    assert (optimizer.step(0.1, clip=1.0) == pytest.approx(100)
            and (p < 1).all() and p.grad is None)
    # (1 - beta1) * 50 / 100
    close(optimizer.tensors()["0.exp_avg"], torch.full((4,), 0.1 * 0.5), 1e-3)
    assert optimizer.step(0.1) == 0             # no gradient at all

# -----------------------------------------------------------------------------
# checkpoints

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint(vlm, dtype, tmp_path, capsys):
    """Bug: a resumed run is not the run: weights, special tokens, image sizes, coordinate
    convention, moments, masters, RNG."""
    folder = str(tmp_path / "checkpoint")
    run.replace_folder(vlm.save(folder), folder)
    a = prefix.load_vlm(folder, dtype=dtype)
    assert (a.spec == dataclasses.replace(vlm.spec, path=folder)
            and a.name == vlm.name
            and a.dtype == getattr(torch, dtype))
    optimizer, episodes = AdamW(a.parameters(), 1e-3), episodes_of(a)

    def train(vlm, optimizer):
        logprobs, _, mask = vlm.logprobs(episodes)
        (-logprobs.sum() / mask.sum()).backward()
        optimizer.step(1e-3)
        for v in (v for e in episodes for v in e.views):
            v.drop_features()
        return logprobs.detach(), torch.rand(3)

    if dtype == "float32":
        # the file holds exactly these weights
        assert torch.equal(train(a, optimizer)[0], vlm.logprobs(episodes)[0])
    train(a, optimizer)
    run.save_checkpoint(folder, a, optimizer, {"step": 2})
    run.save_checkpoint(folder, a, optimizer, {"step": 2})      # over itself
    assert os.listdir(tmp_path) == ["checkpoint"]               # nothing half-written beside it
    want = [train(a, optimizer) for _ in range(2)]
    b = prefix.load_vlm(folder, dtype=dtype, quiet=True)
    resumed = AdamW(b.parameters(), 1e-3)
    assert run.load_checkpoint(folder, resumed) == {"step": 2}
    for (logprobs, noise), (same, same_noise) in zip(want, [train(b, resumed) for _ in range(2)]):
        assert torch.equal(logprobs, same) and torch.equal(noise, same_noise)
    nasty = "12 <|im_end|> <answer>"
    assert (b.ids(nasty) == vlm.ids(nasty)
            and b.spec.max_pixels == vlm.spec.max_pixels
            and b.processor.patch_size == vlm.processor.patch_size)
    assert prefix.load_vlm(folder, max_pixels=9999, quiet=True).spec.max_pixels == 9999
    said = capsys.readouterr().out
    # the chosen precision is printed
    assert said.count("vision tower frozen") == 1 and dtype in said

def test_bad_folders(vlm, tmp_path, capsys):
    """Bug: a traceback, or exit code 0, for a broken checkpoint or a folder that cannot be made."""
    with pytest.raises(SystemExit) as e:
        run.load_checkpoint(str(tmp_path), AdamW(vlm.parameters(), 1))
    assert e.value.code == 2 and "no checkpoint" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        run.make_dir(str(tmp_path / "file" / "run"))
    assert e.value.code == 2 and "cannot write into" in capsys.readouterr().err

@pytest.mark.cuda
def test_resume_on_cuda(models, tmp_path):
    """Bug: the step counter of a fused update restored to the CPU."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16, device="cuda"))
    optimizer, gradient = AdamW([p], 0.1), torch.ones(4)
    steps(optimizer, p, [gradient.cuda()] * 2, 0.1)
    run.save_checkpoint(str(tmp_path / "c"), models["qwen3"], optimizer, {})
    q = torch.nn.Parameter(p.detach().clone())
    resumed = AdamW([q], 0.1)
    run.load_checkpoint(str(tmp_path / "c"), resumed)
    assert torch.equal(steps(optimizer, p, [gradient.cuda()], 0.1),
                       steps(resumed, q, [gradient.cuda()], 0.1))

# -----------------------------------------------------------------------------
# the command line

@dataclasses.dataclass
class Config:
    steps: int = 40                 # how many; 100% of them
    lr: float = 1e-3                # peak
    # a heading
    name: str = "rl"                # a name: anything
    resume: bool = False            # go on
    kind: Literal["a", "b"] = "a"   # which
    group_size: int = 8             # of a group

def test_cli(capsys):
    """Bug: a misspelt or shortened flag is ignored, a bool takes the string "False" for true, a
    choice is not checked; a negative number of steps does nothing and says so after the warm
    start."""
    assert (run.parse_config(Config, []) == Config()
            and "all at their defaults" in capsys.readouterr().out)
    got = run.parse_config(
        Config, "--steps 3 --resume --kind b --group-size 2 --lr 1e-6 --name x".split())
    assert got == Config(3, 1e-6, "x", True, "b", 2)
    assert ("settings: steps = 3, lr = 1e-06, name = 'x', resume = True, kind = 'b', group_size = 2"
            in capsys.readouterr().out)
    assert run.parse_config(Config, ["--no-resume"]).resume is False
    for wrong in ("--stepz 3", "--step 3", "--kind c", "--steps 3.5", "--resume False", "--steps",
                  "extra", "--group_size 3"):
        with pytest.raises(SystemExit) as e:
            run.parse_config(Config, wrong.split())
        # one line, without the usage
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1, wrong
    for wrong, said in (("--steps -3", "expected a value of 0 or more"), ("--lr nan", "0 or more"),
                        ("--lr inf", "0 or more"), ("--group-size 0", "above 0"),
                        ("--name=", "name of a folder")):
        with pytest.raises(SystemExit) as e:
            run.parse_config(Config, wrong.split(), positive=["group_size"])
        assert e.value.code == 2 and said in capsys.readouterr().err, wrong
    assert run.parse_config(Config, ["--steps", "0"], positive=["group_size"]).steps == 0

def test_presets_are_defaults():
    """Bug: a preset wins over a flag, or does not know what the flags asked for."""
    def presets(config):
        return {"steps": 7, "lr": 0.5} if config.kind == "b" else {}
    assert run.parse_config(Config, [], presets=presets) == Config()
    assert run.parse_config(Config, ["--kind", "b"], presets=presets) == Config(7, 0.5, kind="b")
    assert (run.parse_config(Config, "--kind b --steps 40".split(), presets=presets)
            == Config(40, 0.5, kind="b"))

@pytest.mark.parametrize("config", [Config, train_sft.Config])
def test_help_comes_from_the_comments(config, capsys):
    """Bug: a field without explanation; a % in a comment that argparse takes for a format."""
    with pytest.raises(SystemExit) as e:
        run.parse_config(config, ["--help"], "First line.\nSecond line.")
    said = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "First line." in said and "Second" not in said
    with open(__file__ if config is Config else train_sft.__file__, encoding="utf-8") as f:
        source = f.read().split("class Config:")[1].split("\n\n\n")[0]
    for field in dataclasses.fields(config):
        comment = next(line for line in source.split("\n")
                       if line.startswith(f"    {field.name}:")).split("# ")[1]
        assert ("--" + field.name.replace("_", "-") in said
                and " ".join(comment.split()) in said
                and f"(default: {field.default!r})" in said)

@dataclasses.dataclass(frozen=True)
class Options:
    lr: float = 1.0
    other: int = 5
    kind: str = "q"

def test_pick_fields():
    """Bug: a field of the smaller dataclass keeps its default although the run sets it."""
    assert (run.pick_fields(Config(lr=0.25, kind="b"), Options)
            == Options(lr=0.25, other=5, kind="b"))

# -----------------------------------------------------------------------------
# how a script ends

@pytest.mark.parametrize("error, said", [
    (files.DataError("a.jsonl, line 3: not JSON"), "error: a.jsonl, line 3: not JSON"),
    (torch.OutOfMemoryError("CUDA out of memory.\n Tried 2 GiB"),
     "error: out of memory (CUDA out of memory. Tried 2 GiB). Change, in this order: --offload"),
    (RuntimeError("DefaultCPUAllocator: can't allocate"),
     "error: out of memory (DefaultCPUAllocator: can't allocate). "
     "Change, in this order: --offload"),
    (KeyboardInterrupt(), "error: stopped"),
    (RuntimeError("another"), None),
    (KeyError("a bug"), None)])
def test_errors_of_the_user_are_one_line(error, said, capsys):
    """Bug: a traceback for a typing error in a file; a real bug swallowed."""
    with (pytest.raises(SystemExit if said else type(error)) as e,
          run.exit_on_error(out_of_memory="--offload", interrupted="stopped")):
        raise error
    assert capsys.readouterr().err.strip() == (said or "") and (not said or e.value.code == 2)
    if not isinstance(error, files.DataError):
        # nothing to say: it passes
        with pytest.raises(type(error)), run.exit_on_error():
            raise error

def test_a_full_disk_is_one_line(capsys):
    """Bug: a traceback; and nobody says what was saved."""
    for error, said in (
            (OSError(28, "No space left on device", "runs/x/metrics.jsonl"),
             "runs/x/metrics.jsonl: No space left on device. All is kept"),
            (SafetensorError("IoError(Os { code: 28 })"),
             "IoError(Os { code: 28 }). All is kept")):
        with pytest.raises(SystemExit) as stop, run.exit_on_error(saved="All is kept"):
            raise error
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err == f"error: {said}\n"

def test_half_written_files_go(tmp_path, monkeypatch):
    """Bug: what a full disk cut off stays there under its temporary name."""
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        run.write_text(str(tmp_path / "a.json"), "x")
    monkeypatch.setattr(run, "save_file", full)
    vlm = SimpleNamespace(save=lambda folder: os.mkdir(folder + ".tmp") or folder + ".tmp")
    with pytest.raises(OSError):
        run.save_checkpoint(str(tmp_path / "checkpoint"), vlm, SimpleNamespace(tensors=dict), {})
    assert os.listdir(tmp_path) == []

def test_messages_are_printable(capsys):
    """Bug: the name of a file clears the screen."""
    with pytest.raises(SystemExit):
        run.fail("runs/\x1b[2J\x07é: gone")
    assert capsys.readouterr().err == "error: runs/\\x1b[2J\\x07é: gone\n"

def test_a_folder_has_one_owner(tmp_path, capsys, monkeypatch):
    """Bug: two runs under one name write into the same files. A lock of a process that is gone is
    taken over."""
    path, folder = tmp_path / "lock", str(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        path.write_text(json.dumps({"process": other.pid, "host": socket.gethostname()}))
        with pytest.raises(SystemExit):
            run.lock(folder)
        assert (f"process {other.pid} on {socket.gethostname()} works in {folder}"
                in capsys.readouterr().err)
        other.stdin.close()
    run.lock(folder)                            # it has ended
    assert json.loads(path.read_text())["process"] == os.getpid()
    run.lock(folder)                            # it is ours
    # whether that one lives cannot be known
    path.write_text(json.dumps({"process": 1, "host": "elsewhere"}))
    with pytest.raises(SystemExit):
        run.lock(folder)
    path.write_text("{")
    run.lock(folder)
    run.unlock(str(path), os.getpid() + 1)
    assert path.exists()
    run.unlock(str(path), os.getpid())
    assert not path.exists()

def test_an_earlier_run_is_not_overwritten(tmp_path, capsys):
    """Bug: the same --name once more, and the first run is gone."""
    run.refuse_to_overwrite(str(tmp_path), ("checkpoint", "summary.json"), False)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(SystemExit):
        run.refuse_to_overwrite(str(tmp_path), ("checkpoint", "summary.json"), False,
                                "continue it with --resume, ")
    err = capsys.readouterr().err
    assert all(word in err for word in ("summary.json", "--resume", "--name", "--fresh"))
    run.refuse_to_overwrite(str(tmp_path), ("checkpoint", "summary.json"), True)

@pytest.mark.parametrize("line", ["{", "[1]", '{"step": "3"}', "{}", "null", "\x00"])
def test_a_garbled_line_of_a_log_is_named(tmp_path, capsys, line):
    """Bug: a traceback at --resume."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + line + '\n{"step": 1}\n')
    with pytest.raises(SystemExit):
        run.keep_rows_before(str(path), 2)
    assert f"{path}, line 2 is" in capsys.readouterr().err

def test_ctrl_c_twice(capsys):
    """Bug: the second Ctrl-C waits for the end of the step too."""
    before = signal.getsignal(signal.SIGINT)
    try:
        interrupt = run.Interrupt()
        assert not interrupt.asked
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked and "Ctrl-C again" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)

# -----------------------------------------------------------------------------
# ranks

def test_two_ranks_exchange(tmp_path):
    """Bug: shares that overlap or leave something out, rows that arrive cut or in another order, a
    mean of means, a gradient that one rank lacks."""
    from test_train import on_ranks
    def job():
        rank, p, q = (ranks.rank(), torch.nn.Parameter(torch.zeros(2)),
                      torch.nn.Parameter(torch.zeros(2)))
        p.grad_dtype = q.grad_dtype = torch.float32
        p.grad = torch.full((2,), 1.0 + rank)
        if rank == 0:
            q.grad = torch.ones(2)
        ranks.all_reduce_gradients([p, q])
        return {"shares": [list(range(n)[ranks.shard(n)]) for n in range(6)],
                "size": ranks.world_size(),
                "sum": ranks.all_reduce([1 + rank, 0.5]),
                "max": ranks.all_reduce([3 - rank, rank], op="MAX"),
                "rows": ranks.gather(
                    [{"rank": rank, "text": "ä<|im_end|> " * (1 + 5 * rank)}] * (2 - rank)),
                "ratios": ranks.reduce_ratios(
                    {"step": 7, "mean": (1.0 + rank, 1 + 2 * rank), "none": (0.0, 0)}),
                "gradients": [p.grad.tolist(), q.grad.tolist()]}
    first, second = on_ranks(2, job, tmp_path)
    assert ([a + b for a, b in zip(first.pop("shares"), second.pop("shares"))]
            == [list(range(n)) for n in range(6)])
    assert (first == second and first["size"] == 2
            and first["sum"] == [3, 1] and first["max"] == [3, 1])
    assert ([(row["rank"], len(row["text"])) for row in first["rows"]]
            == [(0, 12), (0, 12), (1, 72)])
    assert (first["ratios"] == {"step": 7, "mean": 3 / 4, "none": 0}
            and first["gradients"] == [[3, 3], [1, 1]])

def test_one_rank_is_alone():
    """Bug: what needs torchrun without it."""
    rows = [{"a": 1}]
    assert (ranks.rank() == 0 and ranks.world_size() == 1
            and ranks.shard(5) == slice(0, 5)
            and ranks.gather(rows) == rows)
    assert (ranks.all_reduce([1, 2.5]) == [1, 2.5]
            and ranks.reduce_ratios({"a": 1, "b": (1, 4), "c": (3, 0)})
                == {"a": 1, "b": 0.25, "c": 0})

# -----------------------------------------------------------------------------
# files

def test_files_keep_what_they_should(tmp_path):
    """Bug: half a surrogate pair of a model's answer ends a run; a torn last line is kept, or a
    whole one is cut."""
    path = str(tmp_path / "a.txt")
    run.write_text(path, "x \ud83d y")
    assert open(path, encoding="utf-8").read() == "x ? y" and os.listdir(tmp_path) == ["a.txt"]
    run.append_rows(path := str(tmp_path / "b.jsonl"), [{"step": 0}, {"step": 1}])
    whole = open(path).read()
    run.cut_torn_line(path)
    assert open(path).read() == whole
    with open(path, "a") as f:
        f.write('{"step": 2, "a')
    run.cut_torn_line(path)
    assert (open(path).read() == whole
            and [json.loads(line)["step"] for line in open(path)] == [0, 1])

# -----------------------------------------------------------------------------
# do the tests bite? Each row puts one bug into a file of the appendix; the named test must fail.

MUTATIONS = [
    ("appendix.optimizer:AdamW.make_master", "p.detach().to(device).float().clone()",
     "p.detach().to(device).clone()", test_small_updates_survive_bf16, {}),
    ("appendix.optimizer:AdamW.__init__",
     "torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)",
     "torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)",
     test_adamw_is_torchs, {}),
    ("appendix.optimizer:AdamW.step", "math.isfinite(norm)",
     "True", test_bad_gradients_are_not_applied, dict(dtype=torch.bfloat16)),
    ("appendix.optimizer:AdamW.step", "p.grad = None",
     "pass", test_bad_gradients_are_not_applied, dict(dtype=torch.float32)),
    ("appendix.optimizer:AdamW.tensors", "m is not self.params[i]",
     "False", test_checkpoint, dict(dtype="bfloat16")),
    ("appendix.optimizer:AdamW.tensors", 'out[f"{i}.{key}"] = value',
     'out[f"{i}.{key}"] = 0 * value', test_checkpoint, dict(dtype="float32")),
    ("appendix.run:load_checkpoint", 'torch.set_rng_state(rng["torch"])',
     "pass", test_checkpoint, dict(dtype="float32")),
    ("appendix.run:replace_folder",
     "os.rename(tmp, folder)\nshutil.rmtree(old, ignore_errors=True)",
     "os.rename(tmp, folder)",
     test_checkpoint, dict(dtype="float32")),
    ("appendix.run:make_parser", "Parser(description=title, allow_abbrev=False)",
     "Parser(description=title, allow_abbrev=True)", test_cli, {}),
    ("appendix.run:make_parser", 'options["action"] = argparse.BooleanOptionalAction',
     'options["type"] = bool', test_cli, {}),
    ("appendix.run:make_parser", 'options["choices"] = typing.get_args(f.type)',
     "pass", test_cli, {}),
    ("appendix.run:field_comments", "inspect.getsource(Config)",
     "''", test_help_comes_from_the_comments, dict(config=Config)),
    ("appendix.run:parse_config", "parser.set_defaults(**presets(config))",
     "parser.set_defaults(**presets(Config()))", test_presets_are_defaults, {}),
    ("appendix.run:Interrupt.on_signal", "signal.signal(signal.SIGINT, signal.default_int_handler)",
     "pass", test_ctrl_c_twice, {}),
    ("appendix.run:is_out_of_memory",
     "isinstance(error, torch.OutOfMemoryError) or 'DefaultCPUAllocator' in str(error)",
     "True",
     test_errors_of_the_user_are_one_line, dict(error=RuntimeError("another"), said=None)),
    ("appendix.run:write_text", "open(tmp, 'w', encoding='utf-8', errors='replace')",
     "open(tmp, 'w', encoding='utf-8')",
     test_files_keep_what_they_should, {}),
    ("appendix.run:cut_torn_line", "f.read().rfind(b'\\n') + 1",
     "f.read().rfind(b'\\n')", test_files_keep_what_they_should, {}),
    ("appendix.ranks:gather", "if world_size() == 1: return rows",
     "return rows", test_two_ranks_exchange, {}),
    ("appendix.ranks:reduce_ratios", "[row[name][1] for name in names]",
     "[row[name][1] / world_size() for name in names]", test_two_ranks_exchange, {}),
    ("appendix.ranks:shard", "end = n * (rank() + 1) // world_size()",
     "end = first + n // world_size()", test_two_ranks_exchange, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, models, tmp_path, capsys):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {
        "vlm": lambda: models["qwen2.5"], "tmp_path": lambda: tmp_path, "capsys": lambda: capsys})
