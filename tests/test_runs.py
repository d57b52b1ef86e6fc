"""What every training script promises: resuming, ranks, users' data, and all that goes wrong."""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import GOLDEN, SHARDS, Forked, close, log_rows, networks
from helpers import photographs, run_several, start, wait_for, wait_for_rows, words
from PIL import Image, PngImagePlugin

import common
import dinov2
import flexpredict
import ijepa
import iwm
import llip
import msn
import pixel_vit
import pmsn
import vjepa


@dataclass
class Script:
    """A script under test, and what it needs to run in seconds.

    small: flags of a tiny model on the toy whose steps take milliseconds, for one rank or two.
    folder: flags of the same on images of 32 pixels. probes: evaluations that need labels.
    noise: ends of the names of parameters whose gradient is rounding, which Adam turns into steps.
    slow: a learning rate that hides rounding. score: an evaluation, and a number in it.
    """

    module: ModuleType
    small: str
    folder: str
    probes: str = "knn,linear"
    noise: tuple = ()
    slow: str = "--lr 1e-5 --lr-start 1e-5"
    score: tuple = ("knn", "knn")

    @property
    def name(self):
        return self.module.__name__


# fp32, since some CPUs compute in bf16 by default and these tests compare to 1e-5
TINY = "--width 16 --depth 2 --heads 2 --batch 16 --eval none --log-every 1 --device cpu "
TINY += "--no-compile --precision fp32 --workers 0 "
PREDICTOR = "--micro 8 --predictor-width 16 --predictor-depth 2 "
BLOCKS = "--image-size 32 --patch 8 --min-context 2 --target-scale 0.1 0.15 "
HIDDEN = "--image-size 32 --patch 8 --min-visible 2 "
HEAD = "--head-hidden 16 --embedding 8 --prototypes 8 "
VIEWS = "--image-size 32 --patch 8 --focal-size 16 "
# BatchNorm and softmax cancel them
NORMED = ("fc.fc1.bias", "fc.fc2.bias", "encoder.norm.bias", "attn.qkv.bias")
TEXT = "--text-width 16 --text-depth 1 --text-heads 2 --embedding 16 --mix-heads 2 "
TEXT += "--mixture-tokens 3 --merges 30 "
CLIPS = "--preset toy --image-size 32 --patch 8 --frames 4 "
HEADS = "--head-hidden 16 --bottleneck 8 --prototypes 16 --ibot-hidden 16 --ibot-bottleneck 8 "
HEADS += "--ibot-prototypes 12 --local-crops 2 --koleo-group 4 --centering softmax "
PAINT = "--task mae --micro 8 --decoder-width 16 --decoder-heads 2 --decoder-depth 1 "


def miniature(module, small, images, **more):
    """Return the Script of a tiny model: flags for the toy, and what images of 32 pixels add."""
    return Script(module, TINY + small, TINY + small + images, **more)


SCRIPTS = [
    miniature(
        dinov2,
        HEADS,
        # KoLeo's gradient divides by distances: images must differ enough for 1e-5
        "--image-size 32 --local-size 16 --patch 8 --init-std 0.2 ",
        slow="--lr 1e-5 --warmup 0 --freeze-last 0",
    ),
    miniature(ijepa, PREDICTOR, BLOCKS),
    miniature(iwm, PREDICTOR, HIDDEN),
    miniature(flexpredict, PREDICTOR, BLOCKS),
    miniature(msn, HEAD, VIEWS, noise=NORMED),
    miniature(pmsn, HEAD, VIEWS, noise=NORMED),
    miniature(
        llip,
        TEXT,
        "",
        probes="zeroshot",
        noise=("in_proj_bias",),
        slow="--lr 1e-5",
        score=("zeroshot", "top1"),
    ),
    miniature(vjepa, PREDICTOR, CLIPS, probes="knn,probe"),
    miniature(pixel_vit, PAINT + "--image-size 8 ", "--image-size 32 --patch 8 "),
]
SCRIPTS = {script.name: script for script in SCRIPTS}
IJEPA = SCRIPTS["ijepa"]  # for what common.py does for all


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn."""
    return SCRIPTS[request.param]


torch.set_num_threads(1)  # as in other processes: the order of sums depends on it


def here(script, *flags, code=None):
    """Call a script's command line in this process; expect it to leave with `code`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    left = None
    try:
        script.module.main(words(flags))
    except SystemExit as stop:  # whose traceback would keep loading processes alive
        left = stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert left == code


def refused(capsys, script, *flags, code=2):
    """Expect the command line to leave with `code` and one line; return the line."""
    capsys.readouterr()
    here(script, *flags, code=code)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


@contextlib.contextmanager
def full_disk(size):
    """Let no file grow beyond a size in bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def logged(out, key="loss"):
    """Return the values of a run's log under a key."""
    return [row[key] for row in log_rows(out) if key in row]


