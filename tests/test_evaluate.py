"""Tables and comparisons of finished runs: hand-made numbers, and tiny scorers with random weights."""
import json
import math
import types

import numpy as np
import pytest
import torch

from common import InputError, evaluate, features, generator, metrics, retrieval, runs
from common.datasets import Clip, Statistics, Vocabulary, collate
from results import ab_page, fronts, studies, tables


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
    return evaluate.Scorers(*map(retrieval.freeze, models), features.T2M)


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
    assert evaluate.mean([1.0, math.nan, 3.0]) == 2.0
    assert evaluate.mean(np.array([math.inf, 5.0, -math.inf])) == 5.0
    assert math.isnan(evaluate.mean([math.nan, math.nan]))


def test_paired_gain():
    after = {"_prompts": {"reward": np.array([3.0, 7.0, 4.0, 9.0]), "oracle": np.array([1.0, math.nan])}}
    before = {"_prompts": {"reward": np.array([2.0, 4.0, math.nan, 4.0]), "oracle": np.array([0.0, 1.0])}}
    # differences 1, 3, 5: mean 3, sample variance (4 + 0 + 4) / 2, so the half width is 1.96 * 2 / sqrt(3)
    assert evaluate.paired_gain(after, before) == {"reward": [3.0, pytest.approx(3.92 / math.sqrt(3))]}
    assert evaluate.paired_gain(before, after)["reward"][0] == -3.0


def test_rows_average_motions_then_repeats_and_keep_the_prompts(clips, scorers, monkeypatch):
    per_motion = ([1.0, math.nan, 3.0], [5.0, 6.0, math.nan])

    def measured(motion, lengths, captions, attributes, scorers, real, seed):
        each = {name: np.array(per_motion[seed]) for name in evaluate.PAIRED}
        return each, {"fid": (4.0, 8.0)[seed]}, []

    monkeypatch.setattr(evaluate, "measure", measured)
    row = evaluate.evaluate(clips[:3], scorers, Sampler("policy"), repeats=2)
    assert row["reward"] == [3.75, pytest.approx(1.96 * 1.75 / math.sqrt(2))]  # repeats 2 and 5.5
    assert row["fid"] == [6.0, pytest.approx(1.96 * 2 / math.sqrt(2))]
    assert set(row["_prompts"]) == set(evaluate.PAIRED)
    assert row["_prompts"]["jerk"].tolist() == [3.0, 6.0, 3.0]


def test_measure_is_the_cosine_of_each_motion_with_its_caption(clips, scorers):
    batch = collate(clips)
    dirty = batch.motion + 100.0 * ~batch.mask[..., None]
    each, whole, _ = evaluate.measure(dirty, batch.lengths, batch.captions, [{}] * 6, scorers)
    assert whole == {}
    for name, scorer in (("reward", scorers.reward_model), ("judge", scorers.judge)):
        expected = scorer.similarity(batch.motion, batch.lengths, batch.captions)
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
    each, _, verdicts = evaluate.measure(batch.motion, batch.lengths, batch.captions, attributes, scorers)
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

@pytest.mark.filterwarnings("ignore:FID of 6")
def test_evaluate_asks_caption_r_of_every_clip_in_its_own_length(clips, scorers):
    sampler = Sampler("policy")
    row = evaluate.evaluate(clips, scorers, sampler, purpose="look", repeats=3)
    lengths = [12, 16, 20, 24, 12, 16]
    assert sampler.calls == [([clip.captions[r % 2] for clip in clips], lengths, "look", r) for r in range(3)]
    motions = [Sampler("policy")([""] * 6, torch.tensor(lengths), "look", r)[0] for r in range(3)]
    rewards = torch.stack([scorers.reward_model.similarity(m, torch.tensor(lengths), c[0])
                           for m, c in zip(motions, sampler.calls)], 1)
    np.testing.assert_allclose(row["_prompts"]["reward"], rewards.mean(1), atol=1e-6)
    assert row["reward"][0] == pytest.approx(float(rewards.mean()), abs=1e-6)
    half_width = 1.96 * float(rewards.mean(0).std(correction=0)) / math.sqrt(3)
    assert row["reward"][1] == pytest.approx(half_width, abs=1e-6)
    asked = [clip.attributes[r % 2] for r in range(3) for clip in clips]
    assert sum(count for _, count in row["checks"].values()) == sum(len(a) for a in asked)
    short = evaluate.evaluate(clips, scorers, Sampler("policy"), purpose="look", benchmark=False)
    assert "fid" in row and "fid" not in short and short["reward"][1] == 0.0


