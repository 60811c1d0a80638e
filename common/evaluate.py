"""Evaluation: tables with intervals and paired gains, pictures of a run, motions for a user's prompts.

A policy is known here as a sampler, `sampler(captions, lengths, purpose, repeat)` -> raw features (b t d) and
lengths (b) on the CPU, the same motions for the same arguments. A diffusion model takes the lengths that are
asked for, a token model chooses its own; so both share this file.

Columns: `reward` is the function that the script optimises, `judge` the mean cosine of a scorer that is never
optimised. `oracle` is the share of the asked-for attributes that hold in a motion, `oracle_all` the share of
motions in which all of them hold. Both are read off the joints (common/embedded/oracle.py), and no model has
learnt from them. A script may add columns of its own.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from common import (InputError, NonFiniteError, datasets, features, generator, metrics, render, retrieval,
                    runs)
from common.embedded import oracle

FIRST = ("reward", "judge", "oracle", "oracle_all")  # the order in a table; a script's own come after these
LAST = ("r_precision_top1", "r_precision_top3", "fid", "mm_dist", "diversity", "multimodality", "distinct",
        "length_error", "foot_skate", "jerk", "speed")
UNSHOWN = ("checks", "gate", "r_precision_top2", "r_precision_pool", "r_precision_ties", "floor_penetration",
           "bone_variation", "floating")


# Bounds of a plausible motion around the mean of the data: low and high as multiples of it, and what may be
# added to the second. Bones of generated features are never rigid: .1 to .16 in the bases here.
GATE = {"speed": (0.8, 1.2, 0.0), "jerk": (0.0, 2.0, 0.0), "foot_skate": (0.0, 2.0, 0.0),
        "floor_penetration": (0.0, 2.0, 1.0), "bone_variation": (0.0, 1.0, 0.25)}


class Scorers(NamedTuple):
    """Who measures a motion."""
    reward: object              # (motion, lengths, captions) -> (b): what the script optimises
    judge: retrieval.RetrievalModel
    skeleton: features.Skeleton
    columns: object = None      # (motion, lengths, captions, clips) -> {further column: (b)}
    paired: bool = False        # the reward also takes the clips that belong to the captions

    @property
    def device(self):
        """Where the judge is; motions come from the CPU."""
        return next(self.judge.parameters()).device


# ---- 1. Measuring ------------------------------------------------------------------------------


def questions(clips, repeat):
    """What repeat number `repeat` asks for: captions, attributes (both b) and lengths (b) in frames. Caption
    r of a clip with n captions is number r mod n; lengths are the clips' own, as in the benchmarks."""
    captions = [clip.captions[repeat % len(clip.captions)] for clip in clips]
    attributes = [clip.attributes[repeat % len(clip.captions)] for clip in clips]
    return captions, attributes, torch.tensor([len(clip.features) for clip in clips])


def have_motion(clips):
    """Whether all clips have frames; composed captions have none."""
    return all(len(clip.features) for clip in clips)


def to_joints(motion, lengths, skeleton):
    """Raw features (b t d), lengths (b) -> list of joints (t j 3) in metres, without padding."""
    return [j[:n].numpy() for j, n in zip(features.features_to_joints(motion, skeleton), lengths.tolist())]


@torch.no_grad()
def rewards(scorers, motion, lengths, captions, clips, chunk=128):
    """The reward (b), float64 on the CPU, of raw motions (b t d); in chunks, which bounds the memory."""
    parts = []
    for start in range(0, len(captions), chunk):
        rows = slice(start, start + chunk)
        asked = motion[rows].to(scorers.device), lengths[rows].to(scorers.device), captions[rows]
        more = (clips[rows],) if scorers.paired else ()
        parts.append(torch.as_tensor(scorers.reward(*asked, *more)).double().cpu())
    values = torch.cat(parts)
    if not torch.isfinite(values).all():
        caption = captions[int((~values.isfinite()).nonzero()[0])]
        raise NonFiniteError(f"the reward is not finite for {caption!r}")
    return values.numpy()


