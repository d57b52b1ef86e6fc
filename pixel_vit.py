# SPDX-License-Identifier: MIT
"""Pixel Transformer: every pixel a token; classification, masked autoencoding and diffusion.

"An Image is Worth More Than 16x16 Patches: Exploring Transformers on Individual Pixels",
Nguyen, Assran, Jain, Oswald, Snoek, Chen, ICLR 2025, arXiv 2406.09415. With it the two methods it
builds on: masked autoencoders (He et al. 2022, 2111.06377) and DiT (Peebles, Xie 2023, 2212.09748).

The idea. A vision transformer cuts an image into patches. So it knows, before it learns anything,
that nearby pixels belong together. Take that away: every pixel is a token of its own, and a learned
embedding, which starts as noise, says where it stands. Nothing in the network knows rows, columns
or neighbours. It still learns, and at equal image size pixels beat all larger patches. This is a
finding, not a practical method: half the patch means four times the tokens, which is why tokens
and multiply-adds are printed at the start.

    image [B, 3, S, S] -> pixels [B, S*S, 3] -> Linear, + positions -> tokens [B, N, D]
      |-- 1. classify:  [class | tokens] -> blocks -> mean -> norm -> Linear -> classes
      |-- 2. mae:       a quarter of the tokens -> blocks -> narrow decoder -> all pixels
      '-- 3. diffusion: noisy image; blocks scaled by time and class -> noise and its variance

    python pixel_vit.py                                     # toy images; also --preset toy-mae
    python pixel_vit.py --preset toy-diffusion --judge runs/pixel_vit/last.pt
    torchrun --nproc-per-node 8 pixel_vit.py --data imagenet --preset vit_b1_imagenet28
    python pixel_vit.py --init mae_pretrain_vit_base.pth --preset mae_b16_finetune --data imagenet

There is no official code. What follows MAE, DiT and timm equals their numbers. Departures: random
draws depend on the seed and the micro-batch only; erasing's noise is cut to the range of pixels;
sizes of MAE's decoder on small images are ours; targets are not normalised with patch 1, which
would lose the brightness; the probe runs on features computed once, MAE's on random crops.
CIFAR-100 is read from a folder cifar100/train/CLASS/*.png, since its archive is pickled.
"""

import argparse
import functools
import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint

import common
from common import MLP, Attention, Block, PatchEmbed, ViT, fail

# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag. The comment beside it is its help."""

    preset: str = ""  # a name of PRESETS, by default the one that fits --data
    data: str = "toy"  # toy, shapes, cifar10, imagenet, or a folder of images
    task: Literal["classify", "mae", "diffusion"] = "classify"  # presets choose it

    # model
    image_size: int = 12  # side of the image, pixels
    patch: int = 1  # side of a patch, pixels: 1 is the paper
    width: int = 64  # width of the transformer, of MAE's encoder
    depth: int = 3  # blocks
    heads: int = 4  # attention heads
    positions: Literal["learned", "sincos", "none"] = "learned"  # from noise, fixed sines, or none
    position_std: float = 0.02  # std of the initial learned positions
    readout: Literal["gap", "cls"] = "gap"  # what is read: mean of the tokens, or class token
    classes: int = 0  # classes, 0 = as the data have
    init_std: float = 0.0  # std of the initial weights, 0 = Xavier uniform
    drop_path: float = 0.0  # stochastic depth of the last block, rising from 0 at the first
    permute: int = 0  # pairs of pixels that trade places, in all images alike
    permute_distance: int = 0  # how far apart a pair may be, |rows| + |columns|, 0 = any distance

    # masked autoencoder
    mask_ratio: float = 0.75  # share of the tokens that the encoder does not see
    decoder_width: int = 64  # decoder width
    decoder_depth: int = 2  # decoder blocks
    decoder_heads: int = 4  # attention heads of the decoder
    norm_pix: bool = False  # predict pixels normalised within their patch

    # diffusion
    channels: int = 3  # channels of what is denoised: 3 for pixels, the codec's for latents
    downsample: int = 1  # side of the image over that of its latents
    codec: str = ""  # TorchScript file with encode(images in -1..1) and decode(latents)
    noise_schedule: Literal["linear", "cosine"] = "linear"  # how noise grows over 1000 timesteps
    label_drop: float = 0.1  # share of the labels that are hidden in training, for guidance

    # augmentation
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop, share of the image
    flip: bool = False  # mirror half of the images
    randaugment: int = 0  # operations of RandAugment, each applied to half of the images
    jitter: float = 0.0  # strength of brightness, contrast, saturation and hue jitter
    grey: float = 0.0  # share of the images that turn grey
    erase: float = 0.0  # share of the images of which a rectangle becomes noise
    mixup: float = 0.0  # alpha of mixup, 0 = off
    cutmix: float = 0.0  # alpha of CutMix, 0 = off; with both, a micro-batch gets one of them
    smoothing: float = 0.0  # label smoothing

    # optimisation
    train: bool = True  # train; --no-train only evaluates --init
    batch: int = 32  # images a step, over all ranks
    micro: int = 32  # images a forward pass
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps, wins over --epochs
    warmup: float = 0.1  # share of the run in which the learning rate rises
    lr: float = 2e-3  # peak learning rate
    lr_start: float = 0.0  # learning rate of the first step
    lr_final: float = 1e-6  # learning rate at the end
    cosine: bool = True  # let the learning rate fall after the warm-up, else keep it
    weight_decay: float = 0.04  # AdamW weight decay
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW betas
    clip: float = 0.0  # largest norm of the gradient, 0 = no limit
    layer_decay: float = 1.0  # learning rate of a block over that of the next
    ema: float = 0.0  # momentum of the averaged weights, which are evaluated; 0 = no average

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/pixel_vit, runs/pixel_vit-2, ...
    resume: bool = False  # continue from last.pt in the run's folder, or start if there is none
    init: str = ""  # weights to start from or to evaluate: ours, MAE's or DiT's, or the Hub's
    save_every: int = 500  # steps between checkpoints
    log_every: int = 50  # steps between rows of log.jsonl
    device: Literal["", "cuda", "mps", "cpu"] = ""  # default the best there is
    precision: Literal["", "bf16", "fp16", "fp32"] = ""  # default bf16 where it is fast
    compile: bool = torch.cuda.is_available()  # torch.compile the network
    recompute: bool = False  # activation checkpointing: less memory, a third more time
    shard: bool = False  # FSDP2 instead of DDP, for models that do not fit one GPU
    workers: int = 0  # loading processes a rank, 0 = load between the steps

    # evaluation
    eval: str = ""  # accuracy, reconstruction, knn, linear, samples, features, none
    probe_epochs: int = 30  # passes of the linear probe
    probe_batch: int = 256  # batch of the linear probe
    probe_lrs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)  # learning rates tried, at batch 256
    samples: int = 300  # images that --eval samples makes
    sampler_steps: int = 250  # denoising steps of a sample
    guidance: float = 1.5  # classifier-free guidance, 1 = none
    judge: str = ""  # last.pt of a classifier: measure samples by its features and classes


# --------------------------------------------------------------------------------------------------
# Model: what all three share
# --------------------------------------------------------------------------------------------------


def make_positions(kind, std, width, grid, special=0):
    """Return a table [1, special + grid * grid, D]: learned from noise, fixed sines, or zeros.

    A parameter even where it is fixed, since checkpoints hold it.
    """
    if kind == "sincos":
        table = common.sincos_2d(width, grid, grid).float()
        table = F.pad(table, (0, 0, special, 0))
    else:
        table = torch.randn(special + grid * grid, width) * (std if kind == "learned" else 0)
    return nn.Parameter(table[None], requires_grad=kind == "learned")


def patchify(images, patch):
    """Cut [B, C, H, W] into [B, N, p*p*C], in a patch row by row, channels fastest (MAE, DiT)."""
    x = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, C, h, w, p, q]
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens, patch):
    """Invert `patchify` for square images: [B, N, p*p*C] -> [B, C, H, W]."""
    side = math.isqrt(tokens.shape[1])
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))  # [B, h, w, p, q, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def xavier_uniform(module):
    """For `module.apply`: weights of Linears Xavier uniform, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def apply_block(block, recompute, *inputs):
    """Call a block, with activation checkpointing if asked."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def multiply_adds(*stacks):
    """Return the work of a forward pass on one image; a stack is (tokens, width, depth)."""
    total = 0
    for n, width, depth in stacks:
        total += depth * (12 * n * width**2 + 2 * n**2 * width)
    return total


