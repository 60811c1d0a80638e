"""PPO on motion tokens: a VQ-VAE makes motions a language, a GPT speaks it, rewards correct its grammar.

The idea. A text-to-motion GPT that was trained on pairs of captions and motions repeats what it has seen, and
new combinations of known movements are hardly ever right. There is no motion to show it for a new sentence,
but there are encoders that say how well a motion fits a text. So the GPT samples motions for known captions
and for composed ones that have no motion, and PPO makes the well-fitting tokens more likely.

Papers
  InstructMotion (Mao et al. 2024, arXiv 2405.15541): the method; not the repository of the same name
  PPO (Schulman et al. 2017, arXiv 1707.06347), GAE (Schulman et al. 2016, arXiv 1506.02438)
  T2M-GPT (Zhang et al. 2023, arXiv 2301.06052): tokenizer and policy; its weights can be loaded

The decision process: a state is the caption and the tokens so far, an action the next token, end included;
the episode ends with the end token or at the token limit, and only then is there a reward.
  variable          symbol                       meaning
  tokens (b n)      a_t                          codes 0 .. K-1, end = K, padding = K+1
  mask (b n)                                     True for codes and the end token: the end is an action too
  logp, logp_ref    log pi_theta, log pi_ref     of the action, at the sampling temperature
  ratio             rho_t = pi_theta / pi_old    clipped to 1 +- eps
  rewards (b n)     Eq. (3)                      -beta (logp_old - logp_ref), plus r at the last token
  values            V(s_t)                       a small head on the policy's own, detached features
  advantages        A_t                          GAE, whitened over the valid tokens of the batch

Read in this order: section 6 (the maths), 7 (the loop), 3 (the networks), then the rest.

  python ppo_motion.py --dataset kit             # from nothing to a tuned model, see README for the time
  python ppo_motion.py --dataset kit --tiny      # the same path at toy size
  python ppo_motion.py --prompt "A human waves with both arms." --load runs/ppo_kit_seed0/policy.pt
  python ppo_motion.py --dataset kit --write-prompts prompts.txt     # the composed captions, to be read
"""

# ---- 1. Imports --------------------------------------------------------------------------------------------

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import (
    InputError, compose, datasets, diagnostics, evaluate, features, generator, retrieval, runs,
    token_policy, tokenizer, training)
from common.motion_gpt import Block
from common.runs import arg

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
    write_prompts: str = arg("", "write the composed captions to this file and stop")
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
    # prompts
    text_only_share: float = arg(0.5, "share of composed captions in a rollout (InstructMotion: 0 or 1/2)")
    composed: int = arg(3000, "sentences composed of the training captions", lowest=0)
    three_parts: float = arg(0.1, "share of them made of three movements")
    together: float = arg(0.67, "share of the others whose two movements go on at once")
    # reward
    reward: str = arg("encoders", "shuffled, random: controls", choices=("encoders", "shuffled", "random"))
    reward_loss: str = arg("infonce", "what the reward encoders learn from: Eq. (1), or InfoNCE",
                           choices=("margin", "infonce"))
    margin: float = arg(1.4, "margin of Eq. (1); unit-length embeddings are at most 2 apart (there: by hand)")
    reward_iterations: int = arg(900, "updates of the reward encoders and of the judge")
    lambda_t: float = arg(0.4, "weight of the distance to the text (InstructMotion: 0.4)")
    lambda_m: float = arg(2.0, "weight of the distance to the paired motion (InstructMotion: 2.0)")
    reward_scale: float = arg(0.0, "factor of the reward; 0: one over its spread under the supervised GPT")
    # update
    iterations: int = arg(300, "PPO iterations (InstructMotion: 40 000)")
    batch_prompts: int = arg(32, "prompts of a rollout (InstructMotion: 128)")
    samples_per_prompt: int = arg(16, "motions of each, rewarded for being better than the others (there: 1)")
    kept_samples: int = arg(128, "motions of a rollout that are trained, the most unusual; 0: all", lowest=0)
    lr: float = arg(1.5e-4, "highest learning rate of the policy (InstructMotion: 5e-6)")
    kl_coef: float = arg(0.05, "beta, weight of the KL in the reward (InstructMotion: unknown)")
    temperature: float = arg(1.0, "of sampling and of every log-probability")
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
    eval_every: int = arg(50, "iterations between looks at the validation prompts")
    eval_repeats: int = arg(3, "repeats of the final evaluation, for the 95 % interval (benchmark: 20)")
    best_of: int = arg(8, "reference row: the best of this many base samples by reward")


