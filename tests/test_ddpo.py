"""The algorithm of ddpo_motion.py against closed forms.

The mutants that must not survive are in test_mutants.py, tests of shared equations in test_shared.py.
"""

import contextlib
import dataclasses
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from einops import rearrange

import ddpo_motion as ddpo
from common import (NonFiniteError, datasets, diffusion, evaluate, generator, lora, retrieval, runs, samplers,
                    training)
from tests import reference

CAPTIONS = ["a person walks forward", "someone turns left slowly", "a man waves",
            "a person jumps twice and claps"]
LONGEST = 24  # frames, six tokens
TINY = {"joint": diffusion.Size(width=16, layers=2, heads=2, patch_dims=8),
        "latent": diffusion.Size(width=16, layers=3, heads=2, patch_dims=12, latents=3, latent_dims=5)}


@contextlib.contextmanager
def sized(space="joint", **changes):
    """--size tiny has the sizes of TINY, and these."""
    size = TINY[space]._replace(**changes)
    with mock.patch.dict(diffusion.SIZES[space], tiny=size):
        yield size


def tiny_model(space="joint", **changes):
    """A frozen denoiser with random weights and a random basis of its patches."""
    args = ddpo.Args(size="tiny", space=space)
    with sized(space, **changes), torch.random.fork_rng(devices=[]):
        model = ddpo.make_model(args, datasets.Vocabulary.from_captions(CAPTIONS))
    training.initialise(model, generator(0, 0, "initialise"))
    codec = model.codec.patches if space == "latent" else model.codec
    basis = torch.randn(codec.basis.shape, generator=generator(0, 0, "basis"))
    codec.basis.copy_(torch.linalg.qr(basis)[0])
    return model.requires_grad_(False).eval()


def tiny_policy(space="joint", b_scale=0.1, bf16=False, longest=LONGEST, **changes):
    """A policy whose adapters already do something (B is not zero); changes: of the arguments."""
    known = dict(size="tiny", space=space, prompts=4, samples=4, lora_rank=4, lora_alpha=4.0)
    args, model = ddpo.Args(**{**known, **changes}), tiny_model(space)
    with sized(space, bf16=bf16):
        policy = ddpo.make_policy(args, model, longest, torch.device("cpu"))
    for k, parameter in enumerate(lora.parameters(model)):
        parameter.data.add_(b_scale * torch.randn(parameter.shape, generator=generator(0, k, "perturb")))
    return args, policy


def rolled_out(order=1, guidance=1.0, lengths=(3, 6, 5, 1)):
    args, policy = tiny_policy(order=order, guidance_scale=guidance)
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    noise = torch.randn(4, 6, 6, 8, generator=generator(0, 0, "noise"))
    states = ddpo.rollout(policy, CAPTIONS, mask, noise)
    return SimpleNamespace(args=args, policy=policy, mask=mask, noise=noise, states=states, trained=4)


def logps(r, states=None, mask=None, trained=None):
    return ddpo.step_logps(r.policy, r.states if states is None else states, CAPTIONS,
                           r.mask if mask is None else mask, trained or r.trained)


# ---- the transition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", samplers.SCHEDULES)
@pytest.mark.parametrize("order", (1, 2))
def test_transition_equals_the_sampler_of_evaluation(schedule, order):
    """Two independent writings of SDE-DPM-Solver++ agree at every step."""
    grid = samplers.make_grid(schedule, 7, "linspace")
    steps = ddpo.solver_steps(grid, order, "sample")
    x, m, m_last = (torch.randn(2, 3, 4, generator=generator(0, k, "x")) for k in range(3))
    for i in range(7):
        used = reference.order_at(grid, i, order)
        mean, std = reference.dpmpp_step(grid, i, x, m, m_last if used == 2 else None)
        mine = ddpo.step_mean(steps, i, x, m, m_last)
        torch.testing.assert_close(mine, mean, rtol=1e-5, atol=1e-5)
        assert float(steps.std[i]) == pytest.approx(float(torch.as_tensor(std).flatten()[0]), abs=1e-6)
    assert [y.shape for y in steps[1:]] == 6 * [(7, 1, 1)] and torch.equal(steps.timesteps, grid.timesteps)


