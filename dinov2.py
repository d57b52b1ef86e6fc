# SPDX-License-Identifier: MIT
"""DINOv2: self-distillation of a class token and of masked patches; distillation; data curation.

"DINOv2: Learning Robust Visual Features without Supervision", Oquab, Darcet, Moutakanni, Vo,
Szafraniec, Khalidov et al., TMLR 2024, arXiv 2304.07193. Registers: arXiv 2309.16588.

The idea. A teacher is the moving average of the student. It describes a view of an image by its
share in each of many prototypes. The student sees another view, often a small part, and must give
the same description (DINO). It also sees a view with masked patches, and must give the teacher's
description of each hidden patch (iBOT). So the class token learns what the image is, the patches
what is where. Sinkhorn-Knopp spreads the descriptions over all prototypes, KoLeo the class tokens
over the sphere. Small models are distilled from a large one. The data are chosen without labels.

    image -- 2 global crops [2*B, 3, S, S] -- teacher -> class token -> head -> q [2*B, K] ------.
      |            |                           : EMA     patches ----> head -> q' [n, K'] ----.  |
      |            '-- blocks masked --------. :                                              |  |
      |                                      student --> patches -> head -> p' - iBOT: H(q', p') |
      '-- V local crops [V*B, 3, s, s] ------' '-----> class tokens -> head -> p - DINO: H(q, p) '
                                                             '-- KoLeo: the nearest other image

    python dinov2.py                                            # toy images, minutes on a laptop
    torchrun --nproc-per-node 8 dinov2.py --data imagenet       # the released ViT-L/16
    python dinov2.py --init dinov2_vits14_pretrain.pth --no-train --data DIR --eval picture,knn
    python dinov2.py curate --pool a/features.npz --refs b/features.npz --out list.txt

More: `--preset toy-student --teacher runs/dinov2/last.pt` distils. `--init RUN/last.pt --image-size
518 --local-size 224 --steps 10000` is the high-resolution phase. `--list list.txt` trains on it.

Departures. From the paper, with the released code: KoLeo on both global crops, blur in the inverse
proportion, stochastic depth scaled by B / kept, decayed tokens, a first step of rate 0, clipping by
module. From the code: KoLeo in groups and masks stratified over the global batch, so that ranks
change nothing; equal images do not enter KoLeo; global and local crops are two passes, where the
code packs them in one sequence: the same numbers. Distillation, the high-resolution phase and
curation follow the paper's text: their code was not released.
"""

import argparse
import copy
import functools
import itertools
import math
import random
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

import common
from common import MLP, Attention, PatchEmbed, fail

# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag. The comment beside it is its help. Shares are of the run's length."""

    preset: str = ""  # a name of PRESETS, by default the one that fits --data
    data: str = "toy"  # toy, letters, textures, cifar10, imagenet, or a folder of images
    list: str = ""  # file with a name a line, as `curate` writes: train on these images only

    # model
    image_size: int = 24  # side of a global crop, pixels
    local_size: int = 12  # side of a local crop, pixels
    patch: int = 4  # side of a patch, pixels
    width: int = 64  # width of the encoder
    depth: int = 4  # blocks of the encoder
    heads: int = 4  # attention heads
    registers: int = 0  # register tokens
    swiglu: bool = False  # SwiGLU instead of an MLP
    layer_scale: float = 1.0  # initial LayerScale
    drop_path: float = 0.0  # share of the samples that a residual branch leaves out
    init_std: float = 0.02  # std of the initial weights
    patch_std: float = 0.0  # std of the initial patch projection, 0 = PyTorch's own
    prototypes: int = 256  # K, prototypes of the DINO head
    head_hidden: int = 128  # hidden width of the DINO head
    bottleneck: int = 32  # width of the DINO head before the prototypes
    separate_heads: bool = True  # iBOT has a head of its own
    ibot_prototypes: int = 256  # K', prototypes of the iBOT head
    ibot_hidden: int = 128  # hidden width of the iBOT head
    ibot_bottleneck: int = 32  # width of the iBOT head before the prototypes

    # views
    local_crops: int = 4  # V, local crops of an image
    global_scale: tuple[float, float] = (0.32, 1.0)  # area of a global crop, share of the image
    local_scale: tuple[float, float] = (0.05, 0.32)  # area of a local crop, share of the image
    blur: bool = True  # blur and solarize crops; not for images of a few pixels

    # loss
    koleo_group: int = 32  # images among which KoLeo looks for neighbours, at most the batch
    centering: Literal["sinkhorn", "softmax"] = "sinkhorn"  # softmax: minus a moving centre
    teacher_temp: tuple[float, float] = (0.04, 0.07)  # teacher temperature: first, and in the end
    temp_warmup: float = 0.3  # share in which the teacher temperature rises
    teacher: str = ""  # a last.pt of this script: distil its teacher and heads into this model
    distill_tokens: float = 1.0  # share of the patches in the distilled iBOT loss

    # optimisation
    train: bool = True  # train; --no-train only evaluates --init
    batch: int = 64  # images a step, over all ranks
    recompute: bool = False  # hold less memory: compute activations again in the backward pass
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps, wins over --epochs
    warmup: float = 0.1  # share in which the learning rate rises from 0
    lr: float = 4e-3  # learning rate for a batch of 1024; the peak is lr * sqrt(batch / 1024)
    lr_decay: float = 1.0  # learning rates shrink by this factor a block, from last to first
    freeze_last: float = 0.01  # share in which the prototypes stay as they are
    weight_decay: float = 0.04  # weight decay at the start
    weight_decay_final: float = 0.4  # weight decay at the end
    momentum: float = 0.992  # EMA momentum at the start, 1 at the end

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/dinov2, runs/dinov2-2, ...
    resume: bool = False  # continue from last.pt in the run's folder, or start if there is none
    init: str = ""  # weights to start from or to evaluate: ours, the authors', or the Hub's
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between rows of log.jsonl
    device: Literal["", "cuda", "mps", "cpu"] = ""  # default the best there is
    precision: Literal["", "bf16", "fp16", "fp32"] = ""  # default bf16 where it is fast
    compile: bool = torch.cuda.is_available()  # torch.compile the networks
    shard: bool = False  # FSDP2 instead of DDP, for models that do not fit one GPU
    workers: int = 0  # loading processes a rank, 0 = load between the steps

    # evaluation
    eval: str = "knn,linear"  # comma-separated: knn, linear, head, features, picture
    linear_head: str = ""  # a released linear head (.pth), for --eval head
    tokens: bool = False  # --eval features also writes the patch tokens
    probe_augment: bool = False  # probe on random crops, each encoded anew
    probe_epochs: int = 10  # passes of the linear probe
    probe_batch: int = 256  # batch of the linear probe


# --------------------------------------------------------------------------------------------------
# Views: colours and blur of a whole batch at once, on the device. Pixels are 0..255.
# --------------------------------------------------------------------------------------------------


