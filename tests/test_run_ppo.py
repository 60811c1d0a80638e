"""End to end: what `python ppo_motion.py --tiny` leaves behind, how it fails and how it goes on.

One full run fills a cache that all tests share; most of the others call main() in this process.
"""
import functools
import json
import math
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ppo_motion as ppo
from common import datasets, features, prompts, render, runs
from tests import run_helpers as helpers
from tests.run_helpers import METRICS, all_finite, equal, log_rows, products

SMALL = ("--dataset kit --tiny --threads 1 --device cpu --clips 160 --composed 100 --vq-iterations 20 "
         "--gpt-iterations 20 --reward-iterations 15 --iterations 4 --batch-prompts 8 --samples-per-prompt 4 "
         "--kept-samples 16 --minibatch-ratio 0.5 --micro-batch 5 --lr 5e-3 --warmup 2 --eval-every 2 "
         "--eval-repeats 2 --best-of 2").split()
ROWS = {"base", "tuned", "gain"}
TABLES = {"paired_val": ROWS | {"gt", "vq"}, "paired_test": ROWS | {"gt", "vq", "best of 2"},
          "composed_train": ROWS, "composed_val": ROWS, "composed_test": ROWS | {"best of 2"}}
NETWORKS = ("gpt", "reference", "vq", "text")
parse, call, refused = (functools.partial(f, ppo) for f in (helpers.parse, helpers.call, helpers.refused))

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run, started as a user starts it, and the cache that it has filled."""
    here = tmp_path_factory.mktemp("finished_ppo")
    flags = [*SMALL, "--cache-dir", str(here / "cache")]
    out = helpers.start(ppo, [*flags, "--out-dir", "run"], here)
    return SimpleNamespace(folder=here / "run", policy=here / "run" / "policy.pt", flags=flags,
                           cache=here / "cache", out=out,
                           results=json.loads((here / "run" / "results.json").read_text()))


@pytest.fixture
def no_evaluation(monkeypatch, no_pictures):
    monkeypatch.setattr(ppo, "final_tables", lambda *args: {})


def policy_of(path):
    return runs.load_checkpoint(path, kind="ppo-policy")


def checkpoint_of(folder):
    return runs.load_checkpoint(folder / "checkpoint.pt", kind="ppo-run")


def same_run(folder, other):
    """Policies, critics, states of the optimizer and logs of two runs are equal bit for bit."""
    a, b = (policy_of(path / "policy.pt") for path in (folder, other))
    assert all(equal(a[name], b[name]) for name in NETWORKS)
    a, b = checkpoint_of(folder), checkpoint_of(other)
    assert set(a) == {"args", "iteration", "scale", "gpt", "critic", "optimizer"} and equal(a, b)
    assert (folder / "logs.csv").read_bytes() == (other / "logs.csv").read_bytes()
    return True


# ---- 1. What a run leaves behind ---------------------------------------------------------------------------


def test_files_of_a_run(finished):
    wanted = {"args.json", "logs.csv", "curves.png", "results.json", "before_after.gif", "storyboard.png",
              "checkpoint.pt", "policy.pt"}
    assert wanted <= set(products(finished.folder))
    assert not list(finished.folder.glob("*tmp*"))
    for name, kind in (("curves.png", "PNG"), ("storyboard.png", "PNG"), ("before_after.gif", "GIF")):
        with Image.open(finished.folder / name) as picture:
            assert picture.format == kind and getattr(picture, "n_frames", 1) > (2 if kind == "GIF" else 0)
    about = json.loads((finished.folder / "args.json").read_text())
    assert about["args"]["clips"] == 160 and about["args"]["width"] == ppo.TINY["width"]
    assert set(about["versions"]) >= {"python", "torch", "numpy", "commit"}
    assert set(about["fingerprints"]) == {"data"} and about["threads"] == 1
    assert "EMBEDDED" in finished.out


def test_log_has_a_row_an_iteration(finished):
    log, policy, checkpoint = log_rows(finished.folder), policy_of(finished.policy), checkpoint_of(
        finished.folder)
    assert list(log) == list(ppo.LOG_FIELDS) and log["iteration"].tolist() == [0, 1, 2, 3]
    for name in ppo.LOG_FIELDS:
        wanted = [False, True, False, True] if name.startswith("val_") else [True] * 4
        assert np.isfinite(log[name]).tolist() == wanted, name
    assert log["first_ratio_error"].tolist() == [0, 0, 0, 0]
    assert log["kl_ref"][0] == 0 and (log["kl_ref"][1:] != 0).all(), "the policy starts as its reference"
    assert (log["grad_norm"] > 0).all() and (log["vf_grad_norm"] > 0).all() and (log["approx_kl"] > 0).all()
    np.testing.assert_allclose(log["text_term"] + log["motion_term"], log["reward"], atol=1e-5)
    assert checkpoint["iteration"] == 3 and equal(checkpoint["gpt"], policy["gpt"])
    still = [name for name, value in policy["gpt"].items() if torch.equal(value, policy["reference"][name])]
    assert still == [] and all_finite(policy["gpt"]) and all_finite(checkpoint["critic"])


def test_results_say_where_they_come_from(finished):
    results = finished.results
    assert results["data"] == {"source": "embedded kit", "target": "embedded kit"}
    assert results["seed"] == 0 and results["command"].startswith("python ppo_motion.py --dataset kit --tiny")
    assert results["versions"] == runs.versions()
    assert {"tokenizer", "supervised gpt", "rollout", "reward", "update", "evaluation"} <= set(
        results["seconds"])
    assert set(results["parts"]) == {"reward", "judge", "tokenizer", "gpt"}
    counted = results["composed captions"]
    assert counted["val"] + counted["test"] == counted["retained"] > 0
    assert 0 < counted["train"] + counted["retained"] <= counted["prompts"] <= 100
    assert results["reward_scale"] == checkpoint_of(finished.folder)["scale"] > 0


def test_all_motions_of_the_rollouts_are_counted(finished):
    """4 iterations of 8 prompts with 4 motions each."""
    assert finished.results["counts"]["motions"] == 4 * 8 * 4


def test_results_hold_all_tables(finished):
    for table, rows in TABLES.items():
        paired = table.startswith("paired")
        assert set(finished.results[table]) == rows, table
        for row in rows - {"gain"}:
            values = finished.results[table][row]
            known = {"reward", "judge", "oracle", "foot_skate", "jerk"} | set(METRICS if paired else ())
            if row in ("base", "tuned"):
                known |= {"multimodality", "distinct"}
            assert known <= set(values), (table, row)
            for name, (mean, half_width) in values.items():
                assert math.isfinite(mean) and 0 <= half_width < math.inf, (table, row, name)
        gain, base, tuned = (finished.results[table][row]["reward"][0] for row in ("gain", "base", "tuned"))
        assert gain == pytest.approx(tuned - base, abs=1e-6) and gain != 0
        lines = finished.out.partition(f"\n{table.replace('_', ' ')}: ")[2].partition("\n\n")[0].splitlines()
        assert {row.split()[0] for row in rows} <= {line.split()[0] for line in lines[2:] if line}
    for table in ("paired_val", "paired_test"):
        gt, vq, base = (finished.results[table][row] for row in ("gt", "vq", "base"))
        assert gt["fid"][0] < 1e-3 < vq["fid"][0] and "length_error" not in vq
        assert base["length_error"][0] > 0, "the policy chooses its own lengths"
    for table in ("paired_test", "composed_test"):
        best, base = (finished.results[table][row]["reward"][0] for row in ("best of 2", "base"))
        assert best > base
    assert any(finished.results["paired_test"]["tuned"][name][1] > 0 for name in METRICS)


def test_a_second_run_takes_everything_from_the_cache(finished, tmp_path, monkeypatch, no_pictures):
    """And gives the same numbers as the run that built it."""
    asked = helpers.only_cached(monkeypatch)
    code, *_ = call(*finished.flags, "--out-dir", tmp_path / "run")
    assert code == 0 and sorted(asked) == ["gpt", "judge", "reward", "tokenizer"]
    assert same_run(tmp_path / "run", finished.folder)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(results[table] == finished.results[table] for table in TABLES)


def test_what_is_not_trained_stays_as_it_was(finished):
    """Tokenizer, reference and text encoder in policy.pt are those that were cached before training."""
    policy = policy_of(finished.policy)
    tokenizer, gpt = (runs.load_checkpoint(next(finished.cache.glob(f"{name}-*.pt")), kind=f"cache {name}")
                      for name in ("tokenizer", "gpt"))
    assert equal(policy["vq"], tokenizer["model"]) and equal(policy["text"], gpt["text"])
    assert equal(policy["reference"], gpt["gpt"]) and not equal(policy["gpt"], gpt["gpt"])


def test_composed_captions_for_a_reader(finished, tmp_path):
    """--write-prompts: two files as the data sets have them; nothing is trained and no run folder is made."""
    code, out, _ = call(*finished.flags, "--cache-dir", tmp_path / "cache", "--out-dir", tmp_path / "run",
                        "--write-prompts", tmp_path / "new.txt")
    assert code == 0 and not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix == ".pt"] == []
    lines = [(tmp_path / name).read_text().splitlines() for name in ("new.txt", "new_retained.txt")]
    counted = finished.results["composed captions"]
    assert [len(part) for part in lines] == [counted["train"], counted["retained"]] and str(counted) in out
    for line in lines[0] + lines[1]:
        caption, tokens, start, end = line.split("#")
        assert (start, end) == ("0.0", "0.0") and caption.strip() == caption != ""
        assert all(re.fullmatch(r"[a-z0-9]+/[A-Z]+", token) for token in tokens.split(" ")), line
        assert len(tokens.split()) == len(caption.split()), line
    assert not set(lines[0]) & set(lines[1]) and len(set(lines[0])) == len(lines[0])


# ---- 2. Interrupted and resumed ----------------------------------------------------------------------------


# In an iteration there are one rollout and eight losses: two passes, two minibatches, two micro batches. A
# rollout before the first iteration gives the reward its scale.
@pytest.mark.parametrize("moment, count, number, code, kept", [
    ("collect", 1, signal.SIGTERM, 143, None), ("collect", 4, signal.SIGTERM, 143, 1),
    ("clipped_loss", 20, signal.SIGINT, 130, 1), ("after a checkpoint", 1, signal.SIGTERM, 143, 1),
    ("between log and checkpoint", 1, signal.SIGKILL, -9, 0)])
def test_resumed_equals_uninterrupted(finished, tmp_path, no_evaluation, moment, count, number, code, kept):
    flags = [*finished.flags, "--out-dir", str(tmp_path / "run")]
    child = helpers.interrupted(ppo, flags, moment, count, number)
    assert child.returncode == code and "Traceback" not in child.stderr, child.stderr
    assert code < 0 or child.stderr.splitlines()[-1].endswith("go on with --resume")
    if kept is None:
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
    else:
        assert checkpoint_of(tmp_path / "run")["iteration"] == kept
    assert not (tmp_path / "run" / "policy.pt").exists()
    assert call(*flags, "--resume")[0] == 0 and same_run(tmp_path / "run", finished.folder)


def test_stopped_after_every_iteration(finished, tmp_path, monkeypatch, no_evaluation):
    end = runs.Loop.end

    def stopped(self, row, *rest):
        end(self, row, *rest)
        raise runs.Interrupted(signal.SIGTERM)

    flags = [*finished.flags, "--out-dir", tmp_path / "run", "--resume"]
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(runs.Loop, "end", stopped)
        for iteration in range(4):
            assert call(*flags)[0] == 143 and checkpoint_of(tmp_path / "run")["iteration"] == iteration
    assert call(*flags)[0] == 0 and same_run(tmp_path / "run", finished.folder)


# ---- 3. The user's mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--minibatch-ratio", 0.3], ["--minibatch-ratio"]), (["--minibatch-ratio", 0], ["--minibatch-ratio"]),
    (["--minibatch-ratio", 2], ["--minibatch-ratio"]),
    (["--minibatch-ratio", 0.0625, "--kept-samples", 24], ["--minibatch-ratio", "24 motions"]),
    (["--text-only-share", 2], ["--text-only-share", "0 to 1"]),
    (["--text-only-share", 1, "--lambda-t", 0], ["--lambda-t", "above 0"]),
    (["--composed", 0], ["--composed", "--text-only-share 0"]),
    (["--kept-samples", 33], ["--kept-samples", "32"]), (["--batch-prompts", 1], ["--batch-prompts"]),
    (["--width", 33, "--heads", 3], ["--width", "even"]), (["--width", 34], ["--width", "--heads"]),
    (["--lambda-t", 0, "--lambda-m", 0], ["--lambda-t", "--lambda-m"]), (["--lambda-t", -1], ["--lambda-t"]),
    (["--temperature", 0], ["--temperature"]), (["--three-parts", 2], ["--three-parts"]),
    (["--together", 1.5], ["--together"]), (["--clips", 3], ["3 clips"]),
    (["--gpt-checkpoint", "gpt.pth"], ["--gpt-checkpoint", "--vq-checkpoint"]),
    (["--vq-checkpoint", "vq.pth"], ["--vq-statistics"]),
    (["--vq-checkpoint", "absent.pth", "--vq-statistics", "."], ["absent.pth", "no such file"]),
    (["--load", "POLICY"], ["--load", "--prompt", "--eval-only"]),
    (["--load", "absent.pt", "--eval-only"], ["absent.pt", "no such file"]),
    (["--prompt", "a man walks"], ["--load"]), (["--eval-only"], ["--load"]),
    (["--prompt", "", "--load", "POLICY"], ["--prompt", "empty"]),
    (["--prompt", "a man walks", "--prompt", " ", "--load", "POLICY"], ["--prompt", "empty"]),
    (["--write-prompts", "absent/new.txt"], ["--write-prompts", "absent"]),
    (["--dataset", "absent"], ["absent", "no such folder"]), (["--data-root", "absent"], ["--data-root"]),
    (["--resume"], ["nothing to resume"]), (["--iterations", 0], ["--iterations"]),
    (["--codes", 0], ["--codes"]), (["--lr", "nan"], ["--lr"]), (["--micro-batch", -1], ["--micro-batch"]),
    (["--device", "tpu"], ["--device tpu"])], ids=lambda value: "_".join(map(str, value)))
def test_wrong_flags(finished, tmp_path, flags, words):
    """One line that names the flag; nothing is written, and nothing trained that was not in the cache."""
    flags = [finished.policy if flag == "POLICY" else flag for flag in flags]
    cached = set(products(finished.cache))
    line = refused(*finished.flags, "--out-dir", tmp_path / "run", *flags)
    assert all(word in line for word in words), line
    assert products(tmp_path / "run") == {}
    assert {name for name in products(finished.cache) if name.endswith(".pt")} <= cached


@pytest.mark.parametrize("flag", ("--out-dir", "--cache-dir"))
def test_folders_that_cannot_be_made(finished, tmp_path, flag):
    (tmp_path / "file").write_text("precious")
    line = refused(*finished.flags, "--out-dir", tmp_path / "run", flag, tmp_path / "file" / "below")
    assert flag in line and "file" in line and (tmp_path / "file").read_text() == "precious"
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_not_entered_by_accident(finished):
    before = products(finished.folder)
    line = refused(*finished.flags, "--out-dir", finished.folder)
    assert "--resume or --overwrite" in line and str(finished.folder) in line
    line = refused(*finished.flags, "--eval-only", "--load", finished.policy, "--out-dir", finished.folder)
    assert "--out-dir" in line and "holds a training run" in line
    assert products(finished.folder) == before


def test_overwrite_starts_again(finished, tmp_path, no_evaluation):
    for flags in ([], ["--overwrite", "--seed", 1]):
        assert call(*finished.flags, "--iterations", 1, "--out-dir", tmp_path / "run", *flags)[0] == 0
    assert len(log_rows(tmp_path / "run")["iteration"]) == 1
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["seed"] == 1
    assert checkpoint_of(tmp_path / "run")["args"]["seed"] == 1


@pytest.mark.parametrize("flags, words", [
    (["--lr", "0.001", "--kl-loss", "0.1"], ["lr was 0.005 and is 0.001", "kl_loss was 0.0 and is 0.1"]),
    (["--critic", "separate"], ["critic was 'shared-detach' and is 'separate'"]),
    (["--gpt-iterations", "19"], ["gpt_iterations was 20 and is 19", "starts from"])])
def test_resume_with_other_arguments(finished, tmp_path, flags, words):
    shutil.copytree(finished.folder, tmp_path / "run")
    shutil.copytree(finished.cache, tmp_path / "cache")
    before = products(tmp_path / "run")
    code, _, err = call(*finished.flags, "--out-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache",
                        "--resume", *flags)
    line = err.splitlines()[-1]  # before it, where a base of other arguments was trained, its progress
    assert code == 2 and line.startswith("error: ") and "Traceback" not in err
    assert all(word in line for word in words) and "checkpoint.pt" in line and "width" not in line
    assert products(tmp_path / "run") == before


@pytest.mark.parametrize("damage", ("empty", "half", "one bit", "foreign", "policy"))
def test_resume_from_a_damaged_checkpoint(finished, tmp_path, damage, no_evaluation):
    shutil.copytree(finished.folder, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    if damage == "foreign":
        torch.save({"weight": torch.ones(3)}, path)
    elif damage == "policy":
        shutil.copy(finished.policy, path)
    else:
        critic = runs.load_checkpoint(path, kind="ppo-run")["critic"]
        helpers.break_file(path, damage, critic["block.mlp.0.weight"])
    before = products(tmp_path / "run")
    line = refused(*finished.flags, "--out-dir", tmp_path / "run", "--resume")
    words = {"foreign": ["not written by this project", "checkpoint.prev.pt"],
             "policy": ["holds a 'ppo-policy', wanted a 'ppo-run'"]}
    assert all(word in line for word in words.get(damage, ["damaged", "checkpoint.prev.pt"])), line
    assert "checkpoint.pt: " in line and products(tmp_path / "run") == before
    if damage == "one bit":  # what the line advises
        path.with_name("checkpoint.prev.pt").replace(path)
        assert call(*finished.flags, "--out-dir", tmp_path / "run", "--resume")[0] == 0
        assert same_run(tmp_path / "run", finished.folder)


@pytest.mark.parametrize("what, words", [
    ("half", "damaged"), ("empty", "damaged"), ("one bit", "damaged"),
    ("foreign", "not written by this project"), ("adapter", "holds a 'ddpo-adapter', wanted a 'ppo-policy'"),
    ("checkpoint", "holds a 'ppo-run', wanted a 'ppo-policy'")])
def test_policies_that_do_not_load(finished, tmp_path, what, words):
    path = tmp_path / "policy.pt"
    shutil.copy(finished.policy, path)
    if what == "foreign":
        torch.save({"weight": torch.ones(3)}, path)
    elif what == "checkpoint":
        shutil.copy(finished.folder / "checkpoint.pt", path)
    elif what == "adapter":
        data = {"args": {"lora_rank": 8}, "lora": {"A": torch.ones(2)}}
        runs.save_checkpoint(path, data, kind="ddpo-adapter")
    else:
        helpers.break_file(path, what, policy_of(path)["gpt"]["trans_head.head.weight"])
    for mode in (["--eval-only"], ["--prompt", "a man walks"]):
        line = refused(*finished.flags, *mode, "--load", path, "--out-dir", tmp_path / "run")
        assert words in line and str(path) in line and not (tmp_path / "run").exists()


def test_a_policy_of_other_sizes(finished, tmp_path):
    """Its text encoder is not of the width that its arguments name."""
    path, data = tmp_path / "policy.pt", policy_of(finished.policy)
    runs.save_checkpoint(path, {**data, "args": {**data["args"], "width": 16}}, kind="ppo-policy")
    line = refused(*finished.flags, "--prompt", "a man walks", "--load", path, "--out-dir", tmp_path / "run")
    assert str(path) in line and products(tmp_path / "run") == {}


@pytest.mark.parametrize("mode", (["--eval-only"], ["--prompt", "a man walks"]))
@pytest.mark.parametrize("flags, words", [
    (["--width", 64, "--heads", 8], "heads was 4 and is 8, width was 32 and is 64"),
    (["--dataset", "humanml3d"], "dataset was 'kit' and is 'humanml3d'")])
def test_flags_that_contradict_the_policy(finished, tmp_path, mode, flags, words):
    """The arguments of its run hold; a flag that says otherwise must not be ignored in silence."""
    line = refused(*finished.flags, *mode, "--load", finished.policy, "--out-dir", tmp_path / "run", *flags)
    assert words in line and products(tmp_path / "run") == {}


def published_files(finished, folder, keep=lambda caption: True):
    """The finished run's own networks as T2M-GPT publishes them, the text as vectors of the captions that
    `keep` chooses -> flags, captions."""
    args, stored = parse(*finished.flags), policy_of(finished.policy)
    policy = ppo.load_policy(args, stored, torch.device("cpu"))
    data = datasets.load_dataset("kit", space="native", clips=args.clips, seed=0, data_root=args.data_root,
                                 cache_dir=args.cache_dir)
    sets, _ = prompts.composed_sets(data, args.composed, seed=0, three_parts=args.three_parts,
                                    together=args.together)
    clips = [clip for part in (data.splits | sets).values() for clip in part]
    captions = [c for c in sorted({c for clip in clips for c in clip.captions}) if keep(c)]
    with torch.no_grad():
        np.savez(folder / "text.npz", captions=captions, vectors=policy.text(captions).numpy())
    vq = {name: value for name, value in stored["vq"].items() if name not in ("mean", "std")}
    torch.save({"net": vq}, folder / "vq.pth")
    torch.save({"trans": stored["reference"]}, folder / "gpt.pth")
    np.save(folder / "Mean.npy", stored["vq"]["mean"].numpy())
    np.save(folder / "Std.npy", stored["vq"]["std"].numpy())
    return ["--vq-checkpoint", folder / "vq.pth", "--vq-statistics", folder, "--gpt-checkpoint",
            folder / "gpt.pth", "--text-features", folder / "text.npz"], captions


def test_published_weights_go_all_the_way(finished, tmp_path, no_evaluation):
    """And the policy that comes of them asks for its text features again."""
    flags, captions = published_files(finished, tmp_path)
    flags = [*finished.flags, *flags]
    assert call(*flags, "--iterations", 1, "--out-dir", tmp_path / "run")[0] == 0
    mine, other = policy_of(tmp_path / "run" / "policy.pt"), policy_of(finished.policy)
    assert equal(mine["vq"], other["vq"]) and equal(mine["reference"], other["reference"])
    assert mine["words"] == [] and mine["text"] == {} and mine["block_size"] == ppo.PUBLISHED_BLOCK
    assert not equal(mine["gpt"], mine["reference"])
    flags = [*SMALL, "--iterations", 1, "--load", tmp_path / "run" / "policy.pt"]
    flags += ["--out-dir", tmp_path / "out"]
    line = refused(*flags, "--prompt", "nobody has ever said this")
    assert "text.npz" in line and "'nobody has ever said this'" in line
    assert call(*flags, "--prompt", captions[0])[0] == 0
    assert set(products(tmp_path / "out")) == {"prompt00.gif", "prompt00_after.npy", "prompt00_after.bvh"}


def test_text_features_without_a_caption(finished, tmp_path):
    """Vectors of the data set's captions only: the first rollout asks for composed ones."""
    composed = set()
    with pytest.MonkeyPatch.context() as patch:
        sets_of = prompts.composed_sets

        def noted(*args, **options):
            sets, counted = sets_of(*args, **options)
            composed.update(clip.captions[0] for clips in sets.values() for clip in clips)
            return sets, counted
        patch.setattr(prompts, "composed_sets", noted)
        flags, captions = published_files(finished, tmp_path, lambda caption: caption not in composed)
    line = refused(*finished.flags, *flags, "--out-dir", tmp_path / "run")
    assert "text.npz: holds no vector for" in line
    assert captions and re.search("'(.+)'", line)[1] in composed
    assert not (tmp_path / "run" / "policy.pt").exists()


