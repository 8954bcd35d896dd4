"""The learning algorithms: rewards in, a loss out. Tensors only; no model, no text, no files.

GRPO in seven steps:
    1. Sample G answers (the group) to every prompt. Give each answer a reward, which is one number.
    2. The advantage A of an answer is its reward minus the mean reward of its group. No critic
       (value network) is needed.
    3. Every token that the policy chose in the answer gets this A. All other tokens are masked out.
    4. Per token, maximise ratio * A, where ratio = pi / pi_old. This makes the token more likely if
       A > 0, and less likely if A < 0.
    5. The gradient becomes 0 when the ratio is above 1 + clip_high and A > 0, or when it is below
       1 - clip_low and A < 0.
    6. In the first update on a batch every ratio is 1, so the loss is the mean of -A over the
       tokens. A sums to 0 in each group, so the loss is about 0 (not exactly, because answers
       differ in length). Its value says nothing about progress.
    7. Its gradient is not 0: grad ratio = ratio * grad log pi, so each token contributes
       -A * grad log pi. This is REINFORCE.

One step:

    weights = difficulty_weights(accuracy)
    advantages = group_advantages(rewards) * weights[:, None]
    per_token = policy_loss(logprobs, old_logprobs, advantages.flatten(), mask, 0.2, 0.28)
    per_token = per_token + kl_coef * kl_penalty(logprobs, ref_logprobs, mask=mask)
    aggregate(per_token, mask).backward()

Shapes:  P prompts   G answers per prompt (the group)   T tokens
         B = P * G episodes, all of prompt 0 first
`mask` is bool, True exactly where the policy chose the token. Where it is False, the other tensors
may hold anything, even nan.

An algorithm is a choice of names: a loss, a scale, a weight, a KL, an aggregate (appendix/README.md
has a table). To add one, write a function of a few lines and put its name into a dict.

Left out: ViGoRL (2505.23678) clamps k3 at 10; a clamped token has no gradient, so nothing pulls the
tokens back that are furthest from the reference. PAPO (2507.06448) also lowers both entropies, so
that the policy cannot exploit PAPO's own term.
"""
import torch


# --------------------------------------------------------------------------------------------------
# advantages: how much better is an answer than the mean of its group?

def group_advantages(rewards, scale="std", finished=None):
    """rewards (P, G) -> advantages (P, G), which sum to 0 in every group.

    std    (r - mean) / (std + 1e-6)   GRPO (2402.03300, sec. 4.1.2), DAPO (2503.14476) eq. 9;
                                       std is the unbiased one, as in ViGoRL
    none    r - mean                   Dr. GRPO (2503.20783): the std is small for prompts that are
                                       solved nearly always or hardly ever, so dividing by it gives
                                       these prompts more weight

    If all rewards of a group are equal, its advantages are exactly 0 (so a group of one gets 0).

    finished (P, G) bool: take mean and std over these episodes only. The others get 0, because an
    episode that was cut off is not known to be wrong. This is the over-turn mask of Mini-o3
    (2509.07969). Its code computes mean and std over all episodes, with reward 0 for those cut off,
    which raises the advantages of the others: that variant is group_advantages(rewards) * finished.
    """
    assert scale in ("std", "none"), f"scale {scale!r}: expected 'std' or 'none'"
    if finished is not None:
        return advantages_of_finished(rewards, scale, finished)

    # This shift changes no advantage, but it turns equal rewards into zeros, whose mean is exactly
    # 0. The mean of other equal floats may differ from them by one bit.
    rewards = rewards - rewards[:, :1]
    advantages = rewards - rewards.mean(1, keepdim=True)                        # (P, G)
    if scale == "std":
        # torch divides by G - correction. G - 1 is unbiased, but would be 0 in a group of one.
        unbiased = min(1, rewards.shape[1] - 1)
        std = rewards.std(1, keepdim=True, correction=unbiased)                 # (P, 1)
        advantages = advantages / (std + 1e-6)                                  # UniVG-R1: + 1e-4
    return advantages


