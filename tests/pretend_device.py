"""A pretended GPU, so that a mistake about devices fails on a machine that has none.

What lies on the device "meta" here is a CPU tensor in a wrapper. Every operation is done on what is wrapped,
and one that mixes both kinds raises as CUDA would. As there, an index may lie on the CPU, and so may a number
without dimensions and the lengths of packed sequences.
"""
import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from common import runs

aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
PACKED = ("_pack_padded_sequence", "_pad_packed_sequence", "gru")
DEVICE = torch.device("meta")


class OnDevice(torch.Tensor):
    """A tensor of the pretended device; `inside` is where its numbers are."""

    @staticmethod
    def __new__(cls, inside):
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), storage_offset=inside.storage_offset(),
            dtype=inside.dtype, device=DEVICE)
        wrapper.inside = inside
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def numpy(self, *args):
        raise TypeError("a tensor of the device cannot become an array; move it to the CPU first")

    __array__ = numpy

    def tolist(self):
        return self.inside.tolist()

    def item(self):
        return self.inside.item()

    def __reduce_ex__(self, protocol):
        return self.inside.__reduce_ex__(protocol)

    @staticmethod
    def _listed(index):
        """Lists become tensors here: PyTorch would make real, empty tensors of the device "meta"."""
        def one(part):
            return OnDevice(torch.tensor(part)) if isinstance(part, list) else part
        return tuple(map(one, index)) if isinstance(index, tuple) else one(index)

    def __getitem__(self, index):
        return super().__getitem__(self._listed(index))

    def __setitem__(self, index, value):
        super().__setitem__(self._listed(index), value)


def inside(value):
    """The CPU tensor in a tensor of the device; anything else as it is."""
    return value.inside if isinstance(value, OnDevice) else value


def run(function, args, kwargs):
    """What an operation gives; RuntimeError if its tensors lie on both devices."""
    tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    real = [t for t in tensors if t.device == DEVICE and not isinstance(t, OnDevice)]
    assert not real, f"{function}: a hole in the pretence"
    if function is aten.copy_.default:  # between devices
        inside(args[0]).copy_(inside(args[1]))
        return args[0]
    wanted = kwargs.get("device")
    moved = wanted is not None and torch.device(wanted) == DEVICE
    on_device = moved or bool(ours) and wanted is None
    generator = kwargs.get("generator")
    if on_device and generator is not None:
        raise RuntimeError(f"{function}: a generator of the CPU draws on the device")
    checked = tensors
    if function in INDEXED:
        checked = [part for part in (args[0], *args[2:3]) if isinstance(part, torch.Tensor)]
        if not isinstance(args[0], OnDevice) and ours:
            raise RuntimeError(f"{function}: the index lies on the device, and what it reads on the CPU")
    packed = any(name in str(function) for name in PACKED)
    apart = [t for t in checked if not isinstance(t, OnDevice) and t.dim()]
    if ours and apart and not packed and function is not aten._to_copy.default:
        raise RuntimeError(f"{function}: its tensors lie on two devices")
    if moved:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    made = function(*tree_map(inside, args), **tree_map(inside, kwargs))
    if not on_device:
        return made
    if function is aten._pack_padded_sequence.default:
        return OnDevice(made[0]), made[1]
    known = {id(tensor.inside): tensor for tensor in ours}  # operations in place give back what they got

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else OnDevice(value)
    return tree_map(wrapped, made)


class Pretence(TorchDispatchMode):
    """Operations that make tensors of the device out of none pass through here."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def built(make):
    """torch.tensor and torch.as_tensor of lists, which do not pass through a mode."""
    def made(data, *args, device=None, **options):
        tensor = data if isinstance(data, OnDevice) else make(data, *args, **options)
        return tensor if device is None else tensor.to(device)
    return made


def new_tensor(like, data, **options):
    return torch.tensor(data, **{"dtype": like.dtype, "device": like.device, **options})


@contextlib.contextmanager
def pretended():
    """A run in here computes on the pretended device, whatever its --device is."""
    with mock.patch.object(runs, "pick_device", lambda name="auto": DEVICE), \
            mock.patch.object(torch, "tensor", built(torch.tensor)), \
            mock.patch.object(torch, "as_tensor", built(torch.as_tensor)), \
            mock.patch.object(torch.Tensor, "new_tensor", new_tensor), Pretence():
        yield
