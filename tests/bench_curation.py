"""How well `dinov2.py curate` finds planted duplicates and leaks, and in what time and memory.

python tests/bench_curation.py DIR --init CKPT  # a folder with train/ and val/; 10,000 images
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import common  # noqa: E402
import dinov2  # noqa: E402


def near_duplicate(image, chance):
    """Return a copy as the web makes them: encoded anew, cropped a little, recoloured, or all."""
    kind = chance.integers(4)
    if kind in (0, 3):
        width, height = image.size
        left, top, right, bottom = chance.integers(0, 1 + (width // 16), 4)
        image = image.crop((left, top, width - right, height - bottom)).resize(
            (width, height), Image.BICUBIC
        )
    if kind in (1, 3):
        image = ImageEnhance.Color(image).enhance(chance.uniform(0.7, 1.3))
        image = ImageEnhance.Brightness(image).enhance(chance.uniform(0.8, 1.2))
    quality = int(chance.integers(40, 90)) if kind in (2, 3) else 0
    return image, ["cropped", "recoloured", "re-encoded", "all three"][kind], quality


def plant(source, target, images=10_000, copies=2_000, leaks=500):
    """Make a pool of `images` of source/train, and near-duplicates of `copies` of them.

    Also of `leaks` of the references, which are source/val. Return what was planted:
    {file name: (true origin, kind)}.
    """
    chance, planted = np.random.default_rng(0), {}
    train, val = (
        sorted(p for p in (source / s).rglob("*") if p.suffix in common.EXTENSIONS)
        for s in ("train", "val")
    )
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


def embed(folder, out, flags):
    """Write features of all images below a folder; return the file."""
    options = ["--no-train", "--eval", "features", "--data", str(folder), "--out", str(out)]
    dinov2.main([*options, *flags])
    return str(out / "features.npz")


def bench_curation(source, flags, thresholds):
    """Recall and precision of both dedup stages at several thresholds, and time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        planted = plant(Path(source), folder)
        pool = embed(folder / "pool", folder / "a", flags)
        refs = embed(folder / "refs", folder / "b", flags)
        copies = {k: v for k, v in planted.items() if v[0] == "copy"}
        leaks = {k for k, v in planted.items() if v[0] == "leak"}
        pairs = [{name, origin} for name, (_, origin, _) in copies.items()]
        print("| threshold | self: recall | precision | leaks: recall | precision | s |")
        print("|---|---|---|---|---|---|")

        def curate(threshold, *more):
            """Return the names that are left."""
            limit = ["--self-threshold", str(threshold), "--threshold", str(threshold)]
            options = ["--pool", pool, "--out", str(folder / "list.txt"), *limit, *more]
            dinov2.main(["curate", *options])
            return set((folder / "list.txt").read_text().splitlines())

        for threshold in thresholds:
            begin = time.monotonic()
            kept = curate(threshold)
            removed = {p.name for p in (folder / "pool").iterdir()} - kept
            # a pair is found when one of the two is gone; a removal is right in a planted pair
            hit = [bool(pair & removed) for pair in pairs]
            right = len(removed & set().union(*pairs)) / max(1, len(removed))
            after = curate(threshold, "--refs", refs, "--direct")
            dropped = kept - after
            row = [np.mean(hit), right, len(leaks - after) / len(leaks)]
            row.append(len(dropped & leaks) / max(1, len(dropped)))
            seconds = time.monotonic() - begin
            cells = " | ".join(f"{100 * v:.1f}" for v in row)
            print(f"| {threshold} | {cells} | {seconds:.0f} |", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # flags that are unknown here go to the script
    )
    parser.add_argument("folder", help="a folder with train/ and val/")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[0.8, 0.85, 0.9, 0.95, 0.98, 0.99]
    )
    args, flags = parser.parse_known_args()
    bench_curation(args.folder, flags, args.thresholds)


if __name__ == "__main__":
    main()
