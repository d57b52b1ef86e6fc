"""Break every script in eleven ways and say what survives: real processes, real signals, files that are really broken.

python tests/faults.py                                                  # all of it: a quarter of an hour on a core
python tests/faults.py --scripts ijepa msn --faults kill disk --out DIR   # a part; writes DIR/faults.md and faults.json

Prints a Markdown table; exits with 1 if anything failed, after saying what. Runs are forked from this process, since
importing torch takes seconds, and end, die and are killed as if started from a shell; ranks by torchrun's agent.
This process must therefore never train: threads of a parent are missing in its children. Left out is only the report
that ends a run (pictures), for time.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
import torch._dynamo  # which an optimizer's first step would import, in each child anew
from helpers import free_port, kill_at_random, log_rows
from PIL import Image
from test_dinov2 import SMALL as SMALL_DINOV2
from test_llip import SMALL as SMALL_LLIP
from test_runs import SCRIPTS, Script, photographs, poison
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import common
import dinov2
import llip
import mvp_eval
import pixel_vit

STEPS = ("--steps", 24, "--save-every", 1)
SLOW = f"""import sys, time
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
import stand_in
def solve(*asked):
    time.sleep(0.05)
    return stand_in.solve(*asked)
"""


class NotApplicable(Exception):
    """A fault that a script cannot meet; the text says why."""


@dataclass
class Case(Script):
    """A script to be broken: test_runs' Script, and how far a run is, and whether two ended alike."""

    whole: tuple = STEPS  # flags of the run that is disturbed, besides `small`

    def progress(self, out):
        """Steps logged, or questions answered."""
        path = Path(out) / ("answers.rank0.jsonl" if self.module is mvp_eval else "log.jsonl")
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def assert_same(self, out, other):
        """Both runs ended with the same weights, optimizer and step, bit for bit, or with the same answers."""
        if self.module is mvp_eval:
            ours, theirs = answers(out), answers(other)
            assert ours == theirs, f"{len(ours)} and {len(theirs)} answers"
            return
        ours, theirs = (torch.load(Path(f) / "last.pt", weights_only=True) for f in (out, other))
        differ = [*differences({**ours, "config": 0}, {**theirs, "config": 0})]
        assert not differ, f"{other} differs from {out} in {len(differ)} places, such as {differ[:3]}"

    def assert_log(self, out):
        """The log has every step once."""
        if self.module is not mvp_eval:
            steps = [row["step"] for row in log_rows(out) if "loss" in row]
            assert steps == list(range(1, len(steps) + 1)), f"{out}/log.jsonl has gaps or repeats: {steps}"


CASES = {name: Case(**vars(script)) for name, script in SCRIPTS.items()}
CASES["llip"] = Case(llip, SMALL_LLIP, SMALL_LLIP, "contrastive_loss")
SMALL_DINOV2 = [*SMALL_DINOV2, "--koleo-group", "8"]  # of one rank of two
CASES["dinov2"] = Case(dinov2, SMALL_DINOV2, [*SMALL_DINOV2, "--preset", "toy"], "total_loss")
ASK = "--scenes 2 --baseline none --concurrency 2 --fn slow:solve".split()
CASES["mvp_eval"] = Case(mvp_eval, ASK, [*ASK, "--frames", "2"], "", whole=())
ORDER = "ijepa vjepa iwm flexpredict msn pmsn llip dinov2 pixel_vit mvp_eval".split()


def answers(out):
    """{key: reply} of a run; no question may have two answers."""
    rows = []
    for line in "".join(file.read_text() for file in sorted(Path(out).glob("answers*.jsonl"))).splitlines():
        with contextlib.suppress(ValueError):  # torn by a crash: the next run ends it and asks again
            rows.append(json.loads(line))
    found = {row["key"]: row["reply"] for row in rows if row["status"] == "ok"}
    assert len(found) == len(rows), f"{len(rows)} answers to {len(found)} questions"
    return found


def differences(a, b, place=""):
    """Where two nested states are not the same, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b)):
            yield from differences(*pair, f"{place}.{i}")
    elif not (torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b):
        yield place


# ---------------------------------------------------------------------------------------------------------- processes


def child(script, words, output, before):
    """What a forked process does: take the place of `python script.py words`."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("DATA", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    sys.argv = [script, *words]
    module = importlib.import_module(Path(script).stem)
    module.report = lambda *_: None
    before()
    sys.exit(module.main(words))


