"""What the released DINOv2 does image by image and rank by rank, written from its description: the golden files pin it
down, and the batched code of dinov2.py is compared with it (test_dinov2.py)."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from common import random_crop


def uniform(low, high):
    """One draw of torch's global generator."""
    return float(torch.empty(1).uniform_(low, high))


def crop_resize_pil(image, box, size):
    """Crop, then resize (not both at once, which would see beyond the crop): box (top, left, height, width)."""
    top, left, height, width = box
    return image.crop((left, top, left + width, top + height)).resize((size, size), Image.BICUBIC)


def shift_hue_pil(image, turns):
    """Through 8-bit HSV, modulo 256."""
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray(((np.array(h).astype(int) + int(turns * 255)) % 256).astype(np.uint8))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def blur_pil(image, sigma):
    """Nine taps each way, mirrored edges, rounded."""
    kernel = torch.exp(-0.5 * (torch.linspace(-4, 4, 9) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, None].float()
    pixels = F.conv2d(F.pad(pixels, (4, 4, 4, 4), mode="reflect"), torch.outer(kernel, kernel)[None, None])
    return Image.fromarray(pixels[:, 0].round().permute(1, 2, 0).byte().numpy())


OPERATIONS = [
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    shift_hue_pil,
]


def view_pil(image, size, scale, blur_probability, second=False):
    """One crop in the released order of operations and draws -> PIL image."""
    image = crop_resize_pil(image, random_crop(*image.size, scale, None), size)
    if torch.rand(1) < 0.5:
        image = ImageOps.mirror(image)
    if not 0.8 < torch.rand(1):
        order = torch.randperm(4).tolist()
        factors = [uniform(0.6, 1.4), uniform(0.6, 1.4), uniform(0.8, 1.2), uniform(-0.1, 0.1)]
        for operation in order:
            image = OPERATIONS[operation](image, factors[operation])
    if torch.rand(1) < 0.2:
        grey = image.convert("L")
        image = Image.merge("RGB", (grey, grey, grey))
    if not blur_probability < torch.rand(1):
        image = blur_pil(image, uniform(0.1, 2.0))
    if second and torch.rand(1) < 0.2:
        image = ImageOps.solarize(image, 128)
    return image


def views_pil(image, sizes, locals_):
    """Two global crops and `locals_` local ones, of these two sizes, with blur as often as it really comes."""
    scales = ((0.32, 1.0), (0.05, 0.32))
    crops = [view_pil(image, sizes[0], scales[0], p, second) for p, second in ((0.0, False), (0.9, True))]
    return crops, [view_pil(image, sizes[1], scales[1], 0.5) for _ in range(locals_)]


def sharded_order(n, rank, world, seed, new=False):
    """Indices of the training sampler: each rank keeps its share of one permutation and shuffles it anew each pass."""
    share = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[rank::world][: n // world]
    passes = 0
    while True:
        chance = torch.Generator().manual_seed(seed + rank + (passes << 24))
        if new:
            order = share[torch.randperm(len(share), generator=chance)]
        else:
            order = share.clone()
            for i in range(len(share)):
                j = int(torch.randint(0, i + 1, (1,), generator=chance)) if i else 0
                order[i] = order[j]
                order[j] = share[i]
        yield from order.tolist()
        passes += 1


def infinite_order(n, rank, world, seed):
    """Indices of the sampler without shards: one generator for all passes, of each of which a rank takes its share."""
    chance = torch.Generator().manual_seed(seed)
    while True:
        order = list(range(n))
        for i in range(n):
            j = int(torch.randint(i, n, (1,), generator=chance))
            order[i], order[j] = order[j], order[i]
        yield from order[rank::world]


def eval_transform_pil(image, resize, crop):
    """Shorter side to `resize`, central crop -> uint8 array [crop, crop, 3]."""
    width, height = image.size
    short = min(width, height)
    size = [resize if side == short else int(resize * side / short) for side in (width, height)]
    image = image.resize(size, Image.BICUBIC)
    left, top = (int(round((side - crop) / 2.0)) for side in size)
    return np.array(image.crop((left, top, left + crop, top + crop)))
