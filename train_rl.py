"""The loop: a vision-language model learns, by GRPO, where to look, when to zoom, when to answer.

    python train_rl.py                           # tiny model, toy world, two CPU cores, minutes
    python train_rl.py --recipe univg-r1         # boxes across images, with that paper's settings
    python train_rl.py --model qwen2.5-vl-3b     # the same loop on a released model, one CUDA GPU
    python train_rl.py --data FILE.jsonl --model runs/sft/checkpoint --traces ""
    python train_rl.py --name NAME --resume      # continue runs/NAME (Ctrl-C saves)
    python train_rl.py --plain --traces oracle   # the chapters alone: plain cache, no tree search
    torchrun --nproc-per-node 8 train_rl.py --model qwen2.5-vl-3b       # eight GPUs, the same step

`train_step` is the whole algorithm: seven numbered blocks, the same seven as in the README.
Everything a run produces goes to runs/NAME: config.json, metrics.jsonl (one row per step),
episodes.jsonl (the best and the worst episode of every step), checkpoint/, and at the end
summary.json, held_out.jsonl (each held-out question: right or not) and report.html.

Left out of the papers, and why. By default: ViGoRL's 16 optimizer steps per batch of rollouts, its
dual clip and its reference model (later work finds no use for the last), and UniVG-R1's difficulty
weights; `--recipe` brings them back. Always: UniVG-R1's learning rate falls to 0, ours is constant.

Shapes:  P prompts   G episodes per prompt (the group)   B episodes of a micro-batch   T tokens
"""
import os
import random
import time
from dataclasses import dataclass, field, replace
from typing import Literal

import appendix                     # before torch: Ctrl-C is one line from here on
import torch

import data
import grpo
import rewards
import train_sft
import zoom_rollout
from appendix import faults, memory, metrics, mixture, ranks, recipes, rl_options, rl_run, run
from appendix.optimizer import AdamW
from appendix.weights import note_on_tiny


