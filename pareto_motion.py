"""Several rewards at once: text, quality, preference; Pareto selection; tokens that steer the trade-off.

The idea. One reward can be raised at the cost of what it does not see: a text score by jittering, a
preference score by standing still. So a motion is judged by three rewards, and of the motions that the GPT
samples for a prompt only those are learnt from that no other one beats in all three. A token in front of the
GPT says which reward is asked for; mixing tokens afterwards chooses a point between them.

Papers
  MotionRL (Liu et al. 2024, arXiv 2410.06513): the method; equations without a paper's name are its own
  InstructMotion (Mao et al. 2024): PPO on motion tokens; MotionCritic (Wang et al. 2024): preferences

`diff ppo_motion.py pareto_motion.py` is the lesson: one reward becomes a vector, a prompt becomes three, and
not every motion is learnt from.
  variable            symbol                   meaning
  f_t, f_tk           f(t), f(t_k)             text feature without and with the token of reward k
  R (p c n k)         r^1 .. r^K               all K rewards of all motions: p prompts, c tokens, n of each
  keep (p c n)        m in P                   not dominated by another motion of its prompt and token
  weight (p c n)      1 / n(P)                 of a motion in the loss; 0 for dominated ones
  own (p c n)         r(t_k, m_k)              the reward that the motion's token asks for

Read in this order: section 6 (selection, then the PPO of the paper before), 5 (rewards), 7 (the loop).

  python pareto_motion.py --dataset kit          # from nothing to a tuned model, see README for the time
  python pareto_motion.py --dataset kit --tiny   # the same path at toy size
  python pareto_motion.py --prompt "A human waves." --prefer text=0.7,quality=0.2,preference=0.1 \\
      --load runs/pareto_kit_seed0/policy.pt
"""

# ---- 1. Imports --------------------------------------------------------------------------------------------

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from common import (
    InputError, NonFiniteError, datasets, diagnostics, evaluate, features, generator, perception,
    published, retrieval, runs, token_policy, tokenizer, training)
from common.motion_gpt import Block
from common.runs import arg
from common.token_policy import Policy
from results import fronts

REWARDS = ("text", "quality", "preference")  # MotionRL: <mt>, <mm>, <perception>
BALANCED = [1 / 3, 1 / 3, 1 / 3]

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
    prefer: str = arg("", "with --prompt: text=0.7,quality=0.2,preference=0.1; empty: a third each")
    # [sync:token_flags]
    # data
    clips: int = arg(4000, "embedded data: clips")
    # tokenizer (T2M-GPT: 512 codes of width 512, 4 frames a token, network width 512)
    codes: int = arg(256, "entries K of the codebook")
    vq_width: int = arg(64, "width of encoder and decoder")
    frames_per_token: int = arg(0, "2 or 4; 0: 4 at 20 frames a second, else 2", choices=(0, 2, 4), lowest=0)
    vq_iterations: int = arg(1200, "updates (T2M-GPT: 300 000)")
    # policy (T2M-GPT: 18 layers of width 1024, 16 heads, CLIP text)
    width: int = arg(64, "model width")
    heads: int = arg(4, "attention heads")
    base_layers: int = arg(3, "layers that the critic shares (InstructMotion: the first few)")
    head_layers: int = arg(1, "layers after them")
    text_layers: int = arg(2, "layers of the text encoder, frozen in PPO")
    gpt_iterations: int = arg(1600, "supervised updates")
    gpt_lr: float = arg(2e-3, "peak learning rate of the supervised training")
    keep: float = arg(0.8, "share of input tokens left as they are in supervised training (T2M-GPT: 0.5)")
    batch: int = arg(64, "clips per update of tokenizer and GPT")
    word_drop: float = arg(0.1, "share of words made unknown in supervised training")
    word_swap: float = arg(0.03, "share of words made any other: rare words must leave it unsure, not wrong")
    vq_checkpoint: str = arg("", "published T2M-GPT tokenizer (.pth); needs --vq-statistics")
    vq_statistics: str = arg("", "folder with the Mean.npy and Std.npy that tokenizer was trained with")
    gpt_checkpoint: str = arg("", "published T2M-GPT policy (.pth); its text: --text-features, or CLIP")
    text_features: str = arg("", ".npz with captions (n) and vectors (n d); empty: an installed CLIP")
    # [/sync:token_flags]
    # rewards
    margin: float = arg(1.4, "margin of Eq. (1); unit-length embeddings are at most 2 apart (there: unknown)")
    reward_iterations: int = arg(900, "updates of each reward encoder and of the judge")
    perception_iterations: int = arg(300, "updates of the synthetic perception critic")
    perception_checkpoint: str = arg("", "published MotionCritic (.pth) in its place")
    calibration: int = arg(512, "motions of the supervised GPT that lambda, min and max are taken from")
    # selection
    selection: str = arg("per-token", "sets that motions compete in; none: all kept; weighted-sum: no tokens",
                         choices=("per-token", "union", "literal", "none", "weighted-sum"))
    weights: str = arg("", "of --selection weighted-sum, as in --prefer; text=1: that reward alone")
    alpha: float = arg(0.5, "share of the token in the text feature, Eq. (11) (MotionRL: unknown)")
    token_reward: str = arg("own", "what Eq. (7) sums: the token's own reward, or the mean of all",
                            choices=("own", "mean"))
    baseline: str = arg("all", "motions that mean, spread, values and whitening are taken from",
                        choices=("all", "kept"))
    reduction: str = arg("motion", "what weighs alike in the loss (MotionRL Eq. (7): token)",
                         choices=("motion", "token"))
    rival: bool = arg(True, "--no-rival: do not train the weighted sum beside it, for the fronts")
    # update
    iterations: int = arg(64, "PPO iterations (MotionRL: 40 000)")
    batch_prompts: int = arg(8, "prompts P of a rollout (MotionRL: unknown)")
    samples_per_prompt: int = arg(16, "motions N of each prompt and token (MotionRL: 32?)", lowest=2)
    lr: float = arg(3e-4, "highest learning rate of the policy (MotionRL: 5e-6)")
    kl_coef: float = arg(0.05, "beta, weight of the KL in the reward (MotionRL: unknown)")
    temperature: float = arg(1.0, "of sampling and of every log-probability in training (MotionRL: 1.5)")
    # [sync:ppo_flags]
    ppo_epochs: int = arg(2, "passes over a rollout (InstructMotion, MotionRL: 2)")
    minibatch_ratio: float = arg(1.0, "minibatch over batch (InstructMotion: 1)")
    micro_batch: int = arg(0, "motions per forward pass, 0: the whole minibatch; fewer save memory")
    critic_lr: float = arg(1e-3, "learning rate of the critic")
    warmup: int = arg(20, "iterations in which the policy's rate rises from 0", lowest=0)
    critic: str = arg("shared-detach", "on detached policy features, on live ones, or on a copy of its own",
                      choices=("shared-detach", "shared", "separate"))
    clip_range: float = arg(0.2, "eps (unknown in both papers)")
    gamma: float = arg(1.0, "discount; episodes are finite")
    gae_lambda: float = arg(1.0, "lambda of GAE (MotionRL Eq. 8: 1)")
    vf_coef: float = arg(0.5, "weight of the value loss; matters with --critic shared only")
    value_clip: float = arg(0.0, "how far values may leave the old ones, 0: any (unknown in both papers)")
    max_grad_norm: float = arg(1.0, "gradient norm clip, of policy and critic apart")
    # [/sync:ppo_flags]
    # evaluation
    eval_every: int = arg(20, "iterations between looks at the validation prompts")
    eval_repeats: int = arg(3, "repeats of the final evaluation, for the 95 % interval (benchmark: 20)")
    front_prompts: int = arg(64, "prompts whose samples make the fronts and the hypervolume")


