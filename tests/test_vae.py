"""common/vae.py: the VAE, and the skips of its transformer."""
import functools
import inspect

import numpy as np
import pytest
import torch
from torch import nn

from common import (
    InputError, NonFiniteError, datasets, features, generator, training, vae as vae_room)
from common.features import T2M

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(patch_dims=12, width=16, heads=2, layers=3, tokens=3, dims=5)


def normal(*shape, k=0):
    return torch.randn(*shape, generator=generator(0, k, "test"))


def clips(count=24):
    """Short motions that differ in one slow wave of all features."""
    made = []
    for k in range(count):
        frames = 24 + 4 * (k % 4)
        wave = np.sin(np.arange(frames)[:, None] / (4 + k % 5) + np.arange(263) / 9)
        made.append(datasets.Clip(f"{k:03d}", ((1 + k % 3) * wave).astype(np.float32), ["x"], [[]], [{}]))
    return made


def fit(folder, count=24, **changes):
    """A small VAE and its notes; the clips it has learnt from."""
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
        vae, part = vae_room.MotionVAE(263, **SMALL), clips(count)
    options = dict(shaped_by="test", seed=0, device="cpu", cache_dir=folder, use_cache=False,
                   iterations=150, batch=16)
    notes = vae_room.fit_vae(vae, part, torch.ones(263), **{**options, **changes})
    return vae, notes["vae"], part


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("vae"), iterations=200)


