"""TMR (Petrovich et al., ICCV 2023, github.com/Mathux/TMR): its networks, and its published folder.

    config.json                                   sizes under "model", where the statistics are
    last_weights/motion_encoder.pt  text_encoder.pt  motion_decoder.pt
    mean.pt  std.pt                               (263); not in the archive but in the repository, under
                                                  stats/{humanml3d,kitml}/guoh3dfeats

Both data sets are in HumanML3D's features at 20 fps, KIT-ML too. Text are the last hidden states of
distilbert-base-uncased with [CLS] and [SEP].
Letters: b batch, t frames, n tokens, w words, c latent, d features.
"""
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import repeat
from torch import nn

from common import InputError, TransformerLayer, freeze, length_mask, masked, sinusoid
from common.published import load_plain, load_strict, read_state, size, unpack_attention
from common.published.files import require_files
from common.runs import stand_in


class TMREncoder(nn.Module):
    """Sequence (b n i) and mask (b n) -> (b 2 c): the mean and the log variance of a latent.

    Not in the paper: no dropout (.1 there), so that a network is one function, in training and in scoring.
    """

    def __init__(self, input_size, latent=256, ff=1024, layers=6, heads=4):
        super().__init__()
        self.projection = nn.Linear(input_size, latent)
        self.tokens = nn.Parameter(torch.zeros(2, latent))       # [mean, log variance], read out at the end
        self.layers = nn.ModuleList(TransformerLayer(latent, heads, ff) for _ in range(layers))

    def forward(self, x, mask):
        x = torch.cat([repeat(self.tokens, "two c -> b two c", b=len(x)), self.projection(x)], dim=1)
        x = x + sinusoid(x.shape[1], x.shape[2], x.device)       # the two tokens have positions 0 and 1
        mask = F.pad(mask, (2, 0), value=True)
        for layer in self.layers:
            x = layer(x, mask)
        return x[:, :2]


class TMRDecoder(nn.Module):
    """Latent (b c) and mask (b t) -> normalised features (b t d), padded rows zero."""

    def __init__(self, output_size=263, latent=256, ff=1024, layers=6, heads=4):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(latent, heads, ff, cross=True) for _ in range(layers))
        self.final_layer = nn.Linear(latent, output_size)

    def forward(self, latent, mask):
        x = repeat(sinusoid(mask.shape[1], latent.shape[1], latent.device), "t c -> b t c", b=len(latent))
        for layer in self.layers:
            x = layer(x, mask, memory=latent[:, None])
        return self.final_layer(x) * mask[..., None]


class TMR(nn.Module):
    """The three networks and the statistics of their motion space: from raw features and states of words to
    latents, and back. A latent is the mean, not a draw."""

    eps = 1e-12  # added to std: a feature that never changes has none

    def __init__(self, motion_encoder, text_encoder, motion_decoder, mean, std):
        super().__init__()
        self.motion_encoder, self.text_encoder = motion_encoder, text_encoder
        self.motion_decoder = motion_decoder
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def normalise(self, features, lengths):
        """Raw features (b t d), lengths (b) -> normalised (b t d), zeros after the end."""
        return masked((features - self.mean) / (self.std + self.eps), lengths)

    def embed_motion(self, features, lengths):
        """Raw features (b t d), lengths (b) in frames -> latents (b c)."""
        return self.motion_encoder(self.normalise(features, lengths),
                                   length_mask(lengths, features.shape[1]))[:, 0]

    def embed_text(self, states, counts):
        """Hidden states (b w 768), counts of words (b) -> latents (b c)."""
        return self.text_encoder(masked(states, counts), length_mask(counts, states.shape[1]))[:, 0]

    def decode(self, latents, lengths):
        """Latents (b c), lengths (b) -> raw features (b t d); rows after the end are the mean."""
        return self.motion_decoder(latents, length_mask(lengths, int(lengths.max()))) * (
            self.std + self.eps) + self.mean

    def similarity(self, text, motion):
        """Latents (b c) and (m c) -> cosines (b m) in [-1, 1]; TMR's score is half of that plus a half."""
        return F.normalize(text, dim=-1) @ F.normalize(motion, dim=-1).T


def from_official_tmr(state):
    """Published TMR weights (official names) -> the names here."""
    return unpack_attention({key.removeprefix("seqTransEncoder.").removeprefix("seqTransDecoder."): value
                             for key, value in state.items()})


