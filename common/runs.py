"""Plumbing of a run: random numbers, checkpoints, logs, locks, signals, threads, processes.

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
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import resource
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

DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
RUN_SUFFIXES = (".json", ".csv", ".png", ".gif", ".pt", ".npy", ".bvh", ".html")  # --overwrite may delete


class Interrupted(Exception):
    """SIGINT or SIGTERM was obeyed and the state is saved; scripts exit with 128 + the signal's number."""

    def __init__(self, signum):
        super().__init__(f"stopped by {signal.Signals(signum).name}; the state is saved, go on with --resume")
        self.exit_code = 128 + signum


# ---- 1. Random numbers -------------------------------------------------------------------------------------


def initialise(model, g):
    """Draw the weights of all linear, convolution and embedding layers from the generator g.

    PyTorch's own initialisation draws from the global stream.
    """
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d)):
            bound = 1.0 / math.sqrt(module.weight[0].numel())  # numbers that an output is made of
            module.weight.data.uniform_(-bound, bound, generator=g)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, torch.nn.Embedding):
            module.weight.data.normal_(0.0, 1.0, generator=g)


# ---- 2. Files ----------------------------------------------------------------------------------------------


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
            with contextlib.suppress(FileNotFoundError):
                os.remove(older)
            os.link(path, older)  # a second name, so that `path` exists at every instant
            os.replace(older, previous(path))
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def previous(path):
    """Where the file before the last one is kept: run/checkpoint.pt -> run/checkpoint.prev.pt."""
    path = Path(path)
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def save_json(path, obj):
    """Write `obj` as JSON, atomically; numpy and torch scalars become numbers, NaN and infinity strings."""
    text = json.dumps(_jsonable(plain(obj)), indent=2, allow_nan=False) + "\n"
    atomic_write(path, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))


def _jsonable(value):
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, torch.Tensor):
        return _jsonable(value.tolist())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def plain(value, where="value"):
    """Copy nested data into what a checkpoint may hold: dict, list, str, int, float, bool, None, CPU tensors.

    NumPy scalars (torch.load refuses them), arrays and tuples are converted; another type raises TypeError.
    """
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


def save_checkpoint(path, data, kind="checkpoint", version=1, keep_previous=True):
    """Store the dict `data` (see `plain`) with its kind, format version and checksum; atomic.

    The file before stays as `*.prev.pt`. A value of a foreign type is a TypeError before anything is written.
    """
    data = plain(data)
    buffer = io.BytesIO()  # torch's own file writer would hide a full disk behind a RuntimeError
    torch.save({"kind": kind, "version": version, "checksum": fingerprint(data), "data": data}, buffer)
    atomic_write(path, lambda tmp: Path(tmp).write_bytes(buffer.getbuffer()), keep_previous)


def load_checkpoint(path, kind="checkpoint", version=1):
    """Read what `save_checkpoint` stored -> the dict `data`, tensors on the CPU.

    InputError if the file is missing, cut off, altered, no checkpoint, or of another kind or version.
    """
    path = Path(path)
    older = previous(path)
    hint = f"; use {older}" if older.exists() else "; delete it or name another file"
    if not path.is_file():
        raise InputError(f"{path}: no such file; " + (f"use {older}" if older.exists() else "check the path"))
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged zip or pickle fails in a dozen ways, some with an empty message
        raise InputError(f"{path}: damaged, or no checkpoint ({type(error).__name__}){hint}") from error
    if not isinstance(stored, dict) or set(stored) != {"kind", "version", "checksum", "data"}:
        raise InputError(f"{path}: not written by this project{hint}")
    if stored["kind"] != kind:
        raise InputError(f"{path}: holds a {stored['kind']!r}, wanted a {kind!r}; name another file")
    if stored["version"] != version:
        raise InputError(f"{path}: version {stored['version']}, this code reads {version}; start a new run")
    if stored["checksum"] != fingerprint(stored["data"]):
        raise InputError(f"{path}: damaged, its checksum does not fit{hint}")
    return stored["data"]


