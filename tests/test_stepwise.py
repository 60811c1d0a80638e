"""The algorithm of stepwise_motion.py against closed forms and identities, and the mutants that must not
survive. Reference values are in tests/parity/stepwise.py."""
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import stepwise_motion as sw
from common import InputError, datasets, diffusion, generator, lora, runs, samplers, training
from results import memory, studies
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
    return samplers.ddim_steps(samplers.make_grid("scaled_linear", steps, "leading", "sigma_min"), prediction)


def euler(steps):
    return samplers.ddim_steps(samplers.straight_grid(steps), "velocity")


def every(kind, steps=STEPS):
    return sw.easytune(steps, range(steps), [kind] * steps)


# Routes of the other methods, as draw_route draws them: the first draw that is the wanted one.


def settings(*flags):
    return runs.parse_args(sw.Args, sw.SIZE_ARGS, list(map(str, flags)), sw.__doc__)


def drawn(method, steps, window, wanted):
    args = settings("--method", method, "--steps", steps, "--window", window, "--prediction", "v")
    sw.check_args(args)
    found = (sw.draw_route(args, 0.0, generator(0, k, "route")) for k in range(20000))
    return next(route for route in found if wanted(route))


def refl(steps, k):
    return drawn("refl", steps, steps, lambda route: k in route.rewarded)


def draft(steps, last):
    return drawn("draft", steps, last, lambda route: True)


def drtune(steps, chosen, k):
    graph = tuple(i in chosen for i in range(steps))
    return drawn("drtune", steps, len(chosen), lambda route: k in route.rewarded and route.graph == graph)


def alignprop_bernoulli(mask):
    return drawn("alignprop-bernoulli", len(mask), 1, lambda route: route.graph == tuple(mask))


# ---- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ("sample", "epsilon", "v", "velocity"))
def test_a_perfect_answer_is_read_as_the_motion(asked):
    """What `corrupt` asks of the base and what the table makes of the answer belong together."""
    steps, x_start, noise = 20, draw(20, 3, 4, name="start"), draw(20, 3, 4, name="noise")
    if asked == "velocity":
        table = euler(steps)
    else:
        table = samplers.ddim_steps(samplers.make_grid("linear", steps), asked)
    x_t, wanted = diffusion.corrupt(x_start, noise, table.timesteps.round().long(), "linear", asked)
    m = table.p[:, None, None] * x_t + table.q[:, None, None] * wanted
    assert torch.allclose(m, x_start, atol=1e-4)
    x_next = table.x_coef[:, None, None] * x_t + table.e_coef[:, None, None] * wanted
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
        table = samplers.ddim_steps(grid, prediction)
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
    small, table = Small(1), euler(1)
    made = [every("x0hat", 1), every("xt", 1), refl(1, 0), draft(1, 1), drtune(1, {0}, 0),
            alignprop_bernoulli([True])]
    gradients = [small.run(route, table)[0][0][1] for route in made]
    assert all(torch.allclose(gradients[0], g, rtol=1e-12) for g in gradients) and gradients[0].norm() > 0


def test_a_step_of_easytune_is_refl_of_that_step():
    small, table = Small(), ddim()
    rows, _ = small.run(every("x0hat"), table)
    for k in range(STEPS):
        z, gradient = small.run(refl(STEPS, k), table)[0][k]
        assert torch.equal(z, rows[k][0]) and torch.allclose(gradient, rows[k][1], rtol=1e-12)


def test_refl_ends_at_its_step():
    small = Small()
    small.run(refl(STEPS, 2), ddim())
    assert len(small.reads) == 3


def test_drtune_is_a_weighted_sum_over_steps():
    """Input stopped, x not: step i counts with (product of later a) b_i, which telescopes for epsilon."""
    small, table = Small(), ddim()
    route = drtune(STEPS, set(range(STEPS)), 0)._replace(rewarded={STEPS - 1: "xt"})
    found, final = small.run(route, table)
    states, x = [], small.x
    with torch.no_grad():
        for i in range(STEPS):
            states.append(x)
            x = table.x_coef[i] * x + table.e_coef[i] * small.network(x, i)
    towards = (x - small.target) / len(x)  # gradient of the loss in x_N
    after = [table.x_coef[i + 1:].prod() for i in range(STEPS)]
    own = sum(after[i] * table.e_coef[i] * (small.network(states[i], i) * towards).sum()
              for i in range(STEPS))
    assert torch.allclose(found[STEPS - 1][1], small.gradient(own), rtol=1e-10)
    grid = samplers.make_grid("scaled_linear", STEPS, "leading", "sigma_min")
    s = grid.sigma / grid.alpha
    assert torch.allclose(torch.stack(after) * table.e_coef, grid.alpha[-1] * s.diff(), rtol=1e-10)


