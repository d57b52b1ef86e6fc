"""Training speed and memory of each script's step, beside a plain implementation of the same step, on this machine.

    python tests/bench.py                 # every script, tables in Markdown
    python tests/bench.py ijepa msn --steps 20 --width 192
    python tests/bench.py --profile ijepa msn --preset cifar10-cpu --data toy    # where a step's time goes
    python tests/bench.py --decode DIR    # images, or clips of videos, read a second and core

Both run in processes of their own, one after the other, twice in turn; speeds are the better of the two, since other
load only slows. The share of peak counts the model's multiply-adds only (masks, optimizer, augmentation and everything
element-wise count as nothing), over the speed of a large matrix product of the same type measured in the same run.
"""

import argparse
import copy
import importlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Callable
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils import flop_counter

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import av  # noqa: E402
import plain  # noqa: E402

import common  # noqa: E402
import dinov2  # noqa: E402
import flexpredict  # noqa: E402
import ijepa  # noqa: E402
import iwm  # noqa: E402
import msn  # noqa: E402
import pmsn  # noqa: E402
import vjepa  # noqa: E402


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


def compare(ways, seconds=4.0, clock=time.monotonic):
    """{name: calls a second} of ways, functions of a number 0, 1, ...; each is measured twice in turn for a part of
    `seconds`, and the better counts."""
    speeds = {}
    for name, work in [*ways.items()] * 2:
        begin, times = clock(), 0
        while clock() - begin < seconds / (2 * len(ways)):
            work(times)
            times += 1
        speeds[name] = max(speeds.get(name, 0.0), times / (clock() - begin))
    return speeds


def on_one_thread(function):
    """`function` with torch on one thread."""

    def run(*args):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(threads)

    return run


# ------------------------------------------------------------------------------------------ beside the step of a script


@on_one_thread
def views_alone(module, config):
    """Images/s whose views are made, nothing else, on one thread: batched as `module` does, and one by one with PIL."""
    random = np.random.default_rng(0)
    pixels = plain.random_pixels(config).permute(0, 2, 3, 1).numpy()
    split = common.in_memory(pixels, [0] * len(pixels), ["any"], "train")
    images = plain.pil_images(config, config.batch)[: config.batch]

    def ours(step):
        views, focal, *_ = module.make_views(split, config, 0, 1, step)
        return [module.augment_views(x, config, str(len(x)), step) for x in (views, focal)]

    speeds = compare({
        "ours": ours,
        "PIL": lambda _: plain.msn_views(config, images, random),
    })  # fmt: skip
    ours, pil = (config.batch * v for v in speeds.values())
    return f"views alone, one thread: {ours:.0f} images/s, with PIL {pil:.0f}, {ours / pil:.1f} times"


@on_one_thread
def jitter_alone(module, config):
    """Images/s of the jitter alone on one thread, batched and image by image with PIL, at 32 and at 224 pixels."""
    lines = []
    for size in (32, 224):
        pixels = torch.randint(0, 256, (96, 3, size, size), dtype=torch.uint8)
        images, floats = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels], pixels / 255
        theta = iwm.draw_views(96, config, torch.Generator().manual_seed(0), always=True)["target"]
        rows = theta.tolist()
        ways = {
            "ours": lambda _, x=floats, theta=theta: iwm.jitter(x, theta),
            "PIL": lambda _, x=images, rows=rows: [plain.pil_jitter(*pair) for pair in zip(x, rows, strict=True)],
        }
        ours, pil = (96 * v for v in compare(ways, clock=time.process_time).values())
        lines.append(f"at {size} pixels {ours:.0f} images/s, with PIL {pil:.0f}, {ours / pil:.1f} times")
    return "jitter alone, one thread: " + "; ".join(lines)


