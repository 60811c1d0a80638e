"""Numbers that a PPO run logs about itself. None of them takes part in the training."""
import torch

from common import training


def ratio_stats(logratio, mask, clip_range):
    """Sums over valid tokens of rho - 1 - log rho, which estimates KL(old || new) (Schulman 2020), and of
    those whose ratio is outside the clip range: to be divided by their number."""
    ratio = logratio.exp()
    return {"approx_kl": (((ratio - 1) - logratio) * mask).sum(),
            "clipfrac": (((ratio - 1).abs() > clip_range) & mask).sum()}


def exact_kl(logps, logps_ref):
    """KL(pi || pi_ref) of each position, over all actions: (b n v) twice -> (b n)"""
    return (logps.exp() * (logps - logps_ref)).sum(-1)


def explained_variance(values, returns, mask):
    """Share of the returns' variance that the critic foresees, over all processes' valid tokens: 1 at best, 0
    for a constant. All (b n)"""
    values, returns = (training.all_gather_rows(part[mask]) for part in (values, returns))
    return 1 - (returns - values).var() / returns.var().clamp(min=1e-12)


def rollout_stats(tokens, mask, lengths, end, kl, entropy):
    """Of the motions of all processes: kl_ref per motion, entropy per token, length in frames, shares without
    an end and of different token sequences. tokens, mask, kl, entropy (b n), lengths (b)"""
    made = training.all_gather_rows(tokens)
    return {"kl_ref": training.all_gather_rows((kl * mask).sum(1)).mean(),
            "entropy": training.all_gather_rows(entropy[mask]).mean(),
            "length": training.all_gather_rows(lengths).float().mean(),
            "truncated": (made[:, -1] < end).float().mean(),
            "distinct": len(torch.unique(made, dim=0)) / len(made)}
