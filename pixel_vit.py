# SPDX-License-Identifier: MIT
"""Pixel Transformer: every pixel a token; classification, masked autoencoding and diffusion.

"An Image is Worth More Than 16x16 Patches: Exploring Transformers on Individual Pixels",
Nguyen, Assran, Jain, Oswald, Snoek, Chen, ICLR 2025, arXiv 2406.09415. With it the two methods it
builds on: masked autoencoders (He et al. 2022, 2111.06377) and DiT (Peebles, Xie 2023, 2212.09748).

The idea. A vision transformer cuts an image into patches. So it knows, before it learns anything,
that nearby pixels belong together. Take that away: every pixel is a token of its own, and a learned
embedding, which starts as noise, says where it stands. Nothing in the network knows rows, columns
or neighbours. It still learns, and at equal image size smaller patches are better, down to a pixel.
This is a finding, not a practical method: half the patch means four times the tokens. So tokens and
multiply-adds are printed at the start.

    image [B, 3, S, S] -> pixels [B, S*S, 3] -> Linear, + positions -> tokens [B, N, D]
      |-- 1. classify:  [class | tokens] -> blocks -> mean -> norm -> Linear -> classes
      |-- 2. mae:       a quarter of the tokens -> blocks -> narrow decoder -> all pixels
      '-- 3. diffusion: noisy image; blocks scaled by time and class -> noise and its variance

    python pixel_vit.py                                     # toy images; also --preset toy-mae
    python pixel_vit.py --preset toy-diffusion --judge runs/pixel_vit/last.pt
    torchrun --nproc-per-node 8 pixel_vit.py --data imagenet --preset vit_b1_imagenet28
    python pixel_vit.py --init mae_pretrain_vit_base.pth --preset mae_b16_finetune --data imagenet

There is no official code. What follows MAE, DiT and timm equals their numbers. Departures:
- random draws depend on the seed and the micro-batch only; DiT samples in micro-batches too;
- erasing cuts its rectangle to the image, and its noise to the range of pixels;
- sizes of MAE's decoder on small images are ours; patch 1 has no normalised targets, which would
  lose the brightness;
- the linear probe reads features computed once, the mean of the tokens, in batches of 256, and
  reports the best of its rates; MAE's reads the class token of random crops, in larger batches.
CIFAR-100 is read from a folder cifar100/train/CLASS/*.png, since its archive is pickled.
"""

import argparse
import copy
import functools
import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

import common
from common import MLP, Attention, Block, PatchEmbed, ViT, fail

# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag. The comment beside it is its help."""

    preset: str = ""  # a name of PRESETS, by default the one that fits --data
    data: str = "toy"  # toy, mosaics, cifar10, imagenet, or a folder of images
    task: Literal["classify", "mae", "diffusion"] = "classify"  # presets choose it

    # model
    image_size: int = 12  # side of the image, pixels
    patch: int = 1  # side of a patch, pixels: 1 is the paper
    width: int = 64  # width of the transformer, of MAE's encoder
    depth: int = 3  # blocks
    heads: int = 4  # attention heads
    positions: Literal["learned", "sincos", "none"] = "learned"  # from noise, fixed sines, or none
    readout: Literal["gap", "cls"] = "gap"  # what is read: mean of the tokens, or class token
    classes: int = 0  # classes, 0 = as the data have
    drop_path: float = 0.0  # stochastic depth of the last block, rising from 0 at the first
    permute: int = 0  # pairs of pixels that trade places, in all images alike
    permute_distance: int = 1000  # how far apart a pair may be, |rows| + |columns|

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

    # augmentation
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop, share of the image
    flip: bool = True  # mirror half of the images
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
    lr_floor: float = 5e-4  # learning rate at the end over the peak, 1 = it stays at the peak
    weight_decay: float = 0.05  # AdamW weight decay
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW betas
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
    shard: bool = False  # FSDP2 instead of DDP, for models that do not fit one GPU
    workers: int = 0  # loading processes a rank, 0 = load between the steps

    # evaluation
    eval: str = ""  # accuracy, reconstruction, knn, linear, samples, features, none
    probe_epochs: int = 30  # passes of the linear probe
    probe_lrs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)  # learning rates tried, batch 256
    samples: int = 300  # images that --eval samples makes
    sampler_steps: int = 250  # denoising steps of a sample
    guidance: float = 1.5  # classifier-free guidance, 1 = none
    judge: str = ""  # last.pt of a classifier: measure samples by its features and classes


# --------------------------------------------------------------------------------------------------
# Model: what all three share
# --------------------------------------------------------------------------------------------------


