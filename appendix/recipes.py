"""The settings of the papers, and the defaults that depend on the flags of train_rl.py.

    python train_rl.py --recipe univg-r1         # prints what it sets; any flag beside it wins
"""
import os

import train_sft
from appendix import rl_run, run
from model import is_tiny

# Defaults of every model that is not tiny.
# Papers: ViGoRL uses 1e-6 for both rates, and 128 prompts of 5 episodes on eight GPUs.
REAL = dict(
    traces="oracle", num_prompts=8, blind_prompts=1, max_new_tokens=512, lr=1e-6, sft_lr=5e-6,
    micro_tokens=16384, recompute=True,
)

# What --recipe sets: the papers' settings where they differ from Config's. The second dict is for
# models of 3B to 7B parameters; a tiny model keeps its own step size and lengths.
# Sources: ViGoRL tables A2 and A3 and its script; UniVG-R1's script and trainer, whose command line
# says max_pixels 640,000, while its image processor keeps the 401,408 it was loaded with.
# max_pixels holds for images of --data only: see weights.largest_prompt_image.
PAPERS = {
    "vigorl": (
        dict(task="relation", group_size=5, loss="dual-clip", kl_coef=0.01),
        dict(num_prompts=128, num_minibatches=2, steps=500, lr=1e-6, sft_lr=1e-6,
             max_new_tokens=2048, warmup_steps=25, weight_decay=0.01, max_pixels=4_194_304),
    ),
    "vigorl-zoom": (
        dict(task="search", blind_prompts=0, distinct_bonus=0.2, loss="dual-clip", kl_coef=0.01),
        dict(num_prompts=128, num_minibatches=16, steps=500, lr=1e-6, sft_lr=1e-6, clip_grad=0.2,
             max_zooms=4, max_new_tokens=1024, warmup_steps=25, weight_decay=0.01),
    ),
    "univg-r1": (
        dict(task="boxes", difficulty="mixed", steps=150, difficulty_weight="exp", clip_high=0.2,
             aggregate="sequence", kl_coef=0.04),
        dict(num_prompts=16, steps=625, lr=1e-6, sft_lr=5e-6, max_new_tokens=256, warmup_steps=0,
             max_pixels=401_408),
    ),
}
PAPERS["vigorl-ungrounded"] = PAPERS["vigorl"]  # the baseline without points: another reward only


def presets(cfg):
    """Defaults that depend on the flags: those of a resumed run, a recipe or a real model.

    With --data a real model has no warm start by default; pass --traces FILE to give it one.
    """
    if cfg.resume:
        checkpoint = os.path.join(rl_run.run_folder(cfg), "checkpoint")
        run.restore_folder(checkpoint)
        settings = rl_run.read_state(checkpoint)["config"]
        return {k: v for k, v in settings.items() if k not in ("resume", "name")}
    algorithm, scale = PAPERS.get(cfg.recipe, ({}, {}))
    if is_tiny(cfg.model):
        defaults = train_sft.searchable(cfg, "sft_n") | algorithm
    else:
        defaults = REAL | algorithm | scale
    if not cfg.data:
        defaults.pop("max_pixels", None)
    if cfg.template:                                    # it stands in for the warm start
        defaults = defaults | {"traces": ""}
    if cfg.data and "traces" in defaults:
        defaults = defaults | {"traces": ""}            # the oracle knows nothing about a file
    return defaults
