"""Novel text prompts without a language model: captions -> meta motions -> new combinations.

InstructMotion (Mao et al. 2024, arXiv 2405.15541, section 4.2 and Fig. 3) lets a language model split
captions into meta motions, recombines them at random, has a person remove what nobody could do, and adds
parts of speech. Here rules do all of it, and a seed fixes the outcome:

1. decompose   captions -> phrases whose subject is "a person", with what the oracle can check in them
2. compose     two or three of them in turn, "{A} then {B}", or at once, "{A} while {B-ing}", "{A} and {B}"
3. filter      (the paper's person) no verb twice, only who is down gets up, at once only hands and feet
4. tags        lemma/POS of every word, as in the text files of the data sets
5. split       train | retained test, by PAIRS of meta motions

The rules throw away rather than guess: a part that they do not understand costs data, a wrong one quality.

    python -m common.compose captions.txt --count 2000 --seed 0 --show 20 --out novel.txt
"""

import argparse
import re
import zlib
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import InputError, datasets, generator, mix
from common.embedded import wording
from common.embedded.oracle import COUNTED, caption_attributes, one_counterclockwise
from common.runs import atomic_write, run_main


class MetaMotion(NamedTuple):
    """One movement in words."""
    text: str               # without subject, third person: "slowly walks forward with both arms raised"
    key: str                # its lemmas, which say whether two meta motions are the same
    attributes: dict        # for the oracle; {} = nothing that can be checked


class Prompt(NamedTuple):
    """A sentence that no caption of the data says."""
    caption: str
    tokens: list            # of 'lemma/POS'
    attributes: dict
    parts: tuple            # keys of its meta motions, in their order


# ---- 1. Verbs ----------------------------------------------------------------------------------------------

# what a person can be asked to do out of nothing; verb:past where the past is irregular
_MOTIONS = """
act aim amble applaud approach attack backstep balance beat beckon bend:bent block bounce bow box
bring:brought brush catch:caught charge check cheer circle clap clasp clean climb comb come:came conduct
cook crawl creep:crept cross crouch curl curtsy cut:cut dance dart dash dig:dug dive do:did dodge drag
draw:drew dribble drink:drank drive:drove drum duck eat:ate evade exercise extend face fall:fell fence
fight:fought flap flex fling flip fold follow gallop gesticulate gesture get:got glance glide go:went grab
greet guide hammer hit:hit hobble hold:held hop hug hunch hurry imitate inspect jab jog juggle jump kick
kickbox kneel:knelt knock lead:led lean leap lie:lay lift limp look lunge lurch make:made march meander mime
mimic mix motion move nod open pace paint pass pat perform pet pick pirouette pitch pivot place play point
pose pour practice pray press pretend prance pull punch push put:put race raise reach read rise:rose rock
roll rotate row rub run:ran salute scratch scrub search shadowbox shake:shook shield shimmy shiver
shoot:shot shove shrug shuffle sidestep sing:sang sit:sat skate skip slap slash slide:slid slip slouch smack
sneak sniff spin:spun spread:spread sprint squat squeeze stagger stamp stand:stood step stir stomp stoop
strafe stretch stride stroke stroll strum strut stumble sway sweep:swept swim:swam swing:swung swipe swivel
take:took talk tap teeter throw:threw tilt tiptoe toss touch trip trot try tumble turn twirl twist type use
vault waddle walk waltz wander warm wash wave whirl wiggle wipe wobble wrap wring write:wrote yawn zigzag
""".split()
# verbs that make no sense without what came before, or that say nothing about a movement
_BOUND = """
accelerate adjust alternate appear assume avoid begin:began bump carry change close compensate complete
continue counterbalance decelerate drop end enter execute feel:felt finish fix give:gave halt hesitate
interact keep:kept land lay leave listen lose:lost lower need pause prepare proceed react recover regain
relax release remain remove repeat reset resume return revert see:saw seem set:set shift show slow speed
start stay stop straighten struggle support switch tie wait want watch wear work""".split()
_PAST = dict(verb.split(":") for verb in _MOTIONS + _BOUND if ":" in verb)


