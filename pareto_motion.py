"""Several rewards at once: text, quality, preference; Pareto selection; tokens that choose.

The idea. One reward can be raised at the cost of what it does not see: a text score by jittering,
a preference score by standing still. So three rewards judge each motion, and of the motions for a
prompt the GPT learns only from those that no other one beats. A token in the text feature says
which reward is asked for; a mixture of tokens asks for a compromise.

Papers
  [MRL]  MotionRL, Liu et al. 2024, arXiv 2410.06513: this method; equations without a name
  [IM]   InstructMotion, Mao et al. 2024, arXiv 2405.15541: PPO on motion tokens
  [MC]   MotionCritic, Wang et al. 2024, arXiv 2407.02272: preferences of people

`diff ppo_motion.py pareto_motion.py` is the lesson: one reward becomes a vector, a prompt gets
three reward tokens, and not all motions are learnt from.
  in the code          symbol        meaning
  f_t, f_tk            f(t), f(t_k)  text feature without and with the token of reward k
  R (p c n k)          r^1 .. r^K    all rewards: p prompts, c reward tokens, n motions of each
  keep (p c n)         m in P        beaten by none of its set P, a prompt and a token
  weight (p c n)       1 / n(P)      of a motion in the loss; 0 where it is beaten
  own (p c n)          r(t_k, m_k)   the reward that the token of the motion asks for

Read the first half of section 6, then 4 and 7: selection, rewards, loop.
  python pareto_motion.py --dataset kit           # from nothing to a tuned model
  python pareto_motion.py --dataset kit --tiny    # the same at toy size
  python pareto_motion.py --load runs/pareto_kit_seed0/policy.pt --prompt "he waves" --prefer text=1
"""

# ---- 1. Imports ----

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from common import (NonFiniteError, compose, datasets, evaluate, features, generator, perception,
                    pick, retrieval, runs, sinusoid, tokenizer, training, uniforms)
from common.published import motion_critic, t2m_gpt
from common.runs import arg

# ---- 2. Arguments ----

@dataclass
class Args(t2m_gpt.WeightArgs):
    """Every field, own or inherited, is a flag. shaping: see common/runs.py."""
    perception_checkpoint: str = arg("", "published MotionCritic (.pth) for preference")
    selection: str = arg("per-token", "who competes, see select(); weighted-sum: no tokens",
                         choices=("per-token", "union", "literal", "none", "weighted-sum"),
                         group="selection and tokens")
    weights: str = arg("", "of the weighted sum, as in --prefer; empty: equal")
    alpha: float = arg(0.5, "share of the token, Eq. (11) ([MRL]: unknown)")
    prefer: str = arg("", "of a --prompt: text=0.7,quality=0.2,preference=0.1", shaping=False)
    token_reward: str = arg("own", "r of Eq. (7): of the motion's reward token, or the mean",
                            choices=("own", "mean"))
    baseline: str = arg("all", "motions that spread, values and whitening are taken from",
                        choices=("all", "kept"))
    reduction: str = arg("motion", "what weighs alike in the loss ([MRL] Eq. (7): token)",
                         choices=("motion", "token"))
    iterations: int = arg(64, "of PPO ([MRL]: 40000)", group="update")
    prompts: int = arg(8, "prompts P of a rollout ([MRL]: unknown)")
    samples: int = arg(16, "motions N of each prompt and token ([MRL]: 32?)", lowest=2)
    epochs: int = arg(2, "passes over a rollout ([MRL]: 2)")
    minibatches: int = arg(1, "optimizer steps of a pass ([MRL]: unknown)")
    micro_batch: int = arg(0, "motions of a forward pass; 0: a minibatch. Fewer save memory")
    lr: float = arg(3e-4, "highest learning rate of the policy ([MRL]: 5e-6)")
    critic: str = arg("shared-detach", "reads the policy's features, detached or not; or a copy",
                      choices=("shared-detach", "shared", "separate"))
    kl_coef: float = arg(0.05, "beta, weight of the KL to the supervised GPT ([MRL]: unknown)")
    clip_range: float = arg(0.2, "eps of the ratio ([MRL]: unknown)")
    gae_lambda: float = arg(1.0, "lambda of GAE; 1: no value is bootstrapped ([MRL] Eq. 8: 1)")
    temperature: float = arg(1.0, lowest=0.01, text="of rollout and update ([MRL]: 1.5)")
    eval_every: int = arg(20, "iterations between looks at val prompts", group="evaluation")


SIZE_ARGS = {  # what --size sets here; the sizes of networks are in common/tokenizer.py
    "tiny": dict(iterations=3, prompts=2, samples=4, eval_every=2, eval_repeats=2),
    "paper": dict(iterations=40_000, samples=32, lr=5e-6, temperature=1.5, eval_repeats=20)}
