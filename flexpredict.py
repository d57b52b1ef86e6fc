# SPDX-License-Identifier: MIT
"""FlexPredict: masked image modelling with stochastic positions (later renamed StoP).

"Stochastic Positional Embeddings Improve Masked Image Modeling", Bar, Bordes, Shocher, Assran,
Vincent, Ballas, Darrell, Globerson, LeCun, ICML 2024, arXiv 2308.00566. Version 1: FlexPredict.

The idea. I-JEPA asks its predictor what is at an exact place. The context rarely tells that: it
shows that a dog's ear comes next, not in which of three patches. So the network overfits to places.
FlexPredict asks about an uncertain place: the position of a masked token is a Gaussian. Its mean is
the sine-cosine embedding psi, its covariance sigma^2 W W^T is learned. A free W would shrink to 0,
since exact positions are easier. So W is tied: the same W brings the context tokens s into the
predictor. Without noise there would be no context. All else is I-JEPA's, see ijepa.py.

    context token   c_i = W s_i + b + psi_i
    masked token    m_j = W n_j + b + psi_j      n_j = sigma * eps, eps ~ N(0, I), anew each step

    image [B, 3, S, S] -> patches [B, N, 3*p*p]
      |-- context patches -- encoder --> s [B, K, D] -.  + masked tokens m, noise n [M, B, Kp, D]
      |                        : EMA                  '-> predictor -> predictions [M*B, Kp, D] --.
      |                        v                                                                loss
      '-- all patches -- target encoder --> [B, N, D] -> M target blocks, normed [M*B, Kp, D] ---'

    python flexpredict.py                                   # toy images; --mode ijepa: exact places
    python flexpredict.py --data scenes                     # shapes; labels through a video
    torchrun --nproc-per-node 8 flexpredict.py --data imagenet      # the released ViT-B/16
    python flexpredict.py --init vit-b16.pth.tar --no-train --eval video --davis DAVIS

Departures. `--mode stop` is the released code: its masked tokens have the bias b, not a mask token.
The paper adds a mask token and no bias: `stop_paper`. The paper's equation 4 reads sigma W W^T; in
the code sigma is a standard deviation. Departures from the code are those of ijepa.py. The linear
probe sees central crops, encoded once. The low-shot probe uses the usual central crop and leaves
out a rotation that changes nothing. The blur is a Gaussian, not PIL's approximation of one.
"""

import copy
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
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
    data: str = "toy"  # toy, letters, scenes, textures, cifar10, imagenet, or a folder of images

    # model
    image_size: int = 48  # side of the image, pixels
    patch: int = 8  # side of a patch, pixels
    width: int = 64  # encoder width
    depth: int = 4  # encoder blocks
    heads: int = 4  # attention heads of encoder and predictor
    predictor_width: int = 32  # predictor width
    predictor_depth: int = 4  # predictor blocks
    init_std: float = 0.06  # std of the initial weights; narrow networks want more than 0.02
    patch_std: float = 0.8  # std of the initial patch projection

    # stochastic positions
    mode: Literal["stop", "stop_paper", "ijepa"] = "stop"  # released code, paper, or exact places
    sigma: float = 0.25  # std of the noise; context tokens, which are normed, have about 1

    # masks
    released: bool = False  # masks as the released code: no block touches the last row or column
    targets: int = 4  # target blocks an image
    target_scale: tuple[float, float] = (0.15, 0.2)  # area of a target block, share of the image
    target_aspect: tuple[float, float] = (0.75, 1.5)  # height / width of a target block
    context_scale: tuple[float, float] = (0.85, 1.0)  # area of the context block, uncut
    min_context: int = 8  # context patches that must be left

    # augmentation
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop, share of the image
    flip: bool = False  # mirror half of the images
    grey: float = 0.0  # share of the images that turn grey
    blur: float = 0.0  # share of the images that are blurred

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
    freeze: float = 1.0  # share of the run after which learning rate and weight decay stay
    momentum: float = 0.98  # EMA momentum at the start, 1 at the end

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/flexpredict, runs/flexpredict-2, ...
    resume: bool = False  # continue from last.pt in the run's folder, or start if there is none
    init: str = ""  # weights to start from or to evaluate: ours, or an official .pth.tar
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between rows of log.jsonl
    device: Literal["", "cuda", "mps", "cpu"] = ""  # default the best there is
    precision: Literal["", "bf16", "fp16", "fp32"] = ""  # default bf16 where it is fast
    compile: bool = torch.cuda.is_available()  # torch.compile the networks
    shard: bool = False  # FSDP2 instead of DDP, for models that do not fit one GPU
    workers: int = 0  # loading processes a rank, 0 = load between the steps

    # evaluation
    eval: str = "knn,linear"  # comma-separated: knn, linear, lowshot (1 %), video, features
    tokens: bool = False  # --eval features also writes the patch tokens
    probe_epochs: int = 28  # passes of the linear probe
    label_list: str = ""  # names of the training images of lowshot; default 1 % of each class
    davis: str = ""  # folder of DAVIS-2017 for video; default moving shapes made on the fly


