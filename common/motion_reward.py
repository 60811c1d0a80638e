"""The networks of MotionReward (MotionRFT, arXiv 2603.27185), and how they are trained.

  1. network     a codec and a projection for each representation, one encoder, text encoder, decoder;
                 two heads, each with its own LoRA adapters in the encoder
  2. semantics   captions and motions in one space (stage 1), then self-refinement (SPL)
  3. heads       preference (is it damaged?) and authenticity (is it real?), the encoder frozen
  4. all of it   fit_motion_reward, cached

The losses are handed in (`Losses`). "Their code" is github.com/Xiaofeng-Tan/MotionRFT. Nobody judged
anything here: "preferred" means "less damaged", learned from pairs that common/perception.py makes.
Letters: b batch, t frames, n tokens of four frames, k components, w width of a representation, c latent.
"""
import copy
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from common import (Attention, TransformerLayer, datasets, features, freeze, generator, lora, padded,
                    perception, representations, retrieval, sinusoid)
from common.patches import PatchCodec
from common.representations import REPRESENTATIONS, convert_clips, features_of_joints, from_features
from common.training import cached, initialise, source_of, supervised
from common.vae import Skips, gaussian_kl


class Losses(NamedTuple):
    """What the training loops minimise; pure functions of a script."""
    semantic: object      # (z_t, z_m, gauss_t, gauss_m, decoded_t, decoded_m, tokens, duplicates) -> scalar
    cross: object         # (z_a, z_b, gauss_a, gauss_b) -> scalar
    spl: object           # (z_t, z_m, k, duplicates) -> scalar, failed (b); None: no SPL
    preference: object    # (scores of the better, scores of the worse) -> scalar
    authenticity: object  # (logits (b 2), generated (b) bool) -> scalar; class 0 is real
    parts: tuple = ()     # functions that they call, for the cache's key


# ---- 1. Network --------------------------------------------------------------------------------
# No dropout anywhere (.1 in their code): the reward is one function, in training and in use. Noise on
# the input tokens and dropped words are the regularisers, as in retrieval.train_retrieval.

# Their released scripts' size is width 256, latent 128, 3 layers, 4 heads, ff 512.
SIZES = dict(width=64, latent=64, layers=3, heads=4, ff=128, components=64, max_words=32, rank=16, alpha=32)
PATCH = 4                                           # frames of a token
TARGETS = r"self_attn|linear1|linear2|projections"  # layers that get adapters, as in their code
HEADS = {"preference": 1, "authenticity": 2}         # numbers that each answers with


class Training(NamedTuple):
    """How long MotionReward is trained after stage 1."""
    spl_iterations: int = 60
    head_iterations: int = 600
    generated: int = 512  # motions of the base that the heads learn from


TRAINING = {"tiny": Training(4, 10), "small": Training(), "paper": Training(1000, 10_000, 2048)}


def mlp(*sizes):
    """Linear layers with a GELU between them."""
    layers = [layer for pair in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*layers[:-1])


