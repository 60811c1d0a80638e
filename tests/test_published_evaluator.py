"""The benchmark's evaluator and TMR: networks of the released weights, against the official code."""
import collections
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from common import InputError
from common.datasets import Statistics
from common.published import evaluator, tmr
from tests import parity
from tests.folder_helpers import message, normal, randomise, refusals

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.mark.skipif(not GOLDEN.exists(), reason="reference files are not here")
def test_the_reference_folder_of_word_vectors():
    rows = parity.check_file(GOLDEN / "official_glove_dev")
    assert len(rows) == 4 and [row for row in rows if not row[1] <= row[2]] == []


def test_official_evaluator_size_and_order(tmp_path):
    parts = {"movement_encoder": evaluator.MovementEncoder(259, 8, 6),
             "motion_encoder": evaluator.MotionEncoderBiGRU(6, 8, 5),
             "text_encoder": evaluator.TextEncoderBiGRU(hidden_size=8, output_size=5)}
    state = {name: part.state_dict() for name, part in parts.items()}
    scorer = Statistics(torch.zeros(263), torch.ones(263), "scorer")
    path = tmp_path / "finest.tar"
    torch.save({**state, "epoch": 3}, path)
    judge = evaluator.load_official_evaluator(path, scorer)
    motion, lengths = normal(3, 60, 263), torch.tensor([40, 60, 24])
    whole = judge.embed_motion(motion, lengths)
    order = [2, 0, 1]
    assert torch.allclose(whole[order], judge.embed_motion(motion[order], lengths[order]), atol=1e-6)
    assert torch.allclose(whole[0], judge.embed_motion(motion[:1, :40], lengths[:1])[0], atol=1e-6)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="finest.tar"):
        evaluator.load_official_evaluator(path, scorer)
    with pytest.raises(ValueError, match="generator"):
        evaluator.OfficialEvaluator(state, Statistics(torch.zeros(263), torch.ones(263), "generator"))


def test_full_size_parameter_counts():
    """Millions, as in the released checkpoints."""
    count = lambda *modules: [round(sum(p.numel() for p in m.parameters()) / 1e6, 2) for m in modules]
    official = (evaluator.MovementEncoder(259), evaluator.MotionEncoderBiGRU(), evaluator.TextEncoderBiGRU())
    assert count(*official) == [1.84, 15.75, 4.10]
    assert count(tmr.TMREncoder(263), tmr.TMREncoder(768), tmr.TMRDecoder()) == [4.81, 4.94, 6.39]


def test_official_tokens_are_framed_and_padded():
    tokens, count = evaluator.official_tokens(["a/DET"] * 3)
    assert count == 5 and len(tokens) == 22 and tokens[4:6] == ["eos/OTHER", "unk/OTHER"]
    tokens, count = evaluator.official_tokens(["a/DET"] * 30)
    assert count == 22 and tokens[-1] == "eos/OTHER"


@pytest.mark.parametrize("content", [
    {"model": torch.ones(2)}, torch.ones(2), {"movement_encoder": {"main.0.weight": torch.ones(3)}},
    {name: {} for name in ("movement_encoder", "motion_encoder", "text_encoder")}])
def test_other_checkpoints_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "finest.tar")
    with pytest.raises(InputError, match="finest.tar: holds no weights of the evaluator") as caught:
        evaluator.load_official_evaluator(tmp_path / "finest.tar", Statistics(torch.zeros(263),
                                                                              torch.ones(263), "scorer"))
    assert "\n" not in str(caught.value)


# ---- words -------------------------------------------------------------------------------------------------


VOCABULARY = ["sos", "eos", "unk", "a", "man", "walk", "left", *" ".join(evaluator.VIP.values()).split()]
VOCABULARY = [word for word in dict.fromkeys(VOCABULARY) if word != "feet"]