class Forked:
    """A running command line, with what the faults need of subprocess.Popen."""

    def __init__(self, script, *flags, before=lambda: None):
        self.output = tempfile.NamedTemporaryFile("r", dir=".", prefix="output-")  # noqa: SIM115
        self.words = [str(flag) for flag in flags]
        arguments = (script, self.words, self.output.name, before)
        self.process = multiprocessing.get_context("fork").Process(target=child, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        """The exit code (negative: the signal that ended it), or None while it runs."""
        return self.process.exitcode

    def communicate(self, timeout=120):
        """Wait for the end -> (what was printed, None)."""
        self.process.join(timeout)
        if self.process.is_alive():
            os.killpg(self.pid, signal.SIGKILL)
            self.process.join()
            printed = Path(self.output.name).read_text()
            raise AssertionError(f"no end after {timeout} s: {shlex.join(self.words)}\n{printed[-3000:]}")
        return Path(self.output.name).read_text(), None

    def end(self, code=0):
        """Wait for the end, check the exit code, and that errors are one line and no traceback -> what was printed."""
        printed, _ = self.communicate()
        shown = f"{shlex.join(self.words)}\n{printed[-3000:]}"
        assert self.poll() == code, f"exit code {self.poll()}, not {code}: {shown}"
        assert "Traceback" not in printed, f"a traceback: {shown}"
        if code:
            errors = [line for line in printed.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and printed.endswith(f"{errors[0]}\n"), f"not one line that says why: {shown}"
        return printed


def start(case, *flags, **options):
    """Start a script's small model -> Forked."""
    return Forked(f"{case.name}.py", *case.small, *flags, **options)


def run(case, *flags, code=0, **options):
    """Run a script's small model to its end -> what it printed."""
    return start(case, *flags, **options).end(code)


def wait_for(case, process, out, rows=4):
    """Wait until a run has logged so much."""
    while case.progress(out) < rows:
        assert process.poll() is None, f"ended by itself: {process.communicate()[0]}"
        time.sleep(0.01)


def slowly(case):
    """Make a step last long enough to be disturbed; its numbers stay what they are."""
    schedules = getattr(case.module, "schedules", None)

    def slow(*arguments):
        time.sleep(0.05)
        return schedules(*arguments)

    if schedules:
        case.module.schedules = slow


def draw_toy(case):
    """Have the toy images in this process, so that its children need not draw them."""
    if case.name not in ("vjepa", "mvp_eval"):
        draw = {"llip": llip.toy_world, "pixel_vit": pixel_vit.toy_shapes}.get(case.name, common.old_toy_images)
        module = case.module
        size = common.old_parse_config(module.Config, module.PRESETS, module.DATA_PRESETS, case.small).image_size
        for split in ("train", "val"):
            draw(split, size)


def undisturbed(case):
    """The folder of a run that nobody disturbs, made once, and the seconds it took."""
    if not Path("whole").exists():
        begun = time.monotonic()
        run(case, *case.whole, "--out", "whole", before=partial(slowly, case))
        Path("whole/seconds").write_text(str(time.monotonic() - begun))
    return "whole", float(Path("whole/seconds").read_text())


# ------------------------------------------------------------------------------------------------------------- faults


def kill(case):
    """kill -9 at random moments, run again with --resume."""
    whole, seconds = undisturbed(case)
    flags = [*case.small, *case.whole, "--out", "killed"]
    killed = kill_at_random(f"{case.name}.py", *flags, times=3, seed=case.name, longest=0.6 * seconds,
                            start=partial(Forked, before=partial(slowly, case)))  # fmt: skip
    assert killed >= 2, f"only {killed} of 3 were killed before their end"
    run(case, *case.whole, "--out", "killed", "--resume")
    case.assert_same(whole, "killed")
    case.assert_log("killed")


def disk(case):
    """A disk that is full: beyond a size (EFBIG), and at once (ENOSPC)."""

    def at_most(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    if case.module is mvp_eval:
        whole, _ = undisturbed(case)
        flags = ["--out", "full"]
        printed = run(case, *flags, code=1, before=partial(at_most, 12000))
        assert "the disk is full" in printed and "--resume" in printed, printed
        assert answers("full"), "nothing was kept"
        run(case, *flags, "--resume")
        case.assert_same(whole, "full")
        return
    run(case, "--steps", 2, "--out", "full")
    shutil.copytree("full", "log")
    shutil.copytree("full", "never-full")
    last, log = Path("full/last.pt"), Path("log/log.jsonl")
    log.write_text(log.read_text() + json.dumps({"step": 2, "note": "larger than config.json " * 1000}) + "\n")
    whole = last.read_bytes()
    flags = ["--steps", 4, "--resume", "--out"]
    run(case, *flags, "never-full")
    for before in (partial(at_most, len(whole) // 2), lambda: os.symlink("/dev/full", "full/last.pt.tmp")):
        printed = run(case, *flags, "full", code=1, before=before)
        assert "could not write" in printed and "the previous last.pt is intact" in printed, printed
        assert last.read_bytes() == whole and not list(Path("full").glob("*.tmp"))
    printed = run(case, *flags, "log", code=1, before=partial(at_most, log.stat().st_size + 50))
    assert "could not write log/log.jsonl" in printed and "--resume" in printed, printed
    assert Path("log/last.pt").read_bytes() == whole
    printed = run(case, "--steps", 4, "--out", "new", code=1, before=partial(at_most, 1500))
    assert "could not write" in printed, printed
    os.symlink("/dev/full", "full.npz")
    features = ["--eval", "features", "--init", "full/last.pt", "--features-out", "full.npz", "--device", "cpu"]
    printed = Forked(f"{case.name}.py", *features).end(1)
    assert "the disk is full" in printed, printed
    for out in ("full", "log"):
        run(case, *flags, out)
        case.assert_same("never-full", out)
        case.assert_log(out)
    run(case, *flags, "new")
    case.assert_log("new")


def flip_bit(data, position):
    """The bytes with one bit turned."""
    return data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :]


class Code:
    """Pickles to code that makes a folder `ran`."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def checkpoint(case):
    """Files that are no checkpoint, or no longer one, for --init and --resume."""
    if case.module is mvp_eval:
        raise NotApplicable("it has no checkpoints")
    run(case, "--steps", 1, "--out", "good")
    whole = Path("good/last.pt").read_bytes()
    with zipfile.ZipFile("good/last.pt") as archive:
        records = archive.infolist()
    tensor = max((r for r in records if "/data/" in r.filename), key=lambda r: r.file_size)
    names = {r.filename.split("/")[-1]: r for r in records}
    inside = {"tensor": tensor, "pickle": names["data.pkl"]}
    broken = {"empty": b"", "100": whole[:100], "half": whole[: len(whole) // 2], "all-but-one": whole[:-1]}
    for name, record in inside.items():
        start = record.header_offset + 30  # of name and padding, whose lengths stand before, then of the data
        lengths = [int.from_bytes(whole[start - i : start - i + 2], "little") for i in (2, 4)]
        broken[f"bit-in-{name}"] = flip_bit(whole, start + sum(lengths) + record.file_size // 2)
    broken["bit-in-directory"] = flip_bit(whole, whole.rindex(tensor.filename.encode()) + len(tensor.filename) - 1)
    broken |= {"text": b"hello\n" * 1000, "zeros": bytes(len(whole)), "code": pickle.dumps(Code())}
    for name, data in broken.items():
        Path(f"{name}.pt").write_bytes(data)
    torch.save({"model": Code()}, "code-in-zip.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save([1, 2], "list.pt")
    with zipfile.ZipFile("zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name in (*broken, "code-in-zip", "tensor", "list", "zip"):
        init = ["--init", f"{name}.pt", "--eval", "features", "--device", "cpu", "--out", "init"]
        assert f"{name}.pt" in Forked(f"{case.name}.py", *init).end(2), f"{name}.pt is not named"
        shutil.copy(f"{name}.pt", "good/last.pt")
        assert "good/last.pt" in run(case, "--steps", 2, "--out", "good", "--resume", code=2), name
        assert Path("good/last.pt").read_bytes() == Path(f"{name}.pt").read_bytes(), "the file was changed"
        assert not Path("ran").exists(), f"{name}.pt: code in a checkpoint was run"
    Path("good/last.pt").write_bytes(whole)
    run(case, "--steps", 2, "--out", "good", "--resume")


def short_videos(folder, count):
    """A folder of videos of 12 frames."""
    folder.mkdir(parents=True)
    picture = (np.arange(48 * 48 * 3) % 255).astype(np.uint8).reshape(48, 48, 3)
    mvp_eval.write_video(folder / "0.mp4", np.stack([np.roll(picture, i, 1) for i in range(12)]))
    for i in range(1, count):
        shutil.copy(folder / "0.mp4", folder / f"{i}.mp4")
    return folder


def data(case):
    """1 % corrupt files in the data: cut, empty, text; and one more than --max-bad allows."""
    if case.module is mvp_eval:
        return data_of_pairs(case)
    if case.name == "vjepa":
        files = sorted(short_videos(Path("clips"), 300).iterdir())
        regimes = [("--data", "clips")]
    else:
        files = sorted(photographs(Path("photos"), count=300, size=(40, 40), splits=("train",)).rglob("*.jpg"))
        photographs(Path("photos"), count=4, size=(40, 40), splits=("val",))
        regimes = [("--data", "photos", "--cache", gib) for gib in (2, 0)]
    broken = random.Random(case.name).sample(files, 4)
    contents = [broken[0].read_bytes()[:200], b"", b"not an image\n", b"\0" * 500]
    case = replace(case, small=case.folder)
    for number, allowed in ((3, True), (4, False)):
        for path, content in zip(broken[:number], contents):
            path.write_bytes(content)
        for i, flags in enumerate(regimes):
            flags = [*flags, "--steps", 20, "--workers", 0, "--out", f"data-{number}-{i}"]
            printed = run(case, *flags, code=0 if allowed else 2)
            for path in broken[:number] if allowed else ():
                assert printed.count(f"skipped an unreadable file: {path}") == 1, f"{path}:\n{printed}"
            assert allowed or "4 of 300 files could not be read" in printed, printed


def data_of_pairs(case):
    """The same for the videos of the toy pairs: broken ones are named, and leave pairs open."""
    run(case, "--scenes", 10, "--fn", "", "--baseline", "random", "--out", "toy")
    folder = Path("data/mvp_toy_10_0")
    files = sorted(p for p in (folder / "videos").rglob("*") if p.is_file())
    broken = random.Random(case.name).sample(files, 3)
    flags = ["--data", folder, "--concurrency", 4, "--fn", "quick:solve"]
    Path("quick.py").write_text(SLOW.replace("0.05", "0"))
    for path, content in zip(broken, (broken[0].read_bytes()[:200], b"", b"not a video\n"), strict=True):
        path.write_bytes(content)
    printed = run(case, *flags, "--out", "few", code=1)
    names = [path.relative_to(folder / "videos") for path in broken]
    assert all(f"video {name}" in printed for name in names), printed
    assert "questions have no answer" in printed and "Traceback" not in printed, printed


def nan(case):
    """Loss, or only the gradients, not finite: in one step, and in three in a row."""
    if case.module is mvp_eval:
        raise NotApplicable("it trains nothing")
    run(case, "--steps", 2, "--save-every", 1, "--out", "good")

    def poison_gradients(when):
        loss, calls = getattr(case.module, case.loss), []

        def poisoned(*args, **kwargs):
            calls.append(1)
            result = loss(*args, **kwargs)
            if when(len(calls)):
                (result[0] if isinstance(result, tuple) else result).register_hook(lambda gradient: gradient * np.nan)
            return result

        setattr(case.module, case.loss, poisoned)

    def poison_loss(when):
        poison(pytest.MonkeyPatch(), case, when, float("nan"))

    before = torch.load("good/last.pt", weights_only=True)
    for kind, break_it in (("loss", poison_loss), ("gradients", poison_gradients)):
        shutil.copytree("good", kind)
        run(case, "--steps", 3, "--save-every", 1, "--out", kind, "--resume",
            before=partial(break_it, lambda step: step == 1))  # fmt: skip
        after = torch.load(f"{kind}/last.pt", weights_only=True)
        assert after["step"] == 3
        parts = [k for k in before if k in ("model", "target", "teacher", "optimizer", "centres")]
        changed = [p for k in parts for p in differences(before[k], after[k], k)]
        learned = ("running_", "num_batches", ".lr", ".weight_decay")  # BatchNorm's statistics; schedules
        changed = [p for p in changed if not any(word in p for word in learned)]
        assert not changed, f"{kind}: a step that is not finite changed {changed[:5]}"
        run(case, "--steps", 4, "--save-every", 1, "--out", kind, "--resume")
        # log and checkpoints less and more often than one another; and nothing saved yet
        for log_every, save_every in ((1, 1), (1, 500)) if kind == "loss" else ((5, 1),):
            out = f"{kind}-{log_every}-{save_every}"
            flags = ["--steps", 12, "--log-every", log_every, "--save-every", save_every, "--out", out]
            printed = run(case, *flags, code=3, before=partial(break_it, lambda step: step > 4))
            last = Path(out, "last.pt")
            assert last.exists() == (f"{last} holds the last good" in printed), f"{last}: {last.exists()}\n{printed}"
            if last.exists():
                state = torch.load(last, weights_only=True)
                assert 4 <= state["step"] <= 6, state["step"]
                assert all(v.isfinite().all() for v in state["model"].values() if torch.is_tensor(v))
            run(case, *flags, "--resume")
            assert torch.load(last, weights_only=True)["step"] == 12


def ranked(script, words):
    """What each rank runs; it says where it can be killed."""
    Path(f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
    sys.argv = [script, *words]
    importlib.import_module(Path(script).stem).main(words)


def torchrun(script, words, port):
    """torchrun --nproc-per-node 2 --max-restarts 1 script words, with ranks that are forked too."""
    rendezvous = dict(rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{port}", rdzv_configs={"rank": 0, "timeout": 60})
    options = dict(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, monitor_interval=0.1, start_method="fork"
    )
    elastic_launch(LaunchConfig(**rendezvous, **options, run_id="faults"), ranked)(script, words)
    sys.exit(0)


def rank(case):
    """Two ranks under torchrun --max-restarts 1, and one of them dies in the middle."""
    script, words = f"{case.name}.py", [str(word) for word in (*case.small, *case.whole, "--out")]
    Forked(script, before=partial(torchrun, script, [*words, "two"], free_port())).end()
    launcher = Forked(script, before=partial(torchrun, script, [*words, "restarted", "--resume"], free_port()))
    doomed = random.Random(case.name).randrange(2)
    wait_for(case, launcher, "restarted", 6)
    first = int(Path(f"rank{doomed}").read_text())
    os.kill(first, signal.SIGKILL)
    printed, _ = launcher.communicate()
    assert launcher.poll() == 0, f"exit code {launcher.poll()}\n{printed[-3000:]}"
    assert int(Path(f"rank{doomed}").read_text()) != first, f"rank {doomed} was not started again\n{printed[-2000:]}"
    case.assert_same("two", "restarted")
    case.assert_log("restarted")


def twice(case):
    """Two runs with one --out at the same time."""
    calm = partial(slowly, case)
    first = start(case, *case.whole, "--out", "same", before=calm)
    wait_for(case, first, "same")
    for flags in ([], ["--resume"]):
        assert "same" in run(case, *case.whole, "--out", "same", *flags, code=2)
    assert first.poll() is None, "the first run was over too soon"
    first.end()
    whole, _ = undisturbed(case)
    case.assert_same(whole, "same")
    case.assert_log("same")
    pair = [start(case, *case.whole, "--out", "race", "--resume", before=calm) for _ in range(2)]  # at one moment
    printed = [process.communicate()[0] for process in pair]
    codes = sorted(process.poll() for process in pair)
    assert codes == [0, 2], f"exit codes {codes} of two runs in one folder: {printed}"
    case.assert_same(whole, "race")
    case.assert_log("race")
    pair = [start(case, *case.whole, before=calm) for _ in range(2)]  # without --out: each gets a folder of its own
    for process in pair:
        process.end()
    for out in (f"runs/{case.name}", f"runs/{case.name}-2"):
        case.assert_same(whole, out)
        case.assert_log(out)
    killed = start(case, *case.whole, "--out", "locked", before=calm)
    wait_for(case, killed, "locked")
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    run(case, *case.whole, "--out", "locked", "--resume")
    case.assert_same(whole, "locked")


def folder(case):
    """An output folder that cannot be made or written."""
    Path("file").write_text("")
    places = ["file/run"]
    if Path("/proc/version").exists():
        places += ["/proc/none/run", "/proc"]
    if os.getuid():
        Path("closed").mkdir(mode=0o555)
        places += ["closed", "closed/run"]
    for place in places:
        for resume in ([], ["--resume"]):
            printed = run(case, *case.whole, "--out", place, *resume, code=2)
            assert f"cannot write to {place}" in printed and printed.count("\n") == 1, printed
    if hasattr(case.module.Config(), "features_out"):
        run(case, "--steps", 1, "--out", "good")
        flags = ["--init", "good/last.pt", "--eval", "features", "--device", "cpu"]
        for file in ("missing/f.npz", "file/f.npz"):
            printed = Forked(f"{case.name}.py", *flags, "--out", "features", "--features-out", file).end(2)
            assert file in printed and printed.count("\n") == 1, printed
        Forked(f"{case.name}.py", *flags, "--out", "features", "--features-out", "f.npz").end()
        assert Path("f.npz").exists()


def network(case):
    """A data set that is not there, and no network; and one that breaks off in the middle."""
    name = {"vjepa": None, "mvp_eval": "hub"}.get(case.name, "cifar10")
    if name is None:
        raise NotApplicable("it downloads nothing")

    def closed():
        os.environ.update({f"{kind}_proxy": f"http://127.0.0.1:{free_port()}" for kind in ("http", "https")})
        hurry()

    def hurry():
        os.environ["DATA"] = "store"
        if case.module is mvp_eval:
            mvp_eval.download_annotations = partial(mvp_eval.download_annotations, pause=0.01)

    def cut():
        server = socket.create_server(("127.0.0.1", 0))

        def serve():
            while True:
                connection = server.accept()[0]
                connection.recv(10000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"{" * 5000)
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        setattr(case.module, "HUB" if case.module is mvp_eval else "CIFAR10_URL", url)
        hurry()

    for before in (closed, cut):
        out = ["--out", before.__name__]
        printed = Forked(f"{case.name}.py", "--data", name, *out, before=before).end(2)
        assert "download" in printed and "store" in printed and printed.count("\n") == 1, printed
        left = [path for path in Path("store").rglob("*") if path.is_file()] if Path("store").exists() else []
        assert not left, f"left behind: {left}"


def flags(case):
    """Command lines that cannot be meant."""
    asks = case.module is mvp_eval
    presets = list(case.module.PRESETS)
    wrong = {f"--preset {name[:-2]}{name[-1]}{name[-2]}": name for name in presets if name[-1] != name[-2]}
    wrong |= {"--preset": "--preset", "--wokrers 1": "--", "--data": "--data", "surprise": "surprise"}
    if asks:
        wrong |= {"--framse 8": "--frames", "--frames ten": "--frames", "--frames": "--frames", "--timeout x": "--timeout"}
        wrong |= {"--frames 0": "--frames", "--concurrency 0": "--concurrency", "--conc 3": "--concurrency"}
    else:
        wrong |= {"--wdith 32": "--width", "--batch ten": "--batch", "--lr fast": "--lr", "--steps": "--steps"}
        wrong |= {"--steps 1.5": "--steps", "--batch 0": "--batch", "--batch -8": "--batch", "--steps -1": "--steps"}
        wrong |= {"--log-every 0": "--log-every", "--save-every 0": "--save-every", "--flipp": "--flip"}
        wrong |= {"--accumulate 0": "--accumulate", "--patch 0": "--patch", "--heads 0": "--heads"}
        wrong |= {"--compile yes": "yes", "--lr nan": "--lr", "--epochs -1": "--epochs"}
        if not hasattr(case.module.Config(), "flip"):
            wrong.pop("--flipp")
    for words, named in wrong.items():
        printed = Forked(f"{case.name}.py", *words.split()).end(2)
        assert named in printed and printed.count("\n") == 1, f"{words}:\n{printed}"
        assert not Path("runs").exists(), f"{words}: refused only after work had begun"


def signals(case):
    """SIGTERM and SIGINT in the middle of the run, then the command that it prints."""
    whole, _ = undisturbed(case)
    if case.module is not mvp_eval:
        photographs(Path("photos"), count=24)
    for number in (signal.SIGTERM, signal.SIGINT):
        out = number.name.lower()
        process = start(case, *case.whole, "--out", out, before=partial(slowly, case))
        wait_for(case, process, out)
        os.kill(process.pid, number)
        printed = process.end()
        line = next(line for line in printed.splitlines() if "--resume" in line).split(": ", 1)[1]
        launcher, script, *words = shlex.split(line)
        assert (launcher, script) == ("python", f"{case.name}.py") and words[-1] == "--resume", line
        if case.module is not mvp_eval:
            step = torch.load(Path(out, "last.pt"), weights_only=True)["step"]
            assert 4 <= step < 24 and step == log_rows(out)[-1]["step"], step
        Forked(script, *words).end()
        case.assert_same(whole, out)
        case.assert_log(out)
        if case.module is not mvp_eval:  # Ctrl-C and schedulers signal the loading processes too
            streamed = replace(case, small=[*case.folder, "--data", "photos", "--workers", 1, *case.stream])
            process = start(streamed, *case.whole, "--out", f"{out}-all", before=partial(slowly, case))
            wait_for(case, process, f"{out}-all")
            os.killpg(process.pid, number)
            assert "--resume" in process.end() and Path(f"{out}-all/last.pt").exists()
        if case.module is not mvp_eval:  # while it evaluates, all is saved: it can end at once

            def endless(*_):
                Path(f"{out}-evaluates").touch()
                time.sleep(60)

            process = start(case, *case.whole, "--out", out, "--resume",
                            before=partial(setattr, case.module, "evaluate", endless))  # fmt: skip
            while not Path(f"{out}-evaluates").exists():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.01)
            os.kill(process.pid, number)
            assert "--resume" in process.end()


FAULTS = {
    "kill": (kill, "`kill -9` at random moments, then `--resume`"),
    "disk": (disk, "full disk"),
    "checkpoint": (checkpoint, "broken checkpoints"),
    "data": (data, "1 % corrupt files, and more"),
    "nan": (nan, "loss or gradients not finite"),
    "rank": (rank, "a rank dies under torchrun"),
    "twice": (twice, "two runs, one `--out`"),
    "folder": (folder, "output folder not writable"),
    "network": (network, "no network"),
    "flags": (flags, "impossible command lines"),
    "signals": (signals, "SIGTERM, SIGINT"),
}


# --------------------------------------------------------------------------------------------------------------- main


def attempt(script, fault, root):
    """One cell of the table: (survived | not applicable | FAILED, why)."""
    place = root / script / fault
    place.mkdir(parents=True)
    Path(place, "slow.py").write_text(SLOW)
    shared = root / script / "whole"
    if shared.exists():
        shutil.copytree(shared, place / "whole")
    os.chdir(place)
    try:
        FAULTS[fault][0](CASES[script])
        result = "survived", ""
        if Path("whole").exists() and not shared.exists():
            shutil.copytree("whole", shared)
    except NotApplicable as reason:
        result = "not applicable", str(reason)
    except Exception as error:  # noqa: BLE001  whatever a broken run does, the others get their turn
        said = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
        where = traceback.extract_tb(error.__traceback__)
        line = next(frame.lineno for frame in reversed(where) if frame.name == fault or frame.filename == __file__)
        result = "FAILED", f"line {line}: {said}"
    os.chdir(root)
    shutil.rmtree(place, ignore_errors=True)
    return result


def as_table(cells, scripts, faults):
    """The results as Markdown, with the reasons below."""
    lines = [f"| | {' | '.join(f'`{s}`' for s in scripts)} |", f"|---|{'---|' * len(scripts)}"]
    reasons = {}
    for fault in faults:
        shown = []
        for script in scripts:
            result, why = cells[script][fault]["result"], cells[script][fault]["why"]
            mark = f" ({reasons.setdefault(why, len(reasons) + 1)})" if result == "not applicable" else ""
            shown.append(result + mark)
        lines.append(f"| {FAULTS[fault][1]} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"({number}) {why}." for why, number in reasons.items())]).rstrip() + "\n"


def main(argv=None):
    """The command line -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scripts", nargs="+", choices=ORDER, default=ORDER, metavar="SCRIPT")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--out", help="folder for faults.md and faults.json")
    options = parser.parse_args(argv)
    out = Path(options.out).resolve() if options.out else None
    torch.set_num_threads(1)
    cells = {script: {} for script in options.scripts}
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        for script in options.scripts:
            draw_toy(CASES[script])
            for fault in options.faults:
                begun = time.monotonic()
                result, why = attempt(script, fault, Path(root).resolve())
                seconds = round(time.monotonic() - begun, 1)
                cells[script][fault] = dict(result=result, why=why, seconds=seconds)
                print(f"{script}, {fault}: {result} ({seconds} s) {why}".rstrip(), file=sys.stderr, flush=True)
        os.chdir("/")
    table = as_table(cells, options.scripts, options.faults)
    print(table)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "faults.md").write_text(table)
        (out / "faults.json").write_text(json.dumps(cells, indent=1) + "\n")
    return int(any(cell["result"] == "FAILED" for row in cells.values() for cell in row.values()))


if __name__ == "__main__":
    sys.exit(main())