@dataclass
class Config:
    model: str = "tiny"         # name of a model (model.MODELS) or checkpoint folder
    name: str = "rl"            # name of the run; its folder is runs/NAME
    resume: bool = False        # continue from runs/NAME/checkpoint
    fresh: bool = False         # permission to overwrite an earlier run of this name
    seed: int = 0               # random seed for scenes, sampling and shuffling
    plain: bool = False         # plain cache and log-probabilities, no report page

    # the questions
    task: Literal[data.TASKS] = "search"                # toy task
    also: Literal["", *data.TASKS] = ""                 # toy task of every second question
    difficulty: Literal[data.DIFFICULTIES] = "medium"   # difficulty of the toy scenes
    data: str = ""              # JSONL file of questions, in place of the toy world
    images: str = ""            # image folder of --data (default: the folder of the file)
    recipe: Literal["", *recipes.PAPERS] = ""           # settings of a paper; empty: by task
    max_pixels: int = 0         # pixels of a prompt image as fed; 0: the model's default
    crop_from: Literal["source", "seen"] = "source"     # source of crops: stored image or fed copy

    # the warm start
    traces: str = "mcts"        # warm-start traces: see train_sft.py; "" for none
    sft_target: Literal["full", "answer", "ungrounded"] = "full"    # part learned of each trace
    sft_corrected: int = 0      # search chains per tree, at most, that go wrong first
    sft_n: int = 30             # warm-start traces from the toy world
    sft_epochs: int = 1         # passes over the traces
    sft_batch: int = 8          # traces per optimizer step of the warm start
    sft_lr: float = 5e-4        # peak learning rate of the warm start (ViGoRL at 3B: 1e-6)

    # the rollouts
    steps: int = 60             # RL steps
    max_episodes: int = 0       # sampled episodes after which RL ends, too; 0: no limit
    num_prompts: int = 16       # prompts per step (ViGoRL: 128)
    group_size: int = 8         # episodes per prompt
    blind_prompts: int = 2      # prompts per step that must answer without zooming
    max_zooms: int = 3          # crops per episode, after which an answer is forced
    template: bool = False      # first turn opened with a tool call, as a warm start (MGPO)
    max_new_tokens: int = 48    # tokens per turn (a released model: 512 or more)
    temperature: float = 1.0    # sampling temperature, also of the trainer's log-probabilities
    resample: int = 0           # rounds of dynamic sampling (DAPO: as many as it takes)
    sampler_dtype: Literal["", "bfloat16", "float16"] = ""  # precision of rollouts; "": as trained

    # the reward
    distinct_bonus: float = 0.0 # reward for each further distinct point (ViGoRL: 0.2)
    tool_bonus: float = 0.0     # reward for a right answer after a zoom (DeepEyes: 1.2)
    curiosity: float = 0.0      # reward for zooming while few do (Pixel-Reasoner: 0.5)
    overlong: int = 0           # tokens before the length limit that cost up to 1 (DAPO: 4096)
    evidence_bonus: float = 0.0 # reward for crops that show what the answer depends on
    zoom_cost: float = 0.0      # reward lost per crop
    reward_parts: str = ""      # components to be summed, as in "hit,format"; "": the recipe's
    control: Literal["", *rl_options.CONTROLS] = ""     # a reward without the right answer in it

    # the advantages
    advantage_scale: Literal["std", "none"] = "std"     # division by the group's std (GRPO) or none
    difficulty_weight: Literal[tuple(grpo.WEIGHTS)] = "none"    # weight of hard prompts (UniVG-R1)
    difficulty_normalize: bool = False                  # difficulty weights scaled to mean 1
    over_turn: Literal["train", "mask", "exclude"] = "train"    # use of cut episodes (Mini-o3)
    mask_negative: bool = False # advantages below 0 set to 0 (an option of ViGoRL's code)

    # the loss
    loss: Literal[tuple(grpo.LOSSES)] = "grpo"          # policy loss, see grpo.LOSSES
    clip_low: float = 0.2       # lower clip: no gradient below a ratio of 1 - clip_low if A < 0
    clip_high: float = 0.28     # upper clip: no gradient above a ratio of 1 + clip_high if A > 0
    aggregate: Literal[tuple(grpo.AGGREGATES)] = "token"    # unit of equal weight in the loss
    kl_coef: float = 0.0        # coefficient of the KL penalty (ViGoRL 0.01, UniVG-R1 0.04)
    kl: Literal[tuple(grpo.PENALTIES)] = "k3"           # KL estimator, see grpo.kl_penalty
    papo_coef: float = 0.0      # coefficient of PAPO's perception term (PAPO: 0.01 to 0.02)
    mismatch: Literal[rl_options.MISMATCH] = "ratio"    # use of the sampler's log-probabilities
    importance_cap: float = 2.0 # largest weight of a token with --mismatch truncate

    # the update
    num_minibatches: int = 1    # optimizer steps per batch of rollouts
    lr: float = 3e-4            # learning rate after the warm-up (papers at 3B to 7B: 1e-6)
    warmup_steps: int = 3       # steps in which the learning rate rises to lr (ViGoRL: 25)
    weight_decay: float = 0.0   # AdamW's weight decay (ViGoRL: 0.01)
    clip_grad: float = 1.0      # largest gradient norm

    # memory and speed; none of these changes a result
    max_batch_tokens: int = 262144  # cache slots of a rollout part (3B: 36 kB each)
    prefill_tokens: int = 16384 # tokens of prompts or observations in one forward pass
    compiled: bool = False      # compiled kernels while decoding (not yet run on a GPU)
    graphs: bool = False        # CUDA graphs while decoding (not yet run on a GPU)
    micro_tokens: int = 4096    # tokens per forward and backward pass
    recompute: bool = False     # recomputed layers in the backward pass: less memory, more time
    offload: bool = False       # optimizer state on the CPU: 12 bytes per parameter less on the GPU

    # the run
    eval_n: int = 200           # held-out questions, asked before and after in each zoom mode
    eval_wrong: bool = False    # a further zoom mode: crops of another object
    save_every: int = 10        # steps between checkpoints
    weights_only: bool = False  # checkpoints without the optimizer: 6 times smaller, no --resume
    device: str = "auto"        # device: cpu, cuda or cuda:1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # precision of the forward passes


# Fields that must be above 0.
POSITIVE = ("num_prompts", "group_size", "num_minibatches", "max_new_tokens", "temperature",
            "save_every", "sft_n", "sft_batch", "sft_epochs", "eval_n", "max_batch_tokens",
            "prefill_tokens", "micro_tokens", "importance_cap")


# --------------------------------------------------------------------------------------------------
# the step

