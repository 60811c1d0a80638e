"""End to end, what is particular to ppo_motion.py; what all scripts share is in test_run_all.py."""
import functools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ppo_motion as ppo
from common import compose, datasets, features, render, runs, tokenizer, training
from common.published import t2m_gpt
from tests import reference, run_helpers as helpers
from tests.run_helpers import all_finite, equal, log_rows, products

parse, call, refused = (functools.partial(f, ppo) for f in (helpers.parse, helpers.call, helpers.refused))

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def finished(finished_run):
    return finished_run("ppo")


def policy_of(path):
    return runs.load_checkpoint(path, kind="ppo-policy")


def load_policy(args, stored):
    return ppo.load_policy(args, stored, torch.device("cpu"))


def weights_of(stored, name):
    return stored[name]["weights"]


def part_of(checkpoint, name):
    """Weights of the GPT or of the critic in the state of a run."""
    return {key.removeprefix(f"{name}."): value for key, value in checkpoint["networks"].items()
            if key.startswith(f"{name}.")}


def checkpoint_of(folder):
    return runs.load_checkpoint(folder / "checkpoint.pt", kind="ppo-run")


# ---- 1. What a run leaves behind ---------------------------------------------------------------------------


def test_log_has_a_row_an_iteration(finished):
    log, policy, checkpoint = log_rows(finished.folder), policy_of(finished.product), checkpoint_of(
        finished.folder)
    assert list(log) == list(ppo.FIELDS) and log["iteration"].tolist() == [0, 1, 2, 3]
    for name in ppo.FIELDS:
        wanted = [False, True, False, True] if name.startswith("val_") else [True] * 4
        assert np.isfinite(log[name]).tolist() == wanted, name
    assert log["first_ratio_error"].tolist() == [0, 0, 0, 0]
    assert log["kl_ref"][0] == 0 and (log["kl_ref"][1:] != 0).all(), "the policy starts as its reference"
    assert (log["grad_norm"] > 0).all() and (log["vf_grad_norm"] > 0).all() and (log["approx_kl"] > 0).all()
    np.testing.assert_allclose(log["text_term"] + log["motion_term"], log["reward"], atol=1e-5)
    assert checkpoint["iteration"] == 3 and equal(part_of(checkpoint, "gpt"), weights_of(policy, "gpt"))
    gpt, start = (weights_of(policy, name) for name in ("gpt", "reference"))
    still = [name for name, value in gpt.items() if torch.equal(value, start[name])]
    assert still == [] and all_finite(gpt) and all_finite(part_of(checkpoint, "critic"))


def test_results_say_where_they_come_from(finished):
    results = finished.results
    assert results["data"] == {"source": "embedded kit", "target": "embedded kit"}
    assert {"supervised model", "rollout", "reward", "update", "evaluation"} <= set(
        results["seconds"])
    assert set(results["parts"]) == {"reward", "judge", "policy"}
    assert set(results["parts"]["policy"]) == {"tokenizer", "gpt"}
    counted = results["composed_captions"]
    assert counted["val"] + counted["test"] == counted["retained"] > 0
    assert set(results["fingerprints"]) == {"source", "target"}
    for table in ("paired_val", "paired_test"):
        vq, base = (results[table][row] for row in ("vq", "base"))
        assert vq["fid"][0] > 1e-3 and "length_error" not in vq
        assert base["length_error"][0] > 0, "the policy chooses its own lengths"
    assert 0 < counted["train"] + counted["retained"] <= counted["prompts"] <= 100
    assert checkpoint_of(finished.folder)["scale"] > 0


def test_what_is_not_trained_stays_as_it_was(finished):
    """Tokenizer, reference and text encoder in policy.pt are those that were cached before training."""
    policy = policy_of(finished.product)
    tokens, gpt = (runs.load_checkpoint(next(finished.cache.glob(f"{name}-*.pt")), kind=f"cache {name}")
                   for name in ("tokenizer", "gpt"))
    vq, text, tuned, start = (weights_of(policy, name) for name in ("vq", "text", "gpt", "reference"))
    assert equal(vq, tokens["model"]) and equal(text, gpt["text"])
    assert equal(start, gpt["gpt"]) and not equal(tuned, gpt["gpt"])


