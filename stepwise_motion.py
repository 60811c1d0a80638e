"""Step-wise reward back-propagation: a diffusion model follows the gradient of its reward.

The idea. A reward that is a network has a gradient, which says how a motion should change. Sent
back through all denoising steps it costs the memory of all. So the chain is cut: at every step
of a window the model guesses the finished motion, the reward scores the guess, and the weights
are updated at once. --method has older ways; most keep the chain.

Papers ([ET] and [MR] could not be read in full: equations are from other people's notes)
  [ET]    EasyTune 2026, arXiv 2602.07967: the update, SPL; code: wengwanjiang/EasyTune
  [MR]    MotionRFT 2026, arXiv 2603.27185: [ET] and its reward; code: Xiaofeng-Tan/MotionRFT
  [ReFL]  Xu et al. 2023 (ImageReward), [DRaFT] Clark et al. 2024, [AlignProp] Prabhudesai et
          al. 2023, [DRTune] Wu et al. 2024: other methods; [DDIM] Song et al. 2021: sampler

The sampler is deterministic: no density and no policy gradient, as ddpo_motion.py has them;
the reward is differentiated. For steps i = 0 .. N-1
  in the code   symbol               meaning
  x, x_next     x_i, x_{i+1}         state: x_0 is noise, x_N the finished motion
  e             f_theta(x_i, t_i, c) the network's answer: motion, noise, v, or velocity
  m             p x_i + q e_i        the guess of the finished motion (x0hat), with reward R(m)
EasyTune follows the gradient of sum_i R(m_i), each x_i held constant: not that of R(x_N).

Read sections 5 and 6 first, then 7: policy, update, loop.
  python stepwise_motion.py --dataset kit           # from nothing to a tuned model
  python stepwise_motion.py --dataset kit --tiny    # the same at toy size
  python stepwise_motion.py --prompt "he waves" --load runs/stepwise_kit_seed0/adapter.pt
"""

# ---- 1. Imports ----

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import (datasets, diffusion, evaluate, features, generator, lora, motion_reward,
                    normal, representations, retrieval, runs, samplers, training, vae)
from common.runs import RunArgs, arg

# ---- 2. Arguments ----

@dataclass
class Args(RunArgs):
    """Every field is a flag. RunArgs has those of all scripts: --dataset, --seed, --resume ..."""
    source: str = arg("", "source domain; empty: the other one of kit and humanml3d", group="data")
    length: int = arg(0, "frames of a --prompt; 0: the median of the source", shaping=False)
    representation: str = arg("features", "what is generated; each has a base of its own",
                              choices=representations.REPRESENTATIONS, group="sampling")
    prediction: str = arg("sample", "what the network answers with; velocity makes it a flow",
                          choices=("sample", "epsilon", "v", "velocity"))
    steps: int = arg(20, "denoising steps N ([ET]: 50)")
    spacing: str = arg("linspace", "of the steps (MLD: leading)",
                       choices=("linspace", "trailing", "leading"))
    guidance_scale: float = arg(1.0, "classifier-free (MDM: 2.5, MLD: 7.5), costs twice")
    weights: str = arg("semantic=1,preference=0.02,authenticity=0.05", "of the reward ([MR] "
                       "code: 1, 2e-4, 2e-4, m2m=1)", group="reward")
    reward: str = arg("motion-reward", "shuffled, a control, is asked with a wrong caption",
                      choices=("motion-reward", "shuffled"))
    reward_input: str = arg("x0hat", "what is rewarded: m_i, x_{i+1}, or first m_i, then x_{i+1}",
                            choices=("x0hat", "xt", "mixed"))
    reward_data: str = arg("both", "whose motions the reward model saw; source: no MoCap",
                           choices=("source", "both"))
    spl: str = arg("paper", "refine it where retrieval fails", choices=("paper", "code", "off"))
    method: str = arg("easytune", "how the reward's gradient reaches the weights", group="update",
                      choices=("easytune", "refl", "draft", "alignprop", "alignprop-bernoulli",
                               "drtune"))
    window: int = arg(0, "train the last K steps; 0: half, draft: all ([ET]: all)", lowest=0)
    sweep: float = arg(0.0, "share of training in which the window slides ([MR]: .03)")
    checkpointing: bool = arg(False, "chain methods: compute activations twice, keep none")
    iterations: int = arg(80, "of RL, a batch each")
    prompts: int = arg(32, "prompts of a batch, a motion each ([ET]: 256)")
    lr: float = arg(3e-4, "learning rate of the adapters ([ET]: 1e-5 for all weights)")
    warmup: int = arg(20, "updates in which it rises from 0 ([MR] code: 1000)", lowest=0)
    anchor: float = arg(1.0, "pull of the answers to those of the base ([ET]: optional)")
    lora_rank: int = arg(8, "rank of the adapters; 0: all weights are trained", lowest=0)
    lora_alpha: float = arg(16.0, "their scale is alpha / rank")
    keep: str = arg("best", "weights of the best look: plausible, then by judge",
                    choices=("best", "last"), group="evaluation")
    eval_every: int = arg(10, "iterations between looks at val prompts")
    best_of: int = arg(8, "reference row: the best of so many base samples", shaping=False)


