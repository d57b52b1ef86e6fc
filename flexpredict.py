# SPDX-License-Identifier: MIT
"""FlexPredict: masked image modelling with stochastic positions (later renamed StoP).

"Stochastic Positional Embeddings Improve Masked Image Modeling", Bar, Bordes, Shocher, Assran, Vincent, Ballas,
Darrell, Globerson, LeCun, ICML 2024, arXiv 2308.00566; its first version called the method FlexPredict.

The idea. I-JEPA asks its predictor what is at an exact place, though from the context the exact place of things is not
known: that a dog's ear comes next, but not in which of three patches. So the network overfits to places. FlexPredict
asks about a place that is a little uncertain: the position of each masked token becomes a Gaussian, whose mean is the
usual sine-cosine embedding psi and whose covariance is learned. If that covariance were free, training would make it 0.
So its factor is tied to the matrix W that brings context tokens s into the predictor: without noise, no context.

    context token   c_i = W s_i + b + psi_i
    masked token    m_j = W n_j + b + psi_j        n_j = sigma eps,  eps ~ N(0, I), anew for each token and step

    image [B, 3, S, S] -> patches [B, N, 3*p*p]
      |-- context patches [B, K, 3*p*p] -- encoder --> s [B, K, D] --.   + masked tokens m, noise n [4*B, Kp, D]
      |                                       :                      '-> predictor --> predictions [4*B, Kp, D] --.
      |                                       : EMA                                                               loss
      '-- all patches --------------- target encoder --> [B, N, D] -> the 4 target blocks, layer norm [4*B, Kp, D] --'

    python flexpredict.py                                                  # toy images, a few minutes on a laptop
    python flexpredict.py --mode ijepa                                     # the same with exact positions
    python flexpredict.py --data scenes                                    # shapes under noise: labels through a video
    python flexpredict.py --data ~/photos                                  # ViT-S/16 on any folder of images, one GPU
    torchrun --nproc-per-node 8 flexpredict.py --data imagenet             # the released ViT-B/16
    python flexpredict.py --init vit-b16.pth.tar --data imagenet --eval lowshot,video --davis DAVIS

The paper reports (ImageNet-1k, linear probe, top-1, against I-JEPA): ViT-B/16 74.5 (72.9), ViT-L/16 78.5 (77.5), ViT-H
79.6 (79.3); with 1 % of the labels 60.3 (57.1), 65.1 (64.2), 65.4 (62.9); DAVIS-2017 J&F 57.0 (56.1), 58.4 (55.9),
60.1 (59.7). What this file was measured to do stands in the README.

Questions that readers ask. Why does W act on the context, too? Because that is the tie: a matrix of the noise's own
would shrink to 0, the exact-position optimum (the test of the tie: W's gradient contains the noise path). Is the bias
part of it? In the released code yes, noise runs through the whole Linear; in the paper (`--mode stop_paper`) no. What
about sigma? The code uses it as a standard deviation, so the covariance is sigma^2 W W^T, where the paper's equation 4
reads sigma W W^T. Where is plain masked image modelling? `--mode ijepa`. Is there noise at test time? The predictor is
not used then; where it is asked without noise it answers for the mean position.

This follows the released code (`--mode stop`), which made the checkpoints: its masked tokens have no mask token (the
files hold an untrained one; the bias b plays its part), where the paper adds it. All else is I-JEPA's, with the same
departures from released code as in ijepa.py, and grey and blurred views, which its authors' I-JEPA lacks. The official
encoder mask is cut per GPU of 64 images: --group. The low-shot evaluation leaves out a rotation that changes nothing
and takes the usual central crop.
"""

