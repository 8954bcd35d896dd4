"""How much memory a run needs, before it starts; and how much it took.

`memory_plan` counts the tensors of the worst moment from shapes. tests/test_memory.py holds it to
the code: both are counted on tensors without numbers, and may differ by a tenth. Beside these
tensors a GPU holds what no plan knows: about half a GB of its driver, scratch of kernels, gaps.

The worst moment of the rollout and that of the update are never together:

    always      weights, optimizer
    rollout     features of the images so far, cache, the forward pass of a prefill
    update      features of all images of the step, gradients, activations
"""
import sys
from dataclasses import dataclass

import torch

import zoom_rollout
from appendix import faults, parts
from appendix.files import DataError

# What to change when a part does not fit, the first thing to try first. Printed beside the plan,
# and when memory runs out.
KNOBS = {
    "activations": "--recompute, then a smaller --micro-tokens (the gradient stays the same)",
    "cache": "a smaller --max-batch-tokens (the episodes stay the same)",
    "prefill": "a smaller --prefill-tokens (the episodes stay the same), a smaller --max-pixels",
    "optimizer": "--offload (to the CPU)",
    "features": "a smaller --max-pixels, fewer --max-zooms or --num-prompts",
    "weights": "--kl-coef 0 (no reference), a smaller model",
}
# Of these each program holds some; the others are 0 there.
PARTS = ("weights", "optimizer", "gradients", "features", "cache", "prefill", "activations")