def conjugate(verb, form):
    """English form of a verb: "base" (walk), "present" (walks), "ing" (walking) or "past" (walked)."""
    # one short vowel before one consonant: the consonant is doubled (stepping, squatting; but boxing, bowing)
    double = verb[-1] if re.fullmatch(r"(side|back)?(qu|[^aeiou])*[aeiou][^aeiouwxy]", verb) else ""
    stem = verb[:-1] + "i" if re.search(r"[^aeiou]y$", verb) else verb          # tries, tried
    if form == "present":
        return stem + ("es" if stem != verb or re.search(r"([cs]h|[sxzo])$", verb) else "s")
    if form == "past":
        return _PAST.get(verb, stem + ("d" if verb.endswith("e") else double + "ed"))
    if form == "ing":                                                           # lying, dancing, tiptoeing
        return (verb[:-2] + "y" if verb.endswith("ie") else re.sub(r"(?<![eo])e$", "", verb) + double) + "ing"
    return verb


def _forms(verbs):
    """word -> (verb, form); where two forms agree ("put"), the later one counts."""
    return {conjugate(verb, form): (verb, form)
            for form in ("base", "past", "ing", "present") for verb in verbs}


BOUND = {verb.partition(":")[0] for verb in _BOUND}
VERBS = _forms([verb.partition(":")[0] for verb in _MOTIONS] + sorted(BOUND))
_NO_VERB = ("", "")


# ---- 2. Words ----------------------------------------------------------------------------------------------

# Frequent misspellings of KIT-ML and HumanML3D are corrected. Other words that a list of so many captions
# holds only once are more often misspelt than rare: their parts are not used.
LONG_LIST = 500
SPELLING = dict(pair.split(":") for pair in """
perfoms:performs performes:performs rigth:right quater:quarter foward:forward forwads:forward forwad:forward
foreward:forward doges:dodges guitare:guitar guitarre:guitar violine:violin hight:height walkes:walks
joggs:jogs streching:stretching whiping:wiping laying:lying peron:person somone:someone squad:squat
degress:degrees trurns:turns kneeing:kneeling jesture:gesture approximatly:approximately""".split())
_SUBJECT = re.compile(
    r"(?:(?:an?|the|one|this) )?(?:standing )?(?:(?:stick|human) (?=figure|person|man))?"
    r"(?:persons?|human|man|woman|character|someone|somebody|subject|figure|individual|guy|boy|girl|sim|he|"
    r"she|they)(?= |$)")
_ORDER = {"then", "after that", "before", ";", "."}                 # one after the other
_SEPARATOR = re.compile(r" (then|after that|before|;|\.|while|whilst|meanwhile|at the same time)(?= )")
_JOINT = re.compile(r" ((?:and|but|,)(?: (?:and|but|,))*)(?= |$)")
_BE = {"is", "are", "was", "were"}
_ASPECT = {"start", "begin", "proceed", "appear", "seem"}           # "starts to walk" is "walks"
_TIMES = set("first firstly then next finally lastly afterwards eventually subsequently now just "
             "immediately meanwhile simultaneously also initially".split())    # only order what is split
_ADVERBS = {"fast", "forward", "backwards", "sideways"}             # before a verb, besides those in -ly
_IDLE = set("box cross face open place point press row type".split()) | BOUND  # mostly other words than verbs
_LIGHT = {"do", "perform", "practice", "make", "take"}              # "does two kicks": the noun is the motion
_COUNTABLE = set("bounce bow circle dance hop jump kick lift lunge move pace pull punch push roll run "
                 "sidestep spin squat step stomp stretch stride stroke swing throw turn twist walk "
                 "wave".split())
_COUNTS = {word: left for left, words in {                          # so many words on, a noun may come
    0: "times", 1: "the both his her their its", 3: "a an one two three four five six seven eight few some "
    "several many multiple of with in for by every little"}.items() for word in words.split()}
_NOUNS = set("motion motions movement movements jack jacks position pose stance action actions gesture "
             "exercise exercises steps".split())                    # "walking motion" is a noun, not a verb
_OBJECT = set("bring catch do extend get grab guide hit hold imitate lift make mimic pass perform pet pick "
              "place open practice pull push put raise shake swing take touch use".split())
_PARTICLES = set("up down out forward forwards back around in off over slowly quickly".split())
_DANGLING = set("a an the and or but with of to from at for by into onto as than like towards toward in on "
                "his her their its both some few couple through against between if very while above hold "
                "grab take bring put pick raise make use do get open".split())
