"""Rules for the source: nothing from a file is executed, no network, no global random numbers."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for pattern in ("*.py", "common/**/*.py", "results/**/*.py")
                 for path in ROOT.glob(pattern))

MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "urllib", "requests", "socket", "http",
           "ftplib", "tarfile", "ctypes", "imp", "random"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "importlib.import_module",
         "torch.hub.load", "torch.jit.load", "torch.manual_seed", "torch.random.manual_seed", "torch.seed",
         "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.set_rng_state",
         "warnings.filterwarnings"}
# functions that draw from torch's global stream unless they are given a generator
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "rand_like",
         "randn_like", "randint_like"}
DRAWING_METHODS = {"multinomial", "bernoulli", "bernoulli_", "normal_", "uniform_", "random_", "exponential_",
                   "log_normal_", "cauchy_", "geometric_"}
LIBRARIES = {"torch", "nn", "F", "np", "os", "sys"}
NUMPY_RANDOM = {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox"}


def dotted(node):
    """a.b.c -> "a.b.c"; "?" stands for anything but names, as in f().b."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def literal(call, name):
    """The value of a keyword given as a literal, else None."""
    values = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def only_raises(method):
    """Whether a statement is the method find_class and does nothing but raise."""
    if not isinstance(method, ast.FunctionDef) or method.name != "find_class" or method.decorator_list:
        return False
    body = method.body[1:] if ast.get_docstring(method) is not None else method.body
    return [type(line) for line in body] == [ast.Raise]


def refuses_classes(tree):
    """Whether pickle serves only as the base of unpicklers that consist of a find_class which does nothing
    but raise: such an unpickler reads lists, dicts, strings and numbers, and can execute nothing."""
    nodes = list(ast.walk(tree))
    classes = {node: [dotted(base) for base in node.bases]
               for node in nodes if isinstance(node, ast.ClassDef)}
    plain = [node for node, bases in classes.items() if bases == ["pickle.Unpickler"] and not node.keywords]
    bodies = [node.body[1:] if ast.get_docstring(node) is not None else node.body for node in plain]
    if not plain or not all(len(body) == 1 and only_raises(body[0]) for body in bodies):
        return False
    if {node.name for node in plain} & {base for bases in classes.values() for base in bases}:
        return False  # a class of it could allow what it refuses
    used = [node.attr for node in nodes if isinstance(node, ast.Attribute) and dotted(node.value) == "pickle"]
    named = sum(isinstance(node, ast.Name) and node.id == "pickle" for node in nodes)
    return (named == len(used) and used.count("Unpickler") == len(plain)
            and {*used} <= {"Unpickler", "UnpicklingError"})


def violations(source):
    """["line: what"] of one file's text."""
    found, tree = [], ast.parse(source)
    allowed = {"pickle"} if refuses_classes(tree) else set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.asname or alias.name not in allowed]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module in ("torch", "numpy", "os"):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in MODULES or name in CALLS or name in {f"torch.{draw}" for draw in DRAWS}:
                found.append(f"{node.lineno}: import of {name}")
        if isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body):
            found.append(f"{node.lineno}: a swallowed exception")
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {what}" for what in call_violations(node)]
    return found


def call_violations(call):
    """What one call does against the rules."""
    name = dotted(call.func)
    last = call.func.attr if isinstance(call.func, ast.Attribute) else name
    keywords = {keyword.arg for keyword in call.keywords}
    if name in CALLS:
        yield name
    if name == "torch.load" and literal(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if "allow_pickle" in keywords and literal(call, "allow_pickle") is not False:
        yield "allow_pickle that is not False"
    if "shell" in keywords and literal(call, "shell") is not False:
        yield "shell=True"
    if last == "load_state_dict" and "strict" in keywords:
        yield "load_state_dict that is not strict"
    if name == "getattr" and not isinstance(call.args[1], ast.Constant) and dotted(call.args[0]) in LIBRARIES:
        yield "getattr of a library by a computed name"
    if last in {"extractall", "unpack_archive"}:
        yield "archive extraction"
    if name.startswith(("np.random.", "numpy.random.")) and last not in NUMPY_RANDOM:
        yield f"global numbers: {name}"
    if last == "default_rng" and not call.args:
        yield "default_rng without a seed"
    if name in {f"torch.{draw}" for draw in DRAWS} and "generator" not in keywords:
        yield f"global numbers: {name}"
    if isinstance(call.func, ast.Attribute) and last in DRAWING_METHODS and "generator" not in keywords:
        if not name.startswith("torch."):
            yield f"global numbers: .{last}"
    if name.startswith(("nn.init.", "torch.nn.init.", "init.")) and "generator" not in keywords \
            and last not in {"zeros_", "ones_", "constant_", "eye_"}:
        yield f"global numbers: {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_source_keeps_the_rules(path):
    assert violations(path.read_text(encoding="utf-8")) == []


PLAIN = """import pickle
class Plain(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(name)
"""


def test_an_unpickler_that_refuses_every_class_passes_and_no_other_use_of_pickle():
    assert violations(PLAIN) == []
    for old, new in (("raise pickle.UnpicklingError(name)", "return super().find_class(module, name)"),
                     ("        raise", "        if name:\n            raise"),
                     ("        raise", "        print(name)\n        raise"),
                     ("find_class", "find_classes"), ("pickle.Unpickler)", "pickle.Unpickler, Other)"),
                     ("import pickle", "import pickle as p"), ("import pickle", "from pickle import loads"),
                     ("    def", "    def persistent_load(self, pid):\n        return f(pid)\n    def")):
        assert old in PLAIN and violations(PLAIN.replace(old, new)), new
    for more in ("pickle.loads(b)", "pickle.Unpickler(f).load()", "load = pickle.load", "p = pickle",
                 "class Open(Plain):\n    def find_class(self, module, name):\n        return f(name)",
                 "getattr(pickle, name)"):
        assert violations(PLAIN + more), more


@pytest.mark.parametrize("line", [
    "import pickle", "from urllib import request", "import socket", "import numpy.random, random",
    "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
    "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)", "eval(text)", "exec(text)",
    "os.system(text)", "subprocess.run(text, shell=True)", "__import__(name)",
    "getattr(torch, name)(x)", "torch.manual_seed(0)",
    "np.random.seed(0)", "np.random.randn(3)", "np.random.default_rng()", "torch.randn(3)",
    "torch.randn_like(x)", "x.normal_()", "logits.multinomial(1)", "torch.multinomial(p, 1)",
    "nn.init.xavier_uniform_(w)", "from torch import randn", "model.load_state_dict(state, strict=False)",
    "archive.extractall()", "try:\n    f()\nexcept Exception:\n    pass"])
def test_the_scan_sees(line):
    assert violations(line)


@pytest.mark.parametrize("line", [
    "torch.load(path, weights_only=True, map_location='cpu')", "np.load(path)",
    "np.load(path, allow_pickle=False)", "torch.randn(3, generator=g)", "np.random.default_rng([1, 2])",
    "rng.normal(size=3)", "x.normal_(generator=g)", "model.eval()", "model.to(d).eval()",
    "getattr(args, name)", "subprocess.run(['git'])", "nn.init.zeros_(w)",
    "nn.init.normal_(w, generator=g)"])
def test_the_scan_lets_pass(line):
    assert violations(line) == []


def test_there_is_something_to_scan():
    known = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"common/runs.py", "common/lora.py", "common/samplers.py"} <= known
    assert {"ddpo_motion.py", "results/tables.py"} <= known
    assert any(path.startswith("common/embedded/") for path in known)
    assert any(path.startswith("common/published/") for path in known)
