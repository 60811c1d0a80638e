"""What the diffusion scripts start from: sizes, codecs, and the supervised training of their denoiser.

The network is the scripts'; two scripts with the same network and size share the file in the cache.
Letters: b batch, n tokens, c coordinates of a token.
"""
from typing import NamedTuple

import torch

from common import datasets, features, generator, padded, samplers
from common.patches import LappedCodec, PatchCodec, make_patches
from common.training import cached, initialise, source_of, supervised
from common.vae import MotionVAE, fit_vae

TIMESTEPS = 1000  # of training; t is one of 0 .. 999
TEXT_DROP = 0.1   # share of captions dropped in training, for classifier-free guidance (MDM: 0.1)


class Size(NamedTuple):
    """What --size and --space decide: the network, its supervised training, the embedded data."""
    width: int = 64
    layers: int = 3
    heads: int = 4
    text_layers: int = 1
    patch: int = 4                # frames of a token (MDM: 1)
    patch_dims: int = 64          # principal components that are kept of two lapped patches; 0: all
    latents: int = 0              # tokens of a motion in the latent space; 0: no VAE
    latent_dims: int = 32
    iterations: int = 3000        # of the base
    vae_iterations: int = 3000
    scorer_iterations: int = 900  # of the reward model and of the judge
    batch: int = 64
    lr: float = 2e-3
    clips: tuple = (2400, 2000)   # of the embedded source and target
    bf16: bool = False            # whether the network computes in bfloat16

    @property
    def dims(self):
        """Coordinates of a token in the latent space, or 0."""
        return self.latent_dims if self.latents else 0


SIZES = {
    "joint": {
        "tiny": Size(width=32, patch_dims=48, iterations=60, batch=32, scorer_iterations=40,
                     clips=(160, 120)),
        "small": Size(),
        "paper": Size(width=512, layers=8, patch=1, patch_dims=0, iterations=200_000, lr=1e-4, bf16=True)}}
SIZES["latent"] = {  # MLD: one latent of 256 numbers, nine layers; an odd number, for the skips
    "tiny": SIZES["joint"]["tiny"]._replace(latents=8, vae_iterations=40),
    "small": Size(layers=5, latents=8),
    "paper": SIZES["joint"]["paper"]._replace(width=256, layers=9, latents=1, latent_dims=256,
                                              vae_iterations=200_000)}
# What the network answers with, and the noise schedule: MDM's, and MLD's.
SPACES = {"joint": ("sample", "linear"), "latent": ("epsilon", "scaled_linear")}


def make_codec(size, frame_width):
    """Motion <-> tokens, with the interface of patches.PatchCodec: frames, lapped patches, or a VAE."""
    if not size.latents:
        return make_patches(size.patch, frame_width, size.patch_dims)
    return MotionVAE(frame_width, patch=size.patch, patch_dims=size.patch_dims, width=size.width,
                     heads=size.heads, tokens=size.latents, dims=size.latent_dims).requires_grad_(False)


def corrupt(x_start, noise, timesteps, schedule, prediction):
    """What the base reads, and what it has to answer: (b n c) each.

    prediction: of a diffusion, "sample" (MDM eq. 2: x_start itself), "epsilon" (Ho et al. 2020: the noise) or
    "v" (Salimans & Ho 2022); of a flow, "velocity": that of the straight way from noise to motion (Lipman et
    al. 2023), on which timestep 0 is noise. schedule: of the diffusion's noise.
    """
    if prediction == "velocity":
        t = (timesteps / TIMESTEPS)[:, None, None]
        return t * x_start + (1 - t) * noise, x_start - noise
    alphas_cumprod = torch.cumprod(1.0 - samplers.make_betas(schedule), 0).float().to(x_start.device)
    alpha_bar = alphas_cumprod[timesteps][:, None, None]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    wanted = {"sample": x_start, "epsilon": noise, "v": alpha * noise - sigma * x_start}
    return alpha * x_start + sigma * noise, wanted[prediction]