import contextlib
import copy
import functools
import hashlib
import http.client
import io
import itertools
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
from common import OLD_EMA as EMA, OldBlock as Block, OldLog as Log, OldViT as ViT, OldWorld as World, old_effective_rank as effective_rank, old_fail as fail, old_gather_tokens as gather_tokens, old_generator as generator

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag, and the comment beside it is its help text."""

    preset: str = ""  # a name of PRESETS; by default the one that fits --data
    data: str = "toy"  # toy, scenes, cifar10, imagenet, another folder of $DATA (default ./data), or a path

    # model
    image_size: int = 24  # side of the image, pixels
    patch: int = 4  # side of a patch, pixels
    width: int = 64  # encoder width
    depth: int = 4  # encoder blocks
    heads: int = 4  # attention heads of the encoder
    predictor_width: int = 32  # predictor width
    predictor_depth: int = 4  # predictor blocks
    predictor_heads: int = 0  # attention heads of the predictor, 0 = as the encoder
    init_std: float = 0.02  # std of the initial weights
    patch_std: float = 0.3  # std of the initial patch projection, 0 = as the other weights

    # stochastic positions
    mode: str = "stop"  # stop (the released code), stop_paper (mask token, no bias on noise) or ijepa (no noise)
    sigma: float = 0.25  # std of the noise, relative to context tokens, whose coordinates have about std 1

    # masks
    masks: str = "corrected"  # official (the paper's code) or corrected (blocks reach last row, column: sample_masks)
    targets: int = 4  # target blocks an image
    contexts: int = 1  # context blocks an image
    target_scale: tuple[float, float] = (0.15, 0.2)  # area of a target block, share of the image
    target_aspect: tuple[float, float] = (0.75, 1.5)  # height / width of a target block
    context_scale: tuple[float, float] = (0.85, 1.0)  # area of the context block before targets are cut out of it
    min_keep: int = 3  # a block has more patches than this
    min_context: int = 8  # corrected masks: fewer context patches than this are not accepted
    overlap: bool = False  # let the context keep the patches of the targets
    group: int = 0  # consecutive samples whose contexts are cut to one length, 0 = the batch (the paper: a GPU's share)

    # augmentation
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop, share of the image
    flip: bool = False  # mirror half of the images
    grey: float = 0.0  # share of the images that turn grey
    blur: float = 0.0  # share of the images that are blurred
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # std of the blur, pixels

    # optimisation
    batch: int = 64  # images a step, over all ranks
    accumulate: int = 1  # split a rank's share of the batch into this many forward passes
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps; wins over --epochs
    warmup: float = 0.1  # share of the run in which lr rises
    lr: float = 2e-3  # peak learning rate
    lr_start: float = 2e-4  # learning rate of the first step
    lr_final: float = 1e-6  # learning rate at the end of the schedule
    weight_decay: float = 0.04  # AdamW weight decay at the start
    weight_decay_final: float = 0.04  # weight decay at the end (half a cosine)
    momentum: float = 0.996  # EMA momentum of the target encoder at the start
    momentum_final: float = 1.0  # EMA momentum at the end (linear)
    schedule_scale: float = 1.0  # schedules are this many times longer than the run (>= 1)
    freeze: float = 1.0  # share of the run after which lr and weight decay leave their cosines
    freeze_to: str = "constant"  # what they do then: constant, or final (a line to their final values)

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/flexpredict, runs/flexpredict-2, ...
    resume: bool = False  # continue from last.pt in the run's folder, or start if there is none
    init: str = ""  # checkpoint to start from or to evaluate: ours, or an official .pth.tar
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
    eval: str = "knn,linear"  # comma-separated: knn, linear, lowshot, video, count, features; or none
    encoder: str = "target"  # which encoder is evaluated: target (the paper) or context
    baselines: bool = True  # evaluate a randomly initialised network and raw pixels beside it
    eval_limit: int = 0  # use at most this many training images for knn and lowshot, 0 = all
    eval_batch: int = 256  # images a forward pass in evaluation, a rank
    probe: str = "sgd"  # optimizer of the linear probe: lars (the paper's ViT-H) or sgd (its ViT-B)
    probe_augment: bool = False  # probe on random crops and flips, each encoded anew; else on features computed once
    probe_epochs: int = 28  # passes of the linear probe
    probe_batch: int = 256  # batch of the linear probe, over all ranks
    probe_lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)  # learning rates tried, scaled by batch / 256
    probe_decays: tuple[float, ...] = (5e-4, 0.0)  # weight decays tried
    probe_milestones: tuple[float, ...] = (0.286, 0.571, 0.857)  # share of the epochs after which lr is divided by 10
    lowshot: float = 0.01  # share of the labels that lowshot uses
    lowshot_list: str = ""  # file of training image names for lowshot, one a line; default a seeded share of each class
    ridge: float = 0.0025  # lowshot: l2 penalty of the logistic regression, summed over the images
    davis: str = ""  # folder of DAVIS-2017 for --eval video; default moving shapes made on the fly
    features_split: str = "val"  # train or val
    features_out: str = ""  # file of --eval features, default features.npz in the run's folder
    tokens: bool = False  # --eval features also writes the patch tokens


PAPER = dict(
    data="imagenet", image_size=224, patch=16, predictor_width=384, masks="official", min_keep=10, group=64,
    init_std=0.02, patch_std=0.0, crop_scale=(0.3, 1.0), flip=True, grey=0.2, blur=0.5, batch=2048, epochs=600,
    warmup=15 / 600, lr=8e-4, lr_start=2e-4, lr_final=1e-4, weight_decay=0.04, weight_decay_final=0.4, momentum=0.996,
    eval="linear,lowshot", probe="sgd", probe_augment=True, probe_lrs=(0.01,), probe_decays=(5e-4,), log_every=50,
)  # fmt: skip
HUGE = dict(
    width=1280, depth=32, heads=16, predictor_depth=12, sigma=0.2, epochs=300, warmup=40 / 300, lr=1e-3, lr_final=1e-6,
    freeze=250 / 300, probe="lars", probe_epochs=50, probe_batch=16384, probe_lrs=(0.1, 0.01), probe_decays=(5e-4, 0.0),
    probe_milestones=(0.3, 0.6, 0.9),
)  # fmt: skip
CIFAR10_CPU = dict(
    data="cifar10", image_size=32, width=128, predictor_width=64, predictor_depth=3, init_std=0.06, patch_std=0.15,
    min_keep=4, min_context=12, crop_scale=(0.5, 1.0), flip=True, steps=3200, warmup=0.05, lr=1.5e-3, lr_start=1e-4,
    weight_decay_final=0.1, log_every=50,
)  # fmt: skip

# On one GPU. Not measured yet: made from the recipe above and the specifications of the paper.
CIFAR10 = dict(
    data="cifar10", image_size=32, width=192, depth=12, heads=3, predictor_width=96, init_std=0.05, patch_std=0.15,
    min_keep=4, min_context=12, crop_scale=(0.4, 1.0), flip=True, grey=0.2, batch=512, epochs=250, lr=1e-3,
    lr_start=1e-4, weight_decay_final=0.2, log_every=50,
)  # fmt: skip
FOLDER = dict(
    data="folder", image_size=224, patch=16, width=384, depth=12, heads=6, predictor_width=192, predictor_depth=6,
    init_std=0.03, patch_std=0.0, min_keep=10, min_context=24, crop_scale=(0.3, 1.0), flip=True, grey=0.2, blur=0.5,
    batch=256, epochs=100, lr=1e-3, lr_start=1e-4, weight_decay_final=0.2, probe_augment=True, log_every=50,
)  # fmt: skip

PRESETS = {
    "toy": dict(steps=1000, probe_epochs=15),  # the defaults of Config
    # what no prediction uses, such as noise, is forgotten only as fast as weights decay
    "toy-scenes": dict(data="scenes", steps=1000, probe_epochs=15, weight_decay=0.5, weight_decay_final=0.5,
                       eval="knn,linear,video,count"),
    "cifar10-cpu": CIFAR10_CPU,
    "cifar10": CIFAR10,
    "folder": FOLDER,
    "vit_b16_in1k": PAPER | dict(width=768, depth=12, heads=12, predictor_depth=6),
    "vit_l16_in1k": PAPER | dict(width=1024, depth=24, heads=16, predictor_depth=12),
    "vit_h16_in1k": PAPER | HUGE,
}  # fmt: skip
DATA_PRESETS = {"toy": "toy", "scenes": "toy-scenes", "cifar10": "cifar10", "imagenet": "vit_b16_in1k", "*": "folder"}
EVALUATIONS = ("knn", "linear", "lowshot", "video", "count", "features", "none")


def check(config, world, training=True):
    """Refuse what cannot work, before any work (exit 2)."""
    c = config
    if c.image_size % c.patch:
        fail(f"--image-size {c.image_size} is not a multiple of --patch {c.patch}")
    for name, width, heads in (("", c.width, c.heads), ("predictor-", c.predictor_width, c.predictor_heads or c.heads)):
        if width % heads or width % 4:
            fail(f"--{name}width {width} must be a multiple of its heads, {heads}, and of 4")
    choices = dict(mode=("stop", "stop_paper", "ijepa"), masks=("official", "corrected"), probe=("lars", "sgd"),
                   encoder=("target", "context"), freeze_to=("constant", "final"), features_split=("train", "val"),
                   precision=("", "bf16", "fp16", "fp32"))  # fmt: skip
    for name, known in choices.items():
        if getattr(c, name) not in known:
            fail(f"--{name.replace('_', '-')} {getattr(c, name)!r} is not one of {', '.join(k for k in known if k)}")
    for name in c.eval.split(","):
        if name not in EVALUATIONS:
            fail(f"--eval {name!r} is not one of {', '.join(EVALUATIONS)}")
    if c.davis and not (Path(c.davis).expanduser() / "ImageSets/2017/val.txt").is_file():
        fail(f"no DAVIS-2017 at --davis {c.davis}: expected ImageSets/2017/val.txt, JPEGImages/480p, Annotations/480p")
    if not training:
        return
    if c.sigma < 0:
        fail(f"--sigma {c.sigma} is negative; 0.25 is the paper's, 0 means no noise")
    if not 0 < c.freeze <= 1:
        fail(f"--freeze {c.freeze} must be a share of the run, above 0 and at most 1")
    micro = micro_batch(c, world)
    if c.batch % (world.size * c.accumulate) or c.batch % (world.size * micro) or (c.group and c.batch % c.group):
        parts = f"{world.size} ranks x {c.accumulate} accumulations, in groups of {c.group or c.batch}"
        fail(f"--batch {c.batch} does not divide into {parts}")
    if c.group and c.group % micro:
        fail(f"--group {c.group} is no multiple of the {micro} images a forward pass; change --accumulate or --group")
    grid = c.image_size // c.patch
    smallest = min(math.prod(block_size(u / 100, grid, c.target_scale, c.target_aspect, c.masks)) for u in range(101))
    context = min(math.prod(block_size(u / 100, grid, c.context_scale, (1, 1), c.masks)) for u in range(101))
    if min(smallest, context) <= c.min_keep:
        fail(
            f"on a {grid}x{grid} grid a target block can have {smallest} patches and a context block {context}, but "
            f"--min-keep {c.min_keep} asks for more: lower --min-keep, or use smaller patches or larger blocks"
        )
    if c.schedule_scale < 1:
        fail(f"--schedule-scale {c.schedule_scale} is below 1: the schedules would end before the run does")
    if c.shard and c.encoder == "context":
        flags = "--init RUN/last.pt --encoder context"
        fail(f"--shard evaluates the target encoder only; evaluate the context encoder afterwards with {flags}")
    if c.shard and c.precision == "fp16":
        fail("--shard works with bf16 and fp32, not with --precision fp16")


def micro_batch(config, world):
    """Images a forward pass: a rank's share split by --accumulate, and never from two groups."""
    return min(config.group or config.batch, max(1, config.batch // (world.size * config.accumulate)))


# ---------------------------------------------------------------------------------------------------------------------
# Masks, as I-JEPA's: several target blocks, and one context block without them
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


def block_sizes(config, step):
    """Sizes of the target and of the context blocks in this step: one of each for the whole batch, on all ranks."""
    random = torch.Generator().manual_seed(step)
    grid = config.image_size // config.patch
    target_u, context_u = torch.rand(1, generator=random).item(), torch.rand(1, generator=random).item()
    target = block_size(target_u, grid, config.target_scale, config.target_aspect, config.masks)
    return target, block_size(context_u, grid, config.context_scale, (1.0, 1.0), config.masks)


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


def sample_masks(config, step, first=0, last=None):
    """Masks of samples first..last of the global batch in this step, for all of them at once.

    Returns a list, one entry per `micro-batch group` of config.group samples that the range touches:
    (context int64 [contexts, B, K], targets int64 [targets, B, Kp]). Locations depend only on seed, step and index in
    the global batch.

    `official`: as the released collator. Blocks never touch the last row or column; contexts are cut to the group's
    shortest by keeping their first K patches in raster order, which favours the top; where too little context is left,
    the last target is allowed into it, then the one before, after 20 tries each.
    `corrected`: blocks reach the border, contexts are cut at random, and where too little is left, all the image's
    blocks are drawn again. On an 8x8 grid the official border would leave 15 of 64 patches untrained, and the cut the
    lower third.
    """
    official = config.masks == "official"
    grid, count = config.image_size // config.patch, config.targets
    group = config.group or config.batch
    last = config.batch if last is None else last
    low, high = first // group * group, -(-last // group) * group
    target_size, context_size = block_sizes(config, step)
    random = generator(config.seed, "masks", step)

    def draw(blocks, size):
        """Random corners for the whole global batch, of which we keep our groups': [B, blocks, 2]."""
        room = torch.tensor([grid - size[0], grid - size[1]]) + (not official)
        uniform = torch.rand(config.batch, blocks, 2, generator=random, dtype=torch.float64)
        return (uniform[low:high] * room).long()

    todo = torch.ones(high - low, config.contexts, dtype=torch.bool)
    targets, contexts = None, torch.zeros(high - low, config.contexts, grid * grid, dtype=torch.bool)
    for attempt in range(20 * (count + 1)):
        if targets is None or not official:
            fresh = rectangles(draw(count, target_size), target_size, grid)  # [B, targets, N]
            targets = fresh if targets is None else torch.where(todo.any(1)[:, None, None], fresh, targets)
        regions = 0 if config.overlap else max(0, count - attempt // 20) if official else count
        fresh = rectangles(draw(config.contexts, context_size), context_size, grid)
        fresh &= ~targets[:, :regions].any(1, keepdim=True)
        contexts = torch.where(todo[..., None], fresh, contexts)  # [B, contexts, N]
        todo = contexts.sum(-1) <= (config.min_keep if official else max(config.min_keep, config.min_context - 1))
        if not official:
            todo = todo.any(1, keepdim=True).expand_as(todo)
        if not todo.any():
            break
    shape = (config.batch, *contexts.shape[1:])
    keys = None if official else torch.rand(shape, generator=random, dtype=torch.float64)[low:high]
    target_indices = to_indices(targets, math.prod(target_size))
    lengths = contexts.sum(-1).view(-1, group * config.contexts).amin(1).tolist()
    masks = []
    for i, length in enumerate(lengths):
        rows = slice(i * group, (i + 1) * group)
        context = to_indices(contexts[rows], length, None if keys is None else keys[rows])
        masks.append((context, target_indices[:, rows]))
    return masks


def micro_batch_masks(config, step, first, last, world):
    """`sample_masks` for samples first..last, split into the micro-batches of a rank."""
    group, micro = config.group or config.batch, micro_batch(config, world)
    groups, masks = sample_masks(config, step, first, last), []
    for low in range(first, last, micro):
        rows = slice(low % group, low % group + micro)
        masks.append([m[:, rows].contiguous() for m in groups[low // group - first // group]])
    return masks


# ---------------------------------------------------------------------------------------------------------------------
# Stochastic positions (section 3 of the paper)
# ---------------------------------------------------------------------------------------------------------------------


def stochastic_positions(positions, noise, weight, bias=None):
    """The paper's one line, for any masked model: psi + W n (+ b), positions psi whose covariance is sigma^2 W W^T.

    positions [..., P]; noise [..., D], sigma times standard normal; weight [P, D] and bias [P] are those that bring the
    context into the predictor: with others, W = 0 would be the optimum. Nothing is detached.
    """
    return positions + F.linear(noise, weight, bias)


def draw_noise(config, step, first, last, asked, device, block=16):
    """Noise n of samples first..last of the global batch in this step: [targets, contexts*B, Kp, D], std config.sigma.

    One generator for `block` consecutive samples, so a sample's noise is the same however ranks share the batch.
    """
    shape = (block, config.targets, config.contexts, asked, config.width)
    blocks = range(first // block, -(-last // block))
    generators = (generator(config.seed, "noise", step, i, device=device) for i in blocks)
    noise = torch.cat([torch.randn(shape, generator=random, device=device) for random in generators])
    noise = noise[first % block : first % block + last - first]  # [B, M, E, Kp, D]
    return config.sigma * noise.permute(1, 2, 0, 3, 4).flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """I-JEPA's narrow ViT, which fills in each target block from the context, asked about stochastic positions."""

    def __init__(self, grid, width, predictor_width, depth, heads, mode="stop"):
        super().__init__()
        self.mode = mode
        self.predictor_embed = nn.Linear(width, predictor_width)
        # in `stop` never used nor trained, but the released files hold it
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_width), requires_grad=mode != "stop")
        table = common.old_sincos_2d(predictor_width, grid, grid).float()
        self.predictor_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(predictor_width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(predictor_width, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_width, width)
        self.apply(common.old_init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def queries(self, positions, noise=None):
        """Masked tokens m of positions psi [M, E*B, Kp, P], by mode; noise n [M, E*B, Kp, D], None for n = 0."""
        weight, bias = self.predictor_embed.weight, self.predictor_embed.bias
        if self.mode == "stop":
            return positions + bias if noise is None else stochastic_positions(positions, noise, weight, bias)
        if self.mode == "stop_paper" and noise is not None:
            positions = stochastic_positions(positions, noise, weight)
        return positions + self.mask_token

    def forward(self, context, masks_context, masks_target, noise=None):
        """Predicted representations of the target patches.

        context [E*B, K, D]: tokens of E contexts; masks_context [E, B, K], masks_target [M, B, Kp]; noise
        [M, E*B, Kp, D] of `draw_noise`, None asks about the mean positions -> [M*E*B, Kp, D], rows ordered
        target-major, then context, then image.
        """
        contexts, (targets, _, asked) = len(masks_context), masks_target.shape
        positions = self.predictor_pos_embed[0]
        x = self.predictor_embed(context) + positions[masks_context.flatten(0, 1)]  # [E*B, K, P]
        queries = self.queries(positions[masks_target.repeat(1, contexts, 1)], noise)  # [M, E*B, Kp, P]
        x = torch.cat([x.expand(targets, -1, -1, -1), queries], dim=2).flatten(0, 1)
        for block in self.predictor_blocks[:-1]:
            x = block(x)  # [M*E*B, K+Kp, P]
        # only the queries are read, so the last block computes only them
        x = self.predictor_blocks[-1](x, queries=asked)
        return self.predictor_proj(self.predictor_norm(x))


class FlexPredict(nn.Module):
    """Context encoder and predictor, trained by gradient. The target encoder is a ViT beside it, moved by EMA."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.encoder = ViT(c.image_size, c.patch, c.width, c.depth, c.heads)
        self.predictor = Predictor(
            c.image_size // c.patch, c.width, c.predictor_width, c.predictor_depth, c.predictor_heads or c.heads, c.mode
        )
        self.apply(functools.partial(common.old_init_weights, std=c.init_std))
        nn.init.normal_(self.encoder.patch_embed.proj.weight, std=c.patch_std or c.init_std)

    def forward(self, patches, masks_context, masks_target, noise=None):
        """patches [B, N, 3*p*p], masks and noise as in `Predictor.forward` -> predictions [M*E*B, Kp, D]."""
        return self.predictor(self.encoder(patches, keep=masks_context), masks_context, masks_target, noise)


def build(config):
    """A freshly initialised (model, target encoder); the target starts as a copy of the context encoder."""
    torch.manual_seed(config.seed)
    model = FlexPredict(config)
    return model, copy.deepcopy(model.encoder).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def gather_targets(tokens, masks_target, contexts=1):
    """What to predict: target-encoder tokens [B, N, D], masks [M, B, Kp] -> [M*contexts*B, Kp, D], normed per token.

    Layer norm after gathering is the same as before it, on fewer tokens. Rows are ordered as the predictor's.
    """
    picked = gather_tokens(tokens, masks_target)
    picked = F.layer_norm(picked.float(), picked.shape[-1:])
    return picked.view(len(masks_target), 1, -1, *picked.shape[1:]).expand(-1, contexts, -1, -1, -1).flatten(0, 2)


def jepa_loss(predictions, targets):
    """Smooth L1 (beta 1), mean over all elements: the released code's loss; the paper's text says L2."""
    return F.smooth_l1_loss(predictions.float(), targets)


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


def open_data(config, name):
    """`open_split`; with --data scenes, quarters of toy scenes under strong noise, labelled by the shape they show."""
    if config.data != "scenes":
        return open_split(config, name)
    count, size = {"train": 2000, "val": 250}[name], config.image_size
    pixels, labels, _, kinds = toy_scenes(count, 2 * size, noise=60.0, seed={"train": 5, "val": 6}[name])
    images, shapes = [], []
    for rows, columns in itertools.product((slice(size), slice(size, None)), repeat=2):
        images.append(pixels[:, 0, :, rows, columns])
        which = labels[:, 0, rows, columns].flatten(1).amax(1, keepdim=True)  # there is at most one object in a quarter
        shapes.append(kinds.gather(1, which.long())[:, 0])
    names = [f"{name}/{i:05d}" for i in range(4 * count)]
    return in_memory(torch.cat(images), torch.cat(shapes), names, ["none", "disc", "square", "triangle"])


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


# Copied from msn.py
def grey_levels(images):
    """PIL's grey: [B, 3, H, W] in 0..255 -> [B, 1, H, W], rounded to integers."""
    red, green, blue = images.split(1, dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).add_(0.5).floor_()


# Copied from msn.py
def blur_matrix(sigma, size):
    """PIL's blur along one axis, three box filters with repeated edges: sigma [B], pixels -> [B, size, size].

    A box of the wanted variance is 2 l + 1 pixels of weight 1 between two of weight a < 1. Sigma 0 gives the identity.
    """
    variance = sigma[:, None, None] ** 2 / 3
    half = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    edge = (2 * half + 1) * (half * (half + 1) - 3 * variance) / (6 * (variance - (half + 1) ** 2))
    pixel = torch.arange(size, device=sigma.device)
    offset = pixel - pixel[:, None]

    def up_to(offset):
        """Sum of the box's weights from its left end to this offset."""
        inner = torch.minimum((offset + half + 1).clamp(min=0), 2 * half + 1)
        return inner + edge * ((offset >= -half - 1).float() + (offset >= half + 1).float())

    right = torch.where(pixel == size - 1, 2 * (half + edge) + 1, up_to(offset))
    left = torch.where(pixel == 0, 0.0, up_to(offset - 1))
    box = (right - left) / (2 * (half + edge) + 1)
    return box @ box @ box


# Copied from msn.py
def blur(images, sigma):
    """PIL's GaussianBlur: images [B, 3, H, W] in 0..255, sigma [B] in pixels (0 changes nothing) -> the same shape."""
    rows, columns = (blur_matrix(sigma, size)[:, None] for size in images.shape[2:])
    return (rows @ images @ columns.mT).round_()


@torch.no_grad()
def grey_and_blur(images, config, step, first):
    """The released code's only photometric augmentation: some normalised images [b, 3, S, S] turn grey, some blurred.

    first: the place of the first of them in the global batch, for which the draws of the step are made.
    """
    if not config.grey and not config.blur:
        return images
    uniform = torch.rand(3, config.batch, generator=generator(config.seed, "photometric", step))
    uniform = uniform[:, first : first + len(images)]
    low, high = config.blur_sigma
    sigma = torch.where(uniform[1] < config.blur, low + (high - low) * uniform[2], 0.0)
    pixels = to_pixels(images).round()
    drawn = (uniform[0] < config.grey).nonzero()[:, 0], sigma.nonzero()[:, 0], sigma[sigma > 0]  # on the CPU
    grey, rows, sigma = (x.to(images.device, non_blocking=True) for x in drawn)
    pixels = pixels.index_copy(0, grey, grey_levels(pixels[grey]).expand(-1, 3, -1, -1))
    pixels = pixels.index_copy(0, rows, blur(pixels[rows], sigma))
    return normalize(pixels)


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


def schedules(config, step, steps):
    """(lr, weight decay, EMA momentum) of step 0, 1, ... The released code advances the first two before the step.

    From the share --freeze of the run on, lr and weight decay stay as they are, or go to their final values in a line.
    """
    c, length = config, config.schedule_scale * steps
    end, now, frozen = int(length), step + 1, round(c.freeze * steps)
    at = min(now, frozen)
    lr = common.old_warmup_cosine_schedule(at, end, int(c.warmup * steps), c.lr_start, c.lr, c.lr_final)
    decay = common.old_cosine_schedule(at, end, c.weight_decay, c.weight_decay_final)
    if now > frozen and c.freeze_to == "final":
        lr = common.old_linear_schedule(now - frozen, end - frozen, lr, c.lr_final)
        decay = common.old_linear_schedule(now - frozen, end - frozen, decay, c.weight_decay_final)
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
        model.compile(dynamic=True)  # the number of context tokens changes from step to step
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
    first = world.rank * config.batch // world.size  # of this rank's samples, in the global batch
    log = Log(out, world, steps, start)
    log.catch_signals()
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (plain.encoder, plain.predictor)]
    log.say(
        f"{out}: {len(split)} images, steps {start} to {steps} of {config.batch} on {world.size} x {device.type} in "
        f"{str(dtype)[6:]}; encoder {millions[0]:.2f} M, predictor {millions[1]:.2f} M parameters; mode {config.mode}"
    )
    waited, window, since = 0.0, start, time.monotonic()
    for step in range(start, steps):
        tick = time.monotonic()
        item = next(loader)
        images = grey_and_blur(make_images(item, pixels, config.image_size, device), config, step, first)
        waited += time.monotonic() - tick
        log.skip(item["bad"], len(split), config.max_bad)
        lr, decay, momentum = schedules(config, step, steps)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay if group["decay"] else 0.0

        patches = plain.encoder.patch_embed.patchify(images)  # [b, N, 3*p*p], once for both encoders
        loss, parts, low = torch.zeros((), device=device), len(item["masks"]), first
        for i, (part, masks) in enumerate(zip(patches.chunk(parts), item["masks"], strict=True)):
            masks_context, masks_target = (m.to(device, non_blocking=True) for m in masks)
            noise = None
            if config.mode != "ijepa":
                noise = draw_noise(config, step, low, low + len(part), masks_target.shape[-1], device)
            autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
            with common.old_no_sync(model, last=i == parts - 1), autocast:
                with torch.no_grad():
                    tokens = target(part)  # [m, N, D]
                    targets = gather_targets(tokens, masks_target, config.contexts)
                part_loss = jepa_loss(model(part, masks_context, masks_target, noise), targets) / parts
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()
            low += len(part)

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
            numbers = [loss, norm, streak, pooled.std(0).mean(), effective_rank(pooled)]
            numbers = torch.stack([*numbers, position_noise(plain.predictor, config)])
            loss_now, norm_now, bad_steps, std, rank, noise_std = numbers.tolist()  # the only host-device sync
            stopping = log.agree(log.stop)
            now = time.monotonic()
            row = dict(loss=loss_now, lr=lr, images_per_s=config.batch * (done - window) / (now - since))
            row["data_wait"] = waited / (now - since)
            waited, window, since = 0.0, done, now
            log.progress(done, **row)
            row |= dict(weight_decay=decay, momentum=momentum, gradient_norm=norm_now, feature_std=std)
            row |= dict(feature_rank=rank, position_noise=noise_std, context=masks_context.shape[-1])
            row |= dict(target=masks_target.shape[-1], memory_gib=common.old_memory_gib(device))
            log.write(step=done, **row)
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


@torch.no_grad()
def position_noise(predictor, config):
    """Std that the noise gives a coordinate of a position, sigma ||W_row||, RMS over rows: 0-dim; sine-cosines: 0.7."""
    weight = predictor.predictor_embed.weight
    square = weight.float().square().sum()
    square = square.full_tensor() if hasattr(square, "full_tensor") else square
    return (config.mode != "ijepa") * config.sigma * (square / len(weight)).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: features and probes
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


def augmented_batches(encoder, split, config, world, log):
    """Batches for `linear_probe` of random crops and flips, encoded anew each epoch; every rank encodes its share."""
    batch = min(config.probe_batch, len(split)) // world.size * world.size
    data = Batches(split, config, world, batch, (0.08, 1.0), flip=True, bicubic=True, purpose="probe")
    pixels = None if split.pixels is None else split.pixels.to(world.device)

    def batches(epoch):
        steps = len(split) // batch
        for item in make_loader(data, range(epoch * steps, (epoch + 1) * steps), config, world):
            log.skip(item["bad"], len(split), config.max_bad)
            images = make_images(item, pixels, config.image_size, world.device, bicubic=True)
            parts = [encode(encoder, x)[:2] for x in images.split(config.eval_batch)]
            labels = split.labels[item["indices"]].to(world.device, non_blocking=True)
            yield [common.old_gather_over_ranks(x) for x in (*map(torch.cat, zip(*parts, strict=True)), labels)]

    return batches


def lowshot_indices(split, config):
    """Training images of the low-shot probe: those of --lowshot-list, or a seeded share (at least 1) of each class."""
    if config.lowshot_list:
        wanted = set(Path(config.lowshot_list).read_text().split())
        return torch.tensor([i for i, path in enumerate(split.paths) if path in wanted or Path(path).name in wanted])
    order = torch.randperm(len(split), generator=generator(config.seed, "lowshot"))
    classes = (order[split.labels[order] == c] for c in range(len(split.classes)))
    return torch.cat([members[: max(1, round(config.lowshot * len(members)))] for members in classes])


# Copied from msn.py
def logistic_regression(x, labels, classes, ridge):
    """Weights [C, D] that minimise mean cross entropy + ridge / (2 n) |W|^2 on x [n, D], no intercept: the optimum.

    Strongly convex, so any solver finds the same; here LBFGS to convergence, in float64 where the device has it.
    """
    x = x.float() if x.device.type == "mps" else x.double()
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight], max_iter=1000, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )  # fmt: skip

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T, labels) + ridge / (2 * len(x)) * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach()


def standardise_columns(x):
    """Each feature of x [N, D] to mean 0 and (unbiased) std 1 over these N; a constant one to 0."""
    std, mean = torch.std_mean(x, dim=0)
    return (x - mean) / std.where(std > 0, torch.inf)


def low_shot(few, val, classes, ridge):
    """The paper's 1 % evaluation of Features: logistic regression without intercept, top-1 in percent.

    The validation images are standardised by their own statistics, as the released code does.
    """
    weight = logistic_regression(standardise_columns(few.pooled), few.labels, classes, ridge)
    return accuracy(standardise_columns(val.pooled).to(weight.dtype) @ weight.T, val.labels).item()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: semi-supervised video segmentation by label propagation (DAVIS-2017), and toy scenes
# ---------------------------------------------------------------------------------------------------------------------


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


def davis_video(root, name, patch):
    """A DAVIS-2017 sequence -> frames float [T, 3, h, w], normalised, sides multiples of 64 near 480; labels [T, H, W].

    The frames are resized without antialiasing, as the released evaluation (DINO's) does.
    """
    files = sorted((root / "JPEGImages/480p" / name).glob("*.jpg"))
    masks = [root / "Annotations/480p" / name / f"{file.stem}.png" for file in files]
    missing = next((p for p in masks if not p.is_file()), None) if files else root / "JPEGImages/480p" / name
    if missing:
        fail(f"DAVIS sequence {name} is not whole: nothing at {missing}")
    frames, labels = [], []
    for file, mask in zip(files, masks, strict=True):
        with Image.open(file) as image, Image.open(mask) as annotation:
            width, height = image.size
            short = 480 // patch * patch
            long = max(64, int(480 * max(width, height) / min(width, height) / 64) * 64) // patch * patch
            size = (short, long) if width >= height else (long, short)
            frame = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)[None].float()
            frames.append(normalize(F.interpolate(frame, size=size, mode="bilinear", align_corners=False))[0])
            labels.append(torch.from_numpy(np.array(annotation.convert("P") if annotation.mode != "L" else annotation)))
    return torch.stack(frames), torch.stack(labels)


def propagate_labels(features, first, n_last=7, radius=12, topk=5, temperature=0.1):
    """Labels of a video from those of its first frame, by similarity of patches: DINO's protocol, without training.

    features [T, h, w, D]; first [C, h, w], one-hot labels of frame 0 -> [T-1, C, h, w], soft labels of the others. A
    patch asks its neighbours within `radius` patches in frame 0 and in the last n_last frames that were propagated; the
    topk most similar of all of them vote.
    """
    frames, h, w, _ = features.shape
    features = F.normalize(features.flatten(1, 2), dim=-1)  # [T, N, D]
    row, column = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in (h, w)), indexing="ij"))
    near = ((row - row[:, None]).abs() <= radius) & ((column - column[:, None]).abs() <= radius)
    near, found = near.to(features.device), [first.flatten(1).to(features)]
    for t in range(1, frames):
        sources = [0, *range(max(1, t - n_last), t)]
        weight = (features[sources] @ features[t].T / temperature).exp() * near  # [sources, N, N]
        weight = weight.flatten(0, 1)
        weight = weight * (weight >= weight.topk(min(topk, len(weight)), dim=0).values[-1])
        found.append(torch.cat([found[i] for i in sources], dim=1) @ (weight / weight.sum(0)))
    return torch.stack(found[1:]).unflatten(-1, (h, w))


