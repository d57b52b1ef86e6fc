"""Runs of ijepa.py from the command line: learning, resuming, several ranks, users' data, and all that goes wrong."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import kill_at_random, log_rows, run, start
from PIL import Image

import common
import ijepa

GOLDEN = Path(__file__).parent / "golden" / "ijepa"
# a model so small that a step takes milliseconds
SMALL = "--width 16 --depth 2 --heads 2 --predictor-width 16 --predictor-depth 2".split()
SMALL += "--batch 16 --eval none --log-every 1".split()
FOLDER = [*SMALL, *"--image-size 32 --patch 8 --min-keep 0 --min-context 2 --target-scale 0.1 0.15".split()]


def weights(out):
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    return state["step"], {**state["model"], **{f"target.{k}": v for k, v in state["target"].items()}}


def assert_same(a, b, tolerance=0.0):
    (step_a, a), (step_b, b) = weights(a), weights(b)
    assert step_a == step_b and a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=tolerance, rtol=0), f"{name}: {(a[name] - b[name]).abs().max()}"


def refused(capsys, *flags, code=2):
    """Call the command line in this process, expect it to leave with `code`, and return the one line it printed."""
    with pytest.raises(SystemExit) as stop:
        ijepa.main(list(map(str, flags)))
    printed = capsys.readouterr().err
    assert stop.value.code == code and printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


def photographs(folder, count=12, size=(48, 40), classes=("cat", "dog"), splits=("train", "val"), suffix="jpg"):
    """A labelled folder of random images."""
    random = np.random.default_rng(0)
    for split in splits:
        for i in range(count):
            path = folder / split / classes[i % len(classes)] / f"{i}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return folder


# ---------------------------------------------------------------------------------------------------- resume and ranks


def test_kill_and_resume_is_bitwise(tmp_path):
    flags = [*SMALL, "--steps", "150", "--save-every", "1"]  # nearly always caught while it writes
    run("ijepa.py", *flags, "--out", "whole")
    killed = kill_at_random("ijepa.py", *flags, "--out", "killed", times=10, seed=0, longest=6.0)
    assert killed >= 5
    run("ijepa.py", *flags, "--out", "killed", "--resume")
    assert_same("whole", "killed")
    steps = [row["step"] for row in log_rows("killed") if "step" in row]
    assert steps == list(range(1, 151)), "the log has gaps or repeats"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_after_a_step_and_name_the_command_that_resumes(number):
    flags = [*SMALL, "--steps", "60"]
    process = start("ijepa.py", *flags, "--steps", "100000", "--out", "stopped")
    while not (Path("stopped/log.jsonl").exists() and Path("stopped/log.jsonl").read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "ijepa.py" in output and "--out stopped --resume" in output
    step, _ = weights("stopped")
    assert 3 < step == log_rows("stopped")[-1]["step"]


def test_two_ranks_are_one_process():
    """Same losses, gradients and weights, with accumulation, with groups that fit in a rank, and with FSDP2."""
    # AdamW's first steps turn rounding into signs where a gradient is near 0: a small lr keeps that out of the losses
    flags = [*SMALL, "--steps", "4", "--flip", "--lr", "1e-5", "--lr-start", "1e-5"]
    run("ijepa.py", *flags, "--out", "one")
    run("ijepa.py", *flags, "--out", "two", ranks=2)
    run("ijepa.py", *flags, "--out", "shard", "--shard", ranks=2)
    run("ijepa.py", *flags, "--out", "parts", "--accumulate", "4")
    for other in ("two", "shard", "parts"):
        assert_same("one", other, tolerance=1e-5)
        for a, b in zip(log_rows("one"), log_rows(other), strict=True):
            if "loss" in a:
                assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
                assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-5)
    run("ijepa.py", *flags, "--group", "8", "--out", "one-grouped")
    run("ijepa.py", *flags, "--group", "8", "--out", "two-grouped", ranks=2)
    assert_same("one-grouped", "two-grouped", tolerance=1e-5)


def test_sharded_run_resumes_and_evaluates_like_an_unsharded_one():
    flags = [*SMALL, "--steps", "4"]
    run("ijepa.py", *flags, "--out", "one", "--eval", "knn", "--no-baselines", "--eval-limit", "300")
    process_flags = [*SMALL, "--steps", "4", "--out", "shard", "--shard", "--save-every", "2"]
    run("ijepa.py", *process_flags, ranks=2)
    state = torch.load("shard/last.pt", weights_only=True)
    assert all(type(v) is torch.Tensor for v in state["model"].values())
    run("ijepa.py", *process_flags, "--eval", "knn", "--no-baselines", "--eval-limit", "300", "--resume", ranks=2)
    one, shard = (log_rows(out)[-1]["eval"]["trained"] for out in ("one", "shard"))
    assert shard["knn20"] == pytest.approx(one["knn20"], abs=0.2)


def test_number_of_workers_changes_nothing(tmp_path):
    data = photographs(tmp_path / "photos")
    for workers, cache in ((0, 0), (2, 0)):
        flags = ["--data", data, "--steps", 3, "--workers", workers, "--cache", cache]
        run("ijepa.py", *FOLDER, *flags, "--out", f"w{workers}")
    assert_same("w0", "w2")


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_official_checkpoint_in_features_out(tmp_path):
    """The official layout through --init: features equal the reference's, for both encoders, on one rank and on two."""
    g = np.load(GOLDEN / "forward.npz")
    data, images = tmp_path / "data", torch.rand(6, 3, 32, 32)
    for i, image in enumerate(images):
        path = data / "val" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(path)
    (data / "train").mkdir()
    (data / "train" / "a").mkdir()
    Image.new("RGB", (32, 32)).save(data / "train" / "a" / "x.png")
    tiny = GOLDEN / "tiny_ijepa.pth.tar"
    common_flags = ["--init", tiny, "--heads", 2, "--eval", "features", "--data", data, "--tokens"]
    for encoder in ("target", "context"):
        for ranks in (1, 2):
            out = tmp_path / f"{encoder}{ranks}.npz"
            flags = ["--encoder", encoder, "--features-out", out, "--out", f"{encoder}{ranks}"]
            run("ijepa.py", *common_flags, *flags, ranks=ranks)
            found = np.load(out)
            assert found["features"].dtype == np.float32 and found["features"].shape == (6, 12)
            assert found["tokens"].shape == (6, 64, 12)
            assert list(found["paths"]) == sorted(f"val/{'ab'[i % 2]}/{i}.png" for i in range(6))
            assert found["labels"].dtype == np.int64 and list(found["labels"]) == [0, 0, 0, 1, 1, 1]
            vit = ijepa.load_encoder(tiny, encoder=encoder, heads=2)
            pixels = [np.asarray(Image.open(data / p)) for p in found["paths"]]
            tokens = vit(ijepa.normalize(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)))
            np.testing.assert_allclose(found["tokens"], tokens, atol=1e-5)
            np.testing.assert_allclose(found["features"], tokens.mean(1), atol=1e-5)
    golden = torch.from_numpy(g["imgs_q"]).float() / 16
    for encoder, name in (("target", "target"), ("context", "encoder")):
        tokens = ijepa.load_encoder(tiny, encoder=encoder, heads=2)(golden)
        np.testing.assert_allclose(tokens.mean(1), g[f"{name}_pooled"], atol=1e-5)


