"""MLD (Chen et al., CVPR 2023; github.com/ChenFengYe/motion-latent-diffusion): the published VAE and the
denoiser of its latents, with the interface of the scripts' own networks.

    raw motion (b t d)  <--MLDVAE-->  latent (b 1 c)  <--MLD-->  noise        c = 256 in the published file

The denoiser reads three tokens, the latent, the timestep and the text, and answers with the noise; DDIM with
leading spacing, 50 steps, guidance 7.5. Its condition without text is the text encoder's vector of the empty
caption, not zeros. Text is one vector of CLIP ViT-L/14 (768), motion is normalised with the data folder's
Mean.npy and Std.npy, latents are not scaled.
Not in the paper: `MLDVAE.encode` gives the mean of a latent, where its training takes a sample.
Not here: decoders with the text as memory, latents of several tokens; each is refused.

Letters: b batch, t frames, n tokens, d features, c width, i text features.
"""
import math
import re

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from common import InputError, freeze, length_mask, samplers
from common.published import layers, load_strict, read_state, size

STEPS = 50  # of its sampler
# Of the networks that scored it, and a table that the published architecture does not use.
UNUSED = re.compile(r"t2m_(text|motion|move)encoder\.|denoiser\.mem_pos\.pe$")
NAMES = (("denoiser.encoder.", "layers."), ("denoiser.", ""), ("vae.", "codec."),
         ("time_embedding.linear_1.", "time.0."), ("time_embedding.linear_2.", "time.2."))  # there, and here


class Positions(nn.Module):
    """Learned positions: n -> (n c)."""

    def __init__(self, longest, width):
        super().__init__()
        self.pe = nn.Parameter(torch.zeros(longest, 1, width))

    def forward(self, n):
        if n > len(self.pe):
            raise InputError(f"a motion of {n} tokens: the published network has {len(self.pe)} positions; "
                             "make it shorter")
        return self.pe[:n, 0]


class SkipTransformer(nn.Module):
    """Layers joined like a U-Net's [MLD, section 3.1], as in common.vae.Skips, and a norm after the last."""

    def __init__(self, width, ff, depth, cross=False):
        super().__init__()
        self.middle_block = layers.Layer(width, ff, cross=cross)
        self.input_blocks, self.output_blocks = (
            nn.ModuleList(layers.Layer(width, ff, cross=cross) for _ in range(depth // 2)) for _ in range(2))
        self.linear_blocks = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)

    def forward(self, x, *context):
        """x (b n c) and what else each layer reads: masks, a memory -> (b n c)"""
        kept = []
        for block in self.input_blocks:
            x = block(x, *context)
            kept.append(x)
        x = self.middle_block(x, *context)
        for joint, block in zip(self.linear_blocks, self.output_blocks):
            x = block(joint(torch.cat([x, kept.pop()], -1)), *context)
        return self.norm(x)


class MLDVAE(nn.Module):
    """Raw motion (b t d) <-> one latent (b 1 c)."""

    def __init__(self, feature_dim, width, ff, depth, longest):
        super().__init__()
        self.dims = width
        self.global_motion_token = nn.Parameter(torch.zeros(2, width))  # of the mean and the log variance
        self.query_pos_encoder = Positions(longest, width)
        self.query_pos_decoder = Positions(longest, width)
        self.encoder = SkipTransformer(width, ff, depth)
        self.decoder = SkipTransformer(width, ff, depth, cross=True)
        self.skel_embedding, self.final_layer = nn.Linear(feature_dim, width), nn.Linear(width, feature_dim)
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))

    def posterior(self, x, mask):
        """Normalised frames (b t d), mask (b t) -> mean and log variance (b 1 c) of the latent."""
        tokens = repeat(self.global_motion_token, "two c -> b two c", b=len(x))
        x = torch.cat([tokens, self.skel_embedding(x)], 1)
        x = self.encoder(x + self.query_pos_encoder(x.shape[1]), F.pad(mask, (2, 0), value=True))
        return x[:, :1], x[:, 1:2]

    def reconstruct(self, z, mask):
        """Latents (b 1 c), mask (b t) -> normalised frames (b t d), zero on padding. The queries are
        positions alone; with one latent a layer reads the same from it for every frame."""
        queries = repeat(self.query_pos_decoder(mask.shape[1]), "t c -> b t c", b=len(z))
        return self.final_layer(self.decoder(queries, mask, z)) * mask[..., None]

    # -- what a denoiser needs of its codec --

    def count(self, frames):
        """Tokens of a motion: one, however long it is."""
        return 1

    def mask(self, lengths, tokens):
        """Lengths (b) in frames -> mask (b 1), all True: latents have no padding."""
        return torch.ones(len(lengths), 1, dtype=torch.bool, device=lengths.device)

    def encode(self, motion, lengths=None):
        """Raw motion (b t d), lengths (b) in frames, by default all t -> mean latents (b 1 c)"""
        t = motion.shape[1]
        lengths = torch.full((len(motion),), t) if lengths is None else lengths
        mask = length_mask(lengths.to(motion.device), t)
        x = ((motion - self.mean) / self.std).masked_fill(~mask[..., None], 0.0)  # even if padding is NaN
        return self.posterior(x, mask)[0]

    def decode(self, z, lengths):
        """Latents (b 1 c), lengths (b) in frames -> raw motion (b t d), t the longest; padding is the mean.
        Differentiable."""
        mask = length_mask(lengths.to(z.device), int(lengths.max()))
        return self.reconstruct(z, mask) * self.std + self.mean


