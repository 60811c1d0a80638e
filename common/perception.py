"""The synthetic perception score: how little a motion looks like a damaged one.

It stands in for a model of human preference such as MotionCritic. Nobody judged anything here, so the score
must not be called human judgement. No text enters it: a motion that does not do what was asked can raise it,
for instance by standing still. It has learnt that a real motion looks better than its damaged copy.

Letters: b batch, t frames, n patches of frames, j joints, d features, r rows.
"""
import copy
import math

import torch
from einops import rearrange
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from common import InputError, NonFiniteError, datasets, freeze, generator, length_mask
from common.embedded.damages import DAMAGES, FREEZES, HELD_OUT, damaged, metres
from common.published import motion_critic
from common.published.motion_critic import MotionCritic
from common.training import cached, initialise, source_of, supervised

# ---- 1. The critic -----------------------------------------------------------------------------

# Not in the paper: four frames of a joint are one token, thirteen joints, one layer of width 24. Every motion
# of every iteration is scored; with a token for each frame and each joint that took twelve times as long.
PATCH, SIZES = 4, dict(width=24, rep=16, heads=2, hidden=32, score_hidden=32, depth=1)
PARTS = ("root", "neck", "head", "l_elbow", "r_elbow", "l_wrist", "r_wrist", "l_knee", "r_knee", "l_ankle",
         "r_ankle", "l_toe", "r_toe")


