"""Optional parts of the RL step, each behind a flag of train_rl.py that is off by default.

    --curiosity, --overlong     bonuses that depend on the group or on the length in tokens
    --evidence-bonus            a bonus for looking at the right place, whatever the answer
    --zoom-cost                 a price for each crop
    --reward-parts              another sum of the recipe's components
    --control                   rewards that know nothing of the right answer
    --over-turn                 what becomes of episodes that a limit cut off
    --papo-coef                 a second look at images that are mostly black
    --sampler-dtype, --mismatch rollouts in another precision, and what is done about that

The formulas are in grpo.py; here stands what they need to know about episodes.
"""
import copy
import random
from dataclasses import replace

import torch

import data
import grpo
from appendix import evidence, run


# The components that --reward-parts may add up, by recipe. hit: is the IoU of a box 0.5 or more?
REWARD_PARTS = {
    "vigorl": ("accuracy", "format", "grounded"),
    "vigorl-ungrounded": ("accuracy", "format"),
    "vigorl-zoom": ("accuracy", "format", "grounded", "distinct"),
    "univg-r1": ("iou", "hit", "format"),
}
# What the loss does with the sampler's log-probabilities, which may not be quite the trainer's.
# ratio: they are the denominator of its ratio, which is clipped. ignore: the trainer's own take
# their place, as if both agreed. truncate: the same, times a weight (grpo.importance_weights).
MISMATCH = ("ratio", "ignore", "truncate")
# Bonuses and prices that depend on what the zooms of an episode led to.
ZOOM_BONUSES = ("tool_bonus", "curiosity", "evidence_bonus", "zoom_cost")


def check_options(cfg, episode_limit):
    """End the program if an option is asked for that would do nothing, or something else.

    episode_limit: tokens that an episode may sample at most.
    """
    can_zoom = data.PROMPT_STYLES[cfg.recipe] == "zoom"
    for name in ("distinct_bonus", *ZOOM_BONUSES):
        if getattr(cfg, name) and not can_zoom:
            run.fail(f"{run.flag_of(name)} depends on zooms, and the recipe {cfg.recipe} has none; "
                     "expected 0, or --recipe vigorl-zoom")
    if cfg.template and not (can_zoom and cfg.max_zooms):
        run.fail("--template opens a tool call; expected a recipe and --max-zooms that allow one")
    for name in (*ZOOM_BONUSES, "overlong", "reward_parts"):    # a recipe may set distinct_bonus
        if cfg.control and getattr(cfg, name):
            run.fail(f"{run.flag_of(name)} would do nothing: --control replaces the whole reward; "
                     "expected one of the two")
    if cfg.overlong > episode_limit:
        run.fail(f"--overlong is {cfg.overlong}; expected at most the {episode_limit} tokens that "
                 "an episode may sample")
    for name in filter(None, cfg.reward_parts.split(",")):
        if name not in REWARD_PARTS[cfg.recipe]:
            run.fail(f"--reward-parts names {name!r}; expected some of "
                     f"{', '.join(REWARD_PARTS[cfg.recipe])}")
    if cfg.mismatch != "ratio" and cfg.num_minibatches > 1:
        run.fail(f"--mismatch {cfg.mismatch} takes the policy of the update for the one that "
                 "sampled; expected --num-minibatches 1")


def warn_of_long_turns(vlm, traces, max_new_tokens):
    """Print a line if the warm start teaches turns that a rollout would cut off."""
    lengths = []                                        # in tokens, <|im_end|> included
    for trace in traces:
        for turn in trace.turns:
            lengths.append(len(vlm.ids(turn.removeprefix(data.FORCE))) + 1)
    too_long = sum(length > max_new_tokens for length in lengths)
    if too_long:
        print(f"warning: {too_long} of {len(lengths)} turns of the traces are longer than "
              f"--max-new-tokens {max_new_tokens} (the longest: {max(lengths)}), so the policy "
              "learns turns that its rollouts cut off")


def add_group_bonuses(episodes, cfg, episode_limit):
    """Add --curiosity, --overlong, --evidence-bonus and --zoom-cost to the rewards, in place.

    The episodes are whole groups. Each bonus is a reward component of its own, too.
    episode_limit: tokens that an episode may sample at most.
    """
    zooms = [float(sum(t.crop is not None for t in e.turns)) for e in episodes]
    zooms = torch.tensor(zooms).view(-1, cfg.group_size)                        # (P, G)
    if cfg.curiosity:
        add_bonus(episodes, "curiosity", grpo.curiosity(zooms, cfg.curiosity))
    if cfg.zoom_cost:
        add_bonus(episodes, "zoom_cost", -cfg.zoom_cost * zooms)
    if cfg.overlong:
        lengths = torch.tensor([float(sum(e.completion_mask)) for e in episodes])
        add_bonus(episodes, "overlong", grpo.overlong(lengths, episode_limit, cfg.overlong))
    if cfg.evidence_bonus:
        saw = torch.tensor([float(evidence.saw(e) or 0) for e in episodes])
        add_bonus(episodes, "evidence", cfg.evidence_bonus * saw)


