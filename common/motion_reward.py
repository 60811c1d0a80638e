"""MotionReward (MotionRFT, arXiv 2603.27185): one reward model for several motion representations.

  1. losses      semantics, self-refinement (SPL), heads, and the weighted reward: pure functions
  2. network     codec and projection of each representation, shared encoder, text encoder, decoder; two heads
                 on adapters of their own
  3. semantics   stage 1 and SPL: captions and motions in one space
  4. heads       preference (is it damaged?) and authenticity (is it real?), the backbone frozen
  5. all of it   fit_motion_reward

Of the paper only abstract, captions and theorem list could be read; the rest follows the public code: [MR] is
github.com/Xiaofeng-Tan/MotionRFT, [ME] is github.com/wengwanjiang/EasyTune. SPL's equation is in neither the
readable text nor [MR]; spl_paper is the Bradley-Terry reading of what [ME] does. Nobody judged anything here:
preference is "less damaged", learned from pairs that common/perception.py makes.
Letters: b batch, t frames, n tokens of four frames, k components, w width of a representation, c latent.
"""
import inspect
import math
import re
import sys

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import (
    InputError, TransformerLayer, datasets, features, generator, length_mask, padded, patches,
    perception, representations, retrieval, sinusoid, training)
from common.patches import PatchCodec
from common.perception import ranking_loss
from common.representations import REPRESENTATIONS, convert_clips, features_of_joints, from_features
from common.retrieval import freeze, info_nce
from common.vae import Skips, gaussian_kl

# ---- 1. Losses ---------------------------------------------------------------------------------------------


def kl4(mu_t, logvar_t, mu_m, logvar_m):
    """KL(t|m) + KL(m|t) + KL(m|N) + KL(t|N) of text and motion latents, N standard normal [MR]."""
    zero = torch.zeros_like(mu_t)
    return (gaussian_kl(mu_t, logvar_t, mu_m, logvar_m) + gaussian_kl(mu_m, logvar_m, mu_t, logvar_t)
            + gaussian_kl(mu_m, logvar_m, zero, zero) + gaussian_kl(mu_t, logvar_t, zero, zero))


# The weights of [MR], L1 = SEMANTIC + .1 CROSS, are for 50 epochs on a GPU. Not in the paper: InfoNCE counts
# more, above all between representations. R@1 after 300 batches of 96, mean of the three representations
# on val and test of embedded KIT, one seed: .74 with theirs, .74 with nce 1 in SEMANTIC, .82 in both.
PAPER_SEMANTIC = {"rec": 1.0, "kl": 1e-5, "latent": 1e-5, "nce": 0.1}
PAPER_CROSS = {"latent": 0.1, "kl": 1e-5, "nce": 0.1}
SEMANTIC = {"rec": 1.0, "kl": 1e-5, "latent": 1e-5, "nce": 1.0}
CROSS = {"latent": 0.1, "kl": 1e-5, "nce": 1.0}


def reconstruction(decoded_t, decoded_m, tokens):
    """Smooth L1 of what is decoded from text and from motion (b n k) to the tokens, and of the two to each
    other (the last in [MR] only). Padded rows are equal in all three, and count in the means."""
    return (F.smooth_l1_loss(decoded_t, tokens) + F.smooth_l1_loss(decoded_m, tokens)
            + F.smooth_l1_loss(decoded_m, decoded_t))


def semantic_losses(z_t, z_m, gauss_t, gauss_m, decoded_t, decoded_m, tokens, duplicates=None):
    """The terms of stage 1 [MR] as a dict. z_t, z_m (b c) latents; gauss_t, gauss_m their (mu, logvar);
    decoded_t, decoded_m, tokens (r n k), padded rows equal in all three; duplicates (b b) bool."""
    return {"rec": reconstruction(decoded_t, decoded_m, tokens),
            "kl": kl4(*gauss_t, *gauss_m), "latent": F.smooth_l1_loss(z_m, z_t),
            "nce": info_nce(z_t, z_m, duplicates=duplicates)}


def cross_losses(z_a, z_b, gauss_a, gauss_b):
    """The terms that tie two representations of the SAME clips (b c), without a filter [MR]."""
    return {"latent": F.smooth_l1_loss(z_a, z_b), "kl": gaussian_kl(*gauss_a, *gauss_b)
            + gaussian_kl(*gauss_b, *gauss_a), "nce": info_nce(z_a, z_b)}


def weighted_sum(terms, weights):
    """Sum of the terms that have a weight, for losses and for the reward."""
    return sum(weight * terms[name] for name, weight in weights.items() if weight)


