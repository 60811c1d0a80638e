"""Skeletons, and the way from joint positions to motion features and back.

The feature vector is the one of the HumanML3D repository (Guo et al., CVPR 2022): 263 numbers a frame for its
22 joints, 251 for the 21 joints of KIT-ML. One frame is

    root_rotation 1, root_velocity 2, root_height 1, positions 3(j-1), rotations 6(j-1), velocities 3j,
    contacts 4

Positions, rotations and velocities are seen from the body: turned by the heading, root x and z taken away.

The published files were made by code with four quirks. They are kept, because features computed without them
do not belong to the published data. Each is marked `Quirk` below:
  1. the hips enter the heading with the wrong sign
  2. the heading is smoothed over +-80 frames
  3. feature 0 is half the turn of a frame
  4. it changes sign where the smoothed heading crosses 180 degrees; `fix_heading_flip=True` repairs this one
"""
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange

from common import InputError


# ---- 1. Skeletons --------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Skeleton:
    """Everything that differs between the two joint formats. Y is up; facing +Z, the left side is at +X."""
    name: str                   # "t2m" (HumanML3D) or "kit" (KIT-ML)
    fps: float
    units_per_metre: float      # joints / units_per_metre are metres
    feature_dim: int
    chains: tuple               # kinematic chains of joint numbers, from the inside out
    rest: np.ndarray            # j 3, unit direction of the bone that ends in a joint, in the rest pose
    bone_lengths: np.ndarray    # j, of the reference body; 0 for the root
    offsets: np.ndarray         # j 3, bone vectors of the reference body in the rest pose
    joints: int                 # how many there are
    parents: tuple              # j, parent joint; -1 for the root
    index: dict                 # body part -> joint number
    feet: tuple                 # contact features' joints: left ankle, left toe, right ankle, right toe
    contact_threshold: float    # squared displacement of a frame below which a foot counts as standing
    leg: float                  # thigh + shank of the reference body
    min_frames: int             # shorter clips are not used by the benchmark


_AXES = {"+x": (1, 0, 0), "-x": (-1, 0, 0), "+y": (0, 1, 0), "-y": (0, -1, 0), "+z": (0, 0, 1)}


def _skeleton(chains, axes, lengths, left, right, middle, **rest_of_fields):
    parents = {b: a for chain in chains for a, b in zip(chain[:-1], chain[1:])}
    index = dict(zip(("root", "neck", "head"), middle))
    for part, l, r in zip("hip knee ankle toe shoulder elbow wrist".split(), left, right):
        index |= {f"l_{part}": l, f"r_{part}": r}
    rest = np.array([(0, 0, 0)] + [_AXES[a] for a in axes.split()], dtype=np.float64)
    lengths = np.array([0.0, *lengths])
    return Skeleton(chains=chains, parents=(-1, *(parents[b] for b in sorted(parents))), index=index,
                    rest=rest, bone_lengths=lengths, offsets=rest * lengths[:, None], joints=len(rest),
                    **rest_of_fields)


# Lengths: HumanML3D's reference clip 000021, in metres.
T2M = _skeleton(
    name="t2m", fps=20.0, units_per_metre=1.0, feature_dim=263, contact_threshold=.002, leg=.826056,
    min_frames=40,
    chains=((0, 2, 5, 8, 11), (0, 1, 4, 7, 10), (0, 3, 6, 9, 12, 15), (9, 14, 17, 19, 21),
            (9, 13, 16, 18, 20)),
    axes="+x -x +y -y -y +y -y -y +y +z +z +y +x -x +z -y -y -y -y -y -y",
    lengths=(.103074, .109883, .131568, .393623, .390188, .143190, .432433, .425643, .057365, .143382,
             .149419, .219360, .137487, .143383, .103039, .131614, .122984, .256840, .263092, .266012,
             .269876),
    middle=(0, 12, 15), left=(1, 4, 7, 10, 16, 18, 20), right=(2, 5, 8, 11, 17, 19, 21), feet=(7, 10, 8, 11))

