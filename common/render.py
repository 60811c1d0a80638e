"""Pictures of motion (GIF, storyboard, curves) and files for other programs (BVH, npy).

Stick figures have red right limbs, blue left limbs, and a black spine and head. On the floor lie their shadow
and, dashed, the path of the root. A dot marks a toe on the floor; it is orange while it slides (what "foot
skate" counts).

Everything is drawn with Figure and Agg, never pyplot: no global state, no display. A picture is never worth a
training run: call these functions through `safely`.
"""
import csv
import math
import textwrap
import warnings
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image  # installed with matplotlib, which needs it itself

from common import InputError
from common.runs import atomic_write

RED, BLUE, BLACK, ORANGE = "#d62728", "#1f5fbf", "#1a1a1a", "#ff8c00"
GREY, SHADOW, FLOOR = "#8a8a8a", "#cdd1d6", "#eef0f2"
LEGEND = "red: right, blue: left.  dot: toe on the floor, orange: sliding"
DPI = 100
PANEL, CELL = (300, 320), (118, 140)  # pixels of a panel of a GIF, and of a moment in a storyboard
MOMENTS = 6                           # columns of a storyboard

# Mixamo's names, which most BVH collections share, so that files travel both ways.
_ARM, _LEG = ("Arm", "ForeArm", "Hand"), ("UpLeg", "Leg", "Foot", "ToeBase", "ToeEnd")
JOINT_NAMES = {
    "t2m": ("Hips LeftUpLeg RightUpLeg Spine LeftLeg RightLeg Spine1 LeftFoot RightFoot Spine2 LeftToeBase "
            "RightToeBase Neck LeftShoulder RightShoulder Head LeftArm RightArm LeftForeArm RightForeArm "
            "LeftHand RightHand").split(),
    "kit": ["Hips", "Spine", "Spine1", "Neck", "Head"]
           + [side + part for parts in (_ARM, _LEG) for side in ("Right", "Left") for part in parts]}


# ---- 1. Files ----------------------------------------------------------------------------------

def save(path, write):
    """Let write(temporary path) make a file, and rename it onto `path`, whose folder is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, write)


def save_png(path, figure):
    """Save a figure as PNG."""
    save(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))


def safely(draw, *args, **kwargs):
    """Call draw(*args, **kwargs). An error becomes a RuntimeWarning that names it, and None is returned."""
    try:
        return draw(*args, **kwargs)
    except Exception as error:
        warnings.warn(f"{getattr(draw, '__name__', draw)} failed, the run goes on without it: "
                      f"{type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)


def write_npy(path, joints):
    """Save joints (t j 3) as float32, in the units they come in."""
    def write(temporary):
        with open(temporary, "wb") as file:
            np.save(file, np.asarray(joints, dtype=np.float32))
    save(path, write)


# ---- 2. Camera and figure ----------------------------------------------------------------------

AZIMUTH, ELEVATION, DISTANCE = np.radians(-40), np.radians(14), 9.0   # metres; a clip starts facing azimuth 0


def project(points):
    """What the camera sees of points (... 3) in metres: (... 3) = to the right, up, towards the viewer."""
    # Not mplot3d with axes (x, z, y), as in much motion code: that swap is a reflection.
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
    # The mean of 21 frames: a camera that copies the sway of every step makes one seasick.
    paths = [np.pad(clip[:, 0] * [1, 0, 1], ((10, 10), (0, 0)), mode="edge") for clip in clips]
    return [np.lib.stride_tricks.sliding_window_view(path, 21, axis=0).mean(-1) for path in paths]


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

    def __init__(self, axes, joints, skeleton, centre, limits, linewidth):
        self.axes, self.fps, self.centre = axes, skeleton.fps, centre
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
        moving = np.linalg.norm(step, axis=-1) * self.fps > 0.5
        self.dots = [project(np.where(chosen[..., None], toes, np.nan) - centre[:, None])
                     for chosen in (on_floor & ~moving, on_floor & moving)]

        def line(**style):
            return axes.plot([], [], solid_capstyle="round", solid_joinstyle="round", **style)[0]

        axes.set(xlim=limits[0], ylim=limits[1])
        axes.set_axis_off()
        points_per_metre = axes.get_window_extent().height / (limits[1][1] - limits[1][0]) * 72 / DPI
        colours = chain_colours(skeleton)
        self.spine = colours.index(BLACK)
        self.floor_art = axes.fill([0], [0], facecolor=FLOOR, edgecolor=SHADOW, linewidth=0.8)[0]
        self.grid_art = line(color="white", linewidth=1.0)
        self.shadow_art = line(color=SHADOW, linewidth=linewidth * 1.2)
        self.path_art = line(color=GREY, linewidth=1.0, linestyle=(0, (3, 2)))
        self.limb_arts = [line(color=colour, linewidth=linewidth) for colour in colours]
        self.head_art = line(marker="o", markersize=0.21 * points_per_metre, color=BLACK)
        self.dot_arts = [line(marker="o", markersize=linewidth * 1.9, linestyle="", color=colour,
                              markeredgecolor="white", markeredgewidth=0.6) for colour in (BLACK, ORANGE)]
        self.clock_art = axes.text(0.98, 0.98, "", transform=axes.transAxes, ha="right", va="top", fontsize=8,
                                   color=GREY)

    def show(self, frame):
        """Move everything to a frame -> the artists, from back to front."""
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


# ---- 3. GIF and storyboard ---------------------------------------------------------------------

def clip_note(reward, oracle, skate):
    """Line under a panel: reward, tick or cross per attribute asked for, share of contacts that slide."""
    ticks = " ".join(f"{name} {chr(0x2713 if holds else 0x2717)}" for name, holds in oracle.items())
    return " | ".join(filter(None, [f"reward {reward:.2f}", ticks, f"skate {skate:.2f}"]))


def _clips(panels, skeleton):
    """Joints of every panel in metres, so that one camera fits both formats."""
    clips = [np.asarray(panel["joints"], dtype=np.float64) / skeleton.units_per_metre for panel in panels]
    for clip in clips:
        if clip.shape[1:] != (skeleton.joints, 3) or not clip.size or not np.isfinite(clip).all():
            raise InputError(f"joints to draw must be finite and (t {skeleton.joints} 3), not {clip.shape}")
    return clips


def _wrapped(text, width, lines):
    rows = textwrap.wrap(str(text), width)
    return "\n".join(rows[:lines]) + (" ..." if len(rows) > lines else "")


def new_figure(width, height):
    """An empty white figure of so many pixels."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write_text(figure, x, y, text, size, **style):
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