def require_same(path, stored, current, free=()):
    """InputError that lists each argument whose stored and current values (two dicts) differ.

    free: names that may change between the two runs, such as "iterations" or "device".
    """
    stored, current = plain(stored), plain(current)
    differing = [f"{name} was {stored.get(name)!r} and is {current.get(name)!r}"
                 for name in sorted(set(stored) | set(current))
                 if name not in free and stored.get(name) != current.get(name)]
    if differing:
        raise InputError(f"{path}: of other arguments ({', '.join(differing)}); use those, or start anew")


def cached(folder, key, build, name, use_cache=True):
    """The dict that `build()` returns, or its stored copy if `folder` has one for this `key` (plain data).

    The file is `<folder>/<name>-<hash of key>.pt`. A damaged one is announced and rebuilt; use_cache=False
    always rebuilds.
    """
    make_folder(folder, "--cache-dir")
    path = Path(folder) / f"{name}-{fingerprint(key)[:16]}.pt"
    if use_cache and path.exists():
        try:
            return load_checkpoint(path, kind=f"cache {name}")
        except InputError as error:
            print(f"rebuilding {name}: {error}")
    data = plain(build())  # the same types whether built or loaded
    save_checkpoint(path, data, kind=f"cache {name}", keep_previous=False)
    return data


# ---- 3. The run folder and its log -------------------------------------------------------------------------


def make_folder(path, flag):
    """Create a folder, clear leftovers of dead processes; InputError naming `flag` if it is not writable."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot create it ({error.strerror}); choose another {flag}") from error
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"{path}: the folder is read-only; choose another {flag}")
    for stale in Path(path).glob("*.tmp-*"):
        pid = stale.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            stale.unlink(missing_ok=True)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def refuse_used(path, resume, overwrite):
    """InputError if the folder `path` cannot take a new run, or has none to resume; -> what is in it."""
    if resume and not os.path.isdir(path):
        raise InputError(f"{path}: nothing to resume; leave --resume out")
    try:
        content = [item for item in path.iterdir() if item.name != ".lock"] if os.path.isdir(path) else []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); choose another --out-dir") from error
    if content and not resume and not (overwrite and (path / "args.json").exists()):
        fix = "add --resume or --overwrite"
        if overwrite:
            fix = "and holds no earlier run, choose another --out-dir"
        raise InputError(f"{path}: the folder is not empty; {fix}")
    return content


class RunFolder:
    """The folder of one run, locked against a second run until `close()` or the end of the process.

    A folder with content is refused unless `resume` (keeps all) or `overwrite` (deletes the products of an
    earlier run, and only where args.json shows that there was one). `folder / name` is a path inside.
    """

    def __init__(self, path, resume=False, overwrite=False):
        self.path = Path(path)
        refuse_used(self.path, resume, overwrite)
        make_folder(path, "--out-dir")
        self._lock = open(self.path / ".lock", "a+", encoding="ascii")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when its owner dies
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip()
            self._lock.close()
            raise InputError(f"{path}: in use by process {owner}; wait or choose another --out-dir") from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        for item in [] if resume else refuse_used(self.path, resume, overwrite):
            if item.is_file() and item.suffix in RUN_SUFFIXES:
                item.unlink()

    def __truediv__(self, name):
        return self.path / name

    def close(self):
        """Let another run use the folder."""
        self._lock.close()


class CsvLog:
    """A CSV file with a `# stamp` line, fixed columns (the first is "iteration") and one flushed row a write.

    An existing file is continued, without a partial last line; InputError if its stamp or columns differ.
    Write the row of an iteration before its checkpoint: a resume drops surplus rows but cannot restore any.
    """

    def __init__(self, path, fields, stamp=""):
        self.path, self.fields = Path(path), list(fields)
        self._header = [f"# {stamp}\n", ",".join(self.fields) + "\n"]
        if self.path.exists() and self._lines()[:2] != self._header:
            raise InputError(f"{path}: was written by a run with other arguments or columns; start anew")
        self._handle = None
        self.truncate_after(math.inf)

    def _lines(self):
        return self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []

    def truncate_after(self, iteration):
        """Drop the rows of later iterations, and what a kill left half-written."""
        rows = [line for line in self._lines()[2:] if line.endswith("\n")]
        text = "".join(self._header + [line for line in rows if int(line.partition(",")[0]) <= iteration])
        self.close()
        atomic_write(self.path, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))
        self._handle = open(self.path, "a", encoding="utf-8", newline="")

    def write(self, row):
        """Append one row, a dict with exactly the columns of the file; floats get 7 significant digits."""
        if set(row) != set(self.fields):
            raise ValueError(f"row and columns differ by {sorted(set(row) ^ set(self.fields))}")
        values = [plain(row[field]) for field in self.fields]
        values = [f"{v:.7g}" if isinstance(v, float) else v for v in values]
        csv.writer(self._handle, lineterminator="\n").writerow(values)
        self._handle.flush()

    def close(self):
        """Close the file; `truncate_after` opens it again."""
        if self._handle is not None:
            self._handle.close()


# ---- 4. The process ----------------------------------------------------------------------------------------


class StopSignal:
    """`with StopSignal() as stop:` -- signals set `stop.requested`; the loop saves, then calls `check`.

    SIGINT and SIGTERM are caught. A second SIGINT acts at once, as is Python's default; files stay whole.
    """

    requested = 0

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def _receive(self, number, frame):
        self.requested = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self):
        """Raise Interrupted if a signal has come; call it where the state is saved."""
        if self.requested:
            raise Interrupted(self.requested)

    def __exit__(self, *exc):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def arg(default, text, **extra):
    """A dataclass field with its help text; extra goes to argparse (choices, action).

    default None: an empty list.
    """
    kind = {"default_factory": list} if default is None else {"default": default}
    return dataclasses.field(**kind, metadata={"help": text, **extra})


def parse_args(cls, tiny, argv, description, presets=None):
    """Command line -> an instance of the dataclass `cls`: every field is a flag.

    --tiny sets what was not given to the values of the dict `tiny`, and so do presets: {flag: {its value:
    what it sets}}, later ones over earlier ones. Numbers must be finite and at least `lowest` of their
    field's arg(): by default 0, and 1 for counts, the whole numbers whose default is not 0 (InputError).
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    for entry in dataclasses.fields(cls):
        extra = dict(entry.metadata)
        extra.pop("lowest", None)
        if entry.type is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif "action" not in extra:
            extra["type"] = entry.type
        default = "" if entry.default in ("", dataclasses.MISSING) else f" (default {entry.default})"
        extra["help"] = extra["help"].replace("%", "%%") + default
        flag = "--" + entry.name.replace("_", "-")
        parser.add_argument(flag, dest=entry.name, default=argparse.SUPPRESS, **extra)
    given = vars(parser.parse_args(argv))
    chosen = [table.get(given.get(flag), {}) for flag, table in (presets or {}).items()]
    chosen.append(tiny if given.get("tiny") else {})
    args = cls(**{name: value for changes in (*chosen, given) for name, value in changes.items()})
    for entry in dataclasses.fields(cls):
        value = getattr(args, entry.name)
        lowest = entry.metadata.get("lowest", 1 if entry.type is int and entry.default else 0)
        if entry.type in (int, float) and not lowest <= value < math.inf:  # NaN fails too
            raise InputError(f"--{entry.name.replace('_', '-')} {value}: must be at least {lowest}")
    return args