def token_count(config):
    """Return the pixel (or patch) tokens of an image."""
    return (config.image_size // config.downsample // config.patch) ** 2


def make_positions(config, width, special=0):
    """Return a table [1, special + N, width]: learned from noise, fixed sines, or zeros.

    A parameter even where it is fixed, since checkpoints hold it.
    """
    learned = config.positions == "learned"
    table = 0.02 * learned * torch.randn(special + token_count(config), width)
    if config.positions == "sincos":
        side = math.isqrt(len(table))
        table[special:] = common.sincos_2d(width, side, side)
    return nn.Parameter(table[None], requires_grad=learned)


def transpose_within(patches, rows):
    """Transpose the content of each patch, seen as [rows, columns]: [B, N, P] -> [B, N, P]."""
    return patches.unflatten(2, (rows, -1)).transpose(2, 3).flatten(2)


def patchify(images, patch):
    """Cut [B, C, H, W] into [B, N, p*p*C], in a patch row by row, channels fastest (MAE, DiT)."""
    return transpose_within(common.patchify(images, patch), images.shape[1])


def unpatchify(tokens, patch):
    """Invert `patchify` for square images: [B, N, p*p*C] -> [B, C, H, W]."""
    side = math.isqrt(tokens.shape[1]) * patch
    patches = transpose_within(tokens, patch**2)  # [B, N, C*p*p]
    return F.fold(patches.transpose(1, 2), side, patch, stride=patch)


def xavier_uniform(model, tokeniser):
    """Draw the weights of all Linears and of the patch projection Xavier uniform; biases are 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(tokeniser.weight.flatten(1))


def multiply_adds(tokens, width, depth):
    """Return the work of `depth` blocks on one image."""
    return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


def pixel_permutation(config):
    """Let --permute pairs of pixels trade places, each pixel at most once: int64 [side * side].

    Partners are at most --permute-distance apart, |rows| + |columns|. Where no free pixel has a
    free partner left, there are fewer pairs.
    """
    side = config.image_size
    pairs = config.permute
    random = np.random.default_rng(config.seed)
    places = np.arange(side * side)
    row, column = np.divmod(places, side)
    order = places.copy()
    for a in random.permutation(places):
        if pairs and order[a] == a:
            apart = abs(row - row[a]) + abs(column - column[a])
            near = (apart > 0) & (apart <= config.permute_distance)
            partners = places[near & (order == places)]
            if len(partners):
                b = random.choice(partners)
                order[[a, b]] = [b, a]
                pairs -= 1
    return torch.from_numpy(order)


class DropBlock(Block):
    """A block whose branches are left out for some images: stochastic depth."""

    def forward(self, x, scales=(1, 1)):
        """x [B, N, D]; scales [2, B, 1, 1] of the two branches, 0 where one is left out."""
        x = x + scales[0] * self.attn(self.norm1(x))
        return x + scales[1] * self.mlp(self.norm2(x))


class Trunk(ViT):
    """Tokeniser, class token, positions and blocks. With patch 1 a token is a pixel's colours."""

    undecayed = ()  # parameters without weight decay, beside biases and norms

    def __init__(self, config):
        c = config
        super().__init__(c.image_size, c.patch, c.width, 0, c.heads, class_token=True)
        self.pos_embed = make_positions(c, c.width, special=1)
        self.blocks = nn.ModuleList(DropBlock(c.width, c.heads) for _ in range(c.depth))
        self.fc_norm = nn.Identity()
        self.readout = c.readout
        self.work = multiply_adds(1 + token_count(c), c.width, c.depth)
        # in the checkpoint, where there is one
        self.register_buffer("permutation", pixel_permutation(c) if c.permute else None)

    def tokens(self, images, keep=None, scales=None):
        """Return tokens [class | patches] after the final norm: [B, 1 + N, D].

        keep: indices [B, K] of the patches to run on; scales [depth, 2, B, 1, 1]: see `DropBlock`.
        """
        if self.permutation is not None:
            images = images.flatten(2)[:, :, self.permutation].view_as(images)
        x = self.embed(images, keep)
        for i, block in enumerate(self.blocks):
            x = block(x) if scales is None else block(x, scales[i])
        return self.norm(x)

    def pooled(self, images, scales=None):
        """Return features [B, D]: the mean of the patch tokens (gap), or the class token."""
        x = self.tokens(images, scales=scales)
        if self.readout == "cls":
            return x[:, 0]
        return self.fc_norm(x[:, 1:].mean(1))


# --------------------------------------------------------------------------------------------------
# 1. Classification: RandAugment and colours in the loader, mixup and CutMix on the device
# --------------------------------------------------------------------------------------------------

FILL = (124, 116, 104)  # what comes into the image from outside


def affine(image, *matrix):
    """Return the image where pixel (x, y) shows what was at matrix @ (x, y, 1)."""
    kind = Image.Transform.AFFINE
    return image.transform(image.size, kind, matrix, Image.BICUBIC, fillcolor=FILL)


def solarize_add(image, value):
    """Brighten the darker half of the values, by at most 127."""
    return image.point(lambda v: v + value * (v < 128))


def enhance(kind):
    """Return an operation that turns PIL's enhancer up or down."""
    return lambda image, m: kind(image).enhance(1 + 0.9 * m)


# RandAugment's, "increasing": m is the strength, 0 to 1, with a random sign
OPERATIONS = {
    "autocontrast": lambda image, m: ImageOps.autocontrast(image),
    "equalize": lambda image, m: ImageOps.equalize(image),
    "invert": lambda image, m: ImageOps.invert(image),
    "rotate": lambda image, m: image.rotate(30 * m, Image.BICUBIC, fillcolor=FILL),
    "posterize": lambda image, m: image.point(lambda v: v & -16 << int(4 * abs(m))),
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
    hues = [(v + int(255 * turns)) % 256 for v in range(256)]
    unchanged = list(range(256)) * 2  # saturation and value
    return image.convert("HSV").point(hues + unchanged).convert("RGB")


def augment(image, config, random):
    """Apply RandAugment (level 9), colour jitter and grey to a PIL image."""
    for operation in random.choice(list(OPERATIONS.values()), config.randaugment):
        if random.random() < 0.5:
            level = np.clip(random.normal(9, 0.5), 0, 10)
            image = operation(image, random.choice([-1, 1]) * level / 10)
    if config.jitter:
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for kind in random.permutation(4):
            shift = random.uniform(-config.jitter, config.jitter)
            if kind == 3:
                image = shift_hue(image, shift)
            else:
                image = enhancers[kind](image).enhance(1 + shift)
    if random.random() < config.grey:
        image = image.convert("L").convert("RGB")
    return image


def erase(pixels, random):
    """Fill a rectangle of pixels uint8 [3, S, S] with noise: 2 % to a third of the area."""
    size = pixels.shape[1]
    area = size * size * random.uniform(0.02, 1 / 3)
    ratio = 0.3 ** random.uniform(-1, 1)
    height = min(size, round(math.sqrt(area * ratio)))
    width = min(size, round(math.sqrt(area / ratio)))
    top, left = random.integers((size - height + 1, size - width + 1))
    rectangle = pixels[:, top : top + height, left : left + width].numpy()
    noise = random.normal(common.MEAN, common.STD, rectangle.shape)
    rectangle[:] = (255 * noise).clip(0, 255)


def draw_mix(random, size, mixup, cutmix):
    """Return the share [S, S] that an image keeps of its own pixels; the rest is its partner's.

    Mixup: the same everywhere. CutMix: 0 in a box, else 1.
    """
    use_cutmix = random.random() < 0.5 if mixup and cutmix else cutmix
    alpha = cutmix if use_cutmix else mixup
    own = random.beta(alpha, alpha) if alpha else 1.0
    if not use_cutmix:
        return torch.full((size, size), own)
    share = torch.ones(size, size)
    side = int(size * math.sqrt(1 - own))
    top, left = random.integers(0, size, 2) - side // 2
    share[max(0, top) : top + side, max(0, left) : left + side] = 0
    return share


def mix(images, targets, share):
    """Mix images [B, 3, S, S] and targets [B, C] with the batch in reverse, by `draw_mix`."""
    images = images.flip(0).lerp(images, share)
    return images, targets.flip(0).lerp(targets, share.mean())


class Classifier(Trunk):
    """A linear layer on the normed mean of the pixel tokens (gap), or on the normed class token."""

    evaluations = ("accuracy", "knn", "linear", "features")  # the first two by default
    undecayed = ("cls_token", "pos_embed")

    def __init__(self, config):
        super().__init__(config)
        self.smoothing = config.smoothing
        if self.readout == "gap":  # MAE's names
            self.fc_norm = self.norm
            self.norm = nn.Identity()
        self.head = nn.Linear(config.width, config.classes)
        common.init_weights(self)

    @staticmethod
    def draw(config, pixels, labels, number):
        """Augment pixels uint8 [B, 3, S, S] of a micro-batch; return the inputs of `forward`."""
        c = config
        key = common.generator(c.seed, "augment", number)
        rates = torch.linspace(0, c.drop_path, c.depth).view(-1, 1, 1, 1, 1)
        kept = torch.rand(c.depth, 2, len(pixels), 1, 1, generator=key) >= rates
        scales = kept / (1 - rates)  # of the branches: stochastic depth
        random = np.random.default_rng(key.initial_seed())
        changes = c.randaugment or c.jitter or c.grey or c.erase
        for image in pixels if changes else ():
            changed = augment(Image.fromarray(image.permute(1, 2, 0).numpy()), c, random)
            image[:] = torch.from_numpy(np.array(changed)).permute(2, 0, 1)
            if random.random() < c.erase:
                erase(image, random)
        share = draw_mix(random, c.image_size, c.mixup, c.cutmix)
        return pixels, labels, share, scales

    def forward(self, images, labels, share, scales):
        """Return the loss on images [B, 3, S, S]; see `draw`."""
        targets = F.one_hot(labels, self.head.out_features).float()
        images, targets = mix(images, targets, share)
        logits = self.logits(images, scales).float()
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)

    def logits(self, images, scales=None):
        """Images [B, 3, H, W] -> [B, C]."""
        return self.head(self.pooled(images, scales))

    def draw_picture(self, path, images):
        """Show a row for each class: the images that are most surely taken for it."""
        scores = self.logits(images).softmax(1)  # [B, C]
        surest = scores.topk(min(8, len(images)), dim=0).indices  # [8, C]
        common.save_picture(path, images[surest.T[:10]])
        common.note(f"{path}: rows are classes, surest images first")


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


def patch_statistics(patches):
    """Return mean and standard deviation within each patch [B, N, P]: [B, N, 1] both."""
    variance = patches.var(-1, keepdim=True)
    return patches.mean(-1, keepdim=True), (variance + 1e-6).sqrt()


def mae_target(images, patch, norm_pix):
    """Return what to paint: patches [B, N, p*p*3], with norm_pix standardised within the patch."""
    target = patchify(images, patch)
    if norm_pix:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    return target


def mae_loss(prediction, target, mask):
    """Return the squared error on removed patches: prediction, target [B, N, P], mask [B, N]."""
    error = (prediction - target).square().mean(-1)
    return (error * mask).sum() / mask.sum()


class MAE(Trunk):
    """The encoder sees a quarter of the pixels; a narrow decoder paints all of them."""

    evaluations = ("reconstruction", "knn", "linear", "features")

    def __init__(self, config):
        c = config
        super().__init__(c)
        self.mask_ratio = c.mask_ratio
        self.norm_pix = c.norm_pix
        self.decoder_embed = nn.Linear(c.width, c.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_width))
        self.decoder_pos_embed = make_positions(c, c.decoder_width, special=1)
        self.decoder_blocks = nn.ModuleList(
            Block(c.decoder_width, c.decoder_heads) for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(c.decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(c.decoder_width, c.patch**2 * 3)
        self.work = multiply_adds(1 + kept_tokens(token_count(c), c.mask_ratio), c.width, c.depth)
        self.work += multiply_adds(1 + token_count(c), c.decoder_width, c.decoder_depth)
        xavier_uniform(self, self.patch_embed.proj)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

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
        x = self.decoder_embed(self.tokens(images, keep))  # [B, 1 + K, Dd]
        hidden = self.mask_token.expand(len(x), mask.shape[1] - keep.shape[1], -1)
        tokens = common.gather_tokens(torch.cat([x[:, 1:], hidden], dim=1), restore)
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed  # [B, 1 + N, Dd]
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:].float(), mask

    def paint_unseen(self, images):
        """Paint images of evaluation, always with the same masks."""
        random = common.generator("masks of evaluation")
        noise = torch.rand(len(images), self.pos_embed.shape[1] - 1, generator=random)
        return self.paint(images, noise.to(images.device))

    def reconstruction(self, images):
        """Return 100 times the squared error on hidden patches, and that of the mean colour."""
        prediction, mask = self.paint_unseen(images)
        target = mae_target(images, self.patch, self.norm_pix)
        errors = {"hidden error x 100": prediction, "of mean colour": target.mean(1, keepdim=True)}
        return {name: 100 * mae_loss(x, target, mask).item() for name, x in errors.items()}

    def draw_picture(self, path, images):
        """Show what the encoder sees, with what the decoder paints in the gaps, and the image."""
        images = images[:8]
        prediction, mask = self.paint_unseen(images)
        target = patchify(images, self.patch)
        if self.norm_pix:  # back to pixels, by the statistics of the patch that should be there
            mean, std = patch_statistics(target)
            prediction = prediction * std + mean
        hidden = mask[..., None]
        together = target.lerp(prediction, hidden)
        tiles = [unpatchify(x, self.patch) for x in (target * (1 - hidden), together, target)]
        common.save_picture(path, torch.stack(tiles, dim=1))
        common.note(f"{path}: what is visible, with what is painted, the image")


# --------------------------------------------------------------------------------------------------
# 3. Diffusion: DiT, the Gaussian process it is trained on, and its samples
# --------------------------------------------------------------------------------------------------

TIMESTEPS = 1000
LABEL_DROP = 0.1  # share of the labels that are hidden in training, for guidance
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
    stride = (TIMESTEPS - 1) / max(1, count - 1)
    # summed, not multiplied, as the released code rounds
    places = itertools.accumulate([stride] * (count - 1), initial=0.0)
    return [round(place) for place in places]


def diffusion_tables(betas, steps):
    """Return the tables of a process that takes `steps` of another: {name: float64 [T]}."""
    cumulative = np.cumprod(1 - betas)[steps]
    previous = np.append(1.0, cumulative[:-1])
    betas = 1 - cumulative / previous
    variance = betas * (1 - previous) / (1 - cumulative)
    variance[0] = variance[1]  # it is 0, which has no logarithm
    return {
        "alphas_cumprod": cumulative,
        "betas": betas,
        "sqrt_alphas_cumprod": np.sqrt(cumulative),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - cumulative),
        "posterior_log_variance_clipped": np.log(variance),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - cumulative),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - cumulative),
    }


