"""Compare the sampler table, the routes and the updates of stepwise_motion.py with reference arrays (see
tests/parity): a toy denoiser in float64, so everything is exact to 1e-9."""
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

import stepwise_motion as sw
from common import generator, samplers, training
from results import studies
from tests.parity import motion_reward as parity_motion_reward
from tests.parity.rows import Rows

EXACT = 1e-9
NAMES = ("W1", "U1", "C1", "b1", "W2", "b2")


class Guided:
    """What `predict` of the script needs of a network: a call, and the null condition."""

    def __init__(self, function, null):
        self.function, self.null = function, null

    def __call__(self, x_t, timesteps, mask, text, text_mask):
        return self.function(x_t, text)

    def drop_text(self, text, text_mask, dropped):
        return self.null.expand_as(text), text_mask


class Toy:
    """The toy problem of one reference file: its denoiser, reward and sampler."""

    def __init__(self, ref):
        self.ref = {key: torch.from_numpy(value) if value.dtype.kind in "fib" else value
                    for key, value in ref.items()}
        self.steps = int(ref["T"])
        self.names = [name.removeprefix("param_") for name in ref["param_order"].tolist()]
        self.guidance = float(ref.get("guidance_w", 1.0))
        self.mu, self.A = self.ref["mu"], self.ref["A"]

    def parameters(self, prefix="param"):
        return {name: self.ref[f"{prefix}_{name}"].clone().requires_grad_() for name in self.names}

    def network(self, weights):
        def half(x, i, c):
            inside = x @ weights["W1"].T + self.ref["temb"][i] @ weights["U1"].T + c @ weights["C1"].T
            return torch.tanh(inside + weights["b1"]) @ weights["W2"].T + weights["b2"]

        def network(x, i):
            if self.guidance == 1.0:
                return half(x, i, self.ref["cond"])
            # the script's own guidance, fed with this network
            everything = torch.ones(len(x), dtype=torch.bool)
            model = Guided(lambda x_t, text: half(x_t, i, text), self.ref["null"])
            policy = SimpleNamespace(model=model, guidance_scale=self.guidance)
            return sw.predict(policy, x, torch.zeros(len(x)), everything, self.ref["cond"], everything)
        return network

    def loss(self, x, target):
        d = x - target
        return 0.5 * (d @ self.A * d).sum(-1).mean()

    def gradient(self, loss, weights):
        parts = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        return torch.cat([(torch.zeros_like(w) if g is None else g).flatten()
                          for g, w in zip(parts, weights.values())])

    def table(self, prediction="epsilon"):
        if "timesteps" not in self.ref:
            return samplers.ddim_steps(samplers.straight_grid(self.steps), "velocity")
        return samplers.ddim_steps(samplers.make_grid("scaled_linear", self.steps, "leading", "sigma_min"),
                                   prediction)


# The table's fields under their names in the reference files.
FIELDS = {"a": "x_coef", "b": "e_coef", "p": "p", "q": "q"}


def drawn(method, steps, window, wanted):
    """The first route that the script draws for a method and is the wanted one."""
    args = SimpleNamespace(method=method, steps=steps, window=window)
    found = (sw.draw_route(args, 0.0, generator(0, k, "route")) for k in range(100000))
    return next(route for route in found if wanted(route))


def draft(steps, last):
    return drawn("draft", steps, last, lambda route: True)


def drtune(steps, chosen, k):
    """As drawn; where DRTune draws no such steps, those of the reference take their place."""
    route = drawn("drtune", steps, len(chosen), lambda route: True)
    return route._replace(graph=tuple(i in chosen for i in range(steps)), rewarded={k: "x0hat"})


def learner(name):
    """sw.learn, or the function that a study puts in its place."""
    with mock.patch.object(sw, "main") as main:
        getattr(studies, f"update_{name}", lambda argv: sw.main(argv, learn=sw.learn))([])
    return main.call_args.kwargs["learn"]


