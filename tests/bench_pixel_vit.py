"""Bench of pixel_vit.py: what long sequences cost, fused against explicit attention, and sampling in batches.

python tests/bench_pixel_vit.py                      # 1024 tokens: the three tasks, attention fused and explicit
python tests/bench_pixel_vit.py --lengths            # memory and time per image against sequence length
python tests/bench_pixel_vit.py --sampling           # images/s of the sampler, batched and one by one
    [--device cuda] [--width 192 --depth 12 --heads 3] [--batch 2] [--steps 3] [--tokens 784 1024 4096]

Each row is a process of its own, so that its peak memory is its own. Memory is what the step adds to the process before
it, on a CPU (resident) as on a GPU (allocated).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common  # noqa: E402
import pixel_vit  # noqa: E402


def explicit_attention(q, k, v):
    """Softmax attention written out: the scores of all pairs are held in memory."""
    scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).float().softmax(dim=-1)
    return scores.to(v.dtype) @ v


def make_config(args):
    """The Config of a row: `tokens` pixels of patch 1, ten classes."""
    side = round(args.tokens[0] ** 0.5)
    decoder = {"decoder_width": args.width // 2, "decoder_depth": args.depth // 3}
    return pixel_vit.Config(
        task=args.task,
        image_size=side,
        width=args.width,
        depth=args.depth,
        heads=args.heads,
        batch=args.batch,
        micro=args.batch,
        classes=10,
        decoder_heads=args.heads,
        **decoder,
    )


def measure(args):
    """Training steps of one task at one length: print JSON of seconds and GiB an image."""
    if args.kind == "explicit":
        common.attend = explicit_attention
    world, c = common.start_world(args.device), make_config(args)
    model = pixel_vit.build(c)[0].to(world.device)
    optimizer = pixel_vit.make_optimizer(model, c)
    prepare = pixel_vit.preparation(c, world.device)
    pixels = torch.randint(0, 256, (c.batch, 3, c.image_size, c.image_size), dtype=torch.uint8)
    labels = torch.arange(c.batch) % 10
    before, seconds = memory_gib(world.device), []
    for step in range(args.steps):
        item = pixel_vit.TASKS[c.task].draw(c, pixels.clone(), labels, step)
        begin = time.monotonic()
        images, *inputs = (part.to(world.device) for part in item)
        with world.autocast():
            model(prepare(images), *inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - begin)
    memory = memory_gib(world.device) - before
    seconds = sorted(seconds[1:] or seconds)[0]
    print(json.dumps({"seconds": seconds / c.batch, "memory": memory / c.batch}))


def memory_gib(device):
    """The highest memory so far: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def sampling(args):
    """Images/s of the sampler at one batch size, no guidance: print JSON."""
    world = common.start_world(args.device)
    c = pixel_vit.replace(
        make_config(args), task="diffusion", sampler_steps=args.steps, guidance=1.0
    )
    model = pixel_vit.build(c)[1].to(world.device)
    best = 1e9
    for _ in range(2):  # the first one warms up
        begin = time.monotonic()
        for number in range(args.images // args.batch):
            images = pixel_vit.sample_images(model, c, number, world)
        images.cpu()
        best = min(best, time.monotonic() - begin)
    print(json.dumps({"images_per_s": args.images / best}))


def row(args, **changes):
    """Run one row in a process of its own and return what it printed; None where it failed (out of memory)."""
    options = vars(args) | changes
    words = [
        f"--{k}={v}"
        for k, v in options.items()
        if k not in ("tokens", "lengths", "sampling") and v != ""
    ]
    words += ["--tokens", str(changes["tokens"])]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", action="store_true")
    parser.add_argument("--sampling", action="store_true")
    for name, default in dict(device="cpu", task="classify", kind="", mode="").items():
        parser.add_argument(f"--{name}", default=default)
    for name, default in dict(width=192, depth=12, heads=3, batch=2, steps=3, images=16).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="*", default=[])
    args = parser.parse_args()
    if args.mode:
        return dict(measure=measure, sampling=sampling)[args.mode](args)
    shape = f"width {args.width}, depth {args.depth}, {args.heads} heads"
    if args.sampling:
        tokens = (args.tokens or [144])[0]
        print(f"sampling, {shape}, {tokens} tokens, {args.steps} steps on {args.device}")
        for batch in (1, args.images):
            found = row(args, mode="sampling", batch=batch, tokens=tokens)
            print(f"{batch:>5} at once {found['images_per_s']:>10.2f} images/s", flush=True)
        return None
    lengths = args.tokens or ([196, 256, 784, 1024, 2304, 4096] if args.lengths else [1024])
    kinds = ("fused",) if args.lengths else ("fused", "explicit")
    print(f"training steps, {shape}, batch {args.batch} on {args.device}")
    print(f"{'task':<12}{'tokens':>8}{'attention':>14}{'ms an image':>14}{'MiB an image':>14}")
    for tokens in lengths:
        for task in ("classify", "mae", "diffusion"):
            for kind in kinds:
                found = row(args, mode="measure", task=task, kind=kind, tokens=tokens)
                cells = (
                    [f"{1e3 * found['seconds']:>14.1f}", f"{1024 * found['memory']:>14.1f}"]
                    if found
                    else ["failed"]
                )
                print(f"{task:<12}{tokens:>8}{kind:>14}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
