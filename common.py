# SPDX-License-Identifier: MIT
"""What the scripts share and no paper is about, under three headings.

Model   the parts of a vision transformer, and the moving average of its weights
Run     the command line, ranks, randomness, schedules, checkpoints, and `Run`: folder, log, signals
Images  reading images from anywhere, features of a data set, kNN, linear probe, two toys

Imports no script. Shapes: B batch, N tokens, K kept tokens, M masks, D width, H heads.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing.queues
import os
import re
import shlex
import signal
import sys
import tarfile
import threading
import time
import typing
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Model. Parameter names are timm's, which most released checkpoints use.
# --------------------------------------------------------------------------------------------------


def sincos_1d(width, positions):
    """Return the sine-cosine embedding [sin(p w_j) | cos(p w_j)], w_j = 10000^(-2j / width).

    positions: real numbers [N]; width: even. Returns float64 [N, width].
    """
    exponents = torch.arange(width // 2, dtype=torch.float64) / (width / 2)
    angles = torch.as_tensor(positions).double()[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(width, height, breadth):
    """Return positions of a grid in raster order, float64 [height * breadth, width].

    The first half of the channels encodes the column, the second the row, as in MAE.
    """
    if width % 4:
        fail(f"--width {width} must be a multiple of 4, for sine-cosine positions")
    row, column = np.mgrid[:height, :breadth].reshape(2, -1)
    return torch.cat([sincos_1d(width // 2, column), sincos_1d(width // 2, row)], dim=1)


def interpolate_positions(table, grid):
    """Resample a square table to grid (rows, columns), bicubic.

    table: [1, N, D], or [1, 1 + N, D] with a class token first.
    """
    side = math.isqrt(table.shape[1])
    if (side, side) == tuple(grid):
        return table
    special = table.shape[1] - side**2
    patches = table[:, special:].mT.unflatten(2, (side, side))  # [1, D, side, side]
    patches = F.interpolate(patches, grid, mode="bicubic").flatten(2)
    return torch.cat([table[:, :special], patches.mT], dim=1)


def gather_tokens(x, keep):
    """Pick tokens of x [B, N, D]: keep [B, K] gives [B, K, D], keep [M, B, K] gives [M*B, K, D]."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, keep].flatten(0, -3)


def attend(q, k, v):
    """Return softmax(q k^T / sqrt(d)) v; all are [B, H, N, d]."""
    # On CPUs torch's fused kernel is slow in bf16: below some hundred tokens its backward pass
    # takes ten times as long as plain products.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 400:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        return scores.softmax(-1, dtype=v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention. The rows of qkv are [queries | keys | values]."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            fail(f"--width {width} must be a multiple of the heads, {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, queries=slice(None), turn=None):
        """x [B, N, D] -> [B, n, D].

        queries: a slice, which tokens ask, by default all. turn: for rotary positions, a function
        of queries and keys [B, H, N, D/H].
        """
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # [B, N, 3, H, D/H]
        # one permute of all three would cost the backward pass a copy
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        if turn:
            q, k = map(turn, (q, k))
        x = attend(q[:, :, queries], k, v)  # [B, H, n, D/H]
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to its input."""

    def __init__(self, width, heads, hidden=0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, hidden or 4 * width)

    def forward(self, x, queries=slice(None), turn=None):
        """x [B, N, D] -> [B, n, D]. queries: a slice, which tokens come out; see `Attention`."""
        x = x[:, queries] + self.attn(self.norm1(x), queries, turn)
        return x + self.mlp(self.norm2(x))


def patchify(images, patch):
    """Cut images [B, C, H, W] into patches [B, N, C*patch*patch], channel-major, in raster order.

    What is left over at the right and bottom is cut off.
    """
    grid = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, C, rows, columns, p, p]
    return grid.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


class PatchEmbed(nn.Module):
    """The patch projection: a strided convolution, computed as one Linear.

    So it can run on the visible patches alone. The weight keeps the convolution's shape.
    """

    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, patches):
        """patches [B, N, 3*p*p] of `patchify` -> tokens [B, N, D]."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def init_weights(model, std=0.02):
    """Draw weights and learned tokens from normal(0, std). Biases start at 0, norms at 1."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class ViT(nn.Module):
    """Vision transformer, pre-norm. Without a class token positions are fixed sine-cosine tables;
    with one they are learned. Initialise it by `init_weights`.

    image_size, patch: pixels; hidden: width of the MLPs, 0 = 4 * width.
    """

    def __init__(self, image_size, patch, width, depth, heads, hidden=0, class_token=False):
        super().__init__()
        side = image_size // patch
        self.patch = patch
        self.patch_embed = PatchEmbed(patch, width)
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        else:
            # a parameter, since the released checkpoints hold the table too
            table = sincos_2d(width, side, side).float()[None]
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def embed(self, x, keep=None):
        """Return what enters the first block: [class | patches] with positions. See `forward`."""
        positions = self.pos_embed
        if x.dim() == 4:
            grid = [side // self.patch for side in x.shape[2:]]
            positions = interpolate_positions(positions, grid)
            x = patchify(x, self.patch)
        special = positions.shape[1] - x.shape[1]
        patch_positions = positions[0, special:]
        if keep is not None:
            x = gather_tokens(x, keep)
            patch_positions = patch_positions[keep]
        x = self.patch_embed(x) + patch_positions
        if special:
            first = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
            x = torch.cat([first, x], dim=1)
        return x

    def forward(self, x, keep=None, layers=0):
        """Return tokens after the final norm, in the order [class | patches].

        x: images [B, 3, H, W] of any size, or patches [B, N, 3*p*p] of the trained size.
        keep: indices of the patches to run on, [B, K] -> [B, K, D].
        layers: n > 0 returns a list: the outputs of the last n blocks, each after the final norm.
        """
        x = self.embed(x, keep)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        if layers:
            return [self.norm(output) for output in outputs[-layers:]]
        return self.norm(x)


class EMA:
    """Moving average of parameters: target = m target + (1 - m) source."""

    def __init__(self, target, source):
        self.targets = list(target.parameters())
        self.sources = list(source.parameters())
        target.requires_grad_(False)

    @torch.no_grad()
    def update(self, momentum, applied):
        """Move the target. applied: 0-dim tensor, 0 where the optimizer skipped the step."""
        # lerp would need a Python number, and `applied` is a tensor on the device
        change = torch._foreach_sub(self.sources, self.targets)
        torch._foreach_mul_(change, (1 - momentum) * applied)
        torch._foreach_add_(self.targets, change)


# --------------------------------------------------------------------------------------------------
# Run
# --------------------------------------------------------------------------------------------------


def fail(message, code=2):
    """Print one line that a newcomer can act on, and leave with this exit code."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def note(text):
    """Print a line once, not once a rank. A name that cannot be printed is escaped."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text.encode(errors="backslashreplace").decode())
        sys.stdout.flush()


def command_line(main):
    """Decorate a script's main: what stops a run from outside becomes one line and an exit code."""

    @functools.wraps(main)
    def guarded(argv=None):
        try:
            return main(argv)
        except Exception as error:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise as loaders end
            # a traceback keeps loaders alive; the exit would wait for them, who ignore SIGTERM
            for worker in multiprocessing.active_children():
                worker.kill()
            if isinstance(error, torch.OutOfMemoryError):
                advice = "lower --micro or --batch, or try --recompute, --shard, --precision bf16"
                fail(f"out of GPU memory ({str(error).split('. ')[0]}): {advice}", code=4)
            if isinstance(error, ConnectionError) or "DataLoader worker" in str(error):
                advice = "lower --workers; in Docker give it more shared memory by --shm-size=8g"
                fail(f"a loading process died, perhaps for want of memory: {advice}", code=1)
            if isinstance(error, OSError):
                fail(f"{error}. If the disk is full, free some space. Then --resume.", code=1)
            raise
        finally:
            # gloo needs no end, and with torch 2.6 it can hang when destroyed right after its use
            if dist.is_initialized() and dist.get_backend() == "nccl":
                dist.destroy_process_group()

    return guarded


