"""results/tables.py: tables of hand-made runs."""
import json
import math

import numpy as np
import pytest

from common import InputError, evaluate, runs
from results import tables


def write_results(folder, seed, base, gain, judge, seconds, memory):
    """A run folder with a results.json of two columns; judge [nan, ...] becomes a string in it."""
    table = {"base": {"reward": [base, 0.01], "judge": judge}, "gain": {"reward": gain, "judge": [0.1, 0.2]}}
    folder.mkdir()
    runs.save_json(folder / "results.json", {
        "command": f"python ddpo_motion.py --seed {seed}", "seed": seed, "target_test": table,
        "args": {"seed": seed, "base_seed": seed},
        "data": {"source": "embedded humanml3d", "target": "embedded kit"},
        "seconds": {"rollout": seconds}, "peak_memory_mb": memory})
    return folder


def test_summary_of_two_seeds(tmp_path):
    folders = [write_results(tmp_path / "a", 0, 0.2, [0.30, 0.05], [0.5, 0.0], 10.0, 700.0),
               write_results(tmp_path / "b", 1, 0.6, [0.10, 0.05], [math.nan, 0.0], 20.0, 900.0)]
    lines = tables.summary(folders).splitlines()
    assert lines[0] == "2 run(s), seed/base seed 0/0, 1/1; data: embedded humanml3d -> embedded kit"
    assert "    python ddpo_motion.py --seed 1" in lines and "**target, test**" in lines
    # 0.2 and 0.6: mean 0.4, standard error 0.2; 0.3 and 0.1: mean 0.2, standard error 0.1; t is 12.706
    assert "| base | 0.400 +-2.541 | 0.500 |" in lines
    assert "| gain | +0.200 +-1.271 | +0.100 +-0.000 |" in lines
    assert "In every run beyond its own 95 % interval over prompts: up reward; down nothing." in lines
    assert lines[-1] == "Seconds (mean): rollout 15; peak memory 900 MB."


def test_summary_claims_a_gain_only_if_every_run_has_it(tmp_path):
    folders = [write_results(tmp_path / "a", 0, 0.2, [0.30, 0.05], [0.5, 0.0], 1.0, 1.0),
               write_results(tmp_path / "b", 1, 0.2, [0.04, 0.05], [0.5, 0.0], 1.0, 1.0)]
    assert "prompts: up nothing; down nothing." in tables.summary(folders)
    single = tables.summary(folders[:1])
    assert "prompts: up reward; down nothing." in single
    assert "| gain | +0.300 +-0.050 |" in single, "one run: its own interval"


def test_table_by_check(tmp_path, capsys):
    for name, walk in (("a", 0.5), ("b", 0.25)):
        (tmp_path / name).mkdir()
        rows = {who: {"fid": [0.1, 0.0], "checks": {"bow True": [share, 4], "gait walk": [walk, 6]}}
                for who, share in (("base", 0.0), ("tuned", 1.0))}
        runs.save_json(tmp_path / name / "results.json", {
            "data": {"target": "kit"}, "command": "python x.py",
            "target_test": rows | {"gain": {"reward": [0.1, 0.0]}}})
    tables.main([str(tmp_path / "a"), str(tmp_path / "b"), "--checks", "target_test"])
    assert capsys.readouterr().out.splitlines() == [
        "| asked for | motions | base | tuned |", "| --- | --- | --- | --- |",
        "| gait walk | 6 | 0.38 | 0.38 |", "| bow True | 4 | 0.00 | 1.00 |"]
    with pytest.raises(InputError, match="--checks other: .*a has no checks in such a table"):
        tables.main([str(tmp_path / "a"), "--checks", "other"])


def test_costs_of_runs_of_any_data(tmp_path, capsys):
    for name, rollout, kept in (("a", 60.0, 90.0), ("b", 120.0, 0.0)):
        (tmp_path / name).mkdir()
        runs.save_json(tmp_path / name / "results.json", {
            "command": f"python x.py {name}|", "data": name, "peak_memory_mb": 99.6,
            "seconds": {"base": kept, "rollout": rollout}})
    tables.main([str(tmp_path / "a"), str(tmp_path / "b"), "--costs"])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| `python x.py a\\|` | 2.5 | 1.5 | 100 |", "| `python x.py b\\|` | 2.0 | 0.0 | 100 |",
        "| sum of 2 | 4 | 2 |  |"]


