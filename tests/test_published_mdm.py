"""Published networks of MDM: read back from files like theirs, refused where they are none, and used by the
scripts like their own."""
import copy
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import InputError, generator, length_mask, lora, samplers
from common.published import layers, mdm
from tests import parity
from tests.published_helpers import check_read, mdm_state, random_, save_mdm, statistics

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
ARGS = {"dataset": "kit", "arch": "trans_enc", "latent_dim": 16, "layers": 2}
BERT = {"arch": "trans_dec", "text_encoder_type": "bert", "mask_frames": True, "diffusion_steps": 50}
KINDS = {"enc": {}, "enc50": {"mask_frames": True, "diffusion_steps": 50}, "dec": BERT}
ALL = torch.ones(3, dtype=torch.bool)


def normal(*shape, k=0):
    return torch.randn(*shape, generator=generator(0, k, "test"))


def vectors(captions):
    """Text features like CLIP's, by the captions' lengths."""
    return torch.stack([normal(512, k=len(caption)) for caption in captions])


def states(captions):
    """Token states like DistilBERT's: as many as there are letters."""
    counts = torch.tensor([len(caption) for caption in captions])
    return normal(len(captions), int(counts.max()), 768), length_mask(counts, int(counts.max()))


def make(kind="enc"):
    """(network with random weights, its args.json) of 251 features."""
    settings = ARGS | KINDS[kind]
    words = kind == "dec"
    model = mdm.MDM(251, 768 if words else 512, 16, 24, 2, words=words,
                    mask_frames=settings.get("mask_frames", False), texts=states if words else vectors,
                    timesteps=settings.get("diffusion_steps", 1000))
    return random_(model, kind), settings


def message(path, feature_dim=251):
    """The text of the InputError of reading a file: one line that names it or its args.json."""
    with pytest.raises(InputError) as caught:
        mdm.load_mdm(path, statistics(feature_dim))
    text = str(caught.value)
    assert "\n" not in text and str(Path(path).parent) in text and 20 < len(text) < 800
    return text


def call(model, n=7, k=0, lengths=(7, 5, 3)):
    """Inputs of three motions for a network."""
    text, text_mask = model.encode_text(["abcd", "ab", "abcdef"])
    return dict(x=normal(3, n, 251, k=k), timesteps=torch.tensor([49.0, 0.0, 20.0]),
                mask=length_mask(torch.tensor(lengths), n), text=text, text_mask=text_mask)


# ---- parity ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.exists(), reason="reference files are not here")
def test_full_size_weights_are_listed_as_published():
    with np.load(GOLDEN / "mdm_dec_dev.npz") as z:
        listed = set(z["full_size_keys"].tolist())
    with torch.device("meta"):
        model = mdm.MDM(263, 768, 512, 1024, 8, words=True, mask_frames=True, timesteps=50)
        state = mdm_state(model, 5000)
    assert {f"{key} {tuple(value.shape)}" for key, value in state.items()} == listed


@pytest.mark.skipif(not GOLDEN.exists(), reason="reference files are not here")
@pytest.mark.parametrize("field", ["sd/output_process.poseFinal.bias", "x", "text", "timesteps", "lengths",
                                   "p6/x_T", "p6/noise", "trace_lengths", "p6/timestep_map", "out_guided"])
def test_the_parity_check_notices_another_number(field, tmp_path):
    with np.load(GOLDEN / "mdm_dec_dev.npz") as z:
        fields = {key: z[key] for key in z.files}
    fields[field] = fields[field].copy()
    fields[field].flat[0] += 1 if field != "lengths" and field != "trace_lengths" else -1
    np.savez(tmp_path / "mdm_dec_dev.npz", **fields)
    assert any(not row[1] <= row[2] for row in parity.check_file(tmp_path / "mdm_dec_dev.npz"))


# ---- layers ------------------------------------------------------------------------------------------------


