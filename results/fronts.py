"""What policies of pareto_motion.py can do in several rewards: `python -m results.fronts RUN [RUN ...]`.

The hypervolume of a prompt is the volume that its motions dominate, over the point 0. It is printed
for the supervised GPT, "start", and for each run, with differences and 95 % intervals over prompts;
then how well the tokens control, as a mean over the runs. Rewards, prompts and start are those of
the first run.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from common import InputError, evaluate, metrics, runs
from results import pictures, studies, tables

FRONT_SAMPLES = 8  # motions of each prompt and sampler; the volume grows with them


def front_points(samplers, clips, scorers, names):
    """Rewards `names` (columns of the scorers) of motions for the clips' captions, FRONT_SAMPLES of
    each of the samplers -> (p s k); two policies are comparable for equal s."""
    captions, _, lengths = evaluate.questions(clips, 0)
    points = []
    for k, sampler in enumerate(samplers):
        for n in range(FRONT_SAMPLES):
            motion, made = sampler(captions, lengths, f"front {k}", n)
            there = motion.to(scorers.device), made.to(scorers.device)
            columns = scorers.columns(*there, captions, clips)
            points.append(np.stack([columns[name].double().cpu() for name in names], -1))
    return np.stack(points, 1)


def hypervolumes(points):
    """Volume over the reference point 0 of each prompt's motions: (p s k) -> (p)"""
    return np.array([metrics.hypervolume(each, np.zeros(each.shape[1])) for each in points])


def over_prompts(values):
    """[mean, half width of its 95 % interval] over prompts (p)"""
    return [*metrics.clustered_interval(values, range(len(values)))]


def compare_fronts(policies, clips, scorers, names, path=None):
    """Print the hypervolume of each policy (name -> samplers), its difference to the ones before,
    and that of the means of its samplers; draw the fronts -> {name: {...}}."""
    clouds = {name: front_points(samplers, clips, scorers, names)
              for name, samplers in policies.items()}
    samplers, count = len(next(iter(policies.values()))), next(iter(clouds.values())).shape[1]
    volumes, found = {name: hypervolumes(points) for name, points in clouds.items()}, {}
    for name, points in clouds.items():
        means = points.reshape(len(clips), samplers, -1, len(names)).mean((0, 2))  # of each sampler
        found[name] = {"hypervolume": over_prompts(volumes[name]),
                       "of the means": [float(hypervolumes(means[None])[0]), 0.0],
                       **{f"less {other}": over_prompts(volumes[name] - volumes[other])
                          for other in found}}
    columns = list(next(reversed(found.values())))
    rows = [[name, *(tables.cell([row[c]] if c in row else [], 1, "+" if "less" in c else "")
                     for c in columns)] for name, row in found.items()]
    print(f"\nhypervolume of {count} motions of each of {len(clips)} prompts, and of the means\n\n"
          + tables.markdown(["", *columns], rows))
    if path:
        pictures.fronts(path, clouds, names, samplers)
    return found


def controllability(results, names):
    """Print the mean over runs of reward j (columns) with the token of reward k alone (rows) -> the
    matrices (r k j), of runs that have tokens. The tokens control where the diagonal has the maximum
    of each column."""
    shown = [table for table in results if f"token {names[0]}" in table]
    matrices = np.array([[[table[f"token {k}"][j][0] for j in names] for k in names]
                         for table in shown])
    if len(matrices):
        mean = matrices.mean(0)
        rows = [[name, *(f"{value:.3f}{'*' if value == top else ''}"
                         for value, top in zip(row, mean.max(0)))] for name, row in zip(names, mean)]
        others = np.where(np.eye(len(names), dtype=bool), -np.inf, matrices).max(1)
        wins = (matrices.diagonal(axis1=1, axis2=2) > others).sum(0)
        rows.append(["runs in which the diagonal is above the rest", *map(str, wins)])
        print("\ncontrollability (row: token, column: reward, * maximum of the column)\n\n"
              + tables.markdown(["", *names], rows))
    return matrices


def main(argv=None):
    """Reopen the runs that are named, sample, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("runs", nargs="+", help="finished runs of pareto_motion.py on the same data")
    parser.add_argument("--prompts", type=int, default=64, help="of the test split (default 64)")
    parser.add_argument("--picture", metavar="PNG", help="draw the fronts")
    args = parser.parse_args(argv)
    if args.prompts < 2:
        raise InputError(f"--prompts {args.prompts}: at least 2, for an interval")
    results, policies, first = tables.read_results(args.runs), {}, None
    for path in args.runs:
        run = studies.reopen(path)
        if run.script.__name__ != "pareto_motion":
            raise InputError(f"{path}: not a run of pareto_motion.py")

        def samplers(policy, run=run):
            rewards = torch.eye(len(run.script.REWARDS))  # with the token of each, if there are any
            return [run.script.policy_sampler(run.args, policy, weights) for weights in rewards]
        if first is None:
            first = run
            start = run.policy._replace(gpt=run.policy.reference, tokens=None)
            policies["start"] = samplers(start)
        name = Path(path).name
        policies[path if name in policies else name] = samplers(run.policy)
    names, clips = first.script.REWARDS, first.clips[:args.prompts]
    compare_fronts(policies, clips, first.scorers, names, args.picture)
    controllability([result["paired_test"] for result in results], names)


if __name__ == "__main__":
    runs.run_main(main)
