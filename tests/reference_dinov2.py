"""What the released DINOv2 draws, image by image and rank by rank, written from its description.

The golden files pin it down, and dinov2.py is compared with it (test_dinov2.py).
"""

import functools
import itertools

import numpy as np
import torch
from PIL import Image

import common
import dinov2

# size, scale, and for each crop the probabilities of blur and of solarization
CROPS = {
    "global": (24, (0.32, 1.0), [(0.0, 0.0), (0.9, 0.2)]),
    "local": (12, (0.05, 0.32), [(0.5, 0.0), (0.5, 0.0)]),
}


def uniform(low, high):
    """One draw of torch's global generator."""
    return float(torch.empty(1).uniform_(low, high))


def draw_crop(image, size, scale, blur, solarize):
    """Return a crop float [3, S, S], and order [8] and amounts [8] of `dinov2.augment`."""
    order = torch.full((8,), -1)
    amounts = torch.zeros(8)
    top, left, height, width = common.random_crop(*image.size, scale, None)
    # crop, then resize: both at once would see beyond the crop
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.BICUBIC)
    if torch.rand(1) < 0.5:
        order[0] = 0
    if not 0.8 < torch.rand(1):
        order[1:5] = 1 + torch.randperm(4)
        for i, change in enumerate((0.4, 0.4, 0.2)):
            amounts[1 + i] = uniform(1 - change, 1 + change)
        amounts[4] = uniform(-0.1, 0.1)
    if torch.rand(1) < 0.2:
        order[5] = 5
    if not blur < torch.rand(1):
        order[6] = 6
        amounts[6] = uniform(0.1, 2.0)
    if solarize and torch.rand(1) < solarize:
        order[7] = 7
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float(), order, amounts


def draw_crops(image, kind):
    """Return what `draw_crop` does of both crops of a kind, stacked."""
    size, scale, rare = CROPS[kind]
    crops = [draw_crop(image, size, scale, *shares) for shares in rare]
    return [torch.stack(parts) for parts in zip(*crops, strict=True)]


def draw_blocks(targets, rng):
    """Return masks of 16 x 16 patches: bool array [masks, 16, 16]."""
    return np.stack([dinov2.block_mask(target, 16, 128, rng) for target in targets])


def draw_masks(rng):
    """Return the 12 masks of 6 images, bool [12, 256], in the released order of draws."""
    shares = itertools.pairwise(np.linspace(0.1, 0.5, 7))
    # a generator: each share is drawn just before its blocks
    masks = draw_blocks((int(256 * rng.uniform(*pair)) for pair in shares), rng)
    masks = [*masks, *np.zeros((6, 16, 16), dtype=bool)]
    rng.shuffle(masks)
    return torch.from_numpy(np.stack(masks)).flatten(1)


def sharded_order(n, rank, world, seed, new=False):
    """Yield the training sampler's indices: a rank shuffles its share anew in each pass."""
    share = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    share = share[rank::world][: n // world]
    for passes in itertools.count():
        chance = torch.Generator().manual_seed(seed + rank + (passes << 24))
        if new:
            yield from share[torch.randperm(len(share), generator=chance)].tolist()
            continue
        order = share.clone()
        for i in range(1, len(share)):
            j = int(torch.randint(0, i + 1, (1,), generator=chance))
            order[i] = order[j]
            order[j] = share[i]
        yield from order.tolist()


def infinite_order(n, rank, world, seed):
    """Yield the indices of the sampler without shards: ranks take turns in each pass."""
    chance = torch.Generator().manual_seed(seed)
    while True:
        order = list(range(n))
        for i in range(n):
            j = int(torch.randint(i, n, (1,), generator=chance))
            order[i], order[j] = order[j], order[i]
        yield from order[rank::world]


ORDERS = {
    "sharded": sharded_order,
    "sharded_new": functools.partial(sharded_order, new=True),
    "infinite": infinite_order,
}
