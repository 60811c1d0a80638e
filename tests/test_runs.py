"""Faults that a run must survive or refuse: killed writers, damaged files, full disks, signals, two runs."""
import contextlib
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import InputError, NonFiniteError, generator, mix, runs
from common.runs import CsvLog, RunArgs, RunFolder, arg, load_checkpoint, save_checkpoint
from tests.run_helpers import Forked

ROOT = Path(__file__).resolve().parents[1]
DATA = {"iteration": 3, "lora": {"a": torch.arange(600.0), "b": torch.ones(2, 2).long()}, "note": "x"}
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def python(code, *args, **env):
    """Run code in a fresh interpreter at the repository root."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**ENV, **env}, check=False)


# ---- the command line --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args(RunArgs):
    """Flags of a script that there is none of."""
    reward: str = arg("good", "50 % of it", choices=("good", "bad"), group="what is learnt")
    iterations: int = arg(100, "of learning")
    kept: int = arg(8, "samples; 0: all", lowest=0)
    chunk: int = arg(0, "at once; 0: all")
    lr: float = arg(1e-3, "learning rate")
    weights: bool = arg(True, "whether steps count")
    frames: int = arg(0, "of a motion", group="afterwards", shaping=False)


SIZES = {"tiny": dict(iterations=3, lr=0.5), "paper": dict(iterations=10**6)}
DESCRIPTION = """A script that there is none of.

    the code    stands as it is written
    100 %       a percent sign too
"""


def parse(*argv):
    return runs.parse_args(Args, SIZES, [str(word) for word in argv], DESCRIPTION)


def test_sizes_are_defaults():
    assert parse() == Args() and parse().iterations == 100
    assert parse("--tiny") == Args(size="tiny", tiny=True, iterations=3, lr=0.5)
    assert dataclasses.replace(parse("--tiny"), tiny=False) == parse("--size", "tiny")
    assert parse("--size", "small") == Args() and parse("--size", "paper").iterations == 10**6
    assert parse("--tiny", "--iterations", 7) == parse("--iterations", 7, "--tiny")
    assert (parse("--tiny", "--iterations", 7).iterations, parse("--tiny", "--iterations", 7).lr) == (7, 0.5)
    assert parse("--tiny", "--size", "tiny") == parse("--tiny")
    with pytest.raises(InputError, match="--tiny: is --size tiny; leave it or --size paper out"):
        parse("--tiny", "--size", "paper")


def test_help_is_the_docstring_and_groups_with_defaults():
    text = runs.make_parser(Args, DESCRIPTION).format_help()
    assert DESCRIPTION.strip() in text, "as it is written, whole"
    titles = ("run", "use a finished run", "what is learnt", "afterwards")
    places = sorted((text.index(f"\n{title}:\n"), title) for title in titles)
    ends = [place for place, _ in places[1:]] + [None]
    groups = {title: text[place:end] for (place, title), end in zip(places, ends)}
    assert text.index("\nrun:\n") < text.index("\nwhat is learnt:\n") < text.index("\nafterwards:\n")
    for group, flags in (("run", "--dataset --no-cache --size --tiny"),
                         ("use a finished run", "--load --prompt --compare"),
                         ("what is learnt", "--reward --lr --no-weights"), ("afterwards", "--frames")):
        assert all(flag in groups[group] for flag in flags.split()), group
    words = " ".join(text.split())
    for entry in dataclasses.fields(Args):
        flag = "--" + entry.name.replace("_", "-")
        told = words[words.index(f" {flag}", words.index("run: ")):]
        if entry.default not in ("", dataclasses.MISSING):
            assert f"(default {entry.default})" in told[:500], flag
        assert entry.metadata["help"] in told, flag


@pytest.mark.parametrize("flags, words", [
    (["--lr", "-1"], "--lr -1.0: must be at least 0"), (["--lr", "nan"], "--lr nan: must be"),
    (["--lr", "inf"], "--lr inf"), (["--iterations", 0], "--iterations 0: must be at least 1"),
    (["--kept", -1], "--kept -1: must be at least 0"), (["--chunk", -1], "--chunk -1")])
def test_numbers_have_a_least(flags, words):
    with pytest.raises(InputError, match=words):
        parse(*flags)
    assert (parse("--kept", 0).kept, parse("--chunk", 0).chunk, parse("--lr", 0).lr) == (0, 0, 0.0)


@pytest.mark.parametrize("flags", (["--lr"], ["--rewar", "bad"], ["--reward", "worse"], ["--kept", "1.5"]))
def test_flags_that_are_none(flags):
    """No prefix passes for a flag; argparse says what is wrong."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        parse(*flags)
    assert end.value.code == 2 and flags[0] in err.getvalue().splitlines()[-1]


