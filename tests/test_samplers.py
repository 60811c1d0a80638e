"""Closed forms and identities of the nodes in common/samplers.py and of the steps in tests/reference.py.

The public values are in tests/parity/samplers.py.
"""
import itertools
import math

import numpy as np
import pytest
import torch

from common import InputError, samplers
from common.samplers import make_betas, make_grid
from tests import reference
from tests.reference import ddim_step, dpmpp_step, order_at, predict_x_start, sample, snr, step_std

GRIDS = [pytest.param(*combo, id="-".join(map(str, combo))) for combo in itertools.product(
    samplers.SCHEDULES, samplers.SPACINGS, ("zero", "sigma_min"), (1, 5, 10, 20))]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule, spacing, final, steps", GRIDS)
def test_nodes_lose_noise_and_only_the_last_step_may_be_deterministic(schedule, spacing, final, steps):
    grid = make_grid(schedule, steps, spacing, final)
    assert grid.timesteps.shape == (steps,)
    assert grid.alpha.shape == grid.sigma.shape == grid.lam.shape == (steps + 1,)
    assert (grid.alpha**2 + grid.sigma**2 - 1).abs().max() < 1e-12
    assert (grid.timesteps.diff() <= 0).all() and 0 <= grid.timesteps.min() and grid.timesteps.max() <= 999
    assert torch.isfinite(step_std(grid)).all() and (step_std(grid)[:-1] > 0).all()
    empty = final == "zero" or (spacing == "karras" and steps > 1)  # Karras ends there anyway
    assert (step_std(grid)[-1] == 0) == empty


