"""The loop: a vision-language model learns, by GRPO, where to look, when to zoom and when to answer.

    python train_rl.py                              # tiny model, toy world, two CPU cores, minutes: warm start, RL, report
    python train_rl.py --recipe univg-r1            # boxes across images, with that paper's settings (PAPERS below)
    python train_rl.py --model qwen2.5-vl-3b        # the same loop on the real model, one CUDA GPU
    python train_rl.py --data FILE.jsonl --model runs/sft/checkpoint --traces ""
    python train_rl.py --name NAME --resume         # go on where runs/NAME stopped (Ctrl-C saves)
    torchrun --nproc-per-node 8 train_rl.py --model qwen2.5-vl-3b       # eight GPUs: the same step, sooner

A step has seven parts, numbered here and in the README: 1 sample prompts, 2 roll out, 3 reward, 4 advantages, 5 loss,
6 update, 7 log. Everything is kept in runs/NAME: config.json, metrics.jsonl (a row per step), episodes.jsonl (some
rollouts of every step), checkpoint/, and at the end summary.json and report.html.

Left out of the papers, and why. By default: 16 optimizer steps per batch of rollouts, dual clip and a reference model (ViGoRL;
later work finds no use for the last), difficulty weights (UniVG-R1); `--recipe` brings them back. At all: UniVG-R1's learning
rate falls to 0, ours is constant; rollouts cut at the length limit train there, and here unless --over-turn says otherwise.
"""
import json, os, random, signal, time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

import data, evaluate, grpo, model, rewards, train_sft, zoom_rollout


@dataclass
class Config:
    model: str = "tiny"             # a name of model.MODELS or a checkpoint folder
    name: str = "rl"                # the run: everything goes to runs/NAME
    resume: bool = False            # go on from runs/NAME/checkpoint
    seed: int = 0                   # of scenes, rollouts and order

    task: Literal[data.TASKS] = "search"        # toy task
    difficulty: Literal[data.DIFFICULTIES] = "medium"     # of the toy world
    data: str = ""                  # JSONL of questions instead of the toy world
    images: str = ""                # folder of the images of --data (default: the file's own)
    recipe: Literal["", "vigorl-zoom", "vigorl", "univg-r1"] = ""       # prompt, reward, the paper's settings; empty: the first two as suit the task
    max_pixels: int = 0             # of a prompt image as fed; 0: the model's default (448 x 448 for a real model in the toy world)
    crop_from: Literal["source", "seen"] = "source"     # what a zoom cuts from: the stored image, or the shrunken copy (ViGoRL)

    traces: str = "mcts"            # warm start: "mcts" (tree search by the policy itself), "oracle" (knows the toy world), a JSONL file, or "" for none
    sft_n: int = 1200               # traces of the toy world
    sft_epochs: int = 1             # passes over them
    sft_batch: int = 8              # traces per optimizer step
    sft_lr: float = 5e-4            # peak learning rate of the warm start (ViGoRL on a 3B: 1e-6)

    steps: int = 60                 # RL steps
    num_prompts: int = 16           # prompts per step (ViGoRL: 128)
    group_size: int = 8             # rollouts per prompt
    blind_prompts: int = 2          # of them, that many may not zoom and must answer at once (0 where there are not more prompts than that)
    num_minibatches: int = 1        # optimizer steps per batch of rollouts; beyond 1 the clip begins to matter
    lr: float = 3e-4                # constant after 3 steps of warm-up (papers, at 3B-7B: 1e-6)
    clip_grad: float = 1.0          # largest gradient norm
    max_zooms: int = 3              # crops per episode; then an answer is forced
    max_new_tokens: int = 48        # per turn (a real model: 512 or more)
    temperature: float = 1.0        # of sampling, and of the trainer's log-probabilities
    distinct_bonus: float = 0.0     # ViGoRL pays 0.2 for every extra distinct point; this world needs no push to look around
    tool_bonus: float = 0.0         # paid where the answer is right and a zoom led to it (DeepEyes: 1.2)
    curiosity: float = 0.0          # paid to those who zoom while few of their group do (Pixel-Reasoner: 0.5)
    overlong: int = 0               # the last so many tokens of the limit cost up to 1 (DAPO: 4096 of 20480)
    resample: int = 0               # rounds of fresh prompts in place of groups whose rewards are all equal (DAPO: until none is left)

    advantage_scale: Literal["std", "none"] = "std"     # divide by the group's std (GRPO) or not (Dr. GRPO)
    difficulty_weight: Literal[tuple(grpo.WEIGHTS)] = "none"        # hard prompts count more (UniVG-R1)
    difficulty_normalize: bool = False                  # scale these weights to mean 1: the control for a larger step
    over_turn: Literal["train", "mask", "exclude"] = "train"        # cut off by a limit: as all, advantage 0, or not in mean and std either (Mini-o3)
    mask_negative: bool = False     # learn from what went better than the mean alone (an option of ViGoRL's code)
    loss: Literal[tuple(grpo.LOSSES)] = "grpo"          # the policy loss, see grpo.py
    clip_low: float = 0.2           # ratio below 1 - clip_low gets no gradient (if A < 0)
    clip_high: float = 0.28         # ratio above 1 + clip_high gets no gradient (if A > 0)
    aggregate: Literal[tuple(grpo.AGGREGATES)] = "token"            # what weighs the same: a token (DAPO, Dr. GRPO) or an episode (GRPO)
    kl_coef: float = 0.0            # pull towards the warm start (ViGoRL 0.01, UniVG-R1 0.04); 0 needs no reference model
    kl: Literal[tuple(grpo.PENALTIES)] = "k3"           # see grpo.kl_penalty for the gradient each really has
    papo_coef: float = 0.0          # answers should be unlikely where most of the image is black (PAPO 0.01-0.02); a second forward pass

    max_batch_tokens: int = 262144  # of the rollout's cache (3B: 36 kB each); more is run in parts, with the same result
    graphs: bool = False            # decode with CUDA graphs (not yet run on a GPU; no use on a CPU)
    micro_tokens: int = 4096        # tokens per forward and backward pass: memory and speed (a CPU's caches), the gradient does not change
    recompute: bool = False         # recompute each layer in the backward pass: a third more time, a fraction of the memory
    offload: bool = False           # optimizer (masters, moments) on the CPU: 12 bytes per parameter less on the GPU
    eval_n: int = 200               # held-out questions, asked before and after, in three zoom modes
    save_every: int = 10            # steps between checkpoints
    device: str = "auto"            # cpu, cuda, cuda:1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"      # of the forward passes; updates are kept in fp32


