"""The synthetic perception score: masks, damages, ranking, training; and MotionCritic's published weights.

Golden reference values of MotionCritic are in tests/parity/pareto.py.
"""
import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common import (
    InputError, NonFiniteError, datasets, features, freeze, generator, length_mask, perception, published,
    tokenizer, training)
from common.embedded import damages
from common.published import motion_critic
from pareto_motion import ranking_loss

KIT, T2M, CPU = features.KIT, features.T2M, torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, k=0):
    return torch.randn(*shape, generator=generator(0, k, "test"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perception")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # real data in the repository play no part
        return datasets.load_dataset("kit", space="native", clips=240, seed=0, cache_dir=folder)


@pytest.fixture(scope="module")
def vq(data, one_thread):
    vq = tokenizer.VQVAE(251, 24, 16, 64, 1)
    training.initialise(vq, generator(0, 0, "tokenizer"))
    tokenizer.train_tokenizer(vq, data.splits["train"], KIT, iterations=120, lr=3e-3, batch=16,
                              patch_weight=1.0, seed=0, device="cpu")
    return freeze(vq)


def random_critic(skeleton=KIT):
    """With embeddings and statistics of its own: zeros would hide what depends on them."""
    critic = perception.PerceptionCritic(skeleton)
    for k, value in enumerate(critic.state_dict().values()):
        value.copy_(normal(*value.shape, k=k) * 0.3)
    critic.std.abs_().add_(0.5)
    return freeze(critic)


def real_motions(data, count=4):
    """Batch of test clips, cut to lengths that differ."""
    part = datasets.collate(data.splits["test"][:count])
    lengths = torch.tensor([24, 12, 20, 8, 16, 4][:count])
    return part.motion[:, :24], lengths


# ---- the critic --------------------------------------------------------------------------------------------


def test_padding_and_neighbours_have_no_say(data):
    """In attention, mean, statistics and integration over time; whatever stands behind the ends."""
    critic, (motion, lengths) = random_critic(), real_motions(data)
    outside = ~length_mask(lengths, 24)[..., None]
    alone = torch.cat([critic.score(row[None, :n], n[None]) for row, n in zip(motion, lengths)])
    assert alone.std() > 1e-3
    for garbage in (0.0, 1e3, float("nan"), float("inf")):
        x = torch.cat([motion.masked_fill(outside, garbage), torch.full((4, 9, 251), garbage)], 1)
        torch.testing.assert_close(critic.score(x, lengths), alone, rtol=0, atol=1e-5)
        joints = perception.metres(motion, KIT).masked_fill(outside[..., None], garbage)
        torch.testing.assert_close(critic.score_joints(joints, lengths), alone, rtol=0, atol=1e-5)


def test_frames_that_fill_no_patch_are_left_out(data):
    critic, (motion, _) = random_critic(), real_motions(data)
    short, long = torch.tensor([8, 12, 16, 20]), torch.tensor([11, 13, 18, 23])
    torch.testing.assert_close(critic.score(motion[:, :23], long), critic.score(motion, short))
    with pytest.raises(InputError, match="3 frames is too short"):
        critic.score(motion, torch.tensor([8, 3, 8, 8]))


def test_every_frame_counts_and_gradients_reach_the_features(data):
    """Also where padding is not a number."""
    critic, (motion, lengths) = random_critic(), real_motions(data)
    inside = length_mask(lengths, 24)
    x = motion.masked_fill(~inside[..., None], float("nan")).requires_grad_()
    critic.score(x, lengths).sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad[~inside] == 0).all()
    assert (x.grad[inside].abs().sum(-1) > 0).all()
    assert not any(p.requires_grad for p in critic.parameters())


def test_the_place_on_the_floor_does_not_matter_but_the_height_does(data):
    critic, (motion, lengths) = random_critic(), real_motions(data)
    joints = perception.metres(motion, KIT)
    score = critic.score_joints(joints, lengths)
    torch.testing.assert_close(critic.score_joints(joints + torch.tensor([3.0, 0.0, -2.0]), lengths), score,
                               rtol=0, atol=1e-4)
    assert ((critic.score_joints(joints + torch.tensor([0.0, 0.3, 0.0]), lengths) - score).abs() > 1e-4).all()


def test_inputs_are_joints_and_their_velocities():
    joints = torch.zeros(1, 4, 21, 3)
    joints[0, :, :, 0] = torch.arange(4.0)[:, None] * 0.1 + 5  # 10 cm a frame at 12.5 frames a second
    joints[..., 1] = 0.9
    x = random_critic().inputs(joints)[0, :, 0]
    torch.testing.assert_close(x[:, 0], torch.arange(4.0) * 0.1, rtol=0, atol=1e-5)
    torch.testing.assert_close(x[:, 1], torch.full((4,), 0.9))
    torch.testing.assert_close(x[:, 3], torch.tensor([0.0, 1.25, 1.25, 1.25]), rtol=0, atol=1e-4)


def test_both_skeletons_are_scored():
    for skeleton in (KIT, T2M):
        score = random_critic(skeleton).score(0.1 * normal(2, 8, skeleton.feature_dim), torch.tensor([8, 4]))
        assert score.shape == (2,) and torch.isfinite(score).all()


# ---- damages -----------------------------------------------------------------------------------------------


def walk(data, t=36):
    clips = [clip for clip in data.splits["train"] if len(clip.features) >= t]
    return torch.from_numpy(clips[0].features[:t])


def damage(name, data, grade, k=0, vq=None):
    motion = walk(data)
    return perception.metres(motion, KIT), perception.damaged(
        name, motion, grade, generator(0, k, "test"), KIT, vq)


def bone_lengths(joints):
    return (joints[:, 1:] - joints[:, list(KIT.parents[1:])]).norm(dim=-1)  # t j-1


@pytest.mark.parametrize("name", perception.DAMAGES)
def test_damages_keep_the_length_repeat_and_grow(name, data, vq):
    """A pure function of its generator; averaged over draws, a higher grade is further from the original."""
    apart = []
    for grade in (1, 2, 3):
        distance = []
        for k in range(6):
            joints, damaged = damage(name, data, grade, k, vq)
            assert damaged.shape == joints.shape and torch.isfinite(damaged).all()
            assert torch.equal(damaged, damage(name, data, grade, k, vq)[1])
            distance.append((damaged - joints).norm(dim=-1).mean().item())
        assert min(distance) > 0
        apart.append(np.mean(distance))
    assert apart[0] < apart[1] < apart[2]
    joints, same = damage(name, data, 0, 0, vq)
    assert torch.equal(joints, same)


def test_jitter_has_the_size_it_says(data):
    for grade, size in ((1, 0.01), (2, 0.02), (3, 0.04)):
        joints, damaged = damage("jitter", data, grade)
        assert (damaged - joints).std().item() == pytest.approx(size, rel=0.05)


def test_slide_moves_the_whole_body_where_a_foot_stands(data):
    joints, damaged = damage("slide", data, 2)
    moved = damaged - joints
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-5)  # all joints alike
    assert (moved[..., 1] == 0).all()
    step = moved[:, 0].diff(dim=0).norm(dim=-1)
    feet = joints[:, list(KIT.feet)].diff(dim=0).norm(dim=-1).amin(1)
    gliding = step > 0.02
    assert 0.4 < gliding.float().mean() < 0.75 and feet[gliding].max() <= feet[~gliding].min()
    torch.testing.assert_close(step[gliding], torch.full_like(step[gliding], 0.5 / 12.5), rtol=0, atol=1e-5)