def label_maps(soft, patch, size):
    """Soft labels [T, C, h, w] -> uint8 [T, H, W]: upsampled, channels stretched to 0..1, argmax, then to `size`."""
    soft = F.interpolate(soft, scale_factor=patch, mode="bilinear", align_corners=False)
    low, high = soft.amin((2, 3), keepdim=True), soft.amax((2, 3), keepdim=True)
    stretched = (soft - low) / (high - low).where(high > low, 1.0)
    labels = torch.where(high > 0, stretched, soft).argmax(1)
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0].byte()


def boundary(mask):
    """Pixels that differ from their right, lower or lower-right neighbour: bool [..., H, W] -> bool [..., H, W]."""
    right = torch.cat([mask[..., 1:], mask[..., -1:]], dim=-1)  # outside is as at the border
    below, diagonal = (torch.cat([m[..., 1:, :], m[..., -1:, :]], dim=-2) for m in (mask, right))
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)


def region_and_contour(predicted, true):
    """DAVIS' J (intersection over union) and F (agreement of contours) of bool masks [n, H, W]: float64 [n, 2]."""

    def count(masks):
        return masks.sum((1, 2)).cpu().double()

    union, both = count(predicted | true), count(predicted & true)
    j = torch.where(union > 0, both / union.clamp(min=1), 1.0)
    radius = math.ceil(0.008 * math.hypot(*true.shape[1:]))
    line = torch.arange(-radius, radius + 1, device=true.device)
    disk = ((line**2 + line[:, None] ** 2) <= radius**2).float()[None, None]
    edges = [boundary(mask) for mask in (predicted, true)]
    grown = [F.conv2d(edge[:, None].float(), disk, padding=radius)[:, 0] > 0.5 for edge in edges]
    sizes = [count(edge) for edge in edges]
    matched = [count(edge & other) for edge, other in zip(edges, reversed(grown), strict=True)]
    precision, recall = (m / size.clamp(min=1) for m, size in zip(matched, sizes, strict=True))
    f = 2 * precision * recall / (precision + recall).where(precision + recall > 0, 1.0)
    return torch.stack([j, f.where((sizes[0] > 0) | (sizes[1] > 0), 1.0)], dim=1)


