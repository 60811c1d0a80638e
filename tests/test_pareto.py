"""Selection, weights, tokens and rewards of pareto_motion.py against enumeration. Equations that it shares
with other scripts, and mutants of them, are in test_shared.py and test_mutants.py; golden values in
tests/parity/pareto.py.
"""
import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import pareto_motion as pareto
from common import InputError, NonFiniteError, generator, metrics, retrieval, runs, training
from common.published import t2m_gpt
from tests import token_helpers
from tests.token_helpers import CAPTIONS, Never, normal, plans, retrieval_model, tiny_clips, uniforms

pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(**changes):
    return pareto.Args(**{**dict(prompts=2, samples=4), **changes})


def tiny_policy(shift=0.2):
    return pareto.Policy(*token_helpers.tiny_policy(shift=shift))


def with_tokens(policy, clips):
    """The policy with tokens, whose GPT can be trained."""
    policy = pareto.with_tokens(policy, clips)
    policy.gpt.requires_grad_(True)
    return policy


def the_critic(args, policy):
    return pareto.Critic(policy.gpt, args.critic, generator(args.seed, 0, "critic"))


# ---- selection ---------------------------------------------------------------------------------------------


def beaten(a, b):
    """b dominates a, read off the definition."""
    return all(y >= x for x, y in zip(a, b)) and any(y > x for x, y in zip(a, b))


@pytest.mark.parametrize("n, k", [(1, 3), (7, 2), (16, 3), (40, 3)])
def test_nondominated_by_enumeration(n, k):
    """Random rewards with ties and duplicates: kept are those that nobody beats, and each other one is beaten
    by one that is kept."""
    R = (4 * uniforms(20, n, k)).round()
    mask = pareto.nondominated(R)
    for rows, kept in zip(R.tolist(), mask.tolist()):
        assert kept == [not any(beaten(a, b) for b in rows) for a in rows] and any(kept)
        for row, own in zip(rows, kept):
            assert own or any(beaten(row, other) for other, is_kept in zip(rows, kept) if is_kept)


def test_equal_motions_stay_and_a_tie_in_one_reward_saves_nobody():
    """As good in every reward and better in one: of equals none beats the other."""
    R = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 2.0], [0.0, 2.0, 4.0], [0.0, 1.0, 4.0]])
    assert pareto.nondominated(R).tolist() == [True, True, False, True, False]
    assert pareto.nondominated(torch.ones(4, 3)).all()


def test_selection_does_not_depend_on_order_or_scale():
    R = normal(5, 12, 3)
    mask, order = pareto.nondominated(R), torch.randperm(12, generator=generator(0, 0, "order"))
    assert torch.equal(pareto.nondominated(R[:, order]), mask[:, order])
    scaled = torch.stack([R[..., 0].exp(), 3 * R[..., 1] - 7, R[..., 2] ** 3], -1)
    assert torch.equal(pareto.nondominated(scaled), mask)


@pytest.mark.parametrize("k", (2, 3))
def test_expected_size_of_a_front(k):
    """Independent rewards, 16 motions: H_16 = 3.38 for two, (H^2 + H^(2)) / 2 = 6.50 for three."""
    harmonic, squares = (sum(1 / i**power for i in range(1, 17)) for power in (1, 2))
    expected = harmonic if k == 2 else (harmonic**2 + squares) / 2
    sizes = pareto.nondominated(uniforms(2000, 16, k)).sum(1).double()
    assert abs(sizes.mean() - expected) < 3 * sizes.std() / math.sqrt(2000)


def test_sets_are_of_one_prompt_and_one_token():
    """The second prompt is far better in everything, and so is the second token: all keep a front of their
    own. P, K, N and the number of rewards differ, so exchanged axes fail."""
    R = torch.zeros(2, 3, 5, 3)
    R[..., 0] = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    R[..., 1] = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])  # fronts: motions 1 and 4
    R[1] += 100.0
    R[:, 1] += 10.0
    keep, _ = pareto.select(R, "per-token")
    assert keep.shape == (2, 3, 5) and keep.sum() == 12 and keep[..., [1, 4]].all()
    union, _ = pareto.select(R, "union")
    assert union[:, 1, [1, 4]].all() and union.sum() == 4
    assert pareto.select(R, "none")[0].all() and pareto.select(R, "weighted-sum")[0].all()


