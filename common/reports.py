"""What a finished run shows: tables with intervals and paired gains, curves, storyboards, GIFs, exports.

A policy is known here as a sampler, `sampler(captions, lengths, purpose, repeat)` -> raw features (b t d) and
lengths (b) on the CPU, the same motions for the same arguments. A diffusion model takes the lengths asked
for, a token model chooses its own. So both share this file.

`reward` is what was optimised, `judge` the mean cosine of the scorer that never was. `oracle` is the share of
the asked-for attributes that hold in a motion, `oracle_all` the share of motions in which all of them hold;
both are read off the joints (common/oracle.py), and no model has learnt from them.
"""

import argparse
import json
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from common import (
    InputError, ab_page, datasets, features, generator, metrics, render, retrieval, runs)
from common.embedded import oracle

COLUMNS = ("reward", "judge", "oracle", "oracle_all", "text", "quality", "preference", "authenticity",
           "r_precision_top1", "r_precision_top3", "fid", "mm_dist", "diversity", "multimodality", "distinct",
           "length_error", "foot_skate", "jerk", "speed")
CURVES = (("reward",), ("text", "rival_text"), ("quality", "rival_quality"),
          ("preference", "rival_preference"), ("val_reward",),
          ("val_judge",), ("val_oracle",), ("val_fid",), ("total",), ("semantic",), ("authenticity",),
          ("anchor",), ("kl_base",), ("kl_ref", "rival_kl_ref"), ("val_jerk",),
          ("val_speed",), ("distinct",))
PAIRED = ("reward", "judge", "oracle", "oracle_all", "text", "quality", "preference", "authenticity",
          "foot_skate", "jerk", "speed")


class Scorers(NamedTuple):
    """Who measures: the optimised model, the independent one, and the skeleton of the features."""
    reward_model: retrieval.RetrievalModel
    judge: retrieval.RetrievalModel
    skeleton: features.Skeleton
    columns: object = None  # (motion, lengths, captions, clips) -> {further column: one value a motion (b)}


# ---- 1. Measuring ------------------------------------------------------------------------------------------


def questions(clips, repeat):
    """What repeat number `repeat` asks for: captions, attributes (both b) and lengths (b) in frames.

    Caption r of a clip with n captions is number r mod n; lengths are the clips' own, as in the benchmarks.
    """
    captions = [clip.captions[repeat % len(clip.captions)] for clip in clips]
    attributes = [clip.attributes[repeat % len(clip.captions)] for clip in clips]
    return captions, attributes, torch.tensor([len(clip.features) for clip in clips])


def to_joints(motion, lengths, skeleton):
    """Raw features (b t d), lengths (b) -> list of joints (t j 3) in metres, without padding."""
    return [j[:n].numpy() for j, n in zip(features.features_to_joints(motion, skeleton), lengths.tolist())]


