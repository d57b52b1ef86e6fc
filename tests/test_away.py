"""Every training script on a device that is not the CPU, as far as that can be tested without one; see away.py."""

import importlib
import sys

import away
import pytest
import torch
from helpers import on_ranks

import common

SMALL = "--width 16 --depth 2 --heads 2 --batch 16 --log-every 100 --workers 0 --no-compile"
PREDICTOR = "--predictor-width 16 --predictor-depth 2"
PIXELS = "pixel_vit --image-size 8 --micro 8 --probe-epochs 1"
CASES = {
    f"ijepa {PREDICTOR} --micro 8": "knn,features",
    f"flexpredict {PREDICTOR} --micro 8 --grey 0.2 --blur 0.2": "knn",
    f"iwm {PREDICTOR} --micro 8": "knn,mrr",
    "msn --prototypes 8": "knn",
    "pmsn --prototypes 8": "knn",
    "dinov2": "knn,picture",
    f"vjepa {PREDICTOR} --frames 4 --micro 8": "knn",
    "llip": "retrieval",
    f"{PIXELS} --randaugment 2 --jitter 0.4 --grey 0.2 --mixup 0.8 --drop-path 0.2": "accuracy",
    f"{PIXELS} --preset toy-mae": "reconstruction,linear",
    f"{PIXELS} --preset toy-diffusion --sampler-steps 2 --samples 4": "samples",
}  # script and flags: evaluations


def train_on_it(_, script, flags, evaluations):
    """Train a script for 3 steps, and for 6 and evaluate: in training the second run may not wait more often."""
    module, device = importlib.import_module(script), away.register()
    torch.set_num_threads(1)
    waits = []
    common.start_world = lambda *_: common.World(0, 1, device)  # in a process of its own
    with away.Everywhere():
        for steps, then in ((3, "none"), (6, evaluations)):
            away.WAITS.clear()
            sys.argv = [f"{script}.py", *flags, "--steps", str(steps), "--out", f"for {steps}", "--eval", then]
            module.main(sys.argv[1:])
            waits.append({place: count for (where, place), count in away.WAITS.items() if where == "train"})
    few, more = waits
    assert few  # the numbers of the log
    more = {place: count for place, count in more.items() if count > few.get(place, 0)}
    assert not more, f"the host waits in each step: {more}"


@pytest.mark.skipif(not away.AVAILABLE, reason="this torch has no devices written in Python")
@pytest.mark.parametrize("case", CASES)
def test_a_step_runs_on_an_accelerator_without_waiting_for_it(case):
    """Tensors of two devices never meet, in training nor in evaluation, and the loop waits for logs and saves only."""
    script, *flags = case.split()
    on_ranks(train_on_it, script, [*flags, *SMALL.split()], CASES[case], ranks=1)


def waits_are_noticed(_):
    device = away.register()
    with away.Everywhere():
        x = torch.ones(3, 4).to(device, non_blocking=True)
        weight = torch.ones(4, requires_grad=True, device=device)
        (x * weight).sum().backward()
        assert weight.grad.cpu().tolist() == [3.0] * 4 and len(away.WAITS) == 1
        for wrong in (lambda: x + torch.ones(3, 4), lambda: x @ torch.ones(4), lambda: x.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator().manual_seed(0), device=device)
        waiting = (
            lambda: x.sum().item(), lambda: x[x > 0], lambda: torch.ones(2).to(device), lambda: x.nonzero(),
            lambda: torch.tensor([1.0, 2.0], device=device), lambda: x[torch.tensor([0, 1])], lambda: bool(x.sum() > 0),
        )  # fmt: skip
        for wait in waiting:
            away.WAITS.clear()
            wait()
            assert away.WAITS.total() >= 1, wait
        away.WAITS.clear()
        rows = torch.arange(2, device=device)
        torch.where(x[rows] > 0, x[rows] * 2, 0.0).softmax(1).index_copy_(0, rows, x[rows])
        assert not away.WAITS


@pytest.mark.skipif(not away.AVAILABLE, reason="this torch has no devices written in Python")
def test_the_device_notices():
    """What this file relies on: the device computes, refuses to mix, and sees each kind of wait, and no other."""
    on_ranks(waits_are_noticed, ranks=1)
