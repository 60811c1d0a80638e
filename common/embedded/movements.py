"""Embedded motion-text data, in two domains and both joint formats.

Everything is generated, nothing is downloaded. A clip is drawn in three steps:

    attributes {"travel": "forward", "wave": "left"}  ->  plan (root path, foot steps, arm angles)  ->  joints
                                                      ->  captions in the wording of the domain (wording.py)

and the oracle (oracle.py) goes back from joints to attributes. The domains "humanml3d" (source) and "kit"
(target) differ in their mix of actions, in wording and in style of movement; each of the three gaps can be
switched off. The feet are planned first and the legs follow, so a standing foot does not slide; positions
come out of forward kinematics, so bones keep their lengths.

Lengths are in leg lengths L (thigh + shank), times in seconds, angles of tables in degrees. Facing +Z, left
is +X; turning left makes the yaw grow. `t` (n) are the times of the frames.
"""

from dataclasses import dataclass

import numpy as np

from common.embedded import wording
from common.embedded.wording import SOURCE, TARGET

VERSION = 6  # part of every seed: raise it when the data change (wording.py counts)
DOMAINS = {"humanml3d": SOURCE, "kit": TARGET}
GAPS = ("actions", "wording", "style")
SIZES = (2400, 2000)                        # clips of the source and the target
SUBJECTS, TRAIN_SUBJECTS, VAL_SUBJECTS = 60, 48, 3
ROWS_FPS = 20.0                             # durations are multiples of 4 frames at this rate
GRAVITY = 9.81 / .83                        # L / s^2 of somebody with legs of .83 m


# ---- 1. What happens in a clip -----------------------------------------------------------------------------

SIDES, HANDS = ("left", "right"), ("left", "right", "both")
# action: (attributes it always has, attributes to choose); a drawn None leaves the attribute out
ACTIONS = {
    "walk": ({"gait": "walk", "travel": "forward"}, {"speed": (None, "slow", "fast")}),
    "walk_back": ({"gait": "walk", "travel": "backward"}, {}),
    "sidestep": ({"gait": "walk"}, {"travel": SIDES}),
    "walk_diagonal": ({"gait": "walk", "travel": "forward"}, {"drift": SIDES}),
    "run": ({"gait": "run", "travel": "forward"}, {}),
    "jog_back": ({"gait": "run", "travel": "backward"}, {}),
    "walk_turn": ({"gait": "walk"}, {"turn": SIDES, "angle": (90, 180)}),
    "turn_in_place": ({"travel": "none"}, {"turn": SIDES, "angle": (90, 180)}),
    "march": ({"march": True, "travel": "none"}, {}),
    "jump": ({"jump": True}, {"count": (1, 2, 3)}),
    "hop": ({}, {"hop": SIDES, "count": (1, 2, 3)}),
    "squat": ({"squat": True}, {"count": (1, 2)}),
    "bow": ({"bow": True}, {"count": (1, 2)}),
    "kick": ({}, {"kick": SIDES, "count": (1, 2)}),
    "stomp": ({}, {"stomp": SIDES, "count": (1, 2, 3)}),
    "raise": ({}, {"raise": HANDS, "count": (1, 2)}),
    "wave": ({}, {"wave": HANDS}),
    "clap": ({"clap": True}, {}),
    "stretch": ({"stretch": True}, {}),
    "punch": ({}, {"punch": SIDES, "count": (1, 2, 3)}),
}
LOCOMOTION = tuple(ACTIONS)[:9]
GESTURES = ("raise", "wave", "clap", "stretch", "punch")        # arms only, with any locomotion
PERIOD = {"jump": .98, "hop": .66, "squat": 1.1, "bow": 1.3, "kick": .9, "stomp": .7, "raise": 1.35,
          "punch": .72}                     # seconds of one repetition