def parse_config(config_class, presets, data_presets, argv=None):
    """Read the command line: (config, names of the flags that were typed).

    A field is a flag, the comment beside it its help. Flags win over the preset.
    presets: {name: {field: value}}; data_presets: {--data: preset}, "*" for any other data.
    """
    comments = dict(re.findall(r"(\w+): .*?# (.*)", inspect.getsource(config_class)))
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = fail  # one line, without the usage of all flags
    for field in dataclasses.fields(config_class):
        options = {"help": f"{comments[field.name]} [{field.default}]".replace("%", "%%")}
        kinds = typing.get_args(field.type)
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.name == "preset":
            options["choices"] = presets
        elif isinstance(field.default, tuple):  # tuple[float, ...] takes any number of values
            options.update(type=kinds[0], nargs="*" if kinds[1] is ... else len(kinds))
        elif kinds:
            options["choices"] = kinds
        else:
            options["type"] = field.type
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    typed = vars(parser.parse_args(argv))
    default = config_class()
    data = typed.get("data", default.data)
    preset = typed.get("preset") or data_presets.get(data, data_presets["*"])
    config = dataclasses.replace(default, **{**presets[preset], **typed, "preset": preset})
    for name, value in vars(config).items():
        least = min(1, getattr(default, name)) if type(value) is int else 0
        if isinstance(value, (int, float)) and not value >= least:  # so is NaN
            fail(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if isinstance(value, list):
            setattr(config, name, tuple(value))
    return config, typed.keys()


def adopt(config, found, typed, path):
    """Take over the fields that a checkpoint tells; refuse flags that contradict it (exit 2)."""
    for name, value in found.items():
        if name not in typed:
            setattr(config, name, value)
        elif value != getattr(config, name) and name != "image_size":  # positions are interpolated
            fail(f"--{name} {getattr(config, name)} contradicts {path}, which has {value}")
    return config


def check(config, world, evaluations):
    """Refuse what would fail late or silently in any training script (exit 2).

    evaluations: what --eval may name, beside none.
    """
    c = config
    if c.image_size % c.patch:
        fail(f"--image-size {c.image_size} is no multiple of --patch {c.patch}")
    if {*c.eval.split(",")} - {*evaluations, "none", ""}:
        fail(f"--eval {c.eval} must name some of {', '.join(evaluations)}, or none")
    if not c.train and not c.init:
        fail("--no-train needs weights to evaluate: add --init")
    micro = getattr(c, "micro", 1)
    if c.train and c.batch % (micro * world.size):
        fail(f"--batch {c.batch} must divide over {world.size} ranks in micro-batches of {micro}")
    if c.shard and world.dtype == torch.float16:
        fail("--shard works with bf16 and fp32, not with --precision fp16")


@dataclasses.dataclass
class World:
    """Where this process stands: rank of size, the device, and the type that it computes in."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    def autocast(self):
        """Return the context for forward passes."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def start_world(device, precision):
    """Join the process group that torchrun describes, or run alone.

    device: cuda, mps or cpu, "" = the best there is. precision: bf16, fp16 or fp32,
    "" = bf16 where the hardware computes in it, else fp32.
    """
    if not device:
        found = torch.accelerator.is_available()
        device = torch.accelerator.current_accelerator().type if found else "cpu"
    fast = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        fast = torch.cuda.get_device_capability() >= (8, 0)
    torch.set_flush_denormal(True)  # on CPUs numbers next to 0 are a hundred times slower
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = types[precision or ("bf16" if fast else "fp32")]
    if "RANK" not in os.environ:
        return World(device=torch.device(device), dtype=dtype)
    if not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun keeps its store over restarts: without a prefix, ranks find addresses of the dead
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt {attempt}", store)
        backend = "nccl" if device == "cuda" else "gloo"
        patience = datetime.timedelta(days=1)  # ranks wait while rank 0 fits probes
        dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)
    return World(dist.get_rank(), dist.get_world_size(), torch.device(device), dtype)


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        return _MeanOverRanks.forward(ctx, gradient)


def mean_over_ranks(x):
    """Return the mean over ranks, differentiable: with DDP gradients are those of one batch."""
    return _MeanOverRanks.apply(x) if dist.is_initialized() else x


