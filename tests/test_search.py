"""Tree search for traces: UCT and backup by hand, what is rejected, that search ends, that what the
cache kept is what a fresh pass computes, chains read off a worked tree, the way into the zoom
protocol, a search that was killed. At the end MUTATIONS puts bugs into the code, one at a time, and
requires the named test to fail.

Most trees here are scripted: a stand-in for the sampler says what each step is, so that every count
is known.
"""
import dataclasses, json, math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import data, model, rewards, train_sft, zoom_rollout
from appendix import chains, prefix, tree_search
from appendix.tree_sampler import Path, Sampler, Step
from appendix.tree_search import Node
from conftest import check_mutation, close, names

ASKED = data.toy("search", "train", 2, "search tests")
RIGHT = ASKED[0].options[ASKED[0].answer]
WRONG = next(o for o in ASKED[0].options if o != RIGHT)

def config(**more):
    return train_sft.Config(**{
        **dict(simulations=1, children=2, tries=1, rollouts=1, depth=4, rollout_steps=4,
               min_distance=10.0),
        **more})

def path(*points, answer=None, over=None, sample=ASKED[0]):
    """A path of these points, for what needs no model."""
    e = zoom_rollout.Episode(sample)
    return Path(0, e, [Step(f"step {p}", p) for p in points], answer,
                bool(answer) if over is None else over)

def node(parent=None, visits=0, value=0.0, **more):
    made = Node(path(**more), parent, visits=visits, value=value)
    if parent:
        parent.children.append(made)
    return made

class Scripted:
    """In the sampler's place: `say(path, limit)` is the next step, a point, an answer, or None for
    a broken turn."""
    def __init__(self, say, samples):
        self.say, self.calls = say, []
        self.prompt_paths = [path(sample=s) for s in samples]

    def step(self, paths, limits):
        self.calls += list(zip(paths, limits))
        out = []
        for p, limit in zip(paths, limits):
            # its limit makes a path answer
            said = self.say(p, limit) if len(p.steps) < limit else WRONG
            new = Path(p.tree, p.episode, list(p.steps), over=not isinstance(said, tuple))
            if isinstance(said, tuple):
                new.steps.append(Step(f"step {said}", said))
            elif said:
                new.answer = said
            out.append(new)
        return out

def search(say, samples=ASKED[:1], **flags):
    """tree_search with a scripted sampler -> roots, the sampler"""
    sampler = Scripted(say, samples)
    with mock.patch.object(tree_search, "Sampler", lambda *_: sampler):
        return tree_search.tree_search(None, samples, "zoom", config(**flags))

def grid():
    """say: points 20 apart, never the same one; a path of two points answers wrong, except below
    (20, 0)."""
    made = iter(range(1, 1000))
    return lambda p, limit: (
        (20 * next(made), 0) if len(p.steps) < 2
        else RIGHT if p.steps[0][1] == (20, 0)
        else WRONG)

# -----------------------------------------------------------------------------
# the four moves

def test_uct_by_hand():
    """Three levels, c = 2.

    At the root (9 visits):
        a has Q = .5, N = 5: .5 + 2 sqrt(ln 10 / 6) = 1.739;
        b has Q = .75, N = 4: .75 + 2 sqrt(ln 10 / 5) = 2.107, so b.
    Below b (4 visits):
        c has Q = 1, N = 3: 1 + 2 sqrt(ln 5 / 4) = 2.269;
        d has Q = 0, N = 1: 2 sqrt(ln 5 / 2) = 1.794, so c.
    With c = 4 exploration wins below b: d 3.588 against c 3.537.
    """
    root = node(visits=9)
    a, b = node(root, 5, 0.5), node(root, 4, 0.75)
    e = node(a, 5, 0.5)
    c, d = node(b, 3, 1.0), node(b, 1, 0.0)
    for child, want in ((a, 0.5 + 2 * math.sqrt(math.log(10) / 6)), (b, 2.1072), (c, 2.2686),
                        (d, 1.7941), (e, 0.5 + 2 * math.sqrt(math.log(6) / 6))):
        close(tree_search.uct(child, 2.0), want, 1e-4)
    assert tree_search.select(root, 2.0) is c and tree_search.select(root, 4.0) is d
    assert tree_search.select(root, 0.0) is c               # the best mean, greedily

