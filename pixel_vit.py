# SPDX-License-Identifier: MIT
"""Pixel Transformer: every pixel a token; classification, masked autoencoding and diffusion.

"An Image is Worth More Than 16x16 Patches: Exploring Transformers on Individual Pixels", Nguyen, Assran, Jain, Oswald,
Snoek, Chen, ICLR 2025, arXiv 2406.09415. The two methods beside classification: "Masked Autoencoders Are Scalable
Vision Learners", He et al., 2022, 2111.06377; "Scalable Diffusion Models with Transformers", Peebles, Xie, 2023,
2212.09748.

The idea. A vision transformer cuts an image into patches, and so it knows before it learns anything that nearby pixels
belong together. Take that away: every pixel is a token of its own (one Linear on its three colours), and where it
stands is said by a learned embedding that starts as noise. Nothing in the network knows rows, columns or neighbours. It
learns all the same, and at equal image size it is better than any patch size: locality is no bias that vision needs. It
is a finding, not a practical method: the cost grows with the fourth power of the image's side, and four times the
tokens are four times the work, which is why tokens and multiply-adds stand beside every accuracy here.

    image [B, 3, S, S] -> pixels [B, S*S, 3] -> Linear, + positions -> tokens [B, N, D]
      |-- classify:  [class | tokens] -> blocks -> mean -> norm -> Linear -> classes
      |-- mae:       a quarter of the tokens -> blocks -> norm -> narrow decoder, with mask tokens -> all pixels
      '-- diffusion: of a noisy image; blocks scaled by time and class -> noise and variance, pixel by pixel

    python pixel_vit.py                                      # toy images, a few minutes on a laptop; --task mae ...
    python pixel_vit.py --sweep patch --sweep-seeds 3        # the paper's curves: patch, input, permute
    python pixel_vit.py --data cifar10 --task mae            # one GPU; then tune it: --task classify --init LAST.PT ...
    torchrun --nproc-per-node 8 pixel_vit.py --data imagenet --preset vit_b1_imagenet28
    python pixel_vit.py --init DiT-XL-2-256x256.pt --codec vae.ts --sample 16 --guidance 4 --data imagenet

The paper reports, patch 2 against pixels: CIFAR-100 from scratch, T 83.6 / 85.1, S 83.7 / 86.4; after MAE, T 85.7 /
86.0, S 87.4 / 87.7; ImageNet at 28 x 28, S 72.9 / 74.1, B 75.7 / 76.1; DiT-L on ImageNet 256, FID 4.16 / 4.05.
Measured here, on the toy, one core: README has the tables (classification, MAE and its features, samples of the
diffusion, pixels against patches). Nothing ran on a GPU, and none of the paper's configurations was trained.

There is no official code. What follows MAE, DiT and timm equals their numbers (tests/golden/pixel_vit). Choices of our
own, where paper and readers say nothing: the decoder at small widths, no normalised targets with patch 1 (they would
lose the brightness). Departures: the partner of an image in mixup and CutMix is its neighbour in the shuffled batch,
not the batch in reverse, so that ranks need no exchange; RandAugment, erasing and crops are drawn by torch, batched,
from the released distribution and not with its stream of numbers; the linear probe runs on features computed once,
MAE's on random crops. The toy's positions start as sines (`--positions learned` starts as noise, and takes longer).
CIFAR-100 is read from a folder cifar100/train/CLASS/*.png, since its archive is pickled.
"""

import argparse
import contextlib
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import sys
import tarfile
import time
import urllib.request
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import common
from common import OLD_EMA as EMA, OldBlock as Block, OldLog as Log, OldPatchEmbed as PatchEmbed, OldWorld as World, old_fail as fail, old_gather_tokens as gather_tokens, old_generator as generator

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag, and the comment beside it is its help text."""

    preset: str = ""  # a name of PRESETS; by default the one that fits --data and --task
    data: str = "toy"  # toy, cifar10, imagenet, another folder of $DATA (default ./data), or a path
    task: str = "classify"  # classify, mae or diffusion

    # model
    image_size: int = 12  # side of the image, pixels
    patch: int = 1  # side of a patch, pixels: 1 is the paper
    width: int = 64  # width of the transformer (of MAE: of its encoder)
    depth: int = 3  # blocks
    heads: int = 4  # attention heads
    positions: str = "learned"  # learned (from noise), learned-sincos (from sines), sincos (fixed) or none
    position_std: float = 0.02  # std of the initial learned positions
    readout: str = "gap"  # what is classified: gap (mean of the pixel tokens) or cls (class token)
    classes: int = 0  # classes of the task, 0 = as the data have
    permute: int = 0  # pairs of pixels that trade places, in all images alike: the permutation study
    permute_distance: int = 0  # how far apart, |rows| + |columns|, the pixels of a pair may be, 0 = any distance
    init_std: float = 0.0  # std of the initial weights, 0 = Xavier uniform; diffusion has its own initialisation
    patch_std: float = 0.0  # std of the initial patch projection, 0 = as the other weights
    drop_path: float = 0.0  # stochastic depth of the last block, rising linearly from 0 at the first

    # MAE
    mask_ratio: float = 0.75  # share of the tokens that the encoder does not see
    decoder_width: int = 64  # decoder width
    decoder_depth: int = 2  # decoder blocks
    decoder_heads: int = 4  # attention heads of the decoder
    norm_pix: bool = False  # predict pixels normalised within their patch (with patch 1 that loses the brightness)

    # diffusion
    channels: int = 3  # channels of what is denoised: 3 for pixels, the codec's for latents
    downsample: int = 1  # side of the image over that of its latents
    codec: str = ""  # TorchScript file with encode(images in -1..1) and decode(latents): diffusion in its latents
    latent_scale: float = 0.18215  # what latents are multiplied by
    noise_schedule: str = "linear"  # linear or cosine
    timesteps: int = 1000  # diffusion steps
    predict: str = "noise"  # what the network predicts: noise or image
    learn_sigma: bool = True  # learn the variance of a denoising step, by the hybrid loss
    diffusion_loss: str = "mse"  # mse (plus the bound), rescaled_mse or kl (the bound alone)
    label_drop: float = 0.1  # share of the labels that are hidden in training, for guidance

    # augmentation
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop, share of the image
    flip: bool = False  # mirror half of the images
    randaugment: int = 0  # operations of RandAugment on an image (2 in the recipes), each applied with probability 0.5
    randaugment_level: float = 9.0  # mean strength of these, 0 to 10
    jitter: float = 0.0  # strength of the colour jitter (brightness, contrast, saturation, hue)
    grey: float = 0.0  # share of the images that turn grey
    erase: float = 0.0  # share of the images of which a rectangle is replaced by noise
    mixup: float = 0.0  # alpha of mixup, 0 = off
    cutmix: float = 0.0  # alpha of CutMix, 0 = off; with both, each batch gets one of them
    smoothing: float = 0.0  # label smoothing

    # optimisation
    batch: int = 64  # images a step, over all ranks
    accumulate: int = 1  # split a rank's share of the batch into this many forward passes
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps; wins over --epochs
    warmup: float = 0.1  # share of the run in which lr rises
    lr: float = 2e-3  # peak learning rate
    lr_start: float = 0.0  # learning rate of the first step
    lr_final: float = 1e-6  # learning rate at the end of the schedule
    lr_shape: str = "cosine"  # after the warmup: cosine or constant
    weight_decay: float = 0.04  # AdamW weight decay
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW betas
    schedule_scale: float = 1.0  # schedules are this many times longer than the run (>= 1)
    clip: float = 0.0  # largest norm of the gradient, 0 = no limit
    layer_decay: float = 1.0  # learning rate of a block over that of the next
    ema: float = 0.0  # momentum of the averaged weights that are evaluated, 0 = the trained weights themselves

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/pixel_vit, runs/pixel_vit-2, ...
    resume: bool = False  # continue from last.pt in the run's folder, or start if there is none
    init: str = ""  # checkpoint to start from or to evaluate: ours, or an official one of MAE or DiT
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between rows of log.jsonl
    device: str = ""  # cuda, mps or cpu, default the best there is
    precision: str = ""  # bf16, fp16 or fp32, default bf16 where the hardware computes in it, else fp32
    compile: bool = torch.cuda.is_available()  # torch.compile the networks
    recompute: bool = False  # activation checkpointing: less memory, a third more time
    shard: bool = False  # FSDP2 instead of DDP, for models that do not fit one GPU
    workers: int = -1  # data loading processes a rank, -1 = as fits the machine and the data
    cache: float = 2.0  # GiB: data sets whose decoded pixels fit are kept in memory
    max_bad: float = 0.01  # share of unreadable images above which a run stops

    # sweep
    sweep: str = ""  # compare models: patch (at equal image size), input (at equal number of tokens) or permute
    sweep_values: tuple[int, ...] = ()  # patches, or pairs of pixels, to compare; default those that fit
    sweep_seeds: int = 1  # seeds of each

    # evaluation
    eval: str = "accuracy"  # comma-separated: accuracy, knn, linear, reconstruction, generate, bpd, features; or none
    baselines: bool = True  # evaluate a randomly initialised network and raw pixels beside it
    eval_limit: int = 0  # use at most this many training images for knn, 0 = all
    eval_batch: int = 256  # images a forward pass in evaluation, a rank
    probe_epochs: int = 30  # passes of the linear probe
    probe_batch: int = 256  # batch of the linear probe, over all ranks
    probe_lrs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)  # learning rates tried, scaled by batch / 256
    features_split: str = "val"  # train or val
    features_out: str = ""  # file of --eval features, default features.npz in the run's folder
    tokens: bool = False  # --eval features also writes all tokens

    # sampling
    sample: int = 0  # sample this many images: a grid and an .npz
    sample_class: int = -1  # of this class only, -1 = of all in turn
    sampler: str = "ddpm"  # ddpm or ddim
    sampler_steps: str = "250"  # steps of the sampler: a number, sections a,b,c or ddimN
    eta: float = 0.0  # noise of a DDIM step, 0 = deterministic
    guidance: float = 1.5  # classifier-free guidance, 1 = none
    guided_channels: int = 3  # channels that are guided, 0 = all (the released code: the first 3, of latents too)
    clip_samples: bool = True  # clip predicted images to -1..1; off for latents
    sample_batch: int = 250  # images sampled together, a rank
    generate: int = 10000  # images of --eval generate (the paper: 50,000)
    features: str = ""  # judge of samples: last.pt of --task classify, or TorchScript (uint8 -> features, scores)


TINY = dict(width=192, depth=12, heads=12)
SMALL = dict(width=384, depth=12, heads=12)
BASE = dict(width=768, depth=12, heads=12)
LARGE = dict(width=1024, depth=24, heads=16)
TOY = dict(batch=32, steps=1000, positions="learned-sincos", eval="accuracy,knn")  # and the defaults of Config
TOY_MAE = dict(
    task="mae", batch=32, steps=1500, lr=1.5e-3, decoder_width=48, decoder_depth=2, eval="reconstruction,knn,linear",
    positions="learned-sincos",
)  # fmt: skip
TOY_DIFFUSION = dict(  # at so few pixels the linear schedule spends most of its steps on pure noise
    task="diffusion", batch=32, steps=3000, lr=2e-3, weight_decay=0.0, clip=1.0, ema=0.995, lr_shape="constant",
    warmup=0.05, positions="sincos", noise_schedule="cosine", sampler_steps="25", generate=300, guidance=3.0,
    eval="generate",
)  # fmt: skip
# On small images on one GPU; not measured: made from the paper's recipes and the trials in its reproductions.
MIXED = dict(randaugment=2, erase=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, drop_path=0.1)
CIFAR10 = TINY | dict(
    data="cifar10", image_size=32, heads=3, init_std=0.02, crop_scale=(0.4, 1.0), flip=True, batch=512, epochs=60,
    warmup=5 / 60, lr=1e-3, weight_decay=0.1, eval="accuracy,knn", log_every=50,
) | MIXED | dict(erase=0.0, drop_path=0.05)  # fmt: skip
CIFAR10_MAE = TINY | dict(
    task="mae", data="cifar10", image_size=32, heads=3, crop_scale=(0.2, 1.0), flip=True, batch=512, epochs=150,
    warmup=0.1, lr=5e-4, weight_decay=0.05, decoder_width=128, decoder_depth=4, decoder_heads=4,
    eval="reconstruction,knn,linear", log_every=50,
)  # fmt: skip
CIFAR10_DIFFUSION = dict(
    task="diffusion", data="cifar10", image_size=32, width=256, depth=8, heads=4, flip=True, batch=256, steps=30000,
    warmup=0.02, lr=2e-4, lr_shape="constant", weight_decay=0.0, betas=(0.9, 0.999), clip=1.0, ema=0.9999,
    sampler_steps="50", eval="none", log_every=50,
)  # fmt: skip
CPU = dict(image_size=16, width=96, depth=4, heads=3, batch=64, epochs=0, steps=4000, lr=1e-3, weight_decay=0.05)
# The paper's: CIFAR-100 from scratch, ImageNet at 28 x 28, and generation in the latents of 256 x 256 images.
CIFAR = dict(
    data="cifar100", image_size=32, init_std=0.02, crop_scale=(0.2, 1.0), flip=True, jitter=0.4, grey=0.2, batch=1024,
    epochs=2400, warmup=20 / 2400, lr=4e-3, weight_decay=0.3, log_every=50, eval="accuracy,knn",
)  # fmt: skip
IMAGENET28 = dict(
    data="imagenet", image_size=28, init_std=0.02, crop_scale=(0.08, 1.0), flip=True, batch=4096, epochs=300,
    warmup=20 / 300, lr=1.6e-3, weight_decay=0.3, ema=0.9999, log_every=50,
) | MIXED | dict(erase=0.0)  # fmt: skip
CIFAR_MAE = dict(
    task="mae", data="cifar100", image_size=32, crop_scale=(0.2, 1.0), flip=True, batch=4096, epochs=1600,
    warmup=40 / 1600, lr=2.4e-3, lr_final=0.0, weight_decay=0.05, decoder_width=128, decoder_depth=4, decoder_heads=4,
    eval="reconstruction,knn,linear", log_every=50,
)  # fmt: skip
DIT = dict(
    task="diffusion", data="imagenet", image_size=256, channels=4, downsample=8, flip=True, batch=2048, epochs=400,
    warmup=0.25, lr=8e-4, lr_shape="constant", weight_decay=0.0, betas=(0.9, 0.999), ema=0.9999, clip_samples=False,
    generate=50000, eval="none", log_every=50,
)  # fmt: skip
FOLDER = SMALL | dict(data="folder", heads=6, image_size=64, patch=2, flip=True, epochs=100, log_every=50)

PRESETS = {
    "toy": TOY,
    "toy-mae": TOY_MAE,
    "toy-diffusion": TOY_DIFFUSION,
    "cifar10-cpu": CIFAR10 | CPU | dict(randaugment=0, mixup=0.0, cutmix=0.0, drop_path=0.0, init_std=0.0),
    "cifar10-cpu-mae": CIFAR10_MAE | CPU,
    "cifar10-cpu-diffusion": CIFAR10_DIFFUSION | CPU | dict(ema=0.999, weight_decay=0.0, generate=1000),
    "cifar10": CIFAR10,
    "cifar10-patch2": CIFAR10 | dict(patch=2),
    "cifar10-s": CIFAR10 | SMALL | dict(heads=6),
    "cifar10-s-patch2": CIFAR10 | SMALL | dict(heads=6, patch=2),
    "cifar10-mae": CIFAR10_MAE,
    "cifar10-diffusion": CIFAR10_DIFFUSION,
    "folder": FOLDER | MIXED | dict(batch=256, lr=1e-3, weight_decay=0.05, crop_scale=(0.2, 1.0), init_std=0.02),
    "folder-mae": FOLDER | dict(task="mae", batch=512, lr=5e-4, weight_decay=0.05, crop_scale=(0.2, 1.0),
                                decoder_width=192, decoder_depth=4, decoder_heads=6, eval="reconstruction,knn,linear"),
    "folder-diffusion": FOLDER | dict(task="diffusion", batch=256, epochs=400, lr=2e-4, lr_shape="constant",
                                      weight_decay=0.0, clip=1.0, ema=0.9999, eval="none"),
    "imagenet28": IMAGENET28 | SMALL,
    "imagenet28-mae": CIFAR_MAE | SMALL | dict(data="imagenet", image_size=28, epochs=800, warmup=40 / 800),
    "imagenet28-diffusion": CIFAR10_DIFFUSION | dict(data="imagenet", image_size=28),
    "vit_t1_cifar100": CIFAR | TINY,
    "vit_t2_cifar100": CIFAR | TINY | dict(patch=2),
    "vit_s1_cifar100": CIFAR | SMALL,
    "vit_s2_cifar100": CIFAR | SMALL | dict(patch=2),
    "vit_b1_imagenet28": IMAGENET28 | BASE,
    "vit_l1_imagenet28": IMAGENET28 | LARGE,
    "mae_t1_cifar100": CIFAR_MAE | TINY,
    "mae_s1_cifar100": CIFAR_MAE | SMALL | dict(decoder_width=192),
    "mae_b16_finetune": BASE | MIXED | dict(data="imagenet", image_size=224, patch=16, positions="sincos",
                                            crop_scale=(0.08, 1.0), flip=True, batch=1024, epochs=100, warmup=0.05,
                                            lr=2e-3, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=0.65),
    "dit_l1_imagenet256": DIT | LARGE,
    "dit_l2_imagenet256": DIT | LARGE | dict(patch=2),
    "dit_xl2_imagenet256": DIT | dict(width=1152, depth=28, heads=16, patch=2, positions="sincos", batch=256,
                                      epochs=1400, warmup=0.0, lr=1e-4),
}  # fmt: skip
DATA_PRESETS = {"toy": "toy", "cifar10": "cifar10", "imagenet": "imagenet28", "*": "folder"}  # and -mae, -diffusion
EVALUATIONS = {"classify": ("accuracy", "knn", "linear", "features"), "diffusion": ("generate", "bpd"),
               "mae": ("reconstruction", "knn", "linear", "features")}  # fmt: skip


def check(config, world, training=True):
    """Refuse what cannot work, before any work (exit 2)."""
    c = config
    choices = dict(task=tuple(EVALUATIONS), positions=("learned", "learned-sincos", "sincos", "none"),
                   readout=("gap", "cls"), noise_schedule=("linear", "cosine"), predict=("noise", "image"),
                   diffusion_loss=("mse", "rescaled_mse", "kl"), lr_shape=("cosine", "constant"),
                   sampler=("ddpm", "ddim"), features_split=("train", "val"), sweep=("", "patch", "input", "permute"),
                   precision=("", "bf16", "fp16", "fp32"))  # fmt: skip
    for name, known in choices.items():
        if getattr(c, name) not in known:
            fail(f"--{name.replace('_', '-')} {getattr(c, name)!r} is not one of {', '.join(k for k in known if k)}")
    if c.image_size % (c.patch * c.downsample):
        fail(f"--image-size {c.image_size} is not a multiple of --patch {c.patch} x --downsample {c.downsample}")
    widths = [("", c.width, c.heads)] + [("decoder-", c.decoder_width, c.decoder_heads)] * (c.task == "mae")
    for name, width, heads in widths:
        if width % heads or width % 4:
            fail(f"--{name}width {width} must be a multiple of its heads, {heads}, and of 4")
    for name in c.eval.split(","):
        if name not in (*EVALUATIONS[c.task], "none"):
            fail(f"--eval {name!r} is not one of {', '.join(EVALUATIONS[c.task])}, none, the evaluations of {c.task}")
    if c.task == "mae" and c.positions == "none":
        fail("--positions none: a masked autoencoder could not know which pixel to predict")
    if c.task == "mae" and not 0 <= c.mask_ratio < 1:
        fail(f"--mask-ratio {c.mask_ratio} is not in 0 to 1")
    if not 0 <= c.permute <= c.image_size**2 // 2:
        fail(f"--permute {c.permute}: an image of {c.image_size**2} pixels has {c.image_size**2 // 2} pairs")
    if c.permute and c.task != "classify":
        fail(f"--permute is a study of classifiers, not of --task {c.task}")
    if c.task == "diffusion":
        space_timesteps(c.timesteps, c.sampler_steps)
        if "generate" in c.eval and not c.features and c.data != "toy":
            fail("--eval generate needs a judge: --features FILE, last.pt of --task classify or a TorchScript file")
        if c.features and not Path(c.features).is_file():
            fail(f"--features {c.features}: no such file")
        if c.shard and (c.sample or c.eval != "none"):
            fail("--shard trains only; sample and evaluate afterwards with --init RUN/last.pt")
    if c.sample and c.task != "diffusion":
        fail(f"--sample needs a model of --task diffusion, not of {c.task}")
    if c.sweep and c.task != "classify":
        fail(f"--sweep compares classifiers, not --task {c.task}")
    if not training:
        return
    if c.batch % (world.size * c.accumulate):
        fail(f"--batch {c.batch} does not divide into {world.size} ranks x {c.accumulate} accumulations")
    if (c.mixup or c.cutmix) and c.batch // (world.size * c.accumulate) % 2:
        fail("--mixup and --cutmix pair the images of a forward pass: their number must be even")
    if c.schedule_scale < 1:
        fail(f"--schedule-scale {c.schedule_scale} is below 1: the schedules would end before the run does")
    if c.shard and c.precision == "fp16":
        fail("--shard works with bf16 and fp32, not with --precision fp16")


def token_count(config):
    """Pixel (or patch) tokens of an image."""
    return (config.image_size // config.downsample // config.patch) ** 2


def forward_work(config):
    """Multiply-adds of a forward pass on one image: 12 N D^2 + 2 N^2 D a block, and the patch projection."""
    n, d = token_count(config), config.width
    tokens = n if config.task == "diffusion" else n + 1
    return n * d * config.channels * config.patch**2 + config.depth * (12 * tokens * d * d + 2 * tokens**2 * d)


# ---------------------------------------------------------------------------------------------------------------------
# Masks, augmentation, mixing: all batched, on the device, drawn by step and sample
# ---------------------------------------------------------------------------------------------------------------------


def pixel_permutation(side, pairs, distance, seed):
    """The permutation study: `pairs` of pixels trade places, each pixel once at most -> int64 [side * side].

    Partners are at most `distance` apart, |rows| + |columns| (0: anywhere). Where no free pixel has a free partner
    left, there are fewer pairs.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    row, column = np.mgrid[:side, :side].reshape(2, -1)
    order, free = np.arange(side * side), np.ones(side * side, dtype=bool)
    made = 0
    for a in random.permutation(side * side):
        if made == pairs:
            break
        if free[a]:
            near = free & (np.abs(row - row[a]) + np.abs(column - column[a]) <= (distance or 2 * side))
            near[a] = False
            if near.any():
                b = random.choice(np.flatnonzero(near))
                order[[a, b]] = order[[b, a]]
                free[[a, b]] = False
                made += 1
    return torch.from_numpy(order)


