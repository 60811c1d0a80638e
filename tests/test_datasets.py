"""Folders, text lines, damage, statistics, words, batches and the embedded data's cache."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from common import InputError, datasets as D, features as F
from common.embedded import english, movements
from common.published import check, folder
from tests import reference
from tests.embedded_helpers import words_only

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
mini = pytest.mark.skipif(not DATA.is_dir(), reason="the mini data sets are not here")
LINE = "a person walks.#a/DET person/NOUN walk/VERB#0.0#0.0"


def clip(name="x", frames=40, captions=("a person walks", "someone walks", "walking"), width=263, seed=0):
    values = np.random.default_rng([seed, frames]).normal(size=(frames, width)).astype(np.float32)
    return D.Clip(name, values, list(captions), [["walk/VERB"]] * len(captions), [{}] * len(captions))


def make_folder(root, ids=10, width=251):
    """A sound data set folder with `ids` clips a split (kit width)."""
    for name in ("new_joint_vecs", "texts"):
        (root / name).mkdir(parents=True)
    for k, split in enumerate(D.SPLITS):
        names = [f"{k}{i:04d}" for i in range(ids)]
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            values = np.random.default_rng([k, i]).normal(size=(40, width)).astype(np.float32)
            np.save(root / "new_joint_vecs" / f"{name}.npy", values)
            (root / "texts" / f"{name}.txt").write_text(LINE + "\n")
    np.save(root / "Mean.npy", np.zeros(width, np.float32))
    np.save(root / "Std.npy", np.ones(width, np.float32))
    return root


# ---- text lines --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, expected", [
    (LINE, ("a person walks.", ["a/DET", "person/NOUN", "walk/VERB"], 0, 0)),
    (LINE + "\r\n", ("a person walks.", ["a/DET", "person/NOUN", "walk/VERB"], 0, 0)),
    ("he says \"hi, you\"#he/PRON#nan#NaN", ("he says \"hi, you\"", ["he/PRON"], 0, 0)),
    ("  walks#walk/VERB#0.5#2.75", ("walks", ["walk/VERB"], .5, 2.75)),
    ("walks#walk/VERB#0.0", None), ("walks", None), ("", None), ("###", None), ("#walk/VERB#0.0#0.0", None),
    ("walks#walk/VERB#a#0.0", None), ("walks#walk/VERB#3.0#2.0", None), ("walks#walk/VERB#0.0#inf", None),
    ("walks#walk/VERB#-1.0#2.0", None), ("walks#walk/VERB#1.0#0.0", None),
])
def test_parse_text_line(line, expected):
    assert folder.parse_text_line(line) == expected


def test_unusable_lines_of_a_text_are_counted(tmp_path, capsys):
    root = make_folder(tmp_path / "kit")
    (root / "texts" / "00003.txt").write_bytes(
        b"\xef\xbb\xbf" + LINE.encode() +
        b"\r\n\r\nbroken\r\ngr\xc3\xbc\xc3\x9fe#x/X#0#0\n\xffx#x/X#0#0")
    data = D.load_folder(root)
    assert data.splits["train"][3].captions == ["a person walks.", "gr\u00fc\u00dfe", "\ufffdx"]
    assert capsys.readouterr().out == (
        "kit: not used: bad_text_line 1 (00003): texts/00003.txt 'broken', wanted "
        "caption#lemma/POS lemma/POS ...#0.0#0.0 with a word in the caption\n")


# ---- folders -----------------------------------------------------------------------------------------------

@mini
def test_mini_sizes_by_the_official_rules(capsys):
    source = D.load_folder(DATA / "mini_humanml3d")
    assert [len(source.splits[split]) for split in D.SPLITS] == [267, 40, 77]
    assert source.skeleton is F.T2M and capsys.readouterr().out == ""
    assert source.label == "folder mini_humanml3d (HumanML3D layout)"
    segment = next(c for c in source.splits["train"] if c.name.startswith("000011@"))
    whole = next(c for c in source.splits["train"] if c.name == "000011")
    assert segment.name == "000011@0-44" and segment.captions == ["a person walks forward."]
    assert np.array_equal(segment.features, whole.features[:44]) and len(whole.captions) == 3
    target = D.load_folder(DATA / "mini_kit")
    assert [len(target.splits[split]) for split in D.SPLITS] == [282, 36, 76] and target.skeleton is F.KIT


@mini
def test_to_t2m_gives_usable_clips_of_the_other_space():
    target = D.load_folder(DATA / "mini_kit")
    target.splits = {split: clips[:15] for split, clips in target.splits.items()}
    converted = D.converted(target, "t2m")
    assert converted.skeleton is F.T2M and converted.fingerprint != target.fingerprint
    for old, new in zip(target.splits["train"], converted.splits["train"]):
        assert (old.name, old.captions, old.attributes) == (new.name, new.captions, new.attributes)
        frames = int((len(old.features) - 1) * 1.6) // 4 * 4            # n joints at 20 fps make n - 1 rows
        assert new.features.shape == (frames, 263) and np.isfinite(new.features).all()
        step = np.diff(F.features_to_joints(new.features, F.T2M)[:, 0, [0, 2]], axis=0)
        assert .8 < np.median(new.features[:, 3]) < 1.1                  # metres
        assert np.linalg.norm(step, axis=-1).max() * 20 < 6              # metres a second


BREAKAGES = {
    "missing_motion": lambda motion, text: motion.unlink(),
    "missing_text": lambda motion, text: text.unlink(),
    "bad_shape": lambda motion, text: np.save(motion, np.zeros((40, 250), np.float32)),
    "non_finite": lambda motion, text: np.save(motion, np.full((40, 251), np.nan, np.float32)),
    "too_short": lambda motion, text: np.save(motion, np.zeros((23, 251), np.float32)),
    "too_long": lambda motion, text: np.save(motion, np.zeros((200, 251), np.float32)),
    "no_caption": lambda motion, text: text.write_text("a caption file without the sign\n"),
    "bad_text_line": lambda motion, text: text.write_text(LINE + "\nbroken#line\n"),
}


def break_clip(root, name, reason):
    BREAKAGES[reason](root / "new_joint_vecs" / f"{name}.npy", root / "texts" / f"{name}.txt")


def test_eight_kinds_of_broken_files_are_counted(tmp_path, capsys, monkeypatch):
    root = make_folder(tmp_path / "kit", ids=11)
    for i, reason in enumerate(BREAKAGES):
        break_clip(root, f"0{i:04d}", reason)
    with pytest.raises(InputError, match="more than 1 %.*missing_motion 1 \\(00000\\)"):
        D.load_folder(root)
    monkeypatch.setattr(folder, "MAX_LOSS", 1.0)
    data = D.load_folder(root)
    expected = {reason: f"1 (0{i:04d})" for i, reason in enumerate(BREAKAGES)}
    expected["bad_text_line"] = "2 (00006, 00007)"                      # the file without '#' is both
    said = "; ".join(f"{reason} {names}" for reason, names in sorted(expected.items()))
    printed = re.sub(r"\): .*?(?=; |\n)", ")", capsys.readouterr().out)
    assert printed == f"kit: not used: {said}\n"
    assert [c.name for c in data.splits["train"]] == ["00007", "00008", "00009", "00010"]


@pytest.mark.parametrize("content, found", [
    (b"", "is no .npy file"), (b"\x93NUMPY\x01\x00", "is a damaged .npy file"),
    (b"<!DOCTYPE html>", "is no .npy file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a",
     "is a Git LFS pointer: run git lfs pull in its repository")])
def test_unreadable_motion_files_are_bad_shapes(tmp_path, content, found, monkeypatch, capsys):
    root = make_folder(tmp_path / "kit")
    (root / "new_joint_vecs" / "00003.npy").write_bytes(content)
    monkeypatch.setattr(folder, "MAX_LOSS", .1)
    D.load_folder(root)
    path = "new_joint_vecs/00003.npy"
    assert capsys.readouterr().out == f"kit: not used: bad_shape 1 (00003): {path} {found}\n"


@pytest.mark.parametrize("array, found", [
    (np.zeros((40, 22, 3), np.float32), "shape (40, 22, 3), wanted (24 frames or more, 251): these are "),
    (np.zeros((1, 40, 251), np.float32), "(1, 40, 251), wanted (24 frames or more, 251): take its first "),
    (np.zeros((40, 263), np.float32), "features of HumanML3D, Mean.npy and Std.npy are of KIT-ML"),
    (np.zeros((251, 40), np.float32), "shape (251, 40), wanted (24 frames or more, 251): transpose it"),
    (np.zeros((40, 251), np.int64), "numbers of type int64, wanted float32"),
    (np.zeros(251, np.float32), "shape (251,), wanted (24 frames or more, 251)")])
def test_a_bad_shape_says_found_and_wanted(tmp_path, array, found):
    root = make_folder(tmp_path / "kit")
    np.save(root / "new_joint_vecs" / "00003.npy", array)
    for read in (D.load_folder, lambda path: check.main([str(path)])):
        with pytest.raises(InputError, match=r"bad_shape 1 \(00003\): new_joint_vecs/00003.npy has .*"
                           + re.escape(found)):
            read(root)


def large(motion):
    """Finite in float64 alone."""
    motion = motion.astype(np.float64)
    motion[7, 9] = 1e39
    return motion


@pytest.mark.parametrize("width", [251, 263])
@pytest.mark.parametrize("change, said", [
    (np.zeros_like, "no_motion 1 (00003): new_joint_vecs/00003.npy is all zero;"),
    (lambda motion: np.where(np.arange(40)[:, None] == 5, 0, motion).astype(np.float32),
     "no_motion 1 (00003): new_joint_vecs/00003.npy is all zero in frame 5;"),
    (lambda motion: motion[:1].repeat(40, 0), "new_joint_vecs/00003.npy holds one pose in all frames;"),
    (lambda motion: np.where(np.arange(motion.shape[1]) < 100, 0, motion).astype(np.float32),
     "no_body 1 (00003): new_joint_vecs/00003.npy: the bone to joint 1 has no length in frame 0;"),
    (large, "non_finite 1 (00003): new_joint_vecs/00003.npy is not finite in float32 in frame 7;")])
def test_a_clip_that_shows_nothing_is_damaged_in_both_layouts(tmp_path, width, change, said):
    root = make_folder(tmp_path / "data", width=width)
    path = root / "new_joint_vecs" / "00003.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(InputError, match=r"1 of 10 clips of train are damaged.*" + re.escape(said)):
        D.load_folder(root)
    with pytest.raises(InputError, match="damaged: train: .*" + re.escape(said[:-1])):
        check.main([str(root)])


@pytest.mark.parametrize("caption", ["...", "?!", "__", "\U0001f600", " \u2014 "])
def test_a_caption_without_a_word_is_no_caption(tmp_path, capsys, caption):
    line = f"{caption}#x/X#0.0#0.0"
    assert folder.parse_text_line(line) is None
    root = make_folder(tmp_path / "kit")
    text = root / "texts" / "00003.txt"
    text.write_text(f"{LINE}\n{line}\n", encoding="utf-8")
    assert D.load_folder(root).splits["train"][3].captions == ["a person walks."]
    assert "bad_text_line 1 (00003): texts/00003.txt " in capsys.readouterr().out
    text.write_text(f"{line}\n", encoding="utf-8")
    for read in (D.load_folder, lambda path: check.main([str(path)])):
        with pytest.raises(InputError, match=r"no_caption 1 \(00003\): texts/00003.txt '.*, wanted caption#"):
            read(root)


def test_captions_without_the_sign_say_the_format(tmp_path):
    root = make_folder(tmp_path / "kit")
    for path in (root / "texts").iterdir():
        path.write_text("a person walks\n")
    with pytest.raises(InputError, match="10 of 10 clips .* no_caption 10 .*texts/00000.txt 'a person "
                       "walks', wanted caption#lemma/POS lemma/POS ...#0.0#0.0"):
        D.load_folder(root)


def test_pointers_and_objects_in_place_of_statistics_and_lists(tmp_path):
    root = make_folder(tmp_path / "kit")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"
    (root / "Std.npy").write_text(pointer)
    with pytest.raises(InputError, match="Std.npy is a Git LFS pointer"):
        D.load_folder(root)
    for wrong, name in ((np.full(251, 1e39), "Std.npy"), (np.full(251, "x"), "Std.npy"),
                        (np.full(251, -1.0), "Std.npy: holds a negative")):
        np.save(root / "Std.npy", wrong)
        with pytest.raises(InputError, match=name):
            D.load_folder(root)
    np.save(root / "Std.npy", np.ones(251))
    (root / "val.txt").write_text(pointer)
    with pytest.raises(InputError, match="val.txt is a Git LFS pointer"):
        D.load_folder(root)
    (root / "val.txt").write_text((root / "train.txt").read_text())
    (root / "texts" / "00002.txt").write_text(pointer)
    with pytest.raises(InputError, match="texts/00002.txt is a Git LFS pointer"):
        D.load_folder(root)


def test_statistics_of_the_train_split_alone_are_sound(tmp_path):
    root = make_folder(tmp_path / "kit")
    for path in (root / "new_joint_vecs").glob("[12]*.npy"):
        np.save(path, np.load(path) + np.float32(5))
    rows = np.concatenate([np.load(path) for path in sorted((root / "new_joint_vecs").glob("0*.npy"))])
    np.save(root / "Mean.npy", rows.mean(0))
    np.save(root / "Std.npy", rows.std(0))
    assert check.check_folder(root) == []
    np.save(root / "Mean.npy", rows.mean(0) + 1)
    assert [line[:18] for line in check.check_folder(root)] == ["Mean.npy: feature "]


def test_pickled_motion_is_refused_and_not_executed(tmp_path, monkeypatch, capsys):
    root, marker = make_folder(tmp_path / "kit"), tmp_path / "marker"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)

    np.save(root / "new_joint_vecs" / "00003.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    monkeypatch.setattr(folder, "MAX_LOSS", .1)
    D.load_folder(root)
    assert "00003.npy holds Python objects: store plain" in capsys.readouterr().out and not marker.exists()


def test_one_percent_is_the_limit(tmp_path, capsys):
    root = make_folder(tmp_path / "kit", ids=100)
    break_clip(root, "00000", "non_finite")
    D.load_folder(root)
    assert capsys.readouterr().out == (
        "kit: not used: non_finite 1 (00000): new_joint_vecs/00000.npy is not finite in frame 0\n")
    break_clip(root, "00001", "missing_text")
    with pytest.raises(InputError, match="2 of 100 clips of train"):
        D.load_folder(root)


def test_incomplete_folders_list_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        D.load_folder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="train.txt, val.txt, test.txt, Mean.npy, Std.npy, new_joint_vecs"):
        D.load_folder(tmp_path / "empty")
    root = make_folder(tmp_path / "kit")
    (root / "val.txt").write_text("")
    with pytest.raises(InputError, match="val.txt leaves no clip"):
        D.load_folder(root)
    for split, ids in (("val", 1), ("test", 1), ("train", 3)):
        small = make_folder(tmp_path / f"small_{split}")
        kept = (small / f"{split}.txt").read_text().splitlines()[:ids]
        (small / f"{split}.txt").write_text("\n".join(kept))
        with pytest.raises(InputError, match=rf"{split}.txt leaves {ids} clip\(s\) of at least {ids + 1} "):
            D.load_folder(small)
    (root / "val.txt").write_text("../../secret\n")
    with pytest.raises(InputError, match="not an id"):
        D.load_folder(root)
    np.save(root / "Mean.npy", np.zeros(250))
    with pytest.raises(InputError, match="expected .263,"):
        D.load_folder(root)


def test_check_command(tmp_path, capsys):
    root = make_folder(tmp_path / "kit")
    check.main([str(root)])
    assert "sound" in capsys.readouterr().out
    break_clip(root, "00004", "non_finite")
    with pytest.raises(InputError, match="train: non_finite 1"):
        check.main([str(root)])
    (root / "test.txt").write_text("M00005\n")  # the mirror image of a training clip
    with pytest.raises(InputError, match="in train and in test"):
        check.main([str(root)])
    np.save(root / "Std.npy", np.full(251, 25.0))
    with pytest.raises(InputError, match="Std.npy"):
        check.main([str(root)])


@mini
@pytest.mark.parametrize("name", ["mini_humanml3d", "mini_kit"])
def test_check_accepts_the_mini_sets(name):
    assert check.check_folder(DATA / name) == []


# ---- names, paths and the embedded data --------------------------------------------------------------------

def test_a_path_never_falls_back_and_a_name_does(tmp_path, capsys, monkeypatch):
    with pytest.raises(InputError, match="no such folder"):
        D.load_dataset(str(tmp_path / "KIT"), cache_dir=tmp_path)
    with pytest.raises(InputError, match="--data-root"):
        D.load_dataset("kit", data_root=tmp_path, cache_dir=tmp_path)
    monkeypatch.chdir(tmp_path)
    data = D.load_dataset("kit", cache_dir=tmp_path / "cache", clips=60)
    assert data.label == "embedded kit" and "EMBEDDED" in capsys.readouterr().out
    (tmp_path / "data" / "KIT-ML").mkdir(parents=True)  # there, but damaged: an error, not embedded data
    with pytest.raises(InputError, match="missing"):
        D.load_dataset("kit", cache_dir=tmp_path / "cache", clips=60)


@pytest.mark.parametrize("name, meant", [("t2m", "humanml3d"), ("KIT", "kit"), ("HumanML3D", "humanml3d"),
                                         ("aist", "")])
def test_an_unknown_name_is_told_the_names_and_the_folder(elsewhere, name, meant):
    for load in (D.load_dataset, lambda given, **o: D.load_pair("", given, clips=(60, 60), **o),
                 lambda given, **o: D.load_pair("", given, clips=(60, 60), left_out="kick", **o)):
        with pytest.raises(InputError, match=f"^(--dataset )?{name}: no data set of this name and no such "
                           "folder; --dataset .*take kit, humanml3d or the path of a folder .* such as "
                           "data/KIT-ML" + (rf"; did you mean {meant}\?$" if meant else "$")):
            load(name, cache_dir="cache")


def test_a_clip_that_cannot_be_converted_has_a_name():
    broken = clip("00007", width=251)
    broken.features[:, 4:64] = 0
    whole = D.Dataset("folder kit", F.KIT, {"train": [broken], "val": [], "test": []}, "x")
    with np.errstate(all="ignore"), pytest.raises(InputError, match="folder kit: clip 00007 has no body"):
        D.converted(whole, "t2m")


def test_embedded_data_cached_rebuilt_and_native(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load = lambda **extra: D.load_dataset("kit", cache_dir=tmp_path / "cache", clips=60, **extra)
    first = load()
    stored, = (tmp_path / "cache").glob("*.pt")
    for part in first.splits.values():
        assert part and all(len(c.features) % 4 == 0 and 4 <= len(c.features) <= 196 for c in part)
        assert all(len(c.captions) == len(c.tokens) == len(c.attributes) for c in part)
    with monkeypatch.context() as patch:
        patch.setattr(movements, "build", None)                          # a second load does not build
        assert load().fingerprint == first.fingerprint
    stored.write_bytes(stored.read_bytes()[:-2000])
    assert load().fingerprint == first.fingerprint and "damaged" in capsys.readouterr().out
    assert load(seed=1).fingerprint != first.fingerprint
    native = load(space="native")
    assert native.skeleton is F.KIT and native.splits["train"][0].features.shape[1] == 251
    assert native.splits["train"][0].captions == first.splits["train"][0].captions


def test_a_comment_builds_nothing_anew_and_another_movement_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load = lambda: D.load_dataset("kit", cache_dir=tmp_path / "cache", clips=60)
    load()
    source, built = inspect.getsource, []
    monkeypatch.setattr(movements, "build", lambda *args, build=movements.build, **options: (
        built.append(options), build(*args, **options))[1])
    commented = lambda part: "# why\n" + source(part).replace('"""', '"""A ', 1)
    monkeypatch.setattr(inspect, "getsource", commented)
    load()
    assert not built
    monkeypatch.setattr(inspect, "getsource", lambda part: source(part) + "FASTER = 2\n")
    load()
    assert len(built) == 1


# ---- statistics --------------------------------------------------------------------------------------------

def test_statistics_closed_form_block_average_and_bias():
    clips = [clip(frames=n, seed=n) for n in (40, 52)]
    rows = np.concatenate([c.features for c in clips]).astype(np.float64)
    std = rows.std(0)
    plain = D.Statistics.from_clips(clips, "scorer", blocks={})
    assert np.allclose(plain.mean, rows.mean(0), atol=1e-6) and np.allclose(plain.std, std, atol=1e-6)
    biased = D.Statistics.from_clips(clips, "scorer", feat_bias=25)
    assert np.allclose(biased.std[4:67], std[4:67].mean()) and np.allclose(biased.std[0], std[0] / 25)
    assert np.allclose(biased.std[259:], std[259:].mean() / 25)
    constant = [D.Clip("c", np.ones((40, 263), np.float32), ["x"], [[]], [{}])]
    assert torch.equal(D.Statistics.from_clips(constant, "scorer").std, torch.full((263,), 1e-6))


def test_the_two_roles_cannot_be_swapped():
    generator = D.Statistics.from_clips([clip()], "generator")
    assert generator.require("generator") is generator
    with pytest.raises(ValueError, match="of a generator were handed to a scorer"):
        generator.require("scorer")


@mini
def test_statistics_of_the_mini_set_equal_its_files():
    source = D.load_folder(DATA / "mini_humanml3d")
    every = [c for part in source.splits.values() for c in part if "@" not in c.name]
    own = D.Statistics.from_clips(every, "generator")
    assert np.allclose(own.mean, np.load(DATA / "mini_humanml3d" / "Mean.npy"), atol=1e-4)
    assert np.allclose(own.std, np.load(DATA / "mini_humanml3d" / "Std.npy"), rtol=1e-4)


# ---- words -------------------------------------------------------------------------------------------------

def test_vocabulary_numbers_words():
    vocabulary = D.Vocabulary.from_captions(["A person walks.", "he's walking, twice"])
    assert vocabulary.words == ["a", "he's", "person", "twice", "walking", "walks"] and len(vocabulary) == 8
    ids, mask = vocabulary.encode(["a person jumps", "WALKS!"])
    assert ids.tolist() == [[2, 4, 1], [7, 0, 0]] and ids.dtype == torch.int64
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert vocabulary.encode(["a a a a"], max_words=2)[0].tolist() == [[2, 2]]
    # no word at all reads as an unknown one: attention needs something to look at
    ids, mask = vocabulary.encode(["", "...", "a person"])
    assert ids.tolist() == [[1, 0], [1, 0], [2, 4]] and mask.tolist() == [[True, False]] * 2 + [[True, True]]


def test_words_survive_anything():
    french = D.words("Il va \u00e0 \u201cgauche\u201d \U0001f600\u2014vite_fait\n")
    assert french == ["il", "va", "\u00e0", "gauche", "vite", "fait"]
    assert D.words("he\u2019s") == ["he's"]
    assert len(D.words("w " * 5000)) == 5000 and D.words("x" * 10000) == ["x" * 10000]


# ---- batches -----------------------------------------------------------------------------------------------

def test_collate_pads_with_zeros():
    clips = [clip("a", 43), clip("b", 60)]
    batch, official = D.collate(clips), reference.official_collate(clips)
    assert batch.motion.shape == (2, 60, 263) and batch.lengths.tolist() == [40, 60]
    assert batch.lengths.dtype == torch.int64 and batch.motion[0, 40:].abs().sum() == 0
    assert torch.equal(batch.motion[0, :40], torch.from_numpy(clips[0].features[:40]))
    assert batch.captions == ["a person walks", "a person walks"] == official.captions
    assert torch.equal(batch.motion, official.motion) and torch.equal(batch.lengths, official.lengths)


def test_official_collate_pads_with_zeros_and_picks_captions():
    clips = [clip("a", 43), clip("b", 60)]
    batch = reference.official_collate(clips, [1, 5])
    assert batch.motion.shape == (2, 60, 263) and batch.lengths.tolist() == [40, 60]
    assert batch.mask.sum(1).tolist() == [40, 60] and batch.motion[0, 40:].abs().sum() == 0
    assert torch.equal(batch.motion[0, :40], torch.from_numpy(clips[0].features[:40]))
    assert batch.captions == ["someone walks", "walking"] and batch.names == ["a", "b"]
    assert reference.official_collate(clips, max_length=50).lengths.tolist() == [40, 48]
    draw = lambda seed: reference.official_collate(
        clips * 20, generator=torch.Generator().manual_seed(seed)).captions
    assert draw(0) == draw(0) != draw(1) and set(draw(0)) == set(clips[0].captions)


def test_deterministic_mode_repeats_itself():
    clips = [clip(str(i), 40 + i) for i in range(10)]
    first, second = (list(reference.batches(clips, batch=4)) for _ in range(2))
    assert [len(b.names) for b in first] == [4, 4, 2] and first[0].motion.shape == (4, 196, 263)
    assert all(torch.equal(a.motion, b.motion) and a.captions == b.captions for a, b in zip(first, second))
    assert first[0].captions == ["a person walks"] * 4 and first[1].lengths.tolist() == [44, 44, 44, 44]
    with pytest.raises(InputError, match="mode"):
        next(reference.batches(clips, mode="random"))


def test_official_mode_follows_the_published_rules():
    clips = [clip(str(i), 43) for i in range(330)]
    for c in clips:
        c.features[:, 0] = np.arange(43)                                  # shows where a crop starts
    passes = [list(reference.batches(clips, mode="official", seed=3, epoch=e)) for e in (0, 0, 1)]
    assert len(passes[0]) == 10                                           # the last, small batch is dropped
    gather = lambda batches: {n: (int(b.lengths[i]), float(b.motion[i, 0, 0]), b.captions[i])
                              for b in batches for i, n in enumerate(b.names)}
    one, again, other = map(gather, passes)
    assert one == again and one != other
    lengths = [length for length, _, _ in one.values()]
    assert set(lengths) == {36, 40} and .27 < np.mean(np.array(lengths) == 36) < .40        # a third
    assert {start for length, start, _ in one.values() if length == 40} == {0, 1, 2, 3}
    assert {start for length, start, _ in one.values() if length == 36} == set(range(8))
    assert {caption for _, _, caption in one.values()} == set(clips[0].captions)
    # what is drawn for a clip depends on seed, epoch and index only
    small = gather(reference.batches(clips, mode="official", seed=3, epoch=0, batch=5))
    assert all(small[name] == drawn for name, drawn in one.items())


def test_half_keeps_relatives_together():
    clips = [clip(name) for name in ("000001", "000001@0-44", "M000001", "000002", "000003", "M000003")]
    assert [c.name for c in D.half(clips, 0)] == ["000001", "000001@0-44", "M000001", "000003", "M000003"]
    assert [c.name for c in D.half(clips, 1)] == ["000002"]


# ---- leaving an action out ---------------------------------------------------------------------------------

@pytest.mark.parametrize("caption, action, found", [
    ("a man kicks", "kick", True), ("KICKING twice.", "kick", True), ("a kickboxer", "kick", False),
    ("he is waving", "wave", True), ("someone greets with a hand", "wave", True),
    ("a wavy way", "wave", False),
    ("running", "run", True), ("he ran away", "run", True), ("a jogger", "run", True),
    ("grunt", "run", False),
    ("bowing", "bow", True), ("plays bowling", "bow", False), ("two bows", "bow", True),
    ("clapping", "clap", True), ("leaped", "jump", True), ("hops on one leg", "jump", True),
    ("holds both hands up", "raise", True), ("holds both arms out", "raise", False),
    ("walks with high knees", "march", True), ("axb", "a.b", False), ("dances", "dance", True),
    # irregular forms, and past tenses wrongly made regular
    ("he stood still", "stand", True), ("with bent knees", "bend", True), ("she knelt down", "kneel", True),
    ("kneeled", "kneel", True), ("swung both arms", "swing", True), ("has thrown a ball", "throw", True),
    ("throwed it", "throw", True), ("was shaken", "shake", True), ("leapt", "jump", True),
    ("spun around", "turn", True), ("sat", "sit", True), ("swam", "swim", True), ("slept", "sleep", True),
    ("mimicking", "mimic", True), ("holds", "hold", True), ("held it up", "raise", True),
    ("lay", "lie", True),
    ("travelling", "travel", True), ("traveled", "travel", True), ("rode a bike", "ride", True),
    # whole words only
    ("a range of motion", "run", False), ("hopes for luck", "jump", False), ("hoping", "hop", False),
    ("bends the spine", "turn", False), ("walks on a line", "lie", False), ("a standard", "stand", False),
    ("the bowl", "bow", False), ("holds the right upper leg", "raise", False),
    # the action in any form, in upper case, misspelt, and of several words
    ("kicks", "kicking", True), ("he kneels", "Knelt", True), ("spining", "spin", True),
    ("picked the ball up", "pick up", True), ("picks a flower", "pick up", False),
    ("does jumping jacks", "jumping jack", True), ("walks", " ", False), ("walks", "...", False)])
def test_mentions(caption, action, found):
    assert english.mentions(caption, action) is found


def three_splits(*names_and_captions):
    splits = {split: [clip(f"{k}{name}", captions=captions) for name, captions in names_and_captions]
              for k, split in enumerate(D.SPLITS)}
    for clips in splits.values():
        for c in clips:
            c.name = c.name if "M" not in c.name else "M" + c.name.replace("M", "")
    return D.Dataset("toy", F.T2M, splits, "x")


def test_leave_out_takes_the_recording_and_keeps_the_captions_that_speak_of_it():
    toy = three_splits(("a", ["he kicks", "he moves"]), ("Ma", ["a man moves", "moves"]), ("b", ["he walks"]),
                       ("b@1", ["he runs"]), ("c@1", ["a kick"]), ("c@2", ["she waits"]), ("d", ["she sits"]))
    rest, left = D.leave_out(toy, "kick")
    for k, split in enumerate(D.SPLITS):
        assert [c.name for c in rest.splits[split]] == [f"{k}b", f"{k}b@1", f"{k}d"]
        assert [(c.name, c.captions) for c in left.splits[split]] == [(f"{k}a", ["he kicks"]),
                                                                      (f"{k}c@1", ["a kick"])]
        assert all(len(c.captions) == len(c.tokens) == len(c.attributes) for c in left.splits[split])
    assert [c.captions for c in toy.splits["val"]][0] == ["he kicks", "he moves"], "the whole stays as it was"
    assert (rest.label, left.label) == ("toy without kick", "toy with kick")
    assert len({toy.fingerprint, rest.fingerprint, left.fingerprint}) == 3
    with pytest.raises(InputError, match="leaving out 'dance': 0 train clips of toy mention it, 7 do not"):
        D.leave_out(toy, "dance")


def test_leave_out_takes_irregular_forms_and_leaves_other_words():
    toy = three_splits(("a", ["he stood up"]), ("b", ["is standing"]), ("c", ["a standard walk"]),
                       ("d", ["an outstanding jump"]))
    rest, left = D.leave_out(toy, "stand")
    for k, split in enumerate(D.SPLITS):
        assert [c.name for c in rest.splits[split]] == [f"{k}c", f"{k}d"]
        assert [c.name for c in left.splits[split]] == [f"{k}a", f"{k}b"]


@pytest.mark.parametrize("domain", ("kit", "humanml3d"))
def test_nothing_of_an_action_stays_behind(domain):
    """Of the embedded data it is known what each clip shows: no synonym, mirror image or sequence leaks."""
    splits, shows = {split: [] for split in D.SPLITS}, {}
    for made in words_only(domain, F.T2M):
        shows[made.name] = {"run" if action == "jog_back" else action for action in made.actions}
        nothing = np.zeros((4, 263), np.float32)
        splits[made.split].append(D.Clip(made.name, nothing, made.captions, made.tokens, made.attributes))
    whole = D.Dataset("whole", F.T2M, splits, "x")
    for action in ("kick", "wave", "punch", "run", "clap", "bow", "march", "raise"):
        rest, left = D.leave_out(whole, action)
        stay, go = ({c.name for clips in part.splits.values() for c in clips} for part in (rest, left))
        assert not stay & go and stay | go <= set(shows)
        assert all(action not in shows[name] for name in stay)
        clear = {name for name in go if action in shows[name]}
        assert len(clear) > 0.9 * len(go), "little else is taken"
        told = [c for clips in left.splits.values() for x in clips for c in x.captions]
        assert all(english.mentions(caption, action) for caption in told)


def test_load_pair_divides_one_data_set(tmp_path):
    rest, left = D.load_pair("", "kit", clips=(160, 400), left_out="punch", cache_dir=tmp_path)
    assert rest.label == "embedded kit without punch" and left.label == "embedded kit with punch"
    assert sum(len(clips) for part in (rest, left) for clips in part.splits.values()) <= 400
    with pytest.raises(InputError, match="leaving out 'punch' divides one data set in two"):
        D.load_pair("humanml3d", "kit", clips=(160, 400), left_out="punch", cache_dir=tmp_path)