def test_nothing_is_left():
    """Claim: a closed node is passed by; where nothing is left below a node, it is closed and the
    walk takes another branch; where nothing is left at all, the result is None."""
    root = node(visits=9)
    a, b = node(root, 5, 0.5), node(root, 4, 0.75)
    e = node(a, 5, 0.5)
    c, d = node(b, 3, 1.0), node(b, 1, 0.0)
    c.closed = True
    assert tree_search.select(root, 2.0) is d
    d.closed = True
    # nothing is left below b: the other branch
    assert tree_search.select(root, 2.0) is e and b.closed
    e.closed = True
    assert tree_search.select(root, 2.0) is None and root.closed

def test_backup_by_hand():
    """Claim: N counts and Q is the mean of the outcomes, on the node and on all above it, and on no
    other."""
    root = node()
    a, b = node(root), node(root)
    c = node(a)
    for leaf, reward in ((c, 1.0), (c, 0.0), (b, 0.0), (a, 1.0)):
        tree_search.backup(leaf, reward)
    assert ([(n.visits, n.value) for n in (c, a, b, root)]
            == [(2, 0.5), (3, pytest.approx(2 / 3)), (1, 0.0), (4, 0.5)])

def test_duplicates_are_rejected_by_distance():
    """Bug (the original): points are compared as strings, so (50, 51) after (50, 50) is a new step.
    And: a broken step."""
    leaf = node(**{"parent": None})
    leaf.path = path((50, 50))
    is_new = lambda p: tree_search.is_new(p, leaf, 10.0)
    assert (not is_new(path((50, 50), (50, 50)))
            and not is_new(path((50, 50), (56, 57)))
            and is_new(path((50, 50), (56, 58))))
    leaf.children.append(Node(path((50, 50), (90, 50)), leaf))
    # a sibling's place
    assert not is_new(path((50, 50), (90, 59))) and is_new(path((50, 50), (90, 60)))
    assert not is_new(path((50, 50), over=True))
    assert is_new(path((50, 50), answer="lined"))           # an answer has no place
    leaf.children.append(Node(path((50, 50), answer="lined"), leaf))
    assert (not is_new(path((50, 50), answer="lined"))
            and is_new(path((50, 50), answer="barred")))

def test_one_simulation():
    """Claim: `children` steps from the root, `rollouts` played out from each, every outcome told to
    the child and the root."""
    (root,), sampler = search(grid(), children=3, rollouts=2)
    assert [c.path.steps[-1][1] for c in root.children] == [(20, 0), (40, 0), (60, 0)]
    assert ([(c.visits, c.value, len(c.rollouts)) for c in root.children]
            == [(2, 1.0, 2), (2, 0.0, 2), (2, 0.0, 2)])
    assert (root.visits, root.value) == (6, pytest.approx(1 / 3))
    assert len(sampler.calls) == 3 + 6 + 6      # 3 steps; 6 rollouts of a step and an answer
    assert all(len(r.steps) == 2 and r.steps[0] == c.path.steps[0]
               for c in root.children for r in c.rollouts)
    # what was played out is no part of the tree
    assert not any(c.children for c in root.children)

def test_search_goes_where_it_was_right():
    """Claim: the second simulation expands the child with the best mean."""
    (root,), _ = search(grid(), children=3, simulations=2, exploration=0.1)
    assert [len(c.children) for c in root.children] == [3, 0, 0]

def test_an_answer_is_a_leaf_for_good():
    """Claim: a child that answers is judged, counted `rollouts` times, and never expanded or
    selected. Bug (the original): once its value is 1, simulation after simulation goes back to
    it."""
    say = iter([RIGHT, (20, 0)])
    (root,), sampler = search(
        lambda p, limit: (next(say, None) if not p.steps
                          else (20 + 20 * len(sampler_calls(p)), 0) if len(p.steps) < 3
                          else WRONG),
        rollouts=2, simulations=3)
    answered, stepped = root.children
    assert (answered.closed and answered.path.answer == RIGHT
            and (answered.visits, answered.value) == (2, 1.0)
            and not answered.children)
    # the rest of the budget went to the open step
    assert len(stepped.children) == 1
    assert all(p.answer is None for p, _ in sampler.calls)

def sampler_calls(p):
    return p.steps

def test_limits():
    """Claim: an expansion may use the whole depth, a rollout its own number of steps from its child
    on, but never more than the depth."""
    _, sampler = search(grid(), depth=4, rollout_steps=2)
    assert (sorted({(len(p.steps), limit) for p, limit in sampler.calls})
            == [(0, 4), (1, 3), (2, 3)])
    _, sampler = search(grid(), depth=2, rollout_steps=5)
    assert {limit for _, limit in sampler.calls} == {2}

def test_a_broken_step_is_no_child():
    (root,), _ = search(lambda p, limit: None, simulations=2)
    assert not root.children