def parts_of_dinov2(module, config):
    """Milliseconds of a step in the heads (teacher forward, student forward and backward), in Sinkhorn and the EMA."""
    student, teacher = dinov2.build(config)
    crops = config.batch * (2 + config.local_crops)
    patches = int(2 * config.batch * config.mask_probability * sum(config.mask_ratio) / 2)
    patches *= (config.image_size // config.patch) ** 2
    cls, tokens = torch.randn(crops, config.width), torch.randn(patches, config.width)
    logits, patch_logits = (torch.randn(n, k) for n, k in ((2 * config.batch, config.prototypes),
                                                           (patches, config.ibot_prototypes)))  # fmt: skip
    patch_heads = [getattr(m, "ibot_head", m.dino_head) for m in (student, teacher)]
    ema = common.OLD_EMA(copy.deepcopy(teacher), student)

    def heads(_):
        with torch.no_grad():
            teacher.dino_head(cls[: 2 * config.batch]), patch_heads[1](tokens)
        (student.dino_head(cls).sum() + patch_heads[0](tokens).sum()).backward()

    def sinkhorn(_):
        dinov2.sinkhorn(logits, 0.05), dinov2.sinkhorn(patch_logits, 0.05)

    speeds = compare({"heads": heads, "Sinkhorn": sinkhorn, "EMA": lambda _: ema.update(0.99)})
    return "of a step: " + ", ".join(f"{name} {1000 / v:.1f} ms" for name, v in speeds.items())


# --------------------------------------------------------------------------------------------------- the training steps


@dataclass
class Bench:
    """A script's module; FLOPs a sample, of what `masks` of a log row say; a function config -> step(number) -> those
    masks; the flags of each shape that is measured; flags of both steps; {name: more flags} of ours; and what else is
    measured beside it: (module, config) -> a line."""

    module: ModuleType
    work: Callable
    plain: Callable
    shapes: dict
    fixed: tuple = ()
    variants: dict = field(default_factory=lambda: {"ours": ()})
    beside: Callable = None


TINY = "--data toy --image-size 32 --width 192 --depth 12 --heads 3 --predictor-width 96 --predictor-depth 6 --batch 64"
TOY = {"toy": "--preset toy"}
CIFAR10 = {"cifar10-cpu": "--preset cifar10-cpu --data toy"}
OFFICIAL = ("--masks", "official", "--min-keep", "3")  # the masks that the plain sampler makes
SCRIPTS = {
    "ijepa": Bench(ijepa, plain.ijepa_work, plain.plain_ijepa, TOY | {"tiny": TINY}, OFFICIAL),
    "vjepa": Bench(vjepa, plain.vjepa_work, plain.plain_vjepa, TOY, ("--physics-count", "1")),
    "iwm": Bench(iwm, plain.iwm_work, plain.plain_iwm, TOY | CIFAR10, beside=jitter_alone),
    "flexpredict": Bench(flexpredict, plain.flexpredict_work, plain.plain_flexpredict, TOY | {"tiny": TINY}, OFFICIAL),
    "msn": Bench(msn, plain.msn_work, plain.plain_msn, TOY | CIFAR10, beside=views_alone),
    "pmsn": Bench(pmsn, plain.msn_work, plain.plain_msn, TOY, beside=views_alone),
    "dinov2": Bench(dinov2, plain.dinov2_work, plain.plain_dinov2, TOY | CIFAR10, beside=parts_of_dinov2,
                    variants={"ours": (), "ours, a size of crop after the other": ("--no-together",)}),
}  # fmt: skip

OWN = ("pixel_vit", "llip", "mvp_eval")  # what is measured of them differs: tests/bench_NAME.py, which takes the flags


def run_script(name, flags, steps):
    """A script as users run it, from the command line: speed and memory from its own log."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, ROOT / f"{name}.py", *flags, "--steps", steps, "--log-every", max(1, steps // 6)]
        command += ["--eval", "none", "--save-every", 10**9, "--out", out]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    unit = "clips_per_s" if "clips_per_s" in rows[0] else "images_per_s"
    rows = [row for row in rows if unit in row][2:]
    return dict(
        speed=sorted(row[unit] for row in rows)[len(rows) // 2],
        memory=rows[-1]["memory_gib"],
        masks=[(row["context"], row["target"]) for row in rows if "context" in row],
        data_wait=sum(row["data_wait"] for row in rows) / len(rows),
    )


def run_plain(bench, config, steps):
    """The plain step in this process; prints JSON like `run_script`."""
    step, speeds, masks = bench.plain(config), [], []
    for number in range(steps):
        begin = time.monotonic()
        masks.append(step(number))
        speeds.append(config.batch / (time.monotonic() - begin))
    half = sorted(speeds[steps // 3 :])
    memory = common.old_memory_gib(torch.device("cpu"))
    print(json.dumps(dict(speed=half[len(half) // 2], memory=memory, masks=[m for m in masks if m])))


def bench_step(name, flags, steps):
    """Print the table of a script's step and the plain one."""
    bench = SCRIPTS[name]
    flags = [*flags, *bench.fixed]
    config = common.old_parse_config(bench.module.Config, bench.module.PRESETS, bench.module.DATA_PRESETS, flags)
    device = common.old_start_world(config.device).device
    dtype = common.old_choose_precision(config.precision, device)
    found = {variant: [] for variant in bench.variants} | {"plain": []}
    for _ in range(2):
        for variant, more in bench.variants.items():
            found[variant].append(run_script(name, [*flags, *more], steps))
        command = [sys.executable, __file__, name, "--plain", "--steps", str(max(6, steps // 3)), *flags]
        found["plain"].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    peaks = {kind: matmul_peak(torch.float32 if kind == "plain" else dtype, device) for kind in ("ours", "plain")}
    c, waited = config, 100 * found["ours"][0]["data_wait"]
    print(
        f"\n{name}.py: encoder {c.width}x{c.depth}, patch {c.patch} on {c.image_size}x{c.image_size}, batch {c.batch}, "
        f"{str(dtype)[6:]} on {device.type}, {torch.get_num_threads()} threads, matmul peak {peaks['ours'] / 1e9:.0f} "
        f"GFLOP/s, data_wait {waited:.1f} %: {' '.join(flags)}\n"
    )
    print("| step | samples/s | peak memory, GiB | share of matmul peak |\n|---|---|---|---|")
    speeds = {}
    for kind, runs in found.items():
        best = max(runs, key=lambda run: run["speed"])
        masks, speeds[kind] = best["masks"] or [()], best["speed"]
        share = np.mean([bench.work(config, *m) for m in masks]) * best["speed"] / peaks.get(kind, peaks["ours"])
        print(f"| {kind} | {best['speed']:.0f} | {best['memory']:.2f} | {100 * share:.0f} % |")
    print(f"\n{speeds['ours'] / speeds['plain']:.2f} times the plain step")
    if bench.beside:
        print(bench.beside(bench.module, config), flush=True)


# ------------------------------------------------------------------------------------------------------------ profiling

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::mkldnn_convolution")


def attention_flops(q, k, v, *_, **__):
    """Of the CPU's fused attention, from its shapes; torch's counter knows only those of GPUs."""
    return flop_counter.sdpa_flop_count(q, k, v)


def attention_backward_flops(gradient, q, k, v, *_, **__):
    """The same of its backward pass."""
    return flop_counter.sdpa_backward_flop_count(gradient, q, k, v)


def train_within(context, name, flags, steps):
    """Run a script, its training inside `context` -> seconds that this took."""
    module, seconds = importlib.import_module(name), []

    def timed(*args, train=module.train, **kwargs):
        begin = time.monotonic()
        with context:
            result = train(*args, **kwargs)
        seconds.append(time.monotonic() - begin)
        return result

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(module, "train", timed):
        own = ["--steps", steps, "--eval", "none", "--save-every", 10**9, "--out", Path(folder) / "run"]
        module.main([*flags, *map(str, own)])
    return seconds[0]


def profile_steps(name, flags, steps, rows=12):
    """Print which operators the time of a script's training goes to, their own time without what they call, and the
    share of the matmul peak that its step reaches, by the FLOPs of products and attention that torch counts."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    profile = torch.profiler.profile(activities=kinds)
    seconds = train_within(profile, name, flags, steps)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {fused: attention_flops, getattr(torch.ops.aten, f"{fused.__name__}_backward"): attention_backward_flops}
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=formulas)
    train_within(counter, name, flags, 2)
    speed = run_script(name, flags, steps)["speed"]

    def own_time(event):
        return getattr(event, "self_device_time_total", 0) if torch.cuda.is_available() else event.self_cpu_time_total

    events = sorted(profile.key_averages(), key=own_time, reverse=True)
    total = sum(map(own_time, events))
    products = sum(own_time(e) for e in events if e.key in PRODUCTS) / total
    attention = sum(own_time(e) for e in events if "attention" in e.key) / total
    print(
        f"\n{name}.py, {' '.join(flags)}: {steps} steps, {1000 * seconds / steps:.1f} ms each under the "
        f"profiler, of which {total / steps / 1000:.1f} ms in operators (all threads): matrix products "
        f"{100 * products:.0f} %, fused attention {100 * attention:.0f} %\n"
    )
    print("| operator | calls a step | ms a step | % |\n|---|---|---|---|")
    for e in events[:rows]:
        share = f"{own_time(e) / steps / 1000:.2f} | {100 * own_time(e) / total:.1f}"
        print(f"| {e.key} | {e.count / steps:.1f} | {share} |")
    module = importlib.import_module(name)
    config = common.old_parse_config(module.Config, module.PRESETS, module.DATA_PRESETS, flags)
    device = common.old_start_world(config.device).device
    peak = matmul_peak(common.old_choose_precision(config.precision, device), device)
    sample = counter.get_total_flops() / (2 * config.batch)
    print(
        f"\n{speed:.0f} samples/s of {sample / 1e9:.3g} GFLOP, {100 * sample * speed / peak:.0f} % of the matmul peak, "
        f"{peak / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------------------- decoding


@on_one_thread
def decode_images(paths):
    """Images/s of one core: `ijepa.decode` (draft, one resize of the crop), and a full decode with a float pipeline."""

    def ours(i):
        def box(width, height):
            return ijepa.random_crop(width, height, (0.3, 1.0), common.old_generator("bench", i))

        return ijepa.decode(paths[i % len(paths)], box, (224, 224))

    def whole(i):
        with Image.open(paths[i % len(paths)]) as image:
            image = image.convert("RGB")
            top, left, height, width = ijepa.random_crop(*image.size, (0.3, 1.0), common.old_generator("bench", i))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, top : top + height, left : left + width]
        pixels = F.interpolate(pixels[None] / 255, (224, 224), mode="bilinear", antialias=True, align_corners=False)
        return (pixels - torch.tensor(ijepa.MEAN)[:, None, None]) / torch.tensor(ijepa.STD)[:, None, None]

    speeds = compare({"ours": ours, "everything, in float": whole}, 12.0, time.process_time)
    line = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
    print(f"{len(paths)} images, crops to 224, images a second of one core: {line}")


@on_one_thread
def decode_videos(paths, clips=2):
    """Clips/s of one core: `vjepa.read_frames`, and a decoder that starts at frame 0 and keeps every frame."""
    config = vjepa.Config(frames=16, step=4)

    def ours(i):
        choose = vjepa.clip_chooser(config, clips, True, vjepa.random_generator("bench", i))
        return vjepa.read_frames(paths[i % len(paths)], choose, (256, 256))[0]

    def everything(i):
        with av.open(str(paths[i % len(paths)])) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        choose = vjepa.clip_chooser(config, clips, True, vjepa.random_generator("bench", i))
        indices = choose(np.arange(len(frames)) / 25)
        chosen = torch.from_numpy(np.stack([frames[i] for i in indices.flatten()])).permute(0, 3, 1, 2).float()
        return F.interpolate(chosen, (256, 256), mode="bilinear", antialias=True)

    speeds = compare({"ours": ours, "every frame from the start": everything}, 16.0, time.process_time)
    line = ", ".join(f"{name} {clips * speed:.1f}" for name, speed in speeds.items())
    print(f"{len(paths)} videos, {clips} clips of 16 frames each, clips a second of one core: {line}")


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", help=f"of {', '.join((*SCRIPTS, *OWN))}; default all")
    parser.add_argument("--decode", help="a folder of images or videos: measure only how fast they are read")
    parser.add_argument("--profile", action="store_true", help="print which operators a script's time goes to")
    parser.add_argument("--steps", type=int, default=18, help="steps of each measurement")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.plain:
        bench = SCRIPTS[args.scripts[0]]
        config = common.old_parse_config(bench.module.Config, bench.module.PRESETS, bench.module.DATA_PRESETS, flags)
        return run_plain(bench, config, args.steps)
    if args.decode:
        for known, read in ((ijepa.EXTENSIONS, decode_images), (vjepa.VIDEOS, decode_videos)):
            paths = sorted(p for p in Path(args.decode).rglob("*") if p.suffix.lower() in known)
            if paths:
                read(paths)
        return
    for script in args.scripts or (*SCRIPTS, *OWN):
        if args.profile:
            profile_steps(script, flags or ["--preset", "toy"], args.steps)
            continue
        if script in OWN:
            subprocess.run([sys.executable, ROOT / "tests" / f"bench_{script}.py", *flags], check=True)
            continue
        for shape in [flags] if flags else [s.split() for s in SCRIPTS[script].shapes.values()]:
            bench_step(script, shape, args.steps)


if __name__ == "__main__":
    main()
