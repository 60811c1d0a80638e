"""Compare the sampler's nodes and the steps with reference arrays (see tests/parity)."""
import torch

import ddpo_motion
from common import samplers
from tests import reference
from tests.parity.rows import check_cases

SCHEDULES = {"linear": "linear", "scaledlinear": "scaled_linear", "cosine": "cosine"}
FINALS = {"zero": "zero", "smin": "sigma_min"}


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    return check_cases(path, check_dpmpp if path.name.startswith("sde_") else check_ddim)


def check_dpmpp(result, path, case, ref):
    """DPM-Solver++ of tests/reference.py and ddpo_motion.py on the file's nodes, then on our own nodes."""
    schedule, prediction = path.name.split("_")[2:4]
    order, steps, spacing, final = case.split("_")
    order, steps = int(order[1:]), int(steps[1:])
    fields = ("model_output", "x0", "noise", "x", "timesteps", "edm_sigmas")
    output, x0, noise, x, timesteps, ratio = (torch.from_numpy(ref[field]) for field in fields)
    theirs = samplers.Grid.from_ratio(timesteps, ratio)
    for name in ("alpha", "sigma", "lam"):
        result.compare(name, getattr(theirs, name), ref[name], 1e-5)
    used = [reference.order_at(theirs, i, order) for i in range(steps)]
    result.compare("order_used", used, ref["order_used"], 0.0)
    result.compare("std", reference.step_std(theirs), ref["std"], 1e-5)

    policy = ddpo_motion.solver_steps(theirs, order, "sample")
    result.compare("std (ddpo_motion)", policy.std.flatten(), ref["std"], 1e-5)
    x0_tolerance = 1e-5
    if prediction == "epsilon":  # 1 / alpha, large at high noise, multiplies the float32 error of the output
        x0_tolerance = {"linear": 1e-4, "scaledlinear": 2e-5, "cosine": 2e-2}[schedule]
    for i in range(steps):
        older = x0[i - 1] if ref["order_used"][i] == 2 else None
        clean = reference.predict_x_start(output[i], x[i], theirs.alpha[i], theirs.sigma[i], prediction)
        result.compare("x0", clean, ref["x0"][i], x0_tolerance)
        mean, std = reference.dpmpp_step(theirs, i, x[i], x0[i], older)
        result.compare("mean", mean, ref["mean"][i], 1e-5)
        result.compare("x", mean + reference.per_sample(std, mean) * noise[i], ref["x"][i + 1], 1e-5)
        mean = ddpo_motion.step_mean(policy, i, x[i], x0[i], x0[i] if older is None else older)
        result.compare("mean (ddpo_motion)", mean, ref["mean"][i], 1e-5)

    mine = samplers.make_grid(SCHEDULES[schedule], steps, spacing, FINALS[final])
    apart = mine.timesteps - timesteps
    if (schedule, spacing) == ("cosine", "karras"):  # the public grid cuts off float32 fractions
        result.compare("timesteps (cosine karras)", apart, 0 * apart, 1.0)
    else:
        result.compare("timesteps", apart, 0 * apart, 0.0)
    result.compare("edm_sigmas", mine.sigma / mine.alpha, ref["edm_sigmas"], 1e-3)
    for name in ("alpha", "sigma", "lam"):
        result.compare(f"{name} (own nodes)", getattr(mine, name), ref[name], 1e-3)
    result.compare("std (own nodes)", reference.step_std(mine), ref["std"], 1e-3)
    answers = iter(x0)
    end = reference.sample(lambda x_t, t: next(answers), mine, x[0], "ddpm" if order == 1 else "sde-dpmpp-2m",
                          noise=lambda i: noise[i])
    result.compare("x[n] (own nodes)", end, ref["x"][-1], 1e-3)


def check_ddim(result, path, case, ref):
    """DDIM with eta and its log-probability; the last row of each batch is the last step of the sampler."""
    schedule, prediction, steps, eta, _ = case.split("_")
    eta, stride = float(eta[3:]), 1000 // int(steps[1:])
    sample, output, noise = (torch.from_numpy(ref[name]) for name in ("sample", "model_output", "noise"))
    t = torch.from_numpy(ref["timesteps"])
    own = (1 - samplers.make_betas(SCHEDULES[schedule])).cumprod(0)
    mine = torch.stack([own[t], own[(t - stride).clamp(min=0)]])
    file = torch.stack([torch.from_numpy(ref[name]).double() for name in ("alpha_bar_t", "alpha_bar_prev")])
    result.compare("alpha_bar_t", mine[0], ref["alpha_bar_t"], 1e-5)
    result.compare("alpha_bar_prev", mine[1], ref["alpha_bar_prev"], 1e-5)
    # the references carry float32 errors of 1e-4: 1 - alpha_bar - std^2 cancels in the last step
    for suffix, alpha_bar in (("", file), (" (own nodes)", mine)):
        means, stds = [], []
        for row in range(len(t)):
            nodes = alpha_bar[:, row]
            grid = samplers.Grid.from_ratio(t[row:row + 1], ((1 - nodes) / nodes).sqrt())
            x0 = reference.predict_x_start(output[row], sample[row], grid.alpha[0], grid.sigma[0], prediction)
            mean, std = reference.ddim_step(grid, 0, sample[row], x0, eta)
            means.append(mean)
            stds.append(std)
        mean, std = torch.stack(means), torch.stack(stds)
        result.compare(f"mean{suffix}", mean, ref["mean"], 1e-3)
        result.compare(f"std{suffix}", std, ref["std"], 1e-5)
        prev = mean + reference.per_sample(std, mean) * noise
        result.compare(f"prev_sample{suffix}", prev, ref["prev_sample"], 1e-3)
        dense = std > 0  # a step without variance has no density; the public code returns NaN there
        for field, action in (("log_prob", prev), ("log_prob_replay", torch.from_numpy(ref["prev_sample"]))):
            logp = ddpo_motion.masked_mean_logp(action, mean, reference.per_sample(std, mean),
                                                torch.ones(mean.shape[:2], dtype=torch.bool))
            result.compare(f"{field}{suffix}", logp[dense], ref[field][dense.numpy()], 5e-3)
