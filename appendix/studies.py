"""Claims of papers, each put to the test by a small experiment, with a verdict by a fixed rule.

    python -m appendix.sweep --list                     # all studies
    python -m appendix.sweep --study zoom               # run one of them on two cores
    python -m appendix.sweep --study zoom --seeds 0 --steps 5           # a trial
    python -m appendix.studies                          # studies.md and the README's table

appendix/study_list.py says what each study claims, what it runs, and which difference matters; it
was written before the runs. A study is a sweep (appendix/sweep.py) whose arms have names. Its
checkpoints may be evaluated further (`Study.evaluate`). Results go to runs/sweeps/study-NAME; with
--record they are kept in appendix/studies/NAME.json, and appendix/studies.md is written from these
files.

The rule. For every seed take the difference that the claim speaks of, so that above 0 speaks for
it. Over the seeds this gives a mean and its 95 % interval [low, high], by Student's t. `least` is
the smallest difference that matters:

    holds here                     low > 0 and mean >= least
    does not hold here             high < least
    not decided by these seeds     anything else, or fewer than two seeds
"""
import argparse
import math
import operator
import os
import re
import shlex
import shutil
import statistics
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO

import torch

import data
import evaluate
import grpo
import train_sft
from appendix import run, study_list, sweep, sweep_results
from appendix.files import DataError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RECORDS = os.path.join(ROOT, "appendix", "studies")
PAGE = os.path.join(ROOT, "appendix", "studies.md")
README = os.path.join(ROOT, "README.md")
# The README's table stands between these lines.
BEGIN = "<!-- studies -->"
END = "<!-- end of studies -->"

HOLDS = "holds here"
FAILS = "does not hold here"
OPEN = "not decided by these seeds"
# Settings of a run with which its checkpoint is evaluated further, unless the study says otherwise.
SAME = ("task", "difficulty", "seed", "crop_from", "temperature", "max_zooms", "max_new_tokens",
        "max_pixels")


# --------------------------------------------------------------------------------------------------
# the plan of a study

def find(name):
    for study in study_list.STUDIES:
        if study.name == name:
            return study
    known = ", ".join(study.name for study in study_list.STUDIES)
    raise DataError(f"there is no study {name!r}; expected one of {known}")


def plan_of(study, seeds=None, more=()):
    """A Study -> sweep.Plan. more: flags of train_rl.py for every run of a trial."""
    arms = []
    for label, text in study.arms.items():
        settings = settings_of(text)
        # A flag of the trial wins over the arm's, but an arm with steps=0 keeps that.
        for name in fields_of(more) & settings.keys():
            if (name, settings[name]) != ("steps", "0"):
                del settings[name]
        arms.append(sweep.Arm(label, settings))
    shared = [*shlex.split(study.shared), *more]
    # A trial has a folder of its own.
    name = sweep.slug("-".join([f"study-{study.name}", *more]))
    return sweep.Plan(name, arms, seeds or list(study.seeds), shared)


def fields_of(flags):
    """["--sft-n", "8", "--steps=1"] -> {"sft_n", "steps"}"""
    names = [word.split("=")[0] for word in flags if word.startswith("--")]
    return {name.removeprefix("--").replace("-", "_") for name in names}


def settings_of(text):
    """"traces= loss=gspo" -> {"traces": "", "loss": "gspo"}"""
    return dict(word.split("=", 1) for word in text.split())


@dataclass(frozen=True)
class Evaluation(sweep.Job):
    """A run of evaluate.py on the checkpoint of a run of a study."""
    steps: int = 1              # its length on the progress bar

    def command(self):
        return ["evaluate.py", *self.argv]


def evaluations_of(study, runs):
    """The further evaluations of finished runs -> list[Evaluation]."""
    found = []
    for r in runs:
        for label, flags in study.evaluate.items():
            if not is_asked_for(study, r.arm, label):
                continue
            settings = [f"{run.flag_of(name)}={getattr(r.config, name)}" for name in SAME]
            style = data.PROMPT_STYLES[train_sft.recipe_of(r.config)]
            name = f"{r.name}/{sweep.slug(label)}"
            argv = [f"--checkpoint={r.folder}/checkpoint", *settings, f"--style={style}",
                    f"--n={r.config.eval_n}", "--drawn=0", *shlex.split(flags),
                    f"--out=runs/{name}"]
            with redirect_stdout(StringIO()):           # a bad flag ends the program here
                config = run.parse_config(evaluate.Config, argv, presets=evaluate.presets)
            found.append(Evaluation(r.arm, r.seed, name, argv, config))
    return found


