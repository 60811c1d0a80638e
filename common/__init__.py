"""What every room of the house uses: its two errors, its random numbers, masks and one attention layer.

Letters: b batch, t frames, n tokens, c width, h heads.
"""
import math
import zlib

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils.rnn import pad_sequence

class InputError(ValueError):
    """The user's mistake. The message is one line that names the file or flag and the fix; scripts exit 2."""


class NonFiniteError(RuntimeError):
    """A loss, gradient or reward is NaN or infinite; scripts exit 3 without touching the last checkpoint."""


def mix(*ints):
    """Mix integers into one 63-bit seed (splitmix64 finaliser, Steele et al. 2014); their order matters.

    Python's hash() is salted per process, so it would make a resumed run differ.
    """
    state = 0
    for value in ints:
        state = (state + 0x9E3779B97F4A7C15 + (int(value) & MASK64)) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state >> 1


def generator(seed, iteration, purpose, index=0, device="cpu"):
    """A fresh torch.Generator that depends on its arguments only; `purpose` is a fixed name such as "noise".

    Nothing depends on what was drawn before, so a resumed run, or one that is split over processes, sees the
    same numbers without any stored generator state.
    """
    number = mix(seed, iteration, zlib.crc32(purpose.encode()), index)
    return torch.Generator(device=device).manual_seed(number)


MASK64 = (1 << 64) - 1


def normal(shape, seed, iteration, purpose, numbers):
    """Standard normal numbers (b *shape), each row from a stream of its own that its number names."""
    streams = (generator(seed, iteration, purpose, number) for number in numbers)
    return torch.stack([torch.randn(shape, generator=g) for g in streams])


def uniforms(n, seed, iteration, purpose, numbers):
    """Uniform numbers (b n) in [0, 1), each row from a stream of its own that its number names."""
    streams = (generator(seed, iteration, purpose, number) for number in numbers)
    return torch.stack([torch.rand(n, generator=g) for g in streams])


def pick(logits, uniform):
    """Inverse transform sampling: logits (b v), uniform (b) in [0, 1) -> choice (b)"""
    cumulative = logits.double().softmax(-1).cumsum(-1)  # b v
    return (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(-1)


def length_mask(lengths, t):
    """lengths (b) -> mask (b t), True = real frame."""
    return torch.arange(t, device=lengths.device) < lengths[:, None]


def padded(rows):
    """Rows (n c), a list of b -> (b n c), zeros behind their ends, and mask (b n)."""
    counts = torch.tensor([len(row) for row in rows], device=rows[0].device)
    x = pad_sequence(rows, batch_first=True)
    return x, length_mask(counts, x.shape[1])


def masked(motion, lengths):
    """motion (b t d) with every row past its length set to zero, even if it holds NaN."""
    return motion.masked_fill(~length_mask(lengths, motion.shape[1])[..., None], 0.0)


def sinusoid(n, width, device=None):
    """Sinusoidal positions (n width): sine in the even columns, cosine in the odd ones."""
    angle = torch.arange(n, device=device)[:, None] * torch.exp(
        torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(n, width)


def freeze(model):
    """Eval mode, no gradients into the weights (gradients to the input still flow). Returns the model."""
    return model.eval().requires_grad_(False)


class Attention(nn.Module):
    """Multi-head attention of x (b n c) to a memory (b m c); self-attention when they are the same."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, memory, mask=None):
        """mask (b m): True = may be looked at."""
        q, k, v = (rearrange(part, "b n (h c) -> b h n c", h=self.heads)
                   for part in (self.q(x), self.k(memory), self.v(memory)))
        scores = q @ k.mT / math.sqrt(q.shape[-1])                                      # b h n m
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
        return self.out_proj(rearrange(scores.softmax(-1) @ v, "b h n c -> b n (h c)"))


class TransformerLayer(nn.Module):
    """Post-norm layer; with cross=True a decoder layer that also looks at a memory."""

    def __init__(self, width, heads, ff, cross=False):
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, ff), nn.Linear(ff, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if cross:
            self.multihead_attn, self.norm3 = Attention(width, heads), nn.LayerNorm(width)

    def forward(self, x, mask, memory=None):
        x = self.norm1(x + self.self_attn(x, x, mask))
        if memory is not None:
            x = self.norm2(x + self.multihead_attn(x, memory))
        last = self.norm2 if memory is None else self.norm3
        return last(x + self.linear2(F.gelu(self.linear1(x))))
