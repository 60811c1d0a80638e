"""The algorithm of stepwise_motion.py against closed forms and identities, and the mutants that must not
survive. Reference values are in tests/parity/stepwise.py."""
import copy
from types import SimpleNamespace

import pytest
import torch

import stepwise_motion as sw
from common import InputError, datasets, denoising, generator, lora, runs, samplers, training
from results import memory
from tests import reference

STEPS, CAPTIONS = 6, ["a person walks forward", "someone turns left slowly", "a man waves"]
pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape, name="draw"):
    return torch.randn(shape, generator=generator(0, 0, name), dtype=torch.float64)


# ---- a network with few weights, in float64 ----------------------------------------------------------------


class Small:
    """e = tanh(x A + time B) C, a target to be reached, and gradients as one vector."""

    def __init__(self, steps=STEPS):
        self.weights = [(0.4 * draw(*shape, name=f"weight {k}")).requires_grad_()
                        for k, shape in enumerate(((4, 8), (1, 8), (8, 4)))]
        self.x, self.target, self.steps = draw(5, 4, name="x"), draw(5, 4, name="target"), steps
        self.reads = []

    def network(self, x, i):
        self.reads.append(x.requires_grad)
        a, b, c = self.weights
        return torch.tanh(x @ a + (i + 1) / self.steps * b) @ c

    def loss(self, z):
        return 0.5 * (z - self.target).square().sum(-1).mean()

    def gradient(self, loss, keep=False):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.weights, retain_graph=keep)])

    def run(self, route, table):
        """-> {judged step: (what was judged, gradient of its loss)}, last state"""
        found = {}

        def judge(i, z, e, trail):
            found[i] = z.detach(), self.gradient(self.loss(z))
        return found, sw.denoise(self.network, table, self.x, route, judge)


def ddim(prediction="epsilon", steps=STEPS):
    return sw.diffusion_table(samplers.make_grid("scaled_linear", steps, "leading", "sigma_min"), prediction)


def every(kind, steps=STEPS):
    return sw.easytune(steps, range(steps), [kind] * steps)


# ---- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ("sample", "epsilon", "v", "velocity"))
def test_a_perfect_answer_is_read_as_the_motion(asked):
    """What `corrupt` asks of the base and what the table makes of the answer belong together."""
    steps, x_start, noise = 20, draw(20, 3, 4, name="start"), draw(20, 3, 4, name="noise")
    if asked == "velocity":
        table = sw.flow_table(steps)
    else:
        table = sw.diffusion_table(samplers.make_grid("linear", steps), asked)
    x_t, wanted = denoising.corrupt(x_start, noise, table.timesteps.round().long(), "linear", asked)
    m = table.p[:, None, None] * x_t + table.q[:, None, None] * wanted
    assert torch.allclose(m, x_start, atol=1e-4)
    x_next = table.a[:, None, None] * x_t + table.b[:, None, None] * wanted
    if asked == "velocity":
        t = torch.arange(1, steps + 1, dtype=torch.float64)[:, None, None] / steps
        assert torch.allclose(x_next, t * x_start + (1 - t) * noise)
    else:  # DDIM keeps the noise that the answer implies
        grid = samplers.make_grid("linear", steps)
        expected = grid.alpha[1:, None, None] * x_start + grid.sigma[1:, None, None] * noise
        assert torch.allclose(x_next, expected, atol=1e-4)
    assert table.level[0] > 0.9 and table.level[-1] == 0 and (table.level.diff() < 0).all()


