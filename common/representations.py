"""The three motion representations of MotionRFT (arXiv 2603.27185): features, joints, rotations.

    features    the vector of common/features.py, 263 or 251 numbers a frame
    joints      absolute joint positions in the skeleton's units, 3 j
    rotations   root height 1, planar root velocity 2, root rotation 6, rotation of every other bone 6 (j-1)

All three are RAW here; whoever reads them owns the statistics. The velocity is seen from the body, as in the
features; the root rotation is the heading that those integrate, so that rotations need no integration of
angles, and the path is still a sum of steps. Rotations carry no bone lengths: the reference body lends its.
Letters: b batch, t frames, j joints, d features, w width of a representation.
"""
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from common import InputError, NonFiniteError, features as motion_features
from common.features import features_to_joints, joints_to_features, recover_root

REPRESENTATIONS = ("features", "joints", "rotations")
TILT = 1e-4  # metres, added to every joint where a bone of a generated motion has no direction


def width(representation, skeleton):
    """Numbers a frame: 263, 66 and 135 for HumanML3D's skeleton, 251, 63 and 129 for KIT-ML's."""
    return max(part.stop for part in blocks(representation, skeleton).values())


def blocks(representation, skeleton):
    """Name -> slice of a frame; the names of numbers of the whole body start with "root"."""
    if representation == "features":
        return motion_features.blocks(skeleton)
    ends = {"joints": {"root_position": 3, "positions": 3 * skeleton.joints},
            "rotations": {"root_height": 1, "root_velocity": 3, "root_rotation": 9,
                          "rotations": 3 + 6 * skeleton.joints}}[representation]
    return {name: slice(start, end) for (name, end), start in zip(ends.items(), (0, *ends.values()))}


def from_features(features, representation, skeleton):
    """Raw features (... t d) -> raw motion (... t w), differentiable. A frame depends on no later one."""
    if representation == "features":
        return features
    if representation == "joints":
        return rearrange(features_to_joints(features, skeleton), "... t j c -> ... t (j c)")
    part = motion_features.blocks(skeleton)
    heading, _ = recover_root(features)  # ... t 4: half the angle's cosine and sine, around y
    cos, sin = heading[..., 0], heading[..., 2]
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    # the first two columns of the rotation by the heading, world -> body
    root = torch.stack([1 - 2 * sin * sin, zero, -2 * cos * sin, zero, one, zero], -1)             # ... t 6
    return torch.cat([features[..., part["root_height"]], features[..., part["root_velocity"]], root,
                      features[..., part["rotations"]]], -1)


def convert_clips(clips, representation, skeleton):
    """Clips whose features are raw motion (t w) float32 instead."""
    return [replace(clip, features=from_features(torch.from_numpy(clip.features), representation,
                                                 skeleton).numpy()) for clip in clips]


def orthonormal(columns):
    """Two columns (... 6) -> rotation matrices (... 3 3) by Gram-Schmidt, in the order of features.py.

    A network may answer anything: a column without a direction becomes the x axis, a second column along the
    first is replaced by the axis that is least along it. NaN stays NaN.
    """
    axes = torch.eye(3, dtype=columns.dtype, device=columns.device)
    x, y = columns[..., :3], columns[..., 3:]
    x = F.normalize(torch.where(x.norm(dim=-1, keepdim=True) < 1e-6, axes[0], x), dim=-1)
    z = torch.linalg.cross(x, y)
    other = torch.linalg.cross(x, axes[x.detach().abs().argmin(-1)])
    z = F.normalize(torch.where(z.norm(dim=-1, keepdim=True) < 1e-6, other, z), dim=-1)
    return torch.stack([x, torch.linalg.cross(z, x), z], -1)


def to_joints(motion, representation, skeleton):
    """Raw motion (... t w) -> joints (... t j 3) in the skeleton's units, differentiable."""
    if motion.shape[-1] != width(representation, skeleton):
        raise InputError(f"{representation} are {motion.shape[-1]} wide, the {skeleton.name} skeleton needs "
                         f"{width(representation, skeleton)}")
    if representation == "features":
        return features_to_joints(motion, skeleton)
    if representation == "joints":
        return rearrange(motion, "... t (j c) -> ... t j c", c=3)
    turns = orthonormal(rearrange(motion[..., 3:], "... t (j c) -> ... t j c", c=6))           # ... t j 3 3
    step = torch.zeros_like(motion[..., :3])
    step[..., 1:, 0], step[..., 1:, 2] = motion[..., :-1, 1], motion[..., :-1, 2]  # row t: step t -> t+1
    path = (turns[..., 0, :, :].mT @ step[..., None])[..., 0].cumsum(-2)                           # ... t 3
    offsets = motion.new_tensor(skeleton.offsets)
    joints = {0: torch.stack([path[..., 0], motion[..., 0], path[..., 2]], -1)}
    for chain in skeleton.chains:
        rotation = turns[..., 0, :, :]  # every chain starts from the root's frame, see features.py
        for a, b in zip(chain[:-1], chain[1:]):
            rotation = rotation @ turns[..., b, :, :]
            joints[b] = joints[a] + rotation @ offsets[b]
    return torch.stack([joints[j] for j in range(skeleton.joints)], -2)


def features_of_joints(joints, skeleton):
    """Features (t d) float32 of joints (t j 3) in the skeleton's units, numpy; as many rows as frames.

    A row needs the step to the next frame; the last step is taken twice. Heights are kept:
    joints_to_features puts every clip on the floor, and one that hovers or sinks must not look as if it did
    not. A bone without a direction does not stop a run: all joints are then moved by a tenth of a millimetre.
    """
    joints = np.asarray(joints, np.float32)
    joints = np.concatenate([joints, 2 * joints[-1:] - joints[-2:-1]])
    try:
        features = joints_to_features(joints, skeleton, retarget=False, fix_heading_flip=True)
    except InputError:
        moved = TILT * skeleton.units_per_metre * np.random.default_rng(0).standard_normal(joints.shape)
        joints = joints + moved.astype(np.float32)
        features = joints_to_features(joints, skeleton, retarget=False, fix_heading_flip=True)
    part, lowest = motion_features.blocks(skeleton), joints[..., 1].min()
    features[:, part["root_height"]] += lowest
    features[:, part["positions"]][:, 1::3] += lowest
    return features


@torch.no_grad()
def to_features(motion, lengths, representation, skeleton):
    """Raw motion (b t w), anything behind the ends, lengths (b) -> raw features (b t d) float32, zeros there.

    For evaluation: no gradient. Raises NonFiniteError if a real frame is NaN or infinite.
    """
    out = torch.zeros(*motion.shape[:2], skeleton.feature_dim)                                     # b t d
    for row, one, n in zip(out, motion.detach().float().cpu(), lengths.tolist()):
        if not torch.isfinite(one[:n]).all():
            raise NonFiniteError(f"a generated motion ({representation}) holds NaN or infinity")
        if representation == "features":
            row[:n] = one[:n]
        else:
            joints = to_joints(one[:n], representation, skeleton).numpy()
            row[:n] = torch.from_numpy(features_of_joints(joints, skeleton))
    return out.to(motion.device)
