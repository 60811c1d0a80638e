"""results/fronts.py: hypervolumes and the table of tokens by hand, and of finished runs."""
import pytest
import torch

from common import InputError
from results import fronts
from tests.run_helpers import smaller
from tests.test_evaluate import clips, scorers  # noqa: F401  fixtures


def test_fronts_by_hand(capsys, scorers, clips, tmp_path):
    """Two samplers a policy, each with rewards of its own; volumes and their differences are over prompts."""
    def policy(*values):
        def sampler(value):
            return lambda captions, lengths, *asked: (torch.full((len(captions), 8, 263), value), lengths)
        return [sampler(value) for value in values]

    def columns(motion, lengths, captions, real):
        value = motion[:, 0, 0].double()
        return {"a": value * torch.arange(1.0, 1 + len(captions)), "b": 2.0 - value}
    wider = scorers._replace(columns=columns)
    points = fronts.front_points(policy(0.5, 1.0), clips[:2], wider, ("b", "a"))
    assert points.shape == (2, 16, 2) and points[1, 0].tolist() == [1.5, 1.0]
    assert points[1, 15].tolist() == [1.0, 2.0]
    found = fronts.compare_fronts({"start": policy(0.5, 0.5), "tuned": policy(0.5, 1.0)}, clips[:2], wider,
                                  ("a", "b"), tmp_path / "fronts.png")
    # boxes of the two prompts: start .5 x 1.5 and 1 x 1.5, tuned the union with 1 x 1 and 2 x 1
    assert found["start"]["hypervolume"][0] == pytest.approx((0.75 + 1.5) / 2)
    assert found["tuned"]["hypervolume"][0] == pytest.approx((1.25 + 2.5) / 2)
    assert found["tuned"]["less start"] == [pytest.approx(0.75), pytest.approx(12.7062 * 0.25)]
    assert "less tuned" not in found["start"]
    assert found["tuned"]["of the means"][0] == pytest.approx(0.75 * 1.5 + (1.5 - 0.75) * 1.0)
    out = capsys.readouterr().out
    assert "hypervolume of 16 motions of each of 2 prompts" in out
    assert "| tuned | 1.875 +-7.941 |" in out and "| +0.750 +-3.177 |" in out
    assert (tmp_path / "fronts.png").exists()


def test_controllability(capsys):
    table = {"token a": {"a": [1.0, 0.1], "b": [0.2, 0.1]}, "token b": {"a": [0.5, 0.0], "b": [0.1, 0.0]}}
    assert fronts.controllability([table], ("a", "b")).tolist() == [[[1.0, 0.2], [0.5, 0.1]]]
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[:2] == ["| a | 1.000* | 0.200* |", "| b | 0.500 | 0.100 |"]
    assert len(fronts.controllability([{"base": {}}], ("a", "b"))) == 0
    assert capsys.readouterr().out == "", "no tokens, no table"


def table_of(matrix, names):
    """A table with a row for the token of each reward."""
    return {f"token {token}": {name: [value, 0.0] for name, value in zip(names, row)}
            for token, row in zip(names, matrix)}


def test_controllability_of_several_runs(capsys):
    """Means, and on how many diagonals the maximum of a column is; a diagonal of equals wins nothing."""
    names = ("text", "quality", "preference")
    matrices = [[[own, 0.1, 0.3], [0.4, 0.6, 0.3], [0.3, 0.2, 0.5]] for own in (0.9, 0.2)]
    fronts.controllability([table_of(matrix, names) for matrix in matrices], names)
    lines = capsys.readouterr().out.splitlines()
    assert "| text | 0.550* | 0.100 | 0.300 |" in lines and "| quality | 0.400 | 0.600* | 0.300 |" in lines
    assert "| runs in which the diagonal is above the rest | 1 | 2 | 2 |" in lines
    fronts.controllability([table_of([[0.5, 0.5, 0.1], [0.5, 0.4, 0.1], [0.5, 0.3, 0.2]], names)], names)
    assert "| runs in which the diagonal is above the rest | 0 | 0 | 1 |" in capsys.readouterr().out


def test_fronts_of_finished_runs(finished_run, tmp_path, capsys):
    """`python -m results.fronts RUN`: a row for the start and for the run, and a picture."""
    pareto = finished_run("pareto")
    with smaller():
        fronts.main([str(pareto.folder), "--prompts", "4", "--picture", str(tmp_path / "fronts.png")])
    lines = capsys.readouterr().out.splitlines()
    assert "hypervolume of 24 motions of each of 4 prompts, and of the means" in lines
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert rows == ["", "---", "start", "run", "", "---", "text", "quality", "preference",
                    "runs in which the diagonal is above the rest"]
    assert (tmp_path / "fronts.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="--prompts 1: at least 2"):
        fronts.main([str(pareto.folder), "--prompts", "1"])


def test_fronts_are_of_pareto_runs(finished_run):
    with smaller(), pytest.raises(InputError, match="not a run of pareto_motion.py"):
        fronts.main([str(finished_run("ddpo").folder)])
