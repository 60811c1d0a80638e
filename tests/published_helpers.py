"""Networks of MDM and MLD in the layout of their published files."""
import json
import re

import torch

from common import datasets, generator, sinusoid

OURS_MDM = ((r"^project_in\.", "input_process.poseEmbedding."), (r"^time\.", "embed_timestep.time_embed."),
            (r"^project_out\.", "output_process.poseFinal."))
OURS_MLD = ((r"^layers\.", "denoiser.encoder."), (r"^time\.0\.", "denoiser.time_embedding.linear_1."),
            (r"^time\.2\.", "denoiser.time_embedding.linear_2."), (r"^codec\.", "vae."),
            (r"^(?!denoiser\.|vae\.)", "denoiser."))
OURS_LAYERS = ((r"\.out\.", ".out_proj."), (r"\.up\.", ".linear1."), (r"\.down\.", ".linear2."))
NOT_STORED = ("codec.mean", "codec.std", "null_text")


def packed(state, names):
    """Our weights -> published names, q, k and v in one in_proj; the inverse of layers.renamed."""
    out = {}
    for key, value in state.items():
        if key in NOT_STORED:
            continue
        for ours, theirs in (*names, *OURS_LAYERS):
            key = re.sub(ours, theirs, key)
        if found := re.fullmatch(r"(.*_attn\.)[qkv]\.(weight|bias)", key):
            key = f"{found[1]}in_proj_{found[2]}"
            value = torch.cat([out[key], value]) if key in out else value
        out[key] = value
    return out


def mdm_state(model, positions=300):
    """The weights of an MDM as its file has them, with its two tables of positions."""
    stack = "seqTransDecoder.layers." if model.words else "seqTransEncoder.layers."
    table = sinusoid(positions, model.width)[:, None]
    return packed(model.state_dict(), (*OURS_MDM, (r"^layers\.", stack))) | {
        "sequence_pos_encoder.pe": table, "embed_timestep.sequence_pos_encoder.pe": table}


def mld_state(model):
    """The weights of an MLD as a lightning file has them, with an unused table and the networks of scores."""
    return packed(model.state_dict(), OURS_MLD) | {
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
