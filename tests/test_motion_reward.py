"""MotionReward: losses, SPL, masks, adapters, heads, training, cache.

Golden reference values of the losses are in tests/parity/motion_reward.py.
"""
import inspect
import math
from types import SimpleNamespace
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import stepwise_motion as sw
from common import (
    NonFiniteError, datasets, features, freeze, generator, length_mask, lora, motion_reward,
    perception, representations, retrieval, training, vae)
from common.representations import REPRESENTATIONS, from_features

KIT, T2M = features.KIT, features.T2M
SMALL = dict(width=16, latent=12, layers=3, heads=2, ff=24, components=20, max_words=16, rank=3, alpha=6)
FEW = {**SMALL, "layers": 1}
pytestmark = pytest.mark.usefixtures("one_thread")
each = pytest.mark.parametrize("representation", REPRESENTATIONS)


def normal(*shape, k=0):
    return torch.randn(*shape, generator=generator(0, k, "test"))


def load(folder, name, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # real data in the repository play no part
        return datasets.load_dataset(name, seed=0, cache_dir=folder, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("motion_reward")


@pytest.fixture(scope="module")
def whole(folder):
    """Enough clips to learn from."""
    return load(folder, "kit", space="t2m", clips=200)


@pytest.fixture(scope="module")
def kit(folder):
    return load(folder, "kit", space="t2m", clips=80)


@pytest.fixture(scope="module")
def native(folder):
    return load(folder, "kit", space="native", clips=60)


def motions(dataset, split="train", which=None):
    clips = dataset.splits[split] if which is None else datasets.half(dataset.splits[split], which)
    return [torch.from_numpy(clip.features) for clip in clips]


def sluggish(dataset):
    """What a poor generator might make: the other half of the clips, with a third of their movement."""
    return [motion.mean(0) + (motion - motion.mean(0)) / 3 for motion in motions(dataset, which=1)]


def fit(domains, folder, generated=None, spl="paper", losses=sw.LOSSES, **changes):
    """fit_motion_reward with few updates; generated: a list, or a function that makes it."""
    schedule = motion_reward.Training(spl_iterations=2, head_iterations=2, generated=10)
    schedule = schedule._replace(**{name: changes.pop(name) for name in schedule._fields if name in changes})
    options = dict(iterations=6, seed=0, cache_dir=folder, batch=24, use_cache=False, device="cpu",
                   saw="test", pairs=8, sizes=FEW)
    generated = sluggish(domains[-1])[:10] if generated is None else generated
    made = generated if callable(generated) else lambda count: generated
    return motion_reward.fit_motion_reward(domains, made, losses._replace(spl=sw.SPL[spl]), schedule,
                                           **{**options, **changes})


MIDDLE = dict(iterations=200, spl_iterations=12, head_iterations=200, batch=32, pairs=160, use_cache=True,
              sizes={**motion_reward.SIZES, "width": 32, "latent": 32, "ff": 64, "components": 48})


@pytest.fixture(scope="module")
def fitted(whole, folder, one_thread):
    """A small training that learns something: model, notes."""
    return fit([whole], folder, sluggish(whole), **MIDDLE)


def random_model(skeleton=T2M, k=0):
    """All weights at random, those of the adapters and the statistics too: zeros would hide a mistake."""
    vocabulary = datasets.Vocabulary(["a", "person", "walks", "turns", "left"])
    model, g = motion_reward.MotionReward(vocabulary, skeleton, **SMALL), generator(0, k, "weights")
    training.initialise(model, g)
    model.adapt(g)
    for number, parameter in enumerate(model.parameters()):
        parameter.data.add_(0.3 * normal(*parameter.shape, k=100 * k + number))
    for name, codec in model.codecs.items():
        width = representations.width(name, skeleton)
        codec.mean.copy_(0.1 * normal(width, k=k))
        codec.basis.copy_(torch.linalg.qr(normal(4 * width, SMALL["components"], k=k))[0])
    return freeze(model)


def batch_of(dataset, representation, lengths=(24, 12, 20, 8)):
    """Motions of equal padding, cut to lengths that differ."""
    part = torch.stack([motion[:24] for motion in motions(dataset)[:len(lengths)]])
    return from_features(part, representation, dataset.skeleton).clone(), torch.tensor(lengths)


def recordings(dataset, lengths=(8, 20, 12, 24)):
    """Clips of given lengths: those of batch_of, in the other order."""
    clips = dataset.splits["train"][:len(lengths)][::-1]
    return [replace(clip, features=clip.features[:n]) for clip, n in zip(clips, lengths)]


CAPTIONS = ["a person walks", "a person turns left", "walks", "an unknown word"]
ALL = dict(semantic=1.0, m2m=0.5, preference=0.2, authenticity=0.3)


def rewards(model, motion, lengths, captions, representation, weights=ALL, **more):
    """The reward (b), and each of its terms alone -> {"total" or term: (b)}"""
    alone = {name: {name: 1.0} for name in weights}
    return {name: sw.weighted_reward(model, representation, one, motion, lengths, captions, **more)
            for name, one in {"total": weights, **alone}.items()}


# ---- losses ------------------------------------------------------------------------------------------------


def stage_one(z=torch.zeros(4, 3), gauss_t=None, gauss_m=None, tokens=(torch.zeros(1, 1, 1),) * 3, **more):
    """semantic_loss where all terms are 0 that are not given."""
    normal = (torch.zeros_like(z),) * 2
    return sw.semantic_loss(z, z, gauss_t or normal, gauss_m or normal, *tokens, nce=0, **more)


def test_the_four_divergences_by_hand():
    """Text N(1, 1), motion N(0, 1): three divergences of 1/2 and one of 0, in any order of the arguments."""
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    for first, second in (((one, zero), (zero, zero)), ((zero, zero), (one, zero))):
        assert stage_one(zero, first, second).item() == pytest.approx(1.5e-5)
    wide = 0.5 * (4 - 1 - math.log(4)), 0.5 * (1 / 4 - 1 + math.log(4))  # KL(N(0,4)|N), KL(N|N(0,4))
    kl = stage_one(zero, (zero, math.log(4) * one), (zero, zero)).item()
    assert kl == pytest.approx(1e-5 * (2 * wide[0] + wide[1]))


def test_terms_of_the_first_stage():
    z_t, z_m, tokens = normal(4, 3), normal(4, 3, k=1), normal(4, 5, 6, k=2)
    gauss_t, gauss_m = (z_t, 0.1 * z_t), (z_m, 0.2 * z_m)
    duplicates = torch.eye(4, dtype=torch.bool)
    duplicates[0, 1] = duplicates[1, 0] = True
    rec = stage_one(tokens=(tokens + 0.5, tokens - 3, tokens)).item()
    assert rec == pytest.approx(0.125 + 2.5 + 3.0)
    cosines = F.normalize(z_t, dim=-1) @ F.normalize(z_m, dim=-1).T / 0.1
    cosines[duplicates & ~torch.eye(4, dtype=torch.bool)] = -math.inf  # the diagonal stays
    nce = -(cosines.log_softmax(1).diagonal() + cosines.log_softmax(0).diagonal()).mean() / 2
    loss = sw.semantic_loss(z_t, z_m, gauss_t, gauss_m, tokens + 0.5, tokens - 3, tokens, duplicates)
    rest = 1e-5 * F.smooth_l1_loss(z_t, z_m) + stage_one(gauss_t=gauss_t, gauss_m=gauss_m)
    torch.testing.assert_close(loss, rec + rest + nce)
    both = vae.gaussian_kl(*gauss_t, *gauss_m) + vae.gaussian_kl(*gauss_m, *gauss_t)
    cross = sw.cross_loss(z_t, z_m, gauss_t, gauss_m)
    torch.testing.assert_close(cross, 0.1 * F.smooth_l1_loss(z_t, z_m) + 1e-5 * both
                               + retrieval.info_nce(z_t, z_m))
    torch.testing.assert_close(sw.cross_loss(z_t, z_t, gauss_t, gauss_m, nce=0), 1e-5 * both)


def angles(*degrees):
    """Directions in the plane (b 2), by angle."""
    radians = torch.tensor(degrees) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], 1)