def test_freeze_repeats_one_pose_and_touches_nothing_else(data):
    for grade, frames in ((1, 4), (2, 10)):  # .3 and .8 s at 12.5 frames a second
        joints, damaged = damage("freeze", data, grade, 3)
        changed = (damaged != joints).flatten(1).any(1).nonzero().flatten()
        first = int(changed[0]) - 1
        assert torch.equal(damaged[first:first + frames], joints[first].expand(frames, -1, -1))
        assert int(changed[-1]) == first + frames - 1
    joints = perception.metres(walk(data), KIT)
    for part, grade in ((joints[:4], 2), (joints, 3)):  # shorter than the freeze; the strongest has no end
        still = damages.freeze_frames(part, grade, generator(0, 0, "test"), KIT)
        assert torch.equal(still, part[:1].expand_as(part))


def test_bones_change_length_and_keep_direction(data):
    joints, damaged = damage("bones", data, 3)
    ratio = bone_lengths(damaged) / bone_lengths(joints)  # t j-1
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)
    assert ratio[0].log().std() > 0.1 and torch.equal(damaged[:, 0], joints[:, 0])
    parents = list(KIT.parents[1:])
    directions = [(x[:, 1:] - x[:, parents]) / bone_lengths(x)[..., None] for x in (joints, damaged)]
    torch.testing.assert_close(*directions, rtol=0, atol=1e-3)


