"""Decoding with fewer and cheaper launches: compiled kernels, CUDA graphs.

One step of a 3B is some 1,300 small kernels, which take longer to launch than to run. torch.compile
joins what stands between two matrix products, which leaves half of them; a CUDA graph launches all
of them at once. Either may be used without the other. Neither has been run on a GPU yet, so both
are off by default. Compiled on a CPU, a step gives the same logits up to rounding.
"""
from functools import lru_cache, partial

import torch


def compiled_decode_step(vlm, cache):
    """vlm.decode_step(cache, ...), compiled -> function of (tokens, positions, live).

    Called after cache.reserve. Compiling takes a minute or two, once for all shapes.
    """
    cache.use_whole_capacity()                          # so shapes change between rounds only
    return partial(compiled_function(), vlm, cache)


@lru_cache
def compiled_function():
    import model
    # Without its inference_mode, which cannot be traced with the tensors of a rollout.
    function = model.VLM.decode_step.__wrapped__
    return torch.no_grad()(torch.compile(function, dynamic=True))


def captured_decode_step(vlm, cache, step):
    """Capture step(tokens, positions, live), which decodes with the cache -> CapturedStep.

    Called after cache.reserve, for each round anew, because the blocks of the cache have moved.
    """
    cache.use_whole_capacity()                          # a graph needs fixed shapes
    lengths = cache.lengths.clone()
    buffers = [torch.zeros_like(lengths) for _ in range(3)]

    # What is set up on first use must not be captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*buffers)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(*buffers)
    cache.lengths.copy_(lengths)
    return CapturedStep(graph, buffers, logits)


class CapturedStep:
    """Call it like vlm.decode_step without the cache."""

    def __init__(self, graph, buffers, logits):
        self.graph = graph
        self.buffers = buffers                          # its inputs: tokens, positions, live (B,)
        self.logits = logits                            # its output (B, V)

    def __call__(self, *inputs):
        for buffer, new in zip(self.buffers, inputs):
            buffer.copy_(new)
        self.graph.replay()
        return self.logits
