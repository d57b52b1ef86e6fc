import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: pytest-xdist runs a process a core


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Run each test in a folder of its own, so that nothing touches ./data and ./runs."""
    monkeypatch.chdir(tmp_path)