_HURTS = {"push", "shove", "hit", "knock", "attack", "pull"}        # "a person pushed from behind" is passive

# what a part must not hold, by the reason that is reported
_REFUSED = {reason: re.compile(rf"\b(?:{pattern})\b") for reason, pattern in {
    "negation": r"not|no|never|without|cannot|nothing|instead",
    "passive": r"being|been|(?:is|are|was|were|gets?|getting|got) (?:\w+ly )?(?:\w+ed|hit|hurt)",
    "refers back":
        r"it|them|him|again|another|others?|same|these|those|that|this|so|there|here|each|more|too|further|"
        r"original|initial|previous|opposite|rest of|afterwards|simultaneously|finally|later|our|us|my|your|"
        r"red|blue|screen|to (?:recover|regain|return)|"
        r"back (?:to|down|up|in|into|on|onto|out|from|and(?! forth))|"
        r"(?:walk|goe?|run|jog|come?|turn|sit|stand|move?|bring|put|place?|head)(?:s|n?ing)? back|"
        r"(?:puts|places|brings) .*(?:down|back)|"
        r"start(?:ing)? (?:point|position|place|pose|stance|spot|location)|"
        r"the (?:objects?|items?|thing|box|ball|cup|first|second|last|beginning|jumps|motions?)",
    "clause":
        r"who|which|what|where|when|why|how|because|since|until|till|after|although|though|(?<!as )if|"
        r"as(?! if)|or|looks (?:like|as|to)|he|she|they|would|could|can|will|than|during|whether|either|are|"
        r"is|was|were|has|had|have|did|probably|maybe",
    "grammar":                          # slips of the annotators that recur
        r"(\w+) \1|an [^aeiouh\W\d]\w*|(?:to|at|in|into) (?:to|towards?|at|into|of)|some thing|"
        r"(?:his|their) (?:both|air)|two the|the times|grabbed|makes up|to forward|does across|infront|"
        r"[b-sv-z] \w+|(?<!a )little bit|takes (?:his|their)|\w+s (?:object|ball|item|step)|"
        r"(?:step|stand|dance)s (?:his|their|an)|the (?:turn|walk|move|stop)s|"
        r"(?:an?|the|in|large|larger|small) (?:counter)?clockwise$|"
        r"an? (?!few|couple|bit|lot|series)(?:\w+ )?steps|"
        r"(?:with|around|by|pushes) (?:his|their|the) (?:left|right)$|(?:does|performs) some(?:thing| kind)|"
        r"(?:left|right) (?:food|feet)|both (?:hand|arm|leg|foot|feed)|(?:makes|does|performs) u|(?:casual|"
        r"horizontal)$|(?:two|three|four|few|\d) step|a \d+ degrees",
}.items()}


# ---- 3. From a caption to its parts ------------------------------------------------------------------------

class _Head(NamedTuple):
    """The verb of a part."""
    lemma: str
    form: str
    at: int                 # number of its word
    adverbs: list           # the words before it that stay
    named: bool             # the part names its subject


def _head(words, verbs, bare=True):
    """The _Head of a part, or None: [subject] [is] [adverbs] [starts to] verb ...

    bare: a verb without ending needs no subject ("then walk"). At the start of a caption it does, where it is
    as often a noun ("squat motion").
    """
    subject = _SUBJECT.match(" ".join(words))
    at = len(subject[0].split()) if subject else 0
    adverbs, be, shape = [], False, ""
    while at < len(words):
        word, following = words[at], " ".join(words[at + 1:at + 2])
        lemma, form = verbs.get(word, _NO_VERB)
        if lemma in _ASPECT and (following == "to" or verbs.get(following, _NO_VERB)[1] == "ing"):
            at += 1 + (following == "to") + (words[at + 2:at + 3] == ["be"])
            shape = shape or form                               # "starts to walk" is as finite as "walks"
        elif word in _BE or word in _TIMES:
            be = be or word in _BE
            at += 1
        elif lemma:
            form = shape or form
            wrong = be and form != "ing" or form == "base" and not (subject or bare)
            return None if wrong else _Head(lemma, form, at, adverbs, bool(subject))
        elif word.endswith("ly") or word in _ADVERBS:
            adverbs.append(word)
            at += 1
        else:
            return None
    return None


