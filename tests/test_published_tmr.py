"""TMR's networks and its published folder: read strictly or refused in one line."""
import json
import shutil

import pytest
import torch
from torch import nn

from common import freeze, length_mask, lora
from common.published import tmr
from tests.folder_helpers import message, normal, randomise, refusals
from tests.parity.rows import packed

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES, WORDS, SIZES = 13, 10, dict(latent=16, ff=20, layers=2, heads=2)


def own(k=0):
    """A TMR with small networks and random weights; one feature never changes."""
    parts = [tmr.TMREncoder(FEATURES, **SIZES), tmr.TMREncoder(WORDS, **SIZES),
             tmr.TMRDecoder(FEATURES, **SIZES)]
    std = torch.arange(float(FEATURES))
    return freeze(tmr.TMR(*(randomise(part, k + n) for n, part in enumerate(parts)), normal(FEATURES), std))


def official(part):
    """Weights under the published names: packed attention, and the layers inside a transformer."""
    inside = "seqTransDecoder." if isinstance(part, tmr.TMRDecoder) else "seqTransEncoder."
    return {inside + key if key.startswith("layers") else key: value
            for key, value in packed(part.state_dict()).items()}


def write(folder, model, base_dir="stats/kitml/guoh3dfeats", heads=2):
    """The published folder of a model, with its statistics beside config.json."""
    (folder / "last_weights").mkdir(parents=True)
    for name in tmr.WEIGHTS:
        torch.save(official(getattr(model, name)), folder / "last_weights" / f"{name}.pt")
    for name in ("mean", "std"):
        torch.save(getattr(model, name).clone(), folder / f"{name}.pt")
    sizes = dict(latent_dim=16, ff_size=20, num_layers=2, num_heads=heads)
    config = {"model": {"lr": 1e-4, "motion_encoder": sizes | {"nfeats": FEATURES}, "text_encoder": sizes},
              "data": {"motion_loader": {"normalizer": {"base_dir": base_dir}}}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "models" / "tmr", own())


def inputs():
    """Raw motions, their lengths, states of words, their counts."""
    return (normal(3, 9, FEATURES, k=1), torch.tensor([9, 4, 1]), normal(3, 6, WORDS, k=2),
            torch.tensor([2, 6, 1]))


# ---- the networks ------------------------------------------------------------------------------------------


def packed_layers(part, layer, stack):
    """torch's own stack of layers with the weights of ours."""
    options = {"enable_nested_tensor": False} if stack is nn.TransformerEncoder else {}
    made = stack(layer(16, 2, 20, 0.0, "gelu", batch_first=True), 2, **options).eval()
    made.load_state_dict({key: value for key, value in packed(part.state_dict()).items()
                          if key.startswith("layers")})
    return made


@torch.no_grad()
def test_layers_are_those_of_torch_with_packed_weights():
    model, mask = own(), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    x, memory = normal(2, 5, 16), normal(2, 1, 16, k=1)
    want = packed_layers(model.motion_encoder, nn.TransformerEncoderLayer, nn.TransformerEncoder)(
        x, src_key_padding_mask=~mask)
    ours = x
    for layer in model.motion_encoder.layers:
        ours = layer(ours, mask)
    assert torch.allclose(ours[mask], want[mask], atol=1e-5)
    want = packed_layers(model.motion_decoder, nn.TransformerDecoderLayer, nn.TransformerDecoder)(
        x, memory, tgt_key_padding_mask=~mask)
    ours = x
    for layer in model.motion_decoder.layers:
        ours = layer(ours, mask, memory)
    assert torch.allclose(ours[mask], want[mask], atol=1e-5)


def test_lora_reaches_every_attention_by_name():
    assert len(lora.inject(own(), r"attn\.[qkv]$", 2, 4)) == 3 * (2 + 2 + 2 * 2)


def test_padding_has_no_say():
    model, (raw, lengths, states, counts) = own(), inputs()
    motion, text = model.embed_motion(raw, lengths), model.embed_text(states, counts)
    assert motion.shape == text.shape == (3, 16)
    spoilt = raw.masked_fill(~length_mask(lengths, 9)[..., None], float("nan"))
    assert torch.allclose(model.embed_motion(spoilt, lengths), motion, atol=1e-6)
    assert torch.allclose(model.embed_motion(raw[1:2, :4], lengths[1:2]), motion[1:2], atol=1e-5)
    spoilt = states.masked_fill(~length_mask(counts, 6)[..., None], float("inf"))
    assert torch.allclose(model.embed_text(spoilt, counts), text, atol=1e-6)
    assert torch.allclose(model.embed_text(states[:1, :2], counts[:1]), text[:1], atol=1e-5)
    decoded = model.decode(text, lengths)
    assert decoded.shape == (3, 9, FEATURES) and torch.equal(decoded[1, 4:], model.mean.expand(5, -1))
    assert torch.allclose(model.decode(text[1:2], lengths[1:2])[0], decoded[1, :4], atol=1e-5)


def test_similarity_is_a_cosine_of_all_pairs():
    model = own()
    text, motion = normal(3, 16), normal(4, 16, k=1)
    sim = model.similarity(text, motion)
    assert sim.shape == (3, 4) and torch.allclose(model.similarity(5 * text, motion), sim, atol=1e-6)
    assert torch.allclose(model.similarity(text, text).diagonal(), torch.ones(3), atol=1e-6)