# Copied from msn.py
def grey_levels(images):
    """Return PIL's grey of images [B, 3, H, W], rounded: [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue + 0.5).floor()


# Copied from msn.py
def blend(base, images, factors):
    """Return base + factor (images - base), cut off as PIL does. factors [B]."""
    mixed = torch.lerp(base, images, factors[:, None, None, None])
    # 1e-3 for values that rounding puts just below an integer
    return (mixed.clamp(0, 255) + 1e-3).floor()


def brightness(images, factors):
    """Blend with black: images [B, 3, H, W], factors [B]."""
    return blend(images.new_zeros(()), images, factors)


# Copied from msn.py
def contrast(images, factors):
    """Blend with the mean grey: images [B, 3, H, W], factors [B]."""
    mean = grey_levels(images).mean((1, 2, 3), keepdim=True)
    return blend((mean + 0.5).floor(), images, factors)


def saturation(images, factors):
    """Blend with the grey image: images [B, 3, H, W], factors [B]."""
    return blend(grey_levels(images), images, factors)


def hue(images, turns):
    """Shift the hue: images [B, 3, H, W], turns [B]. PIL's goes through 8-bit HSV, so it rounds."""
    thirds = 2.0 * torch.arange(3, device=images.device)[:, None, None]  # in sixths of a turn
    value = images.amax(1, keepdim=True)  # [B, 1, H, W]
    span = value - images.amin(1, keepdim=True)
    # where red is largest: green - blue; green: blue - red, a third on; blue: red - green
    difference = images.roll(-1, 1) - images.roll(-2, 1)
    smaller = (value - images).clamp(max=1)  # 0 or 1, since pixels are integers
    sixths = (thirds + difference / span.clamp(min=1e-6) - 6 * smaller).amax(1, keepdim=True)
    # each channel falls and rises once in a turn
    k = (5 - thirds + sixths + 6 * turns[:, None, None, None]) % 6  # [B, 3, H, W]
    return (value - span * torch.minimum(k, 4 - k).clamp(0, 1)).round()


def grey(images, amounts):
    """Turn images [B, 3, H, W] grey."""
    return grey_levels(images).expand_as(images)


def blur(images, sigma):
    """Blur by 9 x 9 taps of a Gaussian, edges mirrored: images [B, 3, H, W], sigma [B] pixels."""
    offset = torch.arange(-4, 5, device=images.device)
    kernel = (-0.5 * (offset / sigma[:, None]) ** 2).exp()
    kernel = kernel / kernel.sum(1, keepdim=True)  # [B, 9]
    kernel = kernel.repeat_interleave(3, dim=0)[:, None, None]  # [3*B, 1, 1, 9]
    x = F.pad(images, [4] * 4, mode="reflect").flatten(0, 1)[None]  # [1, 3*B, H + 8, W + 8]
    x = F.conv2d(x, kernel, groups=len(kernel))
    x = F.conv2d(x, kernel.mT, groups=len(kernel))
    return x.view_as(images).round()


def solarize(images, amounts):
    """Invert what is brighter than half: images [B, 3, H, W]."""
    return torch.where(images >= 128, 255 - images, images)


def mirror(images, amounts):
    """Mirror images [B, 3, H, W]."""
    return images.flip(3)


OPERATIONS = (mirror, brightness, contrast, saturation, hue, grey, blur, solarize)
SHARES = torch.tensor([0.5, 0.8, 0.8, 0.8, 0.8, 0.2])  # of the views; the last two are rarer
# (blur, solarize) of first and second global crop, and of local crops. The released code says blur
# on all, 10 % and half of them, but its wrapper inverts the probability.
RARE = {"global": [(0.0, 0.0), (0.9, 0.2)], "local": [(0.5, 0.0)]}


def draw_augmentation(u, rare):
    """Turn uniform numbers u [B, 17] into (order int64 [B, 8], amounts [B, 8]) of `augment`.

    rare [B, 2]: probabilities of blur and of solarization.
    """
    low = torch.tensor([0.0, 0.6, 0.6, 0.8, -0.1, 0.0, 0.1, 0.0])
    high = torch.tensor([0.0, 1.4, 1.4, 1.2, 0.1, 0.0, 2.0, 0.0])
    order = torch.arange(8).repeat(len(u), 1)
    order[:, 1:5] = 1 + u[:, :4].argsort(1)
    shares = torch.cat([SHARES.expand(len(u), -1), rare], dim=1)
    drawn = u[:, [4, 5, 5, 5, 5, 6, 7, 8]] < shares  # the jitter's four come together or not at all
    return order.where(drawn, -1), torch.lerp(low, high, u[:, 9:])


def augment(images, order, amounts):
    """Apply OPERATIONS to images [B, 3, H, W], in place.

    order [B, 8], on the CPU: which comes first, second, ..., -1 = none; amounts [B, 8]: of each.
    """
    amounts = amounts.to(images.device, non_blocking=True)
    for drawn in order.T:
        for number, operation in enumerate(OPERATIONS):
            rows = (drawn == number).nonzero()[:, 0]
            if len(rows):
                rows = rows.to(images.device, non_blocking=True)
                images.index_copy_(0, rows, operation(images[rows], amounts[rows, number]))
    return images


def augment_views(pixels, config, kind, step, rank=0):
    """Return normalised crops [V*b, 3, s, s] of a rank's pixels, uint8 [V, b, 3, s, s].

    kind: global or local. Numbers are drawn for the whole batch, so that ranks change nothing.
    """
    views, share = pixels.shape[:2]
    generator = common.generator(config.seed, kind, step)
    u = torch.rand(views, config.batch, 17, generator=generator)
    u = u[:, rank * share : (rank + 1) * share].flatten(0, 1)
    rare = config.blur * torch.tensor(RARE[kind])[:, None]
    rare = rare.expand(views, share, 2).flatten(0, 1)
    images = pixels.flatten(0, 1).float()
    return common.normalize(augment(images, *draw_augmentation(u, rare)))


# --------------------------------------------------------------------------------------------------
# Masks: blocks of patches (iBOT; data/masking.py of the released code)
# --------------------------------------------------------------------------------------------------


