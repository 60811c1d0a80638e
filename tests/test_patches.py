"""Tokens of motion: lapped segments give the motion back, do not see padding, and meet at their seams."""
import numpy as np
import pytest
import torch

from common import datasets, features, generator
from common.datasets import Clip, Statistics
from common.features import T2M
from common.patches import LappedCodec, PatchCodec


def normal(*shape, name="draw"):
    return torch.randn(shape, generator=generator(0, 0, name))


def walks(count=12, frames=40, width=6):
    """Clips of a few smooth waves, so that a few components hold them."""
    t = np.arange(frames)[:, None]
    made = []
    for k in range(count):
        speed, phase = (normal(width, name=f"{part} {k}").numpy() for part in ("speed", "phase"))
        wave = np.sin(0.1 * (1.5 + 0.3 * speed) * t + phase).astype(np.float32)
        made.append(Clip(str(k), wave, ["walk"], [[]], [{}]))
    return made


def complete(codec):
    """The codec with a basis that spans everything."""
    codec.basis.copy_(torch.linalg.qr(normal(*codec.basis.shape, name="basis"))[0])
    return codec


@pytest.mark.parametrize("kind, tokens", [(PatchCodec, 5), (LappedCodec, 7)])
def test_nothing_is_lost_with_all_components(kind, tokens):
    codec = complete(kind(4, 6, kind.width * 4 * 6))
    codec.mean.copy_(normal(6, name="mean"))
    codec.std.copy_(normal(6, name="std").abs() + 0.5)
    motion = normal(2, 20, 6)
    x = codec.encode(motion)
    assert x.shape[1] == tokens == codec.count(20)
    torch.testing.assert_close(codec.decode(x), motion, rtol=1e-4, atol=1e-4)


def test_squares_of_the_window_sum_to_one():
    squares = LappedCodec(4, 1, 3).window.square().reshape(3, 4)
    torch.testing.assert_close(squares.sum(0), torch.ones(4))
    assert torch.allclose(squares, squares.flip(0, 1))


@pytest.mark.parametrize("kind", (PatchCodec, LappedCodec))
def test_padding_has_no_say(kind):
    """A motion in a longer batch has the tokens, the mask and the frames that it has alone."""
    codec = complete(kind(4, 6, kind.width * 4 * 6))
    motion, lengths = normal(2, 20, 6), torch.tensor([12, 20])
    motion[0, 12:] = float("nan") if kind is LappedCodec else 7.0
    together, mask = codec.encode(motion, lengths), codec.mask(lengths, codec.count(20))
    alone = codec.encode(motion[:1, :12])
    assert mask.sum(1).tolist() == [alone.shape[1], codec.count(20)]
    torch.testing.assert_close(together[0, :alone.shape[1]], alone[0])
    back = codec.decode(torch.where(mask[..., None], together, 0.0))
    torch.testing.assert_close(back[0, :12], motion[0, :12], rtol=1e-4, atol=1e-4)


def test_components_are_those_of_whole_segments():
    """Two small decompositions agree with one large one where frames have few directions."""
    clips, codec = walks(), LappedCodec(4, 6, 10)
    statistics = Statistics.from_clips(clips, "generator", blocks={})
    share = codec.fit(clips, statistics)
    rows = torch.cat([codec.segments((torch.from_numpy(clip.features)[None] - codec.mean) / codec.std)[0]
                      for clip in clips]).double()
    center, basis, variances, total = codec.principal(rows, 10)
    assert share == pytest.approx(float(variances.sum() / total), abs=1e-6)
    assert torch.allclose(codec.center.double(), center, atol=1e-5)
    overlap = (codec.basis.double().T @ basis).square().sum(0)
    assert torch.allclose(overlap, torch.ones(10, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(codec.basis.T @ codec.basis, torch.eye(10), atol=1e-5)
    x = torch.cat([codec.encode(torch.from_numpy(clip.features)[None])[0] for clip in clips])
    assert torch.allclose(x.var(0, correction=0), torch.ones(10), atol=1e-2)


def test_noise_on_the_tokens_does_not_make_the_motion_hiccup(tmp_path, monkeypatch):
    """The jerk of decoded motion with noise on its whitened tokens, over that of the data: patches that are
    decoded apart jump at each seam."""
    monkeypatch.chdir(tmp_path)
    data = datasets.load_dataset("humanml3d", cache_dir=tmp_path, clips=160)
    clips = data.splits["train"]
    weights = features.block_weights(T2M, features.PATCH_WEIGHTS)

    def jerk(motions):
        return np.mean([features.physical_metrics(features.features_to_joints(m, T2M).numpy(), T2M)["jerk"]
                        for m in motions])
    real = [torch.from_numpy(clip.features) for clip in clips[:12]]
    ratios = {}
    for kind in (PatchCodec, LappedCodec):
        codec = kind(4, T2M.feature_dim, 64)
        codec.fit(clips, Statistics.from_clips(clips, "generator"), weights)
        tokens = [codec.encode(motion[None]) for motion in real]
        noisy = [x + 0.2 * normal(*x.shape, name=f"noise {k}") for k, x in enumerate(tokens)]
        ratios[kind] = jerk([codec.decode(x)[0] for x in noisy]) / jerk(real)
    assert ratios[PatchCodec] > 4 and ratios[LappedCodec] < 1.6