def test_a_feature_that_never_changes_is_no_nan():
    model, (raw, lengths, *_) = own(), inputs()
    raw[..., 0] = model.mean[0]  # its std is 0
    assert torch.isfinite(model.normalise(raw, lengths)).all()


def test_a_gradient_reaches_the_motion_and_not_the_weights():
    model, (raw, lengths, states, counts) = own(), inputs()
    raw[..., 0] = model.mean[0]
    raw.requires_grad_()
    model.similarity(model.embed_text(states, counts), model.embed_motion(raw, lengths)).sum().backward()
    assert raw.grad[1, :4].any() and not raw.grad[1, 4:].any()
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- the folder --------------------------------------------------------------------------------------------


def same(loaded, model):
    raw, lengths, states, counts = inputs()
    assert torch.equal(loaded.embed_motion(raw, lengths), model.embed_motion(raw, lengths))
    text = loaded.embed_text(states, counts)
    assert torch.equal(text, model.embed_text(states, counts))
    assert torch.equal(loaded.decode(text, lengths), model.decode(text, lengths))


def test_a_folder_comes_back(folder):
    state = torch.random.get_rng_state()
    loaded = tmr.load_folder(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    same(loaded, own())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("place", ("models/tmr/stats/kitml/guoh3dfeats", "stats/kitml/guoh3dfeats",
                                   "elsewhere"))
def test_statistics_may_lie_where_the_repository_has_them(folder, tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    for name in ("mean.pt", "std.pt"):
        shutil.move(folder / name, tmp_path / place / name)
    if place == "elsewhere":
        assert "mean.pt" in message(tmr.load_folder, folder)
    same(tmr.load_folder(folder, tmp_path / place if place == "elsewhere" else None), own())


def test_wrong_files_are_named(folder):
    load = lambda: tmr.load_folder(folder)
    for name in tmr.WEIGHTS:
        path = folder / "last_weights" / f"{name}.pt"
        found = refusals(load, path, {"net": {"vqvae.x": torch.ones(2)}})
        assert "other kind" in found["other"] or "no weight" in found["other"]
    for name in ("mean.pt", "std.pt"):
        refusals(load, folder / name, {"mean": torch.ones(FEATURES)})
    assert "config.json" in refusals(load, folder / "config.json", None)["half"]
    for content in ("[]", "{}", '{"model": 3}'):
        (folder / "config.json").write_text(content)
        assert "config.json: has no part 'model'" in message(load)
    assert "no such folder" in message(tmr.load_folder, folder / "nowhere")


def change(path, edit):
    stored = torch.load(path, weights_only=True)
    edit(stored)
    torch.save(stored, path)


@pytest.mark.parametrize("edit, said", [
    (lambda s: s.pop("projection.bias"), "projection.bias is missing, wanted (16,)"),
    (lambda s: s.update({"other": torch.ones(2)}), "other is (2,), wanted nothing"),
    (lambda s: s.update({"tokens": torch.ones(3, 16)}), "tokens is (3, 16), wanted (2, 16)"),
    (lambda s: s.update({"seqTransEncoder.layers.1.self_attn.in_proj_weight": torch.ones(47, 16)}),
     "self_attn.v.weight is (15, 16), wanted (16, 16)"),
    (lambda s: s.update({"seqTransEncoder.layers.1.self_attn.in_proj_bias": torch.ones(())}),
     "self_attn.in_proj_bias is (), wanted nothing"),
    (lambda s: s.update({"tokens": "text"}), "'tokens' is no weight")])
def test_loading_is_strict(folder, edit, said):
    change(folder / "last_weights" / "text_encoder.pt", edit)
    text = message(tmr.load_folder, folder)
    assert "text_encoder.pt" in text and said in text


def test_encoders_that_changed_places_are_refused(folder):
    weights = folder / "last_weights"
    (weights / "motion_encoder.pt").replace(weights / "kept.pt")
    (weights / "text_encoder.pt").replace(weights / "motion_encoder.pt")
    (weights / "kept.pt").replace(weights / "text_encoder.pt")
    assert "motion widths [10, 13], statistics 13" in message(tmr.load_folder, folder)


@pytest.mark.parametrize("setting, value", [("latent_dim", 256), ("ff_size", 7), ("num_layers", 6),
                                            ("num_heads", 4), ("num_heads", 3), ("num_heads", 0)])
def test_a_config_of_another_model_is_refused(folder, setting, value):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["text_encoder"][setting] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json" in message(tmr.load_folder, folder)


def test_heads_come_from_the_config_and_are_four_without_it(folder, tmp_path):
    write(tmp_path / "four", own(), heads=4)
    four = tmr.load_folder(tmp_path / "four")
    assert four.motion_decoder.layers[0].multihead_attn.heads == 4
    (folder / "config.json").write_text('{"model": {}}')
    loaded, (raw, lengths, *_) = tmr.load_folder(folder), inputs()
    assert torch.equal(loaded.embed_motion(raw, lengths), four.embed_motion(raw, lengths))
    assert not torch.allclose(loaded.embed_motion(raw, lengths), own().embed_motion(raw, lengths), atol=1e-3)


@pytest.mark.parametrize("name, value", [
    ("mean", torch.ones(FEATURES + 1)), ("std", -torch.ones(FEATURES)), ("mean", torch.ones(1, FEATURES)),
    ("std", torch.full((FEATURES,), float("nan")))])
def test_statistics_that_cannot_be_are_refused(folder, name, value):
    torch.save(value, folder / f"{name}.pt")
    assert "statistics 1" in (found := message(tmr.load_folder, folder)) or f"{name}.pt" in found
