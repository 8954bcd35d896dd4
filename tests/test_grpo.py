"""Does grpo.py compute what the papers write? Each test opens with the bug that it guards against,
and at the end MUTATIONS puts such bugs into grpo.py, one at a time, and requires the named test to
fail.

Everything is float64. `close` measures errors relative to the expected tensor and refuses an
expectation of zeros, so a gradient that is zero everywhere passes nowhere.
"""
import math, random, warnings

import pytest
import torch

import grpo
from conftest import check_mutation, names

LOW, HIGH = 0.2, 0.28


@pytest.fixture(autouse=True)
def quiet_float64():
    before = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before[0])
    torch.set_num_threads(before[1])


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)

def close(got, want, tolerance=1e-12):
    got, want = tensor(got).detach(), tensor(want).detach()
    scale = want.abs().max().item()
    assert scale > 0, "an expectation of zeros tests nothing"
    assert got.shape == want.shape
    error = (got - want).abs().max().item()
    assert error <= tolerance * scale, (                    # nan fails too
        f"off by {error:.2g}, scale {scale:.2g}\ngot  {got}\nwant {want}")

def grad(scalar, leaf):
    return torch.autograd.grad(scalar, leaf, retain_graph=True)[0]

def at_ratio(ratios, old=-1.5):
    """logprobs (a leaf) and old_logprobs whose ratio is as given."""
    old_logprobs = torch.full_like(tensor(ratios), old)
    return (old_logprobs + tensor(ratios).log()).requires_grad_(), old_logprobs

def lengths_mask(lengths, T=None):
    return torch.arange(T or max(lengths)) < torch.tensor(lengths)[:, None]

def batch(lengths=(1, 3, 2, 6)):
    """Off-policy by about +-50 %, so that every region of the clip is visited: (logprobs, old, ref,
    advantages, mask)."""
    shape = len(lengths), max(lengths)
    old = -2 * torch.rand(shape) - 0.1
    return ((old + 0.5 * torch.randn(shape)).requires_grad_(), old,
            old + 0.3 * torch.randn(shape), torch.randn(shape[0]), lengths_mask(lengths))

# -----------------------------------------------------------------------------
# advantages

def test_unbiased_std():
    """Bug: the biased std (divide by G): all advantages sqrt(8 / 7) too large."""
    # mean .25, std .7071
    advantages = grpo.group_advantages(tensor([[2, 0, 0, 0, 0, 0, 0, 0]]))
    close(advantages, [[1.75 / (0.5 ** 0.5 + 1e-6)] + 7 * [-0.25 / (0.5 ** 0.5 + 1e-6)]])
    assert (round(advantages[0, 0].item(), 4) == 2.4749
            and round(advantages[0, 1].item(), 4) == -0.3536)
    close(grpo.group_advantages(tensor([[2, 0, 0, 0, 0, 0, 0, 0]]), "none"), [[1.75] + 7 * [-0.25]])

def test_group_order():
    """Bug: rewards land on other rows than their episodes (nanoGRPO: AAABBB against ABABAB), or the
    batch is one group."""
    rewards = tensor([[1, 0, 0], [10, 40, 10]])
    # B = P * G, all of prompt 0 first
    advantages = grpo.group_advantages(rewards, "none").flatten()
    close(advantages, [2 / 3, -1 / 3, -1 / 3, -10, 20, -10])
    close(grpo.group_advantages(rewards).sum(1) + 1, [1, 1])        # centred group by group
    logprobs, old = at_ratio(torch.ones(6, 2))
    loss = grpo.policy_loss(logprobs, old, advantages, torch.ones(6, 2, dtype=bool),
                            LOW, HIGH).sum()
    close(grad(loss, logprobs), -advantages[:, None].expand(6, 2))

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_zero_variance_groups(scale, dtype):
    """Bug: 0 / 0; or equal rewards whose float mean differs from them by one bit, which
    / (0 + 1e-6) makes a real advantage."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")              # torch warns about the std of one number
        for reward in (0.0, 0.1, 0.3, 0.7, 1.1, 1 / 3, 1e6 / 7):
            for G in range(1, 9):
                rewards = torch.full((2, G), reward, dtype=dtype)
                rewards[1, 0] += 1                  # a live neighbour
                advantages = grpo.group_advantages(rewards, scale)
                assert advantages.dtype == dtype and (advantages[0] == 0).all(), (reward, G)
                assert advantages.isfinite().all() and (advantages[1, 0] > 0.1) == (G > 1)

@pytest.mark.parametrize("scale", ["std", "none"])
def test_over_turn_statistics(scale):
    """Bug: an episode that was cut off is punished, or its zero reward stays in the statistics and
    raises all others (Mini-o3's code)."""
    rewards, finished = (
        tensor([[1, 0, 0, 0], [1, 1, 0, 0.5], [1, 0, 1, 0]]),
        torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool))
    got = grpo.group_advantages(rewards, scale, finished)
    std = 0.5 ** 0.5 + 1e-6 if scale == "std" else 1
    # no signal among the finished; none finished
    close(got, [[0.5 / std, -0.5 / std, 0, 0], [0] * 4, [0] * 4])
    # in the code's variant it would have one
    assert (grpo.group_advantages(rewards, scale)[1] != 0).all()
    close(grpo.group_advantages(rewards, scale, torch.ones_like(finished)),
          grpo.group_advantages(rewards, scale))
    random_rewards, some = torch.rand(40, 6), torch.rand(40, 6) < 0.6
    for row, kept, got in zip(random_rewards.tolist(), some.tolist(),
                              grpo.group_advantages(random_rewards, scale, some).tolist()):
        these = [r for r, k in zip(row, kept) if k]
        mean = sum(these) / max(1, len(these))
        std = (math.sqrt(sum((r - mean) ** 2 for r in these) / max(1, len(these) - 1)) + 1e-6
               if scale == "std" else 1)
        assert got == pytest.approx([(r - mean) / std if k and len(these) > 1 else 0
                                     for r, k in zip(row, kept)], abs=1e-12)

