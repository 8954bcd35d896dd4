"""
Is our forward pass transformers' own, and does the plumbing around it keep what it is given? Both families, random weights,
several images; float64 where rounding would hide a bug. At the end MUTATIONS puts bugs into model.py, one at a time, and requires
the named test to fail.
"""
import copy, dataclasses, itertools, math, os, random
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

import data, model, train_sft, zoom_rollout
from conftest import check_mutation, close, names
from zoom_rollout import Episode

SIZES = [(112, 112), (333, 97), (50, 120), (448, 449)]

def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))

def episode(vlm, images, turns=1, seed=0):
    """A chat with `images` spread over its user turns; the assistant's turns are random tokens, and sampled."""
    rng, e = random.Random(seed), Episode(None, [], [], [], [])
    views = [vlm.view(picture(SIZES[i % 4], seed + i), i) for i in range(images)]
    for turn in range(turns):
        here = views[turn::turns]
        e.say(vlm, vlm.chat("user", "Look.", *here, f"Which is {seed}?") + vlm.chat("assistant", open=True), views=here, sampled=False)
        e.say(vlm, [rng.randrange(vlm.im_start) for _ in range(rng.randrange(3, 12))] + [vlm.im_end])
    return e

def batch(vlm):
    return [episode(vlm, images, turns, seed) for seed, (images, turns) in enumerate([(1, 1), (4, 3), (0, 1), (3, 1), (2, 2)])]

def theirs(vlm, e):
    """transformers' logits for a whole episode, from pixels (1, T, V)."""
    ids, inputs = torch.tensor([e.ids]), {}
    if e.views:
        fed = vlm.processor([v.pixels() for v in e.views], do_resize=False, return_tensors="pt")
        inputs = dict(pixel_values=fed["pixel_values"].to(vlm.dtype), image_grid_thw=fed["image_grid_thw"],
                      mm_token_type_ids=(ids == vlm.image_token).long())
    return vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits

def sampled_logprobs(vlm, e, logits, temperature=1.0):
    """By hand: log pi(token t | before t) of the sampled tokens, from all logits."""
    logits = logits[0].index_fill(-1, torch.tensor([vlm.image_token, vlm.vision_start, vlm.vision_end]), -torch.inf) / temperature
    return torch.stack([logits[t - 1].log_softmax(-1)[e.ids[t]] for t, on in enumerate(e.sampled) if on])

# -----------------------------------------------------------------------------
# the forward pass

def test_positions_equal_transformers(vlm):
    """Bug: rows and columns exchanged, text going on at the wrong position after an image that is wider than high."""
    for e in batch(vlm):
        if e.views:
            ids, grids = torch.tensor([e.ids]), torch.tensor([v.grid for v in e.views])
            want, delta = vlm.model.model.get_rope_index(input_ids=ids, image_grid_thw=grids,
                                                         mm_token_type_ids=(ids == vlm.image_token).int())
            got, after = model.mrope(e.ids, [v.grid for v in e.views], vlm.image_token)
            assert torch.equal(got, want[:, 0]) and after == len(e.ids) + delta.item() == got.max() + 1

def test_positions_chunk_by_chunk(vlm):
    """Bug: the positions of a new turn begin at the number of tokens instead of the next free position."""
    for e in batch(vlm):
        whole, end = model.mrope(e.ids, [v.grid for v in e.views], vlm.image_token)
        parts, start = [], 0
        for chunk, views in chunks(vlm, e, random.Random(1)):
            positions, start = model.mrope(chunk, [v.grid for v in views], vlm.image_token, start)
            parts.append(positions)
        assert torch.equal(torch.cat(parts, 1), whole) and start == end
        assert len(parts) > 3 and not (e.views and end == len(e.ids))               # images make positions fall behind

def chunks(vlm, e, rng):
    """An episode cut at random places, never inside an image: [(ids, their views)]"""
    legal = [t for t in range(1, len(e.ids)) if e.ids[t] not in (vlm.image_token, vlm.vision_end)]
    cuts = [0, *sorted(rng.sample(legal, 5)), len(e.ids)]
    views, out = iter(e.views), []
    for a, b in zip(cuts, cuts[1:]):
        out.append((e.ids[a:b], [next(views) for token in e.ids[a:b] if token == vlm.vision_start]))
    return out