def test_search_ends_at_a_dead_end():
    """Bug: the step from which every next one is broken stays open, and takes the simulations of
    its sibling."""
    say = lambda p, limit: (
        ((20, 0) if limit == 3 else (80, 0)) if not p.steps
        else None if p.steps[0][1] == (20, 0)
        else (80 + 20 * len(p.steps), 0))
    firsts = iter([(20, 0), (80, 0)])
    (root,), _ = search(lambda p, limit: next(firsts) if not p.steps else say(p, limit),
                        simulations=4, depth=3, exploration=9.0)
    dead, alive = root.children
    assert (dead.closed and not dead.children
            and alive.children and alive.children[0].children)

@pytest.mark.parametrize("say", [lambda p, limit: None,
                                 lambda p, limit: (50, 50),
                                 lambda p, limit: (50, 50) if len(p.steps) < 1 else None],
                         ids=["broken", "always the same place", "one step, then broken"])
def test_search_ends_when_all_children_are_rejected(say):
    """Bug (the original): a node whose children were all rejected is selected for ever."""
    (root,), sampler = search(say, simulations=50, tries=3, rollout_steps=1)
    assert root.closed and len(sampler.calls) < 40

def test_what_was_rejected_is_tried_again():
    """Claim: `tries` rounds, each of which asks for what is still missing, and no more."""
    said = iter([None, (20, 0), (20, 5), (60, 0)])
    (root,), sampler = search(
        lambda p, limit: next(said, (99, 0)) if not p.steps else WRONG, tries=5)
    assert [c.path.steps[-1][1] for c in root.children] == [(20, 0), (60, 0)]
    assert sum(not p.steps for p, _ in sampler.calls) == 4                      # 2, then 1, then 1

def test_trees_share_their_batches_and_nothing_else():
    """Claim: two trees in lockstep are the two trees that each would be alone."""
    say = lambda p, limit: (
        (30 * len(p.steps) + 20 * (p.episode.sample is ASKED[1]), 0) if len(p.steps) < 3
        else RIGHT)
    both, sampler = search(say, ASKED, simulations=3)
    for root, s in zip(both, ASKED):
        assert (tree_search.outline(root)
                == tree_search.outline(search(say, [s], simulations=3)[0][0]))

# -----------------------------------------------------------------------------
# the sampler: what the cache kept

@pytest.fixture
def spoken(monkeypatch):
    """spoken(text, ...): the next call of the sampler writes these, one per row, each ended by
    <|im_end|> unless cut."""
    rows, at = [], []

    def sample_tokens(logits, u, temperature):
        tokens = torch.tensor([row[min(at[0], len(row) - 1)] for row in rows], device=logits.device)
        at[0] += 1
        return tokens, torch.zeros(len(rows))

    def speak(vlm, *texts, end=True):
        rows[:], at[:] = [vlm.ids(t) + [vlm.im_end] * end for t in texts], [0]
    monkeypatch.setattr(zoom_rollout, "sample_tokens", sample_tokens)
    return speak

def kept_well(vlm, p):
    """Are the logits those of a pass over the path's whole conversation, without any cache?"""
    want = vlm.prefill(vlm.new_cache(1), [p.episode.ids], [0], p.episode.views)[0][0]
    sayable = want > -1e8
    close(p.logits[sayable], want[sayable], 1e-4)

def looks(x, y):
    return f"<think> It may be at ({x}, {y}). </think>\n{data.tool_call(x, y)}"

