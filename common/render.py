"""Pictures of motion (GIF, storyboard, curves) and files for other programs (BVH, npy).

Stick figures: right limbs red, left limbs blue, spine and head black; on the floor their shadow and, dashed,
the path of the root. A dot marks a toe on the floor; it is orange while it slides (what "foot skate" counts).

Drawn with Figure and Agg, never pyplot: no global state, no display. Every file is written under a temporary
name and then renamed. A picture is never worth a training run: call these functions through `safely`.
"""

import contextlib
import csv
import itertools
import os
import textwrap
import warnings
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image  # installed with matplotlib, which needs it itself

from common import InputError

RED, BLUE, BLACK, ORANGE = "#d62728", "#1f5fbf", "#1a1a1a", "#ff8c00"
GREY, SHADOW, FLOOR = "#8a8a8a", "#cdd1d6", "#eef0f2"
LEGEND = "red: right, blue: left.  dot: toe on the floor, orange: sliding"
DPI = 100

# Mixamo's names, which most BVH collections share, so that files travel both ways.
_ARM, _LEG = ("Arm", "ForeArm", "Hand"), ("UpLeg", "Leg", "Foot", "ToeBase", "ToeEnd")
JOINT_NAMES = {
    "t2m": ("Hips LeftUpLeg RightUpLeg Spine LeftLeg RightLeg Spine1 LeftFoot RightFoot Spine2 LeftToeBase "
            "RightToeBase Neck LeftShoulder RightShoulder Head LeftArm RightArm LeftForeArm RightForeArm "
            "LeftHand RightHand").split(),
    "kit": ["Hips", "Spine", "Spine1", "Neck", "Head"]
           + [side + part for parts in (_ARM, _LEG) for side in ("Right", "Left") for part in parts]}


# ---- 1. Files ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _replacing(path):
    """Yields a temporary path beside `path`, which it becomes if the block succeeds; if not, it goes away."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def safely(draw, *args, **kwargs):
    """Call draw(*args, **kwargs). An error becomes a RuntimeWarning that names it, and None is returned."""
    try:
        return draw(*args, **kwargs)
    except Exception as error:
        warnings.warn(f"{getattr(draw, '__name__', draw)} failed, the run goes on without it: "
                      f"{type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)


def write_npy(path, joints):
    """Save joints (t j 3) as float32, in the units they come in."""
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.asarray(joints, dtype=np.float32))


# ---- 2. Camera and figure ----------------------------------------------------------------------------------

AZIMUTH, ELEVATION, DISTANCE = np.radians(-40), np.radians(14), 9.0   # metres; a clip starts facing azimuth 0


def project(points):
    """What the camera sees of points (... 3) in metres: (... 3) = to the right, up, towards the viewer.

    Not mplot3d with axes (x, z, y), as in much motion code: that swap is a reflection, left and right change.
    """
    sine, cosine = np.sin(AZIMUTH), np.cos(AZIMUTH)
    right, toward = np.array([cosine, 0, -sine]), np.array([sine, 0, cosine])
    toward = np.cos(ELEVATION) * toward + np.sin(ELEVATION) * np.array([0, 1, 0])
    seen = points @ np.stack([right, np.cross(toward, right), toward], -1)
    seen[..., :2] *= DISTANCE / np.maximum(DISTANCE - seen[..., 2:], 1.0)       # never behind the camera
    return seen


def _centres(clips, follow):
    """Where the camera looks, (t 3) on the floor per clip: one fixed place for all, or along the root."""
    if not follow:
        ground = np.concatenate([clip.reshape(-1, 3) for clip in clips]) * [1, 0, 1]
        return [np.broadcast_to((ground.min(0) + ground.max(0)) / 2, (len(clip), 3)) for clip in clips]
    window = 21             # frames; a camera that copies the sway of every step makes one seasick
    edge = ((window // 2, window // 2), (0, 0))
    paths = [np.pad(clip[:, 0] * [1, 0, 1], edge, mode="edge") for clip in clips]
    return [np.lib.stride_tricks.sliding_window_view(path, window, axis=0).mean(-1) for path in paths]


def _limits(clips, centres, aspect):
    """x and y limits that hold every frame of every clip, for a panel `aspect` times as wide as high."""
    seen = [project(clip - centre[:, None]).reshape(-1, 3) for clip, centre in zip(clips, centres)]
    seen = np.concatenate(seen)[:, :2]
    low, high = seen.min(0) - [0.12, 0.15], seen.max(0) + [0.12, 0.3]     # head, shadow, clock
    height = max(high[1] - low[1], (high[0] - low[0]) / aspect)
    x, y = (low + high) / 2
    return (x - height * aspect / 2, x + height * aspect / 2), (y - height / 2, y + height / 2)


def _floor(path):
    """Rectangle around a path (t 3): corners (4 3), half-metre grid (n 3, NaN between lines), metres."""
    x0, _, z0 = np.floor(path.min(0) * 2 - 1) / 2
    x1, _, z1 = np.ceil(path.max(0) * 2 + 1) / 2
    lines = [[[x, 0, z0], [x, 0, z1], [np.nan] * 3] for x in np.arange(x0, x1, 0.5)]
    lines += [[[x0, 0, z], [x1, 0, z], [np.nan] * 3] for z in np.arange(z0, z1, 0.5)]
    return np.array([[x0, 0, z0], [x1, 0, z0], [x1, 0, z1], [x0, 0, z1]]), np.concatenate(lines)


def chain_colours(skeleton):
    """A colour for each of the skeleton's chains: red right, blue left, black the spine."""
    index = skeleton.index
    right, left = {index["r_hip"], index["r_shoulder"]}, {index["l_hip"], index["l_shoulder"]}
    return [RED if right & {*chain} else BLUE if left & {*chain} else BLACK for chain in skeleton.chains]