def test_the_chain_agrees_with_finite_differences():
    small, table = Small(), ddim()
    (_, gradient), = small.run(draft(STEPS, STEPS), table)[0].values()

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
    (every("x0hat"), [False] * 6), (draft(6, 6), [False] + [True] * 5),
    (draft(6, 2), [False] * 5 + [True]), (refl(6, 3), [False] * 4),
    (drtune(6, {0, 2, 4}, 5), [False] * 6),
    (alignprop_bernoulli([False, True, False, False, True, False]), [False] * 2 + [True] * 4)])
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


def routes(*flags, count=40):
    args = settings(*flags)
    sw.check_args(args)
    return [sw.draw_route(args, k / count, generator(0, k, "route")) for k in range(count)]


def test_windows_slide_and_stay_inside():
    made = routes("--steps", 10, "--window", 4, "--sweep", 0.5)
    starts = [min(route.rewarded) for route in made]
    assert starts[0] == 0 and starts[20:] == [6] * 20 and starts == sorted(starts) and len(set(starts)) == 7
    for route in made:
        window = sorted(route.rewarded)
        assert window == list(range(window[0], window[0] + 4)) and window[-1] < 10
        assert [i for i, graph in enumerate(route.graph) if graph] == window
        assert route.stop_input and route.stop_state
    assert {min(route.rewarded) for route in routes("--steps", 10, "--window", 4)} == {6}
    assert {tuple(route.rewarded) for route in routes("--steps", 7)} == {(3, 4, 5, 6)}  # half, rounded up


def test_what_easytune_judges():
    kinds = {flag: [*routes("--steps", 8, "--window", 4, "--reward-input", flag)[0].rewarded.values()]
             for flag in ("x0hat", "xt", "mixed")}
    assert kinds == {"x0hat": ["x0hat"] * 4, "xt": ["xt"] * 4, "mixed": ["x0hat"] * 2 + ["xt"] * 2}
    sliding = routes("--steps", 8, "--window", 4, "--reward-input", "mixed", "--sweep", 1)
    assert [*sliding[0].rewarded.values()] == [*sliding[-1].rewarded.values()] == kinds["mixed"]


def test_draws_of_the_chain_methods():
    exits = {max(route.rewarded) for route in routes("--method", "refl", "--steps", 20, "--window", 5)}
    assert exits == set(range(15, 20))
    assert routes("--method", "draft", "--steps", 6)[0] == draft(6, 6)
    assert routes("--method", "draft", "--steps", 6, "--window", 2)[0] == draft(6, 2)
    cuts = [route.graph.index(True) for route in routes("--method", "alignprop", "--steps", 20, count=400)]
    assert min(cuts) >= 1 and max(cuts) == 19 and abs(sum(cuts) / 400 - 0.84 * 20) < 0.4
    masks = [route.graph for route in routes(
        "--method", "alignprop-bernoulli", "--prediction", "v", "--steps", 20, count=400)]
    assert min(map(sum, masks)) == 1 and 0.09 < sum(map(sum, masks)) / 8000 < 0.13
    flow = ("--prediction", "velocity", "--steps", 20, "--window", 6)
    for route in routes("--method", "drtune", *flow, count=200):
        trained = [i for i, graph in enumerate(route.graph) if graph]
        assert len(trained) == 6 and set(b - a for a, b in zip(trained, trained[1:])) == {3}
        (k, kind), = route.rewarded.items()
        assert 14 <= k < 20 and kind == "x0hat" and trained[0] <= k and route.stop_input
        assert not route.stop_state


@pytest.mark.parametrize("method", ("easytune", "refl", "draft", "alignprop", "alignprop-bernoulli"))
def test_one_step_is_enough_for_every_method(method):
    for route in routes("--method", method, "--prediction", "v", "--steps", 1):
        assert route.graph == (True,) and list(route.rewarded) == [0]


# ---- updates -----------------------------------------------------------------------------------------------


def learner(name):
    """sw.learn, or the function that a study puts in its place."""
    with mock.patch.object(sw, "main") as main:
        getattr(studies, f"update_{name}", lambda argv: sw.main(argv, learn=sw.learn))([])
    return main.call_args.kwargs["learn"]