def _starts_part(words, before, comma, verbs):
    """Whether what follows "and" or a comma is a part of its own, and not "left AND RIGHT"."""
    head, first = _head(words, verbs), _head(before, verbs)
    if head is None or first is None or head.named:
        return head is not None
    if head.form == "present":                      # but "does squats and kicks" goes on with a noun
        return first.lemma not in ("do", "perform") or words[head.at + 1:head.at + 2] not in ([], ["with"])
    if head.form == "ing":
        return comma or first.form == "ing" or words[0] in _BE
    if head.form == "past":
        return first.form == "past" or "with" not in before
    return comma or first.form == "base" or before[first.at - 1:first.at] == ["to"]


def _split(caption, verbs):
    """(parts of a caption as lists of words, whether each follows the one before in time)."""
    found = re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*|[^\s\"]", caption.lower())
    text = " ".join(SPELLING.get(word, word) for word in found).rstrip(" .!")
    text = one_counterclockwise(text)
    pieces = _SEPARATOR.split(f" {text} ")
    parts, ordered = [], set(pieces[1::2]) <= _ORDER
    for piece in pieces[::2]:
        chunks, new = ["", *_JOINT.split(f" {piece.strip()}")], []
        for joint, chunk in zip(chunks[::2], chunks[1::2]):
            words = chunk.split()
            while words and words[0] in _TIMES:
                words.pop(0)
            if words and (not new or _starts_part(words, new[-1], "," in joint, verbs)):
                new.append(words)
            elif words:
                new[-1] += joint.split() + words
        parts += new
        ordered = ordered and len(new) < 2
    return parts, ordered


def _two_verbs(words, head, verbs):
    """Whether a second verb follows the head, and not the noun in "takes a few large STEPS"."""
    light = head.lemma in _LIGHT
    noun = 3 if light else 0
    for n, word in enumerate(words[head.at + 1:], head.at + 1):
        lemma, form = verbs.get(word, _NO_VERB)
        asked = {"to", "with", "by"} & set(words[:n])           # "bends to pick and throw", "with legs bent"
        if form == "present" and not (noun and lemma in _COUNTABLE) or \
                form == "base" and not (noun or asked or lemma in _IDLE and words[n - 1] != "and") or \
                form in ("past", "ing") and words[n - 1] == "and" and not asked:
            return True
        noun = 3 if word.isdigit() or light and word == "and" else \
            _COUNTS.get(word, 0 if form == "present" else max(noun - 1, 0))
    return False


def _incomplete(words, head):
    """Whether something is missing: "raises to", "takes and upper cut", "goes", "uses both hands"."""
    rest = words[head.at + 1:]
    after = rest[0] if rest else ""
    if words[-1] in _DANGLING or after == "and":
        return True
    if head.lemma in _OBJECT and (set(rest) <= _PARTICLES or after in ("to", "with", "for", "towards")
                                  or after.endswith("ing") and "thing" not in after):
        return True
    if head.lemma in ("use", "try"):
        return not {"to", "for"} & set(rest)
    return head.lemma in ("go", "come") and not rest or \
        head.lemma == "get" and after not in ("up", "down", "on", "into", "onto")


def _worded(words, head, his):
    """Text of a meta motion: third person, one gender; a pronoun in upper case is known to be the person."""
    him, himself = {"his": ("HIM", "himself"), "their": ("THEM", "themselves")}[his]
    turn = r"(?:\w+ )?(?:turn|curve|jump|rotation|bend|arc|angle|corner|spin)"
    text = " ".join([*head.adverbs, conjugate(head.lemma, "present"), *words[head.at + 1:]])
    for pattern, new in (
            (r"\b(front of|behind|around|beside|above) (?:him|them|her(?= and|$))(?= |$)", rf"\1 {him}"),
            (r"\b(?:him|her|it|them|their)sel(?:f|ves)\b", himself),
            (r"\b(?:his|her|its|their)\b(?= \w)", his),
            (r"\bto (left|right)$", r"to the \1"),
            (rf"\b(\d+) degree\b(?! {turn})", r"\1 degrees"), (rf"\b(\d+) degrees(?= {turn})", r"\1 degree")):
        text = re.sub(pattern, new, text)
    return text


