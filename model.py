"""What the model computes: image -> tokens, chat -> ids, forward pass, log-probabilities.

Both Qwen families (Qwen2.5-VL, Qwen3-VL) are loaded with transformers; the lines that matter are
written out here: the cache (`KVCache`), the positions of tokens (`mrope`), the size at which an
image is fed (`VLM.view`), a chat as ids (`VLM.chat`), one decoder layer (`VLM.layer`), the forward
pass (`VLM.forward`), the same with a cache for sampling (`VLM.prefill`, `VLM.decode_step`), and the
log-probabilities for training (`VLM.logprobs`). The vision tower is frozen, as in both papers, so
an image is encoded once; its features serve every rollout, the reference model and the update.

This is the plain version: every row holds its own prompt. appendix/prefix.py computes the prompt of
a group once, with the same results. appendix/vision.py has the class of an image (`View`) and
encodes it; appendix/weights.py lists the models (`MODELS`) and reads their files. Left out: videos
as input (their frames are images here), and any attention but torch's scaled dot product.

Shapes:  B rows (episodes)   T tokens   D width   V vocabulary   S cache slots   N image tokens
         H query heads   K key and value heads   d width of a head
"""
import os
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Set before transformers is imported and before the GPU is used. Rollout and update need memory
# blocks of very different sizes, hence the second setting.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from appendix import attention, parts, vision, weights
from appendix.vision import View
from appendix.weights import MODELS, Spec, card_of, is_tiny

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# --------------------------------------------------------------------------------------------------
# the cache

class KVCache:
    """Keys and values of the tokens so far, one row per episode, and the length of each row.

    The tokens of a row fill slots 0, 1, 2, ... without gaps, so one rule masks everything: a new
    token at slot s sees the slots up to s. Slots beyond a row's length hold leftovers of padding;
    the rule hides them until they are overwritten.

    To add n tokens to every row: `reserve` (once, for all tokens to come), `place`, `attend` in
    every layer, `advance`.
    """

    def __init__(self, keys, values, lengths):
        self.keys = keys                                # one (B, K, S, d) per layer
        self.values = values
        self.lengths = lengths                          # (B,) tokens in each row
        self.size = 0                                   # slots that are attended to now
        self.capacity = 0                               # slots that `reserve` made room for
        self.row_numbers = None                         # (B, 1) and
        self.slots = None                               # (B, n): where the new tokens go
        self.mask = None                                # (B, 1, n, size) what they see

    def reserve(self, n):
        """Make room for n more tokens in each row. Only this method waits for the GPU (`int`)."""
        self.size = int(self.lengths.max())
        self.capacity = self.size + n
        missing = self.capacity - self.keys[0].shape[2]
        if missing > 0:
            for i in range(len(self.keys)):             # block by block, so that the old ones go
                self.keys[i] = F.pad(self.keys[i], (0, 0, 0, missing))
                self.values[i] = F.pad(self.values[i], (0, 0, 0, missing))

    def place(self, n):
        """Give the next n tokens of every row their slots."""
        is_first = self.size == 0                       # then they see themselves, without a mask
        device = self.lengths.device
        self.size = min(self.size + n, self.capacity)
        self.row_numbers = torch.arange(len(self.lengths), device=device)[:, None]
        self.slots = self.lengths[:, None] + torch.arange(n, device=device)
        if not is_first:
            self.mask = torch.arange(self.size, device=device) <= self.slots[:, None, :, None]

    def attend(self, layer, q, k, v):
        """Attention of n new tokens per row: q (B, n, H, d), k and v (B, n, K, d) -> like q."""
        keys, values = self.store(layer, k, v)
        return attention.attend(q.transpose(1, 2), keys, values, self.mask).transpose(1, 2)

    def store(self, layer, k, v):
        """Write k and v into the new tokens' slots -> all keys and values (B, K, size, d)."""
        rows = self.row_numbers
        self.keys[layer][rows, :, self.slots] = k       # indexed so, a block is (B, n, K, d)
        self.values[layer][rows, :, self.slots] = v
        return self.keys[layer][:, :, :self.size], self.values[layer][:, :, :self.size]

    def advance(self, counts):
        """Count the new tokens. counts (B,): how many of each row's are real and not padding."""
        self.lengths += counts
        self.slots = None
        self.mask = None                                # may be large

    def use_whole_capacity(self):
        """Attend to all reserved slots from now on, so that shapes no longer change."""
        self.size = self.capacity

    def rows(self, index):
        """-> keys, values, lengths of the rows index (b,), copied; those of a slice are shared."""
        keys = [block[index] for block in self.keys]
        values = [block[index] for block in self.values]
        return keys, values, self.lengths[index]

    def part(self, rows):
        """A cache of the slice `rows`, which shares this one's memory: `reserve` it first."""
        return type(self)(*self.rows(rows))

    def branch(self, group):
        """A cache of B rows; row b continues row group[b] of this one. Here: copies of them."""
        return type(self)(*self.rows(group))

    def keep_rows(self, index):
        """Only the rows index (b,) stay, in that order; slots that none of them uses go, too."""
        self.lengths = self.lengths[index]
        size = int(self.lengths.max())
        for i in range(len(self.keys)):                 # block by block, as in `reserve`
            self.keys[i] = self.keys[i][index, :, :size]
            self.values[i] = self.values[i][index, :, :size]


