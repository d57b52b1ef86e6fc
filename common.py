# SPDX-License-Identifier: MIT
"""What all ten scripts need and no paper is about: the parts of a vision transformer, and the plumbing of a run.

In order: positions, layers, ViT, EMA, schedules, ranks, randomness, config, checkpoints, log, toy images.
Imports no script. Shape letters: B batch, N tokens, K kept tokens, D width, H heads, G side of the patch grid.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import inspect
import json
import math
import os
import re
import resource
import shlex
import signal
import sys
import threading
import time
import typing
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------------------------------


def sincos_1d(width, positions):
    """Sine-cosine embedding of real positions: [sin(p w_j) | cos(p w_j)], w_j = 10000^(-j / (width/2)).

    positions: array [N] -> float64 tensor [N, width]; width must be even.
    """
    omega = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(np.asarray(positions, dtype=np.float64), omega)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))


def sincos_2d(width, height, breadth):
    """Positions of a height x breadth grid in raster order -> float64 [height*breadth, width]; width divisible by 4.

    The first half encodes the column and the second the row, as in MAE and everything that descends from it.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, not {width}")
    row, column = np.mgrid[:height, :breadth].reshape(2, -1)
    return torch.cat([sincos_1d(width // 2, column), sincos_1d(width // 2, row)], dim=1)


def sincos_3d(width, frames, height, breadth):
    """Positions of a (time, row, column) grid in raster order -> float64 [frames*height*breadth, width].

    Each axis gets 2*ceil(width/6) columns and the whole is cut to `width` (V-JEPA's `uniform_power`).
    """
    axis = 2 * math.ceil(width / 6)
    grid = np.mgrid[:frames, :height, :breadth].reshape(3, -1)
    return torch.cat([sincos_1d(axis, positions) for positions in grid], dim=1)[:, :width]


def interpolate_positions(table, old, new):
    """Resample a position table to another grid, bicubic: table [1, N, D], old, new (rows, columns) -> [1, N', D]."""
    if tuple(old) == tuple(new):
        return table
    grid = table.float().unflatten(1, tuple(old)).permute(0, 3, 1, 2)  # [1, D, G, G]
    grid = F.interpolate(grid, size=tuple(new), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(table.dtype)


def gather_tokens(x, keep):
    """Pick tokens: x [B, N, D], keep int64 [B, K] -> [B, K, D]; keep [M, B, K] (M masks) -> [M*B, K, D], mask-major."""
    picked = x[torch.arange(x.shape[0], device=x.device)[:, None], keep]
    return picked if keep.dim() == 2 else picked.flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Layers. Parameter names are timm's, which nearly all released checkpoints use.
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention, fused. qkv is one Linear whose rows are [queries | keys | values]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, queries=None):
        """x [B, N, D] -> [B, N, D]; with queries=n only the last n tokens ask (all are attended to): [B, n, D]."""
        batch, tokens, width = x.shape
        if queries is None:
            q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, N, D/H]
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q, kv = F.linear(x[:, -queries:], weight[:width], bias[:width]), F.linear(x, weight[width:], bias[width:])
            q = q.view(batch, queries, self.heads, -1).transpose(1, 2)
            k, v = kv.view(batch, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, -1, width))


class CrossAttention(nn.Module):
    """Multi-head attention of x on a context, fused. x [B, N, D], context [B, M, D] -> [B, N, D]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, context):
        """x [B, N, D], context [B, M, D] -> [B, N, D]."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), w1 and w2 in one Linear; 2/3 of `hidden`, rounded up to 8s, keeps the cost of an MLP."""

    def __init__(self, width, hidden):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch (CaiT)."""

    def __init__(self, width, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(init)))

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return x * self.gamma


def stochastic_depth(branch, rate, uniform):
    """Drop a residual branch for some samples: branch [B, N, D], uniform [B] in [0, 1); the kept times 1/(1-rate)."""
    return branch * ((uniform >= rate).to(branch.dtype) / (1 - rate))[:, None, None]


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads, layer_scale=None, drop_path=0.0, swiglu=False):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = (SwiGLU if swiglu else MLP)(width, 4 * width)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x, drop=None, queries=None):
        """x [B, N, D] -> [B, N, D]; with queries=n only the last n tokens are computed: [B, n, D].

        drop: uniforms [2, B] for stochastic depth (the caller draws them, so that they depend on step and sample only).
        """
        attended = self.ls1(self.attn(self.norm1(x), queries))
        if queries is not None:
            x = x[:, -queries:]
        if drop is None or not self.drop_path:
            x = x + attended
            return x + self.ls2(self.mlp(self.norm2(x)))
        x = x + stochastic_depth(attended, self.drop_path, drop[0])
        return x + stochastic_depth(self.ls2(self.mlp(self.norm2(x))), self.drop_path, drop[1])


class PatchEmbed(nn.Module):
    """Patches (or, with `tubelet`, space-time tubelets) to tokens: a strided convolution, computed as one Linear.

    So it can run on the visible patches alone; the weight keeps the convolution's shape, as checkpoints have it.
    """

    def __init__(self, patch, width, channels=3, tubelet=None):
        super().__init__()
        self.kernel = (patch, patch) if tubelet is None else (tubelet, patch, patch)
        convolution = nn.Conv2d if tubelet is None else nn.Conv3d
        self.proj = convolution(channels, width, kernel_size=self.kernel, stride=self.kernel)

    def patchify(self, x):
        """[B, C, H, W] -> [B, N, C*p*p], or [B, C, T, H, W] -> [B, N, C*t*p*p]; tokens in raster order.

        What is left over at the right and bottom, where a side is no multiple of the patch, is cut off.
        """
        for axis, k in enumerate(self.kernel, start=2):
            x = x.narrow(axis, 0, x.shape[axis] // k * k)
        sizes = [part for side, k in zip(x.shape[2:], self.kernel) for part in (side // k, k)]
        n = len(self.kernel)
        x = x.reshape(*x.shape[:2], *sizes).permute(0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2))
        return x.flatten(1, n).flatten(2)

    def forward(self, patches):
        """patches [B, N, C*p*p] -> tokens [B, N, D]."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def init_weights(module, std=0.02):
    """For `module.apply`: Linear and convolution weights normal(0, std), their biases 0, LayerNorm 1 and 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Vision transformer (pre-norm; fixed sin-cos or learned positions; a class token if asked for).

    image_size, patch: pixels. The forward pass returns all tokens after the final norm, in the order [class | patches].
    """

    def __init__(self, image_size, patch, width, depth, heads, class_token=False, learned_positions=False):
        super().__init__()
        if image_size % patch or width % heads:
            sizes = f"image size {image_size} must be a multiple of the patch {patch}"
            raise ValueError(f"{sizes}, width {width} of the heads {heads}")
        self.grid = (image_size // patch, image_size // patch)
        self.width = width
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        table = sincos_2d(width, *self.grid).float()
        if class_token:
            table = torch.cat([torch.zeros(1, width), table])
        # a parameter even where it is fixed: in the state dict, as checkpoints have it
        self.pos_embed = nn.Parameter(table[None], requires_grad=learned_positions)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights)
        for tokens in (self.cls_token, self.pos_embed if learned_positions else None):
            if tokens is not None:
                nn.init.normal_(tokens, std=0.02)

    def embed(self, x, keep=None):
        """What enters the first block: [class | patches], positions added. Arguments as in `forward`."""
        grid = self.grid
        if x.dim() > 3:
            grid = tuple(side // k for side, k in zip(x.shape[2:], self.patch_embed.kernel))
            x = self.patch_embed.patchify(x)
        special = 0 if self.cls_token is None else 1
        positions = self.pos_embed[:, special:]
        if grid != self.grid:
            positions = interpolate_positions(positions, self.grid, grid)
        if keep is None:
            x = self.patch_embed(x) + positions
        else:
            x = self.patch_embed(gather_tokens(x, keep)) + positions[0][keep.flatten(0, -2)]
        if self.cls_token is None:
            return x
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], dim=1)

    def forward(self, x, keep=None, layers=None, drop=None):
        """Tokens after the final norm.

        x: images [B, C, H, W], or patches [B, N, C*p*p] of `patch_embed.patchify`, for encoders to share
        keep: int64 [B, K] or [M, B, K], indices of the patches to run on -> [B, K, D] or [M*B, K, D]; None runs on all
        layers: block indices (negative from the end) -> a list of their outputs, each after the final norm
        drop: uniforms [depth, 2, B] for stochastic depth, at the rates that the blocks have
        """
        x = self.embed(x, keep)
        wanted = None if layers is None else [layer % len(self.blocks) for layer in layers]
        outputs = {}
        for i, block in enumerate(self.blocks):
            x = block(x, None if drop is None else drop[i])
            if wanted and i in wanted:
                outputs[i] = self.norm(x)
        return self.norm(x) if wanted is None else [outputs[i] for i in wanted]


