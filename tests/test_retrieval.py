"""Metrics in closed form, the published networks against reference files, and our retrieval models."""
from pathlib import Path

import numpy as np
import pytest
import torch

from common import InputError, NonFiniteError, evaluate, length_mask, metrics, retrieval as ev
from common.datasets import Clip, Statistics, Vocabulary, collate, load_dataset
from common.published import evaluator, tmr
from tests.parity_evaluators import check

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
FAMILIES = ("transformer", "bigru")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def toy_clips(count=24, width=263, seed=0):
    """Clips of noise whose captions name one of three kinds; the kind is a constant in the position block."""
    rng = np.random.default_rng([seed, 7])
    clips = []
    for index in range(count):
        kind, verb = index % 3, ("walks", "waves", "jumps")[index % 3]
        features = rng.normal(size=(4 * int(rng.integers(6, 15)), width)).astype(np.float32)
        features[:, 4 + kind] += 2.0
        captions = [f"a person {verb} slowly", f"somebody {verb}"]
        clips.append(Clip(f"toy-{index}", features, captions, [[], []], [{"kind": kind}] * 2))
    return clips


def toy_model(family, clips=None, **options):
    clips = clips or toy_clips()
    vocabulary = Vocabulary.from_captions([c for clip in clips for c in clip.captions])
    statistics = Statistics.from_clips(clips, "scorer", feat_bias=5)
    return ev.RetrievalModel(family, vocabulary, statistics, width=16, components=16, **options)


@pytest.mark.skipif(not GOLDEN.exists(), reason="reference files are not here")
@pytest.mark.parametrize("name", ["metrics_*.npz", "guo_eval_*.npz", "tmr_enc_*.npz"])
def test_reference_files(name):
    files = sorted(GOLDEN.glob(name))
    assert files
    for path in files:
        rows = check(path)
        assert len(rows) >= 10
        assert [row for row in rows if not row[1] <= row[2]] == []


# ---- Metrics -----------------------------------------------------------------------------------------------

def test_fid_of_samples_with_known_moments():
    """|mu1 - mu2|^2 + sum (s1 - s2)^2 for diagonal covariances; the samples have these moments exactly."""
    x = normal(400, 6).double()
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T   # mean 0, covariance I
    s1, s2 = torch.tensor([1.0, 2, 3, 1, 0.5, 0]).double(), torch.tensor([2.0, 2, 1, 0, 1.5, 1]).double()
    shift = torch.arange(6).double()
    expected = (s1 - s2).square().sum().item() + shift.square().sum().item()
    assert metrics.fid(x * s1, x * s2 + shift) == pytest.approx(expected, rel=1e-9)
    rotation = torch.linalg.qr(normal(6, 6, seed=1).double())[0]
    assert metrics.fid(x * s1 @ rotation, (x * s2 + shift) @ rotation) == pytest.approx(expected, rel=1e-7)


def test_identical_embeddings_are_perfect():
    x = normal(70, 24) * 30 + 100           # far from the origin: the expanded distance formula breaks here
    assert metrics.fid(x, x) < 1e-4
    assert torch.diagonal(metrics.pairwise_distance(x, x)).abs().max() == 0
    ranked = metrics.r_precision(x, x)
    assert ranked["top"].tolist() == [1, 1, 1] and ranked["pool"] == 32 and ranked["ties"] == 0
    assert metrics.mm_dist(x, x) == 0


def test_constant_embeddings_score_chance():
    text, motion = normal(64, 8), torch.ones(64, 8)
    ranked = metrics.r_precision(text, motion)
    assert ranked["top"].tolist() == pytest.approx([1 / 32, 2 / 32, 3 / 32]) and ranked["ties"] == 1
    same = torch.eye(32, dtype=torch.bool)
    same[:, :2] = True                      # c right ones among 32 equal ones: 1 - C(32-c, k) / C(32, k)
    hits, _ = metrics.hit_chance(torch.ones(32, 32), (1, 2), same)
    assert hits[5].tolist() == pytest.approx([3 / 32, 1 - 29 * 28 / (32 * 31)])
    assert hits[0].tolist() == pytest.approx([2 / 32, 1 - 30 * 29 / (32 * 31)])


def test_r_precision_pools_and_order():
    text = normal(40, 8)
    motion = text.roll(1, 0)                # every text finds its motion only by luck
    assert metrics.r_precision(text[:5], text[:5])["pool"] == 5
    worse = text.clone()
    worse[32:] = 1e6                        # rows of an incomplete pool do not count
    assert metrics.r_precision(text, worse)["top"].tolist() == [1, 1, 1]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert metrics.r_precision(text[order], motion[order])["top"].tolist() == metrics.r_precision(
        text, motion, order=order)["top"].tolist()


