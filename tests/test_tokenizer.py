"""Motion <-> tokens: padding has no say, the codebook follows its latents, training learns, and its cache.

Golden reference values of the published network are in tests/parity/ppo.py.
"""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import NonFiniteError, datasets, features, generator, length_mask, tokenizer, training

WIDTH = 251  # features of a KIT frame
LENGTHS = (12, 28, 4, 20)


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, k=0):
    return torch.randn(*shape, generator=generator(0, k, "test"))


def random_vq(halvings, feature_dim=7, width=8, codes=20):
    """A tokenizer with biases, statistics and codes of its own: with zero biases half of the bugs hide."""
    vq = tokenizer.VQVAE(feature_dim, width, 4, codes, halvings)
    for k, value in enumerate(vq.state_dict().values()):
        value.copy_(normal(*value.shape, k=k) / math.sqrt(value[0].numel() if value.ndim == 3 else 4))
    vq.std.abs_().add_(0.5)
    return vq.requires_grad_(False)


def motions(lengths=LENGTHS, feature_dim=7):
    return normal(len(lengths), max(lengths), feature_dim), torch.tensor(lengths)


def clips(count=40, width=WIDTH, seed=0):
    """Two slow waves, seen in all features: something that a few codes can tell. And noise, for whitening."""
    rng, out = np.random.default_rng(seed), []
    mix = rng.normal(size=(2, width))
    for k in range(count):
        t = np.arange(4 * int(rng.integers(4, 9)))[:, None]
        wave = np.sin(0.2 * t + rng.uniform(0, 6, 2)) @ mix + rng.normal(0, 0.3, (len(t), width))
        out.append(datasets.Clip(f"clip-{k}", wave.astype(np.float32), [f"caption {k}"], [[]], [{}]))
    return out


def dataset(skeleton=features.KIT, fingerprint="f"):
    part = clips(width=skeleton.feature_dim)
    splits = {"train": part, "val": part, "test": part}
    return datasets.Dataset("toy", skeleton, splits, fingerprint)


