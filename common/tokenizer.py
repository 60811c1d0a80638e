"""Motion <-> tokens: the VQ-VAE of T2M-GPT (Zhang et al. 2023, arXiv 2301.06052), its loss and its training.

Reinforcement learning never touches it, and two scripts use it: that is why it is not in them. Names of
layers follow the published weights, so those load as they are. Letters: b batch, t frames, d features, n
tokens, c width of a code, v codebook entries, r rows.
"""
import inspect

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from common import (
    InputError, NonFiniteError, datasets, features, generator, length_mask, patches, published,
    training)
from common.published import t2m_gpt
from common.retrieval import freeze

# ---- 1. The network ----------------------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """x + conv1x1(relu(dilated conv(relu(x)))), applied by `walk`."""

    def __init__(self, width, dilation):
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 1)


class Stack(nn.Module):
    """Layers in turn over x (b c t) with rows of different lengths (b) -> x, lengths."""

    def __init__(self, *layers):
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x, lengths):
        return walk(self.model, x, lengths)


def walk(layers, x, lengths):
    """What lies behind the end of a row is set to zero before each convolution that looks sideways, as the
    layer's own padding would be: a row gives the same in any batch. Zeroing the codes alone is not enough."""
    for layer in layers:
        inside = length_mask(lengths, x.shape[2])[:, None]  # b 1 t
        if isinstance(layer, nn.Sequential):
            x, lengths = walk(layer, x, lengths)
        elif isinstance(layer, Stack):
            x, lengths = layer(x, lengths)
        elif isinstance(layer, ResidualBlock):
            x = x + layer.conv2(F.relu(layer.conv1(F.relu(x) * inside)))
        elif isinstance(layer, nn.Conv1d):
            x, lengths = layer(x * inside), lengths // layer.stride[0]
        elif isinstance(layer, nn.Upsample):
            x, lengths = layer(x), 2 * lengths
        else:
            x = layer(x)
    return x, lengths


class VQVAE(nn.Module):
    """Motion <-> codes (T2M-GPT section 3.1). Raw features go in and come out; it owns its statistics.

    halvings: 2 for four frames a token as in T2M-GPT, 1 for two.
    """

    def __init__(self, feature_dim, width, code_dim, codes, halvings):
        super().__init__()
        self.halvings = halvings

        def conv(i, o):
            return nn.Conv1d(i, o, 3, padding=1)

        def residuals():
            return Stack(*(ResidualBlock(width, dilation) for dilation in (9, 3, 1)))  # in both directions

        down = (nn.Sequential(nn.Conv1d(width, width, 4, 2, 1), residuals()) for _ in range(halvings))
        up = (nn.Sequential(residuals(), nn.Upsample(scale_factor=2), conv(width, width))
              for _ in range(halvings))
        self.encoder = Stack(conv(feature_dim, width), nn.ReLU(), *down, conv(width, code_dim))
        self.decoder = Stack(conv(code_dim, width), nn.ReLU(), *up, conv(width, width), nn.ReLU(),
                             conv(width, feature_dim))
        self.quantizer = nn.Module()
        self.quantizer.register_buffer("codebook", torch.zeros(codes, code_dim))
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))

    def encode(self, x, lengths):
        """x (b t d) normalised, lengths (b) in frames -> latents (b n c), counts (b)"""
        latents, counts = self.encoder(rearrange(x, "b t d -> b d t"), lengths)
        return rearrange(latents, "b c n -> b n c"), counts

    def nearest(self, latents):
        """latents (... c) -> number of the nearest code (...), the first of equally near ones"""
        book = self.quantizer.codebook
        squares = latents.square().sum(-1, keepdim=True), book.square().sum(-1)
        return (squares[0] - 2 * latents @ book.T + squares[1]).argmin(-1)

    def reconstruct(self, latents, counts):
        """latents or codes' vectors (b n c) -> x (b t d) normalised, zero behind the ends"""
        x, lengths = self.decoder(rearrange(latents, "b n c -> b c n"), counts)
        return rearrange(x, "b d t -> b t d") * length_mask(lengths, x.shape[2])[..., None]

    def tokenise(self, motion, lengths):
        """motion (b t d) raw, lengths (b) -> codes (b n), counts (b)"""
        latents, counts = self.encode((motion - self.mean) / self.std, lengths)
        return self.nearest(latents), counts

    def decode(self, codes, counts):
        """codes (b n), any number behind the end, counts (b) -> motion (b t d) raw, lengths (b) in frames"""
        x = self.reconstruct(self.quantizer.codebook[codes * length_mask(counts, codes.shape[1])], counts)
        return x * self.std + self.mean, counts * 2**self.halvings


