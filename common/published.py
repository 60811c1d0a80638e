"""Published weights of T2M-GPT (github.com/Mael-zys/T2M-GPT) and MotionCritic
(github.com/ou524u/MotionCritic): read without executing anything, loaded strictly.
"""
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from common.runs import InputError

# in the files, but no weights: causal masks, an embedding that is never used, the table of positions
NO_WEIGHTS = re.compile(r"attn\.mask$|pos_embedding\.weight$|pos_embed\.embed$")


def read_state(path, name, bare=False):
    """The state dict under `name` of a checkpoint file: "net" for the tokenizer, "trans" for the GPT,
    "model_state_dict" for MotionCritic. bare: the file may also be the state dict itself."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; correct the path of the checkpoint") from None
    except Exception as error:  # a damaged zip or a forbidden pickle fails in a dozen ways
        raise InputError(f"{path}: does not load with weights_only=True ({type(error).__name__}); save its "
                         "state dict again as plain tensors") from error
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


def tokenizer_sizes(state, path):
    """The arguments of tokenizer.VQVAE that fit the weights."""
    levels = {key.split(".")[2] for key in state if re.match(r"encoder\.model\.\d+\.0\.weight", key)}
    return dict(feature_dim=size(state, path, "encoder.model.0.weight", 1),
                width=size(state, path, "encoder.model.0.weight"), halvings=len(levels),
                code_dim=size(state, path, "quantizer.codebook", 1),
                codes=size(state, path, "quantizer.codebook"))


def gpt_sizes(state, path, heads, block_size):
    """The arguments of motion_gpt.MotionGPT that fit the weights. The files do not tell the heads: the
    published width of 1024 has 16, another width those asked for."""
    def layers(part):
        return len({key.split(".")[2] for key in state if key.startswith(f"{part}.blocks.")})
    width = size(state, path, "trans_base.cond_emb.weight")
    heads = 16 if width == 1024 else heads
    if width % heads:
        raise InputError(f"{path}: a width of {width} does not split into {heads} heads; correct --heads")
    return dict(codes=size(state, path, "trans_head.head.weight") - 1, heads=heads, block_size=block_size,
                text_dim=size(state, path, "trans_base.cond_emb.weight", 1), width=width,
                base_layers=layers("trans_base"), head_layers=layers("trans_head"))


def critic_sizes(state, path, heads):
    """The arguments of motion_critic.MotionCritic that fit the weights. The file does not tell the heads: the
    published model has 8."""
    def of(key, axis=0):
        return size(state, path, key, axis)
    width = of("dstran.joints_embed.weight")
    if width % heads:
        raise InputError(f"{path}: a width of {width} does not split into {heads} heads")
    return dict(inputs=of("dstran.joints_embed.weight", 1), joints=of("dstran.pos_embed", 1), width=width,
                rep=of("dstran.pre_logits.fc.weight"), heads=heads, score_hidden=of("mlp.fc1.weight"),
                hidden=of("dstran.blocks_st.0.mlp_s.fc1.weight"), maxlen=of("dstran.temp_embed", 1),
                depth=len({key.split(".")[2] for key in state if key.startswith("dstran.blocks_st.")}))


def read_statistics(folder, feature_dim):
    """mean, std (d) that a published tokenizer was trained with, from Mean.npy and Std.npy (any case)."""
    found = []
    for name in ("mean.npy", "std.npy"):
        path = next((p for p in sorted(Path(folder).glob("*.npy")) if p.name.lower() == name), None)
        try:
            array = None if path is None else np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile):
            array = None
        sound = isinstance(array, np.ndarray) and array.shape == (feature_dim,) and array.dtype.kind in "fiu"
        if not sound or not np.isfinite(array).all() or (name == "std.npy" and (array <= 0).any()):
            raise InputError(f"{folder}: needs {name} of the tokenizer, {feature_dim} finite numbers")
        found.append(torch.from_numpy(np.float32(array)))
    return found
