"""A fork of one file: the patch that README shows applies, runs, and is what the tables then speak of."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.run_helpers import ENV, ROOT

PATCH = ROOT / "results" / "right_hand.patch"
RUN = """
import ddpo_motion  # the one in the working folder, and not that of the repository
from common import evaluate, runs
from tests.run_helpers import smaller
evaluate.draw = lambda *args, **named: None  # no picture is asked for here
with smaller(scorer_iterations=4):
    runs.run_main(ddpo_motion.main)
"""


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of ddpo_motion.py and common/ with the patch, and a small run of it."""
    here = tmp_path_factory.mktemp("fork")
    shutil.copy(ROOT / "ddpo_motion.py", here)
    shutil.copytree(ROOT / "common", here / "common", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", str(PATCH)], cwd=here, check=True)
    flags = ("--dataset kit --tiny --threads 1 --device cpu --iterations 2 --prompts 2 --samples 2 "
             "--kept-samples 4 --best-of 6 --eval-repeats 1 --out-dir run --cache-dir cache")
    subprocess.run([sys.executable, "-c", RUN, *flags.split()], cwd=here, check=True, capture_output=True,
                   env={**ENV, "PYTHONPATH": f"{here}{os.pathsep}{ROOT}"})
    return here


def test_the_patch_is_short_and_shown_in_readme():
    lines = PATCH.read_text().splitlines()
    added = [line[1:] for line in lines if line.startswith("+") and not line.startswith("+++")]
    removed = [line for line in lines if line.startswith("-") and not line.startswith("---")]
    assert len(added) <= 10 and len(removed) <= 10
    assert "\n".join(added) in (ROOT / "README.md").read_text()


def test_a_model_free_reward_trains_no_reward_model(fork):
    kept = {path.name.partition("-")[0] for path in (fork / "cache").glob("*.pt")}
    assert kept == {"embedded", "judge", "base"}


def test_every_table_speaks_of_the_new_reward(fork):
    results = json.loads((fork / "run" / "results.json").read_text())
    assert results["parts"]["reward"] == "height of the right wrist over the head"
    for table in ("target_val", "target_test", "source_test"):
        data = results[table]["gt"]["reward"][0]
        assert -1.2 < data < 0.5, "metres; in the data the hand mostly hangs"
        gain = results[table]["tuned"]["reward"][0] - results[table]["base"]["reward"][0]
        assert results[table]["gain"]["reward"][0] == pytest.approx(gain, abs=1e-6)
    best, base = (results["target_test"][row]["reward"][0] for row in ("best of 6", "base"))
    assert best > base
    log = np.genfromtxt(fork / "run" / "logs.csv", delimiter=",", skip_header=2)
    header = (fork / "run" / "logs.csv").read_text().splitlines()[1].split(",")
    assert (np.abs(log[:, header.index("reward")]) < 1.5).all()
