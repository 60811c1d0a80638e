"""MDM (Tevet et al., ICLR 2023; github.com/GuyTevet/motion-diffusion-model): the published text-to-motion
networks, with the interface of the scripts' own denoiser.

    published folder              steps    frames past the end   text
    humanml_trans_enc_512, kit_   1000     are looked at         one vector of CLIP ViT-B/32 (512)
    humanml_enc_512_50steps       50       masked                the same
    humanml_trans_dec_512_bert    50       masked                the tokens of DistilBERT (768)

Steps, masking and averaged weights are what args.json says, the file beside the weights. The network answers
with the finished motion; guidance 2.5; nothing is clipped. Sampling at every step of its schedule with the
variance of Ho et al. 2020, eq. 7, is order 1 of the solver in ddpo_motion.py on `MDM.grid`.
Not here: emb_trans_dec, the prefix model (DiP), actions, other text encoders; each is refused.

Letters: b batch, t frames, n tokens (frames), w words, d features, i text features, c width.
"""
import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError, freeze, samplers, sinusoid
from common.published import layers, load_plain, load_strict, size, state_of
from common.runs import stand_in

FRAMES = 196                             # of every sample in its evaluation
FEATURES = {"humanml": 263, "kit": 251}  # `dataset` of args.json -> d
TEXT = {("trans_enc", "clip"): 512, ("trans_dec", "bert"): 768}  # `arch`, `text_encoder_type` -> i
MOST_STEPS = 5000                        # as many timesteps as its table has positions
# What older files leave out means this.
DEFAULTS = {"text_encoder_type": "clip", "mask_frames": False, "use_ema": False, "diffusion_steps": 1000}
# The same, and no other value is read here.
ONLY = {"context_len": 0, "pred_len": 0, "unconstrained": False, "emb_trans_dec": False,
        "emb_policy": "add", "noise_schedule": "cosine", "sigma_small": True}
TABLES = ("sequence_pos_encoder.pe", "embed_timestep.sequence_pos_encoder.pe")  # of positions: computed here
NAMES = (("input_process.poseEmbedding.", "project_in."), ("output_process.poseFinal.", "project_out."),
         ("embed_timestep.time_embed.", "time."))  # in the file, and here