class MLD(nn.Module):
    """x (b 1 c) of noisy latents, timesteps (b) -> the noise (b 1 c).

    texts(captions): see layers.read_text; the empty caption is among those that it has to know.
    """
    prediction, guidance_scale, schedule = "epsilon", 7.5, "scaled_linear"

    def __init__(self, feature_dim, text_dim, width, ff, depth, *, vae_ff, vae_depth, longest, positions,
                 texts=None):
        super().__init__()
        self.sizes = dict(feature_dim=feature_dim, text_dim=text_dim, width=width, ff=ff, depth=depth,
                          vae_ff=vae_ff, vae_depth=vae_depth, longest=longest, positions=positions)
        self.codec = MLDVAE(feature_dim, width, vae_ff, vae_depth, longest)
        self.width, self.dims, self.text_dim, self.texts = width, width, text_dim, texts
        self.time = nn.Sequential(nn.Linear(text_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.emb_proj = nn.Sequential(nn.ReLU(), nn.Linear(text_dim, width))
        self.query_pos = Positions(positions, width)
        self.layers = SkipTransformer(width, ff, depth)
        self.register_buffer("null_text", torch.zeros(1, text_dim))  # the vector of the empty caption

    def grid(self, count=STEPS):
        """The samplers.Grid of its sampler: down to timestep 1, and from there to the noise of timestep 0."""
        return samplers.make_grid(self.schedule, count, "leading", "sigma_min")

    def encode_text(self, captions, spoil=None):
        """b captions -> text (b 1 i), text_mask (b 1). spoil: published networks are not trained here, so
        nothing is spoiled."""
        return layers.read_text(self.texts, captions, self.text_dim, self.null_text.device)

    def drop_text(self, text, text_mask, dropped):
        """The captions with `dropped` (b) become the empty caption."""
        return torch.where(dropped[:, None, None], self.null_text, text), text_mask

    def time_waves(self, timesteps):
        """timesteps (b) -> (b i): the cosines, then the sines, unlike the table of positions in MDM"""
        half = self.text_dim // 2
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=timesteps.device) / half)
        angles = timesteps[:, None].float() * rates
        return torch.cat([angles.cos(), angles.sin()], -1)

    def forward(self, x, timesteps, mask, text, text_mask):
        """x (b 1 c), timesteps (b), mask (b 1), text (b 1 i), text_mask (b 1) -> (b 1 c); both masks are all
        True."""
        time = self.time(self.time_waves(timesteps))
        h = torch.cat([x, rearrange(time, "b c -> b 1 c"), self.emb_proj(text)], 1)  # b 3 c
        return self.layers(h + self.query_pos(3))[:, :1]


def depth_of(state, path, stack):
    """Layers of a skip transformer in a file, from its joints; InputError if it has none."""
    joints = {key.split(".")[3] for key in state if key.startswith(f"{stack}.linear_blocks.")}
    if not joints:
        raise InputError(f"{path}: {stack} has no linear_blocks, so it is another architecture of MLD; give "
                         "mld_humanml3d.ckpt")
    return 2 * len(joints) + 1


def sizes(state, path):
    """The arguments of MLD that fit the weights; InputError for a file of another kind."""
    for part, said in (("vae.", "is it a checkpoint of MLD?"), ("denoiser.", "is it that of its VAE alone?")):
        if not any(key.startswith(part) for key in state):
            raise InputError(f"{path}: holds no {part}*; {said} Give mld_humanml3d.ckpt")
    if any(key.startswith("denoiser.decoder.") for key in state):
        raise InputError(f"{path}: its denoiser is a decoder, not read here; give mld_humanml3d.ckpt")

    def of(key, axis=0):
        return size(state, path, key, axis)
    rows, width = of("vae.global_motion_token"), of("vae.global_motion_token", 1)
    if rows != 2 or width % layers.HEADS:
        raise InputError(f"{path}: {rows} rows of {width} in vae.global_motion_token; read here are latents "
                         f"of one token, [1, c] with c a multiple of {layers.HEADS}")
    return dict(feature_dim=of("vae.final_layer.weight"), text_dim=of("denoiser.emb_proj.1.weight", 1),
                width=width, ff=of("denoiser.encoder.middle_block.linear1.weight"),
                depth=depth_of(state, path, "denoiser.encoder"),
                vae_ff=of("vae.encoder.middle_block.linear1.weight"),
                vae_depth=depth_of(state, path, "vae.encoder"), longest=of("vae.query_pos_encoder.pe"),
                positions=of("denoiser.query_pos.pe"))


def load_mld(path, statistics, texts, device="cpu"):
    """A published MLD (a lightning file with `state_dict`, or that alone) -> frozen MLD, its VAE as `codec`.

    statistics: of the data folder (its Mean.npy and Std.npy), role "generator". texts: see layers.read_text.
    """
    state = read_state(path, "state_dict", bare=True)
    arguments = sizes(state, path)
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
        model = MLD(**arguments, texts=texts)
    state = {key: value for key, value in state.items() if not UNUSED.match(key)}
    state = layers.renamed(state, path, NAMES)
    load_strict(model, state, path, free=("codec.mean", "codec.std", "null_text"))
    layers.take_statistics(model.codec, statistics, path)
    model.null_text.copy_(model.encode_text([""])[0][0])
    return freeze(model.to(device))