SHARES = {"single": (.45, .35), "pair": (.35, .50), "sequence": (.20, .15)}      # in (source, target)
# Weights in (source, target). The target's own actions stay in the source, at one to four clips in a hundred:
# a base model never samples what it has never seen, and RL can only strengthen what is sampled.
WEIGHTS = {
    "walk": (9, 7), "walk_back": (7, 5), "sidestep": (7, 2), "walk_diagonal": (2, 6), "run": (7, 5),
    "jog_back": (2, 5), "walk_turn": (9, 7), "turn_in_place": (8, 6), "march": (5, 3), "jump": (8, 4),
    "hop": (2, 5), "squat": (7, 4), "bow": (2, 6), "kick": (8, 5), "stomp": (2, 5), "raise": (10, 8),
    "wave": (10, 9), "clap": (7, 2), "stretch": (5, 2), "punch": (3, 8)}
BORROWED = .012     # share of source captions in the target's words, so that no target word is one never read
VAGUE = .5          # share of the captions after the first that leave out a detail
# Combinations that only the test split may contain.
UNSEEN = ({"kick": "left", "count": 2}, {"turn": "right", "wave": "both"}, {"jump": True, "count": 3},
          {"travel": "backward", "raise": "left"}, {"gait": "run", "clap": True})


def _draw(rng, names, mix, max_count=3):
    """An action of `names` and its attributes; a max_count of 0 leaves the count out."""
    weights = np.array([WEIGHTS[name][mix] for name in names], float)
    action = names[rng.choice(len(names), p=weights / weights.sum())]
    fixed, choices = ACTIONS[action]
    drawn = {key: values[rng.integers(len(values))] for key, values in choices.items()}
    if "count" in drawn:
        drawn["count"] = min(drawn["count"], max_count) or None
    return action, {key: value for key, value in {**fixed, **drawn}.items() if value is not None}


def _draw_parts(rng, mix):
    """One or two parts of a clip. A part is a list of movements (action, attributes): that of the legs and,
    in a pair, the gesture of the arms on top of it."""
    kind = tuple(SHARES)[rng.choice(3, p=[shares[mix] for shares in SHARES.values()])]
    if kind == "pair":
        return [[_draw(rng, LOCOMOTION, mix), _draw(rng, GESTURES, mix, 0)]]
    if kind == "single":
        return [[_draw(rng, tuple(ACTIONS), mix)]]
    # two parts share four seconds: few repetitions, quarter turns, nothing slow; and two different movements
    short = tuple(action for action in ACTIONS if action not in ("walk_turn", "march"))
    parts = []
    for _ in range(2):
        left = tuple(action for action in short if not parts or action != parts[0][0][0])
        action, attributes = _draw(rng, left, mix)
        if "count" in attributes:
            attributes["count"] = min(attributes["count"], 2 if PERIOD[action] < .8 else 1)
        if "angle" in attributes:
            attributes["angle"] = 90
        parts.append([(action, attributes)])
    return parts


def _merged(part):
    return {key: value for _, attributes in part for key, value in attributes.items()}


def _asked(parts):
    return _merged(parts[0]) if len(parts) == 1 else {"first": _merged(parts[0]), "then": _merged(parts[1])}


def _is_unseen(parts):
    return any(rule.items() <= _merged(part).items() for part in parts for rule in UNSEEN)


# ---- 2. When it happens ------------------------------------------------------------------------------------

@dataclass
class Style:
    """How somebody moves: constants of the subject and the style of the domain."""
    tempo: float
    amplitude: float
    lean: float
    stance: float           # half distance of the feet, L
    sway: float
    arms_out: float         # degrees
    pause: float            # seconds of standing at both ends


def _style(seed, domain, subject, mix):
    rng = np.random.default_rng([VERSION, seed, domain, 10 ** 6 + subject])
    tempo, amplitude = 1 + .04 * np.clip(rng.standard_normal(2), -1.8, 1.8)
    lean, sway = rng.normal(.03, .015), rng.uniform(.010, .025)
    stance = np.clip(rng.normal(.105, .008), .085, .125)
    if mix == TARGET:
        return Style(.975 * tempo, amplitude, lean, stance + .01, .7 * sway, 2.0, .12)
    return Style(tempo, amplitude, lean, stance, sway, 0.0, .1)


