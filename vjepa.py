# SPDX-License-Identifier: MIT
"""V-JEPA: predict the features of masked tubes of a video, and measure what that teaches about physics.

"Revisiting Feature Prediction for Learning Visual Representations from Video", Bardes, Garrido, Ponce, Chen, Rabbat,
LeCun, Assran, Ballas, 2024, arXiv 2404.08471. "Intuitive physics understanding emerges from self-supervised pretraining
on natural videos", Garrido, Ballas, Assran, Bardes, Najman, Rabbat, Dupoux, LeCun, 2025, arXiv 2502.11831.

The idea. Hide tubes of a video: blocks of the picture, gone for the whole clip. From what is left, a predictor says
what a slow copy of the encoder, which saw everything, has to say about the hidden places. Nobody asked for physics.
Yet the trained model can be asked what it expects: show it the first frames of a window, let it predict the features
of the rest, and compare them with those of what really happens. That error is its surprise. Where an object vanishes
behind a screen, or two objects swap colours, a model that has learned how objects behave is more surprised than by the
same frames in a possible order: violation of expectation, as developmental psychologists test infants.

    clip [B, 3, T, S, S] -> tubelets [B, N, 3*2*p*p]
      |-- visible tubelets [B, K, .] -- encoder --> [B, K, D] --.   + mask tokens at the hidden places
      |                                    :                    '-> predictor --> predictions [B, N-K, D] --.
      |                                    : EMA                                       (a kind of mask each)  L1 loss
      '-- all tubelets ------------ target encoder --> [B, N, D] -> layer norm, hidden places [B, N-K, D] ----'

    surprise of a window of T frames, context C:  the visible tubelets are those of its first C frames, the loss is read

    python vjepa.py                                                   # toy videos; surprise at the impossible; minutes
    python vjepa.py --target pixels --out runs/pixels                 # the control: the same network predicts pixels
    python vjepa.py --data ~/videos                                   # ViT-S/16 on any folder of videos, one GPU
    torchrun --nproc-per-node 8 vjepa.py --data k710.csv,ssv2.csv --preset vit_l16
    python vjepa.py --init vitl16.pth.tar --eval physics --physics IntPhys/dev

The papers report (ViT-H): Kinetics-400 82.0, Something-Something-v2 71.4 (frozen, attentive probe); IntPhys 98 % of
pairs right (pixel prediction, language models and random networks: near 50). README has what was measured here.

The toy world is made so that only memory helps: a possible and an impossible video consist of the very same frames, and
of the same short runs of frames. What was seen to matter there: with the usual initial weights, in a world where things
rarely rest, 1,000 steps ended on a plateau: predictions were the scene's average whatever had been hidden, and no pair
was told apart. Where the screens are up most of the time, that is the median which an L1 loss asks for; so things now
rest for longer. And with --align places attend to places like them from the start: without it the difference between
what stays and what is swapped is, after 900 steps, a twentieth. `gravity` stays at chance: rising shelves and lifts,
though legal, change more of the picture than falls do and surprise more, so one of each two pairs comes out wrong.

Where paper and released code differ, this follows the code: weight decay along a cosine; masks cut to the shortest of a
GPU's batch by keeping the first tokens, so late frames are dropped; weights normal(0, 0.02) without the rescaling that
the released class does and its training script undoes. Departures from the code: masks are cut per --group of samples
and not per GPU; gradients are clipped from the end of the warmup on, not one epoch later; frames are first brought to a
square canvas, so that a batch is cropped at once; the probe's augmentation is crop and flip; random draws depend on
seed, step and sample only; what pads the surprise of shorter videos does not count.
"""

import copy
import csv
import functools
import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Callable

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset

