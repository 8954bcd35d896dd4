"""How much runs at a time: parts of a prefill, micro-batches. Results do not depend on it.

Plain rows are counted here. appendix/prefix.py counts episodes that share their prompt.
"""
import torch


def most_slots(vlm, config):
    """Cache slots that an episode of zoom_rollout.RolloutConfig may need beyond its prompt."""
    crop_tokens = (vlm.spec.crop_side // vlm.factor) ** 2 + 64          # and the text around it
    turn_tokens = (config.zoom_limit + 1) * config.max_new_tokens
    return turn_tokens + config.zoom_limit * crop_tokens


def padded_tokens(chunks):
    """Tokens of rows that are padded to the longest."""
    return len(chunks) * max((len(chunk) for chunk in chunks), default=0)


def padded_parts(episodes, max_tokens):
    """Cut episodes into parts of at most max_tokens tokens, the padding to the longest included.

    An episode that is longer is a part by itself. -> list of lists of episodes, in order.
    """
    parts = []
    longest = 0                                         # tokens of the longest in the last part
    for e in episodes:
        longest = max(longest, len(e.ids))
        if not parts or longest * (len(parts[-1]) + 1) > max_tokens:
            parts.append([])
            longest = len(e.ids)
        parts[-1].append(e)
    return parts


def prefill(vlm, cache, chunks, positions, views, max_tokens=16384):
    """`vlm.prefill` a few rows at a time: at most max_tokens tokens, padding included, or one row.

    Takes and gives what vlm.prefill does.
    """
    slices = row_slices(chunks, max_tokens)
    if len(slices) == 1:
        return vlm.prefill(cache, chunks, positions, views)
    cache.reserve(max(len(chunk) for chunk in chunks))  # before its parts share its memory
    logits = []
    after = []
    first_view = 0
    for rows in slices:
        part = chunks[rows]
        last_view = first_view + sum(chunk.count(vlm.vision_start) for chunk in part)
        part_logits, part_after = vlm.prefill(
            cache.part(rows), part, positions[rows], views[first_view:last_view])
        logits.append(part_logits)
        after += part_after
        first_view = last_view
    return torch.cat(logits), after


def row_slices(chunks, max_tokens):
    """Cut rows of new tokens into slices of at most max_tokens tokens, the padding included."""
    first = 0
    longest = 0                                         # tokens of the longest row from `first` on
    slices = []
    for b, chunk in enumerate(chunks):
        longest = max(longest, len(chunk))
        if b > first and longest * (b + 1 - first) > max_tokens:
            slices.append(slice(first, b))
            first = b
            longest = len(chunk)
    slices.append(slice(first, len(chunks)))
    return slices