class _Stage:
    """One clip in one axes. Artists are made once; show(frame) moves and returns them, from back to front."""

    def __init__(self, axes, joints, skeleton, centre, limits, fps, linewidth):
        self.axes, self.fps, self.centre = axes, fps, centre
        self.chains, index = [list(chain) for chain in skeleton.chains], skeleton.index
        self.path = joints[:, 0] * [1, 0, 1]
        self.corners, self.grid = _floor(self.path)
        self.body = project(joints - centre[:, None])  # t j 3
        self.shadow = project(joints * [1, 0, 1] - centre[:, None])
        neck, up = joints[:, index["neck"]], joints[:, index["head"]] - joints[:, index["neck"]]
        skull = neck + 0.16 * up / np.maximum(np.linalg.norm(up, axis=-1, keepdims=True), 1e-6)
        self.head = project(skull - centre)  # the head joints of both formats lie too low for a skull
        toes = joints[:, [index["l_toe"], index["r_toe"]]]  # t 2 3
        step = np.diff(toes[..., [0, 2]], axis=0, append=toes[-1:, :, [0, 2]])
        on_floor = toes[..., 1] - np.quantile(toes[..., 1], 0.05) < 0.05       # both as foot skate has it
        moving = np.linalg.norm(step, axis=-1) * fps > 0.5
        self.dots = [project(np.where(chosen[..., None], toes, np.nan) - centre[:, None])
                     for chosen in (on_floor & ~moving, on_floor & moving)]

        colours = chain_colours(skeleton)
        self.spine = colours.index(BLACK)

        def line(**style):
            return axes.plot([], [], **{"solid_capstyle": "round", "solid_joinstyle": "round", **style})[0]

        def dot(size, **style):
            return line(marker="o", linestyle="", markersize=size, **style)

        axes.set(xlim=limits[0], ylim=limits[1])
        axes.set_axis_off()
        points_per_metre = axes.get_window_extent().height / (limits[1][1] - limits[1][0]) * 72 / DPI
        self.floor_art = axes.fill([0], [0], facecolor=FLOOR, edgecolor=SHADOW, linewidth=0.8)[0]
        self.grid_art = line(color="white", linewidth=1.0)
        self.shadow_art = line(color=SHADOW, linewidth=linewidth * 1.2)
        self.path_art = line(color=GREY, linewidth=1.0, linestyle=(0, (3, 2)))
        self.limb_arts = [line(color=colour, linewidth=linewidth) for colour in colours]
        self.head_art = dot(0.21 * points_per_metre, color=BLACK)
        self.dot_arts = [dot(linewidth * 1.9, color=colour, markeredgecolor="white", markeredgewidth=0.6)
                         for colour in (BLACK, ORANGE)]
        self.clock_art = axes.text(0.98, 0.98, "", transform=axes.transAxes, ha="right", va="top", fontsize=8,
                                   color=GREY)

    def show(self, frame):
        frame = min(frame, len(self.body) - 1)                  # a shorter clip waits in its last pose
        body, centre = self.body[frame], self.centre[frame]
        self.floor_art.set_xy(project(self.corners - centre)[:, :2])
        self.grid_art.set_data(*project(self.grid - centre)[:, :2].T)
        self.path_art.set_data(*project(self.path[:frame + 1] - centre)[:, :2].T)
        chains = [np.vstack([self.shadow[frame, chain, :2], [np.nan, np.nan]]) for chain in self.chains]
        self.shadow_art.set_data(*np.concatenate(chains).T)
        for limb, chain in zip(self.limb_arts, self.chains):
            limb.set_data(*body[chain, :2].T)
        self.head_art.set_data(*self.head[frame, :2, None])
        for art, dots in zip(self.dot_arts, self.dots):
            art.set_data(*dots[frame, :, :2].T)
        self.clock_art.set_text(f"{frame / self.fps:.2f} s")
        nearness = [body[chain[1:], 2].mean() for chain in self.chains]   # nearer arms hide farther ones
        order = [self.floor_art, self.grid_art, self.shadow_art, self.path_art]
        for i in np.argsort(nearness):
            order += [self.limb_arts[i], self.head_art] if i == self.spine else [self.limb_arts[i]]
        order += [*self.dot_arts, self.clock_art]
        for rank, art in enumerate(order):
            art.set_zorder(rank)
        return order


