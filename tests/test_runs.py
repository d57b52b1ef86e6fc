"""What every training script promises: resuming, ranks, users' data, and all that goes wrong."""

import inspect
import io
import json
import os
import re
import resource
import signal
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import kill_when, log_rows, run, run_several, start, wait_for
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

GOLDEN = Path(__file__).parent / "golden"


@dataclass
class Script:
    """A script under test, and what it needs to run in seconds.

    small: flags of a tiny model on the toy whose steps take milliseconds, for one rank or two.
    folder: flags of the same on images of 32 pixels. probes: evaluations that need labels.
    noise: ends of the names of parameters whose gradient is rounding, which Adam turns into steps.
    """

    module: ModuleType
    small: str
    folder: str
    loss: str  # the function whose value is poisoned
    probes: str = "knn,linear"
    noise: tuple = ()
    slow: str = "--lr 1e-5 --lr-start 1e-5"  # a learning rate that hides rounding
    score: tuple = ("knn", "knn")  # an evaluation of class folders, and a number in it
    toy_score: tuple = ("knn", "knn")  # the same of the toy

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
HEADS += "--ibot-prototypes 12 --local-crops 2 --koleo-group 4 "
PAINT = "--task mae --micro 8 --decoder-width 16 --decoder-heads 2 --decoder-depth 1 "
SCRIPTS = {
    "dinov2": Script(
        dinov2,
        TINY + HEADS,
        TINY + HEADS + "--image-size 32 --local-size 16 --patch 8 ",
        "total_loss",
        slow="--lr 1e-5 --warmup 0 --freeze-last 0",
    ),
    "ijepa": Script(ijepa, TINY + PREDICTOR, TINY + PREDICTOR + BLOCKS, "jepa_loss"),
    "iwm": Script(iwm, TINY + PREDICTOR, TINY + PREDICTOR + HIDDEN, "iwm_loss"),
    "flexpredict": Script(flexpredict, TINY + PREDICTOR, TINY + PREDICTOR + BLOCKS, "jepa_loss"),
    "msn": Script(msn, TINY + HEAD, TINY + HEAD + VIEWS, "msn_loss", noise=NORMED),
    "pmsn": Script(pmsn, TINY + HEAD, TINY + HEAD + VIEWS, "pmsn_loss", noise=NORMED),
    "llip": Script(
        llip,
        TINY + TEXT,
        TINY + TEXT,
        "contrastive_loss",
        probes="zeroshot",
        noise=("in_proj_bias",),
        slow="--lr 1e-5",
        score=("zeroshot", "top1"),
        toy_score=("retrieval", "i2t R@10"),
    ),
    "vjepa": Script(vjepa, TINY + PREDICTOR, TINY + PREDICTOR + CLIPS, "vjepa_loss", "knn,probe"),
    "pixel_vit": Script(
        pixel_vit,
        TINY + PAINT + "--image-size 8 ",
        TINY + PAINT + "--image-size 32 --patch 8 ",
        "mae_loss",
    ),
}


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn."""
    return SCRIPTS[request.param]


def here(script, *flags, code=None):
    """Call a script's command line in this process; expect it to leave with `code`."""
    words = [word for flag in flags for word in str(flag).split("\0")[0].split()]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # as in the processes that tests start: the order of sums depends on it
    try:
        if code is None:
            return script.module.main(words)
        with pytest.raises(SystemExit) as stop:
            script.module.main(words)
        assert stop.value.code == code
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refused(capsys, script, *flags, code=2):
    """Expect the command line to leave with `code` and one line; return the line."""
    capsys.readouterr()
    here(script, *flags, code=code)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


def weights(out):
    """Return (step, all weights) of a run."""
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    networks = {k: v for k, v in state.items() if isinstance(v, dict) and k != "optimizer"}
    named = {}
    for network, tensors in networks.items():
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor):
                named[f"{network}.{name}"] = value
    return state["step"], named


def assert_same(a, b, tolerance=0.0, without=()):
    (step_a, a), (step_b, b) = weights(a), weights(b)
    assert step_a == step_b and a.keys() == b.keys() and len(a) > 10
    for name in a:
        if not name.endswith(tuple(without)):
            difference = (a[name].float() - b[name].float()).abs().max()
            assert difference <= tolerance, f"{name}: {difference}"


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


# ------------------------------------------------------------------------------- resume and ranks


def test_kill_and_resume_is_bitwise(script):
    """kill -9 once the log has so many rows, resume, and again; the end is that of an unbroken run."""
    flags = [script.small, "--steps 12 --save-every 1 --workers 1"]
    here(script, *flags, "--out whole")
    for rows in (2, 6, 9):
        kill_when(f"{script.name}.py", *flags, "--out killed", rows=rows)
        assert len(log_rows("killed")) < 12, "it was killed too late"
    here(script, *flags, "--out killed --resume")
    assert_same("whole", "killed")
    steps = [row["step"] for row in log_rows("killed") if "step" in row]
    assert steps == list(range(1, 13)), "the log has gaps or repeats"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step(number):
    process = start("ijepa.py", SCRIPTS["ijepa"].small, "--steps 100000 --workers 1 --out stopped")
    wait_for(lambda: Path("stopped/log.jsonl").exists() and len(log_rows("stopped")) > 3, process)
    os.killpg(process.pid, number)  # a terminal signals the loading processes too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "ijepa.py" in output and "--out stopped --resume" in output
    assert weights("stopped")[0] == log_rows("stopped")[-1]["step"] >= 3


