# SPDX-License-Identifier: MIT
"""Llip: the caption chooses the mix of an image's visual tokens that it is compared with.

"Modeling Caption Diversity in Contrastive Vision-Language Pretraining", Lavoie, Kirichenko,
Ibrahim, Assran, Wilson, Courville, Ballas, ICML 2024, arXiv 2405.00740.

The idea. An image has many valid captions, and each says something else. CLIP and SigLIP want one
image vector that is near to all of them. Llip's vision transformer gives K mixture tokens. A light
cross-attention, with the caption as its query, mixes them into an image vector for that caption.
The loss is SigLIP's: does image i belong to caption j, for all pairs of the global batch. Image i
is mixed for caption j also where they do not belong together: else the caption inside the image
vector would give the answer away. The N x N image vectors are never held at once (see PairLoss).

    images [B, 3, S, S] -- ViT, K class tokens --> [B, K, W] --> keys, values [B, H, K, d] --.
                                                                                             |
                                          .-- queries [T, H, d] --> softmax(q k / tau) mixes values
    captions [T, L] -- transformer --> [T, U]                                                |
                                          '-- z' [T, D] -- cosine -- mixed z [B, T, D] ------'

    python llip.py                              # toy scenes, a few minutes; --model siglip or clip
    python llip.py --data captions_train2017.json --images train2017
    torchrun --nproc-per-node 8 llip.py --preset vit_b16 --data shards --val-data imagenet
    python llip.py --init llip_b16_k32.pt --no-train --data imagenet --eval zeroshot

Departures. From the paper, with the released code: queries come from the text transformer's output
and not from z'; each token has its own key and value matrices; tau divides alone, without sqrt(d);
the sum over pairs is divided by the images. From the code, without another result: texts are
gathered instead of passed in a ring; the loss goes by tiles, in fp32. With another result: small
presets have tau near sqrt(D / H), the bias starts at ln(1 / (batch - 1)), scale and bias learn ten
times faster; images are read by place and not as a stream; a crop is resized together with what
lies beyond its border. Released weights need --vocabulary bpe_simple_vocab_16e6.txt.gz.
"""

import copy
import csv
import functools
import gzip
import html
import io
import itertools
import json
import math
import os
import re
import tarfile
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw
from torch import nn
from torch.utils.checkpoint import checkpoint

import common
from common import fail, note

# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag. The comment beside it is its help."""

    preset: str = ""  # a name of PRESETS, by default the one that fits --data
    data: str = "toy"  # toy, cifar10, a captions file, tar shards, or a folder with train/CLASS
    images: str = ""  # folder that a captions file's names are relative to, default its own
    columns: str = "filepath,title"  # columns of a csv or tsv: the image's file, the caption
    val_data: str = ""  # what to evaluate on, default what belongs to --data

    # model
    model: Literal["llip", "siglip", "clip"] = "llip"  # the method
    image_size: int = 32  # side of the image, pixels
    patch: int = 8  # side of a patch, pixels
    width: int = 64  # W: vision width
    depth: int = 3  # vision blocks
    heads: int = 4  # attention heads of the vision transformer
    hidden: int = 0  # width of the vision MLPs, 0 = 4 * width
    mixture_tokens: int = 8  # K: class tokens; siglip and clip have one
    text_width: int = 64  # U: text width
    text_depth: int = 2  # text blocks
    text_heads: int = 4  # attention heads of the text transformer
    context: int = 16  # tokens of a caption with start and end; longer ones are cut
    embedding: int = 32  # D: width of the space in which images and captions are compared
    mix_heads: int = 4  # H: heads of the mixing cross-attention
    mix_norm: bool = False  # layer norm on keys, values and queries (the paper's H/14 and G/14)
    tau: float = 3.0  # temperature of the mixing softmax
    quick_gelu: bool = True  # x * sigmoid(1.702 x) instead of the exact GELU
    vocabulary: str = ""  # a vocabulary file such as bpe_simple_vocab_16e6.txt.gz
    merges: int = 200  # without one: learn so many merges from the captions, 0 = bytes

    # optimisation
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop; 1 1 = the whole image
    flip: bool = False  # mirror half of the images; not where captions say left and right
    train: bool = True  # train; --no-train only evaluates --init
    batch: int = 128  # pairs a step, over all ranks; each is a negative of all others
    epochs: float = 0  # length of the run in passes over the data
    steps: int = 0  # length of the run in steps, wins over --epochs
    warmup: float = 0.05  # share of the run in which the learning rate rises
    lr: float = 2e-3  # peak learning rate
    paper_logits: bool = False  # bias from -10 at rate lr, else from ln(1 / (batch - 1)) at 10 * lr
    weight_decay: float = 0.1  # weight decay
    recompute: bool = False  # compute activations again in the backward pass: less memory

    # run
    seed: int = 0  # seed of everything random
    out: str = ""  # folder of the run, default runs/llip, runs/llip-2, ...
    resume: bool = False  # continue from last.pt in the run's folder, or start if there is none
    init: str = ""  # weights to start from or to evaluate: ours, Llip's, or in CLIP's layout
    save_every: int = 500  # steps between checkpoints
    log_every: int = 20  # steps between rows of log.jsonl
    device: Literal["", "cuda", "mps", "cpu"] = ""  # default the best there is
    precision: Literal["", "bf16", "fp16", "fp32"] = ""  # default bf16 where it is fast
    compile: bool = torch.cuda.is_available()  # torch.compile the networks
    shard: bool = False  # FSDP2 instead of DDP, for models that do not fit one GPU
    workers: int = 0  # loading processes a rank, 0 = load between the steps

    # evaluation
    eval: str = "kinds,retrieval"  # comma-separated: kinds (toy), zeroshot, retrieval, features
    class_names: str = ""  # json list of names, or of lists of synonyms, in the classes' order


# --------------------------------------------------------------------------------------------------
# Tokens: CLIP's byte-level BPE, with its vocabulary file or one learned from the captions
# --------------------------------------------------------------------------------------------------

START = "<start_of_text>"
END = "<end_of_text>"
# printable bytes are written as the character of the same number, the others as 256, 257, ...
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# byte values in the order of their ids
BYTES = PRINTABLE + sorted(set(range(256)) - set(PRINTABLE))
SIGNS = map(chr, [*PRINTABLE, *range(256, 324)])
CHARACTERS = dict(zip(BYTES, SIGNS, strict=True))
MERGES = 49152 - 256 - 2  # lines of OpenAI's file that its tokenizer uses
QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
WIDE = re.compile("[\u3000\ufb00-\ufb06\uff00-\uffef]+")  # ligatures and full-width letters
# numbers such as fractions, which Python's \d leaves out
NUMBERS = [c for c in map(chr, range(0x20000)) if unicodedata.category(c) in ("No", "Nl")]
NUMBERS = "".join(NUMBERS)
# pieces: special tokens, contractions, letters, single digits, other signs
PIECES = re.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d"
    rf"|[^\W\d_{NUMBERS}]+|[\d{NUMBERS}]|(?:[^\s\w]|_)+",
    re.IGNORECASE,
)


