"""results/ab_page.py: the page that people vote on, in a real browser where there is one, and its votes."""
import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from common import InputError, evaluate
from common.features import T2M
from results import ab_page, studies
from tests.run_helpers import smaller

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CAPTIONS = ["a person walks", 'she says "stop" & </script><b>turns</b>', "waves, twice", "a person kicks"]


def motions(height):
    """Walks of 8, 12, 16 and 20 frames along x, all joints at one height."""
    made = []
    for k in range(len(CAPTIONS)):
        joints = np.zeros((8 + 4 * k, T2M.joints, 3))
        joints[..., 1] = height + np.linspace(0, 1, T2M.joints)
        joints[..., 0] = 5 + np.arange(len(joints))[:, None] / 20
        made.append(joints)
    return made


def study_of(path):
    """The data inside a page."""
    return json.loads(re.search(r"const study = (.*);\n", path.read_text()).group(1))


@pytest.fixture
def page(tmp_path):
    """A page with base motions at height 0 and tuned ones at height 1."""
    ab_page.write(tmp_path / "ab.html", CAPTIONS, motions(0.0), motions(1.0), T2M, seed=3)
    return tmp_path / "ab.html"


def test_the_page_stands_alone_and_hides_the_sides(page):
    text, study = page.read_text(), study_of(page)
    assert not re.search(r"https?:|<link|<img|src=|import ", text)
    assert text.count("</script>") == 1, "a caption cannot end the script"
    assert sorted(pair["id"] for pair in study["pairs"]) == [0, 1, 2, 3]
    assert [pair["tuned"] for pair in study["pairs"]].count("left") == 2
    assert study["fps"] == 20 and study["joints"] == 22 and len(study["colours"]) == len(T2M.chains)
    for pair in study["pairs"]:
        assert pair["caption"] == CAPTIONS[pair["id"]]
        other = {"left": "right", "right": "left"}[pair["tuned"]]
        for side, height in ((pair["tuned"], 1000), (other, 0)):
            raw = np.frombuffer(base64.b64decode(pair[side]), "<i2").reshape(-1, 22, 3)
            assert len(raw) == 8 + 4 * pair["id"] and (raw[:, 0, 1] == height).all()
            assert (raw[:, 0, 0] == 50 * np.arange(len(raw))).all(), "millimetres, from 0"


def test_order_and_sides_are_drawn_by_the_seed(tmp_path):
    drawn = set()
    for seed in (0, 0, 1, 2, 3):
        ab_page.write(tmp_path / "ab.html", CAPTIONS, motions(0.0), motions(1.0), T2M, seed)
        drawn.add(tuple((pair["id"], pair["tuned"]) for pair in study_of(tmp_path / "ab.html")["pairs"]))
    assert len(drawn) >= 3


def in_browser(page, script):
    """Text that a script leaves in <pre id=out> of the page, run after the page's own."""
    probe = page.with_name("probe.html")
    probe.write_text(page.read_text().replace("</html>", f"<pre id=out></pre><script>{script}</script>"))
    out = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
         f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="out">(.*?)</pre>', out, re.S)
    return found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium here: Debian's package is `chromium`")

PRESS = """
const out = document.getElementById("out");
function press(key) { document.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true})); }
"""