# ---- 4. Faults while running -------------------------------------------------------------------------------


def spoil_reward(monkeypatch, iteration):
    """The reward of sample 5 of that iteration is NaN -> list that the captions asked about are added to."""
    score, reward, asked = ppo.score, ppo.motion_reward, []

    def listen(args, policy, reward_model, batch, *rest):
        asked.append(batch["captions"])
        return score(args, policy, reward_model, batch, *rest)

    def broken(*args):
        r, pseudo = reward(*args)
        r[5] = math.nan if len(asked) == iteration + 2 else r[5]  # the first gives the reward its scale
        return r, pseudo

    monkeypatch.setattr(ppo, "score", listen)
    monkeypatch.setattr(ppo, "motion_reward", broken)
    return asked


def test_a_reward_that_is_nan(finished, tmp_path, monkeypatch, no_evaluation):
    """It never reaches the weights; the run goes on later as if nothing had been."""
    updates, update = [], ppo.update
    with monkeypatch.context() as patch:
        asked = spoil_reward(patch, 2)
        patch.setattr(ppo, "update", lambda *args: updates.append(args) or update(*args))
        code, _, err = call(*finished.flags, "--out-dir", tmp_path / "run")
    assert code == 3 and "Traceback" not in err and len(updates) == 2
    last = err.splitlines()[-1]
    assert "iteration 2: reward nan" in last and repr(asked[3][5]) in last
    state = checkpoint_of(tmp_path / "run")
    assert state["iteration"] == 1 and all_finite(state["gpt"]) and all_finite(state["critic"])
    assert log_rows(tmp_path / "run")["iteration"].tolist() == [0, 1]
    assert not (tmp_path / "run" / "policy.pt").exists()
    assert call(*finished.flags, "--out-dir", tmp_path / "run", "--resume")[0] == 0
    assert same_run(tmp_path / "run", finished.folder)


