"""End to end, what is particular to stepwise_motion.py; what all scripts share is in test_run_all.py."""
import functools
import json
import math

import numpy as np
import pytest
import torch

import ddpo_motion
import stepwise_motion as sw
from common import InputError, render, runs
from tests import run_helpers as helpers
from tests.run_helpers import all_finite, log_rows

call, refused = (functools.partial(f, sw) for f in (helpers.call, helpers.refused))
pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def finished(finished_run):
    return finished_run("stepwise")


def weights(finished, folder):
    return finished.stored(folder)["trained"]


def moved(state):
    """Every matrix B of the adapters started at zero."""
    return all(value.abs().max() > 0 for name, value in state.items() if name.endswith(".B"))


# ---- what a run leaves behind ------------------------------------------------------------------------------


def test_the_log_counts_updates_and_calls(finished):
    log = log_rows(finished.folder)
    assert log["iteration"].tolist() == [0, 1, 2, 3]
    assert log["updates"].tolist() == [2, 4, 6, 8], "one for each of the two steps of the window"
    # 8 motions x (4 forwards, 2 of them with a backward pass, and 2 of the base for the anchor)
    assert log["calls"].tolist() == [64, 128, 192, 256]
    assert np.isfinite(log["val_judge"]).tolist() == [False, True, False, True]
    for name in ("reward", "anchor", "grad_norm"):
        assert np.isfinite(log[name]).all(), name
    assert (log["grad_norm"] > 0).all() and log["anchor"][0] < log["anchor"][3]


def test_the_product_holds_the_best_look(finished, tmp_path, no_evaluation):
    checkpoint = finished.checkpoint(finished.folder)
    best, log = checkpoint["best"], log_rows(finished.folder)
    looks = {int(i): (-broken, judge) for i, broken, judge in
             zip(log["iteration"], log["val_gate"], log["val_judge"]) if np.isfinite(judge)}
    assert best["iteration"] == max(looks, key=looks.get)
    assert helpers.equal(weights(finished, finished.folder), best["trained"])
    assert finished.results["best look"]["iteration"] == best["iteration"]
    assert finished.call("--out-dir", tmp_path / "run", "--keep", "last")[0] == 0
    assert helpers.equal(weights(finished, tmp_path / "run"), checkpoint["trained"])
    assert moved(checkpoint["trained"])


def test_the_reward_is_described(finished):
    reward = finished.results["parts"]["reward"]
    for moment in ("before", "after"):
        assert set(reward[moment]) == {"features", "joints", "rotations"}
        assert all(0 <= row["R1"] <= 1 for row in reward[moment].values())
    assert all(0 <= share <= 1 for share in reward["authenticity"].values())
    assert all("warp" in shares for shares in reward["preference"].values())
    for word in ("before -> after SPL", "accuracy on held-out motions: features: preference 0."):
        assert word in finished.out


def test_the_default_base_is_that_of_ddpo(finished, tmp_path, no_evaluation):
    """One file in the cache: DDPO can be compared on the same base."""
    before = sorted(path.name for path in finished.cache.glob("base-*"))
    flags = ["--tiny", "--threads", 1, "--iterations", 1, "--cache-dir", finished.cache]
    assert helpers.call(ddpo_motion, *flags, "--out-dir", tmp_path / "run")[0] == 0
    assert sorted(path.name for path in finished.cache.glob("base-*")) == before and len(before) == 1
    base = runs.load_checkpoint(tmp_path / "run" / "adapter.pt", kind="ddpo-adapter")["base"]
    assert helpers.equal(base, finished.stored(finished.folder)["base"])


# ---- every method and every kind of generator --------------------------------------------------------------

ONE = ["--iterations", 1, "--eval-every", 1]
QUICK = ["--eval-repeats", 1, "--best-of", 1]