def test_spl_leaves_alone_what_is_found():
    """All rows rank first: no loss, no gradient. Nor where the own motion is among the first k."""
    text = angles(0.0, 90, 180, 270)
    for motion, k in ((angles(10.0, 80, 170, 280), 1), (angles(60.0, 45, 180, 270), 2)):
        motion = motion.requires_grad_()
        loss, _ = sw.spl_paper(text, motion, k)
        loss.backward()
        assert loss.item() == 0 and (motion.grad == 0).all()
    found, _ = sw.spl_code(text, angles(10.0, 80, 170, 280), 1)
    assert found.item() == pytest.approx(0, abs=1e-6)


def test_spl_by_hand():
    """Captions at 0, 90, 180 degrees; motion 0 is off by 60, and motion 1 nearer to caption 0 (40)."""
    text, motion = angles(0.0, 90, 180), angles(60.0, 40, 180).requires_grad_()
    similarity, fail, top = sw.mine(text, motion, 1)
    assert fail.tolist() == [True, True, False] and top.flatten().tolist() == [1, 0, 2]
    cos = [math.cos(math.radians(x)) for x in (40, 60, 30, 50)]
    margins = (cos[0] - cos[1]) / 0.1, (cos[2] - cos[3]) / 0.1
    each = [math.log1p(math.exp(m)) for m in margins]
    loss, failed = sw.spl_paper(text, motion, 1)
    assert torch.equal(failed, fail)
    assert loss.item() == pytest.approx(sum(each) / 3, rel=1e-5)  # over all rows, not only those that fail
    loss.backward()
    with torch.no_grad():  # a step against the gradient brings both motions nearer to their captions
        better = F.normalize(text, dim=1) @ F.normalize(motion - 0.01 * motion.grad, dim=1).T
    assert (better.diagonal()[:2] > similarity.diagonal()[:2]).all()


