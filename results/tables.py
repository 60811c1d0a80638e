"""Tables of finished runs, as Markdown: `python -m results.tables RUN [RUN ...]`.

Without an option, the runs are seeds of one setting, and every cell is their mean +- half of its 95 %
interval (Student's t over the runs). The options compare different settings; runs that differ in their seed
alone then share a row. Give every run both seeds, `--seed 1 --base-seed 1`: with `--seed` alone they share
base and data.
"""
import argparse
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np

from common import InputError, evaluate, metrics, render, runs
from results import pictures

CURVES = ("reward", "text", "quality", "preference", "val_reward", "val_judge", "val_oracle",
          "val_preference", "val_authenticity", "val_fid", "anchor", "kl_base", "kl_ref", "val_jerk",
          "val_speed", "distinct")
AXES = ("samples", "updates", "calls")  # what a method may be said to cost
SAME = ("seed", "base_seed", "out_dir", "cache_dir", "data_root", "cache", "device", "threads", "resume",
        "overwrite", "tiny")            # arguments that make no other setting

# ---- 1. Finished runs ----------------------------------------------------------------------------


def read_results(paths, same_data=True):
    """The results.json of finished runs, all of the same data unless told otherwise; InputError if not."""
    results = []
    for path in paths:
        file = Path(path) / "results.json"
        try:
            results.append(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read ({error}); name finished runs") from error
        if not isinstance(results[-1], dict) or not {"data", "command"} <= set(results[-1]):
            raise InputError(f"{file}: not written by one of the scripts here; name finished runs")
        if same_data and results[-1]["data"] != results[0]["data"]:
            raise InputError(f"{file}: not of the data of {paths[0]}; put only its seeds into one table")
    return results


def program_of(result):
    """What was started: a script, or "results.studies tracker"; and its other words."""
    words = shlex.split(result["command"])[1:]
    return (" ".join(words[1:3]), words[3:]) if words[0] == "-m" else (words[0], words[1:])


def setting_of(result):
    """All that tells a run from others, except for its seed, as a text to be compared."""
    args = {name: value for name, value in result["args"].items() if name not in SAME}
    return json.dumps([program_of(result)[0], args], sort_keys=True)


def label(result):
    """The study and the flags of a run, as code, without those that make no other setting."""
    program, words = program_of(result)
    shown, left_out = [], False
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            left_out = name != "tiny" and name.removeprefix("no_") in SAME
        if not left_out:
            shown.append(shlex.quote(word))
    return f"`{' '.join([program.partition('studies ')[2], *shown]).strip()}`"


def costs_of(args):
    """What an iteration of ddpo_motion.py costs: motions sampled, updates, and calls of the denoiser, each a
    forward pass of one motion at one step; a backward pass counts as another."""
    motions = args["prompts"] * args["samples"]
    learnt = (args["kept_samples"] or motions) * (args["steps"] - args["skip_last"])
    passes = 3 + bool(args["kl_coef"])  # old log-probabilities, there and back, and the means of the base
    guided = 1 + (args["guidance_scale"] != 1.0)
    return {"samples": motions, "updates": args["minibatches"],
            "calls": guided * (motions * args["steps"] + learnt * passes)}


def with_costs(log, result):
    """A log with the columns AXES, as far as they are known; a log that has one of them keeps it."""
    args, done = result["args"], log["iteration"] + 1
    if "window" in args:     # stepwise_motion.py counts its calls and updates itself
        return {"samples": args["prompts"] * done} | log
    if "skip_last" in args:
        return {name: cost * done for name, cost in costs_of(args).items()} | log
    return log


def looks(paths, *needed):
    """The looks at val of finished runs -> [(result, {column of the log: values})]; InputError for a log
    without one of the columns `needed`."""
    found = []
    for path, result in zip(paths, read_results(paths)):
        log = with_costs(render.read_csv(Path(path) / "logs.csv"), result)
        for name in (*needed, "val_judge"):
            if name not in log:
                raise InputError(f"{path}: its log has no column {name}")
        seen = np.isfinite(log["val_judge"])
        found.append((result, {name: values[seen] for name, values in log.items()}))
    return found


def by_setting(results, values):
    """Rows of a table: [(label, the results of one setting, their values)], in the order given."""
    groups = {}
    for result, value in zip(results, values):
        groups.setdefault(setting_of(result), []).append((result, value))
    return [(label(group[0][0]), *map(list, zip(*group))) for group in groups.values()]


# ---- 2. Cells and tables -------------------------------------------------------------------------


def markdown(headings, rows):
    """A table of cells, all texts; a | in one would end it."""
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in (headings, *rows)]
    lines.insert(1, ["---"] * len(headings))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cell(known, count, sign=""):
    """[[mean, half width]] of those of `count` runs that have one -> mean +- half of its 95 % interval, over
    the runs if there are several."""
    known = [pair for pair in known if isinstance(pair[0], float)]  # NaN is stored as text
    if not known:
        return "-"
    mean, half = metrics.mean_interval([pair[0] for pair in known])
    half = known[0][1] if count == 1 else float(half)
    finite = isinstance(half, float) and math.isfinite(half)
    return f"{mean:{sign}.3f}" + (f" +-{half:.3f}" if finite else "")


