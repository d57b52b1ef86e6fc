"""What the tests of all scripts share: running a script as a user does, in one process or several, and killing it."""

import functools
import importlib
import json
import multiprocessing.forkserver
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

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
    return [*launcher, str(ROOT / script), *" ".join(map(str, flags)).split()]


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


@functools.cache
def forks():
    """Processes that start in milliseconds: copies of one that has imported the scripts, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([path.stem for path in ROOT.glob("*.py")])
    with mock.patch.dict(os.environ, environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}, clear=True):
        multiprocessing.forkserver.ensure_running()
    return context


def call_lines(*lines):
    """In a process of its own: call command lines, each [script's name, *flags], one after the other."""
    os.setsid()
    torch.set_num_threads(1)
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # a process joins a group only once
    for script, *flags in lines:
        sys.argv = [f"{script}.py", *flags]
        importlib.import_module(script).main(flags)
    if dist.is_initialized():
        leave()


def call_lines_as_rank(rank, ranks, port, lines):
    """The same in the environment that torchrun makes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    call_lines(*lines)


def on_ranks(function, *args, ranks, timeout=900):
    """Call function(rank, *args) in one process per rank, to the end of all; what one raises is raised."""
    forks()
    group = torch.multiprocessing.start_processes(function, args, ranks, join=False, start_method="forkserver")
    end = time.monotonic() + timeout
    while not group.join(1):
        if time.monotonic() > end:
            for process in group.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} took more than {timeout} seconds on {ranks} ranks")


def run_several(*lines, ranks):
    """Run command lines, each [script's name, *flags], one after the other in the same processes, one per rank."""
    words = [line.split() if isinstance(line, str) else list(map(str, line)) for line in lines]
    on_ranks(call_lines_as_rank, ranks, free_port(), words, ranks=ranks)


def start(script, *flags, ranks=1):
    """Start a script and return its process, in a process group of its own."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return subprocess.Popen(command(script, *flags, ranks=ranks), env=environment(), **options)


class Forked:
    """A script in a forked process, in a process group of its own; with those methods of Popen that a kill needs."""

    def __init__(self, script, *flags):
        line = [Path(script).stem, *map(str, flags)]
        self.process = forks().Process(target=call_lines, args=(line,))
        self.process.start()
        self.pid = self.process.pid
        while self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.01)

    def poll(self):
        return self.process.exitcode

    def communicate(self):
        self.process.join()


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


def wait_for(condition, process, seconds=120):
    """Wait until condition() holds; fail if the process ends before, or takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"ended too early or hangs: {process.communicate()[0]}")
        time.sleep(0.005)


def kill_when(script, *flags, rows):
    """Run with --resume and kill -9, with its loading processes, once its log has that many rows."""
    process, log = start(script, *flags, "--resume"), Path(flags[-1].split()[-1]) / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= rows, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def log_rows(out):
    """The objects of a run's log.jsonl."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
