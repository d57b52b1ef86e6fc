# SPDX-License-Identifier: MIT
"""PMSN: Masked Siamese Networks with a chosen prior on the sizes of clusters, for long-tailed data.

"The Hidden Uniform Cluster Prior in Self-Supervised Learning", Assran, Balestriero, Duval, Bordes,
Misra, Bojanowski, Vincent, Rabbat, Ballas, ICLR 2023, arXiv 2210.07277. No code was ever released.

The idea. Methods that spread features over a batch to avoid collapse, MSN among them, ask for
clusters of equal size. On balanced data that favours classes. On long-tailed data classes are not
equal, so what divides the images evenly wins: pose, texture, background. PMSN says instead how
large clusters should be. A KL divergence pulls the mean assignment to a prior, a power law.
With a uniform prior the divergence is log K minus the entropy, which is MSN, term for term.

    image -- views, encoders, prototypes as in msn.py --> t [B, K] of targets, p [M*B, K] of anchors
    prior pi [K]: pi_k ~ k^-tau ----------------.
    mean of p over views, images, ranks [K] --> KL(mean || pi) --> cross entropy(t, p) + lambda KL

    python pmsn.py                                          # long-tailed toy images
    python pmsn.py --prior uniform                          # MSN on the same images
    python pmsn.py --data ~/photos                          # ViT-S/16 on any images, one GPU
    torchrun --nproc-per-node 8 pmsn.py --data inat18       # iNaturalist 2018 (train/CLASS/*.jpg)

Decisions where sources are silent or disagree. The exponent is 0.25, as in every re-implementation.
The divergence is KL(mean || prior), which alone reduces to MSN; one library computes the other
(--prior-kl reverse). Prototype k owns pi_k from the start: means are not sorted before they are
compared. There is no Sinkhorn, since its usual form puts the uniform prior back in. Lambda is 5,
MSN's without Sinkhorn. The paper demonstrates the hidden prior by batches of few classes
(--classes-per-batch); their sampling here, and accuracy by class frequency, are our constructions.
The backbone of the paper's iNaturalist runs is not known to us: the preset is MSN's ViT-S/16.
"""

import collections
import copy
import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import common
from common import ViT, fail

# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag. The comment beside it is its help."""

    preset: str = ""  # a name of PRESETS, by default the one that fits --data
    data: str = "toy"  # toy, letters, textures, cifar10, imagenet, inat18, or a folder of images

    # model
    image_size: int = 24  # side of the target view and of the random anchor, pixels
    focal_size: int = 12  # side of the focal views, pixels
    patch: int = 4  # side of a patch, pixels
    width: int = 64  # encoder width
    depth: int = 4  # encoder blocks
    heads: int = 4  # attention heads
    head_hidden: int = 128  # width of the projection head's two hidden layers
    embedding: int = 32  # d, width of the embeddings that are compared with prototypes
    prototypes: int = 32  # K, number of prototypes
    init_std: float = 0.09  # std of the initial weights
    patch_std: float = 0.15  # std of the initial patch projection, 0 = sqrt(2 / inputs)

    # views
    focal_views: int = 2  # anchors of the focal size, whole
    drop: float = 0.3  # share of the random anchor's patches that is dropped
    mask_per: Literal["batch", "image"] = "batch"  # what shares a draw of dropped patches
    focal_scale: tuple[float, float] = (0.1, 0.4)  # area of the focal views, share of the image
    blur: float = 0.5  # share of the views that are blurred

    # loss
    prior: str = "power-law"  # uniform (MSN), power-law, counts (of classes), or a .npy file
    tau: float = 0.25  # exponent of the power law
    prior_kl: Literal["forward", "reverse"] = "forward"  # reverse: KL(prior || mean)
    weight: float = 5.0  # lambda, of the divergence

    # long tail
    imbalance: float = 0.0  # keep an exponential tail, largest class over smallest; 0 = all images
    train_list: str = ""  # file of names of training images, one a line: use only these
    classes_per_batch: int = 0  # each batch holds images of so many classes only, 0 = any

    # optimisation
    train: bool = True  # train; --no-train only evaluates --init
    batch: int = 128  # images a step, over all ranks
    recompute: bool = False  # hold less memory: compute activations again in the backward pass
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps, wins over --epochs
    warmup: float = 0.1  # share of the run in which the learning rate rises
    lr: float = 1e-3  # peak learning rate
    lr_start: float = 2e-4  # learning rate of the first step
    lr_final: float = 1e-6  # learning rate at the end of the schedule
    weight_decay: float = 0.04  # weight decay at the start
    weight_decay_final: float = 0.4  # weight decay at the end of the schedule
    momentum: float = 0.99  # EMA momentum at the start, 1 at the end of the schedule
    schedule_scale: float = 1.0  # schedules are this many times longer than the run

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/pmsn, runs/pmsn-2, ...
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
    eval: str = "knn,linear"  # comma-separated: knn, linear, features
    probe_epochs: int = 30  # passes of the linear probe
    probe_batch: int = 256  # batch of the linear probe
    probe_lrs: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)  # learning rates tried, at batch 256