def test_the_three_answers_walk_the_same_way():
    """A network that answers with the motion, converted to epsilon and v, makes the same steps."""
    grid = samplers.make_grid("linear", 8)
    small, found = Small(8), {}
    for prediction in ("sample", "epsilon", "v"):
        def converted(x, i):
            m, alpha, sigma = small.network(x, i), grid.alpha[i], grid.sigma[i]
            noise = (x - alpha * m) / sigma
            return {"sample": m, "epsilon": noise, "v": alpha * noise - sigma * m}[prediction]
        table = sw.diffusion_table(grid, prediction)
        with torch.no_grad():
            found[prediction] = sw.denoise(converted, table, small.x, sw.Route((False,) * 8, {}))
    assert torch.allclose(found["sample"], found["epsilon"]) and torch.allclose(found["sample"], found["v"])
    x = small.x
    for i in range(8):  # and those of the sampler that evaluation uses
        with torch.no_grad():
            x = reference.ddim_step(grid, i, x, small.network(x, i), eta=0.0)[0]
    assert torch.allclose(found["sample"], x)


# ---- routes ------------------------------------------------------------------------------------------------


def test_with_one_step_of_flow_all_methods_are_one():
    small, table = Small(1), sw.flow_table(1)
    made = [every("x0hat", 1), every("xt", 1), sw.refl(1, 0), sw.draft(1, 1), sw.drtune(1, {0}, 0),
            sw.alignprop_bernoulli([True])]
    gradients = [small.run(route, table)[0][0][1] for route in made]
    assert all(torch.allclose(gradients[0], g, rtol=1e-12) for g in gradients) and gradients[0].norm() > 0


def test_a_step_of_easytune_is_refl_of_that_step():
    small, table = Small(), ddim()
    rows, _ = small.run(every("x0hat"), table)
    for k in range(STEPS):
        z, gradient = small.run(sw.refl(STEPS, k), table)[0][k]
        assert torch.equal(z, rows[k][0]) and torch.allclose(gradient, rows[k][1], rtol=1e-12)


def test_refl_ends_at_its_step():
    small = Small()
    small.run(sw.refl(STEPS, 2), ddim())
    assert len(small.reads) == 3


def test_drtune_is_a_weighted_sum_over_steps():
    """Input stopped, x not: step i counts with (product of later a) b_i, which telescopes for epsilon."""
    small, table = Small(), ddim()
    route = sw.drtune(STEPS, set(range(STEPS)), 0)._replace(judged={STEPS - 1: "xt"})
    found, final = small.run(route, table)
    states, x = [], small.x
    with torch.no_grad():
        for i in range(STEPS):
            states.append(x)
            x = table.a[i] * x + table.b[i] * small.network(x, i)
    towards = (x - small.target) / len(x)  # gradient of the loss in x_N
    after = [table.a[i + 1:].prod() for i in range(STEPS)]
    own = sum(after[i] * table.b[i] * (small.network(states[i], i) * towards).sum() for i in range(STEPS))
    assert torch.allclose(found[STEPS - 1][1], small.gradient(own), rtol=1e-10)
    grid = samplers.make_grid("scaled_linear", STEPS, "leading", "sigma_min")
    s = grid.sigma / grid.alpha
    assert torch.allclose(torch.stack(after) * table.b, grid.alpha[-1] * s.diff(), rtol=1e-10)


