# SPDX-License-Identifier: MIT
"""V-JEPA: predict features of the hidden parts of a video; measure what that teaches about physics.

"Revisiting Feature Prediction for Learning Visual Representations from Video", Bardes et al., 2024,
arXiv 2404.08471. "Intuitive physics understanding emerges from self-supervised pretraining on
natural videos", Garrido et al., 2025, arXiv 2502.11831.

The idea. Hide tubes of a video: blocks of the picture, gone for the whole clip. A predictor says
what a slow copy of the encoder, which saw everything, represents at the hidden places. Nobody asked
for physics. Yet the trained model can be asked what it expects: show it the first frames of a
window, let it predict the features of the rest, and compare. That error is its surprise. A model
that has learned how objects behave is more surprised by a video in which one vanishes behind a
screen than by the same frames in a possible order. Psychologists test infants in this way.

    clip [B, 3, T, S, S] -> tubelets [B, N, 3*t*p*p]
      |-- visible tubelets - encoder -> [B, K, D] --. + mask tokens at the hidden places
      |                       : EMA                 '-> predictor -> predictions [B, Kp, D] -- L1
      |                       v                                                               loss
      '-- all tubelets - target encoder -> [B, N, D] -> hidden places, normed [B, Kp, D] -----'
    surprise: the visible tubelets are those of the window's first frames

    python vjepa.py                                    # toy videos, and surprise at them
    python vjepa.py --data ~/videos                    # ViT-S/16 on any videos, one GPU
    torchrun --nproc-per-node 8 vjepa.py --data k710.csv,ssv2.csv --preset vit_l16
    python vjepa.py --preset vit_l16 --init vitl16.pth.tar --no-train --data kinetics

Departures. From the paper, with the released code: weight decay along a cosine; masks cut by
keeping the first tokens, so late frames are dropped; probes without flips. From the code: draws
depend on the seed and the micro-batch only; blocks that would hide all hide less; clipping starts
with the end of the warm-up, not an epoch later; probes see crops without RandAugment and erasing.
"""

import copy
import csv
import functools
import json
import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

import common
from common import MLP, Block, fail, gather_tokens

# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag. The comment beside it is its help."""

    preset: str = ""  # a name of PRESETS, by default the one that fits --data
    data: str = "toy"  # toy, a folder of videos or images, or lists of `path label`: a.csv,b.csv
    val: str = ""  # list of the validation videos, where --data is a list

    # model
    image_size: int = 32  # side of a frame as the network sees it, pixels
    frames: int = 16  # frames a clip
    patch: int = 8  # side of a tubelet, pixels
    tubelet: int = 2  # length of a tubelet, frames
    width: int = 64  # encoder width
    depth: int = 3  # encoder blocks
    heads: int = 4  # attention heads of encoder and predictor
    predictor_width: int = 64  # predictor width
    predictor_depth: int = 2  # predictor blocks
    align: bool = True  # the predictor's queries and keys start equal: short runs need it
    rope: bool = False  # rotary positions and SwiGLU, the physics paper's model
    target: Literal["features", "pixels"] = "features"  # what is predicted; pixels: the control

    # clips
    step: int = 1  # every so many frames of the video
    seconds: float = 0  # length of a clip in seconds, wins over --step
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop, share of the frame
    flip: bool = False  # mirror half of the clips

    # masks
    masks: str = "multiblock,time"  # kinds: multiblock, causal, random, tube, time
    mask_blocks: tuple[int, ...] = (4,)  # multiblock and causal: blocks of each range
    mask_scales: tuple[float, ...] = (0.15,)  # area of a block of each range, share of the frame

    # optimisation
    train: bool = True  # train; --no-train only evaluates --init
    batch: int = 32  # clips a step, over all ranks
    micro: int = 32  # clips a forward pass; their masks are cut to one length
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps, wins over --epochs
    warmup: float = 0.06  # share of the run in which the learning rate rises
    lr: float = 2e-3  # peak learning rate
    lr_start: float = 0.0  # learning rate of the first step
    lr_final: float = 1e-6  # learning rate at the end of the schedule
    weight_decay: float = 0.04  # weight decay at the start
    weight_decay_final: float = 0.04  # weight decay at the end
    momentum: float = 0.99  # EMA momentum at the start, 1 at the end
    schedule_scale: float = 1.25  # schedules are this many times longer than the run
    clip: float = 10.0  # largest gradient norm of encoder and of predictor, 0 = any

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/vjepa, runs/vjepa-2, ...
    resume: bool = False  # continue from last.pt in the run's folder, or start if there is none
    init: str = ""  # weights to start from or to evaluate: ours or the authors'
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between rows of log.jsonl
    device: Literal["", "cuda", "mps", "cpu"] = ""  # default the best there is
    precision: Literal["", "bf16", "fp16", "fp32"] = ""  # default bf16 where it is fast
    compile: bool = torch.cuda.is_available()  # torch.compile the networks
    shard: bool = False  # FSDP2 instead of DDP, for models that do not fit one GPU
    workers: int = 0  # loading processes a rank, 0 = load between the steps

    # evaluation
    eval: str = "physics,knn"  # comma-separated: physics, knn, probe, features, none
    physics: Literal["toy", "intphys", "grasp", "inflevel"] = "toy"  # videos to be surprised at
    physics_data: str = ""  # folder of these videos
    probe_init: str = ""  # an official attentive probe to evaluate instead of training one
    probe_epochs: int = 20  # passes of the attentive probe
    probe_batch: int = 0  # batch of the probe, 0 = the paper's: 256 videos, 1,024 images
    probe_clips: int = 1  # clips of a video whose tokens the probe sees together
    probe_views: int = 1  # 1: the centre; 3: squares along the longer side, averaged


# --------------------------------------------------------------------------------------------------
# Masks: tubes that are hidden for the whole clip (section 3.2 of 2404.08471)
# --------------------------------------------------------------------------------------------------


def grid_of(config):
    """Return the tokens of a clip along (time, rows, columns)."""
    side = config.image_size // config.patch
    return config.frames // config.tubelet, side, side


def mask_kinds(config):
    """Return [(name, blocks, scale)]: one kind a range for multiblock and causal."""
    ranges = list(zip(config.mask_blocks, config.mask_scales, strict=True))
    kinds = []
    for name in config.masks.split(","):
        of_blocks = name in ("multiblock", "causal")
        kinds += [(name, *both) for both in ranges] if of_blocks else [(name, 0, 0.0)]
    return kinds


def block_size(step, grid, scale):
    """Return (height, width) of a block in tokens, the same for all clips of a step.

    scale: its share of the frame. Its height is 0.75 to 1.5 times its width.
    """
    # Seeded by the step alone, as in the released code: all its ranks agree. The first two draws
    # decide length and area, which are fixed in all configurations.
    u = torch.rand(3, generator=torch.Generator().manual_seed(step))[2].item()
    _, rows, columns = grid
    area = int(rows * columns * scale)
    ratio = 0.75 + u * 0.75
    height = min(rows, max(1, round(math.sqrt(area * ratio))))
    width = min(columns, max(1, round(math.sqrt(area / ratio))))
    if (height, width) == (rows, columns):
        height -= 1  # something stays visible
    return height, width


def outside_blocks(uniform, size, grid):
    """Return bool [B, N], the tokens in no block. uniform [B, blocks, 2]: places in [0, 1)."""
    times, rows, columns = grid
    top = (uniform[..., :1] * (rows - size[0] + 1)).long()  # [B, blocks, 1]
    left = (uniform[..., 1:] * (columns - size[1] + 1)).long()
    row = torch.arange(rows)
    column = torch.arange(columns)
    tall = (row >= top) & (row < top + size[0])
    wide = (column >= left) & (column < left + size[1])
    outside = ~(tall[..., :, None] & wide[..., None, :]).flatten(2)  # [B, blocks, rows*columns]
    visible = outside.all(1)
    # where all blocks leave nothing visible, the first one is hidden alone
    visible = torch.where(visible.any(1, keepdim=True), visible, outside[:, 0])
    return visible.repeat(1, times)


def cut(visible):
    """Turn bool [B, N] into indices: (visible [B, K], hidden [B, Kp]), ascending.

    Each is cut to the shortest of the micro-batch by keeping the first ones, as in the released
    code. So what is dropped are late frames.
    """
    lists = []
    for chosen in (visible, ~visible):
        shortest = int(chosen.sum(1).min())
        lists.append((~chosen).int().argsort(dim=1, stable=True)[:, :shortest])
    return lists