# --------------------------------------------------------------------------------------------------
# Views: as in MSN
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


# Copied from msn.py
def brightness(images, factors):
    """Blend with black: images [B, 3, H, W], factors [B]."""
    return blend(images.new_zeros(()), images, factors)


# Copied from msn.py
def contrast(images, factors):
    """Blend with the mean grey: images [B, 3, H, W], factors [B]."""
    mean = grey_levels(images).mean((1, 2, 3), keepdim=True)
    return blend((mean + 0.5).floor(), images, factors)


# Copied from msn.py
def saturation(images, factors):
    """Blend with the grey image: images [B, 3, H, W], factors [B]."""
    return blend(grey_levels(images), images, factors)


# Copied from msn.py
def hue(images, turns):
    """Shift the hue as PIL does, through 8-bit HSV: images [B, 3, H, W], turns [B]."""
    thirds = 2.0 * torch.arange(3, device=images.device)[:, None, None]  # in sixths of a turn
    value = images.amax(1, keepdim=True)  # [B, 1, H, W]
    span = value - images.amin(1, keepdim=True)
    # where red is largest: green - blue; green: blue - red, a third on; blue: red - green
    difference = images.roll(-1, 1) - images.roll(-2, 1)
    smaller = (value - images).clamp(max=1)  # 0 or 1, since pixels are integers
    sixths = (thirds + difference / span.clamp(min=1e-6) - 6 * smaller).amax(1, keepdim=True)
    angle = (255 * (sixths / 6 + 1).frac()).floor()
    angle += (255 * turns).trunc()[:, None, None, None]
    angle = 256 * (angle / 256 + 1).frac()  # modulo 256
    colour = (255 * span / value.clamp(min=1e-6)).floor() / 255  # saturation
    # each channel falls and rises once in a turn
    k = 6 * ((5 - thirds + 6 / 255 * angle) / 6).frac()  # [B, 3, H, W]
    depth = torch.minimum(k, 4 - k).clamp(0, 1)
    return (value * (1 - colour * depth)).round()


# Copied from msn.py
def grey(images, amounts):
    """Turn images [B, 3, H, W] grey."""
    return grey_levels(images).expand_as(images)


# Copied from msn.py
def blur_matrix(sigma, size):
    """Return PIL's blur of one axis, three box filters: sigma [B] below 4 -> [B, size, size].

    A box is 2 l + 1 pixels of weight 1 between two of weight a < 1, so that its variance is right.
    """
    variance = sigma[:, None] ** 2 / 3
    half = (((12 * variance + 1).sqrt() - 1) / 2).floor()  # l
    edge = (2 * half + 1) * (half * (half + 1) - 3 * variance)
    edge /= 6 * (variance - (half + 1) ** 2)  # a
    offsets = torch.arange(-4, 5, device=sigma.device)
    weights = (offsets.abs() <= half) + edge * (offsets.abs() == half + 1)
    weights /= 2 * (half + edge) + 1  # [B, 9]
    pixel = torch.arange(size, device=sigma.device)
    source = (pixel[:, None] + offsets).clamp(0, size - 1)  # the image's edges are repeated
    reads = (source[..., None] == pixel).float()  # [size, 9, size]
    box = torch.einsum("bo,ioj->bij", weights, reads)
    return box @ box @ box


# Copied from msn.py
def blur(images, sigma):
    """Blur as PIL's GaussianBlur: square images [B, 3, S, S], sigma [B] in pixels."""
    matrix = blur_matrix(sigma, images.shape[3])[:, None]
    return (matrix @ images @ matrix.mT).round()


# Copied from msn.py
def mirror(images, amounts):
    """Mirror images [B, 3, H, W]."""
    return images.flip(3)


# Copied from msn.py
OPERATIONS = (mirror, brightness, contrast, saturation, hue, grey, blur)


# Copied from msn.py
def draw_augmentation(u, blurred):
    """Turn uniform numbers u [B, 15] into (order int64 [B, 7], amounts [B, 7]) of `augment`.

    blurred: share of the views with blur.
    """
    low = torch.tensor([0.0, 0.6, 0.6, 0.6, -0.1, 0.0, 0.1])
    high = torch.tensor([0.0, 1.4, 1.4, 1.4, 0.1, 0.0, 2.0])
    shares = torch.tensor([0.5, 0.8, 0.8, 0.8, 0.8, 0.2, blurred])
    order = torch.arange(7).repeat(len(u), 1)
    order[:, 1:5] = 1 + u[:, :4].argsort(1)
    drawn = u[:, [4, 5, 5, 5, 5, 6, 7]] < shares  # the jitter's four come together or not at all
    return order.where(drawn, -1), torch.lerp(low, high, u[:, 8:])


# Copied from msn.py
def augment(images, order, amounts):
    """Apply OPERATIONS to images [B, 3, H, W], in place.

    order [B, 7], on the CPU: which comes first, second, ..., -1 = none; amounts [B, 7]: of each.
    """
    amounts = amounts.to(images.device, non_blocking=True)
    for drawn in order.T:
        for number, operation in enumerate(OPERATIONS):
            rows = (drawn == number).nonzero()[:, 0]
            if len(rows):
                rows = rows.to(images.device, non_blocking=True)
                images.index_copy_(0, rows, operation(images[rows], amounts[rows, number]))
    return images