def gather_over_ranks(x):
    """Concatenate tensors of equal shape of all ranks along the first axis. Not differentiable."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def distribute(model, world, config=None, dynamic=None):
    """Bring a model to the device and wrap it for all ranks: DDP, or FSDP2, block by block.

    config: whether to --compile and --shard it; dynamic: numbers of tokens change between steps.
    """
    model.to(world.device)
    if config and config.compile:
        model.compile(dynamic=dynamic)
    if config and config.shard:
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                for block in module:
                    fully_shard(block)
        return fully_shard(model)
    if world.size == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def generator(*key):
    """Return a CPU generator seeded by a key such as (seed, "crop", 7): same key, same draws."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # below 2^63


def linear_schedule(step, total, start, final):
    """Return a line from start at step 0 to final at step `total`."""
    return start + (final - start) * step / max(1, total)


def cosine_schedule(step, total, start, final, warmup=0, warmup_from=0.0):
    """Rise linearly from warmup_from to start over `warmup` steps, then half a cosine to final."""
    if step < warmup:
        return linear_schedule(step, warmup, warmup_from, start)
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (start - final) * 0.5 * (1 + math.cos(math.pi * share))


def parameter_groups(*modules):
    """Return optimizer groups: each module's decayed parameters, then each module's undecayed ones.

    Biases and 1-D tensors are not decayed. A group says so in `decay`, which `set_rates` reads.
    """
    groups = []
    for decay in (True, False):
        for module in modules:
            members = []
            for name, parameter in module.named_parameters():
                decayed = parameter.dim() > 1 and "bias" not in name
                if parameter.requires_grad and decayed == decay:
                    members.append(parameter)
            groups.append({"decay": decay, "params": members})
    return groups


def set_rates(optimizer, lr, weight_decay):
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decay"] else 0.0


def spread(tokens):
    """Return signs of collapse of tokens [B, N, D], pooled: std over the batch, effective rank.

    The rank is exp of the entropy of the singular values; 1 is a collapse.
    """
    pooled = tokens.float().mean(1)
    values = torch.linalg.svdvals(pooled - pooled.mean(0))
    rank = torch.special.entr(values / values.sum()).nansum().exp()
    return {"feature_std": pooled.std(0).mean(), "feature_rank": rank}


@contextlib.contextmanager
def replacing(path):
    """Open a temporary file that takes the place of `path` once it is complete and synced.

    So `path` is whole at every moment. A failed write is one line, exit 1.
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
        kept = f"the previous {path.name} is intact, if there was one"
        fail(f"could not write {path}: {error}; {kept}. Free some space, then --resume.", code=1)


def read_safetensors(path):
    """Read a .safetensors file: eight bytes of length, a JSON header, raw tensors."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = content[start + first : start + last]
        kind = entry["dtype"].replace("F", "float").replace("I", "int").lower()  # BF16: bfloat16
        state[name] = torch.frombuffer(data, dtype=getattr(torch, kind)).view(entry["shape"])
    return state


def load_checkpoint(path, *scripts):
    """Read a torch or safetensors checkpoint, a dict of plain values; runs no code in it.

    Names are ours, see `with_our_names`. What is no checkpoint is named in full (exit 2), and a
    last.pt of another script than one of these.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        fail(f"no checkpoint at {path}: name a file, such as last.pt or model.safetensors")
    if path.open("rb").read(23) == b"version https://git-lfs":
        fail(f"{path} is a Git LFS pointer, not the weights: fetch them by `git lfs pull`")
    try:
        if path.suffix == ".safetensors":
            return with_our_names(read_safetensors(path))
        archive = zipfile.is_zipfile(path)  # files older than torch 1.6 are none
        if archive and os.environ.get("RANK", "0") == "0":
            # torch does not look at checksums: a flipped bit would become a weight
            if zipfile.ZipFile(path).testzip():
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        state = with_our_names(state)
    except Exception as error:  # whatever a broken file makes torch raise
        reason = f"{type(error).__name__}: {error}"
        pickled = re.search(r"(?<=GLOBAL )[\w.]+|TorchScript", reason)
        if pickled:
            fail(
                f"{path} holds a pickled {pickled[0]}, which could run code: save its state_dict()"
            )
        fail(f"{path} is truncated or damaged, or not a checkpoint ({reason.splitlines()[0]})")
    if scripts and state.get("script", scripts[0]) not in scripts:
        fail(f"{path} was written by {state['script']}.py, not by {scripts[0]}.py")
    return state


def refuse(path, expected, state):
    """Exit with 2, since a checkpoint is not what was expected."""
    fail(f"{path} is no checkpoint of {expected}, found {', '.join(list(state)[:8])}")


# of the released ViTs, by width
HEADS = {
    192: 3,
    384: 6,
    768: 12,
    1024: 16,
    1152: 16,
    1280: 16,
    1408: 16,
    1536: 24,
}


def count_blocks(state):
    """Return the number of transformer blocks in a state dict."""
    return sum(name.endswith("norm1.weight") for name in state)


def vit_fields(state, path, heads=0):
    """Return the fields of Config that a ViT's weights tell.

    Shapes do not tell the heads: those of the released model of this width, or --heads.
    """
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    heads = heads or HEADS.get(width)
    if not heads:
        fail(f"{path} cannot tell how many heads share its width of {width}: add --heads")
    # a class token before a square table does not change the root
    side = math.isqrt(state["pos_embed"].shape[1])
    fields = {"width": width, "patch": patch, "heads": heads, "image_size": patch * side}
    return {**fields, "depth": count_blocks(state)}


# patterns of names and what we write: prefixes of DDP, torch.compile and training wrappers, then
# the layout of the Hugging Face Hub
OUR_NAMES = {
    r"^((module|_orig_mod|backbone|vit|ijepa|dinov2\w*)\.)+": "",
    r"^embeddings\.position_embeddings": "pos_embed",
    r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"^embeddings\.": "",
    r"^encoder\.layer\.": "blocks.",
    r"^layernorm\.": "norm.",
    r"attention\.output\.dense": "attn.proj",
    r"intermediate\.dense": "mlp.fc1",
    r"(?<=\d\.)output\.dense": "mlp.fc2",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"weights_in": "w12",
    r"weights_out": "w3",
}


def with_our_names(state):
    """Return a nested state dict under the names of our modules."""
    renamed = {}
    for name, value in state.items():
        name = str(name)
        for pattern, ours in OUR_NAMES.items():
            name = re.sub(pattern, ours, name)
        renamed[name] = with_our_names(value) if isinstance(value, dict) else value
    for name in [name for name in renamed if "attention.query" in name]:
        parts = [renamed.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        renamed[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return renamed


def load_state(module, state, what):
    """Load weights; positions are interpolated where the grid differs, all else is refused."""
    state = dict(state)
    for name, own in module.state_dict().items():
        found = state.get(name, own)
        if name.endswith("pos_embed") and found.shape[1] != own.shape[1]:
            note(f"{what}: {name} interpolated from {found.shape[1]} to {own.shape[1]} tokens")
            side = math.isqrt(own.shape[1])
            state[name] = interpolate_positions(found, (side, side))
    with mismatch_is_refused(what):
        module.load_state_dict(state)


@contextlib.contextmanager
def mismatch_is_refused(what):
    """Make torch's list of missing, unexpected and misshapen weights one line, exit 2."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError) as error:
        fail(f"{what} does not fit this model: {' '.join(str(error).split())}")


