"""Motion-text data: a published folder or the embedded data, statistics, words, batches.

The layout of a folder is in common/published/folder.py.
"""
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import InputError, features as motion_features
from common.embedded import clips as embedded, english
from common.features import KIT, SKELETONS, T2M, features_to_joints, joints_to_features
from common.published import folder
from common.published.folder import SPLITS
from common.runs import fingerprint

MAX_LENGTH = 196        # frames; the longest clip of the benchmark
UNIT = 4                # lengths are multiples of it
FOLDERS = {"kit": "KIT-ML", "humanml3d": "HumanML3D"}
DEFAULT_ROOT = "data"


# ---- 1. Clips and data sets ----------------------------------------------------------------------

@dataclass
class Clip:
    """One motion with its captions; the three lists have one entry a caption."""
    name: str
    features: np.ndarray            # t d, float32, raw
    captions: list
    tokens: list                    # of lists of 'lemma/POS'
    attributes: list                # of dicts for the oracle; {} = nothing that can be checked


@dataclass
class Dataset:
    """Clips of one feature space in three splits."""
    label: str                      # "embedded kit", "folder mini_kit (KIT-ML layout)"
    skeleton: motion_features.Skeleton
    splits: dict                    # "train", "val", "test" -> [Clip]
    fingerprint: str                # of everything in the clips

    @property
    def longest(self):
        """Frames of the longest clip of any split."""
        return max(len(clip.features) for clips in self.splits.values() for clip in clips)

    @property
    def usual_length(self):
        """Median of the train split in frames, a multiple of UNIT."""
        return int(np.median([len(clip.features) for clip in self.splits["train"]])) // UNIT * UNIT


def _dataset(label, skeleton, splits):
    content = [[split, clip.name, len(clip.features), zlib.crc32(np.ascontiguousarray(clip.features)),
                clip.captions, clip.attributes] for split in SPLITS for clip in splits[split]]
    return Dataset(label, skeleton, splits, fingerprint([skeleton.name, content])[:16])


def _family(clip):
    """The recording of a clip: the same for its mirror image and for sub-segments."""
    return clip.name.removeprefix("M").partition("@")[0]


def half(clips, which):
    """Half 0 or 1 of a list of clips; mirror images and sub-segments are on the same side as their clip."""
    rank = {name: i for i, name in enumerate(dict.fromkeys(map(_family, clips)))}
    return [clip for clip in clips if rank[_family(clip)] % 2 == which]


# ---- 2. Reading a folder -------------------------------------------------------------------------

def load_folder(path):
    """The data set in a folder of the KIT-ML / HumanML3D layout; rules and errors: published/folder.py.

    Clips keep all their frames. One printed line counts what is not used.
    """
    skeleton, splits = folder.read(path)
    label = f"folder {Path(path).resolve().name} ({'KIT-ML' if skeleton is KIT else 'HumanML3D'} layout)"
    splits = {split: [Clip(**clip) for clip in clips] for split, clips in splits.items()}
    return _dataset(label, skeleton, splits)


def converted(dataset, space):
    """The same data in another space, see load_dataset; to "t2m", KIT clips go through joint positions."""
    def convert(clip):
        features = clip.features
        if space == "t2m" and dataset.skeleton is KIT:
            try:
                joints = motion_features.kit_to_t2m(features_to_joints(features, KIT))
                features = joints_to_features(joints, T2M, retarget=False, fix_heading_flip=True)
            except InputError as error:
                raise InputError(f"{dataset.label}: clip {clip.name} has no body of the other skeleton: "
                                 f"{error}") from error
        frames = min(len(features), MAX_LENGTH) // UNIT * UNIT
        return replace(clip, features=np.ascontiguousarray(features[:frames]))

    splits = {split: [convert(clip) for clip in clips] for split, clips in dataset.splits.items()}
    return _dataset(dataset.label, T2M if space == "t2m" else dataset.skeleton, splits)


# ---- 3. The embedded data set, and which data a name means ---------------------------------------

def load_dataset(name_or_path, *, data_root=DEFAULT_ROOT, cache_dir=".cache", space="t2m", seed=0, clips=None,
                 use_cache=True):
    """Dataset by name ("kit", "humanml3d") or path, in one space; lengths multiples of 4, at most 196.

    A path is read or refused. A name means the folder KIT-ML / HumanML3D under data_root; where that does not
    exist, and data_root is the default, the embedded data of that name is built (or taken from cache_dir),
    said in one line. space: "t2m" (22 joints, 20 fps, 263-d) or "native" (kit: 21 joints, 12.5 fps, 251-d).
    seed and clips (how many) shape the embedded data only. Raises InputError for data that cannot be used.
    """
    _known(name_or_path)
    folder = Path(data_root) / FOLDERS[name_or_path] if name_or_path in FOLDERS else Path(name_or_path)
    if folder.exists() or name_or_path not in FOLDERS:
        return converted(load_folder(folder), space)
    if Path(data_root) != Path(DEFAULT_ROOT):
        raise InputError(f"{folder}: no such folder; correct --data-root or leave it out (embedded data)")
    print(f"*** {folder} not found: using the EMBEDDED procedural {name_or_path} data, not the real data ***")
    skeleton = KIT if (name_or_path, space) == ("kit", "native") else T2M
    made = embedded.load(name_or_path, skeleton, seed, clips, cache_dir, use_cache)
    splits = {split: [Clip(**clip) for clip in part] for split, part in made.items()}
    return _dataset(f"embedded {name_or_path}", skeleton, splits)


