# SPDX-License-Identifier: MIT
"""IWM: an image world model, which predicts in latent space what a transformation does to an image.

"Learning and Leveraging World Models in Visual Representation Learning", Garrido, Assran, Ballas,
Bardes, Najman, LeCun, 2024, arXiv 2403.00504. No code or weights were released.

The idea. I-JEPA's predictor fills in what is hidden, and is thrown away. Here it is also told how
the target was made from the source: by which change of brightness, contrast, saturation and hue.
If the change is hard enough and the predictor able enough, it becomes a world model: it applies
the change to the representation, and the encoder keeps what that needs (equivariance). If not, the
encoder learns to ignore the change (invariance). MRR tells which: the rank of the true transformed
latent among 256 others, by distance to the prediction. And the predictor is kept: tuned on a
frozen encoder, it does what tuning the encoder does.

    image -> crop and flip, shared by both views [B, 3, S, S]
      |-- jitter, grey, blur, solarize -> source -> visible patches -- encoder --> [B, K, D] --.
      |                                                : EMA       action a [B, 7] ------------+
      |                                                v           hidden places [B, M] -> predictor
      '-- jitter alone -> target -> all patches -- target encoder --> hidden [B, M, D] -- loss -'

    python iwm.py                                           # toy images, minutes on a laptop
    python iwm.py --preset toy-invariant                    # the other end of the spectrum
    torchrun --nproc-per-node 8 iwm.py --data imagenet      # the paper's equivariant ViT-B/16
    python iwm.py --init runs/iwm/last.pt --no-train --eval mrr,attentive,finetune,segment,multitask

Decided here, where the paper is silent. The jitter has a fixed order, so that the action determines
the target. Targets are normed, and the loss is a mean, so that I-JEPA's learning rate fits. Blur
and threshold of solarize, widths and ReLU of the conditioning network, all schedules. Hidden and
visible patches are cut to one number a micro-batch, at random. MRR uses squared distance and the
encoder that is trained, on the clean source. Segmentation is of mosaics of two images. The
attentive head is a transformer block with a learned query.
"""

import copy
import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
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
    width: int = 96  # encoder width
    depth: int = 4  # encoder blocks
    heads: int = 4  # attention heads of encoder and predictor
    predictor_width: int = 64  # predictor width
    predictor_depth: int = 4  # predictor blocks
    conditioning: Literal["feature", "sequence", "none"] = "feature"  # how the action is told
    init_std: float = 0.02  # std of the initial weights
    patch_std: float = 0.05  # std of the initial patch projection

    # views
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the crop that both views share
    flip: bool = False  # mirror half of the images, both views alike
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.4, 0.2)  # strength of colour jitter
    jitter_share: float = 0.8  # share of the views with colour jitter
    grey: float = 0.2  # share of the sources that turn grey
    blur: float = 0.2  # share of the sources that are blurred
    blur_sigma: tuple[float, float] = (0.1, 1.0)  # std of the blur, pixels
    solarize: float = 0.1  # share of the sources whose light half is inverted (text: 0.2)
    min_visible: int = 8  # visible patches that must be left

    # optimisation
    train: bool = True  # train; --no-train only evaluates --init
    batch: int = 96  # images a step, over all ranks
    micro: int = 96  # images a forward pass; their masks are cut to one length
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps, wins over --epochs
    warmup: float = 0.1  # share of the run in which the learning rate rises
    lr: float = 1e-3  # peak learning rate
    lr_start: float = 1e-4  # learning rate of the first step
    lr_final: float = 1e-6  # learning rate at the end
    weight_decay: float = 0.04  # weight decay at the start
    weight_decay_final: float = 0.04  # weight decay at the end
    momentum: float = 0.992  # EMA momentum at the start, 1 at the end

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/iwm, runs/iwm-2, ...
    resume: bool = False  # continue from last.pt in the run's folder, or start if there is none
    init: str = ""  # weights to start from or to evaluate: ours, of ijepa.py, or I-JEPA's authors'
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between rows of log.jsonl
    device: Literal["", "cuda", "mps", "cpu"] = ""  # default the best there is
    precision: Literal["", "bf16", "fp16", "fp32"] = ""  # default bf16 where it is fast
    compile: bool = torch.cuda.is_available()  # torch.compile the networks
    shard: bool = False  # FSDP2 instead of DDP, for models that do not fit one GPU
    workers: int = 0  # loading processes a rank, 0 = load between the steps

    # evaluation
    eval: str = "knn,linear,mrr"  # also attentive, finetune, segment, multitask, features
    tokens: bool = False  # --eval features also writes the patch tokens
    probe_epochs: int = 28  # passes of the linear probe
    mrr_images: int = 256  # images of mrr
    mrr_bank: int = 256  # transformations of each that are ranked
    tune_epochs: float = 20.0  # passes of attentive, finetune, segment and multitask
    tune_batch: int = 256  # batch of these, over all ranks
    tune_lr: float = 1e-3  # learning rate of heads and random predictors, ten times the others'


