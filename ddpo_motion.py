"""DDPO with importance sampling and LoRA on a text-to-motion diffusion model, from text prompts only.

The idea. A diffusion model that has learnt to move from one data set is asked for motions in the words of
another. No motion of the new domain is shown to it: it samples, a text-motion retrieval model says how well
each sample fits its prompt, and denoising is treated as a chain of Gaussian decisions whose probabilities are
pushed up or down by policy gradient. Only small low-rank adapters (LoRA) are trained.

Papers
  No MoCap Needed (Macaluso et al. 2025, arXiv 2510.06988): the method; its hyper-parameters are not public
  DDPO (Black et al. 2023, arXiv 2305.13301): sections 4.1-4.3, denoising as an MDP, importance sampling
  DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095): the sampler;  LoRA (Hu et al. 2021, arXiv 2106.09685)
  MDM (Tevet et al. 2022), MLD (Chen et al. 2023): the denoisers;  TMR (Petrovich et al. 2023): the reward

The decision process (DDPO section 4.2), for denoising steps i = 0 .. N-1:
  variable            symbol                       meaning
  x_t = states[:, i]  x_i                          state, together with the timestep and the caption c
  x_prev              x_{i+1}                      action: the next, less noisy state
  m                   m_theta(x_i, t_i, c)         the denoiser's guess of the finished motion
  mean, std           mu_theta, sigma_i            policy: x_{i+1} ~ N(mean, std^2), std fixed by the schedule
  logp, logp_old      log pi_theta, log pi_old     mean over the valid entries of x, not their sum
  ratio               pi_theta / pi_old            of one step, clipped as in PPO
  rewards             R(x_N, c)                    cosine of the mean latents; zero before the last step
The last step has no variance: it is sampled and never trained.

Read in this order: section 6 (the maths), 7 (the loop), 3 (the network), then the rest.

  python ddpo_motion.py --dataset kit             # from nothing to a tuned model, see README for the time
  python ddpo_motion.py --dataset kit --tiny      # the same path at toy size
  python ddpo_motion.py --prompt "a person walks forward and waves" --load runs/ddpo_kit_seed0/adapter.pt
"""

# ---- 1. Imports --------------------------------------------------------------------------------------------

import math
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from common import (
    InputError, datasets, denoising, features, generator, lora, motion_reward, patches, reports,
    retrieval, runs, samplers, vae)
from common.runs import arg
from common.tracker import PromptTracker

# ---- 2. Arguments ------------------------------------------------------------------------------------------