def largest_block(size, patch):
    """Return the patches of the largest block: half the image, floored as in the released code."""
    return int(0.5 * size // patch * size // patch)


def block_mask(target, grid, largest, rng):
    """Return a mask of about `target` patches (up to 5 fewer): bool array [grid, grid].

    Its blocks have 4 to `largest` patches, and a height of 0.3 to 1 / 0.3 of the width.
    """
    mask = np.zeros((grid, grid), dtype=bool)
    while mask.sum() < target:
        room = min(target - mask.sum(), largest)
        for _ in range(10):
            area = rng.uniform(4, room)
            ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height = round(math.sqrt(area * ratio))
            width = round(math.sqrt(area / ratio))
            if width < grid and height < grid:
                top = rng.randint(0, grid - height)
                left = rng.randint(0, grid - width)
                block = mask[top : top + height, left : left + width]
                if 0 < (~block).sum() <= room:
                    block[:] = True
                    break
        else:  # ten blocks did not fit
            break
    return mask


def sample_masks(config, step, images):
    """Draw the masks of both global crops of some images of a step's batch: bool [2*b, N].

    images: their places in the batch, a range. Half of all crops are masked, by shares that are
    stratified over the global batch. A mask depends on seed, step and place only.
    """
    c = config
    grid = c.image_size // c.patch
    rng = random.Random(f"{c.seed} masks {step}")
    edges = np.linspace(0.1, 0.5, c.batch + 1)  # masked share of the patches
    shares = [rng.uniform(*pair) for pair in itertools.pairwise(edges)]
    targets = [int(grid**2 * share) for share in shares]
    targets += [0] * c.batch
    rng.shuffle(targets)
    largest = largest_block(c.image_size, c.patch)
    masks = []
    for place in (*images, *(c.batch + i for i in images)):
        rng = random.Random(f"{c.seed} mask {step} {place}")
        masks.append(block_mask(targets[place], grid, largest, rng))
    return torch.from_numpy(np.stack(masks)).flatten(1)


def masked_tokens(masks):
    """Return what iBOT looks at in masks [M, N]: places int64 [n] in the flat M*N, weights [n].

    A weight is 1 / (masked patches of the same image).
    """
    weights = 1 / masks.sum(1, keepdim=True).clamp(min=1)
    return masks.flatten().nonzero()[:, 0], weights.expand_as(masks)[masks]


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), w1 and w2 in one Linear. 2/3 of the hidden width: an MLP's cost."""

    def __init__(self, width, hidden):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned gain per channel."""

    def __init__(self, width, initial):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return x * self.gamma


def draw_kept(rate, depth, batches, generator):
    """Draw the samples that stochastic depth keeps: for each size of crop int64 [depth, 2, k].

    batches: samples of each size. In the released order: block, branch, size of crop.
    """
    kept = [[] for _ in batches]
    for _ in range(2 * depth):
        for rows, batch in zip(kept, batches, strict=True):
            order = torch.randperm(batch, generator=generator)
            rows.append(order[: max(1, int(batch * (1 - rate)))])
    return [torch.stack(rows).view(depth, 2, -1) for rows in kept]


def add_branch(x, branch, kept, queries=slice(None)):
    """Return x + branch(x) at the tokens `queries` that the branch returns.

    Stochastic depth: it sees the samples `kept` only. It counts B / k times for these k samples, as
    in the released code, not 1 / (1 - rate).
    """
    if kept is None:
        return x[:, queries] + branch(x)
    change = branch(x[kept]).to(x.dtype)
    return x[:, queries].index_add(0, kept, change, alpha=len(x) / len(kept))


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and stochastic depth."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, config.heads)
        self.ls1 = LayerScale(width, config.layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = (SwiGLU if config.swiglu else MLP)(width, 4 * width)
        self.ls2 = LayerScale(width, config.layer_scale)

    def forward(self, x, kept=None, queries=slice(None)):
        """x [B, N, D] -> [B, n, D]; kept: int64 [2, k], of both branches.

        queries: a slice, which tokens come out.
        """
        attention, mlp = (None, None) if kept is None else kept

        def attend(x):
            return self.ls1(self.attn(self.norm1(x), queries))

        x = add_branch(x, attend, attention, queries)
        return add_branch(x, lambda x: self.ls2(self.mlp(self.norm2(x))), mlp)


def position_table(table, grid, offset=0.1, antialias=False):
    """Resample a table [1, 1 + M*M, D], its first entry the class token's, to grid [rows, columns].

    With an offset the scale is (rows + offset) / M, as in the released code: not quite a resize.
    """
    side = math.isqrt(table.shape[1] - 1)
    if grid == [side, side]:
        return table
    patches = table[:, 1:].mT.unflatten(2, (side, side))  # [1, D, M, M]
    to = {"size": grid}
    if offset:
        to = {"scale_factor": [(n + offset) / side for n in grid]}
    patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **to)
    return torch.cat([table[:, :1], patches.flatten(2).mT], dim=1)


class Encoder(nn.Module):
    """The vision transformer. Images may have any size that is a multiple of the patch."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.patch = c.patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        patches = (c.image_size // c.patch) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, c.width))
        self.registers = c.registers
        if c.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, c.registers, c.width))
        # how positions are interpolated: the released models with registers do it otherwise
        self.offset = 0.0 if c.registers else 0.1
        self.antialias = c.registers > 0
        self.mask_token = nn.Parameter(torch.zeros(1, c.width))
        self.patch_embed = PatchEmbed(c.patch, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)

    def embed(self, images, masks=None):
        """Return [class | registers, which have no position | patches or mask tokens]."""
        x = self.patch_embed(common.patchify(images, self.patch))  # [B, N, D]
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        grid = [side // self.patch for side in images.shape[2:]]
        positions = position_table(self.pos_embed, grid, self.offset, self.antialias)
        first = self.cls_token + positions[:, :1]
        if self.registers:
            first = torch.cat([first, self.register_tokens], dim=1)
        first = first.expand(len(x), -1, -1)
        return torch.cat([first, x + positions[:, 1:]], dim=1)

    def forward(self, images, masks=None, kept=None, layers=0, queries=slice(None)):
        """Return tokens after the final norm [B, 1 + R + N, D] of images [B, 3, H, W].

        masks: bool [B, N], hidden patches; kept: int64 [depth, 2, k] of `draw_kept`.
        queries: a slice, the tokens that the last block computes.
        layers: n > 0 returns a list: the outputs of the last n blocks, each after the final norm.
        """
        x = self.embed(images, masks)
        outputs = []
        for i, block in enumerate(self.blocks, start=1):
            asked = queries if i == len(self.blocks) else slice(None)
            x = block(x, None if kept is None else kept[i - 1], asked)
            outputs.append(x)
        if layers:
            return [self.norm(output) for output in outputs[-layers:]]
        return self.norm(x)


class Prototypes(nn.Module):
    """K directions with a gain each: a weight-normed Linear whose gain is trained."""

    def __init__(self, bottleneck, prototypes):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Linear(bottleneck, prototypes, bias=False).weight

    def forward(self, x):
        """[..., bottleneck] -> [..., K]."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class Head(nn.Module):
    """Three layers to a point on the sphere, then its product with each prototype."""

    def __init__(self, width, hidden, bottleneck, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.last_layer = Prototypes(bottleneck, prototypes)

    def forward(self, x):
        """[..., D] -> logits before any temperature [..., K]."""
        return self.last_layer(F.normalize(self.mlp(x).float(), dim=-1))


class DINOv2(nn.Module):
    """Encoder and heads: the student, and again the teacher."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.encoder = Encoder(c)
        self.dino_head = Head(c.width, c.head_hidden, c.bottleneck, c.prototypes)
        if c.separate_heads:
            self.ibot_head = Head(c.width, c.ibot_hidden, c.ibot_bottleneck, c.ibot_prototypes)

    def forward(self, crops, places, local=None, masks=None, kept=(None, None)):
        """Return (class tokens, their DINO logits, those of local crops, iBOT logits of patches).

        crops [M, 3, S, S]: global, with masks bool [M, N]; places int64 [n]: patches that iBOT
        looks at, in the flat M*N; local [L, 3, s, s]; kept: of `draw_kept`, for both sizes.
        Returns [M, D], [M, K], [L, K], [n, K'].
        """
        tokens = self.encoder(crops, masks, kept[0])
        cls = tokens[:, 0]
        patches = tokens[:, 1 + self.encoder.registers :].flatten(0, 1)[places]
        patch_logits = getattr(self, "ibot_head", self.dino_head)(patches)
        local_cls = cls[:0]
        if local is not None:  # of local crops only the class token is read
            local_cls = self.encoder(local, kept=kept[1], queries=slice(1))[:, 0]
        logits = self.dino_head(torch.cat([cls, local_cls]))
        return cls, logits[: len(cls)], logits[len(cls) :], patch_logits


def build(config):
    """Return a fresh (student, teacher). The teacher starts as a copy of the student."""
    torch.manual_seed(config.seed)
    model = DINOv2(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=config.init_std)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model.encoder.pos_embed, std=0.02)
    if config.registers:
        nn.init.normal_(model.encoder.register_tokens, std=1e-6)
    if config.patch_std:
        nn.init.normal_(model.encoder.patch_embed.proj.weight, std=config.patch_std)
    return model, copy.deepcopy(model).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def sinkhorn(logits, temperature, iterations=3):
    """Return the teacher's targets by Sinkhorn-Knopp: logits [B, K] -> [B, K], rows sum to 1.

    Over all ranks' rows each prototype is used equally. In log space no sum can overflow or vanish,
    and a rank may have no rows. The textbook's constants cancel.
    """
    log_q = logits.float() / temperature
    for _ in range(iterations):
        used = common.gather_over_ranks(log_q.logsumexp(0, keepdim=True))  # [ranks, K]
        log_q = (log_q - used.logsumexp(0)).log_softmax(1)
    return log_q.exp()


@torch.no_grad()
def softmax_centering(logits, centre, temperature, momentum=0.9):
    """Return the teacher's targets by centring [B, K] and the next centre [1, K] (DINO).

    The batch's own mean, over all ranks, enters the centre only afterwards.
    """
    logits = logits.float()
    count = logits.new_full((1,), len(logits))
    total = common.mean_over_ranks(torch.cat([logits.sum(0), count]))
    mean = total[None, :-1] / total[-1].clamp(min=1e-6)  # of no rows: 0
    following = torch.lerp(mean, centre, momentum)
    return ((logits - centre) / temperature).softmax(-1), following


