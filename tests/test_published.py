"""Weights and text features of others: loaded strictly or refused in one line, and never executed."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import InputError, freeze, generator, published, runs, tokenizer, training
from common.published import evaluator, t2m_gpt
from ppo_motion import MotionGPT

WIDTH = 9


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, k=0):
    return torch.randn(*shape, generator=generator(0, k, "test"))


def own_vq(halvings=1):
    vq = tokenizer.VQVAE(WIDTH, 6, 5, 7, halvings)
    training.initialise(vq, generator(0, 0, "vq"))
    vq.quantizer.codebook.copy_(normal(7, 5))
    return freeze(vq)


def own_gpt():
    gpt = MotionGPT(7, 10, 8, 2, 3, 2, 6)
    training.initialise(gpt, generator(0, 0, "gpt"))
    return freeze(gpt)


def vq_state(vq):
    """As T2M-GPT stores it: a wrapper's prefix, and no statistics."""
    return {f"vqvae.{key}": value for key, value in vq.state_dict().items() if key not in ("mean", "std")}


def save(path, **content):
    torch.save(content, path)
    return path


def statistics(folder, mean=None, std=None, names=("Mean.npy", "Std.npy")):
    for name, array in zip(names, (np.arange(WIDTH) if mean is None else mean,
                                   np.arange(1.0, WIDTH + 1) if std is None else std)):
        np.save(folder / name, array)
    return folder


def message(function, *args, **options):
    """The text of the InputError: one line, as a user sees it."""
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value) and 20 < len(str(caught.value)) < 800
    return str(caught.value)


# ---- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halvings", (1, 2, 3))
@pytest.mark.parametrize("prefix", ("", "module."))
def test_a_tokenizer_comes_back_with_its_sizes(halvings, prefix, tmp_path):
    vq = own_vq(halvings)
    path = save(tmp_path / "vq.pth", net={prefix + key: value for key, value in vq_state(vq).items()})
    sizes = t2m_gpt.tokenizer_sizes(published.read_state(path, "net"), path)
    assert sizes == dict(feature_dim=WIDTH, width=6, halvings=halvings, code_dim=5, codes=7)
    loaded, notes = t2m_gpt.load_tokenizer(path, statistics(tmp_path), WIDTH, torch.device("cpu"))
    vq.mean.copy_(torch.arange(WIDTH))
    vq.std.copy_(torch.arange(1, WIDTH + 1))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in vq.state_dict().items())
    assert notes == {"published": str(path)} and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    motion, lengths = normal(2, 16, WIDTH), torch.tensor([16, 8])
    assert torch.equal(loaded.tokenise(motion, lengths)[0], vq.tokenise(motion, lengths)[0])


@pytest.mark.parametrize("prefix", ("", "module."))
def test_a_gpt_comes_back_with_its_sizes(prefix, tmp_path):
    """What is no weight in the published files is left out: masks, a table, an embedding."""
    gpt = own_gpt()
    state = {prefix + key: value for key, value in gpt.state_dict().items()}
    extra = {key: torch.ones(6, 8) for key in (
        "trans_base.blocks.0.attn.mask", "trans_head.blocks.1.attn.mask", "trans_base.pos_embedding.weight",
        "trans_base.pos_embed.embed", "trans_head.pos_embed.embed")}
    path = save(tmp_path / "gpt.pth", trans=state | {prefix + key: value for key, value in extra.items()})
    state = published.read_state(path, "trans")
    sizes = t2m_gpt.gpt_sizes(state, path, 2, 6)
    assert sizes == dict(codes=7, text_dim=10, width=8, heads=2, base_layers=3, head_layers=2, block_size=6)
    loaded = MotionGPT(**sizes)
    published.load_strict(loaded, state, path)
    tokens, feature = torch.tensor([[0, 6, 3]]), normal(1, 10)
    assert torch.equal(loaded(tokens, feature)[0], gpt(tokens, feature)[0])