def render_gif(path, panels, skeleton, caption=""):
    """Animated panels side by side, seen by one camera.

    panels: list of dict(joints (t j 3) in the skeleton's units and frame rate, title, note); title ("before",
    "after", "data") and note (`clip_note(...)`) may be missing. The camera stands still; if a path is longer
    than 4 m it follows the root in all panels. Raises InputError on joints of a wrong shape or not finite.
    """
    clips, (width, height) = _clips(panels, skeleton), PANEL
    centres = _centres(clips, follow=max(np.ptp(clip[:, 0], axis=0).max() for clip in clips) > 4)
    limits = _limits(clips, centres, width / height)
    title, middle = _wrapped(caption, 36 * len(panels), 3), width * len(panels) / 2
    top = 14 + 19 * (title.count("\n") + 1) if title else 6
    figure = new_figure(width * len(panels), top + height + 68)
    write_text(figure, middle, 8, title, 11, ha="center")
    write_text(figure, middle, top + height + 65, LEGEND, 7, ha="center", va="bottom", color=GREY)
    stages = []
    for i, (panel, clip, centre) in enumerate(zip(panels, clips, centres)):
        x, note = (i + 0.5) * width, _wrapped(panel.get("note", ""), 50, 2)
        write_text(figure, x, top, panel.get("title", ""), 10, ha="center", weight="bold")
        write_text(figure, x, top + height + 24, note, 8, ha="center")
        axes = _axes(figure, i * width + 2, top + 22, width - 4, height)
        stages.append(_Stage(axes, clip, skeleton, centre, limits, linewidth=3.2))

    figure.canvas.draw()  # all that stands still, once
    background, palette, images = figure.canvas.copy_from_bbox(figure.bbox), _palette(), []
    for frame in range(max(map(len, clips))):
        figure.canvas.restore_region(background)
        for stage in stages:
            for art in stage.show(frame):
                stage.axes.draw_artist(art)
        image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
        images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
    options = dict(append_images=images[1:], duration=round(1000 / skeleton.fps), loop=0)
    save(path, lambda temporary: images[0].save(temporary, format="GIF", save_all=True, **options))