WEIGHTS = {"motion_encoder": TMREncoder, "text_encoder": TMREncoder, "motion_decoder": TMRDecoder}
HEADS = 4  # as published, where config.json does not say
FOLDER = "TMR's folder, for instance tmr_humanml3d_guoh3dfeats: config.json and last_weights/ with three .pt"


def told_sizes(config, name):
    """Every value of a setting in the part "model" of a config.json, a set."""
    if isinstance(config, dict):
        own = {config[name]} if isinstance(config.get(name), int) else set()
        return own.union(*(told_sizes(part, name) for part in config.values()))
    return set()


def network_sizes(state, path, heads):
    """The arguments of TMREncoder or TMRDecoder, in their order, that fit the weights; `features` are those
    that go in or come out."""
    latent = size(state, path, "layers.0.norm1.weight")
    if latent % heads:
        raise InputError(f"{path}: a width of {latent} does not split into {heads} heads; take config.json "
                         "from the same folder")
    features = ("final_layer.weight", 0) if "final_layer.weight" in state else ("projection.weight", 1)
    layers = {match[1] for key in state if (match := re.match(r"layers\.(\d+)\.", key))}
    return dict(features=size(state, path, *features), latent=latent,
                ff=size(state, path, "layers.0.linear1.weight"), layers=len(layers), heads=heads)


def load_part(path, kind, heads):
    """A network from one .pt file, strict -> the network, its sizes."""
    state = from_official_tmr(read_state(path, path.stem, bare=True))
    sizes = network_sizes(state, path, heads)
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
        network = kind(*sizes.values())
    load_strict(network, state, path)
    return network, sizes


def read_config(path):
    """The dict in a config.json; else InputError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        said = stand_in(path) or f"is no JSON file ({type(error).__name__}); unpack the archive again"
        raise InputError(f"{path}: {said}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise InputError(f"{path}: has no part 'model'; take the config.json of a TMR folder")
    return config


def read_statistics(folder, config, statistics):
    """mean, std (d) from the folder `statistics`, or from beside config.json, or from where that says."""
    for key in ("data", "motion_loader", "normalizer", "base_dir"):
        config = config.get(key) if isinstance(config, dict) else None
    places = [Path(statistics)] if statistics else [folder] + [
        root / config for root in (folder, folder.parent.parent) if isinstance(config, str)]
    place = next((place for place in places if (place / "mean.pt").is_file()), places[0])
    found = []
    for path in (place / "mean.pt", place / "std.pt"):
        if not path.is_file():
            raise InputError(f"{path}: no such file; copy mean.pt and std.pt there from TMR's repository, "
                             "stats/{humanml3d,kitml}/guoh3dfeats")
        value = load_plain(path)
        if not torch.is_tensor(value) or value.ndim != 1 or not torch.isfinite(value).all() or (
                value < 0).any() and path.stem == "std":
            raise InputError(f"{path}: wanted a tensor of finite numbers, one a feature; copy it again from "
                             "TMR's repository")
        found.append(value.float())
    return found


def load_folder(folder, statistics=None):
    """A published folder -> frozen TMR; InputError that names the file and the fix. statistics: the folder of
    mean.pt and std.pt, where they lie elsewhere."""
    paths = {name: f"last_weights/{name}.pt" for name in WEIGHTS}
    folder = require_files(folder, ("config.json", *paths.values()), FOLDER)
    config = read_config(folder / "config.json")
    told = {name: told_sizes(config["model"], key) for name, key in (
        ("latent", "latent_dim"), ("ff", "ff_size"), ("layers", "num_layers"), ("heads", "num_heads"))}
    heads = min(told["heads"], default=HEADS)
    parts = {name: load_part(folder / paths[name], kind, max(1, heads)) for name, kind in WEIGHTS.items()}
    for name, (_, sizes) in parts.items():
        if wrong := [key for key in told if told[key] - {sizes[key]}]:
            raise InputError(f"{folder / paths[name]}: {wrong[0]} is {sizes[wrong[0]]}, config.json says "
                             f"{sorted(told[wrong[0]])}; take both from one folder")
    mean, std = read_statistics(folder, config, statistics)
    widths = [parts[name][1]["features"] for name in ("motion_encoder", "motion_decoder")]
    latents = {sizes["latent"] for _, sizes in parts.values()}
    if {*widths} != {len(mean)} or len(std) != len(mean) or len(latents) > 1:
        raise InputError(f"{folder}: motion widths {widths}, statistics {len(mean)} and {len(std)}, latents "
                         f"{sorted(latents)}; take all files from one model and data set")
    return freeze(TMR(*(network for network, _ in parts.values()), mean, std))