@torch.no_grad()
def measure(motion, lengths, captions, attributes, scorers, clips=None, seed=0):
    """All metrics of motions (b t d), raw -> (per motion {name: (b)}, of the whole set {name: float}, the
    oracle's verdicts of each motion).

    clips: the real clips that FID compares with; without them the benchmark metrics are left out. seed: of
    the pools of R-precision and the pairs of diversity.
    """
    device = next(scorers.judge.parameters()).device
    moved, each = (motion.to(device), lengths.to(device)), {}
    for name, scorer in (("reward", scorers.reward_model), ("judge", scorers.judge)):
        seen, asked = retrieval.embed(scorer, *moved, captions)
        each[name] = (seen * asked).sum(-1).double().cpu().numpy()
    joints = to_joints(motion, lengths, scorers.skeleton)
    verdicts = [oracle.oracle(j, scorers.skeleton, a) if a else {} for j, a in zip(joints, attributes)]
    held = [list(v.values()) for v in verdicts]
    each["oracle"] = np.array([np.mean(v) if v else math.nan for v in held])  # NaN: nothing to check
    each["oracle_all"] = np.array([float(all(v)) if v else math.nan for v in held])
    physics = [features.physical_metrics(j, scorers.skeleton) for j in joints]
    each |= {name: np.array([p[name] for p in physics]) for name in physics[0]}
    if clips is None:
        return each, {}, verdicts
    real = datasets.collate(clips)
    whole = benchmark(
        scorers.judge, (*moved, captions), (real.motion.to(device), real.lengths.to(device)),
        generator=generator(seed, 0, "benchmark"), pairs=min(300, len(clips) // 2))
    return each, {name: value for name, value in whole.items() if name not in each}, verdicts


def benchmark(judge, generated, real, *, generator, pool=32, pairs=300):
    """One repeat: dict metric -> float; `judge` is the mean cosine of the motions with their captions.

    generated: (raw features (n t d), lengths (n), captions); real: (raw features, lengths), the set that FID
    compares with. The ground-truth row of a table is the real set in both places. Embeddings are scaled to
    unit length, so distances order pairs as cosines do; FID lies in 0..4. Repeat with other generators and
    sampling seeds, then summarise().
    """
    features, lengths, captions = generated
    motion, text = retrieval.embed(judge, features, lengths, captions)
    target, _ = retrieval.embed(judge, *real[:2])
    if min(len(motion), len(target)) < 2 * motion.shape[1]:
        warnings.warn(f"FID of {len(motion)} against {len(target)} motions in {motion.shape[1]} dimensions "
                      "is biased upward; compare it only with runs of the same size", stacklevel=2)
    return metrics.benchmark_embeddings(text, motion, target, generator=generator, pool=pool, pairs=pairs) | {
        "judge": (text * motion).sum(-1).mean().item()}


def benchmark_multimodality(judge, features, lengths, *, generator, times=10):
    """Multimodality of raw features (p g t d), lengths (p g): g samples of each of p prompts (100 x 30)."""
    motion, _ = retrieval.embed(judge, rearrange(features, "p g t d -> (p g) t d"), rearrange(lengths, "p g -> (p g)"))
    motion = rearrange(motion, "(p g) c -> p g c", p=len(features))
    return metrics.multimodality(motion, *metrics.draw_pairs(motion.shape[1], times, generator))


def tally(checks, verdicts, attributes):
    """Add the oracle's verdicts {"then.turn": bool} of motions that were asked for `attributes` to checks
    {"turn left": list of bool}."""
    for asked, verdict in zip(attributes, verdicts):
        for key, held in verdict.items():
            part, _, name = key.rpartition(".")
            checks.setdefault(f"{name} {(asked[part] if part else asked)[name]}", []).append(held)


def mean(values):
    """Mean of the values that are there; NaN if none is."""
    there = np.asarray(values)[np.isfinite(values)]
    return float(there.mean()) if len(there) else math.nan


def evaluate(clips, scorers, sampler=None, *, purpose="", repeats=1, benchmark=True):
    """A row of the table: {metric: [mean, half width of the 95 % interval over the repeats]}.

    sampler None measures the clips themselves, the ground truth. Clips without frames are captions that have
    no motion, and without the metrics that need one. "_prompts" keeps each prompt's mean over the repeats for
    paired_gain; "checks" tells of each thing the oracle was asked for, such as "gait walk", the share of the
    motions that do it and in how many it was asked. length_error is in frames, of a sampler that chooses its
    own lengths.
    """
    results, checks, real = [], {}, all(len(clip.features) for clip in clips)
    for repeat in range(repeats):
        captions, attributes, asked = questions(clips, repeat)
        motion, lengths = sampler(captions, asked, purpose, repeat) if sampler else (
            datasets.collate(clips).motion, asked)
        each, whole, verdicts = measure(motion, lengths, captions, attributes, scorers,
                                        clips if benchmark and real else None, repeat)
        tally(checks, verdicts, attributes)
        if real and scorers.columns:
            each |= scorers.columns(motion, lengths, captions, clips)
        if real and lengths is not asked:
            each["length_error"] = (lengths - asked).abs().double().numpy()
        results.append((each, whole))
    flat = [{name: mean(values) for name, values in each.items()} | whole for each, whole in results]
    row = {name: [float(y) for y in metrics.mean_interval([f[name] for f in flat])] for name in flat[0]}
    repeats_of = {name: np.stack([each[name] for each, _ in results], 1)  # clips, repeats
                  for name in PAIRED if name in results[0][0]}
    row["_prompts"] = {name: np.array([mean(v) for v in table]) for name, table in repeats_of.items()}
    row["checks"] = {name: [float(np.mean(held)), len(held)] for name, held in sorted(checks.items())}
    return row


def in_chunks(sample, size=128):
    """A sampler that calls sample(captions, lengths, rows, purpose, repeat) -> motion, lengths for `size`
    captions at a time, rows being their numbers in the whole call. None for lengths: those asked for."""
    def sampler(captions, lengths, purpose, repeat):
        chunks = torch.arange(len(captions)).split(size)
        motions, made = zip(*(
            sample([captions[k] for k in rows], lengths[rows], rows.tolist(), purpose, repeat)
            for rows in chunks))
        longest = max(motion.shape[1] for motion in motions)
        motion = torch.cat([F.pad(motion, (0, 0, 0, longest - motion.shape[1])).cpu() for motion in motions])
        return motion, lengths if made[0] is None else torch.cat(made).cpu()
    return sampler


def side_by_side(motions):
    """Motions [(b t d)] of different t -> (n b t d), zeros behind their ends."""
    longest = max(motion.shape[1] for motion in motions)
    return torch.stack([F.pad(motion, (0, 0, 0, longest - motion.shape[1])) for motion in motions])


def best_of(sampler, count, reward_model):
    """A sampler that keeps the best of `count` samples by reward: what it gives without any training."""
    @torch.no_grad()
    def best(captions, lengths, purpose, repeat):
        device = next(reward_model.parameters()).device
        tries = [sampler(captions, lengths, f"{purpose} try {n}", repeat) for n in range(count)]
        scores = torch.stack([reward_model.similarity(motion.to(device), made.to(device), captions)
                              for motion, made in tries])
        chosen = scores.argmax(0).cpu(), torch.arange(len(captions))
        made = torch.stack([made for _, made in tries])[chosen]
        own = lengths if all(one is lengths for _, one in tries) else made
        return side_by_side([motion for motion, _ in tries])[chosen], own
    return best


def variety(clips, scorers, sampler, *, prompts=32, samples=10, seed=0):
    """`samples` motions for each of the first `prompts` clips -> {"multimodality": mean distance of two of a
    prompt (the papers take 100 x 30), "distinct": share of a prompt's motions that are not repeated}, as
    [value, 0]: one repeat has no interval."""
    captions, _, lengths = questions(clips[:prompts], 0)
    made = [sampler(captions, lengths, "multimodality", n) for n in range(samples)]
    motion = side_by_side([motion for motion, _ in made]).transpose(0, 1)  # p g t d
    lengths = torch.stack([own for _, own in made], 1)  # p g
    device = next(scorers.judge.parameters()).device
    value = benchmark_multimodality(
        scorers.judge, motion.to(device), lengths.to(device),
        generator=generator(seed, 0, "multimodality"), times=samples // 2)
    # Equal up to rounding: a batch of another size may round its last bits another way.
    limit = 1e-3 * scorers.skeleton.units_per_metre
    differ = (motion[:, :, None] - motion[:, None]).abs().amax((-1, -2)) > limit
    first = [[all(differ[p, g, :g]) for g in range(samples)] for p in range(len(motion))]
    return {"multimodality": [float(value), 0.0], "distinct": [float(np.mean(first)), 0.0]}


def paired_gain(after, before):
    """Mean of after - before over prompts and the half width of its 95 % interval. The prompts are the sample
    here, so unlike that of the repeats this interval says how far other prompts may differ."""
    gain = {}
    for name, values in after["_prompts"].items():
        difference = values - before["_prompts"][name]
        difference = difference[np.isfinite(difference)]
        if len(difference) > 1:
            half_width = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
            gain[name] = [float(difference.mean()), float(half_width)]
    return gain


# ---- 2. Tables ---------------------------------------------------------------------------------------------


def compare(title, clips, scorers, samplers, *, purpose, repeats, gain=("tuned", "base")):
    """Rows gt, one per sampler (name -> sampler), and the paired gain of the two named in `gain`."""
    real = all(len(clip.features) for clip in clips)
    rows = {"gt": evaluate(clips, scorers, repeats=repeats)} if real else {}
    for name, sampler in samplers.items():
        rows[name] = evaluate(clips, scorers, sampler, purpose=purpose, repeats=repeats)
        if name in gain:
            rows[name] |= variety(clips, scorers, sampler)
    rows["gain"] = paired_gain(*(rows[name] for name in gain))
    for row in rows.values():
        row.pop("_prompts", None)
    heading = f"{title}: {len(clips)} clips, {repeats} repeats (gain: paired, its interval is over prompts)"
    print_table(heading, rows)
    return rows


def final_tables(source, target, scorers, base, tuned, repeats, best_count, more=None):
    """The tables of a finished run: the split that choices may look at (target val), gain (target test, with
    the best of `best_count` base samples as a reference) and retention (source test). more: further
    references for target test, name -> function(clips) -> sampler."""
    tables = {}
    for name, clips in (("target_val", target.splits["val"]), ("target_test", target.splits["test"]),
                        ("source_test", source.splits["test"])):
        rows = {"base": base, "tuned": tuned}
        if name == "target_test":
            rows[f"best of {best_count}"] = best_of(base, best_count, scorers.reward_model)
            rows |= {title: reference(clips) for title, reference in (more or {}).items()}
        tables[name] = compare(name.replace("_", " "), clips, scorers, rows, purpose=name, repeats=repeats)
    return tables


STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


def strength_curve(path, source, target, scorers, sampler_at):
    """Reward, judge and oracle on both test splits with the adapters at STRENGTHS, one repeat each; drawn as
    `path` -> {column: list}. sampler_at(strength) -> sampler. Past 1 is what no training has asked for."""
    log = {"strength": list(STRENGTHS)}
    for strength in tqdm(STRENGTHS, desc="strengths"):
        for title, domain in (("target", target), ("source", source)):
            row = evaluate(domain.splits["test"], scorers, sampler_at(strength), purpose=f"{title}_test",
                           benchmark=False)
            for name in PAIRED[:3]:
                log.setdefault(f"{title}_{name}", []).append(row[name][0])
    groups = [(f"target_{name}", f"source_{name}") for name in PAIRED[:3]]
    columns = {name: np.array(values) for name, values in log.items()}
    render.safely(render.curves, path, columns, groups, "strength")
    return log


def print_table(title, rows):
    """Print rows {name: {metric: [mean, half width]}} under the benchmark's names."""
    columns = [c for c in COLUMNS if any(c in row for row in rows.values())]
    headings = [name.replace("r_precision_", "r_") for name in columns]
    print(f"\n{title}\n" + " " * 10 + "".join(f" {heading:>16s}" for heading in headings))
    for name, row in rows.items():
        known = [row[c] if c in row and math.isfinite(row[c][0]) else None for c in columns]
        print(f"{name:10s}" + "".join(f" {f'{y[0]:.3f} +-{y[1]:.3f}' if y else '-':>16s}" for y in known))


# ---- 3. Several rewards ------------------------------------------------------------------------------------

FRONT_SAMPLES = 8  # motions of each prompt and sampler; the volume grows with them


def front_points(samplers, clips, scorers, names):
    """Rewards `names` (columns of the scorers) of motions for the clips' captions, FRONT_SAMPLES of each
    of the samplers -> (p s k); two policies are comparable for equal s."""
    captions, _, lengths = questions(clips, 0)
    points = []
    for k, sampler in enumerate(samplers):
        for n in range(FRONT_SAMPLES):
            columns = scorers.columns(*sampler(captions, lengths, f"front {k}", n), captions, clips)
            points.append(np.stack([columns[name] for name in names], -1))
    return np.stack(points, 1)


def hypervolumes(points):
    """Volume over the reference point 0 of each prompt's motions: (p s k) -> (p)"""
    return np.array([metrics.hypervolume(each, np.zeros(each.shape[1])) for each in points])


def over_prompts(values):
    """[mean, half width of its 95 % interval] over prompts (p)"""
    return [float(values.mean()), float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))]


def compare_fronts(policies, clips, scorers, names, path):
    """Print the hypervolume of each policy (name -> samplers), its difference to the ones before, and that of
    the means of its samplers; draw the fronts -> {name: {...}}."""
    clouds = {name: front_points(samplers, clips, scorers, names) for name, samplers in policies.items()}
    samplers = len(next(iter(policies.values())))
    volumes, found = {name: hypervolumes(points) for name, points in clouds.items()}, {}
    count = next(iter(clouds.values())).shape[1]
    print(f"\nhypervolume of {count} motions of each of {len(clips)} prompts, and of the means")
    for name, points in clouds.items():
        means = points.reshape(len(clips), samplers, -1, len(names)).mean((0, 2))  # of each sampler
        found[name] = {"hypervolume": over_prompts(volumes[name]),
                       "of the means": float(hypervolumes(means[None])[0]),
                       **{f"less {other}": over_prompts(volumes[name] - volumes[other]) for other in found}}
        cells = (f"{title} {value[0]:+.3f} +-{value[1]:.3f}" if isinstance(value, list)
                 else f"{title} {value:.3f}" for title, value in found[name].items())
        print(f"{name:14s} " + ", ".join(cells))
    render.safely(render.fronts, path, clouds, names, samplers)
    return found


def controllability(table, names):
    """Matrix of reward j (columns) with the token of reward k alone (rows of the table) -> list of lists. The
    tokens control where the diagonal has each column's maximum. None for a table without tokens."""
    if f"token {names[0]}" not in table:
        return None
    matrix = [[table[f"token {k}"][j][0] for j in names] for k in names]
    best = np.max(matrix, 0)
    print("\ncontrollability (row: token, column: reward, * maximum of the column)\n" + " " * 12
          + "".join(f"{name:>12s}" for name in names))
    for name, row in zip(names, matrix):
        print(f"{name:12s}" + "".join(f"{value:11.3f}{'*' if value == top else ' '}"
                                      for value, top in zip(row, best)))
    return matrix


# ---- 4. Pictures and exports -------------------------------------------------------------------------------


def some(clips, count):
    """`count` of the clips, or all: chosen by position, never by score."""
    return [clips[k * len(clips) // count] for k in range(min(count, len(clips)))]


def draw(folder, clips, scorers, samplers, curves, count=4):
    """Curves, a storyboard and GIFs of before | after | data for clips chosen by position, never by score.

    samplers: title -> sampler. curves: whether logs.csv is drawn.
    """
    clips = some(clips, count)
    captions, attributes, lengths = questions(clips, 0)
    motions = {title: sampler(captions, lengths, "pictures", 0) for title, sampler in samplers.items()}
    if all(len(clip.features) for clip in clips):
        motions["data"] = datasets.collate(clips).motion, lengths
    panels = [[] for _ in clips]
    for title, (motion, made) in motions.items():
        scores, _, verdicts = measure(motion, made, captions, attributes, scorers)
        for k, joints in enumerate(to_joints(motion, made, scorers.skeleton)):
            note = render.clip_note(scores["reward"][k], verdicts[k], scores["foot_skate"][k])
            panels[k].append({"joints": joints, "title": title, "note": note})
    for k, (caption, parts) in enumerate(zip(captions, panels)):
        name = f"before_after_{k}.gif" if k else "before_after.gif"
        render.safely(render.render_gif, folder / name, parts, scorers.skeleton, caption)
    render.safely(render.storyboard, folder / "storyboard.png", list(zip(captions, panels)), scorers.skeleton)
    if curves:
        render.safely(draw_curves, folder / "curves.png", [folder / "logs.csv"])


def ab_pairs(folder, clips, scorers, base, tuned, count):
    """A page on which people compare base and tuned on the captions of `count` clips."""
    clips = some(clips, count)
    captions, _, lengths = questions(clips, 0)
    motions = (to_joints(*sampler(captions, lengths, "people", 0), scorers.skeleton)
               for sampler in (base, tuned))
    ab_page.write(folder / "ab_page.html", captions, *motions, scorers.skeleton, 0)


def draw_curves(path, logs):
    """Learning curves of one or several runs of a script (paths of logs.csv) in one PNG."""
    known = [name for name, values in render.read_csv(logs[0]).items() if np.isfinite(values).any()]
    groups = [tuple(name for name in names if name in known) for names in CURVES]
    peak = "val_judge" if "val_judge" in known else None
    render.curves(path, logs, [names for names in groups if names], peak=peak)


def export(folder, prompts, frames, limit, skeleton, samplers):
    """--prompt: for every caption a GIF, and joints (.npy) and BVH of each motion in it.

    frames: of each motion, a multiple of 4 and at most `limit` (InputError), 0 where the sampler chooses;
    samplers: title -> sampler.
    """
    if frames % 4 or frames > limit:
        raise InputError(f"--length {frames}: a multiple of 4 frames (20 a second), at most {limit}")
    lengths = torch.full((len(prompts),), frames)
    made = {title: to_joints(*sampler(prompts, lengths, "prompt", 0), skeleton)
            for title, sampler in samplers.items()}
    for k, caption in enumerate(prompts):
        for title, joints in made.items():
            render.write_npy(folder / f"prompt{k:02d}_{title}.npy", joints[k])
            render.write_bvh(folder / f"prompt{k:02d}_{title}.bvh", joints[k], skeleton)
        panels = [{"joints": joints[k], "title": title} for title, joints in made.items()]
        render.render_gif(folder / f"prompt{k:02d}.gif", panels, skeleton, caption)
        print(f"  {folder / f'prompt{k:02d}.gif'}: {caption}")


# ---- 5. Several runs in one table: python -m common.reports RUN [RUN ...] ----------------------------------


def read_results(paths, same_data=True):
    """The results.json of finished runs, all of the same data unless told otherwise; InputError if not."""
    results = []
    for path in paths:
        file = Path(path) / "results.json"
        try:
            results.append(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read ({error}); name finished runs") from error
        if "data" not in results[-1] or same_data and results[-1]["data"] != results[0]["data"]:
            raise InputError(f"{file}: not of the data of {paths[0]}; put only its seeds into one table")
    return results


def summary(paths):
    """Markdown of the results.json of several seeds: each cell is the mean (standard deviation) over them; of
    a single run the mean +- half of its 95 % interval."""
    results = read_results(paths)
    lines = [f"{len(results)} run(s), seeds {', '.join(str(r['seed']) for r in results)}; "
             f"data: {results[0]['data']['source']} -> {results[0]['data']['target']}", ""]
    lines += ["    " + r["command"] for r in results] + [""]
    for table in [name for name in results[0] if name.endswith(("_train", "_val", "_test"))]:
        columns = [c for c in COLUMNS if any(c in row for r in results for row in r[table].values())]
        lines += [f"**{table.replace('_', ', ')}**", "",
                  "| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
        for row in results[0][table]:
            cells = []
            for column in columns:
                known = [r[table][row][column] for r in results if column in r[table].get(row, {})]
                cells.append(cell(known, len(results), "+" if row == "gain" else ""))
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        gains = [r[table]["gain"] for r in results]
        beyond = [name for name in PAIRED[:4] if all(name in g and g[name][0] > g[name][1] for g in gains)]
        lines += ["", "Above zero beyond their own 95 % interval over prompts in every run: "
                  f"{', '.join(beyond) or 'none'}.", ""]
    if all("fronts" in r for r in results):
        lines += fronts_summary(results)
    seconds = {stage: [r["seconds"].get(stage, 0.0) for r in results] for stage in results[0]["seconds"]}
    means = ", ".join(f"{stage} {np.mean(values):.0f}" for stage, values in seconds.items())
    lines.append(f"Seconds (mean): {means}; peak memory {max(r['peak_memory_mb'] for r in results):.0f} MB.")
    return "\n".join(lines)


def cell(known, count, sign=""):
    """[[mean, half width]] of those of `count` runs that have one -> mean (standard deviation) over them; of
    a single run: mean +- half."""
    known = [pair for pair in known if isinstance(pair[0], float)]  # NaN is stored as text
    if not known:
        return "-"
    numbers = np.array([pair[0] for pair in known])
    spread = f" ({numbers.std(ddof=1):.3f})" if len(known) > 1 else ""
    spread = f" +-{known[0][1]:.3f}" if count == 1 else spread
    return f"{numbers.mean():{sign}.3f}{spread}"


def fronts_summary(results):
    """Hypervolumes with their differences, and the controllability matrix, as lines of Markdown."""
    fronts, names = [r["fronts"] for r in results], list(results[0]["fronts"])
    columns = ["hypervolume", *(f"less {name}" for name in names[:-1])]
    lines = ["**hypervolume over prompts**", "", "| | " + " | ".join(columns) + " |",
             "| --- " * (len(columns) + 1) + "|"]
    for name in names:
        cells = [cell([f[name][column] for f in fronts if column in f[name]], len(fronts),
                      "+" if "less" in column else "") for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    matrices = np.array([r["controllability"] for r in results if r["controllability"]])
    if len(matrices):
        rewards, best = ("text", "quality", "preference"), matrices.mean(0).max(0)
        lines += ["", "**controllability** (row: token, column: reward, * maximum of the column)", "",
                  "| | " + " | ".join(rewards) + " |", "| --- " * (len(rewards) + 1) + "|"]
        for name, row in zip(rewards, matrices.mean(0)):
            cells = (f"{value:.3f}{'*' if value == top else ''}" for value, top in zip(row, best))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        own = np.eye(len(rewards), dtype=bool)
        wins = (matrices.diagonal(axis1=1, axis2=2) > np.where(own, -np.inf, matrices).max(1)).sum(0)
        lines.append("| runs in which the diagonal is above the rest | " + " | ".join(map(str, wins)) + " |")
    return lines + [""]


def flags_of(result):
    """The flags of a run, without those that do not tell it from its other seeds."""
    flags = re.sub(r" ?--(?:seed|out-dir|cache-dir) \S+| ?--overwrite", "", result["command"])
    return flags.partition(".py ")[2]


AXES = ("samples", "updates", "calls")  # what a method may be said to cost, in its log


def looks(paths, *needed):
    """The looks at val of finished runs -> [(flags, {column of the log: values})]; InputError for a log
    without one of the columns `needed`."""
    found = []
    for path, result in zip(paths, read_results(paths)):
        log = render.read_csv(Path(path) / "logs.csv")
        for name in (*needed, "val_judge"):
            if name not in log:
                raise InputError(f"{path}: its log has no column {name}")
        seen = np.isfinite(log["val_judge"])
        found.append((flags_of(result), {name: values[seen] for name, values in log.items()}))
    return found


def markdown(headings, rows):
    """A table of cells, all texts; a | in one, as in --lora-targets, would end it."""
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in (headings, *rows)]
    lines.insert(1, ["---"] * len(headings))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def at_equal(paths, axis):
    """Markdown that compares runs at equal cost: of each the last look at val before `axis`, one of AXES,
    exceeds what the shortest run came to. Runs that differ in their seed alone share a row: mean (standard
    deviation). InputError for a run without such a look."""
    found, rows = looks(paths, axis), {}
    limit = min(log[axis].max() for _, log in found)
    columns = [axis] + [name for name in found[0][1] if name.startswith("val_")]
    for (flags, log), path in zip(found, paths):
        if not (log[axis] <= limit).any():
            raise InputError(f"--at {axis}: {path} had no look before {limit:g}; lower its --eval-every")
        last = np.flatnonzero(log[axis] <= limit)[-1]
        rows.setdefault(flags, []).append([float(log[name][last]) if name in log else math.nan
                                           for name in columns])
    lines = []
    for flags, group in rows.items():
        cells = [cell([[value, 0.0] for value in values], 2) if np.isfinite(values).all() else "-"
                 for values in zip(*group)]
        lines.append([f"`{flags}`", f"{np.mean([values[0] for values in group]):.0f}", *cells[1:]])
    return markdown(["flags", *columns], lines)


def until(paths, name, level):
    """Markdown of what runs cost up to the first look at val where `name` is at least level: mean over runs
    that differ in their seed alone (lowest to highest), and in how many of them it came so far."""
    rows, lines = {}, []
    for flags, log in looks(paths, name, *AXES):
        there = np.flatnonzero(log[name] >= level)
        cost = [float(log[axis][there[0]]) for axis in AXES] if len(there) else None
        rows.setdefault(flags, []).append(cost)
    for flags, group in rows.items():
        reached = [costs for costs in group if costs]
        cells = [f"{np.mean(values):.0f} ({min(values):.0f} to {max(values):.0f})"
                 for values in zip(*reached)]
        lines.append([f"`{flags}`", *(cells or ["-"] * len(AXES)), f"{len(reached)} of {len(group)}"])
    return markdown(["flags", *AXES, f"{name} >= {level:g} in"], lines)


def one_row_each(paths, table):
    """Markdown that sets runs of different flags side by side, by one of their tables: distances of the tuned
    row, and what was gained +- half of its 95 % interval over prompts. Runs that differ in their seed alone
    share a row: mean (standard deviation). A setting that changes what it starts from, as a sampler does, has
    its base above it. InputError for no such table."""
    results, rows = read_results(paths), {}
    for path, result in zip(paths, results):
        if table not in result:
            raise InputError(f"--each {table}: {path} has no such table")
        rows.setdefault(flags_of(result), []).append(result)
    base = results[0][table]["base"]
    wanted = ("fid", "r_precision_top1", "length_error") + (("distinct", "speed") if "text" in base else ())
    columns = [name for name in wanted if name in base]
    gained = [name for name in PAIRED[:8] if name in results[0][table]["gain"]]
    headings = ["flags", *columns, *(f"{name}, gain" for name in gained)]
    headings += ["hypervolume, gain"] * ("fronts" in results[0])
    lines, bases = [], {}
    for flags, group in rows.items():
        seed, own = group[0].get("seed"), group[0][table]["base"]
        start = [f"{own[name][0]:.3f}" if name in own else "-" for name in columns]
        if not lines or bases.get(seed, start) != start:  # other noise of another seed makes no other base
            title = "base of the next" if lines else "base"
            lines.append([title, *start, *["-"] * (len(headings) - 1 - len(start))])
        bases[seed] = start
        tuned, gain = ([result[table][row] for result in group] for row in ("tuned", "gain"))
        found = [[row[name] for row in tuned if name in row] for name in columns]
        gains = [[row[name] for row in gain if name in row] for name in gained]
        lines.append([f"`{flags}`", *(cell(known, len(group)).partition(" +-")[0] for known in found),
                      *(cell(known, len(group), "+") for known in gains)])
        if "fronts" in group[0]:
            lines[-1].append(cell([r["fronts"]["tuned"]["less start"] for r in group], len(group), "+"))
    return markdown(headings, lines)


def by_check(paths, table):
    """Markdown of what the oracle was asked for in a table of runs of the same data, the most frequent first:
    in how many motions of a run, and the share of them that does it, mean over the runs."""
    tables, lines = [], []
    for path, result in zip(paths, read_results(paths)):
        tables.append({name: row["checks"] for name, row in result.get(table, {}).items() if "checks" in row})
        if not tables[-1]:
            raise InputError(f"--checks {table}: {path} has no checks in such a table")
    rows = [name for name in tables[0] if all(name in run for run in tables)]
    counts = {check: count for check, (_, count) in tables[0][rows[0]].items()}
    for check in sorted(counts, key=counts.get, reverse=True):
        shares = (np.mean([run[name][check][0] for run in tables]) for name in rows)
        lines.append([check, str(counts[check]), *(f"{share:.2f}" for share in shares)])
    return markdown(["asked for", "motions", *rows], lines)


def costs(paths):
    """Markdown of what finished runs took, of any data: minutes, in all and in the parts that only the first
    run of its kind has to do (the cache keeps them), and peak memory in MB."""
    once, lines, sums = ("data", "reward model and judge", "base"), [], np.zeros(2)
    for result in read_results(paths, same_data=False):
        seconds = result["seconds"]
        minutes = np.array([sum(seconds.values()), sum(seconds.get(stage, 0.0) for stage in once)]) / 60
        sums += minutes
        lines.append([f"`{result['command']}`", *(f"{m:.1f}" for m in minutes),
                      f"{result['peak_memory_mb']:.0f}"])
    lines.append([f"sum of {len(lines)}", *(f"{m:.0f}" for m in sums), ""])
    return markdown(["command", "minutes", "of them kept by the cache", "MB"], lines)


def main(argv=None):
    """Print the summary of the run folders named on the command line; draw their curves."""
    parser = argparse.ArgumentParser(description="One table from several finished runs (seeds).")
    parser.add_argument("runs", nargs="+", help="run folders with a results.json")
    parser.add_argument("--each", metavar="TABLE", help="instead one row a run, for runs of different flags")
    parser.add_argument("--checks", metavar="TABLE", help="instead the share that does each thing asked for")
    parser.add_argument("--at", choices=AXES, help="instead looks at val at equal cost")
    parser.add_argument("--until", metavar="COLUMN=LEVEL",
                        help="instead the cost up to a look at val, such as val_reward=0.85")
    parser.add_argument("--costs", action="store_true", help="instead minutes and memory of runs of any kind")
    parser.add_argument("--curves", help="PNG of their learning curves: mean, lowest and highest")
    args = parser.parse_args(argv)
    if args.until:
        name, _, level = args.until.partition("=")
        if not re.fullmatch(r"-?\d*\.?\d+", level):
            raise InputError(f"--until {args.until}: COLUMN=LEVEL, such as val_reward=0.85")
        print(until(args.runs, name, float(level)))
    elif args.each:
        print(one_row_each(args.runs, args.each))
    elif args.checks:
        print(by_check(args.runs, args.checks))
    elif args.at:
        print(at_equal(args.runs, args.at))
    elif args.costs:
        print(costs(args.runs))
    else:
        print(summary(args.runs))
    if args.curves:
        draw_curves(args.curves, [Path(run) / "logs.csv" for run in args.runs])


if __name__ == "__main__":
    runs.run_main(main)