# -----------------------------------------------------------------------------
# bonuses

def test_curiosity():
    """Bug: everybody is paid for looking, or the rate is the batch's. By hand: G = 5, H = 0.3,
    alpha = 0.5, beta = 0.05, N = 1."""
    zooms = tensor([[1, 0, 0, 0, 0],        # rate 0.2: 0.5 * 0.1 for the one who looked
                    [3, 0, 0, 0, 0],        # the same, less 0.05 * 2
                    [1, 2, 0, 0, 0],        # rate 0.4 is enough; the second costs 0.05
                    [0, 0, 0, 0, 0]])
    close(grpo.curiosity(zooms),
          [[0.05, 0, 0, 0, 0], [-0.05, 0, 0, 0, 0], [0, -0.05, 0, 0, 0], [0] * 5])
    zooms = torch.randint(0, 4, (30, 8))
    want = [[2 * max(0.6 - sum(n > 0 for n in row) / 8, 0) * (n >= 1) + 0.1 * min(2 - n, 0)
             for n in row]
            for row in zooms.tolist()]
    close(grpo.curiosity(zooms, alpha=2, target=0.6, beta=0.1, cap=2), want)

def test_overlong():
    """DAPO eq. 13 with L_max = 20, L_cache = 4. Bug: paid for being short; below -1 beyond the
    limit."""
    close(grpo.overlong(tensor([[3, 16, 17, 18, 20, 99]]), 20, 4), [[0, 0, -0.25, -0.5, -1, -1]])
    lengths = torch.randint(1, 60, (5, 8)).double()
    def by_hand(y, L, cache):
        return 0 if y <= L - cache else ((L - cache) - y) / cache if y <= L else -1
    close(grpo.overlong(lengths, 40, 15),
          [[by_hand(y, 40, 15) for y in row] for row in lengths.tolist()])

# -----------------------------------------------------------------------------
# difficulty weights

@pytest.mark.parametrize("kind, want", [
    ("none", [1, 1, 1]),
    ("exp", [2.718281828, 1.648721271, 1]),
    ("power", [1.05, 0.55, 0.05]),
    ("log", [3.912023005, 0.653926467, 0]),
    ("log-original", [3.912023005, 0.653926467, -0.019802627]),
    ("inverse", [20, 2, 1]),
    ("easy", [0, 0.5, 1])])
def test_difficulty_values(kind, want):
    """Bug: other constants than the paper's; the easy prompts up instead of the hard ones."""
    accuracy = tensor([[0, 0], [0.25, 0.75], [1, 1]])       # group means 0, 0.5, 1
    close(grpo.difficulty_weights(accuracy, kind), want, 1e-9)
    assert grpo.difficulty_weights(accuracy).tolist() == [1, 1, 1]

@pytest.mark.parametrize("kind", list(grpo.WEIGHTS))
def test_difficulty_never_negative(kind):
    """Bug: -log(0.02 + m) is negative above m = 0.98, and the prompts that are solved get
    unlearned."""
    weights = grpo.difficulty_weights(torch.linspace(0, 1, 1001)[:, None].expand(-1, 4), kind)
    assert ((weights.diff() <= 0).all() and weights[0] >= 1
            or kind == "easy" and (weights.diff() > 0).all())
    # asked for: m = 0.981 ... 1
    assert (weights >= 0).all() or kind == "log-original" and (weights < 0).sum() == 20

def test_difficulty_against_the_formulas():
    """Each weight on random groups, as the paper's code writes it (miou_weight = 1)."""
    accuracy = torch.rand(50, 8) ** 2
    for kind, phi in {
            "exp": lambda m: math.e ** (1 - m),
            "power": lambda m: (1.05 - m) ** 1,
            "log": lambda m: max(0, -math.log(0.02 + m)),
            "log-original": lambda m: -math.log(0.02 + m),
            "none": lambda m: 1,
            "easy": lambda m: m,
            "inverse": lambda m: 1 / max(m, 0.05)}.items():
        want = tensor([phi(sum(row) / 8) for row in accuracy.tolist()])
        close(grpo.difficulty_weights(accuracy, kind), want)
        close(grpo.difficulty_weights(accuracy, kind, normalize=True), want * 50 / want.sum())

@pytest.mark.parametrize("kind", list(grpo.WEIGHTS))
def test_difficulty_normalized(kind):
    """Bug: the control for the larger step has another mean than 1, changes the proportions, or is
    0 / 0 when all is solved."""
    accuracy = torch.rand(5, 8)
    plain, normalized = (grpo.difficulty_weights(accuracy, kind, normalize=n)
                         for n in (False, True))
    close(normalized.mean(), 1)
    close(normalized / normalized[0], plain / plain[0])
    assert grpo.difficulty_weights(torch.ones(3, 8), kind, normalize=True).isfinite().all()

def test_difficulty_per_group():
    """Bug: the mean over the rank's batch instead of the group (UniVG-R1 unless its device batch is
    exactly one group)."""
    accuracy = tensor([[0, 0, 0, 1], [1, 1, 1, 0.8]])
    weights = grpo.difficulty_weights(accuracy, "exp")
    close(weights, [math.exp(0.75), math.exp(0.05)])
    close(weights, torch.cat([grpo.difficulty_weights(group[None], "exp") for group in accuracy]))

def test_difficulty_weights_loss():
    """Bug: weighted advantages that are not the weighted loss of the paper (true only because no
    weight is negative)."""
    logprobs, old, _, advantages, mask = batch()
    # [P] -> [B]
    weights = grpo.difficulty_weights(torch.rand(2, 2), "log").repeat_interleave(2)
    weighted = grpo.policy_loss(logprobs, old, weights * advantages, mask, LOW, HIGH)
    close(weighted, weights[:, None] * grpo.policy_loss(logprobs, old, advantages, mask, LOW, HIGH))

# -----------------------------------------------------------------------------
# policy loss

