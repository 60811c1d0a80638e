"""End to end, what is particular to ddpo_motion.py; what all scripts share is in test_run_all.py."""
import contextlib
import functools
import io
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ddpo_motion as ddpo
from common import datasets, diffusion, evaluate, features, retrieval, runs, training
from results import tables
from tests import reference, run_helpers as helpers
from tests.run_helpers import all_finite, log_rows, products

MINI_KIT = helpers.ROOT.parent / "shared" / "data" / "mini_kit"
parse, call, refused = (functools.partial(f, ddpo) for f in (helpers.parse, helpers.call, helpers.refused))

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def finished(finished_run):
    return finished_run("ddpo")


def same_weights(a, b):
    """Adapters of two files are equal bit for bit."""
    return helpers.equal(*(runs.load_checkpoint(path, kind="ddpo-adapter")["lora"] for path in (a, b)))


# ---- 1. What a run leaves behind ---------------------------------------------------------------------------


def test_log_has_a_row_an_iteration(finished):
    log = log_rows(finished.folder)
    assert log["iteration"].tolist() == [0, 1, 2, 3]
    assert np.isfinite(log["val_reward"]).tolist() == [False, True, False, True]
    assert (log["first_ratio_error"] == 0).all() and (log["grad_norm"] > 0).all()
    checkpoint = runs.load_checkpoint(finished.folder / "checkpoint.pt", kind="ddpo-run")
    assert checkpoint["iteration"] == 3
    adapter = runs.load_checkpoint(finished.product, kind="ddpo-adapter")["lora"]
    trained = [v for k, v in adapter.items() if k.endswith(".B")]
    assert trained and all(value.abs().max() > 0 for value in trained), "B starts at zero: all have moved"
    assert all(torch.equal(adapter[k], checkpoint["lora"][k]) for k in adapter if k.endswith((".A", ".B")))


def test_results_say_where_they_come_from(finished):
    results = finished.results
    assert results["data"] == {"source": "embedded humanml3d", "target": "embedded kit"}
    assert "EMBEDDED" in finished.out and "embedded kit" in finished.out
    assert {"base", "rollout", "reward", "update", "evaluation"} <= set(results["seconds"])
    assert set(results["fingerprints"]) == {"source", "target"}


def load_data(args, cache, **changes):
    """Source and target of a run, from the cache."""
    with contextlib.redirect_stdout(io.StringIO()), helpers.smaller(**changes):
        return datasets.load_pair(args.source, args.dataset, clips=diffusion.SIZES["joint"]["tiny"].clips,
                                  data_root=args.data_root, cache_dir=cache, use_cache=True, seed=0)


@pytest.mark.parametrize("iterations", (1, 3, 20))
def test_base_of_few_updates(finished, tmp_path, iterations):
    args = parse(*finished.flags)
    source, _ = load_data(args, finished.cache)
    source.splits["train"] = source.splits["train"][:8]
    with helpers.smaller(iterations=iterations):
        options = dict(seed=0, device=torch.device("cpu"), cache_dir=tmp_path, use_cache=True)
        _, notes = diffusion.fit_base(functools.partial(ddpo.make_model, args), (), source,
                                      diffusion.SIZES["joint"]["tiny"], *diffusion.SPACES["joint"], **options)
    assert math.isfinite(notes["loss"])


def test_help_is_the_whole_docstring():
    """As a user starts it: the paper, the commands, and every flag in its group."""
    command = [sys.executable, helpers.ROOT / "ddpo_motion.py", "--help"]
    child = subprocess.run(command, env=helpers.ENV, capture_output=True, text=True, check=False)
    assert child.returncode == 0 and child.stderr == ""
    assert ddpo.__doc__.strip() in child.stdout
    for group in ("run", "use a finished run", "data", "sampling", "reward", "update", "evaluation"):
        assert f"\n{group}:\n" in child.stdout, group
    assert "--lr X " in child.stdout and "(default 0.0015)" in child.stdout


def test_a_small_run_warns_of_nothing(finished):
    """Nothing but bars and what the script says."""
    assert "Warning" not in finished.out and "Warning" not in finished.err, finished.err