def test_floating_shifts_heights_both_ways(data):
    shifts = set()
    for k in range(8):
        joints, damaged = damage("float", data, 2, k)
        moved = damaged - joints
        assert (moved[..., [0, 2]] == 0).all()
        torch.testing.assert_close(moved[..., 1], moved[0, 0, 1].expand(moved.shape[:2]), rtol=0, atol=1e-5)
        shifts.add(round(moved[0, 0, 1].item(), 3))
    assert shifts == {-0.12, 0.12}


def test_warp_plays_slower_with_one_jump_and_the_same_ends(data):
    t = 40
    joints = torch.arange(float(t))[:, None, None].expand(t, 21, 3)  # the pose is the time
    for grade, share in ((1, 0.15), (2, 0.3), (3, 0.5)):
        steps = damages.warp(joints, grade, generator(0, 1, "test"), KIT)[:, 0, 0]
        assert steps[0] == 0 and steps[-1].item() == pytest.approx(t - 1, abs=1e-4)
        steps = steps.diff()
        assert steps.max().item() == pytest.approx(1 - share + share * (t - 1), abs=1e-3)
        assert torch.allclose(steps.sort().values[:-1], torch.tensor(1 - share), atol=1e-4)


def test_rush_is_faster_there_and_back():
    t = 41
    joints = torch.arange(float(t))[:, None, None].expand(t, 21, 3)  # the pose is the time
    for grade, factor in ((1, 1.3), (2, 1.6), (3, 2.2)):
        times = damages.rush(joints, grade, generator(0, 1, "test"), KIT)[:, 0, 0]
        turn = math.ceil((t - 1) / factor)
        torch.testing.assert_close(times[:turn], factor * torch.arange(float(turn)))
        assert times[turn:turn + 3].diff().lt(0).all() and times.min() >= 0 and times.max() <= t - 1
        steps = times.diff().abs()
        assert steps.max() <= factor + 1e-4 and (steps > factor - 1e-4).float().mean() > 0.9


def test_some_codes_are_drawn_anew(data, vq, monkeypatch):
    """A tenth, a quarter, half; the weaker damage is part of the stronger one."""
    seen, decode, motion = [], vq.decode, walk(data)

    def spy(codes, counts):
        seen.append(codes.clone())
        return decode(codes, counts)
    monkeypatch.setattr(vq, "decode", spy)
    own, _ = vq.tokenise(motion[None], torch.tensor([36]))
    for grade in (1, 2, 3):
        damages.swap_codes(motion, grade, generator(0, 0, "test"), KIT, vq)
    weak, middle, strong = (codes != own for codes in seen)  # 18 codes; a draw may hit the old one
    assert 1 <= weak.sum() <= 2 and 3 <= middle.sum() <= 4 and 6 <= strong.sum() <= 9
    assert (weak <= middle).all() and (middle <= strong).all()


