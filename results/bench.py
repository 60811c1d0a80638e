"""What the parts of an iteration cost: `python -m results.bench rollout`, `selection`, `snr`
or `codec`.

`rollout`, of a diffusion model
    A  ddpo_motion's rollout of one batch: noise of every sample, captions, N steps, all states kept
    B  the N forward passes of that batch alone, on the very states that A went through
and of tokens, one motion and 32 at a time
    A  each token from a pass over the whole sequence so far, as the public T2M-GPT code samples
    B  ppo_motion's rollout of the same tokens, with cached keys and values

`selection`
    A  pareto_motion's non-dominated sets of 64 prompts x 3 tokens x 32 motions
    B  the rollout of a sixteenth of these motions, which is a small part of an iteration

`snr`
    what it costs in KL, at each denoising step, that the network changes its answer by one unit in
    every entry: the law of --snr-weights, and the same measured on a network. --picture FILE

`codec`
    the jerk and the foot skate of decoded motion with noise on its tokens: tokens of four frames
    that are decoded apart, and lapped ones

A and B run in turns after one round of warming up, with the default sizes and random weights (the
time does not depend on them). The ratio of the two minima is not printed if one of the two varies
by more than 20 %, because then the machine was busy with something else. Seconds are for reading;
what can be asserted is counted in tests/test_bench.py.
"""
import argparse
import math
import time
from dataclasses import replace

import numpy as np
import torch

import ddpo_motion as ddpo
import pareto_motion as pareto
import ppo_motion as ppo
from common import (InputError, datasets, diffusion, evaluate, features, generator, lora, normal, pick, runs,
                    samplers, tokenizer, training)
from common.patches import LappedCodec, PatchCodec
from results import pictures

WORDS = "a person walks forward slowly then turns left and waves with the right hand"
SPREAD_LIMIT = 0.2

# ---- 1. Measuring --------------------------------------------------------------------------------


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


# ---- 2. Diffusion --------------------------------------------------------------------------------


def random_model(script, size):
    """The denoiser of a diffusion script with random weights."""
    codec = diffusion.make_codec(size, features.T2M.feature_dim)
    model = script.MotionDiffusion(size, datasets.Vocabulary.from_captions([WORDS]), codec)
    training.initialise(model, generator(0, 0, "initialise"))
    return model


def prepare(args, size, tokens):
    """A denoiser of a size with fresh adapters, ready to roll out -> ddpo_motion.Policy."""
    model = random_model(ddpo, size)
    return ddpo.make_policy(args, model, tokens * size.patch, torch.device("cpu"))


@torch.no_grad()
def time_rollout(args, batch, tokens, rounds):
    """Print the comparison A / B of a diffusion rollout."""
    size = diffusion.SIZES[args.space][args.size]
    policy, captions = prepare(args, size, tokens), [WORDS] * batch
    lengths = torch.full((batch,), tokens * size.patch)

    def rollout():
        return ddpo.sample(args, policy, captions, lengths, 0, "bench", range(batch))

    states, mask = rollout()
    text, text_mask = policy.model.encode_text(captions)

    def forwards():
        for i, timestep in enumerate(policy.steps.timesteps):
            ddpo.predict(policy, states[:, i], timestep.float().expand(batch), mask, text, text_mask)

    forwards()
    weights = lora.count(policy.model.parameters())
    print(f"{torch.get_num_threads()} thread(s), float32 on the CPU; batch {batch}, {tokens} tokens of "
          f"{size.patch} frames, {args.steps} steps, guidance {args.guidance_scale}; width {size.width}, "
          f"{size.layers} layers, {weights} parameters")
    names = ("A rollout with its noise", f"B the {args.steps} forwards alone")
    print("\n".join(report(names, interleave((rollout, forwards), rounds))))


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
    args, law = ddpo.Args(steps=steps), {}
    for name, (schedule, spacing, prediction) in GRIDS.items():
        table = ddpo.solver_steps(samplers.make_grid(schedule, steps, spacing), 1, prediction)
        policy = prepare(args, diffusion.Size(patch_dims=8), 12)._replace(steps=table)
        for k, parameter in enumerate(policy.model.parameters()):
            if parameter.requires_grad:  # of the adapters
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator(0, k, "bench"))
        costs = (table.m_coef * table.q / table.std).square() / 2
        law[name] = costs.flatten()[:-1].double().numpy()
        states, mask = ddpo.sample(args, policy, [WORDS] * 4, torch.full((4,), 48), 0, "bench", range(4))
        tuned, base = (answers_and_means(policy, states, mask, strength) for strength in (1.0, 0.0))
        change = (tuned[0] - base[0]).square().mean((0, 2, 3))
        kl = ddpo.masked_mean_kl(tuned[1], base[1], table.std[:-1], mask[:, None]).mean(0)
        gap = np.abs((kl / change).numpy() / law[name] - 1).max()
        print(f"{name:38s}" + "".join(f"{value:9.2g}" for value in law[name]) + f"  within {gap:.1%}")
    if picture:
        panels = {"KL for a change of 1 of the answer": law}
        pictures.lines(picture, np.arange(steps - 1), "denoising step", panels, "linear")
    return law


