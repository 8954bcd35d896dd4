"""A group's prompt, computed once: drop-ins for the plain cache and the plain log-probabilities.

The G episodes of a prompt begin with the same tokens, mostly those of its image. The plain version
(model.py) gives every row a copy:

    row 0   [prompt A ..................][turn 1][crop][turn 2]
    row 1   [prompt A ..................][turn 1]
    row 2   [prompt A ..................][turn 1][crop][turn 2][crop][turn 3]
    row 3   [prompt B .........][turn 1][crop][turn 2]
    row 4   [prompt B .........][turn 1][crop][turn 2]
    row 5   [prompt B .........][turn 1]

Here a prompt stands once, and the rows hold what follows it:

    prompt A [..................]  <-  row 0 [turn 1][crop][turn 2]
                                   <-  row 1 [turn 1]
                                   <-  row 2 [turn 1][crop][turn 2][crop][turn 3]
    prompt B [.........]           <-  row 3 [turn 1][crop][turn 2]
                                   <-  row 4 [turn 1][crop][turn 2]
                                   <-  row 5 [turn 1]

What that saves, of P prompts of S tokens and P * G rows that add T tokens each: sampling keeps
P * S + P * G * T slots in the cache in place of P * G * (S + T), and a decoding step reads the keys
of a prompt once for its whole group; training runs P * S + P * G * T tokens through the model in
place of P * G * (S + T). With S = 300, G = 8, T = 100 that is 2.9 times fewer.

`SharedCache` does the first (Hydragen, arXiv 2402.05099, splits attention the same way), `Packed`
does the second. tests/test_prefix.py holds both to the results of the plain version.

Shapes:  P prompts   S slots of the longest prompt   B rows   T slots of the longest row, without
         its prompt   G rows of the largest group   N tokens of a packed row   M sampled tokens
         H query heads   K key and value heads   R = H / K   d width of a head
"""
import torch
import torch.nn.functional as F

import model
from appendix import attention


# --------------------------------------------------------------------------------------------------
# sampling: rows that refer to their prompt

class PromptCache(model.KVCache):
    """The plain cache, whose rows other rows may continue without copying them."""

    def branch(self, group):
        """A cache of B empty rows; row b continues row group[b] of this one, which it takes over.

        When its rows leave, so do their prompts, from this cache too.
        """
        cache = self.resume([None] * len(group), group)
        cache.owns_prompts = True
        return cache

    def resume(self, kept, group):
        """`branch` with rows that hold tokens already.

        kept: B results of SharedCache.keep_row, each a list of (keys, values), one per layer; None
        for a row that is empty.
        """
        # row[0][0]: the keys of the first layer (K, T, d)
        lengths = [row[0][0].shape[1] if row else 0 for row in kept]
        keys = []
        values = []
        for layer, block in enumerate(self.keys):
            shape = (len(kept), block.shape[1], max(lengths), block.shape[3])
            keys.append(block.new_zeros(shape))
            values.append(block.new_zeros(shape))
            for b, row in enumerate(kept):
                if row:
                    keys[layer][b, :, :lengths[b]] = row[layer][0]
                    values[layer][b, :, :lengths[b]] = row[layer][1]
        return SharedCache(self, group, keys, values, torch.tensor(lengths, device=group.device))


class PromptRow:
    """Prompts one after the other, without padding. `forward` takes it in place of a PromptCache.

        [prompt A ..................][prompt B .........]

    Each prompt sees itself; its keys and values go into its row of the cache.
    """

    def __init__(self, cache, lengths):
        self.cache = cache                              # PromptCache of P empty rows
        self.lengths = lengths                          # P numbers of tokens, N in all

    def attend(self, layer, q, k, v):
        """Attention of all tokens: q (1, N, H, d), k and v (1, N, K, d) -> like q."""
        q = q[0].split(self.lengths)
        k = k[0].split(self.lengths)
        v = v[0].split(self.lengths)
        out = []
        for p, length in enumerate(self.lengths):
            own_k = heads_first(k[p])                                               # (1, K, n, d)
            own_v = heads_first(v[p])
            self.cache.keys[layer][p, :, :length] = own_k[0]
            self.cache.values[layer][p, :, :length] = own_v[0]
            x = attention.attend(heads_first(q[p]), own_k, own_v)                   # (1, H, n, d)
            out.append(x[0].transpose(0, 1))
        return torch.cat(out)[None]


