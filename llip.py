# SPDX-License-Identifier: MIT
"""Llip: the caption chooses which mix of an image's visual tokens it is compared with.

"Modeling Caption Diversity in Contrastive Vision-Language Pretraining", Lavoie, Kirichenko, Ibrahim, Assran, Wilson,
Courville, Ballas, ICML 2024, arXiv 2405.00740.

The idea. One image has many valid captions, and each says something else about it. CLIP and SigLIP want one vector per
image that is near to all of them. Llip's vision transformer gives K mixture tokens instead, and a light cross-attention
with the caption as its query mixes them into an image vector made for that caption. The loss is SigLIP's: for every
image and every caption of the global batch, do they belong together? For the pair (i, j) image i is mixed for caption
j, also where they do not belong together: else the caption inside the image vector would give the answer away. So there
are N x N image vectors. They are never held at once: the loss and its gradients are computed tile by tile.

    images [B, 3, S, S] -- ViT, K class tokens --> [B, K, W] -- a matrix per token --> keys, values [B, H, K, d] --.
                                                                                                                   |
                                                   .-- queries [T, H, d] ----> softmax(q k / tau) mixes the values +
    captions [T, L] -- causal transformer --> [T, U]                                                               |
                                                   '-- z' [T, D] -- cosine with the mixed z [B, T, D] -- sigmoid loss

    python llip.py                                               # toy scenes with many captions, a few minutes
    python llip.py --model siglip                                # the same towers with one vector per image; also clip
    python llip.py --data captions_train2017.json --images train2017 --vocabulary bpe_simple_vocab_16e6.txt.gz
    torchrun --nproc-per-node 8 llip.py --preset vit_b16 --data "shards/{00000..01242}.tar" --val-data imagenet
    python llip.py --init llip_b16_k32.pt --data imagenet --eval zeroshot --vocabulary bpe_simple_vocab_16e6.txt.gz

The paper reports: ImageNet zero-shot top-1 83.5 with ViT-G/14, K = 64 (MetaCLIP 82.1); the mean over 22 zero-shot sets
69.7, 74.7, 77.7, 79.7 for B/16, L/14, H/14, G/14 (MetaCLIP 66.2, 72.8, 75.5, 76.8); COCO image-to-text +6.0 points.
What this file was measured to do stands in the README.

Where paper and released code may differ, this follows the code: queries come from the text transformer's output and not
from the projected z'; every token has key and value matrices of its own; tau divides alone, without sqrt(d); the sum
over pairs is divided by the number of images. Departures from the code, which change no number: texts are gathered from
all ranks, instead of passed on in a ring; the pair loss goes by tiles, in float32; --accumulate encodes every part
twice and so keeps all negatives. Departures that do: small models want tau near sqrt(D / H), as a small one picks a
random token early and stays with it; the bias starts at ln(1 / (batch - 1)), the log-odds of a true pair, and learns
ten times faster, since -10 fits batches of 22,000 and Adam moves it by about the learning rate a step; tar shards are
read by index instead of as a pipe, so that every step knows its samples. OpenAI's own files are TorchScript archives,
which run code: save their state dict first.
"""

import contextlib
import csv
import functools
import gzip
import hashlib
import heapq
import html
import http.client
import io
import itertools
import json
import math
import os
import re
import sys
import tarfile
import time
import unicodedata
import urllib.request
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import common
from common import OldLog as Log, OldWorld as World, old_fail as fail, old_generator as generator

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag, and the comment beside it is its help text."""

    preset: str = ""  # a name of PRESETS; by default the one that fits --data
    data: str = "toy"  # toy, cifar10, a folder of $DATA, or a path: captions file, tar shards, folder (open_data)
    images: str = ""  # folder that image names in a captions file are relative to, default the file's own
    val_data: str = ""  # what to evaluate on, as --data; default what belongs to it: val/, or a file called val

    # model
    model: str = "llip"  # llip, siglip, clip; registers, average, learned: SigLIP with K tokens (see MODELS)
    image_size: int = 32  # side of the image, pixels
    patch: int = 8  # side of a patch, pixels
    width: int = 64  # vision width
    depth: int = 3  # vision blocks
    heads: int = 4  # attention heads of the vision transformer
    mlp_hidden: int = 0  # hidden width of its MLPs, 0 = 4 x width
    mixture_tokens: int = 8  # K: class tokens; siglip and clip have one
    all_tokens: bool = False  # llip and learned: mix the patches too, K + P tokens
    text_width: int = 64  # text width
    text_depth: int = 2  # text blocks
    text_heads: int = 4  # attention heads of the text transformer
    context: int = 16  # tokens of a caption with its start and end; longer captions are cut
    embedding: int = 32  # D: width of the space in which images and captions are compared
    mix_heads: int = 4  # H: heads of the mixing cross-attention
    mix_norm: bool = False  # layer norm on keys, values and queries (the paper's H/14 and G/14)
    tau: float = 3.0  # temperature of the mixing softmax; there is no 1/sqrt(d) besides, so sqrt(D/H) is the usual one
    quick_gelu: bool = True  # x sigmoid(1.702 x) instead of the exact GELU

    # tokenizer
    vocabulary: str = ""  # bpe_simple_vocab_16e6.txt.gz, or a file like it; default: --merges, or bytes
    merges: int = 0  # learn a vocabulary of this many merges from the training captions; 0 = plain bytes

    # loss
    logit_scale: float = 1 / 0.07  # initial factor s on the cosine; learned
    logit_bias: str = "auto"  # initial bias b of the sigmoid loss, learned; auto = ln(1 / (batch - 1)), the paper: -10
    pair_memory: int = 0  # MiB for one tile of the pair loss and of scoring, 0 = 16 on a CPU, 512 on a GPU

    # augmentation
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop, share of the image
    flip: bool = False  # mirror half of the images: not where captions say left and right

    # optimisation
    batch: int = 128  # pairs a step, over all ranks; each is a negative of all others
    accumulate: int = 1  # encode a rank's share of the batch in this many parts; the loss is still of the whole batch
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps; wins over --epochs
    warmup: float = 0.05  # share of the run in which lr rises
    lr: float = 2e-3  # peak learning rate
    logit_lr: float = 10.0  # learning rate of scale and bias, times --lr
    weight_decay: float = 0.1  # AdamW weight decay
    beta2: float = 0.95  # AdamW: memory of squared gradients (the paper's CLIP baselines: 0.98)
    recompute: bool = False  # activation checkpointing: less memory, a third more time

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/llip, runs/llip-2, ...
    resume: bool = False  # continue from last.pt in the run's folder, or start if there is none
    init: str = ""  # checkpoint to start from or to evaluate: ours, Llip's, or in the layout of OpenAI's and OpenCLIP's
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between rows of log.jsonl
    device: str = ""  # cuda, mps or cpu, default the best there is
    precision: str = ""  # bf16, fp16 or fp32, default bf16 where the hardware computes in it, else fp32
    compile: bool = torch.cuda.is_available()  # torch.compile the networks
    shard: bool = False  # FSDP2 instead of DDP, for models that do not fit one GPU
    workers: int = -1  # data loading processes a rank, -1 = as fits the machine and the data
    cache: float = 2.0  # GiB: data sets whose decoded pixels fit are kept in memory
    buffer: int = 5000  # samples of tar shards that are shuffled together
    max_bad: float = 0.01  # share of unreadable images, or of images without caption, above which a run stops

    # evaluation
    eval: str = "kinds,retrieval,linear"  # comma-separated: kinds (toy), zeroshot, retrieval, linear, features; or none
    baselines: bool = True  # evaluate beside it a randomly initialised network and, for llip, the mean of all tokens
    eval_limit: int = 5000  # use at most this many images for retrieval and for training the linear probe, 0 = all
    eval_batch: int = 256  # images, or captions, a forward pass in evaluation, a rank
    eval_taus: tuple[float, ...] = ()  # further temperatures of the mixing softmax to evaluate zeroshot with
    templates: str = ""  # file of zero-shot prompts, one a line, with {} for the class; default by data set
    class_names: str = ""  # json list of names, or of lists of synonyms, in the order of the class folders
    features_split: str = "val"  # train or val
    features_out: str = ""  # file of --eval features, default features.npz in the run's folder
    tokens: bool = False  # --eval features also writes the K class tokens


PAPER = dict(
    data="folder", image_size=224, patch=16, width=768, depth=12, heads=12, mixture_tokens=64, text_width=512,
    text_depth=12, text_heads=8, context=77, embedding=512, mix_heads=8, tau=5.0,
    vocabulary="bpe_simple_vocab_16e6.txt.gz", logit_bias="-10", crop_scale=(0.9, 1.0), batch=32768, steps=390656,
    warmup=2000 / 390656, lr=5e-4, logit_lr=1.0, weight_decay=0.2, eval="zeroshot,retrieval", log_every=50,
)  # fmt: skip
LARGE = dict(patch=14, width=1024, depth=24, heads=16, text_width=768, text_heads=12, embedding=768, tau=1.0, lr=4e-4)
HUGE = dict(patch=14, width=1280, depth=32, heads=16, text_width=1024, text_depth=24, text_heads=16, embedding=1024,
            mix_norm=True, lr=4e-4, recompute=True)  # fmt: skip
GIANT = dict(patch=14, width=1664, depth=48, heads=16, mlp_hidden=8192, text_width=1280, text_depth=32, text_heads=20,
             embedding=1280, mix_norm=True, lr=4e-4, recompute=True)  # fmt: skip
CIFAR10 = dict(
    data="cifar10", image_size=32, patch=4, width=192, depth=9, heads=3, mixture_tokens=16, text_width=128,
    embedding=128, tau=6.0, merges=200, context=24, crop_scale=(0.5, 1.0), flip=True, batch=1024, epochs=100, lr=1e-3,
    eval="zeroshot,linear", log_every=50,
)  # fmt: skip
FOLDER = dict(
    data="folder", image_size=224, patch=16, width=384, depth=12, heads=6, mixture_tokens=32, text_width=256,
    text_depth=6, text_heads=4, context=64, embedding=256, mix_heads=4, tau=8.0, merges=4000, crop_scale=(0.5, 1.0),
    batch=256, epochs=30, lr=5e-4, eval="zeroshot,retrieval", log_every=50,
)  # fmt: skip
PRESETS = {
    "toy": dict(steps=3000, merges=200),  # the defaults of Config
    "cifar10-cpu": CIFAR10 | dict(patch=8, width=96, depth=4, mixture_tokens=8, text_width=64, embedding=64, tau=4.0,
                                  batch=256, epochs=0, steps=3000),
    "cifar10": CIFAR10,  # on one GPU; not measured yet, nor is folder
    "folder": FOLDER,
    "vit_b32": PAPER | dict(patch=32),
    "vit_b16": PAPER | dict(mixture_tokens=32),
    "vit_l14": PAPER | LARGE,
    "vit_h14": PAPER | HUGE,
    "vit_g14": PAPER | GIANT,
}  # fmt: skip
DATA_PRESETS = {"toy": "toy", "cifar10": "cifar10", "*": "folder"}
# between siglip and llip stand the paper's ablations, each with K class tokens and a matrix for each, but one vector an
# image: the first token; the mean of all; a learned mix of all, H x K weights that are the same for every caption
MODELS = ("llip", "siglip", "clip", "registers", "average", "learned")
EVALUATIONS = ("kinds", "zeroshot", "retrieval", "linear", "features", "none")


def check(config, world, training=True):
    """Refuse what cannot work, before any work (exit 2)."""
    c = config
    if c.image_size % c.patch:
        fail(f"--image-size {c.image_size} is not a multiple of --patch {c.patch}")
    pairs = (("width", "heads"), ("text_width", "text_heads"), ("embedding", "mix_heads"))
    for width, heads in pairs:
        if getattr(c, width) % getattr(c, heads):
            flags = [f"--{name.replace('_', '-')} {getattr(c, name)}" for name in (width, heads)]
            fail(f"{flags[0]} is not a multiple of its heads, {flags[1]}")
    choices = dict(model=MODELS, features_split=("train", "val"), precision=("", "bf16", "fp16", "fp32"))
    for name, known in choices.items():
        if getattr(c, name) not in known:
            fail(f"--{name.replace('_', '-')} {getattr(c, name)!r} is not one of {', '.join(k for k in known if k)}")
    for name in c.eval.split(","):
        if name not in EVALUATIONS:
            fail(f"--eval {name!r} is not one of {', '.join(EVALUATIONS)}")
    if c.tau <= 0 or c.logit_scale <= 0 or c.mixture_tokens < 1 or c.context < 3:
        fail("--tau and --logit-scale must be above 0, --mixture-tokens at least 1, --context at least 3")
    if c.all_tokens and c.model not in ("llip", "learned"):
        fail(f"--all-tokens is for --model llip and learned, not for {c.model}")
    if c.logit_bias != "auto" and not re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", c.logit_bias):
        fail(f"--logit-bias {c.logit_bias!r} is neither a number nor auto")
    if training and (c.batch < 2 or c.batch % (world.size * c.accumulate)):
        fail(f"--batch {c.batch} does not divide into {world.size} ranks x {c.accumulate} accumulations")
    if c.shard and c.precision == "fp16":
        fail("--shard works with bf16 and fp32, not with --precision fp16")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens: byte-level BPE as CLIP has it, with its vocabulary file, one learned from the captions, or plain bytes
# ---------------------------------------------------------------------------------------------------------------------

START, END = "<start_of_text>", "<end_of_text>"
WHOLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # printed as the character of the same number
BYTE_ORDER = WHOLE_BYTES + [b for b in range(256) if b not in set(WHOLE_BYTES)]  # byte values in the order of their ids
BYTE_CHARACTERS = {b: chr(b if i < len(WHOLE_BYTES) else 256 + i - len(WHOLE_BYTES)) for i, b in enumerate(BYTE_ORDER)}
MERGES = 49152 - 256 - 2  # lines of OpenAI's file that its tokenizer uses
CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)


@functools.cache
def repairs():
    """str.translate table: what ftfy does to single characters (curly quotes, ligatures, full width, controls)."""
    table = {c: "'" for c in (0x02BC, *range(0x2018, 0x201C))} | {c: '"' for c in range(0x201C, 0x2020)}
    for c in (0x0132, 0x0133, *range(0x01C4, 0x01CD), *range(0x01F1, 0x01F4), *range(0xFB00, 0xFB07)):
        table[c] = unicodedata.normalize("NFKC", chr(c))
    table |= {c: unicodedata.normalize("NFKC", chr(c)) for c in (0x3000, *range(0xFF00, 0xFFF0))}
    table |= {0x0149: "'n", 0xFB05: "\u017ft"}
    for c in range(0x80, 0xA0):  # read as Windows-1252, where that has a character
        with contextlib.suppress(UnicodeDecodeError):
            character = bytes([c]).decode("cp1252")
            table[c] = table.get(ord(character), character)
    table |= {c: "\n" for c in (0x0D, 0x2028, 0x2029)}
    gone = (*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))
    return table | dict.fromkeys(gone)


def clean(text):
    """A caption as CLIP reads it: characters repaired, entities resolved, one space between words, lower case.

    The repairs are those of the package ftfy but for one: sequences that were decoded wrongly stay as they are.
    """
    while "<" not in text and html.unescape(text) != text:
        text = html.unescape(text)
    text = unicodedata.normalize("NFC", text.translate(repairs()))
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip().lower()


@functools.lru_cache(maxsize=65536)
def character_kind(character):
    """L for letters, N for numbers, a space for spaces, P for all else."""
    return " " if character.isspace() else {"L": "L", "N": "N"}.get(unicodedata.category(character)[0], "P")


def split_words(text):
    """Pieces that are merged apart from each other: special tokens, contractions, letters, single digits, the rest."""
    kinds, pieces, at = "".join(map(character_kind, text)), [], 0
    while at < len(text):
        special = next((s for s in (START, END) if text.startswith(s, at)), None)
        found = CONTRACTION.match(text, at)
        if special:
            end = at + len(special)
        elif found:
            end = found.end()
        elif kinds[at] in " N":
            end = at + 1
        else:
            end = at + len(kinds[at:]) - len(kinds[at:].lstrip(kinds[at]))
        if kinds[at] != " ":
            pieces.append(text[at:end])
        at = end
    return pieces


def to_symbols(piece):
    """The bytes of a piece as printable characters, the last one marked as the end: 'at' -> ('a', 't</w>')."""
    characters = [BYTE_CHARACTERS[b] for b in piece.encode()]
    return (*characters[:-1], characters[-1] + "</w>")


def merge(symbols, pair):
    """Join all occurrences of a pair of neighbours, from left to right."""
    joined, at = [], 0
    while at < len(symbols):
        step = 2 if symbols[at : at + 2] == pair else 1
        joined.append("".join(symbols[at : at + step]))
        at += step
    return tuple(joined)


def learn_merges(captions, count):
    """Byte-pair encoding: `count` times the most frequent pair of neighbours becomes a token (ties: the first in order)
    -> ["left right", ...], the lines of a vocabulary file; fewer where no pair is left that occurs twice."""
    counts = Counter(piece for caption in captions for piece in split_words(clean(caption)))
    words = [(to_symbols(piece), n) for piece, n in counts.items()]
    pairs, where, merges = Counter(), defaultdict(set), []  # where: the words that a pair occurs in, or did

    def tally(index, sign, changed):
        symbols, n = words[index]
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += sign * n
            where[pair].add(index)
            changed.add(pair)

    changed = set()
    for index in range(len(words)):
        tally(index, 1, changed)
    heap = []
    while len(merges) < count:
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
        changed = set()
        while heap and -heap[0][0] != pairs[heap[0][1]]:  # counted before a merge changed it
            heapq.heappop(heap)
        if not heap or -heap[0][0] < 2:
            break
        best = heapq.heappop(heap)[1]
        merges.append(" ".join(best))
        for index in where.pop(best):
            symbols, n = words[index]
            tally(index, -1, changed)
            words[index] = merge(symbols, best), n
            tally(index, 1, changed)
    return merges


class Tokenizer:
    """Captions -> token ids. merges: ["left right", ...] in order of rank; None: ids are bytes, for no vocabulary.

    The end has the largest id of all, the start the one before; captions are padded with 0.
    """

    def __init__(self, merges, context):
        self.merges, self.context, self.cut = merges, context, 0
        pairs = [tuple(line.split(" ")) for line in merges or []]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        characters = [BYTE_CHARACTERS[b] for b in BYTE_ORDER]
        names = [*characters, *(c + "</w>" for c in characters), *map("".join, pairs)] if merges is not None else []
        self.names = [*(names or map(str, range(256))), START, END]
        self.ids = {name: i for i, name in enumerate(self.names)}
        self.pieces = {START: [len(self.names) - 2], END: [len(self.names) - 1]}  # ids by piece, seen so far

    @property
    def size(self):
        """Number of ids."""
        return len(self.names)

    def encode(self, text):
        """Ids of a caption without start and end; a special token that is written out becomes its id."""
        if self.merges is None:
            return list(clean(text).encode())
        ids = []
        for piece in split_words(clean(text)):
            if piece not in self.pieces:
                symbols = to_symbols(piece)
                while len(symbols) > 1:
                    pairs = zip(symbols, symbols[1:], strict=False)
                    pair = min(pairs, key=lambda pair: self.ranks.get(pair, math.inf))
                    if pair not in self.ranks:
                        break
                    symbols = merge(symbols, pair)
                self.pieces[piece] = [self.ids[s] for s in symbols]
            ids += self.pieces[piece]
        return ids

    def decode(self, ids):
        """The text of ids, ends of words as spaces."""
        if self.merges is None:
            return bytes(i for i in ids if i < 256).decode(errors="replace")
        values = {character: b for b, character in BYTE_CHARACTERS.items()}
        characters = "".join(self.names[i] for i in ids).replace("</w>", " ")
        return b"".join(bytes([values[c]]) if c in values else c.encode() for c in characters).decode(errors="replace")

    def __call__(self, captions):
        """Captions -> int64 [T, context]; where one is too long, the end token replaces the last that fits."""
        rows = torch.zeros(len(captions), self.context, dtype=torch.long)
        for row, caption in zip(rows, captions):
            ids = [self.size - 2, *self.encode(caption), self.size - 1]
            if len(ids) > self.context:
                ids, self.cut = [*ids[: self.context - 1], self.size - 1], self.cut + 1
            row[: len(ids)] = torch.tensor(ids)
        return rows


def read_merges(path):
    """The merges of a vocabulary file: gzip, a line of header, then `left right` a line. Exits with 2 without one."""
    places = [Path(path).expanduser(), Path(os.environ.get("DATA", "data")) / path]
    place = next((p for p in places if p.is_file()), None)
    if place is None:
        fail(
            f"no vocabulary at {' or '.join(map(str, places))}. The repositories of CLIP, OpenCLIP and Llip contain "
            "bpe_simple_vocab_16e6.txt.gz; or train with --vocabulary '' --merges 4000, which learns one, or --merges 0"
        )
    try:
        return gzip.decompress(place.read_bytes()).decode().strip("\n").split("\n")[1 : 1 + MERGES]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        fail(f"{place} is no vocabulary file: {error}")


def make_tokenizer(config, data):
    """The Tokenizer of --vocabulary, of --merges learned from the captions of a Split or Shards, or of bytes."""
    if config.vocabulary:
        return Tokenizer(read_merges(config.vocabulary), config.context)
    return Tokenizer(learn_merges(data.some_captions(), config.merges) if config.merges else None, config.context)


# ---------------------------------------------------------------------------------------------------------------------
# Model. Parameter names are CLIP's, so that released weights load as they are.
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention, fused; parameters as in nn.MultiheadAttention, rows [queries | keys | values]."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x):
        """x [B, N, W] -> queries, keys, values, each [B, heads, N, W/heads]."""
        return (
            F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )

    def forward(self, x, first=None):
        """x [B, N, W] -> [B, N, W], or of the `first` tokens only."""
        q, k, v = self.project(x)
        x = F.scaled_dot_product_attention(q[:, :, :first], k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU, Linear; `quick` takes CLIP's approximation of GELU."""

    def __init__(self, width, hidden, quick):
        super().__init__()
        self.quick = quick
        self.c_fc, self.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        """[..., W] -> [..., W]."""
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class ResidualBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, hidden, quick, causal):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads, causal), MLP(width, hidden, quick)

    def forward(self, x, first=None):
        """x [B, N, W] -> [B, N, W], or of the `first` tokens only."""
        x = x[:, :first] + self.attn(self.ln_1(x), first)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width, depth, heads, hidden, quick, causal, recompute):
        super().__init__()
        self.recompute = recompute
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, hidden, quick, causal) for _ in range(depth))

    def forward(self, x, first=None):
        """x [B, N, W] -> [B, N, W]; with `first` the last block computes only that many tokens."""
        for block in self.resblocks:
            asked = first if block is self.resblocks[-1] else None
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, x, asked, use_reentrant=False) if again else block(x, asked)
        return x


