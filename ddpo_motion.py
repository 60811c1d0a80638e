"""DDPO with LoRA on a text-to-motion diffusion model, from text prompts alone.

The idea. A diffusion model has learnt to move from one data set (the source). It is then asked for
motions in the words of another (the target), of which it never sees a motion. The model samples,
and a text-motion retrieval model says how well each sample fits its prompt. Every denoising step
is a draw from a Gaussian, so policy gradient can make the steps behind good samples more likely.
Only small low-rank adapters (LoRA) are trained.

Papers
  [NM]    No MoCap Needed, Macaluso et al. 2025, arXiv 2510.06988: this method
  [DDPO]  Black et al. 2023, arXiv 2305.13301; "DDPO code" is kvablack/ddpo-pytorch
  [DPM]   DPM-Solver++, Lu et al. 2022, arXiv 2211.01095: the sampler
  [MDM]   Tevet et al. 2022, arXiv 2209.14916, [MLD] Chen et al. 2023, arXiv 2212.04048: networks
  [TMR]   Petrovich et al. 2023, arXiv 2305.00976: the reward

The decision process ([DDPO] section 4.2), for denoising steps i = 0 .. N-1
  in the code         symbol                    meaning
  x = states[:, i]    x_i                       state: x_0 is noise, x_N the finished motion
  states[:, i + 1]    x_{i+1}                   action: the next, less noisy state
  m                   m_theta(x_i, t_i, c)      the network's guess of the finished motion
  mean, std           mu_theta, sigma_i         policy: x_{i+1} ~ N(mean, std^2)
  logp, logp_old      log pi_theta, log pi_old  averaged over the entries of x, not summed
  ratio               exp(logp - logp_old)      of one step, clipped as in PPO
  rewards             R(x_N, c)                 one number a motion, at the end

Read sections 5 and 6 first, then 7: policy, update, loop.
  python ddpo_motion.py --dataset kit           # from nothing to a tuned model
  python ddpo_motion.py --dataset kit --tiny    # the same at toy size, half a minute
  python ddpo_motion.py --prompt "a person waves" --load runs/ddpo_kit_seed0/adapter.pt
"""

# ---- 1. Imports ----

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from common import (datasets, diffusion, evaluate, features, generator, lora, normal,
                    retrieval, runs, samplers, training, vae)
from common.runs import RunArgs, arg

# ---- 2. Arguments ----

@dataclass
class Args(RunArgs):
    """Every field is a flag. RunArgs has those of all scripts: --dataset, --seed, --resume ..."""
    source: str = arg("", "source domain; empty: the other one of kit and humanml3d", group="data")
    leave_out: str = arg("", "an action (kick): cut from the source, alone in the target")
    length: int = arg(0, "frames of a --prompt; 0: the median of the source", shaping=False)
    space: str = arg("joint", "what is diffused: motion (MDM), or latents of a VAE (MLD)",
                     choices=("joint", "latent"), group="sampling")
    steps: int = arg(5, "denoising steps N ([NM]: 10); more do not help here")
    order: int = arg(1, "DPM-Solver++ order; 2 helps from 10 steps on", choices=(1, 2))
    spacing: str = arg("linspace", "where the steps are; karras needs --skip-last 3",
                       choices=("linspace", "trailing", "karras"))
    guidance_scale: float = arg(1.0, "classifier-free (MDM: 2.5, MLD: 7.5); doubles cost")
    reward: str = arg("retrieval", "shuffled and random are controls: they must teach nothing",
                      choices=("retrieval", "shuffled", "random"), group="reward")
    reward_data: str = arg("both", "whose motions the reward model saw; source: strict",
                           choices=("source", "both"))
    iterations: int = arg(200, "RL iterations (DDPO: 100 to 200, [NM]: 30000)", group="update")
    prompts: int = arg(24, "prompts P of a rollout; more make less noise")
    samples: int = arg(16, "motions G of each prompt; their mean is the baseline", lowest=2)
    kept_samples: int = arg(128, "motions trained on, by |advantage|; 0: all", lowest=0)
    minibatches: int = arg(2, "optimizer steps an iteration; more is more off-policy")
    micro_batch: int = arg(0, "motions of a forward pass, fewer save memory; 0: a minibatch")
    lr: float = arg(1.5e-3, "learning rate of the adapters (DDPO code: 3e-4)")
    clip_range: float = arg(0.0, "bound of the ratio; 0: by the size of a state")
    kl_coef: float = arg(0.02, "weight of the KL to the base; it keeps the source")
    skip_last: int = arg(1, "last steps not trained; the very last has no variance")
    snr_weights: bool = arg(True, "let early steps, which decide what is done, count more")
    lora_rank: int = arg(8, "rank of the adapters ([NM]: 4)")
    lora_alpha: float = arg(8.0, "their scale is alpha / rank ([NM]: 16)")
    eval_every: int = arg(25, "iterations between looks at val prompts", group="evaluation")
    best_of: int = arg(8, "table row: the best of so many base samples", shaping=False)


