"""Pictures show a person, upright, the right way round; files are whole or absent; BVH travels both ways."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from common import InputError, render
from common.features import KIT, T2M
from results import pictures
from tests import reference

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
MINI = {"mini_humanml3d": T2M, "mini_kit": KIT}
mini = pytest.mark.skipif(not DATA.is_dir(), reason="the mini data sets are not here")
both = pytest.mark.parametrize("skeleton", [T2M, KIT], ids=["t2m", "kit"])


def person(skeleton, frames=12, speed=0.0, turn=0.0):
    """Joints (t j 3) of a stiff body with its arms out a little, facing +Z, moving to +Z at `speed` m/s."""
    bones, index = skeleton.offsets.copy(), skeleton.index
    for side, sign in (("l", 1), ("r", -1)):
        bones[[index[side + "_hip"], index[side + "_shoulder"]]] *= [[sign], [sign]] * np.sign(
            bones[[index[side + "_hip"], index[side + "_shoulder"]], :1] + 1e-9)
        arm = [index[side + "_elbow"], index[side + "_wrist"]]
        bones[arm] = np.array([sign * 0.6, -0.8, 0]) * skeleton.bone_lengths[arm, None]
    pose = np.zeros_like(bones)
    for joint, parent in enumerate(skeleton.parents):
        pose[joint] = bones[joint] + (pose[parent] if parent >= 0 else 0)
    pose[:, 1] -= pose[:, 1].min()
    angle = np.linspace(0, turn, frames)
    spin = np.tile(np.eye(3), (frames, 1, 1))
    spin[:, 0, 0], spin[:, 0, 2], spin[:, 2, 0], spin[:, 2, 2] = (
        np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle))
    path = np.outer(np.arange(frames) / skeleton.fps * speed * skeleton.units_per_metre, [0, 0, 1])
    return np.einsum("tab,jb->tja", spin, pose) + path[:, None]


def gif(path):
    """Frames (n h w 3) uint8 and milliseconds a frame."""
    with Image.open(path) as image:
        frames = []
        for k in range(image.n_frames):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")))
        return np.stack(frames), image.info["duration"]


def where(picture, colour, near=40):
    """Rows and columns of the pixels of a colour, (2 n)."""
    rgb = np.array([int(colour[k:k + 2], 16) for k in (1, 3, 5)])
    return np.stack(np.nonzero(np.abs(picture.astype(int) - rgb).sum(-1) < near))


# ---- GIF ---------------------------------------------------------------------------------------------------

@both
def test_gif_has_every_frame_and_the_right_pace(tmp_path, skeleton):
    panels = [{"joints": person(skeleton, n), "title": title} for n, title in ((12, "before"), (7, "after"))]
    render.render_gif(tmp_path / "a.gif", panels, skeleton, "a person stands")
    frames, pace = gif(tmp_path / "a.gif")
    assert len(frames) == 12 and frames.shape[2] == 600 and pace == {"t2m": 50, "kit": 80}[skeleton.name]
    assert 0.05 < (frames[0] != 255).any(-1).mean() < 0.4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif"]


@both
def test_person_is_upright_on_the_floor_and_not_mirrored(tmp_path, skeleton):
    """Facing the camera, the right (red) limbs are on the viewer's left."""
    render.render_gif(tmp_path / "a.gif", [{"joints": person(skeleton, 2)}], skeleton)
    picture = gif(tmp_path / "a.gif")[0][0]
    red, blue, floor = (where(picture, colour) for colour in (render.RED, render.BLUE, render.FLOOR))
    black = where(picture, render.BLACK)
    assert min(red.shape[1], blue.shape[1]) > 300
    assert red[1].mean() + 20 < blue[1].mean()
    assert black[0].min() < min(red[0].min(), blue[0].min()) - 10           # the head is on top
    assert floor[0].min() < max(red[0].max(), blue[0].max()) < floor[0].max()  # feet are inside the floor
    assert red[0].max() - black[0].min() > 0.6 * 320                         # and the figure fills the panel


