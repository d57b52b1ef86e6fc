"""The parts in common.py, against plain implementations and their own promises."""

import copy
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import OLD_EMA as EMA, OldAttention as Attention, OldBlock as Block, OldCrossAttention as CrossAttention, OldPatchEmbed as PatchEmbed, OldSwiGLU as SwiGLU, OldViT as ViT


def test_attention_is_attention():
    torch.manual_seed(0)
    layer, x = Attention(12, 3).double(), torch.randn(2, 7, 12).double()
    q, k, v = (part.unflatten(2, (3, 4)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(2, 3) / 2).softmax(-1)
    expected = layer.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x, queries=3), expected[:, -3:])
    cross = CrossAttention(12, 3).double()
    cross.q.load_state_dict({"weight": layer.qkv.weight[:12], "bias": layer.qkv.bias[:12]})
    cross.kv.load_state_dict({"weight": layer.qkv.weight[12:], "bias": layer.qkv.bias[12:]})
    cross.proj.load_state_dict(layer.proj.state_dict())
    torch.testing.assert_close(cross(x, x), expected)
    assert cross(x, torch.randn(2, 5, 12).double()).shape == (2, 7, 12)


def test_block_with_queries_is_the_end_of_the_whole_block():
    torch.manual_seed(0)
    for options in ({}, {"layer_scale": 0.1, "swiglu": True}):
        block, x = Block(12, 3, **options).double(), torch.randn(2, 7, 12).double()
        torch.testing.assert_close(block(x, queries=2), block(x)[:, -2:])


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    block, x = Block(12, 3, drop_path=0.5), torch.randn(4, 7, 12)
    uniform = torch.tensor([[0.1, 0.9, 0.9, 0.1], [0.1, 0.1, 0.9, 0.9]])
    out = block(x, drop=uniform)
    torch.testing.assert_close(out[0], x[0])  # both branches dropped
    attended = x + 2 * block.attn(block.norm1(x))
    torch.testing.assert_close(out[1], attended[1])
    torch.testing.assert_close(out[2], (attended + 2 * block.mlp(block.norm2(attended)))[2])
    torch.testing.assert_close(block(x), block(x, drop=None))


def test_swiglu_sizes_and_formula():
    for width, hidden in ((384, 1024), (768, 2048), (1024, 2736), (1280, 3416), (1536, 4096)):
        assert SwiGLU(width, 4 * width).w3.weight.shape == (width, hidden)
    layer, x = SwiGLU(8, 32), torch.randn(3, 8)
    w1, w2 = layer.w12.weight.chunk(2)
    b1, b2 = layer.w12.bias.chunk(2)
    torch.testing.assert_close(layer(x), layer.w3(F.silu(x @ w1.T + b1) * (x @ w2.T + b2)))


def test_patch_and_tubelet_embedding_are_the_convolution():
    for embed, x in (
        (PatchEmbed(4, 8), torch.randn(2, 3, 12, 16)),
        (PatchEmbed(4, 8, tubelet=2), torch.randn(2, 3, 6, 12, 16)),
    ):
        expected = embed.proj(x).flatten(2).transpose(1, 2)
        torch.testing.assert_close(embed(embed.patchify(x)), expected, atol=1e-5, rtol=1e-5)


