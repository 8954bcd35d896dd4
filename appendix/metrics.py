"""What a run reports: a row per step, the line on the screen, the summary and table at the end.

`GLOSSARY` says what every key of metrics.jsonl means; the report shows the same words.
"""
import math
import time
from dataclasses import dataclass

import torch

import data
import evaluate
import grpo
import zoom_rollout
from appendix import averages, evidence, ranks


# Where the evidence is known: shares of the held-out questions (appendix/evidence.py).
FAITHFULNESS = ("saw", "right_and_saw", "right_not_saw", "wrong_though_saw")

# --------------------------------------------------------------------------------------------------
# the glossary

@dataclass(frozen=True)
class Metric:
    """What a number of a run means."""
    meaning: str                # and, after a semicolon, its healthy range
    is_rate: bool = False       # it cannot leave 0 to 1, so its chart shows all of 0 to 1


def rate(meaning):
    return Metric(meaning, is_rate=True)


# The keys of metrics.jsonl. Means over episodes leave out the blind prompts, which may not zoom,
# unless they say otherwise; means over tokens leave out the groups without a signal.
GLOSSARY = {
    "step": Metric("number of the step, from 0 on"),

    # the episodes
    "reward": Metric("mean reward of an episode; should rise"),
    "accuracy": rate("share of right answers (for univg-r1: mean IoU); should rise"),
    "accuracy_blind": rate("accuracy where the model may not zoom; should stay at chance"),
    "format": rate("share of episodes whose turns follow the grammar; near 1 after the warm start"),
    "wrong_format": rate("share of answers that cannot be read; near 0"),
    "grounded": rate("share of turns whose thought names points, all inside the image; near 1"),
    "distinct": Metric("mean bonus for points at least 10 pixels apart"),
    "hit": rate("share of boxes whose IoU is 0.5 or more; should rise"),
    "iou": rate("mean IoU of box answers: overlap with the right box, by their union; should rise"),
    "easy": rate("share of box prompts whose group has a mean IoU above 0.7; should rise"),
    "medium": rate("share of box prompts whose group has a mean IoU from 0.3 to 0.7"),
    "hard": rate("share of box prompts whose group has a mean IoU below 0.3; should fall"),
    "curiosity": Metric("mean bonus for zooming while few episodes do (--curiosity)"),
    "evidence": Metric("mean bonus for crops that show what the answer depends on "
                       "(--evidence-bonus)"),
    "zoom_cost": Metric("mean cost of the crops (--zoom-cost)"),
    "overlong": Metric("mean penalty for coming close to the length limit (--overlong); near 0"),
    "length": Metric("sampled tokens per episode"),
    "zooms": Metric("crops per episode"),
    "saw": rate("share of episodes whose crops show what the answer depends on; should rise"),
    "valid_calls": rate("share of tool calls that led to a crop; near 1"),
    "clipped_ratio": rate("share of episodes cut off by --max-new-tokens; near 0"),

    # the groups
    "frac_zero_std": rate("share of groups whose advantages are all 0, blind ones included; rises "
                          "as the task is solved"),
    "weight": Metric("mean difficulty weight of a prompt"),
    "sampled": Metric("episodes that the step sampled, those that were replaced included"),
    "resampled": Metric("groups that dynamic sampling replaced; the means are over those kept"),

    # the update
    "clipfrac": rate("share of tokens whose gradient the clip stopped; 0 with one update per "
                     "batch"),
    "entropy": Metric("entropy of the policy in nats per token; falls slowly, not to 0"),
    "kl": Metric("KL penalty per token (0 without --kl-coef); small"),
    "perception": Metric("PAPO's KL to the policy that sees mostly black images; rises slowly"),
    "importance": Metric("mean weight of a token, trainer / sampler, cut off at --importance-cap "
                         "(--mismatch truncate); near 1"),
    "logp_gap": Metric("mean gap between the sampler's and the trainer's log-probabilities of the "
                       "same tokens; below 1e-4 in fp32, below 0.01 in bf16"),
    "logp_gap_max": Metric("largest such gap; below 1e-3 in fp32, about 0.1 in bf16"),
    "grad_norm": Metric("gradient norm before clipping, mean over the updates; 0 when no group had "
                        "a signal"),
    "skipped": Metric("updates that were not applied because a gradient was not finite; 0"),

    # the work, and what naive rollouts without a cache would have done
    "tokens_run": Metric("tokens that the rollouts of the step prefilled"),
    "tokens_naive": Metric("tokens prefilled if each turn sent the whole conversation again; far "
                           "above tokens_run"),
    "patches_run": Metric("image patches that the rollouts of the step encoded"),
    "patches_naive": Metric("patches encoded if each turn sent all images again; far above "
                            "patches_run"),
    "roll_tokens_per_s": Metric("sampled tokens per second of rollout, all ranks together"),
    "train_tokens_per_s": Metric("tokens (prompts included) trained on per second of update, all "
                                 "ranks together"),
    "share_rollout": rate("share of the step's time that sampled episodes; the largest"),
    "share_reward": rate("share of the step's time that scored them"),
    "share_reference": rate("share of the step's time that ran the reference model"),
    "share_update": rate("share of the step's time that went into loss, gradient and update"),
    "seconds": Metric("seconds of the step"),
}