def test_other_resolution_interpolates_positions_and_says_so(tmp_path, capsys):
    vit = ijepa.load_encoder(GOLDEN / "tiny_ijepa.pth.tar", image_size=48, heads=2)
    assert "interpolated from 8x8 to 12x12" in capsys.readouterr().out
    assert vit(torch.zeros(1, 3, 48, 48)).shape == (1, 144, 12)
    g = np.load(GOLDEN / "forward.npz")
    same = ijepa.load_encoder(GOLDEN / "tiny_ijepa.pth.tar", image_size=32, heads=2)
    assert capsys.readouterr().out == ""
    np.testing.assert_allclose(same(torch.from_numpy(g["imgs_q"]).float() / 16), g["target_tokens"], atol=1e-5)


def test_official_checkpoint_can_be_trained_on(tmp_path):
    tiny = GOLDEN / "tiny_ijepa.pth.tar"
    flags = "--heads 2 --data toy --image-size 24 --steps 2 --eval none --out tuned --lr 0 --lr-start 0 --lr-final 0"
    run("ijepa.py", "--init", tiny, *flags.split())
    _, state = weights("tuned")
    reference = ijepa.read_checkpoint(tiny, heads=2)
    np.testing.assert_array_equal(state["predictor.mask_token"], reference["predictor"]["mask_token"])
    name = "blocks.4.mlp.fc1.weight"
    np.testing.assert_array_equal(state[f"encoder.{name}"], reference["encoder"][name])