@dataclass
class Args:
    """Every field is a flag: its name, default, and help with the paper's value where one is known."""
    # [sync:run_flags]
    # run
    dataset: str = arg("kit", "target domain: kit, humanml3d, or a folder in either published layout")
    data_root: str = arg("data", "where KIT-ML and HumanML3D are looked for before the embedded data is used")
    out_dir: str = arg("", "run folder; empty: runs/<method>_<dataset>_seed<seed>")
    cache_dir: str = arg(".cache", "pretrained bases and evaluators, keyed by all that shaped them")
    cache: bool = arg(True, "--no-cache trains them again")
    seed: int = arg(0, "seed of the reinforcement learning and of the evaluation noise")
    base_seed: int = arg(0, "seed of the embedded data, the base and the evaluators")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")
    threads: int = arg(0, "CPU threads; 0: a short probe decides (or OMP_NUM_THREADS)")
    resume: bool = arg(False, "go on from checkpoint.pt of the run folder, bit for bit")
    overwrite: bool = arg(False, "start again in an existing run folder")
    tiny: bool = arg(False, "everything at toy size, for a first look and for tests")
    eval_only: bool = arg(False, "evaluate --load, no training")
    load: str = arg("", "what a finished run saved (adapter.pt, policy.pt), for --prompt and --eval-only")
    prompt: list = arg(None, "write a motion for this caption (repeatable); needs --load", action="append")
    compare: bool = arg(False, "with --prompt: base and tuned side by side")
    # [/sync:run_flags]
    preset: str = arg("", "sizes and steps of MDM or MLD, for a GPU", choices=("", "paper", "paper-latent"))
    bf16: bool = arg(False, "the denoiser computes in bfloat16; log-probabilities stay in float32")
    # [sync:diffusion_flags]
    length: int = arg(0, "with --prompt: frames at 20 fps; 0: the median of the source")
    # data
    source: str = arg("", "source domain, same forms; empty: the other one of kit / humanml3d")
    source_clips: int = arg(2400, "embedded data: clips of the source")
    target_clips: int = arg(2000, "embedded data: clips of the target")
    # model (MDM: width 512, 8 layers, one token a frame, CLIP text)
    width: int = arg(64, "model width")
    layers: int = arg(3, "denoiser layers")
    heads: int = arg(4, "attention heads")
    text_layers: int = arg(1, "layers of the text encoder")
    patch: int = arg(4, "frames per token")
    patch_dims: int = arg(64, "principal components kept of a patch; 0 keeps all of them", lowest=0)
    # base pretraining on the source
    base_iterations: int = arg(3000, "updates of the base")
    base_batch: int = arg(64, "clips per update")
    base_lr: float = arg(2e-3, "peak learning rate, cosine decay")
    text_drop: float = arg(0.1, "share of captions dropped for guidance (MDM: 0.1)")
    word_drop: float = arg(0.1, "share of words made unknown")
    word_swap: float = arg(0.03, "share of words made any other: rare words must leave it unsure, not wrong")
    schedule: str = arg("linear", "noise schedule", choices=("linear", "scaled_linear", "cosine"))
    # [/sync:diffusion_flags]
    leave_out: str = arg("", "an action (kick): the source is --dataset without it, the target what is left")
    # space
    space: str = arg("joint", "patches of the motion are diffused, or latents of a VAE, which also sets "
                     "--prediction, --schedule and --layers (MLD)", choices=("joint", "latent"))
    prediction: str = arg("sample", "what the base answers: the motion, or the noise (MLD)",
                          choices=("sample", "epsilon"))
    latents: int = arg(8, "latent tokens of a motion (MLD: 1)")
    latent_dims: int = arg(32, "numbers in each (MLD: 256)")
    vae_iterations: int = arg(3000, "updates of the VAE")
    # sampling
    spacing: str = arg("linspace", "node spacing", choices=("linspace", "trailing", "karras"))
    steps: int = arg(5, "denoising steps N (paper: unknown; StableMoFusion: 10)")
    order: int = arg(1, "order of the stochastic DPM-Solver++ step; 2 is trained exactly too", choices=(1, 2))
    guidance_scale: float = arg(1.0, "classifier-free guidance, in rollout and update (MDM: 2.5)")
    # reward
    reward: str = arg("retrieval", "motion-reward: that of stepwise_motion.py; shuffled, random: controls",
                      choices=("retrieval", "contrastive", "motion-reward", "shuffled", "random"))
    reward_family: str = arg("transformer", "of the reward model; both: the mean of the two",
                             choices=("transformer", "bigru", "both"))
    reward_data: str = arg("both", "whose clips the reward model saw; source: the strict reading of no MoCap",
                           choices=("source", "both"))
    reward_iterations: int = arg(900, "updates of the reward model and of the judge")
    # update
    iterations: int = arg(200, "RL iterations (DDPO: 100-200 epochs)")
    prompts_per_iteration: int = arg(24, "prompts P of one rollout")
    samples_per_prompt: int = arg(16, "samples G of each prompt; the group is the baseline")
    kept_samples: int = arg(128, "samples of a rollout that are trained, by |advantage|; 0: all", lowest=0)
    minibatches: int = arg(2, "optimiser steps per iteration; more drifts further from the rollout policy")
    inner_epochs: int = arg(1, "passes over the rollout")
    micro_batch: int = arg(0, "trajectories per forward pass, 0: the whole minibatch; fewer save memory")
    lr: float = arg(1.5e-3, "learning rate of the adapters; it sets the drift (DDPO code: 3e-4)")
    clip_range: float = arg(0.0, "clip of the ratio; 0: 1e-4 sqrt(16384 / entries of x), see README")
    advantage: str = arg("group", "baseline: the rollout's own group, or the DDPO code's tracker per prompt",
                         choices=("group", "tracker"))
    adv_clip: float = arg(5.0, "advantages are clipped to +- this (DDPO code: 5)")
    kl_coef: float = arg(0.02, "weight of the exact KL to the base, which keeps the source (paper: unknown)")
    skip_last: int = arg(1, "last steps left out of the loss; the zero-variance one always is")
    snr_weights: bool = arg(True, "weight steps by 1 / sqrt(SNR gain): early ones decide what is done")
    max_grad_norm: float = arg(1.0, "gradient norm clip")
    lora_rank: int = arg(8, "rank of the adapters (paper: unknown)")
    lora_alpha: float = arg(8.0, "their scale is alpha / rank")
    lora_targets: str = arg(r"^(text_)?layers.*\.(q|k|v|out|up|down)$", "regular expression of the layers")
    # evaluation
    eval_every: int = arg(25, "iterations between looks at the validation prompts")
    eval_repeats: int = arg(3, "repeats of the final evaluation, for the 95 % interval (benchmark: 20)")
    best_of: int = arg(8, "reference row: the best of this many base samples by reward")
    references: bool = arg(False, "more of them: a base trained on target motion, and parts of the adapters")
    ab_page: int = arg(0, "pairs of base and tuned for people to judge, in ab_page.html")


TINY = dict(source_clips=160, target_clips=120, width=32, layers=3, base_iterations=60, base_batch=32,
            patch_dims=48, reward_iterations=40, iterations=3, prompts_per_iteration=4, samples_per_prompt=4,
            kept_samples=8, eval_every=2, eval_repeats=2, best_of=2, vae_iterations=40)
LATENT = dict(space="latent", prediction="epsilon", schedule="scaled_linear", layers=5)
PAPER = dict(width=512, layers=8, patch=1, patch_dims=0, base_lr=1e-4, base_iterations=200_000, bf16=True,
             steps=10, guidance_scale=2.5, prompts_per_iteration=32, kept_samples=0, micro_batch=64, lr=3e-4,
             kl_coef=0.0, eval_repeats=20)
PRESETS = {"space": {"latent": LATENT}, "preset": {"paper": PAPER, "paper-latent": PAPER | LATENT | dict(
    width=256, layers=9, latents=1, latent_dims=256, vae_iterations=200_000, guidance_scale=7.5)}}


