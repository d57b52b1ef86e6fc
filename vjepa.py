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
from collections import defaultdict
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
from common import MLP, Block, extract, fail, gather_tokens, normalize, note

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
    rope: bool = False  # rotary positions and SwiGLU, the physics paper's model
    target: Literal["features", "pixels"] = "features"  # what is predicted; pixels: the control

    # masks
    masks: str = "multiblock,time"  # kinds: multiblock, causal, random, tube, time
    mask_blocks: tuple[int, ...] = (4,)  # multiblock and causal: blocks of each range
    mask_scales: tuple[float, ...] = (0.15,)  # area of a block of each range, share of the frame

    # clips
    step: int = 1  # every so many frames of the video
    seconds: float = 0  # length of a clip in seconds, wins over --step
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop, share of the frame
    flip: bool = False  # mirror half of the clips

    # optimisation
    align: bool = True  # the predictor's queries and keys start equal: short runs need it
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
    """Return [(name, blocks, scale)], one for each mask token: all --masks, in each range."""
    ranges = [*zip(config.mask_blocks, config.mask_scales, strict=True)]
    return [(name, *blocks) for name in config.masks.split(",") for blocks in ranges]


def block_size(step, side, scale):
    """Return (height, width) of a block in tokens, the same for all clips of a step.

    side: of the grid, in tokens; scale: the block's share of the frame. Its height is 0.75 to 1.5
    times its width.
    """
    # Seeded by the step alone, as in the released code: all its ranks agree. The first two draws
    # decide length and area, which are fixed in all configurations.
    u = torch.rand(3, generator=torch.Generator().manual_seed(step))[2].item()
    most = side * (side - 1)  # something stays visible
    area = max(1, min(most, int(side * side * scale)))
    ratio = 0.75 + u * 0.75
    height = min(side, round(math.sqrt(area * ratio)))
    return height, min(side, round(math.sqrt(area / ratio)))


def outside_blocks(uniform, size, side):
    """Return bool [B, side, side], the tokens in no block.

    uniform [B, blocks, 2]: places of the blocks in [0, 1). A block that would hide all that is left
    is left out.
    """
    height, width = size
    corners = (uniform * (side + 1 - torch.tensor(size))).long().tolist()
    visible = torch.ones(len(uniform), side, side, dtype=torch.bool)
    for i, blocks in enumerate(corners):
        for top, left in blocks:
            rest = visible[i].clone()
            rest[top : top + height, left : left + width] = False
            if rest.any():
                visible[i] = rest
    return visible


def cut(visible):
    """Turn bool [B, N] into indices: (visible [B, K], hidden [B, Kp]), ascending.

    Each is cut to the shortest of the micro-batch by keeping the first ones, as in the released
    code. So what is dropped are late frames.
    """
    lists = []
    for chosen in (visible, ~visible):
        shortest = int(chosen.sum(1).min())
        lists.append(torch.stack([row.nonzero()[:shortest, 0] for row in chosen]))
    return lists