# ---- lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halvings", (1, 2))
def test_a_batch_of_unequal_lengths_equals_one_by_one(halvings):
    """Latents, codes and decoded motions; whatever stands behind the ends."""
    vq, (motion, lengths) = random_vq(halvings), motions()
    inside = (torch.arange(motion.shape[1]) < lengths[:, None])[..., None]
    x = motion.where(inside, 1e3)
    latents, counts = vq.encode(x, lengths)
    codes, same = vq.tokenise(x, lengths)
    decoded, frames = vq.decode(codes.where(torch.arange(codes.shape[1]) < counts[:, None], 99), counts)
    assert torch.equal(counts, lengths // 2**halvings) and torch.equal(same, counts)
    assert torch.equal(frames, lengths) and decoded.shape == motion.shape
    assert codes.shape == latents.shape[:2] == (4, 28 // 2**halvings) and latents.shape[2] == 4
    assert len(codes.unique()) > 3
    for k, n in enumerate(LENGTHS):
        alone, count = vq.encode(motion[k:k + 1, :n], lengths[k:k + 1])
        assert alone.shape[1] == count == n // 2**halvings
        torch.testing.assert_close(latents[k, :count], alone[0], rtol=0, atol=1e-4)
        own, _ = vq.tokenise(motion[k:k + 1, :n], lengths[k:k + 1])
        assert torch.equal(codes[k, :count], own[0])
        part, _ = vq.decode(own, counts[k:k + 1])
        torch.testing.assert_close(decoded[k, :n], part[0], rtol=0, atol=1e-4)


def plain(layers, x):
    """The same layers without the masks of tokenizer.walk."""
    for layer in layers:
        if isinstance(layer, (nn.Sequential, tokenizer.Stack)):
            x = plain(layer.model if isinstance(layer, tokenizer.Stack) else layer, x)
        elif isinstance(layer, tokenizer.ResidualBlock):
            x = x + layer.conv2(F.relu(layer.conv1(F.relu(x))))
        else:
            x = layer(x)
    return x


@pytest.mark.parametrize("halvings", (1, 2))
def test_zeroing_the_codes_alone_would_not_do(halvings):
    """The last frames would be wrong by the order of one, because later layers have biases: the masks before
    every convolution are needed, and the test above would see it."""
    vq = random_vq(halvings)
    counts = torch.tensor([3, 14 // halvings])
    codes = torch.arange(2 * int(counts.max())).reshape(2, -1) % 20
    vectors = vq.quantizer.codebook[codes] * (torch.arange(codes.shape[1]) < counts[:, None])[..., None]
    n = 3 * 2**halvings
    whole = plain(vq.decoder.model, vectors.mT)[0, :, :n]
    alone = plain(vq.decoder.model, vectors[:1, :3].mT)[0]
    assert (whole - alone)[:, -2:].abs().max() > 0.1
    torch.testing.assert_close(vq.reconstruct(vectors, counts)[0, :n].T, alone, rtol=0, atol=1e-5)
    x = normal(1, 7, 24)
    x[..., 12:] = 0
    short, long = plain(vq.encoder.model, x[..., :12]), plain(vq.encoder.model, x)
    assert (long[..., :short.shape[2]] - short).abs().max() > 0.1


def test_nothing_stands_behind_the_end():
    """What is reconstructed there is zero before the statistics come in: the loss counts on it."""
    vq, (motion, lengths) = random_vq(1), motions()
    latents, counts = vq.encode(motion, lengths)
    recon = vq.reconstruct(latents, counts)
    outside = torch.arange(28) >= lengths[:, None]
    assert (recon[outside] == 0).all() and (recon[~outside] != 0).any(-1).all()


def test_frames_that_fill_no_token_are_left_out():
    vq = random_vq(2)
    for frames, tokens in ((4, 1), (7, 1), (8, 2), (11, 2)):
        codes, counts = vq.tokenise(normal(1, frames, 7), torch.tensor([frames]))
        assert codes.shape == (1, tokens) and counts.tolist() == [tokens]


# ---- the network -------------------------------------------------------------------------------------------


def test_large_dilations_come_first_in_both_directions(monkeypatch):
    """In the order of execution, not of construction (spec section 3: easy to get wrong)."""
    seen, conv = [], nn.Conv1d.forward

    def spy(layer, x):
        if layer.kernel_size == (3,) and layer.in_channels == layer.out_channels == 8:
            seen.append(layer.dilation[0])
        return conv(layer, x)
    monkeypatch.setattr(nn.Conv1d, "forward", spy)
    vq = random_vq(2)
    latents, counts = vq.encode(normal(1, 16, 7), torch.tensor([16]))
    assert seen == [9, 3, 1, 9, 3, 1]
    seen.clear()
    vq.reconstruct(latents, counts)
    assert seen == [9, 3, 1, 1, 9, 3, 1, 1, 1]  # a convolution after each upsampling, and one before the last


@pytest.mark.parametrize("halvings, reach", [(1, 31), (2, 89)])
def test_a_token_sees_its_surroundings(halvings, reach):
    """Receptive field, backwards: 1 + 13 rows after the last halving, 2 n + 2 before it, 13 more, ..."""
    vq, x = random_vq(halvings, width=16), normal(1, 120, 7).requires_grad_()
    vq.encode(x, torch.tensor([120]))[0][0, 0].sum().backward()
    seen = x.grad[0].abs().sum(-1) > 0
    assert not seen[reach + 1:].any() and seen[reach - 3:reach + 1].any()
    assert seen[:reach + 1].float().mean() > 0.9


def test_the_nearest_code_and_the_first_of_equal_ones():
    vq = tokenizer.VQVAE(3, 4, 2, 4, 1)
    vq.quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, -3.0]]))
    latents = torch.tensor([[[0.4, 0.1], [1.2, 0.0], [5.0, 1.0]], [[0.0, -1.4], [0.0, -1.6], [1.0, 0.0]]])
    assert vq.nearest(latents).tolist() == [[0, 1, 1], [0, 3, 0]]
    vq = random_vq(1)
    latents = normal(50, 4)
    distance = (latents[:, None] - vq.quantizer.codebook).square().sum(-1)
    assert torch.equal(vq.nearest(latents), distance.argmin(1))


def test_raw_features_go_in_and_come_out():
    """The tokenizer owns its statistics: other units, with statistics to match, give the same codes."""
    vq, (motion, lengths) = random_vq(1), motions()
    other = copy.deepcopy(vq)
    other.mean.copy_(10 * vq.mean + 3)
    other.std.copy_(10 * vq.std)
    codes, counts = vq.tokenise(motion, lengths)
    assert torch.equal(other.tokenise(10 * motion + 3, lengths)[0], codes)
    decoded, _ = vq.decode(codes, counts)
    torch.testing.assert_close(other.decode(codes, counts)[0], 10 * decoded + 3, rtol=1e-4, atol=1e-3)


# ---- codebook and loss -------------------------------------------------------------------------------------


