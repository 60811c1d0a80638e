"""End to end, what is particular to pareto_motion.py; what all scripts share is in test_run_all.py."""
import functools
import json
import math

import numpy as np
import pytest
import torch

import pareto_motion as pareto
from common import generator, render, runs, training
from common.published import motion_critic
from tests import run_helpers as helpers
from tests.run_helpers import all_finite, equal, log_rows, products

parse, call, refused = (functools.partial(f, pareto) for f in (helpers.parse, helpers.call, helpers.refused))

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def finished(finished_run):
    return finished_run("pareto")


# ---- 1. What a run leaves behind ---------------------------------------------------------------------------


def weights_of(stored, name):
    return stored[name]["weights"]


def test_log_has_a_row_an_iteration(finished):
    log, stored = log_rows(finished.folder), finished.stored(finished.folder)
    checkpoint = finished.checkpoint(finished.folder)
    assert list(log) == list(pareto.FIELDS) and log["iteration"].tolist() == [0, 1, 2, 3]
    for name in pareto.FIELDS:
        wanted = [False, True, False, True] if name.startswith("val_") else [True] * 4
        assert np.isfinite(log[name]).tolist() == wanted, name
    assert log["first_ratio_error"].tolist() == [0, 0, 0, 0] and (log["grad_norm"] > 0).all()
    assert ((0 < log["kept"]) & (log["kept"] <= 1)).all()
    # it begins as the reference, which reads no token
    assert log["kl_ref"][0] == 0 and (log["kl_ref"][1:] > 0).all()
    trained = {name.removeprefix("gpt."): value for name, value in checkpoint["networks"].items()
               if name.startswith("gpt.")}
    gpt, reference = (weights_of(stored, name) for name in ("gpt", "reference"))
    assert equal(trained, gpt) and all_finite(gpt)
    assert [name for name, value in gpt.items() if torch.equal(value, reference[name])] == []


def test_results_have_every_token_and_reward(finished):
    results = finished.results
    assert "curves.png" in products(finished.folder)
    assert "never trained on: warp" in finished.out
    assert set(results["parts"]) == {"reward", "reward 2", "judge", "policy", "perception"}
    assert set(results["parts"]["policy"]) == {"tokenizer", "gpt"}
    assert all(high > low for low, high in zip(results["rewards"]["low"], results["rewards"]["high"]))
    for name in pareto.REWARDS:
        assert set(pareto.REWARDS) <= set(results["paired_test"][f"token {name}"])
    for table in ("paired_val", "paired_test"):
        assert results[table]["gt"]["quality"][0] >= results[table]["base"]["quality"][0], "the real motion"
        assert results[table]["base"]["speed"][0] > 0 and "preference" in results[table]["gain"]


def test_normaliser_and_tokens_stay_as_they_were(finished):
    """Those of policy.pt are those of a run that trains nothing."""
    stored = finished.stored(finished.folder)
    assert stored["tokens"].shape == (3, 35) and equal(
        {name: value.tolist() for name, value in stored["rewards"].items()}, finished.results["rewards"])


@pytest.mark.parametrize("flags", (["--selection", "union"], ["--selection", "literal"],
                                   ["--selection", "none"], ["--selection", "weighted-sum"],
                                   ["--selection", "weighted-sum", "--weights", "preference=1"],
                                   ["--token-reward", "mean"], ["--reduction", "token"],
                                   ["--baseline", "kept", "--minibatches", 1],
                                   ["--alpha", 0], ["--temperature", 1.5]),
                         ids=lambda flags: " ".join(map(str, flags)))
def test_every_choice_runs_and_matters(finished, tmp_path, flags, no_evaluation):
    assert finished.call(*flags, "--iterations", 2, "--out-dir", tmp_path / "run")[0] == 0
    mine, run = finished.stored(tmp_path / "run"), finished.stored(finished.folder)
    assert all_finite(weights_of(mine, "gpt")) and not equal(mine["gpt"], run["gpt"])
    assert (log_rows(tmp_path / "run")["first_ratio_error"] == 0).all()
    ours, theirs = (weights_of(stored, "reference") for stored in (mine, run))
    if mine["tokens"] is None:  # then the reference has no dimensions for them either
        name = "trans_base.cond_emb.weight"
        assert ours[name].shape == (32, 32) and theirs[name].shape == (32, 35)
        theirs[name] = theirs[name][:, :32]
    assert equal(ours, theirs)


