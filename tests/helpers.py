"""What the tests share: golden files, photographs, and scripts in processes that can be killed."""

import contextlib
import functools
import importlib
import json
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch._dynamo  # an optimizer's first step imports it, in each process anew
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARDS = hasattr(torch.cpu.Stream, "record_event")  # not torch 2.6: no FSDP2 on CPUs


class Golden(dict):
    """The arrays of a golden file as tensors, and lists of names; keys are attributes too."""

    __getattr__ = dict.__getitem__


def golden_tensors(folder, name):
    """Return golden/FOLDER/NAME.npz as a Golden.

    Halves and short integers, which save space, become float32 and int64.
    """
    golden = Golden()
    kinds = {"e": "f", "b": "l", "h": "l", "i": "l"}
    for key, array in np.load(GOLDEN / folder / f"{name}.npz").items():
        if array.dtype.kind == "U":
            golden[key] = array.tolist()
        else:
            kind = kinds.get(array.dtype.char, array.dtype)
            golden[key] = torch.from_numpy(array.astype(kind))
    return golden


def double(numbers):
    """Return numbers, an array or a tensor as float64, without gradient."""
    return torch.as_tensor(numbers, dtype=torch.float64).detach()


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    torch.testing.assert_close(double(actual), double(expected), atol=atol, rtol=rtol)


def compare(golden, prefix="", at=..., atol=0.0, rtol=0.0, **found):
    """Assert that each found value is near golden[prefix + its name][at]."""
    expected = {name: double(golden[prefix + name][at]) for name in found}
    found = {name: double(value) for name, value in found.items()}
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)  # an error names the key


def norms(module, names, gradients=False):
    """Return the norms of some parameters of a module, or of their gradients."""
    found = [module.get_parameter(name) for name in names]
    return torch.stack([(p.grad if gradients else p).norm() for p in found])


def groups_of(optimizer, model):
    """Return the names of the parameters in each of an optimizer's groups."""
    names = {p: name for name, p in model.named_parameters()}
    return [{names[p] for p in group["params"]} for group in optimizer.param_groups]


def networks(module, path, heads=2, **fields):
    """Return (config, model, target) with the weights of a checkpoint."""
    weights = module.read_weights(path, heads)
    config = module.Config(**weights["fields"], **fields)
    model, target = module.build(config)
    module.load_weights(model, target, weights, path)
    return config, model, target


def count(module):
    """Return how many parameters a module has."""
    return sum(p.numel() for p in module.parameters())


def photographs(folder, count=12, size=(48, 40), classes=("cat", "dog"), splits=("train", "val")):
    """Make a labelled folder of random images; splits or classes "." are left out of the path."""
    random = np.random.default_rng(0)
    for split in splits:
        for i in range(count):
            path = folder / split / classes[i % len(classes)] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return folder


def log_rows(out):
    """Return the objects of a run's log.jsonl."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def free_port():
    """Return a port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment():
    """Return variables for no accelerator and one thread: results depend little on the machine."""
    kept = {k: v for k, v in os.environ.items() if k not in ("DATA", "RANK", "WORLD_SIZE")}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def words(flags):
    """Return the words of several flags."""
    return " ".join(map(str, flags)).split()


# ------------------------------------------------------------------------------- forked processes


@functools.cache
def forks():
    """Return a context whose processes start in milliseconds.

    They are copies of one that has imported the scripts, which takes seconds, and has no threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers", *(path.stem for path in ROOT.glob("*.py"))])
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with mock.patch.dict(os.environ, environment() | paths, clear=True):
        multiprocessing.forkserver.ensure_running()
    return context


def call_line(script, *flags):
    """Take the place of `python SCRIPT.py FLAGS`."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loading processes, as usual
    sys.argv = [f"{script}.py", *flags]
    importlib.import_module(script).main(list(flags))


def call_lines(rank, ranks, port, lines):
    """Call command lines, [script, *flags], one after the other, where torchrun starts a rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    for line in lines:
        call_line(*line)


def on_ranks(function, *args, ranks, timeout=600):
    """Call function(rank, *args) in one process a rank, to the end of all, or raise as one does."""
    forks()
    group = torch.multiprocessing.start_processes(
        function, args, ranks, join=False, start_method="forkserver"
    )
    end = time.monotonic() + timeout
    while not group.join(1):
        if time.monotonic() > end:
            for process in group.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} takes too long on {ranks} ranks")


def run_several(*lines, ranks):
    """Run command lines, "SCRIPT FLAGS", one after the other in the same processes, one a rank."""
    on_ranks(call_lines, ranks, free_port(), [line.split() for line in lines], ranks=ranks)


def child(function, args, pipe, variables):
    """Call a function in a forked process, as if a shell had started it."""
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    for number in (1, 2):
        os.dup2(pipe.fileno(), number)
    sys.stdout = sys.stderr = open(1, "w", buffering=1)  # noqa: SIM115
    code = 0
    try:
        function(*args)
    except SystemExit as stop:  # whose traceback would keep loading processes alive
        code = stop.code
    sys.exit(code)


class Forked:
    """A function in a process and a process group of its own, which can be signalled."""

    context = staticmethod(forks)

    def __init__(self, function, *args):
        context = self.context()
        self.pipe, end = context.Pipe(duplex=False)  # unlike a file, no full disk silences it
        self.process = context.Process(target=child, args=(function, args, end, environment()))
        self.process.start()
        self.pid = self.process.pid
        end.close()

    def code(self):
        """Return the exit code, negative for a signal, or None while it runs."""
        return self.process.exitcode

    def kill(self, number=signal.SIGKILL):
        """Signal the whole group, loading processes too, as a terminal does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def printed(self, timeout=120):
        """Wait for the end; return all that was printed."""
        printed = b""
        while self.pipe.poll(timeout):
            part = os.read(self.pipe.fileno(), 1 << 16)
            if not part:  # all of the group have closed it
                self.process.join()
                return printed.decode()
            printed += part
        self.kill()
        raise AssertionError(f"silent for {timeout} seconds: {printed.decode()}")


def start(script, *flags):
    """Start a script in a forked process."""
    return Forked(call_line, Path(script).stem, *words(flags))


def wait_for(condition, process, seconds=120):
    """Wait until condition() holds; fail if the process ends before, or takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        if process.code() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"ended too early or hangs: {process.printed()}")
        time.sleep(0.005)


def progress(out):
    """Return how many rows a run has written, of its log and of answers."""
    return sum(path.read_bytes().count(b"\n") for path in Path(out).glob("*.jsonl"))


def wait_for_rows(out, rows, process):
    """Wait until a run has written that many rows."""
    wait_for(lambda: progress(out) >= rows, process)
