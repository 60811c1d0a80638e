"""The oracle: which of the attributes that a caption asks for a motion has, judged from joints alone.

It is never a reward and never used to select a model; that is why a rising reward with a falling oracle shows a reward that is being
gamed. Attributes are plain values, e.g. {"gait": "walk", "travel": "forward", "turn": "left", "angle": 90} or, for a sequence,
{"first": {"kick": "left", "count": 2}, "then": {"bow": True}}; "any" stands for a side that was left open:

    travel    forward backward left right none      gait   walk run          speed  slow fast        drift  left right (of a diagonal)
    turn      left right any                        angle  90 180 (degrees)  count  1 2 3, of the one countable action beside it
    raise wave             left right both any      (hands)
    punch kick stomp hop   left right any           march jump squat bow clap stretch   True

Thresholds are in leg lengths L (thigh + shank), seconds and degrees, so that one rule serves both skeletons and any body.
"""

import re

import numpy as np

COUNTED = ("jump", "hop", "squat", "bow", "kick", "stomp", "raise", "punch")


# ---- 1. Signals -------------------------------------------------------------------------------------------------------

def _turning_points(x, swing):
    """Maxima and minima of x that stand out by `swing` on both sides: [(index, is_maximum)], in order."""
    found, low, high, rising = [], 0, 0, None
    for i, value in enumerate(x):
        low, high = (i if value < x[low] else low), (i if value > x[high] else high)
        if rising is not False and value < x[high] - swing:
            if rising or x[high] - x[0] > swing:
                found.append((high, True))
            rising, low = False, i
        elif rising is not True and value > x[low] + swing:
            if rising is False or x[0] - x[low] > swing:
                found.append((low, False))
            rising, high = True, i
    return found


def _maxima(x, swing):
    return [i for i, top in _turning_points(x, swing) if top]


