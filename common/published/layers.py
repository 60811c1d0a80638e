"""What the published diffusion networks are made of: post-norm transformer layers of plain linears, how the
packed weights of their files become those, motion as normalised frames, and the text that they are given.

Every linear is called as a module, under the names of the scripts' own denoiser, so that LoRA reaches it:
nn.MultiheadAttention reads its packed weight and would pass an adapter by. No dropout: a rollout and its
update have to see the same function.

Letters: b batch, t frames, n and m tokens, w words, d features, c width, i text features, h heads.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import InputError, length_mask
from common.published import unpack_attention

HEADS = 4  # of MDM and MLD; a constant of their code that no weight tells
# Names in a file of torch's transformer layers, and the names here.
RENAMED = ((".out_proj.", ".out."), (".linear1.", ".up."), (".linear2.", ".down."))


class Attention(nn.Module):
    """Multi-head attention of x (b n c) to a memory (b m c): nn.MultiheadAttention in four linears."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, memory, mask=None):
        """mask (b m): True = may be looked at."""
        q, k, v = (rearrange(y, "b n (h c) -> b h n c", h=self.heads)
                   for y in (self.q(x), self.k(memory), self.v(memory)))
        mask = None if mask is None else mask[:, None, None, :]
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
                                  "b h n c -> b n (h c)"))


class Layer(nn.Module):
    """Post-norm layer, exact GELU: self-attention, with cross=True also attention to a memory."""

    def __init__(self, width, ff, heads=HEADS, cross=False):
        super().__init__()
        self.self_attn, self.norm1 = Attention(width, heads), nn.LayerNorm(width)
        self.up, self.down, self.norm2 = nn.Linear(width, ff), nn.Linear(ff, width), nn.LayerNorm(width)
        if cross:
            self.multihead_attn, self.norm3 = Attention(width, heads), nn.LayerNorm(width)

    def forward(self, x, mask=None, memory=None, memory_mask=None):
        x = self.norm1(x + self.self_attn(x, x, mask))
        if memory is None:
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = self.norm2(x + self.multihead_attn(x, memory, memory_mask))
        return self.norm3(x + self.down(F.gelu(self.up(x))))


def renamed(state, path, names):
    """A published state dict -> the names here; each in_proj becomes the linears q, k, v. names: pairs
    (there, here) besides those of torch's layers. InputError if two weights get one name."""
    out, count = {}, 0
    for key, value in state.items():
        for old, new in (*RENAMED, *names):
            key = key.replace(old, new)
        parts = unpack_attention({key: value})
        out, count = out | parts, count + len(parts)
    if len(out) < count:
        raise InputError(f"{path}: two of its weights have one place; is it a checkpoint of another kind?")
    return out


def take_statistics(codec, statistics, path):
    """Copy the mean and std of a datasets.Statistics of the role "generator" into a codec: those of the data
    folder's Mean.npy and Std.npy. InputError if they are of another width than the network."""
    mean, std = statistics.require("generator").mean, statistics.std
    if mean.shape != codec.mean.shape:
        raise InputError(f"{path}: a network for {len(codec.mean)} features, the data have {len(mean)}; use "
                         "the checkpoint of this data set")
    codec.mean.copy_(mean)
    codec.std.copy_(std)


class FrameCodec(nn.Module):
    """Raw motion (b t d) <-> normalised frames (b n d), n = t: a token is a frame.

    always: frames that are sampled of every motion, for a network that is not told its length (0: as many as
    the longest has). All of them count as real in the mask, because the network looks at all of them.
    """

    def __init__(self, feature_dim, always=0):
        super().__init__()
        self.dims, self.always = feature_dim, always
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))

    def count(self, frames):
        """Tokens of a motion of so many frames."""
        return max(frames, self.always)

    def mask(self, lengths, tokens):
        """Lengths (b) in frames -> mask (b n), n = tokens, of those that are real."""
        return length_mask(torch.full_like(lengths, tokens) if self.always else lengths, tokens)

    def encode(self, motion, lengths=None):
        """motion (b t d), raw -> x (b n d)"""
        return (motion - self.mean) / self.std

    def decode(self, x, lengths=None):
        """x (b n d) -> motion (b t d), raw; rows past a length are what the network made of them"""
        return x * self.std + self.mean


def read_text(texts, captions, width, device):
    """What a text function says of b captions -> text (b w i), text_mask (b w) on the device.

    texts(captions) gives vectors (b i), which are one token each, or token states (b w i) and their mask.
    InputError if they are not `width` wide.
    """
    found = texts(list(captions))
    text, mask = found if isinstance(found, tuple) else (found[:, None], torch.ones(len(found), 1).bool())
    if text.shape[-1] != width:
        raise InputError(f"--text-features: {text.shape[-1]} numbers a token, the network reads {width}; "
                         "make them with the text encoder of the checkpoint")
    return text.to(device), mask.to(device)
