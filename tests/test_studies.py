"""
Studies: the rule for the verdict by hand, the figures, what a study runs, and that the page and the
README hold what the records say. The runs themselves are replaced by a function that writes what a
run leaves behind.
"""
import dataclasses, json, math, os, re

import pytest

import data, evaluate, train_rl, train_sft
from appendix import rl_options, rl_run, run, studies, study_list, sweep, sweep_results
from appendix.files import DataError
from appendix.study_list import STUDIES, Claim, Study
from appendix.sweep_results import Interval
from conftest import check_mutation, close, names

# -----------------------------------------------------------------------------
# the rule

@pytest.mark.parametrize("mean, low, high, verdict", [
    (0.10, 0.05, 0.15, studies.HOLDS),
    (0.03, 0.001, 0.06, studies.HOLDS),         # the mean reaches what matters
    (0.02, 0.001, 0.04, studies.OPEN),          # above 0, but perhaps too small to matter
    (0.10, -0.01, 0.21, studies.OPEN),
    (0.00, -0.02, 0.02, studies.FAILS),         # surely smaller than what matters
    (0.02, 0.015, 0.025, studies.FAILS),        # above 0, and surely too small
    (-0.30, -0.50, -0.10, studies.FAILS),
    (0.10, math.nan, math.nan, studies.OPEN)])
def test_rule(mean, low, high, verdict):
    """Claim: holds if low > 0 and mean >= least; does not hold if high < least; else open. least is
    0.03 here."""
    assert studies.verdict_of(Interval(mean, low, high), 0.03) == verdict

def rows_of(**arms):
    """arm=[figure of seed 0, of seed 1, ...]; None: that run failed."""
    return [{"arm": arm, "seed": seed,
             "figures": {} if value is None else {"accuracy_after": value}}
            for arm, values in arms.items() for seed, value in enumerate(values)]

def test_differences_are_paired_by_seed():
    """Bug: means of different seeds compared, a sign turned, a seed that one arm lacks counted as
    0."""
    rows = rows_of(a=[0.9, 0.8, 0.7, None], b=[0.5, 0.6, None, 0.1])
    assert studies.differences(Claim("", "a", "b"), rows) == pytest.approx({0: 0.4, 1: 0.2})
    assert (studies.differences(Claim("", "a", "b", falls=True), rows)
            == pytest.approx({0: -0.4, 1: -0.2}))
    assert (studies.differences(Claim("", "b", "a", handicap=0.5), rows)
            == pytest.approx({0: 0.1, 1: 0.3}))
    assert studies.differences(Claim("", "a"), rows) == pytest.approx({0: 0.9, 1: 0.8, 2: 0.7})
    found = studies.judge(Claim("", "a", "b", least=0.2), rows)
    expected = sweep_results.interval_over_seeds([0.4, 0.2])
    close([found["mean"], found["low"], found["high"]],
          [expected.mean, expected.low, expected.high], 1e-9)
    assert found["seeds"] == 2 and found["verdict"] == studies.OPEN         # two seeds: +- 1.27
    assert studies.judge(
        Claim("", "a", "b", least=0.2),
        rows_of(a=[0.9, 0.8, 0.85], b=[0.5, 0.41, 0.44]))["verdict"] == studies.HOLDS

def test_too_few_runs_decide_nothing():
    for rows in ([], rows_of(a=[0.9], b=[0.1]), rows_of(a=[0.9, 0.9, 0.9], b=[None] * 3)):
        found = studies.judge(Claim("", "a", "b"), rows)
        assert (found["verdict"] == studies.OPEN and found["low"] is None
                and (found["mean"] is None) == (found["seeds"] == 0))
        json.dumps(found, allow_nan=False)

def test_figures():
    """Claim: a path, a difference, a ratio."""
    row = {"a": 0.75, "levels": {"hard": {"b": 0.5}}, "many": {"pass_at": {"64": 0.25}}}
    figures = {f: studies.figure_of(row, f)
               for f in ("a", "levels.hard.b", "a - levels.hard.b", "levels.hard.b / a",
                         "many.pass_at.64")}
    assert figures == pytest.approx({
        "a": 0.75, "levels.hard.b": 0.5, "a - levels.hard.b": 0.25, "levels.hard.b / a": 2 / 3,
        "many.pass_at.64": 0.25})
    with pytest.raises(KeyError):
        studies.figure_of(row, "a - levels.easy.b")

# -----------------------------------------------------------------------------
# the list