def check_args(args):
    """Stop at once on settings that cannot work, naming the flag and the fix."""
    motions = args.prompts_per_iteration * args.samples_per_prompt
    kept = args.kept_samples or motions
    for wrong, message in (
            (args.samples_per_prompt < 2, "--samples-per-prompt: at least 2; a group of one has no baseline"),
            (args.prompts_per_iteration < runs.process_count(),
             "--prompts-per-iteration: at least as many as processes"),
            (not 1 <= args.skip_last < args.steps, "--skip-last: 1 to --steps - 1; the last has no variance"),
            (kept > motions, f"--kept-samples: at most prompts x samples of an iteration, {motions}"),
            (kept % args.minibatches, f"--minibatches: must divide the {kept} samples kept of an iteration"),
            (args.width % args.heads or args.width % 2, "--width: even and a multiple of --heads"),
            (args.patch_dims > args.patch * features.T2M.feature_dim, "--patch-dims: more than a patch has"),
            (args.schedule == "cosine" and args.spacing == "karras",
             "--spacing karras: useless with --schedule cosine (t = 99x at nearly all nodes)"),
            (args.space == "latent" and args.layers % 2 == 0, "--layers: odd with --space latent"),
            (4 % args.patch, "--patch: 1, 2 or 4 frames, because lengths are multiples of 4")):
        if wrong:
            raise InputError(message)


# ---- 3. The network ----------------------------------------------------------------------------------------
# [sync:denoiser]


