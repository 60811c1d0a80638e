"""Pictures of tables and studies: curves over anything, and what policies can do in several rewards."""
import itertools

import numpy as np
from matplotlib.ticker import LogLocator

from common import InputError
from common.evaluate import GATE
from common.render import GREY, curves, new_figure, plain_axes, save_png, write_text


def lines(path, x, label, panels, scale="log"):
    """Curves over x on logarithmic axes in one PNG: panels: title -> {name: values like x}, the same names in
    each; label names x, whose axis has this scale. The legend stands at the right."""
    legend = 40 + 6 * max(len(name) for values in panels.values() for name in values)  # pixels
    figure = new_figure(300 * len(panels) + legend, 280)
    for i, (title, values) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for k, (name, y) in enumerate(values.items()):  # the first one may lie under others
            axes.plot(x, y, ".-", linewidth=1.3 if k else 4, markersize=5, label=name)
        axes.set_xscale(scale)
        axes.set_yscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        lowest, highest = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if highest < 1e4 * lowest else (1.0,)))
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.minorticks_off()
        axes.set_title(title, fontsize=9, loc="left", weight="bold")
        axes.set_xlabel(label, fontsize=7, color=GREY)
        plain_axes(axes)
    width = 300 * len(panels) / (300 * len(panels) + legend)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, frameon=False, loc="center left",
                  bbox_to_anchor=(width, 0.5))
    figure.tight_layout(pad=0.9, rect=(0, 0, width, 1))
    save_png(path, figure)


def seeds(path, logs, groups, x="iteration", peak="val_judge"):
    """Learning curves of one or several runs of a script in one PNG. Several are matched by x: mean, shaded
    from lowest to highest. logs: list of {column: values}. Raises InputError if one lacks a column."""
    steps = np.unique(np.concatenate([log[x] for log in logs]))
    mean, bands = {x: steps}, {}
    wanted = [name for names in groups for name in ([names] if isinstance(names, str) else names)]
    for name in sorted({peak, *wanted} & logs[0].keys()):
        if not np.isfinite(logs[0][name]).any():
            continue
        if any(name not in log for log in logs):
            raise InputError(f"no column {name!r} to draw; the log has {', '.join(logs[0])}")
        filled = np.full((len(logs), len(steps)), np.nan)
        for row, log in zip(filled, logs):
            row[np.searchsorted(steps, log[x])] = log[name]
        known, values = np.isfinite(filled).any(0), np.full((3, len(steps)), np.nan)
        values[:, known] = [part(filled[:, known], 0) for part in (np.nanmean, np.nanmin, np.nanmax)]
        mean[name], *bands[name] = values
    note = f"mean of {len(logs)} runs, shaded: lowest to highest" if len(logs) > 1 else ""
    curves(path, mean, groups, x, peak, bands, note)


def tradeoff(path, names, tables, logs):
    """How plausible the motions were when they did so much of what was asked, in one PNG: the oracle at every
    look at val over speed, jerk and foot skate, each divided by that of the data; shaded: beyond the gate
    (common/evaluate.py). A ring is the base. names: of the runs; tables: their target_val; logs: theirs."""
    columns = ("speed", "jerk", "foot_skate")
    figure = new_figure(290 * len(columns), 290)
    for i, column in enumerate(columns):
        axes, low_high = figure.add_subplot(1, len(columns), i + 1), GATE[column][:2]
        for name, table, log in zip(names, tables, logs):
            known = np.isfinite(log["val_oracle"])
            data, base = table["gt"][column][0], table["base"]
            x, y = log[f"val_{column}"][known] / data, log["val_oracle"][known]
            x, y = np.r_[base[column][0] / data, x], np.r_[base["oracle"][0], y]
            colour = axes.plot(x, y, ".-", linewidth=1.0, markersize=4, label=name)[0].get_color()
            axes.plot(x[0], y[0], "o", markersize=7, color=colour, markerfacecolor="white")
        left, right = axes.get_xlim()
        left, right = min(left, 0.9 * low_high[0] if low_high[0] else left), max(right, 1.05 * low_high[1])
        axes.axvspan(low_high[1], right, color=GREY, alpha=0.2, linewidth=0)
        if low_high[0]:
            axes.axvspan(left, low_high[0], color=GREY, alpha=0.2, linewidth=0)
        axes.axvline(1.0, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_xlim(left, right)
        axes.set_xlabel(f"{column.replace('_', ' ')}, times the data's", fontsize=8)
        axes.set_ylabel("oracle" if i == 0 else "", fontsize=8)
        plain_axes(axes)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    figure.tight_layout(pad=0.9)
    save_png(path, figure)


def fronts(path, clouds, names, groups=1):
    """What several policies can do in two rewards at a time, in one PNG with a projection for each pair.

    clouds: policy -> (p s k), k = len(names) rewards of s motions for each of p prompts, in `groups` equal
    parts (tokens). Line: the best of a prompt's s motions by a weighted sum of the two rewards, mean over the
    prompts, from all weight on one to all on the other; an outer line is better. Dots: means of the parts,
    with the first letter of the reward whose token they were sampled with.
    """
    pairs = list(itertools.combinations(range(len(names)), 2))
    figure = new_figure(290 * len(pairs), 290)
    for i, (x, y) in enumerate(pairs):
        axes = figure.add_subplot(1, len(pairs), i + 1)
        for name, cloud in clouds.items():
            points = np.asarray(cloud)[..., [x, y]]
            weights = np.linspace(0, 1, 41)[:, None, None] * [1, -1] + [0, 1]  # w 1 2: of x, of y
            best = np.einsum("psk,wok->wps", points, weights).argmax(-1)
            front = np.take_along_axis(points[None], best[..., None, None], 2).mean((1, 2))
            colour = axes.plot(*front.T, ".-", linewidth=1.2, markersize=3, label=name)[0].get_color()
            parts = points.reshape(len(points), groups, -1, 2).mean((0, 2))
            axes.plot(*parts.T, "o", markersize=5, color=colour, markeredgecolor="white")
            for mean, letter in zip(parts, [word[0] for word in names] if groups == len(names) else ""):
                axes.annotate(letter, mean, (3, 3), textcoords="offset points", fontsize=7, color=colour)
        axes.set_xlabel(names[x], fontsize=8)
        axes.set_ylabel(names[y], fontsize=8)
        plain_axes(axes)
        if i == 0:
            axes.legend(fontsize=7, frameon=False, loc="center left")
    legend = "line: best of a prompt's motions by two weights, dots: mean with a token (first letter)"
    write_text(figure, 290 * len(pairs) - 8, 286, legend, 6, ha="right", va="bottom", color=GREY)
    figure.tight_layout(pad=0.9, rect=(0, 0.03, 1, 1))
    save_png(path, figure)