def test_the_literal_reading_compares_three_different_motions():
    """Slot i is (reward 0 of token 0's motion i, reward 1 of token 1's, reward 2 of token 2's)."""
    R = normal(4, 3, 6, 3)
    keep, _ = pareto.select(R, "literal")
    for p in range(4):
        slots = [[R[p, k, i, k].item() for k in range(3)] for i in range(6)]
        expected = [not any(beaten(a, b) for b in slots) for a in slots]
        assert all(keep[p, c].tolist() == expected for c in range(3))


def test_own_reward_is_that_of_the_token():
    R = torch.arange(2 * 3 * 4 * 3.0).reshape(2, 3, 4, 3)
    own = pareto.own_reward(R)
    assert own.shape == (2, 3, 4)
    assert all(own[p, c, n] == R[p, c, n, c] for p in range(2) for c in range(3) for n in range(4))


def test_weights_are_one_over_the_size_of_the_set():
    """Two motions beat two, one beats three, four are equal."""
    R = torch.zeros(1, 3, 4, 2)
    R[0, 0] = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    R[0, 1, 0] = 1.0
    keep, weight = pareto.select(R, "per-token")
    expected = [[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25] * 4]
    assert weight[0].tolist() == expected and torch.equal(keep, weight > 0)
    keep, weight = pareto.select(normal(1, 3, 4, 2), "union")
    assert 1 < keep.sum() < 12 and torch.allclose(weight[0], keep[0] / keep.sum())


def test_rewards_stay_with_their_samples():
    """Row k is asked for with motion, length, caption and clip of row k."""
    batch = dict(motion=torch.arange(3.0)[:, None, None], lengths=torch.tensor([4, 8, 12]),
                 captions=["a", "b", "c"], clips=[7, 8, 9])

    def rewards(motion, lengths, captions, clips):
        return torch.stack([motion[:, 0, 0], 10.0 * lengths + torch.tensor([ord(c) for c in captions]),
                            torch.tensor(clips).float()], 1)
    assert pareto.score(rewards, batch, 0).tolist() == [[0, 137, 7], [1, 178, 8], [2, 219, 9]]


def test_standardise_by_hand():
    """Within a set, over the motions that are counted; a constant set stays zero."""
    r = torch.tensor([[[1.0, 3.0, 50.0], [2.0, 2.0, 2.0]]])
    every = pareto.standardise(r, torch.ones_like(r, dtype=torch.bool))
    torch.testing.assert_close(every.mean(2), torch.zeros(1, 2), rtol=0, atol=1e-6)
    assert every[0, 1].tolist() == [0.0, 0.0, 0.0] and 0.9 < every[0, 0].square().mean() <= 1.0
    some = pareto.standardise(r, torch.tensor([[[True, True, False], [True, True, True]]]))
    assert some[0, 0, 0] == -some[0, 0, 1] and 0.9 < some[0, 0, 1] <= 1.0
    two = torch.tensor([[[True, True, False]] * 2])
    moved = pareto.standardise(r + 7 * torch.eye(3)[2], two)
    assert torch.equal(moved[..., :2], pareto.standardise(r, two)[..., :2])


# ---- tokens ------------------------------------------------------------------------------------------------


def test_mixing():
    """Eq. (11): alpha 0 is the plain text bit for bit, alpha 1 the text with the token, linear between."""
    f_t, f_tk = normal(4, 6), normal(4, 6, k=1)
    assert torch.equal(pareto.mix(f_t, f_tk, 0.0), f_t) and torch.equal(pareto.mix(f_t, f_tk, 1.0), f_tk)
    torch.testing.assert_close(pareto.mix(f_t, f_tk, 0.3), f_t + 0.3 * (f_tk - f_t))