import common
from common import OLD_EMA as EMA, OldBlock as Block, OldLog as Log, OldWorld as World, old_effective_rank as effective_rank, old_fail as fail, old_gather_tokens as gather_tokens, old_generator as generator

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag, and the comment beside it is its help text."""

    preset: str = ""  # a name of PRESETS; by default the one that fits --data
    data: str = "toy"  # toy; a folder of videos or images, also one of $DATA (default ./data); csv lists: a.csv,b.csv
    val: str = ""  # folder or csv of the validation videos, default val/ beside train/

    # model
    image_size: int = 32  # side of a frame as the network sees it, pixels
    frames: int = 16  # frames a clip
    patch: int = 8  # side of a tubelet, pixels
    tubelet: int = 2  # length of a tubelet, frames
    width: int = 64  # encoder width
    depth: int = 3  # encoder blocks
    heads: int = 4  # attention heads of the encoder
    predictor_width: int = 64  # predictor width
    predictor_depth: int = 2  # predictor blocks
    predictor_heads: int = 0  # attention heads of the predictor, 0 = as the encoder
    align: bool = True  # queries and keys of the predictor start equal, so places first look at places like them
    rope: bool = False  # rotary positions and SwiGLU, as the physics paper's models have them
    init_std: float = 0.02  # std of the initial weights
    target: str = "features"  # what is predicted: features of the target encoder, or pixels (the control)

    # clips
    step: int = 1  # every so many frames of the video
    fps: float = 0  # frames a second of a clip, by time stamps; 0 = every --step frames
    canvas: int = 0  # side of the square to which workers resize frames, pixels, 0 = 8/7 of the image size
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop, share of the frame
    crop_aspect: tuple[float, float] = (0.75, 1.35)  # width / height of the random crop
    flip: bool = False  # mirror half of the clips
    threads: int = 1  # decoding threads a video

    # masks
    masks: str = "multiblock,time"  # kinds: multiblock, causal, random, tube, time; each with a mask token of its own
    mask_blocks: tuple[int, ...] = (4,)  # multiblock and causal: blocks of each range
    mask_scales: tuple[float, ...] = (0.15,)  # area of a block of each range, share of the frame
    mask_aspect: tuple[float, float] = (0.75, 1.5)  # height / width of a block
    mask_ratio: float = 0.9  # random and tube: share of the tokens that is hidden
    causal_context: float = 0.75  # causal: only this first share of the clip can be context
    time_context: tuple[float, float] = (0.125, 0.75)  # time: context is the first of the clip, a share in this range
    group: int = 0  # consecutive samples whose masks are cut to one length, 0 = the batch (the paper: a GPU's share)

    # optimisation
    batch: int = 32  # clips a step, over all ranks
    accumulate: int = 1  # split a rank's share of the batch into this many forward passes
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps; wins over --epochs
    warmup: float = 0.06  # share of the run in which lr rises
    lr: float = 2e-3  # peak learning rate
    lr_start: float = 0.0  # learning rate of the first step
    lr_final: float = 1e-6  # learning rate at the end of the schedule
    weight_decay: float = 0.04  # AdamW weight decay at the start
    weight_decay_final: float = 0.04  # weight decay at the end (half a cosine)
    momentum: float = 0.99  # EMA momentum of the target encoder at the start
    momentum_final: float = 1.0  # EMA momentum at the end (linear)
    schedule_scale: float = 1.25  # schedules are this many times longer than the run (>= 1)
    clip: float = 10.0  # largest norm of the gradient, of encoder and of predictor, after the warmup; 0 = no limit

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/vjepa, runs/vjepa-2, ...
    resume: bool = False  # continue from last.pt in the run's folder, or start if there is none
    init: str = ""  # checkpoint to start from or to evaluate: ours, or an official .pth.tar
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between rows of log.jsonl
    device: str = ""  # cuda, mps or cpu, default the best there is
    precision: str = ""  # bf16, fp16 or fp32, default bf16 where the hardware computes in it, else fp32
    compile: bool = torch.cuda.is_available()  # torch.compile the networks
    shard: bool = False  # FSDP2 instead of DDP, for models that do not fit one GPU
    workers: int = -1  # data loading processes a rank, -1 = as fits the machine and the data
    max_bad: float = 0.01  # share of unreadable videos above which a run stops

    # evaluation
    eval: str = "physics,knn"  # comma-separated: physics, knn, probe, features; or none
    baselines: bool = True  # evaluate a randomly initialised network and raw pixels beside it
    eval_limit: int = 2000  # use at most this many training videos for knn, 0 = all
    eval_batch: int = 64  # clips or windows a forward pass in evaluation, a rank
    physics: str = "toy"  # toy, or a folder in the layout of IntPhys, GRASP (level2) or InfLevel-lab
    physics_count: int = 20  # toy: quadruplets a property
    physics_frames: int = 0  # frames a window, 0 = as the data set asks (toy: as the model)
    physics_step: int = 0  # every so many frames of the video, 0 = as the data set asks
    physics_contexts: tuple[int, ...] = ()  # frames of context, default as the data set asks
    normalize_context: bool = False  # layer norm on the context before the predictor (off in the paper)
    pixels: str = ""  # last.pt of a run with --target pixels, to be measured beside
    probe_init: str = ""  # attentive probe to evaluate instead of training one: an official probe checkpoint
    probe_epochs: int = 20  # passes of the attentive probe
    probe_batch: int = 64  # batch of the attentive probe, over all ranks
    probe_lr: float = 1e-3  # learning rate of the probe at the start (half a cosine to 0)
    probe_decay: float = 0.01  # weight decay of the probe at the start (half a cosine to 1e-6)
    probe_clips: int = 1  # clips of a video whose tokens the probe sees together
    probe_views: int = 1  # 1: the centre; 3: three squares along the longer side, averaged
    features_split: str = "val"  # train or val
    features_out: str = ""  # file of --eval features, default features.npz in the run's folder
    tokens: bool = False  # --eval features also writes all tokens


PAPER = dict(
    data="videomix2m", image_size=224, frames=16, step=4, patch=16, predictor_width=384, predictor_depth=12,
    init_std=0.02, masks="multiblock", mask_blocks=(8, 2), mask_scales=(0.15, 0.7), group=24, crop_scale=(0.3, 1.0),
    flip=True, batch=3072, steps=90_000, warmup=40 / 300, lr=6.25e-4, lr_start=2e-4, weight_decay_final=0.4,
    momentum=0.998, seed=234, log_every=50, eval="probe", eval_limit=0, probe_batch=256, probe_clips=8, probe_views=3,
    eval_batch=8, align=False,
)  # fmt: skip
LARGE = dict(width=1024, depth=24, heads=16)
HUGE = dict(width=1280, depth=32, heads=16)

# On one GPU. Not measured yet: the papers' recipe at the size of a ViT-S.
FOLDER = PAPER | dict(
    data="folder", width=384, depth=12, heads=6, predictor_width=192, predictor_depth=6, batch=96, steps=0, epochs=100,
    lr_start=1e-4, init_std=0.03, seed=0, eval="knn", eval_limit=20_000, probe_clips=1, probe_views=1, eval_batch=32,
)  # fmt: skip

PRESETS = {
    "toy": dict(steps=1000),  # the defaults of Config
    "folder": FOLDER,
    "vit_l16": PAPER | LARGE,
    "vit_h16": PAPER | HUGE,
    "vit_h16_384": PAPER | HUGE | dict(image_size=384, batch=2400, group=10),
    # the physics paper's variant; its training code is not public: the schedule here is the other paper's
    "vit_l16_rope": PAPER | LARGE | dict(data="howto100m", rope=True, fps=16 / 3, eval="physics"),
    "vit_h16_rope": PAPER | HUGE | dict(rope=True, fps=16 / 3, eval="physics"),
}
DATA_PRESETS = {"toy": "toy", "videomix2m": "vit_l16", "howto100m": "vit_l16_rope", "*": "folder"}
EVALUATIONS = ("physics", "knn", "probe", "features", "none")
KINDS = ("multiblock", "causal", "random", "tube", "time")


def check(config, world, training=True):
    """Refuse what cannot work, before any work (exit 2)."""
    c = config
    if c.image_size % c.patch:
        fail(f"--image-size {c.image_size} is not a multiple of --patch {c.patch}")
    if c.frames % c.tubelet or c.frames < 2 * c.tubelet:
        fail(f"--frames {c.frames} is not a multiple, at least twice, of --tubelet {c.tubelet}")
    for name, width, heads in (("", c.width, c.heads), ("predictor-", c.predictor_width, c.predictor_heads or c.heads)):
        if width % heads or width % 2:
            fail(f"--{name}width {width} must be a multiple of its heads, {heads}, and even")
        if c.rope and width // heads < 12:
            fail(f"--rope needs 12 channels a head; --{name}width {width} leaves {width // heads} to {heads} heads")
    choices = dict(target=("features", "pixels"), features_split=("train", "val"), probe_views=(1, 3),
                   precision=("", "bf16", "fp16", "fp32"))  # fmt: skip
    for name, known in choices.items():
        if getattr(c, name) not in known:
            words = ", ".join(str(k) for k in known if k)
            fail(f"--{name.replace('_', '-')} {getattr(c, name)!r} is not one of {words}")
    for flag, names, known in (("eval", c.eval, EVALUATIONS), ("masks", c.masks, KINDS)):
        for name in names.split(","):
            if name not in known:
                fail(f"--{flag} {name!r} is not one of {', '.join(known)}")
    if len(c.mask_blocks) != len(c.mask_scales):
        fail(f"--mask-blocks names {len(c.mask_blocks)} ranges and --mask-scales {len(c.mask_scales)}")
    if not training:
        return
    micro = micro_batch(c, world)
    if c.batch % (world.size * c.accumulate) or c.batch % (world.size * micro) or (c.group and c.batch % c.group):
        parts = f"{world.size} ranks x {c.accumulate} accumulations, in groups of {c.group or c.batch}"
        fail(f"--batch {c.batch} does not divide into {parts}")
    if c.group and c.group % micro:
        fail(f"--group {c.group} is no multiple of the {micro} clips a forward pass; change --accumulate or --group")
    tokens = math.prod(grid_of(c))
    for name, ratio in (("random", c.mask_ratio), ("tube", c.mask_ratio)):
        visible = int((tokens if name == "random" else tokens // grid_of(c)[0]) * (1 - ratio))
        if name in c.masks.split(",") and not 0 < visible < tokens:
            fail(f"--mask-ratio {ratio} leaves {visible} of {tokens} tokens visible")
    for scale in c.mask_scales if {"multiblock", "causal"} & set(c.masks.split(",")) else ():
        grid = grid_of(c)
        for size in {block_size(step, grid, (scale, scale), c.mask_aspect)[1:] for step in range(50)}:
            if 0 in size or size == grid[1:]:
                covers = "nothing" if 0 in size else "all"
                fail(f"--mask-scales {scale} of a grid of {grid[1]}x{grid[2]} tokens makes blocks that hide {covers}")
    if not 0 < c.time_context[0] <= c.time_context[1] < 1:
        fail(f"--time-context {c.time_context}: expected two shares of the clip between 0 and 1, in order")
    if c.schedule_scale < 1:
        fail(f"--schedule-scale {c.schedule_scale} is below 1: the schedules would end before the run does")
    if c.shard and c.precision == "fp16":
        fail("--shard works with bf16 and fp32, not with --precision fp16")


def micro_batch(config, world):
    """Images a forward pass: a rank's share split by --accumulate, and never from two groups."""
    return min(config.group or config.batch, max(1, config.batch // (world.size * config.accumulate)))


# ---------------------------------------------------------------------------------------------------------------------
# Masks: what is hidden of a clip (2404.08471, section 3.2)
# ---------------------------------------------------------------------------------------------------------------------


def grid_of(config):
    """Tokens of a clip along (time, rows, columns)."""
    return config.frames // config.tubelet, config.image_size // config.patch, config.image_size // config.patch


def mask_kinds(config):
    """[(name, blocks, scale)] of the kinds of masks; multiblock and causal make one of each range."""
    kinds = []
    for name in config.masks.split(","):
        ranges = zip(config.mask_blocks, config.mask_scales, strict=True)
        kinds += [(name, b, s) for b, s in ranges] if name in ("multiblock", "causal") else [(name, 0, 0.0)]
    return kinds


def block_size(step, grid, scale, aspect=(0.75, 1.5), temporal=(1.0, 1.0)):
    """(time, height, width) of a block in tokens: one size for the whole batch of a step, on all ranks.

    scale, temporal: range of a block's share of the frame and of the clip; aspect: range of height / width.
    """
    draws = torch.Generator().manual_seed(step)
    u = [torch.rand(1, generator=draws).item() for _ in range(3)]
    share, area, ratio = (low + x * (high - low) for x, (low, high) in zip(u, (temporal, scale, aspect), strict=True))
    area = int(grid[1] * grid[2] * area)
    height, width = min(grid[1], round(math.sqrt(area * ratio))), min(grid[2], round(math.sqrt(area / ratio)))
    return max(1, int(grid[0] * share)), height, width


def outside_blocks(uniform, size, grid, context=1.0):
    """Tokens that no block covers: uniform [B, blocks, 3] in [0, 1), places in (time, row, column) -> bool [B, N].

    context: only tokens of this first share of the clip can be outside (causal multi-block).
    """
    room = torch.tensor([g - s + 1 for g, s in zip(grid, size, strict=True)], device=uniform.device)
    corners = (uniform * room).long()
    inside = []
    for axis in range(3):
        line = torch.arange(grid[axis], device=uniform.device)
        corner = corners[..., axis, None]  # [B, blocks, 1]
        inside.append((line >= corner) & (line < corner + size[axis]))
    time, rows, columns = inside
    covered = (time[..., :, None, None] & rows[..., None, :, None] & columns[..., None, None, :]).any(1)  # [B, T, H, W]
    covered[:, max(1, int(grid[0] * context)) :] = True
    return ~covered.flatten(1)


def to_indices(blocks, length, keys=None):
    """bool [B, M, N] -> int64 [M, B, length], ascending: true entries of smallest keys [B, M, N], else the first."""
    if keys is None:
        keys = torch.arange(blocks.shape[-1], device=blocks.device).expand_as(blocks).double() / blocks.shape[-1]
    return (keys + ~blocks).argsort(dim=-1)[..., :length].sort(dim=-1).values.transpose(0, 1).contiguous()


def cut_masks(visible):
    """bool [B, N] -> int64 [1, B, K], [1, B, Kp]: indices of visible and of hidden tokens, each list cut to the
    shortest of the batch by keeping the first ones in raster order, as the released collator does."""
    pair = []
    for tokens in (visible, ~visible):
        pair.append(to_indices(tokens[:, None], int(tokens.sum(1).min())))
    return pair


def sample_masks(config, step, first=0, last=None, device="cpu"):
    """Masks of samples first..last of the global batch in this step, for all of them at once.

    Returns one list for each group of config.group samples that the range touches: [context, targets] of the first
    kind, then of the next, ..., int64 [1, B, K] and [1, B, Kp]. They depend on seed, step and index in the batch only.
    """
    grid, batch = grid_of(config), config.batch
    group, last = config.group or batch, batch if last is None else last
    low, high = first // group * group, -(-last // group) * group
    tokens, groups = math.prod(grid), [[] for _ in range((high - low) // group)]
    for i, (name, blocks, scale) in enumerate(mask_kinds(config)):
        draws = generator(config.seed, "masks", step, i, device=device)

        def uniform(*shape, draws=draws):
            """Of the whole batch, of which we keep our groups'."""
            return torch.rand(batch, *shape, generator=draws, dtype=torch.float64, device=device)[low:high]

        if name == "time":
            shortest, longest = (max(1, min(grid[0] - 1, int(grid[0] * share))) for share in config.time_context)
            steps = shortest + int(torch.rand(1, generator=draws, device=device).item() * (longest + 1 - shortest))
            visible = (torch.arange(tokens, device=device) < steps * grid[1] * grid[2]).expand(high - low, -1)
        elif name in ("random", "tube"):
            places = tokens if name == "random" else grid[1] * grid[2]
            rank = uniform(places).argsort(1).argsort(1)
            visible = (rank < int(places * (1 - config.mask_ratio))).repeat(1, tokens // places)
        else:
            size = block_size(step, grid, (scale, scale), config.mask_aspect)
            context = config.causal_context if name == "causal" else 1.0
            visible = torch.zeros(high - low, tokens, dtype=torch.bool, device=device)
            while not visible.any(1).all():  # what leaves no context is drawn again
                fresh = outside_blocks(uniform(blocks, 3), size, grid, context)
                visible = torch.where(visible.any(1, keepdim=True), visible, fresh)
        for masks, part in zip(groups, visible.split(group), strict=True):
            masks += cut_masks(part)
    return groups


def micro_batch_masks(config, step, first, last, world):
    """`sample_masks` for samples first..last, split into the micro-batches of a rank."""
    group, micro = config.group or config.batch, micro_batch(config, world)
    groups, masks = sample_masks(config, step, first, last), []
    for low in range(first, last, micro):
        rows = slice(low % group, low % group + micro)
        masks.append([m[:, rows].contiguous() for m in groups[low // group - first // group]])
    return masks


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def rotary_table(head_width, grid, device):
    """Cosine and signed sine [N, D/H] of each token's rotation, and which channel each one is paired with [D/H].

    A head's channels are three groups of a = head_width // 3, for time, row and column, whose interleaved pairs (2i,
    2i+1) turn by position * 10000^(-2i/a); what is left over stays as it is.
    """
    a = head_width // 3
    pairs = a // 2
    angles = torch.zeros(math.prod(grid), head_width)
    partner, sign = torch.arange(head_width), torch.ones(head_width)
    frequencies = 10000.0 ** (-2 * torch.arange(pairs) / a)
    for axis, positions in enumerate(np.mgrid[: grid[0], : grid[1], : grid[2]].reshape(3, -1)):
        even = axis * a + 2 * torch.arange(pairs)
        angles[:, even] = angles[:, even + 1] = torch.from_numpy(positions)[:, None] * frequencies
        partner[even], partner[even + 1], sign[even] = even + 1, even, -1.0
    return angles.cos().to(device), (angles.sin() * sign).to(device), partner.to(device)


class GatedMLP(nn.Module):
    """fc3(silu(fc1 x) * fc2 x), all of them with bias, hidden 4 D: the physics paper's SwiGLU."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(width, hidden)
        self.fc3 = nn.Linear(hidden, width)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class RotaryBlock(Block):
    """A `Block` whose queries and keys are turned by their place in the video, with a gated MLP."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.mlp = GatedMLP(width, 4 * width)

    def forward(self, x, rotation, queries=None):
        """x [B, N, D] -> [B, N, D], or [B, n, D] for the last n = queries tokens; rotation: see `rotate`."""
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, *rotation), rotate(k, *rotation)  # [B, H, N, D/H]
        if queries is not None:
            x, q = x[:, -queries:], q[:, :, -queries:]
        x = x + self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def rotate(x, cosine, sine, partner):
    """x [B, H, N, D/H], cosine and sine [N, D/H] or [B, 1, N, D/H], partner [D/H]: what `rotary_table` gives."""
    return (x * cosine + x[..., partner] * sine).to(x.dtype)


def interpolate_table(table, old, new):
    """Positions [1, N, D] of one (time, rows, columns) grid for another, trilinear, sampled by the given scale factors
    as the released code does. (Where a factor would make one row less, by rounding, the size decides.)"""
    if tuple(old) == tuple(new):
        return table
    cube = table.float().unflatten(1, tuple(old)).permute(0, 4, 1, 2, 3)
    factors = [n / o for n, o in zip(new, old, strict=True)]
    exact = all(math.floor(o * f) == n for o, n, f in zip(old, new, factors, strict=True))
    how = dict(scale_factor=factors) if exact else dict(size=tuple(new))
    return F.interpolate(cube, mode="trilinear", align_corners=False, **how).flatten(2).mT.to(table.dtype)


def place(table, own_grid, grid, head_width, keep=None, device=None):
    """Where tokens are -> (positions to add: [1, N, D], [B, K, D], or 0; keywords for the blocks).

    table: sine-cosine positions of own_grid, or None for rotary ones; keep: int64 [B, K], the tokens, or None for all.
    """
    if table is not None:
        table = interpolate_table(table, own_grid, grid)
        return (table if keep is None else table[0][keep]), {}
    cosine, sine, partner = rotary_table(head_width, tuple(grid), device)
    if keep is not None:
        cosine, sine = cosine[keep][:, None], sine[keep][:, None]  # [B, 1, K, D/H]
    return 0, {"rotation": (cosine, sine, partner)}


def make_table(width, grid, rope):
    """Fixed 3-D sine-cosine positions [1, N, D], a parameter since checkpoints have it; None with rotary ones."""
    return None if rope else nn.Parameter(common.old_sincos_3d(width, *grid).float()[None], requires_grad=False)


class Encoder(nn.Module):
    """Vision transformer on tubelets of a video: no class token, all tokens after the final norm."""

    def __init__(self, grid, patch, tubelet, width, depth, heads, rope=False):
        super().__init__()
        self.grid, self.width, self.heads, self.head_width = grid, width, heads, width // heads
        self.patch_embed = common.OldPatchEmbed(patch, width, tubelet=tubelet)
        self.pos_embed = make_table(width, grid, rope)
        self.blocks = nn.ModuleList(RotaryBlock(width, heads) if rope else Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, keep=None):
        """x: video [B, 3, T, H, W] of any size, or patches [B, N, P] of the model's own grid; keep int64 [B, K], tokens
        to run on -> [B, K, D], or all: [B, N, D]."""
        grid = self.grid
        if x.dim() > 3:
            grid = tuple(side // k for side, k in zip(x.shape[2:], self.patch_embed.kernel, strict=True))
            x = self.patch_embed.patchify(x)
        positions, rotation = place(self.pos_embed, self.grid, grid, self.head_width, keep, x.device)
        x = self.patch_embed(x if keep is None else gather_tokens(x, keep)) + positions
        for block in self.blocks:
            x = block(x, **rotation)
        return self.norm(x)


class Predictor(nn.Module):
    """A narrow transformer that fills in hidden tokens from the visible ones."""

    def __init__(self, grid, width, predictor_width, depth, heads, kinds, rope=False, out=None):
        super().__init__()
        self.grid, self.head_width = grid, predictor_width // heads
        self.predictor_embed = nn.Linear(width, predictor_width)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, predictor_width) for _ in range(kinds))
        self.predictor_pos_embed = make_table(predictor_width, grid, rope)
        kind = RotaryBlock if rope else Block
        self.predictor_blocks = nn.ModuleList(kind(predictor_width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(predictor_width, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_width, out or width)

    def forward(self, context, keep, asked, token=0):
        """context [B, K, D]: encoded tokens keep [B, K] -> predictions for tokens asked [B, Kp]: [B, Kp, D].

        token: which mask token stands for what is hidden, one for each kind of mask.
        """
        table, tokens = self.predictor_pos_embed, torch.cat([keep, asked], dim=1)
        positions, rotation = place(table, self.grid, self.grid, self.head_width, tokens, context.device)
        x = self.predictor_embed(context)
        x = torch.cat([x, self.mask_tokens[token].to(x.dtype).expand(*asked.shape, -1)], dim=1) + positions
        for block in self.predictor_blocks[:-1]:
            x = block(x, **rotation)  # [B, K + Kp, P]
        # only the queries are read, so the last block computes only them
        x = self.predictor_blocks[-1](x, queries=asked.shape[1], **rotation)
        return self.predictor_proj(self.predictor_norm(x))


class VJEPA(nn.Module):
    """Encoder and predictor, trained by gradient. The target encoder is an `Encoder` beside it, moved by EMA."""

    def __init__(self, config):
        super().__init__()
        c, grid = config, grid_of(config)
        self.encoder = Encoder(grid, c.patch, c.tubelet, c.width, c.depth, c.heads, c.rope)
        heads = c.predictor_heads or c.heads
        out = 3 * c.tubelet * c.patch**2 if c.target == "pixels" else c.width
        self.predictor = Predictor(
            grid, c.width, c.predictor_width, c.predictor_depth, heads, len(mask_kinds(c)), c.rope, out
        )
        self.apply(functools.partial(common.old_init_weights, std=c.init_std))
        if c.align:  # else short runs end on a plateau: the prediction is the scene's average, whatever is in its place
            for block in self.predictor.predictor_blocks:
                queries, keys, values = block.attn.qkv.weight.data.chunk(3)
                for part in (queries, values):
                    nn.init.normal_(part, std=c.predictor_width**-0.5)
                keys.copy_(queries)

    def forward(self, patches, masks, tokens=None, normalize_context=False):
        """Predictions [B, Kp, D] of each kind of mask, as a list.

        patches [B, N, P]; masks [context, targets, ...], [1, B, K] and [1, B, Kp], as `sample_masks` gives them;
        tokens: the mask token of each, default 0, 1, ...; normalize_context: layer norm before the predictor.
        """
        predictions = []
        for i, (keep, asked) in enumerate(zip(masks[::2], masks[1::2], strict=True)):
            context = self.encoder(patches, keep[0])
            if normalize_context:
                context = F.layer_norm(context, context.shape[-1:])
            predictions.append(self.predictor(context, keep[0], asked[0], i if tokens is None else tokens[i]))
        return predictions


def build(config):
    """A freshly initialised (model, target encoder); the target starts as a copy of the encoder."""
    torch.manual_seed(config.seed)
    model = VJEPA(config)
    return model, copy.deepcopy(model.encoder).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def pixel_targets(patches):
    """The control's target: normalised patches [B, N, 3*t*p*p] -> pixels in the order (t, row, column, colour), each
    colour of a tubelet brought to mean 0 and std 1."""
    std = torch.tensor(STD, device=patches.device)[:, None]
    pixels = patches.float().unflatten(2, (3, -1)) * std  # [B, N, 3, t*p*p]
    pixels = pixels - pixels[..., :1]  # exact where a tubelet is nearly flat; the mean of the whole does not matter
    pixels = (pixels - pixels.mean(3, keepdim=True)) / (pixels.std(3, keepdim=True) + 1e-6)
    return pixels.mT.flatten(2)


def gather_targets(tokens, masks, norm=True):
    """What to predict for each kind: tokens [B, N, D], masks as in `VJEPA.forward` -> a list of [B, Kp, D], with `norm`
    each token normalised (eps 1e-5, no affine)."""
    picked = [gather_tokens(tokens, asked).float() for asked in masks[1::2]]
    return [F.layer_norm(h, h.shape[-1:]) for h in picked] if norm else picked


def vjepa_loss(predictions, targets, exponent=1):
    """Mean over kinds of masks of the mean |prediction - target|^exponent / exponent: L1 on features."""
    errors = ((o.float() - h).abs() ** exponent for o, h in zip(predictions, targets, strict=True))
    return torch.stack([e.mean() / exponent for e in errors]).mean()


def prediction_spread(predictions):
    """How much predictions lack of a std of 1 over a clip's tokens, mean over clips and channels: near 1 if collapsed.

    The released code's (unused) regulariser: std over tokens, averaged over kinds, then relu(1 - std)."""
    stds = [(o.float().var(dim=1) + 1e-4).sqrt() for o in predictions]
    return F.relu(1 - torch.stack(stds).mean(0)).mean()


# ---------------------------------------------------------------------------------------------------------------------
# The toy world: scenes of which no frame, and no set of frames, says whether they are possible
# ---------------------------------------------------------------------------------------------------------------------

PROPERTIES = ("permanence", "continuity", "shape", "colour", "solidity", "gravity")
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ((220, 50, 50), (50, 110, 230), (240, 200, 40), (60, 180, 80), (170, 80, 200), (240, 240, 240))
SCREENS = ((90, 60, 40), (40, 80, 80), (80, 80, 110))
FLOOR = 27.0  # height of the floor line in a frame of 32 x 32, counted from the top


def smooth(p):
    """Eased phase: 0 to 1 with no jump in speed at either end."""
    return p * p * (3 - 2 * p)


class Scene:
    """One toy scene of a property. It has two visible states, 0 and 1; a frame depends on (state, event phase) only:

    ("state", s); ("change", p): the visible legal change from state 0 to 1 at phase p in (0, 1), which run backwards is
    that from 1 to 0; ("screen", s, h): screens up to the share h of their height, at h = 1 hiding every pixel that
    depends on the state; ("lift", p), in `gravity` alone: the legal way up from state 1 to 0.

    permanence: an object is there, or gone; it slides out of the picture. continuity: it is left, or right; it hops
    over the gap between two screens. shape, colour: two objects that differ in it; they cross in the open. solidity: an
    object left or right of a wall that sticks out above a wide screen; it hops over the wall. gravity: a block on a
    shelf, or on the floor; the shelf retracts and the block falls.
    """

    def __init__(self, name, seed, size=32):
        r = np.random.Generator(np.random.PCG64([PROPERTIES.index(name), *seed]))
        self.name, self.size, self.mirror, self.cache = name, size, bool(r.integers(2)), {}
        self.radius = r.uniform(3.2, 4.4)
        shapes, colours = r.permutation(4), r.permutation(6)
        self.shapes = [SHAPES[shapes[0]], SHAPES[shapes[int(name == "shape")]]]
        self.colours = [COLOURS[colours[0]], COLOURS[colours[int(name == "colour")]]]
        self.screen = SCREENS[r.integers(3)]
        line = (np.arange(size) + 0.5) * 32 / size
        self.x, self.y = (line if not self.mirror else 32 - line)[None, :], line[:, None]
        top, bottom, floor = r.uniform(70, 170, 3), r.uniform(70, 170, 3), r.uniform(40, 120, 3)
        sky = top + (bottom - top) * (self.y / 32)[..., None]
        self.background = np.where((self.y >= FLOOR)[..., None], floor, sky) + np.zeros((size, size, 3))
        self.middle = 16 + r.uniform(-3, 3)

    def frame(self, symbol):
        """uint8 [S, S, 3] of a symbol (see the class). The same symbol is the same bytes."""
        if symbol not in self.cache:
            self.cache[symbol] = self.draw(*symbol)
        return self.cache[symbol]

    def video(self, symbols):
        """uint8 [T, 3, S, S]."""
        return np.stack([self.frame(s) for s in symbols]).transpose(0, 3, 1, 2)

    def blend(self, canvas, box, colour, inside):
        """Paint within a box (left, top, right, bottom) where inside(x, y) > 0, with soft edges; pixels of 32 x 32."""
        k, (left, top, right, bottom) = self.size / 32, box
        left, right = (32 - right, 32 - left) if self.mirror else (left, right)
        rows, columns = (
            slice(max(0, int(a * k) - 1), max(0, int(b * k) + 2)) for a, b in ((top, bottom), (left, right))
        )
        cover = np.clip(inside(self.x[:, columns], self.y[rows]) * k + 0.5, 0, 1)[..., None]
        canvas[rows, columns] += cover * (np.array(colour) - canvas[rows, columns])

    def box(self, canvas, left, top, right, bottom, colour):
        """Paint a rectangle."""

        def inside(x, y):
            return np.minimum(np.minimum(x - left, right - x), np.minimum(y - top, bottom - y))

        self.blend(canvas, (left, top, right, bottom), colour, inside)

    def thing(self, canvas, which, x, y):
        """Paint object 0 or 1 with its centre at (x, y)."""
        r, shape = self.radius, self.shapes[which]

        def inside(u, v):
            u, v = np.abs(u - x), v - y
            if shape == "circle":
                return r - np.hypot(u, v)
            if shape == "square":
                return 0.85 * r - np.maximum(u, np.abs(v))
            if shape == "triangle":
                return np.minimum(0.75 * r - v, 0.857 * (0.6 * (v + r) - u))
            arm, v = 0.4 * r, np.abs(v)
            return np.maximum(np.minimum(r - u, arm - v), np.minimum(arm - u, r - v))

        self.blend(canvas, (x - r, y - r, x + r, y + r), self.colours[which], inside)

    def draw(self, kind, value, height=0.0):
        """Compose a frame: background, wall or shelf, objects, screens."""
        canvas, r = self.background.copy(), self.radius
        ground, left, right = FLOOR - r, 8.5, 23.5
        p = float(value) if kind != "screen" else float(value > 0)
        eased = smooth(p)
        if self.name == "gravity":
            self.draw_gravity(canvas, kind, p)
        elif self.name == "permanence":
            if p < 1:  # gone in state 1
                self.thing(canvas, 0, self.middle + eased * (32 + r + 2 - self.middle), ground)
        else:
            hop = 4 * eased * (1 - eased)
            if self.name == "solidity":
                self.box(canvas, 15, 13, 17, FLOOR, (30, 30, 30))
                over = 1 - (2 * eased - 1) ** 6  # up first, then across: it clears the wall
                self.thing(canvas, 0, left + eased * (right - left), ground - 17 * over)
            else:
                if self.name != "continuity":
                    self.thing(canvas, 1, right - eased * (right - left), ground)
                self.thing(canvas, 0, left + eased * (right - left), ground - hop * (2 * r + 2))
        if kind == "screen":
            centres = {"permanence": [self.middle], "solidity": [16.0]}.get(self.name, [left, right])
            half = 14.0 if self.name == "solidity" else r + 1.3
            base = FLOOR + 2
            for centre in centres:
                top = base - height * (base - (FLOOR - 2 * r - 1.5))
                self.box(canvas, centre - half, top, centre + half, base, self.screen)
        return (canvas + 0.5).astype(np.uint8)

    def draw_gravity(self, canvas, kind, p):
        """A block on a shelf that retracts to the side (change: phase 0 to 0.4), and falls; or a lift from below."""
        r, high, x = self.radius, 15.0, self.middle
        out, lift = smooth(min(1.0, p / 0.4)), 0.0  # how far the shelf is retracted
        y = high + (FLOOR - high) * max(0.0, (p - 0.4) / 0.6) ** 2  # of the block's foot
        if kind == "lift":  # p: 0 to 0.6 up, the shelf comes out beneath, then the lift sinks
            up, out = smooth(min(1.0, p / 0.6)), 1 - smooth(min(1.0, max(0.0, (p - 0.6) / 0.2)))
            y = FLOOR + (high - FLOOR) * up
            lift = up if p < 0.8 else 1 - smooth((p - 0.8) / 0.2)
        edge = x + r + 2
        self.box(canvas, -1, high, edge - out * (edge + 1), high + 2, (60, 60, 60))
        if lift > 0:
            self.box(canvas, x - 1.5, FLOOR + (high - FLOOR) * lift + 2 * (1 - lift), x + 1.5, FLOOR + 1, (20, 20, 20))
        self.thing(canvas, 0, x, y - r)


def change(start, frames, kind="change"):
    """The visible change out of state `start`, in so many frames."""
    phases = [(kind, (k + 1) / (frames + 1)) for k in range(frames)]
    return phases if start == 0 or kind == "lift" else phases[::-1]


def occlusion(before, after, rise, full):
    """Screens rise over state `before`, hide it for `full` frames, and sink over `after`."""
    heights = [(k + 1) / (rise + 1) for k in range(rise)]
    up = [("screen", before, h) for h in heights]
    # behind full screens the state cannot be seen: drawn as state 0 whatever it is
    return up + [("screen", 0, 1.0)] * full + [("screen", after, h) for h in heights[::-1]]


def quadruplet(scene):
    """Symbols of four videos made of the very same frames: [possible, impossible, possible, impossible].

    Two videos of a pair begin alike. What is impossible happens behind the screens, twice: state 0 rises, 1 sinks. All
    runs of at most full + 1 frames are the same in both pairs together, so only who remembers can tell. In `gravity` a
    block falls, or a lift (those of this world only ever go up) raises it; what is impossible is either one backwards.
    There a short memory will do; that one way is up and the other down, in either pair, keeps it balanced.
    """
    if scene.name == "gravity":
        fall = [("state", 0)] * 13 + change(0, 12) + [("state", 1)] * 13
        rise = [("state", 1)] * 13 + change(1, 12, "lift") + [("state", 0)] * 13
        return [fall, fall[::-1], rise, rise[::-1]]
    hold, rise, full, length = 4, 2, 4, 6  # frames: of rest, of a screen's rise, of its being up, of a change
    videos = []
    for a in (0, 1):
        b = 1 - a
        h, g = [("state", a)] * hold, [("state", b)] * hold
        possible = h + occlusion(a, a, rise, full) + h + change(a, length) + g + occlusion(b, b, rise, full) + g
        impossible = h + occlusion(a, b, rise, full) + g + change(b, length) + h + occlusion(a, b, rise, full) + g
        videos += [possible, impossible]
    return videos


def walk(scene, frames, r):
    """Symbols of a random legal stretch of a scene: hold, occlusion and change, in random order, of random lengths."""
    state, symbols, offset = int(r.integers(2)), [], int(r.integers(12))
    while len(symbols) < offset + frames:
        event = r.random()
        if event < 0.5:
            symbols += [("state", state)] * int(r.integers(2, 9))
        elif event < 0.88 and scene.name != "gravity":
            symbols += occlusion(state, state, int(r.integers(1, 4)), int(r.integers(1, 6)))
        elif scene.name == "gravity":
            symbols += change(state, int(r.integers(8, 15)), "lift" if state else "change")
            state = 1 - state
        else:
            symbols += change(state, int(r.integers(4, 9)))
            state = 1 - state
    return symbols[offset : offset + frames]


def toy_clip(split, index, config, key):
    """Clip of toy scene `index` ("train" or "val" scenes): a legal stretch drawn by `key` -> uint8 [T, 3, S, S]."""
    scene = Scene(PROPERTIES[index % 6], (["train", "val"].index(split), index), config.image_size)
    r = np.random.Generator(np.random.PCG64(generator(*key).initial_seed()))
    return scene.video(walk(scene, config.frames, r))


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
VIDEOS = {".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp"}
# What PyAV and PIL raise on broken files
UNREADABLE = (av.error.FFmpegError, OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError,
              Image.DecompressionBombError)  # fmt: skip


@dataclass
class Split:
    """N videos. labels: int64 [N], -1 where unknown; paths: relative to root; root None: the toy world's."""

    root: Path
    paths: list
    labels: torch.Tensor
    classes: list

    def __len__(self):
        return len(self.paths)

    def subset(self, indices):
        """The same with videos `indices` (int64 [n]) only."""
        return replace(self, paths=[self.paths[i] for i in indices.tolist()], labels=self.labels[indices])


def open_split(config, name):
    """The `train` or `val` Split of --data; None where there is no `val`. Exits with 2 if there are no videos."""
    if config.data == "toy":
        count = {"train": 24_000, "val": 600}[name]
        return Split(None, [f"{name}/{i:05d}" for i in range(count)], torch.arange(count) % 6, list(PROPERTIES))
    source = config.val if name == "val" and config.val else config.data
    if source.endswith(".csv"):
        return None if name == "val" and not config.val else read_lists(source)
    root = Path(source).expanduser()
    if not root.exists() and "/" not in source:
        root = Path(os.environ.get("DATA", "data")) / source
    if not root.is_dir():
        expected = "a folder with train/CLASS/*.mp4 and val/CLASS/*.mp4, any folder of videos, or a csv of `path label`"
        fail(f"no data at {root}: expected {expected}")
    folder = root / name if (root / "train").is_dir() and source == config.data else root
    if name == "val" and not config.val and (folder == root or not folder.is_dir()):
        return None
    known = VIDEOS | IMAGES
    paths = sorted(p.relative_to(root).as_posix() for p in folder.rglob("*") if p.suffix.lower() in known)
    if not paths:
        fail(f"no videos or images in {folder}: looked for {', '.join(sorted(known))} in it and in its subfolders")
    depth = len(folder.relative_to(root).parts)  # CLASS is the first folder below
    if folder == root and source == config.data or any(p.count("/") <= depth for p in paths):
        return Split(root, paths, torch.full((len(paths),), -1), [])
    names = [p.split("/")[depth] for p in paths]
    number = {c: i for i, c in enumerate(sorted(set(names)))}
    return Split(root, paths, torch.tensor([number[n] for n in names]), list(number))


def read_lists(source):
    """A Split of csv lists `a.csv,b.csv`: a line is a path and, after a space, an integer label (or none)."""
    paths, labels = [], []
    for name in source.split(","):
        file = Path(name).expanduser()
        if not file.is_file():
            fail(f"no data at {file}: expected a csv without header, one `path label` a line")
        for line in filter(None, map(str.strip, file.read_text().splitlines())):
            path, _, label = line.rpartition(" ")
            if not path or not label.lstrip("-").isdigit():
                path, label = line, -1
            paths.append(str(file.parent / path))
            labels.append(int(label))
    if not paths:
        fail(f"no videos in {source}: expected one `path label` a line")
    labels = torch.tensor(labels)
    known = bool((labels >= 0).all())
    return Split(Path("."), paths, labels, [str(i) for i in range(int(labels.max()) + 1)] if known else [])


def clip_indices(length, frames, step, clips=1, overlap=False, draw=None):
    """Which frames of a video of `length` make up its clips -> int64 [clips, frames]: the released sampler.

    One clip from each of `clips` equal parts, ending where draw(low, high) says, low <= . < high, or first in its part.
    A part that is too short repeats its last frame, or, with `overlap`, clips overlap. Between first and last frame
    indices are evenly spaced with both ends included, so steps are a little longer than `step`.
    """
    part, span, rows = length // clips, frames * step, []
    for i in range(clips):
        shift = i * part
        if part > span:
            end = span if draw is None else int(draw(span, part))
            start = end - span
            row = np.linspace(start, end, frames).clip(start, end - 1)
        elif not overlap:
            row = np.linspace(0, part, part // step)
            row = np.concatenate([row, np.full(frames - part // step, part)]).clip(0, max(0, part - 1))
        else:
            last = min(span, length) - 1
            row = np.linspace(0, last, last // step)
            row = np.concatenate([row, np.full(frames - last // step, last)]).clip(0, max(0, last - 1))
            shift = i * ((length - span) // (clips - 1)) if length > span and clips > 1 else 0
        rows.append(row.astype(np.int64) + shift)
    return np.stack(rows)


def at_rate(times, fps):
    """Frames that are shown at a steady rate, by time stamps [N] in seconds -> int64 [n]: right for variable rates."""
    wanted = times[0] + np.arange(max(1, math.floor((times[-1] - times[0]) * fps + 1e-6) + 1)) / fps
    return np.searchsorted((times[1:] + times[:-1]) / 2, wanted, side="right")


def random_generator(*key):
    """Python's random numbers, seeded by a key."""
    return random.Random(generator(*key).initial_seed())


def clip_chooser(config, clips=1, overlap=False, draws=None):
    """choose(times [N]) -> int64 [clips, T] for `read_frames`, by --frames, --step or --fps; draws: a random.Random."""

    def choose(times):
        shown = at_rate(times, config.fps) if config.fps else np.arange(len(times))
        draw = None if draws is None else draws.randrange
        return shown[clip_indices(len(shown), config.frames, 1 if config.fps else config.step, clips, overlap, draw)]

    return choose


def read_frames(path, choose, size=None, threads=1):
    """Decode the frames that choose(times [N] in seconds) -> int64 [...] asks for -> (uint8 [..., 3, H, W], (H, W)).

    size: (H, W) to which frames are brought as they are converted, None = as in the file; the second result is the
    file's. An image is a video of one frame. Frames are counted by the time stamps of the packets, in order of showing;
    only what lies between the last key frame before a wanted frame and that frame is decoded, once for all clips.
    Raises one of UNREADABLE if a frame cannot be decoded.
    """
    if Path(path).suffix.lower() in IMAGES:
        with Image.open(path) as image:
            rgb = to_rgb(image)
        indices, shape = np.asarray(choose(np.zeros(1))), (rgb.height, rgb.width)
        if size:
            rgb = rgb.resize(size[::-1], Image.BILINEAR, reducing_gap=2.0)
        pixels = np.array(rgb).transpose(2, 0, 1)
        return torch.from_numpy(np.broadcast_to(pixels, (*indices.shape, *pixels.shape)).copy()), shape
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
        if not packets:
            raise ValueError("no frames")
        stamps = sorted(pts for pts, _ in packets if pts is not None)
        exact = len(stamps) == len(packets) and len(set(stamps)) == len(stamps)
        rate = float(stream.average_rate or 25)
        times = np.array(stamps) * float(stream.time_base) if exact else np.arange(len(packets)) / rate
        indices = np.asarray(choose(times))
        wanted, places = np.unique(indices, return_inverse=True)
        found, shape = {}, None
        if exact:
            keys = sorted(pts for pts, key in packets if key)
            found = decode_stamps(container, stream, [stamps[i] for i in wanted], stamps, keys, size)
            found = {i: found[stamps[i]] for i in wanted if stamps[i] in found}
        if len(found) < len(wanted):  # time stamps that packets and frames do not share: count frames from the start
            found = {}
            container.seek(stamps[0] if stamps else 0, stream=stream)
            for i, frame in enumerate(container.decode(stream)):
                if i in wanted:
                    found[i] = to_array(frame, size)
                if i >= wanted[-1]:
                    break
        lost = [int(i) for i in wanted if i not in found]
        if lost:
            raise ValueError(f"frame {lost[0]} of {len(packets)} cannot be decoded")
        shape = found[int(wanted[0])][1]
        pixels = np.stack([found[int(i)][0] for i in wanted])[places.reshape(indices.shape)]
        return torch.from_numpy(pixels), shape


def decode_stamps(container, stream, wanted, stamps, keys, size):
    """Decode frames by time stamp: wanted, stamps, keys ascending -> {stamp: `to_array` of the frame}.

    Seeks only where that leaves out a key frame. Decoders may emit frames out of order, so a frame counts as missing
    only when one that is shown 32 frames after the last of its run has come.
    """
    segment = np.searchsorted(keys, wanted, side="right")
    runs = np.split(np.array(wanted), 1 + np.flatnonzero(np.diff(segment) > 1))
    found = {}
    for run in runs:
        missing = {int(pts) for pts in run}
        limit = stamps[min(len(stamps) - 1, int(np.searchsorted(stamps, run[-1])) + 32)]
        container.seek(int(run[0]), stream=stream)
        for frame in container.decode(stream):
            if frame.pts in missing:
                missing.discard(frame.pts)
                found[frame.pts] = to_array(frame, size)
            if not missing or (frame.pts is not None and frame.pts > limit):
                break
    return found


def to_array(frame, size=None):
    """A decoded frame -> (uint8 [3, H, W], turned upright as its metadata say; (H, W) of the file, upright)."""
    turns = round(frame.rotation / 90) % 4
    shape = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    if size is not None:
        height, width = size[::-1] if turns % 2 else size
        frame = frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR")
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns).transpose(2, 0, 1)), shape


def to_rgb(image):
    """Any PIL image -> upright RGB: turned as EXIF says, 16 bits scaled to 8, palette, grey and CMYK converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def centre_crop(height, width, aspect):
    """(top, left, height, width) of the largest central part whose width / height lies in the range `aspect`."""
    h, w = height, width
    if width / height < aspect[0]:
        h = round(width / aspect[0])
    elif width / height > aspect[1]:
        w = round(height * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(height, width, scale, aspect, draws):
    """A random part of a frame -> (top, left, height, width), in the released order of draws (a random.Random)."""
    for _ in range(10):
        area = height * width * draws.uniform(*scale)
        ratio = math.exp(draws.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            top = draws.randint(0, height - h)
            return top, draws.randint(0, width - w), h, w
    return centre_crop(height, width, aspect)


def centre_box(width, height, size):
    """The part evaluation sees: shorter side to size*256/224, central square of `size`; size x size stays whole."""
    side = size if (width, height) == (size, size) else min(width, height) * size / int(size * 256 / 224)
    return (height - side) / 2, (width - side) / 2, side, side


def side_boxes(width, height):
    """Three squares along the longer side, (top, left, height, width) each: its start, middle and end."""
    side = min(width, height)
    step = (max(width, height) - side) // 2
    return [(0, i * step, side, side) if width >= height else (i * step, 0, side, side) for i in range(3)]


def bilinear_weights(start, length, size_in, size_out):
    """Bilinear, not antialiased, sampling of [start, start + length), tensors [B]: matrices [B, size_out, size_in]."""
    centre = (torch.arange(size_out, device=start.device) + 0.5) / size_out
    x = (start[:, None] + centre * length[:, None] - 0.5).clamp(min=start[:, None], max=(start + length - 1)[:, None])
    pixel = torch.arange(size_in, device=start.device)
    return (1 - (x[..., None] - pixel).abs()).clamp(min=0)


def crop_resize(clips, boxes, size, flip=None):
    """Crop and resize a batch of clips, all frames of one alike, in two matrix products.

    clips [B, T, 3, H, W] -> float [B, T, 3, size, size]; boxes: float [B, 4] (top, left, height, width), pixels; flip:
    bool [B], mirrored.
    """
    top, left, height, width = boxes.unbind(1)
    rows = bilinear_weights(top, height, clips.shape[3], size)
    columns = bilinear_weights(left, width, clips.shape[4], size)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    wide = clips.float().flatten(1, 3) @ columns.mT  # [B, T*3*H, size]
    tall = wide.unflatten(1, (-1, clips.shape[3])).mT.flatten(1, 2) @ rows.mT  # [B, T*3*size, size], lying
    return tall.unflatten(1, (*clips.shape[1:3], size)).mT


def normalize(images):
    """0..255 -> the networks' range, by ImageNet's mean and std: [B, 3, H, W]."""
    mean, std = (common.old_constant(v, images.device)[:, None, None] * 255 for v in (MEAN, STD))
    return (images.float() - mean) / std


class Clips(Dataset):
    """Item t: this rank's share of the batch of step t, a function of (seed, t): workers and resuming change nothing.

    A dict of `indices` int64 [b]; `pixels` uint8 [b, C, T, 3, s, s], the C clips of each video on a square canvas;
    `boxes` float [b, 4], the crop there; `flip` bool [b]; `masks`, a list a micro-batch; `bad`, unreadable files.
    """

    def __init__(self, split, config, world, batch, clips=1, purpose="train"):
        self.split, self.config, self.world, self.batch = split, config, world, batch
        self.clips, self.purpose = clips, purpose
        self.canvas = config.image_size if split.root is None else config.canvas or config.image_size * 8 // 7

    @functools.lru_cache(maxsize=2)  # noqa: B019  lives as long as its loader
    def order(self, epoch):
        """The order of the videos in an epoch."""
        return torch.randperm(len(self.split), generator=generator(self.config.seed, self.purpose, "order", epoch))

    def __getitem__(self, step):
        key, n = (self.config.seed, self.purpose, step), len(self.split)
        start, end = step * self.batch, (step + 1) * self.batch
        order = torch.cat([self.order(epoch) for epoch in range(start // n, (end - 1) // n + 1)])
        indices = order[start % n : start % n + self.batch]  # of the global batch
        first, last = (r * self.batch // self.world.size for r in (self.world.rank, self.world.rank + 1))
        item = {"bad": []}
        read = [self.read(int(indices[i]), (*key, "clip", i), item["bad"]) for i in range(first, last)]
        pixels, boxes, used = zip(*read, strict=True)
        item |= {"pixels": torch.stack(pixels), "boxes": torch.tensor(boxes).float(), "indices": torch.tensor(used)}
        if self.config.flip:
            item["flip"] = (torch.rand(self.batch, generator=generator(*key, "flip")) < 0.5)[first:last]
        if self.purpose == "train":
            item["masks"] = micro_batch_masks(self.config, step, first, last, self.world)
        return item

    def read(self, index, key, bad):
        """Clips of video `index` and its crop -> (pixels, box, index); an unreadable one goes to `bad`, and the next
        one replaces it."""
        c, side = self.config, self.canvas
        for now in (i % len(self.split) for i in range(index, index + 100)):
            if self.split.root is None:
                name, number = self.split.paths[now].split("/")
                clips = [torch.from_numpy(toy_clip(name, int(number), c, (*key, i))) for i in range(self.clips)]
                pixels, height, width = torch.stack(clips), side, side
            else:
                path = self.split.root / self.split.paths[now]
                choose = clip_chooser(c, self.clips, self.clips > 1, random_generator(*key, "frames"))
                try:
                    pixels, (height, width) = read_frames(path, choose, (side, side), c.threads)
                except UNREADABLE as error:
                    bad.append(f"{path}: {error}")
                    continue
            box = random_crop(height, width, c.crop_scale, c.crop_aspect, random_generator(*key, "crop"))
            scale = (side / height, side / width) * 2
            return pixels, [b * s for b, s in zip(box, scale, strict=True)], now
        fail(f"100 videos in a row could not be read, {path} the last of them")


class EvalClips(Dataset):
    """Item i: (uint8 [V, C, T, 3, S, S], error or '') of video i under the evaluation transform: C clips, not random,
    seen in V = 1 view (shorter side to size*256/224, central square) or 3 (squares along the longer side)."""

    def __init__(self, split, config, clips=1, views=1):
        self.split, self.config, self.clips, self.views = split, config, clips, views

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        c, size = self.config, self.config.image_size
        if self.split.root is None:
            name, number = self.split.paths[index].split("/")
            keys = [("toy", name, index, i) for i in range(self.clips)]
            pixels = np.stack([toy_clip(name, int(number), c, key) for key in keys])
            return torch.from_numpy(pixels)[None].expand(self.views, -1, -1, -1, -1, -1), ""
        path = self.split.root / self.split.paths[index]
        try:
            pixels, (height, width) = read_frames(path, clip_chooser(c, self.clips, True), threads=c.threads)
        except UNREADABLE as error:
            return torch.zeros(self.views, self.clips, c.frames, 3, size, size, dtype=torch.uint8), f"{path}: {error}"
        boxes = side_boxes(width, height) if self.views == 3 else [centre_box(width, height, size)]
        views = [crop_resize(pixels, torch.tensor([box]).float().expand(len(pixels), -1), size) for box in boxes]
        return (torch.stack(views) + 0.5).byte(), ""


def make_loader(batches, steps, config, world):
    """Iterate over `batches` for these steps, ahead of time in worker processes where that helps."""
    workers = common.old_worker_count(config, world, streaming=batches.split.root is not None)
    options = dict(pin_memory=world.device.type == "cuda", worker_init_fn=common.old_ignore_signals)
    return iter(DataLoader(batches, None, sampler=steps, num_workers=workers, **options))


def make_clips(item, size, device):
    """A loader's item -> normalised clips float [b * C, 3, T, S, S] on the device."""
    pixels, boxes = (item[k].to(device, non_blocking=True) for k in ("pixels", "boxes"))
    flip, count = item["flip"].to(device, non_blocking=True) if "flip" in item else None, pixels.shape[1]
    boxes = boxes.repeat_interleave(count, 0)
    flip = None if flip is None else flip.repeat_interleave(count)
    return normalize(crop_resize(pixels.flatten(0, 1), boxes, size, flip)).transpose(1, 2)


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
    pixels = config.target == "pixels"
    model, target = model.to(device), target.to(device)
    if config.compile:
        model.compile(dynamic=True)  # the numbers of tokens change from step to step
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
    loader = make_loader(Clips(split, config, world, config.batch), range(start, steps), config, world)
    parts_of_model = [[p for p in m.parameters() if p.requires_grad] for m in (plain.encoder, plain.predictor)]
    log = Log(out, world, steps, start)
    log.catch_signals()
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (plain.encoder, plain.predictor)]
    log.say(
        f"{out}: {len(split)} videos, steps {start} to {steps} of {config.batch} on {world.size} x {device.type} in "
        f"{str(dtype)[6:]}; encoder {millions[0]:.2f} M, predictor {millions[1]:.2f} M parameters"
    )
    waited, window, since = 0.0, start, time.monotonic()
    for step in range(start, steps):
        tick = time.monotonic()
        item = next(loader)
        clips = make_clips(item, config.image_size, device)
        waited += time.monotonic() - tick
        log.skip(item["bad"], len(split), config.max_bad)
        lr, decay, momentum = schedules(config, step, steps)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay if group["decay"] else 0.0

        patches = plain.encoder.patch_embed.patchify(clips)  # [b, N, 3*t*p*p], once for both encoders
        loss, parts = torch.zeros((), device=device), len(item["masks"])
        for i, (part, masks) in enumerate(zip(patches.chunk(parts), item["masks"], strict=True)):
            masks = [m.to(device, non_blocking=True) for m in masks]
            autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
            with common.old_no_sync(model, last=i == parts - 1), autocast:
                with torch.no_grad():
                    tokens = pixel_targets(part) if pixels else target(part)
                    targets = gather_targets(tokens, masks, norm=not pixels)
                predictions = model(part, masks)
                part_loss = vjepa_loss(predictions, targets, 2 if pixels else 1) / parts
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()

        scaler.unscale_(optimizer)
        norms = [common.old_gradient_norm(parameters) for parameters in parts_of_model]
        loss, norm = common.old_mean_over_ranks(loss), torch.stack(norms).norm()
        if config.clip and step >= config.warmup * steps:
            for parameters, part_norm in zip(parts_of_model, norms, strict=True):
                nn.utils.clip_grads_with_norm_(parameters, config.clip, part_norm)
        applied = (loss + norm).isfinite()  # a tensor on the device, the same on all ranks
        # with fp16's loss scaling, gradients overflow now and then by design: there only the loss counts
        bad = ~(loss.isfinite() if scaler.is_enabled() else applied)
        streak = torch.where(streak >= 3, streak, (streak + 1) * bad)
        if not scaler.is_enabled():
            optimizer.found_inf = (~applied).float()  # the fused kernel then leaves weights and moments as they are
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # the control has no target of its own: there it is the encoder
        ema.update(0.0 if pixels else momentum, applied)

        done = step + 1
        stopping = log.stop and world.size == 1
        if done % config.log_every == 0 or done == steps or stopping:
            features, pooled = tokens.float(), tokens.float().mean(1)
            numbers = [loss, norm, streak, features.std(1).mean(), effective_rank(pooled)]  # std over a clip's tokens
            numbers = torch.stack([*numbers, prediction_spread(predictions).detach()])
            loss_now, norm_now, bad_steps, std, rank, spread = numbers.tolist()  # the only host-device sync
            stopping = log.agree(log.stop)
            now = time.monotonic()
            row = dict(loss=loss_now, lr=lr, clips_per_s=config.batch * (done - window) / (now - since))
            row["data_wait"] = waited / (now - since)
            waited, window, since = 0.0, done, now
            log.progress(done, **row)
            row |= dict(weight_decay=decay, momentum=momentum, gradient_norm=norm_now, feature_std=std)
            row |= dict(feature_rank=rank, prediction_spread=spread, memory_gib=common.old_memory_gib(device))
            row |= dict(context=[m.shape[-1] for m in masks[::2]], target=[m.shape[-1] for m in masks[1::2]])
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


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: intuitive physics, by violation of expectation (2502.11831)
# ---------------------------------------------------------------------------------------------------------------------

# property of a data set: the categories that its score counts for
CATEGORIES = {
    "O1": ("permanence",), "O2": ("shape",), "O3": ("continuity",),
    "Collision": ("collision",), "Continuity": ("continuity",), "Gravity": ("gravity",), "Inertia": ("inertia",),
    "GravityContinuity": ("gravity", "continuity"), "GravityInertia": ("gravity", "inertia"),
    "GravitySupport": ("gravity", "support"), "ObjectPermanence": ("permanence",),
    "SolidityContinuity": ("solidity", "continuity"), "Unchangeableness": ("colour",),
}  # fmt: skip
# frames a window, every so many frames, context lengths, range of width / height that is not cut to a square
PROTOCOLS = {
    "intphys": (16, 2, (2, 4, 6, 8, 10), (1.0, 1.0)),
    "grasp": (16, 10, (2, 4, 6, 8, 10), (1.0, 1.0)),
    "inflevel": (32, 5, (4, 8, 12, 16, 20), (0.5, 2.0)),
    "toy": (0, 1, (4, 6, 8, 10), (1.0, 1.0)),
}


@dataclass
class Trial:
    """Videos that are compared: name of the property; labels: possible (1) or not (0), None where unknown; load() ->
    their frames, each uint8 [T, 3, H, W]; quadruple: four to be paired by when they part, else pairs as they come."""

    name: str
    titles: list
    labels: list
    load: Callable
    quadruple: bool = False


@dataclass
class Measured:
    """Surprise of one property's videos: losses float64 [rows, K, W], nan where a video has no window; labels [rows];
    rows of either label are in the order of the pairs; titles [rows]; contexts: K frames."""

    losses: np.ndarray
    labels: np.ndarray
    titles: list
    contexts: tuple


def protocol(config):
    """(name, frames a window, every so many frames, contexts, aspect) of --physics: by its layout, flags win."""
    name, root = "toy", Path(config.physics).expanduser()
    if config.physics != "toy":
        if not root.is_dir():
            fail(f"no data at {root}: --physics takes toy, or a folder of IntPhys, GRASP (level2) or InfLevel-lab")
        inside = {p.name for p in root.iterdir()}
        if {"dev", "test"} & inside or {"O1", "O2", "O3"} & inside:
            name = "intphys"
        elif "level2" in inside or any(n.startswith("IP_") for n in inside):
            name = "grasp"
        elif {"continuity", "solidity", "gravity"} & inside:
            name = "inflevel"
        else:
            layouts = (
                "dev/O1/01/1/scene/*.png (IntPhys), P_NAME/ and IP_NAME/ (GRASP level2), continuity/*.mp4 (InfLevel)"
            )
            fail(f"{root} has no layout that --physics knows: {layouts}")
    frames, step, contexts, aspect = PROTOCOLS[name]
    if name == "toy":
        contexts = tuple(c for c in contexts if c % config.tubelet == 0 and c < config.frames) or (config.frames // 2,)
    frames, step = config.physics_frames or frames or config.frames, config.physics_step or step
    contexts = config.physics_contexts or contexts
    if frames % config.tubelet or any(c % config.tubelet or not 0 < c < frames for c in contexts):
        lengths = f"--physics-contexts {' '.join(map(str, contexts))} in a window of {frames} frames (--physics-frames)"
        fail(f"{lengths}: all must be multiples of the tubelet, {config.tubelet}, and contexts shorter than the window")
    return name, frames, step, contexts, aspect


def find_trials(config):
    """The Trials of --physics. Exits with 2 if there are none."""
    name, _, step, _, _ = protocol(config)
    root = Path(config.physics).expanduser()
    trials = {"toy": toy_trials, "intphys": intphys_trials, "grasp": grasp_trials, "inflevel": inflevel_trials}[name](
        config, root, step
    )
    if not trials:
        fail(f"no videos in {root}: it looks like {name}, but nothing in it could be paired")
    return trials


def toy_trials(config, root, step):
    """Quadruplets of the toy world, of scenes that training never saw."""

    def load(name, number):
        scene = Scene(name, (2, number), config.image_size)
        return [torch.from_numpy(scene.video(symbols)[::step]) for symbols in quadruplet(scene)]

    return [
        Trial(name, [f"{name}/{i}/{k}" for k in range(4)], [1, 0, 1, 0], functools.partial(load, name, i))
        for name in PROPERTIES
        for i in range(config.physics_count)
    ]


def read_all(path, step, config, first=0):
    """Every step-th frame of a video, from number `first` on: uint8 [T, 3, H, W]."""

    def choose(times):
        return np.arange(min(first, len(times) - 1), len(times), step)

    return read_frames(path, choose, threads=config.threads)[0]


def read_pictures(folder, step):
    """Every step-th of a folder's pictures, the last left out where it would be one too many: uint8 [T, 3, H, W]."""
    paths = sorted(folder.glob("*.png"), key=lambda p: (len(p.name), p.name)) or sorted(folder.glob("*.jpg"))
    count = (len(paths) - 1) // step
    if not count:
        raise ValueError("no pictures, or too few")
    return torch.cat([read_frames(p, lambda _: np.zeros(1, np.int64))[0] for p in paths[: count * step : step]])


def intphys_trials(config, root, step):
    """IntPhys: dev/O1/SCENE/{1..4}/scene/*.png with status.json, or without labels test/O1/...: quadruplets."""
    base = next((root / part for part in ("dev", "test") if (root / part).is_dir()), root)
    trials = []
    for scene in sorted(p for block in ("O1", "O2", "O3") for p in (base / block).glob("*") if p.is_dir()):
        parts = sorted(p for p in scene.iterdir() if (p / "scene").is_dir())
        if len(parts) != 4:
            continue
        labels = [None] * 4
        if all((p / "status.json").is_file() for p in parts):
            headers = [json.loads((p / "status.json").read_text())["header"] for p in parts]
            labels = [int(header["is_possible"]) for header in headers]

        def load(parts=parts):
            return [read_pictures(p / "scene", step) for p in parts]

        titles = [p.relative_to(base).as_posix() for p in parts]
        trials.append(Trial(scene.parent.name, titles, labels, load, quadruple=labels[0] is not None))
    return trials


def grasp_trials(config, root, step):
    """GRASP level 2: P_PROPERTY/*.mp4 and IP_PROPERTY/*.mp4; the same file names make a pair."""
    base, trials = root / "level2" if (root / "level2").is_dir() else root, []
    for possible in sorted(p for folder in base.glob("P_*") for p in folder.glob("*.mp4")):
        impossible = base / f"I{possible.parent.name}" / possible.name
        if impossible.is_file():
            pair = (possible, impossible)
            load = functools.partial(lambda pair: [read_all(p, step, config) for p in pair], pair)
            titles = [p.relative_to(base).as_posix() for p in pair]
            trials.append(Trial(possible.parent.name[2:], titles, [1, 0], load))
    return trials


def inflevel_trials(config, root, step):
    """InfLevel-lab: PROPERTY/*.mp4 with a csv of pairs and priming times; without it, pairs by name, and no priming.

    Frames after the priming count; where one video has more of them, its first ones are dropped, so both end together.
    """
    trials = []
    for name in ("continuity", "solidity", "gravity"):
        folder, pairs = root / name, []
        lists = sorted([*folder.glob("*.csv"), *root.glob(f"*{name}*.csv")])
        if lists:
            with open(lists[0], newline="") as file:
                for row in csv.DictReader(file, skipinitialspace=True):
                    ends = [int(float(row[f"vid{i}_end_priming_2"] or -1)) + 1 for i in (1, 2)]
                    paths = [Path(row[f"vid{i}_path"]) for i in (1, 2)]
                    found = [next((q for q in (root / p, folder / p.name) if q.is_file()), None) for p in paths]
                    if None not in found:
                        pairs.append((found, ends))
        else:
            if folder.is_dir():
                print(
                    f"{folder}: no csv, so pairs are made by name and whole videos count, priming included", flush=True
                )
            kinds = (("vv", "vi"), ("ii", "iv")) if name == "continuity" else (("ui", "uv"), ("ci", "cv"))
            for path in sorted(folder.glob("*.mp4")):
                fields = path.stem.split("__")
                for possible, impossible in kinds:
                    if len(fields) > 4 and fields[4] == possible:
                        other = folder / ("__".join([*fields[:4], impossible, *fields[5:]]) + ".mp4")
                        pairs += [([path, other], [0, 0])] if other.is_file() else []

        def load(paths, starts):
            videos = [read_all(p, 1, config, s) for p, s in zip(paths, starts, strict=True)]
            shortest = min(map(len, videos))
            return [v[len(v) - shortest :][::step] for v in videos]

        for paths, starts in pairs:
            titles = [p.relative_to(root).as_posix() for p in paths]
            trials.append(Trial(name, titles, [1, 0], functools.partial(load, paths, starts)))
    return trials


def match_quadruplet(videos):
    """Pairs of a quadruplet, frames [T, ...] each: the first video and the one that parts from it last, and the others.

    Returns ([[0, j], [k, l]], first frame in which videos 1, 2, 3 differ from video 0).
    """
    first = torch.as_tensor(videos[0]).float()
    parting = []
    for other in videos[1:]:
        n = min(len(first), len(other))
        differs = (first[:n] - torch.as_tensor(other)[:n].float()).abs().flatten(1).sum(1) > 0
        parting.append(int(differs.float().argmax()) if differs.any() else n)
    partner = 1 + int(np.argmax(parting))
    return [[0, partner], [i for i in (1, 2, 3) if i != partner]], parting


@torch.no_grad()
def surprise(model, target, windows, contexts, patch, tubelet, token=0, normalize_context=False):
    """Prediction error of the future given the first frames: windows [W, 3, T, S, S] (normalised), contexts K frame
    counts -> [K, W]. The target encoder sees the whole window; one that is None: pixels are predicted.

    S = mean |predictor(encoder(first C frames)) - layer norm(target(window))| over what follows; the context comes from
    the student, as in the released evaluation.
    """
    patches = model.encoder.patch_embed.patchify(windows)
    tokens = pixel_targets(patches) if target is None else target(patches)
    n, per_step, rows = patches.shape[1], windows.shape[3] * windows.shape[4] // patch**2, []
    order = torch.arange(n, device=windows.device).expand(1, len(windows), n)
    for context in contexts:
        visible = context // tubelet * per_step
        masks = [order[..., :visible], order[..., visible:]]
        predictions = model(patches, masks, [token], normalize_context)[0]
        expected = gather_targets(tokens, masks, norm=target is not None)[0]
        rows.append((predictions.float() - expected).abs().mean((1, 2)))
    return torch.stack(rows)


def surprise_token(config):
    """The mask token that stands for the future: that of the time kind if the model has one, else the first."""
    names = [name for name, _, _ in mask_kinds(config)]
    return names.index("time") if "time" in names else 0


def video_surprise(model, target, video, config, frames, contexts, aspect, device):
    """Surprise of a whole video, uint8 [T, 3, H, W]: windows of `frames` frames, every second one -> [K, W] on the CPU.

    Raises ValueError if the video is shorter than a window.
    """
    if len(video) < frames:
        raise ValueError(
            f"{len(video)} frames, less than a window of {frames}: lower --physics-step or --physics-frames"
        )
    box = torch.tensor([centre_crop(*video.shape[-2:], aspect)]).float().to(device)
    clip = normalize(crop_resize(video[None].to(device), box, config.image_size))[0]  # [T, 3, S, S]
    windows = clip.unfold(0, frames, 2).permute(0, 1, 4, 2, 3)  # [W, 3, frames, S, S]
    dtype, rows = common.old_choose_precision(config.precision, device), []
    for part in windows.split(config.eval_batch):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            expected = None if config.target == "pixels" else target
            token, normed = surprise_token(config), config.normalize_context
            rows.append(surprise(model, expected, part, contexts, config.patch, config.tubelet, token, normed))
    return torch.cat(rows, dim=1).cpu().double()


def measure(model, target, trials, config, world, log):
    """Surprise at all Trials, shared among ranks -> {property: Measured}. Unreadable ones are skipped, and counted."""
    _, frames, _, contexts, aspect = protocol(config)
    if frames != config.frames:
        model, target, config = with_frames(model, target, config, frames)
        model, target = model.to(world.device), target.to(world.device)
    # a sharded network runs on all ranks at once, so there each measures everything
    mine = range(len(trials)) if config.shard else range(world.rank, len(trials), world.size)
    rows, bad = [], []
    for i in mine:
        trial = trials[i]
        try:
            videos = trial.load()
            pairs = match_quadruplet(videos)[0] if trial.quadruple else [list(range(len(videos)))]
            seen = [video_surprise(model, target, v, config, frames, contexts, aspect, world.device) for v in videos]
        except UNREADABLE as error:
            bad.append(f"{trial.titles[0]}: {error}")
            continue
        rows += [(i, j, seen[j].numpy()) for pair in pairs for j in pair]
    if world.size > 1 and not config.shard:
        parts = [None] * world.size
        dist.all_gather_object(parts, (rows, bad))
        rows, bad = sorted((r for part, _ in parts for r in part), key=lambda r: r[0]), [b for _, x in parts for b in x]
    log.skip(bad, len(trials), config.max_bad)
    if not rows:
        fail(f"none of the {len(trials)} sets of videos in {config.physics} could be measured: {bad[0]}")
    found = {}
    for name in dict.fromkeys(trials[i].name for i, _, _ in rows):
        own = [(trials[i], j, x) for i, j, x in rows if trials[i].name == name]
        losses = np.full((len(own), len(contexts), max(x.shape[1] for _, _, x in own)), np.nan)
        for row, (_, _, x) in zip(losses, own, strict=True):
            row[:, : x.shape[1]] = x
        labels = np.array([np.nan if t.labels[j] is None else t.labels[j] for t, j, _ in own])
        found[name] = Measured(losses, labels, [t.titles[j] for t, j, _ in own], contexts)
    return found


METRICS = ("relative avg", "relative max", "absolute max", "threshold", "best absolute max", "best threshold",
           "auprc avg", "auprc max", "auroc avg", "auroc max")  # fmt: skip


def aggregate(losses):
    """Losses [rows, K, W] -> surprise of each video {"avg", "max"}: [K + 1, rows]; the last context, "filtered", is the
    least surprised of all contexts in each window. Windows that a video does not have (nan) do not count."""
    rows = np.concatenate([losses, losses.min(axis=1, keepdims=True)], axis=1).transpose(1, 0, 2)
    return {"avg": np.nanmean(rows, axis=2), "max": np.nanmax(rows, axis=2)}


def auroc(possible, impossible):
    """Share of all (possible, impossible) combinations where the possible surprises less, ties half."""
    difference = impossible[None, :] - possible[:, None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def auprc(possible, impossible):
    """Area under precision over recall of "possible", by trapezoids between all thresholds, from (0, 1) on."""
    scores = np.concatenate([possible, impossible])
    positive = np.arange(len(scores)) < len(possible)
    order = np.argsort(scores, kind="stable")
    scores, hits = scores[order], np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each run of equal scores
    precision, recall = hits[last] / (last + 1), hits[last] / len(possible)
    precision, recall = np.append(1.0, precision), np.append(0.0, recall)
    return float((np.diff(recall) * (precision[1:] + precision[:-1]) / 2).sum())


def physics_metrics(losses, labels):
    """The evaluation's ten numbers, METRICS, for each context and for "filtered": [K + 1, 10].

    losses [2P, K, W]; labels [2P]: the i-th possible (1) and the i-th impossible (0) row are a pair. Accuracies in
    percent, areas are shares, thresholds in units of surprise. Ties of a pair are errors. nan with under 10 pairs where
    a threshold is needed.
    """
    table = []
    surprises = aggregate(losses)
    for average, largest in zip(surprises["avg"], surprises["max"], strict=True):
        (good, bad), (good_max, bad_max) = ((x[labels == 1], x[labels == 0]) for x in (average, largest))
        n = len(good)
        ranked, place = np.sort(good_max), math.ceil(0.9 * n)
        threshold = ranked[place] if place < n else np.nan
        right = (good_max < threshold).sum() + (bad_max > threshold).sum() if place < n else np.nan
        line = np.linspace(good_max.min(), bad_max.max(), 100)
        hits = (good_max < line[:, None]).sum(1) + (bad_max > line[:, None]).sum(1)
        row = [100 * (good < bad).mean(), 100 * (good_max < bad_max).mean(), 100 * right / (2 * n), threshold]
        row += [100 * hits.max() / (2 * n), line[hits.argmax()], auprc(good, bad), auprc(good_max, bad_max)]
        table.append([*row, auroc(good, bad), auroc(good_max, bad_max)])
    return np.array(table)


def bca_interval(statistic, n, seed=0, resamples=2000, level=0.95):
    """Bias-corrected and accelerated bootstrap interval over n pairs; statistic: weights [R, n] of pairs -> [R]."""
    counts = np.random.Generator(np.random.PCG64(seed)).multinomial(n, np.full(n, 1 / n), size=resamples)
    boot, value = np.sort(statistic(counts.astype(float))), statistic(np.ones((1, n)))[0]
    below = ((boot < value).mean() + (boot <= value).mean()) / 2
    if n < 2 or not 0 < below < 1:
        return float(boot[0]), float(boot[-1])
    jackknife = statistic(1 - np.eye(n))
    deviation = jackknife.mean() - jackknife
    scale = (deviation**2).sum() ** 1.5
    acceleration = (deviation**3).sum() / (6 * scale) if scale > 0 else 0.0
    normal, bias = NormalDist(), NormalDist().inv_cdf(below)
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = bias + normal.inv_cdf(tail)
        ends.append(float(np.quantile(boot, normal.cdf(bias + z / (1 - acceleration * z)))))
    return tuple(ends)


def summarise(measured):
    """One property's results: relative accuracy (average surprise) at each context and filtered, the best of them with
    its interval, and the absolute AUROC (maximal surprise, filtered: single videos) with its interval."""
    losses, labels = measured.losses, measured.labels
    table, surprises = physics_metrics(losses, labels), aggregate(losses)
    best, n = int(table[:, 0].argmax()), int((labels == 1).sum())
    good, bad = (surprises["avg"][best][labels == k] for k in (1, 0))
    right = (good < bad).astype(float)
    good, bad = (surprises["max"][-1][labels == k] for k in (1, 0))
    wins = (good[:, None] < bad) + 0.5 * (good[:, None] == bad)  # [possible, impossible]
    names = [*(f"context {c}" for c in measured.contexts), "filtered"]
    return {
        "pairs": n,
        **{name: row[0] for name, row in zip(names, table.tolist(), strict=True)},
        "best": float(table[best, 0]),
        "best_interval": [100 * x for x in bca_interval(lambda w: w @ right / w.sum(1), n)],
        "auroc": float(table[-1, 9]),
        "auroc_interval": list(bca_interval(lambda w: np.einsum("ri,ij,rj->r", w, wins, w) / w.sum(1) ** 2, n)),
        "metrics": {
            name: {key: None if math.isnan(x) else x for key, x in zip(METRICS, row, strict=True)}
            for name, row in zip(names, table.tolist(), strict=True)
        },
    }


def evaluate_physics(networks, config, world, log):
    """Measure, print and log the physics of {name: (model, target, config)} -> {name: {property: summary}}.

    Without labels (IntPhys test) it writes the files that the benchmark's server takes, for the first network.
    """
    trials, results = find_trials(config), {}
    for name, (model, target, own) in networks.items():
        found = measure(model.eval(), target.eval(), trials, own, world, log)
        if any(np.isnan(m.labels).any() for m in found.values()):
            write_submission(found, log, world)
            return {}
        results[name] = {key: summarise(m) for key, m in found.items()}
    for name, found in results.items():
        columns = [k for k in next(iter(found.values())) if k.startswith("context") or k == "filtered"]
        log.say(f"\nsurprise of the {name} network: pairs right, % (chance 50); AUROC of single videos (chance 0.5)")
        log.say(
            f"{'':<20}{'pairs':>6}" + "".join(f"{c:>11}" for c in columns) + f"{'best [95 %]':>20}{'AUROC [95 %]':>22}"
        )
        for key, r in found.items():
            best, area = (f"{r[k]:.{d}f} [{r[f'{k}_interval'][0]:.{d}f}, {r[f'{k}_interval'][1]:.{d}f}]"
                          for k, d in (("best", 0), ("auroc", 2)))  # fmt: skip
            log.say(f"{key:<20}{r['pairs']:>6}" + "".join(f"{r[c]:>11.1f}" for c in columns) + f"{best:>20}{area:>22}")
        means = {c: float(np.mean([r[c] for r in found.values()])) for c in [*columns, "best"]}
        log.say(f"{'mean':<26}" + "".join(f"{means[c]:>11.1f}" for c in columns) + f"{means['best']:>20.1f}")
        for category, scores in by_category(found).items():
            log.say(f"  {category:<18}{np.mean(scores):>6.1f}")
    log.say("(best: the highest over contexts, chosen on the test data, as the paper reports it)")
    log.write(physics=results)
    return results


def by_category(found):
    """{category: best scores of the properties that count for it}, where names are a data set's; else {}."""
    categories = {}
    for key, result in found.items():
        for category in CATEGORIES.get(key.rstrip("23"), ()):
            categories.setdefault(category, []).append(result["best"])
    return categories


def write_submission(found, log, world):
    """average_surprise_answer.txt and maximum_surprise_answer.txt: a line `O1/0001/1 plausibility` a video."""
    for kind, word in (("avg", "average"), ("max", "maximum")):
        lines = []
        for measured in found.values():
            scores = 1 - aggregate(measured.losses)[kind][-1]
            lines += [f"{t} {s:.6f}" for t, s in zip(measured.titles, scores.clip(0, 1), strict=True)]
        path = log.path.parent / f"{word}_surprise_answer.txt"
        if world.rank == 0:
            path.write_text("\n".join(lines) + "\n")
        log.say(f"{path}: {len(lines)} videos (rename to answer.txt and zip it for the server)")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: frozen features
# ---------------------------------------------------------------------------------------------------------------------


class CrossBlock(nn.Module):
    """What asks in an attentive probe: cross attention of the query on the tokens, and an MLP, both residual.

    The official checkpoints hold an output projection of the attention that is never applied; so here.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.xattn = common.OldCrossAttention(width, heads)
        self.xattn.proj.requires_grad_(False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = common.OLD_MLP(width, 4 * width)

    def forward(self, query, tokens):
        """query [B, 1, D], tokens [B, N, D] -> [B, 1, D]."""
        q = self.xattn.q(query).unflatten(2, (self.xattn.heads, -1)).transpose(1, 2)
        k, v = self.xattn.kv(self.norm1(tokens)).unflatten(2, (2, self.xattn.heads, -1)).permute(2, 0, 3, 1, 4)
        query = query + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return query + self.mlp(self.norm2(query))


class Pooler(nn.Module):
    """One learned query that reads a video's tokens."""

    def __init__(self, width, heads):
        super().__init__()
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.cross_attention_block = CrossBlock(width, heads)

    def forward(self, tokens):
        """[B, N, D] -> [B, 1, D]."""
        return self.cross_attention_block(self.query_tokens.expand(len(tokens), -1, -1), tokens)


class AttentiveProbe(nn.Module):
    """The papers' readout of frozen features: a query pools all tokens of all clips, a linear layer names the class."""

    def __init__(self, width, heads, classes):
        super().__init__()
        self.pooler = Pooler(width, heads)
        self.linear = nn.Linear(width, classes)
        self.apply(common.old_init_weights)

    def forward(self, tokens):
        """[B, N, D] -> logits [B, classes]."""
        return self.linear(self.pooler(tokens)[:, 0])


@torch.no_grad()
def encode(encoder, clips):
    """Frozen float32 tokens of clips [B, C, T, 3, S, S], uint8: those of a video's C clips one after the other [B, C*N,
    D], after the final norm. The layer norm on training targets is no part of the features."""
    tokens = encoder(normalize(clips.flatten(0, 1)).transpose(1, 2))
    return tokens.float().unflatten(0, clips.shape[:2]).flatten(1, 2)


def eval_clips(split, config, world, log, clips=1, views=1):
    """Iterate over a rank's share of a Split: (uint8 [B, V, C, T, 3, S, S] on the device, indices [B], -1 if unread).

    All ranks get the same number of batches (the last videos wrap around), since sharded encoders run in step.
    """
    n = len(split)
    mine = (torch.arange(math.ceil(n / world.size)) * world.size + world.rank) % n
    workers = common.old_worker_count(config, world, streaming=split.root is not None)
    size = max(1, config.eval_batch // (clips * views))
    data = EvalClips(split, config, clips, views)
    loader = DataLoader(data, size, sampler=mine.tolist(), num_workers=workers)
    for indices, (pixels, errors) in zip(mine.split(size), loader, strict=True):
        log.skip([e for e in errors if e], n, config.max_bad)
        yield pixels.to(world.device), indices.where(torch.tensor([not e for e in errors]), -1)


def collect(rows, device):
    """Join all ranks' rows, (indices [B], tensor [B, ...], ...), to (indices [N] on the CPU, tensor [N, ...], ...).

    In order of the indices, without those that were unreadable (-1) or came twice.
    """
    indices, *columns = (common.old_gather_over_ranks(torch.cat(column)) for column in zip(*rows, strict=True))
    kept, order = np.unique(indices.cpu().numpy(), return_index=True)
    order = torch.from_numpy(order[kept >= 0]).to(device)
    return torch.from_numpy(kept[kept >= 0]), *(column[order] for column in columns)


@dataclass
class Features:
    """Of N videos: pooled [N, D], tokens [N, T, D] or None, labels int64 [N], paths."""

    pooled: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    paths: list


def extract(encoder, split, config, world, log, tokens=False):
    """Features of a whole Split on all ranks, in its order; unreadable videos are left out."""
    rows = []
    for pixels, indices in eval_clips(split, config, world, log):
        found = encode(encoder, pixels[:, 0])
        rows.append((indices.to(world.device), found.mean(1), found if tokens else found[:, :0]))
    kept, pooled, found = collect(rows, world.device)
    paths = [split.paths[i] for i in kept.tolist()]
    return Features(pooled, found if tokens else None, split.labels[kept].to(world.device), paths)


def raw_pixels(split, config, world, log):
    """Normalised pixels of every fourth frame, down to 16 x 16, for kNN without any network -> ([N, P], labels)."""
    rows = []
    for pixels, indices in eval_clips(split, config, world, log):
        frames = normalize(pixels[:, 0, 0, ::4])  # [B, T/4, 3, S, S]
        small = F.adaptive_avg_pool2d(frames.flatten(0, 1), min(16, frames.shape[-1])).unflatten(0, frames.shape[:2])
        rows.append((indices.to(world.device), small.flatten(1)))
    kept, found = collect(rows, world.device)
    return found, split.labels[kept].to(world.device)


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


def train_probe(encoder, split, config, world, log):
    """An AttentiveProbe trained on a frozen encoder: AdamW, cosine, one step a batch of random clips."""
    c, device = config, world.device
    torch.manual_seed(c.seed)
    probe = AttentiveProbe(encoder.width, encoder.heads, len(split.classes)).to(device)
    wrapped, batch = common.old_distribute(probe, world), min(c.probe_batch, len(split)) // world.size * world.size
    total = max(1, c.probe_epochs * (len(split) // batch))
    optimizer = torch.optim.AdamW(common.old_parameter_groups(probe), lr=0.0)
    wide = replace(c, crop_scale=c.crop_scale if c.crop_scale == (1.0, 1.0) else (0.08, 1.0))
    data = Clips(split, wide, world, batch, c.probe_clips, purpose="probe")
    for step, item in enumerate(make_loader(data, range(total), c, world)):
        log.skip(item["bad"], len(split), c.max_bad)
        for group in optimizer.param_groups:
            group["lr"] = common.old_cosine_schedule(step, total, c.probe_lr, 0.0)
            decay = common.old_cosine_schedule(step, total, c.probe_decay, 1e-6)
            group["weight_decay"] = decay if group["decay"] else 0.0
        clips = make_clips(item, c.image_size, device)  # [b * C, 3, T, S, S]
        with torch.no_grad():
            tokens = torch.cat([encoder(part).float() for part in clips.split(c.eval_batch)])
        tokens = tokens.unflatten(0, (-1, c.probe_clips)).flatten(1, 2)
        loss = F.cross_entropy(wrapped(tokens), split.labels[item["indices"]].to(device, non_blocking=True))
        loss.backward()
        nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return probe


@torch.no_grad()
def probe_accuracy(probe, encoder, val, config, world, log):
    """Top-1 in percent of an attentive probe on a Split; --probe-clips clips a video, softmax averaged over views."""
    rows = []
    for pixels, indices in eval_clips(val, config, world, log, config.probe_clips, config.probe_views):
        views = [probe(encode(encoder, view)).softmax(1) for view in pixels.unbind(1)]
        rows.append((indices.to(world.device), torch.stack(views).mean(0)))
    kept, scores = collect(rows, world.device)
    return accuracy(scores, val.labels[kept].to(world.device)).item()


def evaluate(model, target, config, world, log, train_split=None):
    """Run --eval on (model, target encoder), beside it on a randomly initialised one, and for kNN on raw pixels.

    Prints tables, appends them to log.jsonl and returns the frozen ones in percent: {"trained": {...}, "random": ...}.
    """
    wanted = [name for name in config.eval.split(",") if name != "none"]
    networks = {"trained": (model, target, config)}
    if config.baselines and wanted:
        networks["random"] = (*(m.to(world.device) for m in build(config)), replace(config, shard=False))
    if "physics" in wanted:
        wanted.remove("physics")
        compared = dict(networks)
        if config.pixels:
            compared["pixel"] = tuple(load_all(config.pixels, config, world))
        evaluate_physics(compared, config, world, log)
    if not wanted:
        return {}
    train, val = train_split or open_split(config, "train"), open_split(config, "val")
    if "features" in wanted:
        write_features(target, train if config.features_split == "train" or val is None else val, config, world, log)
        wanted.remove("features")
    if wanted and (val is None or not train.classes):
        log.say(f"{', '.join(wanted)}: skipped, since {config.data} has no {'labels' if val else 'val split'}")
        wanted = []
    if wanted and val.classes != train.classes and not config.data.endswith(".csv"):
        differing = sorted({*val.classes} ^ {*train.classes})[:5]
        fail(f"train/ and val/ of {config.data} differ in their classes: {differing}")
    if not wanted:
        return {}
    some = train
    if 0 < config.eval_limit < len(train):
        some = train.subset(torch.randperm(len(train), generator=generator(config.seed, "limit"))[: config.eval_limit])
    results = {}
    for name, (_, encoder, _) in networks.items():
        result = results.setdefault(name, {})
        encoder.eval()
        if "knn" in wanted:
            bank, test = (extract(encoder, split, config, world, log) for split in (some, val))
            scores = knn(bank.pooled, bank.labels, test.pooled)
            result |= {f"knn{k}": accuracy(s, test.labels).item() for k, s in scores.items()}
        if "probe" in wanted:
            if config.probe_init and name != "trained":
                continue  # it reads the features of one encoder only
            if config.probe_init:
                probe = load_probe(config.probe_init, encoder.heads).to(world.device)
            else:
                probe = train_probe(encoder, train, config, world, log)
            result["probe"] = probe_accuracy(probe, encoder, val, config, world, log)
    if config.baselines and "knn" in wanted:
        (bank, bank_labels), (test, labels) = (raw_pixels(split, config, world, log) for split in (some, val))
        results["pixels"] = {f"knn{k}": accuracy(s, labels).item() for k, s in knn(bank, bank_labels, test).items()}
    log.say(f"{'top-1, %':<16}" + "".join(f"{name:>10}" for name in results))
    for key in results["trained"]:
        log.say(f"{key:<16}" + "".join(f"{r[key]:>10.1f}" if key in r else f"{'':>10}" for r in results.values()))
    log.write(eval=results, videos={"train": len(train), "val": len(val)})
    return results


def write_features(encoder, split, config, world, log):
    """--eval features: .npz of features float32 [N, D], labels int64 [N], paths, and with --tokens tokens [N, T, D]."""
    found = extract(encoder.eval(), split, config, world, log, config.tokens)
    arrays = dict(features=found.pooled, labels=found.labels) | (dict(tokens=found.tokens) if config.tokens else {})
    path = Path(config.features_out or log.path.parent / "features.npz")
    if world.rank == 0:
        np.savez(path, paths=np.array(found.paths), **{k: v.cpu().numpy() for k, v in arrays.items()})
        log.say(f"{path}: " + ", ".join(f"{k} {list(v.shape)}" for k, v in arrays.items()))


@torch.no_grad()
def content_ratio(model, target, clips, config):
    """(loss, that with another clip's context over it): 1 if the predictor uses positions only, else more."""
    masks = sample_masks(replace(config, batch=len(clips), group=0), step=0)[0]
    masks = [m.to(clips.device) for m in masks]
    patches, pixels = model.encoder.patch_embed.patchify(clips), config.target == "pixels"
    tokens = pixel_targets(patches) if pixels else target(clips)
    targets = gather_targets(tokens, masks, norm=not pixels)
    right, wrong = (vjepa_loss(model(p, masks), targets, 2 if pixels else 1) for p in (patches, patches.roll(1, 0)))
    return right.item(), (wrong / right).item()


# ---------------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------------


def to_pixels(clips):
    """Normalised clips [..., 3, T, S, S] -> 0..255, the same shape."""
    mean, std = (common.old_constant(v, clips.device)[:, None, None, None] for v in (MEAN, STD))
    return (clips * std + mean).clamp(0, 1) * 255


# Copied from msn.py
def paste(canvas, image, left, top, side):
    """Put pixels [3, s, s] on a PIL canvas, enlarged to `side`."""
    tile = Image.fromarray(image.permute(1, 2, 0).byte().cpu().numpy()).resize((side, side), Image.NEAREST)
    canvas.paste(tile, (left, top))


def draw_masks(clips, config, tile=64, gap=4):
    """What is seen and what is predicted: for a few clips [n, 3, T, S, S], a row of frames, one of each tubelet, and a
    row for each kind of mask, where hidden tubes are grey and what the cut to one length leaves out is black."""
    masks = sample_masks(replace(config, batch=len(clips), group=0), 1)[0]
    pixels, grid = to_pixels(clips)[:, :, :: config.tubelet], grid_of(config)
    kinds = [name + (f" {blocks} x {scale:g}" if blocks else "") for name, blocks, scale in mask_kinds(config)]
    rows, label = [], 96
    for i, clip in enumerate(pixels):
        rows.append(("clip", clip))
        for name, keep, asked in zip(kinds, masks[::2], masks[1::2], strict=True):
            state = torch.zeros(math.prod(grid)).index_fill(0, keep[0, i].cpu(), 1).index_fill(0, asked[0, i].cpu(), 2)
            state = F.interpolate(state.view(1, *grid), size=clip.shape[2:]).to(clip.device)  # [1, T', S, S]
            rows.append((name, torch.where(state == 1, clip, torch.where(state == 2, 128.0, 0.0))))
    canvas = Image.new("RGB", (label + grid[0] * (tile + gap), len(rows) * (tile + gap) + gap), "white")
    for r, (name, clip) in enumerate(rows):
        top = gap + r * (tile + gap)
        ImageDraw.Draw(canvas).text((4, top + tile // 2 - 6), name, fill="black")
        for t in range(grid[0]):
            paste(canvas, clip[:, t], label + t * (tile + gap), top, tile)
    return canvas


def draw_curves(canvas, curves, frames, event, box, upto=None):
    """Surprise over time: curves [(colour, frame numbers [W], values [W])] in box (left, top, right, bottom).

    event: the frame in which the videos part, or None; upto: draw only what is known at this frame.
    """
    draw, (left, top, right, bottom) = ImageDraw.Draw(canvas), box
    values = np.concatenate([v for _, _, v in curves])
    low, high = values.min(), values.max() + 1e-9

    def at(frame, value):
        return left + (right - left) * (frame + 0.5) / frames, bottom - (bottom - top) * (value - low) / (high - low)

    draw.rectangle(box, outline=(200, 200, 200))
    if event is not None and (upto is None or event <= upto):
        x = at(event, low)[0]
        draw.line([(x, top), (x, bottom)], fill=(230, 150, 0), width=2)
        draw.text((x + 3, top + 2), "they part here", fill=(180, 110, 0))
    for colour, numbers, value in curves:
        points = [at(f, v) for f, v in zip(numbers, value, strict=True) if upto is None or f <= upto]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2)


def draw_surprise(name, possible, impossible, curves, event, tile=34, gap=2):
    """Strips of frames of a pair, uint8 [T, 3, H, W], over the surprise at both -> (picture, frames of a movie)."""
    count = min(len(possible), len(impossible))
    shown = np.linspace(0, count - 1, min(count, 20)).round().astype(int)
    strip = tile + gap
    canvas = Image.new("RGB", (80 + len(shown) * strip, 2 * strip + 84), "white")
    colours = ((30, 120, 30), (200, 30, 30))
    for row, (kind, video, colour) in enumerate(zip(("possible", "impossible"), (possible, impossible), colours)):
        ImageDraw.Draw(canvas).text((4, row * strip + tile // 2 - 6), kind, fill=colour)
        for i, t in enumerate(shown):
            paste(canvas, video[t], 80 + i * strip, row * strip, tile)
    lines = [(colour, *curve) for colour, curve in zip(colours, curves, strict=True)]
    ImageDraw.Draw(canvas).text((4, 2 * strip + 20), f"{name}:\nsurprise", fill="black")
    draw_curves(canvas, lines, count, event, (80, 2 * strip + 2, canvas.width - 4, 2 * strip + 72))
    movie, side = [], 128
    for t in range(count):
        still = Image.new("RGB", (2 * side + 3 * gap, side + 110), "white")
        paste(still, possible[t], gap, gap, side)
        paste(still, impossible[t], side + 2 * gap, gap, side)
        draw_curves(still, lines, count, event, (gap, side + 8, 2 * side + gap, side + 104), upto=t)
        movie.append(still)
    return canvas, movie


def picture_surprise(model, target, config, device):
    """`draw_surprise` of the first labelled pair of each property of --physics, one below the other, and the movie of
    that with the largest difference on average; None where there are no labels.

    The surprise of a window is drawn at the middle of what it predicts, from the shortest of the context lengths.
    """
    _, frames, _, contexts, aspect = protocol(config)
    trials = {t.name: t for t in reversed(find_trials(config)) if t.labels[0] is not None}
    if not trials or frames != config.frames:
        return None
    drawn = []
    for trial in reversed(trials.values()):
        videos, curves = trial.load(), []
        pair = match_quadruplet(videos)[0][0] if trial.quadruple else [0, 1]
        possible, impossible = (videos[i] for i in sorted(pair, key=lambda i: -trial.labels[i]))
        for video in (possible, impossible):
            found = video_surprise(model, target, video, config, frames, contexts[:1], aspect, device)[0].numpy()
            curves.append(((contexts[0] + frames) / 2 + 2 * np.arange(len(found)), found))
        count = min(len(possible), len(impossible))
        differ = (possible[:count] != impossible[:count]).flatten(1).any(1)
        event = int(differ.int().argmax()) if differ.any() else None
        clarity = curves[1][1].mean() - curves[0][1].mean()
        drawn.append((clarity, *draw_surprise(trial.name, possible, impossible, curves, event)))
    canvas = Image.new("RGB", (drawn[0][1].width, sum(strips.height for _, strips, _ in drawn)), "white")
    for i, (_, strips, _) in enumerate(drawn):
        canvas.paste(strips, (0, i * strips.height))
    return canvas, max(drawn, key=lambda row: row[0])[2]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: ours and official
# ---------------------------------------------------------------------------------------------------------------------

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # by width: a file's shapes do not tell
ARCHITECTURE = ("image_size", "patch", "frames", "tubelet", "width", "depth", "heads", "predictor_width")
ARCHITECTURE += ("predictor_depth", "predictor_heads", "rope", "target", "masks", "mask_blocks", "mask_scales")


def read_checkpoint(path, heads=0, frames=0, image_size=0):
    """Weights of our or official checkpoints: {"encoder", "target", "predictor": state dicts, "architecture": fields}.

    An official file has `encoder`, `target_encoder`, `predictor`, with keys `module.backbone.*`. Its shapes do not tell
    heads (of unusual widths), and not always how its tokens divide into frames and places: frames, image_size say so.
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
            plain = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in state[key].items()}
            parts[name] = {k: v for k, v in plain.items() if not k.endswith("rotary_emb.freqs")}
    first = parts.get("target", {}).get("patch_embed.proj.weight")
    if len(parts) < 3 or first is None or first.dim() != 5 or "predictor_embed.weight" not in parts["predictor"]:
        found = ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
        expected = "encoder, target_encoder and predictor with keys module.backbone.*"
        fail(f"{path} is no V-JEPA checkpoint: expected {expected}, found {found}")
    target, predictor = parts["target"], parts["predictor"]
    width, _, tubelet, patch, _ = first.shape
    heads, rope = heads or HEADS.get(width, 0), "pos_embed" not in target
    if not heads or width % heads:
        fail(f"{path} cannot say how many attention heads share its width of {width}: add --heads")
    if rope:
        frames, image_size = frames or 16, image_size or 14 * patch
    else:
        tokens = target["pos_embed"].shape[1]
        usual = [t for t in (frames // tubelet, 8) if t and is_square(tokens, t)]  # as given, or as released
        times = usual[:1] or [t for t in range(1, tokens + 1) if is_square(tokens, t)]
        if len(times) != 1:
            fail(f"{path} has positions for {tokens} tokens, which divide into frames in no single way: give --frames")
        frames, image_size = times[0] * tubelet, patch * math.isqrt(tokens // times[0])
    kinds = sum(k.startswith("mask_tokens.") for k in predictor)
    architecture = dict(image_size=image_size, patch=patch, frames=frames, tubelet=tubelet, width=width, heads=heads,
                        rope=rope, depth=count_blocks(target), predictor_depth=count_blocks(predictor),
                        predictor_width=len(predictor["predictor_embed.weight"]), predictor_heads=heads)  # fmt: skip
    architecture |= dict(target="features", masks="multiblock", mask_blocks=(8, 2, 2, 2)[:kinds])
    return parts | {"architecture": architecture | dict(mask_scales=(0.15, 0.7, 0.7, 0.7)[:kinds])}


def is_square(tokens, times):
    """Whether `tokens` divide into `times` squares."""
    return tokens % times == 0 and math.isqrt(tokens // times) ** 2 == tokens // times


def count_blocks(state):
    """Depth of a state dict with keys blocks.N.* or predictor_blocks.N.*."""
    return 1 + max(int(k.split("blocks.")[1].split(".")[0]) for k in state if "blocks." in k)


def load_part(module, state, grid, what):
    """Load a state dict of Encoder or Predictor made for `grid`; exits with 2 if more than the position table differs.

    More frames: the fixed table simply has more rows. Another size of the picture: the table is interpolated.
    """
    key = next((k for k in ("pos_embed", "predictor_pos_embed") if k in state), None)
    if key and tuple(grid) != tuple(module.grid):
        own = getattr(module, key)
        table = interpolate_table(state[key], grid, (grid[0], *module.grid[1:]))
        if grid[1:] == module.grid[1:]:
            table = own.detach()
        elif grid[0] != module.grid[0]:
            fail(f"{what}: change --frames or --image-size, not both: positions were made for {grid} tokens")
        else:
            old, new = ("x".join(map(str, g)) for g in (grid, module.grid))
            print(f"{what}: positions interpolated from {old} to {new} tokens", flush=True)
        state = state | {key: table}
    common.old_load_state(module, state, what)


def load_weights(model, target, weights, path):
    """Put what `read_checkpoint` found into (VJEPA, target encoder)."""
    a = weights["architecture"]
    side = a["image_size"] // a["patch"]
    grid = (a["frames"] // a["tubelet"], side, side)
    load_part(target, weights["target"], grid, f"{path}, target encoder")
    load_part(model.encoder, weights["encoder"], grid, f"{path}, encoder")
    load_part(model.predictor, weights["predictor"], grid, f"{path}, predictor")


def load_all(path, config, world):
    """(model, target encoder, config with the file's architecture) of a checkpoint, on the device."""
    weights = read_checkpoint(path)
    own = replace(config, **weights["architecture"], shard=False)
    model, target = build(own)
    load_weights(model, target, weights, path)
    return model.to(world.device), target.to(world.device), own


def load_encoder(path, image_size=0, heads=0, frames=0):
    """The frozen target encoder of any checkpoint that this script reads: video [B, 3, T, H, W] -> tokens [B, N, D].

    image_size: pixels, 0 = as trained; heads, frames: where an official file does not tell.
    """
    weights = read_checkpoint(path, heads, frames, image_size)
    a = weights["architecture"]
    side, times = a["image_size"] // a["patch"], a["frames"] // a["tubelet"]
    grid = (times, (image_size or a["image_size"]) // a["patch"], (image_size or a["image_size"]) // a["patch"])
    encoder = Encoder(grid, a["patch"], a["tubelet"], a["width"], a["depth"], a["heads"], a["rope"])
    load_part(encoder, weights["target"], (times, side, side), f"{path}, target encoder")
    return encoder.requires_grad_(False).eval()


def load_probe(path, heads):
    """An official attentive probe: `classifier` with keys module.pooler.* and module.linear.*."""
    state = common.old_load_checkpoint(path)
    if not isinstance(state, dict) or not isinstance(state.get("classifier"), dict):
        fail(f"{path} is no probe checkpoint: expected `classifier`, with keys module.pooler.* and module.linear.*")
    weights = {k.removeprefix("module."): v for k, v in state["classifier"].items()}
    if "linear.weight" not in weights:
        fail(f"{path} is no attentive probe: linear.weight is missing")
    classes, width = weights["linear.weight"].shape
    probe = AttentiveProbe(width, heads, classes)
    common.old_load_state(probe, weights, path)
    return probe.eval()


def with_frames(model, target, config, frames):
    """(model, target, config) for windows of another length: the same weights, positions made anew."""
    new = replace(config, frames=frames)
    fresh, fresh_target = build(new)
    for module, source in ((fresh, common.old_full_state(model)[0]), (fresh_target, common.old_full_state(target)[0])):
        tables = {k: v for k, v in module.state_dict().items() if k.endswith("pos_embed")}
        common.old_load_state(module, source | tables, "the network with other frames")
    return fresh, fresh_target, new


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def report(model, target, train_split, config, world, log):
    """After training: is content used, not only position? And the pictures."""
    split, alone = open_split(config, "val") or train_split, World(0, 1, world.device)
    some = split.subset(torch.randperm(len(split), generator=generator(config.seed, "report"))[:32])
    pixels, indices = (torch.cat(x) for x in zip(*eval_clips(some, config, alone, log), strict=True))
    clips = normalize(pixels[indices >= 0, 0, 0]).transpose(1, 2)  # [n, 3, T, S, S]
    if len(clips) > 1:
        loss, ratio = content_ratio(model, target, clips, config)
        other = f"with another clip's context {ratio:.2f} times that (1: only position counts)"
        log.say(f"loss on unseen clips {loss:.4f}; {other}")
        log.write(val_loss=loss, content_ratio=ratio)
    picture = draw_masks(clips[:3], config)
    wanted = config.data == "toy" or "physics" in config.eval.split(",")
    drawn = picture_surprise(model, target, config, world.device) if wanted else None
    if drawn:
        strips, movie = drawn
        both = Image.new("RGB", (picture.width + 16 + strips.width, max(picture.height, strips.height)), "white")
        both.paste(picture, (0, 0))
        both.paste(strips, (picture.width + 16, 0))
        picture = both
    if world.rank == 0:
        folder = log.path.parent
        picture.save(folder / "picture.png")
        pairs = "; surprise at pairs of videos" if drawn else ""
        log.say(f"{folder / 'picture.png'}: clips, their context, what is predicted{pairs}")
        if drawn:
            movie[0].save(folder / "surprise.gif", save_all=True, append_images=movie[1:], duration=150, loop=0)
            log.say(f"{folder / 'surprise.gif'}: the clearest of these pairs, moving")


def run(config, given):
    """Train and evaluate; with --init and no length given, only evaluate. given: names of the flags that were typed."""
    world = common.old_start_world(config.device)
    weights = None
    if config.init:
        known = {k: getattr(config, k) if k in given else 0 for k in ("heads", "frames", "image_size")}
        weights = read_checkpoint(config.init, **known)
        config = replace(config, **{k: v for k, v in weights["architecture"].items() if k not in given})
    training = not config.init or bool({"steps", "epochs"} & given)
    check(config, world, training)
    if "physics" in config.eval.split(","):
        protocol(config)  # before any work
    out = common.old_choose_out(config.out, Path(__file__).stem, config.resume, world)
    split = open_split(config, "train") if training else None
    model, target = build(config)
    if weights:
        load_weights(model, target, weights, config.init)
    if training:
        model, target = train(model, target, split, config, world, out)
        report(model, target, split, config, world, Log(out, world))
    else:
        model, target = model.to(world.device), target.to(world.device)
    evaluate(model, target, config, world, Log(out, world), split)


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
