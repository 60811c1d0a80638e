"""StableMoFusion (github.com/h-y1heng/StableMoFusion, arXiv 2405.05691), the base in figure 2 of the DDPO
paper: a U-Net over the frames of a motion, and its published folder.

    opt.txt                          "key: value" lines: sizes, noise schedule, what the network answers with
    meta/mean.npy  std.npy           of its motion space: neither the data folder's nor the evaluator's
    model/latest.tar                 a torch file: encoder, model_ema (averaged weights), optimiser

  1. the network    attribute names follow the checkpoints; attention is made of plain linears
  2. the folder     read strictly, nothing in it is executed

Not as published: no dropout, so that rollout and update see one function. Words behind text_mask have no say;
there all 77 tokens of CLIP are looked at.
Letters: b batch, t frames, w words, c channels, h heads, d features.
"""
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import InputError, TransformerLayer, freeze, sinusoid
from common.datasets import Statistics
from common.published import load_strict, read_state, size, unpack_attention
from common.published.files import read_meta, require_files
from common.runs import stand_in

TEXT_HEADS, HEADS, GROUPS = 4, 8, 8  # constants there: no weight and no line of opt.txt tells them
PAD = 16                             # frames; whatever the number of levels
POSITIONS = 5000

# ---- 1. The network ----------------------------------------------------------------------------------------


class TimeTable(nn.Module):
    """Timesteps (b) -> rows of the table of sines and cosines (b c), which is part of the checkpoint."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("pe", sinusoid(POSITIONS, width))

    def forward(self, timesteps):
        return self.pe[timesteps.long()]


class FrameNorm(nn.GroupNorm):
    """Group normalisation of x (b c t) over the channels of each frame by itself."""

    def forward(self, x):
        frames = rearrange(x, "b c t -> (b t) c")
        return rearrange(super().forward(frames), "(b t) c -> b c t", b=len(x))


def convolution(inputs, width, norm):
    """A convolution over five frames and its normalisation, which is stored under the name `norm`."""
    return nn.ModuleDict({"block": nn.Conv1d(inputs, width, 5, padding=2), norm: FrameNorm(GROUPS, width)})


class Residual(nn.Module):
    """Two convolutions, x (b c t) -> (b c' t); the time (b e) scales and shifts the first."""

    def __init__(self, inputs, width, time_dim):
        super().__init__()
        self.blocks = nn.ModuleList([convolution(inputs, width, "group_norm"),
                                     convolution(width, width, "norm")])
        self.time_mlp = nn.Sequential(nn.Mish(), nn.Linear(time_dim, 2 * width))
        self.residual_conv = nn.Conv1d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x, time):
        scale, shift = self.time_mlp(time)[..., None].chunk(2, dim=1)  # b c 1
        first, second = self.blocks
        h = F.mish(first["group_norm"](first["block"](x)) * (1 + scale) + shift)
        return F.mish(second["norm"](second["block"](h))) + self.residual_conv(x)


class LinearAttention(nn.Module):
    """Cross-attention of frames x (b t c) to words (b w i), linear in both (Shen et al. 2021), without an
    output projection."""

    def __init__(self, width, text_dim):
        super().__init__()
        self.norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(text_dim)
        self.query, self.key = nn.Linear(width, width), nn.Linear(text_dim, width)
        self.value = nn.Linear(text_dim, width)

    def forward(self, x, text, text_mask):
        words = self.text_norm(text)
        query, key, value = (rearrange(part, "b n (h c) -> b h n c", h=HEADS) for part in (
            self.query(self.norm(x)), self.key(words), self.value(words)))
        key = key.masked_fill(~text_mask[:, None, :, None], -torch.inf)
        # softmax of the queries over channels, of the keys over words
        summary = key.softmax(2).mT @ value                                  # b h c c
        return rearrange(query.softmax(-1) @ summary, "b h t c -> b t (h c)")


class Block(nn.Module):
    """Convolutions, then words: x (b c t), time (b e), text (b w i), text_mask (b w). A row without words
    leaves the attention out, which is what "unconditional" means here: nothing is replaced by zeros."""

    def __init__(self, inputs, width, time_dim, text_dim):
        super().__init__()
        self.conv1d = Residual(inputs, width, time_dim)
        self.cross_attn = nn.ModuleDict({"cross_attention": LinearAttention(width, text_dim)})

    def forward(self, x, time, text, text_mask):
        x = self.conv1d(x, time)
        told = text_mask.any(1, keepdim=True)                                # b 1
        y = self.cross_attn["cross_attention"](rearrange(x, "b c t -> b t c"), text, text_mask | ~told)
        return x + rearrange(y, "b t c -> b c t") * told[..., None]


