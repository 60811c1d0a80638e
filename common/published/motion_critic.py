"""MotionCritic (github.com/ou524u/MotionCritic): its network, and its published weights behind a network that
guesses SMPL rotations from joints, which MotionRL (arXiv 2410.06513, appendix A) calls g.

  1. the network       with the published names of weights; common/perception.py uses it with other sizes
  2. its input         24 SMPL rotations and the root, as into_critic of the published code makes it
  3. g                 joints -> rotations
  4. the critic        motion -> score, for a downloaded checkpoint

Letters: b batch, t and n frames (or patches of them), j joints, h heads, c width, r rows.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from common import InputError, datasets, features, freeze, generator, training
from common.published import load_strict, read_state, size

# ---- 1. The network ----------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, width, hidden, out):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention of rows x (r n c) to the keys where mask (r n) is True; without a mask to all."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask=None):
        q, k, v = rearrange(self.qkv(x), "r n (three h c) -> three r h n c", three=3, h=self.heads)
        keys = None if mask is None else mask[:, None, None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self.proj(rearrange(x, "r h n c -> r n (h c)"))


class Block(nn.ModuleDict):
    """Attention and MLP over joints ("s") and over time ("t"), in this `order`: x (b n j c), mask (b n)."""

    def __init__(self, width, heads, hidden, order):
        super().__init__()
        self.order = order
        for axis in "st":
            self[f"norm1_{axis}"], self[f"norm2_{axis}"] = nn.LayerNorm(width), nn.LayerNorm(width)
            self[f"attn_{axis}"] = Attention(width, heads)
            self[f"mlp_{axis}"] = MLP(width, hidden, width)

    def forward(self, x, mask=None):
        b, n, j, _ = x.shape
        for axis in self.order:
            if axis == "s":
                rows, keys = rearrange(x, "b n j c -> (b n) j c"), None
            else:
                rows = rearrange(x, "b n j c -> (b j) n c")
                keys = None if mask is None else repeat(mask, "b n -> (b j) n", j=j)
            rows = rows + self[f"attn_{axis}"](self[f"norm1_{axis}"](rows), keys)
            rows = rows + self[f"mlp_{axis}"](self[f"norm2_{axis}"](rows))
            x = rearrange(rows, "(b n) j c -> b n j c" if axis == "s" else "(b j) n c -> b n j c", b=b)
        return x


class DSTformer(nn.Module):
    """x (b n j i) -> features (b n j c): in each layer two branches, fused by weights that depend on both."""

    def __init__(self, inputs, joints, width, rep, heads, hidden, depth, maxlen):
        super().__init__()
        self.joints_embed = nn.Linear(inputs, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, joints, width))
        self.temp_embed = nn.Parameter(torch.zeros(1, maxlen, 1, width))
        self.blocks_st = nn.ModuleList(Block(width, heads, hidden, "st") for _ in range(depth))
        self.blocks_ts = nn.ModuleList(Block(width, heads, hidden, "ts") for _ in range(depth))
        self.ts_attn = nn.ModuleList(nn.Linear(2 * width, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pre_logits = nn.ModuleDict({"fc": nn.Linear(width, rep)})
        self.head = nn.Linear(rep, 3)  # in the published file; the score does not use it

    def forward(self, x, mask=None):
        x = self.joints_embed(x) + self.pos_embed + self.temp_embed[:, :x.shape[1]]  # b n j c
        for block_st, block_ts, fuse in zip(self.blocks_st, self.blocks_ts, self.ts_attn):
            st, ts = block_st(x, mask), block_ts(x, mask)
            weights = fuse(torch.cat([st, ts], -1)).softmax(-1)
            x = weights[..., :1] * st + weights[..., 1:] * ts
        return self.pre_logits["fc"](self.norm(x)).tanh()


class MotionCritic(nn.Module):
    """Score (b) of x (b n j i); mask (b n): True = real frame, by default all, as in the published model.

    inputs: numbers a joint and frame. rep: width of the features. hidden, score_hidden: widths inside the
    MLPs of the layers and of the score. maxlen: longest n.
    """

    def __init__(self, inputs, joints, width, rep, heads, hidden, score_hidden, depth, maxlen):
        super().__init__()
        self.dstran = DSTformer(inputs, joints, width, rep, heads, hidden, depth, maxlen)
        self.mlp = MLP(joints * rep, score_hidden, 1)

    def representation(self, x, mask=None):
        """Features averaged over the real frames, (b j c)."""
        x = self.dstran(x, mask)
        if mask is None:
            return x.mean(1)
        mask = mask[..., None, None]
        return (x * mask).sum(1) / mask.sum(1)

    def forward(self, x, mask=None):
        return self.mlp(rearrange(self.representation(x, mask), "b j c -> b (j c)"))[:, 0]


# ---- 2. Its input ------------------------------------------------------------------------------------------


WINDOW = 60  # frames at 20 fps: what the published model was trained on


def rotation_matrix(six):
    """Six numbers (... 6) -> rotation matrices (... 3 3) whose first two ROWS they are, made orthogonal."""
    first = F.normalize(six[..., :3], dim=-1)
    second = six[..., 3:] - (first * six[..., 3:]).sum(-1, keepdim=True) * first
    second = F.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -2)


def axis_angle(matrix):
    """Rotation matrices (... 3 3) -> axis times angle (... 3), angles up to pi."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    # The quaternion times each of its four parts; the row of the largest part is free of cancellation.
    rows = torch.stack([torch.stack(row, -1) for row in (
        (1 + a + e + i, h - f, c - g, d - b), (h - f, 1 + a - e - i, b + d, c + g),
        (c - g, b + d, 1 - a + e - i, f + h), (d - b, c + g, f + h, 1 - a - e + i))], -2)  # ... 4 4
    largest = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*rows.shape[:-2], 1, 4)
    q = F.normalize(rows.gather(-2, largest)[..., 0, :], dim=-1)
    q = q * torch.where(q[..., :1] < 0, -1.0, 1.0)
    sine = q[..., 1:].norm(dim=-1, keepdim=True)
    return q[..., 1:] * 2 * torch.where(sine > 1e-7, torch.atan2(sine, q[..., :1]) / sine.clamp(min=1e-7), 1)


