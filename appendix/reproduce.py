"""The tables of appendix/reproduce.md: what the papers report, and what the runs of the page need.

    python -m appendix.reproduce            # print them
    python -m appendix.reproduce --write    # and write them into the page, in place of its own

The first table has the published figures, with the 95 % interval that so many questions allow. The
second is about the training commands that stand on the page: it parses them with the scripts' own
flags, so its settings are theirs. Memory is that of the run's own plan (memory.memory_plan). Disk
and hours are arithmetic, written out below (`disk_gb`, `step_seconds`); nothing here was measured.
"""
import argparse
import contextlib
import io
import math
import os
import re
import shlex
from dataclasses import dataclass

import train_rl
import train_sft
from appendix import memory, recipes, rl_run, run, speed_setup
from appendix.weights import MODELS, ROOT
from evaluate import wilson

PAGE = os.path.join(ROOT, "appendix", "reproduce.md")
GB = 1e9


# --------------------------------------------------------------------------------------------------
# what the papers report

@dataclass(frozen=True)
class Published:
    """One row of a table of a paper. Figures in per cent."""
    benchmark: str
    source: str                 # paper and table
    base: float                 # the model before training
    trained: float              # the model of the paper
    n: int = 0                  # questions; 0: not published
    tasks: tuple = ()           # (n, per cent) of each task, if `trained` is the mean of tasks


# UniVG-R1's row of its table 1, with the number of questions of each task in the revised file.
MIG_TASKS = ((528, 71.97), (94, 58.51), (815, 93.13), (550, 76.36), (288, 66.32), (1203, 81.71),
             (99, 82.83), (485, 88.04), (97, 62.89), (117, 44.44))
PUBLISHED = (
    Published("SAT-2", "ViGoRL, tables 1 to 3, 3B", 46.1, 62.9, 4001),
    Published("BLINK", "the same", 44.4, 48.5, 1901),
    Published("V\\*Bench, with zooms", "the same", 74.2, 81.2, 191),
    Published("ScreenSpot-v2", "the same", 68.4, 86.5, 1272),
    Published("ScreenSpot-Pro", "the same", 23.9, 31.1, 1581),
    Published("VisualWebArena", "the same", 4.2, 6.4, 910),
    Published("MIG-Bench, mean of 10 tasks", "UniVG-R1, table 1", 30.20, 72.64, 4276, MIG_TASKS),
    Published("LISA val", "UniVG-R1, table 2", 52.00, 64.00, 200),
    Published("LISA test", "the same", 49.17, 59.69, 779),
    Published("LLMSeg", "the same", 35.53, 50.60),
    Published("ReasonVOS", "the same", 9.83, 58.73, 458),
    Published("ReVOS", "the same", 23.55, 60.03),
)


def interval(row):
    """The 95 % interval of a published figure, in per cent -> (low, high), or None without n.

    Wilson's for a share of n questions. A mean of tasks has the normal one: its variance is the sum
    of the tasks' variances p (1 - p) / n, over the square of their number.
    """
    if row.n == 0:
        return None
    if not row.tasks:
        low, high = wilson(row.trained / 100 * row.n, row.n)
        return 100 * low, 100 * high
    variances = [p * (100 - p) / n for n, p in row.tasks]
    half = 1.96 * math.sqrt(sum(variances)) / len(row.tasks)
    return row.trained - half, row.trained + half


def published_table():
    lines = ["| benchmark | source | n | before | after | 95 % interval |",
             "|---|---|---|---|---|---|"]
    for row in PUBLISHED:
        bounds = interval(row)
        between = f"{bounds[0]:.1f} to {bounds[1]:.1f}" if bounds else "n is not published"
        lines.append(f"| {row.benchmark} | {row.source} | {row.n or ''} | {row.base:g} "
                     f"| {row.trained:g} | {between} |")
    return lines


# --------------------------------------------------------------------------------------------------
# the commands of the page

