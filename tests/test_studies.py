"""results/studies.py: each study by its documented command, at toy size, up to where it differs."""
import inspect
import json
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ddpo_motion
import stepwise_motion
from common import InputError, diffusion, evaluate, motion_reward, render, retrieval, runs
from common.datasets import collate
from results import studies, tables
from tests.run_helpers import LITTLE, smaller
from tests.test_evaluate import clips, scorers  # noqa: F401  fixtures

ddpo = pytest.fixture(scope="module")(lambda finished_run: finished_run("ddpo"))


class Reached(Exception):
    """A run has come to its training."""


def documented(name, ddpo, folder, *flags):
    """`python -m results.studies NAME --dataset kit`, with the flags that make it small."""
    argv = [name, "--dataset", "kit", *ddpo.flags, "--out-dir", str(folder), *flags]
    with smaller():
        studies.main(argv)
    return argv


@pytest.fixture
def reach(ddpo, tmp_path, monkeypatch):
    """name, flags -> all that the script's train() is given by a study; it trains nothing."""
    def reached(name, *flags, script=ddpo_motion):
        asked, order = {}, inspect.signature(script.train)

        def train(*given):
            asked.update(order.bind(*given).arguments)
            raise Reached
        with monkeypatch.context() as patch:
            patch.setattr(script, "train", train)
            with pytest.raises(Reached):
                documented(name, ddpo, tmp_path / name, *flags)
        return types.SimpleNamespace(**asked)
    return reached


def val_of(run):
    """Motions of the target's val split with their lengths and captions, as a reward is asked."""
    batch = collate(run.target.splits["val"])
    return batch.motion, batch.lengths, batch.captions


# ---- How a study is made -----------------------------------------------------------------------------------


def test_replaced_puts_back_what_was_there():
    thing = types.SimpleNamespace(name=1)
    with pytest.raises(ZeroDivisionError), studies.replaced(thing, "name", 2):
        assert thing.name == 2
        _ = 1 / 0
    assert thing.name == 1


def test_help_lists_every_study_with_its_line(capsys):
    with pytest.raises(SystemExit) as end:
        studies.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "python -m results.studies NAME" in out
    for name, study in studies.STUDIES.items():
        assert f"  {name} " in out and study.__doc__.splitlines()[0] in out
    with pytest.raises(SystemExit):
        studies.main(["unknown"])


def test_a_study_is_a_run_of_its_own(reach, monkeypatch, ddpo, elsewhere):
    """It says so in args.json, and its folder is not that of a usual run."""
    usual = ddpo_motion.build_reward
    run = reach("other-family")
    args = json.loads((run.folder / "args.json").read_text())
    assert args["command"].startswith("python -m results.studies other-family --dataset kit ")
    assert tables.label(args).startswith("`other-family --dataset kit --tiny --iterations 4")
    assert ddpo_motion.build_reward is usual and runs.prepare.__module__ == "common.runs"
    monkeypatch.setattr(ddpo_motion, "train", lambda *given: (_ for _ in ()).throw(Reached))
    with pytest.raises(Reached), smaller():
        studies.main(["other-family", *ddpo.flags])
    assert [path.name for path in (runs.Path.cwd() / "runs").iterdir()] == ["ddpo_other-family_kit_seed0"]


# ---- Runs of a script --------------------------------------------------------------------------------------


def test_tracker(reach, ddpo, tmp_path):
    """Statistics of a prompt over calls: a mean of the batch at first, of its own once it has come twice."""
    run = reach("tracker")
    rewards = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    first = run.advantages(rewards, ["a", "b"])
    spread = np.std([1, 3, 5, 7]) + 1e-6
    np.testing.assert_allclose(first, (rewards.numpy() - 4) / spread, rtol=1e-6)
    for _ in range(7):
        last = run.advantages(rewards, ["a", "b"])  # 16 rewards of each prompt are known
    np.testing.assert_allclose(last, [[-1, 1], [-1, 1]], rtol=1e-5)
    outlier = run.advantages(torch.tensor([[0.0] * 15 + [100.0]]), ["new"])
    assert outlier.max() < 5 and run.advantages(torch.tensor([[900.0, 1.0]]), ["b"])[0, 0] <= 5
    with pytest.raises(InputError, match="^--resume: the statistics of the tracker are not saved"):
        documented("tracker", ddpo, tmp_path / "tracker", "--resume")


def test_advantages_of_the_tracker_are_clipped():
    known = studies.PromptTracker(buffer_size=32, min_count=2)
    known.rewards["a"] = [0.0] * 31
    assert known.advantages(torch.tensor([[100.0]]), ["a"]).tolist() == [[ddpo_motion.ADV_CLIP]]