# Numbers of summary.json that a table of the report shows. wrong_format is a count there.
SUMMARY_GLOSSARY = {
    "n": "questions that were scored; those whose right answer is hidden are left out",
    "chance": "the accuracy that is possible without looking at the image: by guessing an option, "
              "or by always giving the answer that is right most often, whichever is higher",
    "accuracy": "share of right answers, with its 95 % Wilson interval: the bar shows it from 0 "
                "to 100 %",
    "wrong_format": "answers that cannot be read; they count as wrong",
    "mean_iou": "mean IoU of box answers: overlap with the right box, divided by their union",
    "zooms": "crops per episode",
    "saw": "share of questions where the crops show what the answer depends on",
    "regions": "different regions that the steps of an episode name",
    "subgoals": "steps per episode that say what to do next and name a point",
    "verification": "steps per episode that look again at a region, or say that they check one",
    "backtracking": "steps per episode that turn to another region after words of correction",
    "pointing": "share of the points named that lie inside a box of the right answer",
}

# What each zoom mode of evaluate.MODES proves.
CONTROLS = {
    "on": "The model may zoom into points that it names: this is how it is meant to work.",
    "off": "Control: the model must answer at once, without a crop. What it loses here is what the "
           "zooms are worth; if it falls to chance, one look at the whole image does not suffice.",
    "black": "Control: the model zooms, but every crop is black. If it does no better than without "
             "zooms, it is the pixels of the crops that help, not the additional turns.",
    "wrong": "Control: every crop shows another place than the one called for: the object furthest "
             "from it or, where no objects are known, half the image away. If it does as well, it "
             "does not matter where it looks.",
}


def control_notes():
    """What each zoom mode proves -> {label of the mode: sentence}."""
    return {label: CONTROLS[mode] for mode, label in evaluate.MODES.items()}


# --------------------------------------------------------------------------------------------------
# one step