def test_a_reward_that_is_nan_leaves_a_report(finished, tmp_path, monkeypatch, no_evaluation):
    spoil_reward(monkeypatch, 0)
    assert call(*finished.flags, "--out-dir", tmp_path / "run")[0] == 3
    report = json.loads((tmp_path / "run" / "nan_report.json").read_text())
    assert report["iteration"] == 0 and "reward nan" in report["error"] and report["not_finite"] == []


@pytest.mark.parametrize("place, norm, name", [(0, "grad_norm inf", "trans_base.tok_emb.weight"),
                                               (-1, "vf_grad_norm inf", "value.bias")])
def test_a_gradient_that_is_infinite(finished, tmp_path, monkeypatch, no_evaluation, place, norm, name):
    """No optimizer step is taken, the checkpoint before it stays, and the report names the weight."""
    steps, step, reduce = [], torch.optim.AdamW.step, runs.all_reduce_grads

    def poisoned(parameters):
        reduce(parameters)
        if len(steps) == 6:  # the third minibatch of iteration 1
            parameters[place].grad.view(-1)[0] = math.inf

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self, *args: steps.append(1) or step(self, *args))
        patch.setattr(runs, "all_reduce_grads", poisoned)
        code, _, err = call(*finished.flags, "--out-dir", tmp_path / "run", "--reward", "random")
    assert code == 3 and f"iteration 1: {norm}" in err.splitlines()[-1] and len(steps) == 6
    state = checkpoint_of(tmp_path / "run")
    assert state["iteration"] == 0 and all_finite(state["gpt"]) and all_finite(state["critic"])
    report = json.loads((tmp_path / "run" / "nan_report.json").read_text())
    assert report["iteration"] == 1 and math.isfinite(report["rewards"]["mean"]) and norm in report["error"]
    assert len(report["not_finite"]) == 1 and report["not_finite"][0].startswith("gradient ")
    assert report["not_finite"][0].endswith(name)


