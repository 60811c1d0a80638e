"""The benchmark's evaluator and TMR: networks of the released weights, against the official code."""
from pathlib import Path

import pytest
import torch

from common import InputError
from common.datasets import Statistics
from common.published import evaluator, tmr
from tests import parity

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not GOLDEN.exists(), reason="reference files are not here")
@pytest.mark.parametrize("name", ["guo_eval_*.npz", "tmr_enc_*.npz"])
def test_reference_files(name):
    files = sorted(GOLDEN.glob(name))
    assert files
    for path in files:
        rows = parity.check_file(path)
        assert len(rows) >= 10
        assert [row for row in rows if not row[1] <= row[2]] == []


def test_official_evaluator_size_and_order(tmp_path):
    parts = {"movement_encoder": evaluator.MovementEncoder(259, 8, 6),
             "motion_encoder": evaluator.MotionEncoderBiGRU(6, 8, 5),
             "text_encoder": evaluator.TextEncoderBiGRU(hidden_size=8, output_size=5)}
    state = {name: part.state_dict() for name, part in parts.items()}
    scorer = Statistics(torch.zeros(263), torch.ones(263), "scorer")
    path = tmp_path / "finest.tar"
    torch.save({**state, "epoch": 3}, path)
    judge = evaluator.load_official_evaluator(path, scorer)
    motion, lengths = normal(3, 60, 263), torch.tensor([40, 60, 24])
    whole = judge.embed_motion(motion, lengths)
    order = [2, 0, 1]
    assert torch.allclose(whole[order], judge.embed_motion(motion[order], lengths[order]), atol=1e-6)
    assert torch.allclose(whole[0], judge.embed_motion(motion[:1, :40], lengths[:1])[0], atol=1e-6)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="finest.tar"):
        evaluator.load_official_evaluator(path, scorer)
    with pytest.raises(ValueError, match="generator"):
        evaluator.OfficialEvaluator(state, Statistics(torch.zeros(263), torch.ones(263), "generator"))


def test_full_size_parameter_counts():
    """Millions, as in the released checkpoints."""
    count = lambda *modules: [round(sum(p.numel() for p in m.parameters()) / 1e6, 2) for m in modules]
    official = (evaluator.MovementEncoder(259), evaluator.MotionEncoderBiGRU(), evaluator.TextEncoderBiGRU())
    assert count(*official) == [1.84, 15.75, 4.10]
    assert count(tmr.TMREncoder(263), tmr.TMREncoder(768), tmr.TMRDecoder()) == [4.81, 4.94, 6.39]


def test_official_tokens_are_framed_and_padded():
    tokens, count = evaluator.official_tokens(["a/DET"] * 3)
    assert count == 5 and len(tokens) == 22 and tokens[4:6] == ["eos/OTHER", "unk/OTHER"]
    tokens, count = evaluator.official_tokens(["a/DET"] * 30)
    assert count == 22 and tokens[-1] == "eos/OTHER"


@pytest.mark.parametrize("content", [
    {"model": torch.ones(2)}, torch.ones(2), {"movement_encoder": {"main.0.weight": torch.ones(3)}},
    {name: {} for name in ("movement_encoder", "motion_encoder", "text_encoder")}])
def test_other_checkpoints_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "finest.tar")
    with pytest.raises(InputError, match="finest.tar: holds no weights of the evaluator") as caught:
        evaluator.load_official_evaluator(tmp_path / "finest.tar", Statistics(torch.zeros(263),
                                                                              torch.ones(263), "scorer"))
    assert "\n" not in str(caught.value)