def test_a_signal_ends_an_evaluation_at_once():
    flags = [
        SCRIPTS["ijepa"].small,
        "--steps 1 --eval linear --probe-epochs 100000 --out evaluated",
    ]
    process = start("ijepa.py", *flags)
    wait_for(lambda: Path("evaluated/picture.png").exists(), process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "--out evaluated --resume" in output


# AdamW's first steps turn rounding into signs where a gradient is near 0: a small lr hides that
FOUR_STEPS = "--steps 4"


ranks = pytest.mark.xdist_group("ranks")  # in one process, since they share the runs below


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Return a folder with runs of every script on two ranks: NAME/two, NAME/shard."""
    folder, lines = tmp_path_factory.mktemp("ranks"), []
    for name, script in SCRIPTS.items():
        flags = f"{name} {script.small} {FOUR_STEPS} {script.slow} --out {folder}/{name}/"
        shard = f"{flags}shard --shard --save-every 2 --steps"
        lines += [f"{flags}two", f"{shard} 2", f"{shard} 4 --resume --eval {script.toy_score[0]}"]
    run_several(*lines, ranks=2)
    return folder


@ranks
def test_two_ranks_are_one_process(script, on_two_ranks):
    """Same losses, gradients and weights on two ranks, with DDP and FSDP2; a sharded run resumes."""
    here(script, script.small, FOUR_STEPS, script.slow, f"--out one --eval {script.toy_score[0]}")
    found = on_two_ranks / script.name
    assert_same("one", found / "two", tolerance=1e-5, without=script.noise)
    one, two = log_rows("one"), log_rows(found / "two")
    for a, b in zip(one[:4], two[:4], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=5e-5)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=5e-5)
    state = torch.load(found / "shard" / "last.pt", weights_only=True)
    assert state["step"] == 4
    assert all(type(value) is torch.Tensor for value in state["model"].values())


@ranks
def test_sharded_steps_are_those_of_one_process(script, on_two_ranks):
    """Resuming with another number of steps changes the schedule, so only two steps are compared."""
    here(script, script.small, script.slow, "--steps 2 --out one")
    for a, b in zip(log_rows("one")[:2], log_rows(on_two_ranks / script.name / "shard")[:2]):
        assert b["loss"] == pytest.approx(a["loss"], rel=5e-5)
    found = log_rows(on_two_ranks / script.name / "shard")[-1]["eval"]["trained"]
    assert 0 <= found[script.toy_score[1]] <= 100


def test_bf16_follows_fp32(script):
    """The type that GPUs and some CPUs compute in by default, within its precision."""
    for precision in ("fp32", "bf16"):
        flags = script.small.replace("fp32", precision)
        here(script, flags, "--steps 3", f"--out {precision}")
    for a, b in zip(log_rows("fp32")[:3], log_rows("bf16")[:3], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05)


def test_another_precision_resumes(script):
    here(script, script.small, "--steps 1 --out mixed")
    for steps, precision in ((2, "bf16"), (3, "fp16"), (4, "fp32")):
        flags = script.small.replace("fp32", precision)
        here(script, flags, f"--steps {steps} --out mixed --resume")
    assert weights("mixed")[0] == 4


def test_number_of_workers_changes_nothing(script, tmp_path):
    data = photographs(tmp_path / "photos")
    for workers in (0, 2):
        flags = script.folder.replace("--workers 0", f"--workers {workers}")
        here(script, flags, f"--data {data} --steps 3 --out w{workers}")
    assert_same("w0", "w2")


# ------------------------------------------------------------------------------------------- data


def read(path, size=(24, 32)):
    """Read a whole file with common's reader: uint8 [3, 32, 32] and its size."""
    split = common.Split([path], ["x"], torch.tensor([-1]), [])
    sizes = []

    def whole(width, height):
        sizes.append((width, height))
        return [(0, 0, height, width)]

    return split.read(0, whole, [32])[0], sizes[0]


def test_every_kind_of_image_becomes_rgb(tmp_path):
    """Modes and formats, also under a wrong ending; 16 bits are scaled, not clipped."""
    base = Image.fromarray(
        np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    )
    grey16 = Image.fromarray((np.arange(32 * 32, dtype=np.uint16) * 60).reshape(32, 32))
    modes = {"b.png": "L", "c.png": "P", "d.jpg": "CMYK", "h.png": "RGBA", "i.png": "1"}
    files = {name: base.convert(mode) for name, mode in modes.items()}
    for name in ("a.jpg", "e.webp", "f.bmp", "t.tif", "u.gif"):
        files[name] = base
    for name, image in files.items():
        image.save(tmp_path / name)
        pixels, size = read(tmp_path / name)
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8 and size == (32, 32)
    grey16.save(tmp_path / "g.png")
    np.testing.assert_array_equal(read(tmp_path / "g.png")[0][0], np.asarray(grey16) >> 8)
    (tmp_path / "t.tif").rename(tmp_path / "lies.jpg")
    np.testing.assert_array_equal(read(tmp_path / "lies.jpg")[0], np.array(base).transpose(2, 0, 1))


def test_exif_turns_images_and_cannot_break_them(tmp_path):
    random = np.random.default_rng(0)
    base = Image.fromarray(random.integers(0, 255, (4, 6, 3), dtype=np.uint8)).resize((48, 32))
    expected, _ = read_saved(base, tmp_path / "upright.png")
    ways = {3: Image.ROTATE_180, 6: Image.ROTATE_90, 8: Image.ROTATE_270, 2: Image.FLIP_LEFT_RIGHT}
    for value, way in ways.items():
        exif = Image.Exif()
        exif[0x0112] = value
        path = tmp_path / f"{value}.jpg"
        base.transpose(way).save(path, exif=exif, quality=100, subsampling=0)
        pixels, size = read(path)
        assert size == (48, 32)
        assert (pixels.float() - expected.float()).abs().mean() < 6, value
    for suffix in ("png", "webp", "jpg"):  # junk where metadata should be
        path = tmp_path / f"junk.{suffix}"
        base.save(path, exif=b"Exif\0\0junk that is no TIFF header")
        assert read(path)[1] == (48, 32)
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "x" * 5_000_000, zip=True)
    base.save(tmp_path / "text.png", pnginfo=info)
    assert read(tmp_path / "text.png")[1] == (48, 32)


