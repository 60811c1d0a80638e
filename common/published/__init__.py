"""Published weights, read without executing anything and loaded strictly: of T2M-GPT
(github.com/Mael-zys/T2M-GPT), MotionCritic (github.com/ou524u/MotionCritic), MDM
(github.com/GuyTevet/motion-diffusion-model) and MLD (github.com/ChenFengYe/motion-latent-diffusion).
"""
import re

import torch

from common import InputError
from common.runs import stand_in

# in the files, but no weights: causal masks, an embedding that is never used, the table of positions
NO_WEIGHTS = re.compile(r"attn\.mask$|pos_embedding\.weight$|pos_embed\.embed$")


def load_plain(path):
    """What a checkpoint file holds, tensors on the CPU; nothing in it is executed. InputError that says what
    the file is where it is none."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; correct the path of the checkpoint") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name the checkpoint file") from None
    except Exception as error:  # a damaged zip or a forbidden pickle fails in a dozen ways
        said = stand_in(path) or (f"does not load with weights_only=True ({type(error).__name__}); if it is "
                                  "whole, save its state dict again as plain tensors")
        raise InputError(f"{path}: {said}") from error


def read_state(path, name, bare=False):
    """The state dict under `name` of a checkpoint file: "net" for the tokenizer, "trans" for the GPT,
    "model_state_dict" for MotionCritic. bare: the file may also be the state dict itself."""
    return state_of(load_plain(path), path, name, bare)


def state_of(stored, path, name, bare=False):
    """As `read_state`, of a file whose content is already `stored`."""
    if bare and isinstance(stored, dict) and name not in stored:
        stored = {name: stored}
    if not isinstance(stored, dict) or not isinstance(stored.get(name), dict):
        raise InputError(f"{path}: holds no {name!r}; is it a checkpoint of the other kind?")
    strange = [key for key, value in stored[name].items()
               if not isinstance(key, str) or not torch.is_tensor(value)]
    if strange:
        raise InputError(f"{path}: {strange[0]!r} is no weight; save its state dict alone")
    state = {key.removeprefix("module.").removeprefix("vqvae."): value for key, value in stored[name].items()}
    return {key: value for key, value in state.items() if not NO_WEIGHTS.search(key)}


def size(state, path, key, axis=0):
    """Size of an axis of a weight; InputError if the weight is not there."""
    if key not in state or state[key].ndim <= axis:
        raise InputError(f"{path}: has no {key}, or not of its shape; is it a checkpoint of the other "
                         "kind?")
    return state[key].shape[axis]


def load_strict(module, state, path, free=()):
    """Load every weight; InputError that lists the keys that differ, with their shapes. free: entries of the
    module that come from elsewhere."""
    own = {key: tuple(value.shape) for key, value in module.state_dict().items() if key not in free}
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    wrong = [f"{key} is {theirs.get(key, 'missing')}, wanted {own.get(key, 'nothing')}"
             for key in sorted(own.keys() | theirs.keys()) if own.get(key) != theirs.get(key)]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(f"{path}: {'; '.join(wrong[:5])}{more}")
    module.load_state_dict({key: value for key, value in module.state_dict().items() if key in free} | state)


def unpack_attention(state):
    """Weights of nn.MultiheadAttention -> one in_proj becomes the plain linears q, k and v, which LoRA can
    reach by name. Other entries are kept."""
    out = {}
    for key, value in state.items():
        if "in_proj_" in key and value.ndim:
            for name, part in zip("qkv", value.chunk(3)):
                out[key.replace("in_proj_", f"{name}.")] = part
        else:
            out[key] = value
    return out
