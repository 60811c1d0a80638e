"""Features against the reference arrays and the mini data sets; mutants of the quirks must be noticed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common import InputError, features as F
from tests import reference
from tests.parity.features import check

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = sorted((SHARED / "golden").glob("features_*.npz"))
MINI = {"mini_humanml3d": F.T2M, "mini_kit": F.KIT}

golden = pytest.mark.skipif(not GOLDEN, reason="reference files are not here")
mini = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the mini data sets are not here")


def figure(skeleton, frames=60, turn=0.0, speed=0.0, seed=0):
    """Stiff body (t j 3) with tilted bones, turning left by `turn` radians, moving to +Z at `speed`."""
    rng = np.random.default_rng([seed, 1])
    bones = skeleton.offsets.copy()
    if skeleton is F.KIT:  # the real limbs point away from the official rest direction
        bones[[5, 8, 11, 16], 0] *= -1
    else:
        bones[[13, 16], 0], bones[[14, 17], 0] = .12, -.12
        bones[[16, 17], 1] = 0
    bones += rng.normal(0, .02, bones.shape) * np.linalg.norm(bones, axis=1, keepdims=True)
    bones *= (skeleton.bone_lengths / np.maximum(np.linalg.norm(bones, axis=1), 1e-9))[:, None]
    rest = np.zeros((skeleton.joints, 3))
    for chain in skeleton.chains:
        for a, b in zip(chain[:-1], chain[1:]):
            rest[b] = rest[a] + bones[b]
    yaw = np.linspace(0, turn, frames)
    c, s = np.cos(yaw), np.sin(yaw)
    rotation = np.stack([np.stack([c, 0 * c, s], -1), np.stack([0 * c, 1 + 0 * c, 0 * c], -1),
                         np.stack([-s, 0 * c, c], -1)], -2)
    joints = np.einsum("tab,jb->tja", rotation, rest)
    joints[..., 2] += (speed * np.arange(frames))[:, None] * skeleton.units_per_metre / skeleton.fps
    joints[..., 1] -= joints[..., 1].min()
    return joints.astype(np.float32)


# ---- reference values --------------------------------------------------------------------------------------

@golden
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_every_stage_matches_the_reference(path):
    rows = check(path)
    assert len(rows) >= 5 * 15
    assert [row for row in rows if not row[1] <= row[2]] == []


def failing_fields(path):
    return {field.partition("_")[2] for field, error, tolerance in check(path) if not error <= tolerance}


@golden
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("mutant", ["hip swap removed", "smoothing removed", "half angle removed"])
def test_removing_a_quirk_breaks_the_reference_test(path, mutant, monkeypatch):
    heading, speed = F.heading_quaternion, F.rotation_speed
    if mutant == "hip swap removed":
        def right_order(joints, skeleton, smooth, hips_swapped=True):
            result = heading(joints, skeleton, smooth, hips_swapped=False)
            result[0] = [1, 0, 0, 0]
            return result
        monkeypatch.setattr(F, "heading_quaternion", right_order)
    elif mutant == "smoothing removed":
        monkeypatch.setattr(F, "_smooth", lambda signal: signal)
    else:
        monkeypatch.setattr(F, "rotation_speed", lambda *args: 2 * speed(*args))
    assert "features[root_rotation]" in failing_fields(path)


@golden
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_heading_repair_changes_feature_0_only_and_recovers_the_joints(path):
    with np.load(path) as data:
        joints, offsets, canonical = data["c4_joints_in"], data["tgt_offsets"], data["c4_canonical"]
    skeleton = F.T2M if joints.shape[1] == 22 else F.KIT
    quirky = F.joints_to_features(joints, skeleton, retarget=offsets)
    repaired = F.joints_to_features(joints, skeleton, retarget=offsets, fix_heading_flip=True)
    error = [np.abs(F.features_to_joints(x, skeleton) - canonical[:-1]).max() for x in (quirky, repaired)]
    assert error[0] > .05 * skeleton.units_per_metre                     # the official behaviour
    assert error[1] < {"t2m": 1e-5, "kit": .01}[skeleton.name]
    assert np.array_equal(quirky[:, 1:], repaired[:, 1:])
    assert (quirky[:, 0] != repaired[:, 0]).sum() >= 1


@mini
@pytest.mark.parametrize("name", MINI)
def test_recovered_joints_equal_the_stored_ones_bit_for_bit(name):
    vectors = sorted((SHARED / "data" / name / "new_joint_vecs").glob("*.npy"))[::20]
    assert len(vectors) >= 18
    for path in vectors:
        stored = np.load(path.parents[1] / "new_joints" / path.name)
        assert np.array_equal(F.features_to_joints(np.load(path), MINI[name]), stored)


# ---- layout, errors, both ways -----------------------------------------------------------------------------

@pytest.mark.parametrize("skeleton", [F.T2M, F.KIT], ids=lambda s: s.name)
def test_blocks_cover_the_vector_once(skeleton):
    columns = np.concatenate([np.arange(skeleton.feature_dim)[part] for part in F.blocks(skeleton).values()])
    assert np.array_equal(columns, np.arange(skeleton.feature_dim))
    assert F.SKELETONS[skeleton.feature_dim] is skeleton
    assert F.blocks(F.T2M)["rotations"] == slice(67, 193) and F.blocks(F.KIT)["velocities"] == slice(184, 247)


@pytest.mark.parametrize("skeleton", [F.T2M, F.KIT], ids=lambda s: s.name)
def test_round_trip_and_meaning_of_the_root_features(skeleton):
    joints = figure(skeleton, frames=120, turn=1.0, speed=.4)
    features = F.joints_to_features(joints, skeleton, retarget=False)
    canonical = F.canonicalise(joints, skeleton)
    unit = skeleton.units_per_metre
    assert features.shape == (119, skeleton.feature_dim) and features.dtype == np.float32
    assert np.abs(F.features_to_joints(features, skeleton) - canonical[:-1]).max() < 1e-5 * unit
    offsets = skeleton.rest * np.linalg.norm(figure_bones(joints, skeleton), axis=-1)[:, None]
    rotated = reference.features_to_joints_rot6d(torch.from_numpy(features), skeleton, offsets)
    assert np.abs(rotated.numpy() - canonical[:-1]).max() < 2e-3 * unit
    assert -.5 < features[:, 0].sum() < -.3  # half of one radian, less the smoothing; left is negative
    assert np.allclose(features[:, 3], canonical[:-1, 0, 1])


def figure_bones(joints, skeleton):
    bones = joints[0] - joints[0, list(skeleton.parents)]
    bones[0] = 0
    return bones


def test_recovery_is_batched_and_differentiable():
    clips = [F.joints_to_features(figure(F.T2M, seed=k), F.T2M) for k in range(3)]
    features = torch.from_numpy(np.stack(clips))
    features.requires_grad_(True)
    joints = F.features_to_joints(features, F.T2M)                       # b t j 3
    assert joints.shape == (3, 59, 22, 3)
    assert torch.equal(joints[1], F.features_to_joints(features[1], F.T2M))
    joints[:, -1, 0, 0].sum().backward()
    assert features.grad[:, :-1, 1].abs().min() > 0 and features.grad[:, -1, :3].abs().max() == 0


def test_contacts_compare_squared_steps_with_the_threshold():
    joints = np.zeros((3, 22, 3), np.float32)
    joints[1:, 7, 0], joints[1:, 11, 2] = .0446, .0448                   # squared .00199 and .00201
    assert F.foot_contacts(joints, F.T2M).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_wrong_input_is_one_clear_line():
    good = figure(F.T2M)
    with pytest.raises(InputError, match="22, 3"):
        F.joints_to_features(good[:, :21], F.T2M)
    with pytest.raises(InputError, match="NaN"):
        F.joints_to_features(np.where(good == good[5, 5, 0], np.nan, good), F.T2M)
    with pytest.raises(InputError, match="251"):
        F.features_to_joints(np.zeros((4, 263), np.float32), F.KIT)
    with pytest.raises(InputError, match="NaN or not finite in float32"):
        F.joints_to_features(np.where(good == good[5, 5, 0], 1e39, good.astype(np.float64)), F.T2M)
    no_bone = good.copy()
    no_bone[7:, 20] = no_bone[7:, 18]
    with pytest.raises(InputError, match="not finite: the bone to joint 20 has no length in frame 7"):
        F.joints_to_features(no_bone, F.T2M, retarget=False)


# ---- opposite directions -----------------------------------------------------------------------------------

def rotated(q, v):
    return F._rotate(q, np.asarray(v, np.float32))


@pytest.mark.parametrize("u", [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1),
                               (.6, 0, .8), (.48, .6, .64), (.05, .998749, 0)])
@pytest.mark.parametrize("gap", [0, 1e-12, 1e-8, 1e-7, 1e-6, 3e-5, 1e-4, 1e-3, .1])
def test_opposite_vectors_are_half_a_turn_about_a_fixed_axis(u, gap):
    """Any distance from exactly opposite: the rotation has unit length and does what it says."""
    u = np.float32(u)
    v = -u.astype(np.float64) + gap * np.cross(u, np.roll(u, 1) + .1)
    v = (v / np.linalg.norm(v)).astype(np.float32)
    q = F._between(u, v)
    assert np.linalg.norm(q) == pytest.approx(1, abs=1e-5) and q[0] >= 0
    assert np.abs(rotated(q, u) - v).max() < 3e-3
    if gap == 0:
        assert q[0] < 1e-7
        if u[1] == 0:
            assert np.allclose(q, [0, 0, 1, 0])                 # stays upright: a heading turns about Y
    with np.errstate(invalid="ignore"):
        assert np.isnan(F._between(u, 0 * v)).all()


@pytest.mark.parametrize("skeleton", [F.T2M, F.KIT], ids=lambda s: s.name)
def test_a_clip_may_start_in_any_direction(skeleton):
    """Also exactly against the direction that all clips are turned to."""
    joints = F.canonicalise(figure(skeleton, turn=.5, speed=.4), skeleton)
    expected = F.joints_to_features(joints, skeleton, retarget=False)
    scale = np.maximum(1, np.abs(expected).max(0))
    for turned in (joints * np.float32([-1, 1, -1]), joints[..., [2, 1, 0]] * np.float32([1, 1, -1])):
        features = F.joints_to_features(turned, skeleton, retarget=False)
        assert (np.abs(features - expected) / scale).max() < 1e-3


@mini
@pytest.mark.parametrize("name", MINI)
def test_captured_clips_turned_by_half_have_the_same_features(name):
    for path in sorted((SHARED / "data" / name / "new_joints").glob("*.npy"))[::12]:
        joints = np.load(path)
        one, other = (F.joints_to_features(x, MINI[name], retarget=False, fix_heading_flip=True)
                      for x in (joints, joints * np.float32([-1, 1, -1])))
        assert (np.abs(one - other) / np.maximum(1, np.abs(one).max(0))).max() < 2e-3, path.name


@pytest.mark.parametrize("skeleton", [F.T2M, F.KIT], ids=lambda s: s.name)
def test_bones_against_their_rest_direction_have_rotations(skeleton):
    for bone in range(1, skeleton.joints):
        joints = figure(skeleton)
        moved = joints[20:30, skeleton.parents[bone]] - skeleton.offsets[bone].astype(np.float32)
        joints[20:30, bone] = moved
        features = F.joints_to_features(joints, skeleton, retarget=False)
        assert np.isfinite(features).all()
        rotations = features[:, F.blocks(skeleton)["rotations"]].reshape(len(features), -1, 2, 3)
        assert np.abs((rotations ** 2).sum(-1) - 1).max() < 1e-4
        assert np.isfinite(F.joints_to_features(joints, skeleton)).all()


# ---- other operations --------------------------------------------------------------------------------------

@pytest.mark.parametrize("skeleton", [F.T2M, F.KIT], ids=lambda s: s.name)
def test_mirror_swaps_sides_and_turns(skeleton):
    joints = figure(skeleton, turn=1.0)
    image = reference.mirror(joints, skeleton)
    assert np.array_equal(reference.mirror(image, skeleton), joints)
    left, right = skeleton.index["l_wrist"], skeleton.index["r_wrist"]
    assert np.allclose(image[:, left], joints[:, right] * [-1, 1, 1])
    speed, mirrored = (F.joints_to_features(x, skeleton)[:, 0].sum() for x in (joints, image))
    assert mirrored == pytest.approx(-speed, abs=1e-3) and speed < -.1


def test_resample_is_exact_for_a_line_and_close_for_a_wave():
    t = np.arange(40)
    joints = np.stack([3 * t + 1, np.sin(2 * np.pi * t / 20), 0 * t], -1)[:, None].astype(np.float32)
    new = F.resample(joints, 12.5, 20.0)
    at = np.arange(len(new)) * 12.5 / 20
    assert len(new) == 63 and at[-1] <= 39
    assert np.allclose(new[:, 0, 0], 3 * at + 1, atol=1e-4)
    assert np.abs(new[:, 0, 1] - np.sin(2 * np.pi * at / 20)).max() < .005
    assert np.array_equal(F.resample(joints, 20.0, 20.0), joints)


@mini
def test_kit_clips_become_humanml3d_bodies():
    source = [np.load(p) for p in sorted((SHARED / "data/mini_kit/new_joints").glob("*.npy"))[::10]]
    reference = [np.load(p) for p in sorted((SHARED / "data/mini_humanml3d/new_joints").glob("*.npy"))[::10]]
    converted = [F.kit_to_t2m(joints) for joints in source]
    for old, new in zip(source, converted):
        bones = np.linalg.norm(new[:, 1:] - new[:, list(F.T2M.parents[1:])], axis=-1)
        assert np.abs(bones - F.T2M.bone_lengths[1:]).max() < 1e-5
        assert len(new) == int((len(old) - 1) * 1.6) + 1
        assert -.06 < new[..., 1].min() < .06                            # on the floor
        across = new[:, 16] - new[:, 17]
        facing = np.stack([-across[:, 2], across[:, 0]], -1)             # x, z
        toes = (new[:, 10] - new[:, 7] + new[:, 11] - new[:, 8])[:, [0, 2]]
        assert ((facing * toes).sum(-1) > 0).mean() > .7  # the toes point forward: left is left
        path = [np.linalg.norm(np.diff(x[:, 0, [0, 2]], axis=0), axis=-1).sum() for x in (old, new)]
        assert path[1] == pytest.approx(path[0] * .826 / 491, rel=.03, abs=.02)

    def median(clips, joint):
        return np.median(np.concatenate([clip[:, joint, 1] for clip in clips]))
    for joint, tolerance in ((0, .03), (15, .06), (7, .03), (10, .03)):  # pelvis, head, ankle, toe
        assert abs(median(converted, joint) - median(reference, joint)) < tolerance


@mini
def test_physical_metrics_of_real_motion():
    expected = {"mini_humanml3d": (71, .06), "mini_kit": (37, .13)}      # medians: jerk, foot skate
    for name, skeleton in MINI.items():
        files = sorted((SHARED / "data" / name / "new_joints").glob("*.npy"))
        rows = [F.physical_metrics(np.load(path), skeleton) for path in files]
        medians = {key: np.median([row[key] for row in rows]) for key in rows[0]}
        assert medians["jerk"] == pytest.approx(expected[name][0], abs=1)
        assert abs(medians["foot_skate"] - expected[name][1]) < .06
        assert medians["bone_variation"] < 1e-5 and medians["floor_penetration"] < 1
        assert medians["floating"] == 0


def test_physical_metrics_closed_forms():
    still = figure(F.T2M, frames=40)
    assert all(value == pytest.approx(0, abs=1e-4) for value in F.physical_metrics(still, F.T2M).values())
    seconds = np.arange(40)[:, None, None] / 20
    sliding = still + seconds * [[[0, 0, 1.0]]]
    assert F.physical_metrics(sliding, F.T2M)["foot_skate"] == 1.0
    cubic = still.astype(np.float64) + seconds ** 3 * [[[1.0, 0, 0]]]
    assert F.physical_metrics(cubic, F.T2M)["jerk"] == pytest.approx(6.0, rel=1e-4)
    hovering = still.copy()
    hovering[20:30, :, 1] += .5
    assert F.physical_metrics(hovering, F.T2M)["floating"] == pytest.approx(.2, abs=.06)
    sunk = still.copy()
    sunk[:1, :, 1] -= .4
    assert F.physical_metrics(sunk, F.T2M)["floor_penetration"] == pytest.approx(1.0, abs=.1)
    with pytest.raises(InputError, match="4 frames"):
        F.physical_metrics(still[:3], F.T2M)