def clean(text):
    """Return a caption as CLIP reads it: entities resolved, plain quotes, one space, lower case.

    Of the repairs of the package ftfy, these are the ones that captions need.
    """
    text = html.unescape(html.unescape(text)).translate(QUOTES)
    text = WIDE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def to_symbols(piece):
    """Return a piece's bytes as spaced characters, the last one marked: 'at' -> ' a  t</w> '."""
    return "".join(f" {CHARACTERS[b]} " for b in piece.encode())[:-1] + "</w> "


def merge(word, pair):
    """Join all occurrences of a pair of neighbours in spaced symbols, from left to right."""
    return word.replace(" {}  {} ".format(*pair), " {}{} ".format(*pair))


def learn_merges(captions, count):
    """Return up to `count` merges: each time the most frequent pair, of equals the first."""
    pieces = (piece for caption in captions for piece in PIECES.findall(clean(caption)))
    words = Counter(map(to_symbols, pieces))
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, n in words.items():
            for pair in itertools.pairwise(word.split()):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if pairs[best] < 2:
            break
        merges.append(" ".join(best))
        words = {merge(word, best): n for word, n in words.items()}
    return merges


class Tokenizer(nn.Module):
    """Turn captions into token ids. A module, so that last.pt holds the vocabulary.

    merges: ["left right", ...] in order of rank; without any, ids are bytes. The end has the
    largest id of all, the start the one before. Captions are padded with 0.
    """

    def __init__(self, merges, context):
        super().__init__()
        text = "\n".join(merges).encode()
        self.register_buffer("text", torch.tensor(list(text), dtype=torch.uint8))
        self.context = context
        self.ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(merges)}
        characters = CHARACTERS.values()
        names = [*characters, *(c + "</w>" for c in characters), *map("".join, self.ranks)]
        self.ids = {name: i for i, name in enumerate(names)}
        self.start = len(names)
        self.pieces = {START: [self.start], END: [self.start + 1]}  # ids of pieces seen so far

    def encode(self, text):
        """Return the ids of a caption, without start and end."""
        ids = []
        for piece in PIECES.findall(clean(text)):
            if piece not in self.pieces:
                word = to_symbols(piece)
                for _ in piece.encode():  # as many merges as there can be
                    known = self.ranks.keys() & itertools.pairwise(word.split())
                    word = merge(word, min(known, key=self.ranks.get)) if known else word
                self.pieces[piece] = [self.ids[symbol] for symbol in word.split()]
            ids += self.pieces[piece]
        return ids

    def forward(self, captions):
        """Return int64 [T, L]. Of a caption that is too long, the end stays."""
        rows = []
        padding = [0] * self.context
        for caption in captions:
            ids = [self.start, *self.encode(caption)][: self.context - 1]
            rows.append([*ids, self.start + 1, *padding][: self.context])
        return torch.tensor(rows)


def locate(name):
    """Return the path of a file or folder that may be in $DATA."""
    path = Path(name).expanduser().absolute()
    if not path.exists() and "/" not in name:
        path = Path(os.environ.get("DATA", "data"), name)
    return path


def read_merges(name):
    """Read a vocabulary file: gzip, a header, then "left right" a line."""
    try:
        lines = gzip.decompress(locate(name).read_bytes()).decode().splitlines()
    except (OSError, EOFError, ValueError) as error:
        advice = "CLIP's repository has it; or learn one by --vocabulary '' --merges 4000"
        fail(f"no vocabulary in {locate(name)} ({error}): {advice}")
    return lines[1 : 1 + MERGES]


# --------------------------------------------------------------------------------------------------
# Model. Parameter names are CLIP's, so that released weights load as they are.
# --------------------------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x):
        """[..., W] -> [..., W]."""
        return x * torch.sigmoid(1.702 * x)


class ResidualBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, hidden, quick_gelu):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.c_fc = nn.Linear(width, hidden)
        self.mlp.gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.mlp.c_proj = nn.Linear(hidden, width)

    def forward(self, x, mask=None, first=None):
        """x [B, N, W] -> [B, N, W], or only its `first` tokens. mask: of causal attention."""
        keys = self.ln_1(x)
        queries = keys if first is None else keys[:, :first]
        attended, _ = self.attn(
            queries, keys, keys, need_weights=False, attn_mask=mask, is_causal=mask is not None
        )
        x = x[:, :first] + attended
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width, depth, heads, hidden, config):
        super().__init__()
        self.recompute = config.recompute
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, heads, hidden, config.quick_gelu) for _ in range(depth)
        )

    def forward(self, x, mask=None, first=None):
        """x [B, N, W] -> [B, N, W]. first: the last block computes only so many tokens."""
        for block in self.resblocks:
            wanted = first if block is self.resblocks[-1] else None
            if self.recompute:
                x = checkpoint(block, x, mask, wanted, use_reentrant=False)
            else:
                x = block(x, mask, wanted)
        return x