@pytest.mark.parametrize("schedule", ("linear", "scaled_linear"))
def test_what_an_answer_means(schedule):
    """The noise, as the sampler of evaluation understands it; the motion, bit for bit."""
    grid = samplers.make_grid(schedule, 5, "linspace")
    x, answer = (torch.randn(2, 5, 3, 4, generator=generator(0, k, "x")) for k in range(2))
    noise, motion = (ddpo.solver_steps(grid, 1, prediction) for prediction in ("epsilon", "sample"))
    for i in range(5):
        expected = reference.predict_x_start(answer[:, i], x[:, i], grid.alpha[i], grid.sigma[i], "epsilon")
        mine = noise.p[i] * x[:, i] + noise.q[i] * answer[:, i]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        noise.p[:5] * x + noise.q[:5] * answer,
        torch.stack([noise.p[i] * x[:, i] + noise.q[i] * answer[:, i] for i in range(5)], 1))
    assert torch.equal(motion.p[:5] * x + motion.q[:5] * answer, answer)
    for name in ("x_coef", "m_coef", "k", "std"):
        assert torch.equal(getattr(noise, name), getattr(motion, name)), "the answer changes nothing else"


@pytest.mark.parametrize("schedule", samplers.SCHEDULES)
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_only_the_last_step_has_no_variance(schedule, spacing):
    std = ddpo.solver_steps(samplers.make_grid(schedule, 10, spacing), 1, "sample").std
    assert (std[:-1] > 0).all() and std[-1] == 0


def test_the_step_without_variance_cannot_be_trained():
    r = rolled_out()
    with pytest.raises(AssertionError, match="without variance"):
        logps(r, trained=5)


@pytest.mark.parametrize("order", (1, 2))
@pytest.mark.parametrize("guidance", (1.0, 2.5))
def test_one_forward_over_all_steps_gives_the_rollouts_own_means(order, guidance):
    """x_{i+1} = mean + std * noise at rollout, so the re-scored mean must explain the stored states exactly:
    this fails for a timestep off by one, a wrong m_{i-1}, guidance in one pass only, or dropout."""
    r = rolled_out(order, guidance)
    _, mean = logps(r)
    expected = (mean + r.policy.steps.std[:4] * r.noise[:, 1:5]) * r.mask[:, None, :, None]
    torch.testing.assert_close(expected, r.states[:, 1:5], rtol=1e-4, atol=1e-4)


# ---- the log-probability -----------------------------------------------------------------------------------


def test_logp_is_the_mean_over_valid_entries_and_detached():
    mean = torch.zeros(2, 3, 2, requires_grad=True)
    x = torch.tensor([[1.0, 2.0]]).expand(2, 3, 2).clone().requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logp = ddpo.masked_mean_logp(x, mean, torch.tensor(2.0), mask)
    # the same for any number of valid tokens
    expected = -(1 + 4) / 2 / 8 - math.log(2) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(logp, torch.full((2,), expected))
    logp.sum().backward()
    assert x.grad is None, "the action is data: no gradient may flow through x_prev"
    assert mean.grad[0, 2].abs().sum() == 0 and mean.grad[0, 1].abs().sum() > 0


def test_padding_changes_nothing_that_is_valid():
    r = rolled_out()
    before, mean = logps(r)
    dirty = r.states + 10.0 * ~r.mask[:, None, :, None]
    after, dirty_mean = logps(r, dirty)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    keep = r.mask[:, None, :, None]
    torch.testing.assert_close(dirty_mean * keep, mean * keep, rtol=1e-5, atol=1e-5)
    assert (r.states * ~r.mask[:, None, :, None]).abs().max() == 0
    longer = ddpo.rollout(r.policy, CAPTIONS, torch.nn.functional.pad(r.mask, (0, 3)),
                          torch.nn.functional.pad(r.noise, (0, 0, 0, 3)))
    torch.testing.assert_close(longer[:, :, :6], r.states, rtol=1e-4, atol=1e-4)


class LinearDenoiser(torch.nn.Module):
    """m(x) = theta x: then every state is Gaussian and the gradient of E[x^2] has a closed form."""

    def __init__(self, theta):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def encode_text(self, captions):
        return torch.zeros(len(captions), 1, 1), torch.ones(len(captions), 1, dtype=torch.bool)

    def forward(self, x_t, timesteps, mask, text, text_mask):
        return self.theta * x_t