def _phrase(words, verbs, bare, his):
    """(text of a meta motion, its _Head, "") of a part, or a tuple that ends in why it is not used."""
    said = " ".join(words)
    refused = next((reason for reason in ("negation", "passive") if _REFUSED[reason].search(said)), "")
    head = _head(words, verbs, bare)
    if refused or head is None or head.form == "ing" and set(words[head.at + 1:head.at + 2]) & _NOUNS:
        finite = any(verbs.get(word, _NO_VERB)[1] == "present" for word in words)
        return "", None, refused or ("unknown subject" if finite and not _SUBJECT.match(said) else "no verb")
    text = _worded(words, head, his)
    checks = {
        "needs a context": head.lemma in BOUND,
        "passive": head.form == "past" and head.lemma in _HURTS,
        **{reason: pattern.search(text) for reason, pattern in _REFUSED.items() if reason != "passive"},
        "punctuation": re.search(r"[^\w\s-]", text),
        "two verbs": _two_verbs(words, head, verbs),
        "incomplete": _incomplete(words, head),
        "length": len(text.split()) > 10}                           # 12 with "a person"
    return text.lower(), head, next((reason for reason, wrong in checks.items() if wrong), "")


def usual_words(captions):
    """("a human", "his"): the subject and the possessive that most captions use."""
    captions = [" ".join(datasets.words(caption)) for caption in captions]
    subjects = Counter(match[0] for match in map(_SUBJECT.match, captions) if match and " " in match[0])
    his = Counter(word for caption in captions for word in caption.split() if word in ("his", "their"))
    return (max(sorted(subjects), key=subjects.get, default="a person"),
            "his" if his["his"] > his["their"] else "their")


def _rare(captions, verbs):
    """Words that a long list holds once and that nobody knows; a mirrored caption is no second time."""
    sideless = {re.sub(r"\b(left|right|(counter)?clockwise)\b", "", caption) for caption in captions}
    counts = Counter(word for caption in sideless for word in set(re.findall(r"[\w-]+", caption)))
    return {word for word, count in counts.items() if count == 1 and len(captions) >= LONG_LIST
            and not (word in verbs or word in wording.POS or word.isdigit())}


def decompose(items, tags=None):
    """(caption, attributes) pairs -> (list of MetaMotion by key, Counter of what was not used and why).

    The attributes of a caption are {} (unknown), a dict for the oracle, or {"first": ..., "then": ...}. They
    belong to a meta motion where the caption is one part or two successive ones; else its own words are
    asked. tags: of word_tags; what the data tags as a verb is one here too. "nothing left" counts captions,
    the other reasons count parts.
    """
    tags, captions = tags or {}, defaultdict(list)
    for caption, attributes in items:
        captions[" ".join(caption.lower().split())].append(attributes)
    tagged = {lemma for word, (lemma, pos) in tags.items() if pos == "VERB"
              and word in (conjugate(lemma, "present"), conjugate(lemma, "ing"))}
    verbs = _forms(sorted(tagged)) | VERBS
    rare, (_, his) = _rare(captions, verbs), usual_words(captions)
    texts, known, why = defaultdict(Counter), defaultdict(list), Counter()
    for caption, given in captions.items():
        parts, ordered = _split(caption, verbs)
        found = [_phrase(words, verbs, n > 0, his) for n, words in enumerate(parts)]
        reasons = [reason or ("spelling" if rare & set(words) else "")
                   for (_, _, reason), words in zip(found, parts)]
        why.update(reason for reason in reasons if reason)
        why["nothing left"] += all(reasons)
        for n, ((text, head, _), reason) in enumerate(zip(found, reasons)):
            if reason:
                continue
            lemmas = [VERBS[word][0] if word in VERBS else tags[word][0] if word in tags
                      else wording.LEMMAS.get(word, word) for word in text.split()]
            lemmas[len(head.adverbs)] = head.lemma
            key = " ".join(lemmas)
            texts[key][text] += 1
            for attributes in given:
                halves = {"first", "then"} & attributes.keys()
                if len(parts) == 1 and attributes and not halves:
                    known[key].append(attributes)
                elif len(parts) == 2 and ordered and halves:
                    known[key].append(attributes[("first", "then")[n]])
    metas = []
    for key in sorted(texts):
        text = min(texts[key], key=lambda text: (-texts[key][text], text))
        first, *more = known[key] or [caption_attributes(f"a person {text}")]
        agreed = {name: value for name, value in first.items() if all(a.get(name) == value for a in more)}
        metas.append(MetaMotion(text, key, agreed))
    return metas, +why


