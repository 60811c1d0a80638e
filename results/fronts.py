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
    render.safely(pictures.fronts, path, clouds, names, samplers)
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
