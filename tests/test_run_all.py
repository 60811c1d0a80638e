"""End to end, for every script alike: files of a run, resume to the same bits, the user's mistakes, faults.

What is particular to a script is in its own test file. One full run of each script fills a cache that all
tests share; most of the others call main() in this process. What common/runs.py does with a fault is tested
on one script for each case, and not on all four.
"""
import dataclasses
import errno
import itertools
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from common import render, runs
from tests import run_helpers as helpers
from tests.run_helpers import METRICS, SMALL, log_rows, products

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module", params=SMALL)
def finished(request, finished_run):
    return finished_run(request.param)


def spread(names, *cases):
    """parametrize(...) of cases, each with the run of one script: of all scripts in turn."""
    cases = list(itertools.product(*cases)) if cases else [()]
    rows = [(script, *case) for script, case in zip(itertools.cycle(SMALL), cases)]
    return pytest.mark.parametrize(", ".join(["finished", *names]), rows, indirect=["finished"])


def on(script):
    """The test is of this script alone."""
    return pytest.mark.parametrize("finished", [script], indirect=True)


# ---- 1. What a run leaves behind ---------------------------------------------------------------------------


def test_files_of_a_run(finished):
    wanted = {"args.json", "logs.csv", "curves.png", "results.json", "before_after.gif", "storyboard.png",
              "checkpoint.pt", finished.product.name}
    assert wanted <= set(products(finished.folder))
    assert not list(finished.folder.glob("*tmp*"))
    for name, kind in (("curves.png", "PNG"), ("storyboard.png", "PNG"), ("before_after.gif", "GIF")):
        with Image.open(finished.folder / name) as picture:
            assert picture.format == kind and getattr(picture, "n_frames", 1) > (2 if kind == "GIF" else 0)
    about = json.loads((finished.folder / "args.json").read_text())
    args = helpers.parse(finished.script, *finished.flags, "--out-dir", "run")
    assert args.size == "tiny" and args.tiny
    assert about["args"] == dataclasses.asdict(args) and about["threads"] == 1
    assert set(about["versions"]) >= {"python", "torch", "numpy", "commit"} and about["fingerprints"]
    assert "EMBEDDED" in finished.out


def test_results_hold_all_tables(finished):
    results = finished.results
    assert results["versions"] == runs.versions() and results["seed"] == 0
    assert results["command"].startswith(f"python {finished.script.__name__}.py --")
    for table, rows in finished.tables.items():
        assert set(results[table]) == rows, table
        base, tuned = results[table]["base"], results[table]["tuned"]
        paired = "gt" in rows  # with motions to compare with
        for row in rows - {"gain"}:
            assert set(results[table][row]) >= set(METRICS if paired else ("reward", "judge", "oracle"))
            numbers = dict(results[table][row])
            checks, broken = numbers.pop("checks"), numbers.pop("gate", [])
            assert all(isinstance(bound, str) for bound in broken), "bounds of the gate, in words"
            assert checks and all(0 <= share <= 1 and count >= 1 for share, count in checks.values())
            for name, (mean, half_width) in numbers.items():
                assert abs(mean) < 1e6, (table, row, name)
                assert half_width == "nan" or 0 <= half_width < 1e6, "of one value there is no interval"
        assert {"multimodality", "distinct"} <= set(base) & set(tuned)
        assert results[table]["gain"]["reward"][0] == pytest.approx(tuned["reward"][0] - base["reward"][0],
                                                                    abs=1e-6)
        if paired:
            assert results[table]["gt"]["fid"][0] < 1e-3 < base["fid"][0]
        if "best of 2" in rows:
            assert results[table]["best of 2"]["reward"][0] > base["reward"][0]
        printed = finished.out.partition(f"\n{table.replace('_', ' ')}: ")[2].partition("\n\n")[0]
        lines = printed.splitlines()
        assert {row.split()[0] for row in rows} <= {line.split()[0] for line in lines[2:] if line}


