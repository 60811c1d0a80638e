"""Novel prompts: what becomes of a caption, what may be composed, what is retained, and the command line."""
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from common import InputError, compose as composing, datasets
from common.compose import Prompt, compose, decompose, novel_prompts, split
from common.datasets import Clip
from common.embedded import english
from common.embedded.english import conjugate
from common.embedded.oracle import caption_attributes
from common.embedded.parts import LONG_LIST, MetaMotion
from common.features import T2M
from common.published import folder
from common.runs import run_main

LISTS = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "prompts"

CAPTIONS = """
A person walks forward slowly.#100#000001
someone jogs backwards and then claps
a person raises the left arm while walking in a circle
A human turns right, then kicks with the left leg
the man waves with both hands before sitting down
a person sits down on a chair
a person stands up
a person is jumping to the left
a person punches with the right hand, stops and turns around
a person is pushed to the right
a person picks up an object and throws it
she crawls forward then she stands up
a person takes two steps backwards
a person does a cartwheel
a person performs two kicks
a person stomps with the right foot
a person wipes a table
a person hops on one leg
a person bows
a person swims
""".strip().splitlines()


def texts(caption, **options):
    return [meta.text for meta in decompose([(caption, {})], **options)[0]]


def metas(*phrases):
    """Meta motions of hand-written phrases, with the attributes that the oracle reads in them."""
    return [decompose([(f"a person {phrase}", {})])[0][0] for phrase in phrases]


@pytest.fixture(scope="module")
def pool():
    found, _ = decompose([(caption.partition("#")[0], {}) for caption in CAPTIONS])
    return found


@pytest.fixture(scope="module")
def many(pool):
    return compose(pool, 300, seed=3)


# ---- verbs ----


@pytest.mark.parametrize("verb, present, ing, past", [
    ("walk", "walks", "walking", "walked"), ("step", "steps", "stepping", "stepped"),
    ("squat", "squats", "squatting", "squatted"), ("jog", "jogs", "jogging", "jogged"),
    ("sidestep", "sidesteps", "sidestepping", "sidestepped"), ("box", "boxes", "boxing", "boxed"),
    ("bow", "bows", "bowing", "bowed"), ("kneel", "kneels", "kneeling", "knelt"),
    ("punch", "punches", "punching", "punched"), ("brush", "brushes", "brushing", "brushed"),
    ("pass", "passes", "passing", "passed"), ("go", "goes", "going", "went"), ("do", "does", "doing", "did"),
    ("try", "tries", "trying", "tried"), ("play", "plays", "playing", "played"),
    ("lie", "lies", "lying", "lay"), ("dance", "dances", "dancing", "danced"),
    ("swim", "swims", "swimming", "swam"), ("put", "puts", "putting", "put"),
    ("tiptoe", "tiptoes", "tiptoeing", "tiptoed"), ("sit", "sits", "sitting", "sat"),
    ("swing", "swings", "swinging", "swung"), ("take", "takes", "taking", "took"),
    ("fling", "flings", "flinging", "flung"), ("stride", "strides", "striding", "strode"),
    ("wring", "wrings", "wringing", "wrung"), ("wear", "wears", "wearing", "wore"),
    ("mimic", "mimics", "mimicking", "mimicked"), ("zigzag", "zigzags", "zigzagging", "zigzagged")])
def test_verb_forms(verb, present, ing, past):
    assert [conjugate(verb, form) for form in ("present", "ing", "past")] == [present, ing, past]
    assert conjugate(verb, "base") == verb
    for form, word in (("present", present), ("ing", ing), ("past", past)):
        assert english.VERBS[word][0] == verb, (form, word)


def test_any_form():
    for verbs, expected in (
            ("run", "ran run runned runner runners running runs"),
            ("throw", "threw throw throwed thrower throwers throwing thrown throws"),
            ("try", "tried trier triers tries try trying"),
            ("bow clap", "bow bowed bower bowers bowing bows clap clapped clapper clappers clapping claps")):
        pattern = english.any_form(verbs)
        assert sorted(pattern[3:-1].split("|")) == expected.split()


def test_captions_without_a_word_compose_to_nothing():
    found, why = decompose([("...", {}), ("?!", {}), ("", {})])
    assert found == [] and why["nothing left"] == 3