# --------------------------------------------------------------------------------------------------
# positions

def mrope(ids, grids, image_token, start=0, merge=2):
    """Multimodal rotary positions (Qwen2-VL, arXiv 2409.12191, section 2.1).

    A text token at p has (p, p, p). The tokens of an image that begins at p have
    (p, p + row, p + column). Text goes on after the largest position used.

    ids: T token ids; grids: (1, h, w) of each image in them, in patches, of which merge x merge
    become one token; start: the first free position.
    -> positions (3, T), the next free position: the `start` of the chunk that follows.
    """
    out = torch.empty(3, len(ids), dtype=torch.long)
    t = 0                                                               # tokens done so far
    for grid in grids:
        end = ids.index(image_token, t)
        out[:, t:end] = torch.arange(start, start + end - t)            # the text before the image
        start += end - t
        h = grid[1] // merge
        w = grid[2] // merge
        t = end + h * w
        out[0, end:t] = start
        out[1, end:t] = start + torch.arange(h).repeat_interleave(w)
        out[2, end:t] = start + torch.arange(w).repeat(h)
        start += max(h, w)
    after = start + len(ids) - t
    out[:, t:] = torch.arange(start, after)                             # the text after all images
    return out, after


def rope_axes(sections, interleaved):
    """Which of a token's three positions each rotary frequency uses: 0, 1 or 2 -> (d / 2,).

    sections: how many frequencies belong to time (0), row (1) and column (2).
    """
    time, row, column = sections
    axes = torch.zeros(time + row + column, dtype=torch.long)
    if interleaved:                                     # Qwen3-VL: 0 1 2 0 1 2 ... 0 0 0
        axes[1:3 * row:3] = 1
        axes[2:3 * column:3] = 2
    else:                                               # 0 0 0 ... 1 1 1 ... 2 2 2
        axes[time:time + row] = 1
        axes[time + row:] = 2
    return axes


