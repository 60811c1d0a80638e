"""common/training.py: the supervised loop, its cache, minibatches, checks of numbers, several processes."""
import importlib.util
import math
import os
import sys

import pytest
import torch
from torch import nn

from common import NonFiniteError, generator, runs, training
from tests.run_helpers import Forked

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the supervised loop -----------------------------------------------------------------------------------


def line(seed=0):
    """A linear layer of known weights, and the loss of what it should have learnt."""
    layer, wanted = nn.Linear(3, 1), torch.tensor([[1.0, -2.0, 0.5]])
    training.initialise(layer, generator(seed, 0, "initialise"))

    def loss(iteration):
        x = torch.randn(16, 3, generator=generator(seed, iteration, "x"))
        return (layer(x) - x @ wanted.T).square().mean()
    return layer, loss


def learn(layer, loss, **options):
    options = {**dict(iterations=200, lr=0.1), **options}
    return training.supervised("line", layer.parameters(), loss, **options)


def test_the_loss_falls():
    layer, loss = line()
    before, notes = loss(0).item(), learn(layer, loss)
    assert before > 1 and set(notes) == {"loss"} and notes["loss"] < 1e-2
    torch.testing.assert_close(layer.weight, torch.tensor([[1.0, -2.0, 0.5]]), rtol=0, atol=0.05)


def test_notes_are_means_over_the_last_tenth():
    """Of the loss, and of the numbers that come with it; `after` sees the weights when they have moved."""
    weight, seen = nn.Parameter(torch.zeros(1)), []

    def loss(iteration):
        return weight.sum() * 0 + iteration, {"half": iteration / 2}
    notes = training.supervised("x", [weight], loss, iterations=20, lr=0.1, after=seen.append)
    assert notes == {"loss": 18.5, "half": 9.25} and seen == list(range(20))
    assert training.supervised("x", [weight], loss, iterations=0, lr=0.1) == {}
    assert training.supervised("x", [weight], loss, iterations=1, lr=0.1) == {"loss": 0.0, "half": 0.0}


def test_a_seed_is_a_training():
    (a, loss_a), (b, loss_b) = line(), line()
    state = torch.get_rng_state()
    assert learn(a, loss_a, iterations=20) == learn(b, loss_b, iterations=20)
    assert torch.equal(a.weight, b.weight) and torch.equal(torch.get_rng_state(), state)


def test_frozen_weights_stay():
    layer, loss = line()
    layer.bias.requires_grad_(False)
    before = layer.bias.clone()
    learn(layer, loss, iterations=5)
    assert torch.equal(layer.bias, before) and layer.bias.grad is None


@pytest.mark.parametrize("number", (math.nan, math.inf))
def test_a_loss_that_is_no_number_names_the_training(number):
    """And leaves the weights as they were before it."""
    layer, loss = line()
    states = []

    def broken(iteration):
        states.append(layer.weight.clone())
        return loss(iteration) * (number if iteration == 2 else 1.0)
    with pytest.raises(NonFiniteError, match=f"line, iteration 2: loss {number}; mend it"):
        learn(layer, broken, fix="mend it")
    assert len(states) == 3 and torch.equal(layer.weight, states[2]) and not torch.equal(states[1], states[2])