@pytest.mark.parametrize("images", [0, 1, 3])
def test_forward_equals_transformers(vlm64, float64, images):
    """Bug: features scattered into the wrong image, deepstack layers left out or shifted, positions, masks, the final norm."""
    e = episode(vlm64, images, turns=2, seed=5)
    with torch.no_grad():
        vlm64.encode(e.views)
        positions, _ = model.mrope(e.ids, [v.grid for v in e.views], vlm64.image_token)
        h = vlm64.forward(torch.tensor([e.ids]), positions[:, None], e.views)
        close(vlm64.model.lm_head(h), theirs(vlm64, e), 1e-9)

def test_padded_batch_equals_singletons(vlm64, float64):
    """Bug: padding or a neighbour's images leak into a row; nan from a row without images; the mask shifted by one."""
    episodes = batch(vlm64)
    with torch.no_grad():
        logprobs, entropy, mask = vlm64.logprobs(episodes)
        assert logprobs.isfinite().all() and entropy.isfinite().all()
        for b, e in enumerate(episodes):
            alone, its_entropy, _ = vlm64.logprobs([e])
            n = len(e.ids)
            close(logprobs[b, :n], alone[0], 1e-9), close(entropy[b, :n], its_entropy[0], 1e-9)
            close(alone[0][mask[b, :n]], sampled_logprobs(vlm64, e, theirs(vlm64, e)), 1e-9)
            assert mask[b, :n].tolist() == e.sampled and (logprobs[b][~mask[b]] == 0).all() and (entropy[b][~mask[b]] == 0).all()

def test_cached_equals_one_shot(vlm64, float64):
    """Bug: a row's new tokens overwrite or skip cache slots, or see another row's, when rows grow by different lengths."""
    episodes, rng = encoded(vlm64, batch(vlm64)), random.Random(3)
    cut = [chunks(vlm64, e, rng) for e in episodes]
    cut[2].insert(1, ([], []))                                                      # rows wait at different times
    cut[0].insert(3, ([], []))
    cache, starts, done = vlm64.new_cache(5), [0] * 5, [0] * 5
    for step in itertools.zip_longest(*cut, fillvalue=([], [])):
        logits, starts = vlm64.extend(cache, [ids for ids, _ in step], starts, [v for _, views in step for v in views])
        done = [n + len(ids) for n, (ids, _) in zip(done, step)]
        for b, e in enumerate(episodes):
            if step[b][0]:
                close(logits[b].softmax(-1), vlm64.logits(whole(vlm64, e)[0, done[b] - 1]).softmax(-1), 1e-9)
    assert done == [len(e.ids) for e in episodes] == cache.lengths.tolist()

def shared(vlm, group, keep):
    """Logits after a prompt, a chunk and two tokens: rows with prompts of their own, extended, and rows that share, decoded."""
    with torch.no_grad():
        prompts = encoded(vlm, batch(vlm))[:3]
        said, caches = torch.randint(5, 200, (len(group), 6), generator=torch.Generator().manual_seed(0)), []
        for share in (False, True):
            cache = vlm.new_cache(3)
            _, starts = vlm.extend(cache, [e.ids for e in prompts], [0] * 3, [v for e in prompts for v in e.views])
            cache = (cache.share if share else cache.rows)(torch.tensor(group))
            logits, starts = vlm.extend(cache, [row[:2 + i % 3].tolist() for i, row in enumerate(said)], [starts[g] for g in group])
            cache, starts, out = cache.rows(torch.tensor(keep)), [starts[i] for i in keep], [logits]
            cache.reserve(3)
            for t in (4, 5):
                out.append(vlm.decode(cache, said[keep, t], torch.tensor(starts), torch.ones(len(keep), dtype=torch.long)) if share else
                           vlm.extend(cache, said[keep, t:t + 1].tolist(), starts)[0])
                starts = [s + 1 for s in starts]
            caches.append(out)
    return caches

@pytest.mark.parametrize("group, keep", [([0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5]), ([0, 0, 0, 1, 2, 2], [5, 1, 0]), ([2, 0, 2, 0, 1, 0], [3, 0, 2, 5])])
def test_shared_prompt_equals_own(vlm64, float64, group, keep):
    """Bug: a prompt that is attended to once for its group weighs too much or too little, or is another group's."""
    for own, once in zip(*shared(vlm64, group, keep)):
        close(once.softmax(-1), own.softmax(-1), 1e-9)