def kept_tokens(tokens, ratio):
    """How many tokens the encoder of an MAE sees: cut as the released code cuts, but one at least."""
    return max(1, int(tokens * (1 - ratio)))


def random_masking(noise, ratio):
    """noise [B, N] -> (keep int64 [B, K], of the smallest noise; restore int64 [B, N]; mask float [B, N], 1 = removed).

    Kept tokens stay in the order of their noise inside the encoder; `restore` is the inverse of that order.
    """
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    kept = kept_tokens(noise.shape[1], ratio)
    return shuffle[:, :kept], restore, (restore >= kept).float()


def micro_batch_masks(config, step, first, last, world):
    """MAE: the noise [b, N] that decides what each of a rank's forward passes in this step hides; else nothing."""
    if config.task != "mae":
        return [torch.empty(0)] * config.accumulate
    random = generator(config.seed, "masks", step)
    return list(torch.rand(config.batch, token_count(config), generator=random)[first:last].chunk(config.accumulate))


# Copied from msn.py
def grey_levels(images):
    """Return PIL's grey of images [B, 3, H, W], rounded: [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue + 0.5).floor()


# Copied from msn.py
def shift_hue(images, turns):
    """PIL's hue shift: through 8-bit HSV. images [B, 3, H, W] in 0..255, turns [B] in -0.5..0.5 -> the same shape."""
    value, lowest = images.amax(1), images.amin(1)
    red, green, blue = images.unbind(1)
    span = (value - lowest).clamp(min=1e-6)
    hue = torch.where(value == red, (green - blue) / span, 2 + (blue - red) / span)
    hue = torch.where((value == green) & (value != red), hue, torch.where(value == red, hue, 4 + (red - green) / span))
    hue = (255 * (hue / 6 % 1)).floor()
    saturation = (255 * (value - lowest) / value.clamp(min=1e-6)).floor() / 255
    hue = (hue + (255 * turns).trunc()[:, None, None]) % 256 * (6 / 255)
    places = torch.arange(5.0, 0.0, -2.0, device=images.device)[:, None, None]
    k = (places + hue[:, None]) % 6  # each channel falls and rises once in a turn
    depth = torch.minimum(k, 4 - k).clamp(0, 1)
    return (value[:, None] * (1 - saturation[:, None] * depth)).round_()


# Copied from msn.py
def colour_jitter(images, factors, order):
    """Brightness, contrast, saturation and hue in each image's own order, with PIL's rounding down after each.

    images [B, 3, H, W] in 0..255; factors [B, 4]: three that multiply, 1 changing nothing, and a shift of hue in turns;
    order int64 [B, 4], on the CPU: which of the four comes when. The first three are blends with black, with the mean
    grey and with the grey image, so a place in the order is one blend; hue, which costs most, runs only where it is.
    """
    device = images.device
    blends = torch.where(order == 3, 1.0, factors.gather(1, order))[..., None, None, None]  # [B, 4, 1, 1, 1]
    blends, turns = common.old_send(blends, device), common.old_send(factors[:, 3], device)
    operations = common.old_send(order, device)[..., None, None, None]
    for place in range(4):
        grey, operation = grey_levels(images), operations[:, place]
        mean = (grey.mean((1, 2, 3), keepdim=True) + 0.5).floor()
        base = torch.where(operation == 2, grey, torch.where(operation == 1, mean, 0.0))
        # lerp is exact at factor 1; the 1e-3 is for values that rounding puts just below an integer
        images = torch.lerp(base, images, blends[:, place]).clamp_(0, 255).add_(1e-3).floor_()
        rows = common.old_send(((order[:, place] == 3) & (factors[:, 3] != 0)).nonzero()[:, 0], device)
        images.index_copy_(0, rows, shift_hue(images[rows], turns[rows]))
    return images


OPERATIONS = ("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize add", "color",
              "contrast", "brightness", "sharpness", "shear x", "shear y", "translate x", "translate y")  # fmt: skip
FILL = (124, 116, 104)  # grey of what comes into the image from outside


def channel_tables(images, tables):
    """Replace values by tables: images [B, 3, H, W], whole numbers in 0..255, tables [B, 3, 256]."""
    return tables.gather(2, images.long().flatten(2)).view_as(images)


def equalize(images):
    """PIL's equalisation of each channel's histogram: [B, 3, H, W], whole numbers in 0..255."""
    values = images.long().flatten(2)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    total = values.shape[2]
    highest = (counts > 0).long().mul(torch.arange(256, device=images.device)).amax(2, keepdim=True)
    step = (total - counts.gather(2, highest)).div(255, rounding_mode="floor")
    below = counts.cumsum(2) - counts
    table = (below + step.div(2, rounding_mode="floor")).div(step.clamp(min=1), rounding_mode="floor").clamp(max=255)
    return channel_tables(images, table.where(step > 0, torch.arange(256, device=images.device)).to(images))