def test_projection_keeps_hands():
    """right x up = towards the viewer, as x cross y = z: the camera does not mirror."""
    right, up, toward = render.project(np.eye(3) * 1e-6).T / 1e-6
    assert np.linalg.det(np.stack([right, up, toward])) == pytest.approx(1, abs=1e-4)
    assert render.project(np.array([0, 1.0, 0]))[1] > 0.9                   # Y is up
    near, far = render.project(np.array([[1, 0, 3.0], [1, 0, -3.0]]))
    assert near[2] > far[2]


def test_panels_share_one_camera(tmp_path):
    walk, still = person(T2M, 8, speed=2.0), person(T2M, 8)
    render.render_gif(tmp_path / "a.gif", [{"joints": still}, {"joints": walk}, {"joints": still}], T2M)
    frames = gif(tmp_path / "a.gif")[0]
    first, third = frames[-1][:, :298], frames[-1][:, 600:898]  # the same but for sub-pixel rounding
    assert (np.abs(first.astype(int) - third).sum(-1) > 60).mean() < 0.005
    left, middle = frames[0][:300, :300], frames[0][:300, 300:600]
    assert abs(np.ptp(where(left, render.RED)[0]) - np.ptp(where(middle, render.RED)[0])) <= 1
    moved = where(frames[-1][:, 300:600], render.RED)[1].mean() - where(middle, render.RED)[1].mean()
    assert moved > 20  # +Z is to the viewer's right


def test_camera_follows_a_long_path(tmp_path):
    for name, speed in (("a.gif", 3.0), ("b.gif", 1.0)):  # 4.3 and 1.4 metres
        render.render_gif(tmp_path / name, [{"joints": person(T2M, 30, speed=speed)}], T2M)
    follow, fixed = gif(tmp_path / "a.gif")[0], gif(tmp_path / "b.gif")[0]
    columns = [where(frame, render.RED)[1].mean() for frame in follow[:-9]]  # at the end it lags behind
    assert max(columns) - min(columns) < 60
    assert np.ptp(where(follow[15], render.RED)[0]) > np.ptp(where(fixed[15], render.RED)[0])


def test_sliding_toes_are_orange(tmp_path):
    for speed, orange in ((0.0, False), (0.4, False), (0.7, True)):
        render.render_gif(tmp_path / "a.gif", [{"joints": person(T2M, 6, speed=speed)}], T2M)
        assert (where(gif(tmp_path / "a.gif")[0][2], render.ORANGE).shape[1] > 10) is orange


def test_same_input_same_pixels(tmp_path):
    for name in "ab":
        panels = [{"joints": person(KIT, 5, turn=1.0), "note": "skate 0.10"}]
        render.render_gif(tmp_path / f"{name}.gif", panels, KIT, "A person turns.")
        render.storyboard(tmp_path / f"{name}.png", [("A person turns.", panels)], KIT)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    assert (np.asarray(Image.open(tmp_path / "a.png")) == np.asarray(Image.open(tmp_path / "b.png"))).all()


@pytest.mark.parametrize("caption", [
    "costs $5 or \\frac{ $6", "caf\u00e9 l\u00e4uft", "", "x" * 10000, "walk " * 2000])
def test_captions_cannot_break_a_picture(tmp_path, caption):
    render.render_gif(tmp_path / "a.gif", [{"joints": person(T2M, 2), "note": caption}], T2M, caption)
    assert gif(tmp_path / "a.gif")[0].shape[1] < 480


def test_note_names_ticks_and_numbers():
    note = render.clip_note(0.5, {"wave": True, "steps": False}, 0.125)
    assert note == "reward 0.50 | wave \u2713 steps \u2717 | skate 0.12"
    assert render.clip_note(0.0, {}, 0.0) == "reward 0.00 | skate 0.00"


@pytest.mark.parametrize("joints", [np.zeros((5, 21, 3)), np.zeros((0, 22, 3)), np.full((5, 22, 3), np.nan)])
def test_bad_joints_are_refused(tmp_path, joints):
    with pytest.raises(InputError, match="finite"):
        render.render_gif(tmp_path / "a.gif", [{"joints": joints}], T2M)
    assert not list(tmp_path.iterdir())


