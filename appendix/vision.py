"""One image as the model sees it: which part, at which size, in which coordinates, as features.

    box of the source image -> resized image -> patches -> the vision tower -> N image tokens

The tower itself is in appendix/tower.py. What stands around it saves time and memory: an image is
kept as bytes until the tower takes it, several are resized at once, each is encoded once.

`vlm` is a model.VLM.

Shapes:  h, w patches of an image (grid)   n = h * w   N = n / 4 image tokens   D width
"""
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

from appendix.tower import run_tower


class View:
    """One image as the model sees it: a box of a source image, resized, and its features.

    The only place that maps between pixels of the source and the coordinates that the model reads
    and writes: source = model * scale, with `scale` the pair (sx, sy), for a view of a whole image.
    """

    def __init__(self, source, fed, convention, index=0, box=None, grid=None):
        self.source = source                            # PIL image
        self.fed = fed                                  # (width, height) in pixels, as fed
        self.index = index                              # number of the prompt image it shows
        self.box = box or (0, 0, *source.size)          # left, top, right, bottom in source pixels
        self.grid = grid                                # (1, h, w) in patches
        width = self.box[2] - self.box[0]
        height = self.box[3] - self.box[1]
        if convention == "thousand":
            self.scale = (width / 1000, height / 1000)
        else:
            self.scale = (width / fed[0], height / fed[1])
        self.patches = None                             # (n, 3 * patch ** 2) bytes
        self.features = None                            # (N, D)
        self.deep = None                                # Qwen3-VL: list of (N, D), for early layers

    def to_source(self, x, y):
        """The model's coordinates -> source pixels."""
        return self.box[0] + x * self.scale[0], self.box[1] + y * self.scale[1]

    def from_source(self, x, y):
        """Source pixels -> the integers that a model would write."""
        return round((x - self.box[0]) / self.scale[0]), round((y - self.box[1]) / self.scale[1])

    def pixels(self):
        """The image as fed. Cut first: resize(box=...) would mix in pixels beyond the crop."""
        return self.source.crop(self.box).resize(self.fed, Image.Resampling.BICUBIC)

    def tokens(self, merge=2):
        """How many image tokens it takes: merge x merge patches become one token."""
        return self.grid[1] * self.grid[2] // merge ** 2

    def set_patches(self, patches):
        self.patches = patches

    def set_features(self, features, deep):
        self.features = features
        self.deep = deep
        self.patches = None

    def drop_features(self):
        """Free the memory; `encode` computes the features again when they are needed."""
        self.features = None
        self.deep = None


# --------------------------------------------------------------------------------------------------
# the features

def patchify(vlm, view, pixels=None):
    """Cut an image into patches (n, 3 * patch ** 2) of bytes, stored in view.patches.

    The 2 x 2 patches that become one token stand side by side. pixels: the image as fed, if known.
    """
    pixels = pixels or view.pixels()
    raw = bytearray(pixels.convert("RGB").tobytes())
    x = torch.frombuffer(raw, dtype=torch.uint8)
    patch = vlm.processor.patch_size
    merge = vlm.processor.merge_size
    _, h, w = view.grid
    x = x.view(h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.permute(0, 3, 1, 4, 6, 2, 5)                  # rows, columns, 2, 2, color, patch, patch
    view.set_patches(x.reshape(h * w, -1))


def pixel_values(vlm, patches):
    """Patches (n, 3 * patch ** 2) of bytes -> (n, 3 * 2 * patch ** 2), normalised.

    The tower takes pairs of video frames, so an image comes twice.
    """
    processor = vlm.processor
    mean = torch.tensor(processor.image_mean, dtype=torch.float32, device=vlm.device)
    std = torch.tensor(processor.image_std, dtype=torch.float32, device=vlm.device)
    x = patches.to(vlm.device).unflatten(1, (3, 1, -1)).to(torch.float32)
    x = x.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])
    return x.to(vlm.dtype).expand(-1, -1, processor.temporal_patch_size, -1).flatten(1)


def encode(vlm, views, grad, max_patches):
    """Run the vision tower on the views that have no features, at most max_patches at a time.

    -> how many patches the tower saw. A view that stands in the list twice is encoded once.
    """
    different = {id(view): view for view in views}
    todo = [view for view in different.values() if view.features is None]
    batch = []
    size = 0                                            # patches in the batch
    for view in todo:
        n = math.prod(view.grid)
        if batch and size + n > max_patches:
            encode_batch(vlm, batch, grad)
            batch = []
            size = 0
        batch.append(view)
        size += n
    if batch:
        encode_batch(vlm, batch, grad)
    return sum(math.prod(view.grid) for view in todo)


def encode_batch(vlm, views, grad):
    """Fill the features (N, D) of the views; of Qwen3-VL also those for its early layers."""
    new = [view for view in views if view.patches is None]
    with ThreadPoolExecutor() as pool:                  # resizing is slow and releases the lock
        images = pool.map(View.pixels, new)
        for view, pixels in zip(new, images):
            patchify(vlm, view, pixels)
    patches = torch.cat([view.patches for view in views])
    grids = [view.grid for view in views]
    with torch.set_grad_enabled(grad):
        tokens, deep = run_tower(vlm.model.model.visual, pixel_values(vlm, patches), grids)
    sizes = [view.tokens() for view in views]
    tokens = tokens.split(sizes)
    deep = [layer.split(sizes) for layer in deep]       # one entry per early layer
    for i, view in enumerate(views):
        view.set_features(tokens[i], [layer[i] for layer in deep])
