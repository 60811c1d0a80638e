"""Toy networks and data that the tests of both PPO scripts share."""
import copy

import numpy as np
import torch

import ppo_motion
from common import datasets, freeze, generator, retrieval, tokenizer, training

WIDTH = 251  # features of a KIT frame
CAPTIONS = ["a person walks forward", "someone turns left slowly", "a man waves", "a person jumps twice",
            "a person claps", "somebody walks in a circle"]
COMPOSED = ["a person walks forward and claps", "a man waves then turns left", "a person jumps and waves"]


def normal(*shape, k=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(0, k, "test"), dtype=dtype)


def uniforms(*shape, k=0):
    return torch.rand(*shape, generator=generator(0, k, "uniforms"))


def small_gpt(codes=12, text_dim=16, width=16, layers=1, block=7, sharp=3.0, k=0):
    """A random policy whose distributions are far from uniform."""
    sizes = dict(codes=codes, text_dim=text_dim, width=width, heads=2, base_layers=layers, head_layers=layers,
                 block_size=block)
    gpt = ppo_motion.MotionGPT(**sizes)
    gpt.sizes = sizes
    training.initialise(gpt, generator(0, k, "gpt"))
    gpt.trans_head["head"].weight.data.mul_(sharp)
    return gpt.eval()


def tiny_clips():
    rng = np.random.default_rng(0)
    return [datasets.Clip(f"clip-{k}", rng.normal(size=(4 * (2 + k % 3), WIDTH)).astype(np.float32),
                          [caption, f"{caption} again"], [[], []], [{}, {}])
            for k, caption in enumerate(CAPTIONS)]


def composed_clips():
    """Captions without a motion."""
    empty = np.zeros((0, WIDTH), np.float32)
    return [datasets.Clip(caption, empty, [caption], [[]], [{}]) for caption in COMPOSED]


def retrieval_model(clips):
    vocabulary = datasets.Vocabulary.from_captions(CAPTIONS + COMPOSED)
    statistics = datasets.Statistics.from_clips(clips, "scorer")
    model = retrieval.RetrievalModel("transformer", vocabulary, statistics, width=16, layers=1, heads=2,
                                      components=8)
    return freeze(model)


def tiny_policy(halvings=1, shift=0.2):
    """All networks at toy size with random weights; the policy is `shift` away from its reference."""
    vq = tokenizer.VQVAE(WIDTH, 8, 4, 12, halvings)
    vocabulary = datasets.Vocabulary.from_captions(CAPTIONS + COMPOSED)
    text = tokenizer.TextEncoder(vocabulary.words, 16, 1, 2)
    for k, part in enumerate((vq, text)):
        training.initialise(part, generator(0, k, "parts"))
        freeze(part)
    vq.quantizer.codebook.copy_(normal(12, 4))
    reference = small_gpt()
    gpt = copy.deepcopy(reference)
    for k, weight in enumerate(gpt.parameters()):
        weight.data.add_(shift * normal(*weight.shape, k=k))
    return ppo_motion.Policy(vq, text, freeze(gpt), freeze(reference))


class Never:
    def check(self):
        pass


def plans(args, iteration=0, rows=None, index=None, apart=()):
    """Minibatches of the samples `rows`, by default one a prompt; index: those that are held; apart: those in
    chunks of their own."""
    rows = list(range(args.prompts)) if rows is None else rows
    return training.epochs(args, rows, index or rows, iteration, apart)