SIZE_ARGS = {  # what --size sets here; the network's sizes are in common/diffusion.py
    "tiny": dict(steps=4, iterations=3, prompts=8, eval_every=2, eval_repeats=2, best_of=2),
    "paper": dict(steps=50, window=50, prompts=256, lr=1e-5, lora_rank=0, eval_repeats=20)}
LORA_LAYERS = r"^(text_)?layers.*\.(q|k|v|out|up|down)$"  # of motion and text
MAX_GRAD_NORM = 1.0  # of every optimizer step
HEADS = ("preference", "authenticity")  # of MotionReward
TERMS = ("semantic", "m2m", *HEADS)  # of the reward; m2m: like the recording?


def weights_of(args):
    """{term: weight} of --weights, without the terms that have none."""
    weights = runs.parse_weights(args.weights, TERMS, "--weights", share=False)
    return {term: weight for term, weight in zip(TERMS, weights) if weight}


def check_args(args):
    """Refuse at once what cannot work, and say which flag to change."""
    stepwise, weights = args.method == "easytune", weights_of(args)
    samplers.check_steps(args.steps, args.spacing)
    runs.refuse(
        (args.prompts < runs.process_count(), "--prompts: at least as many as processes"),
        (args.window > args.steps, f"--window: at most the {args.steps} denoising steps"),
        (args.sweep > 1, "--sweep: a share of the training, 0 to 1"),
        ("m2m" in weights and args.reward_data == "source",
         "--weights m2m: recordings of the target, not with --reward-data source"),
        (args.method in ("drtune", "alignprop-bernoulli") and args.prediction == "sample",
         f"--method {args.method}: needs --prediction epsilon, v or velocity"),
        (not stepwise and (args.reward_input, args.sweep) != ("x0hat", 0),
         "--reward-input and --sweep: for --method easytune"),
        (stepwise and args.checkpointing, "--checkpointing: for methods with a chain"))


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
    """The denoiser of --size for a --representation, with random weights."""
    size = diffusion.SIZES["joint"][args.size]
    width = representations.width(args.representation, features.T2M)
    return MotionDiffusion(size, vocabulary, diffusion.make_codec(size, width))


# ---- 4. The reward ----
# common/motion_reward.py has the networks of MotionReward; here is what they learn, and R.
# t is a caption and m its motion; z (b c) is a latent, gauss its (mean, log variance).


def semantic_loss(z_t, z_m, gauss_t, gauss_m, decoded_t, decoded_m, tokens, duplicates=None, nce=1):
    """Stage 1 [MR code]: one space for captions and motions. duplicates (b b): see info_nce;
    decoded_t, decoded_m, tokens (r n k): some of the rows, zero on padding."""
    rec = (F.smooth_l1_loss(decoded_t, tokens) + F.smooth_l1_loss(decoded_m, tokens)
           + F.smooth_l1_loss(decoded_m, decoded_t))
    t, m, n01 = gauss_t, gauss_m, [torch.zeros_like(z_t)] * 2  # N(0, 1)
    kl = sum(vae.gaussian_kl(*a, *b) for a, b in ((t, m), (m, t), (m, n01), (t, n01)))
    # Not in the paper: InfoNCE weighs 1 and not 0.1. R@1 on embedded KIT is .82, not .74.
    return (rec + 1e-5 * kl + 1e-5 * F.smooth_l1_loss(z_m, z_t)
            + nce * retrieval.info_nce(z_t, z_m, duplicates=duplicates))


