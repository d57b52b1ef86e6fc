"""Run several command lines of the scripts in one process (or one per rank), since starting torch costs seconds.

python tests/several.py ijepa --steps 2 --out a --then msn --steps 2 --out b
"""

import importlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # a process joins a group only once
words = sys.argv[1:]
while words:
    end = words.index("--then") if "--then" in words else len(words)
    sys.argv = [f"{words[0]}.py", *words[1:end]]
    importlib.import_module(words[0]).main(words[1:end])
    words = words[end + 1 :]
if dist.is_initialized():
    leave()
