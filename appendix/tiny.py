"""How the tiny model was made: a vision-language model of a million parameters, from nothing.

    python -m appendix.tiny --out runs/mine              # two and a half hours on two cores
    python -m appendix.tiny --out runs/short --steps 4 --second-steps 4 --third-steps 4
    python -m appendix.tiny --out runs/tenth --until 1000    # the beginning, to compare losses
    python -m appendix.tiny                              # replaces checkpoints/tiny

What it learns is in appendix/lessons.py, what it then can do in appendix/skills.py. There are three
stages: lessons; lessons and drills; more drills, some with options to choose from. A killed command
continues where it last saved: the same line again.

The matrices are trained by Muon (appendix/muon.py); embeddings, norms and biases by AdamW.
"""
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data
import model
from appendix import lessons, prefix, ranks, run, skills, weights
from appendix.files import DataError
from appendix.muon import Muon


@dataclass
class Config:
    out: str = ""               # folder of the finished model (default: checkpoints/tiny)
    seed: int = 0               # random seed for weights, scenes and lessons
    steps: int = 10_000         # optimizer steps of the first stage; 0: leave the stage out
    lr: float = 1.5e-3          # its peak learning rate
    second_steps: int = 5_600   # steps of the second stage
    second_lr: float = 1e-3     # its peak learning rate
    third_steps: int = 1_000    # steps of the third stage
    third_lr: float = 6e-4      # its peak learning rate
    start: str = ""             # folder of a model to go on with (default: random weights)
    until: int = 0              # step of the first stage after which to stop; 0: go on to the end
    save_every: int = 500       # steps between saved states, a multiple of 100


# --------------------------------------------------------------------------------------------------
# the model: the Qwen2.5-VL architecture at a thousandth of its size

TINY = dict(hidden=128, layers=3, heads=4, kv_heads=2, mlp=384, vocab=640,
            vision=96, vision_layers=3, vision_mlp=192, vision_heads=4)
ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 30.0}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
# A text is first cut into these pieces, and no token spans two. A digit is a piece, and a word with
# the space before it.
PIECES = r", | ?\(|\)[.,]?|\p{N}| ?\p{L}+|\n| ?[^\s\p{L}\p{N}]+|\s+"


def make_tiny(texts, phrases, seed=0):
    """A tiny model with random weights and a tokenizer of its own -> PrefixVLM.

    texts, phrases: see make_tokenizer.
    """
    tokenizer = make_tokenizer(texts, phrases)
    config = make_model_config(tokenizer)
    torch.manual_seed(seed)
    net = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for p in net.parameters():
        if p.ndim >= 2:         # 1/sqrt(inputs); with transformers' 0.02 this width hardly learns
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    spec = model.MODELS["tiny"]
    size = {"shortest_edge": 4 * 28 ** 2, "longest_edge": spec.max_pixels}
    processor = weights.Qwen2VLImageProcessorPil(size=size)
    return prefix.PrefixVLM(net, tokenizer, processor, "tiny", spec)


def make_tokenizer(texts, phrases):
    """A byte-level BPE tokenizer.

    texts: its corpus. phrases: strings that never vary (prompts, tags, the JSON of a tool call);
    each becomes one token, so that a small model spends its capacity on what does vary.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=TINY["vocab"] - len(SPECIAL) - len(phrases), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    longest_first = sorted(phrases, key=len, reverse=True)
    bpe.add_tokens([AddedToken(phrase, normalized=False) for phrase in longest_first])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, extra_special_tokens=SPECIAL[1:])


def make_model_config(tokenizer):
    """The sizes of TINY in transformers' terms."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    text = dict(
        vocab_size=len(tokenizer), hidden_size=TINY["hidden"], intermediate_size=TINY["mlp"],
        num_hidden_layers=TINY["layers"], num_attention_heads=TINY["heads"],
        num_key_value_heads=TINY["kv_heads"], rope_parameters=dict(ROPE), tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"])
    vision = dict(
        depth=TINY["vision_layers"], hidden_size=TINY["vision"],
        intermediate_size=TINY["vision_mlp"], num_heads=TINY["vision_heads"],
        out_hidden_size=TINY["hidden"], patch_size=14, window_size=112,
        fullatt_block_indexes=list(range(TINY["vision_layers"])))
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])


# --------------------------------------------------------------------------------------------------
# pretraining

BATCH = 24                      # episodes per step
FALL = 0.4                      # last part of the steps, in which the learning rate falls to 0


@dataclass(frozen=True)
class Stage:
    steps: int
    lr: float                   # peak learning rate
    seed: int
    draw: Callable              # (vlm, rng, step) -> Episode


def stages_of(cfg):
    """-> the three stages. Each has a schedule and a seed of its own."""
    return [Stage(cfg.steps, cfg.lr, cfg.seed, lessons.draw_episode),
            Stage(cfg.second_steps, cfg.second_lr, cfg.seed + 1, lessons.draw_second),
            Stage(cfg.third_steps, cfg.third_lr, cfg.seed + 2, lessons.draw_third)]