class VisionTransformer(nn.Module):
    """CLIP's vision transformer with K class tokens. Patches are not returned."""

    def __init__(self, config):
        super().__init__()
        c = config
        std = c.width**-0.5
        tokens = c.mixture_tokens if c.model == "llip" else 1
        patches = (c.image_size // c.patch) ** 2
        self.conv1 = nn.Conv2d(3, c.width, c.patch, c.patch, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(tokens, c.width))
        self.positional_embedding = nn.Parameter(std * torch.randn(tokens + patches, c.width))
        self.ln_pre = nn.LayerNorm(c.width)
        self.transformer = Transformer(c.width, c.depth, c.heads, c.hidden or 4 * c.width, c)
        self.ln_post = nn.LayerNorm(c.width)
        if c.model != "llip":
            self.proj = nn.Parameter(std * torch.randn(c.width, c.embedding))

    def embed(self, images):
        """Return what enters the first block: [class tokens | patches], [B, K+P, W]."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        tokens = self.class_embedding.to(patches.dtype).expand(len(images), -1, -1)
        return self.ln_pre(torch.cat([tokens, patches], dim=1) + self.positional_embedding)

    def forward(self, images):
        """[B, 3, S, S] -> the class tokens after the last norm, [B, K, W]."""
        x = self.transformer(self.embed(images), first=len(self.class_embedding))
        return self.ln_post(x)


class CLIP(nn.Module):
    """The towers of CLIP and SigLIP: one vector an image, one a caption. vocabulary: token ids."""

    def __init__(self, config, vocabulary):
        super().__init__()
        c = config
        u = c.text_width
        self.visual = VisionTransformer(c)
        self.token_embedding = nn.Embedding(vocabulary, u)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(c.context, u))
        self.transformer = Transformer(u, c.text_depth, c.text_heads, 4 * u, c)
        self.ln_final = nn.LayerNorm(u)
        self.text_projection = nn.Parameter(u**-0.5 * torch.randn(u, c.embedding))
        # of one dimension, since FSDP2 splits each parameter along its first
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        if c.model != "clip":
            bias = -10.0 if c.paper_logits else -math.log(max(1, c.batch - 1))
            self.logit_bias = nn.Parameter(torch.tensor([bias]))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.transformer.resblocks:
            residual = (2 * u * c.text_depth) ** -0.5
            nn.init.normal_(block.attn.in_proj_weight, std=u**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * u) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)

    def encode_tokens(self, tokens):
        """Captions int64 [T, L] -> g, the text transformer's output at the end of each, [T, U].

        Padding comes after the end and attention looks back only, so it needs no mask.
        """
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], x.device)
        x = self.transformer(x, mask)
        ends = tokens.argmax(1)  # the end has the largest id
        return self.ln_final(x[torch.arange(len(x), device=x.device), ends])

    def image(self, images):
        """Images [B, 3, S, S] -> [B, D]."""
        return self.visual(images)[:, 0] @ self.visual.proj

    def text(self, tokens):
        """Captions int64 [T, L] -> z' [T, 1, D]."""
        return (self.encode_tokens(tokens) @ self.text_projection)[:, None]

    def forward(self, images, tokens):
        """Return the loss of pairs. All of a step goes through here, as DDP and FSDP want it."""
        return contrastive_loss(self.image(images), self.text(tokens), self)


class Llip(CLIP):
    """Keys and values for each image, a query and z' for each caption."""

    def __init__(self, config, vocabulary):
        super().__init__(config, vocabulary)
        c = config
        self.heads = c.mix_heads
        self.tau = c.tau
        shape = (c.mixture_tokens, c.width, c.embedding)  # matrices of its own for each token
        self.k_proj = nn.Parameter(c.width**-0.5 * torch.randn(shape))
        self.v_proj = nn.Parameter(c.width**-0.5 * torch.randn(shape))
        self.q_proj = nn.Parameter(c.text_width**-0.5 * torch.randn(c.text_width, c.embedding))
        self.out_proj = nn.Parameter(c.embedding**-0.5 * torch.randn(c.embedding, c.embedding))
        norm = nn.LayerNorm if c.mix_norm else nn.Identity
        self.K_norm = norm(c.embedding)
        self.Q_norm = norm(c.embedding)
        self.V_norm = norm(c.embedding)

    def image(self, images):
        """Images [B, 3, S, S] -> keys and values [B, 2, H, K, d]."""
        h = self.visual(images)  # [B, K, W]
        k = self.K_norm(torch.einsum("bkw,kwd->bkd", h, self.k_proj))
        v = self.V_norm(torch.einsum("bkw,kwd->bkd", h, self.v_proj))
        both = torch.stack([k, v], dim=1).unflatten(3, (self.heads, -1))
        return both.transpose(2, 3)

    def text(self, tokens):
        """Captions int64 [T, L] -> queries and z', [T, 2, D]."""
        g = self.encode_tokens(tokens)
        return torch.stack([self.Q_norm(g @ self.q_proj), g @ self.text_projection], dim=1)


def build(config, vocabulary):
    """Return a freshly initialised model."""
    torch.manual_seed(config.seed)
    return Llip(config, vocabulary) if config.model == "llip" else CLIP(config, vocabulary)


# --------------------------------------------------------------------------------------------------
# Loss: all pairs of the global batch, without ever holding their N x N image vectors
# --------------------------------------------------------------------------------------------------


def mixing_weights(k, q, tau):
    """Return how much of each token an image gives for a caption: [H, B, K, T].

    k: keys [B, H, K, d]; q: queries [T, H, d].
    """
    keys = k.transpose(0, 1)
    logits = keys.flatten(1, 2) @ (q / tau).permute(1, 2, 0)  # [H, B*K, T]
    return logits.view(*keys.shape[:3], -1).softmax(2)


def pair_scores(image, text, out_proj, tau):
    """Return the cosine of each image, mixed for a caption, with that caption: [B, T].

    image: keys and values [B, 2, H, K, d]; text: queries and z' [T, 2, D]; out_proj [D, D].
    """
    k, v = image.unbind(1)
    q, z_text = text.unbind(1)
    q = q.unflatten(1, (k.shape[1], -1))  # [T, H, d]
    mixed = mixing_weights(k, q, tau).mT @ v.transpose(0, 1)  # [H, B, T, d]
    z = mixed.permute(1, 2, 0, 3).flatten(2) @ out_proj  # [B, T, D]
    products = torch.einsum("btd,td->bt", z, F.normalize(z_text, dim=1))
    return products / z.norm(dim=2).clamp(min=1e-12)


def sigmoid_loss(scores, scale, bias, first):
    """Return the sum over pairs of -log sigmoid(y (s score + b)); y is 1 for the true pairs.

    scores [B, T]; caption first + i belongs to image i (it may lie outside of the scores).
    """
    y = torch.full_like(scores, -1.0)
    y.diagonal(first).fill_(1.0)
    return -F.logsigmoid(y * (scale * scores + bias)).sum()


def pairs_in_tile(image, text):
    """Return how many pairs a tile may have: what a CPU's caches hold, or what fills a GPU."""
    heads, tokens = image.shape[2:4]
    memory = 2**29 if image.device.type == "cuda" else 2**24
    return max(1, memory // (4 * (3 * heads * tokens + 4 * text.shape[2])))


class PairLoss(torch.autograd.Function):
    """The sigmoid loss over all pairs, in the memory of one tile of images x captions.

    The loss is a plain sum over pairs: the gradients of a tile can be taken at once, and its
    activations forgotten. This costs no more work than the plain form.
    """

    @staticmethod
    def forward(ctx, side, first, tau, *inputs):
        """inputs: image, text, out_proj as for `pair_scores`; scale, bias [1]. side: of a tile."""
        gradients = [torch.zeros_like(x) for x in inputs]
        total = 0.0
        for i in range(0, len(inputs[0]), side):
            for j in range(0, len(inputs[1]), side):
                places = [slice(i, i + side), slice(j, j + side), ..., ..., ...]
                tile = [
                    x[place].detach().requires_grad_()
                    for x, place in zip(inputs, places, strict=True)
                ]
                with torch.enable_grad():
                    scores = pair_scores(*tile[:3], tau)
                    loss = sigmoid_loss(scores, *tile[3:], first + i - j)
                    parts = torch.autograd.grad(loss, tile)
                for gradient, place, part in zip(gradients, places, parts, strict=True):
                    gradient[place] += part
                total += loss.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, incoming):
        """Return the gradients that forward found, times the scalar that comes in."""
        return None, None, None, *(x * incoming for x in ctx.saved_tensors)


def gather(x):
    """Concatenate all ranks' tensors. The backward pass sends each rank its gradients home."""
    if not dist.is_initialized():
        return x
    parts = [torch.zeros_like(x)] * dist.get_world_size()
    parts[dist.get_rank()] = x
    # a sum over ranks, where all but one are zero: its gradient is the sum over ranks too
    return common.mean_over_ranks(torch.cat(parts)) * len(parts)


@torch.compiler.disable
def contrastive_loss(image, text, model):
    """Return the loss of this rank's images against all ranks' captions, divided by the images.

    image, text: what the model makes of them; caption i belongs to image i. The mean over ranks is
    the loss of the global batch.
    """
    n = len(image)
    first = dist.get_rank() * n if dist.is_initialized() else 0
    # fp32, since gradients of bf16 would be off by a percent
    with torch.autocast(image.device.type, enabled=False):
        image = image.float()
        text = gather(text.float())
        scale = model.logit_scale.exp()
        if isinstance(model, Llip):
            side = math.isqrt(pairs_in_tile(image, text))
            inputs = (image, text, model.out_proj, scale, model.logit_bias)
            return PairLoss.apply(side, first, model.tau, *inputs) / n
        image = F.normalize(image, dim=1)
        z_text = F.normalize(text[:, 0], dim=1)
        scores = image @ z_text.T
        if hasattr(model, "logit_bias"):
            return sigmoid_loss(scores, scale, model.logit_bias, first) / n
        own = torch.arange(first, first + n, device=image.device)
        of_captions = z_text[own] @ gather(image).T
        losses = [F.cross_entropy(scale * logits, own) for logits in (scores, of_captions)]
        return sum(losses) / 2


# --------------------------------------------------------------------------------------------------
# The toy world: scenes of a few shapes, of which many different things are true
# --------------------------------------------------------------------------------------------------

SHAPES = "circle square triangle cross ring bar".split()
GLYPHS = """
....####....  ############  .....##.....  ....####....  ....####....  ............
..########..  ############  .....##.....  ....####....  ..########..  ............
.##########.  ############  ....####....  ....####....  .##########.  ............
.##########.  ############  ....####....  ....####....  .####..####.  ............
############  ############  ...######...  ############  ####....####  ############
############  ############  ...######...  ############  ###......###  ############
############  ############  ..########..  ############  ###......###  ############
############  ############  ..########..  ############  ####....####  ############
.##########.  ############  .##########.  ....####....  .####..####.  ............
.##########.  ############  .##########.  ....####....  .##########.  ............
..########..  ############  ############  ....####....  ..########..  ............
....####....  ############  ############  ....####....  ....####....  ............
"""
COLOURS = "red green blue yellow magenta white".split()
PLACES = ("top left", "top right", "bottom left", "bottom right")


def facts_of(names):
    """Return what is true of a scene, {kind of caption: captions}. names: {place: "red circle"}."""
    relations = []
    for a, b in itertools.combinations(names, 2):
        if a // 2 == b // 2:
            relations.append(f"{names[a]} left of {names[b]}")
        elif a % 2 == b % 2:
            relations.append(f"{names[a]} above {names[b]}")
    return {
        "object": [f"a {name}" for name in names.values()],
        "place": [f"{PLACES[place]} {name}" for place, name in names.items()],
        "count": [f"{len(names)} shapes"],
        "relation": relations,
        "scene": [", ".join(names.values())],
    }


@functools.cache
def toy_world(part):
    """Return 8,000 scenes (train) or 1,000 others (val) as Pairs, and the facts of each.

    A scene has two to four objects, at most one in each quarter. All facts are captions; for
    retrieval (val) only those that name a scene nearly alone.
    """
    count = 8000 if part == "train" else 1000
    random = np.random.default_rng(count)
    glyphs = np.array(list("".join(GLYPHS.split()))) == "#"
    glyphs = glyphs.reshape(12, 6, 12)
    ground = random.uniform(20, 70, (count, 1, 1, 1))
    pixels = random.normal(ground, 6, (count, 32, 32, 3))
    facts = []
    for image in pixels:
        names = {}
        for place in sorted(random.permutation(4)[: random.integers(2, 5)]):
            shape, colour = random.integers(0, 6, 2)
            top, left = random.integers(0, 5, 2) + 16 * np.array(divmod(place, 2))
            paint = np.array(ImageColor.getrgb(COLOURS[colour])) * random.uniform(0.6, 0.8)
            image[top : top + 12, left : left + 12][glyphs[:, shape]] += paint
            names[place] = f"{COLOURS[colour]} {SHAPES[shape]}"
        facts.append(facts_of(names))
    kinds = list(facts[0]) if part == "train" else ["relation", "scene"]
    captions = [[caption for kind in kinds for caption in scene[kind]] for scene in facts]
    images = [*map(Image.fromarray, pixels.clip(0, 255).astype(np.uint8))]
    return unlabelled(images, range(count), captions, part), facts


# --------------------------------------------------------------------------------------------------
# Data: captions files, tar shards, class folders
# --------------------------------------------------------------------------------------------------

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
SHIFT = (common.MEAN - MEAN) / STD
SCALE = common.STD / STD
FORMATS = "a captions file (.json, .csv, .tsv), tar shards, or a folder with train/CLASS/*.jpg"


def clip_range(images):
    """Bring images [B, 3, H, W] from ImageNet's normalisation, common's, to CLIP's."""
    scale, shift = (x.to(images.device, non_blocking=True) for x in (SCALE, SHIFT))
    return images * scale + shift


class Member(io.BytesIO):
    """A part of a file, as a file that knows its name."""

    def __repr__(self):
        return self.name


@dataclass
class Ranges:
    """Byte ranges of files, read when they are asked for. places: rows (file, offset, length)."""

    paths: list
    places: np.ndarray

    def __getitem__(self, index):
        path, offset, length = self.places[index].tolist()
        with open(self.paths[path], "rb") as file:
            file.seek(offset)
            member = Member(file.read(length))
        member.name = f"{self.paths[path]}, byte {offset}"
        return member


class Texts(Ranges):
    """Captions in tar shards, one an image."""

    def __getitem__(self, index):
        return [super().__getitem__(index).read().decode(errors="replace")]


@dataclass
class Pairs(common.Split):
    """A split whose images have captions, a list each. Images: PIL, paths or byte ranges."""

    captions: list = ()
    centred: bool = False  # read by CLIP's transform for evaluation, whatever part is asked for

    def read(self, index, choose_boxes, sizes, resample):
        """See common.Split."""
        if self.centred:
            choose_boxes = functools.partial(centre_box, sizes[0])
        return super().read(index, choose_boxes, sizes, resample)


def unlabelled(images, names, captions, part):
    """Return Pairs without classes; part: train or val."""
    labels = torch.full((len(names),), -1)
    return Pairs(images, names, labels, [], set(), captions, part == "val")


def centre_box(size, width, height):
    """Return what CLIP's evaluation sees: shorter side to `size`, then the central square."""
    sides = np.array([height, width])
    resized = size * sides // sides.min()
    pixel = sides / resized
    corner = np.round((resized - size) / 2) * pixel
    return [(*corner, *(size * pixel))]


def make_batch(split, tokenizer, config, world, step):
    """Make this rank's share of a step's batch: (pixels uint8 [B, 3, S, S], tokens, bad files).

    All that is random of a pair depends on the seed and its place in the endless stream.
    """
    c = config
    share = c.batch // world.size
    number = step * world.size + world.rank
    indices = common.micro_batch_indices(number, share, len(split), c.seed)
    places = range(number * share, (number + 1) * share)
    randoms = [common.generator(c.seed, "pair", place) for place in places]

    def box(i, width, height):
        if c.crop_scale[0] == 1.0:
            return [(0, 0, height, width)]
        return [common.random_crop(width, height, c.crop_scale, randoms[i])]

    found, pixels, bad = split.read_batch(indices, box, [c.image_size], Image.BICUBIC)
    captions = []
    for i, index in enumerate(found.tolist()):
        texts = split.captions[index]
        captions.append(texts[torch.randint(len(texts), (1,), generator=randoms[i])])
        if c.flip and torch.rand(1, generator=randoms[i]) < 0.5:
            pixels[i] = pixels[i].flip(2)
    return pixels, tokenizer(captions), bad


def tar_samples(path):
    """Find the samples in a tar shard: (int64 [N, 4], what is wrong with it). Reads headers only.

    A row: offset and length of the image, offset and length of the caption.
    """
    samples = defaultdict(dict)
    wrong = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                key, _, suffix = name.partition(".")
                if member.isfile() and key:  # no hidden names
                    place = (member.offset_data, member.size)
                    samples[folder, key]["." + suffix.lower()] = place
    except (tarfile.TarError, OSError) as error:
        wrong.append(f"{path}: compressed, or damaged after {len(samples)} samples ({error})")
    rows = []
    for (_, key), files in samples.items():
        images = sorted(common.EXTENSIONS & files.keys())
        if images and ".txt" in files:
            rows.append((*files[images[0]], *files[".txt"]))
        else:
            wrong.append(f"{path}: expected {key}.jpg and {key}.txt, found {key}{[*files]}")
    return torch.tensor(rows, dtype=torch.long).view(-1, 4), wrong


def open_shards(paths, part, config, world):
    """Return Pairs of tar shards, whose samples are read where they are."""
    places = []
    wrong = []
    for samples, problems in common.make_loader(tar_samples, paths, config, world):
        places.append(F.pad(samples, (1, 0), value=len(places)))
        wrong += problems
    places = torch.cat(places).numpy()
    if not places.size:
        fail(f"no image with a caption in {paths[0].parent}: {'; '.join(wrong[:3])}")
    texts = Texts(paths, places[:, [0, 3, 4]])
    split = unlabelled(Ranges(paths, places[:, :3]), range(len(places)), texts, part)
    split.count_bad(wrong)
    return split


def read_json(path):
    """Read COCO's captions_*.json or Karpathy's dataset_*.json: (image's file, caption, part)."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if "annotations" in content:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        return [(names[a["image_id"]], a["caption"], "") for a in content["annotations"]]
    rows = []
    for image in content["images"]:
        name = os.path.join(image.get("filepath", ""), image["filename"])
        part = image["split"].replace("restval", "train")
        rows += [(name, sentence["raw"], part) for sentence in image["sentences"]]
    return rows


def read_table(path, columns):
    """Read a csv or tsv with a header: (image's file, caption, ""). columns: "FILE,CAPTION"."""
    image, caption = columns.split(",")
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        table = csv.DictReader(file, delimiter=delimiter)
        return [(row[image], row[caption], "") for row in table]


def as_val(path):
    """Return the path with val for train in its name, if there is such a file or folder."""
    other = path.with_name(path.name.replace("train", "val"))
    return other if other.exists() else path


def open_captions(path, part, config):
    """Return the train or val Pairs of a captions file; exit 2 if there are none."""
    try:
        rows = read_json(path) if path.suffix == ".json" else read_table(path, config.columns)
    except (LookupError, TypeError, ValueError, csv.Error) as error:
        known = f"COCO's, Karpathy's, or a csv or tsv with --columns {config.columns}"
        fail(f"{path} is no captions file such as {known}: {error!r}")
    parts = {row[2] for row in rows} - {"train"}
    wanted = "train" if part == "train" else min(parts, default="")  # test, else val
    rows = [row for row in rows if row[2] in ("", wanted)]
    captions = defaultdict(list)
    for image, caption, _ in rows:
        if image and caption:
            captions[image].append(caption)
    lost = len(rows) - sum(map(len, captions.values()))
    if lost:
        note(f"{path}: {lost} {part} pairs are left out, since they lack an image or a caption")
    root = locate(config.images) if config.images else path.parent
    if part == "val":
        root = as_val(root)
    images = [root / image for image in captions]
    if not any(image.is_file() for image in images[:100]):
        advice = "--images is the folder that the names are relative to; download what is a link"
        fail(f"{path} has no captions for {part}, or no images at {root}: {advice}")
    return unlabelled(images, list(captions), list(captions.values()), part)


def class_captions(classes, config):
    """Return the captions of each class: all prompts, with its name or its --class-names."""
    names = [name.replace("_", " ") for name in classes]
    if config.class_names:
        names = json.loads(Path(config.class_names).read_text())
    if len(names) != len(classes):
        fail(f"{config.class_names} has {len(names)} names, the data has {len(classes)} classes")
    data = f"{config.data} {config.val_data}"
    prompts = (IMAGENET_PROMPTS if "imagenet" in data else CIFAR10_PROMPTS).splitlines()
    prompts = dict.fromkeys([*prompts, *(prompt.replace("the ", "a ") for prompt in prompts)])
    captions = []
    for name in names:
        synonyms = [name] if isinstance(name, str) else name
        captions.append([prompt.format(word) for word in synonyms for prompt in prompts])
    return captions


def open_pairs(config, part, world):
    """Return the `train` or `val` Pairs of --data or --val-data; None where there is no val."""
    derived = part == "val" and not config.val_data  # the val part of --data
    data = config.val_data if part == "val" and not derived else config.data
    if data == "toy":
        return toy_world(part)[0]
    root = locate(data)
    if not root.exists() and data != "cifar10":
        fail(f"no data at {root}: expected {FORMATS}")
    shards = sorted(root.glob("[!.]*.tar"))
    if root.is_file() and tarfile.is_tarfile(root):
        shards = [root]
    if shards:
        return None if derived else open_shards(shards, part, config, world)
    if root.is_file():
        path = as_val(root) if derived else root
        if derived and path == root and '"split"' not in root.read_text():
            return None
        return open_captions(path, part, config)
    split = common.open_split(data, part)
    if split is None:
        return None
    if not split.classes:
        fail(f"{data} has images without captions: expected {FORMATS}")
    texts = class_captions(split.classes, config)
    captions = [texts[label] for label in split.labels.tolist()]
    return Pairs(**vars(split), captions=captions, centred=part == "val")


# --------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------


def schedules(config, step, steps):
    """Return the learning rate of step 0, 1, ...: --lr at the end of the warm-up, then a cosine."""
    warmup = int(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return common.cosine_schedule(step - warmup, steps - warmup, config.lr, 0.0)


def make_optimizer(model, config):
    """Return AdamW. Groups: decayed, undecayed, and the loss's scale and bias."""
    groups = common.parameter_groups(model)
    for group in groups:
        group["params"] = [p for p in group["params"] if p.numel() > 1]
    logits = [p for p in model.parameters() if p.numel() == 1]  # no other is a single number
    groups.append({"decay": False, "params": logits})
    beta2 = 0.95 if config.model == "llip" else 0.98
    return torch.optim.AdamW(groups, betas=(0.9, beta2), eps=1e-6, fused=True)


def train(model, tokenizer, split, config, world):
    """Train a model on Pairs. Returns the run; its last.pt holds the result."""
    network = common.distribute(model, world, config)  # DDP hides the parts that `model` has
    optimizer = make_optimizer(model, config)
    run = common.Run(config, world, split, network, optimizer, tokenizer=tokenizer)
    make = functools.partial(make_batch, split, tokenizer, config, world)
    loader = common.make_loader(make, range(run.step, run.steps), config, world)
    for step in run:
        lr = schedules(config, step, run.steps)
        common.set_rates(optimizer, lr, config.weight_decay)
        optimizer.param_groups[-1]["lr"] = lr if config.paper_logits else 10 * lr
        pixels, tokens = run.next(loader, split)
        with world.autocast():
            loss = network(clip_range(common.normalize(pixels)), tokens)
        run.backward(loss)
        run.update()
        scale = model.logit_scale.detach()
        scale.clamp_(0, math.log(100))
        run.log(lr=lr, logit_scale=scale.full_tensor() if config.shard else scale)
    return run


# --------------------------------------------------------------------------------------------------
# Evaluate
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_texts(model, tokenizer, captions, world):
    """Return the text of captions, float32 [T, 2, D], or [T, 1, D] of a baseline."""
    parts = []
    for tokens in tokenizer(captions).split(256):
        with world.autocast():
            parts.append(model.text(tokens.to(world.device)).float())
    return torch.cat(parts)


def score(model, text, images):
    """Return the cosine of each image [B, 3, S, S] with each text of `encode_texts`: [B, T]."""
    image = model.image(clip_range(images)).float()
    with torch.autocast(image.device.type, enabled=False):
        if not isinstance(model, Llip):
            return F.normalize(image, dim=1) @ F.normalize(text[:, 0], dim=1).T
        parts = text.split(max(1, pairs_in_tile(image, text) // len(image)))
        scores = [pair_scores(image, part, model.out_proj, model.tau) for part in parts]
        return torch.cat(scores, dim=1)


def mean_of_prompts(text):
    """Pool the prompts of a class: [P, 2 or 1, D] -> [2 or 1, D].

    As in the released evaluation, queries are averaged as they are, z' normalised before.
    """
    z = F.normalize(text[:, -1], dim=1).mean(0)
    z = F.normalize(z, dim=0)[None]
    return torch.cat([text[:, :-1].mean(0), z])


def recall(scores, true, name, numbers):
    """Return in how many rows of scores [N, T] a true entry is among the first 1, 5, ..., in %."""
    best = scores.masked_fill(~true, -math.inf).amax(1, keepdim=True)
    ranks = (scores > best).sum(1)
    return {f"{name}{k}": 100 * (ranks < k).float().mean().item() for k in numbers}


def retrieval(scores, true):
    """Return recall both ways, and the spread over an image's captions, in percent.

    scores [N, T]; true: which captions belong to an image. The best own caption of an image counts.
    Spread: standard deviation of the scores of an image's own captions, mean over images.
    """
    of_images = recall(scores, true, "i2t R@", (1, 5, 10))
    of_texts = recall(scores.T, true.T, "t2i R@", (1, 5, 10))
    spreads = [row[own].std(correction=0) for row, own in zip(scores, true, strict=True)]
    return {**of_images, **of_texts, "spread": 100 * torch.stack(spreads).nanmean().item()}


def evaluate_retrieval(model, tokenizer, split, config, world):
    """Measure `retrieval` among the first 5,000 images. One that can't be read counts as missed."""
    split = replace(split, names=split.names[:5000])
    captions = [split.captions[i] for i in range(len(split))]
    text = encode_texts(model, tokenizer, sum(captions, []), world)
    read = functools.partial(score, model, text)
    scores, _, names = common.extract(read, split, config, world)
    if world.rank:
        return {}
    owners = np.repeat(split.names, [len(texts) for texts in captions])
    true = torch.from_numpy(np.array(names)[:, None] == owners)
    return retrieval(scores, true.to(world.device))


def evaluate_zeroshot(model, tokenizer, split, config, world):
    """Classify by one text for each class."""
    texts = []
    for captions in class_captions(split.classes, config):
        texts.append(mean_of_prompts(encode_texts(model, tokenizer, captions, world)))
    read = functools.partial(score, model, torch.stack(texts))
    scores, labels, _ = common.extract(read, split, config, world)
    if world.rank:
        return {}
    true = F.one_hot(labels, len(texts)).bool()
    return recall(scores, true, "top", (1, 5))


def evaluate_kinds(model, tokenizer, split, config, world):
    """Return zero-shot accuracy on the toy by kind of caption, in percent.

    A fact of a scene is found if it scores above all facts of its kind that are false of the scene.
    """
    results = {}
    scenes = toy_world("val")[1]
    for kind in scenes[0]:
        facts = [scene[kind] for scene in scenes]
        captions = sorted({fact for scene in facts for fact in scene})
        text = encode_texts(model, tokenizer, captions, world)
        read = functools.partial(score, model, text)
        scores, _, _ = common.extract(read, split, config, world)
        if world.rank == 0:
            true = [[caption in scene for caption in captions] for scene in facts]
            true = torch.tensor(true, device=world.device)
            best = scores.masked_fill(true, -math.inf).amax(1, keepdim=True)  # of what is false
            results[kind] = 100 * (scores > best)[true].float().mean().item()
    return results


EVALUATIONS = {
    "kinds": evaluate_kinds,
    "zeroshot": evaluate_zeroshot,
    "retrieval": evaluate_retrieval,
}


def evaluate(model, tokenizer, val, wanted, config, world, run):
    """Run the evaluations `wanted` on the model, and beside it on a random one.

    "mean token" mixes all tokens alike: what the caption's choice is worth.
    """
    columns = {"trained": model}
    columns["random"] = build(config, tokenizer.start + 2).to(world.device).eval()
    if config.model == "llip":
        columns["mean token"] = copy.copy(model)
        columns["mean token"].tau = 1e9
    results = {}
    for column, network in columns.items():
        results[column] = {}
        for name in wanted:
            results[column].update(EVALUATIONS[name](network, tokenizer, val, config, world))
    run.report(results)


def describe(model, images):
    """Return features of no caption, [B, D]: a search's first shortlist, which `score` orders."""
    image = model.image(clip_range(images))
    if isinstance(model, Llip):  # the mean of the values
        image = image[:, 1].mean(2).flatten(1) @ model.out_proj
    return F.normalize(image, dim=1)


# --------------------------------------------------------------------------------------------------
# Picture
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_picture(model, tokenizer, split, config, world, run):
    """Show what different captions of one image look at.

    Bright is where the tokens that the caption takes look in the last block, relative to the mean
    over captions.
    """
    captions = split.captions[0][:6]
    _, pixels, _ = common.centre_crops(split, config.image_size, [0])
    image = common.normalize(pixels.to(world.device))  # [1, 3, S, S]
    *blocks, last = model.visual.transformer.resblocks
    x = model.visual.embed(clip_range(image))
    for block in blocks:
        x = block(x)
    x = last.ln_1(x)
    tokens = len(model.visual.class_embedding)
    maps = last.attn(x[:, :tokens], x, x)[1][0, :, tokens:]  # mean over heads, [K, P]
    if config.model == "llip":
        q = encode_texts(model, tokenizer, captions, world)[:, 0]
        k = model.image(clip_range(image))[:, 0]
        weights = mixing_weights(k, q.unflatten(1, (model.heads, -1)), model.tau)
        maps = weights[:, 0].mean(0).T @ maps  # [T, P]
        maps = maps / maps.mean(0)
    side = math.isqrt(maps.shape[1])
    maps = (maps / maps.amax(1, keepdim=True)).view(-1, 1, side, side)
    seen = F.interpolate(maps, image.shape[2:], mode="bilinear")
    image = image + 2.0  # black is about 0
    path = run.out / "picture.png"
    common.save_picture(path, torch.cat([image, image * seen])[None] - 2.0, tile=192)
    page = Image.open(path)
    draw = ImageDraw.Draw(page)
    for column, caption in enumerate(captions):
        draw.text((200 * column + 206, 6), re.sub(r"(.{1,30})(\s|$)", r"\1\n", caption), "white")
    page.save(path)
    note(f"{path}: what captions of one image look at")


# --------------------------------------------------------------------------------------------------
# Weights: ours, Llip's, and in CLIP's layout
# --------------------------------------------------------------------------------------------------

MODEL = (
    "model image_size patch width depth heads hidden mixture_tokens text_width text_depth "
    "text_heads context embedding mix_heads mix_norm tau quick_gelu vocabulary merges"
).split()


def read_weights(path, typed=()):
    """Read a checkpoint: its state dict `model`, `fields` of Config, and `merges` if it is ours.

    Ours; Llip's; those of OpenAI, OpenCLIP and MetaCLIP as state dicts. What shapes don't tell
    (heads, tau) is as in the released models, unless the flag was `typed`.
    """
    state = common.load_checkpoint(path, "llip")
    if "script" in state:
        text = bytes(state["tokenizer"]["text"].tolist()).decode()
        own = {name: state["config"][name] for name in MODEL}
        return {"model": state["model"], "fields": own, "merges": text.splitlines()}
    weights = state.get("state_dict", state)
    if "visual.conv1.weight" not in weights:
        common.refuse(path, "Llip or CLIP: expected visual.conv1.weight", state)
    for name in list(weights):
        value = weights.pop(name)
        if value.is_floating_point():  # OpenAI's files also hold whole numbers
            weights[name.removeprefix("pred.")] = torch.atleast_1d(value.float())
    width, _, patch, _ = weights["visual.conv1.weight"].shape
    tokens = weights["visual.class_embedding"].view(-1, width)
    weights["visual.class_embedding"] = tokens
    baseline = "siglip" if "logit_bias" in weights else "clip"
    text_width, embedding = weights["text_projection"].shape
    positions = weights["visual.positional_embedding"]
    blocks = Counter(name.split("resblocks")[0] for name in weights if "ln_1.weight" in name)
    found = {
        "model": "llip" if "k_proj" in weights else baseline,
        "image_size": patch * math.isqrt(len(positions) - len(tokens)),
        "patch": patch,
        "width": width,
        "depth": blocks["visual.transformer."],
        "hidden": len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "mixture_tokens": len(tokens),
        "text_width": text_width,
        "text_depth": blocks["transformer."],
        "context": len(weights["positional_embedding"]),
        "embedding": embedding,
        "mix_norm": "K_norm.weight" in weights,
    }
    # no shape tells these
    released = {"heads": min(16, width // 64), "text_heads": text_width // 64, "mix_heads": 8}
    released["tau"] = 1.0 if width == 1024 else 5.0
    released = {name: value for name, value in released.items() if name not in typed}
    if 0 in released.values():
        fail(f"{path} cannot tell its heads: add --heads, --text-heads, --mix-heads and --tau")
    found.update(released)
    return {"model": weights, "fields": found}


def load_weights(model, weights, path):
    """Put what `read_weights` found into a model. Positions are interpolated to its image size."""
    state = dict(weights["model"])
    tokens = len(model.visual.class_embedding)
    side = math.isqrt(len(model.visual.positional_embedding) - tokens)
    table = state["visual.positional_embedding"]
    patches = common.interpolate_positions(table[None, tokens:], (side, side))[0]
    state["visual.positional_embedding"] = torch.cat([table[:tokens], patches])
    common.load_state(model, state, path)


# --------------------------------------------------------------------------------------------------
# Prompts, presets and main
# --------------------------------------------------------------------------------------------------


# one a line; each is also used with "a" for "the"
CIFAR10_PROMPTS = """\
a photo of the {}
a blurry photo of the {}
a black and white photo of the {}
a low contrast photo of the {}
a high contrast photo of the {}
a bad photo of the {}
a good photo of the {}
a photo of the small {}
a photo of the big {}"""
IMAGENET_PROMPTS = """\
a bad photo of the {}.
a low resolution photo of the {}.
a cropped photo of the {}.
a bright photo of the {}.
a dark photo of the {}.
a close-up photo of the {}.
a black and white photo of the {}.
a pixelated photo of the {}.
a jpeg corrupted photo of the {}.
a blurry photo of the {}.
a good photo of the {}.
a photo of the {}.
a photo of the cool {}.
a photo of the dirty {}.
a photo of the clean {}.
a photo of the large {}.
a photo of the nice {}.
a photo of the weird {}.
a photo of the small {}.
a photo of the hard to see {}.
a rendering of the {}.
a tattoo of the {}.
a drawing of the {}.
a painting of the {}.
a sculpture of the {}.
a rendition of the {}.
a doodle of the {}.
a sketch of the {}.
the origami {}.
the toy {}.
the plastic {}.
the embroidered {}.
the cartoon {}.
the plushie {}.
art of the {}.
graffiti of the {}.
itap of the {}.
the {} in a video game.
a photo of many {}.
a photo of my {}.
a photo of one {}.
itap of my {}."""

FOLDER = {  # any captions or class folders, ViT-S/16, one GPU
    "data": "folder",
    "image_size": 224,
    "patch": 16,
    "width": 384,
    "depth": 12,
    "heads": 6,
    "mixture_tokens": 32,
    "text_width": 256,
    "text_depth": 6,
    "text_heads": 4,
    "context": 77,
    "embedding": 256,
    "mix_heads": 8,
    "tau": 5.0,
    "merges": 2000,
    "crop_scale": (0.5, 1.0),
    "batch": 256,
    "epochs": 30,
    "lr": 5e-4,
    "weight_decay": 0.2,
    "eval": "zeroshot,retrieval",
    "workers": 12,
}
PAPER = {
    **FOLDER,
    "width": 768,
    "heads": 12,
    "mixture_tokens": 64,
    "text_width": 512,
    "text_depth": 12,
    "text_heads": 8,
    "embedding": 512,
    "vocabulary": "bpe_simple_vocab_16e6.txt.gz",
    "paper_logits": True,
    "crop_scale": (0.9, 1.0),
    "batch": 32768,
    "steps": 390656,
    "warmup": 2000 / 390656,
}
LARGE = {
    **PAPER,
    "patch": 14,
    "width": 1024,
    "depth": 24,
    "heads": 16,
    "text_width": 768,
    "text_heads": 12,
    "embedding": 768,
    "tau": 1.0,
    "lr": 4e-4,
}
HUGE = {
    **LARGE,
    "width": 1280,
    "depth": 32,
    "text_width": 1024,
    "text_depth": 24,
    "text_heads": 16,
    "embedding": 1024,
    "mix_norm": True,
    "tau": 5.0,
    "recompute": True,
}
GIANT = {
    **HUGE,
    "width": 1664,
    "depth": 48,
    "hidden": 8192,
    "text_width": 1280,
    "text_depth": 32,
    "text_heads": 20,
    "embedding": 1280,
}
CIFAR10 = {
    "data": "cifar10",
    "patch": 4,
    "width": 192,
    "depth": 9,
    "heads": 3,
    "mixture_tokens": 16,
    "text_width": 128,
    "embedding": 128,
    "tau": 6.0,
    "context": 24,
    "crop_scale": (0.5, 1.0),
    "flip": True,
    "batch": 1024,
    "epochs": 100,
    "lr": 1e-3,
    "eval": "zeroshot",
    "workers": 8,
}

PRESETS = {
    "toy": {"steps": 3000, "precision": "fp32", "workers": 1},
    "cifar10-cpu": {
        **CIFAR10,
        "patch": 8,
        "width": 96,
        "depth": 4,
        "mixture_tokens": 8,
        "text_width": 64,
        "embedding": 64,
        "tau": 4.0,
        "batch": 256,
        "steps": 3000,
        "workers": 1,
    },
    "cifar10": CIFAR10,  # one GPU
    "folder": FOLDER,
    "vit_b32": {**PAPER, "patch": 32},
    "vit_b16": {**PAPER, "mixture_tokens": 32},
    "vit_l14": {**LARGE, "mixture_tokens": 32, "context": 64},
    "vit_l14_k64": LARGE,
    "vit_h14": HUGE,
    "vit_g14": GIANT,
}
DATA_PRESETS = {"toy": "toy", "cifar10": "cifar10", "*": "folder"}


def check(config, world):
    """Refuse what would fail late or silently (exit 2)."""
    common.check(config, world, (*EVALUATIONS, "features"))
    c = config
    for width, heads in (
        (c.width, c.heads),
        (c.text_width, c.text_heads),
        (c.embedding, c.mix_heads),
    ):
        if width % heads:
            fail(f"a width of {width} must be a multiple of its heads, {heads}: see --heads")
    if c.train and c.batch < 2:
        fail("--batch 1 has no negatives")


def make_tokenizer(config, merges, split):
    """Return the Tokenizer of the weights' merges, of --vocabulary, or of the split's captions.

    Reads the captions of at most 20,000 images, and says how many are cut.
    """
    rows = range(0, len(split), 1 + len(split) // 20000)
    captions = {caption for i in rows for caption in split.captions[i]}
    if merges is None:
        if config.vocabulary:
            merges = read_merges(config.vocabulary)
        elif config.init:
            fail(f"{config.init} has no vocabulary: add --vocabulary bpe_simple_vocab_16e6.txt.gz")
        else:
            merges = learn_merges(captions, config.merges)
    tokenizer = Tokenizer(merges, config.context)
    cut = sum(len(tokenizer.encode(caption)) > config.context - 2 for caption in captions)
    if cut:
        note(f"{cut} of {len(captions)} captions read are cut to --context {config.context} tokens")
    return tokenizer


@common.command_line
def main(argv=None):
    """Train and evaluate; see --help."""
    config, typed = common.parse_config(Config, PRESETS, DATA_PRESETS, argv)
    merges = None
    if config.init:
        weights = read_weights(config.init, typed)
        config = common.adopt(config, weights["fields"], typed, config.init)
        merges = weights.get("merges")
    world = common.start_world(config.device, config.precision)
    check(config, world)
    val = open_pairs(config, "val", world)
    split = open_pairs(config, "train", world) if config.train or not val else None
    wanted = set(config.eval.split(","))
    possible = {"features", "none"}
    if val:
        possible.add("zeroshot" if val.classes else "retrieval")
    if (config.val_data or config.data) == "toy":
        possible.add("kinds")
    skipped = wanted - possible
    if skipped:
        note(f"{', '.join(sorted(skipped))}: skipped, since the val data cannot answer that")
    tokenizer = make_tokenizer(config, merges, split or val)
    model = build(config, tokenizer.start + 2)
    if config.init:
        load_weights(model, weights, config.init)
    if config.train:
        run = train(model, tokenizer, split, config, world)
        # what is evaluated is what was saved, in a model that is neither wrapped nor sharded
        model = build(config, tokenizer.start + 2)
        load_weights(model, read_weights(run.out / "last.pt"), run.out / "last.pt")
    else:
        run = common.Run(config, world)
    model.to(world.device).eval()
    shown = val or replace(split, centred=True)
    if config.train and world.rank == 0:
        draw_picture(model, tokenizer, shown, config, world, run)
    if "features" in wanted:
        read = functools.partial(describe, model)
        common.write_features(read, shown, config, world, run)
    evaluations = [name for name in EVALUATIONS if name in wanted & possible]
    if evaluations:
        evaluate(model, tokenizer, val, evaluations, config, world, run)


if __name__ == "__main__":
    main()
