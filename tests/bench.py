"""Training speed of a script beside an earlier revision of it, on this machine, in one run.

    python tests/bench.py ijepa --before 98dd49a              # its shapes, in fp32 and bf16
    python tests/bench.py ijepa --threads 1 --steps 30

Both revisions run as users run them, in processes of their own, three times in turn; the fastest
stretch of them all counts, since other load only slows. Speeds are read from log.jsonl. Without
--before there is one column.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from helpers import ROOT, log_rows

SMALL = "--eval none --no-compile --save-every 1000000000 --device cpu"
PREDICTOR = "--depth 12 --predictor-depth 6"
# flags that every revision knows
PATCHES = "--image-size 48 --patch 8"  # of letters; an earlier toy had 36 patches too, but smaller
SHAPES = {
    "ijepa": {
        "toy": f"--preset toy {PATCHES}",
        "cifar10-cpu": "--preset cifar10-cpu --data cifar10",
        "192 wide, 12 deep, patch 4 on 32": f"--preset toy --image-size 32 --patch 4 --width 192 "
        f"--heads 3 --predictor-width 96 --batch 128 {PREDICTOR}",
        "ViT-S/16 at 224": f"--preset toy --image-size 224 --patch 16 --width 384 --heads 6 "
        f"--predictor-width 192 --batch 16 {PREDICTOR}",
    },
    "iwm": {
        "toy": f"--preset toy {PATCHES} --heads 4 --min-visible 8",
        "cifar10-cpu": "--preset cifar10-cpu --data cifar10 --heads 4",
    },
    "flexpredict": {
        "toy": f"--preset toy {PATCHES}",
        "cifar10-cpu": "--preset cifar10-cpu --data cifar10",
    },
    "vjepa": {"toy": "--preset toy"},
    "pixel_vit": {
        f"toy, {task}": f"--preset {preset} --positions learned --no-flip --decoder-width 64"
        for task, preset in (
            ("classify", "toy"),
            ("mae", "toy-mae"),
            ("diffusion", "toy-diffusion"),
        )
    },
}
DEFAULT_SHAPES = {"toy": "--preset toy", "cifar10-cpu": "--preset cifar10-cpu --data cifar10"}


def speed(tree, script, flags, steps, threads):
    """Return (images a second, share of the time that steps waited for data) of a run."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"{flags} {SMALL} --steps {steps} --log-every {max(1, steps // 10)}".split()
        if "    micro: int" in (tree / f"{script}.py").read_text() and "--batch" in words:
            words += ["--micro", words[words.index("--batch") + 1]]
        command = [sys.executable, str(tree / f"{script}.py"), *words, "--out", f"{folder}/run"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        rows = [row for row in log_rows(f"{folder}/run") if "data_wait" in row]
    rows = rows[3:]  # the first three warm up
    waited = statistics.mean(row["data_wait"] for row in rows)
    rates = [value for row in rows for name, value in row.items() if name.endswith("_per_s")]
    return max(rates), waited


def compare(script, before, steps, threads, precisions):
    """Print the table of a script's shapes."""
    print(f"\n{script}.py, {threads} threads, torch {torch.__version__}\n")
    print("| shape | precision | before, images/s | now, images/s | ratio | data wait |")
    print("|---|---|---|---|---|---|")
    for name, flags in SHAPES.get(script, DEFAULT_SHAPES).items():
        for precision in precisions:
            trees = {"before": before, "now": ROOT}
            best = dict.fromkeys(trees, (0.0, 0.0))
            for _ in range(3):
                for when, tree in trees.items():
                    if tree:
                        found = speed(
                            tree, script, f"{flags} --precision {precision}", steps, threads
                        )
                        best[when] = max(best[when], found)
            (old, _), (new, waited) = best.values()
            ratio = f"{new / old:.2f}" if old else ""
            row = [name, precision, f"{old:.0f}" if old else "", f"{new:.0f}", ratio]
            print("| " + " | ".join([*row, f"{100 * waited:.1f} %"]) + " |", flush=True)


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", help="the name of a training script, such as ijepa")
    parser.add_argument("--before", default="", help="a git revision to compare with")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", default="fp32,bf16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before = None
        if args.before:
            before = Path(folder)
            archive = subprocess.run(
                ["git", "archive", args.before], cwd=ROOT, check=True, capture_output=True
            )
            subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        compare(args.script, before, args.steps, args.threads, args.precisions.split(","))


if __name__ == "__main__":
    main()