@torch.no_grad()
def test_best_of_picks_the_best_for_each_prompt(clips, scorers):
    captions, _, lengths = evaluate.questions(clips, 0)
    inner = Sampler("base")
    best, made = evaluate.best_of(inner, 5, scorers.reward_model)(captions, lengths, "test", 2)
    assert made is lengths
    assert [call[2:] for call in inner.calls] == [(f"test try {n}", 2) for n in range(5)]
    tries = [Sampler("base")(captions, lengths, f"test try {n}", 2)[0] for n in range(5)]
    scores = torch.stack([scorers.reward_model.similarity(motion, lengths, captions) for motion in tries])
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

    best, made = evaluate.best_of(sampler, 3, scorers.reward_model)(captions, lengths, "test", 0)
    tries = [sampler(captions, lengths, f"test try {n}", 0) for n in range(3)]
    scores = torch.stack([scorers.reward_model.similarity(motion, own, captions) for motion, own in tries])
    winners = scores.argmax(0).tolist()
    assert len(set(winners)) > 1 and best.shape[1] == 32
    for k, n in enumerate(winners):
        assert made[k] == lengths[k] + 4 * n
        assert torch.equal(best[k, :tries[n][0].shape[1]], tries[n][0][k])


@pytest.mark.filterwarnings("ignore:FID of 6")
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
    rows = evaluate.compare("toy", empty, scorers, {"base": sampler, "tuned": sampler}, purpose="x", repeats=1)
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
    assert distance > 0.1 and value == [pytest.approx(distance, abs=1e-6), 0.0]
    assert found["distinct"] == [1.0, 0.0]
    same = evaluate.variety(clips, scorers, copy_of(clips[:3]), prompts=3)
    assert same == {"multimodality": [0.0, 0.0], "distinct": [pytest.approx(0.1), 0.0]}, "one of ten is new"


@pytest.mark.filterwarnings("ignore:FID of 6")
def test_compare(clips, scorers, capsys):
    base, best = Sampler("base"), Sampler("best")
    samplers = {"base": base, "tuned": copy_of(clips), "best of 2": best}
    rows = evaluate.compare("toy", clips, scorers, samplers, purpose="test", repeats=2)
    assert list(rows) == ["gt", "base", "tuned", "best of 2", "gain"]
    assert all("_prompts" not in row for row in rows.values())
    assert [call[2:] for call in base.calls[:2]] == [("test", 0), ("test", 1)]
    assert {call[2] for call in base.calls[2:]} == {"multimodality"}
    assert [call[2:] for call in best.calls] == [("test", 0), ("test", 1)], "asked what the others are asked"
    assert {name for name, row in rows.items() if "multimodality" in row} == {"base", "tuned"}
    assert rows["tuned"].pop("multimodality") == [0.0, 0.0]
    assert rows["tuned"].pop("distinct") == [pytest.approx(0.1), 0.0]
    # NaN, the oracle's answer where nothing is asked, differs from itself
    text = {name: {k: str(v) for k, v in row.items()} for name, row in rows.items()}
    assert text["tuned"] == text["gt"], "the data against itself"
    assert set(rows["gain"]) == {"reward", "judge", "foot_skate", "jerk", "speed"}
    for name, (gain, _) in rows["gain"].items():
        assert rows["base"][name][0] + gain == pytest.approx(rows["tuned"][name][0], rel=1e-6, abs=1e-6)
    assert abs(rows["gain"]["judge"][0]) > 0.01 and rows["gain"]["judge"][1] > 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("toy: 6 clips, 2 repeats")
    assert [line[:10].strip() for line in printed[3:]] == list(rows)


# ---- Several rewards ---------------------------------------------------------------------------------------


