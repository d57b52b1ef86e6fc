"""A device without hardware, "away": it computes on the CPU, but is as strict as a GPU and knows what waits for it.

A tensor on it holds a CPU tensor. An operation on tensors of both devices, or with a generator of the other, is an
error. WAITS counts what makes a CUDA host wait until the device has done all it was asked to, by the line that did it:
values that are read, shapes that depend on values, copies to the host, and copies to the device that are not
`non_blocking`. For tests only, in a process of its own: `register` changes torch for good. AVAILABLE: whether this
torch has what it needs, an experimental part of recent versions.
"""

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parent.parent
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
# shapes that depend on values, and values that are read
READERS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "unique_dim", "masked_select")
WAITS = Counter()  # {("train", or the function elsewhere, "what at file.py:line: source"): how many times}
GENERATORS = {}  # of this device: torch hands on another Python object of the same C++ one


def note(what):
    """Count a wait by the innermost line of a script that led to it, under "train" if that was in training."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
    # a backward pass runs in a thread of its own, whose stack knows nothing of who called it
    names = [f.name for f in frames] or ["backward"]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}" if frames else "?"
    WAITS["train" if {"train", "backward"} & set(names) else names[-1], f"{what} at {place}"] += 1


class Away(torch.Tensor):
    """A tensor on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        size, options = here.size(), dict(dtype=here.dtype, layout=here.layout, device=torch.device("away", 0))
        return torch.Tensor._make_wrapper_subclass(
            cls, size, strides=here.stride(), storage_offset=here.storage_offset(), **options
        )

    def __init__(self, here):
        self.here = here

    def __repr__(self):
        return f"Away({self.here!r})"

    def tolist(self):
        """The values, for which the host waits."""
        note("tolist")
        return self.here.tolist()

    def numpy(self, **_):
        """Refused, as by all devices but the CPU."""
        raise TypeError("can't convert a tensor on away to numpy: use .cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return dispatch(operation, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """While this is entered, tensors can be made on the device, and copied to it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return dispatch(operation, args, kwargs or {})


def dispatch(operation, args, kwargs):
    """Do what the device does with an operation of ATen."""
    leaves, name = tree_leaves((args, kwargs)), operation._schema.name.removeprefix("aten::")
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    device = kwargs.get("device")
    there = any(isinstance(x, Away) for x in tensors)
    result_there = there if device is None else torch.device(device).type == "away"
    if not there and not result_there:
        return operation(*args, **kwargs)
    for x in leaves:
        if isinstance(x, torch._C.Generator) and (x._cdata in GENERATORS) != result_there:
            raise RuntimeError(f"{operation}: the generator is of another device")
    check(name, args, kwargs, tensors, there, result_there)

    def unwrap(x):
        return x.here if isinstance(x, Away) else torch.device("cpu") if isinstance(x, torch.device) else x

    found = operation(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    known = {id(x.here): x for x in tensors if isinstance(x, Away)}  # an operation in place returns its argument

    def wrap(x):
        if isinstance(x, torch.Tensor) and result_there:
            return known[id(x)] if id(x) in known else Away(x)
        return x

    return tree_map(wrap, found)


def check(name, args, kwargs, tensors, there, result_there):
    """Refuse what mixes devices, and note what waits."""
    if name == "_to_copy":
        if there and not result_there:
            note("copy to the host")
        elif not there and not kwargs.get("non_blocking"):
            note("copy to the device that is not non_blocking")
    elif name == "copy_":
        same = all(isinstance(x, Away) for x in tensors)
        if not same and not (kwargs.get("non_blocking") or args[2:] == (True,)):
            note("copy between devices that is not non_blocking")
    elif there:
        for x in tensors:
            if not isinstance(x, Away) and x.dim():
                if not name.startswith("index"):
                    raise RuntimeError(
                        f"{name}: tensors of two devices, one of them of shape {list(x.shape)} on the CPU"
                    )
                note("index on the CPU")
        chosen = args[1] if name in ("index", "index_put", "index_put_") else []
        if name in READERS or any(x is not None and x.dtype == torch.bool for x in chosen):
            note(name)


class Generator(torch._C.Generator):
    """torch.Generator, for this device too."""

    def __new__(cls, device="cpu"):
        there = torch.device(device).type == "away"
        self = super().__new__(cls, "cpu" if there else device)
        if there:
            GENERATORS[self._cdata] = self
        return self


class Module(backend_registration._DummyBackendModule if AVAILABLE else object):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False


def register():
    """Make torch know the device. -> torch.device"""
    backend_registration._setup_privateuseone_for_python_backend("away", Module())
    torch.Generator = Generator

    # where torch makes a tensor of a list, it does so below the dispatch to Python
    def empty_strided(size, stride, dtype=None, **_):
        return Away(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        note("copy of a list to the device")
        target.here.copy_(source)
        return target

    register.library = torch.library.Library("aten", "IMPL")  # which is undone when nothing refers to it
    register.library.impl("empty_strided", empty_strided, "PrivateUse1")
    register.library.impl("_copy_from", copy_from, "PrivateUse1")
    return torch.device("away", 0)