# ---- 5. What a finished policy is for ----------------------------------------------------------------------


def test_prompts_become_files(finished, tmp_path):
    """Each motion is as long as its policy wants; the same command gives the same files."""
    captions = ["a person walks forward", "A person waves, twice!", "someone turns left"]
    flags = [*finished.flags, "--load", finished.policy, "--compare", "--out-dir", tmp_path / "out"]
    for caption in captions:
        flags += ["--prompt", caption]
    code, out, _ = call(*flags)
    names = {f"prompt{k:02d}_{title}.{kind}"
             for k in range(3) for title in ("before", "after") for kind in ("npy", "bvh")}
    assert code == 0 and set(products(tmp_path / "out")) == names | {f"prompt{k:02d}.gif" for k in range(3)}
    assert all(caption in out for caption in captions)

    policy = ppo.load_policy(parse(*finished.flags), policy_of(finished.policy), torch.device("cpu"))
    lengths = []
    for title, gpt in (("before", policy.reference), ("after", policy.gpt)):
        *_, tokens, _ = ppo.generate(policy, gpt, captions, 0, 0, "prompt", range(3), 1.0)
        for k, row in enumerate(tokens.tolist()):
            row = row[: row.index(gpt.end)] if gpt.end in row else row
            joints = np.load(tmp_path / "out" / f"prompt{k:02d}_{title}.npy")
            assert joints.shape == (len(row) * 2**policy.vq.halvings, 21, 3) and np.isfinite(joints).all()
            bvh = render.read_bvh(tmp_path / "out" / f"prompt{k:02d}_{title}.bvh", features.KIT)
            assert bvh.shape == joints.shape
            lengths.append(len(row))
    limit = policy.gpt.block_size - 1
    assert min(lengths) >= policy.shortest and max(lengths) <= limit
    assert len(set(lengths)) > 1 and min(lengths) < limit, "some have said the end"
    for k in range(3):
        with Image.open(tmp_path / "out" / f"prompt{k:02d}.gif") as gif:
            assert gif.n_frames == 2**policy.vq.halvings * max(lengths[k], lengths[3 + k])

    before = products(tmp_path / "out")
    assert before["prompt00_before.npy"] != before["prompt00_after.npy"] != before["prompt01_after.npy"]
    refused(*flags, "--lr", 1)
    assert products(tmp_path / "out") == before, "a refused call deletes nothing"
    assert call(*flags)[0] == 0, "the same command can be given again"
    assert products(tmp_path / "out") == before