def page_commands():
    """The commands that stand on the page, loops written out -> list of lines."""
    with open(PAGE, encoding="utf-8") as f:
        text = f.read().replace("\\\n", " ")
    commands = []
    for line in re.findall(r"^    (\S.*)$", text, re.M):
        line = re.sub(r"  +# .*| +# .*", "", " ".join(line.split()))
        loop = re.fullmatch(r"for (\w+) in (.+?); do (.+); done", line)
        if not loop:
            commands.append(line)
            continue
        name, values, body = loop.groups()
        commands += [body.replace(f"${name}", value) for value in values.split()]
    return commands


def flags_of(command, script):
    """The flags of a command that runs a script of ours, else None. torchrun's own are left out."""
    words = shlex.split(command)
    if script not in words:
        return None
    return words[words.index(script) + 1:]


def training_runs():
    """-> {name of the run: (train_rl.Config, name of its model)} for the page's runs on one GPU."""
    models = {}                                         # checkpoint of a warm start: model
    runs = {}
    with contextlib.redirect_stdout(io.StringIO()):     # the settings are printed by the scripts
        for command in page_commands():
            if not command.startswith("python "):
                continue
            flags = flags_of(command, "train_sft.py")
            if flags is not None:
                sft = run.parse_config(train_sft.Config, flags, presets=train_sft.presets)
                models[f"runs/{sft.name}/checkpoint"] = sft.model
            flags = flags_of(command, "train_rl.py")
            if flags is not None:
                cfg = run.parse_config(train_rl.Config, flags, presets=recipes.presets)
                runs[cfg.name] = cfg, models.get(cfg.model, cfg.model)
    return runs


# --------------------------------------------------------------------------------------------------
# what a run needs

@dataclass(frozen=True)
class Lengths:
    """How long the episodes of a run are: assumed, from image sizes and the papers' limits."""
    prompt: int                 # tokens of a prompt, those of its images included
    turn: int                   # sampled tokens per turn
    crops: int = 0              # crops per episode
    data_gb: float = 0.0        # what is downloaded for it, as far as it is published, unpacked


CROP_TOKENS = 640               # 24 x 24 of the image, and the text around it
LENGTHS = {
    "sat2": Lengths(1500, 300, data_gb=11.2),
    "vstar": Lengths(3700, 120, crops=4, data_gb=12.3),
    "screenspot": Lengths(2200, 200, data_gb=12.7),
    "webaction": Lengths(2200, 200, data_gb=0.2),
    "univg": Lengths(2400, 200, data_gb=1.9),
}


@dataclass(frozen=True)
class Card:
    """What is assumed of a GPU: an H100, and of its data sheet a half and two fifths."""
    bandwidth: float = 0.5 * 3.35e12    # bytes per second
    flops: float = 0.4 * 989e12         # operations per second in bf16
    launch: float = 0.010               # seconds of a decoding step, at least: its kernel launches
    host: float = 50e9                  # bytes per second, of the CPU's memory and of the bus to it


def step_seconds(vlm, cfg, lengths, card=Card()):
    """Seconds of one RL step on one GPU, by arithmetic -> {part: seconds}.

    A token costs 2 operations per weight forward, 4 backward, and 2 more if layers are recomputed.
    The optimizer reads or writes 28 bytes per trained parameter. Attention's own share and the
    resizing of images are left out.
    """
    text, vision = parameter_counts(vlm)
    rows = cfg.num_prompts * cfg.group_size
    turns = lengths.crops + 1
    sampled = turns * lengths.turn
    own = sampled + lengths.crops * CROP_TOKENS         # tokens of an episode after its prompt
    slots = cfg.num_prompts * lengths.prompt + rows * own
    waves = max(1.0, slots / cfg.max_batch_tokens)      # the cache holds so many slots at once
    read = speed_setup.decode_bytes(vlm, min(slots, cfg.max_batch_tokens) / 2)
    seen = cfg.num_prompts * lengths.prompt + rows * lengths.crops * CROP_TOKENS
    # The episodes of a prompt are spread over the minibatches; each needs the prompt once.
    m = cfg.num_minibatches
    prompts = cfg.num_prompts * m * (1 - (1 - 1 / m) ** cfg.group_size)
    trained = prompts * lengths.prompt + rows * own
    passes = 8 if cfg.recompute else 6
    optimizer = 28 * sum(p.numel() for p in vlm.parameters())
    return {
        "decode": waves * sampled * max(read / card.bandwidth, card.launch),
        "prefill": 2 * text * seen / card.flops,
        "vision": 2 * vision * 4 * seen / card.flops,   # four patches per image token
        "update": passes * text * trained / card.flops,
        "reference": 2 * text * trained / card.flops if cfg.kl_coef else 0.0,
        "optimizer": m * optimizer / (card.host if cfg.offload else card.bandwidth),
    }


