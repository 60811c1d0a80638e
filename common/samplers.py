"""Noise schedules, sampling grids, and the steps of DDIM, DDPM and DPM-Solver++ (2M) without hidden state.

Variance-preserving convention: x_t = alpha x_start + sigma noise, alpha^2 + sigma^2 = 1.
A grid has N+1 nodes of falling noise; step i leads from node i to i+1 and calls the denoiser at timesteps[i].
Steps are named by their index i: a grid may hold a timestep twice (Karras spacing on the cosine schedule).

    code           meaning
    alpha, sigma   square roots of alphas_cumprod and of 1 - alphas_cumprod at the nodes
    lam, h         log(alpha / sigma), half the log signal-to-noise ratio; its gain over one step
    pred_x_start   the denoiser's estimate of the clean sample at node i

Papers: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Lu et al. 2022 (DPM-Solver++), Karras et al. 2022.
"""
import math
from dataclasses import dataclass

import torch

SCHEDULES = ("linear", "scaled_linear", "cosine")
SPACINGS = ("linspace", "trailing", "leading", "karras")
# name -> (order, stochastic); "ddpm" is also DDIM with eta = 1, "ddim" is DDIM with eta = 0
METHODS = {"ddpm": (1, True), "sde-dpmpp-2m": (2, True), "ddim": (1, False), "dpmpp-2m": (2, False)}


# ---- 1. Schedules and grids --------------------------------------------------------------------------------