@torch.no_grad()
def measure(motion, lengths, captions, attributes, scorers, clips):
    """Per motion (b t d), raw -> {name: (b)}, and the oracle's verdicts, a dict for each motion."""
    each = {"reward": rewards(scorers, motion, lengths, captions, clips)}
    seen, asked = retrieval.embed(scorers.judge, motion, lengths, captions)
    each["judge"] = (seen * asked).sum(-1).double().cpu().numpy()
    joints = to_joints(motion, lengths, scorers.skeleton)
    verdicts = [oracle.oracle(j, scorers.skeleton, a) if a else {} for j, a in zip(joints, attributes)]
    held = [list(v.values()) for v in verdicts]
    each["oracle"] = np.array([np.mean(v) if v else math.nan for v in held])  # NaN: nothing to check
    each["oracle_all"] = np.array([float(all(v)) if v else math.nan for v in held])
    if scorers.columns and have_motion(clips):
        device = scorers.device
        more = scorers.columns(motion.to(device), lengths.to(device), captions, clips)
        each |= {name: column.double().cpu().numpy() for name, column in more.items()}
    physics = [features.physical_metrics(j, scorers.skeleton) for j in joints]
    return each | {name: np.array([p[name] for p in physics]) for name in physics[0]}, verdicts


def physics(clips, skeleton):
    """{physical metric: its mean over the clips}, what `gate` compares with."""
    rows = [features.physical_metrics(joints, skeleton) for joints in to_joints(
        *datasets.collate(clips)[:2], skeleton)]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def gate(row, data):
    """Which bounds of GATE around `data` (see physics) a row of a table breaks: a text for each, or none."""
    broken = []
    for name, (low, high, more) in GATE.items():
        least, most = low * data[name], high * data[name] + more
        if not least <= row[name][0] <= most:  # NaN fails too
            broken.append(f"{name} {row[name][0]:.2f}, not {least:.2f} to {most:.2f}")
    return broken


def benchmark(judge, generated, real, *, generator, pool=32, pairs=300):
    """One repeat of the benchmark's table: dict metric -> float. generated: (raw features (n t d), lengths
    (n), captions); real: (raw features, lengths), the set that FID compares with, also by itself in the row
    of the ground truth. Embeddings have unit length, so distances order pairs as cosines do, FID is 0..4."""
    motion, text = retrieval.embed(judge, *generated)
    target, _ = retrieval.embed(judge, *real)
    return metrics.benchmark_embeddings(text, motion, target, generator=generator, pool=pool, pairs=pairs)


def tally(checks, verdicts, attributes):
    """Add the oracle's verdicts {"then.turn": bool} of motions that were asked for `attributes` to checks
    {"turn left": list of bool}."""
    for asked, verdict in zip(attributes, verdicts):
        for key, held in verdict.items():
            part, _, name = key.rpartition(".")
            checks.setdefault(f"{name} {(asked[part] if part else asked)[name]}", []).append(held)