# Other defaults for models that are not tiny. Papers: ViGoRL 1e-6 for both, 128 prompts of 5 episodes on eight GPUs.
REAL = dict(traces="oracle", num_prompts=8, blind_prompts=1, max_new_tokens=512, lr=1e-6, sft_lr=5e-6, micro_tokens=16384, recompute=True)

# What --recipe sets: the papers' settings where they differ from Config's. The second dict goes with 3B to 7B parameters: a tiny model
# keeps its own step size and lengths. Sources: ViGoRL tables A2, A3 and its script; UniVG-R1's script and trainer.
PAPERS = {
    "vigorl": (dict(task="relation", group_size=5, loss="dual-clip", kl_coef=0.01),
               dict(num_prompts=128, num_minibatches=2, steps=500, lr=1e-6, sft_lr=1e-6, max_new_tokens=2048)),
    "vigorl-zoom": (dict(task="search", blind_prompts=0, distinct_bonus=0.2, loss="dual-clip", kl_coef=0.01),
                    dict(num_prompts=128, num_minibatches=16, steps=500, lr=1e-6, sft_lr=1e-6, clip_grad=0.2, max_zooms=4, max_new_tokens=1024)),
    "univg-r1": (dict(task="boxes", difficulty="mixed", steps=150, difficulty_weight="exp", clip_high=0.2, aggregate="sequence", kl_coef=0.04),
                 dict(num_prompts=16, steps=625, lr=1e-6, sft_lr=5e-6, max_new_tokens=256)),
}


POSITIVE = ("num_prompts", "group_size", "num_minibatches", "max_new_tokens", "temperature", "save_every", "sft_n", "sft_batch", "sft_epochs",
            "eval_n", "max_batch_tokens", "micro_tokens")
FREE = ("resume", "steps", "name", "save_every", "max_batch_tokens", "graphs", "micro_tokens", "recompute", "offload")      # may differ from the run that is resumed
PATIENCE = 5                        # steps in a row without a finite gradient, then the run stops