class Marked(nn.Module):
    """A layer that writes its own number and remembers what it read."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x, mask, memory):
        self.read, self.memory = x, memory
        return torch.full_like(x, float(self.number))


@pytest.mark.parametrize("layers", (1, 3, 5, 7))
def test_skips_join_mirror_images(layers):
    """Layer 3 of 5 also reads layer 1, layer 4 also layer 0; the middle one reads its neighbour alone."""
    part = vae_room.Skips([Marked(k) for k in range(layers)], 4)
    for skip in part.skips:  # neighbour + 100 x mirror image
        skip.weight.data = torch.cat([torch.eye(4), 100 * torch.eye(4)], 1)
        skip.bias.data.zero_()
    memory = torch.zeros(1, 2, 4)
    part(torch.full((1, 3, 4), -1.0), torch.ones(1, 3, dtype=torch.bool), memory)
    half = layers // 2
    for k, layer in enumerate(part.layers):
        wanted = k - 1 + (100 * (layers - 1 - k) if k > half else 0)
        assert (layer.read == wanted).all() and layer.memory is memory
    with pytest.raises(InputError, match="4 layers: skips need an odd number"):
        vae_room.Skips([Marked(k) for k in range(4)], 4)


def test_padding_has_no_say():
    """Neither in the latents nor in what comes back."""
    vae = vae_room.MotionVAE(263, **SMALL)
    training.initialise(vae, generator(0, 0, "weights"))
    vae.patches.basis.copy_(torch.linalg.qr(normal(*vae.patches.basis.shape))[0])
    motion = normal(2, 32, 263)
    lengths = torch.tensor([20, 32])
    z = vae.encode(motion, lengths)
    assert z.shape == (2, 3, 5)
    other = motion.clone()
    other[0, 20:] = 9.0
    torch.testing.assert_close(vae.encode(other, lengths), z)
    torch.testing.assert_close(vae.encode(motion[:1, :20]), z[:1])
    together, alone = vae.decode(z, lengths), vae.decode(z[:1], lengths[:1])
    assert together.shape == (2, 32, 263) and alone.shape == (1, 20, 263)
    torch.testing.assert_close(together[:1, :20], alone)


def test_it_gives_motion_back(fitted):
    vae, notes, part = fitted
    errors, spread = [], []
    for clip in part:
        motion = torch.from_numpy(clip.features)[None]
        back = vae.decode(vae.encode(motion), torch.tensor([motion.shape[1]]))
        errors.append((back - motion).square().mean().item())
        spread.append(motion.square().mean().item())
    assert np.mean(errors) < 0.35 * np.mean(spread) and notes["loss"] > 0


def test_latents_have_mean_0_and_spread_1(fitted):
    vae, _, part = fitted
    z = torch.cat([vae.encode(torch.from_numpy(clip.features)[None]) for clip in part])
    torch.testing.assert_close(z.mean(0), torch.zeros(3, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(3, 5), atol=1e-3, rtol=0)


def test_the_decoder_is_frozen_and_lets_gradients_through(fitted):
    vae, *_ = fitted
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    z = normal(2, 3, 5).requires_grad_()
    motion = vae.decode(z, torch.tensor([12, 20]))
    first, = torch.autograd.grad(motion[0, :12].sum(), z, retain_graph=True)
    assert first[0].abs().min() > 0 and first[1].abs().max() == 0


def test_what_a_denoiser_needs_of_its_codec(fitted):
    vae, *_ = fitted
    mask = vae.mask(torch.tensor([4, 196]), 99)
    assert mask.shape == (2, 3) and mask.all() and (vae.patch, vae.dims) == (4, 5)
    part = clips(3)
    motion, lengths = vae_room.reconstruction(vae, part)(None, torch.tensor([24, 28, 32]), "x", 0)
    whole = datasets.collate(part).motion
    assert motion.shape == whole.shape and lengths.tolist() == [24, 28, 32]
    one = vae.decode(vae.encode(torch.from_numpy(part[0].features)[None]), torch.tensor([24]))
    torch.testing.assert_close(motion[:1, :24], one)


def test_training_repeats_itself_and_is_cached(tmp_path, monkeypatch):
    before = torch.get_rng_state()
    vae, notes, _ = fit(tmp_path, iterations=3, use_cache=True)
    assert torch.equal(torch.get_rng_state(), before)
    again, same, _ = fit(tmp_path, iterations=3)
    assert notes == same
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in vae.state_dict().items())

    @functools.wraps(vae_room.train_vae)  # its source is a part of the key
    def never(*args, **options):
        raise RuntimeError("trained again")
    monkeypatch.setattr(vae_room, "train_vae", never)
    stored, read, _ = fit(tmp_path, iterations=3, use_cache=True)
    assert read == notes
    assert all(torch.equal(value, stored.state_dict()[key]) for key, value in vae.state_dict().items())
    for changes in (dict(iterations=4), dict(seed=1), dict(shaped_by="other"), dict(kl_weight=1.0),
                    dict(batch=8), dict(lr=1e-3)):
        with pytest.raises(RuntimeError, match="trained again"):
            fit(tmp_path, **{"iterations": 3, "use_cache": True, **changes})


def test_a_comment_trains_nothing_again_and_another_network_does(tmp_path, monkeypatch):
    source, trained, train = inspect.getsource, [], vae_room.train_vae
    monkeypatch.setattr(vae_room, "train_vae", functools.wraps(train)(
        lambda *args, **options: (trained.append(options), train(*args, **options))[1]))
    fit(tmp_path, iterations=2, use_cache=True)
    commented = lambda part: "# why\n" + source(part).replace('"""', '"""A ', 1)
    monkeypatch.setattr(inspect, "getsource", commented)
    fit(tmp_path, iterations=2, use_cache=True)
    assert len(trained) == 1
    monkeypatch.setattr(inspect, "getsource", lambda part: source(part).replace("F.gelu", "F.relu"))
    fit(tmp_path, iterations=2, use_cache=True)
    assert len(trained) == 2


def test_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(NonFiniteError, match="VAE, iteration 0: loss nan"):
        fit(tmp_path, iterations=3, kl_weight=float("nan"))


def test_the_weights_of_the_features_count(tmp_path):
    """The patches are those of the joint space: what matters little is left out first."""
    weights = torch.from_numpy(np.asarray(features.block_weights(T2M, features.PATCH_WEIGHTS)))
    vae = vae_room.MotionVAE(263, **SMALL)
    vae_room.fit_vae(vae, clips(), weights, shaped_by="test", seed=0, device="cpu", cache_dir=tmp_path,
                     use_cache=False, iterations=1)
    plain, *_ = fit(tmp_path, iterations=1)
    assert not torch.equal(vae.patches.std, plain.patches.std)


def test_the_docstring_names_the_differences():
    assert "Not in the paper" in inspect.getdoc(vae_room)
