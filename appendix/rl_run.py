"""What stands around the steps of an RL run: loading, measuring, saving, resuming, reporting.

The functions stand about in the order in which train_rl.py calls them. `cfg` is train_rl.Config.
"""
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field, replace

import torch

import data
import evaluate
import train_sft
import zoom_rollout
from appendix import memory, metrics, mixture, prefix, ranks, rl_options, run, terminal
from appendix.split import hold_out
from appendix.weights import largest_prompt_image
from model import is_tiny

# Fields that may change when a run is resumed.
FREE = ("resume", "fresh", "steps", "name", "save_every", "weights_only", "max_batch_tokens",
        "prefill_tokens", "compiled", "graphs", "micro_tokens", "recompute", "offload", "plain")
# Files of an earlier run: where one of them is in the folder, a new run does not start.
RESULTS = ("checkpoint", "metrics.jsonl", "summary.json")
# The run stops after this many steps in a row whose gradient was not finite.
PATIENCE = 5


@dataclass
class Progress:
    """Where a run stands. A checkpoint records all of it but the sections."""
    step: int = 0                                       # steps done
    seconds: float = 0.0                                # seconds spent by earlier processes
    before: dict = field(default_factory=dict)          # held-out summary by zoom mode, before RL
    sampled: int = 0                                    # episodes sampled by RL so far
    sections: list = field(default_factory=list)        # sections of the report: (title, episodes)


def run_folder(cfg):
    return os.path.join("runs", cfg.name)


def rollout_config(cfg, seed):
    """The part of the run's settings that decides how an episode unfolds."""
    config = run.pick_fields(cfg, zoom_rollout.RolloutConfig)
    return replace(config, style=data.PROMPT_STYLES[cfg.recipe], seed=seed)


def check_config(cfg, num_blind):
    """Refuse settings that cannot work, before any work starts.

    num_blind: prompts per step that may not zoom.
    """
    world = ranks.world_size()
    num_seeing = cfg.num_prompts - num_blind
    if cfg.data and cfg.traces == "oracle":
        run.fail("the oracle knows the toy world only: --data needs --traces mcts, "
                 "--traces FILE.jsonl, or --traces '' for none")
    if cfg.group_size < 2:
        run.fail("in a group of one no episode is better than the mean, so nothing is learned; "
                 "expected --group-size 2 or more")
    if cfg.graphs and not torch.cuda.is_available():
        run.fail("--graphs needs a CUDA device")
    if num_seeing < world:
        run.fail(f"{num_seeing} prompts that may zoom cannot be shared by {world} ranks; "
                 f"expected --num-prompts {world + cfg.blind_prompts} or more")


# --------------------------------------------------------------------------------------------------
# resume

def read_state(checkpoint):
    """state.json of a checkpoint folder, with the keys that a resumed run needs."""
    path = os.path.join(checkpoint, "state.json")
    if not os.path.exists(path):
        run.fail(f"nothing to resume in {checkpoint}")
    return run.read_json(path, "config", "step", "before", "seconds")


def resumable(checkpoint, cfg):
    """The state of a checkpoint, a dict. Only the settings in FREE may differ from those of cfg."""
    state = read_state(checkpoint)
    differences = []
    for key, value in asdict(cfg).items():
        there = state["config"].get(key)
        if key not in FREE and there != value:
            differences.append(f"{key} ({there!r} there, {value!r} here)")
    if cfg.steps < state["step"]:
        run.fail(f"{checkpoint} has done {state['step']} steps already; expected --steps "
                 f"{state['step']} or more")
    if differences:
        run.fail(f"{checkpoint} was made with other settings: {', '.join(differences)}")
    return state


# --------------------------------------------------------------------------------------------------
# models and memory

def load_policy(cfg):
    """The model that learns: the run's checkpoint with --resume, else --model."""
    name = os.path.join(run_folder(cfg), "checkpoint") if cfg.resume else cfg.model
    return prefix.load_vlm(name, plain=cfg.plain, device=cfg.device, dtype=cfg.dtype,
                           max_pixels=largest_prompt_image(name, cfg), recompute=cfg.recompute)


