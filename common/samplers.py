"""Noise schedules of a diffusion, and the nodes at which a sampler stops.

In the variance-preserving convention x_t = alpha m + sigma e, where m is the motion, e standard normal noise,
and alpha^2 + sigma^2 = 1. N steps lead over N+1 nodes of falling noise. Step i leads from node i to node i+1
and calls the network at timesteps[i]. Of the equations of the steps only those of DDIM are here.

    code     meaning
    alpha    square root of alphas_cumprod at a node
    sigma    square root of 1 - alphas_cumprod at a node
    lam      log(alpha / sigma), half the logarithm of the signal-to-noise ratio

Papers: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Lu et al. 2022 (DPM-Solver++), Karras et al. 2022.
"""
import math
from typing import NamedTuple

import torch

from common import InputError

TRAIN_STEPS = 1000  # timesteps of the forward process
SCHEDULES = ("linear", "scaled_linear", "cosine")
SPACINGS = ("linspace", "trailing", "leading", "karras")


def make_betas(schedule):
    """The variances (1000,) of the forward process, in float64, of one of SCHEDULES.

    linear: Ho et al. 2020; scaled_linear: Stable Diffusion and MLD; cosine: Nichol & Dhariwal 2021, eq. 17.
    """
    # In float64, because 1 - ratio of two close products loses three digits of a log-probability in float32.
    if schedule == "linear":
        return torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    if schedule == "cosine":
        t = torch.arange(TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
        alphas_cumprod = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    raise ValueError(f"schedule {schedule!r}: one of {SCHEDULES}")


class Grid(NamedTuple):
    """The nodes of N steps. A timestep may occur twice, so a step is named by its number."""
    timesteps: torch.Tensor  # (N,) int64
    alpha: torch.Tensor      # (N+1,) float64, as are the others
    sigma: torch.Tensor
    lam: torch.Tensor        # infinite at a node without noise

    @classmethod
    def from_ratio(cls, timesteps, ratio):
        """The grid of timesteps (N,) and of the ratios sigma / alpha (N+1,) at its nodes."""
        ratio = torch.as_tensor(ratio, dtype=torch.float64)
        alpha = (1 + ratio**2).rsqrt()
        return cls(torch.as_tensor(timesteps), alpha, ratio * alpha, -ratio.log())


def check_steps(steps, spacing="linspace", final="zero"):
    """InputError at --steps if so many steps of `make_grid` have no nodes of their own: two equal nodes make
    an empty step, without a density and without a second order."""
    # linspace puts steps + 1 nodes on 1000 timesteps; leading starts at t = 1; from 667 steps on trailing
    # comes down to t = 0, which is where "sigma_min" ends.
    most = {"linspace": TRAIN_STEPS - 1, "leading": TRAIN_STEPS - 1,
            "trailing": TRAIN_STEPS if final == "zero" else 2 * TRAIN_STEPS // 3}.get(spacing, TRAIN_STEPS)
    if not 1 <= steps <= most:
        raise InputError(f"--steps {steps}: must be 1 to {most} with {spacing} spacing; with more, two nodes "
                         "are the same")


def make_grid(schedule, steps, spacing="linspace", final="zero"):
    """The Grid of so many steps.

    spacing: "linspace", "trailing" and "leading" (from t = 1 up, as MLD) space the timesteps evenly, "karras"
    the 7th root of sigma / alpha. final: the last node has no noise ("zero"), or the smallest noise of
    training ("sigma_min"). Raises ValueError for an unknown name, and see `check_steps`.

    "leading" has the nodes of diffusers' DDIMScheduler. The others follow its DPMSolverMultistepScheduler,
    but not in every case to the last timestep: a node half way between two timesteps may be rounded the other
    way (first at 26 steps of "linspace", 48 of "trailing"), and "karras" differs by one timestep from 18 on.
    """
    # Karras crowds its steps at the end, where one step of a policy outweighs the others 1000-fold. On the
    # cosine schedule nearly all its steps are t = 998, and with "sigma_min" its last step is empty (std 0).
    check_steps(steps, spacing, final)
    if final not in ("zero", "sigma_min"):
        raise ValueError(f"final {final!r}: zero or sigma_min")
    alphas_cumprod = (1 - make_betas(schedule)).cumprod(0)
    ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()  # sigma / alpha of every training timestep
    if spacing == "linspace":
        nodes = torch.linspace(0, TRAIN_STEPS - 1, steps + 1, dtype=torch.float64)
        timesteps = nodes.round().long().flip(0)[:-1]
    elif spacing == "trailing":
        used = torch.arange(steps, dtype=torch.float64) * TRAIN_STEPS / steps
        timesteps = (TRAIN_STEPS - used).round().long() - 1
    elif spacing == "leading":
        timesteps = torch.arange(steps).flip(0) * (TRAIN_STEPS // steps) + 1
    elif spacing != "karras":
        raise ValueError(f"spacing {spacing!r}: one of {SPACINGS}")
    if spacing == "karras":
        timesteps, ratio = karras(schedule, steps, ratios)
    else:
        ratio = ratios[timesteps]
    end = torch.zeros(1, dtype=torch.float64) if final == "zero" else ratios[:1]
    return Grid.from_ratio(timesteps, torch.cat([ratio, end]))


def karras(schedule, steps, ratios):
    """Timesteps (N,) and ratios sigma / alpha (N,) of Karras spacing; ratios (1000,): of all timesteps."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = ratios[-1] ** (1 / 7), ratios[0] ** (1 / 7)
    ratio = (high + ramp * (low - high)) ** 7  # Karras et al. 2022, eq. 5
    # Both ends are set exactly: a rounding error would make the last step gain noise.
    ratio[0] = ratios[-1]
    ratio[1:][ramp[1:] == 1] = ratios[0]
    # The timestep of a ratio, between those of two training timesteps, on a logarithmic scale.
    after = torch.searchsorted(ratios.log(), ratio.log()).clamp(1, TRAIN_STEPS - 1)
    below, above = ratios[after - 1].log(), ratios[after].log()
    position = after - 1 + ((ratio.log() - below) / (above - below)).clamp(0, 1)
    # diffusers cuts the fraction off on the cosine schedule and rounds it on the others.
    timesteps = position.long() if schedule == "cosine" else position.round().long()
    return timesteps, ratio


def straight_grid(steps):
    """The Grid of a flow, a straight way from noise at time 0 to the motion at time 1; the network is told
    1000 times the time. It has no lam."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    return Grid(TRAIN_STEPS * time[:-1], time, 1 - time, None)


class Steps(NamedTuple):
    """The N steps of a sampler that draws nothing; e_i is the network's answer. (N,) float64 but the last."""
    p: torch.Tensor          # the guess of the finished motion is m_i = p x_i + q e_i
    q: torch.Tensor
    x_coef: torch.Tensor     # x_{i+1} = x_coef x_i + e_coef e_i
    e_coef: torch.Tensor
    timesteps: torch.Tensor  # what the network is told
    level: torch.Tensor      # (N+1,) share of noise in x_i


def ddim_steps(grid, prediction):
    """The Steps of DDIM with eta = 0; on a straight grid these are Euler's steps.

    prediction: the network answers with the motion ("sample"), the noise ("epsilon"), "v" or "velocity".
    """
    alpha, sigma = grid.alpha[:-1], grid.sigma[:-1]
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    # x = alpha m + sigma noise, solved for m; v = alpha noise - sigma m, velocity = m - noise
    p, q = {"sample": (zero, one), "epsilon": (1 / alpha, -sigma / alpha), "v": (alpha, -sigma),
            "velocity": (one, sigma)}[prediction]
    # Song et al. 2021, eq. 12: x_{i+1} = alpha' m + sigma' (x - alpha m) / sigma
    kept = grid.sigma[1:] / sigma
    m_coef = grid.alpha[1:] - kept * alpha
    level = grid.timesteps / TRAIN_STEPS
    level = 1 - level if prediction == "velocity" else level
    return Steps(p, q, kept + m_coef * p, m_coef * q, grid.timesteps,
                 torch.nn.functional.pad(level, (0, 1)))