# --------------------------------------------------------------------------------------------------
# Views and actions: photometric operations on a batch at once, on the device, pixels in 0..1
# --------------------------------------------------------------------------------------------------

NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # the jitter that changes nothing
ACTION = 7  # numbers in an action


def luma(images):
    """Return the grey of images [B, 3, H, W] as [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def turn_hue(images, turns):
    """Turn the hue of RGB images [B, 3, H, W], by way of HSV: turns [B], 1 a whole circle."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    span = value - images.amin(1)
    scale = 1 / span.clamp(min=1e-12)
    # the circle has six colours: red is at 0, green at 2, blue at 4
    hue = torch.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale)
    hue = torch.where(value == red, (green - blue) * scale, hue)
    hue = (hue + 6 * turns[:, None, None]) % 6
    channels = []
    for colour in (0, 2, 4):
        distance = 3 - ((hue - colour).abs() - 3).abs()  # on the circle, 0 to 3
        channels.append(value - span * (distance - 1).clamp(0, 1))
    return torch.stack(channels, dim=1)


def jitter(images, theta):
    """Change brightness, contrast, saturation, hue, in this order: theta [B, 4], images in 0..1.

    The fixed order makes the action say all about the target; torchvision draws a random one.
    """
    brightness, contrast, saturation = theta[:, :3, None, None, None].unbind(1)
    images = (images * brightness).clamp(0, 1)
    mean = luma(images.mean((2, 3), keepdim=True))
    images = torch.lerp(mean, images, contrast).clamp(0, 1)
    images = torch.lerp(luma(images), images, saturation).clamp(0, 1)
    return turn_hue(images, theta[:, 3])


def blur(images, sigma, radius):
    """Blur images [B, 3, H, W], each by a Gaussian of its own std sigma [B]; borders reflected."""
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernels = (-0.5 * (offsets / sigma[:, None]) ** 2).softmax(1)  # [B, 2r+1]
    kernels = kernels.repeat_interleave(3, dim=0)[:, None, None]  # [3*B, 1, 1, 2r+1]
    x = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]
    x = F.conv2d(x, kernels, groups=len(kernels))
    x = F.conv2d(x, kernels.transpose(2, 3), groups=len(kernels))
    return x.view_as(images)


def solarize(images):
    """Invert what is light: 1 - v where v >= 0.5."""
    return torch.where(images >= 0.5, 1 - images, images)


def draw_views(count, config, random, always=False):
    """Draw the parameters of `count` pairs of views.

    Returns (jitter of the source [n, 4], of the target [n, 4], flags [n, 3] of what else is done to
    the source (grey, blur, solarize), rows [r] of the blurred, std of their blur [r]).
    always: jitter without its coin.
    """
    c = config
    neutral = torch.tensor(NEUTRAL)
    uniform = torch.rand(count, 14, generator=random)
    change = (2 * uniform[:, :8] - 1).view(-1, 2, 4)  # in -1..1
    theta = neutral + torch.tensor(c.jitter) * change
    applied = (uniform[:, 8:10, None] < c.jitter_share) | always
    source, target = theta.where(applied, neutral).unbind(1)
    shares = torch.tensor([c.grey, c.blur, c.solarize])
    flags = (uniform[:, 10:13] < shares).float()
    rows = flags[:, 1].nonzero()[:, 0]
    low, high = c.blur_sigma
    return source, target, flags, rows, low + (high - low) * uniform[rows, 13]


def make_action(source, target, flags):
    """Return what turns the source into the target: [target - source (4), flags (3)], [B, 7]."""
    return torch.cat([target - source, flags], dim=1)


def make_pair(images, views, config):
    """Make source and target, normalised [B, 3, S, S], and the action [B, 7], of images in 0..1."""
    source, target, flags, rows, sigma = views
    x = jitter(images, source)
    y = jitter(images, target)
    flags_of = flags[:, :, None, None, None] > 0  # [B, 3, 1, 1, 1]
    x = torch.where(flags_of[:, 0], luma(x), x)
    if len(rows):
        radius = min(math.ceil(3 * config.blur_sigma[1]), images.shape[-1] - 1)
        x = x.index_copy(0, rows, blur(x[rows], sigma, radius))
    x = torch.where(flags_of[:, 2], solarize(x), x)
    action = make_action(source, target, flags)
    return common.normalize(255 * x), common.normalize(255 * y), action


# --------------------------------------------------------------------------------------------------
# Masks: four blocks are hidden together and predicted, the source encoder sees the rest
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
def rectangles(top, left, size, grid):
    """Return bool [..., grid * grid], true inside rectangles at top, left [...] of size (h, w)."""
    line = torch.arange(grid)
    rows = (line >= top[..., None]) & (line < top[..., None] + size[0])
    columns = (line >= left[..., None]) & (line < left[..., None] + size[1])
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)