# ---- from a caption to its parts ----


@pytest.mark.parametrize("caption, expected", [
    # each separator
    ("a person walks forward then waves", ["walks forward", "waves"]),
    ("a person walks forward and then waves.", ["walks forward", "waves"]),
    ("a person walks forward, then waves", ["walks forward", "waves"]),
    ("A person walks forward before turning left.", ["turns left", "walks forward"]),
    ("a person walks forward, after that he claps", ["claps", "walks forward"]),
    ("a person walks forward; he claps", ["claps", "walks forward"]),
    ("a person bows. the person claps.", ["bows", "claps"]),
    ("a person walks while waving both hands", ["walks", "waves both hands"]),
    ("a person walks and waves at the same time", ["walks", "waves"]),
    ("a person walks and quickly turns left meanwhile", ["quickly turns left", "walks"]),
    ("first a person walks, then he jumps", ["jumps", "walks"]),
    ("a person bends down, grabs a ball and throws a ball",
     ["bends down", "grabs a ball", "throws a ball"]),
    ("someone kneels, and the person waves", ["kneels", "waves"]),
    # "and" that joins no verbs, and nouns that look like verbs
    ("a person swings left and right", ["swings left and right"]),
    ("a person takes two large steps forward", ["takes two large steps forward"]),
    ("a person does squats and kicks", ["does squats and kicks"]),
    ("a person waves with legs crossed and bent", ["waves with legs crossed and bent"]),
    ("a person greets by waving and nodding", ["greets by waving and nodding"]),
    # tenses, and how a caption starts
    ("A human walking backwards", ["walks backwards"]),
    ("the man is slowly walking to the left", ["slowly walks to the left"]),
    ("human slowly goes forward", ["slowly goes forward"]),
    ("a person was running and jumping", ["jumps", "runs"]),
    ("a person walked forward and turned right", ["turns right", "walks forward"]),
    ("a person starts to walk", ["walks"]), ("someone begins jogging slowly", ["jogs slowly"]),
    ("a person appears to be dancing", ["dances"]), ("they walk in place", ["walks in place"]),
    ("boxing with the right hand", ["boxes with the right hand"]),
    ("a person starts to jog and walk", ["jogs", "walks"]),
    ("starts to walk", ["walks"]), ("a person walks and starts to jog", ["jogs", "walks"]),
    # one spelling
    ("a person perfoms a rigth turn", ["performs a right turn"]),
    ("a person walks anti-clockwise", ["walks counterclockwise"]),
    ("a person turns 90 degree to the left", ["turns 90 degrees to the left"]),
    ("a person makes a 90 degrees turn", ["makes a 90 degree turn"]),
    ("a stick figure kicks in front of him", ["kicks in front of them"]),
    ("a person lifts her arm and steadies himself", ["lifts their arm and steadies themselves"]),
])
def test_parts_of_a_caption(caption, expected):
    assert texts(caption) == expected


@pytest.mark.parametrize("caption, reason", [
    ("a person is pushed to the right", "passive"), ("a person gets shoved", "passive"),
    ("person pushed from behind", "passive"), ("a person is being carried", "passive"),
    ("a person does not move", "negation"), ("a person walks without moving the arms", "negation"),
    ("a person kicks it", "refers back"), ("a person walks again", "refers back"),
    ("a person raises the other hand", "refers back"), ("a person walks back to the chair", "refers back"),
    ("a person walks to the starting position", "refers back"), ("a person jumps like that", "refers back"),
    ("a person continues walking", "needs a context"), ("a person stops", "needs a context"),
    ("a person returns", "needs a context"), ("a person repeats the motion", "needs a context"),
    ("the left arm swings forward", "unknown subject"), ("a sad person walks", "unknown subject"),
    ("5 meters forward", "no verb"), ("squat motion", "no verb"), ("walking motion", "no verb"),
    ("a person is in a t-pose", "no verb"), ("a person strumbles", "no verb"),
    ("a person walks turns around", "two verbs"), ("a person raises both arms bows", "two verbs"),
    ("a person bends down and looking around", "two verbs"),
    ("a person walks because he likes walking", "clause"), ("a person who walks", "no verb"),
    ("a person waves as he walks", "clause"), ("a person walks with", "incomplete"),
    ("a person performs", "incomplete"), ("a person picks up", "incomplete"), ("a person goes", "incomplete"),
    ("a person walks towards the", "incomplete"), ("a person kneels on hands an feet", "grammar"),
    ("a person takes two step forward", "grammar"), ("a person takes a quick steps back", "grammar"),
    ("a person walks in a circle (clockwise)", "punctuation"),
    ("a person walks forward , arms outstretched", "punctuation"),
    ("a person walks very slowly through a long dark narrow tunnel under ground", "length"),
])
def test_why_a_part_is_not_used(caption, reason):
    found, why = decompose([(caption, {})])
    assert found == [] and why == {reason: 1, "nothing left": 1}


