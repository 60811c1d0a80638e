"""What the token scripts start from: T2M-GPT (Zhang et al. 2023, arXiv 2301.06052) but for its GPT.

Sizes, the VQ-VAE with the names of the published weights, text as vectors, and the supervised training of
these and of a GPT that is handed in. Reinforcement learning changes the GPT alone. Letters: b batch,
t frames, d features, n tokens, c width of a code, v codebook entries or actions, r rows.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from common import Attention, TransformerLayer, datasets, features, freeze, generator, length_mask
from common.patches import PatchCodec
from common.published.tmr import TMREncoder
from common.training import cached, initialise, source_of, supervised

# ---- 1. Sizes ------------------------------------------------------------------------------------

class Size(NamedTuple):
    """What --size decides: the networks, their supervised training, the embedded data."""
    codes: int = 256                  # entries of the codebook
    code_dim: int = 32
    vq_width: int = 64                # of the tokenizer's convolutions
    # Frames of a token, 2 or 4; 0: 4 at 20 frames a second and 2 at 12.5. T2M-GPT takes 4 for both; at the
    # rate of KIT that costs a fifth of the motions.
    frames_per_token: int = 0
    vq_iterations: int = 1200
    vq_lr: float = 2e-3
    width: int = 64                   # of the GPT
    heads: int = 4
    base_layers: int = 3              # layers whose features the critic reads
    head_layers: int = 1              # layers after these
    text_layers: int = 2
    gpt_iterations: int = 1600
    gpt_lr: float = 2e-3
    keep: float = 0.8                 # share of input tokens left as they are in the training of the GPT
    batch: int = 64
    clips: int = 4000                 # of the embedded data
    scorer_iterations: int = 900      # of the reward encoders and of the judge
    perception_iterations: int = 300  # of a critic of naturalness
    calibration: int = 512            # motions that the scales of several rewards are read off


SIZES = {
    "tiny": Size(codes=48, vq_width=24, vq_iterations=60, width=32, base_layers=1, text_layers=1,
                 gpt_iterations=60, batch=32, clips=240, scorer_iterations=40, perception_iterations=20,
                 calibration=64),
    "small": Size(),
    "paper": Size(codes=512, code_dim=512, vq_width=512, frames_per_token=4, vq_iterations=300_000,
                  vq_lr=2e-4, width=1024, heads=16, base_layers=9, head_layers=9, gpt_iterations=300_000,
                  gpt_lr=1e-4, keep=0.5, batch=128)}


# ---- 2. The VQ-VAE -------------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """x + conv1x1(relu(dilated conv(relu(x)))), applied by `walk`."""

    def __init__(self, width, dilation):
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 1)


class Stack(nn.Module):
    """Layers in turn over x (b c t) with rows of different lengths (b) -> x, lengths."""

    def __init__(self, *layers):
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x, lengths):
        return walk(self.model, x, lengths)


def walk(layers, x, lengths):
    """Apply layers to x (b c t) -> x, lengths. What comes after the end of a row is set to zero before each
    convolution with a kernel over 1, like the layer's own padding: so a row gives the same in any batch. To
    zero the codes alone is not enough, because later layers have biases."""
    for layer in layers:
        inside = length_mask(lengths, x.shape[2])[:, None]  # b 1 t
        if isinstance(layer, nn.Sequential):
            x, lengths = walk(layer, x, lengths)
        elif isinstance(layer, Stack):
            x, lengths = layer(x, lengths)
        elif isinstance(layer, ResidualBlock):
            x = x + layer.conv2(F.relu(layer.conv1(F.relu(x) * inside)))
        elif isinstance(layer, nn.Conv1d):
            x, lengths = layer(x * inside), lengths // layer.stride[0]
        elif isinstance(layer, nn.Upsample):
            x, lengths = layer(x), 2 * lengths
        else:
            x = layer(x)
    return x, lengths


class VQVAE(nn.Module):
    """Motion <-> codes (T2M-GPT section 3.1). Raw features go in and come out; it owns its statistics.
    halvings: 2 for four frames a token as in T2M-GPT, 1 for two."""

    def __init__(self, feature_dim, width, code_dim, codes, halvings):
        super().__init__()
        self.halvings = halvings
        self.shortest = 4 // 2**halvings  # tokens of four frames, the least that has an embedding
        self.sizes = dict(feature_dim=feature_dim, width=width, code_dim=code_dim, codes=codes,
                          halvings=halvings)

        def conv(i, o):
            return nn.Conv1d(i, o, 3, padding=1)

        def residuals():
            return Stack(*(ResidualBlock(width, dilation) for dilation in (9, 3, 1)))  # in both directions

        down = (nn.Sequential(nn.Conv1d(width, width, 4, 2, 1), residuals()) for _ in range(halvings))
        up = (nn.Sequential(residuals(), nn.Upsample(scale_factor=2), conv(width, width))
              for _ in range(halvings))
        self.encoder = Stack(conv(feature_dim, width), nn.ReLU(), *down, conv(width, code_dim))
        self.decoder = Stack(conv(code_dim, width), nn.ReLU(), *up, conv(width, width), nn.ReLU(),
                             conv(width, feature_dim))
        self.quantizer = nn.Module()
        self.quantizer.register_buffer("codebook", torch.zeros(codes, code_dim))
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))

    def encode(self, x, lengths):
        """x (b t d) normalised, lengths (b) in frames -> latents (b n c), counts (b)"""
        latents, counts = self.encoder(rearrange(x, "b t d -> b d t"), lengths)
        return rearrange(latents, "b c n -> b n c"), counts

    def nearest(self, latents):
        """latents (... c) -> number of the nearest code (...), the first of equally near ones"""
        book = self.quantizer.codebook
        squares = latents.square().sum(-1, keepdim=True), book.square().sum(-1)
        return (squares[0] - 2 * latents @ book.T + squares[1]).argmin(-1)

    def reconstruct(self, latents, counts):
        """latents or codes' vectors (b n c) -> x (b t d) normalised, zero after the ends"""
        x, lengths = self.decoder(rearrange(latents, "b n c -> b c n"), counts)
        return rearrange(x, "b d t -> b t d") * length_mask(lengths, x.shape[2])[..., None]

    @torch.no_grad()
    def tokenise(self, motion, lengths):
        """motion (b t d) raw, lengths (b) -> codes (b n), counts (b)"""
        latents, counts = self.encode((motion - self.mean) / self.std, lengths)
        return self.nearest(latents), counts

    @torch.no_grad()
    def decode(self, codes, counts):
        """codes (b n), any number after the end, counts (b) -> motion (b t d) raw, lengths (b) in frames"""
        x = self.reconstruct(self.quantizer.codebook[codes * length_mask(counts, codes.shape[1])], counts)
        return x * self.std + self.mean, counts * 2**self.halvings


