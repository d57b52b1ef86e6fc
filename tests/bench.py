"""Training speed and memory of each script's step, beside a plain implementation of the same step, on this machine.

    python tests/bench.py                 # every script, a table in Markdown
    python tests/bench.py ijepa msn --steps 20 --width 192
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
from PIL import Image, ImageEnhance, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reference import reference_masks  # noqa: E402

import common  # noqa: E402
import ijepa  # noqa: E402
import msn  # noqa: E402
import pmsn  # noqa: E402


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


def ours(name, flags, steps):
    """A script as users run it, from the command line: speed and memory from its own log."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, ROOT / f"{name}.py", *flags, "--steps", steps, "--log-every", max(1, steps // 6)]
        command += ["--eval", "none", "--save-every", 10**9, "--out", out]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "images_per_s" in row][2:]
    return dict(
        speed=sorted(row["images_per_s"] for row in rows)[len(rows) // 2],
        memory=rows[-1]["memory_gib"],
        masks=[(row["context"], row["target"]) for row in rows if "context" in row],
        data_wait=sum(row["data_wait"] for row in rows) / len(rows),
    )


def msn_work(config):
    """FLOPs an image of an MSN step: target network forward; random anchors' kept patches and focal views trained."""
    c, pixels = config, 3 * config.patch**2
    patches = (c.image_size // c.patch) ** 2
    focal = (c.focal_size // c.patch) ** 2

    def view(tokens):
        head = c.width * c.head_hidden + c.head_hidden**2 + c.head_hidden * c.embedding
        return tokens * pixels * c.width + c.depth * block_work(tokens + 1, c.width) + head

    anchors = c.random_views * view(msn.kept_patches(patches, c.drop)) + c.focal_views * view(focal)
    return 2 * (3 * anchors + view(patches))


def pil_view(image, config, size, scale, random):
    """One view of a PIL image, as the usual pipeline makes it: crop, flip, jitter, grey, blur, tensor, normalise."""
    c = config
    top, left, h, w = ijepa.random_crop(*image.size, scale)
    image = image.resize((size, size), Image.BILINEAR, box=(left, top, left + w, top + h))
    if c.flip and random.random() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    if random.random() < c.jitter_share:
        for operation in random.permutation(4):
            factor = 1 + 0.8 * c.jitter * random.uniform(-1, 1)
            if operation < 3:
                kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation]
                image = kind(image).enhance(factor)
            else:
                h, s, v = image.convert("HSV").split()
                shift = int(255 * 0.2 * c.jitter * random.uniform(-1, 1))
                h = Image.fromarray(((np.array(h, dtype=np.int16) + shift) % 256).astype(np.uint8))
                image = Image.merge("HSV", (h, s, v)).convert("RGB")
    if random.random() < c.grey:
        image = image.convert("L").convert("RGB")
    if random.random() < c.blur:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(*c.blur_sigma)))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(msn.MEAN)[:, None, None]) / torch.tensor(msn.STD)[:, None, None]


