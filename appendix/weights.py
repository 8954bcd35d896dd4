"""Which models there are, where they run and in which precision, and their files.

Whatever cannot work ends the program with one line and status 2.
"""
import os
import re
import shutil
from dataclasses import MISSING, dataclass, fields

import torch
import transformers
from safetensors import SafetensorError
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from appendix import attention, run


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass(frozen=True)
class Spec:
    path: str                   # folder or hub name
    convention: str             # "pixel": coordinates in the fed image; "thousand": 0 to 1000
    max_pixels: int             # largest area of a prompt image as fed, in pixels
    window: int                 # side of a zoom crop, in pixels of the source image
    crop_side: int              # side of a crop as fed (ViGoRL, visual search: 364 -> 672)
    min_pixels: int = 56 * 56   # smallest area of a prompt image as fed, in pixels


MODELS = {
    "tiny": Spec(os.path.join(ROOT, "checkpoints", "tiny"), "pixel", 112 * 112, 112, 112),
    "qwen2.5-vl-3b": Spec("Qwen/Qwen2.5-VL-3B-Instruct", "pixel", 2_850_000, 364, 672),
    "qwen2.5-vl-7b": Spec("Qwen/Qwen2.5-VL-7B-Instruct", "pixel", 2_850_000, 364, 672),
    "qwen3-vl-2b": Spec("Qwen/Qwen3-VL-2B-Instruct", "thousand", 2_850_000, 364, 672, 65_536),
    "qwen3-vl-4b": Spec("Qwen/Qwen3-VL-4B-Instruct", "thousand", 2_850_000, 364, 672, 65_536),
    "qwen3-vl-8b": Spec("Qwen/Qwen3-VL-8B-Instruct", "thousand", 2_850_000, 364, 672, 65_536),
}


TOY_PIXELS = 448 * 448          # area at which a real model is fed a toy scene


# --------------------------------------------------------------------------------------------------
# names

def find_model(name):
    """A name of MODELS or a checkpoint folder -> (name of the model, Spec with its path)."""
    if name in MODELS:
        return name, MODELS[name]
    if not os.path.isdir(name):
        run.fail(f"unknown model {name!r}; expected one of {', '.join(MODELS)} "
                 "or a checkpoint folder")
    if not os.path.exists(os.path.join(name, "vlm.json")):
        run.fail(f"{name} is no checkpoint of this project: it has no vlm.json")
    card = card_of(name)
    values = {field.name: card[field.name] for field in fields(Spec) if field.name in card}
    values["path"] = name
    return card["name"], Spec(**values)


def card_of(folder):
    """vlm.json of a checkpoint folder: which model this is and how it writes coordinates."""
    names = [field.name for field in fields(Spec) if field.default is MISSING]
    return run.read_json(os.path.join(folder, "vlm.json"), "name", *names)


def is_tiny(name):
    """Is this name, or this checkpoint folder, the tiny model?"""
    if name == "tiny":
        return True
    return os.path.exists(os.path.join(name, "vlm.json")) and card_of(name)["name"] == "tiny"


def note_on_tiny(name, samples, command):
    """Print a note if the tiny model is asked about anything but toy scenes.

    samples: the rows of a file; command: what was typed, without its flags.
    """
    if not is_tiny(name) or all("scenes" in s.meta for s in samples):
        return
    print("note: the tiny model knows the toy world only, so expect no right answers to these "
          f"questions. They need a released model (one GPU): python {command} --model qwen2.5-vl-3b"
          " --data FILE. To try a file of your own without one: python data.py draw search 64, "
          "then --data scenes/search.jsonl")


def largest_prompt_image(name, cfg):
    """The area in pixels at which a model is fed prompt images at most, for load_vlm.

    name: a model or checkpoint folder. cfg: settings with `data` and `max_pixels`. -> 0: the
    model's own. A toy scene has four times the sides of the image fed, so a real model is fed
    smaller ones than usual, or the scenes would be huge.
    """
    if cfg.max_pixels or cfg.data:
        return cfg.max_pixels
    return min(find_model(name)[1].max_pixels, TOY_PIXELS)


def toy_side(name, spec, factor=28):
    """Side of a toy scene: 4 times the side fed, so that only a crop shows fine patterns.

    name, spec: of the model. --max-pixels changes how large a scene is fed, not the scene. factor:
    side of an image token; the result is a multiple of it.
    """
    largest = MODELS.get(name, spec).max_pixels
    return 4 * int(min(largest, TOY_PIXELS) ** 0.5) // factor * factor


# --------------------------------------------------------------------------------------------------
# device and precision

def pick_device(device):
    """"auto", "cpu", "cuda" or "cuda:1" -> name of the device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        run.fail(f"unknown device {device!r}; expected cpu, cuda or cuda:N")
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        run.fail(f"device {device}: torch sees no CUDA GPU here")
    if ":" in device:                                   # so that graphs, clock and peak memory
        torch.cuda.set_device(device)                   # mean this GPU and not the first
    attention.prefer_kernels_without_plans()
    return device


def pick_dtype(dtype, device, is_tiny):
    """"auto", "float32" or "bfloat16" -> (torch dtype, why this one)."""
    if dtype != "auto":
        return getattr(torch, dtype), "asked for"
    if device == "cpu":
        return torch.float32, "bf16 is slower on most CPUs"
    if is_tiny:
        return torch.float32, "it is small"
    return torch.bfloat16, "the GPU's tensor cores want it"


# --------------------------------------------------------------------------------------------------
# files

def read_files(name, path, device, dtype):
    """Folder or hub name -> transformers' model, tokenizer and image processor.

    name: the model's name, for the error message.
    """
    try:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
        if info["missing_keys"]:                        # transformers would draw them at random
            missing = ", ".join(sorted(info["missing_keys"]))
            raise ValueError(f"the file has no weights {missing}")
        model = model.to(device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
        message = f"cannot load {name} from {path}: {run.one_line(e, 300)}"
        if not os.path.isdir(path):
            message += ("; its weights come from the Hugging Face hub, "
                        "which needs a network or a filled cache (HF_HOME)")
        run.fail(message)
    # Copy the weights out of the mapped file: there a matrix may begin at any byte, and on a CPU
    # its alignment shows in the last bit of products.
    for p in model.parameters():
        p.data = p.data.clone()
    return model, tokenizer, processor


def write_files(folder, parts, card):
    """Write the parts of a model and its `card`, vlm.json, into folder + ".tmp" -> that path."""
    tmp = folder.rstrip("/") + ".tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    for part in parts:
        part.save_pretrained(tmp)
    run.write_json(os.path.join(tmp, "vlm.json"), card)
    return tmp


def print_loaded(vlm, reason):
    """Print one line: size, precision and the reason for it, device."""
    total = sum(p.numel() for p in vlm.model.parameters()) / 1e6
    trained = sum(p.numel() for p in vlm.parameters()) / 1e6
    if vlm.device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"{torch.get_num_threads()} CPU threads"
    print(f"{vlm.name}: {total:.2f} M parameters ({trained:.2f} M trained, vision tower frozen), "
          f"{str(vlm.dtype)[6:]} ({reason}), attention sdpa, on {device}")