def pretrain(folder, cfg):
    """Make the tiny model from nothing, or go on with one, and save it with its card.

    Before each stage the weights are rounded to what a saved model would hold, so that a stage can
    begin with a saved model, too.
    """
    vlm = prefix.load_vlm(cfg.start) if cfg.start else new_model(cfg.seed)
    losses = []
    seconds = 0.0
    done = []
    for number, stage in enumerate(stages_of(cfg), 1):
        if stage.steps == 0:
            continue
        round_to_bf16(vlm)
        vlm.model.requires_grad_(True)          # here the vision tower learns too
        trainer = Trainer(vlm, stage, cfg, f"{folder}.state{number}")
        trainer.learn(cfg.until or stage.steps)
        trainer.save()
        if cfg.until:
            return
        losses += trainer.losses
        seconds += trainer.seconds
        done.append(trainer.path)
    ship(vlm, folder, cfg, losses, seconds / 60)
    for path in done:
        os.remove(path)


def new_model(seed):
    """-> the tiny model with random weights, and with a tokenizer made for its lessons."""
    stub = make_tiny(["a"], data.PHRASES)
    return make_tiny(lessons.tokenizer_corpus(stub, seed), data.PHRASES, seed)


def round_to_bf16(vlm):
    """The weights as they will be saved, in fp32. Buffers stay: a file does not hold them."""
    for p in vlm.model.parameters():
        p.data = p.data.bfloat16().float()


class Trainer:
    """The loop of a stage, and its state in a file: weights, both optimizers, losses.

    path: the file. If it exists, its run goes on. Raises DataError if it is of another run.
    """

    def __init__(self, vlm, stage, cfg, path):
        self.vlm = vlm
        self.stage = stage
        self.cfg = cfg
        self.path = path
        self.losses = []                        # mean of every hundred steps
        self.seconds = 0.0
        self.step = 0
        matrices, others = split_parameters(vlm.model)
        self.muon = Muon(matrices, stage.lr)
        self.adamw = torch.optim.AdamW(
            others, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        if os.path.exists(path):
            self.load()

    def learn(self, last):
        """Next-token loss on the answers, up to step `last`."""
        stage = self.stage
        count = sum(p.numel() for p in self.vlm.model.parameters())
        print(f"{count / 1e6:.2f} M parameters, vocabulary {len(self.vlm.tokenizer)}, "
              f"steps {self.step} to {last} of {stage.steps}", flush=True)
        stream = Stream(self.vlm, stage.draw, stage.seed, stage.steps, self.step)
        batches = iter(torch.utils.data.DataLoader(
            stream, batch_size=None, num_workers=1, prefetch_factor=4, worker_init_fn=one_thread))
        recent = []
        clock = time.time()
        while self.step < last:
            recent.append(self.train_step(next(batches)))
            if self.step % 100 == 0:
                took = time.time() - clock
                clock = time.time()
                self.seconds += took
                self.losses.append(round(sum(recent) / len(recent), 4))
                recent = []
                print(f"step {self.step}/{stage.steps} | loss {self.losses[-1]:.4f} | "
                      f"{took / 100:.3f} s/step | {took / 6000 * (last - self.step):.0f} min left",
                      flush=True)
                if self.step % self.cfg.save_every == 0:
                    self.save()

    def train_step(self, episodes):
        """-> the loss before the step"""
        self.vlm.encode([view for e in episodes for view in e.views], grad=True)
        logprobs, _, mask = self.vlm.logprobs(episodes)                         # (B, T)
        loss = -logprobs.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vlm.model.parameters(), 1.0)
        lr = self.stage.lr * schedule(self.step, self.stage.steps)
        self.muon.lr = lr
        self.adamw.param_groups[0]["lr"] = lr
        self.muon.step()
        self.adamw.step()
        self.adamw.zero_grad()
        self.step += 1
        return loss.item()

    def save(self):
        state = {"settings": self.settings(), "step": self.step, "losses": self.losses,
                 "seconds": self.seconds, "model": self.vlm.model.state_dict(),
                 "muon": self.muon.buffers, "adamw": self.adamw.state_dict()}
        torch.save(state, self.path + ".tmp")
        os.replace(self.path + ".tmp", self.path)

    def load(self):
        state = torch.load(self.path, weights_only=True)
        if state["settings"] != self.settings():
            raise DataError(f"{self.path} is of a run with other settings ({state['settings']}); "
                            "expected the same ones, or no such file")
        self.vlm.model.load_state_dict(state["model"])
        self.muon.buffers = state["muon"]
        self.adamw.load_state_dict(state["adamw"])
        self.step, self.losses, self.seconds = state["step"], state["losses"], state["seconds"]

    def settings(self):
        """What decides the weights, as far as it can be compared."""
        return {name: getattr(self.cfg, name) for name in (
            "seed", "steps", "lr", "second_steps", "second_lr", "third_steps", "third_lr", "start")}


def split_parameters(net):
    """-> (the matrices that Muon trains, all other parameters)"""
    matrices, others = [], []
    for name, p in net.named_parameters():
        is_matrix = p.ndim == 2 and "embed_tokens" not in name
        (matrices if is_matrix else others).append(p)
    return matrices, others


