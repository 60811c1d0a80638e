"""End to end, what is particular to pareto_motion.py; what all scripts share is in test_run_all.py."""
import functools
import json
import math

import numpy as np
import pytest
import torch

import pareto_motion as pareto
from common import generator, training
from common.published import motion_critic
from tests import run_helpers as helpers
from tests.run_helpers import all_finite, equal, log_rows, products

parse, call, refused = (functools.partial(f, pareto) for f in (helpers.parse, helpers.call, helpers.refused))

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def finished(finished_run):
    return finished_run("pareto")


# ---- 1. What a run leaves behind ---------------------------------------------------------------------------


def test_log_has_a_row_an_iteration(finished):
    log, stored = log_rows(finished.folder), finished.stored(finished.folder)
    checkpoint = finished.checkpoint(finished.folder)
    assert list(log) == list(pareto.LOG_FIELDS) and log["iteration"].tolist() == [0, 1, 2, 3]
    for name in pareto.LOG_FIELDS:
        wanted = [False, True, False, True] if name.startswith("val_") else [True] * 4
        assert np.isfinite(log[name]).tolist() == wanted, name
    assert log["first_ratio_error"].tolist() == [0, 0, 0, 0] and (log["grad_norm"] > 0).all()
    assert ((0 < log["kept"]) & (log["kept"] <= 1)).all()
    # both begin as the reference, which reads no token
    for name in ("kl_ref", "rival_kl_ref"):
        assert log[name][0] == 0 and (log[name][1:] > 0).all()
    assert equal(checkpoint["tuned gpt"], stored["gpt"]) and equal(checkpoint["rival gpt"], stored["rival"])
    for network in ("gpt", "rival"):
        still = [k for k, value in stored[network].items() if torch.equal(value, stored["reference"][k])]
        assert still == [] and all_finite(stored[network])
    assert not equal(stored["gpt"], stored["rival"])


def test_results_have_fronts_and_controllability(finished):
    results = finished.results
    assert {"fronts.png", "curves.png"} <= set(products(finished.folder))
    matrix = results["controllability"]
    table = results["paired_test"]
    assert matrix == [[table[f"token {k}"][j][0] for j in pareto.REWARDS] for k in pareto.REWARDS]
    fronts = results["fronts"]
    assert list(fronts) == ["start", "tuned", "weighted sum"]
    assert set(fronts["weighted sum"]) == {"hypervolume", "of the means", "less start", "less tuned"}
    for name in ("tuned", "weighted sum"):
        gain = fronts[name]["hypervolume"][0] - fronts["start"]["hypervolume"][0]
        assert fronts[name]["less start"][0] == pytest.approx(gain, abs=1e-9)
    assert results["counts"]["motions"] == 4 * 2 * 4 * 3 * 2, "iterations, prompts, samples, tokens, policies"
    assert "hypervolume of 24 motions of each of 4 prompts" in finished.out
    assert "never trained on: warp" in finished.out and "controllability" in finished.out
    assert set(results["parts"]) == {"reward", "reward 2", "judge", "tokenizer", "gpt", "perception"}
    assert all(high > low for low, high in zip(results["rewards"]["low"], results["rewards"]["high"]))
    for table in ("paired_val", "paired_test"):
        assert results[table]["gt"]["quality"][0] >= results[table]["base"]["quality"][0], "the real motion"
        assert results[table]["base"]["speed"][0] > 0 and "preference" in results[table]["gain"]


def test_normaliser_and_tokens_stay_as_they_were(finished):
    """Those of policy.pt are those of a run that trains nothing."""
    stored = finished.stored(finished.folder)
    assert stored["tokens"].shape == (3, 35) and equal(
        {name: value.tolist() for name, value in stored["rewards"].items()}, finished.results["rewards"])


def test_without_a_rival_the_policy_is_the_same(finished, tmp_path, no_evaluation):
    assert finished.call("--no-rival", "--out-dir", tmp_path / "run")[0] == 0
    mine, run = finished.stored(tmp_path / "run"), finished.stored(finished.folder)
    assert mine["rival"] == {} and equal(mine["gpt"], run["gpt"])
    assert np.isnan(log_rows(tmp_path / "run")["rival_text"]).all()


@pytest.mark.parametrize("flags", (["--selection", "union"], ["--selection", "literal"],
                                   ["--selection", "none"], ["--selection", "weighted-sum"],
                                   ["--selection", "weighted-sum", "--weights", "preference=1"],
                                   ["--token-reward", "mean"], ["--reduction", "token"],
                                   ["--baseline", "kept", "--minibatch-ratio", 1],
                                   ["--alpha", 0], ["--temperature", 1.5]),
                         ids=lambda flags: " ".join(map(str, flags)))