@pytest.mark.parametrize("logit, frames", [(-50.0, None), (50.0, 4)])
def test_the_end_token_decides_the_length(finished, tmp_path, logit, frames):
    """Without an end a motion goes on to the limit; one that ends at once has the four frames that a motion
    needs at least."""
    path, data = tmp_path / "policy.pt", policy_of(finished.policy)
    head = {name: data["gpt"][f"trans_head.{name}"].zero_() for name in ("ln_f.weight", "ln_f.bias",
                                                                         "head.weight")}
    head["ln_f.bias"][0], head["head.weight"][-1, 0] = 1.0, logit  # the same logits in every state
    runs.save_checkpoint(path, data, kind="ppo-policy")
    flags = ["--prompt", "a person walks", "--load", path, "--out-dir", tmp_path / "out"]
    assert call(*finished.flags, *flags)[0] == 0
    joints = np.load(tmp_path / "out" / "prompt00_after.npy")
    assert len(joints) == (frames or 2 * (data["block_size"] - 1)) and np.isfinite(joints).all()


def test_eval_only_gives_the_table_of_the_run(finished, tmp_path, monkeypatch, no_pictures):
    """From policy.pt alone: neither tokenizer nor GPT is looked for in the cache."""
    asked = helpers.only_cached(monkeypatch)
    flags = [*finished.flags, "--eval-only", "--load", finished.policy, "--out-dir", tmp_path / "eval"]
    assert call(*flags)[0] == 0 and sorted(asked) == ["judge", "reward"]
    assert set(products(tmp_path / "eval")) == {"results.json"}
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert all(results[table] == finished.results[table] for table in TABLES)
    assert results["data"] == finished.results["data"] and results["counts"]["motions"] == 0


