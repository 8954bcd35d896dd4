"""Scoring texts that any model wrote; no model is loaded.

--form says how the file is laid out (prediction_files.py), --answers how the texts write a click
(agent_answers.py). The units of their coordinates are told by --convention and never guessed from
the numbers: (500, 300) is a fine point in any of them.

    source      pixels of the stored image
    fed         pixels of the image as fed to --model (or of --max-pixels)
    0-1000      thousandths of the image's sides
    0-100       per cent of the image's sides
    0-1         shares of the image's sides
"""
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import rewards
from appendix import files
from appendix.agent_answers import as_plain
from appendix.files import DataError
from appendix.prediction_files import PUBLISHED_FORMS, read_predictions
from model import MODELS
from zoom_rollout import Episode, Turn

# The parts into which a convention divides each side of an image.
PARTS_OF_A_SIDE = {"0-1000": 1000, "0-100": 100, "0-1": 1}


def predicted_episodes(cfg, samples):
    """Scored episodes of --predictions, one per sample. cfg: evaluate.Config."""
    spec = MODELS.get(cfg.model)
    texts = read_predictions(cfg.predictions, samples, cfg.form)
    max_pixels = cfg.max_pixels or (spec.max_pixels if spec else 0)
    # The sides of a fed image are multiples of this: two patches of 14 pixels, or of 16.
    factor = 32 if spec and spec.convention == "thousand" else 28
    if cfg.convention == "fed" and not max_pixels:
        raise DataError("--convention fed needs --max-pixels, or a --model whose images are of "
                        "known size")
    units = {
        "source": "pixels of the stored image",
        "fed": f"pixels of the image as fed to {cfg.model}, {max_pixels:,} at most",
        "0-1000": "0 to 1000",
        "0-100": "0 to 100",
        "0-1": "0 to 1",
    }
    print(f"coordinates of the predictions: {units[cfg.convention]}")
    without = len(samples) - len(texts)
    if without and cfg.form in PUBLISHED_FORMS:
        print(f"{without} of {len(samples)} samples are not in the file: left out")
        samples = [s for s in samples if s.id in texts]
    elif without:
        print(f"{without} of {len(samples)} samples have no prediction: counted as wrong format")
    if cfg.answers != "plain":
        texts = with_clicks(texts, samples, cfg.answers)
    return from_predictions(samples, texts, cfg.convention, max_pixels, factor)


def with_clicks(texts, samples, answers):
    """{id: text} -> the same with the clicks of points and boxes as rewards.py reads them."""
    texts = dict(texts)
    for s in samples:
        if s.id in texts and s.answer_type in ("point", "box"):
            texts[s.id] = as_plain(texts[s.id], answers)
    return texts


def from_predictions(samples, texts, convention="source", max_pixels=0, factor=28):
    """{id: text} -> scored episodes of one turn each, in the order of the samples.

    A sample without a prediction has an answer that cannot be read. max_pixels, factor: size of an
    image as fed, and what its sides are multiples of (Qwen2.5-VL 28, Qwen3-VL 32).
    """
    episodes = []
    for s in samples:
        frames = []                                     # source pixels: no image has to be opened
        if convention != "source":
            frames = [frame_of(s, image, convention, max_pixels, factor) for image in s.images]
        turn = Turn(texts.get(s.id, ""))
        finish_reason = "prediction" if s.id in texts else "no prediction"
        components = rewards.score(s, turn.text, [turn], "accuracy", frames or None)
        episodes.append(Episode(
            s, turns=[turn], finish_reason=finish_reason, frames=frames,
            reward_components=components))
    return episodes


def frame_of(sample, image, convention, max_pixels, factor):
    """(sx, sy, width, height) of an image: a coordinate times sx or sy is a source pixel."""
    if isinstance(image, files.IN_MEMORY):
        w, h = image.size
    else:
        w, h = files.open_image(image, f"sample {sample.id}: ", size_only=True)
    if convention == "fed":
        fed_h, fed_w = smart_resize(h, w, factor, 4 * factor ** 2, max_pixels)
        return w / fed_w, h / fed_h, w, h
    parts = PARTS_OF_A_SIDE[convention]
    return w / parts, h / parts, w, h
