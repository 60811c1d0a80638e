"""Motion-text data: folders in the layout of HumanML3D and KIT-ML, the embedded data, statistics, batches.

A data set folder holds

    train.txt  val.txt  test.txt     one id a line
    new_joint_vecs/ID.npy            features, t d
    texts/ID.txt                     one caption a line: caption#lemma/POS lemma/POS ...#from#to
    Mean.npy  Std.npy                d
    new_joints/ID.npy                t j 3, optional: equals the joints recovered from the features

where from and to are seconds, both 0.0 for the whole clip. Layout and rules are those of the HumanML3D and
text-to-motion repositories (Guo et al., CVPR 2022).

    python -m common.datasets check data/KIT-ML      # sizes, what is skipped and why; exit code 2 on damage
"""
import argparse
import json
import math
import re
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import InputError, features as motion_features
from common.embedded import movements, oracle, wording
from common.features import KIT, SKELETONS, T2M, features_to_joints, joints_to_features
from common.runs import fingerprint, run_main
from common.training import cached, source_of

MAX_LENGTH = 196        # frames; the longest clip of the benchmark
UNIT = 4                # lengths are multiples of it
MAX_LOSS = 0.01         # damaged share of a split above which nothing is loaded
SPLITS = ("train", "val", "test")
FOLDERS = {"kit": "KIT-ML", "humanml3d": "HumanML3D"}
DEFAULT_ROOT = "data"
# Length limits choose clips and a bad line costs only that caption: neither is a lost clip.
LOST_REASONS = ("missing_motion", "missing_text", "bad_shape", "non_finite", "no_caption")


# ---- 1. Clips and data sets ----------------------------------------------------------------------

@dataclass
class Clip:
    """One motion with its captions; the three lists have one entry a caption."""
    name: str
    features: np.ndarray            # t d, float32, raw
    captions: list
    tokens: list                    # of lists of 'lemma/POS'
    attributes: list                # of dicts for the oracle; {} = nothing that can be checked
    subject: str = ""
    tags: tuple = ()                # for instance "unseen_wording"


@dataclass
class Dataset:
    """Clips of one feature space in three splits."""
    label: str                      # "embedded kit", "folder mini_kit (KIT-ML layout)"
    skeleton: motion_features.Skeleton
    splits: dict                    # "train", "val", "test" -> [Clip]
    skipped: dict                   # reason -> [ids]
    embedded: bool
    fingerprint: str                # of everything in the clips

    @property
    def longest(self):
        """Frames of the longest clip of any split."""
        return max(len(clip.features) for clips in self.splits.values() for clip in clips)

    @property
    def usual_length(self):
        """Median of the train split in frames, a multiple of UNIT."""
        return int(np.median([len(clip.features) for clip in self.splits["train"]])) // UNIT * UNIT


def _dataset(label, skeleton, splits, skipped, embedded):
    content = [[split, clip.name, len(clip.features), zlib.crc32(np.ascontiguousarray(clip.features)),
                clip.captions, clip.attributes] for split in SPLITS for clip in splits[split]]
    return Dataset(label, skeleton, splits, skipped, embedded, fingerprint([skeleton.name, content])[:16])


