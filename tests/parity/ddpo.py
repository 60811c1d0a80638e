"""Compare the formulas of ddpo_motion.py with reference arrays (see tests/parity)."""
import torch

import ddpo_motion
from results.studies import PromptTracker
from tests.parity.rows import check_cases


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    return check_cases(path, check_stats)


def check_stats(result, path, case, ref):
    """The per-prompt tracker, the clipped surrogate with its gradient, the masked log-probability."""
    if case.startswith("tracker"):
        buffer_size, min_count = (int(part[1:]) for part in case.split("_")[1:])
        tracker = PromptTracker(buffer_size, min_count)
        for call in range(sum(key.endswith("/reward") for key in ref)):  # it remembers: keep the order
            advantages = tracker.update(ref[f"e{call}/prompt_id"].tolist(), ref[f"e{call}/reward"])
            result.compare(f"{case}/advantage", advantages, ref[f"e{call}/advantage"], 1e-9)
    elif case.startswith("ppo_clip"):
        log_ratio, advantage = torch.from_numpy(ref["log_ratio"]), torch.from_numpy(ref["advantage"])
        result.compare("ratio", log_ratio.exp(), ref["ratio"], 1e-6)
        ratio = torch.from_numpy(ref["ratio"]).requires_grad_()
        loss = ddpo_motion.clipped_loss(ratio, advantage, float(case.removeprefix("ppo_clip"))).mean()
        loss.backward()
        result.compare("loss", loss, ref["loss"], 1e-6)
        result.compare("grad_ratio", ratio.grad, ref["grad_ratio"], 1e-6)
    elif case == "masked_logp":
        x, mean, mask = (torch.from_numpy(ref[name]) for name in ("x", "mean", "mask"))
        logp = ddpo_motion.masked_mean_logp(x, mean, torch.from_numpy(ref["std"])[:, None, None], mask)
        valid = mask.sum(1) * x.shape[2]
        result.compare("mask", mask.sum(1), ref["length"], 0.0)
        result.compare("logp_mean_valid", logp, ref["logp_mean_valid"], 1e-9)
        result.compare("logp_sum", logp * valid, ref["logp_sum"], 1e-9)
        result.compare("logp_mean_padded", logp * valid / x[0].numel(), ref["logp_mean_padded"], 1e-9)
    else:
        raise KeyError(f"unknown case {case}")