# Copied from msn.py
def augment_views(pixels, config, kind, step, rank=0):
    """Return normalised views [V, b, 3, s, s] of a rank's pixels, uint8 of this shape.

    kind: random or focal. Numbers are drawn for the whole batch, so that ranks change nothing.
    """
    share = pixels.shape[1]
    random = common.generator(config.seed, kind, step)
    u = torch.rand(len(pixels), config.batch, 15, generator=random)
    u = u[:, rank * share : (rank + 1) * share].flatten(0, 1)
    order, amounts = draw_augmentation(u, config.blur)
    images = augment(pixels.flatten(0, 1).float(), order, amounts)
    return common.normalize(images).view(pixels.shape)


# Copied from msn.py
def kept_patches(patches, drop):
    """Return how many of an anchor's patches stay (float64, rounded down, as the released code)."""
    return int(patches * (1 - drop))


# Copied from msn.py
def sample_keep(config, step):
    """Draw the patches that the random anchors keep in a step: int64 [B, K] of the whole batch."""
    patches = (config.image_size // config.patch) ** 2
    random = common.generator(config.seed, "masks", step)
    draws = config.batch if config.mask_per == "image" else 1
    keys = torch.rand(draws, patches, generator=random, dtype=torch.float64)
    keep = keys.argsort(1)[:, : kept_patches(patches, config.drop)]
    return keep.expand(config.batch, -1)


# --------------------------------------------------------------------------------------------------
# Model: as in MSN
# --------------------------------------------------------------------------------------------------


# Copied from msn.py
class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the batch of all ranks, on any device. Remembers only finite statistics."""

    def forward(self, x):
        """x [B, D] -> [B, D]."""
        if not self.training:
            return super().forward(x)
        x = x.float()
        mean = common.mean_over_ranks(x.mean(0))
        variance = common.mean_over_ranks((x - mean).square().mean(0))
        with torch.no_grad():
            count = len(x) * (dist.get_world_size() if dist.is_initialized() else 1)
            unbiased = variance * count / max(1, count - 1)
            for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.lerp_(torch.where(now.isfinite(), now, running), self.momentum)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


# Copied from msn.py
def projection_head(width, hidden, embedding):
    """Return three linear layers, BatchNorm and GELU after the first two: [B, D] -> [B, d]."""
    layers = {
        "fc1": nn.Linear(width, hidden),
        "bn1": BatchNorm(hidden),
        "gelu1": nn.GELU(),
        "fc2": nn.Linear(hidden, hidden),
        "bn2": BatchNorm(hidden),
        "gelu2": nn.GELU(),
        "fc3": nn.Linear(hidden, embedding),
    }
    return nn.Sequential(collections.OrderedDict(layers))


# Copied from msn.py
def encode(encoder, images, keep=None):
    """Return the class token after the last block of images [B, 3, S, S]: [B, D].

    keep: the patches to run on, int64 [B, K]. Evaluation reads it before the final norm, as the
    released code: in training BatchNorm cancels that norm's bias, so nothing holds it in place.
    """
    *blocks, last = encoder.blocks
    x = encoder.embed(images, keep)
    for block in blocks:
        x = block(x)
    return last(x, queries=slice(1))[:, 0]  # only the class token is read


# Copied from msn.py
class Network(nn.Module):
    """What embeds a view: a ViT on the visible patches, and the head on its class token."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.encoder = ViT(c.image_size, c.patch, c.width, c.depth, c.heads, class_token=True)
        self.fc = projection_head(c.width, c.head_hidden, c.embedding)
        common.init_weights(self, c.init_std)
        patch_std = c.patch_std or math.sqrt(2 / (3 * c.patch**2))
        nn.init.normal_(self.encoder.patch_embed.proj.weight, std=patch_std)

    def forward(self, views, keep=None):
        """views [B, 3, s, s], keep int64 [B, K] or None (all patches) -> embeddings [B, d]."""
        return self.fc(self.encoder.norm(encode(self.encoder, views, keep)))


# Copied from msn.py
class MSN(nn.Module):
    """Network and prototypes, trained by gradient. The target network is a second one beside it."""

    def __init__(self, config):
        super().__init__()
        self.network = Network(config)
        bound = 1 / math.sqrt(config.embedding)
        prototypes = torch.empty(config.prototypes, config.embedding)
        self.prototypes = nn.Parameter(prototypes.uniform_(-bound, bound))

    def forward(self, anchors, keep, focal):
        """Embed anchors [B, 3, S, S] on the patches keep [B, K], and focal views [F*B, 3, s, s].

        Returns z [M*B, d], view by view, and the prototypes on the unit sphere, q [K, d].
        Each size is one forward pass, so BatchNorm sees each size by itself.
        """
        z = torch.cat([self.network(anchors, keep), self.network(focal)])
        return z, F.normalize(self.prototypes, dim=1)


# Copied from msn.py
def build(config):
    """Return a fresh (model, target network). The target starts as a copy."""
    torch.manual_seed(config.seed)
    model = MSN(config)
    return model, copy.deepcopy(model.network).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


def power_law(count, tau):
    """Return pi_k = k^-tau / sum_j j^-tau for k = 1..count, float64 [K]. tau 0 is uniform."""
    weights = torch.arange(1, count + 1, dtype=torch.float64) ** -tau
    return weights / weights.sum()


def make_prior(config, counts):
    """Return the prior of --prior, float64 [K], positive, of sum 1; counts [C]: images of classes.

    `counts` (ours) stretches the classes' sizes to K prototypes: log pi_k is the log of the sorted
    sizes, interpolated. So each class may own equally many prototypes, in size like itself.
    """
    count = config.prototypes
    if config.prior == "uniform":
        return power_law(count, 0.0)
    if config.prior == "power-law":
        return power_law(count, config.tau)
    if config.prior == "counts":
        sizes = counts[counts > 0].double().sort(descending=True).values.log()
        if not len(sizes):
            fail("--prior counts needs labelled training images, train/CLASS/*.jpg")
        place = torch.linspace(0, len(sizes) - 1, count, dtype=torch.float64)
        larger = sizes[place.long()]
        smaller = sizes[place.ceil().long()]
        weights = torch.lerp(larger, smaller, place.frac()).exp()
        return weights / weights.sum()
    try:
        weights = torch.from_numpy(np.load(config.prior)).double()
    except (OSError, ValueError, TypeError) as error:
        fail(f"--prior {config.prior} is not uniform, power-law, counts or a .npy file: {error}")
    if weights.shape != (count,) or not ((weights > 0) & weights.isfinite()).all():
        fail(f"--prior {config.prior} must hold {count} positive numbers, one a prototype")
    return weights / weights.sum()


# Copied from msn.py
def log_assignments(embeddings, prototypes, temperature=0.1):
    """Return log p of embeddings [B, d] belonging to prototypes [K, d] of norm 1: [B, K]."""
    cosine = F.normalize(embeddings.float(), dim=1) @ prototypes.float().T
    return F.log_softmax(cosine / temperature, dim=1)


def divergence(log_p, log_q):
    """Return KL(p || q) of two distributions in logs [K], in nats."""
    return (log_p.exp() * (log_p - log_q)).sum()


def pmsn_loss(anchors, targets, prototypes, log_prior, reverse=False, sharpen=0.25):
    """Return (cross entropy, KL(mean assignment || prior), target assignments t [B, K]).

    anchors z [M*B, d], view by view; targets h [B, d]; prototypes q [K, d] of norm 1;
    log_prior [K]; reverse: KL(prior || mean) instead; sharpen: T, targets are p^(1/T), normalised.
    The mean assignment is that of all ranks' anchors.
    """
    with torch.no_grad():
        assigned = (log_assignments(targets, prototypes) / sharpen).softmax(1)
    log_p = log_assignments(anchors, prototypes)
    mean_log_p = log_p.unflatten(0, (-1, len(targets))).mean(0)  # over an image's views, [B, K]
    cross_entropy = -(assigned * mean_log_p).sum(1).mean()
    # the smallest p is e^-20 / K at temperature 0.1, so the log is safe
    log_mean = common.mean_over_ranks(log_p.exp().mean(0)).log()  # [K]
    if reverse:
        return cross_entropy, divergence(log_prior, log_mean), assigned
    return cross_entropy, divergence(log_mean, log_prior), assigned


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def tail_sizes(largest, classes, imbalance):
    """Return the images of class i = 0, 1, ...: n_max R^(-i / (C-1))."""
    return [int(largest * imbalance ** (-i / max(1, classes - 1))) for i in range(classes)]


def long_tail(split, config):
    """Return the images of --train-list, or the long-tailed subset of --imbalance.

    Classes are smaller in the order of their names. Which images stay depends on the seed.
    """
    if config.train_list:
        split = split.listed(config.train_list)
    if config.imbalance:
        if not split.classes:
            fail(f"--imbalance needs labels, and {config.data} has none: train/CLASS/*.jpg")
        counts = split.labels.bincount()
        sizes = tail_sizes(int(counts.max()), len(counts), config.imbalance)
        order = torch.randperm(len(split), generator=common.generator(config.seed, "long tail"))
        order = order[split.labels[order].argsort(stable=True)]  # class by class
        members = order.split(counts.tolist())
        kept = [rows[:size] for rows, size in zip(members, sizes, strict=True)]
        split = split.subset(torch.cat(kept).sort().values.tolist())
        common.note(f"long tail, images of the first classes: {class_counts(split)[:20].tolist()}")
    return split


def class_counts(split):
    """Return the images of each class, int64 [C]."""
    labelled = split.labels[split.labels >= 0]
    return labelled.bincount(minlength=len(split.classes))


def batch_indices(split, config, step):
    """Return the images of a step; with --classes-per-batch K' of K' classes, B / K' of each.

    Classes are drawn without replacement, in proportion to their sizes, and images with
    replacement. So each image is about as likely as ever, exactly so on balanced data.
    """
    c = config
    if not c.classes_per_batch:
        return common.micro_batch_indices(step, c.batch, len(split), c.seed)
    random = common.generator(c.seed, "classes", step)
    sizes = class_counts(split).double()
    rows = []
    for label in torch.multinomial(sizes, c.classes_per_batch, generator=random):
        members = (split.labels == label).nonzero()[:, 0]
        count = c.batch // c.classes_per_batch
        rows += members[torch.randint(len(members), (count,), generator=random)].tolist()
    return rows


def make_views(split, config, rank, ranks, step):
    """Make a rank's crops of a step, which depend on seed and step only.

    Returns (random views uint8 [2, b, 3, S, S], of which the first is the target view, focal views
    [F, b, 3, s, s], the anchor's patches int64 [b, K], unreadable files).
    """
    c = config
    share = c.batch // ranks
    mine = slice(rank * share, (rank + 1) * share)
    indices = batch_indices(split, c, step)[mine]
    scales = [(0.3, 1.0)] * 2 + [c.focal_scale] * c.focal_views
    sizes = [c.image_size] * 2 + [c.focal_size] * c.focal_views

    def boxes(i, width, height):
        random = common.generator(c.seed, "crops", step, mine.start + i)
        return [common.random_crop(width, height, scale, random) for scale in scales]

    _, *crops, bad = split.read_batch(indices, boxes, sizes)
    keep = sample_keep(c, step)[mine]
    return torch.stack(crops[:2]), torch.stack(crops[2:]), keep, bad


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


# Copied from msn.py
def schedules(config, step, steps):
    """Return (lr, weight decay, EMA momentum) of step 0, 1, ...

    The released code advances the first two before the step, so they are those of step + 1.
    """
    c = config
    length = c.schedule_scale * steps
    warmup = round(c.warmup * steps)
    lr = common.cosine_schedule(step + 1, int(length), c.lr, c.lr_final, warmup, c.lr_start)
    decay = common.cosine_schedule(step + 1, int(length), c.weight_decay, c.weight_decay_final)
    return lr, decay, common.linear_schedule(step, length, c.momentum, 1.0)


# Copied from msn.py
def make_optimizer(model):
    """Return AdamW, with torch's betas. Class token and positions are decayed, prototypes not."""
    groups = common.parameter_groups(model.network)
    groups.append({"decay": False, "params": [model.prototypes]})
    return torch.optim.AdamW(groups, fused=True)


def train(model, target, split, log_prior, config, world):
    """Train (model, target network) on a Split. Returns the run; its last.pt holds the result.

    log_prior [K], on the device.
    """
    c = config
    if c.recompute:
        for block in model.network.encoder.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    # DDP hides the parts that `model` has
    network = common.distribute(model, world, c, dynamic=True)
    # it stays in training mode: its BatchNorm, too, sees the batch
    target = common.distribute(target, world, c)
    optimizer = make_optimizer(model)
    ema = common.EMA(target, model.network)
    clip = functools.partial(nn.utils.clip_grad_norm_, list(model.network.parameters()), 3.0)
    run = common.Run(c, world, split, network, optimizer, target=target)
    reverse = c.prior_kl == "reverse"
    make = functools.partial(make_views, split, c, world.rank, world.size)
    loader = common.make_loader(make, range(run.step, run.steps), c, world)
    for step in run:
        lr, decay, momentum = schedules(c, step, run.steps)
        common.set_rates(optimizer, lr, decay)
        random_pixels, focal_pixels, keep = run.next(loader, split)
        view, anchors = augment_views(random_pixels, c, "random", step, world.rank)
        focal = augment_views(focal_pixels, c, "focal", step, world.rank).flatten(0, 1)
        with world.autocast():
            with torch.no_grad():
                h = target(view)  # [B, d]
            z, prototypes = network(anchors, keep, focal)  # [M*B, d], [K, d]
        cross_entropy, kl, assigned = pmsn_loss(z, h, prototypes, log_prior, reverse)
        run.backward(cross_entropy + c.weight * kl)
        applied = run.update(clip=clip)
        ema.update(momentum, applied)
        used = count_used(assigned)  # by rank 0's images
        run.log(lr=lr, ce=cross_entropy, kl=kl, prototypes_used=used)
    return run


# Copied from msn.py
def count_used(assigned):
    """Return how many prototypes are some target's nearest: 1 is collapse. assigned [B, K]."""
    return torch.zeros_like(assigned[0]).index_fill(0, assigned.argmax(1), 1.0).sum()


# --------------------------------------------------------------------------------------------------
# Evaluate
# --------------------------------------------------------------------------------------------------


# Copied from msn.py
def standardise(features):
    """Return each row minus its own mean, on the unit sphere (the released low-shot code)."""
    return F.normalize(features - features.mean(1, keepdim=True), dim=1)


# Copied from msn.py
class SGD(torch.optim.Optimizer):
    """The released probe's SGD: Nesterov with the rate inside the velocity, a cosine to 0."""

    def __init__(self, params, steps, momentum=0.9):
        super().__init__(params, {"momentum": momentum})
        self.steps = steps
        self.done = 0

    @torch.no_grad()
    def step(self):
        """Take a step."""
        factor = common.cosine_schedule(self.done, self.steps, 1.0, 0.0)
        self.done += 1
        for group in self.param_groups:
            for p in group["params"]:
                move = factor * group["lr"] * (p.grad + group["weight_decay"] * p)
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).sub_(move)
                p.add_(group["momentum"] * velocity - move)


