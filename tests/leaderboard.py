"""Every image method on CIFAR-10 in the same computing time: a markdown table.

    DATA=... python tests/leaderboard.py --minutes 30 --seeds 0 --threads 1
    python tests/leaderboard.py --minutes 0.5 --methods msn dinov2 --device cpu

Each method trains by its own script and its preset `cifar10-cpu`. The first 30 steps are timed.
Then --steps is set so that training takes --minutes on this machine. Evaluation comes on top.
kNN has k = 20 and all training images as its bank; DINOv2's is the best of 10, 20, 100 and 200.
Linear probes are the scripts' own. Llip's captions name the class: its number is zero-shot.
PMSN trains on a long tail. MAE is the Pixel Transformer's smallest with patches of 4 x 4 pixels.

Flags that are unknown here go to the scripts. A method whose folder in --out holds an evaluation is
not run again, one that was cut off goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import ROOT, log_rows

METHODS = dict.fromkeys("ijepa flexpredict iwm msn pmsn dinov2".split(), "--preset cifar10-cpu")
METHODS["pixel_vit"] = "--preset mae_t1_cifar100 --data cifar10 --patch 4 --batch 128 --micro 128"
METHODS["pixel_vit"] += " --lr 5e-4 --workers 1"
METHODS["llip"] = "--preset cifar10-cpu --eval zeroshot"
COLUMNS = {"knn": "kNN", "linear": "linear", "top1": "zero-shot"}


def run(name, out, *flags):
    """Run a script; return (its config, the rows of its log). Exit with its output if it fails."""
    words = f"--eval knn,linear {METHODS[name]}".split()
    command = [sys.executable, str(ROOT / f"{name}.py"), *words, *flags, "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return json.loads((out / "config.json").read_text()), log_rows(out)


def train(name, out, minutes, flags):
    """Train and evaluate a method, or go on: (steps, minutes of training, evaluation)."""
    if (out / "config.json").exists():
        steps = json.loads((out / "config.json").read_text())["steps"]
    else:
        with tempfile.TemporaryDirectory() as folder:
            timed = ["--steps", "30", "--log-every", "6", "--eval", "none"]
            config, rows = run(name, Path(folder, "run"), *flags, *timed)
        speeds = sorted(row["images_per_s"] for row in rows[1:5])  # the first warms up
        steps = max(1, round(60 * minutes * sum(speeds[1:3]) / 2 / config["batch"]))
    if not (out / "log.jsonl").exists() or '"eval"' not in (out / "log.jsonl").read_text():
        run(name, out, *flags, "--steps", str(steps), "--resume")
    rows = log_rows(out)
    batch = json.loads((out / "config.json").read_text())["batch"]
    logged = [{"step": 0}, *(row for row in rows if "images_per_s" in row)]
    pairs = zip(logged, logged[1:], strict=False)
    seconds = sum((b["step"] - a["step"]) * batch / b["images_per_s"] for a, b in pairs)
    return steps, seconds / 60, next(row["eval"] for row in rows if "eval" in row)


def main():
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # flags that are unknown here go to the scripts
    )
    parser.add_argument("--minutes", type=float, default=30, help="of training, each method")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", default="", help="of a process, default as torch chooses")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/leaderboard"))
    args, flags = parser.parse_known_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = args.threads
    lines = []
    for name in args.methods:
        for seed in args.seeds:
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            own = [*flags, "--seed", str(seed)]
            steps, minutes, results = train(name, args.out / f"{name}-{seed}", args.minutes, own)
            row = [name, str(seed)]
            for column in COLUMNS:
                found = [
                    results.get(key, {}).get(column) for key in ("trained", "random", "pixels")
                ]
                row.append(" / ".join(f"{x:.1f}" for x in found if x is not None))
            lines.append(" | ".join([*row, f"{steps:,}", f"{minutes:.1f}"]))
    print("CIFAR-10, top-1 in percent: trained / random encoder / raw pixels.")
    print(f"{args.minutes:g} minutes of training each.\n")
    print(f"| method | seed | {' | '.join(COLUMNS.values())} | steps | minutes |")
    print("|---|---|---|---|---|---|---|")
    for line in lines:
        print(f"| {line} |")


if __name__ == "__main__":
    main()
