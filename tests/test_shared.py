"""Equations that several scripts hold, tested in each of them: a copy is only as right as its own test.

Each test takes the module of a script, so that test_mutants.py can give it a broken one.
"""
import math
from types import SimpleNamespace

import pytest
import torch

from common import datasets, diffusion, generator, training
from tests.run_helpers import load
from tests.test_sync import BLOCKS

CAPTIONS = ["a person walks forward", "someone turns left slowly", "a man waves",
            "a person jumps twice and claps"]

pytestmark = pytest.mark.usefixtures("one_thread")


def holders(block):
    """A test of every script that holds a block; it gets the script's module."""
    return pytest.mark.parametrize("script", BLOCKS[block], indirect=True)


@pytest.fixture
def script(request):
    return load(request.param)


def normal(*shape, k=0):
    return torch.randn(shape, generator=generator(0, k, "shared"))


# ---- the denoiser ------------------------------------------------------------------------------------------


def denoiser(script, layers=2):
    """A denoiser of random weights."""
    size = diffusion.Size(width=16, layers=layers, heads=2, patch_dims=8)
    with torch.random.fork_rng(devices=[]):
        vocabulary = datasets.Vocabulary.from_captions(CAPTIONS)
        model = script.MotionDiffusion(size, vocabulary, diffusion.make_codec(size, 263))
    training.initialise(model, generator(0, 0, "initialise"))
    model.null_text.data.copy_(normal(1, 1, 16, k=9))
    return model


def asked(script):
    """A denoiser and what it is asked: x (4 6 8) of which some is padding, and as many captions."""
    model = denoiser(script)
    mask = torch.arange(6)[None] < torch.tensor([3, 6, 5, 1])[:, None]
    return model, normal(4, 6, 8) * mask[..., None], torch.tensor([999.0, 500.0, 100.0, 0.0]), mask


@holders("denoiser")
def test_sinusoid_by_hand(script):
    table = script.sinusoid(torch.tensor([0, 3]), 4)
    expected = [[0, 0, 1, 1], [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]]
    torch.testing.assert_close(table, torch.tensor(expected))


@holders("denoiser")
def test_padding_is_not_seen(script):
    """Neither that of a motion nor that of a caption, and what stands there is zero."""
    model, x, t, mask = asked(script)
    text, text_mask = model.encode_text(CAPTIONS)
    clean = model(x, t, mask, text, text_mask)
    assert (clean[~mask] == 0).all() and (clean[mask] != 0).all()
    dirty = model(x + 10.0 * ~mask[..., None], t, mask, text + 10.0 * ~text_mask[..., None], text_mask)
    torch.testing.assert_close(dirty, clean, rtol=1e-5, atol=1e-5)
    for row, caption in enumerate(CAPTIONS):  # alone, with no padding at all
        n, one = int(mask[row].sum()), slice(row, row + 1)
        alone = model(x[one, :n], t[one], mask[one, :n], *model.encode_text([caption]))
        torch.testing.assert_close(alone[0], clean[row, :n], rtol=1e-4, atol=1e-5)


@holders("denoiser")
def test_time_place_and_words_are_felt(script):
    model, x, t, mask = asked(script)
    words = model.encode_text(CAPTIONS)
    clean = model(x, t, mask, *words)
    assert (model(x, t + 30, mask, *words) - clean)[mask].abs().mean() > 1e-3
    assert (model(x, t, mask, *model.encode_text(CAPTIONS[::-1])) - clean)[mask].abs().mean() > 1e-3
    whole = torch.ones(4, 6, dtype=torch.bool)
    swapped = model(x.flip(1), t, whole, *words).flip(1)
    assert (swapped - model(x, t, whole, *words)).abs().mean() > 1e-3, "the order of the tokens counts"
    order = model.encode_text(["walks person a forward"])[0]
    assert (order.sum(1) - model.encode_text(["a person walks forward"])[0].sum(1)).abs().max() > 1e-3


@holders("denoiser")
def test_one_function_in_every_mode(script):
    """No dropout: log-probabilities of rollout and update are those of one function, to the last bit."""
    model, x, t, mask = asked(script)
    answers = []
    for mode, grad in ((True, True), (True, False), (False, True), (False, False)):
        model.train(mode)
        with torch.set_grad_enabled(grad):
            answers.append(model(x, t, mask, *model.encode_text(CAPTIONS)).detach())
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@holders("denoiser")
def test_no_caption_is_one_token(script):
    """Where a caption is dropped, the null token stands in its place, whatever the caption was."""
    model = denoiser(script)
    text, text_mask = model.encode_text(CAPTIONS)
    dropped, mask = model.drop_text(text, text_mask, torch.tensor([True, False, True, False]))
    assert mask.sum(1).tolist() == [1, int(text_mask[1].sum()), 1, int(text_mask[3].sum())]
    assert torch.equal(dropped[[1, 3]], text[[1, 3]]) and torch.equal(dropped[0, 0], model.null_text[0, 0])
    x, t, mask_x = normal(1, 6, 8), torch.full((1,), 300.0), torch.ones(1, 6, dtype=torch.bool)
    everything = torch.ones(1, dtype=torch.bool)
    first, second = (model(x, t, mask_x, *model.drop_text(*model.encode_text([caption]), everything))
                     for caption in ("a man waves", "another text of other length altogether"))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