REWARDS = ("text", "quality", "preference")  # [MRL] <mt>, <mm>, <perception>
MARGIN = 1.4  # of Eq. (1): unit vectors are at most 2 apart ([MRL]: unknown)
WARMUP, CRITIC_LR = 20, 1e-3  # iterations in which the rate rises; the critic's own rate
GAMMA, VF_COEF, MAX_GRAD_NORM = 1.0, 0.5, 1.0  # episodes are finite, so there is no discount
TOKEN_LENGTH = 12.0  # in norms of a text feature: zero weights learn from it quickly


def check_args(args):
    """Refuse at once what cannot work, and say which flag to change."""
    t2m_gpt.check_weights(args)
    motion_critic.check_published(args.perception_checkpoint)
    for flag, spec in (("--prefer", args.prefer), ("--weights", args.weights)):
        runs.parse_weights(spec, REWARDS, flag)
    motions, weighted = 3 * args.prompts * args.samples, args.selection == "weighted-sum"
    runs.refuse(
        (args.prompts < runs.process_count(), "--prompts: at least one for each process"),
        (motions % args.minibatches, f"--minibatches: must divide the {motions} motions"),
        (args.minibatches > 1 and args.baseline == "kept", "--minibatches: 1, as some are kept"),
        (args.alpha > 1, "--alpha: 0 to 1"),
        (args.weights and not weighted, "--weights: for --selection weighted-sum"),
        (args.prefer and not args.prompt, "--prefer: steers a --prompt, and no training"),
        (args.prefer and weighted, "--prefer: this policy was trained without tokens"))


# ---- 3. The network ----
# [sync:gpt]

class CausalAttention(nn.Module):
    """Attention in which each position sees itself and the positions before it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, cache=None):
        q, k, v = (rearrange(f(x), "b n (h c) -> b h n c", h=self.heads)
                   for f in (self.query, self.key, self.value))
        if cache is not None:
            # Earlier keys and values come from the cache: a new token costs one position.
            if self in cache:
                k, v = (torch.cat(parts, 2) for parts in zip(cache[self], (k, v)))
            cache[self] = k, v
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # b h n m
        n, m = scores.shape[2:]
        later = torch.ones(n, m, dtype=torch.bool, device=x.device).triu(m - n + 1)
        scores = scores.masked_fill(later, -math.inf)
        return self.proj(rearrange(scores.softmax(-1) @ v, "b h n c -> b n (h c)"))


class Block(nn.Module):
    """Pre-norm transformer block. No dropout: the first ratio of PPO must be 1."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln1(x), cache)
        return x + self.mlp(self.ln2(x))


class MotionGPT(nn.Module):
    """p(next token | text, tokens so far), T2M-GPT section 3.2, with its names of layers."""

    def __init__(self, codes, text_dim, width, heads, base_layers, head_layers, block_size):
        super().__init__()
        self.codes, self.end, self.pad = codes, codes, codes + 1
        self.heads, self.block_size = heads, block_size
        self.trans_base = nn.ModuleDict({
            "tok_emb": nn.Embedding(codes + 2, width), "cond_emb": nn.Linear(text_dim, width),
            "blocks": nn.ModuleList(Block(width, heads) for _ in range(base_layers))})
        self.trans_head = nn.ModuleDict({
            "blocks": nn.ModuleList(Block(width, heads) for _ in range(head_layers)),
            "ln_f": nn.LayerNorm(width),
            "head": nn.Linear(width, codes + 1, bias=False)})  # padding is no action
        self.register_buffer("positions", sinusoid(block_size, width), persistent=False)

    def forward(self, tokens, text, cache=None):
        """tokens (b n), text (b d) -> logits (b n+1 v), features of the base layers (b n+1 c);
        with a cache, a dict that starts empty, of the last position alone."""
        x = self.trans_base["cond_emb"](text)[:, None]  # the text is the first position
        x = torch.cat([x, self.trans_base["tok_emb"](tokens)], 1)
        x = x + self.positions[: x.shape[1]]
        x = x[:, -1:] if cache else x
        for block in self.trans_base["blocks"]:
            x = block(x, cache)
        hidden = x
        # The critic reads what the base layers give, the head layers are the policy's alone.
        for block in self.trans_head["blocks"]:
            x = block(x, cache)
        return self.trans_head["head"](self.trans_head["ln_f"](x)), hidden


class Critic(nn.Module):
    """V(s_t) from the base layers of the policy, or from a copy that it trains ("separate")."""

    def __init__(self, gpt, kind, g):
        super().__init__()
        self.kind, width = kind, gpt.positions.shape[1]
        self.block, self.norm = Block(width, gpt.heads), nn.LayerNorm(width)
        self.value = nn.Linear(width, 1)
        training.initialise(self, g)
        nn.init.zeros_(self.value.weight)  # V starts at 0
        self.trunk = copy.deepcopy(gpt).requires_grad_(True) if kind == "separate" else None

    def forward(self, hidden, tokens, text):
        """hidden (b n c) -> values (b n)"""
        if self.kind == "separate":
            hidden = self.trunk(tokens, text)[1]
        elif self.kind == "shared-detach":
            hidden = hidden.detach()  # InstructMotion 4.1: the critic must not bend the policy
        return self.value(self.norm(self.block(hidden)))[..., 0]