def test_the_supervised_gpt_reads_no_token():
    """They are twelve texts long, each in a dimension of its own, and change nothing before the training; a
    policy that is stored with them reads them again."""
    policy, clips = tiny_policy(shift=0.0), tiny_clips()
    text, drawn = policy.text([clip.captions[0] for clip in clips]), torch.tensor([[1, 5, 3]] * 6)
    before = policy.gpt(drawn, text)[0]
    policy = pareto.with_tokens(policy, clips)
    tokens = policy.tokens
    assert tokens.shape == (3, 19) and (tokens[:, :16] == 0).all() and not tokens.requires_grad
    length = text.square().sum(1).mean().sqrt()
    torch.testing.assert_close(tokens[:, 16:], 12 * length * torch.eye(3))
    for gpt in (policy.gpt, policy.reference):
        for weights in torch.eye(3):
            wide = pareto.read_text(policy, [clip.captions[0] for clip in clips], weights, 0.7)
            assert wide.shape == (6, 19)
            torch.testing.assert_close(gpt(drawn, wide)[0], before, rtol=1e-4, atol=1e-5)
    stored = t2m_gpt.networks(policy)
    loaded = pareto.load_policy(arguments(load="policy.pt"), stored, torch.device("cpu"))
    assert torch.equal(loaded.gpt(drawn, wide)[0], policy.gpt(drawn, wide)[0])
    assert torch.equal(loaded.tokens, tokens)


def test_each_motion_is_asked_for_with_its_own_token():
    """In sampling and in the passes of the update alike."""
    args, clips = arguments(alpha=0.4), tiny_clips()
    policy = with_tokens(tiny_policy(), clips)
    batch = pareto.collect(args, policy, clips, 0)
    assert batch["token"].tolist() == ([0] * 4 + [1] * 4 + [2] * 4) * 2 and len(batch["captions"]) == 24
    assert len(set(batch["captions"][:12])) == len(set(batch["captions"][12:])) == 1
    plain = torch.nn.functional.pad(policy.text(list(batch["captions"])).detach(), (0, 3))
    torch.testing.assert_close(batch["text"], plain + 0.4 * policy.tokens[batch["token"]])
    motion, lengths, drawn = pareto.sample(policy, batch["text"], args.seed, 0, "rollout", range(24), 1.0)
    assert torch.equal(drawn, batch["tokens"]) and torch.equal(motion, batch["motion"])
    none = pareto.collect(arguments(alpha=0.0), policy, clips, 0)
    torch.testing.assert_close(none["text"], plain)
    batch = pareto.collect(args, policy._replace(tokens=None), clips, 0)
    torch.testing.assert_close(batch["text"], plain)
    assert batch["token"].tolist() == [0] * 24 and len(batch["captions"]) == 24


