"""The words of the embedded data: captions of a plan in two dialects, with exact lemmas and parts of speech.

The source speaks like HumanML3D ("a person is waving the left hand"), the target like KIT-ML ("A human waves
with his left arm."). A caption is made of phrases, phrases have slots, and a slot says one attribute; a vague
caption leaves details out of the words AND out of the attributes it comes with, so that attributes are always
exactly what the words ask for.
"""

import re

from common.embedded.english import conjugate

SOURCE, TARGET = 0, 1

# For each action the phrases of the source and, below, of the target, separated by ';'. The last one is kept
# for the test split ("unseen wording"). [verb] is conjugated; {slot} is filled from SLOTS, or stays empty
# when the caption drops that detail.
_TABLE = """
walk
    [walk] {travel} {speed}; [walk] {speed} {travel}; [step] {travel} {speed}
    [walk] {travel} {speed}; [walk] {speed} {travel}; [go] {travel} {speed}
walk_back
    [walk] {travel}; [move] {travel}; [step] {travel}
    [go] {travel}; [walk] {travel}; [step] {travel}
sidestep
    [step] {travel}; [walk] sideways {travel}; [step] sideways {travel}
    [step] sideways {travel}; [go] sideways {travel}; [walk] {travel} sideways
walk_diagonal
    [walk] diagonally {travel} {drift}; [walk] {travel} diagonally {drift}; [step] diagonally {travel} {drift}
    [walk] diagonally {travel} {drift}; [go] diagonally {travel} {drift}; [go] {travel} diagonally {drift}
run
    [run] {travel}; [jog] {travel}; [sprint] {travel}; [run] straight {travel}
    [run] {travel}; [sprint] {travel}; [jog] {travel}
jog_back
    [jog] {travel}; [run] {travel}; [jog] straight {travel}
    [jog] {travel}; [run] {travel}; [sprint] {travel}
walk_turn
    [walk] and [turn] {turn} {angle}; [walk] and [turn] {angle} {turn}; [step] and [turn] {turn} {angle}
    [walk] a curve {turn} {angle}; [go] {angle} {turn} in a curve; [walk] {angle} {turn} in a curve
turn_in_place
    [turn] {turn} {angle} {spot}; [spin] {turn} {angle} {spot}; [turn] {angle} {turn} {spot}
    [turn] {angle} {turn} {spot}; [rotate] {angle} {turn} {spot}; [rotate] {turn} {angle} {spot}
march
    [march] {spot}; [march] with high knees {spot}; [walk] with high knees {spot}
    [march] {spot}; [step] with high knees {spot}; [march] with high knees {spot}
jump
    [jump] {count}; [jump] up and down {count}; [jump] up {count}
    [jump] {count}; [perform] {jumps}; [jump] up {count}
hop
    [hop] {count} {foot}; [hop] {foot} {count}; [jump] {foot} {count}
    [hop] {count} {foot}; [hop] {foot} {count}; [jump] {foot} {count}
squat
    [squat] {count}; [do] {squats}; [squat] down {count}
    [perform] {squats}; [squat] {count}; [do] {squats}
bow
    [bow] {count}; [do] {bows}; [bow] down {count}
    [bow] {count}; [do] {bows}; [perform] {bows}
kick
    [kick] {leg} {count}; [do] {kicks} {leg}; [kick] {count} {leg}
    [kick] {count} {leg}; [perform] {kicks} {leg}; [kick] {leg} {count}
stomp
    [stomp] {leg} {count}; [do] {stomps} {leg}; [stomp] {count} {leg}
    [stomp] {count} {leg}; [perform] {stomps} {leg}; [stomp] {leg} {count}
raise
    [raise] {hands} {count}; [lift] {hands} {count}; [hold] {hands} up {count}
    [lift] {hands} {count}; [raise] {hands} up {count}; [hold] up {hands} {count}
wave
    [wave] {hands}; [greet] with {hands}; [wave] with {hands}
    [wave] with {hands}; [greet] with {hands}; [wave] {hands}
clap
    [clap]; [clap] both hands; [clap] with both hands
    [clap] both hands; [clap]; [clap] with both hands
stretch
    [stretch] both arms out; [hold] both arms out; [stretch] out both arms
    [stretch] both arms sideways; [hold] both arms out sideways; [stretch] out both arms sideways
punch
    [punch] with {hands} {count}; [do] {punches} with {hands}; [punch] {count} with {hands}
    [punch] with {hands} {count}; [perform] {punches} with {hands}; [punch] {count} with {hands}
"""
_lines = _TABLE.strip().splitlines()
PHRASES = {action: tuple([phrase.strip() for phrase in line.split(";")] for line in lines)
           for action, *lines in zip(_lines[::3], _lines[1::3], _lines[2::3])}


def _sided(pattern, **others):
    return {side: pattern.format(side) for side in ("left", "right")} | others


# slot: (attributes that fill it, source words, target words); a value that is not listed is not spoken of
NOUNS = {"jump": "jumps", "squat": "squats", "bow": "bows", "kick": "kicks", "stomp": "stomps",
         "punch": "punches"}
