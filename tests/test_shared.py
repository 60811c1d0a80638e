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