def test_policy_gradient_equals_the_gradient_of_the_expected_reward():
    """Score function over the stored steps, but the deterministic last, against d E[x_{N-1}^2]/d theta."""
    model, n, steps = LinearDenoiser(0.6), 200_000, 5
    grid = samplers.make_grid("linear", steps)
    table = ddpo.Steps(*(y.double() for y in ddpo.solver_steps(grid, 1, "sample")))
    policy = tiny_policy()[1]._replace(model=model, steps=table, tokens=1)
    mask = torch.ones(n, 1, dtype=torch.bool)
    noise = torch.randn(n, steps + 1, 1, 1, generator=generator(0, 0, "mc"), dtype=torch.float64)
    captions = [""] * n
    states = ddpo.rollout(policy, captions, mask, noise)
    rewards = states[:, steps - 1, 0, 0].square()
    logp, _ = ddpo.step_logps(policy, states, captions, mask, steps - 1)
    surrogate = (logp.sum(1) * (rewards - rewards.mean())).mean()
    estimate, = torch.autograd.grad(surrogate, model.theta)

    def expected_reward(theta):
        variance = torch.tensor(1.0, dtype=torch.float64)
        for i in range(steps - 1):
            x_coef, m_coef, std = (float(y[i]) for y in (table.x_coef, table.m_coef, table.std))
            variance = (x_coef + m_coef * theta)**2 * variance + std**2
        return variance

    h = 1e-5
    exact = (expected_reward(0.6 + h) - expected_reward(0.6 - h)) / (2 * h)
    blocks = []  # Monte-Carlo error from independent blocks
    for rows in torch.arange(n).chunk(20):
        logp, _ = ddpo.step_logps(policy, states[rows], captions[: len(rows)], mask[rows], steps - 1)
        part = (logp.sum(1) * (rewards[rows] - rewards.mean())).mean()
        blocks.append(torch.autograd.grad(part, model.theta)[0].item())
    error = np.std(blocks, ddof=1) / math.sqrt(len(blocks))
    assert abs(estimate.item() - exact.item()) < 3 * error and abs(exact.item()) > 10 * error


# ---- advantages and loss -----------------------------------------------------------------------------------


def test_advantages_use_each_prompts_own_mean_and_one_std():
    rewards = torch.tensor([[1.0, 3.0], [10.0, 10.0], [-5.0, -4.0]])
    advantages = ddpo.group_advantages(rewards)
    std = math.sqrt((1 + 1 + 0 + 0 + 0.25 + 0.25) / 6) + 1e-4
    torch.testing.assert_close(advantages, torch.tensor([[-1, 1], [0, 0], [-0.5, 0.5]]) / std)
    assert (ddpo.group_advantages(torch.full((3, 4), 0.7)) == 0).all()
    assert ddpo.group_advantages(torch.tensor([[0.0] * 99 + [1.0]])).max() == 5.0


def test_clipped_loss_is_pessimistic():
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    loss = ddpo.clipped_loss(ratio, advantages, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-0.5, -1.0, -1.2, 0.8, 1.0, 1.5]))
    loss.sum().backward()  # where the clip is active in the harmful direction no gradient is left
    torch.testing.assert_close(ratio.grad, torch.tensor([-1.0, -1.0, 0.0, 0.0, 1.0, 1.0]))


def test_snr_law_gives_every_step_the_same_kl():
    """KL = (SNR_j - SNR_i) |d|^2 / 2 for a shift d of the prediction, hence the weights of --snr-weights."""
    grid = samplers.make_grid("linear", 10)
    steps = ddpo.solver_steps(grid, 1, "sample")
    snr = torch.exp(2 * grid.lam)
    for i in range(9):
        kl = (steps.m_coef[i] / steps.std[i]) ** 2 / 2
        assert float(kl) == pytest.approx(float((snr[i + 1] - snr[i]) / 2), rel=1e-3)
    weights = ddpo.snr_step_weights(grid, 9)
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-6) and (weights.diff() < 0).all()


@pytest.mark.parametrize("prediction", ("sample", "epsilon"))
def test_weighted_steps_move_alike(prediction):
    """A shift d of the answer moves the mean by w sqrt(2 KL) stds in each step, the same with the weights."""
    grid = samplers.make_grid("scaled_linear", 10)
    steps = ddpo.solver_steps(grid, 1, prediction)
    pull = (steps.m_coef * steps.q / steps.std).abs()[:9, 0, 0]
    moved = pull * ddpo.snr_step_weights(grid, 9, prediction)
    torch.testing.assert_close(moved / moved[0], torch.ones(9), rtol=1e-3, atol=1e-3)
    other = {"sample": "epsilon", "epsilon": "sample"}[prediction]
    wrong = pull * ddpo.snr_step_weights(grid, 9, other)
    assert (wrong / wrong[0] - 1).abs().max() > 0.5


# ---- another space, another precision ----------------------------------------------------------------------


def latent_policy(**changes):
    """A small policy over the latents of a VAE that has learnt nothing."""
    return tiny_policy("latent", longest=40, **changes)


