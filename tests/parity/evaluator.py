"""Compare the benchmark's evaluator networks with the public official code (see tests/parity)."""
import numpy as np
import torch

from common import freeze
from common.datasets import Statistics
from common.published import evaluator
from tests import reference
from tests.parity.rows import error, shapes_error, state


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    with np.load(path) as z, torch.no_grad():
        return check_guo(z)


def check_guo(z):
    rows = []
    for kind in ("t2m", "kit"):
        get = lambda key: torch.from_numpy(z[f"{kind}_{key}"])
        motions, lengths, order = get("motions"), get("m_lens"), get("align_idx")
        networks = {name: state(z, f"{kind}_sd/{name}/")
                    for name in ("movement_encoder", "motion_encoder", "text_encoder")}
        # mean 0 and std 1: the reference motions are normalised already
        plain = Statistics(torch.zeros(motions.shape[2]), torch.ones(motions.shape[2]), "scorer")
        judge = freeze(evaluator.OfficialEvaluator(networks, plain, max_length=motions.shape[1]))
        text = judge.embed_text(get("word_embs"), get("pos_onehot"), get("cap_lens"))
        movements = judge.movement_encoder(motions[..., :-4])
        motion = judge.embed_motion(motions, lengths)
        full = {"movement_encoder": evaluator.MovementEncoder(motions.shape[2] - 4),
                "motion_encoder": evaluator.MotionEncoderBiGRU(),
                "text_encoder": evaluator.TextEncoderBiGRU()}
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
    matched = reference.margin_loss(a, b, positive, margin)
    shifted = reference.margin_loss(a, b.roll(-3, 0), ~positive, margin)
    return rows + [
        ("loss_pos", error(matched, z["loss_pos"], relative=True), 1e-5),
        ("loss_neg_shift3", error(shifted, z["loss_neg_shift3"], relative=True), 1e-5)]
