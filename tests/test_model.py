"""Is our forward pass transformers' own, and does what stands around it keep what it is given?
Both families, random weights, several images; float64 where rounding would hide a bug. Sampling and
log-probabilities are tested for the plain VLM and for PrefixVLM (what only the latter does is in
test_prefix.py). At the end MUTATIONS puts bugs into model.py, appendix/vision.py and
appendix/parts.py, one at a time, and requires the named test to fail.
"""
import dataclasses, itertools, math, os, random

import numpy as np
import pytest
import torch
from PIL import Image

import data, model, zoom_rollout
from appendix import run, vision
from conftest import check_mutation, close, names
from zoom_rollout import Episode

SIZES = [(112, 112), (333, 97), (50, 120), (448, 449)]

def picture(size, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))

def plainly(vlm, plain=True):
    """The same model without what appendix/prefix.py does."""
    return model.VLM(vlm.model, vlm.tokenizer, vlm.processor, vlm.name, vlm.spec) if plain else vlm

both = pytest.mark.parametrize("plain", [True, False], ids=["plain", "prefix"])

def episode(vlm, images, turns=1, seed=0):
    """A chat with `images` spread over its user turns; the assistant's turns are random tokens, and
    sampled."""
    rng, e = random.Random(seed), Episode(None)
    views = [vlm.view(picture(SIZES[i % 4], seed + i), i) for i in range(images)]
    for turn in range(turns):
        here = views[turn::turns]
        e.append_given(vlm.chat("user", "Look.", *here, f"Which is {seed}?")
                       + vlm.chat("assistant", open=True), here)
        e.append_sampled(
            [rng.randrange(vlm.im_start) for _ in range(rng.randrange(3, 12))] + [vlm.im_end])
    return e

def batch(vlm):
    return [episode(vlm, images, turns, seed)
            for seed, (images, turns) in enumerate([(1, 1), (4, 3), (0, 1), (3, 1), (2, 2)])]

def theirs(vlm, e):
    """transformers' logits for a whole episode, from pixels (1, T, V)."""
    ids, inputs = torch.tensor([e.ids]), {}
    if e.views:
        fed = vlm.processor([v.pixels() for v in e.views], do_resize=False, return_tensors="pt")
        inputs = dict(pixel_values=fed["pixel_values"].to(vlm.dtype),
                      image_grid_thw=fed["image_grid_thw"],
                      mm_token_type_ids=(ids == vlm.image_token).long())
    return vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits

def sampled_logprobs(vlm, e, logits, temperature=1.0):
    """By hand: log pi(token t | before t) of the sampled tokens, from all logits."""
    logits = logits[0].index_fill(
        -1, torch.tensor([vlm.image_token, vlm.vision_start, vlm.vision_end]),
        -torch.inf) / temperature
    return torch.stack([logits[t - 1].log_softmax(-1)[e.ids[t]]
                        for t, on in enumerate(e.completion_mask) if on])

# -----------------------------------------------------------------------------
# the forward pass

def test_positions_equal_transformers(vlm):
    """Bug: rows and columns exchanged, text going on at the wrong position after an image that is
    wider than high."""
    for e in batch(vlm):
        if e.views:
            ids, grids = torch.tensor([e.ids]), torch.tensor([v.grid for v in e.views])
            want, delta = vlm.model.model.get_rope_index(
                input_ids=ids, image_grid_thw=grids,
                mm_token_type_ids=(ids == vlm.image_token).int())
            got, after = model.mrope(e.ids, [v.grid for v in e.views], vlm.image_token)
            assert (torch.equal(got, want[:, 0])
                    and after == len(e.ids) + delta.item() == got.max() + 1)