def choose_out(config, script):
    """Make and lock the run's folder; exit with 2 if it cannot be had."""
    latest = free = Path("runs", script)
    count = 1
    while free.exists():
        count += 1
        latest = free
        free = Path(f"runs/{script}-{count}")
    out = Path(config.out or (latest if config.resume else free))
    if not config.resume and (out / "log.jsonl").exists():
        fail(f"{out} already holds a run: add --resume to continue it, or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.jsonl").touch()
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)  # open to the end of the process
    except OSError as error:
        fail(f"cannot write to {out}: {error}; choose another --out")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is writing to {out}: wait for its end, or choose another --out")
    except OSError:
        pass  # some network file systems have no locks
    return out


WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # plain tensors on rank 0


class Run:
    """One run: its folder, log and bar, resuming, saving, signals, and steps that are not finite.

    loader = run.loader(make)    # this rank's micro-batches of the steps that are left
    for step in run:             # ends early on a signal, or after three steps that are not finite
        run.next(loader, split)  # the next micro-batch, on the device
        run.sync_gradients(...)  # before each forward pass
        run.backward(loss)       # once a micro-batch
        run.update()             # the optimizer's step, applied if all is finite
        run.log(lr=..., ...)     # a row every --log-every steps
    """

    def __init__(self, config, world, split=None, model=None, optimizer=None, **networks):
        """networks: what else last.pt holds, by name. Without a split: only a folder and a log."""
        self.config = config
        self.world = world
        self.model = model
        self.optimizer = optimizer
        self.networks = {"model": model, **networks}
        self.script = Path(inspect.getfile(type(config))).stem
        out = [choose_out(config, self.script) if world.rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(out)
        self.out = out[0]
        self.steps = self.step = 0  # in all; the one in progress, counted from 1
        self.loss = 0.0  # of the micro-batches of this step
        self.row = {"bad_steps": 0}  # in a row, that were not finite
        self.training = self.signalled = False
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        if split:
            steps_an_epoch = max(1, len(split) // config.batch)
            self.steps = config.steps or max(1, int(config.epochs * steps_an_epoch))
            resumed = config.resume and (self.out / "last.pt").exists()
            logged = self.load() if resumed else 0  # bytes of the log
            steps = f"steps {self.step} to {self.steps} of {config.batch}"
            note(f"{self.out}: {len(split)} samples, {steps}")
            if world.rank == 0:
                os.truncate(self.out / "log.jsonl", logged)  # rows after the checkpoint come again
                (self.out / "config.json").write_text(json.dumps(vars(config), indent=2))
        self.start_window()

    def start_window(self):
        """Measure speed from here on."""
        self.window = self.step
        self.since = time.monotonic()
        self.waited = 0.0

    def load(self):
        """Continue from last.pt, on any number of ranks and in any precision."""
        path = self.out / "last.pt"
        state = load_checkpoint(path, self.script)
        with mismatch_is_refused(path):
            for name, network in self.networks.items():
                dcp.set_model_state_dict(network, state[name], options=WHOLE)
        dcp.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=WHOLE)
        if state["scaler"]:  # of a run in fp16
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        return state["log_bytes"]

    def save(self):
        """Write last.pt: plain tensors, numbers and strings."""
        state = {"script": self.script, "config": vars(self.config), "step": self.step}
        state["scaler"] = self.scaler.state_dict()
        for name, network in self.networks.items():
            state[name] = dcp.get_model_state_dict(network, options=WHOLE)
        state["optimizer"] = dcp.get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
        if self.world.rank == 0:
            state["log_bytes"] = (self.out / "log.jsonl").stat().st_size
            with replacing(self.out / "last.pt") as file:
                torch.save(state, file)
        if dist.is_initialized():
            dist.barrier()  # others may read it now

    def resume_command(self):
        """Return the command line that continues this run."""
        ranks = os.environ.get("LOCAL_WORLD_SIZE")
        launcher = f"torchrun --nproc-per-node {ranks}" if ranks else "python"
        return f"{launcher} {shlex.join(sys.argv)} --out {self.out} --resume"

    def leave(self, *_):
        """Answer a signal: finish a training step first. After training, or asked twice, end."""
        if self.training and not self.signalled:
            self.signalled = True
            return
        note(f"stopped. To continue: {self.resume_command()}")
        os._exit(0)

    def __iter__(self):
        self.training = True
        signal.signal(signal.SIGINT, self.leave)
        signal.signal(signal.SIGTERM, self.leave)
        steps = range(self.step, self.steps)
        hidden = self.world.rank or None  # None: where there is no terminal
        self.bar = tqdm(steps, initial=self.step, total=self.steps, disable=hidden)
        for step in self.bar:
            self.step = step + 1
            yield step
            stop = self.signalled and self.world.size == 1
            if self.world.size > 1 and self.step % self.config.log_every == 0:  # all stop together
                signals = torch.tensor(float(self.signalled), device=self.world.device)
                stop = mean_over_ranks(signals) > 0
            if stop or self.step == self.steps or self.step % self.config.save_every == 0:
                self.save()
            if stop:
                break
        self.training = False
        if self.step < self.steps:
            note(f"stopped after step {self.step}. To continue: {self.resume_command()}")
            raise SystemExit(0)

    def loader(self, make):
        """Iterate over make(number) of this rank's micro-batches of the steps that are left."""
        numbers = micro_batches(self.config, self.world, self.step, self.steps)
        return make_loader(make, numbers, self.config, self.world)

    def next(self, loader, split):
        """Return the loader's next item on the device. Its last part names unreadable files."""
        began = time.monotonic()
        *item, bad = next(loader)
        self.waited += time.monotonic() - began
        split.count_bad(bad)
        return [part.to(self.world.device, non_blocking=True) for part in item]

    def sync_gradients(self, now):
        """Say before a forward pass whether ranks exchange gradients after it."""
        if hasattr(self.model, "set_requires_gradient_sync"):  # FSDP2
            self.model.set_requires_gradient_sync(now)
        self.model.require_backward_grad_sync = now  # DDP

    def backward(self, loss):
        """Add a micro-batch's gradients. loss: its share of the step's mean."""
        self.scaler.scale(loss).backward()
        self.loss = self.loss + loss.detach()

    def update(self, clip=None):
        """Take the optimizer's step, unless loss or gradients are not finite.

        clip: a function to call on the unscaled gradients.
        Returns a 0-dim bool tensor, whether the step was applied: no host waits for it.
        """
        self.scaler.unscale_(self.optimizer)
        groups = self.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        loss = mean_over_ranks(self.loss)
        applied = (loss + norm).isfinite()
        # fp16's loss scaling makes gradients overflow now and then: there only the loss counts
        good = loss.isfinite() if self.scaler.is_enabled() else applied
        bad = (self.row["bad_steps"] + 1) * ~good
        self.row = {"loss": loss, "gradient_norm": norm, "bad_steps": bad}
        self.loss = 0.0
        if clip:
            clip()
        if not self.scaler.is_enabled():
            # what fused kernels read, see torch/optim/adamw.py
            self.optimizer.found_inf = (~applied).float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return applied

    def log(self, measure=dict, **row):
        """Every --log-every steps, write a row and show it. Only then tensors are read.

        measure: a function that is only called then, and returns more of the row.
        """
        if self.step % self.config.log_every and self.step < self.steps:
            return
        row = {**self.row, **row, **measure()}
        with torch.no_grad():
            row = {name: float(value) for name, value in row.items()}
        seconds = time.monotonic() - self.since
        row["images_per_s"] = self.config.batch * (self.step - self.window) / seconds
        row["data_wait"] = self.waited / seconds
        row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.start_window()
        self.write(step=self.step, **row)
        shown = ", ".join(f"{name} {row[name]:.4g}" for name in ("loss", "lr", "images_per_s"))
        self.bar.set_postfix_str(shown)
        if self.bar.disable:
            note(f"step {self.step}/{self.steps} {shown}")
        if row["bad_steps"] >= 3:
            kept = f"{self.out}/last.pt, if it was saved by then, holds good weights"
            fail(f"loss not finite in three steps: {kept}. Lower --lr, or try --precision fp32", 3)

    def write(self, **row):
        """Append a JSON object to log.jsonl (rank 0), null for what is not finite."""
        if self.world.rank == 0:
            row = json.loads(json.dumps(row), parse_constant=lambda name: None)
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def report(self, results):
        """Print and log {network: {evaluation: a number, mostly top-1 in percent}}."""
        for network, scores in results.items():
            cells = [f"{name} {score:.1f}" for name, score in scores.items()]
            note(f"{network:<8} {', '.join(cells)}")
        self.write(eval=results)


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
EXTENSIONS = set(".jpg .jpeg .png .webp .bmp .tif .tiff .gif".split())
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
ALIASES = {"train": "train|training", "val": "val|valid|validation|test"}
# text beside the pixels must not cost an image
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30


@dataclasses.dataclass
class Split:
    """N images: files or PIL images; their names; labels int64 [N], or -1; class names."""

    images: list
    names: list
    labels: torch.Tensor
    classes: list
    bad: set = dataclasses.field(default_factory=set)  # what could not be read, and why

    def __len__(self):
        return len(self.names)

    def subset(self, rows):
        """Return a split of the images `rows`, a list of indices."""
        images = [self.images[i] for i in rows]
        return Split(images, [self.names[i] for i in rows], self.labels[rows], self.classes)

    def listed(self, path):
        """Return the subset that a file lists, one name a line. Exit with 2 if one is missing."""
        if not Path(path).is_file():
            fail(f"no list of names at {path}")
        wanted = [line for line in Path(path).read_text().splitlines() if line]
        index = {}
        for i, name in enumerate(self.names):
            index.setdefault(Path(name).name, i)
            index[name] = i
        missing = [name for name in wanted if name not in index]
        if missing or not wanted:
            fail(f"{path}: {len(missing)} of {len(wanted)} names are no images: {missing[:3]}")
        return self.subset([index[name] for name in wanted])

    def read(self, index, choose_boxes, sizes, resample=Image.BILINEAR):
        """Decode one image and resize parts of it: uint8 [3, s, s] for each s of sizes.

        choose_boxes(width, height) returns a (top, left, height, width) for each, in pixels.
        """
        image = self.images[index]
        image = image if isinstance(image, Image.Image) else Image.open(image)
        with image:
            turn = exif_turn(image)
            width, height = image.size[::-1] if turn in range(5, 9) else image.size  # sideways
            parts = list(zip(choose_boxes(width, height), sizes, strict=True))
            # a JPEG decodes at 1/2, 1/4 or 1/8 in less time
            scale = max(size / min(box[2:]) for box, size in parts)
            image.draft("RGB", [math.ceil(side * scale) for side in image.size])
            image = to_rgb(image, turn)
        fx = image.width / width
        fy = image.height / height
        pixels = []
        for (top, left, h, w), size in parts:
            box = (left * fx, top * fy, (left + w) * fx, (top + h) * fy)
            part = image.resize((size, size), resample, box)
            data = torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8)
            pixels.append(data.view(size, size, 3).permute(2, 0, 1))
        return pixels

    def read_batch(self, indices, choose_boxes, sizes, resample=Image.BILINEAR):
        """Read images: (their indices [B], uint8 [B, 3, s, s] for each s of sizes, bad files).

        choose_boxes(i, width, height): as for `read`, of the i-th image. Where an image cannot be
        read, another of the batch stands in.
        """
        found = []
        bad = []
        for i, index in enumerate(indices):
            try:
                boxes = functools.partial(choose_boxes, i)
                found.append((index, *self.read(index, boxes, sizes, resample)))
            except Exception as error:  # whatever a broken file makes Pillow raise
                bad.append(f"{self.images[index]}: {error}")
        # a worker must not end the run: `count_bad` will
        blank = [torch.zeros(3, size, size).byte() for size in sizes]
        found = found or [(indices[0], *blank)]
        found = [found[i % len(found)] for i in range(len(indices))]
        index, *views = zip(*found, strict=True)
        return torch.tensor(index), *map(torch.stack, views), bad

    def count_bad(self, messages):
        """Name unreadable files, the first ten; above 1 % of all exit with 2. Main process only."""
        for message in set(messages) - self.bad:
            self.bad.add(message)
            if len(self.bad) <= 10:
                note(f"skipped an unreadable file: {message}")
        count = len(self.bad)
        if count > 0.01 * max(100, len(self)) or count == len(self):
            fail(f"{count} of {len(self)} images could not be read, more than 1 %: see above")


TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = dict(enumerate(TURNS.split(), start=2))  # how to turn an image, by EXIF's orientation


def exif_turn(image):
    """Return the EXIF orientation of an opened image. Broken metadata cost nothing."""
    try:
        return image.getexif().get(0x0112)
    except Exception:  # whatever broken metadata makes Pillow raise
        return None


def to_rgb(image, turn=None):
    """Return any PIL image as RGB, 16 bits scaled to 8, turned upright."""
    if image.mode.startswith("I"):
        pixels = (np.asarray(image) >> 8).clip(0, 255)
        image = Image.fromarray(pixels.astype(np.uint8))
    image = image.convert("RGB")
    return image.transpose(Image.Transpose[TURNS[turn]]) if turn in TURNS else image


def files_below(folder, above=()):
    """Yield the regular files below a folder, links followed, hidden names left out."""
    real = os.path.realpath(folder)
    if real in above:  # a loop of links
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from files_below(entry.path, (*above, real))
        elif entry.is_file():
            yield Path(entry.path)


def open_split(data, name, toy="letters"):
    """Return the `train` or `val` Split of --data; None where a folder has no val."""
    data = toy if data == "toy" else data
    if data in TOYS:
        return TOYS[data](name)
    root = Path(data).expanduser()
    if not root.exists():
        root = Path(os.environ.get("DATA", "data"), data)
    folders = sorted(os.listdir(root)) if root.is_dir() else []
    if data == "cifar10" and "train" not in folders:
        return cifar10(root.parent, name)
    if name not in folders and (name == "train" or "train" in folders):
        for other in folders:
            if re.fullmatch(ALIASES[name], other, re.IGNORECASE):
                fail(f"{root} has {other}/ and no {name}/: did you mean to call it {name}?")
    if name == "val" and name not in folders:
        return None
    folder = root / name if name in folders else root
    files = list(files_below(folder)) if folders else []
    images = [path for path in files if path.suffix.lower() in EXTENSIONS]
    if not images:
        wanted = "train/CLASS/*.jpg and val/CLASS/*.jpg, or files in any folders"
        fail(f"no images at {folder}: expected {wanted}, {', '.join(sorted(EXTENSIONS))}")
    labelled = [path for path in images if path.parent != folder != root]
    images = labelled or images
    left = sorted(set(files) - set(images), key=lambda path: (len(path.parts), path))
    if left:
        few = [path.name for path in left[:5]]
        note(f"{folder}: left out {len(left)} files, no images or in no class folder: {few}")
    labels = [path.relative_to(folder).parts[0] if labelled else "" for path in images]
    classes = sorted({*labels} - {""})
    numbers = {label: i for i, label in enumerate(classes)}
    labels = torch.tensor([numbers.get(label, -1) for label in labels])
    return Split(images, [path.relative_to(root).as_posix() for path in images], labels, classes)


