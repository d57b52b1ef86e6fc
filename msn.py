# SPDX-License-Identifier: MIT
"""MSN: match masked views of an image to an unmasked one through prototypes.

"Masked Siamese Networks for Label-Efficient Learning", Assran, Caron, Misra, Bojanowski, Bordes,
Vincent, Joulin, Rabbat, Ballas, ECCV 2022, arXiv 2204.07141.

The idea. Two views of an image go through two encoders. The anchor view loses a part of its
patches before the first block. The target view is whole, and its encoder is a moving average of the
first. Each view is described by how close it is to each of K learned prototypes: a soft cluster
assignment. The anchor must arrive at the target's assignment. So what is missing is filled in by
meaning, not by pixels. Two things prevent collapse. Target assignments are sharpened. And the mean
assignment over the batch is pushed towards an equal use of all prototypes (mean entropy
maximisation, ME-MAX). Dropped patches cost nothing, and few labels go far on such features.

    image - crop, colour, blur -> target view [B, 3, S, S] -- target encoder, head --> h [B, d] -.
      |                                        : EMA      softmax(h.q / 0.1), sharpened: t [B, K]
      |---- crop, colour, blur -> anchor view, 30 % of its patches dropped -.                    |
      '---- small crops -------> focal views [F*B, 3, s, s] ----- encoder, head --> z [M*B, d]   |
                                                                             |                   |
     prototypes q [K, d] -> softmax(z.q / 0.1): p [M*B, K] -> cross entropy(t, p) + lambda ME-MAX

    python msn.py                                           # toy images, minutes on a laptop
    python msn.py --data ~/photos                           # ViT-S/16 on any images, one GPU
    torchrun --nproc-per-node 8 msn.py --data imagenet      # the paper's ViT-S/16
    python msn.py --init vits16_800ep.pth.tar --no-train --eval lowshot,linear --data imagenet

Departures. From the paper, with the released code: one draw of dropped patches a batch (the paper's
text: --mask-per image); features are the class token before the final norm; schedules span 1.25
times the run; class token and positions decay; random and focal views are normalised apart.
From the code: the prototypes' gradient is the mean over ranks, not their sum, which AdamW does not
see; focal views are never masked; evaluation resizes bicubically.
"""

import collections
import copy
import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

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
    data: str = "toy"  # toy, letters, textures, cifar10, imagenet, or a folder of images

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
    sinkhorn: int = 0  # Sinkhorn iterations that even out the use of prototypes in the targets
    weight: float = 5.0  # lambda, of ME-MAX: the paper's best are 5 without Sinkhorn, 1 with

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
    out: str = ""  # folder of the run, default runs/msn, runs/msn-2, ...
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
    eval: str = "knn,linear,lowshot"  # comma-separated: knn, linear, lowshot, features
    probe_augment: bool = False  # probe on random crops, each encoded anew
    probe_epochs: int = 30  # passes of the linear probe
    probe_batch: int = 256  # batch of the linear probe
    probe_lrs: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)  # learning rates tried, at batch 256
    label_list: str = ""  # names of lowshot's labelled images; default also a seeded 1 %


# --------------------------------------------------------------------------------------------------
# Views: colours and blur of a whole batch at once, on the device. Pixels are 0..255 (appendix A).
# --------------------------------------------------------------------------------------------------


def grey_levels(images):
    """Return PIL's grey of images [B, 3, H, W], rounded: [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue + 0.5).floor()


def blend(base, images, factors):
    """Return base + factor (images - base), cut off as PIL does. factors [B]."""
    mixed = torch.lerp(base, images, factors[:, None, None, None])
    # 1e-3 for values that rounding puts just below an integer
    return (mixed.clamp(0, 255) + 1e-3).floor()


def brightness(images, factors):
    """Blend with black: images [B, 3, H, W], factors [B]."""
    return blend(images.new_zeros(()), images, factors)


def contrast(images, factors):
    """Blend with the mean grey: images [B, 3, H, W], factors [B]."""
    mean = grey_levels(images).mean((1, 2, 3), keepdim=True)
    return blend((mean + 0.5).floor(), images, factors)


def saturation(images, factors):
    """Blend with the grey image: images [B, 3, H, W], factors [B]."""
    return blend(grey_levels(images), images, factors)


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


def grey(images, amounts):
    """Turn images [B, 3, H, W] grey."""
    return grey_levels(images).expand_as(images)


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


def blur(images, sigma):
    """Blur as PIL's GaussianBlur: square images [B, 3, S, S], sigma [B] in pixels."""
    matrix = blur_matrix(sigma, images.shape[3])[:, None]
    return (matrix @ images @ matrix.mT).round()