def test_the_rest_of_a_caption_is_used():
    found, why = decompose([("a person is pushed and stumbles, then he picks up a box and throws it", {})])
    assert [meta.text for meta in found] == ["picks up a box", "stumbles"]
    assert why == {"passive": 1, "refers back": 1}


def test_length_is_three_to_twelve_words_with_the_subject():
    assert texts("a person walks") == ["walks"]
    eleven = "walks in a very large circle around a table slowly"
    assert len(eleven.split()) == 10 and texts(f"a person {eleven}") == [eleven]
    assert texts(f"a person {eleven} today") == []


def test_same_lemmas_are_one_meta_motion():
    found, _ = decompose([(caption, {}) for caption in (
        "A person raises both arms", "someone is raising both arms.", "he raised both arms")])
    assert [(meta.text, meta.key) for meta in found] == [("raises both arms", "raise both arm")]


def test_possessives_follow_the_majority():
    items = [("a person lifts her arm", {}), ("a person kicks his leg", {}), ("a man rubs his head", {})]
    assert composing.usual_words([caption for caption, _ in items]) == ("a person", "his")
    assert [meta.text for meta in decompose(items)[0]] == ["kicks his leg", "lifts his arm", "rubs his head"]
    subjects = ["A human walks.", "a human runs", "someone waves", "someone hops", "a man bows"]
    assert composing.usual_words(subjects)[0] == "a human"            # "someone" is no noun with an article
    assert composing.usual_words([]) == ("a person", "their")


def test_a_word_seen_once_in_a_long_list_is_a_misspelling():
    items = [(f"a person walks {n} meters", {}) for n in range(LONG_LIST - 2)]
    items += [("a person walks slwoly to the left", {})]
    assert "spelling" not in decompose(items)[1]
    items += [("a person walks slwoly to the right", {})]           # its mirror image does not confirm it
    assert decompose(items)[1]["spelling"] == 2
    assert "spelling" not in decompose([*items, ("a person runs slwoly", {})])[1]


def test_verbs_and_lemmas_come_from_the_tags():
    tags = {"moonwalks": ("moonwalk", "VERB"), "geese": ("goose", "NOUN"), "lefts": ("leave", "VERB")}
    assert texts("a person moonwalks past geese") == []
    found, _ = decompose([("a person moonwalks past geese", {})], tags)
    assert found[0][:2] == ("moonwalks past geese", "moonwalk past goose")
    found, _ = decompose([("a person is moonwalking", {})], tags)
    assert found[0].text == "moonwalks"
    assert texts("a person lefts", tags=tags) == []                 # a tag that is no form of its lemma


# ---- attributes ----


def attributes_of(items):
    return {meta.text: meta.attributes for meta in decompose(items)[0]}


def test_attributes_of_a_single_part_and_of_sequences():
    walk, wave = {"gait": "walk", "speed": "slow"}, {"wave": "left"}
    assert attributes_of([("a person walks slowly", walk)]) == {"walks slowly": walk}
    sequence = {"first": walk, "then": wave}
    expected = {"walks slowly": walk, "waves": wave}
    assert attributes_of([("a person walks slowly and then waves", sequence)]) == expected
    assert attributes_of([("a person walks slowly before waving", sequence)]) == expected
    # "and" may mean at the same time, three parts are not two: the words are asked instead
    asked = {"walks slowly": {"gait": "walk"}, "waves": {}}
    assert attributes_of([("a person walks slowly and waves", sequence)]) == asked
    assert attributes_of([("a person walks slowly, then bows, then waves", sequence)]) == asked | {
        "bows": {"bow": True}}