def test_loss_closed_form():
    """Bug: any, in value or gradient, for 2 x 3 tokens worked out by hand."""
    logprobs, old = at_ratio([[1.1, 1.5, 0.5], [0.9, 0.5, 7.0]])
    advantages, mask = tensor([2, -1]), lengths_mask([3, 2])
    per_token = grpo.policy_loss(logprobs, old, advantages, mask, LOW, HIGH)
    # -A ratio, or -A 1.28 and -A 0.8 where the clip holds
    close(per_token, [[-2.2, -2.56, -1.0], [0.9, 0.8, 0]])
    close(grpo.aggregate(per_token, mask), -4.06 / 5)
    close(grad(grpo.aggregate(per_token, mask), logprobs), [[-2.2 / 5, 0, -1 / 5], [0.9 / 5, 0, 0]])

    per_token = grpo.policy_loss(logprobs, old, advantages, mask, LOW, HIGH)
    close(grpo.aggregate(per_token, mask, "sequence"), (-5.76 / 3 + 1.7 / 2) / 2)
    close(grad(grpo.aggregate(per_token, mask, "sequence"), logprobs),
          [[-2.2 / 6, 0, -1 / 6], [0.9 / 4, 0, 0]])

def test_clip_truth_table():
    """Bug: the clip on the wrong side for A < 0 (max where PPO takes min): stops the way back, lets
    the rest run away."""
    logprobs, old = at_ratio([[0.5, 1.5], [0.5, 1.5]])
    loss = grpo.policy_loss(logprobs, old, tensor([1, -1]), torch.ones(2, 2, dtype=bool),
                            LOW, HIGH).sum()
    # d objective / d ratio:
    close(grad(-loss, logprobs) / tensor([0.5, 1.5]),
          [[1, 0],                      # A > 0: too low, must rise; enough
           [0, -1]])                    # A < 0: enough; too high, must fall

def test_asymmetric_clip():
    """Bug: clip_low and clip_high swapped, or one of them used on both sides."""
    ratios = tensor([0.71, 0.73, 0.79, 0.81, 1.19, 1.21, 1.27, 1.29])
    logprobs, old = at_ratio(ratios.expand(2, 8))
    loss = grpo.policy_loss(logprobs, old, tensor([3, -3]), torch.ones(2, 8, dtype=bool),
                            0.2, 0.28).sum()
    alive = tensor([[1, 1, 1, 1, 1, 1, 1, 0],                       # A > 0: up to 1 + 0.28
                    [0, 0, 0, 1, 1, 1, 1, 1]])                      # A < 0: down to 1 - 0.2
    close(grad(loss, logprobs), tensor([[-3], [3]]) * ratios * alive)

@pytest.mark.parametrize("old_is", ["detached", "the same tensor"])
@pytest.mark.parametrize("kind", list(grpo.LOSSES))
def test_on_policy_gradient_equals_reinforce(kind, old_is):
    """Bug: a loss of ~0 taken for 'nothing to learn'; old_logprobs with a gradient, which cancels
    all of it."""
    W, tokens, mask = (torch.randn(4, 5, 7, requires_grad=True), torch.randint(7, (4, 5, 1)),
                       lengths_mask([5, 2, 4, 1]))
    logprobs = W.log_softmax(-1).gather(2, tokens)[..., 0]          # [B, T]
    advantages = grpo.group_advantages(tensor([[1, 0], [0.2, 0.7]])).flatten()
    old = logprobs.detach() if old_is == "detached" else logprobs
    loss = grpo.aggregate(grpo.policy_loss(logprobs, old, advantages, mask, LOW, HIGH, kind),
                          mask, "sequence")
    if kind == "grpo":
        assert abs(loss.item()) < 1e-12
    by_hand = 0
    for b, n in enumerate([5, 2, 4, 1]):
        by_hand = by_hand - advantages[b] * logprobs[b, :n].sum() / n / 4
    close(grad(loss, W), grad(by_hand, W))

def loss_of(kind, ratios, A, low=LOW, high=HIGH):
    """One row -> its per-token losses, and d (their sum) / d logprobs."""
    logprobs, old = at_ratio([ratios])
    per_token = grpo.policy_loss(logprobs, old, tensor([A]), torch.ones(1, len(ratios), dtype=bool),
                                 low, high, kind)
    return per_token[0], grad(per_token.sum(), logprobs)[0]

def test_dual_clip():
    """Bug: the ceiling where A > 0 too, or none: at ratio 9, A = -2, PPO's loss is 18 and grows
    without bound."""
    value, gradient = loss_of("dual-clip", [0.5, 1, 2.9, 3.1, 9], -2)
    close(value, [1.6, 2, 5.8, 6, 6])                       # -A max(ratio, 0.8), at most -3 A
    close(gradient, [0, 2, 5.8, 0, 0])
    value, gradient = loss_of("dual-clip", [0.5, 1, 2.9, 9], 2)
    close(value, [-1, -2, -2.56, -2.56])
    close(gradient, [-1, -2, 0, 0])

def test_gspo():
    """Bug: the arithmetic mean of the ratios, a token's own ratio, or padding in the mean. Ratios 2
    and 0.5: the answer's is 1."""
    value, gradient = loss_of("gspo", [2, 0.5], 3, 3e-4, 4e-4)
    close(value, [-3, -3])
    close(gradient, [-3, -3])                               # of two tokens: each has half of each
    # (1.01)^(1/2) > 1.0004: the whole answer stops
    value, gradient = loss_of("gspo", [2, 0.505], 3, 3e-4, 4e-4)
    close(value, [-3 * 1.0004] * 2)
    assert (gradient == 0).all()
    logprobs, old = at_ratio([[2, 0.5, 7, 7]])
    mask = lengths_mask([2], 4)
    close(grpo.policy_loss(logprobs, old, tensor([3]), mask, 3e-4, 4e-4, "gspo"), [[-3, -3, 0, 0]])