def test_zoom_steps(vlm, spoken):
    """Claim: a step is a turn; what a path keeps is what a pass over the whole conversation
    computes; a path that shares its beginning with another does not compute it again; the counts of
    tokens are those of the conversations."""
    cfg = config(depth=2, max_new_tokens=120)
    sampler = Sampler(vlm, ASKED, "zoom", cfg)
    a, b = sampler.prompt_paths
    prompts = sum(len(p.episode.ids) for p in (a, b))
    assert sampler.computed == prompts and sampler.naive == 0
    spoken(vlm, looks(20, 30), looks(50, 60), looks(20, 30))
    first = sampler.step([a, b, b], [2, 2, 2])
    assert [p.steps for p in first] == [[("It may be at (20, 30).", (20, 30))],
                                        [("It may be at (50, 60).", (50, 60))],
                                        [("It may be at (20, 30).", (20, 30))]]
    assert (not any(p.over or p.must_answer for p in first)
            and a.steps == b.steps == []
            and not b.episode.turns)
    said = [len(vlm.ids(t)) + 1 for t in (looks(20, 30), looks(50, 60), looks(20, 30))]
    # what was said and what was shown for it
    seen = [len(p.episode.ids) - len(q.episode.ids) for p, q in zip(first, (a, b, b))]
    assert (sampler.computed == prompts + sum(seen)
            and sampler.naive == sum(len(q.episode.ids) + n for q, n in zip((a, b, b), said)))
    for p in first:
        kept_well(vlm, p)

    spoken(vlm, looks(70, 70), looks(70, 71), looks(80, 10), looks(5, 6))
    # one path twice, a root beside them
    second = sampler.step([first[0], first[2], first[0], b], [2, 3, 2, 2])
    assert [p.must_answer for p in second] == [True, False, True, False]
    for p in second:
        kept_well(vlm, p)
    assert (vlm.text(second[0].episode.ids).endswith(data.FORCE)
            and not vlm.text(second[1].episode.ids).endswith(data.FORCE))

    spoken(vlm, " lined </answer>", "<think> I see. </think>\n<answer> barred </answer>")
    third = sampler.step([second[0], second[1]], [2, 3])
    assert [p.answer for p in third] == ["lined", "barred"] and all(p.over for p in third)
    assert third[0].steps == second[0].steps and third[1].steps[-1] == ("I see.", None)
    assert [len(p.episode.turns) for p in third] == [3, 3] and third[0].episode.turns[-1].forced

@pytest.mark.parametrize("text, end", [
    (looks(20, 30)[:-8], True), (looks(20, 30), False), (looks(20, 3000), True), ("no tags", True),
    (looks(20, 30).replace("[20, 30]", "[40, 30]"), True),
    ("<think> </think>\n<answer> </answer>", True), (looks(20, 30) + looks(40, 50), True),
    ("lined </answer>", True)],
    ids=["cut call", "no end of turn", "outside", "no tags", "looks elsewhere than it says",
         "empty answer", "two calls", "no thought"])
def test_a_broken_turn_is_over(vlm, spoken, text, end):
    """Claim: such a turn becomes no step and no answer; its outcome is 0, and it can be in no
    trace."""
    sampler = Sampler(vlm, ASKED[:1], "zoom", config(max_new_tokens=len(vlm.ids(text)) + end))
    spoken(vlm, text, end=end)
    (p,) = sampler.step(sampler.prompt_paths, [2])
    assert (p.over and p.answer is None and not p.steps
            and tree_search.outcome(p) == 0.0
            and not tree_search.is_new(p, Node(sampler.prompt_paths[0]), 10.0))

RELATION = data.toy("relation", "train", 1, "search tests")
CLAUSES = {  # what is said, step by step -> steps, answer; with the limit that forces the answer
    "as a base model": (
        [" red square (88, 19)", ", blue square (37, 70)", ": right"], 5,
        [("red square (88, 19)", (88, 19)), (", blue square (37, 70)", (37, 70))], "right"),
    "in tags": (
        ["<think> The red square is at (88, 19)", ". The blue one is at (37, 70)",
         ". So it is right. </think>\n<answer> right </answer>"], 5,
        [("The red square is at (88, 19)", (88, 19)),
         (". The blue one is at (37, 70)", (37, 70)), ("So it is right", None)], "right"),
    "forced": (
        [" red square (88, 19)", " right"], 1, [("red square (88, 19)", (88, 19))], "right"),
    "forced in tags": (
        ["<think> The red square (88, 19)", " right </answer>"], 1,
        [("The red square (88, 19)", (88, 19))], "right"),
    "a point as the answer": (
        [" red square (88, 19)", ""], 5, [("red square (88, 19)", (88, 19))], "(88, 19)"),
    "a point in tags": (
        ["<think> The sign (88, 19)", ". </think>\n<answer> (71, 30)"], 5,
        [("The sign (88, 19)", (88, 19))], "(71, 30)")}

@pytest.mark.parametrize("case", CLAUSES)
def test_single_turn_steps(models, spoken, case):
    """Claim: in a single turn a step ends where the parenthesis of its point closes, whatever the
    language of the model."""
    vlm = models["qwen2.5"]
    texts, limit, steps, answer = CLAUSES[case]
    sampler = Sampler(vlm, RELATION, "think", config(max_new_tokens=80))
    (p,) = sampler.prompt_paths
    for text in texts:
        assert not p.over
        spoken(vlm, text)
        (p,) = sampler.step([p], [limit])
        if not p.over:
            kept_well(vlm, p)
    assert p.over and p.answer == answer
    assert [(t.strip(), q) for t, q in p.steps] == steps

