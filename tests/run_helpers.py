"""What the end-to-end tests of the scripts share. `script` is the module of one, such as ddpo_motion."""
import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from common import (
    datasets, diffusion, evaluate, features, motion_reward, perception, render, retrieval, runs, tokenizer,
    training, vae)
from common.embedded import clips, movements

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
METRICS = ("reward", "judge", "oracle", "fid", "r_precision_top1", "r_precision_top2", "r_precision_top3",
           "mm_dist", "diversity", "foot_skate", "jerk")


def load(name):
    """The module of a script, imported when it is asked for: one that is broken breaks its own tests only."""
    return importlib.import_module(f"{name}_motion")


# ---- a finished run of each script -------------------------------------------------------------------------

LITTLE = {"iterations": 15, "scorer_iterations": 20, "vae_iterations": 10, "clips": (90, 60),
          "latent_dims": 8, "layers": 1}
LITTLE_TOKENS = {"vq_iterations": 12, "gpt_iterations": 12, "scorer_iterations": 8, "clips": 120,
                 "perception_iterations": 3, "calibration": 32}
LITTLE_SCORER = {"layers": 1}
LITTLE_REWARD = motion_reward.Training(spl_iterations=3, head_iterations=6, generated=40)
PAIRS = motion_reward.fit_motion_reward.__kwdefaults__  # has how many pairs its preference head learns from


SOURCE_OF = training.source_of


@functools.cache
def source_of_one(part, reader):
    """The text of one part; reader: inspect.getsource, or what a test has put in its place."""
    return SOURCE_OF(part)[0]


def source_of(*parts):
    """training.source_of, which every key of a cache asks for, and which parses each part anew."""
    return [source_of_one(part, inspect.getsource) for part in parts]


for module in (clips, diffusion, motion_reward, perception, retrieval, tokenizer, vae):
    module.source_of = source_of


MADE, ROWS_OF = {}, {}  # clips by all that shapes them, features by the joints of such a clip


def remembered_clip(make_clip):
    """movements.make_clip, which gives the same bytes for a number in every data set: each is made once."""
    @functools.wraps(make_clip)
    def made(domain, index, skeleton, *, seed=0, gaps=movements.GAPS):
        key = movements._joints, domain, index, skeleton.name, seed, tuple(gaps)
        if key not in MADE:
            MADE[key] = make_clip(domain, index, skeleton, seed=seed, gaps=gaps)
            if MADE[key].joints is not None:
                MADE[key].joints.setflags(write=False)
                ROWS_OF[id(MADE[key].joints)] = {}
        return MADE[key]
    return made


def remembered_features(joints_to_features):
    @functools.wraps(joints_to_features)
    def rows(joints, skeleton, **options):
        if id(joints) not in ROWS_OF:
            return joints_to_features(joints, skeleton, **options)
        known, key = ROWS_OF[id(joints)], tuple(options.items())
        if key not in known:
            known[key] = joints_to_features(joints, skeleton, **options)
            known[key].setflags(write=False)
        return known[key]
    return rows


def remembered_eigh(eigh):
    """torch.linalg.eigh of the last few large matrices: models of the same clips need the same ones."""
    found = {}

    @functools.wraps(eigh)
    def components(matrix, **options):
        if len(matrix) < 200 or options or matrix.requires_grad or type(matrix) is not torch.Tensor:
            return eigh(matrix, **options)
        key = matrix.dtype, hashlib.sha1(matrix.contiguous().numpy()).digest()
        found[key] = found.pop(key) if key in found else eigh(matrix)
        for old in list(found)[:-12]:
            del found[old]
        return tuple(part.clone() for part in found[key])
    return components


torch.linalg.eigh = remembered_eigh(torch.linalg.eigh)
movements.make_clip = remembered_clip(movements.make_clip)
features.joints_to_features = remembered_features(features.joints_to_features)