def test_composed_captions_for_a_reader(finished, tmp_path):
    """--write-captions: two files as the data sets have them; nothing is trained, no run folder is made."""
    code, out, _ = call(*finished.flags, "--cache-dir", tmp_path / "cache", "--out-dir", tmp_path / "run",
                        "--write-captions", tmp_path / "new.txt")
    assert code == 0 and not (tmp_path / "run").exists()
    cached = [path.name for path in (tmp_path / "cache").iterdir() if path.suffix == ".pt"]
    assert [name for name in cached if not name.startswith("embedded-")] == []
    lines = [(tmp_path / name).read_text().splitlines() for name in ("new.txt", "new_retained.txt")]
    counted = finished.results["composed_captions"]
    assert [len(part) for part in lines] == [counted["train"], counted["retained"]] and str(counted) in out
    for line in lines[0] + lines[1]:
        caption, tokens, start, end = line.split("#")
        assert (start, end) == ("0.0", "0.0") and caption.strip() == caption != ""
        assert all(re.fullmatch(r"[a-z0-9]+/[A-Z]+", token) for token in tokens.split(" ")), line
        assert len(tokens.split()) == len(caption.split()), line
    assert not set(lines[0]) & set(lines[1]) and len(set(lines[0])) == len(lines[0])


# ---- 2. The user's mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--minibatches", 3], ["--minibatches"]), (["--minibatches", 0], ["--minibatches"]),
    (["--minibatches", 16, "--kept-samples", 24], ["--minibatches", "24 motions"]),
    (["--text-only-share", 2], ["--text-only-share", "0 to 1"]),
    (["--text-only-share", 1, "--lambda-t", 0], ["--lambda-t", "above 0"]),
    (["--composed", 0], ["--composed"]), (["--composed", 1], ["too few captions", "--composed"]),
    (["--kept-samples", 33], ["--kept-samples", "32"]), (["--prompts", 1], ["--prompts"]),
    (["--lambda-t", 0, "--lambda-m", 0], ["--lambda-t"]), (["--lambda-t", -1], ["--lambda-t"]),
    (["--temperature", 0], ["--temperature"]),
    (["--gpt-checkpoint", "gpt.pth"], ["--vq-checkpoint"]),
    (["--vq-checkpoint", "vq.pth"], ["--vq-statistics"]),
    (["--vq-checkpoint", "absent.pth", "--vq-statistics", "."], ["absent.pth", "no such file"]),
    (["--load", "POLICY"], ["--load", "--prompt", "--eval-only"]),
    (["--load", "absent.pt", "--eval-only"], ["absent.pt", "no such file"]),
    (["--prompt", "a man walks"], ["--load"]), (["--eval-only"], ["--load"]),
    (["--prompt", "", "--load", "POLICY"], ["--prompt", "empty"]),
    (["--prompt", "a man walks", "--prompt", " ", "--load", "POLICY"], ["--prompt", "empty"]),
    (["--write-captions", "absent/new.txt"], ["absent", "no such folder"]),
    (["--dataset", "absent"], ["absent", "no such folder"]), (["--data-root", "absent"], ["--data-root"]),
    (["--resume"], ["nothing to resume"]), (["--iterations", 0], ["--iterations"]),
    (["--lr", "nan"], ["--lr"]), (["--micro-batch", -1], ["--micro-batch"]),
    (["--device", "tpu"], ["--device tpu"])], ids=lambda value: "_".join(map(str, value)))