def mirror(images, amounts):
    """Mirror images [B, 3, H, W]."""
    return images.flip(3)


OPERATIONS = (mirror, brightness, contrast, saturation, hue, grey, blur)


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


def kept_patches(patches, drop):
    """Return how many of an anchor's patches stay (float64, rounded down, as the released code)."""
    return int(patches * (1 - drop))


def sample_keep(config, step):
    """Draw the patches that the random anchors keep in a step: int64 [B, K] of the whole batch."""
    patches = (config.image_size // config.patch) ** 2
    random = common.generator(config.seed, "masks", step)
    draws = config.batch if config.mask_per == "image" else 1
    keys = torch.rand(draws, patches, generator=random, dtype=torch.float64)
    keep = keys.argsort(1)[:, : kept_patches(patches, config.drop)]
    return keep.expand(config.batch, -1)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


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


def build(config):
    """Return a fresh (model, target network). The target starts as a copy."""
    torch.manual_seed(config.seed)
    model = MSN(config)
    return model, copy.deepcopy(model.network).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Loss (section 3 of the paper)
# --------------------------------------------------------------------------------------------------


def log_assignments(embeddings, prototypes, temperature=0.1):
    """Return log p of embeddings [B, d] belonging to prototypes [K, d] of norm 1: [B, K]."""
    cosine = F.normalize(embeddings.float(), dim=1) @ prototypes.float().T
    return F.log_softmax(cosine / temperature, dim=1)


def sinkhorn(log_q, iterations):
    """Even out the use of prototypes over all ranks' samples: log q [B, K] -> [B, K].

    In log space an unused prototype cannot become 0 / 0. The textbook's constants cancel.
    """
    for _ in range(iterations):
        used = common.gather_over_ranks(log_q.logsumexp(0, keepdim=True))  # [ranks, K]
        log_q = (log_q - used.logsumexp(0)).log_softmax(1)
    return log_q


def msn_loss(anchors, targets, prototypes, iterations=0, sharpen=0.25):
    """Return (cross entropy, log K - H(mean assignment), target assignments t [B, K]).

    anchors z [M*B, d], view by view; targets h [B, d]; prototypes q [K, d] of norm 1;
    iterations: of Sinkhorn; sharpen: T, targets are p^(1/T), normalised.
    The mean assignment is that of all ranks' anchors.
    """
    with torch.no_grad():
        log_t = log_assignments(targets, prototypes) / sharpen
        assigned = sinkhorn(log_t.log_softmax(1), iterations).exp()
    log_p = log_assignments(anchors, prototypes)
    mean_log_p = log_p.unflatten(0, (-1, len(targets))).mean(0)  # over an image's views, [B, K]
    cross_entropy = -(assigned * mean_log_p).sum(1).mean()
    mean = common.mean_over_ranks(log_p.exp().mean(0))  # [K]
    return cross_entropy, math.log(len(mean)) - torch.special.entr(mean).sum(), assigned


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def make_views(split, config, rank, ranks, step):
    """Make a rank's crops of a step, which depend on seed and step only.

    Returns (random views uint8 [2, b, 3, S, S], of which the first is the target view, focal views
    [F, b, 3, s, s], the anchor's patches int64 [b, K], unreadable files).
    """
    c = config
    share = c.batch // ranks
    mine = slice(rank * share, (rank + 1) * share)
    indices = common.micro_batch_indices(step, c.batch, len(split), c.seed)[mine]
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


def make_optimizer(model):
    """Return AdamW, with torch's betas. Class token and positions are decayed, prototypes not."""
    groups = common.parameter_groups(model.network)
    groups.append({"decay": False, "params": [model.prototypes]})
    return torch.optim.AdamW(groups, fused=True)


def train(model, target, split, config, world):
    """Train (model, target network) on a Split. Returns the run; its last.pt holds the result."""
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
        cross_entropy, me_max, assigned = msn_loss(z, h, prototypes, c.sinkhorn)
        run.backward(cross_entropy + c.weight * me_max)
        applied = run.update(clip=clip)
        ema.update(momentum, applied)
        used = count_used(assigned)  # by rank 0's images
        run.log(lr=lr, ce=cross_entropy, me_max=me_max, prototypes_used=used)
    return run


def count_used(assigned):
    """Return how many prototypes are some target's nearest: 1 is collapse. assigned [B, K]."""
    return torch.zeros_like(assigned[0]).index_fill(0, assigned.argmax(1), 1.0).sum()


# --------------------------------------------------------------------------------------------------
# Evaluate
# --------------------------------------------------------------------------------------------------


def standardise(features):
    """Return each row minus its own mean, on the unit sphere (the released low-shot code)."""
    return F.normalize(features - features.mean(1, keepdim=True), dim=1)


def logistic_regression(x, labels, classes, ridge):
    """Return the weights [C, D] that minimise mean cross entropy + ridge / (2 n) |W|^2 on x [n, D].

    Strongly convex without intercept, so any solver finds the same weights.
    """
    x = x.float() if x.device.type == "mps" else x.double()
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight],
        max_iter=1000,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T, labels)
        loss += ridge / (2 * len(x)) * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach()


