"""The published VAE and denoiser of MLD: read back from files like theirs, refused where they are none, and
used by the scripts like their own."""
import copy
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from common import InputError, generator, length_mask, lora, samplers, vae
from common.published import layers, mld
from tests import parity
from tests.published_helpers import check_read, mld_state, random_, statistics

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
LENGTHS = torch.tensor([7, 5, 3])


def normal(*shape, k=0):
    return torch.randn(*shape, generator=generator(0, k, "test"))


def texts(captions):
    """Text features like CLIP's, by the captions' lengths."""
    return torch.stack([normal(768, k=len(caption)) for caption in captions])


def make(**other):
    """A network with random weights, of 263 features."""
    sizes = dict(feature_dim=263, text_dim=768, width=16, ff=24, depth=3, vae_ff=20, vae_depth=5, longest=40,
                 positions=9)
    model = random_(mld.MLD(**sizes | other, texts=texts), "mld")
    layers.take_statistics(model.codec, statistics(model.sizes["feature_dim"]), "")
    model.null_text.copy_(texts([""]))
    return model


def save(path, state):
    rest = {"epoch": 3, "global_step": 7, "loops": {}, "optimizer_states": [{}]}
    torch.save({"state_dict": state, **rest}, path)
    return path


def load(path, feature_dim=263):
    return mld.load_mld(path, statistics(feature_dim), texts)


def message(path, feature_dim=263):
    """The text of the InputError of reading a file: one line that names it."""
    with pytest.raises(InputError) as caught:
        load(path, feature_dim)
    text = str(caught.value)
    assert "\n" not in text and f"{path}: " in text and 20 < len(text) < 800
    return text


def call(model):
    """Inputs of three latents for a network."""
    text, text_mask = model.encode_text(["abcd", "ab", "abcdef"])
    return dict(x=normal(3, 1, model.dims), timesteps=torch.tensor([981.0, 1.0, 20.0]),
                mask=torch.ones(3, 1, dtype=torch.bool), text=text, text_mask=text_mask)


# ---- parity ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.exists(), reason="reference files are not here")
def test_full_size_weights_are_listed_as_published():
    with np.load(GOLDEN / "mld_denoiser_dev.npz") as z:
        listed = set(z["full_size_checkpoint_keys"].tolist())
    with torch.device("meta"):
        model = mld.MLD(263, 768, 256, 1024, 9, vae_ff=1024, vae_depth=9, longest=500, positions=500)
        state = mld_state(model)
    ours = {f"{key} {tuple(value.shape)}" for key, value in state.items() if not mld.UNUSED.match(key)}
    assert ours == {line for line in listed if not mld.UNUSED.match(line.split()[0])}
    assert len(listed) == len(ours) + 43


@pytest.mark.skipif(not GOLDEN.exists(), reason="reference files are not here")
@pytest.mark.parametrize("kind, field", [
    ("vae", "sd/vae.final_layer.bias"), ("vae", "features"), ("vae", "lengths"), ("vae", "noise"),
    ("vae", "z_other"), ("vae", "grad_weight"), ("vae", "evaluator_mean"), ("vae", "renormalised"),
    ("denoiser", "text_empty"), ("denoiser", "timestep"), ("denoiser", "x_T"), ("denoiser", "ddim4/eps"),
    ("denoiser", "betas")])
def test_the_parity_check_notices_another_number(kind, field, tmp_path):
    with np.load(GOLDEN / f"mld_{kind}_dev.npz") as z:
        fields = {key: z[key] for key in z.files}
    fields[field] = fields[field].copy()
    fields[field][(0,) * fields[field].ndim] += -1 if field in ("lengths", "timestep") else 3  # past a ReLU
    np.savez(tmp_path / f"mld_{kind}_dev.npz", **fields)
    assert any(not row[1] <= row[2] for row in parity.check_file(tmp_path / f"mld_{kind}_dev.npz"))


# ---- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("other", [{}, {"depth": 5, "vae_depth": 3, "feature_dim": 251}])
def test_a_network_comes_back(bare, other, tmp_path):
    model, path = make(**other), tmp_path / "mld.ckpt"
    if bare:
        torch.save(mld_state(model), path)
    loaded = load(path if bare else save(path, mld_state(model)), model.sizes["feature_dim"])
    check_read(model, loaded, call)


def test_reading_draws_nothing(tmp_path):
    path, before = save(tmp_path / "mld.ckpt", mld_state(make())), torch.get_rng_state()
    load(path)
    assert torch.equal(before, torch.get_rng_state())