# Lengths: the 1000-unit tall MMM model behind KIT-ML. Contacts use the two foot joints beyond the ankle.
KIT = _skeleton(
    name="kit", fps=12.5, units_per_metre=591.0, feature_dim=251, contact_threshold=.05, leg=491.0,
    min_frames=24,
    chains=((0, 11, 12, 13, 14, 15), (0, 16, 17, 18, 19, 20), (0, 1, 2, 3, 4), (3, 5, 6, 7), (3, 8, 9, 10)),
    axes="+y +y +y +y +x -y -y -x -y -y +x -y -y +z +z -x -y -y +z +z",
    lengths=(80, 120, 44, 30, 110, 188, 145, 110, 188, 145, 52, 245, 246, 30.274, 56.288,
             52, 245, 246, 30.274, 56.288),
    middle=(0, 3, 4), left=(16, 17, 18, 20, 8, 9, 10), right=(11, 12, 13, 15, 5, 6, 7), feet=(19, 20, 14, 15))

SKELETONS = {263: T2M, 251: KIT}


def blocks(skeleton):
    """Name -> slice of the feature vector, in order."""
    sizes = {"root_rotation": 1, "root_velocity": 2, "root_height": 1, "positions": 3 * (skeleton.joints - 1),
             "rotations": 6 * (skeleton.joints - 1), "velocities": 3 * skeleton.joints, "contacts": 4}
    ends = np.cumsum(list(sizes.values()))
    return {name: slice(int(end) - size, int(end)) for (name, size), end in zip(sizes.items(), ends)}


# What matters where motion is read in whitened patches. Without weights the four root numbers vanish among
# 263 and nobody turns; the rotations repeat what the positions say. Not in the papers; "feat_bias" elsewhere.
PATCH_WEIGHTS = {"root_rotation": 4.0, "root_velocity": 4.0, "root_height": 4.0, "rotations": 0.4,
                 "contacts": 0.5}


def block_weights(skeleton, named):
    """Weights (d) of the features: those of {block: weight}, 1 elsewhere."""
    weights = torch.ones(skeleton.feature_dim)
    for name, weight in named.items():
        weights[blocks(skeleton)[name]] = weight
    return weights


# ---- 2. Features -> joints (torch, differentiable) -----------------------------------------------

def _turn(q, v):
    """Rotate vectors v (... 3) by unit quaternions q (... 4), in the published code's order of operations."""
    axis = q[..., 1:].expand(v.shape)
    uv = torch.linalg.cross(axis, v)
    return v + 2 * (q[..., :1] * uv + torch.linalg.cross(axis, uv))


def recover_root(features):
    """Integrate root rotation and velocity: heading (... t 4, world -> body) and root position (... t 3)."""
    angle = torch.zeros_like(features[..., 0])
    angle[..., 1:] = features[..., :-1, 0]          # row t holds the step t -> t+1
    angle = angle.cumsum(-1)                        # Quirk 3: half the yaw, which is what a quaternion wants
    zero = torch.zeros_like(angle)
    heading = torch.stack([angle.cos(), zero, angle.sin(), zero], -1)                              # ... t 4
    step = torch.zeros_like(features[..., :3])
    step[..., 1:, [0, 2]] = features[..., :-1, 1:3]
    path = _turn(_inverse(heading), step).cumsum(-2)                                               # ... t 3
    return heading, torch.stack([path[..., 0], features[..., 3], path[..., 2]], -1)


def _inverse(q):
    return q * q.new_tensor([1.0, -1.0, -1.0, -1.0])


def features_to_joints(features, skeleton):
    """Joint positions (... t j 3), in the skeleton's units, of the positions in raw features (... t d).

    Takes and returns torch (differentiable, keeps the dtype) or numpy (float32). Equals `recover_from_ric` of
    the HumanML3D repository bit for bit in float32. Raises InputError on a wrong width.
    """
    if isinstance(features, np.ndarray):
        return features_to_joints(torch.from_numpy(features.astype(np.float32)), skeleton).numpy()
    if features.shape[-1] != skeleton.feature_dim:
        raise InputError(f"features are {features.shape[-1]} wide, the {skeleton.name} skeleton needs "
                         f"{skeleton.feature_dim}")
    heading, root = recover_root(features)
    local = rearrange(features[..., blocks(skeleton)["positions"]], "... t (j c) -> ... t j c", c=3)
    body = _turn(_inverse(heading)[..., None, :], local)
    ground = root * root.new_tensor([1.0, 0.0, 1.0])                     # heights are stored absolute
    return torch.cat([root[..., None, :], body + ground[..., None, :]], -2)


