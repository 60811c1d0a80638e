"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen linear or conv layer plus a trained low-rank change.

    y = W x + b + (alpha / rank) B(A x)      A (r d_in), B (d_out r) = 0 at the start, so y starts at the base

Conv1d: A has the layer's kernel, B a kernel of 1, the layout of the peft library. No dropout anywhere: the
policy that is sampled has to be the policy that is scored. Layers must be called as modules: fused code such
as nn.MultiheadAttention reads `layer.weight` directly and would pass the adapter by.
"""
import contextlib
import copy
import math
import re

import torch
from torch import nn

from common import InputError


class _Adapter(nn.Module):
    """What both layer types share: the frozen `base`, the trained `A` and `B`, the scale and the switch."""

    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        if rank < 1:
            raise InputError(f"LoRA rank {rank}: at least 1")
        self.base = base.requires_grad_(False)
        self.rank, self.scaling, self.enabled = rank, alpha / rank, True
        shape_a, shape_b = self._shapes()
        weight = base.weight
        self.A = nn.Parameter(torch.empty(shape_a, dtype=weight.dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(shape_b, dtype=weight.dtype, device=weight.device))
        bound = 1 / math.sqrt(self.A[0].numel())  # kaiming uniform with a = sqrt(5), as in the authors' code
        with torch.no_grad():
            self.A.copy_((torch.rand(shape_a, generator=generator) * 2 - 1) * bound)

    def forward(self, x):
        """The base layer's output, plus the low-rank change unless it is switched off."""
        y = self.base(x)
        return y + self.scaling * self._change(x) if self.enabled else y


class LoRALinear(_Adapter):
    """LoRA on nn.Linear: A (r d_in), B (d_out r)."""

    def _shapes(self):
        return (self.rank, self.base.in_features), (self.base.out_features, self.rank)

    def _change(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.A), self.B)

    def delta(self):
        """The weight change (d_out d_in) that merging adds."""
        return self.scaling * self.B @ self.A


class LoRAConv1d(_Adapter):
    """LoRA on nn.Conv1d (one group, zero padding): A (r d_in k), B (d_out r 1)."""

    def _shapes(self):
        if self.base.groups != 1 or self.base.padding_mode != "zeros":
            raise InputError("LoRA covers Conv1d layers with one group and zero padding only")
        base = self.base
        return (self.rank, base.in_channels, *base.kernel_size), (base.out_channels, self.rank, 1)

    def _change(self, x):
        base = self.base
        narrow = nn.functional.conv1d(x, self.A, None, base.stride, base.padding, base.dilation)
        return nn.functional.conv1d(narrow, self.B)

    def delta(self):
        """The weight change (d_out d_in k) that merging adds."""
        return self.scaling * torch.einsum("orz,rik->oik", self.B, self.A)


def adapters(model):
    """The adapter layers of a model as a dict name -> layer, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Adapter)}


def inject(model, pattern, rank, alpha, generator=None):
    """Freeze the model and wrap each Linear / Conv1d in whose dotted name the regular expression is found.

    Works in place, returns the wrapped names. InputError if nothing matches: a typo would train nothing.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"LoRA pattern {pattern!r} is no regular expression: {error}") from error
    model.requires_grad_(False)
    kinds = {nn.Linear: LoRALinear, nn.Conv1d: LoRAConv1d}
    inside = tuple(f"{name}." for name in adapters(model))
    chosen = [(name, module) for name, module in model.named_modules()
              if type(module) in kinds and re.search(pattern, name) and not name.startswith(inside)]
    if not chosen:
        names = [name for name, module in model.named_modules() if type(module) in kinds]
        raise InputError(f"LoRA pattern {pattern!r} matches none of the layers {', '.join(names[:8])} ...")
    for name, module in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, kinds[type(module)](module, rank, alpha, generator))
    return [name for name, _ in chosen]


def set_enabled(model, enabled):
    """Switch all adapters on or off; off, the model is the base model bit for bit."""
    for layer in adapters(model).values():
        layer.enabled = enabled