def test_spl_as_the_public_code_has_it():
    """Temperature twice; one high cosine anywhere makes a row fine; a fine row is pulled to a tie."""
    text, motion = angles(0.0, 90, 180), angles(60.0, 40, 180)
    similarity, fail, _ = sw.mine(text, motion, 1)
    for high, rows in ((0.9, [False, False, True]), (0.8, [False, True, True]), (0.7, [True, True, True])):
        assert (~sw.spl_code(text, motion, 1, high=high)[1]).tolist() == rows  # cos 40 is .77, cos 30 is .87
    cos = [math.cos(math.radians(x)) for x in (40, 60, 30, 50)]
    margins = (cos[0] - cos[1]) / 0.01, (cos[2] - cos[3]) / 0.01
    loss, _ = sw.spl_code(text, motion, 1, high=0.9)
    assert loss.item() == pytest.approx(sum(margins) / 3, rel=1e-4)  # softplus of that much is the number
    tie, _ = sw.spl_code(text, motion, 1, high=0.7)
    wanted = sum(-math.log(2) + m / 2 for m in margins) / 3  # KL((1/2, 1/2) | (1, exp(-m)))
    assert tie.item() == pytest.approx(wanted, rel=1e-4)


def test_losers_are_other_motions_that_do_not_fit_the_caption():
    text, motion = normal(12, 4), normal(12, 4, k=1)
    duplicates = torch.zeros(12, 12, dtype=torch.bool)
    duplicates[0, 1] = duplicates[1, 0] = duplicates[3, 7] = duplicates[7, 3] = True
    for filtered in (None, duplicates, duplicates | torch.eye(12, dtype=torch.bool)):
        similarity, fail, top = sw.mine(text, motion, 2, filtered)
        assert fail.any() and not fail.all()
        for row in fail.nonzero().flatten().tolist():
            assert row not in top[row].tolist()
            assert filtered is None or not filtered[row, top[row, 0]]
    # the one motion that stands in the way means the same: nothing is mined, and nothing pushed
    text, motion = angles(0.0, 5, 180), angles(60.0, 5, 180).requires_grad_()
    same = torch.zeros(3, 3, dtype=torch.bool)
    assert sw.spl_paper(text, motion, 1)[0].item() > 0
    same[0, 1] = same[1, 0] = True
    loss, _ = sw.spl_paper(text, motion, 1, same)
    loss.backward()
    assert loss.item() == 0 and (motion.grad == 0).all()


@pytest.mark.parametrize("k", (0, 4, 5))
def test_the_first_k_are_fewer_than_all(k):
    with pytest.raises(ValueError, match="nothing would ever fail"):
        sw.spl_paper(normal(4, 3), normal(4, 3, k=1), k)


def test_class_0_is_real():
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    model = SimpleNamespace(answer=lambda *asked: logits)
    p_real = motion_reward.MotionReward.score(model, "authenticity", None, None, "features")
    torch.testing.assert_close(p_real, torch.sigmoid(torch.tensor([2.0, -3.0])))
    right, wrong = (sw.authenticity_loss(logits, torch.tensor(generated))
                    for generated in ([False, True], [True, False]))
    assert right.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-3))) / 2)
    assert right < 0.1 < 2 < wrong


def test_the_better_motion_should_score_higher():
    better, worse = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    wanted = (math.log1p(math.exp(-1)) + math.log1p(math.exp(3))) / 2
    assert sw.ranking_loss(better, worse).item() == pytest.approx(wanted)
    assert sw.ranking_loss(-1000 * better, worse).isfinite()


# ---- network -----------------------------------------------------------------------------------------------


@each
def test_padding_and_neighbours_have_no_say(representation, kit, native):
    """Values and gradients of every term of the reward, whatever stands after the ends."""
    for dataset in (kit, native):
        model = random_model(dataset.skeleton)
        motion, lengths = batch_of(dataset, representation)
        more = dict(clips=recordings(dataset), level=0.3)
        outside = ~length_mask(lengths, 24)[..., None]
        results = []
        for garbage in (None, 0.0, 1e3, float("nan"), float("inf")):
            x = motion.clone() if garbage is None else motion.masked_fill(outside, garbage)
            if garbage is not None:
                x = torch.cat([x, torch.full((4, 9, x.shape[-1]), garbage)], 1)
            x.requires_grad_()
            terms = rewards(model, x, lengths, CAPTIONS, representation, **more)
            terms["total"].sum().backward()
            assert (x.grad[:, :24].masked_select(outside) == 0).all() and (x.grad[:, 24:] == 0).all()
            results.append((terms, x.grad[:, :24]))
        assert set(results[0][0]) == {*ALL, "total"}
        inside = length_mask(lengths, 24)
        assert (results[0][1].abs().sum(-1)[inside] > 0).all()  # every real frame counts
        for terms, gradient in results[1:]:
            torch.testing.assert_close(gradient, results[0][1])
            for name, value in terms.items():
                torch.testing.assert_close(value, results[0][0][name])
        alone = [rewards(model, motion[k:k + 1, :n], lengths[k:k + 1], CAPTIONS[k:k + 1], representation,
                         level=0.3, clips=more["clips"][k:k + 1])
                 for k, n in enumerate(lengths.tolist())]
        for name in ALL:
            torch.testing.assert_close(torch.cat([row[name] for row in alone]), results[0][0][name])


def test_frames_that_fill_no_patch_are_left_out(kit):
    model, (motion, lengths) = random_model(), batch_of(kit, "features")
    longer = torch.cat([motion, motion], 1)
    torch.testing.assert_close(model.embed_motion(longer, lengths + 3),
                               model.embed_motion(longer, lengths), rtol=0, atol=1e-6)
    for bad in ([24, 3, 8, 8], [25, 8, 8, 8]):
        with pytest.raises(ValueError, match="are not 4 to 24 frames"):
            model.embed_motion(motion, torch.tensor(bad))
    with pytest.raises(ValueError, match="joints of width 263, this model reads 66"):
        model.embed_motion(motion, lengths, "joints")