def test_latents_have_no_padding_and_their_motions_do():
    args, policy = latent_policy()
    states, mask = ddpo.sample(args, policy, CAPTIONS, torch.tensor([8, 40, 24, 12]), 0, "test", range(4))
    assert states.shape == (4, 6, 3, 5) and mask.all() and policy.tokens == 3
    other, _ = ddpo.sample(args, policy, CAPTIONS, torch.tensor([40, 8, 8, 8]), 0, "test", range(4))
    assert torch.equal(states, other), "the length is the decoder's affair"
    motion, lengths = ddpo.policy_sampler(args, policy)(CAPTIONS, torch.tensor([8, 40, 24, 12]), "test", 0)
    assert motion.shape == (4, 40, 263) and lengths.tolist() == [8, 40, 24, 12]


def test_no_adapter_is_in_the_vae():
    _, policy = latent_policy()
    names = list(lora.adapters(policy.model))
    assert names and not [name for name in names if name.startswith("codec")]
    assert any(name.startswith("layers.0.layers.2.") for name in names) and "text_layers.0.up" in names
    trained = {id(p) for p in lora.parameters(policy.model)}
    assert all(p.requires_grad == (id(p) in trained) for p in policy.model.parameters())


@pytest.mark.parametrize("space, changes", (("latent", dict()), ("latent", dict(order=2)), (
    "latent", dict(guidance_scale=2.5)), ("latent", dict(bf16=True)), ("joint", dict(bf16=True))))
def test_first_ratio_is_one_in_any_space_and_precision(space, changes):
    args, policy = tiny_policy(space, b_scale=0.0 if space == "joint" else 0.1, longest=40, **changes)
    batch = ddpo.collect(args, policy, CAPTIONS, {4: [12, 24, 20]}, 0)
    assert batch["states"].dtype == torch.float32
    rewards = batch["states"][:, -1].mean((1, 2))
    advantages = ddpo.group_advantages(rearrange(rewards, "(p g) -> p g", g=4)).flatten()
    args = dataclasses.replace(args, kept_samples=16, minibatches=1)
    optimizer = torch.optim.AdamW(lora.parameters(policy.model), lr=1e-2)
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    log = ddpo.update(args, policy, batch, advantages, optimizer, 0, Never())
    assert log["first_ratio_error"] == 0 and log["grad_norm"] > 0
    moved = {k for k, v in policy.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.endswith((".A", ".B")) for k in moved)


def test_only_the_denoiser_is_in_bfloat16():
    args, policy = latent_policy()
    _, low = latent_policy(bf16=True)
    states, mask = ddpo.sample(args, policy, CAPTIONS, torch.tensor([8, 40, 24, 12]), 0, "test", range(4))
    results = [ddpo.step_logps(p, states, CAPTIONS, mask, 4) for p in (policy, low)]
    assert all(part.dtype == torch.float32 for part in (*results[0], *results[1]))
    gap = (results[0][1] - results[1][1]).abs()
    assert 0 < gap.max() < 0.1, "means differ by the rounding of the network's answer"


@pytest.mark.parametrize("space, known, shape", (("joint", (512, 8, 1, True), (16, 263)),
                                                 ("latent", (256, 9, 1, True), (1, 256))))
def test_the_size_of_the_paper_takes_a_step(monkeypatch, space, known, shape):
    """One rollout and one update of two motions at full width; more layers would be repetition."""
    flags = ["--size", "paper", "--space", space, "--micro-batch", "1", "--prompts", "1", "--samples", "2"]
    args = runs.parse_args(ddpo.Args, ddpo.SIZE_ARGS, [*flags, "--minibatches", "1", "--steps", "3"], "x")
    size = diffusion.SIZES[space]["paper"]
    assert (size.width, size.layers, size.patch, size.bf16) == known and args.guidance_scale > 1
    monkeypatch.setitem(diffusion.SIZES[space], "paper", size._replace(layers=1 if space == "joint" else 3))
    with torch.random.fork_rng(devices=[]):
        model = ddpo.make_model(args, datasets.Vocabulary.from_captions(CAPTIONS))
    policy = ddpo.make_policy(args, model, 16, torch.device("cpu"))
    batch = ddpo.collect(args, policy, CAPTIONS, {4: [16]}, 0)
    assert batch["states"].shape == (2, 4, *shape)
    optimizer = torch.optim.AdamW(lora.parameters(policy.model), lr=args.lr)
    log = ddpo.update(args, policy, batch, torch.tensor([1.0, -1.0]), optimizer, 0, Never())
    assert log["first_ratio_error"] == 0 and 0 < log["grad_norm"] < 1e6


