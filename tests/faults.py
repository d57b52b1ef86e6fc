"""Break every script on purpose: real processes, real signals, broken files.

    pytest tests/faults.py -v                      # everything
    pytest tests/faults.py -v -k "(iwm or msn) and disk"

tests/test_runs.py holds what every script promises, `kill -9` at any moment among it. Here are the
ruder faults. A run survives if it leaves with the promised exit code and one line that says why.
Where it goes on, it must end with the bits of a run that nobody disturbed.

Runs are forked from this process, since importing torch takes seconds. So this process must never
train: threads of a parent are missing in its children.
"""

import ctypes
import multiprocessing
import os
import random
import shutil
import signal
import socket
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import Forked, call_line, free_port, log_rows, photographs, progress, wait_for_rows
from helpers import words
from stand_in import solve
from test_runs import SCRIPTS, Script, full_disk
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._pytree import tree_leaves

import common
import mvp_eval

ASK = "--scenes 2 --baseline none --concurrency 2 --fn faults:solve_slowly "
CASES = {}  # test_runs' scripts, with the run that is disturbed
for name, script in SCRIPTS.items():
    CASES[name] = replace(script, small=f"{script.small} --steps 24 --save-every 1 ")
CASES["mvp_eval"] = Script(mvp_eval, ASK, ASK, "")


@pytest.fixture(params=CASES)
def case(request):
    """Each script in turn. Toys are drawn once, so that the children need not."""
    for toy in common.TOYS.values():
        for split in ("train", "val"):
            toy(split)
    return CASES[request.param]


@pytest.fixture(params=SCRIPTS)
def trainer(request):
    """Each script that trains: the other one has no checkpoints and no loading processes."""
    return CASES[request.param]


def result(out):
    """Return all that a run ended with: its checkpoint and losses, or its answers."""
    if not (Path(out) / "last.pt").exists():
        return {key: row["reply"] for key, row in sorted(mvp_eval.load_answers(out).items())}
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    del state["config"], state["log_bytes"]
    state["log"] = [(row["step"], row["loss"]) for row in log_rows(out) if "loss" in row]
    return state