def _seconds(rng, part, style, short):
    action, attributes = part[0]
    if action in PERIOD:
        return attributes.get("count", 1) * PERIOD[action] / style.tempo + .1
    if action in ("walk_turn", "turn_in_place"):
        seconds = (1.5 if attributes["angle"] == 90 else 2.1) + (.75 if action == "walk_turn" else 0)
        return seconds + (0 if short else rng.uniform(0, .5))
    if short:
        return 1.75 if action in ("wave", "clap") else 1.6
    return rng.uniform(2.0, 3.3)


def _schedule(rng, parts, style):
    """Frames of the clip at 20 fps (4k) and [(start, end, part)]. A single part fills its clip; between two
    there is a moment of standing."""
    short = len(parts) > 1
    seconds = [_seconds(rng, part, style, short) for part in parts]
    rest = 2 * style.pause + (.15 if short else 0)
    frames = int(np.clip(4 * np.ceil((sum(seconds) + rest) * ROWS_FPS / 4), 64 if short else 40, 80))
    spare = frames / ROWS_FPS - sum(seconds) - rest
    if spare < 0 or not short:                  # a single part takes the rest; slow sequences hurry
        seconds = [s + spare / len(parts) for s in seconds]
    start, timed = style.pause, []
    for part, s in zip(parts, seconds):
        timed.append((start, start + s, part))
        start += s + .15
    return frames, timed


# ---- 3. How the body does it -------------------------------------------------------------------------------

SPEED = {"slow": .8, None: 1.35, "fast": 1.9, "run": 2.9, "jog_back": 2.6, "sidestep": .9, "walk_turn": 1.28,
         "walk_back": 1.15}                         # L / s
ARMS = {    # upper arm: elevation from hanging, azimuth from ahead to outwards; then the same of the forearm
    "rest": (8, 75, 16, 25), "run": (12, 40, 85, -15), "balance": (60, 15, 75, 0), "clap": (48, 20, 82, 0),
    "raise": (158, 55, 167, 45), "wave": (82, 78, 155, 85), "stretch": (88, 86, 90, 86),
    "guard": (5, 70, 115, -15), "punch": (86, 4, 88, -6)}
TRUNK = {   # bone: direction in the body (left, up, ahead) and its share of the trunk's bend
    "t2m": {1: (.55, -.83, 0, .1), 2: (-.55, -.83, 0, .1), 3: (0, 1, .05, .5), 6: (0, 1, -.1, .8),
            9: (0, 1, 0, 1), 12: (0, 1, .08, 1), 13: (.55, .83, -.1, 1), 14: (-.55, .83, -.1, 1),
            15: (0, .93, .36, .8), 16: (.96, .2, -.15, 1), 17: (-.96, .2, -.15, 1)},
    "kit": {1: (0, 1, .04, .5), 2: (0, 1, .04, .9), 3: (0, 1, .06, 1), 4: (0, .95, .3, .8),
            5: (-.97, -.15, -.1, 1), 8: (.97, -.15, -.1, 1), 11: (-.96, -.28, 0, .1), 16: (.96, -.28, 0, .1)}}
ANKLE = {"t2m": .09, "kit": .04}                            # height of a standing ankle, L
TOE_DOWN = {"t2m": (.50,), "kit": (.10, .75)}  # pitch of the toe bone (and the foot bone), radians


def _smoothstep(u):
    u = np.clip(u, 0, 1)
    return u * u * u * (10 + u * (6 * u - 15))


def _window(t, start, end, ramp=.3):
    """1 between start and end, with smooth ramps inside."""
    return _smoothstep((t - start) / ramp) * _smoothstep((end - t) / ramp)


def _bumps(t, start, period, count):
    """`count` bumps of height 1, one a period."""
    u = (t - start) / period
    return np.where((u > 0) & (u < count), np.sin(np.pi * u) ** 2, 0.0)


