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
from common.embedded import english, oracle
from common.features import SKELETONS, blocks, flat_bone

SPLITS = ("train", "val", "test")
# Clips of a split: both halves of train have to tell two motions apart, and distances need two motions.
FEWEST = {"train": 4, "val": 2, "test": 2}
MAX_LOSS = 0.01         # damaged share of a split above which nothing is loaded
# Length limits choose clips and a bad line costs only that caption: neither is a lost clip.
LOST_REASONS = ("missing_motion", "missing_text", "bad_shape", "non_finite", "no_motion", "no_body",
                "no_caption")
LINE = "caption#lemma/POS lemma/POS ...#0.0#0.0"
POINTER = "version https://git-lfs", "is a Git LFS pointer: run git lfs pull in its repository"


class TextLine(NamedTuple):
    """One annotated sentence of a text file."""
    caption: str
    tokens: list
    start: float            # seconds; start = stop = 0 means the whole clip
    stop: float


def parse_text_line(line):
    """One line of a text file, or None if unusable: a field missing, no word to read, impossible times."""
    fields = line.strip().split("#")
    if len(fields) < 4 or not english.words(fields[0]):
        return None
    try:
        start, stop = (0.0 if math.isnan(time) else time for time in map(float, fields[2:4]))
    except ValueError:
        return None
    if not (start == stop == 0.0 or 0.0 <= start < stop < math.inf):
        return None
    return TextLine(fields[0].strip(), fields[1].split(), start, stop)


def load_array(path):
    """The array of numbers in a .npy file; InputError that names the file and says what it holds instead."""
    try:
        with open(path, "rb") as file:
            start = file.read(40)
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); restore it") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        what = "is a damaged .npy file" if start.startswith(b"\x93NUMPY") else "is no .npy file"
        if start.decode("latin-1").startswith(POINTER[0]):
            what = POINTER[1]
        elif "Object arrays" in str(error):
            what = "holds Python objects: store plain float numbers"
        raise InputError(f"{path} {what}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an archive of arrays (.npz): store one array")
    return array


def _wrong_shape(array, skeleton):
    """What a motion (t d) should not be, in words; "" if it is fine."""
    t, width = skeleton.min_frames, skeleton.feature_dim
    other = {263: "HumanML3D", 251: "KIT-ML"}
    if array.ndim == 2 and array.shape[1] == width:
        return "" if array.dtype.kind == "f" else f"numbers of type {array.dtype}, wanted float32"
    fix = ""
    if array.ndim == 3 and array.shape[2] == 3:
        fix = ": these are joints; new_joint_vecs takes features (common.features.joints_to_features)"
    elif array.ndim == 3 and array.shape[0] == 1:
        fix = ": take its first axis away"
    elif array.ndim == 2 and array.shape[1] in other:
        fix = (f": these are features of {other[array.shape[1]]}, Mean.npy and Std.npy are of "
               f"{other[width]}, take both from one data set")
    elif array.ndim == 2 and array.shape[0] == width:
        fix = ": transpose it"
    return f"shape {array.shape}, wanted ({t} frames or more, {width}){fix}"


def _motion_reason(path, skeleton):
    """(motion (t d) float32 of a file, "", ""), or (None, reason, words that say why) if it is not used."""
    try:
        motion = load_array(path)
    except InputError as error:
        return None, "bad_shape", str(error)
    if wrong := _wrong_shape(motion, skeleton):
        return None, "bad_shape", f"{path} has {wrong}"
    with np.errstate(over="ignore"):
        single = motion.astype(np.float32)
    if not np.isfinite(single).all():
        large = "" if not np.isfinite(motion).all() else " in float32"
        frame = np.argmin(np.isfinite(single).all(1))
        return None, "non_finite", f"{path} is not finite{large} in frame {frame}"
    if reason := _length_reason(len(motion), skeleton):
        return None, reason, ""
    if not motion.any(1).all():
        frame = f" in frame {np.argmin(motion.any(1))}" if motion.any() else ""
        return None, "no_motion", f"{path} is all zero{frame}"
    if np.ptp(motion, axis=0).max() <= 1e-5 * max(1, np.abs(motion).max()):
        return None, "no_motion", f"{path} holds one pose in all frames"
    joints = np.zeros((len(single), skeleton.joints, 3), np.float32)    # seen from the body, t j 3
    joints[:, 0, 1:2] = single[:, blocks(skeleton)["root_height"]]
    joints[:, 1:] = single[:, blocks(skeleton)["positions"]].reshape(len(single), -1, 3)
    if flat := flat_bone(joints, skeleton):
        return None, "no_body", f"{path}: {flat}"
    return single, "", ""