def train_step(vlm, ref, optimizer, questions, cfg, step):
    """One step of GRPO.

    vlm is the policy, ref the frozen reference (None without a KL penalty).
    With several ranks each rank runs its share of the prompts, and the gradient is that of all.
    -> (row of metrics.jsonl, the episodes of this rank)
    """
    log = metrics.StepLog(vlm, cfg, step)

    # 1. sample prompts
    samples = questions.of_step(step)

    # 2. roll out: G episodes per prompt, those of a prompt side by side
    batch = roll_out(vlm, samples, cfg, step, log)

    # 3. reward: rules on the text, and on what the tool calls led to
    score_episodes(batch.episodes, cfg)
    dynamic_sampling(vlm, batch, questions, cfg, step, log)
    reward = stack(batch.episodes, "reward", cfg)                               # (P, G)
    accuracy = stack(batch.episodes, "accuracy", cfg)                           # (P, G)

    # 4. advantages: better or worse than the group's mean; hard prompts may count more
    counted = rl_options.counted_episodes(batch.episodes, cfg)      # bool (P, G); None: all count
    advantages = grpo.group_advantages(reward, cfg.advantage_scale, counted)    # (P, G)
    weights = prompt_weights(accuracy, cfg)                                     # (P,)
    advantages = advantages * weights[:, None]
    advantages = rl_options.mask_advantages(batch.episodes, advantages, cfg)    # a flag: some to 0
    store_advantages(batch.episodes, advantages, weights)

    # 5. loss: summed over micro-batches, divided by the count of the whole minibatch
    for minibatch in split_minibatches(batch, cfg, step):
        denominator = loss_denominator(minibatch, cfg)
        learned = with_gradient(minibatch, cfg)
        for micro_batch in vlm.micro_batches(learned, cfg.micro_tokens):
            loss = grpo_loss(vlm, ref, micro_batch, denominator, cfg, step, log)
            loss.backward()

        # 6. update: clip the gradient, one step of AdamW
        if any(ranks.gather([len(learned)])):           # else no rank has a gradient
            grad_norm = optimizer.step(learning_rate(cfg, step), cfg.clip_grad)
            log.grad_norms.append(grad_norm)

    # 7. log
    row = metrics.step_metrics(log, batch, reward, advantages, weights)
    return row, batch.episodes


@dataclass
class Batch:
    """The episodes of one step on this rank.

    First the groups of blind prompts, which may not zoom; then those of seeing prompts, which may.
    """
    episodes: list                                  # P * G, the episodes of a prompt side by side
    first_seeing: int                               # place of the first episode that may zoom
    prompt_numbers: list                            # (P,) place of each among all ranks' prompts
    dropped: list = field(default_factory=list)     # episodes that dynamic sampling replaced


# --------------------------------------------------------------------------------------------------
# 1. sample prompts

@dataclass
class Questions:
    """The training questions: drawn from the toy world, or rows of a file in a shuffled order."""
    cfg: Config
    side: int                                           # pixels of a side of a toy scene
    rows: list = field(default_factory=list)            # list[Sample] of --data

    def of_step(self, step, again=0):
        """The prompts of a step. again: the round of dynamic sampling; every round has others.

        again = 0: the prompts that the step starts with. The prompts depend on the seed, the step
        and the round only, so a resumed run asks the same questions.
        """
        cfg = self.cfg
        if not cfg.data:
            seed = f"rl{cfg.seed}/{step}"
            if again:
                seed += f"/{again}"
            return mixture.toy_questions(cfg, "train", cfg.num_prompts, seed, self.side)
        if again:
            rng = random.Random(f"{cfg.seed}/{step}/{again}")
            return rng.choices(self.rows, k=cfg.num_prompts)
        first = step * cfg.num_prompts
        return [self.row(i) for i in range(first, first + cfg.num_prompts)]

    def row(self, i):
        """The i-th row asked, counted over epochs, each of which has an order of its own."""
        epoch, place = divmod(i, len(self.rows))
        rng = random.Random(f"{self.cfg.seed}/{epoch}")
        order = rng.sample(range(len(self.rows)), len(self.rows))
        return self.rows[order[place]]


# --------------------------------------------------------------------------------------------------
# 2. roll out, 3. reward