def write_glove(folder, dtype=np.float64):
    """Word vectors as they are released; rows are in another order than the list."""
    folder.mkdir(parents=True)
    rows = {word: len(VOCABULARY) - 1 - k for k, word in enumerate(VOCABULARY)}
    np.save(folder / "our_vab_data.npy", normal(len(VOCABULARY), 300).numpy().astype(dtype))
    for name, content in (("words", VOCABULARY), ("idx", rows)):
        (folder / f"our_vab_{name}.pkl").write_bytes(pickle.dumps(content, protocol=3))
    return rows


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_a_token_has_the_vector_of_its_row_and_its_class(tmp_path, dtype):
    rows = write_glove(tmp_path / "glove", dtype)
    assert sorted(rows.values()) == list(range(len(VOCABULARY)))
    glove = evaluator.read_glove(tmp_path / "glove")
    unknown = rows["unk"]
    for token, row, name in (
            ("walk/NOUN", rows["walk"], "Act_VIP"), ("man/NOUN", rows["man"], "NOUN"),
            ("man/XYZ", rows["man"], "OTHER"), ("man/Act_VIP", rows["man"], "Act_VIP"),
            ("feet/NOUN", unknown, "OTHER"), ("Walk/VERB", unknown, "OTHER"),
            ("zigzag/NOUN", unknown, "OTHER")):
        assert glove.token(token) == (row, evaluator.CLASSES.index(name))
    words, pos, counts = glove.encode([["man/NOUN"] * 2, ["a/DET"] * 30])
    assert words.shape == (2, 22, 300) and pos.shape == (2, 22, 15) and counts.tolist() == [4, 22]
    assert words.dtype == pos.dtype == torch.float32 and (pos.sum(-1) == 1).all()
    assert torch.equal(words[0, 1], normal(len(VOCABULARY), 300)[rows["man"]])
    assert torch.equal(words[0, 3], words[1, 21]) and torch.equal(words[0, 4], words[0, 21])
    assert pos[0, 4].argmax() == 14 and pos[1, 20].argmax() == 2


@pytest.mark.parametrize("token", ("walk", "walk/VERB/x", ""))
def test_a_token_without_one_slash_is_an_error(tmp_path, token):
    write_glove(tmp_path / "glove")
    glove = evaluator.read_glove(tmp_path / "glove")
    assert "word/POS" in message(glove.encode, [[token]])


class Evil:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ("our_vab_words.pkl", "our_vab_idx.pkl"))
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_not_executed(tmp_path, name, protocol):
    write_glove(tmp_path / "glove")
    path = tmp_path / "glove" / name
    for content in (Evil(str(tmp_path / "executed")), [Evil(str(tmp_path / "executed"))], {"a": np.ones(1)},
                    collections.OrderedDict(a=1)):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        assert name in message(evaluator.read_glove, tmp_path / "glove")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name, content, said", [
    ("words", {"a": 1}, "holds a dict, wanted a list"), ("idx", VOCABULARY, "holds a list, wanted a dict"),
    ("words", VOCABULARY[1:], "do not belong together"), ("words", [*VOCABULARY[1:], 3], "do not belong"),
    ("words", [], "do not belong"), ("words", VOCABULARY + ["a"], "do not belong"),
    ("words", [[word] for word in VOCABULARY], "do not belong"),
    ("idx", {word: k + 1 for k, word in enumerate(VOCABULARY)}, "do not belong"),
    ("idx", {word: k - 1 for k, word in enumerate(VOCABULARY)}, "do not belong"),
    ("idx", {word: True for word in VOCABULARY}, "do not belong"),
    ("idx", {word: 1.0 for word in VOCABULARY}, "do not belong")])
def test_word_lists_that_do_not_fit_are_refused(tmp_path, name, content, said):
    write_glove(tmp_path / "glove")
    (tmp_path / "glove" / f"our_vab_{name}.pkl").write_bytes(pickle.dumps(content))
    assert said in message(evaluator.read_glove, tmp_path / "glove")


def test_the_words_that_every_caption_needs_have_to_be_there(tmp_path):
    write_glove(tmp_path / "glove")
    rows = {word: k for k, word in enumerate(VOCABULARY) if word != "unk"}
    for name, content in (("words", list(rows)), ("idx", rows)):
        (tmp_path / "glove" / f"our_vab_{name}.pkl").write_bytes(pickle.dumps(content))
    assert "lacks 'unk'" in message(evaluator.read_glove, tmp_path / "glove")


def test_the_five_lists_of_special_words():
    """Their sizes, and that no word is in two of them."""
    sizes = {name: len(words.split()) for name, words in evaluator.VIP.items()}
    assert sizes == {"Loc_VIP": 12, "Body_VIP": 13, "Obj_VIP": 10, "Act_VIP": 34, "Desc_VIP": 12}
    assert len(evaluator.OWN_CLASS) == sum(sizes.values()) and {*sizes} < {*evaluator.CLASSES}


# ---- the folder --------------------------------------------------------------------------------------------


def write_folder(folder, width):
    """The evaluator's folder with small networks -> it, and the three networks."""
    parts = {"movement_encoder": evaluator.MovementEncoder(width - 4, 8, 6),
             "motion_encoder": evaluator.MotionEncoderBiGRU(6, 8, 5),
             "text_encoder": evaluator.TextEncoderBiGRU(hidden_size=8, output_size=5)}
    for k, part in enumerate(parts.values()):
        randomise(part, k)
    write_glove(folder / "glove")
    (folder / "meta").mkdir()
    np.save(folder / "meta" / "mean.npy", np.linspace(-1, 1, width))
    np.save(folder / "meta" / "std.npy", np.linspace(0.5, 2, width))
    torch.save({name: part.state_dict() for name, part in parts.items()} | {
        "epoch": 3, "iter": 9, "opt_text_encoder": {"state": {}, "param_groups": []}}, folder / "finest.tar")
    return folder, parts