def check_disk(vlm, cfg):
    """End the run now if the disk cannot hold its checkpoints; print what a real model takes."""
    parameters = sum(p.numel() for p in vlm.model.parameters())
    trained = sum(p.numel() for p in vlm.parameters())
    weights = parameters * vlm.dtype.itemsize
    moments = 0 if cfg.weights_only else trained * memory.optimizer_bytes(vlm.dtype, cfg.offload)
    checkpoint = weights + moments
    # A new checkpoint is whole before the old one is deleted.
    needed = checkpoint if cfg.resume else 2 * checkpoint
    if cfg.kl_coef > 0 and not cfg.resume:
        needed += weights                               # the reference
    free = shutil.disk_usage(run_folder(cfg)).free
    what = (f"a checkpoint takes {checkpoint / 1e9:.1f} GB, and while a new one is written the old "
            f"one stays: {needed / 1e9:.1f} GB in all, {free / 1e9:.1f} GB are free")
    if not is_tiny(cfg.model):
        print(f"disk: {what}")
    if free < needed:
        run.fail(f"the disk of {run_folder(cfg)} is too small: {what}. --weights-only leaves out "
                 f"the optimizer ({weights / 1e9:.1f} GB a checkpoint), but then a stopped run "
                 "cannot be resumed")


def load_reference(vlm, cfg):
    """The frozen reference of the KL penalty: the policy as it was when the run began, or None."""
    if cfg.kl_coef == 0:
        return None
    path = os.path.join(run_folder(cfg), "reference")
    if not cfg.resume and ranks.rank() == 0:
        run.replace_folder(vlm.save(path), path)
    ranks.barrier()
    return prefix.load_vlm(path, plain=cfg.plain, device=cfg.device, dtype=cfg.dtype,
                           max_pixels=vlm.spec.max_pixels, quiet=True)


def memory_plan(vlm, cfg, samples, sizes):
    """What the run will need in bytes, by part; printed for a real model, with warnings.

    sizes: those of the samples' images, see memory.longest_prompt.
    """
    style = data.PROMPT_STYLES[cfg.recipe]
    prompt_tokens = memory.longest_prompt(vlm, samples, style, sizes)
    options = memory_options(vlm, cfg, prompt_tokens)
    plan = memory.memory_plan(vlm, options)
    if not is_tiny(cfg.model):
        memory.print_plan(plan, cfg.offload)
    memory.warn_if_too_large(plan, vlm.device, memory.knobs_for(plan, cfg.offload))
    warn_of_long_prompts(options)
    return plan


def memory_options(vlm, cfg, prompt_tokens):
    """The settings of one rank that decide how much memory it needs -> memory.MemoryOptions.

    prompt_tokens: of the longest prompt.
    """
    return memory.rollout_options(
        vlm, rollout_config(cfg, seed=0), math.ceil(cfg.num_prompts / ranks.world_size()),
        prompt_tokens, group_size=cfg.group_size, micro_tokens=cfg.micro_tokens,
        recompute=cfg.recompute, offload=cfg.offload, reference=cfg.kl_coef > 0,
        passes=2 if cfg.papo_coef > 0 else 1)


def warn_of_long_prompts(options):
    """Print a line if a prompt is longer than --micro-tokens: it is run once for each episode."""
    tokens = options.prompt_tokens
    if tokens <= options.micro_tokens:
        return
    whole_group = tokens + options.group_size * options.own_tokens
    print(f"warning: the longest prompt has {tokens} tokens, more than --micro-tokens "
          f"{options.micro_tokens}, so the update runs it anew for each of its "
          f"{options.group_size} episodes. --micro-tokens {whole_group} runs it once (with more "
          "memory); a smaller --max-pixels makes it shorter")


# --------------------------------------------------------------------------------------------------
# questions and the warm start

