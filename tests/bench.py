"""Training speed and memory of each script's step, beside a plain implementation of the same step, on this machine.

    python tests/bench.py                 # every script, a table in Markdown
    python tests/bench.py ijepa --steps 20 --width 192
    python tests/bench.py --decode DIR    # images read a second and core

Both run in processes of their own, one after the other, twice in turn; speeds are the better of the two, since other
load only slows. The share of peak counts the model's multiply-adds only (masks, optimizer, augmentation and everything
element-wise count as nothing), over the speed of a large matrix product of the same type measured in the same run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reference import reference_masks  # noqa: E402

import common  # noqa: E402
import ijepa  # noqa: E402


def matmul_peak(dtype, device, seconds=2.0):
    """FLOP/s of square matrix products of this type, the best of several."""
    a = torch.randn(2048 if device.type == "cpu" else 8192, 2048, device=device, dtype=dtype)
    b = a.T.contiguous()
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.monotonic()
        for _ in range(3):
            (a @ b)[0, 0].item()
        best = max(best, 3 * 2 * a.shape[0] ** 2 * a.shape[1] / (time.monotonic() - begin))
    return best


def block_work(tokens, width, queries=None):
    """Multiply-adds of a forward pass through a transformer block; with queries only so many tokens are computed."""
    q = tokens if queries is None else queries
    return (2 * tokens + 10 * q) * width**2 + 2 * q * tokens * width


def ijepa_work(config, context, target):
    """FLOPs an image of an I-JEPA step: target encoder forward; what is trained forward and backward (twice that)."""
    c, pixels = config, 3 * config.patch**2
    n, p = (c.image_size // c.patch) ** 2, c.predictor_width
    encoder = context * pixels * c.width + c.depth * block_work(context, c.width)
    predictor = context * c.width * p + c.targets * (
        (c.predictor_depth - 1) * block_work(context + target, p)
        + block_work(context + target, p, target)
        + target * c.width * p
    )
    return 2 * (3 * (encoder + predictor) + n * pixels * c.width + c.depth * block_work(n, c.width))


def explicit_attention(q, k, v):
    """Softmax attention written out: the scores of all pairs are held in memory."""
    scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).float().softmax(dim=-1)
    return scores.to(v.dtype) @ v


def plain_ijepa(config, steps):
    """The straightforward step: whatever `ijepa.py` does differently to be faster, the obvious way. Prints JSON."""
    torch.manual_seed(0)
    F.scaled_dot_product_attention = explicit_attention
    model, target = ijepa.build(config)
    encoder, predictor = model.encoder, model.predictor
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)
    images = torch.randint(0, 256, (max(512, config.batch), 3, config.image_size, config.image_size), dtype=torch.uint8)

    def take(x, masks):
        """Gather with an index as large as what is gathered, one mask after the other."""
        return torch.cat([x.gather(1, m[:, :, None].expand(-1, -1, x.shape[-1])) for m in masks])

    speeds, rows = [], []
    for step in range(steps):
        begin = time.monotonic()
        batch = ijepa.normalize(images[torch.randint(len(images), (config.batch,))])
        masks_context, masks_target = reference_masks(config, step, config.batch)
        with torch.no_grad():
            h = F.layer_norm(target(batch), (config.width,))
            h = take(h, masks_target)
        x = encoder.patch_embed.proj(batch).flatten(2).transpose(1, 2) + encoder.pos_embed
        x = take(x, masks_context)
        for block in encoder.blocks:
            x = block(x)
        x = encoder.norm(x)
        positions = predictor.predictor_pos_embed.repeat(config.batch, 1, 1)
        x = (predictor.predictor_embed(x) + take(positions, masks_context)).repeat(len(masks_target), 1, 1)
        queries = predictor.mask_token + take(positions, masks_target)
        x = torch.cat([x, queries], dim=1)
        for block in predictor.predictor_blocks:
            x = block(x)
        z = predictor.predictor_proj(predictor.predictor_norm(x)[:, masks_context.shape[-1] :])
        loss = F.smooth_l1_loss(z, h)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(target.parameters(), encoder.parameters(), strict=True):
                ours.mul_(0.996).add_(theirs * 0.004)
        loss.item()
        speeds.append(config.batch / (time.monotonic() - begin))
        rows.append((masks_context.shape[-1], masks_target.shape[-1]))
    half = sorted(speeds[steps // 3 :])
    print(json.dumps(dict(speed=half[len(half) // 2], memory=common.memory_gib(torch.device("cpu")), masks=rows)))


def ours_ijepa(flags, steps):
    """`ijepa.py` as users run it, from the command line: speed and memory from its own log."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, ROOT / "ijepa.py", *flags, "--steps", steps, "--log-every", max(1, steps // 6)]
        command += ["--eval", "none", "--save-every", 10**9, "--out", out]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "images_per_s" in row][2:]
    return dict(
        speed=sorted(row["images_per_s"] for row in rows)[len(rows) // 2],
        memory=rows[-1]["memory_gib"],
        masks=[(row["context"], row["target"]) for row in rows],
        data_wait=sum(row["data_wait"] for row in rows) / len(rows),
    )


def bench_ijepa(flags, steps):
    """Rows (name, images/s, GiB, share of peak) of ijepa.py and of the plain step, and what was run."""
    flags = [*flags, "--masks", "official", "--min-keep", "3"]  # the plain sampler makes official masks
    config = common.parse_config(ijepa.Config, ijepa.PRESETS, ijepa.DATA_PRESETS, flags)
    device = common.start_world(config.device).device
    dtype = common.choose_precision(config.precision, device)
    found = {"ours": [], "plain": []}
    for _ in range(2):
        found["ours"].append(ours_ijepa(flags, steps))
        plain = [sys.executable, __file__, "ijepa", "--plain", "--steps", str(max(6, steps // 3)), *flags]
        found["plain"].append(json.loads(subprocess.run(plain, check=True, capture_output=True, text=True).stdout))
    peak = {"ours": matmul_peak(dtype, device), "plain": matmul_peak(torch.float32, device)}
    rows = []
    for name, runs in found.items():
        best = max(runs, key=lambda run: run["speed"])
        work = sum(ijepa_work(config, *pair) for pair in best["masks"]) / len(best["masks"])
        rows.append((name, best["speed"], best["memory"], work * best["speed"] / peak[name]))
    c = config
    what = (
        f"encoder {c.width}x{c.depth}, predictor {c.predictor_width}x{c.predictor_depth}, patch {c.patch} on "
        f"{c.image_size}x{c.image_size}, batch {c.batch}, {str(dtype)[6:]} on {device.type}, "
        f"{torch.get_num_threads()} threads, matmul peak {peak['ours'] / 1e9:.0f} GFLOP/s, "
        f"data_wait {100 * found['ours'][0]['data_wait']:.1f} %"
    )
    return what, rows


TINY = "--image-size 32 --width 192 --depth 12 --heads 3 --predictor-width 96 --predictor-depth 6 --batch 128"


def bench_decode(folder):
    """Images/s of one core: `ijepa.decode` (draft, one resize of the crop) and a full decode with a float pipeline."""
    torch.set_num_threads(1)
    paths = [p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in ijepa.EXTENSIONS]

    def plain(path, box):
        with Image.open(path) as image:
            image = image.convert("RGB")
            top, left, height, width = box(*image.size)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, top : top + height, left : left + width]
        pixels = F.interpolate(pixels[None] / 255, (224, 224), mode="bilinear", antialias=True, align_corners=False)
        return (pixels - torch.tensor(ijepa.MEAN)[:, None, None]) / torch.tensor(ijepa.STD)[:, None, None]

    speeds = {}
    for name, read in (("ours", lambda path, box: ijepa.decode(path, box, (224, 224))), ("plain", plain)) * 2:
        begin = time.monotonic()
        for i, path in enumerate(paths):
            read(path, lambda w, h, i=i: ijepa.random_crop(w, h, (0.3, 1.0), common.generator("bench", i)))
        speeds[name] = max(speeds.get(name, 0.0), len(paths) / (time.monotonic() - begin))
    print(f"{len(paths)} images, one core, crops to 224: " + ", ".join(f"{k} {v:.0f}/s" for k, v in speeds.items()))


SHAPES = {"toy": ["--preset", "toy"], "tiny": ["--data", "toy", *TINY.split()]}


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", nargs="?", default="ijepa", choices=["ijepa"])
    parser.add_argument("--decode", help="a folder of images: measure only how fast they are read")
    parser.add_argument("--steps", type=int, default=18, help="steps of each measurement")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.plain:
        config = common.parse_config(ijepa.Config, ijepa.PRESETS, ijepa.DATA_PRESETS, flags)
        plain_ijepa(config, args.steps)
        return
    if args.decode:
        bench_decode(args.decode)
        return
    for name, shape in SHAPES.items() if not flags else {"given": flags}.items():
        what, rows = bench_ijepa(shape, args.steps)
        ratio = rows[0][1] / rows[1][1]
        print(f"\nijepa.py, {name}: {what}\n")
        print("| step | images/s | peak memory, GiB | share of matmul peak |\n|---|---|---|---|")
        for row in rows:
            print(f"| {row[0]} | {row[1]:.0f} | {row[2]:.2f} | {100 * row[3]:.0f} % |")
        print(f"\n{ratio:.2f} times the plain step", flush=True)


if __name__ == "__main__":
    main()
