import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(config, items):
    """PART=1/2 runs the first half of the tests (every other function), so that two processes can share them."""
    part, parts = map(int, os.environ.get("PART", "1/1").split("/"))
    names = {name: i for i, name in enumerate(dict.fromkeys(item.function for item in items))}
    config.hook.pytest_deselected(items=[item for item in items if names[item.function] % parts != part - 1])
    items[:] = [item for item in items if names[item.function] % parts == part - 1]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, so that nothing reads or writes ./data and ./runs of the checkout."""
    monkeypatch.chdir(tmp_path)
