# SPDX-License-Identifier: MIT
"""IWM: an image world model, which predicts in latent space what a transformation does to an image.

"Learning and Leveraging World Models in Visual Representation Learning", Garrido, Assran, Ballas, Bardes, Najman,
LeCun, 2024, arXiv 2403.00504.

The idea. I-JEPA's predictor fills in what is hidden, and is thrown away. Here it is also told how the target was made
from the source: by which change of brightness, contrast, saturation and hue. If the change is told, hard enough, and
the predictor able enough, it becomes a world model: it applies the change to the representation, and the encoder must
keep what that needs (equivariance). If not, the encoder learns to ignore such changes (invariance). Which of the two
happened is measured by MRR: how near the top is the true transformed latent among 256 others, ranked by distance to the
prediction. And the predictor is kept: tuned on a frozen encoder, it does what tuning the encoder does.

    image -> random crop and flip I' [B, 3, S, S], shared by both views
      |-- jitter, grey, blur, solarize -- source x -> visible patches -- encoder --> [B, K, D] --.
      |                                                     :             action a [B, 7] -------+-> predictor
      |                                                     : EMA         hidden places [B, M] --'      |
      '-- jitter alone ------------------ target y -> all patches -- target encoder --> hidden [B, M, D] -- loss

    python iwm.py                                                   # toy images, a few minutes on a laptop
    python iwm.py --preset toy-invariant                            # the other end of the spectrum
    python iwm.py --data ~/photos                                   # ViT-S/16 on any folder of images, one GPU
    torchrun --nproc-per-node 8 iwm.py --data imagenet              # the paper's equivariant ViT-B/16
    python iwm.py --init runs/iwm/last.pt --data cifar10 --eval mrr,linear,attentive,finetune,segment,multitask

The paper reports (ViT-B/16, ImageNet-1k), invariant (predictor 12 x 384) and equivariant (18 x 384): MRR 0.09 and 0.79;
linear probe 74.5 and 67.5, attentive probe 77.0 and 75.1; encoder tuned 83.3 and 82.9, predictor tuned on the frozen
encoder 81.3 and 83.3 (a random predictor 80.5 and 81.5), both tuned 82.7 and 84.4. What this file was measured to do
stands in the README.

No code or weights were released. What is the paper's: shared crops, jitter and its strengths, destructive operations on
the source only, the action as differences and flags, features of mask tokens by a three-layer network or action tokens
in the sequence, four rectangles hidden, the squared error, MRR over 256 views, the null action when the predictor is
tuned. What it leaves open and is decided here: jitter in a fixed order, so that the action determines the target;
blur sigma and the threshold of solarize; ReLU and widths of the three layers; normed targets and the mean instead of
the sum, so that I-JEPA's learning rate fits (--no-target-norm, --reduction sum); one number of visible and of hidden
patches for the batch, random ones dropped; MRR by squared distance, with the encoder that is trained on the clean
source; all values of schedules beyond epochs; layout of the task token and of the attentive head. Encoder, positions
and moving average are I-JEPA's.
"""

import contextlib
import copy
import functools
import hashlib
import http.client
import io
import math
import os
import sys
import tarfile
import time
import urllib.request
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset

import common
from common import OLD_EMA as EMA, OldBlock as Block, OldCrossAttention as CrossAttention, OldLog as Log, OldViT as ViT, OldWorld as World, old_effective_rank as effective_rank, old_fail as fail, old_gather_tokens as gather_tokens, old_generator as generator

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag, and the comment beside it is its help text."""

    preset: str = ""  # a name of PRESETS; by default the one that fits --data
    data: str = "toy"  # toy, cifar10, imagenet, another folder of $DATA (default ./data), or a path

    # model
    image_size: int = 32  # side of the image, pixels
    patch: int = 8  # side of a patch, pixels
    width: int = 96  # encoder width
    depth: int = 4  # encoder blocks
    heads: int = 3  # attention heads of the encoder
    predictor_width: int = 64  # predictor width
    predictor_depth: int = 4  # predictor blocks
    predictor_heads: int = 2  # attention heads of the predictor, 0 = as the encoder
    conditioning: str = "feature"  # how the predictor learns of the action: feature, sequence or none (I-JEPA)
    init_std: float = 0.02  # std of the initial weights
    patch_std: float = 0.05  # std of the initial patch projection, 0 = as the other weights

    # views
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the crop that both views share, share of the image
    flip: bool = False  # mirror half of the images, both views alike
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.4, 0.2)  # brightness, contrast, saturation, hue (turns)
    jitter_share: float = 0.8  # share of the views with colour jitter
    grey: float = 0.2  # share of the sources that turn grey
    blur: float = 0.2  # share of the sources that are blurred
    blur_sigma: tuple[float, float] = (0.1, 1.0)  # std of the blur, pixels
    solarize: float = 0.1  # share of the sources whose light half is inverted (the paper's text: 0.2, its table: 0.1)
    action: str = "difference"  # of the jitter's factors: difference (the paper), or ratio (their logarithms)

    # masks
    masks: str = "corrected"  # official (I-JEPA's code) or corrected (blocks reach last row, column)
    blocks: int = 4  # rectangles that are hidden together
    block_scale: tuple[float, float] = (0.15, 0.2)  # area of a rectangle, share of the image
    block_aspect: tuple[float, float] = (0.75, 1.5)  # height / width of a rectangle
    min_visible: int = 5  # corrected masks: fewer visible patches than this are not accepted

    # loss
    loss: str = "l2"  # l2 (squared error, the paper) or smooth_l1 (I-JEPA)
    target_norm: bool = True  # layer norm without affine on targets
    reduction: str = "mean"  # over patches and dimensions: mean, or sum (the paper's formula)

    # optimisation
    batch: int = 96  # images a step, over all ranks
    accumulate: int = 1  # split a rank's share of the batch into this many forward passes
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps; wins over --epochs
    warmup: float = 0.1  # share of the run in which lr rises
    lr: float = 1e-3  # peak learning rate
    lr_start: float = 1e-4  # learning rate of the first step
    lr_final: float = 1e-6  # learning rate at the end of the schedule
    weight_decay: float = 0.04  # AdamW weight decay at the start
    weight_decay_final: float = 0.04  # weight decay at the end (half a cosine)
    momentum: float = 0.992  # EMA momentum of the target encoder at the start
    momentum_final: float = 1.0  # EMA momentum at the end (linear)
    schedule_scale: float = 1.0  # schedules are this many times longer than the run (>= 1)

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/iwm, runs/iwm-2, ...
    resume: bool = False  # continue from last.pt in the run's folder, or start if there is none
    init: str = ""  # checkpoint to start from or to evaluate: ours, of ijepa.py, or an official I-JEPA .pth.tar
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between rows of log.jsonl
    device: str = ""  # cuda, mps or cpu, default the best there is
    precision: str = ""  # bf16, fp16 or fp32, default bf16 where the hardware computes in it, else fp32
    compile: bool = torch.cuda.is_available()  # torch.compile the networks
    shard: bool = False  # FSDP2 instead of DDP, for models that do not fit one GPU
    workers: int = -1  # data loading processes a rank, -1 = as fits the machine and the data
    cache: float = 2.0  # GiB: data sets whose decoded pixels fit are kept in memory
    max_bad: float = 0.01  # share of unreadable images above which a run stops

    # evaluation
    eval: str = "knn,linear,mrr"  # of knn, linear, attentive, mrr, finetune, segment, multitask, features; or none
    baselines: bool = True  # evaluate a randomly initialised network and raw pixels beside it
    eval_limit: int = 0  # use at most this many training images for knn, linear and tuning, 0 = all
    eval_batch: int = 256  # images a forward pass in evaluation, a rank
    mrr_images: int = 256  # validation images of --eval mrr
    mrr_bank: int = 256  # transformations of each that are ranked
    mrr_actions: int = 8  # of these so many are predicted
    probe: str = "sgd"  # optimizer of the linear probe: lars or sgd
    probe_epochs: int = 28  # passes of the linear probe
    probe_batch: int = 256  # batch of the linear probe, over all ranks
    probe_lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)  # learning rates tried, scaled by batch / 256
    probe_decays: tuple[float, ...] = (5e-4, 0.0)  # weight decays tried
    probe_milestones: tuple[float, ...] = (0.286, 0.571, 0.857)  # share of the epochs after which lr is divided by 10
    tune_epochs: float = 20  # passes of attentive, finetune, segment and multitask
    tune_batch: int = 256  # batch of these, over all ranks
    tune_lr: float = 1e-3  # learning rate of heads and random predictors; what is pretrained gets a tenth
    features_split: str = "val"  # train or val
    features_out: str = ""  # file of --eval features, default features.npz in the run's folder
    tokens: bool = False  # --eval features also writes the patch tokens


WEAK = (0.4, 0.4, 0.2, 0.1)  # the paper's default jitter
PAPER = dict(
    data="imagenet", image_size=224, patch=16, width=768, depth=12, heads=12, predictor_width=384, predictor_heads=0,
    patch_std=0.0, crop_scale=(0.3, 1.0), flip=True, jitter=WEAK, blur_sigma=(0.1, 2.0), masks="official", batch=1024,
    epochs=300, warmup=40 / 300, lr=1e-3, lr_start=2e-4, weight_decay_final=0.4, momentum=0.996, schedule_scale=1.25,
    probe="lars", probe_epochs=50, probe_batch=16384, probe_lrs=(0.01, 0.05, 0.001), probe_milestones=(0.3, 0.6, 0.9),
    tune_epochs=100, tune_batch=1024, eval="linear,attentive,mrr,finetune", log_every=50,
)  # fmt: skip
# cifar10-cpu was measured as it is (README); cifar10 and folder not yet: made from it and the paper's recipe.
CIFAR10_CPU = dict(
    data="cifar10", predictor_depth=6, flip=True, steps=4000, warmup=0.05, mrr_images=128, tune_epochs=5,
    eval_limit=10000, log_every=100,
)  # fmt: skip
CIFAR10 = dict(
    data="cifar10", patch=4, width=192, depth=9, heads=3, predictor_width=128, predictor_depth=12, predictor_heads=4,
    init_std=0.05, patch_std=0.15, min_visible=12, crop_scale=(0.5, 1.0), flip=True, batch=512, epochs=200,
    weight_decay_final=0.2, log_every=50,
)  # fmt: skip
FOLDER = dict(
    data="folder", image_size=224, patch=16, width=384, depth=12, heads=6, predictor_width=192, predictor_depth=12,
    predictor_heads=0, min_visible=24, init_std=0.03, patch_std=0.0, crop_scale=(0.3, 1.0), flip=True,
    blur_sigma=(0.1, 2.0), batch=256, epochs=100, lr_start=2e-4, weight_decay_final=0.2, momentum=0.996, log_every=50,
)  # fmt: skip
TOY = dict(steps=600, probe_epochs=15, mrr_images=40, mrr_bank=64, tune_epochs=3)  # and the defaults of Config
PRESETS = {
    "toy": TOY,
    "toy-invariant": TOY | dict(jitter=WEAK, predictor_depth=1),
    "cifar10-cpu": CIFAR10_CPU,
    "cifar10-cpu-invariant": CIFAR10_CPU | dict(jitter=WEAK, predictor_depth=2),
    "cifar10": CIFAR10,
    "cifar10-invariant": CIFAR10 | dict(jitter=WEAK, predictor_depth=6),
    "folder": FOLDER,
    "vit_b16_equivariant_in1k": PAPER | dict(predictor_depth=18),
    "vit_b16_invariant_in1k": PAPER | dict(predictor_depth=12),
    "vit_l16_equivariant_in1k": PAPER | dict(width=1024, depth=24, heads=16, predictor_width=512, predictor_depth=36),
}
DATA_PRESETS = {"toy": "toy", "cifar10": "cifar10", "imagenet": "vit_b16_equivariant_in1k", "*": "folder"}
EVALUATIONS = ("knn", "linear", "attentive", "mrr", "finetune", "segment", "multitask", "features", "none")
SHARDED = ("knn", "linear", "features", "none")  # those that a sharded model can do


def check(config, world, training=True):
    """Refuse what cannot work, before any work (exit 2)."""
    c = config
    if c.image_size % c.patch:
        fail(f"--image-size {c.image_size} is not a multiple of --patch {c.patch}")
    for name, width, heads in (("", c.width, c.heads), ("predictor-", c.predictor_width, c.predictor_heads or c.heads)):
        if width % heads or width % 4:
            fail(f"--{name}width {width} must be a multiple of its heads, {heads}, and of 4")
    choices = dict(conditioning=("feature", "sequence", "none"), action=("difference", "ratio"),
                   loss=("l2", "smooth_l1"), reduction=("mean", "sum"), masks=("official", "corrected"),
                   probe=("lars", "sgd"), features_split=("train", "val"),
                   precision=("", "bf16", "fp16", "fp32"))  # fmt: skip
    for name, known in choices.items():
        if getattr(c, name) not in known:
            fail(f"--{name.replace('_', '-')} {getattr(c, name)!r} is not one of {', '.join(k for k in known if k)}")
    for name in c.eval.split(","):
        if name not in EVALUATIONS:
            fail(f"--eval {name!r} is not one of {', '.join(EVALUATIONS)}")
    limits = (1.0, 1.0, 1.0, 0.5) if c.action == "difference" else (0.99, 0.99, 0.99, 0.5)
    if any(not 0 <= value <= limit for value, limit in zip(c.jitter, limits)):
        fail(f"--jitter {c.jitter}: changes of brightness, contrast, saturation, hue must be in 0 to {limits}")
    if not 2 <= c.mrr_actions <= c.mrr_bank:
        fail(f"--mrr-actions {c.mrr_actions} must be 2 or more, and no more than the --mrr-bank of {c.mrr_bank}")
    if not training:
        return
    if c.batch % (world.size * c.accumulate):
        fail(f"--batch {c.batch} does not divide into {world.size} ranks x {c.accumulate} accumulations")
    grid = c.image_size // c.patch
    sizes = [math.prod(block_size(u / 100, grid, c.block_scale, c.block_aspect, c.masks)) for u in range(101)]
    if min(sizes) < 1 or max(sizes) + max(1, c.min_visible) > grid * grid:
        fail(
            f"on a {grid}x{grid} grid a hidden block has {min(sizes)} to {max(sizes)} patches, which is nothing or "
            f"leaves less than --min-visible {c.min_visible}: change --block-scale, or use smaller patches"
        )
    if c.schedule_scale < 1:
        fail(f"--schedule-scale {c.schedule_scale} is below 1: the schedules would end before the run does")
    if c.shard and c.precision == "fp16":
        fail("--shard works with bf16 and fp32, not with --precision fp16")
    if c.shard and not set(c.eval.split(",")) <= set(SHARDED):
        fail(f"--shard evaluates {', '.join(SHARDED)} only; run the others afterwards with --init RUN/last.pt --eval")


# ---------------------------------------------------------------------------------------------------------------------
# Views and actions: photometric operations on a batch at once, on the device (pixels in 0..1)
# ---------------------------------------------------------------------------------------------------------------------

NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation, hue that change nothing
ACTION = 7  # numbers in an action


def luma(images):
    """Grey of [B, 3, H, W] in 0..1 -> [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def turn_hue(images, turns):
    """Turn the hue: RGB [B, 3, H, W] in 0..1 through HSV and back; turns [B], 1 for the whole circle."""
    value, lowest = images.amax(1), images.amin(1)
    red, green, blue = images.unbind(1)
    span = value - lowest
    scale = span.clamp(min=1e-12).reciprocal_()
    hue = torch.where(value == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4))
    hue = torch.where(value == red, (green - blue).mul_(scale), hue).add_(6 * turns[:, None, None])
    hue -= 6 * (hue / 6).floor()  # in 0..6, six colours in a turn: red 0, green 2, blue 4
    places = torch.arange(0.0, 6.0, 2.0, device=images.device)[:, None, None]
    below = (hue[:, None] - places).abs_().sub_(3).abs_().neg_().add_(2).clamp_(0, 1)  # [B, 3, H, W], under `value`
    return below.mul_(span[:, None]).neg_().add_(value[:, None])