def test_one_row_each(tmp_path):
    for name, fid, flags in (("a", 0.25, "--lr 0"), ("b", 0.5, "--critic shared")):
        gain = {name: [0.1 * k, 0.01] for k, name in enumerate(evaluate.FIRST)}
        (tmp_path / name).mkdir()
        runs.save_json(tmp_path / name / "results.json", {
            "command": f"python ppo_motion.py {flags}", "args": {"flags": flags}, "data": {"target": "kit"},
            "paired_test": {"base": {"fid": [0.125, 0.0]}, "tuned": {"fid": [fid, 0.1]}, "gain": gain}})
    head, _, base, first, second = tables.one_row_each([tmp_path / "a", tmp_path / "b"],
                                                        "paired_test").splitlines()
    assert head == "| flags | fid | reward, gain | judge, gain | oracle, gain | oracle_all, gain |"
    assert base == "| base | 0.125 | - | - | - | - |"
    assert first == "| `--lr 0` | 0.250 | +0.000 +-0.010 | +0.100 +-0.010 | +0.200 +-0.010 | +0.300 +-0.010 |"
    assert second.startswith("| `--critic shared` | 0.500 |")
    file = tmp_path / "b" / "results.json"  # another sampler: where it starts is told too
    file.write_text(file.read_text().replace("0.125", "0.0625"))
    rows = tables.one_row_each([tmp_path / name for name in "ab"], "paired_test").splitlines()
    assert rows[2:] == [base, first, "| base of the next | 0.062 | - | - | - | - |", second]
    with pytest.raises(InputError, match="--each other: .*b has no such table"):
        tables.one_row_each([tmp_path / "b"], "other")


@pytest.mark.parametrize("command, shown", [
    ("python ddpo_motion.py --dataset kit --seed=2 --out-dir 'my runs/a b' --lr 1", "--dataset kit --lr 1"),
    ("python ddpo_motion.py --dataset 'my data' --overwrite --no-cache --tiny", "--dataset 'my data' --tiny"),
    ("python -m results.studies tracker --threads 1 --prompts 3", "tracker --prompts 3")])
def test_a_label_has_what_makes_another_setting(command, shown):
    assert tables.label({"command": command}) == f"`{shown}`"


@pytest.mark.parametrize("content", ('{"loss": 3}', "[1]", "3"))
def test_a_foreign_results_json_is_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match="results.json: not written by one of the scripts here"):
        tables.summary([tmp_path])


def test_seeds_share_a_row(tmp_path):
    for seed, gain in ((0, 0.1), (1, 0.3)):
        (tmp_path / str(seed)).mkdir()
        values = {"text": [0.5, 0.0], "fid": [0.2 * seed, 0.0], "speed": [1.0, 0.0]}
        runs.save_json(tmp_path / str(seed) / "results.json", {
            "command": f"python pareto_motion.py --dataset kit --seed {seed} --alpha 0", "data": {},
            "args": {"seed": seed, "base_seed": seed, "out_dir": str(seed), "alpha": 0.0},
            "paired_test": {"base": values, "tuned": values, "gain": {"judge": [gain, 0.01]}}})
    head, _, base, row = tables.one_row_each([tmp_path / "0", tmp_path / "1"], "paired_test").splitlines()
    assert head == "| flags | fid | speed | judge, gain |"
    assert base == "| base | 0.000 | 1.000 | - |"
    assert row == "| `--dataset kit --alpha 0` | 0.100 +-1.271 | 1.000 +-0.000 | +0.200 +-1.271 |"


def test_a_row_each_has_a_dash_for_what_a_run_does_not_know(tmp_path):
    for name, flags, more in (("a", "--method refl", {"preference": [0.5, 0.1]}), ("b", "--dataset kit", {})):
        (tmp_path / name).mkdir()
        table = {"base": {"fid": [0.3, 0.0]}, "tuned": {"fid": [0.1, 0.0]}}
        table["gain"] = {"judge": [0.2, 0.1], **more}
        runs.save_json(tmp_path / name / "results.json", {
            "command": f"python x.py {flags}", "args": {"flags": flags}, "data": {"target": "kit"},
            "target_test": table})
    rows = tables.one_row_each([tmp_path / "a", tmp_path / "b"], "target_test").splitlines()
    assert rows[0] == "| flags | fid | judge, gain | preference, gain |"
    assert rows[3:] == ["| `--method refl` | 0.100 | +0.200 +-0.100 | +0.500 +-0.100 |",
                        "| `--dataset kit` | 0.100 | +0.200 +-0.100 | - |"]