# Copied from msn.py
class L2Norm(nn.Module):
    """Bring rows to the unit sphere: [B, D] -> [B, D]."""

    def forward(self, x):
        """See the class."""
        return F.normalize(x, dim=1)


def probe(bank, test, config):
    """Return the scores [V, C] of the released linear probe, fitted to bank; the best of its rates.

    bank: features [N, D], labels [N]; test: features [V, D], labels [V].
    """
    c = config
    features, labels = bank
    width = features.shape[1]
    heads = {}
    torch.manual_seed(c.seed)
    for lr in c.probe_lrs:
        linear = nn.Linear(width, int(labels.max()) + 1)
        head = nn.Sequential(nn.LayerNorm(width), L2Norm(), linear).to(features.device)
        common.init_weights(head, 0.01)
        heads[lr] = (head, lr * c.probe_batch / 256, 0.0)
    steps = c.probe_epochs * math.ceil(len(labels) / c.probe_batch)
    optimizer = functools.partial(SGD, steps=steps)
    batches = common.shuffled_batches(features, labels, c.probe_batch, c.seed)
    _, best = common.linear_probe(batches, *test, heads, c.probe_epochs, optimizer)
    with torch.no_grad():
        return heads[best][0](test[0])


def class_accuracy(scores, labels, classes):
    """Return the accuracy of each class in percent, float64 [C]; NaN where val has no image."""
    right = 100 * (scores.argmax(1) == labels).double()
    return torch.stack([right[labels == k].mean() for k in range(classes)]).cpu()


