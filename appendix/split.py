"""Which questions are held out: never trained on, in no trace, asked before and after training.

Rows that share an image stay on one side, because a model that was trained on a question about an
image has seen that image. The toy world needs no such split: see data.split_of.
"""
import os
import random

from appendix import files


def hold_out(samples, n, seed):
    """-> (held-out samples, the others), drawn from the seed.

    n: how many to hold out. They may be fewer where samples share images; where every group that
    shares images is larger than n, they are the smallest group; if all samples share images, none.
    """
    groups = image_groups(random.Random(seed).sample(samples, len(samples)))
    if len(groups) < 2:
        return [], samples
    smallest = min(groups, key=len)
    n = max(n, len(smallest))
    held_out = []
    others = []
    for group in groups:
        fits = len(held_out) + len(group) <= n
        side = held_out if fits else others
        side += group
    return held_out, others


def image_groups(samples):
    """The samples in groups, so that no two groups have an image in common -> list of lists."""
    parent = {}                                         # a forest over images: union-find

    def root(image):
        parent.setdefault(image, image)
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = parent[image]
        return image

    for s in samples:
        first = root(image_key(s.images[0]))
        for image in s.images[1:]:
            parent[root(image_key(image))] = first
    groups = {}
    for s in samples:
        groups.setdefault(root(image_key(s.images[0])), []).append(s)
    return list(groups.values())


def image_key(image):
    """What tells two images apart: the path of a file, the bytes, or the very PIL image."""
    if isinstance(image, str):
        return os.path.realpath(image)
    return id(image) if isinstance(image, files.IN_MEMORY) else image