def jitter(images, theta):
    """Brightness, contrast, saturation, hue, in this order, clipped after each: theta [B, 4], images in 0..1.

    The fixed order makes the action say all about the target; torchvision draws a random one.
    """
    rows = max(1, 2**17 // images[0].numel()) if images.device.type == "cpu" else len(images)
    if rows < len(images):  # what a processor's cache holds at a time is jittered twice as fast
        return torch.cat([jitter(*part) for part in zip(images.split(rows), theta.split(rows), strict=True)])
    brightness, contrast, saturation = theta[:, :3, None, None, None].unbind(1)
    images = (images * brightness).clamp_(0, 1)
    mean = luma(images.mean((2, 3), keepdim=True))
    images = images.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    grey = luma(images).mul_(1 - saturation)
    images = images.mul_(saturation).add_(grey).clamp_(0, 1)
    return turn_hue(images, theta[:, 3])  # which stays between an image's own extremes


def gaussian_blur(images, sigma, radius):
    """Blur with a Gaussian kernel of 2 radius + 1 pixels, borders reflected: images [B, 3, H, W], sigma [B] > 0."""
    offset = torch.arange(-radius, radius + 1, device=images.device)
    weight = torch.softmax(-(offset**2) / (2 * sigma[:, None] ** 2), dim=1)  # [B, 2r+1]
    for axis in (2, 3):
        size = images.shape[axis]
        place = (torch.arange(size, device=images.device) + offset[:, None]).abs()  # [2r+1, size]
        place = torch.where(place >= size, 2 * (size - 1) - place, place)
        matrix = torch.einsum("br,roi->boi", weight, F.one_hot(place, size).to(weight))[:, None]  # [B, 1, size, size]
        images = matrix @ images if axis == 2 else images @ matrix.mT
    return images


def solarize(images, threshold=0.5):
    """Invert what is light: 1 - v where v >= threshold."""
    return torch.where(images >= threshold, 1 - images, images)


def draw_views(count, config, random, always=False):
    """Parameters of `count` pairs of views from a CPU generator: source and target jitter [n, 4], flags [n, 3] of what
    else is done to the source (grey, blur, solarize), sigma [n] of its blur. always: jitter without its coin."""
    c, strength, neutral = config, torch.tensor(config.jitter), torch.tensor(NEUTRAL)
    uniform = torch.rand(count, 14, generator=random)
    theta = neutral + strength * (2 * uniform[:, :8].view(-1, 2, 4) - 1)
    applied = (uniform[:, 8:10] < c.jitter_share) | always
    source, target = theta.where(applied[..., None], neutral).unbind(1)
    flags = (uniform[:, 10:13] < torch.tensor([c.grey, c.blur, c.solarize])).float()
    low, high = c.blur_sigma
    return dict(source=source, target=target, flags=flags, sigma=low + (high - low) * uniform[:, 13])


def make_action(source, target, flags, kind="difference"):
    """What turns the source into the target: [jitter of target minus source (4), grey, blur, solarize (3)] -> [B, 7].

    source, target [B, 4], flags [B, 3]. kind `ratio` takes the logarithm of factors, which compose by adding.
    """
    if kind == "ratio":
        source, target = (torch.cat([x[:, :3].log(), x[:, 3:]], dim=1) for x in (source, target))
    return torch.cat([target - source, flags], dim=1)


@torch.no_grad()
def make_pair(images, views, config):
    """The two views of images [B, 3, S, S] in 0..1, normalised, and the action: x, y [B, 3, S, S], a [B, 7]."""
    rows = views["flags"][:, 1].nonzero()[:, 0]  # drawn on the CPU, so this waits for no device
    views = {k: v.to(images.device, non_blocking=True) for k, v in views.items()}
    rows = rows.to(images.device, non_blocking=True)
    x, y = jitter(images.repeat(2, 1, 1, 1), torch.cat([views["source"], views["target"]])).chunk(2)
    grey, _, inverted = (flag[:, None, None, None] > 0 for flag in views["flags"].unbind(1))
    x = torch.where(grey, luma(x), x)
    if len(rows):
        radius = min(math.ceil(3 * config.blur_sigma[1]), images.shape[-1] - 1)
        x = x.index_copy(0, rows, gaussian_blur(x[rows], views["sigma"][rows], radius))
    x = torch.where(inverted, solarize(x), x)
    action = make_action(views["source"], views["target"], views["flags"], config.action)
    return normalize(255 * x), normalize(255 * y), action


def step_views(config, step, first, last):
    """`draw_views` of samples first..last of the global batch in this step."""
    views = draw_views(config.batch, config, generator(config.seed, "views", step))
    return {k: v[first:last] for k, v in views.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Masks: the union of several blocks is hidden; the source encoder sees the rest, all of the union is predicted
# ---------------------------------------------------------------------------------------------------------------------


def block_size(u, grid, scale, aspect, masks="official"):
    """(height, width) of a block, in patches, from one uniform u in [0, 1).

    One u decides both scale and aspect, so small blocks are wide and large ones tall; so does the released code, though
    the paper describes two draws. Official blocks are at most grid - 1 long.
    """
    area = int(grid * grid * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    longest = grid - 1 if masks == "official" else grid
    return min(round(math.sqrt(area * ratio)), longest), min(round(math.sqrt(area / ratio)), longest)


def rectangles(corners, size, grid):
    """corners int64 [..., 2] (top, left), size (height, width) -> bool [..., N], true inside."""
    line = torch.arange(grid, device=corners.device)
    rows = (line >= corners[..., :1]) & (line < corners[..., :1] + size[0])
    columns = (line >= corners[..., 1:]) & (line < corners[..., 1:] + size[1])
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)


def to_indices(blocks, length, keys=None):
    """bool [B, M, N] -> int64 [M, B, length], ascending: true entries of smallest keys [B, M, N], else the first."""
    if keys is None:
        keys = torch.arange(blocks.shape[-1], device=blocks.device).expand_as(blocks).double() / blocks.shape[-1]
    return (keys + ~blocks).argsort(dim=-1)[..., :length].sort(dim=-1).values.transpose(0, 1).contiguous()


def hidden_patches(config, step):
    """Which patches of each image of the global batch are hidden: bool [B, N]. One block size a step, as in I-JEPA."""
    c, grid = config, config.image_size // config.patch
    u = torch.rand(1, generator=torch.Generator().manual_seed(step)).item()
    size = block_size(u, grid, c.block_scale, c.block_aspect, c.masks)
    room = torch.tensor([grid - size[0], grid - size[1]]) + (c.masks == "corrected")
    random = generator(c.seed, "masks", step)
    hidden = torch.ones(c.batch, grid * grid, dtype=torch.bool)
    for _ in range(100):
        corners = torch.rand(c.batch, c.blocks, 2, generator=random, dtype=torch.float64) * room
        todo = (~hidden).sum(1) < (c.min_visible if c.masks == "corrected" else 1)
        if not todo.any():
            break
        hidden = torch.where(todo[:, None], rectangles(corners.long(), size, grid).any(1), hidden)
    return hidden


def sample_masks(config, step, first=0, last=None):
    """Visible and hidden patches of samples first..last: int64 keep [B, K], mask [B, M], ascending.

    K and M are the smallest counts in the global batch, so ranks agree; random patches above them are left out.
    """
    hidden = hidden_patches(config, step)[:, None]  # [B, 1, N]
    keys = torch.rand(hidden.shape, generator=generator(config.seed, "cut", step), dtype=torch.float64)
    lengths = [int(part.sum(-1).min()) for part in (~hidden, hidden)]
    rows = slice(first, config.batch if last is None else last)
    return tuple(to_indices(p[rows], n, keys[rows])[0] for p, n in zip((~hidden, hidden), lengths))


def micro_batch_masks(config, step, first, last, world):
    """`sample_masks` for samples first..last, split into the micro-batches of a rank."""
    masks = sample_masks(config, step, first, last)
    return list(zip(*(m.chunk(config.accumulate) for m in masks)))


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class SequenceAction(nn.Module):
    """Each number of an action as a token of its own: a_k w_k + b_k, so that the transformer can tell them apart."""

    def __init__(self, numbers, width):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(numbers, width))
        self.bias = nn.Parameter(0.02 * torch.randn(numbers, width))

    def forward(self, action):
        """[B, A] -> [B, A, P]."""
        return action[..., None] * self.weight + self.bias


class Predictor(nn.Module):
    """The world model: a ViT on [visible source tokens | mask tokens], told the action."""

    def __init__(self, grid, width, predictor_width, depth, heads, conditioning):
        super().__init__()
        p = predictor_width
        self.predictor_embed = nn.Linear(width, p)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, p))
        self.predictor_pos_embed = nn.Parameter(common.old_sincos_2d(p, grid, grid).float()[None], requires_grad=False)
        self.cond = self.seq_action = None
        if conditioning == "feature":
            layers = nn.Linear(p + ACTION, p), nn.ReLU(), nn.Linear(p, p), nn.ReLU(), nn.Linear(p, p)
            self.cond = nn.Sequential(*layers)
        elif conditioning == "sequence":
            self.seq_action = SequenceAction(ACTION, p)
        self.predictor_blocks = nn.ModuleList(Block(p, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(p, eps=1e-6)
        self.predictor_proj = nn.Linear(p, width)
        self.apply(common.old_init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, context, keep, mask, action, task=None):
        """Predicted target tokens at the places `mask`.

        context [B, K, D], of places keep [B, K]; mask [B, M]; action [B, 7]; task [1, 1, P]: a token that says what the
        output is for -> [B, M, D].
        """
        positions, asked = self.predictor_pos_embed[0], mask.shape[1]
        queries = self.mask_token + positions[mask]  # [B, M, P]
        if self.cond is not None:
            told = action[:, None].expand(-1, asked, -1).to(queries.dtype)
            queries = self.cond(torch.cat([queries, told], dim=2))
        x = [self.predictor_embed(context) + positions[keep], queries]
        if self.seq_action is not None:
            x.append(self.seq_action(action))
        if task is not None:
            x.append(task.expand(len(mask), -1, -1))
        read = sum(part.shape[1] for part in x[1:])
        x = torch.cat(x, dim=1)
        for block in self.predictor_blocks[:-1]:
            x = block(x)
        # context tokens are not read, so the last block does not compute them
        x = self.predictor_blocks[-1](x, queries=read)[:, :asked]
        return self.predictor_proj(self.predictor_norm(x))

    def everywhere(self, context, action, task=None):
        """Predictions at all places from all places: context [B, N, D], action [B, 7] or [1, 7] -> [B, N, D]."""
        places = torch.arange(context.shape[1], device=context.device).expand(len(context), -1)
        return self(context, places, places, action.expand(len(context), -1), task)


class IWM(nn.Module):
    """Source encoder and predictor, trained by gradient. The target encoder is a ViT beside it, moved by EMA."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.encoder = ViT(c.image_size, c.patch, c.width, c.depth, c.heads)
        self.predictor = Predictor(c.image_size // c.patch, c.width, c.predictor_width, c.predictor_depth,
                                   c.predictor_heads or c.heads, c.conditioning)  # fmt: skip
        self.apply(functools.partial(common.old_init_weights, std=c.init_std))
        nn.init.normal_(self.encoder.patch_embed.proj.weight, std=c.patch_std or c.init_std)

    def forward(self, patches, keep, mask, action):
        """patches of the source [B, N, 3*p*p], keep [B, K], mask [B, M], action [B, 7] -> predictions [B, M, D]."""
        return self.predictor(self.encoder(patches, keep=keep), keep, mask, action)


def build(config):
    """A freshly initialised (model, target encoder); the target starts as a copy of the source encoder."""
    torch.manual_seed(config.seed)
    model = IWM(config)
    return model, copy.deepcopy(model.encoder).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def norm_tokens(tokens, config):
    """Layer norm without affine over the last axis, in float32, where targets are normed; else only float32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:]) if config.target_norm else tokens.float()