class LatentEncoder(Skips):
    """[global token, x (b n c)] and mask (b n) -> mean and log variance (b c) of a latent.

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
        x = self.projections[representation](tokens)                                    # b n c
        waves = torch.exp(torch.arange(x.shape[-1] // 2, device=x.device) * (-8.0 / (x.shape[-1] // 2)))
        angle = 1000 * level[:, None] * waves
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        return self.encoder(torch.cat([time[:, None], x], 1), F.pad(mask, (1, 0), value=True))


class Decoder(nn.Module):
    """Latent (b c), mask (b n) -> tokens (b n k) of a representation; only training uses it."""

    def __init__(self, width, latent, heads, ff, components):
        super().__init__()
        self.width, self.memory = width, nn.Linear(latent, width)
        self.layer = TransformerLayer(width, heads, ff, cross=True)  # Not in the paper: one layer
        self.out = nn.ModuleDict({name: nn.Linear(width, components) for name in REPRESENTATIONS})

    def forward(self, latent, mask, representation):
        queries = repeat(sinusoid(mask.shape[1], self.width, latent.device), "n c -> b n c", b=len(latent))
        x = self.layer(queries, mask, memory=self.memory(latent)[:, None])
        return self.out[representation](x) * mask[..., None]


class MotionReward(nn.Module):
    """Captions and motions of all representations in one space, and two heads. Motions come in raw.

    Not in the paper: tokens of four frames in 64 whitened components (PatchCodec) take the place of an MLP
    on every frame, which spares most of the cost on a CPU; a learned word table that of Sentence-T5; and
    the mean latent is used, where their code samples one even in evaluation: a reward that is noisy.
    """

    def __init__(self, vocabulary, skeleton, *, components, max_words, rank, alpha, **shape):
        super().__init__()
        self.config = dict(shape, components=components, max_words=max_words, rank=rank, alpha=alpha)
        self.vocabulary, self.skeleton = vocabulary, skeleton
        width, latent = shape["width"], shape["latent"]
        self.codecs = nn.ModuleDict({
            name: PatchCodec(PATCH, representations.width(name, skeleton), components)
            for name in REPRESENTATIONS})
        self.backbone = Backbone(components=components, **shape)
        self.words = nn.Embedding(len(vocabulary), width)
        self.text_encoder = LatentEncoder(**shape)
        self.decoder = Decoder(width, latent, shape["heads"], shape["ff"], components)
        self.heads = nn.ModuleDict({
            head: mlp(latent, 2 * latent, latent, latent // 2, out) for head, out in HEADS.items()})
        self.adapted = nn.ModuleDict()  # head -> the backbone as it reads it
        self.register_buffer("preference_mean", torch.zeros(len(REPRESENTATIONS)))
        self.register_buffer("preference_std", torch.ones(len(REPRESENTATIONS)))

    def adapt(self, g=None):
        """Give each head the backbone with LoRA adapters of its own, drawn from the generator g. All of them
        share the backbone's weights, and nothing has to be switched on or off between calls."""
        shared = {id(parameter): parameter for parameter in self.backbone.parameters()}
        for head in HEADS:
            # deepcopy takes what its memo knows as already copied: here, the weights themselves.
            self.adapted[head] = copy.deepcopy(self.backbone, dict(shared))
            lora.inject(self.adapted[head], TARGETS, self.config["rank"], self.config["alpha"], g)
        return self

    # -- motion and text -> latent --

    def tokenise(self, motion, lengths, representation):
        """Raw motion (b t w), meaningless after its lengths (b) in frames -> tokens (b n k), mask (b n).
        Frames that fill no patch of four are left out."""
        codec = self.codecs[representation]
        if motion.shape[-1] != len(codec.mean):
            width = len(codec.mean)
            raise ValueError(f"{representation} of width {motion.shape[-1]}, this model reads {width}")
        if lengths.min() < PATCH or lengths.max() > motion.shape[1]:
            raise ValueError(f"lengths {lengths.tolist()} are not {PATCH} to {motion.shape[1]} frames")
        n = int(lengths.max()) // PATCH
        mask = codec.mask(lengths, n)
        real = repeat(mask, "b n -> b (n p) 1", p=PATCH)
        return codec.encode(torch.where(real, motion[:, :n * PATCH], codec.mean)) * mask[..., None], mask

    def read(self, features, lengths, representation):
        """Raw features (b t d), lengths (b) -> tokens (b n k), mask (b n) of them as a representation."""
        device = self.words.weight.device
        motion = from_features(features.to(device), representation, self.skeleton)
        return self.tokenise(motion, lengths.to(device), representation)

    def encode(self, tokens, mask, representation, level=None, head=None):
        """Tokens (b n k), mask (b n) -> mean, log variance (b c), as the backbone or a head reads them."""
        level = tokens.new_zeros(len(tokens)) if level is None else level.to(tokens)
        return (self.adapted[head] if head else self.backbone)(tokens, mask, level, representation)

    def embed_motion(self, motion, lengths, representation="features", level=None, head=None):
        """Raw motion (b t w), lengths (b) -> mean latents (b c), not of unit length.

        level (b): share of noise in the motion, by default 0. Only a model that was trained on noised
        motions knows what it means; heads always learn from clean ones.
        """
        tokens, mask = self.tokenise(motion, lengths, representation)
        return self.encode(tokens, mask, representation, level, head)[0]

    def encode_text(self, ids, mask):
        """Word ids (b n), mask (b n) -> mean, log variance (b c)."""
        return self.text_encoder(self.words(ids), mask)

    def embed_text(self, captions):
        """Captions (list of b) -> mean latents (b c)."""
        words = self.vocabulary.encode(captions, self.config["max_words"])
        return self.encode_text(*(part.to(self.words.weight.device) for part in words))[0]

    def answer(self, head, tokens, mask, representation, level=None):
        """What the head "preference" (b 1) or "authenticity" (b 2) says, through its own adapters."""
        return self.heads[head](self.encode(tokens, mask, representation, level, head)[0])

    def score(self, head, tokens, mask, representation, level=None):
        """What a head says as a reward (b): P(real), or the preference, where 0 is the average motion of the
        base and 1 one spread of its motions."""
        answer = self.answer(head, tokens, mask, representation, level)
        if head == "authenticity":
            return answer.softmax(-1)[:, 0]
        row = REPRESENTATIONS.index(representation)
        return (answer[:, 0] - self.preference_mean[row]) / self.preference_std[row]

    def columns(self, motion, lengths, captions, clips):
        """What the heads say of raw features (b t d), as columns of a table: {head: (b)}."""
        tokens, mask = self.read(motion, lengths, "features")
        return {head: self.score(head, tokens, mask, "features") for head in HEADS}

    # -- files --

    def export(self):
        """Plain dict (tensors, strings, numbers) for caches; MotionReward.load reads it."""
        return {"config": dict(self.config), "words": list(self.vocabulary.words),
                "skeleton": self.skeleton.feature_dim, "state": self.state_dict()}

    @classmethod
    def load(cls, exported):
        """Model from what export() returned; strict."""
        with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
            model = cls(datasets.Vocabulary(exported["words"]), features.SKELETONS[exported["skeleton"]],
                        **exported["config"]).adapt()
        model.load_state_dict(exported["state"])
        return model