SHOTS = {"1-shot": 1, "2-shot": 2, "5-shot": 5, "1 %": 0}  # labelled images a class


def labelled_subsets(split, label_list):
    """Return {name of SHOTS: three seeded subsets}; label_list: file of names for the 1 %."""
    subsets = {name: [] for name in SHOTS}
    for seed in range(3):
        order = torch.randperm(len(split), generator=common.generator("labelled", seed))
        order = order[split.labels[order].argsort(stable=True)]  # class by class
        members = order.split(split.labels.bincount().tolist())
        for name, shots in SHOTS.items():
            few = [rows[: shots or max(1, round(len(rows) / 100))] for rows in members]
            subsets[name].append(split.subset(torch.cat(few).tolist()))
    if label_list:
        subsets["1 %"] = [split.listed(label_list)]
    return subsets


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


class L2Norm(nn.Module):
    """Bring rows to the unit sphere: [B, D] -> [B, D]."""

    def forward(self, x):
        """See the class."""
        return F.normalize(x, dim=1)


def probe(batches, steps, val, labels, classes, config):
    """Return the released linear probe's top-1 in percent, and the name of the best of its rates.

    batches: of `common.linear_probe`, `steps` in all; val [V, D], labels [V].
    """
    width = val.shape[1]
    heads = {}
    torch.manual_seed(config.seed)
    for lr in config.probe_lrs:
        head = nn.Sequential(nn.LayerNorm(width), L2Norm(), nn.Linear(width, classes))
        common.init_weights(head, 0.01)
        heads[f"lr {lr:g}"] = (head.to(val.device), lr * config.probe_batch / 256, 0.0)
    optimizer = functools.partial(SGD, steps=steps)
    return common.linear_probe(batches, val, labels, heads, config.probe_epochs, optimizer)


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


def evaluate_one(read, train, val, subsets, config, world):
    """Return {evaluation: top-1 in percent} of `read`, a function of images; on rank 0."""
    c = config

    def extract(split):
        features, labels, _ = common.extract(read, split, c, world)
        return features, labels

    def batches(epoch):
        bank = train_bank
        if c.probe_augment:
            bank = extract(RandomCrops(**vars(train), key=(c.seed, "probe", epoch)))
        if world.rank == 0:
            yield from common.shuffled_batches(*bank, c.probe_batch, c.seed)(epoch)

    test, labels = extract(val)
    few = {name: [extract(split) for split in splits] for name, splits in subsets.items()}
    if "knn" in c.eval or "linear" in c.eval:
        train_bank = extract(train)
    if world.rank > 0:
        for epoch in range(c.probe_epochs * ("linear" in c.eval)):
            list(batches(epoch))
        return {}
    result = {}
    if "knn" in c.eval:
        bank, bank_labels = train_bank
        scores = common.knn(standardise(bank), bank_labels, standardise(test))
        result["knn"] = common.top1(scores, labels)
    if "linear" in c.eval:
        steps = c.probe_epochs * math.ceil(len(train) / c.probe_batch)
        result["linear"], _ = probe(batches, steps, test, labels, len(train.classes), c)
    for name, draws in few.items():
        ridge = 0.0025 if SHOTS[name] else 0.075  # the released code's, the authors' for 1 %
        result[name] = 0.0
        for x, y in draws:
            weight = logistic_regression(standardise(x), y, len(train.classes), ridge)
            scores = standardise(test).to(weight.dtype) @ weight.T
            result[name] += common.top1(scores, labels) / len(draws)
    return result