def test_attributes_known_exactly_win_and_must_agree():
    vague = ("a person kicks while waving", {"kick": "left", "wave": "any"})
    exact = {"kick": "any", "count": 1}
    assert attributes_of([vague])["kicks"] == caption_attributes("a person kicks") == {"kick": "any"}
    assert attributes_of([vague, ("someone kicks", exact)])["kicks"] == exact
    assert attributes_of([("a person kicks", exact), ("someone kicks", {"kick": "any", "count": 2})]) == {
        "kicks": {"kick": "any"}}
    assert attributes_of([("a person kicks", {"count": 1}), ("someone kicks", {"count": 2})]) == {"kicks": {}}
    # an unknown caption takes nothing away
    assert attributes_of([("a person kicks", exact), ("someone kicks", {})]) == {"kicks": exact}


# ---- compose ----


def test_compose_is_fixed_by_the_seed(pool):
    assert len(pool) == 24
    assert compose(pool, 50, seed=5) == compose(pool, 50, seed=5)
    assert compose(pool, 50, seed=5)[:20] == compose(pool, 20, seed=5)
    other = {prompt.caption for prompt in compose(pool, 50, seed=6)}
    assert len(other - {prompt.caption for prompt in compose(pool, 50, seed=5)}) > 25


def test_prompts_are_new_short_and_made_of_known_parts(pool, many, monkeypatch):
    keys = {meta.key for meta in pool}
    assert len(many) == 300 == len({prompt.caption for prompt in many})
    assert Counter(len(prompt.parts) for prompt in many).keys() == {2, 3}
    for prompt in many:
        words = datasets.words(prompt.caption)
        assert set(prompt.parts) <= keys and len(set(prompt.parts)) == len(prompt.parts)
        assert len(words) <= 20 and len(words) == len(prompt.tokens)
        assert words[:2] == ["a", "person"] and prompt.tokens[:2] == ["a/DET", "person/NOUN"]
    assert all(p.caption.startswith("a human ") for p in compose(pool, 20, seed=3, subject="a human"))
    assert all(len(prompt.parts) == 2 for prompt in compose(pool, 100, seed=3, three_parts=0))
    monkeypatch.setattr(composing, "MAX_WORDS", 8)
    assert max(len(datasets.words(p.caption)) for p in compose(pool, 300, seed=3)) == 8


def test_known_captions_do_not_come_out():
    parts = metas("bows", "walks in place")
    everything = {prompt.caption for prompt in compose(parts, 100, seed=0)}
    assert everything == {
        "a person bows then walks in place", "a person bows and then walks in place",
        "a person walks in place then bows", "a person walks in place and then bows"}
    known = ["A person bows, then walks in place.", "a person walks in place and then bows"]
    assert {prompt.caption for prompt in compose(parts, 100, seed=0, known=known)} == {
        "a person bows and then walks in place", "a person walks in place then bows"}
    assert compose(parts[:1], 10, seed=0) == compose([], 10, seed=0) == []


def test_limbs():
    expected = {"walks forward": "feet", "kicks with the left foot": "feet", "performs two squats": "feet",
                "waves": "hands", "raises both arms": "hands", "lifts the left hand": "hands",
                "walks with both arms raised": "", "claps over the knee": "", "bows": "", "swims": "",
                "crawls on the hands": "", "sits down": "", "picks something up with the left hand": ""}
    assert {meta.text: english.limbs(meta.key) for meta in metas(*expected)} == expected


def test_at_once_only_hands_and_feet(pool, many):
    limbs = {meta.key: english.limbs(meta.key) for meta in pool}
    at_once = [prompt for prompt in many if " then " not in prompt.caption]
    assert 100 < len(at_once) < 180                                 # 2/3 of what has two parts, if found
    assert {" while " in prompt.caption for prompt in at_once} == {True, False}
    for prompt in at_once:
        assert {limbs[key] for key in prompt.parts} == {"feet", "hands"}, prompt.caption
    for prompt in many:                                             # sitting down and walking take turns
        assert ("sits" in prompt.caption or "sitting" in prompt.caption) <= ("then" in prompt.caption)
    assert len([p for p in compose(pool, 300, seed=3, together=0) if " then " not in p.caption]) == 0