def _stretches(flags):
    """[(start, end)] of the runs of True."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.asarray(flags, int), 0]))
    return list(zip(edges[::2], edges[1::2]))


def _mean(x, frames):
    """Centred moving mean over about `frames` frames of (t ...)."""
    reach = int(max(0, round((frames - 1) / 2)))
    reach = min(reach, (len(x) - 1) // 2)
    if reach == 0:
        return x
    padded = np.concatenate([x[:1].repeat(reach + 1, 0), x, x[-1:].repeat(reach, 0)])
    total = padded.cumsum(0)
    return (total[2 * reach + 1:] - total[:-2 * reach - 1]) / (2 * reach + 1)


class _Seen:
    """What is measured on a clip: joints (t j 3) in leg lengths, lightly smoothed, at `fps`."""

    def __init__(self, joints, skeleton, fps):
        index = skeleton.index
        self.fps, self.arm = fps, (skeleton.bone_lengths[index["l_elbow"]] + skeleton.bone_lengths[index["l_wrist"]]) / skeleton.leg
        part = {name: joints[:, j] for name, j in index.items()}
        across = part["l_hip"] - part["r_hip"] + part["l_shoulder"] - part["r_shoulder"]
        self.heading = _mean(np.unwrap(np.arctan2(-across[:, 2], across[:, 0])), .4 * fps)
        sin, cos = np.sin(self.heading), np.cos(self.heading)
        self.ahead, self.left = np.stack([sin, 0 * sin, cos], 1), np.stack([cos, 0 * cos, -sin], 1)
        self.root, self.neck = part["root"], part["neck"]
        self.ankle, self.toe, self.shoulder, self.elbow, self.wrist = (
            np.stack([part[f"l_{name}"], part[f"r_{name}"]]) for name in ("ankle", "toe", "shoulder", "elbow", "wrist"))    # 2 t 3
        self.floor = np.quantile(self.toe[..., 1].min(0), .05)
        self.lift = self.ankle[..., 1] - np.quantile(self.ankle[..., 1], .1, axis=1, keepdims=True)                         # 2 t
        path = _mean(self.root[:, [0, 2]], .3 * fps)
        self.path, step = path, np.diff(path, axis=0)
        self.moved = np.array([(step * side[:-1, [0, 2]]).sum() for side in (self.ahead, self.left)])
        self.speed = np.linalg.norm(step, axis=1) * fps
        self.excursion = np.linalg.norm(path - path[0], axis=1).max()
        ends = max(1, round(.3 * fps))
        self.rotation = np.rad2deg(self.heading[-ends:].mean() - self.heading[:ends].mean())

    def travel(self):
        if self.excursion < .5:
            return "none"
        forward, left = self.moved
        if abs(forward) >= abs(left):
            return "forward" if forward > 0 else "backward"
        return "left" if left > 0 else "right"

    def steps(self):
        """How often the feet pass each other (or open and close), in the direction of travel."""
        side = self.left if self.travel() in ("left", "right") else self.ahead
        return len(_turning_points(((self.ankle[0] - self.ankle[1]) * side).sum(-1), .15))

    def runs(self):
        flight = ((self.lift > .06) & (self.toe[..., 1] > self.floor + .06)).all(0).mean()
        pace = np.quantile(self.speed, .9)
        return self.steps() >= 2 and (pace > 2.1 or (pace > 1.6 and flight > .12))

    def drift(self):
        way = self.path[-1] - self.path[0]
        angle = np.rad2deg(np.arctan2(way @ self.left[0, [0, 2]], way @ self.ahead[0, [0, 2]]))
        return "left" if angle > 10 else "right" if angle < -10 else "none"

    def raised(self):
        high = self.wrist[..., 1] - self.shoulder[..., 1] > (-.15 if self.excursion < .5 else .15)
        return [arm for arm in (0, 1) if high[arm].sum() > .25 * self.fps]

    def waves(self):
        """Arms whose hand goes to and fro beside or above the head."""
        found, cut = [], round(.1 * self.fps)
        for arm in (0, 1):
            wrist, elbow, shoulder = self.wrist[arm], self.elbow[arm], self.shoulder[arm]
            for start, end in _stretches((wrist[:, 1] > elbow[:, 1]) & (wrist[:, 1] > shoulder[:, 1] - .30)):
                inside = slice(start + cut, end - cut)
                swings = [len(_turning_points(((wrist - elbow) * side).sum(-1)[inside], .09)) for side in (self.left, self.ahead)]
                if end - start > 2 * cut + 2 and max(swings) >= (2 if end - start < self.fps else 3):
                    found.append(arm)
                    break
        return found

    def punches(self):
        """Frames of the punches of both arms: the hand shoots forward at the height of the chest."""
        reach = (((self.wrist - self.shoulder) * self.ahead).sum(-1)) / self.arm
        level = np.abs(self.wrist[..., 1] - self.shoulder[..., 1]) < .35
        return [[i for i in _maxima(reach[arm], .35) if reach[arm, i] > .75 and level[arm, i]] for arm in (0, 1)]

    def claps(self):
        gap = np.linalg.norm(self.wrist[0] - self.wrist[1], axis=-1)
        above = (self.wrist[..., 1] > self.root[:, 1]).all(0)
        return [i for i, top in _turning_points(gap, .10) if not top and gap[i] < .25 and above[i]]

    def stretches(self):
        level = (np.abs(self.wrist[..., 1] - self.shoulder[..., 1]) < .25).all(0)
        span = ((self.wrist[0] - self.wrist[1]) * self.left).sum(-1) > 2.0 * self.arm
        return (level & span).sum() > .3 * self.fps

    def kicks(self):
        """Frames at which a foot is highest, far up and ahead while the other one stands."""
        forward = ((self.ankle - self.root) * self.ahead).sum(-1)
        return [[i for i in _maxima(self.lift[f], .2) if self.lift[f, i] > .25 and forward[f, i] > .28 and self.lift[1 - f, i] < .10]
                for f in (0, 1)]

    def stomps(self):
        forward = ((self.ankle - self.root) * self.ahead).sum(-1)
        return [[i for i in _maxima(self.lift[f], .15) if self.lift[f, i] > .18 and forward[f, i] < .30 and self.lift[1 - f, i] < .10]
                for f in (0, 1)]

    def flights(self, one_leg):
        """Jumps with both feet (one_leg None) or hops on foot 0 or 1: the root follows a parabola while no foot stands."""
        up = self.lift > .06 if one_leg is None else self.lift[one_leg:one_leg + 1] > .055
        up = up.all(0) & (self.toe[..., 1] > self.floor + (.05 if one_leg is None else .03)).all(0)
        count = 0
        for start, end in _stretches(up):
            start, end = max(0, start - 1), min(len(up), end + 1)
            if end - start >= 4 and (end - start) / self.fps < 1.1:
                bend = 2 * np.polyfit(np.arange(end - start) / self.fps, self.root[start:end, 1], 2)[0]
                count += bend < -4 / .83
        return count

    def hops(self):
        """Number of hops on the left and on the right foot."""
        apart = self.lift[1] - self.lift[0]
        return [self.flights(f) if np.median(sign * apart[np.abs(apart) > .12] if (np.abs(apart) > .12).any() else 0) > .12 else 0
                for f, sign in ((0, 1), (1, -1))]

    def pitch(self):
        trunk = self.neck - self.root
        lean = np.rad2deg(np.arctan2((trunk * self.ahead).sum(-1), trunk[:, 1]))
        return lean - np.quantile(lean, .1)

    def count(self, action, value):
        """How often an action is done; for sided actions by the side that was asked for (any: by either)."""
        if action in ("punch", "kick", "stomp"):
            each = [len(x) for x in {"punch": self.punches, "kick": self.kicks, "stomp": self.stomps}[action]()]
        elif action == "hop":
            each = self.hops()
        elif action == "raise":
            each = [len(_maxima(_mean(self.wrist[arm, :, 1] - self.shoulder[arm, :, 1], .2 * self.fps), .5)) for arm in (0, 1)]
        else:
            return {"jump": lambda: self.flights(None), "squat": lambda: len(_maxima(-self.root[:, 1], .2)),
                    "bow": lambda: len(_maxima(self.pitch(), 20))}[action]()
        return {"left": each[0], "right": each[1], "both": min(each), "any": max(each)}[value]

    def sides(self, value, arms):
        """Whether exactly the asked-for limbs (numbers 0 and 1 of left and right) are active."""
        return bool(arms) if value == "any" else arms == {"left": [0], "right": [1], "both": [0, 1]}[value]

    def check(self, key, value, asked):
        if key == "travel":
            return self.travel() == value and (value == "none" or self.steps() >= 2)
        if key == "gait":
            return self.runs() if value == "run" else self.steps() >= 2 and self.excursion > .5 and not self.runs()
        if key == "speed":
            pace = np.quantile(self.speed, .8)
            return pace < 1.02 if value == "slow" else pace > 1.5
        if key == "drift":
            return self.drift() == value
        if key == "turn":
            return abs(self.rotation) > 30 and value in ("any", "left" if self.rotation > 0 else "right")
        if key == "angle":
            return abs(abs(self.rotation) - value) < 30
        if key == "raise":
            return self.sides(value, self.raised()) and not self.waves()
        if key == "wave":
            return self.sides(value, self.waves())
        if key in ("punch", "kick", "stomp", "hop"):
            counts = {"punch": self.punches, "kick": self.kicks, "stomp": self.stomps, "hop": self.hops}[key]()
            return self.sides(value, [side for side in (0, 1) if counts[side]])
        if key == "march":
            return min(len(_maxima(lift, .15)) for lift in self.lift) >= 1 and max(len(_maxima(lift, .15)) for lift in self.lift) >= 2
        if key == "clap":
            return len(self.claps()) >= 2
        if key == "stretch":
            return self.stretches()
        if key == "bow":
            return self.pitch().max() > 25
        if key in ("jump", "squat"):
            return self.count(key, True) >= 1
        if key == "count":
            action = next(k for k in asked if k in COUNTED)
            return self.count(action, asked[action]) == value
        raise ValueError(f"the oracle knows no attribute {key!r}")


def oracle(joints, skeleton, attributes, fps=None):
    """Which of the asked-for attributes a motion has, from joints alone: dict attribute -> bool.

    joints (t j 3), generated or captured, in the skeleton's units at fps (default: the skeleton's). A sequence
    {"first": {...}, "then": {...}} answers with keys "first.turn", ...; the cut that satisfies most is taken. Not finite
    or shorter than .8 s: all False. Raises ValueError for an attribute it does not know.
    """
    fps = fps or skeleton.fps
    joints = np.asarray(joints, np.float64) / skeleton.leg
    parts = [("first.", attributes["first"]), ("then.", attributes["then"])] if "first" in attributes else [("", attributes)]
    if len(joints) < .8 * fps or not np.isfinite(joints).all():
        return {prefix + key: False for prefix, asked in parts for key in asked}
    padded = np.concatenate([joints[:1], joints, joints[-1:]])
    joints = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    t = len(joints)
    cuts = [[slice(0, t)]] if len(parts) == 1 else [[slice(0, c), slice(c, t)] for c in {round(t * k / 20) for k in range(6, 15)}]
    best = {}
    for cut in cuts:
        seen = [(prefix, asked, _Seen(joints[where], skeleton, fps)) for where, (prefix, asked) in zip(cut, parts)]
        held = {prefix + key: bool(s.check(key, value, asked)) for prefix, asked, s in seen for key, value in asked.items()}
        if sum(held.values()) > sum(best.values()) or not best:
            best = held
        if all(best.values()):
            break
    return best


def caption_attributes(caption):
    return {}
