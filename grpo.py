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

An algorithm is a choice of names: a loss, a scale, a weight, a KL, an aggregate (the README has them in a table). To add one
is to add a function of two or three lines and its name to a dict.

Left out: ViGoRL (2505.23678) clamps k3 at 10, which takes the pull back from the very tokens that drifted furthest. PAPO
(2507.06448) also lowers both entropies, against the hacking of its own term.
"""
import torch

# -----------------------------------------------------------------------------
# advantages: how much better than its group was this answer?

def group_advantages(rewards, scale="std", finished=None):
    """
    rewards [P, G] -> advantages [P, G], which sum to 0 in every group.

    std   (r - mean) / (std + 1e-6)    GRPO (2402.03300, sec. 4.1.2), DAPO eq. 9; std is the unbiased one, as in ViGoRL
    none   r - mean                    Dr. GRPO (2503.20783): dividing by std favours prompts that are nearly always, or
                                       hardly ever, solved, since their std is small

    A group whose rewards are all equal has nothing to teach: its advantages are exactly 0 (so are those of a group of one).

    finished [P, G] bool: mean and std over these episodes alone; the others get 0, for to be cut off is not to be wrong. The
    over-turn mask of Mini-o3 (2509.07969). Its code zeroes them afterwards but lets their zero rewards stand in the
    statistics, which raises all others: that variant is group_advantages(rewards) * finished.
    """
    assert scale in ("std", "none"), f"scale {scale!r}: expected 'std' or 'none'"
    if finished is not None:
        advantages = torch.zeros_like(rewards)
        for p in finished.any(1).nonzero()[:, 0].tolist():                      # each group has a size of its own
            advantages[p, finished[p]] = group_advantages(rewards[p:p + 1, finished[p]], scale)[0]
        return advantages
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
    "log-original": lambda m: -torch.log(0.02 + m),                 # 3.91 ... -0.02
}

def difficulty_weights(accuracy, kind="none", normalize=False):
    """
    accuracy [P, G] in [0, 1] -> weight of each prompt [P]: hard prompts count more. UniVG-R1 (2505.14231), phi(mIoU) in its
    objective; m is taken online, from the rollouts of this step, and from accuracy alone (the mean IoU), not the whole reward.

    Multiply the advantages by it. As phi >= 0 this equals weighting the loss, and leaves the KL penalty alone, as in the paper.
    The original log is negative above m = 0.98 and unlearns what has been mastered: `log` is clamped at 0, `log-original` is not.

    normalize: scale the weights to mean 1 over the prompts given (so give all of the step). The paper does not, and its exp is
    never below 1: part of the gain may be no more than a larger step size. This is the control for that.
    """
    assert kind in WEIGHTS, f"difficulty weight {kind!r}: expected one of {list(WEIGHTS)}"
    weights = WEIGHTS[kind](accuracy.mean(1))                                                                 # [P, G] -> [P]
    return weights / weights.mean().clamp(min=1e-6) if normalize else weights         # `log`, all solved: the mean is 0

# -----------------------------------------------------------------------------
# what a reward function cannot see: the rest of the group, the length in tokens. Bonuses [P, G], to be added to the rewards

def curiosity(zooms, alpha=0.5, target=0.3, beta=0.05, cap=1):
    """
    zooms [P, G] -> alpha max(target - rate, 0) [n >= 1] + beta min(cap - n, 0), where n counts an episode's zooms and rate is the
    share of its group that zoomed at all. Pixel-Reasoner (2505.15966), as in the paper, not as in its code: who looks is paid
    while few do, and who looks more often than `cap` pays.
    """
    looked = (zooms > 0).to(torch.get_default_dtype())                                                        # [P, G]
    return alpha * (target - looked.mean(1, keepdim=True)).clamp(min=0) * looked + beta * (cap - zooms).clamp(max=0)

def overlong(lengths, limit, soft):
    """lengths [P, G] -> 0 up to limit - soft, from there straight down to -1 at the limit: DAPO (2503.14476) eq. 13."""
    return ((limit - soft - lengths) / soft).clamp(-1, 0)

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

def dual_clip(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """PPO's, but at most 3 |A|: where A < 0 and the ratio has run away, the loss would else have no bound. Ye et al. (1912.09729)
    eq. 5; ViGoRL. The price: from a ratio of 3 on, the way back is stopped too. (Where A > 0 no loss is positive.)"""
    return torch.min(ppo_clip(logprobs, old_logprobs, advantages, mask, clip_low, clip_high), 3 * advantages.abs())

def gspo(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """PPO's, with one ratio for the whole answer, the geometric mean of its tokens': GSPO (2507.18071) eq. 5-7. It lies close to
    1, so the clips are small (3e-4 and 4e-4 there). Exact with the aggregate "sequence"."""
    mean = (logprobs - old_logprobs).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)             # [B, 1]
    return ppo_clip(mean.expand_as(logprobs), torch.zeros_like(logprobs), advantages, mask, clip_low, clip_high)

def cispo(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-sg(min(ratio, 1 + clip_high)) A log pi: MiniMax-M1 (2506.13585) eq. 4. The weight is clipped, so no token is ever stopped;
    no lower bound, as there."""
    weight = torch.exp(logprobs - old_logprobs).clamp(max=1 + clip_high).detach()
    return -weight * advantages * logprobs