def cross_loss(z_a, z_b, gauss_a, gauss_b, nce=1):
    """Stage 1 [MR code]: one space for two representations a and b of the same clips."""
    kl = vae.gaussian_kl(*gauss_a, *gauss_b) + vae.gaussian_kl(*gauss_b, *gauss_a)
    return 0.1 * F.smooth_l1_loss(z_a, z_b) + 1e-5 * kl + nce * retrieval.info_nce(z_a, z_b)


def mine(text, motion, k, duplicates=None):
    """Where retrieval fails now ([ET] eq. 13). text, motion (b c) -> cosines (b b); fail (b):
    is the own motion missing from the k best? top (b k): the indices of the k best."""
    if not 1 <= k < len(text):
        raise ValueError(f"top {k} of {len(text)} motions: nothing would ever fail")
    similarity = F.normalize(text, dim=-1) @ F.normalize(motion, dim=-1).T
    ranked, own = similarity.detach(), torch.arange(len(text), device=text.device)[:, None]
    if duplicates is not None:  # Not in the paper: what fits too is no error.
        ranked = ranked.masked_fill(duplicates & (own != own.T), -math.inf)
    top = ranked.topk(k, dim=1).indices
    return similarity, (top != own).all(1), top


def spl_paper(text, motion, k, duplicates=None, temperature=0.1):
    """Self-refinement, [ET] eq. 14 to 17 by public notes: KL(Q || P) -> loss, fail (b).
    P is the softmax of the cosines of (own, first). Q is (1, 0) where retrieval fails, and
    elsewhere a tie that has no gradient."""
    similarity, fail, top = mine(text, motion, k, duplicates)
    margin = similarity.gather(1, top[:, :1])[:, 0] - similarity.diagonal()
    return (fail * F.softplus(margin / temperature)).mean(), fail  # -log P(own)


def spl_code(text, motion, k, duplicates=None, temperature=0.1, high=0.8):
    """SPL as the [ET] code has it, oddities kept -> loss, unsolved rows (b)."""
    similarity, fail, top = mine(text, motion, k, duplicates)
    first = similarity.gather(1, top[:, :1])[:, 0]
    pair = torch.stack([first, similarity.diagonal()], 1)  # b 2
    # Any high cosine in a row makes it solved, and a solved row is pulled to a tie.
    solved = ~fail | (similarity > high).any(1)
    tie, own = pair.new_tensor([0.5, 0.5]), pair.new_tensor([0.0, 1.0])
    target = torch.where(solved[:, None], tie, own)
    logp = (pair / temperature / temperature).log_softmax(1)  # the temperature acts twice
    return F.kl_div(logp, target, reduction="batchmean"), ~solved


def ranking_loss(better, worse):
    """Preference head: scores (r) of motions and of their damaged copies, Bradley-Terry."""
    return F.softplus(worse - better).mean()


def authenticity_loss(logits, generated):
    """Authenticity head [MR code]: logits (b 2), class 0 is real; generated (b) bool."""
    return F.cross_entropy(logits, generated.long())


SPL = {"paper": spl_paper, "code": spl_code, "off": None}
LOSSES = motion_reward.Losses(semantic_loss, cross_loss, spl_paper, ranking_loss,
                              authenticity_loss, parts=(mine,))