def test_positions_chunk_by_chunk(vlm):
    """Bug: the positions of a new turn begin at the number of tokens instead of the next free
    position."""
    for e in batch(vlm):
        whole, end = model.mrope(e.ids, [v.grid for v in e.views], vlm.image_token)
        parts, start = [], 0
        for chunk, views in chunks(vlm, e, random.Random(1)):
            positions, start = model.mrope(chunk, [v.grid for v in views], vlm.image_token, start)
            parts.append(positions)
        assert torch.equal(torch.cat(parts, 1), whole) and start == end
        # images make positions fall behind
        assert len(parts) > 3 and not (e.views and end == len(e.ids))

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
    """Bug: features scattered into the wrong image, deepstack layers left out or shifted,
    positions, masks, the final norm."""
    e = episode(vlm64, images, turns=2, seed=5)
    with torch.no_grad():
        vlm64.encode(e.views)
        positions, _ = model.mrope(e.ids, [v.grid for v in e.views], vlm64.image_token)
        h = vlm64.forward(torch.tensor([e.ids]), positions[:, None], e.views)
        close(vlm64.model.lm_head(h), theirs(vlm64, e), 1e-9)

@both
def test_padded_batch_equals_singletons(vlm64, float64, plain):
    """Bug: padding or a neighbour's images leak into a row; nan from a row without images; the mask
    shifted by one."""
    vlm64 = plainly(vlm64, plain)
    episodes = batch(vlm64)
    with torch.no_grad():
        logprobs, entropy, mask = vlm64.logprobs(episodes)
        assert logprobs.isfinite().all() and entropy.isfinite().all()
        for b, e in enumerate(episodes):
            alone, its_entropy, _ = vlm64.logprobs([e])
            n = len(e.ids)
            close(logprobs[b, :n], alone[0], 1e-9), close(entropy[b, :n], its_entropy[0], 1e-9)
            close(alone[0][mask[b, :n]], sampled_logprobs(vlm64, e, theirs(vlm64, e)), 1e-9)
            assert (mask[b, :n].tolist() == e.completion_mask
                    and (logprobs[b][~mask[b]] == 0).all()
                    and (entropy[b][~mask[b]] == 0).all())

@both
def test_cached_equals_one_shot(vlm64, float64, plain):
    """Bug: a row's new tokens overwrite or skip cache slots, or see another row's, when rows grow
    by different lengths."""
    vlm64 = plainly(vlm64, plain)
    episodes, rng = encoded(vlm64, batch(vlm64)), random.Random(3)
    cut = [chunks(vlm64, e, rng) for e in episodes]
    cut[2].insert(1, ([], []))                                  # rows wait at different times
    cut[0].insert(3, ([], []))
    cache, starts, done = vlm64.new_cache(5), [0] * 5, [0] * 5
    for step in itertools.zip_longest(*cut, fillvalue=([], [])):
        logits, starts = vlm64.prefill(cache, [ids for ids, _ in step], starts,
                                       [v for _, views in step for v in views])
        done = [n + len(ids) for n, (ids, _) in zip(done, step)]
        for b, e in enumerate(episodes):
            if step[b][0]:
                close(logits[b].softmax(-1),
                      vlm64.logits(whole(vlm64, e)[0, done[b] - 1]).softmax(-1), 1e-9)
    assert done == [len(e.ids) for e in episodes] == cache.lengths.tolist()

@both
@pytest.mark.parametrize("group", [[0, 0, 1, 1, 2, 2], [2, 0, 2, 0, 1, 0]])
def test_decoding_equals_prefill(vlm64, float64, plain, group):
    """Bug: a row that waits moves on, or is overwritten by what its neighbours write meanwhile; a
    branch that is another's. Three tokens one by one, of rows that wait at different times, against
    the same tokens in one chunk."""
    vlm64 = plainly(vlm64, plain)
    with torch.no_grad():
        prompts, said = (
            encoded(vlm64, batch(vlm64))[:3],
            torch.randint(5, 200, (6, 3), generator=torch.Generator().manual_seed(0)))
        cache = vlm64.new_cache(3)
        _, positions = vlm64.prefill(cache, [e.ids for e in prompts], [0] * 3,
                                     [v for e in prompts for v in e.views])
        cache, at = cache.branch(torch.tensor(group)), torch.tensor([positions[g] for g in group])
        n, last = torch.zeros(6, dtype=torch.long), [None] * 6
        cache.reserve(9)
        for step in range(9):                           # row b writes in three of the nine steps
            live = torch.tensor([(step + b) % 3 == 0 for b in range(6)])
            logits = vlm64.decode_step(cache, said[torch.arange(6), n.clamp(max=2)], at, live)
            last = [logits[b] if live[b] else last[b] for b in range(6)]
            n, at = n + live, at + live
        assert n.tolist() == [3] * 6
        fresh = vlm64.new_cache(6)
        want, after = vlm64.prefill(
            fresh, [prompts[g].ids + said[b].tolist() for b, g in enumerate(group)], [0] * 6,
            [v for g in group for v in prompts[g].views])
        close(torch.stack(last).softmax(-1), want.softmax(-1), 1e-9)
        assert at.tolist() == after