def teacher_targets(config, logits, patch_logits, centres, temperature):
    """Return the targets of both losses [2*b, K] and [n, K'], and the next two centres."""
    if config.centering == "sinkhorn":
        targets = sinkhorn(logits, temperature)
        return targets, sinkhorn(patch_logits, temperature), centres
    targets, centre = softmax_centering(logits, centres[0], temperature)
    patch_targets, patch_centre = softmax_centering(patch_logits, centres[1], temperature)
    return targets, patch_targets, [centre, patch_centre]


def cross_entropy(logits, targets, temperature=0.1):
    """Return -sum_k targets_k log softmax(logits / temperature)_k. The softmax is never stored."""
    scaled = logits.float() / temperature
    return targets.sum(-1) * scaled.logsumexp(-1) - (targets * scaled).sum(-1)


def koleo_loss(x, group):
    """Return the mean -log of the distance to the nearest other of x [B, D] on the sphere.

    Neighbours are within `group` consecutive rows. Pairs closer than 0.001 are left out: equal
    images would count -log(0). The released code has no such guard.
    """
    x = F.normalize(x.float(), dim=1).unflatten(0, (-1, group))  # [groups, group, D]
    with torch.no_grad():
        similarity = x @ x.mT
        similarity.diagonal(dim1=1, dim2=2).fill_(-1)
        nearest = similarity.argmax(2, keepdim=True).expand_as(x)
    distance = (x - x.gather(1, nearest) + 1e-8).norm(dim=2)
    return -torch.where(distance > 1e-3, distance + 1e-8, 1.0).log().mean()


def total_loss(student, targets, patch_targets, weights, config):
    """Return the loss and its four terms.

    student: what `DINOv2.forward` returns; targets [2*b, K]; patch_targets [n, K'] and weights [n]
    of the chosen patches. Each student crop meets both teacher crops, but not itself: 2 + 2 V
    pairs, which count equally. Cross entropy is linear in targets: their sum is all teachers.
    """
    cls, logits, local_logits, patch_logits = student
    first, second = targets.chunk(2)  # [b, K]
    local_logits = local_logits.unflatten(0, (-1, len(first)))  # [V, b, K]
    pairs = 2 + 2 * len(local_logits)
    across = torch.cat([second, first])  # crop 1 of the student meets crop 2 of the teacher
    dino_global = 2 * cross_entropy(logits, across).mean() / pairs
    dino_local = cross_entropy(local_logits, first + second).sum(0).mean() / pairs
    ibot = (cross_entropy(patch_logits, patch_targets) * weights).sum() / len(cls)
    group = min(config.koleo_group, config.batch)
    koleo = 2 * koleo_loss(cls, group)  # the sum over both crops
    terms = {"dino_global": dino_global, "dino_local": dino_local, "ibot": ibot, "koleo": koleo}
    loss = dino_global + dino_local + ibot + 0.1 * koleo
    return loss, {name: term.detach() for name, term in terms.items()}


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def make_views(split, config, rank, ranks, step):
    """Make a rank's crops of a step, which depend on seed and step only.

    Returns (global crops uint8 [2, b, 3, S, S], local crops [V, b, 3, s, s], masks [2*b, N], places
    and weights of `masked_tokens`, unreadable files). In distillation the masks are the patches
    that count.
    """
    c = config
    share = c.batch // ranks
    mine = range(rank * share, (rank + 1) * share)
    indices = common.micro_batch_indices(step, c.batch, len(split), c.seed)[mine.start : mine.stop]
    scales = [c.global_scale] * 2 + [c.local_scale] * c.local_crops
    sizes = [c.image_size] * 2 + [c.local_size] * c.local_crops

    def boxes(i, width, height):
        generator = common.generator(c.seed, "crops", step, mine[i])
        return [common.random_crop(width, height, scale, generator) for scale in scales]

    _, *crops, bad = split.read_batch(indices, boxes, sizes, Image.BICUBIC)
    if c.teacher:
        patches = (c.image_size // c.patch) ** 2
        keys = torch.rand(2, c.batch, patches, generator=common.generator(c.seed, "tokens", step))
        masks = keys[:, mine.start : mine.stop].flatten(0, 1) < c.distill_tokens
    else:
        masks = sample_masks(c, step, mine)
    places, weights = masked_tokens(masks)
    return torch.stack(crops[:2]), torch.stack(crops[2:]), masks, places, weights, bad


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def schedules(config, step, steps):
    """Return what changes from step to step. The first step has rate 0, the warmup's last peak."""
    c = config
    warmup = round(c.warmup * steps)
    peak = c.lr * math.sqrt(c.batch / 1024)
    if step < warmup:
        lr = common.linear_schedule(step, warmup - 1, 0.0, peak)
    else:
        lr = common.cosine_schedule(step - warmup, steps - warmup, peak, 1e-6)
    last = max(1, round(c.temp_warmup * steps) - 1)  # where the temperature has risen
    return {
        "lr": lr,
        "last_layer_lr": 0.0 if step < round(c.freeze_last * steps) else lr,
        "weight_decay": common.cosine_schedule(step, steps, c.weight_decay, c.weight_decay_final),
        "momentum": common.cosine_schedule(step, steps, c.momentum, 1.0),
        "teacher_temp": common.linear_schedule(min(step, last), last, *c.teacher_temp),
    }


def parameter_rule(name, depth, lr_decay):
    """Return (lr multiplier, whether decayed, whether of the prototypes) of a parameter.

    Layer-wise: lr_decay^(depth + 1 - i), i = 0 for what makes the tokens, i = 1 ... depth for the
    blocks. Tokens, positions and the prototypes' gains are decayed (utils/param_groups.py).
    """
    layer = depth + 1
    block = re.search(r"blocks\.(?:\d+\.)?(\d+)\.", name)
    if block:
        layer = 1 + int(block[1])
    elif re.search("pos_embed|patch_embed|_token", name):
        layer = 0
    multiplier = lr_decay ** (depth + 1 - layer)
    if "patch_embed" in name:
        multiplier *= 0.2
    decayed = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    return multiplier, decayed, "last_layer" in name


def make_optimizer(model, config):
    """Return AdamW, with torch's betas, and a group for each distinct `parameter_rule`."""
    members = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rule = parameter_rule(name, config.depth, config.lr_decay)
            members.setdefault(rule, []).append(parameter)
    groups = [{"params": members[rule], "rule": rule} for rule in members]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def set_rates(optimizer, now):
    """Set this step's learning rates and weight decays."""
    for group in optimizer.param_groups:
        multiplier, decayed, last_layer = group["rule"]
        group["lr"] = multiplier * now["last_layer_lr" if last_layer else "lr"]
        group["weight_decay"] = now["weight_decay"] * decayed


def clip_gradients(model, limit=3.0):
    """Clip the gradients of encoder and heads, each by its own norm; return the norms before."""
    return [nn.utils.clip_grad_norm_(part.parameters(), limit) for part in model.children()]


def train(model, target, frozen, split, config, world):
    """Train (student, EMA teacher) on a Split. Returns the run; its last.pt holds the result.

    frozen: the teacher to distil, or None. Then the average is only kept, and nothing is masked.
    """
    c = config
    model.encoder.mask_token.requires_grad_(frozen is None)
    if c.recompute:
        for block in model.encoder.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    # the number of masked patches changes
    distribute = functools.partial(common.distribute, world=world, config=c, dynamic=True)
    network = distribute(model)  # DDP hides the parts that `model` has
    target = distribute(target)
    teacher = distribute(frozen) if frozen else target
    optimizer = make_optimizer(model, c)
    ema = common.EMA(target, model)
    patch_prototypes = c.ibot_prototypes if c.separate_heads else c.prototypes
    centres = nn.ParameterList([torch.zeros(1, c.prototypes), torch.zeros(1, patch_prototypes)])
    centres.to(world.device).requires_grad_(False)
    run = common.Run(c, world, split, network, optimizer, target=target, centres=centres)
    make = functools.partial(make_views, split, c, world.rank, world.size)
    loader = common.make_loader(make, range(run.step, run.steps), c, world)
    kept = (None, None)
    for step in run:
        now = schedules(c, step, run.steps)
        set_rates(optimizer, now)
        pixels, local_pixels, masks, places, weights = run.next(loader, split)
        crops = augment_views(pixels, c, "global", step, world.rank)  # [2*b, 3, S, S]
        local = augment_views(local_pixels, c, "local", step, world.rank)  # [V*b, 3, s, s]
        if c.drop_path:
            generator = common.generator(c.seed, "drop", step, world.rank)
            kept = draw_kept(c.drop_path, c.depth, [len(crops), len(local)], generator)
            kept = [rows.to(world.device, non_blocking=True) for rows in kept]
        with world.autocast():
            with torch.no_grad():
                _, logits, _, patch_logits = teacher(crops, places)
            student = network(crops, places, local, None if frozen else masks, kept)
        targets, patch_targets, next_centres = teacher_targets(
            c, logits, patch_logits, centres, now["teacher_temp"]
        )
        loss, terms = total_loss(student, targets, patch_targets, weights, c)
        run.backward(loss)
        applied = run.update(clip=lambda: clip_gradients(model))
        ema.update(now["momentum"], applied)
        for centre, following in zip(centres, next_centres, strict=True):
            centre.copy_(torch.where(applied, following, centre))
        # signs of collapse: the spread of class tokens, and how many prototypes are in use
        std = student[0].detach().float().std(0).mean()
        used = torch.special.entr(targets.mean(0)).sum().exp()
        run.log(**now, **terms, feature_std=std, prototypes=used)
    return run


# --------------------------------------------------------------------------------------------------
# Evaluate
# --------------------------------------------------------------------------------------------------

PROBE_LRS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


def encode(encoder, images):
    """Return features of images [B, 3, S, S]: [B, 1 + L, D].

    The mean patch token of the last block, then the class tokens of the last L = 4, oldest first.
    """
    layers = encoder(images, layers=4)
    patches = layers[-1][:, 1 + encoder.registers :].mean(1)
    return torch.stack([patches, *(x[:, 0] for x in layers)], dim=1)


def best_knn(bank, labels, queries, wanted):
    """Return the top-1 of kNN in percent: the best of the paper's numbers of neighbours."""
    cosines, nearest = neighbours(queries, bank, 200)
    votes = (cosines / 0.07).exp()
    found = []
    for k in (10, 20, 100, 200):
        scores = votes.new_zeros(len(votes), int(labels.max()) + 1)
        scores.scatter_add_(1, labels[nearest[:, :k]], votes[:, :k])
        found.append(common.top1(scores, wanted))
    return max(found)


def linear_probe(batches, steps, val, labels, classes, config):
    """Return the best top-1 on val in percent of the paper's grid of linear heads, and its name.

    Heads see one block or all L, with and without the mean patch, at each rate. All are trained at
    once by SGD, as one weight [H, C, (1 + L) * D + 1], its last column the bias.
    batches(epoch) yields (features [B, 1 + L, D], labels), `steps` in all; val [V, 1 + L, D].
    """
    blocks = val.shape[1] - 1
    grid = [PROBE_LRS, (1.0, blocks), (0.0, 1.0)]  # rate, blocks, whether the mean patch
    heads = torch.cartesian_prod(*(torch.tensor(values, device=val.device) for values in grid))
    rates, last, mean = heads.T[..., None]  # each [H, 1]
    place = torch.arange(blocks + 1, device=val.device)
    seen = (place > blocks - last) | (place < mean)  # [H, 1 + L]
    seen = seen.repeat_interleave(val.shape[2], 1)
    seen = F.pad(seen, (0, 1), value=True)[:, None]  # [H, 1, (1 + L) * D + 1]
    generator = common.generator(config.seed, "probe")
    weight = 0.01 * torch.randn(len(heads), classes, seen.shape[2], generator=generator)
    weight[..., -1] = 0.0
    weight = (weight.to(val.device) * seen).requires_grad_()
    velocity = torch.zeros_like(weight)
    done = 0

    def scores(x):
        """Return the scores [B, H, C] of features [B, 1 + L, D]."""
        x = F.pad(x.flatten(1), (0, 1), value=1.0)
        return (x @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2])

    for epoch in range(config.probe_epochs):
        for x, y in batches(epoch):
            y = y[:, None].expand(-1, len(heads))
            loss = F.cross_entropy(scores(x).transpose(1, 2), y, reduction="sum") / len(x)
            (gradient,) = torch.autograd.grad(loss, weight)
            velocity.mul_(0.9).add_(gradient * seen)
            factor = common.cosine_schedule(done, steps, config.probe_batch / 256, 0.0)
            weight.data.sub_(factor * rates[..., None] * velocity)
            done += 1
    with torch.no_grad():
        found = torch.cat([scores(x).argmax(2) for x in val.split(512)])  # [V, H]
    accuracy = 100 * (found == labels[:, None]).float().mean(0)
    lr, last, mean = heads[accuracy.argmax()].tolist()
    return accuracy.max().item(), f"lr {lr:g}, {last:g} blocks, {mean:g} mean patch"