def judged(toy, route, table, targets=None):
    """One pass -> [(step, loss, gradient)] of all that is judged, each by the weights at the start."""
    weights, found = toy.parameters(), []

    def judge(i, z, e, trail):
        target = toy.mu if targets is None else targets[i]
        loss = toy.loss(z, target)
        found.append((i, loss.detach(), toy.gradient(loss, weights)))
    sw.denoise(toy.network(weights), table, toy.ref["x_T"], route, judge)
    return found


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    with np.load(path, allow_pickle=False) as stored:
        ref = {key: stored[key] for key in stored.files}
    result = Rows()
    if "extra" in path.name:
        check_outputs(result, ref)
        check_schedule(result, ref)
        check_anchor(result, ref)
        tensors = {key: torch.from_numpy(value) for key, value in ref.items() if value.dtype.kind in "fib"}
        parity_motion_reward.check_extra(result, tensors)
    else:
        check_table(result, ref)
        check_routes(result, ref)
        check_updates(result, ref)
    return result.rows()


def check_table(result, ref):
    """Coefficients, timesteps, and the trajectory under the initial weights."""
    toy = Toy(ref)
    table = toy.table()
    for name in "abpq":
        result.compare(name, getattr(table, FIELDS[name]), ref[name], EXACT)
    if "timesteps" in ref:
        grid = samplers.make_grid("scaled_linear", toy.steps, "leading", "sigma_min")
        result.compare("timesteps", table.timesteps, ref["timesteps"], 0)
        result.compare("alpha_t", grid.alpha[:-1] ** 2, ref["alpha_t"], EXACT)
        result.compare("alpha_prev", grid.alpha[1:] ** 2, ref["alpha_prev"], EXACT)
    states, guesses, answers = [toy.ref["x_T"]], [], []

    def judge(i, z, e, trail):
        states.append(z)
        answers.append(e)
    network = toy.network(toy.parameters())
    with torch.no_grad():
        every = range(toy.steps)
        sw.denoise(network, table, toy.ref["x_T"], sw.easytune(toy.steps, every, ["xt"] * toy.steps), judge)
        sw.denoise(network, table, toy.ref["x_T"], sw.easytune(toy.steps, every, ["x0hat"] * toy.steps),
                   lambda i, z, e, trail: guesses.append(z))
    for field, mine in (("traj_x", states), ("traj_x0hat", guesses), ("traj_eps", answers)):
        result.compare(field, torch.stack(mine).detach(), ref[field], EXACT)


def check_routes(result, ref):
    """Loss and gradient of every method, initial weights."""
    toy = Toy(ref)
    steps, table = toy.steps, toy.table()
    train, k = ref["drtune_train"].tolist(), int(ref["drtune_tmin"])
    routes = {"draft_full": draft(steps, steps), "drtune": drtune(steps, train, k),
              "alignprop_bernoulli": drawn("alignprop-bernoulli", steps, 1, lambda route: True)._replace(
                  graph=tuple(ref["bernoulli_mask"].tolist())),
              "drtune_nostop": drtune(steps, train, k)._replace(rewarded={steps - 1: "xt"})}
    routes |= {f"draft_{last}": draft(steps, last) for last in (1, 2, 3)}
    routes |= {f"refl_{k}": drawn("refl", steps, steps, lambda route, k=k: k in route.rewarded)
               for k in range(steps)}
    for name, route in routes.items():
        (_, loss, gradient), = judged(toy, route, table)
        result.compare(f"loss_{name}", loss, ref[f"loss_{name}"], EXACT)
        result.compare(f"grad_{name}", gradient, ref[f"grad_{name}"], EXACT)
    every = range(steps)
    for name, inputs, targets in (("x0hat", ["x0hat"] * steps, None), ("xprev", ["xt"] * steps,
                                                                     toy.ref["mu_next"])):
        found = judged(toy, sw.easytune(steps, every, inputs), table, targets)
        result.compare(f"loss_easytune_{name}", torch.stack([loss for _, loss, _ in found]),
                       ref[f"loss_easytune_{name}"], EXACT)
        result.compare(f"grad_easytune_{name}", torch.stack([g for *_, g in found]),
                       ref[f"grad_easytune_{name}"], EXACT)
    result.compare("contrib_draft_full", contributions(toy, table), ref["contrib_draft_full"], EXACT)
    result.compare("jacprod_norm", jacobian_norms(toy, table), ref["jacprod_norm"], 1e-7)