def test_cispo():
    """Bug: a gradient through the weight (then it is PPO without its min), or a clip that stops a
    token."""
    value, gradient = loss_of("cispo", [0.1, 1, 1.2, 5], 2)
    # -A min(ratio, 1.28): never 0, no lower bound
    close(gradient, [-0.2, -2, -2.4, -2.56])
    close(value, tensor([-0.2, -2, -2.4, -2.56]) * (tensor([0.1, 1, 1.2, 5]).log() - 1.5))

def test_sapo():
    """Bug: one temperature for both signs, or no 4: the gradient at ratio 1 is REINFORCE's and
    fades on both sides."""
    sigma = lambda x: 1 / (1 + math.exp(-x))
    value, gradient = loss_of("sapo", [1, 2, 0.5], 3)
    close(value, [-6, -12 * sigma(1), -12 * sigma(-0.5)])
    close(gradient,
          [-3, -3 * 2 * 4 * sigma(1) * sigma(-1), -3 * 0.5 * 4 * sigma(0.5) * sigma(-0.5)])
    value, gradient = loss_of("sapo", [1, 2], -3)
    close(value, [6 / 1.05, 12 / 1.05 * sigma(1.05)])
    close(gradient, [3, 3 * 2 * 4 * sigma(1.05) * sigma(-1.05)])

def test_reinforce_has_no_ratio():
    """Bug: a ratio or a clip creeps into plain REINFORCE."""
    logprobs, old = at_ratio([[0.1, 1.0, 9.0]])
    per_token = grpo.policy_loss(logprobs, old, tensor([2]), torch.ones(1, 3, dtype=bool),
                                 LOW, HIGH, "reinforce")
    close(per_token, -2 * logprobs)
    close(grad(per_token.sum(), logprobs), [[-2, -2, -2]])

# -----------------------------------------------------------------------------
# KL

def kl(p, q):
    return (p.exp() * (p - q)).sum()

def softmaxes():
    logits = torch.randn(5, requires_grad=True)
    return logits, logits.log_softmax(0), torch.randn(5).log_softmax(0)

@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_gradient(kind):
    """Bug: k3 as a loss believed to follow KL(pi || ref); it follows KL(ref || pi), and k2 the
    former. By enumeration."""
    logits, pi, ref = softmaxes()
    # sample fixed, term differentiated
    expected = (pi.exp().detach() * grpo.kl_penalty(pi[None], ref[None], kind)[0]).sum()
    want = {"k2": kl(pi, ref), "k3": kl(ref, pi)}
    close(grad(expected, logits), grad(want[kind], logits))
    other = grad(kl(ref, pi) if kind == "k2" else kl(pi, ref), logits)
    with pytest.raises(AssertionError):                     # the two do differ here
        close(grad(want[kind], logits), other, 0.01)

def test_k1_gradient_is_noise():
    """Bug: k1 used as a loss. Each token has a gradient, their expectation has none."""
    logits, pi, ref = softmaxes()
    penalty = grpo.kl_penalty(pi[None], ref[None], "k1")[0]
    expected = grad((pi.exp().detach() * penalty).sum(), logits)
    one_sample = grad(penalty[0], logits)
    close(one_sample, torch.eye(5)[0] - pi.exp())
    assert expected.abs().max() < 1e-12 * one_sample.abs().max()

def test_unbiased_k3_off_policy():
    """Bug: k3's gradient without the ratio: on samples of an older policy it is neither KL's; with
    it, it is KL(pi || ref)'s. By enumeration."""
    logits, pi, ref = softmaxes()
    old = (pi + 0.7 * torch.randn(5)).detach().log_softmax(0)
    penalty = grpo.kl_penalty(pi[None], ref[None], "k3-unbiased", old_logprobs=old[None])[0]
    close((old.exp() * penalty).sum(), kl(pi, ref))
    close(grad((old.exp() * penalty).sum(), logits), grad(kl(pi, ref), logits))
    # old_logprobs = None: pi itself, held fixed
    on_policy = grpo.kl_penalty(pi[None], ref[None], "k3-unbiased")[0]
    close(on_policy, grpo.kl_penalty(pi[None], ref[None], "k3")[0])
    close(grad((pi.exp().detach() * on_policy).sum(), logits), grad(kl(pi, ref), logits))

def test_perception():
    """Bug: a sign or a direction: PAPO wants the answer to be unlikely where the image is hidden,
    and its term is subtracted."""
    seen, hidden = (tensor([[-1, -1, -1, 9]]).requires_grad_(),
                    tensor([[-1, -3, -0.5, math.nan]]).requires_grad_())
    gain = grpo.perception(seen, hidden, lengths_mask([3], 4))
    # r - log r - 1, r = pi(hidden) / pi(seen)
    close(gain, [[0, math.exp(-2) + 1, math.exp(0.5) - 1.5, 0]])
    close(grad(gain.sum(), seen), [[0, 1 - math.exp(-2), 1 - math.exp(0.5), 0]])
    close(grad(gain.sum(), hidden), [[0, math.exp(-2) - 1, math.exp(0.5) - 1, 0]])
    pi, masked = torch.randn(6).log_softmax(0), torch.randn(6).log_softmax(0)
    close((pi.exp() * grpo.perception(pi[None], masked[None],
                                      torch.ones(1, 6, dtype=bool))[0]).sum(),
          kl(pi, masked))

def test_importance_weights():
    """Bug: the fraction upside down, padding that is nan, a gradient through the weight. Over
    tokens of the sampler the uncapped weight has mean 1, and a weighted mean is that of pi."""
    pi = tensor([[-1, -1, -3, 9]]).requires_grad_()
    weights = grpo.importance_weights(pi, tensor([[-1, -3, -1, math.nan]]), lengths_mask([3], 4),
                                      2.0)
    close(weights, [[1, 2, math.exp(-2), 0]])
    assert not weights.requires_grad
    trainer, sampler, value = (torch.randn(6).log_softmax(0), torch.randn(6).log_softmax(0),
                               torch.randn(6))
    weights = grpo.importance_weights(trainer[None], sampler[None],
                                      torch.ones(1, 6, dtype=bool), 1e9)[0]
    close((sampler.exp() * weights * value).sum(), (trainer.exp() * value).sum())

