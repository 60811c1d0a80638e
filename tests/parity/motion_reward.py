"""Compare MotionReward's losses with reference arrays (see tests/parity).

`check` reads the files of the reward's losses; `check_extra` adds what another file holds of them: the loss
that ties two representations, SPL with its filter, the weighted reward.
"""
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import stepwise_motion as sw
from common import datasets, metrics, retrieval
from common.motion_reward import MotionReward
from tests.parity.rows import Rows

TOLERANCE = 1e-9


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    with np.load(path, allow_pickle=False) as stored:
        ref = {key: torch.from_numpy(stored[key]) for key in stored.files if stored[key].dtype.kind in "bif"}
    result = Rows()
    for part in (check_infonce, check_spl, check_terms, check_scores):
        part(result, ref)
    return result.rows()


def with_gradient(result, ref, name, loss, **inputs):
    """Compare a loss, and its gradients with respect to named inputs."""
    result.compare(name, loss, ref[name], TOLERANCE)
    for part, gradient in zip(inputs, torch.autograd.grad(loss, list(inputs.values()))):
        result.compare(f"grad_{name}{part}", gradient, ref[f"grad_{name}{part}"], TOLERANCE)


def check_infonce(result, ref):
    """Sentences that are alike are no negatives; the diagonal always counts."""
    t, m, temp = ref["t"].clone().requires_grad_(), ref["m"].clone().requires_grad_(), float(ref["temp"])
    sentences = F.normalize(ref["sent"], dim=-1)
    alike = sentences @ sentences.T > 2 * float(ref["thr"]) - 1
    with_gradient(result, ref, "infonce", retrieval.info_nce(t, m, temp, alike), _t=t, _m=m)
    result.compare("infonce_nofilter", retrieval.info_nce(t, m, temp), ref["infonce_nofilter"], TOLERANCE)


def check_spl(result, ref):
    """Both forms of SPL, without a filter."""
    t, m, k, temp = ref["t"], ref["m"].clone().requires_grad_(), int(ref["K"]), float(ref["temp"])
    similarity, fail, top = sw.mine(t, m, k)
    result.compare("spl_top", top, ref["spl_top"], 0)
    result.compare("spl_paper_fail", fail, ref["spl_paper_fail"], 0)
    high = float(ref["hi"])
    result.compare("spl_code_ok", ~sw.spl_code(t, m, k, high=high)[1], ref["spl_code_ok"], 0)
    with_gradient(result, ref, "spl_paper", sw.spl_paper(t, m, k, temperature=temp)[0], _m=m)
    with_gradient(result, ref, "spl_code", sw.spl_code(t, m, k, temperature=temp, high=high)[0], _m=m)


def check_terms(result, ref):
    """The other terms of stage 1."""
    gauss_t, gauss_m = ([ref[name].flatten(1) for name in names] for names in (("mt", "lt"), ("mm", "lm")))
    zero, nothing = torch.zeros_like(gauss_t[0]), torch.zeros(1, 1, 1, dtype=torch.float64)
    kl = sw.semantic_loss(zero, zero, gauss_t, gauss_m, nothing, nothing, nothing, nce=0) / 1e-5
    result.compare("kl4", kl, ref["kl4"], TOLERANCE)
    a, b = ref["rec_a"], ref["rec_b"]  # text's, motion's, target: twice the same, nothing between
    apart = sw.semantic_loss(zero, zero, (zero, zero), (zero, zero), a, a, b, nce=0)
    result.compare("smooth_l1", apart / 2, ref["smooth_l1"], TOLERANCE)


