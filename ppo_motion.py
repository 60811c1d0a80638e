"""PPO on motion tokens: a VQ-VAE makes motions a language, and a GPT learns to speak it better.

The idea. A GPT that has learnt motion tokens from captioned motions repeats what it has seen; new
combinations of known movements are hardly ever right. For a new sentence no motion exists to
learn from, but encoders of text and motion can say how well the two fit. So the GPT samples
motions for known captions and for new combinations of them ("composed"), and PPO makes the tokens
of well-fitting motions more likely.

Papers
  [IM]   InstructMotion, Mao et al. 2024, arXiv 2405.15541: this method, Eq. (1) to (5)
  [PPO]  Schulman et al. 2017, arXiv 1707.06347; [GAE] Schulman et al. 2016, arXiv 1506.02438
  [T2M]  T2M-GPT, Zhang et al. 2023, arXiv 2301.06052: tokenizer and GPT

The decision process ([IM] section 4): one motion is one episode
  in the code           symbol                meaning
  text, tokens[:, :t]   s_t                   state: the caption and the tokens so far
  tokens[:, t]          a_t                   action: a code 0 .. K-1, or the end K; K+1 pads
  mask (b n)                                  True for codes and the end, which is an action too
  logp, logp_old        log pi_theta, pi_old  of the action, at the temperature of the rollout
  logp_ref              log pi_ref            of the supervised GPT, which never changes
  ratio                 rho_t                 pi_theta / pi_old, clipped to 1 +- eps
  r (b)                 Eq. (2)               how well the finished motion fits
  rewards (b n)         Eq. (3)               -beta (logp_old - logp_ref); at the end also r
  values, advantages    V(s_t), A_t           of a small critic; GAE, whitened over the batch

Read sections 5 and 6 first, then 7: policy, update, loop.
  python ppo_motion.py --dataset kit              # from nothing to a tuned model
  python ppo_motion.py --dataset kit --tiny       # the same at toy size
  python ppo_motion.py --prompt "a person waves" --load runs/ppo_kit_seed0/policy.pt
  python ppo_motion.py --write-captions new.txt   # the composed captions, to be read
"""

# ---- 1. Imports ----

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import (compose, datasets, evaluate, features, generator, pick, retrieval, runs,
                    sinusoid, tokenizer, training, uniforms)
from common.published import t2m_gpt
from common.runs import arg

# ---- 2. Arguments ----

@dataclass
class Args(t2m_gpt.WeightArgs):
    """Every field, own or inherited, is a flag. shaping: see common/runs.py."""
    composed: int = arg(3000, "sentences made of known captions", group="prompts")
    text_only_share: float = arg(0.5, "share of composed prompts in a rollout ([IM]: 0 or 1/2)")
    write_captions: str = arg("", "write them to this file and stop", shaping=False)
    reward: str = arg("encoders", "shuffled and random are controls: they must teach nothing",
                      choices=("encoders", "shuffled", "random"), group="reward")
    reward_loss: str = arg("infonce", "what the encoders learn from; margin: Eq. (1)",
                           choices=("margin", "infonce"))
    lambda_t: float = arg(0.4, "weight of the distance to the text ([IM]: 0.4)")
    lambda_m: float = arg(2.0, "weight of the distance to the paired motion ([IM]: 2.0)")
    iterations: int = arg(300, "of PPO ([IM]: 40000)", group="update")
    prompts: int = arg(32, "prompts P of a rollout ([IM]: 128)")
    samples: int = arg(16, "motions G of each prompt, which compete ([IM]: 1)")
    kept_samples: int = arg(128, "best and worst motions trained on; 0, samples 1: all", lowest=0)
    epochs: int = arg(2, "passes over a rollout ([IM]: 2)")
    minibatches: int = arg(1, "optimizer steps of a pass ([IM]: 1)")
    micro_batch: int = arg(0, "motions of a forward pass; 0: a minibatch. Fewer save memory")
    lr: float = arg(1.5e-4, "highest learning rate of the policy ([IM]: 5e-6)")
    critic: str = arg("shared-detach", "reads the policy's features, detached or not; or a copy",
                      choices=("shared-detach", "shared", "separate"))
    kl_coef: float = arg(0.05, "beta, weight of the KL to the supervised GPT ([IM]: unknown)")
    clip_range: float = arg(0.2, "eps of the ratio ([IM]: unknown)")
    gae_lambda: float = arg(1.0, "lambda of GAE; 1: no value is bootstrapped ([IM]: unknown)")
    temperature: float = arg(1.0, lowest=0.01, text="of sampling, and of every log-probability")
    eval_every: int = arg(50, "iterations between looks at val prompts", group="evaluation")
    best_of: int = arg(8, "reference row: the best of so many base samples", shaping=False)


