"""StableMoFusion's U-Net and its published folder: read strictly or refused in one line."""
import numpy as np
import pytest
import torch
from torch import nn

from common import InputError, lora
from common.published import stablemofusion as smf, tmr
from tests.folder_helpers import message, normal, randomise, refusals
from tests.parity.rows import packed

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(feature_dim=13, width=16, levels=2, time_dim=8, text_dim=12, text_layers=2, text_ff=20,
             clip_dim=10)
OPTIONS = """------------ Options -------------
base_dim: 8
beta_schedule: linear
cond_mask_prob: 0.1
dim_mults: [2, 2]
feat_bias: 5
no_adagn: False
no_eff: False
prediction_type: sample
text_latent_dim: 12
time_dim: 8
-------------- End ----------------
"""


def network(k=0):
    return randomise(smf.StableMoFusion(**SIZES), k)


def published(state, prefix=""):
    """A state dict as the repository stores it: packed attention, CLIP's weights, a wrapper's prefix."""
    return {prefix + key: value for key, value in packed(state).items()} | {
        f"{prefix}clip_model.visual.proj": torch.ones(3), f"{prefix}clip_model.logit_scale": torch.ones(())}


def write(folder, prefix="module."):
    """A whole folder -> it, and the networks whose weights are encoder and model_ema."""
    raw, ema = network(1), network(2)
    (folder / "meta").mkdir()
    (folder / "model").mkdir()
    (folder / "opt.txt").write_text(OPTIONS)
    np.save(folder / "meta" / "mean.npy", np.arange(13.0))
    np.save(folder / "meta" / "std.npy", np.arange(1.0, 14))
    torch.save({"encoder": published(raw.state_dict()), "total_it": 7, "opt_encoder": {"state": {}},
                "model_ema": published(ema.state_dict(), prefix) | {"n_averaged": torch.tensor(5)}},
               folder / "model" / "latest.tar")
    return folder, raw, ema


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path)[0]


def inputs(b=3, t=18, w=5):
    """x, timesteps, text states (b w 10), text_mask (b w)"""
    mask = torch.arange(w) < torch.tensor([w, 3, 1])[:b, None]
    return normal(b, t, 13), torch.tensor([3, 999, 0])[:b], normal(b, w, 10, k=1), mask


def answer(net, x, timesteps, states, mask):
    return net(x, timesteps, None, net.encode_tokens(states, mask), mask)


# ---- the network -------------------------------------------------------------------------------------------