def read_saved(image, path):
    image.save(path)
    return read(path)


def test_an_orientation_that_pillow_cannot_write_back(tmp_path):
    """A phone photo with ImageWidth as RATIONAL: exif_transpose raises struct.error on it."""
    tiff = b"II*\0\x08\0\0\0\x02\0" + b"\x00\x01\x05\0\x01\0\0\0\x26\0\0\0"
    tiff += b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\0\0\0\0" + b"\x30\0\0\0\x01\0\0\0"
    image = Image.new("RGB", (48, 32), "red")
    image.save(tmp_path / "odd.jpg", exif=b"Exif\0\0" + tiff)
    pixels, size = read(tmp_path / "odd.jpg")
    assert size == (32, 48) and pixels[0].float().mean() > 200


def test_draft_decodes_what_a_full_decode_does(tmp_path):
    line = np.linspace(0, 6 * np.pi, 1200)
    waves = [127 + 120 * np.sin(line[:900, None] + line[None] * k) for k in (1, 2, 3)]
    smooth = np.stack(waves, axis=2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "large.jpg", quality=95, subsampling=0)
    Image.fromarray(smooth).save(tmp_path / "large.png")
    paths = [tmp_path / "large.jpg", tmp_path / "large.png"]
    split = common.Split(paths, ["j", "p"], torch.tensor([-1, -1]), [])
    for box in ((0, 0, 900, 1200), (100, 333, 500, 610), (836, 0, 64, 80)):
        jpg, png = (split.read(i, lambda *_, box=box: [box], [64])[0].float() for i in (0, 1))
        assert (jpg - png).abs().mean() < 4  # a shift by one pixel makes more than 10