# --------------------------------------------------------------------------------------------------
# Masks: several target blocks, and one context block without them
# --------------------------------------------------------------------------------------------------


# Copied from ijepa.py
def block_size(u, grid, scale, aspect, longest):
    """Return (height, width) of a block in patches, from one uniform u in [0, 1).

    One u decides scale and aspect, as in the released code; the paper describes two draws.
    """
    area = int(grid * grid * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    height = round(math.sqrt(area * ratio))
    width = round(math.sqrt(area / ratio))
    return min(height, longest), min(width, longest)


# Copied from ijepa.py
def block_sizes(config, step):
    """Return the sizes of target and context blocks in this step, the same for all its images."""
    # seeded by the step alone, as in the released code: all its ranks agree
    u, v = torch.rand(2, generator=torch.Generator().manual_seed(step)).tolist()
    grid = config.image_size // config.patch
    longest = grid - 1 if config.released else grid
    target = block_size(u, grid, config.target_scale, config.target_aspect, longest)
    return target, block_size(v, grid, config.context_scale, (1.0, 1.0), longest)


# Copied from ijepa.py
def rectangles(top, left, size, grid):
    """Return bool [..., grid * grid], true inside rectangles at top, left [...] of size (h, w)."""
    line = torch.arange(grid)
    rows = (line >= top[..., None]) & (line < top[..., None] + size[0])
    columns = (line >= left[..., None]) & (line < left[..., None] + size[1])
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)


# Copied from ijepa.py
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
# Stochastic positions (section 3 of the paper)
# --------------------------------------------------------------------------------------------------


def stochastic_positions(positions, noise, weight):
    """The paper's one line, for any masked model: Gaussian positions of covariance sigma^2 W W^T.

    positions [..., P]: the means; noise [..., D]: sigma times standard normal.
    weight [P, D]: the W that also brings context tokens into the predictor. Nothing is detached:
    its gradient has a path through the noise and one through the context.
    """
    return positions + F.linear(noise, weight)


def draw_noise(config, number, length, device):
    """Return the noise n of micro-batch `number`: [M, B, length, D]; None for exact positions."""
    if config.mode == "ijepa":
        return None
    seed = common.generator(config.seed, "noise", number).initial_seed()
    random = torch.Generator(device).manual_seed(seed)
    shape = (config.targets, config.micro, length, config.width)
    return config.sigma * torch.randn(shape, generator=random, device=device)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """I-JEPA's narrow ViT, asked about stochastic positions."""

    def __init__(self, config):
        super().__init__()
        self.mode = config.mode
        width = config.predictor_width
        self.predictor_embed = nn.Linear(config.width, width)
        # `stop` never uses the mask token, but the released files hold it
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width), config.mode != "stop")
        grid = config.image_size // config.patch
        table = common.sincos_2d(width, grid, grid).float()[None]
        self.predictor_pos_embed = nn.Parameter(table, requires_grad=False)
        self.predictor_blocks = nn.ModuleList(
            Block(width, config.heads) for _ in range(config.predictor_depth)
        )
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, config.width)

    def masked_tokens(self, positions, noise):
        """Return m [M, B, Kp, P] at positions psi; noise [M, B, Kp, D], None: at the mean."""
        embed = self.predictor_embed
        m = positions + (embed.bias if self.mode == "stop" else self.mask_token)
        return m if noise is None else stochastic_positions(m, noise, embed.weight)

    def forward(self, tokens, context, targets, noise=None):
        """Predict the target patches: [M*B, Kp, D], target-major.

        tokens [B, K, D]: the encoded context; context [B, K], targets [M, B, Kp]: where they are.
        """
        positions = self.predictor_pos_embed[0]
        x = self.predictor_embed(tokens) + positions[context]  # [B, K, P]
        queries = self.masked_tokens(positions[targets], noise)  # [M, B, Kp, P]
        x = x.expand(len(targets), -1, -1, -1)  # [M, B, K, P]
        x = torch.cat([x, queries], dim=2).flatten(0, 1)
        for block in self.predictor_blocks[:-1]:
            x = block(x)  # [M*B, K+Kp, P]
        # only the queries are read, so the last block computes only them
        x = self.predictor_blocks[-1](x, queries=slice(context.shape[1], None))
        return self.predictor_proj(self.predictor_norm(x))


