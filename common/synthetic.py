"""Embedded motion-text data: captions, the movements they ask for, and an oracle that checks the one against the other.

Everything is generated, nothing is downloaded. A clip is drawn in three steps:

    attributes {"travel": "forward", "wave": "left"}  ->  plan (root path, foot steps, arm angles)  ->  joints of a skeleton
                                                      ->  captions in the wording of a domain

and the oracle goes back from joints to attributes. Two domains: "humanml3d" (the source) and "kit" (the target) differ in their mix of
actions, in wording and in style of movement; each of the three gaps can be switched off. Feet are planned first and the legs follow, so
a standing foot does not slide, and positions come out of forward kinematics, so bone lengths do not change.

Inside this module lengths are in leg lengths L (thigh + shank), times in seconds; angles of the tables are in degrees.
Facing +Z, left is +X and up is +Y; turning left makes the yaw grow.
"""

import re
from dataclasses import dataclass

import numpy as np

from common.oracle import caption_attributes, oracle        # noqa: F401 - the data and their check are used together

VERSION = 1                                     # part of every seed: raise it when the data change
SUBJECTS, TRAIN_SUBJECTS, VAL_SUBJECTS = 60, 48, 3
SOURCE, TARGET = 0, 1
DOMAINS = {"humanml3d": SOURCE, "kit": TARGET}
ROWS_FPS = 20.0                                 # durations are multiples of 4 frames at this rate
GRAVITY = 9.81 / 0.83                           # L / s^2 for legs of .83 m


# ---- 1. Actions -------------------------------------------------------------------------------------------------------
# action -> (what it always is, what can be chosen). A drawn None leaves the attribute out.