@contextlib.contextmanager
def smaller(**changes):
    """--tiny is still smaller in this process, with one GIF and few samples for the variety of a policy.
    changes: of LITTLE, for the diffusion scripts."""
    with contextlib.ExitStack() as stack:
        for name, less in (("draw", dict(count=1)), ("variety", dict(prompts=4, samples=2))):
            function = functools.partial(getattr(evaluate, name), **less)
            stack.enter_context(mock.patch.object(evaluate, name, function))
        for space, sizes in diffusion.SIZES.items():
            little = {**LITTLE, "latents": 3 if space == "latent" else 0, **changes}
            stack.enter_context(mock.patch.dict(sizes, tiny=sizes["tiny"]._replace(**little)))
        tiny = tokenizer.SIZES["tiny"]._replace(**LITTLE_TOKENS)
        stack.enter_context(mock.patch.dict(tokenizer.SIZES, tiny=tiny))
        for function, less in ((retrieval.RetrievalModel.__init__, LITTLE_SCORER),
                               (retrieval.train_retrieval, {"batch": 48})):
            stack.enter_context(mock.patch.dict(function.__kwdefaults__, less))
        stack.enter_context(mock.patch.dict(motion_reward.TRAINING, tiny=LITTLE_REWARD))
        stack.enter_context(mock.patch.dict(PAIRS, pairs=30))
        little = dict(width=32, latent=32, layers=1, ff=64, components=32)
        stack.enter_context(mock.patch.dict(motion_reward.SIZES, little))
        yield


class Small(NamedTuple):
    """A small run of a script: four iterations, a look at val after the second and the fourth."""
    flags: str
    product: str            # the file that --load reads
    cached: list            # names of all that it keeps in the cache
    tables: dict            # of results.json -> their rows


ROWS = {"base", "tuned", "gain"}
DOMAINS = ["embedded-humanml3d-t2m", "embedded-kit-t2m"]
DIFFUSION = "--tiny --threads 1 --device cpu --iterations 4 --best-of 2 "
TOKENS = ("--dataset kit --tiny --threads 1 --device cpu --iterations 4 --minibatches 2 --micro-batch 5 "
          "--lr 5e-3 --eval-every 2 --eval-repeats 2 ")
SMALL = {
    "ddpo": Small(
        DIFFUSION, "adapter.pt", ["base", *DOMAINS, "judge", "reward"],
        {"target_val": ROWS | {"gt"}, "target_test": ROWS | {"gt", "best of 2"},
         "source_test": ROWS | {"gt"}}),
    "stepwise": Small(
        DIFFUSION + "--window 2 --lr 1e-2",
        "adapter.pt", ["base", *DOMAINS, "judge", "motion_reward", "motion_reward_heads"],
        {"target_val": ROWS | {"gt"}, "target_test": ROWS | {"gt", "best of 2"},
         "source_test": ROWS | {"gt"}}),
    "ppo": Small(
        TOKENS + "--composed 30 --prompts 8 --samples 4 --kept-samples 16 --best-of 2",
        "policy.pt", ["embedded-kit-kit", "gpt", "judge", "reward", "tokenizer"],
        {"paired_val": ROWS | {"gt", "vq"}, "paired_test": ROWS | {"gt", "vq", "best of 2"},
         "composed_train": ROWS, "composed_val": ROWS, "composed_test": ROWS | {"best of 2"}}),
    "pareto": Small(
        TOKENS + "--prompts 2 --samples 4",
        "policy.pt", ["embedded-kit-kit", "gpt", "judge", "perception", "reward", "reward", "tokenizer"],
        {"paired_val": ROWS | {"gt", "vq"},
         "paired_test": ROWS | {"gt", "vq", "plain", "token text", "token quality", "token preference"}})}