@needs_browser
def test_votes_in_a_browser(page, tmp_path):
    """Keys vote, go back and correct; the CSV says what was preferred, and the command reads it."""
    order = study_of(page)["pairs"]
    keys = ["ArrowLeft", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowDown"]
    said = in_browser(page, PRESS + f"for (const key of {json.dumps(keys)}) press(key);"
                      "out.textContent = document.getElementById('progress').textContent + '\\n'"
                      "+ document.getElementById('caption').textContent + '\\n' + csv();")
    progress, caption, *lines = said.strip().split("\n")
    assert progress == "pair 3 of 4, question 2 of 2" and caption == order[2]["caption"]
    assert lines[0] == "study,pair,caption,question,preferred" and len(lines) == 6
    (tmp_path / "votes.csv").write_text("\n".join(lines) + "\n")
    votes = {vote[1:3]: vote[3] for vote in ab_page.read_votes(tmp_path / "votes.csv")}

    def wanted(place, side):
        return "tuned" if order[place]["tuned"] == side else "base"
    ids = [str(pair["id"]) for pair in order]
    assert votes == {(ids[0], "realism"): wanted(0, "left"), (ids[0], "text"): "equal",
                     (ids[1], "realism"): wanted(1, "right"), (ids[1], "text"): wanted(1, "left"),
                     (ids[2], "realism"): "equal"}


@needs_browser
def test_the_page_draws_both_motions_and_remembers(page):
    """Something is drawn on both sides, it moves, and stored answers are gone on from."""
    said = in_browser(page, PRESS + """
press("ArrowLeft");
function ink() { return ["left", "right"].map(side => { const c = document.getElementById(side);
  const pixels = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  return Array.from(pixels).filter(value => value).length; }); }
shown = 0; playing = false;
draw("left", motions[0].left[0], extent(motions[0])); draw("right", motions[0].right[0], extent(motions[0]));
const first = ink().join();
draw("left", motions[0].left[7], extent(motions[0])); draw("right", motions[0].right[7], extent(motions[0]));
out.textContent = JSON.stringify({first, then: ink().join(), kept: localStorage.getItem(key),
  left: motions[0].left[1][0], joints: motions[0].left[0].length});
""")
    found = json.loads(said)
    assert min(map(int, found["first"].split(","))) > 1000 and found["first"] != found["then"]
    assert json.loads(found["kept"]) == {f"{study_of(page)['pairs'][0]['id']} realism": "left"}
    assert found["left"][0] == 0.05 and found["joints"] == 22


@needs_browser
def test_motions_go_on_after_the_last_vote(page):
    said = in_browser(page, PRESS + """
for (let k = 0; k < 9; k += 1) press("ArrowDown");
let ticks = 0;
const ask = window.requestAnimationFrame;
window.requestAnimationFrame = () => { ticks += 1; };
tick((last ?? 0) + 16);
out.textContent = ticks + " " + document.getElementById("progress").textContent;
window.requestAnimationFrame = ask;
""")
    assert said == "1 That was all. Please export your answers."


def write_votes(path, *votes, study="s"):
    lines = ["study,pair,caption,question,preferred"] + [
        f'"{study}",{pair},"a, b",{question},{preferred}' for pair, question, preferred in votes]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_win_rates_by_hand(tmp_path, capsys):
    """The pairs are the sample: two people's votes on one pair are averaged first."""
    first = write_votes(tmp_path / "a.csv", (0, "realism", "tuned"), (1, "realism", "tuned"),
                        (2, "realism", "base"), (0, "text", "equal"))
    second = write_votes(tmp_path / "b.csv", (0, "realism", "base"), (3, "realism", "equal"),
                         (3, "realism", "tuned"))
    rates = ab_page.win_rates([first, second])
    realism = rates["realism"]
    counted = {"people": 2, "votes": 5, "pairs": 4, "tuned": 3, "equal": 0, "base": 2}
    assert {name: realism[name] for name in counted} == counted, "the last answer to a pair counts"
    assert realism["rate"] == (0.5 + 1 + 0 + 1) / 4
    assert rates["text"]["rate"] == 0.5 and rates["text"]["pairs"] == 1
    assert (realism["low"], realism["high"]) == ab_page.wilson(0.625, 4)
    ab_page.main([str(first)])
    assert capsys.readouterr().out.startswith("realism  tuned preferred in 66.7% (95 % interval ")


@pytest.mark.parametrize("share, n, low, high", ((0.5, 10, 0.2366, 0.7634), (1.0, 20, 0.8389, 1.0),
                                                 (0.0, 5, 0.0, 0.4345)))
def test_wilson_interval(share, n, low, high):
    """Values of Wilson's formula worked out by hand."""
    assert ab_page.wilson(share, n) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


def test_wrong_votes(tmp_path):
    good = write_votes(tmp_path / "good.csv", (0, "text", "tuned"))
    other = write_votes(tmp_path / "other.csv", (0, "text", "tuned"), study="t")
    with pytest.raises(InputError, match="different pages"):
        ab_page.win_rates([good, other])
    for content, words in (("", "holds no vote"), ("a,b\n1,2\n", "line 2: no vote of the page"),
                           (good.read_text().replace("tuned", "better"), "line 2")):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(InputError, match=words):
            ab_page.win_rates([tmp_path / "bad.csv"])
    with pytest.raises(InputError, match="none.csv: cannot be read"):
        ab_page.win_rates([tmp_path / "none.csv"])


# ---- A page of finished runs -------------------------------------------------------------------------------


def test_the_page_of_a_run_shows_both_sides_of_the_same_captions(finished_run, monkeypatch):
    """Base and tuned, from the same noise, on captions of test clips that are chosen by position."""
    shown, ddpo = [], finished_run("ddpo")
    with monkeypatch.context() as patch, smaller():
        patch.setattr(ab_page, "write", lambda *given: shown.append(given))
        ab_page.main([str(ddpo.folder), "--pairs", "3"])
        run = studies.reopen(ddpo.folder)
    (path, captions, base, tuned, skeleton, _), = shown
    clips = [run.clips[k * len(run.clips) // 3] for k in range(3)]
    assert path == ddpo.folder / "ab_page.html" and skeleton is T2M
    assert captions == [clip.captions[0] for clip in clips]
    assert [len(j) for j in base] == [len(j) for j in tuned] == [len(clip.features) for clip in clips]
    asked = captions, evaluate.questions(clips, 0)[2], "people", 0
    for motions, name in ((base, "before"), (tuned, "after")):
        expected = evaluate.to_joints(*run.samplers[name](*asked), T2M)
        assert all(np.array_equal(*pair) for pair in zip(motions, expected))


def test_the_page_of_two_runs_compares_what_was_tuned(finished_run, tmp_path, capsys):
    """A run against itself: the same motion on both sides."""
    ddpo = finished_run("ddpo")
    shutil.copytree(ddpo.folder, tmp_path / "other")
    with smaller():
        ab_page.main([str(tmp_path / "other"), str(ddpo.folder), "--pairs", "2"])
    assert "ab_page.html: open it in a browser" in capsys.readouterr().out
    pairs = study_of(tmp_path / "other" / "ab_page.html")["pairs"]
    assert len(pairs) == 2 and all(pair["left"] == pair["right"] for pair in pairs)


@pytest.mark.parametrize("argv", (["a.csv", "run"], ["a", "b", "c"], ["run", "--pairs", "0"]))
def test_a_page_needs_one_run_or_two(argv):
    with pytest.raises(InputError, match="name one run or two"):
        ab_page.main(argv)


def test_votes_that_a_spreadsheet_saved(tmp_path):
    """It puts a byte order mark in front."""
    text = "study,pair,question,preferred\nabc,0,realism,tuned\nabc,1,text,base\n"
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "votes.csv").write_text(text, encoding=encoding)
        assert ab_page.read_votes(tmp_path / "votes.csv") == [
            ("abc", "0", "realism", "tuned"), ("abc", "1", "text", "base")]