def test_widths_of_both_skeletons():
    for skeleton in (T2M, KIT):
        model = random_model(skeleton)
        for name in REPRESENTATIONS:
            motion = normal(2, 8, representations.width(name, skeleton))
            assert model.embed_motion(motion, torch.tensor([8, 4]), name).shape == (2, SMALL["latent"])


def test_the_latent_is_the_mean_and_has_no_chance_in_it(kit):
    model, (motion, lengths) = random_model(), batch_of(kit, "features")
    mean, logvar = model.encode(*model.tokenise(motion, lengths, "features"), "features")
    assert torch.equal(model.embed_motion(motion, lengths), mean) and not torch.equal(mean, logvar)
    assert torch.equal(model.embed_motion(motion, lengths), mean)
    cosine = F.cosine_similarity(mean, model.embed_text(CAPTIONS), dim=-1)
    reward = sw.weighted_reward(model, "features", {"semantic": 1.0}, motion, lengths, CAPTIONS)
    assert torch.equal(reward, cosine)
    model.train()  # there is nothing in it that training mode would change
    assert torch.equal(model.embed_motion(motion, lengths), mean)


def test_text():
    model = random_model()
    together = model.embed_text(CAPTIONS)
    for caption, row in zip(CAPTIONS, together):
        torch.testing.assert_close(model.embed_text([caption])[0], row)
    assert (together[0] - together[1]).abs().max() > 1e-3
    order = model.embed_text(["a person turns left", "left turns person a"])
    assert (order[0] - order[1]).abs().max() > 1e-3
    assert torch.isfinite(model.embed_text([""])).all()


def test_the_time_token_acts_and_none_is_clean(kit):
    model, (motion, lengths) = random_model(), batch_of(kit, "features")
    clean = model.embed_motion(motion, lengths)
    assert torch.equal(clean, model.embed_motion(motion, lengths, level=torch.zeros(4)))
    levels = torch.tensor([0.0, 0.02, 0.2, 1.0])
    apart = (model.embed_motion(motion, lengths, level=levels) - clean).abs().amax(1)
    assert apart[0] == 0 and (apart[1:] > 1e-4).all()
    tokens = model.tokenise(motion, lengths, "features")
    for head in motion_reward.HEADS:
        noisy, before = (model.score(head, *tokens, "features", *level) for level in ((levels,), ()))
        assert noisy[0] == before[0] and (noisy[1:] != before[1:]).all()
    own = recordings(kit, (24, 12, 20, 8)[::-1])[::-1]
    reward, before = (rewards(model, motion, lengths, CAPTIONS, "features", clips=own, level=level)
                      for level in (0.2, 0.0))
    for name in ALL:
        assert (reward[name] != before[name]).all()
    assert before["m2m"].min().item() == pytest.approx(1)  # real motions are clean: only then the same


def test_skips_join_the_ends_of_the_encoder():
    encoder = random_model().backbone.encoder
    assert len(encoder.skips) == 1
    x, mask = normal(2, 5, SMALL["width"]), torch.ones(2, 5, dtype=torch.bool)
    before = encoder(x, mask)[0]
    encoder.skips[0].weight.data[:, SMALL["width"]:] = 0.0  # the half that the first layer comes in by
    assert (encoder(x, mask)[0] - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="odd"):
        motion_reward.LatentEncoder(16, 8, 2, 2, 16)


