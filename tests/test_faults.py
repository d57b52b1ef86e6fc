"""The fault-injection run works and can fail; all of it takes a quarter of an hour: python tests/faults.py."""

import json
import subprocess
import sys
from pathlib import Path

import faults
from helpers import environment


def test_cheap_faults_on_one_script():
    command = [sys.executable, faults.__file__, "--scripts", "dinov2", "--faults", "flags", "folder", "network", "data"]
    result = subprocess.run([*command, "--out", "found"], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    cells = json.loads(Path("found/faults.json").read_text())["dinov2"]
    assert {fault: cell["result"] for fault, cell in cells.items()} == dict.fromkeys(command[5:], "survived")
    assert Path("found/faults.md").read_text() in result.stdout and result.stdout.count("survived") == 4


def test_what_does_not_survive_is_told(monkeypatch, capsys):
    def unharmed(case):
        raise faults.NotApplicable("there is nothing to break")

    def broken(case):
        assert Path("slow.py").exists(), "each fault has a folder of its own"
        raise KeyError("config")

    def wrong(case):
        faults.Forked("dinov2.py", "--wdith", 3).end(code=0)

    faults_of_test = {"unharmed": (unharmed, "a"), "broken": (broken, "b"), "wrong": (wrong, "c")}
    monkeypatch.setattr(faults, "FAULTS", faults_of_test)
    assert faults.main(["--scripts", "vjepa"]) == 1
    table, told = capsys.readouterr()
    assert "| a | not applicable (1) |" in table and "(1) there is nothing to break." in table
    assert table.count("FAILED") == 2 and "KeyError: 'config'" in told and "exit code 2, not 0: --wdith 3" in told
