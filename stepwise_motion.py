"""Step-wise reward back-propagation: the gradient of a reward model, taken at each denoising step alone.

The idea. A reward that is a network can be differentiated: its gradient says how a motion should change. Back
through the whole chain of denoising steps that costs the memory of all of them. So the chain is cut: at each
step the model guesses the finished motion, the reward judges that guess, and the weights take a step at once.
The methods that keep the chain stand beside it, behind one flag.

Papers
  MotionRFT (Tan et al. 2026, arXiv 2603.27185) and EasyTune (arXiv 2602.07967): the method; [MR] and [ME]
      below are their public code. Their equations could not be read; README says what is unknown
  ReFL (Xu et al. 2023, ImageReward), DRaFT (Clark et al. 2024), AlignProp (Prabhudesai et al. 2023),
      DRTune (Wu et al. 2024): the chain methods;  DDIM (Song et al. 2021): the sampler

`diff ddpo_motion.py stepwise_motion.py` is the lesson: the sampler has no randomness and no density left, so
no policy gradient; instead the reward is differentiated. Denoising steps are i = 0 .. N-1:
  variable            symbol                  meaning
  x                   x_i                     state; x_0 is noise, x_N the finished motion, in coordinates
  e                   e_i = f(x_i, t_i, c)    the network's answer: clean motion, noise, v, or velocity
  m                   m_i = p_i x_i + q_i e_i the guess of the finished motion ("x0hat")
  x_next              a_i x_i + b_i e_i       the next state; one table of p, q, a, b is the whole sampler
  route                                       where gradients pass, what is judged: all that methods differ in
The update is not the gradient of E[R(x_N)]: it is that of sum_i E[R(m_i)] with the states held fixed.

Read in this order: section 6 (table, routes, the pass), 7 (the loop), 5 (reward), then the rest.

  python stepwise_motion.py --dataset kit             # from nothing to a tuned model, see README for the time
  python stepwise_motion.py --dataset kit --tiny      # the same path at toy size
  python stepwise_motion.py --prompt "a person walks and waves" --load runs/stepwise_kit_seed0/adapter.pt
"""

# ---- 1. Imports --------------------------------------------------------------------------------------------

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import (
    InputError, datasets, denoising, evaluate, features, generator, lora, motion_reward, patches,
    representations, retrieval, runs, samplers, training)