class FlexPredict(nn.Module):
    """Context encoder and predictor, trained by gradient. The target encoder is a ViT beside it."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.encoder = ViT(c.image_size, c.patch, c.width, c.depth, c.heads)
        self.predictor = Predictor(c)
        common.init_weights(self, c.init_std)
        nn.init.normal_(self.encoder.patch_embed.proj.weight, std=c.patch_std)

    def forward(self, patches, context, targets, noise=None):
        """patches [B, N, 3*p*p], masks, noise of `draw_noise` -> predictions [M*B, Kp, D]."""
        return self.predictor(self.encoder(patches, keep=context), context, targets, noise)


def build(config):
    """Return a fresh (model, target encoder), which starts as a copy of the context encoder."""
    torch.manual_seed(config.seed)
    model = FlexPredict(config)
    return model, copy.deepcopy(model.encoder).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


# Copied from ijepa.py
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
    random = common.generator(config.seed, "images", number)
    indices = common.micro_batch_indices(number, config.micro, len(split), config.seed)

    def box(i, width, height):
        return [common.random_crop(width, height, config.crop_scale, random)]

    _, pixels, bad = split.read_batch(indices, box, [config.image_size])
    if config.flip or config.grey or config.blur:
        augment(pixels, config, random)
    context, targets = sample_masks(config, number)
    return pixels, context, targets, bad


def augment(pixels, config, random):
    """Mirror, turn grey and blur some of the images, in place: uint8 [B, 3, S, S]. As released."""
    draws = torch.rand(len(pixels), 4, generator=random)
    for i, (flip, grey, blur, radius) in enumerate(draws.tolist()):
        image = Image.fromarray(pixels[i].permute(1, 2, 0).numpy())
        if config.flip and flip < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if grey < config.grey:
            image = image.convert("L").convert("RGB")
        if blur < config.blur:
            image = image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * radius))
        pixels[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)


def toy_scenes(count, size, frames=1, noise=40.0):
    """Draw a lighter and a darker disc of a faint texture, which drift before another texture.

    size: side, pixels; noise: std in each pixel, of 255. Returns pixels and labels, both uint8
    [count, T, S, S]: label i is the i-th disc, 0 the background.
    """
    random = np.random.default_rng(count)
    labels = np.zeros((count, frames, size, size), np.uint8)
    pixels = random.normal(128, noise, labels.shape)
    # all lengths are shares of the side
    start = random.uniform(0, 2 * np.pi, (2, 3, count))  # [(y, x), layers, count]
    speed = random.uniform(0.1, 0.2, start.shape)
    waves = random.normal(0, 22, start.shape)  # radians a side
    grid = (np.indices((size, size)) + 0.5)[:, None] / size  # [(y, x), 1, S, S]
    for t in range(frames):
        centre = 0.5 + 0.3 * np.sin(start + t * speed)
        grey = np.zeros((count, size, size))
        for i, lighter in enumerate((0, 40, -40)):
            offset = grid - centre[:, i, :, None, None]  # [(y, x), count, S, S]
            inside = np.hypot(*offset) < (0.18 if i else np.inf)
            texture = 12 * np.sin((waves[:, i, :, None, None] * offset).sum(0))
            grey[inside] = lighter + texture[inside]
            labels[:, t][inside] = i
        pixels[:, t] += grey
    return pixels.clip(0, 255).astype(np.uint8), labels


def scenes(name):
    """Quarters of toy scenes under strong noise, 24 x 24, all of one class."""
    count = 2000 if name == "train" else 500
    pixels, _ = toy_scenes(count, 48, noise=60.0)
    quarters = pixels.reshape(count, 2, 24, 2, 24).swapaxes(2, 3)
    labels = [0] * (4 * count)
    return common.in_memory(quarters.reshape(-1, 24, 24), labels, ["scene"], name)


common.TOYS["scenes"] = scenes  # so that --data scenes is found

# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def schedules(config, step, steps):
    """Return (lr, weight decay, EMA momentum) of step 0, 1, ...

    The released code advances the first two before the step, so they are those of step + 1.
    """
    warmup = round(config.warmup * steps)
    now = min(step + 1, round(config.freeze * steps))
    lr = common.cosine_schedule(now, steps, config.lr, config.lr_final, warmup, config.lr_start)
    decay = common.cosine_schedule(now, steps, config.weight_decay, config.weight_decay_final)
    return lr, decay, common.linear_schedule(step, steps, config.momentum, 1.0)


# Copied from ijepa.py
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
    for step in run:
        lr, decay, momentum = schedules(config, step, run.steps)
        common.set_rates(optimizer, lr, decay)
        mine = common.micro_batches(config, world, step, step + 1)
        for number in mine:
            pixels, context, targets = run.next(loader, split)
            patches = common.patchify(common.normalize(pixels), config.patch)
            noise = draw_noise(config, number, targets.shape[-1], world.device)
            run.sync_gradients(number == mine[-1])
            with world.autocast():
                with torch.no_grad():
                    tokens = target(patches)
                loss = jepa_loss(network(patches, context, targets, noise), tokens, targets)
            run.backward(loss / len(mine))
        applied = run.update()
        ema.update(momentum, applied)
        # std of a coordinate of a position (figure 4): 0 if the noise was trained away
        norm = model.predictor.predictor_embed.weight.detach().norm()
        noise_std = config.sigma * norm / math.sqrt(config.predictor_width)
        run.log(functools.partial(common.spread, tokens), lr=lr, position_noise=noise_std)
    return run


# --------------------------------------------------------------------------------------------------
# Evaluate: frozen features
# --------------------------------------------------------------------------------------------------


# Copied from ijepa.py
def encode(encoder, images):
    """Return features of images [B, 3, S, S]: patch tokens pooled after the last four blocks.

    [B, 4, D], the last block last. The last alone and all four are the paper's two readouts.
    """
    return torch.stack([tokens.mean(1) for tokens in encoder(images, layers=4)], dim=1)


def logistic_regression(x, labels, classes, ridge=0.0025):
    """Return the weights [C, D] that minimise mean cross entropy + ridge / (2 n) |W|^2 on x [n, D].

    Strongly convex, so any solver finds the same: here LBFGS to convergence.
    """
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=1000, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T, labels)
        loss = loss + ridge / (2 * len(x)) * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach()


def standardise(x):
    """Bring each feature of x [N, D] to mean 0 and std 1 over these N; a constant one to 0."""
    std, mean = torch.std_mean(x, dim=0)
    return (x - mean) / std.where(std > 0, torch.inf)


# Copied from ijepa.py
def one_percent(split):
    """Return a seeded 1 % of each class, at least one image."""
    rows = []
    for label in range(len(split.classes)):
        members = (split.labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=common.generator("1 %", label))
        rows += members[order[: max(1, round(0.01 * len(members)))]].tolist()
    return split.subset(rows)


def classify(config, classes, train, val, few=None):
    """Return {evaluation: top-1 in percent}; train, val, 1 %: (features [N, 4, D], labels)."""
    bank, labels, _ = train
    test, test_labels, _ = val
    result = {}
    if "knn" in config.eval:
        votes = common.knn(bank[:, -1], labels, test[:, -1])
        result["knn"] = common.top1(votes, test_labels)
    if "linear" in config.eval:
        # the paper's recipe for ViT-B (VISSL), on the better of its two readouts: four blocks
        torch.manual_seed(config.seed)
        width = bank[0].numel()
        heads = {}
        for lr in (0.01, 0.1):
            head = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes))
            heads[lr] = (head.to(bank.device), lr, 5e-4)
        batches = common.shuffled_batches(bank.flatten(1), labels, 256, config.seed)
        sgd = functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)
        drops = [config.probe_epochs * share // 7 for share in (2, 4, 6)]
        views = (batches, test.flatten(1), test_labels)
        result["linear"], _ = common.linear_probe(*views, heads, config.probe_epochs, sgd, drops)
    if few:
        shots, labels, _ = few
        weight = logistic_regression(standardise(shots[:, -1]), labels, classes)
        # the released code standardises the test images by their own statistics
        scores = standardise(test[:, -1]) @ weight.T
        result["lowshot"] = common.top1(scores, test_labels)
    return result


def evaluate(encoder, splits, config, world, run):
    """Run --eval on the encoder, and beside it on a random encoder.

    splits: train, val and, for lowshot, 1 % of train; none if nothing is classified.
    """
    results = {}
    networks = {"trained": encoder, "random": build(config)[1].to(world.device)}
    for name, network in networks.items():
        read = functools.partial(encode, network.eval())
        found = [common.extract(read, split, config, world) for split in splits]
        results[name] = {}
        if world.rank == 0 and splits:
            results[name].update(classify(config, len(splits[0].classes), *found))
        if world.rank == 0 and "video" in config.eval:
            results[name].update(evaluate_video(network, config, world))
    run.report(results)


# Copied from ijepa.py
def describe(encoder, images, all_tokens):
    """Return what features.npz holds of images: [B, 1, D] pooled, and then perhaps all tokens."""
    tokens = encoder(images)
    pooled = tokens.mean(1, keepdim=True)
    return torch.cat([pooled, tokens], dim=1) if all_tokens else pooled


# --------------------------------------------------------------------------------------------------
# Evaluate: the first frame's labels through a video (DAVIS-2017, DINO's protocol)
# --------------------------------------------------------------------------------------------------


def propagate_labels(features, first, last=7, radius=12, topk=5, temperature=0.1):
    """Carry the labels of the first frame through a video by similarity of patches.

    features [T, h, w, D]; first [C, h, w]: one-hot labels of frame 0. A patch asks its neighbours
    within `radius` patches, in frame 0 and in the `last` frames that were labelled. The topk most
    similar of all vote. Returns soft labels [T-1, C, h, w] of the other frames.
    """
    frames, h, w, _ = features.shape
    features = F.normalize(features.flatten(1, 2), dim=-1)  # [T, N, D]
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(features.device)  # [N, 2]
    near = (places[:, None] - places).abs().amax(2) <= radius  # [N, N]
    labels = [first.flatten(1).to(features)]
    for t in range(1, frames):
        sources = [0, *range(max(1, t - last), t)]
        weight = (features[sources] @ features[t].T / temperature).exp() * near
        weight = weight.flatten(0, 1)  # [sources * N, N]
        weight = weight * (weight >= weight.topk(topk, dim=0).values[-1])
        votes = torch.cat([labels[source] for source in sources], dim=1)
        labels.append(votes @ (weight / weight.sum(0)))
    return torch.stack(labels[1:]).unflatten(-1, (h, w))


def label_maps(soft, patch, size):
    """Turn soft labels [T, C, h, w] into labels uint8 [T, H, W] of this size.

    As released: upsample, stretch each channel to 0..1, take the largest.
    """
    soft = F.interpolate(soft, scale_factor=patch, mode="bilinear")
    low = soft.amin((2, 3), keepdim=True)
    high = soft.amax((2, 3), keepdim=True)
    stretched = (soft - low) / (high - low).where(high > low, 1.0)
    labels = stretched.argmax(1, keepdim=True)
    return F.interpolate(labels.float(), size=size, mode="nearest")[:, 0].byte()


def boundary(mask):
    """Return where bool [n, H, W] differ from their right, lower or diagonal neighbour."""
    mask = F.pad(mask[:, None].float(), (0, 1, 0, 1), "replicate")
    mean = F.avg_pool2d(mask, 2, stride=1)[:, 0]  # of a pixel and these neighbours
    return (mean > 0) & (mean < 1)


def region_and_contour(predicted, true):
    """Return DAVIS' J (intersection over union) and F (agreement of contours), float64 [n, 2].

    predicted, true: bool [n, H, W]. Contours agree within 0.8 % of the diagonal.
    """
    radius = math.ceil(0.008 * math.hypot(*true.shape[1:]))
    line = torch.arange(-radius, radius + 1, device=true.device)
    disk = (line**2 + line[:, None] ** 2 <= radius**2).float()[None, None]

    def count(masks):
        return masks.sum((1, 2)).cpu().double()

    def grow(edge):
        return F.conv2d(edge[:, None].float(), disk, padding=radius)[:, 0] > 0.5

    j = (count(predicted & true) / count(predicted | true)).nan_to_num(1.0)  # both empty: 1
    found = boundary(predicted)
    wanted = boundary(true)
    precision = count(found & grow(wanted)) / count(found)
    recall = count(wanted & grow(found)) / count(wanted)
    f = (2 * precision * recall / (precision + recall)).nan_to_num(0.0)  # one of them empty: 0
    return torch.stack([j, f.where(count(found | wanted) > 0, 1.0)], dim=1)


def sequence_statistics(values):
    """Return (mean, recall, decay) of J and F of an object over frames: [n, 2] -> [3, 2]."""
    # neighbouring quarters share a frame, as in the official code
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first = values[: edges[1] + 1].mean(0)
    last = values[edges[3] :].mean(0)
    recall = (values > 0.5).double().mean(0)
    return torch.stack([values.mean(0), recall, first - last])


def segment_video(tokens, labels, patch):
    """Propagate labels through a video: mean, recall and decay of J and F, [objects, 3, 2].

    tokens [T, h, w, D]; labels uint8 [T, H, W], at whose size this is judged.
    """
    first = labels[:1, None].float()
    classes = int(first.max()) + 1
    first = F.interpolate(first, size=tokens.shape[1:3], mode="nearest")[0, 0]
    first = F.one_hot(first.long(), classes).permute(2, 0, 1)
    found = label_maps(propagate_labels(tokens, first), patch, labels.shape[1:])
    found = found[:-1]  # first and last frame are not scored
    true = labels[1:-1]
    scores = [region_and_contour(found == i, true == i) for i in range(1, classes)]
    return torch.stack([sequence_statistics(score) for score in scores])


def open_image(path):
    """Return a decoded PIL image; exit 2 if the file is missing or broken."""
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # whatever a broken file makes Pillow raise
        fail(f"{path} cannot be read: {error}")
    return image


def read_mask(path):
    """Read a DAVIS mask, uint8 [H, W]: 0 background, i the i-th object."""
    mask = open_image(path)
    if mask.mode not in ("P", "L", "1"):
        fail(f"{path} has colours ({mask.mode}): expected numbers of objects, as in DAVIS-2017")
    labels = torch.from_numpy(np.array(mask).astype(np.uint8))
    return labels.masked_fill(labels == 255, 0)  # the official code counts 255 as background


def davis_sequences(folder):
    """Return a list of (frame, mask) for each DAVIS-2017 val sequence; exit 2 if one is broken."""
    root = Path(folder).expanduser()
    listed = root / "ImageSets/2017/val.txt"
    if not listed.is_file():
        fail(f"no DAVIS-2017: expected {listed}, JPEGImages/480p and Annotations/480p beside it")
    sequences = []
    for name in listed.read_text().split():
        frames = sorted((root / "JPEGImages/480p" / name).glob("[!.]*.jpg"))
        masks = [root / "Annotations/480p" / name / f"{frame.stem}.png" for frame in frames]
        labels = [read_mask(mask) for mask in masks]  # exit 2 where one is missing
        if len(frames) < 3 or not labels[0].any():  # first and last are not scored
            fail(f"DAVIS sequence {name} needs three frames, the first with an object (not 255)")
        sequences.append(list(zip(frames, masks, strict=True)))
    return sequences


def read_video(sequence):
    """Read a DAVIS sequence: frames float [T, 3, h, w], normalised; labels uint8 [T, H, W].

    Frames are 480 high, a multiple of 64 wide, resized without antialiasing, as in DINO's code.
    """
    frames = [np.array(common.to_rgb(open_image(path))) for path, _ in sequence]
    frames = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
    height, width = frames.shape[2:]
    frames = F.interpolate(frames, (480, 480 * width // height // 64 * 64), mode="bilinear")
    std = common.STD.clone()
    std[0] = 0.228  # sic
    return (frames - common.MEAN) / std, torch.stack([read_mask(path) for _, path in sequence])


def toy_videos(image_size):
    """Return 20 videos of drifting discs, at twice the side of a training image, in noise."""
    pixels, labels = toy_scenes(20, 2 * image_size, 12)
    frames = common.normalize(torch.from_numpy(pixels)[:, :, None])  # [20, 12, 3, S, S]
    return zip(frames, torch.from_numpy(labels), strict=True)


@torch.no_grad()
def evaluate_video(encoder, config, world):
    """Return J&F, and mean, recall and decay of J and F in percent, on --davis or toy videos."""
    objects = []
    videos = toy_videos(config.image_size)
    if config.davis:
        videos = map(read_video, davis_sequences(config.davis))
    for frames, labels in videos:
        with world.autocast():
            parts = [encoder(part.to(world.device)) for part in frames.split(8)]
        grid = [side // config.patch for side in frames.shape[2:]]
        tokens = torch.cat(parts).float().unflatten(1, grid)
        objects.append(segment_video(tokens, labels.to(world.device), config.patch))
    means = 100 * torch.cat(objects).mean(0).flatten()
    names = ("J", "F", "J recall", "F recall", "J decay", "F decay")
    result = dict(zip(names, means.tolist(), strict=True))
    return {"J&F": (result["J"] + result["F"]) / 2, **result}


# --------------------------------------------------------------------------------------------------
# Picture
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def report(model, target, split, config, world, run):
    """After training: the loss on unseen images, whether content is used, and the picture.

    Its columns: an image, its context, a target block, and how similar (cosine) the target
    representation of each patch is to what the predictor expects in that block.
    """
    *item, _ = make_micro_batch(split, config, 0)
    pixels, context, targets = (part.to(world.device) for part in item)
    images = common.normalize(pixels)
    patches = common.patchify(images, config.patch)
    tokens = target(patches)
    predictions = model(patches, context, targets)  # without noise: at the mean positions
    others = model(patches.roll(1, 0), context, targets)  # from another image's context
    loss, other = (jepa_loss(p, tokens, targets).item() for p in (predictions, others))
    ratio = other / loss  # 1 if only position counts
    common.note(f"unseen images: loss {loss:.4f}, with another image's context {ratio:.2f} times")
    run.write(val_loss=loss, content_ratio=ratio)

    hidden = torch.zeros_like(tokens[:, :, 0])  # [B, N]
    expected = predictions[: len(images)].mean(1, keepdim=True)  # of the first block, [B, 1, D]
    similarity = F.cosine_similarity(expected, tokens, dim=2).clamp(min=0)
    seen = hidden.scatter(1, context, 1.0)
    block = hidden.scatter(1, targets[0], 1.0)
    masks = torch.stack([hidden + 1, seen, block, similarity], dim=1)
    grid = [config.image_size // config.patch] * 2
    masks = F.interpolate(masks.unflatten(2, grid), images.shape[2:])
    masks = masks[:, :, None]  # [B, 4, 1, S, S]
    tiles = images[:, None] * masks + 2.0 * (1 - masks)  # what is hidden is nearly white
    common.save_picture(run.out / "picture.png", tiles[:6])


# --------------------------------------------------------------------------------------------------
# Weights: ours and the authors', which have I-JEPA's layout
# --------------------------------------------------------------------------------------------------

MODEL = "image_size patch width depth heads predictor_width predictor_depth mode".split()


def read_weights(path, heads=0):
    """Read a checkpoint: state dicts `model` and `target`, and `fields` of Config.

    Ours, or the authors' with encoder, predictor and target_encoder.
    heads: for widths that the released models do not have.
    """
    state = common.load_checkpoint(path, "flexpredict")
    if "script" in state:
        fields = {name: state["config"][name] for name in MODEL}
        return {**state, "fields": fields}
    target = state.get("target_encoder", {})
    if "pos_embed" not in target or "predictor" not in state:
        common.refuse(path, "StoP: expected target_encoder and predictor", state)
    fields = common.vit_fields(target, path, heads)
    fields["predictor_width"] = len(state["predictor"]["predictor_embed.weight"])
    fields["predictor_depth"] = common.count_blocks(state["predictor"])
    model = {}
    for part in ("encoder", "predictor"):
        model.update({f"{part}.{name}": value for name, value in state[part].items()})
    return {"model": model, "target": target, "fields": fields}


def load_weights(model, target, weights, path):
    """Put what `read_weights` found into (model, target encoder)."""
    common.load_state(target, weights["target"], f"{path}, target encoder")
    common.load_state(model, weights["model"], path)


# --------------------------------------------------------------------------------------------------
# Presets and main
# --------------------------------------------------------------------------------------------------

FOLDER = {  # any images, ViT-S/16, one GPU
    "data": "folder",
    "image_size": 224,
    "patch": 16,
    "width": 384,
    "depth": 12,
    "heads": 6,
    "predictor_width": 192,
    "predictor_depth": 6,
    "init_std": 0.02,
    "patch_std": 0.02,
    "min_context": 24,
    "crop_scale": (0.3, 1.0),
    "flip": True,
    "grey": 0.2,
    "blur": 0.5,
    "batch": 256,
    "micro": 256,
    "epochs": 100,
    "lr": 8e-4,
    "lr_final": 1e-4,
    "weight_decay_final": 0.4,
    "momentum": 0.996,
    "workers": 12,
}
IMAGENET = {
    **FOLDER,
    "data": "imagenet",
    "predictor_width": 384,
    "predictor_depth": 12,
    "released": True,
    "min_context": 11,
    "batch": 2048,
    "micro": 64,
    "epochs": 600,
    "warmup": 0.025,
    "eval": "linear,lowshot",
}
CIFAR10 = {
    "data": "cifar10",
    "image_size": 32,
    "patch": 4,
    "min_context": 12,
    "crop_scale": (0.5, 1.0),
    "flip": True,
    "lr_start": 1e-4,
    "patch_std": 0.15,
    "workers": 1,
}
TOY = {"steps": 1000, "probe_epochs": 6, "precision": "fp32", "workers": 1}

PRESETS = {
    "toy": TOY,
    "toy-scenes": {
        **TOY,
        "steps": 2000,
        "data": "scenes",
        "image_size": 24,
        "patch": 4,
        "init_std": 0.02,
        "patch_std": 0.3,
        "lr": 2e-3,
        # what no prediction uses, such as noise, is forgotten only as fast as weights decay
        "weight_decay": 0.5,
        "weight_decay_final": 0.5,
        "eval": "video",
    },
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
    "folder": FOLDER,
    "vit_b16_in1k": {**IMAGENET, "width": 768, "heads": 12, "predictor_depth": 6},
    "vit_l16_in1k": {**IMAGENET, "width": 1024, "depth": 24, "heads": 16},
    "vit_h16_in1k": {
        **IMAGENET,
        "width": 1280,
        "depth": 32,
        "heads": 16,
        "sigma": 0.2,
        "epochs": 300,
        "warmup": 40 / 300,
        "lr": 1e-3,
        "lr_final": 1e-6,
        "freeze": 250 / 300,
    },
}
DATA_PRESETS = {
    "toy": "toy",
    "letters": "toy",
    "textures": "toy",
    "scenes": "toy-scenes",
    "cifar10": "cifar10",
    "imagenet": "vit_b16_in1k",
    "*": "folder",
}


def check(config, world):
    """Refuse what would fail late or silently (exit 2)."""
    common.check(config, world, ("knn", "linear", "lowshot", "video", "features"))
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
    if config.davis:
        davis_sequences(config.davis)  # refuses what cannot be scored
    labelled = sorted(wanted - {"features", "video", "none"})
    train_split, val, unseen = common.open_data(config.data, ", ".join(labelled))
    splits = [train_split, val] if val else []
    if val and "lowshot" in wanted:
        listed = config.label_list
        splits.append(train_split.listed(listed) if listed else one_percent(train_split))
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
    if val or "video" in wanted:
        evaluate(target, splits, config, world, run)


if __name__ == "__main__":
    main()