def sequence_statistics(values):
    """Of an object's J or F in the frames without the first and the last, [n]: (mean, recall, decay), as DAVIS does."""
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    quarters = [values[a : b + 1].mean() for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return torch.stack([values.mean(), (values > 0.5).double().mean(), quarters[0] - quarters[3]])


@torch.no_grad()
def segment_video(encoder, frames, labels, config):
    """Propagate the first frame's labels through a video -> (uint8 [T-1, H, W], J and F statistics [objects, 2, 3]).

    frames float [T, 3, h, w]; labels uint8 [T, H, W], at whose size the result is judged.
    """
    grid = [side // config.patch for side in frames.shape[2:]]
    tokens = torch.cat([encoder(part) for part in frames.split(8)]).unflatten(1, grid)
    first = F.interpolate(labels[:1, None].float(), size=grid, mode="nearest")[0, 0].long()
    soft = propagate_labels(tokens, F.one_hot(first).permute(2, 0, 1).float())
    found, statistics = label_maps(soft, config.patch, labels.shape[1:]), []
    for i in range(1, int(labels[0].max()) + 1):
        values = region_and_contour(found == i, labels[1:] == i)[:-1]
        statistics.append(torch.stack([sequence_statistics(column) for column in values.T]))
    return found, torch.stack(statistics)


def toy_videos(config, count=20, frames=12):
    """Two drifting objects at twice the training image's side -> (normalised frames, labels) of each video.

    Under noise in each pixel, so that patches can't be compared as they are.
    """
    pixels, labels, _, _ = toy_scenes(count, 2 * config.image_size, frames, objects=2, noise=24.0, seed=2)
    return zip(normalize(pixels.flatten(0, 1)).unflatten(0, (count, frames)), labels, strict=True)


def evaluate_video(encoder, config, world):
    """Label propagation on DAVIS-2017 val, or on toy videos: {"J&F": percent, and J's and F's mean, recall, decay}.

    Ranks share the videos, except where the encoder is sharded and all must run in step.
    """
    if config.davis:
        root = Path(config.davis).expanduser()
        names = (root / "ImageSets/2017/val.txt").read_text().split()
        videos = (davis_video(root, name, config.patch) for name in names[world.rank :: world.size])
        if config.shard:
            videos = (davis_video(root, name, config.patch) for name in names)
    else:
        videos = list(toy_videos(config))[slice(None) if config.shard else slice(world.rank, None, world.size)]
    rows = [torch.zeros(0, 2, 3, dtype=torch.float64)]
    for frames, labels in videos:
        rows.append(segment_video(encoder, frames.to(world.device), labels.to(world.device), config)[1])
    j, f = 100 * common.old_gather_over_ranks(torch.cat(rows).float().to(world.device)).mean(0).cpu()
    result = {"J&F": ((j[0] + f[0]) / 2).item()}
    for name, values in (("J", j), ("F", f)):
        result |= {f"{name}{k}": v.item() for k, v in zip(("", " recall", " decay"), values, strict=True)}
    return result


def evaluate_count(encoder, config, world, log):
    """Linear probe on how many objects a toy scene holds (0 to 4), as the paper's CLEVR/Count: {"count": percent}."""
    features = []
    for seed, count in ((0, 2000), (1, 1000)):
        pixels, _, objects, _ = toy_scenes(count, config.image_size, seed=seed)
        names = [str(i) for i in range(count)]
        split = in_memory(pixels[:, 0], objects, names, [str(i) for i in range(5)])
        features.append(extract(encoder, split, config, world, log))
    few = replace(config, probe_batch=min(config.probe_batch, 256))
    return {"count": linear_probe(cached_batches(features[0], few), features[1], 5, few)["linear"]}


def evaluate(encoder, config, world, log, train_split=None):
    """Run --eval on an encoder (a ViT), beside it on a randomly initialised one, and for kNN on raw pixels.

    Prints a table, appends it to log.jsonl and returns it in percent: {"trained": {...}, "random": ..., "pixels": ...}.
    """
    wanted = [name for name in config.eval.split(",") if name != "none"]
    made = [name for name in wanted if name in ("video", "count")]  # on images of their own
    wanted = [name for name in wanted if name not in made]
    train = val = None
    if wanted:
        train, val = train_split or open_data(config, "train"), open_data(config, "val")
    if "features" in wanted:
        write_features(encoder, train if config.features_split == "train" or val is None else val, config, world, log)
        wanted.remove("features")
    if wanted and (val is None or not train.classes):
        log.say(f"{', '.join(wanted)}: skipped, since {config.data} has no {'labels' if val else 'val split'}")
        wanted = []
    if wanted and val.classes != train.classes:
        differing = sorted({*val.classes} ^ {*train.classes})[:5]
        fail(f"train/ and val/ of {config.data} differ in their classes: {differing}")
    if not wanted + made:
        return {}
    if wanted and 0 < config.eval_limit < len(train):
        train = train.subset(torch.randperm(len(train), generator=generator(config.seed, "limit"))[: config.eval_limit])
    networks, results = {"trained": encoder}, {}
    if config.baselines:
        networks["random"] = build(config)[1].to(world.device)
    for name, network in networks.items():
        results[name] = evaluate_one(network.eval(), train, val, wanted, config, world, log) if wanted else {}
        results[name] |= evaluate_video(network, config, world) if "video" in made else {}
        results[name] |= evaluate_count(network, config, world, log) if "count" in made else {}
    if config.baselines and "knn" in wanted:
        (bank, bank_labels), (test, labels) = (raw_pixels(split, config, world, log) for split in (train, val))
        results["pixels"] = {f"knn{k}": accuracy(s, labels).item() for k, s in knn(bank, bank_labels, test).items()}
    log.say(f"{'percent':<16}" + "".join(f"{name:>10}" for name in results))
    for key in (k for k in results["trained"] if not k.endswith("_head")):
        log.say(f"{key:<16}" + "".join(f"{r[key]:>10.1f}" if key in r else f"{'':>10}" for r in results.values()))
    log.write(eval=results, images={"train": len(train), "val": len(val)} if wanted else {})
    return results


def evaluate_one(encoder, train, val, wanted, config, world, log):
    """The evaluations `wanted` of one encoder on two Splits -> {name: percent}."""
    c, result, classes = config, {}, len(train.classes)
    test = extract(encoder, val, c, world, log)
    if "knn" in wanted or ("linear" in wanted and not c.probe_augment):
        bank = extract(encoder, train, c, world, log)
    if "knn" in wanted:
        scores = knn(bank.pooled, bank.labels, test.pooled)
        result |= {f"knn{k}": accuracy(s, test.labels).item() for k, s in scores.items()}
    if "linear" in wanted:
        augment = c.probe_augment
        batches = augmented_batches(encoder, train, c, world, log) if augment else cached_batches(bank, c)
        result |= linear_probe(batches, test, classes, c)
    if "lowshot" in wanted:
        few = extract(encoder, train.subset(lowshot_indices(train, c)), c, world, log)
        result["lowshot"] = low_shot(few, test, classes, c.ridge)
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
def content_ratio(model, target, images, config):
    """(loss, that with another image's context over it): 1 if the predictor uses positions only, else more."""
    masks = sample_masks(replace(config, batch=len(images), group=0), step=0)[0]
    masks_context, masks_target = (m.to(images.device) for m in masks)
    patches = model.encoder.patch_embed.patchify(images)
    targets = gather_targets(target(images), masks_target, config.contexts)
    right, wrong = (jepa_loss(model(p, masks_context, masks_target), targets) for p in (patches, patches.roll(1, 0)))
    return right.item(), (wrong / right).item()


# ---------------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_picture(model, target, images, config, rows=6, neighbours=3, tile=96, gap=6):
    """What the method sees and finds, as a PIL image: images [n, 3, S, S], their context, a map of the first three
    principal components of the patch features, and target blocks, each with the same block of those other images whose
    target representation is closest (cosine) to what the predictor expects from the context alone."""
    masks = sample_masks(replace(config, batch=len(images), group=0), 1)[0]
    masks_context, masks_target = (m.to(images.device) for m in masks)
    n, grid, blocks = len(images), config.image_size // config.patch, len(masks_target)
    neighbours = min(neighbours, n - 1)
    tokens = target(images)
    predictions = model(model.encoder.patch_embed.patchify(images), masks_context, masks_target)
    predictions = F.normalize(predictions.view(blocks, config.contexts, n, -1, tokens.shape[-1]).mean((1, 3)), dim=-1)
    shared = torch.cat([m.expand(n, -1) for m in masks_target[:, :rows].flatten(0, 1)[:, None]])
    represented = gather_targets(tokens, shared.view(-1, n, masks_target.shape[-1]))  # of each block in each image
    represented = F.normalize(represented.view(blocks, rows, n, -1, tokens.shape[-1]).mean(3), dim=-1)
    mean, std = (common.old_constant(v, images.device)[:, None, None] for v in (MEAN, STD))
    pixels = (images * std + mean).clamp(0, 1) * 255
    centred = tokens - tokens.mean((0, 1))
    components = centred @ torch.linalg.svd(centred[:64].flatten(0, 1), full_matrices=False)[2][:3].T
    low, high = components.flatten(0, 1).quantile(torch.tensor([0.02, 0.98], device=images.device), dim=0)
    components = ((components - low) / (high - low + 1e-6)).clamp(0, 1).mT.unflatten(2, (grid, grid)) * 255

    def visible(kept):
        mask = torch.zeros(grid * grid, device=images.device).index_fill(0, kept, 1).view(1, 1, grid, grid)
        return F.interpolate(mask, scale_factor=config.patch)[0] > 0

    shown = min(4, blocks)
    titles = ["image", "context", "features, PCA"]
    for i in range(shown):
        titles += [f"target {i + 1}"] + [f"nearest {j + 1}" for j in range(neighbours)]
    canvas = Image.new("RGB", (gap + len(titles) * (tile + gap), 20 + rows * (tile + gap)), "white")
    for column, title in enumerate(titles):
        ImageDraw.Draw(canvas).text((gap + column * (tile + gap), 4), title, fill="black")
    for row in range(rows):
        tiles = [pixels[row], torch.where(visible(masks_context[0, row]), pixels[row], 128.0), components[row]]
        for i in range(shown):
            similarity = represented[i, row] @ predictions[i, row]  # [n]
            similarity[row] = -2
            for j in [row, *similarity.topk(neighbours).indices.tolist()]:
                tiles.append(torch.where(visible(masks_target[i, row]), pixels[j], pixels[j] * 0.2 + 180))
        for column, picture in enumerate(tiles):
            picture = Image.fromarray(picture.permute(1, 2, 0).byte().cpu().numpy()).resize((tile, tile), Image.NEAREST)
            canvas.paste(picture, (gap + column * (tile + gap), 20 + row * (tile + gap)))
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: ours, and the official ones, in I-JEPA's layout
# ---------------------------------------------------------------------------------------------------------------------

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # by width: a file's shapes do not tell
ARCHITECTURE = ("image_size", "patch", "width", "depth", "heads")
ARCHITECTURE += ("predictor_width", "predictor_depth", "predictor_heads", "mode")


def read_checkpoint(path, encoder="target", heads=0):
    """Weights of our or official checkpoints: {"encoder", "target", "predictor": state dicts, "architecture": fields}.

    An official file has `encoder`, `predictor`, `target_encoder`, with keys `module.*`; only the one that `encoder`
    ("target" or "context") asks for must be there. heads: for widths that the released models do not have.
    """
    state = common.old_load_checkpoint(path)
    if isinstance(state, dict) and "script" in state:
        state = common.old_read_own_checkpoint(path, Path(__file__).stem)
        parts = {"target": state["target"]}
        for name in ("encoder", "predictor"):
            parts[name] = {k.removeprefix(f"{name}."): v for k, v in state["model"].items() if k.startswith(f"{name}.")}
        return parts | {"architecture": {k: state["config"][k] for k in ARCHITECTURE}}
    parts = {}
    for name, key in (("encoder", "encoder"), ("target", "target_encoder"), ("predictor", "predictor")):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            parts[name] = {k.removeprefix("module."): v for k, v in state[key].items()}
    chosen = parts.get("encoder" if encoder == "context" else "target", {})
    if not {"pos_embed", "patch_embed.proj.weight"} <= chosen.keys() or "cls_token" in chosen:
        found = ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
        fail(f"{path} is no I-JEPA checkpoint: expected the {encoder} encoder under `module.*` keys, found {found}")
    width, _, patch, _ = chosen["patch_embed.proj.weight"].shape
    heads = heads or HEADS.get(width, 0)
    if not heads or width % heads:
        fail(f"{path} cannot say how many attention heads share its width of {width}: add --heads")
    depth = 1 + max(int(k.split(".")[1]) for k in chosen if k.startswith("blocks."))
    size = patch * math.isqrt(chosen["pos_embed"].shape[1])
    architecture = dict(image_size=size, patch=patch, width=width, depth=depth, heads=heads)
    if "predictor" in parts:
        depth = 1 + max(int(k.split(".")[1]) for k in parts["predictor"] if k.startswith("predictor_blocks."))
        architecture |= dict(predictor_depth=depth, predictor_heads=heads)
        architecture |= dict(predictor_width=parts["predictor"]["predictor_embed.weight"].shape[0])
    return {"encoder": chosen, "target": chosen, "predictor": {}} | parts | {"architecture": architecture}


def load_part(module, state, key, tokens, what):
    """Load a state dict whose position table `key` may have another resolution; exits with 2 if more differs."""
    if key in state and state[key].shape[1] != tokens:
        old, new = (math.isqrt(n) for n in (state[key].shape[1], tokens))
        print(f"{what}: positions interpolated from {old}x{old} to {new}x{new} patches", flush=True)
        state = state | {key: common.old_interpolate_positions(state[key], (old, old), (new, new))}
    common.old_load_state(module, state, what)


def load_weights(model, target, weights, path):
    """Put what `read_checkpoint` found into (IJEPA, target encoder)."""
    tokens = math.prod(target.grid)
    load_part(target, weights["target"], "pos_embed", tokens, f"{path}, target encoder")
    load_part(model.encoder, weights["encoder"], "pos_embed", tokens, f"{path}, context encoder")
    if weights["predictor"]:
        load_part(model.predictor, weights["predictor"], "predictor_pos_embed", tokens, f"{path}, predictor")


def load_encoder(path, image_size=0, encoder="target", heads=0):
    """A frozen ViT from any checkpoint that this script reads: images [B, 3, S, S] -> tokens [B, N, D].

    image_size: pixels, 0 = as trained; encoder: "target" or "context"; heads: where the file's width is unusual.
    """
    weights = read_checkpoint(path, encoder, heads)
    a = weights["architecture"]
    vit = ViT(image_size or a["image_size"], a["patch"], a["width"], a["depth"], a["heads"])
    state = weights["encoder" if encoder == "context" else "target"]
    load_part(vit, state, "pos_embed", math.prod(vit.grid), f"{path}, {encoder} encoder")
    return vit.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def report(model, target, train_split, config, world, log):
    """After training: is content used, not only position? And the picture."""
    split = open_data(config, "val") or train_split
    some = split.subset(torch.randperm(len(split), generator=generator(config.seed, "report"))[:256])
    alone = World(0, 1, world.device)  # all ranks look at the same images, since a sharded model runs on all
    images = next(eval_images(some, replace(config, eval_batch=256), alone, log))[0]
    loss, ratio = content_ratio(model, target, images, config)
    other = f"with another image's context {ratio:.2f} times that (1: only position counts)"
    log.say(f"loss on unseen images {loss:.4f}; {other}")
    log.write(val_loss=loss, content_ratio=ratio)
    picture = draw_picture(model, target, images, config, rows=min(6, len(images)))
    if world.rank == 0:
        picture.save(log.path.parent / "picture.png")
        log.say(f"{log.path.parent / 'picture.png'}: context, targets, and what was found nearest to the predictions")


def run(config, given):
    """Train and evaluate; with --init and no length given, only evaluate. given: names of the flags that were typed."""
    world = common.old_start_world(config.device)
    heads = config.heads if "heads" in given else 0
    if config.init:
        architecture = read_checkpoint(config.init, config.encoder, heads)["architecture"]
        config = replace(config, **{k: v for k, v in architecture.items() if k not in given})
    training = not config.init or bool({"steps", "epochs"} & given)
    check(config, world, training)
    out = common.old_choose_out(config.out, Path(__file__).stem, config.resume, world)
    if not training:
        encoder = load_encoder(config.init, config.image_size, config.encoder, heads).to(world.device)
        evaluate(encoder, config, world, Log(out, world))
        return
    split = cache_pixels(open_data(config, "train"), config, world, Log(out, world))
    model, target = build(config)
    if config.init:
        load_weights(model, target, read_checkpoint(config.init, config.encoder, heads), config.init)
    model, target = train(model, target, split, config, world, out)
    log = Log(out, world)
    report(model, target, split, config, world, log)
    evaluate(target if config.encoder == "target" else model.encoder, config, world, log, split)


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