def head_scores(path, features):
    """Return the scores [N, C] of a released linear head on features [N, 1 + L, D].

    Its weight is [C, 2 D], for class token and mean patch, or [C, 5 D], for four blocks.
    """
    head = common.load_checkpoint(path)
    if not {"weight", "bias"} <= head.keys():
        fail(f"{path} is no linear head: expected weight and bias")
    columns = head["weight"].shape[1]
    inputs = columns // features.shape[2]
    if columns % features.shape[2] or inputs not in (2, features.shape[1]):
        fail(f"{path} takes {columns} numbers, not what a width of {features.shape[2]} gives")
    x = features.roll(-1, 1)[:, -inputs:].flatten(1)  # there the mean patch comes last
    return x @ head["weight"].to(x).T + head["bias"].to(x)


# Copied from msn.py
@dataclass
class RandomCrops(common.Split):
    """A split whose images are read as random crops, half of them mirrored."""

    key: tuple = ()  # what the draws depend on

    def read_batch(self, indices, choose_boxes, sizes, resample):
        """See `common.Split.read_batch`; choose_boxes is not asked."""
        random = common.generator(*self.key, indices[0])

        def box(i, width, height):
            return [common.random_crop(width, height, (0.08, 1.0), random)]

        index, pixels, bad = super().read_batch(indices, box, sizes, resample)
        flips = torch.rand(len(pixels), 1, 1, 1, generator=random) < 0.5
        return index, torch.where(flips, pixels.flip(3), pixels), bad


def evaluate_one(read, train, val, config, world):
    """Return {evaluation: top-1 in percent} of `read`, images -> [B, 1 + L, D]; on rank 0."""
    c = config

    def extract(split):
        return common.extract(read, split, c, world)[:2]

    def batches(epoch):
        """Yield the probe's batches on rank 0; the others help to encode."""
        features = bank
        if c.probe_augment:
            features = extract(RandomCrops(**vars(train), key=(c.seed, "probe", epoch)))
        if world.rank == 0:
            yield from common.shuffled_batches(*features, c.probe_batch, c.seed)(epoch)

    test, labels = extract(val)
    result = {}
    if "knn" in c.eval or not c.probe_augment:
        bank = extract(train)
    if world.rank > 0:
        for epoch in range(c.probe_epochs * ("linear" in c.eval)):
            list(batches(epoch))
        return {}
    if "knn" in c.eval:
        features, bank_labels = bank
        result["knn"] = best_knn(features[:, -1], bank_labels, test[:, -1], labels)
    if "linear" in c.eval:
        steps = c.probe_epochs * math.ceil(len(train) / c.probe_batch)
        probe = linear_probe(batches, steps, test, labels, len(train.classes), c)
        result["linear"], head = probe
        common.note(f"linear: the best head has {head}")
    if "head" in c.eval:
        result["head"] = common.top1(head_scores(c.linear_head, test), labels)
    return result