@pytest.mark.parametrize("flags, updates, calls", [
    (["--method", "refl", "--window", 1, "--steps", 3], 1, 8 * (2 + 2 + 2 + 1)),
    (["--method", "draft"], 1, 8 * (2 + 4 + 2 + 1)),
    (["--method", "draft", "--window", 4], 1, 8 * (8 + 2 + 1)),
    (["--method", "draft", "--checkpointing"], 1, 8 * (2 + 4 + 2 + 1)),
    (["--method", "alignprop"], 1, None),
    (["--method", "alignprop-bernoulli", "--prediction", "v"], 1, None),
    (["--reward-input", "xt"], 2, 64),
    (["--reward-input", "mixed"], 2, 64), (["--anchor", 0], 2, 48), (["--sweep", 0.5], 2, 48),
    (["--lora-rank", 0, "--lr", 1e-3], 2, 64), (["--weights", "semantic=1,m2m=1"], 2, 64),
    (["--guidance-scale", 2], 2, 128), (["--reward-data", "source"], 2, 64), (["--spl", "code"], 2, 64),
    (["--weights", "preference=1"], 2, 64)],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "")
def test_methods_run(finished, tmp_path, no_evaluation, flags, updates, calls):
    code, _, err = finished.call(*ONE, *flags, "--out-dir", tmp_path / "run")
    assert code == 0, err
    log = log_rows(tmp_path / "run")
    assert log["updates"] == [updates] and (calls is None or log["calls"] == [calls])
    state = weights(finished, tmp_path / "run")
    assert all_finite(state) and not helpers.equal(state, weights(finished, finished.folder))
    if "--lora-rank" not in flags:
        assert moved(state)


@pytest.mark.parametrize("flags", (
    ["--representation", "joints", "--weights", "semantic=1,m2m=1,preference=0.02"],
    ["--representation", "rotations"], ["--prediction", "velocity"],
    ["--prediction", "velocity", "--method", "drtune"], ["--prediction", "epsilon", "--method", "drtune"],
    ["--prediction", "v", "--spacing", "leading"]), ids="_".join)
def test_generators_run(finished, tmp_path, monkeypatch, no_pictures, flags):
    """Training, tables and a prompt, each with a base of its own."""
    monkeypatch.setattr(render, "render_gif", lambda *args, **named: None)
    code, out, err = finished.call(*ONE, *flags, *QUICK, "--out-dir", tmp_path / "run")
    assert code == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert math.isfinite(results["target_test"]["tuned"]["judge"][0])
    state = weights(finished, tmp_path / "run")
    assert all_finite(state) and moved(state)
    flags = ["--prompt", "a man walks", "--load", tmp_path / "run" / "adapter.pt", "--length", 40]
    assert call(*flags, "--tiny", "--threads", 1, "--out-dir", tmp_path / "prompt")[0] == 0
    joints = np.load(tmp_path / "prompt" / "prompt00_after.npy")
    assert joints.shape == (40, 22, 3) and np.isfinite(joints).all()


def test_a_rate_of_zero_changes_nothing(finished, tmp_path, no_evaluation):
    code, *_ = finished.call(*ONE, "--lr", 0, "--out-dir", tmp_path / "run")
    state = weights(finished, tmp_path / "run")
    assert code == 0
    assert not any(value.abs().max() > 0 for name, value in state.items() if name.endswith(".B"))
    assert log_rows(tmp_path / "run")["anchor"][0] == 0


# ---- the reward --------------------------------------------------------------------------------------------


def test_the_reward_is_frozen_and_asked_for_the_right_caption(finished, tmp_path, monkeypatch, no_evaluation):
    seen, reward = [], sw.weighted_reward

    def watched(model, representation, weights, motion, lengths, captions, *more, **named):
        if motion.requires_grad:
            state = {name: value.clone() for name, value in model.state_dict().items()}
            seen.append((model, state, captions))
            assert not model.training
            assert weights == {"semantic": 1.0, "preference": 0.02, "authenticity": 0.05}
        return reward(model, representation, weights, motion, lengths, captions, *more, **named)

    monkeypatch.setattr(sw, "weighted_reward", watched)
    assert finished.call(*ONE, "--out-dir", tmp_path / "one")[0] == 0
    model, before, captions = seen[0]
    assert helpers.equal(before, dict(model.state_dict()))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert finished.call(*ONE, "--reward", "shuffled", "--out-dir", tmp_path / "two")[0] == 0
    wrong = seen[-1][2]
    assert len(wrong) == len(captions) and all(a != b for a, b in zip(wrong, captions))