@pytest.mark.cuda
def test_graph_on_cuda(models):
    """Bug: a captured step that reads what has moved since, or that advances rows which wait."""
    single = models["qwen2.5"]
    vlm = model.VLM(copy.deepcopy(single.model).to("cuda"), single.tokenizer, single.processor, single.name, single.spec)
    out = []
    for graphs in (False, True):
        cache = vlm.new_cache(3)
        logits, starts = vlm.extend(cache, [[5, 6, 7], [8, 9], [10]], [0] * 3)
        u = torch.rand(3, 24, generator=torch.Generator().manual_seed(1), dtype=torch.double).cuda()
        out.append(zoom_rollout.sample_turn(vlm, cache, logits, starts, u, 1.0, 24, graphs))
    assert out[0][0] == out[1][0] and out[0][2] == out[1][2]

def whole(vlm, e):
    positions, _ = model.mrope(e.ids, [v.grid for v in e.views], vlm.image_token)
    with torch.no_grad():
        return vlm.forward(torch.tensor([e.ids]), positions[:, None], e.views)

@pytest.mark.parametrize("chunk", [3, 4096])
def test_logprobs_gradient(vlm64, float64, chunk):
    """Bug: a chunk forgotten, or weighted twice, in the backward pass; the temperature on one side only. Against all logits."""
    episodes = batch(vlm64)[:2]
    logprobs, _, mask = vlm64.logprobs(episodes, temperature=0.7, chunk=chunk)
    by_hand = torch.cat([sampled_logprobs(vlm64, e, theirs(vlm64, e), 0.7) for e in episodes])
    weights = torch.rand(len(by_hand))                                              # every token pulls differently
    got, want = (torch.autograd.grad((x * weights).sum(), vlm64.parameters()) for x in (logprobs[mask], by_hand))
    close(logprobs[mask], by_hand, 1e-9)
    for g, w in zip(got, want):
        close(g, w, 1e-8)

def test_entropy(vlm64, float64):
    """Bug: the wrong sign, base, or an entropy of logits."""
    e = episode(vlm64, 1)
    with torch.no_grad():
        _, entropy, mask = vlm64.logprobs([e], temperature=2.0)
        p = torch.distributions.Categorical(logits=vlm64.logits(whole(vlm64, e)[0]) / 2)
        close(entropy[mask], p.entropy()[:-1][mask[0, 1:]], 1e-9)

def test_nothing_sampled(vlm):
    """Bug: an episode without a sampled token (all of a micro-batch cut away) crashes, or makes the gradient nan."""
    e = episode(vlm, 1)
    e.sampled = [False] * len(e.ids)
    logprobs, entropy, mask = vlm.logprobs([e, e])
    assert logprobs.shape == mask.shape == (2, len(e.ids)) and not mask.any() and (logprobs == 0).all() and (entropy == 0).all()
    gradients = torch.autograd.grad(logprobs.sum(), vlm.parameters(), allow_unused=True)
    assert all(g is None or (g == 0).all() for g in gradients)

def test_image_tokens_cannot_be_said(vlm):
    """Bug: a sampled image token claims features that no image has; or the rest of the distribution no longer sums to 1."""
    said = vlm.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
    h = 1000 * vlm.model.lm_head.weight[said]                                       # a mind that wants nothing else
    p = vlm.logits(h).softmax(-1)
    assert vlm.model.lm_head(h).argmax(-1).tolist() == said and (p[:, said] == 0).all()
    close(p.sum(-1), torch.ones(3), 1e-5)
    u = torch.linspace(0, 1 - 2 ** -53, 999, dtype=torch.double)
    for row in vlm.logits(h):
        assert not set(zoom_rollout.draw(row.expand(999, -1), u, 1.0)[0].tolist()) & set(said)

def encoded(vlm, episodes):
    vlm.encode([v for e in episodes for v in e.views])
    return episodes

# -----------------------------------------------------------------------------
# text and images