def token_count(config):
    """Return the pixel (or patch) tokens of an image."""
    return (config.image_size // config.downsample // config.patch) ** 2


def pixel_permutation(side, pairs, distance, seed):
    """Let `pairs` of pixels trade places, each pixel at most once: int64 [side * side].

    Partners are at most `distance` apart, |rows| + |columns| (0: anywhere). Where no free pixel
    has a free partner left, there are fewer pairs.
    """
    random = np.random.default_rng(seed)
    row, column = np.mgrid[:side, :side].reshape(2, -1)
    order = np.arange(side * side)
    free = np.ones(side * side, dtype=bool)
    for a in random.permutation(side * side):
        if pairs and free[a]:
            apart = abs(row - row[a]) + abs(column - column[a])
            near = free & (apart > 0) & (apart <= (distance or 2 * side))
            if near.any():
                b = random.choice(np.flatnonzero(near))
                order[[a, b]] = [b, a]
                free[[a, b]] = False
                pairs -= 1
    return torch.from_numpy(order)


class DropBlock(Block):
    """A block whose branches are left out for some images: stochastic depth."""

    def __init__(self, width, heads, rate):
        super().__init__(width, heads)
        self.rate = rate

    def forward(self, x, uniforms=None):
        """x [B, N, D]; uniforms [2, B] in 0..1 say which images leave out a branch."""
        if uniforms is None or not self.rate:
            return super().forward(x)
        scale = drop_scale(uniforms, self.rate)[..., None, None]  # [2, B, 1, 1]
        x = x + scale[0] * self.attn(self.norm1(x))
        return x + scale[1] * self.mlp(self.norm2(x))


def drop_scale(uniforms, rate):
    """Return what scales a branch: 0 with probability `rate`, else 1 / (1 - rate)."""
    return (uniforms >= rate).float() / (1 - rate)


class Trunk(ViT):
    """Tokeniser, class token, positions and blocks. With patch 1 a token is a pixel's colours."""

    undecayed = ()  # parameters without weight decay, beside biases and norms

    def __init__(self, config):
        c = config
        super().__init__(c.image_size, c.patch, c.width, 0, c.heads, class_token=True)
        grid = c.image_size // c.patch
        self.pos_embed = make_positions(c.positions, c.position_std, c.width, grid, special=1)
        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        self.blocks = nn.ModuleList(DropBlock(c.width, c.heads, rate) for rate in rates)
        self.recompute = c.recompute
        self.readout = c.readout
        order = None
        if c.permute:
            order = pixel_permutation(c.image_size, c.permute, c.permute_distance, c.seed)
        self.register_buffer("permutation", order)  # in the checkpoint, where there is one

    def embed(self, x, keep=None):
        """See `ViT`. Pixels trade places before anything else."""
        if self.permutation is not None:
            x = x.flatten(2)[:, :, self.permutation].view_as(x)
        return super().embed(x, keep)

    def run(self, images, keep=None, uniforms=None):
        """Return tokens [class | patches] before the final norm: [B, 1 + N, D].

        keep: indices [B, K] of the patches to run on; uniforms [depth, 2, B]: see `DropBlock`.
        """
        x = self.embed(images, keep)
        for i, block in enumerate(self.blocks):
            x = apply_block(block, self.recompute, x, None if uniforms is None else uniforms[i])
        return x

    def initialise(self, config):
        """Draw weights from normal(init_std), or Xavier uniform as MAE."""
        if config.init_std:
            common.init_weights(self, config.init_std)
        else:
            self.apply(xavier_uniform)
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(config.width, -1))
        nn.init.normal_(self.cls_token, std=0.02)


# --------------------------------------------------------------------------------------------------
# 1. Classification: RandAugment and colours in the loader, mixup and CutMix on the device
# --------------------------------------------------------------------------------------------------

FILL = (124, 116, 104)  # what comes into the image from outside


def affine(image, *matrix):
    """Return the image where pixel (x, y) shows what was at matrix @ (x, y, 1)."""
    kind = Image.Transform.AFFINE
    return image.transform(image.size, kind, matrix, Image.BICUBIC, fillcolor=FILL)


def solarize_add(image, value):
    """Brighten the darker half of the values."""
    return image.point(lambda v: min(255, v + value) if v < 128 else v)


def keep_bits(image, bits):
    """Posterize, also to 0 bits, which PIL refuses."""
    return image.point(lambda v: v & -(1 << (8 - bits)))


def enhance(kind):
    """Return an operation that turns PIL's enhancer up or down."""
    return lambda image, m: kind(image).enhance(1 + 0.9 * m)


# RandAugment's, "increasing": m is the strength, 0 to 1, with a random sign
OPERATIONS = {
    "autocontrast": lambda image, m: ImageOps.autocontrast(image),
    "equalize": lambda image, m: ImageOps.equalize(image),
    "invert": lambda image, m: ImageOps.invert(image),
    "rotate": lambda image, m: image.rotate(30 * m, Image.BICUBIC, fillcolor=FILL),
    "posterize": lambda image, m: keep_bits(image, 4 - int(4 * abs(m))),
    "solarize": lambda image, m: ImageOps.solarize(image, 256 - int(256 * abs(m))),
    "solarizeadd": lambda image, m: solarize_add(image, int(110 * abs(m))),
    "color": enhance(ImageEnhance.Color),
    "contrast": enhance(ImageEnhance.Contrast),
    "brightness": enhance(ImageEnhance.Brightness),
    "sharpness": enhance(ImageEnhance.Sharpness),
    "shearx": lambda image, m: affine(image, 1, 0.3 * m, 0, 0, 1, 0),
    "sheary": lambda image, m: affine(image, 1, 0, 0, 0.3 * m, 1, 0),
    "translatex": lambda image, m: affine(image, 1, 0, 0.45 * m * image.width, 0, 1, 0),
    "translatey": lambda image, m: affine(image, 1, 0, 0, 0, 1, 0.45 * m * image.height),
}