def test_text_encoder_is_that_of_torch_with_packed_weights():
    net = network()
    layer = nn.TransformerEncoderLayer(12, smf.TEXT_HEADS, 20, 0.0, "gelu", batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    theirs.load_state_dict(packed(net.textTransEncoder.state_dict()))
    states = normal(3, 5, 10)
    want = net.text_ln(theirs(net.embed_text(states)))
    assert torch.allclose(net.encode_tokens(states), want, atol=1e-5)
    split = tmr.unpack_attention(packed(net.state_dict()))
    assert split.keys() == net.state_dict().keys()
    assert all(torch.equal(split[key], value) for key, value in net.state_dict().items())


def test_lora_reaches_every_attention_by_name():
    net, given = network(), inputs()
    before = answer(net, *given)
    names = lora.inject(net, r"cross_attention\.(query|key|value)$|self_attn\.[qkv]$", 2, 4)
    blocks = 2 * 2 + 2 + 2 * 2
    assert len(names) == 3 * blocks + 3 * SIZES["text_layers"]
    assert torch.equal(answer(net, *given), before)
    for name, layer in lora.adapters(net).items():
        layer.B.data.copy_(30 * normal(*layer.B.shape))
        assert not torch.equal(answer(net, *given), before), name  # bit for bit, were the adapter passed by
        layer.B.data.zero_()


def test_words_behind_the_mask_have_no_say():
    net, (x, timesteps, states, mask) = network(), inputs()
    before = answer(net, x, timesteps, states, mask)
    spoilt = torch.where(mask[..., None], states, 1e3 * normal(*states.shape, k=2))
    assert torch.allclose(answer(net, x, timesteps, spoilt, mask), before, atol=1e-5)
    short = answer(net, x[2:], timesteps[2:], states[2:, :1], mask[2:, :1])
    assert torch.allclose(short, before[2:], atol=1e-4)


def test_padding_to_sixteen_frames_is_zero_and_cut():
    net, (x, timesteps, states, mask) = network(), inputs()
    text = net.encode_tokens(states, mask)
    longer = torch.cat([x, torch.zeros(3, 14, 13)], 1)
    whole = net(longer, timesteps, None, text, mask)
    ours = net(x, timesteps, None, text, mask)
    assert ours.shape == x.shape and torch.allclose(ours, whole[:, :18], atol=1e-5)


def test_a_dropped_caption_leaves_the_attention_out_and_other_rows_alone():
    net, (x, timesteps, states, mask) = network(), inputs()
    text, dropped = net.encode_tokens(states, mask), torch.tensor([True, False, True])
    before = net(x, timesteps, None, text, mask)
    mixed = net(x, timesteps, None, *net.drop_text(text, mask, dropped))
    assert torch.allclose(mixed[1], before[1], atol=1e-5)
    for block in (module for module in net.modules() if isinstance(module, smf.Block)):
        block.cross_attn["cross_attention"].value.weight.zero_()
        block.cross_attn["cross_attention"].value.bias.zero_()
    without = net(x, timesteps, None, text, mask)
    assert torch.allclose(mixed[dropped], without[dropped], atol=1e-5)
    assert not torch.allclose(before, without, atol=1e-2)


def test_gradients_of_dropped_captions_are_finite():
    net, (x, timesteps, states, mask) = network(), inputs()
    states.requires_grad_()
    text = net.encode_tokens(states, mask)
    net(x, timesteps, None, *net.drop_text(text, mask, torch.tensor([True, True, False]))).sum().backward()
    assert torch.isfinite(states.grad).all() and not states.grad[:2].any() and states.grad[2].any()


def test_each_frame_is_normalised_by_itself():
    norm, x = smf.FrameNorm(8, 16), normal(2, 16, 5)
    alone = torch.cat([nn.functional.group_norm(x[..., t:t + 1], 8) for t in range(5)], -1)
    assert torch.allclose(norm(x), alone, atol=1e-6)


# ---- the folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ("", "module."))
def test_a_folder_comes_back(tmp_path, prefix):
    folder, raw, ema = write(tmp_path, prefix)
    state = torch.random.get_rng_state()
    loaded, settings = smf.load_folder(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(answer(loaded, *inputs()), answer(ema, *inputs()))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert settings[:2] == ("linear", "sample")
    statistics = settings.statistics.require("generator")
    assert statistics.mean.tolist() == list(range(13)) and statistics.std[0] == 1
    unaveraged, _ = smf.load_folder(folder, ema=False)
    assert torch.equal(answer(unaveraged, *inputs()), answer(raw, *inputs()))


def test_wrong_files_are_named(folder):
    load = lambda: smf.load_folder(folder)
    found = refusals(load, folder / "model" / "latest.tar", {"state_dict": {"vae.x": torch.ones(2)}})
    assert "model_ema" in found["other"] and "latest.tar" in found["missing"]
    for name in ("mean.npy", "std.npy"):
        refusals(load, folder / "meta" / name, {"x": 1})
    assert "beta_schedule" in refusals(load, folder / "opt.txt", None)["empty"]
    (folder / "opt.txt").write_bytes(b"\xff\xfe\x00")
    assert "opt.txt: is no text file" in message(load)
    assert "no such folder" in message(smf.load_folder, folder / "nowhere")


def change(folder, edit):
    path = folder / "model" / "latest.tar"
    stored = torch.load(path, weights_only=True)
    edit(stored["model_ema"])
    torch.save(stored, path)


@pytest.mark.parametrize("edit, said", [
    (lambda s: s.pop("module.text_ln.bias"), "text_ln.bias is missing, wanted (12,)"),
    (lambda s: s.update({"module.unet.other": torch.ones(2)}), "unet.other is (2,), wanted nothing"),
    (lambda s: s.pop("module.unet.final_conv.weight"), "has no unet.final_conv.weight"),
    (lambda s: s.update({"module.unet.time_mlp.0.pe": torch.ones(4, 8)}), "pe is (4, 8), wanted (5000, 8)"),
    (lambda s: s.update({"module.text_ln.bias": "text"}), "'module.text_ln.bias' is no weight")])
def test_loading_is_strict(folder, edit, said):
    change(folder, edit)
    text = message(smf.load_folder, folder)
    assert "latest.tar" in text and said in text


def test_a_pickle_is_not_executed(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))
    torch.save({"model_ema": Evil()}, folder / "model" / "latest.tar")
    assert "latest.tar" in message(smf.load_folder, folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("old, new, said", [
    ("no_eff: False", "no_eff: True", "no_eff is True"),
    ("no_adagn: False", "no_adagn: True", "no_adagn is True"),
    ("no_eff: False", "", "no line 'no_eff'"),
    ("beta_schedule: linear", "beta_schedule: sigmoid", "beta_schedule is 'sigmoid'"),
    ("prediction_type: sample", "prediction_type: flow", "prediction_type is 'flow'"),
    ("dim_mults: [2, 2]", "dim_mults: [2, 2, 2]", "dim_mults is [2, 2, 2]"),
    ("dim_mults: [2, 2]", "dim_mults: [1, 2]", "dim_mults is [1, 2]"),
    ("dim_mults: [2, 2]", "dim_mults: [0, 0]", "base_dim is 8"),
    ("base_dim: 8", "base_dim: 512", "base_dim is 512, the weights have 8"),
    ("time_dim: 8", "time_dim: 9", "time_dim is 9, the weights have 8"),
    ("text_latent_dim: 12", "text_latent_dim: 256", "text_latent_dim is 256")])
def test_options_of_another_network_are_refused(folder, old, new, said):
    (folder / "opt.txt").write_text(OPTIONS.replace(old, new))
    text = message(smf.load_folder, folder)
    assert "opt.txt" in text and said in text


def test_options_name_schedule_and_prediction(folder):
    (folder / "opt.txt").write_text(OPTIONS.replace("linear", "squaredcos_cap_v2").replace(
        "sample", "v_prediction"))
    assert smf.load_folder(folder)[1][:2] == ("cosine", "v")


@pytest.mark.parametrize("name, array, said", [
    ("mean.npy", np.zeros(251), "wanted 13 floats"), ("std.npy", np.zeros(13), "not positive"),
    ("std.npy", np.full(13, np.nan), "NaN"), ("mean.npy", np.arange(13), "wanted 13 floats")])
def test_statistics_that_cannot_be_are_refused(folder, name, array, said):
    np.save(folder / "meta" / name, array)
    text = message(smf.load_folder, folder)
    assert name in text and said in text


def test_widths_that_heads_do_not_divide_are_refused(tmp_path):
    state = randomise(smf.StableMoFusion(**SIZES)).state_dict()
    state["unet.final_conv.weight"] = torch.ones(13, 12, 1)
    torch.save({"model_ema": published(state)}, tmp_path / "latest.tar")
    with pytest.raises(InputError, match="heads"):
        smf.load_network(tmp_path / "latest.tar")


def test_full_size():
    """299 million parameters, as published."""
    with torch.device("meta"):
        count = sum(p.numel() for p in smf.StableMoFusion().parameters())
    assert round(count / 1e6) == 299
