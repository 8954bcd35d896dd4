"""appendix/analysis.py: what an episode did, by rules on words and points. At the end MUTATIONS
puts bugs into the rules.

    python -m pytest tests/test_analysis.py        # no model is loaded
"""
import time

import pytest

import data, evaluate
from appendix import analysis
from conftest import check_mutation, names
from data import Sample
from test_evaluate import choice, episode, photo, zoomed
from zoom_rollout import Turn


def thought(*lines, sample=None, crops=()):
    return analysis.behaviour(episode(
        sample or choice(),
        Turn("<think> " + "\n".join(lines) + " </think>\n<answer> x </answer>"),
        scale=(1, 1)))


@pytest.mark.parametrize("lines, want", [
    # 11 pixels apart of 200: one place
    (["The cat is at (10, 10).", "Its tail at (20, 15)."], dict(regions=1)),
    (["The cat is at (10, 10).", "A dog at (150, 80)."], dict(regions=2)),
    (["First I look at the cat (10, 10)."], dict(regions=1, subgoals=1)),
    # a plan without a point is not grounded
    (["First I look at the cat.", "It sits at (10, 10)."], dict(regions=1)),
    (["The cat (10, 10).", "A dog (150, 80).", "The cat again (12, 12)."],
     dict(regions=2, verification=1)),
    (["The cat (10, 10).", "The cat (12, 12)."], dict(regions=1)),          # staying is no return
    (["Let me verify the cat at (10, 10)."], dict(regions=1, subgoals=1, verification=1)),
    (["The cat (10, 10).", "Wait, that is a dog.", "The cat is at (150, 80)."],
     dict(regions=2, backtracking=1)),
    (["The cat (10, 10) is not there, it is at (150, 80)."], dict(regions=2, backtracking=1)),
    # the correction stayed in place
    (["The cat (10, 10).", "Actually it is at (12, 12).", "A dog (150, 80)."], dict(regions=2)),
    (["At (500, 10) and (-3, 4)."], dict(regions=0)),                       # outside the image
    (["Nothing to see; wait, check first."], dict(regions=0)),
])
def test_behaviour_follows_its_rules(lines, want):
    assert thought(*lines) == dict(subgoals=0, verification=0, backtracking=0) | want


def test_behaviour_reads_zooms_and_own_words_only():
    far = Turn("<think> there </think>\n" + data.tool_call(5, 5), (5, 5), (0, 0, 40, 40))
    # a point named and zoomed into; (999, 1) is outside
    assert analysis.behaviour(zoomed())["regions"] == 1
    e = episode(choice(), *zoomed().turns[:1], far, *zoomed().turns[:1])
    assert {k: analysis.behaviour(e)[k] for k in ("regions", "verification")} == dict(
        regions=2, verification=1)
    assert analysis.behaviour(
        episode(choice(), Turn(data.FORCE + " checked </answer>", forced=True))) == {}
    assert analysis.behaviour(episode(choice(), Turn("first check (10, 10)"))) == {}  # no thought
    e = episode(choice(), Turn("<think>" + "((1, 1) wait " * 400_000), Turn("<think>" * 700_000))
    began = time.process_time()
    analysis.behaviour(e)
    assert time.process_time() - began < 2                                     # 10 MB


def test_pointing_counts_points_where_the_box_is_known():
    known = choice(meta={"evidence": [{"image": 0, "box": [100, 50, 120, 60]}]})
    assert thought("At (110, 55).", "Then (10, 10).", sample=known)["pointed"] == 1
    assert thought("At (110, 55).", "Then (10, 10).", sample=known)["points"] == 2
    # its zoom at source (110, 56); its thoughts do not count
    e = zoomed(known)
    assert (analysis.behaviour(e)["points"], analysis.behaviour(e)["pointed"]) == (1, 1)
    episodes = [e, zoomed(choice()), episode(known, Turn("<think> (1, 1) </think>"))]
    analysis.describe(episodes)
    s = evaluate.summary_of(episodes)
    assert ((s["points"], s["pointing"], s["regions"]) == (2, 0.5, 1)
            and "points" not in analysis.behaviour(zoomed()))
    two = Sample("t", [photo(), photo()], "?", "point", targets=[{"image": 1, "box": [0, 0, 9, 9]}])
    assert "points" not in thought("At (5, 5).", sample=two)                   # of which image?


def test_describe_fills_the_field_that_the_summary_averages():
    """Bug: a behaviour is counted and then left out of the summary,
    or asked for under another name."""
    e = zoomed()
    assert e.behaviour == {}
    analysis.describe([e])
    assert e.behaviour == analysis.behaviour(e) and evaluate.AVERAGED == ("zooms", *analysis.COUNTS)
    assert ({name: evaluate.summary_of([e])[name] for name in analysis.COUNTS}
            == {name: e.behaviour[name] for name in analysis.COUNTS})


# --------------------------------------------------------------------------------------------------
# Do the tests bite? Each line puts one bug into the rules; the named test must fail.

MUTATIONS = [
    ("appendix.analysis:behaviour", "region in seen and region != last", "region in seen",
     test_behaviour_follows_its_rules,
     dict(lines=["The cat (10, 10).", "The cat (12, 12)."], want=dict(regions=1))),
    ("appendix.analysis:behaviour", "last = here[-1]\ndoubt = False", "last = here[-1]",
     test_behaviour_follows_its_rules,
     dict(lines=["The cat (10, 10).", "Actually it is at (12, 12).", "A dog (150, 80)."],
          want=dict(regions=2))),
    ("appendix.analysis:source_points", "rewards.inside((x, y), frames[:1])", "True",
     test_behaviour_follows_its_rules,
     dict(lines=["At (500, 10) and (-3, 4)."], want=dict(regions=0))),
    ("appendix.analysis:own_sentences", "turn.forced and text.startswith(data.FORCE)", "False",
     test_behaviour_reads_zooms_and_own_words_only, {}),
    ("appendix.analysis:pointing_behaviours", "of_zooms or of_all", "of_zooms + of_all",
     test_pointing_counts_points_where_the_box_is_known, {}),
]


@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {})
