"""Sweeps: which runs a command line means, what they share, that a stop loses nothing, and the
numbers of the table. The runs themselves are replaced by a function that writes what a run leaves
behind; one test runs the real thing.
"""
import json, math, os, statistics, sys, time

import pytest

from appendix import run, sweep, sweep_results
from appendix.files import DataError
from conftest import check_mutation, close, names

def plan_of(axes, seeds=(0,), shared=(), name="s"):
    return sweep.Plan(name, sweep.arms_of(axes), list(seeds), list(shared))

# -----------------------------------------------------------------------------
# the plan

def test_arms():
    """Claim: every combination is an arm, in the order of the command line; bool fields become
    flags of their own."""
    arms = sweep.arms_of(["kl_coef=0,0.01", "mask_negative=false,true"])
    assert [a.label for a in arms] == [
        "kl_coef=0 mask_negative=false", "kl_coef=0 mask_negative=true",
        "kl_coef=0.01 mask_negative=false", "kl_coef=0.01 mask_negative=true"]
    assert sweep.flags_of(arms[1]) == ["--kl-coef=0", "--mask-negative"]
    assert sweep.flags_of(arms[2]) == ["--kl-coef=0.01", "--no-mask-negative"]
    assert sweep.parsed(sweep.flags_of(arms[3])).mask_negative is True

@pytest.mark.parametrize("axis, said", [
    ("klcoef=1", "no setting"), ("seed=1,2", "no setting"), ("name=a", "no setting"),
    ("lr=1,1", "twice"),
])
def test_bad_axes_are_refused(axis, said):
    with pytest.raises(DataError, match=said):
        sweep.arms_of([axis])

def test_words_that_would_be_ignored_are_refused():
    """Bug: one setting named twice made an arm whose label is not what ran; --record without a
    study kept nothing."""
    with pytest.raises(DataError, match="named twice"):
        sweep.arms_of(["lr=1e-4", "lr=1e-3"])
    with pytest.raises(DataError, match="--study"):
        sweep.main(["lr=1e-4", "--record"])

def test_bad_values_are_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    """Claim: a flag or value that train_rl.py refuses ends the sweep in one line, and no folder is
    made."""
    monkeypatch.chdir(tmp_path)
    for argv in (["lr=fast"], ["loss=grpo,nonsense"], ["lr=1e-3", "--no-such-flag"],
                 ["lr=1e-3", "--steps", "-1"]):
        with pytest.raises(SystemExit) as stop:
            sweep.main(argv)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    for argv in (["lr=1e-3", "--seeds", "0,x"], ["lr=1e-3", "--seeds", "0,0"],
                 ["lr=1e-3", "--seed", "3"], ["mask_negative=maybe"], []):
        with pytest.raises(DataError):
            sweep.main(argv)
    assert os.listdir(tmp_path) == []

def test_warm_starts_are_shared():
    """Claim: arms that begin alike share a warm start per seed; what determines it makes another;
    no traces, none."""
    runs, warm = sweep.runs_of(plan_of(["kl_coef=0,0.01", "lr=1e-4,1e-3"], seeds=(0, 1)))
    assert len(runs) == 8 and len(warm) == 2
    for r in runs:
        assert (f"--model={[w for w in warm if w.seed == r.seed][0].folder}/checkpoint" in r.argv
                and "--traces=" in r.argv)
    assert "--steps=0" in warm[0].argv and warm[0].steps == 1
    runs, warm = sweep.runs_of(plan_of(["sft_n=10,20"], seeds=(0, 1)))
    assert len(warm) == 4
    runs, warm = sweep.runs_of(plan_of(["traces=,oracle"]))
    assert len(warm) == 1 and not any(word.startswith("--model") for word in runs[0].argv)
    assert len({r.folder for r in runs}) == 2

# -----------------------------------------------------------------------------
# running

