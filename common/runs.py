"""A run: command line, folder, checkpoints, log, training loop, signals, processes.

What it promises: an interrupted run loses at most the iteration it was in, nothing stored in a file is ever
executed, and a wrong input is answered by one line that names the file or flag and the fix. POSIX only.
Exit codes: 0 done, 2 the user's input, 3 non-finite numbers, 4 disk full, 130 / 143 interrupted and saved,
141 nobody reads the output any more.
"""
import argparse
import contextlib
import csv
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common import InputError, NonFiniteError
from common.embedded.english import words

RUN_SUFFIXES = (".json", ".csv", ".png", ".gif", ".pt", ".npy", ".bvh", ".html")  # --overwrite may delete


# ---- 1. The command line ---------------------------------------------------------------------------

def arg(default, text, **extra):
    """A dataclass field that is a flag, with its help text; default None is an empty list.

    extra: what argparse takes (choices, action), and three of our own. group: headline in --help of this
    flag and of those after it. lowest: least number allowed. shaping=False: this argument says how a run
    is started, and not what it learns, so --resume and --load may change it.
    """
    kind = {"default_factory": list} if default is None else {"default": default}
    return dataclasses.field(**kind, metadata={"help": text, **extra})


@dataclasses.dataclass
class RunArgs:
    """The flags that all scripts share; their own Args inherit from it."""
    dataset: str = arg("kit", "what is learnt: kit, humanml3d, or a folder in either published layout",
                       group="run")
    data_root: str = arg("data", "where the folders KIT-ML and HumanML3D are looked for; where they are "
                         "missing, embedded data of that name are made", shaping=False)
    out_dir: str = arg("", "run folder; empty: runs/<method>_<dataset>_seed<seed>", shaping=False)
    cache_dir: str = arg(".cache", "where pretrained bases and scorers are kept", shaping=False)
    cache: bool = arg(True, "--no-cache trains them again", shaping=False)
    seed: int = arg(0, "seed of the reinforcement learning and of the evaluation noise")
    base_seed: int = arg(0, "seed of the embedded data, the base and the scorers")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N", shaping=False)
    threads: int = arg(0, "CPU threads; 0: a short probe decides (or OMP_NUM_THREADS)", shaping=False)
    resume: bool = arg(False, "go on from checkpoint.pt of the run folder, bit for bit; after its end with "
                       "more iterations", shaping=False)
    overwrite: bool = arg(False, "start again in an existing run folder", shaping=False)
    size: str = arg("small", "of networks and training; tiny: half a minute, paper: for a GPU",
                    choices=("tiny", "small", "paper"))
    tiny: bool = arg(False, "the same as --size tiny", shaping=False)
    eval_repeats: int = arg(3, "repeats of the final tables (benchmark: 20)", shaping=False)
    load: str = arg("", "what a finished run saved (adapter.pt, policy.pt), for the next two",
                    group="use a finished run", shaping=False)
    eval_only: bool = arg(False, "evaluate --load, train nothing", shaping=False)
    prompt: list = arg(None, "write a motion for this caption; repeatable", action="append", shaping=False)
    compare: bool = arg(False, "with --prompt: base and tuned side by side", shaping=False)


# Help shows the docstring as it is written, and is wide enough for a flag beside its text.
Help = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=26, width=100)