def _flight(time, height):
    """Crouch, push, flight, landing: offset of the pelvis, height of the feet; 0 is the top."""
    time = np.abs(time)                         # the landing mirrors the take-off
    half, push, crouch = np.sqrt(2 * height / GRAVITY), .14, .17
    take_off = GRAVITY * half * push            # the push is a cubic that ends at the take-off speed
    u = np.clip((half + push - time) / push, 0, 1)
    pushing = -crouch + (3 * crouch - take_off) * u ** 2 + (take_off - 2 * crouch) * u ** 3
    bending = -crouch * (1 - _smoothstep((time - half - push) / .22))
    drop = np.where(time < half, 0, np.where(time < half + push, pushing, bending))
    return drop, np.maximum(0, height - .5 * GRAVITY * time ** 2)


class _Body:
    """The plan of everything but the arms: root, feet and bends at the times t; filled part by part."""

    def __init__(self, rng, timed, style, t):
        self.rng, self.style, self.t = rng, style, t
        self.fine = np.arange(0, t[-1] + .02, .01)      # the root path is integrated on a finer grid
        self.ahead, self.aside, self.turned = np.zeros((3, len(self.fine)))     # velocities of the body; yaw
        self.drop, self.air, self.pitch, self.shift, self.back, self.running = np.zeros((6, len(t)))
        self.foot_up, self.foot_ahead = np.zeros((2, 2, len(t)))                # left, right
        self.steps = []         # (start, end, foot, time whose root position the foot aims at, lift)
        for start, end, part in timed:
            action, attributes = part[0]
            if action in LOCOMOTION:
                self.locomotion(action, attributes, start, end)
            elif action not in GESTURES:
                self.repetitions(action, attributes, start, end)
        self.integrate()

    def locomotion(self, action, attributes, start, end):
        """Velocity of the root, turning, and alternating steps."""
        tempo, run = self.style.tempo, attributes.get("gait") == "run"
        moves = attributes.get("travel") != "none"
        pace = tempo * SPEED.get(action, SPEED[attributes.get("speed")]) if moves else 0.0
        side = next((attributes[k] for k in ("turn", "drift", "travel") if attributes.get(k) in SIDES), None)
        sign = -1 if side == "right" else 1
        ahead, aside = {"walk_diagonal": (.84, .54 * sign), "sidestep": (0, sign)}.get(action, (1, 0))
        way = -1 if attributes.get("travel") == "backward" else 1
        window = pace * _window(self.fine, start, end)
        self.ahead += way * ahead * window
        self.aside += aside * window
        if "turn" in attributes:
            margin = .18 * (end - start)
            u = (self.fine - start - margin) / (end - start - 2 * margin)
            self.turned += sign * np.deg2rad(attributes["angle"]) * _smoothstep(u)
        cadence = 2.9 * tempo if run else 1.05 * tempo + .65 * pace if moves else 2.0 * tempo
        lift = .26 if run else .40 if action == "march" else .09
        count = max(3, round(cadence * (end - start - .1)))
        times = np.linspace(start + .05, end - .05, count + 1)
        step = times[1] - times[0]
        overlap = (.5 if run else .06) * step               # swings of a run overlap: that is its flight
        foot = int(self.rng.integers(2)) if side is None else int(side == "right")
        for k in range(count):
            # a foot aims at where the root is in the middle of its stance; the last two steps close the feet
            aim = times[k + 1] + .5 * step if k < count - 2 else end
            swing = times[k] - overlap * (k > 0), times[k + 1] + overlap * (k < count - 1)
            self.steps.append((*swing, (foot + k) % 2, aim, lift))
        hold = _window(self.t, start, end)
        self.pitch += np.deg2rad(11 if run else 4) * way * hold * moves
        self.drop -= .05 * run * hold
        self.running += run * hold

    def repetitions(self, action, attributes, start, end):
        """Movements on the spot that are counted; they sit in the middle of their part."""
        t, size = self.t, self.style.amplitude
        count, period = attributes.get("count", 1), PERIOD[action] / self.style.tempo
        begin = start + max(0, (end - start - count * period) / 2)
        bumps, hold = _bumps(t, begin, period, count), _window(t, start, end, .2)
        foot = int(attributes.get(action) == "right")
        sign = (1, -1)[foot]
        if action == "squat":
            self.drop -= .46 * size * bumps
            self.pitch += np.deg2rad(28) * bumps
            self.back += .10 * bumps
        elif action == "bow":
            self.pitch += np.deg2rad(self.rng.uniform(62, 80)) * bumps ** .7
            self.back += .13 * bumps ** .7
        elif action == "kick":
            self.foot_up[foot] += .50 * size * bumps
            self.foot_ahead[foot] += .70 * bumps ** 1.5
            self.shift -= sign * .08 * hold                 # the weight goes over the standing foot
            self.pitch -= np.deg2rad(9) * bumps
        elif action == "stomp":
            self.foot_up[foot] += .36 * size * bumps
            self.foot_ahead[foot] += .12 * bumps
            self.shift -= sign * .06 * hold
        else:                                               # jump; hop: `foot` is the one that jumps
            height, depth = (.30 * size, 1) if action == "jump" else (.15, .6)
            for k in range(count):
                drop, air = _flight(t - begin - (k + .5) * period, height)
                self.drop, self.air = self.drop + depth * drop, self.air + air
            if action == "jump":
                self.pitch += np.deg2rad(18) * hold
            else:
                self.foot_up[1 - foot] += .30 * hold
                self.foot_ahead[1 - foot] -= .12 * hold
                self.shift += sign * .09 * hold

    def integrate(self):
        """Root path x, z, yaw (n); feet (foot n 4): x, height over the ground, z and yaw of both ankles."""
        sin, cos = np.sin(self.turned), np.cos(self.turned)
        velocity = np.stack([self.ahead * sin + self.aside * cos, self.ahead * cos - self.aside * sin])
        path = np.cumsum((velocity[:, 1:] + velocity[:, :-1]) / 2, axis=1) * (self.fine[1] - self.fine[0])
        path = np.concatenate([np.zeros((2, 1)), path], axis=1)

        def root(time):
            return (np.interp(time, self.fine, row) for row in (*path, self.turned))

        self.x, self.z, self.yaw = root(self.t)
        self.feet, place = np.zeros((2, len(self.t), 4)), np.zeros((2, 4))
        for foot, wide in enumerate((self.style.stance, -self.style.stance)):
            place[foot, 0] = wide
            self.feet[foot] = place[foot]
            self.feet[foot, :, 1] += self.foot_up[foot]
            self.feet[foot, :, 0] += self.foot_ahead[foot] * np.sin(self.yaw)
            self.feet[foot, :, 2] += self.foot_ahead[foot] * np.cos(self.yaw)
        for start, end, foot, aim, lift in self.steps:
            x, z, yaw = root(aim)
            wide = (1, -1)[foot] * self.style.stance
            target = np.array([x + wide * np.cos(yaw), 0, z - wide * np.sin(yaw), yaw])
            u = np.clip((self.t - start) / (end - start), 0, 1)
            self.feet[foot] += _smoothstep(u)[:, None] * (target - place[foot])
            self.feet[foot, :, 1] += lift * np.sin(np.pi * u) ** 2
            place[foot] = target


