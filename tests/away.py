"""A device without hardware, "away": it computes on the CPU, but is as strict as a GPU.

A tensor on it holds a CPU tensor. An operation on tensors of both devices, or with a generator of
the other, is an error. WAITS counts, by the line that did it, what makes a CUDA host wait until the
device has done all it was asked to: values that are read, shapes that depend on values, copies to
the host, and copies to the device that are not `non_blocking`. For tests only, in a process of its
own: `register` changes torch for good. AVAILABLE: whether this torch has what it needs, an
experimental part of recent versions.
"""

import traceback
from collections import Counter
from pathlib import Path

import torch
from helpers import ROOT
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
# shapes that depend on values, and values that are read
READERS = "_local_scalar_dense nonzero equal is_nonzero _unique2 unique_dim masked_select".split()
WAITS = Counter()  # {"what at file.py:line: source": how many times}
GENERATORS = {}  # of this device: torch hands on another Python object of the same C++ one


def note(what):
    """Count a wait by the innermost line of a script that led to it."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
    place = "the backward pass, which has a thread of its own"
    if frames:
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}"
    WAITS[f"{what} at {place}"] += 1


class Away(torch.Tensor):
    """A tensor on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device("away", 0),
        )

    def __init__(self, here):
        self.here = here

    def tolist(self):
        """Return the values, for which the host waits."""
        note("tolist")
        return self.here.tolist()

    def numpy(self, **_):
        """Refuse, as all devices but the CPU do."""
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
    leaves = tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, Away) for x in tensors)
    result_there = there
    if kwargs.get("device") is not None:
        result_there = torch.device(kwargs["device"]).type == "away"
    if not there and not result_there:
        return operation(*args, **kwargs)
    for x in leaves:
        if isinstance(x, torch._C.Generator) and (x._cdata in GENERATORS) != result_there:
            raise RuntimeError(f"{operation}: the generator is of another device")
    check(operation._schema.name.removeprefix("aten::"), args, kwargs, tensors, there, result_there)

    def unwrap(x):
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return x.here if isinstance(x, Away) else x

    # an operation in place returns its argument
    known = {id(x.here): x for x in tensors if isinstance(x, Away)}

    def wrap(x):
        if isinstance(x, torch.Tensor) and result_there:
            return known[id(x)] if id(x) in known else Away(x)
        return x

    return tree_map(wrap, operation(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


def check(name, args, kwargs, tensors, there, result_there):
    """Refuse what mixes devices, and note what waits."""
    here = [x for x in tensors if x.dim() and not isinstance(x, Away)]
    if name in ("_to_copy", "copy_"):
        blocking = not kwargs.get("non_blocking") and args[2:] != (True,)
        crosses = len({isinstance(x, Away) for x in tensors} | {result_there}) == 2
        if crosses and (blocking or not result_there):
            note("copy between host and device")
    elif there:
        indexing = name.startswith("index")
        if here and not indexing:
            raise RuntimeError(f"{name}: a tensor of shape {list(here[0].shape)} is on the CPU")
        chosen = tree_leaves(args[1]) if indexing else []
        masks = [x for x in chosen if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        if name in READERS or masks or here:
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
    """Make torch know the device, and return it."""
    backend_registration._setup_privateuseone_for_python_backend("away", Module())
    torch.Generator = Generator

    # where torch makes a tensor of a list, it does so below the dispatch to Python
    def empty_strided(size, stride, dtype=None, **_):
        return Away(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        note("copy of a list to the device")
        target.here.copy_(source)
        return target

    register.library = torch.library.Library("aten", "IMPL")  # undone when nothing refers to it
    register.library.impl("empty_strided", empty_strided, "PrivateUse1")
    register.library.impl("_copy_from", copy_from, "PrivateUse1")
    return torch.device("away", 0)