def assert_same(out, other):
    """Check that two runs ended alike, bit for bit."""
    for x, y in zip(tree_leaves(result(out)), tree_leaves(result(other)), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


# --------------------------------------------------------------------------------------- processes


class Child(Forked):
    """A function in a copy of this process."""

    context = staticmethod(partial(multiprocessing.get_context, "fork"))

    def end(self, *codes):
        """Wait for the end, with one of these exit codes (0), and return what was printed.

        Errors must be one line, and no traceback.
        """
        printed = self.printed()
        assert self.code() in (codes or (0,)), printed
        assert "Traceback" not in printed
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == bool(self.code()), printed
        return printed


def call_broken(before, name, *flags):
    """Break something, then take the place of `python NAME.py FLAGS`."""
    before()
    call_line(name, *flags)


def slowly():
    """Make a step last long enough to be disturbed. Its numbers stay what they are."""
    update = common.Run.update

    def slow(*args, **options):
        time.sleep(0.05)
        return update(*args, **options)

    common.Run.update = slow


def solve_slowly(*asked):
    """Answer a toy question, late enough to be disturbed."""
    time.sleep(0.05)
    return solve(*asked)


def start(case, *flags, before=slowly):
    """Start a script's small run, with more flags."""
    return Child(call_broken, before, case.name, *words([case.small, *flags]))


def run(case, *flags, codes=(0,), before=int):
    """Run a script's small run to its end; return what it printed."""
    return start(case, *flags, before=before).end(*codes)


# ------------------------------------------------------------------------------------------ faults


def test_disk(case):
    """Full disk, met by each file."""
    run(case, "--out whole")
    files = [path for path in Path("whole").iterdir() if path.is_file()]
    largest = max(path.stat().st_size for path in files)
    flags = "--out full --resume " + "--save-every 500" * (case.name in SCRIPTS)
    for size in (0, 800, largest // 2, largest - 1):
        printed = run(case, flags, codes=[1], before=full_disk(size).__enter__)
        assert "disk is full" in printed or "could not write" in printed, printed
    run(case, flags)
    assert_same("whole", "full")
    for path in files:
        if path.suffix in (".pt", ".png", ".json", ".md"):
            out = Path(f"full-{path.name}")
            out.mkdir()
            full = out / path.name.replace("last.pt", "last.pt.tmp")
            full.symlink_to("/dev/full")
            printed = run(case, f"--out {out} --resume", codes=[1])
            assert "No space left" in printed and "--resume" in printed, printed
            full.unlink(missing_ok=True)
            run(case, f"--out {out} --resume")
            assert_same("whole", out)


def test_checkpoint(trainer):
    """Flipped bits and cut ends in a checkpoint."""
    flags = "--steps 1 --out good --resume"
    run(trainer, flags)
    last = Path("good/last.pt")
    whole = last.read_bytes()
    shutil.copytree("good", "whole")
    chance = random.Random(trainer.name)
    refused = 0
    for i in range(20):
        place = chance.randrange(len(whole))
        damaged = bytearray(whole if i % 4 else whole[: place + 1])
        damaged[place] ^= 1 << chance.randrange(8)
        last.write_bytes(damaged)
        process = start(trainer, flags, before=int)
        process.end(0, 2)
        if process.code():
            refused += 1
        else:  # a bit of the archive's own data may be one that nobody reads
            assert_same("whole", "good")
    assert refused > 10
    last.write_bytes(whole)
    run(trainer, "--steps 2 --out good --resume")


def test_flood(trainer):
    """Most images broken, then gone, during the run."""
    good = photographs(Path("good"), count=200)
    case = replace(trainer, small=f"{trainer.folder} --steps 60 --save-every 1 --workers 1")
    flags = "--data photos --out flood --resume"
    chance = random.Random(case.name)
    ways = (
        lambda path: path.write_bytes(chance.randbytes(1000)),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        Path.unlink,
    )
    for way in ways:
        shutil.copytree(good, "photos", dirs_exist_ok=True)
        process = start(case, flags)
        wait_for_rows("flood", progress("flood") + 4, process)
        for path in Path("photos").rglob("*.jpg"):
            way(path)
        assert "could not be read" in process.end(2)
    shutil.copytree(good, "photos", dirs_exist_ok=True)
    run(case, flags)


def ranked(name, flags):
    """Run a script as a rank, which says where it can be killed."""
    Path(f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
    call_broken(slowly, name, *flags)


def torchrun(name, *flags):
    """Take the place of `torchrun --nproc-per-node 2 --max-restarts 1 NAME.py FLAGS`."""
    options = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 1}
    options.update(rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{free_port()}")
    options.update(rdzv_configs={"rank": 0, "timeout": 60}, monitor_interval=0.1)
    config = LaunchConfig(**options, run_id="faults", start_method="fork")
    elastic_launch(config, ranked)(name, flags)


def test_rank(case):
    """A rank dies under `torchrun --max-restarts`."""
    Child(torchrun, case.name, *words([case.small, "--out two"])).end()
    for doomed in (0, 1):
        out = f"restarted{doomed}"
        launcher = Child(torchrun, case.name, *words([case.small, f"--out {out} --resume"]))
        wait_for_rows(out, 6, launcher)
        first = Path(f"rank{doomed}").read_text()
        os.kill(int(first), signal.SIGKILL)
        printed = launcher.printed()
        assert launcher.code() == 0, printed
        assert Path(f"rank{doomed}").read_text() != first, "it was not started again"
        assert_same("two", out)


def test_twice(case):
    """Two runs, one `--out`."""
    run(case, "--out whole")
    pair = [start(case, "--out race --resume") for _ in range(2)]  # at one moment
    printed = [process.printed() for process in pair]
    assert sorted(process.code() for process in pair) == [0, 2], printed
    assert_same("whole", "race")


def test_folder(case):
    """An output folder that cannot be written."""
    Path("file").touch()
    Path("closed").mkdir(mode=0o555)
    places = ["file/run", "/proc"]
    places += ["closed/run"] * bool(os.getuid())  # root may write anywhere
    for place in places:
        printed = run(case, f"--out {place} --resume", codes=[2])
        assert f"cannot write to {place}" in printed, printed


def break_off():
    """Let every download end in the middle."""
    server = socket.create_server(("127.0.0.1", 0))
    common.CIFAR10_URL = mvp_eval.HUB = f"http://127.0.0.1:{server.getsockname()[1]}/x?"
    mvp_eval.download_annotations = partial(mvp_eval.download_annotations, pause=0.01)

    def serve():
        while True:
            connection, _ = server.accept()
            connection.recv(10000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"{" * 5000)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()


def test_network(case):
    """A download that breaks off."""
    data = "cifar10" if case.name in SCRIPTS else "hub"
    printed = Child(call_broken, break_off, case.name, "--data", data).end(2)
    assert "data/" in printed and printed.count("\n") == 1, printed
    assert not [path for path in Path("data").rglob("*") if path.is_file()]


def shrink_shared_memory():
    """Give this process a /dev/shm of 64 KiB; exit with 99 where that is not allowed."""
    libc = ctypes.CDLL(None)
    maps = {"uid_map": os.getuid(), "gid_map": os.getgid()}
    if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS
        os._exit(99)
    Path("/proc/self/setgroups").write_text("deny")
    for name, number in maps.items():
        Path("/proc/self", name).write_text(f"{number} {number} 1")
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
        os._exit(99)


def test_memory(trainer):
    """A /dev/shm that is too small."""
    process = start(trainer, "--workers 1 --batch 64 --out out", before=shrink_shared_memory)
    printed = process.printed()
    if process.code() == 99:
        pytest.skip("this system does not let /dev/shm be made smaller")
    assert process.code() == 1 and "--shm-size" in printed, printed
