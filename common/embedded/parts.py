"""Captions in parts: what each says that a person does, as phrases that can be combined anew.

The first step of common/compose.py; the words that it knows are in common/embedded/english.py.
"""
import re
from collections import Counter, defaultdict
from typing import NamedTuple

from common.embedded import english, wording
from common.embedded.oracle import caption_attributes, one_counterclockwise

LONG_LIST = 500     # captions, of which a word that occurs once is more often misspelt than rare


class MetaMotion(NamedTuple):
    """One movement in words."""
    text: str         # without subject, third person: "slowly walks forward with both arms raised"
    key: str          # its lemmas, which say whether two meta motions are the same
    attributes: dict  # for the oracle; {} = nothing that can be checked


def _split(caption, verbs):
    """(parts of a caption as lists of words, whether each follows the one before in time)."""
    found = re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*|[^\s\"]", caption.lower())
    text = one_counterclockwise(" ".join(english.SPELLING.get(word, word) for word in found).rstrip(" .!"))
    pieces = english.SEPARATOR.split(f" {text} ")
    parts, ordered = [], set(pieces[1::2]) <= english.IN_ORDER
    for piece in pieces[::2]:
        chunks, new = ["", *english.JOINT.split(f" {piece.strip()}")], []
        for joint, chunk in zip(chunks[::2], chunks[1::2]):
            words = chunk.split()
            while words and words[0] in english.TIMES:
                words.pop(0)
            if words and (not new or english.starts_part(words, new[-1], "," in joint, verbs)):
                new.append(words)
            elif words:
                new[-1] += joint.split() + words
        parts += new
        ordered = ordered and len(new) < 2
    return parts, ordered


def _phrase(words, verbs, bare, his):
    """A part -> (text of its meta motion, its english.Head, why it is not used, "" if it is)."""
    said, head = " ".join(words), english.head_of(words, verbs, bare)
    for reason in ("negation", "passive"):
        if english.REFUSED[reason].search(said):
            return "", None, reason
    if head is None or head.form == "ing" and set(words[head.at + 1:head.at + 2]) & english.NOUNS:
        finite = any(verbs.get(word, english.NO_VERB)[1] == "present" for word in words)
        return "", None, "unknown subject" if finite and not english.SUBJECT.match(said) else "no verb"
    text = english.phrase(head.adverbs, head.lemma, words[head.at + 1:], his)
    checks = {"needs a context": head.lemma in english.BOUND,
              "passive": head.form == "past" and head.lemma in english.HURTS,
              **{reason: pattern.search(text) for reason, pattern in english.REFUSED.items()
                 if reason != "passive"},
              "punctuation": re.search(r"[^\w\s-]", text),
              "two verbs": english.two_verbs(words, head, verbs),
              "incomplete": english.incomplete(words, head),
              "length": len(text.split()) > 10}                     # 12 with "a person"
    return text.lower(), head, next((reason for reason, wrong in checks.items() if wrong), "")


def usual_words(captions):
    """("a human", "his"): the subject and the possessive that most captions use."""
    captions = [" ".join(english.words(caption)) for caption in captions]
    subjects = Counter(m[0] for m in map(english.SUBJECT.match, captions) if m and " " in m[0])
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
              and word in (english.conjugate(lemma, "present"), english.conjugate(lemma, "ing"))}
    verbs = english.forms_of(sorted(tagged)) | english.VERBS
    rare, (_, his) = _rare(captions, verbs), usual_words(captions)
    texts, known, why = defaultdict(Counter), defaultdict(list), Counter()
    for caption, given in captions.items():
        (parts, ordered), used = _split(caption, verbs), 0
        for n, words in enumerate(parts):
            text, head, reason = _phrase(words, verbs, n > 0, his)
            reason = reason or ("spelling" if rare & set(words) else "")
            if reason:
                why[reason] += 1
                continue
            lemmas = [english.VERBS[word][0] if word in english.VERBS else tags[word][0] if word in tags
                      else wording.LEMMAS.get(word, word) for word in text.split()]
            lemmas[len(head.adverbs)] = head.lemma
            key, used = " ".join(lemmas), used + 1
            texts[key][text] += 1
            for attributes in given:
                sequence = "first" in attributes
                if len(parts) == 1 and attributes and not sequence:
                    known[key].append(attributes)
                elif len(parts) == 2 and ordered and sequence:
                    known[key].append(attributes[("first", "then")[n]])
        why["nothing left"] += not used
    metas = []
    for key, found in sorted(texts.items()):
        text = min(found, key=lambda text: (-found[text], text))
        first, *more = known[key] or [caption_attributes(f"a person {text}")]
        agreed = {name: value for name, value in first.items() if all(a.get(name) == value for a in more)}
        metas.append(MetaMotion(text, key, agreed))
    return metas, +why
