"""What the model computes: load, see, tokenise, forward, cached forward, log-probabilities. And the plumbing of a run.

Both Qwen families run through transformers' own modules; the lines that a reader wants to see are written out here: how an
image becomes tokens (`View`), how a chat becomes ids (`VLM.chat`), which positions they get (`mrope`), the forward pass
over them (`VLM.forward`), the same pass with a cache for sampling (`VLM.extend`), and the trainer's log-probabilities
(`VLM.logprobs`). The vision tower is frozen, as in both papers, so an image is encoded once and its features are reused by
every rollout of the group, every turn, the reference pass and the update.

Shapes:  B rows (episodes)   T tokens   D width   V vocabulary   S cache slots   N image tokens
"""
import argparse, base64, contextlib, dataclasses, http.client, inspect, io, json, math, os, re, shutil, sys, threading, time, typing, urllib.error, urllib.request, zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")    # rollout and update need blocks of very different sizes
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ROOT = os.path.dirname(os.path.abspath(__file__))


@dataclasses.dataclass(frozen=True)
class Spec:
    path: str               # folder or hub name
    convention: str         # how this family writes coordinates: "pixel" of the fed image, or "thousand" (0-1000 of its sides)
    max_pixels: int         # of a prompt image as fed
    window: int             # side of a zoom crop in source pixels ...
    crop: int               # ... and the side to which it is resized (ViGoRL, visual search: 364 -> 672)


MODELS = {
    "tiny": Spec(os.path.join(ROOT, "checkpoints", "tiny"), "pixel", 112 * 112, 112, 112),
    "qwen2.5-vl-3b": Spec("Qwen/Qwen2.5-VL-3B-Instruct", "pixel", 2_850_000, 364, 672),
    "qwen2.5-vl-7b": Spec("Qwen/Qwen2.5-VL-7B-Instruct", "pixel", 2_850_000, 364, 672),
    "qwen3-vl-2b": Spec("Qwen/Qwen3-VL-2B-Instruct", "thousand", 2_850_000, 364, 672),
    "qwen3-vl-4b": Spec("Qwen/Qwen3-VL-4B-Instruct", "thousand", 2_850_000, 364, 672),
    "qwen3-vl-8b": Spec("Qwen/Qwen3-VL-8B-Instruct", "thousand", 2_850_000, 364, 672),
}


# ----------------------------------------------------------------------------------------------------------------------
class View:
    """One image as the model sees it: which box of which source image, at which size, with its features once encoded.

    The only place that maps between source pixels and the coordinates that the model reads and writes: `scale` is the
    pair (sx, sy) with  source = model * scale  for a view of the whole image."""

    def __init__(self, source, fed, convention, index=0, box=None):
        self.source, self.fed, self.index = source, fed, index            # PIL, (width, height) fed, prompt image number
        self.box = box or (0, 0, *source.size)                             # source pixels
        w, h = self.box[2] - self.box[0], self.box[3] - self.box[1]
        self.scale = (w / 1000, h / 1000) if convention == "thousand" else (w / fed[0], h / fed[1])
        self.grid, self.patches = None, None                               # (1, h, w); (h * w, 3 * patch ** 2) bytes
        self.features, self.deep = None, None                              # (N, D); Qwen3-VL also [(N, D), ...]

    def to_source(self, x, y):
        return self.box[0] + x * self.scale[0], self.box[1] + y * self.scale[1]

    def from_source(self, x, y):
        """Source pixels -> the integers a model would write."""
        return round((x - self.box[0]) / self.scale[0]), round((y - self.box[1]) / self.scale[1])

    def pixels(self):
        """The fed image. Cut, then resized: resize(box=...) would let the filter read pixels beyond the crop's edge."""
        return self.source.crop(self.box).resize(self.fed, Image.Resampling.BICUBIC)

    def tokens(self, merge=2):
        return self.grid[1] * self.grid[2] // merge ** 2