TINY = dict(clips=240, codes=48, vq_width=24, vq_iterations=60, width=32, base_layers=1, text_layers=1,
            gpt_iterations=60, batch=32, reward_iterations=40, perception_iterations=20, calibration=64,
            iterations=3, batch_prompts=2, samples_per_prompt=4, eval_every=2, eval_repeats=2,
            front_prompts=8)


def check_args(args):
    """Stop at once on settings that cannot work, naming the flag and the fix."""
    token_policy.check(**runs.arguments_of(token_policy.check, args))
    for flag, spec in (("--prefer", args.prefer), ("--weights", args.weights)):
        runs.parse_weights(spec, REWARDS, flag)
    count = 1 / args.minibatch_ratio if args.minibatch_ratio > 0 else 0.0
    motions = args.batch_prompts * args.samples_per_prompt * len(REWARDS)
    for wrong, message in (
            (args.batch_prompts < runs.process_count(), "--batch-prompts: at least one per process"),
            (count < 1 or count % 1 or motions % int(max(count, 1)),
             f"--minibatch-ratio: 1, 0.5, 0.25 ... so that it divides the {motions} motions of a rollout"),
            (count > 1 and args.baseline == "kept", "--minibatch-ratio: 1, for --baseline kept"),
            (args.alpha > 1, "--alpha: 0 to 1"), (not args.temperature, "--temperature: above 0"),
            (args.weights and args.selection != "weighted-sum", "--weights: for --selection weighted-sum"),
            (args.prefer and not args.prompt, "--prefer: steers --prompt, and no training")):
        if wrong:
            raise InputError(message)


# ---- 3. and 4. The networks, and what PPO starts from: common/token_policy.py ------------------------------


# [sync:critic]
class Critic(nn.Module):
    """V(s_t) from the features of the policy's first layers, or of a copy of its own (`separate`)."""

    def __init__(self, gpt, kind, g):
        super().__init__()
        self.kind, width = kind, gpt.positions.shape[1]
        self.block, self.norm, self.value = Block(width, gpt.heads), nn.LayerNorm(width), nn.Linear(width, 1)
        training.initialise(self, g)
        nn.init.zeros_(self.value.weight)  # V starts at 0
        self.trunk = copy.deepcopy(gpt).requires_grad_(True) if kind == "separate" else None

    def forward(self, hidden, tokens, text):
        """hidden (b n c) -> values (b n)"""
        if self.kind == "separate":
            hidden = self.trunk(tokens, text)[1]
        elif self.kind == "shared-detach":  # InstructMotion section 4.1: the critic must not bend the policy
            hidden = hidden.detach()
        return self.value(self.norm(self.block(hidden)))[..., 0]
# [/sync:critic]


# ---- 5. Rewards --------------------------------------------------------------------------------------------