def test_a_second_run_takes_everything_from_the_cache(finished, tmp_path, monkeypatch, no_pictures):
    """And gives the same numbers as the run that built it."""
    asked = helpers.only_cached(monkeypatch)
    code, *_ = finished.call("--out-dir", tmp_path / "run")
    assert code == 0 and sorted(asked) == finished.cached
    assert finished.is_same(tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(results[table] == finished.results[table] for table in finished.tables)


def test_eval_only_gives_the_table_of_the_run(finished, tmp_path, no_pictures, request):
    flags = ["--eval-only", "--load", finished.product, "--out-dir", tmp_path / "eval"]
    assert finished.call(*flags)[0] == 0
    assert {"results.json"} <= set(products(tmp_path / "eval")) <= {"results.json", "fronts.png"}
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert all(results[table] == finished.results[table] for table in finished.tables)
    assert results["data"] == finished.results["data"]
    request.getfixturevalue("no_evaluation")
    assert finished.call(*flags)[0] == 0, "the same command can be given again"


@spread(["mode"], (["--prompt", "a man walks"], ["--eval-only"]) * 2)
def test_using_a_product_never_deletes_its_run(finished, tmp_path, no_evaluation, mode):
    shutil.copytree(finished.folder, tmp_path / "run")
    flags = [*mode, "--load", tmp_path / "run" / finished.product.name, "--out-dir", tmp_path / "run"]
    line = finished.refused(*flags)
    assert "--out-dir" in line and "holds a training run" in line
    assert products(tmp_path / "run") == products(finished.folder)


# ---- 2. Interrupted and resumed ----------------------------------------------------------------------------


# ppo: in an iteration there are one rollout and eight losses, of two passes, two minibatches and two micro
# batches; a rollout before the first iteration gives the reward its scale. stepwise: two losses, one a step.
@pytest.mark.parametrize("name, moment, count, number, code, kept", [
    ("ddpo", "score", 3, signal.SIGTERM, 143, 1),
    ("ddpo", "clipped_loss", 5, signal.SIGINT, 130, 1),
    ("ddpo", "after a checkpoint", 1, signal.SIGTERM, 143, 1),
    ("ddpo", "after a checkpoint", 1, signal.SIGKILL, -9, 1),
    ("ddpo", "between log and checkpoint", 1, signal.SIGKILL, -9, 0),
    ("ppo", "collect", 1, signal.SIGTERM, 143, None), ("ppo", "clipped_loss", 20, signal.SIGINT, 130, 1),
    ("pareto", "collect", 3, signal.SIGTERM, 143, 1),
    ("pareto", "between log and checkpoint", 1, signal.SIGKILL, -9, 0),
    ("stepwise", "collect", 2, signal.SIGTERM, 143, 0),
    ("stepwise", "anchor_loss", 5, signal.SIGINT, 130, 1)])
def test_resumed_equals_uninterrupted(finished_run, tmp_path, no_evaluation, name, moment, count, number,
                                      code, kept):
    finished, run = finished_run(name), tmp_path / "run"
    flags = ["--out-dir", str(run)]
    child = helpers.interrupted(finished.script, [*finished.flags, *flags], moment, count, number)
    assert child.code == code and "Traceback" not in child.errors, child.errors
    assert code < 0 or child.errors.splitlines()[-1].endswith("go on with --resume")
    if kept is None:
        assert not (run / "checkpoint.pt").exists()
    else:
        assert finished.checkpoint(run)["iteration"] == kept
    assert not (run / finished.product.name).exists()
    assert finished.call(*flags, "--resume")[0] == 0 and finished.is_same(run)


def test_stopped_after_every_iteration(finished, tmp_path, monkeypatch, no_evaluation):
    end = runs.Loop.end

    def stopped(self, row, *rest):
        end(self, row, *rest)
        raise runs.Interrupted(signal.SIGTERM)

    flags = ["--out-dir", tmp_path / "run", "--resume"]
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(runs.Loop, "end", stopped)
        for iteration in range(4):
            assert finished.call(*flags)[0] == 143
            assert finished.checkpoint(tmp_path / "run")["iteration"] == iteration
    assert finished.call(*flags)[0] == 0 and finished.is_same(tmp_path / "run")


@on("ddpo")
def test_a_finished_run_can_be_made_longer(finished, tmp_path, no_evaluation):
    """No schedule of this script depends on the total: the result is that of a run that was long at once."""
    flags = ["--out-dir", tmp_path / "run"]
    total = int(finished.checkpoint(finished.folder)["args"]["iterations"])
    assert finished.call(*flags, "--iterations", 2)[0] == 0
    code, out, _ = finished.call(*flags, "--resume", "--iterations", total)
    assert code == 0 and f"2 of 2 iterations are done, on to {total}; rates and windows" in out
    assert finished.is_same(tmp_path / "run")
    line = finished.refused(*flags, "--resume", "--iterations", 2)
    assert f"iterations was {total} and is 2" in line


@on("ppo")
def test_a_longer_run_of_other_arguments_is_refused(finished, tmp_path, no_evaluation):
    shutil.copytree(finished.folder, tmp_path / "run")
    before = products(tmp_path / "run")
    line = finished.refused("--out-dir", tmp_path / "run", "--resume", "--iterations", 50, "--lr", 0.5)
    assert "lr was" in line and "iterations" not in line and products(tmp_path / "run") == before


@on("ddpo")
def test_overwrite_starts_again(finished, tmp_path, no_evaluation):
    for flags in ([], ["--overwrite", "--seed", 1]):
        assert finished.call("--iterations", 1, "--out-dir", tmp_path / "run", *flags)[0] == 0
    assert len(log_rows(tmp_path / "run")["iteration"]) == 1
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["seed"] == 1
    assert finished.checkpoint(tmp_path / "run")["args"]["seed"] == 1


# ---- 3. The user's mistakes --------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(finished, tmp_path):
    line = finished.refused("--out-dir", tmp_path / "run", "--device", "cuda")
    assert "--device cuda" in line and "--device cpu" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", (["--no-such-flag"], ["--iterations", "many"], ["--reward", "3"]))
def test_usage(finished, tmp_path, flags):
    """argparse answers with its usage and one line that names the flag."""
    code, _, err = finished.call("--out-dir", tmp_path / "run", *flags)
    assert code == 2 and "error:" in err.splitlines()[-1] and flags[0] in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ("--out-dir", "--cache-dir"))