def test_the_chain_agrees_with_finite_differences():
    small, table = Small(), ddim()
    (_, gradient), = small.run(sw.draft(STEPS, STEPS), table)[0].values()

    def value():
        with torch.no_grad():
            return small.loss(sw.denoise(small.network, table, small.x, sw.Route((False,) * STEPS, {})))
    numbers = []
    for weight in small.weights:
        for place in range(weight.numel()):
            flat, here = weight.data.view(-1), []
            for sign in (1, -1):
                flat[place] += sign * 1e-6
                here.append(value())
                flat[place] -= sign * 1e-6
            numbers.append((here[0] - here[1]) / 2e-6)
    assert torch.allclose(gradient, torch.stack(numbers), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("route, reads", [
    (every("x0hat"), [False] * 6), (sw.draft(6, 6), [False] + [True] * 5),
    (sw.draft(6, 2), [False] * 5 + [True]), (sw.refl(6, 3), [False] * 4),
    (sw.drtune(6, {0, 2, 4}, 5), [False] * 6),
    (sw.alignprop_bernoulli([False, True, False, False, True, False]), [False] * 2 + [True] * 4)])
def test_where_gradients_enter_the_network(route, reads):
    """Whether what step i reads depends on the weights."""
    small = Small()
    small.run(route, ddim())
    assert small.reads == reads


def test_guiding_the_answer_is_guiding_the_guess():
    table, x = ddim(), draw(5, 4)
    e_text, e_null, w = draw(5, 4, name="text"), draw(5, 4, name="null"), 2.5
    for i in range(STEPS):
        p, q = table.p[i], table.q[i]
        guided = p * x + q * (e_null + w * (e_text - e_null))
        m_text, m_null = p * x + q * e_text, p * x + q * e_null
        assert torch.allclose(guided, m_null + w * (m_text - m_null), rtol=1e-10)


# ---- what is drawn -----------------------------------------------------------------------------------------


def settings(*flags):
    return runs.parse_args(sw.Args, sw.TINY, list(map(str, flags)), sw.__doc__)


def routes(*flags, count=40):
    args = settings(*flags)
    sw.check_args(args)
    return [sw.draw_route(args, k / count, generator(0, k, "route")) for k in range(count)]


def test_windows_slide_and_stay_inside():
    made = routes("--steps", 10, "--window", 4, "--sweep", 0.5)
    starts = [min(route.judged) for route in made]
    assert starts[0] == 0 and starts[20:] == [6] * 20 and starts == sorted(starts) and len(set(starts)) == 7
    for route in made:
        window = sorted(route.judged)
        assert window == list(range(window[0], window[0] + 4)) and window[-1] < 10
        assert [i for i, graph in enumerate(route.graph) if graph] == window
        assert route.stop_input and route.stop_state
    assert {min(route.judged) for route in routes("--steps", 10, "--window", 4)} == {6}
    assert {tuple(route.judged) for route in routes("--steps", 7)} == {(3, 4, 5, 6)}  # half, rounded up


def test_what_easytune_judges():
    kinds = {flag: [*routes("--steps", 8, "--window", 4, "--reward-input", flag)[0].judged.values()]
             for flag in ("x0hat", "xt", "mixed")}
    assert kinds == {"x0hat": ["x0hat"] * 4, "xt": ["xt"] * 4, "mixed": ["x0hat"] * 2 + ["xt"] * 2}


def test_draws_of_the_chain_methods():
    exits = {max(route.judged) for route in routes("--method", "refl", "--steps", 20, "--window", 5)}
    assert exits == set(range(15, 20))
    assert routes("--method", "draft", "--steps", 6)[0] == sw.draft(6, 6)
    assert routes("--method", "draft", "--steps", 6, "--window", 2)[0] == sw.draft(6, 2)
    cuts = [route.graph.index(True) for route in routes("--method", "alignprop", "--steps", 20, count=400)]
    assert min(cuts) >= 1 and max(cuts) == 19 and abs(sum(cuts) / 400 - 0.84 * 20) < 0.4
    masks = [route.graph for route in routes("--method", "alignprop-bernoulli", "--steps", 20, count=400)]
    assert min(map(sum, masks)) == 1 and 0.09 < sum(map(sum, masks)) / 8000 < 0.13
    flow = ("--generator", "flow", "--steps", 20, "--window", 6)
    for route in routes("--method", "drtune", *flow, count=200):
        trained = [i for i, graph in enumerate(route.graph) if graph]
        assert len(trained) == 6 and set(b - a for a, b in zip(trained, trained[1:])) == {3}
        (k, kind), = route.judged.items()
        assert 14 <= k < 20 and kind == "x0hat" and trained[0] <= k and route.stop_input
        assert not route.stop_state


@pytest.mark.parametrize("method", ("easytune", "refl", "draft", "alignprop", "alignprop-bernoulli"))
def test_one_step_is_enough_for_every_method(method):
    for route in routes("--method", method, "--steps", 1):
        assert route.graph == (True,) and list(route.judged) == [0]


# ---- updates -----------------------------------------------------------------------------------------------


def tuned(update, optimiser=None, **changes):
    """One pass of easytune over all steps -> updates, its weights, the last state."""
    small, table = Small(), ddim()
    args = SimpleNamespace(**{**dict(update=update, lr=0.05, warmup=0, max_grad_norm=1e9), **changes})
    updates = sw.Updates(args, small.weights)
    if optimiser:
        updates.optimizer = optimiser(small.weights, lr=args.lr)
    final = sw.denoise(small.network, table, small.x, every("x0hat"),
                       lambda i, z, e, trail: updates.learn(small.loss(z), "here"))
    norm = updates.end("here")
    return updates, torch.cat([w.detach().flatten() for w in small.weights]), final, norm


def test_one_update_a_step_or_one_a_pass():
    counts = {update: tuned(update)[0].count for update in ("step", "chain", "accum")}
    assert counts == {"step": STEPS, "chain": STEPS, "accum": 1}
    start = torch.cat([w.detach().flatten() for w in Small().weights])
    sgd = {update: tuned(update, torch.optim.SGD) for update in counts}
    assert torch.allclose(sgd["chain"][1], sgd["accum"][1], rtol=1e-12)
    assert not torch.allclose(sgd["step"][1], sgd["accum"][1], rtol=1e-6)
    rows, unchanged = Small().run(every("x0hat"), ddim())
    total = sum(gradient for _, gradient in rows.values())
    assert torch.allclose(sgd["accum"][1], start - 0.05 * total, rtol=1e-10)
    assert torch.allclose(sgd["chain"][2], unchanged) and not torch.allclose(sgd["step"][2], unchanged)
    norms = [gradient.norm() for _, gradient in rows.values()]
    assert tuned("chain")[3] == pytest.approx(float(sum(norms)) / STEPS)  # before the clip, a mean
    assert tuned("accum")[3] == pytest.approx(float(total.norm()))


def test_the_clip_is_of_every_update():
    clipped = {u: tuned(u, torch.optim.SGD, max_grad_norm=1e-3)[1] - tuned(u, torch.optim.SGD, lr=0.0)[1]
               for u in ("chain", "accum")}
    assert clipped["accum"].norm() == pytest.approx(0.05 * 1e-3, rel=1e-5)
    assert 3 * clipped["accum"].norm() < clipped["chain"].norm() <= STEPS * 0.05 * 1e-3 * (1 + 1e-6)


def test_the_rate_rises_with_the_count_of_updates():
    updates = tuned("step", lr=1e-2, warmup=8)[0]
    assert updates.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * STEPS / 8)
    assert tuned("step", lr=1e-2, warmup=3)[0].optimizer.param_groups[0]["lr"] == 1e-2
    assert updates.optimizer.param_groups[0]["weight_decay"] == 0