def test_wrong_flags(finished, tmp_path, flags, words):
    """One line that names the flag; nothing is written, and nothing trained that was not in the cache."""
    flags = [finished.product if flag == "POLICY" else flag for flag in flags]
    cached = set(products(finished.cache))
    line = refused(*finished.flags, "--out-dir", tmp_path / "run", *flags)
    assert all(word in line for word in words), line
    assert products(tmp_path / "run") == {}
    assert {name for name in products(finished.cache) if name.endswith(".pt")} <= cached


@pytest.mark.parametrize("flags, words", [
    (["--lr", "0.001", "--clip-range", "0.1"],
     ["lr was 0.005 and is 0.001", "clip_range was 0.2 and is 0.1"]),
    (["--critic", "separate"], ["critic was 'shared-detach' and is 'separate'"]),
    ([], ["starts from was"])])
def test_resume_with_other_arguments(finished, tmp_path, monkeypatch, flags, words):
    """Or, without other flags, from a supervised GPT that was trained longer."""
    if not flags:
        monkeypatch.setitem(helpers.LITTLE_TOKENS, "gpt_iterations", 21)
    shutil.copytree(finished.folder, tmp_path / "run")
    shutil.copytree(finished.cache, tmp_path / "cache")
    before = products(tmp_path / "run")
    code, _, err = call(*finished.flags, "--out-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache",
                        "--resume", *flags)
    line = err.splitlines()[-1]  # before it, where a base of other arguments was trained, its progress
    assert code == 2 and line.startswith("error: ") and "Traceback" not in err
    assert all(word in line for word in words) and "checkpoint.pt" in line and "width" not in line
    assert products(tmp_path / "run") == before


@pytest.mark.parametrize("mode", (["--eval-only"], ["--prompt", "a man walks"]))
@pytest.mark.parametrize("flags, words", [
    (["--lr", 1, "--critic", "shared"],
     "critic was 'shared-detach' and is 'shared', lr was 0.005 and is 1.0"),
    (["--dataset", "humanml3d"], "dataset was 'kit' and is 'humanml3d'")])
def test_flags_that_contradict_the_policy(finished, tmp_path, mode, flags, words):
    """The arguments of its run hold; a flag that says otherwise must not be ignored in silence."""
    line = refused(*finished.flags, *mode, "--load", finished.product, "--out-dir", tmp_path / "run", *flags)
    assert words in line and products(tmp_path / "run") == {}


def published_files(finished, folder, keep=lambda caption: True):
    """The finished run's own networks as T2M-GPT publishes them, the text as vectors of the captions that
    `keep` chooses -> flags, captions."""
    args, stored = parse(*finished.flags), policy_of(finished.product)
    policy = load_policy(args, stored)
    with helpers.smaller():
        clips = tokenizer.SIZES["tiny"].clips
    data = datasets.load_dataset("kit", space="native", clips=clips, seed=0, data_root=args.data_root,
                                 cache_dir=args.cache_dir)
    sets, _ = compose.composed_sets(data, args.composed, seed=0)
    clips = [clip for part in (data.splits | sets).values() for clip in part]
    captions = [c for c in sorted({c for clip in clips for c in clip.captions}) if keep(c)]
    with torch.no_grad():
        np.savez(folder / "text.npz", captions=captions, vectors=policy.text(captions).numpy())
    weights = weights_of(stored, "vq")
    vq = {name: value for name, value in weights.items() if name not in ("mean", "std")}
    torch.save({"net": vq}, folder / "vq.pth")
    torch.save({"trans": weights_of(stored, "reference")}, folder / "gpt.pth")
    np.save(folder / "Mean.npy", weights["mean"].numpy())
    np.save(folder / "Std.npy", weights["std"].numpy())
    return ["--vq-checkpoint", folder / "vq.pth", "--vq-statistics", folder, "--gpt-checkpoint",
            folder / "gpt.pth", "--text-features", folder / "text.npz"], captions