# ---- strict loading ----------------------------------------------------------------------------------------


def test_every_difference_is_named_with_its_shapes():
    gpt = own_gpt()
    state = dict(gpt.state_dict())
    published.load_strict(own_gpt(), state, "file.pth")
    missing = {key: value for key, value in state.items() if key != "trans_head.ln_f.bias"}
    assert message(published.load_strict, gpt, missing, "file.pth") == (
        "file.pth: trans_head.ln_f.bias is missing, wanted (8,)")
    assert message(published.load_strict, gpt, state | {"other.weight": torch.ones(2, 3)}, "file.pth") == (
        "file.pth: other.weight is (2, 3), wanted nothing")
    wrong = state | {"trans_base.cond_emb.weight": torch.ones(8, 11)}
    assert message(published.load_strict, gpt, wrong, "file.pth") == (
        "file.pth: trans_base.cond_emb.weight is (8, 11), wanted (8, 10)")
    del wrong["trans_head.ln_f.bias"]
    found = message(published.load_strict, gpt, wrong | {"other.weight": torch.ones(2, 3)}, "file.pth")
    assert all(part in found for part in ("(8, 11), wanted (8, 10)", "ln_f.bias is missing",
                                          "other.weight is (2, 3)"))
    assert message(published.load_strict, gpt, {}, "file.pth").endswith(f"; and {len(state) - 5} more")


def test_a_refused_file_leaves_the_module_as_it_was():
    gpt = own_gpt()
    before = {key: value.clone() for key, value in gpt.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()} | {"other": torch.ones(1)}
    message(published.load_strict, gpt, state, "file.pth")
    assert all(torch.equal(value, before[key]) for key, value in gpt.state_dict().items())


def test_free_entries_come_from_elsewhere_and_no_others_do():
    vq, state = own_vq(), own_vq().state_dict()
    del state["mean"], state["std"]
    vq.mean.fill_(5.0)
    published.load_strict(vq, state, "file.pth", free=("mean", "std"))
    assert (vq.mean == 5).all()
    found = message(published.load_strict, vq, state, "file.pth", free=("std",))
    assert found == "file.pth: mean is missing, wanted (9,)"
    assert "wanted nothing" in message(published.load_strict, vq, state | {"mean": vq.mean}, "file.pth",
                                       free=("mean", "std"))


def test_a_tokenizer_with_a_layer_changed_is_refused(tmp_path):
    state = vq_state(own_vq())
    del state["vqvae.decoder.model.5.bias"]
    path = save(tmp_path / "vq.pth", net=state)
    found = message(t2m_gpt.load_tokenizer, path, statistics(tmp_path), WIDTH, torch.device("cpu"))
    assert found == f"{path}: decoder.model.5.bias is missing, wanted (9,)"


def test_a_tokenizer_of_another_data_set_is_refused(tmp_path):
    path = save(tmp_path / "vq.pth", net=vq_state(own_vq()))
    found = message(t2m_gpt.load_tokenizer, path, statistics(tmp_path), 263, torch.device("cpu"))
    assert "width 9" in found and "263" in found


# ---- files of the wrong kind -------------------------------------------------------------------------------


def test_files_of_the_other_kind(tmp_path):
    """The GPT's file for the tokenizer and the reverse, a bare state dict, a right name on wrong content."""
    vq = save(tmp_path / "vq.pth", net=vq_state(own_vq()))
    gpt = save(tmp_path / "gpt.pth", trans=own_gpt().state_dict())
    assert "holds no 'net'" in message(published.read_state, gpt, "net")
    assert "holds no 'trans'" in message(published.read_state, vq, "trans")
    torch.save(own_gpt().state_dict(), tmp_path / "bare.pth")
    assert "bare.pth: holds no 'trans'" in message(published.read_state, tmp_path / "bare.pth", "trans")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    assert "holds no 'net'" in message(published.read_state, tmp_path / "tensor.pth", "net")
    other = save(tmp_path / "other.pth", net=torch.ones(2))
    assert "holds no 'net'" in message(published.read_state, other, "net")
    mixed = published.read_state(save(tmp_path / "mixed.pth", net=own_gpt().state_dict()), "net")
    assert "has no encoder.model.0.weight" in message(t2m_gpt.tokenizer_sizes, mixed, "mixed.pth")
    mixed = published.read_state(save(tmp_path / "mixed.pth", trans=vq_state(own_vq())), "trans")
    assert "has no trans_base.cond_emb.weight" in message(t2m_gpt.gpt_sizes, mixed, "mixed.pth", 2, 6)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 half a zip"])