def test_attention_is_that_of_torch_with_packed_weights():
    packed = nn.MultiheadAttention(16, 4, batch_first=True)
    random_(packed, "packed")
    ours = layers.Attention(16, 4)
    state = {f"x_attn.{key}": value for key, value in packed.state_dict().items()}
    ours.load_state_dict({key.removeprefix("x_attn."): value
                          for key, value in layers.renamed(state, "", ()).items()})
    x, memory, mask = normal(2, 5, 16), normal(2, 6, 16, k=1), length_mask(torch.tensor([6, 2]), 6)
    for seen, hidden in ((mask, ~mask), (None, None)):
        wanted, _ = packed(x, memory, memory, key_padding_mask=hidden)
        assert torch.allclose(ours(x, memory, seen), wanted, atol=1e-6)


@pytest.mark.parametrize("cross", [False, True])
def test_a_layer_is_that_of_torch(cross):
    kind = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    theirs = random_(kind(16, 4, 24, 0.1, "gelu", batch_first=True), "theirs")
    ours = layers.Layer(16, 24, cross=cross)
    state = {f"0.{key}": value for key, value in theirs.state_dict().items()}
    ours.load_state_dict({key.removeprefix("0."): value
                          for key, value in layers.renamed(state, "", ()).items()})
    x, memory = normal(2, 5, 16), normal(2, 6, 16, k=1)
    mask, memory_mask = (length_mask(torch.tensor([n, 2]), n) for n in (5, 6))
    if cross:
        wanted = theirs(x, memory, tgt_key_padding_mask=~mask, memory_key_padding_mask=~memory_mask)
        found = ours(x, mask, memory, memory_mask)
    else:
        wanted, found = theirs(x, src_key_padding_mask=~mask), ours(x, mask)
    assert torch.allclose(found[mask], wanted[mask], atol=1e-6)


def test_two_weights_with_one_name_are_an_error():
    with pytest.raises(InputError, match="a.pt: two of its weights"):
        layers.renamed({"layers.0.out.weight": torch.ones(1), "layers.0.out_proj.weight": torch.ones(1)},
                       "a.pt", ())


# ---- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", ["bare", "model", "module"])
def test_a_network_comes_back(kind, wrap, tmp_path):
    model, settings = make(kind)
    state = mdm_state(model)
    weights = {"bare": state, "model": {"model": state},
               "module": {"model": {f"module.{key}": value for key, value in state.items()}}}[wrap]
    path = save_mdm(tmp_path / "model000000001.pt", weights, settings | {"keyframe_cond_prob": 0.1})
    loaded = mdm.load_mdm(path, statistics(251), model.texts)
    layers.take_statistics(model.codec, statistics(251), path)
    check_read(model, loaded, call)


def test_reading_draws_nothing(tmp_path):
    model, settings = make()
    path = save_mdm(tmp_path / "model.pt", mdm_state(model), settings)
    before = torch.get_rng_state()
    mdm.load_mdm(path, statistics(251))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("use_ema, there, wanted", [(True, True, "avg"), (True, False, "now"),
                                                    (False, True, "now"), (None, True, "now")])
def test_averaged_weights_where_the_settings_ask_for_them(use_ema, there, wanted, tmp_path):
    model, settings = make()
    states_ = {"now": mdm_state(model), "avg": {key: 2 * value for key, value in mdm_state(model).items()}}
    weights = {"model": states_["now"]} | ({"model_avg": states_["avg"]} if there else {})
    settings |= {} if use_ema is None else {"use_ema": use_ema}
    loaded = mdm.load_mdm(save_mdm(tmp_path / "model.pt", weights, settings), statistics(251))
    assert torch.equal(loaded.project_out.bias, states_[wanted]["output_process.poseFinal.bias"])


def test_tables_of_positions_may_have_any_length_or_be_missing(tmp_path):
    model, settings = make()
    for positions in (None, 5000):
        state = mdm_state(model, positions or 1)
        state = {key: value for key, value in state.items() if positions or key not in mdm.TABLES}
        loaded = mdm.load_mdm(save_mdm(tmp_path / "model.pt", state, settings), statistics(251), vectors)
        assert torch.equal(model(**call(model)), loaded(**call(loaded)))


# ---- files of the wrong kind -------------------------------------------------------------------------------


def changed(state, key, value=None):
    """A state dict with one weight replaced, or left out."""
    rest = {name: old for name, old in state.items() if name != key}
    return rest if value is None else rest | {key: value}