def test_tracker_keeps_the_last_rewards():
    known = studies.PromptTracker(buffer_size=3, min_count=3)
    known.update(["a", "b", "a"], [1.0, 2.0, 3.0])
    known.update(["a", "a"], [5.0, 7.0])
    assert known.rewards == {"a": [3.0, 5.0, 7.0], "b": [2.0]}


@pytest.mark.usefixtures("no_pictures", "no_evaluation")
def test_a_run_of_a_study_ends_as_any_other(ddpo, tmp_path):
    """The tracker trains other adapters than the default, from the same base."""
    argv = documented("tracker", ddpo, tmp_path / "run")
    result, = tables.read_results([tmp_path / "run"])
    assert result["command"] == "python -m results.studies " + " ".join(argv)
    mine, usual = ddpo.stored(tmp_path / "run"), ddpo.stored(ddpo.folder)
    assert all(torch.equal(weight, usual["base"][name]) for name, weight in mine["base"].items())
    assert any(not torch.equal(weight, usual["lora"][name]) for name, weight in mine["lora"].items()
               if torch.is_tensor(weight))


def cosines(run, family, number):
    """A reward model out of the cache, and what it says of the target's val split."""
    start = run.start
    with smaller():
        iterations = diffusion.SIZES["joint"]["tiny"].scorer_iterations
    model, _ = retrieval.reward_model([run.source, run.target], family=family, number=number,
                                      target=run.target, iterations=iterations, **start.training())
    return model, model.similarity(*val_of(run))


def test_contrastive(reach):
    """The cosine less how well the motion fits the best of all captions, worked out the other way round."""
    run = reach("contrastive")
    model, cosine = cosines(run, "transformer", 0)
    text = F.normalize(model.embed_text(run.prompts), dim=-1)
    seen = F.normalize(model.embed_motion(*val_of(run)[:2]), dim=-1)
    fits = (10 * seen @ text.T).exp().sum(1).log() / 10
    value = run.scorers.reward(*val_of(run))
    torch.testing.assert_close(value, cosine - fits)
    assert len(run.prompts) > 20 and (value - cosine).abs().min() > 0.1


def test_two_families_and_the_other_one(reach):
    run = reach("two-families")
    _, first = cosines(run, "transformer", 0)
    _, second = cosines(run, "bigru", 2)
    torch.testing.assert_close(run.scorers.reward(*val_of(run)), (first + second) / 2)
    assert (first - second).abs().min() > 1e-4
    other = reach("other-family")
    _, alone = cosines(other, "bigru", 0)
    torch.testing.assert_close(other.scorers.reward(*val_of(other)), alone)


def test_the_reward_of_a_study_may_learn_from_the_source_alone(reach, monkeypatch):
    """--reward-data source reaches it."""
    asked, model = [], retrieval.reward_model
    monkeypatch.setattr(retrieval, "reward_model", lambda domains, **options: (
        asked.append(len(domains)), model(domains, **options))[1])
    reach("other-family", "--reward-data", "source")
    reach("contrastive")
    assert asked == [1, 2]


def test_long_base(reach, monkeypatch):
    trained, supervised = [], diffusion.supervised
    monkeypatch.setattr(diffusion, "supervised", lambda label, *given, **options: (
        trained.append((label, options["iterations"])), supervised(label, *given, **options))[1])
    reach("long-base")
    assert trained == [("base", 2 * LITTLE["iterations"])]


def test_motion_reward(reach, monkeypatch):
    """The cosine in MotionReward's space, whose heads are not trained."""
    fit, made = motion_reward.fit_motion_reward, []
    monkeypatch.setattr(motion_reward, "fit_motion_reward", lambda *given, **options: (
        made.append(fit(*given, **options)), made[-1])[1])
    run = reach("motion-reward")
    (model, notes), motion = made[0], val_of(run)
    cosine = F.cosine_similarity(model.embed_motion(*motion[:2]), model.embed_text(motion[2]), dim=-1)
    torch.testing.assert_close(run.scorers.reward(*motion), cosine)
    assert {"stage 1", "spl", "after"} <= set(notes) and "preference" not in notes