# ---- files of the wrong kind -------------------------------------------------------------------------------


def test_weights_that_do_not_fit(tmp_path):
    state, path = mld_state(make()), tmp_path / "mld.ckpt"

    def without(start):
        return message(save(path, {key: value for key, value in state.items() if not key.startswith(start)}))

    def said(**other):
        return message(save(path, state | {key.replace("__", "."): value for key, value in other.items()}))
    assert "holds no vae.*" in without("vae.")
    assert "is it that of its VAE alone" in without("denoiser.")
    assert "codec.decoder.norm.bias is missing" in without("vae.decoder.norm.bias")
    assert "vae.global_motion_token" in without("vae.global_motion_token")
    assert "no linear_blocks" in without("denoiser.encoder.linear_blocks")
    assert "layers.input_blocks.0.self_attn.k.bias is missing" in without(
        "denoiser.encoder.input_blocks.0.self_attn.in_proj_bias")
    assert "layers.input_blocks.0" in without("denoiser.encoder.input_blocks")
    assert "clip.weight is (1,), wanted nothing" in said(clip__weight=torch.ones(1))
    assert "t2m_other.x is (1,), wanted nothing" in said(t2m_other__x=torch.ones(1))
    assert "denoiser is a decoder" in said(denoiser__decoder__norm__bias=torch.ones(16))
    assert "4 rows of 16" in said(vae__global_motion_token=torch.ones(4, 16))
    assert "2 rows of 18" in said(vae__global_motion_token=torch.ones(2, 18))
    assert "one place" in said(denoiser__layers__norm__bias=torch.ones(16))
    assert "is no weight" in said(denoiser__x=3)
    other = {"denoiser.encoder.input_blocks.1.norm1.bias": torch.ones(16)}
    assert "layers.input_blocks.1.norm1.bias" in said(**other)
    torch.save({"state_dict": torch.ones(2)}, path)
    assert "holds no 'state_dict'" in message(path)
    torch.save({"input_process.poseEmbedding.weight": torch.ones(2, 2)}, path)   # MDM's
    assert "holds no vae.*" in message(path)


@pytest.mark.parametrize("content, said", [
    (b"", "weights_only=True"), (b"PK\x03\x04 half a zip", "weights_only=True"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    (b"<!DOCTYPE html><html>", "web page")])
def test_files_that_stand_in_for_others(content, said, tmp_path):
    path = save(tmp_path / "mld.ckpt", mld_state(make()))
    whole = path.read_bytes()
    path.write_bytes(content)
    assert said in message(path)
    path.write_bytes(whole[:-500])
    assert "weights_only=True" in message(path)
    assert "no such file" in message(tmp_path / "none.ckpt")


def test_code_in_a_file_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "marker",)
    state = mld_state(make())
    torch.save({"state_dict": state, "callbacks": Payload()}, tmp_path / "mld.ckpt")
    assert "weights_only=True" in message(tmp_path / "mld.ckpt")
    assert not (tmp_path / "marker").exists()


def test_statistics_and_text_that_do_not_fit(tmp_path):
    path = save(tmp_path / "mld.ckpt", mld_state(make()))
    assert "for 263 features, the data have 251" in message(path, 251)
    with pytest.raises(InputError, match="512 numbers a token, the network reads 768"):
        mld.load_mld(path, statistics(263), lambda captions: torch.ones(len(captions), 512))


# ---- the VAE -----------------------------------------------------------------------------------------------


def test_padding_has_no_say():
    codec, motion = make().codec, normal(3, 7, 263)
    z = codec.encode(motion, LENGTHS)
    hidden = ~length_mask(LENGTHS, 7)
    for noise in (0.0, torch.nan):
        other = motion.masked_fill(hidden[..., None], noise)
        assert torch.allclose(codec.encode(other, LENGTHS), z, atol=1e-6)
    assert torch.allclose(codec.encode(motion[2:, :3]), z[2:], atol=1e-6)
    assert not torch.allclose(codec.encode(motion[2:]), z[2:], atol=1e-4)
    made = codec.decode(z, LENGTHS)
    assert made.shape == (3, 7, 263) and torch.allclose(made[hidden], codec.mean.expand_as(made[hidden]))
    assert torch.allclose(codec.decode(z[1:2], LENGTHS[1:2]), made[1:2, :5], atol=1e-6)


def test_a_decoded_motion_has_a_gradient():
    codec = make().codec
    z = normal(2, 1, 16).requires_grad_()
    codec.decode(z, LENGTHS[:2]).sum().backward()
    assert z.grad.abs().min() > 0