class VisionTransformer(nn.Module):
    """CLIP's vision transformer with K class tokens, of which only these are returned: [B, 3, S, S] -> [B, K, W].

    With --all-tokens the patches are returned too, behind them, and K stands for K + P from here on.
    """

    def __init__(self, config):
        super().__init__()
        c, std = config, config.width**-0.5
        tokens, grid = token_count(config), c.image_size // c.patch
        self.conv1 = nn.Conv2d(3, c.width, c.patch, c.patch, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(tokens, c.width))
        self.positional_embedding = nn.Parameter(std * torch.randn(tokens + grid * grid, c.width))
        self.ln_pre, self.ln_post = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        hidden = c.mlp_hidden or 4 * c.width
        self.transformer = Transformer(c.width, c.depth, c.heads, hidden, c.quick_gelu, False, c.recompute)
        self.returned = None if c.all_tokens else tokens
        if c.model not in ("llip", "learned"):  # with one token as in CLIP, else a matrix per token
            self.proj = nn.Parameter(std * torch.randn(tokens, c.width, c.embedding).squeeze(0))

    def embed(self, images):
        """What enters the first block: class tokens, then patches, with positions, normed: [B, K+P, W]."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        classes = self.class_embedding.to(patches.dtype).expand(len(images), -1, -1)
        return self.ln_pre(torch.cat([classes, patches], dim=1) + self.positional_embedding)

    def forward(self, images):
        """[B, 3, S, S] -> the K class tokens after the last norm, [B, K, W]."""
        return self.ln_post(self.transformer(self.embed(images), first=self.returned))


def token_count(config):
    """K: mixture tokens, or the one class token of CLIP and SigLIP."""
    return 1 if config.model in ("siglip", "clip") else config.mixture_tokens


class Llip(nn.Module):
    """Both towers, and what turns their outputs into what is compared.

    `image` gives keys and values [B, 2, H, K, d], `text` queries and z' [T, 2, D]; for the baselines one vector each:
    [B, D] and [T, 1, D]. vocabulary: number of token ids.
    """

    def __init__(self, config, vocabulary):
        super().__init__()
        c, u = config, config.text_width
        self.config = config
        self.visual = VisionTransformer(c)
        self.token_embedding = nn.Embedding(vocabulary, u)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(c.context, u))
        self.transformer = Transformer(u, c.text_depth, c.text_heads, 4 * u, c.quick_gelu, True, c.recompute)
        self.ln_final = nn.LayerNorm(u)
        self.text_projection = nn.Parameter(u**-0.5 * torch.randn(u, c.embedding))
        # 1-D and not scalars, since FSDP2 splits every parameter along its first axis
        self.logit_scale = nn.Parameter(torch.tensor([math.log(c.logit_scale)]))
        bias = -math.log(max(1, c.batch - 1)) if c.logit_bias == "auto" else float(c.logit_bias)
        self.logit_bias = None if c.model == "clip" else nn.Parameter(torch.tensor([bias]))
        mixed = c.mixture_tokens + c.all_tokens * (c.image_size // c.patch) ** 2
        if c.model == "llip":
            self.k_proj = nn.Parameter(c.width**-0.5 * torch.randn(mixed, c.width, c.embedding))
        if c.model in ("llip", "learned"):
            self.v_proj = nn.Parameter(c.width**-0.5 * torch.randn(mixed, c.width, c.embedding))
        if c.model == "llip":
            self.q_proj = nn.Parameter(u**-0.5 * torch.randn(u, c.embedding))
        if c.model in ("llip", "learned"):
            self.out_proj = nn.Parameter(c.embedding**-0.5 * torch.randn(c.embedding, c.embedding))
        if c.model == "learned":
            self.mix = nn.Parameter(torch.zeros(c.mix_heads, mixed))
        if c.model == "llip":
            norm = functools.partial(nn.LayerNorm, c.embedding) if c.mix_norm else nn.Identity
            self.K_norm, self.Q_norm, self.V_norm = norm(), norm(), norm()
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=u**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=u**-0.5 * (2 * c.text_depth) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=u**-0.5 * (2 * c.text_depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * u) ** -0.5)

    def mixture(self, h):
        """Class tokens [B, K, W] -> keys and values [B, 2, H, K, d]; every token has matrices of its own."""
        k = self.K_norm(torch.einsum("bkw,kwd->bkd", h, self.k_proj))
        v = self.V_norm(torch.einsum("bkw,kwd->bkd", h, self.v_proj))
        return torch.stack([k, v], 1).unflatten(3, (self.config.mix_heads, -1)).transpose(2, 3)

    def features(self, images):
        """Images [B, 3, S, S] -> class tokens after the last norm [B, K, W], for probes."""
        return self.visual(images)

    def image(self, images):
        """Images [B, 3, S, S] -> what captions are compared with: [B, 2, H, K, d], or [B, D] of a baseline."""
        h = self.visual(images)
        if self.config.model == "llip":
            return self.mixture(h)
        if self.config.model == "learned":
            v = torch.einsum("bkw,kwd->bkd", h, self.v_proj).unflatten(2, (self.config.mix_heads, -1))
            return torch.einsum("bkhd,hk->bhd", v, self.mix.softmax(1)).flatten(1) @ self.out_proj
        if self.config.model == "average":
            return torch.einsum("bkw,kwd->bd", h, self.visual.proj.view(h.shape[1], h.shape[2], -1)) / h.shape[1]
        return h[:, 0] @ (self.visual.proj if self.visual.proj.dim() == 2 else self.visual.proj[0])

    def hidden(self, tokens):
        """Captions int64 [T, L] -> the text transformer's output at the end of each, [T, U].

        Padding comes after the end and attention looks back only, so it needs no mask.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        ends = tokens.argmax(1)  # the end has the largest id; the first of several counts
        x = self.transformer(x)
        return self.ln_final(x[torch.arange(len(x), device=x.device), ends])

    def text(self, tokens):
        """Captions int64 [T, L] -> queries and z' [T, 2, D], or only z' [T, 1, D] for a baseline."""
        g = self.hidden(tokens)
        z = g @ self.text_projection
        return torch.stack([self.Q_norm(g @ self.q_proj), z], 1) if self.config.model == "llip" else z[:, None]

    def forward(self, images, tokens):
        """-> (image, text, what `contrastive_loss` needs besides: out_proj, scale and bias, where the model has them).

        All that the loss takes goes through here, as wrappers that gather or reduce parameters want it.
        """
        head = {"scale": self.logit_scale.exp()}
        if self.logit_bias is not None:
            head["bias"] = self.logit_bias.clone()
        if self.config.model == "llip":
            head["out_proj"] = self.out_proj.clone()
        return self.image(images), self.text(tokens), head