def leave_results(r, right):
    """What a run leaves behind. right: {id: right or not} with zooms allowed."""
    os.makedirs(r.folder, exist_ok=True)
    share = statistics.mean(right.values())
    run.write_json(f"{r.folder}/summary.json",
                   {"accuracy_before": 0.2, "accuracy_after": share, "seconds": 10.0})
    run.write_rows(f"{r.folder}/held_out.jsonl",
                   [{"mode": "on", "id": i, "right": hit} for i, hit in right.items()]
                   + [{"mode": "off", "id": "q0", "right": False}])
    run.write_rows(f"{r.folder}/metrics.jsonl", [{"step": i, "accuracy": i / 4} for i in range(4)])

@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Runs that take no time -> the list of runs done. Seed and arm decide what is right."""
    monkeypatch.chdir(tmp_path)
    done = []

    def run_one(self, r):
        done.append(r.name)
        number = 1 if "0.01" in r.arm else 0
        leave_results(r, {f"q{i}": (i + r.seed) % 3 <= number for i in range(30)})
        return ""
    monkeypatch.setattr(sweep.Pool, "run_one", run_one)
    return done

def test_table(pretend, capsys):
    """Claim: mean over seeds, its t interval, the paired difference; table.json has every figure;
    the last line is its path."""
    done, failed = sweep.sweep(plan_of(["kl_coef=0,0.01"], seeds=(0, 1, 2)), at_once=2)
    out = capsys.readouterr().out.strip().splitlines()
    rows = json.load(open(out[-1]))
    assert (out[-1] == "runs/sweeps/s/table.json"
            and rows == [sweep_results.figures_of(r) for r in done]
            and failed == [])
    assert ({(row["arm"], row["seed"]) for row in rows}
            == {(f"kl_coef={k}", s) for k in ("0", "0.01") for s in (0, 1, 2)})
    table = open("runs/sweeps/s/table.md").read()
    assert "| kl_coef=0 | 3 | 20.0% | 33.3% [33.3, 33.3] |  | 10 |" in table
    assert "+33.3 [+33.3, +33.3]" in table
    svg = open("runs/sweeps/s/curves.svg").read()
    assert svg.count("<polyline") == 2 and "kl_coef=0.01" in svg

def test_what_is_done_is_not_run_again(pretend, monkeypatch, capsys):
    """Claim: the same command goes on; more seeds and arms may be added; other flags under the same
    name are refused."""
    sweep.sweep(plan_of(["kl_coef=0"]), 1)
    pretend.clear()
    sweep.sweep(plan_of(["kl_coef=0,0.01"], seeds=(0, 1)), 1)
    assert (sorted(pretend) == ["sweeps/s/kl_coef=0-seed1", "sweeps/s/kl_coef=0.01-seed0",
                                "sweeps/s/kl_coef=0.01-seed1",
                                *[n for n in pretend if "warm" in n]]
            and sum("warm" in n for n in pretend) == 1)
    with pytest.raises(DataError, match="other flags"):
        sweep.sweep(plan_of(["kl_coef=0"], shared=["--lr=1e-3"]), 1)
    monkeypatch.setattr(sweep, "digest_of_base", lambda: "another")
    with pytest.raises(DataError, match="another shipped checkpoint"):
        sweep.sweep(plan_of(["kl_coef=0,0.01"], seeds=(0, 1)), 1)

def test_a_failed_run_is_said_and_left_out(pretend, monkeypatch, capsys):
    healthy = sweep.Pool.run_one
    monkeypatch.setattr(
        sweep.Pool, "run_one",
        lambda self, r: "error: it broke" if "lr=1e-3" in r.name else healthy(self, r))
    sweep.sweep(plan_of(["lr=1e-4,1e-3"]), 1)
    out = capsys.readouterr().out
    assert ("lr=1e-3, seed 0 failed: error: it broke" in out
            and "1 runs failed" in out
            and "| lr=1e-3 | 0 | | failed |" in out)

def test_run_one(tmp_path, monkeypatch):
    """Claim: a run with a checkpoint is resumed, another begins afresh; the reason of a failure is
    its last line; a run that still works in its folder is waited for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_rl.py").write_text(
        "import sys; print(' '.join(sys.argv[1:])); print('error: no'); sys.exit(2)")
    monkeypatch.setattr(sweep, "ROOT", str(tmp_path))
    r = sweep.runs_of(plan_of(["lr=1e-4"], shared=["--traces="]))[0][0]
    pool = sweep.Pool(1)
    assert pool.run_one(r) == "error: no" and "--fresh" in open(sweep.log_path(r)).read()
    os.makedirs(f"{r.folder}/checkpoint")
    pool.run_one(r)
    assert "--resume" in open(sweep.log_path(r)).read()
    run.write_json(f"{r.folder}/lock", {"process": os.getppid(), "host": "here"})
    waited = []
    monkeypatch.setattr(time, "sleep", lambda s: (waited.append(s), os.remove(f"{r.folder}/lock")))
    pool.run_one(r)
    assert waited == [1]
    (tmp_path / f"{r.folder}/lock").write_text("")                        # it is just being written
    assert not sweep.is_worked_in(r.folder)
    run.write_json(f"{r.folder}/lock", {"process": os.getppid(), "host": "here"})
    pool.stopping.set()                                                     # Ctrl-C, while it waits
    assert pool.run_one(r) == "stopped" and waited == [1]