def parse_weights(spec, names, flag):
    """"a=0.7,b=0.3" -> weights in the order of names, 0 for those left out; empty: equal ones. InputError
    for an unknown name, no number, a negative one, or a sum other than 1."""
    weights = dict.fromkeys(names, 0.0) if spec else dict.fromkeys(names, 1 / len(names))
    for part in spec.split(",") if spec else ():
        name, _, number = (word.strip() for word in part.partition("="))
        if name not in names:
            raise InputError(f"{flag} {spec}: {name!r} is none of {', '.join(names)}; write {names[0]}=0.7,"
                             f"{names[1]}=0.3")
        try:
            weights[name] += float(number)
        except ValueError:
            raise InputError(f"{flag} {spec}: {number!r} is no number; write {name}=0.7") from None
    values = list(weights.values())
    if not (min(values) >= 0 and abs(sum(values) - 1) < 1e-6):  # NaN fails too
        raise InputError(f"{flag} {spec}: give numbers of at least 0 that sum to 1; these sum to "
                         f"{sum(values):g}")
    return values


def arguments_of(function, args):
    """Those of the script's arguments that a function takes as keywords of the same name, as a dict; what is
    no argument of this script is left out."""
    wanted = inspect.signature(function).parameters
    return {name: getattr(args, name) for name, parameter in wanted.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and hasattr(args, name)}