def evaluate(encoder, train, val, config, world, run):
    """Run --eval on the encoder, and beside it on a random encoder and on raw pixels."""
    random = build(config)[0].encoder.to(world.device).eval()
    # baselines are encoded once
    plain = replace(config, probe_augment=False, eval=config.eval.replace("head", ""))
    results = {}
    for name, read, c in (
        ("trained", functools.partial(encode, encoder), config),
        ("random", functools.partial(encode, random), plain),
        ("pixels", lambda images: common.raw_pixels(images)[:, None], plain),
    ):
        results[name] = evaluate_one(read, train, val, c, world)
    run.report(results)


def describe(encoder, images, all_tokens):
    """Return what features.npz holds: the class token [B, 1, D], and then perhaps all patches."""
    tokens = encoder(images)
    patches = tokens[:, 1 + encoder.registers :] if all_tokens else tokens[:, :0]
    return torch.cat([tokens[:, :1], patches], dim=1)


# --------------------------------------------------------------------------------------------------
# Picture
# --------------------------------------------------------------------------------------------------


def principal_components(x, count):
    """Return the first principal components of rows x [N, D]: [count, D], and scores [N, count].

    Their sign is arbitrary; here the entry of largest magnitude is positive.
    """
    x = x - x.mean(0)
    components = torch.linalg.eigh(x.T @ x).eigenvectors.T.flip(0)[:count]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()
    return components, x @ components.T


def pca_colours(features):
    """Return the colours of the paper's figure 1, [M, N, 3] in 0..1, of patches [M, N, D].

    Foreground are patches with a positive first component. Their own first three components
    become red, green and blue; the rest is black.
    """
    flat = features.flatten(0, 1)
    foreground = principal_components(flat, 1)[1][:, 0] >= 0
    scores = principal_components(flat[foreground], 3)[1]
    low = scores.amin(0)
    span = scores.amax(0) - low
    rgb = flat.new_zeros(len(flat), 3)
    rgb[foreground] = (scores - low) / span.clamp(min=1e-12)
    return rgb.unflatten(0, features.shape[:2])


@torch.no_grad()
def draw_picture(path, encoder, images, crops=(), rows=6):
    """Show what the encoder sees and finds.

    Columns: an image; crops [n, 3, s, s] of it; its patches' principal components as colours; the
    three images with the nearest class tokens. images [n, 3, S, S].
    """
    rows = min(rows, len(images))
    tokens = encoder(images).float()
    cls = F.normalize(tokens[:, 0], dim=1)
    similarity = cls @ cls.T - 2 * torch.eye(len(cls), device=cls.device)  # not itself
    nearest = similarity.topk(min(3, len(cls))).indices
    rgb = pca_colours(tokens[:rows, 1 + encoder.registers :])
    side = images.shape[3] // encoder.patch
    rgb = rgb.transpose(1, 2).unflatten(2, (-1, side))  # [rows, 3, side, side]
    rgb = (rgb - common.MEAN.to(rgb.device)) / common.STD.to(rgb.device)
    columns = [images, *crops, rgb, *(images[i] for i in nearest.T)]
    columns = [F.interpolate(x[:rows], images.shape[2:]) for x in columns]
    common.save_picture(path, torch.stack(columns, dim=1))
    common.note(f"{path}: images, crops, colours of the features, nearest images")


def draw_images(encoder, split, config, world, run):
    """Draw the picture of a Split's images, without crops."""
    indices = range(min(64, len(split)))
    _, pixels, _ = common.centre_crops(split, config.image_size, indices)
    images = common.normalize(pixels.to(world.device))
    draw_picture(run.out / "picture.png", encoder, images)


@torch.no_grad()
def report(teacher, split, config, world, run):
    """After training: does the description of a view find the image's other view? And the picture.

    Among 256 unseen images; chance is 1 / 256.
    """
    c = replace(config, batch=min(256, len(split)))
    item = make_views(split, c, 0, 1, 0)
    pixels, local_pixels, masks, places, _ = run.next(iter([item]), split)
    crops = augment_views(pixels, c, "global", 0)  # [2*n, 3, S, S]
    local = augment_views(local_pixels, c, "local", 0)
    logits = teacher(crops, places)[1]
    descriptions = F.normalize((logits.float() / c.teacher_temp[1]).softmax(1), dim=1)
    first, second = descriptions.chunk(2)  # [n, K]
    found = (first @ second.T).argmax(1) == torch.arange(len(first), device=world.device)
    share = 100 * found.float().mean().item()
    common.note(f"a description finds the other view of its image, of {c.batch}: {share:.1f} %")
    run.write(view_found=share)
    hidden = masks.view(len(crops), 1, c.image_size // c.patch, -1).float()
    hidden = F.interpolate(hidden, scale_factor=c.patch)
    first, second = crops.chunk(2)
    masked = second * (1 - hidden[c.batch :])
    columns = [masked, *local.split(c.batch)[:2]]
    draw_picture(run.out / "picture.png", teacher.encoder, first, columns)


# --------------------------------------------------------------------------------------------------
# Weights: ours, the authors', the Hub's
# --------------------------------------------------------------------------------------------------

MODEL = "image_size patch width depth heads registers swiglu separate_heads".split()
MODEL += "prototypes head_hidden bottleneck ibot_prototypes ibot_hidden ibot_bottleneck".split()


def read_weights(path, heads=0):
    """Read a checkpoint: state dicts `model` and `target` of DINOv2, and `fields` of Config.

    Ours, with `config`; the authors', a bare encoder or a training snapshot, of which the heads are
    left out, its blocks perhaps in chunks (blocks.CHUNK.I); the Hub's.
    heads: attention heads, where they are not 64 wide.
    """
    state = common.load_checkpoint(path, "dinov2")
    if "script" in state:
        config = state["config"]
        fields = {name: config[name] for name in MODEL}
        weights = {"model": state["model"], "target": state["target"]}
        return {**weights, "fields": fields, "config": config}
    found = state.get("teacher") or state.get("model") or state
    if not {"pos_embed", "cls_token", "patch_embed.proj.weight"} <= found.keys():
        common.refuse(path, "DINOv2: expected cls_token, pos_embed and more", state)
    fields = common.vit_fields(found, path, heads)
    found.setdefault("mask_token", torch.zeros(1, fields["width"]))
    fields["registers"] = found["register_tokens"].shape[1] if "register_tokens" in found else 0
    fields["swiglu"] = any("mlp.w12" in name for name in found)
    renamed = {}
    for name, value in found.items():
        if "_head." not in name:
            name = re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", name)
            renamed[f"encoder.{name}"] = value
    return {"model": renamed, "target": renamed, "fields": fields}


def load_weights(model, target, weights, path):
    """Put what `read_weights` found into (student, teacher). Heads that it lacks stay fresh."""
    for module, name in ((model, "model"), (target, "target")):
        fresh = {n: value for n, value in module.state_dict().items() if "_head." in n}
        common.load_state(module, {**fresh, **weights[name]}, f"{path}, {name}")


def load_teacher(path, heads=0):
    """Return the frozen teacher, a DINOv2, of any checkpoint.

    Its encoder turns images [B, 3, S, S] into tokens [B, 1 + R + N, D], the class token first.
    """
    weights = read_weights(path, heads)
    model, target = build(replace(Config(), **weights["fields"]))
    load_weights(model, target, weights, path)
    return target.eval()


# --------------------------------------------------------------------------------------------------
# Curate (section 3 and appendix A): drop near-duplicates and what is in a test set, retrieve
#
# All images are compared by features in memory: a million of width 384 take 1.5 GB.
# --------------------------------------------------------------------------------------------------


def neighbours(queries, bank, k, same=False):
    """Return (cosines, indices) [Q, k] of the k most similar rows of bank [N, D] to queries [Q, D].

    same: the queries are the bank, and a row is not its own neighbour. An exact copy of it is one.
    """
    bank = F.normalize(bank, dim=1)
    k = min(k, len(bank) - same)
    cosines = []
    indices = []
    chunk = max(1, 2**27 // len(bank))  # 0.5 GiB of similarities
    for i, rows in enumerate(F.normalize(queries, dim=1).split(chunk)):
        similarity = rows @ bank.T
        if same:
            similarity.diagonal(i * chunk).fill_(-2)
        nearest = similarity.topk(k, dim=1)
        cosines.append(nearest.values)
        indices.append(nearest.indices)
    return torch.cat(cosines), torch.cat(indices)


def components(count, edges):
    """Return the smallest index in the component of each of `count` nodes; edges int64 [E, 2]."""
    label = torch.arange(count, device=edges.device)
    while True:
        smaller = label[edges].amin(1, keepdim=True).expand_as(edges)
        lower = label.scatter_reduce(0, edges.flatten(), smaller.flatten(), "amin")
        lower = lower[lower]  # a label is a node too: take over its label
        if torch.equal(lower, label):
            return label
        label = lower


def self_dedup(x, k=64, threshold=0.6):
    """Find near-duplicates in x [N, D]: (component of each [N], indices of the first of each).

    They are in the graph of the k nearest neighbours whose cosine is above the threshold.
    """
    cosines, nearest = neighbours(x, x, k, same=True)
    row, column = (cosines > threshold).nonzero().unbind(1)
    label = components(len(x), torch.stack([row, nearest[row, column]], dim=1))
    return label, label.unique()


def relative_dedup(pool, refs, k=64, threshold=0.45, direct=False):
    """Return the indices of pool [N, D] that resemble none of refs [R, D].

    A component of the graph of both that holds a reference is dropped whole. direct: drop what
    resembles a reference itself; features not made for copy detection chain everything together.
    """
    if direct:
        return (neighbours(pool, refs, 1)[0][:, 0] <= threshold).nonzero()[:, 0]
    label, _ = self_dedup(torch.cat([pool, refs]), k, threshold)
    spoilt = torch.isin(label[: len(pool)], label[len(pool) :])
    return (~spoilt).nonzero()[:, 0]


def assign(x, centroids):
    """Return the centroid [C, D] with the largest cosine of each row of x [N, D]."""
    return neighbours(x, centroids, 1)[1][:, 0]


def spherical_kmeans(x, centroids, iterations=10):
    """Return centroids [C, D] of x [N, D] by cosine, from initial ones. An empty one stays put."""
    x = F.normalize(x, dim=1)
    centroids = F.normalize(centroids, dim=1)
    for _ in range(iterations):
        sums = torch.zeros_like(centroids).index_add(0, assign(x, centroids), x)
        centroids = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=1), centroids)
    return centroids


