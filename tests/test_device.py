"""Whole runs on a pretended GPU: all that must lie on the device does, in training, tables and --prompt."""
import pytest
import torch

from tests import pretend_device as gpu
from tests.run_helpers import load, smaller

LESS = ["--iterations", "1", "--eval-every", "1", "--eval-repeats", "1", "--dataset", "kit", "--tiny"]
RUNS = {"ddpo": ["--best-of", "1"], "latent": ["--space", "latent", "--best-of", "1"],
        "ppo": ["--best-of", "1"], "pareto": [], "stepwise": ["--best-of", "1"]}


def test_the_pretence_finds_mixed_devices():
    with gpu.pretended():
        layer = torch.nn.Linear(3, 4).to("meta")
        x = torch.arange(6.0).reshape(2, 3)
        layer(x.to("meta")).sum().backward()
        assert isinstance(layer.weight.grad, gpu.OnDevice)
        assert torch.equal(layer.bias.grad.cpu(), torch.full((4,), 2.0))
        for mixed in (lambda: layer(x), lambda: x.to("meta") + x, lambda: x[torch.tensor([0], device="meta")],
                      lambda: torch.zeros(2, 3, device="meta").index_put_((torch.tensor([0]),), x[:1]),
                      lambda: torch.rand(2, device="meta", generator=torch.Generator())):
            with pytest.raises(RuntimeError):
                mixed()
        with pytest.raises(TypeError):
            x.to("meta").numpy()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_a_prompt_on_another_device(name, tmp_path, monkeypatch, no_pictures):
    script = load("ddpo" if name == "latent" else name)
    folder, cache = ["--out-dir", str(tmp_path / "run")], ["--cache-dir", str(tmp_path / "cache")]
    with smaller(iterations=2, scorer_iterations=2, vae_iterations=2), gpu.pretended():
        script.main([*LESS, *RUNS[name], *folder, *cache])
        product, = (tmp_path / "run").glob("[ap]*.pt")
        script.main(["--load", str(product), "--prompt", "a man walks", "--out-dir", str(tmp_path / "p")])
    assert len(list((tmp_path / "p").glob("*.npy"))) >= 1