def test_refuse_says_the_first_thing_that_is_wrong():
    runs.refuse((False, "a"), (False, "b"))
    with pytest.raises(InputError, match="^b$"):
        runs.refuse((False, "a"), (True, "b"), (True, "c"))


def test_arguments_of_a_finished_run():
    """What shaped it holds: a flag that says otherwise is refused, one that shapes nothing is not."""
    stored = runs.shaping_args(Args(lr=0.1, iterations=7, seed=3, frames=5, device="cuda", resume=True))
    assert "lr" in stored and not {"frames", "device", "resume", "out_dir", "tiny", "prompt"} & set(stored)
    args = runs.adopt_args(Args(frames=9, seed=3, out_dir="x"), Args(), stored, "a.pt")
    assert args == Args(lr=0.1, iterations=7, seed=3, frames=9, out_dir="x")
    with pytest.raises(InputError, match="a.pt.*lr was 0.1 and is 0.2"):
        runs.adopt_args(Args(lr=0.2), Args(), stored, "a.pt")


def test_groups_are_shared_whole(monkeypatch):
    """Every motion in one process, and those of a prompt together."""
    assert runs.share(3, 4) == list(range(12))
    for processes in (2, 3, 5):
        parts = []
        for rank in range(processes):
            monkeypatch.setattr(runs, "world", lambda device, rank=rank: (rank, processes))
            parts.append(runs.share(5, 4))
        assert sorted(sum(parts, [])) == list(range(20))
        groups = [{k // 4 for k in part} for part in parts]
        assert sum(map(len, groups)) == 5 and all(groups)


# ---- random numbers ----------------------------------------------------------------------------------------


def test_mix_is_fixed_and_spreads():
    assert mix(1, 2) == 6804074658870690613 and mix(2, 1) == 8085905411993364802
    many = {mix(*numbers) for numbers in itertools.product(range(20), repeat=3)}
    assert len(many) == 8000 and all(0 <= value < 2**63 for value in many)
    assert len({mix(1), mix(1, 0), mix(0, 1), mix(-1)}) == 4
    low_bits = [mix(0, n) & 1 for n in range(4000)]
    assert abs(np.mean(low_bits) - 0.5) < 0.04


def test_generators_depend_on_their_arguments_only():
    first = torch.randn(4, generator=generator(1, 2, "noise", 3))
    torch.rand(5, generator=generator(9, 9, "other"))
    assert torch.equal(first, torch.randn(4, generator=generator(1, 2, "noise", 3)))
    for other in ((2, 2, "noise", 3), (1, 3, "noise", 3), (1, 2, "length", 3), (1, 2, "noise", 4)):
        assert not torch.equal(first, torch.randn(4, generator=generator(*other)))


def test_numbers_do_not_depend_on_the_hash_seed():
    code = ("import torch; from common import generator, runs; "
            "print(torch.rand(2, generator=generator(3, 1, 'noise')).tolist(), "
            "runs.fingerprint({'b': 1, 'a': [1.5, 'z']}))")
    other = python(code, PYTHONHASHSEED=str(1 + int(os.environ.get("PYTHONHASHSEED", "0") == "1"))).stdout
    here = torch.rand(2, generator=generator(3, 1, "noise")).tolist()
    assert other.strip() == f"{here} {runs.fingerprint({'b': 1, 'a': [1.5, 'z']})}"


# ---- checkpoints -------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_exactly(tmp_path):
    path = tmp_path / "checkpoint.pt"
    data = {"f": np.float32(0.1), "i": np.int64(7), "t": torch.arange(6.0).reshape(2, 3).T, "b": True,
            "array": np.arange(3), "bf": torch.ones(2).bfloat16(), "empty": torch.zeros(0, 2),
            "l": (1, "two", None)}
    save_checkpoint(path, data)
    back = load_checkpoint(path)
    assert back["f"] == float(np.float32(0.1)) and type(back["i"]) is int and back["l"] == [1, "two", None]
    assert torch.equal(back["t"], data["t"]) and torch.equal(back["array"], torch.arange(3))
    assert back["b"] is True
    assert back["bf"].dtype == torch.bfloat16 and back["empty"].shape == (0, 2)


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"x": torch.zeros(1_000_000)[:2]})
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_an_optimizer_survives_the_trip(tmp_path):
    def step(weight, optimizer):
        optimizer.zero_grad()
        (weight**2).sum().backward()
        optimizer.step()

    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    step(weight, optimizer)
    save_checkpoint(tmp_path / "a.pt", {"weight": weight, "optimizer": optimizer.state_dict()})
    stored = load_checkpoint(tmp_path / "a.pt")
    again = stored["weight"].clone().requires_grad_()
    resumed = torch.optim.AdamW([again], lr=0.1)
    resumed.load_state_dict(stored["optimizer"])
    for _ in range(3):
        step(weight, optimizer)
        step(again, resumed)
    assert torch.equal(weight, again)