def test_heads_have_the_published_shape():
    latent = SMALL["latent"]
    for name, out in (("preference", 1), ("authenticity", 2)):
        linears = [layer for layer in random_model().heads[name] if isinstance(layer, torch.nn.Linear)]
        assert [layer.out_features for layer in linears] == [2 * latent, latent, latent // 2, out]


# ---- adapters ----------------------------------------------------------------------------------------------


@each
def test_semantics_know_nothing_of_the_adapters(representation, kit):
    """Bit for bit, before, between and after calls of the heads."""
    model, (motion, lengths) = random_model(), batch_of(kit, representation)
    bare = random_model()
    for layer in lora.adapters(bare).values():
        layer.B.data.zero_()
    wanted = bare.embed_motion(motion, lengths, representation)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert torch.equal(model.embed_motion(motion, lengths, representation), wanted)
    for name in ("preference", "authenticity"):
        adapted = model.embed_motion(motion, lengths, representation, head=name)
        assert (adapted - wanted).abs().max() > 1e-2
        assert torch.equal(model.embed_motion(motion, lengths, representation), wanted)
        at_rest = bare.embed_motion(motion, lengths, representation, head=name)  # B = 0
        torch.testing.assert_close(at_rest, wanted)
    with pytest.raises(RuntimeError):
        model.embed_motion(motion, lengths, representation, head="preference", level=torch.zeros(9))
    assert torch.equal(model.embed_motion(motion, lengths, representation), wanted)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_adapters_are_separate(kit):
    model, (motion, lengths) = random_model(), batch_of(kit, "features")
    names = ("preference", "authenticity")
    before = [model.embed_motion(motion, lengths, head=name) for name in names]
    assert (before[0] - before[1]).abs().max() > 1e-2
    lora.parameters(model.adapted["preference"])[1].data.add_(1.0)
    after = [model.embed_motion(motion, lengths, head=name) for name in names]
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_the_heads_share_the_backbone_and_adapt_the_chosen_layers(kit):
    model, (motion, lengths) = random_model(), batch_of(kit, "features")
    own = model.adapted["preference"]
    names = list(lora.adapters(own))
    assert {name.split(".")[-1] for name in names} == {
        "q", "k", "v", "out_proj", "linear1", "linear2", "0", "2"}
    assert len(names) == 3 * 6 + 3 * 2
    assert {layer.scaling for layer in lora.adapters(own).values()} == {SMALL["alpha"] / SMALL["rank"]}
    shared = {id(p) for p in model.backbone.parameters()}
    new = [p for p in own.parameters() if id(p) not in shared]
    assert {id(p) for p in new} == {id(p) for p in lora.parameters(own)}
    assert len(list(own.parameters())) == len(shared) + len(new)
    # So what the backbone learns, the heads read too.
    before = [model.embed_motion(motion, lengths, head=head) for head in motion_reward.HEADS]
    model.backbone.encoder.head.weight.data.add_(1.0)
    after = [model.embed_motion(motion, lengths, head=head) for head in motion_reward.HEADS]
    assert not any(map(torch.equal, before, after))


# ---- reward ------------------------------------------------------------------------------------------------


@each
def test_the_reward_is_the_weighted_sum_of_its_terms(representation, kit):
    model, (motion, lengths) = random_model(), batch_of(kit, representation)
    row = REPRESENTATIONS.index(representation)
    model.preference_mean[row], model.preference_std[row] = 0.5, 2.0
    terms = rewards(model, motion, lengths, CAPTIONS, representation, clips=recordings(kit))
    z = model.embed_motion(motion, lengths, representation)
    torch.testing.assert_close(terms["semantic"], F.cosine_similarity(z, model.embed_text(CAPTIONS)))
    torch.testing.assert_close(terms["m2m"], F.cosine_similarity(z, z.flip(0)))
    score = model.heads["preference"](model.embed_motion(motion, lengths, representation,
                                                         head="preference"))[:, 0]
    torch.testing.assert_close(terms["preference"], (score - 0.5) / 2)
    logits = model.heads["authenticity"](model.embed_motion(motion, lengths, representation,
                                                            head="authenticity"))
    torch.testing.assert_close(terms["authenticity"], logits.softmax(1)[:, 0])
    total = sum(weight * terms[name] for name, weight in ALL.items())
    torch.testing.assert_close(terms["total"], total)


def test_terms_without_weight_are_not_computed(kit, monkeypatch):
    model, (motion, lengths) = random_model(), batch_of(kit, "features")
    monkeypatch.setattr(model, "score", None)
    reward = sw.weighted_reward(model, "features", {"semantic": 2.0}, motion, lengths, CAPTIONS)
    z = model.embed_motion(motion, lengths)
    assert torch.equal(reward, 2 * F.cosine_similarity(z, model.embed_text(CAPTIONS), dim=-1))


def test_an_exported_model_is_the_same():
    model, before = random_model(KIT), torch.get_rng_state()
    again = freeze(motion_reward.MotionReward.load(model.export()))
    assert torch.equal(torch.get_rng_state(), before)
    assert again.skeleton is KIT and again.config == model.config
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


# ---- training ----------------------------------------------------------------------------------------------


def test_captions_find_new_motions_in_every_representation(fitted, whole):
    """Clips of the judge's half, in pools of 32: chance is .03."""
    model, notes = fitted
    scores = motion_reward.retrieval_of(model, datasets.half(whole.splits["train"], 1))
    for name in REPRESENTATIONS:
        assert scores[name]["pool"] == 32 and scores[name]["R1_same"] > 0.3 and scores[name]["R3"] > 0.3
    assert set(notes["before"]) == set(notes["after"]) == set(REPRESENTATIONS)
    assert notes["before"] != notes["after"] and 0 < notes["spl"]["failed"] < 1
    # one clip lies at one place, however it is written
    motion, lengths = batch_of(whole, "features", (24,) * 12)
    places = [F.normalize(model.embed_motion(from_features(motion, name, T2M), lengths, name), dim=1)
              for name in REPRESENTATIONS]
    for other in places[1:]:
        similarity = places[0] @ other.T
        assert similarity.diagonal().mean() > similarity.mean() + 0.2
        assert (similarity.argmax(1) == torch.arange(12)).float().mean() > 0.5


def test_damaged_copies_score_lower(fitted, whole):
    """Clips of the test and val splits, which training never saw, in every representation."""
    model, notes = fitted
    real = motions(whole, "test") + motions(whole, "val")
    accuracy = motion_reward.preference_accuracy(model, real, seed=1)
    assert set(accuracy) == set(notes["preference"]) == set(REPRESENTATIONS)
    for name, shares in accuracy.items():
        assert set(shares) == set(notes["preference"][name]) == {*motion_reward.KNOWN, "warp"}
        assert np.mean([shares[damage] for damage in motion_reward.KNOWN]) > 0.57, name


@each
def test_the_base_s_motions_have_scores_of_mean_0_and_spread_1(representation, fitted, whole):
    model, notes = fitted
    scores = []
    for motion in sluggish(whole):
        lengths, motion = torch.tensor([len(motion)]), from_features(motion[None], representation, T2M)
        scores.append(sw.weighted_reward(model, representation, {"preference": 1.0}, motion, lengths, ["x"]))
    scores = torch.cat(scores)
    assert scores.mean().item() == pytest.approx(0, abs=1e-3)
    assert scores.std().item() == pytest.approx(1, abs=1e-3)
    assert notes["preference_scale"] == [model.preference_mean.tolist(), model.preference_std.tolist()]
    assert model.preference_std.min() > 0


def test_recordings_are_told_from_generated_motions(fitted, whole):
    model, notes = fitted
    assert set(notes["authenticity"]) == set(REPRESENTATIONS) and min(notes["authenticity"].values()) > 0.6
    real, made = motions(whole, "test") + motions(whole, "val"), sluggish(whole)[4::5]
    for name in REPRESENTATIONS:
        values = [torch.cat([sw.weighted_reward(model, name, {"authenticity": 1.0}, from_features(
            motion[None], name, T2M), torch.tensor([len(motion)]), ["x"]) for motion in side])
                  for side in (real, made)]
        assert values[0].mean() > values[1].mean() + 0.15, name
    columns = model.columns(real[0][None], torch.tensor([len(real[0])]), ["x"], [None])
    terms = rewards(model, real[0][None], torch.tensor([len(real[0])]), ["x"], "features",
                    {"preference": 1.0, "authenticity": 1.0})
    assert columns == {name: terms[name].double().numpy() for name in motion_reward.HEADS}


def test_what_is_fitted_is_frozen(fitted, whole):
    model, _ = fitted
    motion, lengths = batch_of(whole, "features")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    motion.requires_grad_()
    terms = rewards(model, motion, lengths, CAPTIONS, "features", clips=recordings(whole))
    for name, value in terms.items():
        gradient, = torch.autograd.grad(value.sum(), motion, retain_graph=True)
        assert gradient.abs().sum() > 0, name
    terms["total"].sum().backward()
    assert not model.training and all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_heads_leave_the_backbone_alone(fitted, whole, folder, monkeypatch):
    """The model without heads, out of the cache, has the same weights but for theirs."""
    def never(*args, **options):
        raise RuntimeError("trained again")
    monkeypatch.setattr(motion_reward, "initialise", never)
    bare, notes = fit([whole], folder, [], **{**MIDDLE, "head_iterations": 0})
    assert "preference" not in notes
    changed = {key for key, value in fitted[0].state_dict().items()
               if not torch.equal(value, bare.state_dict()[key])}
    assert {key.split(".")[0] for key in changed} == {"heads", "adapted", "preference_mean", "preference_std"}
    assert {key.split(".")[-1] for key in changed if key.startswith("adapted")} == {"A", "B"}
    still = {key for key in bare.state_dict() if key.startswith("heads") or key.endswith((".A", ".B"))}
    assert still - changed == {"heads.preference.6.bias"}  # a constant cancels in pairs


def test_training_repeats_itself_and_leaves_the_global_stream_alone(kit, folder):
    before = torch.get_rng_state()
    model, notes = fit([kit], folder)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again, same = fit([kit], folder)
    assert notes == same
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    _, other = fit([kit], folder, seed=1)
    assert other["stage 1"] != notes["stage 1"]


def test_heads_take_the_representations_in_turn(native, folder, monkeypatch):
    """KIT-ML's own skeleton. A head sees one of them at a time, and is asked for all of them later."""
    seen, answer = [], motion_reward.MotionReward.answer

    def spy(self, name, tokens, mask, representation, level=None):
        if self.heads[name][0].weight.requires_grad:  # in training
            seen.append((name, representation))
        return answer(self, name, tokens, mask, representation, level)
    monkeypatch.setattr(motion_reward.MotionReward, "answer", spy)
    model, notes = fit([native], folder / "native", head_iterations=4)
    assert seen == [(name, representation) for name in ("preference", "authenticity")
                    for representation in (*REPRESENTATIONS, REPRESENTATIONS[0])]
    assert model.skeleton is KIT
    for representation in REPRESENTATIONS:
        motion, lengths = batch_of(native, representation)
        weights = dict(semantic=1.0, preference=1.0)
        assert sw.weighted_reward(model, representation, weights, motion, lengths, CAPTIONS).isfinite().all()


def test_the_cache_is_read_and_keyed_by_all_that_shaped_it(kit, native, tmp_path, monkeypatch, capsys):
    generated, other = sluggish(kit)[:10], replace(kit, fingerprint="other")
    model, notes = fit([kit], tmp_path, generated, use_cache=True)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [
        "  motion reward", "  accuracy on held-out motions", "  preference by damage"]
    assert "features 0." in printed[0] and "rotations 0." in printed[0] and " -> " in printed[0]
    shares = [np.mean([notes["preference"][name][damage] for damage in motion_reward.KNOWN])
              for name in REPRESENTATIONS]
    said = [part.split("preference ")[1][:4] for part in printed[1].split("; ")]
    assert said == [f"{share:.2f}" for share in shares]
    assert printed[1].count("(new damage ") == printed[1].count("authenticity ") == 3
    jitter = np.mean([notes["preference"][name]["jitter"] for name in REPRESENTATIONS])
    assert f": jitter {jitter:.2f}, slide " in printed[2] and "warp" not in printed[2]

    def never(*args, **options):
        raise RuntimeError("trained again")
    monkeypatch.setattr(motion_reward, "preference_accuracy", never)
    other_head = sw.LOSSES._replace(preference=lambda better, worse: (worse - better).mean())
    for changes in (dict(saw=["test", 9]), dict(head_iterations=3), dict(pairs=9), dict(saw="other"),
                    dict(losses=other_head)):
        with pytest.raises(RuntimeError, match="trained again"):
            fit([kit], tmp_path, **{"generated": generated, "use_cache": True, **changes})
    monkeypatch.setattr(motion_reward, "initialise", never)
    again, same = fit([kit], tmp_path, generated, use_cache=True)
    assert notes == same
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    for changes in (dict(iterations=7), dict(spl="code"), dict(spl_iterations=3), dict(seed=1),
                    dict(batch=25), dict(sizes={**FEW, "rank": 4}),
                    dict(use_cache=False), dict(domains=[kit, kit]), dict(target=other),
                    dict(domains=[native]), dict(noise=lambda *batch: batch[0])):
        with pytest.raises(RuntimeError, match="trained again"):
            domains = changes.pop("domains", [kit])
            fit(domains, tmp_path, **{"generated": generated, "use_cache": True, **changes})


def test_generated_motions_may_be_made_when_they_are_needed(kit, tmp_path):
    made = []

    def generated(count):
        made.append(count)
        return sluggish(kit)[:count]
    model, notes = fit([kit], tmp_path, generated, use_cache=True)
    again, same = fit([kit], tmp_path, generated, use_cache=True)
    assert made == [10] and notes == same


def test_the_judge_s_half_is_never_read(kit, folder, monkeypatch):
    """Half 1 of train; of the splits for measuring, the val split of the last domain alone."""
    seen, real, generated = [], datasets.half, sluggish(kit)[:10]

    def half(clips, which):
        seen.append((clips[0].name, which))
        return real(clips, which)
    monkeypatch.setattr(datasets, "half", half)
    other = {clip.name for clip in real(kit.splits["train"], 1)}
    train = [replace(clip, captions=["zebra"] * len(clip.captions)) if clip.name in other else clip
             for clip in kit.splits["train"]]
    model, _ = fit([replace(kit, splits={**kit.splits, "train": train, "test": None})], folder, generated)
    assert {which for _, which in seen} == {0} and "zebra" not in model.vocabulary.words


def test_motions_are_drawn_for_train_captions(kit, native):
    """Of all domains, with the clips' own lengths."""
    asked = []

    def sampler(captions, lengths, purpose, repeat):
        asked.append((captions, lengths))
        return torch.arange(9.0)[:, None, None].expand(9, 196, 5), lengths
    made = motion_reward.draw_motions(sampler, [kit, native], 9, seed=0)
    known = {(caption, len(clip.features)) for domain in (kit, native) for clip in domain.splits["train"]
             for caption in clip.captions}
    captions, lengths = asked[0]
    assert set(zip(captions, lengths.tolist())) <= known and len(set(captions)) > 3
    assert [row.shape for row in made] == [(n, 5) for n in lengths] and made[3][0, 0] == 3
    motion_reward.draw_motions(sampler, [kit, native], 9, seed=0)
    assert asked[1][0] == captions


def test_recordings_are_those_of_all_domains(kit, folder, monkeypatch):
    """Otherwise the domain would tell what is real."""
    seen, train = [], motion_reward.train_authenticity

    def spy(model, real, generated, *args, **options):
        seen.append((real, generated))
        return train(model, real, generated, *args, **options)
    monkeypatch.setattr(motion_reward, "train_authenticity", spy)
    other = replace(kit, fingerprint="other", splits={**kit.splits, "train": kit.splits["train"][:60]})
    generated = sluggish(kit)[:10]
    fit([other, kit], folder, generated)
    real, made = seen[0]
    wanted = sorted(motion.sum().item() for part in (other, kit) for motion in motions(part, which=0))
    assert sorted(motion.sum().item() for motion in real) == wanted
    kept = [motion for k, motion in enumerate(generated) if k not in (4, 9)]
    assert all(torch.equal(*pair) for pair in zip(made, kept, strict=True))


def test_every_second_batch_ties_two_representations_of_the_same_clips(kit, folder, monkeypatch):
    drawn, tied, motion = [], [], motion_reward.Library.motion

    def spy(self, rows, name):
        drawn.append((rows, name))
        return motion(self, rows, name)

    def counted(z_a, z_b, *gauss):
        tied.append(len(drawn))
        assert z_a.shape == z_b.shape and z_a.requires_grad and z_b.requires_grad
        return sw.cross_loss(z_a, z_b, *gauss)
    monkeypatch.setattr(motion_reward.Library, "motion", spy)
    fit([kit], folder, spl="off", head_iterations=0, losses=sw.LOSSES._replace(cross=counted))
    f, j, r = REPRESENTATIONS
    assert [name for _, name in drawn] == [f, j, f, r, f, j, j, r, f] and tied == [3, 6, 9]
    assert all(torch.equal(drawn[k - 2][0], drawn[k - 1][0]) for k in tied)
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_noise_comes_to_half_of_the_batches_of_one_representation(kit, folder, monkeypatch):
    calls, levels, encode = [], [], motion_reward.MotionReward.encode

    def noise(motion, lengths, level, g):
        assert motion.shape[-1] == 66 and motion.shape[0] == len(lengths) == len(level) == 24
        calls.append(level)
        return motion + level[:, None, None] * torch.randn(motion.shape, generator=g)

    def spy(self, tokens, mask, representation, level=None, head=None):
        if self.words.weight.requires_grad:
            levels.append((representation, level))
        return encode(self, tokens, mask, representation, level, head)
    monkeypatch.setattr(motion_reward.MotionReward, "encode", spy)
    fit([kit], folder, iterations=60, spl_iterations=0, head_iterations=0, representation="joints",
        noise=noise)
    assert 5 <= len(calls) <= 15  # 20 batches of joints in turn
    level = torch.cat(calls)
    assert level.min() > 0 and 0.9 < level.max() <= 1 and abs(level.mean() - 0.5) < 0.1
    given = [level for representation, level in levels if level is not None]
    assert len(given) == len(calls) and all(torch.equal(*pair) for pair in zip(given, calls))
    assert {name for name, level in levels if level is not None} == {"joints"}


def test_spl_mines_with_the_current_weights_and_can_be_left_out(kit, folder, monkeypatch):
    seen = []

    def spy(text, motion, k, duplicates):
        seen.append((len(text), k, duplicates))
        return sw.spl_paper(text, motion, k, duplicates)
    monkeypatch.setitem(sw.SPL, "paper", spy)
    _, notes = fit([kit], folder, head_iterations=0)
    assert [(b, k) for b, k, _ in seen] == [(24, 2)] * 2  # K about B / 12
    assert all(duplicates.diagonal().all() and duplicates.shape == (24, 24) for _, _, duplicates in seen)
    for changes in (dict(spl="off"), dict(spl_iterations=0)):
        _, notes = fit([kit], folder, head_iterations=0, **changes)
        assert notes["before"] == notes["after"] and "spl" not in notes and len(seen) == 2


def test_the_held_out_damage_is_never_trained_on(kit, folder, monkeypatch):
    used, make_pairs = {}, perception.make_pairs

    def spy(motions, count, names, grades, skeleton, vq, seed, purpose):
        used[purpose] = list(names)
        return make_pairs(motions, count, names, grades, skeleton, vq, seed, purpose)
    monkeypatch.setattr(perception, "make_pairs", spy)
    fit([kit], folder)
    assert used.pop("preference pairs") == ["jitter", "slide", "freeze", "rush", "bones", "float"]
    assert list(used.values()) == [[name] for name in [*motion_reward.KNOWN, "warp"]]


@each
def test_pairs_differ_by_the_damage_alone(representation, kit):
    """Also by the height over the floor, which common/features.py takes out of joints."""
    model = random_model()
    real = motions(kit)[:3]
    pairs = {name: motion_reward.damage_pairs(model, real, 3, [name], ((0, 3),), 0, "test")[representation]
             for name in ("jitter", "float", "bones")}
    for name, (better, worse) in pairs.items():
        assert [row.shape for row in better] == [row.shape for row in worse]
        apart = [(one - other).abs().max() for one, other in zip(better, worse)]
        if (name, representation) == ("bones", "rotations"):
            assert max(apart) < 0.05  # they know no lengths; the hips' widths turn the heading a little
        else:
            assert min(apart) > 0.03, name
    torch.testing.assert_close(pairs["jitter"][0], pairs["float"][0])
    shake = [torch.cat(side).diff(dim=0).norm() for side in pairs["jitter"]]
    assert shake[0] < shake[1]  # the first of a pair is the better one


def test_real_and_generated_are_cut_to_equal_lengths(kit):
    model, real = random_model(), motions(kit)[:20]
    made = [torch.full((n, 263), 1.0) for n in range(40, 140, 5)]
    tokens, mask = motion_reward.crops(model, real, made, "features", generator(0, 0, "test"))
    counts = mask.sum(1)
    assert len(tokens) == 40 and torch.equal(counts[:20], counts[20:]) and counts.min() >= 8  # 1.6 s
    assert all(count <= min(len(one), len(other)) // 4 for count, one, other in zip(counts, real, made))
    constant = tokens[20:][mask[20:]]
    torch.testing.assert_close(constant, constant[:1].expand_as(constant))  # the second half is generated


@pytest.mark.parametrize("stage", ("stage 1, iteration 0", "preference, iteration 0",
                                   "authenticity, iteration 0"))
def test_losses_that_are_not_finite_stop_the_training(stage, kit, folder, monkeypatch):
    name = {"s": "semantic", "p": "preference", "a": "authenticity"}[stage[0]]
    losses = sw.LOSSES._replace(**{name: lambda *args: getattr(sw.LOSSES, name)(*args) * math.nan})
    with pytest.raises(NonFiniteError, match=f"motion reward, {stage}: loss nan"):
        fit([kit], folder, losses=losses)


def test_spl_says_where_its_equations_are_from():
    said = inspect.getdoc(sw.spl_paper)
    assert "public notes" in said and "[ET] eq. 14 to 17" in said