def test_all_evaluations_run_on_labelled_folder(tmp_path):
    data = photographs(tmp_path / "photos", count=24)
    flags = ["--probe-epochs", 2, "--probe-batch", 8, "--lowshot", 0.2, "--eval", "knn,linear,lowshot,features"]
    for name, more in (("cached", []), ("augmented", ["--probe-augment", "--probe", "lars", "--cache", 0])):
        output = run("ijepa.py", *FOLDER, "--data", data, "--steps", 1, "--out", name, *flags, *more)
        results = log_rows(name)[-1]["eval"]
        expected = {"knn10", "knn20", "knn100", "linear", "linear_pooled", "linear_concat4", "lowshot"}
        for network in ("trained", "random"):
            assert expected <= results[network].keys()
        trained = results["trained"]
        assert trained["linear"] == max(trained["linear_pooled"], trained["linear_concat4"])
        assert results["pixels"].keys() == {"knn10", "knn20", "knn100"}
        assert "trained" in output and Path(name, "picture.png").stat().st_size > 1000
        assert np.load(f"{name}/features.npz")["features"].shape == (24, 16)
    assert Image.open("cached/picture.png").size[0] > 1000


def test_own_checkpoint_is_evaluated_with_its_own_architecture():
    run("ijepa.py", *SMALL, "--steps", 2, "--out", "trained")
    flags = ["--init", "trained/last.pt", "--eval", "features", "--features-out", "f.npz", "--features-split", "val"]
    run("ijepa.py", *flags)
    features = np.load("f.npz")["features"]
    assert features.shape[1] == 16 and Path("runs/ijepa").is_dir()
    run("ijepa.py", *flags)
    assert Path("runs/ijepa-2").is_dir(), "a run never overwrites another"
    np.testing.assert_array_equal(np.load("f.npz")["features"], features)


# ---------------------------------------------------------------------------------------------------------------- data