NEUTRAL_ARGS = {"out_dir", "cache_dir", "cache", "data_root", "device", "threads", "resume", "overwrite",
                "eval_only", "load", "prompt", "compare", "length", "prefer", "tiny", "eval_repeats",
                "best_of"}


def shaping_args(args):
    """The arguments that decide what is learnt, as a dict: all but those that say how a run is started."""
    return {name: value for name, value in dataclasses.asdict(args).items() if name not in NEUTRAL_ARGS}


def adopt_args(args, usual, stored, path):
    """Arguments with the shaping ones of a stored policy; InputError if the command line asked for others.

    usual: the arguments of a command line without flags, to see which were asked for.
    """
    defaults = shaping_args(usual)
    asked = {name: value for name, value in shaping_args(args).items() if value != defaults[name]}
    require_same(path, {name: stored.get(name) for name in asked}, asked)
    return dataclasses.replace(args, **stored)


def choose_folder(args, prefix, mode=""):
    """(path of the run folder, whether it may exist already). Nothing is made yet.

    mode: empty for a training run, else the ending of a folder that is only written into: such a folder must
    not be that of a training run (InputError).
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", Path(args.dataset).name)
    folder = Path(args.out_dir or f"runs/{prefix}_{name}_seed{args.seed}{mode}")
    if mode and (folder / "args.json").exists():
        raise InputError(f"--out-dir {folder}: holds a training run; choose another folder")
    reopen = args.resume or (bool(mode) and folder.is_dir())
    refuse_used(folder, reopen, args.overwrite)  # before anything is computed
    return folder, reopen


def wanted_threads(args, folder):
    """--threads, or with --resume those of the interrupted run (other counts round differently), or None."""
    if args.resume and not args.threads and (folder / "args.json").exists():
        try:
            return int(json.loads((folder / "args.json").read_text(encoding="utf-8"))["threads"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder / 'args.json'}: cannot be read ({error}); name --threads") from error
    return args.threads or None


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

    def open_folder(self):
        """The run folder, made and locked by the first process -> RunFolder, or the path elsewhere."""
        return self.path if self.rank else RunFolder(self.path, self.reopen, self.args.overwrite)

    def about(self, folder, notes, source, target, **more):
        """Where the results come from, for results.json; a training run gets its args.json now. notes: on the
        parts that were trained before; source, target: data sets."""
        about = {"command": self.command, "seed": self.args.seed, "parts": notes, "versions": versions(),
                 "data": {"source": source.label, "target": target.label}, "threads": self.threads,
                 "fingerprints": {"source": source.fingerprint, "target": target.fingerprint}, **more}
        resumed = self.args.resume and (folder / "checkpoint.pt").exists()
        if not self.stored and self.rank == 0 and not resumed:
            save_json(folder / "args.json", {**about, "args": dataclasses.asdict(self.args)})
        return about


def prepare(cls, tiny, argv, description, *, method, product, check, presets=None):
    """The command line of a script, checked, and what it decides -> Start.

    method: prefix of run folders; product: kind of the file that --load reads; check(args) raises InputError.
    With --load, data, networks and scorers are those of the run that made the file.
    """
    watch, args = Stopwatch(), parse_args(cls, tiny, argv, description, presets)
    modes = bool(args.prompt) or args.eval_only
    if modes != bool(args.load):
        fix = f"name the {product.partition('-')[2]}.pt of a finished run" if modes else "add one of them"
        raise InputError(f"--load: goes with --prompt or --eval-only; {fix}")
    if any(not caption.strip() for caption in args.prompt):
        raise InputError("--prompt: the caption is empty")
    check(args)
    stored = load_checkpoint(args.load, kind=product) if args.load else None
    if stored:
        args = adopt_args(args, cls(**tiny) if args.tiny else cls(), stored["args"], args.load)
    mode = "_prompt" if args.prompt else "_eval" if args.eval_only else ""
    path, reopen = choose_folder(args, method, mode)
    device = pick_device(args.device)
    threads = pick_threads(wanted_threads(args, path))
    command = f"python {method}_motion.py {' '.join(argv)}"
    return Start(args, stored, path, reopen, device, threads, world(device)[0], watch, command)


class Loop:
    """The frame of a training loop: progress bar, logs.csv, checkpoint.pt after every iteration, --resume,
    and Ctrl-C, which stops at the next `check`, where all is saved.

        with runs.Loop("ppo", start, folder, LOG_FIELDS, starts_from, model) as loop:
            if loop.state: ...                  # what the interrupted run had saved
            for iteration in loop:
                ...
                loop.rewards = rewards          # for nan_report.json
                ...
                loop.end(row, shown, state)

    starts_from: a dict of what else must be the same for --resume, besides the arguments. When a
    NonFiniteError passes, nan_report.json is left in the folder: which weights and gradients of `model` are
    not finite, and what the rewards were.
    """

    def __init__(self, method, start, folder, fields, starts_from, model):
        args, self.rank, self.stop = start.args, start.rank, StopSignal()
        self.method, self.iterations, self.first, self.state = method, args.iterations, 0, None
        self.folder, self.model, self.iteration, self.rewards = folder, model, None, None
        self.path, self.kind = folder / "checkpoint.pt", f"{method}-run"
        self.shaping = shaping_args(args) | starts_from
        if args.resume and self.path.exists():
            self.state = load_checkpoint(self.path, kind=self.kind)
            require_same(self.path, self.state["args"], self.shaping)
            self.first = self.state["iteration"] + 1
        if self.rank == 0:
            self.log = CsvLog(folder / "logs.csv", fields, fingerprint(self.shaping)[:16])
            self.log.truncate_after(self.first - 1)

    def __enter__(self):
        self.stop.__enter__()
        return self

    def __iter__(self):
        self.bar = tqdm(range(self.first, self.iterations), self.method, self.iterations, initial=self.first,
                        disable=self.rank > 0)
        for self.iteration in self.bar:
            self.rewards = None
            yield self.iteration

    def check(self):
        """Raise Interrupted if a signal has come; what was saved last is then where --resume goes on."""
        self.stop.check()

    def end(self, row, shown, state):
        """Close an iteration: a row of the log, numbers for the bar, and the state for a checkpoint."""
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
        if self.rank == 0:
            self.log.write(row)
            save_checkpoint(self.path, kind=self.kind,
                            data={"args": self.shaping, "iteration": row["iteration"], **state})
        self.check()

    def __exit__(self, kind, error, trace):
        self.stop.__exit__(kind, error, trace)
        if kind is None:
            barrier()
        elif kind is NonFiniteError:
            bad = [f"{what} {name}" for name, p in self.model.named_parameters()
                   for what, x in (("weight", p), ("gradient", p.grad))
                   if x is not None and not torch.isfinite(x).all()]
            numbers = {name: getattr(self.rewards, name)().item() for name in ("mean", "min", "max")
                       if self.rewards is not None}
            save_json(self.folder / "nan_report.json", {
                "error": str(error), "iteration": self.iteration, "not_finite": bad, "rewards": numbers})


def run_main(main, argv=None):
    """Call `main(argv)`, by default with the command line, and end the process with the exit code of its
    outcome (see the module docstring)."""
    code = 0
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except NonFiniteError as error:
        print(f"non-finite numbers: {error}", file=sys.stderr)
        code = 3
    except BrokenPipeError:  # who read the output has gone, as `| head` does; nothing is left to be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"disk: {error}; the last checkpoint is intact, free some space and --resume", file=sys.stderr)
        code = 4
    except Interrupted as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


class Stopwatch:
    """`with watch.stage("rollout"):` adds the seconds spent inside to `watch.seconds["rollout"]`."""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def stage(self, name):
        """Context manager that times one stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def finish(folder, watch, content):
    """Write results.json, with the seconds of the stages and the peak memory, and print where it is."""
    save_json(folder / "results.json", {**content, "seconds": watch.seconds,
                                        "peak_memory_mb": peak_memory_mb()})
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in watch.seconds.items())
    print(f"\nseconds: {stages}; peak memory {peak_memory_mb():.0f} MB; everything is in {folder / ''}")