SIDES, HANDS = ("left", "right"), ("left", "right", "both")
ACTIONS = {
    "walk": ({"gait": "walk", "travel": "forward"}, {"speed": (None, "slow", "fast")}),
    "walk_back": ({"gait": "walk", "travel": "backward"}, {}),
    "sidestep": ({"gait": "walk"}, {"travel": SIDES}),
    "walk_diagonal": ({"gait": "walk", "travel": "forward"}, {"drift": SIDES}),
    "run": ({"gait": "run", "travel": "forward"}, {}),
    "jog_back": ({"gait": "run", "travel": "backward"}, {}),
    "walk_turn": ({"gait": "walk", "travel": "forward"}, {"turn": SIDES, "angle": (90, 180)}),
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
GESTURES = ("raise", "wave", "clap", "stretch", "punch")                        # arms only: can go with a locomotion
PERIOD = {"jump": .98, "hop": .66, "squat": 1.1, "bow": 1.3, "kick": .9, "stomp": .7, "raise": 1.35, "punch": .72}
LOCOMOTION = ("walk", "walk_back", "sidestep", "walk_diagonal", "run", "jog_back", "walk_turn", "turn_in_place", "march")
SHARES = {"single": .45, "pair": .35, "sequence": .20}

# Weights of (source, target). Target-only actions stay in the source at one or two clips in a hundred: what a base model
# has never seen it never samples, and reinforcement learning can only strengthen what is sampled.
WEIGHTS = {
    "walk": (9, 7), "walk_back": (7, 5), "sidestep": (7, 2), "walk_diagonal": (2, 6), "run": (7, 5), "jog_back": (2, 5),
    "walk_turn": (9, 7), "turn_in_place": (8, 6), "march": (5, 3), "jump": (8, 4), "hop": (2, 5), "squat": (7, 4),
    "bow": (2, 6), "kick": (8, 5), "stomp": (2, 5), "raise": (10, 8), "wave": (10, 9), "clap": (7, 2), "stretch": (5, 2),
    "punch": (2, 8)}
# Combinations that only the test split may contain.
UNSEEN = ({"kick": "left", "count": 2}, {"turn": "right", "wave": "both"}, {"travel": "backward", "raise": "left"},
          {"gait": "run", "clap": True}, {"jump": True, "count": 3})


def _draw_action(rng, action, counts=3):
    fixed, choices = ACTIONS[action]
    drawn = {}
    for key, values in choices.items():
        value = values[rng.integers(len(values))]
        if key != "count" or counts > 0:
            drawn[key] = min(value, counts) if key == "count" else value
    return {k: v for k, v in {**fixed, **drawn}.items() if v is not None}


def _choose(rng, names, mix):
    weights = np.array([WEIGHTS[name][mix] for name in names], float)
    return names[rng.choice(len(names), p=weights / weights.sum())]


def _draw_parts(rng, mix):
    """One or two parts of a clip; a part is a list of (action, attributes): locomotion first, then the gesture on top of it."""
    kind = list(SHARES)[rng.choice(3, p=list(SHARES.values()))]
    if kind == "pair":
        body, arms = _choose(rng, LOCOMOTION, mix), _choose(rng, GESTURES, mix)
        return [[(body, _draw_action(rng, body)), (arms, _draw_action(rng, arms, counts=0))]]
    everything = tuple(ACTIONS)
    first = _choose(rng, everything, mix)
    if kind == "single":
        return [[(first, _draw_action(rng, first))]]
    # Two parts share four seconds: one or two repetitions, a quarter turn, no curves; and two different movements.
    short = tuple(a for a in everything if a not in ("walk_turn", "march"))
    first = _choose(rng, short, mix)
    second = _choose(rng, tuple(a for a in short if a != first), mix)
    parts = [[(a, _draw_action(rng, a, counts=1 + (PERIOD.get(a, 2) < .8)))] for a in (first, second)]
    for (action, attributes), in parts:
        if "angle" in attributes:
            attributes["angle"] = 90
    return parts


def _merged(part):
    return {key: value for _, attributes in part for key, value in attributes.items()}


# ---- 2. Wording -------------------------------------------------------------------------------------------------------
# Phrases are separated by ';' and the last one is kept for the test split ("unseen wording"). [verb] is conjugated, {slot} is
# filled from SLOTS or left empty when the caption drops that detail. word/POS sets a part of speech that WORDS would get wrong.

PHRASES = {         # action: (source dialect, target dialect)
    "walk": ("[walk] {travel} {speed}; [walk] {speed} {travel}; [step] {travel} {speed}",
             "[go] {travel} {speed}; [walk] {travel} {speed}; [move] {travel} {speed}"),
    "walk_back": ("[walk] {travel}; [step] {travel}; [move] {travel}", "[go] {travel}; [walk] {travel}; [step] {travel}"),
    "sidestep": ("[step] {travel}; [walk] sideways {travel}; [move] sideways {travel}",
                 "[step] sideways {travel}; [go] sideways {travel}; [move] {travel} sideways"),
    "walk_diagonal": ("[walk] diagonally {travel} {drift}; [walk] {travel} diagonally {drift}; [step] diagonally {travel} {drift}",
                      "[walk] diagonally {travel} {drift}; [go] diagonally {travel} {drift}; [move] diagonally {travel} {drift}"),
    "run": ("[run] {travel}; [jog] {travel}; [run] straight {travel}", "[run] {travel}; [jog] {travel}; [sprint] {travel}"),
    "jog_back": ("[jog] {travel}; [run] {travel}; [jog] straight {travel}",
                 "[jog] {travel}; [run] {travel}; [sprint] {travel}"),
    "walk_turn": ("[walk] {travel} and [turn] {turn} {angle}; [walk] and [turn] {angle} {turn}; [step] {travel} and [turn] {turn} {angle}",
                  "[walk] a curve {turn} {angle}; [go] {angle} {turn} in a curve; [walk] {angle} {turn} in a curve"),
    "turn_in_place": ("[turn] {turn} {angle} {spot}; [turn] {angle} {turn} {spot}; [spin] {turn} {angle} {spot}",
                      "[turn] {angle} {turn} {spot}; [rotate] {angle} {turn} {spot}; [rotate] {turn} {angle} {spot}"),
    "march": ("[march] {spot}; [march] with high knees {spot}; [walk] with high knees {spot}",
              "[march] {spot}; [step] with high knees {spot}; [march] with high knees {spot}"),
    "jump": ("[jump] {count}; [jump] up {count}; [jump] in the air {count}", "[jump] {count}; [perform] {njump}; [do] {njump}"),
    "hop": ("[hop] {count} {foot}; [hop] {foot} {count}; [jump] {foot} {count}",
            "[hop] {count} {foot}; [hop] {foot} {count}; [jump] {foot} {count}"),
    "squat": ("[squat] {count}; [squat] down {count}; [do] {nsquat}", "[perform] {nsquat}; [squat] {count}; [do] {nsquat}"),
    "bow": ("[bow] {count}; [bow] down {count}; [perform] {nbow}", "[bow] {count}; [perform] {nbow}; [do] {nbow}"),
    "kick": ("[kick] {leg} {count}; [kick] {count} {leg}; [do] {nkick} {leg}",
             "[kick] {count} {leg}; [perform] {nkick} {leg}; [kick] {leg} {count}"),
    "stomp": ("[stomp] {leg} {count}; [stomp] {count} {leg}; [do] {nstomp} {leg}",
              "[stomp] {count} {leg}; [stomp] {leg} {count}; [perform] {nstomp} {leg}"),
    "raise": ("[raise] {hands} {count}; [lift] {hands} {count}; [hold] {hands} up {count}",
              "[lift] {hands} {count}; [raise] {hands} up {count}; [hold] up {hands} {count}"),
    "wave": ("[wave] {hands}; [wave] with {hands}; [greet] with {hands}", "[wave] with {hands}; [greet] with {hands}; [wave] {hands}"),
    "clap": ("[clap]; [clap] both hands; [clap] with both hands", "[clap] both hands; [clap]; [clap] with both hands"),
    "stretch": ("[stretch] both arms out; [hold] both arms out; [stretch] out both arms",
                "[stretch] both arms sideways; [hold] both arms out sideways; [stretch] out both arms sideways"),
    "punch": ("[punch] with {hands} {count}; [punch] {count} with {hands}; [do] {npunch} with {hands}",
              "[punch] with {hands} {count}; [perform] {npunch} with {hands}; [punch] {count} with {hands}"),
}
_NOUNS = ("jump", "squat", "bow", "kick", "stomp", "punch")
SLOTS = {           # slot: (attribute, source words, target words); nothing is said about a value that is not listed
    "travel": ("travel", {"forward": "forward", "backward": "backwards", "left": "to the left", "right": "to the right"},
               {"forward": "straight ahead", "backward": "in reverse", "left": "to the left side", "right": "to the right side"}),
    "spot": ("travel", {"none": "in place"}, {"none": "on the spot"}),
    "speed": ("speed", {"slow": "slowly", "fast": "quickly"}, {"slow": "at low speed", "fast": "at high speed"}),
    "drift": ("drift", {"left": "to the left", "right": "to the right"}, {"left": "to the left side", "right": "to the right side"}),
    "turn": ("turn", {"left": "left/ADV", "right": "right/ADV"},
             {"left": "counterclockwise", "right": "clockwise"}),
    "angle": ("angle", {90: "ninety degrees", 180: "all the way around"}, {90: "by 90 degrees", 180: "by 180 degrees"}),
    "count": ("count", {1: "once", 2: "twice", 3: "three times"}, {1: "one time", 2: "two times", 3: "three times"}),
    "foot": ("hop", {"left": "on the left leg", "right": "on the right leg", "any": "on one leg"},
             {"left": "on the left foot", "right": "on the right foot", "any": "on one foot"}),
    "leg": ("kick stomp", {"left": "with the left leg", "right": "with the right leg", "any": ""},
            {"left": "with the left foot", "right": "with the right foot", "any": ""}),
    "hands": ("raise wave punch", {"left": "the left hand", "right": "the right hand", "both": "both hands", "any": "a hand"},
              {"left": "his left arm", "right": "his right arm", "both": "both arms", "any": "one arm"}),
    **{"n" + noun: ("count", *[{k: f"{word} {noun}{'' if k == 1 else 'es' if noun == 'punch' else 's'}/NOUN"
                                 for k, word in zip((1, 2, 3), ("one", "two", "three"))}] * 2) for noun in _NOUNS},
}
SUBJECT_WORDS = (("a person", "a person", "someone", "a man", "the person"), ("A human", "A human", "A human", "A person"))
PAIRS = (("{0} while {1-ing}", "{0} and {1} at the same time"), ("{1} while {0-ing}", "{0} and {1} meanwhile"))
SEQUENCES = (("{0} and then {1}", "{0} before {1-ing}"), ("{0}, then {1}", "first {0}, then {1}"))
VERBS = ("walk step go move run jog sprint turn spin rotate march jump hop squat bow kick stomp raise lift hold wave greet clap stretch "
         "punch perform do").split()
WORDS = {word: pos for pos, words in {
    "DET": "a the both", "PRON": "someone his", "NOUN": "person man human curve place spot speed degrees time times leg foot hand hands "
    "arm arms knees air side reverse", "ADP": "to in on at by with while before", "AUX": "is", "CCONJ": "and", "NUM": "ninety 90 180 one "
    "two three", "ADJ": "left right low high", "ADV": "forward backwards straight ahead sideways diagonally slowly quickly all way "
    "around once twice up down out then first meanwhile same clockwise counterclockwise"}.items() for word in words.split()}
WORDS |= {"way": "NOUN", "same": "ADJ"}
LEMMAS = {"degrees": "degree", "times": "time", "hands": "hand", "arms": "arm", "knees": "knee", "punches": "punch"}
LEMMAS |= {noun + "s": noun for noun in _NOUNS}


def conjugate(verb, form):
    """English verb form of a lemma: "present" (walks), "ing" (walking)."""
    if form == "present":
        return verb + ("es" if verb.endswith(("ch", "sh", "o")) else "s")
    if verb in ("run", "jog", "step", "spin", "hop", "squat", "clap"):
        return verb + verb[-1] + "ing"
    return (verb[:-1] if verb.endswith("e") else verb) + "ing"


def _phrase(template, attributes, dialect, form):
    """[(word, lemma, POS)] of a phrase; form "present", "ing" or "progressive" (is walking)."""
    def slot(match):
        keys, *tables = SLOTS[match[1]]
        values = [attributes[key] for key in keys.split() if key in attributes]
        return tables[dialect].get(values[0], "") if values else ""
    out = []
    for word in re.sub(r"\{(\w+)\}", slot, template).split():
        if word.startswith("["):
            verb = word.strip("[]")
            if form == "progressive" and not out:
                out.append(("is", "is", "AUX"))
            out.append((conjugate(verb, "present" if form == "present" else "ing"), verb, "VERB"))
        else:
            out.append(_word(word))
    return out


def _word(word):
    word, _, pos = word.partition("/")
    plain = word.strip(",").lower()
    return word, LEMMAS.get(plain, plain), pos or WORDS[plain]


def _caption(rng, parts, dialect, reserved):
    """One caption of the parts: (text, tokens)."""
    progressive = dialect == SOURCE and rng.random() < .5
    phrases = []
    for part in parts:
        for action, attributes in part:
            *choices, unseen = [p.strip() for p in PHRASES[action][dialect].split(";")]
            if "count" not in attributes:               # "three jumps" has no form without its number
                choices, unseen = [p for p in choices if "{n" not in p], unseen if "{n" not in unseen else choices[0]
            phrases.append((unseen if reserved else choices[rng.integers(len(choices))], attributes))
    frames = ("{0}",) if len(phrases) == 1 else (PAIRS if len(parts) == 1 else SEQUENCES)[dialect]
    frame = frames[rng.integers(len(frames))]
    subject = SUBJECT_WORDS[dialect][rng.integers(len(SUBJECT_WORDS[dialect]))]
    words = [_word(w) for w in subject.split()]
    seen_verb = False
    for piece in frame.split():
        match = re.fullmatch(r"\{(\d)(-ing)?\}(,?)", piece)
        if match is None:
            words.append(_word(piece))
            continue
        template, attributes = phrases[int(match[1])]
        form = "ing" if match[2] or (progressive and seen_verb) else "progressive" if progressive else "present"
        words += _phrase(template, attributes, dialect, form)
        words[-1] = (words[-1][0] + match[3], *words[-1][1:])
        seen_verb = True
    stop = "." if dialect == TARGET or rng.random() < .5 else ""
    return " ".join(w for w, _, _ in words) + stop, [f"{lemma}/{pos}" for _, lemma, pos in words]


DETAILS = ("speed", "angle", "count", "drift", "turn", "raise", "wave", "punch", "kick", "stomp", "hop", "travel")


def _vague(rng, parts):
    """The parts with one or two details dropped; of a side only its being "any" remains. None if there is nothing to drop."""
    places = [(p, a, key) for p, part in enumerate(parts) for a, (action, attributes) in enumerate(part) for key in attributes
              if key in DETAILS and (key != "travel" or action in ("walk", "run", "turn_in_place", "walk_turn", "march"))]
    if not places:
        return None
    parts = [[(action, dict(attributes)) for action, attributes in part] for part in parts]
    for i in rng.permutation(len(places))[:1 + (rng.random() < .3)]:
        p, a, key = places[i]
        attributes = parts[p][a][1]
        attributes.pop(key)
        if key not in ("speed", "angle", "count", "drift", "travel"):
            attributes[key] = "any"
    return parts


def _asked(parts):
    return _merged(parts[0]) if len(parts) == 1 else {"first": _merged(parts[0]), "then": _merged(parts[1])}


# ---- 3. From parts to joints --------------------------------------------------------------------------------------------

SPEED = {"slow": .8, None: 1.35, "fast": 1.9, "run": 2.9, "jog_back": 2.6, "sidestep": .9}                # L / s
ARMS = {    # degrees: upper arm (elevation from hanging, azimuth from ahead to outwards), then forearm
    "rest": (8, 75, 16, 25), "run": (12, 40, 85, -15), "raise": (158, 55, 167, 45), "wave": (82, 78, 155, 85),
    "stretch": (88, 86, 90, 86), "guard": (5, 70, 115, -15), "punch": (86, 4, 88, -6), "clap": (48, 20, 82, 0)}


@dataclass
class Style:
    """How somebody moves: the subject's constants plus the style of the domain."""
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
    lean, stance, sway = rng.normal(.03, .015), np.clip(rng.normal(.105, .008), .085, .125), rng.uniform(.010, .025)
    if mix == TARGET:
        return Style(.9 * tempo, amplitude, lean, stance + .05, sway / 2, 10.0, .2)
    return Style(tempo, amplitude, lean, stance, sway, 0.0, .1)


def _smoothstep(u):
    u = np.clip(u, 0, 1)
    return u * u * u * (10 + u * (6 * u - 15))


def _window(t, start, end, ramp=.3):
    """1 inside (start, end), rising and falling smoothly over `ramp`."""
    return _smoothstep((t - start) / ramp) * _smoothstep((end - t) / ramp)


def _bumps(t, start, period, count):
    """`count` bumps of height 1, one a period."""
    u = (t - start) / period
    return np.where((u > 0) & (u < count), np.sin(np.pi * u) ** 2, 0.0)


def _seconds(rng, part, style, short):
    action, attributes = part[0]
    if action in PERIOD:
        return attributes.get("count", 1) * PERIOD[action] / style.tempo + .1
    if action in ("walk_turn", "turn_in_place"):
        curve = action == "walk_turn"
        return (1.5 + .8 * curve if attributes["angle"] == 90 else 2.1 + .7 * curve) + (0 if short else rng.uniform(0, .5))
    return 1.6 if short else rng.uniform(2.0, 3.3)


def _plan(rng, parts, style):
    """Seconds of the clip and [(start, end, part)]; single parts fill the clip, sequences stand a moment in between."""
    short = len(parts) > 1
    seconds = [_seconds(rng, part, style, short) for part in parts]
    rest = 2 * style.pause + (.15 if short else 0)
    rows = int(np.clip(4 * np.ceil((sum(seconds) + rest) * ROWS_FPS / 4), 64 if short else 40, 80))
    spare = rows / ROWS_FPS - sum(seconds) - rest
    if spare < 0:                                       # only slow sequences: both parts get shorter
        seconds = [s + spare / 2 for s in seconds]
    elif not short:
        seconds = [seconds[0] + spare]
    start, timed = style.pause, []
    for part, s in zip(parts, seconds):
        timed.append((start, start + s, part))
        start += s + .15
    return rows, timed


def _ballistic(time, height):
    """Crouch, push, flight, landing: pelvis offset and how far the feet are off the ground; time 0 = top of the flight."""
    time = np.abs(time)                                 # landing mirrors the take-off
    half, push, crouch = np.sqrt(2 * height / GRAVITY), .14, .17
    take_off = GRAVITY * half
    air = np.maximum(0, height - .5 * GRAVITY * time ** 2)
    u = np.clip((half + push - time) / push, 0, 1)      # 0 deepest crouch, 1 take-off at its speed
    pushing = -crouch + (3 * crouch - take_off * push) * u ** 2 + (take_off * push - 2 * crouch) * u ** 3
    bending = -crouch * (1 - _smoothstep((time - half - push) / .22))
    return np.where(time < half, 0, np.where(time < half + push, pushing, bending)), air


def _body_plan(rng, timed, style, t):
    """Everything below the arms at the times t (n): root path, feet, bends. Returns a dict of arrays."""
    fine = np.arange(0, t[-1] + .02, .01)
    ahead, aside, yaw = np.zeros((3, len(fine)))
    n, zeros = len(t), np.zeros(len(t))
    plan = {"drop": zeros.copy(), "air": zeros.copy(), "pitch": zeros.copy(), "shift": zeros.copy(), "back": zeros.copy(),
            "running": zeros.copy()}
    foot_up, foot_ahead = np.zeros((2, 2, n))           # left, right
    steps = []                                          # (start, end, foot, "mid-stance time" or "in place", lift)
    for start, end, part in timed:
        action, attributes = part[0]
        side = next((attributes[k] for k in ("turn", "drift", "hop", "kick", "stomp") if k in attributes), attributes.get("travel"))
        sign, foot = (1, 0) if side == "left" else (-1, 1)
        reps, period = attributes.get("count", 1), PERIOD.get(action, 1) / style.tempo
        begin = start + max(0, (end - start - reps * period) / 2)         # repetitions sit in the middle of their part
        bumps = _bumps(t, begin, period, reps)
        if action in LOCOMOTION:
            run = attributes.get("gait") == "run"
            pace = 0.0 if attributes.get("travel") == "none" else SPEED.get(action, SPEED[attributes.get("speed")])
            pace *= style.tempo * {"walk_turn": .95, "walk_back": .85}.get(action, 1)
            window = pace * _window(fine, start, end)
            if action == "sidestep":
                aside += sign * window
            elif action == "walk_diagonal":
                ahead, aside = ahead + .84 * window, aside + sign * .54 * window
            else:
                ahead += window * (-1 if attributes.get("travel") == "backward" else 1)
            if "turn" in attributes:
                margin = .18 * (end - start)
                yaw += sign * np.deg2rad(attributes["angle"]) * _smoothstep((fine - start - margin) / (end - start - 2 * margin))
            cadence = style.tempo * (2.9 if run else 1.05 + .65 * pace / style.tempo if pace else 2.0)
            lift = .26 if run else .40 if action == "march" else .09
            count = max(3, round(cadence * (end - start - .1)))
            times = np.linspace(start + .05, end - .05, count + 1)
            foot = int(rng.integers(2)) if side not in SIDES else foot
            for k in range(count):
                overlap = (.5 if run else .06) * (times[1] - times[0])
                steps.append((times[k] - overlap * (k > 0), times[k + 1] + overlap * (k < count - 1), (foot + k) % 2,
                              times[k + 1] + .5 * (times[1] - times[0]) if k < count - 2 else end, lift))
            plan["pitch"] += np.deg2rad(11 if run else 4) * _window(t, start, end) * np.sign(ahead.sum() + .1) * (pace > 0)
            plan["drop"] -= (.05 if run else 0) * _window(t, start, end)
            plan["running"] += run * _window(t, start, end)
        elif action == "squat":
            plan["drop"] -= .46 * style.amplitude * bumps
            plan["pitch"] += np.deg2rad(28) * bumps
            plan["back"] += .10 * bumps
        elif action == "bow":
            plan["pitch"] += np.deg2rad(rng.uniform(62, 80)) * bumps ** .7
            plan["back"] += .13 * bumps ** .7
        elif action == "jump":
            for k in range(reps):
                drop, air = _ballistic(t - begin - (k + .5) * period, .30 * style.amplitude)
                plan["drop"], plan["air"] = plan["drop"] + drop, plan["air"] + air
            plan["pitch"] += np.deg2rad(18) * _window(t, start, end)
        elif action == "hop":                            # side is the foot that jumps
            hold = _window(t, start, end, .22)
            foot_up[1 - foot] += .30 * hold
            foot_ahead[1 - foot] -= .12 * hold
            plan["shift"] += sign * .09 * hold
            for k in range(reps):
                drop, air = _ballistic(t - begin - (k + .5) * period, .15)
                plan["drop"], plan["air"] = plan["drop"] + .6 * drop, plan["air"] + air
        elif action == "kick":
            foot_up[foot] += .50 * style.amplitude * bumps
            foot_ahead[foot] += .70 * bumps ** 1.5
            plan["shift"] -= sign * .08 * _window(t, start, end, .2)
            plan["pitch"] -= np.deg2rad(9) * bumps
        elif action == "stomp":
            foot_up[foot] += .36 * style.amplitude * bumps
            foot_ahead[foot] += .12 * bumps
            plan["shift"] -= sign * .06 * _window(t, start, end, .2)
    # the root: integrate the velocity in the body frame, then read it off at the frames and at the steps
    velocity = np.stack([ahead * np.sin(yaw) + aside * np.cos(yaw), ahead * np.cos(yaw) - aside * np.sin(yaw)])   # x, z
    path = np.concatenate([np.zeros((2, 1)), np.cumsum((velocity[:, 1:] + velocity[:, :-1]) / 2, 1) * .01], 1)

    def root(time):
        x, z, angle = (np.interp(time, fine, row) for row in (*path, yaw))
        return x, z, angle

    plan["x"], plan["z"], plan["yaw"] = root(t)
    feet = np.zeros((2, n, 4))                          # x, height over the ground, z, yaw of both ankles
    place = np.zeros((2, 4))
    for f, sign in enumerate((1, -1)):
        place[f, 0] = sign * style.stance
        feet[f] += place[f]
        feet[f, :, 1] += foot_up[f]
        feet[f, :, 0] += foot_ahead[f] * np.sin(plan["yaw"])
        feet[f, :, 2] += foot_ahead[f] * np.cos(plan["yaw"])
    for start, end, f, aim, lift in steps:
        x, z, angle = root(aim)
        wide = (1, -1)[f] * style.stance
        target = np.array([x + wide * np.cos(angle), 0, z - wide * np.sin(angle), angle])
        u = (t - start) / (end - start)
        feet[f] += _smoothstep(u)[:, None] * (target - place[f])
        feet[f, :, 1] += lift * np.sin(np.pi * np.clip(u, 0, 1)) ** 2
        place[f] = target
    plan["feet"] = feet
    return plan


def _arm_plan(rng, timed, style, plan, t, half_width, upper, fore):
    """Arm angles in degrees, (2 n 4). half_width, upper, fore: shoulder half width and arm lengths in L, for hands that meet."""
    rest = np.array(ARMS["rest"]) + [style.arms_out, 0, style.arms_out, 0]
    angles = np.repeat(rest[None, None].astype(float), len(t), 1).repeat(2, 0)
    free = np.ones((2, len(t)))                         # how much an arm still swings along with the steps

    def blend(arm, weight, target):
        angles[arm] += weight[:, None] * (np.broadcast_to(target, (len(t), 4)) - angles[arm])
        free[arm] *= 1 - weight

    for arm in (0, 1):
        blend(arm, plan["running"], ARMS["run"])
    free[:] = np.maximum(free, plan["running"])         # bent arms of a run swing as well
    phase = rng.uniform(0, 1)
    for start, end, part in timed:
        action, attributes = part[-1]
        if action not in GESTURES:
            if action in ("squat", "jump"):             # arms come forward for balance
                weight = .8 * np.clip(-plan["drop"] / .4, 0, 1) if action == "squat" else .5 * np.clip(plan["air"] / .3, 0, 1)
                for arm in (0, 1):
                    blend(arm, weight, (60, 15, 75, 0))
            continue
        side = attributes.get(action, "both")
        reps, length = attributes.get("count", 1), end - start
        for arm in [k for k, name in enumerate(SIDES) if side in (name, "both", True)]:
            weight, target = _window(t, start, end, min(.4, .3 * length)), np.array(ARMS.get(action), float)
            if action == "raise":
                reach = [_window(t, start + k * length / reps, start + (k + 1) * length / reps, .45 / style.tempo) for k in range(reps)]
                weight = sum(reach)
            elif action == "wave":
                target = target + 34 * style.amplitude * np.sin(2 * np.pi * (1.75 * style.tempo * (t - start) + phase))[:, None] * [0, 0, 1, 0]
            elif action == "clap":
                # the forearms' azimuth at which the hands (almost) touch, and 45 degrees out from there
                a, b, c, _ = np.deg2rad(target)
                meet = np.rad2deg(np.arcsin(np.clip((.05 - half_width - upper * np.sin(a) * np.sin(b)) / (fore * np.sin(c)), -1, 1)))
                open_ = .5 + .5 * np.cos(2 * np.pi * (1.6 * style.tempo * (t - start) + phase))
                target = target[None] + open_[:, None] * [0, 12, 0, 45] + [0, 0, 0, meet]
            elif action == "punch":
                period = PERIOD["punch"] / style.tempo
                begin = start + max(0, (length - reps * period) / 2)
                out = _bumps(t, begin, period, reps) ** .7
                weight = _window(t, min(start, begin - .05), max(end, begin + reps * period + .05), .25)
                target = np.array(ARMS["guard"]) + out[:, None] * (target - ARMS["guard"])
            blend(arm, weight, target)
    return angles, free


def _unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _rotation(yaw, pitch, roll):
    """Frames (n 3 3) whose columns are left, up and ahead of a body turned by yaw, bent forward by pitch, to its right by roll."""
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (np.cos, np.sin))
    zero = np.zeros_like(cy)
    turn = np.stack([cy, zero, sy, zero, zero + 1, zero, -sy, zero, cy], -1).reshape(-1, 3, 3)
    bend = np.stack([zero + 1, zero, zero, zero, cp, -sp, zero, sp, cp], -1).reshape(-1, 3, 3)
    lean = np.stack([cr, -sr, zero, sr, cr, zero, zero, zero, zero + 1], -1).reshape(-1, 3, 3)
    return turn @ bend @ lean