def is_asked_for(study, arm, label):
    """Does the table, or a claim about this arm, name a figure of this evaluation?"""
    formulas = list(study.show)
    formulas += [claim.figure for claim in study.claims if arm in (claim.arm, claim.than)]
    figures = [figure for formula in formulas for figure in re.split(" [-/] ", formula)]
    return any(figure.startswith(f"{label}.") for figure in figures)


# --------------------------------------------------------------------------------------------------
# figures and verdicts

def value_at(row, path):
    """"levels.search.zooms" -> row["levels"]["search"]["zooms"]. Raises KeyError."""
    for key in path.split("."):
        row = row[key]
    return row


def figure_of(row, formula):
    """A figure of a run: a path into its summaries, or "a - b", or "a / b". Raises KeyError."""
    for sign, combine in ((" - ", operator.sub), (" / ", operator.truediv)):
        if sign in formula:
            left, right = formula.split(sign)
            return combine(value_at(row, left), value_at(row, right))
    return value_at(row, formula)


def differences(claim, rows):
    """The claim's difference for each seed that has it -> {seed: number}. Above 0 speaks for it."""
    values = {}                                         # {(arm, seed): figure}
    for row in rows:
        if row["arm"] in (claim.arm, claim.than):
            values[row["arm"], row["seed"]] = row["figures"].get(claim.figure)
    found = {}
    for (arm, seed), value in values.items():
        other = values.get((claim.than, seed)) if claim.than else 0.0
        if arm == claim.arm and value is not None and other is not None:
            sign = -1 if claim.falls else 1
            found[seed] = sign * (value - other) + claim.handicap
    return found


def verdict_of(interval, least):
    """sweep_results.Interval -> the verdict, by the rule."""
    if math.isnan(interval.low):
        return OPEN
    if interval.low > 0 and interval.mean >= least:
        return HOLDS
    return FAILS if interval.high < least else OPEN


def judge(claim, rows):
    """-> {"mean", "low", "high", "seeds", "verdict"}; a number that there is not is None."""
    found = list(differences(claim, rows).values())
    if len(found) < 2:
        mean = found[0] if found else None
        return {"mean": mean, "low": None, "high": None, "seeds": len(found), "verdict": OPEN}
    interval = sweep_results.interval_over_seeds(found)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high,
            "seeds": len(found), "verdict": verdict_of(interval, claim.least)}


def formulas_of(study):
    """The figures that the study's table and claims need, each once."""
    names = ["accuracy_before", "accuracy_after", *study.show]
    return list(dict.fromkeys(names + [claim.figure for claim in study.claims]))


def row_of(study, r, evaluations):
    """A finished run -> {"arm", "seed", "figures": {formula: number}}, without what it lacks."""
    summary = sweep_results.figures_of(r)
    for evaluation in evaluations:
        if (evaluation.arm, evaluation.seed) == (r.arm, r.seed) and evaluation.is_done:
            label = evaluation.name.rpartition("/")[2]
            path = os.path.join(evaluation.folder, "summary.json")
            summary[label] = run.read_json(path, "accuracy")
    figures = {}
    for formula in formulas_of(study):
        try:
            figures[formula] = round(float(figure_of(summary, formula)), 6)
        except (KeyError, ZeroDivisionError):           # no arm without zooms has zoom controls
            continue
    return {"arm": r.arm, "seed": r.seed, "figures": figures}


# --------------------------------------------------------------------------------------------------
# run a study

def run_command(args, axes, more):
    """`python -m appendix.sweep --study` and `--list`. args, axes, more: see sweep.parse."""
    if axes:
        raise DataError(f"a study has arms of its own; leave out {axes[0]}")
    if args.list:
        print_list()
        return
    study = find(args.study)
    if args.name:
        raise DataError("a study has a name of its own; leave out --name")
    if args.record and (more or args.seeds):
        raise DataError("--record keeps a study as it is written: leave out --seeds and all flags "
                        f"of train_rl.py ({' '.join(more)})")
    seeds = sweep.seeds_of(args.seeds) if args.seeds else None
    run_study(study, plan_of(study, seeds, more), args)