def iwm_loss(predictions, targets, config):
    """Error of predictions [B, M, D] against targets of the same shape, mean over the batch.

    The paper's formula is the squared error summed over patches and dimensions; the default here is its mean.
    """
    error = F.mse_loss if config.loss == "l2" else F.smooth_l1_loss
    loss = error(predictions.float(), targets)
    return loss * targets[0].numel() if config.reduction == "sum" else loss


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
# What PIL raises on broken files: OSError for most; the header parsers let through the others.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, Image.DecompressionBombError)


@dataclass
class Split:
    """N images. labels: int64 [N], -1 where unknown; paths: relative to root; pixels: uint8 [N, 3, H, W] if in memory;
    sizes: int64 [N, 2], width and height of the files, not of the pixels where those were resized to one shape."""

    root: Path
    paths: list
    labels: torch.Tensor
    classes: list
    pixels: torch.Tensor = None
    sizes: torch.Tensor = None

    def __len__(self):
        return len(self.paths)

    def subset(self, indices):
        """The same with images `indices` (int64 [n]) only."""
        pixels, sizes = (None if x is None else x[indices] for x in (self.pixels, self.sizes))
        paths = [self.paths[i] for i in indices.tolist()]
        return replace(self, paths=paths, labels=self.labels[indices], pixels=pixels, sizes=sizes)


def open_split(config, name):
    """The `train` or `val` Split of --data; None where a folder has no `val`. Exits with 2 if there are no images."""
    if config.data == "toy":
        pixels, labels = common.old_toy_images(name, config.image_size)
        return in_memory(pixels, labels, [f"{name}/{i:05d}" for i in range(len(pixels))], common.OLD_TOY_CLASSES)
    root = Path(config.data).expanduser()
    if not root.exists() and "/" not in config.data:
        root = Path(os.environ.get("DATA", "data")) / config.data
    if config.data == "cifar10" and not (root / "train").is_dir():
        return cifar10_binary(root.parent, name)
    if not root.is_dir():
        fail(
            f"no data at {root}: expected a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or any folder of images"
        )
    folder = root / name if (root / "train").is_dir() else root
    if name == "val" and (folder == root or not folder.is_dir()):
        return None
    paths = sorted(p.relative_to(root).as_posix() for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not paths:
        fail(f"no images in {folder}: looked for {', '.join(sorted(EXTENSIONS))} in it and in its subfolders")
    if folder == root or any(p.count("/") < 2 for p in paths):
        return Split(root, paths, torch.full((len(paths),), -1), [])
    names = [p.split("/")[1] for p in paths]
    number = {c: i for i, c in enumerate(sorted(set(names)))}
    return Split(root, paths, torch.tensor([number[n] for n in names]), list(number))


def tint(pixels, seed):
    """Colour grey images uint8 [N, 3, S, S]: black and white become a darker and a lighter random colour.

    For the toy images: without colour, saturation and hue change nothing.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    ends = random.uniform([[0], [110]], [[120], [255]], (len(pixels), 2, 3))
    dark, light = torch.from_numpy(ends).float()[..., None, None].unbind(1)
    return torch.lerp(dark, light, pixels.float() / 255).round().byte()


def open_data(config, name):
    """`open_split`, the toy images in colour."""
    split = open_split(config, name)
    return replace(split, pixels=tint(split.pixels, 10 + (name == "val"))) if config.data == "toy" else split


def in_memory(pixels, labels, paths, classes):
    """A Split whose images are decoded already: pixels uint8 [N, 3, H, W]."""
    return Split(None, paths, labels, classes, pixels, torch.tensor(pixels.shape[:1:-1]).expand(len(pixels), 2))


def cifar10_binary(folder, name):
    """CIFAR-10 from its home page's archive, downloaded once into `folder` and checked; read without extracting it."""
    archive = folder / "cifar-10-binary.tar.gz"
    if not archive.exists():
        part = folder / f"{archive.name}.{os.getpid()}.part"  # ranks may get here together, each with a file of its own
        try:
            folder.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(CIFAR10_URL, part)
            os.replace(part, archive)
        except (OSError, http.client.HTTPException) as error:
            fail(
                f"could not download CIFAR-10 ({error}). Put {CIFAR10_URL} at {archive}, "
                f"or its images at {folder}/cifar10/train/CLASS/*.png and val/CLASS/*.png"
            )
        finally:
            part.unlink(missing_ok=True)
    data = archive.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != CIFAR10_SHA256:
        fail(f"{archive} has sha256 {digest} instead of {CIFAR10_SHA256}: delete it and try again")
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if name == "train" else ["test_batch.bin"]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/{f}").read() for f in files)
        classes = tar.extractfile("cifar-10-batches-bin/batches.meta.txt").read().decode().split()
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3073)  # label, then red, green, blue planes
    labels = rows[:, 0].long()
    paths = [f"{name}/{classes[y]}/{i:05d}" for i, y in enumerate(labels)]
    return in_memory(rows[:, 1:].reshape(-1, 3, 32, 32), labels, paths, classes)