def test_a_sampler_at_part_of_its_strength():
    args, policy = latent_policy()
    lengths = torch.tensor([8, 40, 24, 12])
    none, half, full = (ddpo.policy_sampler(args, policy, s)(CAPTIONS, lengths, "test", 0)[0]
                        for s in (0.0, 0.5, 1.0))
    assert torch.equal(full, ddpo.policy_sampler(args, policy)(CAPTIONS, lengths, "test", 0)[0])
    with lora.scaled(policy.model, 0.0):
        base = ddpo.policy_sampler(args, policy)(CAPTIONS, lengths, "test", 0)[0]
    assert torch.equal(none, base)
    assert not torch.equal(half, none) and not torch.equal(half, full)


# ---- the update --------------------------------------------------------------------------------------------


class Never:
    def check(self):
        pass


def one_update(rewards_of_group, iterations=1, **changes):
    """Rollout + update with a given reward function of the states -> model, weights before, last log, ..."""
    args, policy = tiny_policy(**{**dict(kept_samples=0), **changes})
    model = policy.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(lora.parameters(model), lr=args.lr, weight_decay=0.0)
    pool, history = {4: [12, 24, 20]}, []
    for iteration in range(iterations):
        batch = ddpo.collect(args, policy, CAPTIONS, pool, iteration)
        rewards = rewards_of_group(batch)
        history.append(rewards.mean().item())
        advantages = ddpo.group_advantages(rearrange(rewards, "(p g) -> p g", g=4)).flatten()
        log = ddpo.update(args, policy, batch, advantages, optimizer, iteration, Never())
    return SimpleNamespace(model=model, before=before, log=log, history=history, policy=policy, args=args)


def toy_reward(batch):
    """How far the finished motion goes along a fixed direction, per valid token."""
    x, mask = batch["states"][:, -1], batch["mask"]
    return (x[..., 0] * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("changes", ({}, {"order": 2}, {"guidance_scale": 2.5}, {"micro_batch": 3},
                                     {"minibatches": 4}))
def test_first_ratio_is_exactly_one(changes):
    log = one_update(toy_reward, lr=0.0, **changes).log
    assert log["first_ratio_error"] == 0.0
    assert log["ratio_min"] == log["ratio_max"] == 1.0 and log["approx_kl"] == 0.0 and log["clipfrac"] == 0.0


def test_only_adapters_move_and_all_of_them_do():
    run = one_update(toy_reward)
    for name, value in run.model.state_dict().items():
        moved = not torch.equal(value, run.before[name])
        adapter = any(value.data_ptr() == p.data_ptr() for p in lora.parameters(run.model))
        assert moved == adapter, name


def test_constant_reward_leaves_the_weights_untouched():
    run = one_update(lambda batch: torch.full((16,), 0.3), iterations=2, kl_coef=0.0)
    assert all(torch.equal(value, run.before[name]) for name, value in run.model.state_dict().items())


def test_reward_rises_and_a_negated_reward_falls():
    settings = dict(iterations=25, lr=5e-3)
    up, down = one_update(toy_reward, **settings), one_update(lambda b: -toy_reward(b), **settings)
    rise = np.mean(up.history[-5:]) - np.mean(up.history[:5])
    fall = -np.mean(down.history[-5:]) + np.mean(down.history[:5])
    assert rise > 0.02 and fall < -0.02


def test_micro_batches_give_the_same_gradient():
    a, b = one_update(toy_reward), one_update(toy_reward, micro_batch=3)
    for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values()):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-4, msg=name)  # one Adam step of lr 2e-3


def test_samples_that_are_not_kept_have_no_influence():
    """Poison the stored states of the others: the update must stay the same to the last bit."""
    runs_ = []
    for poison in (False, True):
        def rewards(batch, poison=poison):
            values = toy_reward(batch)
            groups = rearrange(values, "(p g) -> p g", g=4)
            kept = ddpo.strongest(ddpo.group_advantages(groups).flatten(), 6)
            others = [row for row in range(16) if row not in kept]
            if poison:
                batch["states"][others] = math.nan
            return values
        runs_.append(one_update(rewards, kept_samples=6))
    a, b = (run.model.state_dict() for run in runs_)
    assert all(torch.equal(a[name], b[name]) for name in a) and math.isfinite(runs_[1].log["loss"])
    whole = one_update(toy_reward, kept_samples=0).model.state_dict()
    assert any(not torch.equal(a[name], whole[name]) for name in a)


