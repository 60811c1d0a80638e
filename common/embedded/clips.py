"""The clips of the embedded data as motion features, built once and then taken from the cache."""
import json

import numpy as np

from common import InputError, features
from common.embedded import english, movements, oracle, wording
from common.training import cached, source_of

SAID = ("name", "captions", "tokens", "attributes")


def load(domain, skeleton, seed, clips, cache_dir, use_cache):
    """{"train", "val", "test": [dict(features (t d) float32, name, captions, tokens, attributes)]}.

    domain, skeleton, seed, clips: see movements.build; t is a multiple of 4, at most 80. Raises InputError
    for so few clips that a split is empty.
    """
    def build():
        built = movements.build(domain, skeleton, seed=seed, clips=clips)
        rows = [features.joints_to_features(clip.joints, skeleton, fix_heading_flip=True) for clip in built]
        notes = [{"split": clip.split, "frames": len(row), **{name: getattr(clip, name) for name in SAID}}
                 for clip, row in zip(built, rows)]
        return {"features": np.concatenate(rows), "notes": json.dumps(notes)}  # all clips end to end

    code = source_of(movements, wording, english.conjugate, oracle, features)  # a comment makes nothing anew
    key = [code, domain, skeleton.name, seed, clips]
    stored = cached(cache_dir, key, build, f"embedded-{domain}-{skeleton.name}", use_cache)
    splits, start = {"train": [], "val": [], "test": []}, 0
    for note in json.loads(stored["notes"]):
        stop = start + note.pop("frames")
        splits[note.pop("split")].append({"features": stored["features"][start:stop].numpy(), **note})
        start = stop
    if empty := [split for split, found in splits.items() if not found]:
        raise InputError(f"embedded {domain} data: {clips} clips leave no {empty[0]} clip; use more")
    return splits