# ---- 6. Controls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ("shuffled", "random"))
def test_controls_run(finished, tmp_path, no_evaluation, reward):
    """What is learnt is not what the real reward teaches, from the first iteration on."""
    code, *_ = call(*finished.flags, "--reward", reward, "--out-dir", tmp_path / "run")
    assert code == 0
    mine, run = log_rows(tmp_path / "run"), log_rows(finished.folder)
    assert (np.abs(mine["reward"] - run["reward"]) > 1e-3).all()
    assert (mine["first_ratio_error"] == 0).all() and (mine["grad_norm"] > 0).all()
    policy, other = policy_of(tmp_path / "run" / "policy.pt"), policy_of(finished.policy)
    assert all_finite(policy["gpt"]) and not equal(policy["gpt"], other["gpt"])
    assert all(equal(policy[name], other[name]) for name in ("reference", "vq", "text"))


def test_every_kind_of_critic_runs(finished, tmp_path, no_evaluation):
    """All start at V = 0, so the first rollout has the same advantages: what a critic that is detached, or a
    copy of its own, learns from it leaves the policy as it is; a shared one bends it."""
    made, states = {}, {}
    for kind in ("shared-detach", "separate", "shared"):
        flags = ["--critic", kind, "--iterations", 1, "--out-dir", tmp_path / kind]
        assert call(*finished.flags, *flags)[0] == 0
        made[kind], states[kind] = policy_of(tmp_path / kind / "policy.pt"), checkpoint_of(tmp_path / kind)
        assert all_finite(made[kind]["gpt"]) and states[kind]["critic"]["value.weight"].abs().max() > 0
        assert equal(made[kind]["reference"], made["shared-detach"]["reference"])
    assert equal(made["separate"]["gpt"], made["shared-detach"]["gpt"])
    assert not equal(made["shared"]["gpt"], made["shared-detach"]["gpt"])
    trunk = {name.removeprefix("trunk."): value for name, value in states["separate"]["critic"].items()
             if name.startswith("trunk.")}
    assert trunk.keys() == made["separate"]["gpt"].keys() and not equal(trunk, made["separate"]["reference"])