def _length_reason(frames, skeleton):
    return "too_short" if frames < skeleton.min_frames else "too_long" if frames >= 200 else None


def _read_clip(root, name, skeleton, skipped):
    """The clips of one id as dicts, as in the official loader: the whole and its sub-segments."""
    def skip(reason, what=name, why=""):
        skipped.setdefault(reason, []).append(f"{what}: {why.replace(f'{root}/', '')}" if why else what)
        return []

    motion_path, text_path = root / "new_joint_vecs" / f"{name}.npy", root / "texts" / f"{name}.txt"
    if not motion_path.is_file():
        return skip("missing_motion")
    if not text_path.is_file():
        return skip("missing_text")
    motion, reason, why = _motion_reason(motion_path, skeleton)
    if reason:
        return skip(reason, why=why)
    text = text_path.read_bytes().decode("utf-8-sig", errors="replace")
    found = [(line, parse_text_line(line)) for line in text.splitlines() if line.strip()]
    lines = [read for _, read in found if read is not None]
    unread = next((line.strip() for line, read in found if read is None), "")
    what = "holds no line" if not unread else f"{unread[:40]!r}, wanted {LINE} with a word in the caption"
    why = f"texts/{name}.txt {POINTER[1] if text.startswith(POINTER[0]) else what}"
    if unread:
        skip("bad_text_line", why=why)
    if not lines:
        return skip("no_caption", why=why)
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
    return [dict(name=label, features=motion[frames],
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
    mean, std = (load_array(root / name) for name in ("Mean.npy", "Std.npy"))
    if mean.ndim != 1 or len(mean) not in SKELETONS or std.shape != mean.shape:
        raise InputError(f"{root / 'Mean.npy'}: shapes {mean.shape} and {std.shape} (Std.npy), expected "
                         "(263,) for HumanML3D or (251,) for KIT-ML")
    for name, row in (("Mean.npy", mean), ("Std.npy", std)):
        if row.dtype.kind not in "fiu" or not (np.abs(row) <= np.finfo(np.float32).max).all():
            raise InputError(f"{root / name}: holds NaN or no number of float32; restore it")
    if (std < 0).any():
        raise InputError(f"{root / 'Std.npy'}: holds a negative standard deviation; restore it")
    return SKELETONS[len(mean)], mean, std


def read_split(root, split, skeleton):
    """(clips, skipped, ids) of one split."""
    text = (root / f"{split}.txt").read_bytes().decode("utf-8-sig", errors="replace")
    if text.startswith(POINTER[0]):
        raise InputError(f"{root / split}.txt {POINTER[1]}")
    ids = text.split()
    if strange := [name for name in ids if not re.fullmatch(r"[\w-]+", name)]:
        raise InputError(f"{root / split}.txt: {strange[0][:40]!r} is not an id; expected one id a line")
    ids, skipped = list(dict.fromkeys(ids)), {}
    return [clip for name in ids for clip in _read_clip(root, name, skeleton, skipped)], skipped, ids


def describe(skipped):
    """{reason: ids} in one line, with the first five ids of each and what is wrong with the first."""
    said = []
    for reason, entries in sorted(skipped.items()):
        ids, why = zip(*(entry.partition(": ")[::2] for entry in entries))
        more = ", ..." if len(ids) > 5 else ""
        said.append(f"{reason} {len(ids)} ({', '.join(ids[:5])}{more}){': ' + why[0] if why[0] else ''}")
    return "; ".join(said)


def read(path):
    """A folder -> its skeleton (told by the width of Mean.npy), {split: clips as dicts, see datasets.Clip}.

    Official rules: clips of min_frames to 199 frames are used, and a sub-segment with its own times is a clip
    of its own. One printed line counts what is not used. Raises InputError if something is missing, if more
    than 1 % of a split's ids are damaged (a length outside the limits is no damage), or if a split leaves
    too few clips.
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
        if len(splits[split]) < FEWEST[split]:
            raise InputError(f"{root}: {split}.txt leaves {len(splits[split]) or 'no'} clip(s) of at least "
                             f"{FEWEST[split]} ({describe(missed) or 'it has no more'}); list more ids")
        for reason, names in missed.items():
            skipped.setdefault(reason, []).extend(names)
    if skipped:
        print(f"{root.name}: not used: {describe(skipped)}")
    return skeleton, splits