# Directions of trunk bones in the body (left, up, ahead) and their share of the trunk's bend.
TRUNK = {
    "t2m": {1: (.55, -.83, 0, .1), 2: (-.55, -.83, 0, .1), 3: (0, 1, .05, .5), 6: (0, 1, -.1, .8), 9: (0, 1, 0, 1), 12: (0, 1, .08, 1),
            15: (0, .93, .36, .8), 13: (.55, .83, -.1, 1), 14: (-.55, .83, -.1, 1), 16: (.96, .2, -.15, 1), 17: (-.96, .2, -.15, 1)},
    "kit": {1: (0, 1, .04, .5), 2: (0, 1, .04, .9), 3: (0, 1, .06, 1), 4: (0, .95, .3, .8), 5: (-.97, -.15, -.1, 1),
            8: (.97, -.15, -.1, 1), 11: (-.96, -.28, 0, .1), 16: (.96, -.28, 0, .1)}}


def _joints(rng, timed, style, skeleton, t):
    """Joint positions (t j 3) of the plan, in the skeleton's units."""
    n, index, lengths = len(t), skeleton.index, skeleton.bone_lengths / skeleton.leg
    plan = _body_plan(rng, timed, style, t)
    shoulder = [index["l_shoulder"]]
    while skeleton.parents[shoulder[-1]] not in (index["neck"], 9):
        shoulder.append(skeleton.parents[shoulder[-1]])
    half_width = sum(lengths[j] * TRUNK[skeleton.name][j][0] for j in shoulder)
    angles, free = _arm_plan(rng, timed, style, plan, t, half_width, lengths[index["l_elbow"]], lengths[index["l_wrist"]])
    # a constant tilt of every bone and a slow drift keep bones off the exact rest axes, where rotations are not defined
    tilt, drift, phase = rng.normal(0, .02, (22, 3)), rng.normal(0, .012, (22, 3)), rng.uniform(0, 2 * np.pi, (2, 22, 3))
    wobble = tilt + drift * np.sin(phase[0] + (1.5 + phase[1] / 4) * t[:, None, None])                       # n j 3
    bones = np.zeros((n, len(lengths), 3))
    yaw, pitch = plan["yaw"], plan["pitch"] + style.lean
    roll = style.sway * np.sin(1.3 * t + phase[0, 0, 0])
    for j, (*direction, share) in TRUNK[skeleton.name].items():
        bones[:, j] = _rotation(yaw, share * pitch, share * roll) @ np.array(direction)
    left, ahead = (np.stack([np.cos(yaw), 0 * yaw, -np.sin(yaw)], -1), np.stack([np.sin(yaw), 0 * yaw, np.cos(yaw)], -1))
    feet = plan["feet"]
    stride = ((feet[1] - feet[0])[:, [0, 2]] * ahead[:, [0, 2]]).sum(-1)      # right foot in front: the left arm swings forward
    frame = _rotation(yaw, .4 * pitch, roll)                                  # arms hang in a deep bow
    for arm, (name, out) in enumerate((("l", 1), ("r", -1))):
        swing = .55 * style.amplitude * out * stride * free[arm]
        for bone, (elevation, azimuth) in (("elbow", np.deg2rad(angles[arm, :, :2]).T), ("wrist", np.deg2rad(angles[arm, :, 2:]).T)):
            d = np.stack([out * np.sin(elevation) * np.sin(azimuth), -np.cos(elevation), np.sin(elevation) * np.cos(azimuth)], -1)
            d[:, 2] += swing * (1 if bone == "elbow" else 1.2)
            d[:, 1] += swing * .6 * plan["running"] * (bone == "wrist")
            bones[:, index[f"{name}_{bone}"]] = np.einsum("nij,nj->ni", frame, d)
    bones = _unit(bones + wobble[:, :len(lengths)] + 1e-9)
    # pelvis: as high as standing, but never out of a foot's reach
    ankle_height = .04 + .05 * (skeleton.name == "t2m")
    thigh, shank = lengths[index["l_knee"]], lengths[index["l_ankle"]]
    hips = [lengths[index[f"{s}_hip"]] * bones[:, index[f"{s}_hip"]] for s in "lr"]                          # from the root
    ground = np.stack([plan["x"] + plan["shift"] * left[:, 0] - plan["back"] * ahead[:, 0],
                       plan["z"] + plan["shift"] * left[:, 2] - plan["back"] * ahead[:, 2]], -1)
    limit = np.full(n, np.inf)
    for foot, hip in zip(feet, hips):
        flat = ((ground + hip[:, [0, 2]] - foot[:, [0, 2]]) ** 2).sum(-1)
        limit = np.minimum(limit, foot[:, 1] + np.sqrt(np.maximum(.992 ** 2 - flat, .3)) - hip[:, 1])
    height = np.minimum(.968 - hips[0][:, 1] + plan["drop"], limit)
    reach = max(1, round(.08 * (n - 1) / t[-1]))
    padded = np.pad(height, 2 * reach, mode="edge")
    lowest = np.min([padded[k:k + n + 2 * reach] for k in range(2 * reach + 1)], 0)
    height = np.mean([lowest[k:k + n] for k in range(2 * reach + 1)], 0) + ankle_height + plan["air"]
    root = np.stack([ground[:, 0], height, ground[:, 1]], -1)
    # legs: two-bone solution, knees point ahead and a little outwards; toes drop while a foot is in the air
    for (name, out), foot, hip in zip((("l", 1), ("r", -1)), feet, hips):
        ankle = foot[:, :3] + np.stack([0 * t, ankle_height + plan["air"], 0 * t], -1)
        line = ankle - root - hip
        distance = np.minimum(np.linalg.norm(line, axis=-1, keepdims=True), .9995 * (thigh + shank))
        line = _unit(line)
        pole = ahead + .12 * out * left + [0, .25, 0]
        pole = _unit(pole - (pole * line).sum(-1, keepdims=True) * line)
        along = (thigh ** 2 - shank ** 2 + distance ** 2) / (2 * distance)
        knee = along * line + np.sqrt(np.maximum(thigh ** 2 - along ** 2, 0)) * pole
        bones[:, index[f"{name}_knee"]] = _unit(knee)
        bones[:, index[f"{name}_ankle"]] = _unit(distance * line - knee)
        angle, down = foot[:, 3] + out * .12 + tilt[0, 0], np.arcsin(np.clip(1.2 * foot[:, 1] + 1.2 * plan["air"], 0, .6))
        toe = index[f"{name}_toe"]
        for j, base in ((toe, .50 if skeleton.name == "t2m" else .10), (toe - 1, .75))[:1 + (skeleton.name == "kit")]:
            bones[:, j] = np.stack([np.sin(angle) * np.cos(base + down), -np.sin(base + down), np.cos(angle) * np.cos(base + down)], -1)
    joints = np.zeros((n, len(lengths), 3))
    joints[:, 0] = root
    for j in range(1, len(lengths)):
        joints[:, j] = joints[:, skeleton.parents[j]] + lengths[j] * bones[:, j]
    joints[..., 1] -= joints[..., 1].min()
    return (joints * skeleton.leg).astype(np.float32)