# ---- 3. The user's mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--samples", 1], ["--samples"]), (["--prompts", 0], ["--prompts"]),
    (["--prompt", "a man walks"], ["--load"]),
    (["--eval-only"], ["--load"]),
    (["--prompt", " ", "--load", "ADAPTER"], ["--prompt", "empty"]),
    (["--prompt", "a man walks", "--length", 7, "--load", "ADAPTER"], ["--length 7"]),
    (["--prompt", "a man walks", "--length", 4000, "--load", "ADAPTER"], ["--length 4000"]),
    (["--load", "ADAPTER"], ["--load", "--prompt", "--eval-only"]),
    (["--load", "absent.pt", "--eval-only"], ["absent.pt", "no such file"]),
    (["--dataset", "absent", "--source", "humanml3d"], ["absent", "no such folder"]),
    (["--dataset", "absent"], ["--dataset absent", "no such folder"]),
    (["--source", "absent"], ["absent", "no such folder"]),
    (["--data-root", "absent"], ["absent", "--data-root"]),
    (["--resume"], ["nothing to resume", "--resume"]),
    (["--size", "paper"], ["--tiny: is --size tiny", "--size paper"]),
    (["--minibatches", 0], ["--minibatches"]), (["--minibatches", 3], ["--minibatches"]),
    (["--kept-samples", 17], ["--kept-samples", "16"]), (["--micro-batch", -1], ["--micro-batch"]),
    (["--leave-out", "punch", "--source", "kit"], ["punch", "the source"]),
    (["--lora-rank", 0], ["--lora-rank"]),
    (["--leave-out", "nothing of the kind"], ["nothing of the kind"]),
    (["--lr", -1], ["--lr"]), (["--lr", "nan"], ["--lr"]), (["--skip-last", 5], ["--skip-last"]),
    (["--threads", -1], ["--threads"]),
    (["--device", "tpu"], ["--device tpu"])], ids=lambda value: "_".join(map(str, value)))
def test_wrong_flags(finished, tmp_path, flags, words):
    """One line that names the flag, before anything is trained or written."""
    flags = [finished.product if flag == "ADAPTER" else flag for flag in flags]
    line = refused(*finished.flags, "--out-dir", tmp_path / "run", *flags)
    assert all(word in line for word in words), line
    assert products(tmp_path / "run") == {}


@pytest.mark.parametrize("flags, words", [
    (["--lr", "0.001"], ["lr was 0.0015 and is 0.001"]), (["--lora-rank", "4"], ["lora_rank was 8 and is 4"]),
    (["--reward", "random", "--seed", "5"], ["reward was 'retrieval'", "seed was 0 and is 5"])])
def test_resume_with_other_arguments(finished, tmp_path, flags, words):
    shutil.copytree(finished.folder, tmp_path / "run")
    before = products(tmp_path / "run")
    line = refused(*finished.flags, "--out-dir", tmp_path / "run", "--resume", *flags)
    assert all(word in line for word in words) and "checkpoint.pt" in line and "width" not in line
    assert [name for name, raw in products(tmp_path / "run").items() if raw != before[name]] == []


def test_what_shapes_nothing_may_change(finished, tmp_path, monkeypatch, no_pictures):
    """At --resume and at --load: how a run is started is not what it learns."""
    shutil.copytree(finished.folder, tmp_path / "run")
    asked = []

    def few(source, target, scorers, base, tuned, repeats, best_count, more=None):
        asked.append((repeats, best_count))
        return {}
    monkeypatch.setattr(evaluate, "final_tables", few)
    free = ["--eval-repeats", 1, "--best-of", 3, "--length", 40]
    assert call(*finished.flags, *free, "--out-dir", tmp_path / "run", "--resume")[0] == 0
    assert finished.is_same(tmp_path / "run")
    flags = ["--eval-only", "--load", finished.product, "--out-dir", tmp_path / "eval"]
    assert call(*finished.flags, *free, *flags)[0] == 0 and asked == [(1, 3), (1, 3)]
    known = json.loads((tmp_path / "eval" / "results.json").read_text())["args"]
    assert (known["best_of"], known["length"], known["iterations"]) == (3, 40, 4)


