"""What is to be measured on the day a GPU is at hand. Writes the GPU section of tests/results.md.

    python tests/gpu.py                  # goes on where it was cut off; CIFAR-10 is read from $DATA
    python tests/gpu.py --minutes 9      # ends after nine minutes; the next call goes on
    python tests/gpu.py --tiny           # one piece of each sort on a CPU, in small

Pieces of less than ten minutes each: the CUDA tests; speed, memory and share of the matmul peak of
I-JEPA's step, beside a plain step of the same ViT; each script's toy in bf16 and fp16, compiled,
beside fp32 on the CPU; two steps of each paper preset on made images, not compiled, DiT on pixels
instead of latents; the `cifar10` presets, in slices. OUT/done.json holds what is done: delete an
entry to measure it again.
"""

import argparse
import functools
import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from helpers import ROOT, log_rows, photographs
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import ijepa  # noqa: E402

BEGIN = "<!-- gpu.py writes from here -->\n"
END = "<!-- gpu.py writes to here -->\n"
SCRIPTS = "ijepa flexpredict iwm msn pmsn dinov2 llip vjepa pixel_vit".split()
MODELS = {"S/16": "folder", "B/16": "vit_b16_in1k", "L/16": "vit_l16_in1k", "H/14": "vit_h14_in1k"}
KINDS = {"CPU": "--device cpu --precision fp32 --no-compile"}
KINDS.update({kind: f"--device cuda --precision {kind} --compile" for kind in ("bf16", "fp16")})
MADE = {"llip": "--data toy --vocabulary=", "vjepa": "--data toy"}
STEPS = "--steps 2 --log-every 1 --eval none --no-compile --no-shard --workers 8"
TINY = "--steps 3 --log-every 1 --data {}/images --image-size 48 --patch 8 --min-context 2 "
TINY += "--width 16 --depth 2 --heads 2 --predictor-width 16 --predictor-depth 2 "
TINY += "--batch 16 --micro 16 --workers 0 --device cpu --precision fp32 --no-compile"


def list_pieces(args):
    """Return {name: function of args} of all pieces, in order. A name begins with the sort."""
    pieces = {"tests": cuda_tests, "peak": matmul_peak}
    lines = {}  # name: command line
    for model, preset in MODELS.items():
        pieces[f"plain {model}"] = functools.partial(plain_step, preset)
        batch = ijepa.PRESETS[preset]["micro"]
        flags = f"--batch {batch} --steps 60 --log-every 10 --eval none --data letters"
        lines[f"step {model}"] = f"ijepa --preset {preset} {flags}"
    for script in SCRIPTS:
        module = importlib.import_module(script)
        for preset, fields in module.PRESETS.items():
            start = f"{script} --preset {preset}"
            if preset in ("toy", "toy-mae", "toy-diffusion"):
                for kind, flags in KINDS.items():
                    lines[f"toy {start} {kind}"] = f"{start} {flags}"
            elif preset.startswith("cifar10") and "cpu" not in preset:
                lines[f"cifar10 {start}"] = start
            elif not preset.startswith(("toy", "cifar10", "folder")):
                config = vars(module.Config(**fields))
                batch = config.get("micro") or config.get("koleo_group", 32)
                flags = f"{STEPS} --batch {batch} {MADE.get(script, '--data letters')}"
                if "channels" in fields:
                    flags += " --channels 3 --downsample 1 --image-size 32"
                lines[f"paper {start}"] = f"{start} {flags}"
    for name in sorted(lines, key=lambda name: name.startswith("cifar10")):  # these take longest
        line = f"{lines[name]} {TINY.format(args.out)}" if args.tiny else lines[name]
        pieces[name] = functools.partial(run, name, line)
    if args.tiny:
        first = {name.split()[0]: name for name in reversed(pieces)}
        return {name: pieces[name] for name in first.values()}
    return pieces


def run(name, line, args):
    """Run a script, or go on with it, and return what its log says; None if time was up."""
    out = args.out / name.replace("/", "").replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    script, *flags = line.split()
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags, "--out", str(out), "--resume"]
    with open(out / "printed.txt", "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            code = process.wait(max(1, min(540, args.end - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.terminate()  # it finishes its step and saves
            process.wait()
            return None
    if code:
        raise RuntimeError((out / "printed.txt").read_text().strip().splitlines()[-1])
    (out / "last.pt").unlink()  # the largest have 20 GB
    rows = log_rows(out)
    logged = [row for row in rows if "images_per_s" in row]
    result = {"GiB": max(row["memory_gib"] for row in logged)}
    for key in ("images_per_s", "data_wait"):  # the first window warms up
        result[key] = statistics.median(row[key] for row in logged[1:] or logged)
    for row in rows:
        for network, found in row.get("eval", {}).items():
            result.setdefault(network, {}).update(found)
    return result


def cuda_tests(args):
    """Run the tests that need a GPU."""
    where = ROOT / "tests" / ("test_size.py" if args.tiny else "")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "gpu and not pieces"]
    found = subprocess.run([*command, str(where)], capture_output=True, text=True, timeout=540)
    return {"said": found.stdout.strip().splitlines()[-1].strip("= ")}


