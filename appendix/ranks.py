"""Several processes as one: `torchrun --nproc-per-node N train_rl.py`.

torchrun starts the same script N times. Each process, called a rank, has a GPU and a copy of the
model, and takes its share of the prompts. The model is not wrapped (no DistributedDataParallel),
because it samples too: gradients are added up once per step, when all micro-batches are done.

Without torchrun there is one rank, and every function here does nothing or returns its input.
"""
import datetime
import json
import os
import sys
import time

import torch
import torch.distributed as dist

# How long ranks wait for each other. NCCL's own 10 minutes are too few while rank 0 writes a
# checkpoint of 44 GB to a slow disk, or while one rank's rollouts are much longer.
PATIENCE = datetime.timedelta(hours=2)


def start():
    """Under torchrun: join the other ranks, each on a GPU of its own.

    Rank 0 alone prints and writes files; error messages of all ranks are shown.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
        os.environ["TQDM_DISABLE"] = "1"


def rank():
    """The number of this process: 0, 1, ..., world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until all ranks have come here."""
    if world_size() > 1:
        dist.barrier()


def shard(n):
    """This rank's slice of n things. The slices of all ranks cover all n and do not overlap."""
    first = n * rank() // world_size()
    end = n * (rank() + 1) // world_size()
    return slice(first, end)


def all_reduce(numbers, op="SUM"):
    """A list of numbers -> list of floats, each added up over the ranks (or the largest: "MAX")."""
    x = torch.tensor(numbers, dtype=torch.float64, device=message_device())
    if world_size() > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x.tolist()


def message_device():
    """Where a tensor must be to be sent: NCCL sends from the GPU, gloo from the CPU."""
    if world_size() > 1 and dist.get_backend() == "nccl":
        return "cuda"
    return "cpu"


def gather(rows):
    """A list of JSON values per rank -> one list of all ranks' values, in the order of the ranks.

    The values are sent as JSON text, padded with spaces to the longest, and not as pickles, which
    could run code.
    """
    if world_size() == 1:
        return rows
    text = json.dumps(rows).encode()
    longest = int(all_reduce([len(text)], op="MAX")[0])
    message = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
    message = message.to(message_device())
    messages = [torch.empty_like(message) for _ in range(world_size())]
    dist.all_gather(messages, message)
    gathered = []
    for message in messages:
        gathered += json.loads(bytes(message.tolist()))
    return gathered


def reduce_ratios(row):
    """{name: number, or a pair (sum, count)} -> {name: number}.

    Sums and counts are added up over the ranks and then divided; a count of 0 gives 0.
    """
    names = [name for name, value in row.items() if isinstance(value, tuple)]
    sums = all_reduce([row[name][0] for name in names])
    counts = all_reduce([row[name][1] for name in names])
    reduced = dict(row)
    for name, total, count in zip(names, sums, counts):
        reduced[name] = total / count if count else 0.0
    return reduced


def all_reduce_gradients(params):
    """Add the gradients of the parameters up over the ranks, in place."""
    if world_size() == 1:
        return
    for p in params:
        if p.grad is None:                              # this rank had nothing to learn from
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        dist.all_reduce(p.grad)


def synchronized_time():
    """Seconds on a clock that is read when the GPU has finished all it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
