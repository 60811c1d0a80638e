"""Compare selection, hypervolume and the perception critics with reference arrays (see tests/parity).

The reference values of MotionCritic were made with random weights of the published network, so our class must
load them as they are.
"""
import numpy as np
import torch

from common import metrics, published
from common.published import motion_critic
from tests.parity.rows import Rows


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    with np.load(path) as stored:
        ref = {key: torch.from_numpy(stored[key]) for key in stored.files if key != "meta_json"}
    result = Rows()
    kinds = {"motioncritic": [check_critic], "hypervolume_bt": [check_ranking, check_hypervolume],
             "pareto": [check_selection]}
    for function in next(checks for kind, checks in kinds.items() if path.name.startswith(kind)):
        function(result, ref)
    return result.rows()


def check_critic(result, ref):
    """The published MotionCritic with its names of weights, and its input."""
    import pareto_motion as pareto

    motion = motion_critic.into_critic(ref["raw_rot6d"])
    error = (motion - ref["motion"]).abs().flatten()
    result.compare("motion", motion, ref["motion"], 2e-3)  # the public float32 quaternions lose digits
    result.compare("motion (99 %)", error.quantile(0.99), 0.0, 1e-4)
    state = {key.removeprefix("sd/"): value for key, value in ref.items() if key.startswith("sd/")}
    net = motion_critic.MotionCritic(**motion_critic.critic_sizes(state, "reference", 4))
    published.load_strict(net, state, "reference")
    scores = net(ref["motion"])
    result.compare("score", scores[:, None], ref["score"], 1e-5)
    result.compare("score_first9", net(ref["motion"][:, :9])[:, None], ref["score_first9"], 1e-5)
    result.compare("representation_mean", net.representation(ref["motion"]), ref["representation_mean"], 1e-5)
    better, worse = scores[:2], scores[2:]
    result.compare("pair_scores", torch.stack([better, worse], 1), ref["pair_scores"], 1e-5)
    each = torch.stack([pareto.ranking_loss(*pair) for pair in zip(better, worse)])
    result.compare("pair_loss_each", each, ref["pair_loss_each"], 1e-5)
    loss = pareto.ranking_loss(better, worse)
    result.compare("pair_loss", loss, ref["pair_loss"], 1e-5)
    result.compare("pair_acc", (better > worse).float().mean(), ref["pair_acc"], 0.0)
    result.compare("clipped_mean", scores[scores <= 12].mean(), ref["clipped_mean"], 1e-5)
    loss.backward()
    gradients = dict(net.named_parameters())
    for key, value in ref.items():
        if key.startswith("grad_pair_loss/"):
            result.compare("gradients", gradients[key.removeprefix("grad_pair_loss/")].grad, value, 1e-5)


def check_ranking(result, ref):
    """The Bradley-Terry loss, two pairs with a difference of 120 either way; in float32 it stays finite."""
    import pareto_motion as pareto

    better, worse = (ref[f"bt/score_{side}"].requires_grad_() for side in ("better", "worse"))
    loss = pareto.ranking_loss(better, worse)
    each = torch.stack([pareto.ranking_loss(*pair) for pair in zip(better, worse)])
    result.compare("bt/loss_each", each, ref["bt/loss_each"], 1e-10)
    result.compare("bt/loss", loss, ref["bt/loss"], 1e-10)
    loss.backward()
    result.compare("bt/grad_better", better.grad, ref["bt/grad_better"], 1e-10)
    result.compare("bt/grad_worse", worse.grad, ref["bt/grad_worse"], 1e-10)
    result.compare("bt/accuracy", (better > worse).double().mean(), ref["bt/accuracy"], 0.0)
    loss = pareto.ranking_loss(better.float(), worse.float())
    result.compare("bt/loss (float32)", loss, ref["bt/loss"], 1e-5)


def check_hypervolume(result, ref):
    """Two and three rewards, with ties, duplicates and points below the reference."""
    for key in (key for key in ref if key.endswith("/hypervolume")):
        case = key.removesuffix("/hypervolume")
        volume = metrics.hypervolume(ref[f"{case}/rewards"], ref[f"{case}/ref"])
        result.compare("hypervolume (relative)", torch.tensor(volume, dtype=torch.float64) / ref[key].clamp(
            min=1e-300), ref[key].sign(), 1e-9)


def check_selection(result, ref):
    """Non-dominated sets, their weights and Eq. (12) of MotionRL. Our rewards have an axis for prompts."""
    import pareto_motion as pareto

    for key in (key for key in ref if key.startswith("case") and key.endswith("/rewards")):
        mask = pareto.nondominated(ref[key])
        result.compare("mask", mask, ref[key.replace("rewards", "mask")], 0)
    R = ref["tok/rewards"][None]  # p c n k
    result.compare("tok/own_reward", pareto.own_reward(R)[0], ref["tok/own_reward"], 0)
    for selection, name in (("per-token", "per_token"), ("union", "union")):
        keep, weight = pareto.select(R, selection)
        result.compare(f"tok/mask_{name}", keep[0], ref[f"tok/mask_{name}"], 0)
        result.compare(f"tok/weight_{name}", weight[0],
                       ref[f"tok/weight_{name}"], 1e-7)
    literal = pareto.select(R, "literal")[0][0]
    result.compare("tok/mask_literal_slot", literal, ref["tok/mask_literal_slot"].expand(3, -1), 0)
    result.compare("eq12/normalised", pareto.normalise(ref["eq12/rewards"], ref["eq12/min"], ref["eq12/max"]),
                   ref["eq12/normalised"], 1e-10)
