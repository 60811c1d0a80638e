"""Features, joints, rotations: ways there and back on real clips, gradients, broken motions."""
import math

import numpy as np
import pytest
import torch

from common import InputError, NonFiniteError, datasets, features, generator, representations
from common.representations import REPRESENTATIONS, from_features, to_features, to_joints, width
from tests import reference

KIT, T2M = features.KIT, features.T2M
pytestmark = pytest.mark.usefixtures("one_thread")
others = pytest.mark.parametrize("representation", ("joints", "rotations"))


@pytest.fixture(scope="module", params=("t2m", "native"))
def data(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("representations")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # real data in the repository play no part
        return datasets.load_dataset("kit", space=request.param, clips=60, seed=0, cache_dir=folder)


def clips(data, count=6):
    return [torch.from_numpy(clip.features) for clip in data.splits["train"][:count]]


def direct(motion, representation, skeleton):
    """Joints as common/features.py computes them."""
    if representation == "rotations":
        return reference.features_to_joints_rot6d(motion, skeleton)
    return features.features_to_joints(motion, skeleton)


def test_widths_and_blocks():
    assert [width(name, T2M) for name in REPRESENTATIONS] == [263, 66, 135]
    assert [width(name, KIT) for name in REPRESENTATIONS] == [251, 63, 129]
    for skeleton in (T2M, KIT):
        for name in REPRESENTATIONS:
            columns = [k for part in representations.blocks(name, skeleton).values()
                       for k in range(part.start, part.stop)]
            assert columns == list(range(width(name, skeleton)))


def test_wrong_widths_are_refused():
    with pytest.raises(InputError, match="rotations are 135 wide, the kit skeleton needs 129"):
        to_joints(torch.ones(4, 135), "rotations", KIT)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_the_way_to_joints_is_that_of_the_features(data, representation):
    skeleton = data.skeleton
    for motion in clips(data):
        for x, limit in ((motion, 1e-5), (motion.double(), 1e-12)):
            made = from_features(x, representation, skeleton)
            assert made.shape == (len(x), width(representation, skeleton)) and made.dtype == x.dtype
            joints, wanted = to_joints(made, representation, skeleton), direct(x, representation, skeleton)
            assert (joints - wanted).abs().max() <= limit * skeleton.units_per_metre
    assert torch.equal(to_joints(from_features(motion, "joints", skeleton), "joints", skeleton),
                       features.features_to_joints(motion, skeleton))
    stacked = torch.stack([motion, 0.5 * motion])  # leading axes
    both = to_joints(from_features(stacked, representation, skeleton), representation, skeleton)
    torch.testing.assert_close(both[0], direct(motion, representation, skeleton), rtol=0,
                               atol=1e-5 * skeleton.units_per_metre)


def test_rotations_hold_height_velocity_heading_and_bones():
    part, x = features.blocks(T2M), torch.zeros(3, 263)
    x[:, part["root_rotation"]] = 0.1  # half the turn of a frame
    x[:, part["root_velocity"]], x[:, part["root_height"]] = torch.tensor([0.2, 0.3]), 0.9
    x[:, part["rotations"]] = torch.arange(126.0)
    made = from_features(x, "rotations", T2M)
    torch.testing.assert_close(made[:, :3], torch.tensor([[0.9, 0.2, 0.3]]).expand(3, 3))
    assert torch.equal(made[:, 9:], x[:, part["rotations"]])
    for row, angle in zip(made[:, 3:9], (0.0, 0.2, 0.4)):  # world -> body, absolute
        wanted = torch.tensor([math.cos(angle), 0, -math.sin(angle), 0, 1, 0])
        torch.testing.assert_close(row, wanted, rtol=0, atol=1e-6)


@others
def test_there_and_back(data, representation):
    """Joints come back; so do the features, but for what rotations do not say and the very last step."""
    skeleton, part = data.skeleton, features.blocks(data.skeleton)
    metre = skeleton.units_per_metre
    for motion in clips(data):
        made = from_features(motion, representation, skeleton)[None]
        back = to_features(made, torch.tensor([len(motion)]), representation, skeleton)
        assert back.shape == (1, *motion.shape) and back.dtype == torch.float32
        joints = features.features_to_joints(back[0], skeleton)
        wanted = direct(motion, representation, skeleton)
        assert (joints - wanted).abs().max() < 1e-4 * metre
        for name, columns in part.items():
            limit = {"root_height": 1e-5, "positions": 1e-3, "velocities": 1e-3, "root_velocity": 1e-3}
            apart = (back[0, :-1, columns] - motion[:-1, columns]).abs().max()
            assert apart < limit[name] * metre if name in limit else apart < 1e-2, name


def test_lengths_padding_and_heights(data):
    """Every row on its own; what stands behind the ends is not read; a body that hovers goes on hovering."""
    skeleton, (one, two) = data.skeleton, (motion[:24] for motion in clips(data, 2))
    lengths = torch.tensor([24, 16])
    for representation in REPRESENTATIONS:
        made = torch.stack([from_features(motion, representation, skeleton) for motion in (one, two)])
        made[1, 16:] = float("nan")
        back = to_features(made, lengths, representation, skeleton)
        assert back.shape == (2, 24, skeleton.feature_dim) and (back[1, 16:] == 0).all()
        alone = to_features(made[1:, :16], lengths[1:], representation, skeleton)
        assert torch.equal(back[1, :16], alone[0])
    lifted = from_features(one, "joints", skeleton)[None].clone()
    lifted[..., 1::3] += 0.3 * skeleton.units_per_metre
    back = features.features_to_joints(to_features(lifted, lengths[:1], "joints", skeleton)[0], skeleton)
    torch.testing.assert_close(back, to_joints(lifted[0], "joints", skeleton), rtol=0,
                               atol=1e-4 * skeleton.units_per_metre)


def test_broken_motions_do_not_stop_a_run_but_nan_does(data):
    """A body in one point has no rotations; a bone exactly against its rest direction has some."""
    skeleton = data.skeleton
    joints = to_joints(from_features(clips(data, 1)[0][:8], "joints", skeleton), "joints", skeleton)
    bone = next(b for b, axis in enumerate(skeleton.rest) if axis[1] == 1)  # straight up at rest
    against = joints.clone()
    against[:, bone] = against[:, skeleton.parents[bone]] - torch.tensor([0.0, 100.0, 0.0])
    for broken in (torch.zeros(8, skeleton.joints, 3), against):
        if broken is not against:
            with pytest.raises(InputError, match="not finite"):
                features.joints_to_features(broken.numpy(), skeleton, retarget=False)
        lengths = torch.tensor([8])
        back = to_features(broken.flatten(1)[None], lengths, "joints", skeleton)
        assert torch.isfinite(back).all()
        assert torch.equal(back, to_features(broken.flatten(1)[None], lengths, "joints", skeleton))
        root = features.features_to_joints(back[0], skeleton)[:, 0]
        assert (root - broken[:, 0])[:, 1].abs().max() < 1e-3 * skeleton.units_per_metre
    for representation in REPRESENTATIONS:
        motion = from_features(clips(data, 1)[0][:8], representation, skeleton)[None].clone()
        motion[0, 7, -1] = float("nan")
        with pytest.raises(NonFiniteError, match=representation):
            to_features(motion, torch.tensor([8]), representation, skeleton)
        to_features(motion, torch.tensor([7]), representation, skeleton)


@others
def test_gradients_are_those_of_the_function(data, representation):
    skeleton = data.skeleton
    # about one unit in size, so that the check's step is small against it
    scale = torch.from_numpy(np.maximum(clips(data, 1)[0].numpy().std(0), 1e-2)).double()
    motion = clips(data, 1)[0][:3].double() / scale
    probe = torch.randn(3, skeleton.joints, 3, generator=generator(0, 0, "test"), dtype=torch.float64)

    def there(x):
        made = from_features(x * scale, representation, skeleton)
        return (to_joints(made, representation, skeleton) * probe).sum() / skeleton.units_per_metre
    assert torch.autograd.gradcheck(there, motion.requires_grad_(), eps=1e-5, atol=1e-6, rtol=1e-4,
                                    fast_mode=True)


@others
def test_a_frame_depends_on_no_later_one(data, representation):
    motion = clips(data, 1)[0][:12].clone()
    changed = motion.clone()
    changed[8:] += 1.0
    before, after = (from_features(x, representation, data.skeleton) for x in (motion, changed))
    assert torch.equal(before[:8], after[:8]) and (before[8:] != after[8:]).any(1).all()
    before, after = (to_joints(x, representation, data.skeleton) for x in (before, after))
    assert torch.equal(before[:8], after[:8])


def test_any_six_numbers_become_a_rotation():
    columns = torch.randn(50, 6, generator=generator(0, 0, "test"))
    columns[0], columns[1, :3], columns[2, 3:] = 0.0, 0.0, 0.0
    columns[3, 3:], columns[4, 3:] = columns[3, :3], -2 * columns[4, :3]
    columns[5] = torch.tensor([1.0, 0, 0, 0, 1, 0])
    columns.requires_grad_()
    matrices = representations.orthonormal(columns)
    torch.testing.assert_close(matrices.mT @ matrices, torch.eye(3).expand(50, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(50))
    assert torch.equal(matrices[5], torch.eye(3))
    matrices.square().sum().backward()
    assert torch.isfinite(columns.grad).all()
    assert torch.isnan(representations.orthonormal(torch.full((1, 6), float("nan")))).all()