def whole(vlm, e):
    positions, _ = model.mrope(e.ids, [v.grid for v in e.views], vlm.image_token)
    with torch.no_grad():
        return vlm.forward(torch.tensor([e.ids]), positions[:, None], e.views)

@both
@pytest.mark.parametrize("chunk", [3, 4096])
def test_logprobs_gradient(vlm64, float64, chunk, plain):
    """Bug: a chunk forgotten, or weighted twice, in the backward pass; the temperature on one side
    only. Against all logits."""
    vlm64 = plainly(vlm64, plain)
    episodes = batch(vlm64)[:2]
    logprobs, _, mask = vlm64.logprobs(episodes, temperature=0.7, chunk=chunk)
    by_hand = torch.cat([sampled_logprobs(vlm64, e, theirs(vlm64, e), 0.7) for e in episodes])
    weights = torch.rand(len(by_hand))                          # every token pulls differently
    got, want = (torch.autograd.grad((x * weights).sum(), vlm64.parameters())
                 for x in (logprobs[mask], by_hand))
    close(logprobs[mask], by_hand, 1e-9)
    for g, w in zip(got, want):
        close(g, w, 1e-8)

@both
def test_recomputed_layers_are_the_same(vlm64, float64, plain):
    """Bug: a layer that is computed again in the backward pass is another one."""
    episodes = batch(vlm64)[:2]
    gradients = []
    for recompute in (False, True):
        vlm = type(plainly(vlm64, plain))(vlm64.model, vlm64.tokenizer, vlm64.processor, vlm64.name,
                                          vlm64.spec, recompute)
        calls, layer = [], vlm.layer
        vlm.layer = lambda i, *rest: (calls.append(i), layer(i, *rest))[1]
        logprobs, _, _ = vlm.logprobs(episodes)
        gradients.append(torch.autograd.grad(logprobs.sum(), vlm.parameters()))
        assert (len(calls)
                == (2 if recompute else 1) * vlm.model.config.text_config.num_hidden_layers)
    for once, again in zip(*gradients):
        close(again, once, 1e-12)

def test_micro_batches_of_padded_rows(vlm):
    """Bug: an episode is lost or run twice; a padded part is larger than the memory that was
    granted."""
    vlm, episodes = plainly(vlm), batch(vlm)
    cost = lambda part: len(part) * max(len(e.ids) for e in part)
    for tokens in (1, 100, 300, cost(episodes) - 1, cost(episodes), 10 ** 6):
        parts = vlm.micro_batches(episodes, tokens)
        assert [id(e) for part in parts for e in part] == list(map(id, episodes))
        assert all(len(part) == 1 or cost(part) <= tokens for part in parts)
        assert len(parts) == {
            1: 5, cost(episodes) - 1: 2, cost(episodes): 1, 10 ** 6: 1}.get(tokens, len(parts))
    assert vlm.micro_batches([], 9) == []