def plain_msn(module, config, steps):
    """The straightforward step of msn.py and pmsn.py: views one by one with PIL, encoder one view after the other."""
    torch.manual_seed(0)
    F.scaled_dot_product_attention = explicit_attention
    c, random = config, np.random.default_rng(0)
    model, target = module.build(c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)
    side = c.image_size
    images = [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(512)]
    kinds = [(c.image_size, c.random_scale)] * (1 + c.random_views) + [(c.focal_size, c.focal_scale)] * c.focal_views
    speeds = []
    for _ in range(steps):
        begin = time.monotonic()
        chosen = [images[i] for i in random.integers(0, len(images), c.batch)]
        views = [torch.stack([pil_view(x, c, *kind, random) for x in chosen]) for kind in kinds]
        with torch.no_grad():
            h = target(views[0])
        patches = (c.image_size // c.patch) ** 2
        keep = torch.randperm(patches)[: msn.kept_patches(patches, c.drop)].expand(c.batch, -1)
        z = [model.network(x, keep if i < c.random_views else None) for i, x in enumerate(views[1:])]
        q = F.normalize(model.prototypes, dim=1)
        p = torch.cat([(F.normalize(x, dim=1) @ q.T / c.temperature).softmax(1) for x in z])
        with torch.no_grad():
            t = (F.normalize(h, dim=1) @ q.T / c.temperature).softmax(1) ** (1 / c.sharpen)
            t = (t / t.sum(1, keepdim=True)).repeat(len(z), 1)
        mean = p.mean(0)
        loss = torch.mean(-(t * p.log()).sum(1)) + c.weight * (mean * mean.log()).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.network.parameters(), c.clip, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(target.parameters(), model.network.parameters(), strict=True):
                ours.mul_(0.996).add_(theirs * 0.004)
        loss.item()
        speeds.append(c.batch / (time.monotonic() - begin))
    half = sorted(speeds[steps // 3 :])
    print(json.dumps(dict(speed=half[len(half) // 2], memory=common.memory_gib(torch.device("cpu")), masks=[])))


def bench_views(module, config, seconds=4.0):
    """Images/s whose views are made, nothing else, on one thread: batched as `module` does, and one by one with PIL."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone, random = common.World(0, 1, torch.device("cpu")), np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (512, 3, config.image_size, config.image_size), dtype=np.uint8))
    split = module.in_memory(pixels, torch.zeros(512).long(), [""] * 512, ["any"])
    groups = module.view_groups(config)
    views = module.Views(split, config, alone, config.batch, groups)
    images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels[: config.batch]]
    kinds = [(size, scale) for count, size, scale in groups for _ in range(count)]
    ways = {
        "ours": lambda step: module.make_views(views[step], pixels, groups, alone.device),
        "PIL": lambda step: [torch.stack([pil_view(x, config, *kind, random) for x in images]) for kind in kinds],
    }
    speeds = {}
    for name, make in [*ways.items()] * 2:
        begin, step = time.monotonic(), 0
        while time.monotonic() - begin < seconds / 4:
            make(step)
            step += 1
        speeds[name] = max(speeds.get(name, 0.0), step * config.batch / (time.monotonic() - begin))
    torch.set_num_threads(threads)
    return f"views alone, one thread: {speeds['ours']:.0f} images/s, with PIL {speeds['PIL']:.0f}"


SCRIPTS = {  # module, FLOPs an image, the plain step, flags of both
    # the plain sampler makes official masks
    "ijepa": (ijepa, ijepa_work, plain_ijepa, ["--masks", "official", "--min-keep", "3"]),
    "msn": (msn, msn_work, lambda config, steps: plain_msn(msn, config, steps), []),
    "pmsn": (pmsn, msn_work, lambda config, steps: plain_msn(pmsn, config, steps), []),
}


def bench(name, flags, steps):
    """Rows (name, images/s, GiB, share of peak) of a script and of the plain step, and what was run."""
    module, work_of, _, fixed = SCRIPTS[name]
    flags = [*flags, *fixed]
    config = common.parse_config(module.Config, module.PRESETS, module.DATA_PRESETS, flags)
    device = common.start_world(config.device).device
    dtype = common.choose_precision(config.precision, device)
    found = {"ours": [], "plain": []}
    for _ in range(2):
        found["ours"].append(ours(name, flags, steps))
        plain = [sys.executable, __file__, name, "--plain", "--steps", str(max(6, steps // 3)), *flags]
        found["plain"].append(json.loads(subprocess.run(plain, check=True, capture_output=True, text=True).stdout))
    peak = {"ours": matmul_peak(dtype, device), "plain": matmul_peak(torch.float32, device)}
    rows = []
    for kind, runs in found.items():
        best = max(runs, key=lambda run: run["speed"])
        masks = best["masks"] or [()]
        work = sum(work_of(config, *pair) for pair in masks) / len(masks)
        rows.append((kind, best["speed"], best["memory"], work * best["speed"] / peak[kind]))
    c = config
    what = (
        f"encoder {c.width}x{c.depth}, patch {c.patch} on {c.image_size}x{c.image_size}, batch {c.batch}, "
        f"{str(dtype)[6:]} on {device.type}, {torch.get_num_threads()} threads, matmul peak {peak['ours'] / 1e9:.0f} "
        f"GFLOP/s, data_wait {100 * found['ours'][0]['data_wait']:.1f} %"
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


SHAPES = {
    "ijepa": {"toy": ["--preset", "toy"], "tiny": ["--data", "toy", *TINY.split()]},
    "msn": {"toy": ["--preset", "toy"], "cifar10-cpu": ["--preset", "cifar10-cpu", "--data", "toy"]},
    "pmsn": {"toy": ["--preset", "toy"]},
}


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", help=f"of {', '.join(SCRIPTS)}; default all")
    parser.add_argument("--decode", help="a folder of images: measure only how fast they are read")
    parser.add_argument("--steps", type=int, default=18, help="steps of each measurement")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.plain:
        module, _, plain, _ = SCRIPTS[args.scripts[0]]
        plain(common.parse_config(module.Config, module.PRESETS, module.DATA_PRESETS, flags), args.steps)
        return
    if args.decode:
        bench_decode(args.decode)
        return
    for script in args.scripts or SCRIPTS:
        for name, shape in SHAPES[script].items() if not flags else {"given": flags}.items():
            what, rows = bench(script, shape, args.steps)
            print(f"\n{script}.py, {name}: {what}\n")
            print("| step | images/s | peak memory, GiB | share of matmul peak |\n|---|---|---|---|")
            for row in rows:
                print(f"| {row[0]} | {row[1]:.0f} | {row[2]:.2f} | {100 * row[3]:.0f} % |")
            print(f"\n{rows[0][1] / rows[1][1]:.2f} times the plain step", flush=True)
            module = SCRIPTS[script][0]
            if hasattr(module, "make_views"):
                print(bench_views(module, common.parse_config(module.Config, module.PRESETS, {"*": "toy"}, shape)))


if __name__ == "__main__":
    main()
