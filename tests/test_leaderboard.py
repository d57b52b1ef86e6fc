"""tests/leaderboard.py: one small cell of the table, from images to Markdown, JSON and picture, and taken up again."""

import json

import leaderboard
import pytest
import torch
from PIL import Image


@pytest.fixture
def few_images(monkeypatch):
    """The toy world with 60 images to train on and 40 to test."""
    everything = leaderboard.open_images

    def open_some(data, name, folder):
        split = everything(data, name, folder)
        return split.subset(torch.arange({"train": 60, "val": 40}[name]))

    monkeypatch.setattr(leaderboard, "open_images", open_some)
    monkeypatch.setattr(leaderboard, "SHOTS", 2)
    small = leaderboard.Images("--image-size 24 --patch 8 --width 16 --depth 1 --heads 2 --batch 8", 50, "toy", 8)
    monkeypatch.setitem(leaderboard.DATA, "toy", small)


def test_a_cell_of_the_table(few_images, tmp_path, monkeypatch, capsys):
    """Trained and untrained features are evaluated, written and drawn; a second call runs nothing again."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- leaderboard -->\nold\n<!-- end of leaderboard -->\nafter\n")
    command = ["--data", "toy", "--methods", "msn", "--minutes", "0.005", "--trial", "2"]
    command += ["--out", str(tmp_path / "board"), "--readme", str(page)]
    leaderboard.main(command)
    found = json.loads((tmp_path / "board" / "leaderboard.json").read_text())["toy"]
    (result,) = found["methods"]["MSN"]
    assert result["steps"] >= 1 and result["images"] == 8 * result["steps"] and result["finite"]
    assert result["minutes"] > 0 and 0.05 < result["memory"] < 8 and result["speed"] > 0
    for scores in (result["trained"], result["random"], found["pixels"]):
        assert scores.keys() == leaderboard.SCORES.keys() and all(0 <= v <= 100 for v in scores.values())
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| MSN |"))
    assert f"| {result['trained']['knn']:.1f} ({result['random']['knn']:.1f}) |" in row
    assert Image.open(tmp_path / "board" / "leaderboard.png").size[0] > 500

    monkeypatch.setattr(leaderboard, "run", lambda *_: pytest.fail("what is done is not run again"))
    leaderboard.main(command)
    assert page.read_text() == text
    leaderboard.main([*command, "--methods", "msn", "iwm", "--report"])  # of which one is not there
    assert page.read_text() == text
    with pytest.raises(SystemExit) as stopped:
        leaderboard.main([*command, "--minutes", "1"])
    assert stopped.value.code == 2 and "has results of 0.005 minutes" in capsys.readouterr().err


def test_evaluation_finds_classes_that_are_there():
    """Features that hold the class get 100 %, features of noise the share of chance."""
    labels, test_labels = torch.arange(200) % 5, torch.arange(100) % 5
    random = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(len(y), 8, generator=random) for n, y in (("train", labels), ("val", test_labels))}
    good = {n: noise[n] + 9 * torch.eye(8)[y] for n, y in (("train", labels), ("val", test_labels))}
    for features, low, high in ((good, 99, 100), (noise, 5, 45)):
        found = leaderboard.evaluate({"train": (features["train"], labels), "val": (features["val"], test_labels)})
        assert all(low <= v <= high for v in found.values()), found