# ---- 3. GIF and storyboard ---------------------------------------------------------------------------------

def clip_note(reward=None, oracle=None, skate=None):
    """Line under a panel: reward, tick or cross per attribute asked for, share of contacts that slide."""
    ticks = " ".join(f"{name} {chr(0x2713 if holds else 0x2717)}" for name, holds in (oracle or {}).items())
    return " | ".join(filter(None, [reward is not None and f"reward {reward:.2f}", ticks,
                                    skate is not None and f"skate {skate:.2f}"]))


def _clips(panels, skeleton):
    """Joints of every panel in metres, so that one camera fits both formats."""
    clips = [np.asarray(panel["joints"], dtype=np.float64) / skeleton.units_per_metre for panel in panels]
    for clip in clips:
        shaped = clip.ndim == 3 and clip.shape[1:] == (skeleton.joints, 3) and len(clip)
        if not shaped or not np.isfinite(clip).all():
            raise InputError(f"joints to draw must be finite and (t {skeleton.joints} 3), not {clip.shape}")
    return clips


def _wrapped(text, width, lines):
    rows = textwrap.wrap(str(text), width)
    return "\n".join(rows[:lines]) + (" ..." if len(rows) > lines else "")


def _figure(width, height):
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _text(figure, x, y, text, size, **style):
    """Text at pixel (x, y) from the upper left. In a caption, $ must not start a formula."""
    width, height = figure.get_size_inches() * DPI
    figure.text(x / width, 1 - y / height, text, fontsize=size, parse_math=False, **{"va": "top", **style})


def _axes(figure, x, y, width, height):
    """Axes at pixel (x, y) from the upper left."""
    across, down = figure.get_size_inches() * DPI
    return figure.add_axes([x / across, 1 - (y + height) / down, width / across, height / down])


def _palette():
    """Every ink blended into white and into the floor. One palette for all frames: small, no flicker."""
    inks, papers = (RED, BLUE, BLACK, GREY, ORANGE, SHADOW), ("white", FLOOR)
    blends = [share * np.array(to_rgb(ink)) + (1 - share) * np.array(to_rgb(paper))
              for paper in papers for share in np.linspace(0, 1, 6) for ink in inks]
    image = Image.new("P", (1, 1))
    image.putpalette(np.round(np.array(blends) * 255).astype(np.uint8).tobytes())
    return image