# ---- 4. Compose --------------------------------------------------------------------------------------------

# Two parts are done at once only if one speaks of the feet alone and the other of the hands alone. A part
# that speaks of both, of neither or of the whole body takes its turn: so nobody walks while sitting down.
_FEET = set("""
amble backstep charge crisscross dash feet foot gallop go gait heel hop hurry jog jump kick knee leap leg
limp lunge march meander move pace pivot prance race rotate run rush sidestep skate skip sneak spin sprint
squat stair stand step stomp stride stroll strut tiptoe toe trot turn twirl waddle walk wander whirl zigzag
""".split())
_HANDS = set("""
applaud arm beckon bicep box clap conduct elbow finger fist gesture greet guitar hand jab palm piano punch
raise salute shoulder stir strum violin wave wipe wrist""".split())
_WHOLE = set("""
back bend bow cartwheel chair climb crawl crouch dance duck fall floor ground handstand jack kneel lean lie
pick roll seat sit swim waist""".split())
_LOW = {"sit", "lie", "kneel", "crawl"}
_RISES = re.compile(r"\b(?:(?:stand|get) (?:\w+ )?up|rise|from (?:an?|the) (?:kneel|sit|lie|ground|floor))\b")
_LEMMAS = {lemma for lemma, _ in VERBS.values()} - _IDLE
TOGETHER = ("{0} while {1-ing}", "{0} and {1}")
SEQUENCES = ("{0} then {1}", "{0} and then {1}")
IN_TURN = "{0}, then {1} and then {2}"
PATIENCE = 5000         # draws without a new prompt, after which few are left to be found


def _verb_at(meta):
    """Number of the verb's word: the first that is not an adverb."""
    return next(n for n, word in enumerate(meta.text.split())
                if not (word.endswith("ly") or word in _ADVERBS))


def _verbs_of(meta):
    words = meta.key.split()
    return {words[_verb_at(meta)]} | _LEMMAS & set(words)


def limbs(meta):
    """"feet" or "hands" if a meta motion speaks of these alone, else ""."""
    words = {part for word in meta.key.split() for part in (word, word.removesuffix("s"))}
    found = [name for name, table in (("feet", _FEET), ("hands", _HANDS)) if words & table]
    return found[0] if len(found) == 1 and not words & _WHOLE else ""


def _possible(metas):
    """What the person of the paper would let pass: no verb twice, and only who is down gets up."""
    if any(_verbs_of(a) & _verbs_of(b) for a, b in combinations(metas, 2)):
        return False
    return all(_verbs_of(a) & _LOW for a, b in zip(metas, metas[1:]) if _RISES.search(b.key))


def _at_once(a, b):
    both = a.attributes | b.attributes
    if "count" in both and sum(key in COUNTED for key in both) > 1:
        return False                                                # the oracle counts one action
    return {limbs(a), limbs(b)} == {"feet", "hands"} and not a.attributes.keys() & b.attributes.keys()


def _sentence(template, subject, metas, tags):
    """(caption, tokens 'lemma/POS') of a template with meta motions in it; unknown words are word/OTHER."""
    words, tokens = [], []
    for piece in [*subject.split(), *template.split()]:
        slot = re.fullmatch(r"\{(\d)(-ing)?\}(,?)", piece)
        text, verb_at = [piece], None
        if slot:
            meta = metas[int(slot[1])]
            text, verb_at = meta.text.split(), _verb_at(meta)
            verb = meta.key.split()[verb_at]
            text[verb_at] = conjugate(verb, "ing" if slot[2] else "present")
        for n, word in enumerate(text):
            for plain in datasets.words(word):
                lemma, pos = tags.get(plain) or (wording.LEMMAS.get(plain, plain),
                                                 wording.POS.get(plain, "OTHER"))
                if n == verb_at:
                    lemma, pos = verb, "VERB"
                elif pos == "VERB" and tokens[-1].endswith(("/NUM", "/DET")):
                    pos = "NOUN"                                    # "two punches", mostly a verb in the data
                elif pos == "OTHER" and VERBS.get(plain, _NO_VERB)[1] == "ing":
                    lemma, pos = VERBS[plain][0], "VERB"
                tokens.append(f"{lemma}/{pos}")
        words.append(" ".join(text) + (slot[3] if slot else ""))
    return " ".join(words), tokens