def test_every_kind_of_image_becomes_rgb(tmp_path):
    """Modes and formats; EXIF turns; 16 bits are scaled, not clipped."""
    base = Image.fromarray(np.arange(32 * 24 * 3, dtype=np.uint32).reshape(24, 32, 3).astype(np.uint8))
    grey16 = Image.fromarray((np.arange(24 * 32, dtype=np.uint16) * 80).reshape(24, 32))
    modes = {"b.png": "L", "c.png": "P", "d.jpg": "CMYK", "h.png": "RGBA", "i.png": "1"}
    files = {"a.jpg": base, "e.webp": base, "f.bmp": base, "g.png": grey16}
    files |= {name: base.convert(mode) for name, mode in modes.items()}
    for name, image in files.items():
        image.save(tmp_path / name)
        pixels, size = ijepa.decode(tmp_path / name, lambda w, h: (0, 0, h, w), (32, 24))
        assert pixels.shape == (3, 24, 32) and pixels.dtype == torch.uint8 and size == (32, 24)
    pixels, _ = ijepa.decode(tmp_path / "g.png", lambda w, h: (0, 0, h, w), (32, 24))
    np.testing.assert_array_equal(pixels[0], np.asarray(grey16) >> 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    base.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels, size = ijepa.decode(tmp_path / "turned.jpg", lambda w, h: (0, 0, h, w), (24, 32))
    assert size == (24, 32)
    upright, _ = ijepa.decode(tmp_path / "a.jpg", lambda w, h: (0, 0, h, w), (32, 24))
    assert (pixels.float() - upright.rot90(-1, (1, 2)).float()).abs().mean() < 12


def test_draft_decodes_what_a_full_decode_does(tmp_path):
    """A large JPEG, decoded at a fraction of its size, gives nearly the pixels of the full decode."""
    line = np.linspace(0, 6 * np.pi, 1200)
    smooth = np.stack([127 + 120 * np.sin(line[:900, None] + line[None] * k) for k in (1, 2, 3)], axis=2)
    smooth = smooth.astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "large.jpg", quality=95, subsampling=0)
    Image.fromarray(smooth).save(tmp_path / "large.png")
    for box in ((0, 0, 900, 1200), (100, 333, 500, 610), (899 - 64, 0, 64, 80)):
        paths = (tmp_path / "large.jpg", tmp_path / "large.png")
        jpg, png = (ijepa.decode(path, lambda w, h, box=box: box, (64, 64))[0].float() for path in paths)
        assert (jpg - png).abs().mean() < 4  # a shift by one pixel makes more than 10


def test_images_in_memory_and_from_disk_look_the_same(tmp_path):
    """Statistics of the two regimes' training images agree, for images whose aspect the cache changes."""
    line = np.linspace(0, 3, 90)
    image = np.stack([np.broadcast_to(c * 80 * line, (60, 90)) for c in (0.5, 0.8, 1.0)], axis=2).astype(np.uint8)
    (tmp_path / "flat").mkdir()
    for i in range(8):
        Image.fromarray(image if i else image[:50]).save(tmp_path / "flat" / f"{i}.png")  # two sizes: a square cache
    config = ijepa.Config(data=str(tmp_path / "flat"), image_size=32, patch=4, workers=0, batch=64)
    world, log = ijepa.World(0, 1, torch.device("cpu")), common.Log("out", ijepa.World(0, 1, torch.device("cpu")))
    split = ijepa.open_split(config, "train")
    cached = ijepa.cache_pixels(split, config, world, log)
    assert split.pixels is None and cached.pixels.shape == (8, 3, 36, 36)
    means = []
    for source in (split, cached):
        batches = ijepa.Batches(source, config, world, 64, (0.3, 1.0), flip=False)
        images = torch.cat([ijepa.make_images(batches[t], source.pixels, 32, world.device) for t in range(16)])
        means.append(torch.stack([images.mean((0, 2, 3)), images.diff(dim=3).mean((0, 2, 3)), images.std((0, 2, 3))]))
    assert (means[0] - means[1]).abs().max() < 0.05
    assert (means[0][1] - means[1][1]).abs().max() < 0.001  # the slope along a row: crops have the same scale


def test_flat_folder_trains_and_says_that_probes_are_skipped(tmp_path):
    photographs(tmp_path / "flat", splits=(".",), classes=(".",))
    output = run("ijepa.py", *FOLDER, "--data", tmp_path / "flat", "--steps", 1, "--eval", "knn,linear")
    assert "knn, linear: skipped" in output