def test_decoded_motions_are_those_of_the_tokenizer(data, vq):
    motions = [torch.from_numpy(clip.features) for clip in data.splits["val"][:5]]
    for chunk in (2, 128):
        for motion, back in zip(motions, perception.decoded(motions, vq, chunk), strict=True):
            own, _ = vq.decode(*vq.tokenise(motion[None], torch.tensor([len(motion)])))
            torch.testing.assert_close(back, own[0], rtol=0, atol=2e-2)  # KIT units, about .03 mm


# ---- pairs -------------------------------------------------------------------------------------------------


def test_pairs_show_the_same_moment_at_two_strengths(data, vq):
    motions, real = [walk(data)], perception.metres(walk(data), KIT)
    better, worse = perception.make_pairs(motions, 60, ["float"], perception.GRADES, KIT, vq, 0, "test")
    assert len(better) == len(worse) == 60
    lengths = [len(joints) for joints in better]
    assert lengths == [len(joints) for joints in worse]
    assert set(lengths) == {20, 24, 28, 32, 36}  # multiples of 4 of 1.6 s or more
    steps = set()
    for one, other in zip(better, worse):
        moved = (other - one)[..., 1].flatten()
        assert moved.std() < 1e-5 and (other - one)[..., [0, 2]].abs().max() < 1e-6
        steps.add(round(abs(moved[0].item()), 2))
    assert steps == {0.05, 0.12, 0.25, 0.07, 0.2, 0.13}  # differences of the three strengths and of none
    real_only, _ = perception.make_pairs(motions, 9, ["float"], perception.GRADES[:3], KIT, vq, 0, "test")
    assert all(abs(joints[..., 1].amin() - real[..., 1].amin()) < 0.03 for joints in real_only)


def test_the_better_side_is_the_less_damaged(data, vq):
    assert all(better < worse for better, worse in perception.GRADES)
    assert perception.GRADES[:3] == ((0, 1), (0, 2), (0, 3))
    better, worse = perception.make_pairs([walk(data)], 40, ["jitter"], perception.GRADES, KIT, vq, 0, "test")

    def shake(joints):
        return joints.diff(n=2, dim=0).norm(dim=-1).mean()
    assert all(shake(one) < shake(other) for one, other in zip(better, worse))


# ---- training and cache ------------------------------------------------------------------------------------


def fit(data, vq, folder, train=None, **changes):
    """train: other clips in place of the train split; changes: of the options, or the data's fingerprint."""
    options = dict(iterations=3, seed=0, cache_dir=folder, use_cache=False, device=CPU, batch=8)
    data = replace(data, splits=data.splits | {"train": train or data.splits["train"]},
                   fingerprint=changes.pop("fingerprint", data.fingerprint))
    return perception.fit_perception(data, vq, ranking_loss, **{**options, **changes})


def test_damaged_copies_of_new_clips_score_lower(data, vq, tmp_path, capsys):
    """A small run; the clips are of the test split, that training never saw."""
    critic, notes = fit(data, vq, tmp_path, iterations=150, batch=16)
    printed = capsys.readouterr().out
    assert printed.startswith("  synthetic perception: accuracy jitter ")
    assert "| never trained on: warp 0." in printed or "| never trained on: warp 1." in printed
    assert set(notes) == {"accuracy", "loss"} and set(notes["accuracy"]) == set(perception.DAMAGES)
    motions = [torch.from_numpy(clip.features) for clip in data.splits["test"]]
    names = [name for name in perception.DAMAGES if name != perception.HELD_OUT]
    pairs = perception.make_pairs(motions, 3 * len(motions), names, perception.GRADES[:3], KIT, vq, 1, "test")
    better, worse = perception.rank(critic, *pairs, CPU)
    assert (better > worse).float().mean() >= 0.8
    assert np.mean([notes["accuracy"][name] for name in names]) >= 0.8
    # two damaged copies of one clip are told apart as well
    pairs = perception.make_pairs(motions, 3 * len(motions), names, perception.GRADES[3:], KIT, vq, 1, "test")
    better, worse = perception.rank(critic, *pairs, CPU)
    assert (better > worse).float().mean() >= 0.75