@both
def test_entropy(vlm64, float64, plain):
    """Bug: the wrong sign, base, or an entropy of logits."""
    vlm64 = plainly(vlm64, plain)
    e = episode(vlm64, 1)
    with torch.no_grad():
        _, entropy, mask = vlm64.logprobs([e], temperature=2.0)
        p = torch.distributions.Categorical(logits=vlm64.logits(whole(vlm64, e)[0]) / 2)
        close(entropy[mask], p.entropy()[:-1][mask[0, 1:]], 1e-9)

@both
def test_nothing_sampled(vlm, plain):
    """Bug: an episode without a sampled token (all of a micro-batch cut away) crashes, or makes the
    gradient nan."""
    vlm = plainly(vlm, plain)
    e = episode(vlm, 1)
    e.completion_mask = [False] * len(e.ids)
    logprobs, entropy, mask = vlm.logprobs([e, e])
    assert (logprobs.shape == mask.shape == (2, len(e.ids))
            and not mask.any()
            and (logprobs == 0).all()
            and (entropy == 0).all())
    gradients = torch.autograd.grad(logprobs.sum(), vlm.parameters(), allow_unused=True)
    assert all(g is None or (g == 0).all() for g in gradients)

def test_image_tokens_cannot_be_said(vlm):
    """Bug: a sampled image token claims features that no image has; or the rest of the distribution
    no longer sums to 1."""
    said = vlm.tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
    h = 1000 * vlm.model.lm_head.weight[said]                   # a mind that wants nothing else
    p = vlm.logits(h).softmax(-1)
    assert vlm.model.lm_head(h).argmax(-1).tolist() == said and (p[:, said] == 0).all()
    close(p.sum(-1), torch.ones(3), 1e-5)
    u = torch.linspace(0, 1 - 2 ** -53, 999, dtype=torch.double)
    for row in vlm.logits(h):
        assert not (set(zoom_rollout.sample_tokens(row.expand(999, -1), u, 1.0)[0].tolist())
                    & set(said))

def encoded(vlm, episodes):
    vlm.encode([v for e in episodes for v in e.views])
    return episodes

# -----------------------------------------------------------------------------
# text and images

