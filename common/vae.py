"""A motion as a few latent tokens: the VAE of MLD (Chen et al. 2023, arXiv 2212.04048), and the skips between
the layers of its transformers.

    patches of a motion (b n p)  --encoder-->  mean, log variance (b k c)  --decoder-->  patches

A diffusion over the latents is smaller than one over the motion, has no padding, and cannot make what the
decoder has never seen: its reconstruction of real motion is the ceiling of everything sampled there.
Not in the paper: it reads patches of four frames in principal components (common/patches.py) instead of
frames, has several small latents instead of one of 256 numbers, sinusoidal positions and no dropout.
Letters: b batch, t frames, d features, n patches, p components of a patch, k latent tokens, c their width.
"""
import torch
import torch.nn.functional as F
from einops import repeat
from torch import nn

from common import (
    Attention, InputError, TransformerLayer, datasets, generator, padded, sinusoid)
from common.patches import LappedCodec, PatchCodec, make_patches
from common.training import cached, initialise, source_of, supervised


def gaussian_kl(mu_q, logvar_q, mu_p, logvar_p):
    """KL(q || p) of diagonal Gaussians, averaged over all elements."""
    ratio = logvar_q - logvar_p
    return 0.5 * (ratio.exp() + (mu_p - mu_q).square() / logvar_p.exp() - 1 - ratio).mean()


class Skips(nn.Module):
    """Layers joined like a U-Net's: each layer of the second half also reads what its mirror image in the
    first half wrote, the last layer the first [MLD, section 3.1]."""

    def __init__(self, layers, width):
        super().__init__()
        if len(layers) % 2 == 0:
            raise InputError(f"{len(layers)} layers: skips need an odd number")
        self.layers = nn.ModuleList(layers)
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(len(layers) // 2))

    def forward(self, x, *context):
        """x (b n w) and what else each layer reads: masks, text -> (b n w)"""
        kept, half = [], len(self.layers) // 2
        for number, layer in enumerate(self.layers):
            if number > half:
                x = self.skips[number - half - 1](torch.cat([x, kept.pop()], -1))
            x = layer(x, *context)
            if number < half:
                kept.append(x)
        return x


class MotionVAE(nn.Module):
    """Raw motion (b t d) <-> latents (b k c), each number with mean 0 and variance 1 over the training clips.
    Takes the place of a PatchCodec in a denoiser; `fit_vae` makes it."""

    def __init__(self, feature_dim, *, patch=4, patch_dims=64, width=64, heads=4, layers=3, tokens=8,
                 dims=32):
        super().__init__()
        self.patch, self.tokens, self.dims = patch, tokens, dims
        self.patches, ff = make_patches(patch, feature_dim, patch_dims), 2 * width
        self.queries = nn.Parameter(torch.zeros(2 * tokens, width))  # of means and log variances [MLD]
        self.project_in = nn.Linear(self.patches.dims, width)
        self.encoder = Skips([TransformerLayer(width, heads, ff) for _ in range(layers)], width)
        self.latent = nn.Linear(width, dims)
        self.memory = nn.Linear(dims, width)
        self.decoder = Skips([TransformerLayer(width, heads, ff, cross=True) for _ in range(layers)], width)
        self.project_out = nn.Linear(width, self.patches.dims)
        self.register_buffer("mean", torch.zeros(tokens, dims))
        self.register_buffer("std", torch.ones(tokens, dims))

    def posterior(self, x, mask):
        """Patches (b n p), mask (b n) -> mean and log variance (b k c) of the latents."""
        x = torch.cat([repeat(self.queries, "k w -> b k w", b=len(x)), self.project_in(x)], 1)
        x = x + sinusoid(x.shape[1], x.shape[2], x.device)
        x = self.encoder(x, F.pad(mask, (2 * self.tokens, 0), value=True))
        return self.latent(x[:, :2 * self.tokens]).chunk(2, 1)

    def reconstruct(self, z, mask):
        """Latents as `posterior` gives them (b k c), mask (b n) -> patches (b n p), zero on padding. The
        queries are positions alone [MLD]."""
        queries = sinusoid(mask.shape[1], self.memory.out_features, z.device)
        queries = repeat(queries, "n w -> b n w", b=len(z))
        return self.project_out(self.decoder(queries, mask, self.memory(z))) * mask[..., None]

    # -- what a denoiser needs of its codec --

    def count(self, frames):
        """Tokens of a motion: k, however long it is."""
        return self.tokens

    def mask(self, lengths, tokens):
        """Lengths (b) in frames -> mask (b k), all True: latents have no padding."""
        return torch.ones(len(lengths), self.tokens, dtype=torch.bool)

    def encode(self, motion, lengths=None):
        """Raw motion (b t d), lengths (b) in frames, by default all t -> standardised mean latents (b k c)"""
        frames = motion.shape[1] // self.patch * self.patch
        lengths = torch.full((len(motion),), frames) if lengths is None else lengths
        mask = self.patches.mask(lengths.to(motion.device), self.patches.count(frames))
        x = self.patches.encode(motion[:, :frames], lengths) * mask[..., None]
        return (self.posterior(x, mask)[0] - self.mean) / self.std

    def decode(self, z, lengths):
        """Standardised latents (b k c), lengths (b) in frames -> raw motion (b t d); differentiable"""
        lengths = lengths.to(z.device)
        mask = self.patches.mask(lengths, self.patches.count(int(lengths.max())))
        return self.patches.decode(self.reconstruct(z * self.std + self.mean, mask))


def train_vae(vae, clips, device, *, iterations, batch, lr, kl_weight, seed):
    """Learn to give the clips' patches back from sampled latents -> {"loss"}: smooth L1 + kl_weight KL [MLD].
    Afterwards the latents of the clips are standardised."""
    encoded = [vae.patches.encode(torch.from_numpy(clip.features)[None].to(device))[0] for clip in clips]

    def loss(iteration):
        g = generator(seed, iteration, "vae")
        x, mask = padded([encoded[k] for k in torch.randint(len(encoded), (batch,), generator=g).tolist()])
        mu, logvar = vae.posterior(x, mask)
        z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=g).to(device)
        error = F.smooth_l1_loss(vae.reconstruct(z, mask), x, reduction="none") * mask[..., None]
        kl = gaussian_kl(mu, logvar, torch.zeros_like(mu), torch.zeros_like(mu))
        return error.sum() / (mask.sum() * x.shape[-1]) + kl_weight * kl

    notes = supervised("VAE", vae.parameters(), loss, iterations=iterations, lr=lr)
    with torch.no_grad():
        parts = (padded(encoded[k:k + 256]) for k in range(0, len(encoded), 256))
        means = torch.cat([vae.posterior(*part)[0] for part in parts])
    vae.mean.copy_(means.mean(0))
    vae.std.copy_(means.std(0).clamp(min=1e-6))
    return notes