SLOTS = {
    "travel": ("travel", _sided("to the {}", forward="forward", backward="backwards"),
               _sided("to the {} side", forward="straight ahead", backward="in reverse")),
    "spot": ("travel", {"none": "in place"}, {"none": "on the spot"}),
    "speed": ("speed", {"slow": "slowly", "fast": "quickly"},
              {"slow": "at low speed", "fast": "at high speed"}),
    "drift": ("drift", _sided("to the {}"), _sided("to the {} side")),
    "turn": ("turn", _sided("{}/ADV"), {"left": "counterclockwise", "right": "clockwise"}),
    "angle": ("angle", {90: "ninety degrees", 180: "all the way around"},
              {90: "by 90 degrees", 180: "by 180 degrees"}),
    "count": ("count", {1: "once", 2: "twice", 3: "three times"},
              {1: "one time", 2: "two times", 3: "three times"}),
    "foot": ("hop", _sided("on the {} leg", any="on one leg"), _sided("on the {} foot", any="on one foot")),
    "leg": ("kick stomp", _sided("with the {} leg"), _sided("with the {} foot")),
    "hands": ("raise wave punch", _sided("the {} hand", both="both hands", any="a hand"),
              _sided("his {} arm", both="both arms", any="one arm")),
}
for _noun, _plural in NOUNS.items():
    _forms = {1: f"one {_noun}/NOUN", 2: f"two {_plural}/NOUN", 3: f"three {_plural}/NOUN"}
    SLOTS[_plural] = ("count", _forms, _forms)
ACTORS = (("a person", "a person", "someone", "a man", "the person"),
          ("A human", "A human", "A human", "A person"))
PAIRS = (("{0} while {1-ing}", "{0} and {1} at the same time"),
         ("{1} while {0-ing}", "{0} and {1} meanwhile"))
SEQUENCES = (("{0} and then {1}", "{0} before {1-ing}"), ("{0}, then {1}", "first {0}, then {1}"))

# parts of speech of all words but the verbs; word/POS in a phrase is the exception
POS = {word: pos for pos, words in {
    "DET": "a the both", "PRON": "someone his", "AUX": "is", "CCONJ": "and",
    "ADJ": "left right low high same",
    "NUM": "ninety 90 180 one two three", "ADP": "to in on at by with while before",
    "NOUN": "person man human curve place spot speed degrees time times leg foot hand hands arm arms knees "
            "side reverse way",
    "ADV": "forward backwards straight ahead sideways diagonally slowly quickly all around once twice up "
           "down out then first meanwhile clockwise counterclockwise"}.items() for word in words.split()}
LEMMAS = {"degrees": "degree", "times": "time", "hands": "hand", "arms": "arm", "knees": "knee"}
LEMMAS |= {plural: noun for noun, plural in NOUNS.items()}


def _word(word):
    """(word, lemma, part of speech) of a word that is not a verb."""
    word, _, pos = word.partition("/")
    plain = word.strip(",").lower()
    return word, LEMMAS.get(plain, plain), pos or POS[plain]


def _phrase(template, attributes, dialect, form):
    """Words of a phrase with their lemmas and parts of speech; form: "present", "ing" or "progressive" (is
    walking)."""
    def fill(match):
        keys, *tables = SLOTS[match[1]]
        values = [attributes[key] for key in keys.split() if key in attributes]
        return tables[dialect].get(values[0], "") if values else ""

    out = []
    for word in re.sub(r"\{(\w+)\}", fill, template).split():
        if word.startswith("["):
            verb = word.strip("[]")
            if form == "progressive" and not out:
                out.append(("is", "is", "AUX"))
            out.append((conjugate(verb, "present" if form == "present" else "ing"), verb, "VERB"))
        else:
            out.append(_word(word))
    return out


def caption(rng, parts, dialect, reserved):
    """One caption of the parts of a clip (see movements.py) -> (text, tokens 'lemma/POS').

    reserved: use the phrases that are kept for the test split.
    """
    phrases = []
    for action, attributes in (movement for part in parts for movement in part):
        *choices, unseen = PHRASES[action][dialect]
        if "count" not in attributes:                   # "three jumps" has no form without its number
            plurals = tuple("{" + plural + "}" for plural in NOUNS.values())
            choices = [p for p in choices if not any(plural in p for plural in plurals)]
            unseen = choices[0] if any(plural in unseen for plural in plurals) else unseen
        phrases.append((unseen if reserved else choices[rng.integers(len(choices))], attributes))
    frames = ("{0}",) if len(phrases) == 1 else (PAIRS if len(parts) == 1 else SEQUENCES)[dialect]
    frame = frames[rng.integers(len(frames))]
    words = [_word(w) for w in ACTORS[dialect][rng.integers(len(ACTORS[dialect]))].split()]
    form = "progressive" if dialect == SOURCE and rng.random() < .5 else "present"
    for piece in frame.split():
        match = re.fullmatch(r"\{(\d)(-ing)?\}(,?)", piece)
        if match is None:
            words.append(_word(piece))
            continue
        words += _phrase(*phrases[int(match[1])], dialect, "ing" if match[2] else form)
        words[-1] = (words[-1][0] + match[3], *words[-1][1:])
        form = "ing" if form == "progressive" else form             # "is walking and waving"
    stop = "." if dialect == TARGET or rng.random() < .5 else ""
    return " ".join(w for w, _, _ in words) + stop, [f"{lemma}/{pos}" for _, lemma, pos in words]


_SIDES = ("turn", "raise", "wave", "punch", "kick", "stomp", "hop")
_DETAILS = ("speed", "angle", "count", "drift", *_SIDES)
# dropping the direction of these leaves a sentence that a reader still understands
_ANY_DIRECTION = ("walk", "run", "turn_in_place", "march")


def vague(rng, parts):
    """The parts with one or two details left out; of a side, "any" remains. None if there is nothing to leave
    out."""
    places = [(p, m, key) for p, part in enumerate(parts) for m, (action, attributes) in enumerate(part)
              for key in attributes if key in _DETAILS or (key == "travel" and action in _ANY_DIRECTION)]
    if not places:
        return None
    parts = [[(action, dict(attributes)) for action, attributes in part] for part in parts]
    for i in rng.permutation(len(places))[:1 + (rng.random() < .3)]:
        p, m, key = places[i]
        attributes = parts[p][m][1]
        del attributes[key]
        if key in _SIDES:
            attributes[key] = "any"
    return parts
