"""Second writings, by which the tests judge the project's own code. No script and no room uses them.

  1. samplers      DDIM and DPM-Solver++, one step at a time, and a whole sample
  2. skeletons     forward kinematics of the rotation block, and a reader of BVH files
  3. retrieval     the parts of TMR and of the benchmark's evaluator that no script needs
  4. batches       as the official code makes them for its evaluator
"""
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from common import InputError, datasets, features as motion_features
from common.render import JOINT_NAMES
from common.retrieval import info_nce
from common.vae import gaussian_kl

# ---- 1. Samplers -------------------------------------------------------------------------------

# name -> (order, stochastic); "ddpm" is also DDIM with eta = 1, "ddim" is DDIM with eta = 0
METHODS = {"ddpm": (1, True), "sde-dpmpp-2m": (2, True), "ddim": (1, False), "dpmpp-2m": (2, False)}


def step_std(grid):
    """Standard deviation of each stochastic step, (N,): sigma_j sqrt(1 - exp(-2h)); 0 to a clean end."""
    return grid.sigma[1:] * (-torch.expm1(-2 * grid.lam.diff())).sqrt()


def snr(grid):
    """Signal-to-noise ratio (alpha / sigma)^2 at the nodes, (N+1,), infinite at a node without noise."""
    return (2 * grid.lam).exp()


def order_at(grid, index, order):
    """The order a multistep solver uses at a step: 1 at the first, and at the last of a short grid."""
    steps = len(grid.timesteps)
    last = index == steps - 1 and (steps < 15 or grid.sigma[-1] == 0)
    return 1 if index == 0 or last else order


def per_sample(table, like):
    """A float64 scalar or (b,) coefficient -> shaped and cast to multiply `like` (b ...)."""
    table = table.to(device=like.device, dtype=like.dtype)
    return table.reshape(table.shape + (1,) * (like.ndim - table.ndim)) if table.ndim else table


def predict_x_start(output, x_t, alpha, sigma, prediction):
    """The clean sample that a denoiser's output stands for.

    output, x_t (b ...); alpha, sigma float64, scalar or (b,), at the node of x_t.
    prediction: "sample" (the output itself), "epsilon" (the noise) or "v" (Salimans & Ho 2022).
    """
    if prediction == "sample":
        return output
    alpha, sigma = per_sample(alpha, x_t), per_sample(sigma, x_t)
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction == "v":
        return alpha * x_t - sigma * output
    raise ValueError(f"prediction {prediction!r}: sample, epsilon or v")


def ddim_step(grid, index, x_t, pred_x_start, eta=1.0):
    """Step `index` (int or (b,) int64) of DDIM -> mean (b ...) and std (float64, scalar or (b,)).

    Song et al. 2021, eq. 12 and 16: eta = 0 is deterministic, eta = 1 has the DDPM posterior.
    """
    alpha_i, alpha_j = grid.alpha[index], grid.alpha[index + 1]
    sigma_i, sigma_j = grid.sigma[index], grid.sigma[index + 1]
    std = eta * sigma_j / sigma_i * (1 - (alpha_i / alpha_j) ** 2).clamp(min=0).sqrt()
    noise_left = (sigma_j**2 - std**2).clamp(min=0).sqrt()
    epsilon = (x_t - per_sample(alpha_i, x_t) * pred_x_start) / per_sample(sigma_i, x_t)
    return per_sample(alpha_j, x_t) * pred_x_start + per_sample(noise_left, x_t) * epsilon, std


def dpmpp_step(grid, index, x_t, pred_x_start, previous_x_start=None, stochastic=True):
    """Step `index` (int or (b,) int64) of DPM-Solver++ -> mean (b ...) and std (float64, scalar or (b,)).

    previous_x_start: the denoiser's estimate at node index-1, for order 2 (midpoint, "2M"); None for order 1.
    Order 1 equals DDIM with eta = 1 (stochastic) or 0. Lu et al. 2022, Algorithm 2 and (stochastic) appendix.
    """
    h = grid.lam[index + 1] - grid.lam[index]
    carry = grid.sigma[index + 1] / grid.sigma[index] * (torch.exp(-h) if stochastic else 1.0)
    gain = -grid.alpha[index + 1] * torch.expm1(-2 * h if stochastic else -h)
    estimate = pred_x_start
    if previous_x_start is not None:
        k = h / (2 * (grid.lam[index] - grid.lam[index - 1]))
        estimate = pred_x_start + per_sample(k, x_t) * (pred_x_start - previous_x_start)
    mean = per_sample(carry, x_t) * x_t + per_sample(gain, x_t) * estimate
    return mean, step_std(grid)[index] if stochastic else torch.zeros_like(h)