def resample(layer):
    """A layer under the name that the checkpoints give it."""
    return nn.ModuleDict({"conv": layer})


class UNet(nn.Module):
    """x (b t d), timesteps (b), text (b w i), text_mask (b w) -> (b t d); `levels` halvings of time."""

    def __init__(self, feature_dim, width, levels, time_dim, text_dim):
        super().__init__()
        def block(inputs):
            return Block(inputs, width, time_dim, text_dim)
        self.time_mlp = nn.Sequential(TimeTable(time_dim), nn.Linear(time_dim, 4 * time_dim), nn.Mish(),
                                      nn.Linear(4 * time_dim, time_dim))
        self.downs = nn.ModuleList(nn.ModuleList([
            block(width if level else feature_dim), block(width),
            resample(nn.Conv1d(width, width, 3, stride=2, padding=1))]) for level in range(levels))
        self.mid_block1, self.mid_block2 = block(width), block(width)
        self.ups = nn.ModuleList(nn.ModuleList([
            resample(nn.ConvTranspose1d(width, width, 4, stride=2, padding=1)),
            block(2 * width), block(width)]) for _ in range(levels))
        self.final_conv = nn.Conv1d(width, feature_dim, 1)

    def forward(self, x, timesteps, text, text_mask):
        frames = x.shape[1]
        x = rearrange(F.pad(x, (0, 0, 0, -frames % PAD)), "b t d -> b d t")
        given, stored = (self.time_mlp(timesteps), text, text_mask), []
        for first, second, down in self.downs:
            x = second(first(x, *given), *given)
            stored.append(x)
            x = down["conv"](x)
        x = self.mid_block2(self.mid_block1(x, *given), *given)
        for up, first, second in self.ups:
            x = torch.cat([up["conv"](x), stored.pop()], dim=1)              # b 2c t
            x = second(first(x, *given), *given)
        return rearrange(self.final_conv(x), "b d t -> b t d")[:, :frames]


class StableMoFusion(nn.Module):
    """The published denoiser with the interface of the scripts' own one; words come from CLIP ViT-B/32."""

    def __init__(self, feature_dim=263, width=1024, levels=4, time_dim=512, text_dim=256, text_layers=4,
                 text_ff=2048, clip_dim=512):
        super().__init__()
        self.embed_text = nn.Linear(clip_dim, text_dim)
        self.textTransEncoder = nn.ModuleDict({"layers": nn.ModuleList(
            TransformerLayer(text_dim, TEXT_HEADS, text_ff) for _ in range(text_layers))})
        self.text_ln = nn.LayerNorm(text_dim)
        self.unet = UNet(feature_dim, width, levels, time_dim, text_dim)

    def encode_tokens(self, states, text_mask=None):
        """CLIP's states of all tokens after its last norm (b w 512) -> text (b w i); text_mask (b w)."""
        x = self.embed_text(states)
        for layer in self.textTransEncoder["layers"]:
            x = layer(x, text_mask)
        return self.text_ln(x)

    def drop_text(self, text, text_mask, dropped):
        """The captions with `dropped` (b) become no words at all."""
        return text, text_mask & ~dropped[:, None]

    def forward(self, x, timesteps, mask, text, text_mask):
        """x (b t d), timesteps (b), text (b w i), text_mask (b w) -> (b t d), the network's answer.

        mask (b t) is not used: this network knows no lengths, frames behind the end are frames to it.
        """
        return self.unet(x, timesteps, text, text_mask)


# ---- 2. The folder -----------------------------------------------------------------------------------------


FOLDER = ("StableMoFusion's checkpoint folder, for instance t2m_condunet1d_batch64: opt.txt, meta/, "
          "model/latest.tar")
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"sample": "sample", "epsilon": "epsilon", "v_prediction": "v"}


class Settings(NamedTuple):
    """What a published folder says about its base, in the words of this project."""
    schedule: str               # of samplers.SCHEDULES
    prediction: str             # what the network answers with: "sample", "epsilon" or "v"
    statistics: Statistics      # of the motion space, role "generator"