def hidden_patches(uniform, size, grid, border=1):
    """Return the union of blocks of this size, bool [B, N]: uniform [B, blocks, 2] draws corners.

    border 0: as I-JEPA's code, no block touches the last row or column.
    """
    corners = (uniform * (grid + border - torch.tensor(size))).long()
    return rectangles(corners[..., 0], corners[..., 1], size, grid).any(1)


def sample_masks(config, number):
    """Draw the masks of a micro-batch: visible int64 [B, K] and hidden [B, M] patches, ascending.

    K and M are the smallest counts of the micro-batch: random patches above them are left out.
    """
    c = config
    grid = c.image_size // c.patch
    # one block size a step, as in I-JEPA
    step = number // (c.batch // c.micro)
    u = torch.rand(1, generator=torch.Generator().manual_seed(step)).item()
    size = block_size(u, grid, (0.15, 0.2), (0.75, 1.5), grid)
    random = common.generator(c.seed, "masks", number)
    hidden = torch.ones(c.micro, grid**2, dtype=torch.bool)
    for _ in range(100):
        few = (~hidden).sum(1) < c.min_visible  # [B]
        if not few.any():
            break
        uniform = torch.rand(c.micro, 4, 2, generator=random, dtype=torch.float64)
        hidden = torch.where(few[:, None], hidden_patches(uniform, size, grid), hidden)
    else:
        fail(f"blocks leave fewer than --min-visible {c.min_visible} of {grid**2} patches visible")
    keys = torch.rand(hidden.shape, generator=random)
    masks = []
    for kind in (~hidden, hidden):
        # adding the mask pushes patches of the other kind behind all others
        order = (keys + ~kind).argsort(1)
        length = int(kind.sum(1).min())
        masks.append(order[:, :length].sort(1).values)
    return masks


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


class SequenceAction(nn.Module):
    """Each number of an action as a token a_k w_k + b_k, so that a transformer tells them apart."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(ACTION, width))
        self.bias = nn.Parameter(0.02 * torch.randn(ACTION, width))

    def forward(self, action):
        """[B, A] -> [B, A, P]."""
        return action[..., None] * self.weight + self.bias


class Predictor(nn.Module):
    """The world model: a ViT on [visible source tokens | mask tokens], told the action."""

    def __init__(self, grid, width, predictor_width, depth, heads, conditioning):
        super().__init__()
        p = predictor_width
        self.predictor_embed = nn.Linear(width, p)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, p))
        table = common.sincos_2d(p, grid, grid).float()[None]
        self.predictor_pos_embed = nn.Parameter(table, requires_grad=False)
        self.cond = self.seq_action = None
        if conditioning == "feature":
            layers = (nn.Linear(p, p), nn.ReLU(), nn.Linear(p, p))
            self.cond = nn.Sequential(nn.Linear(p + ACTION, p), nn.ReLU(), *layers)
        if conditioning == "sequence":
            self.seq_action = SequenceAction(p)
        self.predictor_blocks = nn.ModuleList(Block(p, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(p, eps=1e-6)
        self.predictor_proj = nn.Linear(p, width)

    def forward(self, tokens, visible, hidden, action, task=None):
        """Predict the target tokens at the hidden places: [B, M, D].

        tokens [B, K, D] at the places visible [B, K]; hidden [B, M]; action [B, 7];
        task [1, 1, P]: a token that says what the output is for.
        """
        positions = self.predictor_pos_embed[0]
        asked = hidden.shape[1]
        queries = self.mask_token + positions[hidden]  # [B, M, P]
        if self.cond is not None:
            told = action[:, None].expand(-1, asked, -1).to(queries.dtype)
            queries = self.cond(torch.cat([queries, told], dim=2))
        x = [self.predictor_embed(tokens) + positions[visible], queries]
        if self.seq_action is not None:
            x.append(self.seq_action(action))
        if task is not None:
            x.append(task.expand(len(tokens), -1, -1))
        x = torch.cat(x, dim=1)
        for block in self.predictor_blocks[:-1]:
            x = block(x)
        # context tokens are not read, so the last block does not compute them
        x = self.predictor_blocks[-1](x, queries=slice(visible.shape[1], None))
        return self.predictor_proj(self.predictor_norm(x[:, :asked]))

    def everywhere(self, tokens, action, task=None):
        """Predict all places from all places: tokens [B, N, D], action [B, 7] -> [B, N, D]."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return self(tokens, places, places, action, task)