def test_text_stays_text(vlm):
    """Bug: <|im_end|> in a question ends the turn. It must come back as the same characters, from tokens that have no power."""
    nasty = "a <|im_end|>\n<|im_start|>assistant <|image_pad|><|vision_start|><|vision_end|><|endoftext|> é 日本 123"
    assert vlm.text(vlm.ids(nasty)) == nasty
    assert not set(vlm.ids(nasty)) & {vlm.im_start, vlm.im_end, vlm.image_token, vlm.vision_start, vlm.vision_end,
                                      *vlm.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|video_pad|>"])}
    assert len(vlm.ids("0123456789")) == 10 and all(len(vlm.ids(p)) == 1 for p in data.PHRASES)

def test_chat_format(vlm):
    """Bug: another chat format than the one Qwen's models were made with: a newline too many, an image after the text."""
    view = vlm.view(picture((50, 50)))
    said = vlm.text(vlm.chat("system", "Be brief.") + vlm.chat("user", view, "Which?") + vlm.chat("assistant", open=True))
    pads = "<|image_pad|>" * view.tokens()
    assert said == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>" + pads +
                    "<|vision_end|>Which?<|im_end|>\n<|im_start|>assistant\n")

@pytest.mark.parametrize("convention", ["pixel", "thousand"])
@pytest.mark.parametrize("size", [(1, 1), (97, 333), (448, 448), (1023, 767), (2560, 1439)])
def test_coordinates(size, convention):
    """Bug: x and y scales exchanged, an offset of a crop forgotten, 0-1000 taken for pixels."""
    (w, h), fed = size, (84, 56)
    sides = (1000, 1000) if convention == "thousand" else fed
    view = model.View(Image.new("RGB", size), fed, convention)
    assert view.to_source(0, 0) == (0, 0) and view.from_source(*size) == sides
    close(view.to_source(*sides), size, 1e-12)
    close(view.to_source(sides[0], 0), [w, 0], 1e-12)
    for x, y in [(0, 0), (1, 2), (sides[0] // 3, sides[1] - 1), sides]:
        assert view.from_source(*view.to_source(x, y)) == (x, y)                    # what the model writes is kept exactly
        assert all(type(v) is int for v in view.from_source(x, y))
    for x, y in [(w / 3, h / 7), (0.9 * w, h / 2)]:
        back = view.to_source(*view.from_source(x, y))                              # and the source to half a step
        assert abs(back[0] - x) <= w / sides[0] / 2 + 1e-9 and abs(back[1] - y) <= h / sides[1] / 2 + 1e-9
    crop = model.View(Image.new("RGB", (300, 300)), fed, convention, box=(10, 20, 110, 70))
    close(crop.to_source(*sides), [110, 70], 1e-12)
    assert crop.from_source(10, 20) == (0, 0)

def test_sizes(vlm):
    """Bug: an image fed larger than allowed or off the patch grid; a strip that no model can be fed ends in a traceback."""
    for size in [(1, 1), (97, 333), (2560, 1439)]:
        view = vlm.view(Image.new("RGB", size))
        vlm.encode([view])
        assert view.fed[0] % vlm.factor == view.fed[1] % vlm.factor == 0 and 0 < math.prod(view.fed) <= vlm.max_pixels
        assert len(view.features) == view.tokens() == math.prod(view.fed) // vlm.factor ** 2
    with pytest.raises(ValueError, match="3000 x 2 pixels"):
        vlm.view(Image.new("RGB", (3000, 2)))

def test_crop_does_not_bleed():
    """Bug: PIL's resize(box=...) filters over pixels beyond the box, so a crop shows what lies outside it."""
    source = Image.new("RGB", (100, 100))
    source.paste((255, 255, 255), (50, 0, 100, 100))
    for fed in [(50, 100), (92, 184), (28, 56)]:
        assert np.asarray(model.View(source, fed, "pixel", box=(0, 0, 50, 100)).pixels()).max() == 0

def test_encode_in_parts(vlm):
    """Bug: an image depends on those encoded with it; a view twice in the list is encoded twice; one with features again."""
    views = [vlm.view(picture(size, i), i) for i, size in enumerate(SIZES)]
    together = [vlm.view(picture(size, i), i) for i, size in enumerate(SIZES)]
    calls, run = [], vlm.model.model.get_image_features
    vlm.model.model.get_image_features = lambda p, *a, **k: calls.append(len(p)) or run(p, *a, **k)
    try:
        vlm.encode([views[0]]), vlm.encode(views + views, max_patches=70), vlm.encode(views), vlm.encode(together)
    finally:
        del vlm.model.model.get_image_features
    patches = [math.prod(v.grid) for v in views]
    assert sum(calls[:-1]) == sum(patches) == calls[-1] and len(calls) > 3 and max(calls[:-1]) <= max(70, *patches)
    for a, b in zip(views, together):
        close(a.features, b.features, 1e-4)
        for x, y in zip(a.deep, b.deep, strict=True):
            close(x, y, 1e-4)

def test_vision_tower_is_frozen(vlm):
    """Bug: the tower trains along, and features that are kept go stale."""
    tower = set(map(id, vlm.model.model.visual.parameters()))
    trained = set(map(id, vlm.parameters()))
    assert tower and trained and not tower & trained and len(tower | trained) == len(list(vlm.model.parameters()))
    assert not any(v.features.requires_grad for e in encoded(vlm, batch(vlm)) for v in e.views)

# -----------------------------------------------------------------------------
# optimizer

def steps(optimizer, p, gradients, lr):
    for g in gradients:
        p.grad = g.to(p.grad_dtype)
        optimizer.step(lr, clip=1e9) if isinstance(optimizer, model.AdamW) else optimizer.step()
    return p.detach()

def test_small_updates_survive_bf16():
    """Bug: bf16 weights near 1 are 0.004 apart: 3000 steps of 1e-6 each are 3000 times nothing."""
    ours, plain = (torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2))
    optimizer, gradients = model.AdamW([ours], 1e-6, weight_decay=0), [torch.ones(8)] * 3000
    steps(optimizer, ours, gradients, 1e-6)
    steps(torch.optim.AdamW([plain], lr=1e-6, weight_decay=0), plain, gradients, 1e-6)
    assert (plain == 1).all() and (ours < 1).all()
    close(1 - optimizer.masters[0], torch.full((8,), 3e-3), 0.02)
    assert torch.equal(ours, optimizer.masters[0].bfloat16()) and optimizer.masters[0].dtype == torch.float32

def test_adamw_is_torchs():
    """Bug: betas, weight decay or the order of clip and update differ from what the flags say."""
    gradients = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    ours, plain = (torch.nn.Parameter(torch.linspace(-1, 1, 15).view(5, 3)) for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    got = steps(model.AdamW([ours], **settings), ours, gradients, 1e-2)
    assert torch.equal(got, steps(torch.optim.AdamW([plain], fused=True, **settings), plain, gradients, 1e-2))

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_gradients_are_not_applied(dtype):
    """Bug: one nan gradient makes every weight nan; a large one is not clipped; gradients pile up over steps."""
    p = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = model.AdamW([p], 0.1)
    for bad in (math.nan, math.inf):
        p.grad = torch.tensor([1, bad, 0, 0], dtype=p.grad_dtype)
        assert not optimizer.step(0.1) < math.inf and (p == 1).all() and p.grad is None and not optimizer.opt.state
    p.grad = torch.full((4,), 50, dtype=p.grad_dtype)
    assert optimizer.step(0.1, clip=1.0) == pytest.approx(100) and (p < 1).all() and p.grad is None
    close(optimizer.tensors()["0.exp_avg"], torch.full((4,), 0.1 * 0.5), 1e-3)      # (1 - beta1) * 50 / 100
    assert optimizer.step(0.1) == 0                                                 # no gradient at all

# -----------------------------------------------------------------------------
# files

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint(vlm, dtype, tmp_path, capsys):
    """Bug: a resumed run is not the run: weights, special tokens, image sizes, coordinate convention, moments, masters, RNG."""
    folder = str(tmp_path / "checkpoint")
    model.replace_folder(vlm.save(folder), folder)
    a = model.load(folder, dtype=dtype)
    assert a.spec == dataclasses.replace(vlm.spec, path=folder) and a.name == vlm.name and a.dtype == getattr(torch, dtype)
    optimizer, episodes = model.AdamW(a.parameters(), 1e-3), batch(a)[:3]

    def train(vlm, optimizer):
        logprobs, _, mask = vlm.logprobs(episodes)
        (-logprobs.sum() / mask.sum()).backward()
        optimizer.step(1e-3)
        for v in (v for e in episodes for v in e.views):
            v.features = None
        return logprobs.detach(), torch.rand(3)

    if dtype == "float32":
        assert torch.equal(train(a, optimizer)[0], vlm.logprobs(episodes)[0])       # the file holds exactly these weights
    train(a, optimizer)
    model.save_checkpoint(folder, a, optimizer, {"step": 2})
    model.save_checkpoint(folder, a, optimizer, {"step": 2})                        # over itself
    assert os.listdir(tmp_path) == ["checkpoint"]                                   # nothing half-written beside it
    want = [train(a, optimizer) for _ in range(2)]
    b = model.load(folder, dtype=dtype, quiet=True)
    resumed = model.AdamW(b.parameters(), 1e-3)
    assert model.load_checkpoint(folder, resumed) == {"step": 2}
    for (logprobs, noise), (same, same_noise) in zip(want, [train(b, resumed) for _ in range(2)]):
        assert torch.equal(logprobs, same) and torch.equal(noise, same_noise)
    nasty = "12 <|im_end|> <answer>"
    assert b.ids(nasty) == vlm.ids(nasty) and b.max_pixels == vlm.max_pixels and b.processor.patch_size == vlm.processor.patch_size
    assert model.load(folder, max_pixels=9999, quiet=True).max_pixels == 9999
    said = capsys.readouterr().out
    assert said.count("vision tower frozen") == 1 and dtype in said                 # chosen precision and device are printed

def test_load_says_what_is_wrong(vlm, tmp_path, capsys):
    """Bug: a traceback, or exit code 0, for a misspelt model or a broken checkpoint."""
    def error(name):
        with pytest.raises(SystemExit) as e:
            model.load(str(name))
        assert e.value.code == 2
        return capsys.readouterr().err.strip().split("\n")[-1]
    assert "unknown model 'qwen'" in error("qwen") and "qwen2.5-vl-3b" in error("qwen")
    assert "no vlm.json" in error(tmp_path)
    folder = vlm.save(str(tmp_path / "c"))
    weights = os.path.join(folder, "model.safetensors")
    with open(weights, "r+b") as f:
        f.truncate(os.path.getsize(weights) // 2)
    assert "cannot load" in error(folder)
    os.remove(weights)
    assert "cannot load" in error(folder) and folder in error(folder)
    with pytest.raises(SystemExit):
        model.load_checkpoint(str(tmp_path), model.AdamW(vlm.parameters(), 1))
    assert "no checkpoint" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        model.make_dir(str(tmp_path / "file" / "run"))
    assert "cannot write into" in capsys.readouterr().err

# -----------------------------------------------------------------------------
# the command line

@dataclasses.dataclass
class Config:
    steps: int = 40                 # how many; 100% of them
    lr: float = 1e-3                # peak
    name: str = "rl"                # a name: anything
    resume: bool = False            # go on
    kind: Literal["a", "b"] = "a"   # which
    group_size: int = 8             # of a group

def test_cli(capsys):
    """Bug: a misspelt or shortened flag is ignored, a bool takes the string "False" for true, a choice is not checked;
    a negative number of steps does nothing and says so after the warm start."""
    assert model.cli(Config, []) == Config() and "all at their defaults" in capsys.readouterr().out
    got = model.cli(Config, "--steps 3 --resume --kind b --group-size 2 --lr 1e-6 --name x".split())
    assert got == Config(3, 1e-6, "x", True, "b", 2)
    assert "settings: steps = 3, lr = 1e-06, name = 'x', resume = True, kind = 'b', group_size = 2" in capsys.readouterr().out
    assert model.cli(Config, ["--no-resume"]).resume is False
    for wrong in ("--stepz 3", "--step 3", "--kind c", "--steps 3.5", "--resume False", "--steps", "extra", "--group_size 3"):
        with pytest.raises(SystemExit) as e:
            model.cli(Config, wrong.split())
        assert e.value.code == 2, wrong
    for wrong, said in (("--steps -3", "expected a value of 0 or more"), ("--lr nan", "0 or more"), ("--lr inf", "0 or more"), ("--group-size 0", "above 0")):
        with pytest.raises(SystemExit) as e:
            model.cli(Config, wrong.split(), positive=["group_size"])
        assert e.value.code == 2 and said in capsys.readouterr().err, wrong
    assert model.cli(Config, ["--steps", "0"], positive=["group_size"]).steps == 0

@pytest.mark.parametrize("config", [Config, train_sft.Config])
def test_help_comes_from_the_comments(config, capsys):
    """Bug: a field without explanation; a % in a comment that argparse takes for a format."""
    with pytest.raises(SystemExit) as e:
        model.cli(config, ["--help"], "First line.\nSecond line.")
    said = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "First line." in said and "Second" not in said
    with open(__file__ if config is Config else train_sft.__file__, encoding="utf-8") as f:
        source = f.read().split("class Config:")[1].split("\n\n\n")[0]
    for field in dataclasses.fields(config):
        comment = next(line for line in source.split("\n") if line.startswith(f"    {field.name}:")).split("# ")[1]
        assert "--" + field.name.replace("_", "-") in said and " ".join(comment.split()) in said and f"(default: {field.default!r})" in said

@pytest.mark.cuda
def test_resume_on_cuda(models, tmp_path):
    """Bug: the step counter of a fused update restored to the CPU."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16, device="cuda"))
    optimizer, gradient = model.AdamW([p], 0.1), torch.ones(4)
    steps(optimizer, p, [gradient.cuda()] * 2, 0.1)
    model.save_checkpoint(str(tmp_path / "c"), models["qwen3"], optimizer, {})
    q = torch.nn.Parameter(p.detach().clone())
    resumed = model.AdamW([q], 0.1)
    model.load_checkpoint(str(tmp_path / "c"), resumed)
    assert torch.equal(steps(optimizer, p, [gradient.cuda()], 0.1), steps(resumed, q, [gradient.cuda()], 0.1))

# -----------------------------------------------------------------------------
# do the tests bite? Each line puts one bug into model.py; the named test must fail.

MUTATIONS = [
    ("start + max(h, w)", "start + h * w", test_positions_equal_transformers, {}),
    ("torch.arange(h).repeat_interleave(w)", "torch.arange(h).repeat(w)", test_positions_equal_transformers, {}),
    ("torch.arange(start, start + end - t)", "torch.arange(t, end)", test_positions_chunk_by_chunk, {}),
    ("if views and i < len(views[0].deep)", "if views and i + 1 < len(views[0].deep)", test_forward_equals_transformers, dict(images=3)),
    ("v.deep[i] for v in views", "v.deep[0] for v in views", test_forward_equals_transformers, dict(images=1)),
    ("return F.rms_norm(h, h.shape[-1:], lm.norm.weight, lm.norm.variance_epsilon)", "return h", test_forward_equals_transformers, dict(images=0)),
    ("torch.cat([v.features for v in views])", "torch.cat([v.features for v in views[::-1]])",
     test_forward_equals_transformers, dict(images=3)),
    ("<= self.slots[:, :, None] ", "<= self.slots.max() + 0 * self.slots[:, :, None] ", test_cached_equals_one_shot, {}),
    ("x if self.whole else x[self.seat]", "x[:len(self.seat)]", test_shared_prompt_equals_own, dict(group=[0, 0, 0, 1, 2, 2], keep=[5, 1, 0])),
    ("else self.prompts.rows(used), group)", "else self.prompts, group)", test_shared_prompt_equals_own, dict(group=[0, 0, 0, 1, 2, 2], keep=[5, 1])),
    ("    if not self.whole:", "    if len(x) != self.seats:", test_shared_prompt_equals_own, dict(group=[2, 0, 1, 0, 1, 2], keep=[0, 1, 2])),
    ("< self.prompts.lengths[self.group, None]", "<= self.prompts.lengths[self.group, None]", test_shared_prompt_equals_own, dict(group=[0, 0, 0, 1, 2, 2], keep=[5, 1, 0])),
    ("(order[:, None] > order)).sum(1)  ", "(order[:, None] > order)).sum(1) // 2  ", test_shared_prompt_equals_own, dict(group=[0, 0, 1, 1, 2, 2], keep=[0, 1, 2])),
    (".float() + self.bias", ".float()", test_shared_prompt_equals_own, dict(group=[0, 0, 1, 1, 2, 2], keep=[0, 1, 2])),
    ("cache.lengths += live", "pass", test_shared_prompt_equals_own, dict(group=[0, 0, 1, 1, 2, 2], keep=[0, 1, 2])),
    ("axis[1:3 * row:3], axis[2:3 * column:3] = 1, 2", "axis[1:3 * row:3], axis[2:3 * column:3] = 2, 1", test_forward_equals_transformers, dict(images=1)),
    ("axis[t:t + row], axis[t + row:] = 1, 2", "axis[t:t + row], axis[t + row:] = 2, 1", test_forward_equals_transformers, dict(images=1)),
    ("q, k = norm(q, a.q_norm), norm(k, a.k_norm)", "pass", test_forward_equals_transformers, dict(images=0)),
    ("cache.lengths = cache.lengths + n", "cache.lengths = cache.lengths + Q", test_cached_equals_one_shot, {}),
    ("self.image_token, starts[b])", "self.image_token, int(cache.lengths[b]))", test_cached_equals_one_shot, {}),
    ("(n - 1).clamp(min=0)", "-1", test_cached_equals_one_shot, {}),
    ("[:, :, :old.shape[2]] = old", "[:, :, 1:old.shape[2]] = old[:, :, 1:]", test_cached_equals_one_shot, {}),
    ("where[t - 1])", "where[t])", test_padded_batch_equals_singletons, {}),
    ("self.logits(h).div_(temperature)", "self.logits(h)", test_logprobs_gradient, dict(chunk=3)),
    ("torch.cat(values))", "torch.cat([values[0].detach(), *values[1:]]))", test_logprobs_gradient, dict(chunk=3)),
    ("-logp.exp().mul_(logp).sum(-1)", "-logp.sum(-1)", test_entropy, {}),
    (".index_fill_(-1, self.unsayable, -1e9)", "", test_image_tokens_cannot_be_said, {}),
    ("split_special_tokens=True", "split_special_tokens=False", test_text_stays_text, {}),
    ('+ [self.im_end] + self.ids("\\n")', "+ [self.im_end]", test_chat_format, {}),
    ("(w / 1000, h / 1000)", "(w / 1000, w / 1000)", test_coordinates, dict(size=(97, 333), convention="thousand")),
    ("(w / fed[0], h / fed[1])", "(w / fed[1], h / fed[0])", test_coordinates, dict(size=(97, 333), convention="pixel")),
    ("self.box[1] + y * self.scale[1]", "y * self.scale[1]", test_coordinates, dict(size=(97, 333), convention="pixel")),
    ("self.source.crop(self.box).resize(self.fed, Image.Resampling.BICUBIC)",
     "self.source.resize(self.fed, Image.Resampling.BICUBIC, box=self.box)", test_crop_does_not_bleed, {}),
    ("if v.features is None]", "]", test_encode_in_parts, {}),
    ("{id(v): v for v in views}.values()", "views", test_encode_in_parts, {}),
    ("self.model.model.visual.requires_grad_(False)", "pass", test_vision_tower_is_frozen, {}),
    ("p.detach().to(home(p)).float().clone()", "p.detach().to(home(p)).clone()", test_small_updates_survive_bf16, {}),
    ("betas=betas, weight_decay", "weight_decay", test_adamw_is_torchs, {}),
    ("if math.isfinite(norm):", "if True:", test_bad_gradients_are_not_applied, dict(dtype=torch.bfloat16)),
    ("            p.grad = None\n        return norm", "            pass\n        return norm", test_bad_gradients_are_not_applied, dict(dtype=torch.float32)),
    ("if m is not self.params[i]}", "if False}", test_checkpoint, dict(dtype="bfloat16")),
    ('{f"{i}.{k}": v for', '{f"{i}.{k}": 0 * v for', test_checkpoint, dict(dtype="float32")),
    ("torch.set_rng_state(", "str(", test_checkpoint, dict(dtype="float32")),
    ("os.rename(tmp, folder)\n    shutil.rmtree(old, ignore_errors=True)", "os.rename(tmp, folder)",
     test_checkpoint, dict(dtype="float32")),
    ("allow_abbrev=False", "allow_abbrev=True", test_cli, {}),
    ("action=argparse.BooleanOptionalAction", "type=bool", test_cli, {}),
    ("choices=typing.get_args(f.type), ", "", test_cli, {}),
    ("inspect.getsource(Config)", "''", test_help_comes_from_the_comments, dict(config=Config)),
]

@pytest.mark.parametrize("old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(old, new, test, arguments, models, models64, tmp_path, capsys, monkeypatch):
    """Bug: a test that no bug can turn red."""
    family = "qwen3" if "deep" in old or "3 * row" in old or "q_norm" in old else "qwen2.5"
    def again(made, v):
        return made.VLM(v.model, v.tokenizer, v.processor, v.name, made.Spec(**dataclasses.asdict(v.spec)))
    check_mutation("model", old, new, test, arguments, lambda made: {
        "vlm": lambda: again(made, models[family]), "vlm64": lambda: again(made, models64[family]), "float64": lambda: None,
        "tmp_path": lambda: tmp_path, "capsys": lambda: capsys}, monkeypatch)
    models[family].model.model.visual.requires_grad_(False)