# ---- the denoiser: anchor, base, memory --------------------------------------------------------------------


def denoiser(*flags):
    args = settings("--width", 16, "--layers", 2, "--heads", 2, "--patch-dims", 8, *flags)
    model = sw.MotionDiffusion(args, datasets.Vocabulary.from_captions(CAPTIONS), 263)
    training.initialise(model, generator(0, 0, "initialise"))
    return args, sw.make_policy(args, model, 12, torch.device("cpu"))


def disturb(policy, scale=0.05):
    for k, parameter in enumerate(policy.tuned.parameters()):
        noise = torch.randn(parameter.shape, generator=generator(0, k, "disturb"))
        parameter.data.add_(scale * noise)


@pytest.mark.parametrize("adapter", ("lora", "full"))
def test_the_base_stays_and_its_weights_can_be_stored(adapter):
    args, policy = denoiser("--adapter", adapter)
    lengths = torch.tensor([48, 20, 32])
    x, mask = sw.start_noise(policy, lengths, 0, 0, "test", range(3))

    def answer(model):
        return sw.make_network(args, policy, model, CAPTIONS, mask, {"calls": 0})(x, 1).detach()
    before = answer(policy.tuned.model)
    at_start = policy.tuned.state()
    disturb(policy)
    after, changed = answer(policy.tuned.model), policy.tuned.state()
    with policy.tuned.base() as base:
        assert torch.equal(answer(base), before)
        assert sw.anchor_loss(answer(base), before, mask).tolist() == [0, 0, 0]
    assert torch.equal(answer(policy.tuned.model), after) and not torch.equal(after, before)
    policy.tuned.load(at_start)
    assert torch.equal(answer(policy.tuned.model), before)
    policy.tuned.load(changed)
    assert torch.equal(answer(policy.tuned.model), after)
    if adapter == "lora":
        assert len(policy.tuned.parameters()) < len(list(policy.tuned.model.parameters()))
        assert {p.requires_grad for p in lora.lora_parameters(policy.tuned.model)} == {True}


