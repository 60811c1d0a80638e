"""The evaluator of the text-to-motion benchmark (Guo et al., CVPR 2022), read from its released weights.

Scoring only: dropout layers of the released code are identities. Attribute names follow its checkpoints.
Letters: b batch, t frames, n tokens or words, d features, c embedding.
"""
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from common import InputError, freeze, masked
from common.published import load_plain


class MovementEncoder(nn.Module):
    """Four frames -> one token: motion (b t d) without the contact features -> (b t/4 c)."""

    def __init__(self, input_size, hidden_size=512, output_size=512):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv1d(input_size, hidden_size, 4, 2, 1), nn.Identity(), nn.LeakyReLU(0.2),
            nn.Conv1d(hidden_size, output_size, 4, 2, 1), nn.Identity(), nn.LeakyReLU(0.2))
        self.out_net = nn.Linear(output_size, output_size)

    def forward(self, motion):
        return self.out_net(rearrange(self.main(rearrange(motion, "b t d -> b d t")), "b c n -> b n c"))


class MotionEncoderBiGRU(nn.Module):
    """Tokens (b n i) and their counts (b) -> embedding (b c), by the last states of a packed two-way GRU."""

    def __init__(self, input_size=512, hidden_size=1024, output_size=512):
        super().__init__()
        self.input_emb = nn.Linear(input_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True, bidirectional=True)
        self.hidden = nn.Parameter(torch.zeros(2, 1, hidden_size))      # learned initial state
        self.output_net = nn.Sequential(
            nn.Linear(2 * hidden_size, hidden_size), nn.LayerNorm(hidden_size), nn.LeakyReLU(0.2),
            nn.Linear(hidden_size, output_size))

    def forward(self, tokens, counts):
        start = repeat(self.hidden, "two 1 c -> two b c", b=len(tokens)).contiguous()
        # The official wrapper sorts by length and returns that order; here the caller's order is kept.
        _, last = self.gru(pack_padded_sequence(self.input_emb(tokens), counts.cpu(), batch_first=True,
                                                enforce_sorted=False), start)
        return self.output_net(rearrange(last, "two b c -> b (two c)"))


class TextEncoderBiGRU(MotionEncoderBiGRU):
    """Word vectors (b n 300) and one-hot part of speech (b n 15) with counts (b) -> embedding (b c)."""

    def __init__(self, word_size=300, pos_size=15, hidden_size=512, output_size=512):
        super().__init__(word_size, hidden_size, output_size)
        self.pos_emb = nn.Linear(pos_size, word_size)

    def forward(self, words, pos, counts):
        return super().forward(words + self.pos_emb(pos), counts)


class OfficialEvaluator(nn.Module):
    """The three networks behind one interface; sizes are read from the weights, loading is strict.

    state: {"movement_encoder", "motion_encoder", "text_encoder"} -> state dicts (the released `finest.tar`);
    statistics: the evaluator's own Mean / Std with role "scorer" (its std is the data set's divided by 25 in
    the root and contact blocks). Motions are padded with zero rows to max_length, as there, because the
    convolutions look up to three rows past the end of a clip.
    """

    def __init__(self, state, statistics, max_length=196):
        super().__init__()
        statistics.require("scorer")
        hidden, width, _ = state["movement_encoder"]["main.0.weight"].shape
        tokens = len(state["movement_encoder"]["out_net.weight"])
        self.movement_encoder = MovementEncoder(width, hidden, tokens)
        output, hidden = state["motion_encoder"]["output_net.3.weight"].shape
        self.motion_encoder = MotionEncoderBiGRU(tokens, hidden, output)
        output, hidden = state["text_encoder"]["output_net.3.weight"].shape
        self.text_encoder = TextEncoderBiGRU(*state["text_encoder"]["pos_emb.weight"].shape, hidden, output)
        for name in ("movement_encoder", "motion_encoder", "text_encoder"):
            getattr(self, name).load_state_dict(state[name])
        self.max_length = max_length
        self.register_buffer("mean", statistics.mean.clone())
        self.register_buffer("std", statistics.std.clone())

    def embed_motion(self, features, lengths):
        """Raw features (b t d), lengths (b) in frames -> (b c), in input order."""
        if features.shape[1] > self.max_length:
            raise ValueError(f"motions of {features.shape[1]} frames, the evaluator takes {self.max_length}")
        motion = masked((features - self.mean) / self.std, lengths)
        motion = F.pad(motion, (0, 0, 0, self.max_length - features.shape[1]))
        return self.motion_encoder(self.movement_encoder(motion[..., :-4]), lengths // 4)

    def embed_text(self, words, pos, counts):
        """Word vectors (b 22 300), one-hot part of speech (b 22 15), word counts (b) -> (b c)."""
        return self.text_encoder(words, pos, counts)


def load_official_evaluator(path, statistics):
    """Frozen OfficialEvaluator from a released `text_mot_match/model/finest.tar`; else InputError."""
    state = load_plain(path)
    statistics.require("scorer")
    try:
        return freeze(OfficialEvaluator(dict(state), statistics))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: holds no weights of the evaluator ({type(error).__name__}); give its "
                         "finest.tar, a dict of movement_encoder, motion_encoder and text_encoder") from error


def official_tokens(tokens, max_tokens=20):
    """(tokens, count) as the official text encoder reads them: sos, at most 20, eos; then 'unk' to 22."""
    framed = ["sos/OTHER", *tokens[:max_tokens], "eos/OTHER"]
    return framed + ["unk/OTHER"] * (max_tokens + 2 - len(framed)), len(framed)
