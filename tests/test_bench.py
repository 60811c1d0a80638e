"""What a rollout and an update cost, in calls and FLOPs; the seconds are in `python -m results.bench`."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ddpo_motion as ddpo
import ppo_motion as ppo
from common import InputError, datasets, diffusion, tokenizer
from results import bench, memory

BATCH, TOKENS = 3, 6


class CountedCalls:
    """`with CountedCalls(model) as rows:` collects the batch size of every forward of the model."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def __enter__(self):
        self.hook = self.model.register_forward_hook(lambda *call: self.rows.append(len(call[-1])))
        return self.rows

    def __exit__(self, *exc):
        self.hook.remove()


def small(**changes):
    args = ddpo.Args(**{"steps": 4, **changes})
    return args, bench.prepare(args, diffusion.Size(width=16, layers=1, heads=2, patch_dims=8), TOKENS)


def roll_out(args, policy):
    lengths = torch.tensor([8, 24, 16])
    return ddpo.sample(args, policy, ["a person walks", "turns left", ""], lengths, 0, "bench", range(BATCH))


@pytest.mark.parametrize("steps", (2, 4, 10))
@pytest.mark.parametrize("order", (1, 2))
@pytest.mark.parametrize(("guidance", "times"), ((1.0, 1), (2.5, 2)))
def test_a_rollout_calls_the_denoiser_once_a_step(steps, order, guidance, times):
    """With guidance twice: with the caption and without."""
    args, policy = small(steps=steps, order=order, guidance_scale=guidance)
    with CountedCalls(policy.model) as calls:
        states, _ = roll_out(args, policy)
    assert calls == [BATCH] * steps * times
    assert states.shape == (BATCH, steps + 1, TOKENS + 2, 8)  # two more, as they overlap


@pytest.mark.parametrize("trained", (1, 3))
@pytest.mark.parametrize("order", (1, 2))
@pytest.mark.parametrize(("guidance", "times"), ((1.0, 1), (2.5, 2)))
def test_rescoring_all_steps_is_one_call(trained, order, guidance, times):
    args, policy = small(order=order, guidance_scale=guidance)
    states, mask = roll_out(args, policy)
    with CountedCalls(policy.model) as calls:
        logp, _ = ddpo.step_logps(policy, states, [""] * BATCH, mask, trained)
    assert calls == [BATCH * trained] * times and logp.shape == (BATCH, trained)


def flops(function, *args):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", (1, 5))
def test_a_cached_rollout_costs_one_forward_pass(batch):
    tokens = 50
    gpt, text = bench.make_gpt(tokens), torch.randn(batch, tokenizer.SIZES["small"].width)
    uniform = torch.full((batch, tokens), 0.5)
    cached = flops(ppo.rollout, gpt, text, uniform, tokens, 1.0)
    once = flops(gpt, torch.zeros(batch, tokens - 1, dtype=torch.long), text)
    # below one: a step sees only what came before, a whole pass multiplies the masked half as well
    assert 0.9 < cached / once <= 1.0
    if batch == 1:  # it counts the same for each row
        assert flops(bench.recompute, gpt, text, uniform, tokens, 1.0) > 20 * once


def test_the_cache_changes_no_token():
    gpt = bench.make_gpt(20)
    text, uniform = bench.draws(gpt, 4, 20)
    whole = bench.recompute(gpt, text, uniform, 20, 1.0)
    assert len(whole.unique()) > 20
    assert torch.equal(ppo.rollout(gpt, text, uniform, 20, 1.0)[0], whole)


def test_counting_ends_with_the_block():
    args, policy = small()
    with CountedCalls(policy.model) as calls:
        pass
    roll_out(args, policy)
    assert calls == []


def test_functions_take_turns():
    order = []
    seconds = bench.interleave((lambda: order.append("A"), lambda: order.append("B")), 5)
    assert order == ["A", "B"] * 5 and [len(s) for s in seconds] == [5, 5]