def rotate(x, cos, sin):
    """Rotary embedding: each pair (a, b) = (x[i], x[i + d / 2]) is turned by its angle.

    The result is (a cos - b sin, b cos + a sin). x (B, T, heads, d); cos and sin (B, T, 1, d) hold
    every angle twice, sin with a minus in its first half (see `VLM.rope`).
    """
    swapped = x.roll(x.shape[-1] // 2, -1)              # (b, a)
    return torch.addcmul(x * cos, swapped, sin)         # x * cos + swapped * sin


def rms_norm(x, norm):
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


# --------------------------------------------------------------------------------------------------
# the model

class VLM:
    """A vision-language model, its tokenizer and its image processor behind one interface."""

    shares_prompts = False                              # does the cache hold a group's prompt once?

    def __init__(self, model, tokenizer, processor, name, spec, recompute=False):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.processor = processor
        self.name = name
        self.spec = spec
        self.recompute = recompute                      # gradient checkpointing of the layers
        self.device = model.device
        self.dtype = model.dtype
        self.qwen3 = model.config.model_type.startswith("qwen3")
        id_of = tokenizer.convert_tokens_to_ids
        self.im_start = id_of("<|im_start|>")
        self.im_end = id_of("<|im_end|>")
        self.image_token = id_of("<|image_pad|>")
        self.vision_start = id_of("<|vision_start|>")
        self.vision_end = id_of("<|vision_end|>")
        image_tokens = [self.image_token, self.vision_start, self.vision_end]
        self.never_sampled = torch.tensor(image_tokens, device=self.device)
        sections = model.config.text_config.rope_parameters["mrope_section"]
        self.axes = rope_axes(sections, interleaved=self.qwen3).to(self.device)
        self.factor = processor.patch_size * processor.merge_size   # side of a token in pixels
        self.known_ids = {}                             # text: its ids
        self.work = {"tokens": 0, "patches": 0}         # counts: tokens prefilled, patches encoded
        self.model.requires_grad_(True)
        self.model.model.visual.requires_grad_(False)   # tower and merger, as in both papers

    @property
    def toy_side(self):
        """Side of a toy scene in pixels."""
        return weights.toy_side(self.name, self.spec, self.factor)

    # ---- images

    def view(self, source, index=0, box=None, fed=None):
        """PIL image, or a box of it -> View, which resizes it to `fed` = (width, height).

        Without `fed`: sides are multiples of `factor`, the area is spec.min_pixels to max_pixels.
        index: number of the prompt image. Raises ValueError for an image too narrow to be fed.
        """
        if fed is None:
            largest = self.spec.max_pixels
            smallest = min(self.spec.min_pixels, largest)
            try:
                height, width = smart_resize(
                    source.height, source.width, self.factor, smallest, largest)
            except ValueError as e:
                size = f"{source.width} x {source.height}"
                raise ValueError(f"an image of {size} pixels cannot be fed: {e}") from None
            fed = (width, height)
        patch = self.processor.patch_size
        grid = (1, fed[1] // patch, fed[0] // patch)
        return View(source, fed, self.spec.convention, index, box, grid)

    def patchify(self, view):
        """Fill view.patches: the image cut into patches."""
        vision.patchify(self, view)

    def encode(self, views, grad=False, max_patches=65536):
        """Run the vision tower on the views that have no features, and store these in them."""
        self.work["patches"] += vision.encode(self, views, grad, max_patches)

    # ---- text

    def ids(self, text):
        """Text -> ids. Special tokens in it stay text: a question cannot end its own turn."""
        if text not in self.known_ids:
            if len(self.known_ids) > 10_000:
                self.known_ids.clear()
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            self.known_ids[text] = encoded["input_ids"]
        return self.known_ids[text]

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def chat(self, role, *parts, open=False):
        """One message of the chat (ChatML) as ids.

        parts: texts and views. open: the message has no end, so that the model continues it.
        """
        out = [self.im_start] + self.ids(role + "\n")
        for part in parts:
            if isinstance(part, View):
                image = [self.image_token] * part.tokens()
                out += [self.vision_start] + image + [self.vision_end]
            else:
                out += self.ids(part)
        if not open:
            out += [self.im_end] + self.ids("\n")
        return out

    # ---- forward pass

    def layer(self, i, layer, h, rope, cache):
        """Decoder layer i: attention and gated MLP, each behind an RMS norm and added to h.

        h (B, T, D); rope: see `rotate`; cache: keys and values of earlier tokens, or None.
        """
        attn = layer.self_attn
        mlp = layer.mlp
        x = rms_norm(h, layer.input_layernorm)
        q = attn.q_proj(x).unflatten(-1, (-1, attn.head_dim))         # (B, T, H, d)
        k = attn.k_proj(x).unflatten(-1, (-1, attn.head_dim))         # (B, T, K, d)
        v = attn.v_proj(x).unflatten(-1, (-1, attn.head_dim))         # (B, T, K, d)
        if self.qwen3:
            q = rms_norm(q, attn.q_norm)
            k = rms_norm(k, attn.k_norm)
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        if cache is None:
            x = attention.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            x = x.transpose(1, 2)
        else:
            x = cache.attend(i, q, k, v)
        h = h + attn.o_proj(x.flatten(2))
        x = rms_norm(h, layer.post_attention_layernorm)
        return h + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))

    def forward(self, ids, positions, views, cache=None):
        """Hidden states (B, T, D) of ids (B, T) at positions (3, B, T).

        views: the encoded views of row 0, then of row 1, ... Attention is causal and padding stands
        on the right, so no token sees it. cache: keys and values of earlier tokens, or None.
        """
        lm = self.model.model.language_model
        h = lm.embed_tokens(ids)                                                # (B, T, D)
        at_image = (ids == self.image_token)[..., None]                         # (B, T, 1)
        if views:
            features = torch.cat([v.features for v in views])
            h = h.masked_scatter(at_image, features.to(h.dtype))
        rope = self.rope(positions, h.dtype)
        for i, layer in enumerate(lm.layers):
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(self.layer, i, layer, h, rope, cache, use_reentrant=False)
            else:
                h = self.layer(i, layer, h, rope, cache)
            if views and i < len(views[0].deep):        # Qwen3-VL: deeper vision features
                deep = torch.cat([v.deep[i] for v in views])
                h = h + torch.zeros_like(h).masked_scatter(at_image, deep.to(h.dtype))
        return rms_norm(h, lm.norm)

    def rope(self, positions, dtype):
        """positions (3, B, T) -> cos, sin (B, T, 1, d), as `rotate` takes them."""
        chosen = positions.float()[self.axes]           # (d / 2, B, T): one for each frequency
        inv_freq = self.model.model.language_model.rotary_emb.inv_freq          # (d / 2,)
        angle = chosen.permute(1, 2, 0)[:, :, None] * inv_freq                  # (B, T, 1, d / 2)
        cos = angle.cos().to(dtype)
        sin = angle.sin().to(dtype)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def logits(self, h):
        """Hidden states (..., D) -> logits (..., V) in fp32.

        Image tokens get probability 0, in sampling and in training alike: a sampled one would stand
        for an image that does not exist.
        """
        return self.model.lm_head(h).float().index_fill_(-1, self.never_sampled, -1e9)

    def pad(self, chunks, starts, views):
        """Pad B lists of ids on the right. starts: their first positions; views: of all, in order.

        -> ids (B, T), positions (3, B, T), list of the B positions that follow.
        """
        longest = max(len(chunk) for chunk in chunks)
        ids = torch.zeros(len(chunks), longest, dtype=torch.long)
        positions = torch.zeros(3, len(chunks), longest, dtype=torch.long)
        after = []
        grids = iter([v.grid for v in views])
        for b, chunk in enumerate(chunks):
            own_grids = [next(grids) for _ in range(chunk.count(self.vision_start))]
            own_positions, end = mrope(chunk, own_grids, self.image_token, starts[b])
            ids[b, :len(chunk)] = torch.tensor(chunk)
            positions[:, b, :len(chunk)] = own_positions
            after.append(end)
        return ids.to(self.device), positions.to(self.device), after

    # ---- sampling

    def new_cache(self, rows):
        """A cache of `rows` empty rows."""
        layers = self.model.model.language_model.layers
        heads = self.model.config.text_config.num_key_value_heads
        empty = torch.zeros(rows, heads, 0, layers[0].self_attn.head_dim, dtype=self.dtype,
                            device=self.device)
        lengths = torch.zeros(rows, dtype=torch.long, device=self.device)
        return KVCache([empty] * len(layers), [empty] * len(layers), lengths)

    @torch.no_grad()
    def prefill(self, cache, chunks, positions, views=()):
        """Append a chunk of tokens to every row of the cache: a prompt, an observation, or nothing.

        chunks: B lists of ids of any lengths; positions: the B next positions; views: those of the
        chunks, row by row. Nothing that is in the cache already is computed again.
        -> logits (B, V) after each chunk (useless after an empty one), list of B next positions.
        """
        self.encode(views)
        self.work["tokens"] += sum(len(chunk) for chunk in chunks)
        ids, rope_positions, after = self.pad(chunks, positions, views)
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=self.device)        # (B,)
        cache.reserve(ids.shape[1])
        cache.place(ids.shape[1])
        h = self.forward(ids, rope_positions, views, cache)
        cache.advance(lengths)
        rows = torch.arange(len(chunks), device=self.device)
        return self.logits(h[rows, (lengths - 1).clamp(min=0)]), after

    @torch.inference_mode()
    def decode_step(self, cache, tokens, positions, live):
        """Append one token to every row of the cache -> logits (B, V). `cache.reserve` comes first.

        tokens, positions, live (B,) are tensors on the device; nothing here waits for the GPU. A
        row that is not live keeps its length, so its next token overwrites what is written now.
        """
        cache.place(1)
        positions = positions.expand(3, -1)[:, :, None]                         # (3, B, 1)
        h = self.forward(tokens[:, None], positions, [], cache)                 # (B, 1, D)
        cache.advance(live)
        return self.logits(h[:, 0])

    # ---- training

    def logprobs(self, episodes, temperature=1.0, chunk=1024):
        """Log-probabilities of the sampled tokens, in one pass over whole episodes.

        -> logprobs (B, T), entropy (B, T), mask (B, T): at [b, t] for token t of episode b; zero
        and False where the policy did not choose the token.
        """
        views = all_views(episodes)
        self.encode(views)
        starts = [0] * len(episodes)
        ids, positions, _ = self.pad([e.ids for e in episodes], starts, views)
        h = self.forward(ids, positions, views)                                 # (B, T, D)
        mask = self.completion_mask(episodes)                                   # (B, T)
        sampled = mask[:, 1:]                           # token t is predicted by the state at t - 1
        hidden = h[:, :-1][sampled]                                             # (M, D)
        targets = ids[:, 1:][sampled]                                           # (M,)
        logprobs, entropy = self.score_tokens(hidden, targets, temperature, chunk)
        return scatter(logprobs, mask), scatter(entropy, mask), mask

    def completion_mask(self, episodes):
        """-> bool (B, T): where the policy chose the token; False in the padding."""
        longest = max(len(e.ids) for e in episodes)
        mask = torch.zeros(len(episodes), longest, dtype=torch.bool)
        for b, e in enumerate(episodes):
            mask[b, :len(e.ids)] = torch.tensor(e.completion_mask)
        return mask.to(self.device)

    def score_tokens(self, hidden, targets, temperature, chunk):
        """hidden (M, D), targets (M,) -> log-probabilities of the targets, entropies (M,).

        Logits are computed for sampled tokens only, `chunk` of them at a time, and once more in the
        backward pass: all logits of one ViGoRL step would be hundreds of gigabytes.
        """
        logprobs = []
        entropies = []
        for h, target in zip(hidden.split(chunk), targets.split(chunk)):
            if torch.is_grad_enabled():
                scores = checkpoint(self.score_chunk, h, target, temperature, use_reentrant=False)
            else:
                scores = self.score_chunk(h, target, temperature)
            logprobs.append(scores[0])
            entropies.append(scores[1])
        return torch.cat(logprobs), torch.cat(entropies)

    def score_chunk(self, hidden, targets, temperature):
        """`score_tokens` for m tokens at once. No gradient flows through the entropy."""
        logprobs = F.log_softmax(self.logits(hidden).div_(temperature), -1)     # (m, V)
        with torch.no_grad():
            entropy = -logprobs.exp().mul_(logprobs).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy

    def micro_batches(self, episodes, max_tokens=4096):
        """Split into parts of at most max_tokens tokens. Saves memory; gradients do not change."""
        return parts.padded_parts(episodes, max_tokens)

    def parameters(self):
        """The parameters that are trained: all but the vision tower's."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def save(self, folder, **card):
        """Write a checkpoint to folder + ".tmp" -> that path, for run.replace_folder to rename.

        transformers can read it too: safetensors, tokenizer, processor. `card` becomes vlm.json,
        which says which model this is and how it writes coordinates.
        """
        spec = asdict(replace(self.spec, path="."))     # "." because the folder may be moved
        card = {"name": self.name, **spec, **card}
        return weights.write_files(folder, (self.model, self.tokenizer, self.processor), card)


def all_views(episodes):
    """The views of the first episode, of the second, ... in one list."""
    return [view for e in episodes for view in e.views]


def scatter(values, mask):
    """values (M,), one for each True of mask (B, T), in order -> (B, T), zero elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)


# --------------------------------------------------------------------------------------------------
# loading

def load(name, device="auto", dtype="auto", max_pixels=0, recompute=False, quiet=False,
         vlm_class=VLM):
    """A name of MODELS or a checkpoint folder -> VLM. If that fails, exits with one line.

    max_pixels: largest area of a prompt image as fed; 0: the model's default.
    recompute: gradient checkpointing. quiet: print nothing. vlm_class: VLM or a subclass.
    """
    name, spec = weights.find_model(name)
    device = weights.pick_device(device)
    dtype, reason = weights.pick_dtype(dtype, device, name == "tiny")
    model, tokenizer, processor = weights.read_files(name, spec.path, device, dtype)
    spec = replace(spec, max_pixels=max_pixels or spec.max_pixels)
    vlm = vlm_class(model, tokenizer, processor, name, spec, recompute)
    if not quiet:
        weights.print_loaded(vlm, reason)
    return vlm