def test_ema_and_reset_by_hand():
    """Code 0 is chosen twice, code 1 once, code 2 never: a count below one puts it where a latent is, and its
    running sum goes on from what it was, not from the new place."""
    vq = tokenizer.VQVAE(3, 4, 2, 3, 1)
    book = tokenizer.EMACodebook(vq.quantizer.codebook, torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    assert vq.quantizer.codebook.tolist() == [[1, 0], [0, 1], [-1, -1]] and book.counts.tolist() == [1, 1, 1]
    latents = torch.tensor([[2.0, 0.0], [4.0, 2.0], [0.0, 3.0]])
    fresh = torch.tensor([[9.0, 9.0], [8.0, 8.0], [7.0, 6.0]])
    assert book.update(latents, torch.tensor([0, 0, 1]), fresh, mu=0.9) == 1
    torch.testing.assert_close(book.counts, torch.tensor([1.1, 1.0, 0.9]))
    torch.testing.assert_close(book.sums, torch.tensor([[1.5, 0.2], [0.0, 1.2], [-0.9, -0.9]]))
    expected = torch.tensor([[1.5 / 1.1, 0.2 / 1.1], [0.0, 1.2], [7.0, 6.0]])
    torch.testing.assert_close(vq.quantizer.codebook, expected)
    assert book.update(latents, torch.tensor([2, 2, 2]), fresh, mu=0.9) == 2
    torch.testing.assert_close(book.counts, torch.tensor([0.99, 0.9, 1.11]))
    alive = (0.9 * torch.tensor([-0.9, -0.9]) + 0.1 * latents.sum(0)) / 1.11
    expected = torch.stack([fresh[0], fresh[1], alive])
    torch.testing.assert_close(vq.quantizer.codebook, expected)


def test_a_code_moves_to_the_mean_of_the_latents_that_choose_it():
    vq = tokenizer.VQVAE(3, 4, 2, 2, 1)
    book = tokenizer.EMACodebook(vq.quantizer.codebook, torch.tensor([[0.0, 0.0], [5.0, 5.0]]))
    latents = torch.tensor([[1.0, 1.0], [3.0, 1.0], [6.0, 4.0], [6.0, 6.0]])
    for _ in range(1500):
        book.update(latents, torch.tensor([0, 0, 1, 1]), torch.zeros(2, 2))
    expected = torch.tensor([[2.0, 1.0], [6.0, 5.0]])
    torch.testing.assert_close(vq.quantizer.codebook, expected, rtol=0, atol=1e-4)


def test_perplexity_counts_codes_in_even_use():
    assert tokenizer.perplexity(torch.tensor([0, 1, 2, 3] * 5), 100).item() == pytest.approx(4.0, rel=1e-4)
    assert tokenizer.perplexity(torch.zeros(7, dtype=torch.int64), 100).item() == pytest.approx(1.0, rel=1e-4)
    shares = np.array([0.5, 0.25, 0.25])
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert tokenizer.perplexity(torch.tensor([0, 0, 1, 2]), 3).item() == pytest.approx(expected, rel=1e-4)


def test_loss_parts_by_hand():
    """Smooth L1 per real frame, commitment per real token; the codes get no gradient from the commitment."""
    x, recon = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)
    recon[0, 0] = torch.tensor([0.5, 2.0, 0.0])  # 1/8, 3/2, 0 by the two branches of smooth L1
    recon[1, 1] = torch.tensor([0.0, 1.0, 3.0])  # 0, 1/2, 5/2
    latents = torch.tensor([[[1.0], [2.0]], [[4.0], [100.0]]], requires_grad=True)
    codes = torch.tensor([[[0.0], [2.0]], [[2.0], [0.0]]], requires_grad=True)
    parts = tokenizer.vq_loss_parts(x, recon, latents, codes, torch.tensor([2, 1]), slice(1, 3))
    frames = 3 * 2
    assert [part.item() for part in parts] == pytest.approx([4.625 / 3 / frames, 4.5 / 2 / frames, 5 / 3])
    parts[2].backward()
    assert codes.grad is None and latents.grad[1, 1] == 0
    assert tokenizer.vq_loss(1.0, 10.0, 100.0) == pytest.approx(1 + 5 + 2)


# ---- training and cache ------------------------------------------------------------------------------------

SIZES = dict(lr=3e-3, batch=4, patch_weight=0.5, seed=0, device="cpu")


def trained(iterations, part=None, seed=0):
    vq = tokenizer.VQVAE(WIDTH, 8, 4, 12, 1)
    training.initialise(vq, generator(0, 0, "tokenizer"))
    notes = tokenizer.train_tokenizer(vq, part or clips(), features.KIT, iterations=iterations,
                                      **{**SIZES, "seed": seed})
    return vq, notes


def test_training_lowers_the_loss_and_repeats_itself():
    first, notes = trained(1)
    vq, later = trained(100)
    (short, noted), (again, same) = trained(12), trained(12)
    assert later["loss"] < 0.85 * notes["loss"]  # the mean of the last ten updates
    assert noted == same and set(later) == {"loss", "dead", "perplexity"}
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in short.state_dict().items())
    assert 1 <= later["perplexity"] <= 12 and 0 <= later["dead"] <= 12
    _, other = trained(1, seed=1)
    assert other["loss"] != notes["loss"]
    batch = datasets.collate(clips())
    mask, errors = length_mask(batch.lengths, batch.motion.shape[1]), []
    for net in (first, vq):
        motion, _ = net.decode(*net.tokenise(batch.motion, batch.lengths))
        errors.append((motion - batch.motion)[mask].square().mean().item())
    assert errors[1] < 0.7 * errors[0]