def make_betas(schedule, train_steps=1000):
    """Forward-process variances (train_steps,) float64 of a "linear", "scaled_linear" or "cosine" schedule.

    linear: Ho et al. 2020; scaled_linear: Stable Diffusion and MLD; cosine: Nichol & Dhariwal 2021, eq. 17.
    Float64 because 1 - ratio of two close products loses three digits of a log-probability in float32.
    """
    if schedule == "linear":
        return torch.linspace(1e-4, 0.02, train_steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(0.00085**0.5, 0.012**0.5, train_steps, dtype=torch.float64) ** 2
    if schedule == "cosine":
        t = torch.arange(train_steps + 1, dtype=torch.float64) / train_steps
        alphas_cumprod = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    raise ValueError(f"schedule {schedule!r}: one of {SCHEDULES}")


@dataclass(frozen=True, eq=False)
class Grid:
    """N sampling steps between N+1 nodes, all float64: timesteps (N,) int64, alpha, sigma, lam (N+1,)."""

    timesteps: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    lam: torch.Tensor

    @classmethod
    def from_ratio(cls, timesteps, ratio):
        """Grid from the ratios sigma / alpha at the N+1 nodes (0 = no noise left, lam = inf)."""
        ratio = torch.as_tensor(ratio, dtype=torch.float64)
        alpha = (1 + ratio**2).rsqrt()
        return cls(torch.as_tensor(timesteps), alpha, ratio * alpha, -ratio.log())

    @property
    def steps(self):
        """Number of steps N."""
        return len(self.timesteps)

    @property
    def snr(self):
        """Signal-to-noise ratio (alpha / sigma)^2 at the nodes, (N+1,), inf at a noise-free last node."""
        return (2 * self.lam).exp()

    @property
    def std(self):
        """Standard deviation of each stochastic step, (N,): sigma_j sqrt(1 - exp(-2h)); 0 to a clean end."""
        return self.sigma[1:] * (-torch.expm1(-2 * self.lam.diff())).sqrt()

    def order_at(self, index, order):
        """The order a multistep solver uses at a step: 1 at the first, and at the last of a short grid."""
        last = index == self.steps - 1 and (self.steps < 15 or self.sigma[-1] == 0)
        return 1 if index == 0 or last else order


def make_grid(schedule, steps, spacing="linspace", final="zero", train_steps=1000):
    """Grid of `steps` steps; the same nodes as diffusers' DPMSolverMultistepScheduler.

    spacing: "linspace", "trailing" and "leading" (from t = 1 up, as MLD) space timesteps evenly, "karras"
    sigma / alpha evenly in its 7th root.
    final: the last node is noise-free ("zero") or has the smallest noise of training ("sigma_min").
    Karras crowds its steps at the end, where one step of a policy outweighs the others 1000-fold; on the
    cosine schedule its steps are nearly all t = 998: use that pair for comparisons only. Karras with
    "sigma_min" has an empty last step (std 0).
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps {steps}: 1 to {train_steps}")
    alphas_cumprod = (1 - make_betas(schedule, train_steps)).cumprod(0)
    ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()  # of every training timestep
    if spacing == "linspace":
        nodes = torch.linspace(0, train_steps - 1, steps + 1, dtype=torch.float64)
        timesteps = nodes.round().long().flip(0)[:-1]
        ratio = ratios[timesteps]
    elif spacing == "trailing":
        used = torch.arange(steps, dtype=torch.float64) * train_steps / steps
        timesteps = (train_steps - used).round().long() - 1
        ratio = ratios[timesteps]
    elif spacing == "leading":
        timesteps = torch.arange(steps).flip(0) * (train_steps // steps) + 1
        ratio = ratios[timesteps]
    elif spacing == "karras":
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        high, low = ratios[-1] ** (1 / 7), ratios[0] ** (1 / 7)
        ratio = (high + ramp * (low - high)) ** 7  # Karras et al. 2022, eq. 5
        ratio[0] = ratios[-1]
        ratio[1:][ramp[1:] == 1] = ratios[0]  # exact: a rounding error would make the last step's h negative
        after = torch.searchsorted(ratios.log(), ratio.log()).clamp(1, train_steps - 1)
        below, above = ratios[after - 1].log(), ratios[after].log()
        position = after - 1 + ((ratio.log() - below) / (above - below)).clamp(0, 1)
        # diffusers cuts the fraction off on the cosine schedule and rounds it on the others
        timesteps = position.long() if schedule == "cosine" else position.round().long()
    else:
        raise ValueError(f"spacing {spacing!r}: one of {SPACINGS}")
    if final not in ("zero", "sigma_min"):
        raise ValueError(f"final {final!r}: zero or sigma_min")
    end = torch.zeros(1, dtype=torch.float64) if final == "zero" else ratios[:1]
    return Grid.from_ratio(timesteps, torch.cat([ratio, end]))


# ---- 2. One step -------------------------------------------------------------------------------------------


def per_sample(table, like):
    """A float64 scalar or (b,) coefficient -> shaped and cast to multiply `like` (b ...)."""
    table = table.to(device=like.device, dtype=like.dtype)
    return table.reshape(table.shape + (1,) * (like.ndim - table.ndim)) if table.ndim else table


def predict_x_start(output, x_t, alpha, sigma, prediction):
    """The clean sample that a denoiser's output stands for.

    output, x_t (b ...); alpha, sigma float64, scalar or (b,), at the node of x_t.
    prediction: "sample" (the output itself), "epsilon" (the noise) or "v" (Salimans & Ho 2022).
    """
    if prediction == "sample":
        return output
    alpha, sigma = per_sample(alpha, x_t), per_sample(sigma, x_t)
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction == "v":
        return alpha * x_t - sigma * output
    raise ValueError(f"prediction {prediction!r}: sample, epsilon or v")


def ddim_step(grid, index, x_t, pred_x_start, eta=1.0):
    """Step `index` (int or (b,) int64) of DDIM -> mean (b ...) and std (float64, scalar or (b,)).

    Song et al. 2021, eq. 12 and 16: eta = 0 is deterministic, eta = 1 has the DDPM posterior.
    """
    alpha_i, alpha_j = grid.alpha[index], grid.alpha[index + 1]
    sigma_i, sigma_j = grid.sigma[index], grid.sigma[index + 1]
    std = eta * sigma_j / sigma_i * (1 - (alpha_i / alpha_j) ** 2).clamp(min=0).sqrt()
    noise_left = (sigma_j**2 - std**2).clamp(min=0).sqrt()
    epsilon = (x_t - per_sample(alpha_i, x_t) * pred_x_start) / per_sample(sigma_i, x_t)
    return per_sample(alpha_j, x_t) * pred_x_start + per_sample(noise_left, x_t) * epsilon, std


def dpmpp_step(grid, index, x_t, pred_x_start, previous_x_start=None, stochastic=True):
    """Step `index` (int or (b,) int64) of DPM-Solver++ -> mean (b ...) and std (float64, scalar or (b,)).

    previous_x_start: the denoiser's estimate at node index-1, for order 2 (midpoint, "2M"); None for order 1.
    Order 1 equals DDIM with eta = 1 (stochastic) or 0. Lu et al. 2022, Algorithm 2 and (stochastic) appendix.
    """
    h = grid.lam[index + 1] - grid.lam[index]
    carry = grid.sigma[index + 1] / grid.sigma[index] * (torch.exp(-h) if stochastic else 1.0)
    gain = -grid.alpha[index + 1] * torch.expm1(-2 * h if stochastic else -h)
    estimate = pred_x_start
    if previous_x_start is not None:
        k = h / (2 * (grid.lam[index] - grid.lam[index - 1]))
        estimate = pred_x_start + per_sample(k, x_t) * (pred_x_start - previous_x_start)
    mean = per_sample(carry, x_t) * x_t + per_sample(gain, x_t) * estimate
    return mean, grid.std[index] if stochastic else torch.zeros_like(h)


# ---- 3. A whole sample -------------------------------------------------------------------------------------


@torch.no_grad()
def sample(denoise, grid, x_init, method="ddpm", noise=None, mask=None):
    """Run all steps from x_init (b ...), standard normal noise -> samples (b ...).

    denoise(x_t, t (b,) int64) -> pred_x_start (b ...), guidance included. method: a name in METHODS.
    noise(index) -> standard normal (b ...), needed by the stochastic methods; the caller seeds it.
    mask (b t) bool, True = real frame: padded frames are set to 0 after each step: they carry no noise.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: one of {tuple(METHODS)}")
    order, stochastic = METHODS[method]
    if stochastic and noise is None:
        raise ValueError(f"method {method!r} draws noise: give noise(index)")
    x, before = x_init, None
    for index, timestep in enumerate(grid.timesteps.tolist()):
        t = torch.full((len(x),), timestep, dtype=torch.int64, device=x.device)
        pred_x_start = denoise(x, t)
        older = before if grid.order_at(index, order) == 2 else None
        mean, std = dpmpp_step(grid, index, x, pred_x_start, older, stochastic)
        x = mean if std == 0 else mean + per_sample(std, mean) * noise(index)
        if mask is not None:
            x = x * mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        before = pred_x_start
    return x