def run_study(study, plan, args):
    """Run what is missing, print the verdicts, write record.json; with --record keep it."""
    for claim in study.claims:
        print(f"claim: {claim.says}")
    at_once = args.at_once or sweep.default_at_once(plan.shared)
    done, failed = sweep.sweep(plan, at_once)
    evaluations = evaluations_of(study, done)
    unfinished = sweep.Pool(at_once).run_all(evaluations, "evaluations")
    if unfinished:
        evaluation, message = unfinished[0]
        raise DataError(f"an evaluation failed ({message}): {sweep.log_path(evaluation)}")
    record = record_of(study, plan, done, failed, evaluations)
    folder = os.path.join("runs", "sweeps", plan.name)
    run.write_json(os.path.join(folder, "record.json"), record)
    print_verdicts(study, record)
    if args.record:
        os.makedirs(RECORDS, exist_ok=True)
        run.write_json(record_path(study), record)
        shutil.copy(os.path.join(folder, "curves.svg"), os.path.join(RECORDS, f"{study.name}.svg"))
        write_pages()


def record_of(study, plan, done, failed, evaluations):
    """What is kept of a study: what was claimed and run, the figures of each run, the verdicts."""
    rows = [row_of(study, r, evaluations) for r in done]
    runs, warm_starts = sweep.runs_of(plan)
    seconds = 0.0
    for r in [*done, *[warm for warm in warm_starts if warm.is_done]]:
        seconds += run.read_json(os.path.join(r.folder, "summary.json"), "seconds")["seconds"]
    seconds += sum(map(duration, evaluations))
    return {
        "name": study.name,
        "command": command_of(study),
        "base": sweep.digest_of_base(),
        "seeds": plan.seeds,
        "shared": plan.shared,
        "arms": study.arms,
        "evaluate": study.evaluate,
        "claims": [asdict(claim) | judge(claim, rows) for claim in study.claims],
        "rows": rows,
        "failed": [{"arm": r.arm, "seed": r.seed, "message": message} for r, message in failed],
        "minutes": round(seconds / 120, 1),             # on two cores
    }


def duration(evaluation):
    """Seconds that an evaluation took: it writes its settings first and its summary last."""
    first = os.path.getmtime(os.path.join(evaluation.folder, "config.json"))
    return os.path.getmtime(os.path.join(evaluation.folder, "summary.json")) - first


def command_of(study):
    return f"python -m appendix.sweep --study {study.name}"


def record_path(study):
    return os.path.join(RECORDS, f"{study.name}.json")


def read_record(study):
    """The record that is kept of a study, or None."""
    if not os.path.exists(record_path(study)):
        return None
    return run.read_json(record_path(study), "claims", "rows", "minutes")


def check_is_of_study(record, study):
    """Raises DataError if a record was made before the study's arms or claims were changed."""
    if record is None:
        return
    recorded = [claim["says"] for claim in record["claims"]]
    written = [claim.says for claim in study.claims]
    if record["arms"] != study.arms or recorded != written:
        raise DataError(f"{record_path(study)} is of another version of the study; run it again "
                        f"({command_of(study)} --record), or remove the file")


# --------------------------------------------------------------------------------------------------
# on the screen

def print_list():
    """Every study: its claim, its size, about how long it takes, and its verdict if it was run."""
    for number, study in enumerate(study_list.STUDIES, 1):
        print(f"{number:2d}  {study.name:18s}{study.claim}")
        plan = plan_of(study)
        runs, warm_starts = sweep.runs_of(plan)
        seconds = estimated_seconds(study, plan, runs, warm_starts)
        record = read_record(study)
        found = f"; {record['claims'][0]['verdict']}" if record else ""
        print(f"    {'':18s}{len(plan.arms)} arms x {len(plan.seeds)} seeds, about "
              f"{sweep.in_words(seconds)} on two cores{found}")


def estimated_seconds(study, plan, runs, warm_starts):
    """A guess of the time on two cores, good to a factor of two; nothing is taken for done."""
    seconds = sweep.seconds_of(runs, warm_starts)
    for evaluation in evaluations_of(study, runs):
        episodes = evaluation.config.n * evaluation.config.samples
        one_mode = sweep.SECONDS_PER_ANSWER / 3         # of the three that a run asks in
        seconds += sweep.SECONDS_TO_START + episodes * one_mode
    return seconds / 2


def print_verdicts(study, record):
    print(f"\n{study.name}: {record['minutes']} minutes on two cores")
    for claim, found in zip(study.claims, record["claims"]):
        print(f"  {claim.says}\n    {compared(claim)}\n    {difference_in_words(found)}: "
              f"{found['verdict']}")
    kept = read_record(study)
    if kept:
        print(f"  kept in {os.path.relpath(record_path(study), ROOT)}: "
              + "; ".join(claim["verdict"] for claim in kept["claims"]))


def difference_in_words(claim):
    """"+0.12 [+0.05, +0.19], at least 0.03 matters"."""
    if claim["mean"] is None:
        return "no run has this figure"
    return f"difference {signed(claim)}, at least {claim['least']:g} matters"


