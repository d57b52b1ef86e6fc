"""llip.py's pair loss beside plain autograd on all pairs at once: seconds and memory.

python tests/bench_llip.py
python tests/bench_llip.py --device cuda --width 512 --heads 8

N images and N captions, K tokens, D width, H heads; forward and backward, the best of three. Each
row is a process of its own. MiB is what the loss adds to its inputs at the peak: on a CPU to the
resident set, on CUDA to the allocations. The plain form keeps about 4 H K + 5 D floats a pair for
the backward pass; it stops at 1,024 images.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import llip  # noqa: E402


def plain_loss(image, text, model):
    """Return the loss as its formula reads: N x N mixed vectors, kept for the backward pass."""
    scores = llip.pair_scores(image, text, model.out_proj, model.tau)
    scale = model.logit_scale.exp()
    return llip.sigmoid_loss(scores, scale, model.logit_bias, 0) / len(image)


def measure(form, n, args):
    """Return (seconds, norm of the gradient, MiB) of one form at one size."""
    d = args.width // args.heads
    config = llip.Config(mix_heads=args.heads, embedding=args.width)
    with torch.device(args.device):
        model = llip.build(config, 512)
        image = torch.randn(n, 2, args.heads, args.tokens, d, requires_grad=True)
        text = torch.randn(n, 2, args.width, requires_grad=True)

    def memory():
        if args.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def step(count):
        begun = time.perf_counter()
        loss = form(image[:count], text[:count], model)
        gradient, *_ = torch.autograd.grad(loss, [image, text, model.out_proj])
        norm = gradient.norm().item()  # waits for the device
        return time.perf_counter() - begun, norm

    step(16)  # wakes threads and kernels
    before = memory()
    return *min(step(n) for _ in range(3)), memory() - before


def main():
    """Print the table."""
    parser = argparse.ArgumentParser()
    for name, default in {"tokens": 64, "width": 64, "heads": 4, "device": "cpu"}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, max_tasks_per_child=1)
    print(args, "N, seconds, |gradient|, MiB", sep="\n")
    sizes = {plain_loss: (256, 1024), llip.contrastive_loss: (256, 1024, 4096)}
    for form, numbers in sizes.items():
        for n in numbers:
            found = pool.submit(measure, form, n, args).result()
            print(n, *map("{:.5g}".format, found), form.__name__)


if __name__ == "__main__":
    main()
