"""What the parts of an iteration cost: `python -m tests.bench rollout`, `selection`, `memory` or `snr`.

Diffusion:
    A  ddpo_motion's rollout of one batch: noise of every sample, captions encoded, N steps, all states kept
    B  the N denoiser forwards of that batch alone, on the very states that A went through
Tokens, one motion and 32 at a time:
    A  each token from a forward pass over the whole sequence so far, as the public T2M-GPT code samples
    B  ppo_motion's rollout of the same tokens, with cached keys and values

`selection`
    A  pareto_motion's non-dominated sets of 64 prompts x 3 tokens x 32 motions
    B  the rollout of a sixteenth of these motions, which is a small part of an iteration

`memory`
    what one update of each method of stepwise_motion.py keeps for its backward pass, by the number of
    denoising steps, and its seconds; no A and B. --picture FILE draws it.

`snr`
    what it costs in KL, at each denoising step, that ddpo_motion's network changes its answer by one unit in
    every entry: the law of --snr-weights, and the same measured on a network; no A and B. --picture FILE

The two run in turns (A B A B ...), after one round of warming up, with the default Args and random weights
(the time does not depend on them). The ratio of the two minima is the overhead of the sampler, or the gain
of the cache; it is not printed if one of the two varies by more than 20 %, because then the machine was busy
with something else.
Seconds are for reading; what can be asserted is counted in test_bench.py.
"""
import argparse
import math
import time
from types import SimpleNamespace

import numpy as np
import torch

import ddpo_motion as ddpo
import pareto_motion as pareto
import ppo_motion as ppo
import stepwise_motion as stepwise
from common import (
    InputError, datasets, features, generator, lora, motion_gpt, motion_reward, render, runs,
    training)

WORDS = "a person walks forward slowly then turns left and waves with the right hand"
FEATURE_DIM = 263
SPREAD_LIMIT = 0.2


class CountedCalls:
    """`with CountedCalls(model) as rows:` collects in `rows` the batch size of every forward of the model."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def __enter__(self):
        self.hook = self.model.register_forward_hook(lambda *call: self.rows.append(len(call[-1])))
        return self.rows

    def __exit__(self, *exc):
        self.hook.remove()


def prepare(args, tokens):
    """A denoiser with random weights and fresh adapters, ready to roll out -> ddpo_motion.Policy."""
    model = ddpo.MotionDiffusion(args, datasets.Vocabulary.from_captions([WORDS]), FEATURE_DIM)
    training.initialise(model, generator(args.base_seed, 0, "initialise"))
    return ddpo.make_policy(args, model, tokens * args.patch, torch.device("cpu"))


def interleave(functions, rounds):
    """Seconds of each function in each round, a list per function; the functions take turns."""
    seconds = [[] for _ in functions]
    for _ in range(rounds):
        for function, taken in zip(functions, seconds):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return seconds


def spread(seconds):
    """How far the slowest round lies over the fastest, as a share of the fastest."""
    return max(seconds) / min(seconds) - 1


def report(names, seconds):
    """Lines with minimum and spread of each of two series, then the ratio of the minima or a refusal."""
    lines = [f"{name:30s} min {min(s):.4f} s, spread {spread(s):.0%}, {len(s)} rounds"
             for name, s in zip(names, seconds)]
    if max(map(spread, seconds)) > SPREAD_LIMIT:
        return lines + [f"no ratio: a spread over {SPREAD_LIMIT:.0%}; run it again on an idle machine"]
    return lines + [f"ratio {min(seconds[0]) / min(seconds[1]):.3f}"]


@torch.no_grad()
def time_rollout(args, batch, tokens, rounds):
    """Print the comparison A / B of the module's docstring."""
    policy = prepare(args, tokens)
    captions, lengths = [WORDS] * batch, torch.full((batch,), tokens * args.patch)

    def rollout():
        return ddpo.sample(args, policy, captions, lengths, 0, "bench", range(batch))

    states, mask = rollout()
    text, text_mask = policy.model.encode_text(captions)

    def forwards():
        for i, timestep in enumerate(policy.grid.timesteps.tolist()):
            ddpo.predict(policy.model, states[:, i], torch.full((batch,), timestep), mask, text, text_mask,
                         args.guidance_scale)

    forwards()
    weights = sum(p.numel() for p in policy.model.parameters())
    print(f"{torch.get_num_threads()} thread(s), float32 on the CPU; batch {batch}, {tokens} tokens of "
          f"{args.patch} frames, {args.steps} steps, guidance {args.guidance_scale}; width {args.width}, "
          f"{args.layers} layers, {weights} parameters")
    names = ("A rollout with its noise", f"B the {args.steps} forwards alone")
    print("\n".join(report(names, interleave((rollout, forwards), rounds))))


