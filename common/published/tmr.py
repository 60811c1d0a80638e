"""TMR (Petrovich et al., ICCV 2023): the parts of the published model that our small one leaves out.

The encoders are those of common/retrieval.py. Letters: b batch, t frames, d features, c latent.
"""
import math

import torch
import torch.nn.functional as F
from einops import repeat
from torch import nn

from common import TransformerLayer, sinusoid
from common.metrics import _double
from common.retrieval import info_nce
from common.vae import gaussian_kl


class TMRDecoder(nn.Module):
    """Latent (b c) and mask (b t) -> features (b t d), padded rows zero: learns what the latent must keep."""

    def __init__(self, output_size=263, latent=256, ff=1024, layers=6, heads=4):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(latent, heads, ff, cross=True) for _ in range(layers))
        self.final_layer = nn.Linear(latent, output_size)

    def forward(self, latent, mask):
        x = repeat(sinusoid(mask.shape[1], latent.shape[1], latent.device), "t c -> b t c", b=len(latent))
        for layer in self.layers:
            x = layer(x, mask, memory=latent[:, None])
        return self.final_layer(x) * mask[..., None]


def from_official_tmr(state):
    """Published TMR weights (official names) -> the names here: one in_proj becomes the linears q, k, v."""
    out = {}
    for key, value in state.items():
        key = key.removeprefix("seqTransEncoder.").removeprefix("seqTransDecoder.")
        if "in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3)):
                out[key.replace("in_proj_", f"{name}.")] = part
        else:
            out[key] = value
    return out


def tmr_losses(text_tokens, motion_tokens, decoder, motion, mask, sentences=None, temperature=0.1,
               threshold=0.8, weights=(1.0, 1e-5, 1e-5, 0.1), generator=None):
    """The four losses of TMR (eq. 1 to 4) and their weighted sum, as a dict.

    text_tokens, motion_tokens (b 2 c) from the encoders; motion (b t d) normalised, mask (b t); sentences (b
    e) unit vectors for the duplicate filter: pairs with cosine above 2 * threshold - 1 are dropped. With a
    generator the latents are sampled (training); without, they are the means.
    """
    (mu_t, var_t), (mu_m, var_m) = text_tokens.unbind(1), motion_tokens.unbind(1)
    latents = []
    for mu, logvar in ((mu_t, var_t), (mu_m, var_m)):
        noise = 0.0 if generator is None else torch.randn(mu.shape, generator=generator).to(mu)
        latents.append(mu + noise * (logvar / 2).exp())
    zero = torch.zeros_like(mu_t)
    out = {
        # Padded rows count in the mean, as in the published code: both sides are zero there.
        "recons": sum(F.smooth_l1_loss(decoder(z, mask), motion) for z in latents),
        "kl": gaussian_kl(mu_t, var_t, mu_m, var_m) + gaussian_kl(mu_m, var_m, mu_t, var_t)
        + gaussian_kl(mu_m, var_m, zero, zero) + gaussian_kl(mu_t, var_t, zero, zero),
        "latent": F.smooth_l1_loss(*latents),
        "contrastive": info_nce(*latents, temperature, None if sentences is None
                                else sentences @ sentences.T > 2 * threshold - 1)}
    return out | {"loss": sum(weight * out[key] for weight, key in zip(weights, tuple(out)))}


def tmr_score(text, motion):
    """Score in [0, 1] of all pairs (b b) from mean latents: cosine / 2 + 1/2."""
    return F.normalize(text, dim=-1) @ F.normalize(motion, dim=-1).T / 2 + 0.5


def retrieval_metrics(similarity, same=None):
    """R@1, 2, 3, 5, 10 in percent and the median rank, both directions, as the TMR code reports them.

    similarity (n n), row = text, column = motion. `same` (n n) bool: candidates that count as correct as well
    (TMR protocol b: captions with cosine above 2 * .95 - 1); the best ranked one is taken. Tied candidates
    share the average rank. Protocols c and d are this function on a subset or on pools. Keys: t2m_R01 ..
    m2t_MedR, len.
    """
    similarity = _double(similarity)
    own = torch.eye(len(similarity), dtype=torch.bool)
    correct = own if same is None else own | same
    out = {"len": float(len(similarity))}
    for name, distance, right in (("t2m", -similarity, correct), ("m2t", -similarity.T, correct)):
        best = distance.masked_fill(~right, math.inf).min(dim=1, keepdim=True).values
        rank = (distance < best).sum(1) + ((distance == best).sum(1) - 1) / 2
        for k in (1, 2, 3, 5, 10):
            out[f"{name}_R{k:02d}"] = 100 * (rank < k).double().mean().item()
        middle = rank.double().sort().values
        out[f"{name}_MedR"] = (middle[(len(rank) - 1) // 2] + middle[len(rank) // 2]).item() / 2 + 1
    return out
