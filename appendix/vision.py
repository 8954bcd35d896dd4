"""From pixels to image features: patches, normalisation, the vision tower in bounded batches.

The tower itself is transformers' own. What stands here saves time and memory around it: an image is
kept as bytes until the tower takes it, several are resized at once, each is encoded once.

Functions take a model.VLM and its model.View objects.

Shapes:  h, w patches of an image (grid)   n = h * w   N = n / 4 image tokens   D width
"""
import math
from concurrent.futures import ThreadPoolExecutor

import torch


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
        images = pool.map(resized, new)
        for view, pixels in zip(new, images):
            patchify(vlm, view, pixels)
    patches = torch.cat([view.patches for view in views])
    grids = torch.tensor([view.grid for view in views]).to(vlm.device)
    with torch.set_grad_enabled(grad):
        out = vlm.model.model.get_image_features(pixel_values(vlm, patches), grids,
                                                 return_dict=True)
    deep = list(out.deepstack_features) if vlm.qwen3 else []            # one entry per early layer
    if deep and torch.is_tensor(deep[0]):               # transformers 5.17 leaves them in one piece
        sizes = [view.tokens() for view in views]
        deep = [layer.split(sizes) for layer in deep]
    for i, view in enumerate(views):
        view.set_features(out.pooler_output[i], [layer[i] for layer in deep])


def resized(view):
    return view.pixels()