def make_parser(cls, description):
    """The parser of a dataclass of arguments: every field is a flag, in the groups that they name."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--flag value ...]", description=description,
                                     allow_abbrev=False, formatter_class=Help)
    for entry in dataclasses.fields(cls):
        extra = {name: value for name, value in entry.metadata.items() if name not in ("lowest", "shaping")}
        if "group" in extra:
            group = parser.add_argument_group(extra.pop("group"))
        if entry.type is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif "choices" not in extra:
            extra["metavar"] = {int: "N", float: "X"}.get(entry.type, "TEXT")
        if entry.type in (int, float):
            extra["type"] = entry.type
        default = "" if entry.default in ("", dataclasses.MISSING) else f" (default {entry.default})"
        extra["help"] = extra["help"].replace("%", "%%") + default
        group.add_argument("--" + entry.name.replace("_", "-"), default=argparse.SUPPRESS, **extra)
    return parser


def parse_args(cls, sizes, argv, description):
    """Command line -> an instance of the dataclass `cls`.

    sizes: {name: {argument: its default at that size}}, for --size; --tiny is --size tiny. Numbers must be
    finite and at least `lowest` of their field: by default 0, and 1 for counts, the whole numbers whose
    default is not 0 (InputError).
    """
    given = vars(make_parser(cls, description).parse_args(argv))
    if given.get("tiny"):
        if given.get("size", "tiny") != "tiny":
            raise InputError(f"--tiny: is --size tiny; leave it or --size {given['size']} out")
        given["size"] = "tiny"
    args = cls(**{**sizes.get(given.get("size"), {}), **given})
    for entry in dataclasses.fields(cls):
        value = getattr(args, entry.name)
        lowest = entry.metadata.get("lowest", 1 if entry.type is int and entry.default else 0)
        if entry.type in (int, float) and not lowest <= value < math.inf:  # NaN fails too
            raise InputError(f"--{entry.name.replace('_', '-')} {value}: must be at least {lowest}")
    return args


def parse_weights(spec, names, flag, share=True):
    """"a=0.7,b=0.3" -> weights in the order of names, 0 for those left out; empty: equal shares. It is an
    InputError if a name is unknown, a number none or negative, all are 0, or shares do not sum to 1."""
    weights = dict.fromkeys(names, 0.0 if spec else 1 / len(names))
    for part in spec.split(",") if spec else []:
        name, _, number = (word.strip() for word in part.partition("="))
        if name not in names:
            raise InputError(f"{flag} {spec}: {name!r} is none of {', '.join(names)}; write {names[0]}=0.7,"
                             f"{names[1]}=0.3")
        try:
            weights[name] += float(number)
        except ValueError:
            raise InputError(f"{flag} {spec}: {number!r} is no number; write {name}=0.7") from None
    values, total = list(weights.values()), sum(weights.values())
    refuse((not (min(values) >= 0 and 0 < total < math.inf),  # NaN fails too
            f"{flag} {spec}: give numbers of at least 0, one of them above"),
           (share and abs(total - 1) >= 1e-6,
            f"{flag} {spec}: give numbers of at least 0 that sum to 1; these sum to {total:g}"))
    return values


def refuse(*checks):
    """InputError with the message of the first of the checks (wrong, message) that is wrong."""
    for wrong, message in checks:
        if wrong:
            raise InputError(message)


def shaping_args(args):
    """The arguments that decide what is learnt, as a dict: all that are not marked shaping=False."""
    return {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(args)
            if entry.metadata.get("shaping", True)}


def adopt_args(args, usual, stored, path):
    """Arguments with the shaping ones of a stored policy; InputError if the command line asked for others.
    usual: the arguments of a command line without flags, to see which were asked for."""
    defaults = shaping_args(usual)
    asked = {name: value for name, value in shaping_args(args).items() if value != defaults[name]}
    require_same(path, {name: stored.get(name) for name in asked}, asked)
    return dataclasses.replace(args, **stored)


# ---- 2. How a run starts and ends ------------------------------------------------------------------

class Start(NamedTuple):
    """What every mode of a script begins with; see `prepare`."""
    args: object
    stored: dict | None     # what --load names, for the modes that train nothing
    path: Path              # the run folder, not made yet
    reopen: bool            # whether that folder may exist
    device: torch.device
    threads: int
    rank: int               # of this process; 0 writes the files
    watch: "Stopwatch"
    command: str
    product: str            # kind of the file that --load reads: "ddpo-adapter" is an adapter.pt

    def data(self):
        """What datasets.load_dataset and load_pair are told by the flags."""
        return dict(data_root=self.args.data_root, seed=self.args.base_seed,
                    cache_dir=self.args.cache_dir, use_cache=self.args.cache)

    def training(self):
        """What every supervised training is told by the flags: seed, device, cache."""
        return dict(seed=self.args.base_seed, device=self.device,
                    cache_dir=self.args.cache_dir, use_cache=self.args.cache)

    def announce(self, **domains):
        """Print the device and which data are used, and end the stage "data"."""
        print(f"{self.device}, {self.threads} CPU thread(s)")
        for name, domain in domains.items():
            print(f"  {name}: {domain.label}")
        self.watch.lap("data")

    def open_folder(self):
        """The run folder, made and locked by the first process -> RunFolder, or the path elsewhere."""
        return self.path if self.rank else RunFolder(self.path, self.reopen, self.args.overwrite)

    def about(self, folder, notes, source, target, **more):
        """Where the results come from, for results.json; a training run gets its args.json now. notes: on the
        parts that were trained before; source, target: data sets."""
        about = {"command": self.command, "seed": self.args.seed, "parts": notes, "versions": versions(),
                 "args": dataclasses.asdict(self.args),
                 "data": {"source": source.label, "target": target.label}, "threads": self.threads,
                 "fingerprints": {"source": source.fingerprint, "target": target.fingerprint}, **more}
        resumed = self.args.resume and (folder / "checkpoint.pt").exists()
        if not self.stored and self.rank == 0 and not resumed:
            save_json(folder / "args.json", about)
        return about

    def save_product(self, folder, data):
        """Write what a finished run leaves for --load, with the arguments that shaped it."""
        save_checkpoint(folder / f"{self.product.partition('-')[2]}.pt", kind=self.product,
                        keep_previous=False, data={"args": shaping_args(self.args), **data})


def decoded(word, flag):
    """A word of the command line as text, although the terminal may have told Python another encoding than
    UTF-8; InputError at `flag` if its bytes are not UTF-8."""
    # Bytes that it could not decode are lone surrogates in the word, which no file and no screen can take.
    try:
        return word if re.search("[\ud800-\udfff]", word) is None else os.fsencode(word).decode("utf-8")
    except UnicodeError:
        raise InputError(f"{flag}: has bytes that are not UTF-8; type it in a UTF-8 terminal") from None


def prepare(cls, sizes, argv, description, method, product, check):
    """The command line of a script, checked, and what it decides -> Start.

    sizes: see parse_args; method: prefix of run folders; product: kind of the file that --load reads;
    check(args) raises InputError. With --load, data, networks and scorers are those of the run that made
    the file.
    """
    watch, args = Stopwatch(), parse_args(cls, sizes, argv, description)
    args.prompt = [decoded(caption, "--prompt") for caption in args.prompt]
    modes = bool(args.prompt) or args.eval_only
    fix = f"name the {product.partition('-')[2]}.pt of a finished run" if modes else "add one of them"
    refuse((modes != bool(args.load), f"--load: goes with --prompt or --eval-only; {fix}"),
           (not all(map(words, args.prompt)), "--prompt: the caption is empty, or holds no word"))
    stored = load_checkpoint(args.load, kind=product) if args.load else None
    if stored:
        args = adopt_args(args, cls(**sizes.get(args.size, {}), size=args.size), stored["args"], args.load)
    check(args)
    ending = "_prompt" if args.prompt else "_eval" if args.eval_only else ""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", Path(args.dataset).name)
    path = Path(args.out_dir or f"runs/{method}_{name}_seed{args.seed}{ending}")
    refuse((modes and (path / "args.json").exists(),
            f"--out-dir {path}: holds a training run; choose another folder"))
    reopen = args.resume or (modes and path.is_dir())
    refuse_used(path, reopen, args.overwrite)  # before anything is computed
    device = pick_device(args.device)
    threads = pick_threads(wanted_threads(args, path))
    command = shlex.join(["python", Path(inspect.getfile(cls)).name, *argv])
    return Start(args, stored, path, reopen, device, threads, world(device)[0], watch, command, product)


def wanted_threads(args, folder):
    """--threads, or with --resume those of the interrupted run (other counts round differently), or None."""
    if args.resume and not args.threads and (folder / "args.json").exists():
        try:
            return int(json.loads((folder / "args.json").read_text(encoding="utf-8"))["threads"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder / 'args.json'}: cannot be read ({error}); name --threads") from error
    return args.threads or None


class Stopwatch:
    """Seconds of the stages of a run: `watch.lap("data")` gives the time since the last lap to "data"."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, name):
        """The stage `name` is over; a name may come again, and its seconds add up."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def finish(folder, watch, content):
    """Write results.json, with the seconds of the stages and the peak memory, and print where it is."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    save_json(folder / "results.json", {**content, "seconds": watch.seconds, "peak_memory_mb": peak})
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in watch.seconds.items())
    print(f"\nseconds: {stages}; peak memory {peak:.0f} MB; everything is in {folder / ''}")