def evaluate(encoder, train, val, subsets, config, world, run):
    """Run --eval on the encoder, and beside it on a random encoder and on raw pixels."""
    random = build(config)[1].encoder.to(world.device).eval()
    plain = replace(config, probe_augment=False)  # baselines are encoded once
    results = {}
    for name, read, c in (
        ("trained", functools.partial(encode, encoder), config),
        ("random", functools.partial(encode, random), plain),
        ("pixels", common.raw_pixels, plain),
    ):
        results[name] = evaluate_one(read, train, val, subsets, c, world)
    run.report(results)


# --------------------------------------------------------------------------------------------------
# Picture
# --------------------------------------------------------------------------------------------------


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
def report(model, target, split, config, world, run):
    """After training: do assignments of unseen images tell which image it is? And the picture.

    All ranks compute the same, since the loss takes means over ranks.
    """
    c = replace(config, batch=min(256, len(split)))
    item = make_views(split, c, 0, 1, 0)
    random_pixels, focal_pixels, keep = run.next(iter([item]), split)
    view, anchors = augment_views(random_pixels, c, "random", 0)
    focal = augment_views(focal_pixels, c, "focal", 0)
    z, prototypes = model(anchors, keep, focal.flatten(0, 1))
    h = target(view)
    right = msn_loss(z, h, prototypes)[0].item()
    ratio = msn_loss(z, h.roll(1, 0), prototypes)[0].item() / right
    p = log_assignments(h, prototypes).exp()  # [B, K]
    common.note(
        f"unseen images: another image's target costs {ratio:.2f} times as much as their own"
    )
    run.write(match_ce=right, match_ratio=ratio)
    if world.rank == 0:
        draw_picture(run.out / "picture.png", view, anchors, keep, focal[0], p, c.patch)


# --------------------------------------------------------------------------------------------------
# Weights: ours, the authors', the Hub's
# --------------------------------------------------------------------------------------------------

MODEL = "image_size patch width depth heads head_hidden embedding prototypes".split()


def read_weights(path, heads=0):
    """Read a checkpoint: state dicts `network` and `target`, `prototypes`, and `fields` of Config.

    Ours; the authors', with target_encoder, prototypes and in their trainer's files encoder; the
    Hub's or a bare encoder, which have neither head nor prototypes.
    heads: for widths that the released models do not have.
    """
    state = common.load_checkpoint(path, "msn")
    if "script" in state:
        network = {name.removeprefix("network."): x for name, x in state["model"].items()}
        weights = {"prototypes": network.pop("prototypes"), "network": network}
        weights["fields"] = {name: state["config"][name] for name in MODEL}
        return {**weights, "target": state["target"]}
    target = state.get("target_encoder") or state.get("encoder") or state
    if "pos_embed" not in target or "cls_token" not in target:
        common.refuse(path, "MSN: expected target_encoder or a ViT", state)
    fields = common.vit_fields(target, path, heads)
    if "fc.fc3.weight" in target:
        fields["embedding"], fields["head_hidden"] = target["fc.fc3.weight"].shape
    if "prototypes" in state:
        fields["prototypes"] = len(state["prototypes"])
    network = state.get("encoder") or target
    weights = {"network": in_network(network), "target": in_network(target), "fields": fields}
    return {**weights, "prototypes": state.get("prototypes")}


def in_network(state):
    """Return a flat state dict under the names of Network: the head is fc.*, the rest encoder.*."""
    return {n if n.startswith("fc.") else f"encoder.{n}": value for n, value in state.items()}


def load_weights(model, target, weights, path):
    """Put what `read_weights` found into (model, target). A head that it lacks stays fresh."""
    for name, module in (("network", model.network), ("target", target)):
        fresh = module.fc.state_dict(prefix="fc.")
        common.load_state(module, {**fresh, **weights[name]}, f"{path}, {name}")
    if weights["prototypes"] is not None:
        model.prototypes.data.copy_(weights["prototypes"])


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