def test_published_weights_go_all_the_way(finished, tmp_path, no_evaluation):
    """And the policy that comes of them asks for its text features again."""
    flags, captions = published_files(finished, tmp_path)
    flags = [*finished.flags, *flags]
    assert call(*flags, "--iterations", 1, "--out-dir", tmp_path / "run")[0] == 0
    mine, other = policy_of(tmp_path / "run" / "policy.pt"), policy_of(finished.product)
    assert all(equal(weights_of(mine, name), weights_of(other, name)) for name in ("vq", "reference"))
    assert mine["text"] == {} and mine["gpt"]["sizes"]["block_size"] == t2m_gpt.PUBLISHED_BLOCK
    assert not equal(weights_of(mine, "gpt"), weights_of(mine, "reference"))
    flags = [*helpers.SMALL["ppo"].flags.split(), "--iterations", 1, "--load", tmp_path / "run" / "policy.pt"]
    flags += ["--out-dir", tmp_path / "out"]
    line = refused(*flags, "--prompt", "nobody has ever said this")
    assert "text.npz" in line and "'nobody has ever said this'" in line
    assert call(*flags, "--prompt", captions[0])[0] == 0
    assert set(products(tmp_path / "out")) == {"prompt00.gif", "prompt00_after.npy", "prompt00_after.bvh"}


def test_text_features_without_a_caption(finished, tmp_path):
    """Vectors of the data set's captions only: the first rollout asks for composed ones."""
    composed = set()
    with pytest.MonkeyPatch.context() as patch:
        sets_of = compose.composed_sets

        def noted(*args, **options):
            sets, counted = sets_of(*args, **options)
            composed.update(clip.captions[0] for clips in sets.values() for clip in clips)
            return sets, counted
        patch.setattr(compose, "composed_sets", noted)
        flags, captions = published_files(finished, tmp_path, lambda caption: caption not in composed)
    line = refused(*finished.flags, *flags, "--out-dir", tmp_path / "run")
    assert "text.npz: holds no vector for" in line
    assert captions and re.search("'(.+)'", line)[1] in composed
    assert not (tmp_path / "run" / "policy.pt").exists()


# ---- 3. Faults while running -------------------------------------------------------------------------------


def spoil_reward(monkeypatch, iteration):
    """The reward of sample 5 of that iteration is NaN -> list that the captions asked about are added to."""
    score, reward, asked = ppo.score, ppo.motion_reward, []

    def listen(args, measure, batch, iteration):
        asked.append(batch["captions"])
        return score(args, measure, batch, iteration)

    def broken(*args):
        r, pseudo = reward(*args)
        if len(asked) == iteration + 2:  # the first gives the reward its scale
            r[5] = math.nan
        return r, pseudo

    monkeypatch.setattr(ppo, "score", listen)
    monkeypatch.setattr(ppo, "motion_reward", broken)
    return asked


def test_a_reward_that_is_nan(finished, tmp_path, monkeypatch, no_evaluation):
    """It never reaches the weights; the run goes on later as if nothing had been."""
    updates, update = [], ppo.update
    with monkeypatch.context() as patch:
        asked = spoil_reward(patch, 2)
        patch.setattr(ppo, "update", lambda *args: updates.append(1) or update(*args))
        code, _, err = call(*finished.flags, "--out-dir", tmp_path / "run")
    assert code == 3 and "Traceback" not in err and len(updates) == 2
    last = err.splitlines()[-1]
    assert "iteration 2: reward nan" in last and repr(asked[3][5]) in last
    state = checkpoint_of(tmp_path / "run")
    assert state["iteration"] == 1 and all_finite(state["networks"])
    assert log_rows(tmp_path / "run")["iteration"].tolist() == [0, 1]
    assert not (tmp_path / "run" / "policy.pt").exists()
    assert call(*finished.flags, "--out-dir", tmp_path / "run", "--resume")[0] == 0
    assert finished.is_same(tmp_path / "run")