SIZE_ARGS = {  # what --size sets here; the sizes of networks are in common/tokenizer.py
    "tiny": dict(composed=300, iterations=3, prompts=16, eval_every=2, eval_repeats=2, best_of=2),
    "paper": dict(iterations=40_000, prompts=128, samples=1, lr=5e-6, eval_repeats=20)}
MARGIN = 1.4  # of Eq. (1): unit vectors are at most 2 apart ([IM]: unknown)
WARMUP, CRITIC_LR = 20, 1e-3  # iterations in which the GPT's rate rises; the critic's rate
GAMMA, VF_COEF, MAX_GRAD_NORM = 1.0, 0.5, 1.0  # no discount; weight of the value loss; clipping


def check_args(args):
    """Refuse at once what cannot work, and say which flag to change."""
    motions = args.prompts * args.samples
    kept = args.kept_samples if args.kept_samples and args.samples > 1 else motions
    paired = args.prompts - round(args.prompts * args.text_only_share)
    t2m_gpt.check_weights(args)
    runs.refuse(
        (args.prompts < 2 * runs.process_count(), "--prompts: at least two for each process"),
        (kept > motions, f"--kept-samples: at most prompts x samples, {motions}"),
        (kept % args.minibatches, f"--minibatches: must divide the {kept} motions trained on"),
        (args.text_only_share > 1, "--text-only-share: 0 to 1"),
        (not args.lambda_t and not (args.lambda_m and paired), "--lambda-t: above 0"),
        (args.reward == "shuffled" and paired == 1, "--prompts: two paired ones, or none"))


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


# ---- 4. The reward ----

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


def reward_terms(f_text, f_motion, f_paired):
    """Squared distances of Eq. (2), to the text (b) and to the paired motion (b); all (b c)."""
    return (f_text - f_motion).square().sum(-1), (f_paired - f_motion).square().sum(-1)


def motion_reward(text_distance, motion_distance, paired, lambda_t, lambda_m):
    """[IM] Eq. (2), r <= 0. All (b), paired bool -> reward (b), pseudo score."""
    motion_term = -lambda_m * motion_distance
    # A caption without a motion gets the mean motion term of the others, the pseudo score: it
    # must not be better off than they are.
    pseudo = motion_term[paired].mean() if paired.any() else motion_term.new_zeros(())
    return -lambda_t * text_distance + torch.where(paired, motion_term, pseudo), pseudo


@torch.no_grad()
def distances(encoders, motion, lengths, captions, clips):
    """Raw motions (b t d), lengths (b), captions and clips of b -> (b 3): squared distances to
    the text and to the paired motion, and 1 if there is a paired motion, else 0."""
    # The clip of a composed caption has no frames: its motion distance is 0.
    unit = retrieval.embed_pairs(encoders, motion, lengths, captions, clips)
    paired = torch.tensor([float(len(clip.features) > 0) for clip in clips], device=motion.device)
    return torch.stack([*reward_terms(*unit), paired], -1)