def into_critic(raw):
    """raw (b j 6 t), 24 rotations by their first two rows and a root whose first 3 numbers are its position
    -> (b t 25 3), axis-angle and position. As `into_critic` of the MotionCritic repository."""
    raw = rearrange(raw, "b j six t -> b t j six")
    return torch.cat([axis_angle(rotation_matrix(raw[:, :, :24])), raw[:, :, 24:, :3]], 2)


# ---- 3. g --------------------------------------------------------------------------------------------------


class JointsToRotations(nn.Module):
    """g of MotionRL appendix A: joints (b t 22 3) of HumanML3D -> rotations and root (b 25 6 t).

    Convolutions over the joints of a frame, an LSTM over time, a linear layer; sizes are unknown there. Not
    in the paper: the root's position is copied, it is known.
    """

    def __init__(self, width=16, hidden=96):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)
        self.lstm = nn.LSTM(features.T2M.joints * width, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, 24 * 6)

    def forward(self, joints):
        b, t = joints.shape[:2]
        x = rearrange(joints - joints[:, :, :1], "b t j c -> (b t) c j")
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x, _ = self.lstm(rearrange(x, "(b t) c j -> b t (c j)", b=b))
        rotations = rearrange(self.linear(x), "b t (j six) -> b j six t", six=6)
        root = joints[:, :, 0] - joints[:, :1, 0] * joints.new_tensor([1.0, 0.0, 1.0])  # b t 3
        root = F.pad(rearrange(root, "b t c -> b 1 c t"), (0, 0, 0, 3))
        return torch.cat([rotations, root], 1)


def standard_joints(motion, skeleton):
    """Raw features (t d) -> the 22 joints of HumanML3D (t 22 3) in metres at 20 fps, a tensor."""
    joints = features.features_to_joints(motion.detach().cpu().numpy(), skeleton)
    return torch.from_numpy(features.kit_to_t2m(joints) if skeleton is features.KIT else joints)


def rotation_targets(joints):
    """22 joints (t 22 3) -> what g should say of the 24 SMPL joints (t 24 6), by rows.

    No SMPL fit can be had here, so these are the rotations of common/features.py: heading, then the bones',
    shortest ways without twist, and the two hands unturned. Scores through them are indicative only.
    """
    joints = joints.numpy()
    heading = features.heading_quaternion(joints, features.T2M, smooth=False, hips_swapped=False)
    root = heading * np.float32([1, -1, -1, -1])  # heading turns the world to the body, this the body
    columns = torch.from_numpy(features.rotations_6d(joints, features.T2M, root))  # t 21 6
    bones = rotation_matrix(columns).mT  # the first two columns of a rotation are the rows of its transpose
    w, y = torch.from_numpy(root[:, 0]), torch.from_numpy(root[:, 2])
    cos, sin, zero = 1 - 2 * y * y, 2 * w * y, torch.zeros_like(y)
    root = torch.stack([cos, zero, sin, zero, zero + 1, zero], -1)[:, None]  # t 1 6
    hands = torch.eye(3)[:2].reshape(6).expand(len(joints), 2, 6)
    return torch.cat([root, rearrange(bones[..., :2, :], "t j r c -> t j (r c)"), hands], 1).float()


def train_rotations(g, clips, clips_val, skeleton, *, iterations, batch=16, lr=3e-3, frames=32, seed, device):
    """Teach g the targets -> {"degrees": mean angle between its rotations and the targets on held-out clips}.
    """
    def prepare(part):
        joints = [standard_joints(torch.from_numpy(clip.features), skeleton) for clip in part]
        return joints, [rotation_targets(one) for one in joints]
    joints, targets = prepare(clips)
    frames = min(frames, *map(len, joints))

    def loss(iteration):
        draw, x, y = generator(seed, iteration, "rotations"), [], []
        for k in torch.randint(len(clips), (batch,), generator=draw).tolist():
            start = int(torch.randint(len(joints[k]) - frames + 1, (), generator=draw))
            x.append(joints[k][start:start + frames])
            y.append(targets[k][start:start + frames])
        out = g(torch.stack(x).to(device))[:, :24]
        return F.mse_loss(out, rearrange(torch.stack(y), "b t j six -> b j six t").to(device))

    training.supervised("joints to rotations", g.parameters(), loss, iterations=iterations, lr=lr)
    angles = []
    with torch.no_grad():
        for one, target in zip(*prepare(clips_val)):
            own = rearrange(g(one[None].to(device))[0, :22].cpu(), "j six t -> t j six")  # not the hands
            turn = rotation_matrix(own) @ rotation_matrix(target[:, :22]).mT
            angles.append(axis_angle(turn).norm(dim=-1).mean())
    return {"degrees": math.degrees(torch.stack(angles).mean())}