def by_frequency(accuracy, counts):
    """Return means of class accuracies [C] by how frequent a class was in training; counts [C].

    balanced: all; head, mid, tail: the most frequent 30 %, the middle 40 %, the rarest 30 %;
    many, medium, few: more than 100, 20 to 100, fewer than 20 images, where there are such classes.
    """
    ranked = accuracy[counts.argsort(descending=True, stable=True)]
    outer = round(0.3 * len(counts))
    groups = {
        "balanced": ranked,
        "head": ranked[:outer],
        "mid": ranked[outer : len(ranked) - outer],
        "tail": ranked[len(ranked) - outer :],
        "many": accuracy[counts > 100],
        "medium": accuracy[(counts >= 20) & (counts <= 100)],
        "few": accuracy[counts < 20],
    }
    return {name: group.nanmean().item() for name, group in groups.items() if len(group)}


def evaluate_one(read, train, tail, val, config, world):
    """Return {evaluation: percent} of `read`, a function of images; on rank 0."""

    def extract(split):
        features, labels, _ = common.extract(read, split, config, world)
        return features, labels

    test = extract(val)
    bank = extract(train)
    tail_bank = extract(tail)
    if world.rank > 0:
        return {}
    scores = {}
    if "knn" in config.eval:
        scores["knn"] = common.knn(standardise(bank[0]), bank[1], standardise(test[0]))
    if "linear" in config.eval:
        scores["linear"] = probe(bank, test, config)
        if len(tail) < len(train):
            scores["tail labels"] = probe(tail_bank, test, config)
    counts = class_counts(tail)
    result = {}
    for name, found in scores.items():
        accuracy = class_accuracy(found, test[1], len(counts))
        for part, value in by_frequency(accuracy, counts).items():
            result[f"{name} {part}".removesuffix(" balanced")] = value
    return result