def test_a_reward_that_is_nan(finished, tmp_path, monkeypatch, no_evaluation):
    score, calls = sw.score, []

    def broken(*args, **more):
        calls.append(1)
        return score(*args, **more) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(sw, "score", broken)
    code, _, err = finished.call("--out-dir", tmp_path / "run")
    assert code == 3 and "Traceback" not in err
    assert "iteration 2, step 2" in err.splitlines()[-1] and "lower --lr" in err.splitlines()[-1]
    assert finished.checkpoint(tmp_path / "run")["iteration"] == 1
    monkeypatch.setattr(sw, "score", score)
    assert finished.call("--out-dir", tmp_path / "run", "--resume")[0] == 0
    assert finished.is_same(tmp_path / "run")


def test_a_reward_that_is_handed_in(finished, tmp_path, monkeypatch, no_pictures):
    """It is what is climbed, and what every table shows; MotionReward is not asked for."""
    def lowness(motion, lengths, captions):
        return -motion[:, :4, 3].mean(1)  # the height of the root in the first frames

    monkeypatch.setattr(sw.motion_reward, "fit_motion_reward", None)
    code, out, err = helpers.call(sw, *finished.flags, "--eval-repeats", 1, "--out-dir", tmp_path / "run",
                                  "--iterations", 12, "--anchor", 0, "--keep", "last", reward=lowness)
    assert code == 0, err
    log, results = log_rows(tmp_path / "run"), json.loads((tmp_path / "run" / "results.json").read_text())
    assert log["reward"][-3:].mean() > log["reward"][:3].mean()
    table = results["target_test"]
    gain, noise = table["gain"]["reward"]
    assert gain > noise and "preference" not in table["tuned"] and np.isnan(log["val_preference"]).all()
    assert table["best of 2"]["reward"][0] >= table["base"]["reward"][0]


def test_the_column_reward_is_what_is_optimised(finished):
    """Weights as they are by default: the total, and not the cosine alone."""
    table = finished.results["target_test"]
    rest = [0.02 * row["preference"][0] + 0.05 * row["authenticity"][0]
            for row in (table["base"], table["gt"])]
    assert all(abs(value) > 1e-3 for value in rest)
    assert all(-1 <= row["reward"][0] - value <= 1 for row, value in zip((table["base"], table["gt"]), rest))


# ---- the user's mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--method", "drtune"], ["--method drtune", "--prediction epsilon"]),
    (["--method", "alignprop-bernoulli"], ["--method alignprop-bernoulli", "--prediction epsilon"]),
    (["--weights", "m2m=1", "--reward-data", "source"], ["--weights m2m", "--reward-data source"]),
    (["--window", 5], ["--window", "4 denoising steps"]), (["--prompts", 0], ["--prompts"]),
    (["--steps", 0], ["--steps"]), (["--lr", "nan"], ["--lr"]), (["--anchor", -1], ["--anchor"]),
    (["--weights", "semantic=0"], ["--weights"]), (["--prompt", "a man walks"], ["--load"]),
    (["--dataset", "absent"], ["--dataset absent", "no such folder"])],
    ids=lambda value: "_".join(map(str, value)))
def test_wrong_flags(finished, tmp_path, flags, words):
    line = finished.refused("--out-dir", tmp_path / "run", *flags)
    assert all(word in line for word in words), line
    assert helpers.products(tmp_path / "run") == {}


def test_a_product_of_another_method_cannot_be_contradicted(finished, tmp_path):
    line = finished.refused("--eval-only", "--load", finished.product, "--method", "draft", "--out-dir",
                            tmp_path / "run")
    assert "method was 'easytune' and is 'draft'" in line


# ---- several processes -------------------------------------------------------------------------------------


def test_two_processes_equal_one(finished, tmp_path, no_evaluation):
    flags = [*finished.flags, "--iterations", "2", "--lr", "2e-4"]
    assert call(*flags, "--out-dir", tmp_path / "one")[0] == 0
    helpers.two_processes(sw, [*flags, "--out-dir", tmp_path / "two"])
    one, two = log_rows(tmp_path / "one"), log_rows(tmp_path / "two")
    for name in ("updates", "calls"):
        np.testing.assert_array_equal(two[name], one[name], err_msg=name)
    for name in ("reward", "anchor", "grad_norm", "val_reward"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-5, err_msg=name)
    a, b = (weights(finished, tmp_path / name) for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(torch.as_tensor(b[name]), torch.as_tensor(a[name]), rtol=0, atol=1e-4)


def test_the_kind_of_the_product(finished):
    with pytest.raises(InputError):
        runs.load_checkpoint(finished.product, kind="ddpo-adapter")