def autocontrast(images):
    """Stretch each channel to 0..255, rounding down: [B, 3, H, W], whole numbers."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    scale = 255 / (high - low).clamp(min=1)
    return torch.where(high > low, (images * scale - low * scale + 1e-4).floor().clamp(0, 255), images)


def smooth(images):
    """PIL's SMOOTH filter, 3x3 with a heavy centre; the border stays: what `sharpness` blends with."""
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    inner = F.conv2d(images, (kernel / 13).expand(images.shape[1], 1, 3, 3), groups=images.shape[1])
    blurred = images.clone()
    blurred[:, :, 1:-1, 1:-1] = (inner + 0.5).floor()
    return blurred


def warp(images, matrix):
    """PIL's bicubic affine transform: output pixel (x, y) shows the input at matrix @ (x, y, 1), in pixels.

    images [B, 3, H, W], matrix [B, 2, 3]; what lies outside is FILL. PIL's cubic here has a = -1, not -0.5.
    """
    batch, _, height, width = images.shape
    device = images.device
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    places = torch.stack([x + 0.5, y + 0.5, torch.ones_like(x)]).flatten(1)  # [3, H*W]
    at = matrix.to(images) @ places.to(images)  # [B, 2, H*W]
    inside = ((at >= 0) & (at < common.old_constant(((width,), (height,)), device))).all(1)
    base = (at - 0.5).floor()
    d = at - 0.5 - base
    offsets = torch.arange(-1, 3, device=device)
    t = (d[..., None] - offsets).abs()  # [B, 2, H*W, 4]
    weights = torch.where(t < 1, (t - 2) * t * t + 1, ((5 - t) * t - 8) * t + 4)
    taps = (base[..., None] + offsets).long()
    columns, rows = taps[:, 0].clamp(0, width - 1), taps[:, 1].clamp(0, height - 1)  # [B, H*W, 4]
    index = (rows[..., :, None] * width + columns[..., None, :]).flatten(1)  # [B, H*W*16]
    found = images.flatten(2).gather(2, index[:, None].expand(-1, images.shape[1], -1)).unflatten(2, (-1, 4, 4))
    found = torch.einsum("bcnyx,bny,bnx->bcn", found, weights[:, 1], weights[:, 0])
    fill = common.old_constant(FILL, device).to(images)[:, None]
    return torch.where(inside[:, None], (found + 1e-3).floor().clamp(0, 255), fill).view_as(images)


def operate(name, images, value):
    """One operation of RandAugment: images [B, 3, H, W], whole numbers in 0..255, value [B] as PIL takes it."""
    value = value.to(images)[:, None, None, None]
    if name == "autocontrast":
        return autocontrast(images)
    if name == "equalize":
        return equalize(images)
    if name == "invert":
        return 255 - images
    if name == "posterize":  # value: the bits that stay
        step = 2 ** (8 - value)
        return (images / step).floor() * step
    if name == "solarize":
        return torch.where(images < value, images, 255 - images)
    if name == "solarize add":
        return torch.where(images < 128, (images + value).clamp(max=255), images)
    if name in ("color", "contrast", "brightness", "sharpness"):
        grey = grey_levels(images)
        mean = (grey.mean((1, 2, 3), keepdim=True) + 0.5).floor()
        base = dict(color=grey, contrast=mean, brightness=torch.zeros_like(mean), sharpness=None)[name]
        base = smooth(images) if base is None else base
        return (torch.lerp(base.expand_as(images), images, value).clamp(0, 255) + 1e-3).floor()
    value, (height, width) = value.flatten(), images.shape[2:]
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    if name == "rotate":  # counter-clockwise, degrees, about the centre
        cos, sin, x, y = (-value).deg2rad().cos(), (-value).deg2rad().sin(), width / 2, height / 2
        matrix = [cos, sin, x - x * cos - y * sin, -sin, cos, y + x * sin - y * cos]
    else:
        matrix = {"shear x": [one, value, zero, zero, one, zero], "shear y": [one, zero, zero, value, one, zero],
                  "translate x": [one, zero, value * width, zero, one, zero],
                  "translate y": [one, zero, zero, zero, one, value * height]}[name]  # fmt: skip
    return warp(images, torch.stack(matrix, dim=1).view(-1, 2, 3))


def operation_value(name, level, sign):
    """What an operation takes at a level [n] in 0..10, with a sign [n] of -1 or 1 where it has one."""
    share, value = level / 10, sign * level / 10
    return {"rotate": 30 * value, "posterize": 4 - (4 * share).trunc(), "solarize add": (110 * share).trunc(),
            "solarize": 256 - (256 * share).trunc(), "color": 1 + 0.9 * value, "contrast": 1 + 0.9 * value,
            "brightness": 1 + 0.9 * value, "sharpness": 1 + 0.9 * value, "shear x": 0.3 * value,
            "shear y": 0.3 * value, "translate x": 0.45 * value,
            "translate y": 0.45 * value}.get(name, torch.zeros_like(level))  # fmt: skip


def draw_augmentation(count, config, random):
    """Parameters for `augment` of `count` images, from a CPU generator."""
    c, places = config, (count, max(1, config.randaugment))
    factors = 1 + c.jitter * (2 * torch.rand(count, 4, generator=random) - 1)
    factors[:, 3] = c.jitter * (torch.rand(count, generator=random) - 0.5)  # a shift of hue, in turns
    level = (c.randaugment_level + 0.5 * torch.randn(places, generator=random)).clamp(0, 10)
    operation = torch.randint(len(OPERATIONS), places, generator=random)
    applied = (torch.rand(places, generator=random) < 0.5) & (c.randaugment > 0)
    return dict(
        operation=operation.where(applied, torch.tensor(-1)), level=level,
        sign=torch.randint(2, places, generator=random) * 2.0 - 1,
        factors=factors, order=torch.rand(count, 4, generator=random).argsort(1),
        grey=torch.rand(count, generator=random) < c.grey,
    )  # fmt: skip


def augment(images, draws):
    """RandAugment, colour jitter and grey of images [B, 3, H, W] in 0..255, by `draw_augmentation` (on the CPU)."""
    device, (factors, order) = images.device, (draws["factors"], draws["order"])
    if (draws["operation"] >= 0).any():
        images = images.round()
    for place, number in itertools.product(range(draws["operation"].shape[1]), range(len(OPERATIONS))):
        rows = (draws["operation"][:, place] == number).nonzero()[:, 0]
        if len(rows):
            name = OPERATIONS[number]
            value = common.old_send(operation_value(name, draws["level"][rows, place], draws["sign"][rows, place]), device)
            rows = common.old_send(rows, device)
            images = images.index_copy(0, rows, operate(name, images[rows], value))
    if (factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any():
        images = colour_jitter(images.round(), factors, order)
    if draws["grey"].any():
        images = torch.where(common.old_send(draws["grey"], device)[:, None, None, None], grey_levels(images), images)
    return images


def draw_erasing(count, size, share, random):
    """Rectangles to erase, for a `share` of the images: int64 [n, 4] (top, left, height, width), 0 where none.

    Area 2 % to a third of the image, aspect 0.3 to 1/0.3 (log-uniform), the first of ten tries that fits.
    """
    u = torch.rand(count, 10, 2, generator=random)
    area, log_ratio = size * size * (0.02 + (1 / 3 - 0.02) * u[..., 0]), math.log(0.3) * (2 * u[..., 1] - 1)
    sides = torch.stack([(area * log_ratio.exp()).sqrt(), (area / log_ratio.exp()).sqrt()], dim=2).round().long()
    fits = (sides < size).all(2)
    chosen = sides[range(count), fits.int().argmax(1)]
    erased = fits.any(1) & (torch.rand(count, generator=random) < share)
    corner = (torch.rand(count, 2, generator=random) * (size - chosen + 1)).long()
    return torch.cat([corner, chosen], dim=1) * erased[:, None]


def erase(images, boxes, noise):
    """Put noise [B, 3, S, S] into boxes [B, 4] (top, left, height, width) of normalised images [B, 3, S, S]."""
    top, left, height, width = boxes.to(images.device)[:, :, None].unbind(1)
    line = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], noise, images)


def draw_mix(random, size, mixup, cutmix):
    """Parameters of mixup or CutMix of a batch, from a numpy generator: (lam, box or None).

    lam: share of the image itself, for CutMix that of the box (top, bottom, left, right) that is clipped at the border.
    """
    use_cutmix = random.random() < 0.5 if mixup and cutmix else bool(cutmix)
    alpha = cutmix if use_cutmix else mixup
    lam = random.beta(alpha, alpha)
    if not use_cutmix:
        return lam, None
    side = int(size * math.sqrt(1 - lam))
    y, x = random.integers(0, size, 2)
    box = [int(np.clip(end, 0, size)) for at in (y, x) for end in (at - side // 2, at + (side + 1) // 2)]
    return 1 - (box[1] - box[0]) * (box[3] - box[2]) / size**2, box


def mix_images(images, partners, lam, box):
    """Blend images [B, 3, S, S] with their partners, or paste a box from there.

    The released code's partners are the batch in reverse; here they are `neighbours`, so that ranks need no exchange.
    """
    if box is None:
        return torch.lerp(partners, images, lam)
    images, (top, bottom, left, right) = images.clone(), box
    images[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return images


def neighbours(x):
    """The other one of each pair of consecutive images: [B, ...] -> [B, ...]."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def smooth_targets(labels, classes, smoothing):
    """Soft targets [B, C] of labels [B]."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


# ---------------------------------------------------------------------------------------------------------------------
# Model: one trunk on pixels; a classifier, a masked autoencoder and a diffusion transformer
# ---------------------------------------------------------------------------------------------------------------------


def make_positions(kind, std, width, grid, special=0):
    """A position table [1, special + grid * grid, D]: learned from noise or from sines, fixed sines, or nothing (0).

    A parameter even where it is fixed: in the state dict, as checkpoints have it.
    """
    table = common.old_sincos_2d(width, grid, grid).float()
    table = torch.cat([torch.zeros(special, width), table])
    if kind in ("learned", "none"):
        table = torch.randn_like(table) * (std if kind == "learned" else 0)
    return nn.Parameter(table[None], requires_grad=kind.startswith("learned"))


def patchify(images, patch):
    """Images [B, C, H, W] -> [B, N, p*p*C], in a patch row by row, channels fastest: the order of MAE and DiT."""
    return images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens, patch):
    """The inverse of `patchify`: [B, N, p*p*C] -> [B, C, H, W], square."""
    side = math.isqrt(tokens.shape[1])
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))  # [B, h, w, p, q, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def run_blocks(blocks, x, recompute, *arguments):
    """Apply blocks in turn, with activation checkpointing if asked; arguments: sequences with an entry a block."""
    for i, block in enumerate(blocks):
        given = [None if a is None else a[i] for a in arguments]
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, *given, use_reentrant=False)
        else:
            x = block(x, *given)
    return x


class Trunk(nn.Module):
    """Tokeniser, class token, positions and blocks. With patch 1 the tokeniser is one Linear on a pixel's colours."""

    def __init__(self, config):
        super().__init__()
        c, self.grid = config, config.image_size // config.patch
        self.recompute = c.recompute
        self.patch_embed = PatchEmbed(c.patch, c.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = make_positions(c.positions, c.position_std, c.width, self.grid, special=1)
        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        self.blocks = nn.ModuleList(Block(c.width, c.heads, drop_path=rate) for rate in rates)
        order = pixel_permutation(c.image_size, c.permute, c.permute_distance, c.seed) if c.permute else None
        self.register_buffer("permutation", order)  # in the checkpoint, where there is one

    def embed(self, images):
        """Images [B, 3, H, W], their pixels permuted first -> tokens [B, N, D] with positions."""
        if self.permutation is not None:
            images = images.flatten(2)[:, :, self.permutation].view_as(images)
        return self.patch_embed(self.patch_embed.patchify(images)) + self.pos_embed[:, 1:]

    def run(self, tokens, drop=None):
        """[class | tokens] through the blocks, before any norm: tokens [B, N, D] -> [B, 1 + N, D].

        drop: uniforms [depth, 2, B] for stochastic depth.
        """
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return run_blocks(self.blocks, torch.cat([first, tokens], dim=1), self.recompute, drop)

    def initialise(self, config):
        """Linear and patch weights normal(init_std), or Xavier uniform (the packed qkv as one matrix); tokens 0.02."""
        if config.init_std:
            self.apply(functools.partial(common.old_init_weights, std=config.init_std))
        else:
            self.apply(xavier_uniform)
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(config.width, -1))
        if config.patch_std:
            nn.init.normal_(self.patch_embed.proj.weight, std=config.patch_std)
        nn.init.normal_(self.cls_token, std=0.02)


