"""CUDA graphs for decoding: one step is hundreds of small kernels, slower to launch than to run.

A graph is captured once and replayed for every token. Not yet run on a GPU by us.
"""
import torch


def captured_decode_step(vlm, cache, rows):
    """Capture vlm.decode_step(cache, ...) -> function (tokens, positions, live) -> logits (B, V).

    Called after cache.reserve, for each turn anew, because the blocks of the cache have moved.
    """
    cache.use_whole_capacity()                          # a graph needs fixed shapes
    lengths = cache.lengths.clone()
    buffers = [torch.zeros(rows, dtype=torch.long, device=vlm.device) for _ in range(3)]

    # What is set up on first use must not be captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            vlm.decode_step(cache, *buffers)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = vlm.decode_step(cache, *buffers)
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
