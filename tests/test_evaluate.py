"""common/evaluate.py: hand-made numbers, and tiny scorers with random weights."""
import math
import types

import numpy as np
import pytest
import torch

from common import (InputError, NonFiniteError, evaluate, features, freeze, generator, length_mask,
                    metrics, retrieval)
from common.datasets import Clip, Statistics, Vocabulary, collate

PAIRED = ("reward", "judge", "oracle", "oracle_all", "foot_skate", "jerk", "speed")


def make_clips(count=6):
    """Clips of noise, 12 to 24 frames; clip k has two captions and nothing that the oracle could check."""
    clips = []
    for k in range(count):
        motion = np.random.default_rng([k, 3]).normal(size=(12 + 4 * (k % 4), 263)).astype(np.float32)
        captions = [f"a person walks to chair {k}", f"somebody waves {k} times"]
        clips.append(Clip(f"toy-{k}", motion, captions, [[], []], [{}, {}]))
    return clips


@pytest.fixture(scope="module")
def clips():
    return make_clips()


@pytest.fixture(scope="module")
def scorers(clips):
    vocabulary = Vocabulary.from_captions([caption for clip in clips for caption in clip.captions])
    statistics = Statistics.from_clips(clips, "scorer")
    models = [retrieval.RetrievalModel(family, vocabulary, statistics, width=16, components=8, seed=seed)
              for seed, family in enumerate(("transformer", "bigru"))]
    optimised, judge = map(freeze, models)
    return evaluate.Scorers(optimised.similarity, judge, features.T2M)


class Sampler:
    """Noise that depends on the arguments alone, as a policy's motions do; notes what it was asked for."""

    def __init__(self, name):
        self.name, self.calls = name, []

    def __call__(self, captions, lengths, purpose, repeat):
        self.calls.append((captions, lengths.tolist(), purpose, repeat))
        g = generator(0, repeat, f"{self.name} {purpose}")
        return torch.randn(len(captions), int(lengths.max()), 263, generator=g), lengths


def copy_of(clips):
    """A sampler that hands back the data."""
    return lambda captions, lengths, purpose, repeat: (collate(clips).motion, lengths)


def longer(sampler):
    """The same motions with four frames more: a sampler that chooses its own lengths."""
    def own(captions, lengths, purpose, repeat):
        return sampler(captions, lengths + 4, purpose, repeat)
    return own


# ---- Numbers -----------------------------------------------------------------------------------------------

def test_mean_leaves_out_what_is_not_there():
    assert evaluate.finite_mean([1.0, math.nan, 3.0]) == 2.0
    assert evaluate.finite_mean(np.array([math.inf, 5.0, -math.inf])) == 5.0
    assert math.isnan(evaluate.finite_mean([math.nan, math.nan]))


def test_paired_gain():
    after = {"_prompts": {"reward": np.array([3.0, 7.0, 4.0, 9.0]), "oracle": np.array([1.0, math.nan])}}
    before = {"_prompts": {"reward": np.array([2.0, 4.0, math.nan, 4.0]), "oracle": np.array([0.0, 1.0])}}
    # differences 1, 3, 5: mean 3, sample variance (4 + 0 + 4) / 2, so the half width is t * 2 / sqrt(3)
    after["_asked"] = before["_asked"] = ["turn", "walk", "wave", "kick"]
    t = metrics.student(2)
    assert evaluate.paired_gain(after, before) == {"reward": [3.0, pytest.approx(2 * t / math.sqrt(3))]}
    assert evaluate.paired_gain(before, after)["reward"][0] == -3.0


def test_what_is_not_read_of_a_prompt_is_said():
    known = {"a", "man", "walks"}
    assert evaluate.unread("A man walks!", known) == ""
    assert evaluate.unread("a man zigzags, man zigzags wildly", known) == "unknown words zigzags, wildly"
    said = evaluate.unread("man " * 32 + "walks backward", known)
    assert said == "the words after number 32, from 'walks' on"
    assert evaluate.unread("\u4e00", known) == "unknown words \u4e00"


def test_the_gate_is_around_the_data():
    """Speed within a fifth, jerk and skate up to twice as much, a centimetre of floor, a quarter bone."""
    data = {"speed": 1.0, "jerk": 50.0, "foot_skate": 0.1, "floor_penetration": 0.0, "bone_variation": 0.0}
    ends = {"speed": (0.8, 1.2), "jerk": (0.0, 100.0), "foot_skate": (0.0, 0.2),
            "floor_penetration": (0.0, 1.0), "bone_variation": (0.0, 0.25)}
    fits = {name: [value, 0.1] for name, value in data.items()}
    assert evaluate.gate(fits, data) == []
    for name, (low, high) in ends.items():
        assert evaluate.gate(fits | {name: [low, 0.0]}, data) == []
        assert evaluate.gate(fits | {name: [high, 0.0]}, data) == []
        for outside in (low - 0.01, high + 0.01, math.nan):
            broken, = evaluate.gate(fits | {name: [outside, 0.0]}, data)
            assert broken == f"{name} {outside:.2f}, not {low:.2f} to {high:.2f}"