def open_data(data, wanted, toy="letters"):
    """Return the splits (train, val, unseen) of --data.

    wanted: what needs labels, such as "knn, linear". val is None where that cannot be done.
    unseen: what training does not see, or else train. A class that only val has is refused.
    """
    train = open_split(data, "train", toy)
    val = open_split(data, "val", toy)
    if not (wanted and val and val.classes and train.classes):
        if wanted:
            note(f"{wanted}: skipped, since {data} has no {'labels' if val else 'val split'}")
        return train, None, val or train
    if val.classes != train.classes:
        absent = sorted({*val.classes} - {*train.classes})
        if absent:
            fail(f"val/ of {data} has classes that train/ lacks: {absent[:5]}")
        note(f"val/ has no images of {sorted({*train.classes} - {*val.classes})}")
        numbers = torch.tensor([train.classes.index(name) for name in val.classes])
        val.labels = numbers[val.labels]
        val.classes = train.classes
    return train, val, val


def cifar10(folder, name):
    """Read CIFAR-10 from its home page's archive, downloaded once into `folder` and checked."""
    archive = folder / "cifar-10-binary.tar.gz"
    if not archive.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(CIFAR10_URL, archive, CIFAR10_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            fail(f"no CIFAR-10 ({error}): put {CIFAR10_URL} or cifar10/train and val in {folder}/")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != CIFAR10_SHA256:
        fail(f"{archive} has sha256 {digest} instead of {CIFAR10_SHA256}: delete it and try again")
    wanted = "data_batch" if name == "train" else "test_batch"
    with tarfile.open(archive) as tar:
        members = sorted(member for member in tar.getnames() if wanted in member)
        raw = b"".join(tar.extractfile(member).read() for member in members)
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 3073)  # label, then red, green, blue
    pixels = np.stack(np.split(rows[:, 1:], 3, axis=1), axis=2)  # [N, 1024, 3]
    return in_memory(pixels.reshape(-1, 32, 32, 3), rows[:, 0], CIFAR10_CLASSES, name)