# ---- 2. Semantics ------------------------------------------------------------------------------

# Features divide the std of numbers of the whole body by this, so that turning and walking are not lost
# among the limbs (see retrieval.fit_retrieval); in joints the path is large as it is.
ROOT_BIAS = {"features": 5.0, "joints": 1.0, "rotations": 5.0}
WHITENING = 0.5
PARTNER = {"features": "joints", "joints": "features", "rotations": "features"}  # for the cross loss
DECODED = 3        # one row in so many is decoded, or the decoder would cost a third of the time
SPL_WEIGHT = 0.1   # .01 in EasyTune's code, where InfoNCE has .1 and not 1
LR = {"stage 1": 2e-3, "SPL": 2e-4, "heads": 2e-3}  # 1e-4, 1e-5 and 1e-4 in the public code
TOKEN_NOISE, WORD_DROP = 0.3, 0.1


class Library:
    """Training clips ready to be drawn: tokens of all representations, words, who means the same as whom.

    It fits the model's codecs. The bases are fixed, so every clip is tokenised once.
    """

    def __init__(self, model, clips, keep):
        self.model, self.device = model, model.words.weight.device
        self.tokens = {}
        for name, codec in model.codecs.items():
            converted = convert_clips(clips, name, model.skeleton)
            statistics = datasets.Statistics.from_clips(
                converted, "scorer", ROOT_BIAS[name], blocks=representations.blocks(name, model.skeleton))
            codec.fit(converted, statistics, whitening=WHITENING)
            motions = [torch.from_numpy(clip.features) for clip in converted]
            self.tokens[name] = [one_by_one(model, motion, name) for motion in motions]
            if name == keep:
                self.raw = motions  # t w, to be noised
        self.captions = retrieval.Captions(clips, model.vocabulary, model.config["max_words"])

    def text(self, lines, g):
        """Word ids and mask (b n) of captions, a share of the words unknown."""
        ids, mask = self.captions.ids[lines], self.captions.mask[lines]
        n = int(mask.sum(1).max())
        ids, mask = ids[:, :n], mask[:, :n]
        dropped = (torch.rand(ids.shape, generator=g) < WORD_DROP) & mask
        return ids.masked_fill(dropped, 1).to(self.device), mask.to(self.device)

    def motion(self, rows, name):
        """Tokens (b n k) and mask (b n) of clips in one representation."""
        return padded([self.tokens[name][row] for row in rows.tolist()])

    def noised(self, rows, name, noise, g):
        """The same from noised motions, and the levels (b), uniform in (0, 1]: up to 0.5 in EasyTune's code,
        but a window of early steps asks for more."""
        motion, mask = padded([self.raw[row] for row in rows.tolist()])
        lengths = mask.sum(1).to(self.device)
        level = (1 - torch.rand(len(rows), generator=g)).to(self.device)
        motion = noise(motion.to(self.device), lengths, level, g)
        return *self.model.tokenise(motion, lengths, name), level