def split(cfg, side, rows):
    """-> (held-out samples, rows to train on). One row in ten of --data is held out.

    side: pixels of a side of a toy scene. The toy world has a test split of its own and no rows:
    training draws its scenes step by step. Raises DataError if all rows are about one image.
    """
    if not cfg.data:
        return mixture.toy_questions(cfg, "test", cfg.eval_n, cfg.seed, side), []
    n = min(cfg.eval_n, max(len(rows) // 10, 1))
    held_out, train_rows = hold_out(rows, n, cfg.seed)
    if not held_out:
        raise data.DataError(f"{cfg.data}: all rows share their images, so none can be held out; "
                             "expected rows about two images or more")
    return held_out, train_rows


def fine_tune_on_traces(vlm, train_rows, held_out, cfg):
    """The warm start, in place, if the run asks for one. train_rows, held_out: those of --data."""
    terminal.print_plan(cfg)
    if not cfg.traces:
        return
    began = time.time()
    defaults = {} if is_tiny(cfg.model) else train_sft.REAL
    sft = replace(
        train_sft.Config(**defaults), traces=cfg.traces, task=cfg.task, also=cfg.also,
        difficulty=cfg.difficulty, target=cfg.sft_target, corrected=cfg.sft_corrected, n=cfg.sft_n,
        epochs=cfg.sft_epochs, batch=cfg.sft_batch, lr=cfg.sft_lr, seed=cfg.seed,
        max_zooms=cfg.max_zooms, micro_tokens=cfg.micro_tokens, offload=cfg.offload,
        plain=cfg.plain)
    style = data.PROMPT_STYLES[cfg.recipe]
    losses, traces = train_sft.warm_start(vlm, sft, style, train_rows, vlm.toy_side, held_out)
    rl_options.warn_of_long_turns(vlm, traces, cfg.max_new_tokens)
    print(f"warm start: {len(traces)} traces, loss {losses[0]:.2f} -> {losses[-1]:.2f}, "
          f"{time.time() - began:.0f} s")


# --------------------------------------------------------------------------------------------------
# measure

@dataclass
class Measurement:
    """The held-out questions in one zoom mode."""
    summary: dict                                       # evaluate.summarise(rows)
    rows: list                                          # one per question, of all ranks
    episodes: list                                      # of this rank


def measure(vlm, cfg, samples, label, modes=None):
    """Held-out accuracy in each zoom mode, sampled as in training -> {mode: Measurement}.

    modes: those to ask in (default: zoom_modes); without a zoom tool "on" is the only one.
    """
    can_zoom = data.PROMPT_STYLES[cfg.recipe] == "zoom"
    modes = (modes or zoom_modes(cfg)) if can_zoom else ["on"]
    options = evaluate.RunOptions(recipe=cfg.recipe, plain=cfg.plain)
    out = {}
    for mode in modes:
        config = replace(rollout_config(cfg, cfg.seed), zoom=mode)
        episodes = evaluate.run_episodes(vlm, samples, config, options)
        rows = ranks.gather(evaluate.summary_rows(episodes))
        out[mode] = Measurement(evaluate.summarise(rows), rows, episodes)
    shares = []
    for mode, measured in out.items():
        s = measured.summary
        what = f"zoom {mode}" if can_zoom else "accuracy"
        shares.append(f"{what} {s['accuracy']:.1%} [{s['low']:.1%}, {s['high']:.1%}]")
    print(f"{label}: {'; '.join(shares)}")
    return out


def zoom_modes(cfg):
    """All modes, but "wrong" only if the run asks for it."""
    return [mode for mode in evaluate.MODES if mode != "wrong" or cfg.eval_wrong]


def measure_before(vlm, cfg, samples):
    """`measure`, and one question that is answered wrong is shown."""
    measured = measure(vlm, cfg, samples, "before RL")
    episodes = measured["on"].episodes
    terminal.print_example(episodes, "before RL", terminal.wrong_one(episodes))
    return measured


# --------------------------------------------------------------------------------------------------
# during the run

def stop_if_nothing_succeeds(episodes, step):
    """End the run after its first step if no rollout of any rank had any success."""
    if step > 0:
        return
    successes = sum(e.reward_components["accuracy"] > 0 for e in episodes)
    successes, rollouts = ranks.all_reduce([successes, len(episodes)])
    if successes > 0:
        return
    form = sum(e.reward_components["format"] for e in episodes) / len(episodes)
    run.fail(f"none of the {rollouts:.0f} rollouts of the first step has any success, so there is "
             f"nothing to reinforce (each group's advantages are 0). Mean format {form:.2f}. "
             "Warm-start on traces (--traces) or on more of them (--sft-n, --sft-epochs), or take "
             "easier questions.")


class RunLog:
    """Writes and prints each step, saves checkpoints, and stops a run that cannot go on."""

    def __init__(self, vlm, optimizer, cfg, progress, began):
        self.vlm = vlm
        self.optimizer = optimizer
        self.cfg = cfg
        self.progress = progress
        self.began = began                              # time at which this process began
        self.saved = progress.step                      # step of the last checkpoint
        self.skipped = 0                                # steps in a row without a finite gradient
        self.clock = metrics.Clock(progress.step, cfg.steps)
        self.interrupt = run.Interrupt()

    def begin(self, held_out):
        """Cut the logs to the steps done, write config.json; resume the optimizer or save.

        config.json holds the settings and, with --data, the ids of the held-out rows.
        """
        for name in ("metrics.jsonl", "episodes.jsonl"):    # later steps are run again
            run.keep_rows_before(self.path(name), self.progress.step)
        for name in ("summary.json", "report.html"):        # of a run that had come to its end
            if ranks.rank() == 0 and os.path.exists(self.path(name)):
                os.remove(self.path(name))
        config = asdict(self.cfg)
        if self.cfg.data:
            config["held_out"] = [s.id for s in held_out]
        run.write_json(self.path("config.json"), config)
        ranks.barrier()
        if self.cfg.resume:
            run.load_checkpoint(self.path("checkpoint"), self.optimizer)
        else:
            self.save(0)                                # keeps the warm start, which takes long

    def path(self, name):
        return os.path.join(run_folder(self.cfg), name)

    def save(self, step):
        seconds = self.progress.seconds + time.time() - self.began
        state = {"step": step, "config": asdict(self.cfg), "before": self.progress.before,
                 "seconds": seconds, "sampled": self.progress.sampled}
        run.save_checkpoint(
            self.path("checkpoint"), self.vlm, self.optimizer, state, self.cfg.weights_only)
        self.saved = step

    def stop_if_not_finite(self, episodes, step):
        """End the run if weights, log-probabilities or rewards are infinite or nan, on any rank."""
        weights = torch.stack([p.detach().sum() for p in self.vlm.parameters()])
        broken = not torch.isfinite(weights).all()
        for e in episodes:
            broken = broken or not math.isfinite(sum(e.logprobs) + e.reward_components["reward"])
        if any(ranks.gather([bool(broken)])):
            run.fail(f"step {step + 1} left weights, log-probabilities or rewards that are not "
                     "finite, so nothing more can be learned; try a smaller --lr. The checkpoint "
                     f"of step {self.saved} is as it was: {self.path('checkpoint')}")

    def write(self, row, episodes):
        """Print the step; append its metrics, and its best and its worst episode."""
        minutes_left = self.clock.minutes_left(row["step"])
        print(metrics.log_line(row, self.cfg.steps, minutes_left), flush=True)
        run.append_rows(self.path("metrics.jsonl"), [row])
        picked = best_and_worst(episodes)
        describe(picked, self.cfg)
        records = [{"step": row["step"], **evaluate.record(e)} for e in picked]
        run.append_rows(self.path("episodes.jsonl"), records)

    def stops_after(self, row):
        """Save when it is time -> True if Ctrl-C asked the run to stop.

        Ends the program after PATIENCE steps in a row without a finite gradient.
        """
        self.progress.sampled += round(row["sampled"])
        self.skipped = self.skipped + 1 if row["skipped"] else 0
        if self.skipped == PATIENCE:
            run.fail(self.diverged())
        done = row["step"] + 1
        stopping = ranks.all_reduce([int(self.interrupt.asked)])[0] > 0         # on any rank
        if done % self.cfg.save_every == 0 or self.is_over(done) or stopping:
            self.save(done)
        if stopping:
            print(f"stopped and saved; continue with: --name {self.cfg.name} --resume")
        return stopping

    def is_over(self, done):
        """Is RL over after so many steps: all of --steps, or --max-episodes sampled?"""
        limit = self.cfg.max_episodes
        return done == self.cfg.steps or 0 < limit <= self.progress.sampled

    def diverged(self):
        return (f"the gradient was not finite in {PATIENCE} steps in a row, so nothing was learned "
                f"in them and nothing will be. Look at {self.path('metrics.jsonl')}: a growing "
                "grad_norm asks for a smaller --lr, a large logp_gap for --dtype float32. "
                f"The checkpoint of step {self.saved} is as it was")


def describe(episodes, cfg):
    """Count what the episodes did, except with --plain."""
    if not cfg.plain:
        from appendix import analysis
        analysis.describe(episodes)


def best_and_worst(episodes):
    """The episodes with the highest and the lowest reward."""
    best = max(episodes, key=lambda e: e.reward_components["reward"])
    worst = min(episodes, key=lambda e: e.reward_components["reward"])
    return [best, worst]


# --------------------------------------------------------------------------------------------------
# the end

def groups_to_show(earlier, step, episodes, cfg):
    """The groups of the report: of the first and of the latest step that had a signal.

    -> [(steps done, the episodes of a group)], at most two. earlier: the same of the steps before.
    Of a step, the group whose advantages differ most is shown; if all are 0, there is no signal.
    """
    G = cfg.group_size
    groups = [episodes[i:i + G] for i in range(0, len(episodes), G)]
    group = max(groups, key=advantage_range)
    if advantage_range(group) == 0:
        return earlier
    light = []                                          # without views, whose features are large
    for e in group:
        shown_as = {"crop_from": cfg.crop_from, "fed": e.views[0].fed}
        light.append(replace(e, views=[], shown_as=shown_as))
    return earlier[:1] + [(step + 1, light)]


def advantage_range(group):
    advantages = [e.advantage for e in group]
    return max(advantages) - min(advantages)


def finish(vlm, held_out, run_log, groups, planned_bytes):
    """Measure again; write summary.json and report.html; print the results."""
    cfg = run_log.cfg
    progress = run_log.progress
    after = measure(vlm, cfg, held_out, "after RL")
    if ranks.rank() > 0:
        return
    for _, episodes in progress.sections[:1]:           # none after --resume
        terminal.print_example(after["on"].episodes, "after RL", terminal.wrong_one(episodes))
    folder = run_folder(cfg)
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as f:
        curves = [json.loads(line) for line in f]
    summaries = {mode: measured.summary for mode, measured in after.items()}
    seconds = progress.seconds + time.time() - run_log.began
    summary = metrics.summarise_run(progress.before, summaries, held_out, curves, seconds)
    run.write_rows(os.path.join(folder, "held_out.jsonl"), held_out_rows(after))
    run.write_json(os.path.join(folder, "summary.json"), summary)
    metrics.print_results(progress.before, summaries, summary, curves)
    page = "summary.json has the figures"
    if not cfg.plain:
        write_report(run_log, after, groups, curves, summary)
        page = "report.html shows the episodes"
    planned = "" if is_tiny(cfg.model) else f" (planned {planned_bytes / 1e9:.1f})"
    print(f"{summary['seconds']:.0f} s in all, peak memory {memory.peak_memory() / 1e9:.2f} GB"
          f"{planned}; {folder}/{page}")
    terminal.print_next(cfg)


def held_out_rows(after):
    """{mode: Measurement} -> the rows of held_out.jsonl: was this question answered right?"""
    rows = []
    for mode, measured in after.items():
        for row in measured.rows:
            right = evaluate.is_right(row, row.get("benchmark"))
            rows.append({"mode": mode, "id": row["id"], "right": right})
    return rows


def write_report(run_log, after, groups, curves, summary):
    """runs/NAME/report.html: curves, the table of accuracies, groups, episodes before and after.

    summary: the content of summary.json.
    """
    from appendix import group_view, report
    cfg = run_log.cfg
    before = run_log.progress.before
    sections = list(run_log.progress.sections)
    lessons = [group_view.make_lesson(step, group, cfg) for step, group in groups]
    for step, group in groups[-1:]:
        for e in group:
            e.token_texts = evaluate.token_texts(run_log.vlm, e)
        describe(group, cfg)
        sections.append((f"one group of step {step}", group))
    for mode, measured in after.items():
        label = evaluate.mode_label(mode, can_zoom=len(after) > 1)
        sections.append((f"after RL, {label}", measured.episodes))
    modes = list(after)
    table = [("", [evaluate.mode_label(mode, can_zoom=len(modes) > 1) for mode in modes]),
             ("before RL", [before[mode] for mode in modes]),
             ("after RL", [after[mode].summary for mode in modes])]
    settings = asdict(cfg)
    for name in ("name", "resume", "fresh"):            # the name stands in the title
        settings.pop(name)
    changed = {k: v for k, v in settings.items() if v != getattr(type(cfg), k)}
    question = os.path.basename(cfg.data) if cfg.data else cfg.task
    page = report.Report(title=f"{run_log.vlm.name} learns {question}", sections=sections,
                         curves=curves, table=table, settings=changed, run=cfg.name,
                         num_questions=summary["n"], chance=summary["chance"],
                         notes=report_notes(modes, groups), lessons=lessons)
    report.write_report(os.path.join(run_folder(cfg), "report.html"), page)


def report_notes(modes, groups=()):
    """What the parts of the report show -> {label of a row, column or section: sentence}.

    modes: the zoom modes that were measured. If it is one, there is no control.
    groups: see groups_to_show.
    """
    notes = {
        "before RL": "The policy before the first RL step; after the warm start, if there is one.",
        "after RL": "The policy after the last RL step, asked the same questions. They are held "
                    "out: no step has trained on them.",
    }
    if len(modes) > 1:
        notes |= metrics.control_notes()
        for mode in modes:
            notes[f"after RL, {evaluate.MODES[mode]}"] = metrics.CONTROLS[mode]
    for step, _ in groups:
        notes[f"one group of step {step}"] = ("Tries at one question of a training step, with the "
                                              "advantage that every token of a try got.")
    return notes