def to_rgb(image):
    """Any PIL image -> upright RGB: turned as EXIF says, 16 bits scaled to 8, palette, grey and CMYK converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def upright_size(image):
    """(width, height) that an opened but not yet decoded image will have after `to_rgb`."""
    return image.size[::-1] if image.getexif().get(0x0112) in (5, 6, 7, 8) else image.size


def decode(path, choose_box, size, bicubic=False):
    """Read a file and resize a part of it in one go -> (uint8 [3, H, W], original (width, height)).

    choose_box(width, height) -> (top, left, height, width) of the part; size: (width, height) of the result.
    A JPEG is decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 that still has the pixels this needs (`draft`).
    """
    with Image.open(path) as image:
        width, height = original = upright_size(image)
        top, left, h, w = choose_box(width, height)
        scale = max(size[0] / w, size[1] / h)
        if scale < 1:
            image.draft("RGB", tuple(math.ceil(side * scale) for side in image.size))
        rgb = to_rgb(image)
        fx, fy = rgb.width / width, rgb.height / height
        box = (left * fx, top * fy, min(rgb.width, (left + w) * fx), min(rgb.height, (top + h) * fy))
        rgb = rgb.resize(size, Image.BICUBIC if bicubic else Image.BILINEAR, box=box)
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1), original


def random_crop(width, height, scale, generator=None):
    """RandomResizedCrop's part of an image, ratio 3/4 to 4/3, in torchvision's order -> (top, left, height, width)."""
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*scale, generator=generator).item()
        ratio = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(height - h + 1, (1,), generator=generator).item()
            return top, torch.randint(width - w + 1, (1,), generator=generator).item(), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crops(sizes, scale, generator):
    """`random_crop` for a batch at once: sizes [B, 2] (width, height) -> float32 [B, 4] (top, left, height, width)."""
    u = torch.rand(len(sizes), 11, 2, generator=generator, dtype=torch.float64)
    sizes = sizes.double()
    area = sizes.prod(1, keepdim=True) * (scale[0] + (scale[1] - scale[0]) * u[:, :10, 0])
    ratio = torch.exp((2 * u[:, :10, 1] - 1) * math.log(4 / 3))
    tries = torch.stack([(area * ratio).sqrt().round(), (area / ratio).sqrt().round()], dim=2)  # [B, 10, 2]
    fits = ((tries > 0) & (tries <= sizes[:, None])).all(2)
    none, first = ~fits.any(1, keepdim=True), fits.int().argmax(1)  # where no try fits: the central fallback
    part = torch.where(none, torch.minimum(sizes, (sizes.flip(1) * 4 / 3).round()), tries[range(len(sizes)), first])
    corner = torch.where(none, (sizes - part) / 2, u[:, 10] * (sizes - part + 1)).floor()
    return torch.cat([corner.flip(1), part.flip(1)], dim=1).float()


def centre_box(width, height, size):
    """The part evaluation sees: shorter side to size*256/224, central square of `size`; size x size stays whole."""
    side = size if (width, height) == (size, size) else min(width, height) * size / int(size * 256 / 224)
    return (height - side) / 2, (width - side) / 2, side, side


def resampling_weights(start, length, size_in, size_out, bicubic=False):
    """PIL's antialiased resampling of [start, start + length), tensors [B], as matrices [B, size_out, size_in]."""
    start, end = start[:, None, None], (start + length)[:, None, None]
    step = (end - start) / size_out
    pixel = torch.arange(size_in, device=start.device) + 0.5
    centre = start + (torch.arange(size_out, device=start.device)[:, None] + 0.5) * step
    x = ((pixel - centre) / step.clamp(min=1)).abs()
    weights = (1 - x).clamp(min=0)
    if bicubic:  # a = -0.5
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2) * (x < 2)
    weights = weights * ((pixel > start) & (pixel < end))
    return weights / weights.sum(-1, keepdim=True)


def crop_resize(images, boxes, size, flip=None, bicubic=False):
    """Crop and resize a batch as PIL does, in two matrix products: images [B, 3, H, W] -> float [B, 3, size, size].

    boxes: [B, 4] (top, left, height, width), pixels; flip: bool [B], mirrored; bicubic overshoot is clipped to 0..255.
    """
    top, left, height, width = boxes.unbind(1)
    rows = resampling_weights(top, height, images.shape[2], size, bicubic)
    columns = resampling_weights(left, width, images.shape[3], size, bicubic)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    images = rows[:, None] @ images.float() @ columns.transpose(1, 2)[:, None]
    return images.clamp(0, 255) if bicubic else images


def normalize(images):
    """0..255 -> the networks' range, by ImageNet's mean and std: [B, 3, H, W]."""
    mean, std = (common.old_constant(v, images.device)[:, None, None] * 255 for v in (MEAN, STD))
    return (images.float() - mean) / std


# Copied from msn.py
def to_pixels(images):
    """Normalised images [..., 3, S, S] -> 0..255."""
    mean, std = (common.old_constant(v, images.device)[:, None, None] for v in (MEAN, STD))
    return (images * std + mean).clamp(0, 1) * 255


