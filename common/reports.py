"""The tables of a run: every metric of a set of motions, rows with intervals, paired gains.

`oracle` is the share of the asked-for attributes that hold in a motion, `oracle_all` the share of motions in which all of
them hold; both come from joints alone (common/synthetic.py) and no model has ever been trained on them.
"""

import math

import numpy as np
import torch

from common import datasets, evaluators, features, runs, synthetic

COLUMNS = ("reward", "judge", "oracle", "oracle_all", "r_precision_top1", "r_precision_top3", "fid", "mm_dist", "diversity",
           "multimodality", "foot_skate", "jerk")
PAIRED = ("reward", "judge", "oracle", "oracle_all", "foot_skate", "jerk")


def questions(clips, repeat):
    """What repeat number `repeat` asks for: captions, attributes (both b) and lengths (b) in frames. Caption r of a clip
    with n captions is number r mod n; lengths are those of the clips, as in the published benchmarks."""
    captions = [clip.captions[repeat % len(clip.captions)] for clip in clips]
    attributes = [clip.attributes[repeat % len(clip.captions)] for clip in clips]
    return captions, attributes, torch.tensor([len(clip.features) for clip in clips])


def real_motion(clips):
    """Raw features of the clips themselves (b t d), padded with zeros: the ground-truth row."""
    return datasets.collate(clips).motion


def oracle_verdicts(motion, lengths, attributes, skeleton):
    """Raw features (b t d) -> for each motion a dict attribute -> bool, empty where nothing can be checked."""
    joints = features.features_to_joints(motion, skeleton)
    return [synthetic.oracle(j[:n].numpy(), skeleton, asked) if asked else {}
            for j, n, asked in zip(joints, lengths.tolist(), attributes)]


@torch.no_grad()
def measure(motion, lengths, captions, attributes, *, clips, skeleton, reward_model, judge, seed=None):
    """All metrics of motions (b t d), raw, on the CPU -> (per motion {name: (b)}, of the set {name: float}).

    clips: the real motions that FID compares with. seed: of the pools of R-precision and the pairs of diversity; None
    leaves the benchmark metrics out.
    """
    device = next(judge.parameters()).device
    moved = motion.to(device), lengths.to(device)
    each = {}
    for name, scorer in (("reward", reward_model), ("judge", judge)):
        seen, asked = evaluators.embed(scorer, *moved, captions)
        each[name] = (seen * asked).sum(-1).double().cpu().numpy()
    verdicts = [list(v.values()) for v in oracle_verdicts(motion, lengths, attributes, skeleton)]
    each["oracle"] = np.array([np.mean(v) if v else np.nan for v in verdicts])
    each["oracle_all"] = np.array([float(all(v)) if v else np.nan for v in verdicts])
    joints = features.features_to_joints(motion, skeleton)
    physics = [features.physical_metrics(j[:n].numpy(), skeleton) for j, n in zip(joints, lengths.tolist())]
    each |= {name: np.array([p[name] for p in physics]) for name in physics[0]}
    if seed is None:
        return each, {}
    real = datasets.collate(clips)
    whole = evaluators.benchmark(judge, (*moved, captions), (real.motion.to(device), real.lengths.to(device)), generator=runs.generator(seed, 0, "benchmark"),
                                 pairs=min(300, len(clips) // 2))
    return each, {name: value for name, value in whole.items() if name not in each}


def row(repeats):
    """List of measure() results -> {metric: [mean, half width of the 95 % interval over the repeats]}; "_prompts" keeps
    the mean of each prompt for paired_gain."""
    flat = [{name: mean(values) for name, values in each.items()} | whole for each, whole in repeats]
    result = {name: [float(y) for y in evaluators.mean_interval([f[name] for f in flat])] for name in flat[0]}
    result["_prompts"] = {name: np.array([mean(column) for column in np.stack([each[name] for each, _ in repeats], 1)])
                          for name in PAIRED}
    return result


def mean(values):
    """Mean of the values that are there; NaN (nothing to check) if none is."""
    there = np.asarray(values)[np.isfinite(values)]
    return float(there.mean()) if len(there) else math.nan


def paired_gain(after, before):
    """Mean of after - before over prompts and the half width of its 95 % interval. The prompts are the sample here, so
    this interval, unlike that of the repeats, says how far other prompts may differ."""
    gain = {}
    for name, values in after["_prompts"].items():
        difference = values - before["_prompts"][name]
        difference = difference[np.isfinite(difference)]
        if len(difference) > 1:
            gain[name] = [float(difference.mean()), float(1.96 * difference.std(ddof=1) / math.sqrt(len(difference)))]
    return gain


def print_table(title, rows):
    """Print rows {name: {metric: [mean, half width]}} under the benchmark's names."""
    print(f"\n{title}\n" + " " * 9 + "".join(f"{name.replace('r_precision_', 'r_'):>15s}" for name in COLUMNS))
    for name, metrics in rows.items():
        cells = (f"{metrics[c][0]:.3f} +-{metrics[c][1]:.3f}" if c in metrics and math.isfinite(metrics[c][0]) else "-"
                 for c in COLUMNS)
        print(f"{name:9s}" + "".join(f"{cell:>15s}" for cell in cells))

