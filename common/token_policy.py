"""Tokenizer, text encoder and GPT as one policy: where reinforcement learning starts, how it is stored.

What is done to the policy is the scripts' subject.
"""
import copy
from typing import NamedTuple

import torch

from common import InputError, pretraining, published, tokenizer
from common.datasets import Vocabulary
from common.motion_gpt import MotionGPT
from common.published import t2m_gpt
from common.retrieval import freeze
from common.text import TextEncoder, text_features as text_source
from common.tokenizer import VQVAE

PUBLISHED_BLOCK = 51  # positions of T2M-GPT: the text and 50 tokens


class Policy(NamedTuple):
    """Everything that turns a caption into a motion."""
    vq: VQVAE
    text: object            # captions -> (b d), frozen
    gpt: MotionGPT
    reference: MotionGPT    # pi_ref: the supervised one, frozen; shares no weight with gpt
    shortest: int           # tokens of four frames, the least that has an embedding
    device: torch.device


def check(*, width, heads, vq_checkpoint, vq_statistics, gpt_checkpoint):
    """InputError for flags that cannot work together."""
    for wrong, message in (
            (width % heads or width % 2, "--width: even and a multiple of --heads"),
            (vq_checkpoint and not vq_statistics,
             "--vq-statistics: the folder of the tokenizer's own Mean.npy and Std.npy"),
            (gpt_checkpoint and not vq_checkpoint, "--gpt-checkpoint: needs its --vq-checkpoint")):
        if wrong:
            raise InputError(message)


def build(dataset, device, watch, *, vq_checkpoint, vq_statistics, gpt_checkpoint, text_features, codes,
          vq_width, frames_per_token, vq_iterations, width, heads, base_layers, head_layers, text_layers,
          gpt_iterations, gpt_lr, keep, word_drop, word_swap, batch, base_seed, cache_dir, cache):
    """Tokenizer, text encoder and supervised GPT: published, cached, or trained on the data set's train split
    -> Policy, notes. The keywords are the scripts' flags."""
    usual = dict(batch=batch, seed=base_seed, cache_dir=cache_dir, use_cache=cache, device=device)
    with watch.stage("tokenizer"):
        if vq_checkpoint:
            width_of_data = dataset.skeleton.feature_dim
            vq, notes = tokenizer.load_published(vq_checkpoint, vq_statistics, width_of_data, device)
        else:
            vq, notes = tokenizer.build(dataset, codes=codes, width=vq_width, iterations=vq_iterations,
                                        frames_per_token=frames_per_token, **usual)
    with watch.stage("supervised gpt"):
        if gpt_checkpoint:
            gpt, text, gpt_notes = published_gpt(gpt_checkpoint, text_features, vq, heads, device)
        else:
            sizes = dict(width=width, heads=heads, base_layers=base_layers, head_layers=head_layers,
                         text_layers=text_layers)
            gpt, text, gpt_notes = supervised_gpt(
                dataset, vq, sizes, iterations=gpt_iterations, lr=gpt_lr, keep=keep, word_drop=word_drop,
                word_swap=word_swap, **usual)
    policy = Policy(vq, text, gpt, copy.deepcopy(gpt), 4 // 2**vq.halvings, device)
    return policy, {"tokenizer": notes, "gpt": gpt_notes}


def supervised_gpt(dataset, vq, sizes, *, device, **training):
    """GPT and text encoder, trained on the data set's train split or from the cache -> both frozen, notes.
    sizes: width, heads and layers; training: arguments of pretraining.supervised."""
    clips, width, heads = dataset.splits["train"], sizes["width"], sizes["heads"]
    vocabulary = Vocabulary.from_captions([c for clip in clips for c in clip.captions])
    text = TextEncoder(vocabulary, width, sizes["text_layers"], heads).to(device)
    block = max(len(clip.features) for clip in clips) // 2**vq.halvings + 2  # the text, and the end
    gpt = MotionGPT(len(vq.quantizer.codebook), width, width, heads, sizes["base_layers"],
                    sizes["head_layers"], block).to(device)
    notes = pretraining.supervised(gpt, text, vq, clips, [dataset.fingerprint, list(sizes.values())],
                                   device=device, **training)
    return freeze(gpt), freeze(text), notes


def published_gpt(path, features, vq, heads, device):
    """The GPT of a T2M-GPT checkpoint, and its text features (see common/text.py) -> both, notes."""
    text, text_dim = text_source(features, device)
    stored = published.read_state(path, "trans")
    sizes = t2m_gpt.gpt_sizes(stored, path, heads, PUBLISHED_BLOCK)
    if (sizes["codes"], sizes["text_dim"]) != (len(vq.quantizer.codebook), text_dim):
        raise InputError(f"{path}: for {sizes['codes']} codes, {sizes['text_dim']} text features; here "
                         f"are {len(vq.quantizer.codebook)} and {text_dim}")
    gpt = MotionGPT(**sizes)
    published.load_strict(gpt, stored, path)
    return freeze(gpt.to(device)), text, {"published": path}


def state(policy):
    """What policy.pt holds of a policy: all networks, their sizes and words, as plain data."""
    own = isinstance(policy.text, TextEncoder)
    parts = {name: getattr(policy, name).state_dict() for name in ("vq", "gpt", "reference")}
    return parts | {"text": policy.text.state_dict() if own else {}, "heads": policy.gpt.heads,
                    "words": policy.text.vocabulary.words if own else [], "block_size": policy.gpt.block_size}


def load(stored, device, *, load, width, text_layers, heads, text_features):
    """The policy whose state() is in `stored`, read from the file `load` -> Policy, frozen; a published one
    needs its text features as well. The keywords are the scripts' flags. InputError for other sizes."""
    vq = VQVAE(**t2m_gpt.tokenizer_sizes(stored["vq"], load))
    sizes = t2m_gpt.gpt_sizes(stored["gpt"], load, stored["heads"], stored["block_size"])
    parts = {"vq": vq, "gpt": MotionGPT(**sizes), "reference": MotionGPT(**sizes)}
    if stored["words"]:
        parts["text"] = TextEncoder(Vocabulary(stored["words"]), width, text_layers, heads)
    for name, part in parts.items():
        published.load_strict(part, stored[name], load)
        freeze(part.to(device))
    text = parts.pop("text", None) or text_source(text_features, device)[0]
    return Policy(**parts, text=text, shortest=4 // 2**vq.halvings, device=device)