def test_training_repeats_itself_and_leaves_the_global_stream_alone(data, vq, tmp_path):
    before = torch.get_rng_state()
    critic, notes = fit(data, vq, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again, same = fit(data, vq, tmp_path)
    assert notes == same and not critic.training
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in critic.state_dict().items())
    _, other = fit(data, vq, tmp_path, seed=1)
    assert other["loss"] != notes["loss"]


def test_no_text_enters(data, vq, tmp_path):
    clips = [replace(clip, captions=["x"], tokens=[[]], attributes=[{}]) for clip in data.splits["train"]]
    (critic, notes), (other, same) = fit(data, vq, tmp_path), fit(data, vq, tmp_path, train=clips)
    assert notes == same
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in critic.state_dict().items())
    assert list(inspect.signature(critic.score).parameters) == ["motion", "lengths"]


def test_the_held_out_damage_is_never_trained_on(data, vq, tmp_path, monkeypatch):
    used, make_pairs = {}, perception.make_pairs

    def spy(motions, count, names, grades, skeleton, vq, seed, purpose):
        used[purpose] = list(names)
        return make_pairs(motions, count, names, grades, skeleton, vq, seed, purpose)
    monkeypatch.setattr(perception, "make_pairs", spy)
    fit(data, vq, tmp_path)
    assert used.pop("pairs") == used.pop("held-out pairs") == [
        "jitter", "slide", "freeze", "rush", "bones", "float", "codes"]
    assert list(used.values()) == [[name] for name in perception.DAMAGES]


def test_huge_values_stop_the_training(data, vq, tmp_path):
    clips = [replace(clip, features=np.full_like(clip.features, np.nan)) for clip in data.splits["train"]]
    with pytest.raises(NonFiniteError, match="perception, iteration 0: loss nan"):
        fit(data, vq, tmp_path, train=clips)


def test_the_cache_is_read_and_keyed_by_all_that_shaped_it(data, vq, tmp_path, monkeypatch, capsys):
    critic, notes = fit(data, vq, tmp_path, use_cache=True)
    printed = capsys.readouterr().out

    def never(*args, **options):
        raise RuntimeError("trained again")
    train, source = perception.train_perception, training.inspect.getsource
    monkeypatch.setattr(training.inspect, "getsource", lambda part: source(train if part is never else part))
    monkeypatch.setattr(perception, "train_perception", never)
    cached, same = fit(data, vq, tmp_path, use_cache=True)
    assert notes == same and capsys.readouterr().out == printed
    motion, lengths = real_motions(data)
    assert torch.equal(cached.score(motion, lengths), critic.score(motion, lengths))
    other = tokenizer.VQVAE(251, 24, 16, 64, 1)
    for changes in (dict(iterations=4), dict(seed=1), dict(fingerprint="other"), dict(batch=9),
                    dict(lr=1e-3), dict(use_cache=False), dict(vq=other)):
        with pytest.raises(RuntimeError, match="trained again"):
            fit(data, changes.pop("vq", vq), tmp_path, **{"use_cache": True, **changes})


# ---- the published critic ----------------------------------------------------------------------------------

SIZES = dict(inputs=3, joints=25, width=16, rep=8, heads=8, hidden=32, score_hidden=12, depth=2, maxlen=70)


def random_net(**changes):
    net = motion_critic.MotionCritic(**{**SIZES, **changes})
    for k, value in enumerate(net.state_dict().values()):
        value.copy_(normal(*value.shape, k=k) * 0.3)
    return freeze(net)


@pytest.mark.parametrize("wrap", (True, False))
def test_a_published_file_gives_the_same_scores(wrap, tmp_path):
    """With its state under "model_state_dict", behind a wrapper's prefix, or bare."""
    net = random_net()
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"model_state_dict": state, "epoch": 3} if wrap else state, tmp_path / "critic.pth")
    loaded = motion_critic.load_published(tmp_path / "critic.pth")
    x = normal(3, 9, 25, 3)
    assert torch.equal(loaded(x), net(x))
    assert {"dstran.head.weight", "dstran.temp_embed", "mlp.fc2.bias"} < set(loaded.state_dict())
    everyone = torch.ones(3, 9, dtype=torch.bool)
    torch.testing.assert_close(net(x, everyone), net(x), rtol=0, atol=1e-5)