def trimmed(features):
    """The first frames of features (t d): at most MAX_LENGTH, a multiple of UNIT."""
    return np.ascontiguousarray(features[:min(len(features), MAX_LENGTH) // UNIT * UNIT])


def _family(clip):
    """The recording of a clip: the same for its mirror image and for sub-segments."""
    return clip.name.removeprefix("M").partition("@")[0]


def half(clips, which):
    """Half 0 or 1 of a list of clips; mirror images and sub-segments are on the same side as their clip."""
    family = [_family(clip) for clip in clips]
    rank = {name: i for i, name in enumerate(dict.fromkeys(family))}
    return [clip for clip, name in zip(clips, family) if rank[name] % 2 == which]


# ---- 2. Reading a folder -------------------------------------------------------------------------

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
        start, stop = (float(field) for field in fields[2:4])
    except ValueError:
        return None
    start, stop = (0.0 if math.isnan(tag) else tag for tag in (start, stop))
    if not (start == stop == 0.0 or 0.0 <= start < stop < math.inf):
        return None
    return TextLine(fields[0].strip(), fields[1].split(), start, stop)


def read_texts(path):
    """(usable lines, number of unusable ones) of a text file; blank lines are neither."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    lines = [parse_text_line(line) for line in text.splitlines() if line.strip()]
    return [line for line in lines if line is not None], lines.count(None)


def _load_array(path):
    """The array in a .npy file; an empty one if the file is truncated, holds objects or is something else."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile):
        return np.empty(0)
    return array if isinstance(array, np.ndarray) else np.empty(0)


def _read_motion(path, width):
    """(features (t d) float32, None) or (None, reason)."""
    motion = _load_array(path)
    if motion.ndim != 2 or motion.shape[1] != width or motion.dtype.kind != "f":
        return None, "bad_shape"
    if not np.isfinite(motion).all():
        return None, "non_finite"
    return motion.astype(np.float32), None


def _length_reason(frames, skeleton):
    return "too_short" if frames < skeleton.min_frames else "too_long" if frames >= 200 else None


def _read_clip(root, name, skeleton, skipped):
    """The clips of one id, as in the official loader: the whole with its captions, and its sub-segments."""
    def skip(reason, what=name):
        skipped.setdefault(reason, []).append(what)
        return []

    motion_path, text_path = root / "new_joint_vecs" / f"{name}.npy", root / "texts" / f"{name}.txt"
    if not motion_path.is_file():
        return skip("missing_motion")
    if not text_path.is_file():
        return skip("missing_text")
    motion, reason = _read_motion(motion_path, skeleton.feature_dim)
    reason = reason or _length_reason(len(motion), skeleton)
    if reason:
        return skip(reason)
    lines, bad = read_texts(text_path)
    if bad:
        skip("bad_text_line")
    if not lines:
        return skip("no_caption")

    def clip(label, part, chosen):
        captions = [line.caption for line in chosen]
        return Clip(label, part, captions, [line.tokens for line in chosen],
                    [oracle.caption_attributes(caption) for caption in captions])

    whole = [line for line in lines if line.stop == 0.0]
    clips = [clip(name, motion, whole)] if whole else []
    for line in lines:
        if line.stop > 0.0:
            # 20 frames a second for both data sets, as in the official loader; KIT-ML has no sub-segments
            first, last = int(line.start * 20), min(int(line.stop * 20), len(motion))
            reason = _length_reason(last - first, skeleton)
            if reason:
                skip(reason, f"{name}@{first}-{last}")
                continue
            same = sum(c.name.startswith(f"{name}@{first}-{last}") for c in clips)
            label = f"{name}@{first}-{last}" + (f".{same + 1}" if same else "")
            clips.append(clip(label, motion[first:last], [line]))
    return clips


def _read_statistics(root):
    """(skeleton, mean (d), std (d)) of a folder; InputError for missing files or a wrong width."""
    wanted = [f"{split}.txt" for split in SPLITS] + ["Mean.npy", "Std.npy", "new_joint_vecs", "texts"]
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a data set folder in the KIT-ML / HumanML3D layout")
    missing = [name for name in wanted if not (root / name).exists()]
    if missing:
        raise InputError(f"{root}: not a complete data set, missing: {', '.join(missing)}")
    mean, std = _load_array(root / "Mean.npy"), _load_array(root / "Std.npy")
    if mean.ndim != 1 or len(mean) not in SKELETONS or std.shape != mean.shape:
        raise InputError(f"{root / 'Mean.npy'}: shapes {mean.shape} and {std.shape} (Std.npy), expected "
                         "(263,) for HumanML3D or (251,) for KIT-ML")
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
        raise InputError(f"{root / 'Mean.npy'}: this file or Std.npy holds NaN or a negative std; restore it")
    return SKELETONS[len(mean)], mean, std


def _read_ids(root, split):
    ids = (root / f"{split}.txt").read_bytes().decode("utf-8-sig", errors="replace").split()
    strange = [name for name in ids if not re.fullmatch(r"[\w-]+", name)]
    if strange:
        raise InputError(f"{root / split}.txt: {strange[0][:40]!r} is not an id; expected one id a line")
    return list(dict.fromkeys(ids))


def _read_split(root, split, skeleton):
    """(clips, skipped, ids) of one split."""
    skipped, ids = {}, _read_ids(root, split)
    return [clip for name in ids for clip in _read_clip(root, name, skeleton, skipped)], skipped, ids


def _describe(skipped):
    return ", ".join(f"{reason} {len(ids)} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
                     for reason, ids in sorted(skipped.items()))


def load_folder(path):
    """The data set in a folder of the KIT-ML / HumanML3D layout, told apart by the width of Mean.npy.

    Official rules: clips of min_frames to 199 frames are used, and a sub-segment with its own times is a clip
    of its own. Clips keep all their frames. Whatever is not used is counted in `skipped` and in one printed
    line. Raises InputError if something is missing, if more than 1 % of a split's ids are damaged (a length
    outside the limits is no damage), or if a split is empty.
    """
    root = Path(path)
    skeleton, _, _ = _read_statistics(root)
    splits, skipped = {}, {}
    for split in SPLITS:
        splits[split], missed, ids = _read_split(root, split, skeleton)
        lost = {reason: missed[reason] for reason in LOST_REASONS if reason in missed}
        count = sum(len(names) for names in lost.values())
        if count > MAX_LOSS * len(ids):
            raise InputError(f"{root}: {count} of {len(ids)} clips of {split} are damaged, more than 1 %: "
                             f"{_describe(lost)}; restore or unlist them")
        if not splits[split]:
            raise InputError(f"{root}: {split}.txt leaves no clip ({_describe(missed) or 'it is empty'})")
        for reason, names in missed.items():
            skipped.setdefault(reason, []).extend(names)
    if skipped:
        print(f"{root.name}: not used: {_describe(skipped)}")
    label = f"folder {root.resolve().name} ({'KIT-ML' if skeleton is KIT else 'HumanML3D'} layout)"
    return _dataset(label, skeleton, splits, skipped, False)


def converted(dataset, space):
    """The same data in another space, lengths multiples of UNIT, at most MAX_LENGTH: "t2m", HumanML3D's (22
    joints, 20 fps, 263-d), or "native", its own. KIT clips are converted from joint positions."""
    def convert(clip):
        if space == "native" or dataset.skeleton is T2M:
            return trimmed(clip.features)
        joints = motion_features.kit_to_t2m(features_to_joints(clip.features, KIT))
        return trimmed(joints_to_features(joints, T2M, retarget=False, fix_heading_flip=True))

    splits = {split: [replace(clip, features=convert(clip)) for clip in clips]
              for split, clips in dataset.splits.items()}
    return _dataset(dataset.label, T2M if space == "t2m" else dataset.skeleton, splits, dataset.skipped,
                    dataset.embedded)


# ---- 3. The embedded data set, and which data a name means ---------------------------------------

def load_dataset(name_or_path, *, data_root=DEFAULT_ROOT, cache_dir=".cache", space="t2m", seed=0, clips=None,
                 use_cache=True):
    """Dataset by name ("kit", "humanml3d") or path, in one space; lengths multiples of 4, at most 196.

    A path is read or refused. A name means the folder KIT-ML / HumanML3D under data_root; where that does not
    exist, and data_root is the default, the embedded data of that name is built (or taken from cache_dir),
    said in one line. space: "t2m" (22 joints, 20 fps, 263-d) or "native" (kit: 21 joints, 12.5 fps, 251-d).
    seed and clips (how many) shape the embedded data only. Raises InputError.
    """
    if space not in ("t2m", "native"):
        raise InputError(f"space must be t2m or native, not {space!r}")
    folder = Path(data_root) / FOLDERS[name_or_path] if name_or_path in FOLDERS else Path(name_or_path)
    if folder.exists() or name_or_path not in FOLDERS:
        return converted(load_folder(folder), space)
    if Path(data_root) != Path(DEFAULT_ROOT):
        raise InputError(f"{folder}: no such folder; correct --data-root or leave it out (embedded data)")
    print(f"*** {folder} not found: using the EMBEDDED procedural {name_or_path} data, not the real data ***")
    skeleton = KIT if (name_or_path, space) == ("kit", "native") else T2M
    return _embedded(name_or_path, skeleton, seed, clips, cache_dir, use_cache)


# What captions call an action, as stems; an action that is not listed is its own stem.
SYNONYMS = {"clap": "clap|applaud", "jump": "jump|leap|hop", "march": "march|high knee",
            "punch": "punch|box|jab", "raise": r"rais|lift|(?:hold|put)\w* (?:\w+ )*up",
            "run": "run|ran|jog|sprint|dash", "squat": "squat|crouch", "turn": "turn|spin|rotat",
            "throw": "throw|threw|thrown|toss|hurl", "walk": "walk|stroll|step", "wave": "wav|greet"}


def mentions(caption, action):
    """Whether a caption speaks of an action ("kick"), in any form of it or of its synonyms."""
    stems = SYNONYMS.get(action, re.escape(action.removesuffix("e")))
    return bool(re.search(rf"\b(?:{stems})(?:[bgmnpt]?(?:e|ed|ing|er)?s?)?\b", caption.lower()))


def leave_out(dataset, action):
    """One data set as two: the clips without an action, and those of it -> (rest, left).

    A clip of which any caption mentions the action leaves the rest, and so do its mirror image and all other
    segments of its recording; of it only the captions that mention the action remain.
    """
    def matching(clip):
        which = [k for k, caption in enumerate(clip.captions) if mentions(caption, action)]
        return replace(clip, **{name: [getattr(clip, name)[k] for k in which]
                                for name in ("captions", "tokens", "attributes")})
    left = {split: [clip for clip in map(matching, clips) if clip.captions]
            for split, clips in dataset.splits.items()}
    gone = {_family(clip) for clips in left.values() for clip in clips}
    rest = {split: [clip for clip in clips if _family(clip) not in gone]
            for split, clips in dataset.splits.items()}
    for part in SPLITS:
        with_it, without = len(left[part]), len(rest[part])
        if min(with_it, without) < 2:
            raise InputError(f"leaving out {action!r}: {with_it} {part} clips of {dataset.label} mention it, "
                             f"{without} do not; both must be 2 or more")
    return tuple(_dataset(f"{dataset.label} {title} {action}", dataset.skeleton, splits, dataset.skipped,
                          dataset.embedded) for title, splits in (("without", rest), ("with", left)))


def load_pair(source, target, *, clips, left_out="", **options):
    """Two domains in one feature space -> (source, target).

    An empty source is the other one of kit and humanml3d; with an action left_out it is the target without
    that action, and the target only that. clips: how many of each, for embedded data. options: those of
    load_dataset.
    """
    if left_out:
        if source:
            raise InputError(f"leaving out {left_out!r} divides one data set in two: leave out the source")
        return leave_out(load_dataset(target, clips=clips[1], **options), left_out)
    other = {"kit": "humanml3d", "humanml3d": "kit"}
    if not source and target not in other:
        raise InputError(f"--dataset {target}: a folder needs a source beside it: kit, humanml3d or another "
                         "folder")
    return tuple(load_dataset(name, space="t2m", clips=count, **options)
                 for name, count in zip((source or other[target], target), clips))


def _embedded(domain, skeleton, seed, clips, cache_dir, use_cache):
    """The embedded data of a domain, built or from the cache."""
    kept = ("name", "split", "captions", "tokens", "attributes", "subject", "tags")

    def build():
        built = movements.build(domain, skeleton, seed=seed, clips=clips)
        rows = [trimmed(joints_to_features(clip.joints, skeleton, fix_heading_flip=True)) for clip in built]
        notes = [{"frames": len(features), **{name: getattr(clip, name) for name in kept}}
                 for clip, features in zip(built, rows)]
        return {"features": np.concatenate(rows), "notes": json.dumps(notes)}  # all clips end to end

    code = source_of(movements, wording, oracle, motion_features)  # a comment makes nothing anew
    key = [code, domain, skeleton.name, seed, clips, UNIT, MAX_LENGTH]
    stored = cached(cache_dir, key, build, f"embedded-{domain}-{skeleton.name}", use_cache)
    splits, start = {split: [] for split in SPLITS}, 0
    for entry in json.loads(stored["notes"]):
        frames, split = entry.pop("frames"), entry.pop("split")
        entry["tags"] = tuple(entry["tags"])
        splits[split].append(Clip(features=stored["features"][start:start + frames].numpy(), **entry))
        start += frames
    if empty := [split for split in SPLITS if not splits[split]]:
        raise InputError(f"embedded {domain} data: {clips} clips leave no {empty[0]} clip; use more")
    return _dataset(f"embedded {domain}", skeleton, splits, {}, embedded=True)


# ---- 4. Statistics -------------------------------------------------------------------------------

class Statistics:
    """Mean and standard deviation (d) of one model, and which kind it is: "generator" or "scorer".

    A motion is denormalised with the generator's where it leaves the generator and normalised with the
    scorer's where it enters a scorer. The role is checked by `require`, because mixing the two up gives
    plausible, wrong numbers.
    """

    def __init__(self, mean, std, role):
        if role not in ("generator", "scorer"):
            raise ValueError(f"role must be 'generator' or 'scorer', not {role!r}")
        self.mean, self.std = (torch.as_tensor(part, dtype=torch.float32) for part in (mean, std))
        self.role = role

    def require(self, role):
        """Self, or ValueError if these are the statistics of the other role."""
        if self.role != role:
            raise ValueError(f"statistics of a {self.role} were handed to a {role}: denormalise first")
        return self

    @classmethod
    def from_clips(cls, clips, role, feat_bias=1.0, block_average=True, blocks=None):
        """Statistics of all frames of the clips (give the train split only).

        block_average: one std a block, as in Std.npy of HumanML3D. feat_bias divides the std of the root and
        contact blocks, which makes these few numbers weigh more: 5 in old baselines, 25 in the released
        evaluators. blocks: {name: slice (d)}, by default those of features, and none at other widths.
        """
        frames = sum(len(clip.features) for clip in clips)
        mean = sum(clip.features.sum(0, dtype=np.float64) for clip in clips) / frames
        std = np.sqrt(sum(((clip.features - mean) ** 2).sum(0) for clip in clips) / frames)
        if blocks is None:
            blocks = motion_features.blocks(SKELETONS[len(mean)]) if len(mean) in SKELETONS else {}
        for name, columns in blocks.items():
            if block_average:
                std[columns] = std[columns].mean()
            if name.startswith("root") or name == "contacts":
                std[columns] /= feat_bias
        return cls(mean, np.maximum(std, 1e-6), role)  # a constant feature must not divide by zero


# ---- 5. Words ------------------------------------------------------------------------------------

def words(caption):
    """Lower-case words of a caption, any script and length: "He's waving, twice" -> he's, waving, twice."""
    plain = unicodedata.normalize("NFKC", caption).replace("\u2019", "'").lower()
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain)


# Shares of words that are made unknown, and replaced by a random one, while a generator is trained.
# Not in the papers: if a word is seen in wrong places too, the model stays uncertain about it. Its samples
# then differ, and RL has something to choose from.
WORD_DROP, WORD_SWAP = 0.1, 0.03


class Vocabulary:
    """Word -> number; 0 is padding and 1 an unknown word."""

    def __init__(self, words):
        self.words = list(words)
        self._ids = {word: i for i, word in enumerate(self.words, start=2)}

    def __len__(self):
        return len(self.words) + 2

    @classmethod
    def from_captions(cls, captions):
        """Every word of the captions, in alphabetical order."""
        return cls(sorted({word for caption in captions for word in words(caption)}))

    def encode(self, captions, max_words=32, spoil=None):
        """Captions (list of b) -> ids (b n) int64, mask (b n) bool, True = word; n is max_words or less.

        spoil: a torch.Generator that draws which words are made unknown or replaced, see WORD_DROP.
        """
        rows = [[self._ids.get(word, 1) for word in words(caption)[:max_words]] for caption in captions]
        ids = torch.zeros(len(rows), max([1, *map(len, rows)]), dtype=torch.int64)
        for row, numbers in zip(ids, rows):
            row[:len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        mask = ids > 0
        if spoil is not None:
            ids = ids.masked_fill((torch.rand(ids.shape, generator=spoil) < WORD_DROP) & mask, 1)
            other = torch.randint(1, len(self), ids.shape, generator=spoil)
            ids = torch.where((torch.rand(ids.shape, generator=spoil) < WORD_SWAP) & mask, other, ids)
        return ids, mask


def draw_captions(clips, generator):
    """A random caption of each clip, a list."""
    draws = torch.rand(len(clips), generator=generator).tolist()
    return [clip.captions[int(u * len(clip.captions))] for clip, u in zip(clips, draws)]


def length_table(clips):
    """Number of words -> lengths in frames of the clips with such captions: long sentences take longer."""
    table = {}
    for clip in clips:
        for caption in clip.captions:
            table.setdefault(len(words(caption)), []).append(len(clip.features))
    return table


def draw_lengths(table, captions, generator):
    """A length in frames for each caption (b), from the row of the length_table that is nearest in words."""
    draws, lengths = torch.rand(len(captions), generator=generator).tolist(), []
    for caption, u in zip(captions, draws):
        count = len(words(caption))
        pool = table[min(table, key=lambda known: (abs(known - count), known))]
        lengths.append(pool[int(u * len(pool))])
    return torch.tensor(lengths)


# ---- 6. Batches ----------------------------------------------------------------------------------

class Batch(NamedTuple):
    """Clips side by side, one caption each."""
    motion: torch.Tensor            # b t d, raw, zeros after the end of a clip
    lengths: torch.Tensor           # b, int64, frames
    captions: list


def collate(clips):
    """Clips -> Batch with the first caption of each; lengths are multiples of UNIT, padding is zero in RAW
    features."""
    lengths = torch.tensor([len(clip.features) // UNIT * UNIT for clip in clips])
    motion = torch.zeros(len(clips), int(lengths.max()), clips[0].features.shape[1])  # b t d
    for row, clip, n in zip(motion, clips, lengths.tolist()):
        row[:n] = torch.from_numpy(clip.features[:n])
    return Batch(motion, lengths, [clip.captions[0] for clip in clips])


# ---- 7. python -m common.datasets check DIR ------------------------------------------------------

def check_folder(path):
    """Print sizes, skipped clips and statistics of a folder; returns the damages as a list of strings."""
    root = Path(path)
    skeleton, mean, std = _read_statistics(root)
    print(f"{root}: {skeleton.joints} joints, {skeleton.feature_dim} features, {skeleton.fps} fps")
    damage, home, everything = [], {}, []
    for split in SPLITS:
        clips, skipped, ids = _read_split(root, split, skeleton)
        frames = [len(clip.features) for clip in clips]
        segments = sum("@" in clip.name for clip in clips)
        captions = sum(len(clip.captions) for clip in clips)
        print(f"  {split}: {len(ids)} ids, {len(clips)} clips ({segments} sub-segments), "
              f"{captions} captions, {min(frames, default=0)} to {max(frames, default=0)} frames, "
              f"{sum(frames) / skeleton.fps / 60:.1f} minutes")
        if skipped:
            print(f"        not used: {_describe(skipped)}")
        damage += [f"{split}: {reason} {len(names)}" for reason, names in sorted(skipped.items())
                   if reason not in ("too_short", "too_long")]
        damage += [] if clips else [f"{split}: empty"]
        for name in ids:  # a mirrored twin in another split leaks the test motion
            first = home.setdefault(name.removeprefix("M"), split)
            if first != split:
                damage.append(f"{name}: itself or its mirror image is in {first} and in {split}")
        everything += [clip for clip in clips if "@" not in clip.name]
    if everything:
        damage += _check_statistics(everything, mean, std) + _check_joints(root, everything, skeleton)
    return damage


def _check_statistics(clips, mean, std):
    own = Statistics.from_clips(clips, "generator")
    shift = np.abs(own.mean.numpy() - mean) / np.maximum(std, 1e-6)
    ratio = own.std.numpy() / np.maximum(std, 1e-6)
    print(f"  Mean.npy is within {shift.max():.3f} std of the clips' mean; clips' std / Std.npy: "
          f"{ratio.min():.3f} to {ratio.max():.3f}")
    damage = []
    if shift.max() > 0.25:
        damage.append(f"Mean.npy: feature {shift.argmax()} is {shift.max():.2f} std off the clips' mean")
    if ratio.min() < 0.5 or ratio.max() > 2:
        damage.append("Std.npy: off by a factor of 2 or more; is it an evaluator's (parts divided by 25)?")
    return damage


def _check_joints(root, clips, skeleton):
    """new_joints is optional; where a file exists it must be the joints that the features describe."""
    compared, wrong = 0, []
    for clip in clips:
        path = root / "new_joints" / f"{clip.name}.npy"
        if path.is_file():
            compared += 1
            stored, joints = _load_array(path), features_to_joints(clip.features, skeleton)
            limit = 1e-3 * skeleton.units_per_metre
            if stored.shape != joints.shape or not np.abs(stored - joints).max() < limit:
                wrong.append(clip.name)
    print(f"  new_joints: {compared} compared with the features, {len(wrong)} differ")
    return [f"new_joints: {_describe({'differ': wrong})}"] if wrong else []


def main(argv=None):
    """The command line above; InputError if the folder is damaged."""
    parser = argparse.ArgumentParser(prog="python -m common.datasets", description="Check a data set folder.")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("folder", help="a folder in the KIT-ML / HumanML3D layout")
    args = parser.parse_args(argv)
    if damage := check_folder(args.folder):
        more = f"; and {len(damage) - 5} more" if len(damage) > 5 else ""
        raise InputError(f"{args.folder} is damaged: {'; '.join(damage[:5])}{more}")
    print("  sound")


if __name__ == "__main__":
    run_main(main)