def test_kl_values():
    """Bug: a sign or a direction: k1 and k3 estimate KL(pi || ref), k2 and k3 are never negative,
    and all are 0 at equality."""
    _, pi, ref = softmaxes()
    k1, k2, k3 = (grpo.kl_penalty(pi[None], ref[None], kind)[0] for kind in ("k1", "k2", "k3"))
    close((pi.exp() * k1).sum(), kl(pi, ref))
    close((pi.exp() * k3).sum(), kl(pi, ref))
    close(k2, (pi - ref) ** 2 / 2)
    assert (k3 > 0).all() and (k1 < 0).any()
    assert (grpo.kl_penalty(pi, pi, "k3") == 0).all()
    assert torch.equal(grpo.kl_penalty(pi, ref), k3)        # the default

def test_k3_small_differences():
    """Bug: exp(d) - 1 - d in float32 is rounding noise for small d, often negative; a run starts
    with small d."""
    d = torch.logspace(-6, -2, 9, dtype=torch.float32)
    close(grpo.kl_penalty(-d, torch.zeros(9, dtype=torch.float32)) / d ** 2,
          torch.full((9,), 0.5), 0.2)

# -----------------------------------------------------------------------------
# aggregation

@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("kind", list(grpo.AGGREGATES))
def test_microbatch_invariance(kind, micro):
    """Bug: every micro-batch divided by its own tokens (nanochat: a token of row 0 weighs .25, .125
    or .083 for size 1, 2, 4)."""
    logprobs, old, ref, advantages, mask = batch((1, 3, 2, 6))
    def loss(rows, denominator=None):
        T = mask[rows].sum(1).max()             # each micro-batch padded to its own longest
        p, o, r, m = (x[rows, :T] for x in (logprobs, old, ref, mask))
        per_token = (grpo.policy_loss(p, o, advantages[rows], m, LOW, HIGH)
                     + 0.1 * grpo.kl_penalty(p, r, mask=m))
        return grpo.aggregate(per_token, m, kind, denominator)
    whole = loss(slice(0, 4))
    parts = [slice(i, i + micro) for i in range(0, 4, micro)]
    summed = sum(loss(rows, {"token": 12, "sequence": 4, "constant": 24}[kind]) for rows in parts)
    close(summed, whole)
    close(grad(summed, logprobs), grad(whole, logprobs))
    if kind == "token" and micro < 4:           # and it is a real danger with these lengths
        with pytest.raises(AssertionError):
            close(sum(loss(rows) for rows in parts) / len(parts), whole, 0.01)

def test_aggregate_weights():
    """Bug: the kinds confused: how much one token counts, for lengths 1 and 4, with a third row
    without any token."""
    per_token, mask = torch.ones(3, 4, requires_grad=True), lengths_mask([1, 4, 0])
    dense = lambda a, b: [[a, 0, 0, 0], [b, b, b, b], [0, 0, 0, 0]]
    close(grad(grpo.aggregate(per_token, mask), per_token), dense(1 / 5, 1 / 5))
    close(grad(grpo.aggregate(per_token, mask, "sequence"), per_token), dense(1 / 3, 1 / 12))
    close(grad(grpo.aggregate(per_token, mask, "token", 30), per_token), dense(1 / 30, 1 / 30))
    close(grad(grpo.aggregate(per_token, mask, "constant", 30), per_token), dense(1 / 30, 1 / 30))
    # rows * T, padding or not
    close(grad(grpo.aggregate(per_token, mask, "constant"), per_token), dense(1 / 12, 1 / 12))

@pytest.mark.parametrize("kind", list(grpo.AGGREGATES))
def test_step_without_tokens(kind):
    """Bug: 0 / 0 where nothing was sampled; one such micro-batch would turn all weights into
    nan."""
    logprobs, old, _, advantages, mask = batch()
    def loss(mask, denominator=None):
        return grpo.aggregate(grpo.policy_loss(logprobs, old, advantages, mask, LOW, HIGH),
                              mask, kind, denominator)
    nobody = torch.zeros_like(mask)
    for denominator in (None, 0, torch.tensor(0), 12):
        assert loss(nobody, denominator).item() == 0
        close(grad(loss(mask) + loss(nobody, denominator), logprobs), grad(loss(mask), logprobs))

@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
@pytest.mark.parametrize("penalty", list(grpo.PENALTIES))
@pytest.mark.parametrize("kind", list(grpo.AGGREGATES))
@pytest.mark.parametrize("loss", list(grpo.LOSSES))
def test_padding_does_not_leak(loss, kind, penalty, garbage):
    """Bug: a mask multiplied onto the result: 0 * nan = nan, in the value and, even behind a
    `where`, in the backward pass."""
    # one row is padding from end to end
    logprobs, old, ref, advantages, mask = batch((1, 0, 2, 6))
    def value_and_gradient(logprobs, old, ref):
        logprobs = logprobs.detach().requires_grad_()
        per_token = grpo.policy_loss(logprobs, old, advantages, mask, LOW, HIGH, loss)
        assert (per_token[~mask] == 0).all()
        total = grpo.aggregate(
            per_token + 0.1 * grpo.kl_penalty(logprobs, ref, penalty, mask=mask), mask, kind)
        return total, grad(total, logprobs)
    value, gradient = value_and_gradient(logprobs, old, ref)
    assert (gradient[~mask] == 0).all()
    for dirty in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]:
        soiled = [torch.where(mask | (not d), x, garbage)
                  for d, x in zip(dirty, (logprobs, old, ref))]
        dirty_value, dirty_gradient = value_and_gradient(*soiled)
        close(dirty_value, value)
        close(dirty_gradient, gradient)
    assert grpo.aggregate(torch.where(mask, 1.0, garbage), mask, kind).isfinite()