def weights(out):
    """Return (step, all weights) of a run."""
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    named = {}
    for network, tensors in state.items():
        if isinstance(tensors, dict) and network != "optimizer":
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor):
                    named[f"{network}.{name}"] = value
    return state["step"], named


def assert_same(a, b, tolerance=0.0, without=()):
    """Assert that two runs ended with the same step and weights."""
    found = []
    for out in (a, b):
        step, named = weights(out)
        compared = {name: x for name, x in named.items() if not name.endswith(tuple(without))}
        assert len(compared) > 10
        found.append({"step": step, **compared})
    torch.testing.assert_close(*found, atol=tolerance, rtol=0.0)  # an error names the weight


# ------------------------------------------------------------------------------- resume and ranks


def test_kill_and_resume_is_bitwise(script):
    """kill -9 once the log has so many rows, resume, and again: as one run without workers."""
    photographs(Path("photos"))
    flags = f"{script.folder} --data photos --steps 12 --save-every 1"
    here(script, flags, "--out whole")
    for rows in (2, 6):
        process = start(script.name, flags, "--workers 2 --out killed --resume")
        wait_for_rows("killed", rows, process)
        process.kill()
        process.printed()
        assert len(log_rows("killed")) < 12, "it was killed too late"
    for _ in range(2):  # the second has nothing left to do
        here(script, flags, "--out killed --resume")
        assert_same("whole", "killed")
    assert logged("killed", "step") == list(range(1, 13)), "the log has gaps or repeats"


def expect_stop(process):
    """Expect a process to end well and to name the command that resumes."""
    printed = process.printed()
    assert process.code() == 0 and "--out stopped --resume" in printed, printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(number):
    """Training stops after the step, with its loading processes; an evaluation at once."""
    photographs(Path("photos"))
    flags = f"{IJEPA.folder} --data photos --workers 1 --out stopped --resume --steps"
    process = start("ijepa", flags, 100000)
    wait_for_rows("stopped", 4, process)
    process.kill(number)
    expect_stop(process)
    done = weights("stopped")[0]
    assert done == logged("stopped", "step")[-1] >= 4
    process = start("ijepa", flags, done + 1, "--eval linear --probe-epochs 100000")
    wait_for(Path("stopped/picture.png").exists, process)
    time.sleep(0.5)
    os.kill(process.pid, number)
    expect_stop(process)


def leave_while_loading_starts():
    """Make a loader and end before its process has begun."""
    multiprocessing.set_start_method("fork", force=True)  # of loading processes, as usual
    begin = common.start_worker
    common.start_worker = lambda worker: (time.sleep(1), begin(worker))
    # with a name: to delete a loader is to wait for its process
    config = ijepa.Config(workers=1)
    _loader = common.make_loader(list, [[torch.zeros(1)]], config, common.World())
    os._exit(0)


def test_loading_processes_end_with_the_run():
    """Whenever that is: they ignore signals, and would be left for ever."""
    assert not Forked(leave_while_loading_starts).printed(timeout=30)


@pytest.mark.parametrize("line", [*SCRIPTS, "dinov2 --centering sinkhorn --no-separate-heads"])
def test_two_ranks_are_one_process(line):
    """Losses, gradients and weights, by DDP and FSDP2, recomputed too; a sharded run resumes."""
    name, *more = line.split()
    script = SCRIPTS[name]
    photographs(Path("photos"), count=24)
    flags = f"{script.folder} {script.slow} --data photos --steps 3 --eval {script.score[0]} "
    flags += " ".join(more)
    shard = "shard --shard" + " --recompute" * hasattr(script.module.Config, "recompute")
    outs = ("two", shard, f"{shard} --steps 5 --resume")[: 1 + 2 * SHARDS]
    run_several(*(f"{name} {flags} --out {out}" for out in outs), ranks=2)
    here(script, flags, "--out one")
    assert_same("one", "two", tolerance=1e-5, without=script.noise)
    for out in ("two", "shard")[: len(outs)]:
        for key in ("loss", "gradient_norm"):
            assert logged(out, key)[:3] == pytest.approx(logged("one", key), rel=5e-5)
        assert logged(out, "eval")[-1].keys() == logged("one", "eval")[-1].keys()
    if SHARDS:
        state = torch.load("shard/last.pt", weights_only=True)
        assert state["step"] == 5
        assert all(type(value) is torch.Tensor for value in state["model"].values())


def test_bf16_follows_fp32_and_any_precision_resumes(script):
    photographs(Path("photos"))
    flags = f"{script.folder} --data photos"
    for precision in ("fp32", "bf16"):
        here(script, flags, f"--steps 3 --precision {precision} --out {precision}")
    assert logged("bf16") == pytest.approx(logged("fp32"), rel=0.05)
    for steps, precision in {4: "bf16", 5: "fp16", 6: "fp32"}.items():
        here(script, flags, f"--steps {steps} --precision {precision} --out fp32 --resume")
    assert weights("fp32")[0] == 6