def sinusoid(positions, width):
    """positions (...) -> (... width): the sine table of Vaswani et al. for tokens, words and timesteps."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=positions.device) / half)
    angles = positions[..., None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention from four plain linear layers, so that LoRA reaches each of them: adapters inside
    nn.MultiheadAttention or the fused path of nn.TransformerEncoderLayer are silently ignored."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, context, key_mask):
        q, k, v = (rearrange(f(y), "b n (h d) -> b h n d", h=self.heads)
                   for f, y in ((self.q, x), (self.k, context), (self.v, context)))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask[:, None, None, :])
        return self.out(rearrange(attended, "b h n d -> b n (h d)"))


class Layer(nn.Module):
    """Pre-norm transformer layer: self-attention, cross-attention to the words (optional), feed-forward.
    No dropout: the log-probabilities of rollout and update must come from the same function."""

    def __init__(self, width, heads, cross):
        super().__init__()
        self.self_attention, self.norm_self = Attention(width, heads), nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads) if cross else None
        self.norm_cross = nn.LayerNorm(width) if cross else None
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm_ff = nn.LayerNorm(width)

    def forward(self, x, mask, text=None, text_mask=None):
        y = self.norm_self(x)
        x = x + self.self_attention(y, y, mask)
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.norm_cross(x), text, text_mask)
        return x + self.down(F.gelu(self.up(self.norm_ff(x))))


class MotionDiffusion(nn.Module):
    """MDM-like denoiser that predicts the finished motion: its tokens attend to each other (key mask over
    padding) and to the words of the caption.

    Its coordinates x are whitened principal components of patches of a few frames (common/patches.py). Not in
    the paper: this spares a small model most of its cost; --patch 1 --patch-dims 0 turns it off.
    """

    def __init__(self, args, vocabulary, feature_dim):
        super().__init__()
        width, dims = args.width, args.patch_dims or args.patch * feature_dim
        self.vocabulary, self.width, self.dims = vocabulary, width, dims
        self.codec = patches.PatchCodec(args.patch, feature_dim, dims)
        self.words = nn.Embedding(len(vocabulary), width)
        self.null_text = nn.Parameter(torch.zeros(1, 1, width))  # stands for "no caption" in guidance
        self.text_layers = nn.ModuleList(Layer(width, args.heads, False) for _ in range(args.text_layers))
        self.text_norm, self.project_in = nn.LayerNorm(width), nn.Linear(dims, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(Layer(width, args.heads, cross=True) for _ in range(args.layers))
        self.norm, self.project_out = nn.LayerNorm(width), nn.Linear(width, dims)

    def encode_text(self, captions, word_drop=0.0, word_swap=0.0, g=None):
        """b captions -> text (b w d), text_mask (b w). In training g makes words unknown, or any other:
        a word as rare as its wrong uses leaves the model unsure, and where samples differ RL can choose."""
        ids, text_mask = self.vocabulary.encode(captions)
        if g is not None:
            ids = ids.masked_fill((torch.rand(ids.shape, generator=g) < word_drop) & text_mask, 1)
            other = torch.randint(1, len(self.vocabulary), ids.shape, generator=g)
            ids = torch.where((torch.rand(ids.shape, generator=g) < word_swap) & text_mask, other, ids)
        ids, text_mask = ids.to(self.null_text.device), text_mask.to(self.null_text.device)
        x = self.words(ids) + sinusoid(torch.arange(ids.shape[1], device=ids.device), self.width)  # b w d
        for layer in self.text_layers:
            x = layer(x, text_mask)
        return self.text_norm(x), text_mask

    def drop_text(self, text, text_mask, dropped):
        """Replace the captions where `dropped` (b) is True by the null token."""
        first = torch.arange(text.shape[1], device=text.device) == 0
        text = torch.where(dropped[:, None, None], self.null_text.expand_as(text), text)
        return text, torch.where(dropped[:, None], first[None], text_mask)

    def forward(self, x_t, timesteps, mask, text, text_mask):
        """x_t (b n c), timesteps (b), mask (b n), text (b w d), text_mask (b w) -> pred_x_start (b n c)"""
        positions = torch.arange(x_t.shape[1], device=x_t.device)
        x = self.project_in(x_t) + sinusoid(positions, self.width)  # b n d
        x = x + self.time(sinusoid(timesteps, self.width))[:, None]
        for layer in self.layers:
            x = layer(x, mask, text, text_mask)
        return self.project_out(self.norm(x)) * mask[..., None]
# [/sync:denoiser]


class LatentDiffusion(MotionDiffusion):
    """The same over the latents of a VAE, its frozen codec, and with skips between its layers (MLD)."""

    def __init__(self, args, vocabulary, feature_dim):
        super().__init__(replace(args, patch_dims=args.latent_dims), vocabulary, feature_dim)
        self.layers = nn.ModuleList([vae.Skips(self.layers, args.width)])
        self.codec = vae.MotionVAE(
            feature_dim, patch=args.patch, patch_dims=args.patch_dims, width=args.width, heads=args.heads,
            tokens=args.latents, dims=args.latent_dims).requires_grad_(False)


SPACES = {"joint": MotionDiffusion, "latent": LatentDiffusion}


# ---- 4. The base model: supervised pretraining on the source, cached ---------------------------------------


def build_base(args, source, device):
    """The pretrained denoiser, from the source's train split alone -> model, notes. The training loops are in
    common/denoising.py and common/vae.py. Cached; a new network, a new base."""
    clips, skeleton = source.splits["train"], source.skeleton
    vocabulary = datasets.Vocabulary.from_captions([c for clip in clips for c in clip.captions])
    model = SPACES[args.space](args, vocabulary, skeleton.feature_dim)
    weights, fit_codec = features.block_weights(skeleton, features.PATCH_WEIGHTS), None
    parts, shape = [sinusoid, Attention, Layer, MotionDiffusion], [source.fingerprint, args.patch, args.heads]
    cache = dict(cache_dir=args.cache_dir, cache=args.cache)
    if args.space == "latent":
        parts, shape = parts + [vae, LatentDiffusion], shape + [args.vae_iterations]
        fit_codec = partial(vae.fit_vae, model.codec, clips, weights, device, shaped_by=source.fingerprint,
                            seed=args.base_seed, iterations=args.vae_iterations, **cache)
    return model, denoising.fit(model, clips, weights, device, parts=parts, shaped_by=shape, **cache,
                                fit_codec=fit_codec, **runs.arguments_of(denoising.train, args))


# ---- 5. Rewards --------------------------------------------------------------------------------------------


def retrieval_reward(scorer, motion, lengths, captions, others=None):
    """Cosine of the mean latents of motion and caption (TMR), in [-1, 1]. motion is raw, (b t d): the scorer
    normalises with its own statistics. Whether the paper uses the cosine or a distance is unknown.
    others (m c), embeddings of captions: less how well the motion fits the best of them, as in InfoNCE."""
    if others is None:
        return scorer.similarity(motion, lengths, captions)
    seen, asked = retrieval.embed(scorer, motion, lengths, captions)
    return (seen * asked).sum(-1) - 0.1 * torch.logsumexp(seen @ others.T / 0.1, -1)


def build_reward(args, source, target, device):
    """The reward model and the judge, which share no clip; it has not seen what is left out -> both, notes"""
    seen = [source] if args.reward_data == "source" else [source, target]
    judged = [source] if args.leave_out else [source, target]
    families = ("transformer", "bigru") if args.reward_family == "both" else (args.reward_family,)
    options = dict(iterations=args.reward_iterations, seed=args.base_seed, cache_dir=args.cache_dir,
                   use_cache=args.cache, device=device)
    if args.reward != "motion-reward":
        *models, judge, notes = retrieval.rewards_and_judge(
            seen, judged, target=target, saw=args.reward_data, families=families, **options)
        return retrieval.Mean(models) if models[1:] else models[0], judge, notes
    judge, notes = retrieval.rewards_and_judge([], judged, target=target, saw="", losses=(), **options)
    model, notes["reward"] = motion_reward.fit_motion_reward(seen, [], head_iterations=0, saw=[], **options)
    return model, judge, notes


# ---- 6. The algorithm: pure functions, no I/O, no globals --------------------------------------------------


# Coefficients of the N Gaussian steps, each (N,): the network's answer e means the motion m = p x + q e, and
# mean = x_coef x + m_coef (m + k (m - m_last)).
Transition = namedtuple("Transition", "p q x_coef m_coef k std")


def transitions(grid, order, prediction="sample"):
    """SDE-DPM-Solver++ of order 1 or 2 (DPM-Solver++, Lu et al. 2022) between the nodes of the grid; float64,
    as 1 - exp(-2h) cancels. Order 1 is DDPM, and DDIM with eta = 1. prediction: what the network answers."""
    alpha, sigma, lam = grid.alpha.double(), grid.sigma.double(), grid.lam.double()
    h = lam[1:] - lam[:-1]                              # +inf at the last step, which ends without noise
    x_coef = sigma[1:] / sigma[:-1] * torch.exp(-h)     # SDE-DPM-Solver++1: (sigma_j / sigma_i) e^-h x_i
    m_coef = alpha[1:] * -torch.expm1(-2 * h)           # + alpha_j (1 - e^-2h) m_i
    std = sigma[1:] * torch.sqrt(-torch.expm1(-2 * h))  # + sigma_j sqrt(1 - e^-2h) z
    p, q, k = torch.zeros_like(h), torch.ones_like(h), torch.zeros_like(h)
    if prediction == "epsilon":                         # x = alpha m + sigma e
        p, q = 1 / alpha[:-1], -sigma[:-1] / alpha[:-1]
    if order == 2:                                      # SDE-DPM-Solver++2M: D = m_i + k (m_i - m_{i-1})
        k[1:] = h[1:] / (2 * h[:-1])
        k[~torch.isfinite(h)] = 0.0
    return Transition(*(y.float() for y in (p, q, x_coef, m_coef, k, std)))


def coefficients(columns, i, x_t):
    """Those of step i, an int, or of a slice of steps where x_t is (b s n c)."""
    return (y[i].to(x_t.device)[(...,) + (None, None) * (x_t.ndim == 4)] for y in columns)


def guess(transition, i, x_t, answer):
    """The finished motion m_i that the network's answer means."""
    p, q = coefficients(transition[:2], i, x_t)
    return p * x_t + q * answer