from common.motion_reward import TERMS
from common.runs import arg
from results import memory

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
    # generator and sampling
    generator: str = arg("diffusion", "what the base learns: DDIM reverses it, or Euler steps do",
                         choices=("diffusion", "flow"))
    prediction: str = arg("sample", "a diffusion answers with the motion, v, or the noise (MLD; poor here)",
                          choices=("sample", "epsilon", "v", "velocity"))
    representation: str = arg("features", "what is generated (MotionRFT: all three, each with its own base)",
                              choices=representations.REPRESENTATIONS)
    spacing: str = arg("linspace", "node spacing (MLD: leading)", choices=("linspace", "trailing", "leading"))
    steps: int = arg(20, "denoising steps N (MLD: 50)")
    guidance_scale: float = arg(1.0, "classifier-free guidance, in rollout and update (MLD: 7.5)")
    # reward
    w_semantic: float = arg(1.0, "weight of the cosine with the caption (MotionRFT code: 1)")
    w_m2m: float = arg(0.0, "weight of the cosine with the caption's own clip: supervision (there: 1)")
    w_preference: float = arg(0.02, "weight of the preference head (there: 2e-4, which hardly acts)")
    w_authenticity: float = arg(0.05, "weight of P(real) (there: 2e-4)")
    reward: str = arg("motion-reward", "shuffled: asked with a wrong caption, a control",
                      choices=("motion-reward", "shuffled"))
    reward_input: str = arg("x0hat", "what is judged: m_i, x_{i+1}, or first one then the other (unknown)",
                            choices=("x0hat", "xt", "mixed"))
    reward_data: str = arg("both", "whose clips MotionReward saw; source: the strict reading of no MoCap",
                           choices=("source", "both"))
    generated: int = arg(512, "motions of the base that its heads learn from")
    reward_iterations: int = arg(900, "updates of MotionReward's first stage, and of the judge")
    head_iterations: int = arg(600, "updates of each of its heads, in turn over the representations")
    spl: str = arg("paper", "self-refinement preference learning", choices=("paper", "code", "off"))
    spl_iterations: int = arg(60, "updates with it")
    # method
    method: str = arg("easytune", "how the reward's gradient reaches the weights", choices=(
        "easytune", "refl", "draft", "alignprop", "alignprop-bernoulli", "drtune"))
    update: str = arg("step", "easytune: at each step, the same from one set of weights, or once a pass",
                      choices=("step", "chain", "accum"))
    window: int = arg(0, "steps K that are trained, the last ones; 0: half of them (MotionRFT: 10 of 50)",
                      lowest=0)
    sweep: float = arg(0.0, "share of the training in which the window slides to the last steps (there: .03)")
    checkpointing: bool = arg(False, "chain methods: recompute activations instead of keeping them")
    beta_anchor: float = arg(1.0, "pull of the answers towards those of the base (their code: none)")
    # update
    iterations: int = arg(80, "batches")
    batch: int = arg(32, "prompts of a batch (MotionRFT: 256)")
    lr: float = arg(3e-4, "learning rate (MotionRFT: 1e-5 for all weights)")
    warmup: int = arg(20, "updates in which it rises from 0 (there: 1000)", lowest=0)
    max_grad_norm: float = arg(1.0, "gradient norm clip, of every update")
    adapter: str = arg("lora", "what is trained; full: all weights of the denoiser", choices=("lora", "full"))
    lora_rank: int = arg(8, "rank of the adapters (HY-Motion: 8)")
    lora_alpha: float = arg(16.0, "their scale is alpha / rank (HY-Motion: 16)")
    lora_targets: str = arg(r"\.(q|k|v|out|up|down)$", "regular expression of the linear layers to adapt")
    # evaluation
    keep: str = arg("best", "weights of the best look, by the judge on val, or the last",
                    choices=("best", "last"))
    eval_every: int = arg(10, "batches between looks at the validation prompts")
    eval_repeats: int = arg(3, "repeats of the final evaluation, for the 95 % interval (benchmark: 20)")
    best_of: int = arg(8, "reference row: the best of this many base samples by reward")


TINY = dict(source_clips=160, target_clips=120, width=32, layers=3, base_iterations=60, base_batch=32,
            patch_dims=48, steps=4, reward_iterations=40, head_iterations=10, spl_iterations=4, iterations=3,
            batch=8, eval_every=2, eval_repeats=2, best_of=2)