def test_previous_checkpoint_is_kept(tmp_path):
    for iteration in range(3):
        save_checkpoint(tmp_path / "checkpoint.pt", {"iteration": iteration})
    assert load_checkpoint(tmp_path / "checkpoint.pt") == {"iteration": 2}
    assert load_checkpoint(tmp_path / "checkpoint.prev.pt") == {"iteration": 1}
    assert sorted(item.name for item in tmp_path.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt"]


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("keep", [True, False])
def test_truncated_checkpoint(tmp_path, share, keep):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, DATA)
    if keep:
        save_checkpoint(path, DATA)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "checkpoint.pt" in message and "\n" not in message and ("checkpoint.prev.pt" in message) == keep


def test_every_flipped_byte_of_a_tensor_is_found(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, DATA)
    raw = path.read_bytes()
    start = raw.index(torch.arange(600.0).numpy().tobytes())
    for offset in range(0, 2400, 97):
        damaged = bytearray(raw)
        damaged[start + offset] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            load_checkpoint(path)


def test_flipped_bytes_anywhere_never_give_wrong_data(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, DATA)
    raw, found = path.read_bytes(), 0
    for offset in range(0, len(raw), 53):
        damaged = bytearray(raw)
        damaged[offset] ^= 0x10
        path.write_bytes(damaged)
        try:
            assert runs.fingerprint(load_checkpoint(path)) == runs.fingerprint(DATA)  # a zip has unused bytes
        except InputError:
            found += 1
    assert found > 20