def _arm_angles(timed, style, body, half_width, upper, fore):
    """Angles of both arms in degrees (arm n 4), and how much they still swing along with the steps (arm n).

    half_width, upper, fore: of the shoulders and the arm bones, L, for hands that have to meet.
    """
    t = body.t
    rest = np.array(ARMS["rest"], float) + [style.arms_out, 0, style.arms_out, 0]
    angles = np.tile(rest, (2, len(t), 1))
    free = np.ones((2, len(t)))

    def blend(arms, weight, target):
        for arm in arms:
            angles[arm] += weight[:, None] * (np.broadcast_to(target, (len(t), 4)) - angles[arm])
            free[arm] *= 1 - weight

    blend((0, 1), body.running, ARMS["run"])
    free[:] = np.maximum(free, body.running)                # the bent arms of a run swing as well
    for start, end, part in timed:
        action, attributes = part[-1]
        if action == "squat":
            blend((0, 1), .8 * np.clip(-body.drop / .4, 0, 1), ARMS["balance"])
        if action == "jump":
            blend((0, 1), .5 * np.clip(body.air / .3, 0, 1), ARMS["balance"])
        if action not in GESTURES:
            continue
        side, count, length = attributes.get(action), attributes.get("count", 1), end - start
        arms = [arm for arm, name in enumerate(SIDES) if side in (name, "both", True)]
        weight, target = _window(t, start, end, .38 if length > 1.8 else .28), np.array(ARMS[action], float)
        if action == "raise":
            each = length / count
            begins = [start + k * each for k in range(count)]
            weight = sum(_window(t, begin, begin + each, .45 / style.tempo) for begin in begins)
        elif action == "wave":
            swing = 34 * style.amplitude * np.sin(2 * np.pi * 1.8 * style.tempo * (t - start))
            target = target + swing[:, None] * [0, 0, 1, 0]
        elif action == "clap":
            # the azimuth of the forearms at which the hands meet, and 45 degrees out from there
            a, b, c, _ = np.deg2rad(target)
            meet = np.clip((.05 - half_width - upper * np.sin(a) * np.sin(b)) / (fore * np.sin(c)), -1, 1)
            opened = .5 + .5 * np.cos(2 * np.pi * 1.5 * style.tempo * (t - start))
            target = target + opened[:, None] * [0, 12, 0, 45] + [0, 0, 0, np.rad2deg(np.arcsin(meet))]
        elif action == "punch":
            period = PERIOD["punch"] / style.tempo
            begin = start + max(0, (length - count * period) / 2)
            weight = _window(t, min(start, begin - .05), max(end, begin + count * period + .05), .25)
            target = ARMS["guard"] + _bumps(t, begin, period, count)[:, None] ** .7 * (target - ARMS["guard"])
        blend(arms, weight, target)
    return angles, free