def signed(claim):
    """"+0.120 [+0.050, +0.190]"; without the interval if one seed has no spread; "" if none."""
    if claim["mean"] is None:
        return ""
    if claim["low"] is None:
        return f"{claim['mean']:+.3f}"
    return f"{claim['mean']:+.3f} [{claim['low']:+.3f}, {claim['high']:+.3f}]"


# --------------------------------------------------------------------------------------------------
# the page and the README's table

def write_pages():
    """Write appendix/studies.md, its pictures, and the README's table."""
    records = {study.name: read_record(study) for study in study_list.STUDIES}
    for study in study_list.STUDIES:
        check_is_of_study(records[study.name], study)
    os.makedirs(RECORDS, exist_ok=True)
    run.write_text(PAGE, page_text(records))
    run.write_text(os.path.join(RECORDS, "weights.svg"), weights_picture())
    if records.get("pass-at-k"):
        picture = pass_at_k_picture(records["pass-at-k"])
        run.write_text(os.path.join(RECORDS, "pass-at-k-curve.svg"), picture)
    with open(README, encoding="utf-8") as f:
        text = f.read()
    if BEGIN in text:
        run.write_text(README, with_table(text, readme_table(records)))
    print(f"{os.path.relpath(PAGE, ROOT)}: {sum(map(bool, records.values()))} of {len(records)} "
          "studies are recorded")


def with_table(text, table):
    """The text with the table between its two markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def readme_table(records):
    """One line per study: its claim, the verdict on the first of its claims, how many hold."""
    lines = ["| claim | verdict | of all its claims hold | minutes |", "|---|---|---|---|"]
    for study in study_list.STUDIES:
        record = records[study.name]
        verdict = "not run yet"
        holding = ""
        minutes = ""
        if record:
            verdicts = [claim["verdict"] for claim in record["claims"]]
            verdict = verdicts[0]
            holding = f"{verdicts.count(HOLDS)} of {len(verdicts)}"
            minutes = f"{record['minutes']:.0f}"
        link = f"[{study.claim}](appendix/studies.md#{study.name})"
        lines.append(f"| {link} | {verdict} | {holding} | {minutes} |")
    return "\n".join(lines)


INTRODUCTION = """# Studies

Claims of ViGoRL, of UniVG-R1, and of those who doubt or extend them, each put to the test on the
toy world with the tiny model. A verdict speaks of this world and this model; it neither proves nor
refutes a paper about models of 3B and more. [study_list.py](study_list.py) says what is claimed,
what is run, and which difference matters. Claims, arms and these differences were written before
the runs that they are judged by; after a first run `spurious-rewards` gained an arm, and
`behaviours` a longer warm start. Limits were added to afterwards, where a reader of the results
found another one.