def test_physics_of_clips_are_the_means_of_their_metrics(clips):
    known = evaluate.physics(clips, features.T2M)
    each = [features.physical_metrics(joints, features.T2M) for joints in evaluate.to_joints(
        *collate(clips)[:2], features.T2M)]
    assert known == {name: pytest.approx(np.mean([one[name] for one in each])) for name in each[0]}


def test_rows_average_motions_then_repeats_and_keep_the_prompts(clips, scorers, monkeypatch):
    per_motion = iter(([1.0, math.nan, 3.0], [5.0, 6.0, math.nan]))
    whole = iter((4.0, 8.0))

    def measured(motion, lengths, captions, attributes, scorers, real):
        return dict.fromkeys(PAIRED, np.array(next(per_motion))), []

    monkeypatch.setattr(evaluate, "measure", measured)
    monkeypatch.setattr(evaluate, "benchmark", lambda *given, **options: {"fid": next(whole)})
    row = evaluate.evaluate(clips[:3], scorers, Sampler("policy"), repeats=2)
    assert row["reward"] == [3.75, pytest.approx(metrics.student(1) * 1.75)]  # repeats 2 and 5.5
    assert row["fid"] == [6.0, pytest.approx(metrics.student(1) * 2)]
    assert set(row["_prompts"]) == set(PAIRED)
    assert row["_prompts"]["jerk"].tolist() == [3.0, 6.0, 3.0]


def test_measure_is_the_cosine_of_each_motion_with_its_caption(clips, scorers):
    batch = collate(clips)
    dirty = batch.motion + 100.0 * ~length_mask(batch.lengths, batch.motion.shape[1])[..., None]
    each, _ = evaluate.measure(dirty, batch.lengths, batch.captions, [{}] * 6, scorers, clips)
    for name, score in (("reward", scorers.reward), ("judge", scorers.judge.similarity)):
        expected = score(batch.motion, batch.lengths, batch.captions)
        np.testing.assert_allclose(each[name], expected, atol=1e-6)
        assert np.ptp(each[name]) > 1e-3
    assert np.abs(each["reward"] - each["judge"]).max() > 1e-2
    assert np.isnan(each["oracle"]).all() and np.isnan(each["oracle_all"]).all()
    joints = features.features_to_joints(batch.motion[1, :16], features.T2M).numpy()
    assert batch.lengths[1] == 16
    assert each["jerk"][1] == pytest.approx(features.physical_metrics(joints, features.T2M)["jerk"], rel=1e-5)


def test_oracle_columns(clips, scorers, monkeypatch):
    answers = {"both": {"a": True, "b": True}, "one": {"a": True, "b": False}, "none": {"a": False}}
    monkeypatch.setattr(evaluate.oracle, "oracle", lambda joints, skeleton, asked: answers[asked["answer"]])
    batch = collate(clips[:4])
    attributes = [{"answer": "both"}, {"answer": "one"}, {}, {"answer": "none"}]
    each, verdicts = evaluate.measure(batch.motion, batch.lengths, batch.captions, attributes, scorers,
                                      clips[:4])
    np.testing.assert_array_equal(each["oracle"], [1.0, 0.5, math.nan, 0.0])
    np.testing.assert_array_equal(each["oracle_all"], [1.0, 0.0, math.nan, 0.0])
    assert verdicts == [answers["both"], answers["one"], {}, answers["none"]]


def test_verdicts_are_counted_by_what_was_asked():
    checks = {"gait run": [True]}
    verdicts = [{"gait": True, "turn": False}, {}, {"first.gait": False, "then.turn": True}]
    sequence = {"first": {"gait": "run"}, "then": {"turn": "left"}}
    evaluate.tally(checks, verdicts, [{"gait": "walk", "turn": "left"}, {}, sequence])
    assert checks == {"gait run": [True, False], "gait walk": [True], "turn left": [False, True]}


# ---- Samplers ----------------------------------------------------------------------------------------------