def test_a_reward_that_is_nan_leaves_a_report(finished, tmp_path, monkeypatch, no_evaluation):
    spoil_reward(monkeypatch, 0)
    assert call(*finished.flags, "--out-dir", tmp_path / "run")[0] == 3
    report = json.loads((tmp_path / "run" / "nan_report.json").read_text())
    assert report["iteration"] == 0 and "reward nan" in report["error"] and report["not_finite"] == []


@pytest.mark.parametrize("place, name", [(0, "gpt.trans_base.tok_emb.weight"), (-1, "critic.value.bias")])
def test_a_gradient_that_is_infinite(finished, tmp_path, monkeypatch, no_evaluation, place, name):
    """No optimizer step is taken, the checkpoint before it stays, and the report names the weight."""
    steps, step, reduce = [], torch.optim.AdamW.step, training.all_reduce_grads

    def poisoned(parameters):
        reduce(parameters)
        if len(steps) == 6:  # the third minibatch of iteration 1
            parameters[place].grad.view(-1)[0] = math.inf

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self, *args: steps.append(1) or step(self, *args))
        patch.setattr(training, "all_reduce_grads", poisoned)
        code, _, err = call(*finished.flags, "--out-dir", tmp_path / "run", "--reward", "random")
    norm = "gradient norm inf"
    assert code == 3 and f"iteration 1: {norm}" in err.splitlines()[-1] and len(steps) == 6
    state = checkpoint_of(tmp_path / "run")
    assert state["iteration"] == 0 and all_finite(state["networks"])
    report = json.loads((tmp_path / "run" / "nan_report.json").read_text())
    assert report["iteration"] == 1 and math.isfinite(report["rewards"]["mean"]) and norm in report["error"]
    assert len(report["not_finite"]) == 1 and report["not_finite"][0].startswith("gradient ")
    assert report["not_finite"][0].endswith(name)


# ---- 4. What a finished policy is for ----------------------------------------------------------------------


def test_prompts_become_files(finished, tmp_path, monkeypatch):
    """Each motion is as long as its policy wants; the same command gives the same files."""
    captions = ["a person walks forward", "A person waves, twice!", "someone turns left"]
    flags = [*finished.flags, "--load", finished.product, "--compare", "--out-dir", tmp_path / "out"]
    for caption in captions:
        flags += ["--prompt", caption]
    code, out, _ = call(*flags)
    names = {f"prompt{k:02d}_{title}.{kind}"
             for k in range(3) for title in ("before", "after") for kind in ("npy", "bvh")}
    assert code == 0 and set(products(tmp_path / "out")) == names | {f"prompt{k:02d}.gif" for k in range(3)}
    assert all(caption in out for caption in captions)

    policy = load_policy(parse(*finished.flags), policy_of(finished.product))
    lengths = []
    for title, gpt in (("before", policy.reference), ("after", policy.gpt)):
        mine = policy._replace(gpt=gpt)
        *_, tokens = ppo.sample(mine, policy.text(captions), 0, 0, "prompt", range(3), 1.0)
        for k, row in enumerate(tokens.tolist()):
            row = row[: row.index(gpt.end)] if gpt.end in row else row
            joints = np.load(tmp_path / "out" / f"prompt{k:02d}_{title}.npy")
            assert joints.shape == (len(row) * 2**policy.vq.halvings, 21, 3) and np.isfinite(joints).all()
            bvh = reference.read_bvh(tmp_path / "out" / f"prompt{k:02d}_{title}.bvh", features.KIT)
            assert bvh.shape == joints.shape
            lengths.append(len(row))
    limit = policy.gpt.block_size - 1
    assert min(lengths) >= policy.vq.shortest and max(lengths) <= limit
    assert len(set(lengths)) > 1 and min(lengths) < limit, "some have said the end"
    for k in range(3):
        with Image.open(tmp_path / "out" / f"prompt{k:02d}.gif") as gif:
            assert gif.n_frames == 2**policy.vq.halvings * max(lengths[k], lengths[3 + k])

    before = products(tmp_path / "out")
    assert before["prompt00_before.npy"] != before["prompt00_after.npy"] != before["prompt01_after.npy"]
    refused(*flags, "--lr", 1)
    assert products(tmp_path / "out") == before, "a refused call deletes nothing"
    drawn = []  # that a GIF repeats itself to the byte is seen in test_run_ddpo.py
    monkeypatch.setattr(render, "render_gif", lambda path, *more: drawn.append(path.name))
    assert call(*flags)[0] == 0, "the same command can be given again"
    again = products(tmp_path / "out")
    assert drawn == [f"prompt{k:02d}.gif" for k in range(3)] and names <= set(again) <= set(before)
    assert all(again[name] == before[name] for name in again)