def test_two_processes_draw_the_samples_of_one(monkeypatch):
    args, clips = arguments(prompts=5), tiny_clips()
    policy, parts = with_tokens(tiny_policy(), clips), []
    whole = pareto.collect(args, policy, clips, 3)
    for rank in range(2):
        monkeypatch.setattr(runs, "world", lambda device, rank=rank: (rank, 2))
        parts.append(pareto.collect(args, policy, clips, 3))
    assert parts[0]["numbers"] + parts[1]["numbers"] == whole["numbers"] == list(range(60))
    for name in ("tokens", "token", "lengths"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    assert len(parts[0]["numbers"]) % 12 == 0, "a prompt is never split"


# ---- the update --------------------------------------------------------------------------------------------


def chosen(args, policy, batch, R):
    """choose() and what the loop makes of it -> batch of the counted, counted, dominated, log"""
    weights = torch.tensor(runs.parse_weights(args.weights, pareto.REWARDS, "--weights"))
    sets = 1 if policy.tokens is None else 3
    r, weight, counted, dominated, log = pareto.choose(args, R, sets, weights)
    weight = pareto.token_weights(weight[batch["numbers"]], batch["mask"], args.reduction)
    batch = batch | {"r": r[batch["numbers"]], "weight": weight}
    return training.select_rows(batch, counted), counted, dominated, log


def assess(args, policy, critic, batch, plan):
    """assess() with the motions of each token whitened apart."""
    groups = [batch["token"] == token for token in range(1 if policy.tokens is None else 3)]
    return pareto.assess(args, policy, critic, batch, groups, plan)


def prepared(R=None, selection="per-token", **changes):
    """Everything up to the update, with random rewards."""
    args = arguments(**{**dict(epochs=1, kl_coef=0.1, selection=selection), **changes})
    policy, clips = tiny_policy(), tiny_clips()
    if selection != "weighted-sum":
        policy = pareto.with_tokens(policy, clips)
    policy.gpt.requires_grad_(True)
    critic = the_critic(args, policy)
    critic.value.weight.data.copy_(0.3 * normal(*critic.value.weight.shape, k=3))
    whole = pareto.collect(args, policy, clips, 0)
    R = normal(24, 3, k=5) if R is None else R
    batch, kept, dominated, log = chosen(args, policy, whole, R)
    plan = plans(args, rows=kept, index=batch["numbers"], apart=dominated)
    log |= assess(args, policy, critic, batch, plan)
    sets = 1 if policy.tokens is None else 3
    keep, weight = (part.flatten() for part in pareto.select(R.reshape(2, sets, -1, 3), selection))
    return SimpleNamespace(args=args, policy=policy, critic=critic, batch=batch, kept=kept, plan=plan,
                           log=log, R=R, keep=keep, weight=weight)


def step(s, lr=1.0):
    """update() with plain gradient descent -> log, moves of the policy, moves of the critic"""
    parts = s.policy.gpt, s.critic
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    optimizer = torch.optim.SGD([{"params": list(part.parameters())} for part in parts], lr=lr)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pareto, "MAX_GRAD_NORM", 1e9)
        log = pareto.update(s.args, s.policy, s.critic, s.batch, s.plan, optimizer, 0, Never())
    return log, *({name: old[name] - value for name, value in part.state_dict().items()}
                  for part, old in zip(parts, before))


def policy_gradient(s, weights):
    """Of sum_b w_b mean_t (-A_t log pi) / sum_b w_b, which is that of the first update."""
    policy, batch = s.policy, s.batch
    logp, *_ = pareto.score_actions(policy.gpt, None, batch["tokens"], batch["text"], policy.vq.shortest,
                                    s.args.temperature)
    mean = (logp * batch["advantages"] * batch["mask"]).sum(1) / batch["mask"].sum(1)
    return torch.autograd.grad(-(weights * mean).sum() / weights.sum(), list(policy.gpt.parameters()),
                               allow_unused=True)


@pytest.mark.parametrize("temperature", (1.0, 1.5))
def test_the_first_ratio_is_one_and_the_gradient_that_of_the_kept(temperature):
    """Weight 1 / n(P) of each kept motion, a mean over its tokens; dominated ones give nothing."""
    s = prepared(temperature=temperature)
    assert 0 < s.keep.sum() < 24 and s.kept == list(range(24)), "all take part, some without a weight"
    wanted = policy_gradient(s, s.weight)
    log, moves, _ = step(s)
    assert log["first_ratio_error"] == 0.0
    for (name, _), value in zip(s.policy.gpt.named_parameters(), wanted):
        torch.testing.assert_close(moves[name], value, rtol=1e-3, atol=1e-6, msg=name)
    assert max(value.abs().max() for value in moves.values()) > 1e-3