def mine(text, motion, k, duplicates=None):
    """Where retrieval fails now -> cosines (b b), fail (b) bool, top (b k): the motions ranked first.

    text, motion (b c); fail: the own motion is not among the first k. duplicates (b b) bool: motions that fit
    the caption as well; they are no losers. ([ME] has no such filter and pushes equal captions apart.)
    """
    b = len(text)
    if not 1 <= k < b:
        raise ValueError(f"top {k} of {b} motions: nothing would ever fail")
    similarity = F.normalize(text, dim=-1) @ F.normalize(motion, dim=-1).T                         # b b
    own = torch.eye(b, dtype=torch.bool, device=text.device)
    ranked = similarity.detach()
    if duplicates is not None:
        ranked = ranked.masked_fill(duplicates & ~own, -math.inf)
    top = ranked.topk(k, dim=1).indices                                                            # b k
    fail = (top != torch.arange(b, device=text.device)[:, None]).all(1)
    return similarity, fail, top


def spl_paper(text, motion, k, duplicates=None, temperature=0.1):
    """SPL, self-refinement preference learning, read as Bradley-Terry: where retrieval fails, the own motion
    is to beat the one ranked first. Mean over ALL rows of fail * softplus((S_loser - S_own) / temperature).

    The paper's equation is unknown.
    """
    similarity, fail, top = mine(text, motion, k, duplicates)
    margin = similarity.gather(1, top[:, :1])[:, 0] - similarity.diagonal()                        # b
    return (fail * F.softplus(margin / temperature)).mean()


def fine(similarity, fail, high=0.8):
    """Rows (b) that [ME] takes for solved: own motion among the first k, or ANY cosine of the row high."""
    return ~fail | (similarity > high).any(1)


def spl_code(text, motion, k, duplicates=None, temperature=0.1, high=0.8):
    """SPL as [ME] computes it, oddities kept: the temperature acts twice, any motion of the row above `high`
    makes it fine, and a fine row is pulled to a tie of (first, own) instead of being left alone."""
    similarity, fail, top = mine(text, motion, k, duplicates)
    pair = torch.stack([similarity.gather(1, top[:, :1])[:, 0], similarity.diagonal()], 1)         # b 2
    solved = fine(similarity, fail, high)
    target = torch.where(solved[:, None], pair.new_tensor([0.5, 0.5]), pair.new_tensor([0.0, 1.0]))
    logp = (pair / temperature / temperature).log_softmax(1)
    return F.kl_div(logp, target, reduction="batchmean")


SPL = {"paper": spl_paper, "code": spl_code}


def authenticity_loss(logits, generated):
    """Cross-entropy of logits (b 2), class 0 real and class 1 generated; generated (b) bool [MR]."""
    return F.cross_entropy(logits, generated.long())


def p_real(logits):
    """P(real) (b) of authenticity logits (b 2): the authenticity reward [MR]."""
    return logits.softmax(-1)[..., 0]


# ---- 2. Network --------------------------------------------------------------------------------------------
# No dropout anywhere (.1 in [MR]): the reward is one function, in training and in use. Noise on the input
# tokens and dropped words are the regularisers, as in retrieval.train_retrieval.

# "tiny" of [MR], the released scripts' size: width 256, latent 128, 3 layers, 4 heads, ff 512
SIZES = dict(width=64, latent=64, layers=3, heads=4, ff=128, components=64, max_words=32, rank=16, alpha=32)
PATCH = 4                                                # frames a token
TARGETS = r"self_attn|linear1|linear2|projections"       # what the adapters act on, as in [MR]
HEADS = ("preference", "authenticity")
TERMS = ("semantic", "m2m", *HEADS)


def mlp(*sizes):
    """Linear layers with a GELU between them."""
    layers = [layer for pair in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*layers[:-1])


class LatentEncoder(Skips):
    """[global token, x (b n c)] and mask (b n) -> mean and log variance (b c) of a latent.

    A transformer with skips like a U-Net's [MR]: the last layers also read what the first ones wrote.
    Not in the paper: sinusoidal positions instead of learned ones.
    """

    def __init__(self, width, latent, layers, heads, ff):
        super().__init__([TransformerLayer(width, heads, ff) for _ in range(layers)], width)
        self.token = nn.Parameter(torch.zeros(width))  # its position tells it from the others
        self.head = nn.Linear(width, 2 * latent)

    def forward(self, x, mask):
        x = torch.cat([repeat(self.token, "c -> b 1 c", b=len(x)), x], 1)
        x, mask = x + sinusoid(x.shape[1], x.shape[2], x.device), F.pad(mask, (1, 0), value=True)
        return self.head(super().forward(x, mask)[:, 0]).chunk(2, -1)