TINY = dict(clips=240, codes=48, vq_width=24, vq_iterations=60, width=32, base_layers=1, text_layers=1,
            gpt_iterations=60, batch=32, composed=300, reward_iterations=40, iterations=3, batch_prompts=16,
            eval_every=2, eval_repeats=2, best_of=2)


def check_args(args):
    """Stop at once on settings that cannot work, naming the flag and the fix."""
    token_policy.check(**runs.arguments_of(token_policy.check, args))
    count = 1 / args.minibatch_ratio if args.minibatch_ratio > 0 else 0.0
    motions = args.batch_prompts * args.samples_per_prompt
    kept = args.kept_samples if args.kept_samples and args.samples_per_prompt > 1 else motions
    paired = args.batch_prompts - round(args.batch_prompts * args.text_only_share)
    for wrong, message in (
            (args.batch_prompts < 2 * runs.process_count(), "--batch-prompts: at least two per process"),
            (kept > motions, f"--kept-samples: at most prompts x samples of a rollout, {motions}"),
            (count < 1 or count % 1 or kept % int(max(count, 1)),
             f"--minibatch-ratio: 1, 0.5, 0.25 ... so that it divides the {kept} motions trained"),
            (not 0 <= args.text_only_share <= 1, "--text-only-share: 0 to 1"),
            (args.text_only_share and not args.composed, "--composed: at least 1, or --text-only-share 0"),
            (args.text_only_share == 1 and not args.lambda_t, "--lambda-t: above 0; without pairs no reward"),
            (not args.lambda_t and not args.lambda_m, "--lambda-t, --lambda-m: one of them above 0"),
            (args.reward == "shuffled" and paired == 1, "--reward shuffled: two paired prompts, or none"),
            (not args.temperature, "--temperature: above 0"),
            (max(args.three_parts, args.together) > 1, "--three-parts, --together: 0 to 1")):
        if wrong:
            raise InputError(message)


# ---- 3. and 4. The networks, and what PPO starts from ------------------------------------------------------
# Tokenizer, text encoder and supervised GPT are those of T2M-GPT: common/token_policy.py and what it imports.


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


def reward_terms(f_text, f_motion, f_paired):
    """Squared distances of Eq. (2): to the text (b) and to the paired motion (b); embeddings (b c)."""
    return (f_text - f_motion).square().sum(-1), (f_paired - f_motion).square().sum(-1)


def motion_reward(text_distance, motion_distance, paired, lambda_t, lambda_m):
    """InstructMotion Eq. (2), r <= 0, and its pseudo score: items without a motion get the mean motion term
    of the paired ones, so that they are not better off. All (b); paired bool -> reward (b), pseudo score"""
    motion_term = -lambda_m * motion_distance
    pseudo = motion_term[paired].mean() if paired.any() else motion_term.new_zeros(())
    return -lambda_t * text_distance + torch.where(paired, motion_term, pseudo), pseudo


# ---- 6. The algorithm: pure functions, no I/O, no globals --------------------------------------------------
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


# [sync:strongest]
def strongest(advantages, count):
    """Numbers, in order, of the `count` samples with the largest |advantage|; 0: of all. Not in the paper: a
    sample costs a quarter of its update, and those near their group's mean teach little (Xu et al. 2025)."""
    order = advantages.abs().argsort(descending=True, stable=True)
    return order[: count or len(order)].sort().values.tolist()
# [/sync:strongest]


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


def draw_prompts(args, clips, composed, iteration):
    """The prompts of a rollout: captions (b) and the paired clip of each, None for composed captions."""
    g = generator(args.seed, iteration, "prompts")
    alone = round(args.batch_prompts * args.text_only_share)
    rows = torch.randint(len(clips), (args.batch_prompts - alone,), generator=g).tolist()
    chosen = [clips[k] for k in rows]
    drawn = list(zip(datasets.draw_captions(chosen, g), chosen))
    if args.reward == "shuffled":  # nothing of the right motion may leak in
        drawn = [(caption, clip) for (caption, _), (_, clip) in zip(drawn, drawn[1:] + drawn[:1])]
    picked = torch.randint(max(len(composed), 1), (alone,), generator=g).tolist()
    drawn += [(composed[k], None) for k in picked]
    return [prompt for prompt in drawn for _ in range(args.samples_per_prompt)]