def test_positions():
    line = common.old_sincos_1d(8, [0.0, 2.5])
    assert line[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert line[1, 1].item() == pytest.approx(math.sin(2.5 * 10000**-0.25))
    grid = common.old_sincos_2d(16, 3, 5)
    torch.testing.assert_close(grid[7], torch.cat([common.old_sincos_1d(8, [2])[0], common.old_sincos_1d(8, [1])[0]]))
    cube = common.old_sincos_3d(26, 2, 3, 4)  # axes of 10, cut to 26
    assert cube.shape == (24, 26)
    expected = torch.cat([common.old_sincos_1d(10, [p])[0] for p in (1, 2, 3)])[:26]
    torch.testing.assert_close(cube[-1], expected)
    with pytest.raises(ValueError, match="divisible by 4"):
        common.old_sincos_2d(10, 3, 3)


def test_interpolated_positions():
    table = common.old_sincos_2d(16, 4, 4).float()[None]
    assert common.old_interpolate_positions(table, (4, 4), (4, 4)) is table
    larger = common.old_interpolate_positions(table, (4, 4), (8, 8))
    assert larger.shape == (1, 64, 16)
    flat = common.old_interpolate_positions(torch.full((1, 16, 3), 2.5), (4, 4), (7, 5))
    torch.testing.assert_close(flat, torch.full((1, 35, 3), 2.5))


@pytest.mark.parametrize("options", [{}, {"class_token": True, "learned_positions": True}])
def test_vit(options):
    """Keeping patches is running on their tokens only; layers are normed; patches can be given; grids can differ."""
    torch.manual_seed(0)
    vit, images = ViT(16, 4, 24, 3, 2, **options), torch.randn(2, 3, 16, 16)
    special = 1 if options else 0
    patches = vit.patch_embed.patchify(images)
    full = vit(images)
    assert full.shape == (2, 16 + special, 24)
    torch.testing.assert_close(vit(patches), full)
    everything = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(vit(images, keep=everything), full, atol=1e-5, rtol=1e-5)
    keep = torch.stack([torch.tensor([[0, 3, 5], [1, 2, 15]]), torch.tensor([[4, 6, 7], [8, 9, 10]])])  # two masks
    both = vit(images, keep=keep)
    assert both.shape == (4, 3 + special, 24)
    torch.testing.assert_close(both, torch.cat([vit(images, keep=k) for k in keep]), atol=1e-5, rtol=1e-5)
    assert (both[:2, special:] - full[:, special:].gather(1, keep[0, :, :, None].expand(-1, -1, 24))).abs().max() > 1e-4
    layers = vit(images, layers=[-2, 2])
    torch.testing.assert_close(layers[1], full)
    assert len(layers) == 2 and layers[0].mean(-1).abs().max() < 1e-5
    assert vit(torch.randn(2, 3, 24, 20)).shape == (2, 30 + special, 24)
    uniform = torch.ones(3, 2, 2)
    torch.testing.assert_close(vit(images, drop=uniform), full)  # the blocks drop nothing yet
    vit.blocks[1].drop_path = 0.5
    uniform[1, :, 0] = 0.0  # the second block is left out for the first image, and counts twice for the other
    dropped = vit(images, drop=uniform)
    assert (dropped - full).abs().amax((1, 2)).min() > 1e-4
    vit.blocks[1].forward = lambda x, drop=None: x
    torch.testing.assert_close(vit(images)[0], dropped[0])
    with pytest.raises(ValueError, match="multiple"):
        ViT(16, 5, 24, 1, 2)


def test_memory_is_of_this_process_alone():
    """What a large process starts does not inherit its peak."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(common.__file__)!r}); import common, torch; "
    code += "print(common.old_memory_gib(torch.device('cpu')))"
    before = common.old_memory_gib(torch.device("cpu"))
    large = torch.ones(150_000_000)
    assert common.old_memory_gib(torch.device("cpu")) > max(before, large.numel() * 4 / 2**30)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.05 < float(child.stdout) < 0.5 or sys.platform != "linux"


def test_ema_is_the_formula_for_every_dtype_and_skips():
    source = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3).bfloat16(), "frozen": nn.Linear(2, 2)})
    source["frozen"].requires_grad_(False)
    target = copy.deepcopy(source)
    for p in source.parameters():
        p.data.normal_()
    before = copy.deepcopy(target.state_dict())
    ema = EMA(target, source)
    assert len(ema.groups) == 2 and not any(p.requires_grad for p in target.parameters())
    ema.update(0.9, applied=torch.tensor(0.0))
    assert all(torch.equal(before[n], p) for n, p in target.state_dict().items())
    for applied in (None, torch.tensor(True)):
        target.load_state_dict(before)
        ema.update(0.9, applied)
        for name, p in target.state_dict().items():
            moved = 0.9 * before[name].float() + 0.1 * source.state_dict()[name].float()
            expected = before[name] if "frozen" in name else moved
            torch.testing.assert_close(p.float(), expected, atol=1e-2 if p.dtype == torch.bfloat16 else 1e-6, rtol=1e-2)


def test_schedules():
    assert common.old_linear_schedule(5, 10, 0.0, 1.0) == 0.5
    assert common.old_cosine_schedule(0, 10, 1.0, 0.2) == 1.0
    assert common.old_cosine_schedule(10, 10, 1.0, 0.2) == pytest.approx(0.2)
    assert common.old_cosine_schedule(99, 10, 1.0, 0.2) == pytest.approx(0.2), "does not turn back after its end"
    values = [common.old_warmup_cosine_schedule(s, 10, 4, 0.0, 1.0, 0.1) for s in range(11)]
    assert values[:5] == [0.0, 0.25, 0.5, 0.75, 1.0] and values[10] == pytest.approx(0.1)
    assert values == values[:5] + sorted(values[5:])[::-1]


def test_parameter_groups():
    model = ViT(8, 4, 12, 1, 2, class_token=True)
    decayed, undecayed = common.old_parameter_groups(model)
    names = {p: n for n, p in model.named_parameters()}
    assert {names[p] for p in undecayed["params"]} == {n for n in names.values() if n.endswith("bias") or "norm" in n}
    assert "cls_token" in {names[p] for p in decayed["params"]} and decayed["decay"] and not undecayed["decay"]
    assert not any(names[p] == "pos_embed" for g in (decayed, undecayed) for p in g["params"])


def test_generator_is_a_function_of_its_key():
    draw = lambda *key: torch.rand(3, generator=common.old_generator(*key)).tolist()  # noqa: E731
    assert draw(0, "crop", 1) == draw(0, "crop", 1)
    keys = (0, "crop", 1), (1, "crop", 1), (0, "mask", 1), (0, "crop", 2), (0, "crop", 1, 0)
    assert len({tuple(draw(*key)) for key in keys}) == 5


def test_effective_rank():
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    assert 7.5 < common.old_effective_rank(x) <= 8
    assert common.old_effective_rank(torch.randn(512, 1) @ torch.randn(1, 8)) < 1.01
    assert torch.isfinite(common.old_effective_rank(torch.ones(4, 3)))


@dataclass
class Tiny:
    """A config to parse."""

    preset: str = ""  # the preset
    data: str = "toy"  # the data
    width: int = 8  # width, in channels
    lr: float = 1e-3  # peak, 100 % of it
    flip: bool = False  # mirror
    scale: tuple[float, float] = (0.1, 1.0)  # two numbers
    rates: tuple[float, ...] = (1.0,)  # any number of numbers


def parse(*argv):
    presets = {"toy": {}, "large": {"width": 99, "flip": True}, "folder": {"width": 50}}
    return common.old_parse_config(Tiny, presets, {"toy": "toy", "*": "folder"}, argv)


def test_config_from_command_line(capsys):
    assert parse() == Tiny(preset="toy")
    assert parse("--data", "photos").width == 50, "the data choose the preset"
    config = parse("--preset=large", "--no-flip", "--scale", "0.5", "0.9", "--rates", "1", "2", "3", "--lr", "2")
    assert config == Tiny("large", "toy", 99, 2.0, False, (0.5, 0.9), (1.0, 2.0, 3.0))
    for line, words in {"--widht 3": "--width", "--preset lagre": "large", "--lr x": "--lr", "stray": "stray"}.items():
        with pytest.raises(SystemExit) as stop:
            parse(*line.split())
        assert stop.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "width, in channels [8]" in text and "100 % of it" in text
    assert common.old_given_flags(["--no-flip", "--lr=3", "--features-out", "x"]) == {"flip", "lr", "features_out"}


def test_choice_of_the_output_folder(capsys):
    world = common.OldWorld(0, 1, torch.device("cpu"))
    names = [common.old_choose_out("", "ijepa", False, world).as_posix() for _ in range(3)]
    assert names == ["runs/ijepa", "runs/ijepa-2", "runs/ijepa-3"]
    assert common.old_choose_out("", "ijepa", True, world).as_posix() == "runs/ijepa-3"
    path = common.old_choose_out("mine", "ijepa", False, world)
    (path / "last.pt").touch()
    with pytest.raises(SystemExit):
        common.old_choose_out("mine", "ijepa", False, world)
    assert "--resume" in capsys.readouterr().err
    assert common.old_choose_out("mine", "ijepa", True, world) == path
    (path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        common.old_choose_out("mine/file/below", "ijepa", False, world)
    assert stop.value.code == 2 and "cannot write" in capsys.readouterr().err


def hold(folder):
    common.old_lock(folder)
    (folder / "held").touch()
    time.sleep(60)


def test_a_folder_has_one_process_at_a_time(tmp_path, capsys):
    """The lock is seen by others, is not inherited by a holder's children, and does not outlive a kill -9."""
    world = common.OldWorld(0, 1, torch.device("cpu"))
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    for resume in (False, True):
        with pytest.raises(SystemExit) as stop:
            common.old_choose_out(str(tmp_path), "ijepa", resume, world)
        assert stop.value.code == 2 and "another process is writing" in capsys.readouterr().err
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert common.old_choose_out(str(tmp_path), "ijepa", True, world) == tmp_path
    loader = multiprocessing.get_context("fork").Process(target=lambda: os._exit(common.old_lock(tmp_path)))
    loader.start()
    loader.join()
    assert loader.exitcode == 0, "a child took the lock that its parent holds"


def test_a_filesystem_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", unknown)
    assert common.old_lock(tmp_path)


def test_log_on_a_full_disk_and_torn_lines(capsys, monkeypatch):
    """A row that does not fit ends the run with one line; the torn row is dropped by the run that resumes."""
    world = common.OldWorld(0, 1, torch.device("cpu"))
    log = common.OldLog("run", world)
    log.write(step=1, loss=0.5)
    log.write(step=2, nested={"a": {"b": 1.0}})
    whole = log.path.read_text()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(signal, "SIGXFSZ", signal.signal(signal.SIGXFSZ, signal.SIG_IGN) or signal.SIGXFSZ)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 30, limit[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            log.write(step=3, nested={"a": {"b": 1.0}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert stop.value.code == 1 and "could not write run/log.jsonl" in capsys.readouterr().err
    assert log.path.read_text().startswith(whole)
    log.path.write_text(whole + '{"step": 3, "nested": {"a": {"b": 1.0}' + "\n")  # ends like a whole row
    common.OldLog("run", world, total=9, start=2)
    assert log.path.read_text() == whole


def test_signals_stop_the_loop_and_then_the_evaluation(capsys):
    """In training a signal is a wish that the loop grants; after it nothing would be lost, so it ends the process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        log = common.OldLog("run", common.OldWorld(0, 1, torch.device("cpu")))
        log.catch_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        assert log.stop == signal.SIGTERM
        log.close()
        with pytest.raises(SystemExit) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert stop.value.code == 0 and "--out run --resume" in capsys.readouterr().out
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_checkpoint_with_a_flipped_bit(tmp_path, capsys):
    """torch.load would take it; the checksum tells. What holds no dict is named."""
    path = tmp_path / "last.pt"
    common.old_save_checkpoint(path, {"weight": torch.zeros(1000), "config": {"width": 16}})
    assert common.old_load_checkpoint(path)["config"] == {"width": 16}
    whole = path.read_bytes()
    middle = whole.index(bytes(4000)) + 2000
    path.write_bytes(whole[:middle] + b"\x10" + whole[middle + 1 :])
    assert torch.load(path, weights_only=True)["weight"].any(), "a bit was flipped"
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name, words in (("last.pt", "checksum"), ("tensor.pt", "found Tensor")):
        with pytest.raises(SystemExit) as stop:
            common.old_load_checkpoint(tmp_path / name)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_log_drops_rows_that_will_be_written_again():
    world = common.OldWorld(0, 1, torch.device("cpu"))
    log = common.OldLog("out", world)
    for step in (1, 2, 3):
        log.write(step=step)
    with open("out/log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    common.OldLog("out", world, total=9, start=2)
    assert (log.path).read_text() == '{"step": 1}\n{"step": 2}\n'


def test_toy_images_are_reproducible_and_balanced():
    train, labels = common.old_toy_images("train")
    again, _ = common.old_toy_images.__wrapped__("train")  # not the cached one
    val, val_labels = common.old_toy_images("val")
    assert train.dtype == torch.uint8 and train.shape[1:] == (3, 24, 24) and torch.equal(train, again)
    for y in (labels, val_labels):
        assert (np.bincount(y) == len(y) // 10).all()
    assert not (train[: len(val)] == val).flatten(1).all(1).any(), "train and val share images"