def compose(metas, count, *, seed, known=(), tags=None, three_parts=0.2, together=2 / 3, max_words=20,
            subject="a person"):
    """At most `count` Prompts of two or, with probability three_parts, three meta motions, fixed by the seed.
    Of two, a share `together` goes on at once, while such pairs are easily found; the others take turns.

    known: captions that may not come out, by their words. tags: of word_tags, for the tokens. max_words: the
    text encoders cut what is longer.
    """
    taken = {tuple(datasets.words(caption)) for caption in known}
    g, prompts, waited = generator(seed, 0, "novel prompts"), [], 0
    while len(metas) > 1 and len(prompts) < count and waited < PATIENCE:
        if waited % 50 == 0:        # one kind of sentence, until parts are found for it or seem not to exist
            three, at_once, which = torch.rand(3, generator=g).tolist()
        waited += 1
        number = 2 + (three < three_parts)
        chosen = [metas[k] for k in torch.randint(len(metas), (number,), generator=g).tolist()]
        if not _possible(chosen):
            continue
        first, then = chosen[0].attributes, chosen[1].attributes
        if number == 3:
            template, attributes = IN_TURN, {}
        elif at_once < together:
            if not _at_once(*chosen):
                continue
            # "a and b and c" would be one list
            template = TOGETHER[which < .5 and " and " not in chosen[0].text]
            attributes = first | then
        else:
            template = SEQUENCES[which < .5]
            attributes = {"first": first, "then": then} if first and then else first or then
        caption, tokens = _sentence(template, subject, chosen, tags or {})
        said = tuple(datasets.words(caption))
        if len(said) <= max_words and said not in taken:
            waited = 0
            taken.add(said)
            prompts.append(Prompt(caption, tokens, attributes, tuple(meta.key for meta in chosen)))
    return prompts


def split(prompts, retained=0.25, seed=0):
    """Prompts -> (train, retained test) such that no two meta motions meet in both.

    Each unordered pair of meta motions is drawn to one side, whatever else is in the list. A prompt of three
    parts whose pairs are on both sides belongs to neither.
    """
    sides = [], []
    for prompt in prompts:
        drawn = {mix(seed, zlib.crc32("\n".join(sorted(pair)).encode())) < retained * 2**63
                 for pair in combinations(prompt.parts, 2)}
        if len(drawn) == 1:
            sides[drawn.pop()].append(prompt)
    return sides


def word_tags(clips):
    """{word: (lemma, part of speech)} as it is mostly tagged, from captions with as many tokens as words."""
    seen = defaultdict(Counter)
    for clip in clips:
        for caption, tokens in zip(clip.captions, clip.tokens):
            words = datasets.words(caption)
            for word, token in zip(words, tokens if len(tokens) == len(words) else ()):
                lemma, slash, pos = token.rpartition("/")
                if slash:
                    seen[word][lemma, pos] += 1
    return {word: max(sorted(counts), key=counts.get) for word, counts in sorted(seen.items())}


def prompt_line(prompt):
    """A line of a text file of the data sets: caption#lemma/POS ...#0.0#0.0."""
    return f"{prompt.caption}#{' '.join(prompt.tokens)}#0.0#0.0"


# ---- 5. The whole pipeline, and its command line -----------------------------------------------------------

def write(path, prompts):
    """Write prompts to a text file, one prompt_line each, atomically."""
    text = "".join(prompt_line(prompt) + "\n" for prompt in prompts)
    atomic_write(path, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))


def _pipeline(items, count, seed, tags, avoid=(), retained=0.25, **kind):
    captions = [caption for caption, _ in items]
    metas, why = decompose(items, tags)
    prompts = compose(metas, count, seed=seed, known=[*captions, *avoid], tags=tags,
                      subject=usual_words(captions)[0], **kind)
    train, test = split(prompts, retained, seed)
    read = len({" ".join(caption.lower().split()) for caption in captions})
    return train, test, {
        "captions": read, "decomposed": read - why.pop("nothing left", 0), "meta_motions": len(metas),
        "not_used": dict(why.most_common()), "prompts": len(prompts), "train": len(train),
        "retained": len(test)}


