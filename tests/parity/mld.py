"""Compare the reader of published MLD networks with the public official code (see tests/parity).

A reference file holds the VAE or the denoiser; the other half of the checkpoint, which `load_mld` wants, has
the sizes of the first and zeros for weights.
"""
import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from common import datasets, length_mask, samplers
from common.published import layers, load_strict, mld
from tests.parity.rows import Used, error, state
from tests.published_helpers import mld_state

VALUES, OUT, GUIDED, TRACE = 2e-5, 5e-5, 3e-4, 3e-5  # the last one relative to the largest number


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    with np.load(path) as z, torch.no_grad():
        z = Used(z)
        rows = (check_vae if path.name.startswith("mld_vae_") else check_denoiser)(z)
        return rows + [("<fields left out>", float(len(z.left())), 0.0)]


def listed(z, field):
    """A list "key (shape)" as a state dict of zeros that take no memory."""
    shapes = dict(re.fullmatch(r"(\S+) \((.*)\)", line).groups() for line in z[field].tolist())
    return {key: torch.zeros(1).expand([int(n) for n in shape.split(",") if n])
            for key, shape in shapes.items()}


def read(z, mean, std, empty):
    """The network of the file's half, read by `load_mld` from a lightning file."""
    meta, weights = json.loads(bytes(z["meta_json"])), state(z, "sd/")
    assert meta["num_heads"] == layers.HEADS and meta["latent_dim"][0] == 1
    width, ff, depth = meta["latent_dim"][1], meta["ff_size"], meta["num_layers"]
    zeros = mld.MLD(263, 768, width, ff, depth, vae_ff=ff, vae_depth=depth, longest=500, positions=500)
    half = next(iter(weights)).split(".")[0]
    rest = {key: 0 * value for key, value in mld_state(zeros).items() if not key.startswith(half)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mld_humanml3d.ckpt"
        torch.save({"state_dict": weights | rest, "epoch": 1, "callbacks": {}}, file)
        model = mld.load_mld(file, datasets.Statistics(mean, std, "generator"), lambda captions: empty)
    assert model.guidance_scale == meta.get("guidance_scale", 7.5)
    return model


def tensor(z, key):
    return torch.from_numpy(z[key])


def swapped(x):
    """(b 1 c) <-> (1 b c), the official layout of latents."""
    return rearrange(x, "b one c -> one b c")


def check_vae(z):
    model = read(z, z["generator_mean"], z["generator_std"], torch.zeros(1, 768))
    vae, lengths = model.codec, tensor(z, "lengths")
    raw = tensor(z, "features") * vae.std + vae.mean
    mask = length_mask(lengths, raw.shape[1])
    mu, logvar = vae.posterior(tensor(z, "features"), mask)
    std = (logvar / 2).exp()
    latent = mu + std * swapped(tensor(z, "noise"))
    rows = [("mu", error(swapped(mu), z["mu"]), VALUES), ("std", error(swapped(std), z["std"]), VALUES),
            ("z", error(swapped(latent), z["z"]), VALUES),
            ("mu by encode", error(swapped(vae.encode(raw, lengths)), z["mu"]), VALUES)]
    decoded = vae.reconstruct(swapped(tensor(z, "z")), length_mask(lengths, int(lengths.max())))
    # A motion leaves the codec raw: the official renorm4t2m is that and the evaluator's normalisation.
    mean, std = tensor(z, "evaluator_mean"), tensor(z, "evaluator_std")
    again = (vae.decode(swapped(tensor(z, "z")), lengths).double() - mean) / std
    largest = float(np.abs(z["renormalised"]).max())
    rows += [("decoded", error(decoded, z["decoded"]), VALUES),
             # root and contacts come out 25 times larger than in `decoded`, and so do their errors
             ("renormalised / largest", error(again / largest, z["renormalised"] / largest), VALUES / 10)]
    with torch.enable_grad():
        other, lengths = swapped(tensor(z, "z_other")).requires_grad_(), tensor(z, "lengths_other")
        decoded = vae.reconstruct(other, length_mask(lengths, int(lengths.max())))
        (decoded * tensor(z, "grad_weight")).sum().backward()
    rows += [("decoded_other", error(decoded, z["decoded_other"]), VALUES),
             ("grad_z_other", error(swapped(other.grad), z["grad_z_other"]), VALUES)]
    full = listed(z, "full_size_keys")
    sizes = mld.MLDVAE(263, 256, 1024, 9, 500)
    own = {key.removeprefix("codec."): value for key, value in layers.renamed(full, "", mld.NAMES).items()}
    load_strict(sizes, own, "full_size_keys", free=("mean", "std"))
    return rows + [("full_size_keys", 0.0, 0.0)]


def trace_rows(z, model, prefix, steps, ask):
    """Rows of a trace; ask(x, timesteps) -> the noise."""
    x, states, noises, guesses = tensor(z, "x_T"), [], [], []
    for i, timestep in enumerate(steps.timesteps.tolist()):
        e = ask(x, torch.full((len(x),), float(timestep)))
        guesses.append(steps.p[i].item() * x + steps.q[i].item() * e)
        noises.append(e)
        x = steps.x_coef[i].item() * x + steps.e_coef[i].item() * e
        states.append(x)
    mine = {"x": torch.stack(states), "eps": torch.stack(noises), "pred_x0": torch.stack(guesses),
            "latent": swapped(x)}
    rows = []
    for key in [key for key in mine if f"{prefix}/{key}" in z]:
        theirs = z[f"{prefix}/{key}"]
        scale = float(np.abs(theirs).max())
        rows.append((f"{prefix}/{key} / largest", error(mine[key] / scale, theirs / scale), TRACE))
    if f"{prefix}/timesteps" in z:
        rows.append((f"{prefix}/timesteps", error(steps.timesteps, z[f"{prefix}/timesteps"]), 0.0))
    return rows


def check_denoiser(z):
    model = read(z, torch.zeros(263), torch.ones(263), tensor(z, "text_empty")[:, 0])
    sample, text = tensor(z, "sample"), tensor(z, "text")
    one = torch.ones(len(sample), 1, dtype=torch.bool)
    without = model.drop_text(text, one, torch.ones(len(sample), dtype=torch.bool))[0]

    def answer(x, timesteps, given):
        return model(x, timesteps, one, given, one)

    def guided(x, timesteps):
        null = answer(x, timesteps, without)
        return null + model.guidance_scale * (answer(x, timesteps, text) - null)

    each = tensor(z, "timesteps")
    same = tensor(z, "timestep").expand(len(sample))
    time = model.time_waves(each)
    rows = [("out_each", error(answer(sample, each, text), z["out_each"]), OUT),
            ("out", error(answer(sample, same, text), z["out"]), OUT),
            ("out_empty", error(answer(sample, same, without), z["out_empty"]), OUT),
            ("out_guided", error(guided(sample, same), z["out_guided"]), GUIDED),
            ("time_proj", error(time, z["time_proj"]), OUT),
            ("time_emb", error(model.time(time), z["time_emb"]), OUT),
            ("text_emb", error(model.emb_proj(text), z["text_emb"]), OUT)]
    for count in (50, 10, 4):
        steps = samplers.ddim_steps(model.grid(count), model.prediction)
        rows += trace_rows(z, model, f"ddim{count}", steps, guided)
        if count == 10:
            rows += trace_rows(z, model, "ddim10_unguided", steps, lambda x, t: answer(x, t, text))
    # float32 there
    betas = samplers.make_betas(model.schedule)
    last = model.grid().alpha[-1].square()
    rows += [("betas", error(betas, z["betas"]), 1e-8),
             ("alphas_cumprod", error((1 - betas).cumprod(0), z["alphas_cumprod"]), 1e-6),
             ("final_alpha_cumprod", error(last, z["final_alpha_cumprod"]), 1e-6)]
    whole, part = listed(z, "full_size_checkpoint_keys"), listed(z, "full_size_keys")
    used = {key: value for key, value in whole.items() if not mld.UNUSED.match(key)}
    load_strict(mld.MLD(**mld.sizes(whole, "")), layers.renamed(used, "", mld.NAMES),
                "full_size_checkpoint_keys", free=("codec.mean", "codec.std", "null_text"))
    shapes = [{key: value.shape for key, value in keys.items() if key.startswith("denoiser.")}
              for keys in (whole, part)]
    return rows + [("full_size_checkpoint_keys", float(len(whole) - len(used) != 43), 0.0),
                   ("full_size_keys", 0.0 if shapes[0] == shapes[1] and len(part) == 126 else math.inf, 0.0)]
