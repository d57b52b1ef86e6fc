"""Two of the faults on one script. All of them on all: python tests/faults.py."""

import subprocess
import sys

import faults
from helpers import environment


def test_cheap_faults_on_one_script():
    command = [sys.executable, faults.__file__, "--scripts", "pixel_vit"]
    command += ["--faults", "folder", "checkpoint"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("survived") == 2, done