def test_a_dominated_motion_gives_no_policy_gradient():
    """Whatever its advantage; a kept one does."""
    for row, moves_something in ((0, False), (1, True)):
        s = prepared()
        chosen = (~s.keep if row == 0 else s.keep).nonzero()[0, 0]
        s.batch["advantages"] = torch.zeros_like(s.batch["advantages"])
        s.batch["advantages"][chosen] = 5.0
        _, moves, _ = step(s)
        assert (max(value.abs().max() for value in moves.values()) > 0) == moves_something


def test_a_minibatch_may_hold_dominated_motions_alone():
    s = prepared(minibatches=24)
    log, moves, _ = step(s, lr=0.01)
    assert all(math.isfinite(value) for value in log.values())
    assert all(torch.isfinite(value).all() for value in moves.values())


@pytest.mark.parametrize("kind", ("shared-detach", "shared"))
def test_the_critic_learns_from_the_dominated_motions(kind):
    """From them alone here; its gradient bends the policy if the critic is told to be shared."""
    s = prepared(critic=kind)
    s.batch["advantages"] = torch.zeros_like(s.batch["advantages"])
    rows = torch.tensor([k in s.keep.nonzero()[:, 0].tolist() for k in s.batch["numbers"]])
    logits, hidden = s.policy.gpt(s.batch["tokens"][:, :-1], s.batch["text"])
    values = s.critic(hidden, None, None)
    s.batch["returns"][rows] = values.detach()[rows]  # nothing to learn from the kept ones
    _, moves, critic = step(s)
    assert critic["value.weight"].abs().max() > 1e-4
    assert (max(value.abs().max() for value in moves.values()) > 1e-5) == (kind == "shared")


def test_what_the_dominated_motions_are_used_for():
    """--baseline all: for mean, spread, values and whitening; kept: for nothing at all."""
    for baseline, matters in (("all", True), ("kept", False)):
        a = prepared(baseline=baseline)
        lower = torch.where(a.keep[:, None], a.R, a.R - 3.0)  # the same fronts
        b = prepared(lower, baseline=baseline)
        assert torch.equal(a.keep, b.keep) and len(a.batch["numbers"]) == (24 if matters else a.keep.sum())
        rows = [a.batch["numbers"].index(k) for k in a.keep.nonzero()[:, 0].tolist()]
        same = torch.equal(a.batch["advantages"][rows], b.batch["advantages"][rows])
        assert same != matters
        moves = [step(s)[1:] for s in (a, b)]
        for one, other in zip(*moves):
            assert all(torch.equal(one[name], other[name]) for name in one) != matters


def test_advantages_are_whitened_for_each_token_apart():
    """One reward of a hundred times the spread must not take all of the gradient."""
    s = prepared(normal(24, 3) * torch.tensor([1.0, 100.0, 0.01]), kl_coef=0.0)
    for token in range(3):
        own = s.batch["mask"] & (s.batch["token"] == token)[:, None]
        values = s.batch["advantages"][own]
        assert abs(values.mean()) < 1e-5 and values.square().mean() == pytest.approx(1.0, abs=1e-3)


