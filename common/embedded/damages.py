"""Damages of a motion, graded: what a critic learns to tell from the motion as it was.

Each maps joints (t j 3) in metres to a copy of the same length that looks worse with each grade 1 to 3. The
same state of the generator g gives the same damage at every grade, only weaker or stronger.
Letters: t frames, j joints, d features.
"""
import math

import torch

from common import features


def metres(motion, skeleton):
    """Raw features (... t d) -> joints (... t j 3) in metres."""
    return features.features_to_joints(motion, skeleton) / skeleton.units_per_metre


def jitter(joints, grade, g, skeleton):
    """Every joint trembles by itself."""
    return joints + (0.01, 0.02, 0.04)[grade - 1] * torch.randn(joints.shape, generator=g)


def slide(joints, grade, g, skeleton):
    """The body glides over the floor while a foot stands: where the slower foot is slowest."""
    feet = joints[:, list(skeleton.feet)]
    speed = feet.diff(dim=0, prepend=feet[:1]).norm(dim=-1).amin(1)  # t
    angle = 2 * math.pi * torch.rand((), generator=g)
    way = (speed <= speed.median()).cumsum(0) * (0.2, 0.5, 1.0)[grade - 1] / skeleton.fps
    return joints + way[:, None, None] * torch.stack([angle.cos(), 0 * angle, angle.sin()])


# Seconds. The last stands still to the end: with .8 s at most, the start pose held for the whole clip scored
# higher than two thirds of the decoded motions, and standing still is what reinforcement learning then finds.
FREEZES = 0.3, 0.8, 99.0


def freeze_frames(joints, grade, g, skeleton):
    """The picture stands still, then jumps to where the motion is by then."""
    n = min(round(FREEZES[grade - 1] * skeleton.fps), len(joints))
    start = int(torch.rand((), generator=g) * (len(joints) - n))
    damaged = joints.clone()
    damaged[start:start + n] = joints[start]
    return damaged


def warp(joints, grade, g, skeleton):
    """Time runs slower by 15, 30 or 50 %, and makes up for it by one jump ahead."""
    share, t = (0.15, 0.3, 0.5)[grade - 1], len(joints)
    cut = int(t * (0.25 + 0.5 * torch.rand((), generator=g)))
    at = torch.arange(t) * (1 - share) + share * (t - 1) * (torch.arange(t) >= cut)
    before = at.long().clamp(max=t - 2)
    return torch.lerp(joints[before], joints[before + 1], (at - before)[:, None, None])


def rush(joints, grade, g, skeleton):
    """Everything is 1.3, 1.6 or 2.2 times as fast, and goes backwards when it is over: without this damage
    haste raised the score."""
    t = len(joints)
    at = torch.arange(t) * (1.3, 1.6, 2.2)[grade - 1] % (2 * t - 2)
    at = torch.minimum(at, 2 * t - 2 - at)
    before = at.long().clamp(max=t - 2)
    return torch.lerp(joints[before], joints[before + 1], (at - before)[:, None, None])


def bones(joints, grade, g, skeleton):
    """Every bone is longer or shorter by a factor of its own; the root and all directions stay."""
    factors = torch.exp((0.06, 0.12, 0.25)[grade - 1] * torch.randn(skeleton.joints, generator=g))
    damaged = joints.clone()
    for chain in skeleton.chains:
        for a, b in zip(chain[:-1], chain[1:]):
            damaged[:, b] = damaged[:, a] + factors[b] * (joints[:, b] - joints[:, a])
    return damaged


def floating(joints, grade, g, skeleton):
    """The body hovers over the floor or sinks into it."""
    sign = torch.rand((), generator=g).round() * 2 - 1
    return joints + sign * (0.05, 0.12, 0.25)[grade - 1] * joints.new_tensor([0.0, 1.0, 0.0])


def swap_codes(motion, grade, g, skeleton, vq):
    """Through the tokenizer with a tenth, a quarter or half of the codes drawn anew: raw features (t d) ->
    joints (t j 3). The only damage that starts from features."""
    codes, counts = vq.tokenise(motion[None], torch.tensor([len(motion)], device=motion.device))
    n = codes.shape[1]
    chosen = torch.rand(n, generator=g).argsort()[:max(1, round((0.1, 0.25, 0.5)[grade - 1] * n))]
    fresh = torch.randint(len(vq.quantizer.codebook), (n,), generator=g)
    codes[0, chosen] = fresh[chosen].to(codes.device)
    return metres(vq.decode(codes, counts)[0][0], skeleton)


DAMAGES = {"jitter": jitter, "slide": slide, "freeze": freeze_frames, "rush": rush, "bones": bones,
           "float": floating, "codes": swap_codes, "warp": warp}
HELD_OUT = "warp"  # never trained on: does the score mean anything beyond what it has seen?


def damaged(name, motion, grade, g, skeleton, vq):
    """Raw features (t d) -> joints (t j 3) in metres with this damage; grade 0 is the motion as it is."""
    if grade and name == "codes":
        return swap_codes(motion.to(vq.mean.device), grade, g, skeleton, vq).cpu()
    joints = metres(motion, skeleton)
    return DAMAGES[name](joints, grade, g, skeleton) if grade else joints