@torch.no_grad()
def sample(denoise, grid, x_init, method="ddpm", noise=None, mask=None):
    """Run all steps from x_init (b ...), standard normal noise -> samples (b ...).

    denoise(x_t, t (b,) int64) -> pred_x_start (b ...), guidance included. method: a name in METHODS.
    noise(index) -> standard normal (b ...), needed by the stochastic methods; the caller seeds it.
    mask (b t) bool, True = real frame: padded frames are set to 0 after each step: they carry no noise.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: one of {tuple(METHODS)}")
    order, stochastic = METHODS[method]
    if stochastic and noise is None:
        raise ValueError(f"method {method!r} draws noise: give noise(index)")
    x, before = x_init, None
    for index, timestep in enumerate(grid.timesteps.tolist()):
        t = torch.full((len(x),), timestep, dtype=torch.int64, device=x.device)
        pred_x_start = denoise(x, t)
        older = before if order_at(grid, index, order) == 2 else None
        mean, std = dpmpp_step(grid, index, x, pred_x_start, older, stochastic)
        x = mean if std == 0 else mean + per_sample(std, mean) * noise(index)
        if mask is not None:
            x = x * mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        before = pred_x_start
    return x


# ---- 2. Skeletons ------------------------------------------------------------------------------


def mirror(joints, skeleton):
    """Left-right mirror image of joints (... j 3)."""
    order = np.arange(skeleton.joints)
    index = skeleton.index
    pairs = [(j, index["r" + part[1:]]) for part, j in index.items() if part.startswith("l_")]
    pairs += {"t2m": [(13, 14)], "kit": [(19, 14)]}[skeleton.name]  # collars; the feet between ankle and toe
    for left, right in pairs:
        order[[left, right]] = right, left
    return joints[..., order, :] * np.array([-1, 1, 1], joints.dtype)


def features_to_joints_rot6d(features, skeleton, offsets=None):
    """Joint positions from the rotation block by forward kinematics: torch features (... t d) -> (... t j 3).

    `offsets` (j 3) are the bone vectors of the rest pose, by default those of the reference body.
    """
    heading, root = motion_features.recover_root(features)
    offsets = features.new_tensor(np.asarray(skeleton.offsets if offsets is None else offsets))
    rotations = features[..., motion_features.blocks(skeleton)["rotations"]]
    columns = rearrange(rotations, "... (j c) -> ... j c", c=6)
    x = F.normalize(columns[..., :3], dim=-1)  # Gram-Schmidt on the two stored columns
    z = F.normalize(torch.linalg.cross(x, columns[..., 3:]), dim=-1)
    local = torch.stack([x, torch.linalg.cross(z, x), z], -1)  # ... t j-1 3 3
    axes = features.new_tensor(np.eye(3))
    upright = torch.stack([motion_features._turn(heading, axis.expand(root.shape)) for axis in axes], -1)
    joints = {0: root}
    for chain in skeleton.chains:
        rotation = upright  # every chain starts from the root's frame
        for a, b in zip(chain[:-1], chain[1:]):
            rotation = rotation @ local[..., b - 1, :, :]
            joints[b] = joints[a] + rotation @ offsets[b]
    return torch.stack([joints[j] for j in range(skeleton.joints)], -2)


def rotation(axis, degrees):
    """Rotations (t 3 3) about "X", "Y" or "Z" by degrees (t)."""
    i = "XYZ".index(axis)
    j, k = (i + 1) % 3, (i + 2) % 3
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    matrix = np.zeros((len(degrees), 3, 3))
    matrix[:, i, i], matrix[:, j, j], matrix[:, k, k] = 1, cosine, cosine
    matrix[:, k, j], matrix[:, j, k] = sine, -sine
    return matrix


def read_bvh(path, skeleton):
    """Read a BVH in centimetres, Y up, names of `JOINT_NAMES` -> joints (t j 3), skeleton's units and rate.

    Any hierarchy and channel order; other joints are left out, prefixes such as "mixamorig:" ignored, frames
    interpolated. Raises InputError naming the file and what is wrong with it.
    """
    try:
        header, data = Path(path).read_text(encoding="utf-8").split("MOTION")
        places, seconds = forward_kinematics(header.split(), data.split())
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a readable BVH file ({type(error).__name__}: {error})") from error
    if missing := [name for name in JOINT_NAMES[skeleton.name] if name not in places]:
        raise InputError(f"{path}: no joint called {', '.join(missing)}; rename the joints in the file")
    joints = np.stack([places[name] for name in JOINT_NAMES[skeleton.name]], 1)
    joints = joints / 100 * skeleton.units_per_metre
    then = np.arange(len(joints)) * seconds
    now = np.arange(int(round(then[-1] * skeleton.fps, 3)) + 1) / skeleton.fps
    columns = [np.interp(now, then, column) for column in joints.reshape(len(joints), -1).T]
    return np.stack(columns, -1).reshape(len(now), -1, 3)


def forward_kinematics(words, data):
    """Words of a BVH's two halves -> {name: positions (t 3)} in its units, seconds of a frame."""
    frames, seconds = int(data[1]), float(data[4])
    values = np.array(data[5:], dtype=float).reshape(frames, -1)
    if frames < 1 or seconds <= 0 or not np.isfinite(values).all():
        raise ValueError("needs frames, a frame time above 0 and finite numbers")
    places, column, name = {}, 0, None
    stack = [(np.zeros((frames, 3)), np.broadcast_to(np.eye(3), (frames, 3, 3)))]     # position, rotation
    for i, word in enumerate(words):
        if word in ("ROOT", "JOINT", "End"):
            name = words[i + 1].split(":")[-1]
        elif word == "OFFSET":
            place, turn = stack[-1]
            places[name] = place + turn @ np.array(words[i + 1:i + 4], dtype=float)
            stack.append((places[name], turn))
        elif word == "CHANNELS":
            turn = stack[-1][1]
            for channel in words[i + 2:i + 2 + int(words[i + 1])]:
                if channel.endswith("position"):  # other joints keep their offset from the parent
                    if len(stack) == 2:
                        places[name][:, "XYZ".index(channel[0])] = values[:, column]
                else:
                    turn = turn @ rotation(channel[0], values[:, column])
                column += 1
            stack[-1] = (places[name], turn)
        elif word == "}":
            stack.pop()
    return places, seconds