class Batches(Dataset):
    """Item t: this rank's share of the batch of step t, a function of (seed, t): workers and resuming change nothing.

    A dict of `indices` int64 [b]; `pixels` uint8 [b, 3, S, S], decoded and cropped, or `boxes` float [b, 4], to crop
    in-memory pixels on the device; `flip` bool [b]; `masks`, a pair a micro-batch; `bad`, unreadable files.
    """

    def __init__(self, split, config, world, batch, crop_scale, flip, bicubic=False, purpose="train"):
        self.split, self.config, self.world, self.batch = replace(split, pixels=None), config, world, batch
        self.crop_scale, self.flip, self.bicubic, self.purpose = crop_scale, flip, bicubic, purpose
        self.canvas = None if split.pixels is None else torch.tensor(split.pixels.shape[2:]).repeat(2)  # H, W, H, W

    @functools.lru_cache(maxsize=2)  # noqa: B019  lives as long as its loader
    def order(self, epoch):
        """The order of the images in an epoch."""
        return torch.randperm(len(self.split), generator=generator(self.config.seed, self.purpose, "order", epoch))

    def __getitem__(self, step):
        key, n = (self.config.seed, self.purpose, step), len(self.split)
        start, end = step * self.batch, (step + 1) * self.batch
        order = torch.cat([self.order(epoch) for epoch in range(start // n, (end - 1) // n + 1)])
        indices = order[start % n : start % n + self.batch]  # of the global batch
        first, last = (r * self.batch // self.world.size for r in (self.world.rank, self.world.rank + 1))
        item = {"indices": indices[first:last], "bad": []}
        if self.canvas is not None:
            sizes = self.split.sizes[indices]
            boxes = random_crops(sizes, self.crop_scale, generator(*key, "crop"))
            item["boxes"] = (boxes * self.canvas / sizes.flip(1).repeat(1, 2))[first:last]
        else:
            read = [self.read(int(indices[i]), (*key, "crop", i), item["bad"]) for i in range(first, last)]
            item |= {"pixels": torch.stack([p for p, _ in read]), "indices": torch.tensor([i for _, i in read])}
        if self.flip:
            item["flip"] = (torch.rand(self.batch, generator=generator(*key, "flip")) < 0.5)[first:last]
        if self.purpose == "train":
            item["masks"] = micro_batch_masks(self.config, step, first, last, self.world)
        return item

    def read(self, index, key, bad):
        """Decode and crop image `index` -> (pixels, index); an unreadable one goes to `bad`, the next replaces it."""
        size = (self.config.image_size,) * 2
        for now in (i % len(self.split) for i in range(index, index + 100)):
            path = self.split.root / self.split.paths[now]
            try:
                box = functools.partial(random_crop, scale=self.crop_scale, generator=generator(*key))
                return decode(path, box, size, self.bicubic)[0], now
            except UNREADABLE as error:
                bad.append(f"{path}: {error}")
        fail(f"100 images in a row could not be read, {path} the last of them")


class Files(Dataset):
    """Item i: (pixels uint8 [3, H, W], size [width, height], error or '') of image i: the evaluation transform to
    `size` pixels, or where `canvas` (width, height) is given, the whole image resized to that."""

    def __init__(self, split, size, canvas=None):
        self.split, self.size, self.canvas = replace(split, pixels=None), size, canvas

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        path, canvas = self.split.root / self.split.paths[index], self.canvas or (self.size, self.size)
        try:
            if self.canvas:
                pixels, size = decode(path, lambda w, h: (0, 0, h, w), canvas)
            else:
                pixels, size = decode(path, lambda w, h: centre_box(w, h, self.size), canvas, bicubic=True)
            return pixels, torch.tensor(size), ""
        except UNREADABLE as error:
            return torch.zeros(3, canvas[1], canvas[0], dtype=torch.uint8), torch.ones(2).long(), f"{path}: {error}"


def cache_pixels(split, config, world, log):
    """Decode a Split into memory if it fits --cache: small images of one size as they are, others resized to a square.

    Crops are drawn in the files' coordinates, so the square changes no aspect ratio. Unreadable images are left out.
    """
    side = int(config.image_size * 256 / 224)
    sizes = set()
    for path in split.paths[:32] if split.pixels is None else []:
        with contextlib.suppress(*UNREADABLE), Image.open(split.root / path) as image:
            sizes.add(upright_size(image))
    canvas = sizes.pop() if len(sizes) == 1 and max(max(sizes)) <= side else (side, side)
    if split.pixels is not None or len(split) * 3 * math.prod(canvas) > config.cache * 2**30:
        return split
    files = DataLoader(Files(split, side, canvas), batch_size=256, num_workers=common.old_worker_count(config, world, True))
    pixels, sizes, errors = zip(*files, strict=True)
    errors = [e for batch in errors for e in batch]
    log.skip([e for e in errors if e], len(split), config.max_bad)
    split = replace(split, pixels=torch.cat(pixels), sizes=torch.cat(sizes))
    return split.subset(torch.tensor([not e for e in errors]).nonzero()[:, 0])


def make_loader(batches, steps, config, world):
    """Iterate over `batches` for these steps, ahead of time in worker processes where that helps."""
    workers = common.old_worker_count(config, world, streaming=batches.canvas is None)
    options = dict(pin_memory=world.device.type == "cuda", worker_init_fn=common.old_ignore_signals)
    return iter(DataLoader(batches, None, sampler=steps, num_workers=workers, **options))


def make_images(item, pixels, size, device, bicubic=False):
    """A loader's item -> normalised images float [b, 3, S, S] on the device; pixels in memory are cropped here."""
    item = {k: v.to(device, non_blocking=True) for k, v in item.items() if k in ("indices", "pixels", "boxes", "flip")}
    if "boxes" in item:
        return normalize(crop_resize(pixels[item["indices"]], item["boxes"], size, item.get("flip"), bicubic))
    images = normalize(item["pixels"])
    return torch.where(item["flip"][:, None, None, None], images.flip(3), images) if "flip" in item else images


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


def schedules(config, step, steps):
    """(lr, weight decay, EMA momentum) of step 0, 1, ... The released code advances the first two before the step."""
    c, length = config, config.schedule_scale * steps
    lr = common.old_warmup_cosine_schedule(step + 1, int(length), int(c.warmup * steps), c.lr_start, c.lr, c.lr_final)
    decay = common.old_cosine_schedule(step + 1, int(length), c.weight_decay, c.weight_decay_final)
    return lr, decay, common.old_linear_schedule(step, length, c.momentum, c.momentum_final)


def make_optimizer(model):
    """AdamW; groups: encoder and predictor decayed, then both undecayed. The loop sets lr and decay."""
    groups = common.old_parameter_groups(model.encoder, model.predictor)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def train(model, target, split, config, world, out):
    """Train (model, target encoder) on a Split. Exits with 0 on SIGTERM or SIGINT, 3 after three bad steps."""
    device, dtype = world.device, common.old_choose_precision(config.precision, world.device)
    steps = config.steps or max(1, int(config.epochs * max(1, len(split) // config.batch)))
    model, target = model.to(device), target.to(device)
    if config.compile:
        model.compile(dynamic=True)  # the number of visible patches changes from step to step
        target.compile()
    plain, model = model, common.old_distribute(model, world, config.shard)
    target = common.old_distribute(target, world, config.shard)
    optimizer, ema = make_optimizer(plain), EMA(target, plain.encoder)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    start, streak = 0, torch.zeros((), device=device)  # streak: steps in a row that were not finite
    if config.resume and (out / "last.pt").exists():
        state = common.old_read_own_checkpoint(out / "last.pt", Path(__file__).stem, ARCHITECTURE, config)
        common.old_load_full_state(model, state["model"], optimizer, state["optimizer"])
        common.old_load_full_state(target, state["target"])
        scaler.load_state_dict(state["scaler"])
        start, streak = state["step"], state["streak"].to(device)

    def save(step):
        weights, moments = common.old_full_state(model, optimizer)
        state = dict(script=Path(__file__).stem, step=step, config=asdict(config), model=weights)
        state |= dict(target=common.old_full_state(target)[0], optimizer=moments)
        state |= dict(scaler=scaler.state_dict(), streak=streak.cpu())
        if world.rank == 0:
            common.old_save_checkpoint(out / "last.pt", state)

    if world.rank == 0:
        common.old_save_config(out, config)
    batches = Batches(split, config, world, config.batch, config.crop_scale, config.flip)
    loader = make_loader(batches, range(start, steps), config, world)
    pixels = None if split.pixels is None else split.pixels.to(device)
    trainable = [p for p in plain.parameters() if p.requires_grad]
    mine = [rank * config.batch // world.size for rank in (world.rank, world.rank + 1)]  # in the global batch
    log = Log(out, world, steps, start)
    log.catch_signals()
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (plain.encoder, plain.predictor)]
    log.say(
        f"{out}: {len(split)} images, steps {start} to {steps} of {config.batch} on {world.size} x {device.type} in "
        f"{str(dtype)[6:]}; encoder {millions[0]:.2f} M, predictor {millions[1]:.2f} M parameters, conditioning by "
        f"{config.conditioning}"
    )
    waited, window, since = 0.0, start, time.monotonic()
    for step in range(start, steps):
        tick = time.monotonic()
        item = next(loader)
        images = to_pixels(make_images(item, pixels, config.image_size, device)) / 255
        source, view, action = make_pair(images, step_views(config, step, *mine), config)
        waited += time.monotonic() - tick
        log.skip(item["bad"], len(split), config.max_bad)
        lr, decay, momentum = schedules(config, step, steps)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay if group["decay"] else 0.0

        loss, parts = torch.zeros((), device=device), config.accumulate
        chunks = zip(source.chunk(parts), view.chunk(parts), action.chunk(parts), item["masks"], strict=True)
        for i, (x, y, a, masks) in enumerate(chunks):
            keep, mask = (m.to(device, non_blocking=True) for m in masks)
            autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
            with common.old_no_sync(model, last=i == parts - 1), autocast:
                with torch.no_grad():
                    tokens = target(y)  # [m, N, D]
                    targets = norm_tokens(gather_tokens(tokens, mask), config)
                predictions = model(plain.encoder.patch_embed.patchify(x), keep, mask, a)
                part_loss = iwm_loss(predictions, targets, config) / parts
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()

        scaler.unscale_(optimizer)
        loss, norm = common.old_mean_over_ranks(loss), common.old_gradient_norm(trainable)
        applied = (loss + norm).isfinite()  # a tensor on the device, the same on all ranks
        # with fp16's loss scaling, gradients overflow now and then by design: there only the loss counts
        bad = ~(loss.isfinite() if scaler.is_enabled() else applied)
        streak = torch.where(streak >= 3, streak, (streak + 1) * bad)
        if not scaler.is_enabled():
            optimizer.found_inf = (~applied).float()  # the fused kernel then leaves weights and moments as they are
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ema.update(momentum, applied)

        done = step + 1
        stopping = log.stop and world.size == 1
        if done % config.log_every == 0 or done == steps or stopping:
            pooled = tokens.float().mean(1)
            numbers = torch.stack([loss, norm, streak, pooled.std(0).mean(), effective_rank(pooled)])
            loss_now, norm_now, bad_steps, std, rank = numbers.tolist()  # the only host-device sync
            stopping = log.agree(log.stop)
            now = time.monotonic()
            row = dict(loss=loss_now, lr=lr, images_per_s=config.batch * (done - window) / (now - since))
            row["data_wait"] = waited / (now - since)
            waited, window, since = 0.0, done, now
            log.progress(done, **row)
            row |= dict(weight_decay=decay, momentum=momentum, gradient_norm=norm_now, feature_std=std)
            row |= dict(feature_rank=rank, context=keep.shape[1], target=mask.shape[1])
            log.write(step=done, **row, memory_gib=common.old_memory_gib(device))
            if bad_steps >= 3:
                common.old_stop_not_finite(out, done)
        if (done % config.save_every == 0 and streak < 3) or done == steps or stopping:
            save(done)
        if stopping and done < steps:
            log.close()
            log.say(f"stopped after step {done}. To continue: {common.old_resume_command(out)}")
            raise SystemExit(0)
    log.close()
    return plain, target


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: is it a world model? Mean reciprocal rank (section 4 of the paper)
# ---------------------------------------------------------------------------------------------------------------------


def squared_distances(predictions, bank):
    """Over all tokens and dimensions: predictions [Q, N, D], bank [K, N, D] -> [Q, K]."""
    return torch.stack([(bank - p).square().sum((1, 2)) for p in predictions])


def ranks(distances, true):
    """1 + how many of the bank are nearer than the true one: distances [Q, K], true int64 [Q] -> [Q].

    Chance is H_K / K: 0.0239 as mean reciprocal rank for K = 256.
    """
    return 1 + (distances < distances.gather(1, true[:, None])).sum(1)


@torch.no_grad()
def rank_transformations(model, target, image, config, random):
    """One image [3, S, S] in 0..1 and its transformed versions -> a dict of the bank's jitters theta [K, 4], `true`
    [Q], which of them were predicted, and distances [Q, K] of the predictions told the `right` action, another of the
    `rolled` actions, and of the clean latent (`none`)."""
    c, device = config, image.device
    theta = draw_views(c.mrr_bank, c, random, always=True)["target"].to(device)
    true = torch.randperm(c.mrr_bank, generator=random)[: c.mrr_actions].to(device)
    views = normalize(255 * jitter(image.expand(c.mrr_bank, -1, -1, -1), theta))
    bank = norm_tokens(torch.cat([target(part) for part in views.split(c.eval_batch)]), c)
    clean = model.encoder(normalize(255 * image[None]))
    neutral = torch.tensor(NEUTRAL, device=device).expand(len(true), -1)
    action = make_action(neutral, theta[true], torch.zeros(len(true), 3, device=device), c.action)
    found = dict(theta=theta, true=true, none=squared_distances(norm_tokens(clean, c), bank).expand(len(true), -1))
    for name, told in (("right", action), ("rolled", action.roll(1, 0))):
        predictions = model.predictor.everywhere(clean.expand(len(true), -1, -1), told)
        found[name] = squared_distances(norm_tokens(predictions, c), bank)
    return found


def evaluate_mrr(model, target, split, config, world, log):
    """Mean reciprocal ranks in percent: {"mrr": with the right actions, "mrr rolled": with another's, "mrr none": of
    the clean latent, "mrr chance"}. Ranks share the images."""
    some = split.subset(torch.randperm(len(split), generator=generator(config.seed, "mrr"))[: config.mrr_images])
    rows = []
    for images, indices in eval_images(some, config, world, log):
        for image, index in zip(to_pixels(images) / 255, indices.tolist()):
            found = rank_transformations(model, target, image, config, generator(config.seed, "mrr", index))
            reciprocal = [1 / ranks(found[k], found["true"]) for k in ("right", "rolled", "none")]
            rows.append(torch.stack([torch.tensor(float(index)).to(reciprocal[0]), *(r.mean() for r in reciprocal)]))
    rows = common.old_gather_over_ranks(torch.stack(rows)).cpu().unique(dim=0)  # ranks may share an image
    values = 100 * rows[rows[:, 0] >= 0, 1:].mean(0)
    result = dict(zip(("mrr", "mrr rolled", "mrr none"), values.tolist()))
    return result | {"mrr chance": 100 * sum(1 / k for k in range(1, config.mrr_bank + 1)) / config.mrr_bank}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: features and linear probe
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Features:
    """Of N images: pooled [N, D], concat4 [N, 4D] (see `encode`), tokens [N, T, D] or None, labels int64 [N], paths."""

    pooled: torch.Tensor
    concat4: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    paths: list


@torch.no_grad()
def encode(encoder, images):
    """Frozen float32 features of images [B, 3, S, S]: pooled [B, D], concat4 [B, 4D], tokens [B, N, D].

    pooled: mean over the patch tokens after the final norm; concat4: the same of the last four blocks, each after the
    final norm, last block last. The layer norm on training targets is not part of the features.
    """
    layers = encoder(images, layers=range(-min(4, len(encoder.blocks)), 0))
    return layers[-1].mean(1), torch.cat([x.mean(1) for x in layers], dim=1), layers[-1]


def eval_images(split, config, world, log):
    """Iterate over a rank's share of a Split under the evaluation transform: (images [B, 3, S, S], indices [B], or -1).

    All ranks get the same number of batches (the last images wrap around), since sharded encoders run in step.
    """
    n, size = len(split), config.image_size
    mine = (torch.arange(math.ceil(n / world.size)) * world.size + world.rank) % n
    if split.pixels is not None and (split.root is None or tuple(split.pixels.shape[2:]) == (size, size)):
        for indices in mine.split(config.eval_batch):
            boxes = torch.tensor([centre_box(w, h, size) for w, h in split.sizes[indices].tolist()]).float()
            images = split.pixels[indices].to(world.device)
            yield normalize(crop_resize(images, boxes.to(world.device), size, bicubic=True)), indices
        return
    workers = common.old_worker_count(config, world, streaming=True)
    loader = DataLoader(Files(split, size), config.eval_batch, sampler=mine.tolist(), num_workers=workers)
    for indices, (pixels, _, errors) in zip(mine.split(config.eval_batch), loader, strict=True):
        log.skip([e for e in errors if e], n, config.max_bad)
        yield normalize(pixels.to(world.device)), indices.where(torch.tensor([not e for e in errors]), -1)


def collect(rows, device):
    """Join all ranks' rows, (indices [B], tensor [B, ...], ...), to (indices [N] on the CPU, tensor [N, ...], ...).

    In order of the indices, without those that were unreadable (-1) or came twice.
    """
    indices, *columns = (common.old_gather_over_ranks(torch.cat(column)) for column in zip(*rows, strict=True))
    kept, order = np.unique(indices.cpu().numpy(), return_index=True)
    order = torch.from_numpy(order[kept >= 0]).to(device)
    return torch.from_numpy(kept[kept >= 0]), *(column[order] for column in columns)


def extract(encoder, split, config, world, log, tokens=False):
    """Features of a whole Split on all ranks, in its order; unreadable images are left out."""
    rows = []
    for images, indices in eval_images(split, config, world, log):
        pooled, concat4, all_tokens = encode(encoder, images)
        rows.append((indices.to(world.device), pooled, concat4, all_tokens if tokens else all_tokens[:, :0]))
    kept, pooled, concat4, all_tokens = collect(rows, world.device)
    paths = [split.paths[i] for i in kept.tolist()]
    return Features(pooled, concat4, all_tokens if tokens else None, split.labels[kept].to(world.device), paths)


def raw_pixels(split, config, world, log):
    """Normalised pixels, averaged down to 32x32 where larger, for kNN without any network -> ([N, P], labels [N])."""
    rows = []
    for images, indices in eval_images(split, config, world, log):
        small = F.adaptive_avg_pool2d(images, min(32, images.shape[-1])).flatten(1)
        rows.append((indices.to(world.device), small))
    kept, pixels = collect(rows, world.device)
    return pixels, split.labels[kept].to(world.device)


def knn(bank, bank_labels, queries, ks=(10, 20, 100), temperature=0.07):
    """Weighted kNN: cosine similarity, votes exp(similarity / temperature) summed per class -> {k: scores [N, C]}."""
    bank, scores = F.normalize(bank, dim=1), {k: [] for k in ks}
    for rows in F.normalize(queries, dim=1).split(1024):
        similarity, nearest = (rows @ bank.T).topk(min(max(ks), len(bank)), dim=1)
        votes, voters = (similarity / temperature).exp(), bank_labels[nearest]
        for k in ks:
            empty = votes.new_zeros(len(rows), int(bank_labels.max()) + 1)
            scores[k].append(empty.scatter_add(1, voters[:, :k], votes[:, :k]))
    return {k: torch.cat(parts) for k, parts in scores.items()}


def accuracy(scores, labels):
    """Top-1 accuracy in percent of scores [..., N, C], labels [N]; ties go to the lower class."""
    return 100 * (scores.argmax(-1) == labels).float().mean(-1)


def lars_step(weights, gradients, momenta, lr, decay, momentum=0.9, eta=0.001):
    """A LARS step for H heads at once: weights [H, ...]; lr, decay [H]; a head's 1-D parameters get no trust ratio."""
    for p, g, m in zip(weights, gradients, momenta, strict=True):
        heads = (-1,) + (1,) * (p.dim() - 1)
        d = g + decay.view(heads) * p
        if p.dim() > 2:
            p_norm, d_norm = p.flatten(1).norm(dim=1), d.flatten(1).norm(dim=1)
            d = d * torch.where((p_norm > 0) & (d_norm > 0), eta * p_norm / d_norm, 1.0).view(heads)
        p.sub_(lr.view(heads) * m.mul_(momentum).add_(d))


def sgd_step(weights, gradients, momenta, lr, decay, momentum=0.9):
    """One SGD step with Nesterov momentum for H heads at once; arguments as in `lars_step`."""
    for p, g, m in zip(weights, gradients, momenta, strict=True):
        heads = (-1,) + (1,) * (p.dim() - 1)
        d = g + decay.view(heads) * p
        p.sub_(lr.view(heads) * (d + momentum * m.mul_(momentum).add_(d)))


class ProbeHeads:
    """The whole grid of linear heads on one feature: (with BatchNorm, without) x learning rates x weight decays.

    All heads see the same batches, so batch statistics are shared, and H heads are one product: weight [H, C, D].
    """

    def __init__(self, width, classes, config, device):
        grid = [(bn, lr, wd) for bn in (False, True) for lr in config.probe_lrs for wd in config.probe_decays]
        self.names = [f"{'batch norm, ' if bn else ''}lr {lr:g}, decay {wd:g}" for bn, lr, wd in grid]
        bn, lr, self.decay = torch.tensor(grid, device=device).T
        self.norm, self.lr = bn.bool()[:, None], lr * config.probe_batch / 256
        draw = torch.rand(classes, width + 1, generator=generator(config.seed, "probe", width)).to(device)
        start = (2 * draw - 1) / math.sqrt(width)  # torch's default for a Linear
        self.linear = [start[:, 1:].repeat(len(grid), 1, 1), start[:, 0].repeat(len(grid), 1)]
        self.affine = [torch.ones(len(grid), width, device=device), torch.zeros(len(grid), width, device=device)]
        self.momenta = [torch.zeros_like(p.requires_grad_()) for p in self.linear + self.affine]
        self.mean, self.var = torch.zeros(width, device=device), torch.ones(width, device=device)
        self.update = lars_step if config.probe == "lars" else sgd_step

    def scores(self, x, mean, var):
        """x [B, D] -> [H, B, C]. The norm is folded into the weights, which each head has its own of anyway."""
        (weight, bias), (gain, shift) = self.linear, self.affine
        scale = torch.where(self.norm, gain * (var + 1e-5).rsqrt(), 1.0)  # [H, D]
        offset = torch.where(self.norm, shift - mean * scale, 0.0)
        bias = bias + torch.einsum("hcd,hd->hc", weight, offset)
        return x @ (weight * scale[:, None]).transpose(1, 2) + bias[:, None]

    def step(self, x, labels, factor):
        """One step of all heads on x [B, D], labels [B]; factor: what the schedule multiplies learning rates with."""
        var, mean = torch.var_mean(x, dim=0, correction=0)
        self.mean.lerp_(mean, 0.1)
        self.var.lerp_(var * len(x) / max(1, len(x) - 1), 0.1)
        scores = self.scores(x, mean, var)
        loss = F.cross_entropy(scores.flatten(0, 1), labels.repeat(len(scores)), reduction="sum") / len(x)
        gradients, lr = torch.autograd.grad(loss, self.linear + self.affine), self.lr * factor
        with torch.no_grad():  # BatchNorm's parameters are not decayed, biases are
            self.update(self.linear, gradients[:2], self.momenta[:2], lr, self.decay)
            self.update(self.affine, gradients[2:], self.momenta[2:], lr, torch.zeros_like(lr))

    @torch.no_grad()
    def evaluate(self, x, labels):
        """Top-1 accuracy of each head on x [N, D], [H], percent."""
        parts = zip(x.split(2048), labels.split(2048), strict=True)
        return sum(accuracy(self.scores(f, self.mean, self.var), y) * len(y) for f, y in parts) / len(labels)


def linear_probe(batches, val, classes, config):
    """The paper's probe: all heads of the grid on both features, the best by validation reported.

    batches(epoch) yields (pooled, concat4, labels); val: Features. Returns top-1 in percent as {"linear": the best,
    "linear_pooled", "linear_concat4", "linear_head": which one was the best}.
    """
    features = {"pooled": val.pooled, "concat4": val.concat4}
    heads = {kind: ProbeHeads(x.shape[1], classes, config, x.device) for kind, x in features.items()}
    for epoch in range(config.probe_epochs):
        factor = 0.1 ** sum(epoch >= round(share * config.probe_epochs) for share in config.probe_milestones)
        for pooled, concat4, labels in batches(epoch):
            heads["pooled"].step(pooled, labels, factor)
            heads["concat4"].step(concat4, labels, factor)
    top1 = {kind: heads[kind].evaluate(x, val.labels) for kind, x in features.items()}
    best = max(top1, key=lambda kind: top1[kind].max())
    result = {"linear": top1[best].max().item()} | {f"linear_{kind}": t.max().item() for kind, t in top1.items()}
    return result | {"linear_head": f"{best}, {heads[best].names[int(top1[best].argmax())]}"}


def cached_batches(features, config):
    """Batches for `linear_probe` from Features computed once, in a new order each epoch."""

    def batches(epoch):
        n, batch = len(features.labels), min(config.probe_batch, len(features.labels))
        order = torch.randperm(n, generator=generator(config.seed, "probe", "order", epoch)).to(features.labels.device)
        for rows in order[: n // batch * batch].split(batch):
            yield features.pooled[rows], features.concat4[rows], features.labels[rows]

    return batches


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: the world model put to use (section 5 of the paper)
# ---------------------------------------------------------------------------------------------------------------------


class AttentiveHead(nn.Module):
    """One learned query looks at all tokens: cross attention, MLP, Linear. [B, N, D] -> [B, C]."""

    def __init__(self, width, heads, classes):
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention, self.mlp = CrossAttention(width, heads), common.OLD_MLP(width, 4 * width)
        self.linear = nn.Linear(width, classes)
        self.apply(common.old_init_weights)

    def forward(self, tokens):
        """tokens [B, N, D] -> scores [B, C]."""
        x = self.query.expand(len(tokens), -1, -1)
        x = x + self.attention(x, self.norms[0](tokens))
        x = x + self.mlp(self.norms[1](x))
        return self.linear(self.norms[2](x[:, 0]))


@dataclass
class Task:
    """Something to tune for: labels of the Splits are int64 [N], or [N, T] for one a patch; whether to augment."""

    name: str
    train: Split
    val: Split
    classes: int
    augment: bool = False


class Tuned(nn.Module):
    """Encoder, predictor (or None), and for each task a head, and a task token where tasks share the predictor.

    The predictor is asked for the whole image, not transformed: all places, and the null action.
    """

    def __init__(self, encoder, predictor, tasks, config):
        super().__init__()
        c, p = config, config.predictor_width
        self.encoder, self.predictor = encoder, predictor
        self.frozen = not any(q.requires_grad for q in encoder.parameters())
        self.heads = nn.ModuleList()
        for task in tasks:
            patchwise = nn.Sequential(nn.LayerNorm(c.width, eps=1e-6), nn.Linear(c.width, task.classes))
            dense = task.train.labels.dim() == 2
            self.heads.append(patchwise if dense else AttentiveHead(c.width, c.heads, task.classes))
        shared = len(tasks) > 1 and predictor is not None
        self.tokens = nn.ParameterList(0.02 * torch.randn(1, 1, p) for _ in tasks) if shared else [None] * len(tasks)

    def forward(self, *images):
        """A batch of images [b, 3, S, S] for each task -> scores of each, [b, C] or [b, N, C]."""
        found = []
        for batch, head, token in zip(images, self.heads, self.tokens, strict=True):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                x = self.encoder(batch)
            if self.predictor is not None:
                x = self.predictor.everywhere(x, torch.zeros(1, ACTION, device=x.device), token)
            found.append(head(x))
        return found


def tune(encoder, predictor, tasks, config, world, log, train_encoder=False, fresh=False):
    """Train heads, and a copy of the predictor if given, and of the encoder if asked -> a percentage for each task.

    fresh: the predictor is a random one, which learns ten times as fast as a pretrained one. AdamW, decay 0.05, 5 %
    warmup and a cosine, label smoothing 0.1. The percentage is top-1 accuracy, or mean IoU of classes for patches.
    """
    c, device, dtype = config, world.device, common.old_choose_precision(config.precision, world.device)
    torch.manual_seed(c.seed)
    encoder = copy.deepcopy(encoder).requires_grad_(train_encoder)
    predictor = None if predictor is None else copy.deepcopy(predictor).requires_grad_(True)
    for module, key in ((encoder, "pos_embed"), (predictor, "predictor_pos_embed")):
        if module is not None:
            getattr(module, key).requires_grad_(False)
    model = Tuned(encoder, predictor, tasks, c).to(device)
    groups = common.old_parameter_groups(model)
    slow = {id(p) for m in (encoder, None if fresh else predictor) if m is not None for p in m.parameters()}
    groups = [
        {"params": members, "weight_decay": 0.05 if group["decay"] else 0.0, "share": share}
        for group in groups
        for share in (0.1, 1.0)
        if (members := [p for p in group["params"] if (id(p) in slow) == (share == 0.1)])
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    smallest = min(len(task.train) for task in tasks)
    batch = min(c.tune_batch, smallest) // world.size * world.size
    steps = max(1, int(c.tune_epochs * (max(len(task.train) for task in tasks) // batch)))
    loaders, pixels = [], []
    for task in tasks:
        crop, flip = (c.crop_scale, c.flip) if task.augment else ((1.0, 1.0), False)
        data = Batches(task.train, c, world, batch, crop, flip, purpose=f"tune {task.name}")
        loaders.append(make_loader(data, range(steps), c, world))
        pixels.append(None if task.train.pixels is None else task.train.pixels.to(device))
    wrapped = common.old_distribute(model, world)
    for step, items in enumerate(zip(*loaders, strict=True)):
        for group in optimizer.param_groups:
            rate = common.old_warmup_cosine_schedule(step + 1, steps, steps // 20, 0.0, c.tune_lr, 0.0)
            group["lr"] = rate * group["share"]
        images = [make_images(item, p, c.image_size, device) for item, p in zip(items, pixels, strict=True)]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scores, loss = wrapped(*images), 0.0
            for task, item, s in zip(tasks, items, scores, strict=True):
                log.skip(item["bad"], len(task.train), c.max_bad)
                labels = task.train.labels[item["indices"]].to(device, non_blocking=True).flatten()
                loss = loss + F.cross_entropy(s.float().flatten(0, -2), labels, label_smoothing=0.1) / len(tasks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [judge(model.eval(), i, task, config, world, log) for i, task in enumerate(tasks)]


@torch.no_grad()
def judge(model, index, task, config, world, log):
    """Top-1 accuracy, or for labels a patch the mean over classes of intersection over union, of a task, percent."""
    head, token, rows = model.heads[index], model.tokens[index], []
    for images, indices in eval_images(task.val, config, world, log):
        x = model.encoder(images)
        if model.predictor is not None:
            x = model.predictor.everywhere(x, torch.zeros(1, ACTION, device=x.device), token)
        labels = task.val.labels[indices.clamp(min=0)].to(images.device)
        columns = indices.to(labels), labels, head(x).argmax(-1)
        rows.append(torch.cat([column.view(len(x), -1) for column in columns], dim=1))
    rows = common.old_gather_over_ranks(torch.cat(rows)).cpu().unique(dim=0)  # ranks may share an image
    labels, predicted = rows[rows[:, 0] >= 0, 1:].chunk(2, dim=1)
    if task.val.labels.dim() == 1:
        return 100 * (labels == predicted).double().mean().item()
    table = (labels * task.classes + predicted).flatten().bincount(minlength=task.classes**2)
    table = table.view(task.classes, -1).double()
    both, either = table.diag(), table.sum(0) + table.sum(1) - table.diag()
    return 100 * (both[either > 0] / either[either > 0]).mean().item()


# Copied from flexpredict.py
def toy_scenes(count, size, frames=1, objects=None, most=4, noise=8.0, seed=0):
    """Lighter and darker shapes of a faint texture, which drift before another texture.

    size: side, pixels; objects: how many in each scene (0..most, default at random); noise: std in each pixel, of 255
    -> pixels uint8 [count, frames, 3, S, S]; labels uint8 [count, frames, S, S], 0 background, i the i-th object;
    objects int64 [count]; kinds int64 [count, most + 1]: 0 background, 1 disc, 2 square, 3 triangle.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    objects = random.integers(0, most + 1, count) if objects is None else np.full(count, objects)
    kinds = random.integers(1, 4, (count, most + 1))
    kinds[:, 0] = 0
    pixels, labels = np.empty((count, frames, size, size), np.uint8), np.zeros((count, frames, size, size), np.uint8)
    line, time_of = np.arange(size) + 0.5, np.arange(frames)[:, None]
    side = math.ceil(math.sqrt(most))
    radius = 0.36 * size / side
    for i in range(count):
        layers = objects[i] + 1
        cells = np.concatenate([[0], random.permutation(side * side)[: layers - 1]])
        start = (np.stack([cells // side, cells % side], 1) + random.uniform(0.38, 0.62, (layers, 2))) * size / side
        speed = random.uniform(0.02, 0.05, (layers, 2)) * size * random.choice([-1, 1], (layers, 2))
        low, room = radius, size - 2 * radius  # objects bounce back from the border, the background just moves
        centre = start + speed * time_of[..., None]
        centre[:, 1:] = low + room - abs((centre[:, 1:] - low) % (2 * room) - room)
        y, x = (line[:, None] - centre[..., 0, None, None], line - centre[..., 1, None, None])  # [T, L, S, S]
        turn, phase = random.uniform(0, 2 * np.pi, (2, layers, 1, 1))
        pace = 2 * np.pi / (size * random.uniform(0.15, 0.3, (layers, 1, 1)))
        wave = 12 * np.sin((x * np.cos(turn) + y * np.sin(turn)) * pace + phase)
        grey = wave + np.array([0, 40, -40, 40, -40])[np.arange(layers) % 5][:, None, None]
        triangle = np.maximum(abs(x) * 0.87 - y * 0.5, y) * 1.7
        inside = [x * 0 + y * 0, np.hypot(x, y), np.maximum(abs(x), abs(y)) * 1.13 + y * 0, triangle]
        inside = np.choose(kinds[i, :layers, None, None], inside) < radius
        for layer in range(1, layers):
            labels[i][inside[:, layer]] = layer
        grey = np.take_along_axis(grey, labels[i][:, None].astype(int), 1)[:, 0]
        grey = 128 + grey + random.normal(0, noise, grey.shape)
        pixels[i] = grey.clip(0, 255)
    pixels = torch.from_numpy(pixels)[:, :, None].expand(-1, -1, 3, -1, -1)
    return pixels, torch.from_numpy(labels), torch.from_numpy(objects), torch.from_numpy(kinds)


def scene_tasks(config, counts=(2000, 1000)):
    """On coloured toy scenes: (Task of counting 0 to 4 objects, Task of saying for each patch whether most of it is
    background, disc, square or triangle)."""
    size, splits = config.image_size, []
    for seed, count in enumerate(counts):
        pixels, labels, objects, kinds = toy_scenes(count, size, seed=seed)
        kind = kinds.gather(1, labels[:, 0].flatten(1).long()).view(count, size, size)
        shares = F.avg_pool2d(F.one_hot(kind, 4).permute(0, 3, 1, 2).float(), config.patch)  # [n, 4, G, G]
        names = [str(i) for i in range(count)]
        for target in (objects, shares.argmax(1).flatten(1)):
            splits.append(in_memory(tint(pixels[:, 0], 20 + seed), target, names, []))
    return Task("count", splits[0], splits[2], 5), Task("segment", splits[1], splits[3], 4)


def evaluate(model, target, config, world, log, train_split=None):
    """Run --eval on (model, target encoder), beside it on a random one, and for kNN on raw pixels.

    Prints a table, appends it to log.jsonl and returns it in percent: {"trained": {...}, "random": ..., "pixels": ...}.
    """
    wanted = [name for name in config.eval.split(",") if name != "none"]
    if not wanted:
        return {}
    train, val = train_split or open_data(config, "train"), open_data(config, "val")
    if "features" in wanted:
        write_features(target, train if config.features_split == "train" or val is None else val, config, world, log)
        wanted.remove("features")
    labelled = [name for name in wanted if name not in ("mrr", "segment")]
    if labelled and (val is None or not train.classes):
        log.say(f"{', '.join(labelled)}: skipped, since {config.data} has no {'labels' if val else 'val split'}")
        wanted = [name for name in wanted if name not in labelled]
    elif labelled and val.classes != train.classes:
        differing = sorted({*val.classes} ^ {*train.classes})[:5]
        fail(f"train/ and val/ of {config.data} differ in their classes: {differing}")
    if not wanted:
        return {}
    if 0 < config.eval_limit < len(train):
        train = train.subset(torch.randperm(len(train), generator=generator(config.seed, "limit"))[: config.eval_limit])
    networks, results = {"trained": (model, target)}, {}
    if config.baselines:
        networks["random"] = tuple(network.to(world.device) for network in build(config))
    for name, (source, teacher) in networks.items():
        results[name] = evaluate_one(source.eval(), teacher.eval(), train, val or train, wanted, config, world, log)
    if config.baselines and "knn" in wanted:
        (bank, bank_labels), (test, labels) = (raw_pixels(split, config, world, log) for split in (train, val))
        results["pixels"] = {f"knn{k}": accuracy(s, labels).item() for k, s in knn(bank, bank_labels, test).items()}
    log.say(f"{'percent':<24}" + "".join(f"{name:>10}" for name in results))
    for key in (k for k in results["trained"] if not k.endswith("_head")):
        log.say(f"{key:<24}" + "".join(f"{r[key]:>10.1f}" if key in r else f"{'':>10}" for r in results.values()))
    log.write(eval=results, images={"train": len(train), "val": len(val or train)})
    return results


def evaluate_one(model, target, train, val, wanted, config, world, log):
    """The evaluations `wanted` of one model and its target encoder on two Splits -> {name: percent}."""
    c, result, classes = config, {}, len(train.classes)
    if "knn" in wanted or "linear" in wanted:
        bank, test = extract(target, train, c, world, log), extract(target, val, c, world, log)
    if "knn" in wanted:
        scores = knn(bank.pooled, bank.labels, test.pooled)
        result |= {f"knn{k}": accuracy(s, test.labels).item() for k, s in scores.items()}
    if "linear" in wanted:
        result |= linear_probe(cached_batches(bank, c), test, classes, c)
    if "mrr" in wanted:
        result |= evaluate_mrr(model, target, val, c, world, log)
    tuned = functools.partial(tune, config=c, world=world, log=log)
    own = Task("class", train, val, classes, augment=True)
    if "finetune" in wanted or "segment" in wanted:
        random = build(replace(c, seed=c.seed + 1))[0].predictor.to(world.device)
    if "attentive" in wanted:
        (result["attentive"],) = tuned(target, None, [own])
    if "finetune" in wanted:
        (result["tuned encoder"],) = tuned(target, None, [own], train_encoder=True)
        (result["random predictor"],) = tuned(target, random, [own], fresh=True)
        (result["tuned predictor"],) = tuned(target, model.predictor, [own])
        (result["tuned both"],) = tuned(target, model.predictor, [own], train_encoder=True)
    if "segment" in wanted or "multitask" in wanted:
        count, segment = scene_tasks(c)
    if "segment" in wanted:
        (result["segment, linear"],) = tuned(target, None, [segment])
        (result["segment, random"],) = tuned(target, random, [segment], fresh=True)
        (result["segment, predictor"],) = tuned(target, model.predictor, [segment])
    if "multitask" in wanted:
        names = ("class", "count", "segment")
        alone = [tuned(target, model.predictor, [task])[0] for task in (own, count, segment)]
        together = tuned(target, model.predictor, [own, count, segment])
        result |= {f"{name}, alone": value for name, value in zip(names, alone)}
        result |= {f"{name}, together": value for name, value in zip(names, together)}
    return result


def write_features(encoder, split, config, world, log):
    """--eval features: .npz of features float32 [N, D], labels int64 [N], paths, and with --tokens tokens [N, T, D]."""
    found = extract(encoder.eval(), split, config, world, log, config.tokens)
    arrays = dict(features=found.pooled, labels=found.labels) | (dict(tokens=found.tokens) if config.tokens else {})
    path = Path(config.features_out or log.path.parent / "features.npz")
    if world.rank == 0:
        np.savez(path, paths=np.array(found.paths), **{k: v.cpu().numpy() for k, v in arrays.items()})
        log.say(f"{path}: " + ", ".join(f"{k} {list(v.shape)}" for k, v in arrays.items()))


@torch.no_grad()
def told_ratios(model, target, images, config):
    """How much what it is told matters, on unseen images [B, 3, S, S], normalised: (loss, that with another image's
    action over it, that with another image's content over it); 1 if that is not used."""
    c = replace(config, batch=len(images))
    views = draw_views(len(images), c, generator(c.seed, "report"))
    x, y, action = make_pair(to_pixels(images) / 255, views, c)
    keep, mask = (m.to(images.device) for m in sample_masks(c, step=0))
    targets = norm_tokens(gather_tokens(target(y), mask), c)
    patches = model.encoder.patch_embed.patchify(x)
    options = ((patches, action), (patches, action.roll(1, 0)), (patches.roll(1, 0), action))
    right, other_action, other_image = (iwm_loss(model(p, keep, mask, a), targets, c) for p, a in options)
    return right.item(), (other_action / right).item(), (other_image / right).item()


# ---------------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_picture(model, target, images, config, rows=6, bank=14, tile=72, gap=5):
    """The clean source, the true transformation, and a bank of others sorted by distance to the prediction, the true
    one framed red, as a PIL image: images [n, 3, S, S], normalised."""
    c = replace(config, mrr_bank=bank, mrr_actions=1)
    canvas = Image.new("RGB", (gap + (bank + 2) * (tile + gap), 20 + rows * (tile + gap)), "white")
    write, step = ImageDraw.Draw(canvas), tile + gap
    for column, title in ((0, "source"), (1, "true target"), (2, "transformations, nearest to the prediction first")):
        write.text((gap + column * step, 4), title, fill="black")
    for row, image in enumerate(to_pixels(images[:rows]) / 255):
        found = rank_transformations(model, target, image, c, generator(c.seed, "picture", row))
        true, order = int(found["true"]), found["right"][0].argsort().tolist()
        views = jitter(image.expand(bank, -1, -1, -1), found["theta"])
        for column, view in enumerate([image, views[true], *views[order]]):
            left, top = gap + column * step, 20 + row * step
            pixels = (255 * view).round().byte().permute(1, 2, 0).cpu().numpy()
            canvas.paste(Image.fromarray(pixels).resize((tile, tile), Image.NEAREST), (left, top))
            if column > 1 and order[column - 2] == true:
                write.rectangle((left - 3, top - 3, left + tile + 2, top + tile + 2), outline="red", width=3)
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: ours, and those of I-JEPA as a start without conditioning
# ---------------------------------------------------------------------------------------------------------------------

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # by width: a file's shapes do not tell
ARCHITECTURE = ("image_size", "patch", "width", "depth", "heads")
ARCHITECTURE += ("predictor_width", "predictor_depth", "predictor_heads", "conditioning")


def read_checkpoint(path, heads=0):
    """Weights of our, ijepa.py's or I-JEPA's checkpoints: {"encoder", "target", "predictor": state dicts,
    "architecture": fields}. heads: for widths that the released models do not have.

    A file without `script` holds state dicts `encoder`, `target_encoder`, `predictor`, whose keys may begin `module.`.
    """
    state = common.old_load_checkpoint(path)
    if isinstance(state, dict) and "script" in state:
        state = common.old_read_own_checkpoint(path, "ijepa" if state["script"] == "ijepa" else Path(__file__).stem)
        parts = {"target": state["target"]}
        for name in ("encoder", "predictor"):
            parts[name] = {k.removeprefix(f"{name}."): v for k, v in state["model"].items() if k.startswith(f"{name}.")}
        theirs = {"conditioning": "none"} | state["config"]
        return parts | {"architecture": {k: theirs[k] for k in ARCHITECTURE}}
    parts = {}
    for name, key in (("encoder", "encoder"), ("target", "target_encoder"), ("predictor", "predictor")):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            parts[name] = {k.removeprefix("module."): v for k, v in state[key].items()}
    whole = len(parts) == 3 and "predictor_embed.weight" in parts["predictor"]
    if not whole or not {"pos_embed", "patch_embed.proj.weight"} <= parts["target"].keys():
        found = ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
        fail(f"{path} is no IWM or I-JEPA checkpoint: expected encoder, target_encoder and predictor, found {found}")
    encoder, predictor = parts["target"], parts["predictor"]
    width, _, patch, _ = encoder["patch_embed.proj.weight"].shape
    heads = heads or HEADS.get(width, 0)
    if not heads or width % heads:
        fail(f"{path} cannot say how many attention heads share its width of {width}: add --heads")
    depth, predictor_depth = (
        1 + max(int(k.split(".")[1]) for k in part if k.startswith(start))
        for part, start in ((encoder, "blocks."), (predictor, "predictor_blocks."))
    )
    kinds = [
        kind for kind, key in (("feature", "cond.0.weight"), ("sequence", "seq_action.weight")) if key in predictor
    ]
    architecture = dict(image_size=patch * math.isqrt(encoder["pos_embed"].shape[1]), patch=patch, width=width)
    architecture |= dict(depth=depth, heads=heads, predictor_width=len(predictor["predictor_embed.weight"]))
    architecture |= dict(predictor_depth=predictor_depth, predictor_heads=heads, conditioning=(*kinds, "none")[0])
    return parts | {"architecture": architecture}


def load_part(module, state, key, tokens, what):
    """Load a state dict whose position table `key` may have another resolution; exits with 2 if more differs."""
    if key in state and state[key].shape[1] != tokens:
        old, new = (math.isqrt(n) for n in (state[key].shape[1], tokens))
        print(f"{what}: positions interpolated from {old}x{old} to {new}x{new} patches", flush=True)
        state = state | {key: common.old_interpolate_positions(state[key], (old, old), (new, new))}
    common.old_load_state(module, state, what)


def load_weights(model, target, weights, path):
    """Put what `read_checkpoint` found into (IWM, target encoder).

    What tells the predictor the action is left as it is where the file holds none (I-JEPA), or another kind.
    """
    tokens = math.prod(target.grid)
    load_part(target, weights["target"], "pos_embed", tokens, f"{path}, target encoder")
    load_part(model.encoder, weights["encoder"], "pos_embed", tokens, f"{path}, source encoder")
    own = {k: v for k, v in model.predictor.state_dict().items() if k.startswith(("cond.", "seq_action."))}
    theirs = {k: v for k, v in weights["predictor"].items() if k in own or not k.startswith(("cond.", "seq_action."))}
    fresh = own if not own.keys() & theirs.keys() else {}
    load_part(model.predictor, fresh | theirs, "predictor_pos_embed", tokens, f"{path}, predictor")


def load_model(path, image_size=0, heads=0, **changes):
    """(IWM, target encoder) of any checkpoint that this script reads, and their Config.

    image_size: pixels, 0 = as trained; heads: where the file's width is unusual; changes: other fields of the Config.
    """
    weights = read_checkpoint(path, heads)
    config = replace(Config(**weights["architecture"]), **changes)
    config = replace(config, image_size=image_size or config.image_size)
    model, target = build(config)
    load_weights(model, target, weights, path)
    return model.eval(), target.eval(), config


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def report(model, target, train_split, config, world, log):
    """After training: are action and content used? And the picture."""
    split = open_data(config, "val") or train_split
    some = split.subset(torch.randperm(len(split), generator=generator(config.seed, "report"))[:256])
    alone = World(0, 1, world.device)  # all ranks look at the same images, since a sharded model runs on all
    images = next(eval_images(some, replace(config, eval_batch=256), alone, log))[0]
    loss, action, content = told_ratios(model, target, images, config)
    log.say(
        f"loss on unseen images {loss:.4f}; with another image's action {action:.2f} times that, with another image's "
        f"context {content:.2f} times (1: not used)"
    )
    log.write(val_loss=loss, action_ratio=action, content_ratio=content)
    if config.shard:
        return  # the parts of a sharded model do not run by themselves
    picture = draw_picture(model, target, images, config, rows=min(6, len(images)))
    if world.rank == 0:
        picture.save(log.path.parent / "picture.png")
        log.say(f"{log.path.parent / 'picture.png'}: transformations by distance to what the predictor expects")


def run(config, given):
    """Train and evaluate; with --init and no length given, only evaluate. given: names of the flags that were typed."""
    world = common.old_start_world(config.device)
    heads = config.heads if "heads" in given else 0
    if config.init:
        architecture = read_checkpoint(config.init, heads)["architecture"]
        config = replace(config, **{k: v for k, v in architecture.items() if k not in given})
    training = not config.init or bool({"steps", "epochs"} & given)
    check(config, world, training)
    out = common.old_choose_out(config.out, Path(__file__).stem, config.resume, world)
    split = cache_pixels(open_data(config, "train"), config, world, Log(out, world)) if training else None
    model, target = build(config)
    if config.init:
        load_weights(model, target, read_checkpoint(config.init, heads), config.init)
    if training:
        model, target = train(model, target, split, config, world, out)
        report(model, target, split, config, world, Log(out, world))
    evaluate(model.to(world.device), target.to(world.device), config, world, Log(out, world), split)


def main(argv=None):
    """The command line; see --help."""
    argv = sys.argv[1:] if argv is None else argv
    config = common.old_parse_config(Config, PRESETS, DATA_PRESETS, argv, __doc__.split("\n\n")[0])
    try:
        run(config, common.old_given_flags(argv))
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        advice = "try --accumulate 2 (4, 8), --precision bf16, --shard, or a smaller --batch"
        fail(f"out of GPU memory ({reason}): {advice}", 4)
    except OSError as error:
        common.old_fail_if_full(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