# ---- Storyboard and curves ---------------------------------------------------------------------------------

def test_storyboard_has_a_row_per_panel(tmp_path, monkeypatch):
    panels = [{"joints": person(T2M, 9), "title": title} for title in ("before", "after", "data")]
    monkeypatch.setattr(render, "CELL", (100, 120))
    render.storyboard(tmp_path / "one.png", [("a person stands", panels)], T2M)
    monkeypatch.setattr(render, "MOMENTS", 4)
    render.storyboard(tmp_path / "two.png", [("a", panels), ("b", panels[1:])], T2M)
    one, two = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("one.png", "two.png"))
    assert one.shape == (34 + 3 * 120 + 18, 150 + 6 * 100, 3)
    assert two.shape == (2 * 34 + 5 * 120 + 18, 150 + 4 * 100, 3)
    for row in range(3):
        for column in range(6):                                             # a person in every cell
            cell = one[34 + row * 120:34 + (row + 1) * 120, 150 + column * 100:250 + column * 100]
            assert min(where(cell, render.RED).shape[1], where(cell, render.BLUE).shape[1]) > 50


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved, to look at what was plotted."""
    figures, save = [], Figure.savefig

    def record(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def test_curves_of_seeds_are_matched_by_iteration(tmp_path, drawn):
    (tmp_path / "a.csv").write_text("# args 1234\niteration,reward,kl,note\n0,1,0.1,x\n1,2,,y\n2,6,0.3,z\n")
    (tmp_path / "b.csv").write_text("# args 1234\niteration,reward,kl,note\n2,2,0.5,x\n0,3,0.1,x\n")
    logs = [render.read_csv(tmp_path / name) for name in ("a.csv", "b.csv")]
    pictures.seeds(tmp_path / "c.png", logs, ("reward", ("kl", "reward")))
    reward, pair = drawn[0].axes
    assert reward.lines[0].get_xydata().tolist() == [[0, 2], [1, 2], [2, 4]]
    assert pair.lines[0].get_xydata().tolist() == [[0, 0.1], [2, 0.4]]       # nothing was measured at 1
    band = reward.collections[0].get_paths()[0].vertices
    assert {(0, 1), (0, 3), (2, 2), (2, 6)} <= {tuple(corner) for corner in band.tolist()}
    assert Image.open(tmp_path / "c.png").size == (540, 214), "14 for the note"


def test_the_peak_of_a_curve_is_marked_in_all(tmp_path, drawn):
    """Of the mean over runs, where there is a value."""
    logs = [{"iteration": np.arange(4), "reward": np.arange(4.0), "judge": np.array(judge)}
            for judge in ([np.nan, 3, 1, np.nan], [np.nan, 0, 2.5, np.nan])]
    pictures.seeds(tmp_path / "c.png", logs, [("reward",), ("judge",)], peak="judge")
    for axes in drawn[0].axes:
        assert axes.lines[-1].get_xdata() == [2, 2] and axes.lines[-1].get_linestyle() == ":"
    assert drawn[0].texts[-1].get_text().endswith("lowest to highest; dotted: judge is highest")
    render.curves(tmp_path / "c.png", logs[0], [("reward",)], peak="judge")
    assert drawn[1].axes[0].lines[-1].get_xdata() == [1, 1]


def test_curves_leave_out_what_has_no_value_and_name_what_one_run_lacks(tmp_path, drawn):
    log = {"iteration": np.arange(2), "reward": np.arange(2.0), "judge": np.full(2, np.nan)}
    groups = ["reward", "judge", ("kl", "judge"), ("reward", "kl")]
    render.curves(tmp_path / "c.png", log, groups, peak="judge")
    assert [axes.get_title("left") for axes in drawn[0].axes] == ["reward"] * 2
    (tmp_path / "c.png").unlink()
    with pytest.raises(InputError, match="'reward'"):
        pictures.seeds(tmp_path / "c.png", [log, {"iteration": np.arange(2)}], ["reward"])
    (tmp_path / "empty.csv").write_text("iteration,reward\n")
    with pytest.raises(InputError, match="empty.csv"):
        render.curves(tmp_path / "c.png", tmp_path / "empty.csv", [("reward",)])
    assert not (tmp_path / "c.png").exists()


def test_fronts_of_two_policies(tmp_path, drawn):
    """Two prompts with two motions each: the line goes from the best in one reward to the best in the other,
    averaged over the prompts; the dots are the means of each half."""
    first = np.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 3.0], [2.0, 0.0]]])  # p s k
    pictures.fronts(tmp_path / "f.png", {"start": first, "tuned": first + 1.0}, ("text", "quality"), 2)
    [axes] = drawn[0].axes
    front, dots, moved, _ = (line.get_xydata().tolist() for line in axes.lines)
    assert front[0] == [0.0, 2.0] and front[-1] == [1.5, 0.0] and moved[0] == [1.0, 3.0]
    assert [1.0, 1.5] not in front and [0.5, 1.5] in front, "the second prompt changes over first or last"
    assert dots == [[0.0, 2.0], [1.5, 0.0]]
    assert [text.get_text() for text in axes.texts] == ["t", "q"] * 2
    pictures.fronts(tmp_path / "g.png", {"start": np.zeros((2, 4, 3))}, ("a", "b", "c"))
    assert len(drawn[1].axes) == 3 and Image.open(tmp_path / "g.png").size == (870, 290)


# ---- Failures ----------------------------------------------------------------------------------------------

def test_a_failed_drawing_warns_and_leaves_the_old_file(tmp_path, monkeypatch):
    def half(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half a picture")
        raise OSError("no space left")

    panels = [{"joints": person(T2M, 3)}]
    monkeypatch.setattr(Figure, "savefig", half)
    monkeypatch.setattr(Image.Image, "save", half)
    log = {"iteration": np.arange(2), "r": np.arange(2)}
    for draw, name, arguments in ((render.render_gif, "a.gif", (panels, T2M)),
                                  (render.storyboard, "b.png", ([("a", panels)], T2M)),
                                  (render.curves, "c.png", (log, ["r"]))):
        (tmp_path / name).write_bytes(b"old")
        with pytest.warns(RuntimeWarning, match=f"{draw.__name__} failed.*no space left"):
            assert render.safely(draw, tmp_path / name, *arguments) is None
        assert (tmp_path / name).read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "b.png", "c.png"]


def test_safely_returns_the_result_and_lets_an_interrupt_through():
    assert render.safely(lambda a, b: a + b, 1, b=2) == 3
    with pytest.raises(KeyboardInterrupt):
        render.safely(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_pyplot_stays_out(tmp_path):
    code = ("import sys, numpy; from common import render\n"
            "log = dict(iteration=numpy.arange(2), r=numpy.arange(2))\n"
            f"render.curves({str(tmp_path / 'c.png')!r}, log, [('r',)])\n"
            "sys.exit('matplotlib.pyplot' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- BVH and npy -------------------------------------------------------------------------------------------

@both
@pytest.mark.parametrize("turn", [0.0, np.pi, 7.0])
def test_bvh_round_trip(tmp_path, skeleton, turn):
    joints = person(skeleton, 11, speed=1.0, turn=turn)
    elbow, wrist = skeleton.index["r_elbow"], skeleton.index["r_wrist"]
    for parent, joint in ((skeleton.parents[elbow], elbow), (elbow, wrist)):  # from hanging to straight up
        lift = np.linspace(0, np.pi, len(joints))
        joints[:, joint] = joints[:, parent] + skeleton.bone_lengths[joint] * np.stack(
            [np.sin(lift), -np.cos(lift), 0 * lift], -1)
    render.write_bvh(tmp_path / "a.bvh", joints, skeleton)
    back = reference.read_bvh(tmp_path / "a.bvh", skeleton)
    assert back.shape == joints.shape and np.abs(back - joints).max() / skeleton.units_per_metre < 1e-5
    text = (tmp_path / "a.bvh").read_text()
    header, data = text.split("MOTION")
    assert header.count("{") == header.count("}") and header.count("JOINT") + 1 >= skeleton.joints
    columns = 3 * header.count("CHANNELS") + 3
    assert {len(line.split()) for line in data.strip().splitlines()[2:]} == {columns}
    assert f"Frame Time: {1 / skeleton.fps:.8f}" in data


@mini
@pytest.mark.parametrize("folder", MINI)
def test_bvh_round_trip_of_captured_motion(tmp_path, folder):
    skeleton = MINI[folder]
    for file in sorted((DATA / folder / "new_joints").glob("*.npy"))[::40]:
        joints = np.load(file)
        render.write_bvh(tmp_path / "a.bvh", joints, skeleton)
        back = reference.read_bvh(tmp_path / "a.bvh", skeleton)
        assert back.shape == joints.shape and np.abs(back - joints).max() / skeleton.units_per_metre < 1e-3


@mini
@pytest.mark.parametrize("folder", MINI)
def test_captured_motion_makes_a_picture(tmp_path, folder):
    file = sorted((DATA / folder / "new_joints").glob("*.npy"))[1]
    joints = np.load(file)[:20]
    render.render_gif(tmp_path / "a.gif", [{"joints": joints}], MINI[folder])
    frames = gif(tmp_path / "a.gif")[0]
    assert len(frames) == len(joints) and (frames[0] != frames[-1]).any()
    for colour in (render.RED, render.BLUE):
        assert min(where(frame, colour).shape[1] for frame in frames) > 100


def angles_of(path):
    """The rotations in a BVH file, (t n 3) degrees in the order of its channels."""
    rows = path.read_text().partition("Frame Time:")[2].splitlines()[1:]
    return np.array([row.split()[3:] for row in rows], float).reshape(len(rows), -1, 3)


@both
def test_angles_do_not_jump(tmp_path, skeleton):
    """A body that turns twice round and swings an arm over the top: what a program interpolates between two
    frames lies between them."""
    joints = person(skeleton, 41, speed=1.0, turn=4 * np.pi)
    elbow, wrist = skeleton.index["l_elbow"], skeleton.index["l_wrist"]
    for parent, joint in ((skeleton.parents[elbow], elbow), (elbow, wrist)):
        swing = np.linspace(0, 4 * np.pi, len(joints))
        joints[:, joint] = joints[:, parent] + skeleton.bone_lengths[joint] * np.stack(
            [0.1 + 0 * swing, -np.cos(swing), np.sin(swing)], -1) / np.sqrt(1.01)
    render.write_bvh(tmp_path / "a.bvh", joints, skeleton)
    angles = angles_of(tmp_path / "a.bvh")
    assert np.abs(np.diff(angles, axis=0)).max() <= 180
    assert abs(angles[-1, 0, 2] - angles[0, 0, 2]) == pytest.approx(720), "the turns of the root add up"
    whole = reference.read_bvh(tmp_path / "a.bvh", skeleton)
    assert np.abs(whole - joints).max() / skeleton.units_per_metre < 1e-5


def test_unwrapped_angles_are_the_same_rotations():
    def matrices(angles):
        z, x, y = np.moveaxis(np.radians(angles), -1, 0)
        o, i = np.zeros_like(z), np.ones_like(z)
        spin = [np.stack(rows, -1).reshape(*z.shape, 3, 3) for rows in (
            (np.cos(z), -np.sin(z), o, np.sin(z), np.cos(z), o, o, o, i),
            (i, o, o, o, np.cos(x), -np.sin(x), o, np.sin(x), np.cos(x)),
            (np.cos(y), o, np.sin(y), o, i, o, -np.sin(y), o, np.cos(y)))]
        return spin[0] @ spin[1] @ spin[2]

    angles = np.random.default_rng(0).uniform(-180, 180, (50, 4, 3)) * [1, 0.5, 1]
    smooth = render._unwrapped(angles)
    np.testing.assert_allclose(matrices(smooth), matrices(angles), atol=1e-12)
    assert np.abs(np.diff(smooth, axis=0)).max() <= 180 and (smooth[0] == angles[0]).all()
    # Through straight up, x = 90 degrees: one angle goes on, and none turns half round.
    over = np.array([[[0.0, 80, 0]], [[180, 80, 180]], [[180, 60, -180]]])
    assert render._unwrapped(over)[:, 0].tolist() == [[0, 80, 0], [0, 100, 0], [0, 120, 0]]


@both
def test_a_bvh_has_mean_lengths_and_says_which_joints_it_shows(tmp_path, skeleton):
    joints = person(skeleton, 9, speed=1.0, turn=1.0)
    stretched = joints * np.linspace(0.9, 1.1, 9)[:, None, None]
    shown = render.write_bvh(tmp_path / "a.bvh", stretched, skeleton)
    back = reference.read_bvh(tmp_path / "a.bvh", skeleton)
    assert np.abs(back - shown).max() / skeleton.units_per_metre < 1e-5
    for joint, parent in list(enumerate(skeleton.parents))[1:]:
        lengths = np.linalg.norm(stretched[:, joint] - stretched[:, parent], axis=-1)
        rigid = np.linalg.norm(shown[:, joint] - shown[:, parent], axis=-1)
        np.testing.assert_allclose(rigid, lengths.mean())
    assert np.abs(shown - stretched).max() / skeleton.units_per_metre > 0.01


def test_bvh_of_another_rate_and_with_prefixes(tmp_path):
    joints = person(T2M, 31, speed=1.0)
    render.write_bvh(tmp_path / "a.bvh", joints, T2M)
    text = (tmp_path / "a.bvh").read_text().replace("Frame Time: 0.05000000", "Frame Time: 0.03333333")
    text = text.replace("JOINT ", "JOINT mixamorig:")
    (tmp_path / "a.bvh").write_text(text.replace("ROOT ", "ROOT mixamorig:"))
    back = reference.read_bvh(tmp_path / "a.bvh", T2M)
    assert len(back) == 21                                                  # one second at 20 frames
    assert back[-1, 0, 2] == pytest.approx(joints[-1, 0, 2], abs=1e-4)


def test_bvh_channels_apply_in_file_order():
    """Rz Rx sends (0 10 0) to (0 0 10); Rx Rz sends it to (-10 0 0)."""
    header = ("HIERARCHY ROOT a { OFFSET 1 2 3 CHANNELS 6 Zposition Xposition Yposition {} "
              "JOINT b { OFFSET 0 10 0 CHANNELS 1 Xrotation End Site { OFFSET 0 0 5 } } }")
    data = "Frames: 1 Frame Time: 0.1 30 10 20 90 90 0 90"
    for order, expected in (("Zrotation Xrotation Yrotation", [0, 0, 10]),
                            ("Xrotation Zrotation Yrotation", [-10, 0, 0])):
        places, seconds = reference.forward_kinematics(header.replace("{}", order).split(), data.split())
        assert seconds == 0.1 and places["a"][0].tolist() == [10, 20, 30]
        np.testing.assert_allclose(places["b"][0] - places["a"][0], expected, atol=1e-12)
    np.testing.assert_allclose(places["Site"][0] - places["b"][0], [5, 0, 0], atol=1e-12)


@pytest.mark.parametrize("damage, words", [
    (lambda text: text.replace("JOINT LeftHand", "JOINT Paw"), "LeftHand"),
    (lambda text: text[:len(text) // 2], "a.bvh"),
    (lambda text: "", "a.bvh"),
    (lambda text: text.replace("Frame Time: 0.05", "Frame Time: 0.00"), "frame time")])
def test_damaged_bvh_is_named(tmp_path, damage, words):
    render.write_bvh(tmp_path / "a.bvh", person(T2M, 3), T2M)
    (tmp_path / "a.bvh").write_text(damage((tmp_path / "a.bvh").read_text()))
    with pytest.raises(InputError, match=words):
        reference.read_bvh(tmp_path / "a.bvh", T2M)
    with pytest.raises(InputError, match="absent.bvh"):
        reference.read_bvh(tmp_path / "absent.bvh", T2M)


def test_npy_is_plain_float32(tmp_path):
    joints = person(T2M, 3)
    render.write_npy(tmp_path / "new" / "a.npy", joints)
    saved = np.load(tmp_path / "new" / "a.npy")
    assert saved.dtype == np.float32 and np.allclose(saved, joints)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npy"]