# ---- 3. Joints -> features (numpy, one clip) -----------------------------------------------------
# Quaternions are (..., 4) with w first and float32, as in the published code.
_CONJUGATE = np.array([1, -1, -1, -1], np.float32)


def _rotate(q, v):
    uv = np.cross(q[..., 1:], v)
    return v + 2 * (q[..., :1] * uv + np.cross(q[..., 1:], uv))


def _multiply(q, r):
    w, u, s, v = q[..., :1], q[..., 1:], r[..., :1], r[..., 1:]
    return np.concatenate([w * s - (u * v).sum(-1, keepdims=True), w * v + s * u + np.cross(u, v)], -1)


def _between(u, v):
    """Shortest rotation from direction u to direction v (... 3), w >= 0; NaN for a vector without length."""
    u, v = u.astype(np.float32), v.astype(np.float32)
    lengths, dot = np.sqrt((u ** 2).sum(-1) * (v ** 2).sum(-1)), (u * v).sum(-1)
    q = np.concatenate([(lengths + dot)[..., None], np.cross(u, v)], -1)
    opposite = (dot < 0) & ((q[..., 1:] ** 2).sum(-1) < 1e-8 * lengths ** 2)
    if opposite.any():
        q[opposite] = _half_turn(*(np.broadcast_to(side, (*dot.shape, 3))[opposite] for side in (u, v)))
    return q / np.sqrt((q ** 2).sum(-1, keepdims=True))


def _half_turn(u, v):
    """The same (n 4) for nearly opposite directions (n 3): the sum |u||v| + uv has lost its digits and is
    taken from (|u||v| + uv) (|u||v| - uv) = |u x v|^2. Exactly opposite ones leave the axis open: it is the
    upright one, or x if u is upright."""
    u, v = (side / np.linalg.norm(side, axis=-1, keepdims=True) for side in np.float64((u, v)))
    cross = np.cross(u, v)
    sine = np.linalg.norm(cross, axis=-1, keepdims=True)
    fixed = np.where(np.abs(u[:, 1:2]) < .9, [0, 1, 0], [1, 0, 0])
    fixed = np.cross(u, np.cross(fixed, u))                 # its part across u
    axis = np.where(sine > 1e-10, cross / np.maximum(sine, 1e-10), fixed)
    return np.concatenate([sine / (1 - (u * v).sum(-1, keepdims=True)), axis], -1)


def _smooth(signal, sigma=20, radius=80):
    """Gaussian filter over time (t c) with the ends repeated."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    padded = np.pad(signal, ((radius, radius), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, weights / weights.sum(), "valid") for column in padded.T], -1)


def heading_quaternion(joints, skeleton, smooth, hips_swapped=True):
    """Rotation (t 4) that turns the body of joints (t j 3) to face +Z. `hips_swapped=True` is what the
    features have (quirk 1), with an identity in the first frame; False is how that frame is aligned."""
    hips = joints[:, skeleton.index["r_hip"]] - joints[:, skeleton.index["l_hip"]]
    shoulders = joints[:, skeleton.index["r_shoulder"]] - joints[:, skeleton.index["l_shoulder"]]
    across = (shoulders - hips if hips_swapped else shoulders + hips).astype(np.float64)           # Quirk 1
    forward = np.stack([across[:, 2], np.zeros(len(across)), -across[:, 0]], -1)  # +Y cross across
    forward /= np.maximum(np.linalg.norm(across, axis=-1, keepdims=True), 1e-8)  # collapsed poses
    if smooth:
        forward = _smooth(forward)                                                                 # Quirk 2
    forward /= np.maximum(np.linalg.norm(forward, axis=-1, keepdims=True), 1e-8)
    heading = _between(forward, np.array([0.0, 0.0, 1.0]))
    if hips_swapped:
        heading[0] = [1, 0, 0, 0]
    return heading


def _bone_rotations(joints, skeleton):
    """World rotation (t j-1 4) of every bone from its rest direction; joint b's bone is entry b - 1."""
    bones = joints[:, 1:] - joints[:, list(skeleton.parents[1:])]
    bones = bones / np.sqrt((bones ** 2).sum(-1, keepdims=True))
    return _between(skeleton.rest[1:], bones)


