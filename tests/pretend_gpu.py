"""A pretend GPU: tensors that say they are on a device "gpu", compute on the CPU, and
refuse to mix.

    python tests/pretend_gpu.py rl | univg | search | sft | evaluate

runs one activity of the tiny model in bf16 on it, and prints as JSON which attention kernel an A100
(sm80) and an H100 (sm90) would choose at each call, by line, and where the host waits for the GPU.
A GPU would stop where a tensor of the CPU meets one of its own; here this is an error, too.

The project calls its device "cuda". A build of torch without CUDA cannot even name tensors there,
so here "cuda" means the device "gpu", which torch lets Python code define.
"""
import collections
import contextlib
import functools
import json
import os
import random
import sys
import traceback
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
attention_calls = collections.Counter()     # {"file:line dtype sm80 sm90": calls}
waits = collections.Counter()               # {"operation file:line": how often the host waited}


# --------------------------------------------------------------------------------------------------
# the device

class Backend(backend_registration._DummyBackendModule):
    """What torch asks about a device of its own."""

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def _lazy_init(self):
        pass

    def _is_in_bad_fork(self):
        return False

    def get_rng_state(self, *device):
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, *state):
        pass

    device = contextlib.nullcontext                     # `with torch.gpu.device(0):`


backend_registration._setup_privateuseone_for_python_backend("gpu", Backend())
GPU = torch.device("gpu", 0)


class OnGPU(torch.Tensor):
    """A tensor that claims to be on the GPU. `cpu` holds its numbers."""

    @staticmethod
    def __new__(cls, cpu):
        out = torch.Tensor._make_wrapper_subclass(
            cls, cpu.size(), strides=cpu.stride(), storage_offset=cpu.storage_offset(),
            dtype=cpu.dtype, layout=cpu.layout, device=GPU)
        out.cpu_tensor = cpu
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def __repr__(self):
        return f"OnGPU({self.cpu_tensor!r})"

    def tolist(self):
        waits[f"tolist {caller()}"] += 1
        return self.cpu_tensor.detach().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"a tensor of the GPU has no numpy array, at {caller()}")

    def data_ptr(self):
        return self.cpu_tensor.data_ptr()

    def __getitem__(self, index):
        return torch.Tensor.__getitem__(self, lists_as_tensors(index))


def lists_as_tensors(index):
    """A list in an index is copied to the GPU by torch itself; that is no mix."""
    if isinstance(index, tuple):
        return tuple(lists_as_tensors(i) for i in index)
    return make_tensor(index) if isinstance(index, list) else index


def caller():
    """The line of the project, or of transformers' models, that asked for an operation."""
    for frame in reversed(traceback.extract_stack()):
        inside = frame.filename.startswith(ROOT) and not frame.filename == __file__
        if inside or "transformers/models" in frame.filename:
            return f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return "?"


# --------------------------------------------------------------------------------------------------
# operations

# The host waits for the result of these, because a shape or a Python number depends on it.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal",
           "is_nonzero", "bincount"}
