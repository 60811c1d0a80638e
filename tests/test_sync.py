"""Blocks that the scripts share on purpose: each copy stands between `# [sync:name]` and `# [/sync:name]`.

The copies must be equal byte for byte. After a change in one script, `python tests/test_sync.py --copy FILE`
writes the blocks of FILE into the other scripts.
"""
import difflib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# block: the scripts that hold it. A block that loses its markers in one script would be compared no more.
BLOCKS = {
    "denoiser": ("ddpo", "stepwise"),
    "predict": ("ddpo", "stepwise"),
    "strongest": ("ddpo", "ppo"),
    "gpt": ("ppo", "pareto"),
    "margin": ("ppo", "pareto"),
    "policy": ("ppo", "pareto"),
    "ppo": ("ppo", "pareto"),
    "make_policy": ("ppo", "pareto"),
}
MARK = re.compile(r"^ *# \[(/?)sync:([a-z0-9_]+)\]\n", re.MULTILINE)


def blocks(text, where="file"):
    """{name: text between the markers}; ValueError for markers that are not paired."""
    found, opened, start = {}, None, 0
    for mark in MARK.finditer(text):
        closing, name = mark.group(1) == "/", mark.group(2)
        if closing != (opened is not None) or (closing and name != opened) or (not closing and name in found):
            raise ValueError(f"{where}: {mark.group().strip()} has no partner, is nested or comes twice")
        if closing:
            found[name] = text[start:mark.start()]
        opened, start = (None, 0) if closing else (name, mark.end())
    if opened is not None:
        raise ValueError(f"{where}: [sync:{opened}] is never closed")
    return found


def differences(texts):
    """{file name: text} -> unified diffs of each block against its first copy, "" when all are equal."""
    first, report = {}, []
    for where, text in sorted(texts.items()):
        for name, body in blocks(text, where).items():
            origin, expected = first.setdefault(name, (where, body))
            if body != expected:
                report += difflib.unified_diff(expected.splitlines(True), body.splitlines(True),
                                               f"{origin} [{name}]", f"{where} [{name}]")
    return "".join(report)


def copy(source, target):
    """`target` with every block that `source` has too replaced by the source's."""
    for name, body in blocks(source, "source").items():
        if name in blocks(target, "target"):
            target = target.replace(blocks(target, "target")[name], body)
    return target


def scripts():
    """The scripts at the root of the repository."""
    return sorted(ROOT.glob("*_motion.py"))


def test_copies_are_equal():
    texts = {path.name: path.read_text(encoding="utf-8") for path in scripts()}
    assert texts
    report = differences(texts)
    assert not report, "\n" + report


def test_every_block_is_where_the_table_says():
    found = {}
    for path in scripts():
        for block in blocks(path.read_text(encoding="utf-8"), path.name):
            found.setdefault(block, set()).add(path.stem.removesuffix("_motion"))
    known = {block: set(holders) for block, holders in BLOCKS.items()}
    missing = {block: sorted(holders - found.get(block, set())) for block, holders in known.items()}
    assert not any(missing.values()), f"markers are missing: {missing}"
    assert found == known, "a block that is not in BLOCKS, or in more scripts"


LEFT = "a = 1\n# [sync:net]\nx = 1\n# [/sync:net]\nb = 2\n# [sync:loss]\ny = 1\n# [/sync:loss]\n"
RIGHT = "c = 3\n# [sync:net]\nx = 2\n# [/sync:net]\nd = 4\n"


def test_a_difference_is_shown_and_copied_away():
    report = differences({"left.py": LEFT, "right.py": RIGHT})
    assert "-x = 1\n" in report and "+x = 2\n" in report and "right.py [net]" in report
    repaired = copy(LEFT, RIGHT)
    assert repaired == "c = 3\n# [sync:net]\nx = 1\n# [/sync:net]\nd = 4\n"
    assert differences({"left.py": LEFT, "right.py": repaired}) == ""
    assert copy(RIGHT, LEFT) == LEFT.replace("x = 1", "x = 2")


def test_one_space_is_a_difference():
    assert differences({"left.py": LEFT, "right.py": RIGHT.replace("x = 2", "x = 1 ")})


@pytest.mark.parametrize("text", [
    "# [sync:a]\n", "# [/sync:a]\n", "# [sync:a]\n# [/sync:b]\n",
    "# [sync:a]\n# [sync:b]\n# [/sync:b]\n# [/sync:a]\n",
    "# [sync:a]\n# [/sync:a]\n# [sync:a]\n# [/sync:a]\n"])
def test_broken_markers_are_an_error(text):
    with pytest.raises(ValueError):
        blocks(text)


def main(argv):
    """Command line: `--copy FILE` rewrites the other scripts, no argument prints the differences."""
    if len(argv) == 2 and argv[0] == "--copy":
        source = Path(argv[1]).resolve()
        for path in scripts():
            text = path.read_text(encoding="utf-8")
            new = copy(source.read_text(encoding="utf-8"), text)
            if path != source and new != text:
                path.write_text(new, encoding="utf-8")
                print(f"rewrote the shared blocks of {path.name}")
        return 0
    if argv:
        print("usage: python tests/test_sync.py [--copy FILE]", file=sys.stderr)
        return 2
    report = differences({path.name: path.read_text(encoding="utf-8") for path in scripts()})
    print(report or "all shared blocks are equal")
    return 1 if report else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