def test_frames_behind_a_clip_are_never_learnt(monkeypatch):
    """Batches come padded with zeros, which are no motion: other padding must give the same weights."""
    expected, notes = trained(2)
    collate = datasets.collate

    def dirty(*args, **options):
        batch = collate(*args, **options)
        mask = length_mask(batch.lengths, batch.motion.shape[1])
        assert not mask.all()
        return batch._replace(motion=batch.motion.where(mask[..., None], 1e3))
    monkeypatch.setattr(datasets, "collate", dirty)
    vq, same = trained(2)
    assert same == notes
    assert all(torch.equal(value, vq.state_dict()[key]) for key, value in expected.state_dict().items())


def test_the_codebook_starts_as_latents_and_statistics_are_the_train_splits():
    vq, _ = trained(1)
    part = clips()
    own = datasets.Statistics.from_clips(part, "generator")
    weights = features.block_weights(features.KIT, features.PATCH_WEIGHTS)
    torch.testing.assert_close(vq.mean, own.mean)
    torch.testing.assert_close(vq.std, own.std / weights)
    assert (vq.quantizer.codebook != 0).any(1).all()


def test_a_loss_that_is_no_number_stops_the_training():
    vq = tokenizer.VQVAE(WIDTH, 8, 4, 12, 1)
    training.initialise(vq, generator(0, 0, "tokenizer"))
    with pytest.raises(NonFiniteError, match="huge values"):
        tokenizer.train_tokenizer(vq, clips(), features.KIT, iterations=8, **{**SIZES, "lr": 1e15})


def build(tmp_path, data=None, **changes):
    """changes: of the size, of seed or of use_cache."""
    options = {name: changes.pop(name, value) for name, value in (("seed", 0), ("use_cache", True))}
    size = tokenizer.Size(codes=12, code_dim=4, vq_width=8, vq_iterations=2, vq_lr=3e-3, batch=4)
    return tokenizer.fit_tokenizer(data or dataset(), size._replace(**changes), device="cpu",
                                   cache_dir=tmp_path, **options)


def test_the_cache_is_read_and_keyed_by_all_that_shaped_it(tmp_path, capsys, monkeypatch):
    vq, notes = build(tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("  tokenizer: loss ") and "perplexity" in printed
    assert not any(p.requires_grad for p in vq.parameters()) and not vq.training

    def never(*args, **options):
        raise RuntimeError("trained again")
    train = tokenizer.train_tokenizer
    source = training.inspect.getsource
    monkeypatch.setattr(training.inspect, "getsource", lambda part: source(train if part is never else part))
    monkeypatch.setattr(tokenizer, "train_tokenizer", never)
    cached, same = build(tmp_path)
    assert same == notes and capsys.readouterr().out == printed
    assert all(torch.equal(value, cached.state_dict()[key]) for key, value in vq.state_dict().items())
    for changes in (dict(codes=13), dict(code_dim=5), dict(vq_width=9), dict(frames_per_token=4),
                    dict(vq_iterations=3), dict(vq_lr=1e-3), dict(batch=5), dict(seed=1),
                    dict(use_cache=False), dict(data=dataset(fingerprint="g"))):
        with pytest.raises(RuntimeError, match="trained again"):
            build(tmp_path, **changes)
    monkeypatch.setattr(features, "PATCH_WEIGHTS", {**features.PATCH_WEIGHTS, "rotations": 0.5})
    with pytest.raises(RuntimeError, match="trained again"):
        build(tmp_path)


@pytest.mark.parametrize("skeleton, asked, halvings", [
    (features.KIT, 0, 1), (features.T2M, 0, 2), (features.KIT, 4, 2), (features.T2M, 2, 1)])
def test_frames_per_token_by_the_frame_rate(skeleton, asked, halvings, tmp_path, monkeypatch):
    """About a sixth of a second a token: 2 of 12.5 frames, 4 of 20, unless the user names a number."""
    monkeypatch.setattr(tokenizer, "train_tokenizer", lambda vq, *args, **options: {"loss": 1.0})
    monkeypatch.setattr(training.inspect, "getsource", lambda part: "")
    vq, _ = build(tmp_path, dataset(skeleton), frames_per_token=asked)
    assert vq.halvings == halvings
    codes, counts = vq.tokenise(torch.zeros(1, 24, skeleton.feature_dim), torch.tensor([24]))
    assert counts.tolist() == [24 // 2**halvings]