def finite_mean(values):
    """Mean of the finite values; NaN if there is none."""
    finite = np.asarray(values)[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def evaluate(clips, scorers, sampler=None, *, purpose="", repeats=1, compare_with_data=True):
    """A row of a table: {metric: [mean, half width of the 95 % interval over the repeats]}.

    sampler None measures the clips themselves, the ground truth. Clips without frames are captions that have
    no motion: their row lacks the metrics that need one. compare_with_data=False leaves FID and the other
    metrics of a whole set out. "_prompts" keeps each prompt's mean over the repeats for paired_gain, "_asked"
    what it asks for; "checks" says for each thing that the oracle was asked for, such as "gait walk", which
    share of the motions does it, and in how many it was asked. length_error is in frames, of a sampler that
    chooses its own lengths.
    """
    results, checks, real = [], {}, have_motion(clips)
    for repeat in range(repeats):
        captions, attributes, asked = questions(clips, repeat)
        motion, lengths = sampler(captions, asked, purpose, repeat) if sampler else (
            datasets.collate(clips).motion, asked)
        each, verdicts = measure(motion, lengths, captions, attributes, scorers, clips)
        tally(checks, verdicts, attributes)
        if real and lengths is not asked:
            each["length_error"] = (lengths - asked).abs().double().numpy()
        whole = {}
        if real and compare_with_data:
            data = datasets.collate(clips)
            whole = benchmark(scorers.judge, (motion, lengths, captions), (data.motion, data.lengths),
                              generator=generator(repeat, 0, "benchmark"), pairs=min(300, len(clips) // 2))
        results.append((each, whole))
    flat = [{name: finite_mean(values) for name, values in each.items()} | whole for each, whole in results]
    row = {name: [float(y) for y in metrics.mean_interval([f[name] for f in flat])] for name in flat[0]}
    repeats_of = {name: np.stack([each[name] for each, _ in results], 1) for name in results[0][0]}  # b r
    row["_prompts"] = {name: np.array([finite_mean(v) for v in table]) for name, table in repeats_of.items()}
    # What is asked for, or the clip where nothing can be checked: prompts of a name are alike.
    row["_asked"] = [retrieval.signature(clip.attributes[0]) or clip.name for clip in clips]
    row["checks"] = {name: [float(np.mean(held)), len(held)] for name, held in sorted(checks.items())}
    return row


def look(names, clips, scorers, sampler, data=None):
    """A look at the validation prompts while training goes on -> {"val_reward": ...} for the given names.
    "gate" counts the bounds that are broken around `data`, see physics."""
    whole = bool({"fid", "diversity", "mm_dist", "r_precision_top1"} & set(names))
    row = evaluate(clips, scorers, sampler, purpose="validation", compare_with_data=whole)
    if "gate" in names:
        row["gate"] = [len(gate(row, data))]
    return {f"val_{name}": row[name][0] for name in names}


def check_names(names, clips, scorers):
    """InputError if `look` would not find one of the columns, before any training is paid for."""
    known = evaluate(clips[:4], scorers)
    known |= {"length_error": None, "gate": None}  # of a sampler that chooses its lengths; of a look
    for name in names:
        if name not in known:
            columns = ", ".join(column for column in known if column not in ("_prompts", "_asked", "checks"))
            raise InputError(f"no column {name!r} to look at while training; there are {columns}")


def paired_gain(after, before):
    """Mean of after - before over prompts, and the half width of its 95 % interval. Prompts are the sample
    here, in clusters that ask for the same, so unlike that of the repeats this interval says how far other
    prompts may differ."""
    gain = {}
    for name, values in after["_prompts"].items():
        difference = values - before["_prompts"][name]
        known = np.isfinite(difference)
        asked = [name for name, there in zip(after["_asked"], known) if there]
        if len(asked) > 1:
            gain[name] = [*metrics.clustered_interval(difference[known], asked)]
    return gain


# ---- 2. Samplers -------------------------------------------------------------------------------


def side_by_side(motions):
    """Motions [(b t d)] of different t -> list of the same, zeros after their ends, all of one t."""
    longest = max(motion.shape[1] for motion in motions)
    return [F.pad(motion, (0, 0, 0, longest - motion.shape[1])).cpu() for motion in motions]


def in_chunks(sample, size=128):
    """A sampler that calls sample(captions, lengths, rows, purpose, repeat) -> motion, lengths for `size`
    captions at a time, rows being their numbers in the whole call. None for lengths: those asked for."""
    def sampler(captions, lengths, purpose, repeat):
        chunks = torch.arange(len(captions)).split(size)
        motions, made = zip(*(
            sample([captions[k] for k in rows], lengths[rows], rows.tolist(), purpose, repeat)
            for rows in chunks))
        return torch.cat(side_by_side(motions)), lengths if made[0] is None else torch.cat(made).cpu()
    return sampler


def best_of(sampler, count, scorers, clips):
    """A sampler that keeps the best of `count` samples by the reward: what it gives without any training."""
    def best(captions, lengths, purpose, repeat):
        tries = [sampler(captions, lengths, f"{purpose} try {n}", repeat) for n in range(count)]
        scores = np.stack([rewards(scorers, motion, made, captions, clips) for motion, made in tries])
        chosen = torch.from_numpy(scores.argmax(0)), torch.arange(len(captions))
        made = torch.stack([made for _, made in tries])[chosen]
        own = lengths if all(one is lengths for _, one in tries) else made
        return torch.stack(side_by_side([motion for motion, _ in tries]))[chosen], own
    return best


def variety(clips, scorers, sampler, *, prompts=32, samples=10, seed=0):
    """`samples` motions for each of the first `prompts` clips -> {"multimodality": mean distance of two of a
    prompt (the papers take 100 x 30), "distinct": share of a prompt's motions that are not repeated}, as
    [value, NaN]: one repeat has no interval."""
    captions, _, lengths = questions(clips[:prompts], 0)
    made = [sampler(captions, lengths, "multimodality", n) for n in range(samples)]
    motion = torch.stack(side_by_side([motion for motion, _ in made]), 1)  # p g t d
    lengths = torch.stack([own for _, own in made], 1)                     # p g
    seen, _ = retrieval.embed(scorers.judge, motion.flatten(0, 1), lengths.flatten())
    pairs = metrics.draw_pairs(samples, samples // 2, generator(seed, 0, "multimodality"))
    value = metrics.multimodality(rearrange(seen, "(p g) c -> p g c", g=samples), *pairs)
    # Equal up to rounding: a batch of another size may round its last bits another way.
    limit = 1e-3 * scorers.skeleton.units_per_metre
    differ = (motion[:, :, None] - motion[:, None]).abs().amax((-1, -2)) > limit
    first = [[all(differ[p, g, :g]) for g in range(samples)] for p in range(len(motion))]
    return {"multimodality": [float(value), math.nan], "distinct": [float(np.mean(first)), math.nan]}


# ---- 3. Tables ---------------------------------------------------------------------------------


def compare(title, clips, scorers, samplers, *, repeats, purpose="", gain=("tuned", "base"), real=None):
    """Print and return the rows gt, one per sampler (name -> sampler), and the paired gain of the two named
    in `gain`. title: "target_test"; purpose names the noise of the samples, by default as the title does.
    real: clips whose physics the gate compares with, where `clips` are captions without a motion."""
    rows = {"gt": evaluate(clips, scorers, repeats=repeats)} if have_motion(clips) else {}
    for name, sampler in samplers.items():
        rows[name] = evaluate(clips, scorers, sampler, purpose=purpose or title, repeats=repeats)
        if name in gain:
            rows[name] |= variety(clips, scorers, sampler)
    rows["gain"] = paired_gain(*(rows[name] for name in gain))
    for row in rows.values():
        for private in ("_prompts", "_asked"):
            row.pop(private, None)
    heading = f"{title.replace('_', ' ')}: {len(clips)} clips, {repeats} repeats"
    print_table(f"{heading} (gain: paired, its interval is over prompts)", rows)
    data = {name: rows["gt"][name][0] for name in GATE} if "gt" in rows else None
    data = physics(real, scorers.skeleton) if real else data
    for name in gain[::-1] if data else ():
        rows[name]["gate"] = gate(rows[name], data)
        verdict = "; ".join(rows[name]["gate"])
        print(f"  {name}: " + (f"WARNING, implausible: {verdict}" if verdict else "as plausible as the data"))
    if "gt" in rows and len(clips) < 2 * scorers.judge.config["width"]:
        print(f"  FID of {len(clips)} motions is biased upward: compare it with tables of the same size only")
    return rows


def final_tables(source, target, scorers, base, tuned, repeats, best_count, more=None):
    """The tables of a finished run: the split that choices may look at (target val), gain (target test, with
    the best of `best_count` base samples as a reference) and retention (source test). more: further
    references for target test, name -> function(clips) -> sampler."""
    tables = {}
    for name, clips in (("target_val", target.splits["val"]), ("target_test", target.splits["test"]),
                        ("source_test", source.splits["test"])):
        samplers = {"base": base, "tuned": tuned}
        if name == "target_test":
            samplers[f"best of {best_count}"] = best_of(base, best_count, scorers, clips)
            samplers |= {title: reference(clips) for title, reference in (more or {}).items()}
        tables[name] = compare(name, clips, scorers, samplers, repeats=repeats)
    return tables


def report(start, folder, about, source, target, scorers, before, after, curves, more=None):
    """The end of a run of a diffusion script, see end_run; more: see final_tables."""
    args = start.args
    tables = final_tables(source, target, scorers, before, after, args.eval_repeats, args.best_of, more)
    end_run(start, folder, about, tables, target.splits["test"], scorers, before, after, curves)


def end_run(start, folder, about, tables, clips, scorers, before, after, curves):
    """End a run whose tables are made: pictures, and results.json with the tables and `about`. before,
    after: samplers of base and tuned; clips, curves: see draw."""
    start.watch.lap("evaluation")
    draw(folder, clips, scorers, {"before": before, "after": after}, () if start.stored else curves)
    start.watch.lap("pictures")
    runs.finish(folder, start.watch, {**about, **tables})


def columns_of(rows):
    """The columns that some row of a table (row -> {column: value}) has, in the order of a table."""
    present = dict.fromkeys(name for row in rows for name in row)
    own = [name for name in present if name not in (*FIRST, *LAST, *UNSHOWN)]
    return [name for name in (*FIRST, *own, *LAST) if name in present]


def shown(pair):
    """A cell of a table: [mean, half width], of which the second may be unknown, or None."""
    if pair is None:
        return "-"
    return f"{pair[0]:.3f} " + (f"+-{pair[1]:.3f}" if math.isfinite(pair[1]) else "-")


def print_table(title, rows):
    """Print rows {name: {metric: [mean, half width]}} under the benchmark's names."""
    columns = columns_of(rows.values())
    headings = [name.replace("r_precision_", "r_") for name in columns]
    print(f"\n{title}\n" + " " * 10 + "".join(f" {heading:>16s}" for heading in headings))
    for name, row in rows.items():
        known = [row[c] if c in row and math.isfinite(row[c][0]) else None for c in columns]
        print(f"{name:10s}" + "".join(f" {shown(y):>16s}" for y in known))


# ---- 4. Pictures and motions -------------------------------------------------------------------


def spread_out(clips, count):
    """`count` of the clips, or all: chosen by position, never by score."""
    count = min(count, len(clips))
    return [clips[k * len(clips) // count] for k in range(count)]


def draw(folder, clips, scorers, samplers, curves=(), count=4):
    """Curves, a storyboard and GIFs of before | after | data for clips chosen by position, never by score.
    samplers: title -> sampler. curves: columns of logs.csv, or tuples of them, a panel each; or none."""
    clips = spread_out(clips, count)
    captions, attributes, lengths = questions(clips, 0)
    motions = {title: sampler(captions, lengths, "pictures", 0) for title, sampler in samplers.items()}
    if have_motion(clips):
        motions["data"] = datasets.collate(clips).motion, lengths
    panels = [[] for _ in clips]
    for title, (motion, made) in motions.items():
        scores, verdicts = measure(motion, made, captions, attributes, scorers, clips)
        for k, joints in enumerate(to_joints(motion, made, scorers.skeleton)):
            note = render.clip_note(scores["reward"][k], verdicts[k], scores["foot_skate"][k])
            panels[k].append({"joints": joints, "title": title, "note": note})
    for k, (caption, parts) in enumerate(zip(captions, panels)):
        name = f"before_after_{k}.gif" if k else "before_after.gif"
        render.safely(render.render_gif, folder / name, parts, scorers.skeleton, caption)
    render.safely(render.storyboard, folder / "storyboard.png", list(zip(captions, panels)), scorers.skeleton)
    if curves:
        render.safely(render.curves, folder / "curves.png", folder / "logs.csv", curves, peak="val_judge")


def unread(caption, words, most=32):
    """What a text encoder that knows `words` does not read of a caption: a text, empty if it reads all."""
    said = datasets.words(caption)
    unknown, missing = dict.fromkeys(word for word in said[:most] if word not in words), []
    if unknown:
        missing.append(f"unknown words {', '.join(unknown)}")
    if len(said) > most:
        missing.append(f"the words after number {most}, from {said[most]!r} on")
    return "; ".join(missing)


def export(folder, prompts, stored, frames, skeleton, samplers, compare=True):
    """--prompt: for every caption a GIF, and joints (.npy) and BVH of each motion in it. stored: the product
    of the run; frames: of each motion, a multiple of 4 and at most what the run has seen (InputError), 0
    where the sampler chooses; samplers: title -> sampler; compare: whether the one called "before" is shown.
    What of a caption is not read is said in one line."""
    limit = stored.get("longest", 0)
    known = stored.get("words") or (stored.get("text") or {}).get("sizes", {}).get("words")
    for caption in prompts if known else ():  # published text features read everything
        if missing := unread(caption, set(known)):
            print(f"  not read of {caption!r}: {missing}")
    if frames % 4 or frames > limit:
        raise InputError(f"--length {frames}: a multiple of 4 frames (20 a second), at most {limit}")
    lengths = torch.full((len(prompts),), frames)
    made = {title: to_joints(*sampler(prompts, lengths, "prompt", 0), skeleton)
            for title, sampler in samplers.items() if compare or title != "before"}
    for k, caption in enumerate(prompts):
        for title, joints in made.items():
            render.write_npy(folder / f"prompt{k:02d}_{title}.npy", joints[k])
            render.write_bvh(folder / f"prompt{k:02d}_{title}.bvh", joints[k], skeleton)
        panels = [{"joints": joints[k], "title": title} for title, joints in made.items()]
        render.render_gif(folder / f"prompt{k:02d}.gif", panels, skeleton, caption)
        print(f"  {folder / f'prompt{k:02d}.gif'}: {caption}")