def advantages_of_finished(rewards, scale, finished):
    """group_advantages over the finished episodes of each group; the others get 0."""
    advantages = torch.zeros_like(rewards)
    for p in range(len(rewards)):
        kept = finished[p]                                                      # (G,) bool
        if kept.any():
            group = rewards[p, kept][None]                                      # (1, number kept)
            advantages[p, kept] = group_advantages(group, scale)[0]
    return advantages


WEIGHTS = {                                             # phi(m), m = mean accuracy of the group
    "none": lambda m: torch.ones_like(m),
    "exp": lambda m: torch.exp(1 - m),                  # 2.72 at m = 0 ... 1.00 at m = 1; used for
                                                        # the released model
    "power": lambda m: 1.05 - m,                        # 1.05 ... 0.05
    "log": lambda m: (-torch.log(0.02 + m)).clamp(min=0),       # 3.91 ... 0
    "log-original": lambda m: -torch.log(0.02 + m),     # 3.91 ... -0.02
    "inverse": lambda m: 1 / m.clamp(min=0.05),         # 20 ... 1; in the limit of many rollouts
                                                        # MaxRL (2602.02710)
    "easy": lambda m: m,                                # 0 ... 1: a control, for the easy prompts
}


def difficulty_weights(accuracy, kind="none", normalize=False):
    """accuracy (P, G) in [0, 1] -> weight of each prompt (P,): hard prompts count more.

    This is phi(mIoU) in the objective of UniVG-R1 (2505.14231). m comes from the rollouts of this
    step, and from accuracy alone (in the paper: the IoU), not from the whole reward.

    Multiply the advantages by it. Where phi >= 0, this equals weighting the policy loss, and it
    does not change the KL penalty, as in the paper. The log of the paper is negative above
    m = 0.98, which would make right answers less likely there. So `log` is clamped at 0;
    `log-original` is not, and below 0 it equals the paper's loss only while the ratios stay within
    the clips: here the clip sees the sign of the weighted advantage, there that of the advantage.

    normalize: scale the weights to mean 1 over the prompts given (so give all prompts of the step).
    The paper does not, and its exp is never below 1, so part of its gain may come from a larger
    step size. Train with this option to find out.
    """
    assert kind in WEIGHTS, f"difficulty weight {kind!r}: expected one of {list(WEIGHTS)}"
    weights = WEIGHTS[kind](accuracy.mean(1))                                   # (P, G) -> (P,)
    if normalize:
        mean = weights.mean().clamp(min=1e-6)           # `log` with all prompts solved: mean 0
        weights = weights / mean
    return weights


# --------------------------------------------------------------------------------------------------
# bonuses (P, G), to be added to the rewards. They depend on the rest of the group or on the length
# in tokens, which the recipes of rewards.py do not get.

def curiosity(zooms, alpha=0.5, target=0.3, beta=0.05, cap=1):
    """zooms (P, G) -> alpha max(target - rate, 0) [n >= 1] + beta min(cap - n, 0)   (P, G)

    n is the number of zooms of an episode, rate is the share of its group that zoomed at all, and
    [n >= 1] is 1 if the episode zoomed, else 0. The first term pays for zooming while few do it.
    The second is a cost for each zoom beyond `cap`. Pixel-Reasoner (2505.15966): the formula of the
    paper, not that of its code.
    """
    zoomed = (zooms > 0).to(torch.get_default_dtype())                          # (P, G)
    rate = zoomed.mean(1, keepdim=True)                                         # (P, 1)
    paid = alpha * (target - rate).clamp(min=0) * zoomed
    cost = beta * (cap - zooms).clamp(max=0)
    return paid + cost


def overlong(lengths, limit, soft):
    """lengths (P, G) -> 0 up to limit - soft, then a straight line to -1 at the limit.

    DAPO (2503.14476) eq. 13.
    """
    room = limit - soft - lengths
    return (room / soft).clamp(-1, 0)


