"""T2M-GPT (Zhang et al. 2023, github.com/Mael-zys/T2M-GPT): sizes and statistics of its published weights."""
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from common import InputError
from common.published import size


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
