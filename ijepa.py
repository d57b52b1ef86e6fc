# SPDX-License-Identifier: MIT
"""I-JEPA: predict the representations of image blocks from one context block.

"Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
Assran, Duval, Misra, Bojanowski, Vincent, Rabbat, LeCun, Ballas, CVPR 2023, arXiv 2301.08243.

The idea. Show an encoder one large block of an image, with holes. A narrow predictor says what a
second encoder, which saw the whole image, represents in each hole. It predicts representations,
not pixels: what cannot be known (the colour of a hidden leaf) can be left out, and what an image
shows has to be understood. The second encoder, the target, is a moving average of the first.
There are no augmented views, no negatives, no decoder. The slow target and the predictor between
the two keep all representations from becoming equal.

    image [B, 3, S, S] -> patches [B, N, 3*p*p]
      |-- context patches -- encoder --> [B, K, D] -.  + mask tokens at the places of a target block
      |                        : EMA                '-> predictor --> predictions [M*B, Kp, D] --.
      |                        v                                                                loss
      '-- all patches -- target encoder --> [B, N, D] -> M target blocks, normed [M*B, Kp, D] ---'

    python ijepa.py                                         # toy images, two minutes on a laptop
    python ijepa.py --data ~/photos                         # ViT-S/16 on any images, one GPU
    torchrun --nproc-per-node 8 ijepa.py --data imagenet    # the paper's ViT-H/14
    python ijepa.py --init model.safetensors --no-train --data imagenet   # evaluate

Departures. From the paper, with the released code: smooth L1 loss instead of L2, a cosine for
weight decay, one draw for scale and aspect of a block, block sizes shared by a step. From the code:
random draws depend on the seed and the micro-batch only, so the number of ranks changes nothing;
the data order runs on over epochs; where too little context is left, all blocks of that image are
drawn again. Small presets let blocks reach the border and cut contexts at random (see `released`).
"""

import collections
import copy
import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
from common import Block, ViT, fail, gather_tokens

# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag. The comment beside it is its help."""

    preset: str = ""  # a name of PRESETS, by default the one that fits --data
    data: str = "toy"  # toy, letters, textures, cifar10, imagenet, or a folder of images

    # model
    image_size: int = 48  # side of the image, pixels
    patch: int = 8  # side of a patch, pixels
    width: int = 64  # encoder width
    depth: int = 4  # encoder blocks
    heads: int = 4  # attention heads of encoder and predictor
    hidden: int = 0  # width of the encoder's MLPs, 0 = 4 * width
    predictor_width: int = 32  # predictor width
    predictor_depth: int = 4  # predictor blocks
    init_std: float = 0.06  # std of the initial weights; narrow networks want more than 0.02
    patch_std: float = 0.8  # std of the initial patch projection

    # masks
    released: bool = False  # masks as the released code: no block touches the last row or column
    targets: int = 4  # target blocks an image
    target_scale: tuple[float, float] = (0.15, 0.2)  # area of a target block, share of the image
    target_aspect: tuple[float, float] = (0.75, 1.5)  # height / width of a target block
    context_scale: tuple[float, float] = (0.85, 1.0)  # area of the context block, uncut
    min_context: int = 8  # context patches that must be left
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop, share of the image
    flip: bool = False  # mirror half of the images

    # optimisation
    train: bool = True  # train; --no-train only evaluates --init
    batch: int = 64  # images a step, over all ranks
    micro: int = 64  # images a forward pass; their contexts are cut to one length
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps, wins over --epochs
    warmup: float = 0.1  # share of the run in which the learning rate rises
    lr: float = 3e-3  # peak learning rate
    lr_start: float = 2e-4  # learning rate of the first step
    lr_final: float = 1e-6  # learning rate at the end
    weight_decay: float = 0.04  # weight decay at the start
    weight_decay_final: float = 0.04  # weight decay at the end
    momentum: float = 0.98  # EMA momentum at the start, 1 at the end

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/ijepa, runs/ijepa-2, ...
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
    eval: str = "knn,linear"  # comma-separated: knn, linear, lowshot (1 % of labels), features
    tokens: bool = False  # --eval features also writes the patch tokens
    lars: bool = False  # probe by LARS (ImageNet), else by SGD (the paper's transfer protocol)
    probe_augment: bool = False  # probe on random crops, each encoded anew
    probe_epochs: int = 28  # passes of the linear probe
    probe_batch: int = 256  # batch of the linear probe
    probe_lrs: tuple[float, ...] = (0.01, 0.1)  # learning rates tried, at batch 256
    label_list: str = ""  # names of the training images of lowshot; default 1 % of each class