def test_words_are_dropped_and_swapped_at_their_rates_in_training_only(monkeypatch):
    model = tiny_model()
    captions = ["a person turns left slowly and waves"] * 4000
    ids, mask = model.vocabulary.encode(captions)
    seen = []
    monkeypatch.setattr(model.words, "forward", lambda x: seen.append(x) or torch.zeros(*x.shape, 16))
    model.encode_text(captions)
    for drop, swap in ((0.2, 0.0), (0.0, 0.3)):
        monkeypatch.setattr(datasets, "WORD_DROP", drop)
        monkeypatch.setattr(datasets, "WORD_SWAP", swap)
        model.encode_text(captions, generator(0, 0, "words"))
    plain, dropped, swapped = seen
    assert torch.equal(plain, ids)
    assert set(dropped[dropped != ids].tolist()) == {1}
    known = mask & (ids != 1)
    assert (dropped != ids)[known].float().mean() == pytest.approx(0.2, abs=0.01)
    size = len(model.vocabulary)
    stays = 1 / (size - 1)  # the random word may be the word itself
    assert (swapped != ids)[known].float().mean() == pytest.approx(0.3 * (1 - stays), abs=0.01)
    assert set(swapped[mask & (swapped != ids)].tolist()) == set(range(1, size))
    assert torch.equal(swapped[~mask], ids[~mask]), "padding stays padding"


def test_kl_to_the_base_pulls_back():
    free, held = (one_update(toy_reward, iterations=20, lr=5e-3, kl_coef=c) for c in (1e-9, 1.0))
    assert held.log["kl_base"] < free.log["kl_base"]


def test_samples_do_not_depend_on_batch_or_process_count(monkeypatch):
    """Two processes together draw the trajectories of one."""
    args, policy = tiny_policy(samples=2, steps=3)
    pool = {3: [12, 24], 7: [16]}
    whole, parts = ddpo.collect(args, policy, CAPTIONS, pool, 5), []
    for rank in range(2):
        monkeypatch.setattr(runs, "world", lambda device, rank=rank: (rank, 2))
        parts.append(ddpo.collect(args, policy, CAPTIONS, pool, 5))
    assert whole["captions"] == parts[0]["captions"] + parts[1]["captions"]
    assert parts[0]["numbers"] and parts[1]["numbers"] and whole["prompts"] == parts[1]["prompts"]
    assert sorted(parts[0]["numbers"] + parts[1]["numbers"]) == whole["numbers"]
    torch.testing.assert_close(whole["states"], torch.cat([p["states"] for p in parts]), rtol=1e-5, atol=1e-5)
    for group in rearrange(whole["lengths"], "(p g) -> p g", g=2):
        assert group[0] == group[1], "one length per prompt group"


def test_wrong_prompts_is_a_fixed_assignment_without_fixed_points():
    prompts = [f"prompt {k}" for k in range(50)]
    wrong = retrieval.wrong_captions(prompts, 3)
    assert sorted(wrong.values()) == sorted(prompts) and all(a != b for a, b in wrong.items())
    assert wrong == retrieval.wrong_captions(prompts, 3) != retrieval.wrong_captions(prompts, 4)


def length_reward(motion, lengths, captions):
    """A number that tells motion, length and caption of each sample apart."""
    return motion[:, 0, 0] + lengths + torch.tensor([float(len(c)) for c in captions])


def test_rewards_stay_with_their_samples():
    """A reward in another order must not pass: the score of sample k is that of motion k and caption k."""
    _, policy = tiny_policy()
    batch = {"states": torch.randn(4, 2, 3, 8, generator=generator(0, 0, "x")), "captions": CAPTIONS,
             "lengths": torch.tensor([12, 8, 4, 12]), "numbers": [0, 1, 2, 3]}

    def asked(kind, reward=length_reward):
        return ddpo.score(policy, retrieval.control(kind, reward, CAPTIONS, 0), batch, 0)

    motion = policy.model.codec.decode(batch["states"][:, -1])
    torch.testing.assert_close(asked("retrieval"), length_reward(motion, batch["lengths"], CAPTIONS))
    wrong = retrieval.wrong_captions(CAPTIONS, 0)
    torch.testing.assert_close(
        asked("shuffled"), length_reward(motion, batch["lengths"], [wrong[c] for c in CAPTIONS]))
    assert not torch.equal(asked("shuffled"), asked("retrieval"))
    with pytest.raises(NonFiniteError, match="iteration 0: reward nan for 'someone turns left slowly'"):
        asked("retrieval", lambda *batch: torch.tensor([0.1, math.nan, 0.2, 0.3]))