@dataclass(frozen=True)
class MemoryOptions:
    """The settings of a run that decide how much memory it needs."""
    cache_tokens: int           # slots of the key-value cache, at most
    prefill_tokens: int         # tokens of a forward pass of the rollout, unless a prompt is longer
    prompt_tokens: int          # tokens of the longest prompt
    own_tokens: int             # tokens of an episode behind its prompt, at most
    turn_tokens: int            # those of them that the last turn may have
    zooms: int                  # crops per episode, at most
    crop_tokens: int            # image tokens of a crop
    num_prompts: int            # prompts of a step, or of an evaluation's batch
    group_size: int = 1         # episodes per prompt
    micro_tokens: int = 0       # tokens of a forward and backward pass; 0: nothing is trained
    recompute: bool = False     # layers recomputed in the backward pass
    offload: bool = False       # optimizer state on the CPU
    reference: bool = False     # a second, frozen copy of the model
    passes: int = 1             # forward passes that wait for one backward pass (PAPO: 2)
    chunk: int = 1024           # tokens whose logits exist at the same time

    @property
    def rows(self):
        """Episodes of a step."""
        return self.num_prompts * self.group_size

    def at_once(self, tokens, rows):
        """Of rows with so many tokens each, the tokens that a prefill takes at once."""
        return tokens * min(rows, max(self.prefill_tokens // tokens, 1))


class Sizes:
    """What the formulas below count with, in numbers (not bytes) where nothing else is said."""

    def __init__(self, vlm):
        text = vlm.model.config.text_config
        tower = vlm.model.config.vision_config
        self.layers = text.num_hidden_layers
        self.D = text.hidden_size
        self.I = text.intermediate_size                 # width inside the MLP
        self.V = text.vocab_size
        self.head_dim = vlm.model.model.language_model.layers[0].self_attn.head_dim
        self.kv = text.num_key_value_heads * self.head_dim              # a key, or a value
        self.Q = text.num_attention_heads * self.head_dim               # the queries of a token
        self.vision_D = tower.hidden_size
        self.vision_I = tower.intermediate_size
        self.patch = 2 * 3 * vlm.processor.patch_size ** 2              # a patch, twice
        self.deep = len(getattr(tower, "deepstack_visual_indexes", []))
        self.tied = text.tie_word_embeddings
        self.size = vlm.dtype.itemsize                                  # bytes of a number
        self.weights = sum(p.numel() for p in vlm.model.parameters())
        self.trained = sum(p.numel() for p in vlm.parameters())
        self.shares_prompts = vlm.shares_prompts        # is a group's prompt there once?


def memory_plan(vlm, options):
    """What a run will need -> {part: bytes}, each of PARTS, and three sums.

    "rollout" and "update": what the device holds at the worst moment of each; "peak": the larger.
    A model on the meta device will do.
    """
    s = Sizes(vlm)
    plan = dict.fromkeys(PARTS, 0)
    plan["weights"] = s.weights * s.size * (2 if options.reference else 1)
    plan["features"] = feature_bytes(s, options)
    plan["cache"] = cache_bytes(s, options)
    plan["prefill"] = prefill_bytes(s, options)
    always = plan["weights"]
    if options.micro_tokens:
        plan["optimizer"] = s.trained * optimizer_bytes(vlm.dtype, options.offload)
        plan["gradients"] = s.trained * 4                               # summed in fp32
        plan["activations"] = activation_bytes(s, options)
        if not options.offload:
            always += plan["optimizer"]
    always += plan["features"]
    # Nothing is prefilled after the last turn, for which the cache is the largest.
    prefilling = cache_bytes(s, options, before_last_turn=True) + plan["prefill"]
    sampling = plan["cache"] + sampling_bytes(s, options)
    plan["rollout"] = always + max(prefilling, sampling)
    plan["update"] = 0
    if options.micro_tokens:
        plan["update"] = always + plan["gradients"] + plan["activations"]
    plan["peak"] = max(plan["rollout"], plan["update"])
    return plan


def optimizer_bytes(dtype, offload):
    """Bytes of optimizer state per trained parameter.

    Two moments in fp32, and an fp32 master unless the weight itself is one.
    """
    has_masters = dtype.itemsize < 4 or offload
    return 12 if has_masters else 8


def feature_bytes(s, options):
    """The features of all images of a step. A prompt is counted as if it were images only."""
    crops = options.rows * options.zooms * options.crop_tokens
    tokens = options.num_prompts * options.prompt_tokens + crops
    return tokens * s.D * s.size * (1 + s.deep)


def cache_bytes(s, options, before_last_turn=False):
    """Keys and values of the rows that run at a time, and a second copy of one block.

    The blocks (the keys of a layer, or its values) grow and shrink one after the other, so the old
    and the new one exist together for one block only.
    """
    slot = 2 * s.layers * s.kv * s.size                                 # a key, a value per layer
    return slots(s, options, before_last_turn) * slot * (1 + 1 / (2 * s.layers))


def slots(s, options, before_last_turn=False):
    """Slots of the cache: as many as the episodes of the step may need, but no more than allowed.

    One row is let in even if it needs more than that.
    """
    own = options.own_tokens
    if before_last_turn:
        own -= options.turn_tokens
    prompts = options.num_prompts if s.shares_prompts else options.rows
    needed = prompts * options.prompt_tokens + options.rows * own
    return min(needed, max(options.cache_tokens, options.prompt_tokens + own))


def prefill_bytes(s, options):
    """What prompts, or crops and the text around them, need while they are read.

    One of three moments is the worst: the tower looks at the images, or a layer of the language
    model is in its MLP, or it is in its attention.
    """
    tokens = options.at_once(options.prompt_tokens, options.num_prompts)
    image_tokens = tokens
    if options.zooms:
        # The text between two turns, the crop included.
        turns = (options.zooms + 1) * options.turn_tokens
        observation = (options.own_tokens - turns) // options.zooms
        observations = options.at_once(observation, options.rows)
        crops = observations * options.crop_tokens // observation
        tokens = max(tokens, observations)
        image_tokens = max(image_tokens, crops)
    # Attention: x, and q, k and their rotations in fp32. MLP: three inner vectors, norms in fp32.
    patch = s.patch + max(21 * s.vision_D, 10 * s.vision_D + 3 * s.vision_I)
    vision = min(4 * image_tokens, 65536) * patch * s.size              # four patches are a token
    # h before and after attention, its norm, q, k, v, two angles, and three vectors in the MLP.
    vectors = 3 * s.I + 3 * s.D + s.Q + 2 * s.kv + 2 * s.head_dim
    mlp = tokens * vectors * s.size
    # In attention 4 vectors of width D and 3 of queries. For an observation each row of a group
    # gets a copy of its prompt's keys and values, and then one for each head. The mask has a byte
    # for each token and slot, and for the kernel a number.
    attention = tokens * (4 * s.D + 3 * s.Q) * s.size
    if options.zooms:
        seen = options.prompt_tokens + options.own_tokens
        attention += options.group_size * seen * 2 * (s.kv + s.Q) * s.size
        attention += tokens * seen * (1 + s.size)
    return max(vision, mlp, attention)


def sampling_bytes(s, options):
    """What it takes to sample a token of every row that runs.

    The last logits and the new ones in fp32, probabilities, and their sums in fp64, which are made
    from a copy. A row takes half of the slots that it may need, if not more.
    """
    room = slots(s, options) // max(options.own_tokens // 2, 1)
    return min(options.rows, room + 1) * s.V * (2 * 4 + 4 + 2 * 8)


def activation_bytes(s, options):
    """What a forward and backward pass needs at its worst moment, beside gradients that are summed.

    For the backward pass a layer keeps, per token: 4 vectors of width D (what comes in, after
    attention, and their norms), 3 of queries and attention, keys and values, 4 in the MLP. A group
    of G episodes of S + T tokens stands in memory as S + G * T tokens. Its attention pads the G * T
    queries, and copies keys and values to G * (S + T).

    With --recompute a layer keeps what comes in, and has the rest while it is recomputed.
    """
    tokens = max(options.micro_tokens, options.prompt_tokens + options.own_tokens)
    padded = 0.0                                        # share of the tokens
    copies = 0.0                                        # per token
    # How many episodes of a group stand in one micro-batch?
    room = (options.micro_tokens - options.prompt_tokens) // options.own_tokens
    together = min(options.group_size, max(room, 1))
    if s.shares_prompts and together > 1:
        own = together * options.own_tokens
        padded = own / (options.prompt_tokens + own)
        copies = padded + together * options.prompt_tokens / (options.prompt_tokens + own)
    layer = 4 * s.D + (3 + padded) * s.Q + 2 * (1 + copies) * s.kv + 4 * s.I
    # Going back through the MLP adds two inner vectors. Attention comes when those of the MLP are
    # gone, and adds gradients of queries, in bf16 and fp32, and of each copy, once for every head.
    through_mlp = 2 * s.I
    through_attention = 4 * s.Q + 2 * copies * (s.Q + s.kv) - 4 * s.I
    going_back = max(through_mlp, through_attention)
    if options.recompute:
        kept = (s.layers + 1) * s.D
        going_back += layer
    else:
        kept = s.layers * layer
    kept = options.passes * tokens * kept * s.size

    # Three moments may be the worst; in each there is what all layers have kept.
    matrix = s.V * s.D * 4                              # a gradient of the output matrix in fp32
    # 1. The logits of a chunk: three fp32 tensors, beside the matrix's gradient from the last one.
    logits = 3 * options.chunk * s.V * 4 + matrix
    # 2. The matrix's gradients from two chunks, and their sum.
    output = 3 * matrix
    # 3. A layer. If the matrix is the embedding, too, its gradient waits for the end.
    layers = tokens * going_back * s.size + (matrix if s.tied else 0)
    return kept + max(logits, output, layers)


# --------------------------------------------------------------------------------------------------
# the longest prompt

@dataclass(frozen=True)
class Size:
    """In place of an image where only its size matters."""
    width: int
    height: int

    @property
    def size(self):
        return self.width, self.height


def longest_prompt(vlm, samples, style, sizes):
    """Tokens of the longest prompt of the samples; no image is opened.

    sizes: what faults.check_samples returned. Which prompt is the longest is guessed: its image
    tokens, and one token for four letters. Raises DataError for an image that cannot be fed.
    """
    most = -1
    for sample in samples:
        views = []
        for i, image in enumerate(sample.images):
            try:
                views.append(vlm.view(Size(*faults.size_of(image, sizes)), i))
            except ValueError as e:
                raise DataError(f"sample {sample.id}: {e}") from None
        letters = len(sample.question) + sum(len(option) for option in sample.options)
        guess = sum(view.tokens() for view in views) + letters // 4
        if guess > most:
            most = guess
            longest = sample, views
    sample, views = longest
    return len(zoom_rollout.begin(vlm, sample, style, views).ids)


def rollout_options(vlm, config, num_prompts, prompt_tokens, **more):
    """-> MemoryOptions. config: zoom_rollout.RolloutConfig; more: fields for training."""
    return MemoryOptions(
        cache_tokens=config.max_batch_tokens, prefill_tokens=config.prefill_tokens,
        prompt_tokens=prompt_tokens, own_tokens=parts.most_slots(vlm, config),
        turn_tokens=config.max_new_tokens, zooms=config.zoom_limit,
        crop_tokens=(vlm.spec.crop_side // vlm.factor) ** 2, num_prompts=num_prompts, **more)


# --------------------------------------------------------------------------------------------------
# what is said

def print_plan(plan, offload):
    """Print the plan in GB, with what to change beside each part."""
    print("memory plan, GB")
    for part, n in plan.items():
        if n == 0:
            continue
        note = KNOBS.get(part, "")
        if offload and part == "optimizer":
            note = "on the CPU"
        print(f"  {part:12s}{n / 1e9:6.1f}  {note}".rstrip())


def warn_if_too_large(plan, device, knobs):
    """Print a line if the plan does not fit the GPU. knobs: what to change, most effective first.

    A twentieth of the GPU is left for what the plan does not know.
    """
    if device.type != "cuda":
        return
    card = torch.cuda.get_device_properties(device).total_memory
    if plan["peak"] > 0.95 * card:
        print(f"warning: the plan needs {plan['peak'] / 1e9:.1f} GB, and this GPU has "
              f"{card / 1e9:.1f} (some of it for the driver). Change, in this order: {knobs}")


def knobs_for(plan, offload):
    """What to change so that less is needed at the worst moment: the largest part of it first."""
    used = {"weights", "optimizer", "features"}
    if offload:
        used.remove("optimizer")
    if plan["update"] >= plan["rollout"]:
        used.add("activations")
    else:
        used |= {"cache", "prefill"}
    # The plan's own weights are the last thing to give up.
    largest_first = sorted(used - {"weights"}, key=plan.get, reverse=True)
    return "; ".join(KNOBS[part] for part in [*largest_first, "weights"])


def peak_memory():
    """The most bytes used so far: of the GPU's memory, or by this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource                                                     # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024                      # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