class Diffusion(nn.Module):
    """A Gaussian process of `count` steps k. The network is told timestep_map[k], in 0..999."""

    def __init__(self, schedule, count=TIMESTEPS):
        super().__init__()
        steps = space_timesteps(count)
        for name, table in diffusion_tables(noise_betas(schedule), steps).items():
            table = torch.from_numpy(table).float().view(-1, 1, 1, 1)  # to meet images
            self.register_buffer(name, table, persistent=False)
        self.register_buffer("timestep_map", torch.tensor(steps), persistent=False)

    def q_sample(self, x_start, k, noise):
        """Noise x_start [B, C, H, W] to step k [B]."""
        signal = self.sqrt_alphas_cumprod[k] * x_start
        return signal + self.sqrt_one_minus_alphas_cumprod[k] * noise

    def posterior_mean(self, x_start, x, k):
        """Return the mean of the step before k, given the image and step k."""
        mean = self.posterior_mean_coef1[k] * x_start
        return mean + self.posterior_mean_coef2[k] * x

    def denoise(self, noise, logits, x, k, clip=False):
        """Return (mean, log variance) of the step before k, and the image expected.

        noise, logits [B, C, H, W]: the network's output at x, step k.
        clip: cut the expected image to -1..1.
        """
        share = (logits + 1) / 2  # between the two bounds of the variance; not clamped
        log_variance = share * self.betas[k].log()
        log_variance = log_variance + (1 - share) * self.posterior_log_variance_clipped[k]
        x_start = x - self.sqrt_one_minus_alphas_cumprod[k] * noise
        x_start = x_start / self.sqrt_alphas_cumprod[k]
        if clip:
            x_start = x_start.clamp(-1, 1)
        return self.posterior_mean(x_start, x, k), log_variance, x_start

    def losses(self, predicted, logits, x_start, x, k, noise):
        """Return DiT's two losses [B]: squared error of the noise, and the variational bound.

        The bound is in bits a dimension: the KL to the posterior, at k = 0 minus the log likelihood
        of the image. It trains the variance only: it sees the predicted noise detached.
        """
        mse = (noise - predicted).square().flatten(1).mean(1)
        mean, log_variance, _ = self.denoise(predicted.detach(), logits, x, k)
        ratio = self.posterior_log_variance_clipped[k] - log_variance
        gap = self.posterior_mean(x_start, x, k) - mean
        distance = gap.square() * (-log_variance).exp()
        kl = 0.5 * (-1 - ratio + ratio.exp() + distance)
        likelihood = log_likelihood(x_start, mean, 0.5 * log_variance)
        bound = torch.where(k[:, None, None, None] == 0, -likelihood, kl)
        return mse, bound.flatten(1).mean(1) / math.log(2)


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


