"""Compare common/features.py with reference arrays, stage by stage (see tests/parity)."""

import numpy as np
import torch

from common import features as F
from tests import reference

SKELETONS = {22: F.T2M, 21: F.KIT}
# largest allowed error in metres (22 joints) or KIT units (21 joints); rotation numbers have no unit
TOLERANCES = {"t2m": {"": 2e-5, "rotations": 1e-4, "rec_rot": 1e-4},
              "kit": {"": 1e-2, "root_rotation": 1e-5, "rotations": 3e-3, "rec_root_quat": 1e-5,
                      "root_quat_smooth": 1e-5}}


def check(path):
    """Run every stage on its own reference input; returns [(field, max_error, tolerance)]."""
    with np.load(path) as data:
        ref = {key: data[key] for key in data.files}
    offsets, results = ref["tgt_offsets"], []
    skeleton = SKELETONS[len(offsets)]
    tolerances = TOLERANCES[skeleton.name]

    def compare(clip, field, mine, theirs, tolerance=None):
        error = np.abs(np.asarray(mine, np.float64) - theirs).max() if mine.shape == theirs.shape else np.inf
        results.append((f"{clip}_{field}", float(np.nan_to_num(error, nan=np.inf)),
                        tolerance or tolerances.get(field, tolerances[""])))

    for clip in sorted(key[:-len("_joints_in")] for key in ref if key.endswith("_joints_in")):
        uniform = F.uniform_skeleton(ref[f"{clip}_joints_in"], skeleton, offsets)
        canonical = F.canonicalise(uniform, skeleton)
        heading = F.heading_quaternion(canonical, skeleton, smooth=True)
        compare(clip, "uniform", uniform, ref[f"{clip}_uniform"])
        compare(clip, "canonical", canonical, ref[f"{clip}_canonical"])
        compare(clip, "root_quat_smooth", heading, ref[f"{clip}_root_quat_smooth"])
        compare(clip, "local", F.local_positions(canonical, heading), ref[f"{clip}_local"])

        features = F.joints_to_features(ref[f"{clip}_joints_in"], skeleton, retarget=offsets)
        expected = ref[f"{clip}_features"]
        for name, columns in F.blocks(skeleton).items():
            field = f"features[{name}]"
            if features.shape != expected.shape:
                results.append((f"{clip}_{field}", np.inf, 0.0))
            elif name == "contacts":  # 0 or 1: the share of entries that differ
                share = (features[:, columns] != expected[:, columns]).mean()
                results.append((f"{clip}_{field}", float(share), 1e-3))
            else:
                compare(clip, field, features[:, columns], expected[:, columns],
                        tolerances.get(name, tolerances[""]))

        stored = torch.from_numpy(expected.astype(np.float32))
        heading, root = F.recover_root(stored)
        compare(clip, "rec_root_quat", heading.numpy(), ref[f"{clip}_rec_root_quat"])
        compare(clip, "rec_root_pos", root.numpy(), ref[f"{clip}_rec_root_pos"])
        compare(clip, "rec_ric", F.features_to_joints(stored, skeleton).numpy(), ref[f"{clip}_rec_ric"])
        rotated = reference.features_to_joints_rot6d(stored, skeleton, offsets)
        compare(clip, "rec_rot", rotated.numpy(), ref[f"{clip}_rec_rot"])
    return results
