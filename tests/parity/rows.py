"""Rows of errors that every check gives: (field, max_error, tolerance)."""
import math
import re

import numpy as np
import torch


class Rows:
    """The largest error of each field over the cases of a file.

    Errors are |mine - theirs| / (1 + |theirs|) at their largest: a tolerance acts as rtol and atol at once.
    """

    def __init__(self):
        self.worst = {}

    def compare(self, field, mine, theirs, tolerance):
        """Add one comparison; another shape, or a NaN or infinity on one side only, is an infinite error."""
        mine = np.asarray(mine.detach() if isinstance(mine, torch.Tensor) else mine, dtype=np.float64)
        theirs = np.asarray(theirs, dtype=np.float64)
        error = np.inf
        if mine.shape == theirs.shape:
            with np.errstate(invalid="ignore"):
                apart = np.where(mine == theirs, 0.0, np.abs(mine - theirs) / (1 + np.abs(theirs)))
            error = float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(initial=0.0))
        before, _ = self.worst.get(field, (0.0, tolerance))
        self.worst[field] = (max(before, error), tolerance)

    def rows(self):
        """[(field, max_error, tolerance)], as tests/parity wants it."""
        return [(field, error, tolerance) for field, (error, tolerance) in self.worst.items()]


def cases(path):
    """Reference file -> {case: {field: array}} from its keys `CASE/FIELD`."""
    found = {}
    with np.load(path) as stored:
        for key in stored.files:
            case, _, field = key.partition("/")
            found.setdefault(case, {})[field] = stored[key]
    return found


def check_cases(path, function):
    """The rows of a file of cases: function(Rows, path, case, fields) is called for each."""
    result = Rows()
    for case, ref in cases(path).items():
        function(result, path, case, ref)
    return result.rows()


def error(ours, theirs, relative=False):
    """Largest difference; infinite on NaN or on another shape, so that neither can pass."""
    ours, theirs = (np.asarray(torch.as_tensor(x).detach(), dtype=np.float64) for x in (ours, theirs))
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return math.inf
    scale = np.maximum(np.abs(theirs), 1e-12) if relative else 1.0
    return float((np.abs(ours - theirs) / scale).max(initial=0.0))


def state(z, prefix):
    """The tensors of a file under a prefix, which is removed: a state dict."""
    return {key.removeprefix(prefix): torch.from_numpy(z[key]) for key in z.files if key.startswith(prefix)}


def packed(state):
    """Our weights with every q, k and v (in this order) as the one in_proj that nn.MultiheadAttention has."""
    out = {}
    for key, value in state.items():
        if found := re.fullmatch(r"(.*_attn\.)[qkv]\.(weight|bias)", key):
            key = f"{found[1]}in_proj_{found[2]}"
            value = torch.cat([out[key], value]) if key in out else value
        out[key] = value
    return out


def shapes_error(full_size_keys, modules):
    """Number of parameters whose official name or full-size shape differs from ours."""
    ours = {f"{name}/{key} {tuple(value.shape)}"
            for name, part in modules.items() for key, value in part.items()}
    return float(len(ours ^ set(full_size_keys.tolist())))


class Used:
    """A reference file that knows which of its arrays were read."""

    def __init__(self, z):
        self.z, self.files, self.seen = z, z.files, set()

    def __contains__(self, key):
        return key in self.files

    def __getitem__(self, key):
        self.seen.add(key)
        return self.z[key]

    def left(self):
        """The arrays that nobody has read."""
        return set(self.files) - self.seen