def noised(codec, prediction, motion, lengths, level, g):
    """Motion (b t d) at a noise level (b) from 0 to 1, as the linear schedule or a flow has it, decoded: what
    a state x_t looks like."""
    x, t = codec.encode(motion, lengths), 1 - level if prediction == "velocity" else level
    noise = torch.randn(x.shape, generator=g).to(x)
    return codec.decode(corrupt(x, noise, (t * (TIMESTEPS - 1)).long(), "linear", prediction)[0])


def train_base(model, clips, device, *, schedule, prediction, iterations, batch, lr, seed):
    """Learn to answer what `corrupt` asks at a random timestep -> {"loss"}."""
    with torch.no_grad():
        encoded = [model.codec.encode(torch.from_numpy(c.features)[None].to(device))[0] for c in clips]

    def loss(iteration):
        g = generator(seed, iteration, "base")
        chosen = torch.randint(len(clips), (batch,), generator=g).tolist()
        captions = datasets.draw_captions([clips[k] for k in chosen], g)
        x_start, mask = padded([encoded[k] for k in chosen])  # b n c, b n
        timesteps = torch.randint(TIMESTEPS, (batch,), generator=g).to(device)
        noise = torch.randn(x_start.shape, generator=g).to(device)
        dropped = (torch.rand(batch, generator=g) < TEXT_DROP).to(device)
        x, wanted = corrupt(x_start, noise, timesteps, schedule, prediction)
        text, text_mask = model.encode_text(captions, g)
        text, text_mask = model.drop_text(text, text_mask, dropped)
        answer = model(x * mask[..., None], timesteps, mask, text, text_mask)
        error = (answer - wanted).square() * mask[..., None]
        return error.sum() / (mask.sum() * x_start.shape[-1])

    return supervised("base", model.parameters(), loss, iterations=iterations, lr=lr)


def fit_base(make_model, parts, source, size, prediction, schedule, *, clips=None, weights=True, seed, device,
             cache_dir, use_cache):
    """A denoiser, trained on the source's train split or from the cache -> frozen model, notes.

    make_model(vocabulary) -> the network with any weights; parts: the classes and functions that it is made
    of, for the cache's key. clips: those of the source in another representation; then also weights=False:
    all numbers of a frame count alike in a patch, where otherwise the few of the whole body count more.
    """
    clips = clips or source.splits["train"]
    vocabulary = datasets.Vocabulary.from_captions([c for clip in clips for c in clip.captions])
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
        model = make_model(vocabulary)
    initialise(model, generator(seed, 0, "initialise"))
    weights = features.block_weights(source.skeleton, features.PATCH_WEIGHTS) if weights else None
    saw = [source.fingerprint, clips[0].features.shape[1]]
    training = dict(schedule=schedule, prediction=prediction, iterations=size.iterations, batch=size.batch,
                    lr=size.lr, seed=seed)

    def build():
        if size.latents:
            notes = fit_vae(model.codec, clips, weights, shaped_by=saw, iterations=size.vae_iterations,
                            seed=seed, device=device, cache_dir=cache_dir, use_cache=use_cache)
        else:
            statistics = datasets.Statistics.from_clips(clips, role="generator")
            notes = {"variance_kept": model.codec.fit(clips, statistics, weights)}
        notes |= train_base(model.to(device), clips, device, **training)
        return {"model": model.state_dict(), **notes}

    parts += (MotionVAE, fit_vae) if size.latents else ()
    code = source_of(PatchCodec, LappedCodec, make_patches, corrupt, train_base, supervised,
                     datasets.Vocabulary, *parts)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    key = [saw, shapes, code, [] if weights is None else weights.tolist(), list(size), training,
           [TEXT_DROP, datasets.WORD_DROP, datasets.WORD_SWAP]]
    stored = cached(cache_dir, key, build, "base", use_cache)
    model.load_state_dict(stored.pop("model"))
    print(f"  base: loss {stored['loss']:.4f}" + (
        f"; patches keep {stored['variance_kept']:.1%} of the variance" if "variance_kept" in stored else ""))
    return model.requires_grad_(False), stored