def evaluate(encoder, train, tail, val, config, world, run):
    """Run --eval on the encoder, and beside it on a random encoder and on raw pixels.

    train: all labelled images, so that features are measured and not the classifier's bias;
    tail: what was trained on.
    """
    random = build(config)[1].encoder.to(world.device).eval()
    results = {}
    for name, read in (
        ("trained", functools.partial(encode, encoder)),
        ("random", functools.partial(encode, random)),
        ("pixels", common.raw_pixels),
    ):
        results[name] = evaluate_one(read, train, tail, val, config, world)
    run.report(results)


# --------------------------------------------------------------------------------------------------
# Picture
# --------------------------------------------------------------------------------------------------


# Copied from msn.py
def draw_picture(path, view, anchors, keep, focal, p, patch):
    """Show what the network sees, and how it groups images.

    Columns: a target view, the anchor without its dropped patches, a focal view; then for one of
    the largest clusters the eight target views that belong to it most.
    view, anchors [B, 3, S, S], keep [B, K], focal [B, 3, s, s]; p [B, K]: target assignments.
    """
    side = view.shape[3] // patch
    seen = torch.zeros(len(view), side * side, device=view.device).scatter(1, keep, 1.0)
    seen = F.interpolate(seen.view(-1, 1, side, side), scale_factor=patch)
    focal = F.interpolate(focal, view.shape[2:])
    largest = p.sum(0).topk(min(6, *p.shape)).indices
    grid = []
    for row, prototype in enumerate(largest):
        found = p[:, prototype].topk(min(8, len(p))).indices
        tiles = [view[row], anchors[row] * seen[row], focal[row], *view[found]]
        grid.append(torch.stack(tiles))
    common.save_picture(path, torch.stack(grid))
    common.note(f"{path}: views as the network sees them, and the views nearest to prototypes")