def test_the_list():
    """Claim: twenty studies, each with a claim, its source, limits, what to read; three seeds or
    more."""
    assert len(STUDIES) == 20 and len({s.name for s in STUDIES}) == 20
    for study in STUDIES:
        assert study.claim and study.source and study.limits and study.read
        assert (len(study.arms) > 1 and study.claims
                and study.seeds in (study_list.THREE, study_list.FIVE))

@pytest.mark.parametrize("study", STUDIES, ids=lambda s: s.name)
def test_a_study_can_run(study):
    """Bug: an arm with a setting that train_rl.py refuses, a claim about an arm that is not there,
    an evaluation with a wrong flag, two arms that are the same run."""
    plan = studies.plan_of(study, [0])
    runs, warm_starts = sweep.runs_of(plan)
    for claim in study.claims:
        assert ({claim.arm, claim.than or claim.arm} <= set(study.arms)
                and claim.arm != claim.than), claim.says
        assert claim.least >= 0 and (claim.least > 0 or claim.handicap > 0)
    for r in [*runs, *warm_starts]:
        cfg = dataclasses.replace(r.config, recipe=train_sft.recipe_of(r.config))
        rl_run.check_config(cfg, train_rl.num_blind_prompts(cfg, cfg.num_prompts))
        rl_options.check_options(cfg, train_rl.episode_limit(cfg))
    assert (len({str(dataclasses.replace(r.config, name="")) for r in runs})
            == len(runs) == len(study.arms))
    for evaluation in studies.evaluations_of(study, runs):
        r = next(r for r in runs if r.arm == evaluation.arm)
        cfg = evaluation.config
        assert (cfg.temperature == 1 and cfg.seed == 0
                and cfg.checkpoint == f"{r.folder}/checkpoint" and cfg.out == evaluation.folder)
        assert (cfg.style == data.PROMPT_STYLES[train_sft.recipe_of(r.config)]
                and cfg.max_new_tokens == r.config.max_new_tokens)

@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES, ids=lambda s: s.name)
def test_a_study_fits_a_lecture(study):
    """Claim: at most half an hour on two cores, by the sweep's own estimate."""
    plan = studies.plan_of(study)
    assert studies.estimated_seconds(study, plan, *sweep.runs_of(plan)) < 30 * 60

@pytest.mark.parametrize("study", STUDIES, ids=lambda s: s.name)
def test_the_figures_of_a_claim_exist(study):
    """Bug: a claim about a figure that no run reports. The summaries have the keys that train_rl.py
    and evaluate.py write."""
    part = {"n": 9, "accuracy_before": 0.5, "accuracy_after": 0.5, "zooms": 1.0}
    known = {"accuracy_before": 0.5, "accuracy_after": 0.5, "zooms_per_episode": 1.0,
             "accuracy_no_zoom": 0.2, "accuracy_black_crop": 0.2, "accuracy_wrong_crop": 0.2,
             "mean_iou_after": 0.5, "saw": 0.5, "right_and_saw": 0.4, "right_not_saw": 0.1,
             "wrong_though_saw": 0.1, "logp_gap_max": 0.1,
             "levels": {name: part for name in ("easy", "hard", "search", "relation")}}
    evaluated = {"accuracy": 0.5, "pass_at": {str(2 ** i): 0.5 for i in range(7)},
                 **{name: 0.5 for name in evaluate.AVERAGED}}
    for formula in studies.formulas_of(study):
        assert math.isfinite(studies.figure_of(
            {**known, **{name: evaluated for name in study.evaluate}}, formula)), formula
    if any("wrong_crop" in f for f in studies.formulas_of(study)):
        assert "--eval-wrong" in study.shared

# -----------------------------------------------------------------------------
# running one

SMALL = Study("small", "group", "More is better.", "nobody",
              {"less": "lr=1e-4", "more": "lr=1e-3 steps=7", "none": "steps=0"},
              "--traces oracle --steps 5",
              (Claim("It is.", "more", "less", least=0.05),
               Claim("Elsewhere, too.", "more", "less", figure="other.accuracy", least=0.05)),
              "It is made up.", "nothing", evaluate={"other": "--task=relation --n=3"})