class IWM(nn.Module):
    """Source encoder and predictor, trained by gradient. The target encoder is a ViT beside it."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.encoder = ViT(c.image_size, c.patch, c.width, c.depth, c.heads)
        sizes = (c.width, c.predictor_width, c.predictor_depth, c.heads)
        self.predictor = Predictor(c.image_size // c.patch, *sizes, c.conditioning)
        common.init_weights(self, c.init_std)
        nn.init.normal_(self.encoder.patch_embed.proj.weight, std=c.patch_std)

    def forward(self, patches, visible, hidden, action):
        """patches of the source [B, N, 3*p*p], masks, action [B, 7] -> predictions [B, M, D]."""
        return self.predictor(self.encoder(patches, keep=visible), visible, hidden, action)


def build(config):
    """Return a fresh (model, target encoder), which starts as a copy of the source encoder."""
    torch.manual_seed(config.seed)
    model = IWM(config)
    return model, copy.deepcopy(model.encoder).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


def norm(tokens):
    """Norm each token over its channels, without weights, as targets are."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def iwm_loss(predictions, tokens, hidden):
    """Return the squared error of predictions [B, M, D] against the normed tokens [B, N, D] there.

    The paper sums over patches and channels. Here it is the mean.
    """
    return F.mse_loss(predictions.float(), norm(gather_tokens(tokens, hidden)))


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def read_crops(split, config, number, count):
    """Read `count` images, the number-th lot: (indices, pixels uint8 [n, 3, S, S], bad files)."""
    c = config
    random = common.generator(c.seed, "images", number)
    flips = torch.rand(count, 1, 1, 1, generator=random) < 0.5
    indices = common.micro_batch_indices(number, count, len(split), c.seed)

    def box(i, width, height):
        return [common.random_crop(width, height, c.crop_scale, random)]

    found, pixels, bad = split.read_batch(indices, box, [c.image_size])
    return found, torch.where(flips & c.flip, pixels.flip(3), pixels), bad


def make_micro_batch(split, config, number):
    """Make micro-batch `number`: (pixels, what `draw_views` returns, visible, hidden, bad files).

    All of it depends on the seed and the number only.
    """
    count = config.micro
    _, pixels, bad = read_crops(split, config, number, count)
    views = draw_views(count, config, common.generator(config.seed, "views", number))
    return pixels, *views, *sample_masks(config, number), bad


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


# Copied from ijepa.py
def schedules(config, step, steps):
    """Return (lr, weight decay, EMA momentum) of step 0, 1, ...

    The released code advances the first two before the step, so they are those of step + 1.
    """
    c = config
    warmup = round(c.warmup * steps)
    lr = common.cosine_schedule(step + 1, steps, c.lr, c.lr_final, warmup, c.lr_start)
    decay = common.cosine_schedule(step + 1, steps, c.weight_decay, c.weight_decay_final)
    return lr, decay, common.linear_schedule(step, steps, c.momentum, 1.0)


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
    parts = config.batch // config.micro // world.size
    for step in run:
        lr, decay, momentum = schedules(config, step, run.steps)
        common.set_rates(optimizer, lr, decay)
        for part in range(parts):
            pixels, *views, visible, hidden = run.next(loader, split)
            x, y, action = make_pair(pixels / 255, views, config)
            patches = common.patchify(x, config.patch)
            run.sync_gradients(part == parts - 1)
            with world.autocast():
                with torch.no_grad():
                    tokens = target(common.patchify(y, config.patch))
                loss = iwm_loss(network(patches, visible, hidden, action), tokens, hidden)
            run.backward(loss / parts)
        applied = run.update()
        ema.update(momentum, applied)
        measure = functools.partial(common.spread, tokens)
        run.log(measure, lr=lr, momentum=momentum, hidden=hidden.shape[1])
    return run


# --------------------------------------------------------------------------------------------------
# Evaluate: is it a world model? Mean reciprocal rank (section 4 of the paper)
# --------------------------------------------------------------------------------------------------


def squared_distances(predictions, bank):
    """Sum over all tokens and channels: predictions [Q, N, D], bank [K, N, D] -> [Q, K]."""
    return torch.stack([(bank - p).square().sum((1, 2)) for p in predictions])


def ranks(distances, true):
    """Return 1 + how many of the bank are nearer than the true one: distances [Q, K], true [Q]."""
    return 1 + (distances < distances.gather(1, true[:, None])).sum(1)


