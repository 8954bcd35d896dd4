"""Ablations in one command: every combination of some settings, over several seeds, as a table.

    python -m appendix.sweep kl_coef=0,0.01 --seeds 0,1 --steps 20
    python -m appendix.sweep loss=grpo,gspo num_minibatches=1,4 --seeds 0,1,2 --task relation
    python -m appendix.sweep --list                     # the studies: claims put to the test
    python -m appendix.sweep --study zoom               # one of them (appendix/studies.py)

FIELD=V1,V2 names a setting of train_rl.py (its flag, with underscores) and its values. An arm is
one combination; every arm runs once per seed, one thread per run, as many runs at once as there are
cores (on a GPU: one). All other flags go to every run. Arms that begin alike share one warm start
per seed. All arms of a seed answer the same held-out questions.

Results go to runs/sweeps/NAME: table.md, table.json, curves.svg, a folder per run, and logs/. After
a stop the same command goes on.
"""
import argparse
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from io import StringIO

import torch
from tqdm import tqdm

import train_rl
import train_sft
from appendix import recipes, run, sweep_results
from appendix.files import DataError
from model import MODELS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What determines a warm start. Runs that agree in all of these share one.
WARM = ("model", "seed", "task", "also", "difficulty", "data", "images", "recipe", "max_pixels",
        "traces", "sft_target", "sft_corrected", "sft_n", "sft_epochs", "sft_batch", "sft_lr",
        "max_zooms", "dtype")
SEEDS = "0,1,2"                 # unless --seeds says otherwise
# Settings that the sweep itself decides.
OURS = ("name", "seed", "resume", "fresh")
# About how long a part takes on one core while the other is busy, too, in seconds.
SECONDS_PER_EPISODE = {         # of an RL step, sampling and update, per episode
    "search": 0.01, "boxes": 0.015, "find": 0.015, "video": 0.015}
SECONDS_PER_SHORT_EPISODE = 0.006                       # of the other tasks
SECONDS_PER_ANSWER = 0.03       # of a measurement, per held-out question, all zoom modes
SECONDS_PER_TRACE = {"mcts": 0.3, "path": 0.2, "oracle": 0.05}
SECONDS_TO_START = 8


@dataclass(frozen=True)
class Arm:
    """One combination of settings. flags: {field of train_rl.Config: value as text}."""
    label: str
    flags: dict


@dataclass(frozen=True)
class Plan:
    """What a sweep runs. shared: command-line flags of train_rl.py for every run."""
    name: str
    arms: list
    seeds: list
    shared: list


@dataclass(frozen=True)
class Job:
    """A script that a Pool runs for one arm and seed. argv: its command line."""
    arm: str
    seed: int
    name: str                   # its folder below runs/
    argv: list
    config: object              # the script's Config

    @property
    def folder(self):
        return os.path.join("runs", self.name)

    @property
    def is_done(self):
        return os.path.exists(os.path.join(self.folder, "summary.json"))


@dataclass(frozen=True)
class Run(Job):
    """A run of train_rl.py. argv: without --name."""

    @property
    def steps(self):
        """Its length on the progress bar; a warm start is one step long."""
        return max(self.config.steps, 1)

    def command(self):
        """The command line that begins it or, if it was stopped, continues it."""
        stopped = os.path.exists(os.path.join(self.folder, "checkpoint"))
        go_on = "--resume" if stopped else "--fresh"
        return ["train_rl.py", *self.argv, f"--name={self.name}", go_on]


# --------------------------------------------------------------------------------------------------
# the plan: arms, seeds, runs, warm starts

