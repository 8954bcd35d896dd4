"""What is learned from it: rewards in, a loss out. Tensors only; no model, no text, no files.

GRPO in seven lines:
    1. Sample G answers to every prompt and reward each of them with one number.
    2. An answer is worth what it got above the mean of its own group. That is the whole critic.
    3. This advantage A goes to every token that the policy chose in the answer; other tokens are
       masked out.
    4. Per token, maximise ratio * A with ratio = pi / pi_old: likelier if A > 0, less likely if
       A < 0 ...
    5. ... until the ratio has left [1 - clip_low, 1 + clip_high] in the direction that A asked for:
       then the gradient is 0.
    6. Why is the loss ~0 on-policy? Every ratio is 1, so it is -mean(A), 0 in each group but for
       lengths: its value is no news.
    7. Why is the gradient not 0? d ratio = ratio * d log pi: each token pulls with
       -A * grad log pi, which is REINFORCE.

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
has them in a table). To add one, write a function of a few lines and put its name into a dict.

Left out: ViGoRL (2505.23678) clamps k3 at 10, which takes the pull back from the very tokens that
drifted furthest. PAPO (2507.06448) also lowers both entropies, so that the policy cannot exploit
PAPO's own term.
"""
import torch


# --------------------------------------------------------------------------------------------------
# advantages: how much better than its group was this answer?

def group_advantages(rewards, scale="std", finished=None):
    """rewards (P, G) -> advantages (P, G), which sum to 0 in every group.

    std    (r - mean) / (std + 1e-6)   GRPO (2402.03300, sec. 4.1.2), DAPO (2503.14476) eq. 9;
                                       std is the unbiased one, as in ViGoRL
    none    r - mean                   Dr. GRPO (2503.20783): the std is small for prompts that are
                                       nearly always, or hardly ever, solved; dividing by it
                                       favours them

    A group whose rewards are all equal teaches nothing: its advantages are exactly 0 (so are those
    of a group of one).

    finished (P, G) bool: take mean and std over these episodes only. The others get 0, because to
    be cut off is not to be wrong. This is the over-turn mask of Mini-o3 (2509.07969). Its code
    computes mean and std over all episodes, with reward 0 for those cut off, which raises the
    advantages of all others: that variant is group_advantages(rewards) * finished.
    """
    assert scale in ("std", "none"), f"scale {scale!r}: expected 'std' or 'none'"
    if finished is not None:
        return advantages_of_finished(rewards, scale, finished)

    # The mean of equal floats may differ from them by one bit; the mean of zeros is 0.
    rewards = rewards - rewards[:, :1]
    advantages = rewards - rewards.mean(1, keepdim=True)                        # (P, G)
    if scale == "std":
        # Divide by G - 1; in a group of one that would be a division by 0.
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
    "exp": lambda m: torch.exp(1 - m),                  # 2.72 at m = 0 ... 1.00 at m = 1; the
                                                        # one of the released model
    "power": lambda m: 1.05 - m,                        # 1.05 ... 0.05
    "log": lambda m: (-torch.log(0.02 + m)).clamp(min=0),       # 3.91 ... 0
    "log-original": lambda m: -torch.log(0.02 + m),     # 3.91 ... -0.02
}


def difficulty_weights(accuracy, kind="none", normalize=False):
    """accuracy (P, G) in [0, 1] -> weight of each prompt (P,): hard prompts count more.

    This is phi(mIoU) in the objective of UniVG-R1 (2505.14231). m is taken online, from the
    rollouts of this step, and from accuracy alone (there: the IoU), not from the whole reward.

    Multiply the advantages by it. As phi >= 0, this equals weighting the policy loss, and it leaves
    the KL penalty alone, as in the paper. The original log is negative above m = 0.98, so the
    policy unlearns what it has mastered: `log` is clamped at 0, `log-original` is not.

    normalize: scale the weights to mean 1 over the prompts given (so give all prompts of the step).
    The paper does not, and its exp is never below 1: part of its gain may come from a larger step
    size. This option is the control for that.
    """
    assert kind in WEIGHTS, f"difficulty weight {kind!r}: expected one of {list(WEIGHTS)}"
    weights = WEIGHTS[kind](accuracy.mean(1))                                   # (P, G) -> (P,)
    if normalize:
        mean = weights.mean().clamp(min=1e-6)           # `log` with all prompts solved: mean 0
        weights = weights / mean
    return weights


