"""T2M-GPT (Zhang et al. 2023, github.com/Mael-zys/T2M-GPT): published tokenizer and GPT, and their text.

A source of text features is a function text(captions) -> (b d), float32 on its device.
"""
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import InputError, freeze
from common.published import load_strict, read_state, size
from common.runs import RunArgs, arg, refuse
from common.tokenizer import VQVAE, TextEncoder, fit_gpt, fit_tokenizer

PUBLISHED_BLOCK = 51  # positions of its GPT: the text and 50 tokens


@dataclass
class WeightArgs(RunArgs):
    """The flags of a script whose tokenizer and GPT may be published ones."""
    vq_checkpoint: str = arg("", "published tokenizer of T2M-GPT (.pth)", group="published weights")
    vq_statistics: str = arg("", "folder of the Mean.npy and Std.npy that it was trained with")
    gpt_checkpoint: str = arg("", "published GPT of T2M-GPT (.pth)")
    text_features: str = arg("", ".npz of captions (n) and vectors (n d) for it; empty: CLIP")


def check_weights(args):
    """InputError for flags that cannot work together, and for a file that cannot be used: each is read here
    once, before anything is trained. With --load the weights are those of the finished run."""
    refuse((args.vq_checkpoint and not args.vq_statistics,
            "--vq-statistics: the folder of the tokenizer's own Mean.npy and Std.npy"),
           (args.gpt_checkpoint and not args.vq_checkpoint, "--vq-checkpoint: name the tokenizer of the GPT"))
    if args.load:
        return
    if args.vq_checkpoint:
        with torch.random.fork_rng(devices=[]):
            vq, _ = load_tokenizer(args.vq_checkpoint, args.vq_statistics, None, "cpu")
    text_dim = file_features(args.text_features)[1] if args.text_features else None
    if args.gpt_checkpoint:
        text_dim = text_dim or (import_clip() and 512)
        gpt_state(args.gpt_checkpoint, text_dim, vq, heads=1)  # the heads asked for are not known yet


def tokenizer_sizes(state, path):
    """The arguments of tokenizer.VQVAE that fit the weights."""
    levels = {key.split(".")[2] for key in state if re.match(r"encoder\.model\.\d+\.0\.weight", key)}
    return dict(feature_dim=size(state, path, "encoder.model.0.weight", 1),
                width=size(state, path, "encoder.model.0.weight"), halvings=len(levels),
                code_dim=size(state, path, "quantizer.codebook", 1),
                codes=size(state, path, "quantizer.codebook"))


def gpt_sizes(state, path, heads, block_size):
    """The arguments of the GPT that fit the weights. The files do not tell the heads: the published width of
    1024 has 16, another width those asked for."""
    def layers(part):
        return len({key.split(".")[2] for key in state if key.startswith(f"{part}.blocks.")})
    width = size(state, path, "trans_base.cond_emb.weight")
    heads = 16 if width == 1024 else heads
    if width % heads:
        raise InputError(f"{path}: a width of {width} does not split into {heads} heads; the published GPT "
                         "has a width of 1024")
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


def load_tokenizer(path, statistics, feature_dim, device):
    """The tokenizer of a checkpoint, with its own mean and std -> frozen VQVAE, notes. feature_dim: that of
    the data; None: whatever it has."""
    state = read_state(path, "net")
    vq = VQVAE(**tokenizer_sizes(state, path))
    if len(vq.mean) != (feature_dim or len(vq.mean)):
        raise InputError(f"{path}: codes features of width {len(vq.mean)}, the data have {feature_dim}")
    load_strict(vq, state, path, free=("mean", "std"))
    for own, given in zip((vq.mean, vq.std), read_statistics(statistics, len(vq.mean))):
        own.copy_(given)
    return freeze(vq.to(device)), {"published": str(path)}