@torch.no_grad()
def rank_transformations(model, target, image, config, random, asked=8):
    """Predict `asked` of the transformed versions of an image [3, S, S] in 0..1.

    Returns (the versions [K, 3, S, S], which were asked for [Q], squared distances [3, Q, K] of all
    versions to: the prediction told the right action, told another's, and the clean latent).
    """
    _, theta, *_ = draw_views(config.mrr_bank, config, random, always=True)
    true = torch.randperm(len(theta), generator=random)[:asked].to(image.device)
    theta = theta.to(image.device)
    versions = jitter(image.expand(len(theta), -1, -1, -1), theta)
    views = common.normalize(255 * versions)
    bank = norm(torch.cat([target(part) for part in views.split(64)]))
    clean = model.encoder(common.normalize(255 * image[None])).expand(asked, -1, -1)
    flags = torch.zeros(asked, 3, device=image.device)
    action = make_action(torch.tensor(NEUTRAL, device=image.device), theta[true], flags)
    guesses = [model.predictor.everywhere(clean, told) for told in (action, action.roll(1, 0))]
    distances = [squared_distances(norm(guess), bank) for guess in (*guesses, clean)]
    return versions, true, torch.stack(distances)


def evaluate_mrr(model, target, split, config, world):
    """Return mean reciprocal ranks in percent, and chance.

    mrr: told the right action; rolled: another's; none: no prediction, the clean latent.
    """
    random = common.generator(config.seed, "mrr")
    chosen = torch.randperm(len(split), generator=random)[: config.mrr_images].tolist()
    _, pixels, bad = common.centre_crops(split, config.image_size, chosen)
    split.count_bad(bad)
    reciprocal = []
    for image in pixels.to(world.device) / 255:
        with world.autocast():
            _, true, distances = rank_transformations(model, target, image, config, random)
        reciprocal.append([(1 / ranks(kind, true)).mean().item() for kind in distances])
    means = 100 * np.mean(reciprocal, axis=0)
    result = dict(zip(("mrr", "mrr rolled", "mrr none"), means.tolist(), strict=True))
    result["mrr chance"] = 100 * sum(1 / k for k in range(1, config.mrr_bank + 1)) / config.mrr_bank
    return result


# --------------------------------------------------------------------------------------------------
# Evaluate: the world model put to use (section 5 of the paper)
# --------------------------------------------------------------------------------------------------


class AttentiveHead(nn.Module):
    """One learned query looks at all tokens in a transformer block, then a Linear."""

    def __init__(self, width, heads, classes):
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.block = Block(width, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens):
        """tokens [B, N, D] -> scores [B, C]."""
        query = self.query.expand(len(tokens), -1, -1)
        x = self.block(torch.cat([query, tokens], dim=1), queries=slice(1))
        return self.linear(self.norm(x[:, 0]))


def mosaic(images, patch):
    """Put the left half of each image [B, 3, S, S] beside the right half of the one before."""
    half = images.shape[3] // patch // 2 * patch
    before = images.roll(1, 0)
    return torch.cat([images[..., :half], before[..., half:]], dim=3)


def left_half(grid, device):
    """Return which patches are in the left half, bool [N]."""
    return torch.arange(grid**2, device=device) % grid < grid // 2


class Tuned(nn.Module):
    """Encoder, predictor (or None), and a head for each task.

    Tasks: "class", and "segment": the class of each patch of a mosaic of two images. The predictor
    is asked for the whole image, not transformed: all places, and the null action. Where tasks
    share it, a token says which is meant.
    """

    def __init__(self, encoder, predictor, tasks, classes, config):
        super().__init__()
        width = config.width
        self.patch = config.patch
        self.encoder = encoder
        self.predictor = predictor
        self.heads = nn.ModuleDict()
        self.tokens = nn.ParameterDict()
        for task in tasks:
            dense = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes))
            attentive = AttentiveHead(width, config.heads, classes)
            self.heads[task] = dense if task == "segment" else attentive
            if len(tasks) > 1 and predictor is not None:
                self.tokens[task] = 0.02 * torch.randn(1, 1, config.predictor_width)
        common.init_weights(self.heads)

    def forward(self, images):
        """images [B, 3, S, S] -> {task: scores [B, C] or [B, N, C]}."""
        scores = {}
        for task, head in self.heads.items():
            x = self.encoder(mosaic(images, self.patch) if task == "segment" else images)
            if self.predictor is not None:
                token = self.tokens[task] if task in self.tokens else None
                x = self.predictor.everywhere(x, x.new_zeros(len(x), ACTION), token)
            scores[task] = head(x)
        return scores


def make_task_batch(split, config, count, number):
    """Make a loader's item: (pixels uint8 [n, 3, S, S], labels [n], bad files)."""
    found, pixels, bad = read_crops(split, config, number, count)
    return pixels, split.labels[found], bad