# --------------------------------------------------------------------------------------------------
# bonuses (P, G), to be added to the rewards: for what a reward function cannot know, which is the
# rest of the group and the length in tokens

def curiosity(zooms, alpha=0.5, target=0.3, beta=0.05, cap=1):
    """zooms (P, G) -> alpha max(target - rate, 0) [n >= 1] + beta min(cap - n, 0)   (P, G)

    n is the number of zooms of an episode, and rate is the share of its group that zoomed at all.
    Zooming is paid while few do it; zooming more often than `cap` costs. Pixel-Reasoner
    (2505.15966): the formula of the paper, not that of its code.
    """
    zoomed = (zooms > 0).to(torch.get_default_dtype())                          # (P, G)
    rate = zoomed.mean(1, keepdim=True)                                         # (P, 1)
    paid = alpha * (target - rate).clamp(min=0) * zoomed
    cost = beta * (cap - zooms).clamp(max=0)
    return paid + cost


def overlong(lengths, limit, soft):
    """lengths (P, G) -> 0 up to limit - soft, then falling straight to -1 at the limit.

    DAPO (2503.14476) eq. 13.
    """
    room = limit - soft - lengths
    return (room / soft).clamp(-1, 0)


# --------------------------------------------------------------------------------------------------
# policy loss: every function takes logprobs, old_logprobs (B, T), advantages (B, 1), mask (B, T)
# and the two clips, and returns (B, T). Padding has log-probability 0 in both. A new algorithm is
# one function and one line in LOSSES.

