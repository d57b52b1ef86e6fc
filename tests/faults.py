# SPDX-License-Identifier: MIT
# ruff: noqa: E402
"""Break every script on purpose and print what survives, as a Markdown table.

    python tests/faults.py                                      # everything, a quarter of an hour
    python tests/faults.py --scripts iwm msn --faults kill disk --out DIR     # also DIR/faults.md

tests/test_runs.py holds what every script promises. Here are the ruder faults: real processes,
real signals, broken files. A run survives if it leaves with the promised exit code and one line
that says why. Where it goes on, it must end with the bits of a run that nobody disturbed.
Exits with 1 if anything failed.

Runs are forked from this process, since importing torch takes seconds. So this process must never
train: threads of a parent are missing in its children.
"""

import argparse
import contextlib
import ctypes
import importlib
import io
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
import torch._dynamo  # which an optimizer's first step would import, in each child anew
from helpers import free_port, kill_at_random, log_rows
from stand_in import solve
from test_runs import SCRIPTS, Script, photographs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import common
import mvp_eval

STEPS = 24
ASK = "--scenes 2 --baseline none --concurrency 2 --fn faults:solve_slowly "
CASES = {}  # test_runs' scripts, with the run that is disturbed
for name, script in SCRIPTS.items():
    CASES[name] = replace(script, small=f"{script.small} --steps {STEPS} --save-every 1 ")
CASES["mvp_eval"] = Script(mvp_eval, ASK, ASK, "")


class NotApplicable(Exception):
    """A fault that a script cannot meet. The text says why."""


def trains(case):
    """Return whether a script trains; the other asks questions."""
    return case.module is not mvp_eval


def progress(out):
    """Return how many steps or answers a run has written."""
    return sum(path.read_bytes().count(b"\n") for path in Path(out).glob("*.jsonl"))


def leaves(state, place=""):
    """Yield (place, value) of all that a nested state holds, tensors as bytes."""
    if isinstance(state, (dict, list, tuple)):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in pairs:
            yield from leaves(value, f"{place}.{key}")
    elif isinstance(state, torch.Tensor):
        yield place, state.numpy().tobytes()
    else:
        yield place, state


def assert_equal(a, b, what):
    """Check that two nested states are the same, bit for bit."""
    a = dict(leaves(a))
    b = dict(leaves(b))
    found = [place for place in a.keys() | b.keys() if a.get(place) != b.get(place)]
    assert not found, f"{what}: {len(found)} of {len(a)} values differ, such as {found[:3]}"


def result(out):
    """Return all that a run ended with: its log and checkpoint, or its answers."""
    if not (Path(out) / "last.pt").exists():
        return {key: row["reply"] for key, row in mvp_eval.load_answers(out).items()}
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    del state["config"], state["log_bytes"]
    state["log"] = [(row["step"], row["loss"]) for row in log_rows(out) if "loss" in row]
    return state


def assert_same(out, other):
    """Check that two runs ended alike."""
    assert_equal(result(out), result(other), f"{out} and {other}")


# --------------------------------------------------------------------------------------- processes