def test_names_resolve_below_the_data_variable(tmp_path):
    photographs(tmp_path / "store" / "cifar10")
    run("ijepa.py", *FOLDER, "--data", "cifar10", "--preset", "toy", "--steps", 1, DATA=str(tmp_path / "store"))
    env = {"DATA": str(tmp_path / "nothing"), "https_proxy": "http://127.0.0.1:9"}
    output = run("ijepa.py", "--data", "cifar10", code=2, **env)
    assert "could not download CIFAR-10" in output and "cifar-10-binary.tar.gz" in output


def test_cifar10_archive_is_checked(tmp_path, capsys, monkeypatch):
    import hashlib
    import io
    import tarfile

    archive = tmp_path / "cifar-10-binary.tar.gz"
    random = np.random.default_rng(0)
    rows = random.integers(0, 10, (7, 3073), dtype=np.uint8)
    with tarfile.open(archive, "w:gz") as tar:
        names = "airplane automobile bird cat deer dog frog horse ship truck".split()
        files = {f"data_batch_{i}.bin": rows.tobytes() for i in range(1, 6)} | {"test_batch.bin": rows[:3].tobytes()}
        files["batches.meta.txt"] = ("\n".join(names) + "\n").encode()
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(SystemExit):
        ijepa.cifar10_binary(tmp_path, "train")
    assert "sha256" in capsys.readouterr().err
    monkeypatch.setattr(ijepa, "CIFAR10_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    train, val = (ijepa.cifar10_binary(tmp_path, split) for split in ("train", "val"))
    assert len(train) == 35 and len(val) == 3 and train.classes == names
    np.testing.assert_array_equal(val.pixels.flatten(1), rows[:3, 1:])
    np.testing.assert_array_equal(val.labels, rows[:3, 0])


# ------------------------------------------------------------------------------------------------------ the error table


def test_missing_or_empty_data(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    expected = {"nowhere": "data/nowhere", tmp_path / "empty": ".jpg", tmp_path / "x": "train/CLASS"}
    for data, words in expected.items():
        assert words in refused(capsys, "--data", data, "--out", "out")


def test_corrupt_images_are_skipped_counted_and_limited(tmp_path):
    data = photographs(tmp_path / "photos", count=200, suffix="jpg", size=(40, 40))
    broken = [data / "train" / "cat" / "0.jpg", data / "train" / "dog" / "1.jpg"]
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    broken[1].write_bytes(b"not an image")
    for name, cache in (("streamed", 0), ("cached", 2)):
        flags = [*FOLDER, "--data", data, "--steps", 15, "--cache", cache, "--out", name, "--workers", 1]
        output = run("ijepa.py", *flags, "--eval", "knn", "--no-baselines")
        assert all(output.count(f"skipped an unreadable file: {path}") >= 1 for path in broken)
        assert log_rows(name)[-1]["images"] == {"train": 198 if cache else 200, "val": 200}
    for i in range(2, 8):
        (data / "train" / ("cat", "dog")[i % 2] / f"{i}.jpg").write_bytes(b"")
    for cache in (0, 2):
        output = run("ijepa.py", *FOLDER, "--data", data, "--steps", 40, "--cache", cache, "--workers", 0, code=2)
        assert "--max-bad" in output
    run("ijepa.py", *FOLDER, "--data", data, "--steps", 2, "--max-bad", 0.1)


def train_here(out, config=None, **changes):
    """Train in this process, to reach into it; a tiny model unless a config is given."""
    tiny = dict(width=16, depth=2, heads=2, predictor_width=16, predictor_depth=1, batch=16, eval="none", log_every=1)
    config = config or replace(ijepa.Config(), out=out, compile=False, device="cpu", **tiny, **changes)
    Path(out).mkdir(exist_ok=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return ijepa.train(config, ijepa.World(0, 1, torch.device("cpu")), Path(out))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_step_that_is_not_finite_is_not_applied(monkeypatch):
    loss, calls = ijepa.jepa_loss, []

    def poisoned(predictions, targets):
        calls.append(1)
        return loss(predictions, targets) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(ijepa, "jepa_loss", poisoned)
    train_here("two", steps=2, schedule_scale=2.0)
    before = weights("two")[1]
    calls.clear()
    train_here("three", steps=3, schedule_scale=4 / 3, save_every=1, warmup=0.0667)
    assert weights("three")[0] == 3
    rows = log_rows("three")
    assert not np.isfinite(rows[2]["loss"]) and np.isfinite(rows[1]["loss"])
    calls.clear()
    train_here("clean", steps=2, schedule_scale=2.0)
    for name, value in weights("clean")[1].items():
        assert torch.equal(before[name], value)
    # the weights after the poisoned third step are those after the second
    calls.clear()
    monkeypatch.setattr(ijepa, "schedules", lambda config, step, steps: (1e-3, 0.04, 0.9))
    train_here("a", steps=2)
    calls.clear()
    train_here("b", steps=3)
    for name, value in weights("a")[1].items():
        assert torch.equal(value, weights("b")[1][name]), name


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run(monkeypatch, capsys):
    loss, calls = ijepa.jepa_loss, []

    def poisoned(predictions, targets):
        calls.append(1)
        return loss(predictions, targets) * (float("inf") if len(calls) > 4 else 1)

    monkeypatch.setattr(ijepa, "jepa_loss", poisoned)
    with pytest.raises(SystemExit) as stop:
        train_here("bad", steps=50, save_every=1)
    assert stop.value.code == 3 and "last good" in capsys.readouterr().err
    step, state = weights("bad")
    assert step in (4, 5, 6) and all(v.isfinite().all() for v in state.values())


def test_out_that_holds_a_run_is_refused(capsys):
    run("ijepa.py", *SMALL, "--steps", 1, "--out", "here")
    before = Path("here/last.pt").read_bytes()
    output = refused(capsys, *SMALL, "--steps", 2, "--out", "here")
    assert "--resume" in output and "--out" in output and Path("here/last.pt").read_bytes() == before


def test_resume_starts_from_scratch_where_there_is_nothing():
    run("ijepa.py", *SMALL, "--steps", 2, "--out", "fresh", "--resume")
    assert weights("fresh")[0] == 2
    run("ijepa.py", *SMALL, "--steps", 2, "--out", "fresh", "--resume")  # and does nothing where all is done
    assert weights("fresh")[0] == 2


def test_disk_full_keeps_the_previous_checkpoint(tmp_path):
    run("ijepa.py", *SMALL, "--steps", 2, "--out", "full")
    before = Path("full/last.pt").read_bytes()
    process = start("ijepa.py", *SMALL, "--steps", 4, "--out", "full", "--resume")
    process.kill()
    process.communicate()
    limit = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); "
    Path("limited.py").write_text(limit + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    script = Path(ijepa.__file__)
    output = run(Path("limited.py").resolve(), script, *SMALL, "--steps", 4, "--out", "full", "--resume", code=1,
                 PYTHONPATH=str(script.parent))  # fmt: skip
    assert "could not write" in output and "the previous last.pt is intact" in output
    assert Path("full/last.pt").read_bytes() == before and not list(Path("full").glob("*.tmp"))


def test_checkpoints_that_are_none(capsys):
    run("ijepa.py", *SMALL, "--steps", 1, "--out", "good")
    good = torch.load("good/last.pt", weights_only=True)
    whole = Path("good/last.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("text.pt").write_text("hello")
    torch.save({"script": "msn", "model": {}}, "other.pt")
    torch.save({"weights": torch.zeros(3)}, "strange.pt")
    torch.save(os.system, "code.pt")
    good["target"].pop("norm.weight")
    torch.save(good, "gap.pt")
    errors = dict(cut="truncated", text="not a checkpoint", other="msn", strange="found weights", code="read safely",
                  gap="missing: norm.weight", absent="no checkpoint at")  # fmt: skip
    for name, words in errors.items():
        assert words in refused(capsys, "--init", f"{name}.pt", "--eval", "features", "--out", name)
    Path("good/last.pt").write_bytes(whole[:1000])
    assert "truncated" in refused(capsys, *SMALL, "--steps", 2, "--out", "good", "--resume")
    Path("good/last.pt").write_bytes(whole)
    assert "--width 16" in refused(capsys, *SMALL, "--steps", 2, "--out", "good", "--resume", "--width", 32)


def test_settings_that_cannot_work(capsys):
    for flags, words in (
        ("--batch 10 --accumulate 3", "--batch"),
        ("--image-size 30", "--patch"),
        ("--width 66", "heads"),
        ("--group 48", "--batch 64"),
        ("--wdith 32", "--width"),
        ("--preset cifra10", "cifar10"),
        ("--eval knnn", "knn"),
        ("--masks funny", "official"),
        ("--min-keep 30", "--min-keep"),
        ("--schedule-scale 0.5", "--schedule-scale"),
    ):
        assert words in refused(capsys, *flags.split())
        assert not Path("runs").exists(), "refused before any work"


def test_out_of_memory_names_the_flags_that_help(monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(ijepa, "train", full)
    with pytest.raises(SystemExit) as stop:
        ijepa.main(["--out", "memory", "--device", "cpu"])
    assert stop.value.code == 4
    printed = capsys.readouterr().err
    assert all(flag in printed for flag in ("--accumulate", "--precision", "--shard", "--batch"))


def test_help_lists_every_flag_with_meaning_and_default():
    output = run("ijepa.py", "--help")
    for name in vars(ijepa.Config()):
        assert f"--{name.replace('_', '-')}" in output, name
    assert "pixels" in output and "[0.04]" in output
    output = run("ijepa.py", "--preset", "vit_h14_in1k", "--help")
    assert "[1280]" in output


# ------------------------------------------------------------------------------------------------------------- learning


def test_it_learns():
    """In a minute, on the toy images: content is predicted, and features beat a random encoder's."""
    torch.set_num_threads(2)
    config = replace(ijepa.Config(preset="toy"), steps=300, out="learnt", device="cpu", compile=False, probe_epochs=5)
    world = ijepa.World(0, 1, torch.device("cpu"))
    model, target, split = train_here("learnt", config)
    images = ijepa.normalize(ijepa.open_split(config, "val").pixels[:256])
    _, ratio = ijepa.content_ratio(model, target, images, config)
    results = ijepa.evaluate(target, config, world, common.Log("learnt", world), split)
    assert ratio > 1.2
    assert results["trained"]["knn20"] > results["random"]["knn20"] + 5
    assert results["trained"]["linear"] > results["random"]["linear"] + 5
    rows = log_rows("learnt")
    assert rows[-3]["feature_std"] > 0.02 and rows[-3]["feature_rank"] > 3, "collapsed"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU it takes minutes, and is off by default")
def test_compiled_step_gives_the_same_loss():
    for name, flag in (("plain", "--no-compile"), ("compiled", "--compile")):
        run("ijepa.py", *SMALL, "--steps", 3, "--out", name, flag, timeout=400)
    for a, b in zip(log_rows("plain")[:3], log_rows("compiled")[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_run_matches_cpu_run():
    run("ijepa.py", *SMALL, "--steps", 3, "--out", "cpu")
    env = {"CUDA_VISIBLE_DEVICES": "0"}
    flags = "--steps 3 --out gpu --device cuda --precision fp32 --no-compile".split()
    run("ijepa.py", *SMALL, *flags, **env)
    for a, b in zip(log_rows("cpu")[:3], log_rows("gpu")[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_config_json_is_the_config():
    run("ijepa.py", *SMALL, "--steps", 1, "--out", "kept")
    config = json.loads(Path("kept/config.json").read_text())
    assert config["width"] == 16 and config["preset"] == "toy" and set(config) == set(vars(ijepa.Config()))