def test_further_columns_are_measured_on_the_motions_of_each_row(clips, scorers):
    """They reach rows, gain and the table; clips without a motion have none."""
    seen = []

    def columns(motion, lengths, captions, real):
        seen.append((captions, real))
        return {"text": motion[:, 0, 3].double().numpy()}
    wider = scorers._replace(columns=columns)
    rows = evaluate.compare("toy", clips, wider, {"base": Sampler("base"), "tuned": Sampler("tuned")},
                           purpose="test", repeats=2)
    assert rows["gt"]["text"][0] == pytest.approx(np.mean([clip.features[0, 3] for clip in clips]), rel=1e-5)
    difference = rows["tuned"]["text"][0] - rows["base"]["text"][0]
    assert rows["gain"]["text"][0] == pytest.approx(difference, abs=1e-6) and difference != 0
    assert all(real is clips and len(captions) == 6 for captions, real in seen) and len(seen) == 6


def test_fronts_by_hand(capsys, scorers, clips, tmp_path):
    """Two samplers a policy, each with rewards of its own; volumes and their differences are over prompts."""
    def policy(*values):
        def sampler(value):
            return lambda captions, lengths, *asked: (torch.full((len(captions), 8, 263), value), lengths)
        return [sampler(value) for value in values]

    def columns(motion, lengths, captions, real):
        scale = np.arange(1.0, 1 + len(captions))
        return {"a": motion[:, 0, 0].double().numpy() * scale, "b": 2.0 - motion[:, 0, 0].double().numpy()}
    wider = scorers._replace(columns=columns)
    points = fronts.front_points(policy(0.5, 1.0), clips[:2], wider, ("b", "a"))
    assert points.shape == (2, 16, 2) and points[1, 0].tolist() == [1.5, 1.0]
    assert points[1, 15].tolist() == [1.0, 2.0]
    found = fronts.compare_fronts({"start": policy(0.5, 0.5), "tuned": policy(0.5, 1.0)}, clips[:2], wider,
                                   ("a", "b"), tmp_path / "fronts.png")
    # boxes of the two prompts: start .5 x 1.5 and 1 x 1.5, tuned the union with 1 x 1 and 2 x 1
    assert found["start"]["hypervolume"][0] == pytest.approx((0.75 + 1.5) / 2)
    assert found["tuned"]["hypervolume"][0] == pytest.approx((1.25 + 2.5) / 2)
    assert found["tuned"]["less start"] == [pytest.approx(0.75), pytest.approx(1.96 * 0.25)]
    assert "less tuned" not in found["start"]
    assert found["tuned"]["of the means"] == pytest.approx(0.75 * 1.5 + (1.5 - 0.75) * 1.0)
    assert "hypervolume of 16 motions of each of 2 prompts" in capsys.readouterr().out
    assert (tmp_path / "fronts.png").exists()


def test_controllability(capsys):
    table = {"token a": {"a": [1.0, 0.1], "b": [0.2, 0.1]}, "token b": {"a": [0.5, 0.0], "b": [0.1, 0.0]}}
    assert fronts.controllability(table, ("a", "b")) == [[1.0, 0.2], [0.5, 0.1]]
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows[0].split() == ["a", "1.000*", "0.200*"] and rows[1].split() == ["b", "0.500", "0.100"]
    assert fronts.controllability({"base": {}}, ("a", "b")) is None


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
    base = {"reward": [0.12345, 0.01], "oracle": [math.nan, 0.0], "other": [1.0, 1.0]}
    evaluate.print_table("title", {"base": base, "gain": {"jerk": [-3.0, 0.5]}})
    blank, title, header, base, gain = capsys.readouterr().out.splitlines()
    assert (blank, title) == ("", "title")
    assert header.split() == ["reward", "oracle", "jerk"], "columns that some row has"
    assert base == "base      " + f"{'0.123 +-0.010':>17s}" + 2 * f"{'-':>17s}"
    assert gain == "gain      " + 2 * f"{'-':>17s}" + f"{'-3.000 +-0.500':>17s}"


