"""Compare StableMoFusion's network and its two samplers with the public official code (see tests/parity)."""
import json

import numpy as np
import torch

import ddpo_motion
from common import freeze, samplers
from common.published import load_strict, stablemofusion, unpack_attention
from tests import reference
from tests.parity.rows import error, packed, shapes_error, state

GUIDANCE = 2.5


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    with np.load(path) as z, torch.no_grad():
        network = read(state(z, "sd/"), path)
        alphas_cumprod = (1 - samplers.make_betas("linear")).cumprod(0)
        meta = json.loads(bytes(z["meta_json"]))
        fixed = [GUIDANCE, stablemofusion.TEXT_HEADS, stablemofusion.HEADS]
        rows = [("meta_json", error(fixed, [meta[key] for key in (
                    "cfg_scale", "text_heads", "attention_heads")]), 0.0), *check_network(network, z),
                ("alphas_cumprod", error(alphas_cumprod, z["alphas_cumprod"]), 1e-6)]
        # In float64: this network of random weights multiplies a rounding error a hundredfold on its way.
        network.double()
        rows += [*check_sde(network, z), *check_ddim(network, z, alphas_cumprod)]
        with torch.device("meta"):  # 299 million numbers that nobody needs
            full = packed(stablemofusion.StableMoFusion().state_dict())
        listed = np.array([f"/{entry}" for entry in z["full_size_keys"].tolist()])
        return [*rows, ("full_size_keys", shapes_error(listed, {"": full}), 0.0)]


def read(weights, path):
    """The network of a file's weights, by way of the loader's functions."""
    weights = unpack_attention(weights)
    with torch.random.fork_rng(devices=[]):
        network = stablemofusion.StableMoFusion(**stablemofusion.network_sizes(weights, path))
    load_strict(network, weights, path)
    return freeze(network)


def check_network(network, z):
    """The text encoder, and the answer with text, without it and guided."""
    x, timesteps = torch.from_numpy(z["x"]), torch.from_numpy(z["timesteps"])
    text = network.encode_tokens(torch.from_numpy(z["clip_tokens"]))
    words = torch.ones(text.shape[:2], dtype=torch.bool)
    none = network.drop_text(text, words, torch.ones(len(text), dtype=torch.bool))
    cond, uncond = network(x, timesteps, None, text, words), network(x, timesteps, None, *none)
    return [("enc_text", error(text, z["enc_text"]), 2e-4), ("out_cond", error(cond, z["out_cond"]), 2e-4),
            ("out_uncond", error(uncond, z["out_uncond"]), 2e-4),
            ("out_guided", error(uncond + GUIDANCE * (cond - uncond), z["out_guided"]), 4e-4)]


def guided(network, z):
    """The guided answer to (x, timestep) for the text of the traces, as the scripts compute it."""
    text = network.encode_tokens(torch.from_numpy(z["trace_clip_tokens"]).double())
    text_mask = torch.ones(text.shape[:2], dtype=torch.bool)
    policy = ddpo_motion.Policy(network, None, None, 0, GUIDANCE, torch.device("cpu"))
    return lambda x, timestep: ddpo_motion.predict(policy, x, timestep.float().expand(len(x)), None, text,
                                                   text_mask)


def check_sde(network, z):
    """SDE-DPM-Solver++ of order 2 with ddpo_motion.py's own steps, on the file's nodes and on our own."""
    x_start, noise = torch.from_numpy(z["x_T"]).double(), torch.from_numpy(z["noise"])
    mine = samplers.make_grid("linear", len(noise), "karras", "zero")
    yield "dpmsolver/timesteps", error(mine.timesteps, z["dpmsolver/timesteps"]), 0.0
    yield "dpmsolver/sigmas", error(mine.sigma / mine.alpha, z["dpmsolver/sigmas"], relative=True), 1e-4
    theirs = samplers.Grid.from_ratio(torch.from_numpy(z["dpmsolver/timesteps"]), z["dpmsolver/sigmas"])
    respond = guided(network, z)
    # our nodes are those of float64, the file's of float32
    for field, grid, tolerance in (("dpmsolver/x", theirs, 5e-3), ("dpmsolver/x (own nodes)", mine, 5e-2)):
        steps, x, m_last, states = ddpo_motion.solver_steps(grid, 2, "sample"), x_start, None, []
        for i, timestep in enumerate(steps.timesteps):
            m = respond(x, timestep)
            mean = ddpo_motion.step_mean(steps, i, x, m, m if m_last is None else m_last)
            x, m_last = mean + steps.std[i] * noise[i], m
            states.append(x)
        yield field, error(torch.stack(states), z["dpmsolver/x"]), tolerance


def check_ddim(network, z, alphas_cumprod):
    """DDIM, eta 0: every hundredth timestep from 0 on, and no noise left at the end."""
    x, states, respond = torch.from_numpy(z["x_T"]).double(), [], guided(network, z)
    timesteps = torch.arange(900, -1, -100)
    yield "ddim/timesteps", error(timesteps, z["ddim/timesteps"]), 0.0
    ratio = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()[timesteps]
    grid = samplers.Grid.from_ratio(timesteps, torch.cat([ratio, torch.zeros(1)]))
    for i, timestep in enumerate(timesteps):
        x, _ = reference.ddim_step(grid, i, x, respond(x, timestep), eta=0.0)
        states.append(x)
    yield "ddim/x", error(torch.stack(states), z["ddim/x"]), 5e-3
