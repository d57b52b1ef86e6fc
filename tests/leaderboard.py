"""The table nobody has: every method on the same images, with an encoder of the same size, in the same computing time.

    python tests/leaderboard.py                              # toy, then CIFAR-10: about three hours
    python tests/leaderboard.py --data toy --minutes 1 --methods i-jepa msn
    python tests/leaderboard.py --readme README.md           # ... and put the tables between README's markers

Each method trains with its own recipe (its preset for such images, from its script); image, patch and encoder size are
set here, and the number of steps such that training takes --minutes on two CPU cores: measured on a few steps first,
in processor time, so that other load on the machine changes little. Two runs of one thread go side by side, for as
long each as two threads would take for one after the other. Then the scripts write features (each paper's own readout)
of the same labelled images, and one evaluator, here, does the rest, beside the features of the untrained network (the
same script and seed, learning rate 0) and the pixels themselves.

What is done is kept in --out: a call that is cut off goes on where it was. There it leaves leaderboard.md,
leaderboard.json and leaderboard.png.

V-JEPA is not here, since it trains on videos, nor MVP, which trains nothing.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import common  # noqa: E402
import ijepa  # noqa: E402
import msn  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Images:
    """A data set: flags that give every script its images and its encoder, and how many of the training images are
    labelled for the evaluations."""

    size: str
    bank: int
    preset: str
    local: int  # side of DINOv2's small crops


DATA = {
    "toy": Images("--image-size 24 --patch 4 --width 64 --depth 4 --heads 4", 8000, "toy", 12),
    # 24 pixels, so 36 tokens and not 64: in minutes on a CPU more images are worth more than more patches of one
    "cifar10": Images("--image-size 24 --patch 4 --width 96 --depth 4 --heads 4", 10000, "cifar10-cpu", 12),
}
METHODS = {
    "I-JEPA": "ijepa --min-keep 3 --min-context 8",
    "FlexPredict": "flexpredict --min-keep 3 --min-context 8",
    "IWM": "iwm",
    "MSN": "msn",
    "PMSN, power law": "pmsn",
    "DINOv2": "dinov2 --local-size {local}",
    "MAE (Pixel Transformer's file, same patches)": "pixel_vit --task mae",
    "Llip, captioned by class": "llip --mixture-tokens 8",
    "SigLIP, captioned by class": "llip --model siglip",
    "supervised ViT (Pixel Transformer's file)": "pixel_vit --task classify --crop-scale 0.5 1",
}  # name: script and flags; masks are the toy's, made for 6x6 patches
LABELS = ("Llip, captioned by class", "SigLIP, captioned by class", "supervised ViT (Pixel Transformer's file)")
SHOTS = 10  # labelled images a class in the low-shot evaluation
SCORES = {"knn": "kNN (k = 20)", "linear": "linear", "lowshot": f"{SHOTS}-shot"}


def flags_of(data, method, seed):
    """(script, flags) of a method's training on a data set."""
    script, *own = METHODS[method].format(local=DATA[data].local).split()
    preset = DATA[data].preset + ("-mae" if "mae" in own else "")
    return script, ["--preset", preset, "--seed", seed, *own, *DATA[data].size.split()]


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def write_images(pixels, labels, classes, folder):
    """uint8 [N, 3, H, W] as PNG files folder/CLASS/00000.png."""
    for i, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        path = folder / classes[label] / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def open_images(data, name, folder):
    """Split `name` (train or val) of a data set with its pixels in memory."""
    config = ijepa.Config(data=data, image_size=24 if data == "toy" else 32)  # as they are
    world, log = common.OldWorld(0, 1, torch.device("cpu")), common.OldLog(folder, common.OldWorld(0, 1, torch.device("cpu")))
    return ijepa.cache_pixels(ijepa.open_split(config, name), config, world, log)