SIZE_ARGS = {  # what --size sets here; the network's sizes are in common/diffusion.py
    "tiny": dict(iterations=3, prompts=4, samples=4, kept_samples=8, eval_every=2, eval_repeats=2,
                 best_of=2),
    "paper": dict(steps=10, guidance_scale=2.5, prompts=32, kept_samples=0, micro_batch=64,
                  lr=3e-4, kl_coef=0.0, eval_repeats=20)}
LORA_LAYERS = r"^(text_)?layers.*\.(q|k|v|out|up|down)$"  # of motion and text
ADV_CLIP, MAX_GRAD_NORM = 5.0, 1.0                        # both as in the DDPO code


def check_args(args):
    """Refuse at once what cannot work, and say which flag to change."""
    motions = args.prompts * args.samples
    kept = args.kept_samples or motions
    samplers.check_steps(args.steps, args.spacing)
    runs.refuse(
        (args.prompts < runs.process_count(), "--prompts: at least as many as processes"),
        (not 1 <= args.skip_last < args.steps, "--skip-last: 1 to --steps - 1"),
        (kept > motions, f"--kept-samples: at most prompts x samples, {motions}"),
        (kept % args.minibatches, f"--minibatches: must divide the {kept} motions trained on"))


# ---- 3. The network ----
# [sync:denoiser]