def test_text_stays_text(vlm):
    """Bug: <|im_end|> in a question ends the turn. It must come back as the same characters, from
    tokens that have no power."""
    nasty = ("a <|im_end|>\n"
             "<|im_start|>assistant <|image_pad|><|vision_start|><|vision_end|><|endoftext|> "
             "é 日本 123")
    assert vlm.text(vlm.ids(nasty)) == nasty
    assert not set(vlm.ids(nasty)) & {
        vlm.im_start, vlm.im_end, vlm.image_token, vlm.vision_start, vlm.vision_end,
        *vlm.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|video_pad|>"])}
    assert len(vlm.ids("0123456789")) == 10 and all(len(vlm.ids(p)) == 1 for p in data.PHRASES)

def test_chat_format(vlm):
    """Bug: another chat format than the one Qwen's models were made with: a newline too many, an
    image after the text."""
    view = vlm.view(picture((50, 50)))
    said = vlm.text(vlm.chat("system", "Be brief.") + vlm.chat("user", view, "Which?")
                    + vlm.chat("assistant", open=True))
    pads = "<|image_pad|>" * view.tokens()
    assert said == ("<|im_start|>system\nBe brief.<|im_end|>\n"
                    "<|im_start|>user\n<|vision_start|>" + pads
                    + "<|vision_end|>Which?<|im_end|>\n"
                    "<|im_start|>assistant\n")

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
        # what the model writes is kept exactly
        assert view.from_source(*view.to_source(x, y)) == (x, y)
        assert all(type(v) is int for v in view.from_source(x, y))
    for x, y in [(w / 3, h / 7), (0.9 * w, h / 2)]:
        back = view.to_source(*view.from_source(x, y))          # and the source to half a step
        assert (abs(back[0] - x) <= w / sides[0] / 2 + 1e-9
                and abs(back[1] - y) <= h / sides[1] / 2 + 1e-9)
    crop = model.View(Image.new("RGB", (300, 300)), fed, convention, box=(10, 20, 110, 70))
    close(crop.to_source(*sides), [110, 70], 1e-12)
    assert crop.from_source(10, 20) == (0, 0)

def test_sizes(vlm):
    """Bug: an image fed larger than allowed or off the patch grid; a strip that no model can be fed
    ends in a traceback."""
    for size in [(1, 1), (97, 333), (2560, 1439)]:
        view = vlm.view(Image.new("RGB", size))
        vlm.encode([view])
        assert (view.fed[0] % vlm.factor == view.fed[1] % vlm.factor == 0
                and 0 < math.prod(view.fed) <= vlm.spec.max_pixels)
        assert len(view.features) == view.tokens() == math.prod(view.fed) // vlm.factor ** 2
    with pytest.raises(ValueError, match="3000 x 2 pixels"):
        vlm.view(Image.new("RGB", (3000, 2)))

def test_smallest_image():
    """Bug: Qwen3-VL was fed images far smaller than it has ever seen: 6 tokens in place of 72 for
    100 x 80 pixels."""
    vlm = model.load("tiny", quiet=True)
    vlm.factor, vlm.spec = 32, dataclasses.replace(model.MODELS["qwen3-vl-2b"], path=vlm.spec.path)
    fed = vlm.view(Image.new("RGB", (100, 80))).fed
    assert math.prod(fed) // 32 ** 2 == 72 and fed == (288, 256)
    assert model.MODELS["qwen2.5-vl-3b"].min_pixels == 56 * 56

def test_crop_does_not_bleed():
    """Bug: PIL's resize(box=...) filters over pixels beyond the box, so a crop shows what lies
    outside it."""
    source = Image.new("RGB", (100, 100))
    source.paste((255, 255, 255), (50, 0, 100, 100))
    for fed in [(50, 100), (92, 184), (28, 56)]:
        assert np.asarray(model.View(source, fed, "pixel", box=(0, 0, 50, 100)).pixels()).max() == 0

def test_encode_in_parts(vlm):
    """Bug: an image depends on those encoded with it; a view twice in the list is encoded twice;
    one with features again."""
    views = [vlm.view(picture(size, i), i) for i, size in enumerate(SIZES)]
    together = [vlm.view(picture(size, i), i) for i, size in enumerate(SIZES)]
    calls, run = [], vision.run_tower
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "run_tower",
                      lambda tower, p, grids: calls.append(len(p)) or run(tower, p, grids))
        (vlm.encode([views[0]]), vlm.encode(views + views, max_patches=70),
         vlm.encode(views), vlm.encode(together))
    patches = [math.prod(v.grid) for v in views]
    assert (sum(calls[:-1]) == sum(patches) == calls[-1]
            and len(calls) > 3
            and max(calls[:-1]) <= max(70, *patches))
    for a, b in zip(views, together):
        close(a.features, b.features, 1e-4)
        for x, y in zip(a.deep, b.deep, strict=True):
            close(x, y, 1e-4)

def test_vision_tower_is_frozen(vlm):
    """Bug: the tower trains along, and features that are kept go stale."""
    tower = set(map(id, vlm.model.model.visual.parameters()))
    trained = set(map(id, vlm.parameters()))
    assert (tower and trained and not tower & trained
            and len(tower | trained) == len(list(vlm.model.parameters())))
    assert not any(v.features.requires_grad for e in encoded(vlm, batch(vlm)) for v in e.views)

def test_views_give_their_memory_back(vlm):
    """Bug: features of thousands of traces stay; patches stay beside features; a view without
    features is not encoded again."""
    view = vlm.view(picture((100, 60)))
    vlm.patchify(view)
    patches = view.patches
    assert patches.dtype == torch.uint8 and len(patches) == math.prod(view.grid)
    vlm.encode([view])
    features, deep = view.features, view.deep
    assert view.patches is None and features is not None and len(deep) == (2 if vlm.qwen3 else 0)
    view.drop_features()
    assert view.features is None and view.deep is None
    vlm.encode([view])
    assert torch.equal(view.features, features) and all(map(torch.equal, view.deep, deep))

# -----------------------------------------------------------------------------
# loading