def retrieve_by_cluster(query_clusters, pool_clusters, more_than=3, take=10_000):
    """Return pool images of the clusters that hold more than `more_than` queries, ascending.

    Up to `take` of each, at random. query_clusters [Q], pool_clusters [N]: cluster numbers.
    """
    order = torch.randperm(len(pool_clusters), generator=common.generator("clusters"))
    order = order.to(pool_clusters.device)
    chosen = (query_clusters.bincount() > more_than).nonzero()[:, 0]
    found = [order[pool_clusters[order] == cluster][:take] for cluster in chosen]
    return torch.cat([order[:0], *found]).sort().values


def read_features(path):
    """Read a features.npz of any script: (features [N, D], paths)."""
    try:
        file = np.load(path)
        features = torch.from_numpy(file["features"])
        names = file["paths"].tolist()
    except Exception as error:  # whatever a broken file makes torch raise
        fail(f"{path} is no file of --eval features: {error}")
    return features.to("cuda" if torch.cuda.is_available() else "cpu"), names


CURATION = {
    "--out": ("curated.txt", "list of names, for --list"),
    "--k": (64, "neighbours looked at for duplicates"),
    "--self-threshold": (0.85, "cosine of duplicates; paper 0.6, with SSCD"),
    "--threshold": (0.85, "cosine to refs of what is dropped; paper 0.45, with SSCD"),
    "--per-query": (0, "images retrieved for a query; 0 = by cluster"),
    "--clusters": (1000, "clusters of the pool; paper 100,000"),
    "--per-cluster": (100, "images of each cluster with more than 3 queries; paper 10,000"),
}


def curate(argv):
    """Choose images of --pool by their features: no near-duplicates, nothing like --refs, and if
    there are --queries only what is near them. Write their names to --out."""
    parser = argparse.ArgumentParser(prog="dinov2.py curate", description=curate.__doc__)
    parser.error = fail
    parser.add_argument("--pool", required=True, help="features.npz of the images to choose from")
    parser.add_argument(
        "--refs", nargs="+", default=[], help="of test sets, which must stay unseen"
    )
    parser.add_argument("--queries", nargs="+", default=[], help="of images to find more like")
    parser.add_argument("--direct", action="store_true", help="drop no components, only neighbours")
    for flag, (default, text) in CURATION.items():
        parser.add_argument(flag, type=type(default), default=default, help=text)
    options = parser.parse_args(argv)
    pool, names = read_features(options.pool)
    refs = [read_features(path)[0] for path in options.refs]
    queries = [read_features(path)[0] for path in options.queries]
    widths = {x.shape[1] for x in (pool, *refs, *queries)}
    if len(widths) > 1:
        fail(f"features of one encoder are needed, these have widths of {widths}")
    label, kept = self_dedup(pool, options.k, options.self_threshold)
    common.note(f"self-dedup: {len(kept)} of {len(pool)} kept, largest {label.bincount().max()}")
    if refs:
        rest = relative_dedup(
            pool[kept], torch.cat(refs), options.k, options.threshold, options.direct
        )
        common.note(f"relative dedup: {len(rest)} of {len(kept)} kept")
        kept = kept[rest]
    if queries:
        pool = pool[kept]
        if options.per_query:
            found = [neighbours(x, pool, options.per_query)[1].flatten() for x in queries]
        else:
            order = torch.randperm(len(pool), generator=common.generator("centroids"))
            centroids = spherical_kmeans(pool, pool[order[: options.clusters].to(pool.device)])
            clusters = assign(pool, centroids)
            near = [assign(x, centroids) for x in queries]
            found = [retrieve_by_cluster(x, clusters, take=options.per_cluster) for x in near]
        kept = kept[torch.cat(found).unique()]
    lines = "".join(names[i] + "\n" for i in kept.tolist())
    with common.replacing(Path(options.out)) as file:
        file.write(lines.encode(errors="surrogateescape"))
    common.note(f"{options.out}: {len(kept)} images; train on them with --list {options.out}")


# --------------------------------------------------------------------------------------------------
# Presets and main
# --------------------------------------------------------------------------------------------------