def make_gpt(args, tokens):
    """The GPT of default size with random weights, for so many tokens."""
    gpt = motion_gpt.MotionGPT(args.codes, args.width, args.width, args.heads, args.base_layers,
                               args.head_layers, tokens + 1)
    training.initialise(gpt, generator(args.base_seed, 0, "gpt"))
    return gpt.eval()


@torch.no_grad()
def recompute(gpt, text, uniform, shortest, temperature):
    """ppo_motion.rollout without its cache: a pass over all there is, for every token. No row ends early."""
    tokens = torch.full(uniform.shape, gpt.pad)
    for t in range(uniform.shape[1]):
        logits = ppo.action_logits(gpt(tokens[:, :t], text)[0], 0, shortest, temperature)[:, -1]
        tokens[:, t] = ppo.pick(logits, uniform[:, t])
    return tokens


def time_cache(args, batch, tokens, rounds):
    """Print the comparison A / B of token sampling; the end token is not allowed, so both do equal work."""
    gpt, g = make_gpt(args, tokens), generator(0, 0, "bench")
    text, uniform = torch.randn(batch, args.width, generator=g), torch.rand(batch, tokens, generator=g)

    def whole():
        return recompute(gpt, text, uniform, tokens, 1.0)

    def cached():
        return ppo.rollout(gpt, text, uniform, tokens, 1.0)[0]

    same = (whole() == cached()).float().mean().item()
    layers = args.base_layers + args.head_layers
    print(f"\nbatch {batch}, {tokens} tokens; width {args.width}, {layers} layers; "
          f"{math.floor(same * 1000) / 10} % of the tokens are the same")
    print("\n".join(report(("A whole sequence every time", "B with the cache"),
                           interleave((whole, cached), rounds))))


def time_selection(args, tokens, rounds):
    """Print the comparison A / B of the selection."""
    gpt, g, (p, c, n) = make_gpt(args, tokens), generator(0, 0, "bench"), (64, 3, 32)
    R, motions = torch.randn(p, c, n, 3, generator=g), p * c * n // 16
    text, uniform = torch.randn(motions, args.width, generator=g), torch.rand(motions, tokens, generator=g)

    def select():
        pareto.front_weights(pareto.select(R, "per-token"), "per-token")

    def sample():
        pareto.rollout(gpt, text, uniform, tokens, 1.0)

    print(f"{p} prompts x {c} tokens x {n} motions; {motions} motions of {tokens} tokens")
    names = "A selection", "B rollout of a sixteenth"
    print("\n".join(report(names, interleave((select, sample), rounds))))


METHODS = {  # name -> flags of stepwise_motion.py
    "easytune": dict(method="easytune"), "refl": dict(method="refl"),
    "drtune 5": dict(method="drtune", window=5), "draft 2": dict(method="draft", window=2),
    "alignprop": dict(method="alignprop"),
    "draft": dict(method="draft"), "draft + checkpoints": dict(method="draft", checkpointing=True)}


