"""What common.py promises and no golden file holds: those of the scripts hold the model."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from helpers import close

import common
from common import ViT


def test_learned_positions_take_any_width():
    vit = ViT(8, 4, 15, 1, 3, class_token=True)
    assert vit(torch.zeros(1, 3, 8, 8)).shape == (1, 5, 15)


def test_a_schedule_does_not_turn_back():
    assert common.cosine_schedule(99, 10, 1.0, 0.2) == pytest.approx(0.2)


def test_generator_is_a_function_of_its_key():
    def draw(*key):
        return torch.rand(3, generator=common.generator(*key)).tolist()

    assert draw(0, "crop", 1) == draw(0, "crop", 1)
    keys = [(0, "crop", 1), (1, "crop", 1), (0, "mask", 1)]
    keys += [(0, "crop", 2), (0, "crop", 1, 0)]
    assert len({tuple(draw(*key)) for key in keys}) == 5


def test_signs_of_collapse():
    torch.manual_seed(0)
    line = torch.randn(512, 1, 1) @ torch.randn(1, 8)
    for tokens, least, most in (
        (torch.randn(512, 1, 8), 7.5, 8),
        (line, 1, 1.01),
        (torch.ones(4, 2, 3), 0, 1.01),
    ):
        found = common.spread(tokens)
        assert least <= found["feature_rank"] <= most
        close(found["feature_std"], tokens.mean(1).std(0).mean())


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
    scale = (0.5, 0.9)
    rates = (1.0, 2.0, 3.0)
    assert config == Tiny("large", "toy", 99, 0, 2.0, False, "b", scale, rates)
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


@pytest.mark.parametrize("toy", ["letters", "textures"])
def test_toys_are_reproducible_and_balanced(toy):
    train, val = (common.open_split(toy, name) for name in ("train", "val"))
    again = common.TOYS[toy].__wrapped__("val")  # not the cached one
    assert np.array_equal(np.stack(val.images), np.stack(again.images))
    for split in (train, val):
        assert (torch.bincount(split.labels) == len(split) // 10).all()
        assert split.images[0].mode == "RGB"
    assert not np.array_equal(train.images[0], val.images[0])


def test_linear_probe_learns_what_is_linear():
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    labels = (x[:, 0] > 0).long()
    batches = common.shuffled_batches(x[:257], labels[:257], 64, seed=0)
    rates = {"good": 0.5, "idle": 0.0}
    heads = {name: (nn.Linear(6, 2), rate, 0.0) for name, rate in rates.items()}
    accuracy, best = common.linear_probe(
        batches, x[257:], labels[257:], heads, 20, torch.optim.SGD, [10]
    )
    assert best == "good" and accuracy > 90