def check_scores(result, ref):
    """Heads, cosines, recall."""
    better, worse = ref["pair_scores"].T
    result.compare("pairwise", sw.ranking_loss(better, worse), ref["pairwise"], TOLERANCE)
    result.compare("pairwise_acc", (better > worse).double().mean(), ref["pairwise_acc"], 0)
    logits = ref["auth_logits"].clone().requires_grad_()
    real = p_real(logits)
    result.compare("p_real", real, ref["p_real"], TOLERANCE)
    gradient, = torch.autograd.grad(real.sum(), logits)
    result.compare("grad_p_real", gradient, ref["grad_p_real"], TOLERANCE)
    similarity, _, _ = sw.mine(ref["t"], ref["m"], 1)
    result.compare("cos_tm", similarity.diagonal(), ref["cos_tm"], TOLERANCE)
    hits, _ = metrics.hit_chance(-similarity, (1, 2, 3, 5, 10))
    result.compare("recall", hits.mean(0), ref["recall"], TOLERANCE)


def check_extra(result, ref):
    """Add the fields cross_*, spl_* and combo_* of another reference file, a dict of tensors, to Rows."""
    za, zb = (ref[f"cross_z{name}"].clone().requires_grad_() for name in "ab")
    gauss_a, gauss_b = ((ref[f"cross_mu{name}"], ref[f"cross_lv{name}"]) for name in "ab")
    loss = sw.cross_loss(za, zb, gauss_a, gauss_b, nce=0.1)  # as much as in the public code
    nce = sw.cross_loss(za, zb, gauss_a, gauss_b) - sw.cross_loss(za, zb, gauss_a, gauss_b, nce=0)
    result.compare("cross_nce", nce, ref["cross_nce"], TOLERANCE)
    kl = sw.cross_loss(za, za, gauss_a, gauss_b, nce=0) / 1e-5
    result.compare("cross_kl", kl, ref["cross_kl"], TOLERANCE)
    result.compare("cross_loss", loss, ref["cross_loss"], TOLERANCE)
    for name, gradient in zip("ab", torch.autograd.grad(loss, (za, zb))):
        result.compare(f"cross_grad_z{name}", gradient, ref[f"cross_grad_z{name}"], TOLERANCE)

    t, m, k = ref["spl_t"], ref["spl_m"].clone().requires_grad_(), int(ref["spl_K"])
    sentences = F.normalize(ref["spl_sent"], dim=-1)
    alike = (sentences @ sentences.T > 0.8) & ~torch.eye(len(t), dtype=torch.bool)
    result.compare("spl_dup", alike, ref["spl_dup"], 0)
    _, fail, top = sw.mine(t, m, k, ref["spl_dup"])
    result.compare("spl_fail", fail, ref["spl_fail"], 0)
    result.compare("spl_loser", top[:, 0], ref["spl_loser"], 0)
    loss, _ = sw.spl_paper(t, m, k, ref["spl_dup"])
    result.compare("spl_loss", loss, ref["spl_loss"], TOLERANCE)
    gradient, = torch.autograd.grad(loss, m)
    result.compare("spl_grad_m", gradient, ref["spl_grad_m"], TOLERANCE)

    scores = {"preference": ref["combo_critic"], "authenticity": p_real(ref["combo_auth"])}
    model = SimpleNamespace(skeleton=None, tokenise=lambda *motion: (None, None),
                            encode=lambda *tokens: (ref["combo_zm"], None),
                            embed_text=lambda captions: ref["combo_zt"],
                            embed_motion=lambda *real: ref["combo_zgt"],
                            score=lambda head, *tokens: scores[head])
    weights = dict(zip(sw.TERMS, ref["combo_weights"].tolist()))
    with mock.patch.object(datasets, "collate"):
        motion = torch.zeros(len(ref["combo_zt"]), 4, 1)
        reward = sw.weighted_reward(model, "features", weights, motion, None, [], [])
    result.compare("combo_reward", reward, ref["combo_reward"], TOLERANCE)


def p_real(logits):
    """The authenticity head's reward, of given logits."""
    model = SimpleNamespace(answer=lambda *tokens: logits)
    return MotionReward.score(model, "authenticity", None, None, "features")
