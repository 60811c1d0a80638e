"""The base of the diffusion scripts: their denoiser, trained on the source's clips, or its copy in the cache.

The network is the scripts'; two scripts with the same network and settings share the file in the cache.
"""
import inspect
import sys

import numpy as np
import torch
from tqdm import tqdm

from common import datasets, features, generator, padded, patches, runs, samplers

TIMESTEPS = 1000  # of training; t is one of 0 .. 999


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


def train(model, clips, device, *, schedule, prediction, base_seed, base_iterations, base_batch, base_lr,
          text_drop, word_drop, word_swap):
    """Learn to answer what `corrupt` asks at a random timestep, some captions dropped for guidance -> losses.
    The keywords are the scripts' flags."""
    with torch.no_grad():
        encoded = [model.codec.encode(torch.from_numpy(c.features)[None].to(device))[0] for c in clips]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=base_lr, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, base_lr, base_iterations,
                                                    pct_start=max(0.05, 2 / max(base_iterations, 3)))
    losses, bar = [], tqdm(range(base_iterations), desc="base", mininterval=1.0)
    for iteration in bar:
        g = generator(base_seed, iteration, "base")
        chosen = torch.randint(len(clips), (base_batch,), generator=g).tolist()
        captions = datasets.draw_captions([clips[k] for k in chosen], g)
        x_start, mask = padded([encoded[k] for k in chosen])  # b n c, b n
        timesteps = torch.randint(TIMESTEPS, (base_batch,), generator=g).to(device)
        noise = torch.randn(x_start.shape, generator=g).to(device)
        dropped = (torch.rand(base_batch, generator=g) < text_drop).to(device)
        x_t, wanted = corrupt(x_start, noise, timesteps, schedule, prediction)
        text, text_mask = model.encode_text(captions, word_drop, word_swap, g)
        text, text_mask = model.drop_text(text, text_mask, dropped)
        answer = model(x_t * mask[..., None], timesteps, mask, text, text_mask)
        error = (answer - wanted).square() * mask[..., None]
        loss = error.sum() / (mask.sum() * x_start.shape[-1])
        losses.append(runs.descend(loss, parameters, optimizer, scheduler, f"base, iteration {iteration}",
                                   "lower --base-lr"))
        bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
    return losses


def fit(model, clips, weights, device, *, parts, shaped_by, base_seed, cache_dir, cache, fit_codec=None,
        **training):
    """Give the model its weights: trained on the clips, or cached -> notes.

    weights (d): how much each number of a frame counts in the patches (None: alike). fit_codec() -> notes:
    makes another codec than patches ready. The cache's key are, beside the shapes of the weights, the source
    code of `parts`, the classes and modules the model is made of, and `shaped_by`: plain data that name the
    clips and what shapes do not tell. training: the other keywords of `train`.
    """
    runs.initialise(model, generator(base_seed, 0, "initialise"))

    def fit_patches():
        statistics = datasets.Statistics.from_clips(clips, role="generator")
        return {"variance_kept": model.codec.fit(clips, statistics, weights)}

    def build():
        notes = (fit_codec or fit_patches)()
        losses = train(model.to(device), clips, device, base_seed=base_seed, **training)
        return {"model": model.state_dict(), "loss": float(np.mean(losses[-100:])), **notes}

    code = [inspect.getsource(part) for part in (sys.modules[__name__], patches, *parts)]
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    key = [shaped_by, shapes, code, features.PATCH_WEIGHTS, base_seed, training]
    stored = runs.cached(cache_dir, key, build, "base", cache)
    model.load_state_dict(stored.pop("model"))
    print(f"  base: loss {stored['loss']:.4f}" + (
        f"; patches keep {stored['variance_kept']:.1%} of the variance" if "variance_kept" in stored else ""))
    return stored