def test_other_files_are_refused_in_one_line(tmp_path):
    def message(state, **options):
        torch.save(state, tmp_path / "critic.pth")
        with pytest.raises(InputError) as caught:
            motion_critic.load_published(tmp_path / "critic.pth", **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)
    state = dict(random_net().state_dict())
    missing = {key: value for key, value in state.items() if key != "dstran.head.bias"}
    assert message(missing).endswith("dstran.head.bias is missing, wanted (3,)")
    assert "extra is (1,), wanted nothing" in message({"model_state_dict": state | {"extra": torch.ones(1)}})
    wrong = state | {"mlp.fc1.weight": torch.ones(12, 7)}
    assert "mlp.fc1.weight is (12, 7), wanted (12, 200)" in message(wrong)
    assert "does not split into 3 heads" in message(state, heads=3)
    assert "has no dstran.joints_embed.weight" in message({"other": torch.ones(2)})
    assert "'epoch' is no weight" in message(state | {"epoch": 3})
    assert "holds no 'model_state_dict'" in message([1, 2])
    with pytest.raises(InputError, match="no such file"):
        motion_critic.load_published(tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match="holds no 'net'"):
        published.read_state(tmp_path / "critic.pth", "net")  # only MotionCritic's may be bare


def test_rotations_become_axis_and_angle():
    """Known turns, and round trips through Rodrigues' formula up to half a turn."""
    quarter = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])  # about y, column vectors
    torch.testing.assert_close(motion_critic.axis_angle(quarter), torch.tensor([0.0, math.pi / 2, 0.0]))
    assert (motion_critic.axis_angle(torch.eye(3)) == 0).all()
    axis = torch.nn.functional.normalize(normal(200, 3), dim=-1)
    angle = torch.linspace(1e-4, math.pi - 1e-3, 200)[:, None]
    cross = torch.zeros(200, 3, 3)
    for row, column, part, sign in ((2, 1, 0, 1), (0, 2, 1, 1), (1, 0, 2, 1),
                                    (1, 2, 0, -1), (2, 0, 1, -1), (0, 1, 2, -1)):
        cross[:, row, column] = sign * axis[:, part]
    matrix = torch.matrix_exp(cross * angle[..., None])
    torch.testing.assert_close(motion_critic.axis_angle(matrix), axis * angle, rtol=0, atol=1e-4)
    torch.testing.assert_close(motion_critic.rotation_matrix(matrix[:, :2].flatten(1)), matrix, rtol=0,
                               atol=1e-5)


def test_into_critic_keeps_the_root_and_the_order():
    raw = torch.zeros(2, 25, 6, 5)
    raw[:, :24, [0, 4]] = 1.0  # identity
    raw[:, 24, :3] = normal(2, 3, 5)
    out = motion_critic.into_critic(raw)
    assert out.shape == (2, 5, 25, 3) and (out[:, :, :24] == 0).all()
    assert torch.equal(out[:, :, 24], raw[:, 24, :3].mT)