# [/sync:gpt]


# ---- 4. The rewards ----

# [sync:margin]
def margin_loss(text, motion, negative, margin=10.0):
    """Eq. (1) of InstructMotion and of MotionRL; text, motion (... c), negative (...) -> mean."""
    # d^2 for pairs that belong together, max(0, margin - d)^2 for the others. InstructMotion says
    # that y = 1 marks matched pairs; its formula and the code that it cites say the opposite.
    distance = (text - motion).square().sum(-1).clamp(min=1e-12).sqrt()
    return torch.where(negative, (margin - distance).clamp(min=0), distance).square().mean()


def margin_pairs(text, motion, duplicates):
    """Eq. (1) over a batch (b c), in place of InfoNCE; duplicates (b b) are no negatives."""
    # Not in the papers: embeddings of unit length, all other motions of the batch as negatives
    # and not one, matched and mismatched pairs weighted alike.
    text, motion = F.normalize(text, dim=-1), F.normalize(motion, dim=-1)
    own = torch.eye(len(text), dtype=torch.bool, device=text.device)
    t, m = (~(duplicates | own)).nonzero().T
    matched = margin_loss(text, motion, torch.zeros_like(own[0]), MARGIN)
    return matched + margin_loss(text[t], motion[m], torch.ones_like(t, dtype=torch.bool), MARGIN)
# [/sync:margin]


def ranking_loss(better, worse):
    """Scores (r) of the better and of the worse motions -> mean loss, Eq. (5): Bradley-Terry."""
    return F.softplus(worse - better).mean()  # log(sigmoid(x)) would be infinite below x = -104


def distance_reward(f_a, f_b, lambdas):
    """Eq. (3) of texts, Eq. (4) of real motions: f_a, f_b (i b c), lambdas (i) -> (b)"""
    return -(lambdas[:, None] * (f_a - f_b).square().sum(-1)).sum(0)


def normalise(R, low, high):
    """Eq. (12), whose three branches are one line; R (... k), low and high (k)"""
    return (R - low) / (high - low)  # nothing is clipped


@torch.no_grad()
def all_rewards(encoders, people, scales, motion, lengths, captions, clips):
    """Raw motions (b t d), lengths (b), captions, real clips -> R (b k), as in REWARDS."""
    # encoders: by InfoNCE, Eq. (2), and by a margin, Eq. (1). people.score is Eq. (6).
    # scales: lambdas (i), low and high (k), see calibrate.
    embedded = [retrieval.embed_pairs(encoder, motion, lengths, captions, clips)
                for encoder in encoders]
    f_text, f_motion, f_real = (torch.stack(parts) for parts in zip(*embedded))  # i b c
    R = torch.stack([distance_reward(f_text, f_motion, scales["lambdas"]),
                     distance_reward(f_real, f_motion, scales["lambdas"]),
                     people.score(motion, lengths)], -1)
    return normalise(R, scales["low"], scales["high"])


def calibrate(args, policy, count, encoders, people, clips):
    """Scales of the rewards from motions of pi_ref, a dict; they never change."""
    g = generator(args.base_seed, 0, "calibration")
    captions, chosen = compose.draw(clips, [], count, 0.0, g)
    base = policy._replace(gpt=policy.reference, tokens=None)  # pi_ref reads the plain caption
    made = sample(base, read_text(base, captions), args.base_seed, 0, "calibration",
                  range(count), args.temperature)[:2]
    embedded = (retrieval.embed_pairs(encoder, *made, captions, chosen) for encoder in encoders)
    distances = torch.stack([(text - motion).square().sum(-1) for text, motion, _ in embedded])
    # 1 / lambda: spread of text distances, for Eq. (4) too. Eq. (12): quantiles, not extremes.
    scales = {"lambdas": 1 / distances.std(1).clamp(min=1e-6), "low": 0.0, "high": 1.0}
    R = all_rewards(encoders, people, scales, *made, captions, chosen)
    low, high = (R.quantile(q, dim=0) for q in (0.01, 0.99))
    for name, a, b in zip(REWARDS, low.tolist(), high.tolist()):
        print(f"  reward {name}: {a:.2f} to {b:.2f} for 98 % of pi_ref's motions")
        if not b > a:  # NaN fails too
            raise NonFiniteError(f"reward {name} is {b:.3g} for all {count} motions")
    return scales | {"low": low, "high": high}