# --------------------------------------------------------------------------------------------------
# policy loss: every function takes logprobs, old_logprobs (B, T), advantages (B, 1), mask (B, T)
# and the two clips, and returns (B, T). Padding has log-probability 0 in both. A new algorithm is
# one function and one line in LOSSES (and its formula in tests/test_grpo.py, `objective`).

def ppo_clip(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-min(ratio A, clip(ratio) A)

    PPO (1707.06347) eq. 7, GRPO eq. 3. Two bounds (clip-higher): DAPO eq. 8 and 10.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    # Where the clipped term is the minimum, the gradient is 0: the ratio has left the bounds in the
    # direction that A asks for. A ratio that left them in the other direction keeps its gradient,
    # which pulls it back.
    return -torch.min(ratio * advantages, clipped * advantages)


def reinforce(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-A log pi

    REINFORCE with the group's mean as the baseline (RGRA, 2603.18756). It has no ratio and no clip,
    so it is right only for one update per batch.
    """
    return -advantages * logprobs


def dual_clip(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """min(PPO's loss, 3 |A|)

    Ye et al. (1912.09729) eq. 5; ViGoRL. Where A < 0, PPO's loss grows with the ratio without
    bound; here it stops at 3 |A|. The disadvantage: above a ratio of 3 the gradient is 0, so such a
    token is not pulled back. Where A > 0 the loss is negative, and the bound changes nothing.
    """
    loss = ppo_clip(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)
    return torch.min(loss, 3 * advantages.abs())


def gspo(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """PPO's loss with one ratio for the whole answer: the geometric mean of its tokens' ratios.

    GSPO (2507.18071) eq. 5-7. That ratio lies close to 1, so the clips are small (in the paper 3e-4
    and 4e-4). With the aggregate "sequence" this is exactly the paper's loss.
    """
    total = (logprobs - old_logprobs).sum(1, keepdim=True)                      # (B, 1)
    length = mask.sum(1, keepdim=True).clamp(min=1)                             # (B, 1)
    log_ratio = (total / length).expand_as(logprobs)                            # (B, T)
    zeros = torch.zeros_like(logprobs)                  # ppo_clip takes a difference: log_ratio - 0
    return ppo_clip(log_ratio, zeros, advantages, mask, clip_low, clip_high)


def cispo(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-stopgrad(min(ratio, 1 + clip_high)) A log pi

    MiniMax-M1 (2506.13585) eq. 4. Only the weight of a token is clipped, so every token keeps a
    gradient. There is no lower bound, as in the paper.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    weight = ratio.clamp(max=1 + clip_high).detach()
    return -weight * advantages * logprobs


def sapo(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-4 / tau * sigmoid(tau (ratio - 1)) A   with tau = 1 where A > 0, else 1.05

    SAPO (2511.20347) eq. 5-6. No clip: the gradient falls smoothly on both sides of ratio 1.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    tau = torch.where(advantages > 0, 1.0, 1.05)                                # (B, 1)
    gate = torch.sigmoid(tau * (ratio - 1))
    return -4 / tau * gate * advantages


LOSSES = {
    "grpo": ppo_clip,
    "dual-clip": dual_clip,
    "reinforce": reinforce,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
}


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, kind="grpo"):
    """logprobs, old_logprobs (B, T), advantages (B,), mask (B, T) -> loss of each token (B, T).

    0 where the mask is False. old_logprobs are those of the policy that sampled. With one update
    per batch, you can pass logprobs as old_logprobs too: it is detached here.
    """
    assert kind in LOSSES, f"loss {kind!r}: expected one of {list(LOSSES)}"
    # Replace the padding first. To mask only the result is not enough: if the padding is nan, its
    # gradient is 0 * nan = nan.
    logprobs = torch.where(mask, logprobs, 0.0)
    old_logprobs = torch.where(mask, old_logprobs.detach(), 0.0)
    advantages = advantages[:, None]                                            # (B, 1)
    loss = LOSSES[kind]
    per_token = loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)
    return torch.where(mask, per_token, 0.0)                                    # (B, T)


# --------------------------------------------------------------------------------------------------
# KL penalty: stay near the reference

PENALTIES = {                   # of a sampled token with d = log(ref / pi) and ratio = pi / pi_old
    "k1": lambda d, ratio: -d,
    "k2": lambda d, ratio: d ** 2 / 2,
    "k3": lambda d, ratio: torch.expm1(d) - d,          # e^d - 1 - d, precise for small d too
    "k3-unbiased": lambda d, ratio: ratio * (torch.expm1(d) - d),
}


def kl_penalty(logprobs, ref_logprobs, kind="k3", mask=None, old_logprobs=None):
    """logprobs, ref_logprobs (B, T) -> penalty of each token (B, T).

    Add it to the loss of each token, times kl_coef. Schulman, "Approximating KL Divergence" (2020),
    gives k1, k2 and k3: estimators of the VALUE of KL(pi || ref) from samples of pi. A loss needs
    the GRADIENT. autograd differentiates the formula and keeps the sample fixed, so the expected
    gradient may be that of something else:

                   formula                        value      expected gradient
    k1             log(pi / ref)                  unbiased   0, only noise: do not use it as a loss
    k2             log(pi / ref)^2 / 2            biased     of KL(pi || ref), which is what we want
    k3             ref / pi - 1 - log(ref / pi)   unbiased   of KL(ref || pi), the other direction
    k3-unbiased    k3 * pi / pi_old               unbiased   of KL(pi || ref), even off-policy
                   (the ratio of the token, also where the loss has one per answer: gspo)

    k1, k2 and k3 have these properties only while pi is the policy that sampled. k3 is the default
    because GRPO (eq. 4), ViGoRL and UniVG-R1 use it. k3-unbiased: DeepSeek-V3.2 (2512.02556).

    old_logprobs: log-probabilities of the policy that sampled; None: pi itself sampled.
    mask: where it is False, the penalty and its gradient are 0, whatever the tensors hold there.
    """
    assert kind in PENALTIES, f"KL penalty {kind!r}: expected one of {list(PENALTIES)}"
    if old_logprobs is None:
        old_logprobs = logprobs
    ref_logprobs = ref_logprobs.detach()
    old_logprobs = old_logprobs.detach()
    if mask is not None:                                # before anything else, as in policy_loss
        logprobs = torch.where(mask, logprobs, 0.0)
        ref_logprobs = torch.where(mask, ref_logprobs, 0.0)
        old_logprobs = torch.where(mask, old_logprobs, 0.0)
    d = ref_logprobs - logprobs
    ratio = torch.exp(logprobs - old_logprobs)
    return PENALTIES[kind](d, ratio)


def perception(logprobs, masked_logprobs, mask):
    """k3 of KL(pi(.|image) || pi(.|image with most of its patches black)), per token (B, T).

    SUBTRACT it from the loss of each token, times a small coefficient (0.01-0.02). PAPO
    (2507.06448): a policy that answers the same without the image has not looked at it. The
    gradient flows through both logprobs and masked_logprobs (B, T).
    """
    logprobs = torch.where(mask, logprobs, 0.0)
    masked_logprobs = torch.where(mask, masked_logprobs, 0.0)
    return PENALTIES["k3"](masked_logprobs - logprobs, None)                    # k3 needs no ratio


def importance_weights(logprobs, sampled_logprobs, mask, cap=2.0):
    """min(pi / pi_sampler, cap) of each token (B, T), without a gradient; 0 where mask is False.

    MULTIPLY the loss of each token by it where the sampler computes in another precision or with
    other kernels than the trainer, so that its tokens are not quite those of pi. Truncated
    importance sampling; 2510.26788 compares it with other cures. logprobs (B, T) are those of pi
    before the update, sampled_logprobs (B, T) those with which the tokens were sampled.
    """
    gap = torch.where(mask, logprobs.detach() - sampled_logprobs, 0.0)
    return torch.where(mask, gap.exp().clamp(max=cap), 0.0)


# --------------------------------------------------------------------------------------------------
# aggregate: from tokens to one number. Each function returns a sum and what it is divided by.

def per_token_mean(per_token, mask):
    return per_token.sum(), mask.sum()


def per_sequence_mean(per_token, mask):
    lengths = mask.sum(1).clamp(min=1)                                          # (B,)
    means = per_token.sum(1) / lengths                                          # (B,)
    return means.sum(), len(mask)


def per_constant(per_token, mask):
    return per_token.sum(), mask.numel()


AGGREGATES = {"token": per_token_mean, "sequence": per_sequence_mean, "constant": per_constant}


def aggregate(per_token, mask, kind="token", denominator=None):
    """per_token (B, T), mask (B, T) -> scalar.

    token      sum over tokens / number of tokens              DAPO eq. 12: every token counts the
                                                               same
    sequence   sum over rows of (mean over the row's tokens)   GRPO eq. 3: every answer counts the
               / number of rows                                same, so a token of a long answer
                                                               counts less: a long wrong answer
                                                               costs less per token than a short one
    constant   sum over tokens / (rows * T)                    Dr. GRPO. If `denominator` is rows *
                                                               token limit of a row, a token counts
                                                               the same in every step

    denominator: the divisor for the WHOLE update, over its micro-batches and ranks; None: count
    this batch alone. If you give it, add up the gradients of the parts (do not average them): the
    sum is exactly the gradient of the whole update. Rows without tokens count as rows and add 0.
    Where mask (bool) is False, per_token may hold anything, nan included. Without any token the
    result is 0.
    """
    assert kind in AGGREGATES, f"aggregate {kind!r}: expected one of {list(AGGREGATES)}"
    per_token = torch.where(mask, per_token, 0.0)
    total, count = AGGREGATES[kind](per_token, mask)
    if denominator is None:
        denominator = count
    return total / max(denominator, 1)                  # a step without a token: 0, not nan


# --------------------------------------------------------------------------------------------------
# what to watch instead of the loss

@torch.no_grad()
def stats(logprobs, old_logprobs, mask, clip_low, clip_high, advantages, kind="grpo"):
    """How far has the policy moved from the one that sampled? -> dict of floats, over the tokens.

    To join micro-batches, weight the means by their number of tokens. If ratio is 1 and approx_kl
    is 0 before the first update, sampler and trainer agree.

    clipfrac      share of tokens with gradient 0 although their advantage is not 0: the clip has
                  stopped them. A ratio outside the bounds that A pulls back has a gradient, and
                  does not count
    approx_kl     KL(pi_old || pi), by k3
    ratio_mean, ratio_min, ratio_max    of pi / pi_old
    """
    log_ratio = (logprobs - old_logprobs)[mask]                                 # (B, T) -> (N,)
    if len(log_ratio) == 0:                             # no tokens: report ratio 1 and KL 0
        log_ratio = torch.zeros(1)
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        loss = policy_loss(leaf, old_logprobs, advantages, mask, clip_low, clip_high, kind)
        gradient = torch.autograd.grad(loss.sum(), leaf)[0]                     # (B, T)
    stopped = (gradient == 0) & (advantages[:, None] != 0) & mask               # (B, T)
    ratio = log_ratio.exp()                                                     # (N,)
    return {
        "clipfrac": stopped.sum().item() / len(ratio),
        "approx_kl": PENALTIES["k3"](log_ratio, ratio).mean().item(),
        "ratio_mean": ratio.mean().item(),
        "ratio_min": ratio.min().item(),
        "ratio_max": ratio.max().item(),
    }
