"""Every training script on a device that is not the CPU, as far as that can be tested without one.

See away.py.
"""

from pathlib import Path

import away
import pytest
import torch
from helpers import call_line, on_ranks, photographs, words
from test_runs import SCRIPTS

import common

CASES = {
    "ijepa": "knn,features",
    "flexpredict --grey 0.2 --blur 0.2": "knn",
    "iwm": "knn,mrr",
    "msn": "knn",
    "pmsn": "knn",
    "dinov2": "knn,picture",
    "vjepa": "knn",
    "llip": "zeroshot",
    "pixel_vit": "reconstruction,linear",
    "pixel_vit --task classify --randaugment 2 --jitter 0.4 --grey 0.2 --mixup 0.8 "
    "--drop-path 0.2": "accuracy",
    "pixel_vit --task diffusion --sampler-steps 2 --samples 4": "samples",
}  # script and flags: evaluations
pytestmark = pytest.mark.skipif(
    not away.AVAILABLE, reason="this torch has no devices written in Python"
)


def train_on_it(_, script, flags, evaluations):
    """Train a script for 3 steps and for 6, then evaluate. 6 steps may not wait more often."""
    device = away.register()
    common.start_world = lambda *_: common.World(0, 1, device)  # in a process of its own
    waits = []
    with away.Everywhere():
        for steps in ("3", "6"):
            away.WAITS.clear()
            call_line(script, *flags, "--steps", steps, "--out", steps)
            waits.append(away.WAITS.copy())
        call_line(script, *flags, "--no-train", "--init", "6/last.pt", "--eval", evaluations)
    assert waits[0]  # the numbers of the log
    assert not waits[1] - waits[0], f"the host waits in each step: {waits[1] - waits[0]}"


@pytest.mark.parametrize("case", CASES)
def test_a_step_runs_on_an_accelerator_without_waiting_for_it(case):
    """Tensors of two devices never meet, in training nor in evaluation, and the loop waits for logs
    and saves only."""
    photographs(Path("photos"), count=24)
    script, *flags = case.split()
    line = words([SCRIPTS[script].folder, "--data photos --log-every 100", *flags])
    on_ranks(train_on_it, script, line, CASES[case], ranks=1)


def waits_are_noticed(_):
    """Compute, mix devices, and wait in each way."""
    device = away.register()
    with away.Everywhere():
        x = torch.ones(3, 4).to(device, non_blocking=True)
        weight = torch.ones(4, requires_grad=True, device=device)
        (x * weight).sum().backward()
        assert weight.grad.cpu().tolist() == [3.0] * 4 and away.WAITS.total() == 1
        refused = [lambda: x + torch.ones(3, 4), lambda: x.numpy()]
        refused.append(lambda: torch.randn(3, generator=torch.Generator(), device=device))
        for wrong in refused:
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        waits = [lambda: x.sum().item(), lambda: x[x > 0], lambda: torch.ones(2).to(device)]
        waits.append(lambda: torch.tensor([1.0, 2.0], device=device))
        waits.append(lambda: x[torch.tensor([0, 1])])
        for wait in waits:
            away.WAITS.clear()
            wait()
            assert away.WAITS.total() >= 1, wait


def test_the_device_notices():
    """The device computes, refuses to mix, and sees each kind of wait, and no other."""
    on_ranks(waits_are_noticed, ranks=1)