def step_mean(transition, i, x_t, m, m_last):
    """Mean of p(x_{i+1} | x_i). i: an int, or a slice of steps when x_t, m, m_last are (b s n c)."""
    x_coef, m_coef, k = coefficients(transition[2:5], i, x_t)
    return x_coef * x_t + m_coef * (m + k * (m - m_last))


def masked_mean_logp(x, mean, std, mask):
    """Gaussian log-density of x, averaged over the entries of valid tokens as in the DDPO code: the ratio of
    sums over thousands of entries over- and underflows. x, mean (... n c); std broadcastable; mask (... n)
    -> (...). The action is data: the gradient flows through the mean alone."""
    logp = -(x.detach() - mean).square() / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return (logp * mask[..., None]).sum((-1, -2)) / (mask.sum(-1) * x.shape[-1])


def masked_mean_kl(mean, mean_ref, std, mask):
    """KL of two Gaussians with equal std, averaged over valid entries: (mu - mu_ref)^2 / (2 std^2)."""
    kl = (mean - mean_ref).square() / (2 * std**2)
    return (kl * mask[..., None]).sum((-1, -2)) / (mask.sum(-1) * mean.shape[-1])


def group_advantages(rewards, adv_clip):
    """rewards (p g) -> advantages (p g): each prompt's own mean as baseline, one std for the whole batch.
    Not in the paper: the DDPO code tracks statistics per prompt over iterations (PromptTracker); with
    thousands of captions none comes back often enough, and one group's std explodes when samples agree."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (centred.square().mean().sqrt() + 1e-4)).clamp(-adv_clip, adv_clip)


# [sync:strongest]
def strongest(advantages, count):
    """Numbers, in order, of the `count` samples with the largest |advantage|; 0: of all. Not in the paper: a
    sample costs a quarter of its update, and those near their group's mean teach little (Xu et al. 2025)."""
    order = advantages.abs().argsort(descending=True, stable=True)
    return order[: count or len(order)].sort().values.tolist()
# [/sync:strongest]


def clipped_loss(ratio, advantages, clip_range):
    """The pessimistic surrogate of each step (DDPO section 4.3), clipped as in PPO eq. 7."""
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(unclipped, clipped)


def snr_step_weights(grid, trained, prediction="sample"):
    """1 / sqrt(SNR_{i+1} - SNR_i), mean 1, for the first `trained` steps. Not in the paper: a shift d of the
    prediction costs KL = (SNR_{i+1} - SNR_i) |d|^2 / 2, so without weights the late steps dominate. Of
    predicted noise it is (SNR_{i+1} / SNR_i - 1) |d|^2 / 2."""
    snr = torch.exp(2 * grid.lam.double())[: trained + 1]
    gain = snr[1:] - snr[:-1] if prediction == "sample" else snr[1:] / snr[:-1] - 1
    return (gain.rsqrt() / gain.rsqrt().mean()).float()


# [sync:predict]
def predict(model, x_t, timesteps, mask, text, text_mask, guidance_scale):
    """The network's answer m_theta(x_t, t, c). With guidance the guided one IS the policy, in rollout and
    update alike: m = m_null + w (m_text - m_null)."""
    if guidance_scale == 1.0:
        return model(x_t, timesteps, mask, text, text_mask)
    everything = torch.ones(len(text), dtype=torch.bool, device=text.device)
    null, null_mask = model.drop_text(text, text_mask, everything)
    both = [torch.cat(pair) for pair in ((x_t, x_t), (timesteps, timesteps), (mask, mask), (text, null),
                                         (text_mask, null_mask))]
    m_text, m_null = model(*both).chunk(2)
    return m_null + guidance_scale * (m_text - m_null)
# [/sync:predict]


@torch.no_grad()
def rollout(model, grid, transition, captions, mask, noise, guidance_scale):
    """Sample one trajectory per caption (DDPO section 4.2). mask (b n), noise (b N+1 n c): the start and a
    draw for each step; the last does not count (std 0). -> states (b N+1 n c): x_0 .. x_N, the motion."""
    text, text_mask = model.encode_text(captions)
    x, m_last = noise[:, 0] * mask[..., None], None
    states = [x]
    for i, timestep in enumerate(grid.timesteps.tolist()):
        answer = predict(model, x, x.new_full((len(x),), timestep), mask, text, text_mask, guidance_scale)
        m = guess(transition, i, x, answer)
        mean = step_mean(transition, i, x, m, m if m_last is None else m_last)
        x = (mean + transition.std[i].item() * noise[:, i + 1]) * mask[..., None]  # padding stays zero
        states.append(x)
        m_last = m
    return torch.stack(states, 1)