class StepLog:
    """Collects what happens during one step: seconds by part, sums over tokens, gradient norms."""

    def __init__(self, vlm, cfg, step):
        self.vlm = vlm
        self.cfg = cfg
        self.step = step
        self.last_lap = ranks.synchronized_time()
        self.seconds = {"rollout": 0.0, "reward": 0.0, "reference": 0.0, "update": 0.0}
        self.work_before = dict(vlm.work)
        self.rollout_work = {"tokens": 0, "patches": 0}     # prefilled, encoded
        self.sums = {"clipfrac": 0.0, "entropy": 0.0, "kl": 0.0}        # over tokens
        if cfg.papo_coef:
            self.sums["perception"] = 0.0
        if cfg.mismatch == "truncate":
            self.sums["importance"] = 0.0
        self.tokens = 0                                 # policy tokens that were trained on
        self.trained_tokens = 0                         # all tokens of the episodes trained on
        self.gap_sum = 0.0                              # of |sampler - trainer| log-probabilities
        self.gap_max = 0.0
        self.gap_tokens = 0
        self.grad_norms = []                            # one per optimizer step

    def lap(self, part):
        """Add the seconds since the last lap to a part of the step."""
        now = ranks.synchronized_time()
        self.seconds[part] += now - self.last_lap
        self.last_lap = now
        if part == "rollout":
            for kind, done in self.vlm.work.items():
                self.rollout_work[kind] = done - self.work_before[kind]

    def add(self, name, per_token):
        """Add a statistic (B, T) that is 0 where the policy did not choose the token."""
        self.sums[name] += per_token.sum().item()

    def add_micro_batch(self, episodes, logprobs, old_logprobs, mask, advantages):
        """Count tokens and clipped tokens.

        episodes: B; logprobs, old_logprobs, mask (B, T); advantages (B,).
        """
        cfg = self.cfg
        n = int(mask.sum())
        stats = grpo.stats(logprobs, old_logprobs, mask, cfg.clip_low, cfg.clip_high, advantages,
                           cfg.loss)
        self.sums["clipfrac"] += n * stats["clipfrac"]
        self.tokens += n
        self.trained_tokens += sum(len(e.ids) for e in episodes)

    def add_gap(self, logprobs, sampled_logprobs, mask):
        """The gap between trainer and sampler, (B, T) each, before the first update of the step."""
        if self.grad_norms:                             # the policy has moved since it sampled
            return
        gap = (logprobs.detach() - sampled_logprobs).abs()[mask]
        self.gap_sum += gap.sum().item()
        self.gap_max = max(self.gap_max, gap.max().item())
        self.gap_tokens += len(gap)