# ---- 5. The policy: one token is one action ----

class Policy(NamedTuple):
    """Everything that turns a caption into a motion."""
    vq: tokenizer.VQVAE
    text: object          # captions -> (b d), frozen
    gpt: MotionGPT        # pi_theta, the only one that PPO changes
    reference: MotionGPT  # pi_ref: the supervised GPT, which shares no weight with it
    tokens: torch.Tensor | None = None  # (k d), added to a text feature


def mix(f_t, f_tk, alpha):
    """Eq. (11): the text feature between that without and that with the token."""
    return (1 - alpha) * f_t + alpha * f_tk


@torch.no_grad()
def read_text(policy, captions, weights=None, alpha=0.0):
    """Text features (b d) of captions, mixed with tokens by weights (k) or (b k), if any."""
    f_t = retrieval.once(policy.text, captions)
    f_t = F.pad(f_t, (0, policy.gpt.sizes["text_dim"] - f_t.shape[1]))
    if policy.tokens is None:
        return f_t
    return mix(f_t, f_t + torch.as_tensor(weights).to(f_t) @ policy.tokens, alpha)


def with_tokens(policy, clips):
    """The policy with a token for each reward, an extra dimension of the text feature."""
    # [MRL] appends words to the caption. Here the GPT's weights for the new dimensions start
    # at zero: random ones would change each caption.
    count, text = len(REWARDS), read_text(policy, [clip.captions[0] for clip in clips[:512]])
    for gpt in (policy.gpt, policy.reference):
        first = gpt.trans_base["cond_emb"]
        first.weight = nn.Parameter(F.pad(first.weight, (0, count)), requires_grad=False)
        gpt.sizes["text_dim"] += count
    length = TOKEN_LENGTH * text.square().sum(-1).mean().sqrt()
    return policy._replace(tokens=F.pad(length * torch.eye(count).to(text), (text.shape[1], 0)))


# [sync:policy]
def action_logits(logits, first, shortest, temperature):
    """Raw logits (b n v) of the positions first, first + 1 ... -> those that are sampled."""
    # Rollout, update and reference all come here: a temperature, or the ban of the end before
    # `shortest` tokens, in one of them alone would make every ratio wrong.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    early = torch.arange(first, first + logits.shape[1], device=logits.device) < shortest
    end = torch.arange(logits.shape[2], device=logits.device) == logits.shape[2] - 1
    return logits.masked_fill(early[:, None] & end, -math.inf)


@torch.no_grad()
def rollout(gpt, text, uniform, shortest, temperature):
    """A sequence for each text feature (b d) -> tokens (b n) with end and padding, counts (b)."""
    # uniform (b n) are the draws, one a token: a row does not depend on the other rows.
    cache, tokens = {}, torch.full(uniform.shape, gpt.pad, device=text.device)
    running = torch.ones(len(text), dtype=torch.bool, device=text.device)
    for t in range(uniform.shape[1]):  # the token limit
        logits = action_logits(gpt(tokens[:, :t], text, cache)[0], t, shortest, temperature)
        token = pick(logits[:, 0], uniform[:, t])
        tokens[:, t] = torch.where(running, token, gpt.pad)
        running = running & (token != gpt.end)
        if not running.any():
            break
    return tokens, (tokens < gpt.end).sum(1)


def score_actions(gpt, critic, tokens, text, shortest, temperature, grad=True):
    """tokens (b n), text (b d) -> their logp (b n), logps of all actions (b n v), values (b n)."""
    # One pass over the whole sequence, for the new, the old and the reference policy, which has
    # no critic. grad: whether the GPT learns.
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        logits, hidden = gpt(tokens[:, :-1], text)
    values = None if critic is None else critic(hidden, tokens[:, :-1], text)
    logps = action_logits(logits, 0, shortest, temperature).log_softmax(-1)
    logps = logps.clamp(min=-1e9)  # probability 0 times -inf would be NaN
    # After the end token, where tokens are padding, the values are meaningless.
    actions = tokens.clamp(max=logits.shape[-1] - 1)[..., None]
    return logps.gather(-1, actions)[..., 0], logps, values


def sample(policy, text, seed, iteration, purpose, numbers, temperature):
    """A motion for each text feature (b d) -> raw motion (b t d), lengths (b), tokens (b n)."""
    # Each sample has its own random numbers: it does not depend on its batch or process.
    uniform = uniforms(policy.gpt.block_size - 1, seed, iteration, purpose, numbers)
    tokens, counts = rollout(policy.gpt, text, uniform.to(text.device), policy.vq.shortest,
                             temperature)
    return *policy.vq.decode(tokens, counts), tokens
# [/sync:policy]


# ---- 6. Selection, advantage, loss, update ----