def run_main(main, argv=None):
    """Call `main(argv)`, by default with the command line, and end the process with the exit code of its
    outcome (see the module docstring)."""
    code, said = 0, ""
    for stream in (sys.stdout, sys.stderr):  # a terminal without a letter shows its number instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except InputError as error:
        code, said = 2, f"error: {error}"
    except NonFiniteError as error:
        code, said = 3, f"non-finite numbers: {error}"
    except BrokenPipeError:  # who read the output has gone, as `| head` does; nothing is left to be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        code, said = 4, f"disk: {error}; the last checkpoint is intact, free some space and --resume"
    except Interrupted as error:
        number = signal.Signals(error.args[0])
        code, said = 128 + number, f"stopped by {number.name}; the state is saved, go on with --resume"
    except KeyboardInterrupt:
        code = 130
    if said:
        print(said, file=sys.stderr)
    sys.exit(code)


# ---- 3. The training loop --------------------------------------------------------------------------

class Loop:
    """The frame of a training loop: progress bar, logs.csv, checkpoint.pt after every iteration, --resume,
    and SIGINT (Ctrl-C) and SIGTERM, which end the run at the next `check`. A second SIGINT acts at once.

        with runs.Loop(method, start, folder, FIELDS, same, model) as loop:
            if loop.state: ...                  # what the interrupted run had saved
            for iteration in loop:
                loop.rewards = ...              # for nan_report.json
                loop.end(row, shown, state)     # a row of the log, columns on the bar, the checkpoint

    same: a dict of what else must be the same for --resume, besides the arguments. A NonFiniteError leaves
    nan_report.json: which weights and gradients of `model` are not finite, and the range of the rewards.
    """

    def __init__(self, method, start, folder, fields, same, model):
        args, self.rank, self.watch, self.stopped_by = start.args, start.rank, start.watch, None
        self.method, self.iterations, self.first, self.state = method, args.iterations, 0, None
        self.folder, self.model, self.iteration, self.rewards, self.shown = folder, model, None, None, {}
        self.path, self.kind = folder / "checkpoint.pt", f"{method}-run"
        self.shaping = shaping_args(args) | same
        if args.resume and self.path.exists():
            self.state = load_checkpoint(self.path, kind=self.kind)
            before = self.state["args"]
            more = self.iterations > before.get("iterations", math.inf)  # a run may be made longer
            require_same(self.path, before | ({"iterations": self.iterations} if more else {}), self.shaping)
            self.first = self.state["iteration"] + 1
            if more and self.rank == 0:
                print(f"  {self.first} of {before['iterations']} iterations are done, on to "
                      f"{self.iterations}; rates and windows that depend on the total follow the new one")
        if self.rank == 0:
            stamp = fingerprint(self.shaping | {"iterations": 0})[:16]
            self.log = CsvLog(folder / "logs.csv", fields, stamp, self.first - 1)

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def _receive(self, number, frame):
        self.stopped_by = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def __iter__(self):
        self.bar = tqdm(range(self.first, self.iterations), self.method, self.iterations, initial=self.first,
                        disable=self.rank > 0)
        for self.iteration in self.bar:
            self.rewards = None
            yield self.iteration

    def check(self):
        """Raise Interrupted if a signal has come; what was saved last is then where --resume goes on."""
        if self.stopped_by:
            raise Interrupted(self.stopped_by)

    def end(self, row, shown, state):
        """Close an iteration: a row of the log, empty where `row` names no number, the columns `shown` on the
        bar, the state in a checkpoint."""
        row = {name: x.item() if torch.is_tensor(x) else x for name, x in row.items()}
        self.shown |= {name: f"{row[name]:.3f}" for name in shown if row.get(name) is not None}
        self.bar.set_postfix(self.shown, refresh=False)
        if self.rank == 0:
            self.log.write(dict.fromkeys(self.log.fields) | row | {"iteration": self.iteration})
            save_checkpoint(self.path, kind=self.kind,
                            data={"args": self.shaping, "iteration": self.iteration, **state})
        self.watch.lap("log and checkpoint")
        self.check()

    def __exit__(self, kind, error, trace):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is None and dist.is_initialized():
            dist.barrier()
        elif kind is NonFiniteError:
            bad = [f"{what} {name}" for name, p in self.model.named_parameters()
                   for what, x in (("weight", p), ("gradient", p.grad))
                   if x is not None and not torch.isfinite(x).all()]
            numbers = {name: getattr(self.rewards, name)().item() for name in ("mean", "min", "max")
                       if self.rewards is not None}
            save_json(self.folder / "nan_report.json", {
                "error": str(error), "iteration": self.iteration, "not_finite": bad, "rewards": numbers})