def contributions(toy, table):
    """Part of the full chain's gradient that enters through the weights of each step (N w)."""
    copies = [toy.parameters() for _ in range(toy.steps)]
    networks = [toy.network(weights) for weights in copies]
    losses = []
    sw.denoise(lambda x, i: networks[i](x, i), table, toy.ref["x_T"], draft(toy.steps, toy.steps),
               lambda i, z, e, trail: losses.append(toy.loss(z, toy.mu)))
    parts = torch.autograd.grad(losses[0], [w for weights in copies for w in weights.values()])
    return torch.cat([part.flatten() for part in parts]).reshape(toy.steps, -1)


def jacobian_norms(toy, table):
    """Largest singular value of d x_N / d x_{i+1}, per step and sample (N b)."""
    network, norms = toy.network(toy.parameters()), []
    states = torch.from_numpy(np.asarray(toy.ref["traj_x"]))
    for i in range(toy.steps):
        def rest(x, first=i + 1):
            for step in range(first, toy.steps):
                x = table.x_coef[step] * x + table.e_coef[step] * network(x, step)
            return x
        jacobian = torch.autograd.functional.jacobian(rest, states[i + 1])  # b d b d
        own = torch.stack([jacobian[b, :, b] for b in range(len(states[0]))])
        norms.append(torch.linalg.matrix_norm(own, 2))
    return torch.stack(norms)


def check_updates(result, ref):
    """Whole passes with optimiser steps: step, chain, accum, by SGD without clipping and by AdamW with it."""
    toy = Toy(ref)
    steps, table = toy.steps, toy.table()
    for kind, update, what, part in ((k, u, w, p) for k in ("sgd", "adam") for u in ("step", "chain", "accum")
                                     for w in ("x0hat", "xprev") for p in ("all", "last3")):
        name = f"{kind}_{update}_{what}_{part}"
        weights, losses = toy.parameters(), []
        parameters = list(weights.values())
        optimizer = torch.optim.SGD if kind == "sgd" else partial(torch.optim.AdamW, weight_decay=0.0)
        optimizer = optimizer(parameters, lr=float(ref[f"lr_{kind}"]))
        learn = partial(learner(update), optimizer=optimizer, scheduler=training.rising(optimizer, 0),
                        where="step")
        window = range(steps) if part == "all" else range(steps - 3, steps)
        route = sw.easytune(steps, window, ["x0hat" if what == "x0hat" else "xt"] * steps)

        def judge(i, z, e, trail):
            loss = toy.loss(z, toy.mu if what == "x0hat" else toy.ref["mu_next"][i])
            losses.append(loss.detach())
            learn(loss, i == steps - 1)
        with mock.patch.object(sw, "MAX_GRAD_NORM", float(ref["max_norm"]) if kind == "adam" else 1e30):
            final = sw.denoise(toy.network(weights), table, toy.ref["x_T"], route, judge)
        result.compare(f"theta_{name}", torch.cat([w.detach().flatten() for w in parameters]),
                       ref[f"theta_{name}"], EXACT)
        if kind == "sgd":
            result.compare(f"xfinal_{name}", final.detach(), ref[f"xfinal_{name}"], EXACT)
        else:
            result.compare(f"losses_{name}", torch.stack(losses), ref[f"losses_{name}"], EXACT)