# ---- guidance ----------------------------------------------------------------------------------------------


@holders("predict")
def test_guidance_uses_text_and_null_with_the_stated_weights(script):
    model = denoiser(script)
    x, mask = normal(4, 6, 8), torch.ones(4, 6, dtype=torch.bool)
    text, text_mask = model.encode_text(CAPTIONS)
    t = torch.full((4,), 300.0)
    with_text = model(x, t, mask, text, text_mask)
    null = model(x, t, mask, *model.drop_text(text, text_mask, torch.ones(4, dtype=torch.bool)))

    def guided(scale):
        policy = SimpleNamespace(model=model, guidance_scale=scale)
        return script.predict(policy, x, t, mask, text, text_mask)
    torch.testing.assert_close(guided(2.5), null + 2.5 * (with_text - null), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided(0.0), null, rtol=1e-4, atol=1e-5)
    assert torch.equal(guided(1.0), with_text)


# ---- which samples are trained -----------------------------------------------------------------------------


@holders("strongest")
def test_strongest_advantages_are_kept_whatever_their_sign(script):
    advantages = torch.tensor([0.1, -2.0, 0.0, 1.5, -0.1, 0.2])
    assert script.strongest(advantages, 3) == [1, 3, 5]
    assert script.strongest(advantages, 4) == [0, 1, 3, 5], "of equals the first"
    assert script.strongest(advantages, 0) == list(range(6))


# ---- PPO on tokens: equations by hand ----------------------------------------------------------------------


@holders("ppo")
def test_token_rewards_by_hand(script):
    """The penalty is signed: no abs, no clamp; the motion's reward is at the last action, that of a truncated
    row at its last token, whether the number of valid tokens is 1 or all."""
    old = torch.tensor([[-1.0, -2.0, -3.0]]).expand(3, 3)
    ref = torch.tensor([[-2.0, -2.0, -1.0]]).expand(3, 3)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    rewards = script.token_rewards(torch.tensor([5.0, 6.0, 7.0]), old, ref, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0, 5.2], [-0.1, 6, 0], [6.9, 0, 0]]))


@holders("ppo")
def test_gae_is_the_weighted_sum_of_one_step_errors(script):
    mask = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    rewards, values = normal(3, 6, k=1).double() * mask, normal(3, 6, k=2).double()
    advantages, returns = script.gae(rewards, values, mask, 0.9, 0.8)
    for row, n in enumerate(mask.sum(1).tolist()):
        following = [*values[row, 1:n], 0.0]  # no bootstrap: not behind an end, not at the limit
        delta = [rewards[row, t] + 0.9 * following[t] - values[row, t] for t in range(n)]
        for t in range(n):
            expected = sum(0.72**k * delta[t + k] for k in range(n - t))
            torch.testing.assert_close(advantages[row, t], expected)
    torch.testing.assert_close(returns, (advantages + values) * mask)
    dirty = script.gae(rewards, values + 100.0 * ~mask, mask, 0.9, 0.8)
    assert all(torch.equal(a, b) for a, b in zip(dirty, (advantages, returns))), "values behind the end"
    _, returns = script.gae(rewards, values, mask, 1.0, 1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1) * mask)  # Monte Carlo


@holders("ppo")
def test_whitening_is_over_the_valid_tokens_of_all_processes(script, monkeypatch):
    advantages, mask = 3 * normal(6, 5) + 2, torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 5])[:, None]
    white = script.whiten(advantages, mask)
    assert white[mask].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white[mask].square().mean().item() == pytest.approx(1.0, abs=1e-5), "population variance"
    assert (white[~mask] == 0).all()
    assert torch.equal(script.whiten(advantages + 50.0 * ~mask, mask), white)
    assert script.whiten(torch.full((1, 1), 7.0), torch.ones(1, 1, dtype=torch.bool)).tolist() == [[0.0]]
    monkeypatch.setattr(training, "all_gather_rows", lambda rows: advantages[mask])  # two processes
    parts = [script.whiten(advantages[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.cat(parts), white)


@holders("ppo")
def test_token_loss_is_pessimistic(script):
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    loss = script.clipped_loss(ratio, advantages, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-0.5, -1.0, -1.2, 0.8, 1.0, 1.5]))
    loss.sum().backward()  # where the clip is active in the harmful direction no gradient is left
    torch.testing.assert_close(ratio.grad, torch.tensor([-1.0, -1.0, 0.0, 0.0, 1.0, 1.0]))