def test_damaged_files(tmp_path, content):
    path = tmp_path / "vq.pth"
    path.write_bytes(content)
    assert str(path) in message(published.read_state, path, "net")


def test_missing_files_and_folders(tmp_path):
    assert "no such file" in message(published.read_state, tmp_path / "nothing.pth", "net")
    assert str(tmp_path) in message(published.read_state, tmp_path, "net")


@pytest.mark.parametrize("content", [
    {"encoder.model.0.weight": 3}, {"encoder.model.0.weight": torch.ones(3)}, {3: torch.ones(1)},
    {**vq_state(own_vq()), "epoch": 3}])
def test_weights_that_are_none(tmp_path, content):
    path = save(tmp_path / "vq.pth", net=content)
    assert str(path) in message(t2m_gpt.load_tokenizer, path, statistics(tmp_path), WIDTH, "cpu")


def test_a_truncated_file(tmp_path):
    path = save(tmp_path / "vq.pth", net=vq_state(own_vq()))
    path.write_bytes(path.read_bytes()[:-500])
    assert str(path) in message(published.read_state, path, "net")


def test_code_in_a_file_is_refused_and_not_executed(tmp_path):
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)
    for new_format in (True, False):
        path = tmp_path / "vq.pth"
        torch.save({"net": Payload()}, path, _use_new_zipfile_serialization=new_format)
        assert "weights_only=True" in message(published.read_state, path, "net")
    np.save(tmp_path / "Mean.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    np.save(tmp_path / "Std.npy", np.ones(1))
    message(t2m_gpt.read_statistics, tmp_path, 1)
    np.savez(tmp_path / "text.npz", captions=np.array([Payload()], dtype=object), vectors=np.ones((1, 2)))
    message(t2m_gpt.file_features, tmp_path / "text.npz")
    assert not marker.exists()


# ---- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("Mean.npy", "Std.npy"), ("mean.npy", "std.npy")])
def test_statistics_of_either_spelling(tmp_path, names):
    mean, std = t2m_gpt.read_statistics(statistics(tmp_path, names=names), WIDTH)
    assert mean.tolist() == list(range(WIDTH)) and std.tolist() == list(range(1, WIDTH + 1))
    assert mean.dtype == std.dtype == torch.float32


def test_statistics_that_do_not_fit_are_named(tmp_path):
    found = message(t2m_gpt.read_statistics, tmp_path / "nothing", WIDTH)
    assert "needs mean.npy of the tokenizer, 9 finite numbers" in found
    np.save(tmp_path / "Mean.npy", np.zeros(WIDTH))
    assert "needs std.npy of the tokenizer, 9" in message(t2m_gpt.read_statistics, tmp_path, WIDTH)
    for broken in (np.ones(WIDTH + 1), np.ones((1, WIDTH)), np.full(WIDTH, np.nan), np.full(WIDTH, np.inf)):
        folder = statistics(tmp_path, std=broken)
        assert "needs std.npy" in message(t2m_gpt.read_statistics, folder, WIDTH)
        folder = statistics(tmp_path, mean=broken)
        assert "needs mean.npy" in message(t2m_gpt.read_statistics, folder, WIDTH)
    for content in (b"", b"\x93NUMPY\x01\x00", b"no array"):
        (statistics(tmp_path) / "Std.npy").write_bytes(content)
        assert "needs std.npy" in message(t2m_gpt.read_statistics, tmp_path, WIDTH)


@pytest.mark.parametrize("std", [np.zeros(WIDTH), -np.ones(WIDTH), np.array(["a"] * WIDTH)])
def test_a_std_that_divides_by_nothing(tmp_path, std):
    assert "needs std.npy" in message(t2m_gpt.read_statistics, statistics(tmp_path, std=std), WIDTH)


# ---- text features -----------------------------------------------------------------------------------------

LINES = ["a man waves", "a person walks", "somebody: jumps, twice!"]


def features(path, captions=LINES, vectors=None):
    vectors = normal(len(LINES), 4).numpy() if vectors is None else vectors
    np.savez(path, captions=np.array(captions), vectors=vectors)
    return path


def test_a_file_of_vectors_is_a_text_function(tmp_path):
    vectors = normal(3, 4).double().numpy()
    function, width = t2m_gpt.text_features(str(features(tmp_path / "text.npz", vectors=vectors)))
    assert width == 4
    given = function([LINES[k] for k in (2, 0, 0, 1)])
    assert given.dtype == torch.float32
    assert torch.equal(given, torch.from_numpy(np.float32(vectors))[[2, 0, 0, 1]])
    assert function([]).shape == (0, 4)


def test_a_caption_without_a_vector_is_named(tmp_path):
    function, _ = t2m_gpt.file_features(features(tmp_path / "text.npz"))
    found = message(function, ["a man waves", "a woman waves", "a dog runs"])
    assert "no vector for 'a woman waves'" in found
    assert "'A man waves'" in message(function, ["A man waves"]), "as it is written"


@pytest.mark.parametrize("captions, vectors", [
    (LINES, np.ones((2, 4))), (LINES, np.ones(3)), (LINES, np.ones((3, 4, 1))), (LINES[:2], np.ones((3, 4))),
    (LINES, np.full((3, 4), np.nan)), (LINES, np.full((3, 4), np.inf)), (LINES, np.array([["x"] * 4] * 3))])
def test_arrays_that_do_not_fit(tmp_path, captions, vectors):
    path = features(tmp_path / "text.npz", captions, vectors)
    assert str(path) in message(t2m_gpt.file_features, path)


def test_files_that_are_no_text_features(tmp_path):
    path = tmp_path / "text.npz"
    assert str(path) in message(t2m_gpt.file_features, path)  # there is none
    np.savez(path, captions=np.array(LINES))
    assert "vectors" in message(t2m_gpt.file_features, path)
    np.savez(path, vectors=np.ones((3, 4)))
    assert "captions" in message(t2m_gpt.file_features, path)
    for content in (b"", b"no archive"):
        path.write_bytes(content)
        assert str(path) in message(t2m_gpt.file_features, path)
    assert str(tmp_path) in message(t2m_gpt.file_features, tmp_path)


def damaged(path, how):
    """A .npz that a broken copy leaves, or a file of another kind under its name."""
    raw = features(path).read_bytes()
    if how == "truncated":
        path.write_bytes(raw[:-100])
    elif how == "one byte":
        path.write_bytes(raw[:len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 255]) + raw[len(raw) // 2 + 1:])
    elif how == "one array":
        path.unlink()
        with open(path, "wb") as file:
            np.save(file, np.ones((3, 4)))
    else:
        features(path, vectors=np.float64(3.0))
    return path


@pytest.mark.parametrize("how", ("truncated", "one byte", "one array", "one number"))
def test_damaged_text_features(tmp_path, how):
    path = damaged(tmp_path / "text.npz", how)
    assert str(path) in message(t2m_gpt.file_features, path)


def test_without_clip_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip", None)
    found = message(t2m_gpt.text_features, "")
    assert "--text-features" in found and "CLIP is not installed" in found


STAND_INS = {
    "a git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132\n",
    "a web page": b"\n<!DOCTYPE html><html><head><title>Virus scan warning</title></head></html>"}


@pytest.mark.parametrize("what", STAND_INS)
def test_what_comes_instead_of_a_download_is_named(tmp_path, what):
    path = tmp_path / "vq.pth"
    path.write_bytes(STAND_INS[what])
    for read in (lambda: published.read_state(path, "net"), lambda: runs.load_checkpoint(path),
                 lambda: evaluator.load_official_evaluator(path, None)):
        found = message(read)
        assert found.startswith(f"{path}: is {what}, not the file itself; ") and "tensors" not in found
    path.write_bytes(b"no weights")
    assert runs.stand_in(path) == runs.stand_in(tmp_path / "absent") == ""


def args_of(**named):
    return t2m_gpt.WeightArgs(**{name: str(value) for name, value in named.items()})


@pytest.fixture
def weights(tmp_path):
    """Flags of a published tokenizer, GPT and text features that fit each other."""
    return dict(vq_checkpoint=save(tmp_path / "vq.pth", net=vq_state(own_vq())),
                vq_statistics=statistics(tmp_path),
                gpt_checkpoint=save(tmp_path / "gpt.pth", trans=own_gpt().state_dict()),
                text_features=features(tmp_path / "text.npz", vectors=normal(3, 10).numpy()))


def test_weights_that_fit_pass_the_check(weights, monkeypatch):
    state = torch.random.get_rng_state()
    t2m_gpt.check_weights(args_of(**weights))
    t2m_gpt.check_weights(args_of())
    t2m_gpt.check_weights(args_of(vq_checkpoint="gone.pth", vq_statistics="gone", load="policy.pt"))
    del weights["text_features"]
    monkeypatch.setitem(sys.modules, "clip", None)
    assert "CLIP is not installed" in message(t2m_gpt.check_weights, args_of(**weights))
    del weights["gpt_checkpoint"]
    t2m_gpt.check_weights(args_of(**weights))
    assert torch.equal(torch.random.get_rng_state(), state), "a check draws no numbers that a run would"


@pytest.mark.parametrize("flag", ("vq_checkpoint", "vq_statistics", "gpt_checkpoint", "text_features"))
def test_every_file_is_opened_before_anything_is_trained(weights, tmp_path, flag):
    found = message(t2m_gpt.check_weights, args_of(**weights | {flag: tmp_path / "nowhere"}))
    assert "nowhere" in found
    if flag != "vq_statistics":
        weights[flag].write_bytes(b"no weights")
        assert str(weights[flag]) in message(t2m_gpt.check_weights, args_of(**weights))


def test_a_gpt_of_other_codes_or_text_is_refused_at_once(weights, tmp_path):
    narrow = features(tmp_path / "narrow.npz")
    found = message(t2m_gpt.check_weights, args_of(**weights | {"text_features": narrow}))
    assert "for 7 codes, 10 text features; here are 7 and 4" in found


@pytest.mark.parametrize("sizes", [
    {"width": 16}, {"width": -1}, {"codes": "seven"}, {"layers": 3}, {"heads": 0}, {"halvings": 9}])
def test_a_policy_whose_sizes_contradict_its_weights(sizes):
    vq = own_vq()
    vq.sizes = dict(feature_dim=WIDTH, width=6, code_dim=5, codes=7, halvings=1)
    stored = t2m_gpt.export(vq)
    assert torch.equal(t2m_gpt.restore(tokenizer.VQVAE, stored, "cpu").quantizer.codebook,
                       vq.quantizer.codebook)
    found = message(t2m_gpt.restore, tokenizer.VQVAE, stored | {"sizes": stored["sizes"] | sizes}, "cpu")
    assert found == ("--load: sizes and weights of its VQVAE contradict each other; name the policy.pt that "
                     "the run wrote")
    message(t2m_gpt.restore, tokenizer.VQVAE, {"sizes": stored["sizes"]}, "cpu")