def test_advantages_stay_with_their_samples():
    """update() takes those of all processes and trains the motions that it holds on their own."""
    whole, half = (one_update(toy_reward, minibatches=1), tiny_policy(kept_samples=0, minibatches=1))
    args, policy = half
    batch = ddpo.collect(args, policy, CAPTIONS, {4: [12, 24, 20]}, 0)
    merit = ddpo.group_advantages(rearrange(toy_reward(batch), "(p g) -> p g", g=4)).flatten()
    order = [5, 0, 15, 3, 9, 1, 14, 2, 12, 4, 8, 6, 13, 7, 11, 10]
    batch = {**batch, "states": batch["states"][order], "mask": batch["mask"][order], "numbers": order,
             "captions": [batch["captions"][k] for k in order]}
    optimizer = torch.optim.AdamW(lora.parameters(policy.model), lr=args.lr, weight_decay=0.0)
    log = ddpo.update(args, policy, batch, merit, optimizer, 0, Never())
    assert log["grad_norm"] == pytest.approx(whole.log["grad_norm"], rel=1e-4)
    assert log["loss"] == pytest.approx(whole.log["loss"], abs=1e-6)


def test_a_step_of_the_kl_alone_goes_back_to_the_base():
    """Without a reward the KL is all there is: that of two Gaussians, and the step makes it smaller."""
    run = one_update(lambda batch: torch.full((16,), 0.3), lr=1e-3, kl_coef=1.0, minibatches=1)
    batch = ddpo.collect(run.args, tiny_policy()[1], CAPTIONS, {4: [12, 24, 20]}, 0)

    def distance(policy):
        told = policy, batch["states"], batch["captions"], batch["mask"], 4
        _, mean = ddpo.step_logps(*told)
        with lora.scaled(policy.model, 0.0):
            _, base = ddpo.step_logps(*told)
        std = policy.steps.std[:4].expand_as(mean)
        kl = torch.distributions.kl_divergence(*(torch.distributions.Normal(mu, std) for mu in (mean, base)))
        return torch.stack([kl[k][:, batch["mask"][k]].mean() for k in range(16)]).mean().item()
    before, after = distance(tiny_policy()[1]), distance(run.policy)
    assert run.log["kl_base"] == pytest.approx(before, rel=1e-4) and after < 0.99 * before


def test_later_minibatches_know_the_old_policy():
    """The first step has moved the policy: the ratios of the second are to the one that made the rollout."""
    log = one_update(toy_reward, minibatches=2, lr=1e-3).log
    assert log["first_ratio_error"] == 0 and log["ratio_max"] > 1 + 1e-6 > 1 - 1e-6 > log["ratio_min"]
    assert log["approx_kl"] > 0


def test_samples_are_those_of_their_prompts():
    """Samples of a group stand side by side, and each trajectory is that of its own caption."""
    args, policy = tiny_policy()
    batch = ddpo.collect(args, policy, CAPTIONS, {4: [12, 24, 20]}, 0)
    assert batch["captions"] == [prompt for prompt in batch["prompts"] for _ in range(4)]
    assert sorted(batch["prompts"]) == sorted(CAPTIONS) and batch["numbers"] == list(range(16))
    states, mask = ddpo.sample(args, policy, batch["captions"][5:6], batch["lengths"][5:6], 0, "rollout", [5])
    torch.testing.assert_close(states[0], batch["states"][5], rtol=1e-5, atol=1e-5)
    assert torch.equal(mask[0], batch["mask"][5])


def test_the_loss_falls_along_its_own_gradient():
    """The step must raise the log-probability of what was rewarded: the first-order change of the mean of
    advantage x log-probability is positive."""
    run = one_update(toy_reward, minibatches=1, lr=1e-4, snr_weights=False, kl_coef=0.0)
    args, before = tiny_policy(kept_samples=0)
    batch = ddpo.collect(args, before, CAPTIONS, {4: [12, 24, 20]}, 0)
    merit = ddpo.group_advantages(rearrange(toy_reward(batch), "(p g) -> p g", g=4)).flatten()
    old, new = (ddpo.step_logps(p, batch["states"], batch["captions"], batch["mask"], 4)[0]
                for p in (before, run.policy))
    assert (merit[:, None] * (new - old)).mean() > 1e-7


# ---- the loop ----------------------------------------------------------------------------------------------