class KVCache:
    """Keys and values of rows of different lengths, in preallocated (B, heads, S, head_dim) blocks. A row's tokens fill
    slots 0, 1, 2, ... without gaps, so one rule masks everything: a query at slot s sees the slots <= s. What lies beyond
    a row's length is garbage that this rule hides until it is overwritten.

    The rows of a group continue one prompt: `prompts` is the cache that holds it, once, and `group` says which of its rows.
    A new token asks both for scores, the prompt once for the whole group, and puts them through one softmax."""

    def __init__(self, layers, rows, device):
        self.keys, self.values = [None] * layers, [None] * layers
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (B,) filled slots
        self.size, self.capacity = 0, 0                                    # slots in use (at most); slots there will soon be
        self.prompts, self.group = None, None                              # KVCache of P rows; (B,) which of them

    def attend(self, layer, q, k, v):
        """q (B, Q, H, D), k, v (B, Q, heads, D) of the new tokens -> (B, Q, H, D). Stores k and v."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        for store, new in ((self.keys, k), (self.values, v)):
            old = store[layer]
            if old is None or old.shape[2] < self.size:
                store[layer] = new.new_zeros(len(k), k.shape[2], max(self.size, self.capacity), k.shape[3])
                if old is not None:
                    store[layer][:, :, :old.shape[2]] = old
            store[layer][rows, :, self.slots] = new
        k, v = self.keys[layer][:, :, :self.size], self.values[layer][:, :, :self.size]
        if self.prompts is None:
            return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, self.mask[:, None], enable_gqa=True).transpose(1, 2)
        shared_k, shared_v = self.prompts.keys[layer][:, :, :self.prompts.size], self.prompts.values[layer][:, :, :self.prompts.size]
        if q.shape[1] > 1:                                                 # an observation: enough work to pay for a copy of the prompt
            out = torch.empty_like(q)
            for p, rows in self.members.items():
                both = (torch.cat([x[p].expand(len(rows), -1, -1, -1), own[rows]], 2) for x, own in ((shared_k, k), (shared_v, v)))
                out[rows] = F.scaled_dot_product_attention(q[rows].transpose(1, 2), *both, self.mask[rows][:, None], enable_gqa=True).transpose(1, 2)
            return out
        q = q[:, 0].unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5   # (B, heads, H / heads, D)
        scores = torch.cat([self.leave(self.join(q) @ shared_k.mT), q @ k.mT], -1).float() + self.bias    # (B, heads, H / heads, P's S + S)
        shared, own = scores.softmax(-1).to(v.dtype).split([shared_k.shape[2], k.shape[2]], -1)
        return (own @ v + self.leave(self.join(shared) @ shared_v)).flatten(1, 2)[:, None]

    def join(self, x):
        """(B, heads, n, X) -> (P, heads, G * n, X): what the rows of a group ask of their prompt, side by side."""
        if not self.whole:
            x = x.new_zeros(self.seats, *x.shape[1:]).index_copy_(0, self.seat, x)
        return x.unflatten(0, (-1, self.most)).transpose(1, 2).flatten(2, 3)

    def leave(self, x):
        """The way back."""
        x = x.unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.whole else x[self.seat]

    def share(self, group):
        """A cache of empty rows that continue the rows `group` (B,) of this one, which holds prompts."""
        return KVCache(len(self.keys), len(group), self.lengths.device).seated(self, group)

    def seated(self, prompts, group):
        order = torch.arange(len(group), device=group.device)
        seat = ((group[:, None] == group) & (order[:, None] > order)).sum(1)         # (B,) how many of its group stand before a row
        self.prompts, self.group, self.most = prompts, group, int(seat.max()) + 1              # G: rows in the largest group
        self.members = {p: (group == p).nonzero()[:, 0] for p in group.unique().tolist()}
        self.seats, self.seat = len(prompts.lengths) * self.most, group * self.most + seat     # P * G, and (B,) a row's among them
        self.whole = len(group) == self.seats and torch.equal(self.seat, order)
        return self

    def place(self, n):
        """Where the next n tokens of every row go, and what they see of their prompt and of their row."""
        slots = lambda size: torch.arange(size, device=self.lengths.device)
        self.slots = self.lengths[:, None] + slots(n)                      # (B, n)
        self.mask = slots(self.size) <= self.slots[:, :, None]             # (B, n, S)
        if self.prompts:
            prompt = slots(self.prompts.size) < self.prompts.lengths[self.group, None]
            self.mask = torch.cat([prompt[:, None].expand(-1, n, -1), self.mask], 2)                      # (B, n, P's S + S)
        self.bias = ~self.mask[:, None] * -1e9 if n == 1 else None         # (B, 1, 1, P's S + S)

    def reserve(self, n):
        """Before n calls of `decode`: the one time that the device is asked how long the rows are."""
        self.size = int(self.lengths.max())
        self.capacity = self.size + n

    def rows(self, index):
        """The cache of the given rows."""
        new = KVCache(len(self.keys), 0, self.lengths.device)
        pick = lambda stores: [x if x is None else x[index] for x in stores]         # None: no row has written a token yet
        new.keys, new.values = pick(self.keys), pick(self.values)
        new.lengths, new.size, new.capacity = self.lengths[index], self.size, self.capacity
        if self.prompts is None:
            return new
        used, group = self.group[index].unique(return_inverse=True)
        return new.seated(self.prompts if len(used) == len(self.prompts.lengths) else self.prompts.rows(used), group)

    def keep(self, row):
        """What a row holds beyond its prompt, copied: [(keys, values)] per layer, (heads, n, head_dim) each."""
        n = int(self.lengths[row])
        return [(k[row, :, :n].clone(), v[row, :, :n].clone()) for k, v in zip(self.keys, self.values)]

    def resume(self, kept, group):
        """`share(group)` with rows that are not empty: each begins with what `keep` gave (None: with nothing)."""
        new = self.share(group)
        lengths = [k[0][0].shape[1] if k else 0 for k in kept]
        new.lengths, new.size = torch.tensor(lengths, device=group.device), max(lengths)
        for i in range(len(self.keys) if new.size else 0):
            for store, own, j in ((new.keys, self.keys[i], 0), (new.values, self.values[i], 1)):
                store[i] = own.new_zeros(len(kept), own.shape[1], new.size, own.shape[3])
                for b, k in enumerate(kept):
                    store[i][b, :, :lengths[b]] = k[i][j] if k else 0
        return new


class Packed:
    """Episodes to train on, as one row without padding: a group's prompt once, its continuations behind it, then the next group.
    All of a layer works token by token and does not mind; attention alone must know which tokens see which.

    groups: [(tokens of the prompt, [tokens of each continuation])]. An episode by itself is all prompt: (its tokens, [])."""

    def __init__(self, groups, device):
        self.groups, self.sizes = groups, [n for prompt, tails in groups for n in (prompt, sum(tails))]
        at = [[b * max(tails) + t for b, n in enumerate(tails) for t in range(n)] for _, tails in groups]
        self.at = [torch.tensor(x, dtype=torch.long, device=device) for x in at]        # where a continuation's tokens stand among padded rows

    def attend(self, layer, q, k, v):
        """q (1, N, H, D), k, v (1, N, heads, D) -> (1, N, H, D). A prompt sees itself, a continuation sees the prompt and itself."""
        out, parts = [], zip(*(x[0].split(self.sizes) for x in (q, k, v)))
        for (_, tails), at in zip(self.groups, self.at):
            q, k, v = (x[None].transpose(1, 2) for x in next(parts))       # (1, heads, S, D)
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
            behind, G = next(parts), len(tails)
            if tails:
                q, own_k, own_v = (x.new_zeros(G * max(tails), *x.shape[1:]).index_copy(0, at, x).unflatten(0, (G, -1)).transpose(1, 2)
                                   for x in behind)                        # (G, heads, T, D)
                k, v = (torch.cat([x.expand(G, -1, -1, -1), own], 2) for x, own in ((k, own_k), (v, own_v)))         # (G, heads, S + T, D)
                x = F.scaled_dot_product_attention(q, k, v, causal_lower_right(q.shape[2], k.shape[2]), enable_gqa=True).transpose(1, 2)
                out.append(x.flatten(0, 1).index_select(0, at))            # the padding goes
        return torch.cat(out)[None]


def mrope(ids, grids, image_token, start=0, merge=2):
    """Multimodal rotary positions (Qwen2-VL, arXiv 2409.12191, section 2.1): a text token at p has (p, p, p); the patches
    of an image that begins at p have (p, p + row, p + column); text goes on after the largest position used.

    ids: list of T token ids, grids: the (1, h, w) of the images in them. -> positions (3, T), the next free position.
    Works chunk by chunk: the second return value is the `start` of the next chunk."""
    out, t = torch.empty(3, len(ids), dtype=torch.long), 0
    for grid in [*grids, None]:                                            # the text before each image, and the image; the text after them
        end = ids.index(image_token, t) if grid else len(ids)
        out[:, t:end] = torch.arange(start, start + end - t)
        t, start = end, start + end - t
        if grid:
            h, w = grid[1] // merge, grid[2] // merge
            out[0, t:t + h * w] = start
            out[1, t:t + h * w] = start + torch.arange(h).repeat_interleave(w)
            out[2, t:t + h * w] = start + torch.arange(w).repeat(h)
            t, start = t + h * w, start + max(h, w)
    return out, start


def rotate(x, cos, sin):
    """Rotary embedding: the pairs (a, b) = (x[i], x[i + D / 2]) turned by their angles: (a cos - b sin, b cos + a sin).
    x (B, T, heads, D); cos and sin (B, T, 1, D), those of the second half repeat the first's; sin of the first half with a minus."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