def check_outputs(result, ref):
    """The same network read as epsilon, clean sample and v: coefficients, trajectories, gradients."""
    toy = Toy(ref)
    steps = toy.steps
    for key, prediction in (("eps", "epsilon"), ("x0", "sample"), ("v", "v")):
        table = toy.table(prediction)
        for name in "pqab":
            result.compare(f"{key}_{name}", getattr(table, FIELDS[name]), ref[f"{key}_{name}"], EXACT)
        states, guesses = [toy.ref["x_T"]], []
        network = toy.network(toy.parameters())
        for kind, found in (("xt", states), ("x0hat", guesses)):
            route = sw.easytune(steps, range(steps), [kind] * steps)
            sw.denoise(network, table, toy.ref["x_T"], route,
                       lambda i, z, e, trail, found=found: found.append(z.detach()))
        result.compare(f"{key}_traj_x", torch.stack(states), ref[f"{key}_traj_x"], EXACT)
        result.compare(f"{key}_traj_m", torch.stack(guesses), ref[f"{key}_traj_m"], EXACT)
        (_, loss, gradient), = judged(toy, draft(steps, steps), table)
        result.compare(f"{key}_loss_draft_full", loss, ref[f"{key}_loss_draft_full"], EXACT)
        result.compare(f"{key}_grad_draft_full", gradient, ref[f"{key}_grad_draft_full"], EXACT)
        every = drtune(steps, range(steps), 0)._replace(rewarded={steps - 1: "xt"})
        gradient = judged(toy, every, table)[0][2]
        result.compare(f"{key}_grad_drtune_all", gradient, ref[f"{key}_grad_drtune_all"], EXACT)
        after = torch.stack([table.x_coef[i + 1:].prod() for i in range(steps)])
        result.compare(f"{key}_drtune_w", after * table.e_coef, ref[f"{key}_drtune_w"], EXACT)
        found = judged(toy, sw.easytune(steps, range(steps), ["x0hat"] * steps), table)
        result.compare(f"{key}_grad_easytune_x0hat", torch.stack([g for *_, g in found]),
                       ref[f"{key}_grad_easytune_x0hat"], EXACT)
    k = int(ref["refl_k"])
    losses = []

    def judge(i, z, e, trail):  # the original ReFL loss: relu of a margin, for its routing alone
        reward = 6 * torch.nn.functional.cosine_similarity(z, toy.mu, dim=-1)
        losses.append((reward.detach(), 1e-3 * torch.relu(2 - reward).mean()))
    weights = toy.parameters()
    sw.denoise(toy.network(weights), toy.table(), toy.ref["x_T"],
               drawn("refl", steps, steps, lambda route: k in route.rewarded), judge)
    reward, loss = losses[0]
    result.compare("refl_reward", reward, ref["refl_reward"], EXACT)
    result.compare("refl_relu_loss", loss.detach(), ref["refl_relu_loss"], EXACT)
    result.compare("refl_relu_grad", toy.gradient(loss, weights), ref["refl_relu_grad"], EXACT)


def check_schedule(result, ref):
    """The first trained step of the sliding window."""
    for name in "ABC":
        steps, window, sweep = (ref[f"window{name}_{key}"].item() for key in ("T", "k", "sweep"))
        args = SimpleNamespace(method="easytune", reward_input="x0hat", steps=int(steps), window=int(window),
                               sweep=sweep)
        mine = [min(sw.draw_route(args, progress, None).rewarded)
                for progress in ref[f"window{name}_progress"].tolist()]
        result.compare(f"window{name}_start", mine, ref[f"window{name}_start"], 0)


def check_anchor(result, ref):
    """Pull towards the reference network, at the recorded states."""
    toy = Toy(ref)
    weights = toy.parameters()
    network, reference = toy.network(weights), toy.network(toy.parameters("ref"))
    losses, gradients = [], []
    for i in range(toy.steps):
        x = torch.from_numpy(ref["eps_traj_x"][i])
        e, e_ref = network(x, i)[:, None], reference(x, i)[:, None].detach()  # one token a sample
        loss = sw.anchor_loss(e, e_ref, torch.ones(len(x), 1, dtype=torch.bool)).mean()
        losses.append(loss.detach())
        gradients.append(toy.gradient(loss, weights))
    result.compare("anchor_loss", torch.stack(losses), ref["anchor_loss"], EXACT)
    result.compare("grad_anchor", torch.stack(gradients), ref["grad_anchor"], EXACT)
