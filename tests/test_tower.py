"""Are our image features transformers' own, for both families, and are they computed in few calls
that never wait for the GPU? At the end MUTATIONS puts bugs into appendix/tower.py, one at a time,
and requires the named test to fail.
"""
import copy, itertools, math

import pytest
import torch
import torch.nn.functional as F

from appendix import tower, vision
from conftest import check_mutation, close, names
from test_model import picture

# Images in tokens: whole windows, parts of windows on either edge, one token wide,
# and two of the same size.
SIZES = [(9, 7), (4, 4), (8, 12), (4, 4), (1, 5), (6, 6)]

def with_windows(vlm):
    """Layers of both kinds; the tiny model has no layer with windows."""
    net = copy.deepcopy(vlm.model)
    if not vlm.qwen3:
        net.model.visual.fullatt_block_indexes = [1]
    return type(vlm)(net, vlm.tokenizer, vlm.processor, vlm.name, vlm.spec)

def patches(vlm, sizes):
    """Random images of these sizes in tokens -> (pixel values, grids)."""
    views = [vlm.view(picture((w * vlm.factor, h * vlm.factor), i), i,
                      fed=(w * vlm.factor, h * vlm.factor))
             for i, (w, h) in enumerate(sizes)]
    for view in views:
        vlm.patchify(view)
    return (vision.pixel_values(vlm, torch.cat([view.patches for view in views])),
            [view.grid for view in views])

@torch.no_grad()
def theirs(vlm, pixels, grids):
    """transformers' features -> tokens (N, D), list of deep ones (N, D); one version leaves these
    in one piece."""
    out = vlm.model.model.get_image_features(pixels, torch.tensor(grids), return_dict=True)
    deep = getattr(out, "deepstack_features", None) or []
    return (torch.cat(list(out.pooler_output)),
            [x if torch.is_tensor(x) else torch.cat(list(x)) for x in deep])

def ours(vlm, pixels, grids):
    return tower.run_tower(vlm.model.model.visual, pixels, grids)

@torch.no_grad()
def test_features_equal_transformers(vlm):
    """Bug: windows that mix images, a token in another's place, positions of the wrong patch, a
    layer that attends to too little."""
    vlm = with_windows(vlm)
    pixels, grids = patches(vlm, SIZES)
    for grids_now, pixels_now in [(grids, pixels), (grids[:1], pixels[:math.prod(grids[0])])]:
        tokens, deep = ours(vlm, pixels_now, grids_now)
        their_tokens, their_deep = theirs(vlm, pixels_now, grids_now)
        close(tokens, their_tokens, 1e-5)
        assert len(deep) == len(their_deep) == (2 if vlm.qwen3 else 0)
        for a, b in zip(deep, their_deep):
            close(a, b, 1e-5)

@torch.no_grad()
def test_features_in_bf16(vlm):
    """Bug: angles or positions in bf16, where a place of 1 in 256 is lost."""
    low = with_windows(vlm)
    low.model, low.dtype = low.model.bfloat16(), torch.bfloat16
    pixels, grids = patches(low, SIZES)
    exact = theirs(with_windows(vlm), pixels.float(), grids)[0]
    error = [(x.float() - exact).abs().mean()
             for x in (ours(low, pixels, grids)[0], theirs(low, pixels, grids)[0])]
    assert pixels.dtype == torch.bfloat16 and 0 < error[0] < 1.2 * error[1]

def test_gradient_reaches_the_tower(vlm):
    """Bug: the tiny model's tower is trained by appendix/tiny.py, and a part of it
    gets no gradient."""
    net = with_windows(vlm).model.model.visual.requires_grad_(True)
    pixels, grids = patches(vlm, SIZES[:3])
    tokens, deep = tower.run_tower(net, pixels, grids)
    (tokens.square().sum() + sum(x.square().sum() for x in deep)).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]

def test_one_call_for_all_windows_of_a_size(vlm, monkeypatch):
    """Bug: one attention call per window or per image."""
    calls, run = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, *a, **k: calls.append(q.shape) or run(q, *a, **k))
    vlm = with_windows(vlm)
    layers = len(vlm.model.model.visual.blocks)
    ours(vlm, *patches(vlm, [(8, 8)] * 5))
    assert len(calls) == layers             # 20 windows or 5 images: one call in each layer
    calls.clear()
    # windows of 16, 12, 4 and 3 tokens; images of one size
    ours(vlm, *patches(vlm, [(9, 7), (9, 7), (7, 9)]))
    assert len(calls) <= 4 * layers