def test_without_a_learning_rate_nothing_is_learnt(finished, tmp_path, no_evaluation):
    """Only the critic, which has a rate of its own."""
    code, *_ = call(*finished.flags, "--lr", 0, "--iterations", 2, "--out-dir", tmp_path / "run")
    policy, log = policy_of(tmp_path / "run" / "policy.pt"), log_rows(tmp_path / "run")
    assert code == 0 and equal(policy["gpt"], policy["reference"])
    assert log["kl_ref"].tolist() == log["clipfrac"].tolist() == [0, 0] and (log["grad_norm"] > 0).all()
    assert checkpoint_of(tmp_path / "run")["critic"]["value.weight"].abs().max() > 0


PAPER = ("--dataset humanml3d --text-only-share 0 --iterations 40000 --batch-prompts 128 "
         "--samples-per-prompt 1 --kept-samples 0 --kl-loss 0 --lr 5e-6 --warmup 0").split()
TABLE_3 = {  # flags -> lambda_t, lambda_m, critic, epochs, updates of an epoch
    "--lambda-t 2.0 --lambda-m 0": (2.0, 0.0, "shared-detach", 2, 1),
    "--lambda-t 0 --lambda-m 2.0": (0.0, 2.0, "shared-detach", 2, 1), "": (0.4, 2.0, "shared-detach", 2, 1),
    "--lambda-t 0.2": (0.2, 2.0, "shared-detach", 2, 1), "--lambda-t 0.1": (0.1, 2.0, "shared-detach", 2, 1),
    "--critic separate": (0.4, 2.0, "separate", 2, 1), "--critic shared": (0.4, 2.0, "shared", 2, 1),
    "--ppo-epochs 1": (0.4, 2.0, "shared-detach", 1, 1),
    "--ppo-epochs 1 --minibatch-ratio 0.5": (0.4, 2.0, "shared-detach", 1, 2),
    "--minibatch-ratio 0.5": (0.4, 2.0, "shared-detach", 2, 2)}