# ---- 4. The data set ----------------------------------------------------------------------------------------------------

@dataclass
class SyntheticClip:
    """One clip: joints (t j 3) in the skeleton's units; captions, tokens ('lemma/POS') and attributes go together, the first
    caption names every attribute. tags: "unseen_wording", "unseen_combination" (test split only)."""
    name: str
    joints: np.ndarray
    captions: list
    tokens: list
    attributes: list
    subject: str
    split: str
    tags: tuple
    actions: tuple


def _is_unseen(parts):
    return any(all(_merged(part).get(k) == v for k, v in rule.items()) for part in parts for rule in UNSEEN)


def make_clip(domain, index, skeleton, *, seed=0, gaps=("actions", "wording", "style")):
    """Clip number `index` of a domain; it does not depend on any other clip. See build."""
    number = DOMAINS[domain]
    mix, dialect, style = (number if gap in gaps else SOURCE for gap in ("actions", "wording", "style"))
    rng = np.random.default_rng([VERSION, seed, number, index])
    subject = index % SUBJECTS
    split = "train" if subject < TRAIN_SUBJECTS else "val" if subject < TRAIN_SUBJECTS + VAL_SUBJECTS else "test"
    parts = _draw_parts(rng, mix)
    while split != "test" and _is_unseen(parts):
        parts = _draw_parts(rng, mix)
    reserved = split == "test" and rng.random() < .2
    captions, tokens, attributes = [], [], []
    wanted = int(rng.integers(2, 5))
    for k in range(12):
        told = (_vague(rng, parts) if k and rng.random() < .55 else None) or parts
        # a few source captions borrow the target's words, so that no word of the target is a word never read
        borrowed = dialect == SOURCE and number == SOURCE and rng.random() < .04
        caption, words = _caption(rng, told, TARGET if borrowed else dialect, reserved)
        if caption not in captions and len(captions) < wanted:
            captions, tokens, attributes = captions + [caption], tokens + [words], attributes + [_asked(told)]
    manner = _style(seed, number, subject, style)
    rows, timed = _plan(rng, parts, manner)
    frames = rows if skeleton.fps == ROWS_FPS else 4 * round(rows / ROWS_FPS * skeleton.fps / 4)
    joints = _joints(rng, timed, manner, skeleton, np.arange(frames + 1) / skeleton.fps)
    tags = ("unseen_wording",) * reserved + ("unseen_combination",) * _is_unseen(parts)
    return SyntheticClip(f"{domain}-{index:05d}", joints, captions, tokens, attributes, f"{domain}-{subject:02d}", split, tags,
                         tuple(action for part in parts for action, _ in part))


def build(domain, skeleton, *, seed=0, clips=None, gaps=("actions", "wording", "style"), leave_out=()):
    """The embedded data of a domain: list of SyntheticClip.

    domain      "humanml3d" (source) or "kit" (target); the skeleton is chosen independently: `T2M` (20 fps) or `KIT` (12.5 fps)
    clips       how many (default 2400 source, 2000 target); a clip's bytes do not depend on it
    gaps        which differences the target keeps: "actions" (mix), "wording" (dialect), "style" (slower, wider, arms out)
    leave_out   actions whose clips are left out, in every split: clips, parts of sequences and captions alike
    Raises ValueError for unknown names.
    """
    if domain not in DOMAINS or set(leave_out) - set(ACTIONS) or set(gaps) - {"actions", "wording", "style"}:
        raise ValueError(f"unknown domain, action or gap: {domain!r}, leave_out {leave_out!r}, gaps {gaps!r}")
    clips = clips or (2400, 2000)[DOMAINS[domain]]
    made = (make_clip(domain, index, skeleton, seed=seed, gaps=gaps) for index in range(clips))
    return [clip for clip in made if not set(clip.actions) & set(leave_out)]