def tuned(update, optimizer=torch.optim.AdamW, lr=0.05, warmup=0, max_norm=1e9):
    """One pass of easytune over all steps -> optimizer and scheduler, its weights, the last state, norms."""
    small, table = Small(), ddim()
    optimizer = optimizer(small.weights, lr=lr, weight_decay=0.0)
    scheduler = training.rising(optimizer, warmup)
    learn, norms = partial(learner(update), optimizer=optimizer, scheduler=scheduler), []

    def visit(i, z, e, trail):
        norms.append(learn(small.loss(z), i == STEPS - 1, where="here"))
    with mock.patch.object(sw, "MAX_GRAD_NORM", max_norm):
        final = sw.denoise(small.network, table, small.x, every("x0hat"), visit)
    weights = torch.cat([w.detach().flatten() for w in small.weights])
    return (optimizer, scheduler), weights, final, [norm for norm in norms if norm is not None]


def test_one_update_a_step_or_one_a_pass():
    counts = {update: tuned(update)[0][1].last_epoch for update in ("step", "chain", "accum")}
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
    assert tuned("chain")[3] == [pytest.approx(float(sum(norms)) / STEPS)]  # before the clip, a mean
    assert tuned("accum")[3] == [pytest.approx(float(total.norm()))]
    assert len(tuned("step")[3]) == STEPS and tuned("step")[3][0] == pytest.approx(float(norms[0]))


def test_the_clip_is_of_every_update():
    clipped = {u: tuned(u, torch.optim.SGD, max_norm=1e-3)[1] - tuned(u, torch.optim.SGD, lr=0.0)[1]
               for u in ("chain", "accum")}
    assert clipped["accum"].norm() == pytest.approx(0.05 * 1e-3, rel=1e-5)
    assert 3 * clipped["accum"].norm() < clipped["chain"].norm() <= STEPS * 0.05 * 1e-3 * (1 + 1e-6)


def test_the_rate_rises_with_the_count_of_updates():
    rates = [tuned("step", lr=1e-2, warmup=warmup)[0][0].param_groups[0]["lr"] for warmup in (0, 3, 8)]
    assert rates == [1e-2, 1e-2, pytest.approx(1e-2 * (STEPS + 1) / 8)]  # of the update that comes next
    small = Small()
    optimizer = torch.optim.SGD(small.weights, lr=1e-2)
    training.rising(optimizer, 8)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)


# ---- the denoiser: anchor, base, memory --------------------------------------------------------------------


def denoiser(*flags):
    args = settings(*flags)
    size = diffusion.SIZES["joint"]["small"]._replace(width=16, layers=2, heads=2, patch_dims=8)
    with mock.patch.dict(diffusion.SIZES["joint"], small=size):
        model = sw.make_model(args, datasets.Vocabulary.from_captions(CAPTIONS))
        training.initialise(model, generator(0, 0, "initialise"))
        return args, sw.make_policy(args, model, 48, torch.device("cpu"))


def disturb(policy, scale=0.05):
    for k, parameter in enumerate(policy.trained().values()):
        noise = torch.randn(parameter.shape, generator=generator(0, k, "disturb"))
        parameter.data.add_(scale * noise)


@pytest.mark.parametrize("rank", (8, 0))
def test_the_base_stays_and_its_weights_can_be_stored(rank):
    args, policy = denoiser("--lora-rank", rank)
    lengths = torch.tensor([48, 20, 32])
    x, mask = sw.start_noise(policy, lengths, 0, 0, "test", range(3))

    def answer(policy):
        return sw.make_network(args, policy, CAPTIONS, mask)(x, 1).detach()
    before = answer(policy)
    at_start = runs.plain(policy.trained())
    disturb(policy)
    after, changed = answer(policy), runs.plain(policy.trained())
    assert torch.equal(answer(policy.base()), before)
    assert sw.anchor_loss(answer(policy.base()), before, mask).tolist() == [0, 0, 0]
    assert torch.equal(answer(policy), after) and not torch.equal(after, before)
    policy.model.load_state_dict(at_start, strict=False)
    assert torch.equal(answer(policy), before)
    policy.model.load_state_dict(changed, strict=False)
    assert torch.equal(answer(policy), after)
    assert not any(p.requires_grad for p in policy.frozen.parameters())
    if rank:
        wanted = {id(p) for p in lora.parameters(policy.model)}
        assert {id(p) for p in policy.trained().values()} == wanted  # and no weight of the base
        assert len(lora.adapters(policy.model)) == 2 * 10 + 6
    else:
        assert len(policy.trained()) == len(list(policy.model.parameters()))