class Payload:
    """Unpickling this runs a command that leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_not_executed(tmp_path, zipped):
    path, marker = tmp_path / "checkpoint.pt", tmp_path / "marker"
    torch.save({"kind": "checkpoint", "data": Payload(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="checkpoint.pt"):
        load_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x00" * 5000])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InputError, match="a.pt"):
        load_checkpoint(tmp_path / "a.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="not written by this project"):
        load_checkpoint(tmp_path / "b.pt")


def test_wrong_kind_version_and_missing_file(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, DATA, kind="adapter", version=2)
    assert load_checkpoint(path, kind="adapter", version=2)["iteration"] == 3
    with pytest.raises(InputError, match="'adapter'.*'ddpo'"):
        load_checkpoint(path, kind="ddpo", version=2)
    with pytest.raises(InputError, match="version 2.*reads 3"):
        load_checkpoint(path, kind="adapter", version=3)
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            load_checkpoint(missing)


def test_other_arguments_are_listed():
    stored, current = {"width": 64, "lr": 0.1, "steps": 10, "gone": 1}, {"width": 128, "lr": 0.1, "steps": 20}
    with pytest.raises(InputError) as caught:
        runs.require_same("c.pt", stored, current)
    message = str(caught.value)
    assert "width was 64 and is 128" in message and "gone was 1 and is None" in message
    assert "steps was 10 and is 20" in message and "lr" not in message
    runs.require_same("c.pt", {"betas": (1, 2)}, {"betas": [1, 2]})


def test_unstorable_values_leave_the_old_file_alone(tmp_path):
    class Stubborn:
        def __reduce__(self):
            raise RuntimeError("no")

    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, DATA)
    before = path.read_bytes()
    for value in (Stubborn(), {1, 2}, lambda: 0, object):
        with pytest.raises(TypeError, match=r"\['deep'\]\[1\]"):
            save_checkpoint(path, {"deep": [0, value]})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def killed(folder, moment):
    """Save a second checkpoint and die while it is written, or before it takes the place of the first."""
    path, whole, replace = folder / "checkpoint.pt", Path.write_bytes, os.replace
    RunFolder(folder)
    (folder / "args.json").write_text("{}")
    save_checkpoint(path, {"iteration": 1, "x": torch.ones(1000)})

    def half(self, data):
        whole(self, bytes(data)[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def kept(a, b):  # between keeping the old file and putting the new one in its place
        replace(a, b) if str(b).endswith("prev.pt") else os.kill(os.getpid(), signal.SIGKILL)
    if moment == "writing":
        Path.write_bytes = half
    else:
        os.replace = kept
    save_checkpoint(path, {"iteration": 2, "x": torch.ones(1000)})


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_killed_while_saving(tmp_path, moment):
    child = Forked(lambda: killed(tmp_path, moment)).wait()
    assert child.code == -signal.SIGKILL, child.errors
    assert load_checkpoint(tmp_path / "checkpoint.pt")["iteration"] == 1
    assert len(list(tmp_path.glob("*.tmp-*"))) == 1
    RunFolder(tmp_path, resume=True)  # the dead owner's lock does not hold, its leftovers go
    assert not list(tmp_path.glob("*.tmp-*"))
    assert load_checkpoint(tmp_path / "checkpoint.pt")["iteration"] == 1


def limited(path):
    save_checkpoint(path, {"iteration": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    save_checkpoint(path, {"iteration": 2, "x": torch.ones(100_000)})


def test_disk_full(tmp_path, monkeypatch):
    child = Forked(lambda: runs.run_main(limited, tmp_path / "checkpoint.pt")).wait()
    assert child.code == 4 and "--resume" in child.errors and "Traceback" not in child.errors
    assert load_checkpoint(tmp_path / "checkpoint.pt") == {"iteration": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint.pt"]

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "checkpoint.pt", {"iteration": 2})
    assert load_checkpoint(tmp_path / "checkpoint.pt") == {"iteration": 1}


def test_fingerprint_tells_values_apart():
    parts = [{"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": True}, {"a": [1]}, {"a": None}, {"b": 1}, b"a", "a",
             ["a"], ["ab", "c"], ["a", "bc"], np.zeros(2), np.zeros(2, np.float32), torch.zeros(1, 2),
             torch.ones(2)]
    assert len({runs.fingerprint(part) for part in parts}) == len(parts)
    assert runs.fingerprint({"a": 1, "b": (2, 3)}) == runs.fingerprint({"b": [2, 3], "a": 1})
    assert runs.fingerprint({"a": 0.5, "b": (2, 3)})[:16] == "9ae74122b31f5760"  # caches live across sessions


def test_json(tmp_path):
    path = tmp_path / "a.json"
    runs.save_json(path, {"x": np.float64(1.5), "n": math.nan, "t": torch.ones(2), 3: (True, None),
                          "inf": [np.float32(-math.inf), torch.tensor([math.inf])]})
    assert json.loads(path.read_text()) == {"x": 1.5, "n": "nan", "t": [1.0, 1.0], "3": [True, None],
                                            "inf": ["-inf", ["inf"]]}


# ---- the CSV log -------------------------------------------------------------------------------------------


def rows(path):
    return [line.split(",") for line in path.read_text().splitlines()[2:]]


def test_threads_of_an_interrupted_run_are_used_again(tmp_path):
    def args(**changes):
        return SimpleNamespace(**{"resume": True, "threads": 0, **changes})

    assert runs.wanted_threads(args(), tmp_path) is None
    (tmp_path / "args.json").write_text('{"threads": 3}')
    assert runs.wanted_threads(args(), tmp_path) == 3
    assert runs.wanted_threads(args(threads=1), tmp_path) == 1
    assert runs.wanted_threads(args(resume=False), tmp_path) is None
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(InputError, match="name --threads"):
        runs.wanted_threads(args(), tmp_path)


def test_log_resumes_without_double_or_partial_rows(tmp_path):
    path, fields = tmp_path / "logs.csv", ["iteration", "reward", "note"]
    log = CsvLog(path, fields, "abc")
    for i in range(5):
        log.write({"iteration": i, "reward": np.float32(i) / 4, "note": "a" * i})
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # killed while appending iteration 4
    log = CsvLog(path, fields, "abc")
    assert [row[0] for row in rows(path)] == ["0", "1", "2", "3"]
    log = CsvLog(path, fields, "abc", last=2)
    assert [row[0] for row in rows(path)] == ["0", "1", "2"]
    for i in (3, 4):
        log.write({"note": "a" * i, "reward": np.float32(i) / 4, "iteration": i})
    assert path.read_bytes() == whole
    assert path.read_text().splitlines()[:2] == ["# abc", "iteration,reward,note"]


def test_log_refuses_other_columns_and_other_runs(tmp_path):
    path = tmp_path / "logs.csv"
    log = CsvLog(path, ["iteration", "a"], "abc")
    for row in ({"iteration": 1}, {"iteration": 1, "a": 2, "b": 3}):
        with pytest.raises(ValueError):
            log.write(row)
    for fields, stamp in ((["iteration", "b"], "abc"), (["iteration", "a"], "other")):
        with pytest.raises(InputError, match="logs.csv"):
            CsvLog(path, fields, stamp)


@pytest.mark.parametrize("spec", ("text=0.5,,quality=0.5", ",", "text=1,", ",text=1", " "))
def test_weights_without_a_name_between_commas(spec):
    with pytest.raises(InputError, match="'' is none of text, quality") as caught:
        runs.parse_weights(spec, ("text", "quality"), "--weights")
    assert str(caught.value).startswith(f"--weights {spec}: ") and "\n" not in str(caught.value)
    assert runs.parse_weights("", ("text", "quality"), "--weights") == [0.5, 0.5]


@pytest.mark.parametrize("damage", [b"x,0.5\n", b"1,0.5,7\n", b"1\n", b"\n", b"-1,0.5\n", b"1,\xff\n",
                                    b'1,"0.5\n', b"\x00\x00,1\n", b"1.5,2\n"])
def test_a_broken_row_of_the_log(tmp_path, damage):
    """It is named and nothing is changed; without its newline it is a row that was never finished."""
    path, fields = tmp_path / "logs.csv", ["iteration", "reward"]
    log = CsvLog(path, fields, "abc")
    for iteration in range(2):
        log.write({"iteration": iteration, "reward": 0.5})
    whole = path.read_bytes()
    path.write_bytes(whole + damage + b"3,0.5\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match="logs.csv, line 5: no row of this log; repair or delete") as caught:
        CsvLog(path, fields, "abc", last=1)
    assert "\n" not in str(caught.value) and path.read_bytes() == before
    path.write_bytes(whole + damage.rstrip(b"\n"))
    CsvLog(path, fields, "abc", last=1)
    assert path.read_bytes() == whole


# ---- the run folder ----------------------------------------------------------------------------------------


def test_a_folder_with_content_is_refused(tmp_path):
    path = tmp_path / "deep" / "run"
    RunFolder(path)
    (path / "args.json").write_text("{}")
    (path / "logs.csv").write_text("old")
    (path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="--resume or --overwrite"):
        RunFolder(path)
    RunFolder(path, resume=True)
    assert (path / "logs.csv").read_text() == "old"
    RunFolder(path, overwrite=True)
    assert not (path / "logs.csv").exists() and (path / "thesis.tex").read_text() == "precious"


def test_overwrite_needs_an_earlier_run(tmp_path):
    (tmp_path / "picture.png").write_text("mine")
    with pytest.raises(InputError, match="no earlier run"):
        RunFolder(tmp_path, overwrite=True)
    assert (tmp_path / "picture.png").exists()
    with pytest.raises(InputError, match="nothing to resume"):
        RunFolder(tmp_path / "absent", resume=True)


def test_two_runs_in_one_folder(tmp_path):
    folder = RunFolder(tmp_path)
    child = Forked(lambda: runs.run_main(lambda argv: RunFolder(*argv), (tmp_path, "resume"))).wait()
    assert child.code == 2 and f"process {os.getpid()}" in child.errors
    with pytest.raises(InputError, match="in use"):
        RunFolder(tmp_path, resume=True)
    del folder
    RunFolder(tmp_path, resume=True)


def test_stale_lock_and_leftovers(tmp_path):
    (tmp_path / ".lock").write_text("999999999\n")
    (tmp_path / "a.pt.tmp-999999999").write_text("half")
    (tmp_path / f"b.pt.tmp-{os.getpid()}").write_text("alive")
    RunFolder(tmp_path, resume=True)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".lock", f"b.pt.tmp-{os.getpid()}"]


def as_a_user(folder):
    if os.geteuid() == 0:
        os.seteuid(65534)
    runs.run_main(RunFolder, folder)


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out-dir"):
        RunFolder(tmp_path / "file" / "run")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    for target in (locked, locked / "run"):
        child = Forked(lambda target=target: as_a_user(target)).wait()
        assert child.code == 2 and "--out-dir" in child.errors, child.errors
        assert child.errors.count("\n") == 1
    locked.chmod(0o755)


# ---- the process -------------------------------------------------------------------------------------------

def frame():
    """A training loop that logs nothing."""
    return runs.Loop("x", SimpleNamespace(args=Args(), rank=1, watch=None), Path(), (), {}, None)


def wait(argv):
    """Wait for a signal; "save" obeys it, any other word only says so."""
    with frame() as loop:
        print("ready", flush=True)
        for _ in range(600):
            time.sleep(0.05)
            if loop.stopped_by and argv[0] == "save":
                save_checkpoint(argv[1], {"iteration": 1})
                loop.check()
            elif loop.stopped_by:
                print("seen", flush=True)


def start(*argv):
    child = Forked(lambda: runs.run_main(wait, argv))
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_saves_and_stops(tmp_path, number, code):
    child = start("save", tmp_path / "c.pt")
    child.send_signal(number)
    child.wait()
    assert child.code == code and "--resume" in child.errors and "Traceback" not in child.errors
    assert load_checkpoint(tmp_path / "c.pt") == {"iteration": 1}


def test_second_sigint_acts_at_once(tmp_path):
    child = start("ignore", tmp_path / "c.pt")
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "seen\n"
    child.send_signal(signal.SIGINT)
    assert child.wait().code == 130


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with frame() as loop:
        loop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert loop.stopped_by == signal.SIGTERM
        with pytest.raises(runs.Interrupted):
            loop.check()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("error, code", [
    (None, 0), (InputError("--x: wrong"), 2), (NonFiniteError("loss"), 3), (OSError(errno.ENOSPC, "full"), 4),
    (OSError(errno.EDQUOT, "quota"), 4), (runs.Interrupted(signal.SIGTERM), 143), (KeyboardInterrupt(), 130)])
def test_exit_codes(error, code, capsys):
    def main(argv):
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        runs.run_main(main)
    assert caught.value.code == code
    assert capsys.readouterr().err.count("\n") == (1 if code not in (0, 130) else 0)


def test_programming_errors_keep_their_traceback():
    for error in (KeyError("x"), OSError(errno.EBADF, "x"), ValueError("x")):
        with pytest.raises(type(error)):
            runs.run_main(lambda argv: (_ for _ in ()).throw(error))


def test_devices_and_threads(monkeypatch):
    assert runs.pick_device("cpu").type == "cpu"
    absent = f"cuda:{torch.cuda.device_count()}"
    for name in (absent, "tpu", "cuda:x"):
        with pytest.raises(InputError, match=f"--device {name}"):
            runs.pick_device(name)
    before = torch.get_num_threads()
    try:
        assert runs.pick_threads(1) == 1 == torch.get_num_threads()
        with pytest.raises(InputError, match="--threads"):
            runs.pick_threads(0)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert runs.pick_threads() == 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert 1 <= runs.pick_threads() <= os.cpu_count()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("speed_up", "chosen"), ((1.4, 1), (1.9, 2)))
def test_a_second_thread_must_be_worth_it(monkeypatch, speed_up, chosen):
    """Two threads suffer ten times more from another process than one: they are taken for a clear gain."""
    before, now = torch.get_num_threads(), [0.0]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runs.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])

    def clock():
        now[0] += 1.0 if threads[-1] == 1 else 1.0 / speed_up
        return now[0]

    monkeypatch.setattr(runs.time, "perf_counter", clock)
    assert runs.pick_threads() == chosen
    assert torch.get_num_threads() == chosen and before >= 1


def test_stopwatch_adds_up(monkeypatch):
    clock = iter([0.0, 1.0, 3.5, 4.5])
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(clock))
    watch = runs.Stopwatch()
    for name in ("a", "b", "a"):
        watch.lap(name)
    assert watch.seconds == {"a": 2.0, "b": 2.5}


def test_versions_and_memory(tmp_path):
    assert runs.versions()["torch"] == torch.__version__ and "commit" in runs.versions()
    runs.finish(tmp_path, runs.Stopwatch(), {})
    assert 20 < json.loads((tmp_path / "results.json").read_text())["peak_memory_mb"] < 1e6


@pytest.mark.parametrize("size", (10, 1_000_000))
def test_output_that_nobody_reads_ends_quietly(size):
    """As in `| head -1`: with all of it still in the buffer, and in the middle."""
    child = Forked(lambda: time.sleep(0.1) or runs.run_main(lambda argv: print("x" * size), []))
    child.stdout.close()
    assert child.wait().code == 141 and child.errors == ""


@pytest.mark.parametrize("env, words", [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start "),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}, "without MASTER_PORT; start "),
    *(({"WORLD_SIZE": count, "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
       "without a number") for count in ("two", "", "0", "-1"))])
def test_processes_that_nobody_started(monkeypatch, env, words):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert runs.process_count() == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert runs.process_count() == 1
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for asked in (runs.process_count, runs.world):
        with pytest.raises(InputError, match=words) as caught:
            asked()
    assert "torchrun, or unset WORLD_SIZE" in str(caught.value)


SAY = """
import sys
from common import InputError, runs
def main(argv):
    print(argv[0], flush=True)
    raise InputError(f"--prompt {argv[0]}: no")
