"""The benchmark's metrics in closed form, and against the official code."""
import itertools
import math
from pathlib import Path

import pytest
import torch

from common import metrics

GOLDEN = sorted((Path(__file__).resolve().parents[2] / "shared" / "golden").glob("metrics_*.npz"))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_fid_of_samples_with_known_moments():
    """|mu1 - mu2|^2 + sum (s1 - s2)^2 for diagonal covariances; the samples have these moments exactly."""
    x = normal(400, 6).double()
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T   # mean 0, covariance I
    s1, s2 = torch.tensor([1.0, 2, 3, 1, 0.5, 0]).double(), torch.tensor([2.0, 2, 1, 0, 1.5, 1]).double()
    shift = torch.arange(6).double()
    expected = (s1 - s2).square().sum().item() + shift.square().sum().item()
    assert metrics.fid(x * s1, x * s2 + shift) == pytest.approx(expected, rel=1e-9)
    rotation = torch.linalg.qr(normal(6, 6, seed=1).double())[0]
    assert metrics.fid(x * s1 @ rotation, (x * s2 + shift) @ rotation) == pytest.approx(expected, rel=1e-7)


def test_identical_embeddings_are_perfect():
    x = normal(70, 24) * 30 + 100           # far from the origin: the expanded distance formula breaks here
    assert metrics.fid(x, x) < 1e-4
    assert torch.diagonal(metrics.pairwise_distance(x, x)).abs().max() == 0
    ranked = metrics.r_precision(x, x)
    assert ranked["top"].tolist() == [1, 1, 1] and ranked["pool"] == 32 and ranked["ties"] == 0
    assert metrics.mm_dist(x, x) == 0


def test_constant_embeddings_score_chance():
    text, motion = normal(64, 8), torch.ones(64, 8)
    ranked = metrics.r_precision(text, motion)
    assert ranked["top"].tolist() == pytest.approx([1 / 32, 2 / 32, 3 / 32]) and ranked["ties"] == 1
    same = torch.eye(32, dtype=torch.bool)
    same[:, :2] = True                      # c right ones among 32 equal ones: 1 - C(32-c, k) / C(32, k)
    hits, _ = metrics.hit_chance(torch.ones(32, 32), (1, 2), same)
    assert hits[5].tolist() == pytest.approx([3 / 32, 1 - 29 * 28 / (32 * 31)])
    assert hits[0].tolist() == pytest.approx([2 / 32, 1 - 30 * 29 / (32 * 31)])


def test_r_precision_pools_and_order():
    text = normal(40, 8)
    motion = text.roll(1, 0)                # every text finds its motion only by luck
    assert metrics.r_precision(text[:5], text[:5])["pool"] == 5
    worse = text.clone()
    worse[32:] = 1e6                        # rows of an incomplete pool do not count
    assert metrics.r_precision(text, worse)["top"].tolist() == [1, 1, 1]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert metrics.r_precision(text[order], motion[order])["top"].tolist() == metrics.r_precision(
        text, motion, order=order)["top"].tolist()


def test_half_of_two_equal_candidates():
    distance = torch.tensor([[1.0, 1.0, 3.0], [0.0, 2.0, 2.0], [5.0, 1.0, 9.0]])
    hits, tied = metrics.hit_chance(distance, (1, 2, 3))
    assert hits.tolist() == [[0.5, 1, 1], [0, 0.5, 1], [0, 0, 1]] and tied.tolist() == [True, True, False]


def test_diversity_multimodality_interval():
    first, second = metrics.draw_pairs(10, 300, torch.Generator().manual_seed(0))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))      # without replacement
    line = torch.arange(10.0)[:, None]
    assert metrics.diversity(line, torch.tensor([0, 3]), torch.tensor([4, 3])) == 2
    samples = torch.stack([line[:4], 100 + 2 * line[:4]])                            # two prompts, far apart
    assert metrics.multimodality(samples, torch.tensor([0]), torch.tensor([3])) == 4.5
    mean, half = metrics.mean_interval([1.0, 3.0])  # Student's t with one degree of freedom
    assert mean == 2 and half == pytest.approx(12.7062 * 2 ** 0.5 / 2 ** 0.5)
    mean, half = metrics.mean_interval([5.0])
    assert mean == 5 and math.isnan(half)
    mean, half = metrics.mean_interval([1.0, 3.0] * 10)  # the benchmark's own formula
    assert mean == 2 and half == pytest.approx(1.96 / 20 ** 0.5)


def test_students_t():
    """Against a table of the distribution."""
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 9: 2.262, 19: 2.093, 50: 2.009,
             400: 1.966}
    assert {n: pytest.approx(metrics.student(n), abs=6e-4) for n in known} == known
    assert metrics.student(0) == math.inf


def test_alike_prompts_are_one_try():
    """Copies of a prompt add nothing; prompts of clusters of their own give the usual interval."""
    values = [0.1, 0.4, 0.5, 0.9]
    mean, half = metrics.clustered_interval(values, "abcd")
    usual = metrics.mean_interval(values)
    assert (mean, half) == (pytest.approx(float(usual[0])), pytest.approx(float(usual[1])))
    copied = metrics.clustered_interval(values * 5, list("abcd") * 5)
    assert copied == (pytest.approx(mean), pytest.approx(half))
    assert math.isnan(metrics.clustered_interval(values, "aaaa")[1])


def test_benchmark_of_known_embeddings():
    """Generated motions equal their texts; the real ones are the same cloud moved by a known step."""
    text, step = normal(64, 4), torch.tensor([3.0, 0.0, 4.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    table = metrics.benchmark_embeddings(text, text, text + step, generator=generator, pairs=20)
    assert table["fid"] == pytest.approx(25, rel=1e-5) and table["mm_dist"] == 0
    assert [table[f"r_precision_top{k}"] for k in (1, 2, 3)] == [1, 1, 1] and table["r_precision_pool"] == 32
    assert 0 < table["diversity"] < 2 * text.norm(dim=1).max()


def union_of_boxes(points):
    """Volume of the union of the boxes between 0 and the points (n k), by inclusion and exclusion."""
    return sum((-1) ** (size + 1) * math.prod(map(min, zip(*chosen)))
               for size in range(1, len(points) + 1) for chosen in itertools.combinations(points, size))


@pytest.mark.parametrize("k", (1, 2, 3, 4, 5))
def test_hypervolume_of_any_number_of_rewards(k):
    points = torch.rand(7, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    points = torch.cat([points, points[:1], (points[:1] * 0.5)])  # an equal one and a worse one
    reference = torch.full((k,), -0.25)
    volume = metrics.hypervolume(points, reference)
    assert volume == pytest.approx(union_of_boxes((points + 0.25).tolist()), rel=1e-12)
    assert metrics.hypervolume(points - 2, reference) == 0.0 and isinstance(volume, float)
    assert metrics.hypervolume([[2.0] * k, [3.0] + [1.0] * (k - 1)], [1.0] * k) == (1.0 if k > 1 else 2.0)


@pytest.mark.parametrize("points, reference", [
    (torch.ones(3, 2), torch.zeros(3)), (torch.ones(3, 2), 0.0), (torch.ones(3), torch.zeros(3)),
    (torch.ones(3, 0), torch.zeros(0))])
def test_hypervolume_refuses_other_shapes(points, reference):
    with pytest.raises(ValueError, match="must be n k, k"):
        metrics.hypervolume(points, reference)