def uniform_skeleton(joints, skeleton, offsets):
    """Clip (t j 3) with the bone vectors `offsets` (j 3) of another body, its path scaled by leg length."""
    offsets = np.asarray(offsets, np.float32)
    side = {"t2m": "r", "kit": "l"}[skeleton.name]  # the leg that each published script measures
    ankle, knee, hip = (skeleton.index[f"{side}_{part}"] for part in ("ankle", "knee", "hip"))
    own = np.linalg.norm(np.diff(joints[0, [hip, knee, ankle]], axis=0), axis=-1).sum()
    scale = (np.abs(offsets[knee]).max() + np.abs(offsets[ankle]).max()) / own
    bones = _rotate(_bone_rotations(joints, skeleton), offsets[1:])
    return _chain_up(joints[:, 0] * scale, bones, skeleton)


def _chain_up(root, bones, skeleton):
    """Add bone vectors (t j-1 3) up from root positions (t 3)."""
    joints = np.empty((len(root), skeleton.joints, 3), bones.dtype)
    joints[:, 0] = root
    for chain in skeleton.chains:
        for a, b in zip(chain[:-1], chain[1:]):
            joints[:, b] = joints[:, a] + bones[:, b - 1]
    return joints


def canonicalise(joints, skeleton):
    """Clip (t j 3) with its lowest joint on the floor, starting at x = z = 0 and facing +Z."""
    joints = joints - joints.min(axis=(0, 1)) * np.array([0, 1, 0], joints.dtype)
    joints = joints - joints[0, 0] * np.array([1, 0, 1], joints.dtype)
    facing = heading_quaternion(joints[:1], skeleton, smooth=False, hips_swapped=False)
    return _rotate(facing[:, None], joints)


def local_positions(joints, heading):
    """Joints (t j 3) seen from the body: root at x = z = 0, turned by heading (t 4), same heights."""
    return _rotate(heading[:, None], joints - joints[:, :1] * np.array([1, 0, 1], joints.dtype))


def rotations_6d(joints, skeleton, heading):
    """First two columns of each bone's rotation relative to the previous bone of its chain, (t j-1 6)."""
    world = np.concatenate([heading[:, None], _bone_rotations(joints, skeleton)], 1)              # t j 4
    before = np.zeros(skeleton.joints, int)
    for chain in skeleton.chains:
        before[list(chain[2:])] = chain[1:-1]  # a chain's first bone hangs on the heading
    w, x, y, z = np.moveaxis(_multiply(world[:, before[1:]] * _CONJUGATE, world[:, 1:]), -1, 0)
    return np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w),
                     2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w)], -1)


def foot_contacts(joints, skeleton):
    """1 where a foot joint moves less than the threshold until the next frame: (t j 3) -> (t-1 4)."""
    step = np.diff(joints[:, list(skeleton.feet)], axis=0)
    return ((step ** 2).sum(-1) < skeleton.contact_threshold).astype(np.float32)


def rotation_speed(heading, fix_heading_flip=False):
    """Feature 0 from headings (t 4): arcsin of the y part of the step's quaternion, (t-1)."""
    if fix_heading_flip:
        # q and -q are one rotation; keep the sign continuous so that their difference stays small (quirk 4)
        flips = (heading[1:] * heading[:-1]).sum(-1) < 0
        heading = heading * np.where(np.cumsum(np.r_[False, flips]) % 2, -1, 1).astype(np.float32)[:, None]
    return np.arcsin(_multiply(heading[1:], heading[:-1] * _CONJUGATE)[:, 2])  # Quirk 3: half the turn