def test_an_unknown_column_is_said_before_anything_is_trained(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(ddpo, "LOOKS", (*ddpo.LOOKS, "height"))
    monkeypatch.setattr(ddpo, "update", lambda *args: pytest.fail("trained before it was said"))
    line = refused(*finished.flags, "--out-dir", tmp_path / "run")
    assert "'height'" in line and "reward, judge, oracle" in line and "foot_skate" in line
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_an_adapter_of_another_rank(finished, tmp_path):
    path, data = tmp_path / "adapter.pt", finished.stored(finished.folder)
    args = {**data["args"], "lora_rank": 4, "lora_alpha": 4.0}
    runs.save_checkpoint(path, {**data, "args": args}, kind="ddpo-adapter")
    line = refused(*finished.flags, "--eval-only", "--load", path, "--out-dir", tmp_path / "run")
    assert "does not fit" in line and products(tmp_path / "run") == {}


@pytest.mark.parametrize("mode", (["--eval-only"], ["--prompt", "a man walks"]))
def test_flags_that_contradict_the_adapter(finished, tmp_path, mode):
    """The arguments of its run hold; a flag that says otherwise must not be ignored in silence."""
    flags = ["--load", finished.product, "--out-dir", tmp_path / "run", "--lora-rank", 4]
    line = refused(*finished.flags, *mode, *flags)
    assert "lora_rank was 8 and is 4" in line and products(tmp_path / "run") == {}


def kit_folder(path):
    """12 real clips in the layout of KIT-ML."""
    if not MINI_KIT.is_dir():
        pytest.skip("the mini KIT-ML folder is not here")
    for part in ("new_joint_vecs", "texts"):
        (path / part).mkdir(parents=True)
    for name in ("Mean.npy", "Std.npy"):
        shutil.copy(MINI_KIT / name, path / name)
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        ids = []
        for name in (MINI_KIT / f"{split}.txt").read_text().split():
            if len(ids) < count and 24 <= len(np.load(MINI_KIT / "new_joint_vecs" / f"{name}.npy")) < 200:
                ids.append(name)
        for name in ids:
            shutil.copy(MINI_KIT / "new_joint_vecs" / f"{name}.npy", path / "new_joint_vecs")
            shutil.copy(MINI_KIT / "texts" / f"{name}.txt", path / "texts")
        (path / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return path


def damaged(what, path):
    """A data set folder with one thing wrong, and the words that must be in the message."""
    if what == "empty":
        path.mkdir()
        return ["missing", "train.txt", "Mean.npy", "new_joint_vecs"]
    kit_folder(path)
    first = (path / "train.txt").read_text().split()[0]
    motion, text = path / "new_joint_vecs" / f"{first}.npy", path / "texts" / f"{first}.txt"
    if what == "nan":
        values = np.load(motion)
        values[3, 7] = np.nan
        np.save(motion, values)
        return ["non_finite", first]
    if what == "width":
        np.save(path / "Mean.npy", np.zeros(77, np.float32))
        return ["Mean.npy", "(77,)", "263", "251"]
    if what == "no hash":
        text.write_text("a person walks forward\n")
        return ["no_caption", first]
    motion.unlink()
    return ["missing_motion", first]


@pytest.mark.parametrize("what", ("empty", "nan", "width", "no hash", "no motion"))
def test_damaged_data_folders(finished, tmp_path, what):
    words = damaged(what, tmp_path / "data")
    for flags in (["--dataset", tmp_path / "data", "--source", "humanml3d"], ["--source", tmp_path / "data"]):
        line = refused(*finished.flags, "--out-dir", tmp_path / "run", *flags)
        assert all(word in line for word in words) and str(tmp_path / "data") in line, line
        assert not (tmp_path / "run").exists()


def test_a_sound_folder_is_the_target(finished, tmp_path, no_pictures):
    """The real layout goes all the way, and the results say so."""
    folder = kit_folder(tmp_path / "mine")
    flags = ["--dataset", folder, "--source", "humanml3d", "--iterations", 1, "--eval-repeats", 1,
             "--out-dir", tmp_path / "run"]
    code, out, err = call(*finished.flags, *flags, "--cache-dir", shared_cache(finished, tmp_path))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert code == 0 and results["data"]["target"] == "folder mine (KIT-ML layout)"
    assert "EMBEDDED procedural kit" not in out


# ---- 4. Faults while running -------------------------------------------------------------------------------


def test_a_reward_that_is_nan(finished, tmp_path, monkeypatch, no_evaluation):
    build, seen = ddpo.build_reward, []

    def broken_reward(args, source, target, **options):
        reward, notes = build(args, source, target, **options)

        def broken(motion, lengths, captions):
            rewards = reward(motion, lengths, captions).clone()
            if len(captions) == 16:  # a rollout, and no look at val
                seen.append(captions)
                rewards[5] = math.nan if len(seen) == 3 else rewards[5]
            return rewards
        return broken, notes

    monkeypatch.setattr(ddpo, "build_reward", broken_reward)
    updates, update = [], ddpo.update
    monkeypatch.setattr(ddpo, "update", lambda *args: updates.append(1) or update(*args))
    code, _, err = call(*finished.flags, "--out-dir", tmp_path / "run")
    assert code == 3 and "Traceback" not in err and len(updates) == 2
    last = err.splitlines()[-1]
    assert repr(seen[2][5]) in last and "iteration 2: reward nan" in last
    state = runs.load_checkpoint(tmp_path / "run" / "checkpoint.pt", kind="ddpo-run")
    assert state["iteration"] == 1 and all_finite(state["lora"])
    assert log_rows(tmp_path / "run")["iteration"].tolist() == [0, 1]
    assert not (tmp_path / "run" / "adapter.pt").exists()
    monkeypatch.setattr(ddpo, "build_reward", build)  # mended, the run goes on as if nothing had been
    assert call(*finished.flags, "--out-dir", tmp_path / "run", "--resume")[0] == 0
    assert same_weights(tmp_path / "run" / "adapter.pt", finished.product)


def test_a_gradient_that_is_nan(finished, tmp_path, monkeypatch, no_pictures):
    """No optimiser step is taken and the checkpoint before it stays."""
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: steps.append(1) or step(self, *args))
    reduce = training.all_reduce_grads

    def poisoned(parameters):
        reduce(parameters)
        if len(steps) == 3:  # the second minibatch of iteration 1
            parameters[0].grad[0, 0] = math.inf

    monkeypatch.setattr(training, "all_reduce_grads", poisoned)
    code, _, err = call(*finished.flags, "--out-dir", tmp_path / "run")
    assert code == 3 and "gradient norm" in err.splitlines()[-1] and len(steps) == 3
    state = runs.load_checkpoint(tmp_path / "run" / "checkpoint.pt", kind="ddpo-run")
    assert state["iteration"] == 0 and all_finite(state["lora"])
    report = json.loads((tmp_path / "run" / "nan_report.json").read_text())
    assert report["iteration"] == 1 and math.isfinite(report["rewards"]["mean"])
    assert len(report["not_finite"]) == 1 and report["not_finite"][0].startswith("gradient ")


# ---- 5. No motion of the target ----------------------------------------------------------------------------


class Untouchable:
    """Stands for the features of a target clip: any look at them is an error; their number may be known."""

    def __init__(self, frames=None):
        self._frames = frames

    def __len__(self):
        assert self._frames is not None, "a target motion was touched"
        return self._frames

    def __getattr__(self, name):
        raise AssertionError(f"a target motion was touched: {name}")

    __getitem__ = __array__ = __iter__ = lambda self, *args: pytest.fail("a target motion was touched")


def test_base_and_training_never_see_a_target_motion(finished, tmp_path, monkeypatch, no_evaluation):
    """The captions of the target's train split are all that is used."""
    judge_of, train, control = retrieval.judge, ddpo.train, retrieval.control
    asked, lengths, parts = [], [], {}

    def then_hide(domains, **options):
        judge, target = judge_of(domains, **options), domains[-1]
        for clip in (clip for clips in target.splits.values() for clip in clips):
            clip.features = Untouchable(len(clip.features))  # main() sizes its arrays by the longest clip
        with pytest.raises((AssertionError, TypeError)):
            datasets.collate(target.splits["train"][:1])
        return judge

    def hide_all(start, policy, reward, advantages, prompts, scorers, source, target, folder):
        parts.update(source=source, target=target)
        for clip in target.splits["train"] + target.splits["test"]:
            clip.features = Untouchable()
        train(start, policy, reward, advantages, prompts, scorers, source, target, folder)

    def listen(*about):
        score = control(*about)

        def heard(motion, frames, captions, **options):
            asked.extend(captions)
            lengths.extend(frames.tolist())
            return score(motion, frames, captions, **options)
        return heard

    monkeypatch.setattr(retrieval, "judge", then_hide)
    monkeypatch.setattr(retrieval, "control", listen)
    monkeypatch.setattr(ddpo, "train", hide_all)
    flags = ["--iterations", 8, "--prompts", 16, "--eval-every", 4, "--out-dir", tmp_path / "run",
             "--cache-dir", shared_cache(finished, tmp_path, without="base")]
    code, *_ = call(*finished.flags, *flags)
    assert code == 0 and len(asked) == 8 * 16 * 4
    # validation took place, and looked at no motion either
    assert np.isfinite(log_rows(tmp_path / "run")["val_reward"]).sum() == 2
    captions = {split: {caption for clip in clips for caption in clip.captions}
                for split, clips in parts["target"].splits.items()}
    held_out = (captions["val"] | captions["test"]) - captions["train"]
    assert set(asked) <= captions["train"] and held_out and not set(asked) & held_out
    assert len(set(asked)) > 50
    assert set(lengths) <= {len(clip.features) for clip in parts["source"].splits["train"]}


def shared_cache(finished, tmp_path, without=None):
    """A copy of the finished run's cache, where a test may add to it; without: a part that is not in it."""
    copy = tmp_path / "cache"
    shutil.copytree(finished.cache, copy, ignore=shutil.ignore_patterns(f"{without}-*.pt"))
    return copy


def train_scorers(finished, cache, monkeypatch, *flags, clips=helpers.LITTLE["clips"]):
    """Train both scorers -> [(family, clips they saw)], source, target, reward model, their cache keys."""
    fit, saw, keys, models, cached = retrieval.fit_retrieval, [], {}, [], training.cached

    def watched(family, clips, **options):
        saw.append((family, clips))
        model, notes = fit(family, clips, **options)
        models.append(model)
        return model, notes

    def noted(folder, key, build, name, use_cache=True):
        keys[name] = key
        return cached(folder, key, build, name, use_cache)

    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(retrieval, "fit_retrieval", watched)
        patch.setattr(retrieval, "cached", noted)
        args = parse(*finished.flags, *flags)
        source, target = load_data(args, cache, clips=clips)
        options = dict(seed=0, device=torch.device("cpu"), cache_dir=cache, use_cache=True, iterations=3)
        ddpo.build_reward(args, source, target, **options)
        retrieval.judge([source, target], target=target, **options)
    return saw, source, target, models[0] if models else None, keys


def test_reward_model_and_judge_have_nothing_in_common(finished, tmp_path, monkeypatch):
    saw, source, target, _, keys = train_scorers(finished, shared_cache(finished, tmp_path), monkeypatch)
    (reward_family, reward_clips), (judge_family, judge_clips) = saw
    assert reward_family != judge_family and keys["reward"] != keys["judge"]
    train = {id(clip) for part in (source, target) for clip in part.splits["train"]}
    assert not {id(c) for c in reward_clips} & {id(c) for c in judge_clips}
    seen = {id(clip) for clip in reward_clips + judge_clips}
    assert seen == train, "no scorer has seen val or test"
    raw = [{clip.features.tobytes() for clip in clips} for clips in (reward_clips, judge_clips)]
    assert not raw[0] & raw[1], "nor do two clips hold the same motion"


def test_strict_reward_model_knows_the_source_only(finished, tmp_path, monkeypatch):
    """--reward-data source: trained on source clips, and on the same weights whatever the target is."""
    cache = shared_cache(finished, tmp_path)
    saw, source, _, first, keys = train_scorers(finished, cache, monkeypatch, "--reward-data", "source")
    assert {id(clip) for clip in saw[0][1]} < {id(clip) for clip in source.splits["train"]}
    captions = [caption for clip in source.splits["train"] for caption in clip.captions]
    assert set(first.vocabulary.words) <= {word for caption in captions for word in datasets.words(caption)}
    both = train_scorers(finished, cache, monkeypatch)[-1]
    assert keys["reward"] != both["reward"] and keys["judge"] == both["judge"]
    *_, second, _ = train_scorers(finished, cache, monkeypatch, "--reward-data", "source", clips=(90, 70))
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- 6. What a finished adapter is for ---------------------------------------------------------------------


def test_prompts_become_files(finished, tmp_path):
    captions = ["a person walks forward", "A person waves, twice!"]
    flags = [*finished.flags, "--load", finished.product, "--compare", "--length", 24]
    flags += ["--out-dir", tmp_path / "out"]
    for caption in captions:
        flags += ["--prompt", caption]
    code, out, _ = call(*flags)
    names = {f"prompt{k:02d}_{title}.{kind}"
             for k in (0, 1) for title in ("before", "after") for kind in ("npy", "bvh")}
    assert code == 0 and set(products(tmp_path / "out")) == names | {"prompt00.gif", "prompt01.gif"}
    assert all(caption in out for caption in captions)
    made = {name: np.load(tmp_path / "out" / name) for name in names if name.endswith("npy")}
    assert all(joints.shape == (24, 22, 3) and np.isfinite(joints).all() for joints in made.values())
    assert not np.array_equal(made["prompt00_before.npy"], made["prompt00_after.npy"])
    assert not np.array_equal(made["prompt00_after.npy"], made["prompt01_after.npy"])
    with Image.open(tmp_path / "out" / "prompt00.gif") as gif:
        assert gif.n_frames == 24
    joints = reference.read_bvh(tmp_path / "out" / "prompt00_after.bvh", features.T2M)
    assert joints.shape == (24, 22, 3)

    before = products(tmp_path / "out")
    refused(*flags, "--length", 7)
    assert products(tmp_path / "out") == before, "a refused call deletes nothing"
    assert call(*flags)[0] == 0, "the same command can be given again"
    assert products(tmp_path / "out") == before


@pytest.mark.parametrize("reward", ("shuffled", "random"))
def test_controls_run(finished, tmp_path, no_evaluation, reward):
    code, *_ = call(*finished.flags, "--iterations", 1, "--reward", reward, "--out-dir", tmp_path / "run")
    mine, run = (log_rows(folder)["reward"][0] for folder in (tmp_path / "run", finished.folder))
    assert code == 0 and mine != run
    assert not same_weights(tmp_path / "run" / "adapter.pt", finished.product)


def forward_of(motion, lengths, captions):
    """A reward without a model: metres that the root goes along z from the first to the last frame."""
    joints = features.features_to_joints(motion, features.T2M)  # b t 22 3
    last = joints[torch.arange(len(joints)), lengths - 1, 0, 2]
    return last - joints[:, 0, 0, 2]


def test_a_reward_of_ones_own(finished, tmp_path, monkeypatch):
    """Handed to main(), it is what is optimised, the column `reward` of every table and of the log, what
    picks the best of N and what stands in the pictures; and no reward model is trained."""
    clip_notes, note = [], evaluate.render.clip_note
    monkeypatch.setattr(evaluate.render, "clip_note", lambda reward, *rest: clip_notes.append(float(reward))
                        or note(reward, *rest))
    for name in ("render_gif", "storyboard", "curves"):
        monkeypatch.setattr(evaluate.render, name, lambda *args, **named: None)
    cache = shared_cache(finished, tmp_path, without="reward")
    flags = [*finished.flags, "--cache-dir", cache, "--out-dir", tmp_path / "run"]
    code, out, _ = call(*flags, reward=forward_of)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert code == 0 and not list(cache.glob("reward-*.pt")) and len(list(cache.glob("judge-*.pt"))) == 1
    assert set(results["parts"]) == {"judge", "base"}
    source, target = load_data(parse(*flags), cache)
    for table, clips in (("target_val", target.splits["val"]), ("target_test", target.splits["test"]),
                         ("source_test", source.splits["test"])):
        batch = datasets.collate(clips)
        wanted = forward_of(batch.motion, batch.lengths, None).double().mean().item()
        assert results[table]["gt"]["reward"][0] == pytest.approx(wanted, abs=1e-5), table
    with helpers.smaller():
        stored = runs.load_checkpoint(tmp_path / "run" / "adapter.pt", kind="ddpo-adapter")
        args = parse(*flags)
        policy = ddpo.load_policy(args, stored, torch.device("cpu"))
    clips = target.splits["test"]
    captions, _, lengths = evaluate.questions(clips, 0)
    base = ddpo.policy_sampler(args, policy, 0.0)
    tries = [forward_of(*base(captions, lengths, f"target_test try {n}", 0), captions) for n in (0, 1)]
    best, row = torch.stack(tries).amax(0).double().mean().item(), results["target_test"]["best of 2"]
    row = row["reward"]
    assert abs(best - row[0]) <= row[1] + 1e-5, "the mean of two repeats lies this far from the first"
    shown = datasets.collate(evaluate.spread_out(clips, 1))
    of_data = forward_of(shown.motion, shown.lengths, None).tolist()
    assert len(clip_notes) == 3 and clip_notes[-1:] == pytest.approx(of_data, abs=1e-5), "before, after, data"
    log, first = log_rows(tmp_path / "run"), log_rows(finished.folder)
    assert (log["reward"] != first["reward"]).all() and np.isfinite(log["val_reward"]).sum() == 2
    with helpers.smaller():
        train = policy_of_the_first_rollout(args, stored, source, target)
    assert log["reward"][0] == pytest.approx(train, abs=1e-5)


def policy_of_the_first_rollout(args, stored, source, target):
    """The mean reward of iteration 0, whose adapters have done nothing yet."""
    policy = ddpo.load_policy(args, stored, torch.device("cpu"))
    prompts = sorted({caption for clip in target.splits["train"] for caption in clip.captions})
    with ddpo.lora.scaled(policy.model, 0.0):
        batch = ddpo.collect(args, policy, prompts, datasets.length_table(source.splits["train"]), 0)
    motion = policy.model.codec.decode(batch["states"][:, -1], batch["lengths"])
    return forward_of(motion, batch["lengths"], None).mean().item()


def test_advantages_of_ones_own(finished, tmp_path, no_evaluation):
    """Handed to main(), they are what is trained on: with zeros only the KL would be left."""
    asked = []

    def nothing(rewards, captions):
        asked.append((rewards, captions))
        return torch.zeros_like(rewards)

    code, *_ = call(*finished.flags, "--iterations", 2, "--kl-coef", 0, "--out-dir", tmp_path / "run",
                    advantages=nothing)
    assert code == 0 and [(rewards.shape, len(captions)) for rewards, captions in asked] == [((4, 4), 4)] * 2
    log = log_rows(tmp_path / "run")
    assert (log["loss"] == 0).all() and (log["grad_norm"] == 0).all()
    assert asked[0][0].mean().item() == pytest.approx(log["reward"][0], abs=1e-6)
    adapter = finished.stored(tmp_path / "run")["lora"]
    assert all((value == 0).all() for name, value in adapter.items() if name.endswith(".B"))


def test_latent_space(finished, tmp_path, no_pictures):
    """Trained and evaluated; the file makes motions again without the data."""
    cache = shared_cache(finished, tmp_path)
    flags = [*finished.flags, "--space", "latent", "--iterations", 2, "--eval-repeats", 1]
    flags += ["--cache-dir", cache]
    code, out, _ = call(*flags, "--out-dir", tmp_path / "run")
    assert code == 0 and "VAE: 3 latents of 8" in out
    log, results = log_rows(tmp_path / "run"), json.loads((tmp_path / "run" / "results.json").read_text())
    assert (log["first_ratio_error"] == 0).all() and (log["grad_norm"] > 0).all()
    rows = results["target_test"]
    assert {"gt", "VAE", "base", "tuned", "best of 2"} <= set(rows)
    assert rows["gt"]["fid"][0] < 1e-3 < rows["VAE"]["fid"][0], "the clips, through the VAE"
    adapter = runs.load_checkpoint(tmp_path / "run" / "adapter.pt", kind="ddpo-adapter")
    assert not [name for name in adapter["lora"] if "codec" in name]
    flags = ["--prompt", "a person waves", "--load", tmp_path / "run" / "adapter.pt", "--length", 48]
    assert call(*flags, "--threads", 1, "--compare", "--out-dir", tmp_path / "out")[0] == 0
    joints = np.load(tmp_path / "out" / "prompt00_after.npy")
    assert joints.shape == (48, 22, 3) and np.isfinite(joints).all()
    assert not np.array_equal(joints, np.load(tmp_path / "out" / "prompt00_before.npy"))


def test_what_is_left_out_is_seen_by_none(finished, tmp_path, monkeypatch, no_evaluation):
    """Base, judge and, in the strict reading, the reward model learn from clips without the action."""
    saw, fit, train = {}, retrieval.fit_retrieval, diffusion.train_base

    def fitted(family, clips, **options):
        saw[family] = [c for clip in clips for c in clip.captions]
        return fit(family, clips, **options)

    @functools.wraps(train)  # the cache's key is made of its source
    def trained(model, clips, *rest, **options):
        saw["base"] = [c for clip in clips for c in clip.captions]
        return train(model, clips, *rest, **options)
    monkeypatch.setattr(retrieval, "fit_retrieval", functools.wraps(fit)(fitted))
    monkeypatch.setattr(diffusion, "train_base", trained)
    asked, collect = set(), ddpo.collect

    def collected(args, policy, prompts, *rest):
        asked.update(prompts)
        return collect(args, policy, prompts, *rest)
    monkeypatch.setattr(ddpo, "collect", collected)
    monkeypatch.setitem(helpers.LITTLE, "clips", (60, 200))
    for data, knows in (("source", set()), ("both", {"transformer"})):
        code, out, _ = call(*finished.flags, "--leave-out", "punch", "--iterations", 1,
                            "--cache-dir", tmp_path / "cache", "--out-dir", tmp_path / f"run {data}",
                            "--reward-data", data)
        assert code == 0 and "source: embedded kit without punch" in out
        assert set(saw) == {"transformer", "bigru", "base"}
        assert {who for who, captions in saw.items() if any("punch" in c for c in captions)} == knows
        assert asked and all("punch" in c for c in asked)


@pytest.mark.parametrize("flags", ([], ["--kl-coef", 0, "--kept-samples", 0],
                                   ["--guidance-scale", 2, "--skip-last", 2, "--minibatches", 4]))
def test_costs_are_what_is_called(finished, tmp_path, monkeypatch, no_evaluation, flags):
    calls, updates, forward, clip = [], [], ddpo.MotionDiffusion.forward, training.clip_gradients

    def counted(self, x_t, *rest):
        calls.append(len(x_t) * (2 if torch.is_grad_enabled() else 1))
        return forward(self, x_t, *rest)

    def updated(*given):
        updates.append(1)
        return clip(*given)
    monkeypatch.setattr(ddpo.MotionDiffusion, "forward", counted)
    monkeypatch.setattr(training, "clip_gradients", updated)
    flags = [*finished.flags, "--iterations", 2, "--eval-every", 9, *flags]
    assert call(*flags, "--out-dir", tmp_path / "run")[0] == 0
    args = json.loads((tmp_path / "run" / "args.json").read_text())["args"]
    assert tables.costs_of(args) == {"samples": 16, "updates": len(updates) / 2, "calls": sum(calls) / 2}


# ---- 7. Several processes ----------------------------------------------------------------------------------


def test_two_processes_equal_one(finished, tmp_path, no_evaluation):
    """Started by torchrun: the same samples and rewards, and gradients that add up to those of one."""
    flags = [*finished.flags, "--iterations", "2", "--kl-coef", "0.1"]
    flags += ["--lr", "2e-4"]  # Adam blows rounding up, to lr at most
    assert call(*flags, "--out-dir", tmp_path / "one")[0] == 0
    helpers.torchrun(ddpo, [*flags, "--out-dir", tmp_path / "two"], tmp_path)
    one, two = log_rows(tmp_path / "one"), log_rows(tmp_path / "two")
    for name in ("iteration", "reward", "group_std", "frac_zero_std", "val_reward"):
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-6, err_msg=name)
    a, b = (runs.load_checkpoint(tmp_path / name / "adapter.pt", kind="ddpo-adapter")["lora"]
            for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(torch.as_tensor(b[name]), torch.as_tensor(a[name]), rtol=0, atol=1e-5)
    assert any(not torch.equal(a[name], torch.zeros_like(a[name])) for name in a if name.endswith(".B"))
    # figures of the update are those of all samples, not of the share of one process
    assert (one["kl_base"] > 0).all() and (one["ratio_max"] > 1).all()
    for name in ("grad_norm", "kl_base", "first_ratio_error"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-2, err_msg=name)
    for name in ("ratio_min", "ratio_max"):
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=3e-6, err_msg=name)