def sample_masks(config, number):
    """Draw a micro-batch's masks: a list of visible [B, K] and hidden [B, Kp] of each kind."""
    c = config
    grid = grid_of(c)
    times = grid[0]
    places = grid[1] * grid[2]
    draws = common.generator(c.seed, "masks", number)
    masks = []
    for name, blocks, scale in mask_kinds(c):
        if name == "time":  # the first eighth of the clip to three quarters of it
            longest = max(1, times * 3 // 4)
            known = 1 + int(torch.rand(1, generator=draws).item() * longest)
            visible = (torch.arange(times * places) < known * places).expand(c.micro, -1)
        elif name in ("random", "tube"):  # hide 90 %
            count = places if name == "tube" else times * places
            keys = torch.rand(c.micro, count, generator=draws)
            visible = keys.argsort(1).argsort(1) < max(1, int(count * (1 - 0.9)))
            visible = visible.repeat(1, times * places // count)
        else:
            size = block_size(number // (c.batch // c.micro), grid, scale)
            uniform = torch.rand(c.micro, blocks, 2, generator=draws, dtype=torch.float64)
            visible = outside_blocks(uniform, size, grid)
            if name == "causal":  # only the first three quarters of the clip are context
                visible[:, max(1, times * 3 // 4) * places :] = False
        masks += cut(visible)
    return masks


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


def sincos_3d(width, grid):
    """Return positions of a (time, rows, columns) grid, float32 [1, N, D].

    Each axis gets a third of the channels, rounded up; the last ones are cut off.
    """
    axes = np.indices(grid).reshape(3, -1)
    third = 2 * math.ceil(width / 6)
    parts = [common.sincos_1d(third, axis) for axis in axes]
    return torch.cat(parts, dim=1)[None, :, :width].float()


def resample_positions(table, old, new):
    """Resample positions [1, N, D] of one (time, rows, columns) grid for another."""
    if tuple(old) == tuple(new):
        return table
    cube = table.float().unflatten(1, tuple(old)).permute(0, 4, 1, 2, 3)  # [1, D, T, H, W]
    return F.interpolate(cube, tuple(new), mode="trilinear").flatten(2).transpose(1, 2)


@functools.lru_cache(maxsize=16)
def rotary_table(head_width, grid, device):
    """Return cosine and signed sine [N, D/H] of each token's rotation, and each channel's partner.

    The channels are three groups, for time, row and column. In a group of a channels the pairs
    (2i, 2i+1) turn by position * 10000^(-2i/a). What is left over stays as it is.
    """
    a = head_width // 3
    channel = torch.arange(head_width)
    axis = (channel // a).clamp(max=2)
    inside = channel - axis * a
    odd = inside % 2
    turned = inside < a // 2 * 2
    frequencies = 10000.0 ** (-(inside - odd) / a) * turned
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid))  # [N, 3]
    angles = places[:, axis] * frequencies
    sine = angles.sin() * (2 * odd - 1)
    partner = torch.where(turned, channel + 1 - 2 * odd, channel)
    return angles.cos().to(device), sine.to(device), partner.to(device)


def rotate(x, cosine, sine, partner):
    """Turn queries or keys x [B, H, N, D/H] by what `rotary_table` gives."""
    return (x * cosine + x[..., partner] * sine).to(x.dtype)


class SwiGLU(nn.Module):
    """fc3(silu(fc1 x) * fc2 x)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(width, hidden)
        self.fc3 = nn.Linear(hidden, width)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class RotaryBlock(Block):
    """A `Block` with SwiGLU, whose queries and keys are turned by their place in the video."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.mlp = SwiGLU(width, 4 * width)

    def forward(self, x, queries=None, rotation=None):
        """As `Block`; rotation: what `rotate` takes."""
        qkv = self.attn.qkv(self.norm1(x))
        qkv = qkv.unflatten(2, (3, self.attn.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, D/H]
        q = rotate(q, *rotation)
        k = rotate(k, *rotation)
        if queries is not None:
            q = q[:, :, -queries:]
            x = x[:, -queries:]
        attended = common.attend(q, k, v).transpose(1, 2)
        x = x + self.attn.proj(attended.flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Blocks that know where in the video each token is: what encoder and predictor share."""

    def __init__(self, config, width, depth):
        super().__init__()
        self.grid = grid_of(config)
        self.heads = config.heads
        self.pos_embed = None
        if not config.rope:
            # a parameter, since the released checkpoints hold the table too
            table = sincos_3d(width, self.grid)
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        block = RotaryBlock if config.rope else Block
        self.blocks = nn.ModuleList(block(width, config.heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def run(self, x, keep, grid, queries=None):
        """Run on tokens x [B, N, D] at the places keep [B, N] of a grid, None = all of them.

        With queries=n only the last n tokens are computed: [B, n, D].
        """
        options = {}
        if self.pos_embed is None:
            head_width = x.shape[2] // self.heads
            cosine, sine, partner = rotary_table(head_width, tuple(grid), x.device)
            if keep is not None:
                cosine = cosine[keep][:, None]  # [B, 1, N, D/H]
                sine = sine[keep][:, None]
            options["rotation"] = (cosine, sine, partner)
        else:
            table = resample_positions(self.pos_embed, self.grid, grid)
            x = x + (table if keep is None else table[0][keep])
        for block in self.blocks[:-1]:
            x = block(x, **options)
        return self.norm(self.blocks[-1](x, queries=queries, **options))


def to_tubelets(video, tubelet, patch):
    """Cut videos [B, 3, T, H, W] into tubelets [B, N, 3*t*p*p], channel-major, in raster order."""
    x = video.unflatten(4, (-1, patch))
    x = x.unflatten(3, (-1, patch))
    x = x.unflatten(2, (-1, tubelet))  # [B, 3, T', t, H', p, W', p]
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.flatten(1, 3).flatten(2)


class Encoder(Transformer):
    """Vision transformer on tubelets: no class token, all tokens after the final norm."""

    def __init__(self, config):
        c = config
        super().__init__(c, c.width, c.depth)
        kernel = (c.tubelet, c.patch, c.patch)
        self.patch_embed = nn.Conv3d(3, c.width, kernel, stride=kernel)

    def forward(self, x, keep=None):
        """Encode videos [B, 3, T, H, W] of any size, or tubelets [B, N, 3*t*p*p]: [B, N, D].

        keep: the tokens to run on, int64 [B, K] -> [B, K, D].
        """
        grid = self.grid
        if x.dim() == 5:
            kernel = self.patch_embed.kernel_size
            grid = [side // k for side, k in zip(x.shape[2:], kernel, strict=True)]
            x = to_tubelets(x, *kernel[:2])
        if keep is not None:
            x = gather_tokens(x, keep)
        # the convolution as one Linear, so that it can run on visible tubelets alone
        x = F.linear(x, self.patch_embed.weight.flatten(1), self.patch_embed.bias)
        return self.run(x, keep, grid)


class Predictor(Transformer):
    """A narrow transformer that fills in hidden tokens from the visible ones."""

    def __init__(self, config):
        c = config
        width = c.predictor_width
        super().__init__(c, width, c.predictor_depth)
        self.predictor_embed = nn.Linear(c.width, width)
        # one for each kind of mask
        tokens = [torch.zeros(1, 1, width) for _ in mask_kinds(c)]
        self.mask_tokens = nn.ParameterList(tokens)
        out = 3 * c.tubelet * c.patch**2 if c.target == "pixels" else c.width
        self.predictor_proj = nn.Linear(width, out)

    def forward(self, tokens, context, hidden, kind):
        """Predict the tokens `hidden` [B, Kp]: [B, Kp, D].

        tokens [B, K, D]: those at `context` [B, K], encoded; kind: which mask token to use.
        """
        x = self.predictor_embed(tokens)
        queries = self.mask_tokens[kind].to(x.dtype).expand(*hidden.shape, -1)
        x = torch.cat([x, queries], dim=1)
        places = torch.cat([context, hidden], dim=1)
        # only the queries are read, so the last block computes only them
        return self.predictor_proj(self.run(x, places, self.grid, queries=hidden.shape[1]))


class VJEPA(nn.Module):
    """Encoder and predictor, trained by gradient. The target encoder is an `Encoder` beside it."""

    def __init__(self, config):
        super().__init__()
        self.encoder = Encoder(config)
        self.predictor = Predictor(config)
        common.init_weights(self)
        if config.align:
            # Places first look at places like them. Else short runs end on a plateau: predictions
            # are the scene's average, whatever is in its place.
            for block in self.predictor.blocks:
                queries, keys, values = block.attn.qkv.weight.data.chunk(3)
                nn.init.normal_(queries, std=config.predictor_width**-0.5)
                nn.init.normal_(values, std=config.predictor_width**-0.5)
                keys.copy_(queries)

    def forward(self, tubelets, *masks):
        """tubelets [B, N, 3*t*p*p], masks of `sample_masks` -> list of predictions [B, Kp, D]."""
        predictions = []
        for kind in range(len(masks) // 2):
            context, hidden = masks[2 * kind : 2 * kind + 2]
            tokens = self.encoder(tubelets, context)
            predictions.append(self.predictor(tokens, context, hidden, kind))
        return predictions


def build(config):
    """Return a fresh (model, target encoder). The target starts as a copy of the encoder."""
    torch.manual_seed(config.seed)
    model = VJEPA(config)
    return model, copy.deepcopy(model.encoder).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


def pixel_targets(tubelets):
    """Return the control's targets, pixels [B, N, t*p*p*3].

    Each colour of a tubelet is brought to mean 0 and std 1.
    """
    std = common.STD.view(3, 1).to(tubelets.device)
    pixels = tubelets.float().unflatten(2, (3, -1)) * std  # [B, N, 3, t*p*p]
    pixels = pixels - pixels[..., :1]  # else rounding counts where a tubelet is nearly flat
    spread = pixels.std(3, keepdim=True) + 1e-6
    pixels = (pixels - pixels.mean(3, keepdim=True)) / spread
    return pixels.transpose(2, 3).flatten(2)


def normed(tokens, pixels):
    """Return what is to be predicted, [B, N, D]: features are normed, pixels are already."""
    return tokens if pixels else F.layer_norm(tokens.float(), tokens.shape[-1:])


def vjepa_loss(predictions, tokens, hidden, pixels=False):
    """Mean over kinds of masks of the mean |prediction - normed token|; for pixels half the square.

    predictions: [B, Kp, D] of each kind; tokens [B, N, D]; hidden: int64 [B, Kp] of each kind.
    """
    wanted = normed(tokens, pixels)
    losses = []
    for prediction, places in zip(predictions, hidden, strict=True):
        error = prediction.float() - gather_tokens(wanted, places)
        losses.append(error.square().mean() / 2 if pixels else error.abs().mean())
    return torch.stack(losses).mean()


# --------------------------------------------------------------------------------------------------
# The toy world: no frame, and no set of frames, says whether a video is possible
# --------------------------------------------------------------------------------------------------

PROPERTIES = ("permanence", "continuity", "shape", "colour", "solidity")
SHAPES = ((24, 0), (4, 0), (3, 0), (3, 180))  # sides and turn: circle, square, two triangles
COLOURS = ("#dc3232", "#326ee6", "#f0c828", "#3cb450", "#aa50c8", "#f0f0f0")
SCREENS = ("#5a3c28", "#285050", "#50506e")
FLOOR = 27.0  # height of the floor, counted from the top of a frame of 32 x 32


class Scene:
    """A toy scene. A frame depends on two numbers only: its phase, and how far screens are up.

    Phases 0 and 1 are the scene's two states, those between are the visible change. Screens that
    are up (1) hide all that depends on the state.

    permanence: an object is there, or slides out of the picture. continuity: it is left, or hops
    over the gap between two screens. shape, colour: two objects that differ in it cross in the
    open. solidity: an object hops over a wall that sticks out above a wide screen.
    """

    def __init__(self, name, draws, size):
        self.name = name
        self.size = size
        self.radius = draws.uniform(3.6, 4.6)
        self.middle = draws.uniform(13, 19)
        shapes = draws.sample(SHAPES, 2)
        colours = draws.sample(COLOURS, 2)
        self.shapes = shapes if name == "shape" else shapes[:1] * 2
        self.colours = colours if name == "colour" else colours[:1] * 2
        self.screen = draws.choice(SCREENS)
        self.sky = tuple(draws.choices(range(60, 180), k=3))
        self.ground = tuple(draws.choices(range(60, 180), k=3))

    def frame(self, phase, screen):
        """Draw a frame, uint8 [S, S, 3], at four times its size."""
        canvas = Image.new("RGB", (4 * self.size, 4 * self.size), self.sky)
        pen = ImageDraw.Draw(canvas)
        k = self.size / 8
        r = self.radius
        eased = phase * phase * (3 - 2 * phase)  # no jump in speed at either end

        def box(left, top, right, bottom, colour):
            pen.rectangle((k * left, k * top, k * right, k * bottom), fill=colour)

        def thing(which, x, up=0.0):
            sides, turn = self.shapes[which]
            circle = (k * x, k * (FLOOR - r - up), k * r)
            pen.regular_polygon(circle, sides, turn, fill=self.colours[which])

        box(0, FLOOR, 32, 32, self.ground)
        left = 8.5
        right = 23.5
        x = left + eased * (right - left)
        centres = [left, right]
        half = r + 1.3  # of a screen
        if self.name == "permanence":
            thing(0, self.middle + eased * (34 + r - self.middle))
            centres = [self.middle]
        elif self.name == "solidity":
            box(15, 13, 17, FLOOR, "#1e1e1e")
            # up first, then across: it clears the wall
            thing(0, x, up=17 * (1 - (2 * eased - 1) ** 6))
            centres = [16.0]
            half = 14.0
        else:
            if self.name != "continuity":
                thing(1, left + right - x)
            thing(0, x, up=4 * eased * (1 - eased) * (2 * r + 2))
        base = FLOOR + 2
        for centre in centres if screen else ():
            top = base - screen * (2 * r + 3.5)
            box(centre - half, top, centre + half, base, self.screen)
        return np.asarray(canvas.reduce(4))

    def video(self, story):
        """Draw [(phase, screen)]: uint8 [T, 3, S, S]. What is the same is the same bytes."""
        drawn = {symbol: self.frame(*symbol) for symbol in set(story)}
        frames = np.stack([drawn[symbol] for symbol in story])
        return torch.from_numpy(frames).permute(0, 3, 1, 2)


def change(state, length):
    """Tell the visible change out of a state, in so many frames."""
    story = [((k + 1) / (length + 1), 0) for k in range(length)]
    return story[::-1] if state else story


def occlude(before, after, rise, full):
    """Tell how screens rise over a state, hide it for `full` frames, and sink over a state."""
    heights = [(k + 1) / (rise + 1) for k in range(rise)]
    sinking = [(after, height) for height in reversed(heights)]
    return [(before, height) for height in heights] + [(0, 1)] * full + sinking


def walk(draws, frames):
    """Tell a random legal stretch: states hold, are hidden, and change in the open."""
    state = draws.randrange(2)
    skip = draws.randrange(12)
    story = []
    while len(story) < skip + frames:
        event = draws.random()
        if event < 0.5:
            story += [(state, 0)] * draws.randint(2, 8)
        elif event < 0.88:
            story += occlude(state, state, draws.randint(1, 3), draws.randint(1, 5))
        else:
            story += change(state, draws.randint(4, 8))
            state = 1 - state
    return story[skip : skip + frames]


def quadruplet():
    """Tell two pairs [possible, impossible], all made of the very same frames.

    A pair begins alike. What is impossible happens behind the screens, twice. All runs of at most
    five frames occur equally often in possible and impossible videos: only memory helps.
    """
    pairs = []
    for a, b in ((0, 1), (1, 0)):
        rest = [(a, 0)] * 4
        moved = [(b, 0)] * 4
        possible = rest + occlude(a, a, 2, 4) + rest + change(a, 6) + moved
        possible += occlude(b, b, 2, 4) + moved
        impossible = rest + occlude(a, b, 2, 4) + moved + change(b, 6) + rest
        impossible += occlude(a, b, 2, 4) + moved
        pairs.append([possible, impossible])
    return pairs


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------

PICTURES = frozenset(common.EXTENSIONS)
# common lists the files of a data set: here a video is one
common.EXTENSIONS.update(
    ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()
)
UNREADABLE = (*common.UNREADABLE, av.error.FFmpegError)


def dice(*key):
    """Return Python's random numbers, seeded by a key."""
    return random.Random(common.generator(*key).initial_seed())


def clip_indices(length, frames, step, clips=1, overlap=False, draw=None):
    """Choose the frames of a video that make up its clips, int64 [clips, frames].

    The released sampler. One clip from each of `clips` equal parts. It ends where draw(low, high)
    says, low <= . < high, or is the first of its part. A part that is too short repeats its last
    frame, or with `overlap` clips overlap. First and last frame are both included, so steps are a
    little longer than `step`.
    """
    part = length // clips
    span = frames * step
    rows = []
    for i in range(clips):
        shift = i * part
        if part > span:
            end = draw(span, part) if draw else span
            row = np.linspace(end - span, end, frames).clip(end - span, end - 1)
        else:
            last = min(span, length) - 1 if overlap else part
            row = np.linspace(0, last, last // step)
            row = np.append(row, np.full(frames - last // step, last))
            row = row.clip(0, max(0, last - 1))
        if overlap and part <= span:
            shift = i * ((length - span) // (clips - 1)) if length > span else 0
        rows.append(row.astype(np.int64) + shift)
    return np.stack(rows)


def is_picture(path):
    """Tell whether a file is a picture, by its name."""
    return path.suffix.lower() in PICTURES


def read_frames(path, choose):
    """Read the frames that choose(count, frames a second) returns, int64 [...]: [..., 3, H, W].

    path: a video, a folder of pictures, or a picture: a video of one frame. Raises UNREADABLE.
    """
    if path.is_dir() or is_picture(path):
        files = [path]
        if path.is_dir():
            files = [p for p in path.iterdir() if is_picture(p) and p.name[0] != "."]
            files.sort(key=lambda p: (len(p.name), p.name))  # 9.jpg before 10.jpg
        indices = choose(len(files), 25)
        found = {}
        for i in np.unique(indices).tolist():
            with Image.open(files[i]) as image:
                found[i] = np.array(common.to_rgb(image, common.exif_turn(image)))
    else:
        indices, found = decode(path, choose)
    wanted, places = np.unique(indices, return_inverse=True)
    frames = torch.from_numpy(np.stack([found[i] for i in wanted.tolist()]))
    return frames[places.reshape(indices.shape)].movedim(-1, -3)


def list_packets(video, stream):
    """Return (time stamp, is it a key frame) of all frames that will be shown, undecoded."""
    packets = [p for p in video.demux(stream) if p.size and not p.is_discard]
    return [(p.pts, p.is_keyframe) for p in packets]


def decode(path, choose):
    """Return (indices that `choose` asks for, {index: frame uint8 [H, W, 3]}) of a video file.

    Frames are found by their time stamps, from the last key frame before the first one wanted.
    Where stamps or the seek cannot be trusted, frames are counted from the start.
    """
    found = {}
    with av.open(str(path)) as video:
        stream = video.streams.best("video")
        if stream is None:
            raise ValueError("no video in it")
        packets = list_packets(video, stream)
        indices = choose(len(packets), float(stream.average_rate or 25))
        wanted = set(indices.flatten().tolist())
        stamps = {stamp for stamp, _ in packets}
        # AVI stores no times of showing: with B-frames they are guesses
        guessed = video.format.name == "avi" and stream.codec_context.has_b_frames
        if None not in stamps and len(stamps) == len(packets) and not guessed:
            stamps = sorted(stamps)
            places = {stamps[i]: i for i in wanted}
            keys = {stamp for stamp, key in packets if key and stamp <= min(places)}
            found = decode_from(video, stream, keys, places) if keys else {}
    if len(found) == len(wanted):
        return indices, found
    count = 0
    with av.open(str(path)) as video:
        for frame in video.decode(video.streams.best("video")):
            if count in wanted:
                found[count] = upright(frame)
            count += 1
            if count > max(wanted):
                return indices, found
    if not count:
        raise ValueError("no frame of it can be decoded")
    # some packets hold half a frame, or none: now the true number is known
    return decode(path, lambda _, rate: choose(count, rate))


def decode_from(video, stream, keys, places):
    """Return {index: frame} for places {stamp: index}, from the last of the key frames `keys` on.

    Returns fewer if the seek landed elsewhere, or if frames come in another order than stamps.
    """
    found = {}
    latest = -math.inf
    video.seek(max(keys), stream=stream)
    for frame in video.decode(stream):
        late = not math.isfinite(latest) and frame.pts not in keys  # as in MPEG-TS
        if late or frame.pts is None or frame.pts <= latest:
            return {}
        latest = frame.pts
        if latest in places:
            found[places[latest]] = upright(frame)
        if latest >= max(places):
            break
    return found


def upright(frame):
    """Return a decoded frame as uint8 [H, W, 3], turned and mirrored by its display matrix."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # (column, row) is shown at (a column + c row, b column + d row)
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]
    if abs(a) < abs(b):
        pixels = pixels.swapaxes(0, 1)
        a = c
        d = b
    pixels = pixels[:, ::-1] if a < 0 else pixels
    return pixels[::-1] if d < 0 else pixels


def centre_crop(height, width, aspect):
    """Return (top, left, height, width) of the largest centre with width / height in `aspect`."""
    h = height
    w = width
    if width / height < aspect[0]:
        h = round(width / aspect[0])
    elif width / height > aspect[1]:
        w = round(height * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(height, width, scale, draws, aspect=(0.75, 1.35)):
    """Draw a part of a frame, (top, left, height, width), in the released order of draws."""
    for _ in range(10):
        area = height * width * draws.uniform(*scale)
        ratio = math.exp(draws.uniform(*map(math.log, aspect)))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            top = draws.randint(0, height - h)
            return top, draws.randint(0, width - w), h, w
    return centre_crop(height, width, aspect)


def evaluation_box(height, width, size, views, view):
    """Return what evaluation sees: the centre, or one of three squares along the longer side."""
    side = min(height, width)
    if views == 1:
        view = 1
        side = side if (height, width) == (size, size) else side * 7 // 8  # 224 of 256
    return (height - side) * view // 2, (width - side) * view // 2, side, side


def crop_resize(frames, box, size):
    """Cut a box (top, left, height, width) out of frames [T, 3, H, W] and resize it: [T, 3, S, S].

    Bilinear without antialiasing, as released.
    """
    top, left, height, width = box
    part = frames[..., top : top + height, left : left + width]
    if (height, width) == (size, size):
        return part
    return F.interpolate(part, (size, size), mode="bilinear")


@dataclass
class Videos(common.Split):
    """N videos: paths, or for the toy properties. clips, views: what is read of each."""

    config: Config | None = None
    clips: int = 1
    views: int = 1

    def read_clips(self, index, draws):
        """Return a video's clips, uint8 [C, T, 3, H, W]; draws: None = not random."""
        c = self.config
        video = self.images[index]
        if isinstance(video, str):
            draws = draws or dice("toy", self.names[index])
            scene = Scene(video, draws, c.image_size)
            return torch.stack([scene.video(walk(draws, c.frames)) for _ in range(self.clips)])

        def choose(count, rate):
            step = max(1, int(c.seconds * rate / c.frames)) if c.seconds else c.step
            overlap = self.clips > 1 or draws is None
            draw = draws.randrange if draws else None
            return clip_indices(count, c.frames, step, self.clips, overlap, draw)

        return read_frames(video, choose)

    def read_views(self, index, draws, scale, flip):
        """Return a video's clips in all views, uint8 [V * C, T, 3, S, S].

        Each random clip has a crop of its own.
        """
        size = self.config.image_size
        parts = []
        clips = self.read_clips(index, draws)
        for view in range(self.views):
            for frames in clips:
                if draws:
                    box = random_crop(*frames.shape[-2:], scale, draws)
                else:
                    box = evaluation_box(*frames.shape[-2:], size, self.views, view)
                part = crop_resize(frames, box, size)
                parts.append(part.flip(-1) if flip and draws.random() < 0.5 else part)
        return torch.stack(parts)

    def read_batch(self, indices, *_, key=None, scale=(1.0, 1.0), flip=False):
        """Read videos: (those read [B], uint8 [B, V * C, T, 3, S, S], unreadable files).

        key: of the random draws, None = what evaluation sees, as `common.extract` asks for it.
        Others of the batch stand in for unreadable ones.
        """
        rows = []
        bad = []
        for i, index in enumerate(indices):
            draws = dice(*key, i) if key else None
            try:
                rows.append((index, self.read_views(index, draws, scale, flip)))
            except UNREADABLE as error:
                bad.append(f"{self.images[index]}: {error}")
        if not rows:  # all of these are bad: the main process ends the run
            size = self.config.image_size
            shape = (self.views * self.clips, self.config.frames, 3, size, size)
            rows = [(indices[0], torch.zeros(shape, dtype=torch.uint8))]
        rows = [rows[i % len(rows)] for i in range(len(indices))]
        found, clips = zip(*rows, strict=True)
        return torch.tensor(found), torch.stack(clips), bad


def as_videos(split, config):
    """Turn a Split of files into Videos; a folder of pictures is one.

    Pictures that lie directly in the folder itself, or in train/CLASS, are one each.
    """
    if split is None:
        return None
    chosen = {}
    for i, (path, name) in enumerate(zip(split.images, split.names, strict=True)):
        below = name.removeprefix("train/").removeprefix("val/").count("/")
        deep = below > (1 if split.classes else 0)
        chosen.setdefault(path.parent if deep and is_picture(path) else path, i)
    names = [split.names[i] for i in chosen.values()]
    labels = split.labels[list(chosen.values())]
    return Videos(list(chosen), names, labels, split.classes, config=config)


def open_split(config, name):
    """Return the `train` or `val` Videos of --data, None where there is no val; exit 2 if empty."""
    if config.data == "toy":
        labels = torch.arange(1500 if name == "train" else 500) % len(PROPERTIES)
        videos = [PROPERTIES[label] for label in labels]
        names = [f"{name}/{i}" for i in range(len(labels))]
        return Videos(videos, names, labels, list(PROPERTIES), config=config)
    if config.data.endswith(".csv"):
        lists = config.data if name == "train" else config.val
        return read_lists(lists, config) if lists else None
    return as_videos(common.open_split(config.data, name), config)


def read_lists(lists, config):
    """Read lists `a.csv,b.csv`: lines of path and label, by space, comma or tab."""
    videos = []
    labels = []
    for path in lists.split(","):
        path = Path(path).expanduser()
        if not path.is_file():
            fail(f"no data at {path}: expected a list with one `path label` a line")
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            fields = re.fullmatch(r'\s*"?(.+?)"?\s*[\s,]\s*"?(-?\d+)(?:\.0*)?"?\s*', line)
            header = number == 1 and re.fullmatch(r'"?\w+"?\s*[\s,]\s*"?\w+"?\s*', line)
            if fields:
                videos.append(path.parent / fields[1].replace('""', '"'))
                labels.append(int(fields[2]))
            elif line.strip() and not header:
                fail(f"{path}, line {number}: expected `path label`, the label a number: {line}")
    labels = torch.tensor(labels)
    # the numbers of several lists mean different things
    known = videos and "," not in lists and labels.min() >= 0
    classes = [str(i) for i in range(labels.max() + 1)] if known else []
    return Videos(videos, [str(video) for video in videos], labels, classes, config=config)


def open_data(config, wanted):
    """Return the (train, val) Videos of --data; val is None where what is `wanted` lacks labels."""
    if config.data != "toy" and not config.data.endswith(".csv"):
        return [as_videos(split, config) for split in common.open_data(config.data, wanted)]
    train = open_split(config, "train")
    if not len(train):
        fail(f"no videos in {config.data}: expected one `path label` a line")
    val = open_split(config, "val") if wanted else None
    if wanted and not (val and val.classes and train.classes):
        common.note(f"{wanted}: skipped, since it needs --val and the labels of one list")
        return train, None
    if val and len(val.classes) > len(train.classes):
        fail(f"{config.val} has labels that {config.data} lacks, up to {val.classes[-1]}")
    return train, val


def make_micro_batch(split, config, number):
    """Make micro-batch `number` of a run: (clips uint8 [B, T, 3, S, S], *masks, unreadable files).

    All of it depends on the seed and the number only.
    """
    c = config
    indices = common.micro_batch_indices(number, c.micro, len(split), c.seed)
    key = (c.seed, "clips", number)
    _, clips, bad = split.read_batch(indices, key=key, scale=c.crop_scale, flip=c.flip)
    return clips[:, 0], *sample_masks(c, number), bad


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def schedules(config, step, steps):
    """Return (lr, weight decay, EMA momentum) of step 0, 1, ...

    The released code advances the first two before the step, so they are those of step + 1.
    """
    c = config
    length = c.schedule_scale * steps
    warmup = int(c.warmup * steps)
    lr = common.cosine_schedule(step + 1, int(length), c.lr, c.lr_final, warmup, c.lr_start)
    decay = common.cosine_schedule(step + 1, int(length), c.weight_decay, c.weight_decay_final)
    return lr, decay, common.linear_schedule(step, length, c.momentum, 1.0)


def train(model, target, split, config, world):
    """Train (model, target encoder) on Videos. Returns the run; its last.pt holds the result."""
    an_epoch = max(1, len(split) // config.batch)
    steps = config.steps or max(1, int(config.epochs * an_epoch))
    pixels = config.target == "pixels"
    model.to(world.device)
    target.to(world.device)
    if config.compile:
        model.compile(dynamic=True)  # the numbers of tokens change from step to step
        target.compile()
    network = common.distribute(model, world, config.shard)  # DDP hides the parts that `model` has
    target = common.distribute(target, world, config.shard)
    groups = common.parameter_groups(model.encoder, model.predictor)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
    ema = common.EMA(target, model.encoder)
    run = common.Run(config, world, steps, network, optimizer, target=target)
    common.note(f"{run.out}: {len(split)} videos, steps {run.step} to {steps} of {config.batch}")
    make = functools.partial(make_micro_batch, split, config)
    numbers = common.micro_batches(config, world, run.step, steps)
    loader = common.make_loader(make, numbers, config, world)
    parts = config.batch // config.micro // world.size

    def clip():
        for module in (model.encoder, model.predictor):
            nn.utils.clip_grad_norm_(module.parameters(), config.clip)

    for step in run:
        lr, decay, momentum = schedules(config, step, steps)
        common.set_rates(optimizer, lr, decay)
        for part in range(parts):
            clips, *masks = run.next(loader, split)
            video = common.normalize(clips).transpose(1, 2)
            tubelets = to_tubelets(video, config.tubelet, config.patch)
            run.sync_gradients(part == parts - 1)
            with world.autocast():
                with torch.no_grad():
                    tokens = pixel_targets(tubelets) if pixels else target(tubelets)
                predictions = network(tubelets, *masks)
                loss = vjepa_loss(predictions, tokens, masks[1::2], pixels)
            run.backward(loss / parts)
        clipped = config.clip and step >= config.warmup * steps
        applied = run.update(clip if clipped else None)
        # the control's target is made of pixels, and its target encoder the encoder itself
        ema.update(0.0 if pixels else momentum, applied)
        run.log(lr=lr, momentum=momentum, **spread(tokens))
    return run


def spread(tokens):
    """Return signs of collapse: std over a clip's tokens, effective rank of clips."""
    rank = common.effective_rank(tokens.float().mean(1))
    return {"feature_std": tokens.float().std(1).mean(), "feature_rank": rank}


# --------------------------------------------------------------------------------------------------
# Evaluate: intuitive physics, by violation of expectation (2502.11831)
# --------------------------------------------------------------------------------------------------


# frames a window, and contexts
PROTOCOLS = {
    "toy": (16, range(4, 11, 2)),
    "intphys": (16, range(2, 11, 2)),
    "grasp": (16, range(2, 11, 2)),
    "inflevel": (32, range(4, 21, 4)),
}
# the categories that a property counts for, where its name does not say so
CATEGORIES = {
    "toy": {},
    "intphys": {"O1": "Permanence", "O2": "Shape", "O3": "Continuity"},
    "grasp": {"ObjectPermanence": "Permanence", "Unchangeableness": "Colour"},
    "inflevel": {"continuity": "Permanence", "solidity": "Solidity", "gravity": "Gravity"},
}
QUADRUPLETS = 20  # a property of the toy


def find_pairs(config):
    """Yield (property, [possible, impossible]) of --physics, videos uint8 [T, 3, H, W].

    They are already at every so many frames.
    """
    readers = {"intphys": intphys_pairs, "grasp": grasp_pairs, "inflevel": inflevel_pairs}
    if config.physics == "toy":
        return toy_pairs(config.image_size)
    return readers[config.physics](Path(config.physics_data).expanduser())


def toy_pairs(size):
    """Draw two pairs of each scene, none of which training saw."""
    for name in PROPERTIES:
        for number in range(QUADRUPLETS):
            scene = Scene(name, dice("physics", name, number), size)
            for pair in quadruplet():
                yield name, [scene.video(story) for story in pair]


def intphys_pairs(root):
    """Read O1/SCENE/1 to 4, with scene/*.png and status.json. Those that part last are a pair."""
    for path in sorted(root.glob("**/O[123]/[!.]*/1/status.json")):
        scene = path.parents[1]
        videos = [read_frames(scene / part / "scene", every(2, -1)) for part in "1234"]
        states = [json.loads((scene / part / "status.json").read_text()) for part in "1234"]
        possible = [state["header"]["is_possible"] for state in states]
        for pair in match_quadruplet(videos)[0]:
            pair.sort(key=lambda i: not possible[i])
            if [bool(possible[i]) for i in pair] != [True, False]:
                fail(f"{scene}: of its videos that begin alike, not one is possible and one not")
            yield scene.parent.name, [videos[i] for i in pair]


def grasp_pairs(root):
    """Read P_PROPERTY/*.mp4 and IP_PROPERTY/*.mp4; the same names make a pair."""
    for path in sorted(root.glob("**/P_*/[!.]*.mp4")):
        other = path.parent.with_name("I" + path.parent.name) / path.name
        yield path.parent.name[2:], [read_frames(video, every(10)) for video in (path, other)]


def inflevel_pairs(root):
    """Read continuity/*.mp4, solidity/*.mp4, gravity/*.mp4; each has a csv with its pairs.

    Frames count from the end of priming on. The longer video drops its first ones.
    """
    for name in ("continuity", "solidity", "gravity"):
        lists = [*root.glob(f"*{name}*.csv"), *root.glob(f"{name}/*.csv")]
        for path in sorted(lists)[-1:]:  # hidden ones come first
            for row in csv.DictReader(path.open(newline=""), skipinitialspace=True):
                paths = []
                lengths = []
                for i in (1, 2):
                    paths.append(root / name / Path(row[f"vid{i}_path"]).name)
                    start = int(float(row[f"vid{i}_end_priming_2"])) + 1
                    with av.open(str(paths[-1])) as video:
                        lengths.append(len(list_packets(video, video.streams[0])) - start)
                shown = every(5, start=-min(lengths))
                yield name, [read_frames(video, shown) for video in paths]


def every(step, end=None, start=0):
    """Return what `read_frames` takes to show every so many frames."""
    return lambda count, rate: np.arange(count)[start:end:step]


def match_quadruplet(videos):
    """Return ([[0, j], [k, l]], the frames in which videos 1, 2, 3 part from video 0).

    The one that parts last is its match, the other two are the second pair.
    """
    parting = []
    for other in videos[1:]:
        n = min(len(videos[0]), len(other))
        differs = (videos[0][:n] != other[:n]).flatten(1).any(1)
        parting.append(int(differs.int().argmax()) if differs.any() else n)
    match = 1 + int(np.argmax(parting))
    return [[0, match], [i for i in (1, 2, 3) if i != match]], parting


@torch.no_grad()
def surprise(model, target, windows, contexts, config):
    """Return the error of the future predicted from the first frames, [K, W].

    windows [W, 3, T, S, S], normalised; contexts: K numbers of frames. The target encoder sees the
    whole window, the context comes from the student, as in the released evaluation.
    """
    c = config
    names = [name for name, _, _ in mask_kinds(c)]
    kind = names.index("time") if "time" in names else 0
    pixels = c.target == "pixels"
    tubelets = to_tubelets(windows, c.tubelet, c.patch)
    wanted = normed(pixel_targets(tubelets) if pixels else target(tubelets), pixels)
    places = torch.arange(tubelets.shape[1], device=windows.device).expand(len(windows), -1)
    rows = []
    for context in contexts:
        known = context * tubelets.shape[1] // windows.shape[2]
        encoded = model.encoder(tubelets, places[:, :known])
        future = places[:, known:]
        predictions = model.predictor(encoded, places[:, :known], future, kind)
        error = predictions.float() - wanted[:, known:]
        rows.append(error.abs().mean((1, 2)))
    return torch.stack(rows)


def video_surprise(model, target, video, config, world):
    """Return the surprise at a video, uint8 [T, 3, H, W]: every second window, float64 [K, W]."""
    if len(video) < config.frames:
        raise ValueError(f"{len(video)} frames are less than a window of {config.frames}")
    # InfLevel's wide frames are squashed, all others are cut to a square
    aspect = (0.5, 2.0) if config.physics == "inflevel" else (1.0, 1.0)
    box = centre_crop(*video.shape[-2:], aspect)
    frames = crop_resize(video.to(world.device).float(), box, config.image_size)
    windows = common.normalize(frames).unfold(0, config.frames, 2)  # [W, 3, S, S, T]
    rows = []
    for part in windows.permute(0, 1, 4, 2, 3).split(32):
        with world.autocast():
            rows.append(surprise(model, target, part, physics_contexts(config), config))
    return torch.cat(rows, dim=1).cpu().double()


def aggregate(surprise):
    """Return the mean and the largest over windows, [2, K + 1], of a surprise [K, W].

    The last context, "filtered", is the least surprised one of all in each window.
    """
    rows = torch.cat([surprise, surprise.min(0, keepdim=True).values])
    return torch.stack([rows.mean(1), rows.max(1).values])


def auroc(possible, impossible):
    """Return the share of all (possible, impossible) whose possible surprises less, ties half."""
    difference = impossible[None, :] - possible[:, None]
    return ((difference.sign() + 1) / 2).mean().item()


def summarise(pairs, contexts):
    """Return one property's results in percent, from its pairs of surprises.

    Pairs right (mean surprise) at each context, filtered, and the best of them, with the 95 %
    interval of a bootstrap over pairs; AUROC of single videos (largest surprise, filtered).
    """
    both = torch.stack([torch.stack([aggregate(x) for x in pair]) for pair in pairs])
    mean, largest = both.unbind(2)  # [P, 2, K + 1]
    right = 100 * (mean[:, 0] < mean[:, 1]).double()  # [P, K + 1], ties are errors
    accuracy = right.mean(0)
    best = right[:, accuracy.argmax()]
    draws = np.random.default_rng(0).integers(len(best), size=(1000, len(best)))
    ends = best[draws].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    names = [*(f"context {c}" for c in contexts), "filtered"]
    result = dict(zip(names, accuracy.tolist(), strict=True))
    result["best"] = best.mean().item()
    result["from"], result["to"] = ends.tolist()
    result["AUROC"] = 100 * auroc(largest[:, 0, -1], largest[:, 1, -1])
    return result


def evaluate_physics(networks, config, world, run):
    """Measure {name: (model, target)}, print and log {name: {property: result}}.

    Returns for each property its first pair, and the first network's surprises at it.
    """
    surprises = {name: {} for name in networks}
    shown = {}
    try:
        for key, pair in find_pairs(config):
            for name, network in networks.items():
                seen = [video_surprise(*network, video, config, world) for video in pair]
                surprises[name].setdefault(key, []).append(seen)
                shown.setdefault(key, (pair, seen))
    except UNREADABLE as error:
        fail(f"--physics {config.physics} cannot be read: {error}")
    results = {}
    for name, found in surprises.items():
        rows = {key: summarise(pairs, physics_contexts(config)) for key, pairs in found.items()}
        results[name] = rows
        categories = {}
        for key, row in rows.items():
            name_only = re.sub(r"(?<=[a-z])\d", "", key)  # GRASP has Inertia and Inertia2
            words = CATEGORIES[config.physics].get(name_only, name_only)
            for category in re.findall("[A-Z][a-z]+", words):
                categories.setdefault(category, []).append(row["best"])
        table = {}
        for key, row in rows.items():
            for column, value in row.items():
                table.setdefault(column, {})[key] = value
        for numbers in table.values():
            numbers["mean"] = np.mean(list(numbers.values()))
        table["best"].update({key: np.mean(best) for key, best in categories.items()})
        common.note(f"surprise of the {name} network, {config.physics}: pairs right, chance is 50")
        run.report(table)
    common.note("best: the highest over contexts, chosen on these videos, as the paper reports it")
    run.write(physics=results)
    return shown


def physics_contexts(config):
    """Return the context lengths of --physics, in frames."""
    return [c for c in PROTOCOLS[config.physics][1] if c < config.frames]


# --------------------------------------------------------------------------------------------------
# Evaluate: frozen features
# --------------------------------------------------------------------------------------------------


class AttentiveProbe(nn.Module):
    """The papers' readout of frozen features: a query reads all tokens, a linear layer follows.

    As released: the query is not normed, and its attention has no output projection.
    """

    def __init__(self, config, classes):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens):
        """[B, N, D] -> logits [B, classes]."""
        return self.linear(self.pool(tokens)[:, 0])

    def pool(self, tokens):
        """[B, N, D] -> [B, 1, D]."""
        query = self.query_tokens.expand(len(tokens), -1, -1)
        q = self.q(query).unflatten(2, (self.heads, -1)).transpose(1, 2)
        kv = self.kv(self.norm1(tokens)).unflatten(2, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)  # [B, H, N, D/H]
        query = query + common.attend(q, k, v).transpose(1, 2).flatten(2)
        return query + self.mlp(self.norm2(query))


def encode(encoder, clips):
    """Return frozen tokens [B, C, N, D] of normalised clips [B, C, T, 3, S, S]."""
    videos = clips.flatten(0, 1).transpose(1, 2)
    return encoder(videos).float().unflatten(0, clips.shape[:2])


def make_probe_batch(split, config, number):
    """Make micro-batch `number` of the probe: see `Videos.read_batch`."""
    c = config
    indices = common.micro_batch_indices(number, c.micro, len(split), f"probe {c.seed}")
    scale = (0.08, 1.0) if c.crop_scale[0] < 1 else (1.0, 1.0)
    # never mirrored, as released: classes of SSv2 name directions
    return split.read_batch(indices, key=(c.seed, "probe", number), scale=scale)


def train_probe(encoder, split, config, world):
    """Return an AttentiveProbe trained on the frozen encoder: AdamW, cosine, random clips."""
    stills = all(isinstance(video, Path) and is_picture(video) for video in split.images)
    batch = min(config.probe_batch or (1024 if stills else 256), len(split))
    micro = max(1, min(batch, 16 // config.probe_clips))
    parts = max(1, batch // (micro * world.size))
    c = replace(config, micro=micro, batch=parts * micro * world.size)
    total = max(1, c.probe_epochs * (len(split) // c.batch))
    torch.manual_seed(c.seed)
    probe = AttentiveProbe(c, len(split.classes))
    common.init_weights(probe)
    probe.to(world.device)
    network = common.distribute(probe, world)
    optimizer = torch.optim.AdamW(common.parameter_groups(probe))
    make = functools.partial(make_probe_batch, replace(split, clips=c.probe_clips), c)
    loader = common.make_loader(make, common.micro_batches(c, world, 0, total), c, world)
    for step in range(total):
        lr = common.cosine_schedule(step, total, 1e-3, 0.0)
        decay = common.cosine_schedule(step, total, 0.001 if stills else 0.01, 1e-6)
        common.set_rates(optimizer, lr, decay)
        for _ in range(parts):
            indices, clips, bad = next(loader)
            split.count_bad(bad)
            with torch.no_grad(), world.autocast():
                tokens = encode(encoder, common.normalize(clips.to(world.device)))
            labels = split.labels[indices].to(world.device)
            loss = F.cross_entropy(network(tokens.flatten(1, 2)), labels)
            (loss / parts).backward()
        nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return probe


def probe_accuracy(probe, encoder, val, config, world):
    """Return the top-1 of a probe in percent, on rank 0: --probe-clips together, views averaged."""
    views = config.probe_views

    def score(clips):
        tokens = encode(encoder, clips).unflatten(1, (views, -1)).flatten(2, 3)  # [B, V, C*N, D]
        shares = probe(tokens.flatten(0, 1)).softmax(1)
        return shares.unflatten(0, (-1, views)).mean(1)

    shown = replace(val, clips=config.probe_clips, views=views)
    batch = max(1, 32 // (config.probe_clips * views))
    scores, labels, _ = common.extract(score, shown, config, world, batch)
    return common.top1(scores, labels) if world.rank == 0 else None


def knn_accuracy(read, train, val, config, world):
    """Return the top-1 of kNN in percent, on rank 0, on what `read` makes of clips."""
    bank, bank_labels, _ = common.extract(read, train, config, world)
    test, labels, _ = common.extract(read, val, config, world)
    return common.top1(common.knn(bank, bank_labels, test), labels) if world.rank == 0 else None


def pool(encoder, clips):
    """Return the features that kNN sees, [B, D]."""
    return encode(encoder, clips).mean((1, 2))


def evaluate(encoder, train, val, config, world, run):
    """Run probe and kNN on the encoder; kNN on a random one and on the first frame's pixels."""
    results = {"trained": {}}
    if "knn" in config.eval:
        random_encoder = build(config)[1].to(world.device).eval()
        readers = {"trained": functools.partial(pool, encoder)}
        readers["random"] = functools.partial(pool, random_encoder)
        readers["pixels"] = lambda clips: common.raw_pixels(clips[:, 0, 0])
        for name, read in readers.items():
            results[name] = {"knn": knn_accuracy(read, train, val, config, world)}
    if "probe" in config.eval:
        if config.probe_init:
            probe = load_probe(config.probe_init, config).to(world.device)
        else:
            probe = train_probe(encoder, train, config, world)
        results["trained"]["probe"] = probe_accuracy(probe, encoder, val, config, world)
    if world.rank == 0:
        run.report(results)


def write_features(encoder, split, config, world, run):
    """Write features.npz: features [N, D], labels [N] and names."""
    read = functools.partial(pool, encoder)
    features, labels, names = common.extract(read, split, config, world)
    if world.rank == 0:
        arrays = {"features": features.cpu(), "labels": labels.cpu(), "paths": names}
        np.savez(run.out / "features.npz", **arrays)
        common.note(f"{run.out / 'features.npz'}: {len(names)} videos")


# --------------------------------------------------------------------------------------------------
# Picture
# --------------------------------------------------------------------------------------------------


TILE = 96


def strip(frames):
    """Return eight frames of uint8 [T, 3, S, S], evenly spaced, as tiles."""
    shown = np.linspace(0, len(frames) - 1, 8).round()
    return F.interpolate(frames[shown], (TILE, TILE))


def draw_curves(curves):
    """Return tiles with curves [(x, y)]: possible in green, impossible in red; x in [0, 1]."""
    canvas = Image.new("RGB", (8 * TILE, TILE), "white")
    pen = ImageDraw.Draw(canvas)
    values = [y for curve in curves for _, y in curve]
    low = min(values)
    height = (TILE - 4) / (max(values) - low + 1e-9)
    for curve, colour in zip(curves, ("green", "red"), strict=True):
        points = [(8 * TILE * x, TILE - 2 - (y - low) * height) for x, y in curve]
        pen.line(points, fill=colour, width=2)
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
    return torch.stack(pixels.split(TILE, dim=2))


def draw_picture(path, split, shown, config):
    """Show a clip, what masks leave of it, and for each property a pair and its surprise over time.

    shown: of `evaluate_physics`. A window's surprise, from the shortest context, is drawn at the
    middle of what it predicts.
    """
    grid = grid_of(config)
    _, clips, _ = split.read_batch([0])
    clip = clips[0, 0, :: config.tubelet]  # [T', 3, S, S]
    rows = [strip(clip)]
    for visible in sample_masks(replace(config, micro=1, batch=1), 1)[::2]:
        seen = torch.zeros(1, math.prod(grid))
        seen[0, visible[0]] = 1
        seen = F.interpolate(seen.view(1, *grid), clip.shape[2:])[0]
        rows.append(strip(torch.where(seen[:, None] > 0, clip, 200).byte()))
    for pair, surprises in shown.values():
        curves = []
        for video, values in zip(pair, surprises, strict=True):
            middle = (physics_contexts(config)[0] + config.frames) / 2
            values = enumerate(values[0].tolist())
            curves.append([((middle + 2 * w) / len(video), y) for w, y in values])
            rows.append(strip(video))
        rows.append(draw_curves(curves))
    common.save_picture(path, torch.stack([common.normalize(row) for row in rows]))
    common.note(f"{path}: a clip, what masks leave of it; pairs of videos, and surprise at them")


# --------------------------------------------------------------------------------------------------
# Weights: ours and the authors'
# --------------------------------------------------------------------------------------------------

MODEL = "image_size frames patch tubelet width depth heads predictor_width predictor_depth".split()
MODEL += "rope target masks mask_blocks mask_scales".split()


def read_weights(path):
    """Read a checkpoint: state dicts `model` and `target`, and `fields` of Config.

    Ours, or the authors' with encoder, target_encoder and predictor. Theirs does not tell its
    fields: name its preset.
    """
    state = common.load_checkpoint(path)
    if "script" in state:
        state = common.load_own_checkpoint(path, "vjepa")
        state["fields"] = {name: state["config"][name] for name in MODEL}
        return state
    if "target_encoder" not in state or "predictor" not in state:
        found = ", ".join(list(state)[:8])
        fail(f"{path} is no V-JEPA checkpoint: no target_encoder and predictor, found {found}")
    model = rename(state["encoder"], "encoder.")
    model.update(rename(state["predictor"], "predictor."))
    return {"model": model, "target": rename(state["target_encoder"]), "fields": {}}


def rename(state, prefix=""):
    """Bring the authors' names to ours."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^predictor_(?=blocks|norm|pos_embed)", "", name)
        name = name.replace("patch_embed.proj.", "patch_embed.")
        if not name.endswith("rotary_emb.freqs"):
            renamed[prefix + name] = value
    return renamed


def load_networks(config, weights, path, world):
    """Return (model, target encoder) on the device, for evaluation; without weights fresh ones.

    Positions are fixed, so they are made for this config's clips. More frames than trained on: more
    rows. Another size: resampled, as released.
    """
    model, target = build(config)
    for module, key in ((model, "model"), (target, "target")):
        if not weights:
            break
        state = dict(weights[key])
        grid = grid_of(config)
        for name in [name for name in state if name.endswith("pos_embed")]:
            _, tokens, width = state[name].shape
            side = math.isqrt(tokens // grid[0])
            same = grid[0] * side**2 == tokens  # as many frames
            trained = (grid[0], side, side) if same else grid
            state[name] = resample_positions(sincos_3d(width, trained), trained, grid)
        common.load_state(module, state, path)
    return model.to(world.device).eval(), target.to(world.device).eval()


def load_encoder(path, **fields):
    """Return the frozen target encoder of a checkpoint: video [B, 3, T, H, W] -> tokens [B, N, D].

    fields: of Config, for a file of the authors, such as **PRESETS["vit_l16"].
    """
    weights = read_weights(path)
    config = Config(**{**fields, **weights["fields"]})
    return load_networks(config, weights, path, common.World())[1].requires_grad_(False)


def load_probe(path, config):
    """Return an official attentive probe: `classifier` with keys pooler.* and linear.*."""
    state = common.load_checkpoint(path).get("classifier", {})
    if "linear.weight" not in state:
        fail(f"{path} is no attentive probe: expected `classifier` with pooler.* and linear.*")
    weights = {}
    for name, value in state.items():
        name = re.sub(r"^(pooler\.|cross_attention_block\.|xattn\.)+", "", name)
        if not name.startswith("proj"):  # released, but never applied
            weights[name] = value
    probe = AttentiveProbe(config, len(state["linear.weight"]))
    common.load_state(probe, weights, path)
    return probe.eval()


# --------------------------------------------------------------------------------------------------
# Presets and main
# --------------------------------------------------------------------------------------------------

PAPER = {
    "data": "videomix2m",
    "image_size": 224,
    "step": 4,
    "patch": 16,
    "predictor_width": 384,
    "predictor_depth": 12,
    "align": False,
    "masks": "multiblock",
    "mask_blocks": (8, 2),
    "mask_scales": (0.15, 0.7),
    "crop_scale": (0.3, 1.0),
    "flip": True,
    "batch": 3072,
    "micro": 24,
    "steps": 90_000,
    "warmup": 40 / 300,
    "lr": 6.25e-4,
    "lr_start": 2e-4,
    "weight_decay_final": 0.4,
    "momentum": 0.998,
    "seed": 234,
    "log_every": 50,
    "workers": 12,
    "eval": "probe",
    "probe_clips": 8,
    "probe_views": 3,
}
BASE = {"width": 768, "depth": 12, "heads": 12}
LARGE = {"width": 1024, "depth": 24, "heads": 16}
HUGE = {"width": 1280, "depth": 32, "heads": 16}
# the physics paper's variant; its training code is not public: the schedule is the other paper's
ROPE = {**PAPER, "data": "howto100m", "rope": True, "seconds": 3.0, "eval": "physics"}
PRESETS = {
    "toy": {"steps": 1000, "precision": "fp32", "workers": 1},
    "folder": {  # any videos, ViT-S/16, one GPU
        **PAPER,
        "data": "folder",
        "width": 384,
        "depth": 12,
        "heads": 6,
        "predictor_width": 192,
        "predictor_depth": 6,
        "batch": 96,
        "steps": 0,
        "epochs": 100,
        "lr_start": 1e-4,
        "seed": 0,
        "eval": "knn",
        "probe_clips": 1,
        "probe_views": 1,
    },
    "vit_l16": {**PAPER, **LARGE},
    "vit_h16": {**PAPER, **HUGE},
    "vit_h16_384": {**PAPER, **HUGE, "image_size": 384, "batch": 2400, "micro": 10},
    "vit_b16_rope": {**ROPE, **BASE},
    "vit_l16_rope": {**ROPE, **LARGE},
    "vit_h16_rope": {**ROPE, **HUGE},
}
DATA_PRESETS = {"toy": "toy", "videomix2m": "vit_l16", "howto100m": "vit_l16_rope", "*": "folder"}


def check(config, world):
    """Refuse what would fail late or silently (exit 2)."""
    c = config
    if c.image_size % c.patch:
        fail(f"--image-size {c.image_size} is no multiple of --patch {c.patch}")
    if c.frames % c.tubelet or c.frames < 2 * c.tubelet:
        fail(f"--frames {c.frames} must be a multiple, at least twice, of --tubelet {c.tubelet}")
    for name, width in (("width", c.width), ("predictor-width", c.predictor_width)):
        if width % c.heads:
            fail(f"--{name} {width} is no multiple of --heads {c.heads}")
    kinds = {"multiblock", "causal", "random", "tube", "time"}
    known = {"physics", "knn", "probe", "features", "none"}
    if set(c.eval.split(",")) - known:
        fail(f"--eval {c.eval} must name some of {', '.join(sorted(known))}")
    if set(c.masks.split(",")) - kinds:
        fail(f"--masks {c.masks} must name some of {', '.join(sorted(kinds))}")
    if len(c.mask_blocks) != len(c.mask_scales):
        fail(f"--mask-blocks {c.mask_blocks} and --mask-scales {c.mask_scales} must be as many")
    if not c.train and not c.init:
        fail("--no-train needs weights to evaluate: add --init")
    if c.train and c.batch % (c.micro * world.size):
        ranks = f"{world.size} ranks with micro-batches of {c.micro}"
        fail(f"--batch {c.batch} does not divide over {ranks}: change --batch or --micro")
    if c.shard and world.dtype == torch.float16:
        fail("--shard works with bf16 and fp32, not with --precision fp16")
    if "physics" in c.eval and not physics_contexts(c):
        fail(f"--eval physics needs longer clips than --frames {c.frames}")
    if "physics" in c.eval and next(find_pairs(c), None) is None:
        fail(f"no videos of {c.physics} in --physics-data {c.physics_data}: see {c.physics}_pairs")


@common.command_line
def main(argv=None):
    """Train and evaluate; see --help."""
    config, typed = common.parse_config(Config, PRESETS, DATA_PRESETS, argv)
    path = config.init
    weights = None
    if path:
        weights = read_weights(path)
        config = common.adopt(config, weights["fields"], typed, path)
    world = common.start_world(config.device, config.precision)
    check(config, world)
    wanted = set(config.eval.split(","))
    val = None
    if config.train or wanted - {"physics", "none"}:
        train_split, val = open_data(config, ", ".join(sorted(wanted & {"knn", "probe"})))
        unseen = val or open_split(config, "val") or train_split
    model, target = load_networks(config, weights, path, world)
    if config.train:
        run = train(model, target, train_split, config, world)
        # what is evaluated is what was saved, in networks that are neither wrapped nor sharded
        path = run.out / "last.pt"
        weights = read_weights(path)
        _, target = load_networks(config, weights, path, world)
    else:
        run = common.Run(config, world)
    shown = {}
    if "physics" in wanted and world.rank == 0:
        frames = config.frames if config.physics == "toy" else PROTOCOLS[config.physics][0]
        physics = replace(config, frames=frames)
        networks = {"trained": load_networks(physics, weights, path, world)}
        networks["random"] = load_networks(physics, None, path, world)
        shown = evaluate_physics(networks, physics, world, run)
    if world.rank == 0 and config.train:
        draw_picture(run.out / "picture.png", unseen, shown, config)
    if "features" in wanted:
        write_features(target, unseen, config, world, run)
    if val:
        evaluate(target, train_split, val, config, world, run)


if __name__ == "__main__":
    main()