def composed(first, then, template):
    """The prompt of two meta motions that matches a pattern."""
    return next(prompt for prompt in compose([first, then], 20, seed=1, three_parts=0)
                if re.search(template, prompt.caption))


def test_attributes_of_prompts():
    wave, walk, spin = metas("waves with the left hand", "walks slowly", "dances")
    walk = walk._replace(attributes={"gait": "walk"})
    assert composed(wave, walk, "slowly then").attributes == {
        "first": {"gait": "walk"}, "then": {"wave": "left"}}
    for template in ("hand while walking slowly", "person walks slowly and waves with"):
        assert composed(wave, walk, template).attributes == {"gait": "walk", "wave": "left"}
    assert composed(spin, walk, "slowly then dances").attributes == {"gait": "walk"}
    assert composed(spin, walk, "dances then").attributes == {"gait": "walk"}
    three = [p for p in compose([wave, walk, spin], 30, seed=1) if len(p.parts) == 3]
    assert three and all(p.attributes == {} for p in three)
    assert re.fullmatch(r"a person \w.+, then \w.+ and then \w.+", three[0].caption)


def test_attributes_that_meet_are_in_turn():
    kick, clap = metas("kicks", "claps")
    for left, right in (({"wave": "left"}, {"wave": "right"}),      # the same question twice
                        ({"kick": "any", "count": 2}, {"raise": "left"})):          # which one is counted?
        parts = [kick._replace(attributes=left), clap._replace(attributes=right)]
        found = {prompt.caption for prompt in compose(parts, 50, seed=0)}
        assert len(found) == 4 and all(" then " in caption for caption in found)
    assert len(compose([kick._replace(attributes={}), clap], 50, seed=0)) == 8


def test_gerund_of_the_verb_only():
    parts = metas("claps", "performs two kicks")
    assert composed(*parts, "while perf").caption == "a person claps while performing two kicks"
    parts = metas("waves", "slowly steps to the left")
    assert composed(*parts, "while slow").caption == "a person waves while slowly stepping to the left"
    parts = metas("raises one arm and one hand", "walks forward")
    assert not any(" hand and walks" in p.caption for p in compose(parts, 50, seed=0))   # not a list of three


def test_no_verb_twice_and_only_who_is_down_gets_up():
    assert compose(metas("walks forward", "walks backwards"), 5, seed=0) == []
    assert compose(metas("performs two kicks", "kicks"), 5, seed=0) == []
    found = {p.parts for p in compose(metas("walks forward", "stands up"), 20, seed=0)}
    assert found == {("stand up", "walk forward")}
    assert {p.parts for p in compose(metas("sits down", "stands up"), 20, seed=0)} == {
        ("sit down", "stand up"), ("stand up", "sit down")}


# ---- tags ----


def clip(caption, tokens=(), attributes=None):
    return Clip("clip", None, [caption], [list(tokens)], [attributes or {}])


def test_word_tags_are_the_most_common_ones():
    clips = [clip("a person turns left.", ["a/DET", "person/NOUN", "turn/VERB", "left/ADV"]),
             clip("He turns left", ["he/PRON", "turn/VERB", "left/ADJ"]),
             clip("the left turns", ["the/DET", "left/ADJ", "turn/NOUN"]),
             clip("a zig-zag line", ["a/X", "zig-zag/NOUN", "line/NOUN"])]           # words and tokens differ
    assert composing.word_tags(clips) == {
        "a": ("a", "DET"), "he": ("he", "PRON"), "left": ("left", "ADJ"), "person": ("person", "NOUN"),
        "the": ("the", "DET"), "turns": ("turn", "VERB")}