def sapo(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-4 / tau * sigmoid(tau (ratio - 1)) A, tau = 1 where A > 0, else 1.05: SAPO (2511.20347) eq. 5-6. The gradient fades on
    both sides of ratio 1 and is nowhere cut off."""
    tau = torch.where(advantages > 0, 1.0, 1.05)
    return -4 / tau * torch.sigmoid(tau * (torch.exp(logprobs - old_logprobs) - 1)) * advantages

LOSSES = {"grpo": ppo_clip, "dual-clip": dual_clip, "reinforce": reinforce, "gspo": gspo, "cispo": cispo, "sapo": sapo}

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

PENALTIES = {  # of d = log(ref / pi) at a sampled token, and its ratio pi / pi_old
    "k1": lambda d, ratio: -d,
    "k2": lambda d, ratio: d ** 2 / 2,
    "k3": lambda d, ratio: torch.expm1(d) - d,          # e^d - 1 - d; expm1 keeps the digits of a small d
    "k3-unbiased": lambda d, ratio: ratio * (torch.expm1(d) - d),
}

def kl_penalty(logprobs, ref_logprobs, kind="k3", mask=None, old_logprobs=None):
    """
    logprobs, ref_logprobs [B, T] -> penalty of each token [B, T], to be added to its loss times kl_coef.

    Schulman, "Approximating KL Divergence" (2020), gives three estimators of the VALUE KL(pi || ref) from samples of pi. As a
    loss, a sample is held fixed and its term differentiated, and then the expected GRADIENT is something else for each:

    k1   log(pi / ref)              unbiased value    gradient: 0 in expectation, pure noise. Never use it as a loss
    k2   log(pi / ref)^2 / 2        biased value      gradient: that of KL(pi || ref), the divergence one means
    k3   ref / pi - 1 - log(...)    unbiased value    gradient: that of KL(ref || pi), the other direction. GRPO eq. 4, ViGoRL,
                                                      UniVG-R1: hence the default
    k3-unbiased   k3 * pi / pi_old  unbiased value    gradient: that of KL(pi || ref), off-policy too. DeepSeek-V3.2 (2512.02556)

    (The first three: exact while pi is the policy that sampled.) old_logprobs: the sampler's; None: those of pi itself.
    mask: where False, the penalty is 0 and so is its gradient, whatever is there.
    """
    assert kind in PENALTIES, f"KL penalty {kind!r}: expected one of {list(PENALTIES)}"
    ref_logprobs, old_logprobs = ref_logprobs.detach(), (logprobs if old_logprobs is None else old_logprobs).detach()
    if mask is not None:                              # padding goes first, as in policy_loss
        logprobs, ref_logprobs, old_logprobs = (torch.where(mask, x, 0.0) for x in (logprobs, ref_logprobs, old_logprobs))
    return PENALTIES[kind](ref_logprobs - logprobs, torch.exp(logprobs - old_logprobs))

def perception(logprobs, masked_logprobs, mask):
    """
    logprobs, masked_logprobs [B, T] -> [B, T], to be SUBTRACTED from the loss of each token times a small coefficient (0.01-0.02):
    k3 of KL(pi(.|image) || pi(.|image with most of its patches black)). PAPO (2507.06448): who answers the same without the
    image has not looked. The gradient flows through both.
    """
    return PENALTIES["k3"](torch.where(mask, masked_logprobs, 0.0) - torch.where(mask, logprobs, 0.0), None)

# -----------------------------------------------------------------------------
# aggregate: from tokens to one number

AGGREGATES = {  # -> the sum, and what it is divided by
    "token":    lambda per_token, mask: (per_token.sum(), mask.sum()),                                        # [B, T] -> []
    "sequence": lambda per_token, mask: ((per_token.sum(1) / mask.sum(1).clamp(min=1)).sum(), len(mask)),     # [B, T] -> [B] -> []
    "constant": lambda per_token, mask: (per_token.sum(), mask.numel()),
}

def aggregate(per_token, mask, kind="token", denominator=None):
    """
    per_token [B, T], mask [B, T] -> scalar.

    token      sum over tokens / number of tokens              DAPO eq. 12: every token counts the same
    sequence   sum over rows of (mean over the row's tokens)   GRPO eq. 3: every answer counts the same, so a token of a long
               / number of rows                                answer counts less, and rambling on makes a failure cheaper
    constant   sum over tokens / a constant                    Dr. GRPO: a step weighs what its episodes would at full length,
                                                               however long they are (rows * tokens that one may have)

    denominator: that number for the WHOLE step, over all micro-batches and ranks (then sum the gradients, do not average them):
    the parts add up to exactly the same gradient however they were cut. None counts this batch alone. Rows without tokens
    count as rows and add 0.
    """
    assert kind in AGGREGATES, f"aggregate {kind!r}: expected one of {list(AGGREGATES)}"
    total, count = AGGREGATES[kind](torch.where(mask, per_token, 0.0), mask)
    return total / max(count if denominator is None else denominator, 1)                 # a step without a token: 0, not nan

# -----------------------------------------------------------------------------
# what to watch instead of the loss

@torch.no_grad()
def stats(logprobs, old_logprobs, mask, clip_low, clip_high, advantages, kind="grpo"):
    """
    How far has the policy moved from the one that sampled? A dict of floats over the tokens of this batch (to join
    micro-batches, weight the means by their tokens). Before the first update, ratio 1 and approx_kl 0 say that sampler and
    trainer agree.

    clipfrac     share of tokens that have an advantage but, under this loss, no gradient: those the clip has stopped (a ratio
                 outside the bounds that is on its way back is not)
    approx_kl    KL(pi_old || pi), by k3
    """
    log_ratio = (logprobs - old_logprobs)[mask]                                                               # [B, T] -> [N]
    if not len(log_ratio):                            # nothing sampled, nothing moved
        return {"clipfrac": 0.0, "approx_kl": 0.0, "ratio_mean": 1.0, "ratio_min": 1.0, "ratio_max": 1.0}
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        pull, = torch.autograd.grad(policy_loss(leaf, old_logprobs, advantages, mask, clip_low, clip_high, kind).sum(), leaf)
    stopped, ratio = (pull == 0) & (advantages[:, None] != 0) & mask, log_ratio.exp()
    return {"clipfrac": stopped.sum().item() / len(ratio),
            "approx_kl": PENALTIES["k3"](log_ratio, ratio).mean().item(),
            "ratio_mean": ratio.mean().item(), "ratio_min": ratio.min().item(), "ratio_max": ratio.max().item()}