def render_gif(path, panels, skeleton, caption="", fps=None, *, every=1, size=(300, 320)):
    """Animated panels side by side, seen by one camera.

    panels: list of dict(joints (t j 3) in the skeleton's units, title, note); title ("before", "after",
    "data") and note (`clip_note(...)`) may be missing. fps: of the joints, default the skeleton's. every:
    keep each n-th frame. size: pixels of a panel. The camera stands still; if a path is longer than 4 m it
    follows the root in all panels. Raises InputError on joints of a wrong shape or not finite.
    """
    fps, clips, (width, height) = fps or skeleton.fps, _clips(panels, skeleton), size
    centres = _centres(clips, follow=max(np.ptp(clip[:, 0], axis=0).max() for clip in clips) > 4)
    limits = _limits(clips, centres, width / height)
    title, middle = _wrapped(caption, 36 * len(panels), 3), width * len(panels) / 2
    top = 14 + 19 * (title.count("\n") + 1) if title else 6
    figure = _figure(width * len(panels), top + height + 68)
    _text(figure, middle, 8, title, 11, ha="center")
    _text(figure, middle, top + height + 65, LEGEND, 7, ha="center", va="bottom", color=GREY)
    stages = []
    for i, (panel, clip, centre) in enumerate(zip(panels, clips, centres)):
        x, note = (i + 0.5) * width, _wrapped(panel.get("note", ""), 50, 2)
        _text(figure, x, top, panel.get("title", ""), 10, ha="center", weight="bold")
        _text(figure, x, top + height + 24, note, 8, ha="center")
        axes = _axes(figure, i * width + 2, top + 22, width - 4, height)
        stages.append(_Stage(axes, clip, skeleton, centre, limits, fps, linewidth=3.2))

    figure.canvas.draw()                                        # all that stands still, once
    background, palette, images = figure.canvas.copy_from_bbox(figure.bbox), _palette(), []
    for frame in range(0, max(map(len, clips)), every):
        figure.canvas.restore_region(background)
        for stage in stages:
            for art in stage.show(frame):
                stage.axes.draw_artist(art)
        image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
        images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
    with _replacing(path) as temporary:
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], loop=0,
                       duration=round(1000 * every / fps))


def storyboard(path, clips, skeleton, fps=None, *, frames=6, size=(118, 140)):
    """Still picture (PNG): a row per motion, `frames` moments from its first to its last frame as columns.

    clips: list of (caption, panels), panels as in `render_gif`, one row each. The camera follows each
    figure, the dashed line shows where it came from. Raises InputError like `render_gif`.
    """
    (width, height), label, line = size, 150, 34
    motions = [_clips(panels, skeleton) for _, panels in clips]
    centres = [[clip[:, 0] * [1, 0, 1] for clip in group] for group in motions]
    limits = _limits(sum(motions, []), sum(centres, []), width / height)
    bottom = height * sum(map(len, motions)) + line * len(clips)
    figure = _figure(label + width * frames, bottom + 18)
    _text(figure, label, bottom + 3, LEGEND, 7, color=GREY)
    y = 0
    for (caption, panels), group, looks in zip(clips, motions, centres):
        _text(figure, 10, y + 10, _wrapped(caption, 100, 1), 11)
        y += line
        for panel, clip, centre in zip(panels, group, looks):
            _text(figure, 10, y + 14, panel.get("title", ""), 10, weight="bold")
            _text(figure, 10, y + 34, _wrapped(panel.get("note", ""), 24, 5), 7.5, linespacing=1.4)
            for k, frame in enumerate(np.linspace(0, len(clip) - 1, frames).round().astype(int)):
                axes = _axes(figure, label + k * width, y, width, height)
                _Stage(axes, clip, skeleton, centre, limits, fps or skeleton.fps, linewidth=2.2).show(frame)
            y += height
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


# ---- 4. Curves ---------------------------------------------------------------------------------------------

def read_csv(path):
    """Columns of a log as name -> float array (rows). Empty cells and words are NaN; # starts a comment."""
    def number(cell):
        try:
            return float(cell)
        except (TypeError, ValueError):         # not measured in this row: the curve leaves it out
            return np.nan

    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    if not rows:
        raise InputError(f"{path}: no rows to draw")
    return {name: np.array([number(row[name]) for row in rows]) for name in rows[0]}


