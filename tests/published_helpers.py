"""Networks of MDM and MLD in the layout of their published files."""
import json
import re

import torch

from common import datasets, generator, sinusoid
from tests.parity.rows import packed

OURS_MDM = ((r"^project_in\.", "input_process.poseEmbedding."), (r"^time\.", "embed_timestep.time_embed."),
            (r"^project_out\.", "output_process.poseFinal."))
OURS_MLD = ((r"^layers\.", "denoiser.encoder."), (r"^time\.0\.", "denoiser.time_embedding.linear_1."),
            (r"^time\.2\.", "denoiser.time_embedding.linear_2."), (r"^codec\.", "vae."),
            (r"^(?!denoiser\.|vae\.)", "denoiser."))
OURS_LAYERS = ((r"\.out\.", ".out_proj."), (r"\.up\.", ".linear1."), (r"\.down\.", ".linear2."))
NOT_STORED = ("codec.mean", "codec.std", "null_text")


def published(state, names):
    """Our weights -> published names, q, k and v in one in_proj; the inverse of layers.renamed."""
    out = {}
    for key, value in packed({key: state[key] for key in state if key not in NOT_STORED}).items():
        for ours, theirs in (*names, *OURS_LAYERS):
            key = re.sub(ours, theirs, key)
        out[key] = value
    return out


def mdm_state(model, positions=300):
    """The weights of an MDM as its file has them, with its two tables of positions."""
    stack = "seqTransDecoder.layers." if model.words else "seqTransEncoder.layers."
    table = sinusoid(positions, model.width)[:, None]
    return published(model.state_dict(), (*OURS_MDM, (r"^layers\.", stack))) | {
        "sequence_pos_encoder.pe": table, "embed_timestep.sequence_pos_encoder.pe": table}


def mld_state(model):
    """The weights of an MLD as a lightning file has them, with an unused table and the networks of scores."""
    return published(model.state_dict(), OURS_MLD) | {
        "denoiser.mem_pos.pe": torch.zeros(7, 1, model.width), "t2m_textencoder.hidden": torch.ones(2),
        "t2m_motionencoder.hidden": torch.ones(2), "t2m_moveencoder.main.0.bias": torch.ones(2)}


def random_(model, purpose):
    """Weights that matter, all of them, from a stream of their own."""
    g = generator(0, 0, purpose)
    for weight in model.parameters():
        weight.data.uniform_(-0.3, 0.3, generator=g)
    return model.requires_grad_(False).eval()


def statistics(feature_dim):
    """Of a generator, no two features alike."""
    return datasets.Statistics(torch.linspace(-1, 1, feature_dim), torch.linspace(0.5, 2, feature_dim),
                               "generator")


def save_mdm(path, weights, settings):
    """A checkpoint of MDM and its args.json."""
    torch.save(weights, path)
    path.with_name("args.json").write_text(json.dumps(settings))
    return path


def check_read(model, loaded, call):
    """`loaded` is `model`, read from its file: sizes, weights, frozen, answers; and so is a network that is
    made from its sizes and weights, as policy.pt keeps them. call(network) -> what it is asked."""
    assert loaded.sizes == model.sizes and not loaded.training and json.dumps(loaded.sizes)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(**call(model)), loaded(**call(loaded)))
    again = type(model)(**loaded.sizes)
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again(**call(model)), loaded(**call(loaded)))