def write_results(folder, seed, base, gain, judge, seconds, memory):
    """A run folder with a results.json of two columns; judge [nan, ...] becomes a string in it."""
    table = {"base": {"reward": [base, 0.01], "judge": judge}, "gain": {"reward": gain, "judge": [0.1, 0.2]}}
    folder.mkdir()
    runs.save_json(folder / "results.json", {
        "command": f"python ddpo_motion.py --seed {seed}", "seed": seed, "target_test": table,
        "data": {"source": "embedded humanml3d", "target": "embedded kit"},
        "seconds": {"rollout": seconds}, "peak_memory_mb": memory})
    return folder


def test_summary_of_two_seeds(tmp_path):
    folders = [write_results(tmp_path / "a", 0, 0.2, [0.30, 0.05], [0.5, 0.0], 10.0, 700.0),
               write_results(tmp_path / "b", 1, 0.6, [0.10, 0.05], [math.nan, 0.0], 20.0, 900.0)]
    lines = tables.summary(folders).splitlines()
    assert lines[0] == "2 run(s), seeds 0, 1; data: embedded humanml3d -> embedded kit"
    assert "    python ddpo_motion.py --seed 1" in lines and "**target, test**" in lines
    # 0.2 and 0.6: mean 0.4, sample sd 0.4 / sqrt(2); 0.3 and 0.1: mean 0.2, sd 0.2 / sqrt(2)
    assert "| base | 0.400 (0.283) | 0.500 |" in lines
    assert "| gain | +0.200 (0.141) | +0.100 (0.000) |" in lines
    assert "Above zero beyond their own 95 % interval over prompts in every run: reward." in lines
    assert lines[-1] == "Seconds (mean): rollout 15; peak memory 900 MB."


def test_more_references_are_rows_of_the_test_table(clips, scorers, monkeypatch):
    asked = []

    def compare(title, clips, scorers, rows, *, purpose, repeats):
        asked.append((purpose, list(rows), rows.get("copy")))
        return {}
    monkeypatch.setattr(evaluate, "compare", compare)
    source, target = (types.SimpleNamespace(splits={s: clips[:k] for s in ("val", "test")}) for k in (3, 4))
    evaluate.final_tables(source, target, scorers, Sampler("base"), Sampler("tuned"), 1, 2, {"copy": len})
    assert [(purpose, rows) for purpose, rows, _ in asked] == [
        ("target_val", ["base", "tuned"]), ("target_test", ["base", "tuned", "best of 2", "copy"]),
        ("source_test", ["base", "tuned"])]
    assert asked[1][2] == 4, "it is told the clips"


def test_strength_curve(clips, scorers, tmp_path):
    """A row for each strength; at the data's own strength the real motions come back."""
    def at(strength):
        def sampler(captions, lengths, purpose, repeat):
            return strength * collate(clips).motion, lengths
        return sampler
    pair = types.SimpleNamespace(splits={"test": clips})
    log = studies.strength_curve(tmp_path / "strengths.png", pair, pair, scorers, at)
    assert log["strength"] == list(studies.STRENGTHS) and 1.0 in log["strength"]
    assert {"target_reward", "source_judge"} <= set(log) and "target_foot_skate" not in log
    real = evaluate.evaluate(clips, scorers, benchmark=False)
    assert log["target_judge"][log["strength"].index(1.0)] == pytest.approx(real["judge"][0], abs=1e-6)
    assert len(set(log["target_judge"])) > 3 and (tmp_path / "strengths.png").stat().st_size > 1000


