"""English as captions of motion speak it: verbs, misspellings, words by their role, and how a part is read.

common/compose.py reads captions by these tables, and datasets.leave_out asks what they mention. All were
collected on KIT-ML and HumanML3D.
"""
import functools
import re
import unicodedata
from typing import NamedTuple


def words(caption):
    """Lower-case words of a caption, any script and length: "He's waving, twice" -> he's, waving, twice."""
    plain = unicodedata.normalize("NFKC", caption).replace("\u2019", "'").lower()
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain)


# ---- 1. Verbs ----------------------------------------------------------------------------------

# What a person can be asked to do out of nothing; verb:past,others where a form is irregular. The first is
# the past tense ("" where it is regular), the others are read but never written.
_MOTIONS = """
act aim amble applaud approach attack backstep balance beat:beat,beaten beckon bend:bent block bounce bow box
bring:brought brush catch:caught charge check cheer circle clap clasp clean climb comb come:came conduct cook
crawl creep:crept cross crouch curl curtsy cut:cut dance dart dash dig:dug dive:,dove do:did,done dodge drag
draw:drew,drawn dribble drink:drank,drunk drive:drove,driven drum duck eat:ate,eaten evade exercise extend
face fall:fell,fallen fence fight:fought flap flex fling:flung flip fold follow gallop gesticulate gesture
get:got,gotten glance glide go:went,gone grab greet guide hammer hit:hit hobble hold:held hop hug hunch hurry
imitate inspect jab jog juggle jump kick kickbox kneel:knelt,kneeled knock lead:led lean:,leant leap:,leapt
lie:lay,lain lift limp look lunge lurch make:made march meander mime mimic mix motion move nod open pace paint
pass pat perform pet pick pirouette pitch pivot place play point pose pour practice pray press pretend prance
pull punch push put:put race raise reach read:read rise:rose,risen rock roll rotate row rub run:ran salute
scratch scrub search shadowbox shake:shook,shaken shield shimmy shiver shoot:shot shove shrug shuffle sidestep
sing:sang,sung sit:sat skate skip slap slash slide:slid slip slouch smack sneak:,snuck sniff spin:spun,span
spread:spread sprint squat squeeze stagger stamp stand:stood step stir stomp stoop strafe stretch
stride:strode,stridden stroke stroll strum strut stumble sway sweep:swept swim:swam,swum swing:swung swipe
swivel take:took,taken talk tap teeter throw:threw,thrown tilt tiptoe toss touch trip trot try tumble turn
twirl twist type use vault waddle walk waltz wander warm wash wave whirl wiggle wipe wobble wrap wring:wrung
write:wrote,written yawn zigzag
"""
# Verbs that make no sense without what came before, or that say nothing about a movement.
_BOUND = """
accelerate adjust alternate appear assume avoid begin:began,begun bump carry change close compensate complete
continue counterbalance decelerate drop end enter execute feel:felt finish fix give:gave,given halt hesitate
interact keep:kept land lay leave listen lose:lost lower need pause prepare proceed react recover regain relax
release remain remove repeat reset resume return revert see:saw,seen seem set:set shift show:,shown slow speed
start stay stop straighten struggle support switch tie wait want watch wear:wore,worn work"""
# Verbs that captions hardly have, for --leave-out.
_OTHERS = """
arise:arose,arisen bind:bound bite:bit,bitten bleed:bled blow:blew,blown break:broke,broken build:built
burst:burst buy:bought choose:chose,chosen cling:clung deal:dealt dream:,dreamt fly:flew,flown
freeze:froze,frozen hang:hung hide:hid,hidden hurt:hurt lend:lent light:,lit plead:,pled quit:quit
ride:rode,ridden ring:rang,rung say:said sell:sold send:sent
sew:,sewn shed:shed shrink:shrank,shrunk shut:shut sink:sank,sunk sleep:slept
sling:slung speak:spoke,spoken spit:spat spring:sprang,sprung steal:stole,stolen stick:stuck sting:stung
strike:struck,stricken string:strung swear:swore,sworn teach:taught tear:tore,torn tell:told think:thought
thrust:thrust tread:trod,trodden wake:woke,woken weave:wove,woven weep:wept win:won
wind:wound"""
_ENTRIES = [verb.partition(":")[::2] for verb in (_MOTIONS + _BOUND + _OTHERS).split()]
_IRREGULAR = {verb: past.split(",") for verb, past in _ENTRIES}         # [""] where it is regular
BOUND = {verb.partition(":")[0] for verb in _BOUND.split()}


