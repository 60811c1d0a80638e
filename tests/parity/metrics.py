"""Compare the benchmark's metrics with those of the public official code (see tests/parity)."""
import numpy as np
import torch

from common import metrics
from tests.parity.rows import error


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    with np.load(path) as z, torch.no_grad():
        return check_metrics(z)


def check_metrics(z):
    text, motion, weak = z["text"], z["motion"], z["motion_weak"]
    rows = [("dist", error(metrics.pairwise_distance(text, motion), z["dist"]), 1e-3)]
    hits, tied = [], []
    for start in range(0, len(text) // 32 * 32, 32):
        part = slice(start, start + 32)
        hit, tie = metrics.hit_chance(metrics.pairwise_distance(text[part], motion[part]), (1, 2, 3))
        hits.append(hit)
        tied.append(tie)
    # Where two motions are equally near, the official result is whatever its sort did and ours the expected
    # value. Those rows are checked for being tied in the reference distances, all others exactly.
    tied = torch.cat(tied)
    reference = torch.from_numpy(z["topk_mat"][:len(tied)]).double()
    settled = torch.where(tied[:, None], reference, torch.cat(hits))
    # equal rows of a float32 matrix product can still differ in the last bit, hence the 1e-4
    wrong_ties = sum((np.abs(z["dist"][i, i // 32 * 32:i // 32 * 32 + 32] - z["dist"][i, i]) < 1e-4).sum() < 2
                     for i in torch.where(tied)[0].tolist())
    rows += [("topk_mat (rows without ties)", error(settled, reference), 1e-9),
             ("tied rows", float(wrong_ties), 0.0),
             ("r_precision", error(settled.mean(0), z["r_precision"]), 1e-9),
             ("r_precision_weak", error(metrics.r_precision(text, weak)["top"], z["r_precision_weak"]), 1e-9),
             ("matching_score_vec",
              error(np.linalg.norm(np.float64(text) - motion, axis=1), z["matching_score_vec"]), 1e-3),
             ("mm_dist", error(metrics.mm_dist(text, motion), z["mm_dist"], relative=True), 1e-5)]
    case = metrics.pairwise_distance(z["nan_case"], z["nan_case"])
    apart = ~np.eye(len(case), dtype=bool)          # the official values are only sound off the diagonal
    rows += [("nan_case_dist (off diagonal)", error(case[apart], z["nan_case_dist"][apart]), 0.05),
             ("nan_case (diagonal is 0)", error(case.diagonal(), np.zeros(len(case))), 0.0)]
    for name in ("full", "deficient"):
        x, y = z[f"fid_{name}_x"], z[f"fid_{name}_y"]
        # 1e-6 for eigh64 too: its means were taken in float32
        rows += [(f"fid_{name}_{way}", error(metrics.fid(x, y), z[f"fid_{name}_{way}"], relative=True), 1e-6)
                 for way in ("official", "eigh64")]
        field = f"fid_{name}_self_official"
        rows += [(field, error(metrics.fid(x, x), z[field]), 1e-4)]
    between = metrics.fid(text, motion)
    rows += [("fid_text_motion_official", error(between, z["fid_text_motion_official"], relative=True), 1e-6),
             ("fid_text_motion_eigh64", error(between, z["fid_text_motion_eigh64"], relative=True), 1e-6),
             ("diversity",
              error(metrics.diversity(motion, z["div_first"], z["div_second"]), z["diversity"]), 1e-4),
             ("multimodality", error(metrics.multimodality(z["mm_act"], z["mm_first"], z["mm_second"]),
                                     z["multimodality"]), 1e-4)]
    mean, half = metrics.mean_interval(z["rep_values"])
    return rows + [("rep_mean", error(mean, z["rep_mean"]), 1e-12),
                   ("rep_ci95", error(half, z["rep_ci95"]), 1e-12)]