# -----------------------------------------------------------------------------
# numbers

def test_student_t():
    """Claim: the 97.5 % quantiles of the tables; beyond ten degrees of freedom within 0.003
    (15: 2.1314, 30: 2.0423)."""
    assert sweep_results.student_t(2) == 4.303
    assert (abs(sweep_results.student_t(15) - 2.1314) < 0.003
            and abs(sweep_results.student_t(30) - 2.0423) < 0.003)

def test_interval_over_seeds():
    """Claim: mean +- t s / sqrt(n), by hand: 1, 2, 3 -> 2 +- 4.303 / sqrt(3)."""
    found = sweep_results.interval_over_seeds([1.0, 2.0, 3.0])
    close([found.mean, found.low, found.high],
          [2, 2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5], 1e-9)
    assert math.isnan(sweep_results.interval_over_seeds([1.0]).low)

def test_paired_difference():
    """Claim: seed by seed over common questions; a seed that one arm lacks does not count."""
    a = {0: {"x": True, "y": False}, 1: {"x": True, "y": True}, 2: {"x": True}}
    b = {0: {"x": True, "y": True}, 1: {"x": True, "y": True}}
    found = sweep_results.paired_difference(b, a)
    close([found.mean], [0.25], 1e-9)
    assert found.low < 0 < found.high
    assert sweep_results.paired_difference({5: {}}, a) is None

# -----------------------------------------------------------------------------
# the real thing

@pytest.mark.slow
def test_a_real_sweep(tmp_path):
    """Claim: two arms, a shared warm start, killed half way and run again: a table, whose arms
    began at the same accuracy."""
    import subprocess
    command = [sys.executable, "-m", "appendix.sweep", "kl_coef=0,0.01", "--seeds=0", "--steps=3",
               "--traces=oracle", "--sft-n=100", "--eval-n=10"]
    env = {**os.environ, "PYTHONPATH": sweep.ROOT}
    first = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("runs/sweeps/kl_coef/kl*/metrics.jsonl")):
        time.sleep(0.2)
    first.kill()
    first.wait()
    out = subprocess.run(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True,
                         check=True).stdout
    path = out.strip().splitlines()[-1]
    rows = json.load(open(tmp_path / path))
    assert len(rows) == 2 and rows[0]["accuracy_before"] == rows[1]["accuracy_before"]

# -----------------------------------------------------------------------------
# Do the tests bite? Each row puts one bug in; the named test must fail.

MUTATIONS = [
    ("appendix.sweep_results:interval_over_seeds", "len(values) ** 0.5",
     "len(values)", test_interval_over_seeds, {}),
    ("appendix.sweep_results:paired_difference", "evaluate.paired(first[seed], arm[seed])",
     "evaluate.paired(arm[seed], first[seed])", test_paired_difference, {}),
    ("appendix.sweep:warm_start_of", "json.dumps(facts, sort_keys=True)",
     "str(cfg.seed)", test_warm_starts_are_shared, {}),
    ("appendix.sweep:flags_of", "value.lower() == 'true'",
     "value.lower() == 'false'", test_arms, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {})