# -----------------------------------------------------------------------------
# chains

def rollout(*steps, answer, reward):
    return {"steps": [[f"look {p}.", list(p)] for p in steps], "answer": answer, "reward": reward}

def tree_node(*steps, visits=1, value=0.0, answer=None, rollouts=(), children=()):
    return {"steps": [[f"look {p}.", list(p)] for p in steps], "answer": answer, "visits": visits,
            "value": value, "rollouts": list(rollouts), "children": list(children)}

A, B, C, D = (10, 10), (40, 10), (70, 10), (70, 70)
WORKED = {
    "id": "q", "question": "?", "options": [],
    "tree": tree_node(visits=4, value=0.5, children=[
        tree_node(
            A, visits=3, value=2 / 3, rollouts=[rollout(C, answer="bad", reward=0.0)], children=[
                tree_node(B, visits=2, value=1.0, rollouts=[
                    rollout(answer="good", reward=1.0), rollout(answer="good", reward=1.0)])]),
        tree_node(D, visits=1, value=0.0, rollouts=[rollout(answer="poor", reward=0.0)])])}

def points(steps):
    return [tuple(p) if p else t for t, p in steps]

def found_in(tree, **flags):
    """linearise -> [(kind, points, answer)]"""
    return [(chain.kind, points(chain.steps), chain.answer)
            for chain in chains.linearise(tree, config(**flags))]

def test_linearise_by_hand():
    """A's own rollout goes on to C and is wrong; its child B is right, twice (the same chain). D is
    wrong.

    direct:     A B good
    corrected:  at A: C is wrong, B is right -> A C (recovery) B;
                at the root: D -> D (recovery) A B, and A C (recovery) A B, whose two ways both
                begin with A: at the root they are no two ways at all.
    """
    assert found_in(WORKED, direct=9, corrected=9, recovery="Hm.") == [
        ("direct", [A, B], "good"),
        ("corrected", [D, "Hm.", A, B], "good"),
        ("corrected", [A, C, "Hm.", B], "good")]
    again = found_in(WORKED, direct=9, corrected=9, recovery="Hm.", repeat_prefix=True)
    assert ("corrected", [A, C, "Hm.", A, B], "good") in again
    assert [kind for kind, *_ in found_in(WORKED, direct=0, corrected=1)] == ["corrected"]
    ends = [rollout(C, answer="good", reward=1.0), rollout(D, answer="good", reward=1.0),
            rollout(B, answer=None, reward=0.0)]            # none is wrong: one broke off
    assert {kind for kind, *_ in found_in(
        {"tree": tree_node(children=[tree_node(A, rollouts=ends)])},
        direct=9, corrected=9)} == {"direct"}

def test_the_better_supported_chain_comes_first():
    """Claim: a step from which two of two were right comes before one of two, whichever was found
    first; an answer given at once counts as the step that led to it, however often it was
    judged."""
    tree = {"tree": tree_node(visits=9, value=0.4, children=[
        tree_node(answer="good", visits=3, value=1.0,
                  rollouts=[rollout(answer="good", reward=1.0)]),
        tree_node(A, visits=2, value=0.5, rollouts=[rollout(answer="good", reward=1.0)]),
        tree_node(B, visits=2, value=1.0, rollouts=[rollout(answer="good", reward=1.0)])])}
    tree["tree"]["children"][0]["rollouts"][0]["steps"] = [["At once.", None]]
    assert ([steps for _, steps, _ in found_in(tree, direct=3, corrected=0)]
            == [[B], [A], ["At once."]])

def test_no_right_answer_no_chain():
    assert found_in({"tree": tree_node(children=[
        tree_node(A, rollouts=[rollout(answer="bad", reward=0.0)])])}) == []

def test_to_turns():
    """Claim: each new point is a call, a near one and one beyond max_zooms is not; thoughts of what
    is no call stand before the next; the words of a recovery begin a sentence of their own."""
    steps = [["The red one may be at (10, 10).", A], ["It is red at (11, 10).", None],
             ["Not this.", None], ["Look again (12, 12)", (12, 12)],
             ["The blue one is at (40, 10)", B], ["It is blue", None]]
    think = lambda text: f"<think> {text} </think>\n"
    assert chains.to_turns(steps, "lined", "zoom") == [
        think("The red one may be at (10, 10).") + data.tool_call(*A),
        think("It is red at (11, 10). Not this. Look again (12, 12). The blue one is at (40, 10).")
        + data.tool_call(*B),
        think("It is blue.") + "<answer> lined </answer>"]
    assert chains.to_turns(steps, "lined", "zoom", max_zooms=1) == [
        think("The red one may be at (10, 10).") + data.tool_call(*A),
        f"{data.FORCE} lined </answer>"]
    assert chains.to_turns([["red square (88, 19)", (88, 19)],
                            [", blue square (37, 70),", (37, 70)]], "right", "think") == [
        think("red square (88, 19), blue square (37, 70).") + "<answer> right </answer>"]
    # nothing left to think
    assert (chains.to_turns([["A sign (10, 10)", A]], "x", "zoom")[-1]
            == f"{data.FORCE} x </answer>")

