# SPDX-License-Identifier: MIT
"""I-JEPA: Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture.

wip
"""

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import resource
import shlex
import sys
import tarfile
import time
import urllib.request
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset

import common
from common import EMA, Block, Log, ViT, World, fail, gather_tokens, generator

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag, and the comment beside it is its help text."""

    preset: str = ""  # a name of PRESETS; by default the one that fits --data
    data: str = "toy"  # toy, cifar10, imagenet, another folder of $DATA (default ./data), or a path

    # model
    image_size: int = 24  # side of the image, pixels
    patch: int = 4  # side of a patch, pixels
    width: int = 64  # encoder width
    depth: int = 4  # encoder blocks
    heads: int = 4  # attention heads of the encoder
    predictor_width: int = 32  # predictor width
    predictor_depth: int = 4  # predictor blocks
    predictor_heads: int = 0  # attention heads of the predictor, 0 = as the encoder
    patch_std: float = 0.02  # std of the initial patch projection

    # masks
    masks: str = "corrected"  # official (the paper's code) or corrected (blocks reach the last row and column; see sample_masks)
    targets: int = 4  # target blocks an image
    contexts: int = 1  # context blocks an image
    target_scale: tuple[float, float] = (0.15, 0.2)  # area of a target block, share of the image
    target_aspect: tuple[float, float] = (0.75, 1.5)  # height / width of a target block
    context_scale: tuple[float, float] = (0.85, 1.0)  # area of the context block before targets are cut out of it
    min_keep: int = 3  # a block has more patches than this
    min_context: int = 8  # corrected masks: fewer context patches than this are not accepted
    overlap: bool = False  # let the context keep the patches of the targets
    group: int = 0  # consecutive samples whose contexts are cut to one length, 0 = the whole batch (the paper: a GPU's share)

    # augmentation
    crop_scale: tuple[float, float] = (0.3, 1.0)  # area of the random crop, share of the image
    flip: bool = False  # mirror half of the images

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
    weight_decay_final: float = 0.4  # weight decay at the end (half a cosine)
    momentum: float = 0.996  # EMA momentum of the target encoder at the start
    momentum_final: float = 1.0  # EMA momentum at the end (linear)
    schedule_scale: float = 1.0  # schedules are this many times longer than the run (>= 1)

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/ijepa, runs/ijepa-2, ...
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
    eval: str = "knn,linear"  # comma-separated: knn, linear, lowshot, features; or none
    encoder: str = "target"  # which encoder is evaluated: target (the paper) or context
    baselines: bool = True  # evaluate a randomly initialised encoder and raw pixels beside it
    eval_limit: int = 0  # use at most this many training images for knn and lowshot, 0 = all
    eval_batch: int = 256  # images a forward pass in evaluation, a rank
    probe: str = "sgd"  # optimizer of the linear probe: lars (the paper on ImageNet) or sgd (its transfer protocol)
    probe_augment: bool = False  # probe on random crops and flips, encoding each batch anew; else on features computed once
    probe_epochs: int = 28  # passes of the linear probe
    probe_batch: int = 256  # batch of the linear probe, over all ranks
    probe_lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)  # learning rates tried, scaled by batch / 256
    probe_decays: tuple[float, ...] = (5e-4, 0.0)  # weight decays tried
    probe_milestones: tuple[float, ...] = (0.286, 0.571, 0.857)  # share of the epochs after which lr is divided by 10
    lowshot: float = 0.01  # share of the labels that lowshot uses
    lowshot_list: str = ""  # file of training image names for lowshot, one a line; default a seeded choice, the same for each class
    features_split: str = "val"  # train or val
    features_out: str = ""  # file of --eval features, default features.npz in the run's folder
    tokens: bool = False  # --eval features also writes the patch tokens


PAPER = dict(
    data="imagenet", image_size=224, predictor_width=384, masks="official", min_keep=10, group=128, crop_scale=(0.3, 1.0), batch=2048,
    epochs=300, warmup=40 / 300, lr=1e-3, lr_start=2e-4, lr_final=1e-6, weight_decay=0.04, weight_decay_final=0.4, momentum=0.996,
    probe="lars", probe_augment=True, probe_epochs=50, probe_batch=16384, probe_lrs=(0.01, 0.05, 0.001), probe_milestones=(0.3, 0.6, 0.9),
)  # fmt: skip
HUGE = dict(patch=14, width=1280, depth=32, heads=16, predictor_depth=12)

PRESETS = {
    "toy": dict(steps=1000),
    "cifar10-cpu": dict(data="cifar10"),
    "cifar10": dict(data="cifar10"),
    "folder": dict(data="folder"),
    "vit_b16_in1k": PAPER | dict(patch=16, width=768, depth=12, heads=12, predictor_depth=6, epochs=600, warmup=40 / 600),
    "vit_l16_in1k": PAPER | dict(patch=16, width=1024, depth=24, heads=16, predictor_depth=12, epochs=600, warmup=40 / 600),
    "vit_h14_in1k": PAPER | HUGE,
    "vit_h16_448_in1k": PAPER | HUGE | dict(image_size=448, patch=16, group=16),
    "vit_h14_in22k": PAPER | HUGE | dict(data="imagenet22k", group=32, epochs=66, warmup=3 / 66),
    "vit_g16_in22k": PAPER
    | dict(data="imagenet22k", patch=16, width=1408, depth=40, heads=16, predictor_depth=16, group=16, epochs=44, warmup=3 / 44),
}
DATA_PRESETS = {"toy": "toy", "cifar10": "cifar10", "imagenet": "vit_h14_in1k", "imagenet22k": "vit_h14_in22k", "*": "folder"}


def check(config, world):
    """Refuse what cannot work, before any work (exit 2)."""
    c = config
    if c.image_size % c.patch:
        fail(f"--image-size {c.image_size} is not a multiple of --patch {c.patch}")
    for name, width, heads in (("", c.width, c.heads), ("predictor-", c.predictor_width, c.predictor_heads or c.heads)):
        if width % heads or width % 4:
            fail(f"--{name}width {width} must be a multiple of its heads, {heads}, and of 4")
    micro = micro_batch(c, world)
    if c.batch % (world.size * c.accumulate) or c.batch % (world.size * micro) or (c.group and c.batch % c.group):
        fail(f"--batch {c.batch} does not divide into {world.size} ranks x {c.accumulate} accumulations, in groups of {c.group or c.batch}")
    if c.group and c.group % micro:
        fail(f"--group {c.group} is no multiple of the {micro} images a forward pass; change --accumulate or --group")
    for name, known in (("masks", ("official", "corrected")), ("probe", ("lars", "sgd")), ("encoder", ("target", "context")),
                        ("features_split", ("train", "val")), ("precision", ("", "bf16", "fp16", "fp32"))):  # fmt: skip
        if getattr(c, name) not in known:
            fail(f"--{name.replace('_', '-')} {getattr(c, name)!r} is not one of {', '.join(k for k in known if k)}")
    for name in c.eval.split(","):
        if name not in ("knn", "linear", "lowshot", "features", "none"):
            fail(f"--eval {name!r} is not one of knn, linear, lowshot, features, none")
    grid = c.image_size // c.patch
    smallest = min(math.prod(block_size(u / 100, grid, c.target_scale, c.target_aspect, c.masks)) for u in range(101))
    context = min(math.prod(block_size(u / 100, grid, c.context_scale, (1, 1), c.masks)) for u in range(101))
    if min(smallest, context) <= c.min_keep:
        fail(
            f"on a {grid}x{grid} grid a target block can have {smallest} patches and a context block {context}, but --min-keep {c.min_keep} "
            "asks for more: lower --min-keep, or use smaller patches or larger blocks"
        )
    if c.schedule_scale < 1:
        fail(f"--schedule-scale {c.schedule_scale} is below 1: the schedules would end before the run does")
    if c.shard and c.encoder == "context":
        fail("--shard evaluates the target encoder only; evaluate the context encoder afterwards with --init RUN/last.pt --encoder context")
    if c.shard and c.precision == "fp16":
        fail("--shard works with bf16 and fp32, not with --precision fp16")


def micro_batch(config, world):
    """Images a forward pass: no more than a rank's share split by --accumulate, and never from two groups."""
    return min(config.group or config.batch, max(1, config.batch // (world.size * config.accumulate)))


# ---------------------------------------------------------------------------------------------------------------------
# Masks: several target blocks, and one context block without them (section 3 of the paper)
# ---------------------------------------------------------------------------------------------------------------------


def block_size(u, grid, scale, aspect, masks="official"):
    """(height, width) of a block, in patches, from one uniform u in [0, 1).

    One u decides both scale and aspect, so small blocks are wide and large ones tall. The paper describes two draws; this is what
    the released code does. Official blocks are at most grid - 1 long.
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
    """bool [B, M, N] -> int64 [M, B, length], ascending: the true entries with the smallest keys ([B, M, N], default raster order)."""
    if keys is None:
        keys = torch.arange(blocks.shape[-1], device=blocks.device).expand_as(blocks).double() / blocks.shape[-1]
    return (keys + ~blocks).argsort(dim=-1)[..., :length].sort(dim=-1).values.transpose(0, 1).contiguous()


def sample_masks(config, step, first=0, last=None, device="cpu"):
    """Masks of samples first..last of the global batch in this step, for all of them at once.

    Returns a list, one entry per `micro-batch group` of config.group samples that the range touches:
    (context int64 [contexts, B, K], targets int64 [targets, B, Kp]). Locations depend on (seed, step, index in the global batch) only.

    `official`: as the released collator. Blocks never touch the last row or column; contexts are cut to the group's shortest by
    keeping their first K patches in raster order, which favours the top; where too little context is left, the last target is
    allowed into it, then the one before, after 20 tries each.
    `corrected`: blocks reach the border, contexts are cut at random, and where too little is left, all of the image's blocks are
    drawn again. On an 8x8 grid the official border would leave 15 of 64 patches untrained, and the cut the lower third.
    """
    official = config.masks == "official"
    grid, count = config.image_size // config.patch, config.targets
    group = config.group or config.batch
    last = config.batch if last is None else last
    low, high = first // group * group, -(-last // group) * group
    target_size, context_size = block_sizes(config, step)
    random = generator(config.seed, "masks", step, device=device)

    def draw(blocks, size):
        """Random corners for the whole global batch, of which we keep our groups': [B, blocks, 2]."""
        room = torch.tensor([grid - size[0], grid - size[1]], device=device) + (not official)
        uniform = torch.rand(config.batch, blocks, 2, generator=random, dtype=torch.float64, device=device)
        return (uniform[low:high] * room).long()

    todo = torch.ones(high - low, config.contexts, dtype=torch.bool, device=device)
    targets, contexts = None, torch.zeros(high - low, config.contexts, grid * grid, dtype=torch.bool, device=device)
    for attempt in range(20 * (count + 1)):
        if targets is None or not official:
            fresh = rectangles(draw(count, target_size), target_size, grid)  # [B, targets, N]
            targets = fresh if targets is None else torch.where(todo.any(1)[:, None, None], fresh, targets)
        regions = 0 if config.overlap else max(0, count - attempt // 20) if official else count
        fresh = rectangles(draw(config.contexts, context_size), context_size, grid) & ~targets[:, :regions].any(1, keepdim=True)
        contexts = torch.where(todo[..., None], fresh, contexts)  # [B, contexts, N]
        todo = contexts.sum(-1) <= (config.min_keep if official else max(config.min_keep, config.min_context - 1))
        if not official:
            todo = todo.any(1, keepdim=True).expand_as(todo)
        if not todo.any():
            break
    keys = None if official else torch.rand(config.batch, *contexts.shape[1:], generator=random, dtype=torch.float64, device=device)[low:high]
    target_indices = to_indices(targets, math.prod(target_size))
    lengths = contexts.sum(-1).view(-1, group * config.contexts).amin(1).tolist()
    masks = []
    for i, length in enumerate(lengths):
        rows = slice(i * group, (i + 1) * group)
        masks.append((to_indices(contexts[rows], length, None if keys is None else keys[rows]), target_indices[:, rows]))
    return masks


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """A narrow ViT that fills in each target block from the context, apart from the other targets."""

    def __init__(self, grid, width, predictor_width, depth, heads):
        super().__init__()
        self.predictor_embed = nn.Linear(width, predictor_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_width))
        table = common.sincos_2d(predictor_width, grid, grid).float()
        self.predictor_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(predictor_width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(predictor_width, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_width, width)
        self.apply(common.init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, context, masks_context, masks_target):
        """Predicted representations of the target patches.

        context [E*B, K, D]: context tokens of E contexts; masks_context [E, B, K], masks_target [M, B, Kp] -> [M*E*B, Kp, D],
        rows ordered target-major, then context, then image.
        """
        (contexts, batch, kept), (targets, _, asked) = masks_context.shape, masks_target.shape
        positions = self.predictor_pos_embed[0]
        x = self.predictor_embed(context).view(contexts, batch, kept, -1) + positions[masks_context]
        queries = self.mask_token + positions[masks_target]  # [M, B, Kp, P]
        x = torch.cat([x.expand(targets, -1, -1, -1, -1), queries[:, None].expand(-1, contexts, -1, -1, -1)], dim=3).flatten(0, 2)
        for block in self.predictor_blocks[:-1]:
            x = block(x)  # [M*E*B, K+Kp, P]
        x = self.predictor_blocks[-1](x, queries=asked)  # only the queries are read, so the last block computes only them
        return self.predictor_proj(self.predictor_norm(x))


class IJEPA(nn.Module):
    """Context encoder and predictor: what is trained by gradient. The target encoder is a ViT beside it, moved by EMA."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.encoder = ViT(c.image_size, c.patch, c.width, c.depth, c.heads)
        self.predictor = Predictor(c.image_size // c.patch, c.width, c.predictor_width, c.predictor_depth, c.predictor_heads or c.heads)
        nn.init.normal_(self.encoder.patch_embed.proj.weight, std=c.patch_std)

    def forward(self, patches, masks_context, masks_target):
        """patches [B, N, 3*p*p], masks as in `Predictor.forward` -> predictions [M*E*B, Kp, D]."""
        return self.predictor(self.encoder(patches, keep=masks_context), masks_context, masks_target)


def build(config):
    """A freshly initialised (model, target encoder); the target starts as a copy of the context encoder."""
    torch.manual_seed(config.seed)
    model = IJEPA(config)
    return model, copy.deepcopy(model.encoder).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def gather_targets(tokens, masks_target, contexts=1):
    """Representations to predict: target-encoder tokens [B, N, D], masks [M, B, Kp] -> [M*contexts*B, Kp, D], layer-normed per token.

    Normalising after gathering is the same as before it, on fewer tokens. Rows are ordered as the predictor's.
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


@dataclass
class Split:
    """Images of one split: files, and where they fit in memory their pixels.

    labels: int64 [N], -1 where unknown; paths: relative to root; pixels: uint8 [N, 3, H, W] or None; sizes: int64 [N, 2], width and
    height of the files, which differ from the pixels' where those were resized to a common shape.
    """

    root: Path
    paths: list
    labels: torch.Tensor
    classes: list
    pixels: torch.Tensor = None
    sizes: torch.Tensor = None

    def __len__(self):
        return len(self.paths)

    def subset(self, indices):
        """The same split with these images only."""
        pick = lambda x: None if x is None else x[indices]  # noqa: E731
        return Split(self.root, [self.paths[i] for i in indices.tolist()], self.labels[indices], self.classes, pick(self.pixels), pick(self.sizes))


def open_split(config, name):
    """The `train` or `val` split that --data names; `val` falls back to None where there is no such split. Exits with 2 if no images."""
    if config.data == "toy":
        pixels, labels = common.toy_images(name, config.image_size)
        return in_memory(pixels, labels, [f"{name}/{i:05d}" for i in range(len(pixels))], common.TOY_CLASSES)
    root = Path(config.data).expanduser()
    if not root.exists() and "/" not in config.data:
        root = Path(os.environ.get("DATA", "data")) / config.data
    if config.data == "cifar10" and not (root / "train").is_dir():
        return cifar10_binary(root.parent, name)
    if not root.exists():
        fail(f"no data at {root}: expected a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or any folder of images")
    if (root / "train").is_dir():
        if not (root / name).is_dir():
            return None
        folder = root / name
    elif name == "val":
        return None
    else:
        folder = root
    paths = sorted(p.relative_to(root).as_posix() for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        fail(f"no images in {folder}: looked for {', '.join(sorted(EXTENSIONS))} in it and its subfolders")
    labelled = folder != root and all(p.count("/") >= 2 for p in paths)
    names = [p.split("/")[1] if labelled else "" for p in paths]
    classes = sorted(set(names)) if labelled else []
    labels = torch.tensor([classes.index(n) if labelled else -1 for n in names])
    return Split(root, paths, labels, classes)


def in_memory(pixels, labels, paths, classes):
    """A split whose images are already decoded: pixels uint8 [N, 3, H, W]."""
    sizes = torch.tensor([pixels.shape[3], pixels.shape[2]]).expand(len(pixels), 2)
    return Split(Path(), paths, labels, classes, pixels, sizes)


def cifar10_binary(folder, name):
    """CIFAR-10 from its home page's binary archive in `folder`, downloaded once and checked; nothing is extracted to disk."""
    archive = folder / "cifar-10-binary.tar.gz"
    if not archive.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = archive.with_suffix(".part")
            urllib.request.urlretrieve(CIFAR10_URL, partial)  # noqa: S310  a constant https address
            os.replace(partial, archive)
        except OSError as error:
            fail(f"could not download CIFAR-10 ({error}). Put {CIFAR10_URL} at {archive}, or images at {folder}/cifar10/train/CLASS/ and val/CLASS/")
    with open(archive, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
    if digest != CIFAR10_SHA256:
        fail(f"{archive} has sha256 {digest} instead of {CIFAR10_SHA256}: delete it and try again")
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if name == "train" else ["test_batch.bin"]
    with tarfile.open(archive) as tar:
        raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/{f}").read() for f in files)
        classes = tar.extractfile("cifar-10-batches-bin/batches.meta.txt").read().decode().split()
    rows = torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, 3073).copy())
    labels = rows[:, 0].long()
    return in_memory(rows[:, 1:].reshape(-1, 3, 32, 32), labels, [f"{name}/{classes[y]}/{i:05d}" for i, y in enumerate(labels)], classes)


def to_rgb(image):
    """Any PIL image -> upright RGB: EXIF orientation honoured, 16 bits scaled to 8, palette, grey and CMYK converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values >> 8 if values.max() > 255 else values).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def upright_size(image):
    """(width, height) that an opened but undecoded image will have after `to_rgb`."""
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def random_crop(width, height, scale, generator=None):
    """The crop of RandomResizedCrop, ratio 3/4 to 4/3, with torchvision's draws in torchvision's order -> (top, left, height, width)."""
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*scale, generator=generator).item()
        ratio = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,), generator=generator).item()
            return top, torch.randint(0, width - w + 1, (1,), generator=generator).item(), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crops(sizes, scale, generator):
    """`random_crop` for a whole batch at once, same distribution: sizes [B, 2] (width, height) -> float [B, 4] (top, left, height, width)."""
    sizes = sizes.double()
    u = torch.rand(len(sizes), 12, 2, generator=generator, dtype=torch.float64)
    area = sizes.prod(1)[:, None] * (scale[0] + (scale[1] - scale[0]) * u[:, :10, 0])
    ratio = torch.exp((2 * u[:, :10, 1] - 1) * math.log(4 / 3))
    tries = torch.stack([(area * ratio).sqrt().round(), (area / ratio).sqrt().round()], dim=2)  # [B, 10, 2]
    fits = ((tries > 0) & (tries <= sizes[:, None])).all(2)
    pick = fits.double().argmax(1)
    chosen = tries[torch.arange(len(sizes)), pick]
    aspect = sizes[:, 0] / sizes[:, 1]
    whole = torch.stack([torch.minimum(sizes[:, 0], (sizes[:, 1] * 4 / 3).round()), torch.minimum(sizes[:, 1], (sizes[:, 0] * 4 / 3).round())], 1)
    chosen = torch.where(fits.any(1)[:, None], chosen, torch.where(((aspect < 3 / 4) | (aspect > 4 / 3))[:, None], whole, sizes))
    corner = (u[:, 10] * (sizes - chosen + 1)).floor()
    corner = torch.where(fits.any(1)[:, None], corner, ((sizes - chosen) / 2).floor())
    return torch.stack([corner[:, 1], corner[:, 0], chosen[:, 1], chosen[:, 0]], dim=1).float()


def resampling_weights(start, length, size_in, size_out, bicubic):
    """PIL's antialiased resampling of [start, start + length) as matrices: start, length [B] -> [B, size_out, size_in]."""
    step = (length / size_out)[:, None, None]
    centre = start[:, None, None] + (torch.arange(size_out, device=start.device)[:, None] + 0.5) * step
    pixel = torch.arange(size_in, device=start.device) + 0.5
    x = ((pixel - centre) / step.clamp(min=1)).abs()
    if bicubic:  # a = -0.5
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, torch.zeros_like(x)))
    else:
        weights = (1 - x).clamp(min=0)
    inside = (pixel > start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weights = weights * inside
    return weights / weights.sum(-1, keepdim=True)


def crop_resize(images, boxes, size, flip=None, bicubic=False):
    """Crop and resize a batch as PIL does, as two matrix products: [B, 3, H, W], boxes [B, 4] (top, left, height, width) -> [B, 3, size, size].

    flip: bool [B], mirror these. Values are not rounded to integers; bicubic overshoot is clipped to 0..255.
    """
    top, left, height, width = boxes.unbind(1)
    rows = resampling_weights(top, height, images.shape[2], size, bicubic)
    columns = resampling_weights(left, width, images.shape[3], size, bicubic)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    images = rows[:, None] @ images.float() @ columns.transpose(1, 2)[:, None]
    return images.clamp(0, 255) if bicubic else images


def normalize(images):
    """0..255 -> the range networks expect: ImageNet mean and std. [B, 3, H, W]."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] * 255 for v in (MEAN, STD))
    return (images.float() - mean) / std


def decode_crop(path, box_of, size, bicubic=False):
    """Decode a file and resize a crop of it in one go -> uint8 [3, size, size]. box_of(width, height) -> (top, left, height, width).

    A JPEG is decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 that still has the pixels the crop needs (`draft`).
    """
    with Image.open(path) as image:
        width, height = upright_size(image)
        top, left, h, w = box_of(width, height)
        need = max(size / w, size / h)
        turned = (width, height) != image.size
        image.draft("RGB", tuple(math.ceil(side * min(1, need)) for side in ((height, width) if turned else (width, height))))
        rgb = to_rgb(image)
        fx, fy = rgb.width / width, rgb.height / height
        box = (left * fx, top * fy, min(rgb.width, (left + w) * fx), min(rgb.height, (top + h) * fy))
        rgb = rgb.resize((size, size), Image.BICUBIC if bicubic else Image.BILINEAR, box=box)
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def centre_box(width, height, size):
    """What the evaluation transform sees of an image: the central square, size/(size*256//224) of the shorter side. (top, left, height, width)

    An image that already is size x size is used whole.
    """
    if (width, height) == (size, size):
        return 0, 0, size, size
    side = min(width, height) * size / int(size * 256 / 224)
    return (height - side) / 2, (width - side) / 2, side, side


class Batches(Dataset):
    """Item t: this rank's part of the batch of step t, a pure function of (seed, t), so that workers and resuming change nothing.

    A dict: `indices` int64 [b]; either `pixels` uint8 [b, 3, S, S], decoded and cropped, or `boxes` float [b, 4] to crop the
    split's pixels in memory on the device; `flip` bool [b]; `masks`, one pair for each micro-batch; `bad`, files that could not be read.
    """

    def __init__(self, split, config, world, batch, crop_scale, flip, bicubic=False, purpose="train", masks=True):
        self.split, self.config, self.world, self.batch = replace(split, pixels=None), config, world, batch
        self.crop_scale, self.flip, self.bicubic, self.purpose, self.masks = crop_scale, flip, bicubic, purpose, masks
        self.canvas = None if split.pixels is None else (split.pixels.shape[3], split.pixels.shape[2])

    @functools.lru_cache(maxsize=2)  # noqa: B019  lives as long as the loader
    def order(self, epoch):
        """Order of the images in an epoch."""
        return torch.randperm(len(self.split), generator=generator(self.config.seed, "order", self.purpose, epoch))

    def __getitem__(self, step):
        n, rank, size = len(self.split), self.world.rank, self.world.size
        start, end = step * self.batch, (step + 1) * self.batch
        epochs = torch.cat([self.order(e) for e in range(start // n, (end - 1) // n + 1)])
        indices = epochs[start % n : start % n + self.batch]  # of the global batch
        first, last = rank * self.batch // size, (rank + 1) * self.batch // size
        key = (self.config.seed, self.purpose, step)
        item = {"bad": []}
        if self.flip:
            item["flip"] = (torch.rand(self.batch, generator=generator(*key, "flip")) < 0.5)[first:last]
        if self.canvas:
            boxes = random_crops(self.split.sizes[indices], self.crop_scale, generator(*key, "crop"))
            scale = torch.tensor(self.canvas)[[1, 0, 1, 0]] / self.split.sizes[indices][:, [1, 0, 1, 0]]
            item |= {"indices": indices[first:last], "boxes": (boxes * scale)[first:last]}
        else:
            pixels, used = zip(*(self.read(int(indices[i]), key + (i,), item["bad"]) for i in range(first, last)))
            item |= {"indices": torch.tensor(used), "pixels": torch.stack(pixels)}
        if self.masks:
            group, micro = self.config.group or self.batch, micro_batch(self.config, self.world)
            masks = sample_masks(self.config, step, first, last)
            item["masks"] = []
            for low in range(first, last, micro):
                context, target = masks[low // group - first // group]
                rows = slice(low % group, low % group + micro)
                item["masks"].append((context[:, rows].contiguous(), target[:, rows].contiguous()))
        return item

    def read(self, index, key, bad):
        """Decode and crop image `index`; one that cannot be read is noted in `bad` and the next image takes its place."""
        for offset in range(100):
            now = (index + offset) % len(self.split)
            path = self.split.root / self.split.paths[now]
            try:
                box_of = lambda w, h: random_crop(w, h, self.crop_scale, generator(*key))  # noqa: E731
                return decode_crop(path, box_of, self.config.image_size, self.bicubic), now
            except UNREADABLE as error:
                bad.append(f"{path}: {error}")
        fail(f"100 images in a row could not be read, the last was {path}")


# What PIL raises on broken files: OSError for most, SyntaxError and struct or value errors from some header parsers.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, Image.DecompressionBombError)


class Images(Dataset):
    """Item i: image i of a split under the evaluation transform, uint8 [3, S, S]; where `canvas` (width, height) is given, the whole
    image resized to it; with its size [width, height], and an error text, '' if it could be read."""

    def __init__(self, split, size, canvas=None):
        self.split, self.size, self.canvas = split, size, canvas

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        path = self.split.root / self.split.paths[index]
        try:
            if self.canvas is None:
                pixels = decode_crop(path, lambda w, h: centre_box(w, h, self.size), self.size, bicubic=True)
                return pixels, torch.zeros(2, dtype=torch.long), ""
            with Image.open(path) as image:
                size = upright_size(image)
                if min(size) >= 2 * max(self.canvas):
                    image.draft("RGB", self.canvas)
                rgb = to_rgb(image)
                rgb = rgb if rgb.size == self.canvas else rgb.resize(self.canvas, Image.BILINEAR)
                return torch.from_numpy(np.array(rgb)).permute(2, 0, 1), torch.tensor(size), ""
        except UNREADABLE as error:
            width, height = self.canvas or (self.size, self.size)
            return torch.zeros(3, height, width, dtype=torch.uint8), torch.ones(2, dtype=torch.long), f"{path}: {error}"


class BadFiles:
    """Counts unreadable images, names the first ten, and stops the run (exit 2) when there are too many."""

    def __init__(self, log, total, limit):
        self.log, self.total, self.limit, self.seen = log, total, limit, set()

    def add(self, messages):
        """messages: 'path: reason' of files that could not be read."""
        for message in messages:
            if message not in self.seen:
                self.seen.add(message)
                if len(self.seen) <= 10:
                    self.log.say(f"skipped an unreadable image: {message}")
        if len(self.seen) > max(1, self.limit * self.total):
            fail(f"{len(self.seen)} of {self.total} images could not be read, more than --max-bad {self.limit:g} allows")


def worker_count(config, world, streaming):
    """Loading processes a rank: --workers, or what fits the machine; none for data in memory, where a step's draws cost less than a process."""
    if config.workers >= 0:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(12, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))))) if streaming else int(world.device.type == "cuda")