def trained(folder, reward, advantages=None, **changes):
    """train() with a given reward at toy size -> policy, weights before."""
    args, policy = tiny_policy(**{**dict(iterations=2, kept_samples=0, eval_every=99), **changes})
    folder.mkdir()
    start = SimpleNamespace(args=args, watch=runs.Stopwatch(), rank=0)
    clips = [datasets.Clip("x", np.zeros((frames, 263), np.float32), CAPTIONS, [[]] * 4, [{}] * 4)
             for frames in (12, 24, 20)]
    domain = SimpleNamespace(splits={"train": clips, "val": clips}, fingerprint="x")
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    with mock.patch.object(evaluate, "check_names", lambda *args: None):
        ddpo.train(start, policy, retrieval.control("", reward, CAPTIONS, 0),
                   advantages or ddpo.group_advantages, CAPTIONS, None, domain, domain, folder)
    return policy, before


def test_training_moves_the_adapters_only(tmp_path):
    policy, before = trained(tmp_path / "run", length_reward)
    adapters = {id(p) for p in lora.parameters(policy.model)}
    for name, value in policy.model.named_parameters():
        assert torch.equal(value, before[name]) != (id(value) in adapters), name


def test_training_with_a_constant_reward_moves_nothing(tmp_path):
    policy, before = trained(tmp_path / "run", lambda *batch: torch.full((16,), 0.3), kl_coef=0.0)
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())


def test_each_group_holds_one_prompt(tmp_path):
    """A reward that knows the prompt alone has no advantage: the baseline is that of the same prompt."""
    policy, before = trained(tmp_path / "run", lambda motion, lengths, captions: torch.tensor(
        [float(len(caption)) for caption in captions]), kl_coef=0.0)
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())


def test_another_baseline_is_one_function(tmp_path):
    """advantages(rewards (p g), captions (p)) decides what is learnt."""
    asked = []

    def nothing(rewards, captions):
        asked.append((rewards, captions))
        return torch.zeros_like(rewards)

    policy, before = trained(tmp_path / "run", length_reward, nothing, kl_coef=0.0)
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    assert [rewards.shape for rewards, _ in asked] == [(4, 4)] * 2
    for rewards, captions in asked:  # the length of a caption is most of this reward
        assert sorted(captions) == sorted(CAPTIONS)
        spread = torch.tensor([float(len(caption)) for caption in captions])
        assert (rewards.mean(1) - spread - rewards.mean() + spread.mean()).abs().max() < 15


# ---- the network -------------------------------------------------------------------------------------------


def test_every_adapter_is_felt_in_eval_mode():
    r = rolled_out()
    model, size = r.policy.model, TINY["joint"]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * (6 * size.text_layers + 10 * size.layers)
    logp, _ = logps(r)
    gradients = torch.autograd.grad(logp.sum(), lora.parameters(model))
    assert all(g.abs().max() > 0 for g in gradients)
    with lora.scaled(model, 0.0):
        base, _ = logps(r)
    assert not torch.equal(base, logp)


def test_adapters_off_is_the_base_bit_for_bit():
    base = tiny_model()
    adapted = tiny_policy()[1].model
    x, t = torch.randn(4, 6, 8, generator=generator(0, 0, "x")), torch.tensor([999.0, 500.0, 100.0, 0.0])
    mask = torch.arange(6)[None] < torch.tensor([3, 6, 5, 1])[:, None]
    with lora.scaled(adapted, 0.0):
        assert torch.equal(base(x, t, mask, *base.encode_text(CAPTIONS)),
                           adapted(x, t, mask, *adapted.encode_text(CAPTIONS)))


def test_codec_without_reduction_is_exact():
    model = tiny_model(patch=2, patch_dims=0)
    model.codec.basis.copy_(torch.eye(len(model.codec.basis)))
    motion = torch.randn(2, 8, 263, generator=generator(0, 0, "motion"))
    torch.testing.assert_close(model.codec.decode(model.codec.encode(motion)), motion, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space, n", (("joint", 6), ("latent", 3)))
def test_the_network_is_differentiable_in_float64(space, n):
    """The only precision in which finite differences say anything."""
    model, captions = tiny_model(space).double(), CAPTIONS[:2]
    x = torch.randn(2, n, model.dims, generator=generator(0, 0, "x"), dtype=torch.float64, requires_grad=True)
    mask, timesteps = torch.ones(2, n, dtype=torch.bool), torch.tensor([10.0, 500.0])
    text = [part.detach() for part in model.encode_text(captions)]
    assert torch.autograd.gradcheck(lambda x: model(x, timesteps, mask, *text), (x,))