@pytest.fixture(scope="module")
def learners(tmp_path_factory, ddpo):
    """study -> the function that it hands to stepwise_motion.py in place of `learn`."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("update-accum", "update-chain"):
            patch.setattr(stepwise_motion, "main", lambda argv, learn: found.update({argv[0]: learn}))
            studies.main([name, name])
    return found


def walked(learn, losses, lr=0.5):
    """A weight that starts at 1 after a walk with these losses, and the norms that were returned."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=lr)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    norms = [learn(loss(weight), loss is losses[-1], optimizer=optimizer, scheduler=scheduler, where="x")
             for loss in losses]
    return weight.item(), norms, scheduler.last_epoch


LOSSES = [lambda w: 0.2 * w.square().sum(), lambda w: 0.1 * w.sum()]  # gradients 0.4 w and 0.1


def test_update_accum(learners):
    """One step by the sum, 1 - 0.5 * (0.4 + 0.1)."""
    weight, norms, steps = walked(learners["update-accum"], LOSSES)
    assert weight == pytest.approx(0.75) and norms == [None, pytest.approx(0.5)] and steps == 1


def test_update_chain(learners):
    """Two steps by gradients of the start, whereas the script's second one would be of a moved weight."""
    losses = LOSSES[::-1]
    weight, norms, steps = walked(learners["update-chain"], losses)
    assert weight == pytest.approx(1 - 0.5 * 0.1 - 0.5 * 0.4) and steps == 2
    assert norms == [None, pytest.approx((0.1 + 0.4) / 2)]
    assert walked(learners["update-chain"], losses)[0] == weight, "a walk leaves nothing behind"
    at_once, _, _ = walked(stepwise_motion.learn, losses)
    assert at_once == pytest.approx(0.95 - 0.5 * 0.4 * 0.95)


@pytest.mark.usefixtures("no_pictures", "no_evaluation")
@pytest.mark.parametrize("name, updates", (("update-accum", 1), ("update-chain", 2)))
def test_updates_of_stepwise(finished_run, tmp_path, name, updates):
    """By the documented command: a window of two steps is one update of an iteration, or two."""
    documented(name, finished_run("stepwise"), tmp_path / "run", "--iterations", "2")
    assert render.read_csv(tmp_path / "run" / "logs.csv")["updates"].tolist() == [updates, 2 * updates]


# ---- Of finished runs --------------------------------------------------------------------------------------


def test_references(ddpo, capsys):
    """The rows of the run come back to the last bit, beside the base that was trained on target motion."""
    with smaller():
        studies.main(["references", str(ddpo.folder)])
    table = json.loads((ddpo.folder / "references.json").read_text())["target_test"]
    known = ddpo.results["target_test"]
    assert set(table) == {"gt", "base", "tuned", "target base", "gain"}
    assert all(table[row] == known[row] for row in ("gt", "base", "tuned", "gain"))
    assert table["target base"]["judge"] != known["base"]["judge"]
    assert "target base" in capsys.readouterr().out


def test_strengths(ddpo, capsys):
    with smaller():
        studies.main(["strengths", str(ddpo.folder)])
        run = studies.reopen(ddpo.folder)
    log = json.loads((ddpo.folder / "strengths.json").read_text())
    assert (ddpo.folder / "strengths.png").read_bytes().startswith(b"\x89PNG")
    for place, name in ((0, "before"), (4, "after")):
        row = evaluate.evaluate(run.clips, run.scorers, run.samplers[name], purpose="target_test")
        assert log["target_reward"][place] == row["reward"][0] and log["strength"][place] == place / 4
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 8 and lines[0].startswith("| strength | target_reward |")


def test_strength_curve(clips, scorers, tmp_path):
    """A row for each strength; at the data's own strength the real motions come back."""
    def at(strength):
        def sampler(captions, lengths, purpose, repeat):
            return strength * collate(clips).motion, lengths
        return sampler
    pair = types.SimpleNamespace(splits={"test": clips})
    log = studies.strength_curve(tmp_path / "strengths.png", pair, pair, scorers, at)
    assert log["strength"] == list(studies.STRENGTHS) and 1.0 in log["strength"]
    assert {"target_reward", "source_judge"} <= set(log) and "target_foot_skate" not in log
    real = evaluate.evaluate(clips, scorers, compare_with_data=False)
    assert log["target_judge"][log["strength"].index(1.0)] == pytest.approx(real["judge"][0], abs=1e-6)
    assert len(set(log["target_judge"])) > 3 and (tmp_path / "strengths.png").stat().st_size > 1000


def test_what_is_no_finished_run(tmp_path, ddpo):
    for argv, words in (([], "references: name a finished run"), (["--tiny"], "references: name a"),
                        ([str(tmp_path)], "no adapter.pt or policy.pt")):
        with pytest.raises(InputError, match=words):
            studies.main(["references", *argv])