def nondominated(R):
    """Which motions no other one beats: finite R (... n k), larger is better -> mask (... n)."""
    # a beats b if it is as good in every reward and better in one; equal motions both stay.
    mine, other = R[..., :, None, :], R[..., None, :, :]  # ... n 1 k, ... 1 n k
    return ~((other >= mine).all(-1) & (other > mine).any(-1)).any(-1)


def own_reward(R):
    """The reward that the token of a motion asks for: R (p c n k) with k = c -> (p c n)"""
    return rearrange(torch.diagonal(R, dim1=1, dim2=3), "p n c -> p c n")


def select(R, selection):
    """Algorithm 1: R (p c n k) -> keep (learnt from?), and weight 1 / n(P), both (p c n)."""
    keep = torch.ones_like(R[..., 0], dtype=torch.bool)
    if selection == "union":        # all motions of a prompt compete
        keep = nondominated(rearrange(R, "p c n k -> p (c n) k"))
        keep = rearrange(keep, "p (c n) -> p c n", c=R.shape[1])
    elif selection == "literal":    # as printed: i-th motions of all tokens
        keep = nondominated(rearrange(own_reward(R), "p c n -> p n c"))
        keep = repeat(keep, "p n -> p c n", c=R.shape[1])
    elif selection == "per-token":  # those of a prompt and token ([MRL] section 4.2)
        keep = nondominated(R)
    dims = (1, 2) if selection == "union" else (2,)  # the axes of a set P
    return keep, keep / keep.sum(dims, keepdim=True)


def token_weights(weight, mask, reduction):
    """The weight of a motion (b), split over its actions or given to each -> (b n)"""
    return (weight / mask.sum(1) if reduction == "motion" else weight)[:, None] * mask


def standardise(r, counted):
    """r (p c n) -> mean 0 and spread 1 in a prompt and token, over the motions counted (p c n)."""
    # Not in the paper: an easy prompt must not make its motions look good, and our critic is too
    # weak to subtract it.
    r = r - r[..., :1]  # equal rewards are exactly 0, where a mean would round
    count = counted.sum(2, keepdim=True).clamp(min=1)
    centred = r - (r * counted).sum(2, keepdim=True) / count
    spread = ((centred.square() * counted).sum(2, keepdim=True) / count).sqrt()
    overall = ((centred.square() * counted).sum() / counted.sum()).sqrt()
    return centred / (spread + 0.05 * overall + 1e-8)  # for sets of equal motions


def choose(args, R, sets, weights):
    """R (p*c*n k) -> r, weight (p*c*n), numbers of those counted, of those beaten, log."""
    R = rearrange(R, "(p c n) k -> p c n k", p=args.prompts, c=sets)
    (keep, weight), flat = select(R, args.selection), R.flatten(0, 2)
    # Eq. (7): what a motion is paid for, (p c n).
    own = own_reward(R) if args.token_reward == "own" and sets > 1 else R.mean(-1)
    if args.selection == "weighted-sum":
        own = R @ weights
    # Beaten motions are not imitated, but count in the mean that others exceed.
    counted = keep if args.baseline == "kept" else torch.ones_like(keep)
    lists = (part.flatten().nonzero()[:, 0].tolist() for part in (counted, ~keep))
    return standardise(own, counted).flatten(), weight.flatten(), *lists, {
        "reward": (flat @ weights).mean(), **dict(zip(REWARDS, flat.mean(0))), "own": own.mean(),
        "kept": keep.double().mean(), "text_quality": torch.corrcoef(flat[:, :2].T)[0, 1],
        "constant": (R.amax(2) == R.amin(2)).sum()}  # rewards equal in a whole set


# [sync:ppo]
def token_rewards(r, logp_old, logp_ref, mask, kl_coef):
    """InstructMotion Eq. (3): the reward of every token (b n), with r (b) at the last action."""
    # A single value may be negative, only its mean is a KL. It is a reward: no gradient flows.
    rewards = -kl_coef * (logp_old - logp_ref) * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, r[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma, gae_lambda):
    """Schulman et al. 2016, eq. 16; all (b n) -> advantages, returns, zero outside the mask."""
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    # No bootstrap after the last action, nor at the token limit, which is part of the task.
    following = F.pad(values * mask, (0, 1))[:, 1:]
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following[:, t] - values[:, t]
        last = (delta + gamma * gae_lambda * last) * mask[:, t]
        advantages[:, t] = last
    return advantages, (advantages + values) * mask


def whiten(advantages, mask):
    """Mean 0 and variance 1 over the actions in mask; never of the returns."""
    valid = training.all_gather_rows(advantages[mask])  # of all processes
    white = (advantages - valid.mean()) / torch.sqrt(valid.var(correction=0) + 1e-8)
    return torch.where(mask, white, 0.0)  # also if the mask is empty


def clipped_loss(ratio, advantages, clip_range):
    """InstructMotion Eq. (4) as a loss, per token: the pessimistic one of two (PPO eq. 7)."""
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(unclipped, clipped)