def test_the_weighted_sum_has_no_rows_of_tokens(finished, tmp_path, no_pictures):
    flags = ["--selection", "weighted-sum", "--weights", "text=1", "--iterations", 1, "--eval-repeats", 1]
    assert finished.call(*flags, "--out-dir", tmp_path / "run")[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
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
    (["--prompts", 0], ["--prompts"]), (["--samples", 1], ["--samples"]),
    (["--minibatches", 5], ["--minibatches", "24 motions"]),
    (["--baseline", "kept"], ["--minibatches", "some are kept"]),
    (["--gpt-checkpoint", "gpt.pth"], ["--vq-checkpoint"]),
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
        if len(seen) == 2:
            def wrong(*asked):
                return rewards(*asked) * torch.tensor([1.0, math.nan, 1.0])
            return score(wrong, batch, iteration)
        return score(rewards, batch, iteration)
    with monkeypatch.context() as patch:
        patch.setattr(pareto, "score", broken)
        code, _, err = finished.call("--out-dir", tmp_path / "run")
    caption = repr(seen[1]["captions"][0])
    assert code == 3 and "Traceback" not in err
    assert "iteration 1: reward quality nan" in err.splitlines()[-1] and caption in err.splitlines()[-1]
    report = json.loads((tmp_path / "run" / "nan_report.json").read_text())
    assert report["iteration"] == 1 and report["not_finite"] == []
    assert finished.checkpoint(tmp_path / "run")["iteration"] == 0
    assert finished.call("--out-dir", tmp_path / "run", "--resume")[0] == 0
    assert finished.is_same(tmp_path / "run")


# ---- 4. What a finished policy is for ----------------------------------------------------------------------


def test_prompts_follow_the_preference(finished, tmp_path, monkeypatch):
    """The same command gives the same files, another preference others; a third each is the default."""
    monkeypatch.setattr(render, "render_gif", lambda path, *more: path.write_bytes(b"%d" % len(more[0])))
    path, data = tmp_path / "policy.pt", finished.stored(finished.folder)
    reads = weights_of(data, "gpt")["trans_base.cond_emb.weight"]  # four iterations teach it little of tokens
    reads[:, -3:] = torch.randn(len(reads), 3, generator=generator(0, 0, "test"))
    runs.save_checkpoint(path, data, kind="pareto-policy")
    captions = "a person walks forward", "someone waves", "a person turns left"
    flags = ["--load", path, "--compare"]
    for caption in captions:
        flags += ["--prompt", caption]
    made = {}
    for spec in ("", "text=1", "preference=1", "text=0.25,quality=0.25,preference=0.5"):
        asked = ["--prefer", spec] if spec else []
        assert finished.call(*flags, *asked, "--out-dir", tmp_path / f"out {spec}")[0] == 0
        made[spec] = products(tmp_path / f"out {spec}")
        assert set(made[spec]) == {f"prompt{k:02d}{end}" for k in range(len(captions)) for end in (
            ".gif", "_before.npy", "_before.bvh", "_after.npy", "_after.bvh")}
        assert made[spec]["prompt00.gif"] == b"2", "before and after"
    before, after = ({spec: [files[f"prompt{k:02d}_{title}.npy"] for k in range(len(captions))]
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
    flags = ["--perception-checkpoint", tmp_path / "critic.pth", "--iterations", 1]
    code, out, err = finished.call(*flags, "--out-dir", tmp_path / "run")
    assert code == 0, err
    about = json.loads((tmp_path / "run" / "args.json").read_text())
    assert about["parts"]["perception"]["degrees"] > 0 and "degrees" in out


# ---- 5. Several processes ----------------------------------------------------------------------------------


def test_two_processes_equal_one(finished, tmp_path, no_evaluation):
    """The same samples and rewards, and gradients that add up to those of one process."""
    flags = ["--iterations", "2", "--lr", "2e-5"]  # Adam blows rounding up, to lr at most
    assert finished.call(*flags, "--out-dir", tmp_path / "one")[0] == 0
    helpers.two_processes(pareto, [*finished.flags, *flags, "--out-dir", tmp_path / "two"])
    one, two = log_rows(tmp_path / "one"), log_rows(tmp_path / "two")
    for name in ("iteration", *pareto.REWARDS, "own", "kept"):
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-5, err_msg=name)
    a, b = (finished.stored(tmp_path / name) for name in ("one", "two"))
    ours, theirs = (weights_of(stored, "gpt") for stored in (a, b))
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-5)
    for name in ("pg_loss", "vf_loss", "approx_kl", "grad_norm", "kl_ref", "entropy", "length"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-2, atol=1e-6, err_msg=name)