def test_nan_in_a_real_token_is_loud():
    """Bug: a guard so thorough (nan_to_num) that a broken forward pass trains on in silence."""
    logprobs, old, ref, advantages, mask = batch()
    broken = logprobs.detach().clone()
    broken[3, 2] = math.nan
    assert grpo.aggregate(grpo.policy_loss(broken, old, advantages, mask, LOW, HIGH), mask).isnan()
    assert grpo.aggregate(grpo.kl_penalty(broken, ref, mask=mask), mask).isnan()

# -----------------------------------------------------------------------------
# everything at once, against plain loops over Python floats

def objective(kind, A, ratio, logprob):
    """One token, or for GSPO one answer, of each algorithm -> -objective, its derivative by
    log pi."""
    sigma = lambda x: 1 / (1 + math.exp(-x))
    stopped = ratio > 1 + HIGH if A > 0 else ratio < 1 - LOW
    bounded = min(max(ratio, 1 - LOW), 1 + HIGH)
    ppo = (-A * bounded, 0) if stopped else (-A * ratio, -A * ratio)
    tau = 1.0 if A > 0 else 1.05
    gate, slope = (
        4 / tau * sigma(tau * (ratio - 1)),
        4 * sigma(tau * (ratio - 1)) * (1 - sigma(tau * (ratio - 1))) * ratio)
    return {"grpo": ppo, "gspo": ppo, "dual-clip": (-3 * A, 0) if A < 0 and ratio > 3 else ppo,
            "reinforce": (-A * logprob, -A),
            "cispo": (-min(ratio, 1 + HIGH) * A * logprob, -min(ratio, 1 + HIGH) * A),
            "sapo": (-gate * A, -slope * A)}[kind]

def by_loops(rewards, accuracy, logprobs, old, ref, lengths, scale, weight, penalty, kind,
             kl_coef=0.04, loss_kind="grpo"):
    """The papers' formulas, literally: -> loss, d loss / d logprobs."""
    P, G, T = len(rewards), len(rewards[0]), len(logprobs[0])
    loss, gradient = 0.0, [[0.0] * T for _ in range(P * G)]
    for p in range(P):
        mean = sum(rewards[p]) / G
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards[p]) / (G - 1))
        m = sum(accuracy[p]) / G
        phi = {"none": 1, "exp": math.exp(1 - m), "power": 1.05 - m,
               "log": max(0, -math.log(0.02 + m)), "log-original": -math.log(0.02 + m),
               "inverse": 1 / max(m, 0.05), "easy": m}[weight]
        for g in range(G):
            b = p * G + g
            A = (rewards[p][g] - mean) / (std + 1e-6 if scale == "std" else 1)
            share = {"token": 1 / sum(lengths), "sequence": 1 / (P * G * max(1, lengths[b])),
                     "constant": 1 / (P * G * T)}[kind]
            whole = sum(logprobs[b][t] - old[b][t] for t in range(lengths[b])) / max(1, lengths[b])
            for t in range(lengths[b]):
                own = math.exp(logprobs[b][t] - old[b][t])
                value, slope = objective(
                    loss_kind, phi * A, math.exp(whole) if loss_kind == "gspo" else own,
                    logprobs[b][t])
                d = ref[b][t] - logprobs[b][t]
                k, dk = {"k1": (-d, 1),
                         "k2": (d * d / 2, -d),
                         "k3": (math.exp(d) - d - 1, 1 - math.exp(d)),
                         "k3-unbiased": (own * (math.exp(d) - d - 1), -own * d)}[penalty]
                loss += share * (value + kl_coef * k)
                gradient[b][t] += share * (slope + kl_coef * dk)
    return loss, gradient

@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("weight", list(grpo.WEIGHTS))
@pytest.mark.parametrize("penalty", list(grpo.PENALTIES))
@pytest.mark.parametrize("kind", list(grpo.AGGREGATES))
def test_against_loops(scale, weight, penalty, kind):
    """Bug: broadcasting along the wrong axis, or any difference between the pieces together and the
    formulas."""
    for seed in range(3):
        rng = random.Random(seed)
        P, G = rng.randint(1, 3), rng.randint(2, 5)
        lengths = [rng.randint(0, 7) for _ in range(P * G - 1)] + [7]
        logprobs, old, ref, _, mask = batch(lengths)
        rewards, accuracy = torch.rand(P, G), torch.rand(P, G)
        advantages = (grpo.group_advantages(rewards, scale)
                      * grpo.difficulty_weights(accuracy, weight)[:, None])
        per_token = grpo.policy_loss(logprobs, old, advantages.flatten(), mask, LOW, HIGH)
        loss = grpo.aggregate(
            per_token + 0.04 * grpo.kl_penalty(logprobs, ref, penalty, mask, old), mask, kind)
        lists = (x.tolist() for x in (rewards, accuracy, logprobs, old, ref))
        want, want_gradient = by_loops(*lists, lengths, scale, weight, penalty, kind)
        close(loss, want, 1e-10)
        close(grad(loss, logprobs), want_gradient, 1e-10)

@pytest.mark.parametrize("kind", list(grpo.AGGREGATES))
@pytest.mark.parametrize("loss_kind", list(grpo.LOSSES))
def test_every_loss_against_loops(loss_kind, kind):
    """Bug: any difference between an algorithm and its paper's formula, far off-policy (ratios from
    about 0.1 to 10) and padded."""
    for seed in range(20):
        rng = random.Random(seed)
        lengths = [rng.randint(0, 7) for _ in range(7)] + [7]
        logprobs, old, ref, _, mask = batch(lengths)
        old = old + 0.7 * torch.randn_like(old) * (seed % 3)
        rewards, accuracy = torch.rand(2, 4), torch.rand(2, 4)
        per_token = grpo.policy_loss(logprobs, old, grpo.group_advantages(rewards).flatten(), mask,
                                     LOW, HIGH, loss_kind)
        loss = grpo.aggregate(per_token, mask, kind)
        lists = (x.tolist() for x in (rewards, accuracy, logprobs, old, ref))
        want, want_gradient = by_loops(*lists, lengths, "std", "none", "k3", kind, 0, loss_kind)
        close(loss, want, 1e-10)
        close(grad(loss, logprobs), want_gradient, 1e-10)