def value_loss(values, returns):
    """InstructMotion Eq. (5) per token, with the usual 1/2."""
    return 0.5 * (values - returns).square()


@torch.no_grad()
def assess(args, policy, critic, batch, groups, epochs):
    """Add log-probabilities, values and advantages of all actions to the batch -> log."""
    tokens, text, mask = batch["tokens"], batch["text"], batch["mask"]
    old, ref, values, entropy, kl = (torch.zeros_like(mask, dtype=text.dtype) for _ in range(5))
    # In the very chunks of the first update, so that its ratios are 1 to the last bit.
    for rows in (rows for _, chunks in epochs[0] for rows in chunks):
        asked = tokens[rows], text[rows], policy.vq.shortest, args.temperature
        old[rows], logps, values[rows] = score_actions(policy.gpt, critic, *asked)
        ref[rows], logps_ref, _ = score_actions(policy.reference, None, *asked)
        entropy[rows] = -(logps.exp() * logps).sum(-1)
        kl[rows] = (logps.exp() * (logps - logps_ref)).sum(-1)  # exact, over all actions
    rewards = token_rewards(batch["r"], old, ref, mask, args.kl_coef)
    advantages, returns = gae(rewards, values, mask, GAMMA, args.gae_lambda)
    # groups: masks (b) of motions that are whitened together; each motion is in one.
    white = sum(whiten(advantages, mask & own[:, None]) for own in groups)
    batch |= dict(logp_old=old, logp_ref=ref, values=values, returns=returns, advantages=white)
    log = training.token_stats(tokens, mask, batch["lengths"], policy.gpt.end, kl, entropy)
    return log | {"explained_variance": training.explained_variance(values, returns, mask)}


def update(args, policy, critic, batch, epochs, optimizer, iteration, loop):
    """Stage 3: clipped loss of the policy, squared loss of the critic -> numbers to log."""
    actor, valuer = (group["params"] for group in optimizer.param_groups)
    log = training.Sums("pg_loss", "vf_loss", "approx_kl", "clipfrac", "grad_norm", "vf_grad_norm")
    parts = "tokens", "text", "mask", "weight", "logp_old", "returns", "advantages"
    steps, ratios = [step for epoch in epochs for step in epoch], []
    for _, chunks in steps:
        optimizer.zero_grad()
        # Both losses are means over a minibatch, over all its chunks on all processes.
        actions, shares = (training.total(batch[name][rows] for rows in chunks)
                           for name in ("mask", "weight"))
        for rows in chunks:
            loop.check()                     # Ctrl-C ends here
            part = [batch[name][rows] for name in parts]
            tokens, text, mask, share, logp_old, returns, advantages = part
            # A chunk of motions without weight trains only the critic.
            learns = args.critic == "shared" or bool(share.any())
            logp, _, values = score_actions(policy.gpt, critic, tokens, text, policy.vq.shortest,
                                            args.temperature, learns)
            logratio = torch.where(mask, logp - logp_old, 0.0)
            ratio = logratio.exp()           # b n
            pg = clipped_loss(ratio, advantages, args.clip_range)
            pg = (pg * share).sum() / (shares or 1.0)  # perhaps no motion has a weight
            vf = (value_loss(values, returns) * mask).sum() / actions
            loss = pg + VF_COEF * vf
            training.check_loss(loss, f"iteration {iteration}")
            loss.backward()
            ratios.append(ratio.detach()[mask])
            # approx_kl estimates KL(old || new) (Schulman 2020), clipfrac counts clipped tokens.
            gap, clipped = (ratio - 1) - logratio, (ratio - 1).abs() > args.clip_range
            log.add(pg_loss=pg, vf_loss=vf, approx_kl=(gap * mask).sum().item() / actions,
                    clipfrac=(clipped & mask).sum().item() / actions)
        training.all_reduce_grads([*actor, *valuer])
        # Clipped apart: large gradients of the critic must not shrink those of the policy.
        for name, parameters in (("grad_norm", actor), ("vf_grad_norm", valuer)):
            norm = training.clip_gradients(parameters, MAX_GRAD_NORM, f"iteration {iteration}")
            log.add(**{name: norm})
        optimizer.step()
    return training.reduce_log(log.mean(len(steps)) | training.ratio_stats(ratios))
# [/sync:ppo]


# ---- 7. Training: roll out, score, update ----