class ConditionedBlock(nn.Module):
    """adaLN-zero: the condition scales, shifts and gates both branches. Gates start at 0."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = MLP(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition):
        """x [B, N, D], condition [B, D] -> [B, N, D]."""
        modulation = self.adaLN_modulation(condition).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn[:, None] * self.attn(modulate(x, shift_attn, scale_attn))
        hidden = self.mlp.fc1(modulate(x, shift_mlp, scale_mlp))
        hidden = F.gelu(hidden, approximate="tanh")  # unlike MAE's
        return x + gate_mlp[:, None] * self.mlp.fc2(hidden)


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
        self.null = c.classes  # the label that stands for none
        self.work = multiply_adds(token_count(c), c.width, c.depth)
        self.diffusion = Diffusion(c.noise_schedule)
        self.x_embedder = PatchEmbed(c.patch, c.width)
        self.x_embedder.proj = nn.Conv2d(c.channels, c.width, c.patch, c.patch)
        self.pos_embed = make_positions(c, c.width)
        first = nn.Linear(256, c.width)
        layers = nn.Sequential(first, nn.SiLU(), nn.Linear(c.width, c.width))
        self.t_embedder = nn.ModuleDict({"mlp": layers})  # nested as released
        table = nn.Embedding(c.classes + 1, c.width)  # the last row: no class, for guidance
        self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.blocks = nn.ModuleList(ConditionedBlock(c.width, c.heads) for _ in range(c.depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 2 * c.width))
        last = nn.Linear(c.width, c.patch**2 * c.channels * 2)
        self.final_layer = nn.ModuleDict({"adaLN_modulation": modulation, "linear": last})
        # DiT's initial weights: an untrained network predicts 0
        xavier_uniform(self, self.x_embedder.proj)
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.t_embedder.mlp[::2]:
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)

    @staticmethod
    def draw(config, pixels, labels, number):
        """Return the inputs of `forward`: pixels, labels (some hidden), steps k [B], and noise."""
        random = common.generator(config.seed, "diffusion", number)
        k = torch.randint(TIMESTEPS, (len(pixels),), generator=random)
        side = config.image_size // config.downsample
        noise = torch.randn(len(pixels), config.channels, side, side, generator=random)
        uniforms = torch.rand(len(pixels), generator=random)
        return pixels, drop_labels(labels, uniforms, LABEL_DROP, config.classes), k, noise

    def forward(self, x_start, labels, k, noise):
        """Return the loss on images or latents [B, C, H, W]; see `draw`."""
        x = self.diffusion.q_sample(x_start, k, noise)
        output = self.predict(x, self.diffusion.timestep_map[k], labels)
        mse, bound = self.diffusion.losses(*output, x_start, x, k, noise)
        return (mse + bound).mean()

    def predict(self, x, t, labels):
        """Return noise and variance logits, both as x [B, C, H, W], at timestep t [B]."""
        tokens = self.x_embedder(common.patchify(x, self.patch)) + self.pos_embed
        condition = self.t_embedder.mlp(timestep_embedding(t, 256))
        condition = condition + self.y_embedder.embedding_table(labels)  # [B, D]
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.final_layer.adaLN_modulation(condition).chunk(2, dim=1)
        tokens = self.final_layer.linear(modulate(tokens, shift, scale))
        return unpatchify(tokens, self.patch).float().chunk(2, dim=1)


def guided(model, x, t, labels, scale):
    """Return the output for labels, its noise moved `scale` times away from that for no label.

    As in the released code the first three channels are guided, of latents too.
    """
    if scale == 1:
        return model.predict(x, t, labels)
    labels = torch.cat([labels, torch.full_like(labels, model.null)])
    noise, logits = model.predict(x.repeat(2, 1, 1, 1), t.repeat(2), labels)
    asked, without = noise.chunk(2)
    moved = without[:, :3] + scale * (asked - without)[:, :3]
    return torch.cat([moved, asked[:, 3:]], dim=1), logits[: len(x)]


def sample_loop(diffusion, network, x, draw, clip):
    """Denoise x [B, C, H, W] from pure noise.

    network(x, t) returns its output; draw() noise [B, C, H, W].
    """
    for step in reversed(range(len(diffusion.timestep_map))):
        k = torch.full((len(x),), step, device=x.device)
        output = network(x, diffusion.timestep_map[k])
        x, log_variance, _ = diffusion.denoise(*output, x, k, clip)
        if step:
            x = x + (0.5 * log_variance).exp() * draw()
    return x


def sample_images(model, config, number, world, codec=None):
    """Return micro-batch `number` of this --seed's samples, uint8 [B, 3, S, S].

    Classes take turns.
    """
    c = config
    diffusion = Diffusion(c.noise_schedule, c.sampler_steps).to(world.device)
    random = common.generator(c.seed, "samples", number)
    numbers = torch.arange(c.micro, device=world.device) + number * c.micro
    labels = numbers % max(1, c.classes)
    side = c.image_size // c.downsample

    def draw():
        return torch.randn(c.micro, c.channels, side, side, generator=random).to(world.device)

    def network(x, t):
        with world.autocast():
            return guided(model, x, t, labels, c.guidance if c.classes else 1)

    x = sample_loop(diffusion, network, draw(), draw, clip=codec is None)
    if codec:
        x = codec.decode(x / LATENT_SCALE)
    return (127.5 * x + 128).clamp(0, 255).byte()


@torch.no_grad()
def sample_split(model, config, world, codec):
    """Return a Split of --samples images, made by all ranks."""
    count = math.ceil(config.samples / config.micro / world.size)  # micro-batches of a rank
    numbers = range(world.rank * count, (world.rank + 1) * count)
    images = torch.cat([sample_images(model, config, number, world, codec) for number in numbers])
    images = common.gather_over_ranks(images)[: config.samples]
    labels = torch.arange(config.samples) % max(1, config.classes)
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    images = [*map(Image.fromarray, pixels)]
    return common.Split(images, [""] * config.samples, labels, [])


def frechet_distance(a, b):
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of features [N, D], [M, D].

    The FID, if the features are Inception's; else a distance of its own.
    """
    a = a.cpu().double()
    b = b.cpu().double()
    product = a.T.cov() @ b.T.cov()
    cross = torch.linalg.eigvals(product).sqrt().real.sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    variances = a.var(0).sum() + b.var(0).sum()
    return (means + variances - 2 * cross).item()


