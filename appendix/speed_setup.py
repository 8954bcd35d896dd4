"""What the speed comparisons share: weights, questions, our rollouts of equal length, and timing.

appendix/speed.py is the script. speed_peers.py and speed_trl.py run the peers.

Shapes:  P prompts   G episodes per prompt   B = P * G   V vocabulary
"""
import random
import statistics
from dataclasses import dataclass, field, replace

import torch
import transformers
from PIL import Image

import data
import model
import zoom_rollout
from appendix import prefix, ranks, run

# Text models as published, and two of ours: "qwen2.5-vl-3b-short", and "mid", a size between the
# tiny model and a released one.
TEXT_SIZES = {
    "qwen2.5-vl-3b": dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2.5-vl-7b": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    # The layers of the 3B, but a quarter of them: for a card on which the 3B does not fit.
    "qwen2.5-vl-3b-short": dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=9, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "mid": dict(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True),
}
# The vision tower of Qwen2.5-VL. "mid" has that of the tiny model.
VISION_SIZE = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
    window_size=112, fullatt_block_indexes=[7, 15, 23, 31])


# --------------------------------------------------------------------------------------------------
# weights

class EndlessVLM(prefix.PrefixVLM):
    """A policy that cannot end its turn, so that every turn has the same number of tokens."""

    def __init__(self, net, tokenizer, processor, name, spec, recompute=False):
        super().__init__(net, tokenizer, processor, name, spec, recompute)
        end = torch.tensor([self.im_end], device=self.device)
        self.never_sampled = torch.cat([self.never_sampled, end])


def share_weights(vlm, vlm_class, **options):
    """The same weights behind another class of VLM; nothing is copied."""
    return vlm_class(vlm.model, vlm.tokenizer, vlm.processor, vlm.name, vlm.spec, **options)


def load_model(args):
    """The model of --model: the released weights, or its shape with random weights."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.random or args.model == "mid":
        return random_weights(args.model, device)
    return prefix.load_vlm(args.model, device=device)


def random_weights(name, device):
    """A model of TEXT_SIZES with random weights, which speed does not depend on -> PrefixVLM.

    Its tokenizer and image processor are the tiny model's, so nothing is downloaded. On the meta
    device it has shapes only. bf16, except on a CPU.
    """
    if name not in TEXT_SIZES:
        run.fail(f"random weights and memory plans are for {', '.join(TEXT_SIZES)}, "
                 f"not for {name!r}: choose one with --model")
    tiny = prefix.load_vlm("tiny", device="cpu", quiet=True)
    config = config_of(name, tiny)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        torch.set_default_dtype(dtype)
        net = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            config, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
    spec = model.MODELS.get(name.removesuffix("-short"), tiny.spec)
    return prefix.PrefixVLM(net, tiny.tokenizer, tiny.processor, name, spec)


def config_of(name, tiny):
    """transformers' configuration of a model of TEXT_SIZES, with the tiny special tokens."""
    theirs = tiny.model.config
    text = dict(TEXT_SIZES[name])
    vision = dict(VISION_SIZE)
    mrope_section = [16, 24, 24]
    if name == "mid":
        text["vocab_size"] = len(tiny.tokenizer)
        vision = theirs.vision_config.to_dict()
        mrope_section = [8, 12, 12]
    text["rope_parameters"] = {
        "rope_type": "default", "mrope_section": mrope_section, "rope_theta": 1e6}
    text["max_position_embeddings"] = 128_000
    text["bos_token_id"] = None
    text["eos_token_id"] = tiny.im_end
    vision["out_hidden_size"] = text["hidden_size"]
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"],
        image_token_id=theirs.image_token_id, video_token_id=theirs.video_token_id,
        vision_start_token_id=theirs.vision_start_token_id,
        vision_end_token_id=theirs.vision_end_token_id)


# --------------------------------------------------------------------------------------------------
# questions

def toy_questions(vlm, n, image_tokens):
    """n toy questions -> (a VLM that is fed images of that size, samples).

    image_tokens > 0: scenes are enlarged to that many image tokens; speed does not depend on what
    they show.
    """
    if image_tokens == 0:
        return vlm, data.toy("search", "test", n, 0, side=vlm.toy_side)
    samples = data.toy("search", "test", n, 0)
    side = round(image_tokens ** 0.5) * vlm.factor
    enlarged = []
    for sample in samples:
        image = sample.images[0].resize((side, side), Image.Resampling.BICUBIC)
        enlarged.append(replace(sample, images=[image]))
    spec = replace(vlm.spec, max_pixels=side * side)
    fed = prefix.PrefixVLM(vlm.model, vlm.tokenizer, vlm.processor, vlm.name, spec)
    return fed, enlarged