@contextlib.contextmanager
def disabled(model):
    """`with disabled(model):` -- the base model, for references and KL terms, at no memory cost."""
    before = {name: layer.enabled for name, layer in adapters(model).items()}
    set_enabled(model, False)
    try:
        yield model
    finally:
        for name, layer in adapters(model).items():
            layer.enabled = before[name]


@contextlib.contextmanager
def scaled(model, strength):
    """`with scaled(model, 0.5):` -- the adapters at a share of their strength; 0 is the base bit for bit."""
    before = {name: layer.scaling for name, layer in adapters(model).items()}
    with contextlib.nullcontext() if strength else disabled(model):
        try:
            for name, layer in adapters(model).items():
                layer.scaling = strength * before[name]
            yield model
        finally:
            for name, layer in adapters(model).items():
                layer.scaling = before[name]


@torch.no_grad()
def merge(model):
    """Fold every adapter into its base weight and put the plain layers back, in place; returns the model."""
    for name, layer in adapters(model).items():
        layer.base.weight += layer.delta()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    return model


def lora_parameters(model):
    """The trained parameters, A and B of each adapter, as a list."""
    return [parameter for layer in adapters(model).values() for parameter in (layer.A, layer.B)]


def count(parameters):
    """Number of values in a list of parameters."""
    return sum(parameter.numel() for parameter in parameters)


def lora_state(model):
    """All A and B with their scale: a dict of tensors and floats, small enough to share; see `load_lora`."""
    state = {}
    for name, layer in adapters(model).items():
        state[f"{name}.A"] = layer.A.detach().cpu().clone()
        state[f"{name}.B"] = layer.B.detach().cpu().clone()
        state[f"{name}.scaling"] = layer.scaling
    return state


@torch.no_grad()
def load_lora(model, state):
    """Copy the values of `lora_state` into the adapters of a model that `inject` prepared in the same way.

    InputError if a key is missing, unknown, or of another shape or scale; the model is then unchanged.
    """
    mine = lora_state(model)
    problems = [f"missing {key}" for key in mine if key not in state]
    problems += [f"unknown {key}" for key in state if key not in mine]
    for key in mine.keys() & state.keys():
        if key.endswith(".scaling"):
            if mine[key] != state[key]:
                problems.append(f"{key} is {state[key]}, the model has {mine[key]}")
        elif mine[key].shape != state[key].shape:
            problems.append(f"{key} is {tuple(state[key].shape)}, the model has {tuple(mine[key].shape)}")
    if problems:
        more = f"; {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError("the adapter does not fit; use the rank, alpha, targets and width of its run: "
                         + "; ".join(sorted(problems)[:5]) + more)
    for name, layer in adapters(model).items():
        layer.A.copy_(state[f"{name}.A"])
        layer.B.copy_(state[f"{name}.B"])


class Tuned:
    """What is trained of a model: adapters inside it ("lora"), or all its weights ("full"), of which a frozen
    copy is kept as the base."""

    def __init__(self, model, adapter, pattern, rank, alpha, generator=None):
        self.model, self.frozen = model.requires_grad_(False), None
        if adapter == "lora":
            inject(model, pattern, rank, alpha, generator)
        else:
            self.frozen = copy.deepcopy(model)
            model.requires_grad_(True)

    def parameters(self):
        """The trained parameters, as a list."""
        return lora_parameters(self.model) if self.frozen is None else list(self.model.parameters())

    @contextlib.contextmanager
    def base(self):
        """`with tuned.base() as base:` -- the model before any training, bit for bit."""
        with disabled(self.model) if self.frozen is None else contextlib.nullcontext(self.frozen) as base:
            yield base

    def state(self):
        """What training has changed, a dict for `load`."""
        if self.frozen is None:
            return lora_state(self.model)
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def load(self, state):
        """Take over a `state`; strict."""
        if self.frozen is None:
            load_lora(self.model, state)
        else:
            self.model.load_state_dict(state)