def weighted_reward(model, representation, weights, motion, lengths, captions, clips=None, level=0):
    """R = sum of weight * term [MR] -> (b), with a gradient. motion (b t w) is raw, padded after
    lengths (b); level: of its noise, timestep / 1000; clips: the recordings, for m2m."""
    tokens, mask = model.tokenise(motion, lengths, representation)
    level, total = motion.new_full((len(motion),), level), 0
    if "semantic" in weights or "m2m" in weights:
        z = model.encode(tokens, mask, representation, level)[0]
    if "semantic" in weights:  # does it fit its caption?
        cosine = F.cosine_similarity(z, model.embed_text(captions), dim=-1)
        total = total + weights["semantic"] * cosine
    if "m2m" in weights:       # is it like the recording? That is supervision.
        clips = representations.convert_clips(clips, representation, model.skeleton)
        real = datasets.collate(clips)
        real = model.embed_motion(real.motion.to(z), real.lengths.to(z.device), representation)
        total = total + weights["m2m"] * F.cosine_similarity(z, real, dim=-1)
    for head in HEADS:         # does it look undamaged? Is it real?
        if head in weights:
            score = model.score(head, tokens, mask, representation, level)
            total = total + weights[head] * score
    return total


def build_reward(args, source, target, policy, base, **options):
    """-> reward(motion, lengths, captions, clips, level) -> (b); its heads' scores, columns of
    tables; notes. base: weights of the base, for the cache's key."""
    seen = [source] if args.reward_data == "source" else [source, target]
    # The heads learn from motions of the base, which every --seed shares.
    sampler = policy_sampler(replace(args, seed=args.base_seed), policy.base())
    noise = partial(diffusion.noised, policy.model.codec, args.prediction)
    model, notes = motion_reward.fit_motion_reward(
        seen, partial(motion_reward.draw_motions, sampler, seen, seed=args.base_seed),
        LOSSES._replace(spl=SPL[args.spl]), args.size, representation=args.representation,
        noise=noise if args.reward_input != "x0hat" else None,
        saw=[base, args.steps, args.spacing, args.guidance_scale], **options)
    reward = partial(weighted_reward, model, args.representation, weights_of(args))
    return reward, model.columns, notes


# ---- 5. The policy: a denoiser and a deterministic sampler ----

class Policy(NamedTuple):
    """A denoiser in training, and how it is sampled."""
    model: MotionDiffusion
    frozen: MotionDiffusion  # a copy of the model before any training
    steps: samplers.Steps    # p, q, x_coef, e_coef, timesteps, each (N,); level (N+1,)
    tokens: int              # n of every state: a sample must not depend on its batch
    guidance_scale: float
    device: torch.device

    def base(self):
        """The policy before any training."""
        return self._replace(model=self.frozen)

    def trained(self):
        """{name: weight} of what is trained: the adapters, or everything."""
        return {name: w for name, w in self.model.named_parameters() if w.requires_grad}

    def restore(self, trained):
        """Put back what `trained` has given."""
        self.model.load_state_dict(self.model.state_dict() | trained)


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


def make_network(args, policy, captions, mask):
    """network(x, i) -> the answer e (b n c) at step i."""
    # Without gradients captions are read once. With them each step reads again: EasyTune
    # updates the text layers between two steps.
    known = None if torch.is_grad_enabled() else policy.model.encode_text(captions)

    def network(x, i):
        timesteps = x.new_full((len(x),), float(policy.steps.timesteps[i]))
        text = known or policy.model.encode_text(captions)
        return predict(policy, x, timesteps, mask, *text)
    return partial(checkpoint, network, use_reentrant=False) if args.checkpointing else network


class Route(NamedTuple):
    """Where gradients pass in a walk over the steps, and what is rewarded."""
    graph: tuple              # (N,) bool: does e_i depend on the weights?
    rewarded: dict            # step -> "x0hat" (m_i) or "xt" (x_{i+1}); the last ends the walk
    stop_input: bool = False  # does the network read stop(x_i)?
    stop_state: bool = False  # is x_{i+1} stopped?


def denoise(network, steps, x, route, visit=None):
    """Walk from noise x (b n c) along a route -> the last state; network(x, i) -> e.

    visit(i, z, e, trail) is called where z is rewarded; e is the answer, trail the states
    x_0 .. x_i without gradients.
    It must keep no tensor that has a graph: peak memory depends on it.
    """
    trail = []
    for i in range(max(route.rewarded, default=len(route.graph) - 1) + 1):
        # [ET] eq. (7): if x is stopped too, the gradient of e_i at a fixed x_i is left.
        read = x.detach() if route.stop_input else x
        with torch.set_grad_enabled(route.graph[i]):
            e = network(read, i)
        p, q, x_coef, e_coef = (coef[i].item() for coef in steps[:4])
        x_next = x_coef * x + e_coef * e  # [DDIM] eq. (12), or an Euler step
        trail.append(x.detach())
        if i in route.rewarded:
            visit(i, p * x + q * e if route.rewarded[i] == "x0hat" else x_next, e, trail)
        x = x_next.detach() if route.stop_state else x_next
        x_next = e = None  # frees the graph of this step before the next one
    return x