@pytest.mark.parametrize("logit, frames", [(-50.0, None), (50.0, 4)])
def test_the_end_token_decides_the_length(finished, tmp_path, logit, frames):
    """Without an end a motion goes on to the limit; one that ends at once has the four frames that a motion
    needs at least."""
    path, data = tmp_path / "policy.pt", policy_of(finished.product)
    head = {name: weights_of(data, "gpt")[f"trans_head.{name}"].zero_()
            for name in ("ln_f.weight", "ln_f.bias", "head.weight")}
    head["ln_f.bias"][0], head["head.weight"][-1, 0] = 1.0, logit  # the same logits in every state
    runs.save_checkpoint(path, data, kind="ppo-policy")
    flags = ["--prompt", "a person walks", "--load", path, "--out-dir", tmp_path / "out"]
    assert call(*finished.flags, *flags)[0] == 0
    joints = np.load(tmp_path / "out" / "prompt00_after.npy")
    limit = data["gpt"]["sizes"]["block_size"] - 1
    assert len(joints) == (frames or 2 * limit) and np.isfinite(joints).all()


# ---- 5. Controls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ("shuffled", "random"))
def test_controls_run(finished, tmp_path, no_evaluation, reward):
    """What is learnt is not what the real reward teaches, from the first iteration on."""
    code, *_ = call(*finished.flags, "--reward", reward, "--out-dir", tmp_path / "run")
    assert code == 0
    mine, run = log_rows(tmp_path / "run"), log_rows(finished.folder)
    assert (np.abs(mine["reward"] - run["reward"]) > 1e-3).all()
    assert (mine["first_ratio_error"] == 0).all() and (mine["grad_norm"] > 0).all()
    policy, other = policy_of(tmp_path / "run" / "policy.pt"), policy_of(finished.product)
    mine, tuned = weights_of(policy, "gpt"), weights_of(other, "gpt")
    assert all_finite(mine) and not equal(mine, tuned)
    assert all(equal(policy[name], other[name]) for name in ("reference", "vq", "text"))


def test_every_kind_of_critic_runs(finished, tmp_path, no_evaluation):
    """All start at V = 0, so the first rollout has the same advantages: what a critic that is detached, or a
    copy of its own, learns from it leaves the policy as it is; a shared one bends it."""
    made, states = {}, {}
    for kind in ("shared-detach", "separate", "shared"):
        flags = ["--critic", kind, "--iterations", 1, "--out-dir", tmp_path / kind]
        assert call(*finished.flags, *flags)[0] == 0
        made[kind], states[kind] = policy_of(tmp_path / kind / "policy.pt"), checkpoint_of(tmp_path / kind)
        assert all_finite(weights_of(made[kind], "gpt"))
        assert states[kind]["networks"]["critic.value.weight"].abs().max() > 0
        assert equal(made[kind]["reference"], made["shared-detach"]["reference"])
    assert equal(made["separate"]["gpt"], made["shared-detach"]["gpt"])
    assert not equal(made["shared"]["gpt"], made["shared-detach"]["gpt"])
    trunk = part_of(states["separate"], "critic.trunk")
    start = weights_of(made["separate"], "reference")
    assert trunk.keys() == start.keys() and not equal(trunk, start)


