"""Runs of the training scripts from the command line: resuming, several ranks, users' data, and all that goes wrong.

What design and error table promise of every script is tested for each of SCRIPTS; what is particular to I-JEPA's file
(data reading, which the others copy) once.
"""

import inspect
import json
import os
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import kill_when, log_rows, run_several
from PIL import Image

import common
import msn
from helpers import Forked, kill_at_random, log_rows, run_several
from PIL import Image

import common
import flexpredict
import iwm
import pixel_vit
import msn
import pmsn
import vjepa
import pmsn

GOLDEN = Path(__file__).parent / "golden"


@dataclass
class Script:
    """A script under test: flags of a model so small that a step takes milliseconds, and its loss function's name."""

    module: ModuleType
    small: list
    folder: list  # the same for images of 32 pixels
    loss: str
    kills: int = 2
    stream: tuple = ("--cache", 0)  # flags that make it read files in workers
    probes: str = "knn,linear"  # evaluations that need labels
    noise: tuple = ()  # parameters without a gradient but for rounding, which Adam turns into steps

    @property
    def name(self):
        return self.module.__name__


TINY = "--width 16 --depth 2 --heads 2 --batch 16 --eval none --log-every 1 --device cpu --no-compile --precision fp32".split()
PREDICTOR = "--predictor-width 16 --predictor-depth 2".split()
BLOCKS = "--image-size 32 --patch 8 --min-keep 0 --min-context 2 --target-scale 0.1 0.15".split()
HEAD = "--head-hidden 16 --embedding 8 --prototypes 8".split()
HIDDEN = "--image-size 32 --patch 8 --min-visible 4".split()
CLIPS = [*PREDICTOR, "--frames", "4", "--physics-count", "1", "--group", "0"]
VIEWS = "--image-size 32 --patch 8 --focal-size 16".split()
PIXELS = "--image-size 8".split()
PAINTED = "--task mae --image-size 32 --patch 8 --decoder-width 16 --decoder-heads 2".split()
SCRIPTS = {
    "pixel_vit": Script(pixel_vit, [*TINY, *PIXELS], [*TINY, *PAINTED], "classification_loss"),
NORMED = ("fc.fc1.bias", "fc.fc2.bias", "encoder.norm.bias", "attn.qkv.bias")  # BatchNorm and softmax cancel them
SCRIPTS = {
    "flexpredict": Script(flexpredict, [*TINY, *PREDICTOR], [*TINY, *PREDICTOR, *BLOCKS], "jepa_loss"),
    "iwm": Script(iwm, [*TINY, *PREDICTOR], [*TINY, *PREDICTOR, *HIDDEN], "iwm_loss"),
    "msn": Script(msn, [*TINY, *HEAD], [*TINY, *HEAD, *VIEWS], "msn_loss", noise=NORMED),
    "pmsn": Script(pmsn, [*TINY, *HEAD], [*TINY, *HEAD, *VIEWS, "--imbalance", "0"], "pmsn_loss", noise=NORMED),
    "vjepa": Script(vjepa, [*TINY, *CLIPS], [*TINY, *CLIPS, *VIEWS[:4]], "vjepa_loss", stream=(), probes="knn,probe"),
    "pmsn": Script(pmsn, [*TINY, *HEAD], [*TINY, *HEAD, *VIEWS, "--imbalance", "0"], "pmsn_loss", noise=NORMED),
}


@pytest.fixture(params=SCRIPTS)
def script(request, monkeypatch):
    """Each script in turn, without those parts of two reports that take a second, which other tests run whole."""
    monkeypatch.setattr(vjepa, "picture_surprise", lambda *_: None)
    monkeypatch.setattr(pmsn, "epoch_assignments", functools.partial(pmsn.epoch_assignments, steps=4))
    return SCRIPTS[request.param]


def here(script, *flags, code=None):
    """Call a script's command line in this process, with its signal handlers undone; expect to leave with `code`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that tests start: the order of sums depends on it
    try:
        if code is None:
            return script.module.main(list(map(str, flags)))
        with pytest.raises(SystemExit) as stop:
            script.module.main(list(map(str, flags)))
        assert stop.value.code == code
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refused(capsys, script, *flags, code=2):
    """Call the command line in this process, expect it to leave with `code`, and return the one line it printed."""
    capsys.readouterr()
    here(script, *flags, code=code)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


def weights(out):
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    return state["step"], {**state["model"], **{f"target.{k}": v for k, v in state["target"].items()}}


def assert_same(a, b, tolerance=0.0, without=()):
    (step_a, a), (step_b, b) = weights(a), weights(b)
    assert step_a == step_b and a.keys() == b.keys()
    for name in (n for n in a if not n.endswith(without)):
        assert torch.allclose(a[name], b[name], atol=tolerance, rtol=0), f"{name}: {(a[name] - b[name]).abs().max()}"


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


def test_kill_and_resume_is_bitwise(script):
    flags = [*script.small, "--steps", "40", "--save-every", "1"]  # nearly always caught while it writes
    here(script, *flags, "--out", "whole")
    for rows in (3, 20):
        kill_when(f"{script.name}.py", *flags, "--out killed", rows=rows)
        assert len(log_rows("killed")) < 40, "it was killed too late"
    here(script, *flags, "--out", "killed", "--resume")
    assert_same("whole", "killed")
    steps = [row["step"] for row in log_rows("killed") if "step" in row]
    assert steps == list(range(1, 41)), "the log has gaps or repeats"




# AdamW's first steps turn rounding into signs where a gradient is near 0: a small lr keeps that out of the losses
FOUR_STEPS = "--steps 4 --flip --lr 1e-5 --lr-start 1e-5".split()
KNN = "--eval knn --no-baselines --eval-limit 300".split()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """A folder with runs of every script on two ranks, made by one pair of processes: NAME/two, NAME/shard, ..."""
    folder, lines = tmp_path_factory.mktemp("ranks"), []
    for name, script in SCRIPTS.items():
        flags = [name, *script.small, *FOUR_STEPS, "--out"]
        shard = [*flags, folder / name / "shard", "--shard", "--save-every", "2"]
        lines += [[*flags, folder / name / "two"], shard, [*shard, "--resume", *KNN]]
        lines += [[*flags, folder / name / "grouped", "--group", "8"]] * (name == "ijepa")
    run_several(*lines, ranks=2)
    return folder


def test_two_ranks_are_one_process(script, on_two_ranks):
    """Same losses, gradients and weights on two ranks, with FSDP2 and with accumulation; a sharded run resumes."""
    flags = [*script.small, *FOUR_STEPS]
    here(script, *flags, "--out", "one", *KNN)
    here(script, *flags, "--out", "parts", "--accumulate", "4")
    found = on_two_ranks / script.name
    for other in (found / "two", found / "shard", "parts"):
        assert_same("one", other, tolerance=1e-5, without=script.noise)
        for a, b in zip(log_rows("one"), log_rows(other), strict=False):
            if "loss" in a:
                tolerance = 1e-5 if a["step"] == 1 else 5e-5  # AdamW amplifies rounding
                assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
                assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=tolerance)
    if script.name == "ijepa":
        here(script, *flags, "--group", "8", "--out", "grouped")
        assert_same("grouped", found / "grouped", tolerance=1e-5)
    state = torch.load(found / "shard" / "last.pt", weights_only=True)
    assert all(type(v) is torch.Tensor for v in state["model"].values())
    one, shard = (log_rows(out)[-1]["eval"]["trained"] for out in ("one", found / "shard"))
    assert shard["knn20"] == pytest.approx(one["knn20"], abs=0.2)


def test_number_of_workers_changes_nothing(script, tmp_path):
    data = photographs(tmp_path / "photos")
    for workers in (0, 2):
        flags = ["--data", data, "--steps", 3, "--workers", workers, *script.stream]
        here(script, *script.folder, *flags, "--out", f"w{workers}")
    assert_same("w0", "w2")


# ---------------------------------------------------------------------------------------------------------- evaluation










def test_own_checkpoint_is_evaluated_with_its_own_architecture(script):
    here(script, *script.small, "--steps", 2, "--out", "trained")
    flags = ["--init", "trained/last.pt", "--eval", "features", "--features-out", "f.npz", "--features-split", "val"]
    here(script, *flags)
    features = np.load("f.npz")["features"]
    assert features.shape[1] == 16 and Path(f"runs/{script.name}").is_dir()
    here(script, *flags)
    assert Path(f"runs/{script.name}-2").is_dir(), "a run never overwrites another"
    np.testing.assert_array_equal(np.load("f.npz")["features"], features)


# ---------------------------------------------------------------------------------------------------------------- data








def test_flat_folder_trains_and_says_that_probes_are_skipped(script, tmp_path, capsys):
    photographs(tmp_path / "flat", splits=(".",), classes=(".",))
    here(script, *script.folder, "--data", tmp_path / "flat", "--steps", 1, "--eval", script.probes)
    assert f"{script.probes.replace(',', ', ')}: skipped" in capsys.readouterr().out






# ------------------------------------------------------------------------------------------------------ the error table


def test_missing_or_empty_data(script, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    expected = {"nowhere": "data/nowhere", tmp_path / "empty": ".jpg", tmp_path / "x": "train/CLASS"}
    for data, words in expected.items():
        assert words in refused(capsys, script, "--data", data, "--out", "out", "--resume")


def test_corrupt_images_are_skipped_counted_and_limited(script, tmp_path, capsys):
    data = photographs(tmp_path / "photos", count=200, suffix="jpg", size=(40, 40))
    broken = [data / "train" / "cat" / "0.jpg", data / "train" / "dog" / "1.jpg"]
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    broken[1].write_bytes(b"not an image")
    regimes = {"streamed": script.stream} | ({"cached": ("--cache", 2)} if script.stream else {})
    for name, cache in regimes.items():
        flags = [*script.folder, "--data", data, "--steps", 15, *cache, "--out", name, "--workers", 1]
        here(script, *flags, "--eval", "knn", "--no-baselines")
        output = capsys.readouterr().out
        assert all(output.count(f"skipped an unreadable file: {path}") >= 1 for path in broken)
        row = log_rows(name)[-1]
        images = row["images"] if "images" in row else row["videos"]
        assert (images["train"], images["val"]) == (198 if name == "cached" else 200, 200)
    for i in range(2, 8):
        (data / "train" / ("cat", "dog")[i % 2] / f"{i}.jpg").write_bytes(b"")
    for cache in regimes.values():
        flags = [*script.folder, "--data", data, "--steps", 40, *cache, "--workers", 0]
        here(script, *flags, code=2)
        assert "--max-bad" in capsys.readouterr().err
    here(script, *script.folder, "--data", data, "--steps", 2, "--max-bad", 0.1, "--workers", 0)


def poison(monkeypatch, script, when, value):
    """Make the loss (a tensor, or the first of a tuple) `value` in those training steps 1, 2, ... where when(step)."""
    loss, calls = getattr(script.module, script.loss), []

    def poisoned(*args, **kwargs):
        calls.append(1)
        result, factor = loss(*args, **kwargs), value if when(len(calls)) else 1.0
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

    monkeypatch.setattr(script.module, script.loss, poisoned)


def test_a_step_that_is_not_finite_is_not_applied(script, monkeypatch):
    """The weights after a poisoned third step are those after the second, and training goes on."""
    flags = [*script.small, "--save-every", "1"]
    constant = (1e-3, 0.04, 0.9) + ((0.25,) if "prototypes" in vars(script.module.Config()) else ())
    monkeypatch.setattr(script.module, "schedules", lambda config, step, steps: constant)
    monkeypatch.setattr(script.module, "report", lambda *_: None)
    here(script, *flags, "--out", "two", "--steps", 2)
    poison(monkeypatch, script, lambda step: step == 3, float("nan"))
    here(script, *flags, "--out", "three", "--steps", 3)
    rows = log_rows("three")
    assert not np.isfinite(rows[2]["loss"]) and np.isfinite(rows[1]["loss"])
    (_, two), (_, three) = weights("two"), weights("three")
    learned = [n for n in two if "running_" not in n and "num_batches" not in n]  # of BatchNorm
    for name in learned:
        assert torch.equal(two[name], three[name]), name
    here(script, *flags, "--out", "three", "--steps", 4, "--resume")
    assert np.isfinite(log_rows("three")[-1]["loss"])
    _, three = weights("three")
    assert any(not torch.equal(two[n], three[n]) for n in learned)


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run(script, monkeypatch, capsys):
    for log_every in (1, 5):
        flags = ["--steps", 20, "--save-every", 1, "--log-every", log_every, "--out", f"bad{log_every}"]
        with monkeypatch.context() as patch:
            poison(patch, script, lambda step: step > 4, float("inf"))
            here(script, *script.small, *flags, code=3)
        assert "last good" in capsys.readouterr().err
        step, state = weights(f"bad{log_every}")
        assert step in (4, 5, 6) and all(v.isfinite().all() for v in state.values())
    here(script, *script.small, *flags, "--resume")  # what was saved is no dead end
    assert weights("bad5")[0] == 20
    poison(monkeypatch, script, lambda step: True, float("inf"))
    here(script, *script.small, "--steps", 50, "--out", "never", code=3)
    assert "no checkpoint had been written" in capsys.readouterr().err and not Path("never/last.pt").exists()


def test_out_that_holds_a_run_is_refused(script, capsys):
    here(script, *script.small, "--steps", 1, "--out", "here")
    before = Path("here/last.pt").read_bytes()
    output = refused(capsys, script, *script.small, "--steps", 2, "--out", "here")
    assert "--resume" in output and "--out" in output and Path("here/last.pt").read_bytes() == before


def test_resume_starts_from_scratch_where_there_is_nothing(script):
    for _ in range(2):  # and does nothing where all is done
        here(script, *script.small, "--steps", 2, "--out", "fresh", "--resume")
        assert weights("fresh")[0] == 2
    config = json.loads(Path("fresh/config.json").read_text())
    assert config["width"] == 16 and config["preset"] == "toy"
    assert set(config) == set(vars(script.module.Config()))


def test_disk_full_keeps_the_previous_checkpoint(script, capsys, monkeypatch):
    import resource

    here(script, *script.small, "--steps", 2, "--out", "full")
    before = Path("full/last.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(signal, "SIGXFSZ", signal.signal(signal.SIGXFSZ, signal.SIG_IGN) or signal.SIGXFSZ)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        here(script, *script.small, "--steps", 4, "--out", "full", "--resume", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    output = capsys.readouterr().err
    assert "could not write" in output and "the previous last.pt is intact" in output
    assert Path("full/last.pt").read_bytes() == before and not list(Path("full").glob("*.tmp"))


def test_checkpoints_that_are_none(script, capsys):
    small = script.small
    here(script, *small, "--steps", 1, "--out", "good")
    good = torch.load("good/last.pt", weights_only=True)
    whole = Path("good/last.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("text.pt").write_text("hello")
    torch.save({"script": "another", "model": {}}, "other.pt")
    torch.save({"weights": torch.zeros(3)}, "strange.pt")
    torch.save(os.system, "code.pt")
    gone = next(k for k in good["target"] if k.endswith("blocks.0.norm1.weight"))
    good["target"].pop(gone)
    torch.save(good, "gap.pt")
    errors = dict(cut="truncated", text="not a checkpoint", other="another", strange="found weights", code="safely",
                  gap="missing: blocks.0.norm1.weight", absent="no checkpoint at")  # fmt: skip
    for name, words in errors.items():
        assert words in refused(capsys, script, "--init", f"{name}.pt", "--eval", "features", "--out", name)
    Path("good/last.pt").write_bytes(whole[:1000])
    assert "truncated" in refused(capsys, script, *small, "--steps", 2, "--out", "good", "--resume")
    Path("good/last.pt").write_bytes(whole)
    wider = [*small, "--steps", 2, "--out", "good", "--resume", "--width", 32]
    assert "--width 16" in refused(capsys, script, *wider)


SETTINGS = [
    ("--batch 10 --accumulate 3", "--batch"),
    ("--image-size 30 --patch 4", "--patch"),
    ("--width 66", "heads"),
    ("--wdith 32", "--width"),
    ("--preset folde", "folder"),
    ("--eval knnn", "knn"),
    ("--precision fp8", "bf16"),
    ("--schedule-scale 0.5", "--schedule-scale"),
    ("--device tpu", "device"),
    ("--batch ten", "--batch"),
    ("--steps", "--steps"),
    ("--preset", "--preset"),
    ("--batch 0", "--batch"),
    ("--log-every 0", "--log-every"),
    ("--steps -1", "--steps"),
    ("--lr nan", "--lr"),
    ("--features-out none/f.npz", "no folder none"),
]
MORE_SETTINGS = {
    "ijepa": [("--group 48", "--batch 64"), ("--masks funny", "official"), ("--min-keep 30", "--min-keep")],
    "msn": [("--drop 1.0", "--drop"), ("--mask-per pixel", "image"), ("--focal-size 2", "--focal-size"),
            ("--labelled none.txt", "none.txt")],
    "flexpredict": [("--mode paper", "stop_paper"), ("--sigma -1", "--sigma"), ("--freeze 0", "--freeze"),
                    ("--davis nowhere --eval video", "ImageSets"), ("--min-keep 30", "--min-keep")],
    "iwm": [("--conditioning token", "sequence"), ("--jitter 2 0 0 0", "--jitter"), ("--loss l3", "smooth_l1"),
            ("--min-visible 15", "--min-visible"), ("--mrr-actions 999", "--mrr-bank"),
            ("--shard", "--init RUN/last.pt")],
    "pixel_vit": [("--task mae --positions none", "which pixel"), ("--permute 73", "72 pairs"),
                  ("--task diffusion --sampler-steps 2000", "--sampler-steps"), ("--sweep depth", "permute"),
                  ("--task diffusion --eval knn", "generate"), ("--mixup 0.8 --batch 1", "even"),
                  ("--task diffusion --permute 3", "--permute"), ("--task mae --mask-ratio 1", "--mask-ratio")],
    "msn": [("--drop 1.0", "--drop"), ("--mask-per pixel", "image"), ("--focal-size 2", "--focal-size"),
            ("--labelled none.txt", "none.txt")],
    "pmsn": [("--prior cubic", "power-law"), ("--imbalance 0.5", "--imbalance"), ("--prior-kl up", "reverse"),
             ("--classes-per-batch 3", "--classes-per-batch"), ("--train-list none.txt", "none.txt")],
    "vjepa": [("--group 48", "--batch 32"), ("--masks funny", "multiblock"), ("--frames 15", "--tubelet"),
              ("--mask-scales 0.01", "nothing"), ("--mask-scales 0.99", "all"), ("--rope --heads 16", "--rope"),
              ("--masks random --mask-ratio 1", "--mask-ratio"), ("--time-context 0.5 1", "--time-context"),
              ("--mask-blocks 8 2", "--mask-scales"), ("--physics-contexts 3", "--physics-contexts"),
              ("--physics nowhere", "IntPhys"), ("--target edges", "pixels")],
    "pmsn": [("--prior cubic", "power-law"), ("--imbalance 0.5", "--imbalance"), ("--prior-kl up", "reverse"),
             ("--classes-per-batch 3", "--classes-per-batch"), ("--train-list none.txt", "none.txt")],
}  # fmt: skip


def test_settings_that_cannot_work(script, capsys):
    for flags, words in SETTINGS + MORE_SETTINGS[script.name]:
        assert words in refused(capsys, script, *flags.split()), flags
        assert not Path("runs").exists(), "refused before any work"


def test_out_of_memory_names_the_flags_that_help(script, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(script.module, "train", full)
    printed = refused(capsys, script, "--out", "memory", "--device", "cpu", code=4)
    assert all(flag in printed for flag in ("--accumulate", "--precision", "--shard", "--batch"))


def test_help_lists_every_flag_with_meaning_and_default(script, capsys):
    here(script, "--help", code=0)
    output = capsys.readouterr().out
    comments = dict(re.findall(r"^    (\w+):[^#\n]*# (.+)$", inspect.getsource(script.module.Config), re.MULTILINE))
    words = " ".join(output.split())
    for name in vars(script.module.Config()):
        assert f"--{name.replace('_', '-')}" in output, name
        assert comments[name].split()[0] in words, f"--{name} has no help"
    assert "pixels" in output and "[0.04]" in output
    assert all(name in "".join(words.split()) for name in script.module.PRESETS)
    large = next(name for name in script.module.PRESETS if name.startswith("vit_"))
    here(script, "--preset", large, "--help", code=0)
    assert f"[{script.module.PRESETS[large]['width']}]" in capsys.readouterr().out


def test_every_preset_can_be_built(script):
    for name in script.module.PRESETS:
        config = common.old_parse_config(
            script.module.Config, script.module.PRESETS, script.module.DATA_PRESETS, ["--preset", name]
        )
        assert config.steps or config.epochs
        script.module.check(config, common.OldWorld(0, 8 if name.startswith("vit_") else 1, torch.device("cpu")))


# ------------------------------------------------------------------------------------------------------------- learning


def learn(script, steps, *switches, **changes):
    """Train the toy preset with these changes and switches, and evaluate -> rows of the log."""
    config = replace(
        script.module.Config(preset="toy"), steps=steps, out="learnt", device="cpu", compile=False, **changes
    )
    flags = [
        f"--{k.replace('_', '-')}={v}" for k, v in vars(config).items() if k in ("steps", "out", "device", *changes)
    ]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        script.module.main([*flags, *switches, "--no-compile"])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return log_rows("learnt")




def test_msn_learns():
    """In a minute, on the toy images: anchors find their image's cluster, and features beat a random encoder's."""
    rows = learn(SCRIPTS["msn"], 400, batch=64, eval="knn,lowshot", eval_limit=2000)
    results, found = rows[-1]["eval"], next(row for row in rows if "match_ratio" in row)
    assert found["match_ratio"] > 1.1 and found["clusters_used"] > 8 and found["clusters_nmi"] > 0.25
    assert results["trained"]["knn20"] > results["random"]["knn20"] + 7
    assert results["trained"]["5-shot"] > results["random"]["5-shot"] + 8
    last = [row for row in rows if "feature_std" in row][-1]
    assert last["feature_std"] > 0.3 and last["feature_rank"] > 3, "collapsed"


def test_pmsn_moves_cluster_sizes_to_the_prior_it_is_given():
    """The mechanics, not a gain in accuracy: the same run with two priors ends nearer to its own."""
    for prior in ("uniform", "power-law"):
        flags = f"--steps 60 --batch 32 --tau 1 --prior {prior} --imbalance 5 --eval none --out {prior}"
        here(SCRIPTS["pmsn"], *flags.split(), "--device", "cpu", "--no-compile")
    uniform, power = (next(r for r in log_rows(p) if "kl_uniform" in r) for p in ("uniform", "power-law"))
    assert uniform["kl_uniform"] < 0.5 * uniform["kl_power_law"]
    assert power["kl_power_law"] < 0.5 * power["kl_uniform"]
    assert power["effective_clusters"] < uniform["effective_clusters"] - 3




def test_flexpredict_learns():
    """In a minute, on the toy images: content is predicted, and features beat a random encoder's."""
    rows = learn(SCRIPTS["flexpredict"], 300, eval="knn")
    results, found = rows[-1]["eval"], next(row for row in rows if "content_ratio" in row)
    assert found["content_ratio"] > 1.2
    assert results["trained"]["knn20"] > results["random"]["knn20"] + 5
    last = [row for row in rows if "feature_std" in row][-1]
    assert last["feature_std"] > 0.02 and last["feature_rank"] > 3, "collapsed"
    assert last["position_noise"] > 0.02, "the noise on positions was trained away"


def test_iwm_learns():
    """In a minute, on the toy images: the predictor uses the action, and finds the transformed view among others."""
    rows = learn(SCRIPTS["iwm"], 300, "--no-baselines", eval="mrr")
    results, found = rows[-1]["eval"]["trained"], next(row for row in rows if "action_ratio" in row)
    assert found["action_ratio"] > 1.5 and found["content_ratio"] > 1.3
    assert results["mrr"] > 2 * results["mrr chance"] and results["mrr"] > 1.5 * results["mrr rolled"]
    assert results["mrr rolled"] < 1.5 * results["mrr chance"]
    last = [row for row in rows if "feature_std" in row][-1]
    assert last["feature_std"] > 0.02 and last["feature_rank"] > 3, "collapsed"