def test_half_of_two_equal_candidates():
    distance = torch.tensor([[1.0, 1.0, 3.0], [0.0, 2.0, 2.0], [5.0, 1.0, 9.0]])
    hits, tied = metrics.hit_chance(distance, (1, 2, 3))
    assert hits.tolist() == [[0.5, 1, 1], [0, 0.5, 1], [0, 0, 1]] and tied.tolist() == [True, True, False]


def test_diversity_multimodality_interval():
    first, second = metrics.draw_pairs(10, 300, torch.Generator().manual_seed(0))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))      # without replacement
    line = torch.arange(10.0)[:, None]
    assert metrics.diversity(line, torch.tensor([0, 3]), torch.tensor([4, 3])) == 2
    samples = torch.stack([line[:4], 100 + 2 * line[:4]])                            # two prompts, far apart
    assert metrics.multimodality(samples, torch.tensor([0]), torch.tensor([3])) == 4.5
    mean, half = metrics.mean_interval([1.0, 3.0])
    assert mean == 2 and half == pytest.approx(1.96 / 2 ** 0.5)
    assert metrics.summarise([{"fid": 1.0}, {"fid": 3.0}])["fid"] == pytest.approx([2, 1.96 / 2 ** 0.5])


def test_benchmark_of_known_embeddings():
    """Generated motions equal their texts; the real ones are the same cloud moved by a known step."""
    text, step = normal(64, 4), torch.tensor([3.0, 0.0, 4.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    table = metrics.benchmark_embeddings(text, text, text + step, generator=generator, pairs=20)
    assert table["fid"] == pytest.approx(25, rel=1e-5) and table["mm_dist"] == 0
    assert [table[f"r_precision_top{k}"] for k in (1, 2, 3)] == [1, 1, 1] and table["r_precision_pool"] == 32
    assert 0 < table["diversity"] < 2 * text.norm(dim=1).max()


def test_nonfinite_motions_stop():
    model = ev.freeze(toy_model("transformer"))
    bad = torch.full((2, 24, 263), float("nan"))
    with pytest.raises(NonFiniteError):
        ev.embed(model, bad, torch.tensor([24, 24]))


# ---- Networks ----------------------------------------------------------------------------------------------

def test_official_evaluator_size_and_order(tmp_path):
    parts = {"movement_encoder": evaluator.MovementEncoder(259, 8, 6),
             "motion_encoder": ev.MotionEncoderBiGRU(6, 8, 5),
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
    official = (evaluator.MovementEncoder(259), ev.MotionEncoderBiGRU(), evaluator.TextEncoderBiGRU())
    assert count(*official) == [1.84, 15.75, 4.10]
    assert count(ev.TMREncoder(263), ev.TMREncoder(768), tmr.TMRDecoder()) == [4.81, 4.94, 6.39]


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_ignores_padding_and_batch_order(family):
    model = ev.freeze(toy_model(family))
    motion, lengths = normal(4, 40, 263), torch.tensor([40, 24, 8, 32])
    whole = model.embed_motion(motion, lengths)
    garbage = torch.cat([motion, torch.full((4, 22, 263), float("nan"))], dim=1)
    for row, length in enumerate(lengths):
        garbage[row, length:] = float("nan")
    assert torch.allclose(model.embed_motion(garbage, lengths), whole, atol=1e-5)
    order = torch.tensor([3, 0, 2, 1])
    assert torch.allclose(model.embed_motion(motion[order], lengths[order]), whole[order], atol=1e-5)
    for row, length in enumerate(lengths):
        alone = model.embed_motion(motion[row:row + 1, :length], lengths[row:row + 1])
        assert torch.allclose(alone[0], whole[row], atol=1e-5)
    # the last real frame does count
    motion[1, 23] += 1
    assert not torch.allclose(model.embed_motion(motion, lengths)[1], whole[1], atol=1e-4)

    captions = ["a person walks", "somebody", "", "a person walks slowly " * 30]
    texts = model.embed_text(captions)
    for row, caption in enumerate(captions):
        assert torch.allclose(model.embed_text([caption])[0], texts[row], atol=1e-5)
    assert torch.isfinite(texts).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_weights_get_no_gradient_but_the_motion_does(family):
    model = ev.freeze(toy_model(family))
    motion = normal(3, 24, 263).requires_grad_()
    lengths = torch.tensor([24, 16, 20])
    model.similarity(motion, lengths, ["a person walks", "waves", "jumps"]).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert (motion.grad[1, :16].abs().sum(-1) > 0).all() and (motion.grad[1, 16:] == 0).all()


def test_gradient_of_the_similarity_is_right():
    """Against finite differences, in float64."""
    model = ev.freeze(toy_model("transformer")).double()
    motion = normal(1, 8, 263).double().requires_grad_()
    direction = normal(1, 8, 263, seed=1).double()
    score = lambda x: model.similarity(x, torch.tensor([8]), ["a person walks"])
    slope, = torch.autograd.grad(score(motion).sum(), motion)
    step = 1e-5
    numeric = (score(motion + step * direction) - score(motion - step * direction)).sum() / (2 * step)
    assert (slope * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-5)


def test_the_mean_of_models_scores_the_mean_of_their_cosines():
    models = [ev.freeze(toy_model(family)) for family in ("transformer", "bigru")]
    both = ev.freeze(ev.Mean(models))
    asked = normal(3, 24, 263), torch.tensor([24, 16, 20]), ["a person walks", "waves", "jumps"]
    expected = sum(model.similarity(*asked) for model in models) / 2
    torch.testing.assert_close(both.similarity(*asked), expected)
    seen, text = ev.embed(both, *asked)
    torch.testing.assert_close((seen * text).sum(-1), expected)
    assert both.embed_motion(*asked[:2]).norm(dim=-1).tolist() == pytest.approx([1.0] * 3)
    assert (models[0].similarity(*asked) - models[1].similarity(*asked)).abs().min() > 1e-3


def test_statistics_of_the_generator_are_refused():
    clips = toy_clips(6)
    with pytest.raises(ValueError, match="generator"):
        ev.RetrievalModel("transformer", Vocabulary(["walk"]), Statistics.from_clips(clips, "generator"))
    model = toy_model("transformer")
    with pytest.raises(ValueError, match="width"):
        model.embed_motion(torch.zeros(1, 8, 251), torch.tensor([8]))
    with pytest.raises(ValueError, match="lengths"):
        model.embed_motion(torch.zeros(1, 8, 263), torch.tensor([12]))


def test_model_normalises_with_its_own_statistics():
    clips = toy_clips(6)
    moved = [Clip(c.name, c.features * 3 + 5, c.captions, c.tokens, c.attributes) for c in clips]
    first, second = toy_model("transformer", clips), toy_model("transformer", moved)
    ours, theirs = collate(clips), collate(moved)
    a, b = first.embed_motion(ours.motion, ours.lengths), second.embed_motion(theirs.motion, theirs.lengths)
    assert torch.allclose(a, b, atol=1e-3)
    assert not torch.allclose(a, first.embed_motion(theirs.motion, theirs.lengths), atol=1e-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_round_trip(family, tmp_path):
    model = toy_model(family, seed=3)
    torch.save(model.export(), tmp_path / "model.pt")
    again = ev.RetrievalModel.load(torch.load(tmp_path / "model.pt", weights_only=True))
    motion, lengths = normal(2, 16, 263), torch.tensor([16, 12])
    assert torch.equal(model.similarity(motion, lengths, ["a person walks", "x"]),
                       again.similarity(motion, lengths, ["a person walks", "x"]))


# ---- Contrastive training ----------------------------------------------------------------------------------

def test_info_nce_closed_form_and_filter():
    text = torch.eye(3)
    loss = ev.info_nce(text, text, temperature=0.5)
    assert loss.item() == pytest.approx(-np.log(np.exp(2) / (np.exp(2) + 2)), rel=1e-6)
    pair = torch.zeros(3, 3, dtype=torch.bool)
    pair[0, 1] = pair[1, 0] = True
    fewer = -np.log(np.exp(2) / (np.exp(2) + 1))        # rows 0 and 1 keep one negative, row 2 keeps both
    assert ev.info_nce(text, text, 0.5, pair).item() == pytest.approx((2 * fewer + loss.item()) / 3, rel=1e-6)
    # Everything a duplicate: only the positive is left, the loss is 0 and not NaN.
    assert ev.info_nce(text, text, 0.5, torch.ones(3, 3, dtype=torch.bool)).item() == 0


def test_duplicate_pairs():
    captions = ["a person walks", "somebody walks", "a person jumps", "a person walks", *["a man waves"] * 2]
    vocabulary = Vocabulary.from_captions(captions)
    ids, _ = vocabulary.encode(captions)
    idf = ev.inverse_document_frequency(ids, len(vocabulary))
    attributes = ({"x": 1, "y": 2}, {"y": 2, "x": 1}, {"x": 2}, {}, {"w": 1}, {"w": 2})
    signatures = [ev.signature(a) for a in attributes]
    same = ev.duplicate_pairs(ids, signatures, idf)
    assert torch.equal(same, same.T) and same.diagonal().all()
    others = {(i, j) for i, j in same.nonzero().tolist() if i < j}
    # (0, 1) equal attributes; (0, 3) equal words where one has no attributes; not (4, 5): attributes decide
    assert others == {(0, 1), (0, 3)}
    assert idf[vocabulary.encode(["jumps"])[0][0, 0]] == pytest.approx(np.log(7 / 2) + 1)


def test_training_is_a_function_of_its_seed():
    runs = []
    for seed, disturb in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturb)          # the global generator must not matter
        model = toy_model("transformer", seed=seed)
        ev.train_retrieval(model, toy_clips(), iterations=4, batch=8, seed=seed, progress=False)
        runs.append(model.export()["state"])
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert not torch.equal(runs[0]["words"], runs[2]["words"])


def test_patches_are_whitened_principal_components():
    clips = toy_clips()
    model = toy_model("transformer", clips)
    kept = model.codec.fit(clips, Statistics(model.codec.mean, model.codec.std, role="scorer"))
    assert 0 < kept <= 1
    assert torch.allclose(model.codec.basis.T @ model.codec.basis, torch.eye(16), atol=1e-5)
    batch = collate(clips)
    tokens, counts = model.tokenise(batch.motion, batch.lengths)
    rows = tokens[length_mask(counts, tokens.shape[1])].double()
    assert rows.mean(0).abs().max() < 1e-4
    assert torch.allclose(rows.T @ rows / len(rows), torch.eye(16, dtype=torch.float64), atol=1e-3)
    assert (model.codec.scale.diff() <= 0).all(), "leading components first"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))      # no data/ folder here: the embedded data are built
        return load_dataset("humanml3d", clips=320)


@pytest.mark.parametrize("family", FAMILIES)
def test_learns_to_retrieve_held_out_clips(family, embedded):
    train, test = embedded.splits["train"], embedded.splits["test"]
    model, curves = ev.fit_retrieval(family, train, iterations=60, batch=48, progress=False)
    assert np.mean(curves["loss"][-5:]) < np.mean(curves["loss"][:5]) - 0.5 and len(curves["top1"]) == 60
    score = ev.retrieval_score(model, test)
    assert score["pool"] == 32 and score["R3"] > 4 * 3 * score["chance"]
    assert score["R1_same"] >= score["R1"] and score["R1"] <= score["R2"] <= score["R3"]

    batch = collate(test)
    real = (batch.motion, batch.lengths, batch.captions)
    with pytest.warns(UserWarning, match="biased"):
        gt = evaluate.benchmark(model, real, real, generator=torch.Generator().manual_seed(0))
        # Captions shifted by one: the same set of motions, so FID stays; what looks at the text gets worse.
        shifted = (*real[:2], batch.captions[1:] + batch.captions[:1])
        wrong = evaluate.benchmark(model, shifted, real, generator=torch.Generator().manual_seed(0))
        frozen = evaluate.benchmark(model, (batch.motion[:, :1].expand_as(batch.motion), *real[1:]), real,
                              generator=torch.Generator().manual_seed(0))
    assert all(np.isfinite(value) for value in gt.values())
    assert gt["fid"] < 1e-4 and wrong["fid"] < 1e-4 and frozen["fid"] > 0.05
    assert wrong["judge"] < gt["judge"] - 0.1 and wrong["mm_dist"] > gt["mm_dist"]
    assert wrong["r_precision_top3"] < gt["r_precision_top3"] - 0.2 and gt["r_precision_pool"] == 32
    repeated = batch.motion[:6].unsqueeze(1).expand(-1, 3, -1, -1)
    assert evaluate.benchmark_multimodality(model, repeated, batch.lengths[:6, None].expand(-1, 3),
                                      generator=torch.Generator().manual_seed(0)) < 1e-4


def test_too_few_clips_is_said():
    with pytest.raises(InputError, match="two training clips"):
        ev.train_retrieval(toy_model("bigru"), toy_clips(1), progress=False)