def seconds_of(function, repeats):
    """Return the mean time of a call, after as many calls to warm up."""
    for _ in range(2):
        began = time.perf_counter()
        for _ in range(repeats):
            result = function()
        result.sum().item()  # waits for the device
    return (time.perf_counter() - began) / repeats


def matmul_peak(args):
    """Return the FLOP/s of a large bf16 product."""
    side = 256 if args.tiny else 8192
    x = torch.randn(side, side, device=args.device, dtype=torch.bfloat16)
    return {"flops": 2 * side**3 / seconds_of(lambda: x @ x, args.repeats)}


def plain_step(preset, args):
    """Time forward, backward and AdamW of a ViT on whole images. Count its and I-JEPA's FLOPs."""
    c = ijepa.Config(**ijepa.PRESETS["toy" if args.tiny else preset])
    context, targets = (x.to("meta") for x in ijepa.sample_masks(c, 0))
    with torch.device("meta"):
        jepa, target = ijepa.build(c)
        images = torch.zeros(c.micro, 3, c.image_size, c.image_size)
    with FlopCounterMode(display=False) as plain:
        jepa.encoder(images).sum().backward()
    with FlopCounterMode(display=False) as whole:
        with torch.no_grad():
            tokens = target(images)
        patches = common.patchify(images, c.patch)
        ijepa.jepa_loss(jepa(patches, context, targets), tokens, targets).backward()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    vit = common.ViT(c.image_size, c.patch, c.width, c.depth, c.heads, c.hidden).to(args.device)
    common.init_weights(vit)
    vit.compile(disable=args.tiny)
    optimizer = torch.optim.AdamW(common.parameter_groups(vit), fused=True)
    images = torch.randn(images.shape, device=args.device)

    def step():
        with torch.autocast(args.device, torch.bfloat16):
            loss = vit(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    result = {"images_per_s": c.micro / seconds_of(step, args.repeats)}
    result["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    counts = {"plain": plain.get_total_flops() / c.micro, "step": whole.get_total_flops() / c.micro}
    return {**result, **counts}


def write(done, args):
    """Write the section between the markers of --results from all that is done."""
    device = "a CPU, in small" if args.tiny else torch.cuda.get_device_name()
    peak = done.get("peak", {}).get("flops", float("nan"))
    lines = [f"`python tests/gpu.py` on {device}, torch {torch.__version__}. Matmul peak in bf16:"]
    lines += [f"{peak / 1e12:.3g} TFLOP/s. CUDA tests: {done.get('tests', {}).get('said')}.", ""]
    lines += ["| piece | trained | random | images/s | GiB | data wait | of the peak |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, result in done.items():
        cells = [name, *([""] * 6)]
        for i, network in enumerate(("trained", "random"), start=1):
            found = result.get(network, {}).items()
            cells[i] = ", ".join(f"{key} {value:.1f}" for key, value in found)
        if "images_per_s" in result:
            cells[3:5] = [f"{result['images_per_s']:,.0f}", f"{result['GiB']:.1f}"]
            cells[5] = f"{100 * result['data_wait']:.0f} %" if "data_wait" in result else ""
            sort, _, model = name.partition(" ")
            flops = done.get(f"plain {model}", {}).get(sort)
            cells[6] = f"{100 * flops * result['images_per_s'] / peak:.0f} %" if flops else ""
        cells[1] = result.get("error", cells[1])
        if name not in ("tests", "peak"):
            lines.append(f"| {' | '.join(cells)} |")
    before, _, rest = args.results.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    args.results.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after)


def main(argv=None):
    """Do what is not done, and write down each piece."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1e6, help="how long this call may take")
    parser.add_argument("--tiny", action="store_true", help="one piece of each sort, on a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--results", type=Path, default=ROOT / "tests/results.md")
    args = parser.parse_args(argv)
    args.end = time.monotonic() + 60 * args.minutes
    args.device = "cpu" if args.tiny else "cuda"
    args.repeats = 1 if args.tiny else 20
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tiny:
        photographs(args.out / "images", count=16)
    record = args.out / "done.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    for name, measure in list_pieces(args).items():
        if name in done or time.monotonic() > args.end:
            continue
        print(name, flush=True)
        try:
            result = measure(args)
        except Exception as error:  # one piece must not cost the others
            result = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        if result:
            done[name] = result
            record.write_text(json.dumps(done, indent=1))
            write(done, args)


if __name__ == "__main__":
    main()