def sample_masks(config, number):
    """Draw a micro-batch's masks: a list of visible [B, K] and hidden [B, Kp] of each kind."""
    c = config
    times, side, _ = grid_of(c)
    late = max(1, times * 3 // 4)  # where the last quarter of the clip begins
    draws = common.generator(c.seed, "masks", number)
    masks = []
    for name, blocks, scale in mask_kinds(c):
        visible = torch.ones(c.micro, times, side, side, dtype=torch.bool)
        if name == "time":  # the first eighth of the clip to three quarters of it
            known = 1 + int(torch.rand(1, generator=draws).item() * late)
            visible[:, known:] = False
        elif name in ("random", "tube"):  # hide 90 %
            count = (times if name == "random" else 1) * side * side
            order = torch.rand(c.micro, count, generator=draws).argsort(1)
            visible &= (order < max(1, count // 10)).view(c.micro, -1, side, side)
        else:
            size = block_size(number // (c.batch // c.micro), side, scale)
            uniform = torch.rand(c.micro, blocks, 2, generator=draws, dtype=torch.float64)
            visible &= outside_blocks(uniform, size, side)[:, None]
            if name == "causal":  # only the first three quarters of the clip are context
                visible[:, late:] = False
        masks += cut(visible.flatten(1))
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
    cube = table.unflatten(1, old).permute(0, 4, 1, 2, 3)  # [1, D, T, H, W]
    return F.interpolate(cube, new, mode="trilinear").flatten(2).transpose(1, 2)


def rotary(width, places, grid):
    """Return a function that turns queries and keys [B, H, N, width] of tokens at places [B, N].

    The channels are three groups, for time, row and column of the grid. In a group of a channels
    the pairs (2i, 2i+1) turn by position * 10000^(-2i/a). What is left over stays as it is.
    """
    a = width // 3
    channel = torch.arange(width, device=places.device)
    inside = channel % a
    sign = inside % 2 * 2 - 1  # of the sine: the first of a pair has -1, the second 1
    turned = (inside < a // 2 * 2) & (channel < 3 * a)
    frequencies = turned * 10000.0 ** (-(inside // 2) * 2 / a)
    position = torch.stack(torch.unravel_index(places, grid), dim=-1)  # [B, N, 3]
    angles = (position[..., channel // a % 3] * frequencies)[:, None]  # [B, 1, N, width]
    cosine = angles.cos()
    sine = angles.sin() * sign
    partner = (channel - sign) % width
    return lambda x: (x * cosine + x[..., partner] * sine).to(x.dtype)


class SwiGLU(MLP):
    """fc3(silu(fc1 x) * fc2 x)."""

    def __init__(self, width, hidden):
        super().__init__(width, hidden)
        self.fc2 = nn.Linear(width, hidden)
        self.fc3 = nn.Linear(hidden, width)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class Transformer(nn.Module):
    """Blocks that know where in the video each token is: what encoder and predictor share."""

    def __init__(self, config, inputs, width, depth):
        super().__init__()
        self.grid = grid_of(config)
        self.rope = config.rope
        self.heads = config.heads
        if not config.rope:  # a fixed table is no weight: checkpoints do without it
            self.register_buffer("pos_embed", sincos_3d(width, self.grid), persistent=False)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(depth))
        for block in self.blocks if config.rope else ():
            block.mlp = SwiGLU(width, 4 * width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.embed = nn.Linear(inputs, width)

    def run(self, x, places, grid, queries=slice(None)):
        """Run on tokens x [B, N, D] at places [B, N] of a grid: [B, N, D].

        queries: a slice, the tokens that the last block computes: [B, n, D].
        """
        turn = None
        if self.rope:
            turn = rotary(x.shape[2] // self.heads, places, grid)
        else:
            x = x + resample_positions(self.pos_embed, self.grid, grid)[0][places]
        for block in self.blocks[:-1]:
            x = block(x, turn=turn)
        return self.norm(self.blocks[-1](x, queries, turn))


def to_tubelets(video, tubelet, patch):
    """Cut videos [B, 3, T, H, W] into tubelets [B, T', H', W', 3*t*p*p], channel-major."""
    x = video.unfold(2, tubelet, tubelet)
    x = x.unfold(3, patch, patch)
    x = x.unfold(4, patch, patch)  # [B, 3, T', H', W', t, p, p]
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)


class Encoder(Transformer):
    """Vision transformer on tubelets: no class token, all tokens after the final norm."""

    def __init__(self, config):
        c = config
        super().__init__(c, 3 * c.tubelet * c.patch**2, c.width, c.depth)
        self.kernel = c.tubelet, c.patch

    def forward(self, video, keep=None):
        """Encode videos [B, 3, T, H, W] of any size: [B, N, D], in raster order.

        keep: the tokens to run on, int64 [B, K] -> [B, K, D].
        """
        x = to_tubelets(video, *self.kernel)
        grid = x.shape[1:4]
        x = x.flatten(1, 3)
        if keep is None:
            keep = torch.arange(x.shape[1], device=x.device)[None]
        x = self.embed(gather_tokens(x, keep))
        return self.run(x, keep, grid)


class Predictor(Transformer):
    """A narrow transformer that fills in hidden tokens from the visible ones."""

    def __init__(self, config):
        c = config
        width = c.predictor_width
        super().__init__(c, c.width, width, c.predictor_depth)
        # one for each kind of mask
        tokens = [torch.zeros(1, 1, width) for _ in mask_kinds(c)]
        self.mask_tokens = nn.ParameterList(tokens)
        out = 3 * c.tubelet * c.patch**2 if c.target == "pixels" else c.width
        self.proj = nn.Linear(width, out)

    def forward(self, tokens, context, hidden, kind):
        """Predict the tokens `hidden` [B, Kp]: [B, Kp, D].

        tokens [B, K, D]: those at `context` [B, K], encoded; kind: which mask token to use.
        """
        x = self.embed(tokens)
        queries = self.mask_tokens[kind].expand(len(x), hidden.shape[1], -1)
        x = torch.cat([x, queries.to(x.dtype)], dim=1)
        places = torch.cat([context, hidden], dim=1)
        return self.proj(self.run(x, places, self.grid, slice(tokens.shape[1], None)))


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

    def predict(self, video, context, hidden, kind):
        """Predict the tokens `hidden` [B, Kp] of a video from those of `context` [B, K]."""
        return self.predictor(self.encoder(video, context), context, hidden, kind)

    def forward(self, video, *masks):
        """video [B, 3, T, S, S], masks of `sample_masks` -> list of predictions [B, Kp, D]."""
        predictions = []
        for kind, hidden in enumerate(masks[1::2]):
            predictions.append(self.predict(video, masks[2 * kind], hidden, kind))
        return predictions


def build(config):
    """Return a fresh (model, target encoder). The target starts as a copy of the encoder."""
    torch.manual_seed(config.seed)
    model = VJEPA(config)
    return model, copy.deepcopy(model.encoder).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


def pixel_targets(video, config):
    """Return the control's targets, pixels [B, N, t*p*p*3] of a video [B, 3, T, H, W].

    Each colour of a tubelet is brought to mean 0 and std 1.
    """
    std = common.STD.view(3, 1).to(video.device)
    tubelets = to_tubelets(video, config.tubelet, config.patch).flatten(1, 3)
    pixels = tubelets.unflatten(2, (3, -1)) * std  # [B, N, 3, t*p*p]
    pixels = pixels - pixels[..., :1]  # else rounding counts where a tubelet is nearly flat
    spread = pixels.std(3, keepdim=True) + 1e-6
    pixels = (pixels - pixels.mean(3, keepdim=True)) / spread
    return pixels.transpose(2, 3).flatten(2)


def targets_of(target, video, config):
    """Return the targets [B, N, D] at all places: normed features, or pixels in the control."""
    if config.target == "pixels":
        return pixel_targets(video, config)
    tokens = target(video).float()
    return F.layer_norm(tokens, tokens.shape[-1:])


def vjepa_loss(predictions, wanted, hidden, pixels=False):
    """Mean over kinds of masks of the mean |prediction - target|; for pixels half the square.

    predictions: [B, Kp, D] of each kind; wanted [B, N, D]; hidden: int64 [B, Kp] of each kind.
    """
    losses = []
    for prediction, places in zip(predictions, hidden, strict=True):
        error = prediction.float() - gather_tokens(wanted, places)
        losses.append(error.square().mean() / 2 if pixels else error.abs().mean())
    return torch.stack(losses).mean()


# --------------------------------------------------------------------------------------------------
# The toy world: no frame, and no set of frames, says whether a video is possible
# --------------------------------------------------------------------------------------------------


PROPERTIES = ["permanence", "continuity", "shape", "colour", "solidity"]
SHAPES = ((24, 0), (4, 0), (3, 0), (3, 180))  # sides and turn: circle, square, two triangles
COLOURS = ("#dc3232", "#326ee6", "#f0c828", "#3cb450", "#aa50c8", "#f0f0f0")
SCREENS = ("#5a3c28", "#285050", "#50506e")
FLOOR = 27.0  # height of the floor, counted from the top of a frame of 32 x 32 pixels


def make_scene(name, draws):
    """Return a random scene, a function: [(phase, screen)] -> video uint8 [T, 3, 32, 32].

    A frame depends on two numbers only: its phase, and how far screens are up. Phases 0 and 1 are
    the scene's two states, those between are the visible change. Screens that are up (1) hide all
    that depends on the state.

    permanence: an object is there, or slides out of the picture. continuity: it is left, or hops
    over the gap between two screens. shape, colour: two objects that differ in it cross in the
    open. solidity: an object hops over a wall that sticks out above a wide screen.
    """
    r = draws.uniform(3.6, 4.6)  # radius
    middle = draws.uniform(13, 19)
    shapes = draws.sample(SHAPES, 2)
    colours = draws.sample(COLOURS, 2)
    screen_colour = draws.choice(SCREENS)
    sky, ground = (tuple(draws.choices(range(60, 180), k=3)) for _ in "12")
    # the second object differs from the first in one way
    second = (*shapes[name == "shape"], colours[name == "colour"])
    objects = [(*shapes[0], colours[0]), second]

    @functools.cache  # what is the same is the same bytes
    def frame(phase, screen):
        """Draw a frame, uint8 [32, 32, 3], at four times its size."""
        canvas = Image.new("RGB", (128, 128), sky)
        pen = ImageDraw.Draw(canvas)
        eased = phase * phase * (3 - 2 * phase)  # no jump in speed at either end

        def box(left, top, right, bottom, colour):
            pen.rectangle((4 * left, 4 * top, 4 * right, 4 * bottom), fill=colour)

        def thing(which, x, up=0.0):
            sides, turn, colour = objects[which]
            circle = (4 * x, 4 * (FLOOR - r - up), 4 * r)
            pen.regular_polygon(circle, sides, turn, fill=colour)

        box(0, FLOOR, 32, 32, ground)
        x = 8.5 + eased * 15  # from the left place to the right one
        centres = [8.5, 23.5]
        half = r + 1.3  # of a screen
        if name == "permanence":
            thing(0, middle + eased * (34 + r - middle))
            centres = [middle]
        elif name == "solidity":
            box(15, 13, 17, FLOOR, "#1e1e1e")
            # up first, then across: it clears the wall
            thing(0, x, up=17 * (1 - (2 * eased - 1) ** 6))
            centres = [16.0]
            half = 14.0
        else:
            if name != "continuity":
                thing(1, 32 - x)
            thing(0, x, up=4 * eased * (1 - eased) * (2 * r + 2))
        base = FLOOR + 2
        for centre in centres if screen else ():
            top = base - screen * (2 * r + 3.5)
            box(centre - half, top, centre + half, base, screen_colour)
        return np.asarray(canvas.reduce(4))

    def video(story):
        frames = np.stack([frame(*symbol) for symbol in story])
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    return video


def change(state, length=6):
    """Tell the visible change out of a state, in so many frames."""
    story = [((k + 1) / (length + 1), 0) for k in range(length)]
    return story[::-1] if state else story


def occlude(before, after, rise=2, full=4):
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
        possible = rest + occlude(a, a) + rest + change(a) + moved + occlude(b, b) + moved
        impossible = rest + occlude(a, b) + moved + change(b) + rest + occlude(a, b) + moved
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


def dice(*key):
    """Return Python's random numbers, seeded by a key."""
    return random.Random(common.generator(*key).initial_seed())


def clip_indices(length, frames, step, clips=1, overlap=False, draws=None):
    """Choose the frames of a video that make up its clips, int64 [clips, frames].

    The released sampler. Each of `clips` equal parts gives a clip: at a random place, or without
    `draws` the first one. A part that is too short repeats its last frame; with `overlap` clips
    overlap. First and last frame are both included, so steps are a little longer than `step`.
    """
    part = length // clips
    span = frames * step
    rows = []
    for i in range(clips):
        first = i * part
        reach = min(span, part)  # frames from the first one to the last
        if part > span and draws:
            first += draws.randrange(span, part) - span
        elif part <= span and overlap:
            first = max(0, length - span) // max(1, clips - 1) * i
            reach = min(span, length) - 1
        row = np.linspace(0, reach, reach // step)
        row = np.append(row, [reach] * (frames - len(row)))
        rows.append(first + row.clip(max=max(0, reach - 1)).astype(np.int64))
    return np.stack(rows)


def is_picture(path):
    """Tell whether a file is a picture, by its name."""
    return path.suffix.lower() in PICTURES


def list_frames(path):
    """Return (frames a second, list of frames in the order of showing), without decoding.

    path: a video, a folder of pictures, or a picture, which is a video of one frame.
    A frame of a video is (time stamp, is it a key frame). Where time stamps cannot be trusted, it
    is (0, False). A frame of a folder is a file.
    """
    files = common.files_below(path) if path.is_dir() else [path]
    pictures = list(filter(is_picture, files))
    if pictures:
        return 25, sorted(pictures, key=lambda file: (len(file.name), file))  # 9.jpg before 10.jpg
    with av.open(str(path)) as video:
        stream = video.streams.best("video")
        if stream is None:
            raise ValueError("no video in it")
        packets = [p for p in video.demux(stream) if p.size and not p.is_discard]
        keys = {p.pts: p.is_keyframe for p in packets}
        # AVI stores no times of showing
        guessed = video.format.name == "avi" or None in keys or len(keys) < len(packets)
        frames = [(0, False)] * len(packets) if guessed else sorted(keys.items())
        return float(stream.average_rate or 25), frames


def read_frames(path, frames, indices):
    """Read frames of `list_frames` by their numbers, int64 [...] -> uint8 [..., 3, H, W]."""
    wanted = sorted(set(indices.flat))
    if isinstance(frames[0], Path):
        found = {}
        for i in wanted:
            with Image.open(frames[i]) as image:
                found[i] = np.array(common.to_rgb(image, common.exif_turn(image)))
    else:
        found = decode(path, frames, wanted)
    pixels = torch.from_numpy(np.stack([found[i] for i in indices.flat]))
    return pixels.unflatten(0, indices.shape).movedim(-1, -3)


def decode(path, frames, wanted):
    """Decode frames of a video file: {number: uint8 [H, W, 3]}.

    frames: of `list_frames`; wanted: numbers, ascending. Starts at the last key frame before them.
    If another frame comes than was listed, opens the file again and counts from its start.
    """
    # one for all frames: each starts threads
    convert = av.video.reformatter.VideoReformatter().reformat
    keys = [i for i in range(wanted[0] + 1) if frames[i][1]]
    for start in (max(keys, default=0), 0):
        found = {}
        with av.open(str(path)) as video:
            stream = video.streams.best("video")
            # threads of its own would slow down loading processes, which share the cores
            stream.codec_context.thread_count = 1
            if start:
                video.seek(frames[start][0], stream=stream)
            for i, frame in enumerate(video.decode(stream), start):
                if start and frame.pts != frames[i][0]:
                    break
                if i in wanted:
                    found[i] = upright(frame, convert)
                if i == wanted[-1]:
                    return found
    raise ValueError("some of its frames cannot be decoded")


def upright(frame, convert):
    """Return a decoded frame as uint8 [H, W, 3], turned and mirrored by its display matrix.

    convert: the method `reformat` of a VideoReformatter.
    """
    pixels = convert(frame, format="rgb24").to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # (column, row) is shown at (a column + c row, b column + d row)
    a, b, _, c, d, *_ = np.sign(np.frombuffer(matrix, np.int32))
    if a:
        return pixels[::d, ::a]
    return pixels.swapaxes(0, 1)[::b, ::c]


def centre_crop(height, width, aspect):
    """Return (top, left, height, width) of the largest centre with width / height in `aspect`."""
    h = min(height, round(width / aspect[0]))
    w = min(width, round(height * aspect[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(height, width, scale, draws):
    """Draw a part of a frame, (top, left, height, width), in the released order of draws."""
    for _ in range(10):
        area = height * width * draws.uniform(*scale)
        ratio = math.exp(draws.uniform(math.log(0.75), math.log(1.35)))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            top = draws.randint(0, height - h)
            return top, draws.randint(0, width - w), h, w
    return centre_crop(height, width, (0.75, 1.35))


def crop_resize(frames, box, size):
    """Cut a box (top, left, height, width) out of frames [T, 3, H, W] and resize it: [T, 3, S, S].

    Bilinear without antialiasing, as released.
    """
    top, left, height, width = map(int, box)
    part = frames[..., top : top + height, left : left + width]
    return F.interpolate(part, (size, size), mode="bilinear")


@dataclass
class Videos(common.Split):
    """N videos: paths, or for the toy names of properties.

    clips: how many are read of each. view: what evaluation sees, None = the centre of a frame, or
    square 0, 1 or 2 along its longer side.
    """

    config: Config | None = None
    clips: int = 1
    view: int | None = None

    def read_clips(self, index, draws):
        """Return a video's clips, uint8 [C, T, 3, H, W]; draws: None = not random."""
        c = self.config
        video = self.images[index]
        if isinstance(video, str):
            draws = draws or dice("toy", self.names[index])
            scene = make_scene(video, draws)
            return torch.stack([scene(walk(draws, c.frames)) for _ in range(self.clips)])
        rate, frames = list_frames(video)
        step = max(1, int(c.seconds * rate / c.frames)) if c.seconds else c.step
        overlap = self.clips > 1 or draws is None
        indices = clip_indices(len(frames), c.frames, step, self.clips, overlap, draws)
        return read_frames(video, frames, indices)

    def read(self, index, choose, sizes, resample):
        """Return a list of one tensor: a video's clips, uint8 [C, T, 3, S, S].

        Training calls it with resample=None. Then choose() returns random numbers, and each clip
        has a crop of its own. `extract` calls it with a filter. Then choose(width, height) returns
        the centre.
        """
        c = self.config
        draws = choose() if resample is None else None
        parts = []
        for frames in self.read_clips(index, draws):
            height, width = frames.shape[-2:]
            if draws:
                box = random_crop(height, width, c.crop_scale, draws)
            elif self.view is None:
                (box,) = choose(width, height)
            else:
                top, left, side, _ = centre_crop(height, width, (1.0, 1.0))
                box = top * self.view, left * self.view, side, side
            part = crop_resize(frames, box, c.image_size)
            mirrored = draws and c.flip and draws.random() < 0.5
            parts.append(part.flip(-1) if mirrored else part)
        return [torch.stack(parts)]

    def read_batch(self, *args):
        """Read videos: (those read [B], uint8 [B, C, T, 3, S, S], unreadable files)."""
        found, clips, bad = super().read_batch(*args)
        if clips.dim() == 4:  # none could be read: black frames [B, 3, S, S] stand in
            clips = clips[:, None, None]
            clips = clips.repeat(1, self.clips, self.config.frames, 1, 1, 1)
        return found, clips, bad


def toy_videos(config, name):
    """Return the toy's `train` or `val` Videos."""
    videos = PROPERTIES * (300 if name == "train" else 100)
    labels = torch.arange(len(videos)) % len(PROPERTIES)
    names = [f"{name}/{i}" for i in range(len(videos))]
    return Videos(videos, names, labels, PROPERTIES, config=config)


HEADER = r'"?\w+[\s,"]+[A-Za-z_]\w*"?\s*'
LINE = r'\s*"?(.+?)"?[\s,]+"?(-?\d+)(\.0*)?"?\s*'


def read_lists(config, name):
    """Read lists `a.csv,b.csv` of `path label`, with a space, comma or tab between the two.

    Labels are known only where there is one list: the numbers of several mean different things.
    """
    lists = config.data if name == "train" else config.val
    if not lists:
        return None
    videos = []
    labels = []
    for path in lists.split(","):
        path = Path(path).expanduser()
        if not path.is_file():
            fail(f"no data at {path}: expected a list with one `path label` a line")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        for number, line in enumerate(lines, start=1):
            fields = re.fullmatch(LINE, line)
            if fields:
                videos.append(path.parent / fields[1])
                labels.append(int(fields[2]))
            elif line.strip() and (number > 1 or not re.fullmatch(HEADER, line)):
                fail(f"{path}, line {number}: expected `path label`, the label a number: {line}")
    if not videos:
        fail(f"no videos in {lists}: expected one `path label` a line")
    known = "," not in lists and min(labels) >= 0
    classes = [str(i) for i in range(max(labels) + 1)] if known else []
    names = list(map(str, videos))
    return Videos(videos, names, torch.tensor(labels), classes, config=config)


# a frame of a clip: train/CLASS/CLIP/0.jpg, or CLIP/0.jpg where there is no train
IN_CLIP = r"(train|val)/[^/]+/.+/[^/]+|(?!train/|val/).+/[^/]+"


def as_videos(split, config):
    """Turn a Split of files into Videos: a folder of pictures is one video.

    A picture in the data set's own folder, or in train/CLASS, is a video of one frame.
    """
    if split is None or isinstance(split, Videos):
        return split
    rows = {}
    for i, path in enumerate(split.images):
        in_clip = is_picture(path) and re.fullmatch(IN_CLIP, split.names[i])
        rows.setdefault(path.parent if in_clip else path, i)
    part = split.subset(list(rows.values()))
    part.images = list(rows)
    return Videos(**vars(part), config=config)


def open_data(config, wanted):
    """Return three Videos: to train on, to evaluate on, and not seen in training where possible.

    The second is None where there are no labels for what is `wanted`.
    """
    # common opens what is in TOYS by its name
    common.TOYS["toy"] = functools.partial(toy_videos, config)
    if config.data.endswith(".csv"):
        common.TOYS[config.data] = functools.partial(read_lists, config)
    return [as_videos(split, config) for split in common.open_data(config.data, wanted, "toy")]


def make_micro_batch(split, config, number):
    """Make micro-batch `number` of a run: (indices [B], clips, *masks, unreadable files).

    clips: uint8 [B, C, T, 3, S, S]. Everything depends on the seed and the number only.
    """
    c = config
    indices = common.micro_batch_indices(number, c.micro, len(split), c.seed)
    draw = functools.partial(dice, c.seed, "clips", number)
    found, clips, bad = split.read_batch(indices, draw, [c.image_size], None)
    return found, clips, *sample_masks(c, number), bad


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------

CLIP = 10.0  # largest gradient norm of encoder and of predictor


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
    pixels = config.target == "pixels"
    # DDP hides the parts that `model` has
    network = common.distribute(model, world, config, dynamic=True)
    target = common.distribute(target, world, config)
    groups = common.parameter_groups(model.encoder, model.predictor)
    optimizer = torch.optim.AdamW(groups, fused=True)
    ema = common.EMA(target, model.encoder)
    run = common.Run(config, world, split, network, optimizer, target=target)
    loader = run.loader(functools.partial(make_micro_batch, split, config))
    parts = config.batch // config.micro // world.size

    def clip():
        for module in model.children():
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)

    for step in run:
        lr, decay, momentum = schedules(config, step, run.steps)
        common.set_rates(optimizer, lr, decay)
        for part in range(parts):
            _, clips, *masks = run.next(loader, split)
            video = normalize(clips[:, 0]).transpose(1, 2)
            run.sync_gradients(part == parts - 1)
            with world.autocast():
                with torch.no_grad():
                    wanted = targets_of(target, video, config)
                loss = vjepa_loss(network(video, *masks), wanted, masks[1::2], pixels)
            run.backward(loss / parts)
        applied = run.update(clip if step >= config.warmup * run.steps else None)
        # the control's target is made of pixels, and its target encoder the encoder itself
        ema.update(0.0 if pixels else momentum, applied)
        run.log(functools.partial(common.spread, wanted), lr=lr, momentum=momentum)
    return run


# --------------------------------------------------------------------------------------------------
# Evaluate: intuitive physics, by violation of expectation (2502.11831)
# --------------------------------------------------------------------------------------------------

QUADRUPLETS = 20  # a property of the toy


def toy_pairs(config):
    """Draw two pairs of each scene, none of which training saw."""
    for name in PROPERTIES:
        for number in range(QUADRUPLETS):
            scene = make_scene(name, dice("physics", name, number))
            for pair in quadruplet():
                yield name, [scene(story) for story in pair]


def intphys_pairs(config):
    """Read O1/SCENE/1 to 4, with scene/*.png and status.json. Those that part last are a pair.

    Of 100 frames 49 are used, 0 to 96, as in the released evaluation.
    """
    for first in sorted(Path(config.physics_data).glob("**/O[123]/[!.]*/1")):
        scene = first.parent
        videos = [every(scene / part / "scene", slice(None, -2, 2)) for part in "1234"]
        states = [json.loads((scene / part / "status.json").read_text()) for part in "1234"]
        possible = [state["header"]["is_possible"] for state in states]
        for i, j in match_quadruplet(videos)[0]:
            if possible[i] == possible[j]:
                fail(f"{scene}: of its videos that begin alike, not one is possible and one not")
            pair = [videos[i], videos[j]]
            yield scene.parent.name, pair if possible[i] else pair[::-1]


def match_quadruplet(videos):
    """Return ([[0, j], [k, l]], the frames in which videos 1, 2, 3 part from video 0).

    The one that parts last is its match, the other two are the second pair.
    """
    parting = []
    for other in videos[1:]:
        same = (videos[0] == other).flatten(1).all(1)
        parting.append(int(same.int().cumprod(0).sum()))
    match = 1 + int(np.argmax(parting))
    return [[0, match], sorted({1, 2, 3} - {match})], parting


def grasp_pairs(config):
    """Read P_PROPERTY/*.mp4 and IP_PROPERTY/*.mp4; the same names make a pair."""
    for path in sorted(Path(config.physics_data).glob("**/P_*/[!.]*.mp4")):
        other = path.parent.with_name("I" + path.parent.name) / path.name
        tenth = slice(None, None, 10)
        yield path.parent.name[2:], [every(path, tenth), every(other, tenth)]


def inflevel_pairs(config):
    """Read PROPERTY/X__PROPERTY__X.mp4 in the pairs that csv files name.

    Frames count from the end of priming on. The longer video drops its first ones.
    """
    root = Path(config.physics_data)
    for path in sorted(root.glob("**/[!.]*.csv")):
        for row in csv.DictReader(path.open(newline=""), skipinitialspace=True):
            names = [Path(row[f"vid{i}_path"]).name for i in (1, 2)]
            starts = [int(float(row[f"vid{i}_end_priming_2"])) + 1 for i in (1, 2)]
            key = names[0].split("__")[1]
            videos = [root / key / name for name in names]
            lengths = [len(list_frames(video)[1]) for video in videos]
            shown = min(np.subtract(lengths, starts))
            yield key, [every(video, slice(-shown, None, 5)) for video in videos]


def every(path, part):
    """Read the frames of a video in a slice: uint8 [T, 3, H, W]."""
    _, frames = list_frames(path)
    return read_frames(path, frames, np.arange(len(frames))[part])


# Reader, frames a window, contexts, and the category that a word of a property's name stands for.
PROTOCOLS = {
    "toy": (toy_pairs, 16, range(4, 11, 2), {}),
    "intphys": (
        intphys_pairs,
        16,
        range(2, 11, 2),
        {"O1": "Permanence", "O2": "Shape", "O3": "Continuity"},
    ),
    "grasp": (
        grasp_pairs,
        16,
        range(2, 11, 2),
        {"Object": "Permanence", "Unchangeableness": "Colour"},
    ),
    "inflevel": (inflevel_pairs, 32, range(4, 21, 4), {"continuity": "permanence"}),
}


def physics_pairs(config):
    """Yield (property, [possible, impossible]) of --physics. A video that is missing is exit 2."""
    try:
        yield from PROTOCOLS[config.physics][0](config)
    except (OSError, LookupError, ValueError) as error:
        fail(f"--physics {config.physics} cannot be read: {error}")


@torch.no_grad()
def surprise(model, target, windows, contexts, config):
    """Return the error of the future predicted from the first frames, [K, W].

    windows [W, 3, T, S, S], normalised; contexts: K numbers of frames. The target encoder sees the
    whole window, the context comes from the student, as in the released evaluation.
    """
    # the mask token: that of masks that hide the future, if there are any
    kind = -1 if config.masks.endswith("time") else 0
    wanted = targets_of(target, windows, config)
    places = torch.arange(wanted.shape[1], device=wanted.device)[None]
    rows = []
    for context in contexts:
        known = context * wanted.shape[1] // windows.shape[2]
        predictions = model.predict(windows, places[:, :known], places[:, known:], kind)
        error = predictions.float() - wanted[:, known:]
        rows.append(error.abs().mean((1, 2)))
    return torch.stack(rows)


def video_surprise(model, target, video, contexts, config, world):
    """Return the surprise at a video, uint8 [T, 3, H, W]: every second window, float64 [K, W]."""
    length = config.frames
    if len(video) < length:
        fail(f"a video of {config.physics} has {len(video)} frames, less than a window of {length}")
    # InfLevel's wide frames are squashed, all others are cut to a square
    aspect = (0.5, 2.0) if config.physics == "inflevel" else (1.0, 1.0)
    box = centre_crop(*video.shape[-2:], aspect)
    frames = crop_resize(video.to(world.device).float(), box, config.image_size)
    windows = normalize(frames).unfold(0, length, 2)  # [W, 3, S, S, T]
    with world.autocast():
        rows = surprise(model, target, windows.permute(0, 1, 4, 2, 3), contexts, config)
    return rows.cpu().double()


def aggregate(surprise):
    """Return the mean and the largest over windows, [2, K + 1], of a surprise [K, W].

    The last context, "filtered", is the least surprised one of all in each window.
    """
    rows = torch.cat([surprise, surprise.amin(0, keepdim=True)])
    return torch.stack([rows.mean(1), rows.amax(1)])


def auroc(possible, impossible):
    """Return the share of all (possible, impossible) whose possible surprises less, ties half."""
    difference = impossible - possible[:, None]
    return ((difference.sign() + 1) / 2).mean().item()


def summarise(pairs, contexts):
    """Return one property's results in percent, from its pairs of surprises.

    Pairs right (mean surprise) at each context, filtered, and the best of them, with the 95 %
    interval of a bootstrap over pairs; AUROC of single videos (largest surprise, filtered).
    """
    both = torch.stack([torch.stack([aggregate(x) for x in pair]) for pair in pairs])
    mean, largest = both.unbind(2)  # [P, 2, K + 1]
    right = 100 * (mean[:, 0] < mean[:, 1]).double()  # [P, K + 1], ties are errors
    names = [*(f"context {c}" for c in contexts), "filtered"]
    result = dict(zip(names, right.mean(0).tolist(), strict=True))
    best = right[:, right.mean(0).argmax()]
    draws = np.random.default_rng(0).integers(len(best), size=(1000, len(best)))
    result["best"] = best.mean().item()
    result["from"], result["to"] = np.quantile(best[draws].mean(1), [0.025, 0.975])
    result["AUROC"] = 100 * auroc(*largest[:, :, -1].T)
    return result


def evaluate_physics(weights, config, world, run):
    """Measure the trained and a random network; print and log {name: {property: result}}.

    Returns {property: (first pair, the trained network's surprises at it)}.
    """
    _, length, contexts, categories = PROTOCOLS[config.physics]
    c = replace(config, frames=length)
    networks = {"trained": load_networks(c, weights, world)}
    networks["random"] = load_networks(c, None, world)
    surprises = defaultdict(list)
    shown = {}
    for key, pair in physics_pairs(c):
        for name, network in networks.items():
            seen = [video_surprise(*network, video, contexts, c, world) for video in pair]
            surprises[name, key].append(seen)
            shown.setdefault(key, (pair, seen))
    results = defaultdict(dict)
    for (name, key), pairs in surprises.items():
        results[name][key] = summarise(pairs, contexts)
    for name, rows in results.items():
        best = defaultdict(list)
        for key, row in rows.items():
            for word in ["mean", *re.findall(r"O\d|[A-Z]?[a-z]+", key)]:
                best[categories.get(word, word)].append(row["best"])
        note(f"surprise of the {name} network, {c.physics}: pairs right, chance is 50")
        means = {word: np.mean(values) for word, values in best.items()}
        run.report({**rows, "best": means})
    note("best: the highest over contexts, chosen on these videos, as the paper reports it")
    run.write(physics=results)
    return shown


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
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, width))
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        self.linear = nn.Linear(width, classes)
        common.init_weights(self)

    def pool(self, tokens):
        """[B, N, D] -> [B, 1, D]."""
        query = self.query_tokens.expand(len(tokens), -1, -1)
        q = self.q(query).view(len(query), self.heads, 1, -1)
        kv = self.kv(self.norm1(tokens)).unflatten(2, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)  # [B, H, N, D/H]
        query = query + common.attend(q, k, v).transpose(1, 2).flatten(2)
        return query + self.mlp(self.norm2(query))

    def forward(self, tokens):
        """[B, N, D] -> logits [B, classes]."""
        return self.linear(self.pool(tokens)[:, 0])


def encode(encoder, clips):
    """Return frozen tokens [B, C*N, D] of normalised clips [B, C, T, 3, S, S]."""
    videos = clips.flatten(0, 1).transpose(1, 2)
    return encoder(videos).float().unflatten(0, clips.shape[:2]).flatten(1, 2)


def pool(encoder):
    """Return a function of clips that returns what kNN sees, [B, D]."""
    return lambda clips: encode(encoder, clips).mean(1)


def train_probe(encoder, split, config, world):
    """Return an AttentiveProbe trained on the frozen encoder: AdamW, cosine, random clips."""
    stills = all(is_picture(Path(video)) for video in split.images)
    batch = min(1024 if stills else 256, len(split))
    micro = max(1, 16 // config.probe_clips)
    parts = max(1, batch // (micro * world.size))
    # never mirrored, as released: classes of SSv2 name directions
    c = replace(config, micro=micro, batch=parts * micro * world.size, flip=False)
    c.crop_scale = (0.08, 1.0)
    steps = max(1, c.probe_epochs * (len(split) // c.batch))
    torch.manual_seed(c.seed)
    probe = AttentiveProbe(c, len(split.classes)).to(world.device)
    network = common.distribute(probe, world)
    optimizer = torch.optim.AdamW(common.parameter_groups(probe))
    shown = replace(split, config=c, clips=c.probe_clips)
    make = functools.partial(make_micro_batch, shown, c)
    loader = common.make_loader(make, common.micro_batches(c, world, 0, steps), c, world)
    for step in range(steps):
        lr = common.cosine_schedule(step, steps, 1e-3, 0.0)
        decay = common.cosine_schedule(step, steps, 0.001 if stills else 0.01, 1e-6)
        common.set_rates(optimizer, lr, decay)
        for _ in range(parts):
            indices, clips, *_, bad = next(loader)
            split.count_bad(bad)
            with torch.no_grad(), world.autocast():
                tokens = encode(encoder, normalize(clips.to(world.device)))
            labels = split.labels[indices].to(world.device)
            loss = F.cross_entropy(network(tokens), labels) / parts
            loss.backward()
        nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return probe


def probe_accuracy(probe, encoder, val, config, world):
    """Return the top-1 of a probe in percent, on rank 0: --probe-clips together, views averaged."""

    def score(clips):
        return probe(encode(encoder, clips)).softmax(1)

    total = []
    for view in range(3) if config.probe_views == 3 else [None]:
        shown = replace(val, clips=config.probe_clips, view=view)
        batch = max(1, 32 // config.probe_clips)
        scores, labels, _ = extract(score, shown, config, world, batch)
        total.append(scores)
    return common.top1(sum(total), labels) if world.rank == 0 else math.nan


def evaluate(encoder, train, val, config, world, run):
    """Run probe and kNN on the encoder and on a random one, kNN on the first frame's pixels too."""
    networks = {"trained": encoder, "random": load_networks(config, None, world)[1]}
    networks["pixels"] = lambda videos: common.raw_pixels(videos[:, :, 0])[:, None]
    results = defaultdict(dict)
    for name, network in networks.items():
        if "knn" in config.eval:
            bank, bank_labels, _ = extract(pool(network), train, config, world)
            queries, labels, _ = extract(pool(network), val, config, world)
            if world.rank == 0:
                scores = common.knn(bank, bank_labels, queries)
                results[name]["knn"] = common.top1(scores, labels)
        if "probe" in config.eval and name != "pixels":
            if config.probe_init:
                probe = load_probe(config.probe_init, config).to(world.device)
            else:
                probe = train_probe(network, train, config, world)
            results[name]["probe"] = probe_accuracy(probe, network, val, config, world)
    run.report(results)


# --------------------------------------------------------------------------------------------------
# Picture
# --------------------------------------------------------------------------------------------------


TILE = 96


def strip(frames):
    """Return eight frames of uint8 [T, 3, S, S], evenly spaced, as tiles."""
    shown = np.linspace(0, len(frames) - 1, 8).round()
    return F.interpolate(frames[shown], (TILE, TILE))


def draw_curves(possible, impossible):
    """Return tiles with the areas below two curves [W]: green and red, black where both are."""
    curves = torch.stack([impossible, possible])[None]
    heights = F.interpolate(curves, 8 * TILE, mode="linear")[0]  # [2, 8 * TILE]
    low, high = heights.aminmax()
    rows = torch.linspace(high, low, TILE)[:, None]
    # true above a curve, where the picture is white: each [TILE, 8 * TILE]
    red, green = rows > heights[:, None]
    canvas = torch.stack([green, red, red & green]).byte() * 255
    return torch.stack(canvas.split(TILE, dim=2))


def draw_picture(path, split, shown, config):
    """Show a clip, what masks leave of it, and for each property a pair and its surprise over time.

    shown: of `evaluate_physics`. The curves show the surprise with the shortest context, from the
    first window to the last.
    """
    times, side, _ = grid_of(config)
    _, clips, *masks, _ = make_micro_batch(split, replace(config, micro=1, batch=1), 1)
    clip = clips[0, 0, :: config.tubelet]  # [T', 3, S, S]
    rows = [strip(clip)]
    for visible in masks[::2]:
        seen = torch.zeros(times * side * side)
        seen[visible[0]] = 1
        seen = F.interpolate(seen.view(times, 1, side, side), clip.shape[2:])
        rows.append(strip(torch.where(seen > 0, clip, 200).byte()))
    for pair, surprises in shown.values():
        rows += [strip(video) for video in pair]
        rows.append(draw_curves(*(values[0] for values in surprises)))
    common.save_picture(path, torch.stack([normalize(row) for row in rows]))
    note(f"{path}: a clip, what masks leave of it; pairs of videos, and surprise at them")


# --------------------------------------------------------------------------------------------------
# Weights: ours and the authors'
# --------------------------------------------------------------------------------------------------

MODEL = [*Config.__annotations__][3:17]  # image_size to mask_scales: what decides the weights


def read_weights(path):
    """Read a checkpoint: state dicts `model` and `target`, and `fields` of Config.

    Ours, or the authors' with encoder, target_encoder and predictor. Theirs does not tell its
    fields: name its preset.
    """
    state = common.load_checkpoint(path, "vjepa")
    if "script" in state:
        return {**state, "fields": {name: state["config"][name] for name in MODEL}}
    if "target_encoder" not in state or "predictor" not in state:
        common.refuse(path, "V-JEPA: expected target_encoder and predictor", state)
    model = rename(state["encoder"], "encoder.")
    model.update(rename(state["predictor"], "predictor."))
    return {"model": model, "target": rename(state["target_encoder"]), "fields": {}}


# what the authors' names have more than ours
MORE = r"^predictor_|^patch_(?=embed)|(?<=embed)\.proj|^(pooler\.|cross_attention_block\.|xattn\.)+"
UNUSED = r"pos_embed|rotary_emb|xattn\.proj"  # positions are computed, the last is never applied


def rename(state, prefix=""):
    """Bring the authors' names to ours. Their patch projection is a convolution, ours a Linear."""
    renamed = {}
    for name, value in state.items():
        if not re.search(UNUSED, name):
            name = prefix + re.sub(MORE, "", name)
            renamed[name] = value.flatten(1) if value.dim() == 5 else value
    return renamed


def load_networks(config, weights, world):
    """Return (model, target encoder) on the device, for evaluation; without weights fresh ones.

    Positions are not weights: they are made for this config's clips, as in the released code.
    """
    model, target = build(config)
    if weights:
        common.load_state(model, weights["model"], "the checkpoint (encoder and predictor)")
        common.load_state(target, weights["target"], "the checkpoint (target encoder)")
    return [network.to(world.device).eval() for network in (model, target)]


def load_probe(path, config):
    """Return an official attentive probe: `classifier` with keys pooler.* and linear.*."""
    state = common.load_checkpoint(path).get("classifier", {})
    if "linear.weight" not in state:
        fail(f"{path} is no attentive probe: expected `classifier` with pooler.* and linear.*")
    probe = AttentiveProbe(config, len(state["linear.weight"]))
    common.load_state(probe, rename(state), path)
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
    "workers": 12,
    "eval": "probe",
    "probe_clips": 8,
    "probe_views": 3,
}
LARGE = {"width": 1024, "depth": 24, "heads": 16}
HUGE = {"width": 1280, "depth": 32, "heads": 16}
# the physics paper's variant; its training code is not public: the schedule is the other paper's
ROPE = {**PAPER, "data": "howto100m", "rope": True, "seconds": 3.0, "eval": "physics"}
PRESETS = {
    "toy": {"steps": 1000, "precision": "fp32", "workers": 1},
    "folder": {  # any videos, ViT-S/16, one GPU
        **PAPER,
        "width": 384,
        "depth": 12,
        "heads": 6,
        "predictor_width": 192,
        "predictor_depth": 6,
        "batch": 96,
        "steps": 0,
        "epochs": 100,
        "eval": "knn",
    },
    "vit_l16": {**PAPER, **LARGE},
    "vit_h16": {**PAPER, **HUGE},
    "vit_h16_384": {**PAPER, **HUGE, "image_size": 384, "batch": 2400, "micro": 10},
    "vit_b16_rope": {**ROPE, "width": 768, "depth": 12, "heads": 12},
    "vit_l16_rope": {**ROPE, **LARGE},
    "vit_h16_rope": {**ROPE, **HUGE},
}
DATA_PRESETS = {"toy": "toy", "videomix2m": "vit_l16", "howto100m": "vit_l16_rope", "*": "folder"}


def check(config, world):
    """Refuse what would fail late or silently (exit 2)."""
    common.check(config, world, ("physics", "knn", "probe", "features"))
    c = config
    if c.frames % c.tubelet or c.frames < 2 * c.tubelet:
        fail(f"--frames {c.frames} must be a multiple, at least twice, of --tubelet {c.tubelet}")
    kinds = {"multiblock", "causal", "random", "tube", "time"}
    if set(c.masks.split(",")) - kinds:
        fail(f"--masks {c.masks} must name some of {', '.join(sorted(kinds))}")
    if len(c.mask_blocks) != len(c.mask_scales):
        fail(f"--mask-blocks {c.mask_blocks} and --mask-scales {c.mask_scales} must be as many")
    if "physics" in c.eval:
        if c.frames < 16:
            fail(f"--eval physics needs clips of 16 --frames or more, not {c.frames}")
        if not next(physics_pairs(c), None):
            fail(f"no videos of {c.physics} in --physics-data {c.physics_data}: see its reader")


@common.command_line
def main(argv=None):
    """Train and evaluate; see --help."""
    config, typed = common.parse_config(Config, PRESETS, DATA_PRESETS, argv)
    weights = None
    if config.init:
        weights = read_weights(config.init)
        config = common.adopt(config, weights["fields"], typed, config.init)
    world = common.start_world(config.device, config.precision)
    check(config, world)
    wanted = set(config.eval.split(","))
    val = None
    if config.train or wanted - {"physics", "none"}:
        labelled = ", ".join(sorted(wanted & {"knn", "probe"}))
        train_split, val, unseen = open_data(config, labelled)
    model, target = load_networks(config, weights, world)
    if config.train:
        run = train(model, target, train_split, config, world)
        # what is evaluated is what was saved, in networks that are neither wrapped nor sharded
        weights = read_weights(run.out / "last.pt")
        _, target = load_networks(config, weights, world)
    else:
        run = common.Run(config, world)
    if world.rank == 0:
        shown = evaluate_physics(weights, config, world, run) if "physics" in wanted else {}
        if config.train:
            draw_picture(run.out / "picture.png", unseen, shown, config)
    if "features" in wanted:
        common.write_features(pool(target), unseen, config, world, run)
    if val:
        evaluate(target, train_split, val, config, world, run)


if __name__ == "__main__":
    main()