def parameter_counts(vlm):
    """-> parameters of the text model's layers and head, of the vision tower."""
    decoder = vlm.model.model.language_model
    text = sum(p.numel() for p in decoder.layers.parameters()) + vlm.model.lm_head.weight.numel()
    return text, sum(p.numel() for p in vlm.model.model.visual.parameters())


def disk_gb(vlm, cfg, lengths):
    """GB of disk: weights, data, the warm start, the reference, and two checkpoints.

    A new checkpoint is written beside the old one. It holds the weights, and for each trained
    parameter a master and two moments of 4 bytes.
    """
    weights = sum(p.numel() for p in vlm.model.parameters()) * vlm.dtype.itemsize / GB
    trained = sum(p.numel() for p in vlm.parameters())
    checkpoint = weights + 12 * trained / GB
    reference = weights if cfg.kl_coef else 0.0
    data = 2 * lengths.data_gb                          # the archive, and what was in it
    return data + 2 * weights + reference + 2 * checkpoint


def needs_table():
    lines = ["| run | model | GPU, GB | host, GB | disk, GB | s/step | steps | hours | on 8 GPUs |",
             "|---|---|---|---|---|---|---|---|---|"]
    made = {}
    for name, (cfg, model_name) in training_runs().items():
        if model_name not in made:
            made[model_name] = speed_setup.random_weights(model_name, "meta")
        vlm = made[model_name]
        lengths = LENGTHS[name]
        plan = memory.memory_plan(vlm, rl_run.memory_options(vlm, cfg, lengths.prompt))
        seconds = sum(step_seconds(vlm, cfg, lengths).values())
        hours = seconds * cfg.steps / 3600
        host = f"{plan['optimizer'] / GB:.0f}" if cfg.offload else ""
        lines.append(f"| {name} | {model_name} | {plan['peak'] / GB:.0f} | {host} "
                     f"| {disk_gb(vlm, cfg, lengths):.0f} | {seconds:.0f} | {cfg.steps} "
                     f"| {hours:.1f} | {hours / 8:.1f} |")
    return lines


def lengths_table():
    lines = ["| run | tokens of a prompt | tokens of a turn | crops | data, GB |",
             "|---|---|---|---|---|"]
    for name, own in LENGTHS.items():
        lines.append(f"| {name} | {own.prompt} | {own.turn} | {own.crops} | {own.data_gb} |")
    return lines


def weights_table():
    """The released weights that the page downloads, in GB of bf16."""
    lines = ["| weights | GB |", "|---|---|"]
    for name in dict.fromkeys(model for _, model in training_runs().values()):
        vlm = speed_setup.random_weights(name, "meta")
        size = sum(p.numel() for p in vlm.model.parameters()) * vlm.dtype.itemsize
        lines.append(f"| {MODELS[name].path} | {size / GB:.1f} |")
    return lines


TABLES = (published_table, needs_table, weights_table, lengths_table)


def write_tables(tables):
    """Replace the tables of the page by those with the same head."""
    with open(PAGE, encoding="utf-8") as f:
        text = f.read()
    for lines in tables:
        old = re.search(rf"^{re.escape(lines[0])}\n(?:\|.*\n)*", text, re.M)
        if not old:
            run.fail(f"{PAGE} has no table with the head {lines[0]}")
        text = text.replace(old[0], "\n".join(lines) + "\n")
    run.write_text(PAGE, text)


def main():
    parser = run.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into the page")
    args = parser.parse_args()
    tables = [table() for table in TABLES]
    print("\n\n".join("\n".join(lines) for lines in tables))
    if args.write:
        write_tables(tables)


if __name__ == "__main__":
    main()