def moved(gains, sign):
    """The columns of all `gains` (column -> [mean, half width]) that went up (1) or down (-1) in each, by
    more than half of its interval."""
    def beyond(pair):
        return all(isinstance(number, float) for number in pair) and sign * pair[0] > pair[1]
    return [column for column in gains[0] if all(beyond(gain.get(column, ["nan"])) for gain in gains)]


def summary(paths):
    """Markdown of the results.json of several seeds, see `cell`; a gain of a single run has the interval over
    its prompts."""
    results = read_results(paths)
    seeds = ", ".join(f"{r['args']['seed']}/{r['args'].get('base_seed', 0)}" for r in results)
    lines = [f"{len(results)} run(s), seed/base seed {seeds}; "
             f"data: {results[0]['data']['source']} -> {results[0]['data']['target']}", ""]
    lines += ["    " + r["command"] for r in results] + [""]
    for table in [name for name in results[0] if name.endswith(("_train", "_val", "_test"))]:
        columns, rows = evaluate.columns_of([row for r in results for row in r[table].values()]), []
        for row in results[0][table]:
            known = [[r[table][row][c] for r in results if c in r[table].get(row, {})] for c in columns]
            rows.append([row, *(cell(pairs, len(results), "+" if row == "gain" else "") for pairs in known)])
        gains = [r[table]["gain"] for r in results]
        lines += [f"**{table.replace('_', ', ')}**", "", markdown(["", *columns], rows), "",
                  "In every run beyond its own 95 % interval over prompts: "
                  f"up {', '.join(moved(gains, 1)) or 'nothing'}; "
                  f"down {', '.join(moved(gains, -1)) or 'nothing'}.", ""]
    seconds = {stage: [r["seconds"].get(stage, 0.0) for r in results] for stage in results[0]["seconds"]}
    means = ", ".join(f"{stage} {np.mean(values):.0f}" for stage, values in seconds.items())
    lines.append(f"Seconds (mean): {means}; peak memory {max(r['peak_memory_mb'] for r in results):.0f} MB.")
    return "\n".join(lines)


def one_row_each(paths, table):
    """Markdown that sets settings side by side, by one of their tables: distances of the tuned row, and what
    was gained +- half of its 95 % interval over prompts. A setting that changes what it starts from, as a
    sampler does, has its base above it. InputError for no such table."""
    results = read_results(paths)
    for path, result in zip(paths, results):
        if table not in result:
            raise InputError(f"--each {table}: {path} has no such table")
    first = results[0][table]
    wanted = ("fid", "r_precision_top1", "length_error")
    wanted += ("distinct", "speed") if "text" in first["base"] else ()
    columns = [name for name in wanted if name in first["base"]]
    gained = [name for name in evaluate.columns_of([first["gain"]]) if name not in evaluate.LAST]
    lines, bases = [], {}
    for title, group, tables in by_setting(results, [result[table] for result in results]):
        seed, own = group[0].get("seed"), tables[0]["base"]
        start = [f"{own[name][0]:.3f}" if name in own else "-" for name in columns]
        if not lines or bases.get(seed, start) != start:  # other noise of another seed makes no other base
            lines.append(["base of the next" if lines else "base", *start, *["-"] * len(gained)])
        bases[seed] = start
        tuned = [[t["tuned"][name] for t in tables if name in t["tuned"]] for name in columns]
        gains = [[t["gain"][name] for t in tables if name in t["gain"]] for name in gained]
        if len(group) == 1:  # its interval would be over repeats, that of a gain is over prompts
            tuned = [[[value, math.nan] for value, _ in known] for known in tuned]
        lines.append([title, *(cell(known, len(group)) for known in tuned),
                      *(cell(known, len(group), "+") for known in gains)])
    return markdown(["flags", *columns, *(f"{name}, gain" for name in gained)], lines)


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