def test_weights_that_do_not_fit(tmp_path):
    model, settings = make()
    state, path = mdm_state(model), tmp_path / "model.pt"

    def said(weights, **other):
        return message(save_mdm(path, weights, settings | other))
    assert "clip_model.token is (2,), wanted nothing" in said(state | {"clip_model.token": torch.ones(2)})
    key = "seqTransEncoder.layers.1.self_attn.in_proj_bias"
    assert "layers.1.self_attn.q.bias is missing" in said(changed(state, key))
    for wrong in (torch.ones(()), torch.ones(2), torch.ones(47), torch.ones(3, 16)):
        assert "layers.1.self_attn" in said(changed(state, key, wrong))
    assert "embed_text.bias is missing" in said(changed(state, "embed_text.bias"))
    assert "embed_text.weight" in said(changed(state, "embed_text.weight"))
    assert "is no weight" in said(state | {"epoch": 3})
    assert "holds no weights of MDM" in said({"model": {"a.weight": torch.ones(2)}})
    assert "is no weight" in said({"state": {}, "param_groups": []})           # the file of the optimiser
    assert "model.pt: " in said(torch.ones(3))
    assert "model.pt: " in said({"model": torch.ones(3)})
    decoder, _ = make("dec")
    assert "seqTransEncoder" in message(save_mdm(path, mdm_state(decoder), settings))
    assert "text_dim 768" in message(save_mdm(path, state | mdm_state(decoder), settings))


@pytest.mark.parametrize("content, said", [
    (b"", "weights_only=True"), (b"PK\x03\x04 half a zip", "weights_only=True"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    (b"<!DOCTYPE html><html>", "web page")])
def test_files_that_stand_in_for_others(content, said, tmp_path):
    model, settings = make()
    path = save_mdm(tmp_path / "model.pt", mdm_state(model), settings)
    whole = path.read_bytes()
    path.write_bytes(content)
    assert f"{path}: " in message(path) and said in message(path)
    path.write_bytes(whole[:-500])
    assert f"{path}: " in message(path)
    path.write_bytes(whole)
    path.with_name("args.json").write_bytes(content)
    assert f"{path.with_name('args.json')}: " in message(path)
    assert ("JSON" if "weights_only" in said else said) in message(path)


def test_missing_files(tmp_path):
    model, settings = make()
    path = save_mdm(tmp_path / "model.pt", mdm_state(model), settings)
    assert "no such file" in message(tmp_path / "none.pt")
    path.with_name("args.json").unlink()
    assert f"{path.with_name('args.json')}: no such file; put" in message(path)


def test_code_in_a_file_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "marker",)
    model, settings = make()
    assert "weights_only=True" in message(save_mdm(tmp_path / "model.pt", {"model": Payload()}, settings))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("other, said", [
    ({"context_len": 20}, "context_len is 20"), ({"pred_len": 40}, "pred_len is 40"),
    ({"unconstrained": True}, "unconstrained"), ({"emb_trans_dec": True}, "emb_trans_dec"),
    ({"noise_schedule": "linear"}, "'linear'"), ({"sigma_small": False}, "sigma_small"),
    ({"text_encoder_type": "bert"}, "'bert'"), ({"emb_policy": "concat"}, "'concat'"),
    ({"arch": "trans_dec"}, "'trans_dec'"), ({"arch": ["x"]}, "arch \"['x']\""), ({"arch": "gru"}, "'gru'"),
    ({"dataset": "humanact12"}, "'humanact12'"), ({"dataset": {}}, "on '{}'"),
    ({"dataset": "humanml"}, "feature_dim 251, not 263"), ({"diffusion_steps": 1}, "1 steps"),
    ({"diffusion_steps": "50"}, "diffusion_steps is '50'"), ({"mask_frames": 1}, "mask_frames is 1"),
    ({"use_ema": None}, "use_ema is None"), ({"layers": 3}, "depth 2, not 3"),
    ({"latent_dim": 512}, "width 16, not 512")])
def test_settings_of_another_network(other, said, tmp_path):
    model, settings = make()
    assert said in message(save_mdm(tmp_path / "model.pt", mdm_state(model), settings | other))