def step_metrics(log, batch, reward, advantages, weights):
    """The row of metrics.jsonl for one step: {name: number}, over all ranks. See GLOSSARY.

    batch is train_rl.Batch; reward and advantages are (P, G), weights is (P,). A mean is written as
    (sum, count); `ranks.reduce_ratios` adds both up over the ranks and divides.
    """
    cfg = log.cfg
    log.lap("update")                                   # everything since the last lap
    blind = batch.episodes[:batch.first_seeing]
    seeing = batch.episodes[batch.first_seeing:]
    num_blind = len(blind) // cfg.group_size            # prompts; they come first
    calls = [t for e in seeing for t in e.turns if "<tool_call>" in t.text]
    crops = sum(t.crop is not None for t in calls)
    components = seeing[0].reward_components

    row = {}
    row["step"] = log.step
    row["reward"] = reward[num_blind:].sum().item(), len(seeing)
    row["accuracy"] = component_mean(seeing, "accuracy")
    row["format"] = component_mean(seeing, "format")
    if "iou" in components:
        row |= difficulty_shares(group_means(seeing, "iou", cfg.group_size))
    # wrong_format, grounded, distinct, iou, curiosity, overlong; any part that a reader adds
    for name in components.keys() - row.keys() - {"hidden"}:
        row[name] = component_mean(seeing, name)
    if cfg.difficulty_weight != "none":
        row["weight"] = weights.sum().item(), len(weights)
    if cfg.resample:
        row["resampled"] = ranks.all_reduce([len(batch.dropped) // cfg.group_size])[0]
    if ranks.all_reduce([len(blind)])[0] > 0:           # on any rank: all must report the same keys
        row["accuracy_blind"] = component_mean(blind, "accuracy")
    row["length"] = sum(sum(e.completion_mask) for e in seeing), len(seeing)
    row["zooms"] = crops, len(seeing)
    if data.PROMPT_STYLES[cfg.recipe] == "zoom":
        seen = [evidence.saw(e) for e in seeing if evidence.saw(e) is not None]
        row["saw"] = sum(seen), len(seen)
    row["valid_calls"] = crops, len(calls)
    row["clipped_ratio"] = sum(e.finish_reason == "length" for e in seeing), len(seeing)
    row["frac_zero_std"] = (advantages == 0).all(1).sum().item(), len(advantages)
    add_update(row, log)
    add_work(row, log, batch)
    add_seconds(row, log, batch)
    return ranks.reduce_ratios(row)


def add_update(row, log):
    """What the update did, as means over the tokens that were trained on.

    These leave out groups without a signal, which are not run.
    """
    for name, value in log.sums.items():
        row[name] = value, log.tokens
    row["logp_gap"] = log.gap_sum, log.gap_tokens
    row["logp_gap_max"] = ranks.all_reduce([log.gap_max], op="MAX")[0]
    row["grad_norm"] = sum(log.grad_norms) / max(len(log.grad_norms), 1)
    row["skipped"] = sum(not math.isfinite(norm) for norm in log.grad_norms)


def add_work(row, log, batch):
    """Tokens prefilled and patches encoded: by our rollouts, and by naive ones without a cache."""
    naive = zoom_rollout.naive_work(log.vlm, batch.episodes + batch.dropped)
    share = 1 / ranks.world_size()                      # adds up to 1, so the ratio is the sum
    row["sampled"] = len(batch.episodes + batch.dropped), share
    for kind in ("tokens", "patches"):
        row[f"{kind}_run"] = log.rollout_work[kind], share
        row[f"{kind}_naive"] = naive[kind], share


def add_seconds(row, log, batch):
    """Speed, and the share of each part of the step in its time."""
    total_seconds = sum(log.seconds.values())
    sampled = sum(sum(e.completion_mask) for e in batch.episodes + batch.dropped)
    world = ranks.world_size()
    training = log.seconds["update"] + log.seconds["reference"]
    row["roll_tokens_per_s"] = sampled, log.seconds["rollout"] / world
    row["train_tokens_per_s"] = log.trained_tokens, training / world
    for part, seconds in log.seconds.items():
        row[f"share_{part}"] = seconds, total_seconds
    row["seconds"] = total_seconds


def component_mean(episodes, name):
    """Sum and count of a reward component."""
    return sum(e.reward_components[name] for e in episodes), len(episodes)


def group_means(episodes, name, group_size):
    """Mean of a reward component in each group -> tensor (P,)."""
    values = [float(e.reward_components[name]) for e in episodes]
    return torch.tensor(values).view(-1, group_size).mean(1)


def difficulty_shares(iou):
    """Mean IoU per group (P,) -> {level: (prompts, all prompts)}; figure 3 of UniVG-R1."""
    easy = iou > 0.7
    hard = iou < 0.3
    medium = ~easy & ~hard
    levels = {"easy": easy, "medium": medium, "hard": hard}
    return {name: (level.sum().item(), len(iou)) for name, level in levels.items()}


# --------------------------------------------------------------------------------------------------
# on the screen

class Clock:
    """Estimates how long the remaining steps will take, from the steps of this process."""

    def __init__(self, first_step, steps):
        self.began = time.time()
        self.first_step = first_step
        self.steps = steps

    def minutes_left(self, step):
        per_step = (time.time() - self.began) / (step + 1 - self.first_step)
        return per_step * (self.steps - step - 1) / 60


def log_line(row, steps, minutes_left):
    """What one watches, in at most 120 columns. The other metrics are in metrics.jsonl."""
    update = "SKIPPED" if row["skipped"] else f"{row['grad_norm']:.3g}"
    seconds_digits = 1 if row["seconds"] < 10 else 0
    minutes_digits = 1 if minutes_left < 10 else 0
    return (f"step {row['step'] + 1:3d}/{steps} reward {row['reward']:.3f} "
            f"acc {row['accuracy']:.2f} fmt {row['format']:.2f} | "
            f"len {row['length']:.0f} zooms {row['zooms']:.1f} "
            f"zero-std {row['frac_zero_std']:.0%} ent {row['entropy']:.2f} grad {update} | "
            f"{row['seconds']:.{seconds_digits}f} s, {minutes_left:.{minutes_digits}f} min left")


# --------------------------------------------------------------------------------------------------
# at the end

def summarise_run(before, after, held_out, curves, seconds):
    """The figures of summary.json. before, after: {zoom mode: evaluate.summarise(...)}."""
    on = after["on"]
    summary = {
        "seconds": round(seconds, 1),                   # of the whole run, warm start included
        "n": on["n"],                                   # held-out questions
        "accuracy_before": before["on"]["accuracy"],    # zoom allowed, before RL
        "accuracy_after": on["accuracy"],               # zoom allowed, after RL
        "low": on["low"],                               # 95 % interval of accuracy_after
        "high": on["high"],
        "chance": averages.chance(held_out),
        "zooms_per_episode": on["zooms"],
        **{name: on[name] for name in FAITHFULNESS if name in on},
        "logp_gap_max": max((row["logp_gap_max"] for row in curves), default=0.0),
    }
    if "off" in after:
        summary["accuracy_no_zoom"] = after["off"]["accuracy"]
        summary["accuracy_black_crop"] = after["black"]["accuracy"]
    if "wrong" in after:
        summary["accuracy_wrong_crop"] = after["wrong"]["accuracy"]
    if "mean_iou" in on:
        summary["mean_iou_before"] = before["on"]["mean_iou"]
        summary["mean_iou_after"] = on["mean_iou"]
    levels = {}
    for name, part in difficulty_levels(on).items():
        accuracy_before = before["on"]["categories"][name]["accuracy"]
        levels[name] = {"n": part["n"], "accuracy_before": accuracy_before,
                        "accuracy_after": part["accuracy"], "zooms": part["zooms"]}
    if levels:
        summary["levels"] = levels
    return summary


def difficulty_levels(summary):
    """The categories that hold only some of the questions: easy scenes of a mixed world, ..."""
    categories = summary["categories"]
    return {name: part for name, part in categories.items() if part["n"] < summary["n"]}


def print_results(before, after, summary, curves):
    """The table of held-out accuracies before and after RL."""
    on = after["on"]
    if curves:
        print_work(curves)
    print(f"\n{'held-out accuracy':22s}{'before RL':24s}after RL      "
          f"(95 % interval, n = {on['n']}, chance {summary['chance']:.0%})")
    for mode, part in after.items():
        label = evaluate.mode_label(mode, can_zoom=len(after) > 1)
        print(f"{label:22s}{interval(before[mode]):24s}{interval(part)}")
    for name, part in difficulty_levels(on).items():
        label = f"{name}, n = {part['n']}"
        print(f"  {label:20s}{interval(before['on']['categories'][name]):24s}{interval(part)}")
    if "saw" in on:
        print(f"after RL a crop showed what the answer depends on in {on['saw']:.1%}: "
              f"right and saw {on['right_and_saw']:.1%}, right without {on['right_not_saw']:.1%}, "
              f"wrong although seen {on['wrong_though_saw']:.1%}")
    if "mean_iou" in on:
        print(f"{'mean IoU':22s}{before['on']['mean_iou']:<24.3f}{on['mean_iou']:.3f}")


def interval(part):
    return f"{part['accuracy']:.1%} [{part['low']:.1%}, {part['high']:.1%}]"


def print_work(curves):
    """What the cache and the shared encodings saved, over all steps."""
    total = {}
    for key in ("tokens_run", "patches_run", "tokens_naive", "patches_naive"):
        total[key] = sum(row[key] for row in curves)
    print(f"rollouts prefilled {total['tokens_run']:,.0f} tokens and encoded "
          f"{total['patches_run']:,.0f} patches; sending everything again each turn, for each "
          f"member of a group, would have been {total['tokens_naive']:,.0f} and "
          f"{total['patches_naive']:,.0f}")