@pytest.fixture
def three_runs(tmp_path):
    """Two seeds of one method and a run of another, with a look at val in every second row."""
    for name, flags, calls in (("a", "--method refl --seed 0", 10), ("b", "--method refl --seed 1", 10),
                               ("c", "--method draft", 25)):
        (tmp_path / name).mkdir()
        runs.save_json(tmp_path / name / "results.json", {
            "command": f"python stepwise_motion.py {flags}", "data": {"target": "kit"},
            "args": {"method": flags.split()[1], "seed": int(flags[-1]) if name < "c" else 0}})
        rows = ["iteration,samples,updates,calls,val_judge,total"] + [
            f"{k},{k},{2 * k},{calls * (k + 1)},{'' if k % 2 == 0 else k + (name == 'b')},1"
            for k in range(6)]
        (tmp_path / name / "logs.csv").write_text("\n".join(rows) + "\n")
    return [tmp_path / name for name in "abc"]


def test_looks_at_equal_cost(three_runs):
    """Of each run the last look within what the shortest one came to; seeds share a row."""
    a, _, c = three_runs
    head, _, refl, draft = tables.at_equal(three_runs, "calls").splitlines()
    assert head == "| flags | calls | val_judge |"
    assert refl == "| `--method refl` | 60 | 5.500 +-6.353 |"
    assert draft == "| `--method draft` | 50 | 1.000 |", "its next look, at 100, is beyond 60"
    with pytest.raises(InputError, match="a: its log has no column kl"):
        tables.at_equal([a], "kl")
    (a / "logs.csv").write_text("iteration,calls,val_judge,val_fid\n0,200,1,2\n")
    (c / "logs.csv").write_text("iteration,calls,val_judge\n0,50,1\n1,200,4\n")
    assert tables.at_equal([a, c], "calls").splitlines()[-1] == "| `--method draft` | 200 | 4.000 | - |"
    (c / "logs.csv").write_text("iteration,calls,val_judge\n0,201,1\n")
    with pytest.raises(InputError, match="--at calls: .*c had no look before 200"):
        tables.at_equal([a, c], "calls")


def test_cost_of_a_level(three_runs, capsys):
    head, _, refl, draft = tables.until(three_runs, "val_judge", 3.5).splitlines()
    assert head == "| flags | samples | updates | calls | val_judge >= 3.5 in |"
    assert refl == "| `--method refl` | 4 (3 to 5) | 8 (6 to 10) | 50 (40 to 60) | 2 of 2 |"
    assert draft == "| `--method draft` | 5 (5 to 5) | 10 (10 to 10) | 150 (150 to 150) | 1 of 1 |"
    tables.main([*map(str, three_runs), "--until", "val_judge=5.5"])
    assert [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["5 (5 to 5)", "10 (10 to 10)", "60 (60 to 60)", "1 of 2 |"], ["-", "-", "-", "0 of 1 |"]]
    for wrong in ("val_judge", "val_judge=high"):
        with pytest.raises(InputError, match="--until .*: COLUMN=LEVEL"):
            tables.main([str(three_runs[0]), "--until", wrong])
    with pytest.raises(InputError, match="a: its log has no column val_oracle"):
        tables.main([str(three_runs[0]), "--until", "val_oracle=1"])
    (three_runs[0] / "logs.csv").write_text("iteration,val_judge\n0,9\n")
    with pytest.raises(InputError, match="a: its log has no column samples"):
        tables.until(three_runs[:1], "val_judge", 1.0)


@pytest.mark.parametrize("content", (None, "", "{"))
def test_summary_of_an_unfinished_run_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match="results.json: cannot be read") as caught:
        tables.summary([tmp_path])
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_command_line(tmp_path, capsys):
    folder = write_results(tmp_path / "a", 7, 0.2, [0.30, 0.05], [0.5, 0.0], 1.0, 1.0)
    tables.main([str(folder)])
    assert "1 run(s), seed/base seed 7/7" in capsys.readouterr().out
    with pytest.raises(InputError, match="--each nothing"):
        tables.main([str(folder), "--each", "nothing"])
    columns = ["iteration", *tables.CURVES]
    (folder / "logs.csv").write_text("\n".join([",".join(columns)] + [
        ",".join([str(k)] + [str(0.1 * k)] * (len(columns) - 1)) for k in range(4)]) + "\n")
    tables.main([str(folder), "--curves", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "results.json").read_text())["seed"] == 7