def test_the_anchor_counts_real_tokens_only():
    e, e_ref = draw(2, 4, 3), draw(2, 4, 3, name="ref")
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    expected = [(e[0, :2] - e_ref[0, :2]).square().mean(), (e[1] - e_ref[1]).square().mean()]
    assert torch.allclose(sw.anchor_loss(e, e_ref, mask), torch.stack(expected))


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    _, policy = denoiser()
    lengths = torch.tensor([48, 20, 32])
    together, mask = sw.start_noise(policy, lengths, 0, 3, "test", [4, 5, 6])
    alone, _ = sw.start_noise(policy, lengths[1:2], 0, 3, "test", [5])
    assert torch.equal(together[1], alone[0]) and (together[1, 5:] == 0).all() and mask[1].sum() == 5
    assert abs(together[0].std() - 1) < 0.3


def test_padding_and_guidance():
    """Padded tokens answer 0; guidance 1 + w is linear in w; calls are counted."""
    args, policy = denoiser()
    x, mask = sw.start_noise(policy, torch.tensor([48, 20, 32]), 0, 0, "test", range(3))
    answers, calls = {}, {}
    for w in (1.0, 2.0, 3.0):
        args.guidance_scale, calls[w] = w, {"calls": 0}
        network = sw.make_network(args, policy, policy.tuned.model, CAPTIONS, mask, calls[w])
        with torch.no_grad():
            answers[w] = network(x, 2)
        network(x, 2)
    assert (answers[1.0][1, 5:] == 0).all() and answers[1.0][1, :5].abs().min() > 0
    assert torch.allclose(answers[3.0] - answers[2.0], answers[2.0] - answers[1.0], atol=1e-5)
    assert [calls[w]["calls"] for w in (1.0, 2.0, 3.0)] == [9, 18, 18]  # 3 motions, a backward pass is a call


def saved_bytes(route, steps, checkpointing=False):
    """Peak of one pass of the real denoiser, judged by a quadratic."""
    args, policy = denoiser("--steps", steps, "--method", "draft")
    args.checkpointing = checkpointing
    x, mask = sw.start_noise(policy, torch.tensor([48, 48, 48]), 0, 0, "test", range(3))
    network = sw.make_network(args, policy, policy.tuned.model, CAPTIONS, mask, {"calls": 0})
    with memory.SavedBytes(policy.tuned.model) as saved:
        sw.denoise(network, policy.table, x, route, lambda i, z, e, trail: z.square().mean().backward())
    assert saved.now == 0
    return saved.peak


