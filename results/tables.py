CURVES = (("reward",), ("text", "rival_text"), ("quality", "rival_quality"),
          ("preference", "rival_preference"), ("val_reward",),
          ("val_judge",), ("val_oracle",), ("val_fid",), ("total",), ("semantic",), ("authenticity",),
          ("anchor",), ("kl_base",), ("kl_ref", "rival_kl_ref"), ("val_jerk",),
          ("val_speed",), ("distinct",))


def draw_curves(path, logs):
    """Learning curves of one or several runs of a script (paths of logs.csv) in one PNG."""
    known = [name for name, values in render.read_csv(logs[0]).items() if np.isfinite(values).any()]
    groups = [tuple(name for name in names if name in known) for names in CURVES]
    peak = "val_judge" if "val_judge" in known else None
    render.curves(path, logs, [names for names in groups if names], peak=peak)


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
