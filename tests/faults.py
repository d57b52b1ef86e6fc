# SPDX-License-Identifier: MIT
# ruff: noqa: E402
"""Break every script on purpose and print what survives, as a Markdown table.

    python tests/faults.py                                   # everything
    python tests/faults.py --scripts iwm msn --faults kill disk

tests/test_runs.py holds what every script promises. Here are the ruder faults: real processes,
real signals, broken files. A run survives if it leaves with the promised exit code and one line
that says why. Where it goes on, it must end with the bits of a run that nobody disturbed.
Exits with 1 if anything failed.

Runs are forked from this process, since importing torch takes seconds. So this process must never
train: threads of a parent are missing in its children.
"""

import argparse
import ctypes
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from helpers import Forked, call_line, free_port, log_rows, photographs, progress, wait_for_rows
from helpers import words
from stand_in import solve
from test_runs import SCRIPTS, Script
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._pytree import tree_leaves

import common
import mvp_eval

ASK = "--scenes 2 --baseline none --concurrency 2 --fn faults:solve_slowly "
CASES = {}  # test_runs' scripts, with the run that is disturbed
for name, script in SCRIPTS.items():
    CASES[name] = replace(script, small=f"{script.small} --steps 24 --save-every 1 ")
CASES["mvp_eval"] = Script(mvp_eval, ASK, ASK, "")


class NotApplicable(Exception):
    """A fault that a script cannot meet. The text says why."""


def trains(case):
    """Return whether a script trains. The other one asks questions."""
    return case.module is not mvp_eval


def assert_equal(a, b, what):
    """Check that two nested states hold the same values, bit for bit."""
    same = []
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        same.append(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y)
    assert all(same), f"{what}: {same.count(False)} of {len(same)} values differ"


def result(out):
    """Return all that a run ended with: its checkpoint and losses, or its answers."""
    if not (Path(out) / "last.pt").exists():
        return {key: row["reply"] for key, row in sorted(mvp_eval.load_answers(out).items())}
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    del state["config"], state["log_bytes"]
    state["log"] = [(row["step"], row["loss"]) for row in log_rows(out) if "loss" in row]
    return state


def assert_same(out, other):
    """Check that two runs ended alike."""
    assert_equal(result(out), result(other), f"{out} and {other}")


# --------------------------------------------------------------------------------------- processes


class Child(Forked):
    """A function in a copy of this process."""

    context = staticmethod(partial(multiprocessing.get_context, "fork"))

    def end(self, *codes):
        """Wait for the end, with one of these exit codes (0), and return what was printed.

        Errors must be one line, and no traceback.
        """
        printed, _ = self.communicate()
        assert self.poll() in (codes or (0,)), f"exit code {self.poll()}, not {codes}: {printed}"
        assert "Traceback" not in printed, f"a traceback: {printed}"
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == bool(self.poll()), f"not one line that says why: {printed}"
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


def kill(case):
    """`kill -9` at random moments, then `--resume`."""
    began = time.monotonic()
    start(case, "--out whole").end()
    longest = 0.6 * (time.monotonic() - began)
    chance = random.Random(case.name)
    killed = 0
    for _ in range(4):
        process = start(case, "--out killed --resume")
        time.sleep(chance.uniform(0.3, 1.0) * longest)
        killed += process.poll() is None
        process.kill()
        process.communicate()
    assert killed >= 2, f"only {killed} of 4 were killed before their end"
    run(case, "--out killed --resume")
    assert_same("whole", "killed")