def test_folders_that_cannot_be_made(finished, tmp_path, flag):
    (tmp_path / "file").write_text("precious")
    line = finished.refused("--out-dir", tmp_path / "run", flag, tmp_path / "file" / "below")
    assert flag in line and "file" in line and (tmp_path / "file").read_text() == "precious"
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_not_entered_by_accident(finished):
    before = products(finished.folder)
    line = finished.refused("--out-dir", finished.folder)
    assert "--resume or --overwrite" in line and str(finished.folder) in line
    assert products(finished.folder) == before


@spread(["damage"], ("empty", "half", "one bit", "foreign", "product"))
def test_resume_from_a_damaged_checkpoint(finished, tmp_path, damage, no_evaluation):
    shutil.copytree(finished.folder, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    if damage == "foreign":
        torch.save({"weight": torch.ones(3)}, path)
    elif damage == "product":
        shutil.copy(finished.product, path)
    else:
        helpers.break_file(path, damage, helpers.some_weight(finished.checkpoint(tmp_path / "run")))
    before = products(tmp_path / "run")
    line = finished.refused("--out-dir", tmp_path / "run", "--resume")
    words = {"foreign": ["not written by this project", "checkpoint.prev.pt"],
             "product": [f"holds a '{finished.kind}', wanted a '{finished.name}-run'"]}
    assert all(word in line for word in words.get(damage, ["damaged", "checkpoint.prev.pt"])), line
    assert "checkpoint.pt: " in line and products(tmp_path / "run") == before
    if damage == "one bit":  # what the line advises
        path.with_name("checkpoint.prev.pt").replace(path)
        assert finished.call("--out-dir", tmp_path / "run", "--resume")[0] == 0
        assert finished.is_same(tmp_path / "run")


@spread(["mode", "what"], (["--eval-only"], ["--prompt", "a man walks"]),
        ("half", "empty", "one bit", "foreign", "checkpoint", "of another script"))
def test_products_that_do_not_load(finished, tmp_path, mode, what):
    path = tmp_path / finished.product.name
    shutil.copy(finished.product, path)
    words = "damaged"
    if what == "foreign":
        torch.save({"weight": torch.ones(3)}, path)
        words = "not written by this project"
    elif what == "checkpoint":
        shutil.copy(finished.folder / "checkpoint.pt", path)
        words = f"holds a '{finished.name}-run', wanted a '{finished.kind}'"
    elif what == "of another script":
        runs.save_checkpoint(path, {"args": {"seed": 0}, "weight": torch.ones(2)}, kind="other-policy")
        words = f"holds a 'other-policy', wanted a '{finished.kind}'"
    else:
        helpers.break_file(path, what, helpers.some_weight(finished.stored(path)))
    line = finished.refused(*mode, "--load", path, "--out-dir", tmp_path / "run")
    assert words in line and str(path) in line and not (tmp_path / "run").exists()


# ---- 4. Faults while running -------------------------------------------------------------------------------


@on("pareto")
def test_a_full_disk(finished, tmp_path, monkeypatch, no_evaluation):
    write, writes = Path.write_bytes, []

    def full(self, data):
        writes.append(self)
        if len(writes) == 3:
            write(self, bytes(data)[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = finished.call("--out-dir", tmp_path / "run")
    assert code == 4 and "No space left" in err.splitlines()[-1] and "Traceback" not in err
    assert all(path.name.startswith("checkpoint.pt") for path in writes)
    assert finished.checkpoint(tmp_path / "run")["iteration"] == 1
    assert not list((tmp_path / "run").glob("*tmp*"))
    monkeypatch.setattr(Path, "write_bytes", write)
    assert finished.call("--out-dir", tmp_path / "run", "--resume")[0] == 0
    assert finished.is_same(tmp_path / "run")


@on("ddpo")
def test_pictures_that_fail_only_warn(finished, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("no fonts")

    for name in ("render_gif", "storyboard", "curves"):
        monkeypatch.setattr(render, name, broken)
    with pytest.warns(RuntimeWarning, match="no fonts"):
        code, *_ = finished.call("--out-dir", tmp_path / "run", "--iterations", 1)
    assert code == 0 and {"results.json", finished.product.name} <= set(products(tmp_path / "run"))
