"""Motion as tokens: raw features <-> patches of a few frames, in coordinates of their principal components.

Closed form and linear, so a diffusion over these coordinates is still diffusion over the features; it only
drops directions in which real patches hardly vary, and most of the cost of a small model with them. With
patch=1 and all components kept it is a mere rotation.
"""

import torch
from einops import rearrange
from torch import nn


class PatchCodec(nn.Module):
    """Features (b t d) <-> x (b n c), n = t / patch.

    `fit` makes it; its buffers travel with the model's weights.
    """

    def __init__(self, patch, feature_dim, dims):
        super().__init__()
        self.patch, self.dims = patch, dims
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))
        self.register_buffer("center", torch.zeros(patch * feature_dim))
        self.register_buffer("basis", torch.zeros(patch * feature_dim, dims))  # orthonormal columns
        self.register_buffer("scale", torch.ones(dims))

    def count(self, frames):
        """Tokens of a motion of so many frames."""
        return -(-frames // self.patch)

    def mask(self, lengths, tokens):
        """Lengths (b) in frames -> mask (b n), n = tokens, of those that are real."""
        return torch.arange(tokens, device=lengths.device) < (lengths // self.patch)[:, None]

    def encode(self, motion):
        """motion (b t d), raw -> x (b n c)"""
        patches = rearrange((motion - self.mean) / self.std, "b (n f) d -> b n (f d)", f=self.patch)
        return (patches - self.center) @ self.basis / self.scale

    def decode(self, x, lengths=None):
        """x (b n c) -> motion (b t d), raw; lengths: for codecs that need them"""
        patches = (x * self.scale) @ self.basis.T + self.center
        return rearrange(patches, "b n (f d) -> b (n f) d", f=self.patch) * self.std + self.mean

    def fit(self, clips, statistics, weights=None, whitening=1.0):
        """Take over normalisation and components of the clips' patches -> share of the variance kept.

        Computed in float64. statistics: of the model this belongs to (datasets.Statistics). weights (d): how
        much each feature counts among the others, 1 by default. whitening: 0 leaves the components their own
        scale, and then a loss or an input noise drowns the small ones, which hold the hands; 1 gives all of
        them variance 1, small ones included that a scorer had better not be sensitive to.
        """
        self.mean.copy_(torch.as_tensor(statistics.mean))
        self.std.copy_(torch.as_tensor(statistics.std) / (1.0 if weights is None else weights))
        patches = []
        for clip in clips:
            motion = torch.as_tensor(clip.features).to(self.mean)
            motion = motion[:len(motion) // self.patch * self.patch]
            patches.append(rearrange((motion - self.mean) / self.std, "(n f) d -> n (f d)", f=self.patch))
        patches = torch.cat(patches).double()
        center = patches.mean(0)
        covariance = (patches - center).T @ (patches - center) / len(patches)
        eigenvalues, vectors = torch.linalg.eigh(covariance)  # ascending
        kept = eigenvalues.flip(0)[: self.basis.shape[1]]
        self.center.copy_(center)
        self.basis.copy_(vectors.flip(1)[:, : len(kept)])
        scale = kept.clamp(min=1e-8 * kept[0]) ** (whitening / 2)
        self.scale.copy_(scale * (kept / scale.square()).mean().sqrt())  # variance 1 on average in any case
        return float(kept.sum() / eigenvalues.sum())