# --------------------------------------------------------------------------------------------------
# Masks: several target blocks, and one context block without them (section 3 of the paper)
# --------------------------------------------------------------------------------------------------


def block_size(u, grid, scale, aspect, longest):
    """Return (height, width) of a block in patches, from one uniform u in [0, 1).

    One u decides scale and aspect, as in the released code; the paper describes two draws.
    """
    area = int(grid * grid * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    height = round(math.sqrt(area * ratio))
    width = round(math.sqrt(area / ratio))
    return min(height, longest), min(width, longest)


def block_sizes(config, step):
    """Return the sizes of target and context blocks in this step, the same for all its images."""
    # seeded by the step alone, as in the released code: all its ranks agree
    u, v = torch.rand(2, generator=torch.Generator().manual_seed(step)).tolist()
    grid = config.image_size // config.patch
    longest = grid - 1 if config.released else grid
    target = block_size(u, grid, config.target_scale, config.target_aspect, longest)
    return target, block_size(v, grid, config.context_scale, (1.0, 1.0), longest)


def rectangles(top, left, size, grid):
    """Return bool [..., grid * grid], true inside rectangles at top, left [...] of size (h, w)."""
    line = torch.arange(grid)
    rows = (line >= top[..., None]) & (line < top[..., None] + size[0])
    columns = (line >= left[..., None]) & (line < left[..., None] + size[1])
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)