def shift_hue(image, turns):
    """Shift the hue by a share of the colour circle."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point(lambda v: (v + int(255 * turns)) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def augment(image, config, random):
    """Apply RandAugment (level 9), colour jitter and grey to a PIL image."""
    c = config
    for operation in random.choice(list(OPERATIONS.values()), c.randaugment):
        if random.random() < 0.5:
            level = np.clip(random.normal(9, 0.5), 0, 10)
            image = operation(image, random.choice([-1, 1]) * level / 10)
    if c.jitter:
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for kind in random.permutation(4):
            shift = random.uniform(-c.jitter, c.jitter)
            if kind == 3:
                image = shift_hue(image, shift)
            else:
                image = enhancers[kind](image).enhance(1 + shift)
    if random.random() < c.grey:
        image = image.convert("L").convert("RGB")
    return image


def erase(pixels, random):
    """Fill a rectangle of pixels uint8 [3, S, S] with noise: 2 % to a third of the area."""
    size = pixels.shape[1]
    area = size * size * random.uniform(0.02, 1 / 3)
    ratio = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
    height = min(size, round(math.sqrt(area * ratio)))
    width = min(size, round(math.sqrt(area / ratio)))
    top, left = random.integers((size - height + 1, size - width + 1))
    noise = torch.from_numpy(random.normal(size=(3, height, width)))
    noise = 255 * (noise * common.STD + common.MEAN)
    pixels[:, top : top + height, left : left + width] = noise.clamp(0, 255)


def draw_mix(random, size, mixup, cutmix):
    """Return the share [S, S] that an image keeps of its own pixels; the rest is its partner's.

    Mixup: the same everywhere. CutMix: 0 in a box, else 1.
    """
    use_cutmix = random.random() < 0.5 if mixup and cutmix else bool(cutmix)
    alpha = cutmix if use_cutmix else mixup
    own = random.beta(alpha, alpha)
    if not use_cutmix:
        return torch.full((size, size), own)
    share = torch.ones(size, size)
    side = int(size * math.sqrt(1 - own))
    y, x = random.integers(0, size, 2)
    rows = slice(max(0, y - side // 2), y + (side + 1) // 2)
    share[rows, max(0, x - side // 2) : x + (side + 1) // 2] = 0
    return share


def mix(images, targets, share):
    """Mix images [B, 3, S, S] and targets [B, C] with the batch in reverse, by `draw_mix`."""
    images = images.flip(0).lerp(images, share)
    return images, targets.flip(0).lerp(targets, share.mean())


def smooth_targets(labels, classes, smoothing):
    """Return soft targets [B, C] of labels [B]."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def classification_loss(logits, targets):
    """Return the cross entropy with soft targets [B, C], mean over the batch."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()


class Classifier(Trunk):
    """A linear layer on the normed mean of the pixel tokens (gap), or on the normed class token."""

    evaluations = ("accuracy", "knn", "linear", "features")  # the first two by default
    undecayed = ("cls_token", "pos_embed")

    def __init__(self, config):
        super().__init__(config)
        self.classes = config.classes
        self.smoothing = config.smoothing
        if self.readout == "gap":  # MAE's names
            self.fc_norm = self.norm
            self.norm = nn.Identity()
        self.head = nn.Linear(config.width, config.classes)
        self.initialise(config)

    @staticmethod
    def work(config):
        """Return the multiply-adds of a forward pass on one image."""
        return multiply_adds((token_count(config) + 1, config.width, config.depth))

    @staticmethod
    def draw(config, pixels, labels, number):
        """Augment pixels uint8 [B, 3, S, S] of a micro-batch; return the inputs of `forward`."""
        c = config
        key = common.generator(c.seed, "augment", number)
        uniforms = torch.rand(c.depth, 2, len(pixels), generator=key)
        random = np.random.default_rng(key.initial_seed())
        for image in pixels:
            changed = augment(Image.fromarray(image.permute(1, 2, 0).numpy()), c, random)
            image[:] = torch.from_numpy(np.array(changed)).permute(2, 0, 1)
            if random.random() < c.erase:
                erase(image, random)
        share = torch.ones(1, 1)
        if c.mixup or c.cutmix:
            share = draw_mix(random, c.image_size, c.mixup, c.cutmix)
        return pixels, labels, share, uniforms

    def forward(self, images, labels, share, uniforms):
        """Return the loss on images [B, 3, S, S]; see `draw`."""
        targets = smooth_targets(labels, self.classes, self.smoothing)
        images, targets = mix(images, targets, share)
        return classification_loss(self.logits(images, uniforms), targets)

    def pooled(self, images, uniforms=None):
        """Return what the head reads [B, D]."""
        x = self.norm(self.run(images, uniforms=uniforms))
        if self.readout == "cls":
            return x[:, 0]
        return self.fc_norm(x[:, 1:].mean(1))

    def logits(self, images, uniforms=None):
        """Images [B, 3, H, W] -> [B, C]."""
        return self.head(self.pooled(images, uniforms))


def accuracy(model, val, config, world):
    """Return top-1 accuracy on a Split, percent; {} on ranks above 0."""
    scores, labels, _ = common.extract(model.logits, val, config, world)
    return {} if world.rank else {"top-1": common.top1(scores, labels)}


@torch.no_grad()
def draw_classifier(path, model, images, config, columns=7):
    """Show the surest images of each class, and how alike positions are.

    A row is a class: the images that are most surely taken for it. The last tile shows, for a pixel
    on the diagonal, the cosine similarity of its position with all others. Nothing told the model
    which pixels are neighbours.
    """
    scores = model.logits(images).softmax(1)  # [B, C]
    table = model.pos_embed[0, 1:]
    table = F.normalize(table - table.mean(0), dim=1)
    grid = math.isqrt(len(table))
    rows = []
    for i in range(min(8, config.classes)):
        surest = scores[:, i].topk(min(columns, len(images))).indices
        place = (2 * i + 1) * grid // 16
        similarity = (table @ table[place * grid + place]).view(1, 1, grid, grid)
        heat = F.interpolate(2 * similarity, images.shape[2:])
        heat = heat.expand(-1, 3, -1, -1)  # grey
        rows.append(torch.cat([images[surest], heat]))
    common.save_picture(path, torch.stack(rows))
    common.note(f"{path}: rows are classes, surest images first; last, how alike positions are")


# --------------------------------------------------------------------------------------------------
# 2. Masked autoencoder (sections 3.1 to 3.4 of MAE)
# --------------------------------------------------------------------------------------------------


def kept_tokens(tokens, ratio):
    """Return how many tokens the encoder sees: cut as the released code cuts, but at least one."""
    return max(1, int(tokens * (1 - ratio)))


def random_masking(noise, ratio):
    """Return (keep int64 [B, K], restore int64 [B, N], mask float [B, N], 1 = removed).

    noise [B, N]: the smallest are kept. Kept tokens stay in the order of their noise inside the
    encoder; `restore` is the inverse of that order.
    """
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    kept = kept_tokens(noise.shape[1], ratio)
    return shuffle[:, :kept], restore, (restore >= kept).float()


def mae_target(images, patch, norm_pix):
    """Return what to paint: patches [B, N, p*p*3], with norm_pix standardised within the patch."""
    target = patchify(images, patch)
    if norm_pix:
        mean = target.mean(-1, keepdim=True)
        target = (target - mean) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return target


def mae_loss(prediction, target, mask):
    """Return the squared error on removed patches: prediction, target [B, N, P], mask [B, N]."""
    error = (prediction.float() - target).square().mean(-1)
    return (error * mask).sum() / mask.sum()


class MAE(Trunk):
    """The encoder sees a quarter of the pixels; a narrow decoder paints all of them."""

    evaluations = ("reconstruction", "knn", "linear", "features")

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.mask_ratio = c.mask_ratio
        self.norm_pix = c.norm_pix
        self.decoder_embed = nn.Linear(c.width, c.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_width))
        grid = c.image_size // c.patch
        positions = make_positions(c.positions, c.position_std, c.decoder_width, grid, special=1)
        self.decoder_pos_embed = positions
        blocks = [Block(c.decoder_width, c.decoder_heads) for _ in range(c.decoder_depth)]
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(c.decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(c.decoder_width, c.patch**2 * 3)
        self.initialise(config)
        nn.init.normal_(self.mask_token, std=0.02)

    @staticmethod
    def work(config):
        """Return the multiply-adds of a forward pass on one image."""
        n = token_count(config)
        encoder = (kept_tokens(n, config.mask_ratio) + 1, config.width, config.depth)
        return multiply_adds(encoder, (n + 1, config.decoder_width, config.decoder_depth))

    @staticmethod
    def draw(config, pixels, labels, number):
        """Return the inputs of `forward`: pixels, and noise [B, N] that decides what to hide."""
        random = common.generator(config.seed, "masks", number)
        return pixels, torch.rand(len(pixels), token_count(config), generator=random)

    def forward(self, images, noise):
        """Return the loss on images [B, 3, S, S]; see `draw`."""
        prediction, mask = self.paint(images, noise)
        return mae_loss(prediction, mae_target(images, self.patch, self.norm_pix), mask)

    def paint(self, images, noise):
        """Return predicted patches [B, N, p*p*3], and the mask [B, N], 1 = removed."""
        keep, restore, mask = random_masking(noise, self.mask_ratio)
        x = self.decoder_embed(self.norm(self.run(images, keep)))  # [B, 1 + K, Dd]
        hidden = restore.shape[1] - keep.shape[1]
        hidden = self.mask_token.to(x.dtype).expand(len(x), hidden, -1)
        tokens = common.gather_tokens(torch.cat([x[:, 1:], hidden], dim=1), restore)
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed  # [B, 1 + N, Dd]
        for block in self.decoder_blocks:
            x = apply_block(block, self.recompute, x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:], mask

    def tokens(self, images):
        """Return all normed tokens [B, 1 + N, D], nothing masked."""
        return self.norm(self.run(images))

    def pooled(self, images):
        """Return features [B, D]: the mean of the patch tokens (gap), or the class token."""
        x = self.tokens(images)
        return x[:, 1:].mean(1) if self.readout == "gap" else x[:, 0]


def reconstruction(model, images, config):
    """Return 100 times the squared error on hidden patches, and that of the mean visible patch."""
    random = common.generator(config.seed, "val masks")
    noise = torch.rand(len(images), token_count(config), generator=random)
    prediction, mask = model.paint(images, noise.to(images.device))
    target = mae_target(images, config.patch, config.norm_pix)
    visible = 1 - mask[..., None]
    mean = (target * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)
    errors = {"hidden error x 100": prediction, "of mean colour": mean}
    return {name: 100 * mae_loss(x, target, mask).item() for name, x in errors.items()}


@torch.no_grad()
def draw_reconstruction(path, model, images, config, rows=8):
    """Show images, what the encoder sees, what the decoder paints, and that in the gaps only."""
    images = images[:rows]
    random = common.generator(config.seed, "picture")
    noise = torch.rand(len(images), token_count(config), generator=random)
    prediction, mask = model.paint(images, noise.to(images.device))
    target = patchify(images, config.patch)
    if config.norm_pix:  # back to pixels, by the statistics of the patch that should be there
        prediction = prediction * (target.var(-1, keepdim=True) + 1e-6).sqrt()
        prediction = prediction + target.mean(-1, keepdim=True)
    hidden = mask[..., None] > 0
    together = torch.where(hidden, prediction.float(), target)
    columns = (target, target.where(~hidden, torch.zeros(())), prediction.float(), together)
    tiles = [unpatchify(patches, config.patch) for patches in columns]
    common.save_picture(path, torch.stack(tiles, dim=1))
    common.note(f"{path}: image, what is visible, what is painted, and both together")


# --------------------------------------------------------------------------------------------------
# 3. Diffusion: DiT, the Gaussian process it is trained on, and its samples
# --------------------------------------------------------------------------------------------------

TIMESTEPS = 1000
LATENT_SCALE = 0.18215  # brings the latents of Stable Diffusion's autoencoder to unit variance


def noise_betas(schedule):
    """Return the variance of the noise that each of 1000 steps adds, float64 [T]."""
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, TIMESTEPS)
    u = np.arange(TIMESTEPS + 1) / TIMESTEPS
    g = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - g[1:] / g[:-1], 0.999)


def space_timesteps(count):
    """Return which of the 1000 timesteps a sampler takes: `count`, evenly from first to last."""
    stride = (TIMESTEPS - 1) / (count - 1) if count > 1 else 1.0
    steps = []
    place = 0.0
    for _ in range(count):  # summed, not multiplied, as the released code rounds
        steps.append(round(place))
        place += stride
    return steps


def diffusion_tables(betas, steps):
    """Return the tables of a process that takes `steps` of another: {name: float64 [T]}."""
    cumulative = np.cumprod(1 - betas)[steps]
    previous = np.append(1.0, cumulative[:-1])
    betas = 1 - cumulative / previous
    variance = betas * (1 - previous) / (1 - cumulative)
    # the variance of step 0 is 0, which has no logarithm
    clipped = np.append(variance[1:2], variance[1:]) if len(betas) > 1 else betas
    return {
        "alphas_cumprod": cumulative,
        "betas": betas,
        "log_betas": np.log(betas),
        "sqrt_alphas_cumprod": np.sqrt(cumulative),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - cumulative),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / cumulative),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / cumulative - 1),
        "posterior_log_variance_clipped": np.log(clipped),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - cumulative),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - cumulative),
    }


class Diffusion(nn.Module):
    """A Gaussian process of `count` steps k. The network is told timestep_map[k], in 0..999."""

    def __init__(self, schedule, count=TIMESTEPS):
        super().__init__()
        self.count = count
        steps = space_timesteps(count)
        for name, table in diffusion_tables(noise_betas(schedule), steps).items():
            self.register_buffer(name, torch.from_numpy(table).float(), persistent=False)
        self.register_buffer("timestep_map", torch.tensor(steps), persistent=False)

    def at(self, name, k):
        """Return the entries k [B] of a table as [B, 1, 1, 1]."""
        return getattr(self, name)[k][:, None, None, None]

    def q_sample(self, x_start, k, noise):
        """Noise x_start [B, C, H, W] to step k [B]."""
        signal = self.at("sqrt_alphas_cumprod", k) * x_start
        return signal + self.at("sqrt_one_minus_alphas_cumprod", k) * noise

    def posterior_mean(self, x_start, x, k):
        """Return the mean of the step before k, given the image and step k."""
        mean = self.at("posterior_mean_coef1", k) * x_start
        return mean + self.at("posterior_mean_coef2", k) * x

    def denoise(self, output, x, k, clip):
        """Return (mean, log variance) of the step before k, and the image expected.

        output [B, 2C, H, W]: the network's at x, step k. clip: cut that image to -1..1.
        """
        noise, logits = output.float().chunk(2, dim=1)
        share = (logits + 1) / 2  # between the two bounds of the variance; not clamped
        log_variance = share * self.at("log_betas", k)
        log_variance = log_variance + (1 - share) * self.at("posterior_log_variance_clipped", k)
        x_start = self.at("sqrt_recip_alphas_cumprod", k) * x
        x_start = x_start - self.at("sqrt_recipm1_alphas_cumprod", k) * noise
        if clip:
            x_start = x_start.clamp(-1, 1)
        return self.posterior_mean(x_start, x, k), log_variance, x_start

    def bound(self, output, x_start, x, k):
        """Return terms of the variational bound [B], bits a dimension: KL to the posterior.

        At k = 0: minus the log likelihood of the image.
        """
        mean, log_variance, _ = self.denoise(output, x, k, clip=False)
        true_log_variance = self.at("posterior_log_variance_clipped", k)
        ratio = true_log_variance - log_variance
        gap = self.posterior_mean(x_start, x, k) - mean
        distance = gap.square() * (-log_variance).exp()
        kl = 0.5 * (-1 - ratio + ratio.exp() + distance).flatten(1).mean(1)
        likelihood = log_likelihood(x_start, mean, 0.5 * log_variance).flatten(1).mean(1)
        return torch.where(k == 0, -likelihood, kl) / math.log(2)


def log_likelihood(x, mean, log_std):
    """Return log probabilities of 8-bit values x in -1..1 under a normal distribution."""

    def cdf(z):
        z = z + 0.044715 * z**3
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * z))

    inverse = (-log_std).exp()
    above = cdf(inverse * (x - mean + 1 / 255))
    below = cdf(inverse * (x - mean - 1 / 255))
    probability = torch.where(x > 0.999, 1 - below, above - below)
    probability = torch.where(x < -0.999, above, probability)
    return probability.clamp(min=1e-12).log()


def diffusion_loss(diffusion, output, x_start, x, k, noise):
    """Return DiT's hybrid loss, [B] each: squared error of the noise, and the variational bound.

    The bound trains the variance only: it sees the predicted noise detached.
    """
    predicted, logits = output.float().chunk(2, dim=1)
    mse = (noise - predicted).square().flatten(1).mean(1)
    frozen = torch.cat([predicted.detach(), logits], dim=1)
    return mse, diffusion.bound(frozen, x_start, x, k)


def timestep_embedding(t, width):
    """Return [cos(t f) | sin(t f)], f_k = 10000^(-k / (width // 2)): t [B] -> [B, width]."""
    half = width // 2
    powers = torch.arange(half, device=t.device).float() / half
    angles = t[:, None].float() * torch.exp(-math.log(10000) * powers)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, width % 2))