@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Runs and evaluations that take no time -> the names of those done. The arm decides what comes
    out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_list, "STUDIES", [SMALL])
    monkeypatch.setattr(studies, "RECORDS", str(tmp_path / "kept"))
    monkeypatch.setattr(studies, "PAGE", str(tmp_path / "studies.md"))
    monkeypatch.setattr(studies, "README", str(tmp_path / "README.md"))
    (tmp_path / "README.md").write_text(f"before\n{studies.BEGIN}\nold\n{studies.END}\nafter\n")
    done = []

    def run_one(self, r):
        if r.is_done:
            return ""
        done.append(r.name)
        os.makedirs(r.folder, exist_ok=True)
        share = {"less": 0.5, "more": 0.7, "none": 0.4}.get(r.arm, 0.4) + 0.01 * r.seed
        if isinstance(r, studies.Evaluation):
            run.write_json(f"{r.folder}/config.json", {})
        run.write_json(f"{r.folder}/summary.json", {
            "accuracy_before": 0.4, "accuracy_after": share, "accuracy": 0.5, "seconds": 60.0})
        run.write_rows(f"{r.folder}/held_out.jsonl", [{"mode": "on", "id": "q", "right": True}])
        run.write_rows(f"{r.folder}/metrics.jsonl",
                       [{"step": i, "accuracy": i / 4} for i in range(4)])
        return ""
    monkeypatch.setattr(sweep.Pool, "run_one", run_one)
    return done

def test_a_study_from_end_to_end(pretend, capsys):
    """Claim: arms, warm starts and evaluations run once; the record has figures, verdicts, minutes,
    the base; --record keeps it, and page and README follow from it. The same command runs nothing
    again."""
    sweep.main(["--study", "small", "--record", "--at-once", "1"])
    out = capsys.readouterr().out
    record = json.load(open("kept/small.json"))
    assert record == json.load(open("runs/sweeps/study-small/record.json"))
    assert ([c["verdict"] for c in record["claims"]] == [studies.HOLDS, studies.FAILS]
            and out.count(studies.HOLDS) == 1)
    assert (len(pretend) == 9 + 3 + 6
            and record["minutes"] == pytest.approx(12 * 60 / 120, abs=0.2)
            and len(record["base"]) == 12)
    assert record["rows"][0] == {
        "arm": "less", "seed": 0,
        "figures": {"accuracy_before": 0.4, "accuracy_after": 0.5, "other.accuracy": 0.5}}
    page, readme = open("studies.md").read(), open("README.md").read()
    assert ("| less (`lr=1e-4`) | 0.400 ± 0.000 | 0.510 ± 0.025 | 0.500 ± 0.000"
            " | 0.50, 0.51, 0.52 |" in page
            and "| none (`steps=0`) | 0.400 ± 0.000 | 0.410 ± 0.025 |  | 0.40, 0.41, 0.42 |" in page
            and "+0.200 [+0.200, +0.200] | 0.05 | holds here" in page)
    assert ("studies/small.svg" in page and os.path.exists("kept/small.svg")
            and "6 minutes on two cores" in page)
    assert readme == (f"before\n{studies.BEGIN}\n{studies.readme_table({'small': record})}\n"
                      f"{studies.END}\nafter\n")
    assert "| [More is better.](appendix/studies.md#small) | holds here | 1 of 2 | 6 |" in readme
    # a claim was added since
    with pytest.raises(DataError, match="another version of the study"):
        studies.check_is_of_study(record, dataclasses.replace(
            SMALL, claims=(*SMALL.claims, Claim("More.", "more", "none"))))
    pretend.clear()
    sweep.main(["--study", "small", "--at-once", "1"])
    # beside what is kept
    assert pretend == [] and capsys.readouterr().out.count(studies.HOLDS) == 2

def test_a_trial_is_not_kept(pretend, capsys):
    """Claim: flags and seeds make a trial: they win over the arms, but an arm without RL stays one;
    --record refuses them. A study has its own arms and name."""
    plan = studies.plan_of(SMALL, [3], ["--steps=1", "--lr", "1e-2"])
    assert ([r.config.steps for r in sweep.runs_of(plan)[0]] == [1, 1, 0]
            and {r.config.lr for r in sweep.runs_of(plan)[0]} == {1e-2})
    sweep.main(["--study", "small", "--seeds", "0", "--steps", "1", "--at-once", "1"])
    assert studies.OPEN in capsys.readouterr().out and not os.path.exists("kept/small.json")
    assert not os.path.exists("runs/sweeps/study-small")        # where the study itself runs
    for wrong, said in ((["--record", "--steps", "1"], "--record"),
                        (["--record", "--seeds", "0"], "--record"),
                        (["lr=1"], "arms of its own"),
                        (["--name", "x"], "name of its own")):
        with pytest.raises(DataError, match=said):
            sweep.main(["--study", "small", *wrong])
    with pytest.raises(DataError, match="expected one of small"):
        sweep.main(["--study", "nonsense"])