@pytest.mark.parametrize("plain", [True, False], ids=["plain", "prefix"])
def test_load(vlm, plain, tmp_path, capsys):
    """Bug: a saved model comes back as another one: name, settings, sizes, precision, weights,
    class; the choice is not printed."""
    from appendix import prefix
    folder = str(tmp_path / "c")
    run.replace_folder(vlm.save(folder, skills={"point": 1.0}), folder)
    back = prefix.load_vlm(folder, plain=plain, recompute=True)
    assert (type(back) is (model.VLM if plain else prefix.PrefixVLM)
            and back.recompute and not vlm.recompute)
    assert ((back.name, back.spec.window, back.spec.crop_side, back.spec.convention)
            == (vlm.name, vlm.spec.window, vlm.spec.crop_side, vlm.spec.convention))
    assert (back.spec.path == folder
            and back.spec == dataclasses.replace(vlm.spec, path=folder)
            and back.dtype == torch.float32)
    assert (model.card_of(folder)["skills"] == {"point": 1.0}
            and model.card_of(folder)["path"] == ".")
    assert (model.is_tiny(folder) == (vlm.name == "tiny")
            and model.is_tiny("tiny") and not model.is_tiny("qwen2.5-vl-3b"))
    assert all(torch.equal(a, b) for a, b in zip(back.model.parameters(), vlm.model.parameters()))
    said = capsys.readouterr().out
    assert (said.count("\n") == 1
            and f"{vlm.name}: " in said
            and "float32 (bf16 is slower on most CPUs)" in said)
    small = model.load(folder, dtype="bfloat16", max_pixels=9999, quiet=True)
    assert (small.dtype == torch.bfloat16
            and small.spec.max_pixels == 9999
            and capsys.readouterr().out == "")
    assert math.prod(small.view(Image.new("RGB", (500, 500))).fed) <= 9999