def _unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _frames(yaw, pitch, roll):
    """Rotations (n 3 3) of a body turned by yaw, bent forward by pitch and to its right by roll, radians."""
    cy, sy, cp, sp, cr, sr = (f(angle) for angle in (yaw, pitch, roll) for f in (np.cos, np.sin))
    o, i = np.zeros_like(cy), np.ones_like(cy)
    turn, bend, lean = (np.stack(rows, -1).reshape(-1, 3, 3) for rows in (
        (cy, o, sy, o, i, o, -sy, o, cy), (i, o, o, o, cp, -sp, o, sp, cp), (cr, -sr, o, sr, cr, o, o, o, i)))
    return turn @ bend @ lean


def _pelvis_height(body, hips, ground):
    """Standing height plus the planned drop, but never out of a foot's reach: a stretched leg would pull its
    foot off the ground."""
    height = .968 - hips[0][:, 1] + body.drop
    for foot, hip in zip(body.feet, hips):
        flat = ((ground + hip[:, [0, 2]] - foot[:, [0, 2]]) ** 2).sum(-1)
        height = np.minimum(height, foot[:, 1] + np.sqrt(np.maximum(.992 ** 2 - flat, .3)) - hip[:, 1])
    n, reach = len(height), max(1, round(.08 * (len(height) - 1) / body.t[-1]))
    shifts = range(2 * reach + 1)               # moving minimum, then mean, of +-.08 s
    padded = np.pad(height, 2 * reach, mode="edge")
    lowest = np.min([padded[k:k + n + 2 * reach] for k in shifts], axis=0)
    return np.mean([lowest[k:k + n] for k in shifts], axis=0)