def distance_reward(f_a, f_b, lambdas):
    """MotionRL Eq. (3), and Eq. (4): -sum_i lambda_i |a_i - b_i|^2 over encoders i. The predicted motion
    against the text, or against the real motion. f_a, f_b (i b c), lambdas (i) -> (b)"""
    return -(lambdas[:, None] * (f_a - f_b).square().sum(-1)).sum(0)


def normalise(R, low, high):
    """MotionRL Eq. (12): its three branches are one line, nothing is clipped. R (... k), low and high (k)"""
    return (R - low) / (high - low)


class Rewards(NamedTuple):
    """The three rewards of a motion."""
    encoders: list          # of Eq. (2), InfoNCE, and of Eq. (1), distances with a margin
    critic: object          # score(motion, lengths) -> (b), Eq. (6)
    lambdas: torch.Tensor   # (i), one over the spread of an encoder's distances: "similar magnitude"
    low: torch.Tensor       # (k), Eq. (12): 1 % and 99 % quantile of motions of pi_ref, never changed
    high: torch.Tensor

    @torch.no_grad()
    def __call__(self, motion, lengths, captions, clips):
        """Motions (b t d) raw, lengths (b), their captions and real clips (b) -> R (b k), by Eq. (12)."""
        embedded = [retrieval.embed_pairs(encoder, motion, lengths, captions, clips)
                    for encoder in self.encoders]
        f_text, f_motion, f_real = (torch.stack(parts) for parts in zip(*embedded))  # i b c
        R = torch.stack([distance_reward(f_text, f_motion, self.lambdas),
                         distance_reward(f_real, f_motion, self.lambdas),
                         self.critic.score(motion, lengths)], -1)
        return normalise(R, self.low, self.high)

    def columns(self, motion, lengths, captions, clips):
        """The same as columns of the tables: {reward: (b)}."""
        R = self(motion.to(self.lambdas.device), lengths.to(self.lambdas.device), captions, clips)
        return dict(zip(REWARDS, R.T.double().cpu().numpy()))


def calibrate(args, policy, encoders, critic, clips):
    """-> Rewards: lambda of Eqs. (3), (4), min, max of Eq. (12), from pi_ref's motions for train prompts."""
    g = generator(args.base_seed, 0, "calibration")
    chosen = [clips[k] for k in torch.randint(len(clips), (args.calibration,), generator=g).tolist()]
    captions = datasets.draw_captions(chosen, g)
    made = generate(policy, policy.reference, read_text(policy, captions), args.base_seed, 0, "calibration",
                    range(len(chosen)), args.temperature)[:2]
    embedded = (retrieval.embed_pairs(encoder, *made, captions, chosen) for encoder in encoders)
    distances = torch.stack([(text - motion).square().sum(-1) for text, motion, _ in embedded])
    raw = Rewards(encoders, critic, 1 / distances.std(1).clamp(min=1e-6), 0.0, 1.0)
    R = raw(*made, captions, chosen)
    low, high = (R.quantile(q, dim=0) for q in (0.01, 0.99))
    for name, a, b in zip(REWARDS, low.tolist(), high.tolist()):
        print(f"  reward {name}: {a:.2f} to {b:.2f}, 1 % and 99 % of the supervised GPT's motions")
        if not b > a:  # NaN fails too
            raise NonFiniteError(f"reward {name} is {b:.3g} for all {len(R)} motions; nothing to learn from")
    return raw._replace(low=low, high=high)


# ---- 6. The algorithm: pure functions, no I/O, no globals --------------------------------------------------


def mix(f_t, f_tk, alpha):
    """MotionRL Eq. (11): the text feature that is read, between that without and that with the token."""
    return (1 - alpha) * f_t + alpha * f_tk


def nondominated(R):
    """Which motions no other one beats: a dominates b if it is as good in every reward and better in one.
    R (... n k), larger is better -> mask (... n), never empty; equal motions do not beat each other."""
    if not torch.isfinite(R).all():  # a NaN is never beaten
        raise NonFiniteError("a reward is not finite: the selection would keep it for ever")
    mine, other = R[..., :, None, :], R[..., None, :, :]
    return ~((other >= mine).all(-1) & (other > mine).any(-1)).any(-1)


def own_reward(R):
    """Of each motion the reward that its token asks for: R (p c n k) with k = c -> (p c n)"""
    return rearrange(torch.diagonal(R, dim1=1, dim2=3), "p n c -> p c n")


def select(R, selection):
    """MotionRL Algorithm 1: who is learnt from. R (p c n k) -> keep (p c n). The sets are the motions of a
    prompt and token (section 4.2), all of a prompt (union), or, word for word, the triples of i-th motions of
    all tokens, each with its own reward alone (literal)."""
    if selection == "union":
        keep = nondominated(rearrange(R, "p c n k -> p (c n) k"))
        return rearrange(keep, "p (c n) -> p c n", c=R.shape[1])
    if selection == "literal":
        return repeat(nondominated(rearrange(own_reward(R), "p c n -> p n c")), "p n -> p c n", c=R.shape[1])
    return nondominated(R) if selection == "per-token" else torch.ones_like(R[..., 0], dtype=torch.bool)


def front_weights(keep, selection):
    """1 / n(P) for members of the set P, else 0: keep (p c n) -> (p c n)"""
    dims = (1, 2) if selection == "union" else (2,)
    return keep / keep.sum(dims, keepdim=True)


