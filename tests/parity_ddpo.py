"""Compare samplers, LoRA layers and the DDPO formulas with reference arrays (see tests/parity.py).

Errors are |mine - theirs| / (1 + |theirs|) at their largest, so a tolerance acts as rtol and atol at once.
"""
import numpy as np
import torch

from common import lora, samplers
from results.studies import PromptTracker

SCHEDULES = {"linear": "linear", "scaledlinear": "scaled_linear", "cosine": "cosine"}
FINALS = {"zero": "zero", "smin": "sigma_min"}


class Rows:
    """Collects the largest error of each field over the cases of a file."""

    def __init__(self):
        self.worst = {}

    def compare(self, field, mine, theirs, tolerance):
        """Add one comparison; another shape, or a NaN or infinity on one side only, is an infinite error."""
        mine = np.asarray(mine.detach() if isinstance(mine, torch.Tensor) else mine, dtype=np.float64)
        theirs = np.asarray(theirs, dtype=np.float64)
        error = np.inf
        if mine.shape == theirs.shape:
            with np.errstate(invalid="ignore"):
                apart = np.where(mine == theirs, 0.0, np.abs(mine - theirs) / (1 + np.abs(theirs)))
            error = float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(initial=0.0))
        before, _ = self.worst.get(field, (0.0, tolerance))
        self.worst[field] = (max(before, error), tolerance)

    def rows(self):
        """[(field, max_error, tolerance)], as tests/parity.py wants it."""
        return [(field, error, tolerance) for field, (error, tolerance) in self.worst.items()]


def cases(path):
    """Reference file -> {case: {field: array}} from its keys `CASE/FIELD`."""
    found = {}
    with np.load(path) as stored:
        for key in stored.files:
            case, _, field = key.partition("/")
            found.setdefault(case, {})[field] = stored[key]
    return found


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    kinds = {"sde": check_dpmpp, "ddim": check_ddim, "lora": check_lora, "ppo": check_stats}
    result = Rows()
    for case, ref in cases(path).items():
        kinds[path.name.split("_")[0]](result, path, case, ref)
    return result.rows()


def check_dpmpp(result, path, case, ref):
    """DPM-Solver++ of common/samplers.py and ddpo_motion.py on the file's nodes, then on our own nodes."""
    import ddpo_motion

    schedule, prediction = path.name.split("_")[2:4]
    order, steps, spacing, final = case.split("_")
    order, steps = int(order[1:]), int(steps[1:])
    fields = ("model_output", "x0", "noise", "x", "timesteps", "edm_sigmas")
    output, x0, noise, x, timesteps, ratio = (torch.from_numpy(ref[field]) for field in fields)
    theirs = samplers.Grid.from_ratio(timesteps, ratio)
    for name in ("alpha", "sigma", "lam"):
        result.compare(name, getattr(theirs, name), ref[name], 1e-5)
    result.compare("order_used", [theirs.order_at(i, order) for i in range(steps)], ref["order_used"], 0.0)
    result.compare("std", theirs.std, ref["std"], 1e-5)

    policy = ddpo_motion.transitions(theirs, order)
    result.compare("std (ddpo_motion)", policy.std, ref["std"], 1e-5)
    x0_tolerance = 1e-5
    if prediction == "epsilon":  # 1 / alpha, large at high noise, multiplies the float32 error of the output
        x0_tolerance = {"linear": 1e-4, "scaledlinear": 2e-5, "cosine": 2e-2}[schedule]
    for i in range(steps):
        older = x0[i - 1] if ref["order_used"][i] == 2 else None
        clean = samplers.predict_x_start(output[i], x[i], theirs.alpha[i], theirs.sigma[i], prediction)
        result.compare("x0", clean, ref["x0"][i], x0_tolerance)
        mean, std = samplers.dpmpp_step(theirs, i, x[i], x0[i], older)
        result.compare("mean", mean, ref["mean"][i], 1e-5)
        result.compare("x", mean + samplers.per_sample(std, mean) * noise[i], ref["x"][i + 1], 1e-5)
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
    result.compare("std (own nodes)", mine.std, ref["std"], 1e-3)
    answers = iter(x0)
    end = samplers.sample(lambda x_t, t: next(answers), mine, x[0], "ddpm" if order == 1 else "sde-dpmpp-2m",
                          noise=lambda i: noise[i])
    result.compare("x[n] (own nodes)", end, ref["x"][-1], 1e-3)