def test_gradients_are_clipped_to_one(monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def watched(self, *args, **options):
        parameters = [p for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
        return step(self, *args, **options)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    layer, loss = line()
    learn(layer, lambda iteration: 1000 * loss(iteration), iterations=3)
    assert norms == pytest.approx([1.0] * 3, abs=1e-4)


def test_one_schedule_for_all():
    """It rises over a twentieth, stands at one, and falls as a cosine to almost nothing."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = training.rise_and_cosine(optimizer, 100), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5 + 95 // 2] == pytest.approx(0.5, abs=0.02) and rates[-1] < 1e-3
    assert all(a >= b for a, b in zip(rates[5:], rates[6:]))


def test_the_rate_of_a_policy():
    rates = [training.rise_and_fall(k, 10, 4) for k in range(10)]
    assert rates == pytest.approx([min(1, (k + 1) / 4) * (1 - k / 10) for k in range(10)])
    assert training.rise_and_fall(0, 10, 0) == 1.0 and 0 < rates[-1] < 0.2


def test_initial_weights_are_those_of_a_generator():
    def build():
        with torch.random.fork_rng(devices=[]):
            return nn.Sequential(nn.Embedding(5, 8), nn.Conv1d(8, 4, 3), nn.Linear(4, 2), nn.LayerNorm(2))
    a, b, c = build(), build(), build()
    state = torch.get_rng_state()
    for model, seed in ((a, 0), (b, 0), (c, 1)):
        training.initialise(model, generator(seed, 0, "initialise"))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from the global stream"
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a[2].weight, c[2].weight)
    assert a[2].weight.abs().max() <= 0.5 and a[1].weight.abs().max() <= 24 ** -0.5
    assert (a[1].bias == 0).all() and (a[2].bias == 0).all() and (a[3].weight == 1).all()


# ---- the cache ---------------------------------------------------------------------------------------------


def test_cache(tmp_path, capsys):
    calls = []

    def build():
        calls.append(1)
        return {"x": torch.ones(2), "pair": (1, 2)}

    def get(key, **options):
        return training.cached(tmp_path, key, build, "base", **options)

    first, second = get({"a": 1}), get({"a": 1})
    assert len(calls) == 1 and torch.equal(first["x"], second["x"])
    assert first["pair"] == second["pair"] == [1, 2]  # the same types, whether built or loaded
    get({"a": 2})
    get({"a": 1}, use_cache=False)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    get({"a": 1})
    assert len(calls) == 4 and capsys.readouterr().out.count("\n") == 1
    get({"a": 1})
    assert len(calls) == 4


SOURCE = '''
"""A room."""
from torch import nn


class Net(nn.Module):
    """A network. SAID"""

    def __init__(self):
        """It begins."""
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2)  # REMARK

    def forward(self, x):
        return self.layer(x)


def halve(x):
    """SAID"""
    # REMARK
    return x / 2
'''


def module(folder, name, said="", remark="", width="4"):
    """SOURCE as a module, with another docstring, another comment or another network."""
    path = folder / f"{name}.py"
    path.write_text(SOURCE.replace("SAID", said).replace("REMARK", remark).replace("WIDTH", width))
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_source_of_a_part_is_what_it_does(tmp_path, monkeypatch):
    """A comment or a docstring trains nothing again; another network does, and so does one part more."""
    made = [module(tmp_path, "plain_room"), module(tmp_path, "explained_room", "Longer.\n\n    Much.", "why"),
            module(tmp_path, "wider_room", width="8")]
    for room in made:  # inspect looks up the file of a class by its module
        monkeypatch.setitem(sys.modules, room.__name__, room)
    plain, explained, wider = ([training.source_of(*parts) for parts in (
        (room,), (room.Net,), (room.halve,), (room.Net, room.halve))] for room in made)
    assert plain == explained
    assert plain[:2] != wider[:2] and plain[2] == wider[2] and plain[3] != wider[3]
    assert plain[3] == plain[1] + plain[2]
    assert "nn.Linear(4, 2)" in plain[1][0] and "begins" not in plain[1][0]


def test_a_comment_trains_nothing_again(tmp_path, monkeypatch):
    """The key of a cache is made of what source_of says."""
    built = []
    for name, options in (("a", {}), ("b", {"remark": "why", "said": "How."}), ("c", {"width": "8"})):
        room = module(tmp_path, f"room_{name}", **options)
        monkeypatch.setitem(sys.modules, room.__name__, room)
        training.cached(tmp_path / "cache", [training.source_of(room.Net)],
                        lambda name=name: built.append(name) or {"x": 1}, "net")
    assert built == ["a", "c"]


# ---- minibatches -------------------------------------------------------------------------------------------


def test_minibatches_split_the_named_samples_over_processes():
    """Every sample is in one minibatch of one process; both processes agree on the sizes."""
    samples = [0, 2, 3, 5, 6, 7, 8, 11]
    plans = [training.minibatches(samples, 2, index, 3, generator(0, 0, "shuffle"))
             for index in (list(range(6)), list(range(6, 12)))]
    for plan in plans:
        assert [size for size, _ in plan] == [4, 4]
        assert all(1 <= len(rows) <= 3 for _, chunks in plan for rows in chunks)
    found = [[6 * rank + row for rows in plans[rank][n][1] for row in rows]
             for n in (0, 1) for rank in (0, 1)]
    assert sorted(sum(found, [])) == samples
    assert len(found[0]) + len(found[1]) == len(found[2]) + len(found[3]) == 4
    whole = training.minibatches(samples, 2, list(range(12)), 0, generator(0, 0, "shuffle"))
    assert sorted(whole[0][1][0]) == sorted(found[0] + found[1])
    assert sorted(whole[1][1][0]) == sorted(found[2] + found[3])


def test_minibatches_keep_samples_apart():
    """In the same minibatches as without, but in no chunk with the others."""
    samples, index, apart = [0, 2, 3, 5, 6, 7, 8, 11], list(range(12)), {2, 6, 7}
    plan = training.minibatches(samples, 2, index, 2, generator(0, 0, "shuffle"), apart)
    whole = training.minibatches(samples, 2, index, 0, generator(0, 0, "shuffle"))
    for (size, chunks), (_, [rows]) in zip(plan, whole):
        assert sorted(sum(chunks, [])) == sorted(rows) and size == 4
        assert all(len({row in apart for row in chunk}) == 1 and len(chunk) <= 2 for chunk in chunks)


# ---- numbers of an iteration -------------------------------------------------------------------------------


def test_sums_add_up_chunk_by_chunk():
    log = training.Sums("loss", "kl")
    for loss, norm in ((torch.tensor(1.0), 2.0), (torch.tensor(3.0), 4)):
        log.add(loss=loss, norm=norm)
    log.add(late=torch.tensor(8.0, requires_grad=True))
    means = log.mean(2)
    assert means == {"loss": 2.0, "kl": 0.0, "norm": 3.0, "late": 4.0}
    assert all(type(value) is float for value in means.values()), "no graph is kept alive"


def test_losses_that_are_not_finite():
    training.check_loss(torch.tensor(1.0), "iteration 3")
    for number in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match=f"iteration 3: loss {number}; lower --lr"):
            training.check_loss(torch.tensor(number), "iteration 3")


def test_gradients_are_clipped_and_checked():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert training.clip_gradients([weight], 1.0, "here") == 5.0
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))
    assert training.clip_gradients([weight], 2.0, "here") == pytest.approx(1.0)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]), msg="a small one stays")
    weight.grad[1] = math.nan
    with pytest.raises(NonFiniteError, match="^iteration 1: gradient norm nan; lower --lr"):
        training.clip_gradients([weight], 1.0, "iteration 1")


def test_rewards_that_are_not_finite_name_the_caption():
    training.check_rewards(torch.tensor([0.1, -2.0]), ["a", "b"], "here: reward")
    with pytest.raises(NonFiniteError, match="here: reward inf for 'b'"):
        training.check_rewards(torch.tensor([0.1, math.inf, math.nan]), ["a", "b", "c"], "here: reward")


def test_bfloat16_inside_float32_outside():
    seen = []

    def forward(x, weight):
        seen.append((x @ weight).dtype)
        return x @ weight
    out = training.in_bfloat16(forward)(torch.ones(2, 2), torch.full((2, 2), 1 / 3))
    assert seen == [torch.bfloat16] and out.dtype == torch.float32
    assert 1e-5 < abs(out[0, 0].item() - 2 / 3) < 1e-2
    assert torch.ones(2, 2).matmul(torch.ones(2, 2)).dtype == torch.float32, "nothing is left switched on"


def test_ratios_of_an_update():
    """How far those of the first chunk are from one, and the range of all."""
    stats = training.ratio_stats([torch.tensor([1.0, 0.75]), torch.tensor([0.5, 1.5])])
    assert stats == {"first_ratio_error": 0.25, "ratio_min": 0.5, "ratio_max": 1.5}
    assert training.ratio_stats([]) == {"first_ratio_error": 0.0, "ratio_min": 1.0, "ratio_max": 1.0}


# ---- several processes -------------------------------------------------------------------------------------

def group():
    """What a process of two does."""
    rank, size = runs.world()
    rows = torch.arange(2.0 * (rank + 1)).reshape(-1, 2) + 10 * rank  # one row on rank 0, two on rank 1
    print(rank, size, training.all_gather_rows(rows).tolist())
    a, b = (torch.zeros(2, requires_grad=True) for _ in range(2))
    (a * (rank + 1.0)).sum().backward()
    if rank == 1:
        (b * 5).sum().backward()
    training.all_reduce_grads([a, b])
    print(a.grad.tolist(), b.grad.tolist())
    print(training.reduce_log({"loss": rank + 1.0, "ratio_min": 0.5 + rank, "ratio_max": 1.5 + rank}))


def test_two_processes_gather_rows_and_sum_gradients():
    env = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    children = [Forked(group, {**env, "RANK": rank}) for rank in "01"]
    gathered = "[[0.0, 1.0], [10.0, 11.0], [12.0, 13.0]]"
    for rank, child in enumerate(children):
        assert child.wait().out.splitlines() == [
            f"{rank} 2 {gathered}", "[3.0, 3.0] [5.0, 5.0]",
            "{'loss': 3.0, 'ratio_min': 0.5, 'ratio_max': 2.5}"], child.errors


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rows = torch.ones(2, 3)
    assert runs.world() == (0, 1) and training.all_gather_rows(rows) is rows
    training.all_reduce_grads([rows])