def token_weights(weight, mask, reduction):
    """The weight of a motion (b) shared by its tokens, so that motions weigh alike, or on each (b n)."""
    return (weight / mask.sum(1) if reduction == "motion" else weight)[:, None] * mask


def standardise(r, counted):
    """Not in the paper: rewards within each prompt and token, mean 0 and spread 1 over the motions that are
    counted. What a prompt gets by nature is no merit of a motion, and our critic is too weak to take it off.
    r (p c n), counted (p c n) bool -> (p c n)"""
    count = counted.sum(2, keepdim=True).clamp(min=1)
    centred = r - (r * counted).sum(2, keepdim=True) / count
    spread = ((centred.square() * counted).sum(2, keepdim=True) / count).sqrt()
    overall = ((centred.square() * counted).sum() / counted.sum()).sqrt()
    return centred / (spread + 0.05 * overall + 1e-8)  # sets of equals stay near zero


# [sync:ppo]
def action_logits(logits, first, shortest, temperature):
    """Logits (b n v) of positions first, first + 1 ... as the policy uses them, float32 at least: over the
    temperature, and without the end before `shortest` tokens. Rollout, update and reference all go through
    here; a temperature or a ban in one of them alone makes every ratio wrong."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    early = torch.arange(first, first + logits.shape[1], device=logits.device) < shortest
    end = torch.arange(logits.shape[2], device=logits.device) == logits.shape[2] - 1
    return logits.masked_fill(early[:, None] & end, -math.inf)


def pick(logits, uniform):
    """Inverse transform sampling: logits (b v), uniform (b) in [0, 1) -> choice (b)"""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(-1)


@torch.no_grad()
def rollout(gpt, text, uniform, shortest, temperature):
    """Sample a token sequence per row. text (b d), uniform (b n): the draws, one a token, so that a row does
    not depend on the others -> tokens (b n) with end and padding, counts (b)"""
    caches = gpt.empty_cache(len(text))
    tokens = torch.full(uniform.shape, gpt.pad, device=text.device)
    running = torch.ones(len(text), dtype=torch.bool, device=text.device)
    x = gpt.trans_base["cond_emb"](text)[:, None] + gpt.positions[0]  # b 1 c
    for t in range(uniform.shape[1]):
        token = pick(action_logits(gpt.run(x, caches, t)[0], t, shortest, temperature)[:, 0], uniform[:, t])
        tokens[:, t] = torch.where(running, token, gpt.pad)
        running = running & (token != gpt.end)
        if t + 1 == uniform.shape[1] or not running.any():
            break
        x = (gpt.trans_base["tok_emb"](tokens[:, t]) + gpt.positions[t + 1])[:, None]
    return tokens, (tokens < gpt.end).sum(1)


def action_logps(logits, tokens, shortest, temperature):
    """logits (b n v), tokens (b n) -> log-probability of each token (b n), and of every action (b n v);
    behind the end, where tokens are padding, the numbers mean nothing."""
    logps = action_logits(logits, 0, shortest, temperature).log_softmax(-1).clamp(min=-1e9)  # 0 x -inf is NaN
    return logps.gather(-1, tokens.clamp(max=logits.shape[-1] - 1)[..., None])[..., 0], logps


def score_actions(gpt, critic, tokens, text, shortest, temperature, grad=True):
    """The actions under the current weights, in one teacher-forced pass: tokens (b n), text (b d) -> logp
    (b n), logps of all actions (b n v), values (b n) or None without a critic. For old, new and reference.
    grad: whether the GPT learns from it, too."""
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        logits, hidden = gpt(tokens[:, :-1], text)
    values = None if critic is None else critic(hidden, tokens[:, :-1], text)
    return *action_logps(logits, tokens, shortest, temperature), values


def token_rewards(r, logp_old, logp_ref, mask, kl_coef):
    """InstructMotion Eq. (3) per token: -beta (logp_old - logp_ref), and r (b) at the last valid one. A value
    may be negative, only its mean is a KL. No gradient flows: it is a reward. (b n) -> (b n)"""
    rewards = -kl_coef * (logp_old - logp_ref) * mask
    return rewards.scatter_add(1, mask.sum(1, keepdim=True) - 1, r[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) without bootstrap: the token limit is
    part of the task. (b n) each -> advantages, returns, zero outside the mask"""
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    following = F.pad(values * mask, (0, 1))[:, 1:]
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following[:, t] - values[:, t]
        last = (delta + gamma * gae_lambda * last) * mask[:, t]
        advantages[:, t] = last
    return advantages, (advantages + values) * mask


def whiten(advantages, mask, valid=None):
    """Zero mean and unit variance over the valid tokens of the whole batch (`valid`, where this is a part of
    it); never of the returns."""
    valid = advantages[mask] if valid is None else valid
    return (advantages - valid.mean()) / torch.sqrt(valid.var(correction=0) + 1e-8) * mask