def roll_out(vlm, samples, cfg, step, log):
    """G episodes for each of this rank's prompts -> Batch.

    The first prompts are blind: they must answer at once. Without this practice the policy could
    forget how to answer when an answer is forced.
    """
    num_blind = num_blind_prompts(cfg, len(samples))
    config = rl_run.rollout_config(cfg, rollout_seed(cfg, step))
    blind = roll_out_share(vlm, samples[:num_blind], cfg, replace(config, zoom="off"), 0)
    seeing = roll_out_share(vlm, samples[num_blind:], cfg, config, num_blind)
    log.lap("rollout")
    numbers = rank_share(range(num_blind)) + rank_share(range(num_blind, len(samples)))
    return Batch(blind + seeing, len(blind), numbers)


def roll_out_share(vlm, samples, cfg, config, first):
    """G episodes for each of this rank's share of the samples. first: their place in the step."""
    share = ranks.shard(len(samples))
    if not samples[share]:
        return []
    return sample_groups(vlm, samples[share], cfg, config, first + share.start)


def sample_groups(vlm, samples, cfg, config, first):
    """G episodes for each sample -> list[Episode]. first: place of samples[0] in the step."""
    sampler = rl_options.sampler(vlm, cfg)              # the policy, or a copy of less precision
    episodes = zoom_rollout.rollout(sampler, samples, cfg.group_size, config, first_sample=first)
    rl_options.hand_over(episodes, sampler, vlm)
    return episodes


def rank_share(things):
    """This rank's share of a sequence -> list."""
    return list(things[ranks.shard(len(things))])


def num_blind_prompts(cfg, num_prompts):
    """How many prompts of a step may not zoom: 0 if no other prompts would be left."""
    can_zoom = data.PROMPT_STYLES[cfg.recipe] == "zoom"
    return cfg.blind_prompts if can_zoom and num_prompts > cfg.blind_prompts else 0


def score_episodes(episodes, cfg):
    """Fill `reward_components` of whole groups: the recipe's rules, then what flags add to them."""
    bonuses = rewards.Bonuses(distinct=cfg.distinct_bonus, tool=cfg.tool_bonus)
    for e in episodes:
        e.reward_components = rewards.score(
            e.sample, e.text, e.turns, cfg.recipe, e.frames, cfg.max_zooms, bonuses)
    rl_options.choose_parts(episodes, cfg)
    rl_options.add_group_bonuses(episodes, cfg, episode_limit(cfg))
    rl_options.replace_by_control(episodes, cfg)


def dynamic_sampling(vlm, batch, questions, cfg, step, log):
    """Replace groups whose rewards are all equal by groups of fresh prompts, in place.

    DAPO (2503.14476, section 3.2), with at most cfg.resample rounds. Blind groups stay. Over all
    ranks, the k-th such group gets the k-th fresh prompt, as in a single process.
    """
    log.lap("reward")                                   # the time of scoring ends here
    G = cfg.group_size
    for again in range(1, cfg.resample + 1):
        dull = []                                       # place of each such group's first episode
        for first in range(batch.first_seeing, len(batch.episodes), G):
            group = batch.episodes[first:first + G]
            if len({e.reward_components["reward"] for e in group}) == 1:
                dull.append(first)
        counts = ranks.gather([len(dull)])
        if sum(counts) == 0:
            break
        before = sum(counts[:ranks.rank()])             # such groups of the ranks before this one
        prompts = questions.of_step(step, again)[before:before + len(dull)]
        if not prompts:                                 # but another rank may have such groups,
            continue                                    # and all ranks must call gather again
        dull = dull[:len(prompts)]
        for first in dull:
            for e in batch.episodes[first:first + G]:
                e.views = []                            # features are large and not needed
        config = rl_run.rollout_config(cfg, rollout_seed(cfg, step) + again * 10 ** 9)
        new = sample_groups(vlm, prompts, cfg, config, before)
        score_episodes(new, cfg)
        for k, first in enumerate(dull):
            batch.dropped += batch.episodes[first:first + G]
            batch.episodes[first:first + G] = new[k * G:(k + 1) * G]
    log.lap("rollout")


def rollout_seed(cfg, step):
    return cfg.seed * 1_000_003 + step


def stack(episodes, component, cfg):
    """One reward component of all episodes -> tensor (P, G)."""
    values = [float(e.reward_components[component]) for e in episodes]
    return torch.tensor(values).view(-1, cfg.group_size)


# --------------------------------------------------------------------------------------------------
# 4. advantages, 5. loss, 6. update