def test_without_a_learning_rate_nothing_is_learnt(finished, tmp_path, no_evaluation):
    """Only the critic, which has a rate of its own."""
    code, *_ = call(*finished.flags, "--lr", 0, "--iterations", 2, "--out-dir", tmp_path / "run")
    policy, log = policy_of(tmp_path / "run" / "policy.pt"), log_rows(tmp_path / "run")
    assert code == 0 and equal(policy["gpt"], policy["reference"])
    assert log["kl_ref"].tolist() == log["clipfrac"].tolist() == [0, 0] and (log["grad_norm"] > 0).all()
    assert checkpoint_of(tmp_path / "run")["networks"]["critic.value.weight"].abs().max() > 0


PAPER = ("--dataset humanml3d --text-only-share 0 --iterations 40000 --prompts 128 "
         "--samples 1 --kept-samples 0 --lr 5e-6").split()
TABLE_3 = {  # flags -> lambda_t, lambda_m, critic, epochs, updates of an epoch
    "--lambda-t 2.0 --lambda-m 0": (2.0, 0.0, "shared-detach", 2, 1),
    "--lambda-t 0 --lambda-m 2.0": (0.0, 2.0, "shared-detach", 2, 1), "": (0.4, 2.0, "shared-detach", 2, 1),
    "--lambda-t 0.2": (0.2, 2.0, "shared-detach", 2, 1), "--lambda-t 0.1": (0.1, 2.0, "shared-detach", 2, 1),
    "--critic separate": (0.4, 2.0, "separate", 2, 1), "--critic shared": (0.4, 2.0, "shared", 2, 1),
    "--epochs 1": (0.4, 2.0, "shared-detach", 1, 1),
    "--epochs 1 --minibatches 2": (0.4, 2.0, "shared-detach", 1, 2),
    "--minibatches 2": (0.4, 2.0, "shared-detach", 2, 2)}


@pytest.mark.parametrize("row", TABLE_3)
def test_each_row_of_the_papers_ablations_is_a_command(row):
    """InstructMotion Table 3, at the paper's batch and at the size of this project; the row without flags is
    the paper's choice and the default."""
    for size in (PAPER, []):
        args = parse(*size, *row.split())
        ppo.check_args(args)
        numbers = args.lambda_t, args.lambda_m, args.critic, args.epochs, args.minibatches
        assert numbers == TABLE_3[row]
    assert len(set(TABLE_3.values())) == 10


# ---- 6. Several processes ----------------------------------------------------------------------------------


def test_two_processes_equal_one(finished, tmp_path, no_evaluation):
    """The same samples and rewards, and gradients that add up to those of one process."""
    flags = [*finished.flags, "--iterations", "2"]
    flags += ["--lr", "2e-4"]  # Adam blows rounding up, to lr at most
    assert call(*flags, "--out-dir", tmp_path / "one")[0] == 0
    helpers.two_processes(ppo, [*flags, "--out-dir", tmp_path / "two"])
    one, two = log_rows(tmp_path / "one"), log_rows(tmp_path / "two")
    for name in ("iteration", "reward", "text_term", "motion_term", "pseudo_score", "val_reward"):
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-6, err_msg=name)
    a, b = (policy_of(tmp_path / name / "policy.pt") for name in ("one", "two"))
    ours, theirs = weights_of(a, "gpt"), weights_of(b, "gpt")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-5, msg=name)
    assert not equal(a["gpt"], a["reference"])
    assert all(equal(a[name], b[name]) for name in ("reference", "vq", "text"))
    # figures of the update are those of all samples, not of the share of one process
    for name in ("pg_loss", "vf_loss", "approx_kl", "grad_norm", "vf_grad_norm", "kl_ref", "entropy",
                 "length", "truncated", "distinct", "explained_variance"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-2, atol=1e-6, err_msg=name)