def conjugate(verb, form):
    """English form of a verb: "base" (walk), "present" (walks), "ing" (walking), "past" (walked), or the one
    who does it, "agent" (walker)."""
    # One short vowel before one consonant doubles it: stepping, squatting; but boxing, bowing.
    short = re.fullmatch(r"(side|back|zig)?(qu|[^aeiou])*[aeiou][^aeiouwxy]", verb)
    double = verb[-1] if short else "k" if re.search("[ai]c$", verb) else ""    # mimicking
    stem = verb[:-1] + "i" if re.search(r"[^aeiou]y$", verb) else verb          # tries, tried
    if form == "present":
        return stem + ("es" if stem != verb or re.search(r"([cs]h|[sxzo])$", verb) else "s")
    if form == "past":
        return _IRREGULAR.get(verb, [""])[0] or conjugate(verb, "agent")[:-1] + "d"
    if form == "agent":
        return stem + ("r" if verb.endswith("e") else double + "er")
    if form == "ing":                                                           # lying, dancing, tiptoeing
        return (verb[:-2] + "y" if verb.endswith("ie") else re.sub(r"(?<![eo])e$", "", verb) + double) + "ing"
    return verb


def phrase(adverbs, verb, rest, his):
    """Text in the third person; a pronoun that is the person ends up in one gender, in upper case if it is no
    possessive. his: the possessive, "his" or "their"."""
    him, himself = {"his": ("HIM", "himself"), "their": ("THEM", "themselves")}[his]
    turn = r"(?:\w+ )?(?:turn|curve|jump|rotation|bend|arc|angle|corner|spin)"
    text = " ".join([*adverbs, conjugate(verb, "present"), *rest])
    for pattern, new in (
            (r"\b(front of|behind|around|beside|above) (?:him|them|her(?= and|$))(?= |$)", rf"\1 {him}"),
            (r"\b(?:him|her|it|them|their)sel(?:f|ves)\b", himself),
            (r"\b(?:his|her|its|their)\b(?= \w)", his),
            (r"\bto (left|right)$", r"to the \1"),
            (rf"\b(\d+) degree\b(?! {turn})", r"\1 degrees"),
            (rf"\b(\d+) degrees(?= {turn})", r"\1 degree")):
        text = re.sub(pattern, new, text)
    return text


def forms_of(verbs):
    """word -> (verb, form); where two forms agree ("put"), the later one counts."""
    return {conjugate(verb, form): (verb, form)
            for form in ("base", "past", "ing", "present") for verb in verbs}


VERBS = forms_of([verb.partition(":")[0] for verb in (_MOTIONS + _BOUND).split()])
NO_VERB = ("", "")  # VERBS.get(word, NO_VERB)


def any_form(verbs):
    """A pattern of every form of verbs ("run step"): runs, ran, running, runner, runners, steps ... A past
    that is wrongly made regular is one too (throwed)."""
    found = set()
    for verb in verbs.split():
        found |= {verb, conjugate(verb, "present"), *_IRREGULAR.get(verb, ())}
        for spelling in [verb] + [verb + "l"] * bool(re.search(r"\w[aeiou]l$", verb)):         # travelling
            agent = conjugate(spelling, "agent")
            found |= {conjugate(spelling, "ing"), conjugate(spelling, "past"), agent, agent + "s",
                      agent[:-1] + "d"}
    return "(?:" + "|".join(sorted(map(re.escape, found - {""}), reverse=True)) + ")"


# What captions call an action: verbs, then patterns of other words; an action not listed has its name alone.
SYNONYMS = {"clap": ("clap applaud",), "jump": ("jump leap hop",), "march": ("march", "high knees?"),
            "punch": ("punch box jab",), "run": ("run jog sprint dash",), "squat": ("squat crouch",),
            "raise": ("raise lift", rf"{any_form('hold put')} (?:\w+ )*up"),
            "turn": ("turn spin rotate", "rotations?"), "throw": ("throw toss hurl",),
            "walk": ("walk stroll step",), "wave": ("wave greet",)}


@functools.lru_cache(maxsize=None)
def _mentioned(action):
    first, *rest = words(action) or [""]
    verb = VERBS.get(first, (first,))[0]                        # "kicking" is "kick"
    if rest:                                                    # "pick up": "picks the ball up"
        plain = " ".join(map(re.escape, rest))
        return rf"\b{any_form(verb)} (?:\w+ ){{0,3}}?{plain}(?:e?s)?\b" if verb else r"(?!)"
    verbs, *others = SYNONYMS.get(verb, (verb,))
    return rf"\b(?:{'|'.join([any_form(verbs), *others])})\b" if verb else r"(?!)"