def flat_bone(joints, skeleton):
    """Which bone of joints (t j 3) has no length, the first one in words; "" if all have one."""
    flat = np.argwhere((joints[:, 1:] == joints[:, list(skeleton.parents[1:])]).all(-1))
    return f"the bone to joint {flat[0, 1] + 1} has no length in frame {flat[0, 0]}" if len(flat) else ""


def joints_to_features(joints, skeleton, *, retarget=True, fix_heading_flip=False):
    """Motion features of a clip, as `process_file` of the HumanML3D repository computes them.

    joints (t j 3) in the skeleton's units and frame rate -> (t-1 d) float32. `retarget`: True for the
    reference body's bone lengths, False to keep the clip's own, or bone vectors (j 3) of another body. Raises
    InputError for a wrong shape or for numbers that are not finite, coming in or going out (a bone without
    length has no direction, nor has a body that is one point).
    """
    with np.errstate(over="ignore"):                                     # reported below
        given = joints = np.asarray(joints, np.float32)
    if joints.ndim != 3 or joints.shape[1:] != (skeleton.joints, 3) or len(joints) < 2:
        raise InputError(f"joints have shape {joints.shape}, the {skeleton.name} skeleton needs "
                         f"(2 frames or more, {skeleton.joints}, 3)")
    if not np.isfinite(joints).all():
        raise InputError("joints contain numbers that are NaN or not finite in float32; repair or drop the "
                         "clip")
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if retarget is not False:
            joints = uniform_skeleton(joints, skeleton, skeleton.offsets if retarget is True else retarget)
        joints = canonicalise(joints, skeleton)
        heading = heading_quaternion(joints, skeleton, smooth=True)
        step, local = np.diff(joints, axis=0), local_positions(joints, heading)[:-1]
        features = np.concatenate([  # row t holds frame t and the step to the next
            rotation_speed(heading, fix_heading_flip)[:, None],
            _rotate(heading[1:], step[:, 0])[:, [0, 2]],
            local[:, 0, 1:2],
            rearrange(local[:, 1:], "t j c -> t (j c)"),
            rearrange(rotations_6d(joints, skeleton, heading)[:-1], "t j c -> t (j c)"),
            rearrange(_rotate(heading[:-1, None], step), "t j c -> t (j c)"),
            foot_contacts(joints, skeleton)], -1).astype(np.float32)
    if not np.isfinite(features).all():
        frame, column = np.argwhere(~np.isfinite(features))[0]
        why = flat_bone(given, skeleton)
        why = why or "hips and shoulders say no direction, or the numbers are too large"
        raise InputError(f"feature {column} of frame {frame} is not finite: {why}; repair or drop the clip")
    return features


# ---- 4. Other operations on joints ---------------------------------------------------------------

def resample(joints, fps, new_fps):
    """Natural cubic spline through joints (t j 3), read at another frame rate from the first frame on."""
    t = len(joints)
    # its second derivatives m at unit steps solve m[i-1] + 4 m[i] + m[i+1] = 6 (y[i+1] - 2 y[i] + y[i-1])
    system = np.eye(t) * 4 + np.eye(t, k=1) + np.eye(t, k=-1)
    system[0, 1] = system[-1, -2] = 0
    y = rearrange(joints, "t j c -> t (j c)").astype(np.float64)
    bend = np.zeros_like(y)
    bend[1:-1] = 6 * np.diff(y, n=2, axis=0)
    m = np.linalg.solve(system, bend)
    at = np.arange(int((t - 1) * new_fps / fps + 1e-9) + 1) * fps / new_fps
    i = np.minimum(at.astype(int), t - 2)
    b = (at - i)[:, None]
    a = 1 - b
    new = a * y[i] + b * y[i + 1] + ((a ** 3 - a) * m[i] + (b ** 3 - b) * m[i + 1]) / 6
    return rearrange(new, "t (j c) -> t j c", c=3).astype(np.float32)