def test_a_coordinate_answer_is_no_call():
    """Bug (the original): the conversion crashes on an answer that is a point, or calls the tool on
    it."""
    turns = chains.to_turns([["The button is at (10, 10).", A]], "(70, 70)", "zoom")
    assert turns == [f"<think> The button is at (10, 10). </think>\n{data.tool_call(*A)}",
                     f"{data.FORCE} (70, 70) </answer>"]
    assert rewards.parse_answer("\n".join(turns), "point") == (70.0, 70.0)

def test_points_of_a_text():
    """Bug: a number of 309 digits is infinite as a float and cannot be rounded: the search died."""
    assert chains.points_in(f"From (1.6, 2) to ({'9' * 309}, 3), (4, -{'9' * 400}), "
                            "then (5, 6).") == [(2, 2), (5, 6)]

def test_reorder():
    """Claim: with chance 1 the first call moves to a later place, and nothing is lost; with chance
    0 nothing moves."""
    import random
    steps, rng = [[f"step {p}.", p] for p in (A, B, C)], random.Random(0)
    straight = chains.to_turns(steps, "x", "zoom", 5)
    for _ in range(20):
        moved = chains.to_turns(steps, "x", "zoom", 5, reorder=1.0, rng=rng)
        assert (sorted(moved) == sorted(straight)
                and moved[0] == straight[1] and moved[-1] == straight[-1])
    assert chains.to_turns(steps, "x", "zoom", 5, reorder=0.0, rng=rng) == straight
    assert (chains.to_turns(steps[:1], "x", "zoom", 5, reorder=1.0, rng=rng)
            == straight[:1] + straight[-1:])

def test_chains_replay_as_episodes(models):
    """Claim: `replay` makes of a chain the episode that a rollout would have been: crops, masks, an
    answer at the end."""
    vlm = models["qwen2.5"]
    for chain in chains.linearise(WORKED, config(recovery="Not this.")):
        e = zoom_rollout.replay(
            vlm, ASKED[0], chains.to_turns(chain.steps, chain.answer, "zoom"), "zoom")
        assert (e.finish_reason == "answer"
                and (sum(t.crop is not None for t in e.turns)
                     == sum(p is not None for _, p in chain.steps))
                and not any(t.error for t in e.turns))

# -----------------------------------------------------------------------------
# files

def fake_search(asked, stop_at=None):
    """In the place of tree_search: one right child for each question; counts what was asked, and
    dies before chunk `stop_at`."""
    def run(vlm, samples, style, cfg, seed):
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        asked.append([s.id for s in samples])
        roots = []
        for s in samples:
            root = Node(path(sample=s))
            child = Node(path(A, sample=s), root, visits=1, value=1.0)
            child.rollouts = [path(A, answer=s.options[s.answer], sample=s)]
            root.children = [child]
            roots.append(root)
        return roots, SimpleNamespace(computed=10, naive=30)
    return run

