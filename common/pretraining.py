"""Supervised training of a token model on captioned clips (T2M-GPT, Zhang et al. 2023, section 3.2).

The network (motion_gpt.py) learns to predict the next token, together with its text encoder. What
reinforcement learning does to it afterwards is the scripts' subject.
"""
import inspect
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import datasets, generator, length_mask, motion_gpt, text
from common.training import cached, descend, initialise


def sequence_loss(logits, target, counts):
    """Mean over samples of the mean cross-entropy over tokens and end (T2M-GPT). logits (b n v), target
    (b n) with end and padding, counts (b)."""
    mask = length_mask(counts + 1, target.shape[1])  # the end token counts
    loss = F.cross_entropy(logits.mT, target.clamp(max=logits.shape[-1] - 1), reduction="none")
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def token_table(vq, clips, end, device):
    """Codes of all clips with end and padding (m n), and their counts (m)."""
    rows = []
    for clip in clips:
        motion = torch.from_numpy(clip.features)[None].to(device)
        rows.append(vq.tokenise(motion, torch.tensor([motion.shape[1]], device=device))[0][0])
    counts = torch.tensor([len(row) for row in rows], device=device)
    table = torch.full((len(rows), int(counts.max()) + 1), end + 1, device=device)
    for k, row in enumerate(rows):
        table[k, :len(row) + 1] = torch.cat([row, row.new_tensor([end])])
    return table, counts


def train_gpt(gpt, text_encoder, vq, clips, *, iterations, lr, keep, batch, word_drop, word_swap, seed,
              device):
    """Next-token prediction; a share 1 - keep of the input tokens is replaced by random ones, so that the
    model can go on from its own mistakes. word_drop, word_swap: see TextEncoder -> {"loss"} of the end."""
    table, counts = token_table(vq, clips, gpt.end, device)
    parameters = [*gpt.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, iterations,
                                                    pct_start=max(0.05, 2 / max(iterations, 3)))
    losses, bar = [], tqdm(range(iterations), desc="supervised gpt", mininterval=1.0)
    for iteration in bar:
        g = generator(seed, iteration, "gpt")
        chosen = torch.randint(len(clips), (batch,), generator=g)
        captions = datasets.draw_captions([clips[k] for k in chosen], g)
        target = table[chosen.to(device)]
        other = torch.randint(gpt.codes, target.shape, generator=g).to(device)
        replaced = (torch.rand(target.shape, generator=g) >= keep).to(device) & (target < gpt.end)
        tokens = torch.where(replaced, other, target)[:, :-1]
        logits, _ = gpt(tokens, text_encoder(captions, word_drop, word_swap, g))
        loss = sequence_loss(logits, target, counts[chosen.to(device)])
        losses.append(descend(loss, parameters, optimizer, scheduler, f"gpt, iteration {iteration}",
                              "lower --gpt-lr"))
        bar.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}", refresh=False)
    return {"loss": float(np.mean(losses[-100:]))}


def supervised(gpt, text_encoder, vq, clips, key, *, seed, cache_dir, use_cache, device, **training):
    """Initialise and train both networks, or load them from the cache -> notes. key: what else shaped
    them."""
    def build():
        initialise(gpt, generator(seed, 0, "gpt"))
        initialise(text_encoder, generator(seed, 0, "text"))
        notes = train_gpt(gpt, text_encoder, vq, clips, seed=seed, device=device, **training)
        return {"gpt": gpt.state_dict(), "text": text_encoder.state_dict(), **notes}

    code = [inspect.getsource(part) for part in (sys.modules[__name__], motion_gpt, text.TextEncoder)]
    key = [key, code, vq.state_dict(), seed, training]
    stored = cached(cache_dir, key, build, "gpt", use_cache)
    gpt.load_state_dict(stored.pop("gpt"))
    text_encoder.load_state_dict(stored.pop("text"))
    print(f"  supervised gpt: loss {stored['loss']:.3f}")
    return stored