SMALL = {"width": 384, "depth": 12, "heads": 6}
BASE = {"width": 768, "depth": 12, "heads": 12}
LARGE = {"width": 1024, "depth": 24, "heads": 16}
GIANT = {"width": 1536, "depth": 40, "heads": 24, "koleo_group": 12}
IMAGENET = {
    "data": "imagenet",
    "image_size": 224,
    "local_size": 96,
    "patch": 16,
    "layer_scale": 1e-5,
    "prototypes": 65536,
    "head_hidden": 2048,
    "bottleneck": 256,
    "ibot_hidden": 2048,
    "ibot_bottleneck": 256,
    "local_crops": 8,
    "log_every": 50,
    "workers": 12,
    "probe_augment": True,
    "probe_batch": 1024,
}
# The released configurations. Their lengths are in "epochs" of 1,250 steps, whatever the data.
SHORT = {
    **IMAGENET,
    "drop_path": 0.3,
    "centering": "softmax",
    "separate_heads": False,
    "koleo_group": 64,
    "batch": 2048,
    "steps": 125_000,
    "lr_decay": 0.9,
}
LONG = {
    **IMAGENET,
    "data": "imagenet22k",
    "local_size": 98,
    "patch": 14,
    "swiglu": True,
    "drop_path": 0.4,
    "prototypes": 131_072,
    "bottleneck": 384,
    "ibot_prototypes": 131_072,
    "batch": 3072,
    "steps": 625_000,
    "warmup": 80 / 500,
    "temp_warmup": 30 / 500,
    "freeze_last": 1 / 500,
    "lr": 2e-4,
    "weight_decay_final": 0.2,
    "momentum": 0.994,
}
# The paper's text, for --teacher: MLPs, no drop path, a peak of 1e-3.
DISTILLED = {**LONG, "swiglu": False, "drop_path": 0.0, "batch": 2048, "lr": 1e-3 / 2**0.5}
LARGEST = {**LONG, **GIANT, "shard": True, "recompute": True}
# One GPU: the released recipe with a lower rate, fewer prototypes and Sinkhorn.
FOLDER = {
    **IMAGENET,
    **SMALL,
    "data": "folder",
    "init_std": 0.03,
    "layer_scale": 0.1,
    "prototypes": 8192,
    "ibot_prototypes": 8192,
    "batch": 128,
    "epochs": 100,
    "lr": 2e-3,
    "weight_decay_final": 0.2,
    "momentum": 0.994,
}
# A cooler teacher and a higher rate, local crops that still show what classes differ in.
FEW_PIXELS = {
    "blur": False,
    "patch_std": 0.15,
    "global_scale": (0.4, 1.0),
    "local_crops": 2,
    "teacher_temp": (0.04, 0.05),
    "lr": 8e-3,
    "momentum": 0.99,
    "weight_decay_final": 0.1,
    "workers": 1,
}
TOY = {
    **FEW_PIXELS,
    "init_std": 0.09,
    "prototypes": 64,
    "ibot_prototypes": 64,
    "local_scale": (0.2, 0.5),
    "steps": 800,
    "probe_epochs": 15,
    "precision": "fp32",
}
CIFAR10 = {"data": "cifar10", "image_size": 32, "local_size": 16, "heads": 3, "log_every": 50}

PRESETS = {
    "toy": TOY,
    # small and short, to compare --teacher with none; so short that the average follows faster
    "toy-student": {
        **TOY,
        "width": 32,
        "depth": 2,
        "heads": 2,
        "init_std": 0.12,
        "lr": 1.6e-2,
        "momentum": 0.95,
        "steps": 400,
    },
    "cifar10-cpu": {
        **FEW_PIXELS,
        **CIFAR10,
        "width": 96,
        "init_std": 0.07,
        "local_scale": (0.15, 0.4),
        "steps": 3200,
    },
    "cifar10": {  # one GPU
        **CIFAR10,
        "blur": False,
        "width": 192,
        "depth": 9,
        "layer_scale": 0.1,
        "prototypes": 2048,
        "head_hidden": 512,
        "bottleneck": 128,
        "ibot_prototypes": 2048,
        "ibot_hidden": 512,
        "ibot_bottleneck": 128,
        "global_scale": (0.4, 1.0),
        "local_scale": (0.1, 0.4),
        "koleo_group": 64,
        "batch": 512,
        "epochs": 200,
        "lr": 1e-3,
        "weight_decay_final": 0.2,
        "momentum": 0.99,
        "workers": 8,
    },
    "folder": FOLDER,
    "vitl16_short": {**SHORT, **LARGE},
    "vitl14": {**LONG, **LARGE},
    "vitg14": LARGEST,
    "vitg14_reg4": {**LARGEST, "registers": 4},
}
for name, size in (("vits14", SMALL), ("vitb14", BASE), ("vitl14", LARGE)):
    PRESETS[f"{name}_distilled"] = {**DISTILLED, **size}
    PRESETS[f"{name}_reg4_distilled"] = {**DISTILLED, **size, "registers": 4}
DATA_PRESETS = {"toy": "toy", "letters": "toy", "textures": "toy", "cifar10": "cifar10"}
DATA_PRESETS.update({"imagenet": "vitl16_short", "imagenet22k": "vitl14", "*": "folder"})
# what a run that continues another one does not take over
HERE = "preset list teacher train epochs steps out resume init device precision".split()
HERE += "compile shard workers eval linear_head".split()


def check(config, world):
    """Refuse what would fail late or silently (exit 2)."""
    common.check(config, world, ("knn", "linear", "head", "features", "picture"))
    c = config
    if c.train and c.local_size % c.patch:
        fail(f"--local-size {c.local_size} is no multiple of --patch {c.patch}")
    if "head" in c.eval and not Path(c.linear_head).is_file():
        fail(f"--eval head needs a released head: no file --linear-head {c.linear_head}")
    group = min(c.koleo_group, c.batch)
    if c.train and c.batch % (group * world.size):
        ranks = f"{world.size} ranks with --koleo-group {group}"
        fail(f"--batch {c.batch} does not divide over {ranks}: change one of them")


def adopt_init(config, typed):
    """Take over what --init decides: (weights, config). In training ours decides everything."""
    weights = read_weights(config.init, config.heads if "heads" in typed else 0)
    fields = weights["fields"]
    ours = weights.get("config", {})
    if ours and config.train:
        kept = {*typed, *HERE}
        config = replace(config, **{k: v for k, v in ours.items() if k not in kept})
    if not ours:
        fields["image_size"] = 224 // fields["patch"] * fields["patch"]  # of the table: 518
    return weights, common.adopt(config, fields, typed, config.init)


@common.command_line
def main(argv=None):
    """Train and evaluate; see --help."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["curate"]:
        return curate(argv[1:])
    config, typed = common.parse_config(Config, PRESETS, DATA_PRESETS, argv)
    if config.init:
        weights, config = adopt_init(config, typed)
    if config.teacher:  # the student has its prototypes, and no stochastic depth
        theirs = common.load_checkpoint(config.teacher, "dinov2").get("config")
        if not theirs:
            fail(f"{config.teacher} is no run of dinov2.py, whose prototypes a student needs")
        names = ("patch", "image_size", "separate_heads", "prototypes", "ibot_prototypes")
        fields = {**{name: theirs[name] for name in names}, "drop_path": 0.0}
        config = common.adopt(config, fields, typed, config.teacher)
    world = common.start_world(config.device, config.precision)
    check(config, world)
    wanted = set(config.eval.split(","))
    labelled = ", ".join(sorted(wanted - {"features", "picture", "none"}))
    train_split, val, unseen = common.open_data(config.data, labelled, "textures")
    if config.list:
        train_split = train_split.listed(config.list)
    if config.train:
        model, target = build(config)
        if config.init:
            load_weights(model, target, weights, config.init)
        frozen = load_teacher(config.teacher) if config.teacher else None
        run = train(model, target, frozen, train_split, config, world)
        # what is evaluated is what was saved, in a network that is neither wrapped nor sharded
        target = load_teacher(run.out / "last.pt")
    else:
        target = load_teacher(config.init, config.heads)
        run = common.Run(config, world)
    target.to(world.device)
    if config.train and world.rank == 0:
        report(target, unseen, config, world, run)
    elif "picture" in wanted and world.rank == 0:
        draw_images(target.encoder, unseen, config, world, run)
    if "features" in wanted:
        read = functools.partial(describe, target.encoder, all_tokens=config.tokens)
        common.write_features(read, unseen, config, world, run)
    if val:
        evaluate(target.encoder, train_split, val, config, world, run)


if __name__ == "__main__":
    main()