class EMA:
    """Exponential moving average of a model's trainable parameters: target = m target + (1 - m) source."""

    def __init__(self, target, source):
        self.groups = {}
        for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
            if theirs.requires_grad:
                targets, sources = self.groups.setdefault(ours.dtype, ([], []))
                targets.append(ours)
                sources.append(theirs)
        target.requires_grad_(False)

    @torch.no_grad()
    def update(self, momentum, applied=None):
        """One multi-tensor launch per dtype. applied: 0-dim tensor, 0 if the optimizer skipped the step: nothing moves.

        With `applied` it takes three launches: a weight that only the device knows cannot be an argument of a lerp.
        """
        for targets, sources in self.groups.values():
            if applied is None:
                torch._foreach_lerp_(targets, sources, 1 - momentum)
            else:
                change = torch._foreach_sub(sources, targets)
                torch._foreach_mul_(change, (1 - momentum) * applied.to(change[0].dtype))
                torch._foreach_add_(targets, change)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of the step, so that resuming needs only its number
# ---------------------------------------------------------------------------------------------------------------------


def linear_schedule(step, total, start, final):
    """From start at step 0 to final at step `total`, in a line."""
    return start + (final - start) * step / max(1, total)


def cosine_schedule(step, total, start, final):
    """From start at step 0 to final at step `total` and after, along half a cosine."""
    return final + (start - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


def warmup_cosine_schedule(step, total, warmup, start, peak, final):
    """Linear from start to peak over `warmup` steps, then a cosine to final at `total`."""
    if step < warmup:
        return linear_schedule(step, warmup, start, peak)
    return cosine_schedule(step - warmup, total - warmup, peak, final)


def parameter_groups(*modules):
    """Optimizer groups: each module's decayed parameters, then each module's undecayed ones (biases, 1-D tensors).

    A group carries `decay`, a bool. Parameters that need no gradient are left out.
    """
    groups = []
    for decay in (True, False):
        for module in modules:
            named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
            members = [p for n, p in named if (p.dim() > 1 and "bias" not in n) == decay]
            groups.append({"decay": decay, "params": members})
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Ranks and randomness
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """Where this process stands: rank of size, and the device it computes on."""

    rank: int
    size: int
    device: torch.device


def start_world(device="", timeout=None):
    """Join the process group that torchrun describes, if any, or run alone. device: cuda | mps | cpu, '' = best.

    timeout: a timedelta, how long ranks wait for one another, default torch's.
    """
    if not device:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device not in ("cuda", "mps", "cpu"):
        fail(f"--device {device!r} is not one of cuda, mps, cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        fail("--device mps, but this is no Mac whose GPU torch can use; use --device cpu")
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but this machine has no CUDA device that torch can see; use --device cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = True
        device = f"cuda:{torch.cuda.current_device()}"
    if "RANK" in os.environ and not dist.is_initialized():
        # torchrun keeps its store when it restarts: without a prefix a quick rank finds the address of one that died
        store, rank, size = next(rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    joined = dist.is_initialized()
    return World(dist.get_rank() if joined else 0, dist.get_world_size() if joined else 1, torch.device(device))


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient / dist.get_world_size()


def mean_over_ranks(x):
    """Mean of a tensor over ranks, differentiable: with DDP's averaging, the gradients are those of one big batch."""
    return _MeanOverRanks.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def gather_over_ranks(x):
    """Concatenate tensors of all ranks along the first axis, in rank order; lengths may differ. Not differentiable."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    length = torch.tensor([len(x)], device=x.device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    lengths = [int(n) for n in lengths]
    padded = F.pad(x, [0, 0] * (x.dim() - 1) + [0, max(lengths) - len(x)])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:n] for part, n in zip(parts, lengths)])


def ignore_signals(worker):
    """For DataLoader: Ctrl-C and schedulers signal a run's loading processes too, but when to stop is for it to say.

    Its own SIGTERM, the last means of ending them, is obeyed, where the system tells whose it is (macOS does not).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = os.getppid()

        def obey():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
                pass
            os._exit(0)

        threading.Thread(target=obey, daemon=True).start()


def distribute(model, world, shard=False):
    """Wrap for all ranks: DDP, or with `shard` FSDP2, block by block. Alone, or with nothing to train: as it is."""
    if shard:
        for module in model.modules():
            if isinstance(module, Block):
                fully_shard(module)
        return fully_shard(model)
    if world.size == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def no_sync(model, last):
    """A context for one of several backward passes of a step: gradients are exchanged in the last one only."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last)
    return model.no_sync() if not last and hasattr(model, "no_sync") else contextlib.nullcontext()


def gradient_norm(parameters):
    """L2 norm of all gradients as a 0-dim tensor on the device, over all shards where they are sharded."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def effective_rank(features):
    """exp of the entropy of the normalised singular values of centred features [B, D]: 1 (collapsed) to min(B, D)."""
    values = torch.linalg.svdvals((features - features.mean(0)).float())
    p = values / values.sum().clamp(min=1e-12)
    return torch.exp(torch.special.entr(p).sum())


def memory_gib(device):
    """Peak memory so far in GiB: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError, TypeError):  # Linux; its getrusage counts what started this process too
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


def generator(*key, device="cpu"):
    """A torch.Generator seeded by a key such as (seed, "crop", step, sample): same key, same draws, anywhere."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def send(x, device):
    """x on the device, where the host does not wait for what the device still has to do."""
    return x.to(device, non_blocking=True)


@functools.lru_cache
@torch.inference_mode(False)
def constant(values, device):
    """A tensor of these numbers, made once: to copy them to an accelerator at each step would make the host wait."""
    return torch.tensor(values, device=device)


def worker_count(config, world, streaming):
    """Loading processes a rank: --workers, or as many as the machine has cores; none where the data are in memory
    and on the CPU, since a step's draws cost less than a process."""
    if config.workers >= 0:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(12, cores // ranks)) if streaming else int(world.device.type == "cuda")


def choose_precision(name, device):
    """'bf16' | 'fp16' | 'fp32' | '' (bf16 where the hardware computes in it, else fp32) -> torch dtype."""
    if not name:
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
        else:
            fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
            name = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


# ---------------------------------------------------------------------------------------------------------------------
# Config and errors
# ---------------------------------------------------------------------------------------------------------------------


def fail(message, code=2):
    """Print one line that a newcomer can act on, and leave with this exit code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def fail_if_full(error):
    """For an OSError that nothing else has answered: exit 1 if it says that the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fail(f"the disk is full: {error}; what was saved before is intact. Free some space, then --resume.", code=1)


def nearest(word, words):
    """'; did you mean a, b?' for a mistyped word, or '.' where nothing comes near."""
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else "."


POSITIVE = "batch accumulate image_size patch width depth heads log_every save_every eval_batch probe_batch".split()
NOT_NEGATIVE = "steps epochs lr lr_start lr_final warmup weight_decay cache max_bad".split()


def parse_config(config_class, presets, data_presets, argv=None, description=None):
    """Command line -> config. Each dataclass field is a flag, the comment beside it its help; flags override presets.

    presets: {name: {field: value}}; data_presets: {data name: preset name}, "*" for any other data.
    Exits with 2 for an unknown flag or preset, naming the nearest known ones, and for a value that no run can have.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    comments = dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(config_class), re.MULTILINE))
    hints = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class)}

    def flag(name):
        return "--" + name.replace("_", "-")

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.error = fail  # one line, as for all other errors, and not the usage of a hundred flags
    early.add_argument("--preset")
    early.add_argument("--data")
    first, _ = early.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    name = first.preset or data_presets.get(first.data or fields["data"].default, data_presets["*"])
    if name not in presets:
        fail(f"unknown preset {name!r}{nearest(name, presets)} Known: {', '.join(presets)}.")
    defaults = {n: f.default for n, f in fields.items()} | presets[name] | {"preset": name}

    parser = argparse.ArgumentParser(
        usage="%(prog)s [--preset NAME] [--data NAME or PATH] [--FLAG VALUE ...]", description=description,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.error = fail
    for field, hint in hints.items():
        text = comments.get(field, "").replace("%", "%%") + f" [{str(defaults[field]).replace('%', '%%')}]"
        options = {"help": text, "default": defaults[field]}
        if field == "preset":
            options["help"] = f"one of {', '.join(presets)} [{name}]"
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            # tuple[float, float] takes two values, tuple[float, ...] any number
            kind, *rest = typing.get_args(hint) or (hint,)
            options |= {"type": kind, "metavar": kind.__name__.upper()}
            if rest:
                options["nargs"] = "*" if rest[-1] is ... else 1 + len(rest)
        parser.add_argument(flag(field), **options)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
        fail(f"unknown argument {word}{nearest(word, [flag(f) for f in fields])} --help lists all.")
    for field, value in vars(args).items():
        if isinstance(value, float) and math.isnan(value):
            fail(f"{flag(field)} is not a number")
        if field in POSITIVE and value < 1 or field in NOT_NEGATIVE and value < 0:
            fail(f"{flag(field)} {value} is below {int(field in POSITIVE)}")
    place = Path(getattr(args, "features_out", "")).parent
    if not place.is_dir():
        fail(f"--features-out {args.features_out}: there is no folder {place}")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items()})


def given_flags(argv):
    """The names of the fields that the command line sets itself: {'steps', 'out', ...}."""
    return {a[2:].split("=")[0].removeprefix("no-").replace("-", "_") for a in argv if a.startswith("--")}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def full_state(model, optimizer=None):
    """Plain CPU tensors by parameter name, gathered from all ranks if sharded: (model state, optimizer's or None)."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(model, options=options)
    return weights, dcp.get_optimizer_state_dict(model, optimizer, options=options) if optimizer else None


def load_full_state(model, state, optimizer=None, optimizer_state=None):
    """The inverse of `full_state`, on any number of ranks."""
    options = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_model_state_dict(model, state, options=options)
    if optimizer is not None:
        dcp.set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)


@contextlib.contextmanager
def replacing(path):
    """with replacing(path) as file: what is written takes the place of `path` at the end, synced, or exit 1.

    It goes to a temporary file beside it, renamed when complete, so `path` is whole at every moment.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        temporary.unlink(missing_ok=True)
        kept = f"the previous {path.name} is intact" if path.exists() else "there was no earlier one"
        advice = "Free some space or choose another --out, then --resume."
        fail(f"could not write {path}: {error}; {kept}. {advice}", code=1)


def save_checkpoint(path, state):
    """Write plain tensors, numbers and strings, atomically."""
    with replacing(path) as file:
        torch.save(state, file)


def save_config(out, config):
    """Write config.json into the run's folder, atomically, since --resume comes here again and may be killed."""
    with replacing(Path(out) / "config.json") as file:
        file.write(json.dumps(dataclasses.asdict(config), indent=2).encode() + b"\n")


def load_checkpoint(path):
    """Read a checkpoint, a dict of plain tensors, mapped from disk; runs no code in it. Exits with 2 if it is none.

    torch does not check what it reads, so a flipped bit would become a weight: the archive's checksums are compared.
    """
    if not Path(path).is_file():
        fail(f"no checkpoint at {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # files older than torch 1.6 can't be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  whatever a broken file provokes, the answer is the same sentence
        reason = str(error).split("\n")[0][:150]
        fail(f"{path} is truncated, or not a checkpoint that can be read safely ({type(error).__name__}: {reason})")
    if not isinstance(state, dict):
        fail(f"{path} is not a checkpoint: expected a dict of weights, found {type(state).__name__}")
    return state


def read_own_checkpoint(path, script, architecture=(), config=None):
    """A last.pt of `script`. Exits with 2 if it is another's, or if a field of `architecture` is not as in config."""
    state = load_checkpoint(path)
    if not isinstance(state, dict) or state.get("script") != script:
        writer = state["script"] if isinstance(state, dict) and "script" in state else "something else"
        fail(f"{path} was not written by {script}.py, but by {writer}")
    theirs = state["config"]
    differ = [k for k in architecture if config is not None and theirs[k] != getattr(config, k)]
    if differ:
        differences = (f"--{k.replace('_', '-')} {theirs[k]} and not {getattr(config, k)}" for k in differ)
        fail(f"{path} was trained with {', '.join(differences)}")
    return state


def load_state(module, state, what):
    """`load_state_dict`; a mismatch is one readable error (exit 2) that lists missing, unexpected, misshapen keys."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    shapes = [f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}" for k in wrong]
    if missing or unexpected or shapes:
        lists = dict(missing=missing, unexpected=unexpected, shapes=shapes)
        parts = [f"{name}: {', '.join(keys)}" for name, keys in lists.items() if keys]
        fail(f"{what} does not fit this model. " + ". ".join(parts))
    module.load_state_dict(state)


def lock(folder):
    """Whether this process has the folder for itself, from now to its end. OSError if it cannot be written.

    A POSIX lock: it ends with the process, even by kill -9, and loading processes do not inherit it. A system or a
    filesystem that knows no such locks grants everything.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        return True
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # left open: closing it would give up the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def choose_out(out, script, resume, world):
    """The run's folder, made and locked. '' -> runs/SCRIPT, or the first free runs/SCRIPT-2, ... (resume: the last).

    Exits with 2 if it cannot be written, if another process is writing it, or if it was named and already holds a run
    that is not to be resumed.
    """
    path, problem = Path(out), ""
    if world.rank == 0:
        try:
            if not out:
                names = [Path("runs", script), *(Path("runs", f"{script}-{i}") for i in range(2, 10000))]
                free = next(i for i, name in enumerate(names) if not name.exists())
                path = names[max(0, free - 1)]
                for path in [] if resume else names[free:]:  # noqa: B007  another run may take a name before we do
                    with contextlib.suppress(FileExistsError):
                        path.mkdir(parents=True)
                        break
            path.mkdir(parents=True, exist_ok=True)
            if not lock(path):
                problem = f"another process is writing to {path}: wait until it has ended, or choose another --out"
            elif out and not resume and any((path / name).exists() for name in ("config.json", "last.pt", "log.jsonl")):
                problem = f"{path} already holds a run: add --resume to continue it, or choose another --out"
        except OSError as error:
            problem = f"cannot write to {path}: {error}; choose another --out"
    if world.size > 1:  # all ranks take rank 0's choice
        words = [str(path), problem]
        dist.broadcast_object_list(words)
        path, problem = Path(words[0]), words[1]
    if problem:
        fail(problem)
    return path


def resume_command(out):
    """The command line that continues this run."""
    words = [w for w in sys.argv[1:] if w != "--resume"]
    if "out" not in given_flags(words):
        words += ["--out", str(out)]
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", "--nproc-per-node", ranks] if ranks else ["python"]
    return shlex.join([*launcher, Path(sys.argv[0]).name, *words, "--resume"])


# ---------------------------------------------------------------------------------------------------------------------
# Log and signals
# ---------------------------------------------------------------------------------------------------------------------


def stop_not_finite(out, step):
    """Leave after three steps in a row that were not applied (exit 3), and say which weights are still good."""
    last = Path(out) / "last.pt"
    kept = f"{last} holds the last good weights" if last.exists() else "no checkpoint had been written yet"
    bad = f"loss or gradients were not finite in three steps in a row before step {step}"
    fail(f"{bad}; {kept}. Try a lower --lr, or --precision fp32.", code=3)


class Log:
    """log.jsonl, a progress bar, and the request to stop: SIGTERM and SIGINT set `stop`, the loop ends its step."""

    def __init__(self, out, world, total=0, start=0):
        self.rank, self.start, self.total, self.stop = world.rank, start, total, None
        self.path = Path(out) / "log.jsonl"
        self.bar, self.began, self.skipped = None, time.monotonic(), set()
        self.size, self.catching = world.size, False
        if self.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if total and self.path.exists():  # rows after the step that we resume from will be written again
                kept = []
                for line in self.path.read_text(errors="replace").splitlines():
                    with contextlib.suppress(ValueError):  # a line that a crash tore
                        if json.loads(line).get("step", 0) <= start:
                            kept.append(line + "\n")
                with replacing(self.path) as file:
                    file.write("".join(kept).encode())
            if total > start and sys.stderr.isatty():
                self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def catch_signals(self):
        """From now on SIGTERM and SIGINT ask for a stop instead of ending the process."""
        self.handle_signals(lambda caught, frame: setattr(self, "stop", caught))

    def leave(self, *_):
        """End at once: what follows training can be done again from last.pt."""
        self.say(f"stopped. To continue: {resume_command(self.path.parent)}")
        raise SystemExit(0)

    def handle_signals(self, handler):
        """Answer SIGTERM and SIGINT by handler(signal, frame)."""
        self.catching = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)

    def agree(self, flag):
        """Whether `flag` is set on any rank."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return bool(flag)
        flags = [None] * dist.get_world_size()
        dist.all_gather_object(flags, bool(flag))
        return any(flags)

    def write(self, **row):
        """Append one object to log.jsonl (rank 0 only)."""
        if self.rank == 0:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                fail(f"could not write {self.path}: {error}; last.pt is intact. Free some space, then --resume.", 1)

    def progress(self, step, **shown):
        """Show the state after `step` steps: in the bar, or as a plain line when the output is no terminal."""
        if self.rank:
            return
        text = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in shown.items()}
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix(text)
        else:
            left = (time.monotonic() - self.began) / max(1, step - self.start) * (self.total - step)
            values = " ".join(f"{k} {v}" for k, v in text.items())
            self.say(f"step {step}/{self.total} {values} eta {left:.0f} s")

    def say(self, text):
        """Print a line without breaking the bar (rank 0 only)."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr if self.bar is not None else sys.stdout)
            sys.stdout.flush()

    def skip(self, messages, total, limit):
        """Count unreadable files ('path: reason'), name the first ten; above the share `limit` of `total`, exit 2."""
        for message in set(messages) - self.skipped:
            self.skipped.add(message)
            if len(self.skipped) <= 10:
                self.say(f"skipped an unreadable file: {message}")
        if len(self.skipped) > max(1, limit * total):
            fail(f"{len(self.skipped)} of {total} files could not be read, more than --max-bad {limit:g} allows")

    def close(self):
        """End the progress bar. From now on a signal ends the process, but no rank, since others may wait for it."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.catching and self.size == 1:
            self.handle_signals(self.leave)


# ---------------------------------------------------------------------------------------------------------------------
# Toy images
# ---------------------------------------------------------------------------------------------------------------------
TOY_CLASSES = ["stripes", "lines", "checks", "dots", "grid", "honeycomb", "zigzag", "quincunx", "rings", "weave"]


@functools.lru_cache(maxsize=4)
def toy_images(split, size=24):
    """Ten grey textures at any turn and phase, at varying scale and light, a little noise: to be learned in minutes.

    Grey and of one contrast on purpose: what varies strongly over images and is easy to predict within one, such as
    colour or light, is all that a predictive method would learn here.
    split: "train" (8,000) or "val" (2,000 others) -> pixels uint8 [N, 3, size, size], labels int64 [N], balanced.
    """
    count = {"train": 8000, "val": 2000}[split]
    random = np.random.Generator(np.random.PCG64(["train", "val"].index(split)))

    def uniform(low, high):
        return random.uniform(low, high, (count, 1, 1))

    def ridge(angle):
        return np.exp(4 * (np.cos(angle) - 1))

    line = np.arange(size) - (size - 1) / 2
    turn, period = uniform(-np.pi, np.pi), size / 2 * np.exp(uniform(-0.2, 0.2))
    u = (line * np.cos(turn) + line[:, None] * np.sin(turn)) * 2 * np.pi / period + uniform(0, 2 * np.pi)
    v = (line[:, None] * np.cos(turn) - line * np.sin(turn)) * 2 * np.pi / period + uniform(0, 2 * np.pi)
    textures = [
        lambda u, v: np.sin(u),
        lambda u, v: ridge(u),
        lambda u, v: np.sin(u) * np.sin(v),
        lambda u, v: ridge(u) * ridge(v),
        lambda u, v: np.maximum(ridge(u), ridge(v)),
        lambda u, v: np.cos(u) + np.cos(u / 2 + 0.866 * v) + np.cos(u / 2 - 0.866 * v),
        lambda u, v: np.sin(u + 4 * abs(v / np.pi % 2 - 1)),
        lambda u, v: -ridge(u) * ridge(v) - ridge(u + np.pi) * ridge(v + np.pi),
        lambda u, v: np.sin(np.hypot(u - np.pi, v - np.pi)),
        lambda u, v: np.sin(u) * np.sign(np.sin(v / 2)),
    ]  # of the two coordinates, in radians; in the order of TOY_CLASSES
    grey = np.empty((count, size, size))
    for k, texture in enumerate(textures):
        grey[k::10] = texture(u[k::10], v[k::10])
    grey = (grey - grey.mean((1, 2), keepdims=True)) / grey.std((1, 2), keepdims=True)
    light = uniform(-1, 1) + (uniform(-1, 1) * line[:, None] + uniform(-1, 1) * line) / (size / 2)
    grey = 128 + 40 * grey + 30 * light + random.normal(0, 8, grey.shape)
    pixels = torch.from_numpy(grey.clip(0, 255).astype(np.uint8))[:, None].repeat(1, 3, 1, 1)
    return pixels, torch.arange(count) % 10