def prompt_weights(accuracy, cfg):
    """UniVG-R1's difficulty weight of each of this rank's prompts, (P, G) -> (P,).

    Normalising needs the prompts of all ranks, so the weights are computed for all of them.
    """
    first = sum(ranks.gather([len(accuracy)])[:ranks.rank()])
    accuracy_of_all = torch.tensor(ranks.gather(accuracy.tolist()))
    weights = grpo.difficulty_weights(
        accuracy_of_all, cfg.difficulty_weight, cfg.difficulty_normalize)
    return weights[first:first + len(accuracy)]


def store_advantages(episodes, advantages, weights):
    """Fill `advantage` of every episode from the tensor (P, G), `difficulty_weight` from (P,)."""
    of_episodes = weights[:, None].expand_as(advantages)                        # (P, G)
    for e, advantage in zip(episodes, advantages.flatten().tolist()):
        e.advantage = advantage
    for e, weight in zip(episodes, of_episodes.flatten().tolist()):
        e.difficulty_weight = weight


def split_minibatches(batch, cfg, step):
    """This rank's episodes in cfg.num_minibatches random parts.

    The shuffle is over the episodes of all ranks, so the number of ranks does not change the parts.
    """
    own = {}                                            # {place among all ranks' episodes: episode}
    for i, e in enumerate(batch.episodes):
        prompt, member = divmod(i, cfg.group_size)
        own[batch.prompt_numbers[prompt] * cfg.group_size + member] = e
    order = sorted(ranks.gather(list(own)))
    order = random.Random(f"{cfg.seed}/{step}").sample(order, len(order))
    parts = []
    for m in range(cfg.num_minibatches):
        places = order[m::cfg.num_minibatches]
        parts.append([own[place] for place in places if place in own])
    return parts


def with_gradient(minibatch, cfg):
    """The episodes that need a forward pass: the loss of the others has no gradient.

    An advantage of 0 (all of a group with equal rewards) leaves the policy loss no gradient. A KL
    or perception term has a gradient on every episode.
    """
    if cfg.kl_coef > 0 or cfg.papo_coef > 0:
        return minibatch
    return [e for e in minibatch if e.advantage != 0]


def loss_denominator(minibatch, cfg):
    """What the loss of a minibatch is divided by, counted over all ranks. See grpo.aggregate.

    Episodes without a gradient count too: the fewer groups have one, the smaller the gradient.
    """
    if cfg.aggregate == "token":
        count = sum(sum(e.completion_mask) for e in minibatch)
    elif cfg.aggregate == "sequence":
        count = len(minibatch)
    else:
        count = len(minibatch) * episode_limit(cfg)
    return ranks.all_reduce([count])[0]


def grpo_loss(vlm, ref, micro_batch, denominator, cfg, step, log):
    """The GRPO loss of a micro-batch of B episodes -> scalar tensor. Statistics go to `log`."""
    logprobs, entropy, mask = vlm.logprobs(micro_batch, cfg.temperature)        # (B, T) each
    sampled_logprobs = sampler_logprobs(micro_batch, logprobs)                  # (B, T)
    old_logprobs = sampled_logprobs if cfg.mismatch == "ratio" else logprobs.detach()
    advantages = [e.advantage for e in micro_batch]
    advantages = torch.tensor(advantages, device=logprobs.device)               # (B,)

    per_token = grpo.policy_loss(
        logprobs, old_logprobs, advantages, mask, cfg.clip_low, cfg.clip_high, cfg.loss)
    if cfg.mismatch == "truncate":
        weights = grpo.importance_weights(logprobs, sampled_logprobs, mask, cfg.importance_cap)
        per_token = weights * per_token
        log.add("importance", weights)
    if cfg.kl_coef > 0:
        log.lap("update")                               # the reference is timed by itself
        with torch.no_grad():
            ref_logprobs = ref.logprobs(micro_batch, cfg.temperature)[0]
        log.lap("reference")
        penalty = grpo.kl_penalty(logprobs, ref_logprobs, cfg.kl, mask, sampled_logprobs)
        per_token = per_token + cfg.kl_coef * penalty
        log.add("kl", penalty)
    if cfg.papo_coef > 0:
        blindfolded = rl_options.blindfold(vlm, micro_batch, step)
        blindfolded_logprobs = vlm.logprobs(blindfolded, cfg.temperature)[0]
        gain = grpo.perception(logprobs, blindfolded_logprobs, mask)
        per_token = per_token - cfg.papo_coef * gain
        log.add("perception", gain)

    log.add("entropy", entropy)
    log.add_gap(logprobs, sampled_logprobs, mask)
    log.add_micro_batch(micro_batch, logprobs, old_logprobs, mask, advantages)
    return grpo.aggregate(per_token, mask, cfg.aggregate, denominator)