def child(function, args, pipe):
    """Call a function in a forked process, as if started from a shell."""
    os.setsid()
    os.dup2(pipe, 1)  # a pipe, so that a full disk does not silence it
    os.dup2(pipe, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(function(*args))


class Forked:
    """A function that runs in a process of its own, with what the faults need of Popen."""

    def __init__(self, function, *args):
        self.what = f"{function.__name__} {args}"
        self.pipe, end = os.pipe()
        os.set_blocking(self.pipe, False)
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=child, args=(function, args, end))
        self.process.start()
        self.pid = self.process.pid
        os.close(end)

    def poll(self):
        """Return the exit code, negative for a signal, or None while it runs."""
        return self.process.exitcode

    def communicate(self, timeout=120):
        """Wait for the end; return (what was printed, None)."""
        self.process.join(timeout)
        late = self.process.is_alive()
        if late:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.join()
        printed = b""
        with contextlib.suppress(BlockingIOError):
            printed = os.read(self.pipe, 1 << 20)
        os.close(self.pipe)
        assert not late, f"no end after {timeout} s: {self.what}\n{printed.decode()}"
        return printed.decode(), None

    def end(self, *codes):
        """Wait for the end and return what was printed.

        Checks the exit code, that errors are one line, and that there is no traceback.
        """
        printed, _ = self.communicate()
        shown = f"{self.what}\n{printed}"
        assert self.poll() in (codes or (0,)), f"exit code {self.poll()}, not {codes}: {shown}"
        assert "Traceback" not in printed, f"a traceback: {shown}"
        if self.poll():
            errors = [line for line in printed.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, f"not one line that says why: {shown}"
        return printed


def command_line(name, words, before):
    """Take the place of `python NAME.py WORDS`."""
    before()
    sys.argv = [f"{name}.py", *words]
    return importlib.import_module(name).main(words)


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
    return Forked(command_line, case.name, " ".join([case.small, *flags]).split(), before)


def run(case, *flags, codes=(0,), before=lambda: None):
    """Run a script's small run to its end; return what it printed."""
    return start(case, *flags, before=before).end(*codes)


def wait_for(process, out, rows=4):
    """Wait until a run has written so many rows."""
    while progress(out) < rows:
        assert process.poll() is None, f"ended by itself: {process.communicate()[0]}"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------ faults


def kill(case):
    """`kill -9` at random moments, then `--resume`."""
    began = time.monotonic()
    start(case, "--out whole").end()
    longest = 0.6 * (time.monotonic() - began)
    killed = kill_at_random(
        case, "--out killed", times=4, seed=case.name, longest=longest, start=start
    )
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
    for size in (0, 800, 4000, largest // 2, largest - 1):
        printed = run(case, flags, codes=[1], before=partial(at_most, size))
        assert "disk is full" in printed or "could not write" in printed, printed
    run(case, flags)
    assert_same("whole", "full")
    for path in files:
        if path.suffix in (".pt", ".png", ".json", ".md"):
            name = path.name.replace("last.pt", "last.pt.tmp")
            out = Path(f"full-{name}")
            out.mkdir()
            (out / name).symlink_to("/dev/full")
            printed = run(case, f"--out {out} --resume", codes=[1])
            assert "No space left" in printed and "--resume" in printed, printed
            (out / name).unlink(missing_ok=True)
            run(case, f"--out {out} --resume")
            assert_same("whole", out)


class Code:
    """Pickles to code that makes a folder `ran`."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def read_damaged(path, seed):
    """Turn one bit, or cut the end: each file is refused, or reads as the whole one does."""
    whole = Path(path).read_bytes()
    expected = common.load_checkpoint(path)
    chance = random.Random(seed)
    refused = 0
    for i in range(200):
        place = chance.randrange(len(whole))
        flipped = bytes([whole[place] ^ 1 << chance.randrange(8)])
        rest = whole[place + 1 :] if i % 4 else b""
        Path("damaged.pt").write_bytes(whole[:place] + flipped + rest)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                state = common.load_checkpoint("damaged.pt")
        except SystemExit:
            refused += 1
        else:
            assert_equal(expected, state, f"byte {place} of {len(whole)} damaged")
    assert refused > 100, f"only {refused} of 200 were refused"


def checkpoint(case):
    """Flipped bits, cut files and code in a checkpoint."""
    if not trains(case):
        raise NotApplicable("it has no checkpoints")
    run(case, "--steps 1 --out good")
    last = Path("good/last.pt")
    whole = last.read_bytes()
    Forked(read_damaged, last, case.name).end()
    torch.save({"model": Code()}, "code.pt")
    files = [Path("code.pt").read_bytes(), b"", bytes(len(whole)), whole[:-1]]
    for data in files:
        last.write_bytes(data)
        assert "good/last.pt" in run(case, "--steps 2 --out good --resume", codes=[2])
        assert last.read_bytes() == data, "the file was changed"
        assert not Path("ran").exists(), "code in a checkpoint was run"
    last.write_bytes(whole)
    run(case, "--steps 2 --out good --resume")


def damage(path, way, chance):
    """Break a file in place, in one of five ways."""
    data = bytearray(path.read_bytes())
    for place in chance.sample(range(len(data)), 20):
        data[place] ^= 1 << chance.randrange(8)
    cut = data[: chance.randrange(len(data))]
    noise = chance.randbytes(len(data))
    path.write_bytes((data, cut, noise, bytes(len(data)), b"")[way])


def flood(case):
    """Most images broken, then gone, during the run."""
    if not trains(case):
        raise NotApplicable("tests/test_mvp_eval.py breaks its videos")
    photographs(Path("photos"), count=200)
    shutil.copytree("photos", "good")
    files = list(Path("photos").rglob("*.jpg"))
    case = replace(case, small=f"{case.folder} --steps 60 --save-every 1 --workers 1")
    flags = "--data photos --out flood --resume"
    process = start(case, flags)
    wait_for(process, "flood")
    chance = random.Random(case.name)
    for i, path in enumerate(files):
        damage(path, i % 5, chance)
    assert "could not be read" in process.end(2)
    run(case, flags, codes=[2])
    shutil.copytree("good", "photos", dirs_exist_ok=True)
    process = start(case, flags)
    wait_for(process, "flood", progress("flood") + 4)
    for path in files:
        path.unlink()
    assert "could not be read" in process.end(2)
    shutil.copytree("good", "photos", dirs_exist_ok=True)
    run(case, flags)


def ranked(name, words):
    """Run a script as a rank, which says where it can be killed."""
    Path(f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
    command_line(name, words, slowly)


def torchrun(name, words):
    """Take the place of `torchrun --nproc-per-node 2 --max-restarts 1 NAME.py WORDS`."""
    options = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 1}
    options.update(rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{free_port()}")
    options.update(rdzv_configs={"rank": 0, "timeout": 60}, monitor_interval=0.1)
    config = LaunchConfig(**options, run_id="faults", start_method="fork")
    elastic_launch(config, ranked)(name, words)


def rank(case):
    """A rank dies under `torchrun --max-restarts`."""
    Forked(torchrun, case.name, f"{case.small} --out two".split()).end()
    for doomed in (0, 1):
        out = f"restarted{doomed}"
        launcher = Forked(torchrun, case.name, f"{case.small} --out {out} --resume".split())
        wait_for(launcher, out, 6)
        first = int(Path(f"rank{doomed}").read_text())
        os.kill(first, signal.SIGKILL)
        printed, _ = launcher.communicate()
        assert launcher.poll() == 0, f"exit code {launcher.poll()}\n{printed[-3000:]}"
        assert int(Path(f"rank{doomed}").read_text()) != first, "it was not started again"
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
    Path("file").write_text("")
    Path("closed").mkdir(mode=0o555)
    places = ["file/run", "/proc/none/run", "/proc"]
    places += ["closed", "closed/run"] if os.getuid() else []  # root may write anywhere
    for place in places:
        for more in ("", "--resume"):
            printed = run(case, f"--out {place}", more, codes=[2])
            assert f"cannot write to {place}" in printed, printed


def refuse_network():
    """Let every download meet a closed port."""
    os.environ["DATA"] = "store"
    for kind in ("http", "https"):
        os.environ[f"{kind}_proxy"] = f"http://127.0.0.1:{free_port()}"


def break_off():
    """Let every download end in the middle."""
    os.environ["DATA"] = "store"
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            connection = server.accept()[0]
            connection.recv(10000)
            header = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
            connection.sendall(header + b"{" * 5000)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}/x?"
    common.CIFAR10_URL = url
    mvp_eval.HUB = url


def network(case):
    """No network, or one that breaks off."""
    data = "cifar10" if trains(case) else "hub"
    mvp_eval.download_annotations = partial(mvp_eval.download_annotations, pause=0.01)
    for before in (refuse_network, break_off):
        printed = Forked(command_line, case.name, ["--data", data], before).end(2)
        assert "store" in printed and printed.count("\n") == 1, printed
        left = [str(path) for path in Path("store").rglob("*") if path.is_file()]
        assert not left, f"left behind: {left}"


def shrink_shared_memory():
    """Give this process a /dev/shm of 64 KiB; exit with 99 where that is not allowed."""
    libc = ctypes.CDLL(None)
    user = os.getuid()
    group = os.getgid()
    if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS
        os._exit(99)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
        os._exit(99)


def memory(case):
    """A /dev/shm that is too small."""
    if not trains(case):
        raise NotApplicable("it has no loading processes")
    process = start(case, "--workers 1 --batch 64 --out out", before=shrink_shared_memory)
    process.process.join(60)
    if process.poll() == 99:
        raise NotApplicable("this system does not let /dev/shm be made smaller")
    assert "--shm-size" in process.end(1)


FAULTS = [kill, disk, checkpoint, flood, rank, twice, folder, network, memory]


# -------------------------------------------------------------------------------------------- main


def attempt(case, fault):
    """Return one cell of the table: (survived, not applicable or FAILED; why)."""
    before = Path.cwd()
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    os.chdir(place)
    try:
        fault(case)
        return "survived", ""
    except NotApplicable as reason:
        return "not applicable", str(reason)
    except Exception:  # noqa: BLE001  whatever a broken run does, the others get their turn
        return "FAILED", traceback.format_exc()
    finally:
        os.chdir(before)
        shutil.rmtree(place, ignore_errors=True)


def as_table(cells, scripts, faults):
    """Return the results as Markdown. cells: {(script, fault): (outcome, why)}."""
    lines = [f"| | {' | '.join(scripts)} |", "|---" * (len(scripts) + 1) + "|"]
    for fault in faults:
        row = [fault.__doc__.rstrip(".")]
        for script in scripts:
            outcome, why = cells[script, fault]
            row.append(f"{outcome}: {why}" if outcome == "not applicable" else outcome)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    """Break what was asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    named = {fault.__name__: fault for fault in FAULTS}
    parser.add_argument("--scripts", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--faults", nargs="+", choices=named, default=list(named))
    parser.add_argument("--out", help="folder for faults.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in ("DATA", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    for toy in common.TOYS.values():  # drawn once, so that the children need not
        for split in ("train", "val"):
            toy(split)
    cells = {}
    faults = [named[name] for name in options.faults]
    for script in options.scripts:
        for fault in faults:
            began = time.monotonic()
            cells[script, fault] = attempt(CASES[script], fault)
            told = f"{script}, {fault.__name__}: {' '.join(cells[script, fault])}"
            print(f"{told} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
    table = as_table(cells, options.scripts, faults)
    print(table)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        (Path(options.out) / "faults.md").write_text(table)
    return int(any(outcome == "FAILED" for outcome, _ in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