def mentions(caption, action):
    """Whether a caption speaks of an action ("kick", "pick up"), in any form of it or of its synonyms; of
    misspelt words both spellings count."""
    clauses = [words(clause) for clause in re.split("[.,;:!?]", caption)]
    clauses += [[SPELLING.get(word, word) for word in clause] for clause in clauses]
    return any(re.search(_mentioned(action), " ".join(clause)) for clause in clauses)


# ---- 2. Words by their role --------------------------------------------------------------------

SPELLING = dict(pair.split(":") for pair in """
perfoms:performs performes:performs rigth:right quater:quarter foward:forward forwads:forward forwad:forward
foreward:forward doges:dodges guitare:guitar guitarre:guitar violine:violin hight:height walkes:walks
joggs:jogs streching:stretching whiping:wiping laying:lying peron:person somone:someone squad:squat
degress:degrees trurns:turns kneeing:kneeling jesture:gesture approximatly:approximately spining:spinning
spinns:spins stepps:steps wavs:waves""".split())
SUBJECT = re.compile(
    r"(?:(?:an?|the|one|this) )?(?:standing )?(?:(?:stick|human) (?=figure|person|man))?"
    r"(?:persons?|human|man|woman|character|someone|somebody|subject|figure|individual|guy|boy|girl|sim|he|"
    r"she|they)(?= |$)")
IN_ORDER = {"then", "after that", "before", ";", "."}  # one after the other
SEPARATOR = re.compile(r" (then|after that|before|;|\.|while|whilst|meanwhile|at the same time)(?= )")
JOINT = re.compile(r" ((?:and|but|,)(?: (?:and|but|,))*)(?= |$)")
BE = {"is", "are", "was", "were"}
ASPECT = {"start", "begin", "proceed", "appear", "seem"}  # "starts to walk" is "walks"
TIMES = set("first firstly then next finally lastly afterwards eventually subsequently now just "
            "immediately meanwhile simultaneously also initially".split())  # only order what is split
ADVERBS = {"fast", "forward", "backwards", "sideways"}  # before a verb, besides those in -ly
IDLE = set("box cross face open place point press row type".split()) | BOUND  # mostly other words than verbs
MOSTLY_VERBS = {verb for verb, _ in VERBS.values()} - IDLE
LIGHT = {"do", "perform", "practice", "make", "take"}  # "does two kicks": the noun is the motion
COUNTABLE = set("bounce bow circle dance hop jump kick lift lunge move pace pull punch push roll run "
                "sidestep spin squat step stomp stretch stride stroke swing throw turn twist walk "
                "wave".split())
COUNTS = {word: left for left, words in {  # so many words on, a noun may come
    0: "times", 1: "the both his her their its", 3: "a an one two three four five six seven eight few some "
    "several many multiple of with in for by every little"}.items() for word in words.split()}
NOUNS = set("motion motions movement movements jack jacks position pose stance action actions gesture "
            "exercise exercises steps".split())  # "walking motion" is a noun, not a verb
OBJECT = set("bring catch do extend get grab guide hit hold imitate lift make mimic pass perform pet pick "
             "place open practice pull push put raise shake swing take touch use".split())
PARTICLES = set("up down out forward forwards back around in off over slowly quickly".split())
DANGLING = set("a an the and or but with of to from at for by into onto as than like towards toward in on "
               "his her their its both some few couple through against between if very while above hold "
               "grab take bring put pick raise make use do get open".split())
HURTS = {"push", "shove", "hit", "knock", "attack", "pull"}  # "a person pushed from behind" is passive

