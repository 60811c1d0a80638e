"""New captions out of known ones, without a language model: their movements are combined anew.

InstructMotion (Mao et al. 2024, arXiv 2405.15541, section 4.2 and Fig. 3) lets a language model split
captions into meta motions, recombines them at random, has a person remove what nobody could do, and adds
parts of speech. Here rules do all of it, and a seed fixes the outcome:

1. decompose   captions -> phrases whose subject is "a person", with what the oracle can check in them
2. compose     two or three of them in turn, "{A} then {B}", or at once, "{A} while {B-ing}", "{A} and {B}"
3. filter      (the paper's person) no verb twice, only who is down gets up, at once only hands and feet
4. tags        lemma/POS of every word, as in the text files of the data sets
5. split       train | retained test, by PAIRS of meta motions

The rules drop what they do not understand: a missing phrase costs a little data, a wrong one its quality.
The first step is in common/embedded/parts.py, its words are in english.py beside it.

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
from common.embedded import english, wording
from common.embedded.oracle import COUNTED
from common.embedded.parts import decompose, usual_words
from common.runs import atomic_write, run_main

MAX_WORDS = 20      # the text encoders cut what is longer
PATIENCE = 5000     # draws without a new prompt, after which few are left to be found
AT_ONCE = ("{0} while {1-ing}", "{0} and {1}")
IN_TURN = ("{0} then {1}", "{0} and then {1}")
THREE_IN_TURN = "{0}, then {1} and then {2}"


class Prompt(NamedTuple):
    """A sentence that no caption of the data says."""
    caption: str
    tokens: list      # of 'lemma/POS'
    attributes: dict
    parts: tuple      # keys of its meta motions, in their order


# ---- 1. Compose --------------------------------------------------------------------------------

def _verb_at(meta):
    """Number of the verb's word: the first that is not an adverb."""
    return next(n for n, word in enumerate(meta.text.split())
                if not (word.endswith("ly") or word in english.ADVERBS))


def _verbs_of(meta):
    words = meta.key.split()
    return {words[_verb_at(meta)]} | english.MOSTLY_VERBS & set(words)


def _possible(metas):
    """What the person of the paper would let pass: no verb twice, and only who is down gets up."""
    if any(_verbs_of(a) & _verbs_of(b) for a, b in combinations(metas, 2)):
        return False
    return all(_verbs_of(a) & english.LOW for a, b in zip(metas, metas[1:]) if english.RISES.search(b.key))


def _at_once(a, b):
    both = a.attributes | b.attributes
    if "count" in both and sum(key in COUNTED for key in both) > 1:
        return False                                                # the oracle counts one action
    # What speaks of both, or of the whole body, takes its turn: nobody walks while sitting down.
    apart = {english.limbs(a.key), english.limbs(b.key)} == {"feet", "hands"}
    return apart and not a.attributes.keys() & b.attributes.keys()


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
            text[verb_at] = english.conjugate(verb, "ing" if slot[2] else "present")
        for n, word in enumerate(text):
            for plain in datasets.words(word):
                lemma, pos = tags.get(plain) or (wording.LEMMAS.get(plain, plain),
                                                 wording.POS.get(plain, "OTHER"))
                if n == verb_at:
                    lemma, pos = verb, "VERB"
                elif pos == "VERB" and tokens[-1].endswith(("/NUM", "/DET")):
                    pos = "NOUN"                                    # "two punches", mostly a verb in the data
                elif pos == "OTHER" and english.VERBS.get(plain, english.NO_VERB)[1] == "ing":
                    lemma, pos = english.VERBS[plain][0], "VERB"
                tokens.append(f"{lemma}/{pos}")
        words.append(" ".join(text) + (slot[3] if slot else ""))
    return " ".join(words), tokens


def compose(metas, count, *, seed, known=(), tags=None, subject="a person", three_parts=0.2,
            together=2 / 3):
    """At most `count` Prompts of two or, with probability three_parts, three meta motions, fixed by the seed.
    Of two, a share `together` goes on at once, while such pairs are easily found; the others take turns.

    known: captions that may not come out, by their words. tags: of word_tags, for the tokens.
    """
    taken = {tuple(datasets.words(caption)) for caption in known}
    g, prompts, waited = generator(seed, 0, "novel prompts"), [], 0
    while len(metas) > 1 and len(prompts) < count and waited < PATIENCE:
        if waited % 50 == 0:        # one kind of sentence, until parts are found for it or seem not to exist
            three, at_once, which = torch.rand(3, generator=g).tolist()
        waited += 1
        number = 3 if three < three_parts else 2
        chosen = [metas[k] for k in torch.randint(len(metas), (number,), generator=g).tolist()]
        if not _possible(chosen):
            continue
        first, then = chosen[0].attributes, chosen[1].attributes
        if number == 3:
            template, attributes = THREE_IN_TURN, {}
        elif at_once < together:
            if not _at_once(*chosen):
                continue
            template = AT_ONCE[which < .5 and " and " not in chosen[0].text]  # no list: "a and b and c"
            attributes = first | then
        else:
            template = IN_TURN[which < .5]
            attributes = {"first": first, "then": then} if first and then else first or then
        caption, tokens = _sentence(template, subject, chosen, tags or {})
        said = tuple(datasets.words(caption))
        if len(said) <= MAX_WORDS and said not in taken:
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


