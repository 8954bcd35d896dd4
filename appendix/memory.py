"""How much memory a run needs, before it starts; and how much it took."""
import sys
from dataclasses import dataclass

import torch

# What to change when a part does not fit, the first thing to try first. Printed beside the plan,
# and when memory runs out.
KNOBS = {
    "activations": "--recompute, then a smaller --micro-tokens (the gradient stays the same)",
    "cache": "a smaller --max-batch-tokens (the episodes stay the same)",
    "optimizer": "--offload (to the CPU)",
    "weights": "--kl-coef 0 (no reference), a smaller model",
}


@dataclass(frozen=True)
class MemoryOptions:
    """The settings of a run that decide how much memory it needs."""
    micro_tokens: int           # tokens of a forward and backward pass
    cache_tokens: int           # slots of the key-value cache
    recompute: bool = False     # layers recomputed in the backward pass
    offload: bool = False       # optimizer state on the CPU
    reference: bool = False     # a second, frozen copy of the model
    chunk: int = 1024           # tokens whose logits exist at the same time


def memory_plan(vlm, options):
    """What a run will need -> {part: bytes}.

    The part "peak" is what the device holds at the worst moment: beside weights and optimizer, the
    rollout holds the cache, and the update holds gradients, activations and logits, but never both.
    Counted from shapes, so a model on the meta device will do.
    """
    text = vlm.model.config.text_config
    size = vlm.dtype.itemsize                                           # bytes of a number
    parameters = sum(p.numel() for p in vlm.model.parameters())
    trained = sum(p.numel() for p in vlm.parameters())
    head_dim = vlm.model.model.language_model.layers[0].self_attn.head_dim
    kv_size = text.num_key_value_heads * head_dim                       # numbers in a key
    copies = 2 if options.reference else 1

    optimizer = trained * optimizer_bytes(vlm.dtype, options.offload)
    slot = text.num_hidden_layers * 2 * kv_size * size                  # a key, a value per layer
    # Twice: when finished rows leave the cache, the old one and the new one exist together.
    cache = 2 * options.cache_tokens * slot
    plan = {
        "weights": parameters * size * copies,
        "optimizer": optimizer,
        "gradients": trained * 4,                                       # summed in fp32
        "cache": cache,
        "activations": options.micro_tokens * activation_bytes(text, kv_size, size, options),
        # About four fp32 tensors of this size: logits, log-probabilities, and their gradients.
        "logits": 4 * options.chunk * text.vocab_size * 4,
    }
    always = plan["weights"]
    if not options.offload:
        always += plan["optimizer"]
    update = plan["gradients"] + plan["activations"] + plan["logits"]
    plan["peak"] = always + max(plan["cache"], update)
    return plan


def optimizer_bytes(dtype, offload):
    """Bytes of optimizer state per trained parameter.

    Two moments in fp32, and an fp32 master unless the weight itself is one.
    """
    has_masters = dtype.itemsize < 4 or offload
    return 12 if has_masters else 8


def activation_bytes(text, kv_size, size, options):
    """Bytes that the layers keep for the backward pass, per token."""
    # About 6 vectors of the hidden size, 4 of keys and values, 4 inside the MLP.
    layer = 6 * text.hidden_size + 4 * kv_size + 4 * text.intermediate_size
    layer *= size
    if not options.recompute:
        return text.num_hidden_layers * layer
    # The input of each layer stays; two layers at most are computed again at the same time.
    inputs = (text.num_hidden_layers + 2) * text.hidden_size * size
    return inputs + 2 * layer


def print_plan(plan, offload):
    """Print the plan in GB, with what to change beside each part."""
    print("memory plan, GB")
    for part, n in plan.items():
        note = KNOBS.get(part, "")
        if offload and part == "optimizer":
            note = "on the CPU"
        print(f"  {part:12s}{n / 1e9:6.1f}  {note}".rstrip())


def peak_memory():
    """The most bytes used so far: of the GPU's memory, or by this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource                                                     # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024                      # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