def test_tokens():
    parts = metas("makes two kicks", "claps loudly swinging one elbow")
    tags = {"kicks": ("kick", "VERB"), "elbow": ("elbow", "NOUN"), "makes": ("make", "NOUN")}
    prompt = next(p for p in compose(parts, 20, seed=0, tags=tags) if "person makes" in p.caption and
                  "and then" in p.caption)
    assert prompt.caption == "a person makes two kicks and then claps loudly swinging one elbow"
    assert prompt.tokens == [
        "a/DET", "person/NOUN", "make/VERB", "two/NUM", "kick/NOUN", "and/CCONJ", "then/ADV", "clap/VERB",
        "loudly/OTHER", "swing/VERB", "one/NUM", "elbow/NOUN"]
    together = compose(metas("hops", "waves"), 20, seed=0)
    assert any(p.tokens == ["a/DET", "person/NOUN", "hop/VERB", "while/ADP", "wave/VERB"] for p in together)


def test_written_prompts_are_read_back(tmp_path, many):
    composing.write(tmp_path / "a.txt", [prompt[:2] for prompt in many], [])
    for prompt, line in zip(many, (tmp_path / "a.txt").read_text().splitlines(), strict=True):
        line = folder.parse_text_line(line)
        assert (line.caption, line.tokens, line.start, line.stop) == (prompt.caption, prompt.tokens, 0.0, 0.0)


# ---- train and retained ----


def pairs(found):
    return {frozenset(pair) for prompt in found for pair in combinations(prompt.parts, 2)}


def test_no_pair_is_in_train_and_in_retained(many):
    train, retained = split(many)
    assert len(train) > 150 and len(retained) > 30
    assert not pairs(train) & pairs(retained)
    dropped = [prompt for prompt in many if prompt not in train and prompt not in retained]
    assert dropped and all(len(prompt.parts) == 3 for prompt in dropped)
    assert len(train) + len(retained) + len(dropped) == 300


def test_the_side_of_a_pair_depends_on_nothing_else(many):
    train, retained = split(many, seed=1)
    assert split(many[::-1], seed=1) == (train[::-1], retained[::-1])
    assert split(retained, seed=1) == ([], retained)
    turned = [prompt._replace(parts=prompt.parts[::-1]) for prompt in many]
    assert [p.caption for p in split(turned, seed=1)[1]] == [p.caption for p in retained]
    assert split(many, seed=2)[1] != retained
    assert split(many, retained=0) == (many, []) and split(many, retained=1) == ([], many)
    share = [Prompt("", [], {}, (str(k), "x")) for k in range(2000)]
    assert 400 < len(split(share, retained=.25)[1]) < 600


# ---- the whole pipeline ----


def test_novel_prompts():
    clips = [clip("A human walks slowly then bows.", ["a/DET", "human/NOUN", "walk/VERB", "slowly/ADV",
                                                      "then/ADV", "bow/VERB"],
                  {"first": {"gait": "walk"}, "then": {"bow": True}}),
             clip("a human lifts his arm while jogging"), clip("A human is pushed"),
             clip("a human lifts his arm while jogging")]
    everything = sum(novel_prompts(clips, 500, seed=1)[:2], [])
    train, retained, report = novel_prompts(clips, 500, seed=1, avoid=["A human bows, then lifts his arm."])
    assert report == {"captions": 3, "decomposed": 2, "meta_motions": 4, "not_used": {"passive": 1},
                      "prompts": report["prompts"], "train": len(train), "retained": len(retained)}
    assert report["prompts"] >= len(train) + len(retained) > 20
    names = {prompt.caption for prompt in everything}
    assert "a human walks slowly then bows" not in names and "a human bows then walks slowly" in names
    assert names - {p.caption for p in train + retained} == {"a human bows then lifts his arm"}
    turned = next(p for p in everything if p.caption == "a human bows then walks slowly")
    assert turned.attributes == {"first": {"bow": True}, "then": {"gait": "walk"}}
    assert turned.tokens == ["a/DET", "human/NOUN", "bow/VERB", "then/ADV", "walk/VERB", "slowly/ADV"]
    assert novel_prompts(clips, 500, seed=1)[:2] == novel_prompts(clips, 500, seed=1)[:2]


