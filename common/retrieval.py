"""Retrieval models: captions and motions in one space, whose cosine says how well the two fit.

  1. the models    a small TMR (the reward) and a conv + BiGRU network (the judge, never optimised); their
                   encoders are those of common/published/tmr.py and evaluator.py, as in the papers
  2. training and scoring them

Letters: b batch, t frames, n tokens, d features, c embedding, h heads.
A motion enters a model RAW (metres or KIT units). Each model owns the statistics it normalises with, so the
generator's mean and std cannot be mixed up with the scorer's.
"""
import json
import math
from collections import Counter

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import (Attention, InputError, NonFiniteError, TransformerLayer, freeze, generator, length_mask,
                    padded)
from common.datasets import Statistics, Vocabulary, collate, half
from common.metrics import hit_chance, pairwise_distance
from common.patches import PatchCodec
from common.published.evaluator import MotionEncoderBiGRU
from common.published.tmr import TMREncoder
from common.training import cached, source_of, supervised

# ---- 1. The models ------------------------------------------------------------------------------

class RetrievalModel(nn.Module):
    """Text and motion in one space; the cosine of the two mean latents is the score.

    family "transformer": a small TMR (encoders of its section 3) and the reward; "bigru": conv + BiGRU, the
    judge. Both read patches of `patch` frames in whitened principal components (PatchCodec, fitted by
    train_retrieval; a random basis before), because 4 x 263 numbers a token would cost most of the time.
    Not in the papers: the components, and a learned word table in place of DistilBERT.
    """

    def __init__(self, family, vocabulary, statistics, *, width=64, layers=2, heads=4, patch=4, components=64,
                 max_words=32, seed=0):
        super().__init__()
        if family not in ("transformer", "bigru"):
            raise ValueError(f"family must be 'transformer' or 'bigru', not {family!r}")
        statistics.require("scorer")
        self.config = dict(family=family, width=width, layers=layers, heads=heads, patch=patch,
                           components=components, max_words=max_words)
        self.vocabulary, self.patch, self.max_words = vocabulary, patch, max_words
        self.transformer = family == "transformer"
        self.codec = PatchCodec(patch, len(statistics.mean), components)
        self.codec.mean.copy_(statistics.mean)
        self.codec.std.copy_(statistics.std)
        self.words = nn.Parameter(torch.zeros(len(vocabulary), width))
        if self.transformer:
            self.motion_encoder = TMREncoder(components, width, 2 * width, layers, heads)
            self.text_encoder = TMREncoder(width, width, 2 * width, layers, heads)
        else:
            self.convs = nn.ModuleList(nn.Conv1d(i, width, 3, padding=1) for i in (components, width))
            self.motion_encoder = MotionEncoderBiGRU(width, width, width)
            self.text_encoder = MotionEncoderBiGRU(width, width, width)
        # Drawn here and not in the layers' constructors: those use the global generator.
        g = torch.Generator().manual_seed(seed)
        for name, weight in sorted(self.named_parameters()):
            if name == "words" or name.endswith(".tokens"):
                nn.init.normal_(weight, generator=g)
            elif weight.dim() > 1 and not name.endswith("hidden"):
                nn.init.xavier_uniform_(weight, generator=g)
            else:
                nn.init.constant_(weight, float("norm" in name or name.endswith("output_net.1.weight")))
        basis = torch.randn(self.codec.basis.shape, generator=g)
        self.codec.basis.copy_(torch.linalg.qr(basis)[0])

    def tokenise(self, features, lengths):
        """Raw features (b t d), lengths (b) in frames -> tokens (b n k) in the fixed basis, counts (b)."""
        if features.shape[-1] != len(self.codec.mean):
            width = len(self.codec.mean)
            raise ValueError(f"features of width {features.shape[-1]}, this model reads {width}")
        if lengths.min() < self.patch or lengths.max() > features.shape[1]:
            raise ValueError(f"lengths {lengths.tolist()} are not {self.patch} to {features.shape[1]} frames")
        counts = lengths // self.patch
        real = length_mask(counts * self.patch, features.shape[1])[..., None]
        motion = torch.where(real, features, self.codec.mean)       # whatever the padding holds
        return self.codec.encode(F.pad(motion, (0, 0, 0, -features.shape[1] % self.patch))), counts

    def encode_motion(self, tokens, counts):
        """Tokens (b n k), counts (b) -> mean latents (b c)."""
        mask = length_mask(counts, tokens.shape[1])
        if self.transformer:
            return self.motion_encoder(tokens, mask)[:, 0]
        x = rearrange(tokens, "b n k -> b k n")
        for conv in self.convs:      # masked before each: padding must not leak into the last token
            x = F.leaky_relu(conv(x * mask[:, None]), 0.2)
        return self.motion_encoder(rearrange(x, "b k n -> b n k"), counts)

    def encode_text(self, ids, mask):
        """Word ids (b n) with mask (b n) -> mean latents (b c)."""
        words = self.words[ids]
        if self.transformer:
            return self.text_encoder(words, mask)[:, 0]
        return self.text_encoder(words, mask.sum(1))

    def embed_motion(self, features, lengths):
        """RAW features (b t d), lengths (b) in frames -> mean latents (b c), not of unit length."""
        device = self.words.device
        return self.encode_motion(*self.tokenise(features.to(device), lengths.to(device)))

    def embed_text(self, captions):
        """Captions (list of b) -> mean latents (b c)."""
        ids, mask = self.vocabulary.encode(captions, self.max_words)
        # An empty caption reads as one unknown word, so that it has an embedding at all.
        ids[~mask.any(1), 0], mask[:, 0] = 1, True
        return self.encode_text(ids.to(self.words.device), mask.to(self.words.device))

    def similarity(self, features, lengths, captions):
        """Cosine (b) of each motion with its caption; differentiable in the features."""
        return F.cosine_similarity(self.embed_motion(features, lengths), self.embed_text(captions), dim=-1)

    def export(self):
        """Plain dict (tensors, strings, numbers) for checkpoints and caches; RetrievalModel.load reads it."""
        return {"config": dict(self.config), "words": list(self.vocabulary.words),
                "state": {key: value.detach().cpu().clone() for key, value in self.state_dict().items()}}

    @classmethod
    def load(cls, exported):
        """Model from what export() returned; strict."""
        state = exported["state"]
        statistics = Statistics(state["codec.mean"], state["codec.std"], role="scorer")
        model = cls(vocabulary=Vocabulary(exported["words"]), statistics=statistics, **exported["config"])
        model.load_state_dict(state)
        return model