def cache_pixels(split, config, world, log):
    """Decode a split into memory if it fits --cache: images of one small size as they are, others resized to a common square.

    Crops are drawn in the files' own coordinates, so that resizing to a square changes no aspect ratio. Unreadable images are left out.
    """
    if split.pixels is not None:
        return split
    side = int(config.image_size * 256 / 224)
    canvas, few = (side, side), set()
    for path in split.paths[:64]:
        with contextlib.suppress(*UNREADABLE), Image.open(split.root / path) as image:
            few.add(upright_size(image))
    if len(few) == 1 and max(next(iter(few))) <= side:
        canvas = next(iter(few))
    if len(split) * 3 * canvas[0] * canvas[1] > config.cache * 2**30:
        return split
    loader = DataLoader(Images(split, side, canvas), batch_size=256, num_workers=worker_count(config, world, streaming=True))
    bad = BadFiles(log, len(split), config.max_bad)
    pixels, sizes, good = [], [], []
    for batch, size, errors in loader:
        bad.add([e for e in errors if e])
        good.append(torch.tensor([not e for e in errors]))
        pixels.append(batch)
        sizes.append(size)
    good = torch.cat(good).nonzero()[:, 0]
    split.pixels, split.sizes = torch.cat(pixels), torch.cat(sizes)
    return split if len(good) == len(split) else split.subset(good)