# What a phrase must not hold, by the reason that is reported.
REFUSED = {reason: re.compile(rf"\b(?:{pattern})\b") for reason, pattern in {
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
    "grammar":  # slips of the annotators that recur
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

# Words that say which part of the body moves.
FEET = set("""
amble backstep charge crisscross dash feet foot gallop go gait heel hop hurry jog jump kick knee leap leg
limp lunge march meander move pace pivot prance race rotate run rush sidestep skate skip sneak spin sprint
squat stair stand step stomp stride stroll strut tiptoe toe trot turn twirl waddle walk wander whirl zigzag
""".split())
HANDS = set("""
applaud arm beckon bicep box clap conduct elbow finger fist gesture greet guitar hand jab palm piano punch
raise salute shoulder stir strum violin wave wipe wrist""".split())
WHOLE = set("""
back bend bow cartwheel chair climb crawl crouch dance duck fall floor ground handstand jack kneel lean lie
pick roll seat sit swim waist""".split())
LOW = {"sit", "lie", "kneel", "crawl"}
RISES = re.compile(r"\b(?:(?:stand|get) (?:\w+ )?up|rise|from (?:an?|the) (?:kneel|sit|lie|ground|floor))\b")


# ---- 3. How a part of a caption is read --------------------------------------------------------

class Head(NamedTuple):
    """The verb of a part of a caption."""
    lemma: str
    form: str
    at: int                 # number of its word
    adverbs: list           # the words before it that stay
    named: bool             # the part names its subject


def head_of(words, verbs, bare=True):
    """The Head of a part (a list of words), or None: [subject] [is] [adverbs] [starts to] verb ...

    bare: a verb without ending needs no subject ("then walk"). At the start of a caption it does, where it is
    as often a noun ("squat motion").
    """
    subject = SUBJECT.match(" ".join(words))
    at = len(subject[0].split()) if subject else 0
    adverbs, be, shape = [], False, ""
    while at < len(words):
        word, following = words[at], " ".join(words[at + 1:at + 2])
        lemma, form = verbs.get(word, NO_VERB)
        participle = verbs.get(following, NO_VERB)[1] == "ing"
        if lemma in ASPECT and (following == "to" or participle):
            at += 1 + (following == "to") + (words[at + 2:at + 3] == ["be"])
            shape = shape or form                               # "starts to walk" is as finite as "walks"
        elif word in BE or word in TIMES:
            be = be or word in BE
            at += 1
        elif lemma:
            form = shape or form
            wrong = be and form != "ing" or form == "base" and not (subject or bare)
            return None if wrong else Head(lemma, form, at, adverbs, bool(subject))
        elif word.endswith("ly") or word in ADVERBS:
            adverbs.append(word)
            at += 1
        else:
            break


def starts_part(words, before, comma, verbs):
    """Whether what follows "and" or a comma is a part of its own, and not "left AND RIGHT"."""
    head, first = head_of(words, verbs), head_of(before, verbs)
    if head is None or first is None or head.named:
        return head is not None
    if head.form == "present":                      # but "does squats and kicks" goes on with a noun
        return first.lemma not in ("do", "perform") or words[head.at + 1:head.at + 2] not in ([], ["with"])
    if head.form == "ing":
        return comma or first.form == "ing" or words[0] in BE
    if head.form == "past":
        return first.form == "past" or "with" not in before
    return comma or first.form == "base" or before[first.at - 1:first.at] == ["to"]


def two_verbs(words, head, verbs):
    """Whether a second verb follows the head, and not the noun in "takes a few large STEPS"."""
    light = head.lemma in LIGHT
    noun = 3 if light else 0                                    # so many words on, a noun may come
    for n, word in enumerate(words[head.at + 1:], head.at + 1):
        lemma, form = verbs.get(word, NO_VERB)
        joined = words[n - 1] == "and"
        asked = {"to", "with", "by"} & set(words[:n])           # "bends to pick and throw", "with legs bent"
        if form == "present" and not (noun and lemma in COUNTABLE):
            return True
        if form == "base" and not (noun or asked or lemma in IDLE and not joined):
            return True
        if form in ("past", "ing") and joined and not asked:
            return True
        after = 0 if form == "present" else max(noun - 1, 0)
        noun = 3 if word.isdigit() or light and word == "and" else COUNTS.get(word, after)
    return False


def incomplete(words, head):
    """Whether something is missing: "raises to", "takes and upper cut", "goes", "uses both hands"."""
    rest = words[head.at + 1:]
    after = rest[0] if rest else ""
    if words[-1] in DANGLING or after == "and":
        return True
    if head.lemma in OBJECT:
        if set(rest) <= PARTICLES or after in ("to", "with", "for", "towards"):
            return True
        if after.endswith("ing") and "thing" not in after:
            return True
    return (head.lemma in ("use", "try") and not {"to", "for"} & set(rest)
            or head.lemma in ("go", "come") and not rest
            or head.lemma == "get" and after not in ("up", "down", "on", "into", "onto"))


def limbs(key):
    """"feet" or "hands" if the lemmas of a phrase speak of these alone, else ""."""
    words = {part for word in key.split() for part in (word, word.removesuffix("s"))}
    feet, hands = bool(words & FEET), bool(words & HANDS)
    if words & WHOLE or feet == hands:
        return ""
    return "feet" if feet else "hands"
