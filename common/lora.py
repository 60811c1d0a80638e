"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen linear or conv layer plus a trained low-rank change.

    y = W x + b + (alpha / rank) B(A x)      A (r d_in), B (d_out r) = 0 at the start, so y starts at the base

Conv1d: A has the layer's kernel, B a kernel of 1, the layout of the peft library. No dropout anywhere: the
policy that is sampled has to be the policy that is scored. Layers must be called as modules: fused code such
as nn.MultiheadAttention reads `layer.weight` directly and would pass the adapter by.
"""
import contextlib
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError


class Adapter(nn.Module):
    """A frozen Linear or Conv1d, the `base`, with its trained change: A, B and how strongly they count."""

    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        if rank < 1:
            raise InputError(f"LoRA rank {rank}: at least 1")
        self.base, self.scaling = base.requires_grad_(False), alpha / rank
        if isinstance(base, nn.Conv1d):
            if base.groups != 1 or base.padding_mode != "zeros":
                raise InputError("LoRA covers Conv1d layers with one group and zero padding only")
            shape_a, shape_b = (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank, 1)
        else:
            shape_a, shape_b = (rank, base.in_features), (base.out_features, rank)
        # kaiming uniform with a = sqrt(5), as in the authors' code
        A = (torch.rand(shape_a, generator=generator) * 2 - 1) * (1 / math.sqrt(math.prod(shape_a[1:])))
        self.A = nn.Parameter(A.to(base.weight))
        self.B = nn.Parameter(torch.zeros(shape_b).to(base.weight))

    def forward(self, x):
        """The base layer's output plus the change; at strength 0 the base layer's output, bit for bit."""
        y = self.base(x)
        if self.scaling == 0.0:
            return y
        if isinstance(self.base, nn.Conv1d):
            narrow = F.conv1d(x, self.A, None, self.base.stride, self.base.padding, self.base.dilation)
            return y + self.scaling * F.conv1d(narrow, self.B)
        return y + self.scaling * F.linear(F.linear(x, self.A), self.B)


def adapters(model):
    """The adapted layers of a model as a dict name -> Adapter, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def inject(model, pattern, rank, alpha, generator=None):
    """Freeze the model and wrap each Linear / Conv1d in whose dotted name the regular expression is found.

    Works in place, returns the wrapped names. InputError if nothing matches: a typo would train nothing.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"LoRA pattern {pattern!r} is no regular expression: {error}") from error
    model.requires_grad_(False)
    inside = tuple(f"{name}." for name in adapters(model))
    layers = [(name, module) for name, module in model.named_modules()
              if type(module) in (nn.Linear, nn.Conv1d) and not name.startswith(inside)]
    chosen = [(name, module) for name, module in layers if re.search(pattern, name)]
    if not chosen:
        names = ", ".join(name for name, _ in layers[:8])
        raise InputError(f"LoRA pattern {pattern!r} matches none of the layers {names} ...")
    for name, module in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Adapter(module, rank, alpha, generator))
    return [name for name, _ in chosen]


@contextlib.contextmanager
def scaled(model, strength):
    """`with scaled(model, 0.0):` -- the adapters at a share of their strength, at no memory cost. At 0 the
    model is its base bit for bit: a reference for KL terms and for tables."""
    layers = [(layer, layer.scaling) for layer in adapters(model).values()]
    try:
        for layer, full in layers:
            layer.scaling = strength * full
        yield model
    finally:
        for layer, full in layers:
            layer.scaling = full


def parameters(model):
    """The trained parameters, A and B of each adapter, as a list."""
    return [parameter for layer in adapters(model).values() for parameter in (layer.A, layer.B)]


def count(parameters):
    """Number of values in a list of parameters."""
    return sum(parameter.numel() for parameter in parameters)


def state(model):
    """All A and B with their scale: a dict of tensors and floats, small enough to share; see `load`."""
    stored = {}
    for name, layer in adapters(model).items():
        stored |= {f"{name}.{part}": getattr(layer, part).detach().cpu().clone() for part in "AB"}
        stored[f"{name}.scaling"] = layer.scaling
    return stored


@torch.no_grad()
def load(model, stored):
    """Copy the values of `state` into the adapters of a model that `inject` prepared in the same way.

    InputError if a key is missing, unknown, or of another shape or scale; the model is then unchanged.
    """
    mine = state(model)
    problems = [f"missing {key}" for key in mine if key not in stored]
    problems += [f"unknown {key}" for key in stored if key not in mine]
    for key in mine.keys() & stored.keys():
        theirs, ours = ((tuple(value.shape) if torch.is_tensor(value) else value)
                        for value in (stored[key], mine[key]))
        if theirs != ours:
            problems.append(f"{key} is {theirs}, the model has {ours}")
    if problems:
        more = f"; {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError("the adapter does not fit; use the rank, alpha and size of its run: "
                         + "; ".join(sorted(problems)[:5]) + more)
    for name, layer in adapters(model).items():
        layer.A.copy_(stored[f"{name}.A"])
        layer.B.copy_(stored[f"{name}.B"])
