"""The algorithm of ppo_motion.py against closed forms and enumeration. Equations that it shares with other
scripts, and mutants of them, are in test_shared.py and test_mutants.py; golden values in tests/parity/ppo.py.
"""
import copy
import csv
import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import ppo_motion as ppo
from common import NonFiniteError, evaluate, generator, retrieval, runs, training
from common.published import t2m_gpt
from tests.token_helpers import (CAPTIONS, COMPOSED, WIDTH, Never, composed_clips, normal, plans,
                                 retrieval_model, small_gpt, tiny_clips, tiny_policy, uniforms)

pytestmark = pytest.mark.usefixtures("one_thread")


# What this project adds to the paper is off unless a test is about it.
ADDED = {"samples": 1, "kept_samples": 0}


def arguments(**changes):
    return ppo.Args(**{**ADDED, **changes})


def random_critic(gpt, kind):
    """A critic that values states; a fresh one says 0 everywhere, and its own features get no gradient."""
    critic = ppo.Critic(gpt, kind, generator(0, 0, "critic"))
    critic.value.weight.data.copy_(0.3 * normal(*critic.value.weight.shape, k=3))
    return critic


def assess(args, policy, critic, batch, plan):
    """ppo.assess() of one group of motions."""
    return ppo.assess(args, policy, critic, batch, [torch.ones(len(batch["r"]), dtype=torch.bool)], plan)


def prepared(kind="shared-detach", halvings=1, **changes):
    """Everything up to the update, with a random reward; assess() has run."""
    args = arguments(**{**dict(prompts=8, epochs=1, kl_coef=0.1, critic=kind), **changes})
    policy = tiny_policy(halvings)
    policy.gpt.requires_grad_(True)
    critic = random_critic(policy.gpt, kind)
    batch = ppo.collect(args, policy, tiny_clips(), composed_clips(), 0)
    batch["r"], plan = normal(8, k=9), plans(args)
    log = assess(args, policy, critic, batch, plan)
    return SimpleNamespace(args=args, policy=policy, critic=critic, batch=batch, plan=plan, log=log)


def step(s, lr=1.0, **constants):
    """update() with plain gradient descent: what the weights move by is the gradient -> log, moves, moves.
    constants: of the script, in place of its own."""
    before = [copy.deepcopy(part.state_dict()) for part in (s.policy.gpt, s.critic)]
    optimizer = torch.optim.SGD([{"params": list(s.policy.gpt.parameters())},
                                 {"params": list(s.critic.parameters())}], lr=lr)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(ppo, name, value)
        log = ppo.update(s.args, s.policy, s.critic, s.batch, s.plan, optimizer, 0, Never())
    moves = [{name: old[name] - value for name, value in part.state_dict().items()}
             for part, old in zip((s.policy.gpt, s.critic), before)]
    return log, *moves


def largest(moves, *prefixes):
    return max(value.abs().max().item() for name, value in moves.items() if name.startswith(prefixes or ""))


# ---- the action distribution: one function, one temperature, one ban ---------------------------------------


def test_action_logits_divides_by_the_temperature_and_bans_only_early_ends():
    logits = normal(2, 4, 5)
    for first in range(4):
        given = ppo.action_logits(logits, first, 2, 1.5)
        banned = torch.arange(first, first + 4) < 2
        assert torch.equal(given[..., :4], logits[..., :4] / 1.5)
        assert (given[:, banned, 4] == -math.inf).all()
        assert torch.equal(given[:, ~banned, 4], logits[:, ~banned, 4] / 1.5)
    assert ppo.action_logits(logits.bfloat16(), 0, 0, 1.0).dtype == torch.float32  # spec 4.2
    assert ppo.action_logits(logits.double(), 0, 0, 1.0).dtype == torch.float64


def test_log_probabilities_are_finite_and_right_where_the_end_is_banned():
    """Of the actions, and of all of them: a product of 0 and -inf would be no number."""
    logits, tokens = torch.zeros(1, 3, 5), torch.tensor([[0, 1, 4]])
    logp, logps, _ = ppo.score_actions(lambda *_: (logits, None), None, tokens, None, 2, 1.0)
    torch.testing.assert_close(logp, -torch.tensor([[4.0, 4.0, 5.0]]).log())
    expected = torch.tensor([[[0.25] * 4 + [0.0], [0.25] * 4 + [0.0], [0.2] * 5]])
    torch.testing.assert_close(logps.exp(), expected)
    assert torch.isfinite(logps).all()


def sequences(codes, limit, shortest):
    """Every token sequence that can be sampled -> tokens (s n) with end and padding, mask (s n)"""
    rows, end = [], codes
    for n in range(shortest, limit + 1):
        for row in itertools.product(range(codes), repeat=n):
            rows.append([*row, *([end] if n < limit else []), *[end + 1] * (limit - n - 1)])
    tokens = torch.tensor(rows)
    return tokens, torch.cat([tokens[:, :1] >= 0, tokens[:, :-1] < end], 1)


