"""Bench of llip.py's pair loss against plain autograd on all pairs at once: seconds and memory, forward and backward.

python tests/bench_llip.py [--images 256 1024 4096] [--tokens 64] [--width 64] [--heads 4] [--memory 12] [--repeats 3]
python tests/bench_llip.py --device cuda --width 512 --heads 8

Each row is a process of its own: N images and N captions, as one rank sees them. `peak` is what the loss adds to its
inputs: on a CPU to the resident set, on CUDA to the allocations. The naive form is skipped where what it keeps for the
backward pass (about 4 H K + 5 D floats a pair) is more than --memory GiB.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llip  # noqa: E402


def naive_loss(image, text, model):
    """Return the loss as its formula reads: N x N mixed vectors, kept for the backward pass."""
    q = text[:, 0].unflatten(1, (model.heads, -1))
    scores = llip.pair_scores(*image.unbind(1), q, text[:, 1], model.out_proj, model.tau)
    scale = model.logit_scale.exp()
    return llip.sigmoid_loss(scores, scale, model.logit_bias, 0) / len(image)


def measure(form, n, args):
    """Measure one form at one size: {"seconds": best, "mib": added at the peak, "loss", "gradient"}."""
    torch.manual_seed(0)
    device, d = torch.device(args.device), args.width
    tau = (d / args.heads) ** 0.5
    config = llip.Config(mix_heads=args.heads, embedding=d, mixture_tokens=args.tokens, tau=tau)
    model = llip.build(config, 512).to(device)
    shape = (n, 2, args.heads, args.tokens, d // args.heads)
    inputs = [torch.randn(shape, device=device), torch.randn(n, 2, d, device=device)]
    inputs = [x.requires_grad_() for x in inputs]
    form = {"tiles": llip.contrastive_loss, "naive": naive_loss}[form]

    def step(count):
        loss = form(*(x[:count] for x in inputs), model)
        gradients = torch.autograd.grad(loss, [*inputs, model.out_proj])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item(), gradients[0].square().sum().item() ** 0.5

    def memory():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    step(min(n, 16))  # threads and kernels come to life
    before, times = memory(), []
    for _ in range(args.repeats):
        start = time.perf_counter()
        loss, gradient = step(n)
        times.append(time.perf_counter() - start)
    return dict(seconds=min(times), mib=memory() - before, loss=loss, gradient=gradient)


def main():
    """Measure every form at every size, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--tokens", type=int, default=64, help="K, mixture tokens")
    parser.add_argument("--width", type=int, default=64, help="D, embedding")
    parser.add_argument("--heads", type=int, default=4, help="H, heads of the mixing")
    parser.add_argument("--memory", type=float, default=12, help="GiB that the naive form may take")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--form", choices=["naive", "tiles"], help="measure this form only, and print json"
    )
    args = parser.parse_args()
    if args.form:
        print(json.dumps(measure(args.form, args.images[0], args)))
        return
    print(
        f"H = {args.heads}, K = {args.tokens}, D = {args.width}, {args.device}, {torch.get_num_threads()} threads"
    )
    print(f"{'N':>6} {'form':>6} {'seconds':>9} {'peak MiB':>9} {'loss':>12} {'|dk, dv|':>12}")
    for n in args.images:
        for form in ("naive", "tiles"):
            if (
                form == "naive"
                and 4 * n * n * (4 * args.heads * args.tokens + 5 * args.width)
                > args.memory * 2**30
            ):
                print(f"{n:>6} {form:>6}   more than {args.memory:g} GiB", flush=True)
                continue
            own = [
                sys.executable,
                __file__,
                "--form",
                form,
                "--images",
                str(n),
                "--device",
                args.device,
            ]
            own += [
                w
                for k in ("tokens", "width", "heads", "repeats")
                for w in (f"--{k}", str(getattr(args, k)))
            ]
            r = json.loads(subprocess.run(own, capture_output=True, text=True, check=True).stdout)
            numbers = (
                f"{r['seconds']:>9.3f} {r['mib']:>9.0f} {r['loss']:>12.6g} {r['gradient']:>12.6g}"
            )
            print(f"{n:>6} {form:>6} {numbers}", flush=True)


if __name__ == "__main__":
    main()