# These copy between devices; what they are given may be anywhere.
COPYING = {"copy_", "_to_copy", "set_data"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def compute(func, args, kwargs):
    """Run an operation on the CPU's numbers -> result on the device where a GPU would have it."""
    name = func._schema.name.split("::")[1]
    leaves, _ = tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    on_gpu = [x for x in tensors if isinstance(x, OnGPU)]
    wanted = kwargs.get("device")
    if on_gpu and name not in COPYING:
        refuse_mix(func, name, args, tensors)
    to_gpu = is_gpu(wanted) if wanted is not None else bool(on_gpu)
    if name == "copy_":
        to_gpu = isinstance(args[0], OnGPU)
    to_cpu = name in COPYING and on_gpu and not to_gpu
    if name in WAITING and on_gpu or to_cpu:
        waits[f"{name} {caller()}"] += 1
    args, kwargs = tree_map(plain, (args, kwargs))
    if is_gpu(wanted):
        kwargs["device"] = torch.device("cpu")
    out = func(*args, **kwargs)
    if any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
        given = {id(plain(x)): x for x in tensors}      # in place: what was given comes back
        return tree_map(lambda x: given.get(id(x), x), out)
    return tree_map(place, out) if to_gpu else out


def refuse_mix(func, name, args, tensors):
    """Raise RuntimeError if a tensor of the CPU meets one of the GPU; a number may."""
    cpu = [x for x in tensors if not isinstance(x, OnGPU) and x.dim() > 0]
    if name in INDEXING:                                # indices of the CPU are copied
        cpu = [x for x in (args[0], *args[2:3]) if not isinstance(x, OnGPU) and x.dim() > 0]
    if cpu:
        shapes = [tuple(x.shape) for x in cpu]
        raise RuntimeError(f"{func} mixes devices: {shapes} on the CPU, at {caller()}")


def is_gpu(device):
    return device is not None and torch.device(device).type == "gpu"


def plain(x):
    return x.cpu_tensor if isinstance(x, OnGPU) else x


def place(x):
    return OnGPU(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) else x


class Mode(TorchDispatchMode):
    """Sends what is to be made on the GPU, such as torch.zeros(3, device=...), to `compute`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, _ = tree_flatten((args, kwargs))
        if is_gpu(kwargs.get("device")) or any(isinstance(x, OnGPU) for x in leaves):
            return compute(func, args, kwargs)
        return func(*args, **kwargs)


make_tensor = torch.tensor


def tensor(values, *, dtype=None, device=None, requires_grad=False):
    """torch.tensor, which does not ask a dispatch mode."""
    made = make_tensor(values, dtype=dtype)
    return made.to(device) if device is not None else made


# --------------------------------------------------------------------------------------------------
# attention

class LowerRight:
    """Stands for torch.nn.attention.bias.causal_lower_right(T, S)."""

    def __init__(self, T, S):
        self.mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)


def kernel(q, k, mask, is_causal, shares, sm):
    """The kernel that torch chooses on a GPU of compute capability sm (80 or 90), cuDNN left out.

    From torch's sdp_utils.cpp. "math" takes anything and stores all scores in fp32, twice.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    same_heads = q.shape[1] == k.shape[1]
    causal_square = not is_causal or q.shape[2] == k.shape[2]
    if half and mask is None and (same_heads or shares) and q.shape[-1] <= 256 and causal_square:
        return "flash"
    if same_heads and q.shape[-1] % (8 if half else 4) == 0:
        return "efficient"
    return "math"


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """F.scaled_dot_product_attention that notes which kernel a GPU would choose."""
    gpu = isinstance(query, OnGPU)
    lower_right = isinstance(attn_mask, LowerRight)
    if gpu:
        mask = None if lower_right else attn_mask
        chosen = [kernel(query, key, mask, is_causal, enable_gqa, sm) for sm in (80, 90)]
        kind = str(query.dtype)[6:]
        attention_calls[f"{caller()} {kind} {chosen[0]} {chosen[1]}"] += 1
    if lower_right:
        attn_mask = place(attn_mask.mask) if gpu else attn_mask.mask
    if enable_gqa:
        copies = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(copies, 1)
        value = value.repeat_interleave(copies, 1)
    scores = query.float() @ key.float().mT * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return (scores.softmax(-1) @ value.float()).to(query.dtype)


# --------------------------------------------------------------------------------------------------
# the tiny model on it

def move(module):
    """Put the parameters and buffers of a module on the GPU, in place; tied ones stay tied."""
    moved = {}                                          # {id: the tensor on the GPU}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is None:
                    continue
                if id(x) not in moved:
                    on_gpu = OnGPU(x.detach())
                    is_parameter = isinstance(x, torch.nn.Parameter)
                    moved[id(x)] = torch.nn.Parameter(on_gpu) if is_parameter else on_gpu
                tensors[name] = moved[id(x)]


def install():
    """From here on the project's models are loaded in bf16 on the pretend GPU."""
    from appendix import attention as ours
    from appendix import weights
    torch.tensor = tensor
    F.scaled_dot_product_attention = attention
    ours.causal_lower_right = LowerRight
    # These two do not know tensors of ours; neither changes a result.
    torch.inference_mode = lambda mode=True: torch.no_grad()
    torch.utils.checkpoint.checkpoint = lambda f, *args, use_reentrant, **named: f(*args, **named)
    read_files = weights.read_files

    def read_onto_gpu(name, path, device, dtype):
        with _disable_current_modes(), mock.patch.object(torch, "tensor", make_tensor):
            model, tokenizer, processor = read_files(name, path, "cpu", torch.bfloat16)
        move(model)
        return model, tokenizer, processor

    weights.read_files = read_onto_gpu
    weights.pick_device = lambda device: "gpu"
    Mode().__enter__()


def every_turn_zooms():
    """A context in which each turn but the last is read as a call of the zoom tool.

    The tiny model does not know its form before a warm start.
    """
    import zoom_rollout
    from appendix.speed_gpu import zoom_anyway
    zoom = functools.partial(zoom_anyway, random.Random(0), zoom_rollout.env_step)
    return mock.patch.object(zoom_rollout, "env_step", zoom)


def run_rl(recipe="vigorl-zoom", **flags):
    """Two steps: rollout with zooms, reward, the update with a reference."""
    import train_rl
    from appendix import prefix
    from appendix.optimizer import AdamW
    cfg = train_rl.Config(recipe=recipe, num_prompts=4, blind_prompts=1, group_size=3, kl_coef=0.01,
                          max_new_tokens=12, max_zooms=2, control="random", **flags)
    vlm = prefix.load_vlm("tiny", quiet=True)
    ref = prefix.load_vlm("tiny", quiet=True)
    optimizer = AdamW(vlm.parameters(), cfg.lr)
    questions = train_rl.Questions(cfg, vlm.toy_side)
    for step in range(2):
        with every_turn_zooms():
            row, _ = train_rl.train_step(vlm, ref, optimizer, questions, cfg, step)
        assert row["grad_norm"] > 0, row


def run_univg():
    """The same with boxes across several images, in one turn."""
    run_rl("univg-r1", task="boxes")


def run_search():
    """Trees of two questions. Whatever a turn says, it zooms where its thought says."""
    import data
    import train_sft
    from appendix import prefix, tree_sampler, tree_search
    vlm = prefix.load_vlm("tiny", quiet=True)
    cfg = train_sft.Config(max_new_tokens=12, simulations=1, rollout_steps=2)
    calls = mock.patch.object(tree_sampler.rewards, "action_of", lambda text: ("tool_call", ""))
    agrees = mock.patch.object(tree_sampler, "points_in", lambda thought: [mock.ANY])
    with every_turn_zooms(), calls, agrees:
        tree_search.tree_search(vlm, data.toy("search", "train", 2), "zoom", cfg)


def run_sft():
    import train_sft
    from appendix import prefix
    vlm = prefix.load_vlm("tiny", quiet=True)
    cfg = train_sft.Config(traces="oracle", n=6, batch=3)
    losses, _ = train_sft.warm_start(vlm, cfg, "zoom", [], vlm.toy_side, [])
    assert losses


def run_evaluate():
    import data
    import evaluate
    import zoom_rollout
    from appendix import prefix
    vlm = prefix.load_vlm("tiny", quiet=True)
    config = zoom_rollout.RolloutConfig(max_new_tokens=12, temperature=0)
    options = evaluate.RunOptions(recipe="vigorl-zoom")
    samples = data.toy("search", "test", 3)
    with every_turn_zooms():
        assert len(evaluate.run_episodes(vlm, samples, config, options)) == 3


def run_mix():
    """A planted fault: positions that stayed on the CPU."""
    torch.arange(3) + torch.arange(3, device="gpu")


def run_math():
    """A planted fault: a mask over shared heads."""
    q = torch.ones(1, 4, 3, 32, device="gpu", dtype=torch.bfloat16)
    k = torch.ones(1, 2, 3, 32, device="gpu", dtype=torch.bfloat16)
    mask = torch.ones(1, 1, 3, 3, device="gpu", dtype=torch.bool)
    F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True)


ACTIVITIES = {"rl": run_rl, "univg": run_univg, "search": run_search, "sft": run_sft,
              "evaluate": run_evaluate, "mix": run_mix, "math": run_math}


def main():
    torch.set_num_threads(1)
    install()
    ACTIVITIES[sys.argv[1]]()
    print(json.dumps({"attention": attention_calls, "waits": waits}))
    sys.stdout.flush()
    os._exit(0)                                         # the mode is never left


if __name__ == "__main__":
    main()