def one_update(flags, steps, batch, tokens):
    """One update of a method with random weights -> MB saved for the backward pass at most, seconds."""
    flags = {**flags, "window": min(flags.get("window", 0), steps)}
    args = stepwise.Args(steps=steps, batch=batch, beta_anchor=0.0, prediction="epsilon", **flags)
    model = stepwise.MotionDiffusion(args, datasets.Vocabulary.from_captions([WORDS]), FEATURE_DIM)
    training.initialise(model, generator(0, 0, "initialise"))
    policy = stepwise.make_policy(args, model, tokens, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        reward = motion_reward.MotionReward(model.vocabulary, features.T2M, has_heads=True,
                                            **motion_reward.SIZES).requires_grad_(False).eval()
    lengths = torch.full((batch,), tokens * args.patch)
    noise, mask = stepwise.start_noise(policy, lengths, 0, 0, "bench", range(batch))
    asked = dict(captions=[WORDS] * batch, real=None, noise=noise, mask=mask, lengths=lengths,
                 route=generator(0, 0, "route"))
    updates = stepwise.Updates(args, policy.tuned.parameters())
    loop, start = SimpleNamespace(check=lambda: None, rewards=None), time.perf_counter()
    log = stepwise.update(args, policy, reward, asked, [WORDS] * batch, updates, 1.0, loop, 0)
    return log["saved_mb"], time.perf_counter() - start


def measure_memory(counts, batch, tokens, picture=None):
    """Print MB and seconds of an update of every method, for some numbers of denoising steps -> {name: MB}.

    Checkpoints keep the states alone, and while a step is computed again also what easytune keeps; the hooks
    do not see that, so it is added.
    """
    log = {"steps": np.array(counts, float)}
    for name, flags in METHODS.items():
        measured = [one_update(flags, n, batch, tokens) for n in counts]
        again = log["easytune"] if "checkpointing" in flags else 0.0
        log[name] = np.array([saved for saved, _ in measured]) + again
        log[f"{name}, seconds"] = np.array([seconds for _, seconds in measured])
    print(f"MB saved for one backward pass (seconds of an update); batch {batch}, {tokens} tokens\n"
          f"{'':20s}" + "".join(f"{f'{n} steps':>18s}" for n in counts))
    for name in METHODS:
        cells = (f"{saved:8.2f} ({seconds:6.2f} s)"
                 for saved, seconds in zip(log[name], log[f"{name}, seconds"]))
        print(f"{name:20s}" + "".join(f"{cell:>18s}" for cell in cells))
    if picture:
        render.lines(picture, log["steps"], "denoising steps", {
            "MB kept for a backward pass": {name: log[name] for name in METHODS},
            "seconds of an update": {name: log[f"{name}, seconds"] for name in METHODS}})
    return {name: log[name] for name in METHODS}


GRIDS = {  # schedule, spacing, what the network answers
    "linear, linspace (ours)": ("linear", "linspace", "sample"),
    "linear, karras (StableMoFusion)": ("linear", "karras", "sample"),
    "cosine, linspace (MDM)": ("cosine", "linspace", "sample"),
    "scaled_linear, linspace, noise (MLD)": ("scaled_linear", "linspace", "epsilon")}


def snr_law(steps, picture=None):
    """Print KL per squared change of the answer at every step of GRIDS, and how far the same lies from it
    when it is measured: adapters of a network with random weights, on against off -> {grid: KL (s)}."""
    print(f"KL at each of {steps} steps for a change of 1 of the answer\n" + " " * 38
          + "".join(f"{f'step {i}':>9s}" for i in range(steps - 1)) + "  measured")
    law = {}
    for name, (schedule, spacing, prediction) in GRIDS.items():
        args = ddpo.Args(steps=steps, schedule=schedule, spacing=spacing, prediction=prediction, patch_dims=8)
        policy = prepare(args, 12)
        for k, parameter in enumerate(policy.model.parameters()):
            if parameter.requires_grad:  # of the adapters
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator(0, k, "bench"))
        table = policy.transition
        law[name] = (table.m_coef * table.q / table.std).square()[:-1].double().numpy() / 2
        states, mask = ddpo.sample(args, policy, [WORDS] * 4, torch.full((4,), 48), 0, "bench", range(4))
        tuned, base = (answers_and_means(policy, states, mask, strength) for strength in (1.0, 0.0))
        change = (tuned[0] - base[0]).square().mean((0, 2, 3))
        kl = ddpo.masked_mean_kl(tuned[1], base[1], tuned[2], mask[:, None]).mean(0)
        gap = np.abs((kl / change).numpy() / law[name] - 1).max()
        print(f"{name:38s}" + "".join(f"{value:9.2g}" for value in law[name]) + f"  within {gap:.1%}")
    if picture:
        panels = {"KL for a change of 1 of the answer": law}
        render.lines(picture, np.arange(steps - 1), "denoising step", panels, "linear")
    return law


@torch.no_grad()
def answers_and_means(policy, states, mask, strength):
    """The network's answers (b s n c) on the trained steps, the means (b s n c) and std of the policy."""
    steps = states.shape[1] - 2
    with lora.scaled(policy.model, strength):
        _, mean, std = ddpo.step_logps(policy.model, policy.grid, policy.transition, states,
                                       [WORDS] * len(states), mask, steps, 1.0)
        text, text_mask = policy.model.encode_text([WORDS] * len(states))
        times = policy.grid.timesteps[:steps, None].expand(-1, len(states)).float()
        answers = [policy.model(states[:, i], times[i], mask, text, text_mask) for i in range(steps)]
    return torch.stack(answers, 1), mean, std


def main(argv=None):
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rollout", "selection", "memory", "snr"))
    parser.add_argument("--batch", type=int, default=128, help="motions of a rollout (default 128 = 16 x 8)")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a motion (default 20 = 80 frames)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of A and B, at least 5 (default 7)")
    parser.add_argument("--gpt-tokens", type=int, default=50, help="of the token policy (T2M-GPT: 50)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--picture", help="PNG for `memory` and `snr`")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1.0: one forward a step; else two")
    options = parser.parse_args(argv)
    if options.rounds < 5:
        raise InputError("--rounds: at least 5, or the minimum says little")
    runs.pick_threads(options.threads)
    if options.what == "memory":
        measure_memory((1, 2, 5, 10, 20, 50), 32, options.tokens, options.picture)
        return
    if options.what == "snr":
        snr_law(10, options.picture)
        return
    if options.what == "selection":
        time_selection(ppo.Args(), 25, options.rounds)
        return
    args = ddpo.Args(guidance_scale=options.guidance_scale)
    time_rollout(args, options.batch, options.tokens, options.rounds)
    for batch in (1, 32):
        time_cache(ppo.Args(), batch, options.gpt_tokens, options.rounds)


if __name__ == "__main__":
    runs.run_main(main)