class SharedCache(model.KVCache):
    """What B rows hold beyond their prompts. A new token sees its row's prompt, then its row.

    One softmax runs over the scores of both. The scores of the prompt are computed per group: the
    queries of its rows, side by side, are multiplied with one copy of the prompt's keys. For this
    every prompt has G places, and each of its rows takes one. With group = [0, 1, 0, 0] and G = 3,
    the rows take places 0, 3, 1, 2; places 4 and 5 stay free.
    """

    def __init__(self, prompts, group, keys, values, lengths):
        super().__init__(keys, values, lengths)
        self.owns_prompts = False                       # else other caches may continue them
        self.assign(prompts, group)

    def assign(self, prompts, group):
        """Say which prompt each row continues: the rows of a group take its places in order."""
        self.prompts = prompts                          # PromptCache of P rows
        self.group = group                              # (B,) prompt of each row
        order = torch.arange(len(group), device=group.device)
        same_group = group[:, None] == group
        earlier = order[:, None] > order
        rank = (same_group & earlier).sum(1)            # (B,) rows of its group before a row
        self.group_size = int(rank.max()) + 1           # G
        self.place_of_row = group * self.group_size + rank              # (B,) its place among P * G
        self.num_places = len(prompts.lengths) * self.group_size
        all_taken = len(group) == self.num_places
        self.in_order = all_taken and torch.equal(self.place_of_row, order)
        # The row at each place; free places repeat row 0, and nothing reads them.
        self.row_at_place = order.new_zeros(self.num_places)
        self.row_at_place[self.place_of_row] = order                    # (P * G,)
        self.rows_of = {}                               # prompt: its rows
        for p in group.unique().tolist():
            self.rows_of[p] = (group == p).nonzero()[:, 0]

    def place(self, n):
        """Give the next n tokens of every row their slots.

        The mask is bool (B, 1, n, S + T); for one token it is what is added to the scores.
        """
        super().place(n)
        device = self.lengths.device
        in_row = self.mask                                                          # (B, 1, n, T)
        if in_row is None:                              # all rows are empty
            in_row = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        slots = torch.arange(self.prompts.keys[0].shape[2], device=device)              # (S,)
        in_prompt = slots < self.prompts.lengths[self.group, None, None, None]      # (B, 1, 1, S)
        B = len(self.group)
        self.mask = torch.cat([in_prompt.expand(B, 1, n, -1), in_row.expand(B, 1, n, -1)], 3)
        if n == 1:
            self.mask = ~self.mask * -1e9

    def attend(self, layer, q, k, v):
        """Attention of n new tokens per row: q (B, n, H, d), k and v (B, n, K, d) -> like q."""
        keys, values = self.store(layer, k, v)                                      # (B, K, T, d)
        prompt_keys = self.prompts.keys[layer]                                      # (P, K, S, d)
        prompt_values = self.prompts.values[layer]
        if q.shape[1] == 1:
            return self.attend_one_token(q, keys, values, prompt_keys, prompt_values)
        return self.attend_chunk(q, keys, values, prompt_keys, prompt_values)

    def attend_one_token(self, q, keys, values, prompt_keys, prompt_values):
        """A decoding step: the prompt's keys and values are read once per group."""
        q = q[:, 0].unflatten(1, (keys.shape[1], -1)) * q.shape[-1] ** -0.5         # (B, K, R, d)
        group_scores = self.to_prompts(q) @ prompt_keys.mT                      # (P, K, G * R, S)
        prompt_scores = self.to_rows(group_scores)                                  # (B, K, R, S)
        own_scores = q @ keys.mT                                                    # (B, K, R, T)
        scores = torch.cat([prompt_scores, own_scores], -1) + self.mask                 # in fp32
        weights = scores.softmax(-1).to(values.dtype)
        prompt_weights, own_weights = weights.split([prompt_keys.shape[2], keys.shape[2]], -1)
        from_prompt = self.to_prompts(prompt_weights) @ prompt_values           # (P, K, G * R, d)
        out = own_weights @ values + self.to_rows(from_prompt)                      # (B, K, R, d)
        return out.flatten(1, 2)[:, None]                                           # (B, 1, H, d)

    def attend_chunk(self, q, keys, values, prompt_keys, prompt_values):
        """Several tokens per row. Each row gets a copy of its prompt, one group at a time.

        This is rare (once per observation), and with many new tokens the copy costs little.
        """
        out = torch.empty_like(q)
        for p, rows in self.rows_of.items():
            copies = (len(rows), -1, -1, -1)
            all_keys = torch.cat([prompt_keys[p].expand(copies), keys[rows]], 2)
            all_values = torch.cat([prompt_values[p].expand(copies), values[rows]], 2)
            x = attention.attend(q[rows].transpose(1, 2), all_keys, all_values, self.mask[rows])
            out[rows] = x.transpose(1, 2)
        return out

    def to_prompts(self, x):
        """(B, K, R, X) -> (P, K, G * R, X): rows of a group side by side."""
        if not self.in_order:
            x = x[self.row_at_place]
        return x.unflatten(0, (-1, self.group_size)).transpose(1, 2).flatten(2, 3)

    def to_rows(self, x):
        """(P, K, G * R, X) -> (B, K, R, X): the way back."""
        x = x.unflatten(2, (self.group_size, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.in_order else x[self.place_of_row]

    def part(self, rows):
        """See model.KVCache.part."""
        return SharedCache(self.prompts, self.group[rows], *self.rows(rows))

    def keep_rows(self, index):
        """See model.KVCache.keep_rows. Prompts that no row continues are dropped, too."""
        super().keep_rows(index)
        used, group = self.group[index].unique(return_inverse=True)
        prompts = self.prompts
        if len(used) < len(prompts.lengths):
            if not self.owns_prompts:
                prompts = PromptCache(list(prompts.keys), list(prompts.values), prompts.lengths)
            prompts.keep_rows(used)
        self.assign(prompts, group)

    def join(self, other):
        """Add the rows of another cache behind those of this one, and its prompts."""
        group = torch.cat([self.group, other.group + len(self.prompts.lengths)])
        stack_rows(self, other)
        stack_rows(self.prompts, other.prompts)
        self.assign(self.prompts, group)

    def keep_row(self, row):
        """A copy of what a row holds beyond its prompt: per layer (keys, values) (K, T, d)."""
        n = int(self.lengths[row])
        kept = []
        for keys, values in zip(self.keys, self.values):
            kept.append((keys[row, :, :n].clone(), values[row, :, :n].clone()))
        return kept


def stack_rows(cache, other):
    """Add the rows of `other` to `cache`, in place, block by block; `other` is used up."""
    cache.lengths = torch.cat([cache.lengths, other.lengths])
    slots = max(cache.keys[0].shape[2], other.keys[0].shape[2])
    for blocks, more in ((cache.keys, other.keys), (cache.values, other.values)):
        for i, (block, rows) in enumerate(zip(blocks, more)):
            block = F.pad(block, (0, 0, 0, slots - block.shape[2]))
            rows = F.pad(rows, (0, 0, 0, slots - rows.shape[2]))
            blocks[i] = torch.cat([block, rows])
            more[i] = None


# --------------------------------------------------------------------------------------------------
# training: a group as one row

class Packed:
    """Episodes to train on, as one row without padding. `forward` takes it in place of a cache.

        [prompt A][rest of 0][rest of 1][rest of 2][prompt B][rest of 3][rest of 4][rest of 5]

    Only attention depends on which tokens belong together; the rest of a layer works on each token
    alone. In `attend` a prompt sees itself, the rest of an episode sees its prompt and itself.
    """

    def __init__(self, ids, positions, views, groups, predictors, targets):
        self.ids = ids                                  # (1, N)
        self.positions = positions                      # (3, 1, N)
        self.views = views                              # in the order of their tokens
        self.groups = groups                        # [(length of prompt, [length of each rest])]
        self.predictors = predictors                # (M,) index of the token before a sampled one
        self.targets = targets                      # (M,) the sampled tokens, episode by episode
        self.sizes = []                             # lengths of prompt, rests, prompt, rests, ...
        self.rest_indices = []                      # per group: see `padded_indices`
        for prompt_length, rest_lengths in groups:
            self.sizes += [prompt_length, sum(rest_lengths)]
            indices = padded_indices(rest_lengths)
            self.rest_indices.append(torch.tensor(indices, dtype=torch.long, device=ids.device))

    def attend(self, layer, q, k, v):
        """Attention of all tokens: q (1, N, H, d), k and v (1, N, K, d) -> like q."""
        q = q[0].split(self.sizes)
        k = k[0].split(self.sizes)
        v = v[0].split(self.sizes)
        out = []
        for g, (_, rest_lengths) in enumerate(self.groups):     # parts 2g and 2g + 1 of q, k, v
            prompt_q = heads_first(q[2 * g])                                        # (1, H, S, d)
            prompt_k = heads_first(k[2 * g])                                        # (1, K, S, d)
            prompt_v = heads_first(v[2 * g])
            x = attention.attend(prompt_q, prompt_k, prompt_v)
            out.append(x[0].transpose(0, 1))
            if rest_lengths:
                own = (q[2 * g + 1], k[2 * g + 1], v[2 * g + 1])
                out.append(self.attend_rests(g, *own, prompt_k, prompt_v))
        return torch.cat(out)[None]

    def attend_rests(self, g, q, k, v, prompt_k, prompt_v):
        """The rests of group g, n tokens in all: q (n, H, d), k and v (n, K, d) -> like q."""
        rest_lengths = self.groups[g][1]
        indices = self.rest_indices[g]
        q = padded(q, indices, rest_lengths)                                        # (G, H, T, d)
        own_k = padded(k, indices, rest_lengths)                                    # (G, K, T, d)
        own_v = padded(v, indices, rest_lengths)
        copies = (len(rest_lengths), -1, -1, -1)
        k = torch.cat([prompt_k.expand(copies), own_k], 2)                      # (G, K, S + T, d)
        v = torch.cat([prompt_v.expand(copies), own_v], 2)
        x = attention.attend_continued(q, k, v)                 # rest token t sees slots to S + t
        return x.transpose(1, 2).flatten(0, 1).index_select(0, indices)                 # (n, H, d)


def heads_first(x):
    """(n, heads, d) -> (1, heads, n, d)."""
    return x[None].transpose(1, 2)


def padded_indices(lengths):
    """The index of each token once rows of these lengths are padded: [2, 3] -> [0, 1, 3, 4, 5]."""
    indices = []
    for row, length in enumerate(lengths):
        start = row * max(lengths)
        indices += range(start, start + length)
    return indices


def padded(x, indices, lengths):
    """Rows of these lengths without padding (n, heads, d) -> padded (G, heads, T, d)."""
    blank = x.new_zeros(len(lengths) * max(lengths), *x.shape[1:])              # (G * T, heads, d)
    return blank.index_copy(0, indices, x).unflatten(0, (len(lengths), -1)).transpose(1, 2)


class PrefixVLM(model.VLM):
    """model.VLM that samples with SharedCache and trains on a Packed row."""

    shares_prompts = True

    def new_cache(self, rows):
        """A cache of `rows` empty rows, which `branch` continues without copies."""
        plain = super().new_cache(rows)
        return PromptCache(plain.keys, plain.values, plain.lengths)

    @torch.no_grad()
    def prefill(self, cache, chunks, positions, views=()):
        """See model.VLM.prefill. New prompts run as one row, without padding."""
        if not isinstance(cache, PromptCache):
            return super().prefill(cache, chunks, positions, views)
        lengths = [len(chunk) for chunk in chunks]
        cache.reserve(max(lengths))
        if cache.size > 0:                              # these are no new prompts
            return super().prefill(cache, chunks, positions, views)
        self.encode(views)
        self.work["tokens"] += sum(lengths)
        ids = []
        rope_positions = []                             # tensors (3, n)
        after = []
        grids = iter([view.grid for view in views])
        for chunk, start in zip(chunks, positions):
            own_grids = [next(grids) for _ in range(chunk.count(self.vision_start))]
            own_positions, end = model.mrope(chunk, own_grids, self.image_token, start)
            ids += chunk
            rope_positions.append(own_positions)
            after.append(end)
        ids = torch.tensor([ids], device=self.device)                                   # (1, N)
        rope_positions = torch.cat(rope_positions, 1)[:, None].to(self.device)          # (3, 1, N)
        h = self.forward(ids, rope_positions, views, PromptRow(cache, lengths))[0]      # (N, D)
        lengths = torch.tensor(lengths, device=self.device)                             # (P,)
        cache.advance(lengths)
        return self.logits(h[lengths.cumsum(0) - 1]), after

    def logprobs(self, episodes, temperature=1.0, chunk=1024):
        """See model.VLM.logprobs. A prompt that several episodes continue is computed once."""
        self.encode(model.all_views(episodes))
        packed = self.pack(episodes)
        h = self.forward(packed.ids, packed.positions, packed.views, packed)[0]         # (N, D)
        mask = self.completion_mask(episodes)                                           # (B, T)
        logprobs, entropy = self.score_tokens(h[packed.predictors], packed.targets, temperature,
                                              chunk)
        return model.scatter(logprobs, mask), model.scatter(entropy, mask), mask

    def group_by_prompt(self, episodes):
        """Find the episodes that continue the same prompt -> [(length of prompt, their indices)].

        The same prompt: equal ids up to the first sampled token, and the very same View objects.
        An episode that shares its prompt with no other counts as a prompt from end to end.
        """
        groups = {}
        for b, e in enumerate(episodes):
            n = len(e.ids)
            if True in e.completion_mask:
                n = e.completion_mask.index(True)
            prompt = e.ids[:n]
            views = e.views[:prompt.count(self.vision_start)]
            key = (tuple(prompt), *map(id, views))
            groups.setdefault(key, []).append(b)
        out = []
        for (prompt, *_), members in groups.items():
            length = len(prompt)
            if len(members) == 1:
                length = len(episodes[members[0]].ids)
            out.append((length, members))
        return out

    def micro_batches(self, episodes, max_tokens=4096):
        """Split into parts of at most max_tokens tokens as `pack` counts them, groups together.

        An episode that is longer is a part by itself. Gradients do not change.
        """
        parts = []
        room = 0                                        # tokens left in the last part
        for prompt_length, members in self.group_by_prompt(episodes):
            prompt_cost = prompt_length                 # 0 once the last part holds the prompt
            for b in members:
                rest_length = len(episodes[b].ids) - prompt_length
                if not parts or prompt_cost + rest_length > room:
                    parts.append([])
                    room = max_tokens
                    prompt_cost = prompt_length
                parts[-1].append(episodes[b])
                room -= prompt_cost + rest_length
                prompt_cost = 0
        return parts

    def pack(self, episodes):
        """-> the episodes as a Packed row."""
        ids = []
        positions = []                                  # tensors (3, n)
        views = []
        groups = []
        indices = [None] * len(episodes)                # of each episode's tokens in the row
        for prompt_length, members in self.group_by_prompt(episodes):
            prompt_indices = list(range(len(ids), len(ids) + prompt_length))
            rest_lengths = []
            for b in members:
                e = episodes[b]
                grids = [view.grid for view in e.views]
                own_positions, _ = model.mrope(e.ids, grids, self.image_token)      # (3, tokens)
                num_views = e.ids[:prompt_length].count(self.vision_start)
                if b == members[0]:
                    ids += e.ids[:prompt_length]
                    positions.append(own_positions[:, :prompt_length])
                    views += e.views[:num_views]
                rest = e.ids[prompt_length:]
                indices[b] = prompt_indices + list(range(len(ids), len(ids) + len(rest)))
                ids += rest
                positions.append(own_positions[:, prompt_length:])
                views += e.views[num_views:]
                rest_lengths.append(len(rest))
            groups.append((prompt_length, rest_lengths if len(members) > 1 else []))
        predictors, sampled = sampled_indices(episodes, indices)
        ids = torch.tensor(ids, device=self.device)
        positions = torch.cat(positions, 1).to(self.device)
        return Packed(ids[None], positions[:, None], views, groups, predictors.to(self.device),
                      ids[sampled.to(self.device)])


def sampled_indices(episodes, indices):
    """Indices in the packed row -> (M,) of the token before each sampled one, (M,) of the latter.

    indices: for each episode, the indices of its tokens.
    """
    predictors = []
    sampled = []
    for e, own in zip(episodes, indices):
        for t, chosen in enumerate(e.completion_mask):
            if chosen:
                predictors.append(own[t - 1])
                sampled.append(own[t])
    return torch.tensor(predictors, dtype=torch.long), torch.tensor(sampled, dtype=torch.long)


def load_vlm(name, plain=False, device="auto", dtype="auto", max_pixels=0, recompute=False,
             quiet=False):
    """`model.load` for a PrefixVLM, or for a model.VLM if plain."""
    vlm_class = model.VLM if plain else PrefixVLM
    return model.load(name, device, dtype, max_pixels, recompute, quiet, vlm_class)
