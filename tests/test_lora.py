"""LoRA layers: what is trained, what switching off and loading do."""
import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from common import InputError, lora
from tests.parity import lora as parity_lora

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


class Net(nn.Module):
    """A linear layer, a convolution and a dropout that must stay outside of the adapters."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"query": nn.Linear(6, 8), "value": nn.Linear(6, 8, bias=False)})
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        """x (b t 6) -> (b t 4)"""
        y = torch.tanh(self.inner["query"](x) * self.inner["value"](x))
        return self.out(torch.relu(self.conv(y.transpose(1, 2))).transpose(1, 2))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_(module, seed=0):
    g = generator(seed)
    for parameter in module.parameters():
        parameter.data.uniform_(-0.5, 0.5, generator=g)
    return module


def adapted(rank=3, alpha=6, filled=True):
    """(base, the same with adapters); filled: B drawn at random, so that the adapters matter."""
    base = random_(Net()).eval().requires_grad_(False)  # autograd can change the kernel that torch picks
    model = copy.deepcopy(base).requires_grad_(True)  # freezing is the job of inject
    names = lora.inject(model, "query|value|conv", rank, alpha, generator(1))
    assert names == ["inner.query", "inner.value", "conv"]
    if filled:
        for n, layer in enumerate(lora.adapters(model).values()):
            layer.B.data.uniform_(-1, 1, generator=generator(10 + n))
    return base, model


X = torch.randn(2, 5, 6, generator=generator(7))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="reference files are not here")
def test_reference_values():
    rows = [row for path in sorted(GOLDEN.glob("lora_*.npz")) for row in parity_lora.check(path)]
    assert len(rows) >= 9 and all(error <= tolerance for _, error, tolerance in rows), rows


def test_start_is_exactly_the_base():
    base, model = adapted(filled=False)
    assert torch.equal(model(X), base(X))
    assert all((layer.B == 0).all() and (layer.A != 0).any() for layer in lora.adapters(model).values())


def test_every_adapter_changes_the_output_in_eval_mode_and_gets_a_gradient():
    base, model = adapted()
    for layer in lora.adapters(model).values():
        full = layer.scaling
        with lora.scaled(model, 0.0):
            layer.scaling = full
            assert (model(X) - base(X)).abs().max() > 1e-3
    model(X).square().sum().backward()
    for parameter in lora.parameters(model):
        assert parameter.grad.abs().max() > 0
    trained = {id(parameter) for parameter in lora.parameters(model)}
    assert all((id(parameter) in trained) == parameter.requires_grad for parameter in model.parameters())
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


def test_at_the_start_only_b_gets_a_gradient():
    _, model = adapted(filled=False)
    model(X).square().sum().backward()
    for layer in lora.adapters(model).values():
        assert layer.B.grad.abs().max() > 0 and layer.A.grad.abs().max() == 0


def test_gradients_against_finite_differences():
    _, model = adapted()
    model.double()
    parameters = lora.parameters(model)
    x = X.double()

    def output(*values):
        with torch.no_grad():
            return torch.func.functional_call(model, dict(zip(names, values)), (x,)).square().sum()

    names = [name for name, p in model.named_parameters() if p.requires_grad]
    model(x).square().sum().backward()
    for which, parameter in enumerate(parameters):
        shifted = [[p.detach().clone() for p in parameters] for _ in range(2)]
        shifted[0][which].flatten()[0] += 1e-5
        shifted[1][which].flatten()[0] -= 1e-5
        slope = (output(*shifted[0]) - output(*shifted[1])) / 2e-5
        assert parameter.grad.flatten()[0].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


def test_switched_off_is_the_base_bit_for_bit_and_comes_back():
    base, model = adapted()
    on = model(X)
    with lora.scaled(model, 0.0):
        assert torch.equal(model(X), base(X))
        with lora.scaled(model, 0.0):
            pass
        assert torch.equal(model(X), base(X))  # it was off before, so it stays off
    assert torch.equal(model(X), on) and not torch.equal(on, base(X))
    with pytest.raises(ZeroDivisionError), lora.scaled(model, 0.0):
        raise ZeroDivisionError
    assert torch.equal(model(X), on)


def test_at_part_of_its_strength():
    """The change of the weights is scaled, 0 is the base bit for bit, and the strength comes back."""
    base, model = adapted()
    x = {"inner.query": X, "inner.value": X, "conv": torch.randn(2, 8, 5, generator=generator(8))}
    change = lambda name, layer: layer(x[name]) - layer.base(x[name])
    full, changes = model(X), {name: change(name, layer) for name, layer in lora.adapters(model).items()}
    with lora.scaled(model, 0.0):
        assert torch.equal(model(X), base(X))
    with lora.scaled(model, 0.25):
        assert not torch.equal(model(X), base(X)) and not torch.equal(model(X), full)
        for name, layer in lora.adapters(model).items():
            torch.testing.assert_close(change(name, layer), 0.25 * changes[name], atol=1e-5, rtol=1e-4)
    assert torch.equal(model(X), full)
    with pytest.raises(ZeroDivisionError), lora.scaled(model, 0.5):
        raise ZeroDivisionError
    assert torch.equal(model(X), full)


def test_training_moves_no_base_weight():
    base, model = adapted(filled=False)
    optimizer = torch.optim.AdamW(lora.parameters(model), lr=1e-2)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
    for name, layer in lora.adapters(model).items():
        assert torch.equal(layer.base.weight, base.get_submodule(name).weight)
    assert not torch.equal(model(X), base(X))


def test_state_travels_to_an_equal_model():
    _, model = adapted()
    _, other = adapted(filled=False)
    state = lora.state(model)
    names = ("inner.query", "inner.value", "conv")
    assert set(state) == {f"{name}.{part}" for name in names for part in ("A", "B", "scaling")}
    lora.load(other, state)
    assert torch.equal(other(X), model(X))
    state["conv.A"].zero_()
    assert torch.equal(other(X), model(X))  # copies, not views


def change(action):
    def apply(state):
        if action == "missing":
            del state["conv.B"]
        elif action == "renamed":
            state["convolution.B"] = state.pop("conv.B")
        elif action == "extra":
            state["conv.C"] = torch.zeros(1)
        elif action == "shape":
            state["conv.B"] = state["conv.B"][:, :2]
        return state
    return apply


@pytest.mark.parametrize("action, word", [("missing", "missing conv.B"), ("renamed", "missing conv.B"),
                                          ("renamed", "unknown convolution.B"), ("extra", "unknown conv.C"),
                                          ("shape", r"conv.B is \(8, 2, 1\)")])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(action, word):
    _, model = adapted()
    before = model(X)
    _, other = adapted(filled=False)
    with pytest.raises(InputError, match=word):
        lora.load(model, change(action)(lora.state(other)))
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("rank, alpha, word", [(4, 8, "inner.query.A is"), (3, 3, "scaling is 1.0")])
def test_another_rank_or_alpha_is_refused(rank, alpha, word):
    _, model = adapted()
    _, other = adapted(rank, alpha)
    with pytest.raises(InputError, match=word):
        lora.load(model, lora.state(other))


def test_counts():
    _, model = adapted(rank=3)
    assert lora.count(lora.parameters(model)) == 2 * 3 * (6 + 8) + 3 * (8 * 3 + 8)


def test_same_generator_same_start_and_no_global_numbers():
    before = torch.get_rng_state()
    first, second = (adapted(filled=False)[1] for _ in range(2))
    assert torch.equal(first.conv.A, second.conv.A)
    model = random_(Net())
    state = torch.get_rng_state()
    lora.inject(model, "out", 2, 2, generator())
    assert torch.equal(torch.get_rng_state(), state) and state.shape == before.shape


def test_wrong_use_is_refused():
    with pytest.raises(InputError, match="matches none"):
        lora.inject(Net(), "qery", 2, 2, generator())
    with pytest.raises(InputError, match="rank 0"):
        lora.inject(Net(), "query", 0, 2, generator())
    with pytest.raises(InputError, match="one group"):
        lora.inject(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), "0", 2, 2, generator())


def test_no_dropout_in_the_adapters():
    _, model = adapted()
    assert torch.equal(model.train()(X), model.eval()(X))