# ---- 3. Its codebook, loss and training ---------------------------------------------------------

class EMACodebook:
    """Running sums (T2M-GPT section 3.1): a code is the mean of the latents that chose it; one that hardly
    any latent chose moves to a latent of the batch."""

    def __init__(self, codebook, rows):
        self.codebook = codebook
        self.codebook.copy_(rows)
        self.sums, self.counts = rows.clone(), torch.ones_like(rows[:, 0])

    def update(self, latents, codes, fresh, mu=0.99):
        """latents (r c) with their codes (r), fresh (v c) for the dead -> how many are dead."""
        chosen = F.one_hot(codes, len(self.codebook)).to(latents.dtype)  # r v
        self.counts = mu * self.counts + (1 - mu) * chosen.sum(0)
        self.sums = mu * self.sums + (1 - mu) * chosen.T @ latents
        alive = (self.counts >= 1)[:, None]
        self.codebook.copy_(torch.where(alive, self.sums / self.counts[:, None], fresh))
        return int((~alive).sum())


def vq_loss_parts(x, recon, latents, codes, counts, positions):
    """Smooth L1 of all features, of the positions alone (T2M-GPT calls it velocity), and how far latents are
    from codes. x, recon (b t d), zero after the ends; latents, codes (b n c) -> three scalars"""
    frames = counts.sum() * (x.shape[1] // latents.shape[1])
    error = F.smooth_l1_loss(recon, x, reduction="none").sum((0, 1)) / frames  # d
    inside = length_mask(counts, latents.shape[1])
    return error.mean(), error[positions].mean(), (latents - codes.detach()).square()[inside].mean()


def vq_loss(features_error, positions_error, commitment):
    """T2M-GPT eq. (2) with eq. (3): its weights for HumanML3D."""
    return features_error + 0.5 * positions_error + 0.02 * commitment


def perplexity(codes, codebook_size):
    """How many codes are in even use: exp of the entropy of their shares. codes (r)"""
    share = torch.bincount(codes, minlength=codebook_size) / len(codes)
    return torch.exp(-(share * torch.log(share + 1e-7)).sum())


def train_tokenizer(vq, clips, skeleton, *, iterations, lr, batch, seed, device, patch_weight=2.0):
    """Learn codes for the clips -> {"loss", "dead", "perplexity"}: means of training.supervised; dead codes
    are replaced. patch_weight: of the error in whitened patches, beside the loss of T2M-GPT."""
    count = sum(len(clip.features) // 4 for clip in clips)  # components of few patches would have no spread
    whitened = PatchCodec(4, skeleton.feature_dim, min(64, max(1, count // 4))).to(device)
    statistics = datasets.Statistics.from_clips(clips, role="generator")
    whitened.fit(clips, statistics, features.block_weights(skeleton, features.PATCH_WEIGHTS))
    vq.mean.copy_(whitened.mean)
    vq.std.copy_(whitened.std)
    codebook_size, positions = len(vq.quantizer.codebook), features.blocks(skeleton)["positions"]
    book = None

    def loss(iteration):
        nonlocal book
        g = generator(seed, iteration, "tokenizer")
        part = datasets.collate([clips[k] for k in torch.randint(len(clips), (batch,), generator=g)])
        x, lengths = part.motion.to(device), part.lengths.to(device)
        x = (x - vq.mean) / vq.std * length_mask(lengths, x.shape[1])[..., None]
        latents, counts = vq.encode(x, lengths)
        inside = length_mask(counts, latents.shape[1])
        rows = latents.detach()[inside]
        fresh = rows[torch.randint(len(rows), (codebook_size,), generator=g).to(device)]
        book = book or EMACodebook(vq.quantizer.codebook, fresh)
        numbers = vq.nearest(latents)
        codes = vq.quantizer.codebook[numbers]
        recon = vq.reconstruct(latents + (codes - latents).detach(), counts)  # straight through
        value = vq_loss(*vq_loss_parts(x, recon, latents, codes, counts, positions))
        # Not in the paper: the same error in whitened patches of four frames. Waves, claps and punches are
        # small and fast; by the features alone they cost so little that the codes forget them.
        error = rearrange(recon - x, "b (n f) d -> b n (f d)", f=4) @ whitened.basis / whitened.scale
        error = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none").mean(-1).sum()
        value = value + patch_weight * error * 4 / lengths.sum()
        # The codebook moves after the output was made with the old codes.
        dead = book.update(rows, numbers[inside], fresh)
        return value, {"dead": dead, "perplexity": perplexity(numbers[inside], codebook_size).item()}

    return supervised("tokenizer", vq.parameters(), loss, iterations=iterations, lr=lr, betas=(0.9, 0.99),
                      weight_decay=0.0)


def fit_tokenizer(dataset, size, *, seed, device, cache_dir, use_cache):
    """A tokenizer, trained on the data set's train split or from the cache -> frozen VQVAE, notes."""
    skeleton, clips = dataset.skeleton, dataset.splits["train"]
    halvings = (size.frames_per_token or (4 if skeleton.fps > 15 else 2)) // 2
    vq = VQVAE(skeleton.feature_dim, size.vq_width, size.code_dim, size.codes, halvings)
    initialise(vq, generator(seed, 0, "tokenizer"))
    training = dict(iterations=size.vq_iterations, lr=size.vq_lr, batch=size.batch, seed=seed)

    def build():
        notes = train_tokenizer(vq.to(device), clips, skeleton, device=device, **training)
        return {"model": vq.state_dict(), **notes}

    code = source_of(VQVAE, ResidualBlock, Stack, walk, EMACodebook, vq_loss_parts, vq_loss, train_tokenizer,
                     PatchCodec, supervised)
    key = [dataset.fingerprint, vq.sizes, features.PATCH_WEIGHTS, training, code]
    stored = cached(cache_dir, key, build, "tokenizer", use_cache)
    vq.load_state_dict(stored.pop("model"))
    print("  tokenizer: " + ", ".join(f"{name} {value:.3g}" for name, value in stored.items()))
    return freeze(vq.to(device)), stored


def reconstruction(vq, clips):
    """A sampler (common/evaluate.py) that gives the clips themselves, through the tokenizer: the ceiling."""
    def sampler(captions, lengths, purpose, repeat):
        part = datasets.collate(clips)
        motion, _ = vq.decode(*vq.tokenise(part.motion.to(vq.mean.device), part.lengths.to(vq.mean.device)))
        return motion.cpu(), lengths
    return sampler


# ---- 4. Text -------------------------------------------------------------------------------------

class TextEncoder(nn.Module):
    """Captions -> one vector each; learnt with the supervised GPT in place of CLIP, frozen afterwards."""

    def __init__(self, words, width, layers, heads):
        super().__init__()
        self.sizes = dict(words=list(words), width=width, layers=layers, heads=heads)
        self.vocabulary = datasets.Vocabulary(words)
        self.words = nn.Embedding(len(self.vocabulary), width)
        self.encoder = TMREncoder(width, width, 4 * width, layers, heads)

    def forward(self, captions, spoil=None):
        """b captions -> (b c). spoil: see datasets.Vocabulary.encode."""
        ids, mask = self.vocabulary.encode(captions, spoil=spoil)
        # A caption without words reads as one unknown word.
        ids[~mask.any(1), 0], mask[:, 0] = 1, True
        device = self.words.weight.device
        return self.encoder(self.words(ids.to(device)), mask.to(device))[:, 0]


# ---- 5. The GPT ----------------------------------------------------------------------------------

def sequence_loss(logits, target, counts):
    """Mean over samples of the mean cross-entropy over tokens and end (T2M-GPT). logits (b n v), target
    (b n) with end and padding, counts (b)."""
    mask = length_mask(counts + 1, target.shape[1])  # the end token counts
    loss = F.cross_entropy(logits.mT, target.clamp(max=logits.shape[-1] - 1), reduction="none")
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def token_table(vq, clips, end, device):
    """Codes of all clips with end and padding (m n), and their counts (m)."""
    motions = [torch.from_numpy(clip.features)[None].to(device) for clip in clips]
    rows = [vq.tokenise(x, torch.tensor([x.shape[1]], device=device))[0][0] for x in motions]
    counts = torch.tensor([len(row) for row in rows], device=device)
    rows = [F.pad(row, (0, 1), value=end) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=end + 1), counts


def train_gpt(gpt, text_encoder, vq, clips, *, iterations, lr, keep, batch, seed, device):
    """Learn to predict the next token -> {"loss"} (T2M-GPT section 3.2). A share 1 - keep of the input tokens
    is replaced by random ones, so that the model learns to go on from its own mistakes."""
    table, counts = token_table(vq, clips, gpt.end, device)

    def loss(iteration):
        g = generator(seed, iteration, "gpt")
        chosen = torch.randint(len(clips), (batch,), generator=g)
        captions = datasets.draw_captions([clips[k] for k in chosen], g)
        target = table[chosen.to(device)]
        other = torch.randint(gpt.codes, target.shape, generator=g).to(device)
        replaced = (torch.rand(target.shape, generator=g) >= keep).to(device) & (target < gpt.end)
        tokens = torch.where(replaced, other, target)[:, :-1]
        logits, _ = gpt(tokens, text_encoder(captions, spoil=g))
        return sequence_loss(logits, target, counts[chosen.to(device)])

    parameters = [*gpt.parameters(), *text_encoder.parameters()]
    return supervised("supervised GPT", parameters, loss, iterations=iterations, lr=lr, betas=(0.9, 0.99))


def fit_gpt(make_gpt, parts, vq, dataset, size, *, seed, device, cache_dir, use_cache):
    """GPT and text encoder, trained on the data set's train split or from the cache -> both frozen, notes.
    make_gpt(codes=, ..., block_size=), see `sizes`: the network; parts: the classes that it is made of."""
    clips = dataset.splits["train"]
    words = datasets.Vocabulary.from_captions([c for clip in clips for c in clip.captions]).words
    text_encoder = TextEncoder(words, size.width, size.text_layers, size.heads)
    longest = max(len(clip.features) for clip in clips) // 2**vq.halvings
    sizes = dict(codes=len(vq.quantizer.codebook), text_dim=size.width, width=size.width, heads=size.heads,
                 base_layers=size.base_layers, head_layers=size.head_layers,
                 block_size=longest + 2)  # the text, and the end
    gpt = make_gpt(**sizes)
    gpt.sizes = sizes
    training = dict(iterations=size.gpt_iterations, lr=size.gpt_lr, keep=size.keep, batch=size.batch,
                    seed=seed)

    def build():
        initialise(gpt, generator(seed, 0, "gpt"))
        initialise(text_encoder, generator(seed, 0, "text"))
        notes = train_gpt(gpt.to(device), text_encoder.to(device), vq, clips, device=device, **training)
        return {"gpt": gpt.state_dict(), "text": text_encoder.state_dict(), **notes}

    code = source_of(TextEncoder, TMREncoder, TransformerLayer, Attention, datasets.Vocabulary, sequence_loss,
                     train_gpt, supervised, *parts)
    key = [dataset.fingerprint, sizes, text_encoder.sizes, vq.state_dict(), training, code,
           [datasets.WORD_DROP, datasets.WORD_SWAP]]
    stored = cached(cache_dir, key, build, "gpt", use_cache)
    gpt.load_state_dict(stored.pop("gpt"))
    text_encoder.load_state_dict(stored.pop("text"))
    print(f"  supervised GPT: loss {stored['loss']:.3f}")
    return freeze(gpt.to(device)), freeze(text_encoder.to(device)), stored
