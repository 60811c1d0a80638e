"""Metrics, official evaluator networks and TMR against `metrics_*.npz`, `guo_eval_*.npz` and `tmr_enc_*.npz`.

The reference values come from the public official code, run on random numbers (README_data_eval.md there).

check(path) returns a list of (field, max_error, tolerance); tests/parity.py prints it.
"""
import math
import re
from pathlib import Path

import numpy as np
import torch

from common import length_mask, metrics, retrieval as ev, vae
from common.datasets import Statistics
from common.published import evaluator, tmr


def error(ours, theirs, relative=False):
    """Largest difference; infinity on NaN or on another shape, so that neither can pass."""
    ours, theirs = (np.asarray(torch.as_tensor(x).detach(), dtype=np.float64) for x in (ours, theirs))
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return math.inf
    scale = np.maximum(np.abs(theirs), 1e-12) if relative else 1.0
    return float((np.abs(ours - theirs) / scale).max(initial=0.0))


def state(z, prefix):
    return {key.removeprefix(prefix): torch.from_numpy(z[key]) for key in z.files if key.startswith(prefix)}


def shapes_error(full_size_keys, modules):
    """Number of parameters whose official name or full-size shape differs from ours."""
    ours = {f"{name}/{key} {tuple(value.shape)}"
            for name, part in modules.items() for key, value in part.items()}
    return float(len(ours ^ set(full_size_keys.tolist())))


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
        rows += [(f"fid_{name}_self_official", error(metrics.fid(x, x), z[f"fid_{name}_self_official"]), 1e-4)]
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


def check_guo(z):
    rows = []
    for kind in ("t2m", "kit"):
        get = lambda key: torch.from_numpy(z[f"{kind}_{key}"])
        motions, lengths, order = get("motions"), get("m_lens"), get("align_idx")
        networks = {name: state(z, f"{kind}_sd/{name}/")
                    for name in ("movement_encoder", "motion_encoder", "text_encoder")}
        # mean 0 and std 1: the reference motions are normalised already
        plain = Statistics(torch.zeros(motions.shape[2]), torch.ones(motions.shape[2]), "scorer")
        judge = ev.freeze(evaluator.OfficialEvaluator(networks, plain, max_length=motions.shape[1]))
        text = judge.embed_text(get("word_embs"), get("pos_onehot"), get("cap_lens"))
        movements = judge.movement_encoder(motions[..., :-4])
        motion = judge.embed_motion(motions, lengths)
        full = {"movement_encoder": evaluator.MovementEncoder(motions.shape[2] - 4),
                "motion_encoder": ev.MotionEncoderBiGRU(), "text_encoder": evaluator.TextEncoderBiGRU()}
        rows += [(f"{kind}_movements", error(movements, get("movements")), 1e-5),
                 (f"{kind}_text_embedding", error(text, get("text_embedding")), 1e-5),
                 (f"{kind}_motion_embedding", error(motion, get("motion_embedding")), 1e-5),
                 (f"{kind}_text_embedding_wrapper_order",
                  error(text[order], get("text_embedding_wrapper_order")), 1e-5),
                 (f"{kind}_motion_embedding_wrapper_order",
                  error(motion[order], get("motion_embedding_wrapper_order")), 1e-5),
                 (f"{kind}_full_size_keys", shapes_error(
                     z[f"{kind}_full_size_keys"], {n: m.state_dict() for n, m in full.items()}), 0.0)]
    a, b, margin = torch.from_numpy(z["loss_a"]), torch.from_numpy(z["loss_b"]), float(z["loss_margin"])
    positive = torch.zeros(len(a), dtype=torch.bool)
    return rows + [
        ("loss_pos", error(ev.margin_loss(a, b, positive, margin), z["loss_pos"], relative=True), 1e-5),
        ("loss_neg_shift3", error(ev.margin_loss(a, b.roll(-3, 0), ~positive, margin), z["loss_neg_shift3"],
                                  relative=True), 1e-5)]


def official_names(network, prefix):
    """State of one of our TMR networks under the names and shapes of the published code."""
    out = {}
    for key, value in network.state_dict().items():
        key = f"{prefix}.{key}" if key.startswith("layers") else key
        split = re.fullmatch(r"(.*attn\.)([qkv])\.(weight|bias)", key)
        if split is None:
            out[key] = value
        elif split[2] == "q":       # q, k and v are one matrix there
            out[f"{split[1]}in_proj_{split[3]}"] = torch.cat([value] * 3)
    return out


