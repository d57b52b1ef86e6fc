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
        (self.out / "log.jsonl").touch()
        self.step = 0
        self.bad = 0  # steps in a row that were not finite
        self.loss = 0.0
        self.signalled = self.stopping = False
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        if steps and config.resume and (self.out / "last.pt").exists():
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


# --------------------------------------------------------------------------------------------------
# Until the other scripts follow: what they still need of the former common.py
# --------------------------------------------------------------------------------------------------
import difflib  # noqa: E402
import resource  # noqa: E402
import threading  # noqa: E402


def old_sincos_1d(width, positions):
    """Sine-cosine embedding of real positions: [sin(p w_j) | cos(p w_j)], w_j = 10000^(-j / (width/2)).

    positions: array [N] -> float64 tensor [N, width]; width must be even.
    """
    omega = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(np.asarray(positions, dtype=np.float64), omega)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))


def old_sincos_2d(width, height, breadth):
    """Positions of a height x breadth grid in raster order -> float64 [height*breadth, width]; width divisible by 4.

    The first half encodes the column and the second the row, as in MAE and everything that descends from it.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, not {width}")
    row, column = np.mgrid[:height, :breadth].reshape(2, -1)
    return torch.cat([old_sincos_1d(width // 2, column), old_sincos_1d(width // 2, row)], dim=1)


def old_sincos_3d(width, frames, height, breadth):
    """Positions of a (time, row, column) grid in raster order -> float64 [frames*height*breadth, width].

    Each axis gets 2*ceil(width/6) columns and the whole is cut to `width` (V-JEPA's `uniform_power`).
    """
    axis = 2 * math.ceil(width / 6)
    grid = np.mgrid[:frames, :height, :breadth].reshape(3, -1)
    return torch.cat([old_sincos_1d(axis, positions) for positions in grid], dim=1)[:, :width]


def old_interpolate_positions(table, old, new):
    """Resample a position table to another grid, bicubic: table [1, N, D], old, new (rows, columns) -> [1, N', D]."""
    if tuple(old) == tuple(new):
        return table
    grid = table.float().unflatten(1, tuple(old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=tuple(new), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(table.dtype)


def old_gather_tokens(x, keep):
    """Pick tokens: x [B, N, D], keep int64 [B, K] -> [B, K, D]; keep [M, B, K] (M masks) -> [M*B, K, D], mask-major."""
    picked = x[torch.arange(x.shape[0], device=x.device)[:, None], keep]
    return picked if keep.dim() == 2 else picked.flatten(0, 1)


class OldAttention(nn.Module):
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
            q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        else:
            weight, bias = (self.qkv.weight, self.qkv.bias)
            q, kv = (
                F.linear(x[:, -queries:], weight[:width], bias[:width]),
                F.linear(x, weight[width:], bias[width:]),
            )
            q = q.view(batch, queries, self.heads, -1).transpose(1, 2)
            k, v = kv.view(batch, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, -1, width))


class OldCrossAttention(nn.Module):
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


class OLD_MLP(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class OldSwiGLU(nn.Module):
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


class OldLayerScale(nn.Module):
    """A learned gain per channel on a residual branch (CaiT)."""

    def __init__(self, width, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(init)))

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return x * self.gamma


def old_stochastic_depth(branch, rate, uniform):
    """Drop a residual branch for some samples: branch [B, N, D], uniform [B] in [0, 1); the kept times 1/(1-rate)."""
    return branch * ((uniform >= rate).to(branch.dtype) / (1 - rate))[:, None, None]


class OldBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads, layer_scale=None, drop_path=0.0, swiglu=False):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-06)
        self.attn = OldAttention(width, heads)
        self.ls1 = nn.Identity() if layer_scale is None else OldLayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-06)
        self.mlp = (OldSwiGLU if swiglu else OLD_MLP)(width, 4 * width)
        self.ls2 = nn.Identity() if layer_scale is None else OldLayerScale(width, layer_scale)

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
        x = x + old_stochastic_depth(attended, self.drop_path, drop[0])
        return x + old_stochastic_depth(self.ls2(self.mlp(self.norm2(x))), self.drop_path, drop[1])


