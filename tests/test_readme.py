"""What README.md and results/*.md say holds: commands and flags exist, equations are where they say, links
lead somewhere, and every flag of a script is spoken of."""

import ast
import functools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from common import runs
from tests.run_helpers import Forked, load

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
LINK = re.compile(r'\]\(([^)\s]+)|(?:src|href)="([^"]+)"')
SPAN = re.compile(r"`((?:python|torchrun) [^`]+)`")
ROW = re.compile(r"^\| `(\w+_motion\.py)` \| (.*`\w+`.*) \|$", re.M)
EQUATION = re.compile(r"((?:[Ee]qs?\. ?|[Ss]ection |Algorithm )[\d().]+)")
PAGES = [README, *sorted((ROOT / "results").glob("*.md"))]
SCRIPTS = ("ddpo", "ppo", "pareto", "stepwise")


def commands(text):
    """Every command that runs Python, in a fenced block or a span of code, from the script on: [["x.py",
    "--flag", ...]]."""
    found = []
    for block in [*FENCE.findall(text), *SPAN.findall(FENCE.sub("", text))]:
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


def run_module(name):
    """What `python -m name --help` does."""
    sys.argv = [name, "--help"]
    runpy.run_module(name, run_name="__main__")


@functools.cache
def flags(script):
    """The flags that `python script --help` lists; script is a path or "-m module"."""
    name = script.removeprefix("-m ").removesuffix(".py")
    child = Forked(functools.partial(run_module, name)).wait()
    assert child.code == 0, f"python {script} --help: {child.errors}"
    return set(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", child.out))


def flags_of(script):
    """The flags of one of the four scripts, without those of --help and --no-x."""
    module = load(script)
    return {option for action in runs.make_parser(module.Args, "")._actions if action.dest != "help"
            for option in action.option_strings if not option.startswith("--no-")}


def complaints(words):
    """What is wrong with a command; words as `commands` gives them."""
    if words[0] == "-m":
        if words[1].split(".")[0] not in ("common", "results", "tests"):
            return []                                                       # pip, pytest, venv: not ours
        script, rest = f"-m {words[1]}", words[2:]
        path = ROOT / (words[1].replace(".", "/") + ".py")
        path = path if path.is_file() else path.with_suffix("") / "__main__.py"
    else:
        script, rest, path = words[0], words[1:], ROOT / words[0]
    if not path.is_file():
        return [f"{path.name} does not exist"]
    if words[1:2] == ["results.studies"]:  # its flags are those of the script that it runs
        known = flags(script) | set().union(*map(flags_of, SCRIPTS))
        asked = [word.split("=")[0] for word in rest if word.startswith("--")]
        return [f"{script} has no {word}" for word in asked if word.replace("--no-", "--") not in known]
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


def rows(text):
    """Rows of a table "script | where the equations are" -> [(citation, file, name)]. Items stand between
    commas or semicolons; one without a name has that of the next, one without a paper that of the last."""
    found = []
    for file, cells in ROW.findall(text):
        pending = []
        for item in re.split(r"[,;] ", cells):
            citation, name = re.fullmatch(r"([^`]*?)\s*(?:`(\w+)`)?", item).groups()
            pending.append(citation)
            if name:
                found += [(one, file, name) for one in pending]
                pending = []
    return found


def equation_complaint(root, citation, file, name):
    """What is wrong with a row of the equation table, or None. The number of the equation must stand in the
    function's text; a citation without one must stand there whole, or be the name of the function."""
    if not (root / file).is_file():
        return f"{file} does not exist"
    text = function_text(root / file, name)
    if text is None:
        return f"{file} has no {name}"
    number = EQUATION.search(citation)
    wanted = plain(number.group() if number else citation)
    bare = plain(text).replace("(", "").replace(")", "")
    known = wanted.replace("(", "").replace(")", "") in bare or wanted in name
    return None if known else f"{file}:{name} does not mention '{citation}'"


def dead_links(path):
    """Relative links of a Markdown file that lead nowhere. Web addresses and anchors are not followed."""
    text = FENCE.sub("", path.read_text())
    targets = [a or b for a, b in LINK.findall(text)]
    local = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    return [target for target in local if not (path.parent / target).exists()]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_commands_exist(path):
    found = commands(path.read_text())
    assert found, "no python command in a fenced block"
    assert [(" ".join(words), wrong) for words in found for wrong in complaints(words)] == []


def test_equations_are_where_the_table_says():
    found = rows(README.read_text())
    assert {file for _, file, _ in found} == {f"{script}_motion.py" for script in SCRIPTS}
    assert [wrong for row in found if (wrong := equation_complaint(ROOT, *row))] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_spoken_of(script):
    """In a documented command, or anywhere on a page: a flag that no page needs need not be."""
    words = set(re.findall(r"--[a-z][\w-]*", "\n".join(path.read_text() for path in PAGES)))
    words |= {f"--{word.removeprefix('--no-')}" for word in words if word.startswith("--no-")}
    assert sorted(flags_of(script) - words) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    assert dead_links(path) == []


def test_these_checks_notice(tmp_path):
    """The checks themselves: each kind of mistake is reported, and what is right is not."""
    text = "```bash\nA=1 python -m common.published.check X  # note\npython none.py \\\n  --seed 1\n```\n"
    assert commands("say `python none.py --seed 1`, not `none.py --x`") == [["none.py", "--seed", "1"]]
    assert complaints(["-m", "results.studies", "tracker", "--prompts", "3", "--nothing"]) == [
        "-m results.studies has no --nothing"]
    assert commands(text) == [["-m", "common.published.check", "X"], ["none.py", "--seed", "1"]]
    assert complaints(["none.py", "--seed"]) == ["none.py does not exist"]
    assert complaints(["-m", "common.published.check", "--none"]) == [
        "-m common.published.check has no --none"]
    (tmp_path / "a.py").write_text("# PPO\n# eq. (7)\n@cache\ndef f():\n    pass\n\n\ndef g():\n    pass\n")
    assert equation_complaint(tmp_path, "PPO eq. (7)", "a.py", "f") is None
    for citation, file, name in (("PPO eq. (7)", "a.py", "g"), ("PPO", "a.py", "h"), ("PPO", "b.py", "f")):
        assert equation_complaint(tmp_path, citation, file, name)
    table = "| `a_motion.py` | A Eq. (1) `f`, Eq. (2) `g`; B, C eq. 7 `h` |\n| `x.py` | y |\n"
    assert rows(table) == [(citation, "a_motion.py", name) for citation, name in (
        ("A Eq. (1)", "f"), ("Eq. (2)", "g"), ("B", "h"), ("C eq. 7", "h"))]
    links = '[a](a.py#top) [![b](gone.png)](gone.md) <img src="gone.gif"> [c](https://x.y) [d](#here)'
    (tmp_path / "r.md").write_text(links)
    assert dead_links(tmp_path / "r.md") == ["gone.png", "gone.md", "gone.gif"]
