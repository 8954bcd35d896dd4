"""The vision tower of both families, written out: patches of images -> image tokens.

    patches -> embedding -> layers of attention and MLP -> merger: 2 x 2 patches become one token

    Qwen2.5-VL   most layers attend within windows of 8 x 8 patches, the others within an image
    Qwen3-VL     every layer attends within an image; positions are learned as well as rotary, and
                 some layers give features to early layers of the language model ("deepstack")

transformers holds the weights. Its own forward pass calls attention once for each window, which is
thousands of calls for a large image, and in every layer the CPU waits for the GPU to read how long
the windows are. Here the lengths are counted on the CPU, once, and all windows of the same size are
attended to in one call:

    patches by image      A A A A B B B B B B              (two images)
    windows by size       [A A] [A A] [B B]   [B B B B]    (three of 2 patches, one of 4)
    attention calls       one for the first three, one for the last

The features are those of transformers (tests/test_tower.py).

Shapes:  n patches of all images   N = n / 4 tokens   H heads   d width of a head   D, width
"""
import itertools

import torch
import torch.nn.functional as F

MERGE = 2                       # MERGE x MERGE patches become one token, in both families


def run_tower(tower, pixels, grids):
    """Image features: pixels (n, 3 * 2 * patch ** 2) -> tokens (N, D), list of deep ones (N, D).

    tower: transformers' module; grids: (1, h, w) of each image in patches. The four patches of a
    token stand side by side. The deep features are empty for Qwen2.5-VL.
    """
    order, windows = arrange(grids, window_side(tower))             # (N,) tokens, window by window
    by_image, images = arrange(grids)                               # (N,) tokens, image by image
    back = order.argsort()                                          # (N,) where each token stands
    device = pixels.device
    patch_order = patches_of(order).to(device)                                          # (n,)
    to_images = patches_of(back[by_image]).to(device)                                   # (n,)
    from_images = to_images.argsort()

    x = embed(tower, pixels, grids)[patch_order]                                        # (n, D)
    rope = rotations(tower, grids, patch_order)
    deep_layers = getattr(tower, "deepstack_visual_indexes", [])
    whole = getattr(tower, "fullatt_block_indexes", [])             # layers without windows
    back = back.to(device)
    deep = []
    for i, block in enumerate(tower.blocks):
        q, k, v = project(block.attn, block.norm1(x), rope)                             # (n, H, d)
        if i in whole:
            seen = attend(q[to_images], k[to_images], v[to_images], images)[from_images]
        else:
            seen = attend(q, k, v, windows)                                             # (n, H, d)
        x = x + block.attn.proj(seen.flatten(1))
        x = x + block.mlp(block.norm2(x))
        if i in deep_layers:
            merger = tower.deepstack_merger_list[deep_layers.index(i)]
            deep.append(merger(x)[back])
    return tower.merger(x)[back], deep


# --------------------------------------------------------------------------------------------------
# who attends to whom. All of it is counted on the CPU, from the sizes of the images.

def window_side(tower):
    """Tokens on a side of a window; None: the tower has no windows."""
    pixels = getattr(tower, "window_size", None)
    return pixels and pixels // tower.patch_size // MERGE


def arrange(grids, side=None):
    """Put the tokens of a window side by side, and windows of the same size, too.

    side: tokens on a side of a window, which is smaller at the right and lower edge of an image;
    None: an image is one window.
    -> (N,) numbers of the tokens in their new order, [(windows, patches in each)] in that order.
    """
    window_of = []                                      # per image (its tokens,): window numbers
    first = 0                                           # number of an image's first window
    for _, h, w in grids:
        h = h // MERGE
        w = w // MERGE
        length = side or max(h, w)
        row = torch.arange(h)[:, None] // length
        column = torch.arange(w) // length
        number = first + row * (int(column[-1]) + 1) + column                           # (h, w)
        window_of.append(number.flatten())
        first = int(number[-1, -1]) + 1
    window_of = torch.cat(window_of)                                                    # (N,)
    sizes = window_of.bincount()                                                # of each window
    order = (sizes[window_of] * first + window_of).argsort(stable=True)     # by size, by number
    runs = []
    for size, equal in itertools.groupby(sorted(sizes.tolist())):
        runs.append((len(list(equal)), size * MERGE ** 2))
    return order, runs


def patches_of(tokens):
    """Numbers of tokens (N,) -> numbers of their patches (n,)."""
    return (tokens[:, None] * MERGE ** 2 + torch.arange(MERGE ** 2)).flatten()


def attend(q, k, v, runs):
    """Attention within windows: q, k, v (n, H, d) -> like q.

    runs: [(windows, patches in each)]; each entry is one call, which needs no mask.
    """
    sizes = [windows * patches for windows, patches in runs]
    out = []
    for (windows, _), *qkv in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes)):
        qkv = [x.unflatten(0, (windows, -1)).transpose(1, 2) for x in qkv]
        x = F.scaled_dot_product_attention(*qkv)                    # (windows, H, patches, d)
        out.append(x.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


# --------------------------------------------------------------------------------------------------
# positions

def project(attention, x, rope):
    """x (n, D) -> queries, keys, values (n, H, d), the first two turned by their positions."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    return rotate(q, *rope), rotate(k, *rope), v


def rotate(x, cos, sin):
    """model.rotate, in fp32 as transformers does it."""
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def rotations(tower, grids, order):
    """cos and sin (n, 1, d) of all patches in this order: half of the angles are those of the row.

    sin has a minus in its first half, as `rotate` takes it.
    """
    places = []
    for _, h, w in grids:
        row = torch.arange(h)[:, None].expand(h, w)
        column = torch.arange(w).expand(h, w)
        places.append(by_token(torch.stack([row, column], -1)))                         # (h * w, 2)
    places = torch.cat(places).to(order.device)[order]                                  # (n, 2)
    inv_freq = tower.rotary_pos_emb.inv_freq.to(order.device).float()                   # (d / 4,)
    angle = (places[:, :, None].float() * inv_freq).flatten(1)                          # (n, d / 2)
    cos = angle.cos()[:, None]
    sin = angle.sin()[:, None]
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def by_token(x):
    """Patches in their places (h, w, X) -> (h * w, X), the four of a token side by side."""
    h, w, _ = x.shape
    x = x.unflatten(1, (w // MERGE, MERGE)).unflatten(0, (h // MERGE, MERGE))
    return x.transpose(1, 2).flatten(0, 3)


def embed(tower, pixels, grids):
    """Patches (n, 3 * 2 * patch ** 2) -> (n, D): one matrix, and Qwen3-VL's learned positions.

    Those are a square grid of vectors, which is stretched over the image.
    """
    matrix = tower.patch_embed.proj                     # a convolution whose patches do not overlap
    x = F.linear(pixels, matrix.weight.flatten(1), matrix.bias)
    if not hasattr(tower, "pos_embed"):
        return x
    learned = tower.pos_embed.weight.float()                                            # (S * S, D)
    side = int(len(learned) ** 0.5)
    square = learned.T.unflatten(1, (side, side))[None]                             # (1, D, S, S)
    stretched = []
    for _, h, w in grids:
        image = F.interpolate(square, (h, w), mode="bilinear", align_corners=True)
        stretched.append(by_token(image[0].permute(1, 2, 0)))
    return x + torch.cat(stretched).to(x.dtype)
