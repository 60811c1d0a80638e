"""The metrics of the text-to-motion benchmark, as pure functions of embeddings.

FID, R-precision, MM-Dist, diversity and multimodality (Guo et al., CVPR 2022), the hypervolume of a set of
rewards, and the benchmark's interval over repeats. Everything is computed in float64.

Letters: n motions, c width of an embedding, p prompts, g samples of a prompt, k rewards.
"""
import math

import torch


def _double(x):
    return torch.as_tensor(x).detach().to("cpu", torch.float64)


def pairwise_distance(x, y):
    """Euclidean distances (n m) of rows x (n c) and y (m c), float64.

    Not expanded to |x|^2 + |y|^2 - 2xy as in the official code: in float32 that is NaN, or half a unit wrong,
    exactly where a perfect model should score 0.
    """
    x, y = _double(x), _double(y)
    return torch.cat([(row - y).square().sum(-1).sqrt() for row in x.split(1)]).reshape(len(x), len(y))


def hit_chance(distance, ks, correct=None):
    """Chance that a correct candidate is among the k nearest, per query and k, ties broken at random.

    distance (n m); correct (n m) bool marks the right candidates (default: the diagonal). Returns (hits (n,
    len(ks)) float64, tied (n,) bool). Without ties a hit is 0 or 1; a collapsed encoder gets exactly k / m,
    so it cannot look good (or bad) through the order in which a sort happens to leave equal numbers.
    """
    distance = _double(distance)
    correct = torch.eye(len(distance), dtype=torch.bool) if correct is None else correct
    best = distance.masked_fill(~correct, math.inf).min(dim=1, keepdim=True).values
    nearer = (distance < best).sum(1)
    equal = (distance == best).sum(1)
    right = ((distance == best) & correct).sum(1)
    hits = []
    for k in ks:
        # Draw the places left after the strictly nearer ones from the `equal` candidates without replacement;
        # `miss` is the chance that all of these draws are wrong.
        places, miss = (k - nearer).clamp(min=0), torch.ones(len(distance), dtype=torch.float64)
        for i in range(k):
            draw = (equal - right - i).clamp(min=0) / (equal - i).clamp(min=1)
            miss = torch.where(i < torch.minimum(places, equal), miss * draw, miss)
        hits.append(1 - miss)
    return torch.stack(hits, dim=1), equal > right


def r_precision(text, motion, pool=32, top_k=3, order=None):
    """R-precision of text-to-motion retrieval in pools of `pool`, as in the text-to-motion benchmark.

    text, motion (n c), row i of both belongs together. `order` (n,) shuffles the rows first, since pools are
    random batches in the benchmark. Incomplete pools are dropped; with fewer than `pool` rows there is one
    pool of all rows. Returns a dict: "top" (top_k,) float64, "pool" the size used (chance is k / pool),
    "ties" the share of queries whose own motion is as near as a wrong one.
    """
    if order is not None:
        text, motion = text[order], motion[order]
    pool = min(pool, len(text))
    starts = range(0, len(text) - pool + 1, pool)
    hits, tied = zip(*(
        hit_chance(pairwise_distance(text[k:k + pool], motion[k:k + pool]), range(1, top_k + 1))
        for k in starts))
    return {"top": torch.cat(hits).mean(0), "pool": pool, "ties": torch.cat(tied).double().mean().item()}


def mm_dist(text, motion):
    """Mean distance of each text (n c) to its own motion (n c); "matching score" in the official code."""
    return (_double(text) - _double(motion)).norm(dim=-1).mean().item()