def check_tmr(z):
    size = {word: float(value) for word, value in re.findall(r"(\w+) ([\d.]*\d)", str(z["config"]))}
    latent, ff, layers, heads = (int(size[word]) for word in ("latent", "ff", "layers", "heads"))
    motion, text, sentences = (torch.from_numpy(z[key]) for key in ("motion_x", "text_x", "sent_emb"))
    motion_mask = length_mask(torch.from_numpy(z["motion_len"]), motion.shape[1])
    text_mask = length_mask(torch.from_numpy(z["text_len"]), text.shape[1])
    motion_encoder = ev.TMREncoder(motion.shape[2], latent, ff, layers, heads)
    text_encoder = ev.TMREncoder(text.shape[2], latent, ff, layers, heads)
    decoder = tmr.TMRDecoder(motion.shape[2], latent, ff, layers, heads)
    for name, part in (("motion_encoder", motion_encoder), ("text_encoder", text_encoder),
                       ("motion_decoder", decoder)):
        part.load_state_dict(tmr.from_official_tmr(state(z, f"sd/{name}/")))
        ev.freeze(part)
    m, t = motion_encoder(motion, motion_mask), text_encoder(text, text_mask)
    losses = tmr.tmr_losses(t, m, decoder, motion, motion_mask, sentences, size["temperature"],
                           size["threshold"])
    score = tmr.tmr_score(t[:, 0], m[:, 0])
    rows = [("motion_tokens", error(m, z["motion_tokens"]), 1e-5),
            ("text_tokens", error(t, z["text_tokens"]), 1e-5),
            ("decoded_from_motion_mu",
             error(decoder(m[:, 0], motion_mask), z["decoded_from_motion_mu"]), 1e-5),
            ("sim", error(2 * score - 1, z["sim"]), 1e-5), ("score", error(score, z["score"]), 1e-5)]
    rows += [(f"loss_{key}", error(value, z[f"loss_{key}"], relative=True), 1e-5)
             for key, value in losses.items()]
    unfiltered = ev.info_nce(t[:, 0], m[:, 0], size["temperature"])
    kl = vae.gaussian_kl(t[:, 0], t[:, 1], m[:, 0], m[:, 1])
    rows += [("infonce_filtered", error(losses["contrastive"], z["infonce_filtered"], relative=True), 1e-5),
             ("infonce_unfiltered", error(unfiltered, z["infonce_unfiltered"], relative=True), 1e-5),
             ("kl_text_motion", error(kl, z["kl_text_motion"], relative=True), 1e-5)]
    same = torch.from_numpy(z["ret_emb"] @ z["ret_emb"].T) > 2 * 0.95 - 1
    retrieval = {"normal": tmr.retrieval_metrics(z["ret_sim"]),
                 "thr095": tmr.retrieval_metrics(z["ret_sim"], same),
                 "tie": tmr.retrieval_metrics(z["ret_sim_tie"])}
    for key in z.files:
        if found := re.fullmatch(r"ret_(normal|thr095|tie)_([tm]2[tm])_(\w+)", key):
            ours = retrieval[found[1]]["len" if found[3] == "len" else f"{found[2]}_{found[3]}"]
            rows.append((key, error(ours, z[key]), 0.0051))      # the reference is rounded to two decimals
    full = {"motion_encoder": official_names(ev.TMREncoder(motion.shape[2]), "seqTransEncoder"),
            "text_encoder": official_names(ev.TMREncoder(768), "seqTransEncoder"),
            "motion_decoder": official_names(tmr.TMRDecoder(motion.shape[2]), "seqTransDecoder")}
    return rows + [("full_size_keys", shapes_error(z["full_size_keys"], full), 0.0)]


CHECKS = {"metrics": check_metrics, "guo_eval": check_guo, "tmr_enc": check_tmr}


def check(path):
    """(field, max_error, tolerance) rows for one reference file; its name's part after the last _ is free."""
    with np.load(path) as z, torch.no_grad():
        return CHECKS[Path(path).stem.rpartition("_")[0]](z)