def choose_parts(episodes, cfg):
    """Put the sum of --reward-parts in place of the episodes' rewards, if any are named."""
    if not cfg.reward_parts:
        return
    for e in episodes:
        parts = e.reward_components
        parts["reward"] = sum(parts[name] for name in cfg.reward_parts.split(","))


def add_bonus(episodes, name, bonus):
    """bonus: one number per episode, in a tensor of any shape."""
    for e, value in zip(episodes, bonus.flatten().tolist()):
        e.reward_components[name] = value
        e.reward_components["reward"] += value


# Rewards that cannot teach the task, for comparison (2506.10947): a coin; the form alone; 1 for a
# well-formed wrong answer.
CONTROLS = ("random", "format", "inverted")


def replace_by_control(episodes, cfg):
    """Put the reward of --control in place of the episodes' rewards, if it is asked for."""
    for i, e in enumerate(episodes):
        parts = e.reward_components
        if cfg.control == "random":
            coin = random.Random(f"{cfg.seed}/{e.sample.id}/{i % cfg.group_size}")
            parts["reward"] = float(coin.random() < 0.5)
        if cfg.control == "format":
            parts["reward"] = parts["format"]
        if cfg.control == "inverted":
            parts["reward"] = parts["format"] * (1 - parts["accuracy"])


def finished_by_themselves(episodes):
    """Which episodes ended with an answer that no limit on tokens or zooms forced? -> bool (B,)."""
    finished = []
    for e in episodes:
        forced_after_zooms = e.turns[-1].forced and len(e.turns) > 1
        finished.append(e.finish_reason == "answer" and not forced_after_zooms)
    return torch.tensor(finished)


def counted_episodes(episodes, cfg):
    """Which episodes count in the mean and standard deviation of their group? -> bool (P, G).

    None, for all of them, unless --over-turn exclude leaves out those that a limit cut off.
    """
    if cfg.over_turn != "exclude":
        return None
    return finished_by_themselves(episodes).view(-1, cfg.group_size)


def mask_advantages(episodes, advantages, cfg):
    """Advantages (P, G) -> the same, 0 where --over-turn mask or --mask-negative says so.

    To be cut off is not to be wrong: the over-turn mask of Mini-o3 (2509.07969). Learning from
    advantages above 0 alone is an option of ViGoRL's code. There the tokens of the others leave the
    mask, and with it the KL term and the count that divides the loss; here they stay in both.
    """
    if cfg.over_turn == "mask":
        advantages = advantages * finished_by_themselves(episodes).view_as(advantages)
    if cfg.mask_negative:
        advantages = advantages.clamp(min=0)
    return advantages


def blindfold(vlm, episodes, step, share=0.6):
    """The same episodes with 60 % of the patches of every image black (PAPO, 2507.06448).

    Which patches depends on the image and the step, not on the rest of the micro-batch.
    """
    dark_views = {}                                     # a group shares the views of its prompt
    out = []
    for e in episodes:
        for view in e.views:
            if id(view) not in dark_views:
                name = f"{step}/{e.sample.id}/{view.index}/{view.box}"
                generator = torch.Generator().manual_seed(random.Random(name).getrandbits(60))
                dark = vlm.view(view.source, view.index, view.box, view.fed)
                vlm.patchify(dark)
                hidden = torch.rand(len(dark.patches), 1, generator=generator) < share
                dark.patches.masked_fill_(hidden, 0)
                dark_views[id(view)] = dark
        out.append(replace(e, views=[dark_views[id(view)] for view in e.views]))
    return out


def sampler(vlm, cfg):
    """The VLM that samples: the policy, or with --sampler-dtype a copy in that precision."""
    if not cfg.sampler_dtype:
        return vlm
    model = copy.deepcopy(vlm.model)
    for p in model.parameters():                        # not the rotary frequencies
        p.data = p.data.to(getattr(torch, cfg.sampler_dtype))
    return type(vlm)(model, vlm.tokenizer, vlm.processor, vlm.name, vlm.spec)


def hand_over(episodes, sampler, vlm):
    """From a sampler of another precision to the trainer, which encodes the images by itself."""
    if sampler is vlm:
        return
    for kind, done in sampler.work.items():
        vlm.work[kind] += done
    for e in episodes:
        for view in e.views:
            view.drop_features()