def file_features(path, device="cpu"):
    """Text features from a .npz with `captions` (n) strings and `vectors` (n d) -> text function, d.

    InputError for a file that is not one, and, when called, for a caption that it does not hold.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            captions = np.atleast_1d(file["captions"]).tolist()
            vectors = torch.from_numpy(np.atleast_1d(np.float32(file["vectors"])))
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: needs arrays captions (n strings), vectors (n d): {error}") from error
    if vectors.ndim != 2 or len(captions) != len(vectors) or not torch.isfinite(vectors).all():
        raise InputError(f"{path}: {len(captions)} captions, vectors {tuple(vectors.shape)}; give each a "
                         "finite vector")
    rows = {caption: k for k, caption in enumerate(captions)}

    def text(asked):
        missing = [caption for caption in asked if caption not in rows]
        if missing:
            raise InputError(f"{path}: holds no vector for {missing[0]!r}; add it, or install CLIP")
        return vectors[[rows[caption] for caption in asked]].to(device)
    return text, vectors.shape[1]


def import_clip():
    """The package of CLIP, or InputError."""
    try:
        import clip
    except ImportError:
        raise InputError("--text-features: name a .npz of captions and vectors; CLIP is not "
                         "installed") from None
    return clip


def clip_features(device="cpu"):
    """Text features of an installed CLIP ViT-B/32, as T2M-GPT uses them -> text function, 512.

    The package is no requirement of this project; InputError if it is not there.
    """
    clip = import_clip()
    model, _ = clip.load("ViT-B/32", device=device, jit=False)

    @torch.no_grad()
    def text(asked):
        return model.encode_text(clip.tokenize(asked, truncate=True).to(device)).float()
    return text, 512


def text_features(path, device="cpu"):
    """The text function of a file, or of CLIP where none is named, and its width."""
    return file_features(path, device) if path else clip_features(device)


def gpt_state(path, text_dim, vq, heads):
    """State dict and sizes of a published GPT; InputError if it is not for the codes of vq and such text."""
    state = read_state(path, "trans")
    sizes, codes = gpt_sizes(state, path, heads, PUBLISHED_BLOCK), len(vq.quantizer.codebook)
    if (sizes["codes"], sizes["text_dim"]) != (codes, text_dim):
        raise InputError(f"{path}: for {sizes['codes']} codes, {sizes['text_dim']} text features; here are "
                         f"{codes} and {text_dim}")
    return state, sizes


def load_gpt(make_gpt, path, text, vq, heads, device):
    """The GPT of a checkpoint, for the codes of vq -> frozen GPT, text function, notes.

    text: the text function and its width, see text_features. make_gpt: see tokenizer.fit_gpt; heads: of a
    width that is not the published one.
    """
    text, text_dim = text
    state, sizes = gpt_state(path, text_dim, vq, heads)
    gpt = make_gpt(**sizes)
    gpt.sizes = sizes
    load_strict(gpt, state, path)
    return freeze(gpt.to(device)), text, {"published": str(path)}


def fit_or_load(args, make_gpt, parts, data, size, *, device, **options):
    """What the token scripts start from -> tokenizer, text function, GPT, all frozen, and notes on them.

    args: WeightArgs. A tokenizer or GPT that they do not name is trained, or read from the cache (see
    tokenizer.fit_gpt).
    """
    if args.vq_checkpoint:
        vq, notes = load_tokenizer(args.vq_checkpoint, args.vq_statistics, data.skeleton.feature_dim, device)
    else:
        vq, notes = fit_tokenizer(data, size, device=device, **options)
    if args.gpt_checkpoint:
        text = text_features(args.text_features, device)
        gpt, text, more = load_gpt(make_gpt, args.gpt_checkpoint, text, vq, size.heads, device)
    else:
        gpt, text, more = fit_gpt(make_gpt, parts, vq, data, size, device=device, **options)
    return vq, text, gpt, {"tokenizer": notes, "gpt": more}


def export(part):
    """Sizes and weights of a network as plain data, for a checkpoint; {} of anything else."""
    return {"sizes": part.sizes, "weights": part.state_dict()} if isinstance(part, nn.Module) else {}


def restore(kind, stored, device):
    """The network of class `kind` that `export` has stored, frozen; InputError if its sizes are not those of
    its weights."""
    try:
        part = kind(**stored["sizes"])
        part.load_state_dict(stored["weights"])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"--load: sizes and weights of its {kind.__name__} contradict each other; name the "
                         "policy.pt that the run wrote") from error
    part.sizes = stored["sizes"]
    return freeze(part.to(device))


def networks(policy):
    """What policy.pt holds of a policy (a NamedTuple), as plain data: networks with their sizes, tensors."""
    return {name: part if part is None or torch.is_tensor(part) else export(part)
            for name, part in policy._asdict().items()}


def load_networks(make_gpt, stored, features, device):
    """What `networks` has stored -> {"vq", "text", "gpt", "reference"}, frozen, and tensors.

    features: path of text features, for a published GPT, which has no text encoder of its own.
    """
    kinds = {"vq": VQVAE, "text": TextEncoder, "gpt": make_gpt, "reference": make_gpt}
    found = {name: restore(kind, stored[name], device) for name, kind in kinds.items() if stored[name]}
    if not stored["text"]:
        found["text"], _ = text_features(features, device)
    return found | {name: part.to(device) for name, part in stored.items() if torch.is_tensor(part)}
