"""The oracle: which of the attributes that a caption asks for a motion has, judged from joints alone.

It is never a reward and never selects a model. That is its use: a reward that rises while the oracle falls
is a reward that is being gamed. Attributes are plain values, e.g. {"gait": "walk", "turn": "left"}, or for a
sequence {"first": {"kick": "left", "count": 2}, "then": {"bow": True}}:

    travel                  forward backward left right none
    gait                    walk run
    speed                   slow fast (of a walk)
    drift                   left right (of a diagonal walk)
    turn, angle             left right any, 90 180 (degrees)
    raise, wave             left right both any (hands)
    punch, kick, stomp, hop                      left right any
    jump, squat, bow, march, clap, stretch       True
    count                   1 2 3, of the one action beside it that is in COUNTED

"any" is a side that was left open. Thresholds are in leg lengths L (thigh + shank), seconds and degrees, so
that one rule serves both skeletons and any body.
"""

import re

import numpy as np

from common.embedded.english import SPELLING, any_form

COUNTED = ("jump", "hop", "squat", "bow", "kick", "stomp", "raise", "punch")


# ---- 1. Signals --------------------------------------------------------------------------------------------

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
    """Centred moving mean over about `frames` frames of x (t ...)."""
    reach = min(max(0, round((frames - 1) / 2)), (len(x) - 1) // 2)
    if reach == 0:
        return x
    padded = np.concatenate([x[:1].repeat(reach + 1, 0), x, x[-1:].repeat(reach, 0)])
    total = padded.cumsum(0)
    return (total[2 * reach + 1:] - total[:-2 * reach - 1]) / (2 * reach + 1)


def _along(vectors, direction):
    return (vectors * direction).sum(-1)


# ---- 2. Measurements and rules -----------------------------------------------------------------------------

class _Seen:
    """What is measured on a clip: joints (t j 3) in L at `fps`. Limbs come in the order left, right."""

    def __init__(self, joints, skeleton, fps):
        index = skeleton.index
        part = {name: joints[:, j] for name, j in index.items()}
        pairs = ("ankle", "toe", "shoulder", "elbow", "wrist")
        self.ankle, self.toe, self.shoulder, self.elbow, self.wrist = (                         # 2 t 3
            np.stack([part[f"l_{name}"], part[f"r_{name}"]]) for name in pairs)
        self.root, self.neck, self.fps = part["root"], part["neck"], fps
        self.arm = sum(skeleton.bone_lengths[index[j]] for j in ("l_elbow", "l_wrist")) / skeleton.leg
        across = part["l_hip"] - part["r_hip"] + part["l_shoulder"] - part["r_shoulder"]
        self.heading = _mean(np.unwrap(np.arctan2(-across[:, 2], across[:, 0])), .4 * fps)
        sin, cos = np.sin(self.heading), np.cos(self.heading)
        self.ahead, self.left = np.stack([sin, 0 * sin, cos], 1), np.stack([cos, 0 * cos, -sin], 1)
        ends = max(1, round(.3 * fps))
        self.rotation = np.rad2deg(self.heading[-ends:].mean() - self.heading[:ends].mean())
        self.path = _mean(self.root, .3 * fps) * [1, 0, 1]
        step = np.diff(self.path, axis=0)
        self.moved = [_along(step, side[:-1]).sum() for side in (self.ahead, self.left)]
        self.speed = np.linalg.norm(step, axis=1) * fps
        self.excursion = np.linalg.norm(self.path - self.path[0], axis=1).max()
        height = self.ankle[..., 1]
        self.lift = height - np.quantile(height, .1, axis=1, keepdims=True)             # of the ankles, 2 t
        self.clear = self.toe[..., 1] - np.quantile(self.toe[..., 1].min(0), .05)       # toes over the floor
        self.forward = _along(self.ankle - self.root, self.ahead)  # ankles before the root

    def travel(self):
        """Main direction of the path, seen from the body."""
        if self.excursion < .5:
            return "none"
        forward, left = self.moved
        if abs(forward) >= abs(left):
            return "forward" if forward > 0 else "backward"
        return "left" if left > 0 else "right"

    def steps(self):
        """How often the feet pass each other, or open and close, along the path; 0 for a body that slides."""
        side = self.left if self.travel() in ("left", "right") else self.ahead
        return len(_turning_points(_along(self.ankle[0] - self.ankle[1], side), .15))

    def runs(self):
        flight = ((self.lift > .06) & (self.clear > .06)).all(0).mean()
        pace = np.quantile(self.speed, .9)
        return self.steps() >= 2 and (pace > 2.1 or (pace > 1.6 and flight > .12))

    def drift(self):
        way = self.path[-1] - self.path[0]
        angle = np.rad2deg(np.arctan2(way @ self.left[0], way @ self.ahead[0]))
        return "left" if angle > 10 else "right" if angle < -10 else "none"

    def raised(self):
        """Arms whose hand is up for a quarter of a second; higher up for who travels, because arms swing."""
        high = self.wrist[..., 1] - self.shoulder[..., 1] > (-.15 if self.excursion < .5 else .15)
        return [arm for arm in (0, 1) if high[arm].sum() > .25 * self.fps]

    def waves(self, swing=.09):
        """Arms whose hand goes to and fro by `swing`, beside or above the head."""
        found, cut = [], round(.1 * self.fps)
        for arm, (wrist, elbow, shoulder) in enumerate(zip(self.wrist, self.elbow, self.shoulder)):
            hand = [_along(wrist - elbow, side) for side in (self.left, self.ahead)]
            for start, end in _stretches(wrist[:, 1] > np.maximum(elbow[:, 1], shoulder[:, 1] - .30)):
                turns = max(len(_turning_points(x[start + cut:end - cut], swing)) for x in hand)
                if turns >= (2 if end - start < self.fps else 3):
                    found.append(arm)
                    break
        return found

    def punches(self):
        """Frames of the punches of each arm: the hand shoots forward at the height of the chest."""
        reach = _along(self.wrist - self.shoulder, self.ahead) / self.arm
        level = np.abs(self.wrist[..., 1] - self.shoulder[..., 1]) < .25
        return [[i for i in _maxima(reach[arm], .35) if reach[arm, i] > .80 and level[arm, i]]
                for arm in (0, 1)]

    def claps(self):
        gap = np.linalg.norm(self.wrist[0] - self.wrist[1], axis=-1)
        above = (self.wrist[..., 1] > self.root[:, 1]).all(0)
        return [i for i, top in _turning_points(gap, .10) if not top and gap[i] < .25 and above[i]]

    def stretches(self):
        """Whether both arms are held out sideways for .3 s."""
        level = (np.abs(self.wrist[..., 1] - self.shoulder[..., 1]) < .25).all(0)
        wide = _along(self.wrist[0] - self.wrist[1], self.left) > 2 * self.arm
        return (level & wide).sum() > .3 * self.fps

    def lifts(self, height, swing):
        """For each foot the frames at which it is highest, above `height`, while the other foot stands."""
        return [[i for i in _maxima(up, swing) if up[i] > height and other[i] < .10]
                for up, other in (self.lift, self.lift[::-1])]

    def kicks(self):
        high = self.lifts(.25, .20)
        return [[i for i in found if self.forward[f, i] > .28] for f, found in enumerate(high)]

    def stomps(self):
        high = self.lifts(.18, .15)
        return [[i for i in found if self.forward[f, i] < .30] for f, found in enumerate(high)]

    def flights(self, feet, height, clear):
        """Frames in which `feet` leave the ground and the root falls freely: a parabola that bends down."""
        up, found = ((self.lift[feet] > height) & (self.clear > clear).all(0)).all(0), []
        for start, end in _stretches(up):
            start, end = max(0, start - 1), min(len(up), end + 1)
            if 4 <= end - start < 1.1 * self.fps:
                bend = 2 * np.polyfit(np.arange(end - start) / self.fps, self.root[start:end, 1], 2)[0]
                if bend < -4 / .83:                         # half of gravity, L / s^2
                    found.append(start)
        return found

    def hops(self):
        """Frames of the hops on each foot: the other one is held up."""
        apart = self.lift[1] - self.lift[0]
        held = np.median(apart[np.abs(apart) > .12]) if (np.abs(apart) > .12).any() else 0.0
        return [self.flights([f], .055, .03) if sign * held > .12 else [] for f, sign in ((0, 1), (1, -1))]

    def raises(self):
        """Frames of the raises of each hand, for counting."""
        height = self.wrist[..., 1] - self.shoulder[..., 1]
        return [_maxima(_mean(height[arm], .2 * self.fps), .5) for arm in (0, 1)]

    def pitch(self):
        """Forward bend of the trunk over its usual posture, degrees."""
        trunk = self.neck - self.root
        lean = np.rad2deg(np.arctan2(_along(trunk, self.ahead), trunk[:, 1]))
        return lean - np.quantile(lean, .1)

    def march(self):
        counts = sorted(len(_maxima(lift, .15)) for lift in self.lift)
        return counts[0] >= 1 and counts[1] >= 2

    def times(self, action):
        """Frames at which an action in COUNTED is done: a list, or one list each for left and right."""
        if action == "jump":
            return self.flights([0, 1], .06, .05)
        if action in ("squat", "bow"):
            return _maxima(-self.root[:, 1], .2) if action == "squat" else _maxima(self.pitch(), 20)
        return {"punch": self.punches, "kick": self.kicks, "stomp": self.stomps, "hop": self.hops,
                "raise": self.raises}[action]()

    def count(self, action, value):
        each = self.times(action)
        if value is True:
            return len(each)
        left, right = map(len, each)
        return {"left": left, "right": right, "both": min(left, right), "any": max(left, right)}[value]

    def check(self, key, value, asked):
        """Whether attribute key = value holds; `asked` are the attributes beside it."""
        def limbs(active):
            exactly = {"left": [0], "right": [1], "both": [0, 1]}
            return bool(active) if value == "any" else active == exactly[value]

        if key == "travel":
            return self.travel() == value and (value == "none" or self.steps() >= 2)
        if key == "gait":
            walks = self.steps() >= 2 and self.excursion > .5
            return self.runs() if value == "run" else walks and not self.runs()
        if key == "speed":
            pace = np.quantile(self.speed, .8)
            return .3 < pace < 1.02 if value == "slow" else pace > 1.5
        if key == "drift":
            return self.drift() == value
        if key == "turn":
            return abs(self.rotation) > 30 and value in ("any", "left" if self.rotation > 0 else "right")
        if key == "angle":
            return abs(abs(self.rotation) - value) < 30
        if key == "raise":                                  # a wave is no raised hand, but noise is no wave
            return limbs(self.raised()) and not self.waves(swing=.20)
        if key == "wave":
            return limbs(self.waves())
        if key in ("punch", "kick", "stomp", "hop"):
            return limbs([side for side, found in enumerate(self.times(key)) if found])
        if key == "count":
            action = next(action for action in COUNTED if action in asked)
            return self.count(action, asked[action]) == value
        if key in ("jump", "squat"):
            return bool(self.times(key))
        if key == "bow":
            return self.pitch().max() > 25
        if key == "clap":
            return len(self.claps()) >= 2
        if key in ("march", "stretch"):
            return self.march() if key == "march" else self.stretches()
        raise ValueError(f"the oracle knows no attribute {key!r}")


def oracle(joints, skeleton, attributes, fps=None):
    """Which of the asked-for attributes a motion has, from joints alone: dict attribute -> bool.

    joints (t j 3), generated or captured, in the skeleton's units at fps (default: the skeleton's). A
    sequence {"first": {...}, "then": {...}} answers with keys "first.turn", ...; the cut between its parts
    that satisfies most is taken. A motion that is not finite or shorter than .8 s has nothing. Raises
    ValueError for an attribute it does not know.
    """
    fps = fps or skeleton.fps
    sequence = "first" in attributes
    parts = {"first.": attributes["first"], "then.": attributes["then"]} if sequence else {"": attributes}
    joints = np.asarray(joints, np.float64) / skeleton.leg
    n = len(joints)
    if n < .8 * fps or not np.isfinite(joints).all():
        return {prefix + key: False for prefix, asked in parts.items() for key in asked}
    padded = np.concatenate([joints[:1], joints, joints[-1:]])
    joints = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4         # generated joints tremble
    cuts = sorted({round(n * k / 20) for k in range(6, 15)}) if sequence else [n]
    best = None
    for cut in cuts:
        held = {}
        for (prefix, asked), piece in zip(parts.items(), (joints[:cut], joints[cut:])):
            seen = _Seen(piece, skeleton, fps)
            held |= {prefix + key: bool(seen.check(key, value, asked)) for key, value in asked.items()}
        if best is None or sum(held.values()) > sum(best.values()):
            best = held
        if all(best.values()):
            break
    return best


# ---- 3. From a caption to attributes -----------------------------------------------------------------------

_SIDE = r"(left|right|both|one|a|an)"
_HAND = rf"{_SIDE} (?:hand|arm|fist)s?\b"
_LEG = r"(left|right) (?:leg|foot)\b"
_GO = rf"\b{any_form('walk step stroll go jog run sprint dash race move march')}\b"
_TURN = (rf"\b(?:{any_form('turn rotate spin curve')}|turnarounds?|rotations?)\b"
         r"(?: (?!and\b|with\b|while\b|arms?\b|hands?\b)\w+){0,4}? ")
_WAY = r"(?! (?:foot|leg|heel|hand|arm)\b)"                         # "turns on the left foot" says no way
# (attribute, value, pattern); a value of None is read from the groups. The first match of an attribute wins.
_PATTERNS = (
    ("travel", "backward", rf"{_GO}(?: \w+)? (?:backwards?|in reverse)\b"),
    ("travel", "forward", rf"{_GO}(?: straight)?(?: \w+ly)? (?:forwards?|straight ahead)\b"),
    ("travel", "forward", rf"{_GO} in a straight line\b"),
    ("travel", None, r"\bsideways to the (left|right)\b|\bto the (left|right) side sideways\b"),
    ("travel", "none", r"\b(?:in place|on the spot)\b"),
    ("gait", "run", r"\b(?:runs?|running|jogs?|jogging|sprint(?:s|ing)?|dash(?:es|ing)?)\b"),
    ("gait", "walk", r"\b(?:walk|stroll)(?:s|ing)?\b"),
    ("turn", "left", rf"{_TURN}(?:counterclockwise|(?:to the )?left)\b{_WAY}"),
    ("turn", "left", r"\bleft (?:turn|corner)\b|\bcorner to the left\b|\bcounterclockwise\b"),
    ("turn", "right", rf"{_TURN}(?:clockwise|(?:to the )?right)\b{_WAY}"),
    ("turn", "right", r"\bright (?:turn|corner)\b|\bcorner to the right\b|\bclockwise\b"),
    ("angle", 90, r"\b(?:ninety|90) degrees?\b|\bquarter turn\b"),
    ("angle", 180, r"\b180 degrees?\b|\ball the way around\b"),
    ("drift", None, r"\bdiagonal\w*(?: \w+){0,2}? to the (left|right)\b"),
    ("drift", None, r"\bforward and to the (left|right)\b|\bto the (left|right) with diagonal\b"),
    ("wave", None, rf"\b(?:wav(?:es?|ing)|greet(?:s|ing) with)\b.*?\b{_HAND}"),
    ("wave", None, rf"\b{_HAND} and wav(?:es?|ing)\b"),
    ("raise", None, rf"\b(?:rais|lift)\w* (?:up )?(?:the |his |her |their |its )?{_HAND}(?! out)"),
    ("raise", None, rf"\b(?:hold|put)\w* up (?:the |his |her |their |its )?{_HAND}"),
    ("raise", None, rf"\b(?:hold|put)\w* (?:the |his |her |their |its )?{_HAND} (?:up|in the air|over)\b"),
    ("stretch", True, r"\bboth arms (?:out|sideways)\b|\bstretch(?:es|ing) out both arms\b"),
    ("punch", None, r"\bpunch\w*\b(?:.*?\b(left|right) (?:hand|arm|fist)\b)?"),
    ("kick", None, rf"\bkick\w*\b(?:.*?\b{_LEG})?"),
    ("stomp", None, rf"\bstomp\w*\b(?:.*?\b{_LEG})?"),
    ("hop", None, rf"\b(?:hop\w*\b(?:.*?\bon the {_LEG})?|jump\w*(?: \w+){{0,2}} on (?:one|the {_LEG}))"),
    ("jump", True, r"\bjump(?:s|ing)?\b"), ("squat", True, r"\bsquat(?:s|ting)?\b"),
    ("bow", True, r"\bbow(?:s|ing)?\b"), ("clap", True, r"\bclap(?:s|ping)?\b"),
    ("march", True, r"\bmarch(?:es|ing)?\b.*\b(?:in place|on the spot)\b|\bhigh knees\b"))
_COUNTS = {"once": 1, "one time": 1, "twice": 2, "two times": 2, "three times": 3}
# after these words the patterns would promise too much: other actors, objects, ground that is not flat
_DOUBT = re.compile(r"\b(arrow|ladder|stairs?|terrain|ground|hill|obstacle|climb\w*|circles?|zig-?zag|not|"
                    r"without|head|back and forth|sitting|lying|pushed|sword|lean\w*|bend\w*|sway\w*|wip\w+|"
                    r"stir\w*|scrub\w*|(?:arm|hand|wrist|hip)s?(?: \w+){0,3} (?:counter)?clockwise)\b")


def _clause(text):
    found = {}
    for key, value, pattern in _PATTERNS:
        match = None if key in found else re.search(pattern, text)
        if match is not None:
            side = next((group for group in match.groups() if group), None)
            found[key] = value if value is not None else side if side in ("left", "right", "both") else "any"
    if "wave" in found:
        found.pop("raise", None)  # "lifts the hand and waves it" asks for one movement
        if "bye" in text:
            del found["wave"]                               # people say goodbye with any small gesture
    for key, weaker in (("hop", "jump"), ("march", "gait")):
        if key in found:
            found.pop(weaker, None)
    if "drift" in found or found.get("travel") in ("left", "right"):
        found.pop("turn", None)
    if sum(key in COUNTED for key in found) == 1:
        found |= {"count": n for words, n in _COUNTS.items() if words in text}
    return found


def one_counterclockwise(text):
    """The ways to write it in lower case (anti-clockwise, counter clock-wise ...) become one."""
    return re.sub(r"\b(?:counter|anti)[ -]?(?:counter)?clock-?wise\b", "counterclockwise", text)


def caption_attributes(caption, flat_floor=False):
    """What the oracle can check in a free caption or prompt: dict of attributes, {} if nothing.

    flat_floor: also read jumps and hops; their checks mean nothing on ladders and uneven ground (.39 right on
    captured clips). Conservative English keyword rules that keep silent where they are not sure. Clauses
    joined by "then" or "before" make one dict where they do not conflict (each may then hold anywhere in the
    clip), else {"first": ..., "then": ...}.
    """
    said = caption.lower().replace(",", " ").replace(".", " ").split()
    text = one_counterclockwise(" ".join(SPELLING.get(word, word) for word in said))
    if _DOUBT.search(text):
        return {}
    clauses = [_clause(clause) for clause in re.split(r"\b(?:and )?then\b|\bbefore\b", text, maxsplit=1)]
    if not flat_floor:
        clauses = [clause for clause in clauses if not clause.keys() & {"jump", "hop"}]
    clauses = [clause for clause in clauses if clause]
    if len(clauses) < 2:
        return clauses[0] if clauses else {}
    first, then = clauses
    counted = [key for key in COUNTED if key in first or key in then]
    hands = [bool(clause.keys() & {"raise", "wave", "punch", "clap"}) for clause in clauses]
    if first.keys() & then.keys() or len(counted) > 1 or all(hands):
        return {"first": first, "then": then}
    return first | then