# ---- What a run is called, and what it costs ---------------------------------------------------------------


def ran(command, **args):
    return {"command": command, "args": args}


def test_a_setting_is_told_by_its_arguments_and_its_study():
    """Not by the text of a command line: the same arguments in another order are the same setting."""
    one = ran("python ddpo_motion.py --lr 1 --seed 2", lr=1.0, seed=2, out_dir="a", threads=1)
    two = ran("python ddpo_motion.py --lr 1.0 --out-dir b", lr=1.0, seed=0, out_dir="b", threads=2)
    study = ran("python -m results.studies tracker --lr 1", lr=1.0, seed=0)
    assert tables.setting_of(one) == tables.setting_of(two) != tables.setting_of(study)
    assert tables.setting_of(one) != tables.setting_of(ran("python ddpo_motion.py", lr=2.0))
    assert tables.label(study) == "`tracker --lr 1`" and tables.label(one) == "`--lr 1`"
    long = "--base-seed 1 --seed=3 --no-cache --lr 2 --overwrite --data-root x --tiny --device cpu"
    assert tables.label(ran(f"python ddpo_motion.py {long}")) == "`--lr 2 --tiny`"
    assert tables.label(ran("python ppo_motion.py")) == "``"


def test_what_an_iteration_costs():
    """An example by hand: 24 prompts of 16 motions in 5 steps, 128 of them trained in 4 steps."""
    args = dict(prompts=24, samples=16, kept_samples=128, steps=5, skip_last=1, minibatches=2, kl_coef=0.02,
                guidance_scale=1.0)
    assert tables.costs_of(args) == {"samples": 384, "updates": 2, "calls": 384 * 5 + 128 * 4 * 4}
    assert tables.costs_of(args | {"kl_coef": 0.0})["calls"] == 384 * 5 + 128 * 4 * 3
    assert tables.costs_of(args | {"kept_samples": 0})["calls"] == 384 * 5 + 384 * 4 * 4
    assert tables.costs_of(args | {"guidance_scale": 2.5})["calls"] == 2 * (384 * 5 + 128 * 4 * 4)


def test_costs_that_a_log_does_not_have(tmp_path):
    """Those of ddpo_motion.py follow from its arguments; stepwise_motion.py counts calls itself."""
    log = {"iteration": np.array([0.0, 1.0]), "calls": np.array([7.0, 9.0])}
    known = tables.with_costs(log, ran("python stepwise_motion.py", prompts=3, window=1))
    assert known["samples"].tolist() == [3.0, 6.0] and known["calls"].tolist() == [7.0, 9.0]
    args = dict(prompts=2, samples=4, kept_samples=0, steps=3, skip_last=1, minibatches=2, kl_coef=0.0,
                guidance_scale=1.0)
    known = tables.with_costs({"iteration": log["iteration"]}, ran("python ddpo_motion.py", **args))
    assert known["calls"].tolist() == [72.0, 144.0] and known["updates"].tolist() == [2.0, 4.0]


def test_the_trade_off_is_drawn(tmp_path):
    """The looks of two runs over what is plausible, from their log and table."""
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        physics = {name: [1.0, 0.0] for name in ("speed", "jerk", "foot_skate")}
        runs.save_json(folder / "results.json", {
            "command": "python stepwise_motion.py", "data": {"source": "a", "target": "b"},
            "args": {"seed": seed, "base_seed": seed, "prompts": 2, "window": 0}, "seconds": {"update": 1.0},
            "peak_memory_mb": 1.0, "seed": seed,
            "target_val": {"gt": physics, "base": physics | {"oracle": [0.5, 0.0]}, "gain": {}}})
        (folder / "logs.csv").write_text(
            "# stamp\niteration,calls,updates,val_judge,val_oracle,val_speed,val_jerk,val_foot_skate\n"
            "0,1,1,,,,,\n1,2,2,0.6,0.7,1.1,1.2,1.9\n")
    tables.main([str(tmp_path / "0"), str(tmp_path / "1"), "--tradeoff", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").stat().st_size > 5000