# ---- 2. Codebook, loss, training ---------------------------------------------------------------------------

class EMACodebook:
    """Running sums from which the codebook is made (T2M-GPT section 3.1): a code is the mean of the latents
    that chose it; one that hardly any chose is put where latents are."""

    def __init__(self, codebook, rows):
        self.codebook = codebook
        self.codebook.copy_(rows)
        self.sums, self.counts = rows.clone(), torch.ones_like(rows[:, 0])

    def update(self, latents, codes, fresh, mu=0.99):
        """latents (r c) with their codes (r), fresh (v c) for the dead -> how many are dead."""
        chosen = F.one_hot(codes, len(self.codebook)).to(latents.dtype)  # r v
        self.counts = mu * self.counts + (1 - mu) * chosen.sum(0)
        self.sums = mu * self.sums + (1 - mu) * chosen.T @ latents
        alive = (self.counts >= 1)[:, None]
        self.codebook.copy_(torch.where(alive, self.sums / self.counts[:, None], fresh))
        return int((~alive).sum())


def vq_loss_parts(x, recon, latents, codes, counts, positions):
    """Smooth L1 of all features, again of the positions alone (T2M-GPT calls it velocity), and how far the
    latents are from their codes; over real frames. x, recon (b t d), zero behind the ends; latents, codes
    (b n c); positions: slice of features -> three scalars"""
    frames = counts.sum() * (x.shape[1] // latents.shape[1])
    error = F.smooth_l1_loss(recon, x, reduction="none").sum((0, 1)) / frames  # d
    inside = length_mask(counts, latents.shape[1])
    return error.mean(), error[positions].mean(), (latents - codes.detach()).square()[inside].mean()


def vq_loss(features_error, positions_error, commitment):
    """T2M-GPT eq. (2) with eq. (3): its weights for HumanML3D."""
    return features_error + 0.5 * positions_error + 0.02 * commitment


def perplexity(codes, codebook_size):
    """How many codes are in even use: exp of the entropy of their shares. codes (r)"""
    share = torch.bincount(codes, minlength=codebook_size) / len(codes)
    return torch.exp(-(share * torch.log(share + 1e-7)).sum())


def train_tokenizer(vq, clips, skeleton, *, iterations, lr, batch, patch_weight, seed, device):
    """Learn codes for the clips -> {"loss", "dead", "perplexity"}, means of the last 50 updates: codes that
    were dead and replaced in an update, and how many are in even use."""
    count = sum(len(clip.features) // 4 for clip in clips)  # components of few patches would have no spread
    whitened = patches.PatchCodec(4, skeleton.feature_dim, min(64, max(1, count // 4))).to(device)
    statistics = datasets.Statistics.from_clips(clips, role="generator")
    whitened.fit(clips, statistics, features.block_weights(skeleton, features.PATCH_WEIGHTS))
    vq.mean.copy_(whitened.mean)
    vq.std.copy_(whitened.std)
    optimizer = torch.optim.AdamW(vq.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, iterations,
                                                    pct_start=max(0.05, 2 / max(iterations, 3)))
    codebook_size, positions = len(vq.quantizer.codebook), features.blocks(skeleton)["positions"]
    log, bar, book = [], tqdm(range(iterations), desc="tokenizer", mininterval=1.0), None
    for iteration in bar:
        g = generator(seed, iteration, "tokenizer")
        part = datasets.collate([clips[k] for k in torch.randint(len(clips), (batch,), generator=g)])
        x, lengths = part.motion.to(device), part.lengths.to(device)
        x = (x - vq.mean) / vq.std * part.mask.to(device)[..., None]
        latents, counts = vq.encode(x, lengths)
        inside = length_mask(counts, latents.shape[1])
        rows = latents.detach()[inside]
        fresh = rows[torch.randint(len(rows), (codebook_size,), generator=g).to(device)]
        book = book or EMACodebook(vq.quantizer.codebook, fresh)
        numbers = vq.nearest(latents)
        codes = vq.quantizer.codebook[numbers]
        recon = vq.reconstruct(latents + (codes - latents).detach(), counts)  # straight through
        loss = vq_loss(*vq_loss_parts(x, recon, latents, codes, counts, positions))
        # Not in the paper: the same error in whitened patches of four frames. Waves, claps and punches are
        # small and fast; by the features alone they cost so little that the codes forget them.
        error = rearrange(recon - x, "b (n f) d -> b n (f d)", f=4) @ whitened.basis / whitened.scale
        error = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none").mean(-1).sum()
        loss = loss + patch_weight * error * 4 / lengths.sum()
        if not torch.isfinite(loss):
            raise NonFiniteError(f"tokenizer: loss {loss.item()} at iteration {iteration}; huge values in "
                                 "the clips?")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        dead = book.update(rows, numbers[inside], fresh)  # after the output was made with the old codes
        log.append([loss.item(), dead, perplexity(numbers[inside], codebook_size).item()])
        bar.set_postfix(loss=f"{log[-1][0]:.3f}", dead=dead, perplexity=f"{log[-1][2]:.0f}", refresh=False)
    return dict(zip(("loss", "dead", "perplexity"), np.mean(log[-50:], 0).tolist()))


def reconstruction(vq, clips, device):
    """A sampler for common/reports.py: the clips themselves, through the tokenizer and back. What the codes
    alone lose."""
    @torch.no_grad()
    def sampler(captions, lengths, purpose, repeat):
        part = datasets.collate(clips)
        motion, _ = vq.decode(*vq.tokenise(part.motion.to(device), part.lengths.to(device)))
        return motion.cpu(), lengths
    return sampler


def build(dataset, *, codes, width, frames_per_token, iterations, batch, seed, cache_dir, use_cache, device,
          code_dim=32, lr=2e-3, patch_weight=2.0):
    """A tokenizer trained on the data set's train split, or its copy in the cache -> frozen VQVAE, notes.

    frames_per_token: 2 or 4; 0: 4 at 20 frames a second and 2 at 12.5. (T2M-GPT takes 4 for both; at KIT's
    rate that costs a fifth of the motions.) patch_weight: of the error in whitened patches.
    """
    skeleton, clips = dataset.skeleton, dataset.splits["train"]
    halvings = (frames_per_token or (4 if skeleton.fps > 15 else 2)) // 2
    vq = VQVAE(skeleton.feature_dim, width, code_dim, codes, halvings)
    training.initialise(vq, generator(seed, 0, "tokenizer"))

    def train():
        notes = train_tokenizer(vq.to(device), clips, skeleton, iterations=iterations, lr=lr, batch=batch,
                                patch_weight=patch_weight, seed=seed, device=device)
        return {"model": vq.state_dict(), **notes}

    parts = (VQVAE, walk, EMACodebook, vq_loss_parts, vq_loss, train_tokenizer, patches)
    code = [inspect.getsource(part) for part in parts]
    key = [dataset.fingerprint, code, features.PATCH_WEIGHTS, halvings, codes, code_dim, width, iterations,
           lr, batch, patch_weight, seed]
    stored = training.cached(cache_dir, key, train, "tokenizer", use_cache)
    vq.load_state_dict(stored.pop("model"))
    print("  tokenizer: " + ", ".join(f"{name} {value:.3g}" for name, value in stored.items()))
    return freeze(vq.to(device)), stored


def load_published(path, statistics, feature_dim, device):
    """The published tokenizer of a T2M-GPT checkpoint, with its own mean and std -> frozen VQVAE, notes."""
    state = published.read_state(path, "net")
    vq = VQVAE(**t2m_gpt.tokenizer_sizes(state, path))
    if len(vq.mean) != feature_dim:
        raise InputError(f"{path}: codes features of width {len(vq.mean)}, the data have {feature_dim}")
    published.load_strict(vq, state, path, free=("mean", "std"))
    for own, given in zip((vq.mean, vq.std), t2m_gpt.read_statistics(statistics, feature_dim)):
        own.copy_(given)
    return freeze(vq.to(device)), {"published": str(path)}