class Finished:
    """An uninterrupted run of SMALL[name] in a process of its own, and the cache that it has filled; other
    runs may have filled a part of it before."""

    def __init__(self, name, here, cache):
        self.script, (flags, product, self.cached, self.tables) = load(name), SMALL[name]
        self.name, self.kind = name, f"{name}-{Path(product).stem}"  # kind: of the product, as its file says
        self.flags = [*flags.split(), "--cache-dir", str(cache)]
        self.out, self.err = start(name, [*self.flags, "--out-dir", "run"], here)
        self.folder, self.cache, self.product = here / "run", cache, here / "run" / product
        self.results = json.loads((self.folder / "results.json").read_text())

    def call(self, *argv):
        return call(self.script, *self.flags, *argv)

    def refused(self, *argv):
        return refused(self.script, *self.flags, *argv)

    def stored(self, path):
        """What the product `path`, or that of the run folder `path`, holds."""
        path = path / self.product.name if path.is_dir() else path
        return runs.load_checkpoint(path, kind=self.kind)

    def checkpoint(self, folder):
        return runs.load_checkpoint(folder / "checkpoint.pt", kind=f"{self.name}-run")

    def is_same(self, folder):
        """Product, checkpoint and log of another run are equal to this one's, bit for bit."""
        assert equal(self.stored(folder), self.stored(self.folder))
        assert equal(self.checkpoint(folder), self.checkpoint(self.folder))
        assert (folder / "logs.csv").read_bytes() == (self.folder / "logs.csv").read_bytes()
        return True


def some_weight(stored):
    """The first tensor in nested dicts that has more than one number."""
    if torch.is_tensor(stored):
        return stored if stored.numel() > 1 else None
    found = (some_weight(value) for value in stored.values()) if isinstance(stored, dict) else ()
    return next((weight for weight in found if weight is not None), None)


# ---- calls -------------------------------------------------------------------------------------------------


def parse(script, *argv):
    return runs.parse_args(script.Args, script.SIZE_ARGS, [str(word) for word in argv], script.__doc__)


def call(script, *argv, **functions):
    """main() in this process, at the sizes of `smaller` -> exit code, stdout, stderr; tracebacks pass.
    functions: those that main() takes in place of its own, such as reward."""
    out, err = io.StringIO(), io.StringIO()
    main = functools.partial(script.main, **functions)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), smaller():
        try:
            runs.run_main(main, [str(word) for word in argv])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def refused(script, *argv):
    """The one line on stderr of a call that must end with exit code 2."""
    code, _, err = call(script, *argv)
    assert (code, err.count("\n")) == (2, 1) and err.startswith("error: "), (code, err)
    return err


class Forked:
    """A process of its own that calls `function`, forked from this one: importing torch again takes seconds.

    env: added to its environment. What it prints goes to the pipe `stdout` and, at the end, to `errors`.
    """

    def __init__(self, function, env=None):
        reading, writing = os.pipe()
        self.errors_file = tempfile.TemporaryFile("w+")
        self.pid, self.code = os.fork(), None
        if self.pid == 0:
            code = 1
            try:
                os.close(reading)
                os.dup2(writing, 1)
                os.dup2(self.errors_file.fileno(), 2)
                os.close(writing)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)
                os.environ.update(env or {})
                function()
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(code)
        os.close(writing)
        self.stdout = os.fdopen(reading)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """Until it ends -> self. `code` is negative for a signal, as in subprocess; `out`: what was left."""
        self.out = "" if self.stdout.closed else self.stdout.read()
        self.stdout.close()
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.errors_file.seek(0)
        self.errors = self.errors_file.read()
        self.errors_file.close()
        return self


SERVER = """
import torch._dynamo, matplotlib.pyplot  # of which importing takes longest
from tests import run_helpers
run_helpers.serve()
"""


@functools.cache
def server():
    """A fresh interpreter that forks for each run: that spares most of them the imports."""
    return subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=ENV, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def stop_server():
    """End it, if one was started."""
    if server.cache_info().currsize:
        server().communicate()
        server.cache_clear()


def serve():
    """What the server does: read script, flags and folder of a run, answer with its code and its output."""
    for line in sys.stdin:
        name, flags, folder = json.loads(line)

        def run():
            os.chdir(folder)
            with smaller():
                runs.run_main(load(name).main, flags)
        child = Forked(run).wait()
        print(json.dumps([child.code, child.out, child.errors]), flush=True)