def _joints(rng, timed, style, skeleton, t):
    """Joint positions (t j 3) of the schedule, in the skeleton's units."""
    index, lengths, trunk = skeleton.index, skeleton.bone_lengths / skeleton.leg, TRUNK[skeleton.name]
    body = _Body(rng, timed, style, t)
    joint, half_width = index["l_shoulder"], 0.0
    while trunk[joint][0] > 0:
        half_width, joint = half_width + lengths[joint] * trunk[joint][0], skeleton.parents[joint]
    arm_bones = lengths[index["l_elbow"]], lengths[index["l_wrist"]]
    angles, free = _arm_angles(timed, style, body, half_width, *arm_bones)
    # A constant tilt of every bone and a slow drift: they make bodies differ, and few bones point exactly
    # against their rest direction, where rotations jump.
    tilt, drift = rng.normal(0, .02, (22, 3)), rng.normal(0, .012, (22, 3))
    phase = rng.uniform(0, 2 * np.pi, (2, 22, 3))
    wobble = tilt + drift * np.sin(phase[0] + (1.5 + phase[1] / 4) * t[:, None, None])
    bones = wobble[:, :len(lengths)].copy()                 # n j 3, directions
    yaw, pitch, roll = body.yaw, body.pitch + style.lean, style.sway * np.sin(1.3 * t + phase[0, 0, 0])
    for j, (*direction, share) in trunk.items():
        bones[:, j] += _frames(yaw, share * pitch, share * roll) @ np.array(direction)
    zero = 0 * yaw
    left = np.stack([np.cos(yaw), zero, -np.sin(yaw)], -1)
    ahead = np.stack([np.sin(yaw), zero, np.cos(yaw)], -1)
    # with the right foot ahead the left arm swings ahead; in a deep bow the arms hang
    stride = ((body.feet[1] - body.feet[0])[:, [0, 2]] * ahead[:, [0, 2]]).sum(-1)
    frame = _frames(yaw, .4 * pitch, roll)
    for arm, (name, out) in enumerate((("l", 1), ("r", -1))):
        swing = .55 * style.amplitude * out * stride * free[arm]
        for bone, part in (("elbow", angles[arm, :, :2]), ("wrist", angles[arm, :, 2:])):
            elevation, azimuth = np.deg2rad(part).T
            flat = np.sin(elevation)
            across, up, along = out * flat * np.sin(azimuth), -np.cos(elevation), flat * np.cos(azimuth)
            direction = np.stack([across, up, along + swing], -1)
            if bone == "wrist":
                direction += swing[:, None] * np.stack([zero, .6 * body.running, zero + .2], -1)
            bones[:, index[f"{name}_{bone}"]] += np.einsum("nij,nj->ni", frame, direction)
    bones[:, 1:] = _unit(bones[:, 1:])
    hips = [lengths[j] * bones[:, j] for j in (index["l_hip"], index["r_hip"])]         # from the root
    offset = body.shift[:, None] * left - body.back[:, None] * ahead
    ground = np.stack([body.x, body.z], -1) + offset[:, [0, 2]]
    lift = ANKLE[skeleton.name] + body.air
    root = np.stack([ground[:, 0], _pelvis_height(body, hips, ground) + lift, ground[:, 1]], -1)
    thigh, shank = lengths[index["l_knee"]], lengths[index["l_ankle"]]
    for name, out, foot, hip in zip("lr", (1, -1), body.feet, hips):
        # two bones: the knee lies in the plane of the leg and a pole that points ahead and a little outwards
        line = foot[:, :3] + np.stack([zero, lift, zero], -1) - root - hip
        distance = np.minimum(np.linalg.norm(line, axis=-1, keepdims=True), .9995 * (thigh + shank))
        line, pole = _unit(line), ahead + .12 * out * left + [0, .25, 0]
        pole = _unit(pole - (pole * line).sum(-1, keepdims=True) * line)
        along = (thigh ** 2 - shank ** 2 + distance ** 2) / (2 * distance)
        knee = along * line + np.sqrt(np.maximum(thigh ** 2 - along ** 2, 0)) * pole
        bones[:, index[f"{name}_knee"]] = _unit(knee)
        bones[:, index[f"{name}_ankle"]] = _unit(distance * line - knee)
        turn = foot[:, 3] + .12 * out + tilt[0, 0]
        hang = np.arcsin(np.clip(1.2 * (foot[:, 1] + body.air), 0, .6))     # the toes of a lifted foot
        for k, base in enumerate(TOE_DOWN[skeleton.name]):
            flat, down = np.cos(base + hang), -np.sin(base + hang)
            toe = np.stack([np.sin(turn) * flat, down, np.cos(turn) * flat], -1)
            bones[:, index[f"{name}_toe"] - k] = toe
    joints = np.zeros_like(bones)
    joints[:, 0] = root
    for j in range(1, len(lengths)):
        joints[:, j] = joints[:, skeleton.parents[j]] + lengths[j] * bones[:, j]
    joints[..., 1] -= joints[..., 1].min()
    return (joints * skeleton.leg).astype(np.float32)