def build_reward(args, data, given, **options):
    """-> the reward (b) of tables, what training measures (b 3), notes. Both are functions of
    (motion, lengths, captions, clips). Eq. (2) takes a mean over a batch, so training does it."""
    if given:  # a function of a study, see main()
        def other(motion, lengths, captions, clips):
            return given(motion, lengths, captions)
        return other, other, {}
    if args.reward_loss == "margin":
        options |= dict(loss=margin_pairs, loss_parts=[margin_loss], loss_name=f"margin {MARGIN}")
    encoders, notes = retrieval.reward_model([data], **options)
    measure = partial(distances, encoders)

    def reward(*question):
        # All captions of a table have a motion, or none has: then r is the text term alone.
        text, motion, paired = measure(*question).T
        return motion_reward(text, motion, paired > 0, args.lambda_t, args.lambda_m)[0]
    return reward, measure, notes


# ---- 5. The policy: one token is one action ----

class Policy(NamedTuple):
    """Everything that turns a caption into a motion."""
    vq: tokenizer.VQVAE
    text: object          # captions -> (b d), frozen
    gpt: MotionGPT        # pi_theta, the only one that PPO changes
    reference: MotionGPT  # pi_ref: the supervised GPT, which shares no weight with it


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


# ---- 6. Advantage, loss, update ----

def standardise(groups):
    """The rewards (p g) of G motions for each of P prompts -> mean 0 and spread 1 in a prompt."""
    # Not in the paper, which has one motion a prompt and the critic alone: an easy prompt must
    # not make its motions look good. 0.05 keeps groups of almost equal motions near zero.
    groups = groups - groups[:, :1]  # equal rewards are exactly 0, where a mean would round
    centred = groups - groups.mean(1, keepdim=True)
    return centred / (groups.std(1, keepdim=True) + 0.05 * centred.std() + 1e-8)


# [sync:strongest]
def strongest(advantages, count):
    """Indices of the `count` samples with the largest |advantage|, in order; 0: of all."""
    # Not in [NM]: to sample a motion costs a quarter of its update, and samples near
    # their group's mean teach little (Xu et al. 2025, arXiv 2504.13818).
    order = advantages.abs().argsort(descending=True, stable=True)
    return order[:count or len(order)].sort().values.tolist()