def arms_of(axes):
    """["kl_coef=0,0.01", "lr=1e-4"] -> list[Arm], every combination. Raises DataError."""
    known = {f.name for f in fields(train_rl.Config)}
    names = [axis.partition("=")[0] for axis in axes]
    choices = []                                        # for each axis: [(field, value)]
    for axis in axes:
        name, _, values = axis.partition("=")
        if names.count(name) > 1:
            raise DataError(f"{name} is named twice; expected all of its values after one {name}=")
        if name not in known or name in OURS:
            raise DataError(f"{axis!r} sweeps no setting of train_rl.py; expected FIELD=V1,V2 "
                            "with a FIELD such as kl_coef (train_rl.py --help lists all)")
        values = values.split(",")
        if len(set(values)) < len(values):
            raise DataError(f"{axis!r} names a value twice")
        choices.append([(name, value) for value in values])
    arms = []
    for combination in itertools.product(*choices):
        label = " ".join(f"{name}={value}" for name, value in combination)
        arms.append(Arm(label or "default", dict(combination)))
    return arms


def flags_of(arm):
    """The settings of an arm as command-line flags of train_rl.py."""
    types = {f.name: f.type for f in fields(train_rl.Config)}
    argv = []
    for name, value in arm.flags.items():
        flag = run.flag_of(name)
        if types[name] is bool:
            if value.lower() not in ("true", "false"):
                raise DataError(f"{name}={value}: expected true or false")
            argv.append(flag if value.lower() == "true" else flag.replace("--", "--no-", 1))
        else:
            argv.append(f"{flag}={value}")
    return argv


def parsed(argv):
    """Command-line flags of train_rl.py -> its Config. A bad flag ends the program."""
    with redirect_stdout(StringIO()):
        cfg = run.parse_config(train_rl.Config, argv, train_rl.__doc__, presets=recipes.presets,
                               positive=train_rl.POSITIVE)
    return cfg


def runs_of(plan):
    """-> (list[Run] of the arms, list[Run] of the warm starts they need)."""
    runs = []
    warm_starts = {}                                    # {digest: Run}
    for seed in plan.seeds:
        for arm in plan.arms:
            argv = [*plan.shared, *flags_of(arm), f"--seed={seed}"]
            cfg = parsed(argv)
            if cfg.traces:
                warm = warm_start_of(plan, argv, cfg)
                warm_starts[warm.name] = warm           # the same for all arms that begin alike
                argv = argv + [f"--model={warm.folder}/checkpoint", "--traces="]
            name = f"sweeps/{plan.name}/{slug(arm.label)}-seed{seed}"
            runs.append(Run(arm.label, seed, name, argv, cfg))
    return runs, list(warm_starts.values())


def warm_start_of(plan, argv, cfg):
    """The Run that makes the warm start of an arm: train_rl.py without RL steps."""
    facts = {name: getattr(cfg, name) for name in WARM}
    facts["recipe"] = train_sft.recipe_of(cfg)
    if cfg.data:
        facts["eval_n"] = cfg.eval_n                    # decides which rows are held out
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    questions = [] if cfg.data else ["--eval-n=1"]
    name = f"sweeps/{plan.name}/warm-{digest}-seed{cfg.seed}"
    argv = [*argv, "--steps=0", *questions]
    return Run("warm start", cfg.seed, name, argv, replace(cfg, steps=0))


def slug(label):
    """A label as the name of a folder."""
    return re.sub(r"[^\w=.+-]+", "_", label).strip("_")


# --------------------------------------------------------------------------------------------------
# how long it will take

def estimated_seconds(runs, warm_starts, at_once):
    """A guess of the time for what is not done yet, good to a factor of two."""
    missing = [r for r in runs if not r.is_done]
    return seconds_of(missing, [warm for warm in warm_starts if not warm.is_done]) / at_once


def seconds_of(runs, warm_starts):
    """A guess of the time that these take on one core."""
    total = 0.0
    for warm in warm_starts:
        per_trace = SECONDS_PER_TRACE.get(warm.config.traces, 0.01)
        total += SECONDS_TO_START + per_trace * warm.config.sft_n
    for r in runs:
        cfg = r.config
        per_episode = SECONDS_PER_EPISODE.get(cfg.task, SECONDS_PER_SHORT_EPISODE)
        total += SECONDS_TO_START + per_episode * cfg.num_prompts * cfg.group_size * cfg.steps
        total += 2 * SECONDS_PER_ANSWER * cfg.eval_n
    return total


