"""The GPT of T2M-GPT (Zhang et al. 2023, arXiv 2301.06052): motion tokens after a text, with a cache.

Two papers take it as their policy and change nothing in it: that is why it is not in their scripts. Names of
layers follow the published weights. Letters: b batch, n tokens, c width, h heads, d text features, v actions.
"""
import math

import torch
from einops import rearrange
from torch import nn

from common import sinusoid


class CausalAttention(nn.Module):
    """Each position looks at itself and back. With a cache (keys, values: b h n_max c) x is what follows
    position `start`, and what came before is read from the cache."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, cache=None, start=0):
        q, k, v = (rearrange(f(x), "b n (h c) -> b h n c", h=self.heads)
                   for f in (self.query, self.key, self.value))
        if cache is not None:
            for kept, new in zip(cache, (k, v)):
                kept[:, :, start:start + x.shape[1]] = new
            k, v = (kept[:, :, :start + x.shape[1]] for kept in cache)
        n, m = q.shape[2], k.shape[2]
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # b h n m
        if n > 1:
            later = torch.ones(n, m, dtype=torch.bool, device=x.device).triu(m - n + 1)
            scores = scores.masked_fill(later, -math.inf)
        return self.proj(rearrange(scores.softmax(-1) @ v, "b h n c -> b n (h c)"))


class Block(nn.Module):
    """Pre-norm transformer block. No dropout: the first ratio of PPO must be one."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln1(x), cache, start)
        return x + self.mlp(self.ln2(x))


class MotionGPT(nn.Module):
    """p(next token | text, tokens so far), T2M-GPT section 3.2: the text is the first position."""

    def __init__(self, codes, text_dim, width, heads, base_layers, head_layers, block_size):
        super().__init__()
        self.codes, self.end, self.pad = codes, codes, codes + 1
        self.heads, self.block_size = heads, block_size
        self.trans_base = nn.ModuleDict({
            "tok_emb": nn.Embedding(codes + 2, width), "cond_emb": nn.Linear(text_dim, width),
            "blocks": nn.ModuleList(Block(width, heads) for _ in range(base_layers))})
        self.trans_head = nn.ModuleDict({
            "blocks": nn.ModuleList(Block(width, heads) for _ in range(head_layers)),
            "ln_f": nn.LayerNorm(width),
            "head": nn.Linear(width, codes + 1, bias=False)})  # padding is no action
        self.register_buffer("positions", sinusoid(block_size, width), persistent=False)

    def forward(self, tokens, text):
        """tokens (b n), text (b d) -> logits (b n+1 v), hidden (b n+1 c): of the layers before the head"""
        x = torch.cat([self.trans_base["cond_emb"](text)[:, None], self.trans_base["tok_emb"](tokens)], 1)
        return self.run(x + self.positions[: x.shape[1]])

    def run(self, x, caches=None, start=0):
        """Embedded positions (b n c) from `start` on -> logits (b n v), hidden (b n c)"""
        base, head = self.trans_base["blocks"], self.trans_head["blocks"]
        caches = caches or [None] * (len(base) + len(head))
        for block, cache in zip(base, caches):
            x = block(x, cache, start)
        hidden = x
        for block, cache in zip(head, caches[len(base):]):
            x = block(x, cache, start)
        return self.trans_head["head"](self.trans_head["ln_f"](x)), hidden

    def empty_cache(self, b):
        """Keys and values of every block for b sequences, to be filled."""
        shape = (b, self.heads, self.block_size, self.positions.shape[1] // self.heads)
        blocks = len(self.trans_base["blocks"]) + len(self.trans_head["blocks"])
        return [tuple(self.positions.new_zeros(shape) for _ in "kv") for _ in range(blocks)]