def test_a_killed_search_loses_no_finished_tree(models, tmp_path, monkeypatch):
    """Claim: killed in its third batch, the search goes on with that one, asks nothing twice, and
    ends with the same traces as one that was never killed; a last line torn by the kill is done
    again; other settings are refused."""
    vlm, log = models["qwen2.5"], str(tmp_path / "trees.jsonl")
    cfg, asked = train_sft.Config(n=6, trees=2, seed=1, difficulty="easy"), []
    run = lambda log, cfg=cfg: tree_search.search_traces(vlm, cfg, "zoom", log=log)
    monkeypatch.setattr(tree_search, "tree_search", fake_search(asked))
    whole, counts = run("")
    assert (len(whole) == 6 and counts["trees"] == counts["solved"] == 6
            and (counts["tokens_computed"], counts["tokens_naive"]) == (30, 90))
    every = sum(asked, [])

    asked.clear()
    monkeypatch.setattr(tree_search, "tree_search", fake_search(asked, stop_at=2))
    with pytest.raises(KeyboardInterrupt):
        run(log)
    assert asked == [every[:2], every[2:4]]
    with open(log) as f:
        lines = f.read().splitlines(True)
    assert len(lines) == 5
    with open(log, "a") as f:
        f.write('{"id": "' + every[4] + '", "tree": {"st')
    asked.clear()
    monkeypatch.setattr(tree_search, "tree_search", fake_search(asked))
    resumed, counts = run(log)
    assert asked == [every[4:]] and counts["trees"] == 6
    assert [(t.sample.id, t.turns) for t in resumed] == [(t.sample.id, t.turns) for t in whole]
    with open(log) as f:
        assert (f.read().startswith("".join(lines))
                and len(tree_search.kept_trees(log, json.loads(lines[0])["search"])) == 6)
    asked.clear()
    two = [dataclasses.replace(s, question="Another?")
           for s in data.toy("search", "train", 2, f"sft{cfg.seed}/0", "easy")]
    assert ([t.sample.question
             for t in tree_search.search_traces(vlm, cfg, "zoom", two, log=log)[0]]
            == ["Another?"] * 2)
    # Bug: trees of another file's questions, whose ids are the same, were used
    assert asked == [every[:2]]
    with pytest.raises(data.DataError, match="other settings"):
        run(log, train_sft.Config(n=6, trees=2, seed=1, difficulty="easy", exploration=9.0))

def test_search_of_a_file(models, monkeypatch):
    """Claim: with questions of its own, every one of them is searched once, whatever n is."""
    asked = []
    monkeypatch.setattr(tree_search, "tree_search", fake_search(asked))
    samples = data.toy("search", "train", 5, "file", "easy")
    out, counts = tree_search.search_traces(
        models["qwen2.5"], train_sft.Config(n=1, trees=2), "zoom", samples)
    assert ([len(a) for a in asked] == [2, 2, 1]
            and [t.sample.id for t in out] == [s.id for s in samples]
            and counts["trees"] == 5)

def test_search_that_finds_nothing_says_so(models, monkeypatch):
    monkeypatch.setattr(
        tree_search, "tree_search",
        lambda vlm, samples, *_: ([Node(path(sample=s)) for s in samples],
                                  SimpleNamespace(computed=0, naive=0)))
    with pytest.raises(data.DataError, match="no right answer to any of 2 questions"):
        tree_search.search_traces(models["qwen2.5"], train_sft.Config(), "zoom", ASKED)
    plain = model.VLM(models["qwen2.5"].model, models["qwen2.5"].tokenizer,
                      models["qwen2.5"].processor, "tiny", models["qwen2.5"].spec)
    with pytest.raises(data.DataError, match="leave out --plain"):
        tree_search.search_traces(plain, train_sft.Config(), "zoom", ASKED)
    for style, more in (("boxes", {}), ("zoom", {"max_zooms": 0}), ("think", {"depth": 0})):
        with pytest.raises(data.DataError, match="needs steps"):
            tree_search.search_traces(models["qwen2.5"], train_sft.Config(**more), style, ASKED)

# -----------------------------------------------------------------------------
# the whole, on the shipped model

@pytest.fixture(scope="module")
def shipped():
    return prefix.load_vlm("tiny", quiet=True)

@pytest.mark.parametrize("task, n, least", [("search", 40, 1), ("relation", 6, 3)])
def test_search_finds_traces_from_the_base(shipped, task, n, least):
    """Claim: without a teacher, from a base that was never warm-started; every trace is a whole
    episode and ends right."""
    style = data.PROMPT_STYLES[data.TASK_RECIPES[task]]
    samples = data.toy(task, "train", n, "search tests", "easy")
    found, counts = tree_search.search_traces(shipped, train_sft.Config(task=task), style, samples)
    assert (len(found) >= least and counts["solved"] >= least
            and counts["tokens_computed"] < 0.6 * counts["tokens_naive"])
    for trace in found:
        e = zoom_rollout.replay(shipped, trace.sample, trace.turns, style)
        parts = rewards.score(trace.sample, e.text, e.turns, data.TASK_RECIPES[task], e.frames, 3)
        assert parts["accuracy"] == parts["format"] == 1.0

# -----------------------------------------------------------------------------
# mutations

