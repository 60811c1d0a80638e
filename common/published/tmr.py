"""TMR (Petrovich et al., ICCV 2023): its encoders, and their published weights."""
import torch
import torch.nn.functional as F
from einops import repeat
from torch import nn

from common import TransformerLayer, sinusoid


class TMREncoder(nn.Module):
    """Sequence (b n i) and mask (b n) -> (b 2 c): the mean and the log variance of a latent.

    Not in the paper: no dropout (.1 there), so that a network is one function, in training and in scoring.
    """

    def __init__(self, input_size, latent=256, ff=1024, layers=6, heads=4):
        super().__init__()
        self.projection = nn.Linear(input_size, latent)
        self.tokens = nn.Parameter(torch.zeros(2, latent))       # [mean, log variance], read out at the end
        self.layers = nn.ModuleList(TransformerLayer(latent, heads, ff) for _ in range(layers))

    def forward(self, x, mask):
        x = torch.cat([repeat(self.tokens, "two c -> b two c", b=len(x)), self.projection(x)], dim=1)
        x = x + sinusoid(x.shape[1], x.shape[2], x.device)       # the two tokens have positions 0 and 1
        mask = F.pad(mask, (2, 0), value=True)
        for layer in self.layers:
            x = layer(x, mask)
        return x[:, :2]


def unpack_attention(state):
    """Weights of nn.MultiheadAttention -> those of common.Attention: one in_proj becomes the plain linears q,
    k and v, which LoRA can reach by name. Other entries are kept."""
    out = {}
    for key, value in state.items():
        if "in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3)):
                out[key.replace("in_proj_", f"{name}.")] = part
        else:
            out[key] = value
    return out


def from_official_tmr(state):
    """Published TMR weights (official names) -> the names here."""
    return unpack_attention({key.removeprefix("seqTransEncoder.").removeprefix("seqTransDecoder."): value
                             for key, value in state.items()})
