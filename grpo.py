"""
What is learned from it: rewards in, a loss out. Tensors only; no model, no text, no files.

GRPO in seven lines:
    1. Sample G answers to every prompt and reward each of them with one number.
    2. An answer is worth what it got above the mean of its own group. That is the whole critic.
    3. This advantage A goes to every token that the policy chose in the answer; other tokens are masked out.
    4. Per token, maximise ratio * A with ratio = pi / pi_old: likelier if A > 0, less likely if A < 0 ...
    5. ... until the ratio has left [1 - clip_low, 1 + clip_high] in the direction that A asked for: then the gradient is 0.
    6. Why is the loss ~0 on-policy? Every ratio is 1, so it is -mean(A), 0 in each group but for lengths: its value is no news.
    7. Why is the gradient not 0? d ratio = ratio * d log pi: each token pulls with -A * grad log pi, which is REINFORCE.

One step:

    advantages = group_advantages(rewards) * difficulty_weights(accuracy)[:, None]
    per_token = policy_loss(logprobs, old_logprobs, advantages.flatten(), mask, clip_low=0.2, clip_high=0.28)
    per_token = per_token + kl_coef * kl_penalty(logprobs, ref_logprobs, mask=mask)
    aggregate(per_token, mask).backward()

Shapes:  P prompts   G answers per prompt (the group)   B = P * G episodes, all of prompt 0 first   T tokens
`mask` is bool, True exactly where the policy chose the token. Where it is False, the other tensors may hold anything, even nan.

Left out: ViGoRL (2505.23678) also has a dual clip (where A < 0, a ratio above 3 has no gradient) and clamps k3 at 10, which
takes the pull back from the very tokens that drifted furthest. DAPO (2503.14476) also resamples groups whose rewards are all
equal and shapes the reward of overlong answers: matters of the loop.
"""
import torch

# -----------------------------------------------------------------------------
# advantages: how much better than its group was this answer?

def group_advantages(rewards, scale="std"):
    """
    rewards [P, G] -> advantages [P, G], which sum to 0 in every group.

    std   (r - mean) / (std + 1e-6)    GRPO (2402.03300, sec. 4.1.2), DAPO eq. 9; std is the unbiased one, as in ViGoRL
    none   r - mean                    Dr. GRPO (2503.20783): dividing by std favours prompts that are nearly always, or
                                       hardly ever, solved, since their std is small

    A group whose rewards are all equal has nothing to teach: its advantages are exactly 0 (so are those of a group of one).
    """
    assert scale in ("std", "none"), f"scale {scale!r}: expected 'std' or 'none'"
    rewards = rewards - rewards[:, :1]                # the mean of equal floats need not equal them, the mean of zeros does
    advantages = rewards - rewards.mean(1, keepdim=True)                                                      # [P, G]
    if scale == "std":
        unbiased = min(1, rewards.shape[1] - 1)       # divide by G - 1; a group of one would divide by 0
        advantages = advantages / (rewards.std(1, keepdim=True, correction=unbiased) + 1e-6)  # UniVG-R1: + 1e-4
    return advantages

WEIGHTS = {  # phi(m), m = mean accuracy of the group
    "none":  lambda m: torch.ones_like(m),
    "exp":   lambda m: torch.exp(1 - m),                            # 2.72 at m = 0 ... 1.00 at m = 1; the released model's
    "power": lambda m: 1.05 - m,                                    # 1.05 ... 0.05
    "log":   lambda m: (-torch.log(0.02 + m)).clamp(min=0),         # 3.91 ... 0
}

def difficulty_weights(accuracy, kind="none", normalize=False):
    """
    accuracy [P, G] in [0, 1] -> weight of each prompt [P]: hard prompts count more. UniVG-R1 (2505.14231), phi(mIoU) in its
    objective; m is taken online, from the rollouts of this step, and from accuracy alone (the mean IoU), not the whole reward.

    Multiply the advantages by it. As phi >= 0 this equals weighting the loss, and leaves the KL penalty alone, as in the paper.
    The original `log` is negative above m = 0.98: it would unlearn what has been mastered. Here it is clamped at 0.

    normalize: scale the weights to mean 1 over the prompts given (so give all of the step). The paper does not, and its exp is
    never below 1: part of the gain may be no more than a larger step size. This is the control for that.
    """
    assert kind in WEIGHTS, f"difficulty weight {kind!r}: expected one of {list(WEIGHTS)}"
    weights = WEIGHTS[kind](accuracy.mean(1))                                                                 # [P, G] -> [P]
    return weights / weights.mean().clamp(min=1e-6) if normalize else weights         # `log`, all solved: the mean is 0

# -----------------------------------------------------------------------------
# policy loss: every function takes logprobs, old_logprobs [B, T], advantages [B, 1], mask [B, T] and the two clips, and returns
# [B, T]; padding has log-probability 0 in both. A new algorithm is one function and one line in LOSSES.