# ---- 4. The data set ---------------------------------------------------------------------------------------

@dataclass
class SyntheticClip:
    """joints (t j 3) in the skeleton's units, t = 4k + 1; captions, tokens ('lemma/POS') and attributes run
    in parallel, and the first caption names every attribute. tags: "unseen_wording", "unseen_combination"
    (test split only)."""
    name: str
    joints: np.ndarray
    captions: list
    tokens: list
    attributes: list
    subject: str
    split: str
    tags: tuple
    actions: tuple


def make_clip(domain, index, skeleton, *, seed=0, gaps=GAPS):
    """Clip number `index` of a domain (see build): the same bytes whatever else is made, in any order."""
    number = DOMAINS[domain]
    mix, dialect, manner = (number if gap in gaps else SOURCE for gap in GAPS)
    rng = np.random.default_rng([VERSION, seed, number, index])
    subject = index % SUBJECTS
    split = ("train", "val", "test")[(subject >= TRAIN_SUBJECTS) + (subject >= TRAIN_SUBJECTS + VAL_SUBJECTS)]
    parts = _draw_parts(rng, mix)
    while split != "test" and _is_unseen(parts):
        parts = _draw_parts(rng, mix)
    reserved = split == "test" and rng.random() < .2
    told, wanted = [], int(rng.integers(2, 5))              # (caption, tokens, attributes)
    for attempt in range(12):                               # fewer where there are no more ways to say it
        said = (wording.vague(rng, parts) if attempt and rng.random() < VAGUE else None) or parts
        borrowed = number == SOURCE and rng.random() < BORROWED
        caption, tokens = wording.caption(rng, said, TARGET if borrowed else dialect, reserved)
        if len(told) < wanted and caption not in [text for text, _, _ in told]:
            told.append((caption, tokens, _asked(said)))
    style = _style(seed, number, subject, manner)
    frames, timed = _schedule(rng, parts, style)
    if skeleton.fps != ROWS_FPS:
        frames = 4 * round(frames / ROWS_FPS * skeleton.fps / 4)
    joints = _joints(rng, timed, style, skeleton, np.arange(frames + 1) / skeleton.fps)
    captions, tokens, attributes = (list(column) for column in zip(*told))
    tags = ("unseen_wording",) * reserved + ("unseen_combination",) * _is_unseen(parts)
    return SyntheticClip(f"{domain}-{index:05d}", joints, captions, tokens, attributes,
                         f"{domain}-{subject:02d}", split, tags, tuple(a for part in parts for a, _ in part))


def build(domain, skeleton, *, seed=0, clips=None, gaps=GAPS):
    """The embedded data of a domain: list of SyntheticClip.

    domain      "humanml3d" (source) or "kit" (target), in either skeleton: T2M at 20 fps or KIT at 12.5 fps
    clips       how many are drawn (default 2400 source, 2000 target)
    gaps        what stays different in the target: "actions" (their mix), "wording", "style" (slower, wider,
                arms held out)
    Raises ValueError for a name it does not know.
    """
    unknown = ({domain} - set(DOMAINS)) | (set(gaps) - set(GAPS))
    if unknown:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; there are the domains {', '.join(DOMAINS)} "
                         f"and the gaps {', '.join(GAPS)}")
    count = SIZES[DOMAINS[domain]] if clips is None else clips
    return [make_clip(domain, index, skeleton, seed=seed, gaps=gaps) for index in range(count)]