def test_the_anchor_counts_real_tokens_only():
    e, e_ref = draw(2, 4, 3), draw(2, 4, 3, name="ref")
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    expected = [(e[0, :2] - e_ref[0, :2]).square().mean(), (e[1] - e_ref[1]).square().mean()]
    assert torch.allclose(sw.anchor_loss(e, e_ref, mask), torch.stack(expected))


def test_the_network_is_told_the_time_of_its_step():
    args, policy = denoiser("--steps", 5)
    x, mask = sw.start_noise(policy, torch.tensor([48, 20, 32]), 0, 0, "test", range(3))
    told = []

    def forward(x, timesteps, *rest):
        told.append(timesteps.tolist())
        return x
    with mock.patch.object(policy.model, "forward", forward):
        network = sw.make_network(args, policy, CAPTIONS, mask)
        for i in range(5):
            network(x, i)
    assert told == [[float(t)] * 3 for t in policy.steps.timesteps]


def test_rewards_stay_with_their_samples():
    """Row k is asked for with motion, length and caption of row k."""
    policy = SimpleNamespace(model=SimpleNamespace(codec=SimpleNamespace(decode=lambda z: 2 * z)))
    batch = dict(lengths=torch.tensor([4, 8, 12]), asked=["a", "b", "c"], more={})

    def reward(motion, lengths, captions):
        return motion[:, 0, 0] + 100 * lengths + 1e4 * torch.tensor([ord(c) for c in captions])
    found = sw.score(policy, reward, batch, torch.tensor([1.0, 2.0, 3.0])[:, None, None])
    assert found.tolist() == [970402.0, 980804.0, 991206.0]


def updates(ask, count, *flags, lr):
    """Updates of a disturbed policy -> what each logs."""
    args, policy = denoiser("--steps", 3, "--window", 3, "--prompts", 3, *flags)
    disturb(policy)
    x, mask = sw.start_noise(policy, torch.tensor([48, 20, 32]), 0, 0, "test", range(3))
    optimizer = torch.optim.SGD(policy.trained().values(), lr=lr)
    move = partial(sw.learn, optimizer=optimizer, scheduler=training.rising(optimizer, 0))
    loop, logs = SimpleNamespace(check=lambda: None), []
    for k in range(count):
        batch = dict(captions=CAPTIONS, mask=mask, noise=x, g=generator(0, k, "route"))
        logs.append(sw.update(args, policy, ask, batch, move, k, loop))
    return logs


def test_updates_raise_the_reward_and_the_anchor_goes_back_to_the_base():
    learned = updates(lambda z: -z.square().mean((1, 2)), 6, "--anchor", 0, lr=0.05)
    assert learned[-1]["reward"] > learned[0]["reward"] + 1e-3
    held = updates(lambda z: 0 * z.mean((1, 2)), 6, "--anchor", 1, lr=0.05)
    assert 0 < held[-1]["anchor"] < 0.9 * held[0]["anchor"]


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    _, policy = denoiser()
    lengths = torch.tensor([48, 20, 32])
    together, mask = sw.start_noise(policy, lengths, 0, 3, "test", [4, 5, 6])
    alone, _ = sw.start_noise(policy, lengths[1:2], 0, 3, "test", [5])
    assert torch.equal(together[1], alone[0]) and (together[1, 7:] == 0).all() and mask[1].sum() == 7
    assert abs(together[0].std() - 1) < 0.3


def test_padding_and_guidance():
    """Padded tokens answer 0; guidance 1 + w is linear in w."""
    answers = {}
    for w in (1.0, 2.0, 3.0):
        args, policy = denoiser("--guidance-scale", w)
        x, mask = sw.start_noise(policy, torch.tensor([48, 20, 32]), 0, 0, "test", range(3))
        with torch.no_grad():
            answers[w] = sw.make_network(args, policy, CAPTIONS, mask)(x, 2)
    assert (answers[1.0][1, 7:] == 0).all() and answers[1.0][1, :7].abs().min() > 0
    assert torch.allclose(answers[3.0] - answers[2.0], answers[2.0] - answers[1.0], atol=1e-5)