def start(name, flags, folder):
    """An uninterrupted run that knows nothing of pytest, at the sizes of `smaller` -> its stdout, stderr."""
    print(json.dumps([name, flags, str(folder)]), file=server().stdin, flush=True)
    code, out, err = json.loads(server().stdout.readline())
    assert code == 0, err
    return out, err


def interrupted(script, flags, moment, count, number):
    """A run in a process of its own that gets a signal: in call `count` of the script's function `moment`,
    or "after a checkpoint" or "between log and checkpoint" of iteration `count`."""
    save, calls = runs.save_checkpoint, []

    def strike():
        os.kill(os.getpid(), number)

    def counted(function):
        def called(*args, **options):
            calls.append(args)
            if len(calls) == count:
                strike()
            return function(*args, **options)
        return called

    def saved(path, data, **options):
        here = options.get("kind", "").endswith("-run") and data["iteration"] == count
        if here and moment == "between log and checkpoint":
            strike()
        save(path, data, **options)
        if here and moment == "after a checkpoint":
            strike()

    def main():
        runs.save_checkpoint = saved
        if hasattr(script, moment):
            setattr(script, moment, counted(getattr(script, moment)))
        with smaller():
            runs.run_main(script.main, flags)

    return Forked(main).wait()


def training_only(script, flags):
    """A run without tables and pictures."""
    evaluate.draw = lambda *args, **named: None
    for module in (evaluate, script):
        if hasattr(module, "final_tables"):
            module.final_tables = lambda *args, **named: {}
    with smaller():
        runs.run_main(script.main, [str(word) for word in flags])


def two_processes(script, flags):
    """The training of a run in two processes that torchrun's environment announces."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = functools.partial(training_only, script, flags)
    children = [Forked(run, {**env, "RANK": rank}) for rank in "01"]
    for child in children:
        assert child.wait().code == 0, child.errors[-3000:]


TRAINING = """
import sys
import SCRIPT as script
from tests.run_helpers import training_only
training_only(script, sys.argv[1:])
"""


def torchrun(script, flags, folder):
    """The same as two_processes, started as a user does; `folder` takes a file that torchrun can start."""
    (folder / "training.py").write_text(TRAINING.replace("SCRIPT", script.__name__))
    command = ["--standalone", "--nproc-per-node", "2", folder / "training.py", *flags]

    def torchrun():  # what the command torchrun calls
        from torch.distributed import run
        run.main([str(word) for word in command])
    child = Forked(torchrun, ENV).wait()
    assert child.code == 0, child.errors[-3000:]


def only_cached(monkeypatch):
    """From here on nothing may be built -> list that the names of what is loaded are added to."""
    cached, asked = training.cached, []

    def stored(folder, key, build, name, *options):
        asked.append(name)
        return cached(folder, key, lambda: pytest.fail(f"{name} is built again"), name, *options)

    for module in [module for name, module in sys.modules.items() if name.startswith("common.")]:
        if getattr(module, "cached", None) is cached:
            monkeypatch.setattr(module, "cached", stored)
    monkeypatch.setattr(datasets, "joints_to_features", lambda *args, **options: pytest.fail("built again"))
    return asked


# ---- files -------------------------------------------------------------------------------------------------


def products(folder):
    """Name -> bytes of what is in a run folder."""
    if not folder.exists():
        return {}
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.name != ".lock"}


def log_rows(folder):
    return render.read_csv(folder / "logs.csv")


def equal(a, b):
    """Nested dicts and lists of tensors and numbers are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[name]) for name, value in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def all_finite(weights):
    return all(bool(torch.as_tensor(value).isfinite().all()) for value in weights.values())


def break_file(path, how, weight):
    """Leave a checkpoint "empty", cut in "half", or with "one bit" of the tensor `weight` flipped."""
    raw = path.read_bytes()
    place = raw.index(weight.numpy().tobytes())
    flipped = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1:]
    path.write_bytes({"empty": b"", "half": raw[: len(raw) // 2], "one bit": flipped}[how])