def in_words(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# --------------------------------------------------------------------------------------------------
# run them

class Pool:
    """Runs jobs as processes, some at once. Ctrl-C stops them; each saves what it has."""

    def __init__(self, at_once):
        self.at_once = at_once
        self.processes = set()
        self.stopping = threading.Event()

    def run_all(self, runs, label):
        """Run all that are not done -> [(Run, message)] of those that failed."""
        missing = [r for r in runs if not r.is_done]
        if not missing:
            return []
        failed = []
        total = sum(r.steps for r in missing)
        with ThreadPoolExecutor(self.at_once) as threads:
            waiting = {threads.submit(self.run_one, r): r for r in missing}
            try:
                with tqdm(total=total, desc=label, unit=" steps", disable=None) as bar:
                    while not all(future.done() for future in waiting):
                        bar.update(steps_done(missing) - bar.n)
                        time.sleep(0.5)
            except KeyboardInterrupt:
                self.stop()
                raise
            for future, r in waiting.items():
                message = future.result()
                if message:
                    failed.append((r, message))
        return failed

    def run_one(self, r):
        """Run one -> "" if it came to its end, else the last line that it said."""
        while is_worked_in(r.folder) and not self.stopping.is_set():
            time.sleep(1)
        if self.stopping.is_set():
            return "stopped"
        if r.is_done:
            return ""
        script, *flags = r.command()
        command = [sys.executable, os.path.join(ROOT, script), *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = log_path(r)
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, "a", encoding="utf-8") as f:
            process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=env,
                                       start_new_session=True)      # Ctrl-C is ours to pass on
            self.processes.add(process)
            status = process.wait()
            self.processes.discard(process)
        if status == 0 and r.is_done:
            return ""
        return last_line(log) or f"status {status}"

    def stop(self):
        """Ask every process to save and stop, as Ctrl-C would."""
        self.stopping.set()
        for process in list(self.processes):
            process.send_signal(signal.SIGINT)


def is_worked_in(folder):
    """Does a process work in the folder? A run may outlive a sweep that was killed."""
    text = run.text_of_lock(os.path.join(folder, "lock"))
    try:
        owner = json.loads(text)
    except ValueError:                                  # no lock, or it is just being written
        return False
    return run.is_running(owner["process"])


def log_path(r):
    sweep, _, leaf = r.name.rpartition("/")
    return os.path.join("runs", sweep, "logs", leaf + ".log")


def last_line(path):
    with open(path, encoding="utf-8", errors="replace") as f:
        lines = [line.strip() for line in f if line.strip()]
    return lines[-1] if lines else ""


def steps_done(runs):
    """Steps that these runs have done so far."""
    done = 0
    for r in runs:
        if r.is_done:
            done += r.steps
        elif os.path.exists(os.path.join(r.folder, "metrics.jsonl")):
            with open(os.path.join(r.folder, "metrics.jsonl"), encoding="utf-8") as f:
                done += min(sum(1 for _ in f), r.steps)
    return done


# --------------------------------------------------------------------------------------------------
# one sweep

def sweep(plan, at_once):
    """Run what is missing, write and print the table -> (list[Run] that are done, failed ones).

    The failed ones are (Run, message).
    """
    runs, warm_starts = runs_of(plan)
    folder = run.make_dir(os.path.join("runs", "sweeps", plan.name))
    run.lock(folder)
    check_same_sweep(folder, plan)
    seconds = estimated_seconds(runs, warm_starts, at_once)
    print(f"{len(plan.arms)} arms x {len(plan.seeds)} seeds = {len(runs)} runs, "
          f"{len(warm_starts)} warm starts, {at_once} at once; "
          f"about {in_words(seconds)} for what is missing")
    pool = Pool(at_once)
    failed = pool.run_all(warm_starts, "warm starts")
    if failed:
        r, message = failed[0]
        raise DataError(f"a warm start failed ({message}); its log is {log_path(r)}")
    failed = pool.run_all(runs, "runs")
    for r, message in failed:
        print(f"{r.arm}, seed {r.seed} failed: {message} ({log_path(r)})")
    done = [r for r in runs if r.is_done]
    if not done:
        raise DataError("no run came to its end, so there is nothing to compare")
    sweep_results.write(folder, plan, done, failed)
    return done, failed