def in_memory(pixels, labels, classes, name):
    """Return a Split of decoded images: pixels [N, H, W, 3], 0 to 255, and labels [N]."""
    pixels = pixels.clip(0, 255).astype(np.uint8)
    names = [f"{name}/{classes[label]}/{i:05d}" for i, label in enumerate(labels)]
    images = [*map(Image.fromarray, pixels)]
    return Split(images, names, torch.tensor(labels).long(), classes)


def toy_random(name):
    """Return (generator, labels 0, 1, ..., 9, 0, ...) of a toy's 8,000 or 2,000 images."""
    count = 8000 if name == "train" else 2000
    return np.random.default_rng(count), np.arange(count) % 10


@functools.cache
def letters(name):
    """Mosaics of letters, 48 x 48: a class is an alphabet of ten invented letters.

    Each of the 6 x 6 tiles holds a random letter of the class on paper of a random colour. So what
    kind of thing an image shows can be predicted from a part of it. How each part looks cannot.
    """
    design = np.random.default_rng(0)
    tile = np.arange(8) + 1j * np.arange(8)[:, None]  # pixels as complex numbers x + iy
    points = 1 + 1j + 2.5 * tile[:3, :3].ravel()  # where strokes start and end
    alphabets = np.zeros((10, 10, 8, 8))  # class, letter, ink
    for letter in alphabets.reshape(100, 8, 8):
        for _ in range(design.integers(2, 4)):
            start, end = points[design.choice(9, 2, replace=False)]
            stroke = end - start
            along = ((tile - start) / stroke).real.clip(0, 1)  # of a pixel's nearest point
            distance = abs(tile - start - along * stroke)
            np.maximum(letter, (1.2 - distance).clip(0, 1), out=letter)
    random, labels = toy_random(name)
    which = random.integers(0, 10, (len(labels), 6, 6))
    ink = alphabets[labels[:, None, None], which].transpose(0, 1, 3, 2, 4)  # [N, 6, 8, 6, 8]
    paper = 128 + random.uniform(-40, 40, (len(labels), 6, 1, 6, 1, 3))
    side = np.sign(128 - paper.mean(-1, keepdims=True))  # -1: light paper, darker ink
    contrast = random.uniform(80, 110, side.shape) * side
    images = paper + contrast * ink[..., None]
    images = (images + random.normal(0, 8, images.shape)).reshape(-1, 48, 48, 3)
    return in_memory(images, labels, [f"alphabet {i}" for i in range(10)], name)


@functools.cache
def textures(name):
    """Ten grey textures, 24 x 24, at any turn, phase and scale, in noise."""
    random, labels = toy_random(name)
    draws = random.uniform(-np.pi, np.pi, (4, len(labels), 1, 1))
    turn, scale, x, y = draws
    line = np.arange(-12, 12)
    pixels = line + 1j * line[:, None]  # complex numbers x + iy
    pixels = pixels * np.pi / 6 * np.exp(scale / 16 + 1j * turn)  # radians
    u = pixels.real + x
    v = pixels.imag + y
    across = np.sin(u)
    down = np.sin(v)
    kinds = {
        "stripes": across,
        "lines": across**8,
        "checks": across * down,
        "dots": (across * down) ** 8,
        "grid": np.maximum(across**8, down**8),
        "honeycomb": np.cos(u) + 2 * np.cos(u / 2) * np.cos(0.866 * v),
        "zigzag": np.sin(u + 4 * abs(v / np.pi % 2 - 1)),
        "snakes": np.sin(u + 2 * down),
        "rings": np.sin(np.hypot(u, v)),
        "weave": across * np.sign(down),
    }
    grey = np.choose(labels[:, None, None], list(kinds.values()))
    grey -= grey.mean((1, 2), keepdims=True)
    grey = 128 + 40 * grey / grey.std((1, 2), keepdims=True)
    grey += random.normal(0, 8, grey.shape)
    return in_memory(np.stack([grey] * 3, axis=3), labels, list(kinds), name)


TOYS = {"letters": letters, "textures": textures}


def normalize(pixels):
    """Bring uint8 images [B, 3, H, W] to the networks' range, by ImageNet's mean and std."""
    mean, std = (x.to(pixels.device, non_blocking=True) for x in (MEAN, STD))
    return (pixels / 255 - mean) / std


def random_crop(width, height, scale, random):
    """Draw the part of RandomResizedCrop: a share `scale` of the area, ratio 3/4 to 4/3.

    Returns (top, left, height, width). The order of the draws is torchvision's.
    """
    low, high = scale
    for _ in range(10 if low < 1 else 0):  # the whole image leaves no choice
        share, tilt = torch.rand(2, generator=random).tolist()
        area = width * height * (low + (high - low) * share)
        ratio = (4 / 3) ** (2 * tilt - 1)
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(height - h + 1, (1,), generator=random).item()
            left = torch.randint(width - w + 1, (1,), generator=random).item()
            return top, left, h, w
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@functools.lru_cache(maxsize=4)
def epoch_order(n, seed, epoch):
    """Return the order of n images in an epoch."""
    return torch.randperm(n, generator=generator(seed, "order", epoch)).tolist()