@pytest.mark.parametrize("stored", [[], {}, {"arch": "trans_enc"}, 3])
def test_settings_that_are_none(stored, tmp_path):
    model, _ = make()
    assert "give MDM's args.json" in message(save_mdm(tmp_path / "model.pt", mdm_state(model), stored))


def test_statistics_of_the_other_width_or_role(tmp_path):
    model, settings = make()
    path = save_mdm(tmp_path / "model.pt", mdm_state(model), settings)
    assert "for 251 features, the data have 263" in message(path, 263)
    wrong = statistics(251)
    wrong.role = "scorer"
    with pytest.raises(ValueError, match="scorer"):
        mdm.load_mdm(path, wrong)


# ---- what the scripts use ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_say_where_the_network_is_told_of_it(kind):
    model, _ = make(kind)
    given = call(model)
    other = given | {"x": torch.where(given["mask"][..., None], given["x"], normal(3, 7, 251, k=5))}
    same = torch.allclose(model(**given), model(**other), atol=1e-6)
    assert same == model.mask_frames
    assert not model(**given)[~given["mask"]].any()
    longer = call(model, n=9)
    longer["x"] = torch.cat([given["x"], normal(3, 2, 251, k=6)], 1)
    if model.mask_frames:
        assert torch.allclose(model(**longer)[:, :7], model(**given), atol=1e-6)