MUTATIONS = [  # where, old code, new code, the test that must fail, its arguments
    ("appendix.tree_search:uct", "math.log(node.parent.visits + 1) / (node.visits + 1)",
     "math.log(node.parent.visits + 1) / (node.parent.visits + 1)", test_uct_by_hand, {}),
    ("appendix.tree_search:uct", "node.value + exploration * math.sqrt(rarity)",
     "exploration * math.sqrt(rarity)", test_uct_by_hand, {}),
    ("appendix.tree_search:select", "[child for child in node.children if not child.closed]",
     "node.children", test_nothing_is_left, {}),
    ("appendix.tree_search:Node.add_outcome", "self.value += (reward - self.value) / self.visits",
     "self.value += reward - self.value", test_backup_by_hand, {}),
    ("appendix.tree_search:backup", "node = node.parent", "node = None", test_backup_by_hand, {}),
    ("appendix.chains:is_far", "math.dist(point, other) >= min_distance",
     "point != other", test_duplicates_are_rejected_by_distance, {}),
    ("appendix.tree_search:is_new",
     "seen += [sibling.steps[-1].point for sibling in siblings if sibling.answer is None]",
     "pass", test_duplicates_are_rejected_by_distance, {}),
    ("appendix.tree_search:is_new", "path.over",
     "False", test_a_broken_step_is_no_child, {}),
    ("appendix.tree_search:Node.add_child", "path.answer is not None",
     "False", test_an_answer_is_a_leaf_for_good, {}),
    ("appendix.tree_search:tree_search", "leaf.close()",
     "pass", test_search_ends_at_a_dead_end, {}),
    ("appendix.tree_search:play_out", "[(child, child.path)] * cfg.rollouts",
     "[(child, child.path)]", test_one_simulation, {}),
    ("appendix.tree_search:expand", "cfg.children - len(leaf.children)",
     "cfg.children", test_what_was_rejected_is_tried_again, {}),
    ("appendix.tree_search:play_out", "len(child.path.steps) + cfg.rollout_steps",
     "cfg.rollout_steps", test_limits, {}),
    ("appendix.tree_sampler:Sampler.step", "[path.tree for path in paths]",
     "[0 for path in paths]", test_zoom_steps, {}),
    ("appendix.tree_sampler:Sampler.prepare", "cache.keep_row(i)",
     "cache.keep_row(0)", test_zoom_steps, {}),
    ("appendix.tree_sampler:Sampler.step", "self.naive += len(path.episode.ids) + len(ids)",
     "self.naive += len(new.episode.ids)", test_zoom_steps, {}),
    ("appendix.tree_sampler:Sampler.read_turn", "points_in(thought)[-1:] == [turn.point]",
     "True", test_a_broken_turn_is_over,
     dict(text=looks(20, 30).replace("[20, 30]", "[40, 30]"), end=True)),
    ("appendix.tree_sampler:Sampler.read_turn", "zooms_left == 1", "False", test_zoom_steps, {}),
    ("appendix.chains:corrected_chains", "itertools.permutations(branches(node, node_support), 2)",
     "itertools.product(branches(node, node_support), branches(node, node_support))",
     test_linearise_by_hand, {}),
    ("appendix.chains:corrected_chains", "before if cfg.repeat_prefix else []",
     "[]", test_linearise_by_hand, {}),
    ("appendix.chains:corrected_chains",
     "failed and right.reward == 1 and wrong.steps and right.steps",
     "right.reward == 1 and wrong.steps and right.steps", test_linearise_by_hand, {}),
    ("appendix.chains:best", "sorted(different.values(), key=lambda chain: -chain.support)",
     "list(different.values())", test_the_better_supported_chain_comes_first, {}),
    ("appendix.chains:support", 'node["answer"] is not None',
     "False", test_the_better_supported_chain_comes_first, {}),
    ("appendix.chains:to_turns",
     "point is not None and has_room and is_far(point, called, min_distance)",
     "point is not None and is_far(point, called, min_distance)", test_to_turns, {}),
    ("appendix.chains:to_turns", "calls.insert(place, calls.pop(0))",
     "calls.pop(0)", test_reorder, {}),
    ("appendix.tree_search:search_traces",
     "[s for s, digest in zip(batch, digests) if digest not in trees]",
     "batch", test_a_killed_search_loses_no_finished_tree, {}),
    ("appendix.tree_search:kept_trees", "run.cut_torn_line(log)",
     "pass", test_a_killed_search_loses_no_finished_tree, {}),
    ("appendix.tree_search:kept_trees", 'rows[0].get("search") != settings',
     "False", test_a_killed_search_loses_no_finished_tree, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, models, tmp_path_factory, spoken,
                   monkeypatch):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {
        "vlm": lambda: models["qwen2.5"], "models": lambda: models,
        "tmp_path": lambda: tmp_path_factory.mktemp("mutant"),
        "spoken": lambda: spoken, "monkeypatch": lambda: monkeypatch})