def _known(name, flag=""):
    """InputError for what is neither a name of FOLDERS nor a path; flag: what it was given by, if known."""
    if name not in FOLDERS and not Path(name).exists():
        names = {"t2m": "humanml3d", "humanml": "humanml3d", "hml3d": "humanml3d", "kit-ml": "kit"}
        meant = next((own for own in (names.get(name.lower()), name.lower()) if own in FOLDERS), "")
        raise InputError(
            f"{flag}{name}: no data set of this name and no such folder; --dataset (and --source) take kit, "
            "humanml3d or the path of a folder in the layout of KIT-ML / HumanML3D, such as data/KIT-ML"
            f"{'; did you mean ' + meant + '?' if meant else ''}")


def leave_out(dataset, action):
    """One data set as two: the clips without an action, and those of it -> (rest, left).

    A clip of which any caption mentions the action leaves the rest, and so do its mirror image and all other
    segments of its recording; of it only the captions that mention the action remain.
    """
    def matching(clip):
        which = [k for k, caption in enumerate(clip.captions) if english.mentions(caption, action)]
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
    return (_dataset(f"{dataset.label} without {action}", dataset.skeleton, rest),
            _dataset(f"{dataset.label} with {action}", dataset.skeleton, left))


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
    _known(target, "--dataset ")
    if source:
        _known(source, "--source ")
    other = {"kit": "humanml3d", "humanml3d": "kit"}
    if not source and target not in other:
        raise InputError(f"--dataset {target}: a folder needs a source beside it: kit, humanml3d or another "
                         "folder")
    return tuple(load_dataset(name, space="t2m", clips=count, **options)
                 for name, count in zip((source or other[target], target), clips))


# ---- 4. Statistics -------------------------------------------------------------------------------

class Statistics:
    """Mean and standard deviation (d) of one model, and which kind it is: "generator" or "scorer".

    A motion is denormalised with the generator's where it leaves the generator and normalised with the
    scorer's where it enters a scorer. The role is checked by `require`, because mixing the two up gives
    plausible, wrong numbers.
    """

    def __init__(self, mean, std, role):
        self.mean, self.std = (torch.as_tensor(part, dtype=torch.float32) for part in (mean, std))
        self.role = role

    def require(self, role):
        """Self, or ValueError if these are the statistics of the other role."""
        if self.role != role:
            raise ValueError(f"statistics of a {self.role} were handed to a {role}: denormalise first")
        return self

    @classmethod
    def from_clips(cls, clips, role, feat_bias=1.0, blocks=None):
        """Statistics of all frames of the clips (give the train split only), one std a block as in Std.npy.

        feat_bias divides the std of the root and contact blocks, which makes these few numbers weigh more: 5
        in old baselines, 25 in the released evaluators. blocks: {name: slice (d)}, by default those of
        features, and none at other widths.
        """
        frames = sum(len(clip.features) for clip in clips)
        mean = sum(clip.features.sum(0, dtype=np.float64) for clip in clips) / frames
        std = np.sqrt(sum(((clip.features - mean) ** 2).sum(0) for clip in clips) / frames)
        if blocks is None:
            blocks = motion_features.blocks(SKELETONS[len(mean)]) if len(mean) in SKELETONS else {}
        for name, columns in blocks.items():
            std[columns] = std[columns].mean()
            if name.startswith("root") or name == "contacts":
                std[columns] /= feat_bias
        return cls(mean, np.maximum(std, 1e-6), role)  # a constant feature must not divide by zero


# ---- 5. Words ------------------------------------------------------------------------------------

words = english.words

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
        ids[~(ids > 0).any(1), 0] = 1                       # no word at all reads as one unknown word
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
    """Clips -> Batch with the first caption of each; lengths are cut to multiples of UNIT."""
    lengths = torch.tensor([len(clip.features) // UNIT * UNIT for clip in clips])
    motion = torch.zeros(len(clips), int(lengths.max()), clips[0].features.shape[1])  # b t d
    for row, clip, n in zip(motion, clips, lengths.tolist()):
        row[:n] = torch.from_numpy(clip.features[:n])
    return Batch(motion, lengths, [clip.captions[0] for clip in clips])