def build(config, vocabulary):
    """A freshly initialised model."""
    torch.manual_seed(config.seed)
    return Llip(config, vocabulary)


# ---------------------------------------------------------------------------------------------------------------------
# Loss: all pairs of the global batch, without ever holding their N x N image vectors
# ---------------------------------------------------------------------------------------------------------------------


def mixing_weights(k, q, tau):
    """a: how much of each token an image is for a caption. k [B, H, K, d], q [T, H, d] -> [B, T, H, K]."""
    return (torch.einsum("bhkd,thd->bthk", k, q) / tau).softmax(-1)


def pair_scores(k, v, q, t, out_proj, tau):
    """Cosine of every image, mixed for a caption, with that caption: [B, T]. Memory grows with B x T x (HK + D).

    k, v [B, H, K, d]; q [T, H, d]; t [T, D], the captions' z'; out_proj [D, D].
    """
    z = torch.einsum("bthk,bhkd->bthd", mixing_weights(k, q, tau), v).flatten(2) @ out_proj  # [B, T, D]
    return torch.einsum("btd,td->bt", F.normalize(z, dim=-1), F.normalize(t, dim=-1))


def tile_side(budget, heads, tokens, width):
    """Side of a square tile of pairs whose activations take about `budget` bytes."""
    return max(1, math.isqrt(int(budget / (4 * (3 * heads * tokens + 4 * width)))))


class PairLoss(torch.autograd.Function):
    """Sum over all pairs of -log sigmoid(y (s score + b)) with the scores of `pair_scores`, and all its gradients.

    The loss is a plain sum, so one pass over tiles of images x captions gives loss and gradients at once; only they
    and one tile are in memory, and nothing is computed twice. Of a pair: K D multiplications each for logits, m, da,
    dv, dq and dk, D^2 each for z, d_out and dm: as many as autograd needs.
    Always computed in float32 or better: bf16 gradients would be off by a percent.
    """

    @staticmethod
    def forward(ctx, k, v, q, t, out_proj, scale, bias, tau, first, budget, wanted):
        """k, v [B, H, K, d]; q [T, H, d]; t [T, D] normalised; out_proj [D, D]; scale, bias [1].

        first: caption first + i belongs to image i; budget: bytes a tile may take; wanted: compute gradients too.
        """
        inputs = (k, v, q, t, out_proj, scale, bias)
        with torch.autocast(k.device.type, enabled=False):
            k, v, q, t, out_proj, scale, bias = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs)
            k, v, q = (x.transpose(0, 1).contiguous() for x in (k, v, q / tau))  # [H, B, K, d], [H, T, d]
            heads, images, tokens, depth = k.shape
            captions, width = t.shape
            gradients = [torch.zeros_like(x) for x in (k, v, q, t, out_proj, scale, bias)] if wanted else ()
            loss, side = torch.zeros_like(scale), tile_side(budget, heads, tokens, width)
            for i, j in itertools.product(range(0, images, side), range(0, captions, side)):
                rows, columns = slice(i, min(i + side, images)), slice(j, min(j + side, captions))
                k_, v_, q_, t_ = k[:, rows], v[:, rows], q[:, columns], t[columns]
                b, n = k_.shape[1], len(t_)
                a = (k_.flatten(1, 2) @ q_.mT).view(heads, b, tokens, n).softmax(2)
                m = (a.mT @ v_).permute(1, 2, 0, 3).reshape(b * n, width)  # heads side by side
                z = m @ out_proj
                inverse = z.norm(dim=1).clamp(min=1e-12).reciprocal().view(b, n)  # 1 / |z|
                z = z.view(b, n, width)
                score = torch.einsum("bnd,nd->bn", z, t_) * inverse
                y = torch.full_like(score, -1.0)
                y.diagonal(first + i - j).fill_(1.0)  # empty where the tile has no true pair
                x = y * (scale * score + bias)
                loss -= F.logsigmoid(x).sum()
                if not wanted:
                    continue
                dk, dv, dq, dt, d_out, d_scale, d_bias = gradients
                e = -y * torch.sigmoid(-x)  # of the loss with respect to s score + b
                d_bias += e.sum()
                d_scale += (e * score).sum()
                g = scale * e * inverse
                dt[columns] += torch.einsum("bn,bnd->nd", g, z)
                dz = z.mul_((-g * score * inverse)[..., None]).addcmul_(g[..., None], t_).view(b * n, width)
                d_out += m.T @ dz
                dm = dz @ out_proj.T
                inner = (dm * m).view(b, n, heads, depth).sum(3).permute(2, 0, 1)  # sum_n a da, [H, b, n]
                dm = dm.view(b, n, heads, depth).permute(2, 0, 1, 3).contiguous()
                dv[:, rows] += a @ dm
                d_logits = (v_ @ dm.mT).sub_(inner[:, :, None]).mul_(a).flatten(1, 2)  # [H, b*K, n]
                dq[:, columns] += d_logits.mT @ k_.flatten(1, 2)
                dk[:, rows] += (d_logits @ q_).view(heads, b, tokens, depth)
            if wanted:
                dk, dv, dq = (x.transpose(0, 1) for x in gradients[:3])
                gradients = [dk, dv, dq / tau, *gradients[3:]]
        ctx.save_for_backward(*(x.to(original.dtype) for x, original in zip(gradients, inputs)))
        return loss[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, incoming):
        """The gradients that forward found, times the scalar that comes in."""
        return *(x * incoming for x in ctx.saved_tensors), None, None, None, None


class _GatherOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.length = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.length :][: ctx.length]


def gather_with_gradients(x):
    """Concatenate ranks' tensors of one length in rank order; the backward pass sends every rank its gradients home.

    So a rank's gradient is that of the sum of all ranks' losses, and the mean that DDP takes is that of one big batch.
    """
    return _GatherOverRanks.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def contrastive_loss(image, text, head, config, budget):
    """The loss of this rank's images against the captions of all ranks; the mean over ranks is that of the batch.

    image, text, head: as `Llip.forward` returns them; text b belongs to image b. Sigmoid loss (eq. of SigLIP): the sum
    over all pairs, divided by the images, not by the pairs. `clip`: the mean of both cross-entropies.
    """
    first = dist.get_rank() * len(image) if dist.is_initialized() else 0
    with torch.autocast(image.device.type, enabled=False):
        text, scale = text.float(), head["scale"].float()
        t = gather_with_gradients(F.normalize(text[:, -1], dim=-1))  # [T, D]
        if config.model == "llip":
            k, v = image.unbind(1)
            q = gather_with_gradients(text[:, 0]).unflatten(1, (config.mix_heads, -1))
            pieces = (k, v, q, t, head["out_proj"], scale, head["bias"], config.tau, first, budget)
            return PairLoss.apply(*pieces, torch.is_grad_enabled()) / len(image)
        image = F.normalize(image.float(), dim=-1)
        logits = scale * image @ t.T  # [B, T]
        if config.model == "clip":
            mine = torch.arange(first, first + len(image), device=image.device)
            columns = scale * t[mine] @ gather_with_gradients(image).T
            return (F.cross_entropy(logits, mine) + F.cross_entropy(columns, mine)) / 2
        y = torch.full_like(logits, -1.0)
        y.diagonal(first).fill_(1.0)
        return -F.logsigmoid(y * (logits + head["bias"].float())).sum() / len(image)


def pair_budget(config, device):
    """Bytes a tile of pairs may take: what stays in the caches of a CPU, or keeps a GPU busy."""
    return 2**20 * (config.pair_memory or (512 if device.type == "cuda" else 16))


# ---------------------------------------------------------------------------------------------------------------------
# The toy world: scenes of a few shapes, of which many different things are true
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
COLOURS = {"red": (220, 50, 40), "green": (50, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 50),
           "pink": (230, 110, 190), "white": (235, 235, 235)}  # fmt: skip
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("no", "one", "two", "three", "four")
KINDS = {
    "colour": ("something {}", "a {} shape"),
    "shape": ("a {}", "one shape is a {}"),
    "object": ("a {}", "there is a {}"),
    "place": ("{}", "in the {}"),
    "relation": ("{}", "we see {}"),
    "count": ("{} shapes", "there are {} shapes"),
    "scene": ("{}", "we see {}"),
}  # kind of caption: how it is said; the first is used in retrieval, all of them are in zero-shot prompts


def draw_scenes(count, size, random):
    """`count` scenes of two to four objects, at most one in each quarter -> pixels uint8 [N, 3, S, S], and shape and
    colour of the object in each quarter int64 [N, 4], -1 where there is none."""
    number = random.integers(2, 5, (count, 1))
    there = random.permuted(np.tile(np.arange(4), (count, 1)), axis=1) < number
    shape, colour = (random.integers(0, 6, (count, 4)) for _ in range(2))
    half = size // 2
    line = (np.arange(half) + 0.5) / half * 2 - 1  # a quarter spans -1..1
    shift = random.uniform(-0.15, 0.15, (2, count, 4, 1, 1))
    radius = random.uniform(0.65, 0.8, (count, 4, 1, 1))
    x, y = ((axis - s) / radius for axis, s in zip((line, line[:, None]), shift))  # [N, 4, S/2, S/2]
    r = np.hypot(x, y)
    inside = [
        r < 1,
        np.maximum(abs(x), abs(y)) < 0.85,
        (y < 0.8) & (abs(x) < (y + 1) / 1.8),
        (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1),
        (r < 1) & (r > 0.55),
        (abs(y) < 0.4) & (abs(x) < 1),
    ]  # in the order of SHAPES
    mask = np.select([shape[..., None, None] == s for s in range(6)], inside) & there[..., None, None]
    paint = np.array(list(COLOURS.values()), dtype=np.float32)[colour]  # [N, 4, 3]
    paint = paint * random.uniform(0.8, 1.1, (count, 4, 1)).astype(np.float32)
    ground = random.uniform(20, 70, (count, 1, 1, 1, 1)).astype(np.float32)
    quarters = np.where(mask[..., None], paint[:, :, None, None], ground)  # [N, 4, S/2, S/2, 3]
    image = quarters.reshape(count, 2, 2, half, half, 3).transpose(0, 5, 1, 3, 2, 4).reshape(count, 3, size, size)
    image = image + random.normal(0, 6, image.shape).astype(np.float32)
    return image.clip(0, 255).astype(np.uint8), np.where(there, shape, -1), np.where(there, colour, -1)


