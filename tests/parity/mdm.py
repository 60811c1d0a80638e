"""Compare the reader of published MDM networks with the public official code (see tests/parity).

Each file is saved again in the published layout, with its args.json, and read by `load_mdm`.
"""
import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from common import datasets, length_mask, samplers, sinusoid
from common.published import layers, load_strict, mdm
from tests.parity.rows import Used, error, state
from tests.run_helpers import load

OUTPUTS, TRACES, SCHEDULES = 2e-5, 1e-4, 1e-12


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    with np.load(path) as z, torch.no_grad():
        z = Used(z)
        kinds = {"mdm_enc50_": check_enc50, "mdm_enc_": check_enc, "mdm_dec_": check_dec}
        rows = next(kind for start, kind in kinds.items() if path.name.startswith(start))(z)
        return rows + [("<fields left out>", float(len(z.left())), 0.0)]


def read(z, prefixes, **changed):
    """The network of weights {name in the file: prefix in z}, "" for a bare state dict, by `load_mdm`."""
    meta = json.loads(bytes(z["meta_json"]))
    weights = {name: state(z, prefix) for name, prefix in prefixes.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model000000001.pt"
        torch.save(weights.get("", weights), file)
        file.with_name("args.json").write_text(json.dumps(meta["args"] | changed))
        statistics = datasets.Statistics(torch.zeros(263), torch.ones(263), "generator")
        model = mdm.load_mdm(file, statistics)
    assert model.guidance_scale == meta["guidance"] and not meta["clip_denoised"]
    return model


def official(x):
    """x (b n d) in the layout of the official code, (b d 1 n)."""
    return rearrange(x, "... n d -> ... d 1 n")


def ours(z, key):
    return rearrange(torch.from_numpy(z[key]), "... d 1 n -> ... n d")


def answers(model, x, timesteps, mask, text, text_mask, scale):
    """The answer with text, without, and guided (b d 1 n), what it says of padding left in."""
    without = model.drop_text(text, text_mask, torch.ones(len(x), dtype=torch.bool))
    cond = model.answer(x, timesteps, mask, text, text_mask)
    uncond = model.answer(x, timesteps, mask, *without)
    return [official(y) for y in (cond, uncond, uncond + scale * (cond - uncond))]


def output_rows(z, model, text, text_mask, names):
    """Rows of the three answers under names, for one call of the network on `x` of the file."""
    x, scale = ours(z, "x"), torch.from_numpy(z["scale"])[:, None, None]
    mask = length_mask(torch.from_numpy(z["lengths"]), x.shape[1])
    given = answers(model, x, torch.from_numpy(z["timesteps"]), mask, text, text_mask, scale)
    rows = [(name, error(mine, z[name]), OUTPUTS) for name, mine in zip(names, given)]
    return rows + [("mask", error(official(mask[..., None]).float(), z["mask"].astype(np.float32)), 0.0)]


def vectors(z, key):
    """CLIP vectors of the file as tokens and mask."""
    return layers.read_text(lambda _: torch.from_numpy(z[key]), [], 512, "cpu")


def tokens(z, key):
    """DistilBERT states of the file and their mask."""
    text = torch.from_numpy(z[key])
    mask = length_mask(torch.from_numpy(z[f"{key}_lengths"]), text.shape[1])
    return layers.read_text(lambda _: (text, mask), [], 768, "cpu")


def table_rows(z, model, grid, prefix):
    """Rows of every array of a schedule (Ho et al. 2020, eq. 7) and of the nodes of our grid."""
    kept = grid.timesteps.flip(0)                        # ascending
    after = model.alphas_cumprod[kept]
    before = torch.cat([torch.ones(1), after[:-1]])
    betas = 1 - after / before if len(kept) < len(model.alphas_cumprod) else mdm.cosine_betas(len(kept))
    variance = betas * (1 - before) / (1 - after)
    mine = {"betas": betas, "alphas_cumprod": grid.alpha.flip(0)[1:].square(), "alphas_cumprod_prev": before,
            "posterior_variance": variance,
            "posterior_log_variance_clipped": torch.cat([variance[1:2], variance[1:]]).log(),
            "posterior_mean_coef1": betas * before.sqrt() / (1 - after),
            "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - after)}
    rows = [(f"{prefix}/{key}", error(value, z[f"{prefix}/{key}"]), SCHEDULES)
            for key, value in mine.items() if f"{prefix}/{key}" in z]
    if f"{prefix}/timestep_map" in z:
        rows.append((f"{prefix}/timestep_map", error(kept, z[f"{prefix}/timestep_map"]), 0.0))
    return rows


def trace_rows(z, model, grid, prefix, text, text_mask, noisy):
    """Rows of a trace: states and guided answers of every stored step. noisy: the stochastic steps of
    ddpo_motion.py at order 1, otherwise DDIM."""
    x = ours(z, f"{prefix}/x_T")
    mask = length_mask(torch.from_numpy(z["trace_lengths"]), x.shape[1])
    kept = z[f"{prefix}/kept_steps"].tolist() if f"{prefix}/kept_steps" in z else range(len(grid.timesteps))
    noise = ours(z, f"{prefix}/noise") if noisy else None
    steps = load("ddpo").solver_steps(grid, 1, "sample") if noisy else samplers.ddim_steps(grid, "sample")
    states, guesses = [], []
    for i, timestep in enumerate(steps.timesteps.tolist()):
        told = torch.full((len(x),), float(timestep))
        m = rearrange(answers(model, x, told, mask, text, text_mask, model.guidance_scale)[2],
                      "b d 1 n -> b n d")
        if noisy:
            x = steps.x_coef[i] * x + steps.m_coef[i] * m + steps.std[i] * noise[i]
        else:
            x = steps.x_coef[i].item() * x + steps.e_coef[i].item() * m
        if i in kept:
            states.append(official(x))
            guesses.append(official(m))
    rows = [(f"{prefix}/x", error(torch.stack(states), z[f"{prefix}/x"]), TRACES)]
    if f"{prefix}/pred_x0" in z:
        rows.append((f"{prefix}/pred_x0", error(torch.stack(guesses), z[f"{prefix}/pred_x0"]), TRACES))
    return rows


def position_rows(z, prefix):
    """Rows of the two tables of positions in a file, which the reader computes."""
    return [(prefix + key, error(sinusoid(*z[prefix + key].shape[::2])[:, None], z[prefix + key]), 1e-5)
            for key in mdm.TABLES]


def full_size_row(z, field, words, dataset):
    """Whether a network of full size takes exactly the weights of a list "key (shape)"."""
    listed = dict(re.fullmatch(r"(\S+) \((.*)\)", line).groups() for line in z[field].tolist())
    weights = {key: torch.zeros(1).expand([int(n) for n in shape.split(",") if n])
               for key, shape in listed.items() if key not in mdm.TABLES}
    arch, encoder = list(mdm.TEXT)[words]
    sizes = mdm.sizes(weights, field, dict(arch=arch, text_encoder_type=encoder, dataset=dataset, layers=8,
                                           latent_dim=512, mask_frames=words, diffusion_steps=50))
    stack = "seqTransDecoder." if words else "seqTransEncoder."
    load_strict(mdm.MDM(**sizes), layers.renamed(weights, field, (*mdm.NAMES, (stack, ""))), field,
                free=("codec.mean", "codec.std"))
    return field, 0.0 if len(listed) == len(weights) + len(mdm.TABLES) else math.inf, 0.0


def check_enc(z):
    model, text = read(z, {"": "sd/"}), vectors(z, "text")
    names = ["out_cond", "out_uncond", "out_guided"]
    rows = output_rows(z, model, *text, names) + position_rows(z, "sd/")
    masked = read(z, {"": "sd/"}, mask_frames=True)
    rows += output_rows(z, masked, *text, [f"{name}_masked" for name in names])
    time = model.embed_time(torch.from_numpy(z["timesteps"]))
    rows += [("time_emb", error(time, z["time_emb"]), OUTPUTS),
             ("cond_token", error(time + model.embed_text(text[0][:, 0]), z["cond_token"]), OUTPUTS)]
    rows += table_rows(z, model, model.grid(), "sched1000")
    text = vectors(z, "trace_text")
    for prefix, grid, noisy in (("p6", model.grid(6), True), ("ddim5", model.grid(5, ddim=True), False),
                                ("ddim5_eta1", model.grid(5, ddim=True), True)):
        rows += table_rows(z, model, grid, prefix) + trace_rows(z, model, grid, prefix, *text, noisy)
    return rows + [full_size_row(z, f"full_size_keys_{name}", 0, name) for name in mdm.FEATURES]


def check_enc50(z):
    model = read(z, {"model": "sd/", "model_avg": "sd_avg/"}, use_ema=True)
    rows = output_rows(z, model, *vectors(z, "text"), ["out_cond", "out_uncond", "out_guided"])
    plain = read(z, {"model": "sd/", "model_avg": "sd_avg/"}, use_ema=False)
    rows += output_rows(z, plain, *vectors(z, "text"), ["out_cond_without_ema"])
    rows += position_rows(z, "sd/") + position_rows(z, "sd_avg/")
    rows += table_rows(z, model, model.grid(), "sched50")
    text, grid = vectors(z, "trace_text"), model.grid(10, ddim=True)
    rows += trace_rows(z, model, model.grid(), "p50", *text, True) + table_rows(z, model, grid, "ddim10")
    return rows + trace_rows(z, model, grid, "ddim10", *text, False)


def check_dec(z):
    model, text = read(z, {"model": "sd/"}), tokens(z, "text")
    rows = output_rows(z, model, *text, ["out_cond", "out_uncond", "out_guided"]) + position_rows(z, "sd/")
    open_eyed = read(z, {"model": "sd/"}, mask_frames=False)
    rows += output_rows(z, open_eyed, *text, ["out_cond_without_frame_mask"])
    rows += [("text_mask", error(text[1].float(), z["text_mask"].astype(np.float32)), 0.0),
             ("time_emb", error(model.embed_time(torch.from_numpy(z["timesteps"])), z["time_emb"]), OUTPUTS)]
    rows += table_rows(z, model, model.grid(6), "p6")
    rows += trace_rows(z, model, model.grid(6), "p6", *tokens(z, "trace_text"), True)
    return rows + [full_size_row(z, "full_size_keys", 1, "humanml")]