def read_options(path):
    """The "key: value" lines of an opt.txt as a dict of strings; else InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is no text file; download it again") from error
    if said := stand_in(path):
        raise InputError(f"{path}: {said}")
    found = dict(re.findall(r"^\s*(\w+)\s*:\s*(.*?)\s*$", text, re.M))
    wanted = ("beta_schedule", "prediction_type", "no_eff", "no_adagn", "dim_mults")
    if missing := [key for key in wanted if key not in found]:
        raise InputError(f"{path}: has no line {missing[0]!r}; is it the opt.txt of a StableMoFusion "
                         "checkpoint?")
    return found


def check_options(options, path, sizes):
    """InputError where opt.txt speaks of another network than this one with these sizes."""
    for key in ("no_eff", "no_adagn"):
        if options[key].lower() != "false":
            raise InputError(f"{path}: {key} is {options[key]}, which is another network; only False is read")
    for key, known in (("beta_schedule", SCHEDULES), ("prediction_type", PREDICTIONS)):
        if options[key] not in known:
            raise InputError(f"{path}: {key} is {options[key]!r}, known are {', '.join(known)}")
    factors = re.findall(r"\d+", options["dim_mults"])
    if len(factors) != sizes["levels"] or len(set(factors)) > 1:
        raise InputError(f"{path}: dim_mults is {options['dim_mults']}; wanted {sizes['levels']} equal "
                         "numbers, as many as levels in the weights")
    told = {"text_latent_dim": sizes["text_dim"], "time_dim": sizes["time_dim"],
            "base_dim": sizes["width"] / max(1, int(factors[0]))}
    for key, have in told.items():
        if key in options and options[key] != f"{have:g}":
            raise InputError(f"{path}: {key} is {options[key]}, the weights have {have:g}; take both from "
                             "one folder")


def network_sizes(state, path):
    """The arguments of StableMoFusion that fit the weights."""
    def count(pattern):
        return len({match[1] for key in state if (match := re.match(pattern, key))})
    return dict(feature_dim=size(state, path, "unet.final_conv.weight"),
                width=size(state, path, "unet.final_conv.weight", 1), levels=count(r"unet\.downs\.(\d+)\."),
                time_dim=size(state, path, "unet.time_mlp.3.weight"),
                text_dim=size(state, path, "embed_text.weight"),
                clip_dim=size(state, path, "embed_text.weight", 1),
                text_layers=count(r"textTransEncoder\.layers\.(\d+)\."),
                text_ff=size(state, path, "textTransEncoder.layers.0.linear1.weight"))


def load_network(path, ema=True):
    """The network of a latest.tar, frozen, and its sizes; strict. ema: the averaged weights, as published
    numbers are made with. CLIP's own weights in the file are left out, and the count of averaged steps."""
    state = read_state(path, "model_ema" if ema else "encoder")
    state = unpack_attention({key: value for key, value in state.items()
                              if key != "n_averaged" and not key.startswith("clip_model.")})
    sizes = network_sizes(state, path)
    if sizes["width"] % HEADS or sizes["text_dim"] % TEXT_HEADS or 2 ** sizes["levels"] > PAD:
        raise InputError(f"{path}: widths {sizes['width']} and {sizes['text_dim']} with {sizes['levels']} "
                         f"levels; they must split into {HEADS} and {TEXT_HEADS} heads, and halve {PAD} "
                         "frames evenly; is it a checkpoint of StableMoFusion?")
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
        network = StableMoFusion(**sizes)
    load_strict(network, state, path)
    return freeze(network), sizes


def load_folder(folder, ema=True):
    """A published folder -> frozen StableMoFusion, Settings; InputError that names the file and the fix."""
    folder = require_files(folder, ("opt.txt", "meta/mean.npy", "meta/std.npy", "model/latest.tar"), FOLDER)
    options = read_options(folder / "opt.txt")
    network, sizes = load_network(folder / "model" / "latest.tar", ema)
    check_options(options, folder / "opt.txt", sizes)
    statistics = read_meta(folder / "meta", sizes["feature_dim"], "generator")
    return network, Settings(SCHEDULES[options["beta_schedule"]], PREDICTIONS[options["prediction_type"]],
                             statistics)