def test_evaluate_asks_caption_r_of_every_clip_in_its_own_length(clips, scorers):
    sampler = Sampler("policy")
    row = evaluate.evaluate(clips, scorers, sampler, purpose="look", repeats=3)
    lengths = [12, 16, 20, 24, 12, 16]
    assert sampler.calls == [([clip.captions[r % 2] for clip in clips], lengths, "look", r) for r in range(3)]
    motions = [Sampler("policy")([""] * 6, torch.tensor(lengths), "look", r)[0] for r in range(3)]
    rewards = torch.stack([scorers.reward(m, torch.tensor(lengths), c[0])
                           for m, c in zip(motions, sampler.calls)], 1)
    np.testing.assert_allclose(row["_prompts"]["reward"], rewards.mean(1), atol=1e-6)
    assert row["reward"][0] == pytest.approx(float(rewards.mean()), abs=1e-6)
    half_width = float(metrics.mean_interval(rewards.mean(0))[1])
    assert row["reward"][1] == pytest.approx(half_width, abs=1e-6)
    asked = [clip.attributes[r % 2] for r in range(3) for clip in clips]
    assert sum(count for _, count in row["checks"].values()) == sum(len(a) for a in asked)
    short = evaluate.evaluate(clips, scorers, Sampler("policy"), purpose="look", compare_with_data=False)
    assert "fid" in row and "fid" not in short and math.isnan(short["reward"][1])


@torch.no_grad()
def test_best_of_picks_the_best_for_each_prompt(clips, scorers):
    captions, _, lengths = evaluate.questions(clips, 0)
    inner = Sampler("base")
    best, made = evaluate.best_of(inner, 5, scorers, clips)(captions, lengths, "test", 2)
    assert made is lengths
    assert [call[2:] for call in inner.calls] == [(f"test try {n}", 2) for n in range(5)]
    tries = [Sampler("base")(captions, lengths, f"test try {n}", 2)[0] for n in range(5)]
    scores = torch.stack([scorers.reward(motion, lengths, captions) for motion in tries])
    winners = scores.argmax(0).tolist()
    assert len(set(winners)) > 1
    assert all(torch.equal(best[k], tries[n][k]) for k, n in enumerate(winners))


@torch.no_grad()
def test_best_of_motions_of_different_lengths(clips, scorers):
    """The best try keeps its own length, and is padded to the longest."""
    captions, _, lengths = evaluate.questions(clips, 0)

    def sampler(captions, asked, purpose, repeat):
        made = asked + 4 * int(purpose[-1])
        g = generator(0, repeat, purpose)
        return torch.randn(len(captions), int(made.max()), 263, generator=g), made

    best, made = evaluate.best_of(sampler, 3, scorers, clips)(captions, lengths, "test", 0)
    tries = [sampler(captions, lengths, f"test try {n}", 0) for n in range(3)]
    scores = torch.stack([scorers.reward(motion, own, captions) for motion, own in tries])
    winners = scores.argmax(0).tolist()
    assert len(set(winners)) > 1 and best.shape[1] == 32
    for k, n in enumerate(winners):
        assert made[k] == lengths[k] + 4 * n
        assert torch.equal(best[k, :tries[n][0].shape[1]], tries[n][0][k])


def test_a_sampler_that_chooses_its_lengths_has_a_length_error(clips, scorers):
    row = evaluate.evaluate(clips, scorers, longer(Sampler("policy")), repeats=2)
    assert row["length_error"] == [4.0, 0.0]
    assert "length_error" not in evaluate.evaluate(clips, scorers, Sampler("policy"))


def test_captions_without_motion_have_the_metrics_that_need_none(clips, scorers):
    nothing = np.zeros((0, 263), np.float32)
    empty = [Clip("composed", nothing, ["a person waves"], [[]], [{}]) for _ in range(3)]

    def sampler(captions, lengths, purpose, repeat):
        return Sampler("policy")(captions, torch.full((len(captions),), 16), purpose, repeat)

    row = evaluate.evaluate(empty, scorers, sampler)
    assert "fid" not in row and "length_error" not in row and math.isfinite(row["judge"][0])
    rows = evaluate.compare("toy", empty, scorers, {"base": sampler, "tuned": sampler}, repeats=1)
    assert "gt" not in rows and rows["gain"]["judge"][0] == 0.0