def sampler_logprobs(episodes, like):
    """The log-probabilities with which the tokens were sampled, padded -> (B, T).

    The ratio is divided by them, because they are of the distribution that was really sampled from.
    """
    out = torch.zeros_like(like)
    for b, e in enumerate(episodes):
        out[b, :len(e.ids)] = torch.tensor(e.logprobs)
    return out


def learning_rate(cfg, step):
    """Linear warm-up over the first steps, then constant."""
    return cfg.lr * min(1, (step + 1) / max(1, cfg.warmup_steps))


def episode_limit(cfg):
    """Tokens that an episode may sample at most."""
    can_zoom = data.PROMPT_STYLES[cfg.recipe] == "zoom"
    return cfg.max_new_tokens * (1 + cfg.max_zooms * can_zoom)


# --------------------------------------------------------------------------------------------------
# the run around the steps

def check(cfg):
    """Settings that contradict each other end the program."""
    rl_run.check_config(cfg, num_blind_prompts(cfg, cfg.num_prompts))
    rl_options.check_options(cfg, episode_limit(cfg))


def main():
    began = time.time()
    ranks.start()
    cfg = run.parse_config(Config, description=__doc__, presets=recipes.presets, positive=POSITIVE)
    cfg = replace(cfg, recipe=train_sft.recipe_of(cfg))
    folder = run.make_dir(rl_run.run_folder(cfg))
    run.lock(folder)
    if not cfg.resume:
        run.refuse_to_overwrite(folder, rl_run.RESULTS, cfg.fresh, "continue it with --resume, ")
    check(cfg)
    rows = data.read_jsonl(cfg.data, cfg.images or None) if cfg.data else []
    sizes = faults.check_samples(rows)                  # of the images
    note_on_tiny(cfg.model, rows, "train_rl.py")
    state = rl_run.resumable(os.path.join(folder, "checkpoint"), cfg) if cfg.resume else None
    vlm = rl_run.load_policy(cfg)
    rl_run.check_disk(vlm, cfg)
    held_out, train_rows = rl_run.split(cfg, vlm.toy_side, rows)
    plan = rl_run.memory_plan(vlm, cfg, held_out + train_rows, sizes)
    questions = Questions(cfg, vlm.toy_side, train_rows)

    if cfg.resume:
        progress = rl_run.Progress(state["step"], state["seconds"], state["before"],
                                   sampled=state.get("sampled", 0))
    else:
        rl_run.fine_tune_on_traces(vlm, train_rows, held_out, cfg)
        measured = rl_run.measure_before(vlm, cfg, held_out)
        before = {mode: measurement.summary for mode, measurement in measured.items()}
        sections = [("before RL", measured["on"].episodes)]
        progress = rl_run.Progress(before=before, sections=sections)
    ref = rl_run.load_reference(vlm, cfg)
    optimizer = AdamW(vlm.parameters(), cfg.lr, weight_decay=cfg.weight_decay, offload=cfg.offload)
    run_log = rl_run.RunLog(vlm, optimizer, cfg, progress, began)
    run_log.begin(held_out)

    groups = []                                         # of the report: [(step, its episodes)]
    for step in range(progress.step, cfg.steps):
        if run_log.is_over(step):
            break
        row, episodes = train_step(vlm, ref, optimizer, questions, cfg, step)
        rl_run.stop_if_nothing_succeeds(episodes, step)
        run_log.stop_if_not_finite(episodes, step)
        run_log.write(row, episodes)
        groups = rl_run.groups_to_show(groups, step, episodes, cfg)
        del episodes                                    # their features go before the next rollout
        if run_log.stops_after(row):
            return
    rl_run.finish(vlm, held_out, run_log, groups, plan["peak"])


if __name__ == "__main__":
    KNOBS = "; ".join(memory.KNOBS.values())
    SAVED = "the run's checkpoint folder, if there is one, holds what was saved last"
    with run.exit_on_error(out_of_memory=f"{KNOBS}. Then --resume",
                           interrupted=f"interrupted; {SAVED}", saved=SAVED):
        main()
