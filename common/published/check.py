"""Is a data set folder sound? Sizes, what is skipped and why; exit code 2 on damage.

    python -m common.published.check data/KIT-ML
"""
import argparse
from pathlib import Path

import numpy as np

from common import InputError, datasets
from common.features import features_to_joints
from common.published import folder
from common.runs import run_main


def check_folder(path):
    """Print sizes, skipped clips and statistics of a folder; returns the damages as a list of strings."""
    root = Path(path)
    skeleton, mean, std = folder.read_statistics(root)
    print(f"{root}: {skeleton.joints} joints, {skeleton.feature_dim} features, {skeleton.fps} fps")
    damage, home, everything, train = [], {}, [], 0
    for split in folder.SPLITS:
        clips, skipped, ids = folder.read_split(root, split, skeleton)
        clips = [datasets.Clip(**clip) for clip in clips]
        frames = [len(clip.features) for clip in clips]
        segments = sum("@" in clip.name for clip in clips)
        captions = sum(len(clip.captions) for clip in clips)
        print(f"  {split}: {len(ids)} ids, {len(clips)} clips ({segments} sub-segments), "
              f"{captions} captions, {min(frames, default=0)} to {max(frames, default=0)} frames, "
              f"{sum(frames) / skeleton.fps / 60:.1f} minutes")
        if skipped:
            print(f"        not used: {folder.describe(skipped)}")
        damage += [f"{split}: {folder.describe({reason: names})}" for reason, names in sorted(skipped.items())
                   if reason not in ("too_short", "too_long")]
        damage += [] if clips else [f"{split}: empty"]
        for name in ids:  # a mirrored twin in another split leaks the test motion
            first = home.setdefault(name.removeprefix("M"), split)
            if first != split:
                damage.append(f"{name}: itself or its mirror image is in {first} and in {split}")
        everything += [clip for clip in clips if "@" not in clip.name]
        train = train or len(everything)
    if everything:
        damage += _check_statistics(everything, train, mean, std)
        damage += _check_joints(root, everything, skeleton)
    return damage


def _check_statistics(clips, train, mean, std):
    """Mean.npy and Std.npy (d) against all clips, as published, or the first `train`, whichever is nearer."""
    found = []
    for name, part in (("all clips", clips), ("the train clips", clips[:train])):
        if part:
            own = datasets.Statistics.from_clips(part, "generator")
            shift = np.abs(own.mean.numpy() - mean) / np.maximum(std, 1e-6)
            found.append((shift.max(), name, shift.argmax(), own.std.numpy() / np.maximum(std, 1e-6)))
    worst, name, feature, ratio = min(found, key=lambda row: row[0])
    print(f"  Mean.npy is within {worst:.3f} std of the mean of {name}; their std / Std.npy: "
          f"{ratio.min():.3f} to {ratio.max():.3f}")
    damage = []
    if worst > 0.25:
        damage.append(f"Mean.npy: feature {feature} is {worst:.2f} std off the mean of {name}")
    if ratio.min() < 0.5 or ratio.max() > 2:
        damage.append("Std.npy: off by a factor of 2 or more; is it an evaluator's (parts divided by 25)?")
    return damage


def _check_joints(root, clips, skeleton):
    """new_joints is optional; where a file exists it must be the joints that the features describe."""
    stored, wrong = {path.stem: path for path in (root / "new_joints").glob("*.npy")}, []
    compared = [clip for clip in clips if clip.name in stored]
    for clip in compared:
        try:
            known = folder.load_array(stored[clip.name])
        except InputError:
            known = np.empty(0)
        joints = features_to_joints(clip.features, skeleton)
        limit = 1e-3 * skeleton.units_per_metre
        if known.shape != joints.shape or not np.abs(known - joints).max() < limit:
            wrong.append(clip.name)
    print(f"  new_joints: {len(compared)} compared with the features, {len(wrong)} differ")
    return [f"new_joints: {folder.describe({'differ': wrong})}"] if wrong else []


def main(argv=None):
    """The command line above; InputError if the folder is damaged."""
    parser = argparse.ArgumentParser(prog="python -m common.published.check",
                                     description="Check a data set folder.")
    parser.add_argument("folder", help="a folder in the KIT-ML / HumanML3D layout")
    args = parser.parse_args(argv)
    if damage := check_folder(args.folder):
        more = f"; and {len(damage) - 5} more" if len(damage) > 5 else ""
        raise InputError(f"{args.folder} is damaged: {'; '.join(damage[:5])}{more}")
    print("  sound")


if __name__ == "__main__":
    run_main(main)