def novel_prompts(clips, count, *, seed, avoid=(), retained=0.25, **kind):
    """(train, retained test, report) of at most `count` prompts from the captions of clips (datasets.Clip).

    avoid: further captions that may not come out, those of the other splits; kind: three_parts and together
    of `compose`. The report counts the distinct captions, those that gave a meta motion, the meta motions,
    the parts that were not used by their reason, and the prompts: all, of the train part, and retained.
    """
    items = [item for clip in clips for item in zip(clip.captions, clip.attributes)]
    return _pipeline(items, count, seed, word_tags(clips), avoid, retained, **kind)


def composed_sets(dataset, count, *, seed, **kind):
    """Captions composed of those of the train split, as clips without a motion -> {"composed_train",
    "composed_val", "composed_test": [Clip]}, report. No two of the sets share a pair of movements."""
    others = [c for split_ in ("val", "test") for clip in dataset.splits[split_] for c in clip.captions]
    train, held_back, report = novel_prompts(dataset.splits["train"], count, seed=seed, avoid=others, **kind)
    val, test = split(held_back, 2 / 3, seed + 1)
    empty = np.zeros((0, dataset.skeleton.feature_dim), np.float32)
    sets = {}
    for name, part in (("train", train), ("val", val), ("test", test)):
        sets[f"composed_{name}"] = [datasets.Clip(p.caption, empty, [p.caption], [p.tokens], [p.attributes])
                                    for p in part]
    return sets, report | {name.removeprefix("composed_"): len(clips) for name, clips in sets.items()}


def write_sets(path, sets, report, show=20):
    """--write-prompts: composed_sets into files, PATH for training and PATH_retained for those held back; the
    counts and some examples are printed."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"--write-prompts {path}: no such folder; make it first")
    lines = {name: [Prompt(c.captions[0], c.tokens[0], c.attributes[0], ()) for c in clips]
             for name, clips in sets.items()}
    write(path, lines["composed_train"])
    write(path.with_stem(path.stem + "_retained"), lines["composed_val"] + lines["composed_test"])
    print(f"composed captions: {report}")
    for prompt in lines["composed_train"][:show]:
        print(f"  {prompt.caption}")


def read_list(path):
    """Captions of a list, one a line, text or text#length#name; InputError for no file or an empty one."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a text file, one caption a line") from error
    captions = [line.partition("#")[0].strip() for line in text.splitlines()]
    if not any(captions):
        raise InputError(f"{path}: holds no caption; give a text file, one caption a line")
    return [caption for caption in captions if caption]


def main(argv=None):
    """The command line above; InputError for a list without captions, a number or a folder that is wrong."""
    parser = argparse.ArgumentParser(prog="python -m common.compose", description="New prompts of captions.")
    parser.add_argument("lists", nargs="+", metavar="LIST", help="one caption a line, text or text#length#id")
    parser.add_argument("--count", type=int, default=2000, help="prompts to compose (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other combinations (default 0)")
    parser.add_argument("--show", type=int, default=20, help="examples to print (default 20)")
    parser.add_argument("--out", help="file for the train prompts; the others go to NAME_retained")
    args = parser.parse_args(argv)
    if args.count < 1 or args.show < 0:
        raise InputError(f"--count {args.count} --show {args.show}: at least 1 and 0")
    if args.out and not Path(args.out).parent.is_dir():
        raise InputError(f"--out {args.out}: no such folder; make it first")
    items = [(caption, {}) for path in args.lists for caption in read_list(path)]
    train, test, report = _pipeline(items, args.count, args.seed, {})
    reasons = ", ".join(f"{reason} {count}" for reason, count in report["not_used"].items())
    print(f"captions: {report['captions']}, decomposed {report['decomposed']}\n"
          f"meta motions: {report['meta_motions']}\nparts not used: {reasons or 'none'}\n"
          f"prompts: {report['prompts']}, train {report['train']}, retained {report['retained']}")
    for prompt in train[:args.show]:
        print(f"  {prompt.caption}  {prompt.attributes or ''}".rstrip())
    if args.out:
        path = Path(args.out)
        write(path, train)
        write(path.with_stem(path.stem + "_retained"), test)


if __name__ == "__main__":
    run_main(main)