def test_every_choice_runs_and_matters(finished, tmp_path, flags, no_evaluation):
    assert finished.call("--no-rival", *flags, "--iterations", 2, "--out-dir", tmp_path / "run")[0] == 0
    mine, run = finished.stored(tmp_path / "run"), finished.stored(finished.folder)
    assert all_finite(mine["gpt"]) and not equal(mine["gpt"], run["gpt"])
    assert (log_rows(tmp_path / "run")["first_ratio_error"] == 0).all()
    if len(mine["tokens"]) == 0:  # then the reference has no dimensions for them either
        name = "trans_base.cond_emb.weight"
        assert mine["reference"][name].shape == (32, 32) and run["reference"][name].shape == (32, 35)
        run["reference"][name] = run["reference"][name][:, :32]
    assert equal(mine["reference"], run["reference"])


def test_the_weighted_sum_of_one_reward_has_no_matrix(finished, tmp_path, no_pictures):
    flags = ["--selection", "weighted-sum", "--weights", "text=1", "--iterations", 1]
    assert finished.call(*flags, "--out-dir", tmp_path / "run")[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["controllability"] is None and list(results["fronts"]) == ["start", "tuned"]
    assert set(results["paired_test"]) == {"gt", "vq", "base", "tuned", "gain"}


# ---- 2. The user's mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--prefer", "text=0.5", "--load", "POLICY", "--prompt", "a man walks"],
     ["--prefer text=0.5", "sum to 1"]),
    (["--prefer", "speed=1", "--load", "POLICY", "--prompt", "a man walks"], ["'speed'", "text, quality"]),
    (["--prefer", "text=1"], ["--prefer", "--prompt"]),
    (["--selection", "weighted-sum", "--weights", "text=2"], ["--weights", "sum to 2"]),
    (["--weights", "text=1"], ["--weights", "--selection weighted-sum"]),
    (["--alpha", 1.5], ["--alpha", "0 to 1"]), (["--temperature", 0], ["--temperature"]),
    (["--batch-prompts", 0], ["--batch-prompts"]), (["--samples-per-prompt", 1], ["--samples-per-prompt"]),
    (["--minibatch-ratio", 0.3], ["--minibatch-ratio", "24 motions"]),
    (["--baseline", "kept"], ["--minibatch-ratio", "--baseline kept"]),
    (["--width", 34], ["--width", "--heads"]), (["--gpt-checkpoint", "gpt.pth"], ["--vq-checkpoint"]),
    (["--perception-checkpoint", "absent.pth"], ["absent.pth", "no such file"]),
    (["--dataset", "absent"], ["absent", "no such folder"]), (["--resume"], ["nothing to resume"]),
    (["--eval-only"], ["--load"]), (["--prompt", "", "--load", "POLICY"], ["--prompt", "empty"])],
    ids=lambda value: "_".join(map(str, value)))
def test_wrong_flags(finished, tmp_path, flags, words):
    """One line that names the flag; nothing is trained."""
    flags = [finished.product if flag == "POLICY" else flag for flag in flags]
    line = refused(*finished.flags, "--out-dir", tmp_path / "run", *flags)
    assert all(word in line for word in words), line
    assert products(tmp_path / "run") == {}


def test_a_policy_without_tokens_has_no_preference(finished, tmp_path, no_evaluation):
    flags = ["--selection", "weighted-sum", "--iterations", 1, "--out-dir", tmp_path / "run"]
    assert finished.call(*flags)[0] == 0
    asked = ["--load", tmp_path / "run" / "policy.pt", "--prompt", "a man walks", "--prefer", "text=1"]
    line = refused(*finished.flags, "--selection", "weighted-sum", "--iterations", 1, *asked, "--out-dir",
                   tmp_path / "out")
    assert "--prefer" in line and "without tokens" in line


def test_a_perception_checkpoint_of_another_kind(finished, tmp_path):
    torch.save({"model_state_dict": {"weight": torch.ones(3)}}, tmp_path / "critic.pth")
    line = refused(*finished.flags, "--perception-checkpoint", tmp_path / "critic.pth", "--out-dir",
                   tmp_path / "run")
    assert "critic.pth" in line


# ---- 3. Faults while running -------------------------------------------------------------------------------