def clipped_loss(ratio, advantages, clip_range):
    """InstructMotion Eq. (4) as a loss, per token: the pessimistic one of two (PPO eq. 7)."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range))


def value_loss(values, returns, old=None, value_clip=0.0):
    """InstructMotion Eq. (5) per token, with the usual 1/2. Not in the paper: with value_clip the worse of
    this and of values kept that close to the old ones (PPO2)."""
    loss = 0.5 * (values - returns).square()
    if not value_clip:
        return loss
    return torch.maximum(loss, 0.5 * (old + (values - old).clamp(-value_clip, value_clip) - returns).square())
# [/sync:ppo]


# ---- 7. The run --------------------------------------------------------------------------------------------
# [sync:generate]
def generate(policy, gpt, text, seed, iteration, purpose, indices, temperature):
    """Sample a motion per text feature (b d) -> motion (b t d) raw, lengths (b), tokens (b n). Each sample
    has random numbers of its own, so it does not depend on its batch, device or process."""
    draws = (torch.rand(gpt.block_size - 1, generator=generator(seed, iteration, purpose, k))
             for k in indices)
    uniform = torch.stack(list(draws)).to(policy.device)
    tokens, counts = rollout(gpt, text, uniform, policy.shortest, temperature)
    with torch.no_grad():
        return *policy.vq.decode(tokens, counts), tokens
# [/sync:generate]


class Learner(NamedTuple):
    """A policy in training; the weighted sum is a second one, with as many samples and updates."""
    policy: Policy
    critic: Critic
    optimizer: torch.optim.Optimizer
    selection: str
    tokens: torch.Tensor | None  # (k d), what a reward's token adds to the text feature; None: no tokens
    sets: int                    # c, that a prompt's motions are sampled in, one for each token


def make_learner(args, policy, selection, tokens):
    """-> Learner; policy.gpt is trained, the rest stays as it is."""
    critic = Critic(policy.gpt, args.critic, generator(args.seed, 0, "critic")).to(policy.device)
    policy.gpt.requires_grad_(True)
    optimizer = torch.optim.AdamW([{"params": list(policy.gpt.parameters()), "lr": args.lr},
                                   {"params": list(critic.parameters()), "lr": args.critic_lr}],
                                  betas=(0.9, 0.99), weight_decay=1e-6)
    return Learner(policy, critic, optimizer, selection, tokens, 1 if tokens is None else len(tokens))


def make_tokens(policy, clips):
    """What the tokens add to a text feature (MotionRL appends words): each a dimension of its own, for which
    the GPT gets weights of zero, and twelve texts long, so that they grow within some hundred steps of Adam.
    Random directions cost the supervised GPT four points of text reward from the start -> (k d + k)"""
    text, count = read_text(policy, [clip.captions[0] for clip in clips[:512]]), len(REWARDS)
    for gpt in (policy.gpt, policy.reference):
        first = gpt.trans_base["cond_emb"]
        first.weight = nn.Parameter(F.pad(first.weight, (0, count)), requires_grad=False)
        first.in_features += count
    return F.pad(12 * text.square().sum(-1).mean().sqrt() * torch.eye(count).to(text), (text.shape[1], 0))


@torch.no_grad()
def read_text(policy, captions, tokens=None, weights=None, alpha=0.0):
    """Text features (b d) of captions, mixed with reward tokens by weights (k) or (b k), if any."""
    f_t = retrieval.once(policy.text, captions)
    f_t = F.pad(f_t, (0, policy.gpt.trans_base["cond_emb"].in_features - f_t.shape[1]))
    return f_t if tokens is None else mix(f_t, f_t + torch.as_tensor(weights).to(f_t) @ tokens, alpha)


@torch.no_grad()
def collect(args, learner, clips, iteration, rank, processes):
    """Stage 1, roll out P prompts x K tokens x N motions, or P x 1 x KN; a process takes whole prompts."""
    policy, g = learner.policy, generator(args.seed, iteration, "prompts")
    drawn = [clips[row] for row in torch.randint(len(clips), (args.batch_prompts,), generator=g).tolist()]
    lines, size = datasets.draw_captions(drawn, g), len(REWARDS) * args.samples_per_prompt
    index = [k for k in range(len(drawn) * size) if k // size * processes // len(drawn) == rank]
    captions, pairs = ([rows[k // size] for k in index] for rows in (lines, drawn))
    token = torch.tensor(index, device=policy.device) // (size // learner.sets) % learner.sets
    text = read_text(policy, captions, learner.tokens, F.one_hot(token, len(REWARDS)), args.alpha)
    motion, lengths, tokens = generate(policy, policy.gpt, text, args.seed, iteration, "rollout", index,
                                       args.temperature)
    mask = F.pad(tokens[:, :-1] < policy.gpt.end, (1, 0), value=True)  # codes and the end
    return dict(captions=captions, pairs=pairs, index=index, motion=motion, lengths=lengths, tokens=tokens,
                text=text, token=token, mask=mask)


def score(rewards, batch, iteration):
    """Stage 2, score -> R (b k) of this process's motions."""
    R = rewards(batch["motion"], batch["lengths"], batch["captions"], batch["pairs"])
    for row, k in (~torch.isfinite(R)).nonzero().tolist():
        raise NonFiniteError(f"iteration {iteration}: reward {REWARDS[k]} is {R[row, k]:.3g} for "
                             f"{batch['captions'][row]!r}")
    return R