def micro_batch_indices(number, micro, n, seed):
    """Return the images of a micro-batch: micro-batches run on through the epochs without a gap."""
    places = range(number * micro, (number + 1) * micro)
    return [epoch_order(n, seed, place // n)[place % n] for place in places]


def micro_batches(config, world, step, steps):
    """Return the numbers of this rank's micro-batches from `step` on, its share of each step's."""
    count = config.batch // config.micro
    share = count // world.size
    numbers = range(step * count, steps * count)
    return [number for number in numbers if number // share % world.size == world.rank]


def end_with_parent():
    """Wait in a loading process for the end of the main one, and end too."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker(worker):
    """Prepare a loading process."""
    # torch's own watch misses a main process that ends while this one starts: it would stay
    threading.Thread(target=end_with_parent, daemon=True).start()
    # Workers get Ctrl-C and SIGTERM too. They ignore them: the main process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # An item that finds no shared memory would be lost, and the main process would wait for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))


def make_loader(make, numbers, config, world):
    """Iterate over make(number), made ahead of time in --workers processes."""
    loader = DataLoader(
        numbers,
        batch_size=None,
        num_workers=config.workers,
        collate_fn=make,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=start_worker,
    )
    return iter(loader)


def centre_crops(split, size, indices):
    """Read what evaluation sees: (indices [B], pixels uint8 [B, 3, S, S], unreadable files).

    Shorter side to size*256/224, then a centre crop. An image of size x size stays as it is.
    """

    def box(i, width, height):
        side = min(width, height) * size / int(size * 256 / 224)
        if (width, height) == (size, size):
            side = size
        return [((height - side) / 2, (width - side) / 2, side, side)]

    return split.read_batch(indices, box, [size], Image.BICUBIC)


@torch.no_grad()
def extract(encode, split, config, world, batch=64):
    """Encode a split on all ranks: (features float32 [N, ...], labels [N], names) on rank 0.

    encode: a function of normalised images [B, 3, S, S]. Unreadable images are left out.
    """
    n = len(split)
    # ranks take turns; all get as many batches, so beyond the end comes the last image again
    starts = range(world.rank * batch, n + world.rank * batch, world.size * batch)
    numbers = [[min(i, n - 1) for i in range(start, start + batch)] for start in starts]
    crops = functools.partial(centre_crops, split, config.image_size)
    features = None
    good = torch.zeros(n, dtype=torch.bool)
    for indices, pixels, bad in make_loader(crops, numbers, config, world):
        split.count_bad(bad)
        with world.autocast():
            rows = encode(normalize(pixels.to(world.device)))
        rows = gather_over_ranks(rows.float())
        indices = gather_over_ranks(indices.to(world.device))
        if world.rank == 0:
            if features is None:  # a large bank is held once, and filled in place
                features = rows.new_empty(n, *rows.shape[1:])
            features[indices] = rows
            good[indices.cpu()] = True
    names = [*itertools.compress(split.names, good)]
    if names and len(names) < n:
        features = features[good]
    return features, split.labels[good].to(world.device), names


def write_features(read, split, config, world, run):
    """Write features.npz: features [N, D], labels [N], paths; and tokens [N, T, D] if there are.

    read: a function of normalised images -> [B, D], or [B, 1 + T, D], where tokens follow.
    """
    found, labels, names = extract(read, split, config, world)
    if world.rank == 0:
        found = found.view(len(names), -1, found.shape[-1]).cpu()
        arrays = {"features": found[:, 0], "labels": labels.cpu(), "paths": names}
        if found.shape[1] > 1:
            arrays["tokens"] = found[:, 1:]
        np.savez(run.out / "features.npz", **arrays)
        note(f"{run.out / 'features.npz'}: {len(names)} samples")


def raw_pixels(images):
    """Stand in for an encoder: the pixels, averaged down to 32 x 32 where there are more."""
    return F.adaptive_avg_pool2d(images, min(32, images.shape[-1])).flatten(1)


def knn(bank, labels, queries, k=20, temperature=0.07):
    """Classify by the votes exp(cosine similarity / temperature) of k neighbours: scores [Q, C]."""
    k = min(k, len(bank))
    norms = bank.norm(dim=1)
    scores = []
    # 0.5 GiB of similarities at a time
    for rows in F.normalize(queries, dim=1).split(2**27 // len(bank) + 1):
        similarity, nearest = (rows @ bank.T / norms).topk(k, dim=1)
        votes = (similarity / temperature).exp()
        empty = votes.new_zeros(len(rows), int(labels.max()) + 1)
        scores.append(empty.scatter_add(1, labels[nearest], votes))
    return torch.cat(scores)


def top1(scores, labels):
    """Return the accuracy of scores [N, C] in percent; ties go to the lower class."""
    return 100 * (scores.argmax(1) == labels).float().mean().item()


def shuffled_batches(features, labels, batch, seed):
    """Return batches(epoch) for `linear_probe` from features computed once."""

    def batches(epoch):
        order = torch.randperm(len(labels), generator=generator(seed, "probe", epoch))
        for rows in order.to(labels.device).split(batch):
            yield features[rows], labels[rows]

    return batches


def linear_probe(batches, val, labels, heads, epochs, make_optimizer, milestones=()):
    """Train linear heads side by side on frozen features: the best top-1 on val, and which head.

    batches(epoch) yields (features [B, D], labels [B]); val [V, D], labels [V].
    heads: {name: (head, lr, weight decay)}; lr is divided by 10 after the epochs `milestones`.
    """
    groups = []
    for head, lr, decay in heads.values():
        groups.append({"params": list(head.parameters()), "lr": lr, "weight_decay": decay})
    optimizer = make_optimizer(groups)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    for epoch in range(epochs):
        for x, y in batches(epoch):
            if len(y) == 1:  # BatchNorm needs two
                continue
            loss = sum(F.cross_entropy(head(x), y) for head, _, _ in heads.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    accuracy = {}
    with torch.no_grad():
        for name, (head, _, _) in heads.items():
            accuracy[name] = top1(head.eval()(val), labels)
    best = max(accuracy, key=accuracy.get)
    return accuracy[best], best


def save_picture(path, tiles, tile=96):
    """Write a grid of normalised images [rows, columns, 3, S, S] as PNG."""
    tiles = (tiles.cpu() * STD + MEAN).clamp(0, 1) * 255
    rows = []
    for row in tiles:
        scaled = F.pad(F.interpolate(row, (tile, tile)), [4] * 4, value=255.0)
        rows.append(torch.cat(list(scaled), dim=2))  # side by side
    picture = torch.cat(rows, dim=1)  # [3, H, W]
    Image.fromarray(picture.byte().permute(1, 2, 0).numpy()).save(path)