def test_the_codec_has_what_a_denoiser_asks_for():
    codec = make().codec
    assert codec.count(196) == codec.count(4) == 1 and codec.dims == 16
    mask = codec.mask(LENGTHS, 1)
    assert mask.shape == (3, 1) and mask.all()
    motion = normal(2, 6, 263)
    mu, _ = codec.posterior((motion - codec.mean) / codec.std, torch.ones(2, 6, dtype=torch.bool))
    assert torch.equal(codec.encode(motion), mu)


def test_a_motion_longer_than_the_positions_is_refused():
    with pytest.raises(InputError, match="43 tokens: the published network has 40"):
        make().codec.encode(normal(1, 41, 263))


def test_skips_are_those_of_the_project():
    theirs = random_(mld.SkipTransformer(16, 24, 5), "skips")
    blocks = [*theirs.input_blocks, theirs.middle_block, *theirs.output_blocks]
    ours = vae.Skips(blocks, 16)
    ours.skips.load_state_dict(theirs.linear_blocks.state_dict())
    x, mask = normal(3, 7, 16), length_mask(LENGTHS, 7)
    assert torch.equal(theirs(x, mask), theirs.norm(ours(x, mask)))


# ---- the denoiser ------------------------------------------------------------------------------------------


def test_dropped_text_is_the_empty_caption():
    model = make()
    given, dropped = call(model), torch.tensor([True, False, True])
    text, text_mask = model.drop_text(given["text"], given["text_mask"], dropped)
    empty, _ = model.encode_text(["", "", ""])
    assert torch.equal(text[dropped], empty[dropped]) and torch.equal(text[1], given["text"][1])
    assert text_mask.all() and empty.abs().sum() > 1 and text.shape == (3, 1, 768)


def test_time_and_text_are_felt():
    model = make()
    given = call(model)
    for other in ({"timesteps": torch.full((3,), 500.0)}, {"text": given["text"].flip(0)},
                  {"x": given["x"] + 1}):
        assert (model(**given) - model(**given | other)).abs().max() > 1e-4


def test_the_grid_is_that_of_its_sampler():
    grid = make().grid()
    assert grid.timesteps[:2].tolist() == [981, 961] and grid.timesteps[-1] == 1 and len(grid.timesteps) == 50
    alphas_cumprod = (1 - samplers.make_betas("scaled_linear")).cumprod(0)
    assert torch.allclose(grid.alpha[-1] ** 2, alphas_cumprod[0])
    assert torch.allclose(grid.alpha[:-1] ** 2, alphas_cumprod[grid.timesteps])


def test_lora_reaches_every_attention_by_the_pattern_of_the_scripts():
    pattern = importlib.import_module("ddpo_motion").LORA_LAYERS
    model = make()
    given = call(model)
    before = model(**given)
    names = lora.inject(model, pattern, 2, 4, generator(0, 0, "lora"))
    assert len(names) == 3 * (4 + 2) and all(name.startswith("layers.") for name in names)
    assert torch.equal(before, model(**given))
    for name, layer in lora.adapters(model).items():
        layer.B.data.fill_(0.1)
        assert not torch.equal(before, model(**given)), name
        layer.B.data.zero_()


def test_the_policy_of_ddpo_samples_it():
    ddpo, model = importlib.import_module("ddpo_motion"), make()
    lora.inject(model, ddpo.LORA_LAYERS, 2, 2, generator(0, 0, "lora"))
    steps = ddpo.solver_steps(model.grid(4), 1, model.prediction)
    policy = ddpo.Policy(model, steps, torch.ones(4), 1, model.guidance_scale, torch.device("cpu"))
    mask, noise = model.codec.mask(LENGTHS, 1), normal(3, 5, 1, 16)
    states = ddpo.rollout(policy, ["ab", "abcd", ""], mask, noise)
    logp, mean = ddpo.step_logps(policy, states, ["ab", "abcd", ""], mask, 4)
    assert torch.allclose(states[:, 1:], mean + steps.std * noise[:, 1:], atol=1e-3)
    assert torch.isfinite(logp).all() and (steps.std > 0).all()
    assert model.codec.decode(states[:, -1], LENGTHS).shape == (3, 7, 263)


def test_a_copy_is_a_network_of_its_own():
    model = make()
    other = copy.deepcopy(model)
    other.layers.norm.bias.data += 1.0
    assert not torch.equal(model(**call(model)), other(**call(other)))