@pytest.mark.parametrize("width", (263, 251))
def test_a_folder_comes_back(tmp_path, width):
    folder, parts = write_folder(tmp_path / "t2m", width)
    judge, glove = evaluator.load_evaluator_folder(folder)
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    motion, lengths = normal(2, 196, width), torch.tensor([196, 40])
    scaled = (motion - torch.linspace(-1, 1, width)) / torch.linspace(0.5, 2, width)
    scaled[1, 40:] = 0
    want = parts["motion_encoder"](parts["movement_encoder"](scaled[..., :-4]), lengths // 4)
    assert torch.allclose(judge.embed_motion(motion, lengths), want, atol=1e-5)
    assert torch.allclose(judge.embed_normalised(scaled, lengths), want, atol=1e-5)
    words = glove.encode([["a/DET", "man/NOUN"], ["walk/VERB"]])
    assert torch.equal(judge.embed_text(*words), parts["text_encoder"](*words))


def test_padding_has_no_say(tmp_path):
    judge, glove = evaluator.load_evaluator_folder(write_folder(tmp_path / "kit", 251)[0])
    motion, lengths = normal(3, 60, 251), torch.tensor([40, 60, 24])
    whole = judge.embed_motion(motion, lengths)
    motion[0, 40:] = float("nan")
    motion[2, 24:] = 1e6
    assert torch.equal(judge.embed_motion(motion, lengths), whole)
    words, pos, counts = glove.encode([["a/DET"], ["walk/VERB"] * 20])
    text = judge.embed_text(words, pos, counts)
    words[0, 3:], pos[0, 3:] = 1e6, 1.0
    assert torch.equal(judge.embed_text(words, pos, counts), text)


def test_what_stands_behind_the_end_counts_where_the_caller_leaves_it(tmp_path):
    """Two convolutions look up to three rows past the last token."""
    judge, _ = evaluator.load_evaluator_folder(write_folder(tmp_path / "t2m", 263)[0])
    motion, lengths = normal(1, 60, 263), torch.tensor([40])
    zeros = motion.clone()
    zeros[:, 40:] = 0
    left, cut = judge.embed_normalised(motion, lengths), judge.embed_normalised(zeros, lengths)
    assert not torch.allclose(left, cut, atol=1e-4)
    motion[:, 43:] = 0
    assert torch.allclose(judge.embed_normalised(motion, lengths), left, atol=1e-6)


def test_wrong_files_are_named(tmp_path):
    folder, _ = write_folder(tmp_path / "t2m", 263)
    load = lambda: evaluator.load_evaluator_folder(folder)
    other = {"state_dict": {"vae.x": torch.ones(2)}}
    assert "holds no weights of the evaluator" in refusals(load, folder / "finest.tar", other)["other"]
    for name in ("mean.npy", "std.npy"):
        refusals(load, folder / "meta" / name, other)
    for name in ("our_vab_data.npy", "our_vab_words.pkl", "our_vab_idx.pkl"):
        refusals(load, folder / "glove" / name, other)
    assert "no such folder" in message(evaluator.load_evaluator_folder, folder / "nowhere")
    for array in (np.zeros((4, 300)), np.zeros((len(VOCABULARY), 50)), np.zeros(300)):
        np.save(folder / "glove" / "our_vab_data.npy", array)
        message(load)


@pytest.mark.parametrize("edit", [
    lambda state: state["text_encoder"].pop("hidden"),
    lambda state: state["motion_encoder"].update(other=torch.ones(2)),
    lambda state: state["movement_encoder"].update({"out_net.bias": torch.ones(7)}),
    lambda state: state.pop("text_encoder")])
def test_loading_is_strict(tmp_path, edit):
    folder, _ = write_folder(tmp_path / "t2m", 263)
    stored = torch.load(folder / "finest.tar", weights_only=True)
    edit(stored)
    torch.save(stored, folder / "finest.tar")
    assert "finest.tar" in message(evaluator.load_evaluator_folder, folder)


def test_networks_and_statistics_of_two_data_sets_are_refused(tmp_path):
    t2m, kit = write_folder(tmp_path / "t2m", 263)[0], write_folder(tmp_path / "kit", 251)[0]
    (kit / "finest.tar").write_bytes((t2m / "finest.tar").read_bytes())
    assert "reads 263 features, meta/mean.npy has 251" in message(evaluator.load_evaluator_folder, kit)
    np.save(t2m / "meta" / "std.npy", np.ones(251))
    assert "std.npy: has 251 numbers, mean.npy has 263" in message(evaluator.load_evaluator_folder, t2m)