def make_loader(batches, steps, config, world):
    """Iterate over `batches` for these steps, ahead of time in worker processes where that helps."""
    workers = worker_count(config, world, streaming=batches.canvas is None)
    return iter(DataLoader(batches, batch_size=None, sampler=steps, num_workers=workers, pin_memory=world.device.type == "cuda",
                           prefetch_factor=2 if workers else None))  # fmt: skip


def make_images(item, pixels, size, device, bicubic=False):
    """What the loader gave -> normalised images float [b, 3, S, S] on the device; crops of pixels in memory are made here."""
    flip = item["flip"].to(device, non_blocking=True) if "flip" in item else None
    if "boxes" in item:
        images = pixels[item["indices"].to(pixels.device, non_blocking=True)]
        return normalize(crop_resize(images, item["boxes"].to(device, non_blocking=True), size, flip, bicubic))
    images = normalize(item["pixels"].to(device, non_blocking=True))
    return images if flip is None else torch.where(flip[:, None, None, None], images.flip(3), images)


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


def schedules(config, step, steps):
    """(lr, weight decay, EMA momentum) of step 0, 1, ... of a run of `steps`; the released code advances lr and decay before the step."""
    c = config
    stretched = int(c.schedule_scale * steps)
    lr = common.warmup_cosine_schedule(step + 1, stretched, int(c.warmup * steps), c.lr_start, c.lr, c.lr_final)
    decay = common.cosine_schedule(step + 1, stretched, c.weight_decay, c.weight_decay_final)
    return lr, decay, common.linear_schedule(step, c.schedule_scale * steps, c.momentum, c.momentum_final)