def modulate(x, shift, scale):
    """Norm x [B, N, D] without affine, then scale and shift it by an image's [B, D]."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class TanhMLP(MLP):
    """DiT's MLP: GELU by tanh."""

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ConditionedBlock(nn.Module):
    """adaLN-zero: the condition scales, shifts and gates both branches. Gates start at 0."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = TanhMLP(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition):
        """x [B, N, D], condition [B, D] -> [B, N, D]."""
        modulation = self.adaLN_modulation(condition).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn[:, None] * self.attn(modulate(x, shift_attn, scale_attn))
        return x + gate_mlp[:, None] * self.mlp(modulate(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm, and Linear to the patch's pixels."""

    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, condition):
        """x [B, N, D], condition [B, D] -> [B, N, out]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))


def drop_labels(labels, uniforms, share, null):
    """Hide a share of labels [B] behind `null`, by uniforms [B]; unknown ones (-1) always."""
    return torch.where((uniforms < share) | (labels < 0), null, labels)


class DiT(nn.Module):
    """Diffusion transformer. With patch 1 every pixel, or place of a latent, is a token."""

    evaluations = ("samples",)
    undecayed = ()

    def __init__(self, config):
        super().__init__()
        c = config
        self.patch = c.patch
        self.recompute = c.recompute
        self.null = c.classes  # the label that stands for none
        self.diffusion = Diffusion(c.noise_schedule)
        self.x_embedder = PatchEmbed(c.patch, c.width)
        self.x_embedder.proj = nn.Conv2d(c.channels, c.width, c.patch, c.patch)
        grid = c.image_size // c.downsample // c.patch
        self.pos_embed = make_positions(c.positions, c.position_std, c.width, grid)
        first = nn.Linear(256, c.width)
        layers = nn.Sequential(first, nn.SiLU(), nn.Linear(c.width, c.width))
        self.t_embedder = nn.ModuleDict({"mlp": layers})  # nested as released
        table = nn.Embedding(c.classes + 1, c.width)  # the last row: no class, for guidance
        self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.blocks = nn.ModuleList(ConditionedBlock(c.width, c.heads) for _ in range(c.depth))
        self.final_layer = FinalLayer(c.width, c.patch**2 * c.channels * 2)
        self.initialise()

    def initialise(self):
        """Draw the weights as DiT does. An untrained network predicts 0."""
        self.apply(xavier_uniform)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        for layer in self.t_embedder["mlp"][::2]:
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)

    @staticmethod
    def work(config):
        """Return the multiply-adds of a forward pass on one image."""
        return multiply_adds((token_count(config), config.width, config.depth))

    @staticmethod
    def draw(config, pixels, labels, number):
        """Return the inputs of `forward`: pixels, labels (some hidden), steps k [B], and noise."""
        c = config
        random = common.generator(c.seed, "diffusion", number)
        k = torch.randint(TIMESTEPS, (len(pixels),), generator=random)
        side = c.image_size // c.downsample
        noise = torch.randn(len(pixels), c.channels, side, side, generator=random)
        uniforms = torch.rand(len(pixels), generator=random)
        return pixels, drop_labels(labels, uniforms, c.label_drop, c.classes), k, noise

    def forward(self, x_start, labels, k, noise):
        """Return the loss on images or latents [B, C, H, W]; see `draw`."""
        x = self.diffusion.q_sample(x_start, k, noise)
        output = self.predict(x, self.diffusion.timestep_map[k], labels)
        mse, bound = diffusion_loss(self.diffusion, output, x_start, x, k, noise)
        return (mse + bound).mean()

    def predict(self, x, t, labels):
        """Return noise and variance logits [B, 2C, H, W] at x [B, C, H, W], timestep t [B]."""
        tokens = self.x_embedder(common.patchify(x, self.patch)) + self.pos_embed
        condition = self.t_embedder["mlp"](timestep_embedding(t, 256))
        condition = condition + self.y_embedder["embedding_table"](labels)  # [B, D]
        for block in self.blocks:
            tokens = apply_block(block, self.recompute, tokens, condition)
        return unpatchify(self.final_layer(tokens, condition), self.patch)


def guided(model, x, t, labels, scale):
    """Return the output for labels, its noise moved `scale` times away from that for no label.

    As in the released code the first three channels are guided, of latents too.
    """
    if scale == 1:
        return model.predict(x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, model.null)])
    output = model.predict(torch.cat([x, x]), torch.cat([t, t]), both)
    asked, without = output.chunk(2)
    moved = without[:, :3] + scale * (asked - without)[:, :3]
    return torch.cat([moved, asked[:, 3:]], dim=1)


@torch.no_grad()
def sample_loop(diffusion, network, x, draw, clip):
    """Denoise x [B, C, H, W] from pure noise; yield (x, the image expected) after each step.

    network(x, t) returns its output; draw() noise [B, C, H, W].
    """
    for step in reversed(range(diffusion.count)):
        k = torch.full((len(x),), step, device=x.device)
        output = network(x, diffusion.timestep_map[k])
        mean, log_variance, x_start = diffusion.denoise(output, x, k, clip)
        x = mean + (0.5 * log_variance).exp() * draw() if step else mean
        yield x, x_start


def sample_images(model, config, numbers, world, codec=None):
    """Return the samples `numbers` of this --seed: (uint8 [B, 3, S, S], labels [B]).

    Classes take turns. A number gives the same picture in any batch, up to rounding.
    """
    c = config
    diffusion = Diffusion(c.noise_schedule, c.sampler_steps).to(world.device)
    labels = torch.tensor(numbers, device=world.device) % max(1, c.classes)
    generators = [common.generator(c.seed, "sample", number) for number in numbers]
    side = c.image_size // c.downsample

    def draw():
        noise = [torch.randn(c.channels, side, side, generator=random) for random in generators]
        return torch.stack(noise).to(world.device)

    def network(x, t):
        with world.autocast():
            return guided(model, x, t, labels, c.guidance if c.classes else 1)

    *_, (x, _) = sample_loop(diffusion, network, draw(), draw, clip=codec is None)
    if codec:
        with torch.no_grad():
            x = codec.decode(x / LATENT_SCALE)
    return (127.5 * x + 128).clamp(0, 255).byte(), labels


def frechet_distance(a, b):
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of features [N, D], [M, D].

    The FID, if the features are Inception's; else a distance of its own.
    """
    a = a.cpu().double()
    b = b.cpu().double()
    covariance = b.T.cov()
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + values.sum() + covariance.trace() - 2 * cross).item()