def test_load_says_what_is_wrong(vlm, tmp_path, capsys):
    """Bug: a traceback, or exit code 0, for a misspelt model or a broken checkpoint."""
    def error(name, **options):
        with pytest.raises(SystemExit) as e:
            model.load(str(name), **options)
        assert e.value.code == 2
        return capsys.readouterr().err.strip().split("\n")[-1]
    assert "unknown model 'qwen'" in error("qwen") and "qwen2.5-vl-3b" in error("qwen")
    assert "no vlm.json" in error(tmp_path)
    folder = vlm.save(str(tmp_path / "c"))
    assert "unknown device 'gpu'" in error(folder, device="gpu")
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in error(folder, device="cuda:1")
    weights = os.path.join(folder, "model.safetensors")
    with open(weights, "r+b") as f:
        f.truncate(os.path.getsize(weights) // 2)
    assert "cannot load" in error(folder)
    os.remove(weights)
    assert "cannot load" in error(folder) and folder in error(folder)
    card = run.read_json(os.path.join(folder, "vlm.json"))
    del card["window"]
    run.write_json(os.path.join(folder, "vlm.json"), card)
    assert "has no 'window'" in error(folder)

# -----------------------------------------------------------------------------
# do the tests bite? Each row puts one bug into the code; the named test must fail.

FORWARD = "model:VLM.forward"

MUTATIONS = [
    ("model:mrope", "max(h, w)", "h * w", test_positions_equal_transformers, {}),
    ("model:mrope", "torch.arange(h).repeat_interleave(w)",
     "torch.arange(h).repeat(w)", test_positions_equal_transformers, {}),
    ("model:mrope", "torch.arange(start, start + end - t)",
     "torch.arange(t, end)", test_positions_chunk_by_chunk, {}),
    (FORWARD, "views and i < len(views[0].deep)",
     "views and i + 1 < len(views[0].deep)", test_forward_equals_transformers, dict(images=3)),
    (FORWARD, "[v.deep[i] for v in views]",
     "[v.deep[0] for v in views]", test_forward_equals_transformers, dict(images=1)),
    (FORWARD, "return rms_norm(h, lm.norm)",
     "return h", test_forward_equals_transformers, dict(images=0)),
    (FORWARD, "torch.cat([v.features for v in views])",
     "torch.cat([v.features for v in views[::-1]])",
     test_forward_equals_transformers, dict(images=3)),
    (FORWARD, "self.layer(i, layer, h, rope, cache)",
     "self.layer(0, layer, h, rope, cache)", test_cached_equals_one_shot, dict(plain=True)),
    (FORWARD, "checkpoint(self.layer, i, layer, h, rope, cache, use_reentrant=False)",
     "self.layer(i, layer, h, rope, cache)", test_recomputed_layers_are_the_same, dict(plain=True)),
    ("model:rope_axes", "axes[1:3 * row:3] = 1",
     "axes[1:3 * row:3] = 2", test_forward_equals_transformers, dict(images=1)),
    ("model:rope_axes", "axes[2:3 * column:3] = 2",
     "axes[2:3 * column:3] = 1", test_forward_equals_transformers, dict(images=1)),
    ("model:rope_axes", "axes[time:time + row] = 1",
     "axes[time:time + row] = 2", test_forward_equals_transformers, dict(images=1)),
    ("model:rope_axes", "axes[time + row:] = 2",
     "axes[time + row:] = 1", test_forward_equals_transformers, dict(images=1)),
    ("model:VLM.layer", "q = rms_norm(q, attn.q_norm)",
     "pass", test_forward_equals_transformers, dict(images=0)),
    ("model:VLM.layer", "k = rms_norm(k, attn.k_norm)",
     "pass", test_forward_equals_transformers, dict(images=0)),
    ("model:KVCache.place",
     "torch.arange(self.size, device=device) <= self.slots[:, None, :, None]",
     "torch.arange(self.size, device=device)"
     " <= self.slots.max() + 0 * self.slots[:, None, :, None]",
     test_cached_equals_one_shot, dict(plain=True)),
    ("model:KVCache.place", "self.lengths[:, None] + torch.arange(n, device=device)",
     "self.size - n + 0 * self.lengths[:, None] + torch.arange(n, device=device)",
     test_cached_equals_one_shot, dict(plain=True)),
    ("model:KVCache.reserve", "F.pad(self.keys[i], (0, 0, 0, missing))",
     "F.pad(self.keys[i], (0, 0, missing, 0))", test_cached_equals_one_shot, dict(plain=True)),
    ("model:KVCache.store", "self.values[layer][rows, :, self.slots] = v",
     "self.values[layer][rows, :, self.slots] = k", test_cached_equals_one_shot, dict(plain=True)),
    ("model:KVCache.branch", "self.rows(group)",
     "self.rows(group.sort()[0])",
     test_decoding_equals_prefill, dict(plain=True, group=[2, 0, 2, 0, 1, 0])),
    ("model:VLM.decode_step", "cache.advance(live)",
     "pass", test_decoding_equals_prefill, dict(plain=True, group=[0, 0, 1, 1, 2, 2])),
    ("model:VLM.decode_step", "cache.advance(live)",
     "cache.advance(torch.ones_like(live))",
     test_decoding_equals_prefill, dict(plain=True, group=[0, 0, 1, 1, 2, 2])),
    ("model:VLM.prefill", "cache.advance(lengths)",
     "cache.advance(ids.shape[1] + 0 * lengths)", test_cached_equals_one_shot, dict(plain=True)),
    ("model:VLM.prefill", "self.pad(chunks, positions, views)",
     "self.pad(chunks, cache.lengths.tolist(), views)",
     test_cached_equals_one_shot, dict(plain=True)),
    ("model:VLM.prefill", "(lengths - 1).clamp(min=0)",
     "-1", test_cached_equals_one_shot, dict(plain=True)),
    ("model:VLM.logprobs", "h[:, :-1][sampled]",
     "h[:, 1:][sampled]", test_padded_batch_equals_singletons, dict(plain=True)),
    ("model:VLM.score_chunk", "self.logits(hidden).div_(temperature)",
     "self.logits(hidden)", test_logprobs_gradient, dict(chunk=3, plain=True)),
    ("model:VLM.score_tokens", "torch.cat(logprobs)",
     "torch.cat([logprobs[0].detach(), *logprobs[1:]])",
     test_logprobs_gradient, dict(chunk=3, plain=True)),
    ("model:VLM.score_chunk", "-logprobs.exp().mul_(logprobs).sum(-1)",
     "-logprobs.sum(-1)", test_entropy, dict(plain=True)),
    ("appendix.parts:padded_parts", "longest = max(longest, len(e.ids))",
     "longest = len(e.ids)", test_micro_batches_of_padded_rows, {}),
    ("model:VLM.logits",
     "self.model.lm_head(h).float().index_fill_(-1, self.never_sampled, -1e9)",
     "self.model.lm_head(h).float()", test_image_tokens_cannot_be_said, {}),
    ("model:VLM.ids",
     "self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)",
     "self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)",
     test_text_stays_text, {}),
    ("model:VLM.chat", "out += [self.im_end] + self.ids('\\n')",
     "out += [self.im_end]", test_chat_format, {}),
    ("appendix.vision:View.__init__", "(width / 1000, height / 1000)",
     "(width / 1000, width / 1000)",
     test_coordinates, dict(size=(97, 333), convention="thousand")),
    ("appendix.vision:View.__init__", "(width / fed[0], height / fed[1])",
     "(width / fed[1], height / fed[0])",
     test_coordinates, dict(size=(97, 333), convention="pixel")),
    ("appendix.vision:View.to_source", "self.box[1] + y * self.scale[1]",
     "y * self.scale[1]", test_coordinates, dict(size=(97, 333), convention="pixel")),
    ("appendix.vision:View.pixels",
     "self.source.crop(self.box).resize(self.fed, Image.Resampling.BICUBIC)",
     "self.source.resize(self.fed, Image.Resampling.BICUBIC, box=self.box)",
     test_crop_does_not_bleed, {}),
    ("appendix.vision:View.drop_features", "self.deep = None",
     "pass", test_views_give_their_memory_back, {}),
    ("appendix.vision:View.set_features", "self.patches = None",
     "pass", test_views_give_their_memory_back, {}),
    ("appendix.vision:encode",
     "[view for view in different.values() if view.features is None]",
     "list(different.values())", test_encode_in_parts, {}),
    ("appendix.vision:encode", "{id(view): view for view in views}",
     "dict(enumerate(views))", test_encode_in_parts, {}),
    ("appendix.vision:encode", "batch and size + n > max_patches",
     "batch and size > max_patches", test_encode_in_parts, {}),
    ("model:VLM.__init__", "self.model.model.visual.requires_grad_(False)",
     "pass", test_vision_tower_is_frozen, {}),
    ("model:load", "replace(spec, max_pixels=max_pixels or spec.max_pixels)",
     "spec", test_load, dict(plain=True)),
    ("appendix.prefix:load_vlm", "model.VLM if plain else PrefixVLM",
     "PrefixVLM", test_load, dict(plain=True)),
]

@pytest.mark.parametrize("target, old, new, test, arguments", MUTATIONS, ids=names(MUTATIONS))
def test_mutations(target, old, new, test, arguments, models, models64, tmp_path, capsys):
    """Bug: a test that no bug can turn red."""
    family = ("qwen3"
              if "deep" in old or "3 * row" in old or "3 * column" in old or "attn." in old
              else "qwen2.5")

    def again(vlm):
        """Made anew, so that a bug in __init__ has its effect."""
        return type(vlm)(vlm.model, vlm.tokenizer, vlm.processor, vlm.name, vlm.spec)

    check_mutation(target, old, new, test, arguments, {
        "vlm": lambda: again(models[family]), "vlm64": lambda: again(models64[family]),
        "tmp_path": lambda: tmp_path, "capsys": lambda: capsys})
    models[family].model.model.visual.requires_grad_(False)