def ppo_clip(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-min(ratio A, clip(ratio) A): PPO (1707.06347) eq. 7, GRPO eq. 3; two bounds (clip-higher): DAPO eq. 8, 10."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    # min, whatever the sign of A: the pessimist's choice. It stops what went too far and never stops the way back.
    return -torch.min(ratio * advantages, clipped * advantages)

def reinforce(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-A log pi: REINFORCE with the group as its baseline. No ratio, no clip; right for one update per batch (RGRA, 2603.18756)."""
    return -advantages * logprobs

LOSSES = {"grpo": ppo_clip, "reinforce": reinforce}

def policy_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, kind="grpo"):
    """
    logprobs, old_logprobs [B, T], advantages [B], mask [B, T] -> loss of each token [B, T], 0 where the mask is False.

    old_logprobs are those of the policy that sampled. For a single update per batch, logprobs itself will do: it is detached.
    """
    assert kind in LOSSES, f"loss {kind!r}: expected one of {list(LOSSES)}"
    # Padding goes first: once a nan is in the graph a mask on the result is too late, for in the backward pass 0 * nan = nan.
    logprobs = torch.where(mask, logprobs, 0.0)
    old_logprobs = torch.where(mask, old_logprobs.detach(), 0.0)
    per_token = LOSSES[kind](logprobs, old_logprobs, advantages[:, None], mask, clip_low, clip_high)          # [B, T]
    return torch.where(mask, per_token, 0.0)

# -----------------------------------------------------------------------------
# KL penalty: stay near the reference

PENALTIES = {  # of d = log(ref / pi) at a sampled token
    "k1": lambda d: -d,
    "k2": lambda d: d ** 2 / 2,
    "k3": lambda d: torch.expm1(d) - d,        # e^d - 1 - d; expm1 keeps the digits of a small d
}

def kl_penalty(logprobs, ref_logprobs, kind="k3", mask=None):
    """
    logprobs, ref_logprobs [B, T] -> penalty of each token [B, T], to be added to its loss times kl_coef.

    Schulman, "Approximating KL Divergence" (2020), gives three estimators of the VALUE KL(pi || ref) from samples of pi. As a
    loss, a sample is held fixed and its term differentiated, and then the expected GRADIENT is something else for each:

    k1   log(pi / ref)              unbiased value    gradient: 0 in expectation, pure noise. Never use it as a loss
    k2   log(pi / ref)^2 / 2        biased value      gradient: that of KL(pi || ref), the divergence one means
    k3   ref / pi - 1 - log(...)    unbiased value    gradient: that of KL(ref || pi), the other direction. GRPO eq. 4, ViGoRL,
                                                      UniVG-R1: hence the default

    (Exact while pi is the policy that sampled.) mask: where False, the penalty is 0 and so is its gradient, whatever is there.
    """
    assert kind in PENALTIES, f"KL penalty {kind!r}: expected one of {list(PENALTIES)}"
    ref_logprobs = ref_logprobs.detach()
    if mask is not None:                              # padding goes first, as in policy_loss
        logprobs, ref_logprobs = torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0)
    return PENALTIES[kind](ref_logprobs - logprobs)

# -----------------------------------------------------------------------------
# aggregate: from tokens to one number

def aggregate(per_token, mask, kind="token", denominator=None):
    """
    per_token [B, T], mask [B, T] -> scalar.

    token      sum over tokens / number of tokens              DAPO eq. 12: every token counts the same
    sequence   sum over rows of (mean over the row's tokens)   GRPO eq. 3: every answer counts the same, so a token of a long
               / number of rows                                answer counts less, and rambling on makes a failure cheaper

    denominator: that number for the WHOLE step, over all micro-batches and ranks (then sum the gradients, do not average them):
    the parts add up to exactly the same gradient however they were cut. None counts this batch alone. Rows without tokens
    count as rows and add 0. Dr. GRPO's constant: kind="token", denominator = rows in the step * max_new_tokens.
    """
    assert kind in ("token", "sequence"), f"aggregate {kind!r}: expected 'token' or 'sequence'"
    per_token = torch.where(mask, per_token, 0.0)
    if kind == "token":
        total, count = per_token.sum(), mask.sum()                                                            # [B, T] -> []
    else:
        total, count = (per_token.sum(1) / mask.sum(1).clamp(min=1)).sum(), len(mask)                         # [B, T] -> [B] -> []
    return total / max(count if denominator is None else denominator, 1)                 # a step without a token: 0, not nan

# -----------------------------------------------------------------------------
# what to watch instead of the loss

@torch.no_grad()
def stats(logprobs, old_logprobs, mask, clip_low, clip_high, advantages):
    """
    How far has the policy moved from the one that sampled? A dict of floats over the tokens of this batch (to join
    micro-batches, weight the means by their tokens). Before the first update, ratio 1 and approx_kl 0 say that sampler and
    trainer agree.

    clipfrac     share of tokens whose gradient the clip has stopped; a ratio outside the bounds that is on its way back is not
    approx_kl    KL(pi_old || pi), by k3
    """
    log_ratio = (logprobs - old_logprobs)[mask]                                                               # [B, T] -> [N]
    advantages = advantages[:, None].expand(mask.shape)[mask]                                                 # [B] -> [N]
    if not len(log_ratio):                            # nothing sampled, nothing moved
        return {"clipfrac": 0.0, "approx_kl": 0.0, "ratio_mean": 1.0, "ratio_min": 1.0, "ratio_max": 1.0}
    ratio = log_ratio.exp()
    stopped = (advantages > 0) & (ratio > 1 + clip_high) | (advantages < 0) & (ratio < 1 - clip_low)
    return {"clipfrac": stopped.sum().item() / len(stopped),
            "approx_kl": PENALTIES["k3"](log_ratio).mean().item(),
            "ratio_mean": ratio.mean().item(), "ratio_min": ratio.min().item(), "ratio_max": ratio.max().item()}