# ---- 3. Retrieval ------------------------------------------------------------------------------


def tmr_losses(text_tokens, motion_tokens, decoder, motion, mask, sentences=None, temperature=0.1,
               threshold=0.8, weights=(1.0, 1e-5, 1e-5, 0.1)):
    """The four losses of TMR (eq. 1 to 4) at the mean latents, and their weighted sum, as a dict.

    text_tokens, motion_tokens (b 2 c) from the encoders; motion (b t d) normalised, mask (b t); sentences (b
    e) unit vectors for the duplicate filter: pairs with cosine above 2 * threshold - 1 are dropped.
    """
    (mu_t, var_t), (mu_m, var_m) = text_tokens.unbind(1), motion_tokens.unbind(1)
    zero = torch.zeros_like(mu_t)
    out = {
        # Padded rows count in the mean, as in the published code: both sides are zero there.
        "recons": sum(F.smooth_l1_loss(decoder(z, mask), motion) for z in (mu_t, mu_m)),
        "kl": gaussian_kl(mu_t, var_t, mu_m, var_m) + gaussian_kl(mu_m, var_m, mu_t, var_t)
        + gaussian_kl(mu_m, var_m, zero, zero) + gaussian_kl(mu_t, var_t, zero, zero),
        "latent": F.smooth_l1_loss(mu_t, mu_m),
        "contrastive": info_nce(mu_t, mu_m, temperature, None if sentences is None
                                else sentences @ sentences.T > 2 * threshold - 1)}
    return out | {"loss": sum(weight * out[key] for weight, key in zip(weights, tuple(out)))}


def tmr_score(text, motion):
    """Score in [0, 1] of all pairs (b b) from mean latents: cosine / 2 + 1/2."""
    return F.normalize(text, dim=-1) @ F.normalize(motion, dim=-1).T / 2 + 0.5


