"""What one update of each method of stepwise_motion.py keeps for its backward pass.

  python -m results.memory --picture memory.png

Bytes are measured by torch's hooks. They count what algorithms differ in, and not what allocators, threads or
the machine add, so they can be asserted to the byte. The weights are random; the sizes are the default ones.
"""
import argparse
import time
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

import stepwise_motion as stepwise
from common import diffusion, features, generator, motion_reward, runs
from results import bench, pictures

# ---- 1. Counting bytes ---------------------------------------------------------------------------


class SavedBytes:
    """`with SavedBytes(model, reward) as saved:` counts storages that autograd saves inside; `saved.peak` is
    the largest sum at one time, `saved.now` what is alive.

    A storage counts once, however many graph nodes hold it, until the last of them is gone. Parameters and
    buffers of the modules do not count: they are there in any case. Inside torch.utils.checkpoint the
    recomputation is not seen: what it keeps, one piece at a time, has to be measured apart.
    """

    def __init__(self, *modules):
        self.now = self.peak = 0
        self.held = {}  # storage pointer -> [how many graph nodes hold it, bytes]
        self.free = {tensor.untyped_storage().data_ptr() for module in modules
                     for tensor in (*module.parameters(), *module.buffers())}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _pack(self, tensor):
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self.free:
            entry = self.held.setdefault(place, [0, storage.nbytes()])
            entry[0] += 1
            if entry[0] == 1:
                self.now += entry[1]
                self.peak = max(self.peak, self.now)
            weakref.finalize(kept, self._release, place)
        return kept

    def _release(self, place):
        entry = self.held[place]
        entry[0] -= 1
        if not entry[0]:
            self.now -= entry[1]
            del self.held[place]


class _Kept:
    """A saved tensor; it goes when the graph node that saved it lets go of it."""

    __slots__ = ("tensor", "__weakref__")

    def __init__(self, tensor):
        self.tensor = tensor

# ---- 2. One update of every method ---------------------------------------------------------------

METHODS = {  # name -> arguments of stepwise_motion.py
    "easytune": dict(method="easytune"), "refl": dict(method="refl"),
    "drtune 5": dict(method="drtune", window=5), "draft 2": dict(method="draft", window=2),
    "alignprop": dict(method="alignprop"),
    "draft": dict(method="draft"), "draft + checkpoints": dict(method="draft", checkpointing=True)}


def one_update(flags, steps, prompts, tokens):
    """One update of a method with random weights -> MB kept for the backward pass at most, seconds."""
    flags = {**flags, "window": min(flags.get("window", 0), steps)}
    args = stepwise.Args(steps=steps, prompts=prompts, anchor=0.0, prediction="epsilon", **flags)
    size = diffusion.SIZES["joint"][args.size]
    model = bench.random_model(stepwise, size)
    policy = stepwise.make_policy(args, model, tokens * size.patch, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
        scorer = motion_reward.MotionReward(model.vocabulary, features.T2M, **motion_reward.SIZES)
        scorer.adapt().requires_grad_(False).eval()
    weights = stepwise.weights_of(args)
    reward = partial(stepwise.weighted_reward, scorer, args.representation, weights)
    lengths, captions = torch.full((prompts,), tokens * size.patch), [bench.WORDS] * prompts
    noise, mask = stepwise.start_noise(policy, lengths, 0, 0, "bench", range(prompts))
    batch = dict(captions=captions, asked=captions, more={}, noise=noise, mask=mask,
                 lengths=lengths, g=generator(0, 0, "route"))
    optimizer = torch.optim.AdamW(list(policy.trained().values()), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    ask = partial(stepwise.score, policy, reward, batch)
    move = partial(stepwise.learn, optimizer=optimizer, scheduler=scheduler)
    loop, start = SimpleNamespace(check=lambda: None, rewards=None), time.perf_counter()
    with SavedBytes(policy.model, scorer) as saved:
        stepwise.update(args, policy, ask, batch, move, 0, loop)
    return saved.peak / 2**20, time.perf_counter() - start


def measure_memory(counts, prompts, tokens, picture=None):
    """Print MB and seconds of an update of every method, for some numbers of denoising steps -> {name: MB}.

    Checkpoints keep the states alone, and while a step is computed again also what easytune keeps; the hooks
    do not see that, so it is added.
    """
    kept, seconds = {}, {}
    for name, flags in METHODS.items():
        measured = [one_update(flags, n, prompts, tokens) for n in counts]
        again = kept["easytune"] if "checkpointing" in flags else 0.0
        kept[name] = np.array([saved for saved, _ in measured]) + again
        seconds[name] = np.array([taken for _, taken in measured])
    print(f"MB kept for one backward pass (seconds of an update); batch {prompts}, {tokens} tokens\n"
          f"{'':20s}" + "".join(f"{f'{n} steps':>18s}" for n in counts))
    for name in METHODS:
        cells = (f"{saved:8.2f} ({taken:6.2f} s)" for saved, taken in zip(kept[name], seconds[name]))
        print(f"{name:20s}" + "".join(f"{cell:>18s}" for cell in cells))
    if picture:
        pictures.lines(picture, np.array(counts, float), "denoising steps", {
            "MB kept for a backward pass": kept, "seconds of an update": seconds})
    return kept


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a motion (default 20 = 80 frames)")
    parser.add_argument("--prompts", type=int, default=32, help="motions of the update (default 32)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--picture", metavar="PNG", help="draw what is printed")
    options = parser.parse_args(argv)
    runs.pick_threads(options.threads)
    measure_memory((1, 2, 5, 10, 20, 50), options.prompts, options.tokens, options.picture)


if __name__ == "__main__":
    runs.run_main(main)
