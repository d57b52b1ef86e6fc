"""tests/gpu.py in small, so that it works on the day a GPU is at hand."""

import argparse
import json
import math
from pathlib import Path

import gpu
import pytest


def test_tiny_pieces(tmp_path, capsys):
    """One piece of each sort; the section between the markers; a second call goes on."""
    assert gpu.BEGIN in gpu.ROOT.joinpath("tests/results.md").read_text()
    Path("results.md").write_text(f"before\n{gpu.BEGIN}old\n{gpu.END}after\n")
    arguments = ["--tiny", "--out", "out", "--results", "results.md"]
    gpu.main(arguments)
    done = json.loads(Path("out/done.json").read_text())
    sorts = {"tests", "peak", "plain", "step", "toy", "paper", "cifar10"}
    assert {name.split()[0] for name in done} == sorts
    assert not [result for result in done.values() if "error" in result]
    text = Path("results.md").read_text()
    assert text.startswith(f"before\n{gpu.BEGIN}") and text.endswith(f"{gpu.END}after\n")
    assert "old" not in text and text.count("knn") >= 2
    done.pop("peak")
    Path("out/done.json").write_text(json.dumps(done))
    capsys.readouterr()
    gpu.main(arguments)
    assert capsys.readouterr().out == "peak\n"
    with pytest.raises(RuntimeError, match="error: --width 17"):
        gpu.run("wrong", "ijepa --width 17", argparse.Namespace(out=Path("out"), end=math.inf))


def test_all_pieces_are_known():
    """Every script has its toy and its presets, each command line is understood."""
    pieces = gpu.list_pieces(argparse.Namespace(tiny=False))
    for script in gpu.SCRIPTS:
        assert f"toy {script} --preset toy bf16" in pieces
        assert any(name.startswith(f"paper {script} ") for name in pieces)
        module = gpu.importlib.import_module(script)
        for piece in pieces.values():
            if isinstance(piece, gpu.functools.partial) and piece.func is gpu.run:
                name, *flags = piece.args[1].split()
                if name == script:
                    known = (module.Config, module.PRESETS, module.DATA_PRESETS)
                    config, _ = gpu.common.parse_config(*known, flags)
                    module.check(config, gpu.common.World())