def test_clipfrac_is_the_losses_own():
    """Bug: PPO's bounds counted for a loss that has others, or none."""
    logprobs, old = at_ratio([[0.5, 1.5, 4, 1], [0.5, 1.5, 4, 1]])
    count = lambda kind, A=(1, -1): grpo.stats(
        logprobs, old, torch.ones(2, 4, dtype=bool), LOW, HIGH, tensor(A), kind)["clipfrac"] * 8
    assert ([count(kind) for kind in ("grpo", "dual-clip", "gspo", "cispo", "sapo", "reinforce")]
            == pytest.approx([3, 4, 4, 0, 0, 0]))
    assert count("grpo", (0, -1)) == pytest.approx(1)       # nothing to stop where A = 0

def test_stats():
    """Bug: clipfrac counts tokens that are outside the bounds but on their way back; padding in the
    means; approx_kl reversed."""
    logprobs, old = at_ratio([[0.5, 1.0, 1.5], [0.5, 1.5, 9.0]])
    logprobs = logprobs.detach()
    logprobs[1, 2] = math.nan
    got = grpo.stats(logprobs, old, lengths_mask([3, 2]), LOW, HIGH, tensor([1, -1]))
    ratios = [0.5, 1.0, 1.5, 0.5, 1.5]
    want = {"clipfrac": 2 / 5, "approx_kl": sum(r - 1 - math.log(r) for r in ratios) / 5,
            "ratio_mean": 1.0, "ratio_min": 0.5, "ratio_max": 1.5}
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name])
    empty = grpo.stats(logprobs, old, lengths_mask([0, 0], 3), LOW, HIGH, tensor([1, -1]))
    assert empty == {"clipfrac": 0, "approx_kl": 0, "ratio_mean": 1, "ratio_min": 1, "ratio_max": 1}

def test_unknown_names():
    """Bug: a misspelt kind that silently runs another algorithm."""
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=bool)
    for call in (lambda: grpo.group_advantages(x, "sdt"),
                 lambda: grpo.difficulty_weights(x, "exponential"),
                 lambda: grpo.policy_loss(x, x, x[:, 0], mask, LOW, HIGH, "gpro"),
                 lambda: grpo.kl_penalty(x, x, "k4"),
                 lambda: grpo.aggregate(x, mask, "tokens")):
        with pytest.raises(AssertionError, match="expected"):
            call()

# -----------------------------------------------------------------------------
# do the tests bite? Each line puts one bug into grpo.py; the named test must fail.

LEAK = dict(loss="grpo", kind="token", penalty="k3", garbage=math.nan)