def one_by_one(model, motion, name):
    """Raw motion (t w) -> tokens (n k)"""
    motion = motion[None].to(model.words.weight.device)
    return model.tokenise(motion, torch.tensor([motion.shape[1]], device=motion.device), name)[0][0]


def train_semantics(model, library, losses, *, stage, iterations, batch, seed, representation, noise):
    """"stage 1", or "SPL" on top of its losses -> {"loss"}, with SPL also {"failed"}: the share of rows
    that SPL worked on; see training.supervised.

    One representation an iteration in turn; every second batch ties it to another one of the same clips.
    noise: half of the batches of `representation` pass through it and carry its level as the time.
    """
    def loss(iteration):
        g = generator(seed, iteration, f"motion_reward {stage}")
        rows, lines, duplicates = library.captions.draw(batch, g)
        duplicates = duplicates.to(library.device)
        name, level = REPRESENTATIONS[iteration % 3], None
        if noise and name == representation and torch.rand((), generator=g) < 0.5:
            tokens, mask, level = library.noised(rows, name, noise, g)
        else:
            tokens, mask = library.motion(rows, name)

        def spoiled(tokens):
            return tokens + TOKEN_NOISE * torch.randn(tokens.shape, generator=g).to(tokens)
        gauss_m = model.encode(spoiled(tokens), mask, name, level)
        gauss_t = model.encode_text(*library.text(lines, g))
        z_t, z_m = gauss_t[0], gauss_m[0]  # Not in the paper: the means meet, and samples are decoded
        decoded = []
        for mu, logvar in (gauss_t, gauss_m):
            mu, std = mu[::DECODED], (logvar[::DECODED] / 2).exp()
            z = mu + std * torch.randn(mu.shape, generator=g).to(mu)
            decoded.append(model.decoder(z, mask[::DECODED], name))
        total = losses.semantic(z_t, z_m, gauss_t, gauss_m, *decoded, tokens[::DECODED], duplicates)
        if iteration % 2:
            other, other_mask = library.motion(rows, PARTNER[name])
            gauss_o = model.encode(spoiled(other), other_mask, PARTNER[name])
            total = total + losses.cross(z_m, gauss_o[0], gauss_m, gauss_o)
        if stage != "SPL":
            return total
        value, failed = losses.spl(z_t, z_m, max(1, len(rows) // 12), duplicates)  # k: 10 of 128 in the paper
        return total + SPL_WEIGHT * value, {"failed": failed.double().mean().item()}

    parameters = [parameter for part in (model.backbone, model.words, model.text_encoder, model.decoder)
                  for parameter in part.requires_grad_(True).parameters()]
    return supervised(f"motion reward, {stage}", parameters, loss, iterations=iterations, lr=LR[stage])


def retrieval_of(model, clips):
    """{representation: retrieval.retrieval_score of the clips read as it}"""
    def reading(name):
        return SimpleNamespace(embed_text=model.embed_text, embed_motion=lambda motion, lengths: model.encode(
            *model.read(motion, lengths, name), name)[0])
    return {name: retrieval.retrieval_score(reading(name), clips) for name in REPRESENTATIONS}


# ---- 3. Heads ----------------------------------------------------------------------------------

KNOWN = [name for name in perception.DAMAGES if name not in ("codes", perception.HELD_OUT)]
FIFTH = 5  # every fifth generated motion is held out


def train_head(model, head, draw, loss, *, iterations, seed):
    """Train one head and its adapters, all else frozen -> loss. One representation an iteration in turn.
    draw(representation, g) -> tokens (2b n k), mask (2b n), one side after the other; loss(answers)."""
    model.requires_grad_(False)
    parameters = [*model.heads[head].parameters(), *lora.parameters(model.adapted[head])]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def batch_loss(iteration):
        representation = REPRESENTATIONS[iteration % len(REPRESENTATIONS)]
        tokens, mask = draw(representation, generator(seed, iteration, f"motion_reward {head}"))
        return loss(model.answer(head, tokens, mask, representation))

    label = f"motion reward, {head}"
    return supervised(label, parameters, batch_loss, iterations=iterations, lr=LR["heads"])["loss"]


def damage_pairs(model, motions, count, names, grades, seed, purpose):
    """Pairs of perception.make_pairs, of raw features (t d), as tokens -> {representation: two lists of
    (n k): better, worse}. Both sides pass through joints, so that the way through them tells nothing."""
    def read(joints):
        joints = joints * model.skeleton.units_per_metre                                # t j 3
        known = torch.from_numpy(features_of_joints(joints.numpy(), model.skeleton))
        motions = {"features": known, "joints": rearrange(joints, "t j c -> t (j c)"),
                   "rotations": from_features(known, "rotations", model.skeleton)}
        return {name: one_by_one(model, motion, name) for name, motion in motions.items()}
    pairs = perception.make_pairs(motions, count, names, grades, model.skeleton, None, seed, purpose)
    sides = [[read(joints) for joints in side] for side in pairs]
    return {name: [[row[name] for row in side] for side in sides] for name in REPRESENTATIONS}


def train_preference(model, motions, ranking_loss, *, pairs, batch, seed, **options):
    """Learn which of two copies of a motion is less damaged; motions: raw features (t d), a list."""
    made = damage_pairs(model, motions, pairs, KNOWN, perception.GRADES, seed, "preference pairs")

    def draw(representation, g):
        rows = torch.randint(pairs, (batch,), generator=g).tolist()
        return padded([side[row] for side in made[representation] for row in rows])
    return train_head(model, "preference", draw, lambda answers: ranking_loss(*answers[:, 0].chunk(2)),
                      seed=seed, **options)


def preference_accuracy(model, motions, seed):
    """{representation: {damage: share of the motions (raw features (t d)) that score higher than a damaged
    copy}}; equal scores count as half."""
    shares = {name: {} for name in REPRESENTATIONS}
    for damage in [*KNOWN, perception.HELD_OUT]:
        made = damage_pairs(model, motions, len(motions), [damage], perception.GRADES[:3], seed,
                            f"{damage} pairs")
        for name, sides in made.items():
            better, worse = (model.answer("preference", *padded(side), name) for side in sides)
            won = torch.heaviside(better - worse, torch.full_like(better, 0.5))
            shares[name][damage] = won.double().mean().item()
    return shares


def read_list(model, motions, representation):
    """MotionReward.read of a list of raw features (t d)"""
    motion, mask = padded(motions)
    return model.read(motion, mask.sum(1), representation)


def crops(model, real, generated, representation, g):
    """Pairs of equal length out of two lists of raw features (t d) -> tokens (2b n k), mask (2b n), the real
    ones first: lengths tell nothing."""
    pairs = [perception.cut(pair, model.skeleton, g) for pair in zip(real, generated)]
    return read_list(model, [motion for side in zip(*pairs) for motion in side], representation)


def train_authenticity(model, real, generated, authenticity_loss, *, batch, **options):
    """Learn which motions are recordings; real, generated: raw features (t d), lists."""
    def draw(representation, g):
        picked = ([motions[k] for k in torch.randint(len(motions), (batch,), generator=g).tolist()]
                  for motions in (real, generated))
        return crops(model, *picked, representation, g)

    made = torch.arange(2 * batch, device=model.words.weight.device) >= batch
    return train_head(model, "authenticity", draw, lambda logits: authenticity_loss(logits, made), **options)


def authenticity_accuracy(model, real, generated, seed):
    """{representation: share of motions told right}, half of them real: raw features (t d), as many as the
    shorter list has."""
    shares = {}
    for name in REPRESENTATIONS:
        sides = crops(model, real, generated, name, generator(seed, 0, "authenticity check"))
        true, false = model.answer("authenticity", *sides, name).diff()[:, 0].chunk(2)  # generated - real
        shares[name] = torch.cat([true < 0, false > 0]).double().mean().item()
    return shares


# ---- 4. All of it ------------------------------------------------------------------------------


def draw_motions(sampler, domains, count, seed):
    """`count` motions that a sampler (common/evaluate.py) makes for captions and lengths of train clips ->
    raw features, a list of (t d)."""
    clips = [clip for domain in domains for clip in domain.splits["train"]]
    g = generator(seed, 0, "generated")
    chosen = [clips[k] for k in torch.randint(len(clips), (count,), generator=g).tolist()]
    captions, lengths = datasets.draw_captions(chosen, g), torch.tensor([len(c.features) for c in chosen])
    motion, _ = sampler(captions, lengths, "generated", 0)
    return [row[:n] for row, n in zip(motion, lengths.tolist())]


def fit_motion_reward(domains, generated, losses, size, *, representation="features", iterations=900, seed,
                      cache_dir, use_cache, device, saw, target=None, noise=None, batch=64, pairs=1800,
                      sizes=SIZES):
    """A trained MotionReward, or its copy in the cache -> frozen model, notes.

    domains: data sets of one skeleton; the half of their train splits that the judge never sees is learned
    from. target: on whose val split retrieval and preference are measured, by default the last one's.
    generated(count=...) -> raw features (t d), a list, made by the base generator for train prompts of all
    domains (if of one of them, the domain would tell what is real); it is called where the cache has no
    heads, and every fifth motion is held out. size: of TRAINING, or a Training. saw: plain data that names
    what else shaped the inputs: the noise, and what `generated` would make. noise(motion (b t w) raw in
    `representation`, lengths (b), level (b), g) -> noised motion, for half of that representation's batches.
    """
    schedule = TRAINING[size] if isinstance(size, str) else size
    spl_iterations, head_iterations, count = schedule
    target, skeleton = target or domains[-1], domains[-1].skeleton
    clips = [clip for domain in domains for clip in datasets.half(domain.splits["train"], 0)]

    def semantics():
        vocabulary = datasets.Vocabulary.from_captions([c for clip in clips for c in clip.captions])
        g = generator(seed, 0, "motion_reward_init")
        with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
            model = MotionReward(vocabulary, skeleton, **sizes)
            initialise(model, g)
            model.adapt(g).to(device)
        library = Library(model, clips, representation)
        train = partial(train_semantics, model, library, losses, batch=batch, seed=seed,
                        representation=representation, noise=noise)
        notes = {"stage 1": train(stage="stage 1", iterations=iterations)}
        notes["before"] = retrieval_of(model, target.splits["val"])
        if losses.spl and spl_iterations:
            notes["spl"] = train(stage="SPL", iterations=spl_iterations)
        notes["after"] = retrieval_of(model, target.splits["val"])
        return {"model": model.export(), "notes": notes}

    functions = [part for part in (*losses[:5], *losses.parts) if part is not None]
    code = source_of(PatchCodec, Skips, TransformerLayer, Attention, LatentEncoder, Backbone, Decoder,
                     MotionReward, Library, train_semantics, supervised, retrieval.Captions,
                     retrieval.duplicate_pairs, retrieval.info_nce, gaussian_kl, from_features, *functions)
    key = [[domain.fingerprint for domain in (*domains, target)], iterations, spl_iterations, seed, batch,
           sizes, [saw, representation] if noise else [], code, PATCH, TARGETS, ROOT_BIAS,
           WHITENING, PARTNER, DECODED, SPL_WEIGHT, LR, TOKEN_NOISE, WORD_DROP]
    stored = cached(cache_dir, key, semantics, "motion_reward", use_cache)
    model, notes = MotionReward.load(stored["model"]).to(device), stored["notes"]
    shown = [f"{name} {notes['before'][name]['R1']:.2f} -> {notes['after'][name]['R1']:.2f}"
             for name in REPRESENTATIONS]
    print(f"  motion reward: saw {len(clips)} train clips (half 0); R@1 on target val before -> after SPL: "
          + ", ".join(shown))

    def heads():
        motions = [motion.detach().cpu().float() for motion in generated(count=count)]
        vals = [clip for domain in domains for clip in domain.splits["val"]]

        def shuffled(part):
            order = torch.randperm(len(part), generator=generator(seed, 0, "recordings"))
            return [torch.from_numpy(part[k].features) for k in order.tolist()]
        real, real_val, target_val = map(shuffled, (clips, vals, target.splits["val"]))
        made = [motion for k, motion in enumerate(motions) if k % FIFTH < FIFTH - 1]
        options = dict(iterations=head_iterations, seed=seed, batch=32)
        both = [motion for pair in zip(real, made) for motion in pair]  # what is scored later is generated
        both += real[len(made):] + made[len(real):]
        loss = {"preference": train_preference(model, both, losses.preference, pairs=pairs, **options),
                "authenticity": train_authenticity(model, real, made, losses.authenticity, **options)}
        freeze(model)
        for row, name in enumerate(REPRESENTATIONS):  # what `score` subtracts and divides by
            scores = torch.cat([model.answer("preference", *read_list(model, motions[k:k + 64], name), name)
                                for k in range(0, len(motions), 64)])
            model.preference_mean[row] = scores.mean()
            model.preference_std[row] = scores.std().clamp(min=1e-6)
        return {"model": model.export(), "notes": {
            "loss": loss, "preference": preference_accuracy(model, target_val[:64], seed),
            "authenticity": authenticity_accuracy(model, real_val, motions[FIFTH - 1::FIFTH], seed),
            "preference_scale": [model.preference_mean.tolist(), model.preference_std.tolist()]}}

    if head_iterations:
        code = source_of(perception.cut, perception.make_pairs, perception.damaged,
                         *perception.DAMAGES.values(), lora.Adapter, train_head, train_preference,
                         train_authenticity, damage_pairs, crops, features_of_joints)
        stored = cached(cache_dir, [*key, saw, list(schedule), pairs, code], heads, "motion_reward_heads",
                        use_cache)
        model, notes = MotionReward.load(stored["model"]).to(device), notes | stored["notes"]
        print("  accuracy on held-out motions: " + "; ".join(
            f"{name}: preference {np.mean([shares[d] for d in KNOWN]):.2f} (new damage "
            f"{shares[perception.HELD_OUT]:.2f}), authenticity {notes['authenticity'][name]:.2f}"
            for name, shares in notes["preference"].items()))
        print("  preference by damage: " + ", ".join(
            f"{d} {np.mean([shares[d] for shares in notes['preference'].values()]):.2f}" for d in KNOWN))
    return freeze(model), notes
