"""What the README says holds: commands and flags exist, equations are where it says, links lead somewhere."""

import ast
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
LINK = re.compile(r'\]\(([^)\s]+)|(?:src|href)="([^"]+)"')
ROW = re.compile(r"^\|\s*([^|]+?)\s*\|\s*`?([\w/]+\.py):([\w.]+)`?\s*\|", re.M)

needs_readme = pytest.mark.skipif(not README.is_file(), reason="there is no README yet")


def commands(text):
    """Every command in a fenced block that runs Python, from the script on: [["x.py", "--flag", ...]]."""
    found = []
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):          # OMP_NUM_THREADS=1 python ...
                words = words[1:]
            if len(words) > 1 and words[0] in ("python", "python3"):
                found.append(words[1:])
            elif words and words[0] == "torchrun":
                script = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
                assert script is not None, f"no script in: {line}"
                found.append(words[script:])
    return found


@functools.cache
def flags(script):
    """The flags that `python script --help` lists; script is a path or "-m module"."""
    line = [sys.executable, *script.split(), "--help"]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"python {script} --help: {run.stderr}"
    return set(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", run.stdout))


def complaints(words):
    """What is wrong with a command; words as `commands` gives them."""
    if words[0] == "-m":
        if words[1].split(".")[0] not in ("common", "tests"):
            return []                                                       # pip, pytest, venv: not ours
        script, rest = f"-m {words[1]}", words[2:]
        path = ROOT / (words[1].replace(".", "/") + ".py")
    else:
        script, rest, path = words[0], words[1:], ROOT / words[0]
    if not path.is_file():
        return [f"{path.name} does not exist"]
    asked = [word.split("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)]
    return [f"{script} has no {flag}" for flag in asked if flag not in flags(script)]


def function_text(path, name):
    """Source of a function or "Class.method" with the comment lines right above it; None if not there."""
    source = path.read_text()
    node = ast.parse(source)
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", None) == part), None)
        if node is None:
            return None
    lines = source.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return "\n".join(lines[first:node.end_lineno])


def plain(text):
    """Lower case, no comment signs, single spaces: a citation may be broken over two lines."""
    return " ".join(re.sub(r"^\s*#", " ", text, flags=re.M).lower().split())


def equation_complaint(root, citation, file, name):
    """What is wrong with a row of the equation table, or None."""
    if not (root / file).is_file():
        return f"{file} does not exist"
    text = function_text(root / file, name)
    if text is None:
        return f"{file} has no {name}"
    return None if plain(citation) in plain(text) else f"{file}:{name} does not mention '{citation}'"


def dead_links(path):
    """Relative links of a Markdown file that lead nowhere. Web addresses and anchors are not followed."""
    text = FENCE.sub("", path.read_text())
    targets = [a or b for a, b in LINK.findall(text)]
    local = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    return [target for target in local if not (path.parent / target).exists()]


@needs_readme
def test_commands_exist():
    found = commands(README.read_text())
    assert found, "no python command in a fenced block"
    assert [(" ".join(words), wrong) for words in found for wrong in complaints(words)] == []


@needs_readme
def test_equations_are_where_the_table_says():
    rows = ROW.findall(README.read_text())
    assert rows, "no row `| citation | file.py:function |`"
    assert [wrong for row in rows if (wrong := equation_complaint(ROOT, *row))] == []


@needs_readme
@pytest.mark.parametrize("path", [README, *sorted((ROOT / "results").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    assert dead_links(path) == []


def test_these_checks_notice(tmp_path):
    """The checks themselves: each kind of mistake is reported, and what is right is not."""
    text = "```bash\nA=1 python -m common.datasets check X  # note\npython none.py \\\n  --seed 1\n```\n"
    assert commands(text) == [["-m", "common.datasets", "check", "X"], ["none.py", "--seed", "1"]]
    assert complaints(["none.py", "--seed"]) == ["none.py does not exist"]
    assert complaints(["-m", "common.datasets", "--none"]) == ["-m common.datasets has no --none"]
    (tmp_path / "a.py").write_text("# PPO\n# eq. (7)\n@cache\ndef f():\n    pass\n\n\ndef g():\n    pass\n")
    assert equation_complaint(tmp_path, "PPO eq. (7)", "a.py", "f") is None
    for citation, file, name in (("PPO eq. (7)", "a.py", "g"), ("PPO", "a.py", "h"), ("PPO", "b.py", "f")):
        assert equation_complaint(tmp_path, citation, file, name)
    assert ROW.findall("| DDPO Eq. 3 | ddpo_motion.py:clipped_loss |\n| PPO eq. (7) | `a.py:A.f` | x |") == [
        ("DDPO Eq. 3", "ddpo_motion.py", "clipped_loss"), ("PPO eq. (7)", "a.py", "A.f")]
    links = '[a](a.py#top) [![b](gone.png)](gone.md) <img src="gone.gif"> [c](https://x.y) [d](#here)'
    (tmp_path / "r.md").write_text(links)
    assert dead_links(tmp_path / "r.md") == ["gone.png", "gone.md", "gone.gif"]