def choose(args, learner, batch, R):
    """Stage 3, select -> the batch with r and weight of its motions, the numbers of all that are trained and
    of the dominated ones, numbers to log. It looks at all processes' motions; a prompt's are never split."""
    R = rearrange(training.all_gather_rows(R), "(p c n) k -> p c n k", c=learner.sets, p=args.batch_prompts)
    keep = select(R, learner.selection)
    own = own_reward(R) if learner.tokens is not None and args.token_reward == "own" else R.mean(-1)
    if learner.tokens is None:
        own = R @ R.new_tensor(runs.parse_weights(args.weights, REWARDS, "--weights"))
    counted = keep if args.baseline == "kept" else torch.ones_like(keep)
    trained, flat = counted.flatten(), R.flatten(0, 2)
    rows = [row for row, k in enumerate(batch["index"]) if trained[k]]
    part = {name: value[rows] if torch.is_tensor(value) else [value[row] for row in rows]
            for name, value in batch.items()}
    part |= {"r": standardise(own, counted).flatten()[part["index"]],
             "weight": front_weights(keep, learner.selection).flatten()[part["index"]]}
    log = dict(zip(REWARDS, flat.mean(0))) | {
        "own": own.mean(), "kept": keep.double().mean(), "text_quality": torch.corrcoef(flat[:, :2].T)[0, 1],
        "constant": (R.amax(2) == R.amin(2)).sum()}
    return part, *(these.nonzero()[:, 0].tolist() for these in (trained, ~keep.flatten())), log


# [sync:score_rollout]
@torch.no_grad()
def score_rollout(args, policy, critic, batch, plan):
    """logp_old, logp_ref and values (b n) of a batch, in the very chunks of the first update so that its
    ratios are exactly 1 -> the three, with numbers to log."""
    tokens, text, mask = batch["tokens"], batch["text"], batch["mask"]
    old, ref, values, entropy, kl = (torch.zeros(tokens.shape, device=policy.device) for _ in range(5))
    options = policy.shortest, args.temperature
    for rows in (rows for _, chunks in plan[0] for rows in chunks):
        old[rows], logps, values[rows] = score_actions(policy.gpt, critic, tokens[rows], text[rows], *options)
        entropy[rows] = -(logps.exp() * logps).sum(-1)
        ref[rows], logps_ref, _ = score_actions(policy.reference, None, tokens[rows], text[rows], *options)
        kl[rows] = diagnostics.exact_kl(logps, logps_ref)
    return old, ref, values, diagnostics.rollout_stats(tokens, mask, batch["lengths"], policy.gpt.end, kl,
                                                       entropy)
# [/sync:score_rollout]


def assess(args, learner, batch, plan):
    """Stage 4, judge every token: rewards (MotionRL Eq. (7)), advantages (Eq. (8)), returns -> added to the
    batch, with numbers to log. Differs from ppo_motion.py: whitened for each token apart, as rewards keep
    different spreads; a motion's tokens share its weight."""
    mask = batch["mask"]
    old, ref, values, log = score_rollout(args, learner.policy, learner.critic, batch, plan)
    rewards = token_rewards(batch["r"], old, ref, mask, args.kl_coef)
    advantages, returns = gae(rewards, values, mask, args.gamma, args.gae_lambda)
    white = torch.zeros_like(advantages)
    for token in range(learner.sets):
        own = mask & (batch["token"] == token)[:, None]
        white += whiten(advantages * own, own, training.all_gather_rows(advantages[own]))
    batch |= dict(logp_old=old, values=values, returns=returns, advantages=white,
                  weight=token_weights(batch["weight"], mask, args.reduction))
    return log | {"explained_variance": diagnostics.explained_variance(values, returns, mask)}

# [sync:update]
TRAINED = ("tokens", "text", "mask", "weight", "logp_old", "values", "returns", "advantages")


def update(args, policy, critic, batch, plan, optimizer, iteration, stop):
    """Stage 4, update: clipped loss of the policy, a mean over tokens by their weight, and squared loss of
    the critic -> values to log."""
    actor, head = (group["params"] for group in optimizer.param_groups)
    names = ("pg_loss", "vf_loss", "approx_kl", "clipfrac", "grad_norm", "vf_grad_norm")
    log, ratios = dict.fromkeys(names, 0.0), []
    steps = [part for epoch in plan for part in epoch]
    for _, chunks in steps:
        optimizer.zero_grad()
        share = torch.tensor([[sum(batch[name][rows].sum().item() for rows in chunks)
                               for name in ("mask", "weight")]], dtype=torch.float64)
        total, weight = training.all_gather_rows(share).sum(0).tolist()  # of the minibatch, of all processes
        for rows in chunks:
            stop.check()
            part = {name: batch[name][rows] for name in TRAINED}
            learns = args.critic == "shared" or bool(part["weight"].any())  # or the critic alone does
            logp, _, values = score_actions(policy.gpt, critic, part["tokens"], part["text"],
                                            policy.shortest, args.temperature, learns)
            mask = part["mask"]
            logratio = torch.where(mask, logp - part["logp_old"], 0.0)
            ratio = logratio.exp()  # b n
            pg = clipped_loss(ratio, part["advantages"], args.clip_range)
            pg = (pg * part["weight"]).sum() / (weight or 1.0)  # none of them may be kept
            vf = value_loss(values, part["returns"], part["values"], args.value_clip)
            vf = (vf * mask).sum() / total
            loss = pg + args.vf_coef * vf
            training.check_loss(loss, f"iteration {iteration}")
            loss.backward()
            ratios.append(ratio.detach()[mask])
            log["pg_loss"] += pg.item() / len(steps)
            log["vf_loss"] += vf.item() / len(steps)
            for name, value in diagnostics.ratio_stats(logratio.detach(), mask, args.clip_range).items():
                log[name] += value.item() / (total * len(steps))
        training.all_reduce_grads([*actor, *head])
        for name, parameters in (("grad_norm", actor), ("vf_grad_norm", head)):
            where = f"iteration {iteration}: {name}"
            log[name] += training.clip_gradients(parameters, args.max_grad_norm, where) / len(steps)
        optimizer.step()
    first = torch.cat(ratios[: len(steps[0][1])] or [torch.ones(1)])
    log["first_ratio_error"] = (first - 1).abs().max().item()
    return training.reduce_log(log, highest={"first_ratio_error", "grad_norm", "vf_grad_norm"})
