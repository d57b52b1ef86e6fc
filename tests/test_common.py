"""What common.py promises and no golden file holds: those of the scripts hold the model."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers import close

import common
import ijepa
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


def test_config_from_command_line():
    def parse(line):
        known = (ijepa.Config, ijepa.PRESETS, ijepa.DATA_PRESETS)
        return common.parse_config(*known, line.split())

    assert parse("") == (ijepa.Config(preset="toy", **ijepa.PRESETS["toy"]), set())
    assert parse("--data photos")[0].preset == "folder", "the data choose the preset"
    config, typed = parse("--preset=folder --no-flip --target-scale 0.5 1 --probe-lrs 1 2 --lr 2")
    expected = {"target_scale": (0.5, 1.0), "probe_lrs": (1.0, 2.0), "lr": 2.0, "flip": False}
    assert config == ijepa.Config(**ijepa.PRESETS["folder"] | expected | {"preset": "folder"})
    assert typed == {"preset", *expected}


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