def prepare(data, folder):
    """Write what the scripts read: folder/train, all images, and folder/labelled, the bank and the test images."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("train", "val"):
        split = open_images(data, name, folder)
        some = torch.arange(len(split))
        if name == "train":
            write_images(split.pixels, split.labels, split.classes, folder / "train" / name)
            some = torch.randperm(len(split), generator=common.old_generator("leaderboard", data))[: DATA[data].bank]
        write_images(split.pixels[some], split.labels[some], split.classes, folder / "labelled" / name)
    (folder / "done").touch()


# ---------------------------------------------------------------------------------------------------------------------
# Run a script
# ---------------------------------------------------------------------------------------------------------------------


def run(script, flags, device):
    """Run a script to its end -> seconds of processor time, or on an accelerator by the clock."""
    threads = {} if device else {"OMP_NUM_THREADS": "1"}
    command = list(map(str, [sys.executable, ROOT / f"{script}.py", *flags, *(["--device", device] if device else [])]))
    start = os.times().elapsed
    process = subprocess.Popen(command, env=os.environ | threads, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = process.stdout.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{printed[-2000:]}")
    return os.times().elapsed - start if device else usage.ru_utime + usage.ru_stime


def logged(out, name):
    """The values of a column of a run's log."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def features(script, flags, out, images, device):
    """The trained network's features of the labelled images: {"train", "val"} -> (float32 [N, D], int64 [N])."""
    found = {}
    for name in ("train", "val"):
        path = out / f"{name}.npz"
        own = ["--init", out / "last.pt", "--data", images / "labelled", "--eval", "features"]
        run(script, [*own, "--features-split", name, "--features-out", path, "--out", out / "features"], device)
        shutil.rmtree(out / "features")
        with np.load(path) as arrays:
            found[name] = torch.from_numpy(arrays["features"]).float(), torch.from_numpy(arrays["labels"])
        path.unlink()
    return found


