"""A data set folder in the layout of HumanML3D and KIT-ML:

    train.txt  val.txt  test.txt     one id a line
    new_joint_vecs/ID.npy            features, t d
    texts/ID.txt                     one caption a line: caption#lemma/POS lemma/POS ...#from#to
    Mean.npy  Std.npy                d
    new_joints/ID.npy                t j 3, optional: equals the joints recovered from the features

where from and to are seconds, both 0.0 for the whole clip. Layout and rules are those of the HumanML3D and
text-to-motion repositories (Guo et al., CVPR 2022).
"""
import math
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import InputError
from common.embedded import oracle
from common.features import SKELETONS

SPLITS = ("train", "val", "test")
MAX_LOSS = 0.01         # damaged share of a split above which nothing is loaded
# Length limits choose clips and a bad line costs only that caption: neither is a lost clip.
LOST_REASONS = ("missing_motion", "missing_text", "bad_shape", "non_finite", "no_caption")


class TextLine(NamedTuple):
    """One annotated sentence of a text file."""
    caption: str
    tokens: list
    start: float            # seconds; start = stop = 0 means the whole clip
    stop: float


def parse_text_line(line):
    """One line of a text file, or None if unusable: a field missing, no caption, impossible times."""
    fields = line.strip().split("#")
    if len(fields) < 4 or not fields[0].strip():
        return None
    try:
        start, stop = (0.0 if math.isnan(time) else time for time in map(float, fields[2:4]))
    except ValueError:
        return None
    if not (start == stop == 0.0 or 0.0 <= start < stop < math.inf):
        return None
    return TextLine(fields[0].strip(), fields[1].split(), start, stop)


def load_array(path):
    """The array in a .npy file; an empty one if the file is truncated, holds objects or is something else."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile):
        return np.empty(0)
    return array if isinstance(array, np.ndarray) else np.empty(0)


def _length_reason(frames, skeleton):
    return "too_short" if frames < skeleton.min_frames else "too_long" if frames >= 200 else None


def _read_clip(root, name, skeleton, skipped):
    """The clips of one id as dicts, as in the official loader: the whole and its sub-segments."""
    def skip(reason, what=name):
        skipped.setdefault(reason, []).append(what)
        return []

    motion_path, text_path = root / "new_joint_vecs" / f"{name}.npy", root / "texts" / f"{name}.txt"
    if not motion_path.is_file():
        return skip("missing_motion")
    if not text_path.is_file():
        return skip("missing_text")
    motion = load_array(motion_path)
    if motion.ndim != 2 or motion.shape[1] != skeleton.feature_dim or motion.dtype.kind != "f":
        return skip("bad_shape")
    if not np.isfinite(motion).all():
        return skip("non_finite")
    if reason := _length_reason(len(motion), skeleton):
        return skip(reason)
    text = text_path.read_bytes().decode("utf-8-sig", errors="replace")
    found = [parse_text_line(line) for line in text.splitlines() if line.strip()]
    lines = [line for line in found if line is not None]
    if len(lines) < len(found):
        skip("bad_text_line")
    if not lines:
        return skip("no_caption")
    whole = [line for line in lines if line.stop == 0.0]
    parts = [(name, slice(None), whole)] if whole else []
    for line in (line for line in lines if line.stop > 0.0):
        # 20 frames a second for both data sets, as in the official loader; KIT-ML has no sub-segments
        first, last = int(line.start * 20), min(int(line.stop * 20), len(motion))
        segment = f"{name}@{first}-{last}"
        if reason := _length_reason(last - first, skeleton):
            skip(reason, segment)
        else:
            same = sum(label.startswith(segment) for label, _, _ in parts)
            parts.append((segment + (f".{same + 1}" if same else ""), slice(first, last), [line]))
    return [dict(name=label, features=motion[frames].astype(np.float32),
                 captions=[line.caption for line in chosen], tokens=[line.tokens for line in chosen],
                 attributes=[oracle.caption_attributes(line.caption) for line in chosen])
            for label, frames, chosen in parts]


def read_statistics(root):
    """(skeleton, mean (d), std (d)) of a folder; InputError for missing files or a wrong width."""
    wanted = [f"{split}.txt" for split in SPLITS] + ["Mean.npy", "Std.npy", "new_joint_vecs", "texts"]
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a data set folder in the KIT-ML / HumanML3D layout")
    if missing := [name for name in wanted if not (root / name).exists()]:
        raise InputError(f"{root}: not a complete data set, missing: {', '.join(missing)}")
    mean, std = load_array(root / "Mean.npy"), load_array(root / "Std.npy")
    if mean.ndim != 1 or len(mean) not in SKELETONS or std.shape != mean.shape:
        raise InputError(f"{root / 'Mean.npy'}: shapes {mean.shape} and {std.shape} (Std.npy), expected "
                         "(263,) for HumanML3D or (251,) for KIT-ML")
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
        raise InputError(f"{root / 'Mean.npy'}: this file or Std.npy holds NaN or a negative std; restore it")
    return SKELETONS[len(mean)], mean, std


def read_split(root, split, skeleton):
    """(clips, skipped, ids) of one split."""
    ids = (root / f"{split}.txt").read_bytes().decode("utf-8-sig", errors="replace").split()
    if strange := [name for name in ids if not re.fullmatch(r"[\w-]+", name)]:
        raise InputError(f"{root / split}.txt: {strange[0][:40]!r} is not an id; expected one id a line")
    ids, skipped = list(dict.fromkeys(ids)), {}
    return [clip for name in ids for clip in _read_clip(root, name, skeleton, skipped)], skipped, ids


def describe(skipped):
    """{reason: ids} in one line, with the first five ids of each."""
    return ", ".join(f"{reason} {len(ids)} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
                     for reason, ids in sorted(skipped.items()))


def read(path):
    """A folder -> its skeleton (told by the width of Mean.npy), {split: clips as dicts, see datasets.Clip}.

    Official rules: clips of min_frames to 199 frames are used, and a sub-segment with its own times is a clip
    of its own. One printed line counts what is not used. Raises InputError if something is missing, if more
    than 1 % of a split's ids are damaged (a length outside the limits is no damage), or if a split is empty.
    """
    root = Path(path)
    skeleton, _, _ = read_statistics(root)
    splits, skipped = {}, {}
    for split in SPLITS:
        splits[split], missed, ids = read_split(root, split, skeleton)
        lost = {reason: missed[reason] for reason in LOST_REASONS if reason in missed}
        count = sum(len(names) for names in lost.values())
        if count > MAX_LOSS * len(ids):
            raise InputError(f"{root}: {count} of {len(ids)} clips of {split} are damaged, more than 1 %: "
                             f"{describe(lost)}; restore or unlist them")
        if not splits[split]:
            raise InputError(f"{root}: {split}.txt leaves no clip ({describe(missed) or 'it is empty'})")
        for reason, names in missed.items():
            skipped.setdefault(reason, []).extend(names)
    if skipped:
        print(f"{root.name}: not used: {describe(skipped)}")
    return skeleton, splits