def fid(x, y):
    """Frechet distance of two sets of embeddings (n c) and (m c), float64, never negative.

    |mu_x - mu_y|^2 + tr(C_x) + tr(C_y) - 2 tr((C_x^1/2 C_y C_x^1/2)^1/2), the last trace through the
    eigenvalues of a symmetric matrix: unlike a general matrix square root it cannot turn complex when there
    are fewer rows than dimensions. The estimate is biased upward for small sets: compare equal n only.
    """
    x, y = _double(x), _double(y)
    if min(len(x), len(y)) < 2:
        raise ValueError("fid needs at least two embeddings on each side")
    cov_x, cov_y = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(x.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def draw_pairs(n, times, generator):
    """Two index sets (times,) of range(n), each drawn without replacement (at most n of them)."""
    times = min(times, n)
    return torch.randperm(n, generator=generator)[:times], torch.randperm(n, generator=generator)[:times]


def diversity(motion, first, second):
    """Mean distance of motion[first] and motion[second]; motion (n c), index sets from draw_pairs (300)."""
    return mm_dist(motion[first], motion[second])


def multimodality(motion, first, second):
    """Mean distance of samples of the SAME prompt; motion (p g c), index sets into g for all prompts (10)."""
    return mm_dist(motion[:, first], motion[:, second])


def student(freedom):
    """97.5 % quantile of Student's t: a 95 % interval is the mean +- so many standard errors."""
    if freedom <= 8:
        return (math.inf, 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)[freedom]
    z = 1.959964  # Abramowitz & Stegun 26.7.5; the error is below 3e-4
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96,
             (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**k for k, term in enumerate(terms))


def mean_interval(values):
    """(mean, half width of the 95 % interval) over the first axis (n ...): by Student's t, NaN for one value.
    From 20 on the benchmark's formula, 1.96 * population std / sqrt(n), so that papers can be compared."""
    values = torch.as_tensor(values, dtype=torch.float64)  # a list of floats must not pass through float32
    n, mean = len(values), values.mean(0)
    if n >= 20:
        return mean, 1.96 * values.std(0, correction=0) / math.sqrt(n)
    if n == 1:
        return mean, torch.full_like(mean, math.nan)
    return mean, student(n - 1) * values.std(0) / math.sqrt(n)


def clustered_interval(values, clusters):
    """(mean, half width of the 95 % interval) of values (n) that are alike within clusters, n names: prompts
    that ask for the same thing succeed and fail together. NaN for one cluster."""
    values, sums = [float(value) for value in values], {}
    mean = math.fsum(values) / len(values)
    for value, name in zip(values, clusters):
        sums[name] = sums.get(name, 0.0) + value - mean
    groups = len(sums)
    if groups < 2:
        return mean, math.nan
    # The sandwich estimator with its usual small-sample factor (Cameron & Miller 2015, section II).
    variance = groups / (groups - 1) * sum(s * s for s in sums.values()) / len(values) ** 2
    return mean, student(groups - 1) * math.sqrt(variance)


def hypervolume(points, reference):
    """Volume of the union of boxes between the reference point (k) and each point (n k), larger is better. A
    point that is not above the reference in every component adds nothing. Exact for every k: slabs between
    the values of the last component, down to the staircase of two (Fonseca et al. 2006); the time grows with
    n^(k - 1). Raises ValueError for points of another width."""
    points, reference = torch.as_tensor(points).double(), torch.as_tensor(reference).double()
    if points.ndim != 2 or reference.shape != points.shape[1:] or not reference.numel():
        raise ValueError(f"points {tuple(points.shape)}, reference {tuple(reference.shape)}: must be n k, k")
    points, k = points - reference, len(reference)
    points = points[(points > 0).all(1)]
    if k == 1:
        return max(points[:, 0].tolist(), default=0.0)
    if k == 2:
        points = points[points[:, 0].argsort(descending=True)]
        height = points[:, 1].cummax(0).values  # of the stairs between a point and the next
        width = points[:, 0] - torch.cat([points[1:, 0], points.new_zeros(1)])[:len(points)]
        return float((width * height).sum())
    levels = torch.cat([points.new_zeros(1), points[:, -1].unique()])  # ascending
    return sum((hypervolume(points[points[:, -1] >= top, :-1], torch.zeros(k - 1)) * float(top - bottom)
                for bottom, top in zip(levels, levels[1:])), 0.0)


def benchmark_embeddings(text, motion, real, *, generator, pool=32, pairs=300):
    """One repeat from embeddings: text and motion (n c) in pairs, real (m c) ground-truth motions."""
    order = torch.randperm(len(motion), generator=generator)
    ranked = r_precision(text, motion, pool=pool, order=order)
    return {
        "fid": fid(motion, real),
        **{f"r_precision_top{k}": value.item() for k, value in enumerate(ranked["top"], 1)},
        "mm_dist": mm_dist(text, motion),
        "diversity": diversity(motion, *draw_pairs(len(motion), pairs, generator)),
        "r_precision_pool": float(ranked["pool"]), "r_precision_ties": ranked["ties"]}