def _plain(axes):
    """Small ticks, a faint grid, no frame above and at the right."""
    axes.tick_params(labelsize=7, color=GREY)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def curves(path, runs, groups, x="iteration", bands=None, peak=None):
    """Small axes in one PNG, one per group of columns.

    runs: a log or a list of logs (seeds): CSV paths or dicts of arrays. groups: tuples of columns. bands:
    column -> column with the half width of its interval, shaded when there is one run. Several runs are
    matched by x: mean, shaded from lowest to highest. peak: a column; where it is highest, a line crosses all
    axes. Raises InputError if a column is missing.
    """
    runs, bands = runs if isinstance(runs, (list, tuple)) else [runs], bands or {}
    logs = [run if isinstance(run, dict) else read_csv(run) for run in runs]
    for name in (x, *bands.values(), *filter(None, [peak]), *(name for names in groups for name in names)):
        if any(name not in log for log in logs):
            raise InputError(f"no column {name!r} to draw; the log has {', '.join(logs[0])}")
    steps = np.unique(np.concatenate([log[x] for log in logs]))

    def table(name):                            # runs n
        filled = np.full((len(logs), len(steps)), np.nan)
        for row, log in zip(filled, logs):
            row[np.searchsorted(steps, log[x])] = log[name]
        return filled

    notes = [f"mean of {len(logs)} runs, shaded: lowest to highest"] * (len(logs) > 1)
    if peak:
        values = table(peak)
        there = np.isfinite(values).any(0)
        turn = steps[there][np.nanmean(values[:, there], 0).argmax()]
        notes.append(f"dotted: {peak.replace('_', ' ')} is highest")
    lines = -(-len(groups) // 4)
    columns = -(-len(groups) // lines)
    height = 200 * lines + 14 * bool(notes)
    figure = _figure(270 * columns, height)
    for i, names in enumerate(groups):
        axes = figure.add_subplot(lines, columns, i + 1)
        for name in names:
            values = table(name)
            there = np.isfinite(values).any(0)
            values, mean = values[:, there], np.nanmean(values[:, there], 0)
            half = table(bands[name])[0, there] if name in bands and len(logs) == 1 else 0
            colour = axes.plot(steps[there], mean, ".-", linewidth=1.5, label=name.replace("_", " "),
                               markersize=5 if there.sum() < 30 else 0)[0].get_color()
            axes.fill_between(steps[there], np.nanmin(values, 0) - half, np.nanmax(values, 0) + half,
                              color=colour, alpha=0.2, linewidth=0)
        if peak:
            axes.axvline(turn, color=GREY, linewidth=1, linestyle=":")
        axes.set_title(", ".join(names).replace("_", " "), fontsize=9, loc="left", weight="bold")
        axes.set_xlabel(x, fontsize=7, color=GREY)
        _plain(axes)
        if len(names) > 1:
            axes.legend(fontsize=7, frameon=False)
    _text(figure, 270 * columns - 8, height - 4, "; ".join(notes), 6, ha="right", va="bottom", color=GREY)
    figure.tight_layout(pad=0.9, rect=(0, 1 - 200 * lines / height, 1, 1))
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def lines(path, x, label, panels, scale="log"):
    """Curves over x on logarithmic axes in one PNG: panels: title -> {name: values like x}, the same names in
    each; label names x, whose axis has this scale. The legend stands at the right."""
    legend = 40 + 6 * max(len(name) for values in panels.values() for name in values)  # pixels
    figure = _figure(300 * len(panels) + legend, 280)
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
        _plain(axes)
    width = 300 * len(panels) / (300 * len(panels) + legend)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, frameon=False, loc="center left",
                  bbox_to_anchor=(width, 0.5))
    figure.tight_layout(pad=0.9, rect=(0, 0, width, 1))
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def fronts(path, clouds, names, groups=1):
    """What several policies can do in two rewards at a time, in one PNG with a projection for each pair.

    clouds: policy -> (p s k), k = len(names) rewards of s motions for each of p prompts, in `groups` equal
    parts (tokens). Line: the best of a prompt's s motions by a weighted sum of the two rewards, mean over the
    prompts, from all weight on one to all on the other; an outer line is better. Dots: means of the parts,
    with the first letter of the reward whose token they were sampled with.
    """
    pairs = list(itertools.combinations(range(len(names)), 2))
    figure = _figure(290 * len(pairs), 290)
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
        _plain(axes)
        if i == 0:
            axes.legend(fontsize=7, frameon=False, loc="center left")
    legend = "line: best of a prompt's motions by two weights, dots: mean with a token (first letter)"
    _text(figure, 290 * len(pairs) - 8, 286, legend, 6, ha="right", va="bottom", color=GREY)
    figure.tight_layout(pad=0.9, rect=(0, 0.03, 1, 1))
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


# ---- 5. BVH ------------------------------------------------------------------------------------------------

def _rotation(axis, degrees):
    """Rotations (t 3 3) about "X", "Y" or "Z" by degrees (t)."""
    i = "XYZ".index(axis)
    j, k = (i + 1) % 3, (i + 2) % 3
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    matrix = np.zeros((len(degrees), 3, 3))
    matrix[:, i, i], matrix[:, j, j], matrix[:, k, k] = 1, cosine, cosine
    matrix[:, k, j], matrix[:, j, k] = sine, -sine
    return matrix


def _between(u, v):
    """Smallest rotations (t 3 3) that turn u (3), a unit vector along an axis, onto unit vectors v (t 3)."""
    cross, cosine = np.cross(u, v), (v @ u)[:, None, None]
    skew = np.cross(np.eye(3), cross[:, None])  # skew @ w = cross(cross, w): Rodrigues' formula
    across = np.roll(u, 1)
    half_turn = 2 * np.outer(across, across) - np.eye(3)        # opposite vectors leave the axis open
    turned = np.eye(3) + skew + skew @ skew / np.maximum(1 + cosine, 1e-9)
    return np.where(cosine > -1 + 1e-9, turned, half_turn)


def _euler(matrix):
    """Degrees (t 3) about z, x, y of rotations (t 3 3) = Rz Rx Ry."""
    locked = np.abs(matrix[:, 2, 1]) > 1 - 1e-12  # x = +-90 degrees: z and y turn about one axis
    z = np.where(locked, np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]),
                 np.arctan2(-matrix[:, 0, 1], matrix[:, 1, 1]))
    y = np.where(locked, 0, np.arctan2(-matrix[:, 2, 0], matrix[:, 2, 2]))
    return np.degrees(np.stack([z, np.arcsin(np.clip(matrix[:, 2, 1], -1, 1)), y], -1))