def tune(encoder, predictor, tasks, train, val, config, world, run, all_of_it=False, fresh=False):
    """Train heads, a copy of the predictor if there is one, and with all_of_it of the encoder.

    fresh: the predictor is random, and learns as fast as the heads: ten times as fast as what was
    pretrained. AdamW, weight decay 0.05, 5 % warm-up and a cosine, label smoothing 0.1.
    Returns {task: percent}, on rank 0.
    """
    torch.manual_seed(config.seed)
    encoder = copy.deepcopy(encoder).requires_grad_(all_of_it)
    encoder.pos_embed.requires_grad_(False)
    if predictor is not None:
        predictor = copy.deepcopy(predictor).requires_grad_(True)
        predictor.predictor_pos_embed.requires_grad_(False)
    model = Tuned(encoder, predictor, tasks, len(train.classes), config).to(world.device)
    parts = (encoder, nn.Identity() if predictor is None else predictor, model.heads, model.tokens)
    shares = (0.1, 1.0 if fresh else 0.1, 1.0, 1.0)
    groups = common.parameter_groups(*parts)  # the decayed of all four, then the undecayed
    for group, share in zip(groups, shares * 2, strict=True):
        group.update(share=share, weight_decay=0.05 * group["decay"])
    # the same scaler and guard as in training
    run.optimizer = torch.optim.AdamW(groups, fused=True)
    run.row["bad_steps"] = 0
    network = common.distribute(model, world)
    make = functools.partial(
        make_task_batch, train, config, max(1, config.tune_batch // world.size)
    )
    steps = max(1, int(config.tune_epochs * len(train) / config.tune_batch))
    numbers = range(world.rank, steps * world.size, world.size)
    loader = common.make_loader(make, numbers, config, world)
    left = left_half(config.image_size // config.patch, world.device)
    for step in range(steps):
        rate = common.cosine_schedule(step + 1, steps, config.tune_lr, 0.0, steps // 20)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        pixels, labels = run.next(loader, train)
        patches = torch.where(left, labels[:, None], labels.roll(1)[:, None])  # [B, N]
        wanted = {"class": labels, "segment": patches}
        with world.autocast():
            scores = network(common.normalize(pixels))
        losses = []
        for task, score in scores.items():
            score = score.float().flatten(0, -2)
            losses.append(F.cross_entropy(score, wanted[task].flatten(), label_smoothing=0.1))
        run.backward(sum(losses) / len(losses))
        run.update()
        done = step + 1
        # only now and then, since reading it waits for the device
        if (done % config.log_every == 0 or done == steps) and run.row["bad_steps"] >= 3:
            advice = "try a lower --tune-lr, or --precision fp32"
            fail(f"loss not finite for three steps of tuning before step {done}: {advice}", code=3)
    model.eval()
    result = {}
    for task in tasks:
        result[task] = judge(model, task, val, config, world)
        common.note(f"tuned for {steps} steps, {task}: {result[task]:.1f}")
    return result


def judge(model, task, val, config, world):
    """Return top-1, or for patches the mean over classes of IoU, in percent, on rank 0."""

    def predict(images):
        found = model(images)[task].argmax(-1)
        # the left half of a mosaic is the image itself
        return found[:, left] if task == "segment" else found

    left = left_half(config.image_size // config.patch, world.device)
    found, labels, _ = common.extract(predict, val, config, world)
    if world.rank:
        return 0.0
    if task == "class":
        return 100 * (found == labels).float().mean().item()
    classes = len(val.classes)
    pairs = labels[:, None] * classes + found.long()
    table = pairs.flatten().bincount(minlength=classes**2).view(classes, classes)
    both = table.diag()
    either = table.sum(0) + table.sum(1) - both
    return 100 * (both / either).nanmean().item()


# --------------------------------------------------------------------------------------------------
# Evaluate: all
# --------------------------------------------------------------------------------------------------


def probes(encoder, train, val, config, world):
    """Return {knn, linear: top-1 in percent} on pooled tokens, on rank 0."""

    def read(images):
        return encoder(images).mean(1)

    bank, labels, _ = common.extract(read, train, config, world)
    test, test_labels, _ = common.extract(read, val, config, world)
    if world.rank:
        return {}
    result = {"knn": common.top1(common.knn(bank, labels, test), test_labels)}
    torch.manual_seed(config.seed)
    heads = {}
    for lr in (0.01, 0.1):
        norm = nn.BatchNorm1d(config.width, affine=False)
        head = nn.Sequential(norm, nn.Linear(config.width, len(train.classes)))
        heads[lr] = (head.to(bank.device), lr, 0.0)
    batches = common.shuffled_batches(bank, labels, 256, config.seed)
    sgd = functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    drops = [config.probe_epochs * share // 7 for share in (2, 4, 6)]
    views = (batches, test, test_labels)
    result["linear"], _ = common.linear_probe(*views, heads, config.probe_epochs, sgd, drops)
    return result


def evaluate_one(model, target, train, val, config, world, run):
    """Return {evaluation: percent} of a model, on rank 0; val is None without labels."""
    wanted = set(config.eval.split(","))
    result = {}
    if "mrr" in wanted and world.rank == 0:
        result.update(evaluate_mrr(model, target, val or train, config, world))
    if val is None:
        return result
    if wanted & {"knn", "linear"}:
        result.update(probes(target, train, val, config, world))
    own = model.predictor
    fresh = build(replace(config, seed=config.seed + 1))[0].predictor
    tuned = functools.partial(
        tune, target, train=train, val=val, config=config, world=world, run=run
    )
    if "attentive" in wanted:
        result["attentive"] = tuned(None, ["class"])["class"]
    for task, name in (("class", "finetune"), ("segment", "segment")):
        if name in wanted:
            result[f"{task}: encoder"] = tuned(None, [task], all_of_it=True)[task]
            result[f"{task}: random predictor"] = tuned(fresh, [task], fresh=True)[task]
            result[f"{task}: predictor"] = tuned(own, [task])[task]
            result[f"{task}: both"] = tuned(own, [task], all_of_it=True)[task]
    if "multitask" in wanted:
        for task, value in tuned(own, ["class", "segment"]).items():
            result[f"{task}: with the other"] = value
    return result


def evaluate(model, target, train, val, config, world, run):
    """Run --eval on (model, target encoder), and beside it on a random one."""
    fresh = [network.to(world.device).eval() for network in build(config)]
    networks = {"trained": (model, target), "random": fresh}
    results = {}
    for name, pair in networks.items():
        results[name] = evaluate_one(*pair, train, val, config, world, run)
    run.report(results)


# Copied from ijepa.py
def describe(encoder, images, all_tokens):
    """Return what features.npz holds of images: [B, 1, D] pooled, and then perhaps all tokens."""
    tokens = encoder(images)
    pooled = tokens.mean(1, keepdim=True)
    return torch.cat([pooled, tokens], dim=1) if all_tokens else pooled


# --------------------------------------------------------------------------------------------------
# Picture
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def report(model, target, split, config, world, run):
    """After training: are action and content used on unseen images? And the picture.

    A row of it: an image, its true transformation, and twelve transformations, those nearest to the
    prediction first.
    """
    *item, _ = make_micro_batch(split, config, 0)
    pixels, *views, visible, hidden = (part.to(world.device) for part in item)
    images = pixels / 255
    x, y, action = make_pair(images, views, config)
    patches = common.patchify(x, config.patch)
    tokens = target(y)
    others = {
        "right": (patches, action),
        "action": (patches, action.roll(1, 0)),
        "content": (patches.roll(1, 0), action),
    }
    loss = {}
    for name, (seen, told) in others.items():
        loss[name] = iwm_loss(model(seen, visible, hidden, told), tokens, hidden).item()
    ratios = [loss["action"] / loss["right"], loss["content"] / loss["right"]]  # 1: not used
    common.note(
        "loss with another image's action or content, times that: {:.2f} {:.2f}".format(*ratios)
    )
    run.write(val_loss=loss["right"], action_ratio=ratios[0], content_ratio=ratios[1])
    rows = []
    for number, image in enumerate(images[:6]):
        random = common.generator(config.seed, "picture", number)
        small = replace(config, mrr_bank=12)
        versions, true, distances = rank_transformations(model, target, image, small, random, 1)
        row = [image[None], versions[true], versions[distances[0, 0].argsort()]]
        rows.append(common.normalize(255 * torch.cat(row)))
    common.save_picture(run.out / "picture.png", torch.stack(rows))


# --------------------------------------------------------------------------------------------------
# Weights: ours, and those of I-JEPA as a start without conditioning
# --------------------------------------------------------------------------------------------------

MODEL = "image_size patch width depth heads predictor_width predictor_depth conditioning".split()
TOLD = ("predictor.cond.", "predictor.seq_action.")  # what only a conditioned predictor has


def read_weights(path, heads=0):
    """Read a checkpoint: state dicts `model` and `target`, and `fields` of Config.

    Ours, that of ijepa.py, or one with encoder, predictor and target_encoder, as I-JEPA's authors'.
    heads: for widths that the released models do not have.
    """
    state = common.load_checkpoint(path, "iwm", "ijepa")
    if "script" in state:
        fields = {name: state["config"][name] for name in MODEL if name in state["config"]}
        return {"model": state["model"], "target": state["target"], "fields": fields}
    target = state.get("target_encoder", {})
    if "pos_embed" not in target or "predictor" not in state:
        common.refuse(path, "IWM or I-JEPA: expected target_encoder and predictor", state)
    fields = common.vit_fields(target, path, heads)
    fields["predictor_width"] = len(state["predictor"]["predictor_embed.weight"])
    fields["predictor_depth"] = common.count_blocks(state["predictor"])
    model = {}
    for part in ("encoder", "predictor"):
        model.update({f"{part}.{name}": value for name, value in state[part].items()})
    return {"model": model, "target": target, "fields": fields}


def load_weights(model, target, weights, path):
    """Put what `read_weights` found into (model, target encoder).

    What tells the predictor the action stays as it is where the file has none, or another kind.
    """
    own = model.state_dict()
    state = {name: value for name, value in own.items() if name.startswith(TOLD)}
    for name, value in weights["model"].items():
        if name in own or not name.startswith(TOLD):
            state[name] = value
    common.load_state(target, weights["target"], f"{path}, target encoder")
    common.load_state(model, state, path)


# --------------------------------------------------------------------------------------------------
# Presets and main
# --------------------------------------------------------------------------------------------------

WEAK = {"jitter": (0.4, 0.4, 0.2, 0.1)}  # the paper's default; Config's is its strong one
IMAGENET = {
    **WEAK,
    "data": "imagenet",
    "image_size": 224,
    "patch": 16,
    "width": 768,
    "depth": 12,
    "heads": 12,
    "predictor_width": 384,
    "patch_std": 0.02,
    "crop_scale": (0.3, 1.0),
    "flip": True,
    "blur_sigma": (0.1, 2.0),
    "min_visible": 24,
    "batch": 1024,
    "micro": 64,
    "epochs": 300,
    "warmup": 40 / 300,
    "lr_start": 2e-4,
    "weight_decay_final": 0.4,
    "momentum": 0.996,
    "workers": 12,
    "eval": "linear,attentive,mrr,finetune",
    "tune_epochs": 100,
    "tune_batch": 1024,
}
TOY = {
    # larger first weights, so that letters are learned too, not only what tints them
    "init_std": 0.06,
    "patch_std": 0.8,
    "lr": 3e-3,
    "momentum": 0.98,
    "steps": 1000,
    "precision": "fp32",
    "workers": 1,
    "probe_epochs": 6,
    "mrr_images": 40,
    "mrr_bank": 64,
    "tune_epochs": 3,
}
CIFAR10_CPU = {
    "data": "cifar10",
    "image_size": 32,
    "min_visible": 5,
    "predictor_depth": 6,
    "flip": True,
    "steps": 4000,
    "workers": 1,
    "mrr_images": 128,
    "tune_epochs": 1,
}
CIFAR10 = {  # one GPU
    "data": "cifar10",
    "image_size": 32,
    "patch": 4,
    "width": 192,
    "depth": 9,
    "predictor_width": 128,
    "predictor_depth": 12,
    "init_std": 0.05,
    "patch_std": 0.15,
    "min_visible": 12,
    "crop_scale": (0.5, 1.0),
    "flip": True,
    "batch": 512,
    "micro": 512,
    "epochs": 200,
    "weight_decay_final": 0.2,
    "workers": 8,
}
PRESETS = {
    "toy": TOY,
    "toy-invariant": {**TOY, **WEAK, "predictor_depth": 1},
    "cifar10-cpu": CIFAR10_CPU,
    "cifar10-cpu-invariant": {**CIFAR10_CPU, **WEAK, "predictor_depth": 2},
    "cifar10": CIFAR10,
    "cifar10-invariant": {**CIFAR10, **WEAK, "predictor_depth": 6},
    "folder": {  # any images, ViT-S/16, one GPU
        **IMAGENET,
        "data": "folder",
        "jitter": (0.8, 0.8, 0.4, 0.2),
        "width": 384,
        "heads": 6,
        "predictor_width": 192,
        "predictor_depth": 12,
        "batch": 256,
        "micro": 256,
        "epochs": 100,
        "eval": "knn,linear,mrr",
    },
    "vit_b16_equivariant_in1k": {**IMAGENET, "predictor_depth": 18},
    "vit_b16_invariant_in1k": {**IMAGENET, "predictor_depth": 12},
    "vit_l16_equivariant_in1k": {
        **IMAGENET,
        "width": 1024,
        "depth": 24,
        "heads": 16,
        "predictor_width": 512,
        "predictor_depth": 36,
    },
}
DATA_PRESETS = {"toy": "toy", "letters": "toy", "textures": "toy", "cifar10": "cifar10"}
DATA_PRESETS.update({"imagenet": "vit_b16_equivariant_in1k", "*": "folder"})
LABELLED = {"knn", "linear", "attentive", "finetune", "segment", "multitask"}  # need labels


def check(config, world):
    """Refuse what would fail late or silently (exit 2)."""
    common.check(config, world, (*sorted(LABELLED), "mrr", "features"))
    c = config
    if not 0 <= min(c.jitter) <= max(c.jitter) <= 1:
        fail(f"--jitter {c.jitter}: strengths must be between 0 and 1")
    if c.train:
        for number in range(4):
            sample_masks(c, number)  # ends where blocks leave too little


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
    train_split, val, unseen = common.open_data(config.data, ", ".join(sorted(wanted & LABELLED)))
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
    if val or "mrr" in wanted:
        evaluate(model, target, train_split, val, config, world, run)


if __name__ == "__main__":
    main()