def make_optimizer(model):
    """AdamW over four groups: encoder and predictor decayed, encoder and predictor undecayed. lr and decay are set in each step."""
    groups = common.parameter_groups(model.encoder, model.predictor)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def effective_rank(features):
    """exp of the entropy of the normalised singular values of centred features [B, D]: 1 = collapsed, at most min(B, D)."""
    values = torch.linalg.svdvals((features - features.mean(0)).float())
    p = values / values.sum().clamp(min=1e-12)
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum())


def train(config, world, out, log_start=None):
    """The training loop. Returns (model, target encoder) after the last step; exits with 0 on SIGTERM or SIGINT, 3 on three bad steps."""
    device, dtype = world.device, common.choose_precision(config.precision, world.device)
    split = open_split(config, "train")
    model, target = build(config)
    if config.init:
        weights = read_checkpoint(config.init, config)
        load_weights(model, target, weights, config.init)
    model, target = model.to(device), target.to(device)
    if config.compile:
        model.compile(dynamic=True)  # the number of context tokens changes in every step
        target.compile()
    model = common.distribute(model, world, config.shard)
    target = common.distribute(target, world, config.shard)
    plain = model.module if hasattr(model, "module") else model
    optimizer, ema = make_optimizer(plain), EMA(target, plain.encoder)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    start, streak = 0, torch.zeros((), device=device)
    if config.resume and (out / "last.pt").exists():
        state = read_own_checkpoint(out / "last.pt", config)
        common.load_full_state(model, state["model"], optimizer, state["optimizer"])
        common.load_full_state(target, state["target"])
        scaler.load_state_dict(state["scaler"])
        start, streak = state["step"], state["streak"].to(device)

    log = Log(out, world, total=0, start=start)
    split = cache_pixels(split, config, world, log)
    steps = config.steps or max(1, int(config.epochs * max(1, len(split) // config.batch)))
    if start >= steps:
        log.say(f"{out} is trained already: {start} of {steps} steps")
        return plain, target, split
    if world.rank == 0:
        (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    batches = Batches(split, config, world, config.batch, config.crop_scale, config.flip)
    loader = make_loader(batches, range(start, steps), config, world)
    pixels = None if split.pixels is None else split.pixels.to(device)
    bad_files = BadFiles(log, len(split), config.max_bad)
    trainable = [p for p in plain.parameters() if p.requires_grad]
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (plain.encoder, plain.predictor)]
    log.say(f"{out}: {len(split)} images, {steps} steps of {config.batch} on {world.size} x {device.type} in {str(dtype)[6:]}, "
            f"encoder {millions[0]:.2f} M, predictor {millions[1]:.2f} M parameters")  # fmt: skip
    log = Log(out, world, steps, start)
    log.catch_signals()

    def save(step):
        model_state, optimizer_state = common.full_state(model, optimizer)
        target_state, _ = common.full_state(target)
        if world.rank == 0:
            common.save_checkpoint(out / "last.pt", dict(
                script="ijepa", step=step, config=asdict(config), model=model_state, target=target_state, optimizer=optimizer_state,
                scaler=scaler.state_dict(), streak=streak.cpu()))  # fmt: skip

    waited, window, since = 0.0, start, time.monotonic()
    for step in range(start, steps):
        tick = time.monotonic()
        item = next(loader)
        waited += time.monotonic() - tick
        bad_files.add(item["bad"])
        lr, decay, momentum = schedules(config, step, steps)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay if group["decay"] else 0.0

        images = make_images(item, pixels, config.image_size, device)
        patches = plain.encoder.patch_embed.patchify(images)  # [b, N, 3*p*p], once for both encoders
        loss, parts = torch.zeros((), device=device), len(item["masks"])
        for i, (mine, masks) in enumerate(zip(patches.chunk(parts), item["masks"])):
            masks_context, masks_target = (m.to(device, non_blocking=True) for m in masks)
            with no_sync(model, config.shard, last=i == parts - 1), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                with torch.no_grad():
                    tokens = target(mine)  # [m, N, D]
                    targets = gather_targets(tokens, masks_target, config.contexts)
                part = jepa_loss(model(mine, masks_context, masks_target), targets) / parts
                scaler.scale(part).backward()
            loss += part.detach()

        scaler.unscale_(optimizer)
        norm = gradient_norm(trainable)
        applied = (loss + norm).isfinite()  # on the device; gradients are averaged over ranks, so all ranks agree
        streak = (streak + 1) * ~applied
        if not scaler.is_enabled():
            optimizer.found_inf = (~applied).float()  # the fused kernel then leaves weights and moments as they are
        scaler.step(optimizer)
        scaler.update()
        ema.update(momentum, applied)
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if done % config.log_every == 0 or done == steps or (log.stop and world.size == 1):
            pooled = tokens.float().mean(1)
            numbers = torch.stack([loss, norm, streak, pooled.std(0).mean(), torch.tensor(float(bool(log.stop)), device=device)])
            numbers = common.mean_over_ranks(numbers).tolist()  # the only host-device sync
            elapsed, now = time.monotonic() - since, time.monotonic()
            row = dict(loss=numbers[0], lr=lr, images_per_s=config.batch * (done - window) / elapsed, data_wait=waited / elapsed)
            log.write(step=done, **row, weight_decay=decay, momentum=momentum, grad_norm=numbers[1], context=masks_context.shape[-1],
                      target=masks_target.shape[-1], feature_std=numbers[3], feature_rank=effective_rank(pooled).item(),
                      memory_gib=memory_gib(device))  # fmt: skip
            log.progress(done, **row)
            waited, window, since = 0.0, done, now
            if numbers[2] >= 3:
                fail(f"loss or gradients were not finite in {numbers[2]:.0f} steps in a row, at step {done}; {out}/last.pt holds the last good "
                     "weights. Lower --lr, or use --precision fp32.", code=3)  # fmt: skip
            if numbers[4] and done < steps:
                save(done)
                log.close()
                log.say(f"stopped at step {done}; continue with: {resume_command(out)}")
                raise SystemExit(0)
        if done % config.save_every == 0 or done == steps:
            save(done)
    log.close()
    return plain, target, split


def no_sync(model, shard, last):
    """Gradients are exchanged in the last backward pass of a step only."""
    if shard:
        model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


def gradient_norm(parameters):
    """L2 norm of all gradients, a 0-dim tensor on the device (gathered from the shards where they are sharded)."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def memory_gib(device):
    """Peak memory so far: of the device, or on the CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def resume_command(out):
    """The command line that continues this run."""
    words = [w for w in sys.argv[1:] if w != "--resume"]
    if "--out" not in words and not any(w.startswith("--out=") for w in words):
        words += ["--out", str(out)]
    launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}" if "LOCAL_WORLD_SIZE" in os.environ else "python"
    return shlex.join([*launcher.split(), Path(sys.argv[0]).name, *words, "--resume"])


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Features:
    """Of N images: pooled [N, D] (mean over patch tokens after the final norm), concat4 [N, 4D] (the same of the last four blocks,
    each after the final norm, last block last), labels int64 [N], paths [N], and tokens [N, T, D] if asked for."""

    pooled: torch.Tensor
    concat4: torch.Tensor
    labels: torch.Tensor
    paths: list
    tokens: torch.Tensor = None


@torch.no_grad()
def encode(encoder, images):
    """Frozen features of images [B, 3, S, S]: (pooled [B, D], concat4 [B, 4D], tokens [B, N, D]), float32."""
    layers = encoder(images, layers=range(-min(4, len(encoder.blocks)), 0))
    return layers[-1].mean(1), torch.cat([x.mean(1) for x in layers], dim=1), layers[-1]


def eval_images(split, config, world, log):
    """Iterate over a split under the evaluation transform, shared out over the ranks: (images [B, 3, S, S], indices [B]).

    Every rank gets the same number of batches (the last images wrap around), since sharded encoders run in step.
    Indices of unreadable images are -1.
    """
    n, size = len(split), config.image_size
    mine = torch.arange(world.rank, -(-n // world.size) * world.size, world.size) % n
    if split.pixels is not None and tuple(split.pixels.shape[2:]) == (size, size):
        for indices in mine.split(config.eval_batch):
            yield normalize(split.pixels[indices].to(world.device)), indices
        return
    if split.pixels is not None and not (split.root / split.paths[0]).is_file():  # decoded, but without files to go back to
        for indices in mine.split(config.eval_batch):
            boxes = torch.tensor([centre_box(*wh, size) for wh in split.sizes[indices].tolist()], device=world.device)
            yield normalize(crop_resize(split.pixels[indices].to(world.device), boxes, size, bicubic=True)), indices
        return
    bad = BadFiles(log, n, config.max_bad)
    images = Images(replace(split, pixels=None), size)
    loader = DataLoader(images, config.eval_batch, sampler=mine.tolist(), num_workers=worker_count(config, world, True))
    for indices, (pixels, _, errors) in zip(mine.split(config.eval_batch), loader):
        bad.add([e for e in errors if e])
        yield normalize(pixels.to(world.device)), torch.where(torch.tensor([not e for e in errors]), indices, -1)


def extract(encoder, split, config, world, log, tokens=False):
    """Features of a whole split, on all ranks, in the split's order; unreadable images are left out."""
    columns = ([], [], [], [])
    for images, indices in eval_images(split, config, world, log):
        pooled, concat4, all_tokens = encode(encoder, images)
        for column, value in zip(columns, (indices.to(world.device), pooled, concat4, all_tokens if tokens else all_tokens[:, :0])):
            column.append(value)
    indices, pooled, concat4, all_tokens = (common.gather_over_ranks(torch.cat(c)) for c in columns)
    order = torch.full((len(split),), -1, device=indices.device)
    order[indices[indices >= 0]] = torch.arange(len(indices), device=indices.device)[indices >= 0]
    kept = (order >= 0).nonzero()[:, 0].cpu()
    order = order[order >= 0]
    return Features(pooled[order], concat4[order], split.labels[kept].to(order.device), [split.paths[i] for i in kept.tolist()],
                    all_tokens[order] if tokens else None)  # fmt: skip


def knn(train_features, train_labels, features, ks=(10, 20, 100), temperature=0.07, classes=None):
    """Weighted kNN: cosine similarity, votes exp(similarity / temperature), summed per class -> {k: scores [N, C]}."""
    bank = F.normalize(train_features, dim=1)
    classes = classes or int(train_labels.max()) + 1
    scores = {k: [] for k in ks}
    for queries in F.normalize(features, dim=1).split(1024):
        similarity, nearest = (queries @ bank.T).topk(min(max(ks), len(bank)), dim=1)
        votes, voters = (similarity / temperature).exp(), train_labels[nearest]
        for k in ks:
            empty = torch.zeros(len(queries), classes, dtype=votes.dtype, device=votes.device)
            scores[k].append(empty.scatter_add(1, voters[:, :k], votes[:, :k]))
    return {k: torch.cat(s) for k, s in scores.items()}


def accuracy(scores, labels):
    """Top-1 accuracy in percent of scores [..., N, C]; ties go to the lower class."""
    return 100 * (scores.argmax(-1) == labels).double().mean(-1)


def lars_step(weights, gradients, momenta, lr, decay, momentum=0.9, eta=0.001):
    """One LARS step for H heads at once. weights: list of [H, ...]; lr, decay [H]; 1-D parameters of a head get no trust ratio."""
    for p, g, m in zip(weights, gradients, momenta):
        shape = (-1,) + (1,) * (p.dim() - 1)
        d = g + decay.view(shape) * p
        if p.dim() > 2:
            weight_norm, step_norm = p.flatten(1).norm(dim=1), d.flatten(1).norm(dim=1)
            trust = torch.where((weight_norm > 0) & (step_norm > 0), eta * weight_norm / step_norm.clamp(min=1e-30), 1.0)
            d = d * trust.view(shape)
        m.mul_(momentum).add_(d)
        p.sub_(lr.view(shape) * m)


def sgd_step(weights, gradients, momenta, lr, decay, momentum=0.9):
    """One SGD step with Nesterov momentum for H heads at once; arguments as in `lars_step`."""
    for p, g, m in zip(weights, gradients, momenta):
        shape = (-1,) + (1,) * (p.dim() - 1)
        d = g + decay.view(shape) * p
        m.mul_(momentum).add_(d)
        p.sub_(lr.view(shape) * (d + momentum * m))


class ProbeHeads:
    """All linear heads of a grid on one kind of feature, trained at once: (with BatchNorm or not) x learning rates x weight decays.

    The heads see the same batches, so the batch statistics are shared, and H heads are one matrix product: weight [H, C, D].
    """

    def __init__(self, width, classes, config, device):
        grid = [(bn, lr, wd) for bn in (False, True) for lr in config.probe_lrs for wd in config.probe_decays]
        self.names = [f"{'bn ' if bn else ''}lr {lr:g} wd {wd:g}" for bn, lr, wd in grid]
        self.lr = torch.tensor([lr for _, lr, _ in grid], device=device) * config.probe_batch / 256
        self.decay = torch.tensor([wd for _, _, wd in grid], device=device)
        self.norm = torch.tensor([bn for bn, _, _ in grid], device=device)[:, None]  # [H, 1]
        random, bound = generator(config.seed, "probe", width), width**-0.5
        weight = ((2 * torch.rand(classes, width, generator=random) - 1) * bound).to(device)  # torch's default for Linear
        bias = ((2 * torch.rand(classes, generator=random) - 1) * bound).to(device)
        heads = len(grid)
        self.linear = [weight.repeat(heads, 1, 1), bias.repeat(heads, 1)]
        self.affine = [torch.ones(heads, width, device=device), torch.zeros(heads, width, device=device)]
        self.mean, self.var = torch.zeros(width, device=device), torch.ones(width, device=device)
        for p in self.linear + self.affine:
            p.requires_grad_()
        self.momenta = [torch.zeros_like(p) for p in self.linear + self.affine]
        self.step_function = lars_step if config.probe == "lars" else sgd_step

    def scores(self, x, mean, var):
        """x [B, D] -> [H, B, C]. The norm is folded into the weight: each head has its own matrix anyway."""
        (weight, bias), (gain, shift) = self.linear, self.affine
        scale = torch.where(self.norm, gain * (var + 1e-5).rsqrt(), torch.ones_like(gain))
        offset = torch.where(self.norm, shift - mean * scale, torch.zeros_like(shift))  # [H, D]
        bias = bias + torch.einsum("hcd,hd->hc", weight, offset)
        return torch.einsum("bd,hcd->hbc", x, weight * scale[:, None]) + bias[:, None]

    def step(self, x, labels, factor):
        """One step of all heads on x [B, D], labels [B]; factor: what the schedule multiplies the learning rates with."""
        var, mean = torch.var_mean(x, dim=0, correction=0)
        self.mean.lerp_(mean, 0.1)
        self.var.lerp_(var * len(x) / max(1, len(x) - 1), 0.1)
        scores = self.scores(x, mean, var)
        loss = F.cross_entropy(scores.flatten(0, 1), labels.repeat(len(scores)), reduction="sum") / len(x)
        parameters = self.linear + self.affine
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            self.step_function(self.linear, gradients[:2], self.momenta[:2], self.lr * factor, self.decay)
            self.step_function(self.affine, gradients[2:], self.momenta[2:], self.lr * factor, torch.zeros_like(self.decay))

    @torch.no_grad()
    def evaluate(self, x, labels):
        """Top-1 of each head, [H], percent."""
        correct = [accuracy(self.scores(f, self.mean, self.var), y) * len(y) for f, y in zip(x.split(2048), labels.split(2048))]
        return sum(correct) / len(labels)


def linear_probe(batches, val, classes, config, device):
    """The paper's linear probe: every head of the grid on both features, the best on the validation split reported.

    batches(epoch) yields (pooled, concat4, labels). Returns {"linear": best, "linear_pooled", "linear_concat4", "linear_head": name}.
    """
    kinds = {"pooled": val.pooled, "concat4": val.concat4}
    heads = {kind: ProbeHeads(x.shape[1], classes, config, device) for kind, x in kinds.items()}
    for epoch in range(config.probe_epochs):
        factor = 0.1 ** sum(epoch >= round(share * config.probe_epochs) for share in config.probe_milestones)
        for pooled, concat4, labels in batches(epoch):
            heads["pooled"].step(pooled, labels, factor)
            heads["concat4"].step(concat4, labels, factor)
    result, best = {}, -1.0
    for kind, x in kinds.items():
        top1 = heads[kind].evaluate(x, val.labels)
        result[f"linear_{kind}"] = top1.max().item()
        if top1.max() > best:
            best = top1.max().item()
            result |= {"linear": best, "linear_head": f"{kind} {heads[kind].names[int(top1.argmax())]}"}
    return result


def cached_batches(features, config):
    """Batches of features computed once, in a new order each epoch."""

    def batches(epoch):
        n, batch = len(features.labels), min(config.probe_batch, len(features.labels))
        order = torch.randperm(n, generator=generator(config.seed, "probe order", epoch)).to(features.labels.device)
        for rows in order[: n // batch * batch].split(batch):
            yield features.pooled[rows], features.concat4[rows], features.labels[rows]

    return batches


def augmented_batches(encoder, split, config, world, log):
    """Batches of random crops (scale 0.08 to 1, bicubic) and flips, encoded anew; each rank encodes its share."""
    batch = min(config.probe_batch, len(split) // world.size * world.size)
    data = Batches(split, config, world, batch, (0.08, 1.0), True, bicubic=True, purpose="probe", masks=False)
    pixels, bad = None if split.pixels is None else split.pixels.to(world.device), BadFiles(log, len(split), config.max_bad)

    def batches(epoch):
        per_epoch = len(split) // batch
        for item in make_loader(data, range(epoch * per_epoch, (epoch + 1) * per_epoch), config, world):
            bad.add(item["bad"])
            images = make_images(item, pixels, config.image_size, world.device, bicubic=True)
            pooled, concat4 = (torch.cat(parts) for parts in zip(*(encode(encoder, x)[:2] for x in images.split(config.eval_batch))))
            labels = split.labels[item["indices"]].to(world.device)
            yield common.gather_over_ranks(pooled), common.gather_over_ranks(concat4), common.gather_over_ranks(labels)

    return batches


def lowshot_indices(split, config):
    """Training images of the low-shot probe: those that --lowshot-list names, or a seeded share of each class (at least one)."""
    if config.lowshot_list:
        try:
            wanted = set(Path(config.lowshot_list).read_text().split())
        except OSError as error:
            fail(f"--lowshot-list: {error}")
        found = [i for i, path in enumerate(split.paths) if path in wanted or Path(path).name in wanted]
        return torch.tensor(found) if found else fail(f"none of the {len(wanted)} names in {config.lowshot_list} is a training image")
    order = torch.randperm(len(split), generator=generator(config.seed, "lowshot"))
    chosen = [order[split.labels[order] == c] for c in range(len(split.classes))]
    return torch.cat([c[: max(1, round(config.lowshot * len(c)))] for c in chosen])


def raw_pixels(split, config, world, log):
    """Normalised pixels at no more than 32x32 -> [N, 3*32*32]: what kNN gets without any network."""
    rows = []
    for images, indices in eval_images(split, config, world, log):
        small = images if images.shape[-1] <= 32 else F.adaptive_avg_pool2d(images, 32)
        rows.append(torch.cat([indices[:, None].to(small), small.flatten(1)], dim=1))
    rows = common.gather_over_ranks(torch.cat(rows))
    return rows[rows[:, 0].argsort()][-len(split) :, 1:]


def evaluate(encoder, config, world, log, splits=None):
    """Run the evaluations of --eval on an encoder (a ViT); beside each the same on a random encoder, for kNN on raw pixels too.

    Prints a table, appends it to log.jsonl and returns {"trained": {...}, "random": {...}, "pixels": {...}}, percentages.
    """
    wanted = [name for name in config.eval.split(",") if name != "none"]
    if not wanted:
        return {}
    splits = splits or {}
    train, val = splits.get("train") or open_split(config, "train"), open_split(config, "val")
    if "features" in wanted:
        write_features(encoder, {"train": train, "val": val}[config.features_split] or train, config, world, log)
        wanted.remove("features")
    if wanted and (val is None or not train.classes):
        log.say(f"{config.data} has no {'labels' if val else 'val split'}: {', '.join(wanted)} skipped")
        wanted = []
    if not wanted:
        return {}
    if val.classes != train.classes:
        fail(f"train/ and val/ of {config.data} have different classes: {sorted(set(val.classes) ^ set(train.classes))[:5]} ...")
    if config.eval_limit and config.eval_limit < len(train):
        train = train.subset(torch.randperm(len(train), generator=generator(config.seed, "limit"))[: config.eval_limit].sort().values)
    train, val = (cache_pixels(s, config, world, log) if s.pixels is None and "linear" in wanted and config.probe_augment else s for s in (train, val))
    few = lowshot_indices(train, config) if "lowshot" in wanted else None
    results, random_encoder = {}, build(config)[1].to(world.device).eval()
    for name, network in [("trained", encoder), ("random", random_encoder)][: 2 if config.baselines else 1]:
        network.eval()
        result = results[name] = {}
        test = extract(network, val, config, world, log)
        cached = {"knn", "lowshot"} & set(wanted) or not config.probe_augment
        bank = extract(network, train, config, world, log) if cached else None
        if "knn" in wanted:
            result |= {f"knn{k}": accuracy(s, test.labels).item() for k, s in knn(bank.pooled, bank.labels, test.pooled).items()}
        if "linear" in wanted:
            batches = augmented_batches(network, train, config, world, log) if config.probe_augment else cached_batches(bank, config)
            result |= linear_probe(batches, test, len(train.classes), config, world.device)
        if "lowshot" in wanted:
            shots = extract(network, train.subset(few), config, world, log)
            probe = linear_probe(cached_batches(shots, config), test, len(train.classes), config, world.device)
            result["lowshot"], result["lowshot_head"] = probe["linear"], probe["linear_head"]
    if config.baselines and "knn" in wanted:
        bank, test = (raw_pixels(s, config, world, log) for s in (train, val))
        scores = knn(bank, train.labels.to(bank.device), test)
        results["pixels"] = {f"knn{k}": accuracy(s, val.labels.to(s.device)).item() for k, s in scores.items()}
    names = [n for n in results["trained"] if not n.endswith("_head")]
    log.say(f"{'top-1 %':<16}" + "".join(f"{kind:>10}" for kind in results))
    for n in names:
        log.say(f"{n:<16}" + "".join(f"{r[n]:>10.1f}" if n in r else f"{'':>10}" for r in results.values()))
    log.write(eval=results, images=[len(train), len(val)])
    return results


def write_features(encoder, split, config, world, log):
    """--eval features: an .npz with features [N, D], labels, paths and, with --tokens, tokens [N, T, D]."""
    result = extract(encoder.eval(), split, config, world, log, tokens=config.tokens)
    path = Path(config.features_out or log.path.parent / "features.npz")
    if world.rank == 0:
        arrays = dict(features=result.pooled.float().cpu().numpy(), labels=result.labels.cpu().numpy(), paths=np.array(result.paths))
        if config.tokens:
            arrays["tokens"] = result.tokens.float().cpu().numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
        log.say(f"{path}: features {list(arrays['features'].shape)}" + (f", tokens {list(arrays['tokens'].shape)}" if config.tokens else ""))


@torch.no_grad()
def content_ratio(model, target, images, config):
    """Loss with the context of another image over the loss with the right one: 1 if only positions were learned."""
    masks = sample_masks(replace(config, batch=len(images), group=0), step=0, device="cpu")
    masks_context, masks_target = (m.to(images.device) for m in masks[0])
    patches = target.patch_embed.patchify(images)
    targets = gather_targets(target(patches), masks_target, config.contexts)
    right, wrong = (jepa_loss(model(p, masks_context, masks_target), targets) for p in (patches, patches.roll(1, 0)))
    return (wrong / right).item(), right.item()


# ---------------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_picture(model, target, images, config, path, rows=6, neighbours=3, tile=96):
    """What the method sees and finds: images, context, targets, nearest target blocks of other images, PCA of patch features.

    Each target block is predicted, the prediction averaged over its patches, and compared (cosine) with the target representations
    of the same block in all other images.
    """
    config = replace(config, batch=len(images), group=0)
    (masks_context, masks_target) = (m.to(images.device) for m in sample_masks(config, step=1)[0])
    grid, patch, n = config.image_size // config.patch, config.patch, len(images)
    patches = target.patch_embed.patchify(images)
    tokens = target(patches)
    normed = F.layer_norm(tokens, tokens.shape[-1:])
    predictions = model(patches, masks_context, masks_target).view(len(masks_target), config.contexts, n, masks_target.shape[-1], -1)[:, 0]
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    pixels = ((images * std + mean) * 255).clamp(0, 255)  # [n, 3, S, S]

    def seen(kept):
        """The image with all patches but `kept` grey."""
        mask = torch.zeros(grid * grid, device=images.device)
        mask[kept] = 1
        return mask.view(1, grid, grid).repeat_interleave(patch, 1).repeat_interleave(patch, 2)

    def to_tile(image, filter=Image.NEAREST):
        array = image.permute(1, 2, 0).round().byte().cpu().numpy()
        return Image.fromarray(array).resize((tile, tile), filter)

    centred = tokens.flatten(0, 1) - tokens.flatten(0, 1).mean(0)
    _, _, basis = torch.linalg.svd(centred[:: max(1, len(centred) // 5000)], full_matrices=False)
    colours = centred @ basis[:3].T
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    colours = (((colours - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) * 255).view(n, grid, grid, 3).permute(0, 3, 1, 2)

    shown = min(4, len(masks_target))
    columns = 3 + shown * (1 + neighbours)
    gap, header = 6, 34
    canvas = Image.new("RGB", (columns * (tile + gap) + gap, header + rows * (tile + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    titles = ["image", "context", "PCA"] + [t for i in range(shown) for t in (f"target {i + 1}", *(f"nearest {j + 1}" for j in range(neighbours)))]
    for c, title in enumerate(titles):
        pen.text((gap + c * (tile + gap), 4), title, fill="black")
    pen.text((gap, 18), "nearest: other images whose target representation of this block is closest to its prediction from the context", fill="grey")
    for r in range(rows):
        grey = torch.full_like(pixels[r], 128)
        context = seen(masks_context[0, r])
        tiles = [to_tile(pixels[r], Image.BICUBIC), to_tile(torch.where(context > 0, pixels[r], grey)), to_tile(colours[r], Image.BICUBIC)]
        for i in range(shown):
            block = masks_target[i, r]
            bank = F.normalize(normed[:, block].mean(1), dim=1)  # this block in every image: [n, D]
            similarity = bank @ F.normalize(predictions[i, r].mean(0), dim=0)
            similarity[r] = -2
            mask = seen(block)
            for j in [r, *similarity.topk(neighbours).indices.tolist()]:
                tiles.append(to_tile(torch.where(mask > 0, pixels[j], pixels[j] * 0.25 + 160)))
        for c, picture in enumerate(tiles):
            canvas.paste(picture, (gap + c * (tile + gap), header + r * (tile + gap)))
    canvas.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Official checkpoints
# ---------------------------------------------------------------------------------------------------------------------

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # cannot be read from a file's shapes
ARCHITECTURE = ("image_size", "patch", "width", "depth", "heads", "predictor_width", "predictor_depth", "predictor_heads")


def read_own_checkpoint(path, config=None):
    """A last.pt of this script; with a config its architecture is compared. Exits with 2 if it is of another script or shape."""
    state = common.load_checkpoint(path)
    if not isinstance(state, dict) or state.get("script") != "ijepa":
        found = state.get("script") or ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
        fail(f"{path} is no checkpoint of ijepa.py (found: {found})")
    differ = [] if config is None else [k for k in ARCHITECTURE if state["config"][k] != getattr(config, k)]
    if differ:
        fail(f"{path} was trained with " + ", ".join(f"--{k.replace('_', '-')} {state['config'][k]}, not {getattr(config, k)}" for k in differ))
    return state


def read_checkpoint(path, config):
    """Weights from ours or an official file: {"encoder", "target", "predictor": state dict or None, "architecture": {field: value}}.

    Official: dict of `encoder`, `predictor`, `target_encoder` with keys `module.*`; only the chosen encoder must be there.
    """
    state = common.load_checkpoint(path)
    if isinstance(state, dict) and "script" in state:
        state = read_own_checkpoint(path)
        parts = {name: {k.removeprefix(name + "."): v for k, v in state["model"].items() if k.startswith(name + ".")} for name in ("encoder", "predictor")}
        return dict(encoder=parts["encoder"], predictor=parts["predictor"], target=state["target"],
                    architecture={k: state["config"][k] for k in ARCHITECTURE})  # fmt: skip
    strip = lambda part: {k.removeprefix("module."): v for k, v in part.items()}  # noqa: E731
    parts = {k: strip(state[k]) for k in ("encoder", "predictor", "target_encoder") if isinstance(state, dict) and isinstance(state.get(k), dict)}
    chosen = "target_encoder" if config.encoder == "target" else "encoder"
    encoder = parts.get(chosen)
    if encoder is None or not {"pos_embed", "patch_embed.proj.weight"} <= encoder.keys():
        found = ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
        fail(f"{path} is no I-JEPA checkpoint: expected `{chosen}` with `module.patch_embed.proj.weight`, found: {found}")
    width, _, patch, _ = encoder["patch_embed.proj.weight"].shape
    grid = math.isqrt(encoder["pos_embed"].shape[1])
    heads = HEADS.get(width) or (config.heads if "heads" in common.given_flags(sys.argv[1:]) or config.width == width else 0)
    if not heads or width % heads:
        fail(f"{path} does not say how many attention heads its width of {width} has: add --heads")
    depth = 1 + max(int(k.split(".")[1]) for k in encoder if k.startswith("blocks."))
    architecture = dict(image_size=grid * patch, patch=patch, width=width, depth=depth, heads=heads)
    predictor = parts.get("predictor")
    if predictor:
        depth = 1 + max(int(k.split(".")[1]) for k in predictor if k.startswith("predictor_blocks."))
        architecture |= dict(predictor_width=predictor["predictor_embed.weight"].shape[0], predictor_depth=depth, predictor_heads=heads)
    return dict(encoder=parts.get("encoder", encoder), target=parts.get("target_encoder", encoder), predictor=predictor, architecture=architecture)


def fit_positions(state, key, size):
    """Interpolate a state dict's position table to `size` tokens if it has another number."""
    table = state[key]
    if table.shape[1] == size:
        return state
    old, new = math.isqrt(table.shape[1]), math.isqrt(size)
    print(f"{key}: interpolated from {old}x{old} to {new}x{new} patches", flush=True)
    return state | {key: common.interpolate_positions(table, (old, old), (new, new))}


def load_weights(model, target, weights, path):
    """Put what `read_checkpoint` gave into (model, target encoder), adapting positions to the resolution; exits with 2 on a mismatch."""
    tokens = math.prod(target.grid)
    common.load_state(target, fit_positions(weights["target"], "pos_embed", tokens), f"the target encoder in {path}")
    common.load_state(model.encoder, fit_positions(weights["encoder"], "pos_embed", tokens), f"the context encoder in {path}")
    if weights["predictor"]:
        common.load_state(model.predictor, fit_positions(weights["predictor"], "predictor_pos_embed", tokens), f"the predictor in {path}")


def load_encoder(path, image_size=None, heads=None, encoder="target"):
    """A frozen encoder from any checkpoint this script can read: a ViT that maps images [B, 3, S, S] to tokens [B, N, D].

    image_size: pixels, default the checkpoint's; heads: where the file cannot say; encoder: "target" or "context".
    """
    config = Config(encoder=encoder, width=0, heads=heads or 0)
    weights = read_checkpoint(path, config)
    config = replace(config, **weights["architecture"] | ({"heads": heads} if heads else {}) | ({"image_size": image_size} if image_size else {}))
    vit = ViT(config.image_size, config.patch, config.width, config.depth, config.heads)
    state = weights["target" if encoder == "target" else "encoder"]
    common.load_state(vit, fit_positions(state, "pos_embed", math.prod(vit.grid)), f"the {encoder} encoder in {path}")
    return vit.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def report(model, target, train_split, config, world, log, out):
    """After training: the picture, both proofs of learning, the evaluations."""
    split = open_split(config, "val") or train_split
    some = torch.randperm(len(split), generator=generator(config.seed, "report"))[:256]
    images = next(eval_images(split.subset(some), replace(config, eval_batch=256), World(0, 1, world.device), log))[0]
    ratio, loss = content_ratio(model, target, images, config)
    log.say(f"loss on unseen images {loss:.4f}; with another image's context {ratio:.2f} times that (1.0: only positions were learned)")
    log.write(content_ratio=ratio, val_loss=loss)
    if world.rank == 0:
        draw_picture(model, target, images, config, out / "picture.png", rows=min(6, len(images)))
        log.say(f"{out}/picture.png: what it sees and finds")


def run(config, argv):
    """Train and evaluate, or with --init and no length only evaluate."""
    world = common.start_world(config.device)
    only_evaluate = bool(config.init) and not {"steps", "epochs"} & common.given_flags(argv)
    if config.init and only_evaluate:
        given = common.given_flags(argv)
        architecture = read_checkpoint(config.init, config)["architecture"]
        config = replace(config, **{k: v for k, v in architecture.items() if k not in given})
    check(config, world)
    out = common.choose_out(config.out, "ijepa", config.resume)
    if world.size > 1:
        names = [str(out)]
        dist.broadcast_object_list(names)  # before rank 0 makes it: the others must not see it and take the next
        out = Path(names[0])
    if only_evaluate:
        weights = read_checkpoint(config.init, config)
        encoder = ViT(config.image_size, config.patch, config.width, config.depth, config.heads)
        state = fit_positions(weights["target" if config.encoder == "target" else "encoder"], "pos_embed", math.prod(encoder.grid))
        common.load_state(encoder, state, config.init)
        evaluate(encoder.to(world.device), config, world, Log(out, world))
        return
    model, target, split = train(config, world, out)
    log = Log(out, world, start=10**9)
    report(model, target, split, config, world, log, out)
    evaluate(target if config.encoder == "target" else model.encoder, config, world, log, {"train": split})


def main(argv=None):
    """Command line; see --help."""
    argv = sys.argv[1:] if argv is None else argv
    config = common.parse_config(Config, PRESETS, DATA_PRESETS, argv, __doc__.split("\n\n")[0])
    try:
        run(config, argv)
    except torch.OutOfMemoryError as error:
        fail(f"out of GPU memory ({str(error).splitlines()[0]}). Lower memory with --accumulate 2 (or 4, 8), --precision bf16, --shard, or a smaller "
             "--batch or --eval-batch.", code=4)  # fmt: skip
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