def test_multimodality_is_a_distance_within_prompts(clips, scorers):
    sampler = Sampler("base")
    found = evaluate.variety(clips, scorers, sampler, prompts=3, samples=4)
    value = found["multimodality"]
    asked = [(len(captions), purpose, repeat) for captions, _, purpose, repeat in sampler.calls]
    assert asked == [(3, "multimodality", n) for n in range(4)]
    captions, _, lengths = evaluate.questions(clips[:3], 0)
    motions = [Sampler("base")(captions, lengths, "multimodality", n)[0] for n in range(4)]
    latents = torch.stack([retrieval.embed(scorers.judge, m, lengths)[0] for m in motions])  # g p c
    first, second = metrics.draw_pairs(4, 2, generator(0, 0, "multimodality"))
    distance = float((latents[first] - latents[second]).norm(dim=-1).mean())
    assert distance > 0.1 and value[0] == pytest.approx(distance, abs=1e-6)
    assert found["distinct"][0] == 1.0
    same = evaluate.variety(clips, scorers, copy_of(clips[:3]), prompts=3)
    assert {name: pair[0] for name, pair in same.items()} == {
        "multimodality": 0.0, "distinct": pytest.approx(0.1)}, "one of ten is new"


def test_compare(clips, scorers, capsys):
    base, best = Sampler("base"), Sampler("best")
    samplers = {"base": base, "tuned": copy_of(clips), "best of 2": best}
    rows = evaluate.compare("toy_test", clips, scorers, samplers, repeats=2)
    assert list(rows) == ["gt", "base", "tuned", "best of 2", "gain"]
    assert all("_prompts" not in row for row in rows.values())
    assert [call[2:] for call in base.calls[:2]] == [("toy_test", 0), ("toy_test", 1)]
    assert {call[2] for call in base.calls[2:]} == {"multimodality"}
    assert [call[2:] for call in best.calls] == [("toy_test", 0), ("toy_test", 1)], "asked as others"
    assert {name for name, row in rows.items() if "multimodality" in row} == {"base", "tuned"}
    assert rows["tuned"].pop("multimodality")[0] == 0.0
    assert rows["tuned"].pop("distinct")[0] == pytest.approx(0.1)
    assert rows["tuned"].pop("gate") == []
    # NaN, the oracle's answer where nothing is asked, differs from itself
    text = {name: {k: str(v) for k, v in row.items()} for name, row in rows.items()}
    assert text["tuned"] == text["gt"], "the data against itself"
    assert set(rows["gain"]) - set(evaluate.UNSHOWN) == {"reward", "judge", "foot_skate", "jerk", "speed"}
    for name, (gain, _) in rows["gain"].items():
        assert rows["base"][name][0] + gain == pytest.approx(rows["tuned"][name][0], rel=1e-6, abs=1e-6)
    assert abs(rows["gain"]["judge"][0]) > 0.01 and rows["gain"]["judge"][1] > 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("toy test: 6 clips, 2 repeats")
    assert [line[:10].strip() for line in printed[3:-3]] == list(rows)
    assert printed[-3].startswith("  base: ") and printed[-2] == "  tuned: as plausible as the data"
    assert printed[-1].startswith("  FID of 6 motions is biased upward")


# ---- Several rewards ---------------------------------------------------------------------------------------


def test_further_columns_are_measured_on_the_motions_of_each_row(clips, scorers):
    """They reach rows, gain and the table; clips without a motion have none."""
    seen = []

    def columns(motion, lengths, captions, real):
        seen.append((captions, real))
        return {"text": motion[:, 0, 3]}
    wider = scorers._replace(columns=columns)
    rows = evaluate.compare("toy", clips, wider, {"base": Sampler("base"), "tuned": Sampler("tuned")},
                            repeats=2)
    assert rows["gt"]["text"][0] == pytest.approx(np.mean([clip.features[0, 3] for clip in clips]), rel=1e-5)
    difference = rows["tuned"]["text"][0] - rows["base"]["text"][0]
    assert rows["gain"]["text"][0] == pytest.approx(difference, abs=1e-6) and difference != 0
    assert all(real is clips and len(captions) == 6 for captions, real in seen) and len(seen) == 6


def test_in_chunks():
    calls = []

    def sample(captions, lengths, rows, purpose, repeat):
        calls.append((captions, lengths.tolist(), rows, purpose, repeat))
        return torch.tensor(rows)[:, None, None].expand(-1, int(lengths.max()), 1), torch.tensor(rows) + 10
    asked = torch.tensor([2, 1, 3])
    motion, lengths = evaluate.in_chunks(sample, 2)(["a", "b", "c"], asked, "test", 4)
    assert motion[..., 0].tolist() == [[0, 0, 0], [1, 1, 0], [2, 2, 2]], "zeros behind the shorter chunk"
    assert lengths.tolist() == [10, 11, 12]
    assert calls == [(["a", "b"], [2, 1], [0, 1], "test", 4), (["c"], [3], [2], "test", 4)]
    as_asked = evaluate.in_chunks(lambda *given: (sample(*given)[0], None), 2)
    assert as_asked(["a", "b", "c"], asked, "test", 4)[1] is asked