def test_words_past_the_end_of_a_caption_have_no_say():
    model, _ = make("dec")
    given = call(model)
    spoiled = given["text"].clone()
    spoiled[~given["text_mask"]] = 9.0
    assert torch.allclose(model(**given), model(**given | {"text": spoiled}), atol=1e-6)
    seen = given | {"text_mask": torch.ones_like(given["text_mask"])}
    assert not torch.allclose(model(**given), model(**seen), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_text_is_zero_and_embedded(kind):
    model, _ = make(kind)
    given = call(model)
    dropped = torch.tensor([True, False, True])
    text, text_mask = model.drop_text(given["text"], given["text_mask"], dropped)
    assert not text[dropped].any() and torch.equal(text[1], given["text"][1])
    assert torch.equal(text_mask, given["text_mask"])
    before = model(**given | {"text": text})
    model.embed_text.bias.data += 1.0
    assert not torch.allclose(before, model(**given | {"text": text}), atol=1e-3)


def test_time_and_place_are_felt():
    for kind in KINDS:
        model, _ = make(kind)
        given = call(model)
        given["mask"] |= True
        later = model(**given | {"timesteps": torch.full((3,), 7.0)})
        turned = model(**given | {"x": given["x"].flip(1)}).flip(1)
        for other in (later, turned):
            assert (model(**given) - other).abs().max() > 1e-4


def test_the_codec_normalises_frames():
    for kind in KINDS:
        model, _ = make(kind)
        codec = model.codec
        layers.take_statistics(codec, statistics(251), "")
        motion, lengths = normal(2, 12, 251), torch.tensor([12, 5])
        x = codec.encode(motion, lengths)
        assert torch.allclose(x * codec.std + codec.mean, motion, atol=1e-6)
        assert torch.allclose(codec.decode(x, lengths), motion, atol=1e-6) and codec.dims == model.dims == 251
        if model.mask_frames:
            assert codec.count(60) == 60 and codec.mask(lengths, 12).sum(1).tolist() == [12, 5]
        else:  # the network is not told a length: all frames of its evaluation are sampled
            assert codec.count(60) == 196 and codec.mask(lengths, 196).all()


def test_text_of_another_encoder_is_refused():
    model, _ = make()
    model.texts = states
    with pytest.raises(InputError, match="768 numbers a token, the network reads 512"):
        model.encode_text(["a", "b"])


def test_lora_reaches_every_attention_by_the_pattern_of_the_scripts():
    pattern = importlib.import_module("ddpo_motion").LORA_LAYERS
    model, _ = make("dec")
    given = call(model)
    before = model(**given)
    names = lora.inject(model, pattern, 2, 4, generator(0, 0, "lora"))
    assert len(names) == 2 * (4 + 4 + 2) and all(name.startswith("layers.") for name in names)
    assert torch.equal(before, model(**given))
    for name, layer in lora.adapters(model).items():
        layer.B.data.fill_(0.1)
        assert not torch.equal(before, model(**given)), name
        layer.B.data.zero_()


@pytest.mark.parametrize("total, count, ddim, wanted", [
    (1000, 6, False, [0, 200, 400, 599, 799, 999]), (50, 50, False, list(range(50))), (50, 2, False, [0, 49]),
    (1000, 5, True, [0, 200, 400, 600, 800]), (50, 25, True, list(range(0, 50, 2)))])
def test_timesteps(total, count, ddim, wanted):
    assert mdm.spread(total, count, ddim) == wanted


@pytest.mark.parametrize("count, ddim", [(0, True), (33, True), (1, False), (51, False)])
def test_timesteps_that_there_are_not(count, ddim):
    with pytest.raises(InputError, match=f"--steps {count}"):
        mdm.spread(50, count, ddim)


def test_the_schedule_is_not_a_thousand_steps_thinned_out():
    few, many = ((1 - mdm.cosine_betas(n)).cumprod(0) for n in (50, 1000))
    assert torch.allclose(mdm.cosine_betas(1000), samplers.make_betas("cosine"), rtol=0, atol=1e-15)
    assert (few - many[::20]).abs().max() > 0.01
    grid = make("enc50")[0].grid()
    assert len(grid.timesteps) == 50 and grid.timesteps[0] == 49
    assert grid.alpha[-1] == 1 and grid.sigma[-1] == 0


@pytest.mark.skipif(not GOLDEN.exists(), reason="reference files are not here")
def test_a_rollout_of_ddpo_is_the_recorded_sampling_of_the_official_code():
    ddpo, check = importlib.import_module("ddpo_motion"), importlib.import_module("tests.parity.mdm")
    with np.load(GOLDEN / "mdm_enc_dev.npz") as z:
        model, text = check.read(z, {"": "sd/"}), torch.from_numpy(z["trace_text"])
        start, noise, wanted = (check.ours(z, f"p6/{key}") for key in ("x_T", "noise", "x"))
    model.texts = lambda captions: text
    steps = ddpo.solver_steps(model.grid(6), 1, model.prediction)
    policy = ddpo.Policy(model, steps, torch.ones(5), 6, model.guidance_scale, torch.device("cpu"))
    mask = model.codec.mask(torch.tensor([6, 4]), 6)
    states_ = ddpo.rollout(policy, ["a", "b"], mask, torch.cat([start[None], noise]).transpose(0, 1))
    assert torch.allclose(states_[:, 1:].transpose(0, 1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_of_ddpo_samples_it(kind):
    """States of a rollout with adapters, and the log-probabilities of the update under the same weights."""
    ddpo = importlib.import_module("ddpo_motion")
    model, _ = make(kind)
    lora.inject(model, ddpo.LORA_LAYERS, 2, 2, generator(0, 0, "lora"))
    model.codec.always = min(model.codec.always, 8)
    lengths, tokens = torch.tensor([8, 5]), model.codec.count(8)
    steps = ddpo.solver_steps(model.grid(4), 1, model.prediction)
    policy = ddpo.Policy(model, steps, torch.ones(3), tokens, model.guidance_scale, torch.device("cpu"))
    mask, noise = model.codec.mask(lengths, tokens), normal(2, 5, tokens, 251)
    states_ = ddpo.rollout(policy, ["ab", "abcd"], mask, noise)
    assert torch.isfinite(states_).all() and (states_[0, -1] != 0).all()
    logp, mean = ddpo.step_logps(policy, states_, ["ab", "abcd"], mask, 3)
    real = mask[:, None, :, None]
    wanted = (mean + steps.std[:3] * noise[:, 1:4]) * real
    assert torch.allclose(states_[:, 1:4], wanted, atol=1e-4) and torch.isfinite(logp).all()
    assert model.codec.decode(states_[:, -1], lengths).shape == (2, 8, 251)


def test_a_copy_is_a_network_of_its_own():
    model, _ = make()
    other = copy.deepcopy(model)
    other.project_out.bias.data += 1.0
    assert not torch.equal(model(**call(model)), other(**call(other)))
    assert json.dumps(model.sizes) and torch.equal(other.alphas_cumprod, model.alphas_cumprod)
