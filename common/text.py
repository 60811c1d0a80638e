"""Captions as vectors for a policy: learnt with it, read from a file, or from an installed CLIP.

A source of text features is a function `text(captions) -> (b d)` float32 on its device; it never changes
while reinforcement learning goes on.
"""
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import InputError
from common.retrieval import TMREncoder


class TextEncoder(nn.Module):
    """Captions -> one vector each; learnt with a supervised model in place of CLIP, frozen afterwards."""

    def __init__(self, vocabulary, width, layers, heads):
        super().__init__()
        self.vocabulary = vocabulary
        self.words = nn.Embedding(len(vocabulary), width)
        self.encoder = TMREncoder(width, width, 4 * width, layers, heads)

    def forward(self, captions, word_drop=0.0, word_swap=0.0, g=None):
        """b captions -> (b c). In training g makes words unknown, or any other: a word as rare as its wrong
        uses leaves the model unsure, and where samples differ RL can choose."""
        ids, mask = self.vocabulary.encode(captions)
        ids[~mask.any(1), 0], mask[:, 0] = 1, True  # a caption without words reads as one unknown word
        if g is not None:
            ids = ids.masked_fill((torch.rand(ids.shape, generator=g) < word_drop) & mask, 1)
            other = torch.randint(1, len(self.vocabulary), ids.shape, generator=g)
            ids = torch.where((torch.rand(ids.shape, generator=g) < word_swap) & mask, other, ids)
        device = self.words.weight.device
        return self.encoder(self.words(ids.to(device)), mask.to(device))[:, 0]


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


def clip_features(device="cpu"):
    """Text features of an installed CLIP ViT-B/32, as T2M-GPT uses them -> text function, 512. The package is
    no requirement of this project; InputError if it is not there."""
    try:
        import clip
    except ImportError:
        raise InputError("--text-features: name a .npz of captions and vectors; CLIP is not "
                         "installed") from None
    model, _ = clip.load("ViT-B/32", device=device, jit=False)

    @torch.no_grad()
    def text(asked):
        return model.encode_text(clip.tokenize(asked, truncate=True).to(device)).float()
    return text, 512


def text_features(path, device="cpu"):
    """The text function of --text-features, and its width: a file, or CLIP where none is named."""
    return file_features(Path(path), device) if path else clip_features(device)