def xavier_uniform(module):
    """For `module.apply`: Linear weights Xavier uniform, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Classifier(Trunk):
    """A linear layer on the mean of the pixel tokens, normed after it is taken (gap), or on the normed class token."""

    def __init__(self, config):
        super().__init__(config)
        self.readout = config.readout
        norm = nn.LayerNorm(config.width, eps=1e-6)
        self.fc_norm, self.norm = (norm, None) if config.readout == "gap" else (None, norm)
        self.head = nn.Linear(config.width, config.classes)
        self.initialise(config)

    def forward(self, images, drop=None, features=False):
        """Images [B, 3, H, W] -> logits [B, C], or with `features` what the head reads [B, D] and all tokens."""
        x = self.run(self.embed(images), drop)
        if self.readout == "gap":
            read = self.fc_norm(x[:, 1:].mean(1))
        else:
            x = self.norm(x)
            read = x[:, 0]
        return (read, x) if features else self.head(read)


class MAE(Trunk):
    """Masked autoencoder: the encoder sees a quarter of the pixels, a narrow decoder paints all of them."""

    def __init__(self, config):
        super().__init__(config)
        c, self.mask_ratio = config, config.mask_ratio
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        self.decoder_embed = nn.Linear(c.width, c.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_width))
        self.decoder_pos_embed = make_positions(c.positions, c.position_std, c.decoder_width, self.grid, special=1)
        self.decoder_blocks = nn.ModuleList(Block(c.decoder_width, c.decoder_heads) for _ in range(c.decoder_depth))
        self.decoder_norm = nn.LayerNorm(c.decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(c.decoder_width, c.patch**2 * 3)
        self.initialise(config)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images, noise=None, features=False):
        """Images [B, 3, H, W], noise [B, N] -> (predicted patches [B, N, p*p*3], mask [B, N], 1 = removed).

        With `features`: without masking, (mean of the normed tokens [B, D], normed [class | tokens] [B, 1+N, D]).
        """
        x = self.embed(images)
        if features:
            x = self.norm(self.run(x))
            return x[:, 1:].mean(1), x
        keep, restore, mask = random_masking(noise, self.mask_ratio)
        x = self.decoder_embed(self.norm(self.run(gather_tokens(x, keep))))  # [B, 1+K, Dd]
        hidden = self.mask_token.to(x.dtype).expand(len(x), restore.shape[1] - keep.shape[1], -1)
        tokens = gather_tokens(torch.cat([x[:, 1:], hidden], dim=1), restore)
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        x = run_blocks(self.decoder_blocks, x, self.recompute)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:], mask


def timestep_embedding(t, width):
    """[cos(t f) | sin(t f)], f_k = 10000^(-k / (width // 2)): t [B] -> [B, width]; an odd width ends with a 0."""
    half = width // 2
    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half, device=t.device).float() / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


class TimestepEmbedder(nn.Module):
    """A timestep t [B] -> [B, D]."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        """t: original timesteps, 0..999, also where the sampler takes fewer steps."""
        return self.mlp(timestep_embedding(t, 256))


class LabelEmbedder(nn.Module):
    """A class [B] -> [B, D]; the last row stands for no class, which guidance needs."""

    def __init__(self, classes, width, null):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + null, width)

    def forward(self, labels):
        """[B] -> [B, D]."""
        return self.embedding_table(labels)


def modulate(x, shift, scale):
    """Layer norm without affine, then scale and shift of a sample: x [B, N, D], shift, scale [B, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class TanhMLP(common.OLD_MLP):
    """DiT's MLP: GELU by tanh."""

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ConditionedBlock(nn.Module):
    """adaLN-zero: the condition scales, shifts and gates attention and MLP; all gates are 0 at the start."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = common.OldAttention(width, heads)
        self.mlp = TanhMLP(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition):
        """x [B, N, D], condition [B, D] -> [B, N, D]."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(condition).chunk(6, 1)
        x = x + gate_msa[:, None] * self.attn(modulate(x, shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm and Linear to the patch's pixels."""

    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, condition):
        """x [B, N, D], condition [B, D] -> [B, N, out]."""
        return self.linear(modulate(x, *self.adaLN_modulation(condition).chunk(2, 1)))


class DiT(nn.Module):
    """Diffusion transformer; with patch 1 every pixel, or every place of a latent, is a token. No class token."""

    def __init__(self, config):
        super().__init__()
        c, self.patch, self.recompute = config, config.patch, config.recompute
        self.null = c.classes  # the label that stands for none
        self.x_embedder = PatchEmbed(c.patch, c.width, c.channels)
        grid = c.image_size // c.downsample // c.patch
        self.pos_embed = make_positions(c.positions, c.position_std, c.width, grid)
        self.t_embedder = TimestepEmbedder(c.width)
        self.y_embedder = LabelEmbedder(c.classes, c.width, c.label_drop > 0 or not c.classes)
        self.blocks = nn.ModuleList(ConditionedBlock(c.width, c.heads) for _ in range(c.depth))
        self.final_layer = FinalLayer(c.width, c.patch**2 * c.channels * (1 + c.learn_sigma))
        self.apply(xavier_uniform)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(c.width, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(weight.weight, std=0.02)
        for linear in (self.final_layer.linear, *(m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer))):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, t, y):
        """x [B, C, H, W], timesteps t [B], labels y [B] (self.null: none) -> [B, C or 2C, H, W]: the noise, and where
        the variance is learned its logits v."""
        tokens = self.x_embedder(self.x_embedder.patchify(x)) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        conditions = [condition] * len(self.blocks)
        tokens = run_blocks(self.blocks, tokens, self.recompute, conditions)
        return unpatchify(self.final_layer(tokens, condition), self.patch)


def build(config):
    """A freshly initialised (model, target); the target, a moving average, starts as a copy."""
    kinds = dict(classify=Classifier, mae=MAE, diffusion=DiT)
    torch.manual_seed(config.seed)
    model, target = (kinds[config.task](config) for _ in range(2))
    target.load_state_dict(model.state_dict())
    return model, target.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def classification_loss(logits, targets):
    """Cross entropy with soft targets [B, C], mean over the batch."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()


def mae_target(images, patch, norm_pix):
    """What to paint: patches [B, N, p*p*3], with norm_pix standardised within the patch (unbiased variance)."""
    target = patchify(images, patch)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return target


def mae_loss(prediction, target, mask):
    """Squared error on the removed patches: prediction, target [B, N, P], mask [B, N]; mean over all of the batch."""
    error = (prediction.float() - target).square().mean(-1)
    return (error * mask).sum() / mask.sum()


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion: Gaussian noise in T steps, and its removal
# ---------------------------------------------------------------------------------------------------------------------


def noise_betas(schedule, timesteps):
    """Variance of the noise that each step adds, float64 [T]: linear, scaled to T = 1000, or cosine."""
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, timesteps) * (1000 / timesteps)
    g = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - g[1:] / g[:-1], 0.999)


def space_timesteps(timesteps, spec):
    """Which of the T timesteps a sampler takes, ascending. spec: "N", evenly from first to last; "a,b,c", so many in
    each of equal sections; "ddimN", N at an integer stride. Exits with 2 where that is impossible."""
    try:
        if spec.startswith("ddim"):
            count = int(spec[4:])
            for stride in range(1, timesteps + 1):
                if len(range(0, timesteps, stride)) == count:
                    return list(range(0, timesteps, stride))
            raise ValueError("no integer stride takes so many steps")
        counts = [int(part) for part in spec.split(",")]
    except ValueError as error:
        fail(f"--sampler-steps {spec!r} of {timesteps}: {error}; expected a number, sections a,b,c or ddimN")
    steps, start = [], 0
    for i, count in enumerate(counts):
        size = timesteps // len(counts) + (i < timesteps % len(counts))
        if not 1 <= count <= size:
            fail(f"--sampler-steps {spec!r} asks for {count} of a section of {size} timesteps")
        stride, current = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):  # summed, not multiplied, as the released code rounds
            steps.append(start + round(current))
            current += stride
        start += size
    return steps


class Diffusion:
    """Tables of a diffusion process that takes the given timesteps of another with these betas.

    Every table is indexed by k, the number of the step; the network is told timestep_map[k]. float64 (MPS: float32).
    """

    def __init__(self, betas, steps, device="cpu"):
        cumulative = np.cumprod(1 - betas)[steps]
        previous = np.append(1.0, cumulative[:-1])
        betas = 1 - cumulative / previous
        variance = betas * (1 - previous) / (1 - cumulative)
        clipped = np.append(variance[1:2] if len(betas) > 1 else variance, variance[1:])
        tables = dict(
            betas=betas, alphas_cumprod=cumulative, alphas_cumprod_prev=previous,
            sqrt_alphas_cumprod=np.sqrt(cumulative), sqrt_one_minus_alphas_cumprod=np.sqrt(1 - cumulative),
            sqrt_recip_alphas_cumprod=np.sqrt(1 / cumulative), sqrt_recipm1_alphas_cumprod=np.sqrt(1 / cumulative - 1),
            posterior_variance=variance, posterior_log_variance_clipped=np.log(np.maximum(clipped, 1e-300)),
            posterior_mean_coef1=betas * np.sqrt(previous) / (1 - cumulative),
            posterior_mean_coef2=(1 - previous) * np.sqrt(1 - betas) / (1 - cumulative),
            log_betas=np.log(betas), fixed_log_variance=np.log(np.append(clipped[:1], betas[1:])),
        )  # fmt: skip
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.tables = {k: torch.from_numpy(v).to(device, dtype) for k, v in tables.items()}
        self.timestep_map = torch.tensor(steps, device=device)
        self.steps = len(steps)

    def at(self, name, k):
        """Entries k [B] of a table as float32 [B, 1, 1, 1]."""
        return self.tables[name][k].float()[:, None, None, None]

    def q_sample(self, x_start, k, noise):
        """Noise an image to step k."""
        signal = self.at("sqrt_alphas_cumprod", k) * x_start
        return signal + self.at("sqrt_one_minus_alphas_cumprod", k) * noise

    def posterior_mean(self, x_start, x, k):
        """Mean of the step before k, given the image and step k."""
        return self.at("posterior_mean_coef1", k) * x_start + self.at("posterior_mean_coef2", k) * x

    def denoise(self, output, x, k, clip, predict="noise"):
        """The network's output at x, step k -> (mean, log variance) of the step before, and the image it expects."""
        first, *logits = output.float().split(x.shape[1], dim=1)
        if logits:  # between the two bounds of the variance, not clamped
            share = (logits[0] + 1) / 2
            log_variance = share * self.at("log_betas", k) + (1 - share) * self.at("posterior_log_variance_clipped", k)
        else:
            log_variance = self.at("fixed_log_variance", k).expand_as(x)
        if predict == "noise":
            recip, recipm1 = (self.at(f"sqrt_{name}_alphas_cumprod", k) for name in ("recip", "recipm1"))
            first = recip * x - recipm1 * first
        x_start = first.clamp(-1, 1) if clip else first
        return self.posterior_mean(x_start, x, k), log_variance, x_start

    def bound(self, output, x_start, x, k, clip, predict="noise"):
        """A term of the variational bound, bits a dimension [B]: KL to the posterior, at k = 0 the likelihood."""
        mean, log_variance, _ = self.denoise(output, x, k, clip, predict)
        true_mean, true_log = self.posterior_mean(x_start, x, k), self.at("posterior_log_variance_clipped", k)
        kl = normal_kl(true_mean, true_log, mean, log_variance).flatten(1).mean(1)
        likelihood = -discretised_log_likelihood(x_start, mean, 0.5 * log_variance).flatten(1).mean(1)
        return torch.where(k == 0, likelihood, kl) / math.log(2)

    def prior_bits(self, x_start):
        """KL from the last step to pure noise, bits a dimension [B]."""
        last = torch.full((len(x_start),), self.steps - 1, device=x_start.device)
        mean = self.at("sqrt_alphas_cumprod", last) * x_start
        log_variance = (1 - self.at("alphas_cumprod", last)).log()
        zero = torch.zeros((), device=x_start.device)
        return normal_kl(mean, log_variance, zero, zero).flatten(1).mean(1) / math.log(2)


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL divergence of two normal distributions, element by element, nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (-1 - ratio + ratio.exp() + (mean1 - mean2).square() * (-log_variance2).exp())


def discretised_log_likelihood(x, mean, log_std):
    """Log probability of 8-bit values x in -1..1 under a normal distribution (its CDF by tanh), element by element."""

    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse = (-log_std).exp()
    above, below = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def drop_labels(labels, uniform, share, null):
    """Hide a share of the labels [B] behind `null`, by uniforms [B]; unknown labels (-1) are hidden too."""
    return torch.where((uniform < share) | (labels < 0), null, labels)


def diffusion_loss(diffusion, output, x_start, x, k, noise, config):
    """Hybrid loss of the network's output at x = q_sample(x_start, k, noise) -> dict of [B]: loss, mse, vb.

    The bound trains the variance only: it sees the predicted noise detached, except where it is all of the loss (kl).
    """
    c, channels = config, x.shape[1]
    output, terms = output.float(), {}
    if c.diffusion_loss == "kl":
        return dict(loss=diffusion.steps * diffusion.bound(output, x_start, x, k, False, c.predict))
    predicted = output[:, :channels]
    terms["mse"] = (noise - predicted if c.predict == "noise" else x_start - predicted).square().flatten(1).mean(1)
    terms["loss"] = terms["mse"]
    if c.learn_sigma:
        frozen = torch.cat([predicted.detach(), output[:, channels:]], dim=1)
        terms["vb"] = diffusion.bound(frozen, x_start, x, k, False, c.predict)
        if c.diffusion_loss == "rescaled_mse":
            terms["vb"] = terms["vb"] * diffusion.steps / c.timesteps
        terms["loss"] = terms["mse"] + terms["vb"]
    return terms


def guided(model, x, t, y, scale, channels=0):
    """Classifier-free guidance: the network's output for labels y with its first `channels` (0 = all but the variance)
    moved away from the output for no label, `scale` times as far. scale 1 asks the network only once."""
    if scale == 1:
        return model(x, t, y)
    output = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, model.null)]))
    with_label, without = output.chunk(2)
    channels = channels or x.shape[1]
    moved = without[:, :channels] + scale * (with_label - without)[:, :channels]
    return torch.cat([moved, with_label[:, channels:]], dim=1)