# ---- 2. Training and scoring them ---------------------------------------------------------------

def info_nce(text, motion, temperature=0.1, duplicates=None):
    """Symmetric cross-entropy over cosines (TMR sec. 3.2; the published configuration uses temperature .1).

    text, motion (b c); duplicates (b b) bool marks pairs that mean the same and so are no negatives. The
    diagonal stays, whatever it says: every row keeps its positive and the loss is finite.
    """
    logits = F.normalize(text, dim=-1) @ F.normalize(motion, dim=-1).T / temperature    # b b, row = text
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    if duplicates is not None:
        logits = logits.masked_fill(duplicates & ~own, -math.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def signature(attributes):
    """A caption's attributes as one string, to be compared; None where nothing can be checked."""
    return json.dumps(attributes, sort_keys=True) if attributes else None


def duplicate_pairs(ids, signatures, idf, threshold=0.8):
    """Pairs (b b) that ask for the same motion, so that neither is a negative of the other.

    Equal attribute signatures; or, where one side has none, idf-weighted bags of words with cosine above
    threshold. ids (b n) word ids with 0 = padding, idf (v,) weights. The diagonal is True.
    """
    bags = torch.zeros(len(ids), len(idf)).scatter_add_(1, ids, idf[ids])
    bags[:, 0] = 0.0
    bags = F.normalize(bags, dim=1)
    codes = {name: code for code, name in enumerate(sorted(set(signatures) - {None}))}
    codes = torch.tensor([codes.get(name, -1) for name in signatures])
    both = (codes[:, None] >= 0) & (codes[None, :] >= 0)
    same = torch.where(both, codes[:, None] == codes[None, :], bags @ bags.T > threshold)
    return same | torch.eye(len(ids), dtype=torch.bool)


def inverse_document_frequency(ids, size):
    """idf (size,) of the word ids over captions (m n): log((1 + m) / (1 + count)) + 1."""
    counts = Counter(word for row in ids.tolist() for word in set(row))
    return torch.tensor([math.log((1 + len(ids)) / (1 + counts[word])) + 1 for word in range(size)])


class Captions:
    """All captions of some clips as word ids, ready to be drawn, and which of them mean the same."""

    def __init__(self, clips, vocabulary, max_words):
        self.ids, self.mask = vocabulary.encode([c for clip in clips for c in clip.captions], max_words)
        self.offsets = torch.tensor([0] + [len(clip.captions) for clip in clips]).cumsum(0)
        self.signatures = [signature(a) for clip in clips for a in clip.attributes]
        self.idf = inverse_document_frequency(self.ids, len(vocabulary))

    def draw(self, batch, g):
        """Rows of clips (b), the line of a random caption of each (b), duplicate_pairs of these (b b)."""
        rows = torch.randperm(len(self.offsets) - 1, generator=g)[:batch]
        draw = torch.rand(len(rows), generator=g)
        lines = self.offsets[rows] + (draw * (self.offsets[rows + 1] - self.offsets[rows])).long()
        signatures = [self.signatures[k] for k in lines.tolist()]
        return rows, lines, duplicate_pairs(self.ids[lines], signatures, self.idf)


def train_retrieval(model, clips, *, iterations=900, batch=96, seed=0, label="retrieval", loss=None):
    """Train on (motion, random caption) pairs -> {"loss", "top1"}, see training.supervised. top1 is the share
    of motions that find their own caption, or one that means the same, in the batch.

    loss(text, motion, duplicates) -> scalar, by default InfoNCE. Input noise and dropped words are the
    regularisers. Not in TMR: the contrastive loss alone, no decoder, no sampling; duplicates are found by
    attributes or words instead of a sentence model.
    """
    if len(clips) < 2:
        raise InputError(f"{label}: needs at least two training clips, got {len(clips)}")
    g, device = torch.Generator().manual_seed(seed), model.words.device
    statistics = Statistics(model.codec.mean, model.codec.std, role="scorer")
    model.codec.fit(clips, statistics, whitening=0.5)
    # The basis is fixed, so every clip is tokenised once, not once an iteration.
    tokens = []
    for clip in clips:
        features = torch.from_numpy(clip.features)[None].to(device)
        row, counts = model.tokenise(features, torch.tensor([features.shape[1]], device=device))
        tokens.append(row[0, :counts[0]])
    captions = Captions(clips, model.vocabulary, model.max_words)

    def batch_loss(iteration):
        rows, lines, duplicates = captions.draw(batch, g)
        ids, mask, duplicates = captions.ids[lines], captions.mask[lines], duplicates.to(device)
        motion, real = padded([tokens[row] for row in rows.tolist()])                   # b n k
        motion = motion + 0.3 * torch.randn(motion.shape, generator=g).to(device)
        dropped = (torch.rand(ids.shape, generator=g) < 0.1) & mask
        text = model.encode_text(ids.masked_fill(dropped, 1).to(device), mask.to(device))
        motion = model.encode_motion(motion, real.sum(1))
        with torch.no_grad():
            best = (F.normalize(motion, dim=-1) @ F.normalize(text, dim=-1).T).argmax(1)
            found = duplicates[torch.arange(len(rows)), best].double().mean().item()
        return (loss or info_nce)(text, motion, duplicates=duplicates), {"top1": found}

    return supervised(label, model.parameters(), batch_loss, iterations=iterations, lr=2e-3)


def fit_retrieval(family, clips, *, seed=0, **training):
    """Vocabulary, scorer statistics, model and training in one call -> (frozen model, notes).

    The feat_bias makes the few root and contact features weigh as much as the many rotations: without it
    turning left and turning right look alike to the model.
    """
    vocabulary = Vocabulary.from_captions([c for clip in clips for c in clip.captions])
    statistics = Statistics.from_clips(clips, "scorer", feat_bias=5.0)
    model = RetrievalModel(family, vocabulary, statistics, seed=seed)
    notes = train_retrieval(model, clips, seed=seed, label=f"{family} retrieval", **training)
    return freeze(model), notes


@torch.no_grad()
def embed(judge, features, lengths, captions=None, chunk=128):
    """Unit-length motion embeddings (n c) and text embeddings (n c) or None, chunked to bound the memory."""
    parts = zip(features.split(chunk), lengths.split(chunk))
    motion = torch.cat([judge.embed_motion(*part) for part in parts])
    text = None if captions is None else torch.cat(
        [judge.embed_text(captions[i:i + chunk]) for i in range(0, len(captions), chunk)])
    for name, part in (("motion", motion), ("text", text)):
        if part is not None and not torch.isfinite(part).all():
            raise NonFiniteError(f"{name} embeddings are not finite: the input holds NaN or infinity")
    return F.normalize(motion, dim=-1), None if text is None else F.normalize(text, dim=-1)


def once(function, items):
    """function(items) -> rows, of which each distinct item is computed once: a group asks for the same."""
    distinct = {id(item): item for item in items}
    place = {key: k for k, key in enumerate(distinct)}
    return function(list(distinct.values()))[[place[id(item)] for item in items]]


@torch.no_grad()
def embed_pairs(model, motion, lengths, captions, clips):
    """Unit-length embeddings (b c) of captions, of motions (b t d) raw, and of the clips that they are
    compared with; a clip that is None or has no frames gets the motion's own."""
    def real(wanted):
        batch = collate(wanted)
        return model.embed_motion(batch.motion, batch.lengths)
    text, made = once(model.embed_text, captions), model.embed_motion(motion, lengths)
    rows = [k for k, clip in enumerate(clips) if clip is not None and len(clip.features)]
    paired = made.clone()
    if rows:
        paired[rows] = once(real, [clips[k] for k in rows])
    return tuple(F.normalize(part, dim=-1) for part in (text, made, paired))


def retrieval_score(model, clips, *, pool=32, seed=0):
    """Text-to-motion R@1..3 on clips in random pools, as a dict, with each clip's first caption.

    "R1".. counts only the clip's own motion; "R1_same".. also any motion whose attributes are equal, the fair
    value where several clips of a pool fit the caption. "chance" is 1 / pool.
    """
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed)).tolist()
    clips = [clips[i] for i in order]
    batch = collate(clips)
    motion, text = embed(model, batch.motion, batch.lengths, batch.captions)
    names = [signature(clip.attributes[0]) for clip in clips]
    pool, exact, same = min(pool, len(clips)), [], []
    for start in range(0, len(clips) - pool + 1, pool):
        rows = slice(start, start + pool)
        distance = pairwise_distance(text[rows], motion[rows])
        equal = torch.tensor([[a == b is not None for b in names[rows]] for a in names[rows]])
        exact.append(hit_chance(distance, (1, 2, 3))[0])
        same.append(hit_chance(distance, (1, 2, 3), equal | torch.eye(pool, dtype=torch.bool))[0])
    exact, same = torch.cat(exact).mean(0).tolist(), torch.cat(same).mean(0).tolist()
    return ({f"R{k}": value for k, value in enumerate(exact, 1)}
            | {f"R{k}_same": value for k, value in enumerate(same, 1)} | {"pool": pool, "chance": 1 / pool})


