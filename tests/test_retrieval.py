"""Retrieval models: what they read, how they learn, how they are scored and cached."""
import functools
import inspect

import numpy as np
import pytest
import torch

from common import InputError, NonFiniteError, evaluate, length_mask, metrics, retrieval as ev
from common.datasets import Clip, Dataset, Statistics, Vocabulary, collate, load_dataset
from common.features import T2M

FAMILIES = ("transformer", "bigru")

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_nonfinite_motions_stop():
    model = ev.freeze(toy_model("transformer"))
    bad = torch.full((2, 24, 263), float("nan"))
    with pytest.raises(NonFiniteError):
        ev.embed(model, bad, torch.tensor([24, 24]))


# ---- Models ---------------------------------------------------------------------------------------

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
        ev.train_retrieval(model, toy_clips(), iterations=4, batch=8, seed=seed)
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
    _, first = ev.fit_retrieval(family, train, iterations=1, batch=48)
    model, notes = ev.fit_retrieval(family, train, iterations=60, batch=48)
    assert notes["loss"] < first["loss"] - 0.5 and first["top1"] < notes["top1"] <= 1
    score = ev.retrieval_score(model, test)
    assert score["pool"] == 32 and score["R3"] > 4 * 3 * score["chance"]
    assert score["R1_same"] >= score["R1"] and score["R1"] <= score["R2"] <= score["R3"]

    batch = collate(test)
    real = (batch.motion, batch.lengths, batch.captions)
    generator = lambda: torch.Generator().manual_seed(0)
    gt = evaluate.benchmark(model, real, real, generator=generator())
    # Captions shifted by one: the same set of motions, so FID stays; what looks at the text gets worse.
    shifted = (*real[:2], batch.captions[1:] + batch.captions[:1])
    wrong = evaluate.benchmark(model, shifted, real, generator=generator())
    still = (batch.motion[:, :1].expand_as(batch.motion), *real[1:])
    frozen = evaluate.benchmark(model, still, real, generator=generator())
    assert all(np.isfinite(value) for value in gt.values())
    assert gt["fid"] < 1e-4 and wrong["fid"] < 1e-4 and frozen["fid"] > 0.05
    assert model.similarity(*shifted).mean() < model.similarity(*real).mean() - 0.1
    assert wrong["mm_dist"] > gt["mm_dist"]
    assert wrong["r_precision_top3"] < gt["r_precision_top3"] - 0.2 and gt["r_precision_pool"] == 32
    repeated, lengths = batch.motion[:6].repeat_interleave(3, 0), batch.lengths[:6].repeat_interleave(3)
    same = ev.embed(model, repeated, lengths)[0].unflatten(0, (6, 3))
    assert metrics.multimodality(same, *metrics.draw_pairs(3, 10, generator())) < 1e-4


def test_a_comment_trains_nothing_again_and_another_network_does(tmp_path, monkeypatch):
    clips = toy_clips()
    data = Dataset("toy", T2M, {"train": clips, "val": clips, "test": clips}, "x")
    ask = lambda **options: ev.reward_model([data], iterations=2, seed=0, cache_dir=tmp_path, use_cache=True,
                                            device=torch.device("cpu"), **options)
    source, trained, fit = inspect.getsource, [], ev.fit_retrieval
    monkeypatch.setattr(ev, "fit_retrieval", functools.wraps(fit)(
        lambda *args, **options: (trained.append(options), fit(*args, **options))[1]))
    first, notes = ask()
    commented = lambda part: "# why\n" + source(part).replace('"""', '"""A ', 1)
    monkeypatch.setattr(inspect, "getsource", commented)
    again, same = ask()
    assert len(trained) == 1 and notes == same
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    monkeypatch.setattr(inspect, "getsource", lambda part: source(part).replace("0.2", "0.1").replace(
        "layers", "blocks"))
    ask()
    assert len(trained) == 2


def test_too_few_clips_is_said():
    with pytest.raises(InputError, match="two training clips"):
        ev.train_retrieval(toy_model("bigru"), toy_clips(1))