def fit_vae(vae, clips, weights, *, shaped_by, seed, device, cache_dir, use_cache, iterations, batch=64,
            lr=2e-3, kl_weight=1e-4):
    """Give the VAE its weights: trained on the clips, or cached -> notes. It is frozen afterwards. weights
    (d): how much each number of a frame counts in the patches. shaped_by: plain data that name the clips."""
    training = dict(iterations=iterations, batch=batch, lr=lr, kl_weight=kl_weight, seed=seed)
    initialise(vae.requires_grad_(True), generator(seed, 0, "initialise VAE"))

    def build():
        statistics = datasets.Statistics.from_clips(clips, role="generator")
        kept = vae.patches.fit(clips, statistics, weights)
        notes = train_vae(vae.to(device), clips, device, **training)
        return {"vae": vae.state_dict(), "variance_kept": kept, **notes}

    code = source_of(Skips, MotionVAE, PatchCodec, LappedCodec, make_patches, TransformerLayer, Attention,
                     train_vae, supervised)
    shape = {name: list(value.shape) for name, value in vae.state_dict().items()}
    key = [shaped_by, shape, vae.patch, weights.tolist(), training, code]
    stored = cached(cache_dir, key, build, "vae", use_cache)
    vae.load_state_dict(stored.pop("vae"))
    vae.to(device).eval().requires_grad_(False)
    print(f"  VAE: {vae.tokens} latents of {vae.dims}; loss {stored['loss']:.4f}")
    return {"vae": stored}


def reconstruction(vae, clips):
    """A sampler (common/evaluate.py) that gives the clips themselves, through the VAE: the ceiling."""
    @torch.no_grad()
    def sampler(captions, lengths, purpose, repeat):
        motion = datasets.collate(clips).motion.to(vae.mean.device)
        return vae.decode(vae.encode(motion, lengths), lengths).cpu(), lengths
    return sampler