def check_args(args):
    """Stop at once on settings that cannot work, naming the flag and the fix."""
    stepwise = args.method == "easytune"
    if args.generator == "flow" and args.prediction == "sample":
        args.prediction = "velocity"
    for wrong, message in (
            (args.method == "drtune" and args.prediction == "sample",
             "--method drtune: its gradient passes from step to step by x alone, which a base that answers "
             "with the motion leaves out; take --prediction epsilon or v, or --generator flow"),
            ((args.generator == "flow") != (args.prediction == "velocity"),
             "--prediction: velocity for --generator flow; sample, epsilon or v for diffusion"),
            (args.window > args.steps, f"--window: at most the {args.steps} denoising steps"),
            (args.sweep > 1, "--sweep: a share of the training, 0 to 1"),
            (not stepwise and (args.update, args.reward_input, args.sweep) != ("step", "x0hat", 0),
             "--update, --reward-input and --sweep: for --method easytune; the others judge once a batch"),
            (stepwise and args.checkpointing, "--checkpointing: for methods with a chain"),
            (not any(getattr(args, f"w_{name}") for name in TERMS), "--w-semantic: all weights are 0"),
            (args.batch < runs.process_count(), "--batch: at least one prompt per process"),
            (args.width % args.heads or args.width % 2, "--width: even and a multiple of --heads"),
            (args.patch_dims > args.patch * representations.width(args.representation, features.T2M),
             "--patch-dims: more than a patch has"),
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


# ---- 4. The base model: supervised pretraining on the source, cached ---------------------------------------


def build_base(args, source, device):
    """The pretrained denoiser, from the source's train split alone -> model, notes. The training loop is in
    common/denoising.py. Differs from ddpo_motion.py: any representation, any answer; the default is its base.
    """
    skeleton, known = source.skeleton, args.representation == "features"
    clips = representations.convert_clips(source.splits["train"], args.representation, skeleton)
    vocabulary = datasets.Vocabulary.from_captions([c for clip in clips for c in clip.captions])
    model = MotionDiffusion(args, vocabulary, representations.width(args.representation, skeleton))
    parts, shape = [sinusoid, Attention, Layer, MotionDiffusion], [source.fingerprint, args.patch, args.heads]
    if not known:
        parts, shape = parts + [representations], shape + [args.representation]
    return model, denoising.fit(
        model, clips, features.block_weights(skeleton, features.PATCH_WEIGHTS) if known else None, device,
        parts=parts, shaped_by=shape, cache_dir=args.cache_dir, cache=args.cache,
        **runs.arguments_of(denoising.train, args))


# ---- 5. Rewards --------------------------------------------------------------------------------------------
# MotionReward, its losses, SPL and its training are in common/motion_reward.py.


def reward_terms(reward_model, motion, lengths, captions, args, level=0.0, real=None):
    """Motions (b t w), raw, in the generator's representation -> {term: (b)} with their weighted sum "total":
    R = w_semantic cos(z_t, z_m) + w_preference critic(z_m) + w_authenticity P(real) + w_m2m cos(z_m, z_real),
    as in [MR]. level: share of noise that is left in them."""
    weights = {name: getattr(args, f"w_{name}") for name in TERMS}
    level = motion.new_full((len(motion),), level)
    return reward_model.reward(motion, lengths, captions, args.representation, weights, real, level)


# ---- 6. The algorithm: pure functions, no I/O, no globals --------------------------------------------------


class Table(NamedTuple):
    """The deterministic sampler, m_i = p x_i + q e_i and x_{i+1} = a x_i + b e_i: each (N,) float64."""
    p: torch.Tensor
    q: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    timesteps: torch.Tensor  # (N,) what the network is told
    level: torch.Tensor      # (N+1,) share of the noise in x_i, for the reward's time token


def diffusion_table(grid, prediction):
    """DDIM with eta 0 between the nodes of the grid, for a network that answers with the motion ("sample"),
    the noise ("epsilon") or v."""
    alpha, sigma = grid.alpha[:-1], grid.sigma[:-1]
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    p, q = {"sample": (zero, one), "epsilon": (1 / alpha, -sigma / alpha), "v": (alpha, -sigma)}[prediction]
    keep = grid.sigma[1:] / sigma            # DDIM eq. 12: x_{i+1} = alpha' m + sigma' (x - alpha m) / sigma
    gain = grid.alpha[1:] - keep * alpha
    level = torch.cat([grid.timesteps / denoising.TIMESTEPS, grid.sigma[-1:] * 0])
    return Table(p, q, keep + gain * p, gain * q, grid.timesteps, level)


def flow_table(steps):
    """Euler steps along the velocity from noise (t = 0) to the motion (t = 1)."""
    t, one = torch.arange(steps, dtype=torch.float64) / steps, torch.ones(steps, dtype=torch.float64)
    return Table(one, 1 - t, one, one / steps, denoising.TIMESTEPS * t, 1 - torch.cat([t, one[:1]]))


class Route(NamedTuple):
    """Where gradients pass in one pass over the steps, and what is judged."""
    graph: tuple              # (N,) bool: e_i is a function of the weights, else a constant
    judged: dict              # step -> "x0hat" (m_i) or "xt" (x_{i+1}); the pass ends with the last of them
    stop_input: bool = False  # the network reads stop(x_i)
    stop_state: bool = False  # x_{i+1} is stopped


def easytune(steps, window, inputs):
    """EasyTune: each step of the window is judged by itself, nothing passes on. inputs: of each."""
    graph = tuple(i in window for i in range(steps))
    return Route(graph, {i: inputs[i] for i in window}, stop_input=True, stop_state=True)


def refl(steps, k):
    """ReFL: walk to step k without gradients, guess the end from there."""
    return Route(tuple(i == k for i in range(steps)), {k: "x0hat"})


def draft(steps, last):
    """DRaFT-K: the finished motion, back through the last K steps. AlignProp, which draws the step where the
    gradient is cut, is the same with K = N - cut."""
    return Route(tuple(i >= steps - last for i in range(steps)), {steps - 1: "xt"})


def alignprop_bernoulli(mask):
    """What [ME] and [MR] call AlignProp: each step keeps its graph by chance; all pass it on by a_i x_i."""
    return Route(tuple(mask), {len(mask) - 1: "xt"})


def drtune(steps, train, k):
    """DRTune: the network's input is stopped at all steps, x is not: the reward of the guess at step k
    reaches the trained steps through the products of a_i."""
    return Route(tuple(i in train for i in range(steps)), {k: "x0hat"}, stop_input=True)


def window_start(progress, steps, window, sweep):
    """First trained step: slides from 0 to the last window within the first `sweep` of the training [MR]."""
    share = 1.0 if progress > sweep or not sweep else progress / sweep
    return round(share * (steps - window))


def draw_route(args, progress, g):
    """The route of one batch; progress in [0, 1] of the training, g draws what is left to chance."""
    steps, window = args.steps, args.window or math.ceil(args.steps / 2)

    def below(n):
        return int(torch.randint(n, (), generator=g))
    if args.method == "easytune":
        start = window_start(progress, steps, window, args.sweep)
        late = {"x0hat": steps, "xt": 0, "mixed": steps - window // 2}[args.reward_input]
        inputs = ["xt" if i >= late else "x0hat" for i in range(steps)]
        return easytune(steps, range(start, start + window), inputs)
    if args.method == "refl":  # ImageReward: one of the last 10 of 40 steps
        return refl(steps, steps - 1 - below(window))
    if args.method == "draft":
        return draft(steps, window if args.window else steps)
    if args.method == "alignprop":  # its authors' code: N(42, 5) of 50 steps, within 1 .. N - 1
        cut = 0.84 * steps + 0.1 * steps * float(torch.randn((), generator=g))
        return draft(steps, steps - min(max(round(cut), 1), steps - 1))
    if args.method == "alignprop-bernoulli":  # [ME]: a tenth of the steps, at least one
        mask = torch.rand(steps, generator=g) < 0.1
        mask[below(steps)] |= not mask.any()
        return alignprop_bernoulli(mask.tolist())
    apart = steps // window  # DRTune: K equally spaced steps, from a random first one
    first, k = below(steps - window * apart + 1), steps - 1 - below(window)
    train = {first + j * apart for j in range(window)}
    return drtune(steps, train, max(k, first))  # a trained step must come before the guess


def denoise(network, table, x, route, judge=None):
    """One pass from noise x (b n c) -> the last state, x_N unless the route ends before. network(x, i) -> e.

    judge(i, z, e, trail) is called where the route asks for it: z is what is to be judged, e the answer that
    it comes from, trail the states x_0 .. x_i without gradients. What it computes must not outlive it: that
    is the memory.
    """
    trail = []
    for i in range(max(route.judged, default=len(route.graph) - 1) + 1):
        read = x.detach() if route.stop_input else x
        with torch.set_grad_enabled(route.graph[i]):
            e = network(read, i)
        p, q, a, b = (y[i].item() for y in table[:4])
        x_next = a * x + b * e
        trail.append(x.detach())
        if i in route.judged:
            judge(i, p * x + q * e if route.judged[i] == "x0hat" else x_next, e, trail)
        x, x_next, e = x_next.detach() if route.stop_state else x_next, None, None  # a step's graph at a time
    return x


def anchor_loss(e, e_ref, mask):
    """mean |e_theta - e_ref|^2 over valid entries, at the same stopped x. Not in the papers: for DDIM it is,
    up to a factor, the KL of a stochastic step to that of the base. (b n c), mask (b n) -> (b)"""
    return ((e - e_ref).square() * mask[..., None]).sum((1, 2)) / (mask.sum(1) * e.shape[-1])


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


# ---- 7. The run --------------------------------------------------------------------------------------------


class Policy(NamedTuple):
    """A denoiser in training, and the steps it is sampled with."""
    tuned: lora.Tuned        # the model, and the base that it was
    table: Table
    tokens: int              # n of every state, fixed for the run: a sample must not change with its batch
    device: torch.device


def make_policy(args, model, tokens, device):
    """The base made trainable, and its sampler."""
    tuned = lora.Tuned(model.to(device).eval(), args.adapter, args.lora_targets, args.lora_rank,
                       args.lora_alpha, generator(args.seed, 0, "lora"))
    if args.generator == "flow":
        return Policy(tuned, flow_table(args.steps), tokens, device)
    final = "sigma_min" if args.spacing == "leading" else "zero"  # MLD ends at the first training timestep
    grid = samplers.make_grid(args.schedule, args.steps, args.spacing, final)
    return Policy(tuned, diffusion_table(grid, args.prediction), tokens, device)


def load_policy(args, stored, device):
    """The policy of a finished run: adapter.pt holds what was trained and the base it belongs to."""
    model = MotionDiffusion(args, datasets.Vocabulary(stored["words"]),
                            representations.width(args.representation, features.T2M))
    model.load_state_dict(stored["base"])
    policy = make_policy(args, model, stored["tokens"], device)
    policy.tuned.load(stored["weights"])
    return policy


def make_network(args, policy, model, captions, mask, calls):
    """network(x, i) -> e for `denoise`, counted in calls; made without gradients, it reads captions once."""
    scale = 1 if args.guidance_scale == 1.0 else 2
    known = None if torch.is_grad_enabled() else model.encode_text(captions)

    def answer(x, i):
        text, text_mask = known or model.encode_text(captions)
        timesteps = x.new_full((len(x),), float(policy.table.timesteps[i]))
        return predict(model, x, timesteps, mask, text, text_mask, args.guidance_scale)

    def network(x, i):
        graph = torch.is_grad_enabled()
        calls["calls"] += len(x) * scale * (2 if graph else 1)  # a backward pass counts as a call
        if graph and args.checkpointing:
            return checkpoint(answer, x, i, use_reentrant=False)
        return answer(x, i)
    return network


def start_noise(policy, lengths, seed, iteration, purpose, indices):
    """x_0 (b n c), zero on padding, and mask (b n). Each sample has a noise stream of its own, so it does not
    depend on its batch, device or process."""
    model = policy.tuned.model
    mask = model.codec.mask(lengths, policy.tokens)
    streams, shape = (generator(seed, iteration, purpose, k) for k in indices), (policy.tokens, model.dims)
    noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
    return (noise * mask[..., None]).to(policy.device), mask.to(policy.device)


def collect(args, policy, prompts, table, iteration, rank, processes):
    """Stage 1, ask: prompts (caption, clip), lengths and start noise; each process takes its share."""
    g = generator(args.seed, iteration, "prompts")
    chosen = [prompts[k] for k in torch.randint(len(prompts), (args.batch,), generator=g).tolist()]
    lengths, real = datasets.draw_lengths(table, [caption for caption, _ in chosen], g), None
    index = [k for k in range(args.batch) if k * processes // args.batch == rank]
    if args.w_m2m:  # compared with its own clip, and as long as that
        clips = datasets.collate([clip for _, clip in chosen])
        real = representations.from_features(clips.motion[index], args.representation, features.T2M)
        lengths, real = clips.lengths, (real.to(policy.device), clips.lengths[index].to(policy.device))
    noise, mask = start_noise(policy, lengths[index], args.seed, iteration, "rollout", index)
    return dict(captions=[chosen[k][0] for k in index], real=real, noise=noise, mask=mask,
                lengths=lengths[index].to(policy.device), route=generator(args.seed, iteration, "route"))


class Updates:
    """Losses into steps of the optimiser, by --update: one for each loss, at once ("step"); one for each once
    the pass is over, so that all gradients are of the weights at its start ("chain"; [ME] has a second copy
    of the network for that); one for their sum ("accum")."""

    def __init__(self, args, parameters):
        self.args, self.parameters, self.count, self.norms, self.kept = args, parameters, 0, [], []
        self.optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)

    def learn(self, loss, where):
        """Take in the gradient of a loss."""
        loss.backward()
        if self.args.update == "step":
            self.step(where)
        elif self.args.update == "chain":
            self.kept.append([p.grad for p in self.parameters])
            self.optimizer.zero_grad()

    def end(self, where):
        """The pass is over -> mean gradient norm of its updates, before the clip."""
        for gradients in self.kept:
            for parameter, gradient in zip(self.parameters, gradients):
                parameter.grad = gradient
            self.step(where)
        if self.args.update == "accum":
            self.step(where)
        norms, self.norms, self.kept = self.norms, [], []
        return sum(norms) / len(norms)

    def step(self, where):
        """Clip and step; the rate rises with the count of updates."""
        training.all_reduce_grads(self.parameters)
        self.norms.append(training.clip_gradients(self.parameters, self.args.max_grad_norm, where))
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(1.0, self.count / max(1, self.args.warmup))
        self.optimizer.step()
        self.optimizer.zero_grad()


def update(args, policy, reward_model, batch, asked, updates, progress, loop, iteration):
    """Stage 2, walk, judge, learn: one pass under the method's route -> values to log."""
    route, table, share = draw_route(args, progress, batch["route"]), policy.table, len(asked) / args.batch
    log = {"calls": 0.0, "anchor": 0.0}
    network = make_network(args, policy, policy.tuned.model, batch["captions"], batch["mask"], log)
    with torch.no_grad(), policy.tuned.base() as base:
        reference = make_network(args, policy, base, batch["captions"], batch["mask"], log)

    def judge(i, z, e, trail):
        loop.check()
        level = float(table.level[i + 1]) if route.judged[i] == "xt" else 0.0
        terms = reward_terms(reward_model, policy.tuned.model.codec.decode(z), batch["lengths"], asked,
                             args, level, batch["real"])
        loss, loop.rewards = -terms["total"].mean(), terms["total"].detach()
        if args.beta_anchor:
            if args.method != "easytune":  # one step of its way stands for the whole chain
                i = int(torch.randint(len(trail), (), generator=batch["route"]))
                e = network(trail[i], i)
            with torch.no_grad(), policy.tuned.base():
                e_ref = reference(trail[i], i)
            anchor = anchor_loss(e, e_ref, batch["mask"]).mean()
            loss = loss + args.beta_anchor * anchor
            log["anchor"] += share * anchor.item() / len(route.judged)
        training.check_loss(loss, f"iteration {iteration}, step {i}")
        updates.learn(share * loss, f"iteration {iteration}, step {i}: gradient norm")
        log.update({name: share * value.mean().item() for name, value in terms.items()})  # last judged step

    with memory.SavedBytes(policy.tuned.model, reward_model) as saved:
        denoise(network, table, batch["noise"], route, judge)
    log["grad_norm"] = updates.end(f"iteration {iteration}: gradient norm")
    return training.reduce_log(log | {"saved_mb": saved.peak / 2**20}, highest={"saved_mb", "grad_norm"})


LOG_FIELDS = ("iteration", "samples", "updates", "calls", "total", *TERMS, "anchor", "grad_norm", "saved_mb",
              "val_reward", "val_judge", "val_oracle", "val_preference", "val_authenticity", "val_fid",
              "val_diversity", "val_foot_skate", "val_jerk", "val_speed")


def train(start, policy, scorers, source, target, folder):
    """The loop. Only policy.tuned changes -> what the looks at val found."""
    args, (rank, processes) = start.args, runs.world(policy.device)
    clips = {caption: clip for clip in target.splits["train"] for caption in clip.captions}
    prompts = sorted(clips.items(), key=lambda pair: pair[0])  # the clip is for --w-m2m alone
    table = datasets.length_table(source.splits["train"])
    wrong = retrieval.wrong_captions([caption for caption, _ in prompts], args.seed)
    updates, watch, shown, best, calls = Updates(args, policy.tuned.parameters()), start.watch, {}, None, 0.0
    origin = {"data read": source.fingerprint + target.fingerprint}
    print(f"  {len(prompts)} prompts, {args.batch} a batch; {args.method}, {args.steps} steps; "
          f"{lora.count(updates.parameters)} of {lora.count(policy.tuned.model.parameters())} weights")
    with runs.Loop("stepwise", start, folder, LOG_FIELDS, origin, policy.tuned.model) as loop:
        if loop.state:
            policy.tuned.load(loop.state["weights"])
            updates.optimizer.load_state_dict(loop.state["optimizer"])
            updates.count, calls, best = loop.state["updates"], loop.state["calls"], loop.state["best"]
        for iteration in loop:
            with watch.stage("update"):
                batch = collect(args, policy, prompts, table, iteration, rank, processes)
                asked = [wrong[c] if args.reward == "shuffled" else c for c in batch["captions"]]
                values = update(args, policy, scorers.reward_model, batch, asked, updates,
                                iteration / args.iterations, loop, iteration)
            calls += values.pop("calls")
            row = dict.fromkeys(LOG_FIELDS) | values | {
                "iteration": iteration, "updates": updates.count, "samples": args.batch * (iteration + 1),
                "calls": calls}
            if (iteration + 1) % args.eval_every == 0 or iteration + 1 == args.iterations:
                with watch.stage("validation"):
                    val = evaluate.evaluate(target.splits["val"], scorers, policy_sampler(args, policy),
                                           purpose="validation")
                row |= {name: val[name[4:]][0] for name in LOG_FIELDS if name.startswith("val_")}
                shown = {name: row[name] for name in ("val_reward", "val_judge", "val_oracle")}
                if best is None or row["val_judge"] > best["judge"]:
                    best = dict(iteration=iteration, judge=row["val_judge"], weights=policy.tuned.state())
            loop.end(row, {"total": row["total"], **shown},
                     {"weights": policy.tuned.state(), "optimizer": updates.optimizer.state_dict(),
                      "updates": updates.count, "calls": calls, "best": best})
    if args.keep == "best":
        policy.tuned.load(best["weights"])
    return {"iteration": best["iteration"], "val_judge": best["judge"], "kept": args.keep}


# ---- 8. Evaluation and pictures ----------------------------------------------------------------------------


def policy_sampler(args, policy, adapted=True, seed=None):
    """The denoiser as a sampler for common/evaluate.py, trained or not. Sample k of a call always starts from
    the same noise: base and tuned are compared in pairs."""
    @torch.no_grad()
    def sample(captions, lengths, rows, purpose, repeat):
        x, mask = start_noise(policy, lengths, args.seed if seed is None else seed, repeat, purpose, rows)
        with contextlib.nullcontext(policy.tuned.model) if adapted else policy.tuned.base() as model:
            network = make_network(args, policy, model, captions, mask, {"calls": 0})
            x = denoise(network, policy.table, x, Route((False,) * args.steps, {}))
        motion = model.codec.decode(x).cpu()
        return representations.to_features(motion, lengths, args.representation, features.T2M), None
    return evaluate.in_chunks(sample)


def write_prompts(args, stored, folder, device):
    """--prompt: GIF, joints and BVH of every caption, from adapter.pt alone."""
    policy = load_policy(args, stored, device)
    before = {"before": policy_sampler(args, policy, False)} if args.compare else {}
    evaluate.export(folder, args.prompt, args.length or stored["frames"], stored["tokens"] * args.patch,
                   features.T2M, before | {"after": policy_sampler(args, policy)})


def build_reward(args, source, target, policy, base, device):
    """MotionReward, whose heads know the base's own motions, and the judge; they share no clip."""
    seen, model = [source] if args.reward_data == "source" else [source, target], policy.tuned.model
    options = dict(seed=args.base_seed, cache_dir=args.cache_dir, use_cache=args.cache, device=device)
    judge, notes = retrieval.rewards_and_judge([], [source, target], saw="", losses=(),
                                                iterations=args.reward_iterations, **options)
    sampler = policy_sampler(args, policy, adapted=False, seed=args.base_seed)

    def noised(motion, lengths, level, g):  # what x_t looks like, for a reward that is to judge it
        x, t = model.codec.encode(motion), 1 - level if args.generator == "flow" else level
        noise = torch.randn(x.shape, generator=g).to(x)
        x_t, _ = denoising.corrupt(x, noise, (t * (denoising.TIMESTEPS - 1)).long(), args.schedule,
                                   args.prediction)
        return model.codec.decode(x_t)
    reward_model, notes["reward"] = motion_reward.fit_motion_reward(
        seen, lambda: motion_reward.draw_motions(sampler, seen, args.generated, args.base_seed),
        representation=args.representation, iterations=args.reward_iterations, spl=args.spl,
        spl_iterations=args.spl_iterations, head_iterations=args.head_iterations, **options,
        noise=None if args.reward_input == "x0hat" else noised,
        saw=[base, args.steps, args.spacing, args.guidance_scale, args.generated])
    return reward_model, judge, notes


def main(argv):
    """Prepare; then train, evaluate and draw, or do one of the two things a finished adapter is for."""
    start = runs.prepare(Args, TINY, argv, __doc__, method="stepwise", product="stepwise-adapter",
                         check=check_args)
    args, stored, device, rank, watch = start.args, start.stored, start.device, start.rank, start.watch
    if args.prompt:
        write_prompts(args, stored, start.open_folder(), device)
        return
    with watch.stage("data"):
        source, target = datasets.load_pair(
            args.source, args.dataset, clips=(args.source_clips, args.target_clips), data_root=args.data_root,
            cache_dir=args.cache_dir, seed=args.base_seed, use_cache=args.cache)
    folder = start.open_folder()
    print(f"{device}, {start.threads} CPU thread(s)\n  source: {source.label}\n  target: {target.label}")
    with watch.stage("base"):
        if stored:
            policy, kept, notes = load_policy(args, stored, device), stored, {}
        else:
            model, notes = build_base(args, source, device)
            tokens = model.codec.count(max(source.longest, target.longest))
            kept = {"base": {k: v.cpu().clone() for k, v in model.state_dict().items()},
                    "words": model.vocabulary.words, "tokens": tokens, "frames": source.usual_length}
            policy = make_policy(args, model, tokens, device)
    with watch.stage("reward model and judge"):
        reward_model, judge, parts = build_reward(args, source, target, policy, kept["base"], device)
    scorers = evaluate.Scorers(reward_model, judge, source.skeleton, reward_model.columns)
    about = start.about(folder, parts | {"base": notes}, source, target)
    if not stored:
        about["best look"] = train(start, policy, scorers, source, target, folder)
        if rank:
            return
        runs.save_checkpoint(folder / "adapter.pt", kind="stepwise-adapter", keep_previous=False, data={
            "args": runs.shaping_args(args), "weights": policy.tuned.state(), **kept})
    with watch.stage("evaluation"):
        base, tuned = policy_sampler(args, policy, adapted=False), policy_sampler(args, policy)
        tables = evaluate.final_tables(source, target, scorers, base, tuned, args.eval_repeats, args.best_of)
    with watch.stage("pictures"):
        evaluate.draw(folder, target.splits["test"], scorers, {"before": base, "after": tuned}, not stored)
    motions = 0 if stored else args.iterations * args.batch
    runs.finish(folder, watch, {**about, **tables, "counts": {"motions": motions}})


if __name__ == "__main__":
    runs.run_main(main)