def observation(vlm, view, rng):
    """What follows a turn: its end, a crop at a random point, the header of the next turn.

    rng: random.Random. -> (ids, View of the crop)
    """
    x = rng.randrange(view.source.width)
    y = rng.randrange(view.source.height)
    crop = zoom_rollout.crop(vlm, view, x, y)
    before, after = data.OBSERVE
    ids = [vlm.im_end] + vlm.ids("\n") + vlm.chat("user", before, crop, after)
    return ids + vlm.chat("assistant", open=True), crop


# --------------------------------------------------------------------------------------------------
# our rollouts

@dataclass(frozen=True)
class Load:
    """The rollouts that both sides must do."""
    samples: list                                       # P questions
    group: int                                          # episodes per prompt
    turns: int                                          # turns per episode
    turn_tokens: int                                    # sampled tokens per turn

    @property
    def sampled_tokens(self):
        return len(self.samples) * self.group * self.turns * self.turn_tokens


def our_turns(vlm, load, seed, graphs=False):
    """Conversations with turns of a fixed length -> P * G episodes.

    The parts of zoom_rollout.rollout, with a random crop after each turn but the last. vlm is an
    EndlessVLM; graphs: decode with CUDA graphs.
    """
    rng = random.Random(seed)
    rows = len(load.samples) * load.group
    u = torch.rand(rows, load.turns, load.turn_tokens, dtype=torch.double).to(vlm.device)
    options = zoom_rollout.TurnOptions(load.turn_tokens, graphs=graphs)
    prompts = [zoom_rollout.begin(vlm, sample) for sample in load.samples]
    cache, logits, positions = prefill_prompts(vlm, prompts, load.group)
    episodes = []
    for prompt in prompts:
        for _ in range(load.group):
            episodes.append(prompt.copy())
    for turn in range(load.turns):
        ids, logprobs, positions = zoom_rollout.sample_turn(
            vlm, cache, logits, positions, u[:, turn], options)
        for e, own_ids, own_logprobs in zip(episodes, ids, logprobs):
            e.append_sampled(own_ids, own_logprobs)
        if turn + 1 < load.turns:
            logits, positions = add_crops(vlm, cache, episodes, positions, rng)
    return episodes


def prefill_prompts(vlm, prompts, group):
    """Compute each prompt once -> (cache of B rows, logits (B, V), B next positions)."""
    cache = vlm.new_cache(len(prompts))
    ids = [e.ids for e in prompts]
    views = []
    for e in prompts:
        views += e.views
    logits, positions = vlm.prefill(cache, ids, [0] * len(prompts), views)
    prompt_of = [row // group for row in range(len(prompts) * group)]               # (B,)
    cache = cache.branch(torch.tensor(prompt_of, device=vlm.device))
    return cache, logits[prompt_of], [positions[p] for p in prompt_of]


def add_crops(vlm, cache, episodes, positions, rng):
    """Append a crop to every episode and to the cache -> (logits (B, V), B next positions)."""
    chunks = []
    crops = []
    for e in episodes:
        last = e.ids[-1]                                # sampled, but not yet in the cache
        ids, crop = observation(vlm, e.views[0], rng)
        e.append_given(ids, [crop])
        chunks.append([last] + ids)
        crops.append(crop)
    return vlm.prefill(cache, chunks, positions, crops)


# --------------------------------------------------------------------------------------------------
# bandwidth

def decode_bytes(vlm, slots):
    """Bytes that a decoding step must read: the text model's weights, and `slots` of the cache."""
    text = vlm.model.config.text_config
    decoder = vlm.model.model.language_model
    weights = sum(p.numel() for p in decoder.layers.parameters()) + vlm.model.lm_head.weight.numel()
    head_dim = decoder.layers[0].self_attn.head_dim
    per_slot = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
    return (weights + per_slot * slots) * vlm.model.dtype.itemsize


def copy_bandwidth(device, size=2 ** 30):
    """Bytes per second of a copy of `size` bytes, counted once for the read, once for the write."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        began = ranks.synchronized_time()
        target.copy_(source)
        best = max(best, 2 * source.numel() / (ranks.synchronized_time() - began))
    return best


# --------------------------------------------------------------------------------------------------
# timing

@dataclass
class Rounds:
    """Seconds of each round of each side. The first round is a warm-up and does not count."""
    clock: object = ranks.synchronized_time             # function that gives seconds
    seconds: dict = field(default_factory=dict)         # name of a side: list of seconds

    def time(self, name, function):
        """Call function(number of the round) and note its seconds -> its result."""
        took = self.seconds.setdefault(name, [])
        began = self.clock()
        out = function(len(took))
        took.append(self.clock() - began)
        return out

    def median(self, name):
        return statistics.median(self.seconds[name][1:])

    def ratio(self, peer, own):
        """How many times faster `own` is than `peer`: the median over the rounds' ratios."""
        pairs = zip(self.seconds[peer][1:], self.seconds[own][1:])
        return statistics.median(theirs / ours for theirs, ours in pairs)