def check_same_sweep(folder, plan):
    """Refuse to mix runs of other settings under one name. Arms and seeds may be added."""
    path = os.path.join(folder, "sweep.json")
    arms = {arm.label: arm.flags for arm in plan.arms}
    now = {"shared": plan.shared, "arms": arms, "base": digest_of_base()}
    if os.path.exists(path):
        there = run.read_json(path, "shared", "arms", "base")
        if there["base"] != now["base"]:
            raise DataError(f"{folder} holds runs of another shipped checkpoint; take another "
                            "--name, or remove that folder")
        common = there["arms"].keys() & now["arms"].keys()
        same_arms = all(there["arms"][label] == now["arms"][label] for label in common)
        if there["shared"] != now["shared"] or not same_arms:
            raise DataError(f"{folder} holds a sweep with other flags "
                            f"({' '.join(there['shared']) or 'none'}); take another --name, or "
                            "remove that folder")
        now["arms"] = there["arms"] | now["arms"]
    run.write_json(path, now)


def digest_of_base():
    """The first characters of the SHA-256 of the shipped weights, from which the runs began."""
    with open(os.path.join(MODELS["tiny"].path, "model.safetensors"), "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:12]


# --------------------------------------------------------------------------------------------------
# the command line

def parse(argv=None):
    """-> (namespace of our own flags, axes, flags of train_rl.py)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    axes = [word for word in argv if re.match(r"\w+=", word)]
    parser = run.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("--seeds", default="", help=f"seeds (default: {SEEDS}, or a study's own)")
    parser.add_argument("--name", default="", help="name of the sweep (default: from the fields)")
    parser.add_argument("--study", default="", help="run the study of this name")
    parser.add_argument("--list", action="store_true", help="print all studies")
    parser.add_argument("--record", action="store_true",
                        help="keep the study's results in appendix/studies, and write studies.md")
    parser.add_argument("--at-once", type=int, default=0,
                        help="runs at a time; 0: one per core, on a GPU one")
    args, shared = parser.parse_known_args([word for word in argv if word not in axes])
    return args, axes, shared


def seeds_of(text):
    """"0,1,2" -> [0, 1, 2]. Raises DataError."""
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise DataError(f"--seeds is {text!r}; expected different numbers such as 0,1,2")
    return [int(word) for word in words]


def default_at_once(shared):
    on_gpu = torch.cuda.is_available() and parsed(shared).device != "cpu"
    return 1 if on_gpu else len(os.sched_getaffinity(0))


def main(argv=None):
    args, axes, shared = parse(argv)
    for word in shared:
        if word.split("=")[0].removeprefix("--").replace("-", "_") in OURS:
            raise DataError(f"{word} is decided by the sweep; see --name and --seeds")
    if args.study or args.list:
        from appendix import studies
        studies.run_command(args, axes, shared)
        return
    if args.record:
        raise DataError("--record keeps the results of a study; name one with --study")
    if not axes:
        raise DataError("nothing to sweep; expected FIELD=V1,V2 such as kl_coef=0,0.01, "
                        "or --study NAME (--list prints all)")
    swept = [axis.partition("=")[0] for axis in axes]
    name = args.name or "-".join(swept)
    plan = Plan(name, arms_of(axes), seeds_of(args.seeds or SEEDS), shared)
    sweep(plan, args.at_once or default_at_once(shared))


if __name__ == "__main__":
    SAVED = "finished runs are kept and others go on from their checkpoints: the same command"
    with run.exit_on_error(interrupted=f"interrupted; {SAVED}", saved=SAVED):
        main()