def storyboard(path, clips, skeleton):
    """Still picture (PNG): a row per motion, MOMENTS from its first to its last frame as columns.

    clips: list of (caption, panels), panels as in `render_gif`, one row each. The camera follows each
    figure, the dashed line shows where it came from. Raises InputError like `render_gif`.
    """
    (width, height), label, line = CELL, 150, 34
    motions = [_clips(panels, skeleton) for _, panels in clips]
    centres = [[clip[:, 0] * [1, 0, 1] for clip in group] for group in motions]
    limits = _limits(sum(motions, []), sum(centres, []), width / height)
    bottom = height * sum(map(len, motions)) + line * len(clips)
    figure = new_figure(label + width * MOMENTS, bottom + 18)
    write_text(figure, label, bottom + 3, LEGEND, 7, color=GREY)
    y = 0
    for (caption, panels), group, looks in zip(clips, motions, centres):
        write_text(figure, 10, y + 10, _wrapped(caption, 100, 1), 11)
        y += line
        for panel, clip, centre in zip(panels, group, looks):
            write_text(figure, 10, y + 14, panel.get("title", ""), 10, weight="bold")
            write_text(figure, 10, y + 34, _wrapped(panel.get("note", ""), 24, 5), 7.5, linespacing=1.4)
            for k, frame in enumerate(np.linspace(0, len(clip) - 1, MOMENTS).round().astype(int)):
                axes = _axes(figure, label + k * width, y, width, height)
                _Stage(axes, clip, skeleton, centre, limits, linewidth=2.2).show(frame)
            y += height
    save_png(path, figure)


# ---- 4. Curves ---------------------------------------------------------------------------------

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


def plain_axes(axes):
    """Small ticks, a faint grid, no frame above and at the right."""
    axes.tick_params(labelsize=7, color=GREY)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def curves(path, log, groups, x="iteration", peak="", bands=None, note=""):
    """Learning curves in one PNG: small axes for each group of columns, those without any value left out.

    log: path of a CSV, or {column: values}. groups: columns or tuples of them. peak: a column; where it is
    highest, a line crosses all axes. bands: {column: (lowest, highest)}, shaded; note: what they are.
    """
    log = log if isinstance(log, dict) else read_csv(log)
    measured = {name: np.isfinite(values) for name, values in log.items() if np.isfinite(values).any()}
    groups = [(names,) if isinstance(names, str) else names for names in groups]
    groups = [tuple(name for name in names if name in measured) for names in groups]
    groups = [names for names in groups if names]
    notes = [note, f"dotted: {peak.replace('_', ' ')} is highest" if peak in measured else ""]
    notes = "; ".join(filter(None, notes))
    lines = math.ceil(len(groups) / 4)
    columns = math.ceil(len(groups) / lines)
    width, height = 270 * columns, 200 * lines + 14 * bool(notes)
    figure = new_figure(width, height)
    for i, names in enumerate(groups):
        axes = figure.add_subplot(lines, columns, i + 1)
        for name in names:
            rows = measured[name]
            curve, = axes.plot(log[x][rows], log[name][rows], ".-", linewidth=1.5,
                               label=name.replace("_", " "), markersize=5 if rows.sum() < 30 else 0)
            if bands:
                lowest, highest = bands[name]
                axes.fill_between(log[x][rows], lowest[rows], highest[rows], color=curve.get_color(),
                                  alpha=0.2, linewidth=0)
        if peak in measured:
            axes.axvline(log[x][np.nanargmax(log[peak])], color=GREY, linewidth=1, linestyle=":")
        axes.set_title(", ".join(names).replace("_", " "), fontsize=9, loc="left", weight="bold")
        axes.set_xlabel(x, fontsize=7, color=GREY)
        plain_axes(axes)
        if len(names) > 1:
            axes.legend(fontsize=7, frameon=False)
    write_text(figure, width - 8, height - 4, notes, 6, ha="right", va="bottom", color=GREY)
    figure.tight_layout(pad=0.9, rect=(0, 1 - 200 * lines / height, 1, 1))
    save_png(path, figure)


# ---- 5. BVH ------------------------------------------------------------------------------------

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


def _unwrapped(angles):
    """angles (t n 3), degrees of n joints about z, x, y -> the same rotations, each as near as can be to that
    of the frame before: no angle jumps by more than 180 degrees, which programs would interpolate."""
    smooth = [angles[0]]
    for angle in angles[1:]:
        both = np.stack([angle, angle * [1, -1, 1] + 180])  # Rz Rx Ry: two triples are one rotation
        both -= 360 * np.round((both - smooth[-1]) / 360)
        far = np.square(both - smooth[-1]).sum(-1)  # 2 n
        smooth.append(np.where((far[0] <= far[1])[:, None], *both))
    return np.stack(smooth)