class Interrupted(Exception):
    """The signal of this number was obeyed and the state is saved; scripts exit with 128 + the number."""


# ---- 4. The run folder and its log -----------------------------------------------------------------

def refuse_used(path, resume, overwrite):
    """InputError if the folder `path` cannot take a new run, or has none to resume; -> what is in it."""
    refuse((resume and not os.path.isdir(path), f"{path}: nothing to resume; leave --resume out"))
    try:
        content = [item for item in path.iterdir() if item.name != ".lock"] if os.path.isdir(path) else []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); choose another --out-dir") from error
    if content and not resume and not (overwrite and (path / "args.json").exists()):
        other = "and holds no earlier run, choose another --out-dir"
        fix = other if overwrite else "add --resume or --overwrite"
        raise InputError(f"{path}: the folder is not empty; {fix}")
    return content


def make_folder(path, flag):
    """Create a folder, clear leftovers of dead processes -> Path; InputError at `flag` if not writable."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot create it ({error.strerror}); choose another {flag}") from error
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"{path}: the folder is read-only; choose another {flag}")
    for stale in path.glob("*.tmp-*"):
        with contextlib.suppress(ValueError, PermissionError):  # no number, or somebody else's process
            try:
                os.kill(int(stale.name.rpartition("-")[2]), 0)  # asks whether the process lives
            except ProcessLookupError:
                stale.unlink(missing_ok=True)
    return path


class RunFolder:
    """The folder of one run, locked against a second run until this object or the process ends.

    A folder with content is refused unless `resume` (keeps all) or `overwrite` (deletes the products of an
    earlier run, and only where args.json shows that there was one). `folder / name` is a path inside.
    """

    def __init__(self, path, resume=False, overwrite=False):
        refuse_used(Path(path), resume, overwrite)
        self.path = make_folder(path, "--out-dir")
        self._lock = open(self.path / ".lock", "a+", encoding="ascii")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when its owner dies
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip()
            raise InputError(f"{path}: in use by process {owner}; wait or choose another --out-dir") from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        for item in [] if resume else refuse_used(self.path, resume, overwrite):
            if item.is_file() and item.suffix in RUN_SUFFIXES:
                item.unlink()

    def __truediv__(self, name):
        return self.path / name


class CsvLog:
    """A CSV file with a `# stamp` line and fixed columns, of which the first is "iteration".

    An existing file is continued after iteration `last`, without a partial last line; InputError if its stamp
    or columns differ, or at a row that is none. Write the row of an iteration before its checkpoint: a resume
    drops surplus rows but cannot restore any.
    """

    def __init__(self, path, fields, stamp, last=math.inf):
        self.path, self.fields = Path(path), list(fields)
        header = [f"# {stamp}\n", ",".join(self.fields) + "\n"]
        lines = header  # what is not UTF-8 becomes U+FFFD below
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(True)
        if lines[:2] != header:
            raise InputError(f"{path}: was written by a run with other arguments or columns; start anew")
        whole = [line for line in lines[2:] if line.endswith("\n")]
        for number, line in enumerate(whole, start=3):
            cells = next(csv.reader([line]), [])
            odd = "\ufffd" in line or line.count('"') % 2
            if odd or len(cells) != len(fields) or not re.fullmatch("[0-9]+", cells[0]):
                raise InputError(f"{path}, line {number}: no row of this log; repair or delete that line")
        text = "".join(header + [line for line in whole if int(line.partition(",")[0]) <= last])
        atomic_write(self.path, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))

    def write(self, row):
        """Append one row, a dict with exactly the columns of the file; floats get 7 significant digits."""
        if set(row) != set(self.fields):
            raise ValueError(f"row and columns differ by {sorted(set(row) ^ set(self.fields))}")
        values = [plain(row[field]) for field in self.fields]
        values = [f"{v:.7g}" if isinstance(v, float) else v for v in values]
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


# ---- 5. Files --------------------------------------------------------------------------------------

def atomic_write(path, write_fn, keep_previous=False):
    """Call `write_fn(tmp_path)`, flush to disk, rename onto `path`: readers see a whole file, old or new.

    keep_previous: the file that was there stays as `name.prev.ext`. OSError passes; the old file is intact.
    """
    path = Path(path)
    tmp = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write_fn(str(tmp))
        with open(tmp, "rb+") as handle:
            os.fsync(handle.fileno())
        if keep_previous and path.exists():
            older = path.with_name(f"{path.name}.old.tmp-{os.getpid()}")
            older.unlink(missing_ok=True)
            os.link(path, older)  # a second name, so that `path` exists at every instant
            os.replace(older, path.with_suffix(f".prev{path.suffix}"))
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut
    os.fsync(folder)
    os.close(folder)


def save_json(path, obj):
    """Write `obj` as JSON, atomically; numpy and torch scalars become numbers, NaN and infinity strings."""
    text = json.dumps(plain(obj), default=torch.Tensor.tolist)
    finite = json.loads(text, parse_constant=lambda word: str(float(word)))  # JSON has no NaN
    text = json.dumps(finite, indent=2) + "\n"
    atomic_write(path, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))


def plain(value, where="value"):
    """Copy nested data into what a checkpoint may hold: dict, list, str, int, float, bool, None, CPU tensors.
    NumPy scalars (torch.load refuses them), arrays and tuples are converted; other types are a TypeError."""
    if isinstance(value, dict):
        if not all(isinstance(key, (str, int)) for key in value):
            raise TypeError(f"{where}: only str and int keys can be stored")
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous().clone()  # clone: a view would drag its whole storage along
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, order="C"))
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{where}: {type(value).__name__} cannot be stored")


def fingerprint(*parts):
    """sha256 (64 hex characters) of nested plain data, arrays and bytes; equal in every process."""
    digest = hashlib.sha256()

    def feed(value):
        if isinstance(value, dict):
            digest.update(f"dict{len(value)}".encode())
            for key in sorted(value, key=lambda key: (str(key), type(key).__name__)):
                feed(key)
                feed(value[key])
        elif isinstance(value, list):
            digest.update(f"list{len(value)}".encode())
            for item in value:
                feed(item)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
        else:
            raw = value if isinstance(value, bytes) else repr(value).encode()
            digest.update(f"{type(value).__name__}{len(raw)}:".encode() + raw)

    for part in parts:
        feed(part if isinstance(part, bytes) else plain(part))
    return digest.hexdigest()


def stand_in(path):
    """What a file is that often comes instead of weights, and the fix, or "" if it is none of these."""
    try:
        with open(path, "rb") as file:
            start = file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except OSError:
        return ""
    if start.startswith(b"version https://git-lfs"):
        return "is a git LFS pointer, not the file itself; fetch that with: git lfs pull"
    if re.match(rb"<(!doctype|!--|html|head|body|\?xml)", start):
        return "is a web page, not the file itself; download that again, by its own link"
    return ""


def save_checkpoint(path, data, kind="checkpoint", version=1, keep_previous=True):
    """Store the dict `data` (see `plain`) with its kind, format version and checksum; see `atomic_write`. A
    value of a foreign type is a TypeError before anything is written."""
    data = plain(data)
    buffer = io.BytesIO()  # torch's own file writer would hide a full disk behind a RuntimeError
    torch.save({"kind": kind, "version": version, "checksum": fingerprint(data), "data": data}, buffer)
    atomic_write(path, lambda tmp: Path(tmp).write_bytes(buffer.getbuffer()), keep_previous)


def load_checkpoint(path, kind="checkpoint", version=1):
    """Read what `save_checkpoint` stored -> the dict `data`, tensors on the CPU.

    InputError if the file is missing, cut off, altered, no checkpoint, or of another kind or version.
    """
    path = Path(path)
    older = path.with_suffix(f".prev{path.suffix}")
    hint = f"; use {older}" if older.exists() else "; delete it or name another file"
    if not path.is_file():
        raise InputError(f"{path}: no such file; " + (f"use {older}" if older.exists() else "check the path"))
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged zip or pickle fails in a dozen ways, some with an empty message
        said = stand_in(path) or f"damaged, or no checkpoint ({type(error).__name__}){hint}"
        raise InputError(f"{path}: {said}") from error
    if not isinstance(stored, dict) or set(stored) != {"kind", "version", "checksum", "data"}:
        raise InputError(f"{path}: not written by this project{hint}")
    found, made = stored["kind"], stored["version"]
    refuse((found != kind, f"{path}: holds a {found!r}, wanted a {kind!r}; name another file"),
           (made != version, f"{path}: version {made}, this code reads {version}; start a new run"))
    if stored["checksum"] != fingerprint(stored["data"]):
        raise InputError(f"{path}: damaged, its checksum does not fit{hint}")
    return stored["data"]


def require_same(path, stored, current):
    """InputError that lists each argument whose stored and current values (two dicts) differ."""
    stored, current = plain(stored), plain(current)
    differing = [f"{name} was {stored.get(name)!r} and is {current.get(name)!r}"
                 for name in sorted(set(stored) | set(current)) if stored.get(name) != current.get(name)]
    if differing:
        raise InputError(f"{path}: of other arguments ({', '.join(differing)}); use those, or start anew")


# ---- 6. The machine, and several processes (torchrun) ----------------------------------------------

def versions():
    """Versions that a result depends on: python, torch, numpy, platform, and the git commit or None."""
    root = Path(__file__).resolve().parent.parent
    commit = None
    if (root / ".git").exists():  # else git would look for one further up
        with contextlib.suppress(FileNotFoundError):  # git is not installed
            git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
            commit = git.stdout.strip() if git.returncode == 0 else None
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "platform": platform.platform(), "commit": commit}


def pick_device(name="auto"):
    """auto | cpu | cuda | cuda:N -> torch.device; auto takes a GPU if there is any; InputError if absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: {torch.cuda.device_count()} GPU(s) found here; use --device cpu")
    return device


