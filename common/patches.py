"""Motion as tokens: raw features <-> patches of a few frames, in coordinates of their principal components.

Closed form and linear, so a diffusion over these coordinates is still diffusion over the features; it only
drops directions in which real patches hardly vary, and most of the cost of a small model with them. With
patch=1 and all components kept it is a mere rotation.
"""
import math

import torch
from einops import rearrange, repeat
from torch import nn

MOST = 4000            # clips whose components are taken; more would cost memory and change nothing
FRAME_COMPONENTS = 64  # see LappedCodec.components


class PatchCodec(nn.Module):
    """Features (b t d) <-> x (b n c), n = t / patch: each token is a patch of its own.

    `fit` makes it; its buffers travel with the model's weights.
    """
    width = 1  # patches that a token spans

    def __init__(self, patch, feature_dim, dims):
        super().__init__()
        self.patch, self.dims = patch, dims
        numbers = self.width * patch * feature_dim
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))
        self.register_buffer("center", torch.zeros(numbers))
        self.register_buffer("basis", torch.zeros(numbers, dims))  # orthonormal columns
        self.register_buffer("scale", torch.ones(dims))

    def count(self, frames):
        """Tokens of a motion of so many frames."""
        return -(-frames // self.patch) + self.width - 1

    def mask(self, lengths, tokens):
        """Lengths (b) in frames -> mask (b n), n = tokens, of those that are real."""
        real = lengths // self.patch + self.width - 1
        return torch.arange(tokens, device=lengths.device) < real[:, None]

    def segments(self, motion, lengths=None):
        """Normalised motion (b t d) -> what a token describes, (b n f*d)."""
        return rearrange(motion, "b (n f) d -> b n (f d)", f=self.patch)

    def joined(self, segments):
        """What segments (b n f*d) say together: normalised motion (b t d)."""
        return rearrange(segments, "b n (f d) -> b (n f) d", f=self.patch)

    def encode(self, motion, lengths=None):
        """motion (b t d), raw -> x (b n c); lengths (b) in frames, by default all t"""
        segments = self.segments((motion - self.mean) / self.std, lengths)
        return (segments - self.center) @ self.basis / self.scale

    def decode(self, x, lengths=None):
        """x (b n c) -> motion (b t d), raw; lengths: for codecs that need them"""
        return self.joined((x * self.scale) @ self.basis.T + self.center) * self.std + self.mean

    def fit(self, clips, statistics, weights=None, whitening=1.0):
        """Take over normalisation and components of the clips' patches -> share of the variance kept.

        Computed in float64. statistics: of the model this belongs to (datasets.Statistics). weights (d): how
        much each feature counts among the others, 1 by default. whitening: 0 leaves the components their own
        scale, and then a loss or an input noise drowns the small ones, which hold the hands; 1 gives all of
        them variance 1, small ones included that a scorer had better not be sensitive to.
        """
        self.mean.copy_(torch.as_tensor(statistics.mean))
        self.std.copy_(torch.as_tensor(statistics.std) / (1.0 if weights is None else weights))
        motions = []
        for clip in clips[::math.ceil(len(clips) / MOST)]:
            motion = torch.as_tensor(clip.features).to(self.mean)
            motion = motion[:len(motion) // self.patch * self.patch]
            motions.append((motion - self.mean) / self.std)
        center, basis, kept, total = self.components(motions, self.basis.shape[1])
        self.center.copy_(center)
        self.basis.copy_(basis)
        scale = kept.clamp(min=1e-8 * kept[0]) ** (whitening / 2)
        self.scale.copy_(scale * (kept / scale.square()).mean().sqrt())  # variance 1 on average in any case
        return float(kept.sum() / total)

    def components(self, motions, count):
        """Normalised motions (t d) -> center, basis and variances of their segments' `count` principal
        components, in float64, and the variance of all."""
        segments = torch.cat([self.segments(motion[None])[0] for motion in motions])
        return self.principal(segments.double(), count)

    @staticmethod
    def principal(rows, count):
        """rows (r n), which are changed -> their mean (n), the first `count` principal directions (n c),
        their variances (c), and the sum of all variances."""
        center = rows.mean(0)
        covariance = rows.sub_(center).T @ rows / len(rows)  # in place: rows may be half a gigabyte
        variances, directions = torch.linalg.eigh(covariance)  # ascending
        return center, directions.flip(1)[:, :count], variances.flip(0)[:count], variances.sum()


class LappedCodec(PatchCodec):
    """A PatchCodec whose tokens overlap: each spans `width` patches and is faded in and out. Both ends of a
    motion are continued by their outermost frame: n = t / patch + width - 1.

    Patches that are decoded apart do not meet at their seams, and a motion made of them hiccups five times a
    second. Here every frame is the sum of `width` tokens, as in the lapped transforms of audio coding
    (Princen & Bradley 1986): the squares of the sine window at the places of a frame sum to one, so nothing
    is lost if all components are kept.
    """

    width = 3

    def __init__(self, patch, feature_dim, dims):
        super().__init__(patch, feature_dim, dims)
        frames = self.width * patch
        window = torch.sin(math.pi * (torch.arange(frames) + 0.5) / frames) / math.sqrt(self.width / 2)
        self.register_buffer("window", repeat(window, "f -> (f d)", d=feature_dim))

    def segments(self, motion, lengths=None):
        """As in PatchCodec; lengths (b) in frames, by default all t."""
        if lengths is not None:  # what comes after the end of a motion is its last frame, too
            last = (lengths.to(motion.device) - 1)[:, None]
            at = torch.arange(motion.shape[1], device=motion.device).minimum(last)               # b t
            motion = motion.gather(1, repeat(at, "b t -> b t d", d=motion.shape[2]))
        patches = rearrange(motion, "b (n f) d -> b n (f d)", f=self.patch)
        first, last = (repeat(motion[:, end], "b d -> b k (f d)", k=self.width - 1, f=self.patch)
                       for end in (0, -1))
        patches, n = torch.cat([first, patches, last], 1), patches.shape[1] + self.width - 1
        return torch.cat([patches[:, k:k + n] for k in range(self.width)], -1) * self.window

    def joined(self, segments):
        """As in PatchCodec."""
        parts, n = (segments * self.window).chunk(self.width, -1), segments.shape[1] - self.width + 1
        # Part k of a token is the same patch as part k - 1 of the next one.
        patches = sum(part[:, self.width - 1 - k:][:, :n] for k, part in enumerate(parts))
        return rearrange(patches, "b n (f d) -> b (n f) d", f=self.patch)

    def components(self, motions, count):
        """As in PatchCodec, within the space of the components of single frames."""
        # The covariance of whole segments (3156 numbers of three patches) would take a minute.
        few = min(len(self.mean), max(FRAME_COMPONENTS, count // (self.width * self.patch)))
        of_frames = self.principal(torch.cat(motions).double(), few)[1]                               # d k
        n = sum(len(motion) // self.patch + self.width - 1 for motion in motions)
        center = sum(self.segments(motion[None])[0].double().sum(0) for motion in motions) / n   # f*d
        reduced, total = [], 0.0
        for motion in motions:
            segments = self.segments(motion[None])[0].double() - center
            total += float(segments.square().sum()) / n
            segments = rearrange(segments, "n (f d) -> n f d", d=len(self.mean)) @ of_frames
            reduced.append(rearrange(segments, "n f k -> n (f k)"))
        _, directions, kept, _ = self.principal(torch.cat(reduced), count)
        directions = rearrange(directions, "(f k) c -> f k c", k=few)
        return center, rearrange(of_frames @ directions, "f d c -> (f d) c"), kept, total


def make_patches(patch, feature_dim, dims):
    """The codec of a generator: single frames or lapped patches. dims: components kept, 0 for all."""
    kind = LappedCodec if patch > 1 else PatchCodec
    return kind(patch, feature_dim, dims or kind.width * patch * feature_dim)