@pytest.mark.parametrize("spacing, expected", [
    ("linspace", [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]),
    ("trailing", [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
    ("karras", [999, 937, 864, 775, 663, 511, 301, 102, 18, 0])])
def test_timesteps_of_ten_steps_on_the_linear_schedule(spacing, expected):
    assert make_grid("linear", 10, spacing).timesteps.tolist() == expected


def test_betas_at_the_ends():
    linear, scaled, cosine = (make_betas(name) for name in samplers.SCHEDULES)
    assert linear[0].item() == pytest.approx(1e-4) and linear[-1].item() == pytest.approx(0.02)
    assert scaled[0].item() == pytest.approx(0.00085) and scaled[-1].item() == pytest.approx(0.012)
    assert cosine[0].item() == pytest.approx(4.1285e-5, rel=1e-3) and cosine[-1].item() == 0.999
    assert {betas.dtype for betas in (linear, scaled, cosine)} == {torch.float64}


@pytest.mark.parametrize("schedule", samplers.SCHEDULES)
def test_order_1_is_ddim_with_eta_1_and_the_ddpm_posterior(schedule):
    grid, x, x0 = make_grid(schedule, 10), draw(3, 4, 5), draw(3, 4, 5, seed=1)
    for i in range(9):
        mean, std = dpmpp_step(grid, i, x, x0)
        ddim_mean, ddim_std = ddim_step(grid, i, x, x0, eta=1.0)
        # Ho et al. 2020, eq. 7, on the two nodes: beta is the variance added from node i+1 to node i
        bar_i, bar_j = grid.alpha[i] ** 2, grid.alpha[i + 1] ** 2
        beta = 1 - bar_i / bar_j
        posterior = (bar_j.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - bar_j) * x) / (1 - bar_i)
        for other in (ddim_mean, posterior):
            assert torch.allclose(mean, other, rtol=1e-9, atol=1e-9)
        for other in (ddim_std, ((1 - bar_j) / (1 - bar_i) * beta).sqrt()):
            assert torch.allclose(std, other, rtol=1e-7)


def test_deterministic_order_1_is_ddim_with_eta_0():
    grid, x, x0 = make_grid("linear", 10), draw(3, 4), draw(3, 4, seed=1)
    for i in range(10):
        mean, std = dpmpp_step(grid, i, x, x0, stochastic=False)
        other, _ = ddim_step(grid, i, x, x0, eta=0.0)
        assert torch.allclose(mean, other, atol=1e-9) and std == 0
    assert torch.allclose(mean, x0, atol=1e-12)  # the last step lands on the prediction


@pytest.mark.parametrize("schedule, spacing", list(itertools.product(samplers.SCHEDULES, samplers.SPACINGS)))
def test_kl_of_a_step_is_half_the_gain_in_snr(schedule, spacing):
    """A shift d of the prediction costs KL = (SNR_j - SNR_i) |d|^2 / 2; at order 2 times (1 + k)^2."""
    grid, x, x0, shift, older = make_grid(schedule, 10, spacing), *(draw(2, 6, seed=s) for s in range(4))
    for i in range(9):
        for before in (None, older):
            if i == 0 and before is not None:
                continue
            mean, std = dpmpp_step(grid, i, x, x0, before)
            moved, _ = dpmpp_step(grid, i, x, x0 + shift, before)
            kl = ((moved - mean) ** 2).sum() / (2 * std**2)
            k = 0 if before is None else grid.lam.diff()[i] / (2 * grid.lam.diff()[i - 1])
            expected = (snr(grid)[i + 1] - snr(grid)[i]) / 2 * (1 + k) ** 2 * (shift**2).sum()
            assert torch.allclose(kl, expected, rtol=1e-5)


def test_kl_of_an_epsilon_predictor():
    grid, x, epsilon, shift = make_grid("scaled_linear", 10), *(draw(2, 6, seed=s) for s in range(3))
    for i in range(9):
        means = [dpmpp_step(grid, i, x, predict_x_start(e, x, grid.alpha[i], grid.sigma[i], "epsilon"))
                 for e in (epsilon, epsilon + shift)]
        kl = ((means[0][0] - means[1][0]) ** 2).sum() / (2 * means[0][1] ** 2)
        h = grid.lam[i + 1] - grid.lam[i]
        assert torch.allclose(kl, torch.expm1(2 * h) / 2 * (shift**2).sum(), rtol=1e-7)


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v"])
def test_predictions_name_the_same_clean_sample(prediction):
    x0, noise = draw(3, 4), draw(3, 4, seed=1)
    alpha, sigma = torch.tensor([[0.6, 0.8, 0.28], [0.8, 0.6, 0.96]], dtype=torch.float64)
    x = alpha[:, None] * x0 + sigma[:, None] * noise
    output = {"sample": x0, "epsilon": noise, "v": alpha[:, None] * noise - sigma[:, None] * x0}[prediction]
    assert torch.allclose(predict_x_start(output, x, alpha, sigma, prediction), x0, atol=1e-12)


def test_steps_are_found_by_position_although_timesteps_repeat():
    grid = make_grid("cosine", 10, "karras")
    same = (grid.timesteps == 998).nonzero().flatten().tolist()
    assert len(same) > 1
    x, x0 = draw(2, 3), draw(2, 3, seed=1)
    stds = [dpmpp_step(grid, i, x, x0)[1].item() for i in same]
    assert len(set(stds)) == len(same)


def test_a_batch_of_indices_equals_the_steps_one_by_one():
    grid, x, x0, older = make_grid("linear", 10), *(draw(9, 4, 3, seed=s) for s in range(3))
    index = torch.tensor([8, 1, 5, 2, 7, 3, 4, 6, 1])
    mean, std = dpmpp_step(grid, index, x, x0, older)
    for row, i in enumerate(index.tolist()):
        one, one_std = dpmpp_step(grid, i, x[row], x0[row], older[row])
        assert torch.equal(mean[row], one) and std[row] == one_std
    assert torch.equal(ddim_step(grid, index, x, x0)[0][3], ddim_step(grid, 2, x[3], x0[3])[0])


def test_order_rule():
    assert [order_at(make_grid("linear", 5), i, 2) for i in range(5)] == [1, 2, 2, 2, 1]
    assert order_at(make_grid("linear", 20), 19, 2) == 1  # nothing can be extrapolated to infinite lam
    assert order_at(make_grid("linear", 20, final="sigma_min"), 19, 2) == 2
    assert order_at(make_grid("linear", 14, final="sigma_min"), 13, 2) == 1
    assert [order_at(make_grid("linear", 5), i, 1) for i in range(5)] == [1] * 5


@pytest.mark.parametrize("method", reference.METHODS)
def test_sampling_a_gaussian_gives_its_mean_and_spread(method):
    """For data N(2, 0.5^2) the best prediction is known, so every method must return that distribution."""
    grid = make_grid("linear", 200)

    def denoise(x_t, t):
        i = (grid.timesteps == t[0]).nonzero()[0, 0]
        alpha, sigma = grid.alpha[i], grid.sigma[i]
        return 2 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x_t - 2 * alpha)

    x = sample(denoise, grid, draw(20000, 1), method, noise=lambda i: draw(20000, 1, seed=100 + i))
    assert x.mean().item() == pytest.approx(2, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


def test_second_order_is_nearer_to_the_exact_ode():
    def error(method, steps):
        grid = make_grid("linear", steps, "karras", "sigma_min")
        index = iter(range(steps))

        def denoise(x_t, t):
            i = next(index)
            return grid.alpha[i] * 0.25 / (grid.alpha[i] ** 2 * 0.25 + grid.sigma[i] ** 2) * x_t

        spread = (grid.alpha**2 * 0.25 + grid.sigma**2).sqrt()  # the exact flow scales x by the spread
        x = torch.ones(1, 1, dtype=torch.float64)
        return abs(sample(denoise, grid, x, method).item() / (spread[-1] / spread[0]).item() - 1)

    assert error("dpmpp-2m", 20) < error("ddim", 20) / 2
    assert error("ddim", 80) / error("ddim", 40) == pytest.approx(1 / 2, rel=0.1)  # what "first order" means
    assert error("dpmpp-2m", 80) / error("dpmpp-2m", 40) == pytest.approx(1 / 4, rel=0.2)


def test_masked_frames_are_zero_and_do_not_touch_the_others():
    grid, noise = make_grid("linear", 5), [draw(2, 6, 3, seed=s).float() for s in range(6)]
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    denoise = lambda x_t, t: 0.5 * x_t
    x = sample(denoise, grid, noise[5], "ddpm", lambda i: noise[i], mask)
    free = sample(denoise, grid, noise[5], "ddpm", lambda i: noise[i])
    assert (x[1, 4:] == 0).all() and torch.equal(x[mask], free[mask]) and (free[1, 4:] != 0).all()
    assert x.dtype == torch.float32


def test_wrong_names_are_refused():
    grid, x = make_grid("linear", 3), draw(1, 2)
    for call in (lambda: make_grid("sqrt", 3), lambda: make_grid("linear", 3, "uniform"),
                 lambda: make_grid("linear", 3, final="none"), lambda: make_grid("linear", 0),
                 lambda: sample(lambda x_t, t: x_t, grid, x, "euler"),
                 lambda: sample(lambda x_t, t: x_t, grid, x, "ddpm"),
                 lambda: predict_x_start(x, x, grid.alpha[0], grid.sigma[0], "score")):
        with pytest.raises(ValueError):
            call()
    assert math.isinf(snr(grid)[-1])


def test_leading_spacing_is_that_of_mld():
    """50 steps of 1000: t = 981, 961 ... 1, and the end has the noise of timestep 0, not none."""
    grid = make_grid("scaled_linear", 50, "leading", "sigma_min")
    assert grid.timesteps.tolist() == list(range(981, 0, -20))
    alphas_cumprod = (1 - make_betas("scaled_linear")).cumprod(0)
    assert torch.allclose(grid.alpha[:-1] ** 2, alphas_cumprod[grid.timesteps], rtol=1e-12)
    assert math.isclose(grid.alpha[-1] ** 2, alphas_cumprod[0], rel_tol=1e-12) and grid.sigma[-1] > 0


@pytest.mark.parametrize("spacing, final, most", [
    ("linspace", "zero", 999), ("linspace", "sigma_min", 999), ("leading", "zero", 999),
    ("leading", "sigma_min", 999), ("trailing", "zero", 1000), ("trailing", "sigma_min", 666),
    ("karras", "zero", 1000)])
def test_numbers_of_steps_without_nodes_of_their_own_are_refused(spacing, final, most):
    """Every number below gives falling noise in each step, and none above is let through."""
    for steps in [*range(1, most, 37), *range(most - 3, most + 1)]:
        noise = make_grid("linear", steps, spacing, final).sigma
        assert len(noise) == steps + 1 and (noise.diff() < 0).all(), steps
    for steps in (0, most + 1, 1000 + (most == 1000), 1001, 5000):
        for refused in (lambda: make_grid("linear", steps, spacing, final),
                        lambda: samplers.check_steps(steps, spacing, final)):
            with pytest.raises(InputError, match=f"^--steps {steps}: must be 1 to {most} with {spacing} "):
                refused()
    samplers.check_steps(most, spacing, final)


def test_which_numbers_of_steps_round_ties_as_numpy_does():
    """diffusers rounds these with numpy: all numbers but those the docstring speaks of are the same."""
    def mine(steps, spacing):
        return make_grid("linear", steps, spacing).timesteps.tolist()

    even = [n for n in range(1, 1000)
            if mine(n, "linspace") != np.linspace(0, 999, n + 1).round()[:0:-1].tolist()]
    trailing = [n for n in range(1, 1001)
                if mine(n, "trailing") != (np.arange(1000, 0, -1000 / n).round() - 1)[:n].tolist()]
    assert even[0] == 26 and len(even) == 138 and not {10, 20, 50, 100} & set(even)
    assert trailing[0] == 48
    for n in (26, 30):
        theirs = np.linspace(0, 999, n + 1).round()[:0:-1]
        assert np.abs(theirs - mine(n, "linspace")).max() == 1