def kit_to_t2m(joints):
    """KIT-ML joints (t 21 3) at 12.5 fps -> HumanML3D joints (t 22 3) at 20 fps in metres.

    Directions are KIT's (except the hips'), lengths HumanML3D's; the path is scaled by leg length, and the
    lowest foot keeps its (scaled) height. Of the extra joints, spine2 lies between KIT's two of the spine.
    """
    joints = resample(joints, KIT.fps, T2M.fps)
    hip, knee, ankle = (KIT.index[f"l_{part}"] for part in ("hip", "knee", "ankle"))
    leg = np.linalg.norm(np.diff(joints[:, [hip, knee, ankle]], axis=1), axis=-1).sum(1)
    joints = joints * np.float32(T2M.leg / np.median(leg))
    target = np.empty((len(joints), T2M.joints, 3), np.float32)
    for part, j in T2M.index.items():
        target[:, j] = joints[:, KIT.index[part]]
    target[:, 3], target[:, 9] = joints[:, 1], joints[:, 2]
    target[:, 6] = (joints[:, 1] + joints[:, 2]) / 2
    for collar, shoulder in ((13, 16), (14, 17)):  # these lie between neck and shoulder
        target[:, collar] = .6 * target[:, 12] + .4 * target[:, shoulder]
    bones = target[:, 1:] - target[:, list(T2M.parents[1:])]
    # KIT's root lies between the hips, HumanML3D's pelvis above them: its hip bones point 57 degrees down
    side, down = target[:, 1] - target[:, 2], target[:, 0] - target[:, 3]
    side, down = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (side, down))
    bones[:, 0], bones[:, 1] = .55 * side + .83 * down, -.55 * side + .83 * down
    bones *= (T2M.bone_lengths[1:, None] / np.linalg.norm(bones, axis=-1, keepdims=True)).astype(np.float32)
    result = _chain_up(joints[:, 0], bones, T2M)
    result[..., 1] += (joints[:, 11:, 1].min(1) - result[:, list(T2M.feet), 1].min(1))[:, None]
    return result


def physical_metrics(joints, skeleton):
    """How physical a clip (t j 3) looks, as a dict; compare with the values of real data, never with zero.

    foot_skate          share of contacts (ankle < .12, toe < .05 m over the floor) faster than .5 m/s
    jerk                mean length of the joints' third difference, m/s^3; depends on the frame rate
    floor_penetration   mean depth of the lowest joint under the floor, cm
    bone_variation      largest std / mean of a bone's length
    floating            share of frames with every foot joint > .10 m over the floor, root not in free fall
    speed               mean speed of the joints, m/s; the cheapest way to please a critic is to stand still

    The floor is the 5 % quantile of toe heights. Raises InputError for fewer than 4 frames.
    """
    fps, joints = skeleton.fps, np.asarray(joints, np.float64) / skeleton.units_per_metre
    if len(joints) < 4:
        raise InputError(f"physical metrics need 4 frames or more, the clip has {len(joints)}")
    ankles, toes = ([skeleton.index[f"{side}_{part}"] for side in "lr"] for part in ("ankle", "toe"))
    floor = np.quantile(joints[:, toes, 1], .05)
    feet = joints[:, ankles + toes]                                                                # t 4 3
    speed = np.linalg.norm(np.diff(feet[..., [0, 2]], axis=0), axis=-1) * fps
    contact = (feet[:-1, :, 1] - floor) < np.array([.12, .12, .05, .05])
    bones = np.linalg.norm(joints[:, 1:] - joints[:, list(skeleton.parents[1:])], axis=-1)
    fall = np.diff(joints[:, 0, 1], n=2) * fps ** 2 < -4.0               # m/s^2; free fall is -9.81
    falling = np.r_[fall[:1], fall, fall[-1:]]
    return {"foot_skate": float((speed[contact] > .5).mean()) if contact.any() else 0.0,
            "jerk": float(np.linalg.norm(np.diff(joints, n=3, axis=0), axis=-1).mean() * fps ** 3),
            "floor_penetration": float(100 * np.maximum(0, floor - joints[..., 1].min(1)).mean()),
            "bone_variation": float((bones.std(0) / np.maximum(bones.mean(0), 1e-8)).max()),
            "floating": float(((feet[..., 1] - floor > .10).all(1) & ~falling).mean()),
            "speed": float(np.linalg.norm(np.diff(joints, axis=0), axis=-1).mean() * fps)}