def test_the_reward_is_that_of_the_motions_token():
    R, every = normal(24, 3), torch.ones(2, 3, 4, dtype=torch.bool)
    own = R[torch.arange(24), torch.arange(24) // 4 % 3]
    for token_reward, expected in (("own", own), ("mean", R.mean(1))):
        s = prepared(R, token_reward=token_reward)
        wanted = pareto.standardise(expected.reshape(2, 3, 4), every).flatten()
        torch.testing.assert_close(s.batch["r"], wanted)
        torch.testing.assert_close(s.log["own"], expected.mean())


def test_the_weighted_sum_has_no_tokens_and_keeps_all():
    R = normal(24, 3)
    s = prepared(R, selection="weighted-sum", weights="text=0.5,preference=0.5")
    own = (R @ torch.tensor([0.5, 0.0, 0.5])).reshape(2, 1, 12)
    torch.testing.assert_close(s.batch["r"], pareto.standardise(own, own > -9).flatten())
    assert s.log["kept"] == 1.0 and s.policy.tokens is None
    log, moves, _ = step(s)
    wanted = policy_gradient(prepared(R, selection="weighted-sum", weights="text=0.5,preference=0.5"),
                             torch.ones(24))
    for value, (name, _) in zip(wanted, s.policy.gpt.named_parameters()):
        torch.testing.assert_close(moves[name], value, rtol=1e-3, atol=1e-6, msg=name)


def test_weights_by_motion_or_by_token():
    """Motions weigh alike, or tokens do (Eq. 7 as printed, up to a factor)."""
    for reduction in ("motion", "token"):
        s = prepared(reduction=reduction)
        counts = s.batch["mask"].sum(1)
        total = s.weight if reduction == "motion" else s.weight * counts
        torch.testing.assert_close(s.batch["weight"].sum(1), total)
        assert (s.batch["weight"][~s.batch["mask"]] == 0).all() and len(set(counts.tolist())) > 1


def test_numbers_of_the_selection_are_logged():
    R = normal(24, 3)
    R[:4, 1] = 0.5  # a constant reward in one set
    log = prepared(R).log
    assert log["constant"] == 1 and log["kept"] == pytest.approx(pareto.select(
        R.reshape(2, 3, 4, 3), "per-token")[0].double().mean().item())
    assert [log[name].item() for name in pareto.REWARDS] == pytest.approx(R.mean(0).tolist(), abs=1e-6)


# ---- rewards -----------------------------------------------------------------------------------------------


class Heights:
    """A preference score that looks at the motion alone."""
    def score(self, motion, lengths):
        return torch.stack([m[:n, 3].mean() for m, n in zip(motion, lengths)])


def two_encoders(clips):
    encoders = [retrieval_model(clips), retrieval_model(clips)]
    for weight in encoders[1].parameters():
        weight.data.mul_(1.1)
    return encoders


def rewards(encoders, **changes):
    scales = dict(lambdas=torch.tensor([2.0, 0.5]), low=torch.tensor([-3.0, -2.0, -1.0]),
                  high=torch.tensor([0.0, 1.0, 2.0]))
    return partial(pareto.all_rewards, encoders, Heights(), {**scales, **changes})


def test_the_three_rewards_by_hand():
    """Text: distance to the caption; quality: to the real motion, so nothing is better than that itself;
    preference: of the motion alone. All by the same straight line, without clipping."""
    clips = tiny_clips()
    encoders, motion, lengths = two_encoders(clips), normal(3, 12, 251), torch.tensor([12, 8, 4])
    judge = rewards(encoders)
    R = judge(motion, lengths, CAPTIONS[:3], clips[:3])
    for k, (captions, pairs) in enumerate(((CAPTIONS[:3], clips[:3]),)):
        expected = torch.zeros(2, 3)
        for weight, encoder in zip((2.0, 0.5), encoders):
            text, made, real = retrieval.embed_pairs(encoder, motion, lengths, captions, pairs)
            expected -= weight * torch.stack([(text - made).square().sum(1), (real - made).square().sum(1)])
    torch.testing.assert_close(R[:, 0], (expected[0] + 3) / 3)
    torch.testing.assert_close(R[:, 1], (expected[1] + 2) / 3)
    torch.testing.assert_close(R[:, 2], (Heights().score(motion, lengths) + 1) / 3)
    real = torch.stack([torch.nn.functional.pad(torch.from_numpy(c.features), (0, 0, 0, 16 - len(c.features)))
                        for c in clips[:3]])
    own = judge(real, torch.tensor([len(c.features) for c in clips[:3]]), CAPTIONS[:3], clips[:3])
    torch.testing.assert_close(own[:, 1], torch.full((3,), 2 / 3))  # distance zero
    swapped = judge(motion, lengths, CAPTIONS[1:4], clips[:3])
    assert torch.equal(swapped[:, 1:], R[:, 1:]) and (swapped[:, 0] != R[:, 0]).all()


def test_ranking_loss_by_hand():
    better, worse = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert pareto.ranking_loss(better, worse).item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(pareto.ranking_loss(better + 7, worse + 7), pareto.ranking_loss(better, worse))


def test_ranking_loss_of_hopeless_pairs_stays_finite():
    """log(sigmoid(-120)) is minus infinity in float32; the gradient pulls with full strength."""
    better = torch.tensor([-60.0, 60.0, 0.5], requires_grad=True)
    worse = torch.tensor([60.0, -60.0, 0.0], requires_grad=True)
    loss = pareto.ranking_loss(better, worse)
    loss.backward()
    assert loss.item() == pytest.approx((120 + math.log(1 + math.exp(-0.5))) / 3, rel=1e-6)
    assert better.grad[0].item() == pytest.approx(-1 / 3) and worse.grad[0].item() == pytest.approx(1 / 3)
    assert (better.grad <= 0).all() and (worse.grad >= 0).all()


def test_normalise_never_clips():
    low, high = torch.tensor([-2.0]), torch.tensor([2.0])
    given = pareto.normalise(torch.tensor([[-6.0], [-2.0], [0.0], [2.0], [10.0]]), low, high)
    assert given[:, 0].tolist() == [-1.0, 0.0, 0.5, 1.0, 3.0]


def test_calibration():
    """lambda: one over the spread of an encoder's distances to the text; min and max: the quantiles of the
    normalised rewards are 0 and 1. Of the reference alone, and the same every time."""
    args, policy, clips = arguments(), tiny_policy(), tiny_clips()
    encoders = two_encoders(clips)
    first, again = (pareto.calibrate(args, policy, 60, encoders, Heights(), clips) for _ in range(2))
    assert first.keys() == {"lambdas", "low", "high"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    shifted = policy._replace(gpt=tiny_policy(shift=0.9).gpt)
    third = pareto.calibrate(args, shifted, 60, encoders, Heights(), clips)
    assert all(torch.equal(first[name], third[name]) for name in first), "the tuned policy plays no part"
    assert (first["high"] > first["low"]).all() and first["lambdas"].shape == (2,)


class Constant:
    def score(self, motion, lengths):
        return torch.full((len(motion),), 2.5)


def test_a_constant_reward_is_reported():
    args, policy, clips = arguments(), tiny_policy(), tiny_clips()
    with pytest.raises(NonFiniteError, match="reward preference is 2.5 for all 30"):
        pareto.calibrate(args, policy, 30, two_encoders(clips), Constant(), clips)


@pytest.mark.parametrize("wrong", (math.nan, math.inf))
def test_a_reward_that_is_no_number_names_prompt_and_reward(wrong):
    """A NaN compares false with everything: it would be kept for ever."""
    args, clips = arguments(), tiny_clips()
    batch = pareto.collect(args, with_tokens(tiny_policy(), clips), clips, 0)

    def broken(motion, lengths, captions, pairs):
        R = rewards(two_encoders(clips))(motion, lengths, captions, pairs)
        R[14, 1] = wrong
        return R
    with pytest.raises(NonFiniteError) as error:
        pareto.score(broken, batch, 7)
    assert f"iteration 7: reward quality {wrong}" in str(error.value)
    assert repr(batch["captions"][14]) in str(error.value)


# ---- the preference of the user ----------------------------------------------------------------------------


def test_parse_weights():
    names = pareto.REWARDS
    assert runs.parse_weights("", names, "--prefer") == pytest.approx([1 / 3] * 3)
    assert runs.parse_weights("text=0.7,quality=0.2,preference=0.1", names, "") == [0.7, 0.2, 0.1]
    assert runs.parse_weights("preference=1", names, "") == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("spec, words", [
    ("text=0.5", "sum to 0.5"), ("text=0.5,quality=0.6", "sum to 1.1"), ("speed=1", "'speed' is none of"),
    ("text=1.5,quality=-0.5", "at least 0"), ("text=nan", "at least 0"), ("text", "'' is no number"),
    ("text=much", "'much' is no number")])
def test_preferences_that_make_no_sense(spec, words):
    with pytest.raises(InputError, match=words) as error:
        runs.parse_weights(spec, pareto.REWARDS, "--prefer")
    assert str(error.value).startswith(f"--prefer {spec}") and "\n" not in str(error.value)


# ---- hypervolume -------------------------------------------------------------------------------------------


def test_hypervolume_laws():
    """A dominated point adds nothing, a new front point never lowers it, order plays no part, and stretched
    axes stretch it. Checked by random points as well."""
    points, zero = uniforms(12, 3).double(), torch.zeros(3)
    volume = metrics.hypervolume(points, zero)
    assert metrics.hypervolume(points.flip(0), zero) == pytest.approx(volume, abs=1e-12)
    worse = torch.cat([points, 0.9 * points[:1]])
    assert metrics.hypervolume(worse, zero) == pytest.approx(volume, abs=1e-12)
    better = torch.cat([points, points.max(0).values[None]])
    corner = points.max(0).values.prod().item()
    assert metrics.hypervolume(better, zero) == pytest.approx(corner) and corner > volume
    factors = torch.tensor([2.0, 0.5, 3.0])
    assert metrics.hypervolume(points * factors, zero) == pytest.approx(3.0 * volume)
    inside = (uniforms(200000, 1, 3, k=1) <= points).all(-1).any(-1).double()
    assert volume == pytest.approx(inside.mean().item(), abs=4 * inside.std().item() / math.sqrt(200000))
    assert metrics.hypervolume(-points, zero) == 0.0
    assert metrics.hypervolume([[2.0, 3.0]], [1.0, 1.0]) == 2.0


# ---- does it learn? ----------------------------------------------------------------------------------------


def learn(alpha, seed):
    """40 iterations with rewards that are the shares of three groups of codes among the tokens: they oppose
    each other -> M[k][j], mean reward j with the token of reward k."""
    args = arguments(alpha=alpha, prompts=3, samples=8, kl_coef=0.02, iterations=60, seed=seed)
    clips = tiny_clips()[:3]
    policy = with_tokens(tiny_policy(shift=0.0), clips)
    critic = the_critic(args, policy)
    parts = [{"params": list(part.parameters())} for part in (policy.gpt, critic)]
    optimizer = torch.optim.AdamW(parts, lr=4e-3, betas=(0.9, 0.99), weight_decay=1e-6)

    def score(tokens):
        groups = torch.stack([(tokens // 4 == k) & (tokens < 12) for k in range(3)], -1).double()
        return (groups.sum(1) / (tokens < 12).sum(1, keepdim=True).clamp(min=1)).float()
    for iteration in range(40):
        batch = pareto.collect(args, policy, clips, iteration)
        batch, kept, dominated, _ = chosen(args, policy, batch, score(batch["tokens"]))
        plan = plans(args, iteration, kept, batch["numbers"], dominated)
        assess(args, policy, critic, batch, plan)
        pareto.update(args, policy, critic, batch, plan, optimizer, iteration, Never())
    matrix = []
    for weights in torch.eye(3):
        text = pareto.read_text(policy, [clip.captions[0] for clip in clips] * 40, weights, alpha)
        *_, drawn = pareto.sample(policy, text, 9, 0, "test", range(len(text)), 1.0)
        matrix.append(score(drawn).mean(0))
    return torch.stack(matrix)


@pytest.mark.parametrize("seed", (0, 1))
def test_each_token_raises_its_own_reward(seed):
    """The diagonal holds the maximum of each column; without the tokens in the text it cannot."""
    matrix = learn(0.5, seed)
    assert (matrix.argmax(0) == torch.arange(3)).all() and (matrix.diagonal() > 0.5).all()
    control = learn(0.0, seed)
    assert (control.max(0).values - control.min(0).values).max() < 0.12