def sinusoid(positions, width):
    """Positions (...) -> (... width): the sine table of Vaswani et al. 2017."""
    half = torch.arange(width // 2, device=positions.device)
    frequencies = torch.exp(-math.log(10000.0) * half / (width // 2))
    angles = positions[..., None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of x (b n d) to a context (b m d)."""

    def __init__(self, width, heads):
        super().__init__()
        # Four plain linear layers, so that LoRA reaches each: nn.MultiheadAttention uses
        # weights without calling their layers, and an adapter would be ignored.
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, context, key_mask):
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads)
                   for y in (self.q(x), self.k(context), self.v(context)))
        mask = key_mask[:, None, None, :]  # the same keys for every head and query
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(attended, "b h n d -> b n (h d)"))


class Layer(nn.Module):
    """Pre-norm transformer layer: self-attention, cross-attention to the words, feed-forward."""

    def __init__(self, width, heads, cross):
        super().__init__()
        # No dropout: rollout and update must see the same function.
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
    """A denoiser like MDM's: tokens of motion attend to each other and to the words of a caption.

    Unlike MDM's a token is a patch of four frames in principal components (codec). Or it is
    one of the latents of a VAE, as in MLD, with skips between the layers.
    """

    def __init__(self, size, vocabulary, codec):
        super().__init__()
        width, heads = size.width, size.heads
        self.vocabulary, self.width, self.dims, self.codec = vocabulary, width, codec.dims, codec
        self.words = nn.Embedding(len(vocabulary), width)
        self.null_text = nn.Parameter(torch.zeros(1, 1, width))  # "no caption", for guidance
        self.text_layers = nn.ModuleList(
            Layer(width, heads, cross=False) for _ in range(size.text_layers))
        self.text_norm, self.project_in = nn.LayerNorm(width), nn.Linear(self.dims, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        layers = [Layer(width, heads, cross=True) for _ in range(size.layers)]
        self.layers = nn.ModuleList([vae.Skips(layers, width)] if size.latents else layers)
        self.norm, self.project_out = nn.LayerNorm(width), nn.Linear(width, self.dims)

    def encode_text(self, captions, spoil=None):
        """b captions -> text (b w d), text_mask (b w). spoil: see datasets.Vocabulary.encode."""
        ids, text_mask = self.vocabulary.encode(captions, spoil=spoil)
        ids, text_mask = ids.to(self.null_text.device), text_mask.to(self.null_text.device)
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.words(ids) + sinusoid(positions, self.width)  # b w d
        for layer in self.text_layers:
            x = layer(x, text_mask)
        return self.text_norm(x), text_mask

    def drop_text(self, text, text_mask, dropped):
        """The captions with `dropped` (b) become the null token alone."""
        text = torch.where(dropped[:, None, None], self.null_text.expand_as(text), text)
        first = torch.arange(text.shape[1], device=text.device) == 0
        return text, torch.where(dropped[:, None], first[None], text_mask)

    def forward(self, x, timesteps, mask, text, text_mask):
        """x (b n c), timesteps (b), mask (b n), text (b w d), text_mask (b w) -> (b n c)"""
        positions = torch.arange(x.shape[1], device=x.device)
        h = self.project_in(x) + sinusoid(positions, self.width)  # b n d
        h = h + self.time(sinusoid(timesteps, self.width).to(x))[:, None]
        for layer in self.layers:
            h = layer(h, mask, text, text_mask)
        return self.project_out(self.norm(h)) * mask[..., None]  # padding stays zero
# [/sync:denoiser]


def make_model(args, vocabulary):
    """The denoiser of --space and --size with random weights."""
    size = diffusion.SIZES[args.space][args.size]
    return MotionDiffusion(size, vocabulary, diffusion.make_codec(size, features.T2M.feature_dim))


# ---- 4. The reward ----

def build_reward(args, source, target, **options):
    """The function that is optimised, reward(motion, lengths, captions) -> (b), and a note.

    motion (b t d) are raw features, meaningless after their lengths (b). Return another
    function here, and it fills the column `reward` of every table, picks the best of
    --best-of and labels the pictures. The joints (b t 22 3), in metres and with y up, are
    features.features_to_joints(motion, features.T2M).
    """
    seen = [source] if args.reward_data == "source" else [source, target]
    model, notes = retrieval.reward_model(seen, target=target, **options)
    # The cosine of the latents of motion and caption, in [-1, 1] [TMR].
    return model.similarity, notes


# ---- 5. The policy: a denoising step is a Gaussian ----

class Steps(NamedTuple):
    """The N steps of SDE-DPM-Solver++ [DPM]. All fields but the first are (N 1 1):
    steps.std[i] fits one state (b n c), and steps.std[:s] fits s of them (b s n c)."""
    timesteps: torch.Tensor  # (N,) what the network is told
    p: torch.Tensor          # the motion is m = p x_i + q e, e the network's answer
    q: torch.Tensor
    x_coef: torch.Tensor     # mean = x_coef x_i + m_coef (m_i + k (m_i - m_{i-1}))
    m_coef: torch.Tensor
    k: torch.Tensor          # 0 for order 1
    std: torch.Tensor        # 0 in the last step, which ends without noise


def solver_steps(grid, order, prediction, device="cpu"):
    """The table of SDE-DPM-Solver++; order 1 is DDPM, and DDIM with eta = 1.
    prediction: the network answers with the motion ("sample") or the noise ("epsilon")."""
    # In float64. A state is x = alpha m + sigma e; a step goes from node i to j = i + 1.
    alpha, sigma, lam = grid.alpha.double(), grid.sigma.double(), grid.lam.double()
    h = lam[1:] - lam[:-1]                              # lam = log(alpha / sigma); last h = inf
    x_coef = sigma[1:] / sigma[:-1] * torch.exp(-h)     #   (sigma_j / sigma_i) e^-h x_i
    m_coef = alpha[1:] * -torch.expm1(-2 * h)           # + alpha_j (1 - e^-2h) m_i
    std = sigma[1:] * torch.sqrt(-torch.expm1(-2 * h))  # + sigma_j sqrt(1 - e^-2h) z
    k, p, q = torch.zeros_like(h), torch.zeros_like(h), torch.ones_like(h)
    if prediction == "epsilon":                         # the same, solved for m
        p, q = 1 / alpha[:-1], -sigma[:-1] / alpha[:-1]
    if order == 2:                                      # 2M, the midpoint rule:
        k[1:] = h[1:] / (2 * h[:-1])                    # m_i + h_i / (2 h_{i-1}) (m_i - m_{i-1})
        k[~torch.isfinite(h)] = 0.0
    table = [y.float()[:, None, None].to(device) for y in (p, q, x_coef, m_coef, k, std)]
    return Steps(grid.timesteps.to(device), *table)


class Policy(NamedTuple):
    """A denoiser with adapters, and how it is sampled."""
    model: MotionDiffusion
    steps: Steps
    weights: torch.Tensor   # (s,) of the steps that are trained
    tokens: int             # n of every state, the same in every batch
    guidance_scale: float
    device: torch.device


# [sync:predict]
def predict(policy, x, timesteps, mask, text, text_mask):
    """The network's answer e for x (b n c). With guidance the guided answer IS the policy,
    in rollout and update alike: e = e_null + w (e_text - e_null)."""
    answer = policy.model(x, timesteps, mask, text, text_mask)
    if policy.guidance_scale == 1.0:
        return answer
    everything = torch.ones(len(x), dtype=torch.bool, device=x.device)
    no_text = policy.model.drop_text(text, text_mask, everything)
    null = policy.model(x, timesteps, mask, *no_text)
    return null + policy.guidance_scale * (answer - null)
# [/sync:predict]


def step_mean(steps, i, x, m, m_last):
    """mu_theta, the mean of x_{i+1} [DPM]; i is a step, or a slice of steps for (b s n c)."""
    guess = m + steps.k[i] * (m - m_last)
    return steps.x_coef[i] * x + steps.m_coef[i] * guess


@torch.no_grad()
def rollout(policy, captions, mask, noise):
    """Sample a trajectory for each caption ([DDPO] section 4.2). mask (b n); noise (b N+1 n c):
    the start and a draw for each step -> states (b N+1 n c), all that the update needs."""
    steps, m_last = policy.steps, None
    text, text_mask = policy.model.encode_text(captions)
    x = noise[:, 0] * mask[..., None]
    states = [x]
    for i, timestep in enumerate(steps.timesteps):
        answer = predict(policy, x, timestep.float().expand(len(x)), mask, text, text_mask)
        m = steps.p[i] * x + steps.q[i] * answer
        mean = step_mean(steps, i, x, m, m if m_last is None else m_last)
        x = (mean + steps.std[i] * noise[:, i + 1]) * mask[..., None]  # padding stays zero
        states.append(x)
        m_last = m
    return torch.stack(states, 1)


def masked_mean(y, mask):
    """The mean of y (... n c) over the entries of real tokens, mask (... n) -> (...)"""
    return (y * mask[..., None]).sum((-1, -2)) / (mask.sum(-1) * y.shape[-1])


def masked_mean_logp(x, mean, std, mask):
    """Gaussian log-density of x (... n c), averaged over entries: x, mean (... n c) -> (...)"""
    # x is an action that was taken, so it is data: gradient flows through the mean alone.
    logp = -(x.detach() - mean).square() / (2 * std**2) - torch.log(std)
    # A mean, as in the DDPO code: exp of a sum over thousands of entries would overflow.
    return masked_mean(logp - 0.5 * math.log(2 * math.pi), mask)


def step_logps(policy, states, captions, mask, s):
    """log pi_theta of the first s stored steps under the current weights, in one forward pass.
    states (b N+1 n c), mask (b n) -> logp (b s), mean (b s n c)"""
    steps = policy.steps
    text, text_mask = policy.model.encode_text(captions)
    x, x_next = states[:, :s], states[:, 1:s + 1]  # b s n c
    # Steps become rows of the batch. All m_i come at once, so the mean of order 2 is exact.
    rows = (repeat(y, "b ... -> (b s) ...", s=s) for y in (mask, text, text_mask))
    timesteps = steps.timesteps[:s].float().repeat(len(states))
    answer = predict(policy, rearrange(x, "b s n c -> (b s) n c"), timesteps, *rows)
    m = steps.p[:s] * x + steps.q[:s] * rearrange(answer, "(b s) n c -> b s n c", s=s)
    m_last = torch.cat([m[:, :1], m[:, :-1]], 1)
    mean, std = step_mean(steps, slice(0, s), x, m, m_last), steps.std[:s]
    assert (std > 0).all(), "a step without variance has no density"
    return masked_mean_logp(x_next, mean, std, repeat(mask, "b n -> b s n", s=s)), mean


# ---- 6. Advantage, loss, update ----

def group_advantages(rewards, prompts=None):
    """rewards (p g) of p prompts -> advantages (p g); another baseline may read the prompts."""
    # An easy prompt must not make its motions look good: the mean of its group is the baseline.
    # Not in [NM]: the DDPO code keeps statistics of each prompt over iterations; with
    # thousands of captions none comes back often enough.
    rewards = rewards - rewards[:, :1]  # equal rewards are exactly 0, where a mean would round
    centred = rewards - rewards.mean(1, keepdim=True)
    # One spread serves all groups; that of a single group explodes where its samples agree.
    return (centred / (centred.square().mean().sqrt() + 1e-4)).clamp(-ADV_CLIP, ADV_CLIP)


# [sync:strongest]
def strongest(advantages, count):
    """Indices of the `count` samples with the largest |advantage|, in order; 0: of all."""
    # Not in [NM]: to sample a motion costs a quarter of its update, and samples near
    # their group's mean teach little (Xu et al. 2025, arXiv 2504.13818).
    order = advantages.abs().argsort(descending=True, stable=True)
    return order[:count or len(order)].sort().values.tolist()
# [/sync:strongest]


def clipped_loss(ratio, advantages, clip_range):
    """The larger of two losses ([DDPO] section 4.3, PPO eq. 7): ratio (b s), advantages (b 1)."""
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(unclipped, clipped)


def masked_mean_kl(mean, mean_base, std, mask):
    """KL of two Gaussians of equal std, (mu - mu_base)^2 / (2 std^2), averaged over entries."""
    return masked_mean((mean - mean_base).square() / (2 * std**2), mask)


def snr_step_weights(grid, s, prediction="sample"):
    """Weights (s,) of the steps, 1 / sqrt(gain of signal-to-noise), with mean 1."""
    # Not in [NM]: without weights the late steps, which polish, drown the early ones, which
    # decide what is done. If m moves by d, the KL of its step is (SNR_{i+1} - SNR_i) |d|^2 / 2
    # (for noise SNR_{i+1} / SNR_i - 1), and the gradient goes with the root of the KL.
    snr = torch.exp(2 * grid.lam.double())[:s + 1]
    gain = snr[1:] - snr[:-1] if prediction == "sample" else snr[1:] / snr[:-1] - 1
    return (gain.rsqrt() / gain.rsqrt().mean()).float()


def update(args, policy, batch, advantages, optimizer, iteration, loop):
    """Stage 3: log pi of the stored steps again, one optimizer step a minibatch -> a log.
    advantages (p*g) are of all processes; batch["numbers"] are the indices of our own."""
    s, parameters = len(policy.weights), lora.parameters(policy.model)
    # The log-ratio of a mean over D entries shrinks as 1 / sqrt(D): the DDPO code's 1e-4
    # belongs to the 16384 entries of a latent of Stable Diffusion.
    entries = policy.tokens * policy.model.dims
    clip_range = args.clip_range or 1e-4 * math.sqrt(16384 / entries)
    kept = strongest(advantages, args.kept_samples)
    own = advantages[batch["numbers"]].to(policy.device)  # b
    # A minibatch is (its size, chunks); a chunk is a list of rows that fit into memory.
    minibatches = training.minibatches(kept, args.minibatches, batch["numbers"], args.micro_batch,
                                       generator(args.seed, iteration, "shuffle", 0))
    scale = 1 / (len(kept) // args.minibatches * s)    # a mean over samples and steps

    def rescore(rows):
        captions = [batch["captions"][row] for row in rows]
        return step_logps(policy, batch["states"][rows], captions, batch["mask"][rows], s)

    # The old log-probabilities are computed here, in the very chunks of the update, and not in
    # the rollout. So the first ratio is 1 to the last bit, which first_ratio_error checks.
    logp_old = torch.zeros(len(own), s, device=policy.device)
    mean_base = torch.zeros_like(batch["states"][:, :s])
    with torch.no_grad():
        for rows in (chunk for _, chunks in minibatches for chunk in chunks):
            logp_old[rows], _ = rescore(rows)
            if args.kl_coef:
                with lora.scaled(policy.model, 0.0):      # without its adapters it is the base
                    _, mean_base[rows] = rescore(rows)

    log, ratios = training.Sums("loss", "approx_kl", "clipfrac", "kl_base"), []
    for _, chunks in minibatches:
        optimizer.zero_grad()
        for rows in chunks:
            loop.check()                                  # Ctrl-C ends here, see --resume
            logp, mean = rescore(rows)
            logratio = logp - logp_old[rows]
            ratio = logratio.exp()                        # b s
            loss = policy.weights * clipped_loss(ratio, own[rows, None], clip_range)
            loss = loss.sum() * scale
            if args.kl_coef:
                kl = masked_mean_kl(mean, mean_base[rows], policy.steps.std[:s],
                                    batch["mask"][rows, None]).sum() * scale
                loss = loss + args.kl_coef * kl
                log.add(kl_base=kl)
            training.check_loss(loss, f"iteration {iteration}")
            loss.backward()
            ratios.append(ratio.detach().flatten())
            # approx_kl estimates KL(old || new) (Schulman 2020); clipfrac: share out of range.
            log.add(loss=loss, approx_kl=((ratio - 1) - logratio).sum() * scale,
                    clipfrac=((ratio - 1).abs() > clip_range).sum() * scale)
        training.all_reduce_grads(parameters)
        norm = training.clip_gradients(parameters, MAX_GRAD_NORM, f"iteration {iteration}")
        log.add(grad_norm=norm)
        optimizer.step()
    return training.reduce_log(log.mean(args.minibatches) | training.ratio_stats(ratios))


# ---- 7. Training: roll out, score, update ----

def sample(args, policy, captions, lengths, iteration, purpose, numbers):
    """Trajectories for captions, lengths (b) in frames -> states (b N+1 n c), mask (b n)."""
    mask = policy.model.codec.mask(lengths, policy.tokens).to(policy.device)
    shape = (args.steps + 1, policy.tokens, policy.model.dims)
    # Each sample has its own noise stream, whatever batch or process it is in.
    noise = normal(shape, args.seed, iteration, purpose, numbers)
    return rollout(policy, captions, mask, noise.to(policy.device)), mask


def collect(args, policy, prompts, length_table, iteration):
    """Stage 1: G motions for each of P prompts -> what the next stages need of them."""
    g = generator(args.seed, iteration, "prompts")
    order = torch.randperm(len(prompts), generator=g).tolist()
    chosen = [prompts[order[p % len(order)]] for p in range(args.prompts)]
    # A group has one length, so that its mean compares like with like. Lengths are those
    # of the source: of the target the policy gets only words.
    lengths = datasets.draw_lengths(length_table, chosen, g)
    # Each of several processes samples its own share of whole groups.
    numbers = runs.share(args.prompts, args.samples, policy.device)
    groups = [k // args.samples for k in numbers]
    captions, lengths = [chosen[p] for p in groups], lengths[groups]
    states, mask = sample(args, policy, captions, lengths, iteration, "rollout", numbers)
    return dict(states=states, mask=mask, captions=captions, lengths=lengths,
                numbers=numbers, prompts=chosen)


def score(policy, reward, batch, iteration):
    """Stage 2: decode the last states, ask the reward -> rewards (P*G) of all processes."""
    lengths = batch["lengths"].to(policy.device)
    motion = policy.model.codec.decode(batch["states"][:, -1], lengths)
    own = reward(motion, lengths, batch["captions"], iteration=iteration, numbers=batch["numbers"])
    training.check_rewards(own, batch["captions"], f"iteration {iteration}: reward")
    return training.all_gather_rows(own)


LOOKS = ("reward", "judge", "oracle", "foot_skate", "jerk")  # logged as val_reward, ...
FIELDS = ("iteration", "reward", "group_std", "frac_zero_std", "loss", "approx_kl", "clipfrac",
          "kl_base", "grad_norm", "first_ratio_error", "ratio_min", "ratio_max",
          *(f"val_{name}" for name in LOOKS))
CURVES = ("reward", "val_reward", "val_judge", "val_oracle", "kl_base", "val_jerk")


def train(start, policy, reward, advantages, prompts, scorers, source, target, folder):
    """The loop of the four stages; it changes the adapters alone."""
    args, watch, val = start.args, start.watch, target.splits["val"]
    evaluate.check_names(LOOKS, source.splits["val"], scorers)  # no target motion is read
    length_table = datasets.length_table(source.splits["train"])
    parameters = lora.parameters(policy.model)
    # No weight decay: without a gradient nothing must move.
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    print(f"  {len(prompts)} prompts, {lora.count(parameters)} trained weights")
    same = {"data": source.fingerprint + target.fingerprint}
    with runs.Loop("ddpo", start, folder, FIELDS, same, policy.model) as loop:
        if loop.state:  # --resume
            lora.load(policy.model, loop.state["lora"])
            optimizer.load_state_dict(loop.state["optimizer"])
        for iteration in loop:
            # 1. Roll out.
            batch = collect(args, policy, prompts, length_table, iteration)
            watch.lap("rollout")
            loop.check()
            # 2. Score, and compare each motion with those of the same prompt.
            rewards = loop.rewards = score(policy, reward, batch, iteration)
            groups = rearrange(rewards, "(p g) -> p g", g=args.samples)
            adv = advantages(groups, batch["prompts"]).flatten()
            watch.lap("reward")
            # 3. Update.
            log = update(args, policy, batch, adv, optimizer, iteration, loop)
            watch.lap("update")
            # 4. Log, now and then look at validation prompts, save.
            spread = groups.std(1)  # zero where all motions of a prompt got the same reward
            row = dict.fromkeys(FIELDS) | log | {
                "iteration": iteration, "reward": float(rewards.mean()),
                "group_std": float(spread.mean()),
                "frac_zero_std": float((spread < 1e-8).float().mean())}
            if (iteration + 1) % args.eval_every == 0:
                row |= evaluate.look(LOOKS, val, scorers, policy_sampler(args, policy))
                watch.lap("validation")
            loop.end(row, ("reward", "val_judge", "val_oracle"), {
                "lora": lora.state(policy.model), "optimizer": optimizer.state_dict()})


# ---- 8. The run ----

def make_policy(args, model, longest, device):
    """Adapters into the frozen base, and the steps, for motions of up to `longest` frames."""
    g, (prediction, schedule) = generator(args.seed, 0, "lora"), diffusion.SPACES[args.space]
    lora.inject(model, LORA_LAYERS, args.lora_rank, args.lora_alpha, g)
    grid, s = samplers.make_grid(schedule, args.steps, args.spacing), args.steps - args.skip_last
    steps = solver_steps(grid, args.order, prediction, device)
    weights = snr_step_weights(grid, s, prediction) if args.snr_weights else torch.ones(s)
    if diffusion.SIZES[args.space][args.size].bf16:  # log-probabilities stay in float32
        model.forward = training.in_bfloat16(model.forward)
    return Policy(model.to(device).eval(), steps, weights.to(device), model.codec.count(longest),
                  args.guidance_scale, device)


def load_policy(args, stored, device):
    """The policy of a finished run; its adapter.pt holds the adapters and their base."""
    model = make_model(args, datasets.Vocabulary(stored["words"]))
    model.load_state_dict(stored["base"])
    policy = make_policy(args, model, stored["longest"], device)
    lora.load(policy.model, stored["lora"])
    return policy


def policy_sampler(args, policy, strength=1.0):
    """What common/evaluate.py asks for motions; strength 0 of the adapters is the base."""
    # A number always starts from the same noise: base and tuned are compared in pairs.
    def motions(captions, lengths, numbers, purpose, repeat):
        with lora.scaled(policy.model, strength):
            states, _ = sample(args, policy, captions, lengths, repeat, purpose, numbers)
        return policy.model.codec.decode(states[:, -1], lengths), None
    return evaluate.in_chunks(motions)


def write_motions(args, stored, folder, device):
    """--prompt: GIF, joints and BVH of every caption, from adapter.pt alone."""
    policy, frames = load_policy(args, stored, device), args.length or stored["frames"]
    strengths = {"before": 0.0, "after": 1.0} if args.compare else {"after": 1.0}
    motions = {title: policy_sampler(args, policy, s) for title, s in strengths.items()}
    evaluate.export(folder, args.prompt, stored, frames, features.T2M, motions)


def main(argv, reward=None, advantages=group_advantages):
    """Prepare, train, report; or use what a finished run has left (--load).
    A study replaces one function: reward, see build_reward, or group_advantages."""
    start = runs.prepare(Args, SIZE_ARGS, argv, __doc__, "ddpo", "ddpo-adapter", check_args)
    args, stored, device, watch = start.args, start.stored, start.device, start.watch
    if args.prompt:
        return write_motions(args, stored, start.open_folder(), device)
    size = diffusion.SIZES[args.space][args.size]
    source, target = datasets.load_pair(
        args.source, args.dataset, left_out=args.leave_out, clips=size.clips, **start.data())
    folder = start.open_folder()
    start.announce(source=source, target=target)

    # Reward model and judge share no clip; the judge is never optimised, nor sees the action.
    notes, options = {}, start.training()
    scoring = dict(options, iterations=size.scorer_iterations)
    if reward is None:
        reward, notes["reward"] = build_reward(args, source, target, **scoring)
    judged = [source] if args.leave_out else [source, target]
    judge, notes["judge"] = retrieval.judge(judged, target=target, **scoring)
    scorers = evaluate.Scorers(reward, judge, source.skeleton)
    watch.lap("reward and judge")

    if stored:
        policy = load_policy(args, stored, device)
    else:
        parts = sinusoid, Attention, Layer, MotionDiffusion  # change one: a new base is trained
        model, notes["base"] = diffusion.fit_base(
            partial(make_model, args), parts, source, size, *diffusion.SPACES[args.space],
            **options)
        base = {"base": runs.plain(model.state_dict()), "words": model.vocabulary.words,
                "frames": source.usual_length, "longest": max(source.longest, target.longest)}
        policy = make_policy(args, model, base["longest"], device)
    watch.lap("base")
    about = start.about(folder, notes, source, target)
    if not stored:
        # Of the target the policy gets captions, and no motion.
        prompts = sorted({c for clip in target.splits["train"] for c in clip.captions})
        asked = retrieval.control(args.reward, reward, prompts, args.seed)  # or a control
        train(start, policy, asked, advantages, prompts, scorers, source, target, folder)
        if start.rank:
            return  # the first process evaluates
        start.save_product(folder, {"lora": lora.state(policy.model), **base})

    # In the latent space real motion through the VAE and back is the ceiling.
    ceiling = {"VAE": partial(vae.reconstruction, policy.model.codec)} if size.latents else {}
    before, after = policy_sampler(args, policy, 0.0), policy_sampler(args, policy)
    evaluate.report(start, folder, about, source, target, scorers, before, after, CURVES, ceiling)


if __name__ == "__main__":
    runs.run_main(main)