def write_bvh(path, joints, skeleton):
    """Write joints (t j 3) in the skeleton's units as BVH: centimetres, Y up, rotations Z X Y, `JOINT_NAMES`
    -> the joints (t j 3) that the file shows, in the same units.

    Positions come back exactly if bone lengths are constant. Those of generated motion are not, and a BVH has
    one length for each bone, here its mean: joints differ from those given by a centimetre or so, and in a
    damaged frame by much more. Positions do not show twist around a bone: the smallest rotation is used.
    Where bones fork, each has a pivot of its own (name ends in _pivot), since one rotation cannot point them
    all. Raises InputError like `render_gif`.
    """
    joints = _clips([{"joints": joints}], skeleton)[0] * 100
    index, names = skeleton.index, JOINT_NAMES[skeleton.name]
    across = sum(joints[:, index["l_" + end]] - joints[:, index["r_" + end]] for end in ("hip", "shoulder"))
    still = np.broadcast_to(np.eye(3), (len(joints), 3, 3))
    angle = np.arctan2(-across[:, 2], across[:, 0])
    sine, cosine, zero, one = np.sin(angle), np.cos(angle), np.zeros_like(angle), np.ones_like(angle)
    heading = np.stack([cosine, zero, sine, zero, one, zero, -sine, zero, cosine], -1).reshape(-1, 3, 3)
    shown = np.empty_like(joints)
    nodes = []          # (depth, head line, offset (3), rotation (t 3 3) or None) in the order of the file

    def bone(a, b, world):
        """Offset (3) of joint b from a, and the rotation (t 3 3) in a's frame that points it where b is."""
        vector = joints[:, b] - joints[:, a]
        length = np.linalg.norm(vector, axis=-1, keepdims=True)
        local = np.einsum("tji,tj->ti", world, vector / np.maximum(length, 1e-9))
        crossed = (local @ skeleton.rest[b]).mean() < -0.5      # KIT's table of rest bones crosses the hips
        rest = -skeleton.rest[b] if crossed else skeleton.rest[b]
        return rest * length.mean(), _between(rest, local)

    def visit(joint, offset, place, world, depth):
        shown[:, joint] = place = place + world @ offset
        own = heading if joint == 0 else still
        world, kids = world @ own, [kid for kid, parent in enumerate(skeleton.parents) if parent == joint]
        bones, forks = [bone(joint, kid, world) for kid in kids], len(kids) > 1
        kind = "JOINT" if depth else "ROOT"
        turn = own @ bones[0][1] if len(kids) == 1 else own
        nodes.append((depth, f"{kind} {names[joint]}", offset, turn))
        for kid, (vector, turn) in zip(kids, bones):
            if forks:
                nodes.append((depth + 1, f"JOINT {names[kid]}_pivot", np.zeros(3), turn))
            visit(kid, vector, place, world @ turn, depth + 1 + forks)
        if not kids:
            nodes.append((depth + 1, "End Site", offset * 0.3, None))

    def numbers(row):
        return " ".join(f"{value:.6f}" for value in row)

    visit(0, np.zeros(3), joints[:, 0], still, 0)
    text, angles = ["HIERARCHY"], []
    for (depth, head, offset, turn), (following, *_) in zip(nodes, [*nodes[1:], (0,)]):
        text += ["  " * depth + line for line in (head, "{", f"  OFFSET {numbers(offset)}")]
        if turn is not None:
            channels = "CHANNELS 3" if depth else "CHANNELS 6 Xposition Yposition Zposition"
            text.append("  " * depth + f"  {channels} Zrotation Xrotation Yrotation")
            angles.append(_euler(turn))
        text += ["  " * k + "}" for k in range(depth, following - 1, -1)]
    angles = _unwrapped(np.stack(angles, 1)).reshape(len(joints), -1)
    text += ["MOTION", f"Frames: {len(joints)}", f"Frame Time: {1 / skeleton.fps:.8f}",
             *map(numbers, np.concatenate([joints[:, 0], angles], -1))]
    save(path, lambda temporary: Path(temporary).write_text("\n".join(text) + "\n", encoding="ascii"))
    return shown / 100 * skeleton.units_per_metre
