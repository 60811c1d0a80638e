"""The rules of the house that a machine can check."""
import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("", "common", "tests") for path in (ROOT / folder).glob("*.py"))
SCRIPTS = sorted(ROOT.glob("*_motion.py"))


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


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts_fit_a_reader(path):
    assert len(path.read_text().splitlines()) <= 750


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


DOCUMENTED = [path for path in SOURCES if path.parent.name != "tests" and path.name != "__init__.py"]


@pytest.mark.parametrize("path", DOCUMENTED, ids=name)
def test_public_functions_have_docstrings(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source))
    assert undocumented(source) == []


def test_the_docstring_check_sees():
    source = "def f():\n    pass\n\nclass A:\n    'doc'\n    def g(self):\n        pass\n"
    assert undocumented(source) == ["f", "A.g"]
    assert undocumented("def _f():\n    pass\n") == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("common/*.py")), ids=name)
def test_common_imports_no_script_and_only_known_packages(path):
    known = {"common", "numpy", "torch", "einops", "tqdm", "matplotlib", "PIL"}
    known |= {"clip"}  # an extra that is imported when asked for, see README
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            top = module.split(".")[0]
            assert top in known or top in sys.stdlib_module_names, module