# [/sync:strongest]


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
def collect(args, policy, clips, composed, iteration):
    """Stage 1: G motions for each of P prompts -> what the next stages need of them."""
    g = generator(args.seed, iteration, "prompts")
    drawn = compose.draw(clips, composed, args.prompts, args.text_only_share, g,
                         shuffled=args.reward == "shuffled")
    # Of several processes each samples its own share of whole groups.
    numbers = runs.share(args.prompts, args.samples, policy.vq.mean.device)
    captions, pairs = ([part[k // args.samples] for k in numbers] for part in drawn)
    text = retrieval.once(policy.text, captions)
    motion, lengths, tokens = sample(policy, text, args.seed, iteration, "rollout", numbers,
                                     args.temperature)
    mask = F.pad(tokens[:, :-1] < policy.gpt.end, (1, 0), value=True)  # codes and the end
    return dict(captions=captions, clips=pairs, numbers=numbers, motion=motion, lengths=lengths,
                tokens=tokens, text=text, mask=mask, weight=mask.float())


def score(args, measure, batch, iteration):
    """Stage 2: ask the reward, or the control in its place -> r (P*G) of all processes, log."""
    r = measure(batch["motion"], batch["lengths"], batch["captions"], batch["clips"],
              iteration=iteration, numbers=batch["numbers"])
    r, log = training.all_gather_rows(r), {}
    if r.ndim == 2:  # distances of Eq. (2); the pseudo score is a mean over the whole batch
        text, motion, paired = r.T
        r, pseudo = motion_reward(text, motion, paired > 0, args.lambda_t, args.lambda_m)
        term = -args.lambda_t * text.mean()
        log = {"text_term": term, "motion_term": r.mean() - term, "pseudo_score": pseudo}
    training.check_rewards(r[batch["numbers"]], batch["captions"], f"iteration {iteration}: reward")
    return r, log


LOOKS = ("reward", "judge", "oracle", "foot_skate", "jerk")  # at val prompts, as val_reward ...
FIELDS = ("iteration", "reward", "text_term", "motion_term", "pseudo_score",
          *training.PPO_FIELDS, *(f"val_{name}" for name in LOOKS))
CURVES = ("reward", "val_reward", "val_judge", "val_oracle", "kl_ref", "val_jerk")


def train(start, policy, measure, data, composed, scorers, folder):
    """The loop. Tokenizer, text encoder and reference never change."""
    args, watch = start.args, start.watch
    sources = data.splits["train"], composed["composed_train"]  # of the prompts
    evaluate.check_names(LOOKS, data.splits["val"], scorers)
    critic = Critic(policy.gpt, args.critic, generator(args.seed, 0, "critic")).to(start.device)
    networks = nn.ModuleDict({"gpt": policy.gpt.requires_grad_(True), "critic": critic})
    parts = [{"params": list(part.parameters())} for part in networks.values()]
    optimizer = torch.optim.AdamW(parts, lr=CRITIC_LR, betas=(0.9, 0.99), weight_decay=1e-6)
    same = {"starts from": runs.fingerprint(policy.reference.state_dict())}
    with runs.Loop("ppo", start, folder, FIELDS, same, networks) as loop:
        if loop.state:  # --resume
            scale = loop.state["scale"]
            networks.load_state_dict(loop.state["networks"])
            optimizer.load_state_dict(loop.state["optimizer"])
        else:
            # The unit of r is its spread under the supervised GPT; with several samples a
            # prompt standardise sets it again.
            r, _ = score(args, measure, collect(args, policy, *sources, -1), -1)
            scale = 1 / max(r.std().item(), 1e-6)
        for iteration in loop:
            # 1. Roll out.
            batch = collect(args, policy, *sources, iteration)
            watch.lap("rollout")
            loop.check()
            # 2. Score, compare each motion with those of its prompt, keep the best and worst.
            r, log = score(args, measure, batch, iteration)
            loop.rewards, merit, kept = r, scale * r, list(range(len(r)))
            if args.samples > 1:
                merit = standardise(rearrange(merit, "(p g) -> p g", g=args.samples)).flatten()
                kept = strongest(merit, args.kept_samples)
            watch.lap("reward")
            # 3. Update on the kept motions; all numbers but the reward are logged of them.
            batch["r"] = merit[batch["numbers"]].to(start.device)
            batch = training.select_rows(batch, kept)
            epochs = training.epochs(args, kept, batch["numbers"], iteration)
            factor = training.rise_and_fall(iteration, args.iterations, WARMUP)
            optimizer.param_groups[0]["lr"] = factor * args.lr  # of the GPT, not the critic
            everyone = torch.ones_like(batch["r"], dtype=torch.bool)
            log |= assess(args, policy, critic, batch, [everyone], epochs)
            log |= update(args, policy, critic, batch, epochs, optimizer, iteration, loop)
            watch.lap("update")
            # 4. Log, now and then look at composed val captions (text term only), save.
            log["reward"] = r.mean()
            if (iteration + 1) % args.eval_every == 0:
                sampler = policy_sampler(args, policy)
                log |= evaluate.look(LOOKS, composed["composed_val"], scorers, sampler)
                watch.lap("validation")
            loop.end(log, ("reward", "kl_ref", "val_judge", "val_oracle"), {
                "scale": scale, "networks": networks.state_dict(),
                "optimizer": optimizer.state_dict()})


# ---- 8. The run ----

# [sync:make_policy]
def make_policy(args, data, size, options):
    """Tokenizer, text features and supervised GPT, published or trained -> Policy, notes."""
    parts = CausalAttention, Block, MotionGPT  # change one: a new GPT is trained
    vq, text, gpt, notes = t2m_gpt.fit_or_load(args, MotionGPT, parts, data, size, **options)
    return Policy(vq, text, gpt, copy.deepcopy(gpt)), notes
# [/sync:make_policy]


def load_policy(args, stored, device):
    """The policy of a finished run, frozen; its policy.pt holds all networks."""
    return Policy(**t2m_gpt.load_networks(MotionGPT, stored, args.text_features, device))


def policy_sampler(args, policy):
    """The sampler that common/evaluate.py calls; the GPT chooses the lengths. Sample k always
    uses the same draws: base and tuned are compared in pairs."""
    def motions(captions, lengths, numbers, purpose, repeat):
        text = retrieval.once(policy.text, captions)
        return sample(policy, text, args.seed, repeat, purpose, numbers, args.temperature)[:2]
    return evaluate.in_chunks(motions)


def final_tables(args, policy, scorers, data, composed, before, after):
    """Paired val and test, then captions without a motion: seen by PPO, and held back."""
    tables = {}
    paired = {"paired_val": data.splits["val"], "paired_test": data.splits["test"]}
    for name, clips in (paired | composed).items():
        clips, rows = clips[:300], {"base": before, "tuned": after}
        if name in paired:
            rows["vq"] = tokenizer.reconstruction(policy.vq, clips)  # what the codes alone lose
        if name.endswith("test"):
            best = evaluate.best_of(before, args.best_of, scorers, clips)
            rows[f"best of {args.best_of}"] = best
        tables[name] = evaluate.compare(name, clips, scorers, rows, repeats=args.eval_repeats,
                                        real=data.splits["test"])
    return tables


def write_motions(args, stored, folder, device):
    """--prompt: GIF, joints and BVH of every caption, from policy.pt alone."""
    policy = load_policy(args, stored, device)
    base = policy._replace(gpt=policy.reference)
    motions = {"before": policy_sampler(args, base), "after": policy_sampler(args, policy)}
    skeleton = features.SKELETONS[len(policy.vq.mean)]
    evaluate.export(folder, args.prompt, stored, 0, skeleton, motions, args.compare)


def main(argv, reward=None):
    """Prepare, train, report; or use what a finished run has left (--load). A study hands in a
    function reward(motion, lengths, captions) -> (b), which takes the place of Eq. (2)."""
    start = runs.prepare(Args, SIZE_ARGS, argv, __doc__, "ppo", "ppo-policy", check_args)
    args, stored, device, watch = start.args, start.stored, start.device, start.watch
    if args.prompt:
        return write_motions(args, stored, start.open_folder(), device)
    size = tokenizer.SIZES[args.size]
    data = datasets.load_dataset(args.dataset, space="native", clips=size.clips, **start.data())
    composed, counted = compose.composed_sets(data, args.composed, seed=args.base_seed)
    if args.write_captions:
        return compose.write_sets(args.write_captions, composed, counted)
    folder = start.open_folder()
    start.announce(data=data)
    print(f"  composed captions: {counted}")

    # Reward encoders and judge see no clip in common, and the judge is never optimised.
    notes, options = {}, start.training()
    scoring = dict(options, iterations=size.scorer_iterations)
    reward, measure, notes["reward"] = build_reward(args, data, reward, **scoring)
    judge, notes["judge"] = retrieval.judge([data], **scoring)
    scorers = evaluate.Scorers(reward, judge, data.skeleton, paired=True)
    watch.lap("reward and judge")

    if stored:
        policy = load_policy(args, stored, device)
    else:
        policy, notes["policy"] = make_policy(args, data, size, options)
    watch.lap("supervised model")
    about = start.about(folder, notes, data, data, composed_captions=counted)
    if not stored:
        clips = data.splits["train"] + composed["composed_train"]
        known = {caption for clip in clips for caption in clip.captions}
        measure = retrieval.control(args.reward, measure, sorted(known), args.seed)
        train(start, policy, measure, data, composed, scorers, folder)
        if start.rank:
            return  # the first process evaluates
        start.save_product(folder, t2m_gpt.networks(policy))

    before = policy_sampler(args, policy._replace(gpt=policy.reference))
    after = policy_sampler(args, policy)
    tables = final_tables(args, policy, scorers, data, composed, before, after)
    evaluate.end_run(start, folder, about, tables, composed["composed_test"], scorers, before,
                     after, CURVES)


if __name__ == "__main__":
    runs.run_main(main)