def write_bvh(path, joints, skeleton, fps=None):
    """Write joints (t j 3) in the skeleton's units as BVH: centimetres, Y up, rotations Z X Y, `JOINT_NAMES`.

    Positions come back exactly if bone lengths are constant; else each bone gets its mean length. Positions
    do not show twist around a bone: the smallest rotation is used. Where bones fork, each has a pivot of
    its own (name ends in _pivot), since one rotation cannot point them all. Raises InputError like
    `render_gif`.
    """
    joints = _clips([{"joints": joints}], skeleton)[0] * 100
    index, names = skeleton.index, JOINT_NAMES[skeleton.name]
    across = sum(joints[:, index["l_" + end]] - joints[:, index["r_" + end]] for end in ("hip", "shoulder"))
    still = np.broadcast_to(np.eye(3), (len(joints), 3, 3))
    heading = _rotation("Y", np.degrees(np.arctan2(-across[:, 2], across[:, 0])))
    text, motion = ["HIERARCHY"], [joints[:, 0]]

    def bone(a, b, world):
        """Offset (3) of joint b from a, and the rotation (t 3 3) in a's frame that points it where b is."""
        vector = joints[:, b] - joints[:, a]
        length = np.linalg.norm(vector, axis=-1, keepdims=True)
        local = np.einsum("tji,tj->ti", world, vector / np.maximum(length, 1e-9))
        crossed = (local @ skeleton.rest[b]).mean() < -0.5      # KIT's table of rest bones crosses the hips
        rest = -skeleton.rest[b] if crossed else skeleton.rest[b]
        return rest * length.mean(), _between(rest, local)

    def begin(name, offset, turn, pad):
        """Open a node; pad is its indentation, empty for the root."""
        channels = "CHANNELS 3" if pad else "CHANNELS 6 Xposition Yposition Zposition"
        text.extend([f"{pad}{'JOINT' if pad else 'ROOT'} {name}", pad + "{",
                     f"{pad}  OFFSET {_numbers(offset)}", f"{pad}  {channels} Zrotation Xrotation Yrotation"])
        motion.append(_euler(turn))

    def visit(joint, offset, world, pad):
        own = still if pad else heading
        world, kids = world @ own, [kid for kid, parent in enumerate(skeleton.parents) if parent == joint]
        bones = [bone(joint, kid, world) for kid in kids]
        begin(names[joint], offset, own @ bones[0][1] if len(kids) == 1 else own, pad)
        for kid, (vector, turn) in zip(kids, bones):
            if len(kids) == 1:
                visit(kid, vector, world @ turn, pad + "  ")
            else:
                begin(names[kid] + "_pivot", np.zeros(3), turn, pad + "  ")
                visit(kid, vector, world @ turn, pad + "    ")
                text.append(pad + "  }")
        if not kids:
            end = f"OFFSET {_numbers(offset * 0.3)}"
            text.extend([pad + "  End Site", pad + "  {", f"{pad}    {end}", pad + "  }"])
        text.append(pad + "}")

    visit(0, np.zeros(3), still, "")
    text += ["MOTION", f"Frames: {len(joints)}", f"Frame Time: {1 / (fps or skeleton.fps):.8f}"]
    with _replacing(path) as temporary:
        temporary.write_text("\n".join(text + [_numbers(row) for row in np.concatenate(motion, -1)]) + "\n")


