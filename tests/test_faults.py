"""The run that breaks every script works, and can fail. All of it: python tests/faults.py."""

import subprocess
import sys

import faults
from helpers import environment


def test_cheap_faults_on_one_script():
    command = [sys.executable, faults.__file__, "--scripts", "pixel_vit"]
    command += ["--faults", "folder", "checkpoint"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("survived") == 2, done


def test_what_does_not_survive_is_told(monkeypatch, capsys):
    def unharmed(case):
        """A."""
        raise faults.NotApplicable("there is nothing to break")

    def broken(case):
        """B."""
        raise KeyError("config")

    def wrong(case):
        """C."""
        faults.run(case, "--wdith 3")

    def differs(case):
        """D."""
        faults.assert_equal({"a": [1, 2]}, {"a": [1, 3]}, "")

    monkeypatch.setattr(faults, "FAULTS", [unharmed, broken, wrong, differs])
    monkeypatch.setattr(faults.common, "TOYS", {})
    assert faults.main(["--scripts", "pixel_vit"]) == 1
    table, told = capsys.readouterr()
    assert "| A | not applicable: there is nothing to break |" in table
    assert table.count("FAILED") == 3 and "KeyError: 'config'" in told
    assert "exit code 2, not (0,)" in told and "--wdith" in told and "1 of 2 values" in told