@holders("ppo")
def test_value_loss_pulls_to_the_returns(script):
    values = torch.tensor([3.0, 3.0, 0.1], requires_grad=True)
    loss = script.value_loss(values, torch.tensor([1.0, 4.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor([2.0, 0.5, 0.005]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([2.0, -1.0, 0.1]))


@holders("margin")
def test_margin_loss_by_hand(script):
    """d^2 where they belong together, max(0, margin - d)^2 where they do not."""
    text, motion = torch.zeros(4, 2), torch.tensor([[3.0, 4.0], [0.0, 2.0], [3.0, 4.0], [0.0, 1.0]])
    negative = torch.tensor([False, False, True, True])
    loss = script.margin_loss(text, motion, negative, margin=4.0)
    assert loss.item() == pytest.approx((25 + 4 + 0 + 9) / 4)


# ---- PPO on tokens: rollout and update ---------------------------------------------------------------------


def token_policy(script, temperature=1.5, kind="shared-detach"):
    """A random GPT, its reference, a critic that values states, and sequences of the GPT (8 n)."""
    with torch.random.fork_rng(devices=[]):
        gpt, reference = (script.MotionGPT(12, 16, 16, 2, 1, 1, 7) for _ in range(2))
        for k, part in enumerate((gpt, reference)):
            training.initialise(part, generator(0, k, "gpt"))
            part.trans_head["head"].weight.data.mul_(3.0)
        critic = script.Critic(gpt, kind, generator(0, 0, "critic"))
    critic.value.weight.data.copy_(0.3 * normal(*critic.value.weight.shape, k=3))
    text, uniform = normal(8, 16, k=4), torch.rand(8, 6, generator=generator(0, 0, "uniform"))
    tokens, counts = script.rollout(gpt, text, uniform, 2, temperature)
    mask = torch.arange(tokens.shape[1]) <= counts[:, None]  # the end token is an action, too
    args = script.Args(temperature=temperature, critic=kind)
    policy = SimpleNamespace(gpt=gpt, reference=reference.requires_grad_(False),
                             vq=SimpleNamespace(shortest=2), device=torch.device("cpu"))
    return args, policy, critic, dict(tokens=tokens, text=text, mask=mask, lengths=4 * counts, counts=counts)


def logps_of(gpt, batch, temperature):
    """log softmax(logits / T) without an early end, written out -> of all actions (b n v), of the tokens."""
    logits = gpt(batch["tokens"][:, :-1], batch["text"])[0] / temperature
    logits[:, :2, -1] = -1e9
    logps = logits.log_softmax(-1)
    return logps, logps.gather(-1, batch["tokens"].clamp(max=12)[..., None])[..., 0]


@holders("policy")
def test_actions_are_scored_as_they_were_drawn(script):
    """One distribution: temperature, ban of an early end, the token's own place, cache or none."""
    args, policy, critic, batch = token_policy(script)
    assert (batch["counts"] >= 2).all() and (batch["counts"] < 6).any() and (batch["counts"] > 2).any()
    uniform = torch.rand(8, 6, generator=generator(0, 0, "uniform"))
    logps, of_tokens = logps_of(policy.gpt, batch, 1.5)
    logp, every, values = script.score_actions(policy.gpt, critic, batch["tokens"], batch["text"], 2, 1.5)
    torch.testing.assert_close(logp[batch["mask"]], of_tokens[batch["mask"]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(every.exp(), logps.exp(), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(every).all() and values.shape == logp.shape
    cumulative = logps.double().exp().cumsum(-1)  # the inverse transform, of the whole pass
    drawn = (cumulative < uniform[..., None] * cumulative[..., -1:]).sum(-1)
    assert torch.equal(drawn[batch["mask"]], batch["tokens"][batch["mask"]])


@holders("ppo")
def test_rollouts_are_scored_by_hand(script):
    """Old and reference log-probabilities, and KL(pi || pi_ref), not the reverse, over all actions."""
    args, policy, critic, batch = token_policy(script)
    epochs = [training.minibatches(list(range(8)), 2, list(range(8)), 3, generator(0, 0, "shuffle"))]
    mask, batch["r"] = batch["mask"], normal(8, k=8)
    halves = [torch.arange(8) < 3, torch.arange(8) >= 3]  # whitened apart
    log = script.assess(args, policy, critic, batch, halves, epochs)
    old, ref, values = batch["logp_old"], batch["logp_ref"], batch["values"]
    rewards = script.token_rewards(batch["r"], old, ref, mask, args.kl_coef)
    advantages, returns = script.gae(rewards, values, mask, script.GAMMA, args.gae_lambda)
    assert torch.equal(batch["returns"], returns)
    for own in halves:
        white = script.whiten(advantages[own], mask[own])
        torch.testing.assert_close(batch["advantages"][own], white)
    (pi, of_old), (pi_ref, of_ref) = (logps_of(part, batch, 1.5) for part in (policy.gpt, policy.reference))
    torch.testing.assert_close(old[mask], of_old[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ref[mask], of_ref[mask], rtol=1e-4, atol=1e-5)
    kl, reverse = (((a.exp() * (a - b)).sum(-1) * mask).sum(1).mean().item()  # of a whole motion
                   for a, b in ((pi, pi_ref), (pi_ref, pi)))
    assert log["kl_ref"] == pytest.approx(kl, rel=1e-4) and abs(kl - reverse) > 5e-3 * kl
    assert not old.requires_grad and not values.requires_grad


@holders("ppo")
@pytest.mark.parametrize("micro", (0, 3))
def test_an_update_is_the_gradient_of_both_losses(script, micro):
    """Both losses written out: a step of plain gradient descent moves the weights by their gradient."""
    args, policy, critic, batch = token_policy(script)
    args.micro_batch, mask = micro, batch["mask"]
    shift, advantages, returns = (normal(*mask.shape, k=k) for k in (5, 6, 7))
    with torch.no_grad():
        old = logps_of(policy.gpt, batch, 1.5)[1] + 0.3 * shift  # ratios on both sides of the clip
    batch |= {"weight": mask.float(), "logp_old": old, "returns": returns, "advantages": advantages}
    parts = [*policy.gpt.named_parameters(), *critic.named_parameters()]
    before = {f"{k} {name}": value.detach().clone() for k, (name, value) in enumerate(parts)}
    ratio = (logps_of(policy.gpt, batch, 1.5)[1] - old).exp()
    clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    asked = batch["tokens"][:, :-1], batch["text"]
    values = critic(policy.gpt(*asked)[1].detach(), *asked)
    value_loss = 0.5 * (values - returns).square()
    loss = -gain[mask].mean() + script.VF_COEF * value_loss[mask].mean()
    gradients = torch.autograd.grad(loss, [value for _, value in parts], allow_unused=True)
    groups = [list(part.parameters()) for part in (policy.gpt, critic)]
    sizes, norms = [len(group) for group in groups], []
    for part in (gradients[:sizes[0]], gradients[sizes[0]:]):
        norms.append(torch.stack([g.norm() for g in part if g is not None]).norm().item())
    optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=1.0)
    epochs = [training.minibatches(list(range(8)), 1, list(range(8)), micro, generator(0, 0, "shuffle"))]
    loop = SimpleNamespace(check=lambda: None)
    log = script.update(args, policy, critic, batch, epochs, optimizer, 0, loop)
    for k, ((name, value), gradient) in enumerate(zip(parts, gradients)):
        expected = torch.zeros_like(value) if gradient is None else gradient
        norm = norms[k >= sizes[0]]
        expected = expected * min(1.0, script.MAX_GRAD_NORM / norm)
        torch.testing.assert_close(before[f"{k} {name}"] - value.detach(), expected, rtol=2e-3, atol=2e-5,
                                   msg=name)
    assert log["grad_norm"] == pytest.approx(norms[0], rel=1e-3)
    assert log["vf_grad_norm"] == pytest.approx(norms[1], rel=1e-3)
    assert log["pg_loss"] == pytest.approx(-gain[mask].mean().item(), abs=1e-4)
    far = ((ratio - 1).abs() > args.clip_range)[mask].float().mean().item()
    assert log["clipfrac"] == pytest.approx(far, abs=1e-6) and 0.1 < far < 0.9


# ---- what is equal teaches nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("script", ("ddpo", "ppo", "pareto"), indirect=True)
@pytest.mark.parametrize("value", (0.35, 0.1, 1 / 3, -7.7, 123.4))
def test_equal_rewards_teach_exactly_nothing(script, value):
    """A mean of sixteen equal numbers is not always that number; Adam would make full steps of the rest."""
    rewards = torch.full((3, 16), value)
    rewards[2] = torch.linspace(0.0, 1.0, 16)  # a group of another prompt has something to teach
    if hasattr(script, "group_advantages"):
        merit = script.group_advantages(rewards)
    elif hasattr(script, "nondominated"):
        merit = script.standardise(rewards[:, None], torch.ones(3, 1, 16, dtype=torch.bool))[:, 0]
    else:
        merit = script.standardise(rewards)
    assert (merit[:2] == 0).all() and merit[2].abs().min() > 0
