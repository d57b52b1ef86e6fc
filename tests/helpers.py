"""What the tests of all scripts share: running a script as a user does, in one process or several, and killing it."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port():
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(script, *flags, ranks=1):
    """The command line of a script, under torchrun if it has ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), f"--master-port={free_port()}"]
    return [*launcher, str(ROOT / script), *map(str, flags)]


def environment():
    """No accelerator and few threads, so that results do not depend on the machine more than they must."""
    threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {k: v for k, v in os.environ.items() if k not in ("DATA", "RANK", "WORLD_SIZE")} | threads


def run(script, *flags, ranks=1, code=0, timeout=240, **env):
    """Run a script to its end, check its exit code, return what it printed."""
    result = subprocess.run(
        command(script, *flags, ranks=ranks), env=environment() | env, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == code, f"exit code {result.returncode}, not {code}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


def run_several(*lines, ranks):
    """Run command lines, each [script's name, *flags], one after the other in the same processes, one per rank."""
    words = [word for line in lines for word in ("--then", *line)][1:]
    return run("tests/several.py", *words, ranks=ranks)


def start(script, *flags, ranks=1):
    """Start a script and return its process, in a process group of its own."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return subprocess.Popen(command(script, *flags, ranks=ranks), env=environment(), **options)


def kill_at_random(script, *flags, times, seed, longest, start=start):
    """Run with --resume, kill -9 after a random time, and again; returns how many were killed before their end."""
    chance, killed = random.Random(seed), 0
    for _ in range(times):
        process = start(script, *flags, "--resume")
        time.sleep(chance.uniform(0.3, 1.0) * longest)
        if process.poll() is None:
            killed += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return killed


def log_rows(out):
    """The objects of a run's log.jsonl."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
