"""Toy questions of one task, or of two in turn."""
import data


def toy_questions(cfg, split, n, seed, side):
    """n toy questions of --task; with --also every second one is of that task instead.

    cfg: settings with `task`, `also` and `difficulty`; the others as in `data.toy`.
    """
    samples = data.toy(cfg.task, split, n, seed, cfg.difficulty, side)
    if cfg.also:
        others = data.toy(cfg.also, split, n, seed, cfg.difficulty, side)
        samples[1::2] = others[1::2]
    return samples