def cosine_betas(steps):
    """The variances (steps,) in float64 of a cosine schedule (Nichol & Dhariwal 2021, eq. 17) with so many
    timesteps: samplers.make_betas has 1000, and 1000 thinned out to 50 are another schedule."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    curve = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - curve[1:] / curve[:-1]).clamp(max=0.999)


def spread(total, count, ddim=False):
    """`count` of the timesteps 0 .. total - 1, ascending: evenly from the first to the last; ddim: every k-th
    from 0, and then the last one stays out (Song et al. 2021). InputError if there are none."""
    if ddim:
        found = next((range(0, total, k) for k in range(1, total) if len(range(0, total, k)) == count), None)
        if found is None:
            raise InputError(f"--steps {count}: no whole stride takes so many of {total} timesteps")
        return list(found)
    if not 2 <= count <= total:
        raise InputError(f"--steps {count}: 2 to {total}, the timesteps of the published network")
    # A running sum, as there: it decides to which side a half is rounded.
    strides = itertools.repeat((total - 1) / (count - 1), count - 1)
    return [round(at) for at in itertools.accumulate(strides, initial=0.0)]


class MDM(nn.Module):
    """x (b n d) of normalised frames, timesteps (b) -> the finished motion (b n d).

    words: the text is a memory of tokens (trans_dec), otherwise one vector that joins the frames as a token
    (trans_enc). texts(captions): see layers.read_text; MDM cuts a caption to 20 tokens of CLIP.
    """
    prediction, guidance_scale = "sample", 2.5

    def __init__(self, feature_dim, text_dim, width, ff, depth, *, words, mask_frames, timesteps, texts=None):
        super().__init__()
        self.sizes = dict(feature_dim=feature_dim, text_dim=text_dim, width=width, ff=ff, depth=depth,
                          words=words, mask_frames=mask_frames, timesteps=timesteps)  # see t2m_gpt.export
        self.text_dim, self.words, self.mask_frames, self.texts = text_dim, words, mask_frames, texts
        # Without a mask a motion of any length is cut from one of 196 frames.
        self.codec = layers.FrameCodec(feature_dim, always=0 if mask_frames else FRAMES)
        self.width, self.dims = width, feature_dim
        self.project_in, self.project_out = nn.Linear(feature_dim, width), nn.Linear(width, feature_dim)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_text = nn.Linear(text_dim, width)
        self.layers = nn.ModuleList(layers.Layer(width, ff, cross=words) for _ in range(depth))
        self.register_buffer("timestep_table", sinusoid(timesteps, width), persistent=False)
        self.alphas_cumprod = (1 - cosine_betas(timesteps)).cumprod(0)

    def grid(self, count=None, ddim=False):
        """The samplers.Grid of `count` of its timesteps, by default all, down to no noise; see `spread`."""
        total = len(self.alphas_cumprod)
        kept = torch.tensor(spread(total, total if count is None else count, ddim)).flip(0)
        ratio = (1 / self.alphas_cumprod[kept] - 1).sqrt()  # sigma / alpha
        return samplers.Grid.from_ratio(kept, F.pad(ratio, (0, 1)))

    def encode_text(self, captions, spoil=None):
        """b captions -> text (b w i), text_mask (b w); w = 1 for vectors. spoil: published networks are not
        trained here, so nothing is spoiled."""
        return layers.read_text(self.texts, captions, self.text_dim, self.codec.mean.device)

    def drop_text(self, text, text_mask, dropped):
        """The captions with `dropped` (b) become zeros, which are embedded like others; the mask stays."""
        return text.masked_fill(dropped[:, None, None], 0.0), text_mask

    def embed_time(self, timesteps):
        """timesteps (b), whole numbers of any type -> (b c)"""
        return self.time(self.timestep_table[timesteps.long()])

    def answer(self, x, timesteps, mask, text, text_mask):
        """As `forward`, with what the network says of padding left in."""
        h, time = self.project_in(x), self.embed_time(timesteps)  # b n c, b c
        mask = mask if self.mask_frames else None
        if self.words:
            memory = self.embed_text(text) + time[:, None]        # b w c, the time on every word
        else:
            memory = text_mask = None
            token = (time + self.embed_text(text[:, 0]))[:, None]  # b 1 c, at position 0
            h, mask = torch.cat([token, h], 1), None if mask is None else F.pad(mask, (1, 0), value=True)
        h = h + sinusoid(h.shape[1], self.width, h.device)
        for layer in self.layers:
            h = layer(h, mask, memory, text_mask)
        return self.project_out(h if self.words else h[:, 1:])

    def forward(self, x, timesteps, mask, text, text_mask):
        """x (b n d), timesteps (b), mask (b n), text (b w i), text_mask (b w) -> (b n d)"""
        return self.answer(x, timesteps, mask, text, text_mask) * mask[..., None]  # padding stays zero


def read_args(path):
    """The settings of args.json beside a checkpoint, defaults filled in; InputError if it is missing, no
    JSON, or of a network that is not read here."""
    beside = Path(path).with_name("args.json")
    try:
        stored = json.loads(beside.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{beside}: no such file; put the args.json of its archive beside "
                         f"{Path(path).name}, it says which network the weights are of") from None
    except (OSError, ValueError, RecursionError) as error:
        said = stand_in(beside) or f"cannot be read as JSON ({type(error).__name__}); unpack it again"
        raise InputError(f"{beside}: {said}") from None
    if not isinstance(stored, dict) or not {"arch", "dataset", "layers", "latent_dim"} <= stored.keys():
        raise InputError(f"{beside}: lacks arch, dataset, layers or latent_dim; give MDM's args.json")
    settings = DEFAULTS | ONLY | stored
    for key, value in DEFAULTS.items():
        if type(settings[key]) is not type(value):
            raise InputError(f"{beside}: {key} is {settings[key]!r}, wanted one like {value!r}")
    for key, value in ONLY.items():
        if settings[key] != value:
            raise InputError(f"{beside}: {key} is {settings[key]!r}, only {value!r} is read here; use one of "
                             "MDM's text-to-motion checkpoints")
    arch, encoder, dataset = (str(settings[key]) for key in ("arch", "text_encoder_type", "dataset"))
    steps = settings["diffusion_steps"]
    if (arch, encoder) not in TEXT or dataset not in FEATURES or not 2 <= steps <= MOST_STEPS:
        raise InputError(f"{beside}: arch {arch!r} with text {encoder!r} on {dataset!r}, {steps} steps; read "
                         "here are trans_enc with clip and trans_dec with bert, on humanml or kit")
    return settings


def pick_weights(stored, path, use_ema):
    """The state dict in what an MDM file holds: `model_avg` where args.json asks for it and it is there, else
    `model`, else the file itself; without the two tables of positions, whose length differs between files."""
    averaged = use_ema and isinstance(stored, dict) and "model_avg" in stored
    state = state_of(stored, path, "model_avg" if averaged else "model", bare=True)
    if "input_process.poseEmbedding.weight" not in state:
        raise InputError(f"{path}: holds no weights of MDM; give its modelSTEPS.pt")
    return {key: value for key, value in state.items() if key not in TABLES}


def sizes(state, path, settings):
    """The arguments of MDM that fit the weights; InputError if args.json contradicts them."""
    words = settings["arch"] == "trans_dec"
    stack = "seqTransDecoder" if words else "seqTransEncoder"
    found = dict(feature_dim=size(state, path, "input_process.poseEmbedding.weight", 1),
                 text_dim=size(state, path, "embed_text.weight", 1),
                 width=size(state, path, "input_process.poseEmbedding.weight"),
                 ff=size(state, path, f"{stack}.layers.0.linear1.weight"),
                 depth=len({key.split(".")[2] for key in state if key.startswith(f"{stack}.layers.")}))
    told = dict(feature_dim=FEATURES[settings["dataset"]], width=settings["latent_dim"],
                depth=settings["layers"], text_dim=TEXT[settings["arch"], settings["text_encoder_type"]])
    if wrong := [f"{key} {found[key]}, not {value}" for key, value in told.items() if found[key] != value]:
        raise InputError(f"{path}: has {'; '.join(wrong)}; args.json beside it is that of another checkpoint")
    if found["width"] % layers.HEADS or found["width"] % 2:
        raise InputError(f"{path}: a width of {found['width']} does not split into {layers.HEADS} heads")
    return found | dict(words=words, mask_frames=settings["mask_frames"],
                        timesteps=settings["diffusion_steps"])


def load_mdm(path, statistics, texts=None, device="cpu"):
    """A published MDM and the args.json beside it -> frozen MDM.

    statistics: of the data folder (its Mean.npy and Std.npy), role "generator". texts: see layers.read_text.
    """
    stored, settings = load_plain(path), read_args(path)
    state = pick_weights(stored, path, settings["use_ema"])
    arguments = sizes(state, path, settings)
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
        model = MDM(**arguments, texts=texts)
    stack = "seqTransDecoder." if model.words else "seqTransEncoder."
    state = layers.renamed(state, path, (*NAMES, (stack, "")))
    load_strict(model, state, path, free=("codec.mean", "codec.std"))
    layers.take_statistics(model.codec, statistics, path)
    return freeze(model.to(device))