# ---- 6. Routes, loss, update ----

def easytune(steps, window, kinds):
    """[ET] eq. (6): each step i of the window is rewarded by itself, for kinds[i]."""
    graph = tuple(i in window for i in range(steps))
    return Route(graph, {i: kinds[i] for i in window}, stop_input=True, stop_state=True)


def draw_route(args, progress, g):
    """The route of a batch, at a progress of 0 to 1 in the training; g: random choices."""
    # Not in the paper: by default the second half, and not all steps.
    steps, window = args.steps, args.window or math.ceil(args.steps / 2)
    every = range(steps)

    def below(n):
        return int(torch.randint(n, (), generator=g))
    if args.method == "easytune":
        # The window slides from the first steps to the last ones within `sweep` [MR code].
        done = min(progress / args.sweep, 1.0) if args.sweep else 1.0
        start = round(done * (steps - window))
        late = {"x0hat": steps, "xt": 0, "mixed": start + (window + 1) // 2}[args.reward_input]
        kinds = ["xt" if i >= late else "x0hat" for i in every]
        return easytune(steps, range(start, start + window), kinds)
    if args.method == "refl":
        # [ReFL]: walk to step k without gradients, and guess the motion from there.
        k = steps - 1 - below(window)  # in their code one of the last 10 of 40 steps
        return Route(tuple(i == k for i in every), {k: "x0hat"})
    if args.method == "drtune":
        # [DRTune]: the network reads stopped states, but x is not stopped: the reward at step k
        # reaches K steps, equally far apart, through the products of x_coef.
        apart = steps // window
        first, k = below(steps - window * apart + 1), steps - 1 - below(window)
        chosen = {first + j * apart for j in range(window)}
        guess = {max(k, first): "x0hat"}  # earlier: no gradient
        return Route(tuple(i in chosen for i in every), guess, stop_input=True)
    # The others reward the finished motion, and differ in the steps that have a graph.
    if args.method == "draft":  # [DRaFT]-K: the last K steps
        graph = [i >= steps - (args.window or steps) for i in every]
    elif args.method == "alignprop":  # from a random step on; their code: N(42, 5) of 50
        cut = round(0.84 * steps + 0.1 * steps * float(torch.randn((), generator=g)))
        graph = [i >= min(max(cut, 1), steps - 1) for i in every]
    else:  # "AlignProp" of [ET code]: a tenth, or if none was drawn, one at random
        graph = torch.rand(steps, generator=g) < 0.1
        graph[below(steps)] |= not graph.any()
    return Route(tuple(map(bool, graph)), {steps - 1: "xt"})


def anchor_loss(e, e_base, mask):
    """|e - e_base|^2 (b) of answers (b n c) at one stopped x, mean over the mask (b n)."""
    # If a step had noise, it would be its KL to the base, up to a factor ([ET], appendix).
    return ((e - e_base).square() * mask[..., None]).sum((1, 2)) / (mask.sum(1) * e.shape[-1])


def learn(loss, last, optimizer, scheduler, where):
    """Move the weights by the gradient of one loss -> its norm before the clip.
    last: no other loss comes in this walk; a study that waits for it returns None."""
    parameters = optimizer.param_groups[0]["params"]
    loss.backward()
    training.all_reduce_grads(parameters)
    norm = training.clip_gradients(parameters, MAX_GRAD_NORM, where)
    optimizer.step()  # at once: the next step has new weights
    scheduler.step()
    optimizer.zero_grad()
    return norm


def update(args, policy, ask, batch, move, iteration, loop):
    """Stage 3: walk along a route, and update the weights where a reward is due -> log.
    ask(z) -> rewards (b), see score(); move(loss, last, where) -> norm, see learn()."""
    captions, mask, g, norms = batch["captions"], batch["mask"], batch["g"], []
    route, log = draw_route(args, iteration / args.iterations, g), training.Sums("anchor")
    share = len(captions) / args.prompts  # of the batch, that this process has
    network = make_network(args, policy, captions, mask)
    with torch.no_grad():
        base_network = make_network(args, policy.base(), captions, mask)

    def visit(i, z, e, trail):
        loop.check()  # Ctrl-C ends here; --resume repeats the iteration
        where, last = f"iteration {iteration}, step {i}", i == max(route.rewarded)
        more = {"level": policy.steps.level[i + 1].item()} if route.rewarded[i] == "xt" else {}
        rewards = ask(z, **more)
        loop.rewards = rewards.detach()
        loss = -rewards.mean()  # no baseline, no ratio
        if args.anchor:
            if args.method != "easytune":  # from here on i is one random step of the chain
                i = int(torch.randint(len(trail), (), generator=g))
                e = network(trail[i], i)
            with torch.no_grad():
                e_base = base_network(trail[i], i)
            anchor = anchor_loss(e, e_base, mask).mean()
            loss = loss + args.anchor * anchor
            log.add(anchor=share * anchor / len(route.rewarded))
        training.check_loss(loss, where)
        norms.append(move(share * loss, last, where=f"{where}: gradient norm"))

    denoise(network, policy.steps, batch["noise"], route, visit)
    # Calls of the network, backward passes too, but not what checkpointing repeats.
    steps, anchors = max(route.rewarded) + 1, len(route.rewarded) if args.anchor else 0
    calls = steps + sum(route.graph[:steps]) + anchors * (1 if args.method == "easytune" else 3)
    log.add(calls=calls * len(captions) * (1 if args.guidance_scale == 1.0 else 2))
    # The reward in the log is that of the last step, the nearest to the motion.
    norms = [norm for norm in norms if norm is not None]
    log.add(reward=share * loop.rewards.mean(), grad_norm=sum(norms) / len(norms))
    return training.reduce_log(log.mean(1))


# ---- 7. Training: roll out, score, update ----

def start_noise(policy, lengths, seed, iteration, purpose, numbers):
    """x_0 (b n c), zero on padding, and mask (b n), for lengths (b) in frames."""
    mask = policy.model.codec.mask(lengths, policy.tokens).to(policy.device)
    # Each sample has a noise stream of its own: it does not depend on its batch or process.
    noise = normal((policy.tokens, policy.model.dims), seed, iteration, purpose, numbers)
    return noise.to(policy.device) * mask[..., None], mask


def collect(args, policy, clips, wrong, length_table, iteration):
    """Stage 1: captions, lengths, noise. The walk is stage 3: it learns at each step.
    clips: {caption: clip}; wrong: {caption: the one that is scored in its place}."""
    g, prompts = generator(args.seed, iteration, "prompts"), sorted(clips)
    chosen = torch.randint(len(prompts), (args.prompts,), generator=g).tolist()
    # Lengths are drawn from the source: the target gives only its words.
    lengths = datasets.draw_lengths(length_table, [prompts[k] for k in chosen], g)
    numbers = runs.share(args.prompts, 1, policy.device)  # of several processes each has some
    captions, lengths = [prompts[chosen[k]] for k in numbers], lengths[numbers]
    more = {}
    if "m2m" in weights_of(args):  # as long as the recording that it is compared with
        more["clips"] = [clips[caption] for caption in captions]
        lengths = torch.tensor([len(clip.features) for clip in more["clips"]])
    noise, mask = start_noise(policy, lengths, args.seed, iteration, "rollout", numbers)
    return dict(captions=captions, asked=[wrong.get(c, c) for c in captions], more=more,
                lengths=lengths.to(policy.device), noise=noise, mask=mask,
                g=generator(args.seed, iteration, "route"))


def score(policy, reward, batch, z, **more):
    """Stage 2: decode z (b n c), ask the reward -> (b), with a gradient."""
    motion = policy.model.codec.decode(z)
    return reward(motion, batch["lengths"], batch["asked"], **batch["more"], **more)


LOOKS = ("reward", "judge", "oracle", *HEADS, "fid", "foot_skate", "jerk", "speed", "gate")
FIELDS = ("iteration", "updates", "calls", "reward", "anchor", "grad_norm",
          *(f"val_{name}" for name in LOOKS))
CURVES = ("reward", "val_reward", "val_judge", "val_oracle", "anchor", "val_jerk")


def train(start, policy, reward, learn, scorers, source, target, folder):
    """The training loop changes what policy.trained() names -> notes."""
    args, watch, val = start.args, start.watch, target.splits["val"]
    looks = [name for name in LOOKS if scorers.columns or name not in HEADS]
    evaluate.check_names(looks, val, scorers)
    length_table = datasets.length_table(source.splits["train"])
    clips = {caption: clip for clip in target.splits["train"] for caption in clip.captions}
    wrong = retrieval.wrong_captions(sorted(clips), args.seed) if args.reward == "shuffled" else {}
    parameters = list(policy.trained().values())
    # No weight decay: with equal rewards nothing must move.
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    scheduler = training.rising(optimizer, args.warmup)
    move = partial(learn, optimizer=optimizer, scheduler=scheduler)
    print(f"  {len(clips)} prompts, {lora.count(parameters)} trained weights")
    same = {"data": source.fingerprint + target.fingerprint}
    calls, best, data = 0.0, None, evaluate.physics(val, scorers.skeleton)
    with runs.Loop("stepwise", start, folder, FIELDS, same, policy.model) as loop:
        if loop.state:  # --resume
            policy.restore(loop.state["trained"])
            optimizer.load_state_dict(loop.state["optimizer"])
            scheduler.load_state_dict(loop.state["scheduler"])
            calls, best = loop.state["calls"], loop.state["best"]
        for iteration in loop:
            # 1. Draw captions, lengths and noise; no step is taken yet.
            batch = collect(args, policy, clips, wrong, length_table, iteration)
            # 2. Score: only a function so far; stage 3 calls it where a reward is due.
            ask = partial(score, policy, reward, batch)
            # 3. Update: walk from noise to motion, and learn from each guess at once.
            log = update(args, policy, ask, batch, move, iteration, loop)
            watch.lap("update")
            # 4. Log, now and then look at validation prompts, save.
            calls += log["calls"]
            log |= {"updates": scheduler.last_epoch, "calls": calls}
            if (iteration + 1) % args.eval_every == 0 or iteration + 1 == args.iterations:
                log |= evaluate.look(looks, val, scorers, policy_sampler(args, policy), data)
                merit = [-log["val_gate"], log["val_judge"]]  # plausible first
                if best is None or merit > best["merit"]:
                    best = {"iteration": iteration, "merit": merit,
                            "trained": runs.plain(policy.trained())}
                watch.lap("validation")
            loop.end(log, ("reward", "val_judge", "val_oracle"), {
                "trained": policy.trained(), "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "calls": calls, "best": best})
    if args.keep == "best":
        policy.restore(best["trained"])
    return {name: best[name] for name in ("iteration", "merit")} | {"kept": args.keep}


# ---- 8. The run ----

def make_policy(args, model, longest, device):
    """The base made trainable, and the steps, for motions of up to `longest` frames."""
    g, frozen = generator(args.seed, 0, "lora"), copy.deepcopy(model).requires_grad_(False)
    if args.lora_rank:
        lora.inject(model, LORA_LAYERS, args.lora_rank, args.lora_alpha, g)
    else:
        model.requires_grad_(True)
    # With leading spacing MLD ends at the first timestep of training.
    final = "sigma_min" if args.spacing == "leading" else "zero"
    grid = (samplers.straight_grid(args.steps) if args.prediction == "velocity"
            else samplers.make_grid("linear", args.steps, args.spacing, final))
    for network in (model, frozen):
        if diffusion.SIZES["joint"][args.size].bf16:
            network.forward = training.in_bfloat16(network.forward)
        network.to(device).eval()
    steps, tokens = samplers.ddim_steps(grid, args.prediction), model.codec.count(longest)
    return Policy(model, frozen, steps, tokens, args.guidance_scale, device)


def load_policy(args, stored, device):
    """The policy of a finished run, from its adapter.pt."""
    model = make_model(args, datasets.Vocabulary(stored["words"]))
    model.load_state_dict(stored["base"])
    policy = make_policy(args, model, stored["longest"], device)
    policy.restore(stored["trained"])
    return policy


def policy_sampler(args, policy):
    """The sampler that common/evaluate.py calls."""
    # A caption's number decides its noise: base and tuned make pairs.
    @torch.no_grad()
    def motions(captions, lengths, numbers, purpose, repeat):
        x, mask = start_noise(policy, lengths, args.seed, repeat, purpose, numbers)
        network = make_network(args, policy, captions, mask)
        x = denoise(network, policy.steps, x, Route((False,) * args.steps, {}))
        motion = policy.model.codec.decode(x).cpu()
        made = representations.to_features(motion, lengths, args.representation, features.T2M)
        return made, None
    return evaluate.in_chunks(motions)


def write_motions(args, stored, folder, device):
    """--prompt: GIF, joints and BVH of every caption, from adapter.pt alone."""
    policy, frames = load_policy(args, stored, device), args.length or stored["frames"]
    policies = {"before": policy.base(), "after": policy} if args.compare else {"after": policy}
    motions = {title: policy_sampler(args, which) for title, which in policies.items()}
    evaluate.export(folder, args.prompt, stored, frames, features.T2M, motions)


def main(argv, reward=None, learn=learn):
    """Prepare, train, report; or use what a finished run has left (--load).
    A study replaces one function: learn, or reward(motion, lengths, captions) -> (b), with a
    gradient in raw motion (b t w) of the --representation."""
    start = runs.prepare(Args, SIZE_ARGS, argv, __doc__, "stepwise", "stepwise-adapter", check_args)
    args, stored, device, watch = start.args, start.stored, start.device, start.watch
    if args.prompt:
        return write_motions(args, stored, start.open_folder(), device)
    size = diffusion.SIZES["joint"][args.size]
    source, target = datasets.load_pair(args.source, args.dataset, clips=size.clips, **start.data())
    folder = start.open_folder()
    start.announce(source=source, target=target)

    notes, columns, options = {}, None, start.training()
    scoring = dict(options, iterations=size.scorer_iterations)
    if stored:
        base, policy = stored, load_policy(args, stored, device)
    else:
        parts = sinusoid, Attention, Layer, MotionDiffusion  # their code is in the cache's key
        known = args.representation == "features"  # then the base is that of DDPO
        parts += () if known else (representations.from_features,)
        clips = representations.convert_clips(
            source.splits["train"], args.representation, source.skeleton)
        model, notes["base"] = diffusion.fit_base(
            partial(make_model, args), parts, source, size, args.prediction, "linear",
            clips=clips, weights=known, **options)
        base = {"base": runs.plain(model.state_dict()), "words": model.vocabulary.words,
                "frames": source.usual_length, "longest": max(source.longest, target.longest)}
        policy = make_policy(args, model, base["longest"], device)
    watch.lap("base")

    # Reward model and judge see no clip in common, and the judge is never optimised.
    if reward is None:
        reward, columns, notes["reward"] = build_reward(
            args, source, target, policy, base["base"], **scoring)
    judge, notes["judge"] = retrieval.judge([source, target], target=target, **scoring)

    def measured(motion, *asked):  # tables hold features, whatever is generated
        motion = representations.from_features(motion, args.representation, source.skeleton)
        return reward(motion, *asked)
    scorers = evaluate.Scorers(measured, judge, source.skeleton, columns, "m2m" in weights_of(args))
    watch.lap("reward and judge")
    about = start.about(folder, notes, source, target)
    if not stored:
        about["best look"] = train(start, policy, reward, learn, scorers, source, target, folder)
        if start.rank:
            return  # the first process evaluates
        start.save_product(folder, {"trained": runs.plain(policy.trained()), **base})

    before, after = policy_sampler(args, policy.base()), policy_sampler(args, policy)
    evaluate.report(start, folder, about, source, target, scorers, before, after, CURVES)


if __name__ == "__main__":
    runs.run_main(main)