class PerceptionCritic(nn.Module):
    """The score of a raw motion, higher where it looks less damaged. It reads joints and their velocities,
    relative to where the root starts, with heights kept; it owns the statistics that it normalises with."""

    def __init__(self, skeleton):
        super().__init__()
        self.skeleton = skeleton
        self.net = MotionCritic(6 * PATCH, len(PARTS), maxlen=datasets.MAX_LENGTH // PATCH, **SIZES)
        self.register_buffer("mean", torch.zeros(len(PARTS), 6))
        self.register_buffer("std", torch.ones(len(PARTS), 6))

    def inputs(self, joints):
        """joints (b t j 3) in metres -> positions in m and velocities in m/s of PARTS (b t j 6)."""
        joints = joints[:, :, [self.skeleton.index[part] for part in PARTS]]
        joints = joints - joints[:, :1, :1] * joints.new_tensor([1.0, 0.0, 1.0])
        velocity = joints.diff(dim=1, prepend=joints[:, :1]) * self.skeleton.fps
        return torch.cat([joints, velocity], -1)

    def score_joints(self, joints, lengths):
        """joints (b t j 3) in metres, anything after the ends, lengths (b) -> scores (b). Frames that fill no
        patch of four are left out; InputError for a motion shorter than a patch."""
        if (lengths < PATCH).any():
            raise InputError(f"a motion of {int(lengths.min())} frames is too short for a perception score")
        n = joints.shape[1] // PATCH
        inside = length_mask(lengths, n * PATCH)[..., None, None]
        x = self.inputs(joints[:, :n * PATCH].where(inside, 0.0))
        x = rearrange((x - self.mean) / self.std, "b (n p) j c -> b n j (p c)", p=PATCH)
        return self.net(x, length_mask(lengths // PATCH, n))

    def score(self, motion, lengths):
        """motion (b t d) raw features, anything after the ends, lengths (b) -> scores (b)."""
        # Before the integration over time, whose gradient would carry a NaN back to the real frames.
        motion = motion.where(length_mask(lengths, motion.shape[1])[..., None], 0.0)
        return self.score_joints(metres(motion, self.skeleton), lengths)


# ---- 2. Training -------------------------------------------------------------------------------

GRADES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # of the better and the worse side; 0 = real


def decoded(motions, vq, chunk=128):
    """Motions (t d) through the tokenizer and back, a list."""
    out = []
    for start in range(0, len(motions), chunk):
        part = motions[start:start + chunk]
        lengths = torch.tensor([len(motion) for motion in part], device=vq.mean.device)
        padded = pad_sequence(part, batch_first=True).to(vq.mean.device)  # b t d
        back, lengths = vq.decode(*vq.tokenise(padded, lengths))
        out += [motion[:n].cpu() for motion, n in zip(back, lengths.tolist())]
    return out


def cut(motions, skeleton, g):
    """A random part of each motion (t d), equally long: a multiple of 4 frames, no less than 1.6 s."""
    def draw(n):
        return int(torch.randint(n, (), generator=g))
    longest, shortest = min(map(len, motions)) // PATCH, math.ceil(1.6 * skeleton.fps / PATCH)
    t = PATCH * (longest - draw(max(1, longest - shortest + 1)))
    starts = [draw(len(motion) - t + 1) for motion in motions]
    return [motion[start:start + t] for motion, start in zip(motions, starts)]


def make_pairs(motions, count, names, grades, skeleton, vq, seed, purpose):
    """`count` pairs of raw motions (t d) -> lists of joints (t j 3) in metres, the better and the worse ones.
    Both sides show the same part of one, see cut: neither length nor content tells them apart. Two damaged
    sides differ in strength alone."""
    better, worse = [], []
    for k in range(count):
        g = generator(seed, 0, purpose, k)
        motion, = cut([motions[k % len(motions)]], skeleton, g)
        name, both = (part[int(torch.randint(len(part), (), generator=g))] for part in (names, grades))
        for side, grade in zip((better, worse), both):
            again = generator(seed, 1, purpose, k)  # on both sides the same draws
            side.append(damaged(name, motion, grade, again, skeleton, vq))
    return better, worse


def rank(critic, better, worse, device):
    """Lists of joints of equal lengths in pairs -> scores of the better (r), of the worse (r)."""
    lengths = torch.tensor([len(joints) for joints in better]).repeat(2).to(device)
    joints = pad_sequence(better + worse, batch_first=True).to(device)  # b t j 3
    return critic.score_joints(joints, lengths).chunk(2)


def train_perception(critic, clips, clips_val, vq, loss, *, iterations, batch, lr, seed, device):
    """Learn to rank -> {"accuracy": {damage: share of held-out pairs where the real motion scores higher}}.
    loss(better, worse): scores (r) of pairs -> scalar. The weights with the lowest held-out loss are kept."""
    skeleton, known = critic.skeleton, [name for name in DAMAGES if name != HELD_OUT]
    real, real_val = ([torch.from_numpy(clip.features) for clip in part[::math.ceil(len(part) / most)]]
                      for part, most in ((clips, 2000), (clips_val, 200)))  # enough, even of large data sets
    rows = torch.cat([critic.inputs(metres(motion, skeleton)[None])[0] for motion in real])  # t j 6
    critic.mean.copy_(rows.mean(0))
    critic.std.copy_(rows.std(0).clamp(min=1e-3))
    # Every other motion went through the tokenizer first, on both sides of its pair: what is scored later is
    # always decoded. A critic that knew real motion alone found 80 % of the freezes there, this one 88 %.
    motions, motions_val = ([motion for both in zip(part, decoded(part, vq)) for motion in both]
                            for part in (real, real_val))
    pairs = make_pairs(motions, min(2 * len(motions), iterations * batch), known, GRADES, skeleton, vq, seed,
                       "pairs")
    held_out = make_pairs(motions_val, len(motions_val), known, GRADES, skeleton, vq, seed, "held-out pairs")
    lowest, best, every = math.inf, None, max(1, iterations // 10)

    def pair_loss(iteration):
        chosen = torch.randint(len(pairs[0]), (batch,), generator=generator(seed, iteration, "perception"))
        better, worse = rank(critic, *([side[k] for k in chosen] for side in pairs), device)
        return loss(better, worse), {"accuracy": (better > worse).float().mean().item()}

    def keep_the_best(iteration):
        nonlocal lowest, best
        if (iteration + 1) % every and iteration + 1 < iterations:
            return
        with torch.no_grad():
            value = loss(*rank(critic, *held_out, device)).item()
        if not math.isfinite(value):
            raise NonFiniteError(f"perception: loss {value} on held-out clips at iteration {iteration}")
        if value < lowest:
            lowest, best = value, copy.deepcopy(critic.state_dict())

    supervised("perception", critic.parameters(), pair_loss, iterations=iterations, lr=lr,
               after=keep_the_best)
    critic.load_state_dict(best)
    shares = {}
    for name in DAMAGES:
        against = make_pairs(real_val, len(real_val), [name], GRADES[:3], skeleton, vq, seed, f"{name} pairs")
        with torch.no_grad():
            better, worse = rank(critic, *against, device)
        shares[name] = (better > worse).float().mean().item()
    return {"accuracy": shares, "loss": lowest}


def fit_perception(dataset, vq, loss, checkpoint="", *, iterations, seed, cache_dir, use_cache, device,
                   batch=32, lr=3e-3):
    """A trained critic, or its copy in the cache -> frozen PerceptionCritic, notes. It learns from the half
    of the train split that the judge never sees. vq: the tokenizer whose motions it will score; loss: see
    train_perception; checkpoint: a published MotionCritic is taken in its place."""
    if checkpoint:
        return motion_critic.fit_published(
            checkpoint, dataset, iterations=iterations, seed=seed, cache_dir=cache_dir, use_cache=use_cache,
            device=device)
    clips, clips_val = datasets.half(dataset.splits["train"], 0), dataset.splits["val"]
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global stream
        critic = PerceptionCritic(dataset.skeleton)
    initialise(critic, generator(seed, 0, "perception_init"))
    training = dict(iterations=iterations, batch=batch, lr=lr, seed=seed)

    def build():
        notes = train_perception(critic.to(device), clips, clips_val, vq, loss, device=device, **training)
        return {"model": critic.state_dict(), **notes}

    code = source_of(PerceptionCritic, *DAMAGES.values(), damaged, cut, make_pairs, train_perception, loss,
                     supervised, motion_critic.DSTformer, motion_critic.Block, MotionCritic)
    key = [dataset.fingerprint, vq.state_dict(), vq.halvings, SIZES, PATCH, list(PARTS), list(FREEZES), code,
           training]
    stored = cached(cache_dir, key, build, "perception", use_cache)
    critic.load_state_dict(stored.pop("model"))
    shown = [f"{name} {share:.2f}" for name, share in stored["accuracy"].items() if name != HELD_OUT]
    print(f"  synthetic perception: accuracy {', '.join(shown)} | never trained on: "
          f"{HELD_OUT} {stored['accuracy'][HELD_OUT]:.2f}")
    return freeze(critic.to(device)), stored
