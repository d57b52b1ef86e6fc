"""Speed of a DINOv2 step beside a plain one, where its time goes, and how well curation finds planted duplicates.

    python tests/bench_dinov2.py                                   # a table in Markdown
    python tests/bench_dinov2.py --width 192 --depth 12 --heads 3  # of another shape
    python tests/bench_dinov2.py --curation cifar10 [--init CKPT]  # a folder with train/ and val/; 10,000 images of it

Both steps run in processes of their own, twice in turn; speeds are the better of the two, since other load only slows.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402
import dinov2  # noqa: E402


def explicit_attention(q, k, v):
    """Softmax attention written out: the scores of all pairs are held in memory."""
    scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).float().softmax(dim=-1)
    return scores.to(v.dtype) @ v


def plain_step(config, steps):
    """The straightforward step: crops one by one, explicit attention, a loss per pair of crops, a loop over parameters
    for the EMA, no fused optimizer; the same augmented crops. Prints JSON."""
    torch.manual_seed(0)
    F.scaled_dot_product_attention = explicit_attention
    student, teacher = dinov2.build(config)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, foreach=False, fused=False)
    world = common.World(0, 1, torch.device("cpu"))
    split = dinov2.open_data(config, "train")
    kinds = dinov2.crop_kinds(config)
    batches = dinov2.MultiCrop(split, config, world, config.batch, kinds)
    none, speeds = torch.zeros(0, dtype=torch.long), []
    for step in range(steps):
        begin = time.monotonic()
        item = batches[step]
        crops = dinov2.make_crops(item, split.pixels, kinds, world.device)
        globals_, locals_ = crops[0], crops[1] if len(crops) > 1 else []
        with torch.no_grad():
            outputs = [teacher([g], places=dinov2.masked_tokens(m)[0]) for g, m in zip(globals_, item["masks"])]
            targets = dinov2.sinkhorn(torch.cat([o[1] for o in outputs]), 0.05).chunk(2)
            patch_targets = dinov2.sinkhorn(torch.cat([o[3] for o in outputs]), 0.05)
            patch_targets = patch_targets.split([len(o[3]) for o in outputs])
        loss, pairs = 0.0, 2 + 2 * len(locals_)
        for i, (g, masks) in enumerate(zip(globals_, item["masks"])):
            places, weights = dinov2.masked_tokens(masks)
            tokens, logits, _, patch_logits = student([g], masks, places)
            loss = loss - (targets[1 - i] * F.log_softmax(logits / 0.1, -1)).sum(-1).mean() / pairs
            ibot = -(patch_targets[i] * F.log_softmax(patch_logits / 0.1, -1)).sum(-1)
            loss = loss + (ibot * weights).sum() / (2 * config.batch) + 0.1 * dinov2.koleo_loss(tokens)
        for crop in locals_:
            logits = student([crop], places=none)[1]
            for target in targets:
                loss = loss - (target * F.log_softmax(logits / 0.1, -1)).sum(-1).mean() / pairs
        loss.backward()
        dinov2.clip_gradients(student, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                ours.mul_(0.996).add_(theirs * 0.004)
        loss.item()
        speeds.append(config.batch / (time.monotonic() - begin))
    half = sorted(speeds[steps // 3 :])
    print(json.dumps(dict(speed=half[len(half) // 2], memory=common.memory_gib(world.device))))


def our_step(flags, steps):
    """`dinov2.py` as users run it, from the command line: speed and memory from its own log."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, ROOT / "dinov2.py", *flags, "--steps", steps, "--log-every", max(1, steps // 6)]
        command += ["--eval", "none", "--save-every", 10**9, "--out", out]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "images_per_s" in row][2:]
    middle = sorted(row["images_per_s"] for row in rows)[len(rows) // 2]
    waited = sum(row["data_wait"] for row in rows) / len(rows)
    return dict(speed=middle, memory=rows[-1]["memory_gib"], data_wait=waited)


def seconds(work, repeats=5):
    """The least of several times of a call."""
    times = []
    for _ in range(repeats):
        begin = time.monotonic()
        work()
        times.append(time.monotonic() - begin)
    return min(times)


def shares(config):
    """Seconds of the heads (teacher forward, student forward and backward), Sinkhorn and EMA of one step."""
    student, teacher = dinov2.build(config)
    crops = config.batch * (2 + config.local_crops)
    patches = int(2 * config.batch * config.mask_probability * sum(config.mask_ratio) / 2)
    patches *= (config.image_size // config.patch) ** 2
    cls, tokens = torch.randn(crops, config.width), torch.randn(patches, config.width)
    patch_heads = [getattr(m, "ibot_head", m.dino_head) for m in (student, teacher)]

    def heads():
        with torch.no_grad():
            teacher.dino_head(cls[: 2 * config.batch]), patch_heads[1](tokens)
        (student.dino_head(cls).sum() + patch_heads[0](tokens).sum()).backward()

    logits, patch_logits = (
        torch.randn(2 * config.batch, config.prototypes),
        torch.randn(patches, config.ibot_prototypes),
    )
    ema = common.EMA(copy.deepcopy(teacher), student)

    def sinkhorn():
        dinov2.sinkhorn(logits, 0.05), dinov2.sinkhorn(patch_logits, 0.05)

    return {"heads": seconds(heads), "Sinkhorn": seconds(sinkhorn), "EMA": seconds(lambda: ema.update(0.99))}


def bench_dinov2(flags, steps):
    """Rows (name, images/s, GiB) of dinov2.py, crops of both sizes together and apart, and of the plain step."""
    config = common.parse_config(dinov2.Config, dinov2.PRESETS, dinov2.DATA_PRESETS, flags)
    found = {"together": [], "apart": [], "plain": []}
    for _ in range(2):
        found["together"].append(our_step([*flags, "--together"], steps))
        found["apart"].append(our_step([*flags, "--no-together"], steps))
        plain = [sys.executable, __file__, "--plain", "--steps", str(max(6, steps // 3)), *flags]
        found["plain"].append(json.loads(subprocess.run(plain, check=True, capture_output=True, text=True).stdout))
    rows = [(k, *max((r["speed"], r["memory"]) for r in runs)) for k, runs in found.items()]
    step = config.batch / rows[0][1]
    parts = ", ".join(f"{name} {100 * t / step:.1f} %" for name, t in shares(config).items())
    what = (
        f"{config.width}x{config.depth}, patch {config.patch} on {config.image_size}x{config.image_size}, "
        f"{config.local_crops} local crops of {config.local_size}, K {config.prototypes}, batch {config.batch}, "
        f"{torch.get_num_threads()} threads, waiting {100 * found['together'][0]['data_wait']:.1f} %; {parts} of it"
    )
    return what, rows


# ---------------------------------------------------------------------------------------------------------- curation


def near_duplicate(image, chance):
    """A copy as the web makes them: re-encoded, cropped by a few pixels, recoloured, or all of it."""
    kind = chance.integers(4)
    if kind in (0, 3):
        width, height = image.size
        left, top, right, bottom = chance.integers(0, 1 + (width // 16), 4)
        image = image.crop((left, top, width - right, height - bottom)).resize((width, height), Image.BICUBIC)
    if kind in (1, 3):
        image = ImageEnhance.Color(image).enhance(chance.uniform(0.7, 1.3))
        image = ImageEnhance.Brightness(image).enhance(chance.uniform(0.8, 1.2))
    quality = int(chance.integers(40, 90)) if kind in (2, 3) else 0
    return image, ["cropped", "recoloured", "re-encoded", "all three"][kind], quality


def plant(source, target, images=10_000, copies=2_000, leaks=500):
    """A pool of `images` of source/train, near-duplicates of `copies` of them and of `leaks` of the references, which
    are source/val. Returns {file name: (true origin, kind)} of what was planted."""
    chance, planted = np.random.default_rng(0), {}
    train, val = (sorted(p for p in (source / s).rglob("*") if p.suffix in dinov2.EXTENSIONS) for s in ("train", "val"))
    pool, refs = target / "pool", target / "refs"
    pool.mkdir(parents=True), refs.mkdir()
    for i, k in enumerate(chance.permutation(len(train))[:images]):
        Image.open(train[k]).convert("RGB").save(pool / f"a{i:06d}.png")
    for i, path in enumerate(val):
        Image.open(path).convert("RGB").save(refs / f"{i:06d}.png")
    origins = [(f"a{k:06d}.png", pool) for k in chance.permutation(images)[:copies]]
    origins += [(f"{k:06d}.png", refs) for k in chance.permutation(len(val))[:leaks]]
    for i, (origin, folder) in enumerate(origins):
        image, kind, quality = near_duplicate(Image.open(folder / origin), chance)
        name = f"b{i:06d}." + ("jpg" if quality else "png")
        image.save(pool / name, **(dict(quality=quality) if quality else {}))
        planted[name] = (("leak" if folder == refs else "copy"), origin, kind)
    return planted


def bench_curation(source, flags, thresholds):
    """Recall and precision of both dedup stages at several thresholds, and time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        planted = plant(Path(source), folder)
        options = ["--pool", folder / "pool", "--out", folder / "list.txt", "--work", folder / "work", *flags]
        print("| threshold | self: recall | precision | leaks: recall | precision |\n|---|---|---|---|---|")
        for threshold in thresholds:
            limit = ["--self-threshold", threshold, "--relative-threshold", threshold]
            begin = time.monotonic()
            kept = {Path(p).name for p in dinov2.curate_main([str(o) for o in [*options, *limit]])}
            removed = {p.name for p in (folder / "pool").iterdir()} - kept
            copies = {k: v for k, v in planted.items() if v[0] == "copy"}
            # a pair is found when one of the two is gone; a removal is right when it is one of a planted pair
            pairs = [{name, origin} for name, (_, origin, _) in copies.items()]
            hit = [bool(pair & removed) for pair in pairs]
            right = len(removed & set().union(*pairs)) / max(1, len(removed))
            after = {
                Path(p).name
                for p in dinov2.curate_main([str(o) for o in [*options, "--refs", folder / "refs", *limit]])
            }
            dropped, leaks = kept - after, {k for k, v in planted.items() if v[0] == "leak"}
            row = [np.mean(hit), right, len(leaks - after) / len(leaks), len(dropped & leaks) / max(1, len(dropped))]
            print(f"| {threshold} | " + " | ".join(f"{100 * v:.1f}" for v in row) + " |")
            kinds = sorted({v[2] for v in copies.values()})
            found = {kind: np.mean([h for h, v in zip(hit, copies.values()) if v[2] == kind]) for kind in kinds}
            print("  found: " + ", ".join(f"{k} {100 * v:.0f} %" for k, v in found.items()), flush=True)
            print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=18, help="steps of each measurement")
    parser.add_argument(
        "--curation", help="a folder with train/ and val/: measure how well planted duplicates are found"
    )
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.8, 0.85, 0.88, 0.92, 0.95])
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.plain:
        plain_step(common.parse_config(dinov2.Config, dinov2.PRESETS, dinov2.DATA_PRESETS, flags), args.steps)
    elif args.curation:
        bench_curation(args.curation, flags, args.thresholds)
    else:
        what, rows = bench_dinov2(flags, args.steps)
        print(f"\ndinov2.py: {what}\n\n| step | images/s | peak memory, GiB |\n|---|---|---|")
        for name, speed, memory in rows:
            print(f"| {name} | {speed:.1f} | {memory:.2f} |")
        print(f"\n{rows[0][1] / rows[2][1]:.2f} times the plain step", flush=True)


if __name__ == "__main__":
    main()