def schedule(step, steps):
    """Factor on the learning rate: up in 100 steps, then constant, then down to 0 in a line."""
    return min(1.0, (step + 1) / 100, (steps - step) / (FALL * steps))


def one_thread(worker):
    """For the process that draws: the other cores are the trainer's."""
    torch.set_num_threads(1)


class Stream(torch.utils.data.IterableDataset):
    """The batches from a step on, drawn in a worker process while the model trains.

    Four batches are drawn at a time, from a seed of their own, and sorted by length, so that little
    is padded.
    """

    def __init__(self, vlm, draw, seed, steps, first):
        self.vlm = vlm
        self.draw = draw
        self.seed = seed
        self.steps = steps
        self.first = first

    def __iter__(self):
        for pool in range(self.first // 4, math.ceil(self.steps / 4)):
            rng = random.Random(f"lessons/{self.seed}/{pool}")
            episodes = [self.draw(self.vlm, rng, 4 * pool) for _ in range(4 * BATCH)]
            episodes.sort(key=lambda e: len(e.ids))
            batches = [episodes[i:i + BATCH] for i in range(0, len(episodes), BATCH)]
            rng.shuffle(batches)
            for i, batch in enumerate(batches):
                if 4 * pool + i >= self.first:
                    yield [self.ready_to_send(e) for e in batch]

    def ready_to_send(self, episode):
        """The episode with cut patches in place of source images, which take long to send."""
        views = []
        for view in episode.views:
            self.vlm.patchify(view)
            light = model.View(None, view.fed, self.vlm.spec.convention, view.index, view.box,
                               view.grid)
            light.set_patches(view.patches)
            views.append(light)
        return replace(episode, views=views)


# --------------------------------------------------------------------------------------------------
# the finished model

CARD = """# The tiny VLM

The Qwen2.5-VL architecture with {parameters:,} parameters ({sizes}), bf16, and a
byte-level BPE of {vocabulary} tokens. Made from nothing, seed {seed}, in three stages of {steps}, \
{second_steps} and {third_steps} steps, in {minutes:.0f} minutes on {machine}, by

    python -m appendix.tiny                 # replaces this folder

What it can do, greedily, on 200 held-out toy scenes each (`python -m appendix.skills`; no warm \
start, no tool, plain questions):

{skills}

It knows nothing but the toy world of `data.py`. It can write a tool call when it is told where to \
zoom, by numbers or by a name, and read the crop. It has never seen the questions of the tasks, \
nor been told what zooming is good for (`appendix/lessons.py` is all that it was taught).

Training loss: the mean of the first hundred steps, then of the hundred before steps 1000, 2000 \
and so on: {losses}. It jumps where a stage begins. `vlm.json` holds every hundred.
"""


def ship(vlm, folder, cfg, losses, minutes):
    """Round to bf16 (half the size), measure, and save with a model card."""
    round_to_bf16(vlm)
    measured = skills.measure(vlm)
    vlm.model.to(torch.bfloat16)
    steps = {name: getattr(cfg, name) for name in ("steps", "second_steps", "third_steps")}
    tmp = vlm.save(folder, seed=cfg.seed, **steps, skills=measured, losses=losses)
    shown = losses[:1] + losses[9::10]
    card = CARD.format(
        parameters=sum(p.numel() for p in vlm.model.parameters()),
        sizes=", ".join(f"{name} {size}" for name, size in TINY.items() if name != "vocab"),
        vocabulary=len(vlm.tokenizer), seed=cfg.seed, minutes=minutes, machine=machine(vlm),
        **steps,
        skills="\n".join(f"- {skill}: {rate:.1%}" for skill, rate in measured.items()),
        losses=", ".join(f"{loss:.2f}" for loss in shown))
    with open(os.path.join(tmp, "README.md"), "w") as f:
        f.write(card)
    run.replace_folder(tmp, folder)
    print(measured)


def machine(vlm):
    """What the model was trained on, in words."""
    if vlm.device.type == "cuda":
        return torch.cuda.get_device_name(vlm.device)
    return f"{os.cpu_count()} CPU cores"


# --------------------------------------------------------------------------------------------------

def main():
    ranks.start()
    cfg = run.parse_config(Config, description=__doc__, positive=("lr", "save_every"))
    if ranks.world_size() > 1:
        run.fail("pretraining runs in one process: start it without torchrun")
    if min(cfg.steps, cfg.second_steps, cfg.third_steps) < 0:
        run.fail("a stage cannot have less than 0 steps")
    if cfg.until and cfg.until >= cfg.steps:
        run.fail(f"--until {cfg.until} is no step before the end of the first stage: expected less "
                 f"than the --steps {cfg.steps}")
    if cfg.save_every % 100:
        run.fail(f"--save-every is {cfg.save_every}, expected a multiple of 100")
    folder = (cfg.out or model.MODELS["tiny"].path).rstrip("/")
    run.make_dir(os.path.dirname(os.path.abspath(folder)))
    pretrain(folder, cfg)


if __name__ == "__main__":
    with run.exit_on_error(interrupted="interrupted"):
        main()