def pick_threads(requested=None):
    """Set and return the number of CPU threads: requested, else OMP_NUM_THREADS, else by a probe the fewest
    that are not 1.6 times slower than the fastest number. Results repeat bit for bit at a fixed number only.

    Fewest, because threads wait for each other: on two cores two of them were 1.4 times faster than one, and
    beside one busy process 10 times slower.
    """
    refuse((requested is not None and requested < 1, f"--threads {requested}: at least 1"))
    if requested or os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(requested or torch.get_num_threads())
        return torch.get_num_threads()
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    x, weight = torch.ones(32, 48, 128), torch.ones(128, 256)  # b t d, about one feed-forward block
    best = {}
    for _ in range(3):  # rounds, so that a passing load does not decide
        for count in sorted({2**k for k in range(6) if 2**k < available} | {available}):
            torch.set_num_threads(count)
            start = time.perf_counter()
            for _ in range(10):
                (torch.nn.functional.gelu(x @ weight) @ weight.T).softmax(-1)
            best[count] = min(best.get(count, math.inf), time.perf_counter() - start)
    torch.set_num_threads(min(count for count in best if best[count] <= 1.6 * min(best.values())))
    return torch.get_num_threads()


def process_count():
    """Processes of this run, as torchrun announces them; InputError if only a part of that is there."""
    count = os.environ.get("WORLD_SIZE", "1")
    wanted = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    refuse((not re.fullmatch("0*[1-9][0-9]*", count) or (int(count) > 1 and missing),
            f"WORLD_SIZE={count}: without {', '.join(missing) or 'a number'}; start several processes with "
            "torchrun, or unset WORLD_SIZE"))
    return int(count)


def world(device="cpu"):
    """(rank, number of processes); joins the process group that torchrun announces in the environment. If a
    rank fails, the others stop after half an hour at the latest."""
    if process_count() == 1:
        return 0, 1
    if not dist.is_initialized():
        cuda = torch.device(device).type == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=datetime.timedelta(minutes=30))
    return dist.get_rank(), dist.get_world_size()


def share(groups, size, device="cpu"):
    """Numbers of the motions that this process makes, of `groups` groups of `size`: whole groups."""
    rank, processes = world(device)
    return [k for k in range(groups * size) if k // size * processes // groups == rank]