def ppo_clip(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-min(ratio A, clip(ratio) A)

    PPO (1707.06347) eq. 7, GRPO eq. 3. Two bounds (clip-higher): DAPO eq. 8 and 10.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    # The minimum, whatever the sign of A, is the pessimistic choice: it stops what went too far,
    # and never stops the way back.
    return -torch.min(ratio * advantages, clipped * advantages)


def reinforce(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-A log pi

    REINFORCE with the group's mean as the baseline. No ratio and no clip; right for one update per
    batch (RGRA, 2603.18756).
    """
    return -advantages * logprobs


def dual_clip(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """min(PPO's loss, 3 |A|)

    Ye et al. (1912.09729) eq. 5; ViGoRL. Where A < 0 and the ratio has run away, PPO's loss has no
    bound. The price: from a ratio of 3 on, the way back is stopped too. (Where A > 0, no loss is
    positive, and the bound does nothing.)
    """
    loss = ppo_clip(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)
    return torch.min(loss, 3 * advantages.abs())


def gspo(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """PPO's loss with one ratio for the whole answer: the geometric mean of its tokens' ratios.

    GSPO (2507.18071) eq. 5-7. That ratio lies close to 1, so the clips are small (3e-4 and 4e-4
    there). With the aggregate "sequence" this is exactly the paper's loss.
    """
    total = (logprobs - old_logprobs).sum(1, keepdim=True)                      # (B, 1)
    length = mask.sum(1, keepdim=True).clamp(min=1)                             # (B, 1)
    log_ratio = (total / length).expand_as(logprobs)                            # (B, T)
    zeros = torch.zeros_like(logprobs)
    return ppo_clip(log_ratio, zeros, advantages, mask, clip_low, clip_high)


def cispo(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-stopgrad(min(ratio, 1 + clip_high)) A log pi

    MiniMax-M1 (2506.13585) eq. 4. The weight of a token is clipped, so no token is ever stopped. No
    lower bound, as there.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    weight = ratio.clamp(max=1 + clip_high).detach()
    return -weight * advantages * logprobs


def sapo(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-4 / tau * sigmoid(tau (ratio - 1)) A   with tau = 1 where A > 0, else 1.05

    SAPO (2511.20347) eq. 5-6. The gradient fades on both sides of ratio 1 and is cut off nowhere.
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

    0 where the mask is False. old_logprobs are those of the policy that sampled. For a single
    update per batch, logprobs itself will do: it is detached here.
    """
    assert kind in LOSSES, f"loss {kind!r}: expected one of {list(LOSSES)}"
    # Padding is replaced before anything is computed. A mask on the result would be too late: in
    # the backward pass 0 * nan = nan.
    logprobs = torch.where(mask, logprobs, 0.0)
    old_logprobs = torch.where(mask, old_logprobs.detach(), 0.0)
    advantages = advantages[:, None]                                            # (B, 1)
    loss = LOSSES[kind]
    per_token = loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)
    return torch.where(mask, per_token, 0.0)                                    # (B, T)


# --------------------------------------------------------------------------------------------------
# KL penalty: stay near the reference

PENALTIES = {                   # of d = log(ref / pi) at a sampled token, and its ratio pi / pi_old
    "k1": lambda d, ratio: -d,
    "k2": lambda d, ratio: d ** 2 / 2,
    "k3": lambda d, ratio: torch.expm1(d) - d,          # e^d - 1 - d, exact for small d too
    "k3-unbiased": lambda d, ratio: ratio * (torch.expm1(d) - d),
}


def kl_penalty(logprobs, ref_logprobs, kind="k3", mask=None, old_logprobs=None):
    """logprobs, ref_logprobs (B, T) -> penalty of each token (B, T).

    To be added to the loss of each token, times kl_coef.

    Schulman, "Approximating KL Divergence" (2020), gives three estimators of the VALUE
    KL(pi || ref) from samples of pi. As a loss, a sample is held fixed and its term is
    differentiated, and then the expected GRADIENT is something else for each:

    k1   log(pi / ref)              unbiased value    gradient: 0 in expectation, pure noise.
                                                      Never use it as a loss
    k2   log(pi / ref)^2 / 2        biased value      gradient: that of KL(pi || ref), the
                                                      divergence one means
    k3   ref / pi - 1 - log(...)    unbiased value    gradient: that of KL(ref || pi), the other
                                                      direction. GRPO eq. 4, ViGoRL, UniVG-R1:
                                                      hence the default
    k3-unbiased   k3 * pi / pi_old  unbiased value    gradient: that of KL(pi || ref), off-policy
                                                      too. DeepSeek-V3.2 (2512.02556)

    (The first three: exact while pi is the policy that sampled.)
    old_logprobs: log-probabilities of the policy that sampled; None: those of pi itself.
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

    To be SUBTRACTED from the loss of each token, times a small coefficient (0.01-0.02). PAPO
    (2507.06448): a policy that answers the same without the image has not looked at it. The
    gradient flows through both logprobs and masked_logprobs (B, T).
    """
    logprobs = torch.where(mask, logprobs, 0.0)
    masked_logprobs = torch.where(mask, masked_logprobs, 0.0)
    return PENALTIES["k3"](masked_logprobs - logprobs, None)


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
                                                               counts less, and rambling on makes a
                                                               failure cheaper
    constant   sum over tokens / a constant                    Dr. GRPO: the constant is rows *
                                                               tokens that a row may have, so a
                                                               token counts the same in every step

    denominator: the divisor for the WHOLE step, over all micro-batches and ranks; None: count this
    batch alone. With it, add up the gradients of the parts (do not average them): the sum is
    exactly the gradient of the whole, however it was cut. Rows without tokens count as rows and
    add 0.
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

    To join micro-batches, weight the means by their number of tokens. Before the first update,
    ratio 1 and approx_kl 0 say that sampler and trainer agree.

    clipfrac      share of tokens that have an advantage but, under this loss, no gradient: those
                  that the clip has stopped (a ratio outside the bounds that is on its way back is
                  not stopped)
    approx_kl     KL(pi_old || pi), by k3
    ratio_mean, ratio_min, ratio_max    of pi / pi_old
    """
    log_ratio = (logprobs - old_logprobs)[mask]                                 # (B, T) -> (N,)
    if len(log_ratio) == 0:                             # nothing was sampled, nothing moved
        log_ratio = torch.zeros(1)
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        loss = policy_loss(leaf, old_logprobs, advantages, mask, clip_low, clip_high, kind)
        gradient, = torch.autograd.grad(loss.sum(), leaf)                       # (B, T)
    stopped = (gradient == 0) & (advantages[:, None] != 0) & mask               # (B, T)
    ratio = log_ratio.exp()                                                     # (N,)
    return {
        "clipfrac": stopped.sum().item() / len(ratio),
        "approx_kl": PENALTIES["k3"](log_ratio, ratio).mean().item(),
        "ratio_mean": ratio.mean().item(),
        "ratio_min": ratio.min().item(),
        "ratio_max": ratio.max().item(),
    }