def test_ab_pairs_shows_both_sides_of_the_same_captions(clips, scorers, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(evaluate.ab_page, "write", lambda *given: shown.append(given))
    base, tuned = Sampler("base"), Sampler("tuned")
    ab_page.ab_pairs(tmp_path, clips, scorers, base, tuned, 3)
    (path, captions, left, right, skeleton, _), = shown
    assert path == tmp_path / "ab_page.html" and skeleton is scorers.skeleton
    assert captions == [clips[k].captions[0] for k in (0, 2, 4)] and len(left) == len(right) == 3
    assert base.calls == tuned.calls and [len(j) for j in left] == base.calls[0][1]


def test_summary_claims_a_gain_only_if_every_run_has_it(tmp_path):
    folders = [write_results(tmp_path / "a", 0, 0.2, [0.30, 0.05], [0.5, 0.0], 1.0, 1.0),
               write_results(tmp_path / "b", 1, 0.2, [0.04, 0.05], [0.5, 0.0], 1.0, 1.0)]
    assert "in every run: none." in tables.summary(folders)
    single = tables.summary(folders[:1])
    assert "in every run: reward." in single
    assert "| gain | +0.300 +-0.050 |" in single, "one run: its own interval"


def test_summary_of_several_rewards(tmp_path):
    """Volumes, their differences, and on how many diagonals the maximum of a column is."""
    folders = []
    for seed, (gain, own) in enumerate(((0.1, 0.9), (0.3, 0.2))):
        folders.append(write_results(tmp_path / str(seed), seed, 0.2, [0.3, 0.1], [0.5, 0.0], 1.0, 1.0))
        file = folders[-1] / "results.json"
        fronts = {"start": {"hypervolume": [0.5, 0.1]},
                  "tuned": {"hypervolume": [0.5 + gain, 0.1], "less start": [gain, 0.05]}}
        matrix = [[own, 0.1, 0.3], [0.4, 0.6, 0.3], [0.3, 0.2, 0.5]]
        stored = json.loads(file.read_text())
        runs.save_json(file, stored | {"fronts": fronts, "controllability": matrix})
    lines = tables.summary(folders).splitlines()
    assert "| start | 0.500 (0.000) | - |" in lines
    assert "| tuned | 0.700 (0.141) | +0.200 (0.141) |" in lines
    assert "| text | 0.550* | 0.100 | 0.300 |" in lines and "| quality | 0.400 | 0.600* | 0.300 |" in lines
    assert "| runs in which the diagonal is above the rest | 1 | 2 | 2 |" in lines
    assert "| tuned | 0.600 +-0.100 | +0.100 +-0.050 |" in tables.summary(folders[:1]).splitlines()


def test_table_by_check(tmp_path, capsys):
    for name, walk in (("a", 0.5), ("b", 0.25)):
        (tmp_path / name).mkdir()
        rows = {who: {"fid": [0.1, 0.0], "checks": {"bow True": [share, 4], "gait walk": [walk, 6]}}
                for who, share in (("base", 0.0), ("tuned", 1.0))}
        runs.save_json(tmp_path / name / "results.json",
                       {"data": {"target": "kit"}, "target_test": rows | {"gain": {"reward": [0.1, 0.0]}}})
    tables.main([str(tmp_path / "a"), str(tmp_path / "b"), "--checks", "target_test"])
    assert capsys.readouterr().out.splitlines() == [
        "| asked for | motions | base | tuned |", "| --- | --- | --- | --- |",
        "| gait walk | 6 | 0.38 | 0.38 |", "| bow True | 4 | 0.00 | 1.00 |"]
    with pytest.raises(InputError, match="--checks other: .*a has no checks in such a table"):
        tables.main([str(tmp_path / "a"), "--checks", "other"])


def test_costs_of_runs_of_any_data(tmp_path, capsys):
    for name, rollout, kept in (("a", 60.0, 90.0), ("b", 120.0, 0.0)):
        (tmp_path / name).mkdir()
        runs.save_json(tmp_path / name / "results.json", {
            "command": f"python x.py {name}|", "data": name, "peak_memory_mb": 99.6,
            "seconds": {"base": kept, "rollout": rollout}})
    tables.main([str(tmp_path / "a"), str(tmp_path / "b"), "--costs"])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| `python x.py a\\|` | 2.5 | 1.5 | 100 |", "| `python x.py b\\|` | 2.0 | 0.0 | 100 |",
        "| sum of 2 | 4 | 2 |  |"]