# The ViT-S/16 file's configuration: Sinkhorn and lambda 1. The paper's best ViT-S/16 had no
# Sinkhorn and lambda 5. Of B/16, B/8, L/16 and L/7 only the drop ratios and epochs are known.
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
    "sinkhorn": 3,
    "weight": 1.0,
    "batch": 1024,
    "epochs": 600,
    "warmup": 15 / 600,
    "momentum": 0.996,
    "schedule_scale": 1.25,
    "workers": 12,
    "probe_augment": True,
    "probe_epochs": 100,
    "probe_batch": 16384,
    "probe_lrs": (0.1,),
}
SMALL = {"width": 384, "depth": 12, "heads": 6}
BASE = {"width": 768, "depth": 12, "heads": 12}
LARGE = {"width": 1024, "depth": 24, "heads": 16}
CIFAR10 = {
    "data": "cifar10",
    "image_size": 32,
    "focal_size": 16,
    "blur": 0.0,
    "workers": 1,
}

PRESETS = {
    "toy": {"steps": 1000, "probe_epochs": 15, "precision": "fp32", "workers": 1},
    # patches of 8 pixels: four times the images in the time, which counts for more than detail
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
        "prototypes": 256,
        "init_std": 0.05,
        "focal_views": 6,
        "batch": 512,
        "epochs": 250,
        "workers": 8,
    },
    "folder": {  # any images, ViT-S/16, one GPU
        **IMAGENET,
        **SMALL,
        "data": "folder",
        "focal_views": 6,
        "drop": 0.15,
        "sinkhorn": 0,
        "weight": 5.0,
        "batch": 256,
        "epochs": 100,
        "warmup": 0.1,
        "probe_epochs": 30,
        "probe_batch": 1024,
        "probe_lrs": (0.1, 0.3, 1.0),
    },
    "vit_s16_in1k": {**IMAGENET, **SMALL, "drop": 0.15, "epochs": 800, "warmup": 15 / 800},
    "vit_b16_in1k": {**IMAGENET, **BASE},
    "vit_b8_in1k": {**IMAGENET, **BASE, "patch": 8},
    # The authors' published configuration: 400 epochs. The paper and the released file say 300, so
    # that file is probably three quarters through this schedule.
    "vit_b4_in1k": {
        **IMAGENET,
        **BASE,
        "patch": 4,
        "drop": 0.7,
        "batch": 1152,
        "epochs": 400,
        "warmup": 15 / 400,
    },
    # the drop ratio is the paper's best for L/16: below it the loss was NaN
    "vit_l16_in1k": {**IMAGENET, **LARGE, "drop": 0.5},
    "vit_l7_in1k": {
        **IMAGENET,
        **LARGE,
        "patch": 7,
        "drop": 0.7,
        "epochs": 200,
        "warmup": 15 / 200,
    },
}
DATA_PRESETS = {
    "toy": "toy",
    "letters": "toy",
    "textures": "toy",
    "cifar10": "cifar10",
    "imagenet": "vit_s16_in1k",
    "*": "folder",
}


def check(config, world):
    """Refuse what would fail late or silently (exit 2)."""
    common.check(config, world, ("knn", "linear", "lowshot", "features"))
    c = config
    if c.focal_size < c.patch:
        fail(f"--focal-size {c.focal_size} is below --patch {c.patch}")
    if kept_patches((c.image_size // c.patch) ** 2, c.drop) < 1:
        fail(f"--drop {c.drop:g} leaves no patch of the anchor: it must be less than 1")
    if c.schedule_scale < 1:
        fail(f"--schedule-scale {c.schedule_scale} is below 1: schedules would end before the run")


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
    lowshot = val and "lowshot" in wanted
    subsets = labelled_subsets(train_split, config.label_list) if lowshot else {}
    model, target = build(config)
    if config.init:
        load_weights(model, target, weights, config.init)
    if config.train:
        run = train(model, target, train_split, config, world)
        # what is evaluated is what was saved, in networks that are neither wrapped nor sharded
        weights = read_weights(run.out / "last.pt")
        model, target = build(config)
        load_weights(model, target, weights, run.out / "last.pt")
    else:
        run = common.Run(config, world)
    model.to(world.device).eval()
    target.to(world.device).eval()
    if config.train:
        report(model, target, unseen, config, world, run)
    if "features" in wanted:
        read = functools.partial(encode, target.encoder)
        common.write_features(read, unseen, config, world, run)
    if val:
        evaluate(target.encoder, train_split, val, subsets, config, world, run)


if __name__ == "__main__":
    main()