@torch.no_grad()
def collect(args, policy, clips, iteration):
    """Stage 1: N motions for each of P prompts and K tokens; without tokens KN for a prompt."""
    g, sets = generator(args.seed, iteration, "prompts"), 1 if policy.tokens is None else 3
    drawn, size = compose.draw(clips, [], args.prompts, 0.0, g), len(REWARDS) * args.samples
    # Of several processes each samples its own share of whole prompts.
    numbers = runs.share(args.prompts, size, policy.vq.mean.device)
    captions, pairs = ([part[k // size] for k in numbers] for part in drawn)
    # Place k of a rollout is ordered (p c n): which token is it?
    token = torch.tensor(numbers, device=policy.vq.mean.device) // (size // sets) % sets
    text = read_text(policy, captions, F.one_hot(token, len(REWARDS)), args.alpha)
    motion, lengths, tokens = sample(policy, text, args.seed, iteration, "rollout", numbers,
                                     args.temperature)
    mask = F.pad(tokens[:, :-1] < policy.gpt.end, (1, 0), value=True)  # codes and the end
    return dict(captions=captions, clips=pairs, numbers=numbers, motion=motion, lengths=lengths,
                tokens=tokens, text=text, token=token, mask=mask)


def score(rewards, batch, iteration):
    """Stage 2: ask the rewards -> R (P*C*N k) of all processes."""
    R = rewards(batch["motion"], batch["lengths"], batch["captions"], batch["clips"])
    for name, r in zip(REWARDS, R.T):
        training.check_rewards(r, batch["captions"], f"iteration {iteration}: reward {name}")
    return training.all_gather_rows(R)


LOOKS = ("reward", "judge", "oracle", "jerk", "speed")  # at val prompts, as val_reward ...
FIELDS = ("iteration", "reward", *REWARDS, "own", "kept", "text_quality", "constant",
          *training.PPO_FIELDS, *(f"val_{name}" for name in LOOKS))
CURVES = (REWARDS, "val_reward", "val_judge", "val_oracle", "kl_ref", "val_jerk")


def train(start, policy, rewards, weights, data, scorers, folder):
    """The loop. Tokenizer, text encoder, tokens and reference never change."""
    args, watch, sets = start.args, start.watch, 1 if policy.tokens is None else 3
    evaluate.check_names(LOOKS, data.splits["val"], scorers)
    critic = Critic(policy.gpt, args.critic, generator(args.seed, 0, "critic")).to(start.device)
    networks = nn.ModuleDict({"gpt": policy.gpt.requires_grad_(True), "critic": critic})
    parts = [{"params": list(part.parameters())} for part in networks.values()]
    optimizer = torch.optim.AdamW(parts, lr=CRITIC_LR, betas=(0.9, 0.99), weight_decay=1e-6)
    same = {"starts from": runs.fingerprint(policy.reference.state_dict())}
    with runs.Loop("pareto", start, folder, FIELDS, same, networks) as loop:
        if loop.state:  # --resume
            networks.load_state_dict(loop.state["networks"])
            optimizer.load_state_dict(loop.state["optimizer"])
        for iteration in loop:
            # 1. Roll out.
            batch = collect(args, policy, data.splits["train"], iteration)
            watch.lap("rollout")
            loop.check()
            # 2. Score, and select the motions of each prompt and token that no other one beats.
            R = loop.rewards = score(rewards, batch, iteration)
            r, weight, counted, dominated, log = choose(args, R, sets, weights)
            weight = token_weights(weight[batch["numbers"]], batch["mask"], args.reduction)
            batch |= {"r": r[batch["numbers"]], "weight": weight}
            watch.lap("reward")
            # 3. Update. Beaten motions train the critic alone.
            batch = training.select_rows(batch, counted)
            epochs = training.epochs(args, counted, batch["numbers"], iteration, dominated)
            factor = training.rise_and_fall(iteration, args.iterations, WARMUP)
            optimizer.param_groups[0]["lr"] = factor * args.lr  # of the GPT
            # Whitened apart for each reward token: their advantages differ in spread.
            groups = [batch["token"] == token for token in range(sets)]
            log |= assess(args, policy, critic, batch, groups, epochs)
            log |= update(args, policy, critic, batch, epochs, optimizer, iteration, loop)
            watch.lap("update")
            # 4. Log, now and then look at validation prompts, save.
            if (iteration + 1) % args.eval_every == 0:
                sampler = policy_sampler(args, policy)
                log |= evaluate.look(LOOKS, data.splits["val"], scorers, sampler)
                watch.lap("validation")
            loop.end(log, (*REWARDS, "kl_ref", "val_judge", "val_oracle"), {
                "networks": networks.state_dict(), "optimizer": optimizer.state_dict()})


# ---- 8. The run ----

# [sync:make_policy]
def make_policy(args, data, size, options):
    """Tokenizer, text features and supervised GPT, published or trained -> Policy, notes."""
    parts = CausalAttention, Block, MotionGPT  # change one: a new GPT is trained
    vq, text, gpt, notes = t2m_gpt.fit_or_load(args, MotionGPT, parts, data, size, **options)
    return Policy(vq, text, gpt, copy.deepcopy(gpt)), notes
# [/sync:make_policy]


def load_policy(args, stored, device):
    """The policy of a finished run, frozen; policy.pt holds all networks and tokens."""
    return Policy(**t2m_gpt.load_networks(MotionGPT, stored, args.text_features, device))


def policy_sampler(args, policy, weights=(1 / 3, 1 / 3, 1 / 3)):
    """The sampler that common/evaluate.py calls; always the same draws."""
    def motions(captions, lengths, numbers, purpose, repeat):
        text = read_text(policy, captions, weights, args.alpha)
        return sample(policy, text, args.seed, repeat, purpose, numbers, 1.0)[:2]
    return evaluate.in_chunks(motions)


def final_tables(args, policy, scorers, data, before, after):
    """Paired val and test; on test also the plain caption, and each token alone."""
    tables = {}
    for name in ("val", "test"):
        clips = data.splits[name][:300]
        rows = {"base": before, "tuned": after, "vq": tokenizer.reconstruction(policy.vq, clips)}
        if name == "test" and policy.tokens is not None:
            rows["plain"] = policy_sampler(args, policy._replace(tokens=None))
            for k, one in enumerate(torch.eye(len(REWARDS))):
                rows[f"token {REWARDS[k]}"] = policy_sampler(args, policy, one)
        title, repeats = f"paired_{name}", args.eval_repeats
        tables[title] = evaluate.compare(title, clips, scorers, rows, repeats=repeats, purpose=name)
    return tables


def write_motions(args, stored, folder, device):
    """--prompt: GIF, joints and BVH of every caption, from policy.pt alone."""
    policy = load_policy(args, stored, device)
    base = policy._replace(gpt=policy.reference, tokens=None)
    weights = runs.parse_weights(args.prefer, REWARDS, "--prefer")
    motions = {"before": policy_sampler(args, base), "after": policy_sampler(args, policy, weights)}
    skeleton = features.SKELETONS[len(policy.vq.mean)]
    evaluate.export(folder, args.prompt, stored, 0, skeleton, motions, args.compare)


def main(argv):
    """Prepare, train, report; or use what a finished run has left (--load)."""
    start = runs.prepare(Args, SIZE_ARGS, argv, __doc__, "pareto", "pareto-policy", check_args)
    args, stored, device, watch = start.args, start.stored, start.device, start.watch
    if args.prompt:
        return write_motions(args, stored, start.open_folder(), device)
    size, notes, options = tokenizer.SIZES[args.size], {}, start.training()
    data = datasets.load_dataset(args.dataset, space="native", clips=size.clips, **start.data())
    folder = start.open_folder()
    start.announce(data=data)

    if stored:
        policy = load_policy(args, stored, device)
    else:
        policy, notes["policy"] = make_policy(args, data, size, options)
        if args.selection != "weighted-sum":
            policy = with_tokens(policy, data.splits["train"])
    watch.lap("supervised model")

    # The judge shares no clip with what is optimised, and is never optimised.
    scoring = dict(options, iterations=size.scorer_iterations)
    nce, notes["reward"] = retrieval.reward_model([data], **scoring)
    margin, notes["reward 2"] = retrieval.reward_model(
        [data], name="reward 2", loss=margin_pairs, loss_parts=[margin_loss],
        loss_name=f"margin {MARGIN}", **scoring)
    judge, notes["judge"] = retrieval.judge([data], **scoring)
    options["iterations"], encoders = size.perception_iterations, [nce, margin]
    people, notes["perception"] = perception.fit_perception(
        data, policy.vq, ranking_loss, args.perception_checkpoint, **options)
    scales = stored["rewards"] if stored else calibrate(
        args, policy, size.calibration, encoders, people, data.splits["train"])
    scales = {name: value.to(device) for name, value in scales.items()}
    rewards = partial(all_rewards, encoders, people, scales)
    weights = torch.tensor(runs.parse_weights(args.weights, REWARDS, "--weights"), device=device)
    scorers = evaluate.Scorers(
        lambda *asked: rewards(*asked) @ weights, judge, data.skeleton,
        lambda *asked: dict(zip(REWARDS, rewards(*asked).T)), paired=True)
    watch.lap("rewards and judge")

    about = start.about(folder, notes, data, data, rewards=scales)
    if not stored:
        train(start, policy, rewards, weights, data, scorers, folder)
        if start.rank:
            return  # the first process evaluates
        start.save_product(folder, t2m_gpt.networks(policy) | {"rewards": scales})

    before = policy_sampler(args, policy._replace(gpt=policy.reference, tokens=None))
    after = policy_sampler(args, policy)
    tables = final_tables(args, policy, scorers, data, before, after)
    evaluate.end_run(start, folder, about, tables, data.splits["test"], scorers, before, after,
                     CURVES)


if __name__ == "__main__":
    runs.run_main(main)
