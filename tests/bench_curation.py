"""How well `dinov2.py curate` finds planted near-duplicates and leaks.

    python tests/bench_curation.py DIR --init CKPT    # a folder with train/ and val/

The pool is 10,000 images of train/, with near-duplicates of 2,000 of them and of 500 of val/.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import common  # noqa: E402
import dinov2  # noqa: E402

THRESHOLDS = (0.8, 0.85, 0.9, 0.95, 0.98, 0.99)


def save_near_duplicate(image, path, chance):
    """Save a copy as the web makes them: cropped, recoloured, encoded anew, or all three."""
    kind = chance.integers(4)
    if kind in (0, 3):
        width, height = image.size
        left, top, right, bottom = chance.integers(0, 1 + width // 16, 4)
        box = (left, top, width - right, height - bottom)
        image = image.resize(image.size, Image.BICUBIC, box)
    if kind in (1, 3):
        image = ImageEnhance.Color(image).enhance(chance.uniform(0.7, 1.3))
        image = ImageEnhance.Brightness(image).enhance(chance.uniform(0.8, 1.2))
    if kind in (2, 3):
        path = path.with_suffix(".jpg")
    image.save(path, quality=int(chance.integers(40, 90)))  # which PNG ignores
    return path.name


def plant(data, folder):
    """Write folder/pool and folder/refs; return {a near-duplicate's name: its original's}."""
    chance = np.random.default_rng(0)
    planted = {}
    for kind, name, copies in (("pool", "train", 2000), ("refs", "val", 500)):
        split = common.open_split(data, name)
        (folder / kind).mkdir()
        for i, row in enumerate(chance.permutation(len(split))[:10_000]):
            image = common.to_rgb(Image.open(split.images[row]))
            original = f"{kind}{i}.png"
            image.save(folder / kind / original)
            if i < copies:
                copy = folder / "pool" / f"copy-of-{original}"
                planted[save_near_duplicate(image, copy, chance)] = original
    return planted


def curate(folder, threshold, *flags):
    """Return the names that `curate` keeps at this threshold."""
    listed = folder / "list.txt"
    line = f"curate --pool {folder}/pool-features/features.npz --out {listed}"
    line += f" --self-threshold {threshold} --threshold {threshold}"
    dinov2.main([*line.split(), *flags])
    return set(listed.read_text().splitlines())


def main():
    """Print the table, in percent."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # flags that are unknown here go to the script
    )
    parser.add_argument("folder", help="a folder with train/ and val/")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted = plant(args.folder, folder)
        for kind in ("pool", "refs"):
            line = f"--no-train --eval features --data {folder}/{kind}"
            dinov2.main([*line.split(), "--out", f"{folder}/{kind}-features", *flags])
        pool = {path.name for path in (folder / "pool").iterdir()}
        copies = {copy: of for copy, of in planted.items() if of in pool}
        leaks = planted.keys() - copies.keys()
        refs = ["--refs", f"{folder}/refs-features/features.npz", "--direct"]
        print("| threshold | duplicates found | right | leaks found | right |")
        print("|---|---|---|---|---|")
        for threshold in THRESHOLDS:
            kept = curate(folder, threshold)
            removed = pool - kept
            # a pair is found when one of the two is gone; a removal is right in a planted pair
            found = [not {copy, of} <= kept for copy, of in copies.items()]
            right = removed & {*copies, *copies.values()}
            rest = curate(folder, threshold, *refs)
            dropped = kept - rest
            shares = [np.mean(found), len(right) / len(removed)]
            shares += [len(leaks - rest) / len(leaks), len(leaks & dropped) / len(dropped)]
            print("|", threshold, *(f"| {100 * share:.1f}" for share in shares), "|", flush=True)


if __name__ == "__main__":
    main()
