"""The parts in common.py, against plain implementations and their own promises."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

import common
from common import EMA, Attention, Block, PatchEmbed, ViT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_is_attention(dtype):
    torch.manual_seed(0)
    layer = Attention(12, 3).to(dtype)
    x = torch.randn(2, 7, 12).to(dtype)
    wide = copy.deepcopy(layer).double()
    parts = wide.qkv(x.double()).chunk(3, dim=-1)
    q, k, v = (part.unflatten(2, (3, 4)).transpose(1, 2) for part in parts)
    weights = (q @ k.transpose(2, 3) / 2).softmax(-1)
    expected = wide.proj((weights @ v).transpose(1, 2).flatten(2))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for queries in (0, 3):
        found = layer(x, queries=queries)
        wanted = expected[:, -queries:]
        torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=0)


def test_block_with_queries_is_the_end_of_the_whole_block():
    torch.manual_seed(0)
    block = Block(12, 3, hidden=20).double()
    x = torch.randn(2, 7, 12).double()
    assert block.mlp.fc1.weight.shape == (20, 12)
    torch.testing.assert_close(block(x, queries=2), block(x)[:, -2:])


def test_patch_embedding_is_the_convolution():
    embed = PatchEmbed(4, 8)
    images = torch.randn(2, 3, 14, 17)  # what is left over is cut off
    expected = embed.proj(images).flatten(2).transpose(1, 2)
    found = embed(common.patchify(images, 4))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_positions():
    line = common.sincos_1d(8, [0.0, 2.5])
    assert line[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert line[1, 1].item() == pytest.approx(math.sin(2.5 * 10000**-0.25))
    grid = common.sincos_2d(16, 3, 5)
    expected = torch.cat([common.sincos_1d(8, [2])[0], common.sincos_1d(8, [1])[0]])
    torch.testing.assert_close(grid[7], expected)


def test_interpolated_positions():
    table = common.sincos_2d(16, 4, 4).float()[None]
    assert common.interpolate_positions(table, (4, 4)) is table
    assert common.interpolate_positions(table, (8, 6)).shape == (1, 48, 16)
    flat = torch.full((1, 17, 3), 2.5)
    flat[:, 0] = 7.0  # of the class token, which stays
    larger = common.interpolate_positions(flat, (7, 5))
    torch.testing.assert_close(larger[:, 1:], torch.full((1, 35, 3), 2.5))
    torch.testing.assert_close(larger[:, 0], flat[:, 0])


@pytest.mark.parametrize("class_token", [False, True])
def test_vit(class_token):
    """Keeping patches is running on their tokens only; layers are normed; grids can differ."""
    torch.manual_seed(0)
    vit = ViT(16, 4, 24, 3, 2, class_token=class_token)
    common.init_weights(vit, 0.2)
    images = torch.randn(2, 3, 16, 16)
    special = int(class_token)
    full = vit(images)
    assert full.shape == (2, 16 + special, 24)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(vit(common.patchify(images, 4)), full, **close)
    torch.testing.assert_close(vit(images, keep=torch.arange(16).expand(2, 16)), full, **close)
    keep = torch.tensor([[[0, 3, 5], [1, 2, 15]], [[4, 6, 7], [8, 9, 10]]])  # two masks
    both = vit(images, keep=keep)
    assert both.shape == (4, 3 + special, 24)
    torch.testing.assert_close(both, torch.cat([vit(images, keep=k) for k in keep]), **close)
    assert (both[0, special:] - full[0, special:][keep[0, 0]]).abs().max() > 1e-3
    layers = vit(images, layers=2)
    assert len(layers) == 2 and layers[0].mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(layers[1], full)
    assert vit(torch.randn(2, 3, 24, 20)).shape == (2, 30 + special, 24)
    learned = vit.pos_embed.requires_grad
    assert learned == class_token


def test_learned_positions_take_any_width():
    assert ViT(8, 4, 15, 1, 3, class_token=True)(torch.zeros(1, 3, 8, 8)).shape == (1, 5, 15)


def test_initialisation():
    vit = ViT(32, 4, 64, 2, 2, class_token=True)
    common.init_weights(vit, 0.1)
    for name, parameter in vit.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.3)


def test_ema_is_the_formula_and_skips():
    source = nn.ModuleDict({"a": nn.Linear(3, 3), "frozen": nn.Linear(2, 2)})
    source["frozen"].requires_grad_(False)
    target = copy.deepcopy(source)
    for parameter in source["a"].parameters():
        parameter.data.normal_()
    before = copy.deepcopy(target.state_dict())
    ema = EMA(target, source)
    assert not any(parameter.requires_grad for parameter in target.parameters())
    ema.update(0.9, torch.tensor(False))
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    ema.update(0.9, torch.tensor(True))
    for name, value in target.state_dict().items():
        moved = 0.9 * before[name] + 0.1 * source.state_dict()[name]
        torch.testing.assert_close(value, moved)
        assert torch.equal(value, before[name]) == ("frozen" in name), (
            "fixed tables stay as they are"
        )


def test_schedules():
    assert common.linear_schedule(5, 10, 0.0, 1.0) == 0.5
    assert common.cosine_schedule(0, 10, 1.0, 0.2) == 1.0
    assert common.cosine_schedule(10, 10, 1.0, 0.2) == pytest.approx(0.2)
    assert common.cosine_schedule(99, 10, 1.0, 0.2) == pytest.approx(0.2), "does not turn back"
    values = [common.cosine_schedule(step, 10, 1.0, 0.1, warmup=4) for step in range(11)]
    assert values[:5] == [0.0, 0.25, 0.5, 0.75, 1.0] and values[10] == pytest.approx(0.1)
    assert values[4:] == sorted(values[4:])[::-1]


def test_parameter_groups():
    model = ViT(8, 4, 12, 1, 2, class_token=True)
    decayed, undecayed = common.parameter_groups(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    small = {name for name in names.values() if name.endswith("bias") or "norm" in name}
    assert {names[parameter] for parameter in undecayed["params"]} == small
    assert "cls_token" in {names[parameter] for parameter in decayed["params"]}


def test_generator_is_a_function_of_its_key():
    def draw(*key):
        return torch.rand(3, generator=common.generator(*key)).tolist()

    assert draw(0, "crop", 1) == draw(0, "crop", 1)
    keys = (0, "crop", 1), (1, "crop", 1), (0, "mask", 1), (0, "crop", 2), (0, "crop", 1, 0)
    assert len({tuple(draw(*key)) for key in keys}) == 5


def test_effective_rank():
    torch.manual_seed(0)
    assert 7.5 < common.effective_rank(torch.randn(512, 8)) <= 8
    assert common.effective_rank(torch.randn(512, 1) @ torch.randn(1, 8)) < 1.01
    assert common.effective_rank(torch.ones(4, 3)) < 1.01


@dataclass
class Tiny:
    """A config to parse."""

    preset: str = ""  # the preset
    data: str = "toy"  # the data
    width: int = 8  # width, in channels
    steps: int = 0  # steps
    lr: float = 1e-3  # peak, 100 % of it
    flip: bool = False  # mirror
    kind: Literal["", "a", "b"] = ""  # a choice
    scale: tuple[float, float] = (0.1, 1.0)  # two numbers
    rates: tuple[float, ...] = (1.0,)  # any number of numbers


def parse(line=""):
    presets = {"toy": {}, "large": {"width": 99, "flip": True}, "folder": {"width": 50}}
    return common.parse_config(Tiny, presets, {"toy": "toy", "*": "folder"}, line.split())


def test_config_from_command_line(capsys):
    assert parse() == (Tiny(preset="toy"), set())
    assert parse("--data photos")[0].width == 50, "the data choose the preset"
    config, typed = parse("--preset=large --no-flip --scale 0.5 0.9 --rates 1 2 3 --lr 2 --kind b")
    assert config == Tiny("large", "toy", 99, 0, 2.0, False, "b", (0.5, 0.9), (1.0, 2.0, 3.0))
    assert typed == {"preset", "flip", "scale", "rates", "lr", "kind"}
    wrong = {"--widht 3": "--widht", "--preset lagre": "large", "--lr x": "--lr", "stray": "stray"}
    wrong.update({"--width 0": "--width", "--steps -1": "--steps", "--lr nan": "--lr"})
    for line, words in {**wrong, "--kind c": "'a'", "--wid 3": "--wid"}.items():
        with pytest.raises(SystemExit) as stop:
            parse(line)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "width, in channels [8]" in text and "100 % of it" in text


def test_a_checkpoint_wins_over_the_preset_and_refuses_flags_that_contradict_it(capsys):
    config, typed = parse("--width 8")
    found = {"width": 8, "lr": 2.0}
    assert common.adopt(config, found, typed, "x.pt").lr == 2.0
    with pytest.raises(SystemExit):
        common.adopt(config, {"width": 9}, typed, "x.pt")
    assert "--width 8 contradicts x.pt, which has 9" in capsys.readouterr().err


def test_json_has_no_nan():
    run = common.Run(Tiny_run(), common.World())
    run.write(loss=float("nan"), nested={"a": float("inf"), "b": [1.0]})
    assert (
        run.out / "log.jsonl"
    ).read_text() == '{"loss": null, "nested": {"a": null, "b": [1.0]}}\n'


def Tiny_run():
    """Return what `Run` needs of a config."""

    @dataclass
    class Config:
        out: str = "out"
        resume: bool = False

    Config.__module__ = __name__
    return Config()


def test_hub_names(tmp_path):
    """Keys of every fixture become those of our ViT; SwiGLU and LayerScale have DINOv2's names."""
    for folder in sorted((Path(__file__).parent / "golden" / "hub").iterdir()):
        state = common.load_checkpoint(folder / "model.safetensors")
        names = {name for name in state if not name.startswith("decoder")}
        vit = ViT(32, 8, 24, 3, 2, class_token="ijepa" not in folder.name)
        own = set(vit.state_dict())
        more = {"mask_token", "register_tokens"}
        parts = ("ls1.gamma", "ls2.gamma", "mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight")
        more |= {f"blocks.{i}.{part}" for i in range(3) for part in (*parts, "mlp.w3.bias")}
        if "swiglu" in folder.name:
            own = {name for name in own if "mlp" not in name}
        assert own <= names and names - own <= more, folder.name