**The rule.** Each difference is taken seed by seed; the arms that a claim compares answer the same
held-out questions, and arms that begin alike share a warm start. Over the seeds it has a mean and a
95 % interval (Student's t). *Holds here*: the interval lies above 0 and the mean reaches the
smallest difference that matters. *Does not hold here*: the whole interval lies below the smallest
difference that matters. *Not decided by these seeds*: anything else. Numbers are rounded here, not
in the rule.

**The figures.** `accuracy_before` and `accuracy_after` RL: of 200 held-out questions (100 in
`pass-at-k`), for boxes the share with an IoU of 0.5 or more; an arm with `steps=0` has no RL, so
both are the same. `saw`: the share of episodes whose crops showed what the answer depends on.
`at_once.accuracy`: the policy is told to answer without a thought. `logp_gap_max`: the largest gap
between the log-probabilities of sampler and trainer. `levels`: a part of the questions, by
difficulty or task.

    python -m appendix.sweep --list                 # all studies
    python -m appendix.sweep --study NAME           # run one; compares with what is recorded here
    python -m appendix.studies                      # write this page from the records

Three to five seeds give wide intervals: an effect of a few points is often not decided. Where three
left the first claim of a study open, two more were run, once (not for `losses`, which would have
taken too long). If no claim were true, about one in forty would still come out as *holds here* (a
few more where seeds were added), so expect one or two false ones on this page. Student's t does not
know that shares end at 0 and 1; where an interval is wide, look at the seeds. Differences of shares
are shares, too: 0.05 is five points. Equal arms of different studies are equal runs, so their
errors are not independent. Minutes are those of the runs' own clocks, divided by two cores; the
start of each process comes on top.
"""


def page_text(records):
    """appendix/studies.md, from the list and the records."""
    parts = [INTRODUCTION]
    group = ""
    for number, study in enumerate(study_list.STUDIES, 1):
        if study.group != group:
            group = study.group
            parts.append(f"## {group}\n")
        parts.append(section(number, study, records[study.name]))
    return "\n".join(parts)


def section(number, study, record):
    """The section of one study, in Markdown."""
    lines = [f"### {study.name}", "", f"**{number}. {study.claim}**", "",
             f"*Claimed by:* {study.source}", ""]
    lines += [f"    {command_of(study)}", ""]
    lines += [f"All runs: `{study.shared}`.", ""]
    lines += claims_table(study, record)
    if record:
        lines += ["", *figures_table(study, record), ""]
        for failure in record["failed"]:
            lines.append(f"{failure['arm']}, seed {failure['seed']} ended early: "
                         f"{failure['message']}\n")
        lines += [f"![accuracy in training, of boxes the mean IoU](studies/{study.name}.svg)", ""]
        lines += [f"{record['minutes']:.0f} minutes on two cores, seeds "
                  f"{', '.join(map(str, record['seeds']))}, base `{record['base']}`."]
    if study.picture and (record or study.picture == "weights.svg"):
        lines += ["", f"![{study.picture_shows}](studies/{study.picture})"]
    lines += ["", f"*Limits.* {study.limits}", "", f"*Read:* {study.read}", ""]
    return "\n".join(lines)


def claims_table(study, record):
    """A line per claim: what is compared, what matters, and, once it was run, the verdict."""
    lines = ["| claim | compared | difference | matters from | verdict |", "|---|---|---|---|---|"]
    for i, claim in enumerate(study.claims):
        found = record["claims"][i] if record else {"mean": None, "verdict": "not run yet"}
        lines.append(f"| {claim.says} | {compared(claim)} | {signed(found)} | {claim.least:g} | "
                     f"{found['verdict']} |")
    return lines


def compared(claim):
    """In words: which arm, with which, in what."""
    words = f"`{claim.figure}` of *{claim.arm}*"
    if claim.falls and not claim.than:
        return f"by how much {words} is below {claim.handicap:g}"
    if claim.than:
        words += f" against *{claim.than}*"
    if claim.falls:
        words += "; a fall counts as above 0"
    if claim.handicap:
        words += f"; {claim.handicap:g} is already added to the difference"
    return words


def figures_table(study, record):
    """The figures of each arm: mean over seeds and its interval; of one figure every seed's."""
    formulas = [f for f in formulas_of(study) if any(f in r["figures"] for r in record["rows"])]
    titles = [f"`{formula}`" for formula in formulas]
    titles.append("`accuracy_after` of each seed")
    lines = ["| arm | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for label, settings in study.arms.items():
        cells = []
        for formula in formulas:
            values = [row["figures"][formula] for row in record["rows"]
                      if row["arm"] == label and formula in row["figures"]]
            cells.append(mean_and_interval(values))
        of_seeds = [f"{row['figures']['accuracy_after']:.2f}" for row in record["rows"]
                    if row["arm"] == label]
        cells.append(", ".join(of_seeds))
        lines.append(f"| {label} (`{settings or 'as shared'}`) | " + " | ".join(cells) + " |")
    return lines


def mean_and_interval(values):
    if not values:
        return ""
    found = sweep_results.interval_over_seeds(values)
    if math.isnan(found.low):
        return f"{found.mean:.3f}"
    return f"{found.mean:.3f} ± {found.high - found.mean:.3f}"


def weights_picture():
    """Each difficulty weight over a group's mean accuracy, as a share of its largest -> SVG."""
    accuracy = torch.linspace(0, 1, 51)
    lines = []
    for name, weight in grpo.WEIGHTS.items():
        if name == "log-original":                      # where it is above 0 it is `log`
            continue
        weights = weight(accuracy).clamp(min=0)
        lines.append((name, (weights / weights.max()).tolist()))
    return sweep_results.draw_lines(lines, "accuracy 0", "1")


def pass_at_k_picture(record):
    """Pass@k by k, on a logarithmic axis, mean over seeds -> SVG."""
    lines = []
    for label in record["arms"]:
        figures = [row["figures"] for row in record["rows"] if row["arm"] == label]
        names = [f for f in figures[0] if ".pass_at." in f]
        names.sort(key=lambda f: int(f.rpartition(".")[2]))
        lines.append((label, [statistics.mean(row[f] for row in figures) for f in names]))
    return sweep_results.draw_lines(lines, "k = 1", f"k = {names[-1].rpartition('.')[2]}")


def main(argv=None):
    parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    write_pages()


if __name__ == "__main__":
    with run.exit_on_error():
        main()