def test_targets_rebuild_the_pose(data):
    """Forward kinematics with the targets gives the joints that they were made from."""
    joints = motion_critic.standard_joints(walk(data), KIT)
    rotations = motion_critic.rotation_matrix(motion_critic.rotation_targets(joints))  # t 24 3 3
    assert rotations.shape == (len(joints), 24, 3, 3) and joints.shape[1:] == (22, 3)
    assert torch.equal(rotations[:, 22:], torch.eye(3).expand(len(joints), 2, 3, 3))
    offsets, rebuilt = torch.from_numpy(T2M.offsets).float(), torch.zeros_like(joints)
    rebuilt[:, 0] = joints[:, 0]
    for chain in T2M.chains:
        turn = rotations[:, 0]
        for a, b in zip(chain[:-1], chain[1:]):
            turn = turn @ rotations[:, b]
            rebuilt[:, b] = rebuilt[:, a] + turn @ offsets[b]
    torch.testing.assert_close(rebuilt, joints, rtol=0, atol=2e-3)
    # whichever way the body faces, the root turns the rest pose, left at +X, with it
    for angle in (0.0, 1.5, -2.5):
        cos, sin = math.cos(angle), math.sin(angle)
        turned = joints @ torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]]).T
        root = motion_critic.rotation_matrix(motion_critic.rotation_targets(turned))[:, 0]
        across = turned[:, T2M.index["l_shoulder"]] - turned[:, T2M.index["r_shoulder"]]
        across = torch.nn.functional.normalize(across * torch.tensor([1.0, 0.0, 1.0]), dim=-1)
        assert (root[:, :, 0] * across).sum(-1).min() > 0.9


def test_the_published_critic_scores_by_windows_of_sixty_frames(data, monkeypatch):
    g = motion_critic.JointsToRotations()
    critic = freeze(motion_critic.PublishedCritic(g, random_net(), KIT))
    seen, net = [], critic.net.forward
    monkeypatch.setattr(critic.net, "forward", lambda x: seen.append(x) or net(x))
    motion = torch.cat([walk(data), walk(data), walk(data)])[None].repeat(2, 1, 1)
    motion[1, 24:] = float("nan")
    scores = critic.score(motion, torch.tensor([108, 24]))
    assert scores.shape == (2,) and torch.isfinite(scores).all()
    # 12.5 -> 20 frames a second: 172 frames in three windows, 37 frames in one
    assert [tuple(x.shape) for x in seen] == [(3, 60, 25, 3), (1, 37, 25, 3)]
    assert (seen[0][:, 0, 24, [0, 2]] == 0).all() and (seen[0][:, 0, 24, 1] > 0.5).all()
    torch.testing.assert_close(scores[0], net(seen[0]).mean())


def test_g_learns_and_is_cached(data, tmp_path, capsys):
    torch.save(random_net().state_dict(), tmp_path / "critic.pth")
    part = replace(data, splits=data.splits | {"train": data.splits["train"][:120]})  # g sees a half

    def fitted(**changes):
        options = dict(seed=0, cache_dir=tmp_path, use_cache=True, device=CPU, iterations=3)
        before = torch.get_rng_state()
        out = motion_critic.fit_published(tmp_path / "critic.pth", part, **{**options, **changes})
        assert torch.equal(torch.get_rng_state(), before)
        return out
    critic, start = fitted()
    printed = capsys.readouterr().out
    assert "degrees" in printed and "indicative only" in printed and not critic.training
    again, same = fitted(use_cache=False)
    assert start == same and set(same) == {"published", "degrees"}
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in critic.state_dict().items())
    _, later = fitted(iterations=60)
    assert later["degrees"] < 0.6 * start["degrees"]
    short = random_net(maxlen=20)
    torch.save(short.state_dict(), tmp_path / "critic.pth")
    with pytest.raises(InputError, match="windows of 60 frames"):
        fitted()


def test_a_run_gets_the_published_critic_if_it_names_one(data, vq, tmp_path):
    torch.save(random_net().state_dict(), tmp_path / "critic.pth")
    options = dict(iterations=2, seed=0, cache_dir=tmp_path, use_cache=True, device=CPU)
    own, _ = perception.fit_perception(data, vq, ranking_loss, "", **options)
    other, notes = perception.fit_perception(data, vq, ranking_loss, tmp_path / "critic.pth", **options)
    assert isinstance(own, perception.PerceptionCritic) and notes["published"].endswith("critic.pth")
    motion, lengths = torch.from_numpy(data.splits["test"][0].features)[None], torch.tensor([24])
    assert own.score(motion, lengths).shape == other.score(motion, lengths).shape == (1,)