@torch.no_grad()
def report(model, target, split, log_prior, config, world, run, steps=16):
    """After training: how near are cluster sizes of an epoch to which prior? And the picture.

    An epoch: at most `steps` batches of 256. All ranks compute the same.
    """
    c = replace(config, batch=min(256, len(split)), classes_per_batch=0)
    steps = min(steps, len(split) // c.batch)
    make = functools.partial(make_views, split, c, 0, 1)
    loader = common.make_loader(make, range(steps), c, world)
    shares = torch.zeros_like(log_prior)  # [K]
    for step in range(steps):
        random_pixels, focal_pixels, keep = run.next(loader, split)
        view, anchors = augment_views(random_pixels, c, "random", step)
        focal = augment_views(focal_pixels, c, "focal", step)
        z, prototypes = model(anchors, keep, focal.flatten(0, 1))
        shares += log_assignments(z, prototypes).exp().mean(0) / steps
    log_mean = shares.log()
    distance = {}
    for name, tau in (("uniform", 0.0), ("power_law", c.tau)):
        other = power_law(c.prototypes, tau).log().to(log_mean)
        distance[f"kl_{name}"] = divergence(log_mean, other).item()
    distance["kl_prior"] = divergence(log_mean, log_prior).item()
    effective = torch.special.entr(shares).sum().exp().item()
    found = ", ".join(f"{name} {value:.4f}" for name, value in distance.items())
    common.note(f"mean assignment of an epoch: {found}; {effective:.1f} effective clusters")
    run.write(effective_clusters=effective, shares=shares.tolist(), **distance)
    p = log_assignments(target(view), prototypes).exp()  # [B, K]
    if world.rank == 0:
        draw_picture(run.out / "picture.png", view, anchors, keep, focal[0], p, c.patch)


# --------------------------------------------------------------------------------------------------
# Weights: ours, and those of MSN
# --------------------------------------------------------------------------------------------------

# Copied from msn.py
MODEL = "image_size patch width depth heads head_hidden embedding prototypes".split()


def read_weights(path, heads=0):
    """Read a checkpoint: state dicts `network` and `target`, `prototypes`, and `fields` of Config.

    Ours, or MSN's official ones with target_encoder and prototypes.
    heads: for widths that the released models do not have.
    """
    state = common.load_checkpoint(path, "pmsn")
    if "script" in state:
        network = {name.removeprefix("network."): x for name, x in state["model"].items()}
        weights = {"prototypes": network.pop("prototypes"), "network": network}
        weights["fields"] = {name: state["config"][name] for name in MODEL}
        return {**weights, "target": state["target"]}
    if not {"target_encoder", "prototypes"} <= state.keys():
        common.refuse(path, "PMSN or MSN: expected target_encoder, prototypes", state)
    target = state["target_encoder"]
    fields = common.vit_fields(target, path, heads)
    fields["embedding"], fields["head_hidden"] = target["fc.fc3.weight"].shape
    fields["prototypes"] = len(state["prototypes"])
    target = in_network(target)
    weights = {"network": target, "target": target, "fields": fields}
    return {**weights, "prototypes": state["prototypes"]}


# Copied from msn.py
def in_network(state):
    """Return a flat state dict under the names of Network: the head is fc.*, the rest encoder.*."""
    return {n if n.startswith("fc.") else f"encoder.{n}": value for n, value in state.items()}


# Copied from msn.py
def load_weights(model, target, weights, path):
    """Put what `read_weights` found into (model, target). A head that it lacks stays fresh."""
    for name, module in (("network", model.network), ("target", target)):
        fresh = module.fc.state_dict(prefix="fc.")
        common.load_state(module, {**fresh, **weights[name]}, f"{path}, {name}")
    if weights["prototypes"] is not None:
        model.prototypes.data.copy_(weights["prototypes"])


# Copied from msn.py
def load_encoder(path, image_size=0, heads=0):
    """Return the frozen target ViT of any checkpoint; its features: `encode`.

    image_size: pixels, 0 = as trained.
    """
    weights = read_weights(path, heads)
    config = replace(Config(), **weights["fields"])
    config.image_size = image_size or config.image_size
    model, target = build(config)
    load_weights(model, target, weights, path)
    return target.encoder.requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------------
# Presets and main
# --------------------------------------------------------------------------------------------------

# MSN's ViT-S/16 run, without Sinkhorn. What the paper trained on iNaturalist
# 2018 is not known to us.
IMAGENET = {
    "data": "imagenet",
    "image_size": 224,
    "focal_size": 96,
    "patch": 16,
    "head_hidden": 2048,
    "embedding": 256,
    "prototypes": 1024,
    "init_std": 0.02,
    "patch_std": 0.0,
    "focal_views": 10,
    "focal_scale": (0.05, 0.3),
    "batch": 1024,
    "epochs": 800,
    "warmup": 15 / 800,
    "momentum": 0.996,
    "schedule_scale": 1.25,
    "workers": 12,
    "probe_epochs": 100,
    "probe_batch": 16384,
    "probe_lrs": (0.1,),
}
# Copied from msn.py
SMALL = {"width": 384, "depth": 12, "heads": 6}
CIFAR10 = {
    "data": "cifar10",
    "imbalance": 100.0,
    "image_size": 32,
    "focal_size": 16,
    "blur": 0.0,
    "workers": 1,
}

PRESETS = {
    "toy": {
        "imbalance": 20.0,
        "steps": 400,
        "probe_epochs": 15,
        "precision": "fp32",
        "workers": 1,
    },
    "cifar10-cpu": {
        **CIFAR10,
        "patch": 8,
        "width": 128,
        "prototypes": 64,
        "init_std": 0.06,
        "focal_views": 4,
        "lr": 1.5e-3,
        "steps": 6000,
    },
    "cifar10": {  # one GPU
        **CIFAR10,
        "width": 192,
        "depth": 9,
        "heads": 3,
        "prototypes": 128,
        "init_std": 0.05,
        "focal_views": 6,
        "batch": 512,
        "epochs": 300,
        "workers": 8,
    },
    "folder": {  # any images, ViT-S/16, one GPU
        **IMAGENET,
        **SMALL,
        "data": "folder",
        "focal_views": 6,
        "drop": 0.15,
        "batch": 256,
        "epochs": 100,
        "warmup": 0.1,
        "probe_epochs": 30,
        "probe_batch": 1024,
        "probe_lrs": (0.1, 0.3, 1.0),
    },
    "vit_s16_inat18": {**IMAGENET, **SMALL, "data": "inat18", "drop": 0.15},
    "vit_s16_in1k": {**IMAGENET, **SMALL, "drop": 0.15},
}
DATA_PRESETS = {
    "toy": "toy",
    "letters": "toy",
    "textures": "toy",
    "cifar10": "cifar10",
    "imagenet": "vit_s16_in1k",
    "inat18": "vit_s16_inat18",
    "*": "folder",
}


def check(config, world):
    """Refuse what would fail late or silently (exit 2)."""
    common.check(config, world, ("knn", "linear", "features"))
    c = config
    if c.focal_size < c.patch:
        fail(f"--focal-size {c.focal_size} is below --patch {c.patch}")
    if kept_patches((c.image_size // c.patch) ** 2, c.drop) < 1:
        fail(f"--drop {c.drop:g} leaves no patch of the anchor: it must be less than 1")
    if c.schedule_scale < 1:
        fail(f"--schedule-scale {c.schedule_scale} is below 1: schedules would end before the run")
    if 0 < c.imbalance < 1:
        fail(f"--imbalance {c.imbalance} must be at least 1: largest class over smallest")
    if c.classes_per_batch and c.batch % c.classes_per_batch:
        fail(f"--classes-per-batch {c.classes_per_batch} does not divide --batch {c.batch}")


@common.command_line
def main(argv=None):
    """Train and evaluate; see --help."""
    config, typed = common.parse_config(Config, PRESETS, DATA_PRESETS, argv)
    if config.init:
        weights = read_weights(config.init, config.heads if "heads" in typed else 0)
        config = common.adopt(config, weights["fields"], typed, config.init)
    world = common.start_world(config.device, config.precision)
    check(config, world)
    wanted = set(config.eval.split(","))
    probes = ", ".join(sorted(wanted - {"features", "none"}))
    train_split, val, unseen = common.open_data(config.data, probes, "textures")
    tail = long_tail(train_split, config)
    counts = class_counts(tail)
    if config.classes_per_batch > (counts > 0).sum():
        fail(f"--classes-per-batch {config.classes_per_batch}: there are {len(counts)} classes")
    log_prior = make_prior(config, counts).log().float().to(world.device)
    model, target = build(config)
    if config.init:
        load_weights(model, target, weights, config.init)
    if config.train:
        run = train(model, target, tail, log_prior, config, world)
        # what is evaluated is what was saved, in networks that are neither wrapped nor sharded
        weights = read_weights(run.out / "last.pt")
        model, target = build(config)
        load_weights(model, target, weights, run.out / "last.pt")
    else:
        run = common.Run(config, world)
    model.to(world.device).eval()
    target.to(world.device).eval()
    if config.train:
        report(model, target, tail, log_prior, config, world, run)
    if "features" in wanted:
        read = functools.partial(encode, target.encoder)
        common.write_features(read, unseen, config, world, run)
    if val:
        evaluate(target.encoder, train_split, tail, val, config, world, run)


if __name__ == "__main__":
    main()