@torch.no_grad()
def sample_loop(diffusion, network, x, draw, config):
    """Denoise x [B, C, H, W] from pure noise; yields (x, expected image) after each step.

    network(x, t) -> its output; draw(i) -> noise [B, C, H, W] of the i-th step taken; config: sampler, eta,
    clip_samples, predict.
    """
    d, c = diffusion, config
    for i, step in enumerate(reversed(range(d.steps))):
        k = torch.full((len(x),), step, device=x.device)
        output = network(x, d.timestep_map[k])
        mean, log_variance, x_start = d.denoise(output, x, k, c.clip_samples, c.predict)
        if c.sampler == "ddim":
            a, previous = d.at("alphas_cumprod", k), d.at("alphas_cumprod_prev", k)
            noise = (d.at("sqrt_recip_alphas_cumprod", k) * x - x_start) / d.at("sqrt_recipm1_alphas_cumprod", k)
            sigma = c.eta * ((1 - previous) / (1 - a)).sqrt() * (1 - a / previous).sqrt()
            mean = previous.sqrt() * x_start + (1 - previous - sigma**2).clamp(min=0).sqrt() * noise
        else:
            sigma = (0.5 * log_variance).exp()
        x = mean + sigma * draw(i) if step else mean
        yield x, x_start


@torch.no_grad()
def bits_per_dimension(diffusion, network, x_start, draw, config):
    """The whole variational bound on images -> dict of [B]: total_bpd, prior_bpd, and [B, T], noisiest first: vb,
    xstart_mse, mse. network(x, t) -> its output; draw(i) -> noise."""
    d, c, columns = diffusion, config, []
    for i, step in enumerate(reversed(range(d.steps))):
        k, noise = torch.full((len(x_start),), step, device=x_start.device), draw(i)
        x = d.q_sample(x_start, k, noise)
        output = network(x, d.timestep_map[k])
        expected = d.denoise(output, x, k, True, c.predict)[2]
        found = (d.at("sqrt_recip_alphas_cumprod", k) * x - expected) / d.at("sqrt_recipm1_alphas_cumprod", k)
        errors = [(a - b).square().flatten(1).mean(1) for a, b in ((expected, x_start), (found, noise))]
        columns.append(torch.stack([d.bound(output, x_start, x, k, True, c.predict), *errors]))
    vb, xstart_mse, mse = torch.stack(columns, dim=-1)
    prior = d.prior_bits(x_start)
    return dict(total_bpd=vb.sum(1) + prior, prior_bpd=prior, vb=vb, xstart_mse=xstart_mse, mse=mse)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of samples, on features [N, D] of any network; float64
# ---------------------------------------------------------------------------------------------------------------------


def moments(features):
    """Mean [D] and covariance [D, D] (unbiased) of features [N, D], on the CPU."""
    features = features.cpu().double()
    return features.mean(0), features.T.cov()


def frechet_distance(mean1, covariance1, mean2, covariance2):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), exact for singular covariances too. The FID, if the features are
    those of the Inception network that everyone uses; else a distance of its own, to be compared with none."""
    values, vectors = torch.linalg.eigh(covariance1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross).item()


def inception_score(probabilities, splits=10):
    """exp of the mean KL(p(y|x) || p(y)) of probabilities [N, C] -> mean and std over consecutive splits."""
    scores = []
    for part in probabilities.cpu().double().tensor_split(splits):
        kl = (part * (part.clamp(min=1e-300).log() - part.mean(0).clamp(min=1e-300).log())).sum(1)
        scores.append(kl.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3):
    """(share of fakes within the manifold of the reals, share of reals within that of the fakes): the union of balls
    around each feature [N, D] that reach to its k-th neighbour."""

    def covered(points, others):
        radius = torch.cat([torch.cdist(rows, others).kthvalue(k + 1, dim=1).values for rows in others.split(1024)])
        inside = [(torch.cdist(rows, others) <= radius).any(1) for rows in points.split(1024)]
        return torch.cat(inside).cpu().double().mean().item()

    return covered(fake, real), covered(real, fake)


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


TOY_CLASSES = ["disc", "ring", "square", "frame", "plus", "cross", "triangle", "bars", "T", "L"]


@functools.lru_cache(maxsize=4)
def toy_shapes(split, size):
    """Ten bright shapes on dark ground, of any colour, shifted, scaled and turned a little, with some noise.

    Few pixels must do here: what is drawn is antialiased, and known by its outline at 8 x 8 already.
    split: "train" (8,000) or "val" (2,000 others) -> pixels uint8 [N, 3, size, size], labels int64 [N], balanced.
    """
    count = {"train": 8000, "val": 2000}[split]
    random = np.random.Generator(np.random.PCG64(["train", "val"].index(split)))

    def uniform(low, high, *shape):
        return random.uniform(low, high, (count, *(shape or (1, 1))))

    line = (np.arange(size) + 0.5) / size * 2 - 1  # the image spans -1 to 1
    x, y = line - uniform(-0.25, 0.25), line[:, None] - uniform(-0.25, 0.25)
    turn, scale = uniform(-0.25, 0.25), uniform(0.6, 0.75)
    u, v = (x * np.cos(turn) + y * np.sin(turn)) / scale, (y * np.cos(turn) - x * np.sin(turn)) / scale

    def box(u, v, width, height):
        return np.maximum(abs(u) - width, abs(v) - height)

    shapes = [
        lambda u, v: np.hypot(u, v) - 1,
        lambda u, v: abs(np.hypot(u, v) - 0.75) - 0.27,
        lambda u, v: box(u, v, 0.9, 0.9),
        lambda u, v: abs(box(u, v, 0.7, 0.7)) - 0.25,
        lambda u, v: np.minimum(box(u, v, 1, 0.28), box(u, v, 0.28, 1)),
        lambda u, v: np.minimum(box(u + v, u - v, 1.5, 0.4), box(u + v, u - v, 0.4, 1.5)) / 1.41,
        lambda u, v: np.maximum(abs(u) * 0.87 - v * 0.5 - 0.5, v - 0.8),
        lambda u, v: box(u, abs(v) - 0.6, 1, 0.27),
        lambda u, v: np.minimum(box(u, v + 0.7, 1, 0.27), box(u, v, 0.27, 1)),
        lambda u, v: np.minimum(box(u + 0.6, v, 0.27, 1), box(u, v - 0.7, 0.9, 0.27)),
    ]  # distance to the outline, negative inside; in the order of TOY_CLASSES
    outside = np.empty((count, size, size))
    for k, shape in enumerate(shapes):
        outside[k::10] = shape(u[k::10], v[k::10])
    share = np.clip(0.5 - outside * scale * size / 2, 0, 1)[:, None]  # of a pixel that the shape covers
    dark, light = uniform(0, 80, 3, 1, 1), uniform(130, 255, 3, 1, 1)
    pixels = dark + (light - dark) * share + random.normal(0, 6, (count, 3, size, size))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.arange(count) % 10


def open_data(config, name):
    """`open_split`, with shapes as toy images; for other data the `val` Split is None where a folder has none."""
    if config.data == "toy":
        pixels, labels = toy_shapes(name, config.image_size)
        return in_memory(pixels, labels, [f"{name}/{i:05d}" for i in range(len(pixels))], TOY_CLASSES)
    return open_split(config, name)


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


def centre_crop(image, size):
    """ADM's and DiT's preparation of a PIL image for generation: halve while twice too large, then bicubic, then the
    central square -> uint8 [3, size, size]."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return torch.from_numpy(pixels[top : top + size, left : left + size].copy()).permute(2, 0, 1)


class CentreBatches(Batches):
    """The same with every image's central square: what diffusion is trained on."""

    def __getitem__(self, step):
        item = super().__getitem__(step)
        if "boxes" in item:
            sizes = self.split.sizes[item["indices"]].flip(1)  # height, width
            side = sizes.amin(1, keepdim=True).expand(-1, 2)
            boxes = torch.cat([(sizes - side) / 2, side], dim=1)
            item["boxes"] = boxes * self.canvas / sizes.repeat(1, 2)
        return item

    def read(self, index, key, bad):
        """Decode image `index` -> (pixels, index); an unreadable one goes to `bad`, the next replaces it."""
        for now in (i % len(self.split) for i in range(index, index + 100)):
            path = self.split.root / self.split.paths[now]
            try:
                with Image.open(path) as image:
                    return centre_crop(to_rgb(image), self.config.image_size), now
            except UNREADABLE as error:
                bad.append(f"{path}: {error}")
        fail(f"100 images in a row could not be read, {path} the last of them")


def make_batches(split, config, world, batch, flip, purpose="train"):
    """The task's batches: random crops, or central squares for diffusion."""
    kind = CentreBatches if config.task == "diffusion" else Batches
    return kind(split, config, world, batch, config.crop_scale, flip, bicubic=True, purpose=purpose)


def load_codec(config, device):
    """The frozen autoencoder of --codec, or None. Exits with 2 if its latents are not what the config says."""
    if not config.codec:
        if config.channels != 3 or config.downsample != 1:
            fail(f"latents of {config.channels} channels, 1/{config.downsample} of the image, need a --codec FILE")
        return None
    codec = load_torchscript(config.codec, device)
    size = config.image_size // config.downsample
    with torch.no_grad():
        shape = tuple(codec.encode(torch.zeros(1, 3, config.image_size, config.image_size, device=device)).shape)
    if shape != (1, config.channels, size, size):
        fail(f"--codec {config.codec} makes latents {list(shape)}: set --channels and --downsample to match")
    return codec