# ---- Tables ------------------------------------------------------------------------------------------------

def test_print_table(capsys):
    base = {"reward": [0.12345, 0.01], "oracle": [math.nan, 0.0], "floating": [1.0, 1.0]}
    evaluate.print_table("title", {"base": base, "gain": {"jerk": [-3.0, 0.5]}})
    blank, title, header, base, gain = capsys.readouterr().out.splitlines()
    assert (blank, title) == ("", "title")
    assert header.split() == ["reward", "oracle", "jerk"], "columns that some row has"
    assert base == "base      " + f"{'0.123 +-0.010':>17s}" + 2 * f"{'-':>17s}"
    assert gain == "gain      " + 2 * f"{'-':>17s}" + f"{'-3.000 +-0.500':>17s}"


def test_more_references_are_rows_of_the_test_table(clips, scorers, monkeypatch):
    asked = []

    def compare(title, clips, scorers, rows, *, repeats):
        asked.append((title, list(rows), rows.get("copy")))
        return {}
    monkeypatch.setattr(evaluate, "compare", compare)
    source, target = (types.SimpleNamespace(splits={s: clips[:k] for s in ("val", "test")}) for k in (3, 4))
    evaluate.final_tables(source, target, scorers, Sampler("base"), Sampler("tuned"), 1, 2, {"copy": len})
    assert [(title, rows) for title, rows, _ in asked] == [
        ("target_val", ["base", "tuned"]), ("target_test", ["base", "tuned", "best of 2", "copy"]),
        ("source_test", ["base", "tuned"])]
    assert asked[1][2] == 4, "it is told the clips"




def test_columns_stand_in_one_order():
    """What every script has first, then its own in their order, then distances and physics."""
    rows = [{"jerk": 0, "second": 0, "judge": 0}, {"fid": 0, "own": 0, "floating": 0, "reward": 0}]
    assert evaluate.columns_of(rows) == ["reward", "judge", "second", "own", "fid", "jerk"]


# ---- The reward --------------------------------------------------------------------------------------------


def test_the_reward_of_the_tables_is_the_function_that_is_handed_in(clips, scorers):
    """In chunks, in float64; a paired reward is told the clips."""
    batch, asked = collate(clips), []

    def reward(motion, lengths, captions, *more):
        asked.append((len(motion), captions, *more))
        return lengths + 0.5
    own = scorers._replace(reward=reward)
    got = evaluate.rewards(own, batch.motion, batch.lengths, batch.captions, clips, chunk=4)
    assert got.dtype == np.float64 and got.tolist() == [n + 0.5 for n in batch.lengths.tolist()]
    assert asked == [(4, batch.captions[:4]), (2, batch.captions[4:])]
    each, _ = evaluate.measure(batch.motion, batch.lengths, batch.captions, [{}] * 6, own, clips)
    assert each["reward"].tolist() == got.tolist()
    paired = own._replace(paired=True)
    evaluate.rewards(paired, batch.motion, batch.lengths, batch.captions, clips, chunk=4)
    assert [more for _, _, *more in asked[-2:]] == [[clips[:4]], [clips[4:]]]


def test_a_reward_that_is_not_finite_names_its_caption(clips, scorers):
    batch = collate(clips)
    values = torch.tensor([0.0, 0.0, math.nan, math.inf, 0.0, 0.0])
    wrong = scorers._replace(reward=lambda motion, lengths, captions: values)
    with pytest.raises(NonFiniteError, match="not finite for 'a person walks to chair 2'"):
        evaluate.rewards(wrong, batch.motion, batch.lengths, batch.captions, clips)


def test_looks_and_their_names(clips, scorers):
    """The data are compared with where a column needs them; a wrong name is known before any training."""
    seen = evaluate.look(("reward", "jerk"), clips, scorers, Sampler("policy"))
    row = evaluate.evaluate(clips, scorers, Sampler("policy"), purpose="validation")
    assert seen == {"val_reward": row["reward"][0], "val_jerk": row["jerk"][0]}
    assert evaluate.look(("fid",), clips, scorers, Sampler("policy")) == {"val_fid": row["fid"][0]}
    evaluate.check_names(("reward", "fid", "length_error"), clips, scorers)
    with pytest.raises(InputError, match="no column 'height' to look at while training; there are reward, "):
        evaluate.check_names(("reward", "height"), clips, scorers)


def test_clips_are_chosen_by_position():
    assert evaluate.spread_out(list("abcdef"), 3) == ["a", "c", "e"]
    assert evaluate.spread_out(list("ab"), 3) == ["a", "b"]