def _numbers(row):
    return " ".join(f"{value:.6f}" for value in row)


def read_bvh(path, skeleton):
    """Read a BVH in centimetres, Y up, names of `JOINT_NAMES` -> joints (t j 3), skeleton's units and rate.

    Any hierarchy and channel order; other joints are left out, prefixes such as "mixamorig:" ignored, frames
    interpolated. Raises InputError naming the file and what is wrong with it.
    """
    try:
        header, data = Path(path).read_text(encoding="utf-8").split("MOTION")
        places, seconds = _forward_kinematics(header.split(), data.split())
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a readable BVH file ({type(error).__name__}: {error})") from error
    if missing := [name for name in JOINT_NAMES[skeleton.name] if name not in places]:
        raise InputError(f"{path}: no joint called {', '.join(missing)}; rename the joints in the file")
    joints = np.stack([places[name] for name in JOINT_NAMES[skeleton.name]], 1)
    joints = joints / 100 * skeleton.units_per_metre
    then = np.arange(len(joints)) * seconds
    now = np.arange(int(round(then[-1] * skeleton.fps, 3)) + 1) / skeleton.fps
    columns = [np.interp(now, then, column) for column in joints.reshape(len(joints), -1).T]
    return np.stack(columns, -1).reshape(len(now), -1, 3)


def _forward_kinematics(words, data):
    """Words of a BVH's two halves -> {name: positions (t 3)} in its units, seconds of a frame."""
    frames, seconds = int(data[1]), float(data[4])
    values = np.array(data[5:], dtype=float).reshape(frames, -1)
    if frames < 1 or seconds <= 0 or not np.isfinite(values).all():
        raise ValueError("needs frames, a frame time above 0 and finite numbers")
    places, column, name = {}, 0, None
    stack = [(np.zeros((frames, 3)), np.broadcast_to(np.eye(3), (frames, 3, 3)))]     # position, rotation
    for i, word in enumerate(words):
        if word in ("ROOT", "JOINT", "End"):
            name = words[i + 1].split(":")[-1]
        elif word == "OFFSET":
            place, turn = stack[-1]
            places[name] = place + turn @ np.array(words[i + 1:i + 4], dtype=float)
            stack.append((places[name], turn))
        elif word == "CHANNELS":
            turn = stack[-1][1]
            for channel in words[i + 2:i + 2 + int(words[i + 1])]:
                if channel.endswith("position"):  # other joints keep their offset from the parent
                    if len(stack) == 2:
                        places[name][:, "XYZ".index(channel[0])] = values[:, column]
                else:
                    turn = turn @ _rotation(channel[0], values[:, column])
                column += 1
            stack[-1] = (places[name], turn)
        elif word == "}":
            stack.pop()
    return places, seconds