def test_what_is_no_image_does_not_exist(tmp_path, capsys):
    """Files that macOS and Jupyter leave, other formats, stray files; links are followed."""
    data = photographs(tmp_path / "photos", count=8)
    cat = data / "train" / "cat"
    (cat / "._0.jpg").write_bytes(b"\0\5\x16\7")
    (data / "train" / ".ipynb_checkpoints").mkdir()
    (data / "train" / ".ipynb_checkpoints" / "x.jpg").write_bytes((cat / "0.jpg").read_bytes())
    (data / "__MACOSX").mkdir()
    (cat / "notes.txt").write_text("x")
    (cat / "photo.heic").write_text("x")
    (cat / "folder.jpg").mkdir()
    os.mkfifo(cat / "pipe.jpg")
    (cat / "broken.jpg").symlink_to("nowhere.jpg")
    (cat / "loop").symlink_to(cat)
    (data / "train" / "preview.png").write_bytes((cat / "0.jpg").read_bytes())
    (data / "train" / "dog").rename(tmp_path / "elsewhere")
    (data / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    train, val = common.open_data(str(data), "knn")
    assert len(train) == 8 and len(val) == 8 and train.classes == val.classes == ["cat", "dog"]
    assert train.names == sorted(train.names) and train.labels.tolist() == [0] * 4 + [1] * 4
    printed = capsys.readouterr().out
    assert "photo.heic" in printed and "preview.png" in printed


def test_folders_with_other_names_and_classes(tmp_path, capsys):
    data = photographs(tmp_path / "photos", classes=("a", "b", "c"))
    (data / "val" / "b").rename(tmp_path / "b")
    _, val = common.open_data(str(data), "knn")
    assert val.classes == ["a", "b", "c"] and set(val.labels.tolist()) == {0, 2}
    assert "no images of ['b']" in capsys.readouterr().out
    (tmp_path / "b").rename(data / "val" / "d")
    for change in (None, ("val", "valid"), ("train", "Train")):
        if change:
            (data / change[0]).rename(data / change[1])
        with pytest.raises(SystemExit) as stop:
            common.open_data(str(data), "knn")
        assert stop.value.code == 2
        assert ("did you mean" if change else "lacks: ['d']") in capsys.readouterr().err


def test_label_lists(tmp_path, capsys):
    data = photographs(tmp_path / "photos")
    (data / "train" / "cat" / "0.jpg").rename(data / "train" / "cat" / "img 000.jpg")
    train = common.open_split(str(data), "train")
    (tmp_path / "list.txt").write_text("img 000.jpg\ntrain/dog/1.jpg\n")
    assert train.listed(tmp_path / "list.txt").names == ["train/cat/img 000.jpg", "train/dog/1.jpg"]
    (tmp_path / "list.txt").write_text("img 000.jpg\nnobody.jpg\n")
    with pytest.raises(SystemExit):
        train.listed(tmp_path / "list.txt")
    assert "1 of 2" in capsys.readouterr().err
    ijepa_flags = [SCRIPTS["ijepa"].folder, f"--data {data} --eval lowshot --steps 1"]
    for name in (tmp_path / "list.txt", tmp_path / "absent.txt"):
        refused(capsys, SCRIPTS["ijepa"], *ijepa_flags, f"--label-list {name}")
        assert not Path("runs").exists()


def test_flat_folder_trains_and_says_that_probes_are_skipped(script, tmp_path, capsys):
    photographs(tmp_path / "flat", splits=(".",), classes=(".",))
    if script.name == "llip":
        pytest.skip("needs captions")
    here(script, script.folder, f"--data {tmp_path / 'flat'} --steps 1 --eval {script.probes}")
    assert "skipped, since" in capsys.readouterr().out


def test_few_images_are_enough(script, tmp_path):
    """One image, one class, fewer images than the batch or than a probe's batch."""
    photographs(tmp_path / "one", count=1, classes=("a",))
    flags = f"--data {tmp_path / 'one'} --steps 2 --eval {script.probes} --out one"
    here(script, script.folder, flags)
    assert weights("one")[0] == 2


def test_names_resolve_below_the_data_variable(tmp_path, monkeypatch):
    photographs(tmp_path / "store" / "cifar10")
    monkeypatch.setenv("DATA", str(tmp_path / "store"))
    here(SCRIPTS["ijepa"], SCRIPTS["ijepa"].folder, "--data cifar10 --preset toy --steps 1")
    env = {"DATA": str(tmp_path / "nothing"), "https_proxy": "http://127.0.0.1:9"}
    output = run("ijepa.py", "--data", "cifar10", code=2, **env)
    assert "no CIFAR-10" in output and "cifar-10-binary.tar.gz" in output


def test_cifar10_archive_is_checked(tmp_path, capsys, monkeypatch):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    rows = np.random.default_rng(0).integers(0, 10, (7, 3073), dtype=np.uint8)
    files = {f"data_batch_{i}.bin": rows.tobytes() for i in range(1, 6)}
    files["test_batch.bin"] = rows[:3].tobytes()
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(SystemExit):
        common.cifar10(tmp_path, "train")
    assert "sha256" in capsys.readouterr().err
    digest = common.hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(common, "CIFAR10_SHA256", digest)
    train, val = (common.cifar10(tmp_path, split) for split in ("train", "val"))
    assert len(train) == 35 and len(val) == 3 and train.classes[3] == "cat"
    np.testing.assert_array_equal(val.images[0].transpose(2, 0, 1).ravel(), rows[0, 1:])
    np.testing.assert_array_equal(val.labels, rows[:3, 0])


# -------------------------------------------------------------------------------- the error table


def test_missing_or_empty_data(script, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    expected = {
        "nowhere": "data/nowhere",
        tmp_path / "empty": ".jpg",
        tmp_path / "x": "train/CLASS",
    }
    for data, words in expected.items():
        assert words in refused(capsys, script, f"--data {data} --out out --resume")
        assert not Path("out").exists()


def test_corrupt_images_are_skipped_counted_and_limited(script, tmp_path, capsys):
    data = photographs(tmp_path / "photos", count=200, size=(40, 40))
    broken = [data / "train" / "cat" / "0.jpg", data / "train" / "dog" / "1.jpg"]
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    broken[1].write_bytes(b"not an image")
    strange = broken[0].with_name(os.fsdecode(b"\xff\xfe.jpg"))
    broken[0].rename(strange)
    flags = [script.folder.replace("--workers 0", "--workers 1"), f"--data {data}"]
    here(script, *flags, f"--steps 15 --out some --eval {script.score[0]}")
    assert capsys.readouterr().out.count("skipped an unreadable file") == 2
    assert log_rows("some")[-1]["eval"]["trained"][script.score[1]] > 0
    for i in range(2, 8):
        (data / "train" / ("cat", "dog")[i % 2] / f"{i}.jpg").write_bytes(b"")
    here(script, *flags, "--steps 40 --out many", code=2)
    assert "more than 1 %" in capsys.readouterr().err


def test_a_folder_without_one_readable_image(script, tmp_path, capsys):
    data = photographs(tmp_path / "photos", count=40)
    for path in data.rglob("*.jpg"):
        path.write_bytes(b"not an image")
    flags = [script.folder.replace("--workers 0", "--workers 1"), f"--data {data} --steps 5"]
    assert "could not be read" in refused(capsys, script, *flags)


def poison(monkeypatch, script, when, value):
    """Make the loss `value` in those calls 0, 1, ... where when(call)."""
    loss = getattr(script.module, script.loss)
    calls = []

    def poisoned(*args, **kwargs):
        calls.append(1)
        result = loss(*args, **kwargs)
        if not when(len(calls) - 1):
            return result
        return (result[0] * value, *result[1:]) if isinstance(result, tuple) else result * value

    monkeypatch.setattr(script.module, script.loss, poisoned)


def forward_passes(script):
    """Return how many forward passes a step takes with the small flags."""
    micro = re.search(r"--micro (\d+)", script.small)
    return 16 // int(micro[1]) if micro else 1


def test_a_step_that_is_not_finite_is_not_applied(script, monkeypatch):
    """The weights after a poisoned third step are those after the second, and training goes on."""
    parts = forward_passes(script)
    here(script, script.small, "--steps 4 --save-every 1 --out three --lr 1e-4")
    with monkeypatch.context() as patch:
        poison(patch, script, lambda call: call // parts == 2, float("nan"))
        saved = []
        save = common.Run.save

        def keep(run):
            save(run)
            saved.append(weights(run.out)[1])

        patch.setattr(common.Run, "save", keep)
        here(script, script.small, "--steps 4 --save-every 1 --out poisoned --lr 1e-4")
    rows = log_rows("poisoned")
    assert rows[2]["loss"] is None and rows[1]["loss"] is not None
    learned = [n for n in saved[0] if "running_" not in n and "num_batches" not in n]
    assert all(torch.equal(saved[1][n], saved[2][n]) for n in learned)
    assert any(not torch.equal(saved[2][n], saved[3][n]) for n in learned)


def test_three_steps_that_are_not_finite_stop_the_run(script, monkeypatch, capsys):
    parts = forward_passes(script)
    flags = [script.small, "--steps 12 --save-every 1 --out bad"]
    with monkeypatch.context() as patch:
        poison(patch, script, lambda call: call // parts >= 4, float("inf"))
        here(script, *flags, code=3)
    assert "good weights" in capsys.readouterr().err
    step, state = weights("bad")
    assert step in (4, 5, 6) and all(value.isfinite().all() for value in state.values())
    here(script, *flags, "--resume")  # what was saved is no dead end
    assert weights("bad")[0] == 12


def test_out_that_holds_a_run_is_refused(script, capsys):
    here(script, script.small, "--steps 1 --out here")
    before = Path("here/last.pt").read_bytes()
    output = refused(capsys, script, script.small, "--steps 2 --out here")
    assert "--resume" in output and "--out" in output
    assert Path("here/last.pt").read_bytes() == before


def hold(_):
    common.choose_out(ijepa.Config(out="held"), "ijepa")
    Path("held/ready").touch()
    time.sleep(60)


def test_a_folder_has_one_process_at_a_time(capsys):
    holder = torch.multiprocessing.get_context("fork").Process(target=hold, args=(0,))
    holder.start()
    end = time.monotonic() + 60
    while not Path("held/ready").exists() and time.monotonic() < end:
        time.sleep(0.01)
    output = refused(
        capsys, SCRIPTS["ijepa"], SCRIPTS["ijepa"].small, "--steps 1 --out held --resume"
    )
    assert "another process" in output
    holder.kill()
    holder.join()
    here(SCRIPTS["ijepa"], SCRIPTS["ijepa"].small, "--steps 1 --out held --resume")


def test_resume_starts_from_scratch_where_there_is_nothing(script):
    for _ in range(2):  # and does nothing where all is done
        here(script, script.small, "--steps 2 --out fresh --resume")
        assert weights("fresh")[0] == 2
    config = json.loads(Path("fresh/config.json").read_text())
    assert config["width"] == 16 and config["preset"] == "toy"
    assert set(config) == set(vars(script.module.Config()))


def test_runs_have_folders_of_their_own(script):
    for _ in range(2):
        here(script, script.small, "--steps 1")
    here(script, script.small, "--steps 2 --resume")
    first, second = f"runs/{script.name}", f"runs/{script.name}-2"
    assert weights(first)[0] == 1 and weights(second)[0] == 2


def test_disk_full_keeps_the_previous_checkpoint(script, capsys, monkeypatch):
    here(script, script.small, "--steps 2 --out full")
    before = Path("full/last.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        here(script, script.small, "--steps 4 --out full --resume", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    output = capsys.readouterr().err
    assert "could not write" in output and "the previous last.pt is intact" in output
    assert Path("full/last.pt").read_bytes() == before and not list(Path("full").glob("*.tmp"))


class Namespace:
    """What trainers pickle beside their weights."""


def test_checkpoints_that_are_none(script, capsys):
    here(script, script.small, "--steps 1 --out good")
    good = torch.load("good/last.pt", weights_only=True)
    whole = Path("good/last.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    data = next(v for v in good["model"].values() if v.numel() > 500).numpy().tobytes()
    middle = whole.index(data[:64]) + 32
    flipped = bytes([whole[middle] ^ 16])
    Path("flipped.pt").write_bytes(whole[:middle] + flipped + whole[middle + 1 :])
    Path("text.pt").write_text("hello")
    Path("lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    Path("folder.pt").mkdir()
    torch.save({"script": "another", "model": {}}, "other.pt")
    torch.save({"weights": torch.zeros(3)}, "strange.pt")
    torch.save({"a": np.float64(1)}, "numpy.pt")
    torch.save(Namespace(), "code.pt")
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save("scripted.pt")
    Path("cut.safetensors").write_bytes((100).to_bytes(8, "little") + b'{"a"')
    network = next(k for k in good if isinstance(good[k], dict) and k not in ("model", "config"))
    gone = next(k for k in good["model"] if k.endswith(("norm1.weight", "ln_1.weight")))
    good["model"].pop(gone)
    torch.save(good, "gap.pt")
    errors = {
        "cut.pt": "truncated",
        "flipped.pt": "damaged",
        "text.pt": "not a checkpoint",
        "lfs.pt": "Git LFS",
        "folder.pt": "model.safetensors",
        "other.pt": "another",
        "strange.pt": "found weights",
        "numpy.pt": "numpy",
        "code.pt": "Namespace",
        "module.pt": "torch.nn.modules.linear.Linear",
        "scripted.pt": "TorchScript",
        "cut.safetensors": "truncated",
        "gap.pt": gone.split(".", 1)[1],
        "absent.pt": "no checkpoint at",
    }
    assert network
    for name, words in errors.items():
        flags = f"--init {name} --no-train --eval features --out {name}-out"
        assert words in refused(capsys, script, flags), name
        assert not Path(f"{name}-out").exists()
    Path("good/last.pt").write_bytes(whole[:1000])
    assert "truncated" in refused(capsys, script, script.small, "--steps 2 --out good --resume")
    Path("good/last.pt").write_bytes(whole)
    wider = [script.small.replace("--width 16", "--width 32"), "--steps 2 --out good --resume"]
    assert "does not fit" in refused(capsys, script, *wider)


SETTINGS = [
    ("--image-size 30 --patch 4", "--patch"),
    ("--width 66", "heads"),
    ("--wdith 32", "--wdith"),
    ("--preset folde", "folder"),
    ("--eval knnn", "knn"),
    ("--precision fp8", "bf16"),
    ("--device tpu", "device"),
    ("--batch ten", "--batch"),
    ("--steps", "--steps"),
    ("--batch 0", "--batch"),
    ("--log-every 0", "--log-every"),
    ("--steps -1", "--steps"),
    ("--lr nan", "--lr"),
    ("--no-train", "--init"),
]
MORE_SETTINGS = {
    "llip": [("--batch 1", "negatives"), ("--embedding 33", "heads"), ("--model blip", "siglip")],
    "dinov2": [
        ("--local-size 10", "local_size 10"),
        ("--koleo-group 48", "--koleo-group"),
        ("--centering funny", "sinkhorn"),
        ("--shard --precision fp16", "fp16"),
    ],
    "ijepa": [("--micro 48", "--batch 64"), ("--targets 30", "context"), ("--batch 10", "--micro")],
    "iwm": [
        ("--conditioning token", "sequence"),
        ("--jitter 2 0 0 0", "--jitter"),
        ("--min-visible 35", "visible"),
    ],
    "flexpredict": [
        ("--mode paper", "stop_paper"),
        ("--sigma -1", "--sigma"),
        ("--davis x", "val.txt"),
    ],
    "msn": [
        ("--drop 1.0", "--drop"),
        ("--mask-per pixel", "image"),
        ("--focal-size 2", "--focal-size"),
        ("--schedule-scale 0.5", "--schedule-scale"),
    ],
    "pmsn": [
        ("--prior cubic", "power-law"),
        ("--imbalance 0.5", "--imbalance"),
        ("--prior-kl up", "reverse"),
        ("--train-list absent.txt", "absent.txt"),
        ("--classes-per-batch 3", "--classes-per-batch"),
        ("--classes-per-batch 16", "10 classes"),
    ],
    "vjepa": [
        ("--micro 24", "--batch 32"),
        ("--masks funny", "multiblock"),
        ("--frames 15", "--tubelet"),
        ("--mask-scales 0.2 0.3", "--mask-blocks"),
        ("--frames 4 --eval physics", "--frames"),
        ("--eval physics --physics grasp", "--physics-data"),
    ],
    "pixel_vit": [
        ("--micro 48", "--batch 32"),
        ("--task mae --positions none", "--positions"),
        ("--task mae --mask-ratio 1", "--mask-ratio"),
        ("--task mae --decoder-width 30", "--decoder-width"),
        ("--task diffusion --eval knn", "samples"),
        ("--task diffusion --sampler-steps 1001", "1000"),
        ("--task diffusion --judge absent.pt", "absent.pt"),
    ],
}


def test_settings_that_cannot_work(script, capsys):
    for flags, words in SETTINGS + MORE_SETTINGS.get(script.name, []):
        assert words in refused(capsys, script, flags), flags
        assert not Path("runs").exists(), "refused before any work"


def test_out_of_memory_names_the_flags_that_help(script, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(script.module, "train", full)
    printed = refused(capsys, script, "--out memory --device cpu", code=4)
    assert all(flag in printed for flag in ("--precision", "--shard", "--batch"))


def dies(number):
    os._exit(1)


def no_shared_memory(number):
    raise OSError(28, "No space left on device")


def test_a_dead_loading_process_ends_the_run(capsys):
    """Killed for memory, or out of shared memory: one line, no hang."""

    @common.command_line
    def main(argv):
        next(common.make_loader(dies, [0, 1], ijepa.Config(workers=1), common.World()))

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and "--shm-size" in capsys.readouterr().err


class Unsendable:
    """Fails in the thread that sends a loader's item, as a full /dev/shm does."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


def unsendable(number):
    return [Unsendable()]


def test_an_item_that_cannot_be_sent_ends_the_run(capsys):
    @common.command_line
    def main(argv):
        next(common.make_loader(unsendable, [0, 1], ijepa.Config(workers=1), common.World()))

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and "--shm-size" in capsys.readouterr().err


def test_help_lists_every_flag_with_meaning_and_default(script, capsys):
    here(script, "--help", code=0)
    output = " ".join(capsys.readouterr().out.split())
    pattern = r"^    (\w+):[^#\n]*# (.+)$"
    comments = dict(re.findall(pattern, inspect.getsource(script.module.Config), re.MULTILINE))
    for name in vars(script.module.Config()):
        assert f"--{name.replace('_', '-')}" in output, name
        assert comments[name].split()[0] in output, f"--{name} has no help"
    assert f"[{script.module.Config().weight_decay}]" in output
    unbroken = output.replace(" ", "").replace("-", "")
    assert all(name.replace("-", "") in unbroken for name in script.module.PRESETS)


def test_every_preset_fits_its_check(script):
    for name in script.module.PRESETS:
        config, _ = common.parse_config(
            script.module.Config,
            script.module.PRESETS,
            script.module.DATA_PRESETS,
            ["--preset", name],
        )
        assert config.steps or config.epochs
        script.module.check(config, common.World(0, 8 if name.startswith("vit_") else 1))


def test_own_checkpoint_is_evaluated_with_its_own_architecture(script, capsys):
    here(script, script.small, "--steps 2 --out trained")
    here(script, "--init trained/last.pt --no-train --eval features --out features")
    assert np.load("features/features.npz")["features"].shape[1] == 16
    output = refused(capsys, script, "--init trained/last.pt --no-train --width 32 --eval features")
    assert "--width 32 contradicts" in output


# --------------------------------------------------------------------------------------- I-JEPA's


def test_official_checkpoint_in_features_out(tmp_path):
    """Features of the official layout equal the reference's encoder, on one rank and on two."""
    data = tmp_path / "data"
    random = np.random.default_rng(0)
    for i in range(6):
        path = data / "val" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    photographs(data, splits=("train",), classes=("a", "b"))
    tiny = GOLDEN / "ijepa" / "tiny_ijepa.pth.tar"
    flags = f"--init {tiny} --heads 2 --no-train --eval features --tokens --precision fp32"
    flags += f" --data {data} --device cpu --out"
    here(SCRIPTS["ijepa"], flags, "one")
    run_several(f"ijepa {flags} two", ranks=2)
    vit = ijepa.load_encoder(tiny, heads=2)
    for out in ("one", "two"):
        found = np.load(f"{out}/features.npz")
        assert list(found["paths"]) == sorted(f"val/{'ab'[i % 2]}/{i}.png" for i in range(6))
        assert found["labels"].dtype == np.int64 and list(found["labels"]) == [0, 0, 0, 1, 1, 1]
        pixels = np.stack([np.asarray(Image.open(data / path)) for path in found["paths"]])
        tokens = vit(common.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
        np.testing.assert_allclose(found["tokens"], tokens, atol=1e-5)
        np.testing.assert_allclose(found["features"], tokens.mean(1), atol=1e-5)


def test_official_checkpoint_can_be_trained_on():
    tiny = GOLDEN / "ijepa" / "tiny_ijepa.pth.tar"
    flags = "--heads 2 --data textures --image-size 24 --min-context 2 --steps 2 --eval none"
    flags += f" --lr 0 --lr-start 0 --lr-final 0 --device cpu --out tuned --init {tiny}"
    here(SCRIPTS["ijepa"], flags)
    _, state = weights("tuned")
    reference = ijepa.read_weights(tiny, heads=2)
    for part in ("encoder", "predictor"):
        for name, value in reference[part].items():
            if "pos_embed" not in name:
                np.testing.assert_array_equal(state[f"model.{part}.{name}"], value)


def test_all_evaluations_of_ijepa(tmp_path, capsys):
    """Cached and augmented probe, on one rank and on two: the same table."""
    data = photographs(tmp_path / "photos", count=25)
    flags = [SCRIPTS["ijepa"].folder, f"--data {data} --steps 1 --probe-epochs 2 --probe-batch 7"]
    flags += ["--eval knn,linear,lowshot,features"]
    for name, more in (("cached", ""), ("augmented", "--probe-augment --lars")):
        here(SCRIPTS["ijepa"], *flags, more, f"--out {name}")
        results = log_rows(name)[-1]["eval"]
        for network in ("trained", "random"):
            assert {"knn", "linear", "lowshot"} == set(results[network])
        assert set(results["pixels"]) == {"knn"}
        assert Image.open(f"{name}/picture.png").size[0] > 700
        assert np.load(f"{name}/features.npz")["features"].shape == (25, 16)
    line = " ".join(["ijepa", *flags, "--probe-augment --lars --out two"])
    run_several(line, ranks=2)
    one, two = (log_rows(name)[-1]["eval"] for name in ("augmented", "two"))
    for network in ("trained", "random"):
        assert two[network] == pytest.approx(one[network], abs=9)  # two of 25 images


# ------------------------------------------------------------------------------------------ MSN's


def test_official_msn_checkpoint_in_features_out(tmp_path):
    """Features of the official layout, on one rank and on two, and training from it."""
    data = photographs(tmp_path / "data", count=6, size=(16, 16), classes=("a", "b"))
    tiny = GOLDEN / "msn" / "tiny_msn.pth.tar"
    flags = f"--init {tiny} --heads 2 --data {data} --device cpu --precision fp32"
    here(SCRIPTS["msn"], flags, "--no-train --eval features --out one")
    run_several(f"msn {flags} --no-train --eval features --out two", ranks=2)
    vit = msn.load_encoder(tiny, heads=2)
    for out in ("one", "two"):
        found = np.load(f"{out}/features.npz")
        assert list(found["labels"]) == [0, 0, 0, 1, 1, 1]
        pixels = np.stack([np.asarray(Image.open(data / path)) for path in found["paths"]])
        images = common.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        np.testing.assert_allclose(found["features"], msn.encode(vit, images), atol=1e-5)
    still = "--steps 1 --lr 0 --lr-start 0 --lr-final 0 --batch 4 --focal-size 8 --workers 0"
    here(SCRIPTS["msn"], flags, still, "--eval none --no-compile --out tuned")
    tuned = weights("tuned")[1]
    torch.testing.assert_close(tuned["model.prototypes"], msn.read_weights(tiny, 2)["prototypes"])


def test_all_evaluations_of_msn(tmp_path):
    """Also from the Hub's file, and on two ranks: the same table."""
    data = photographs(tmp_path / "photos", count=25)
    hub = GOLDEN / "hub" / "msn" / "model.safetensors"
    flags = f"--init {hub} --heads 2 --no-train --data {data} --device cpu --precision fp32 "
    flags += "--workers 0 --probe-epochs 2 --probe-batch 7 --eval knn,linear,lowshot,features"
    for name, more in (("cached", ""), ("augmented", "--probe-augment")):
        here(SCRIPTS["msn"], flags, more, f"--out {name}")
        results = log_rows(name)[-1]["eval"]
        for column in ("trained", "random", "pixels"):
            assert set(results[column]) == {"knn", "linear", "1-shot", "2-shot", "5-shot", "1 %"}
        assert np.load(f"{name}/features.npz")["features"].shape == (25, 24)
    run_several(f"msn {flags} --probe-augment --out two", ranks=2)
    two = log_rows("two")[-1]["eval"]
    for column in ("trained", "random", "pixels"):
        assert two[column] == pytest.approx(results[column], abs=9)  # two of 25 images


def test_a_label_list_of_msn_is_read_before_training(tmp_path, capsys):
    data = photographs(tmp_path / "photos")
    (tmp_path / "list.txt").write_text("0.jpg\nnobody knows.jpg\n")
    flags = [SCRIPTS["msn"].folder, f"--data {data} --eval lowshot --steps 1"]
    printed = refused(capsys, SCRIPTS["msn"], *flags, f"--label-list {tmp_path / 'list.txt'}")
    assert "1 of 2" in printed and not Path("runs").exists()


def test_all_evaluations_of_pmsn(tmp_path):
    """The probe on the tail's labels too, and by how frequent a class is; from MSN's weights."""
    data = photographs(tmp_path / "photos", count=40)
    flags = SCRIPTS["pmsn"].folder + f"--data {data} --steps 1 --imbalance 4 --classes-per-batch 2 "
    flags += "--probe-epochs 2 --probe-batch 8 --eval knn,linear,features --prior counts --out"
    here(SCRIPTS["pmsn"], flags, "one")
    run_several(f"pmsn {flags} two", ranks=2)
    for out in ("one", "two"):
        results = log_rows(out)[-1]["eval"]
        for column in ("trained", "random", "pixels"):
            for name in ("knn", "linear", "tail labels"):
                assert {name, f"{name} head", f"{name} few"} <= set(results[column])
        assert any("kl_prior" in row and len(row["shares"]) == 8 for row in log_rows(out))
        assert np.load(f"{out}/features.npz")["features"].shape == (40, 16)
    flags = f"--init {GOLDEN}/msn/tiny_msn.pth.tar --heads 2 --no-train --eval features"
    here(SCRIPTS["pmsn"], flags, f"--data {data} --device cpu --precision fp32 --out msn")
    here(SCRIPTS["msn"], flags, f"--data {data} --device cpu --precision fp32 --out same")
    ours, theirs = (np.load(f"{out}/features.npz")["features"] for out in ("msn", "same"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# --------------------------------------------------------------------------------------- learning


def learn(script, flags):
    """Run the toy preset with these flags on as many threads as pytest has; return the log."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        script.module.main(f"--out learnt --device cpu --no-compile {flags}".split())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return log_rows("learnt")


def test_ijepa_learns():
    """A quarter of the toy's run: features tell alphabets apart better than a random encoder's."""
    rows = learn(SCRIPTS["ijepa"], "--steps 250 --eval linear --probe-epochs 4 --workers 0")
    results = rows[-1]["eval"]
    assert results["trained"]["linear"] > results["random"]["linear"] + 8
    last = [row for row in rows if "feature_std" in row][-1]
    assert last["feature_std"] > 0.02 and last["feature_rank"] > 3, "collapsed"


def test_msn_learns():
    """On the toy: anchors find their image's cluster, and few labels say more than of a random encoder."""
    flags = "--steps 250 --batch 64 --width 48 --depth 3 --eval lowshot --workers 0"
    rows = learn(SCRIPTS["msn"], flags)
    found = next(row for row in rows if "match_ratio" in row)
    assert found["match_ratio"] > 1.01
    trained, random = (rows[-1]["eval"][name] for name in ("trained", "random"))
    assert trained["1-shot"] > random["1-shot"] + 4 and trained["5-shot"] > random["5-shot"] + 4
    last = [row for row in rows if "me_max" in row][-1]
    assert last["prototypes_used"] > 3 and last["me_max"] < 0.1, "collapsed"


def test_pmsn_moves_cluster_sizes_to_the_prior_it_is_given():
    """The mechanics, not a gain in accuracy: the same run with two priors ends nearer to its own."""
    found = {}
    for prior in ("uniform", "power-law"):
        flags = "--steps 60 --batch 32 --tau 1 --imbalance 5 --eval none --device cpu --no-compile"
        here(SCRIPTS["pmsn"], flags, f"--workers 0 --prior {prior} --out {prior}")
        found[prior] = next(row for row in log_rows(prior) if "kl_uniform" in row)
    uniform, power = found["uniform"], found["power-law"]
    assert uniform["kl_uniform"] < 0.5 * uniform["kl_power_law"]
    assert power["kl_power_law"] < 0.5 * power["kl_uniform"]
    assert power["effective_clusters"] < uniform["effective_clusters"] - 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_run_matches_cpu_run():
    small = SCRIPTS["ijepa"].small
    run("ijepa.py", small, "--steps 3 --out cpu")
    flags = small.replace("--device cpu", "--device cuda")
    for name, compiled in (("gpu", "--no-compile"), ("compiled", "--compile")):
        run("ijepa.py", flags, f"--steps 3 --out {name} {compiled}", CUDA_VISIBLE_DEVICES="0")
        for a, b in zip(log_rows("cpu")[:3], log_rows(name)[:3], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