def test_nothing_waits_for_the_gpu(vlm):
    """Bug: a length is read from a tensor on the device. Tensors of the meta device have no values,
    so whatever reads one fails."""
    net = with_windows(vlm).model.model.visual.to("meta")
    pixels, grids = patches(vlm, SIZES)
    tokens, deep = tower.run_tower(net, pixels.to("meta"), grids)
    assert (len(tokens) == sum(w * h for w, h in SIZES)
            and tokens.is_meta and all(x.is_meta for x in deep))

def test_windows():
    """By hand: 3 x 5 tokens in windows of 2 x 2, before an image of one token."""
    order, runs = tower.arrange([(1, 6, 10), (1, 2, 2)], side=2)
    assert (order.tolist() == [14, 15,  4, 9, 10, 11, 12, 13,  0, 1, 5, 6, 2, 3, 7, 8]
            and runs == [(2, 4), (3, 8), (2, 16)])
    order, runs = tower.arrange([(1, 6, 10), (1, 2, 2), (1, 2, 2)])
    assert order.tolist() == [15, 16, *range(15)] and runs == [(2, 4), (1, 60)]

@pytest.mark.parametrize("side", [None, 4])
def test_every_token_has_one_place(side):
    """Claim: for any images, windows are a partition of the tokens
    and none reaches over two images."""
    for sizes in itertools.product([(2, 6), (10, 18), (18, 10), (8, 8)], repeat=3):
        order, runs = tower.arrange([(1, *size) for size in sizes], side)
        counts = [h * w // 4 for h, w in sizes]
        image = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
        assert sorted(order.tolist()) == list(range(sum(counts)))
        pieces = image[order].split([n // 4 for windows, n in runs for _ in range(windows)])
        assert (all(len(piece.unique()) == 1 for piece in pieces)
                and len({n for _, n in runs}) == len(runs))

# -----------------------------------------------------------------------------
# do the tests bite?

MUTATIONS = [
    ("appendix.tower:run_tower", "i in whole", "False", test_features_equal_transformers, {}),
    ("appendix.tower:run_tower",
     "attend(q[to_images], k[to_images], v[to_images], images)[from_images]",
     "attend(q[to_images], k[to_images], v[to_images], images)",
     test_features_equal_transformers, {}),
    ("appendix.tower:run_tower", "tower.merger(x)[back]", "tower.merger(x)",
     test_features_equal_transformers, {}),
    ("appendix.tower:run_tower", "merger(x)[back]", "merger(x)",
     test_features_equal_transformers, {}),
    ("appendix.tower:run_tower", "deep_layers.index(i)", "0", test_features_equal_transformers, {}),
    ("appendix.tower:window_side", "pixels and pixels // tower.patch_size // MERGE",
     "pixels and pixels // tower.patch_size", test_features_equal_transformers, {}),
    ("appendix.tower:arrange", "first = int(number[-1, -1]) + 1", "first = 1",
     test_every_token_has_one_place, dict(side=4)),
    ("appendix.tower:arrange", "sizes[window_of] * first + window_of", "window_of",
     test_windows, {}),
    ("appendix.tower:arrange", "int(column[-1]) + 1", "int(column[-1])", test_windows, {}),
    ("appendix.tower:rotate", "x32.roll(x.shape[-1] // 2, -1)", "x32.roll(1, -1)",
     test_features_equal_transformers, {}),
    ("appendix.tower:rotations", "torch.cat(places).to(order.device)[order]", "torch.cat(places)",
     test_features_equal_transformers, {}),
    ("appendix.tower:rotations", "torch.stack([row, column], -1)", "torch.stack([column, row], -1)",
     test_features_equal_transformers, {}),
    ("appendix.tower:by_token", "x.transpose(1, 2)", "x", test_features_equal_transformers, {}),
    ("appendix.tower:embed", "F.interpolate(square, (h, w), mode='bilinear', align_corners=True)",
     "F.interpolate(square, (h, w), mode='bilinear')", test_features_equal_transformers, {}),
    ("appendix.tower:embed", "tower.pos_embed.weight.float()", "tower.pos_embed.weight.detach()",
     test_gradient_reaches_the_tower, {}),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, models):
    """Bug: a test that no bug can turn red."""
    family = ("qwen3" if "merger(x)[back]" == old or "deep" in old or "align" in old
                         or "pos_embed" in old
              else "qwen2.5")
    check_mutation(target, old, new, test, arguments, {"vlm": lambda: models[family]})