@torch.no_grad()
def collect(args, policy, clips, composed, iteration, rank, processes):
    """Stage 1, roll out: P prompts x G motions. Each process takes whole groups, its share of the prompts."""
    drawn, size = draw_prompts(args, clips, composed, iteration), args.samples_per_prompt
    index = [k for k in range(len(drawn)) if k // size * processes // args.batch_prompts == rank]
    captions, pairs = zip(*(drawn[k] for k in index))
    text = retrieval.once(policy.text, captions)
    motion, lengths, tokens = generate(policy, policy.gpt, text, args.seed, iteration, "rollout", index,
                                       args.temperature)
    mask = F.pad(tokens[:, :-1] < policy.gpt.end, (1, 0), value=True)  # codes and the end
    return dict(captions=captions, pairs=pairs, index=index, motion=motion, lengths=lengths, tokens=tokens,
                text=text, mask=mask)


@torch.no_grad()
def score(args, policy, reward_model, batch, wrong, iteration):
    """Stage 2, score -> r (b) of Eq. (2) and its parts, of this process's motions."""
    if args.reward == "random":
        r = torch.stack([torch.randn((), generator=generator(args.seed, iteration, "random_reward", k))
                         for k in batch["index"]]).to(policy.device)
        return r, {"text_term": 0.0, "motion_term": 0.0, "pseudo_score": 0.0}
    asked = [wrong[c] for c in batch["captions"]] if args.reward == "shuffled" else batch["captions"]
    paired = torch.tensor([clip is not None for clip in batch["pairs"]], device=policy.device)
    unit = retrieval.embed_pairs(reward_model, batch["motion"], batch["lengths"], asked, batch["pairs"])
    distances = [training.all_gather_rows(d) for d in reward_terms(*unit)]
    r, pseudo = motion_reward(*distances, training.all_gather_rows(paired), args.lambda_t, args.lambda_m)
    training.check_rewards(r[batch["index"]], batch["captions"], f"iteration {iteration}: reward")
    parts = {"text_term": -args.lambda_t * distances[0].mean(), "pseudo_score": pseudo}
    return r[batch["index"]], parts | {"motion_term": r.mean() - parts["text_term"]}


def baseline(args, batch, r, scale):
    """Each prompt's rewards are standardised among its motions, where it has several: what one prompt gets by
    nature is no merit of a motion (not in the paper, which has one motion a prompt and the critic alone).
    Of those motions only the ones most unlike their group are trained, see strongest().
    -> the batch of those, their r in units of about one, and the numbers of those of all processes"""
    merit = scale * training.all_gather_rows(r)
    kept = list(range(len(merit)))
    if args.samples_per_prompt > 1:
        groups = rearrange(merit, "(p g) -> p g", g=args.samples_per_prompt)
        centred = groups - groups.mean(1, keepdim=True)
        spread = groups.std(1, keepdim=True) + 0.05 * centred.std() + 1e-8  # groups of equals stay near zero
        merit = (centred / spread).flatten()
        kept = strongest(merit, args.kept_samples)
    wanted = set(kept)
    rows = [row for row, k in enumerate(batch["index"]) if k in wanted]
    part = {name: value[rows] if torch.is_tensor(value) else [value[row] for row in rows]
            for name, value in batch.items()}
    return part, merit[part["index"]], kept


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


def assess(args, policy, critic, batch, r, plan):
    """Stage 3, judge every token: rewards (Eq. 3), advantages, returns -> added to the batch, with numbers to
    log."""
    mask = batch["mask"]
    old, ref, values, log = score_rollout(args, policy, critic, batch, plan)
    rewards = token_rewards(r, old, ref, mask, args.kl_coef)
    advantages, returns = gae(rewards, values, mask, args.gamma, args.gae_lambda)
    batch |= dict(logp_old=old, values=values, returns=returns, weight=mask.to(old.dtype),
                  advantages=whiten(advantages, mask, training.all_gather_rows(advantages[mask])))
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


LOG_FIELDS = ("iteration", "reward", "text_term", "motion_term", "pseudo_score", "kl_ref", "entropy",
              "length", "truncated", "distinct", "explained_variance", "pg_loss", "vf_loss", "approx_kl",
              "clipfrac", "grad_norm", "vf_grad_norm", "first_ratio_error",
              "val_reward", "val_judge", "val_oracle", "val_foot_skate", "val_jerk")


def train(start, policy, scorers, clips, sets, folder):
    """The loop. The tokenizer, the text encoder and the reference never change -> the reward's scale"""
    args, (rank, processes) = start.args, runs.world(policy.device)
    composed = [clip.captions[0] for clip in sets["composed_train"]]
    known = sorted({c for clip in clips for c in clip.captions} | set(composed))
    wrong = retrieval.wrong_captions(known, args.seed)
    critic = Critic(policy.gpt, args.critic, generator(args.seed, 0, "critic")).to(policy.device)
    policy.gpt.requires_grad_(True)
    optimizer = torch.optim.AdamW([{"params": list(policy.gpt.parameters()), "lr": args.lr},
                                   {"params": list(critic.parameters()), "lr": args.critic_lr}],
                                  betas=(0.9, 0.99), weight_decay=1e-6)
    networks = nn.ModuleDict({"gpt": policy.gpt, "critic": critic})
    parts = {**networks, "optimizer": optimizer}
    watch, scale, shown = start.watch, args.reward_scale, {}
    origin = {"starts from": runs.fingerprint(policy.reference.state_dict())}
    with runs.Loop("ppo", start, folder, LOG_FIELDS, origin, networks) as loop:
        if loop.state:
            scale = loop.state["scale"]
            for name, part in parts.items():
                part.load_state_dict(loop.state[name])
        if not scale:
            batch = collect(args, policy, clips, composed, -1, rank, processes)
            r, _ = score(args, policy, scorers.reward_model, batch, wrong, -1)
            scale = 1 / max(training.all_gather_rows(r).std().item(), 1e-6)
        for iteration in loop:
            with watch.stage("rollout"):
                batch = collect(args, policy, clips, composed, iteration, rank, processes)
            loop.check()
            with watch.stage("reward"):
                r, log = score(args, policy, scorers.reward_model, batch, wrong, iteration)
            batch, merit, kept = baseline(args, batch, r, scale)
            plan = [training.minibatches(kept, round(1 / args.minibatch_ratio), batch["index"],
                                     args.micro_batch, generator(args.seed, iteration, "shuffle", epoch))
                    for epoch in range(args.ppo_epochs)]
            optimizer.param_groups[0]["lr"] = args.lr * training.rise_and_fall(iteration, args.iterations,
                                                                               args.warmup)
            loop.rewards = r
            with watch.stage("update"):
                log |= assess(args, policy, critic, batch, merit, plan)
                log |= update(args, policy, critic, batch, plan, optimizer, iteration, loop)
            row = dict.fromkeys(LOG_FIELDS) | {name: float(value) for name, value in log.items()}
            row |= {"iteration": iteration, "reward": training.all_gather_rows(r).mean().item()}
            if (iteration + 1) % args.eval_every == 0:
                with watch.stage("validation"):
                    sampler = policy_sampler(args, policy, policy.gpt)
                    val = evaluate.evaluate(sets["composed_val"], scorers, sampler, purpose="validation")
                row |= {name: val[name[4:]][0] for name in LOG_FIELDS if name.startswith("val_")}
                shown = {name: row[name] for name in ("val_judge", "val_oracle")}
            loop.end(row, {"reward": row["reward"], "kl_ref": row["kl_ref"], **shown},
                     {"scale": scale, **{name: part.state_dict() for name, part in parts.items()}})
    policy.gpt.requires_grad_(False)
    return scale


# ---- 8. Evaluation and pictures ----------------------------------------------------------------------------


def policy_sampler(args, policy, gpt):
    """A GPT as a sampler for common/evaluate.py; it chooses its own lengths. Sample k of a call always uses
    the same draws: base and tuned are compared in pairs."""
    def sample(captions, lengths, rows, purpose, repeat):
        text = retrieval.once(policy.text, captions)
        return generate(policy, gpt, text, args.seed, repeat, purpose, rows, args.temperature)[:2]
    return evaluate.in_chunks(sample)


def final_tables(args, policy, scorers, splits, sets):
    """Paired val and test, then captions that have no motion: some that PPO saw, and those held back."""
    base, tuned = policy_sampler(args, policy, policy.reference), policy_sampler(args, policy, policy.gpt)
    tables = {}
    for name, clips in {"paired_val": splits["val"], "paired_test": splits["test"], **sets}.items():
        clips, rows = clips[:300], {"base": base, "tuned": tuned}
        if name.startswith("paired"):
            rows = {"vq": tokenizer.reconstruction(policy.vq, clips, policy.device), **rows}
        if name.endswith("test"):
            rows[f"best of {args.best_of}"] = evaluate.best_of(base, args.best_of, scorers.reward_model)
        tables[name] = evaluate.compare(name.replace("_", " "), clips, scorers, rows, purpose=name,
                                       repeats=args.eval_repeats)
    return tables


def write_motions(args, stored, folder, device):
    """--prompt: GIF, joints and BVH of every caption, from policy.pt alone."""
    policy = token_policy.load(stored, device, **runs.arguments_of(token_policy.load, args))
    chosen = {"before": policy_sampler(args, policy, policy.reference)} if args.compare else {}
    chosen["after"] = policy_sampler(args, policy, policy.gpt)
    evaluate.export(folder, args.prompt, 0, 0, features.SKELETONS[len(policy.vq.mean)], chosen)


def main(argv):
    """Prepare; then train, evaluate and draw, or do one of the things that need no training."""
    start = runs.prepare(Args, TINY, argv, __doc__, method="ppo", product="ppo-policy", check=check_args)
    args, stored, device, rank, watch = start.args, start.stored, start.device, start.rank, start.watch
    if args.prompt:
        write_motions(args, stored, start.open_folder(), device)
        return
    with watch.stage("data"):
        data = datasets.load_dataset(
            args.dataset, space="native", clips=args.clips, seed=args.base_seed, data_root=args.data_root,
            cache_dir=args.cache_dir, use_cache=args.cache)
        sets, counted = compose.composed_sets(data, args.composed, seed=args.base_seed,
                                              three_parts=args.three_parts, together=args.together)
    if args.write_prompts:
        compose.write_sets(args.write_prompts, sets, counted)
        return
    folder = start.open_folder()
    print(f"{device}, {start.threads} CPU thread(s)\n  data: {data.label}\n  composed captions: {counted}")
    with watch.stage("reward model and judge"):
        loss = retrieval.INFO_NCE
        if args.reward_loss == "margin":
            loss = f"margin {args.margin}", retrieval.margin_pairs(args.margin)
        reward_model, judge, notes = retrieval.rewards_and_judge(
            [data], [data], saw=data.label, losses=[loss], iterations=args.reward_iterations,
            seed=args.base_seed, cache_dir=args.cache_dir, use_cache=args.cache, device=device)
    scorers = evaluate.Scorers(reward_model, judge, data.skeleton)
    if stored:
        policy = token_policy.load(stored, device, **runs.arguments_of(token_policy.load, args))
    else:
        settings = runs.arguments_of(token_policy.build, args)
        policy, trained = token_policy.build(data, device, watch, **settings)
        notes |= trained
    about = start.about(folder, notes, data, data, **{"composed captions": counted})
    if not stored:
        about["reward_scale"] = train(start, policy, scorers, data.splits["train"], sets, folder)
        if rank:
            return
        runs.save_checkpoint(folder / "policy.pt", kind="ppo-policy", keep_previous=False,
                             data={"args": runs.shaping_args(args), **token_policy.state(policy)})
    with watch.stage("evaluation"):
        tables = final_tables(args, policy, scorers, data.splits, sets)
    with watch.stage("pictures"):
        before_after = {"before": policy_sampler(args, policy, policy.reference),
                        "after": policy_sampler(args, policy, policy.gpt)}
        evaluate.draw(folder, sets["composed_test"], scorers, before_after, curves=not stored)
    motions = 0 if stored else args.iterations * args.batch_prompts * args.samples_per_prompt
    runs.finish(folder, watch, {**about, **tables, "counts": {"motions": motions}})


if __name__ == "__main__":
    runs.run_main(main)