def evaluate_samples(model, train, val, wanted, config, world, run):
    """Write samples.npz and a picture; with --judge compare them with images.

    ADM's evaluator.py reads samples.npz and tells FID, sFID, precision and recall. A judge is a
    classifier: the Frechet distance in its features, and how many samples it takes for the class
    that was asked for.
    """
    if "samples" not in wanted:
        return
    codec = load_codec(config, world.device)
    samples = sample_split(model, config, world, codec)
    if world.rank == 0:
        arrays = {"arr_0": np.stack(samples.images), "labels": samples.labels}
        np.savez(run.out / "samples.npz", **arrays)
        first = [i % len(samples) for i in range(80)]
        _, pixels, _ = common.centre_crops(samples, config.image_size, first)
        # of ten classes, a column is a class
        tiles = common.normalize(pixels).unflatten(0, (8, 10))
        common.save_picture(run.out / "picture.png", tiles)
        common.note(f"{run.out}: samples.npz, for ADM's evaluator.py, and picture.png")
    if not config.judge:
        return
    judge = load_model(config.judge)[0].to(world.device)
    reference, _, _ = common.extract(judge.pooled, train, config, world)
    untrained = sample_split(build(config)[1].to(world.device), config, world, codec)
    results = {}
    for name, split in {"real": val, "samples": samples, "untrained": untrained}.items():
        features, labels, _ = common.extract(judge.pooled, split, config, world)
        if world.rank == 0:
            result = results[name] = {"frechet": frechet_distance(features, reference)}
            result["asked class, %"] = common.top1(judge.head(features), labels)
    run.report(results)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------

TASKS = {"classify": Classifier, "mae": MAE, "diffusion": DiT}
LABELLED = {"accuracy", "knn", "linear"}  # evaluations that need labels