class Backbone(nn.Module):
    """Tokens (b n k) of one representation, mask (b n), noise level (b) -> mean, log variance (b c)."""

    def __init__(self, width, latent, layers, heads, ff, components):
        super().__init__()
        self.projections = nn.ModuleDict({name: mlp(components, width, width) for name in REPRESENTATIONS})
        self.time = mlp(width, width, width)
        self.encoder = LatentEncoder(width, latent, layers, heads, ff)

    def forward(self, tokens, mask, level, representation):
        x = self.projections[representation](tokens)                                               # b n c
        waves = torch.exp(torch.arange(x.shape[-1] // 2, device=x.device) * (-8.0 / (x.shape[-1] // 2)))
        angle = 1000 * level[:, None] * waves
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        return self.encoder(torch.cat([time[:, None], x], 1), F.pad(mask, (1, 0), value=True))


class Adapter(nn.Module):
    """LoRA values of one head for the linears of a backbone: W x -> (W + alpha / rank B A) x, B = 0 at first.

    They never enter the backbone: `weights` is handed to functional_call. So nothing has to be switched on
    or off, and without an adapter the backbone computes what it would have computed without any. [MR] writes
    them into the modules, and needs a copy of the encoder for its second head. No dropout (.1 in [MR]).
    """

    def __init__(self, backbone, rank, alpha):
        super().__init__()
        self.rank, self.scaling = rank, alpha / rank
        linears = {name: layer for name, layer in backbone.named_modules()
                   if isinstance(layer, nn.Linear) and re.search(TARGETS, name)}
        self.names = list(linears)
        self.A = nn.ParameterList(torch.zeros(rank, layer.in_features) for layer in linears.values())
        self.B = nn.ParameterList(torch.zeros(layer.out_features, rank) for layer in linears.values())

    def initialise(self, g):
        """Draw A as common/lora.py does."""
        for A in self.A:
            bound = 1 / math.sqrt(A.shape[1])
            A.data.uniform_(-bound, bound, generator=g)

    def weights(self, backbone):
        """{parameter name: adapted weight} of the backbone, its own weights without gradient."""
        return {f"{name}.weight": backbone.get_parameter(f"{name}.weight").detach() + self.scaling * B @ A
                for name, A, B in zip(self.names, self.A, self.B)}


class Decoder(nn.Module):
    """Latent (b c), mask (b n) -> tokens (b n k) of a representation; only training uses it."""

    def __init__(self, width, latent, heads, ff, components):
        super().__init__()
        self.width, self.memory = width, nn.Linear(latent, width)
        self.layer = TransformerLayer(width, heads, ff, cross=True)  # Not in the paper: one layer for all
        self.out = nn.ModuleDict({name: nn.Linear(width, components) for name in REPRESENTATIONS})

    def forward(self, latent, mask, representation):
        queries = repeat(sinusoid(mask.shape[1], self.width, latent.device), "n c -> b n c", b=len(latent))
        x = self.layer(queries, mask, memory=self.memory(latent)[:, None])
        return self.out[representation](x) * mask[..., None]


class MotionReward(nn.Module):
    """Captions and motions of all representations in one space, and two heads. Motions come in raw.

    Not in the paper: tokens of four frames in 64 whitened components (PatchCodec) in place of an MLP on every
    frame, which spares most of the cost on a CPU; a learned word table in place of Sentence-T5; and the mean
    latent in use, where the public code samples one, in evaluation too: a noisy reward with a noisy gradient.
    """

    def __init__(self, vocabulary, skeleton, *, width, latent, layers, heads, ff, components, max_words, rank,
                 alpha, has_heads=False):
        super().__init__()
        self.config = dict(width=width, latent=latent, layers=layers, heads=heads, ff=ff, rank=rank,
                           alpha=alpha, components=components, max_words=max_words)
        self.vocabulary, self.skeleton, self.has_heads = vocabulary, skeleton, has_heads  # trained ones
        widths = {name: representations.width(name, skeleton) for name in REPRESENTATIONS}
        self.codecs = nn.ModuleDict({name: PatchCodec(PATCH, w, components) for name, w in widths.items()})
        self.backbone = Backbone(width, latent, layers, heads, ff, components)
        self.words = nn.Embedding(len(vocabulary), width)
        self.text_encoder = LatentEncoder(width, latent, layers, heads, ff)
        self.decoder = Decoder(width, latent, heads, ff, components)
        self.heads = nn.ModuleDict({"preference": mlp(latent, 2 * latent, latent, latent // 2, 1),
                                    "authenticity": mlp(latent, 2 * latent, latent, latent // 2, 2)})
        self.adapters = nn.ModuleDict({name: Adapter(self.backbone, rank, alpha) for name in self.heads})
        self.register_buffer("preference_mean", torch.zeros(len(REPRESENTATIONS)))
        self.register_buffer("preference_std", torch.ones(len(REPRESENTATIONS)))

    # -- motion and text -> latent --

    def tokenise(self, motion, lengths, representation):
        """Raw motion (b t w), anything behind the ends, lengths (b) in frames -> tokens (b n k), mask (b n).

        Frames that fill no patch of four are left out.
        """
        codec = self.codecs[representation]
        if motion.shape[-1] != len(codec.mean):
            raise ValueError(f"{representation} of width {motion.shape[-1]}, this model reads "
                             f"{len(codec.mean)}")
        if lengths.min() < PATCH or lengths.max() > motion.shape[1]:
            raise ValueError(f"lengths {lengths.tolist()} are not {PATCH} to {motion.shape[1]} frames")
        n = int(lengths.max()) // PATCH
        mask = length_mask(lengths // PATCH, n)
        motion = motion[:, :n * PATCH]
        real = repeat(mask, "b n -> b (n p) 1", p=PATCH)
        return codec.encode(torch.where(real, motion, codec.mean)) * mask[..., None], mask

    def encode(self, tokens, mask, representation, level=None, adapter=None):
        """Tokens (b n k), mask (b n) -> mean, log variance (b c); adapter: None or the name of a head."""
        level = tokens.new_zeros(len(tokens)) if level is None else level.to(tokens)
        inputs = tokens, mask, level, representation
        if adapter is None:
            return self.backbone(*inputs)
        return functional_call(self.backbone, self.adapters[adapter].weights(self.backbone), inputs)

    def embed_motion(self, motion, lengths, representation="features", level=None, adapter=None):
        """Raw motion (b t w), lengths (b) -> mean latents (b c), not of unit length.

        level (b): share of noise in the motion, 0 to 1, by default 0. It means something only to a model that
        was trained on noised motions; heads always learn from clean ones.
        """
        tokens, mask = self.tokenise(motion, lengths, representation)
        return self.encode(tokens, mask, representation, level, adapter)[0]

    def encode_text(self, ids, mask):
        """Word ids (b n), mask (b n) -> mean, log variance (b c)."""
        return self.text_encoder(self.words(ids), mask)

    def embed_text(self, captions):
        """Captions (list of b) -> mean latents (b c)."""
        ids, mask = self.vocabulary.encode(captions, self.config["max_words"])
        device = self.words.weight.device
        return self.encode_text(ids.to(device), mask.to(device))[0]

    # -- scores --

    def similarity(self, motion, lengths, captions, representation="features"):
        """Cosine (b) of each motion with its caption; differentiable in the motion."""
        motion = self.embed_motion(motion, lengths, representation)
        return F.cosine_similarity(motion, self.embed_text(captions), dim=-1)

    def head(self, name, tokens, mask, representation, level=None):
        """What the head "preference" (b 1) or "authenticity" (b 2) says, through its own adapter."""
        return self.heads[name](self.encode(tokens, mask, representation, level, name)[0])

    def standardised(self, scores, representation):
        """Preference scores (b), 0 for the average motion of the base generator; 1 is one spread of those."""
        row = REPRESENTATIONS.index(representation)
        return (scores - self.preference_mean[row]) / self.preference_std[row]

    def reward(self, motion, lengths, captions, representation, weights, real=None, level=None):
        """R of section 2.4: raw motion (b t w), lengths (b), captions -> {term: (b)} and their weighted sum
        "total"; differentiable in the motion.

        weights: {"semantic", "m2m", "preference", "authenticity": float}; a term with weight 0 or none is not
        computed. semantic: cosine with the caption; m2m: cosine with `real` = (raw motion, lengths), the
        recording of the caption, which makes it supervised; preference: standardised; authenticity: P(real).
        """
        wanted = [name for name, weight in weights.items() if weight]
        if not wanted:
            raise ValueError("no reward has a weight")
        if unknown := set(weights) - set(TERMS):
            raise ValueError(f"no such reward: {', '.join(sorted(unknown))}")
        if not self.has_heads and set(HEADS) & set(wanted):
            raise ValueError("the heads are not trained")
        tokens, mask = self.tokenise(motion, lengths, representation)
        terms = {}
        if {"semantic", "m2m"} & set(wanted):
            z = self.encode(tokens, mask, representation, level)[0]
        if "semantic" in wanted:
            terms["semantic"] = F.cosine_similarity(z, self.embed_text(captions), dim=-1)
        if "m2m" in wanted:
            terms["m2m"] = F.cosine_similarity(z, self.embed_motion(*real, representation), dim=-1)
        if "preference" in wanted:
            score = self.head("preference", tokens, mask, representation, level)[:, 0]
            terms["preference"] = self.standardised(score, representation)
        if "authenticity" in wanted:
            terms["authenticity"] = p_real(self.head("authenticity", tokens, mask, representation, level))
        return terms | {"total": weighted_sum(terms, weights)}

    @torch.no_grad()
    def columns(self, motion, lengths, captions, clips):
        """What the heads say of raw features (b t d), as further columns of the tables: {term: (b)}; {}
        without heads."""
        if not self.has_heads:
            return {}
        device = self.words.weight.device
        terms = self.reward(motion.to(device), lengths.to(device), captions, "features",
                            dict.fromkeys(HEADS, 1.0))
        return {name: terms[name].double().cpu().numpy() for name in HEADS}

    # -- files --

    def export(self):
        """Plain dict (tensors, strings, numbers) for caches; MotionReward.load reads it."""
        return {"config": dict(self.config), "words": list(self.vocabulary.words),
                "has_heads": self.has_heads, "skeleton": self.skeleton.feature_dim,
                "state": {key: value.detach().cpu().clone() for key, value in self.state_dict().items()}}

    @classmethod
    def load(cls, exported):
        """Model from what export() returned; strict."""
        with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
            model = cls(datasets.Vocabulary(exported["words"]), features.SKELETONS[exported["skeleton"]],
                        has_heads=exported["has_heads"], **exported["config"])
        model.load_state_dict(exported["state"])
        return model


# ---- 3. Semantics ------------------------------------------------------------------------------------------

# Features divide the std of numbers of the whole body by this, so that turning and walking are not lost among
# the limbs (see retrieval.fit_retrieval); in joints the path is large as it is.
ROOT_BIAS = {"features": 5.0, "joints": 1.0, "rotations": 5.0}
WHITENING = 0.5


class Library:
    """Training clips ready to be drawn: tokens of all representations, words, who means the same as whom.

    Fits the model's codecs. The bases are fixed, so every clip is tokenised once.
    """

    def __init__(self, model, clips, keep):
        self.model, self.device = model, model.words.weight.device
        self.tokens = {}
        for name, codec in model.codecs.items():
            converted = convert_clips(clips, name, model.skeleton)
            statistics = datasets.Statistics.from_clips(
                converted, "scorer", ROOT_BIAS[name], blocks=representations.blocks(name, model.skeleton))
            codec.fit(converted, statistics, whitening=WHITENING)
            motions = [torch.from_numpy(clip.features) for clip in converted]  # t w
            self.tokens[name] = [self._tokens(motion, name) for motion in motions]
            if name == keep:
                self.raw = motions  # to be noised
        self.ids, self.mask = model.vocabulary.encode([c for clip in clips for c in clip.captions],
                                                      model.config["max_words"])
        self.offsets = torch.tensor([0] + [len(clip.captions) for clip in clips]).cumsum(0)
        self.signatures = [retrieval.signature(a) for clip in clips for a in clip.attributes]
        self.idf = retrieval.inverse_document_frequency(self.ids, len(model.vocabulary))

    def _tokens(self, motion, name):
        motion = motion[None].to(self.device)
        return self.model.tokenise(motion, torch.tensor([motion.shape[1]], device=self.device), name)[0][0]

    def draw(self, batch, g):
        """Rows of clips, and a random caption of each: (rows (b), lines (b), duplicates (b b))."""
        rows = torch.randperm(len(self.raw), generator=g)[:batch]
        draw = torch.rand(len(rows), generator=g)
        lines = self.offsets[rows] + (draw * (self.offsets[rows + 1] - self.offsets[rows])).long()
        duplicates = retrieval.duplicate_pairs(
            self.ids[lines], [self.signatures[line] for line in lines.tolist()], self.idf)
        return rows, lines, duplicates.to(self.device)

    def text(self, lines, word_drop, g):
        """Word ids and mask (b n) of captions, a share of the words unknown."""
        ids, mask = self.ids[lines], self.mask[lines]
        n = int(mask.sum(1).max())
        ids, mask = ids[:, :n], mask[:, :n]
        dropped = (torch.rand(ids.shape, generator=g) < word_drop) & mask
        return ids.masked_fill(dropped, 1).to(self.device), mask.to(self.device)

    def motion(self, rows, name):
        """Tokens (b n k) and mask (b n) of clips in one representation."""
        return padded([self.tokens[name][row] for row in rows.tolist()])

    def noised(self, rows, name, noise, g):
        """The same from noised motions, and the levels (b), uniform in (0, .5]."""
        raw = [self.raw[row] for row in rows.tolist()]
        lengths = torch.tensor([len(motion) for motion in raw], device=self.device)
        level = (0.5 * (1 - torch.rand(len(rows), generator=g))).to(self.device)
        motion = noise(pad_sequence(raw, batch_first=True).to(self.device), lengths, level, g)
        return *self.model.tokenise(motion, lengths, name), level


PARTNER = {"features": "joints", "joints": "features", "rotations": "features"}  # for the cross loss
DECODED = 3     # one row in so many is decoded, or the decoder would cost a third of the time
SPL_WEIGHT = 0.1  # .01 in [ME], where InfoNCE has .1 and not 1
LR = {"stage 1": 2e-3, "SPL": 2e-4, "heads": 2e-3}  # 1e-4, 1e-5 and 1e-4 in the public code


def train_semantics(model, library, *, stage, iterations, batch, seed, representation, noise=None, spl="",
                    semantic=SEMANTIC, cross=CROSS, token_noise=0.3, word_drop=0.1, weight_decay=1e-2):
    """Stage 1, or SPL on top of its losses (spl: "paper" or "code") -> {"loss", "failed"}: of the last tenth
    of the iterations, and the share of rows that SPL worked on in all of them.

    One representation an iteration in turn; every second batch ties it to another one of the same clips.
    noise: half of the batches of `representation` pass through it and carry its level as the time.
    """
    parameters = [parameter for part in (model.backbone, model.words, model.text_encoder, model.decoder)
                  for parameter in part.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=LR[stage], weight_decay=weight_decay)
    rates, losses, failed = training.rise_and_cosine(optimiser, iterations), [], []
    bar = tqdm(range(iterations), desc=f"motion reward, {stage}", mininterval=1.0)
    for iteration in bar:
        g = generator(seed, iteration, f"motion_reward {stage}")
        rows, lines, duplicates = library.draw(batch, g)
        name, level = REPRESENTATIONS[iteration % 3], None
        if noise and name == representation and torch.rand((), generator=g) < 0.5:
            tokens, mask, level = library.noised(rows, name, noise, g)
        else:
            tokens, mask = library.motion(rows, name)

        def spoiled(tokens):
            return tokens + token_noise * torch.randn(tokens.shape, generator=g).to(tokens)
        gauss_m = model.encode(spoiled(tokens), mask, name, level)
        gauss_t = model.encode_text(*library.text(lines, word_drop, g))
        z_t, z_m = gauss_t[0], gauss_m[0]  # Not in the paper: the means meet, and samples are decoded
        decoded = []
        for mu, logvar in (gauss_t, gauss_m):
            mu, std = mu[::DECODED], (logvar[::DECODED] / 2).exp()
            z = mu + std * torch.randn(mu.shape, generator=g).to(mu)
            decoded.append(model.decoder(z, mask[::DECODED], name))
        loss = weighted_sum(semantic_losses(z_t, z_m, gauss_t, gauss_m, *decoded, tokens[::DECODED],
                                            duplicates), semantic)
        if iteration % 2:
            other, other_mask = library.motion(rows, PARTNER[name])
            gauss_o = model.encode(spoiled(other), other_mask, PARTNER[name])
            loss = loss + weighted_sum(cross_losses(z_m, gauss_o[0], gauss_m, gauss_o), cross)
        if spl:
            k = max(1, len(rows) // 12)  # [ME]: 10 of 128
            loss = loss + SPL_WEIGHT * SPL[spl](z_t, z_m, k, duplicates)
            failed.append(mine(z_t, z_m, k, duplicates)[1].double().mean().item())
        losses.append(training.descend(loss, parameters, optimiser, rates, f"motion reward, {stage}, iteration "
                                   f"{iteration}", "huge values in the data?"))
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    return {"loss": float(np.mean(losses[-max(1, iterations // 10):])),
            "failed": float(np.mean(failed)) if spl else None}


class Reading:
    """A MotionReward that is asked with features and reads them as a representation, for retrieval.py."""

    def __init__(self, model, representation):
        self.model, self.representation = model, representation

    def embed_motion(self, motion, lengths):
        """Raw features (b t d), lengths (b) -> mean latents (b c)."""
        device = self.model.words.weight.device
        motion = from_features(motion.to(device), self.representation, self.model.skeleton)
        return self.model.embed_motion(motion, lengths.to(device), self.representation)

    def embed_text(self, captions):
        """Captions (list of b) -> mean latents (b c)."""
        return self.model.embed_text(captions)


def retrieval_of(model, clips):
    """{representation: retrieval.retrieval_score of the clips read as it}."""
    return {name: retrieval.retrieval_score(Reading(model, name), clips) for name in REPRESENTATIONS}


# ---- 4. Heads ----------------------------------------------------------------------------------------------

KNOWN = [name for name in perception.DAMAGES if name not in ("codes", perception.HELD_OUT)]
FIFTH = 5  # every fifth generated motion is held out


def train_head(model, name, *, draw, loss, iterations, lr, seed):
    """Train one head and its adapter, all else frozen -> mean loss of the last tenth. One representation an
    iteration in turn.

    draw(representation, g) -> tokens (b n k), mask (b n), the two sides one after the other; loss(answers) of
    the head.
    """
    parameters = [*model.heads[name].parameters(), *model.adapters[name].parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2)
    rates, losses = training.rise_and_cosine(optimiser, iterations), []
    bar = tqdm(range(iterations), desc=f"motion reward, {name}", mininterval=1.0)
    for iteration in bar:
        representation = REPRESENTATIONS[iteration % len(REPRESENTATIONS)]
        tokens, mask = draw(representation, generator(seed, iteration, f"motion_reward {name}"))
        value = loss(model.head(name, tokens, mask, representation))
        losses.append(training.descend(value, parameters, optimiser, rates, f"motion reward, {name}, iteration "
                                   f"{iteration}", "huge values in the data?"))
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    model.requires_grad_(False)
    return float(np.mean(losses[-max(1, iterations // 10):]))


def damage_pairs(model, motions, count, names, grades, seed, purpose):
    """Pairs of perception.make_pairs, of raw features (t d), as tokens -> {representation: two lists of
    (n k): better, worse}.

    Both sides pass through joints, so that the way through them tells nothing.
    """
    skeleton, device = model.skeleton, model.words.weight.device

    def read(joints):
        joints = joints * skeleton.units_per_metre                                                 # t j 3
        known = torch.from_numpy(features_of_joints(joints.numpy(), skeleton))
        motions = {"features": known, "joints": rearrange(joints, "t j c -> t (j c)"),
                   "rotations": from_features(known, "rotations", skeleton)}
        lengths = torch.tensor([len(joints)], device=device)
        return {name: model.tokenise(motion[None].to(device), lengths, name)[0][0]
                for name, motion in motions.items()}
    pairs = perception.make_pairs(motions, count, names, grades, skeleton, None, seed, purpose)
    sides = [[read(joints) for joints in side] for side in pairs]
    return {name: tuple([row[name] for row in side] for side in sides) for name in REPRESENTATIONS}


def train_preference(model, motions, *, pairs, iterations, batch, lr, seed):
    """Learn which of two copies of a motion is less damaged; motions: raw features (t d), a list."""
    made = damage_pairs(model, motions, pairs, KNOWN, perception.GRADES, seed, "preference pairs")

    def draw(representation, g):
        rows = torch.randint(pairs, (batch,), generator=g).tolist()
        return padded([side[row] for side in made[representation] for row in rows])
    return train_head(model, "preference", draw=draw, iterations=iterations, lr=lr, seed=seed,
                      loss=lambda answers: ranking_loss(*answers[:, 0].chunk(2)))


@torch.no_grad()
def preference_accuracy(model, motions, seed):
    """{representation: {damage: share of the motions (raw features (t d)) that score higher than a damaged
    copy}}; equal scores count as half."""
    shares = {name: {} for name in REPRESENTATIONS}
    for damage in [*KNOWN, perception.HELD_OUT]:
        made = damage_pairs(model, motions, len(motions), [damage], perception.GRADES[:3], seed,
                            f"{damage} pairs")
        for name, sides in made.items():
            better, worse = (model.head("preference", *padded(side), name)[:, 0] for side in sides)
            shares[name][damage] = ((better > worse).double()
                                    + (better == worse).double() / 2).mean().item()
    return shares


def crops(model, real, generated, representation, g):
    """Pairs of equal length out of two lists of raw features (t d) -> tokens (2b n k), mask (2b n), the real
    ones first: lengths tell nothing."""
    parts, shortest = ([], []), math.ceil(1.6 * model.skeleton.fps / PATCH)
    for pair in zip(real, generated):
        longest = min(len(motion) for motion in pair) // PATCH
        n = longest - int(torch.randint(max(1, longest - shortest + 1), (), generator=g))
        for side, motion in zip(parts, pair):
            start = int(torch.randint(len(motion) - PATCH * n + 1, (), generator=g))
            side.append(motion[start:start + PATCH * n])
    return read_features(model, parts[0] + parts[1], representation)


def read_features(model, motions, representation):
    """Raw features (t d), a list of b -> tokens (b n k), mask (b n) of them as a representation."""
    device = model.words.weight.device
    motion = from_features(pad_sequence(motions, batch_first=True).to(device), representation, model.skeleton)
    return model.tokenise(motion, torch.tensor([len(row) for row in motions], device=device), representation)


def train_authenticity(model, real, generated, *, iterations, batch, lr, seed):
    """Learn which motions are recordings; real, generated: raw features (t d), lists."""
    def draw(representation, g):
        picked = ([motions[k] for k in torch.randint(len(motions), (batch,), generator=g).tolist()]
                  for motions in (real, generated))
        return crops(model, *picked, representation, g)

    def loss(logits):
        return authenticity_loss(logits, torch.arange(2 * batch, device=logits.device) >= batch)
    return train_head(model, "authenticity", draw=draw, iterations=iterations, lr=lr, seed=seed, loss=loss)


@torch.no_grad()
def authenticity_accuracy(model, real, generated, seed):
    """{representation: share of motions told right}, half of them real: raw features (t d), as many as the
    shorter list has."""
    shares = {}
    for name in REPRESENTATIONS:
        tokens, mask = crops(model, real, generated, name, generator(seed, 0, "authenticity check"))
        true, false = p_real(model.head("authenticity", tokens, mask, name)).chunk(2)
        shares[name] = torch.cat([true > 0.5, false < 0.5]).double().mean().item()
    return shares


@torch.no_grad()
def standardise(model, motions, chunk=64):
    """Set what `standardised` subtracts and divides by: mean and spread of the scores of these motions (raw
    features (t d), a list) in each representation."""
    for row, name in enumerate(REPRESENTATIONS):
        scores = torch.cat([
            model.head("preference", *read_features(model, motions[start:start + chunk], name), name)[:, 0]
            for start in range(0, len(motions), chunk)])
        model.preference_mean[row] = scores.mean()
        model.preference_std[row] = scores.std().clamp(min=1e-6)


# ---- 5. All of it ------------------------------------------------------------------------------------------


def draw_motions(sampler, domains, count, seed):
    """`count` motions that a sampler (common/reports.py) makes for captions and lengths of train clips -> raw
    features, a list of (t d)."""
    clips = [clip for domain in domains for clip in domain.splits["train"]]
    g = generator(seed, 0, "generated")
    chosen = [clips[k] for k in torch.randint(len(clips), (count,), generator=g).tolist()]
    captions, lengths = datasets.draw_captions(chosen, g), torch.tensor([len(c.features) for c in chosen])
    motion, _ = sampler(captions, lengths, "generated", 0)
    return [row[:n] for row, n in zip(motion, lengths.tolist())]


def fit_motion_reward(domains, generated, *, representation="features", iterations=700, spl="paper",
                      spl_iterations=60, head_iterations=600, seed, cache_dir, use_cache, device, saw,
                      target=None, noise=None, batch=64, pairs=1800, sizes=SIZES):
    """A trained MotionReward, or its copy in the cache -> frozen model, notes.

    domains: data sets of one skeleton; the half of their train splits that the judge never sees is learned
    from. target: whose val split retrieval and preference are measured on, by default the last one's.
    generated: raw features (t d), a list, made by the base generator for train prompts of all domains (of
    one of them, and the domain would tell what is real), or a function that makes them, called where the
    cache has no heads; every fifth is held out. head_iterations 0: there are no heads. spl: "paper", "code"
    or "off". saw: plain data that names what else shaped the inputs: the noise, and what a function would
    generate. noise(motion (b t w) raw in `representation`, lengths (b), level (b), g) -> noised motion: half
    of the batches of that representation are noised, and the time token is told the level.
    """
    if spl != "off" and spl not in SPL:
        raise InputError(f"spl {spl!r}: paper, code or off")
    target, skeleton = target or domains[-1], domains[-1].skeleton
    clips = [clip for domain in domains for clip in datasets.half(domain.splits["train"], 0)]

    def semantics():
        vocabulary = datasets.Vocabulary.from_captions([c for clip in clips for c in clip.captions])
        with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
            model = MotionReward(vocabulary, skeleton, **sizes)
        g = generator(seed, 0, "motion_reward_init")
        training.initialise(model, g)
        for adapter in model.adapters.values():
            adapter.initialise(g)
        library = Library(model.to(device), clips, representation)
        options = dict(batch=batch, seed=seed, representation=representation, noise=noise)
        notes = {"stage 1": train_semantics(model, library, stage="stage 1", iterations=iterations,
                                            **options)}
        with torch.no_grad():
            notes["before"] = retrieval_of(model, target.splits["val"])
        if spl != "off" and spl_iterations:
            notes["spl"] = train_semantics(model, library, stage="SPL", iterations=spl_iterations, spl=spl,
                                           **options)
        notes["after"] = retrieval_of(model, target.splits["val"])
        return {"model": model.export(), "notes": notes}

    code = [inspect.getsource(part) for part in
            (sys.modules[__name__], Skips, patches, representations, retrieval, features, perception)]
    key = [[domain.fingerprint for domain in (*domains, target)], iterations, spl, spl_iterations, seed,
           batch, sizes, [saw, representation] if noise else [], code]
    stored = training.cached(cache_dir, key, semantics, "motion_reward", use_cache)
    model, notes = MotionReward.load(stored["model"]).to(device), stored["notes"]
    shown = [f"{name} {notes['before'][name]['R1']:.2f} -> {notes['after'][name]['R1']:.2f}"
             for name in REPRESENTATIONS]
    print(f"  motion reward: saw {len(clips)} train clips (half 0); R@1 on target val before -> after SPL: "
          + ", ".join(shown))

    def heads():
        motions = [motion.detach().cpu().float() for motion in (generated() if lazy else generated)]
        vals = [clip for domain in domains for clip in domain.splits["val"]]

        def shuffled(part):
            order = torch.randperm(len(part), generator=generator(seed, 0, "recordings"))
            return [torch.from_numpy(part[k].features) for k in order.tolist()]
        real, real_val, target_val = shuffled(clips), shuffled(vals), shuffled(target.splits["val"])
        made_val = motions[FIFTH - 1::FIFTH]
        made = [motion for k, motion in enumerate(motions) if k % FIFTH < FIFTH - 1]
        options = dict(iterations=head_iterations, lr=LR["heads"], seed=seed, batch=32)
        both = [motion for pair in zip(real, made) for motion in pair]  # what is scored later is generated
        both += real[len(made):] + made[len(real):]
        loss = {"preference": train_preference(model, both, pairs=pairs, **options),
                "authenticity": train_authenticity(model, real, made, **options)}
        standardise(model, motions)
        model.has_heads = True
        return {"model": model.export(), "notes": {
            "loss": loss, "preference": preference_accuracy(model, target_val[:64], seed),
            "authenticity": authenticity_accuracy(model, real_val, made_val, seed),
            "preference_scale": [model.preference_mean.tolist(), model.preference_std.tolist()]}}

    if head_iterations:
        lazy = callable(generated)
        key += [saw, [] if lazy else list(generated), head_iterations, pairs]
        stored = training.cached(cache_dir, key, heads, "motion_reward_heads", use_cache)
        model, notes = MotionReward.load(stored["model"]).to(device), notes | stored["notes"]
        print("  accuracy on held-out motions: " + "; ".join(
            f"{name}: preference {np.mean([shares[d] for d in KNOWN]):.2f} (new damage "
            f"{shares[perception.HELD_OUT]:.2f}), authenticity {notes['authenticity'][name]:.2f}"
            for name, shares in notes["preference"].items()))
        print("  preference by damage: " + ", ".join(
            f"{d} {np.mean([shares[d] for shares in notes['preference'].values()]):.2f}" for d in KNOWN))
    return freeze(model), notes