def step_logps(model, grid, transition, states, captions, mask, trained, guidance_scale):
    """Log-probabilities under the current weights of the first `trained` stored steps, in one forward pass:
    every m_i is computed once, so the second-order mean, which needs m_{i-1} too, is exact.
    states (b N+1 n c) -> logp (b s), mean (b s n c), std (s 1 1)"""
    b = len(states)
    text, text_mask = model.encode_text(captions)
    x_t, x_prev = states[:, :trained], states[:, 1 : trained + 1]  # b s n c
    per_step = [repeat(y, "b ... -> (b s) ...", s=trained) for y in (mask, text, text_mask)]
    timesteps = grid.timesteps[:trained].to(states.device).repeat(b).to(states.dtype)
    answer = predict(model, rearrange(x_t, "b s n c -> (b s) n c"), timesteps, *per_step, guidance_scale)
    m = guess(transition, slice(0, trained), x_t, rearrange(answer, "(b s) n c -> b s n c", b=b))
    m_last = torch.cat([m[:, :1], m[:, :-1]], 1)
    mean = step_mean(transition, slice(0, trained), x_t, m, m_last)
    std = transition.std[:trained, None, None].to(states.device)
    assert (std > 0).all(), "a step without variance has no density and must not be trained"
    return masked_mean_logp(x_prev, mean, std, repeat(mask, "b n -> b s n", s=trained)), mean, std


# ---- 7. The run --------------------------------------------------------------------------------------------


class Policy(NamedTuple):
    """A denoiser with its adapters and the steps it is sampled with."""
    model: MotionDiffusion
    grid: samplers.Grid
    transition: Transition
    tokens: int            # n of every state, fixed for the run: a sample must not change with its batch
    device: torch.device


def make_policy(args, model, longest, device):
    """Adapters into the frozen base, and the sampling grid, for motions of up to `longest` frames."""
    model.requires_grad_(False)
    lora.inject(model, args.lora_targets, args.lora_rank, args.lora_alpha, generator(args.seed, 0, "lora"))
    grid = samplers.make_grid(args.schedule, args.steps, args.spacing)
    table = transitions(grid, args.order, args.prediction)
    if args.bf16:
        model.forward = runs.in_bfloat16(model.forward)
    return Policy(model.to(device).eval(), grid, table, model.codec.count(longest), device)


def load_policy(args, adapter, device):
    """The policy of a finished run: adapter.pt holds the adapters and the base they belong to."""
    model = SPACES[args.space](args, datasets.Vocabulary(adapter["words"]), features.T2M.feature_dim)
    model.load_state_dict(adapter["base"])
    policy = make_policy(args, model, adapter["longest"], device)
    lora.load_lora(policy.model, adapter["lora"])
    return policy


def sample(args, policy, captions, lengths, iteration, purpose, indices):
    """Roll out one trajectory per caption, lengths (b) in frames -> states (b N+1 n c), mask (b n). Each
    sample has a noise stream of its own, so it does not depend on its batch, device or process."""
    mask = policy.model.codec.mask(lengths, policy.tokens)
    shape = (args.steps + 1, policy.tokens, policy.model.dims)
    streams = (generator(args.seed, iteration, purpose, k) for k in indices)
    noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(policy.device)
    mask, model = mask.to(policy.device), policy.model
    return rollout(model, policy.grid, policy.transition, captions, mask, noise, args.guidance_scale), mask