# ----------------------------------------------------------------------------------------------------------------------
class VLM:
    """A vision-language model, its tokenizer and its image processor, behind one small surface."""

    def __init__(self, model, tokenizer, processor, name, spec):
        self.model, self.tokenizer, self.processor, self.name, self.spec = model.eval(), tokenizer, processor, name, spec
        self.device, self.dtype = model.device, model.dtype
        self.im_start, self.im_end, self.image_token, self.vision_start, self.vision_end = tokenizer.convert_tokens_to_ids(
            ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
        self.unsayable = torch.tensor([self.image_token, self.vision_start, self.vision_end], device=self.device)
        t, row, column = model.config.text_config.rope_parameters["mrope_section"]
        axis = torch.zeros(t + row + column, dtype=torch.long)             # which position turns each rotary frequency
        if spec.convention == "thousand":                                  # Qwen3-VL: interleaved
            axis[1:3 * row:3], axis[2:3 * column:3] = 1, 2
        else:
            axis[t:t + row], axis[t + row:] = 1, 2
        self.axis = axis.to(self.device)
        self.factor = processor.patch_size * processor.merge_size          # fed sides are multiples of this
        self.max_pixels, self._text_ids = spec.max_pixels, {}
        self.recompute = False                                             # layers in the backward pass: gradient checkpointing
        self.work = {"tokens": 0, "patches": 0}                            # run so far: by `extend`, by the vision tower
        self.model.requires_grad_(True)
        self.model.model.visual.requires_grad_(False)                      # tower and merger, as in both papers

    @property
    def toy_side(self):
        """Pixels of a toy scene: four times what is fed, so that the shrunken overview hides the patterns for every model."""
        return 4 * int(self.max_pixels ** 0.5) // self.factor * self.factor

    # ---- see
    def view(self, source, index=0, box=None, fed=None):
        """PIL image -> View, at most max_pixels large unless `fed` gives the size; sides are multiples of `factor`."""
        if fed is None:
            try:
                h, w = smart_resize(source.height, source.width, self.factor, 4 * self.factor ** 2, self.max_pixels)
            except ValueError as e:
                raise ValueError(f"an image of {source.width} x {source.height} pixels cannot be fed: {e}") from None
            fed = (w, h)
        v = View(source, fed, self.spec.convention, index, box)
        v.grid = (1, fed[1] // self.processor.patch_size, fed[0] // self.processor.patch_size)
        return v

    def patchify(self, view, pixels=None):
        """Cut into patches, those that are merged into one token side by side. Sets view.patches."""
        x = torch.frombuffer(bytearray((pixels or view.pixels()).convert("RGB").tobytes()), dtype=torch.uint8)
        p, m, (_, h, w) = self.processor.patch_size, self.processor.merge_size, view.grid
        view.patches = x.view(h // m, m, p, w // m, m, p, 3).permute(0, 3, 1, 4, 6, 2, 5).reshape(h * w, -1)

    def pixel_values(self, patches):
        """(n, 3 * patch ** 2) bytes -> (n, 3 * 2 * patch ** 2) normalised: the tower takes pairs of video frames, so an image comes twice."""
        mean, std = (torch.tensor(x, dtype=torch.float32, device=self.device)[:, None, None] for x in (self.processor.image_mean, self.processor.image_std))
        x = patches.to(self.device).unflatten(1, (3, 1, -1)).to(torch.float32).div_(255).sub_(mean).div_(std)
        return x.to(self.dtype).expand(-1, -1, self.processor.temporal_patch_size, -1).flatten(1)

    def encode(self, views, grad=False, max_patches=65536):
        """Run the vision tower on the views that have no features yet, a bounded number of patches at a time."""
        todo = [v for v in {id(v): v for v in views}.values() if v.features is None]
        self.work["patches"] += sum(math.prod(v.grid) for v in todo)
        while todo:
            batch, n = [], 0
            while todo and (not batch or n + math.prod(todo[0].grid) <= max_patches):
                batch.append(todo.pop(0))
                n += math.prod(batch[-1].grid)
            new = [v for v in batch if v.patches is None]
            with ThreadPoolExecutor() as pool:                             # resizing takes long, and no lock
                for v, pixels in zip(new, pool.map(View.pixels, new)):
                    self.patchify(v, pixels)
            with torch.set_grad_enabled(grad):
                out = self.model.model.get_image_features(self.pixel_values(torch.cat([v.patches for v in batch])),
                                                          torch.tensor([v.grid for v in batch]).to(self.device), return_dict=True)
            deep = getattr(out, "deepstack_features", None) or []
            if deep and torch.is_tensor(deep[0]):                          # transformers 5.17 leaves these in one piece
                deep = [d.split([v.tokens() for v in batch]) for d in deep]
            for i, v in enumerate(batch):
                v.features, v.deep, v.patches = out.pooler_output[i], [layer[i] for layer in deep], None

    # ---- read and write
    def ids(self, text):
        """Text -> ids. Special tokens in the text stay text: a question cannot end the turn that quotes it."""
        if text not in self._text_ids:
            if len(self._text_ids) > 10_000:
                self._text_ids.clear()
            self._text_ids[text] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return self._text_ids[text]

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def chat(self, role, *parts, open=False):
        """One ChatML message as ids. parts: text or View. open: leave the message open for the model to go on."""
        out = [self.im_start] + self.ids(role + "\n")
        for p in parts:
            out += [self.vision_start] + [self.image_token] * p.tokens() + [self.vision_end] if isinstance(p, View) else self.ids(p)
        return out if open else out + [self.im_end] + self.ids("\n")

    # ---- compute
    def layer(self, i, layer, h, rope, cache):
        """One decoder layer, by hand with transformers' weights: attention and gated MLP, each behind an RMS norm and added."""
        norm = lambda x, m: F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
        a, x = layer.self_attn, norm(h, layer.input_layernorm)
        q, k, v = (proj(x).unflatten(-1, (-1, a.head_dim)) for proj in (a.q_proj, a.k_proj, a.v_proj))    # (B, T, heads, D)
        if hasattr(a, "q_norm"):                                           # Qwen3
            q, k = norm(q, a.q_norm), norm(k, a.k_norm)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is None:
            x = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            x = cache.attend(i, q, k, v)
        h = h + a.o_proj(x.flatten(2))
        x = norm(h, layer.post_attention_layernorm)
        return h + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))

    def forward(self, ids, positions, views, cache=None):
        """ids (B, T), positions (3, B, T), views of all rows in reading order -> hidden states (B, T, D).
        Causal: rows are padded on the right, where no token that counts can see the padding."""
        lm = self.model.model.language_model
        h = lm.embed_tokens(ids)                                           # (B, T, D)
        at = ids == self.image_token                                       # (B, T)
        if views:
            h = h.masked_scatter(at[..., None], torch.cat([v.features for v in views]).to(h.dtype))
        # Each of the D / 2 frequencies turns with one of a token's three positions.
        angle = positions.float()[self.axis].permute(1, 2, 0)[:, :, None] * lm.rotary_emb.inv_freq        # (B, T, 1, D / 2)
        cos, sin = angle.cos().to(h.dtype), angle.sin().to(h.dtype)
        rope = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        run = partial(checkpoint, self.layer, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else self.layer
        for i, layer in enumerate(lm.layers):
            h = run(i, layer, h, rope, cache)
            if views and i < len(views[0].deep):                           # Qwen3-VL: deeper vision features join early layers
                h = h + torch.zeros_like(h).masked_scatter(at[..., None], torch.cat([v.deep[i] for v in views]).to(h.dtype))
        return F.rms_norm(h, h.shape[-1:], lm.norm.weight, lm.norm.variance_epsilon)

    @torch.no_grad()
    def extend(self, cache, chunks, starts, views=()):
        """Append a chunk of tokens to every row of the cache (the prompt, an observation).

        chunks: B lists of ids, of any lengths; starts: B next positions; views: those in the chunks, row by row.
        -> logits after each row's last token (B, V), the B positions that follow. Nothing already cached is recomputed."""
        self.encode(views)
        self.work["tokens"] += sum(map(len, chunks))
        B, Q, grids = len(chunks), max(map(len, chunks)), iter(views)
        ids = torch.zeros(B, Q, dtype=torch.long)
        positions, after = torch.zeros(3, B, Q, dtype=torch.long), []
        for b, c in enumerate(chunks):
            ids[b, :len(c)] = torch.tensor(c)
            p, end = mrope(c, [next(grids).grid for _ in range(c.count(self.vision_start))], self.image_token, starts[b])
            positions[:, b, :len(c)] = p
            after.append(end)
        n = torch.tensor([len(c) for c in chunks], device=self.device)     # (B,) a row with an empty chunk stays as it is
        cache.size = int(cache.lengths.max()) + Q
        cache.place(Q)
        h = self.forward(ids.to(self.device), positions.to(self.device), list(views), cache)
        cache.lengths = cache.lengths + n
        last = h[torch.arange(B, device=self.device), (n - 1).clamp(min=0)]                               # (B, D)
        return self.logits(last), after

    @torch.inference_mode()
    def decode(self, cache, tokens, positions, live):
        """One token for every row: tokens, positions, live (B,), all on the device, which is never waited for. A row that is
        not live stays as it is. `cache.reserve` comes first. -> logits (B, V)"""
        cache.size = min(cache.size + 1, cache.capacity)
        cache.place(1)
        h = self.forward(tokens[:, None], positions.expand(3, -1)[:, :, None], [], cache)
        cache.lengths += live
        return self.logits(h[:, 0])

    def graph(self, cache, rows):
        """`decode` as a CUDA graph: one step is hundreds of small kernels, which take longer to launch than to run.
        -> step(tokens, positions, live), with decode's result. Captured for each turn anew, since the cache has moved."""
        cache.size, lengths = cache.capacity, cache.lengths.clone()        # shapes are fixed: all that is reserved is attended to
        static, side = [torch.zeros(rows, dtype=torch.long, device=self.device) for _ in range(3)], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):                                             # what is set up on first use must not be captured
                self.decode(cache, *static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.decode(cache, *static)
        cache.lengths.copy_(lengths)

        def step(*inputs):
            for buffer, new in zip(static, inputs):
                buffer.copy_(new)
            graph.replay()
            return logits

        return step

    def logits(self, h):
        """Hidden states -> logits in fp32. The policy cannot say an image token, in sampling and training alike: one written
        in a turn would claim features that no image has."""
        return self.model.lm_head(h).float().index_fill_(-1, self.unsayable, -1e9)

    def new_cache(self, rows):
        return KVCache(len(self.model.model.language_model.layers), rows, self.device)

    def shared(self, episodes):
        """Which episodes continue the same prompt (the ids before anything was sampled, with the very same views)?
        -> [(tokens of the prompt, the indices of its episodes)]; an episode that shares with no other is all prompt."""
        groups = {}
        for b, e in enumerate(episodes):
            n = e.sampled.index(True) if True in e.sampled else len(e.ids)
            views = e.views[:e.ids[:n].count(self.vision_start)]
            groups.setdefault((tuple(e.ids[:n]), *map(id, views)), []).append(b)
        return [(len(key[0]) if len(members) > 1 else len(episodes[members[0]].ids), members) for key, members in groups.items()]

    def micro_batches(self, episodes, tokens=4096):
        """Split into parts of at most `tokens` tokens as logprobs packs them, groups together; an episode that is longer is a part
        by itself. A memory knob: gradients do not change."""
        parts, room = [], 0
        for n, members in self.shared(episodes):
            prompt = n                                                     # to be paid by its first episode in a part
            for b in members:
                tail = len(episodes[b].ids) - n
                if not parts or prompt + tail > room:
                    parts, room, prompt = parts + [[]], tokens, n
                parts[-1].append(episodes[b])
                room, prompt = room - prompt - tail, 0
        return parts

    def pack(self, episodes, groups):
        """groups: see `shared` -> ids (1, N), positions (3, 1, N), views, all in the order of a `Packed` row; its groups; and for the
        M sampled tokens, episode by episode, where each stands in the row and where the token stands that predicts it (M,)."""
        ids, positions, views, sizes, at = [], [], [], [], {}
        for n, members in groups:
            prompt, seen = len(ids), episodes[members[0]].ids[:n].count(self.vision_start)                # where it begins, its views
            sizes.append((n, [len(episodes[b].ids) - n for b in members] if len(members) > 1 else []))
            for b in members:
                e = episodes[b]
                p = mrope(e.ids, [v.grid for v in e.views], self.image_token)[0]
                if b == members[0]:
                    ids, views, positions = ids + e.ids[:n], views + e.views[:seen], positions + [p[:, :n]]
                where = [*range(prompt, prompt + n), *range(len(ids), len(ids) + len(e.ids) - n)]         # of this episode's tokens
                at[b] = [(where[t], where[t - 1]) for t, on in enumerate(e.sampled) if on]
                ids, views, positions = ids + e.ids[n:], views + e.views[seen:], positions + [p[:, n:]]
        target, before = torch.tensor([pair for b in range(len(episodes)) for pair in at[b]], dtype=torch.long).view(-1, 2).T
        return torch.tensor([ids]), torch.cat(positions, 1)[:, None], views, sizes, target, before

    def logprobs(self, episodes, temperature=1.0, chunk=1024, share=True):
        """The trainer's log-probabilities of what was sampled, in one pass over whole episodes.

        -> logprobs (B, T), entropy (B, T), mask (B, T): at [b, t] for token t of episode b, zero and False where the
        policy did not choose the token. A prompt that several episodes continue is computed once (`Packed`); share=False computes
        every episode by itself, to the same result. Only sampled positions meet the vocabulary, `chunk` at a time and recomputed
        in the backward pass: the full logits of one ViGoRL step would be hundreds of gigabytes."""
        self.encode([v for e in episodes for v in e.views])
        alone = [(len(e.ids), [b]) for b, e in enumerate(episodes)]
        ids, positions, views, groups, target, before = self.pack(episodes, self.shared(episodes) if share else alone)
        h = self.forward(ids.to(self.device), positions.to(self.device), views, Packed(groups, self.device))[0]        # (N, D)
        mask = pad_sequence([torch.tensor(e.sampled) for e in episodes], batch_first=True).to(self.device)              # (B, T)
        h, target = h[before.to(self.device)], ids[0, target].to(self.device)                            # (M, D), (M,)

        def head(h, target):
            logp = F.log_softmax(self.logits(h).div_(temperature), -1)                                    # (m, V)
            with torch.no_grad():
                entropy = -logp.exp().mul_(logp).sum(-1)
            return logp.gather(1, target[:, None])[:, 0], entropy

        out = [checkpoint(head, a, b, use_reentrant=False) if torch.is_grad_enabled() else head(a, b)
               for a, b in zip(h.split(chunk), target.split(chunk))]
        dense = lambda values: torch.zeros(mask.shape, device=self.device).masked_scatter(mask, torch.cat(values))
        return dense([o[0] for o in out]), dense([o[1] for o in out]), mask

    def parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def save(self, folder, **card):
        """A checkpoint that transformers can read too: safetensors, tokenizer, processor, and vlm.json (which model this
        is and how it writes coordinates). Written aside and renamed: a folder of this name is always whole."""
        tmp = folder.rstrip("/") + ".tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        for part in (self.model, self.tokenizer, self.processor):
            part.save_pretrained(tmp)
        write_json(os.path.join(tmp, "vlm.json"), {"name": self.name, **dataclasses.asdict(self.spec), "path": ".", **card})
        return tmp


def replace_folder(tmp, folder):
    """Rename tmp to folder, so that a crash leaves the old one or the new one, never half of one. Between two renames the old
    one is called folder.old: `settle` finds it."""
    old = folder.rstrip("/") + ".old"
    if os.path.exists(folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(tmp, folder)
    shutil.rmtree(old, ignore_errors=True)


def settle(folder):
    """Before a folder is read again: if a crash came between the two renames, the old one gets its name back."""
    old = folder.rstrip("/") + ".old"
    if rank() == 0 and not os.path.exists(folder) and os.path.exists(old):
        os.rename(old, folder)
    meet()


def load(name, device="auto", dtype="auto", max_pixels=0, quiet=False):
    """A name of MODELS, or a checkpoint folder -> VLM. Calls fail() with one clear line when that cannot work."""
    folder = name if os.path.isdir(name) else None
    if name in MODELS:
        folder, spec = None, MODELS[name]
    elif folder and os.path.exists(os.path.join(folder, "vlm.json")):
        card = card_of(folder)
        name, spec = card["name"], Spec(**{k.name: card[k.name] for k in dataclasses.fields(Spec)} | {"path": folder})
    elif folder:
        fail(f"{folder} is no checkpoint of this project: it has no vlm.json")
    else:
        fail(f"unknown model {name!r}; expected one of {', '.join(MODELS)} or a checkpoint folder")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        fail(f"unknown device {device!r}; expected cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        fail(f"device {device}: torch sees no CUDA GPU here")
    asked = dtype != "auto"
    dtype = (torch.bfloat16 if device.startswith("cuda") and name != "tiny" else torch.float32) if dtype == "auto" else getattr(torch, dtype)
    try:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(spec.path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
        if info["missing_keys"]:                                           # they would be drawn at random, in silence
            raise ValueError(f"the file has no weights {', '.join(sorted(info['missing_keys']))}")
        model = model.to(device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(spec.path)
        processor = Qwen2VLImageProcessorPil.from_pretrained(spec.path)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
        fail(f"cannot load {name} from {spec.path}: {' '.join(str(e).split())[:300]}"
             + ("" if os.path.isdir(spec.path) else "; its weights come from the Hugging Face hub, which needs a network or a filled cache (HF_HOME)"))
    for p in model.parameters():                                           # out of the file's mapped pages, where a matrix may begin at
        p.data = p.data.clone()                                            # any byte, which shows in the last bit of CPU products
    vlm = VLM(model, tokenizer, processor, name, dataclasses.replace(spec, max_pixels=max_pixels or spec.max_pixels))
    if not quiet:
        why = ("asked for" if asked else "the GPU's tensor cores want it" if dtype == torch.bfloat16 else "bf16 is slower on most CPUs"
               if device == "cpu" else "it is small")
        n = sum(p.numel() for p in model.parameters())
        print(f"{name}: {n / 1e6:.2f} M parameters ({sum(p.numel() for p in vlm.parameters()) / 1e6:.2f} M trained, vision tower frozen), "
              f"{str(dtype)[6:]} ({why}), attention sdpa, on {torch.cuda.get_device_name() if device.startswith('cuda') else f'{torch.get_num_threads()} CPU threads'}")
    return vlm


def card_of(folder):
    """vlm.json of a checkpoint folder: which model this is and how it writes coordinates."""
    return read_json(os.path.join(folder, "vlm.json"), "name", *(f.name for f in dataclasses.fields(Spec)))


def is_tiny(name):
    """Is this name, or this checkpoint folder, the tiny model?"""
    return name == "tiny" or os.path.exists(os.path.join(name, "vlm.json")) and card_of(name)["name"] == "tiny"


TINY_THETA = 30.0
TINY = dict(hidden=128, layers=3, heads=4, kv_heads=2, mlp=384, vocab=640, vision=64, vision_layers=2, vision_mlp=128, vision_heads=4)


def make_tiny(texts, phrases, seed=0):
    """The tiny model from nothing: the Qwen2.5-VL architecture at a thousandth of its size, and its own tokenizer.

    texts: a corpus for the byte-level BPE. phrases: strings that never vary (prompts, tags, the tool call's JSON) become
    one token each, so that a small model's steps go to what does vary; digits are always single tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r", | ?\(|\)[.,]?|\p{N}| ?\p{L}+|\n| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=TINY["vocab"] - len(special) - len(phrases), show_progress=False,
                                                       initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    bpe.add_tokens([AddedToken(p, normalized=False) for p in sorted(phrases, key=len, reverse=True)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                                     clean_up_tokenization_spaces=False, extra_special_tokens=special[1:])
    of = dict(zip(special, tokenizer.convert_tokens_to_ids(special)))
    t, rope = TINY, {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": TINY_THETA}
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=t["hidden"], intermediate_size=t["mlp"], num_hidden_layers=t["layers"],
                         num_attention_heads=t["heads"], num_key_value_heads=t["kv_heads"], rope_parameters=rope, tie_word_embeddings=True,
                         max_position_embeddings=4096, bos_token_id=None, eos_token_id=of["<|im_end|>"], pad_token_id=of["<|endoftext|>"]),
        vision_config=dict(depth=t["vision_layers"], hidden_size=t["vision"], intermediate_size=t["vision_mlp"], num_heads=t["vision_heads"],
                           out_hidden_size=t["hidden"], patch_size=14, window_size=112, fullatt_block_indexes=list(range(t["vision_layers"]))),
        image_token_id=of["<|image_pad|>"], video_token_id=of["<|video_pad|>"], vision_start_token_id=of["<|vision_start|>"],
        vision_end_token_id=of["<|vision_end|>"], tie_word_embeddings=True)
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for name, p in model.named_parameters():                               # transformers' 0.02 hardly starts at this width
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28 ** 2, "longest_edge": MODELS["tiny"].max_pixels})
    return VLM(model, tokenizer, processor, "tiny", MODELS["tiny"])


# ----------------------------------------------------------------------------------------------------------------------
class AdamW:
    """torch's AdamW on fp32 masters. A bf16 weight near 1 cannot move by less than 0.4 %: an RL step of 1e-6 would be
    rounded away every time. The master keeps the sum; the bf16 copy follows when it has moved far enough. Gradients are summed
    in fp32 too, over micro-batches and ranks. offload: masters and moments (12 bytes per parameter) live on the CPU, which
    updates them: the gradient goes down and the weights come up once per step (as in ZeRO-Offload, arXiv 2101.06840)."""

    def __init__(self, params, lr, betas=(0.9, 0.999), weight_decay=0.01, scale=None, offload=False):
        self.params = list(params)
        home = lambda p: "cpu" if offload else p.device
        self.masters = [p if p.dtype == torch.float32 and not offload else p.detach().to(home(p)).float().clone() for p in self.params]
        for p in self.params:
            p.grad_dtype = torch.float32 if p.dtype == torch.bfloat16 else p.dtype
        groups = [{"params": [m], "scale": scale(m)} for m in self.masters] if scale else [{"params": self.masters, "scale": 1.0}]
        self.opt = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    def step(self, lr, clip=1.0):
        """Add the ranks' gradients up, clip the global norm, update, clear the gradients. -> the norm before clipping. A
        non-finite gradient is not applied (the caller sees the norm and counts it)."""
        add_gradients(self.params)
        norm = torch.nn.utils.clip_grad_norm_(self.params, clip).item()
        for group in self.opt.param_groups:
            group["lr"] = lr * group["scale"]
        if math.isfinite(norm):
            for p, m in zip(self.params, self.masters):
                m.grad = p.grad if p.grad is None else p.grad.to(m.device)
            self.opt.step()
            with torch.no_grad():
                for p, m in zip(self.params, self.masters):
                    if m is not p:
                        p.copy_(m)
        for p in self.params + self.masters:
            p.grad = None
        return norm

    def tensors(self):
        """The state as one flat dict of tensors (safetensors holds no objects)."""
        out = {f"{i}.master": m for i, m in enumerate(self.masters) if m is not self.params[i]}
        return out | {f"{i}.{k}": v for i, m in enumerate(self.masters) for k, v in self.opt.state[m].items()}

    def load_tensors(self, state):
        for key, value in state.items():
            i, k = key.split(".")
            m = self.masters[int(i)]
            if k == "master":
                m.data.copy_(value)
            else:
                self.opt.state[m][k] = value.to(m.device)                 # "step" too: the fused update reads it there


def save_checkpoint(folder, vlm, optimizer, state):
    """Everything a run needs to go on: weights, optimizer, RNG, and `state` (JSON: step, config, ...)."""
    if rank():
        return
    tmp = vlm.save(folder)
    save_file({k: v.contiguous() for k, v in optimizer.tensors().items()}, os.path.join(tmp, "optimizer.safetensors"))
    save_file({"torch": torch.get_rng_state()}, os.path.join(tmp, "rng.safetensors"))
    write_json(os.path.join(tmp, "state.json"), state)
    replace_folder(tmp, folder)


def load_checkpoint(folder, optimizer):
    """Restores optimizer and RNG (the weights come through `load`) -> state."""
    try:
        optimizer.load_tensors(load_file(os.path.join(folder, "optimizer.safetensors")))
        torch.set_rng_state(load_file(os.path.join(folder, "rng.safetensors"))["torch"])
        return json.load(open(os.path.join(folder, "state.json")))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as e:
        fail(f"{folder} is no checkpoint that training can resume from: {' '.join(str(e).split())[:200]}")


# ----------------------------------------------------------------------------------------------------------------------
# Memory

def memory_plan(vlm, micro_tokens, cache_tokens, recompute=False, offload=False, reference=False, chunk=1024):
    """What a run will need -> {part: bytes}, and under "peak" those on the device at the worst moment: the rollout holds the
    cache, the update holds gradients and activations, never both. Counted from shapes (a model on the meta device will do)."""
    t, size = vlm.model.config.text_config, vlm.dtype.itemsize
    parameters, trained = sum(p.numel() for p in vlm.model.parameters()), sum(p.numel() for p in vlm.parameters())
    kv = t.num_key_value_heads * vlm.model.model.language_model.layers[0].self_attn.head_dim
    layer = (6 * t.hidden_size + 4 * kv + 4 * t.intermediate_size) * size  # kept by a layer for its backward pass, per token
    kept = (t.num_hidden_layers + 2) * t.hidden_size * size + 2 * layer if recompute else t.num_hidden_layers * layer
    plan = {"weights": parameters * size * (1 + reference),
            "optimizer": trained * (8 if size == 4 and not offload else 12),                              # two moments, fp32 master
            "gradients": trained * 4,
            "cache": 2 * cache_tokens * t.num_hidden_layers * 2 * kv * size,                              # old and new when rows leave
            "activations": micro_tokens * kept,
            "logits": 4 * chunk * t.vocab_size * 4}
    return plan | {"peak": plan["weights"] + plan["optimizer"] * (not offload)
                   + max(plan["cache"], plan["gradients"] + plan["activations"] + plan["logits"])}


KNOBS = {"activations": "--recompute, then a smaller --micro-tokens (the gradient stays the same)", "cache": "a smaller --max-batch-tokens (the episodes stay the same)",
         "optimizer": "--offload (to the CPU)", "weights": "--kl-coef 0 (no reference), a smaller model"}


def print_plan(plan, offload):
    print("memory plan, GB" + "".join(f"\n  {part:12s}{n / 1e9:6.1f}  {'on the CPU' if offload and part == 'optimizer' else KNOBS.get(part, '')}".rstrip()
                                      for part, n in plan.items()))


def peak_memory():
    """Bytes at most so far: of the GPU's memory, or of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource                                                        # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answer_out_of_memory(error, knobs):
    """Ends the program with what to turn, in order; any other error goes on as it came."""
    if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
        raise error
    fail(f"out of memory ({' '.join(str(error).split())[:160]}). Turn, in this order: {knobs}")


# ----------------------------------------------------------------------------------------------------------------------
class Endpoint:
    """A model behind an address (an OpenAI-compatible server). Replies cost money: each is written to `log` when it comes, and never
    asked for again. who: it is, in messages; model: empty: the server's first; error: the class of what a request that fails for good raises."""

    def __init__(self, who, url, model="", error=RuntimeError, log="", max_tokens=1024, timeout=120.0, retries=4):
        self.who, self.url, self.error, self.log, self.max_tokens, self.timeout, self.retries = who, url.rstrip("/"), error, log, max_tokens, timeout, retries
        self.lock, self.said = threading.Lock(), {}
        if log and os.path.exists(log):
            cut_torn_line(log)
            try:
                with open(log, encoding="utf-8") as f:
                    self.said = {row["key"]: row["text"] for row in map(json.loads, f)}
            except (ValueError, KeyError, TypeError) as e:
                raise error(f"{log} holds a line that is no reply of a {who} ({type(e).__name__}: {e})") from None
        self.model = model or self.get("/models", lambda r: r["data"][0]["id"])

    def ask(self, jobs, temperature, workers=8):
        """[(key, views, text)] -> replies in the order of the jobs. The first request that fails for good stops all."""
        def one(job):
            key, views, text = job
            key = f"{self.model}/{key}/{zlib.crc32(text.encode()):08x}"
            if key not in self.said:
                content = [{"type": "image_url", "image_url": {"url": png(v.pixels())}} for v in views] + [{"type": "text", "text": text}]
                said = self.get("/chat/completions", lambda r: check_text(r["choices"][0]["message"]["content"]), {
                    "model": self.model, "messages": [{"role": "user", "content": content}], "temperature": temperature, "max_tokens": self.max_tokens})
                with self.lock:
                    self.said[key] = said
                    if self.log:
                        with open(self.log, "a") as f:
                            f.write(json.dumps({"key": key, "text": said}) + "\n")
            return self.said[key]

        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(one, job) for job in jobs]
            try:
                return [f.result() for f in tqdm(futures, desc=self.who, unit=" replies", disable=None)]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)              # what is under way is still paid for, and kept
                raise

    def get(self, path, read, body=None):
        """POST body (GET without) -> read(the reply's JSON). Tries again, ever later, what may pass: no connection, time-outs, 429,
        5xx, replies that are cut off or no JSON of the right shape. Anything else, 401 say, is final at once."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2 ** attempt, 20))
            try:
                request = urllib.request.Request(self.url + path, json.dumps(body).encode() if body else None, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return read(json.loads(reply.read(1 << 24)))
            except urllib.error.HTTPError as e:
                fault = f"HTTP {e.code} {e.reason}"
                with contextlib.suppress(OSError, http.client.HTTPException):
                    fault += ": " + e.read(300).decode(errors="replace")
                if e.code not in (408, 409, 429) and e.code < 500:
                    break
            except (OSError, http.client.HTTPException) as e:              # refused, reset, timed out, cut off
                fault = f"{type(e).__name__}: {e}"
            except (ValueError, KeyError, IndexError, TypeError) as e:
                fault = f"a reply that is not what was asked for ({type(e).__name__}: {e})"
        raise self.error(f"{self.who} at {self.url}{path}: {' '.join(fault.split())[:300]} (tried {attempt + 1} times; replies so far are kept)")


def check_text(text):
    if not isinstance(text, str):
        raise ValueError(f"its content is {text!r:.40}")
    return text


def png(image):
    image.save(buffer := io.BytesIO(), "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ----------------------------------------------------------------------------------------------------------------------
# Ranks. `torchrun --nproc-per-node N train_rl.py` starts the same script N times; each process takes its share of the prompts.
# The model is not wrapped, because it samples too: gradients are added up by hand, once per step, when all are there.

def start_ranks():
    """Under torchrun: join the others, each on a GPU of its own. Only rank 0 prints and writes; errors are everyone's."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if rank():
            sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def meet():
    """No rank goes on before all are here."""
    if world() > 1:
        dist.barrier()


def clock():
    """Seconds, when the device has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def mine(n):
    """This rank's slice of n things. Together the slices cover all and none overlaps."""
    return slice(n * rank() // world(), n * (rank() + 1) // world())


def total(*numbers, op="SUM"):
    """Numbers added up over the ranks (or op="MAX") -> list of floats."""
    x = torch.tensor(numbers, dtype=torch.float64, device="cuda" if world() > 1 and dist.get_backend() == "nccl" else "cpu")
    if world() > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x.tolist()


def gather(rows):
    """The rows (JSON) of all ranks in one list. They travel as text: nothing is unpickled."""
    if world() == 1:
        return rows
    text = json.dumps(rows).encode()
    longest = int(total(len(text), op="MAX")[0])
    parts = torch.empty(world(), longest, dtype=torch.uint8, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_gather(list(parts), torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(parts.device))
    return [row for part in parts for row in json.loads(bytes(part.tolist()))]


def ratios(metrics):
    """{name: number or (sum, count)} -> {name: number}; sums and counts are added up over the ranks, then divided."""
    pairs = [k for k, v in metrics.items() if isinstance(v, tuple)]
    sums = total(*(x for k in pairs for x in metrics[k]))
    return metrics | {k: s / n if n else 0.0 for k, s, n in zip(pairs, sums[::2], sums[1::2])}


def add_gradients(params):
    for p in params if world() > 1 else ():
        if p.grad is None:                                                 # nothing to learn on this rank
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        dist.all_reduce(p.grad)


# ----------------------------------------------------------------------------------------------------------------------
def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_json(path, *needed):
    """A JSON object that has the needed keys; anything else ends the program with a line that says so."""
    try:
        with open(path, encoding="utf-8") as f:
            obj = json.load(f)
        missing = [k for k in needed if k not in obj]
    except (OSError, ValueError, TypeError) as e:
        fail(f"{path} cannot be read: {e}")
    if missing:
        fail(f"{path} has no {', '.join(map(repr, missing))}")
    return obj


def write_text(path, text):
    """Atomic: a reader sees the old file or the new one. Rank 0 writes."""
    if rank() == 0:
        with open(path + ".tmp", "w", encoding="utf-8", errors="replace") as f:        # a model may write half a surrogate pair
            f.write(text)
        os.replace(path + ".tmp", path)


def write_json(path, obj):
    write_text(path, json.dumps(obj, indent=1))


def append_rows(path, rows):
    if rank() == 0:
        with open(path, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


def keep_rows(path, before):
    """Cut a JSONL file down to the rows of the steps before `before`; a row torn by a crash goes too. Atomic."""
    if rank() == 0:
        lines = open(path).readlines() if before and os.path.exists(path) else []
        write_text(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] < before))


def cut_torn_line(path):
    """A kill may have torn the last line of a file that is added to."""
    with open(path, "rb+") as f:
        f.truncate(f.read().rfind(b"\n") + 1)


def make_dir(path):
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".writable.{os.getpid()}")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as e:
        fail(f"cannot write into {path}: {e.strerror}")
    return path


def cli(Config, argv=None, description="", presets=None, positive=()):
    """A flat dataclass -> its instance from the command line. Flags are the field names with dashes; the trailing comment
    of a field is its help; a flag that no field has is an error; what differs from the default is printed.
    presets(config) -> other defaults {field: value}, once it is known what was asked for. positive: fields that must be > 0; the
    other numbers must be >= 0."""
    helps = dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=description.strip().split("\n")[0], allow_abbrev=False)
    for f in dataclasses.fields(Config):
        flag, note = "--" + f.name.replace("_", "-"), helps.get(f.name, "").replace("%", "%%") + f" (default: {f.default!r})".replace("%", "%%")
        if f.type in (bool, "bool"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=note)
        elif typing.get_origin(f.type) is typing.Literal:
            parser.add_argument(flag, choices=typing.get_args(f.type), default=f.default, help=note)
        else:
            parser.add_argument(flag, type=f.type, default=f.default, help=note)
    config = Config(**vars(parser.parse_args(argv)))
    if presets:
        parser.set_defaults(**presets(config))
        config = Config(**vars(parser.parse_args(argv)))
    for name, value in vars(config).items():                               # no quantity here is ever negative, infinite or nan
        if isinstance(value, (int, float)) and not (0 <= value < math.inf and (value or name not in positive)):
            parser.error(f"--{name.replace('_', '-')} is {value}; expected a value {'above 0' if name in positive else 'of 0 or more'}")
    changed = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config) if getattr(config, f.name) != f.default}
    print("settings: " + (", ".join(f"{k} = {v!r}" for k, v in changed.items()) or "all at their defaults"))
    return config
