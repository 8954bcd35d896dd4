"""Which episodes of a rollout run at a time: as many as the cache has room for.

The cache is a rectangle: as many rows as episodes run, as many slots as the longest of them needs.
What an episode will need is known only at its end, and mostly it is far less than it may need: with
four zooms and turns of up to 1,024 tokens 3,000 slots of 7,700. So rows begin as if each needed
half of the worst case, and later as if each needed what the longest so far did. As rows end, others
begin beside those that still run. Where this was too bold, the rows that began last are put aside
and begin again later, with what they have said so far: then their tokens run through the model once
more, but none is sampled again. Each token has its own random number, so nothing of this shows in
what is sampled.

`vlm` is a model.VLM, `config` a zoom_rollout.RolloutConfig, `rows` are zoom_rollout.Row.

Shapes:  P prompts   B rows   V vocabulary
"""
import torch

from appendix import parts

# Slots that are reserved at a time. A turn that is longer goes on in the next round.
ROUND_TOKENS = 256


class Running:
    """The rows that run, their cache, and what they sample their next tokens from."""

    def __init__(self, vlm, config):
        self.vlm = vlm
        self.config = config
        self.rows = []
        self.cache = None
        self.logits = None                              # (B, V) of the next token of each row
        self.positions = []                             # B next positions
        self.began = 0                                  # rows of the first round
        self.ended = 0                                  # rows that are over
        self.num_copies = 0                             # prompts that were ever put into the cache
        self.longest = 0                                # slots beyond the prompt of the longest row

    # ---- room

    @property
    def round_tokens(self):
        """Tokens that a row can write until the next round."""
        return min(self.config.max_new_tokens, ROUND_TOKENS)

    def expected_slots(self):
        """Slots beyond its prompt that a row will need, as far as this can be said."""
        if self.ended and self.ended >= self.began:
            return self.longest
        return max(self.longest, parts.most_slots(self.vlm, self.config) // 2)

    def fits(self, rows, row_slots):
        """Is there room for these rows, each with row_slots beyond its prompt?"""
        longest_prompt = max(len(row.prompt.ids) for row in rows)
        num_prompts = len(rows)
        if self.vlm.shares_prompts:
            num_prompts = len({row.prompt_copy or id(row.prompt) for row in rows})
        slots = num_prompts * longest_prompt + len(rows) * row_slots
        return slots <= self.config.max_batch_tokens

    def needed_slots(self, rows, chunks=()):
        """Slots beyond the prompt that rows need to read chunks, which they hold, and to write."""
        own = [row.own_tokens() for row in rows]
        read = max((len(chunk) for chunk in chunks), default=0)
        cached = max((n - len(chunk) for n, chunk in zip(own, chunks)), default=0)
        return max(max(own) + self.round_tokens, cached + read)

    # ---- rows that begin

    def admit(self, waiting):
        """Begin with rows of the deque `waiting`, in order, as far as there is room."""
        if self.rows and not self.vlm.shares_prompts:   # a plain cache is filled when it is empty
            return
        rows = self.take(waiting)
        if not rows:
            return
        cache, logits, positions = self.begin(rows)
        if self.rows:
            self.cache.join(cache)
            logits = torch.cat([self.logits, logits])
        else:
            self.cache = cache
        self.began = self.began or len(rows)
        self.rows = self.rows + rows
        self.logits = logits
        self.positions = self.positions + positions

    def take(self, waiting):
        """Take rows off the deque: whole groups, so that a prompt is computed once. -> the rows

        If nothing runs, at least one row is taken, and a group that is too large is cut.
        """
        taken = []
        while waiting:
            group = [row for row in waiting if row.prompt is waiting[0].prompt]
            n = len(group)
            if not self.can_begin(self.rows + taken + group):
                if self.rows or taken:
                    break
                while n > 1 and not self.can_begin(group[:n]):
                    n -= 1
            for row in group[:n]:
                waiting.remove(row)
            taken += group[:n]
        return taken

    def can_begin(self, rows):
        """Is there room for `rows`, of which some run already?"""
        held = self.cache.keys[0].shape[2] if self.rows else 0
        return self.fits(rows, max(self.expected_slots(), self.needed_slots(rows), held))

    def begin(self, rows):
        """Read the prompts of `rows`, and what was said before if they were put aside.

        -> cache of these rows, logits (B, V), B next positions
        """
        vlm = self.vlm
        prompts = list({id(row.prompt): row.prompt for row in rows}.values())
        views = [view for prompt in prompts for view in prompt.views]
        cache = vlm.new_cache(len(prompts))
        logits, positions = self.prefill(cache, [prompt.ids for prompt in prompts],
                                         [0] * len(prompts), views)
        number = {id(prompt): p for p, prompt in enumerate(prompts)}
        group = [number[id(row.prompt)] for row in rows]
        for row, p in zip(rows, group):
            row.continues(self.num_copies + p + 1)
        self.num_copies += len(prompts)
        cache = cache.branch(torch.tensor(group, device=vlm.device))
        logits = logits[group]
        positions = [positions[p] for p in group]

        said = [row.episode.ids[len(row.prompt.ids):] for row in rows]
        if any(said):
            views = []
            for row in rows:
                views += row.episode.views[len(row.prompt.views):]
            own_logits, positions = self.prefill(cache, said, positions, views)
            has_said = torch.tensor([len(ids) > 0 for ids in said], device=vlm.device)
            logits = torch.where(has_said[:, None], own_logits, logits)
        return cache, logits, positions

    def prefill(self, cache, chunks, positions, views):
        return parts.prefill(
            self.vlm, cache, chunks, positions, views, self.config.prefill_tokens)

    # ---- rows that go on

    def go_on(self, responses, positions, waiting):
        """After a round: rows that go on read what follows, if there is room.

        responses: for each row (ids that are not cached yet, their views), None if it is over;
        positions: B next positions. Rows without room return to the deque `waiting`.
        """
        self.longest = max(self.longest, *[row.own_tokens() for row in self.rows])
        staying = [b for b, response in enumerate(responses) if response is not None]
        self.ended += len(self.rows) - len(staying)
        self.put_aside(staying, responses, waiting)
        if not staying:
            self.rows = []
            self.positions = []
            self.cache = None
            self.logits = None
            return
        chunks = [responses[b][0] for b in staying]
        if parts.padded_tokens(chunks) > self.config.prefill_tokens:
            staying.sort(key=lambda b: len(responses[b][0]))    # little padding in each part
            chunks = [responses[b][0] for b in staying]
        views = [view for b in staying for view in responses[b][1]]
        if staying != list(range(len(self.rows))):
            self.cache.keep_rows(torch.tensor(staying, device=self.vlm.device))
            self.rows = [self.rows[b] for b in staying]
        self.logits = None                              # the old ones go before the new ones come
        self.logits, self.positions = self.prefill(
            self.cache, chunks, [positions[b] for b in staying], views)

    def put_aside(self, staying, responses, waiting):
        """Return those of the rows `staying` (indices) to the deque for which there is no room."""
        while len(staying) > 1:
            rows = [self.rows[b] for b in staying]
            chunks = [responses[b][0] for b in staying]
            if self.fits(rows, self.needed_slots(rows, chunks)):
                return
            last = rows[-1]
            staying.pop()
            last.continues(0)
            waiting.appendleft(last)
