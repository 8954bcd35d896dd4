"""Scoring texts that any model wrote: JSONL rows {"id", "text"}, no model is loaded.

The units of their coordinates are told by --convention and never guessed from the numbers:
(500, 300) is a fine point in any of them.

    source      pixels of the stored image
    fed         pixels of the image as fed to --model (or of --max-pixels)
    0-1000      thousandths of the image's sides
    0-1         shares of the image's sides
"""
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import rewards
from appendix import files
from appendix.files import DataError
from model import MODELS
from zoom_rollout import Episode, Turn


def predicted_episodes(cfg, samples):
    """Scored episodes of --predictions, one per sample. cfg: evaluate.Config."""
    spec = MODELS.get(cfg.model)
    texts = read_predictions(cfg.predictions, samples)
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
        "0-1": "0 to 1",
    }
    print(f"coordinates of the predictions: {units[cfg.convention]}")
    if len(texts) < len(samples):
        print(f"{len(samples) - len(texts)} of {len(samples)} samples have no prediction: "
              "counted as wrong format")
    return from_predictions(samples, texts, cfg.convention, max_pixels, factor)


def read_predictions(path, samples):
    """JSONL of {"id", "text"} -> {id: text}. Raises DataError.

    Every row is checked: half of a file scored by mistake would look like a bad model.
    """
    known = {s.id for s in samples}
    texts = {}
    for where, row in files.read_rows(path):
        name = str(files.need(row, "id", (str, int), where))
        text = files.need(row, "text", str, where)
        if name not in known:
            raise DataError(f"{where}id {name!r} is not in the data; expected one of its "
                            f"{len(known)} ids, such as {samples[0].id!r}")
        if name in texts:
            raise DataError(f"{where}id {name!r} has a prediction already; "
                            "expected one row per id")
        texts[name] = text
    if not texts:
        raise DataError(f"{path} holds no predictions")
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
    if isinstance(image, Image.Image):
        w, h = image.size
    else:
        w, h = files.open_image(image, f"sample {sample.id}: ", size_only=True)
    if convention == "fed":
        fed_h, fed_w = smart_resize(h, w, factor, 4 * factor ** 2, max_pixels)
        return w / fed_w, h / fed_h, w, h
    units = 1000 if convention == "0-1000" else 1       # per side
    return w / units, h / units, w, h