def test_samples_follow_the_distribution_that_is_scored():
    """Chi-square of 20 000 sequences against softmax(logits / T) without an early end, written out here; and
    score_actions, which the update and the reference use, gives the same numbers."""
    gpt, n, temperature = small_gpt(3, 2, 8, block=4, sharp=2.0), 20_000, 1.5
    text = torch.tensor([[0.5, -1.0]])
    tokens, mask = sequences(3, 3, 1)
    logits, _ = gpt(tokens[:, :-1], text.expand(len(tokens), 2))
    logits = logits / temperature
    logits[:, 0, 3] = -math.inf
    each = logits.log_softmax(-1).gather(-1, tokens.clamp(max=3)[..., None])[..., 0]
    logp, _, _ = ppo.score_actions(gpt, None, tokens, text.expand(len(tokens), 2), 1, temperature)
    torch.testing.assert_close(logp[mask], each[mask])
    chance = torch.where(mask, each, 0.0).sum(1).exp().detach()
    assert chance.sum().item() == pytest.approx(1.0, abs=1e-5)

    drawn, counts = ppo.rollout(gpt, text.expand(n, 2), uniforms(n, 3), 1, temperature)
    number = {tuple(row): k for k, row in enumerate(tokens.tolist())}
    found = torch.tensor([number[tuple(row)] for row in drawn.tolist()]).bincount(minlength=len(tokens))
    assert torch.equal(counts, (drawn < 3).sum(1)) and counts.min() == 1
    assert (n * chance).min() > 5, "the statistic needs filled cells"
    chi2 = ((found - n * chance).square() / (n * chance)).sum().item()
    assert len(tokens) - 1 == 38 and chi2 < 80, "38 degrees of freedom: above 80 one time in 10 000"


@pytest.mark.parametrize("shortest", (0, 1, 2, 3))
def test_no_sequence_ends_before_the_shortest_motion(shortest):
    gpt = small_gpt(block=7)
    gpt.trans_head["head"].weight.data[12] = 5 * gpt.trans_head["ln_f"].weight  # the end is likely ...
    gpt.trans_head["ln_f"].bias.data.fill_(1.0)
    tokens, counts = ppo.rollout(gpt, normal(300, 16), uniforms(300, 6), shortest, 1.0)
    assert counts.min() == shortest and (counts == shortest).float().mean() > 0.9  # ... and comes at once
    ended = counts < 6
    assert (tokens[ended, counts[ended]] == gpt.end).all()
    behind = torch.arange(6) > counts[:, None]
    assert (tokens[behind] == gpt.pad).all() and (tokens[~behind] != gpt.pad).all()


def test_the_last_draw_never_falls_off_the_distribution():
    """u just below 1 picks an action that has a chance, also where the end is banned; u = 0 the first."""
    gpt = small_gpt(block=4)
    text = normal(50, 16)
    for u, shortest in itertools.product((0.0, 1 - 2**-24), (0, 3)):
        tokens, _ = ppo.rollout(gpt, text, torch.full((50, 3), u), shortest, 1.0)
        logp, _, _ = ppo.score_actions(gpt, None, tokens, text, shortest, 1.0)
        assert logp[tokens < gpt.pad].min() > -50


def test_cached_decoding_equals_the_whole_forward_at_every_step():
    """Rows end at different times; a position off by one or a stale cache row shows in the logits."""
    gpt, seen = small_gpt(layers=2, block=9), []
    text, forward = normal(16, 16), gpt.forward

    def spy(tokens, text, cache=None):
        out = forward(tokens, text, cache)
        if cache is not None:
            seen.append(out[0])
        return out
    gpt.forward = spy
    tokens, counts = ppo.rollout(gpt, text, uniforms(16, 8), 1, 1.0)
    assert len(counts.unique()) >= 4 and len(seen) == 8
    whole, _ = gpt(tokens[:, :-1], text)
    valid = torch.arange(8) <= counts[:, None]
    torch.testing.assert_close(torch.cat(seen, 1)[valid], whole[valid], rtol=0, atol=1e-5)


def test_a_token_sees_the_text_and_its_past_only():
    gpt, text = small_gpt(layers=2), normal(3, 16)
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5]]).expand(3, 6).clone()
    before, _ = gpt(tokens, text)
    tokens[:, 3] = 7
    after, _ = gpt(tokens, text)
    assert torch.equal(before[:, :4], after[:, :4]) and (before[:, 4:] != after[:, 4:]).any(-1).all()
    assert (gpt(tokens, text + 1)[0] != after).any(-1).all()


