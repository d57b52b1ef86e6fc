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
import errno
import fcntl
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import multiprocessing.queues
import os
import re
import shlex
import signal
import struct
import sys
import tarfile
import time
import typing
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
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
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, not {width}")
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
    patches = (
        table[:, special:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    )  # [1, D, side, side]
    patches = F.interpolate(patches.float(), grid, mode="bicubic")
    patches = patches.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :special], patches], dim=1)


def gather_tokens(x, keep):
    """Pick tokens of x [B, N, D]: keep [B, K] gives [B, K, D], keep [M, B, K] gives [M*B, K, D]."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    picked = x[rows, keep]
    return picked if keep.dim() == 2 else picked.flatten(0, 1)


def attend(q, k, v):
    """Return softmax(q k^T / sqrt(d)) v; all are [B, H, N, d]."""
    # On CPUs torch's fused kernels lose to plain products: in bf16 by far, below some hundred
    # tokens (their backward pass takes ten times as long), in fp32 on the shortest sequences.
    longest = {torch.bfloat16: 400, torch.float32: 64}.get(q.dtype, 0)
    if q.device.type == "cpu" and k.shape[2] <= longest:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention. The rows of qkv are [queries | keys | values]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, queries=None):
        """x [B, N, D] -> [B, N, D]. With queries=n only the last n tokens ask: [B, n, D]."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # [B, N, 3, H, D/H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if queries is not None:
            q = q[:, :, -queries:]
        x = attend(q, k, v)  # [B, H, N, D/H]
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

    def forward(self, x, queries=None):
        """x [B, N, D] -> [B, N, D]. With queries=n only the last n tokens come out: [B, n, D]."""
        attended = self.attn(self.norm1(x), queries)
        if queries is not None:
            x = x[:, -queries:]
        x = x + attended
        return x + self.mlp(self.norm2(x))