def sample_all(model, config, world, codec):
    """Return --samples images uint8 [N, 3, S, S] and labels, made by all ranks."""
    share = math.ceil(config.samples / world.size)
    numbers = torch.arange(world.rank * share, (world.rank + 1) * share)
    parts = []
    for some in numbers.split(config.micro):
        parts.append(sample_images(model, config, some.tolist(), world, codec))
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    images = common.gather_over_ranks(images)[: config.samples]
    return images, common.gather_over_ranks(labels)[: config.samples]


@torch.no_grad()
def evaluate_samples(model, train, val, config, world, run):
    """Write samples.npz and a picture; with --judge compare them with images.

    ADM's evaluator.py reads samples.npz and tells FID, sFID, precision and recall. A judge is a
    classifier: the Frechet distance in its features, and how many samples it takes for the class
    that was asked for.
    """
    c = config
    codec = load_codec(c, world.device)
    images, labels = sample_all(model, c, world, codec)
    if world.rank == 0:
        pixels = images.permute(0, 2, 3, 1).cpu()
        np.savez(run.out / "samples.npz", arr_0=pixels, labels=labels.cpu())
        columns = min(max(1, c.classes), 10, len(images))  # on small data a column is a class
        few = images[: min(8, len(images) // columns) * columns]
        tiles = common.normalize(few).unflatten(0, (-1, columns))
        common.save_picture(run.out / "picture.png", tiles)
        common.note(f"{run.out}: samples.npz, for ADM's evaluator.py, and picture.png")
    if not c.judge:
        return
    judge = load_model(c.judge)[0].to(world.device)
    order = common.epoch_order(len(train), c.seed, "reference")
    few = train.subset(order[: c.samples])
    reference, _, _ = common.extract(judge.pooled, few, c, world)
    columns = {"real": common.extract(judge.pooled, val, c, world)[:2]}
    untrained = build(c)[1].to(world.device).eval()
    found = {"samples": (images, labels), "untrained": sample_all(untrained, c, world, codec)}
    for name, (images, labels) in found.items():
        features = [judge.pooled(common.normalize(part)) for part in images.split(64)]
        columns[name] = torch.cat(features), labels
    results = {}
    if world.rank == 0:
        for name, (features, labels) in columns.items():
            taken = common.top1(judge.head(features), labels)
            distance = frechet_distance(features, reference)
            results[name] = {"frechet": distance, "asked class, %": taken}
    run.report(results)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------

TASKS = {"classify": Classifier, "mae": MAE, "diffusion": DiT}
LABELLED = {"accuracy", "knn", "linear"}  # evaluations that need labels


def centre_crop(image, size):
    """Return the central square of a PIL image as ADM and DiT prepare it."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    image = image.resize(sides, Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Squares(common.Split):
    """Images for diffusion: always the central square."""

    def read(self, index, choose_boxes, sizes, resample=None):
        """See `common.Split`; the boxes are not used."""
        image = self.images[index]
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image)
        with image:
            image = common.to_rgb(image, common.exif_turn(image))
        pixels = np.array(centre_crop(image, sizes[0]))
        return [torch.from_numpy(pixels).permute(2, 0, 1)]


def make_micro_batch(split, config, number):
    """Make micro-batch `number` of a run: (the task's inputs, unreadable files).

    All of it depends on the seed and the number only.
    """
    c = config
    random = common.generator(c.seed, "images", number)
    flips = torch.rand(c.micro, generator=random) < 0.5
    indices = common.micro_batch_indices(number, c.micro, len(split), c.seed)

    def box(i, width, height):
        return [common.random_crop(width, height, c.crop_scale, random)]

    found, pixels, bad = split.read_batch(indices, box, [c.image_size], Image.BICUBIC)
    if c.flip:
        pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
    return *TASKS[c.task].draw(c, pixels, split.labels[found], number), bad


def load_codec(config, device):
    """Return the frozen autoencoder of --codec, or None. Its latents must be what flags say."""
    c = config
    shape = (c.channels, c.image_size // c.downsample)
    if not c.codec and shape == (3, c.image_size):
        return None
    try:
        codec = torch.jit.load(c.codec, map_location=device).eval()
    except (OSError, RuntimeError, ValueError):
        fail(f"latents need an autoencoder: --codec {c.codec!r} is no TorchScript file")
    images = torch.zeros(1, 3, c.image_size, c.image_size, device=device)
    found = codec.encode(images).shape
    if found[1:3] != shape:
        fail(f"--codec makes latents {list(found)}: set --channels and --downsample to match")
    return codec


def preparation(config, device):
    """Return the function from pixels uint8 [B, 3, S, S] to what the network sees."""
    if config.task != "diffusion":
        return common.normalize
    codec = load_codec(config, device)

    def prepare(pixels):
        images = pixels / 127.5 - 1
        if codec is None:
            return images
        with torch.no_grad():
            return codec.encode(images) * LATENT_SCALE

    return prepare


@functools.lru_cache(maxsize=2)
def shapes(name):
    """Ten bright shapes on dark ground, 12 x 12, of any colour, shifted, scaled and turned."""
    random, labels = common.toy_random(name)
    left, top, turn, scale = random.uniform(-0.25, 0.25, (4, len(labels), 1, 1))
    line = (np.arange(12) - 5.5) / 6  # the image spans -1 to 1
    place = line - left + 1j * (line[:, None] - top)  # complex numbers x + iy
    place = place * np.exp(1j * turn) / (0.67 + scale / 4)
    u = place.real
    v = place.imag

    def bar(u, v, length, width):
        return np.maximum(abs(u) / length, abs(v) / width) - 1

    upright = bar(v, u, 1, 0.3)
    outlines = {  # negative inside
        "disc": abs(place) - 1,
        "ring": abs(abs(place) - 0.75) - 0.25,
        "square": bar(u, v, 0.9, 0.9),
        "frame": abs(bar(u, v, 0.75, 0.75)) - 0.35,
        "plus": np.minimum(bar(u, v, 1, 0.3), upright),
        "slash": bar(u + v, u - v, 1.5, 0.4),
        "triangle": np.maximum(abs(u) * 1.7 - v - 1, v - 0.8),
        "rows": bar(u, abs(v) - 0.6, 1, 0.3),
        "columns": bar(v, abs(u) - 0.6, 1, 0.3),
        "tee": np.minimum(bar(u, v + 0.7, 1, 0.3), upright),
    }
    outside = np.choose(labels[:, None, None], list(outlines.values()))
    ink = np.clip(0.5 - 3 * outside, 0, 1)[..., None]  # soft edges
    dark = random.uniform(0, 80, (len(labels), 1, 1, 3))
    light = random.uniform(130, 255, dark.shape)
    images = dark + (light - dark) * ink
    images = images + random.normal(0, 6, images.shape)
    return common.in_memory(images, labels, list(outlines), name)


common.TOYS["shapes"] = shapes

# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def build(config):
    """Return a fresh (model, target); the target, a moving average, starts as a copy."""
    torch.manual_seed(config.seed)
    model, target = (TASKS[config.task](config) for _ in range(2))
    target.load_state_dict(model.state_dict())
    return model, target.requires_grad_(False)


def learning_rate(config, step, steps):
    """Return the learning rate of step 0, 1, ..."""
    c = config
    warmup = round(c.warmup * steps)
    final = c.lr_final if c.cosine else c.lr
    return common.cosine_schedule(step, steps, c.lr, final, warmup, c.lr_start)


def parameter_rule(name, dimensions, depth, layer_decay, undecayed=()):
    """Return (layer, share of the learning rate, whether decayed) of a parameter.

    Layer 0 makes the tokens, then come the blocks, then the rest. Each layer learns `layer_decay`
    times as fast as the next. 1-D parameters and biases are not decayed.
    """
    layer = depth + 1
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        layer = int(block[1]) + 1
    elif name.startswith(("cls_token", "pos_embed", "patch_embed", "x_embedder")):
        layer = 0
    decayed = dimensions > 1 and not name.endswith(".bias") and name not in undecayed
    return layer, layer_decay ** (depth + 1 - layer), decayed


def make_optimizer(model, config):
    """Return AdamW with a group for each distinct rule: `scale` of the learning rate, decay."""
    c = config
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rule = parameter_rule(name, parameter.dim(), c.depth, c.layer_decay, model.undecayed)
            groups.setdefault(rule[1:], []).append(parameter)
    rows = []
    for (scale, decayed), members in groups.items():
        decay = c.weight_decay if decayed else 0.0
        rows.append({"params": members, "scale": scale, "weight_decay": decay})
    return torch.optim.AdamW(rows, betas=c.betas, eps=1e-8, fused=True)


def train(model, target, split, config, world):
    """Train the model and average it into the target; last.pt holds both. Returns the run."""
    steps_an_epoch = max(1, len(split) // config.batch)
    steps = config.steps or max(1, int(config.epochs * steps_an_epoch))
    prepare = preparation(config, world.device)
    model.to(world.device)
    target.to(world.device)
    if config.compile:
        model.compile()
    network = common.distribute(model, world, config.shard)
    target = common.distribute(target, world, config.shard)
    optimizer = make_optimizer(model, config)
    ema = common.EMA(target, model)
    run = common.Run(config, world, steps, network, optimizer, target=target)
    common.note(f"{run.out}: {len(split)} images, steps {run.step} to {steps} of {config.batch}")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    cost = f"{token_count(config)} tokens, {model.work(config) / 1e9:.3g} G multiply-adds an image"
    common.note(f"{config.task}: {millions:.2f} M parameters, {cost}")
    make = functools.partial(make_micro_batch, split, config)
    numbers = common.micro_batches(config, world, run.step, steps)
    loader = common.make_loader(make, numbers, config, world)
    parts = config.batch // config.micro // world.size
    clip = None
    if config.clip:
        clip = functools.partial(nn.utils.clip_grad_norm_, list(model.parameters()), config.clip)
    for step in run:
        lr = learning_rate(config, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        for part in range(parts):
            pixels, *inputs = run.next(loader, split)
            run.sync_gradients(part == parts - 1)
            with world.autocast():
                loss = network(prepare(pixels), *inputs)
            run.backward(loss / parts)
        applied = run.update(clip)
        ema.update(config.ema, applied)
        run.log(lr=lr)
    return run


# --------------------------------------------------------------------------------------------------
# Evaluate: frozen features of classifiers and autoencoders
# --------------------------------------------------------------------------------------------------


# Copied from ijepa.py
class LARS(torch.optim.Optimizer):
    """SGD whose steps are scaled by |p| / |gradient|, for batches of thousands."""

    def __init__(self, params, momentum=0.9, trust=0.001):
        super().__init__(params, {"momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self):
        """Take a step. 1-D parameters have no trust ratio."""
        for group in self.param_groups:
            for p in group["params"]:
                change = p.grad + group["weight_decay"] * p
                if p.dim() > 1:
                    ratio = group["trust"] * p.norm() / change.norm()
                    change = change * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(change)
                p.sub_(group["lr"] * buffer)


def probe_head(width, classes):
    """Return MAE's probe: BatchNorm without affine, and a linear layer."""
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


def linear_probe(bank, labels, test, test_labels, config):
    """Return MAE's linear probe, top-1 of the best rate in percent: bank [N, D], test [M, D]."""
    c = config
    torch.manual_seed(c.seed)
    batches = common.shuffled_batches(bank, labels, c.probe_batch, c.seed)
    heads = {}
    for rate in c.probe_lrs:
        head = probe_head(bank.shape[1], int(labels.max()) + 1).to(bank.device)
        heads[rate] = (head, rate * c.probe_batch / 256, 0.0)
    drops = [c.probe_epochs // 3, c.probe_epochs * 2 // 3]
    return common.linear_probe(batches, test, test_labels, heads, c.probe_epochs, LARS, drops)[0]


@torch.no_grad()
def evaluate(target, train, val, config, world, run):
    """Run --eval on the network, on a random one, and for kNN on raw pixels."""
    wanted = set(config.eval.split(","))
    if not (train.classes and val.classes):
        wanted -= LABELLED
    networks = {"trained": target, "random": build(config)[1].to(world.device).eval()}
    encoders = {name: network.pooled for name, network in networks.items()}
    if "knn" in wanted:
        encoders["pixels"] = common.raw_pixels
    results = {}
    for name, encode in encoders.items():
        result = results[name] = {}
        if "accuracy" in wanted and name in networks:
            result.update(accuracy(networks[name], val, config, world))
        if "reconstruction" in wanted and name in networks:
            result.update(reconstruction(networks[name], unseen(val, config, world), config))
        if not wanted & {"knn", "linear"}:
            continue
        bank, bank_labels, _ = common.extract(encode, train, config, world)
        test, labels, _ = common.extract(encode, val, config, world)
        if "knn" in wanted and world.rank == 0:
            result["knn"] = common.top1(common.knn(bank, bank_labels, test), labels)
        if "linear" in wanted and world.rank == 0:
            with torch.enable_grad():
                result["linear"] = linear_probe(bank, bank_labels, test, labels, config)
    run.report(results)


def write_features(network, split, config, world, run):
    """Write features.npz: features [N, D], labels [N], paths."""
    features, labels, names = common.extract(network.pooled, split, config, world)
    if world.rank == 0:
        np.savez(
            run.out / "features.npz", features=features.cpu(), labels=labels.cpu(), paths=names
        )
        common.note(f"{run.out / 'features.npz'}: {len(names)} images")


def unseen(split, config, world):
    """Return up to 256 images of a Split, normalised."""
    order = common.epoch_order(len(split), config.seed, "unseen")
    _, pixels, _ = common.centre_crops(split, config.image_size, order[:256])
    return common.normalize(pixels.to(world.device))


# --------------------------------------------------------------------------------------------------
# Weights: ours, those of MAE and DiT, the Hub's
# --------------------------------------------------------------------------------------------------

# heads by width: a file's shapes don't tell
HEADS = {384: 6, 512: 16, 768: 12, 1024: 16, 1152: 16, 1280: 16}
MODEL = "task image_size patch width depth heads positions readout classes permute".split()
MODEL += "permute_distance mask_ratio decoder_width decoder_depth decoder_heads norm_pix".split()
MODEL += "channels downsample noise_schedule".split()


def count_blocks(state, prefix):
    """Return the number of transformer blocks in a state dict."""
    pattern = prefix + r"blocks\.\d+\.attn\.qkv\.weight"
    return len([name for name in state if re.fullmatch(pattern, name)])


def read_weights(path, heads=0):
    """Read a checkpoint: state dicts `model` and `target`, and `fields` of Config.

    Ours; MAE's {"model": weights} of pretraining or fine-tuning; DiT's, alone or under "ema"; the
    Hub's encoder of MAE. heads: for widths that the released models do not have.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # of MAE's and DiT's training
        state = common.load_checkpoint(path)
    if "script" in state:
        state = common.load_own_checkpoint(path, "pixel_vit")
        fields = {name: state["config"][name] for name in MODEL}
        return {"model": state["model"], "target": state["target"], "fields": fields}
    weights = common.from_hub(state.get("ema") or state.get("model") or state)
    weights = {k: v for k, v in weights.items() if not k.startswith("decoder.")}  # the Hub's
    diffusion = "x_embedder.proj.weight" in weights
    tokeniser = weights.get(("x_embedder" if diffusion else "patch_embed") + ".proj.weight")
    if tokeniser is None or "pos_embed" not in weights:
        found = ", ".join(list(state)[:8])
        fail(f"{path} is no checkpoint of MAE or DiT: expected pos_embed and more, found {found}")
    width, channels, patch, _ = tokeniser.shape
    heads = heads or HEADS.get(width)
    if not heads:
        fail(f"{path} cannot tell how many heads share its width of {width}: add --heads")
    fields = {"task": "mae", "patch": patch, "width": width, "heads": heads, "positions": "sincos"}
    fields["depth"] = count_blocks(weights, "")
    fields["image_size"] = patch * math.isqrt(weights["pos_embed"].shape[1])
    if diffusion:
        downsample = 8 if channels == 4 else 1
        fields.update(task="diffusion", channels=channels, downsample=downsample)
        fields["classes"] = len(weights["y_embedder.embedding_table.weight"]) - 1
        fields["image_size"] *= downsample
    elif "head.weight" in weights:
        fields.update(task="classify", classes=len(weights["head.weight"]))
        fields["readout"] = "gap" if "fc_norm.weight" in weights else "cls"
    elif "decoder_embed.weight" in weights:
        fields["decoder_width"] = len(weights["decoder_embed.weight"])
        fields["decoder_depth"] = count_blocks(weights, "decoder_")
        fields["decoder_heads"] = HEADS.get(fields["decoder_width"], heads)
    return {"model": weights, "target": weights, "fields": fields}


def load_weights(model, state, path):
    """Put weights into a model. What they lack starts anew, and is named.

    A classifier takes the trunk of an MAE; its head then starts at nearly 0. An MAE keeps its own
    decoder where the file has none.
    """
    own = model.state_dict()
    fresh = ()
    if isinstance(model, Classifier):
        head = state.get("head.weight")
        if head is None:
            fresh = ("head.", "fc_norm.", "norm.", "permutation")
            others = ("decoder_", "mask_token", "norm.")
            state = {name: value for name, value in state.items() if not name.startswith(others)}
        elif head.shape != own["head.weight"].shape:
            fresh = ("head.",)
    elif isinstance(model, MAE) and "mask_token" not in state:
        fresh = ("decoder_", "mask_token")
    kept = {name: value for name, value in own.items() if name.startswith(fresh or ("-",))}
    common.load_state(model, {**state, **kept}, path)
    if "head.weight" in kept:  # as MAE's fine-tuning
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
        nn.init.zeros_(model.head.bias)
    if kept:
        common.note(f"{path} has no {', '.join([*kept][:4])}{', ...' * (len(kept) > 4)}: new ones")


def load_model(path, heads=0, **changes):
    """Return a frozen model of any checkpoint that this script reads, and its Config.

    heads: for unusual widths; changes: fields of the Config, such as task="classify".
    """
    weights = read_weights(path, heads)
    config = replace(Config(), **{**weights["fields"], **changes})
    model = build(config)[1].eval()
    load_weights(model, weights["target"], path)
    return model, config


# --------------------------------------------------------------------------------------------------
# Presets and main
# --------------------------------------------------------------------------------------------------

TINY = {"width": 192, "depth": 12, "heads": 12}
SMALL = {"width": 384, "depth": 12, "heads": 12}
BASE = {"width": 768, "depth": 12, "heads": 12}
LARGE = {"width": 1024, "depth": 24, "heads": 16}
HUGE = {"width": 1280, "depth": 32, "heads": 16, "patch": 14}
MIXED = {
    "randaugment": 2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "drop_path": 0.1,
    "init_std": 0.02,
    "flip": True,
}
TOY = {"precision": "fp32", "workers": 1}
TOY_DIFFUSION = {  # at so few pixels the linear schedule spends most steps on pure noise
    "task": "diffusion",
    "positions": "sincos",
    "noise_schedule": "cosine",
    "cosine": False,
    "warmup": 0.05,
    "weight_decay": 0.0,
    "clip": 1.0,
    "ema": 0.995,
    "steps": 3000,
    "sampler_steps": 25,
    "guidance": 3.0,
}
# On one GPU; made from the paper's recipes, not measured.
CIFAR10 = {
    **TINY,
    **MIXED,
    "data": "cifar10",
    "image_size": 32,
    "heads": 3,
    "drop_path": 0.05,
    "crop_scale": (0.4, 1.0),
    "batch": 512,
    "micro": 512,
    "epochs": 60,
    "warmup": 5 / 60,
    "lr": 1e-3,
    "weight_decay": 0.1,
    "workers": 12,
}
SMALL_MAE = {
    "task": "mae",
    "image_size": 32,
    "crop_scale": (0.2, 1.0),
    "flip": True,
    "decoder_width": 128,
    "decoder_depth": 4,
    "decoder_heads": 4,
    "weight_decay": 0.05,
    "workers": 12,
}
CIFAR10_MAE = {
    **TINY,
    **SMALL_MAE,
    "data": "cifar10",
    "heads": 3,
    "batch": 512,
    "micro": 512,
    "epochs": 150,
    "lr": 5e-4,
}
DIFFUSION = {
    "task": "diffusion",
    "flip": True,
    "cosine": False,
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "ema": 0.9999,
    "workers": 12,
}
CIFAR10_DIFFUSION = {
    **DIFFUSION,
    "data": "cifar10",
    "image_size": 32,
    "width": 256,
    "depth": 8,
    "heads": 4,
    "batch": 256,
    "micro": 256,
    "steps": 30000,
    "warmup": 0.02,
    "lr": 2e-4,
    "clip": 1.0,
    "sampler_steps": 50,
}
FOLDER = {
    **SMALL,
    "data": "folder",
    "heads": 6,
    "image_size": 64,
    "patch": 2,
    "batch": 256,
    "micro": 64,
    "epochs": 100,
    "warmup": 0.1,
}
# The paper's: CIFAR-100 from scratch and after MAE, ImageNet at 28 x 28, latents of 256 x 256.
CIFAR100 = {
    "data": "cifar100",
    "image_size": 32,
    "init_std": 0.02,
    "crop_scale": (0.2, 1.0),
    "flip": True,
    "jitter": 0.4,
    "grey": 0.2,
    "batch": 1024,
    "micro": 128,
    "epochs": 2400,
    "warmup": 20 / 2400,
    "lr": 4e-3,
    "weight_decay": 0.3,
    "workers": 12,
}
CIFAR100_MAE = {
    **SMALL_MAE,
    "data": "cifar100",
    "batch": 4096,
    "micro": 512,
    "epochs": 1600,
    "warmup": 40 / 1600,
    "lr": 2.4e-3,
    "lr_final": 0.0,
}
IMAGENET28 = {
    **MIXED,
    "data": "imagenet",
    "image_size": 28,
    "crop_scale": (0.08, 1.0),
    "batch": 4096,
    "micro": 64,
    "epochs": 300,
    "warmup": 20 / 300,
    "lr": 1.6e-3,
    "weight_decay": 0.3,
    "ema": 0.9999,
    "workers": 12,
}
# As released: MAE and DiT.
MAE224 = {
    **SMALL_MAE,
    "data": "imagenet",
    "image_size": 224,
    "patch": 16,
    "positions": "sincos",
    "decoder_width": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
    "norm_pix": True,
    "batch": 4096,
    "micro": 64,
    "epochs": 800,
    "warmup": 40 / 800,
    "lr": 2.4e-3,
    "lr_final": 0.0,
}
FINETUNE = {  # the table of positions is trained too
    **MIXED,
    "data": "imagenet",
    "image_size": 224,
    "patch": 16,
    "crop_scale": (0.08, 1.0),
    "erase": 0.25,
    "batch": 1024,
    "micro": 128,
    "epochs": 100,
    "warmup": 0.05,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "betas": (0.9, 0.999),
    "layer_decay": 0.65,
    "workers": 12,
}
LATENTS = {
    **DIFFUSION,
    "data": "imagenet",
    "image_size": 256,
    "channels": 4,
    "downsample": 8,
    "samples": 50000,
    "micro": 32,
}
DIT_L = {**LATENTS, **LARGE, "batch": 2048, "epochs": 400, "warmup": 0.25, "lr": 8e-4}
DIT_XL = {"width": 1152, "depth": 28, "heads": 16, "patch": 2, "positions": "sincos"}

PRESETS = {
    "toy": {**TOY, "steps": 1000, "position_std": 0.5},
    "toy-mae": {**TOY, "task": "mae", "steps": 1500, "lr": 1.5e-3, "decoder_width": 48},
    "toy-diffusion": {**TOY, **TOY_DIFFUSION},
    "cifar10": CIFAR10,
    "cifar10-mae": CIFAR10_MAE,
    "cifar10-diffusion": CIFAR10_DIFFUSION,
    "folder": {**IMAGENET28, **FOLDER, "lr": 1e-3, "weight_decay": 0.05, "ema": 0.0},
    "folder-mae": {**SMALL_MAE, **FOLDER, "lr": 5e-4, "decoder_width": 192},
    "imagenet28": {**IMAGENET28, **SMALL},
    "vit_t1_cifar100": {**CIFAR100, **TINY},
    "vit_s1_cifar100": {**CIFAR100, **SMALL},
    "vit_b1_imagenet28": {**IMAGENET28, **BASE},
    "vit_l1_imagenet28": {**IMAGENET28, **LARGE},
    "mae_t1_cifar100": {**CIFAR100_MAE, **TINY},
    "mae_s1_cifar100": {**CIFAR100_MAE, **SMALL, "decoder_width": 192},
    "mae_b16": {**MAE224, **BASE},
    "mae_l16": {**MAE224, **LARGE},
    "mae_h14": {**MAE224, **HUGE},
    "mae_b16_finetune": {**FINETUNE, **BASE},
    "dit_l1": DIT_L,
    "dit_l2": {**DIT_L, "patch": 2, "positions": "sincos"},
    "dit_xl2": {**LATENTS, **DIT_XL, "batch": 256, "epochs": 1400, "warmup": 0.0, "lr": 1e-4},
}
DATA_PRESETS = {"toy": "toy", "shapes": "toy", "cifar10": "cifar10", "imagenet": "imagenet28"}
DATA_PRESETS["*"] = "folder"


def check(config, world):
    """Refuse what would fail late or silently (exit 2)."""
    c = config
    if c.image_size % (c.patch * c.downsample):
        fail(f"--image-size {c.image_size} is no multiple of --patch {c.patch} x --downsample")
    if c.width % c.heads or c.width % 4:
        fail(f"--width {c.width} must be a multiple of --heads {c.heads}, and of 4")
    if c.decoder_width % c.decoder_heads or c.decoder_width % 4:
        fail(f"--decoder-width {c.decoder_width} must be a multiple of --decoder-heads, and of 4")
    known = TASKS[c.task].evaluations
    if set(c.eval.split(",")) - {*known, "none", ""}:
        fail(f"--eval {c.eval} must name some of {', '.join(known)}, none, with --task {c.task}")
    if c.task == "mae" and (c.positions == "none" or c.mask_ratio >= 1):
        fail("a masked autoencoder needs --positions, and --mask-ratio below 1")
    if c.sampler_steps > TIMESTEPS:
        fail(f"--sampler-steps {c.sampler_steps} must be at most {TIMESTEPS}")
    if c.judge and read_weights(c.judge)["fields"]["task"] != "classify":
        fail(f"--judge {c.judge} is no classifier")
    if not c.train and not c.init:
        fail("--no-train needs weights to evaluate: add --init")
    if c.train and c.batch % (c.micro * world.size):
        ranks = f"{world.size} ranks with micro-batches of {c.micro}"
        fail(f"--batch {c.batch} does not divide over {ranks}: change --batch or --micro")
    if c.shard and world.dtype == torch.float16:
        fail("--shard works with bf16 and fp32, not with --precision fp16")


def take_over(config, typed, fields):
    """Return the Config with what the weights of --init decide.

    The file chooses the task, unless a flag or a preset that was typed does.
    """
    task = config.task if typed & {"task", "preset"} else fields["task"]
    kept = {**fields, "task": task}
    if task == "classify" and fields["task"] == "mae":  # a new head, and positions are trained
        kept = {name: kept[name] for name in kept.keys() - {"classes", "readout", "positions"}}
    elif task == "classify" and config.train:
        del kept["classes"]
    return common.adopt(config, kept, typed, config.init)


@common.command_line
def main(argv=None):
    """Train and evaluate; see --help."""
    config, typed = common.parse_config(Config, PRESETS, DATA_PRESETS, argv)
    if config.init:
        weights = read_weights(config.init, config.heads if "heads" in typed else 0)
        config = take_over(config, typed, weights["fields"])
    config = replace(config, eval=config.eval or ",".join(TASKS[config.task].evaluations[:2]))
    world = common.start_world(config.device, config.precision)
    check(config, world)
    wanted = set(config.eval.split(","))
    labelled = ", ".join(sorted(wanted & LABELLED))
    train_split, val = common.open_data(config.data, labelled, "shapes")
    val = val or common.open_split(config.data, "val", "shapes") or train_split
    config = replace(config, classes=config.classes or len(train_split.classes))
    if config.task == "classify" and config.classes < 2:
        fail(f"a classifier needs train/CLASS/* of two classes or more; {config.data} has fewer")
    if config.task == "diffusion":
        train_split = Squares(**vars(train_split))
        val = Squares(**vars(val))
    model, target = build(config)
    if config.init:
        load_weights(model, weights["model"], config.init)
        load_weights(target, weights["target"], config.init)
    if config.train:
        run = train(model, target, train_split, config, world)
        # what is evaluated is what was saved, in networks that are neither wrapped nor sharded
        model, target = build(config)
        load_weights(target, read_weights(run.out / "last.pt")["target"], run.out / "last.pt")
    else:
        run = common.Run(config, world)
    target.to(world.device).eval()
    if config.train and config.task != "diffusion" and world.rank == 0:
        draw = draw_classifier if config.task == "classify" else draw_reconstruction
        draw(run.out / "picture.png", target, unseen(val, config, world), config)
    if "features" in wanted:
        write_features(target, val, config, world, run)
    if "samples" in wanted:
        evaluate_samples(target, train_split, val, config, world, run)
    elif wanted - {"features", "none"}:
        evaluate(target, train_split, val, config, world, run)


if __name__ == "__main__":
    main()