def test_a_failed_run_is_said(pretend, monkeypatch, capsys):
    """Claim: a run that ends early leaves its claim open and is named on the page."""
    healthy = sweep.Pool.run_one
    monkeypatch.setattr(
        sweep.Pool, "run_one",
        lambda self, r: "error: nothing to reinforce" if r.arm == "more" else healthy(self, r))
    sweep.main(["--study", "small", "--record", "--at-once", "1"])
    record = json.load(open("kept/small.json"))
    assert record["claims"][0]["verdict"] == studies.OPEN and len(record["failed"]) == 3
    assert "more, seed 2 ended early: error: nothing to reinforce" in open("studies.md").read()

def test_list(pretend, capsys):
    sweep.main(["--list"])
    out = capsys.readouterr().out
    assert "small" in out and "More is better." in out and "3 arms x 3 seeds" in out

# -----------------------------------------------------------------------------
# what is kept

KEPT = [study for study in STUDIES if studies.read_record(study)]

@pytest.mark.parametrize("study", KEPT, ids=lambda s: s.name)
def test_a_record_is_of_the_study_as_it_is_written(study):
    """Bug: a claim, an arm or the least difference that was changed after the runs; a verdict that
    is not that of the rule."""
    record = studies.read_record(study)
    assert (record["arms"] == study.arms and record["shared"] == studies.plan_of(study).shared
            and record["evaluate"] == study.evaluate)
    assert record["seeds"] == list(study.seeds) and record["command"] == studies.command_of(study)
    for claim, found in zip(study.claims, record["claims"], strict=True):
        assert found == json.loads(json.dumps(
            dataclasses.asdict(claim) | studies.judge(claim, record["rows"])))
    assert os.path.exists(os.path.join(studies.RECORDS, f"{study.name}.svg"))

def test_the_page_and_the_readme_are_those_of_the_records():
    """Claim: `python -m appendix.studies` would change nothing."""
    records = {study.name: studies.read_record(study) for study in STUDIES}
    with open(studies.PAGE, encoding="utf-8") as f:
        assert f.read() == studies.page_text(records)
    with open(os.path.join(studies.RECORDS, "weights.svg"), encoding="utf-8") as f:
        assert f.read() == studies.weights_picture()
    with open(studies.README, encoding="utf-8") as f:
        text = f.read()
    assert text == studies.with_table(text, studies.readme_table(records))

def test_pass_at_k_picture():
    """Claim: k in its order as a number, one line per arm."""
    figures = {f"many.pass_at.{2 ** i}": i / 6 for i in range(7)}
    record = {"arms": {"before": "", "after": ""},
              "rows": [{"arm": arm, "seed": s, "figures": figures}
                       for arm in ("before", "after") for s in (0, 1)]}
    svg = studies.pass_at_k_picture(record)
    assert svg.count("<polyline") == 2 and "k = 64" in svg
    heights = [float(y) for y in re.findall(
        r",([\d.]+)", re.search(r'<polyline[^>]*points="([^"]*)"', svg)[1])]
    assert heights == sorted(heights, reverse=True) and len(heights) == 7

# -----------------------------------------------------------------------------
# Do the tests bite? Each row puts one bug in; the named test must fail.

MUTATIONS = [
    ("appendix.studies:verdict_of", "interval.high < least",
     "interval.high < 0", test_rule,
     dict(mean=0.0, low=-0.02, high=0.02, verdict=studies.FAILS)),
    ("appendix.studies:verdict_of", "interval.low > 0 and interval.mean >= least",
     "interval.low > 0", test_rule,
     dict(mean=0.02, low=0.001, high=0.04, verdict=studies.OPEN)),
    ("appendix.studies:differences", "-1 if claim.falls else 1",
     "1", test_differences_are_paired_by_seed, {}),
    ("appendix.studies:differences", "sign * (value - other) + claim.handicap",
     "sign * (value - other)", test_differences_are_paired_by_seed, {}),
    ("appendix.studies:plan_of", "(name, settings[name]) != ('steps', '0')",
     "True", test_a_trial_is_not_kept, {}),
    ("appendix.studies:evaluations_of", "*settings",
     "*settings[:1]", test_a_study_can_run, dict(study=STUDIES[0])),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, request):
    """Bug: a test that no bug can turn red."""
    fixtures = {name: (lambda name=name: request.getfixturevalue(name))
                for name in ("pretend", "capsys", "monkeypatch")}
    check_mutation(target, old, new, test, arguments, fixtures)