def peak_memory_mb():
    """Largest resident size of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def versions():
    """Versions that a result depends on: python, torch, numpy, platform, and the git commit or None."""
    root = Path(__file__).resolve().parent.parent
    commit = None
    if (root / ".git").exists():
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
    that are not 1.6 times slower than the fastest number.

    Fewest, because threads that wait for each other suffer from any other load: on two cores beside one busy
    process these small networks were 1.4 times faster on two threads before it came and 10 times slower
    while it ran. Results repeat bit for bit at a fixed number only.
    """
    if requested is not None and requested < 1:
        raise InputError(f"--threads {requested}: at least 1")
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


# ---- 5. Several processes (torchrun) -----------------------------------------------------------------------


def process_count():
    """Processes of this run, as torchrun announces them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def world(device="cpu", minutes=30):
    """(rank, number of processes); joins the process group that torchrun announces in the environment.

    A rank that fails makes the others stop after `minutes` at the latest instead of waiting for ever.
    """
    if process_count() == 1:
        return 0, 1
    if not dist.is_initialized():
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=minutes))
    return dist.get_rank(), dist.get_world_size()


def all_gather_rows(rows):
    """Concatenate `rows` (n ...) of all processes along dim 0 in rank order; n may differ between them."""
    if not dist.is_initialized():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(count) for count in counts)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])


def minibatches(samples, count, index, chunk, generator, apart=()):
    """Split samples, numbers in a list, into `count` shuffled minibatches -> [(size, chunks)].

    index: the samples that this process holds, in the order of its rows; chunks: those of its rows that
    belong to the minibatch, in lists of at most `chunk` (0: one list). size counts those of all processes.
    apart: samples that share no chunk with others.
    """
    row, apart, plan = {sample: n for n, sample in enumerate(index)}, set(apart), []
    for part in torch.randperm(len(samples), generator=generator).chunk(count):
        mine = [samples[k] for k in part.tolist() if samples[k] in row]
        chunks, step = [], chunk or max(len(mine), 1)
        for side in (False, True):
            rows = [row[sample] for sample in mine if (sample in apart) == side]
            chunks += [rows[a:a + step] for a in range(0, len(rows), step)]
        plan.append((len(part), chunks))
    return plan


def reduce_log(values, lowest=(), highest=()):
    """{name: float} of this process -> of all processes: the sum, or the lowest or highest of those named."""
    rows = all_gather_rows(torch.tensor([list(values.values())], dtype=torch.float64)).T.tolist()
    kinds = [min if name in lowest else max if name in highest else sum for name in values]
    return {name: kind(row) for name, kind, row in zip(values, kinds, rows)}


def all_reduce_grads(parameters):
    """Sum the gradients of all processes in place; each loss must already be divided by the global count."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:  # every process has to take part in every reduction
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def rise_and_fall(iteration, iterations, warmup):
    """Factor of a learning rate. Not in the papers: Adam's first steps have full size in every weight, noise
    or not, so it rises over `warmup` iterations; it falls to zero, to settle, over all."""
    return min(1.0, (iteration + 1) / max(warmup, 1)) * (1 - iteration / iterations)