def test_main(tmp_path, capsys):
    path, out = tmp_path / "list.txt", tmp_path / "novel.txt"
    path.write_text("\n".join(CAPTIONS) + "\n\n")
    command = [str(path), str(path), "--count", "200", "--seed", "4", "--show", "3", "--out", str(out)]
    composing.main(command)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "captions: 20, decomposed 19", "meta motions: 24",
        "parts not used: needs a context 1, passive 1, refers back 1"]
    counts = [int(number) for number in re.findall(r"\d+", printed[3])]
    train, retained = (name.read_text().splitlines() for name in (out, tmp_path / "novel_retained.txt"))
    assert counts == [200, len(train), len(retained)] and min(counts) > 0 and len(printed) == 4 + 3
    assert all(folder.parse_text_line(line) for line in train + retained)
    assert printed[4].startswith("  " + train[0].split("#")[0])
    before = out.read_bytes()
    composing.main(command)
    assert out.read_bytes() == before
    known = {" ".join(datasets.words(caption.partition("#")[0])) for caption in CAPTIONS}
    assert not known & {" ".join(datasets.words(line.split("#")[0])) for line in train + retained}


@pytest.mark.parametrize("name, flags, message", [
    ("absent.txt", [], "absent.txt: cannot be read"), ("empty.txt", [], "empty.txt: holds no caption"),
    ("list.txt", ["--count", "0"], "--count 0"), ("list.txt", ["--show", "-1"], "--show -1"),
    ("latin.txt", [], "latin.txt: cannot be read"),
    ("list.txt", ["--out", "absent/novel.txt"], "--out absent/novel.txt: no such folder")])
def test_bad_input_is_one_line(tmp_path, capsys, name, flags, message):
    (tmp_path / "empty.txt").write_text("\n #100#000001\n")
    (tmp_path / "latin.txt").write_bytes(b"a person walks \xe9l\xe9gamment\n")
    (tmp_path / "list.txt").write_text("a person walks\n")
    with pytest.raises(InputError, match=re.escape(message)):
        composing.main([str(tmp_path / name), *flags])
    with pytest.raises(SystemExit) as stopped:
        run_main(composing.main, [str(tmp_path / name), *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.skipif(not LISTS.is_dir(), reason="the lists of real captions are not here")
@pytest.mark.parametrize("name, least", [("kit_train", 1800), ("kit_test", 350), ("humanml3d_test", 1800)])
def test_real_captions(name, least):
    captions = composing.read_list(LISTS / f"{name}_prompts.txt")
    found, why = decompose([(caption, {}) for caption in captions])
    assert len(found) >= least
    assert why["nothing left"] < .35 * len(set(captions))
    new = compose(found, 200, seed=0, known=captions)
    assert len(new) == 200
    sentence = re.compile(r"a person( \w+ly| fast| forward| backwards| sideways)* \w+s\b.*"
                          r"( then | while | and ).+")
    assert all(sentence.fullmatch(prompt.caption) for prompt in new)


def test_a_key_has_a_lemma_for_each_word(pool):
    for meta in pool:
        assert isinstance(meta, MetaMotion) and len(meta.text.split()) == len(meta.key.split())
    assert [meta.key for meta in pool] == sorted(meta.key for meta in pool)


def test_sets_are_written_for_a_reader(tmp_path, capsys):
    captions = [caption.partition("#")[0] for caption in CAPTIONS]
    clips = [datasets.Clip(c, None, [c], [[]], [{}]) for c in captions]
    data = datasets.Dataset("toy", T2M, {"train": clips, "val": clips[:1], "test": []}, "x")
    sets, report = composing.composed_sets(data, 80, seed=1)
    assert [report[name] for name in ("train", "val", "test")] == [len(clips) for clips in sets.values()]
    train, val, test = sets.values()
    assert len(train) > len(test) > 0 and all(clip.features.shape == (0, 263) for clip in train + val + test)
    composing.write_sets(tmp_path / "a.txt", sets, report, show=2)
    written, retained = ((tmp_path / name).read_text().splitlines() for name in ("a.txt", "a_retained.txt"))
    assert [line.split("#")[0] for line in written] == [clip.captions[0] for clip in train]
    assert [line.split("#")[0] for line in retained] == [clip.captions[0] for clip in val + test]
    assert capsys.readouterr().out == (f"composed captions: {report}\n  {train[0].captions[0]}\n"
                                       f"  {train[1].captions[0]}\n")
    with pytest.raises(InputError, match="absent.a.txt: no such folder; make it first"):
        composing.write_sets(tmp_path / "absent" / "a.txt", sets, report)