@torch.no_grad()
def answers_and_means(policy, states, mask, strength):
    """The network's answers (b s n c) on all steps but the last, and the means (b s n c) of the policy."""
    count, captions = states.shape[1] - 2, [WORDS] * len(states)
    with lora.scaled(policy.model, strength):
        _, mean = ddpo.step_logps(policy, states, captions, mask, count)
        text, text_mask = policy.model.encode_text(captions)
        times = policy.steps.timesteps[:count, None].expand(-1, len(states)).float()
        answers = [policy.model(states[:, i], times[i], mask, text, text_mask) for i in range(count)]
    return torch.stack(answers, 1), mean


# ---- 3. Tokens -----------------------------------------------------------------------------------


def make_gpt(tokens, size=tokenizer.SIZES["small"]):
    """The GPT of a size with random weights, for so many tokens."""
    gpt = ppo.MotionGPT(size.codes, size.width, size.width, size.heads, size.base_layers,
                        size.head_layers, tokens + 1)
    training.initialise(gpt, generator(0, 0, "gpt"))
    return gpt.eval()


@torch.no_grad()
def recompute(gpt, text, uniform, shortest, temperature):
    """ppo_motion.rollout without its cache: a pass over all there is, for every token. No row ends early."""
    tokens = torch.full(uniform.shape, gpt.pad)
    for t in range(uniform.shape[1]):
        logits = ppo.action_logits(gpt(tokens[:, :t], text)[0], 0, shortest, temperature)[:, -1]
        tokens[:, t] = pick(logits, uniform[:, t])
    return tokens


def draws(gpt, motions, tokens):
    """Text features (b c) and uniform numbers (b n) for a rollout of so many motions."""
    g = generator(0, 0, "bench")
    width = gpt.positions.shape[1]
    return torch.randn(motions, width, generator=g), torch.rand(motions, tokens, generator=g)


def time_cache(batch, tokens, rounds):
    """Print the comparison A / B of token sampling; the end token is not allowed, so both do equal work."""
    gpt = make_gpt(tokens)
    text, uniform = draws(gpt, batch, tokens)

    def whole():
        return recompute(gpt, text, uniform, tokens, 1.0)

    def cached():
        return ppo.rollout(gpt, text, uniform, tokens, 1.0)[0]

    same = (whole() == cached()).float().mean().item()
    layers = len(gpt.trans_base["blocks"]) + len(gpt.trans_head["blocks"])
    print(f"\nbatch {batch}, {tokens} tokens; width {text.shape[1]}, {layers} layers; "
          f"{math.floor(same * 1000) / 10} % of the tokens are the same")
    print("\n".join(report(("A whole sequence every time", "B with the cache"),
                           interleave((whole, cached), rounds))))


