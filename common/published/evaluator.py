"""The evaluator of the text-to-motion benchmark (Guo et al., CVPR 2022), read from its released weights.

Scoring only: dropout layers of the released code are identities. Attribute names follow its checkpoints.
Its folder:

    finest.tar                     a torch file, from text_mot_match/model of the released archive t2m or kit
    meta/mean.npy  std.npy         the evaluator's own statistics, from Comp_v6_KLD01 (t2m) or Comp_v6_KLD005
                                   (kit) there: not the data folder's Mean.npy and Std.npy
    glove/our_vab_data.npy  our_vab_words.pkl  our_vab_idx.pkl

Letters: b batch, t frames, n tokens or words, d features, c embedding.
"""
import pickle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from common import InputError, freeze, masked
from common.published import load_plain
from common.published.files import read_meta, read_numbers, require_files
from common.runs import stand_in


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
        return self.embed_normalised(motion, lengths)

    def embed_normalised(self, motion, lengths):
        """Normalised motions (b t d), lengths (b) -> (b c). What stands behind a length is the caller's: real
        motions have zeros there everywhere, MDM's evaluation leaves generated frames, MLD's renormalises
        zeros. The three are not comparable."""
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


# ---- Words -------------------------------------------------------------------------------------------------


CLASSES = ("VERB", "NOUN", "DET", "ADP", "NUM", "AUX", "PRON", "ADJ", "ADV", "Loc_VIP", "Body_VIP", "Obj_VIP",
           "Act_VIP", "Desc_VIP", "OTHER")

# Words whose class is their own, whatever their part of speech: the released evaluator's five lists.
VIP = {"Loc_VIP": "left right clockwise counterclockwise anticlockwise forward back backward up down "
                  "straight curve",
       "Body_VIP": "arm chin foot feet face hand mouth leg waist eye knee shoulder thigh",
       "Obj_VIP": "stair dumbbell chair window floor car ball handrail baseball basketball",
       "Act_VIP": "walk run swing pick bring kick put squat throw hop dance jump turn stumble stop sit lift "
                  "lower raise wash stand kneel stroll rub bend balance flap jog shuffle lean rotate spin "
                  "spread climb",
       "Desc_VIP": "slowly carefully fast careful slow quickly happy angry sad happily angrily sadly"}
OWN_CLASS = {word: name for name, words in VIP.items() for word in words.split()}


class Glove(NamedTuple):
    """Word vectors with the rules of the released evaluator for a token "word/POS"."""
    rows: dict              # word -> row of vectors
    vectors: torch.Tensor   # n 300, float32

    def token(self, token):
        """(row of the vectors, number of the class) of one token; case matters, as there."""
        word, slash, tag = token.partition("/")
        if not slash or "/" in tag:
            raise InputError(f"{token!r}: is no token word/POS; correct the text file it comes from")
        if word not in self.rows:  # also where the word has a class of its own
            return self.rows["unk"], CLASSES.index("OTHER")
        tag = OWN_CLASS.get(word, tag)
        return self.rows[word], CLASSES.index(tag if tag in CLASSES else "OTHER")

    def encode(self, captions):
        """Captions as lists of tokens -> words (b 22 300), pos (b 22 15), counts (b), for embed_text."""
        framed, counts = zip(*map(official_tokens, captions))
        found = torch.tensor([[self.token(token) for token in tokens] for tokens in framed])  # b n 2
        return (self.vectors[found[..., 0]], F.one_hot(found[..., 1], len(CLASSES)).float(),
                torch.tensor(counts))


class PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers need no class, so none is allowed: nothing can be executed."""

    def find_class(self, module, name):
        """Always an UnpicklingError."""
        raise pickle.UnpicklingError(f"holds {module}.{name}")


def read_pickle(path, kind, what):
    """What a pickle of plain values holds, a `kind` (list or dict); else InputError."""
    try:
        with open(path, "rb") as file:
            found = PlainUnpickler(file).load()
    except Exception as error:  # a damaged pickle fails in a dozen ways
        said = stand_in(path) or (f"is no pickle of {what} ({type(error).__name__}: {error}); copy or "
                                  "download it again")
        raise InputError(f"{path}: {said}".replace("\n", " ")) from error
    if not isinstance(found, kind):
        raise InputError(f"{path}: holds a {type(found).__name__}, wanted {what}; is it the other file?")
    return found


def read_glove(folder):
    """The Glove in a folder of word vectors; InputError that names the file and the fix."""
    folder = require_files(folder, ("our_vab_data.npy", "our_vab_words.pkl", "our_vab_idx.pkl"),
                           "the folder glove of the released evaluator")
    words = read_pickle(folder / "our_vab_words.pkl", list, "a list of words")
    rows = read_pickle(folder / "our_vab_idx.pkl", dict, "a dict from words to rows")
    vectors = read_numbers(folder / "our_vab_data.npy", (None, 300))
    strings = {type(word) for word in words} == {str} and {*words} == {*rows} and len(words) == len(rows)
    numbers = all(type(row) is int and 0 <= row < len(vectors) for row in rows.values())
    if not (strings and numbers):
        raise InputError(f"{folder}: our_vab_words.pkl, our_vab_idx.pkl and our_vab_data.npy do not belong "
                         "together; copy all three from one place")
    if missing := [word for word in ("sos", "eos", "unk") if word not in rows]:
        raise InputError(f"{folder / 'our_vab_words.pkl'}: lacks {missing[0]!r}; copy the released file")
    return Glove(rows, torch.from_numpy(vectors).float())


def load_evaluator_folder(folder):
    """The official evaluator's folder -> frozen OfficialEvaluator, Glove; InputError that names the file and
    the fix. Both data sets: HumanML3D with 263 features, KIT-ML with 251."""
    folder = require_files(folder, ("finest.tar", "meta/mean.npy", "meta/std.npy"),
                           "the evaluator's folder: finest.tar, meta/mean.npy, meta/std.npy and glove/")
    glove = read_glove(folder / "glove")
    statistics = read_meta(folder / "meta", None, "scorer")
    judge = load_official_evaluator(folder / "finest.tar", statistics)
    width = judge.movement_encoder.main[0].in_channels + 4
    if width != len(statistics.mean):
        raise InputError(f"{folder / 'finest.tar'}: reads {width} features, meta/mean.npy has "
                         f"{len(statistics.mean)}; take both from one of t2m (263) and kit (251)")
    words, pos = judge.text_encoder.pos_emb.out_features, judge.text_encoder.pos_emb.in_features
    if (words, pos) != (glove.vectors.shape[1], len(CLASSES)):
        raise InputError(f"{folder / 'finest.tar'}: reads vectors of {words} and {pos} classes of words, "
                         f"wanted {glove.vectors.shape[1]} and {len(CLASSES)}; use the released file")
    return judge, glove