def presets(cfg):
    """Defaults that depend on what was asked for: a run that is resumed keeps its settings, a recipe and a real model have their own,
    and a real model's own questions have no warm start: who has traces of them names the file."""
    if cfg.resume:
        model.settle(checkpoint := os.path.join("runs", cfg.name, "checkpoint"))
        return {k: v for k, v in saved_state(checkpoint)["config"].items() if k not in ("resume", "name")}
    algorithm, scale = PAPERS.get(cfg.recipe, ({}, {}))
    defaults = train_sft.searchable(cfg) | algorithm if model.is_tiny(cfg.model) else REAL | algorithm | scale
    return defaults | ({"traces": ""} if cfg.data and "traces" in defaults else {})      # there the oracle knows nothing


def questions(cfg, vlm, step, again=0):
    """The prompts of a step. They depend on (seed, step) only, so a resumed run asks what the unbroken one would have. again: the
    round of resampling, which asks for others."""
    if not cfg.data:
        seed = f"rl{cfg.seed}/{step}" + (f"/{again}" if again else "")
        return data.toy(cfg.task, "train", cfg.num_prompts, seed, cfg.difficulty, vlm.toy_side)
    rows, out = cfg.rows, []
    if again:
        return random.Random(f"{cfg.seed}/{step}/{again}").choices(rows, k=cfg.num_prompts)
    for i in range(step * cfg.num_prompts, (step + 1) * cfg.num_prompts):
        epoch, at = divmod(i, len(rows))
        out.append(rows[random.Random(f"{cfg.seed}/{epoch}").sample(range(len(rows)), len(rows))[at]])
    return out