def check_ddim(result, path, case, ref):
    """DDIM with eta and its log-probability; the last row of each batch is the last step of the sampler."""
    import ddpo_motion

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
            x0 = samplers.predict_x_start(output[row], sample[row], grid.alpha[0], grid.sigma[0], prediction)
            mean, std = samplers.ddim_step(grid, 0, sample[row], x0, eta)
            means.append(mean)
            stds.append(std)
        mean, std = torch.stack(means), torch.stack(stds)
        result.compare(f"mean{suffix}", mean, ref["mean"], 1e-3)
        result.compare(f"std{suffix}", std, ref["std"], 1e-5)
        prev = mean + samplers.per_sample(std, mean) * noise
        result.compare(f"prev_sample{suffix}", prev, ref["prev_sample"], 1e-3)
        dense = std > 0  # a step without variance has no density; the public code returns NaN there
        for field, action in (("log_prob", prev), ("log_prob_replay", torch.from_numpy(ref["prev_sample"]))):
            logp = ddpo_motion.masked_mean_logp(action, mean, samplers.per_sample(std, mean),
                                                torch.ones(mean.shape[:2], dtype=torch.bool))
            result.compare(f"{field}{suffix}", logp[dense], ref[field][dense.numpy()], 5e-3)


def check_lora(result, path, case, ref):
    """One adapted layer: output on, off and merged, gradients, scale and number of trained values."""
    weight, x = torch.from_numpy(ref["W"]), torch.from_numpy(ref["x"])
    rank, scaling = int(ref["r"]), float(ref["scaling"])
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias="b" in ref)
    if weight.ndim == 3:
        same = x.shape[-1] - ref["y_base"].shape[-1]
        layer = torch.nn.Conv1d(weight.shape[1], weight.shape[0], weight.shape[2], bias="b" in ref,
                                padding=(weight.shape[2] - 1 - same) // 2)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if "b" in ref:
            layer.bias.copy_(torch.from_numpy(ref["b"]))
    model = torch.nn.Sequential(layer)
    # rslora divides alpha by sqrt(rank) instead of rank and is otherwise the same
    lora.inject(model, "^0$", rank, float(ref["alpha"]) * (rank**0.5 if case.endswith("rslora") else 1))
    result.compare("scaling", model[0].scaling, scaling, 1e-12)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    result.compare("n_trainable", lora.count(trained), ref["n_trainable"], 0)
    values = {f"0.{name}": torch.from_numpy(ref[name]) for name in "AB"}
    lora.load_lora(model, values | {"0.scaling": model[0].scaling})
    y = model(x)
    result.compare("y_lora", y, ref["y_lora"], 1e-5)
    (0.5 * (y * torch.from_numpy(ref["c"])).sum()).backward()
    result.compare("gradA", model[0].A.grad, ref["gradA"], 1e-5)
    result.compare("gradB", model[0].B.grad, ref["gradB"], 1e-5)
    with lora.disabled(model):
        result.compare("y_disabled", model(x), ref["y_disabled"], 1e-5)
        result.compare("y_base", model(x), ref["y_base"], 1e-5)
    lora.merge(model)
    result.compare("W_merged", model[0].weight, ref["W_merged"], 1e-5)
    result.compare("y_merged", model(x), ref["y_merged"], 1e-5)


def check_stats(result, path, case, ref):
    """The per-prompt tracker, the clipped surrogate with its gradient, the masked log-probability."""
    import ddpo_motion

    if case.startswith("tracker"):
        buffer_size, min_count = (int(part[1:]) for part in case.split("_")[1:])
        tracker = PromptTracker(buffer_size, min_count)
        for call in range(sum(key.endswith("/reward") for key in ref)):  # it remembers: keep the order
            advantages = tracker.update(ref[f"e{call}/prompt_id"].tolist(), ref[f"e{call}/reward"])
            result.compare(f"{case}/advantage", advantages, ref[f"e{call}/advantage"], 1e-9)
    elif case.startswith("ppo_clip"):
        log_ratio, advantage = torch.from_numpy(ref["log_ratio"]), torch.from_numpy(ref["advantage"])
        result.compare("ratio", log_ratio.exp(), ref["ratio"], 1e-6)
        ratio = torch.from_numpy(ref["ratio"]).requires_grad_()
        loss = ddpo_motion.clipped_loss(ratio, advantage, float(case.removeprefix("ppo_clip"))).mean()
        loss.backward()
        result.compare("loss", loss, ref["loss"], 1e-6)
        result.compare("grad_ratio", ratio.grad, ref["grad_ratio"], 1e-6)
    elif case == "masked_logp":
        x, mean, mask = (torch.from_numpy(ref[name]) for name in ("x", "mean", "mask"))
        logp = ddpo_motion.masked_mean_logp(x, mean, torch.from_numpy(ref["std"])[:, None, None], mask)
        valid = mask.sum(1) * x.shape[2]
        result.compare("mask", mask.sum(1), ref["length"], 0.0)
        result.compare("logp_mean_valid", logp, ref["logp_mean_valid"], 1e-9)
        result.compare("logp_sum", logp * valid, ref["logp_sum"], 1e-9)
        result.compare("logp_mean_padded", logp * valid / x[0].numel(), ref["logp_mean_padded"], 1e-9)
    else:
        raise KeyError(f"unknown case {case}")