def load_torchscript(path, device):
    """A frozen TorchScript module. Exits with 2 if the file is none."""
    try:
        module = torch.jit.load(path, map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as error:
        fail(f"{path} is no TorchScript file: {str(error).splitlines()[0][:150]}")
    for p in module.parameters():
        p.requires_grad_(False)
    return module


@torch.no_grad()
def to_latents(images, codec, config):
    """Normalised images [B, 3, S, S] -> what is denoised: pixels in -1..1, or latents of the codec, scaled."""
    images = to_pixels(images) / 127.5 - 1
    return images if codec is None else codec.encode(images) * config.latent_scale


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


def schedules(config, step, steps):
    """(lr, weight decay, momentum of the average) of step 0, 1, ... The average starts fast: (1 + n) / (10 + n)."""
    c, length = config, int(config.schedule_scale * steps)
    warmup = int(c.warmup * steps)
    final = c.lr_final if c.lr_shape == "cosine" else c.lr
    lr = common.old_warmup_cosine_schedule(step, length, warmup, c.lr_start, c.lr, final)
    return lr, c.weight_decay, min(c.ema, (1 + step) / (10 + step))


def parameter_rule(name, dimensions, config):
    """(layer, share of the learning rate, whether decayed) of a parameter.

    Layer 0 makes the tokens, then come the blocks, then the rest; each layer learns `layer_decay` as fast as the next.
    1-D parameters and biases are not decayed, in classification tokens and positions neither.
    """
    block = re.match(r"blocks\.(\d+)\.", name)
    first = name.startswith(("cls_token", "pos_embed", "patch_embed", "x_embedder"))
    layer = 0 if first else int(block[1]) + 1 if block else config.depth + 1
    decayed = dimensions > 1 and not name.endswith(".bias")
    if config.task == "classify":
        decayed = decayed and name not in ("cls_token", "pos_embed")
    return layer, config.layer_decay ** (config.depth + 1 - layer), decayed


def make_optimizer(model, config):
    """AdamW, a group for each distinct rule; the loop sets lr and decay."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(parameter_rule(name, p.dim(), config)[1:], []).append(p)
    groups = [dict(params=params, scale=scale, decay=decay) for (scale, decay), params in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=1e-8, fused=True)


def classification_inputs(images, labels, config, step, mine):
    """Augmented images, soft targets, and uniforms [b, depth, 2] for stochastic depth of a rank's rows `mine`."""
    c, device, (first, last) = config, images.device, mine
    if c.randaugment or c.jitter or c.grey:
        draws = draw_augmentation(c.batch, c, generator(c.seed, "augment", step))
        images = normalize(augment(to_pixels(images), {k: v[first:last] for k, v in draws.items()}))
    if c.erase:
        boxes = draw_erasing(c.batch, c.image_size, c.erase, generator(c.seed, "erase", step))[first:last]
        random = generator(c.seed, "erase noise", step, device=device)
        noise = torch.randn(c.batch, *images.shape[1:], generator=random, device=device)[first:last]
        images = erase(images, boxes, noise)
    targets = smooth_targets(labels, c.classes, c.smoothing)
    if c.mixup or c.cutmix:
        seed = generator(c.seed, "mix", step).initial_seed()
        lam, box = draw_mix(np.random.Generator(np.random.PCG64(seed)), c.image_size, c.mixup, c.cutmix)
        images = mix_images(images, neighbours(images), lam, box)
        targets = torch.lerp(neighbours(targets), targets, lam)
    drop = torch.rand(c.batch, c.depth, 2, generator=generator(c.seed, "drop path", step, device=device), device=device)
    return images, targets, drop[first:last]


def diffusion_inputs(images, labels, config, step, mine, codec):
    """What is denoised [b, C, h, w], step numbers k [b], noise, and labels [b], some hidden, of a rank's rows."""
    c, device, (first, last) = config, images.device, mine
    x_start, random = to_latents(images, codec, c), generator(c.seed, "diffusion", step, device=device)
    k = torch.randint(c.timesteps, (c.batch,), generator=random, device=device)[first:last]
    noise = torch.randn(c.batch, *x_start.shape[1:], generator=random, device=device)[first:last]
    uniform = torch.rand(c.batch, generator=random, device=device)[first:last]
    return x_start, k, noise, drop_labels(labels, uniform, c.label_drop, c.classes)


def forward_loss(model, inputs, config, diffusion):
    """The task's loss on one micro-batch."""
    if config.task == "classify":
        images, targets, drop = inputs
        return classification_loss(model(images, drop.permute(1, 2, 0) if config.drop_path else None), targets)
    if config.task == "mae":
        images, noise = inputs
        prediction, mask = model(images, noise)
        return mae_loss(prediction, mae_target(images, config.patch, config.norm_pix), mask)
    x_start, k, noise, labels = inputs
    x = diffusion.q_sample(x_start, k, noise)
    output = model(x, diffusion.timestep_map[k], labels)
    return diffusion_loss(diffusion, output, x_start, x, k, noise, config)["loss"].mean()


def distribute(model, world, shard):
    """`common.old_distribute`, with DiT's blocks sharded one by one as well."""
    for block in [m for m in model.modules() if shard and isinstance(m, ConditionedBlock)]:
        fully_shard(block)
    return common.old_distribute(model, world, shard)


def train(model, target, split, config, world, out):
    """Train the model, and average it into the target. Exits with 0 on SIGTERM or SIGINT, 3 after three bad steps."""
    device, dtype = world.device, common.old_choose_precision(config.precision, world.device)
    steps = config.steps or max(1, int(config.epochs * max(1, len(split) // config.batch)))
    diffusion, codec = None, None
    if config.task == "diffusion":
        diffusion = Diffusion(noise_betas(config.noise_schedule, config.timesteps), range(config.timesteps), device)
        codec = load_codec(config, device)
    model, target = model.to(device), target.to(device)
    if config.compile:
        model.compile()
    plain, model = model, distribute(model, world, config.shard)
    target = distribute(target, world, config.shard)
    optimizer, ema = make_optimizer(plain, config), EMA(target, plain)
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
    batches = make_batches(split, config, world, config.batch, config.flip)
    loader = make_loader(batches, range(start, steps), config, world)
    pixels = None if split.pixels is None else split.pixels.to(device)
    labels = split.labels.to(device)
    trainable = [p for p in plain.parameters() if p.requires_grad]
    mine = [rank * config.batch // world.size for rank in (world.rank, world.rank + 1)]  # in the global batch
    log = Log(out, world, steps, start)
    log.catch_signals()
    millions = sum(p.numel() for p in plain.parameters()) / 1e6
    log.say(
        f"{out}: {len(split)} images, steps {start} to {steps} of {config.batch} on {world.size} x {device.type} in "
        f"{str(dtype)[6:]}; task {config.task}, {millions:.2f} M parameters, "
        f"{token_count(config)} tokens an image, {forward_work(config) / 1e9:.3g} G multiply-adds"
    )
    waited, window, since = 0.0, start, time.monotonic()
    for step in range(start, steps):
        tick = time.monotonic()
        item = next(loader)
        images = make_images(item, pixels, config.image_size, device, bicubic=True)
        waited += time.monotonic() - tick
        log.skip(item["bad"], len(split), config.max_bad)
        lr, decay, momentum = schedules(config, step, steps)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr * group["scale"], decay if group["decay"] else 0.0

        classes = labels[item["indices"].to(device, non_blocking=True)]
        if config.task == "classify":
            inputs = classification_inputs(images, classes, config, step, mine)
        elif config.task == "mae":
            inputs = images, torch.cat(item["masks"]).to(device, non_blocking=True)
        else:
            inputs = diffusion_inputs(images, classes, config, step, mine, codec)
        loss, parts = torch.zeros((), device=device), config.accumulate
        for i, part in enumerate(zip(*(x.chunk(parts) for x in inputs), strict=True)):
            autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
            with common.old_no_sync(model, last=i == parts - 1), autocast:
                part_loss = forward_loss(model, part, config, diffusion) / parts
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()

        scaler.unscale_(optimizer)
        loss, norm = common.old_mean_over_ranks(loss), common.old_gradient_norm(trainable)
        if config.clip:
            nn.utils.clip_grads_with_norm_(trainable, config.clip, norm)
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
            loss_now, norm_now, bad_steps = torch.stack([loss, norm, streak]).tolist()  # the only host-device sync
            stopping = log.agree(log.stop)
            now = time.monotonic()
            row = dict(loss=loss_now, lr=lr, images_per_s=config.batch * (done - window) / (now - since))
            row["data_wait"] = waited / (now - since)
            waited, window, since = 0.0, done, now
            log.progress(done, **row)
            log.write(step=done, **row, gradient_norm=norm_now, memory_gib=common.old_memory_gib(device))
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
# Evaluate: classification, features, reconstruction
# ---------------------------------------------------------------------------------------------------------------------


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


@dataclass
class Features:
    """Of N images: pooled [N, D], what a head reads; cls [N, D]; tokens [N, T, D] or None, labels int64 [N], paths."""

    pooled: torch.Tensor
    cls: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    paths: list


@torch.no_grad()
def extract(model, split, config, world, log, tokens=False):
    """Features of a whole Split on all ranks, in its order; unreadable images are left out."""
    rows = []
    for images, indices in eval_images(split, config, world, log):
        pooled, x = model(images, features=True)
        rows.append((indices.to(world.device), pooled, x[:, 0], x[:, : None if tokens else 0]))
    kept, pooled, cls, x = collect(rows, world.device)
    paths = [split.paths[i] for i in kept.tolist()]
    return Features(pooled, cls, x if tokens else None, split.labels[kept].to(world.device), paths)


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


# Copied from dinov2.py
def top5(scores, labels):
    """Share of rows [N, C] whose label [N] is among the five highest scores, percent."""
    return 100 * (scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]).any(1).float().mean()


def lars_step(weights, gradients, momenta, lr, decay, momentum=0.9, eta=0.001):
    """A LARS step for H heads at once: weights [H, ...]; lr, decay [H]; a head's 1-D parameters get no trust ratio."""
    for p, g, m in zip(weights, gradients, momenta, strict=True):
        heads = (-1,) + (1,) * (p.dim() - 1)
        d = g + decay.view(heads) * p
        if p.dim() > 2:
            p_norm, d_norm = p.flatten(1).norm(dim=1), d.flatten(1).norm(dim=1)
            d = d * torch.where((p_norm > 0) & (d_norm > 0), eta * p_norm / d_norm, 1.0).view(heads)
        p.sub_(lr.view(heads) * m.mul_(momentum).add_(d))


def standardise(x, mean, variance):
    """BatchNorm without affine, as the probe of MAE has it: x [B, D]."""
    return (x - mean) * (variance + 1e-6).rsqrt()


def linear_probe(bank, labels, test, test_labels, classes, config):
    """MAE's probe, BatchNorm without affine and a linear layer by LARS, on features computed once (MAE augments them)
    -> top-1 in percent of the best learning rate. All learning rates are trained at once: weight [H, C, D]."""
    c, device, width = config, bank.device, bank.shape[1]
    rates = torch.tensor(c.probe_lrs, device=device) * c.probe_batch / 256
    draw = torch.randn(classes, width, generator=generator(c.seed, "probe", width)).to(device)
    weight = (0.01 * draw).repeat(len(rates), 1, 1).requires_grad_()
    bias = torch.zeros(len(rates), 1, classes, device=device, requires_grad=True)
    momenta, none = [torch.zeros_like(weight), torch.zeros_like(bias[:, 0])], torch.zeros_like(rates)
    mean, variance = torch.zeros(width, device=device), torch.ones(width, device=device)
    batch = min(c.probe_batch, len(bank))
    steps = len(bank) // batch * c.probe_epochs
    for step in range(steps):
        epoch, place = divmod(step, len(bank) // batch)
        if not place:
            order = torch.randperm(len(bank), generator=generator(c.seed, "probe", "order", epoch)).to(device)
        rows = order[place * batch : (place + 1) * batch]
        now, here = torch.var_mean(bank[rows], dim=0, correction=0)
        mean.lerp_(here, 0.1)
        variance.lerp_(now * batch / max(1, batch - 1), 0.1)
        scores = standardise(bank[rows], here, now) @ weight.mT + bias  # [H, B, C]
        loss = F.cross_entropy(scores.flatten(0, 1), labels[rows].repeat(len(rates)), reduction="sum") / batch
        gradients = torch.autograd.grad(loss, [weight, bias])
        factor = common.old_warmup_cosine_schedule(step + 1, steps, steps // 9, 0.0, 1.0, 0.0)
        with torch.no_grad():
            lars_step([weight, bias[:, 0]], [gradients[0], gradients[1][:, 0]], momenta, rates * factor, none)
    with torch.no_grad():
        scores = standardise(test, mean, variance) @ weight.mT + bias
        return accuracy(scores, test_labels).max().item()


@torch.no_grad()
def reconstruction(model, split, config, world, log):
    """MAE's loss on hidden patches of a Split, of the model and of two copies: the mean of the visible patches and the
    nearest visible one -> dict."""
    c, rows = config, []
    grid = c.image_size // c.patch
    place = torch.stack(torch.meshgrid(*[torch.arange(grid, device=world.device)] * 2, indexing="ij")).flatten(1)
    apart = (place[:, :, None] - place[:, None]).square().sum(0)  # [N, N]
    for images, indices in eval_images(split, c, world, log):
        noise = torch.rand(len(images), token_count(c), generator=generator(c.seed, "val masks", int(indices[0])))
        prediction, mask = model(images, noise.to(images.device))
        target = mae_target(images, c.patch, c.norm_pix)
        visible = (1 - mask)[..., None]
        mean = (target * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)
        nearest = torch.stack([(apart + 1e6 * m).argmin(1) for m in mask])
        errors = [(p - target).square().mean(-1).mul(mask).sum(1) / mask.sum(1)
                  for p in (prediction, mean, gather_tokens(target, nearest))]  # fmt: skip
        rows.append((indices.to(world.device), torch.stack(errors, dim=1)))
    names = ("hidden error", "hidden error, mean colour", "hidden error, nearest")
    return dict(zip(names, collect(rows, world.device)[1].mean(0).tolist(), strict=True))


def evaluate(model, config, world, log, train_split=None):
    """Run --eval on a model, beside it on a randomly initialised one, and for kNN on raw pixels.

    Prints a table, appends it to log.jsonl and returns it: {"trained": {...}, "random": ..., ...}; percent, but for
    errors and distances.
    """
    wanted = [name for name in config.eval.split(",") if name != "none"]
    if not wanted:
        return {}
    train, val = train_split or open_data(config, "train"), open_data(config, "val")
    model.eval()
    if "features" in wanted:
        write_features(model, train if config.features_split == "train" or val is None else val, config, world, log)
        wanted.remove("features")
    labelled = [name for name in wanted if name in ("accuracy", "knn", "linear")]
    if labelled and (val is None or not train.classes):
        log.say(f"{', '.join(labelled)}: skipped, since {config.data} has no {'labels' if val else 'val split'}")
        wanted = [name for name in wanted if name not in labelled]
    elif labelled and val.classes != train.classes:
        differing = sorted({*val.classes} ^ {*train.classes})[:5]
        fail(f"train/ and val/ of {config.data} differ in their classes: {differing}")
    if not wanted:
        return {}
    val = val or train
    if config.task == "diffusion":
        results = evaluate_samples(model, train, val, wanted, config, world, log)
    else:
        if 0 < config.eval_limit < len(train):
            order = torch.randperm(len(train), generator=generator(config.seed, "limit"))
            train = train.subset(order[: config.eval_limit])
        networks = {"trained": model} | ({"random": build(config)[1].to(world.device)} if config.baselines else {})
        results = {k: evaluate_one(m.eval(), train, val, wanted, config, world, log) for k, m in networks.items()}
        if config.baselines and "knn" in wanted:
            (bank, bank_labels), (test, labels) = (raw_pixels(split, config, world, log) for split in (train, val))
            scores = knn(bank, bank_labels, test)
            results["pixels"] = {f"knn{k}": accuracy(s, labels).item() for k, s in scores.items()}
    keys = list(dict.fromkeys(key for result in results.values() for key in result))
    log.say(f"{'':<28}" + "".join(f"{name:>18}" for name in results))
    for key in keys:
        log.say(f"{key:<28}" + "".join(f"{r[key]:>18.4g}" if key in r else f"{'':>18}" for r in results.values()))
    log.write(eval=results, images={"train": len(train), "val": len(val)})
    return results


@torch.no_grad()
def evaluate_one(model, train, val, wanted, config, world, log):
    """The evaluations `wanted` of one classifier or MAE on two Splits -> {name: value}."""
    c, result = config, {}
    if "accuracy" in wanted:
        rows = [(indices.to(world.device), model(images)) for images, indices in eval_images(val, c, world, log)]
        kept, scores = collect(rows, world.device)
        labels = val.labels[kept].to(world.device)
        result |= dict(top1=accuracy(scores, labels).item(), top5=top5(scores, labels).item())
    if "reconstruction" in wanted:
        result |= reconstruction(model, val, c, world, log)
    if "knn" in wanted or "linear" in wanted:
        bank, test = (extract(model, split, c, world, log) for split in (train, val))
    if "knn" in wanted:
        scores = knn(bank.pooled, bank.labels, test.pooled)
        result |= {f"knn{k}": accuracy(s, test.labels).item() for k, s in scores.items()}
    if "linear" in wanted:
        with torch.enable_grad():
            for name, x, y in (("linear", bank.pooled, test.pooled), ("linear, class token", bank.cls, test.cls)):
                result[name] = linear_probe(x, bank.labels, y, test.labels, len(train.classes), c)
    return result


def write_features(encoder, split, config, world, log):
    """--eval features: .npz of features float32 [N, D], labels int64 [N], paths, and with --tokens tokens [N, T, D]."""
    found = extract(encoder.eval(), split, config, world, log, config.tokens)
    arrays = dict(features=found.pooled, labels=found.labels) | (dict(tokens=found.tokens) if config.tokens else {})
    path = Path(config.features_out or log.path.parent / "features.npz")
    if world.rank == 0:
        np.savez(path, paths=np.array(found.paths), **{k: v.cpu().numpy() for k, v in arrays.items()})
        log.say(f"{path}: " + ", ".join(f"{k} {list(v.shape)}" for k, v in arrays.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: samples
# ---------------------------------------------------------------------------------------------------------------------

NOISE_GROUP = 64  # samples whose noise comes from one generator: a sample depends on its number, not on its batch


def sample_images(model, config, first, last, device, codec=None):
    """Samples first..last of this --seed, at once -> (uint8 [n, 3, S, S], labels int64 [n]), on the device.

    Of all classes in turn, or of --sample-class. The same number gives the same picture in any batch and on any number
    of ranks, up to rounding.
    """
    c, betas = config, noise_betas(config.noise_schedule, config.timesteps)
    diffusion = Diffusion(betas, space_timesteps(c.timesteps, c.sampler_steps), device)
    shape = (NOISE_GROUP, c.channels, *[c.image_size // c.downsample] * 2)
    groups, inside = range(first // NOISE_GROUP, -(-last // NOISE_GROUP)), first % NOISE_GROUP
    labels = torch.arange(first, last, device=device) % max(1, c.classes)
    labels = labels if c.sample_class < 0 or not c.classes else torch.full_like(labels, c.sample_class)

    def draw(i):
        noise = torch.cat([torch.randn(shape, generator=generator(c.seed, "sample", g, i)) for g in groups])
        return noise[inside : inside + last - first].to(device)

    def network(x, t):
        return guided(model, x, t, labels, c.guidance if c.classes and c.label_drop else 1, c.guided_channels)

    *_, (x, _) = sample_loop(diffusion, network, draw(-1), draw, c)
    with torch.no_grad():
        x = x if codec is None else codec.decode(x / c.latent_scale)
    return (127.5 * x + 128).clamp(0, 255).byte(), labels


def sample_share(model, config, count, world, codec=None):
    """`sample_images` 0..count in batches of --sample-batch, shared by the ranks -> ([n, 3, S, S], labels) of all."""
    starts = range(0, count, config.sample_batch)
    size = math.ceil(len(starts) / world.size)
    images, labels = [torch.zeros(0, 3, *[config.image_size] * 2, dtype=torch.uint8, device=world.device)], []
    labels.append(torch.zeros(0, dtype=torch.long, device=world.device))
    for first in starts[world.rank * size : (world.rank + 1) * size]:
        found = sample_images(model, config, first, min(count, first + config.sample_batch), world.device, codec)
        images.append(found[0])
        labels.append(found[1])
    return common.old_gather_over_ranks(torch.cat(images)), common.old_gather_over_ranks(torch.cat(labels))


def write_samples(model, config, world, log):
    """--sample N: samples.npz (arr_0 uint8 [N, S, S, 3], labels) and samples.png in the run's folder."""
    if config.sample_class >= max(1, config.classes):
        fail(f"--sample-class {config.sample_class}: the model knows {config.classes} classes, the first is 0")
    images, labels = sample_share(model.eval(), config, config.sample, world, load_codec(config, world.device))
    if world.rank == 0:
        folder = log.path.parent
        np.savez(folder / "samples.npz", arr_0=images.permute(0, 2, 3, 1).cpu().numpy(), labels=labels.cpu().numpy())
        draw_grid(images[:400], min(len(images), 20)).save(folder / "samples.png")
        log.say(f"{folder / 'samples.npz'}, {folder / 'samples.png'}: {len(images)} samples of seed {config.seed}")


def load_judge(config, world, log):
    """What judges samples: a function uint8 [B, 3, S, S] -> (features [B, D], class scores [B, C] or None), its name.

    --features: last.pt of --task classify, or a TorchScript file. On the toy images without it, a classifier is
    trained first.
    """
    path, device = config.features, world.device
    if not path and config.data == "toy":
        c = replace(Config(), **PRESETS["toy"] | dict(steps=400, image_size=config.image_size))
        c = replace(c, classes=len(TOY_CLASSES), compile=config.compile, precision=config.precision)
        log.say("training a classifier to judge the samples")
        folder = log.path.parent / "judge"
        folder.mkdir(exist_ok=True)
        model = train(*build(c), open_data(c, "train"), c, world, folder)[1]
        name = "the toy classifier"
    elif zipfile.is_zipfile(path) and any(n.endswith("constants.pkl") for n in zipfile.ZipFile(path).namelist()):
        module = load_torchscript(path, device)

        def judge(images):
            found = module(images)
            found = found if isinstance(found, tuple) else (found, None)
            return found[0].flatten(1), found[1]

        return judge, path
    else:
        model, c = load_model(path)
        if c.task != "classify":
            fail(f"--features {path} is a model of --task {c.task}: samples are judged by a classifier")
        model, name = model.to(device), path
    model.eval()
    if c.image_size != config.image_size:
        fail(f"--features {name} sees {c.image_size} pixels, the samples have {config.image_size}")

    def judge(images):
        read = model(normalize(images), features=True)[0]
        return read, model.head(read)

    return judge, name


@torch.no_grad()
def evaluate_samples(model, train, val, wanted, config, world, log):
    """The evaluations `wanted` of samples: how far from the training images, how good, how often of the class that
    was asked for -> {"samples": ..., "guided": ..., "untrained": ..., "real": of unseen images}."""
    c, device, results = config, world.device, {}
    codec = load_codec(c, device)
    if "bpd" in wanted:
        results["samples"] = evaluate_bpd(model, val, codec, c, world, log)
    if "generate" not in wanted:
        return results
    with torch.enable_grad():
        judge, name = load_judge(c, world, log)

    def real(split):
        count = min(c.generate, len(split))
        batch = max(1, min(count, c.eval_batch * world.size) // world.size) * world.size
        data = make_batches(split, c, world, batch, flip=False, purpose="reference")
        pixels, rows = None if split.pixels is None else split.pixels.to(device), []
        for item in make_loader(data, range(-(-count // batch)), c, world):
            images = to_pixels(make_images(item, pixels, c.image_size, device, bicubic=True)).round().byte()
            rows.append((*judge(images), split.labels[item["indices"]].to(device)))
        return [None if x[0] is None else common.old_gather_over_ranks(torch.cat(x))[:count] for x in zip(*rows)]

    reference = real(train)
    columns = {"real": real(val)}
    asked = {"samples": (model, 1.0), "guided": (model, c.guidance)}
    if c.baselines:
        asked["untrained"] = build(c)[1].to(device).eval(), 1.0
    for column, (network, guidance) in asked.items():
        if column != "guided" or (guidance != 1 and c.classes):
            images, labels = sample_share(network, replace(c, guidance=guidance), c.generate, world, codec)
            parts = [judge(part) for part in images.split(c.eval_batch)]
            columns[column] = *[None if x[0] is None else torch.cat(x) for x in zip(*parts)], labels
    mean, covariance = moments(reference[0])
    if world.rank == 0:
        arrays = dict(mu=mean, sigma=covariance, count=len(reference[0]), extractor=str(name))
        np.savez(log.path.parent / "statistics.npz", **arrays)
    for column, (read, scores, labels) in columns.items():
        result = results.setdefault(column, {})
        result["frechet"] = frechet_distance(*moments(read), mean, covariance)
        if scores is not None:
            result["inception, own"] = inception_score(scores.softmax(1))[0]
        if len(read) > 3:
            result["precision"], result["recall"] = (100 * v for v in precision_recall(reference[0], read))
        if scores is not None and c.classes and scores.shape[1] == c.classes:
            result["of the asked class"] = accuracy(scores, labels).item()
    log.say(f"distances and scores on features of {name}: not those of the Inception network, no FID")
    return results


def evaluate_bpd(model, val, codec, config, world, log):
    """Bits a dimension of the first --eval-batch images of a Split -> dict."""
    c = config
    some = val.subset(torch.arange(min(len(val), c.eval_batch)))
    images = next(eval_images(some, c, World(0, 1, world.device), log))[0]
    diffusion = Diffusion(noise_betas(c.noise_schedule, c.timesteps),
                          space_timesteps(c.timesteps, c.sampler_steps), world.device)  # fmt: skip
    null, x_start = torch.full((len(images),), c.classes, device=world.device), to_latents(images, codec, c)

    def draw(i):
        return torch.randn(x_start.shape, generator=generator(c.seed, "bpd", i)).to(world.device)

    found = bits_per_dimension(diffusion, lambda x, t: model(x, t, null), x_start, draw, c)
    return {"bits a dimension": found["total_bpd"].mean().item()}


# ---------------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------------


# Copied from msn.py
def paste(canvas, image, left, top, side):
    """Put pixels [3, s, s] on a PIL canvas, enlarged to `side`."""
    tile = Image.fromarray(image.permute(1, 2, 0).byte().cpu().numpy()).resize((side, side), Image.NEAREST)
    canvas.paste(tile, (left, top))


def draw_grid(images, columns, tile=48, gap=4):
    """uint8 images [n, 3, s, s] row by row as a PIL image; small ones enlarged."""
    tile = max(tile, images.shape[-1])
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (gap + columns * (tile + gap), gap + rows * (tile + gap)), "white")
    for i, image in enumerate(images):
        paste(canvas, image, gap + i % columns * (tile + gap), gap + i // columns * (tile + gap), tile)
    return canvas


def heat(values):
    """Values [..., h, w] -> pixels [..., 3, h, w] in 0..255: lowest dark blue, highest yellow."""
    low, high = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
    v = ((values - low) / (high - low + 1e-12))[..., None, :, :]
    dark, light = torch.tensor([[40.0, 20, 90], [250, 230, 60]], device=v.device)[..., None, None]
    return dark + (light - dark) * v


@torch.no_grad()
def attention_distance(model, images):
    """How far a pixel's attention reaches, in pixels: mean over images [B, 3, S, S] and queries, a row a block [L, H].

    Of uniform attention it would be about half the image's side: locality, where it appears, was learned.
    """
    grid, rows = model.grid, []
    place = torch.stack(torch.meshgrid(*[torch.arange(grid, device=images.device)] * 2, indexing="ij")).flatten(1)
    apart = (place[:, :, None] - place[:, None]).float().square().sum(0).sqrt()  # [N, N]
    x = model.embed(images)
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    for block in model.blocks:
        attention = block.attn
        q, k = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)[:2]
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 1:, 1:]
        rows.append(((weights / weights.sum(-1, keepdim=True)) * apart).sum(-1).mean((0, 2)))
        x = block(x)
    return torch.stack(rows) * images.shape[-1] / grid


def titled(columns, rows, titles, tile, gap):
    """An empty canvas of tiles with a title over each column, and the place of a tile."""
    canvas = Image.new("RGB", (gap + columns * (tile + gap), 20 + rows * (tile + gap)), "white")
    for column, title in enumerate(titles):
        ImageDraw.Draw(canvas).text((gap + column * (tile + gap), 4), title, fill="black")
    return canvas, lambda row, column: (gap + column * (tile + gap), 20 + row * (tile + gap), tile)


@torch.no_grad()
def draw_classifier(model, images, labels, classes, tile=96, gap=6):
    """Images with what they were taken for (red: wrongly), and the positions: for some pixels, the cosine similarity of
    their embedding with that of all others. With --positions learned nothing told the model who is whose neighbour."""
    grid, places = model.grid, [1 / 8, 3 / 8, 5 / 8, 7 / 8]
    table = F.normalize(model.pos_embed[0, 1:] - model.pos_embed[0, 1:].mean(0), dim=1)
    titles = [""] * 4 + ["similarity of positions"]
    canvas, place = titled(8, 4, titles, tile + 12, gap)
    predicted = model(images).argmax(1).tolist()
    for i, image in enumerate(to_pixels(images[:16])):
        left, top, _ = place(i // 4, i % 4)
        paste(canvas, image, left, top + 12, tile)
        colour = "black" if predicted[i] == labels[i] else "red"
        ImageDraw.Draw(canvas).text((left, top), str(classes[predicted[i]])[:14], fill=colour)
    for i, j in itertools.product(range(4), range(4)):
        pixel = int(places[i] * grid) * grid + int(places[j] * grid)
        paste(canvas, heat((table @ table[pixel]).view(grid, grid)), *place(i, 4 + j)[:2], tile)
    return canvas


@torch.no_grad()
def draw_reconstruction(model, images, config, rows=8, tile=96, gap=6):
    """An MAE's images, what the encoder sees, what the decoder paints, and that in the hidden places only."""
    c, images = config, images[:rows]
    noise = torch.rand(len(images), token_count(c), generator=generator(c.seed, "picture")).to(images.device)
    prediction, mask = model(images, noise)
    target = patchify(images, c.patch)
    if c.norm_pix:  # back to pixels, by the statistics of the patch that should be there
        prediction = prediction * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
    hidden = mask[..., None] > 0
    seen = torch.where(hidden, torch.zeros_like(target), target)
    canvas, place = titled(4, len(images), ["image", "visible", "painted", "together"], tile, gap)
    for column, patches in enumerate((target, seen, prediction, torch.where(hidden, prediction, target))):
        for row, image in enumerate(to_pixels(unpatchify(patches.float(), c.patch))):
            paste(canvas, image, *place(row, column))
    return canvas


def draw_curves(curves, title, width=560, height=360):
    """Points (x label, values) of several runs as a PIL chart: accuracy over the values of a sweep, all seeds and their
    mean. curves: [(label, [value, ...]), ...]."""
    canvas, left, top = Image.new("RGB", (width, height), "white"), 60, 30
    write = ImageDraw.Draw(canvas)
    values = [v for _, seeds in curves for v in seeds]
    low, high = min(values) - 1, max(values) + 1
    write.text((left, 8), title, fill="black")

    def spot(i, value):
        across = left + 30 + i * (width - left - 60) / max(1, len(curves) - 1)
        return across, height - 40 - (value - low) / (high - low) * (height - 40 - top)

    for level in np.linspace(low, high, 6):
        y = spot(0, level)[1]
        write.line((left, y, width - 10, y), fill=(225, 225, 225))
        write.text((8, y - 6), f"{level:.1f} %", fill="black")
    means = [spot(i, float(np.mean(seeds))) for i, (_, seeds) in enumerate(curves)]
    write.line(means, fill=(30, 90, 200), width=3)
    for i, (label, seeds) in enumerate(curves):
        for value in seeds:
            x, y = spot(i, value)
            write.ellipse((x - 4, y - 4, x + 4, y + 4), outline=(200, 60, 40), width=2)
        write.text((spot(i, low)[0] - 20, height - 30), label, fill="black")
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: ours, and the official ones of MAE and DiT
# ---------------------------------------------------------------------------------------------------------------------

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 512: 16}  # by width: a file's shapes do not tell
ARCHITECTURE = ("task", "image_size", "patch", "width", "depth", "heads", "positions", "readout", "classes", "channels")
ARCHITECTURE += ("downsample", "learn_sigma", "permute", "permute_distance")
ARCHITECTURE += ("decoder_width", "decoder_depth", "decoder_heads")
PROCESS = ("clip_samples", "predict", "noise_schedule", "timesteps", "label_drop", "norm_pix", "mask_ratio")
PROCESS += ("latent_scale",)


def load_namespaced(path):
    """`common.old_load_checkpoint`, also of MAE's and DiT's training files, which hold their arguments as a Namespace."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return common.old_load_checkpoint(path)


def read_checkpoint(path, heads=0):
    """Our or an official checkpoint -> (state dict, fields of the Config that it decides).

    Official: MAE's {"model": weights} of pretraining, with or without decoder, or of fine-tuning; DiT's weights, alone
    or under "ema". heads: for widths that the released models do not have.
    """
    state = load_namespaced(path)
    if isinstance(state, dict) and "script" in state:
        state = common.old_read_own_checkpoint(path, Path(__file__).stem)
        return state["target"], {k: state["config"][k] for k in (*ARCHITECTURE, *PROCESS)}
    inner = state
    for key in ("ema", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            inner = state[key]
            break
    weights = {}
    if isinstance(inner, dict):
        weights = {str(k).removeprefix("module."): v for k, v in inner.items() if isinstance(v, torch.Tensor)}
    tokeniser = weights.get("patch_embed.proj.weight", weights.get("x_embedder.proj.weight"))
    if tokeniser is None or "pos_embed" not in weights:
        found = ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
        fail(f"{path} is no checkpoint of this script, MAE or DiT: expected pos_embed and a projection, found {found}")

    def count(prefix):
        return 1 + max((int(k.split(".")[1]) for k in weights if k.startswith(prefix)), default=-1)

    width, channels, patch, _ = tokeniser.shape
    diffusion = "x_embedder.proj.weight" in weights
    tokens = weights["pos_embed"].shape[1] - (not diffusion)
    size = patch * math.isqrt(tokens)
    fields = dict(patch=patch, width=width, depth=count("blocks."), heads=heads or HEADS.get(width, 0))
    if not fields["heads"] or width % fields["heads"]:
        fail(f"{path} cannot say how many attention heads share its width of {width}: add --heads")
    fields["positions"] = "sincos"
    if diffusion:
        latent = channels == 4
        outputs = weights["final_layer.linear.weight"].shape[0] // patch**2
        fields |= dict(task="diffusion", channels=channels, downsample=8 if latent else 1, clip_samples=not latent)
        fields |= dict(image_size=size * (8 if latent else 1), learn_sigma=outputs == 2 * channels)
        fields |= dict(classes=weights["y_embedder.embedding_table.weight"].shape[0] - 1)
    elif "head.weight" in weights:
        fields |= dict(task="classify", image_size=size, classes=len(weights["head.weight"]))
        fields["readout"] = "gap" if "fc_norm.weight" in weights else "cls"
    else:
        fields |= dict(task="mae", image_size=size)
        if "decoder_embed.weight" in weights:
            decoder = len(weights["decoder_embed.weight"])
            fields |= dict(decoder_width=decoder, decoder_depth=count("decoder_blocks."))
            fields |= dict(decoder_heads=HEADS.get(decoder, fields["heads"]))
    return weights, fields


def resize_positions(weights, model, path):
    """The position tables of a state dict, interpolated to the model's grid where that is another; says so."""
    own = model.state_dict()
    for key in ("pos_embed", "decoder_pos_embed"):
        if key in weights and key in own and weights[key].shape[1] != own[key].shape[1]:
            special = 0 if isinstance(model, DiT) else 1
            old, new = (math.isqrt(table.shape[1] - special) for table in (weights[key], own[key]))
            print(f"{path}, {key}: positions interpolated from {old}x{old} to {new}x{new} tokens", flush=True)
            table = common.old_interpolate_positions(weights[key][:, special:], (old, old), (new, new))
            weights = weights | {key: torch.cat([weights[key][:, :special], table], dim=1)}
    return weights


def load_weights(model, weights, path):
    """Put a state dict of `read_checkpoint` into a model. Exits with 2 if keys or shapes do not fit.

    A classifier takes the trunk of an MAE, and no head but for the same number of classes: its head then starts at
    nearly 0. An MAE keeps its own decoder where the file has none. What starts anew is named.
    """
    own, weights, fresh = model.state_dict(), resize_positions(weights, model, path), ()
    if isinstance(model, Classifier) and "head.weight" not in weights:
        weights = {k: v for k, v in weights.items() if not k.startswith(("decoder_", "mask_token", "norm."))}
        fresh = ("head.", "fc_norm.", "norm.", "permutation")
    elif isinstance(model, Classifier) and weights["head.weight"].shape != own["head.weight"].shape:
        fresh = ("head.",)
    elif isinstance(model, MAE) and "mask_token" not in weights:
        fresh = ("decoder_", "mask_token")
    kept = {k: v for k, v in own.items() if k.startswith(fresh)}
    common.old_load_state(model, weights | kept, path)
    if "head.weight" in kept:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
        nn.init.zeros_(model.head.bias)
    if kept:
        print(f"{path} has no {', '.join([*kept][:4])}{', ...' if len(kept) > 4 else ''}: new ones", flush=True)


def load_model(path, heads=0, **changes):
    """A frozen model of any checkpoint that this script reads, and its Config. heads: where the width is unusual;
    changes: other fields of the Config, such as image_size, or task="classify" for the trunk of an MAE."""
    weights, fields = read_checkpoint(path, heads)
    config = replace(Config(), **fields | changes)
    model = build(config)[0]
    load_weights(model, weights, path)
    return model.requires_grad_(False).eval(), config


# ---------------------------------------------------------------------------------------------------------------------
# Sweep: the paper's two trends, and the permutation study
# ---------------------------------------------------------------------------------------------------------------------


def sweep_variants(config):
    """[(label, changes of the Config)] of --sweep: patch (the image stays), input (the tokens stay) or permute."""
    c, grid = config, config.image_size // config.patch
    if c.sweep == "patch":
        divisors = [p for p in range(c.image_size // 2, 0, -1) if c.image_size % p == 0]
        return [(f"patch {p}", dict(patch=p)) for p in c.sweep_values or divisors]
    if c.sweep == "input":
        values = c.sweep_values or [p for p in (4, 2, 1) if grid * p <= 4 * c.image_size]
        return [(f"{grid * p} pixels, patch {p}", dict(patch=p, image_size=grid * p)) for p in values]
    most = c.image_size**2 // 2
    return [(f"{n} pairs", dict(permute=n)) for n in c.sweep_values or [0, most // 8, most // 4, most // 2, most]]


def run_sweep(config, world, out):
    """Train every variant with every seed, each in a folder of its own, and print and draw their accuracies; a folder
    that holds a finished run is not trained again, so --resume continues a sweep."""
    log, curves, rows = Log(out, world), [], []
    if open_data(config, "val") is None:
        fail(f"--sweep compares accuracies on a val split, and {config.data} has none")
    for label, changes in sweep_variants(config):
        accuracies = []
        for seed in range(config.seed, config.seed + config.sweep_seeds):
            folder = out / f"{label.replace(' ', '-').replace(',', '')}-seed{seed}"
            c = replace(config, **changes, seed=seed, sweep="", out=str(folder), eval="accuracy", baselines=False)
            check(c, world)
            done = folder / "log.jsonl"
            found = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
            found = [row["eval"]["trained"]["top1"] for row in found if "eval" in row]
            accuracies.append(found[-1] if found else train_and_evaluate(c, world, folder)["trained"]["top1"])
        curves.append((label, accuracies))
        rows.append(dict(label=label, tokens=token_count(c), multiply_adds=forward_work(c), top1=accuracies))
    log.say(f"{'':<22}{'tokens':>8}{'M multiply-adds':>18}{'top-1, %':>10}   seeds")
    for row in rows:
        seeds = ", ".join(f"{v:.1f}" for v in row["top1"])
        work = row["multiply_adds"] / 1e6
        log.say(f"{row['label']:<22}{row['tokens']:>8}{work:>18.1f}{np.mean(row['top1']):>10.1f}   {seeds}")
    log.write(sweep=rows)
    if world.rank == 0:
        draw_curves(curves, f"top-1 on {config.data}, {config.sweep_seeds} seeds").save(out / "picture.png")
        log.say(f"{out / 'picture.png'}: the table as a picture")


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def report(model, target, train_split, config, world, log):
    """After training: the picture of the task, and of a classifier how far its attention reaches."""
    c, device = config, world.device
    if c.shard:
        return  # the parts of a sharded model do not run by themselves
    target.eval()
    if c.task == "diffusion":
        columns = min(max(1, c.classes), 10)
        images, _ = sample_share(target, c, 8 * columns, world, load_codec(c, device))
        picture, what = draw_grid(images, columns), f"samples, {c.guidance:g} times guided, a class after the other"
    else:
        split = open_data(c, "val") or train_split
        some = split.subset(torch.randperm(len(split), generator=generator(c.seed, "report"))[:64])
        images, indices = next(eval_images(some, replace(c, eval_batch=64), World(0, 1, device), log))
        if c.task == "mae":
            picture, what = draw_reconstruction(target, images, c), "images, what is seen, what is painted"
        else:
            few = max(1, min(16, 2**26 // (c.heads * token_count(c) ** 2)))  # it holds the scores of all pairs
            reach = attention_distance(target, images[:few])
            log.say("attention reaches, in pixels, a row a block: " + "; ".join(
                " ".join(f"{v:.1f}" for v in row) for row in reach.tolist()))  # fmt: skip
            log.write(attention_distance=reach.tolist())
            picture = draw_classifier(target, images, some.labels[indices].tolist(), train_split.classes)
            what = "what images are taken for, and which positions are alike"
    if world.rank == 0:
        picture.save(log.path.parent / "picture.png")
        log.say(f"{log.path.parent / 'picture.png'}: {what}")


def with_classes(config, split):
    """The config with the number of classes of the data, if it is not given. A classifier needs labels (exit 2)."""
    classes = config.classes or len(split.classes)
    if config.task == "classify" and len(split.classes) < 2:
        fail(f"--task classify needs train/CLASS/* of two classes or more; {config.data} has {len(split.classes)}")
    if len(split.classes) > classes and config.task != "mae":
        fail(f"{config.data} has {len(split.classes)} classes, the model {classes}: change --classes")
    return replace(config, classes=classes)


def train_and_evaluate(config, world, out, given=frozenset()):
    """One run: data, model, training if any, evaluation -> results of `evaluate`."""
    training = not config.init or bool({"steps", "epochs"} & given)
    log, split = Log(out, world), None
    if training:
        split = cache_pixels(open_data(config, "train"), config, world, log)
        config = with_classes(config, split)
    model, target = build(config)
    if config.init:
        weights = read_checkpoint(config.init, config.heads if "heads" in given else 0)[0]
        load_weights(model, weights, config.init)
        target.load_state_dict(model.state_dict())
    if training:
        model, target = train(model, target, split, config, world, out)
        log = Log(out, world)
        report(model, target, split, config, world, log)
    target = target.to(world.device)
    if config.sample:
        write_samples(target, config, world, log)
    return evaluate(target, config, world, log, split)


def run(config, given):
    """Train and evaluate; with --init and no length given, only evaluate. given: names of the flags that were typed."""
    world = common.old_start_world(config.device)
    if config.init:
        fields = read_checkpoint(config.init, config.heads if "heads" in given else 0)[1]
        task = config.task if "task" in given else fields["task"]
        if task == "classify" and ({"steps", "epochs"} & given or fields["task"] == "mae"):
            fields = {k: v for k, v in fields.items() if k not in ("classes", "readout")}  # a head for these data
        config = replace(config, **{k: v for k, v in fields.items() if k not in given} | dict(task=task))
        if not set(config.eval.split(",")) <= {*EVALUATIONS[task], "none"} and "eval" not in given:
            config = replace(config, eval="none" if config.sample else EVALUATIONS[task][0])
    training = not config.init or bool({"steps", "epochs"} & given)
    if not training and config.task == "classify" and not config.classes:
        fail(f"{config.init} has no head that classifies: tune one with --steps or --epochs, or use --task mae")
    check(config, world, training)
    out = common.old_choose_out(config.out, Path(__file__).stem, config.resume, world)
    if config.sweep:
        run_sweep(config, world, out)
    else:
        train_and_evaluate(config, world, out, given)


def main(argv=None):
    """The command line; see --help."""
    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--task", default="classify")
    task = early.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].task
    suffix = f"-{task}" if task in ("mae", "diffusion") else ""
    data_presets = {data: name + suffix for data, name in DATA_PRESETS.items()}
    config = common.old_parse_config(Config, PRESETS, data_presets, argv, __doc__.split("\n\n")[0])
    try:
        run(config, common.old_given_flags(argv))
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        advice = "try --accumulate 2 (4, 8), --recompute, --precision bf16, --shard, or a smaller --batch"
        fail(f"out of GPU memory ({reason}): {advice}", 4)
    except OSError as error:
        common.old_fail_if_full(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