def train_step(vlm, ref, optimizer, samples, cfg, step):
    """Steps 2 to 6 for one batch of prompts -> (metrics, episodes). `samples` is step 1, the log line step 7. Of several ranks
    each takes its share of the prompts; what `model.total` adds up makes the gradient that of the whole step."""
    began, G, work = model.clock(), cfg.group_size, dict(vlm.work)

    # 2. roll out: G episodes per prompt, all of prompt 0 first
    def roll(samples, zoom):
        mine = model.mine(len(samples))
        return zoom_rollout.rollout(vlm, samples[mine], G, seed=cfg.seed * 1_000_003 + step, zoom=zoom, skip=mine.start,
                                    **rollout_options(cfg)) if samples[mine] else []
    blind = blind_prompts(cfg, len(samples))                              # without a zoom: to answer when told to must stay learned
    unseeing, seeing = roll(samples[:blind], "off"), roll(samples[blind:], "on")
    episodes, P = unseeing + seeing, (len(unseeing) + len(seeing)) // G
    rolling = model.clock() - began

    # 3. reward: rules on the text and on what the calls led to
    score(episodes, cfg)
    scored = model.clock()
    dropped = refill(vlm, episodes, len(unseeing), cfg, step)
    rolling, work = rolling + model.clock() - scored, {k: v - work[k] for k, v in vlm.work.items()}
    seeing = episodes[len(unseeing):]
    of_each = lambda f: torch.tensor([float(f(e)) for e in episodes]).view(P, G)
    per_group = lambda part: of_each(lambda e: e.parts[part])
    reward, accuracy = per_group("reward"), per_group("accuracy")
    if cfg.curiosity:
        reward = reward + grpo.curiosity(of_each(lambda e: sum(t.crop is not None for t in e.turns)), cfg.curiosity)
    if cfg.overlong:
        reward = reward + grpo.overlong(of_each(lambda e: sum(e.sampled)), longest(cfg), cfg.overlong)
    rewarded = model.clock()
    if step == 0 and not model.total(int((accuracy > 0).sum()))[0]:
        model.fail(f"none of the {len(samples) * G} rollouts of the first step has any success, so there is nothing to reinforce (each group's "
                   f"advantages are 0). Mean format {per_group('format').mean():.2f}. Warm-start on traces (--traces), or take easier questions.")

    # 4. advantages: better or worse than the group's mean; hard prompts may count more
    first, of_all = sum(model.gather([P])[:model.rank()]), torch.tensor(model.gather(accuracy.tolist()))    # of all ranks, (P, G)
    weight = grpo.difficulty_weights(of_all, cfg.difficulty_weight, cfg.difficulty_normalize)[first:first + P]       # (P,)
    finished = of_each(lambda e: e.stop == "answer" and not (e.turns[-1].forced and len(e.turns) > 1)).bool()
    advantages = grpo.group_advantages(reward, cfg.advantage_scale, finished if cfg.over_turn == "exclude" else None)
    advantages = advantages * weight[:, None]                                                           # (P, G)
    if cfg.over_turn == "mask":
        advantages = advantages * finished
    if cfg.mask_negative:
        advantages = advantages.clamp(min=0)
    for e, a in zip(episodes, advantages.flatten().tolist()):
        e.advantage = a

    # 5. loss, over micro-batches; a group of equal rewards has no gradient (without a KL term) and is not run at all
    asked = [p for of in (range(blind), range(blind, len(samples))) for p in of[model.mine(len(of))]]               # this rank's prompts
    number = [p * G + g for p in asked for g in range(G)]                                # of its episodes among those of all ranks
    learn = {i: e for i, e in zip(number, episodes) if e.advantage != 0 or cfg.kl_coef > 0 or cfg.papo_coef > 0}
    order = sorted(model.gather(list(learn)))
    order = random.Random(step).sample(order, len(order))
    log = {"clipfrac": 0.0, "entropy": 0.0, "kl": 0.0, "kl_samp": 0.0, **({"perception": 0.0} if cfg.papo_coef else {})}
    norms, tokens, gap, reference = [], 0, 0.0, 0.0
    for m in range(cfg.num_minibatches):
        batch = [learn[i] for i in order[m::cfg.num_minibatches] if i in learn]
        count, = model.total({"token": sum(sum(e.sampled) for e in batch), "sequence": len(batch),      # of the whole minibatch
                              "constant": len(episodes) / cfg.num_minibatches * longest(cfg)}[cfg.aggregate])
        for part in vlm.micro_batches(batch, cfg.micro_tokens):
            logprobs, entropy, mask = vlm.logprobs(part, cfg.temperature)                               # (B, T) each
            # The ratio's denominator is the sampler's own log-probability: it is the distribution that was sampled from.
            old = torch.zeros_like(logprobs)
            for b, e in enumerate(part):
                old[b, :len(e.ids)] = torch.tensor(e.logprobs)
            A = torch.tensor([e.advantage for e in part], device=logprobs.device)                       # (B,)
            per_token = grpo.policy_loss(logprobs, old, A, mask, cfg.clip_low, cfg.clip_high, cfg.loss)
            if cfg.kl_coef > 0:
                since = model.clock()
                with torch.no_grad():
                    ref_logprobs = ref.logprobs(part, cfg.temperature)[0]
                reference += model.clock() - since
                penalty = grpo.kl_penalty(logprobs, ref_logprobs, cfg.kl, mask, old)
                per_token = per_token + cfg.kl_coef * penalty
                log["kl"] += penalty.sum().item()
            if cfg.papo_coef > 0:
                gain = grpo.perception(logprobs, vlm.logprobs(blindfold(vlm, part, step), cfg.temperature)[0], mask)
                per_token = per_token - cfg.papo_coef * gain
                log["perception"] += gain.sum().item()
            grpo.aggregate(per_token, mask, cfg.aggregate, count).backward()
            n = int(mask.sum())
            log["clipfrac"] += n * grpo.stats(logprobs, old, mask, cfg.clip_low, cfg.clip_high, A, cfg.loss)["clipfrac"]
            log["entropy"] += entropy.sum().item()
            if m == 0:                                                     # before any update: the gap is the sampler's alone
                difference = (logprobs.detach() - old).abs()[mask]
                log["kl_samp"] += difference.sum().item() * cfg.num_minibatches
                gap = max(gap, difference.max().item())
            tokens += n

        # 6. update
        if count:
            norms.append(optimizer.step(cfg.lr * min(1, (step + 1) / 3), cfg.clip_grad))
    done = model.clock()

    calls = [t for e in seeing for t in e.turns if "<tool_call>" in t.text]      # what is logged is about those that may zoom
    mean = lambda part, of=seeing: (sum(e.parts[part] for e in of), len(of))
    return model.ratios({
        "step": step, "reward": (reward[len(unseeing) // G:].sum().item(), len(seeing)), "accuracy": mean("accuracy"), "format": mean("format"),
        **(shares(per_group("iou")[len(unseeing) // G:].mean(1)) if "iou" in seeing[0].parts else {}),
        **{part: mean(part) for part in ("grounded", "distinct", "iou") if part in seeing[0].parts},
        **({"weight": (weight.sum().item(), P)} if cfg.difficulty_weight != "none" else {}), **({"resampled": model.total(len(dropped) // G)[0]} if cfg.resample else {}),
        **({"accuracy_blind": mean("accuracy", unseeing)} if blind else {}),
        "length": (sum(sum(e.sampled) for e in seeing), len(seeing)), "zooms": (sum(t.crop is not None for t in calls), len(seeing)),
        "valid_calls": (sum(t.crop is not None for t in calls), len(calls)), "cut": (sum(e.stop == "length" for e in seeing), len(seeing)),
        "no_signal": ((advantages == 0).all(1).sum().item(), P),
        **{k: (v, tokens) for k, v in log.items()}, "kl_samp_max": model.total(gap, op="MAX")[0], "grad_norm": sum(norms) / max(len(norms), 1),
        "skipped": sum(not n < float("inf") for n in norms),
        **{f"{k}_{how}": (v, 1 / model.world()) for how, of in (("run", work), ("naive", zoom_rollout.naive_work(vlm, episodes + dropped))) for k, v in of.items()},
        "roll_tokens_per_s": (sum(sum(e.sampled) for e in episodes + dropped), rolling / model.world()),
        "train_tokens_per_s": (sum(len(e.ids) for e in learn.values()), (done - rewarded) / model.world()),
        "share_rollout": (rolling, done - began), "share_reward": (rewarded - began - rolling, done - began),
        "share_reference": (reference, done - began), "share_update": (done - rewarded - reference, done - began),
        "seconds": done - began}), episodes


def blind_prompts(cfg, prompts):
    """How many of a step's prompts may not zoom."""
    return cfg.blind_prompts if data.STYLES[cfg.recipe] == "zoom" and prompts > cfg.blind_prompts else 0


def score(episodes, cfg):
    for e in episodes:
        e.parts = rewards.score(e.sample, e.text, e.turns, cfg.recipe, e.frames, cfg.max_zooms, distinct_bonus=cfg.distinct_bonus,
                                tool_bonus=cfg.tool_bonus)


def refill(vlm, episodes, first, cfg, step):
    """DAPO's dynamic sampling (2503.14476, section 3.2), with a bound: from episode `first` on, groups whose rewards are all equal
    give way to groups of fresh prompts (in place), in at most cfg.resample rounds. Of several ranks each takes the fresh prompts
    that its groups would get in a single process. -> the episodes that gave way"""
    G, dropped = cfg.group_size, []
    for again in range(1, cfg.resample + 1):
        dull = [i for i in range(first, len(episodes), G) if len({e.parts["reward"] for e in episodes[i:i + G]}) == 1]
        counts = model.gather([len(dull)])
        if not sum(counts):
            break
        skip = sum(counts[:model.rank()])
        fresh = questions(cfg, vlm, step, again)[skip:skip + len(dull)]
        if not fresh:                                                      # the other ranks may have some
            continue
        new = zoom_rollout.rollout(vlm, fresh, G, seed=cfg.seed * 1_000_003 + step + again * 10 ** 9, skip=skip, **rollout_options(cfg))
        score(new, cfg)
        for k, i in enumerate(dull[:len(fresh)]):
            dropped += episodes[i:i + G]
            episodes[i:i + G] = new[k * G:(k + 1) * G]
    for e in dropped:
        e.views = []                                                       # only counted from now on: features are large
    return dropped


def blindfold(vlm, episodes, seed, share=0.6):
    """PAPO's second look: the same tokens, but in every image 60 % of the patches, drawn anew each step, are black. Which ones
    is a matter of the image and the step, not of what else is in its micro-batch."""
    dark = {}
    for e, v in ((e, v) for e in episodes for v in e.views):
        if id(v) not in dark:                                              # a group shares its prompt's views
            random_numbers = torch.Generator().manual_seed(random.Random(f"{seed}/{e.sample.id}/{v.index}/{v.box}").getrandbits(60))
            dark[id(v)] = seen = vlm.view(v.source, v.index, v.box, v.fed)
            vlm.patchify(seen)
            seen.patches.masked_fill_(torch.rand(len(seen.patches), 1, generator=random_numbers) < share, 0)
    return [replace(e, views=[dark[id(v)] for v in e.views]) for e in episodes]


def shares(iou):
    """Mean IoU of each group -> easy, medium and hard prompts, each (number, of how many): figure 3 of UniVG-R1."""
    levels = {"easy": iou > 0.7, "medium": (iou >= 0.3) & (iou <= 0.7), "hard": iou < 0.3}
    return {name: (part.sum().item(), len(iou)) for name, part in levels.items()}


def longest(cfg):
    """Tokens that an episode may write."""
    return cfg.max_new_tokens * (1 + cfg.max_zooms * (data.STYLES[cfg.recipe] == "zoom"))


def rollout_options(cfg):
    return dict(max_zooms=cfg.max_zooms, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, style=data.STYLES[cfg.recipe],
                crop_from=cfg.crop_from, max_batch_tokens=cfg.max_batch_tokens, graphs=cfg.graphs)


def measure(vlm, cfg, samples, label):
    """Held-out accuracy in each zoom mode, sampled as in training -> {mode: (summary, episodes)}."""
    out = {}
    for mode in ("on", "off", "black") if data.STYLES[cfg.recipe] == "zoom" else ("on",):
        episodes = evaluate.run(vlm, samples, zoom=mode, recipe=cfg.recipe, seed=cfg.seed, **rollout_options(cfg))
        out[mode] = evaluate.summarise(model.gather(evaluate.rows_of(episodes))), episodes
    print(f"{label}: " + "; ".join(f"zoom {mode} {s['accuracy']:.1%} [{s['low']:.1%}, {s['high']:.1%}]" for mode, (s, _) in out.items()))
    return out


def log_line(m, cfg, left):
    return (f"step {m['step'] + 1:4d}/{cfg.steps} | reward {m['reward']:.3f} (acc {m['accuracy']:.2f} fmt {m['format']:.2f}) | len {m['length']:.0f} "
            f"zooms {m['zooms']:.2f} valid {m['valid_calls']:.2f} | no-signal {m['no_signal']:.0%} | clipfrac {m['clipfrac']:.3f} ent {m['entropy']:.2f} "
            f"kl_samp {m['kl_samp']:.0e} gnorm {m['grad_norm']:.2f}{' SKIPPED' if m['skipped'] else ''} | roll {m['share_rollout']:.0%} "
            f"reward {m['share_reward']:.0%} ref {m['share_reference']:.0%} update {m['share_update']:.0%} | tok/s roll {m['roll_tokens_per_s']:,.0f} train {m['train_tokens_per_s']:,.0f} "
            f"| {m['seconds']:.1f} s, {left / 60:.1f} min left")


def main():
    model.start_ranks()
    cfg = model.cli(Config, description=__doc__, presets=presets, positive=POSITIVE)
    began, run = time.time(), model.make_dir(os.path.join("runs", cfg.name))
    checkpoint, path = os.path.join(run, "checkpoint"), lambda name: os.path.join(run, name)
    cfg.recipe = train_sft.recipe_of(cfg)
    if cfg.data and cfg.traces == "oracle":
        model.fail("the oracle knows the toy world only: --data needs --traces mcts, --traces FILE.jsonl, or --traces '' for none")
    if cfg.group_size < 2:
        model.fail("in a group of one nobody is better than the mean, so nothing is learned; expected --group-size 2 or more")
    if cfg.graphs and not torch.cuda.is_available():
        model.fail("--graphs needs a CUDA device")
    if (seeing := cfg.num_prompts - blind_prompts(cfg, cfg.num_prompts)) < model.world():
        model.fail(f"{seeing} prompts that may zoom cannot be shared by {model.world()} ranks; expected --num-prompts {model.world() + cfg.blind_prompts} or more")
    rows = data.read_jsonl(cfg.data, cfg.images or None) if cfg.data else []
    data.check_images(rows)
    settings = asdict(cfg)
    state = resumable(checkpoint, settings) if cfg.resume else None
    vlm = model.load(checkpoint if cfg.resume else cfg.model, cfg.device, cfg.dtype,
                     cfg.max_pixels or (0 if cfg.data or model.is_tiny(cfg.model) else 448 * 448))
    vlm.recompute = cfg.recompute
    plan = model.memory_plan(vlm, cfg.micro_tokens, cfg.max_batch_tokens, cfg.recompute, cfg.offload, cfg.kl_coef > 0)
    if not model.is_tiny(cfg.model):
        model.print_plan(plan, cfg.offload)
    held_out, cfg.rows = split(cfg, vlm, rows)

    if cfg.resume:
        first, before, spent, sections = state["step"], state["before"], state["seconds"], []
    else:
        if cfg.traces:
            losses, pairs = train_sft.warm_start(vlm, data.STYLES[cfg.recipe], cfg.traces, cfg.task, rows, cfg.sft_n, cfg.sft_epochs,
                                                 cfg.sft_batch, cfg.sft_lr, cfg.difficulty, cfg.max_zooms, vlm.toy_side, cfg.seed, cfg.micro_tokens, cfg.offload)
            print(f"warm start: {len(pairs)} traces, loss {losses[0]:.2f} -> {losses[-1]:.2f}, {time.time() - began:.0f} s")
        shown = measure(vlm, cfg, held_out, "before RL")
        first, before, spent, sections = 0, {mode: s for mode, (s, _) in shown.items()}, 0.0, [("before RL", shown["on"][1])]
        if cfg.kl_coef > 0 and model.rank() == 0:
            model.replace_folder(vlm.save(path("reference")), path("reference"))
    for name in ("metrics.jsonl", "episodes.jsonl"):                       # rows of steps after the checkpoint are run again
        model.keep_rows(path(name), first)
    model.write_json(path("config.json"), settings)
    model.meet()
    ref = model.load(path("reference"), cfg.device, cfg.dtype, vlm.spec.max_pixels, quiet=True) if cfg.kl_coef > 0 else None
    optimizer = model.AdamW(vlm.parameters(), cfg.lr, weight_decay=0.0, offload=cfg.offload)
    save = lambda step: model.save_checkpoint(checkpoint, vlm, optimizer, {"step": step, "config": settings, "before": before,
                                                                           "seconds": spent + time.time() - began})
    if cfg.resume:
        model.load_checkpoint(checkpoint, optimizer)
    else:
        save(0)                                                            # a warm start takes long, too
    stop, skipped, saved = [], 0, first
    signal.signal(signal.SIGINT, lambda *_: (stop.append(1), signal.signal(signal.SIGINT, signal.default_int_handler),
                                             print("\nstopping after this step; Ctrl-C again to stop at once")))
    looped = time.time()
    for step in range(first, cfg.steps):
        # 1. sample prompts
        samples = questions(cfg, vlm, step)
        metrics, episodes = train_step(vlm, ref, optimizer, samples, cfg, step)
        # 7. log
        left = (time.time() - looped) / (step + 1 - first) * (cfg.steps - step - 1)
        print(log_line(metrics, cfg, left), flush=True)
        model.append_rows(path("metrics.jsonl"), [metrics])
        model.append_rows(path("episodes.jsonl"), [{"step": step, **evaluate.record(pick(episodes, key=lambda e: e.parts["reward"]))} for pick in (max, min)])
        skipped = skipped + 1 if metrics["skipped"] else 0
        if skipped == PATIENCE:
            model.fail(f"the gradient was not finite in {PATIENCE} steps in a row, so nothing was learned in them and nothing will be. Look at "
                       f"{path('metrics.jsonl')}: a growing grad_norm asks for a smaller --lr, a large kl_samp for --dtype float32. "
                       f"The checkpoint of step {saved} is as it was")
        stopping = model.total(len(stop))[0]                               # on any rank
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or stopping:
            save(saved := step + 1)
        if stopping:
            print(f"stopped and saved; go on with: --name {cfg.name} --resume")
            return
    if cfg.steps > first:
        sections.append((f"one group of step {cfg.steps}", shown_group(vlm, episodes, cfg)))
    finish(vlm, cfg, run, settings, held_out, before, sections, spent - began, plan["peak"])


def saved_state(checkpoint):
    if not os.path.exists(f"{checkpoint}/state.json"):
        model.fail(f"nothing to resume in {checkpoint}")
    return model.read_json(f"{checkpoint}/state.json", "config", "step", "before", "seconds")


def resumable(checkpoint, settings):
    """The state of a checkpoint that was made with these settings; only the number of steps and the memory knobs may differ."""
    state = saved_state(checkpoint)
    differ = [f"{k} ({state['config'].get(k)!r} there, {v!r} here)" for k, v in settings.items()
              if k not in FREE and state["config"].get(k) != v]
    if differ:
        model.fail(f"{checkpoint} was made with other settings: {', '.join(differ)}")
    return state


def shown_group(vlm, episodes, cfg):
    """The report's look at training: one question and all that was tried, of the group whose advantages differ most."""
    G, of = cfg.group_size, lambda i: [e.advantage for e in episodes[i:i + cfg.group_size]]
    at = max(range(0, len(episodes), G), key=lambda i: max(of(i)) - min(of(i)))
    for e in episodes[at:at + G]:
        e.pieces, e.looked = evaluate.pieces(vlm, e), {"crop_from": cfg.crop_from, "fed": e.views[0].fed}
    return episodes[at:at + G]


def split(cfg, vlm, rows):
    """-> held-out samples, rows to train on (none in the toy world, which draws them step by step). One row in ten is held out."""
    if not cfg.data:
        return data.toy(cfg.task, "test", cfg.eval_n, cfg.seed, cfg.difficulty, vlm.toy_side), []
    rows = random.Random(cfg.seed).sample(rows, len(rows))
    n = min(cfg.eval_n, max(len(rows) // 10, 1))
    return rows[:n], rows[n:] or rows


def finish(vlm, cfg, run, settings, held_out, before, sections, spent, planned):
    """Measure again, and write summary.json and report.html. spent + the time now = seconds in all."""
    after = measure(vlm, cfg, held_out, "after RL")
    if model.rank():
        return
    curves = [json.loads(line) for line in open(os.path.join(run, "metrics.jsonl"))]
    on = after["on"][0]
    if curves:
        total = {key: sum(m[key] for m in curves) for key in ("tokens_run", "tokens_naive", "patches_run", "patches_naive")}
        print("rollouts prefilled {tokens_run:,.0f} tokens and encoded {patches_run:,.0f} patches; sending all again each turn, for each member "
              "of a group, would have been {tokens_naive:,.0f} and {patches_naive:,.0f}".format(**total))
    summary = {"seconds": round(spent + time.time(), 1), "n": on["n"], "accuracy_before": before["on"]["accuracy"], "accuracy_after": on["accuracy"],
               "low": on["low"], "high": on["high"], "chance": chance(held_out),
               "zooms_per_episode": on["zooms"],
               "kl_samp_max": max((m["kl_samp_max"] for m in curves), default=0.0)}
    if "off" in after:
        summary |= {"accuracy_no_zoom": after["off"][0]["accuracy"], "accuracy_black_crop": after["black"][0]["accuracy"]}
    if "mean_iou" in on:
        summary |= {"mean_iou_before": before["on"]["mean_iou"], "mean_iou_after": on["mean_iou"]}
    levels = {name: part for name, part in on["categories"].items() if part["n"] < on["n"]}
    if levels:
        summary["levels"] = {name: {"n": part["n"], "accuracy_before": before["on"]["categories"][name]["accuracy"], "accuracy_after": part["accuracy"]}
                             for name, part in levels.items()}
    model.write_json(os.path.join(run, "summary.json"), summary)
    cell = lambda s: f"{s['accuracy']:.1%} [{s['low']:.1%}, {s['high']:.1%}]"
    print(f"\n{'held-out accuracy':22s}{'before RL':24s}after RL      (95 % interval, n = {on['n']}, chance {summary['chance']:.0%})")
    for mode, (s, _) in after.items():
        print(f"{evaluate.MODES[mode]:22s}{cell(before[mode]):24s}{cell(s)}")
    for name, part in levels.items():
        print(f"  {name + ', n = ' + str(part['n']):20s}{cell(before['on']['categories'][name]):24s}{cell(part)}")
    if "mean_iou" in on:
        print(f"{'mean IoU':22s}{before['on']['mean_iou']:<24.3f}{on['mean_iou']:.3f}")
    table = [("", [evaluate.MODES[mode] for mode in after]), ("before RL", [before[mode] for mode in after]), ("after RL", [s for s, _ in after.values()])]
    evaluate.report(os.path.join(run, "report.html"), f"{cfg.task if not cfg.data else os.path.basename(cfg.data)}, {vlm.name}", curves=curves,
                    table=table, settings={k: v for k, v in settings.items() if v != getattr(Config, k)},
                    episodes=sections + [(f"after RL, {evaluate.MODES[mode]}", es) for mode, (_, es) in after.items()])
    print(f"{summary['seconds']:.0f} s in all, peak memory {model.peak_memory() / 1e9:.2f} GB"
          f"{'' if model.is_tiny(cfg.model) else f' (planned {planned / 1e9:.1f})'}; {run}/report.html shows the episodes")


def chance(samples):
    """Accuracy of a blind guess: 1 / number of options, 0 where there are none."""
    return sum(1 / len(s.options) if s.options else 0.0 for s in samples) / len(samples)


if __name__ == "__main__":
    try:
        main()
    except data.DataError as e:
        model.fail(str(e))
    except RuntimeError as e:
        model.answer_out_of_memory(e, f"{'; '.join(model.KNOBS.values())}. Then --resume")
    except KeyboardInterrupt:
        model.fail("interrupted; what was saved last is in the run's checkpoint folder")