def scorer(name, domains, *, family, number, iterations, seed, cache_dir, use_cache, device, target=None,
           loss_name="infonce", loss=None, loss_parts=()):
    """A retrieval model of a family, trained or from the cache -> frozen model, notes.

    domains: the data sets whose train splits it learns from, every second recording: `number` is added to
    the seed, and tells which half. loss: see train_retrieval; loss_name tells it from others in the cache,
    loss_parts are functions that it calls. The notes say how well it finds the motion of a caption among 32
    of the val split of `target`, by default the last domain.
    """
    target = target or domains[-1]
    clips = [clip for domain in domains for clip in half(domain.splits["train"], number % 2)]

    def build():
        model, _ = fit_retrieval(family, clips, seed=seed + number, iterations=iterations, loss=loss)
        return {"model": model.export(), "retrieval": retrieval_score(model, target.splits["val"])}

    code = source_of(RetrievalModel, TMREncoder, MotionEncoderBiGRU, TransformerLayer, Attention, PatchCodec,
                     info_nce, duplicate_pairs, Captions, train_retrieval, fit_retrieval,
                     *([loss] if loss else []), *loss_parts)
    key = [[domain.fingerprint for domain in domains], target.fingerprint, family, loss_name, number,
           seed, iterations, code]
    stored = cached(cache_dir, key, build, name.split()[0], use_cache)
    notes = {"family": family, "loss": loss_name, "target_val_retrieval": stored["retrieval"],
             "saw": f"{len(clips)} train clips of {' and '.join(domain.label for domain in domains)} "
                    f"(half {number % 2})"}
    print(f"  {name}: {family}, {loss_name}, saw {notes['saw']}; "
          f"R@1 on target val {stored['retrieval']['R1']:.2f}")
    return freeze(RetrievalModel.load(stored["model"]).to(device)), notes


