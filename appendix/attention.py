"""Attention of query heads that share keys, in a form for which a GPU has a fast kernel.

torch's scaled dot product attention chooses a kernel by what it is given. On a GPU the fast ones
(flash, memory-efficient) never store the scores; the one that takes anything does, in fp32, twice:
590 GB for thirteen prompts of 17,755 tokens. Flash takes shared heads, but no mask and no fp32.
The memory-efficient one takes a mask and fp32, but no shared heads. So here prompts have no mask,
and where there is one each query head gets a copy of its keys.
"""
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right


def prefer_kernels_without_plans():
    """Leave out cuDNN's attention, which torch prefers on Hopper.

    cuDNN builds a plan for every new shape, which takes tens of milliseconds. In a rollout and in a
    packed update nearly every call has a new shape: a hundred seconds a step, by estimate. Flash
    and memory-efficient kernels need no plan. Not measured on a GPU yet.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def attend(q, k, v, mask=None):
    """q (B, H, T, d), k and v (B, K, S, d) -> (B, H, T, d).

    mask: bool (B, 1, T, S), which slots a token sees; None: T = S, and token t sees 0 to t.
    """
    if mask is None and can_share(q):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k, v = copies_for(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


def attend_continued(q, k, v):
    """`attend` for the last T of S tokens of a row: token t sees 0 to S - T + t."""
    if not can_share(q):
        k, v = copies_for(q, k, v)
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def can_share(q):
    """May query heads share keys in a fast kernel, where there is no mask?"""
    return q.device.type == "cpu" or q.dtype in (torch.bfloat16, torch.float16)


def copies_for(q, k, v):
    """Keys and values (B, K, S, d) -> a copy for each query head, (B, H, S, d)."""
    copies = q.shape[1] // k.shape[1]
    return k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