def measure(data, method, seed, args):
    """One cell of the comparison: train, or take up a run that was cut off, and evaluate -> a dict, kept in --out.

    With --report only a dict that is there, else None. RuntimeError if a script fails.
    """
    name = re.sub(r"\W+", "-", f"{data}-{method}-{seed}").strip("-").lower()
    kept, out, images = args.out / f"{name}.json", args.out / "runs" / name, args.out / "images" / data
    if kept.exists() or args.report:
        return json.loads(kept.read_text()) if kept.exists() else None
    script, flags = flags_of(data, method, seed)
    flags += ["--data", images / "train", "--eval", "none"]
    plan, trial = args.out / "runs" / f"{name}.steps.json", args.out / "runs" / f"{name}.trial"
    if not plan.exists():
        shutil.rmtree(out, ignore_errors=True)
        cost = {}
        for steps in (3 + args.trial, 3):  # a run's start, its picture and loading the images cancel
            shutil.rmtree(trial, ignore_errors=True)
            # with a learning rate of 0 the weights stay those of the start
            cost[steps] = run(script, [*flags, "--lr", 0, "--steps", steps, "--out", trial], args.device)
        step = max(cost[3 + args.trial] - cost[3], 1e-3) / args.trial
        random = evaluate(features(script, flags, trial, images, args.device))
        shutil.rmtree(trial)
        seconds = args.minutes[data] * 60 * (1 if args.device else 2)
        plan.write_text(json.dumps(dict(steps=max(1, round(seconds / step)), step=step, random=random)))
    plan = json.loads(plan.read_text())
    whole = not (out / "last.pt").exists()  # else the time before the cut is not known
    length = ["--steps", plan["steps"], "--save-every", max(1, plan["steps"] // 10), "--out", out, "--resume"]
    seconds = run(script, [*flags, *length], args.device)
    config = json.loads((out / "config.json").read_text())
    result = dict(data=data, method=method, seed=seed, script=script, steps=plan["steps"], random=plan["random"])
    result |= dict(images=plan["steps"] * config["batch"], minutes=seconds / 60 if whole else None)
    result |= dict(
        memory=max(logged(out, "memory_gib")),
        speed=config["batch"] / plan["step"],
        finite=bool(np.isfinite(logged(out, "loss")[-1])),
    )
    result["trained"] = evaluate(features(script, flags, out, images, args.device))
    kept.write_text(json.dumps(result, indent=1))
    shutil.rmtree(out)
    print(f"{data}, {method}, seed {seed}: {result['trained']}, untrained {result['random']}", flush=True)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------------------------------


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


def evaluate(found):
    """kNN, linear probe and low-shot logistic regression on features of `features`; top-1 in percent."""
    (bank, labels), (test, test_labels) = found["train"], found["val"]
    classes = int(labels.max()) + 1
    result = {"knn": ijepa.accuracy(ijepa.knn(bank, labels, test)[20], test_labels).item()}
    result["linear"] = linear_probe(bank, labels, test, test_labels, classes)
    std, mean = torch.std_mean(bank, dim=0)
    bank, test = ((x - mean) / (std + 1e-6) for x in (bank, test))
    shots = []
    for seed in range(3):
        chosen = msn.draw_labelled(labels, [SHOTS] * classes, classes, seed)
        weight = msn.logistic_regression(bank[chosen], labels[chosen], classes, ridge=1.0)
        shots.append(ijepa.accuracy(test.to(weight.dtype) @ weight.T, test_labels).item())
    return result | {"lowshot": statistics.mean(shots)}


def evaluate_pixels(data, args):
    """The same on raw pixels."""
    kept = args.out / f"{data}-pixels.json"
    if not kept.exists():
        found = {}
        for name in ("train", "val"):
            paths = sorted((args.out / "images" / data / "labelled" / name).rglob("*.png"))
            classes = sorted({p.parent.name for p in paths})
            pixels = np.stack([np.asarray(Image.open(p)) for p in paths]).reshape(len(paths), -1) / 255 - 0.5
            found[name] = torch.from_numpy(pixels).float(), torch.tensor([classes.index(p.parent.name) for p in paths])
        kept.write_text(json.dumps(evaluate(found)))
    return json.loads(kept.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Tables and picture
# ---------------------------------------------------------------------------------------------------------------------


def mean_and_spread(values, digits=1):
    """'12.3', or of several seeds '12.3 ± 0.4'."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def markdown(data, rows, pixels, args):
    """The table of one data set; rows: {method: [result of a seed]}, in the order of their kNN."""
    unit = "core" if not args.device else args.device
    many = max(map(len, rows.values()))
    title = "CIFAR-10" if data == "cifar10" else "Toy textures"
    lines = [
        f"**{title}**, `{DATA[data].size}`, {args.minutes[data]:g} minutes on {args.device or 'two cores'} each, "
        f"{many} seed{'s' if many > 1 else ''}; untrained in brackets; {DATA[data].bank:,} labelled images:",
        "",
        "| method | " + " | ".join(SCORES.values()) + f" | images seen | images/s and {unit} | peak memory, GiB |",
        "|---|" + "---|" * (len(SCORES) + 3),
    ]
    for method, results in rows.items():
        cells = [
            f"{mean_and_spread([r['trained'][s] for r in results])} "
            f"({mean_and_spread([r['random'][s] for r in results])})"
            for s in SCORES
        ]
        name = f"{method} †" if method in LABELS else method
        cells += [f"{statistics.mean(r[k] for r in results):,.0f}" for k in ("images", "speed")]
        cells.append(f"{max(r['memory'] for r in results):.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| raw pixels | " + " | ".join(f"{pixels[s]:.1f}" for s in SCORES) + " | | | |")
    if set(rows) & set(LABELS):
        lines += ["", "† uses the labels of the training images, directly or as captions."]
    return "\n".join(lines) + "\n"


def draw(tables, pixels):
    """Bars of all scores, a row a method and a column a score; the tick is the untrained network, the line raw
    pixels."""
    left, bar, wide, gap = 290, 16, 170, 48
    heights = [(len(rows) + 2) * (bar + 8) + 20 for rows in tables.values()]
    image = Image.new("RGB", (left + len(SCORES) * (wide + gap), sum(heights) + 10), "white")
    pen, top = ImageDraw.Draw(image), 8
    for (data, rows), height in zip(tables.items(), heights, strict=True):
        pen.text((8, top), "CIFAR-10" if data == "cifar10" else "Toy textures", fill="black")
        for column, (score, title) in enumerate(SCORES.items()):
            x = left + column * (wide + gap)
            pen.text((x, top), f"{title}, % (line: raw pixels)", fill="black")
            for row, (method, results) in enumerate(rows.items()):
                y = top + (row + 1) * (bar + 8)
                if column == 0:
                    pen.text((8, y + 2), method, fill="black")
                value, random = (statistics.mean(r[k][score] for r in results) for k in ("trained", "random"))
                colour = (210, 170, 110) if method in LABELS else (90, 140, 200)
                pen.rectangle((x, y, x + wide * value / 100, y + bar), fill=colour)
                pen.line((x + wide * random / 100, y - 2, x + wide * random / 100, y + bar + 2), fill="black", width=2)
                pen.text((x + max(wide * value, wide * random) / 100 + 5, y + 2), f"{value:.1f}", fill="black")
            x += wide * pixels[data][score] / 100
            pen.line((x, top + bar + 4, x, top + (len(rows) + 1) * (bar + 8)), fill=(200, 60, 60))
        top += height
    return image


def write(tables, pixels, args):
    """leaderboard.md, .json and .png in --out, and the tables between README's markers."""
    text = "\n".join(markdown(data, rows, pixels[data], args) for data, rows in tables.items())
    (args.out / "leaderboard.md").write_text(text)
    everything = {data: dict(pixels=pixels[data], methods=rows) for data, rows in tables.items()}
    (args.out / "leaderboard.json").write_text(json.dumps(everything, indent=1) + "\n")
    draw(tables, pixels).save(args.out / "leaderboard.png")
    if args.readme:
        begin, end = "<!-- leaderboard -->\n", "<!-- end of leaderboard -->"
        before, _, rest = args.readme.read_text().partition(begin)
        args.readme.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
    print(text)


def main(argv=None):
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    known = ", ".join(METHODS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"names, or their beginnings: {known}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    minutes = "of training, on two cores, or on the --device; one number, or one for each of --data"
    parser.add_argument("--minutes", type=float, nargs="+", default=[2, 10], help=minutes)
    parser.add_argument("--trial", type=int, default=20, help="steps on which a step's time is measured")
    parser.add_argument("--out", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--device", default="", help="cuda or mps, by default two CPU cores")
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side, by default two on a CPU, else one")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and picture of what is in --out")
    parser.add_argument("--readme", type=Path, help="a file with the marker <!-- leaderboard -->")
    args = parser.parse_args(argv)
    methods = [m for m in METHODS if any(m.lower().startswith(part.lower()) for part in args.methods)]
    if not methods:
        parser.error(f"--methods: none of {list(METHODS)}")
    if args.readme and "<!-- end of leaderboard -->" not in args.readme.read_text():
        parser.error(f"{args.readme} has no <!-- leaderboard --> ... <!-- end of leaderboard -->")
    if len(args.minutes) not in (1, len(args.data)):
        parser.error(f"--minutes has {len(args.minutes)} numbers, but --data {len(args.data)} names")
    args.minutes = dict(zip(args.data, args.minutes * (len(args.data) if len(args.minutes) == 1 else 1)))
    args.out = args.out.absolute()
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    for data in args.data:
        settings, before = f"{args.minutes[data]:g} minutes on {args.device or 'cpu'}", args.out / f"{data}.budget"
        if before.exists() and before.read_text() != settings:
            parser.error(f"{args.out} has results of {before.read_text()}: choose another --out, or delete it")
        before.write_text(settings)
    torch.set_num_threads(1)
    for data in args.data:
        prepare(data, args.out / "images" / data)
    cells = [(data, method, seed) for data in args.data for seed in args.seeds for method in methods]
    failed = []

    def attempt(cell):  # the other cells go on
        try:
            return measure(*cell, args)
        except RuntimeError as error:
            failed.append(cell)
            print(f"{', '.join(map(str, cell))} failed: {error}", file=sys.stderr, flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.jobs or (1 if args.device else 2)) as pool:
        found = [r for r in pool.map(attempt, cells) if r is not None]
    tables, pixels = {}, {data: evaluate_pixels(data, args) for data in args.data}
    for data in args.data:
        rows = {m: [r for r in found if (r["data"], r["method"]) == (data, m)] for m in methods}
        order = sorted(
            filter(rows.get, rows), key=lambda m: (m in LABELS, -statistics.mean(r["trained"]["knn"] for r in rows[m]))
        )
        tables[data] = {m: rows[m] for m in order}
    write(tables, pixels, args)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