runs.run_main(main, [chr(0x4eba) + chr(0x2713) + chr(0xdce9)])
"""


@pytest.mark.parametrize("encoding", ("ascii", "latin-1", "utf-8", "cp1252"))
def test_terminals_that_lack_letters(encoding):
    """What cannot be shown is shown by its number; the run goes on."""
    child = subprocess.run([sys.executable, "-c", SAY], cwd=ROOT, capture_output=True, check=False,
                           env={**ENV, "PYTHONIOENCODING": encoding})
    letters = chr(0x4eba) + chr(0x2713) if encoding == "utf-8" else r"\u4eba\u2713"
    assert child.returncode == 2 and child.stdout.decode(encoding).splitlines() == [letters + r"\udce9"]
    assert child.stderr.decode(encoding).splitlines() == [f"error: --prompt {letters}" + r"\udce9: no"]


def test_a_prompt_that_is_not_utf_8():
    argv = ["--prompt", os.fsdecode(b"a person \xe9"), "--load", "policy.pt"]
    with pytest.raises(InputError, match="^--prompt: has bytes that are not UTF-8"):
        runs.prepare(Args, SIZES, argv, DESCRIPTION, "x", "x-policy", lambda args: None)
    person = chr(0x4eba)
    assert runs.decoded(person, "--prompt") == person and runs.decoded("a\n", "--prompt") == "a\n"
    code = "import sys; from common import runs; print(ascii(runs.decoded(sys.argv[1], '--prompt')))"
    for settings in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}):
        assert python(code, person, **settings).stdout.strip() == ascii(person), settings