def centre_crop(image, size):
    """Return the central square of a PIL image as ADM and DiT prepare it."""
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.BOX)
    image = ImageOps.scale(image, size / min(image.size), Image.BICUBIC)
    left, top = [(side - size) // 2 for side in image.size]
    return image.crop((left, top, left + size, top + size))


class Squares(common.Split):
    """Images for diffusion: always the central square."""

    def read(self, index, choose_boxes, sizes, resample=None):
        """See `common.Split`; the boxes are not used."""
        image = self.images[index]
        image = image if isinstance(image, Image.Image) else Image.open(image)
        image = common.to_rgb(image, common.exif_turn(image))
        pixels = np.array(centre_crop(image, sizes[0]))
        return [torch.from_numpy(pixels).permute(2, 0, 1)]


def make_micro_batch(split, config, number):
    """Make micro-batch `number` of a run: (the task's inputs, unreadable files).

    All of it depends on the seed and the number only.
    """
    random = common.generator(config.seed, "images", number)
    flips = torch.rand(config.micro, generator=random) < 0.5
    indices = common.micro_batch_indices(number, config.micro, len(split), config.seed)

    def box(i, width, height):
        return [common.random_crop(width, height, config.crop_scale, random)]

    found, pixels, bad = split.read_batch(indices, box, [config.image_size], Image.BICUBIC)
    if config.flip:
        pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
    return *TASKS[config.task].draw(config, pixels, split.labels[found], number), bad


def load_codec(config, device):
    """Return the frozen autoencoder of --codec, None where pixels are denoised."""
    if config.downsample == 1:
        return None
    try:
        return torch.jit.load(config.codec, map_location=device).eval()
    except (OSError, RuntimeError, ValueError):
        fail(f"latents need an autoencoder: --codec {config.codec!r} is no TorchScript file")


def preparation(config, device):
    """Return the function from pixels uint8 [B, 3, S, S] to what the network sees."""
    if config.task != "diffusion":
        return common.normalize
    codec = load_codec(config, device)

    @torch.no_grad()
    def prepare(pixels):
        images = pixels / 127.5 - 1
        return codec.encode(images) * LATENT_SCALE if codec else images

    return prepare


@functools.cache
def mosaics(name):
    """Mosaics, 12 x 12, of tiles of 2 x 2 pixels: a class is a palette of four colours.

    All palettes have the same mean and covariance. So no average of pixels tells them apart.
    """
    random, labels = common.toy_random(name)
    design = np.random.default_rng(0).normal(size=(10, 4, 3))
    palettes = np.linalg.qr(design - design.mean(1, keepdims=True))[0]  # class, colour, RGB
    picked = random.integers(0, 4, (len(labels), 7, 7))
    tiles = random.normal(128 + 70 * palettes[labels[:, None, None], picked], 25)
    images = tiles.repeat(2, 1).repeat(2, 2)[:, 1:13, 1:13]  # patches do not fit the tiles
    return common.in_memory(images, labels, list("0123456789"), name)


common.TOYS["mosaics"] = mosaics


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def build(config):
    """Return a fresh (model, target); the target, a moving average, starts as a copy."""
    torch.manual_seed(config.seed)
    model = TASKS[config.task](config)
    return model, copy.deepcopy(model).requires_grad_(False)


def learning_rate(config, step, steps):
    """Return the learning rate of step 0, 1, ..."""
    c = config
    warmup = round(c.warmup * steps)
    return common.cosine_schedule(step, steps, c.lr, c.lr * c.lr_floor, warmup, c.lr_start)


def parameter_rule(name, dimensions, depth, layer_decay, undecayed=()):
    """Return (share of the learning rate, whether decayed) of a parameter.

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
    return layer_decay ** (depth + 1 - layer), decayed


def make_optimizer(model, config):
    """Return AdamW with a group for each distinct rule: `scale` of the learning rate, decay."""
    c = config
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rule = parameter_rule(name, parameter.dim(), c.depth, c.layer_decay, model.undecayed)
            scale, decayed = rule
            group = {"params": [], "scale": scale, "weight_decay": c.weight_decay * decayed}
            groups.setdefault(rule, group)["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), betas=c.betas, fused=True)


def train(model, target, split, config, world):
    """Train the model and average it into the target; last.pt holds both. Returns the run."""
    prepare = preparation(config, world.device)
    network = common.distribute(model, world, config)
    target = common.distribute(target, world, config)
    optimizer = make_optimizer(model, config)
    ema = common.EMA(target, model)
    run = common.Run(config, world, split, network, optimizer, target=target)
    work = f"costs {model.work / 1e9:.3g} G multiply-adds"
    common.note(f"an image has {token_count(config)} tokens and {work}")
    loader = run.loader(functools.partial(make_micro_batch, split, config))
    parts = config.batch // config.micro // world.size
    for step in run:
        lr = learning_rate(config, step, run.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        for part in range(parts):
            pixels, *inputs = run.next(loader, split)
            run.sync_gradients(part == parts - 1)
            with world.autocast():
                loss = network(prepare(pixels), *inputs)
            run.backward(loss / parts)
        ema.update(config.ema, run.update())
        run.log(lr=lr)
    return run


# --------------------------------------------------------------------------------------------------
# Evaluate: frozen features of classifiers and autoencoders
# --------------------------------------------------------------------------------------------------


class LARS(torch.optim.SGD):
    """SGD whose steps are scaled by 0.001 |p| / |gradient|, for batches of thousands."""

    @torch.no_grad()
    def step(self):
        """Take a step. Biases are not scaled."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() > 1:
                    decay = group["weight_decay"] * p
                    p.grad += decay
                    ratio = 0.001 * p.norm() / p.grad.norm()
                    p.grad *= torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                    p.grad -= decay  # which SGD adds
        super().step()


def probe_head(width, classes):
    """Return MAE's probe: BatchNorm without affine, and a linear layer."""
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


def linear_probe(bank, labels, test, test_labels, config):
    """Return MAE's linear probe, top-1 of the best rate in percent: bank [N, D], test [M, D]."""
    torch.manual_seed(config.seed)
    batches = common.shuffled_batches(bank, labels, 256, config.seed)
    heads = {}
    for rate in config.probe_lrs:
        head = probe_head(bank.shape[1], int(labels.max()) + 1).to(bank.device)
        heads[rate] = (head, rate, 0.0)
    epochs = config.probe_epochs
    drops = [epochs * 2 // 3]
    lars = functools.partial(LARS, momentum=0.9)
    best, _ = common.linear_probe(batches, test, test_labels, heads, epochs, lars, drops)
    return best


def evaluate(target, train, val, wanted, config, world, run):
    """Draw the picture; run --eval on the network, on a random one, and for kNN on raw pixels."""
    order = common.epoch_order(len(val), config.seed, "unseen")
    _, pixels, _ = common.centre_crops(val, config.image_size, order[:256])
    images = common.normalize(pixels.to(world.device))
    if world.rank == 0:
        target.draw_picture(run.out / "picture.png", images)
    if wanted == {"none"}:
        return
    networks = {"trained": target}
    if wanted - {"features"}:
        networks["random"] = build(config)[1].to(world.device)
    if "knn" in wanted:
        networks["pixels"] = None
    results = {}
    for name, network in networks.items():
        encode = network.pooled if network else common.raw_pixels
        test, labels, _ = common.extract(encode, val, config, world)
        if wanted & {"knn", "linear"}:
            bank, bank_labels, _ = common.extract(encode, train, config, world)
        if world.rank:
            continue
        result = {}
        if "accuracy" in wanted and network:
            result["top-1"] = common.top1(network.head(test), labels)
        if "reconstruction" in wanted and network:
            result.update(network.reconstruction(images))
        if "knn" in wanted:
            result["knn"] = common.top1(common.knn(bank, bank_labels, test), labels)
        if "linear" in wanted:
            result["linear"] = linear_probe(bank, bank_labels, test, labels, config)
        if result:
            results[name] = result
    run.report(results)


# --------------------------------------------------------------------------------------------------
# Weights: ours, those of MAE and DiT, the Hub's
# --------------------------------------------------------------------------------------------------

TRUNK = "image_size patch width depth heads permute permute_distance".split()
MODEL = TRUNK + "task positions readout classes channels downsample noise_schedule".split()
MODEL += "mask_ratio decoder_width decoder_depth decoder_heads norm_pix".split()


def read_weights(path, heads=0):
    """Read a checkpoint: state dicts `model` and `target`, and `fields` of Config.

    Ours; MAE's {"model": weights} of pretraining or fine-tuning; DiT's, alone or under "ema"; the
    Hub's encoder of MAE. heads: for widths that the released models do not have.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # of MAE's and DiT's training
        state = common.load_checkpoint(path, "pixel_vit")
    if "script" in state:
        return {**state, "fields": {name: state["config"][name] for name in MODEL}}
    weights = state.get("ema") or state.get("model") or state
    diffusion = "x_embedder.proj.weight" in weights
    tokeniser = weights.get(("x_embedder" if diffusion else "patch_embed") + ".proj.weight")
    if tokeniser is None or "pos_embed" not in weights:
        common.refuse(path, "MAE or DiT: expected pos_embed and more", state)
    channels = tokeniser.shape[1]
    shape = common.vit_fields({**weights, "patch_embed.proj.weight": tokeniser}, path, heads)
    blocks = re.findall(r"\b(decoder_)?blocks\.\d+\.attn\.qkv\.weight", " ".join(weights))
    fields = {
        **shape,
        "task": "mae",
        "depth": blocks.count(""),
        "positions": "sincos",
        "channels": channels,
        "downsample": 8 if channels == 4 else 1,
    }
    fields["image_size"] *= fields["downsample"]
    if diffusion:
        fields["task"] = "diffusion"
        fields["classes"] = len(weights["y_embedder.embedding_table.weight"]) - 1
    elif "head.weight" in weights:
        fields.update(task="classify", classes=len(weights["head.weight"]))
        fields["readout"] = "gap" if "fc_norm.weight" in weights else "cls"
    elif "decoder_embed.weight" in weights:
        fields["decoder_width"] = len(weights["decoder_embed.weight"])
        fields["decoder_depth"] = blocks.count("decoder_")
        if fields["decoder_width"] == 512:  # as released
            fields["decoder_heads"] = 16
    return {"model": weights, "target": weights, "fields": fields}


# parts that one task has and another has not
PARTS = ("decoder", "mask_token", "norm.", "fc_norm.", "head.", "permutation")


def load_weights(model, state, path):
    """Put weights into a model. Of PARTS what they lack starts anew, and is named.

    A classifier takes the trunk of an MAE, and of a classifier with other classes all but the head.
    """
    own = model.state_dict()
    known = {
        name: value for name, value in state.items() if name in own or not name.startswith(PARTS)
    }
    fresh = {
        name: value
        for name, value in own.items()
        if name.startswith(PARTS) and len(state.get(name, ())) != len(value)
    }
    common.load_state(model, {**known, **fresh}, path)
    if "head.weight" in fresh:  # as MAE's fine-tuning
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
    if fresh:
        common.note(f"new, since {path} has nothing that fits: {', '.join([*fresh][:4])}, ...")


def load_model(path, heads=0, **changes):
    """Return a frozen model of any checkpoint that this script reads, and its Config.

    heads: for unusual widths; changes: fields of the Config, such as task="classify".
    """
    weights = read_weights(path, heads)
    config = Config(**{**weights["fields"], **changes})
    model = build(config)[1]
    load_weights(model, weights["target"], path)
    return model, config


# --------------------------------------------------------------------------------------------------
# Presets and main
# --------------------------------------------------------------------------------------------------

TINY = {"width": 192, "depth": 12, "heads": 12}
SMALL = {**TINY, "width": 384}
BASE = {**TINY, "width": 768}
LARGE = {"width": 1024, "depth": 24, "heads": 16}
HUGE = {"width": 1280, "depth": 32, "heads": 16, "patch": 14}
# The paper's: CIFAR-100 from scratch and after MAE, ImageNet at 28 x 28, latents of 256 x 256.
CIFAR100 = {
    "data": "cifar100",
    "image_size": 32,
    "crop_scale": (0.2, 1.0),
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
IMAGENET28 = {
    "data": "imagenet",
    "image_size": 28,
    "crop_scale": (0.08, 1.0),
    "randaugment": 2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "drop_path": 0.1,
    "batch": 4096,
    "micro": 64,
    "epochs": 300,
    "warmup": 20 / 300,
    "lr": 1.6e-3,
    "weight_decay": 0.3,
    "ema": 0.9999,
    "workers": 12,
}
PRETRAIN = {  # MAE's
    "task": "mae",
    "crop_scale": (0.2, 1.0),
    "batch": 4096,
    "warmup": 40 / 1600,
    "epochs": 1600,
    "lr": 2.4e-3,
    "lr_floor": 0.0,
    "workers": 12,
}
CIFAR100_MAE = {
    **PRETRAIN,
    "data": "cifar100",
    "image_size": 32,
    "micro": 512,
    "decoder_width": 128,
    "decoder_depth": 4,
}
# As released: MAE and DiT.
MAE224 = {
    **PRETRAIN,
    "data": "imagenet",
    "image_size": 224,
    "patch": 16,
    "positions": "sincos",
    "decoder_width": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
    "norm_pix": True,
    "micro": 64,
    "epochs": 800,
    "warmup": 40 / 800,
}
FINETUNE = {  # the table of positions is trained too
    **IMAGENET28,
    "image_size": 224,
    "patch": 16,
    "erase": 0.25,
    "batch": 1024,
    "epochs": 100,
    "warmup": 5 / 100,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "betas": (0.9, 0.999),
    "layer_decay": 0.65,
    "ema": 0.0,
}
DIFFUSION = {
    "task": "diffusion",
    "positions": "sincos",
    "lr_floor": 1.0,
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "ema": 0.9999,
    "workers": 12,
}
LATENTS = {
    **DIFFUSION,
    "data": "imagenet",
    "image_size": 256,
    "channels": 4,
    "downsample": 8,
    "samples": 50000,
}
DIT_L = {**LATENTS, **LARGE, "batch": 2048, "epochs": 400, "warmup": 0.25, "lr": 8e-4}
# On one GPU; made from the paper's recipes, not measured.
CIFAR10 = {
    **IMAGENET28,
    **TINY,
    "data": "cifar10",
    "image_size": 32,
    "heads": 3,
    "crop_scale": (0.4, 1.0),
    "batch": 512,
    "micro": 512,
    "epochs": 60,
    "lr": 1e-3,
    "weight_decay": 0.1,
    "ema": 0.0,
}
FOLDER = {
    **CIFAR100_MAE,
    **SMALL,
    "data": "folder",
    "image_size": 64,
    "patch": 2,
    "batch": 256,
    "micro": 64,
    "epochs": 100,
    "lr": 5e-4,
}
PRESETS = {
    "toy": {"precision": "fp32", "steps": 1000},
    # so few steps do not find out which learned positions are neighbours: it would paint grey
    "toy-mae": {
        "precision": "fp32",
        "task": "mae",
        "positions": "sincos",
        "steps": 1500,
        "lr": 4e-3,
    },
    "toy-diffusion": {  # at so few pixels the linear schedule spends most steps on pure noise
        **DIFFUSION,
        "precision": "fp32",
        "workers": 0,
        "noise_schedule": "cosine",
        "ema": 0.995,
        "steps": 3000,
        "sampler_steps": 25,
        "guidance": 3.0,
    },
    "cifar10": CIFAR10,
    "folder": FOLDER,
    "imagenet28": {**IMAGENET28, **SMALL},
    "vit_t1_cifar100": {**CIFAR100, **TINY},
    "vit_s1_cifar100": {**CIFAR100, **SMALL},
    "vit_b1_imagenet28": {**IMAGENET28, **BASE},
    "vit_l1_imagenet28": {**IMAGENET28, **LARGE},
    "mae_t1_cifar100": {**CIFAR100_MAE, **TINY},
    "mae_s1_cifar100": {**CIFAR100_MAE, **SMALL},
    "mae_b16": {**MAE224, **BASE},
    "mae_l16": {**MAE224, **LARGE},
    "mae_h14": {**MAE224, **HUGE},
    "mae_b16_finetune": {**FINETUNE, **BASE},
    "dit_l1": {**DIT_L, "positions": "learned"},
    "dit_l2": {**DIT_L, "patch": 2},
    "dit_xl2": {
        **DIT_L,
        "width": 1152,
        "depth": 28,
        "patch": 2,
        "batch": 256,
        "epochs": 1400,
        "warmup": 0.0,
        "lr": 1e-4,
    },
}
DATA_PRESETS = {"toy": "toy", "cifar10": "cifar10", "imagenet": "imagenet28", "*": "folder"}


def check(config, world):
    """Refuse what would fail late or silently (exit 2)."""
    common.check(config, world, TASKS[config.task].evaluations)
    c = config
    if c.image_size % (c.patch * c.downsample):
        fail(f"--image-size {c.image_size} is no multiple of --patch {c.patch} x --downsample")
    if c.task == "mae" and (c.positions == "none" or c.mask_ratio >= 1):
        fail("a masked autoencoder needs --positions, and --mask-ratio below 1")
    if not 1 < c.sampler_steps <= TIMESTEPS:
        fail(f"--sampler-steps {c.sampler_steps} must be 2 to {TIMESTEPS}")
    if c.judge and read_weights(c.judge)["fields"]["task"] != "classify":
        fail(f"--judge {c.judge} is no classifier")


def take_over(config, typed, fields):
    """Return the Config with what the weights of --init decide.

    The file chooses the task, unless a flag or a preset that was typed does. Another task takes
    the trunk only. A classifier that is trained has the classes of its data.
    """
    if not typed & {"task", "preset"}:
        config = replace(config, task=fields["task"])
    if config.task != fields["task"]:
        fields = {name: value for name, value in fields.items() if name in TRUNK}
    elif config.task == "classify" and config.train:
        del fields["classes"]
    return common.adopt(config, fields, typed, config.init)


@common.command_line
def main(argv=None):
    """Train and evaluate; see --help."""
    config, typed = common.parse_config(Config, PRESETS, DATA_PRESETS, argv)
    if config.init:
        weights = read_weights(config.init, config.heads if "heads" in typed else 0)
        config = take_over(config, typed, weights["fields"])
    world = common.start_world(config.device, config.precision)
    check(config, world)
    wanted = set(config.eval.split(",") if config.eval else TASKS[config.task].evaluations[:2])
    labelled = ", ".join(sorted(wanted & LABELLED))
    train_split, val, unseen = common.open_data(config.data, labelled, "mosaics")
    if val is None:  # without labels
        wanted -= LABELLED
        val = unseen
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
        target = build(config)[1]
        target.load_state_dict(common.load_checkpoint(run.out / "last.pt")["target"])
    else:
        run = common.Run(config, world)
    target.to(world.device)
    if "features" in wanted:
        common.write_features(target.pooled, val, config, world, run)
    measure = evaluate_samples if config.task == "diffusion" else evaluate
    measure(target, train_split, val, wanted, config, world, run)


if __name__ == "__main__":
    main()