# ---- 2. The whole pipeline, and its command line -----------------------------------------------

def novel_prompts(clips, count, *, seed, avoid=(), **kind):
    """(train, retained test, report) of at most `count` prompts from the captions of clips (datasets.Clip).

    avoid: further captions that may not come out, those of the other splits. kind: three_parts and together
    of `compose`. The report counts what was read, understood, not used (by its reason) and composed.
    """
    items = [item for clip in clips for item in zip(clip.captions, clip.attributes)]
    captions, tags = [caption for caption, _ in items], word_tags(clips)
    metas, why = decompose(items, tags)
    prompts = compose(metas, count, seed=seed, known=[*captions, *avoid], tags=tags,
                      subject=usual_words(captions)[0], **kind)
    train, test = split(prompts, seed=seed)
    read = len({" ".join(caption.lower().split()) for caption in captions})
    return train, test, {
        "captions": read, "decomposed": read - why.pop("nothing left", 0), "meta_motions": len(metas),
        "not_used": dict(why.most_common()), "prompts": len(prompts), "train": len(train),
        "retained": len(test)}


def composed_sets(dataset, count, *, seed):
    """Captions composed of those of the train split, as clips without a motion -> {"composed_train",
    "composed_val", "composed_test": [Clip]}, report. No two of the sets share a pair of movements."""
    others = [c for split_ in ("val", "test") for clip in dataset.splits[split_] for c in clip.captions]
    # Fewer sentences of three parts than in a list: of these the oracle can check nothing.
    train, held_back, report = novel_prompts(dataset.splits["train"], count, seed=seed, avoid=others,
                                             three_parts=0.1, together=0.67)
    val, test = split(held_back, 2 / 3, seed + 1)
    empty, sets = np.zeros((0, dataset.skeleton.feature_dim), np.float32), {}
    for name, part in (("train", train), ("val", val), ("test", test)):
        sets[f"composed_{name}"] = [datasets.Clip(p.caption, empty, [p.caption], [p.tokens], [p.attributes])
                                    for p in part]
        report[name] = len(part)
    if not all(sets.values()):
        raise InputError(f"too few captions can be composed of {dataset.label}: {report}; ask for more "
                         "(--composed), or take a larger data set")
    return sets, report


def draw(clips, composed, count, share, g, shuffled=False):
    """The prompts of a rollout -> captions, clips, lists of `count`. A `share` of them is composed, with
    clips that have no frames. shuffled: no caption gets its own clip, as a control needs it."""
    alone = round(count * share)
    rows = torch.randint(len(clips), (count - alone,), generator=g).tolist()
    paired = [clips[k] for k in rows]
    captions = datasets.draw_captions(paired, g)
    if shuffled:
        paired = paired[1:] + paired[:1]
    rows = torch.randint(max(len(composed), 1), (alone,), generator=g).tolist()
    others = [composed[k] for k in rows]
    return captions + [clip.captions[0] for clip in others], paired + others


def write(path, train, retained):
    """Write (caption, tokens) pairs for training to PATH and the others to PATH_retained, a line each as in
    the text files of the data sets: caption#lemma/POS ...#0.0#0.0."""
    for name, pairs in ((path, train), (path.with_stem(f"{path.stem}_retained"), retained)):
        text = "".join(f"{caption}#{' '.join(tokens)}#0.0#0.0\n" for caption, tokens in pairs)
        atomic_write(name, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))


def write_sets(path, sets, report, show=20):
    """Write composed_sets into files, see `write`, and print the counts and some examples."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such folder; make it first")
    train, val, test = ([(c.captions[0], c.tokens[0]) for c in clips] for clips in sets.values())
    write(path, train, val + test)
    print(f"composed captions: {report}")
    for caption, _ in train[:show]:
        print(f"  {caption}")


def read_list(path):
    """Captions of a list, one a line, text or text#length#name; InputError for no file or an empty one."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a text file, one caption a line") from error
    captions = list(filter(None, (line.partition("#")[0].strip() for line in text.splitlines())))
    if not captions:
        raise InputError(f"{path}: holds no caption; give a text file, one caption a line")
    return captions


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
    captions = [caption for path in args.lists for caption in read_list(path)]
    everything = datasets.Clip("", None, captions, [[]] * len(captions), [{}] * len(captions))
    train, retained, report = novel_prompts([everything], args.count, seed=args.seed)
    reasons = ", ".join(f"{reason} {count}" for reason, count in report["not_used"].items())
    print(f"captions: {report['captions']}, decomposed {report['decomposed']}\n"
          f"meta motions: {report['meta_motions']}\nparts not used: {reasons or 'none'}\n"
          f"prompts: {report['prompts']}, train {report['train']}, retained {report['retained']}")
    for prompt in train[:args.show]:
        print(f"  {prompt.caption}  {prompt.attributes or ''}".rstrip())
    if args.out:
        write(Path(args.out), *([prompt[:2] for prompt in part] for part in (train, retained)))


if __name__ == "__main__":
    run_main(main)