def test_a_reward_that_is_nan(finished, tmp_path, monkeypatch, no_evaluation):
    """It names prompt and reward and never reaches the weights."""
    score, seen = pareto.score, []

    def broken(rewards, batch, iteration):
        seen.append(batch)
        if len(seen) == 4:  # the rival's, in the second iteration
            rewards = rewards._replace(low=torch.tensor([0.0, math.nan, 0.0]))
        return score(rewards, batch, iteration)
    with monkeypatch.context() as patch:
        patch.setattr(pareto, "score", broken)
        code, _, err = finished.call("--out-dir", tmp_path / "run")
    caption = repr(seen[3]["captions"][0])
    assert code == 3 and "Traceback" not in err
    assert "iteration 1: reward quality is nan" in err.splitlines()[-1] and caption in err.splitlines()[-1]
    report = json.loads((tmp_path / "run" / "nan_report.json").read_text())
    assert report["iteration"] == 1 and report["not_finite"] == []
    seen.clear()
    assert finished.checkpoint(tmp_path / "run")["iteration"] == 0
    assert finished.call("--out-dir", tmp_path / "run", "--resume")[0] == 0
    assert finished.is_same(tmp_path / "run")


# ---- 4. What a finished policy is for ----------------------------------------------------------------------


def test_prompts_follow_the_preference(finished, tmp_path):
    """The same command gives the same files, another preference others; a third each is the default."""
    flags = ["--load", finished.product, "--compare"]
    for caption in ("a person walks forward", "someone waves", "a man jumps twice", "a person turns left"):
        flags += ["--prompt", caption]
    made = {}
    for spec in ("", "text=1", "preference=1", "text=0.25,quality=0.25,preference=0.5"):
        asked = ["--prefer", spec] if spec else []
        assert finished.call(*flags, *asked, "--out-dir", tmp_path / f"out {spec}")[0] == 0
        made[spec] = products(tmp_path / f"out {spec}")
        assert set(made[spec]) == {f"prompt{k:02d}{end}" for k in range(4) for end in (
            ".gif", "_before.npy", "_before.bvh", "_after.npy", "_after.bvh")}
    before, after = ({spec: [files[f"prompt{k:02d}_{title}.npy"] for k in range(4)]
                      for spec, files in made.items()} for title in ("before", "after"))
    assert all(motions == before[""] for motions in before.values())
    assert after["text=1"] != after["preference=1"], "tokens change what is sampled"
    assert finished.call(*flags, "--prefer", "text=1", "--out-dir", tmp_path / "out text=1")[0] == 0
    assert products(tmp_path / "out text=1") == made["text=1"]


def test_a_published_critic_takes_the_place_of_ours(finished, tmp_path, no_evaluation):
    """Of the published architecture, with random weights: g is trained for it, and its score is a reward."""
    net = motion_critic.MotionCritic(3, 25, 8, 4, 2, 16, 8, 1, 60)
    training.initialise(net, generator(0, 0, "critic"))
    torch.save({"model_state_dict": net.state_dict()}, tmp_path / "critic.pth")
    flags = ["--perception-checkpoint", tmp_path / "critic.pth", "--iterations", 1, "--no-rival"]
    code, out, err = finished.call(*flags, "--out-dir", tmp_path / "run")
    assert code == 0, err
    about = json.loads((tmp_path / "run" / "args.json").read_text())
    assert about["parts"]["perception"]["degrees"] > 0 and "degrees" in out


# ---- 5. Several processes ----------------------------------------------------------------------------------


def test_two_processes_equal_one(finished, tmp_path, no_evaluation):
    """The same samples and rewards, and gradients that add up to those of one process."""
    flags = ["--iterations", "2", "--lr", "2e-5"]  # Adam blows rounding up, to lr at most
    assert finished.call(*flags, "--out-dir", tmp_path / "one")[0] == 0
    helpers.two_processes(pareto, [*finished.flags, *flags, "--out-dir", tmp_path / "two"], tmp_path)
    one, two = log_rows(tmp_path / "one"), log_rows(tmp_path / "two")
    for name in ("iteration", *pareto.REWARDS, "own", "kept", "rival_text"):
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-5, err_msg=name)
    a, b = (finished.stored(tmp_path / name) for name in ("one", "two"))
    for network in ("gpt", "rival"):
        for name in a[network]:
            torch.testing.assert_close(b[network][name], a[network][name], rtol=0, atol=1e-5)
    for name in ("pg_loss", "vf_loss", "approx_kl", "grad_norm", "kl_ref", "entropy", "length"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-2, atol=1e-6, err_msg=name)