def collect(args, policy, prompts, table, iteration, rank, processes):
    """Stage 1, roll out: P prompts x G samples. Each process takes whole groups, its share of the prompts."""
    g = generator(args.seed, iteration, "prompts")
    order = torch.randperm(len(prompts), generator=g).tolist()
    chosen = [order[k % len(order)] for k in range(args.prompts_per_iteration)]
    # One length per group: the baseline compares like with like. From the source: no target motion counts.
    lengths = datasets.draw_lengths(table, [prompts[k] for k in chosen], g)
    own = [p for p in range(len(chosen)) if p * processes // len(chosen) == rank]
    index = [p * args.samples_per_prompt + s for p in own for s in range(args.samples_per_prompt)]
    group = [k // args.samples_per_prompt for k in index]
    captions, lengths = [prompts[chosen[p]] for p in group], lengths[group]
    states, mask = sample(args, policy, captions, lengths, iteration, "rollout", index)
    asked = [prompts[k] for k in chosen for _ in range(args.samples_per_prompt)]  # by all processes
    return dict(states=states, mask=mask, captions=captions, lengths=lengths, index=index, asked=asked)


def score(args, policy, reward_model, batch, wrong, others, iteration):
    """Stage 2, score -> rewards (b) of this process's motions, on the CPU."""
    captions, lengths = batch["captions"], batch["lengths"].to(policy.device)
    motion = policy.model.codec.decode(batch["states"][:, -1], lengths)
    if args.reward == "random":
        rewards = torch.stack([torch.randn((), generator=generator(args.seed, iteration, "random_reward", k))
                               for k in batch["index"]])
    else:
        asked = [wrong[c] for c in captions] if args.reward == "shuffled" else captions
        rewards = retrieval_reward(reward_model, motion, lengths, asked, others).cpu()
    runs.check_rewards(rewards, captions, f"iteration {iteration}: {args.reward} reward")
    return rewards


def rescore(args, policy, batch, rows):
    """Log-probabilities and means of the trained steps of some trajectories under the current weights."""
    return step_logps(policy.model, policy.grid, policy.transition, batch["states"][rows],
                      [batch["captions"][r] for r in rows], batch["mask"][rows],
                      args.steps - args.skip_last, args.guidance_scale)


def update(args, policy, batch, advantages, optimizer, iteration, stop):
    """Stage 3, update: re-score the stored steps, clipped loss, a step per minibatch -> values to log.
    advantages (p*g): those of all processes; this one's rows are the samples batch["index"]."""
    trained = args.steps - args.skip_last
    clip_range = args.clip_range or 1e-4 * math.sqrt(16384 / (policy.tokens * policy.model.dims))
    weights, parameters = torch.ones(trained, device=policy.device), list(lora.lora_parameters(policy.model))
    if args.snr_weights:
        weights = snr_step_weights(policy.grid, trained, args.prediction).to(policy.device)
    kept, advantages = strongest(advantages, args.kept_samples), advantages[batch["index"]].to(policy.device)
    plan = []  # (size over all processes, rows here) of each minibatch; rows in chunks of --micro-batch
    for epoch in range(args.inner_epochs):
        g = generator(args.seed, iteration, "shuffle", epoch)
        plan += runs.minibatches(kept, args.minibatches, batch["index"], args.micro_batch, g)
    with torch.no_grad():  # recomputed in the very same chunks: the first ratio is 1 to the last bit
        old = [[rescore(args, policy, batch, rows)[0] for rows in chunks] for _, chunks in plan]
        if args.kl_coef:
            with lora.disabled(policy.model):
                base = [[rescore(args, policy, batch, rows)[1] for rows in chunks] for _, chunks in plan]
    log, ratios = dict.fromkeys(("loss", "approx_kl", "clipfrac", "kl_base", "grad_norm"), 0.0), []
    for n, (count, chunks) in enumerate(plan):
        optimizer.zero_grad()
        for c, rows in enumerate(chunks):
            stop.check()
            logp, means, std = rescore(args, policy, batch, rows)
            logratio = logp - old[n][c]
            ratio = logratio.exp()  # b s
            loss = weights * clipped_loss(ratio, advantages[rows][:, None], clip_range)
            loss = loss.sum() / (count * trained)
            if args.kl_coef:
                kl = masked_mean_kl(means, base[n][c], std, batch["mask"][rows][:, None])
                kl = kl.sum() / (count * trained)
                loss, log["kl_base"] = loss + args.kl_coef * kl, log["kl_base"] + kl.item() / len(plan)
            ratios.append(ratio.detach())
            runs.check_loss(loss, f"iteration {iteration}")
            loss.backward()
            share = 1 / (count * trained * len(plan))
            log["loss"] += loss.item() / len(plan)
            log["approx_kl"] += ((ratio - 1) - logratio).sum().item() * share
            log["clipfrac"] += ((ratio - 1).abs() > clip_range).sum().item() * share
        runs.all_reduce_grads(parameters)
        where = f"iteration {iteration}: gradient norm"
        log["grad_norm"] += runs.clip_gradients(parameters, args.max_grad_norm, where) / len(plan)
        optimizer.step()
    first, every = (torch.cat(r).flatten() if r else torch.ones(1) for r in (ratios[:1], ratios))
    log |= {"first_ratio_error": (first - 1).abs().max().item(),
            "ratio_min": every.min().item(), "ratio_max": every.max().item()}
    return runs.reduce_log(log, lowest={"ratio_min"}, highest={"ratio_max", "first_ratio_error", "grad_norm"})


def costs(args):
    """What an iteration costs: motions sampled, updates, and calls of the denoiser, a forward pass of one
    motion at one step; a backward pass counts as another."""
    samples = args.prompts_per_iteration * args.samples_per_prompt
    learnt = args.inner_epochs * (args.kept_samples or samples) * (args.steps - args.skip_last)
    passes = 3 + bool(args.kl_coef)  # old log-probabilities, there and back, and the base's means
    guided = 1 + (args.guidance_scale != 1.0)
    return {"samples": samples, "updates": args.inner_epochs * args.minibatches,
            "calls": guided * (samples * args.steps + learnt * passes)}


LOG_FIELDS = ("iteration", "samples", "updates", "calls", "reward", "group_std", "frac_zero_std", "loss",
              "approx_kl", "clipfrac", "kl_base", "grad_norm", "first_ratio_error", "ratio_min", "ratio_max",
              "val_reward", "val_judge", "val_oracle", "val_foot_skate", "val_jerk")


def train(start, policy, scorers, source, target, folder):
    """The loop. Only the adapters change."""
    args, (rank, processes) = start.args, runs.world(policy.device)
    prompts = sorted({c for clip in target.splits["train"] for c in clip.captions})  # text, no motion
    table = datasets.length_table(source.splits["train"])
    wrong, contrastive = retrieval.wrong_captions(prompts, args.seed), args.reward == "contrastive"
    others = F.normalize(scorers.reward_model.embed_text(prompts), dim=-1) if contrastive else None
    parameters = list(lora.lora_parameters(policy.model))
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    tracker = PromptTracker(buffer_size=32, min_count=16)  # DDPO code
    watch, shown, read = start.watch, {}, {"data read": source.fingerprint + target.fingerprint}
    print(f"  {len(prompts)} prompts; {args.prompts_per_iteration} x {args.samples_per_prompt} motions an "
          f"iteration; {args.steps - args.skip_last} of {args.steps} steps trained, "
          f"{lora.count(parameters)} of {lora.count(policy.model.parameters())} weights")
    with runs.Loop("ddpo", start, folder, LOG_FIELDS, read, policy.model) as loop:
        if loop.state:
            lora.load_lora(policy.model, loop.state["lora"])
            optimizer.load_state_dict(loop.state["optimizer"])
            tracker.rewards = loop.state["tracker"]
        for iteration in loop:
            with watch.stage("rollout"):
                batch = collect(args, policy, prompts, table, iteration, rank, processes)
            loop.check()
            with watch.stage("reward"):
                own = score(args, policy, scorers.reward_model, batch, wrong, others, iteration)
                loop.rewards = rewards = runs.all_gather_rows(own)
                groups = rearrange(rewards, "(p g) -> p g", g=args.samples_per_prompt)
                if args.advantage == "group":
                    advantages = group_advantages(groups, args.adv_clip).flatten()
                else:
                    advantages = torch.from_numpy(tracker.update(batch["asked"], rewards.numpy())).float()
                    advantages = advantages.clamp(-args.adv_clip, args.adv_clip)
            with watch.stage("update"):
                values = update(args, policy, batch, advantages, optimizer, iteration, loop)
            spent, std = {name: (iteration + 1) * cost for name, cost in costs(args).items()}, groups.std(1)
            row = dict.fromkeys(LOG_FIELDS) | values | spent | {
                "iteration": iteration, "reward": rewards.mean().item(), "group_std": std.mean().item(),
                "frac_zero_std": (std < 1e-8).float().mean().item()}
            if (iteration + 1) % args.eval_every == 0:
                with watch.stage("validation"):
                    val = reports.evaluate(target.splits["val"], scorers, policy_sampler(args, policy),
                                           purpose="validation", benchmark=False)
                row |= {name: val[name[4:]][0] for name in LOG_FIELDS if name.startswith("val_")}
                shown = {name: row[name] for name in ("val_judge", "val_oracle")}
            loop.end(row, {"reward": row["reward"], **shown},
                     {"lora": lora.lora_state(policy.model), "optimizer": optimizer.state_dict(),
                      "tracker": tracker.rewards})


# ---- 8. Evaluation and pictures ----------------------------------------------------------------------------


def policy_sampler(args, policy, strength=1.0):
    """The denoiser as a sampler for common/reports.py, its adapters at some strength; 0 is the base. Sample k
    of a call always starts from the same noise: base and tuned are compared in pairs."""
    def chunk(captions, lengths, rows, purpose, repeat):
        with lora.scaled(policy.model, strength):
            states, _ = sample(args, policy, captions, lengths, repeat, purpose, rows)
        return policy.model.codec.decode(states[:, -1], lengths), None
    return reports.in_chunks(chunk)


def write_prompts(args, adapter, folder, device):
    """--prompt: GIF, joints and BVH of every caption, from adapter.pt alone."""
    policy = load_policy(args, adapter, device)
    chosen = {"before": policy_sampler(args, policy, 0.0)} if args.compare else {}
    reports.export(folder, args.prompt, args.length or adapter["frames"], adapter["longest"], features.T2M,
                   chosen | {"after": policy_sampler(args, policy)})


def main(argv):
    """Prepare; then train, evaluate and draw, or do one of the two things a finished adapter is for."""
    start = runs.prepare(Args, TINY, argv, __doc__, method="ddpo", product="ddpo-adapter", check=check_args,
                         presets=PRESETS)
    args, adapter, device, rank, watch = start.args, start.stored, start.device, start.rank, start.watch
    if args.prompt:
        write_prompts(args, adapter, start.open_folder(), device)
        return
    with watch.stage("data"):
        source, target = datasets.load_pair(
            args.source, args.dataset, left_out=args.leave_out, clips=(args.source_clips, args.target_clips),
            data_root=args.data_root, cache_dir=args.cache_dir, seed=args.base_seed, use_cache=args.cache)
    folder, longest = start.open_folder(), max(source.longest, target.longest)
    print(f"{device}, {start.threads} CPU thread(s)\n  source: {source.label}\n  target: {target.label}")
    with watch.stage("reward model and judge"):
        reward_model, judge, notes = build_reward(args, source, target, device)
    scorers = reports.Scorers(reward_model, judge, source.skeleton)
    with watch.stage("base"):
        if adapter:
            policy = load_policy(args, adapter, device)
        else:
            model, notes["base"] = build_base(args, source, device)
            kept = {"base": {k: v.cpu().clone() for k, v in model.state_dict().items()},
                    "words": model.vocabulary.words, "frames": source.usual_length, "longest": longest}
            policy = make_policy(args, model, longest, device)
    about = start.about(folder, notes, source, target)
    if not adapter:
        train(start, policy, scorers, source, target, folder)
        if rank:
            return
        runs.save_checkpoint(folder / "adapter.pt", kind="ddpo-adapter", keep_previous=False, data={
            "args": runs.shaping_args(args), "lora": lora.lora_state(model), **kept})
    with watch.stage("evaluation"):
        base, tuned = policy_sampler(args, policy, 0.0), policy_sampler(args, policy)
        rows = {"VAE": partial(vae.reconstruction, policy.model.codec)} if args.space == "latent" else {}
        if args.references:
            other = make_policy(args, build_base(args, target, device)[0], longest, device)
            rows["target base"] = lambda clips: policy_sampler(args, other, 0.0)
        tables = reports.final_tables(
            source, target, scorers, base, tuned, args.eval_repeats, args.best_of, rows)
        if args.references:
            tables["strengths"] = reports.strength_curve(
                folder / "strengths.png", source, target, scorers, partial(policy_sampler, args, policy))
    with watch.stage("pictures"):
        reports.draw(folder, target.splits["test"], scorers, {"before": base, "after": tuned}, not adapter)
        if args.ab_page:
            reports.ab_pairs(folder, target.splits["test"], scorers, base, tuned, args.ab_page)
    counts = {name: 0 if adapter else args.iterations * cost for name, cost in costs(args).items()}
    runs.finish(folder, watch, {**about, **tables, "counts": counts})


if __name__ == "__main__":
    runs.run_main(main)
