"""How much runs at a time: parts of a rollout, micro-batches. Results do not depend on it.

Plain rows are counted here. appendix/prefix.py counts episodes that share their prompt.
"""


def rollout_parts(vlm, prompts, group_size, config):
    """Cut a rollout of P * G episodes into parts whose cache fits into config.max_batch_tokens.

    prompts: P episodes; config: zoom_rollout.RolloutConfig. A prompt counts once for its group if
    vlm.shares_prompts, else once per row. An episode that does not fit is a part by itself.
    -> [(first, last)] into the episodes, last excluded.
    """
    crop_tokens = (vlm.spec.crop_side // vlm.factor) ** 2 + 64          # and the text around it
    turn_tokens = (config.zoom_limit + 1) * config.max_new_tokens
    growth = turn_tokens + config.zoom_limit * crop_tokens              # of one episode, at most
    parts = []
    first = 0
    size = 0                                            # cache slots of the part from `first` on
    for i in range(len(prompts) * group_size):
        prompt = len(prompts[i // group_size].ids)
        new_prompt = i == first or i % group_size == 0 or not vlm.shares_prompts
        cost = growth + prompt if new_prompt else growth
        if i > first and size + cost > config.max_batch_tokens:
            parts.append((first, i))
            first = i
            size = 0
            cost = growth + prompt
        size += cost
    parts.append((first, len(prompts) * group_size))
    return parts


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