def patchify(images, patch):
    """Cut images [B, C, H, W] into patches [B, N, C*patch*patch], channel-major, in raster order.

    What is left over at the right and bottom is cut off.
    """
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


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
        self.width = width
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
            positions = interpolate_positions(
                positions, [side // self.patch for side in x.shape[2:]]
            )
            x = patchify(x, self.patch)
        special = positions.shape[1] - x.shape[1]
        patch_positions = positions[0, special:]
        if keep is not None:
            x = gather_tokens(x, keep)
            patch_positions = patch_positions[keep.flatten(0, -2)]
        x = self.patch_embed(x) + patch_positions
        if special:
            first = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
            x = torch.cat([first, x], dim=1)
        return x

    def forward(self, x, keep=None, layers=0):
        """Return tokens after the final norm, in the order [class | patches].

        x: images [B, 3, H, W] of any size, or patches [B, N, 3*p*p] of the trained size.
        keep: indices of the patches to run on, [B, K] -> [B, K, D] or [M, B, K] -> [M*B, K, D].
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
    """Moving average of trainable parameters: target = m target + (1 - m) source."""

    def __init__(self, target, source):
        pairs = zip(target.parameters(), source.parameters(), strict=True)
        trained = [pair for pair in pairs if pair[1].requires_grad]
        self.targets, self.sources = zip(*trained, strict=True)
        target.requires_grad_(False)

    @torch.no_grad()
    def update(self, momentum, applied):
        """Move the target. applied: 0-dim tensor, 0 where the optimizer skipped the step."""
        # lerp would need a Python number, and `applied` is a tensor on the device
        change = torch._foreach_sub(self.sources, self.targets)
        torch._foreach_mul_(change, (1 - momentum) * applied.to(change[0].dtype))
        torch._foreach_add_(self.targets, change)


# --------------------------------------------------------------------------------------------------
# Run
# --------------------------------------------------------------------------------------------------


def fail(message, code=2):
    """Print one line that a newcomer can act on, and leave with this exit code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def note(text):
    """Print a line once, not once a rank. A name that cannot be printed is escaped."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text.encode(errors="backslashreplace").decode())
        sys.stdout.flush()


def command_line(main):
    """Decorate a script's main: what stops a run from outside becomes one line and an exit code."""

    @functools.wraps(main)
    def guarded(argv=None):
        try:
            return main(argv)
        except torch.OutOfMemoryError as error:
            advice = "lower --micro or --batch, or try --recompute, --shard, --precision bf16"
            fail(f"out of GPU memory ({str(error).split('. ')[0]}): {advice} (see --help)", code=4)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            advice = "lower --workers; in Docker give it more shared memory by --shm-size=8g"
            fail(f"a loading process died, perhaps for want of memory: {advice}", code=1)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            fail(f"the disk is full: {error}. Free some space, then --resume.", code=1)
        finally:
            if isinstance(sys.exc_info()[1], Exception):
                # a traceback keeps loaders alive; the exit would wait for them, who ignore SIGTERM
                for worker in multiprocessing.active_children():
                    worker.kill()
            if dist.is_initialized():
                dist.destroy_process_group()

    return guarded


def parse_config(config_class, presets, data_presets, argv=None):
    """Read the command line: (config, names of the flags that were typed).

    A field is a flag, the comment beside it its help. Flags win over the preset.
    presets: {name: {field: value}}; data_presets: {--data: preset}, "*" for any other data.
    """
    comments = r"^    (\w+):[^#\n]*# (.*)$"
    comments = dict(re.findall(comments, inspect.getsource(config_class), re.MULTILINE))
    description = sys.modules[config_class.__module__].__doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.error = fail  # one line, without the usage of all flags
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, hint in typing.get_type_hints(config_class).items():
        options = {"help": f"{comments[name]} [{defaults[name]}]".replace("%", "%%")}
        kinds = typing.get_args(hint)
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif name == "preset":
            options["choices"] = presets
        elif typing.get_origin(hint) is typing.Literal:
            options["choices"] = kinds
        elif kinds:  # tuple[float, float] takes two values, tuple[float, ...] any number
            options.update(type=kinds[0], nargs="*" if kinds[1] is ... else len(kinds))
        else:
            options["type"] = hint
        parser.add_argument("--" + name.replace("_", "-"), **options)
    typed = vars(parser.parse_args(argv))
    data = typed.get("data", defaults["data"])
    preset = typed.get("preset") or data_presets.get(data, data_presets["*"])
    values = {**defaults, **presets[preset], **typed, "preset": preset}
    for name, value in values.items():
        least = min(1, defaults[name]) if type(defaults[name]) is int else 0
        if isinstance(value, (int, float)) and not value >= least:  # so is NaN
            fail(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if isinstance(value, list):
            values[name] = tuple(value)
    return config_class(**values), typed.keys()


def adopt(config, found, typed, path):
    """Take over the fields that a checkpoint tells; refuse flags that contradict it (exit 2)."""
    for name in typed & found.keys() - {"image_size"}:  # positions can be interpolated
        if getattr(config, name) != found[name]:
            fail(f"--{name} {getattr(config, name)} contradicts {path}, which has {found[name]}")
    return dataclasses.replace(config, **{k: v for k, v in found.items() if k not in typed})


@dataclasses.dataclass(frozen=True)
class World:
    """Where this process stands: rank of size, the device, and the type that it computes in."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    def autocast(self):
        """Return the context for forward passes."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def start_world(device="", precision=""):
    """Join the process group that torchrun describes, or run alone.

    device: cuda, mps or cpu, "" = the best there is. precision: bf16, fp16 or fp32,
    "" = bf16 where the hardware computes in it, else fp32.
    """
    accelerated = torch.accelerator.is_available()
    best = torch.accelerator.current_accelerator().type if accelerated else "cpu"
    device = device or best
    if device not in ("cpu", best):
        fail(f"--device {device}, but torch finds none on this machine; try --device {best}")
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
        store, rank, size = next(rendezvous("env://"))
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


def distribute(model, world, shard=False):
    """Wrap a model for all ranks: DDP, or with `shard` FSDP2, block by block."""
    if shard:
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                for block in module:
                    fully_shard(block)
        return fully_shard(model)
    if world.size == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


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


def effective_rank(features):
    """Return exp of the entropy of the singular values of features [B, D]; 1 is a collapse."""
    values = torch.linalg.svdvals((features - features.mean(0)).float())
    return torch.special.entr(values / values.sum()).nansum().exp()


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
        kept = f"the previous {path.name} is intact. " if path.exists() else ""
        fail(f"could not write {path}: {error}; {kept}Free some space, then --resume.", code=1)


def read_safetensors(path):
    """Read a .safetensors file: eight bytes of length, a JSON header, raw tensors."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    kinds.update(BF16=torch.bfloat16, I64=torch.int64)
    raw = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(bytes(raw[:8]), "little")
    state = {}
    for name, entry in json.loads(bytes(raw[8:start])).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            data = raw[start + first : start + last].clone()  # a view needs an aligned address
            state[name] = data.view(kinds[entry["dtype"]]).view(entry["shape"])
    return state


def load_checkpoint(path):
    """Read a torch or safetensors checkpoint, a dict of plain values; runs no code in it.

    Strips the prefixes that wrappers add. What is no checkpoint is named in full (exit 2).
    """
    path = Path(path).expanduser()
    if path.is_dir():
        fail(f"{path} is a folder: name the file in it, such as {path}/model.safetensors")
    if not path.is_file():
        fail(f"no checkpoint at {path}")
    if path.open("rb").read(23) == b"version https://git-lfs":
        fail(f"{path} is a Git LFS pointer, not the weights: fetch them by `git lfs pull`")
    try:
        if path.suffix == ".safetensors":
            return strip_prefixes(read_safetensors(path))
        archive = zipfile.is_zipfile(path)  # files older than torch 1.6 are none
        if archive and os.environ.get("RANK", "0") == "0":
            # torch does not look at checksums: a flipped bit would become a weight
            damaged = zipfile.ZipFile(path).testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # noqa: BLE001  whatever a broken file raises
        reason = f"{type(error).__name__}: {error}"
        pickled = re.search(r"GLOBAL ([\w.]+)|TorchScript", reason)
        if pickled:
            what = pickled[1] or "TorchScript"
            fail(f"{path} holds a pickled {what}, which could run code: save its state_dict()")
        fail(f"{path} is truncated or damaged, or not a checkpoint ({reason.splitlines()[0]})")
    if not isinstance(state, dict):
        fail(
            f"{path} is not a checkpoint: expected a dict of weights, found {type(state).__name__}"
        )
    return strip_prefixes(state)


def strip_prefixes(state):
    """Remove what DDP, torch.compile and training wrappers put before the names, repeatedly."""
    clean = {}
    for name, value in state.items():
        name = re.sub(r"^((module|_orig_mod|backbone)\.)+", "", str(name))
        clean[name] = strip_prefixes(value) if isinstance(value, dict) else value
    return clean


HUB_NAMES = {
    r"^\w+\.(?=embeddings|encoder|layernorm)": "",  # vit., dinov2.
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


def from_hub(state):
    """Rename an encoder in the layout of the Hugging Face Hub to ours; another stays as it is."""
    if not any("patch_embeddings.projection" in name for name in state):
        return state
    renamed = {}
    for name, value in state.items():
        for pattern, ours in HUB_NAMES.items():
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    for name in [name for name in renamed if "attention.query" in name]:
        parts = [renamed.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        renamed[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return renamed


def load_state(module, state, what):
    """Load weights; positions are interpolated where the grid differs, all else is refused."""
    state = dict(state)
    for name, own in module.state_dict().items():
        count = state[name].shape[1] if name.endswith("pos_embed") and name in state else 0
        if count and count != own.shape[1]:
            note(f"{what}: {name} interpolated from {count} to {own.shape[1]} tokens")
            side = math.isqrt(own.shape[1])
            state[name] = interpolate_positions(state[name], (side, side))
    with mismatch_is_refused(what):
        module.load_state_dict(state)


@contextlib.contextmanager
def mismatch_is_refused(what):
    """Make torch's list of missing, unexpected and misshapen weights one line, exit 2."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError) as error:
        fail(f"{what} does not fit this model: {' '.join(str(error).split())}")


def load_own_checkpoint(path, script):
    """Read a last.pt of this script; exit with 2 if another one wrote it."""
    state = load_checkpoint(path)
    if state.get("script") != script:
        fail(
            f"{path} was not written by {script}.py, but by {state.get('script', 'something else')}"
        )
    return state


def choose_out(config, script):
    """Make and lock the run's folder; exit with 2 if it cannot be had."""
    names = [f"runs/{script}", *(f"runs/{script}-{i}" for i in range(2, 10000))]
    free = next(i for i, name in enumerate(names) if not Path(name).exists())
    latest = max(0, free - 1)
    out = Path(config.out or names[latest if config.resume else free])
    if not config.resume and (out / "log.jsonl").exists():
        fail(f"{out} already holds a run: add --resume to continue it, or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)  # open to the end of the process
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is writing to {out}: wait for its end, or choose another --out")
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # no such locks
            fail(f"cannot write to {out}: {error}; choose another --out")
    return out


class Run:
    """One run: its folder, log and bar, resuming, saving, signals, and steps that are not finite.

    for step in run:             # ends early on a signal, or after three steps that are not finite
        run.sync_gradients(...)  # before each forward pass
        run.backward(loss)       # once a micro-batch
        run.update()             # the optimizer's step, applied if all is finite
        run.log(lr=..., ...)     # a row every --log-every steps
    """

    def __init__(self, config, world, steps=0, model=None, optimizer=None, **networks):
        """networks: what else last.pt holds, by name. Without steps: only a folder and a log."""
        self.config = config
        self.world = world
        self.steps = steps
        self.model = model
        self.optimizer = optimizer
        self.networks = networks
        self.script = Path(inspect.getfile(type(config))).stem
        out = [choose_out(config, self.script) if world.rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(out)
        self.out = out[0]
        self.step = 0
        self.bad = 0  # steps in a row that were not finite
        self.loss = 0.0
        self.signalled = self.stopping = False
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        resumed = steps and config.resume and (self.out / "last.pt").exists()
        if world.rank == 0:  # what a run logged that died before it saved comes again
            open(self.out / "log.jsonl", "a" if resumed or not steps else "w").close()
        if resumed:
            self.load()
        if steps and world.rank == 0:
            text = json.dumps(dataclasses.asdict(config), indent=2)
            (self.out / "config.json").write_text(text)
        hidden = True if world.rank or not steps else None  # None: where there is no terminal
        self.bar = tqdm(total=steps, initial=self.step, unit="step", disable=hidden)
        self.start_window(self.step)

    def start_window(self, step):
        """Measure speed from here on."""
        self.window = step
        self.since = time.monotonic()
        self.waited = 0.0

    def load(self):
        """Continue from last.pt, on any number of ranks and in any precision."""
        state = load_own_checkpoint(self.out / "last.pt", self.script)
        options = dcp.StateDictOptions(full_state_dict=True)
        with mismatch_is_refused(self.out / "last.pt"):
            for name, network in {"model": self.model, **self.networks}.items():
                dcp.set_model_state_dict(network, state[name], options=options)
        moments = state["optimizer"]
        dcp.set_optimizer_state_dict(self.model, self.optimizer, moments, options=options)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        if self.world.rank == 0:  # rows after the checkpoint come again
            os.truncate(self.out / "log.jsonl", state["log_bytes"])

    def save(self):
        """Write last.pt: plain tensors, numbers and strings."""
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = dcp.get_state_dict(self.model, self.optimizer, options=options)
        state = {"script": self.script, "config": dataclasses.asdict(self.config)}
        state.update(step=self.step, model=weights, optimizer=moments)
        for name, network in self.networks.items():
            state[name] = dcp.get_model_state_dict(network, options=options)
        state["scaler"] = self.scaler.state_dict()
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

    def ask_to_stop(self, number, frame):
        """Answer a signal in training: finish the step. A second one ends the process at once."""
        self.signalled = True
        signal.signal(number, signal.SIG_DFL)

    def leave(self, number, frame):
        """Answer a signal after training: nothing is lost, so end at once."""
        note(f"stopped. To continue: {self.resume_command()}")
        os._exit(0)

    def __iter__(self):
        signal.signal(signal.SIGINT, self.ask_to_stop)
        signal.signal(signal.SIGTERM, self.ask_to_stop)
        while self.step < self.steps:
            yield self.step
            self.step += 1
            self.bar.update()
            done = self.step == self.steps
            if done or self.stopping or self.step % self.config.save_every == 0:
                self.save()
            if self.stopping and not done:
                self.bar.close()
                note(f"stopped after step {self.step}. To continue: {self.resume_command()}")
                raise SystemExit(0)
        self.bar.close()
        signal.signal(signal.SIGINT, self.leave)
        signal.signal(signal.SIGTERM, self.leave)

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
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.mean_loss = mean_over_ranks(self.loss)
        applied = (self.mean_loss + self.norm).isfinite()
        # fp16's loss scaling makes gradients overflow now and then: there only the loss counts
        good = self.mean_loss.isfinite() if self.scaler.is_enabled() else applied
        self.bad = (self.bad + 1) * ~good
        if clip:
            clip()
        if not self.scaler.is_enabled():
            # what fused kernels read, see torch/optim/adamw.py
            self.optimizer.found_inf = (~applied).float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.loss = 0.0
        return applied

    def log(self, measure=dict, **row):
        """Every --log-every steps, write a row and show it. Only then tensors are read.

        measure: a function that is only called then, and returns more of the row.
        """
        done = self.step + 1
        alone = self.signalled and self.world.size == 1
        if done % self.config.log_every and done < self.steps and not alone:
            return
        signals = torch.tensor(float(self.signalled), device=self.world.device)
        self.stopping = bool(mean_over_ranks(signals) > 0)  # of any rank
        row = {
            "loss": self.mean_loss,
            "gradient_norm": self.norm,
            "bad_steps": self.bad,
            **row,
            **measure(),
        }
        row = {name: float(value) for name, value in row.items()}
        seconds = time.monotonic() - self.since
        row["images_per_s"] = self.config.batch * (done - self.window) / seconds
        row["data_wait"] = self.waited / seconds
        row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.start_window(done)
        self.write(step=done, **row)
        shown = {k: f"{row[k]:.4g}" for k in ("loss", "lr", "images_per_s")}
        self.bar.set_postfix(shown)
        if self.bar.disable:
            note(f"step {done}/{self.steps} " + " ".join(f"{k} {v}" for k, v in shown.items()))
        if row["bad_steps"] >= 3:
            last = self.out / "last.pt"
            kept = f"{last} holds good weights" if last.exists() else "nothing had been saved yet"
            advice = "Try a lower --lr, or --precision fp32."
            fail(f"loss not finite for three steps before step {done}; {kept}. {advice}", code=3)

    def write(self, **row):
        """Append a JSON object to log.jsonl (rank 0), null for what is not finite."""
        if self.world.rank == 0:
            row = json.loads(json.dumps(row), parse_constant=lambda name: None)
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def report(self, results):
        """Print and log {network: {evaluation: top-1 in percent}}."""
        for network, scores in results.items():
            cells = [f"{name} {score:.1f}" for name, score in scores.items()]
            note(f"{network:<8} top-1, %: {', '.join(cells)}")
        self.write(eval=results)


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
# what Pillow raises on broken files: OSError for most, the others from parsers of headers
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, MemoryError)
UNREADABLE += (AttributeError, ArithmeticError, struct.error, zlib.error)
UNREADABLE += (Image.DecompressionBombError,)
# text beside the pixels must not cost an image
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30


@dataclasses.dataclass
class Split:
    """N images: files or uint8 [H, W, 3]; their names; labels int64 [N], or -1; class names."""

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
        index = {Path(name).name: i for i, name in enumerate(self.names)}
        index.update({name: i for i, name in enumerate(self.names)})
        missing = [name for name in wanted if name not in index]
        if missing or not wanted:
            fail(f"{path}: {len(missing)} of {len(wanted)} names are no images: {missing[:3]}")
        return self.subset([index[name] for name in wanted])

    def read(self, index, choose_boxes, sizes, resample=Image.BILINEAR):
        """Decode one image and resize parts of it: uint8 [3, s, s] for each s of sizes.

        choose_boxes(width, height) returns a (top, left, height, width) for each, in pixels.
        """
        image = self.images[index]
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image)
        with image:
            turn = exif_turn(image)
            width, height = image.size[::-1] if turn in SIDEWAYS else image.size
            boxes = choose_boxes(width, height)
            scale = max(size / min(box[2:]) for box, size in zip(boxes, sizes, strict=True))
            if scale < 1:  # a JPEG decodes at 1/2, 1/4 or 1/8 in less time
                image.draft("RGB", [math.ceil(side * scale) for side in image.size])
            image = to_rgb(image, turn)
        fx = image.width / width
        fy = image.height / height
        parts = []
        for (top, left, h, w), size in zip(boxes, sizes, strict=True):
            corners = (left * fx, top * fy, (left + w) * fx, (top + h) * fy)
            box = np.minimum(corners, image.size * 2)  # rounding must not leave the image
            part = image.resize((size, size), resample, tuple(box))
            parts.append(torch.from_numpy(np.array(part)).permute(2, 0, 1))
        return parts

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
            except UNREADABLE as error:
                bad.append(f"{self.images[index]}: {error}")
        if not found:  # a worker must not end the run: `count_bad` will
            blank = [torch.zeros(3, size, size, dtype=torch.uint8) for size in sizes]
            found.append((indices[0], *blank))
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


# how to turn an image by EXIF's orientation, 2 to 8
TURNS = (
    "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
)
SIDEWAYS = TURNS[3:]


def exif_turn(image):
    """Return how an opened image has to be turned, or "". Broken metadata cost nothing."""
    try:
        return dict(enumerate(TURNS, start=2)).get(image.getexif().get(0x0112), "")
    except UNREADABLE:
        return ""


def to_rgb(image, turn=""):
    """Return any PIL image as RGB, 16 bits scaled to 8, turned upright."""
    if image.mode.startswith("I"):
        pixels = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
        image = Image.fromarray(pixels.astype(np.uint8))
    image = image.convert("RGB")
    return image.transpose(Image.Transpose[turn]) if turn else image


def files_below(folder, above=()):
    """Yield the regular files below a folder, links followed, hidden names left out."""
    real = os.path.realpath(folder)
    if real in above:  # a loop of links
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name == "__MACOSX":
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
    if not root.exists() and "/" not in data:
        root = Path(os.environ.get("DATA", "data"), data)
    folders = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if data == "cifar10" and "train" not in folders:
        return cifar10(root.parent, name)
    if not root.is_dir():
        fail(f"no data at {root}: expected train/CLASS/*.jpg and val/CLASS/*.jpg, or any images")
    if name not in folders and (name == "train" or "train" in folders):
        for other in folders:
            if other.lower() in ALIASES[name]:
                fail(f"{root} has {other}/ and no {name}/: did you mean to call it {name}?")
    folder = root / name if "train" in folders else root
    if name == "val" and name not in folders or folder == root and name == "val":
        return None
    files = list(files_below(folder))
    images = [path for path in files if path.suffix.lower() in EXTENSIONS]
    leave_out(folder, set(files) - set(images), "no images")
    if not images:
        fail(f"no images in {folder}: looked for {', '.join(sorted(EXTENSIONS))} in it and below")
    labelled = [path for path in images if path.parent != folder != root]
    if labelled:
        leave_out(folder, set(images) - set(labelled), "in no class folder")
        images = labelled
    labels = [path.relative_to(folder).parts[0] if labelled else "" for path in images]
    classes = sorted({*labels} - {""})
    numbers = {label: i for i, label in enumerate(classes)}
    labels = torch.tensor([numbers.get(label, -1) for label in labels])
    return Split(images, [path.relative_to(root).as_posix() for path in images], labels, classes)


ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}


def leave_out(folder, paths, reason):
    """Say which files of a folder are not used."""
    if paths:
        few = ", ".join(sorted(path.name for path in paths)[:5])
        note(f"{folder}: {len(paths)} files left out, since they are {reason}: {few}")


def open_data(data, wanted, toy="letters"):
    """Return the (train, val) splits of --data; wanted: what needs labels, such as "knn, linear".

    val is None where that cannot be done. A class that only val has is refused before training.
    """
    train = open_split(data, "train", toy)
    val = open_split(data, "val", toy) if wanted else None
    if wanted and not (val and val.classes and train.classes):
        note(f"{wanted}: skipped, since {data} has no {'labels' if val else 'val split'}")
        return train, None
    if val and val.classes != train.classes:
        more = set(val.classes) - set(train.classes)
        if more:
            fail(f"val/ of {data} has classes that train/ lacks: {sorted(more)[:5]}")
        note(f"val/ has no images of {sorted(set(train.classes) - set(val.classes))}")
        numbers = torch.tensor([train.classes.index(name) for name in val.classes])
        val = dataclasses.replace(val, labels=numbers[val.labels], classes=train.classes)
    return train, val


def cifar10(folder, name):
    """Read CIFAR-10 from its home page's archive, downloaded once into `folder` and checked."""
    archive = folder / "cifar-10-binary.tar.gz"
    if not archive.exists():
        part = folder / f"{archive.name}.{os.getpid()}"  # ranks may get here together
        try:
            folder.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(CIFAR10_URL, part)
        except OSError as error:
            part.unlink(missing_ok=True)
            place = f"{folder}/cifar10/train/CLASS/*.png and val/CLASS/*.png"
            fail(f"no CIFAR-10 ({error}): put {CIFAR10_URL} at {archive}, or images at {place}")
        part.replace(archive)
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
    return Split(list(pixels), names, torch.tensor(labels, dtype=torch.long), classes)


def toy_random(name):
    """Return (generator, labels 0, 1, ..., 9, 0, ...) of a toy's 8,000 or 2,000 images."""
    count = 8000 if name == "train" else 2000
    return np.random.default_rng(count), np.arange(count) % 10


@functools.lru_cache(maxsize=2)
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
            along = ((tile - start) / (end - start)).real.clip(0, 1)  # nearest point of the stroke
            distance = abs(tile - start - along * (end - start))
            np.maximum(letter, (1.2 - distance).clip(0, 1), out=letter)
    random, labels = toy_random(name)
    which = random.integers(0, 10, (len(labels), 6, 6))
    ink = alphabets[labels[:, None, None], which].transpose(0, 1, 3, 2, 4)  # [N, 6, 8, 6, 8]
    paper = 128 + random.uniform(-40, 40, (len(labels), 6, 1, 6, 1, 3))
    light = paper.mean(-1, keepdims=True) > 128
    contrast = random.uniform(80, 110, light.shape) * np.where(light, -1, 1)
    images = paper + contrast * ink[..., None]
    images = (images + random.normal(0, 8, images.shape)).reshape(-1, 48, 48, 3)
    return in_memory(images, labels, [f"alphabet {i}" for i in range(10)], name)


@functools.lru_cache(maxsize=2)
def textures(name):
    """Ten grey textures, 24 x 24, at any turn, phase and scale, in noise."""
    random, labels = toy_random(name)
    draws = random.uniform(-np.pi, np.pi, (4, len(labels), 1, 1))
    turn, scale, *phases = draws
    pixels = np.arange(24) - 12 + 1j * (np.arange(24) - 12)[:, None]  # complex numbers x + iy
    pixels = pixels * np.pi / 6 * np.exp(scale / 16 + 1j * turn)  # radians
    u = pixels.real + phases[0]
    v = pixels.imag + phases[1]
    kinds = {
        "stripes": np.sin(u),
        "lines": np.sin(u) ** 8,
        "checks": np.sin(u) * np.sin(v),
        "dots": (np.sin(u) * np.sin(v)) ** 8,
        "grid": np.maximum(np.sin(u) ** 8, np.sin(v) ** 8),
        "honeycomb": np.cos(u) + 2 * np.cos(u / 2) * np.cos(0.866 * v),
        "zigzag": np.sin(u + 4 * abs(v / np.pi % 2 - 1)),
        "snakes": np.sin(u + 2 * np.sin(v)),
        "rings": np.sin(np.hypot(u, v)),
        "weave": np.sin(u) * np.sign(np.sin(v)),
    }
    grey = np.choose(labels[:, None, None], list(kinds.values()))
    grey = grey - grey.mean((1, 2), keepdims=True)
    grey = 128 + 40 * grey / grey.std((1, 2), keepdims=True)
    grey = grey + random.normal(0, 8, grey.shape)
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

    def uniform(low, high):
        return torch.empty(1).uniform_(low, high, generator=random).item()

    for _ in range(10):
        area = width * height * uniform(*scale)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(height - h + 1, (1,), generator=random).item()
            left = torch.randint(width - w + 1, (1,), generator=random).item()
            return top, left, h, w
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def centre_box(size, i, width, height):
    """Return the part that evaluation sees: shorter side to size*256/224, then a centre crop.

    An image of exactly size x size stays as it is.
    """
    whole = (width, height) == (size, size)
    side = size if whole else min(width, height) * size / int(size * 256 / 224)
    return [((height - side) / 2, (width - side) / 2, side, side)]


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


def start_worker(worker):
    """Prepare a loading process."""
    # Workers get Ctrl-C and SIGTERM too. They ignore them: the main process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # An item that finds no shared memory would be lost, and the main process would wait for ever.
    failed = staticmethod(lambda error, item: os._exit(1))
    multiprocessing.queues.Queue._on_queue_feeder_error = failed


def make_loader(make, numbers, config, world):
    """Iterate over make(number), made ahead of time in --workers processes."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    options = {"num_workers": min(config.workers, max(1, os.cpu_count() // ranks))}
    options["pin_memory"] = world.device.type == "cuda"
    loader = DataLoader(
        numbers, batch_size=None, collate_fn=make, worker_init_fn=start_worker, **options
    )
    return iter(loader)


def centre_crops(split, size, indices):
    """Make a loader's item: (indices [B], pixels uint8 [B, 3, S, S], unreadable files)."""
    box = functools.partial(centre_box, size)
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
        if features is None and world.rank == 0:  # a large bank is held once, and filled in place
            features = rows.new_empty(n, *rows.shape[1:])
        if world.rank == 0:
            features[indices] = rows
            good[indices.cpu()] = True
    names = [name for name, read in zip(split.names, good, strict=True) if read]
    if names and len(names) < n:
        features = features[good]
    return features, split.labels[good].to(world.device), names


def raw_pixels(images):
    """Stand in for an encoder: the pixels, averaged down to 32 x 32 where there are more."""
    return F.adaptive_avg_pool2d(images, min(32, images.shape[-1])).flatten(1)


def knn(bank, labels, queries, k=20, temperature=0.07):
    """Classify by the votes exp(cosine similarity / temperature) of k neighbours: scores [Q, C]."""
    k = min(k, len(bank))
    norms = bank.norm(dim=1)
    scores = []
    chunk = max(1, 2**27 // len(bank))  # 0.5 GiB of similarities
    for rows in F.normalize(queries, dim=1).split(chunk):
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
            scores = [head.eval()(x) for x in val.split(2048)]
            accuracy[name] = top1(torch.cat(scores), labels)
    best = max(accuracy, key=accuracy.get)
    return accuracy[best], best


def save_picture(path, tiles, tile=96, gap=4):
    """Write a grid of normalised images [rows, columns, 3, S, S] as PNG."""
    tiles = (tiles.cpu() * STD + MEAN).clamp(0, 1) * 255
    rows = []
    for row in tiles:
        scaled = F.pad(F.interpolate(row, (tile, tile)), [gap] * 4, value=255.0)
        rows.append(torch.cat(list(scaled), dim=2))  # side by side
    picture = torch.cat(rows, dim=1)  # [3, H, W]
    Image.fromarray(picture.byte().permute(1, 2, 0).numpy()).save(path)