# [/sync:update]


def learn(args, learner, rewards, clips, iteration, loop, watch, rank, processes):
    """One iteration of one learner -> values to log."""
    with watch.stage("rollout"):
        batch = collect(args, learner, clips, iteration, rank, processes)
    loop.check()
    with watch.stage("reward"):
        loop.rewards = R = score(rewards, batch, iteration)
    with watch.stage("selection"):
        batch, trained, dominated, log = choose(args, learner, batch, R)
    plan = [training.minibatches(trained, round(1 / args.minibatch_ratio), batch["index"], args.micro_batch,
                             generator(args.seed, iteration, "shuffle", epoch), dominated)
            for epoch in range(args.ppo_epochs)]
    learner.optimizer.param_groups[0]["lr"] = args.lr * training.rise_and_fall(iteration, args.iterations,
                                                                          args.warmup)
    with watch.stage("update"):
        log |= assess(args, learner, batch, plan)
        log |= update(args, learner.policy, learner.critic, batch, plan, learner.optimizer, iteration, loop)
    return {name: float(value) for name, value in log.items()}


LOG_FIELDS = ("iteration", *REWARDS, "own", "kept", "text_quality", "constant", "kl_ref", "entropy", "length",
              "truncated", "distinct", "explained_variance", "pg_loss", "vf_loss", "approx_kl", "clipfrac",
              "grad_norm", "vf_grad_norm", "first_ratio_error", "rival_text", "rival_quality",
              "rival_preference", "rival_kl_ref", "val_judge", "val_oracle", "val_jerk", "val_speed")


def train(start, policies, tokens, rewards, scorers, splits, folder):
    """The loop. Of each policy the GPT alone changes."""
    args, policy, rival = start.args, policies["tuned"], policies.get("weighted sum")
    rank, processes = runs.world(policy.device)
    learners = {"tuned": make_learner(args, policy, args.selection, tokens)}
    learners |= {"rival": make_learner(args, rival, "weighted-sum", None)} if rival else {}
    parts = {f"{name} {part}": value for name, learner in learners.items() for part, value in (
        ("gpt", learner.policy.gpt), ("critic", learner.critic), ("optimizer", learner.optimizer))}
    networks = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
    origin = {"starts from": runs.fingerprint(policy.reference.state_dict())}
    watch, shown = start.watch, {}
    with runs.Loop("pareto", start, folder, LOG_FIELDS, origin, networks) as loop:
        for name, part in parts.items() if loop.state else ():
            part.load_state_dict(loop.state[name])
        for iteration in loop:
            values = {name: learn(args, learner, rewards, splits["train"], iteration, loop, watch, rank,
                                  processes) for name, learner in learners.items()}
            row = dict.fromkeys(LOG_FIELDS) | values["tuned"] | {"iteration": iteration}
            row |= {f"rival_{name}": values["rival"][name] for name in (*REWARDS, "kl_ref") if rival}
            if (iteration + 1) % args.eval_every == 0:
                with watch.stage("validation"):
                    val = evaluate.evaluate(splits["val"], scorers, policy_sampler(args, policy, tokens),
                                           purpose="validation", benchmark=False)
                row |= {f"val_{name}": val[name][0] for name in ("judge", "oracle", "jerk", "speed")}
                shown = {name: row[name] for name in ("val_judge", "val_oracle")}
            loop.end(row, {name: row[name] for name in (*REWARDS, "kl_ref")} | shown,
                     {name: part.state_dict() for name, part in parts.items()})


# ---- 8. Evaluation and pictures ----------------------------------------------------------------------------


def policy_sampler(args, policy, tokens=None, weights=BALANCED):
    """A policy as a sampler for common/evaluate.py, its tokens mixed by weights (k). Sample k of a call always
    uses the same draws: policies are compared in pairs."""
    def sample(captions, lengths, rows, purpose, repeat):
        text = read_text(policy, captions, tokens, weights, args.alpha)
        return generate(policy, policy.gpt, text, args.seed, repeat, purpose, rows, 1.0)[:2]
    return evaluate.in_chunks(sample)