@pytest.mark.parametrize("toy", ["letters", "textures"])
def test_toys_are_reproducible_and_balanced(toy):
    train, val = (common.open_split(toy, name) for name in ("train", "val"))
    again = common.TOYS[toy].__wrapped__("val")  # not the cached one
    assert all(np.array_equal(a, b) for a, b in zip(val.images, again.images, strict=True))
    for split in (train, val):
        assert (torch.bincount(split.labels) == len(split) // 10).all()
        assert split.images[0].dtype == np.uint8
    assert not np.array_equal(train.images[0], val.images[0])


def test_knn_needs_little_memory_and_copes_with_few_images():
    torch.manual_seed(0)
    bank, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    scores = common.knn(bank, labels, bank)  # k is more than there are
    assert scores.shape == (5, 3) and common.top1(scores, labels) == 100.0


def test_linear_probe_learns_what_is_linear():
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    labels = (x[:, 0] > 0).long()
    batches = common.shuffled_batches(x[:257], labels[:257], 64, seed=0)
    heads = {"good": (nn.Linear(6, 2), 0.5, 0.0), "idle": (nn.Linear(6, 2), 0.0, 0.0)}
    accuracy, best = common.linear_probe(
        batches, x[257:], labels[257:], heads, 20, torch.optim.SGD, [10]
    )
    assert best == "good" and accuracy > 90