MUTATIONS = [
    ("grpo:importance_weights", "logprobs.detach()", "logprobs", test_importance_weights, {}),
    ("grpo:importance_weights", "torch.where(mask, gap.exp().clamp(max=cap), 0.0)",
     "gap.exp().clamp(max=cap)", test_importance_weights, {}),
    ("grpo:group_advantages", "unbiased = min(1, rewards.shape[1] - 1)",
     "unbiased = 0", test_unbiased_std, {}),
    ("grpo:advantages_of_finished", "advantages[p, kept] = group_advantages(group, scale)[0]",
     "advantages[p, kept] = group_advantages(rewards[p:p + 1], scale)[0, kept]",
     test_over_turn_statistics, dict(scale="std")),
    ("grpo:advantages_of_finished", "kept.any()",
     "kept.all()", test_over_turn_statistics, dict(scale="none")),
    ("grpo:curiosity", "zoomed.mean(1, keepdim=True)", "zoomed.mean()", test_curiosity, {}),
    ("grpo:curiosity", "alpha * (target - rate).clamp(min=0) * zoomed",
     "alpha * (target - rate).clamp(min=0)", test_curiosity, {}),
    ("grpo:curiosity", "(cap - zooms).clamp(max=0)", "cap - zooms", test_curiosity, {}),
    ("grpo:overlong", "(room / soft).clamp(-1, 0)",
     "(room / soft).clamp(-1, 1)", test_overlong, {}),
    ("grpo:overlong", "limit - soft - lengths", "limit - lengths", test_overlong, {}),
    ("grpo:overlong", "limit - soft - lengths", "soft - lengths", test_overlong, {}),
    ("grpo:group_advantages", "std + 1e-6", "std + 1e-4", test_unbiased_std, {}),
    ("grpo:group_advantages", "rewards.mean(1, keepdim=True)",
     "rewards.mean()", test_group_order, {}),
    ("grpo:policy_loss", "advantages[:, None]",
     "advantages.flip(0)[:, None]", test_group_order, {}),
    ("grpo:group_advantages", "rewards = rewards - rewards[:, :1]",
     "rewards = rewards", test_zero_variance_groups, dict(scale="std", dtype=torch.float32)),
    ("grpo:WEIGHTS", "(-torch.log(0.02 + m)).clamp(min=0)",
     "-torch.log(0.02 + m)", test_difficulty_never_negative, dict(kind="log")),
    ("grpo:WEIGHTS", "1 - m", "1 + m", test_difficulty_against_the_formulas, {}),
    ("grpo:dual_clip", "3 * advantages.abs()", "-3 * advantages", test_dual_clip, {}),
    ("grpo:dual_clip", "3 * advantages.abs()", "9 * advantages.abs()", test_dual_clip, {}),
    ("grpo:gspo", "mask.sum(1, keepdim=True).clamp(min=1)",
     "mask.shape[1]", test_every_loss_against_loops, dict(loss_kind="gspo", kind="sequence")),
    ("grpo:gspo", "total / length", "total", test_gspo, {}),
    ("grpo:cispo", "ratio.clamp(max=1 + clip_high).detach()",
     "ratio.clamp(max=1 + clip_high)", test_cispo, {}),
    ("grpo:cispo", "ratio.clamp(max=1 + clip_high).detach()",
     "ratio.clamp(1 - clip_low, 1 + clip_high).detach()", test_cispo, {}),
    ("grpo:sapo", "torch.where(advantages > 0, 1.0, 1.05)", "1.0", test_sapo, {}),
    ("grpo:sapo", "-4 / tau * gate * advantages", "-1 / tau * gate * advantages", test_sapo, {}),
    ("grpo:sapo", "-4 / tau * gate * advantages",
     "-4 * gate * advantages", test_every_loss_against_loops,
     dict(loss_kind="sapo", kind="token")),
    ("grpo:PENALTIES", "ratio * (torch.expm1(d) - d)",
     "torch.expm1(d) - d", test_unbiased_k3_off_policy, {}),
    ("grpo:kl_penalty", "old_logprobs = old_logprobs.detach()",
     "pass", test_unbiased_k3_off_policy, {}),
    ("grpo:perception", "masked_logprobs - logprobs",
     "logprobs - masked_logprobs", test_perception, {}),
    ("grpo:perception", "torch.where(mask, masked_logprobs, 0.0)",
     "torch.where(mask, 2 * masked_logprobs - masked_logprobs.detach(), 0.0)",
     test_perception, {}),
    ("grpo:difficulty_weights", "accuracy.mean(1)",
     "accuracy.mean().expand(len(accuracy))", test_difficulty_per_group, {}),
    ("grpo:difficulty_weights", "weights.mean()",
     "weights.sum()", test_difficulty_normalized, dict(kind="exp")),
    ("grpo:ppo_clip", "-torch.min(ratio * advantages, clipped * advantages)",
     "-0 * torch.min(ratio * advantages, clipped * advantages)", test_loss_closed_form, {}),
    ("grpo:ppo_clip", "-torch.min(ratio * advantages, clipped * advantages)",
     "-torch.max(ratio * advantages, clipped * advantages)", test_clip_truth_table, {}),
    ("grpo:ppo_clip", "-torch.min(ratio * advantages, clipped * advantages)",
     "torch.min(ratio * advantages, clipped * advantages)", test_clip_truth_table, {}),
    # right for A > 0 only
    ("grpo:ppo_clip", "-torch.min(ratio * advantages, clipped * advantages)",
     "-torch.min(ratio, clipped) * advantages", test_clip_truth_table, {}),
    ("grpo:ppo_clip", "ratio.clamp(1 - clip_low, 1 + clip_high)",
     "ratio.clamp(1 - clip_high, 1 + clip_low)", test_asymmetric_clip, {}),
    ("grpo:ppo_clip", "ratio.clamp(1 - clip_low, 1 + clip_high)",
     "ratio.clamp(1 - clip_low, 1 + clip_low)", test_asymmetric_clip, {}),
    ("grpo:policy_loss", "old_logprobs.detach()",
     "old_logprobs", test_on_policy_gradient_equals_reinforce,
     dict(kind="grpo", old_is="the same tensor")),
    ("grpo:reinforce", "-advantages * logprobs",
     "-advantages * torch.exp(logprobs - old_logprobs)", test_reinforce_has_no_ratio, {}),
    ("grpo:PENALTIES", "lambda d, ratio: torch.expm1(d) - d",
     "lambda d, ratio: torch.expm1(-d) + d", test_kl_gradient, dict(kind="k3")),
    ("grpo:PENALTIES", "lambda d, ratio: torch.expm1(d) - d",
     "lambda d, ratio: torch.exp(d) - 1 - d", test_k3_small_differences, {}),
    ("grpo:PENALTIES", "d ** 2 / 2", "d ** 2", test_kl_gradient, dict(kind="k2")),
    ("grpo:PENALTIES", "lambda d, ratio: -d", "lambda d, ratio: d", test_kl_values, {}),
    ("grpo:aggregate", "if denominator is None: denominator = count",
     "denominator = count", test_microbatch_invariance, dict(kind="token", micro=2)),
    ("grpo:aggregate", "if denominator is None: denominator = count",
     "denominator = count", test_microbatch_invariance, dict(kind="sequence", micro=2)),
    ("grpo:per_sequence_mean", "mask.sum(1).clamp(min=1)",
     "mask.shape[1]", test_aggregate_weights, {}),
    ("grpo:per_sequence_mean", "mask.sum(1).clamp(min=1)",
     "mask.sum(1)", test_padding_does_not_leak, {**LEAK, "kind": "sequence"}),
    ("grpo:aggregate", "torch.where(mask, per_token, 0.0)",
     "per_token * mask", test_padding_does_not_leak, LEAK),
    ("grpo:policy_loss", "logprobs = torch.where(mask, logprobs, 0.0)",
     "pass", test_padding_does_not_leak, LEAK),
    ("grpo:kl_penalty", "mask is not None",
     "False", test_padding_does_not_leak, {**LEAK, "garbage": math.inf}),
    ("grpo:aggregate", "torch.where(mask, per_token, 0.0)",
     "per_token.nan_to_num() * mask", test_nan_in_a_real_token_is_loud, {}),
    ("grpo:aggregate", "max(denominator, 1)",
     "max(denominator, 0)", test_step_without_tokens, dict(kind="token")),
    ("grpo:stats", "(gradient == 0) & (advantages[:, None] != 0) & mask",
     "(gradient == 0) & mask", test_clipfrac_is_the_losses_own, {}),
    ("grpo:stats", "(gradient == 0) & (advantages[:, None] != 0) & mask",
     "(gradient == 0) & (advantages[:, None] != 0)", test_stats, {}),
    ("grpo:stats",
     "policy_loss(leaf, old_logprobs, advantages, mask, clip_low, clip_high, kind)",
     "policy_loss(leaf, old_logprobs, advantages, mask, clip_low, clip_high)",
     test_clipfrac_is_the_losses_own, {}),
    ("grpo:per_constant", "mask.numel()", "mask.sum()", test_aggregate_weights, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {})