def at_equal(paths, axis):
    """Markdown that compares settings at equal cost: of each run the last look at val before `axis`, one of
    AXES, exceeds what the shortest run came to. InputError for a run without such a look."""
    found = looks(paths, axis)
    limit = min(log[axis].max() for _, log in found)
    columns, values = [axis] + [name for name in found[0][1] if name.startswith("val_")], []
    for (_, log), path in zip(found, paths):
        if not (log[axis] <= limit).any():
            raise InputError(f"--at {axis}: {path} had no look before {limit:g}; lower its --eval-every")
        last = np.flatnonzero(log[axis] <= limit)[-1]
        values.append([float(log[name][last]) if name in log else math.nan for name in columns])
    lines = []
    for title, _, group in by_setting([result for result, _ in found], values):
        cost, *others = zip(*group)
        cells = (cell([[value, 0.0] for value in other], 2) if np.isfinite(other).all() else "-"
                 for other in others)
        lines.append([title, f"{np.mean(cost):.0f}", *cells])
    return markdown(["flags", *columns], lines)


def until(paths, name, level):
    """Markdown of what settings cost up to the first look at val where `name` is at least level: mean over
    the runs (lowest to highest), and in how many of them it came so far."""
    found = looks(paths, name, *AXES)
    places, lines = [np.flatnonzero(log[name] >= level)[:1] for _, log in found], []
    values = [[float(log[axis][place[0]]) for axis in AXES] if len(place) else None
              for (_, log), place in zip(found, places)]
    for title, _, group in by_setting([result for result, _ in found], values):
        reached = [spent for spent in group if spent]
        cells = [f"{np.mean(spent):.0f} ({min(spent):.0f} to {max(spent):.0f})" for spent in zip(*reached)]
        lines.append([title, *(cells or ["-"] * len(AXES)), f"{len(reached)} of {len(group)}"])
    return markdown(["flags", *AXES, f"{name} >= {level:g} in"], lines)


def costs(paths):
    """Markdown of what finished runs took, of any data: minutes, in all and in the parts that only the first
    run of its kind has to do (the cache keeps them), and peak memory in MB."""
    once = ("data", "base", "supervised model", "reward and judge", "rewards and judge")
    lines, sums = [], np.zeros(2)
    for result in read_results(paths, same_data=False):
        seconds = result["seconds"]
        minutes = np.array([sum(seconds.values()), sum(seconds.get(stage, 0.0) for stage in once)]) / 60
        sums += minutes
        lines.append([f"`{result['command']}`", *(f"{m:.1f}" for m in minutes),
                      f"{result['peak_memory_mb']:.0f}"])
    lines.append([f"sum of {len(lines)}", *(f"{m:.0f}" for m in sums), ""])
    return markdown(["command", "minutes", "of them kept by the cache", "MB"], lines)


# ---- 3. Command line -----------------------------------------------------------------------------


def main(argv=None):
    """Print a table of the run folders named on the command line; draw their curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("runs", nargs="+", help="run folders with a results.json")
    parser.add_argument("--each", metavar="TABLE", help="a row for each setting, by target_test or so")
    parser.add_argument("--checks", metavar="TABLE", help="the share that does each thing asked for")
    parser.add_argument("--at", choices=AXES, help="looks at val at equal cost")
    parser.add_argument("--until", metavar="COLUMN=LEVEL",
                        help="cost up to a look at val, such as val_reward=0.85")
    parser.add_argument("--costs", action="store_true", help="minutes and memory of runs of any data")
    parser.add_argument("--curves", metavar="PNG", help="also draw their learning curves")
    parser.add_argument("--tradeoff", metavar="PNG", help="also draw their oracle over jerk, skate and speed")
    args = parser.parse_args(argv)
    name, _, level = (args.until or "").partition("=")
    if args.until and not re.fullmatch(r"-?\d*\.?\d+", level):
        raise InputError(f"--until {args.until}: COLUMN=LEVEL, such as val_reward=0.85")
    print(until(args.runs, name, float(level)) if args.until
          else one_row_each(args.runs, args.each) if args.each
          else by_check(args.runs, args.checks) if args.checks
          else at_equal(args.runs, args.at) if args.at
          else costs(args.runs) if args.costs else summary(args.runs))
    if args.curves:
        pictures.seeds(args.curves, [render.read_csv(Path(run) / "logs.csv") for run in args.runs], CURVES)
    if args.tradeoff:
        found = looks(args.runs, "val_oracle", "val_speed", "val_jerk", "val_foot_skate")
        tables = [result["target_val"] for result, _ in found]
        names = [f"seed {result['args']['seed']}" for result, _ in found]
        pictures.tradeoff(args.tradeoff, names, tables, [log for _, log in found])


if __name__ == "__main__":
    runs.run_main(main)
