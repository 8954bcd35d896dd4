"""Would a GPU have a fast kernel for it? The calls of torch's attention that each job makes are
recorded on the CPU, and none may ask for a mask and shared heads at once. At the end MUTATIONS puts
bugs into appendix/attention.py and requires the named test to fail.
"""
import types

import pytest
import torch
import torch.nn.functional as F

import data, zoom_rollout
from appendix import attention, tree_sampler
from conftest import check_mutation, close, names
from test_model import batch, both, plainly
from test_prefix import groups_of
from train_sft import Config
from zoom_rollout import RolloutConfig

def recorded(monkeypatch):
    """The calls that are made from now on: (query heads, key heads, mask or not, causal or not),
    each once."""
    calls, real = set(), F.scaled_dot_product_attention
    def watched(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                enable_gqa=False):
        calls.add((q.shape[1], k.shape[1],
                   torch.is_tensor(attn_mask) and type(attn_mask) is torch.Tensor, is_causal))
        return real(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
                    scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(attention, "F", types.SimpleNamespace(scaled_dot_product_attention=watched))
    return calls

@both
def test_no_mask_over_shared_heads(vlm, plain, monkeypatch):
    """Bug: 590 GB of scores: rollouts, searches and updates that give the GPU a mask together with
    heads that share their keys; a prompt that is masked at all."""
    vlm, calls = plainly(vlm, plain), recorded(monkeypatch)
    seen = {}
    def job(name, work):
        calls.clear()
        work()
        seen[name] = set(calls)

    prompts = batch(vlm)
    views = [v for e in prompts for v in e.views]
    vlm.encode(views)
    with torch.no_grad():
        job("prompt",
            lambda: vlm.prefill(vlm.new_cache(5), [e.ids for e in prompts], [0] * 5, views))
        cache = vlm.new_cache(2)
        vlm.prefill(cache, [[5, 6, 7], [8, 9]], [0, 0])
        cache = cache.branch(torch.tensor([0, 0, 1]))
        job("observation", lambda: vlm.prefill(cache, [[5, 6], [7], [8, 9, 10]], [3, 3, 2]))
    job("update", lambda: vlm.logprobs(groups_of(vlm)))
    job("rollout", lambda: zoom_rollout.rollout(
        vlm, data.toy("search", "train", 2, 7), 2, RolloutConfig(max_new_tokens=3)))
    if not plain:
        sampler = []
        job("search", lambda: sampler.append(tree_sampler.Sampler(
            vlm, data.toy("search", "train", 2, 7), "zoom", Config(max_new_tokens=6))))
        job("step", lambda: sampler[0].step(sampler[0].prompt_paths, [3, 3]))
    own = {(q, k, masked, causal) for job in seen.values() for q, k, masked, causal in job}
    assert all(not masked or q == k for q, k, masked, _ in own), seen
    assert {(masked, causal) for _, _, masked, causal in seen["prompt"]} == {(False, True)}
    assert (any(masked for _, _, masked, _ in seen["observation"])
            and not any(masked for _, _, masked, _ in seen["update"]))
    # where there is no mask, nothing is copied
    assert any(q > k for q, k, *_ in seen["update"])

@pytest.mark.parametrize("dtype, shares", [(torch.bfloat16, True), (torch.float32, False)])
def test_fp32_on_a_gpu_shares_nothing(dtype, shares, monkeypatch):
    """Bug: in fp32 a GPU's flash kernel is out, and shared heads leave only the one that stores all
    scores. meta stands for the GPU."""
    calls = recorded(monkeypatch)
    q, k = (torch.empty(1, heads, 5, 16, dtype=dtype, device="meta") for heads in (4, 2))
    attention.attend(q, k, k)
    assert calls == {(4, 2 if shares else 4, False, True)}

def test_attention_by_hand():
    """Bug: query heads that get the keys of another group of heads; a mask upside down. Against
    softmax written out."""
    q, k, v = (torch.randn(2, heads, n, 8, generator=torch.Generator().manual_seed(heads + n),
                           dtype=torch.double)
               for heads, n in ((6, 3), (2, 5), (2, 5)))
    mask = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True

    def by_hand(seen):
        scores = torch.stack([q[:, h] @ k[:, h // 3].mT for h in range(6)], 1) / 8 ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.stack([weights[:, h] @ v[:, h // 3] for h in range(6)], 1)

    close(attention.attend(q, k, v, mask), by_hand(mask), 1e-12)
    close(attention.attend_continued(q, k, v), by_hand(torch.ones(3, 5, dtype=torch.bool).tril(2)),
          1e-12)
    k, v = k[:, :, :3], v[:, :, :3]
    close(attention.attend(q, k, v), by_hand(torch.ones(3, 3, dtype=torch.bool).tril()), 1e-12)

def test_cudnn_is_left_out():
    """Claim: after a model is loaded onto a GPU, torch no longer takes cuDNN's attention."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        attention.prefer_kernels_without_plans()
        assert (not torch.backends.cuda.cudnn_sdp_enabled()
                and torch.backends.cuda.flash_sdp_enabled()
                and torch.backends.cuda.mem_efficient_sdp_enabled())
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)

# -----------------------------------------------------------------------------
# do the tests bite?

ATTEND = "appendix.attention:attend"

MUTATIONS = [
    (ATTEND, "k, v = copies_for(q, k, v)", "pass", test_attention_by_hand, {}),
    (ATTEND, "mask is None and can_share(q)", "mask is None",
     test_fp32_on_a_gpu_shares_nothing, dict(dtype=torch.float32, shares=False)),
    (ATTEND, "mask is None and can_share(q)", "False",
     test_no_mask_over_shared_heads, dict(plain=True)),
    ("appendix.attention:copies_for", "k.repeat_interleave(copies, 1)", "k.repeat(1, copies, 1, 1)",
     test_attention_by_hand, {}),
    ("appendix.attention:prefer_kernels_without_plans",
     "torch.backends.cuda.enable_cudnn_sdp(False)", "pass", test_cudnn_is_left_out, {}),
    ("model:KVCache.place", "not is_first", "True",
     test_no_mask_over_shared_heads, dict(plain=True)),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, models, monkeypatch):
    """Bug: a test that no bug can turn red."""
    check_mutation(target, old, new, test, arguments, {
        "vlm": lambda: models["qwen2.5"], "monkeypatch": lambda: monkeypatch})