class OldPatchEmbed(nn.Module):
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
        x = x.reshape(*x.shape[:2], *sizes).permute(
            0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2)
        )
        return x.flatten(1, n).flatten(2)

    def forward(self, patches):
        """patches [B, N, C*p*p] -> tokens [B, N, D]."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def old_init_weights(module, std=0.02):
    """For `module.apply`: Linear and convolution weights normal(0, std), their biases 0, LayerNorm 1 and 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class OldViT(nn.Module):
    """Vision transformer (pre-norm; fixed sin-cos or learned positions; a class token if asked for).

    image_size, patch: pixels. The forward pass returns all tokens after the final norm, in the order [class | patches].
    """

    def __init__(
        self, image_size, patch, width, depth, heads, class_token=False, learned_positions=False
    ):
        super().__init__()
        if image_size % patch or width % heads:
            sizes = f"image size {image_size} must be a multiple of the patch {patch}"
            raise ValueError(f"{sizes}, width {width} of the heads {heads}")
        self.grid = (image_size // patch, image_size // patch)
        self.width = width
        self.patch_embed = OldPatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        table = old_sincos_2d(width, *self.grid).float()
        if class_token:
            table = torch.cat([torch.zeros(1, width), table])
        self.pos_embed = nn.Parameter(table[None], requires_grad=learned_positions)
        self.blocks = nn.ModuleList((OldBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-06)
        self.apply(old_init_weights)
        for tokens in (self.cls_token, self.pos_embed if learned_positions else None):
            if tokens is not None:
                nn.init.normal_(tokens, std=0.02)

    def embed(self, x, keep=None):
        """What enters the first block: [class | patches], positions added. Arguments as in `forward`."""
        grid = self.grid
        if x.dim() > 3:
            grid = tuple((side // k for side, k in zip(x.shape[2:], self.patch_embed.kernel)))
            x = self.patch_embed.patchify(x)
        special = 0 if self.cls_token is None else 1
        positions = self.pos_embed[:, special:]
        if grid != self.grid:
            positions = old_interpolate_positions(positions, self.grid, grid)
        if keep is None:
            x = self.patch_embed(x) + positions
        else:
            x = self.patch_embed(old_gather_tokens(x, keep)) + positions[0][keep.flatten(0, -2)]
        if self.cls_token is None:
            return x
        return torch.cat(
            [(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], dim=1
        )

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


class OLD_EMA:
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


def old_linear_schedule(step, total, start, final):
    """From start at step 0 to final at step `total`, in a line."""
    return start + (final - start) * step / max(1, total)


def old_cosine_schedule(step, total, start, final):
    """From start at step 0 to final at step `total` and after, along half a cosine."""
    return final + (start - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


def old_warmup_cosine_schedule(step, total, warmup, start, peak, final):
    """Linear from start to peak over `warmup` steps, then a cosine to final at `total`."""
    if step < warmup:
        return old_linear_schedule(step, warmup, start, peak)
    return old_cosine_schedule(step - warmup, total - warmup, peak, final)


def old_parameter_groups(*modules):
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


@dataclasses.dataclass(frozen=True)
class OldWorld:
    """Where this process stands: rank of size, and the device it computes on."""

    rank: int
    size: int
    device: torch.device


def old_start_world(device="", timeout=None):
    """Join the process group that torchrun describes, if any, or run alone. device: cuda | mps | cpu, '' = best.

    timeout: a timedelta, how long ranks wait for one another, default torch's.
    """
    if not device:
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if device not in ("cuda", "mps", "cpu"):
        old_fail(f"--device {device!r} is not one of cuda, mps, cpu")
    if device == "mps" and (not torch.backends.mps.is_available()):
        old_fail("--device mps, but this is no Mac whose GPU torch can use; use --device cpu")
    if device == "cuda" and (not torch.cuda.is_available()):
        old_fail(
            "--device cuda, but this machine has no CUDA device that torch can see; use --device cpu"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = True
        device = f"cuda:{torch.cuda.current_device()}"
    if "RANK" in os.environ and (not dist.is_initialized()):
        store, rank, size = next(rendezvous("env://"))
        store = dist.PrefixStore(
            f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    joined = dist.is_initialized()
    return OldWorld(
        dist.get_rank() if joined else 0,
        dist.get_world_size() if joined else 1,
        torch.device(device),
    )


class _OldMeanOverRanks(torch.autograd.Function):
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


def old_mean_over_ranks(x):
    """Mean of a tensor over ranks, differentiable: with DDP's averaging, the gradients are those of one big batch."""
    return _OldMeanOverRanks.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def old_gather_over_ranks(x):
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


def old_ignore_signals(worker):
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


def old_distribute(model, world, shard=False):
    """Wrap for all ranks: DDP, or with `shard` FSDP2, block by block. Alone, or with nothing to train: as it is."""
    if shard:
        for module in model.modules():
            if isinstance(module, OldBlock):
                fully_shard(module)
        return fully_shard(model)
    if world.size == 1 or not any((p.requires_grad for p in model.parameters())):
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def old_no_sync(model, last):
    """A context for one of several backward passes of a step: gradients are exchanged in the last one only."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if not last and hasattr(model, "no_sync") else contextlib.nullcontext()


def old_gradient_norm(parameters):
    """L2 norm of all gradients as a 0-dim tensor on the device, over all shards where they are sharded."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def old_effective_rank(features):
    """exp of the entropy of the normalised singular values of centred features [B, D]: 1 (collapsed) to min(B, D)."""
    values = torch.linalg.svdvals((features - features.mean(0)).float())
    p = values / values.sum().clamp(min=1e-12)
    return torch.exp(torch.special.entr(p).sum())


def old_memory_gib(device):
    """Peak memory so far in GiB: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError, TypeError):
        return int(re.search("VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def old_generator(*key, device="cpu"):
    """A torch.Generator seeded by a key such as (seed, "crop", step, sample): same key, same draws, anywhere."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def old_send(x, device):
    """x on the device, where the host does not wait for what the device still has to do."""
    return x.to(device, non_blocking=True)


@functools.lru_cache
@torch.inference_mode(False)
def old_constant(values, device):
    """A tensor of these numbers, made once: to copy them to an accelerator at each step would make the host wait."""
    return torch.tensor(values, device=device)


def old_worker_count(config, world, streaming):
    """Loading processes a rank: --workers, or as many as the machine has cores; none where the data are in memory
    and on the CPU, since a step's draws cost less than a process."""
    if config.workers >= 0:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(12, cores // ranks)) if streaming else int(world.device.type == "cuda")


def old_choose_precision(name, device):
    """'bf16' | 'fp16' | 'fp32' | '' (bf16 where the hardware computes in it, else fp32) -> torch dtype."""
    if not name:
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
        else:
            fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
            name = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def old_fail(message, code=2):
    """Print one line that a newcomer can act on, and leave with this exit code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def old_fail_if_full(error):
    """For an OSError that nothing else has answered: exit 1 if it says that the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        old_fail(
            f"the disk is full: {error}; what was saved before is intact. Free some space, then --resume.",
            code=1,
        )


def old_nearest(word, words):
    """'; did you mean a, b?' for a mistyped word, or '.' where nothing comes near."""
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else "."


OLD_POSITIVE = "batch accumulate image_size patch width depth heads log_every save_every eval_batch probe_batch".split()


OLD_NOT_NEGATIVE = "steps epochs lr lr_start lr_final warmup weight_decay cache max_bad".split()


def old_parse_config(config_class, presets, data_presets, argv=None, description=None):
    """Command line -> config. Each dataclass field is a flag, the comment beside it its help; flags override presets.

    presets: {name: {field: value}}; data_presets: {data name: preset name}, "*" for any other data.
    Exits with 2 for an unknown flag or preset, naming the nearest known ones, and for a value that no run can have.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    comments = dict(
        re.findall("^    (\\w+):[^#\\n]*# (.*)$", inspect.getsource(config_class), re.MULTILINE)
    )
    hints = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class)}

    def flag(name):
        return "--" + name.replace("_", "-")

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.error = old_fail
    early.add_argument("--preset")
    early.add_argument("--data")
    first, _ = early.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    name = first.preset or data_presets.get(first.data or fields["data"].default, data_presets["*"])
    if name not in presets:
        old_fail(
            f"unknown preset {name!r}{old_nearest(name, presets)} Known: {', '.join(presets)}."
        )
    defaults = {n: f.default for n, f in fields.items()} | presets[name] | {"preset": name}
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--preset NAME] [--data NAME or PATH] [--FLAG VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = old_fail
    for field, hint in hints.items():
        text = (
            comments.get(field, "").replace("%", "%%")
            + f" [{str(defaults[field]).replace('%', '%%')}]"
        )
        options = {"help": text, "default": defaults[field]}
        if field == "preset":
            options["help"] = f"one of {', '.join(presets)} [{name}]"
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            kind, *rest = typing.get_args(hint) or (hint,)
            options |= {"type": kind, "metavar": kind.__name__.upper()}
            if rest:
                options["nargs"] = "*" if rest[-1] is ... else 1 + len(rest)
        parser.add_argument(flag(field), **options)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
        old_fail(
            f"unknown argument {word}{old_nearest(word, [flag(f) for f in fields])} --help lists all."
        )
    for field, value in vars(args).items():
        if isinstance(value, float) and math.isnan(value):
            old_fail(f"{flag(field)} is not a number")
        if field in OLD_POSITIVE and value < 1 or (field in OLD_NOT_NEGATIVE and value < 0):
            old_fail(f"{flag(field)} {value} is below {int(field in OLD_POSITIVE)}")
    place = Path(getattr(args, "features_out", "")).parent
    if not place.is_dir():
        old_fail(f"--features-out {args.features_out}: there is no folder {place}")
    return config_class(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items()}
    )


def old_given_flags(argv):
    """The names of the fields that the command line sets itself: {'steps', 'out', ...}."""
    return {
        a[2:].split("=")[0].removeprefix("no-").replace("-", "_")
        for a in argv
        if a.startswith("--")
    }


def old_full_state(model, optimizer=None):
    """Plain CPU tensors by parameter name, gathered from all ranks if sharded: (model state, optimizer's or None)."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(model, options=options)
    return (
        weights,
        dcp.get_optimizer_state_dict(model, optimizer, options=options) if optimizer else None,
    )


def old_load_full_state(model, state, optimizer=None, optimizer_state=None):
    """The inverse of `full_state`, on any number of ranks."""
    options = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_model_state_dict(model, state, options=options)
    if optimizer is not None:
        dcp.set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)


@contextlib.contextmanager
def old_replacing(path):
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
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = (
            f"the previous {path.name} is intact" if path.exists() else "there was no earlier one"
        )
        advice = "Free some space or choose another --out, then --resume."
        old_fail(f"could not write {path}: {error}; {kept}. {advice}", code=1)


def old_save_checkpoint(path, state):
    """Write plain tensors, numbers and strings, atomically."""
    with old_replacing(path) as file:
        torch.save(state, file)


def old_save_config(out, config):
    """Write config.json into the run's folder, atomically, since --resume comes here again and may be killed."""
    with old_replacing(Path(out) / "config.json") as file:
        file.write(json.dumps(dataclasses.asdict(config), indent=2).encode() + b"\n")


def old_load_checkpoint(path):
    """Read a checkpoint, a dict of plain tensors, mapped from disk; runs no code in it. Exits with 2 if it is none.

    torch does not check what it reads, so a flipped bit would become a weight: the archive's checksums are compared.
    """
    if not Path(path).is_file():
        old_fail(f"no checkpoint at {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0][:150]
        old_fail(
            f"{path} is truncated, or not a checkpoint that can be read safely ({type(error).__name__}: {reason})"
        )
    if not isinstance(state, dict):
        old_fail(
            f"{path} is not a checkpoint: expected a dict of weights, found {type(state).__name__}"
        )
    return state


def old_read_own_checkpoint(path, script, architecture=(), config=None):
    """A last.pt of `script`. Exits with 2 if it is another's, or if a field of `architecture` is not as in config."""
    state = old_load_checkpoint(path)
    if not isinstance(state, dict) or state.get("script") != script:
        writer = (
            state["script"] if isinstance(state, dict) and "script" in state else "something else"
        )
        old_fail(f"{path} was not written by {script}.py, but by {writer}")
    theirs = state["config"]
    differ = [k for k in architecture if config is not None and theirs[k] != getattr(config, k)]
    if differ:
        differences = (
            f"--{k.replace('_', '-')} {theirs[k]} and not {getattr(config, k)}" for k in differ
        )
        old_fail(f"{path} was trained with {', '.join(differences)}")
    return state


def old_load_state(module, state, what):
    """`load_state_dict`; a mismatch is one readable error (exit 2) that lists missing, unexpected, misshapen keys."""
    own = module.state_dict()
    missing, unexpected = (sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys()))
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    shapes = [f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}" for k in wrong]
    if missing or unexpected or shapes:
        lists = dict(missing=missing, unexpected=unexpected, shapes=shapes)
        parts = [f"{name}: {', '.join(keys)}" for name, keys in lists.items() if keys]
        old_fail(f"{what} does not fit this model. " + ". ".join(parts))
    module.load_state_dict(state)


def old_lock(folder):
    """Whether this process has the folder for itself, from now to its end. OSError if it cannot be written.

    A POSIX lock: it ends with the process, even by kill -9, and loading processes do not inherit it. A system or a
    filesystem that knows no such locks grants everything.
    """
    try:
        import fcntl
    except ImportError:
        return True
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 438)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def old_choose_out(out, script, resume, world):
    """The run's folder, made and locked. '' -> runs/SCRIPT, or the first free runs/SCRIPT-2, ... (resume: the last).

    Exits with 2 if it cannot be written, if another process is writing it, or if it was named and already holds a run
    that is not to be resumed.
    """
    path, problem = (Path(out), "")
    if world.rank == 0:
        try:
            if not out:
                names = [
                    Path("runs", script),
                    *(Path("runs", f"{script}-{i}") for i in range(2, 10000)),
                ]
                free = next((i for i, name in enumerate(names) if not name.exists()))
                path = names[max(0, free - 1)]
                for path in [] if resume else names[free:]:
                    with contextlib.suppress(FileExistsError):
                        path.mkdir(parents=True)
                        break
            path.mkdir(parents=True, exist_ok=True)
            if not old_lock(path):
                problem = f"another process is writing to {path}: wait until it has ended, or choose another --out"
            elif (
                out
                and (not resume)
                and any(
                    ((path / name).exists() for name in ("config.json", "last.pt", "log.jsonl"))
                )
            ):
                problem = f"{path} already holds a run: add --resume to continue it, or choose another --out"
        except OSError as error:
            problem = f"cannot write to {path}: {error}; choose another --out"
    if world.size > 1:
        words = [str(path), problem]
        dist.broadcast_object_list(words)
        path, problem = (Path(words[0]), words[1])
    if problem:
        old_fail(problem)
    return path


def old_resume_command(out):
    """The command line that continues this run."""
    words = [w for w in sys.argv[1:] if w != "--resume"]
    if "out" not in old_given_flags(words):
        words += ["--out", str(out)]
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", "--nproc-per-node", ranks] if ranks else ["python"]
    return shlex.join([*launcher, Path(sys.argv[0]).name, *words, "--resume"])


def old_stop_not_finite(out, step):
    """Leave after three steps in a row that were not applied (exit 3), and say which weights are still good."""
    last = Path(out) / "last.pt"
    kept = (
        f"{last} holds the last good weights"
        if last.exists()
        else "no checkpoint had been written yet"
    )
    bad = f"loss or gradients were not finite in three steps in a row before step {step}"
    old_fail(f"{bad}; {kept}. Try a lower --lr, or --precision fp32.", code=3)


class OldLog:
    """log.jsonl, a progress bar, and the request to stop: SIGTERM and SIGINT set `stop`, the loop ends its step."""

    def __init__(self, out, world, total=0, start=0):
        self.rank, self.start, self.total, self.stop = (world.rank, start, total, None)
        self.path = Path(out) / "log.jsonl"
        self.bar, self.began, self.skipped = (None, time.monotonic(), set())
        self.size, self.catching = (world.size, False)
        if self.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if total and self.path.exists():
                kept = []
                for line in self.path.read_text(errors="replace").splitlines():
                    with contextlib.suppress(ValueError):
                        if json.loads(line).get("step", 0) <= start:
                            kept.append(line + "\n")
                with old_replacing(self.path) as file:
                    file.write("".join(kept).encode())
            if total > start and sys.stderr.isatty():
                self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def catch_signals(self):
        """From now on SIGTERM and SIGINT ask for a stop instead of ending the process."""
        self.handle_signals(lambda caught, frame: setattr(self, "stop", caught))

    def leave(self, *_):
        """End at once: what follows training can be done again from last.pt."""
        self.say(f"stopped. To continue: {old_resume_command(self.path.parent)}")
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
                old_fail(
                    f"could not write {self.path}: {error}; last.pt is intact. Free some space, then --resume.",
                    1,
                )

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
            values = " ".join((f"{k} {v}" for k, v in text.items()))
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
            old_fail(
                f"{len(self.skipped)} of {total} files could not be read, more than --max-bad {limit:g} allows"
            )

    def close(self):
        """End the progress bar. From now on a signal ends the process, but no rank, since others may wait for it."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.catching and self.size == 1:
            self.handle_signals(self.leave)


OLD_TOY_CLASSES = [
    "stripes",
    "lines",
    "checks",
    "dots",
    "grid",
    "honeycomb",
    "zigzag",
    "quincunx",
    "rings",
    "weave",
]


@functools.lru_cache(maxsize=4)
def old_toy_images(split, size=24):
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
    turn, period = (uniform(-np.pi, np.pi), size / 2 * np.exp(uniform(-0.2, 0.2)))
    u = (line * np.cos(turn) + line[:, None] * np.sin(turn)) * 2 * np.pi / period + uniform(
        0, 2 * np.pi
    )
    v = (line[:, None] * np.cos(turn) - line * np.sin(turn)) * 2 * np.pi / period + uniform(
        0, 2 * np.pi
    )
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
    ]
    grey = np.empty((count, size, size))
    for k, texture in enumerate(textures):
        grey[k::10] = texture(u[k::10], v[k::10])
    grey = (grey - grey.mean((1, 2), keepdims=True)) / grey.std((1, 2), keepdims=True)
    light = uniform(-1, 1) + (uniform(-1, 1) * line[:, None] + uniform(-1, 1) * line) / (size / 2)
    grey = 128 + 40 * grey + 30 * light + random.normal(0, 8, grey.shape)
    pixels = torch.from_numpy(grey.clip(0, 255).astype(np.uint8))[:, None].repeat(1, 3, 1, 1)
    return (pixels, torch.arange(count) % 10)