def test_one_row_each(tmp_path):
    for name, fid, flags in (("a", 0.25, "--lr 0"), ("b", 0.5, "--critic shared")):
        gain = {name: [0.1 * k, 0.01] for k, name in enumerate(evaluate.PAIRED[:4])}
        (tmp_path / name).mkdir()
        runs.save_json(tmp_path / name / "results.json", {
            "command": f"python ppo_motion.py {flags}", "data": {"target": "kit"},
            "paired_test": {"base": {"fid": [0.125, 0.0]}, "tuned": {"fid": [fid, 0.1]}, "gain": gain}})
    head, _, base, first, second = tables.one_row_each([tmp_path / "a", tmp_path / "b"],
                                                        "paired_test").splitlines()
    assert head == "| flags | fid | reward, gain | judge, gain | oracle, gain | oracle_all, gain |"
    assert base == "| base | 0.125 | - | - | - | - |"
    assert first == "| `--lr 0` | 0.250 | +0.000 +-0.010 | +0.100 +-0.010 | +0.200 +-0.010 | +0.300 +-0.010 |"
    assert second.startswith("| `--critic shared` | 0.500 |")
    file = tmp_path / "b" / "results.json"  # another sampler: where it starts is told too
    file.write_text(file.read_text().replace("0.125", "0.0625"))
    rows = tables.one_row_each([tmp_path / name for name in "ab"], "paired_test").splitlines()
    assert rows[2:] == [base, first, "| base of the next | 0.062 | - | - | - | - |", second]
    with pytest.raises(InputError, match="--each other: .*b has no such table"):
        tables.one_row_each([tmp_path / "b"], "other")


def test_seeds_share_a_row(tmp_path):
    for seed, gain in ((0, 0.1), (1, 0.3)):
        (tmp_path / str(seed)).mkdir()
        values = {"text": [0.5, 0.0], "fid": [0.2 * seed, 0.0], "speed": [1.0, 0.0]}
        runs.save_json(tmp_path / str(seed) / "results.json", {
            "command": f"python pareto_motion.py --dataset kit --seed {seed} --alpha 0", "data": {},
            "fronts": {"tuned": {"less start": [gain, 0.1]}},
            "paired_test": {"base": values, "tuned": values, "gain": {"judge": [gain, 0.01]}}})
    head, _, base, row = tables.one_row_each([tmp_path / "0", tmp_path / "1"], "paired_test").splitlines()
    assert head == "| flags | fid | speed | judge, gain | hypervolume, gain |"
    assert base == "| base | 0.000 | 1.000 | - | - |"
    assert row == ("| `--dataset kit --alpha 0` | 0.100 (0.141) | 1.000 (0.000) | +0.200 (0.141) | "
                   "+0.200 (0.141) |")


def test_a_row_each_has_a_dash_for_what_a_run_does_not_know(tmp_path):
    for name, flags, more in (("a", "--method refl", {"preference": [0.5, 0.1]}), ("b", "--dataset kit", {})):
        (tmp_path / name).mkdir()
        table = {"base": {"fid": [0.3, 0.0]}, "tuned": {"fid": [0.1, 0.0]}}
        table["gain"] = {"judge": [0.2, 0.1], **more}
        runs.save_json(tmp_path / name / "results.json", {"command": f"python x.py {flags}",
                                                          "data": {"target": "kit"}, "target_test": table})
    rows = tables.one_row_each([tmp_path / "a", tmp_path / "b"], "target_test").splitlines()
    assert rows[0] == "| flags | fid | judge, gain | preference, gain |"
    assert rows[3:] == ["| `--method refl` | 0.100 | +0.200 +-0.100 | +0.500 +-0.100 |",
                        "| `--dataset kit` | 0.100 | +0.200 +-0.100 | - |"]


@pytest.fixture
def three_runs(tmp_path):
    """Two seeds of one method and a run of another, with a look at val in every second row."""
    for name, flags, calls in (("a", "--method refl --seed 0", 10), ("b", "--method refl --seed 1", 10),
                               ("c", "--method draft", 25)):
        (tmp_path / name).mkdir()
        runs.save_json(tmp_path / name / "results.json", {"command": f"python stepwise_motion.py {flags}",
                                                          "data": {"target": "kit"}})
        rows = ["iteration,samples,updates,calls,val_judge,total"] + [
            f"{k},{k},{2 * k},{calls * (k + 1)},{'' if k % 2 == 0 else k + (name == 'b')},1"
            for k in range(6)]
        (tmp_path / name / "logs.csv").write_text("\n".join(rows) + "\n")
    return [tmp_path / name for name in "abc"]


