"""Compare TMR's encoders, losses and scores with the public official code (see tests/parity)."""
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

from common import freeze, length_mask, vae
from common.published import tmr
from common.retrieval import info_nce
from tests import reference
from tests.parity.rows import error, packed, shapes_error, state


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    with np.load(path) as z, torch.no_grad():
        return check_full(z) if path.name.startswith("tmr_full_") else check_tmr(z)


def check_full(z):
    """TMR by way of its folder: from raw features and states of words to latents, scores and back."""
    meta = json.loads(bytes(z["meta_json"]))
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), z, {key: value for key, value in meta.items() if isinstance(value, int)})
        model = tmr.load_folder(folder)
    get = lambda key: torch.from_numpy(z[key])
    raw, lengths, counts = get("motion_raw"), get("motion_len"), get("token_len")
    motion, text = model.embed_motion(raw, lengths), model.embed_text(get("token_emb"), counts)
    sim, decoded = model.similarity(text, motion), model.decode(text, lengths)
    names = ("motion_normalised", "motion_latent", "text_latent", "sim", "score", "decoded_from_text",
             "decoded_from_text_raw")
    normalised = model.motion_decoder(text, length_mask(lengths, raw.shape[1]))
    ours = (model.normalise(raw, lengths), motion, text, sim, sim / 2 + 0.5, normalised, decoded)
    return [("eps", abs(model.eps - float(z["eps"])), 0.0)] + [
        (name, error(value, z[name]), 1e-5) for name, value in zip(names, ours)]


def write_folder(folder, z, sizes):
    """What a reference file holds, as a published folder."""
    (folder / "last_weights").mkdir()
    for name in tmr.WEIGHTS:
        torch.save(state(z, f"sd/{name}/"), folder / "last_weights" / f"{name}.pt")
    for name in ("mean", "std"):
        torch.save(torch.from_numpy(z[name]), folder / f"{name}.pt")
    (folder / "config.json").write_text(json.dumps({"model": {"motion_encoder": sizes}}))


def official_names(network, prefix):
    """State of one of our TMR networks under the names and shapes of the published code."""
    return packed({f"{prefix}.{key}" if key.startswith("layers") else key: value
                   for key, value in network.state_dict().items()})


def check_tmr(z):
    size = {word: float(value) for word, value in re.findall(r"(\w+) ([\d.]*\d)", str(z["config"]))}
    latent, ff, layers, heads = (int(size[word]) for word in ("latent", "ff", "layers", "heads"))
    motion, text, sentences = (torch.from_numpy(z[key]) for key in ("motion_x", "text_x", "sent_emb"))
    motion_mask = length_mask(torch.from_numpy(z["motion_len"]), motion.shape[1])
    text_mask = length_mask(torch.from_numpy(z["text_len"]), text.shape[1])
    motion_encoder = tmr.TMREncoder(motion.shape[2], latent, ff, layers, heads)
    text_encoder = tmr.TMREncoder(text.shape[2], latent, ff, layers, heads)
    decoder = tmr.TMRDecoder(motion.shape[2], latent, ff, layers, heads)
    for name, part in (("motion_encoder", motion_encoder), ("text_encoder", text_encoder),
                       ("motion_decoder", decoder)):
        part.load_state_dict(tmr.from_official_tmr(state(z, f"sd/{name}/")))
        freeze(part)
    m, t = motion_encoder(motion, motion_mask), text_encoder(text, text_mask)
    losses = reference.tmr_losses(t, m, decoder, motion, motion_mask, sentences, size["temperature"],
                           size["threshold"])
    score = reference.tmr_score(t[:, 0], m[:, 0])
    rows = [("motion_tokens", error(m, z["motion_tokens"]), 1e-5),
            ("text_tokens", error(t, z["text_tokens"]), 1e-5),
            ("decoded_from_motion_mu",
             error(decoder(m[:, 0], motion_mask), z["decoded_from_motion_mu"]), 1e-5),
            ("sim", error(2 * score - 1, z["sim"]), 1e-5), ("score", error(score, z["score"]), 1e-5)]
    rows += [(f"loss_{key}", error(value, z[f"loss_{key}"], relative=True), 1e-5)
             for key, value in losses.items()]
    unfiltered = info_nce(t[:, 0], m[:, 0], size["temperature"])
    kl = vae.gaussian_kl(t[:, 0], t[:, 1], m[:, 0], m[:, 1])
    rows += [("infonce_filtered", error(losses["contrastive"], z["infonce_filtered"], relative=True), 1e-5),
             ("infonce_unfiltered", error(unfiltered, z["infonce_unfiltered"], relative=True), 1e-5),
             ("kl_text_motion", error(kl, z["kl_text_motion"], relative=True), 1e-5)]
    same = torch.from_numpy(z["ret_emb"] @ z["ret_emb"].T) > 2 * 0.95 - 1
    retrieval = {"normal": reference.retrieval_metrics(z["ret_sim"]),
                 "thr095": reference.retrieval_metrics(z["ret_sim"], same),
                 "tie": reference.retrieval_metrics(z["ret_sim_tie"])}
    for key in z.files:
        if found := re.fullmatch(r"ret_(normal|thr095|tie)_([tm]2[tm])_(\w+)", key):
            ours = retrieval[found[1]]["len" if found[3] == "len" else f"{found[2]}_{found[3]}"]
            rows.append((key, error(ours, z[key]), 0.0051))      # the reference is rounded to two decimals
    full = {"motion_encoder": official_names(tmr.TMREncoder(motion.shape[2]), "seqTransEncoder"),
            "text_encoder": official_names(tmr.TMREncoder(768), "seqTransEncoder"),
            "motion_decoder": official_names(tmr.TMRDecoder(motion.shape[2]), "seqTransDecoder")}
    return rows + [("full_size_keys", shapes_error(z["full_size_keys"], full), 0.0)]