def check_loss(loss, where, fix="lower --lr"):
    """NonFiniteError if a loss is not finite; where: "iteration 3"."""
    if not torch.isfinite(loss):
        raise NonFiniteError(f"{where}: loss {loss.item()}; {fix}")


def descend(loss, parameters, optimizer, schedule, where, fix):
    """One supervised update, the gradient's norm clipped to 1 -> the loss as a number, or NonFiniteError.
    schedule: of the learning rate."""
    check_loss(loss, where, fix)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()


def check_rewards(rewards, captions, where):
    """NonFiniteError that names the first caption whose reward (b) is not finite."""
    for reward, caption in zip(rewards.tolist(), captions):
        if not math.isfinite(reward):
            raise NonFiniteError(f"{where} {reward} for {caption!r}")


def in_bfloat16(forward):
    """A function of tensors that computes in bfloat16 where torch holds that safe; its answer is float32."""
    def low_precision(x, *rest):
        with torch.autocast(x.device.type, torch.bfloat16):
            return forward(x, *rest).float()
    return low_precision


def clip_gradients(parameters, max_norm, where):
    """Scale the gradients down to max_norm -> their norm before; NonFiniteError at `where` if it is not."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if not math.isfinite(norm):
        raise NonFiniteError(f"{where} {norm}; lower --lr")
    return norm


def barrier():
    """Wait for all processes, for example until rank 0 has filled the cache."""
    if dist.is_initialized():
        dist.barrier()