def test_looks_at_equal_cost(three_runs):
    """Of each run the last look within what the shortest one came to; seeds share a row."""
    a, _, c = three_runs
    head, _, refl, draft = tables.at_equal(three_runs, "calls").splitlines()
    assert head == "| flags | calls | val_judge |"
    assert refl == "| `--method refl` | 60 | 5.500 (0.707) |"
    assert draft == "| `--method draft` | 50 | 1.000 |", "its next look, at 100, is beyond 60"
    with pytest.raises(InputError, match="a: its log has no column kl"):
        tables.at_equal([a], "kl")
    (a / "logs.csv").write_text("iteration,calls,val_judge,val_fid\n0,200,1,2\n")
    (c / "logs.csv").write_text("iteration,calls,val_judge\n0,50,1\n1,200,4\n")
    assert tables.at_equal([a, c], "calls").splitlines()[-1] == "| `--method draft` | 200 | 4.000 | - |"
    (c / "logs.csv").write_text("iteration,calls,val_judge\n0,201,1\n")
    with pytest.raises(InputError, match="--at calls: .*c had no look before 200"):
        tables.at_equal([a, c], "calls")


def test_cost_of_a_level(three_runs, capsys):
    head, _, refl, draft = tables.until(three_runs, "val_judge", 3.5).splitlines()
    assert head == "| flags | samples | updates | calls | val_judge >= 3.5 in |"
    assert refl == "| `--method refl` | 4 (3 to 5) | 8 (6 to 10) | 50 (40 to 60) | 2 of 2 |"
    assert draft == "| `--method draft` | 5 (5 to 5) | 10 (10 to 10) | 150 (150 to 150) | 1 of 1 |"
    tables.main([*map(str, three_runs), "--until", "val_judge=5.5"])
    assert [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["5 (5 to 5)", "10 (10 to 10)", "60 (60 to 60)", "1 of 2 |"], ["-", "-", "-", "0 of 1 |"]]
    for wrong in ("val_judge", "val_judge=high"):
        with pytest.raises(InputError, match="--until .*: COLUMN=LEVEL"):
            tables.main([str(three_runs[0]), "--until", wrong])
    with pytest.raises(InputError, match="a: its log has no column val_oracle"):
        tables.main([str(three_runs[0]), "--until", "val_oracle=1"])
    (three_runs[0] / "logs.csv").write_text("iteration,val_judge\n0,9\n")
    with pytest.raises(InputError, match="a: its log has no column samples"):
        tables.until(three_runs[:1], "val_judge", 1.0)


def test_a_diagonal_of_equals_wins_nothing(tmp_path):
    matrix = [[0.5, 0.5, 0.1], [0.5, 0.4, 0.1], [0.5, 0.3, 0.2]]
    fronts = {"start": {"hypervolume": [0.5, 0.1]}}
    lines = tables.fronts_summary([{"fronts": fronts, "controllability": matrix}])
    assert "| runs in which the diagonal is above the rest | 0 | 0 | 1 |" in lines


@pytest.mark.parametrize("content", (None, "", "{"))
def test_summary_of_an_unfinished_run_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match="results.json: cannot be read") as caught:
        tables.summary([tmp_path])
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_command_line(tmp_path, capsys):
    folder = write_results(tmp_path / "a", 7, 0.2, [0.30, 0.05], [0.5, 0.0], 1.0, 1.0)
    tables.main([str(folder)])
    assert "1 run(s), seeds 7" in capsys.readouterr().out
    with pytest.raises(InputError, match="--each nothing"):
        tables.main([str(folder), "--each", "nothing"])
    columns = ["iteration"] + [name for names in tables.CURVES for name in names]
    (folder / "logs.csv").write_text("\n".join([",".join(columns)] + [
        ",".join([str(k)] + [str(0.1 * k)] * (len(columns) - 1)) for k in range(4)]) + "\n")
    tables.main([str(folder), "--curves", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "results.json").read_text())["seed"] == 7