def reward_model(domains, *, family="transformer", number=0, name="reward", **options):
    """A scorer that is meant to be optimised -> model, notes. For a second one of another family, give
    `number` 2, so that both learn from the same half, which the judge never sees. See scorer."""
    return scorer(name, domains, family=family, number=number, **options)


def judge(domains, **options):
    """The scorer that is never optimised: of another family than the reward model, with another seed and the
    other half of the clips -> model, notes. See scorer."""
    return scorer("judge", domains, family="bigru", number=1, **options)


def wrong_captions(captions, seed):
    """One fixed wrong caption for every caption (a cyclic shift of a random order): a reward asked with these
    is a control that has a signal to follow, only not the right one."""
    order = torch.randperm(len(captions), generator=generator(seed, 0, "wrong_prompts")).tolist()
    return {captions[a]: captions[b] for a, b in zip(order, order[1:] + order[:1])}


def control(kind, reward, captions, seed):
    """The reward as training asks for it, or a control from which nothing can be learnt in its place.

    kind: "random" is a draw for each motion, "shuffled" the reward of a fixed wrong caption; any other kind
    is the reward itself. captions: all that training may ask for.
    -> score(motion, lengths, captions, *more, iteration=..., numbers=...) -> (b) on the CPU; numbers name
    the motions of an iteration.
    """
    wrong = wrong_captions(captions, seed)

    def score(motion, lengths, captions, *more, iteration, numbers):
        if kind == "random":
            draws = (generator(seed, iteration, "random_reward", k) for k in numbers)
            return torch.stack([torch.randn((), generator=g) for g in draws])
        if kind == "shuffled":
            captions = [wrong[caption] for caption in captions]
        return reward(motion, lengths, captions, *more).cpu()
    return score