def describe(shapes, colours):
    """What is true of a scene, as {kind: [phrases to put into KINDS' sentences]}. shapes, colours: four each, or -1."""
    names = {p: f"{list(COLOURS)[c]} {SHAPES[s]}" for p, (s, c) in enumerate(zip(shapes, colours)) if s >= 0}
    relations = []
    for a, b, forth, back in ((0, 1, "left of", "right of"), (2, 3, "left of", "right of"),
                              (0, 2, "above", "below"), (1, 3, "above", "below")):  # fmt: skip
        if a in names and b in names:
            relations += [f"{names[a]} {forth} {names[b]}", f"{names[b]} {back} {names[a]}"]
    facts = {
        "colour": [list(COLOURS)[c] for c in colours if c >= 0],
        "shape": [SHAPES[s] for s in shapes if s >= 0],
        "object": list(names.values()),
        "place": [f"{PLACES[p]} {name}" for p, name in names.items()],
        "relation": relations,
        "count": [COUNTS[len(names)]],
        "scene": [", ".join(names.values())],
    }
    return {kind: sorted(set(phrases)) for kind, phrases in facts.items()}


@functools.lru_cache(maxsize=4)
def toy_world(name, size):
    """The toy Split "train" (8,000 scenes) or "val" (1,000 others), and its facts, one `describe` a scene.

    An image's captions are all that `describe` says, in all sentences of KINDS, so about forty that differ. Its label,
    for the linear probe, is the object in the upper left, or that there is none.
    """
    count = {"train": 8000, "val": 1000}[name]
    pixels, shape, colour = draw_scenes(count, size, np.random.Generator(np.random.PCG64(name == "val")))
    facts = [describe(s, c) for s, c in zip(shape.tolist(), colour.tolist())]
    captions = [[s.format(p) for kind, phrases in f.items() for p in phrases for s in KINDS[kind]] for f in facts]
    labels = torch.from_numpy(np.where(shape[:, 0] < 0, 36, shape[:, 0] * 6 + colour[:, 0]))
    classes = [f"{c} {s}" for s in SHAPES for c in COLOURS] + ["nothing"]
    split = in_memory(torch.from_numpy(pixels), labels, [f"{name}/{i:05d}" for i in range(count)], classes)
    return with_captions(split, captions), facts


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, Image.DecompressionBombError)
ADJECTIVES = "bad,low resolution,cropped,bright,dark,close-up,black and white,pixelated,jpeg corrupted,blurry,good"
CIFAR10_PROMPTS = [f"a {how}photo of {a} {{}}" for how in ("", "blurry ", "black and white ", "low contrast ",
                   "high contrast ", "bad ", "good ") for a in ("a", "the")]  # fmt: skip
CIFAR10_PROMPTS += [f"a photo of {a} {size} {{}}" for size in ("small", "big") for a in ("a", "the")]
IMAGENET_PROMPTS = [f"a {how} photo of {a} {{}}." for how in ADJECTIVES.split(",") for a in ("a", "the")]
IMAGENET_PROMPTS += [f"a photo of {a} {how}{{}}." for how in ("", "cool ", "dirty ", "clean ", "large ", "nice ",
                     "weird ", "small ", "hard to see ") for a in ("a", "the")]  # fmt: skip
IMAGENET_PROMPTS += [f"{how} of {a} {{}}." for how in ("a rendering", "a tattoo", "a drawing", "a painting", "itap",
                     "a sculpture", "a rendition", "a doodle", "a sketch", "art", "graffiti")
                     for a in ("a", "the")]  # fmt: skip
IMAGENET_PROMPTS += [f"{a} {how} {{}}." for how in ("origami", "toy", "plastic", "embroidered", "cartoon", "plushie")
                     for a in ("a", "the")]  # fmt: skip
IMAGENET_PROMPTS += ["a {} in a video game.", "the {} in a video game.", "a photo of many {}.", "a photo of my {}.",
                     "a photo of one {}.", "itap of my {}."]  # fmt: skip