@pytest.mark.parametrize("row", TABLE_3)
def test_each_row_of_the_papers_ablations_is_a_command(row):
    """InstructMotion Table 3, at the paper's batch and at the size of this project; the row without flags is
    the paper's choice and the default."""
    for size in (PAPER, []):
        args = parse(*size, *row.split())
        ppo.check_args(args)
        updates = 1 / args.minibatch_ratio
        assert (args.lambda_t, args.lambda_m, args.critic, args.ppo_epochs, updates) == TABLE_3[row]
    assert len(set(TABLE_3.values())) == 10


# ---- 7. Several processes ----------------------------------------------------------------------------------


def test_two_processes_equal_one(finished, tmp_path, no_evaluation):
    """The same samples and rewards, and gradients that add up to those of one process."""
    flags = [*finished.flags, "--iterations", "2"]
    flags += ["--lr", "2e-4"]  # Adam blows rounding up, to lr at most
    assert call(*flags, "--out-dir", tmp_path / "one")[0] == 0
    helpers.two_processes(ppo, [*flags, "--out-dir", tmp_path / "two"], tmp_path)
    one, two = log_rows(tmp_path / "one"), log_rows(tmp_path / "two")
    for name in ("iteration", "reward", "text_term", "motion_term", "pseudo_score", "val_reward"):
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-6, err_msg=name)
    a, b = (policy_of(tmp_path / name / "policy.pt") for name in ("one", "two"))
    for name in a["gpt"]:
        torch.testing.assert_close(b["gpt"][name], a["gpt"][name], rtol=0, atol=1e-5, msg=name)
    assert not equal(a["gpt"], a["reference"])
    assert all(equal(a[name], b[name]) for name in ("reference", "vq", "text"))
    # figures of the update are those of all samples, not of the share of one process
    for name in ("pg_loss", "vf_loss", "approx_kl", "grad_norm", "vf_grad_norm", "kl_ref", "entropy",
                 "length", "truncated", "distinct", "explained_variance"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-2, atol=1e-6, err_msg=name)
