"""The museum of real bugs: a claim about each exhibit that our code meets and the faulty logic does
not. A claim is a function of the code under test, so that both can be put to it.
"""
import pytest
import torch

from appendix import museum

T = torch.tensor

def order_of_rewards(reward):
    return (max(reward(False, True, n) for n in range(5))
            < min(reward(True, False, n) for n in range(5)))

CLAIMS = {
    "injected text is trained on": lambda mask: all(
        mask(parts) == [author == "policy" for _, author in parts]
        for parts in ([("I look.", "policy"), ("So I answer.", "environment"), ("yes", "policy")],
                      [("<observation> x", "environment"), ("no", "policy")])),
    "the difficulty weight of a device's batch": lambda w: torch.allclose(
        w(T([[0.0, 1.0], [1.0, 1.0]])), T([0.5, 0.0]).exp()),
    "the log weight that unlearns": lambda w: all(w(m / 100) >= 0 for m in range(101)),
    "cut episodes lower the mean": lambda A: (
        A(T([[1.0, 1.0, 1.0, 0.0]]), T([[True, True, True, False]])) == 0).all(),
    "the zoom bonus without a cap": order_of_rewards,
    "zooms outside the image count": lambda zooms: zooms(
        [(10, 10), (5000, 5000)], [(1, 1, 100, 100)]) == 1,
    "x2 - 1 in the IoU": lambda iou: (
        iou((0, 0, 1, 100), (0, 0, 1, 100)) == 1 and iou((0, 0, 10, 10), (0, 0, 10, 5)) == 0.5),
    "gold that is not folded": lambda match: (
        match("closer", "Closer") == 1 and match("left", "Closer") == 0),
    "a judge by substring": lambda match: (
        match("no objects moved", "no") == 0 and match("no", "no") == 1),
    "an answer over two lines": lambda answer: answer("<answer>\nleft\n</answer>") == "left",
    "stop, found anywhere": lambda match: (
        match("type [12] [bus stop]", "stop [yes]") == 0
        and match("stop [yes]", "stop [yes]") == 1),
    "typed text that nobody reads": lambda match: (
        match("type [12] [hats]", "type [12] [shoes]")
        < match("type [12] [shoes]", "type [12] [shoes]") == 1),
    "any point grounds": lambda grounds: (
        not grounds("<think> At (5000, 5000). </think>\n<answer> a </answer>", [(1, 1, 100, 100)])
        and grounds("<think> At (50, 50). </think>\n<answer> a </answer>", [(1, 1, 100, 100)])),
    "crops squashed at the border": lambda crop: all(
        (r - l, b - t) == (100, 100) and l >= 0 and t >= 0 and r <= 400 and b <= 400
        for l, t, r, b in (crop((400, 400), center, 100)
                           for center in ((0, 0), (399, 200), (200, 399), (200, 200)))),
    "crops in the wrong frame": lambda place: place((800, 400), (400, 200), (399, 10)) == (798, 20),
    "a stale size": lambda sizes: (
        (fed := sizes([(300, 200), (14, 14), (300, 200)]))[0] == fed[2] and fed[1] == (28, 28)),
    "a search that returns to a closed node": lambda visits: visits(5)["closed"] == 0,
    "failures leave the denominator": lambda accuracy: accuracy([True, None]) == 0.5,
    "the right option comes first": lambda accuracy: accuracy(400, 0) < 0.35,
}

@pytest.mark.parametrize("exhibit", museum.EXHIBITS, ids=lambda e: e.name)
def test_ours_meets_the_claim_and_the_faulty_does_not(exhibit):
    claim = CLAIMS[exhibit.name]
    assert claim(exhibit.ours), "our code has this bug"
    assert not claim(exhibit.faulty), "the exhibit does not show its bug"

def test_every_exhibit_has_a_claim_and_shows_a_difference():
    assert {e.name for e in museum.EXHIBITS} == set(CLAIMS) and len(CLAIMS) >= 15
    for e in museum.EXHIBITS:
        assert museum.in_short(e.faulty(*e.example)) != museum.in_short(e.ours(*e.example)), e.name

def test_the_command(capsys):
    museum.main(["crop"])
    out = capsys.readouterr().out
    assert out.count("there:") == 2 and "[0, 150, 50, 250]" in out
    with pytest.raises(SystemExit):
        museum.main(["no such thing"])