def retrieval_metrics(similarity, same=None):
    """R@1, 2, 3, 5, 10 in percent and the median rank, both directions, as the TMR code reports them.

    similarity (n n), row = text, column = motion. `same` (n n) bool: candidates that count as correct as well
    (TMR protocol b: captions with cosine above 2 * .95 - 1); the best ranked one is taken. Tied candidates
    share the average rank. Protocols c and d are this function on a subset or on pools. Keys: t2m_R01 ..
    m2t_MedR, len.
    """
    similarity = torch.as_tensor(similarity).double()
    own = torch.eye(len(similarity), dtype=torch.bool)
    correct = own if same is None else own | same
    out = {"len": float(len(similarity))}
    for name, distance, right in (("t2m", -similarity, correct), ("m2t", -similarity.T, correct)):
        best = distance.masked_fill(~right, math.inf).min(dim=1, keepdim=True).values
        rank = (distance < best).sum(1) + ((distance == best).sum(1) - 1) / 2
        for k in (1, 2, 3, 5, 10):
            out[f"{name}_R{k:02d}"] = 100 * (rank < k).double().mean().item()
        middle = rank.double().sort().values
        out[f"{name}_MedR"] = (middle[(len(rank) - 1) // 2] + middle[len(rank) // 2]).item() / 2 + 1
    return out


def margin_loss(text, motion, negative, margin=10.0):
    """The training loss of the benchmark's evaluator: d^2 for pairs that belong together, max(0, margin -
    d)^2 where negative (...) is True; text, motion (... c) -> mean."""
    distance = (text - motion).square().sum(-1).clamp(min=1e-12).sqrt()
    return torch.where(negative, (margin - distance).clamp(min=0), distance).square().mean()


# ---- 4. Batches as the official code makes them --------------------------------------------------


class Batch(NamedTuple):
    """Clips side by side, one caption each."""
    motion: torch.Tensor            # b t d, raw, zeros after the end of a clip
    lengths: torch.Tensor           # b, int64, frames
    mask: torch.Tensor              # b t, True = real frame
    captions: list
    tokens: list
    names: list


def official_collate(clips, captions=0, *, generator=None, max_length=None):
    """Clips -> Batch, lengths multiples of 4.

    captions: which caption of each clip, one number or a list of b, counted modulo the clip's number of them;
    with a torch.Generator a random one. max_length: frames of the padded batch (longer clips are cut), by
    default those of the longest clip. Padding is zero in RAW features: normalise first, then mask, where the
    official evaluator wants zeros after normalising.
    """
    if generator is not None:
        captions = torch.randint(1 << 30, (len(clips),), generator=generator).tolist()
    chosen = [captions] * len(clips) if isinstance(captions, int) else captions
    chosen = [k % len(clip.captions) for k, clip in zip(chosen, clips, strict=True)]
    frames = [len(clip.features) // datasets.UNIT * datasets.UNIT for clip in clips]
    if max_length is not None:
        frames = [min(n, max_length // datasets.UNIT * datasets.UNIT) for n in frames]
    lengths = torch.tensor(frames, dtype=torch.int64)
    total = max(frames) if max_length is None else max_length
    motion = torch.zeros(len(clips), total, clips[0].features.shape[1])                              # b t d
    for row, clip, n in zip(motion, clips, frames):
        row[:n] = torch.from_numpy(clip.features[:n])
    return Batch(motion, lengths, torch.arange(total) < lengths[:, None],
                 [clip.captions[k] for clip, k in zip(clips, chosen)],
                 [clip.tokens[k] for clip, k in zip(clips, chosen)], [clip.name for clip in clips])


def batches(clips, *, mode="deterministic", batch=32, seed=0, epoch=0, max_length=datasets.MAX_LENGTH):
    """Yield the Batches of one pass.

    "deterministic": first caption, the first (t // 4) * 4 frames, fixed order, the last batch may be small.
    "official": the rules behind the published numbers, by which the same data scored twice differ: shuffled,
    the last batch dropped, a random caption, and with probability 1/3 four frames less; then a random start.
    Everything drawn for a clip is a function of (seed, epoch, index), so it does not depend on order or batch
    size.
    """
    if mode not in ("deterministic", "official"):
        raise InputError(f"mode must be deterministic or official, not {mode!r}")
    if mode == "deterministic":
        for start in range(0, len(clips), batch):
            yield official_collate(clips[start:start + batch], max_length=max_length)
        return
    order = np.random.default_rng([seed, epoch]).permutation(len(clips)).tolist()
    for start in range(0, len(clips) - batch + 1, batch):
        crops, captions = [], []
        for index in order[start:start + batch]:
            clip, rng = clips[index], np.random.default_rng([seed, epoch, index])
            captions.append(int(rng.integers(len(clip.captions))))
            length = (len(clip.features) // datasets.UNIT - (rng.random() < 1 / 3)) * datasets.UNIT
            first = int(rng.integers(len(clip.features) - length + 1))
            crops.append(replace(clip, features=clip.features[first:first + length]))
        yield official_collate(crops, captions, max_length=max_length)
