"""The rules of the house that a machine can check.

Rules of form hold for the four scripts by name: a copy of one may grow as its owner likes.
"""
import ast
import dataclasses
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

from common import runs
from common.published import t2m_gpt
from tests.run_helpers import load

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("ddpo", "ppo", "pareto", "stepwise")
SCRIPTS = [ROOT / f"{name}_motion.py" for name in NAMES]
SOURCES = sorted(SCRIPTS + [path for folder in ("common", "results", "tests")
                            for path in (ROOT / folder).rglob("*.py")])


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_lines(path):
    raw = path.read_bytes()
    assert raw.isascii(), [n for n, line in enumerate(raw.split(b"\n"), 1) if not line.isascii()]
    assert b"\t" not in raw and b"\r" not in raw
    lines = raw.decode().split("\n")
    assert not raw or lines[-1] == ""
    assert [n for n, line in enumerate(lines, 1) if len(line) > 110] == []
    assert [n for n, line in enumerate(lines, 1) if line != line.rstrip()] == []
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X")  # split, so that this file passes its own test
    assert [n for n, line in enumerate(lines, 1) if any(word in line for word in words)] == []
    machine = ("/wo" + "rk/", "/ho" + "me/", "/tm" + "p/")
    assert [n for n, line in enumerate(lines, 1) if any(word in line for word in machine)] == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_imported_in_vain(path):
    source = path.read_text()
    nodes = list(ast.walk(ast.parse(source)))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
               and "noqa: F401" not in source.splitlines()[node.lineno - 1]]
    imported = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    assert imported <= {node.id for node in nodes if isinstance(node, ast.Name)}


# Characters and statements of code, without comments and docstrings: what a reader has to hold in the head.
CEILINGS = {"ddpo": (370, 19_000), "ppo": (405, 21_500), "pareto": (480, 26_000),
            "stepwise": (440, 23_500)}


def weigh(source):
    """Statements of a module, docstrings aside, and characters of its code without comments and spaces."""
    tree = ast.parse(source)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    said = [node for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    for node in said:
        node.value.value = ""
    return len(nodes) - len(said), len(re.sub(r"\s", "", ast.unparse(tree)))


def comment_share(source):
    """Share of the non-blank lines inside functions that have a comment, sync marks aside."""
    lines = source.splitlines()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    inside = {k for f in functions for k in range(f.lineno, f.end_lineno + 1) if lines[k - 1].strip()}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and "sync:" not in t.string}
    return len(comments & inside) / len(inside)


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts_fit_a_reader(path):
    source = path.read_text()
    lines = [line for line in source.splitlines() if line.strip()]
    assert [line for line in lines if len(line) > 100] == []
    assert sum(map(len, lines)) / len(lines) <= 64
    assert comment_share(source) >= 0.12
    statements, characters = weigh(source)
    most = CEILINGS[path.stem.removesuffix("_motion")]
    assert statements <= most[0] and characters <= most[1]


@pytest.mark.parametrize("script", NAMES)
def test_a_newcomer_can_read_the_flags(script):
    module = load(script)
    args = next(node for node in ast.parse((ROOT / f"{script}_motion.py").read_text()).body
                if isinstance(node, ast.ClassDef) and node.name == "Args")
    assert args.end_lineno - args.lineno < 60
    groups = runs.make_parser(module.Args, module.__doc__)._action_groups
    flags = [action for group in groups for action in group._group_actions if action.dest != "help"]
    most = 50 if issubclass(module.Args, t2m_gpt.WeightArgs) else 45  # five name published weights
    assert len(flags) == len(dataclasses.fields(module.Args)) <= most
    assert all(action.help for action in flags)


SECTIONS = ["1. Imports", "2. Arguments", "3. The network", "4. The reward", "5. The policy", "6. ",
            "7. Training", "8. The run"]


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_sections_and_names_are_those_of_all_scripts(path):
    source = path.read_text()
    heads = re.findall(r"^# ---- (\d\. .*?)(?: -+)?$", source, re.M)
    assert len(heads) == 8 and all(head.startswith(known) for head, known in zip(heads, SECTIONS)), heads
    functions = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert functions >= {"collect", "score", "update", "train", "policy_sampler", "make_policy",
                         "load_policy", "write_motions", "main", "check_args"}
    fields = {entry.name for entry in dataclasses.fields(load(path.stem.removesuffix("_motion")).Args)}
    assert fields >= {"prompts", "iterations", "lr", "size", "eval_every"}
    assert not fields & {"batch", "generator", "generated"}  # each had two meanings
    stages = re.findall(r"^ +# ([1-4])\. \w.*\.$", source[source.index("def train("):], re.M)
    assert stages[:4] == list("1234"), "the four stages stand in train() with a spoken comment each"


def undocumented(source):
    """Names of the public functions and classes of a module, methods included, without a docstring."""
    found = []

    def visit(node, prefix):
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
                # forward(x) is described by the class of its network
                if ast.get_docstring(child) is None and child.name != "forward":
                    found.append(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(source), "")
    return found


DOCUMENTED = [path for path in SOURCES if "tests" not in path.parts and path.name != "__init__.py"]


@pytest.mark.parametrize("path", DOCUMENTED, ids=name)
def test_public_functions_have_docstrings(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source))
    assert undocumented(source) == []


def test_the_docstring_check_sees():
    source = "def f():\n    pass\n\nclass A:\n    'doc'\n    def g(self):\n        pass\n"
    assert undocumented(source) == ["f", "A.g"]
    assert undocumented("def _f():\n    pass\n") == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("common/**/*.py")), ids=name)
def test_common_imports_no_script_and_only_known_packages(path):
    known = {"common", "numpy", "torch", "einops", "tqdm", "matplotlib", "PIL"}
    known |= {"clip"}  # an extra that is imported when asked for, see README
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            top = module.split(".")[0]
            assert top in known or top in sys.stdlib_module_names, module