def at_most(size):
    """Let no file grow beyond a size in bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def disk(case):
    """Full disk, met by each file."""
    run(case, "--out whole")
    files = [path for path in Path("whole").iterdir() if path.is_file()]
    largest = max(path.stat().st_size for path in files)
    flags = "--out full --resume " + "--save-every 500" * trains(case)
    for size in (0, 800, largest // 2, largest - 1):
        printed = run(case, flags, codes=[1], before=partial(at_most, size))
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


def checkpoint(case):
    """Flipped bits and cut ends in a checkpoint."""
    if not trains(case):
        raise NotApplicable("it has no checkpoints")
    flags = "--steps 1 --out good --resume"
    run(case, flags)
    last = Path("good/last.pt")
    whole = last.read_bytes()
    state = result("good")
    chance = random.Random(case.name)
    refused = 0
    for i in range(20):
        place = chance.randrange(len(whole))
        damaged = bytearray(whole if i % 4 else whole[: place + 1])
        damaged[place] ^= 1 << chance.randrange(8)
        last.write_bytes(damaged)
        process = start(case, flags, before=int)
        process.end(0, 2)
        if process.poll():
            refused += 1
        else:  # a bit of the archive's own data may be one that nobody reads
            assert_equal(result("good"), state, f"byte {place} of {len(whole)} damaged")
    assert refused > 10, f"only {refused} of 20 were refused"
    last.write_bytes(whole)
    run(case, "--steps 2 --out good --resume")


def flood(case):
    """Most images broken, then gone, during the run."""
    if not trains(case):
        raise NotApplicable("tests/test_mvp_eval.py breaks its videos")
    good = photographs(Path("good"), count=200)
    case = replace(case, small=f"{case.folder} --steps 60 --save-every 1 --workers 1")
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


def rank(case):
    """A rank dies under `torchrun --max-restarts`."""
    Child(torchrun, case.name, *words([case.small, "--out two"])).end()
    for doomed in (0, 1):
        out = f"restarted{doomed}"
        launcher = Child(torchrun, case.name, *words([case.small, f"--out {out} --resume"]))
        wait_for_rows(out, 6, launcher)
        first = Path(f"rank{doomed}").read_text()
        os.kill(int(first), signal.SIGKILL)
        printed, _ = launcher.communicate()
        assert launcher.poll() == 0, f"exit code {launcher.poll()}\n{printed[-3000:]}"
        assert Path(f"rank{doomed}").read_text() != first, "it was not started again"
        assert_same("two", out)


def twice(case):
    """Two runs, one `--out`."""
    run(case, "--out whole")
    pair = [start(case, "--out race --resume") for _ in range(2)]  # at one moment
    printed = [process.communicate()[0] for process in pair]
    codes = sorted(process.poll() for process in pair)
    assert codes == [0, 2], f"exit codes {codes} of two runs in one folder: {printed}"
    assert_same("whole", "race")


def folder(case):
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


def network(case):
    """A download that breaks off."""
    data = "cifar10" if trains(case) else "hub"
    printed = Child(call_broken, break_off, case.name, "--data", data).end(2)
    assert "data/" in printed and printed.count("\n") == 1, printed
    left = [str(path) for path in Path("data").rglob("*") if path.is_file()]
    assert not left, f"left behind: {left}"


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


def memory(case):
    """A /dev/shm that is too small."""
    if not trains(case):
        raise NotApplicable("it has no loading processes")
    process = start(case, "--workers 1 --batch 64 --out out", before=shrink_shared_memory)
    printed, _ = process.communicate()
    if process.poll() == 99:
        raise NotApplicable("this system does not let /dev/shm be made smaller")
    assert process.poll() == 1 and "--shm-size" in printed, printed


FAULTS = [kill, disk, checkpoint, flood, rank, twice, folder, network, memory]


# -------------------------------------------------------------------------------------------- main


def attempt(case, fault):
    """Return one cell of the table. Whatever a broken run does, the others get their turn."""
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            fault(case)
        except NotApplicable as reason:
            return f"not applicable: {reason}"
        except Exception:
            traceback.print_exc()
            return "FAILED"
        finally:
            os.chdir("/")
        return "survived"


def main(argv=None):
    """Break what was asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    named = {fault.__name__: fault for fault in FAULTS}
    parser.add_argument("--scripts", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--faults", nargs="+", choices=named, default=list(named))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for toy in common.TOYS.values():  # drawn once, so that the children need not
        for split in ("train", "val"):
            toy(split)
    rows = [["", *options.scripts], ["---"] * (1 + len(options.scripts))]
    for name in options.faults:
        rows.append([named[name].__doc__.rstrip(".")])
        for script in options.scripts:
            rows[-1].append(attempt(CASES[script], named[name]))
            print(script, name, rows[-1][-1], file=sys.stderr, flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    print(table)
    return int("FAILED" in table)


if __name__ == "__main__":
    sys.exit(main())