def time_selection(tokens, rounds):
    """Print the comparison A / B of the selection."""
    gpt, (p, c, n) = make_gpt(tokens), (64, 3, 32)
    motions, R = p * c * n // 16, torch.randn(p, c, n, 3, generator=generator(0, 0, "bench rewards"))
    text, uniform = draws(gpt, motions, tokens)

    def select():
        pareto.select(R, "per-token")

    def sample():
        ppo.rollout(gpt, text, uniform, tokens, 1.0)

    print(f"{p} prompts x {c} tokens x {n} motions; {motions} motions of {tokens} tokens")
    names = "A selection", "B rollout of a sixteenth"
    print("\n".join(report(names, interleave((select, sample), rounds))))


def hiccups(data, clips=60, noises=(0.0, 0.1, 0.2, 0.3)):
    """Print, as Markdown, what noise on the whitened tokens does to decoded motion, for tokens apart and for
    lapped ones -> {(codec, components, noise): (jerk, foot skate)}. Noise stands for a model's errors."""
    train, test, skeleton = data.splits["train"], data.splits["test"][:clips], data.skeleton
    statistics = datasets.Statistics.from_clips(train, role="generator")
    weights = features.block_weights(skeleton, features.PATCH_WEIGHTS)

    def physics(motions):
        made = [replace(clip, features=motion.numpy()) for clip, motion in zip(test, motions)]
        means = evaluate.physics(made, skeleton)
        return means["jerk"], means["foot_skate"]
    real, found = [torch.from_numpy(clip.features) for clip in test], {}
    print("the data: jerk {:.1f}, skate {:.3f}".format(*physics(real)))
    print("| tokens | " + " | ".join(f"noise {s:g}: jerk, skate" for s in noises) + " |")
    print("| --- " * (len(noises) + 1) + "|")
    for kind, components in ((PatchCodec, 64), (LappedCodec, 64), (LappedCodec, 96)):
        codec = kind(4, skeleton.feature_dim, components)
        codec.fit(train, statistics, weights)
        tokens = [codec.encode(motion[None]) for motion in real]
        for s in noises:
            noisy = [x + s * normal(x.shape[1:], 0, 0, "codec", [k]) for k, x in enumerate(tokens)]
            found[kind.__name__, components, s] = physics([codec.decode(x)[0] for x in noisy])
        cells = ("{:.1f}, {:.3f}".format(*found[kind.__name__, components, s]) for s in noises)
        print(f"| {kind.width * 4} frames every 4, {components} components | " + " | ".join(cells) + " |")
    return found


def main(argv=None):
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("what", choices=("rollout", "selection", "snr", "codec"))
    parser.add_argument("--batch", type=int, default=128, help="motions of a rollout (default 128 = 16 x 8)")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a motion (default 20 = 80 frames)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of A and B, at least 5 (default 7)")
    parser.add_argument("--gpt-tokens", type=int, default=50, help="of the token policy (T2M-GPT: 50)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--picture", metavar="PNG", help="for `snr`")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1.0: one forward a step; else two")
    options = parser.parse_args(argv)
    if options.rounds < 5:
        raise InputError("--rounds: at least 5, or the minimum says little")
    runs.pick_threads(options.threads)
    if options.what == "snr":
        snr_law(10, options.picture)
    elif options.what == "codec":
        hiccups(datasets.load_dataset("humanml3d", clips=2400))
    elif options.what == "selection":
        time_selection(25, options.rounds)
    else:
        args = ddpo.Args(guidance_scale=options.guidance_scale)
        time_rollout(args, options.batch, options.tokens, options.rounds)
        for batch in (1, 32):
            time_cache(batch, options.gpt_tokens, options.rounds)


if __name__ == "__main__":
    runs.run_main(main)