def test_a_seed_is_a_sample_and_rows_do_not_depend_on_each_other():
    policy = tiny_policy()
    asked = policy.text(CAPTIONS + COMPOSED)
    first, again = (ppo.sample(policy, asked, 3, 5, "rollout", range(9), 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for seed, iteration, purpose in ((4, 5, "rollout"), (3, 6, "rollout"), (3, 5, "test")):
        other = ppo.sample(policy, asked, seed, iteration, purpose, range(9), 1.0)
        assert not torch.equal(other[2], first[2])
    rows = [7, 2, 4]
    motion, lengths, tokens = ppo.sample(policy, asked[rows], 3, 5, "rollout", rows, 1.0)
    assert torch.equal(tokens, first[2][rows]) and torch.equal(lengths, first[1][rows])
    for part, whole, n in zip(motion, first[0][rows], lengths):
        torch.testing.assert_close(part[:n], whole[:n], rtol=1e-4, atol=1e-4)


# ---- rewards -----------------------------------------------------------------------------------------------


def test_reward_by_hand():
    """Eq. (2): squared distances, lambda_t at the text, lambda_m at the paired motion; text-only rows get the
    mean motion term of the paired ones, whatever stands in their own."""
    f_text = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    f_motion = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
    f_paired = torch.tensor([[1.0, 1.0], [3.0, 0.0], [100.0, 0.0]])
    text, motion = ppo.reward_terms(f_text, f_motion, f_paired)
    assert text.tolist() == [4, 4, 9] and motion.tolist() == [1, 9, 97.0**2]
    r, pseudo = ppo.motion_reward(text, motion, torch.tensor([True, True, False]), 0.5, 2.0)
    assert pseudo == -10 and r.tolist() == [-2 - 2, -2 - 18, -4.5 - 10]
    r, pseudo = ppo.motion_reward(text, motion, torch.zeros(3, dtype=torch.bool), 0.5, 2.0)
    assert pseudo == 0 and r.tolist() == [-2, -2, -4.5]
    perfect = ppo.reward_terms(f_text, f_text, f_text)
    assert ppo.motion_reward(*perfect, torch.tensor([True, False, True]), 0.5, 2.0)[0].tolist() == [0, 0, 0]


def scored(reward="encoders", iteration=0, share=0.5, seed=0):
    args = arguments(prompts=6, text_only_share=share, lambda_t=0.4, lambda_m=2.0, reward=reward, seed=seed)
    policy, clips = tiny_policy(), tiny_clips()
    model = retrieval_model(clips)
    batch = ppo.collect(args, policy, clips, composed_clips(), 0)
    asked = retrieval.control(args.reward, partial(ppo.distances, model), known_captions(), args.seed)
    return SimpleNamespace(batch=batch, model=model, result=ppo.score(args, asked, batch, iteration))


def known_captions():
    return sorted({c for clip in tiny_clips() for c in clip.captions} | set(COMPOSED))


def one_by_one(model, batch, k):
    """Unit embeddings of caption, motion and paired clip of row k, each alone and without padding."""
    n, clip = batch["lengths"][k], batch["clips"][k]
    parts = [model.embed_text([batch["captions"][k]]),
             model.embed_motion(batch["motion"][k:k + 1, :n], n[None])]
    if len(clip.features):
        real = torch.from_numpy(clip.features)[None]
        parts.append(model.embed_motion(real, torch.tensor([real.shape[1]])))
    return [F.normalize(part[0], dim=-1) for part in parts]


def test_rewards_stay_with_their_samples():
    """Row k is scored by caption, motion and clip of row k; lengths differ, and padding has no say."""
    s = scored()
    r, parts = s.result
    assert len(s.batch["lengths"].unique()) > 1
    expected, motion_terms = [], []
    for k in range(6):
        text, motion, *real = one_by_one(s.model, s.batch, k)
        expected.append(-0.4 * (text - motion).square().sum())
        motion_terms += [-2.0 * (real[0] - motion).square().sum()] if real else []
    pseudo = torch.stack(motion_terms).mean()
    assert [not len(clip.features) for clip in s.batch["clips"]] == [False] * 3 + [True] * 3
    torch.testing.assert_close(r, torch.stack(expected) + torch.stack([*motion_terms, *[pseudo] * 3]),
                               rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["pseudo_score"], pseudo, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["text_term"], torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["text_term"] + parts["motion_term"], r.mean())
    assert scored(share=1.0).result[1]["pseudo_score"] == 0


def test_the_shuffled_reward_asks_for_other_texts_and_other_motions():
    everything = known_captions()
    wrong = retrieval.wrong_captions(everything, 0)
    assert sorted(wrong.values()) == everything and all(a != b for a, b in wrong.items())
    s = scored("shuffled")
    clips = s.batch["clips"][:3]
    assert len({clip.name for clip in clips}) == 3
    assert all(caption not in clip.captions for caption, clip in zip(s.batch["captions"], clips))
    s.batch["captions"] = [wrong[caption] for caption in s.batch["captions"]]
    for k in range(3):
        text, motion, other = one_by_one(s.model, s.batch, k)
        expected = -0.4 * (text - motion).square().sum() - 2.0 * (other - motion).square().sum()
        torch.testing.assert_close(s.result[0][k], expected, rtol=1e-4, atol=1e-5)


def test_the_shuffled_reward_leaks_no_motion_to_a_group():
    """With several motions a prompt, the motion of the sample before is the own one: no control at all."""
    args = arguments(prompts=3, samples=4, text_only_share=0.0, reward="shuffled")
    batch = ppo.collect(args, tiny_policy(), tiny_clips(), composed_clips(), 0)
    drawn = list(zip(batch["captions"], batch["clips"]))
    assert len(drawn) == 12 and len({clip.name for _, clip in drawn}) == 3
    assert all(caption not in clip.captions for caption, clip in drawn)


def test_the_random_reward_knows_nothing():
    first, again = scored("random").result[0], scored("random").result[0]
    assert torch.equal(first, again) and len(first.unique()) == 6
    assert not torch.equal(first, scored("random", iteration=1).result[0])
    assert not torch.equal(first, scored("random", seed=1).result[0])


def test_a_reward_that_is_no_number_names_the_caption():
    args, policy, clips = arguments(prompts=4), tiny_policy(), tiny_clips()
    batch = ppo.collect(args, policy, clips, composed_clips(), 0)

    class Broken:
        def embed_text(self, captions):
            return torch.tensor([[math.nan if k == 2 else 1.0] for k in range(len(captions))])

        def embed_motion(self, motion, lengths):
            return torch.ones(len(motion), 1)
    asked = retrieval.control("encoders", partial(ppo.distances, Broken()), known_captions(), 0)
    with pytest.raises(NonFiniteError, match=batch["captions"][2]):
        ppo.score(args, asked, batch, 0)


# ---- prompts and rollout of the run ------------------------------------------------------------------------


@pytest.mark.parametrize("share, alone", [(0.0, 0), (0.5, 4), (1.0, 8)])
def test_share_of_composed_prompts(share, alone):
    """InstructMotion takes paired data only, or composes half of it: the pairs must fit the captions."""
    args, policy, clips = arguments(prompts=8, text_only_share=share), tiny_policy(), tiny_clips()
    composed, seen = composed_clips() if alone else [], set()
    for iteration in range(20):
        batch, again = (ppo.collect(args, policy, clips, composed, iteration) for _ in range(2))
        captions, pairs = batch["captions"], batch["clips"]
        assert (captions, pairs) == (again["captions"], again["clips"])
        assert len(captions) == len(pairs) == 8 and sum(not len(clip.features) for clip in pairs) == alone
        assert all(c in clip.captions for c, clip in zip(captions, pairs))
        assert all(len(clip.features) or c in COMPOSED for c, clip in zip(captions, pairs))
        seen |= set(captions)
    everything = {c for clip in clips for c in clip.captions} if alone < 8 else set()
    everything |= {clip.captions[0] for clip in composed}
    assert seen == everything, "every caption of every clip comes up"


def of_two_processes(monkeypatch, *asked):
    """What collect() gives in each of two processes."""
    for rank in range(2):
        monkeypatch.setattr(runs, "world", lambda *_, rank=rank: (rank, 2))
        yield ppo.collect(*asked)


def test_samples_do_not_depend_on_the_process_count(monkeypatch):
    asked = arguments(prompts=7), tiny_policy(), tiny_clips(), composed_clips(), 3
    whole = ppo.collect(*asked)
    parts = list(of_two_processes(monkeypatch, *asked))
    for name in ("numbers", "captions", "clips"):
        assert whole[name] == parts[0][name] + parts[1][name]
    for name in ("tokens", "mask", "lengths"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))


@pytest.mark.parametrize("halvings", (1, 2))
def test_the_end_is_an_action_and_what_follows_is_not(halvings):
    policy = tiny_policy(halvings)
    batch = ppo.collect(arguments(prompts=64), policy, tiny_clips(), composed_clips(), 0)
    tokens, mask, counts = batch["tokens"], batch["mask"], batch["lengths"] // 2**halvings
    assert policy.vq.shortest * 2**halvings == 4 and batch["lengths"].min() >= 4
    truncated = counts == 6
    assert truncated.any() and not truncated.all()
    assert torch.equal(mask.sum(1), torch.where(truncated, counts, counts + 1))
    assert torch.equal(mask, torch.arange(6) <= counts[:, None])
    assert (tokens[mask] == policy.gpt.end).sum() == (~truncated).sum() and tokens[mask].max() == 12
    assert (tokens[~mask] == policy.gpt.pad).all()
    assert batch["motion"].shape == (64, 6 * 2**halvings, WIDTH)


@pytest.mark.parametrize("halvings, shortest", [(1, 2), (2, 1)])
def test_a_stored_policy_says_the_same(halvings, shortest, tmp_path):
    """policy.pt alone: tokenizer, words, both GPTs; and four frames are the least, whatever a token is."""
    policy = tiny_policy(halvings)
    runs.save_checkpoint(tmp_path / "policy.pt", t2m_gpt.networks(policy), kind="ppo-policy")
    stored = runs.load_checkpoint(tmp_path / "policy.pt", kind="ppo-policy")
    loaded = ppo.load_policy(arguments(load="policy.pt"), stored, torch.device("cpu"))
    assert loaded.vq.shortest == policy.vq.shortest == shortest
    for name in ("gpt", "reference"):
        parts = (p._replace(gpt=getattr(p, name)) for p in (policy, loaded))
        given, same = (ppo.sample(p, p.text(CAPTIONS), 0, 0, "test", range(6), 1.0) for p in parts)
        assert all(torch.equal(a, b) for a, b in zip(given, same))
    assert not any(p.requires_grad for part in loaded for p in part.parameters())


def test_motions_of_a_prompt_stay_together(monkeypatch):
    """Also over processes; each has random numbers of its own."""
    asked = arguments(prompts=4, samples=3), tiny_policy(), tiny_clips(), composed_clips(), 0
    whole = ppo.collect(*asked)
    assert all(len(set(whole["captions"][k:k + 3])) == 1 for k in range(0, 12, 3))
    assert len(whole["tokens"].unique(dim=0)) > 10
    parts = list(of_two_processes(monkeypatch, *asked))
    assert [part["numbers"] for part in parts] == [list(range(6)), list(range(6, 12))]
    assert torch.equal(whole["tokens"], torch.cat([part["tokens"] for part in parts]))


def test_merit_by_hand():
    """Each group has mean 0 and spread 1, almost, whatever the scale of the reward; groups of equals stay at
    zero; the rows that are kept take everything along."""
    batch = {"numbers": list(range(9)), "captions": list("aaabbbccc"), "tokens": torch.arange(9)[:, None]}
    r = torch.tensor([1.0, 3, 5, 10, 10, 10.3, -5, -1, -3])
    merit = ppo.standardise(rearrange(7.0 * r, "(p g) -> p g", g=3)).flatten()
    kept = ppo.strongest(merit, 5)
    part = training.select_rows(batch, kept)
    assert kept == part["numbers"] == [0, 2, 5, 6, 7] and part["captions"] == list("aabcc")
    # centred -2 0 2 | -.1 -.1 .2 | -2 2 0; spreads 2, .1732, 2; of all 1.4169
    expected = [-2 / 2.07084, 2 / 2.07084, 0.2 / 0.24405, -2 / 2.07084, 2 / 2.07084]
    torch.testing.assert_close(merit[part["numbers"]], torch.tensor(expected), rtol=1e-4, atol=0)
    assert part["tokens"].flatten().tolist() == kept
    assert (ppo.standardise(torch.full((3, 3), 7.0 * 0.3)) == 0).all()


# ---- the objective -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_coef, temperature", [(0.0, 1.0), (0.3, 1.0), (0.3, 1.5)])
def test_gradient_at_ratio_one_is_the_gradient_of_eq_3(kl_coef, temperature):
    """Every sequence of up to three tokens, weighted by its chance, in float64: the surrogate's gradient is
    that of E[r - beta log(pi / pi_ref)], whatever the values of the states are. An end that is not trained, a
    penalty with another sign, a wrong temperature or a wrong position of the reward all break it."""
    gpt, reference = (small_gpt(2, 2, 8, block=4, k=k).double() for k in range(2))
    critic = random_critic(gpt, "shared-detach").double()
    tokens, mask = sequences(2, 3, 0)
    text = torch.tensor([[0.5, -1.0]], dtype=torch.float64).expand(len(tokens), 2)
    r = normal(len(tokens), dtype=torch.float64)
    assert len(tokens) == 15

    logp, _, values = ppo.score_actions(gpt, critic, tokens, text, 0, temperature)
    ref = ppo.score_actions(reference, None, tokens, text, 0, temperature)[0].detach()
    whole, whole_ref = (torch.where(mask, part, 0.0).sum(1) for part in (logp, ref))
    chance = whole.exp()
    assert chance.sum().item() == pytest.approx(1.0, abs=1e-12)
    expected = (chance * (r - kl_coef * (whole - whole_ref))).sum()
    exact = torch.autograd.grad(expected, list(gpt.parameters()), retain_graph=True, allow_unused=True)

    old = logp.detach()
    rewards = ppo.token_rewards(r, old, ref, mask, kl_coef)
    advantages, _ = ppo.gae(rewards, values.detach(), mask, 1.0, 1.0)
    loss = (ppo.clipped_loss((logp - old).exp(), advantages, 0.2) * mask).sum(1)
    mine = torch.autograd.grad((chance.detach() * loss).sum(), list(gpt.parameters()), allow_unused=True)
    compared = 0
    for a, b in zip(exact, mine):
        if a is not None:
            torch.testing.assert_close(-b, a, rtol=1e-9, atol=1e-12)
            compared += a.abs().max() > 1e-3
    assert compared > 20


@pytest.mark.parametrize("temperature", (1.0, 1.5))
def test_the_optimum_of_eq_3_is_reached(temperature, monkeypatch):
    """A policy of one token: softmax(log pi_ref + r / beta) in closed form. At the optimum the advantage of
    every action vanishes, so sampling leaves no noise; another sign, a reference that moves, or a penalty
    that is counted twice end elsewhere. Reward curves do not show it (spec section 9)."""
    gpt, reference = (small_gpt(4, 2, 4, layers=0, block=2, sharp=1.0, k=k).double() for k in range(2))
    gpt.trans_head["ln_f"].requires_grad_(False)
    critic = random_critic(gpt, "shared-detach").double()
    policy = SimpleNamespace(gpt=gpt, reference=reference, vq=SimpleNamespace(shortest=0))
    args = arguments(prompts=128, kl_coef=0.5, temperature=temperature)
    monkeypatch.setattr(ppo, "VF_COEF", 1.0)
    monkeypatch.setattr(ppo, "MAX_GRAD_NORM", 100.0)
    utility = torch.tensor([0.3, -0.5, 0.8, 0.0, 0.4], dtype=torch.float64)
    text = torch.ones(128, 2, dtype=torch.float64)
    optimizer = torch.optim.Adam([{"params": [gpt.trans_head["head"].weight]},
                                  {"params": list(critic.parameters())}])

    def distribution(net):
        logits, _ = net(torch.zeros(1, 0, dtype=torch.int64), text[:1])
        return logits[0, 0] / temperature
    target = (distribution(reference).log_softmax(-1) + utility / 0.5).softmax(-1).detach()
    distance = [(distribution(gpt).softmax(-1) - target).abs().max().item()]
    for iteration in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 if iteration < 130 else 0.01
        tokens, _ = ppo.rollout(gpt, text, uniforms(128, 1, k=iteration), 0, temperature)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        with torch.no_grad():
            old, _, values = ppo.score_actions(gpt, critic, tokens, text, 0, temperature)
            ref, *_ = ppo.score_actions(reference, None, tokens, text, 0, temperature)
        rewards = ppo.token_rewards(utility[tokens[:, 0]], old, ref, mask, args.kl_coef)
        advantages, returns = ppo.gae(rewards, values, mask, 1.0, 0.95)
        batch = dict(tokens=tokens, text=text, mask=mask, weight=mask.double(), logp_old=old, values=values,
                     advantages=advantages, returns=returns)
        ppo.update(args, policy, critic, batch, plans(args, iteration), optimizer, iteration, Never())
    distance.append((distribution(gpt).softmax(-1) - target).abs().max().item())
    assert distance[0] > 0.2 and distance[1] < 1e-5


# ---- stage 3, assess ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", ({}, {"temperature": 1.5}, {"minibatches": 4, "micro_batch": 1}))
def test_assess_by_hand(changes):
    """Penalty of Eq. (3) towards the reference, returns, values and every logged number, from plain forward
    passes; the reference is not the policy, or it would all be zero."""
    s = prepared(gae_lambda=1.0, **changes)
    tokens, mask, temperature = s.batch["tokens"], s.batch["mask"], s.args.temperature

    def logp(gpt):
        logits = gpt(tokens[:, :-1], s.batch["text"])[0] / temperature
        logits[:, :2, 12] = -math.inf  # two tokens are four frames
        logps = logits.log_softmax(-1)
        each = logps.gather(-1, tokens.clamp(max=12)[..., None])[..., 0]
        return torch.where(mask, each, 0.0), torch.distributions.Categorical(logits=logps)
    with torch.no_grad():
        (old, choice), (ref, choice_ref) = logp(s.policy.gpt), logp(s.policy.reference)
        kl = torch.distributions.kl_divergence(choice, choice_ref)  # of each step, over all actions
        hidden = s.policy.gpt(tokens[:, :-1], s.batch["text"])[1]
        values = s.critic.value(s.critic.norm(s.critic.block(hidden)))[..., 0]
    assert (old - ref).abs().max() > 0.1 and values.shape == tokens.shape
    returns = (s.batch["r"][:, None] - 0.1 * (old - ref).flip(1).cumsum(1).flip(1)) * mask
    torch.testing.assert_close(s.batch["logp_old"][mask], old[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(s.batch["returns"], returns, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(s.batch["values"][mask], values[mask], rtol=1e-4, atol=1e-5)
    raw = (returns - values)[mask]
    white = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(s.batch["advantages"][mask], white, rtol=1e-3, atol=1e-4)
    counts = mask.sum(1)
    assert s.log["kl_ref"].item() == pytest.approx((kl * mask).sum(1).mean().item(), abs=1e-4)
    assert s.log["kl_ref"] > 0.1
    assert s.log["entropy"].item() == pytest.approx(choice.entropy()[mask].mean().item(), abs=1e-4)
    assert s.log["length"].item() == s.batch["lengths"].float().mean().item()
    assert s.log["truncated"].item() == ((counts == 6) & (tokens[:, 5] < 12)).float().mean().item()
    assert s.log["distinct"] == len({tuple(row) for row in tokens.tolist()}) / 8
    unexplained = (raw.var() / returns[mask].var()).item()
    assert s.log["explained_variance"].item() == pytest.approx(1 - unexplained, abs=1e-3)


def test_the_reference_is_scored_as_the_policy_is():
    """The same weights give no KL at all: temperature and the ban of early ends are in both passes."""
    args = arguments(prompts=8, epochs=1, temperature=1.5)
    policy = tiny_policy(shift=0.0)
    critic = random_critic(policy.gpt, "shared-detach")
    batch = ppo.collect(args, policy, tiny_clips(), composed_clips(), 0)
    batch["r"] = torch.zeros(8)
    assert assess(args, policy, critic, batch, plans(args))["kl_ref"].item() == 0.0


# ---- stage 4, update ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", ({}, {"minibatches": 2}, {"micro_batch": 3}, {"temperature": 1.5},
                                     {"minibatches": 2, "micro_batch": 3}, {"halvings": 2}))
@pytest.mark.parametrize("kind", ("shared-detach", "shared", "separate"))
def test_first_ratio_is_exactly_one(changes, kind):
    """Fails for dropout, for a cached log-probability, for a temperature or a ban in one pass only."""
    log, _, _ = step(prepared(kind, **changes), lr=0.0)
    assert log["first_ratio_error"] == log["approx_kl"] == log["clipfrac"] == 0.0
    log, _, _ = step(prepared(kind, **changes, epochs=2), lr=1.0)
    assert log["first_ratio_error"] == 0.0 and log["approx_kl"] > 0, "later steps move"


def test_a_wrong_old_logp_is_seen():
    s = prepared()
    s.batch["logp_old"] = s.batch["logp_old"] - math.log(1.5)
    log, _, _ = step(s, lr=0.0)
    assert log["first_ratio_error"] == pytest.approx(0.5, abs=1e-5) and log["clipfrac"] == 1.0
    assert log["approx_kl"] == pytest.approx(0.5 - math.log(1.5), abs=1e-5)


def test_what_stands_behind_the_end_changes_nothing():
    """Neither reward nor log-probabilities, advantages, losses or gradients; and no number there is used."""
    runs_ = []
    for dirty in (False, True):
        s = prepared()
        mask = s.batch["mask"]
        assert (~mask).sum() >= 5
        if dirty:
            s.batch["tokens"] = torch.where(mask, s.batch["tokens"], torch.arange(8)[:, None] % 13)
        counts = s.batch["lengths"] // 2
        motion, _ = s.policy.vq.decode(s.batch["tokens"], counts)
        inside = torch.arange(motion.shape[1]) < s.batch["lengths"][:, None]
        s.batch["r"] = motion[inside].sum() + s.batch["r"]
        assess(s.args, s.policy, s.critic, s.batch, s.plan)
        numbers = [motion, *(torch.where(mask, s.batch[name], 0.0) for name in
                             ("logp_old", "values", "returns", "advantages"))]
        if dirty:
            for name in ("logp_old", "values", "returns", "advantages"):
                s.batch[name] = torch.where(mask, s.batch[name], -1e3)
        log, actor, critic = step(s, MAX_GRAD_NORM=1e9)
        numbers += [*actor.values(), *critic.values(), torch.tensor(list(log.values()))]
        runs_.append(numbers)
    for clean, dirty in zip(*runs_):
        torch.testing.assert_close(dirty, clean, rtol=1e-5, atol=1e-6)


def test_the_end_is_trained():
    """An advantage at the end actions alone moves the policy towards ending."""
    s = prepared()
    ends = s.batch["tokens"] == s.policy.gpt.end
    assert ends.any() and (s.batch["mask"] | ~ends).all()
    s.batch["advantages"] = ends.float()
    before = s.batch["logp_old"][ends]
    _, actor, _ = step(s, lr=0.1, MAX_GRAD_NORM=1e9)
    assert actor["trans_head.head.weight"][12].abs().max() > 1e-3
    after, _, _ = ppo.score_actions(s.policy.gpt, None, s.batch["tokens"], s.batch["text"], 2, 1.0)
    assert (after[ends] - before).mean() > 1e-4


def test_clipped_tokens_have_no_gradient():
    """All ratios are 1.5 and all advantages positive: nothing is left to gain. Negative ones still pull."""
    for sign, moves in ((1.0, False), (-1.0, True)):
        s = prepared()
        s.batch["logp_old"] = s.batch["logp_old"] - math.log(1.5)
        s.batch["advantages"] = torch.full_like(s.batch["advantages"], sign)
        _, actor, _ = step(s)
        assert (largest(actor) > 0) == moves


# which parts move by the value loss alone; trans_head lies behind the features that the critic sees
VALUE_GRADIENT = {"shared-detach": (False, ()), "shared": (True, ()),
                  "separate": (False, ("trunk.trans_base",))}


@pytest.mark.parametrize("kind", VALUE_GRADIENT)
def test_what_the_value_loss_trains(kind):
    """InstructMotion section 4.1: the critic must not bend the policy; a missing detach shows in no curve."""
    s = prepared(kind)
    s.batch["advantages"] = torch.zeros_like(s.batch["advantages"])
    _, actor, critic = step(s)
    trunk_moves, copied = VALUE_GRADIENT[kind]
    assert (largest(actor, "trans_base") > 0) == trunk_moves
    assert largest(actor, "trans_head") == 0
    assert all(critic[name].abs().max() > 0 for name in ("block.mlp.0.weight", "norm.weight", "value.weight"))
    assert any(name.startswith("trunk") for name in critic) == bool(copied)
    if copied:
        assert largest(critic, *copied) > 0 and largest(critic, "trunk.trans_head") == 0


@pytest.mark.parametrize("kind", VALUE_GRADIENT)
def test_the_policy_loss_trains_no_critic(kind):
    _, actor, critic = step(prepared(kind), VF_COEF=0.0)
    assert largest(critic) == 0 and largest(actor, "trans_base") > 0 and largest(actor, "trans_head") > 0


def test_gradients_are_clipped_apart():
    """A reward of another size makes the critic's gradient a thousand times larger; the policy's step, whose
    advantages are whitened, must not feel it."""
    moves = []
    for scale in (1.0, 1000.0):
        s = prepared()
        s.batch["returns"] = scale * s.batch["returns"]
        log, actor, critic = step(s, MAX_GRAD_NORM=0.01)
        for part, name in ((actor, "grad_norm"), (critic, "vf_grad_norm")):
            norm = math.sqrt(sum(value.square().sum().item() for value in part.values()))
            assert log[name] > 0.01 and norm == pytest.approx(0.01, rel=1e-3)
        moves.append(actor)
    for name, value in moves[0].items():
        assert torch.equal(value, moves[1][name])


def test_losses_are_means_over_the_valid_tokens():
    s = prepared()
    mask = s.batch["mask"]
    log, _, _ = step(s, lr=0.0, MAX_GRAD_NORM=1e9)
    assert log["pg_loss"] == pytest.approx(-s.batch["advantages"][mask].mean().item(), abs=1e-6)
    errors = (s.batch["values"] - s.batch["returns"])[mask]
    assert log["vf_loss"] == pytest.approx(0.5 * errors.square().mean().item(), rel=1e-5)
    s.batch["weight"] = uniforms(*mask.shape) * mask  # of the policy's loss alone
    log, _, _ = step(s, lr=0.0, MAX_GRAD_NORM=1e9)
    mean = (s.batch["weight"] * s.batch["advantages"]).sum() / s.batch["weight"].sum()
    assert log["pg_loss"] == pytest.approx(-mean.item(), abs=1e-6)
    assert log["vf_loss"] == pytest.approx(0.5 * errors.square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("minibatches", (1, 2))
def test_micro_batches_give_the_same_gradient(minibatches):
    whole, parts = (step(prepared(minibatches=minibatches, micro_batch=size), lr=0.1, MAX_GRAD_NORM=1e9)
                    for size in (0, 3))
    for a, b in zip(whole[1:], parts[1:]):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)
    for name, value in whole[0].items():
        assert parts[0][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_targets_stay_fixed_over_the_epochs():
    """Returns, advantages and old values are those of the rollout; an update must not write into them."""
    s = prepared(epochs=2, minibatches=2)
    names = ("logp_old", "values", "returns", "advantages", "tokens")
    before = {name: s.batch[name].clone() for name in names}
    step(s, lr=0.1)
    assert all(torch.equal(s.batch[name], value) for name, value in before.items())


def test_broken_numbers_stop_the_update():
    s = prepared()
    s.batch["returns"][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="lower --lr"):
        step(s)


def test_the_learning_rate_rises_then_falls_to_nothing():
    assert [training.rise_and_fall(k, 4, 0) for k in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    factors = [training.rise_and_fall(k, 10, 4) for k in (0, 1, 3, 5)]
    assert factors == pytest.approx([0.25, 0.5 * 0.9, 0.7, 0.5])


# ---- the loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, warmup", [
    ({}, 0), ({"critic": "separate"}, 0), ({"samples": 2, "kept_samples": 11}, 6)])
def test_training_moves_policy_and_critic_only(changes, warmup, tmp_path, monkeypatch):
    """Reference, tokenizer, text encoder and reward model keep every bit; the optimizer knows no weight of
    theirs; every first ratio is one; the critic starts at zero."""
    policy, clips = tiny_policy(shift=0.0), tiny_clips()
    frozen = {"vq": policy.vq, "text": policy.text, "reference": policy.reference,
              "reward": retrieval_model(clips)}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in frozen.items()}
    start, optimizers, critics = copy.deepcopy(policy.gpt.state_dict()), [], []

    class Spy(torch.optim.AdamW):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            optimizers.append(self)
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    assess = ppo.assess

    def spied(args, policy, critic, batch, *rest):
        out = assess(args, policy, critic, batch, *rest)
        critics.append((critic, batch["values"]))
        return out
    monkeypatch.setattr(ppo, "assess", spied)
    monkeypatch.setattr(ppo, "WARMUP", warmup)
    monkeypatch.setattr(evaluate, "check_names", lambda *_: None)  # nothing is looked at
    args = arguments(prompts=8, iterations=3, eval_every=100, minibatches=2, micro_batch=3, **changes)
    data = SimpleNamespace(splits={"train": clips, "val": clips})
    began = runs.Start(args, None, tmp_path, False, torch.device("cpu"), 1, 0, runs.Stopwatch(), "",
                       "ppo-policy")
    asked = retrieval.control("encoders", partial(ppo.distances, frozen["reward"]), known_captions(), 0)
    ppo.train(began, policy, asked, data, {"composed_train": composed_clips()}, None, tmp_path)
    scale = runs.load_checkpoint(tmp_path / "checkpoint.pt", kind="ppo-run")["scale"]
    assert 0 < scale < math.inf
    for name, part in frozen.items():
        assert all(torch.equal(value, before[name][key]) for key, value in part.state_dict().items()), name
    still = [name for name, value in policy.gpt.state_dict().items() if torch.equal(value, start[name])]
    assert still == []
    critic, values = critics[0]
    assert len(optimizers) == 1 and len(critics) == 3
    rates = [group["lr"] for group in optimizers[0].param_groups]  # of the third of three iterations
    assert rates == [pytest.approx(args.lr * (0.5 if warmup else 1.0) / 3), ppo.CRITIC_LR]
    held = [id(p) for group in optimizers[0].param_groups for p in group["params"]]
    wanted = [id(p) for part in (policy.gpt, critic) for p in part.parameters()]
    assert sorted(held) == sorted(wanted) and len(set(held)) == len(held)
    assert (values == 0).all() and (critics[2][1] != 0).any()
    with open(tmp_path / "logs.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [float(row["first_ratio_error"]) for row in rows] == [0.0] * 3
    assert float(rows[0]["kl_ref"]) == 0.0 and float(rows[2]["kl_ref"]) != 0.0


# ---- does it learn? ----------------------------------------------------------------------------------------


def learn(seed, told):
    """60 iterations on four texts whose motions should repeat a code of their own; the reward asks for the
    code of text told[k] -> shares of tokens that fit the right text and the told one, first and last five"""
    gpt = small_gpt(8, 4, 16, block=6, sharp=1.0, k=seed)
    reference = copy.deepcopy(gpt).requires_grad_(False)
    critic = random_critic(gpt, "shared-detach")
    policy = SimpleNamespace(gpt=gpt, reference=reference, vq=SimpleNamespace(shortest=2))
    args = arguments(prompts=32, kl_coef=0.05, seed=seed)
    optimizer = torch.optim.AdamW([{"params": list(gpt.parameters())}, {"params": list(critic.parameters())}],
                                  lr=5e-3)
    asked = torch.arange(32) % 4
    text, told, history = torch.eye(4)[asked], torch.tensor(told), []
    for iteration in range(60):
        draws = torch.rand(32, 5, generator=generator(seed, iteration, "learn"))
        tokens, counts = ppo.rollout(gpt, text, draws, 2, 1.0)
        mask = torch.arange(5) <= counts[:, None]
        right, given = ((tokens == code[:, None]).sum(1) / 5 for code in (asked, told[asked]))
        history.append((right.mean().item(), given.mean().item()))
        batch = dict(tokens=tokens, text=text, mask=mask, weight=mask.float(), lengths=2 * counts,
                     r=4 * given)
        plan = plans(args, iteration)
        assess(args, policy, critic, batch, plan)
        ppo.update(args, policy, critic, batch, plan, optimizer, iteration, Never())
    return np.mean(history[:5], 0), np.mean(history[-5:], 0)


@pytest.mark.parametrize("seed", (0, 1))
def test_the_reward_rises_and_the_wrong_texts_do_not_help(seed):
    """The control sees the same optimiser and the same strength of signal, only the texts are exchanged."""
    before, after = learn(seed, [0, 1, 2, 3])
    assert after[0] - before[0] > 0.6
    before, after = learn(seed, [1, 2, 3, 0])
    assert after[1] - before[1] > 0.6 and after[0] - before[0] < 0.05


def test_each_distinct_item_is_computed_once():
    asked = []

    def embed(items):
        asked.append(list(items))
        return torch.tensor([[float(item)] for item in items])
    a, b = "1.5", "2.5"
    assert retrieval.once(embed, [b, a, a, b, a]).flatten().tolist() == [2.5, 1.5, 1.5, 2.5, 1.5]
    assert asked == [[b, a]]