def test_captions_are_read_with_the_weights_of_the_moment():
    """Updates change the layers that read them; without gradients nothing changes within a walk."""
    args, policy = denoiser()
    x, mask = sw.start_noise(policy, torch.tensor([48, 20, 32]), 0, 0, "test", range(3))
    for grad, changed in ((True, True), (False, False)):
        with torch.set_grad_enabled(grad):
            network = sw.make_network(args, policy, CAPTIONS, mask)
            read = mock.Mock(side_effect=policy.model.encode_text)
            with mock.patch.object(policy.model, "encode_text", read):
                network(x, 1), network(x, 2)
        assert read.call_count == (2 if changed else 0)


def saved_bytes(route, steps, *flags):
    """Peak of one pass of the real denoiser, judged by a quadratic."""
    args, policy = denoiser("--steps", steps, "--method", "draft", *flags)
    x, mask = sw.start_noise(policy, torch.tensor([48, 48, 48]), 0, 0, "test", range(3))
    network = sw.make_network(args, policy, CAPTIONS, mask)
    with memory.SavedBytes(policy.model) as saved:
        sw.denoise(network, policy.steps, x, route, lambda i, z, e, trail: z.square().mean().backward())
    assert saved.now == 0
    return saved.peak


def test_memory_of_the_methods():
    """A chain grows by the activations of a step with every step, easytune not by a byte; neither does a
    chain of fixed length. With checkpointing a chain keeps its states alone."""
    easy = {n: saved_bytes(every("x0hat", n), n) for n in (2, 5, 20)}
    assert easy[2] == easy[5] == easy[20]
    chain = {n: saved_bytes(draft(n, n), n) for n in (2, 5, 6, 20)}
    slope = chain[6] - chain[5]
    assert chain[20] - chain[5] == 15 * slope and slope > 0.9 * easy[5]
    assert saved_bytes(refl(5, 4), 5) == easy[5]
    assert saved_bytes(draft(20, 2), 20) == saved_bytes(draft(5, 2), 5) < 2.2 * easy[5]
    checked = {n: saved_bytes(draft(n, n), n, "--checkpointing") for n in (5, 6)}
    state = 3 * 12 * 8 * 4  # b n c float32
    assert checked[6] - checked[5] <= 2 * state < 0.1 * slope


def test_checkpointing_changes_no_gradient():
    found = []
    for flags in ((), ("--checkpointing",)):
        args, policy = denoiser("--steps", 3, "--method", "draft", *flags)
        disturb(policy)
        x, mask = sw.start_noise(policy, torch.tensor([48, 20, 32]), 0, 0, "test", range(3))
        network = sw.make_network(args, policy, CAPTIONS, mask)
        sw.denoise(network, policy.steps, x, draft(3, 3),
                   lambda i, z, e, trail: z.square().mean().backward())
        found.append(torch.cat([p.grad.flatten() for p in policy.trained().values()]))
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
    (["--method", "drtune"], ["--method drtune", "--prediction epsilon", "velocity"]),
    (["--method", "refl", "--reward-input", "xt"], ["--reward-input"]),
    (["--method", "refl", "--sweep", "0.1"], ["--sweep"]), (["--sweep", "1.5"], ["--sweep"]),
    (["--checkpointing"], ["--checkpointing"]), (["--window", "50"], ["--window"]),
    (["--weights", "semantic=0,preference=0,authenticity=0"], ["--weights"]),
    (["--weights", "beauty=1"], ["--weights", "beauty", "semantic, m2m, preference, authenticity"]),
    (["--weights", "semantic=-1"], ["--weights"])])
def test_settings_that_cannot_work(flags, words):
    with pytest.raises(InputError) as error:
        sw.check_args(settings(*flags))
    assert all(word in str(error.value) for word in words)


def test_settings_that_can():
    for flags in (["--method", "drtune", "--prediction", "v"],
                  ["--method", "drtune", "--prediction", "velocity"],
                  ["--method", "draft", "--checkpointing"], ["--reward-input", "mixed"]):
        sw.check_args(settings(*flags))
    assert sw.weights_of(settings()) == {"semantic": 1.0, "preference": 0.02, "authenticity": 0.05}
    assert sw.weights_of(settings("--weights", "m2m=2,semantic=0")) == {"m2m": 2.0}
    paper = settings("--size", "paper")
    assert (paper.steps, paper.lr, paper.prompts, paper.lora_rank) == (50, 1e-5, 256, 0)


def test_a_deep_copy_is_not_shared():
    """--lora-rank 0: the base does not follow the weights."""
    _, policy = denoiser("--lora-rank", 0)
    before = {name: value.clone() for name, value in policy.frozen.state_dict().items()}
    disturb(policy)
    assert all(torch.equal(value, before[name]) for name, value in policy.frozen.state_dict().items())