# ------------------------------------------------------------------------------------------- data


def read(path, box=None):
    """Read a part of a file, by default all: float [3, 32, 32], and the size of the file."""
    split = common.Split([path], ["x"], torch.tensor([-1]), [])
    sizes = []

    def boxes(width, height):
        sizes.append((width, height))
        return [box or (0, 0, height, width)]

    return split.read(0, boxes, [32])[0].float(), sizes[0]


def test_every_kind_of_image_becomes_rgb_and_upright():
    """Modes and formats, also under a wrong ending; no metadata can cost an image."""
    random = np.random.default_rng(0)
    base = Image.fromarray(random.integers(0, 255, (8, 36, 3), dtype=np.uint8))
    base = base.resize((1200, 800))
    files = {"lies.jpg": (base, {"format": "TIFF"})}
    modes = {"L": "b.png", "P": "c.png", "CMYK": "d.jpg", "RGBA": "h.png", "1": "i.png"}
    for mode, names in {**modes, "RGB": "a.png a.jpg e.webp f.bmp t.tif u.gif"}.items():
        files.update(dict.fromkeys(names.split(), (base.convert(mode), {})))
    ways = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 6: Image.ROTATE_90, 8: Image.ROTATE_270}
    for value, way in ways.items():
        exif = Image.Exif()
        exif[0x0112] = value
        files[f"{value}.jpg"] = base.transpose(way), {"exif": exif}
    # a phone photo with ImageWidth as RATIONAL, which Pillow reads and cannot write back
    tiff = b"II*\0\x08\0\0\0\x02\0" + b"\x00\x01\x05\0\x01\0\0\0\x26\0\0\0"
    tiff += b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\0\0\0\0" + b"\x30\0\0\0\x01\0\0\0"
    files["odd.jpg"] = base.transpose(Image.ROTATE_90), {"exif": b"Exif\0\0" + tiff}
    for name in ("junk.png", "junk.webp", "junk.jpg"):
        files[name] = base, {"exif": b"Exif\0\0junk that is no TIFF header"}
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 5_000_000, zip=True)
    files["text.png"] = base, {"pnginfo": text}
    base.save("a.png")
    for name, (image, options) in files.items():
        image.save(name, quality=100, **options)
        pixels, size = read(name)
        assert size == (1200, 800), name
        if image.mode in ("RGB", "CMYK"):
            assert (pixels - read("a.png")[0]).abs().mean() < 10, name
    for box in ((100, 333, 500, 610), (736, 0, 64, 80)):  # JPEGs are decoded at 1/8 and at 1/2
        jpg, png = (read(name, box)[0] for name in ("a.jpg", "a.png"))
        a_pixel = (jpg.roll(1, 2) - png)[:, :, 1:].abs().mean()
        assert (jpg - png).abs().mean() < 0.3 * a_pixel
    grey = np.arange(0, 64 * 1024, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(grey).save("g.png")  # 16 bits are scaled, not clipped
    close(read("g.png")[0][0], grey // 256 * 1.0)


def test_what_is_no_image_does_not_exist(capsys):
    """Files that macOS and Jupyter leave, other formats, stray files; links are followed."""
    train = photographs(Path("photos"), count=8) / "train"
    image = (train / "cat/0.jpg").read_bytes()
    hidden = [".ipynb_checkpoints/x.jpg", "__MACOSX/._x.jpg", "cat/._0.jpg"]
    for name in (*hidden, "cat/notes.txt", "cat/photo.heic", "preview.png"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_bytes(image)
    (train / "cat/folder.jpg").mkdir()
    os.mkfifo(train / "cat/pipe.jpg")
    os.symlink("nowhere.jpg", train / "cat/broken.jpg")
    os.symlink(train.absolute(), train / "cat/loop")
    (train / "dog").rename("elsewhere")
    os.symlink(Path("elsewhere").absolute(), train / "dog")
    found = common.open_split("photos", "train")
    assert found.classes == ["cat", "dog"] and found.labels.tolist() == [0] * 4 + [1] * 4
    assert found.names == sorted(found.names)
    printed = capsys.readouterr().out
    assert "photo.heic" in printed and "preview.png" in printed


def test_folders_with_other_names_and_classes(capsys):
    """Classes are numbered by train's."""
    photographs(Path("photos"), classes=("a", "b", "c"))
    os.rename("photos/val/b", "b")
    _, val, _ = common.open_data("photos", "knn")
    assert val.classes == ["a", "b", "c"] and set(val.labels.tolist()) == {0, 2}
    assert "no images of ['b']" in capsys.readouterr().out
    for before, after, said in (
        ("b", "photos/val/d", "lacks: ['d']"),
        ("photos/val", "photos/valid", "did you mean"),
        ("photos/train", "photos/Train", "did you mean"),
    ):
        os.rename(before, after)
        with pytest.raises(SystemExit):
            common.open_data("photos", "knn")
        assert said in capsys.readouterr().err


def test_label_lists(capsys):
    """Names may have spaces; a missing one, or a missing list, is refused before training."""
    photographs(Path("photos"))
    os.rename("photos/train/cat/0.jpg", "photos/train/cat/img 000.jpg")
    names = Path("list.txt")
    names.write_text("img 000.jpg\ntrain/dog/1.jpg\n")
    found = common.open_split("photos", "train").listed(names)
    assert found.names == ["train/cat/img 000.jpg", "train/dog/1.jpg"]
    names.write_text("img 000.jpg\nnobody.jpg\n")
    for script in (IJEPA, SCRIPTS["msn"]):
        flags = f"{script.folder} --data photos --eval lowshot --steps 1 --label-list"
        assert "1 of 2" in refused(capsys, script, flags, "list.txt")
        assert "no list" in refused(capsys, script, flags, "absent.txt")
    assert not Path("runs").exists()


def test_each_epoch_has_every_image_once_in_an_order_of_its_own():
    first = common.micro_batch_indices(0, 12, 12, 0)
    second = common.micro_batch_indices(1, 12, 12, 0)
    other = common.micro_batch_indices(0, 12, 12, 1)
    assert sorted(first) == sorted(second) == sorted(other) == [*range(12)]
    assert first != second and first != other
    assert common.micro_batch_indices(1, 8, 12, 0) == first[8:] + second[:4]


def test_few_images_are_enough_and_labels_are_not_needed(script, capsys):
    photographs(Path("one"), count=1, classes=("a",))
    flags = f"{script.folder} --steps 2 --eval {script.probes}"
    here(script, flags, "--data one")
    if script.name != "llip":  # it needs captions
        photographs(Path("flat"), splits=".", classes=".")
        here(script, flags, "--data flat")
        assert "skipped, since" in capsys.readouterr().out


def test_names_resolve_below_the_data_variable(monkeypatch, capsys):
    photographs(Path("store/cifar10"))
    monkeypatch.setenv("DATA", "store")
    here(IJEPA, IJEPA.folder, "--data cifar10 --preset toy --steps 1")
    monkeypatch.setenv("DATA", "nothing")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    printed = refused(capsys, IJEPA, "--data cifar10")
    assert "no CIFAR-10" in printed and "cifar-10-binary.tar.gz" in printed


def test_cifar10_archive_is_checked(capsys, monkeypatch):
    archive = Path("cifar-10-binary.tar.gz").absolute()
    rows = np.random.default_rng(0).integers(0, 10, (7, 3073), dtype=np.uint8)
    rows.tofile("rows")
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("data_batch_1", "data_batch_2", "test_batch"):
            tar.add("rows", f"cifar-10-batches-bin/{name}.bin")
    with pytest.raises(SystemExit):
        common.cifar10(Path(), "train")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert f"sha256 {digest}" in capsys.readouterr().err
    monkeypatch.setattr(common, "CIFAR10_SHA256", digest)
    monkeypatch.setattr(common, "CIFAR10_URL", archive.as_uri())
    train, val = (common.cifar10(Path("fetched"), split) for split in ("train", "val"))
    assert len(train) == 14 and train.classes[3] == "cat"
    close(np.array(val.images[0]).transpose(2, 0, 1).ravel(), rows[0, 1:])
    close(val.labels, rows[:, 0])


# -------------------------------------------------------------------------------- the error table


def test_corrupt_images_are_skipped_counted_and_limited(script, capsys):
    """Two of 200 are named and skipped, eight are too many; so are all, from the first batch on."""
    photographs(Path("photos"), splits=("val",))
    photographs(Path("photos"), count=200, splits=("train",))
    first, *files = sorted(Path("photos/train").rglob("*.jpg"))
    cut = first.rename(first.with_name(os.fsdecode(b"\xff\xfe.jpg")))
    os.truncate(cut, 200)
    files[0].write_bytes(b"not an image")
    evaluation, metric = script.score
    flags = f"{script.folder} --data photos --workers 1 --eval {evaluation}"
    here(script, flags, "--steps 13 --out some")
    assert capsys.readouterr().out.count("skipped an unreadable file") == 2
    assert logged("some", "eval")[0]["trained"][metric] > 0
    for broken in (files[:8], files):
        for path in broken:
            path.write_bytes(b"")
        printed = refused(capsys, script, flags, "--steps 40")
        assert "could not be read, more than 1 %" in printed


def test_steps_that_are_not_finite(script, monkeypatch, capsys):
    """One is not applied, and training goes on; three in a row end the run, which can resume."""
    photographs(Path("photos"))
    flags = f"{script.folder} --data photos --steps 9 --save-every 1 --lr 1e-4 --out bad"
    saved = []
    save = common.Run.save
    backward = common.Run.backward

    def keep(run):
        save(run)
        named = weights(run.out)[1].items()
        saved.append([x for name, x in named if "running_" not in name and "num_" not in name])

    def poisoned(run, loss):
        backward(run, loss * (float("nan") if run.step in (3, 6, 7, 8) else 1.0))

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "backward", poisoned)
        patch.setattr(common.Run, "save", keep)
        assert "good weights" in refused(capsys, script, flags, code=3)
    assert [loss is None for loss in logged("bad")[:6]] == [False, False, True] * 2
    same = []
    for before, after in itertools.pairwise(saved):
        same.append(all(map(torch.equal, before, after)))
    assert same == [False, True, False, False, True, True]
    assert all(value.isfinite().all() for value in weights("bad")[1].values())
    here(script, flags, "--resume")
    assert weights("bad")[0] == 9


def hold():
    """Be the run of a folder."""
    common.choose_out(ijepa.Config(out="held"), "ijepa")
    Path("ready").touch()
    time.sleep(60)


def test_a_folder_holds_one_run(capsys):
    """Its own by default; another is refused, and two at a time; --resume continues, or starts."""
    for _ in range(2):
        here(IJEPA, IJEPA.small, "--steps 1")
    here(IJEPA, IJEPA.small, "--steps 2 --resume")
    assert weights("runs/ijepa")[0] == 1 and weights("runs/ijepa-2")[0] == 2
    holder = Forked(hold)
    wait_for(Path("ready").exists, holder)
    flags = f"{IJEPA.small} --steps 2 --out held"
    assert "another process" in refused(capsys, IJEPA, flags, "--resume")
    holder.kill()
    holder.printed()
    here(IJEPA, flags, "--resume")
    before = Path("held/last.pt").read_bytes()
    printed = refused(capsys, IJEPA, flags)
    assert "--resume" in printed and "--out" in printed
    assert Path("held/last.pt").read_bytes() == before and weights("held")[0] == 2


def test_disk_full_keeps_the_previous_checkpoint(capsys):
    here(IJEPA, IJEPA.small, "--steps 2 --out full")
    before = Path("full/last.pt").read_bytes()
    with full_disk(len(before) // 2):
        printed = refused(capsys, IJEPA, IJEPA.small, "--steps 4 --out full --resume", code=1)
    assert "could not write" in printed and "the previous last.pt is intact" in printed
    assert Path("full/last.pt").read_bytes() == before and not list(Path("full").glob("*.tmp"))


class Namespace:
    """What trainers pickle beside their weights."""


def test_files_that_are_no_checkpoints(capsys):
    here(IJEPA, IJEPA.small, "--steps 1 --out good")
    whole = Path("good/last.pt").read_bytes()
    middle = len(whole) // 2
    flipped = bytes(255 - byte for byte in whole[middle:])
    files = {  # content: what the refusal names
        "absent.pt": (None, "no checkpoint at"),
        "good": (None, "model.safetensors"),
        "cut.pt": (whole[:middle], "truncated"),
        "flipped.pt": (whole[:middle] + flipped[:100] + whole[middle + 100 :], "damaged"),
        "text.pt": (b"hello", "not a checkpoint"),
        "lfs.pt": (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        "cut.safetensors": ((100).to_bytes(8, "little") + b'{"a"', "truncated"),
        "numpy.pt": ({"a": np.float64(1)}, "numpy"),
        "code.pt": (Namespace(), "Namespace"),
        "module.pt": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        "tensor.pt": (torch.zeros(2), "'Tensor'"),
        "scripted.pt": (None, "TorchScript"),
    }
    torch.jit.script(torch.nn.Linear(2, 2)).save("scripted.pt")
    for name, (content, said) in files.items():
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        elif content is not None:
            torch.save(content, name)
        assert said in refused(capsys, IJEPA, f"--init {name} --no-train --out no"), name
        assert not Path("no").exists()
    Path("good/last.pt").write_bytes(whole[:1000])
    assert "truncated" in refused(capsys, IJEPA, IJEPA.small, "--steps 2 --out good --resume")


def test_own_checkpoints(script, capsys):
    """Evaluated with their architecture; what does not fit, or comes from elsewhere, is refused."""
    here(script, script.small, "--steps 2 --out good")
    assert Image.open("good/picture.png").width > 300
    config = json.loads(Path("good/config.json").read_text())
    assert config["width"] == 16 and config.keys() == vars(script.module.Config()).keys()
    init = "--no-train --eval features --init"
    here(script, init, "good/last.pt --out features")
    assert np.load("features/features.npz")["features"].shape[1] == 16
    good = torch.load("good/last.pt", weights_only=True)
    gone = next(k for k in good["model"] if k.endswith(("norm1.weight", "ln_1.weight")))
    good["model"].pop(gone)
    torch.save(good, "gap.pt")
    torch.save({"script": "another", "model": {}}, "other.pt")
    torch.save({"weights": torch.zeros(3)}, "strange.pt")
    errors = {
        "gap.pt": gone.split(".", 1)[1],
        "other.pt": "another",
        "strange.pt": "found weights",
        "good/last.pt --width 32": "--width 32 contradicts",
    }
    for name, expected in errors.items():
        assert expected in refused(capsys, script, init, name), name
    wider = f"{script.small} --width 32 --steps 3 --out good --resume"
    assert "does not fit" in refused(capsys, script, wider)


REFUSED = """
any          --data nowhere --resume                   data/nowhere
any          --data empty                              .jpg
any          --data ./absent                           train/CLASS
any          --image-size 30 --patch 4                 --patch
any          --width 66                                66 must be a multiple
any          --eval knnn                               knn
any          --no-train                                --init
any          --preset lagre                            toy
any          --wid 32                                  --wid
any          --width 0                                 --width
any          --steps -1                                --steps
any          --lr nan                                  --lr
any          --lr x                                    --lr
any          stray                                     stray
llip         --batch 1                                 negatives
llip         --embedding 33                            heads
dinov2       --local-size 10                           --local-size 10
dinov2       --koleo-group 48                          --koleo-group
dinov2       --shard --precision fp16                  fp16
ijepa        --micro 48                                --batch 64
ijepa        --targets 30                              context
ijepa        --batch 10                                micro-batches of 64
ijepa        --device tpu                              device
ijepa        --precision fp8                           bf16
ijepa        --wdith 32                                --wdith
iwm          --jitter 2 0 0 0                          --jitter
iwm          --min-visible 35                          visible
flexpredict  --sigma -1                                --sigma
flexpredict  --davis x                                 val.txt
msn          --drop 1.0                                --drop
msn          --focal-size 2                            --focal-size
msn          --schedule-scale 0.5                      --schedule-scale
pmsn         --prior cubic                             power-law
pmsn         --imbalance 0.5                           --imbalance
pmsn         --train-list absent.txt                   absent.txt
pmsn         --classes-per-batch 3                     --classes-per-batch
pmsn         --classes-per-batch 16                    10 classes
vjepa        --micro 24                                --batch 32
vjepa        --frames 15                               --tubelet
vjepa        --mask-scales 0.2 0.3                     --mask-blocks
vjepa        --frames 4 --eval physics                 --frames
vjepa        --eval physics --physics grasp            --physics-data
pixel_vit    --micro 48                                --batch 32
pixel_vit    --task mae --positions none               --positions
pixel_vit    --task mae --mask-ratio 1                 --mask-ratio
pixel_vit    --task mae --decoder-width 30             width 30 must be a multiple
pixel_vit    --task diffusion --eval knn               samples
pixel_vit    --task diffusion --sampler-steps 1001     1000
pixel_vit    --task diffusion --judge absent.pt        absent.pt
"""  # script, flags, what the refusal names


def test_what_cannot_work_is_refused_before_any_work(script, capsys):
    Path("empty").mkdir()
    for line in REFUSED.strip().splitlines():
        name, flags, said = re.split(" {2,}", line)
        if name in ("any", script.name):
            assert said in refused(capsys, script, flags), line
    assert not Path("runs").exists()


def test_out_of_memory_names_the_flags_that_help(script, monkeypatch, capsys):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(script.module, "train", mock.Mock(side_effect=full))
    printed = refused(capsys, script, "--device cpu", code=4)
    assert all(flag in printed for flag in ("--precision", "--shard", "--batch"))


class Unsendable:
    """Fails in the thread that sends a loader's item, as a full /dev/shm does."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("make", [lambda _: os._exit(1), lambda _: [Unsendable()], list])
def test_a_dead_loading_process_ends_the_run(make, capsys):
    """Killed for memory, out of shared memory, or cut off in a handover: one line, no hang."""

    @common.command_line
    def main(argv):
        loader = common.make_loader(make, [[0]] * 9, ijepa.Config(workers=1), common.World())
        next(loader)
        raise ConnectionResetError

    with pytest.raises(SystemExit) as stop:
        main()
    time.sleep(0.2)  # torch notices the end of a loading process
    assert stop.value.code == 1 and "--shm-size" in capsys.readouterr().err


def test_help_and_presets(script, capsys):
    """Each flag has a help, and each preset passes its own check."""
    here(script, "--help", code=0)
    assert "--weight-decay" in capsys.readouterr().out
    module = script.module
    presets = module.PRESETS, module.DATA_PRESETS
    for name in module.PRESETS:
        config, _ = common.parse_config(module.Config, *presets, ["--preset", name])
        assert config.steps or config.epochs
        module.check(config, common.World(0, 8 if name.startswith("vit_") else 1))


SIZES = """
ijepa        vit_b16_in1k                 85_797_120
ijepa        vit_l16_in1k                303_299_584
ijepa        vit_h14_in1k                630_762_240
ijepa        vit_h16_448_in1k            631_668_480
ijepa        vit_h14_in22k               630_762_240
ijepa        vit_g16_in22k             1_011_368_576
flexpredict  vit_b16_in1k                 85_797_120
flexpredict  vit_l16_in1k                303_299_584
flexpredict  vit_h16_in1k                630_915_840
iwm          vit_b16_equivariant_in1k     85_797_120  33_053_952
iwm          vit_b16_invariant_in1k       85_797_120  22_407_168
iwm          vit_l16_equivariant_in1k    303_299_584 115_429_376
msn          vit_s16_in1k                 21_665_664
msn          vit_b16_in1k                 85_798_656
msn          vit_b8_in1k                  85_807_872
msn          vit_b4_in1k                  87_503_616
msn          vit_l16_in1k                303_301_632
msn          vit_l7_in1k                 303_513_600
vjepa        vit_l16                     305_490_944  22_685_056
vjepa        vit_h16                     633_655_040  22_881_920
vjepa        vit_h16_384                 637_546_240  24_049_280
vjepa        vit_b16_rope                114_584_832
vjepa        vit_l16_rope                404_646_912  29_179_264
vjepa        vit_h16_rope                841_527_040  29_376_128
dinov2       vitl16_short                303_351_808  23_662_848
dinov2       vitl14                      303_655_168  57_545_088  40_505_600
dinov2       vitg14                    1_134_771_200  58_593_664  41_554_176
"""  # script, preset, parameters of the encoder, positions counted; of predictor or heads


def test_paper_presets_have_the_papers_sizes():
    for line in SIZES.strip().splitlines():
        name, preset, *expected = line.split()
        module = SCRIPTS[name].module
        with torch.device("meta"):
            model, _ = module.build(module.Config(**module.PRESETS[preset]))
        parts = getattr(model, "network", model).children()
        for part, size in zip(parts, expected, strict=False):
            assert sum(map(torch.numel, [*part.parameters(), *part.buffers()])) == int(size), line


# --------------------------------------------------------------------------- I-JEPA, MSN and PMSN


BLOCKY = "--micro 4 --min-context 2"
OFFICIAL = {  # file, heads, flags of training, and parts of the weights
    "ijepa": ("tiny_ijepa.pth.tar", 2, BLOCKY, ("encoder", "predictor")),
    "flexpredict": ("tiny_stop.pth.tar", 4, BLOCKY, ("model",)),
    "msn": ("tiny_msn.pth.tar", 2, "--focal-size 8", ("prototypes",)),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_checkpoint_in_features_out(name):
    """On one rank and on two; and training starts from these weights."""
    file, heads, more, parts = OFFICIAL[name]
    script = SCRIPTS[name]
    path = GOLDEN / name / file
    config, _, target = networks(script.module, path, heads)
    photographs(Path("photos"), count=6)
    flags = f"--init {path} --heads {heads} --data photos --device cpu --precision fp32 "
    features = f"{flags} --no-train --eval features{' --tokens' * (name != 'msn')} --out"
    here(script, features, "one")
    run_several(f"{name} {features} two", ranks=2)
    val = common.open_split("photos", "val")
    images = common.normalize(common.centre_crops(val, config.image_size, range(6))[1])
    for out in ("one", "two"):
        found = np.load(f"{out}/features.npz")
        assert found["paths"].tolist() == val.names
        close(found["labels"], val.labels)
        if name == "msn":
            close(found["features"], msn.encode(target.encoder.eval(), images), atol=1e-5)
        else:
            tokens = target(images)
            close(found["features"], tokens.mean(1), atol=1e-5)
            close(found["tokens"], tokens, atol=1e-5)
    still = "--steps 1 --batch 4 --lr 0 --lr-start 0 --lr-final 0 --eval none --workers 0"
    here(script, flags, still, more, "--out tuned")
    before = script.module.read_weights(path, heads)
    after = script.module.read_weights("tuned/last.pt")
    assert before["fields"].items() <= after["fields"].items()
    for part in parts:
        torch.testing.assert_close(after[part], before[part])


EVALUATIONS = {  # how to run all, how to run them differently, and what is found
    "ijepa": (
        f"{IJEPA.folder} --steps 1 --probe-batch 7 --eval knn,linear,lowshot,features",
        "--probe-augment --lars",
        "knn, linear, lowshot",
    ),
    "iwm": (
        f"{SCRIPTS['iwm'].folder} --steps 1 --tune-epochs 0.1 --tune-batch 16 --mrr-images 3 "
        "--eval knn,linear,attentive,mrr,features,finetune,segment,multitask",
        "--eval knn,linear,attentive,mrr,features",
        "knn, linear, attentive, mrr, mrr rolled, mrr none, mrr chance, class: encoder, "
        "class: random predictor, class: predictor, class: both, class: with the other, "
        "segment: encoder, segment: random predictor, segment: predictor, segment: both, "
        "segment: with the other",
    ),
    "flexpredict": (
        f"{SCRIPTS['flexpredict'].folder} --steps 1 --eval knn,linear,lowshot,video,features",
        "--grey 0.3 --blur 0.3",
        "knn, linear, lowshot, J&F, J, F, J recall, F recall, J decay, F decay",
    ),
    "msn": (
        f"--init {GOLDEN}/hub/msn/model.safetensors --heads 2 --no-train --device cpu "
        "--precision fp32 --workers 0 --probe-batch 7 --eval knn,linear,lowshot,features",
        "--probe-augment",
        "knn, linear, 1-shot, 2-shot, 5-shot, 1 %",
    ),
    "pmsn": (
        f"{SCRIPTS['pmsn'].folder} --steps 1 --imbalance 4 --probe-batch 7 "
        "--eval knn,linear,features",
        "--classes-per-batch 2 --prior counts",
        "knn, knn head, knn tail, knn few, linear, linear head, linear tail, linear few, "
        "tail labels, tail labels head, tail labels tail, tail labels few",
    ),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_all_evaluations(name):
    """On two ranks the same table; fewer images than ranks are enough."""
    flags, more, expected = EVALUATIONS[name]
    photographs(Path("photos"), count=25)
    photographs(Path("one"), count=1, classes=("a",))
    flags += " --probe-epochs 2 --data"
    few = f"{name} {flags} one {more if name != 'pmsn' else ''} --out few"
    run_several(f"{name} {flags} photos {more} --out two", few, ranks=2)
    here(SCRIPTS[name], flags, "photos --out plain")
    here(SCRIPTS[name], flags, "photos --out other", more)
    tables = {out: logged(out, "eval")[-1] for out in ("plain", "other", "two")}
    expected = set(expected.split(", "))
    assert tables["plain"]["trained"].keys() == expected
    for out, table in tables.items():
        assert table["trained"].keys() == table["random"].keys() <= expected
        assert name in ("iwm", "flexpredict") or "pixels" in table
        assert len(np.load(f"{out}/features.npz")["features"]) == 25
    for column, scores in tables["two"].items():  # accuracies within two of 25 images
        for metric, score in scores.items():
            tolerance = 0.1 if metric.startswith("mrr") else 9
            assert score == pytest.approx(tables["other"][column][metric], abs=tolerance)


# --------------------------------------------------------------------------------------- learning


def learn(script, flags):
    """Run the toy preset with these flags; return the log."""
    here(script, "--out learnt --device cpu --no-compile", flags)
    return log_rows("learnt")


def test_ijepa_learns():
    """A part of the toy's run: features tell alphabets apart better than a random encoder's."""
    flags = "--steps 100 --lr 5e-3 --eval linear --probe-epochs 2 --workers 0"
    found = learn(IJEPA, flags)[-1]["eval"]
    assert found["trained"]["linear"] > found["random"]["linear"] + 8
    assert logged("learnt", "feature_std")[-1] > 0.02 and logged("learnt", "feature_rank")[-1] > 3


def test_msn_learns():
    """Anchors find their image's cluster; few labels say more than of a random encoder."""
    flags = "--steps 150 --batch 64 --width 32 --depth 2 --lr 2e-3 --eval lowshot --workers 0"
    found = learn(SCRIPTS["msn"], flags)[-1]["eval"]
    for shots in ("1-shot", "5-shot"):
        assert found["trained"][shots] > found["random"][shots] + 4
    assert logged("learnt", "match_ratio")[0] > 1.01
    assert logged("learnt", "prototypes_used")[-1] > 3 and logged("learnt", "me_max")[-1] < 0.1


def test_pmsn_moves_cluster_sizes_to_the_prior_it_is_given():
    """The mechanics, not a gain in accuracy: of two priors a run ends nearer to its own."""
    found = {}
    for prior in ("uniform", "power-law"):
        flags = "--steps 30 --batch 32 --tau 1 --imbalance 5 --eval none --device cpu --no-compile"
        here(SCRIPTS["pmsn"], flags, f"--workers 0 --prior {prior} --out {prior}")
        found[prior] = next(row for row in log_rows(prior) if "kl_uniform" in row)
    uniform, power = found["uniform"], found["power-law"]
    assert uniform["kl_uniform"] < 0.5 * uniform["kl_power_law"]
    assert power["kl_power_law"] < 0.5 * power["kl_uniform"]
    assert power["effective_clusters"] < uniform["effective_clusters"] - 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_run_matches_cpu_run():
    devices = {"cpu": "cpu", "cuda": "cuda --no-compile", "compiled": "cuda --compile"}
    for out, device in devices.items():
        flags = f"{IJEPA.small} --steps 3 --out {out} --device {device}"
        here(IJEPA, flags)
        assert logged(out) == pytest.approx(logged("cpu"), rel=1e-3)