def final_tables(args, policies, tokens, scorers, splits, folder):
    """Tables of val and test, the controllability matrix, and the fronts of all policies (by name)."""
    start, policy, single = policies["start"], policies["tuned"], torch.eye(len(REWARDS))
    rows = {"vq": None, "base": policy_sampler(args, start), "tuned": policy_sampler(args, policy, tokens)}
    tables, rival = {}, policies.get("weighted sum")
    more = {"weighted sum": policy_sampler(args, rival)} if rival else {}
    if tokens is not None:
        more["plain"] = policy_sampler(args, policy)
        more |= {f"token {name}": policy_sampler(args, policy, tokens, w) for name, w in zip(REWARDS, single)}
    for name, others in (("val", {}), ("test", more)):
        clips = splits[name][:300]
        rows["vq"] = tokenizer.reconstruction(policy.vq, clips, policy.device)
        tables[f"paired_{name}"] = evaluate.compare(f"paired {name}", clips, scorers, rows | others,
                                                   purpose=name, repeats=args.eval_repeats)
    samplers = {name: [policy_sampler(args, one, tokens if name == "tuned" else None, w) for w in single]
                for name, one in policies.items()}
    return tables | {"controllability": fronts.controllability(tables["paired_test"], REWARDS),
                     "fronts": fronts.compare_fronts(samplers, splits["test"][:args.front_prompts], scorers,
                                                      REWARDS, folder / "fronts.png")}


def write_motions(args, stored, folder, device):
    """--prompt: GIF, joints and BVH of every caption, from policy.pt alone."""
    policy = token_policy.load(stored, device, **runs.arguments_of(token_policy.load, args))
    tokens = stored["tokens"].to(device) if len(stored["tokens"]) else None
    if args.prefer and tokens is None:
        raise InputError(f"--prefer: {args.load} was trained without tokens; leave --prefer out")
    before = {"before": policy_sampler(args, policy._replace(gpt=policy.reference))} if args.compare else {}
    after = policy_sampler(args, policy, tokens, runs.parse_weights(args.prefer, REWARDS, "--prefer"))
    skeleton = features.SKELETONS[len(policy.vq.mean)]
    evaluate.export(folder, args.prompt, 0, 0, skeleton, before | {"after": after})


def main(argv):
    """Prepare; then train, evaluate and draw, or do one of the things that need no training."""
    start = runs.prepare(Args, TINY, argv, __doc__, method="pareto", product="pareto-policy",
                         check=check_args)
    args, stored, device, rank, watch = start.args, start.stored, start.device, start.rank, start.watch
    if args.prompt:
        write_motions(args, stored, start.open_folder(), device)
        return
    with watch.stage("data"):
        data = datasets.load_dataset(
            args.dataset, space="native", clips=args.clips, seed=args.base_seed, data_root=args.data_root,
            cache_dir=args.cache_dir, use_cache=args.cache)
    folder = start.open_folder()
    print(f"{device}, {start.threads} CPU thread(s)\n  data: {data.label}")
    with watch.stage("reward encoders and judge"):
        losses = retrieval.INFO_NCE, (f"margin {args.margin}", retrieval.margin_pairs(args.margin))
        *encoders, judge, notes = retrieval.rewards_and_judge(
            [data], [data], saw=data.label, losses=losses, iterations=args.reward_iterations,
            seed=args.base_seed, cache_dir=args.cache_dir, use_cache=args.cache, device=device)
    if stored:
        policy = token_policy.load(stored, device, **runs.arguments_of(token_policy.load, args))
    else:
        settings = runs.arguments_of(token_policy.build, args)
        policy, trained = token_policy.build(data, device, watch, **settings)
        notes |= trained
    with watch.stage("perception"):
        settings = runs.arguments_of(perception.build, args)
        critic, notes["perception"] = perception.build(data, policy.vq, device, **settings)
    tokens, policies = None, {"start": policy._replace(gpt=policy.reference), "tuned": policy}
    if args.selection != "weighted-sum":
        tokens = stored["tokens"].to(device) if stored else make_tokens(policy, data.splits["train"])
        if args.rival:
            policies["weighted sum"] = policy._replace(gpt=copy.deepcopy(policy.reference))
    if stored:
        rewards = Rewards(encoders, critic, **{k: v.to(device) for k, v in stored["rewards"].items()})
        if "weighted sum" in policies:
            published.load_strict(policies["weighted sum"].gpt, stored["rival"], args.load)
    else:
        rewards = calibrate(args, policy, encoders, critic, data.splits["train"])
    scorers = evaluate.Scorers(encoders[0], judge, data.skeleton, rewards.columns)
    scales = {name: getattr(rewards, name) for name in ("lambdas", "low", "high")}
    about = start.about(folder, notes, data, data, rewards=scales)
    if not stored:
        train(start, policies, tokens, rewards, scorers, data.splits, folder)
        if rank:
            return
        rival = policies["weighted sum"].gpt.state_dict() if "weighted sum" in policies else {}
        runs.save_checkpoint(folder / "policy.pt", kind="pareto-policy", keep_previous=False, data={
            "args": runs.shaping_args(args), **token_policy.state(policy), "rival": rival,
            "tokens": torch.zeros(0) if tokens is None else tokens, "rewards": scales})
    with watch.stage("evaluation"):
        tables = final_tables(args, policies, tokens, scorers, data.splits, folder)
    with watch.stage("pictures"):
        evaluate.draw(folder, data.splits["test"], scorers, {
            "before": policy_sampler(args, policies["start"]), "after": policy_sampler(args, policy, tokens)
        }, curves=not stored)
    motions = 0 if stored else args.iterations * args.batch_prompts * args.samples_per_prompt * len(REWARDS)
    runs.finish(folder, watch, {**about, **tables, "counts": {"motions": motions * (len(policies) - 1)}})


if __name__ == "__main__":
    runs.run_main(main)