@dataclass
class Split:
    """N images with captions. labels: int64 [N], -1 where unknown; paths: relative to root; pixels: uint8 [N, 3, H, W]
    if in memory; sizes: int64 [N, 2], width and height of the files, not of the pixels where those were resized to one
    shape. Captions of image i: table[j] for j in valid[first[i]:][:count[i]]; table holds every caption once."""

    root: Path
    paths: list
    labels: torch.Tensor
    classes: list
    pixels: torch.Tensor = None
    sizes: torch.Tensor = None
    table: list = None
    valid: torch.Tensor = None
    first: torch.Tensor = None
    count: torch.Tensor = None

    def __len__(self):
        return len(self.paths)

    def subset(self, indices):
        """The same with images `indices` (int64 [n]) only."""
        fields = {k: getattr(self, k) for k in ("labels", "pixels", "sizes", "first", "count")}
        fields = {k: None if x is None else x[indices] for k, x in fields.items()}
        return replace(self, paths=[self.paths[i] for i in indices.tolist()], **fields)

    def captions(self, index):
        """All captions of one image."""
        return [self.table[j] for j in self.valid[self.first[index] :][: self.count[index]].tolist()]

    def choose(self, indices, uniform):
        """For each of the images `indices` one of its captions, by uniforms in [0, 1): int64 indices into table."""
        return self.valid[self.first[indices] + (uniform * self.count[indices]).long()]

    def positions(self, start, end, seed):
        """Images at places start..end of the endless shuffled stream, in which an epoch follows the other."""
        n = len(self)
        order = torch.cat([shuffled(n, seed, "order", epoch) for epoch in range(start // n, (end - 1) // n + 1)])
        return order[start % n :][: end - start]

    def sample(self, index, uniform):
        """(the image's file, one of its captions)."""
        uniform = torch.tensor([uniform], dtype=torch.float64)  # below 1, which float32 would round to
        caption = self.table[int(self.choose(torch.tensor([index]), uniform))]
        return self.root / self.paths[index], caption

    def some_captions(self):
        """Up to 100,000 captions, to learn a vocabulary from."""
        return self.table[:: math.ceil(len(self.table) / 100_000)]


@functools.lru_cache(maxsize=8)
def shuffled(n, *key):
    """A permutation of n, by key."""
    return torch.randperm(n, generator=generator(*key))


def with_captions(split, captions):
    """A Split with its captions, a list for each image."""
    number = {}
    valid = [number.setdefault(c, len(number)) for those in captions for c in those]
    count = torch.tensor([len(those) for those in captions])
    return replace(split, table=list(number), valid=torch.tensor(valid), first=count.cumsum(0) - count, count=count)


@functools.lru_cache(maxsize=256)
def tar_index(path):
    """Samples of a tar shard, read from its headers alone, and what is wrong with it: ([(key, (offset, bytes) of the
    image, (offset, bytes) of the caption)], ["path: reason"]). Files of one sample stand side by side."""
    length, files, wrong = os.path.getsize(path), [], []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    files.append((f"{folder}/{stem}", suffix.lower(), (member.offset_data, member.size)))
    except (tarfile.TarError, OSError) as error:
        wrong.append(f"{path}: damaged after {len(files)} files ({error})")
    samples = []
    for key, group in itertools.groupby(files, key=lambda file: file[0]):
        parts = {suffix: place for _, suffix, place in group}
        image = next((parts[s] for s in parts if f".{s}" in EXTENSIONS), None)
        lacks = "image" if image is None else "caption" if "txt" not in parts else ""
        if not lacks and max(sum(image), sum(parts["txt"])) > length:
            lacks = "end: the file is cut off"
        if lacks:
            wrong.append(f"{path}, {key.strip('/')}: no {lacks}")
        else:
            samples.append((key.strip("/"), image, parts["txt"]))
    return samples, wrong


class Shards:
    """Image-caption pairs in tar shards, read where they are: a window of `buffer` samples is shuffled, and windows
    go over the shards in an order of each epoch. Where every sample stands follows from the seed alone, so ranks and
    workers pick their own, and a run resumes in the middle of a shard without reading what came before."""

    def __init__(self, paths, log, config):
        self.paths, self.buffer, self.labels, self.classes, self.pixels = paths, config.buffer, None, [], None
        sizes, found = {}, {}
        for folder in {path.parent for path in paths}:
            if (folder / "sizes.json").is_file():  # as webdataset writes it: {shard: samples}
                sizes |= {folder / name: n for name, n in json.loads((folder / "sizes.json").read_text()).items()}
        wrong = []
        for path in paths:
            if path not in sizes:
                found[path], problems = tar_index(path)
                wrong += problems
        self.sizes = torch.tensor([sizes.get(p, len(found.get(p, ()))) for p in paths])
        self.starts = F.pad(self.sizes.cumsum(0), (1, 0))
        log.skip(wrong, len(self) + len(wrong), config.max_bad)
        if not len(self):
            fail(f"no image with a .txt beside it in {paths[0]}, nor in the other {len(paths) - 1} shards")

    def __len__(self):
        return int(self.starts[-1])

    def positions(self, start, end, seed):
        """Samples at places start..end of the endless shuffled stream: int64 [end - start]."""
        found = []
        for place in range(start, end):
            epoch, place = divmod(place, len(self))
            window, place = divmod(place, self.buffer)
            size = min(self.buffer, len(self) - window * self.buffer)
            place = window * self.buffer + int(shuffled(size, seed, "window", epoch, window)[place])
            order = shuffled(len(self.paths), seed, "shards", epoch)
            ends = self.sizes[order].cumsum(0)
            shard = int(torch.searchsorted(ends, place, right=True))
            found.append(int(self.starts[order[shard]] + place - ends[shard] + self.sizes[order[shard]]))
        return torch.tensor(found)

    def sample(self, index, uniform=0.0):
        """(the image's bytes as a file, its caption); OSError where the shard does not hold what sizes.json says."""
        shard = int(torch.searchsorted(self.starts, index, right=True)) - 1
        samples, _ = tar_index(self.paths[shard])
        place = index - int(self.starts[shard])
        if place >= len(samples):
            raise OSError(f"sample {place} of {self.paths[shard]}: listed in sizes.json, but not there")
        key, *places = samples[place]
        with open(self.paths[shard], "rb") as file:
            image, caption = (os.pread(file.fileno(), length, offset) for offset, length in places)
        if not image or not caption.strip():
            raise OSError(f"{self.paths[shard]}, {key}: empty {'caption' if image else 'image'}")
        return io.BytesIO(image), caption.decode(errors="replace")

    def some_captions(self):
        """Up to 20,000 captions, to learn a vocabulary from."""
        found = []
        for index in range(0, len(self), math.ceil(len(self) / 20_000)):
            with contextlib.suppress(OSError):
                found.append(self.sample(index)[1])
        return found


def expand_braces(pattern):
    """'a{00..02}.tar' -> ['a00.tar', 'a01.tar', 'a02.tar']; a pattern without braces is itself."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    return [s for n in numbers for s in expand_braces(pattern[: found.start()] + n + pattern[found.end() :])]


def read_captions(path):
    """(image's file name, caption, split or "") of a captions file, in its order.

    Layouts: COCO's captions_*.json; Karpathy's dataset_*.json; Flickr30k's results_*.token and results.csv; tab or
    comma separated with a header `filepath` and `title` (or `image` and `caption`); Conceptual Captions' tsv without a
    header: caption, file.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        content = json.loads(text)
        if "annotations" in content:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            return [(names[a["image_id"]], a["caption"], "") for a in content["annotations"] if a["image_id"] in names]
        rows = []
        for image in content["images"]:
            name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            split = {"restval": "train"}.get(image["split"], image["split"])
            rows += [(name, sentence["raw"], split) for sentence in image["sentences"]]
        return rows
    if path.suffix == ".token":
        lines = (line.partition("\t") for line in text.splitlines() if "\t" in line)
        return [(name.rpartition("#")[0], caption, "") for name, _, caption in lines]
    lines = text.splitlines()
    separator = next((s for s in "\t|," if s in lines[0]), "\t")
    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    rows = list(csv.reader(lines, delimiter=separator, quoting=quoting))
    header = [cell.strip().lower() for cell in rows[0]]
    name = next((header.index(n) for n in ("filepath", "image_name", "image", "file", "path") if n in header), None)
    caption = next((header.index(n) for n in ("title", "caption", "comment", "text") if n in header), None)
    if name is None or caption is None:
        name, caption, header = 1, 0, None
    rows = (row for row in rows[header is not None :] if len(row) > max(name, caption))
    return [(row[name].strip(), row[caption].strip(), "") for row in rows]


def captions_file(path, name, config, log):
    """A Split of a captions file, its part `name` where the file has parts; images without a caption are left out."""
    try:
        rows = read_captions(path)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        fail(f"{path} has none of the layouts that --data reads ({type(error).__name__}: {error}); see --help")
    parts = {split for _, _, split in rows}
    if parts != {""}:
        wanted = {"train"} if name == "train" else {"test"} if "test" in parts else {"val"}
        rows = [row for row in rows if row[2] in wanted]
    captions = {}
    for image, caption, _ in rows:
        captions.setdefault(image, []).extend([caption] if caption.strip() else [])
    empty = [f"{path}: {image} has no caption" for image, those in captions.items() if not those]
    log.skip(empty, len(captions), config.max_bad)
    captions = {image: those for image, those in captions.items() if those}
    if not captions:
        fail(f"no captions in {path}: expected image names and captions; see read_captions in {Path(__file__).name}")
    first = next(iter(captions))
    if "://" in first:
        fail(f"{path} names images by their address ({first}): download them, and put file names there instead")
    root = Path(config.images).expanduser() if config.images else path.parent
    other = root.with_name(root.name.replace("train", "val"))  # train2017 and val2017 of COCO
    root = other if name == "val" and other.is_dir() else root
    if not (root / first).exists() and not root.is_dir():
        fail(f"no images at {root}: --images is the folder that {first} in {path} is relative to")
    split = Split(root, list(captions), torch.full((len(captions),), -1), [])
    return with_captions(split, list(captions.values()))


def prompts_of(config):
    """Zero-shot prompts with {} for the class: --templates, or those of the data set."""
    if config.templates:
        prompts = [line for line in Path(config.templates).read_text().splitlines() if "{}" in line]
        return prompts or fail(f"no line of {config.templates} has a {{}} for the class")
    return IMAGENET_PROMPTS if "imagenet" in f"{config.data} {config.val_data}" else CIFAR10_PROMPTS


def names_of(classes, config):
    """For each class its synonyms: those of --class-names, or its folder's name with spaces for underscores."""
    if not config.class_names:
        return [[name.replace("_", " ")] for name in classes]
    names = json.loads(Path(config.class_names).read_text())
    if len(names) != len(classes):
        fail(f"{config.class_names} has {len(names)} names, but the data has {len(classes)} classes")
    return [[name] if isinstance(name, str) else name for name in names]


def with_class_captions(split, config):
    """Class folders as captioned images: every prompt about the class is a caption of its images."""
    names, prompts = names_of(split.classes, config), prompts_of(config)
    table = [prompt.format(name) for those in names for name in those for prompt in prompts]
    count = torch.tensor([len(those) * len(prompts) for those in names])
    fields = dict(first=(count.cumsum(0) - count)[split.labels], count=count[split.labels])
    return replace(split, table=table, valid=torch.arange(len(table)), **fields)


def caption_folder(folder, root, config, log):
    """A Split of a folder: images with a same-name .txt, one caption a line; else class folders, captioned by class."""
    paths = sorted(p.relative_to(root) for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not paths:
        fail(f"no images in {folder}: looked for {', '.join(sorted(EXTENSIONS))} in it and in its subfolders")
    texts = [(root / path).with_suffix(".txt") for path in paths]
    captions = [t.read_text(errors="replace").splitlines() if t.is_file() else [] for t in texts]
    captions = [[line.strip() for line in lines if line.strip()] for lines in captions]
    if any(captions):
        log.skip([f"{root / p}: no caption" for p, c in zip(paths, captions) if not c], len(paths), config.max_bad)
        paths, captions = zip(*((p.as_posix(), c) for p, c in zip(paths, captions) if c))
        return with_captions(Split(root, list(paths), torch.full((len(paths),), -1), []), captions)
    if folder == root or any(len(path.parts) < 3 for path in paths):
        fail(
            f"{folder} has images, but no captions: expected a .txt beside each image with a caption a line, or "
            "train/CLASS/*.jpg, whose captions are made of the class names"
        )
    names = [path.parts[1] for path in paths]
    number = {c: i for i, c in enumerate(sorted(set(names)))}
    split = Split(root, [p.as_posix() for p in paths], torch.tensor([number[n] for n in names]), list(number))
    return with_class_captions(split, config)


def open_data(config, name, log):
    """The `train` or `val` data of --data (or --val-data): a Split or Shards; None where there is no val.

    --data: toy; cifar10; a captions file (read_captions); a .tar, a pattern a{00000..00010}.tar, or a folder of them; a
    folder of images with .txt beside them, or of class folders, with train/ and val/ or without. Exits with 2 if there
    is nothing.
    """
    data = config.val_data if name == "val" and config.val_data else config.data
    if data == "toy":
        return toy_world(name, config.image_size)[0]
    root = Path(data).expanduser()
    if not root.exists() and "/" not in data:
        root = Path(os.environ.get("DATA", "data")) / data
    if data == "cifar10" and not (root / "train").is_dir():
        return with_class_captions(cifar10_binary(root.parent, name), config)
    shards = sorted(root.glob("*.tar")) if root.is_dir() else [Path(p) for p in expand_braces(str(root))]
    if shards and all(p.suffix == ".tar" for p in shards):
        missing = [p for p in shards if not p.is_file()]
        if missing:
            fail(f"{len(missing)} of the {len(shards)} shards of {root} are not there, {missing[0]} the first")
        return None if name == "val" and not config.val_data else Shards(shards, log, config)
    if root.is_file():
        if name == "val" and not config.val_data:
            parts = root.suffix == ".json" and "annotations" not in json.loads(root.read_text())
            root = root if parts else root.with_name(root.name.replace("train", "val"))
            if not parts and (not root.is_file() or "train" not in Path(data).name):
                return None
        return captions_file(root, name, config, log)
    if not root.is_dir():
        fail(
            f"no data at {root}: expected a captions file (.json, .tsv, .csv, .token), .tar shards, a folder of images "
            "with a .txt beside each, or train/CLASS/*.jpg and val/CLASS/*.jpg"
        )
    folder = root / name if (root / "train").is_dir() else root
    if name == "val" and not config.val_data and (folder == root or not folder.is_dir()):
        return None
    return caption_folder(folder if folder.is_dir() else root, root, config, log)


def in_memory(pixels, labels, paths, classes):
    """A Split whose images are decoded already: pixels uint8 [N, 3, H, W]."""
    return Split(None, paths, labels, classes, pixels, torch.tensor(pixels.shape[:1:-1]).expand(len(pixels), 2))


def cifar10_binary(folder, name):
    """CIFAR-10 from its home page's archive, downloaded once into `folder` and checked; read without extracting it."""
    archive = folder / "cifar-10-binary.tar.gz"
    if not archive.exists():
        part = folder / f"{archive.name}.{os.getpid()}.part"  # ranks may get here together, each with a file of its own
        try:
            folder.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(CIFAR10_URL, part)
            os.replace(part, archive)
        except (OSError, http.client.HTTPException) as error:
            fail(
                f"could not download CIFAR-10 ({error}). Put {CIFAR10_URL} at {archive}, "
                f"or its images at {folder}/cifar10/train/CLASS/*.png and val/CLASS/*.png"
            )
        finally:
            part.unlink(missing_ok=True)
    data = archive.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != CIFAR10_SHA256:
        fail(f"{archive} has sha256 {digest} instead of {CIFAR10_SHA256}: delete it and try again")
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if name == "train" else ["test_batch.bin"]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/{f}").read() for f in files)
        classes = tar.extractfile("cifar-10-batches-bin/batches.meta.txt").read().decode().split()
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3073)  # label, then red, green, blue planes
    labels = rows[:, 0].long()
    paths = [f"{name}/{classes[y]}/{i:05d}" for i, y in enumerate(labels)]
    return in_memory(rows[:, 1:].reshape(-1, 3, 32, 32), labels, paths, classes)


def to_rgb(image):
    """Any PIL image -> upright RGB: turned as EXIF says, 16 bits scaled to 8, palette, grey and CMYK converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def upright_size(image):
    """(width, height) that an opened but not yet decoded image will have after `to_rgb`."""
    return image.size[::-1] if image.getexif().get(0x0112) in (5, 6, 7, 8) else image.size


def decode(file, choose_box, size, cut=False):
    """Read a file and resize a part of it in one go, bicubic -> (uint8 [3, H, W], original (width, height)).

    choose_box(width, height) -> (top, left, height, width) of the part; size: (width, height) of the result.
    A JPEG is decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 that still has the pixels this needs (`draft`).
    cut: take the part out first, as training crops do; otherwise its border is smoothed with what lies beyond it, as
    where the whole image is resized and then cropped.
    """
    with Image.open(file) as image:
        width, height = original = upright_size(image)
        top, left, h, w = choose_box(width, height)
        scale = max(size[0] / w, size[1] / h)
        if scale < 1:
            image.draft("RGB", tuple(math.ceil(side * scale) for side in image.size))
        rgb = to_rgb(image)
        fx, fy = rgb.width / width, rgb.height / height
        box = (left * fx, top * fy, min(rgb.width, (left + w) * fx), min(rgb.height, (top + h) * fy))
        if cut:
            rgb, box = rgb.crop(tuple(map(round, box))), None
        return torch.from_numpy(np.array(rgb.resize(size, Image.BICUBIC, box=box))).permute(2, 0, 1), original


def random_crop(width, height, scale, generator=None):
    """RandomResizedCrop's part of an image, ratio 3/4 to 4/3, in torchvision's order -> (top, left, height, width)."""
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*scale, generator=generator).item()
        ratio = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(height - h + 1, (1,), generator=generator).item()
            return top, torch.randint(width - w + 1, (1,), generator=generator).item(), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crops(sizes, scale, generator):
    """`random_crop` for a batch at once: sizes [B, 2] (width, height) -> float32 [B, 4] (top, left, height, width)."""
    u = torch.rand(len(sizes), 11, 2, generator=generator, dtype=torch.float64)
    sizes = sizes.double()
    area = sizes.prod(1, keepdim=True) * (scale[0] + (scale[1] - scale[0]) * u[:, :10, 0])
    ratio = torch.exp((2 * u[:, :10, 1] - 1) * math.log(4 / 3))
    tries = torch.stack([(area * ratio).sqrt().round(), (area / ratio).sqrt().round()], dim=2)  # [B, 10, 2]
    fits = ((tries > 0) & (tries <= sizes[:, None])).all(2)
    none, first = ~fits.any(1, keepdim=True), fits.int().argmax(1)  # where no try fits: the central fallback
    part = torch.where(none, torch.minimum(sizes, (sizes.flip(1) * 4 / 3).round()), tries[range(len(sizes)), first])
    corner = torch.where(none, (sizes - part) / 2, u[:, 10] * (sizes - part + 1)).floor()
    return torch.cat([corner.flip(1), part.flip(1)], dim=1).float()


def centre_box(width, height, size):
    """The part evaluation sees, as CLIP's transform: shorter side to `size`, longer in whole pixels, central square."""
    short = min(width, height)
    resized = [size if side == short else int(size * side / short) for side in (width, height)]
    left, top = (round((side - size) / 2) * old / side for side, old in zip(resized, (width, height)))
    return top, left, size * height / resized[1], size * width / resized[0]


def resampling_weights(start, length, size_in, size_out, bicubic=False):
    """PIL's antialiased resampling of [start, start + length), tensors [B], as matrices [B, size_out, size_in]."""
    start, end = start[:, None, None], (start + length)[:, None, None]
    step = (end - start) / size_out
    pixel = torch.arange(size_in, device=start.device) + 0.5
    centre = start + (torch.arange(size_out, device=start.device)[:, None] + 0.5) * step
    x = ((pixel - centre) / step.clamp(min=1)).abs()
    weights = (1 - x).clamp(min=0)
    if bicubic:  # a = -0.5
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2) * (x < 2)
    weights = weights * ((pixel > start) & (pixel < end))
    return weights / weights.sum(-1, keepdim=True)


def crop_resize(images, boxes, size, flip=None, bicubic=False):
    """Crop and resize a batch as PIL does, in two matrix products: images [B, 3, H, W] -> float [B, 3, size, size].

    boxes: [B, 4] (top, left, height, width), pixels; flip: bool [B], mirrored; bicubic overshoot is clipped to 0..255.
    """
    top, left, height, width = boxes.unbind(1)
    rows = resampling_weights(top, height, images.shape[2], size, bicubic)
    columns = resampling_weights(left, width, images.shape[3], size, bicubic)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    images = rows[:, None] @ images.float() @ columns.transpose(1, 2)[:, None]
    return images.clamp(0, 255) if bicubic else images


def normalize(images):
    """0..255 -> the networks' range, by CLIP's mean and std: [B, 3, H, W]."""
    mean, std = (common.old_constant(v, images.device)[:, None, None] * 255 for v in (MEAN, STD))
    return (images.float() - mean) / std


class Batches(Dataset):
    """Item t: this rank's share of the batch of step t, a function of (seed, t): workers and resuming change nothing.

    A dict of `tokens` int64 [b, L]; `indices` int64 [b]; `pixels` uint8 [b, 3, S, S], decoded and cropped, or `boxes`
    float [b, 4], to crop in-memory pixels on the device; `flip` bool [b]; `bad`, unreadable files.
    """

    def __init__(self, split, config, world, tokenizer):
        self.split, self.config, self.world, self.tokenizer, self.canvas = split, config, world, tokenizer, None
        if split.pixels is not None:
            self.canvas = torch.tensor(split.pixels.shape[2:]).repeat(2)  # H, W, H, W
            self.split, self.tokens = replace(split, pixels=None), tokenizer(split.table).int()

    def __getitem__(self, step):
        config, key = self.config, (self.config.seed, "train", step)
        first, last = (r * config.batch // self.world.size for r in (self.world.rank, self.world.rank + 1))
        uniform = torch.rand(config.batch, generator=generator(*key, "caption"), dtype=torch.float64)[first:last]
        item = {"bad": []}
        if self.canvas is not None:
            indices = self.split.positions(step * config.batch, (step + 1) * config.batch, config.seed)
            sizes = self.split.sizes[indices]  # of the global batch
            boxes = random_crops(sizes, config.crop_scale, generator(*key, "crop"))
            item["boxes"] = (boxes * self.canvas / sizes.flip(1).repeat(1, 2))[first:last]
            item["indices"] = indices = indices[first:last]
            item["tokens"] = self.tokens[self.split.choose(indices, uniform)].long()
        else:
            places = range(step * config.batch + first, step * config.batch + last)
            read = [self.read(p, u, item["bad"]) for p, u in zip(places, uniform.tolist(), strict=True)]
            pixels, captions, indices = zip(*read, strict=True)
            item |= {"pixels": torch.stack(pixels), "indices": torch.tensor(indices)}
            item["tokens"] = self.tokenizer(captions)
        if config.flip:
            item["flip"] = (torch.rand(config.batch, generator=generator(*key, "flip")) < 0.5)[first:last]
        return item

    def read(self, place, uniform, bad):
        """Decode and crop the image at a place of the stream -> (pixels, caption, index); an unreadable one goes to
        `bad`, and the one a batch later in the stream replaces it."""
        config, size = self.config, (self.config.image_size,) * 2
        random = generator(config.seed, "crop", place)
        for now in range(place, place + 100 * config.batch, config.batch):
            index = int(self.split.positions(now, now + 1, config.seed))
            try:
                file, caption = self.split.sample(index, uniform)
                box = functools.partial(random_crop, scale=config.crop_scale, generator=random)
                return decode(file, box, size, cut=True)[0], caption, index
            except UNREADABLE as error:
                name = self.split.root / self.split.paths[index] if isinstance(self.split, Split) else f"sample {index}"
                bad.append(f"{name}: {error}")
        fail(f"100 images in a row could not be read, {bad[-1]} the last of them")


class Files(Dataset):
    """Item i: (pixels uint8 [3, H, W], size [width, height], error or '') of image i: the evaluation transform to
    `size` pixels, or where `canvas` (width, height) is given, the whole image resized to that."""

    def __init__(self, split, size, canvas=None):
        self.split, self.size, self.canvas = split, size, canvas

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        canvas, name = self.canvas or (self.size, self.size), f"sample {index}"
        try:
            file = self.split.sample(index, 0.0)[0]
            name = f"{file}" if isinstance(file, Path) else name
            if self.canvas:
                pixels, size = decode(file, lambda w, h: (0, 0, h, w), canvas)
            else:
                pixels, size = decode(file, lambda w, h: centre_box(w, h, self.size), canvas)
            return pixels, torch.tensor(size), ""
        except UNREADABLE as error:
            return torch.zeros(3, canvas[1], canvas[0], dtype=torch.uint8), torch.ones(2).long(), f"{name}: {error}"


def cache_pixels(split, config, world, log):
    """Decode a Split into memory if it fits --cache: small images of one size as they are, others resized to a square.

    Crops are drawn in the files' coordinates, so the square changes no aspect ratio. Unreadable images are left out.
    """
    side = int(config.image_size * 256 / 224)
    sizes = set()
    for path in split.paths[:32] if split.pixels is None else []:
        with contextlib.suppress(*UNREADABLE), Image.open(split.root / path) as image:
            sizes.add(upright_size(image))
    canvas = sizes.pop() if len(sizes) == 1 and max(max(sizes)) <= side else (side, side)
    if split.pixels is not None or len(split) * 3 * math.prod(canvas) > config.cache * 2**30:
        return split
    files = DataLoader(Files(split, side, canvas), batch_size=256, num_workers=common.old_worker_count(config, world, True))
    pixels, sizes, errors = zip(*files, strict=True)
    errors = [e for batch in errors for e in batch]
    log.skip([e for e in errors if e], len(split), config.max_bad)
    split = replace(split, pixels=torch.cat(pixels), sizes=torch.cat(sizes))
    return split.subset(torch.tensor([not e for e in errors]).nonzero()[:, 0])


def make_loader(batches, steps, config, world):
    """Iterate over `batches` for these steps, ahead of time in worker processes where that helps."""
    workers = common.old_worker_count(config, world, streaming=batches.canvas is None)
    options = dict(pin_memory=world.device.type == "cuda", worker_init_fn=common.old_ignore_signals)
    return iter(DataLoader(batches, None, sampler=steps, num_workers=workers, **options))


def make_images(item, pixels, size, device, bicubic=False):
    """A loader's item -> normalised images float [b, 3, S, S] on the device; pixels in memory are cropped here."""
    item = {k: v.to(device, non_blocking=True) for k, v in item.items() if k in ("indices", "pixels", "boxes", "flip")}
    if "boxes" in item:
        return normalize(crop_resize(pixels[item["indices"]], item["boxes"], size, item.get("flip"), bicubic))
    images = normalize(item["pixels"])
    return torch.where(item["flip"][:, None, None, None], images.flip(3), images) if "flip" in item else images


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


def schedules(config, step, steps):
    """Learning rate of step 0, 1, ...: in a line to --lr, which the last step of the warmup has, then a cosine to 0."""
    warmup = int(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return common.old_cosine_schedule(step - warmup, steps - warmup, config.lr, 0.0)


def make_optimizer(model, config):
    """AdamW; groups: decayed, undecayed (biases, 1-D tensors), and scale and bias of the loss with their own rate."""
    groups = common.old_parameter_groups(model)
    own = [p for p in (model.logit_scale, model.logit_bias) if p is not None]
    for group in groups:
        group["params"] = [p for p in group["params"] if all(p is not o for o in own)]
        group |= {"rate": 1.0, "weight_decay": config.weight_decay if group["decay"] else 0.0}
    groups.append({"params": own, "decay": False, "rate": config.logit_lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, config.beta2), eps=1e-6, fused=True)


def accumulated_backward(model, images, tokens, config, budget, scaler):
    """Gradients of the loss on the whole batch, although only a part of it is encoded at a time -> the loss.

    Splitting a contrastive batch would drop negatives. So: encode all parts without gradients; take the loss of all of
    them, and its gradients with respect to what the towers gave; encode each part again and send these gradients on.
    """
    parts = list(zip(images.chunk(config.accumulate), tokens.chunk(config.accumulate), strict=True))
    with torch.no_grad():
        encoded = [model(*part) for part in parts]
    image, text = (torch.cat([e[i] for e in encoded]).requires_grad_() for i in (0, 1))
    head = {name: x.detach().requires_grad_() for name, x in encoded[0][2].items()}
    with torch.enable_grad():
        loss = contrastive_loss(image, text, head, config, budget)
        scaler.scale(loss).backward()
    gradients = zip(image.grad.chunk(len(parts)), text.grad.chunk(len(parts)), strict=True)
    for i, (part, found) in enumerate(zip(parts, gradients, strict=True)):
        last = i == len(parts) - 1
        with common.old_no_sync(model, last):
            image, text, again = model(*part)
            names = list(head) if last else []
            outputs, found = [image, text, *(again[n] for n in names)], [*found, *(head[n].grad for n in names)]
            torch.autograd.backward(outputs, found)
    return loss.detach()


def train(model, tokenizer, split, config, world, out):
    """Train a model on a Split or Shards. Exits with 0 on SIGTERM or SIGINT, 3 after three bad steps."""
    device, dtype = world.device, common.old_choose_precision(config.precision, world.device)
    steps = config.steps or max(1, int(config.epochs * max(1, len(split) // config.batch)))
    model, budget = model.to(device), pair_budget(config, device)
    if config.compile:
        model.compile()
    plain = model
    if config.shard:
        for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
            fully_shard(block)
    model = common.old_distribute(model, world, config.shard)
    if config.shard:  # evaluation calls the towers one by one
        for method in ("features", "image", "text"):
            register_fsdp_forward_method(model, method)
    optimizer = make_optimizer(plain, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    start, streak = 0, torch.zeros((), device=device)  # streak: steps in a row that were not finite
    if config.resume and (out / "last.pt").exists():
        state = common.old_read_own_checkpoint(out / "last.pt", Path(__file__).stem, ARCHITECTURE, config)
        common.old_load_full_state(model, state["model"], optimizer, state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start, streak = state["step"], state["streak"].to(device)

    def save(step):
        weights, moments = common.old_full_state(model, optimizer)
        state = dict(script=Path(__file__).stem, step=step, config=asdict(config), model=weights, optimizer=moments)
        state |= dict(scaler=scaler.state_dict(), streak=streak.cpu())
        state["tokenizer"] = "bytes" if tokenizer.merges is None else "\n".join(tokenizer.merges)
        if world.rank == 0:
            common.old_save_checkpoint(out / "last.pt", state)

    if world.rank == 0:
        common.old_save_config(out, config)
    batches = Batches(split, config, world, tokenizer)
    loader = make_loader(batches, range(start, steps), config, world)
    pixels = None if split.pixels is None else split.pixels.to(device)
    trainable = [p for p in plain.parameters() if p.requires_grad]
    log = Log(out, world, steps, start)
    log.catch_signals()
    if tokenizer.cut:
        log.say(f"{tokenizer.cut} captions are longer than --context {config.context} tokens, and were cut")
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (plain.visual, plain)]
    log.say(
        f"{out}: {len(split)} images, steps {start} to {steps} of {config.batch} on {world.size} x {device.type} in "
        f"{str(dtype)[6:]}; {config.model}, vision tower {millions[0]:.2f} M of {millions[1]:.2f} M parameters, "
        f"{tokenizer.size} token ids"
    )
    waited, window, since = 0.0, start, time.monotonic()
    for step in range(start, steps):
        tick = time.monotonic()
        item = next(loader)
        images = make_images(item, pixels, config.image_size, device, bicubic=True)
        tokens = item["tokens"].to(device, non_blocking=True)
        waited += time.monotonic() - tick
        log.skip(item["bad"], len(split), config.max_bad)
        lr = schedules(config, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["rate"]

        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if config.accumulate > 1:
                loss = accumulated_backward(model, images, tokens, config, budget, scaler)
            else:
                loss = contrastive_loss(*model(images, tokens), config, budget)
                scaler.scale(loss).backward()
                loss = loss.detach()

        scaler.unscale_(optimizer)
        loss, norm = common.old_mean_over_ranks(loss), common.old_gradient_norm(trainable)
        applied = (loss + norm).isfinite()  # a tensor on the device, the same on all ranks
        # with fp16's loss scaling, gradients overflow now and then by design: there only the loss counts
        bad = ~(loss.isfinite() if scaler.is_enabled() else applied)
        streak = torch.where(streak >= 3, streak, (streak + 1) * bad)
        if not scaler.is_enabled():
            optimizer.found_inf = (~applied).float()  # the fused kernel then leaves weights and moments as they are
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            plain.logit_scale.clamp_(0, math.log(100))

        done = step + 1
        stopping = log.stop and world.size == 1
        if done % config.log_every == 0 or done == steps or stopping:
            scalars = [whole(p.detach()).sum() for p in (plain.logit_scale, plain.logit_bias) if p is not None]
            loss_now, norm_now, bad_steps, *scalars = torch.stack([loss, norm, streak, *scalars]).tolist()  # a sync
            stopping = log.agree(log.stop)
            now = time.monotonic()
            row = dict(loss=loss_now, lr=lr, images_per_s=config.batch * (done - window) / (now - since))
            row["data_wait"] = waited / (now - since)
            waited, window, since = 0.0, done, now
            log.progress(done, **row)
            row |= dict(gradient_norm=norm_now, scale=math.exp(scalars[0])) | dict(zip(["bias"], scalars[1:]))
            log.write(step=done, **row, memory_gib=common.old_memory_gib(device))
            if bad_steps >= 3:
                common.old_stop_not_finite(out, done)
        if (done % config.save_every == 0 and streak < 3) or done == steps or stopping:
            save(done)
        if stopping and done < steps:
            log.close()
            log.say(f"stopped after step {done}. To continue: {common.old_resume_command(out)}")
            raise SystemExit(0)
    log.close()
    return plain


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------------------------------


def whole(parameter):
    """A parameter as a plain tensor, put together from all ranks where it is sharded."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def eval_images(split, config, world, log):
    """Iterate over a rank's share of the data under the evaluation transform: (images, their indices, or -1).

    All ranks get the same number of batches (the last images wrap around), since sharded models run in step.
    """
    n, size = len(split), config.image_size
    mine = (torch.arange(math.ceil(n / world.size)) * world.size + world.rank) % n
    if split.pixels is not None and (split.root is None or tuple(split.pixels.shape[2:]) == (size, size)):
        for indices in mine.split(config.eval_batch):
            boxes = torch.tensor([centre_box(w, h, size) for w, h in split.sizes[indices].tolist()]).float()
            images = split.pixels[indices].to(world.device)
            yield normalize(crop_resize(images, boxes.to(world.device), size, bicubic=True)), indices
        return
    workers = common.old_worker_count(config, world, streaming=True)
    loader = DataLoader(Files(split, size), config.eval_batch, sampler=mine.tolist(), num_workers=workers)
    for indices, (pixels, _, errors) in zip(mine.split(config.eval_batch), loader, strict=True):
        log.skip([e for e in errors if e], n, config.max_bad)
        yield normalize(pixels.to(world.device)), indices.where(torch.tensor([not e for e in errors]), -1)


def collect(rows, device):
    """Join all ranks' rows, (indices [B], tensor [B, ...], ...), to (indices [N] on the CPU, tensor [N, ...], ...).

    In order of the indices, without those that were unreadable (-1) or came twice.
    """
    indices, *columns = (common.old_gather_over_ranks(torch.cat(column)) for column in zip(*rows, strict=True))
    kept, order = np.unique(indices.cpu().numpy(), return_index=True)
    order = torch.from_numpy(order[kept >= 0]).to(device)
    return torch.from_numpy(kept[kept >= 0]), *(column[order] for column in columns)


@torch.no_grad()
def encode_images(model, split, config, world, log, features=False):
    """What captions are compared with, of all images on all ranks -> (indices [N] of the readable ones, [N, ...]).

    features: instead, for probes and other uses: the class tokens [N, K, W] after the last norm.
    """
    rows = []
    for images, indices in eval_images(split, config, world, log):
        rows.append((indices.to(world.device), model.features(images) if features else model.image(images)))
    return collect(rows, world.device)


@torch.no_grad()
def encode_texts(model, tokens, config, world):
    """Queries and z' of captions int64 [T, L], on all ranks: [T, 2, D], or [T, 1, D] of a baseline."""
    n, rows = len(tokens), []
    mine = (torch.arange(math.ceil(n / world.size)) * world.size + world.rank) % n
    for indices in mine.split(config.eval_batch):
        rows.append((indices.to(world.device), model.text(tokens[indices].to(world.device))))
    return collect(rows, world.device)[1]


@torch.no_grad()
def score(model, image, text, config, world, tau=None):
    """Cosine of every image with every caption, [N, T], by tiles, every rank its rows; tau: if other than trained."""
    if model.config.model != "llip":
        return F.normalize(image, dim=-1) @ F.normalize(text[:, -1], dim=-1).T
    out_proj, rows = whole(model.out_proj), []
    side = tile_side(pair_budget(config, world.device), config.mix_heads, image.shape[3], config.embedding)
    for part in image.tensor_split(world.size)[world.rank].split(side):
        tiles = [
            pair_scores(
                *part.unbind(1), t[:, 0].unflatten(1, (config.mix_heads, -1)), t[:, 1], out_proj, tau or config.tau
            )
            for t in text.split(side)
        ]
        rows.append(torch.cat(tiles, 1))
    mine = torch.cat(rows) if rows else image.new_zeros(0, len(text))
    return common.old_gather_over_ranks(mine)


def mean_of_prompts(text):
    """One query and one z' for several prompts of a class: [..., P, 2 or 1, D] -> [..., 2 or 1, D].

    As the released evaluation: queries are averaged as they are, z' normalised before.
    """
    z = F.normalize(F.normalize(text[..., -1:, :], dim=-1).mean(-3), dim=-1)
    return torch.cat([text[..., :-1, :].mean(-3), z], dim=-2)


def class_texts(model, tokenizer, names, prompts, config, world):
    """The text of each class, pooled over prompts and synonyms: names [[synonym, ...], ...] -> [C, 2 or 1, D]."""
    captions = [[prompt.format(name) for name in those for prompt in prompts] for those in names]
    found = encode_texts(model, tokenizer([c for those in captions for c in those]), config, world)
    return torch.stack([mean_of_prompts(part) for part in found.split([len(those) for those in captions])])


def roc_auc(scores, positive):
    """Area under the ROC curve of scores [N] for the bools positive [N], in percent; ties count half."""
    a, b = scores[positive][:, None], scores[~positive]
    return 100 * ((a > b).double() + (a == b).double() / 2).mean().item()


def zeroshot_metrics(scores, labels):
    """Percent: top-1 and top-5 accuracy, the mean of classes' accuracies (those that occur), AUC if there are two."""
    scores, labels = scores.cpu(), labels.cpu()  # MPS has no float64
    order = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    hits = order[:, 0].double()
    counts = torch.bincount(labels, minlength=scores.shape[1])
    by_class = torch.zeros_like(counts, dtype=torch.double).index_add_(0, labels, hits)[counts > 0] / counts[counts > 0]
    found = {"top1": hits.mean(), "top5": order.any(1).double().mean(), "mean_per_class": by_class.mean()}
    found = {name: 100 * value.item() for name, value in found.items()}
    return found | ({"auc": roc_auc(scores[:, 1] - scores[:, 0], labels == 1)} if scores.shape[1] == 2 else {})


def retrieval_ranks(scores, owner):
    """Ranks from 0 of the right answer, for scores [N, T] and owner [T], the image of each caption: of the best own
    caption of each image [N], and of the own image of each caption [T]."""
    own = scores[owner, torch.arange(len(owner), device=scores.device)]  # [T]
    best = torch.full_like(scores[:, 0], -math.inf).scatter_reduce_(0, owner, own, "amax")
    return (scores > best[:, None]).sum(1), (scores > own).sum(0)


def rank_metrics(ranks, name):
    """Mean and median rank, counted from 1, and recall at 1, 5 and 10, as shares."""
    ranks = ranks.cpu().double()
    found = {f"{name}_mean_rank": ranks.mean().item() + 1, f"{name}_median_rank": math.floor(ranks.quantile(0.5)) + 1}
    return found | {f"{name}_R@{k}": (ranks < k).double().mean().item() for k in (1, 5, 10)}


def evaluate_retrieval(model, tokenizer, split, config, world, log, taus):
    """Both ways over the whole split, and how much depends on which of an image's captions was given.

    -> {column: {metric: value}} for the columns of `taus`. Percent; `spread` is the standard deviation of the scores of
    an image's own captions, mean over images; `any` and `all`: share of images that rank in the ten best for at least
    one, and for every one of their captions.
    """
    kept, image = encode_images(model, split, config, world, log)
    if isinstance(split, Split):
        captions = [[c for c in split.captions(i) if c] for i in kept.tolist()]
    else:
        captions = [[split.sample(i)[1]] for i in kept.tolist()]
    owner = torch.tensor([i for i, those in enumerate(captions) for _ in those], device=world.device)
    text = encode_texts(model, tokenizer([c for those in captions for c in those]), config, world)
    results = {}
    for column, tau in taus.items():
        scores = score(model, image, text, config, world, tau)
        i2t, t2i = retrieval_ranks(scores, owner)
        found = rank_metrics(i2t, "i2t") | rank_metrics(t2i, "t2i")
        result = {name: 100 * value for name, value in found.items() if "R@" in name}
        own = scores[owner, torch.arange(len(owner), device=owner.device)].cpu().double()
        image_of, counts = owner.cpu(), torch.bincount(owner.cpu()).double()
        if counts.max() > 1:
            mean, square = (torch.bincount(image_of, x) / counts for x in (own, own * own))
            hits = torch.bincount(image_of, (t2i.cpu() < 10).double())
            result["spread"] = (square - mean * mean).clamp(min=0).sqrt().mean().item()
            any_, all_ = (100 * x.double().mean().item() for x in (hits > 0, hits == counts))
            result |= {"any R@10": any_, "all R@10": all_}
        results[column] = result
    return results


def toy_questions(facts):
    """Per kind of caption, all phrases of it that are true of some image, and of which images: {kind: (phrases, bool
    [N, C])}. Of relations and scenes at most 500."""
    questions = {}
    for kind in KINDS:
        phrases = sorted({p for f in facts for p in f[kind]})
        phrases = phrases[:: math.ceil(len(phrases) / 500)]
        number = {p: i for i, p in enumerate(phrases)}
        true = torch.zeros(len(facts), len(phrases), dtype=torch.bool)
        for row, f in zip(true, facts):
            row[[number[p] for p in f[kind] if p in number]] = True
        questions[kind] = phrases, true
    return questions


def evaluate_kinds(model, tokenizer, split, facts, config, world, log, taus):
    """Zero-shot accuracy on the toy world by kind of caption -> {column: {kind: percent, ...}}.

    A fact of an image is found if its score is above those of all phrases of the kind that are not true of the image.
    `spread`: standard deviation of the scores of all facts of an image, mean over images: how unequal captions of one
    image are treated.
    """
    kept, image = encode_images(model, split, config, world, log)
    questions, results = toy_questions([facts[i] for i in kept.tolist()]), {column: {} for column in taus}
    own = {column: [] for column in taus}
    for kind, (phrases, true) in questions.items():
        true = true.to(world.device)
        text = class_texts(model, tokenizer, [[p] for p in phrases], KINDS[kind], config, world)
        for column, tau in taus.items():
            scores = score(model, image, text, config, world, tau)
            best_false = scores.masked_fill(true, -math.inf).amax(1, keepdim=True)
            results[column][kind] = 100 * ((scores > best_false) & true).sum().item() / true.sum().item()
            own[column].append(scores.masked_fill(~true, math.nan))
    for column in taus:
        scores = torch.cat(own[column], 1)
        mean = scores.nanmean(1, keepdim=True)
        results[column]["mean of kinds"] = sum(results[column].values()) / len(KINDS)
        results[column]["spread"] = (scores - mean).square().nanmean(1).sqrt().mean().item()
    return results


def evaluate_zeroshot(model, tokenizer, split, config, world, log, taus):
    """Zero-shot classification with class-wise text queries -> {column: {metric: percent}}."""
    kept, image = encode_images(model, split, config, world, log)
    labels = split.labels[kept].to(world.device)
    text = class_texts(model, tokenizer, names_of(split.classes, config), prompts_of(config), config, world)
    results = {}
    for column, tau in taus.items():
        results[column] = zeroshot_metrics(score(model, image, text, config, world, tau), labels)
        for other in config.eval_taus if config.model == "llip" and column != "mean token" else ():
            found = zeroshot_metrics(score(model, image, text, config, world, other), labels)
            results[column][f"top1, tau {other:g}"] = found["top1"]
    return results


def linear_probe(features, labels, test, test_labels, classes, decays=(1e-4, 1e-3, 1e-2, 1e-1)):
    """Logistic regression on frozen features [N, D], as CLIP's evaluation: L-BFGS, the decay that does best on a tenth
    of the training images, then trained on all of them -> top-1 on test, percent."""
    std, mean = torch.std_mean(features, dim=0)
    features, test = ((x - mean) / (std + 1e-6) for x in (features, test))

    def fit(x, y, decay):
        weight = torch.zeros(classes, x.shape[1] + 1, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=50, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight[:, 1:], weight[:, 0]), y) + decay * weight[:, 1:].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return weight.detach()

    def top1(weight, x, y):
        return 100 * (F.linear(x, weight[:, 1:], weight[:, 0]).argmax(1) == y).float().mean().item()

    held = torch.arange(len(features), device=features.device) % 10 == 0
    best = max(decays, key=lambda d: top1(fit(features[~held], labels[~held], d), features[held], labels[held]))
    return top1(fit(features, labels, best), test, test_labels)


def evaluate_linear(model, train, val, config, world, log):
    """`linear_probe` on the mean of the class tokens -> {"linear": percent}."""
    if 0 < config.eval_limit < len(train):
        train = train.subset(torch.randperm(len(train), generator=generator(config.seed, "limit"))[: config.eval_limit])
    found = []
    for split in (train, val):
        kept, tokens = encode_images(model, split, config, world, log, features=True)
        found += [tokens.mean(1), split.labels[kept].to(world.device)]
    return {"linear": linear_probe(*found, len(train.classes))}


def evaluate(model, tokenizer, config, world, log, train_split=None):
    """Run --eval on a model, beside it on a random one, and for llip with the plain mean of all tokens (tau infinite):
    what a caption's choice of the mix is worth.

    Prints a table, appends it to log.jsonl and returns it: {"trained": {...}, "mean token": {...}, "random": {...}}.
    """
    wanted = [name for name in config.eval.split(",") if name != "none"]
    if not wanted:
        return {}
    val = open_data(config, "val", log)
    train = train_split or (open_data(config, "train", log) if {"linear", "features"} & {*wanted} else None)
    if "features" in wanted:
        write_features(model, train if config.features_split == "train" or val is None else val, config, world, log)
    toy, classes = config.data == "toy" and not config.val_data, val is not None and bool(val.classes)
    needs = dict(kinds=toy, zeroshot=classes and not toy, retrieval=val is not None, features=False)
    needs["linear"] = classes and train is not None and bool(train.classes)
    skipped = [name for name in wanted if not needs[name] and name != "features"]
    if skipped:
        log.say(f"{', '.join(skipped)}: skipped, since {config.data} has not what that needs (val, classes, facts)")
    wanted = [name for name in wanted if needs[name]]
    if not wanted:
        return {}
    if val.classes and train is not None and train.classes and val.classes != train.classes and "linear" in wanted:
        fail(f"train and val of {config.data} differ in their classes: {sorted({*val.classes} ^ {*train.classes})[:5]}")
    some, facts = val, None
    if toy:  # of all that is true, what names the image nearly alone
        facts = toy_world("val", config.image_size)[1]
        some = with_captions(val, [f["relation"] + f["scene"] for f in facts])
    if 0 < config.eval_limit < len(val) and isinstance(val, Split):
        some = some.subset(torch.randperm(len(val), generator=generator(config.seed, "val"))[: config.eval_limit])
    models, results = {"trained": model}, {}
    if config.baselines:
        models["random"] = build(config, tokenizer.size).to(world.device)
    for name, network in models.items():
        network.eval()
        mean = config.baselines and name == "trained" and config.model == "llip"
        taus = {name: None} | ({"mean token": 1e9} if mean else {})
        found = []
        if "kinds" in wanted:
            found.append(evaluate_kinds(network, tokenizer, val, facts, config, world, log, taus))
        if "zeroshot" in wanted:
            found.append(evaluate_zeroshot(network, tokenizer, val, config, world, log, taus))
        if "retrieval" in wanted:
            found.append(evaluate_retrieval(network, tokenizer, some, config, world, log, taus))
        if "linear" in wanted:
            found.append({name: evaluate_linear(network, train, val, config, world, log)})
        for part in found:
            for column, values in part.items():
                results.setdefault(column, {}).update(values)
    log.say(f"{'percent':<16}" + "".join(f"{name:>12}" for name in results))
    for key in results["trained"]:
        cells = (
            f"{r[key]:>12.3f}" if "spread" in key else f"{r[key]:>12.1f}" if key in r else f"{'':>12}"
            for r in results.values()
        )
        log.say(f"{key:<16}" + "".join(cells))
    log.write(eval=results, images={"val": len(val)})
    return results


@torch.no_grad()
def write_features(model, split, config, world, log):
    """--eval features: .npz of features float32 [N, D], labels int64 [N], paths, and with --tokens tokens [N, K, W].

    Features are normalised, and of llip without a caption: the mean of all values, projected. They serve as a first
    shortlist in a search index, which the scores of the mixed vectors then put in order.
    """
    kept, image = encode_images(model.eval(), split, config, world, log)
    if config.model == "llip":
        image = image[:, 1].mean(2).flatten(1) @ whole(model.out_proj)  # values [N, H, K, d]
    arrays = dict(features=F.normalize(image, dim=-1))
    arrays["labels"] = torch.full((len(kept),), -1) if split.labels is None else split.labels[kept]
    if config.tokens:
        arrays["tokens"] = encode_images(model, split, config, world, log, features=True)[1]
    path = Path(config.features_out or log.path.parent / "features.npz")
    if world.rank == 0:
        names = [split.paths[i] if isinstance(split, Split) else str(i) for i in kept.tolist()]
        np.savez(path, paths=np.array(names), **{k: v.cpu().numpy() for k, v in arrays.items()})
        log.say(f"{path}: " + ", ".join(f"{k} {list(v.shape)}" for k, v in arrays.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_maps(visual, images):
    """Where the class tokens look: attention rolled out over the blocks (the mean over heads, half of it the residual
    path), from each returned token to the patches, each map summing to 1. images [B, 3, S, S] -> [B, K, G, G]."""
    x, rolled = visual.embed(images), None
    for block in visual.transformer.resblocks:
        q, k, _ = block.attn.project(block.ln_1(x))
        attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean(1)  # [B, N, N]
        attention = (attention + torch.eye(x.shape[1], device=x.device)) / 2
        rolled = attention if rolled is None else attention @ rolled
        x = block(x)
    maps = rolled[:, : visual.returned, len(visual.class_embedding) :]
    return (maps / maps.sum(-1, keepdim=True)).unflatten(2, (math.isqrt(maps.shape[2]),) * 2)


@torch.no_grad()
def draw_picture(model, tokenizer, images, captions, config, tile=112, gap=8):
    """What different captions of one image look at, as a PIL image: a row for each of images [n, 3, S, S], a column for
    each of its captions. Bright is where the mix looks: the tokens' maps, weighted by how much the caption takes of
    each; relative to the mean over captions. Below, that weight for each head (rows) and token (columns)."""
    maps = token_maps(model.visual, images)
    mean, std = (common.old_constant(v, images.device)[:, None, None] for v in (MEAN, STD))
    pixels = (images * std + mean).clamp(0, 1)
    columns = max(map(len, captions))
    bar = 6 * config.mix_heads if config.model == "llip" else 0
    canvas = Image.new("RGB", (gap + (columns + 1) * (tile + gap), len(images) * (tile + bar + 34 + gap)), "white")
    draw = ImageDraw.Draw(canvas)

    def paste(picture, left, top, size):
        array = (picture.clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
        canvas.paste(Image.fromarray(array).resize(size, Image.NEAREST), (left, top))

    for row, those in enumerate(captions):
        top = row * (tile + bar + 34 + gap) + gap
        paste(pixels[row], gap, top + 26, (tile, tile))
        text = model.text(tokenizer(those).to(images.device))
        if config.model == "llip":
            k = model.image(images[row : row + 1])[:, 0]
            weights = mixing_weights(k, text[:, 0].unflatten(1, (config.mix_heads, -1)), config.tau)[0]  # [T, H, K]
        else:
            weights = images.new_full((len(those), 1, maps.shape[1]), 1 / maps.shape[1])
        seen = torch.einsum("thk,kxy->txy", weights, maps[row]) / weights.shape[1]
        seen = seen / seen.mean(0).clamp(min=1e-6) if len(those) > 1 else seen / seen.mean()
        low, high = seen.amin((1, 2), keepdim=True), seen.amax((1, 2), keepdim=True)
        seen = F.interpolate(((seen - low) / (high - low + 1e-6))[:, None], size=images.shape[-1], mode="bilinear")
        for column, caption in enumerate(those):
            left = gap + (column + 1) * (tile + gap)
            for line, part in enumerate(re.findall(r".{1,18}(?:\s|$)|.{18}", caption)[:2]):
                draw.text((left, top + 12 * line), part, fill="black")
            paste(pixels[row] * (0.2 + 0.8 * seen[column]), left, top + 26, (tile, tile))
            if bar:
                heads = weights[column] / weights[column].max()
                paste(heads.expand(3, -1, -1), left, top + 28 + tile, (tile, bar))
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: ours, Llip's, and in CLIP's layout
# ---------------------------------------------------------------------------------------------------------------------

ARCHITECTURE = ("model", "image_size", "patch", "width", "depth", "heads", "mlp_hidden", "mixture_tokens",
                "all_tokens")  # fmt: skip
ARCHITECTURE += ("text_width", "text_depth", "text_heads", "context", "embedding", "mix_heads", "mix_norm", "tau")
ARCHITECTURE += ("quick_gelu",)


def read_checkpoint(path, config, given=()):
    """Weights of our or of a released checkpoint: {"model": state dict, "architecture": fields, "merges": list or None,
    or "" where the file does not say}.

    Released: Llip's training checkpoints, and CLIP, OpenCLIP and MetaCLIP weights as state dicts. What shapes cannot
    tell (heads, tau, kind of GELU) comes from the preset with these widths, unless it is one of the flags `given`.
    """
    state = common.old_load_checkpoint(path)
    if isinstance(state, dict) and "script" in state:
        state = common.old_read_own_checkpoint(path, Path(__file__).stem)
        merges = None if state["tokenizer"] == "bytes" else state["tokenizer"].split("\n") if state["tokenizer"] else []
        return dict(model=state["model"], architecture={k: state["config"][k] for k in ARCHITECTURE}, merges=merges)
    weights = state.get("state_dict", state) if isinstance(state, dict) else {}
    weights = {re.sub(r"^(_orig_mod\.|module\.)*", "", str(k)): v for k, v in weights.items() if torch.is_tensor(v)}
    weights = {
        k: v for k, v in weights.items() if k not in ("input_resolution", "context_length", "vocab_size", "attn_mask")
    }
    if (
        not {"visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "text_projection"}
        <= weights.keys()
    ):
        found = ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
        fail(f"{path} is no checkpoint of Llip or in CLIP's layout: no `visual.conv1.weight`, but {found}")
    weights = {k.removeprefix("pred."): v.float() for k, v in weights.items()}
    for name in ("logit_scale", "logit_bias"):
        if name in weights:
            weights[name] = weights[name].view(1)
    weights["visual.class_embedding"] = weights["visual.class_embedding"].view(
        -1, weights["visual.class_embedding"].shape[-1]
    )

    def depth(prefix):
        return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in weights if k.startswith(prefix))

    (width, _, patch, _), tokens = weights["visual.conv1.weight"].shape, len(weights["visual.class_embedding"])
    hidden = len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"])
    text_width, embedding = weights["text_projection"].shape
    model = config.model
    if "v_proj" in weights:
        model = "llip" if "k_proj" in weights else "learned"
    elif model == "llip":
        model = "clip" if "logit_bias" not in weights else "siglip"
    if model == "clip":
        weights.pop("logit_bias", None)
    grid = math.isqrt(len(weights["visual.positional_embedding"]) - tokens)
    known = dict(
        model=model, image_size=patch * grid, patch=patch, width=width, depth=depth("visual.transformer.resblocks."),
        mlp_hidden=0 if hidden == 4 * width else hidden, mixture_tokens=tokens, text_width=text_width,
        text_depth=depth("transformer.resblocks."), context=len(weights["positional_embedding"]), embedding=embedding,
        mix_norm="K_norm.weight" in weights, all_tokens=len(weights.get("v_proj", ())) > tokens,
    )  # fmt: skip
    likely = (
        p
        for p in PRESETS.values()
        if [p.get(k) for k in ("width", "text_width", "embedding")] == [width, text_width, embedding]
    )
    likely = next(likely, {})
    for name in ("heads", "text_heads", "mix_heads", "tau"):
        if name not in given and name in likely:
            known[name] = likely[name]
        elif name not in given and (model == "llip" or name in ("heads", "text_heads")):
            fail(f"{path} cannot say its {name}, and no preset has its widths: add --{name.replace('_', '-')}")
    return dict(model=weights, architecture=known, merges="")


def load_weights(model, weights, path):
    """Put what `read_checkpoint` found into a model; positions of another resolution are interpolated."""
    state, name = dict(weights["model"]), "visual.positional_embedding"
    tokens, wanted = len(model.visual.class_embedding), len(model.visual.positional_embedding)
    if name in state and len(state[name]) != wanted and len(state.get("visual.class_embedding", ())) == tokens:
        old, new = (math.isqrt(n - tokens) for n in (len(state[name]), wanted))
        print(f"{path}: positions interpolated from {old}x{old} to {new}x{new} patches", flush=True)
        patches = common.old_interpolate_positions(state[name][None, tokens:], (old, old), (new, new))[0]
        state[name] = torch.cat([state[name][:tokens], patches])
    common.old_load_state(model, state, path)


def load_model(path, config=None, given=()):
    """(frozen model, its Tokenizer or None, config) from any checkpoint that this script reads."""
    config = config or Config()
    weights = read_checkpoint(path, config, given)
    config = replace(config, **{k: v for k, v in weights["architecture"].items() if k not in given})
    model = Llip(config, len(weights["model"]["token_embedding.weight"]))
    load_weights(model, weights, path)
    tokenizer = None if weights["merges"] == "" else Tokenizer(weights["merges"], config.context)
    return model.requires_grad_(False).eval(), tokenizer, config


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def report(model, tokenizer, split, config, world, log):
    """After training, the picture: what different captions of one image look at."""
    if config.shard or not isinstance(split, Split):
        return  # parts of a sharded model do not run by themselves; shards know one caption an image
    split = open_data(config, "val", log) or split
    some = split.subset(torch.arange(min(5, len(split))))
    if config.data == "toy":
        facts = toy_world("val", config.image_size)[1]
        captions = [[*f["place"], f["relation"][0]] for f in facts[: len(some)]]
    else:
        captions = [list(dict.fromkeys(some.captions(i)))[:5] for i in range(len(some))]
    images = next(eval_images(some, config, World(0, 1, world.device), log))[0]
    picture = draw_picture(model.eval(), tokenizer, images, captions, config)
    if world.rank == 0:
        picture.save(log.path.parent / "picture.png")
        log.say(f"{log.path.parent / 'picture.png'}: what captions of one image look at, and the tokens that they take")


def run(config, given):
    """Train and evaluate; with --init and no length given, only evaluate. given: names of the flags that were typed."""
    world, weights, merges = common.old_start_world(config.device), None, ""
    if config.init:
        weights = read_checkpoint(config.init, config, given)
        config, merges = (
            replace(config, **{k: v for k, v in weights["architecture"].items() if k not in given}),
            weights["merges"],
        )
    training = not config.init or bool({"steps", "epochs"} & given)
    check(config, world, training)
    out = common.old_choose_out(config.out, Path(__file__).stem, config.resume, world)
    log = Log(out, world)
    split = open_data(config, "train", log) if training else None
    if isinstance(split, Split):
        split = cache_pixels(split, config, world, log)
    if config.resume and (out / "last.pt").exists():
        merges = read_checkpoint(out / "last.pt", config, given)["merges"]
    if merges != "":
        tokenizer = Tokenizer(merges, config.context)
    elif config.init and not config.vocabulary:
        fail(f"{config.init} does not hold its vocabulary: add --vocabulary bpe_simple_vocab_16e6.txt.gz")
    else:
        tokenizer = make_tokenizer(config, split)
    model = build(config, tokenizer.size)
    if weights:
        load_weights(model, weights, config.init)
    if training:
        model = train(model, tokenizer, split, config, world, out)
        report(model, tokenizer, split, config, world, Log(out, world))
    evaluate(model.to(world.device), tokenizer, config, world, Log(out, world), split)


def main(argv=None):
    """The command line; see --help."""
    argv = sys.argv[1:] if argv is None else argv
    config = common.old_parse_config(Config, PRESETS, DATA_PRESETS, argv, __doc__.split("\n\n")[0])
    try:
        run(config, common.old_given_flags(argv))
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        advice = "try --accumulate 2 (4, 8), --precision bf16, --shard, or a smaller --batch"
        fail(f"out of GPU memory ({reason}): {advice}", 4)
    except OSError as error:
        common.old_fail_if_full(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