# ---- 4. The critic -----------------------------------------------------------------------------------------


class PublishedCritic(nn.Module):
    """The published MotionCritic behind g, with the small critic's interface; no gradient to the motion."""

    def __init__(self, g, net, skeleton):
        super().__init__()
        self.g, self.net, self.skeleton = g, net, skeleton

    @torch.no_grad()
    def score(self, motion, lengths):
        """motion (b t d) raw features, lengths (b) -> scores (b).

        The mean over as few windows of 60 frames (3 s, what the model was trained on) as cover the motion,
        evenly spread; a shorter motion is one window. The score depends on the window.
        """
        device, scores = self.net.mlp.fc1.weight.device, []
        for row, n in zip(motion, lengths.tolist()):
            raw = self.g(standard_joints(row[:n], self.skeleton)[None].to(device))  # 1 25 6 t
            t = raw.shape[-1]
            starts = np.linspace(0, max(0, t - WINDOW), math.ceil(t / WINDOW)).astype(int).tolist()
            windows = into_critic(torch.cat([raw[..., start:start + WINDOW] for start in starts]))
            # each window starts at its own origin, as a motion of the training data does
            windows[:, :, 24] -= windows[:, :1, 24] * windows.new_tensor([1.0, 0.0, 1.0])
            scores.append(self.net(windows).mean())
        return torch.stack(scores).to(motion.device)


def critic_sizes(state, path, heads):
    """The arguments of motion_critic.MotionCritic that fit the weights. The file does not tell the heads: the
    published model has 8."""
    def of(key, axis=0):
        return size(state, path, key, axis)
    width = of("dstran.joints_embed.weight")
    if width % heads:
        raise InputError(f"{path}: a width of {width} does not split into {heads} heads")
    return dict(inputs=of("dstran.joints_embed.weight", 1), joints=of("dstran.pos_embed", 1), width=width,
                rep=of("dstran.pre_logits.fc.weight"), heads=heads, score_hidden=of("mlp.fc1.weight"),
                hidden=of("dstran.blocks_st.0.mlp_s.fc1.weight"), maxlen=of("dstran.temp_embed", 1),
                depth=len({key.split(".")[2] for key in state if key.startswith("dstran.blocks_st.")}))


def load_published(path, heads=8):
    """The network of a MotionCritic checkpoint ("model_state_dict", or a bare state dict); strict."""
    state = read_state(path, "model_state_dict", bare=True)
    sizes = critic_sizes(state, path, heads)
    with torch.random.fork_rng(devices=[]):
        net = MotionCritic(**sizes)
    load_strict(net, state, path)
    return net


def check_published(path):
    """The network of a published checkpoint, if a path is given; InputError if it does not fit what
    `into_critic` makes."""
    if not path:
        return None
    net = load_published(path)
    if net.dstran.pos_embed.shape[1] != 25 or net.dstran.temp_embed.shape[1] < WINDOW:
        raise InputError(f"{path}: not for 25 joints and windows of {WINDOW} frames")
    return net


def fit_published(path, dataset, *, iterations, seed, cache_dir, use_cache, device):
    """The published critic behind a trained g (or its copy in the cache) -> frozen PublishedCritic, notes. g
    learns from the half of the train split that the judge never sees."""
    net, skeleton = check_published(path), dataset.skeleton
    clips, clips_val = datasets.half(dataset.splits["train"], 0), dataset.splits["val"]
    with torch.random.fork_rng(devices=[]):
        g = JointsToRotations()
    draw = generator(seed, 0, "rotations_init")
    training.initialise(g, draw)
    for weight in g.lstm.parameters():
        weight.data.uniform_(-0.1, 0.1, generator=draw)

    def build():
        notes = train_rotations(g.to(device), clips, clips_val, skeleton, iterations=iterations, seed=seed,
                                device=device)
        return {"model": g.state_dict(), **notes}

    code = training.source_of(JointsToRotations, standard_joints, rotation_targets, train_rotations,
                              training.supervised)
    key = [dataset.fingerprint, code, iterations, seed]
    stored = training.cached(cache_dir, key, build, "rotations", use_cache)
    g.load_state_dict(stored.pop("model"))
    print(f"  published MotionCritic: rotations within {stored['degrees']:.1f} degrees of an inverse "
          "kinematics without twist, not of SMPL fits: its scores are indicative only")
    return freeze(PublishedCritic(g, net, skeleton).to(device)), {"published": str(path), **stored}