def test_memory_of_the_methods():
    """A chain grows by the activations of a step with every step, easytune not by a byte; neither does a
    chain of fixed length. With checkpointing a chain keeps its states alone."""
    easy = {n: saved_bytes(every("x0hat", n), n) for n in (2, 5, 20)}
    assert easy[2] == easy[5] == easy[20]
    chain = {n: saved_bytes(sw.draft(n, n), n) for n in (2, 5, 6, 20)}
    slope = chain[6] - chain[5]
    assert chain[20] - chain[5] == 15 * slope and slope > 0.9 * easy[5]
    assert saved_bytes(sw.refl(5, 4), 5) == easy[5]
    assert saved_bytes(sw.draft(20, 2), 20) == saved_bytes(sw.draft(5, 2), 5) < 2.2 * easy[5]
    checked = {n: saved_bytes(sw.draft(n, n), n, checkpointing=True) for n in (5, 6)}
    state = 3 * 12 * 8 * 4  # b n c float32
    assert checked[6] - checked[5] <= 2 * state < 0.1 * slope


def test_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        args, policy = denoiser("--steps", 3, "--method", "draft")
        disturb(policy)
        args.checkpointing = checkpointing
        x, mask = sw.start_noise(policy, torch.tensor([48, 20, 32]), 0, 0, "test", range(3))
        network = sw.make_network(args, policy, policy.tuned.model, CAPTIONS, mask, {"calls": 0})
        sw.denoise(network, policy.table, x, sw.draft(3, 3),
                   lambda i, z, e, trail: z.square().mean().backward())
        found.append(torch.cat([p.grad.flatten() for p in policy.tuned.parameters()]))
    assert torch.equal(*found) and found[0].norm() > 0


def test_saved_bytes_counts_storages_once_and_lets_go():
    x = torch.ones(1000, requires_grad=True)
    weight = torch.nn.Linear(1000, 1, bias=False)
    with memory.SavedBytes(weight) as saved:
        y = x.exp()                       # saves its result: 4000 bytes
        assert (saved.now, saved.peak) == (4000, 4000)
        z = (y * y).sum()                 # saves y twice, the same storage
        assert saved.now == 4000
        w = weight(y)                     # the parameter does not count
        assert saved.now == 4000
        other = x.sin()                   # saves x
        assert saved.now == 8000
        del other
        assert (saved.now, saved.peak) == (4000, 8000)
        (z + w.sum()).backward()
    assert (saved.now, saved.peak) == (0, 8000)


# ---- the user's mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--method", "drtune"], ["--method drtune", "--prediction epsilon", "--generator flow"]),
    (["--method", "draft", "--update", "chain"], ["--update"]),
    (["--method", "refl", "--reward-input", "xt"], ["--reward-input"]),
    (["--method", "refl", "--sweep", "0.1"], ["--sweep"]), (["--sweep", "1.5"], ["--sweep"]),
    (["--checkpointing"], ["--checkpointing"]), (["--window", "50"], ["--window"]),
    (["--generator", "flow", "--prediction", "v"], ["--prediction"]),
    (["--w-semantic", "0", "--w-preference", "0", "--w-authenticity", "0"], ["--w-semantic"]),
    (["--width", "30", "--heads", "4"], ["--width"]), (["--patch", "3"], ["--patch"]),
    (["--representation", "joints", "--patch-dims", "300"], ["--patch-dims"])])
def test_settings_that_cannot_work(flags, words):
    with pytest.raises(InputError) as error:
        sw.check_args(settings(*flags))
    assert all(word in str(error.value) for word in words)


def test_settings_that_can():
    for flags in (["--method", "drtune", "--prediction", "v"], ["--method", "drtune", "--generator", "flow"],
                  ["--method", "draft", "--checkpointing"], ["--update", "accum", "--reward-input", "mixed"]):
        sw.check_args(settings(*flags))


def test_a_deep_copy_is_not_shared():
    """--adapter full: the base does not follow the weights."""
    args, policy = denoiser("--adapter", "full")
    before = copy.deepcopy(policy.tuned.frozen.state_dict())
    disturb(policy)
    assert all(torch.equal(value, before[name]) for name, value in policy.tuned.frozen.state_dict().items())