def sample_masks(config, number):
    """Draw the masks of a micro-batch: context int64 [B, K], target blocks int64 [M, B, Kp].

    Indices of patches, ascending. Contexts are cut to the shortest of the micro-batch: at random,
    or as the released code to the first patches in raster order, which favours the top.
    """
    c = config
    grid = c.image_size // c.patch
    target_size, context_size = block_sizes(c, number // (c.batch // c.micro))
    random = common.generator(c.seed, "masks", number)

    def draw(blocks, size):
        """Return random blocks, bool [B, blocks, N]."""
        corners = torch.rand(2, c.micro, blocks, generator=random, dtype=torch.float64)
        room = [grid - side + (not c.released) for side in size]  # released: not the last row
        top = (corners[0] * room[0]).long()
        left = (corners[1] * room[1]).long()
        return rectangles(top, left, size, grid)

    targets = draw(c.targets, target_size)
    context = draw(1, context_size)[:, 0] & ~targets.any(1)
    for _ in range(100):
        short = context.sum(1) < c.min_context  # [B]
        if not short.any():
            break
        targets = torch.where(short[:, None, None], draw(c.targets, target_size), targets)
        fresh = draw(1, context_size)[:, 0] & ~targets.any(1)
        context = torch.where(short[:, None], fresh, context)
    else:
        advice = "use fewer or smaller targets, smaller patches, or a lower --min-context"
        fail(f"targets leave fewer than {c.min_context} of {grid**2} patches as context: {advice}")
    if c.released:
        keys = torch.arange(grid**2) / grid**2
    else:
        keys = torch.rand(context.shape, generator=random)
    shortest = int(context.sum(1).min())
    # adding the mask pushes hidden patches behind all others
    kept = (keys + ~context).argsort(1)[:, :shortest].sort(1).values
    patches = targets.transpose(0, 1).nonzero()[:, 2]
    return kept, patches.view(c.targets, c.micro, -1)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """A narrow ViT that fills in each target block from the context, without the other targets."""

    def __init__(self, grid, width, predictor_width, depth, heads):
        super().__init__()
        self.predictor_embed = nn.Linear(width, predictor_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_width))
        table = common.sincos_2d(predictor_width, grid, grid).float()[None]
        self.predictor_pos_embed = nn.Parameter(table, requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(predictor_width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(predictor_width, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_width, width)

    def forward(self, tokens, context, targets):
        """Predict the target patches: [M*B, Kp, D], target-major.

        tokens [B, K, D]: the encoded context; context [B, K], targets [M, B, Kp]: where they are.
        """
        positions = self.predictor_pos_embed[0]
        x = self.predictor_embed(tokens) + positions[context]  # [B, K, P]
        queries = self.mask_token + positions[targets]  # [M, B, Kp, P]
        x = x.expand(len(targets), -1, -1, -1)  # [M, B, K, P]
        x = torch.cat([x, queries], dim=2).flatten(0, 1)  # [M*B, K+Kp, P]
        for block in self.predictor_blocks[:-1]:
            x = block(x)
        # only the queries are read, so the last block computes only them
        x = self.predictor_blocks[-1](x, queries=slice(context.shape[1], None))
        return self.predictor_proj(self.predictor_norm(x))


class IJEPA(nn.Module):
    """Context encoder and predictor, trained by gradient. The target encoder is a ViT beside it."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.encoder = ViT(c.image_size, c.patch, c.width, c.depth, c.heads, c.hidden)
        grid = c.image_size // c.patch
        self.predictor = Predictor(grid, c.width, c.predictor_width, c.predictor_depth, c.heads)
        common.init_weights(self, c.init_std)
        nn.init.normal_(self.encoder.patch_embed.proj.weight, std=c.patch_std)

    def forward(self, patches, context, targets):
        """patches [B, N, 3*p*p], masks of `sample_masks` -> predictions [M*B, Kp, D]."""
        return self.predictor(self.encoder(patches, keep=context), context, targets)


def build(config):
    """Return a fresh (model, target encoder). The target starts as a copy of the encoder."""
    torch.manual_seed(config.seed)
    model = IJEPA(config)
    return model, copy.deepcopy(model.encoder).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


def jepa_loss(predictions, tokens, targets):
    """Compare predictions [M*B, Kp, D] with the target encoder's tokens [B, N, D] at targets.

    Smooth L1 as in the released code; the paper's text says L2. Each wanted token is normed.
    """
    wanted = gather_tokens(tokens, targets)  # [M*B, Kp, D]
    wanted = F.layer_norm(wanted, wanted.shape[-1:])
    return F.smooth_l1_loss(predictions.to(wanted.dtype), wanted)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def make_micro_batch(split, config, number):
    """Make micro-batch `number` of a run: (pixels uint8 [B, 3, S, S], context, targets, bad files).

    All of it depends on the seed and the number only.
    """
    c = config
    random = common.generator(c.seed, "images", number)
    flips = torch.rand(c.micro, generator=random) < 0.5
    indices = common.micro_batch_indices(number, c.micro, len(split), c.seed)

    def box(i, width, height):
        return [common.random_crop(width, height, c.crop_scale, random)]

    _, pixels, bad = split.read_batch(indices, box, [c.image_size])
    if c.flip:
        pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
    context, targets = sample_masks(c, number)
    return pixels, context, targets, bad


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def schedules(config, step, steps):
    """Return (lr, weight decay, EMA momentum) of step 0, 1, ...

    The released code advances the first two before the step, so they are those of step + 1.
    """
    c = config
    warmup = round(c.warmup * steps)
    lr = common.cosine_schedule(step + 1, steps, c.lr, c.lr_final, warmup, c.lr_start)
    decay = common.cosine_schedule(step + 1, steps, c.weight_decay, c.weight_decay_final)
    return lr, decay, common.linear_schedule(step, steps, c.momentum, 1.0)


def make_optimizer(model):
    """Return AdamW, with torch's betas and eps, over encoder and predictor."""
    groups = common.parameter_groups(model.encoder, model.predictor)
    return torch.optim.AdamW(groups, fused=True)


def train(model, target, split, config, world):
    """Train (model, target encoder) on a Split. Returns the run; its last.pt holds the result."""
    # DDP hides the parts that `model` has
    network = common.distribute(model, world, config, dynamic=True)
    target = common.distribute(target, world, config)
    optimizer = make_optimizer(model)
    ema = common.EMA(target, model.encoder)
    run = common.Run(config, world, split, network, optimizer, target=target)
    loader = run.loader(functools.partial(make_micro_batch, split, config))
    parts = config.batch // config.micro // world.size
    for step in run:
        lr, decay, momentum = schedules(config, step, run.steps)
        common.set_rates(optimizer, lr, decay)
        for part in range(parts):
            pixels, context, targets = run.next(loader, split)
            patches = common.patchify(common.normalize(pixels), config.patch)
            run.sync_gradients(part == parts - 1)
            with world.autocast():
                with torch.no_grad():
                    tokens = target(patches)
                loss = jepa_loss(network(patches, context, targets), tokens, targets)
            run.backward(loss / parts)
        applied = run.update()
        ema.update(momentum, applied)
        measure = functools.partial(common.spread, tokens)
        run.log(measure, lr=lr, momentum=momentum, context=context.shape[1])
    return run


# --------------------------------------------------------------------------------------------------
# Evaluate
# --------------------------------------------------------------------------------------------------


def encode(encoder, images):
    """Return features of images [B, 3, S, S]: patch tokens pooled after the last four blocks.

    [B, 4, D], the last block last. The last alone and all four are the paper's two readouts.
    """
    return torch.stack([tokens.mean(1) for tokens in encoder(images, layers=4)], dim=1)


def encode_last(encoder, images):
    """Return the last block's features only: [B, 1, D]."""
    return encoder(images).mean(1, keepdim=True)


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


class Last(nn.Module):
    """Pick the last block's features: [B, 4, D] -> [B, D]."""

    def forward(self, x):
        """See the class."""
        return x[:, -1]


def probe(batches, val, labels, classes, config):
    """Return the paper's linear probe, top-1 in percent, and the best head's name.

    Heads: last block or last four, with and without BatchNorm, each rate, with and without decay.
    """
    layers, width = val.shape[1:]
    heads = {}
    torch.manual_seed(config.seed)
    for lr in config.probe_lrs:
        for decay in (5e-4, 0.0):
            for norm in (False, True):
                for size, pick in ((width, Last()), (layers * width, nn.Flatten())):
                    batch_norm = nn.BatchNorm1d(size, affine=False) if norm else nn.Identity()
                    head = nn.Sequential(pick, batch_norm, nn.Linear(size, classes))
                    name = f"lr {lr:g}, decay {decay:g}, norm {norm}, {size} features"
                    scaled = lr * config.probe_batch / 256
                    heads[name] = (head.to(val.device), scaled, decay)
    optimizer = LARS if config.lars else SGD
    epochs = config.probe_epochs
    drops = (0.3, 0.6, 0.9) if config.lars else (0.286, 0.571, 0.857)
    milestones = [round(share * epochs) for share in drops]
    return common.linear_probe(batches, val, labels, heads, epochs, optimizer, milestones)


SGD = functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)


def make_probe_crops(split, config, number):
    """Make a loader's item: (indices [B], random crops uint8 [B, 3, S, S], bad files).

    number: (epoch, indices).
    """
    epoch, indices = number
    random = common.generator(config.seed, "probe", epoch, indices[0])
    flips = torch.rand(len(indices), generator=random) < 0.5

    def box(i, width, height):
        return [common.random_crop(width, height, (0.08, 1.0), random)]

    found, pixels, bad = split.read_batch(indices, box, [config.image_size], Image.BICUBIC)
    return found, torch.where(flips[:, None, None, None], pixels.flip(3), pixels), bad


def augmented_batches(encoder, split, config, world):
    """Return batches(epoch) of random crops for `probe`, encoded anew by all ranks."""
    n = len(split)
    batch = min(config.probe_batch, n)
    share = math.ceil(batch / world.size)

    @torch.no_grad()
    def batches(epoch):
        order = common.epoch_order(n, config.seed, f"probe {epoch}")
        numbers = []  # a loader's item is a part of this rank's share of a batch
        for first in range(0, n - batch + 1, batch):
            places = range(first + world.rank * share, first + (world.rank + 1) * share)
            mine = [order[place % n] for place in places]
            numbers += [(epoch, mine[i : i + 64]) for i in range(0, share, 64)]
        make = functools.partial(make_probe_crops, split, config)
        rows = []
        for indices, pixels, bad in common.make_loader(make, numbers, config, world):
            split.count_bad(bad)
            with world.autocast():
                features = encode(encoder, common.normalize(pixels.to(world.device))).float()
            rows.append((features, split.labels[indices].to(world.device)))
            if sum(len(labels) for _, labels in rows) == share:
                features, labels = (torch.cat(part) for part in zip(*rows, strict=True))
                yield common.gather_over_ranks(features), common.gather_over_ranks(labels)
                rows = []

    return batches


def one_percent(split):
    """Return a seeded 1 % of each class, at least one image."""
    rows = []
    for label in range(len(split.classes)):
        members = (split.labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=common.generator("1 %", label))
        rows += members[order[: max(1, round(0.01 * len(members)))]].tolist()
    return split.subset(rows)


def evaluate(encoder, train, val, few, config, world, run):
    """Run --eval on the encoder, and beside it on a random encoder and, for kNN, on raw pixels."""
    wanted = config.eval.split(",")
    results = {}
    networks = {"trained": encoder, "random": build(config)[1].to(world.device)}
    for name, network in networks.items():
        network.eval()
        read = functools.partial(encode, network)
        test, labels, _ = common.extract(read, val, config, world)
        result = results[name] = {}
        if "knn" in wanted or ("linear" in wanted and not config.probe_augment):
            # the augmented probe encodes its own crops: then kNN alone reads the bank
            last = functools.partial(encode_last, network)
            readout = last if config.probe_augment else read
            bank, bank_labels, _ = common.extract(readout, train, config, world)
            batches = common.shuffled_batches(bank, bank_labels, config.probe_batch, config.seed)
        if "knn" in wanted and world.rank == 0:
            scores = common.knn(bank[:, -1], bank_labels, test[:, -1])
            result["knn"] = common.top1(scores, labels)
        if "linear" in wanted:
            if config.probe_augment:
                batches = augmented_batches(network, train, config, world)
            if world.rank == 0:
                result["linear"], head = probe(batches, test, labels, len(train.classes), config)
                common.note(f"{name}, linear: the best head has {head}")
            elif config.probe_augment:  # encode for rank 0
                for epoch in range(config.probe_epochs):
                    collections.deque(batches(epoch), maxlen=0)
        if "lowshot" in wanted:
            bank, bank_labels, _ = common.extract(read, few, config, world)
            if world.rank == 0:
                batches = common.shuffled_batches(bank, bank_labels, 256, config.seed)
                result["lowshot"], _ = probe(batches, test, labels, len(train.classes), config)
    if "knn" in wanted:
        bank, bank_labels, _ = common.extract(common.raw_pixels, train, config, world)
        test, labels, _ = common.extract(common.raw_pixels, val, config, world)
        if world.rank == 0:
            results["pixels"] = {"knn": common.top1(common.knn(bank, bank_labels, test), labels)}
    run.report(results)


def describe(encoder, images, all_tokens):
    """Return what features.npz holds of images: [B, 1, D] pooled, and then perhaps all tokens."""
    tokens = encoder(images)
    pooled = tokens.mean(1, keepdim=True)
    return torch.cat([pooled, tokens], dim=1) if all_tokens else pooled


@torch.no_grad()
def content_ratio(model, target, patches, context, targets):
    """Return (loss, how many times larger it is with another image's context).

    1 means that the predictor uses positions only.
    """
    tokens = target(patches)
    right = jepa_loss(model(patches, context, targets), tokens, targets)
    wrong = jepa_loss(model(patches.roll(1, 0), context, targets), tokens, targets)
    return right.item(), (wrong / right).item()


# --------------------------------------------------------------------------------------------------
# Picture
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_picture(path, model, images, context, targets, rows=6, nearest=5):
    """Show what the predictor expects of hidden blocks.

    Columns: an image; its context; its target blocks; then the five images of whose target blocks
    the predictor expects the most similar representations. It has seen only their contexts.
    """
    n = len(images)
    patch = model.encoder.patch
    side = images.shape[3] // patch
    predictions = model(common.patchify(images, patch), context, targets)
    expected = predictions.unflatten(0, (len(targets), n)).mean((0, 2))  # [n, D]
    expected = F.normalize(expected - expected.mean(0), dim=1)
    similarity = expected @ expected.T - 2 * torch.eye(n, device=images.device)  # not itself

    def show(kept, i):
        """Return image i in which only the patches `kept` are seen."""
        seen = torch.zeros(side * side, device=images.device)
        seen[kept.flatten()] = 1.0
        mask = F.interpolate(seen.view(1, 1, side, side), scale_factor=patch)[0]
        return images[i] * mask + 2.0 * (1 - mask)  # the rest is nearly white

    grid = []
    for i in range(min(rows, n)):
        found = similarity[i].topk(min(nearest, n)).indices.tolist()
        tiles = [images[i], show(context[i], i), show(targets[:, i], i)]
        grid.append(torch.stack(tiles + [images[j] for j in found]))
    common.save_picture(path, torch.stack(grid))
    common.note(f"{path}: image, context, targets, and images of which the same is predicted")


def report(model, target, split, config, world, run):
    """After training: the loss on unseen images, whether content is used, and the picture."""
    micro = min(256, len(split))
    config = replace(config, micro=micro, batch=micro, crop_scale=(1.0, 1.0), flip=False)
    pixels, context, targets, _ = make_micro_batch(split, config, 0)
    images = common.normalize(pixels.to(world.device))
    masks = context.to(world.device), targets.to(world.device)
    patches = common.patchify(images, config.patch)
    loss, ratio = content_ratio(model, target, patches, *masks)
    common.note(
        f"loss on unseen images {loss:.4f}; with another image's context {ratio:.2f} times that"
    )
    run.write(val_loss=loss, content_ratio=ratio)
    draw_picture(run.out / "picture.png", model, images, *masks)


# --------------------------------------------------------------------------------------------------
# Weights: ours, the authors', the Hub's
# --------------------------------------------------------------------------------------------------

MODEL = "image_size patch width depth heads hidden predictor_width predictor_depth".split()


def read_weights(path, heads=0):
    """Read a checkpoint: state dicts `encoder`, `target` and `predictor`, and `fields` of Config.

    Ours; the authors' with encoder, predictor and target_encoder; the Hub's or a bare encoder.
    heads: for widths that the released models do not have.
    """
    state = common.load_checkpoint(path, "ijepa")
    if "script" in state:
        weights = {"target": state["target"], "encoder": {}, "predictor": {}}
        for name, value in state["model"].items():
            part, name = name.split(".", 1)
            weights[part][name] = value
        weights["fields"] = {name: state["config"][name] for name in MODEL}
        return weights
    target = state.get("target_encoder") or state.get("encoder") or state
    if "pos_embed" not in target or "cls_token" in target:
        common.refuse(path, "I-JEPA: expected target_encoder or an encoder", state)
    fields = common.vit_fields(target, path, heads)
    fields["hidden"] = len(target["blocks.0.mlp.fc1.weight"])
    predictor = state.get("predictor", {})
    if predictor:
        fields["predictor_width"] = len(predictor["predictor_embed.weight"])
        fields["predictor_depth"] = common.count_blocks(predictor)
    encoder = state.get("encoder", target) if "target_encoder" in state else target
    return {"encoder": encoder, "target": target, "predictor": predictor, "fields": fields}


def load_weights(model, target, weights, path):
    """Put what `read_weights` found into (model, target encoder)."""
    common.load_state(target, weights["target"], f"{path}, target encoder")
    common.load_state(model.encoder, weights["encoder"], f"{path}, context encoder")
    if weights["predictor"]:
        common.load_state(model.predictor, weights["predictor"], f"{path}, predictor")


def load_encoder(path, image_size=0, encoder="target", heads=0):
    """Return a frozen ViT from any checkpoint: images [B, 3, S, S] -> tokens [B, N, D].

    image_size: pixels, 0 = as trained; encoder: "target" (the paper's choice) or "encoder".
    """
    weights = read_weights(path, heads)
    f = weights["fields"]
    size = image_size or f["image_size"]
    shape = [f[name] for name in ("patch", "width", "depth", "heads", "hidden")]
    vit = ViT(size, *shape)
    common.load_state(vit, weights[encoder], path)
    return vit.requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------------
# Presets and main
# --------------------------------------------------------------------------------------------------

IMAGENET = {
    "data": "imagenet",
    "image_size": 224,
    "patch": 16,
    "predictor_width": 384,
    "predictor_depth": 12,
    "init_std": 0.02,
    "patch_std": 0.02,
    "released": True,
    "min_context": 11,
    "crop_scale": (0.3, 1.0),
    "batch": 2048,
    "micro": 128,
    "epochs": 300,
    "warmup": 40 / 300,
    "lr": 1e-3,
    "weight_decay_final": 0.4,
    "momentum": 0.996,
    "log_every": 50,
    "workers": 12,
    "probe_augment": True,
    "probe_lrs": (0.01,),
}
# The released configurations have no B/16 and L/16: these follow the paper's text, 15 epochs of
# warm-up from 1e-4.
TEXT = {"epochs": 600, "warmup": 15 / 600, "lr_start": 1e-4}
BASE = {"width": 768, "depth": 12, "heads": 12, "predictor_depth": 6}
LARGE = {"width": 1024, "depth": 24, "heads": 16}
HUGE = {"patch": 14, "width": 1280, "depth": 32, "heads": 16}
GIANT = {"width": 1408, "depth": 40, "heads": 16, "hidden": 6144, "predictor_depth": 16}
PROBE = {"lars": True, "probe_lrs": (0.1, 0.01), "probe_epochs": 50, "probe_batch": 16384}
IN22K = {"data": "imagenet22k", "lr_start": 2e-4}
CIFAR10 = {
    "data": "cifar10",
    "image_size": 32,
    "patch": 4,
    "min_context": 12,
    "crop_scale": (0.5, 1.0),
    "flip": True,
    "lr_start": 1e-4,
    "patch_std": 0.15,
    "log_every": 50,
    "workers": 1,
}

PRESETS = {
    "toy": {"steps": 1000, "probe_epochs": 6, "precision": "fp32", "workers": 1},
    "cifar10-cpu": {
        **CIFAR10,
        "width": 128,
        "predictor_width": 64,
        "predictor_depth": 3,
        "steps": 3200,
        "lr": 1.5e-3,
        "weight_decay_final": 0.1,
    },
    "cifar10": {  # one GPU
        **CIFAR10,
        "width": 192,
        "depth": 12,
        "heads": 3,
        "predictor_width": 96,
        "predictor_depth": 6,
        "init_std": 0.05,
        "batch": 512,
        "micro": 512,
        "epochs": 250,
        "lr": 1e-3,
        "weight_decay_final": 0.2,
        "momentum": 0.996,
        "workers": 8,
    },
    "folder": {  # any images, ViT-S/16, one GPU
        **IMAGENET,
        "data": "folder",
        "width": 384,
        "heads": 6,
        "depth": 12,
        "predictor_width": 192,
        "predictor_depth": 6,
        "released": False,
        "min_context": 24,
        "flip": True,
        "batch": 256,
        "micro": 256,
        "epochs": 100,
        "warmup": 0.1,
        "lr_start": 1e-4,
        "weight_decay_final": 0.2,
    },
    "vit_b16_in1k": {**IMAGENET, **TEXT, **BASE},
    "vit_l16_in1k": {**IMAGENET, **TEXT, **LARGE},
    "vit_h14_in1k": {**IMAGENET, **HUGE, **PROBE},
    "vit_h16_448_in1k": {**IMAGENET, **HUGE, **PROBE, "image_size": 448, "patch": 16, "micro": 16},
    "vit_h14_in22k": {
        **IMAGENET,
        **HUGE,
        **PROBE,
        **IN22K,
        "epochs": 66,
        "warmup": 3 / 66,
        "micro": 32,
    },
    "vit_g16_in22k": {**IMAGENET, **GIANT, **IN22K, "epochs": 44, "warmup": 3 / 44, "micro": 16},
}
DATA_PRESETS = {"toy": "toy", "letters": "toy", "textures": "toy", "cifar10": "cifar10"}
DATA_PRESETS.update({"imagenet": "vit_h14_in1k", "imagenet22k": "vit_h14_in22k", "*": "folder"})


def check(config, world):
    """Refuse what would fail late or silently (exit 2)."""
    common.check(config, world, ("knn", "linear", "lowshot", "features"))
    if config.train:
        for number in range(4):
            sample_masks(config, number)  # ends where targets leave too little context


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
    labelled = ", ".join(sorted(wanted - {"features", "none"}))
    train_split, val, unseen = common.open_data(config.data, labelled)
    few = None
    if val and "lowshot" in wanted:
        few = (
            train_split.listed(config.label_list) if config.label_list else one_percent(train_split)
        )
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
    if config.train and world.rank == 0:
        report(model, target, unseen, config, world, run)
    if "features" in wanted:
        read = functools.partial(describe, target, all_tokens=config.tokens)
        common.write_features(read, unseen, config, world, run)
    if val:
        evaluate(target, train_split, val, few, config, world, run)


if __name__ == "__main__":
    main()