def test_a_ratio_needs_a_small_spread():
    calm, wild = [1.0, 1.1, 1.2], [0.5, 0.5, 0.61]
    assert bench.spread(calm) == pytest.approx(0.2)
    assert bench.report("AB", ([3.0, 3.3], [2.0, 2.2]))[-1] == "ratio 1.500"
    lines = bench.report("AB", ([1.0, 1.1], wild))
    assert "min 0.5000 s, spread 22%, 3 rounds" in lines[1]
    assert lines[-1].startswith("no ratio") and not any("ratio 2" in line for line in lines)


def test_command_line(capsys):
    bench.main(["rollout", "--batch", "2", "--tokens", "3", "--gpt-tokens", "4", "--rounds", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert "1 thread(s)" in lines[0] and "batch 2, 3 tokens of 4 frames, 5 steps" in lines[0]
    size = diffusion.SIZES["joint"]["small"]
    assert f"width {size.width}, {size.layers} layers" in lines[0] and "parameters" in lines[0]
    assert len(lines) == 14 and "5 rounds" in lines[2] and "ratio" in lines[3]
    for first, batch in ((5, 1), (10, 32)):
        assert lines[first].startswith(f"batch {batch}, 4 tokens") and "100.0 % of the tok" in lines[first]
        assert "5 rounds" in lines[first + 2] and "ratio" in lines[first + 3]
    with pytest.raises(InputError, match="--rounds"):
        bench.main(["rollout", "--rounds", "4"])


def test_the_bench_of_the_selection(capsys):
    bench.main(["selection", "--rounds", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "64 prompts x 3 tokens x 32 motions; 384 motions of 25 tokens" and "ratio" in lines[3]


@pytest.mark.usefixtures("one_thread")
def test_what_the_methods_keep_for_their_backward_pass(capsys, tmp_path):
    """The whole update, reward included: easytune to the byte the same for any number of steps, the chain
    with a constant slope; what is fixed in length stops growing; checkpoints cost states and one step."""
    saved = memory.measure_memory((1, 3, 5, 7), 2, 4, tmp_path / "memory.png")
    assert len(set(saved["easytune"])) == 1 and len(set(saved["refl"])) == 1
    chain, slope = saved["draft"], saved["draft"][2] - saved["draft"][1]
    assert chain[3] - chain[2] == pytest.approx(slope) == chain[1] - chain[0] and slope > 0
    assert saved["draft 2"][1] == saved["draft 2"][3] < chain[1]
    assert saved["drtune 5"][3] < chain[3] and saved["alignprop"][3] < chain[3]
    assert (saved["draft + checkpoints"][3] - saved["draft + checkpoints"][2]) < 0.1 * slope
    assert all(values[0] == pytest.approx(saved["easytune"][0], rel=0.02) for name, values in saved.items()
               if "checkpoints" not in name), "with one step they are one"
    assert "easytune" in capsys.readouterr().out and (tmp_path / "memory.png").stat().st_size > 5000


def test_snr_law(tmp_path, capsys):
    """The figures of the specification, and a network that obeys them."""
    law = bench.snr_law(10, tmp_path / "snr.png")
    known = {"linear, linspace (ours)": (0.078, 0.21, 0.63, 3.3),
             "linear, karras (StableMoFusion)": (0.28, 3.8, 87, 4907),
             "cosine, linspace (MDM)": (0.43, 0.92, 2.6, 13),
             "scaled_linear, linspace, noise (MLD)": (0.47, 0.48, 0.56, 0.88)}
    assert set(law) == set(known)
    for name, values in known.items():
        assert law[name][5:].tolist() == pytest.approx(values, rel=0.03), name
    assert capsys.readouterr().out.count("within 0.") == 4
    assert (tmp_path / "snr.png").stat().st_size > 1000


def test_lapped_tokens_do_not_hiccup(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = datasets.load_dataset("humanml3d", cache_dir=tmp_path, clips=160)
    capsys.readouterr()
    found = bench.hiccups(data, clips=6, noises=(0.0, 0.3))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[1] == "| tokens | noise 0: jerk, skate | noise 0.3: jerk, skate |"
    assert found["PatchCodec", 64, 0.3][0] > 3 * found["LappedCodec", 64, 0.3][0]
