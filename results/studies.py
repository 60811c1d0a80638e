"""The DDPO code's baseline: reward statistics of every prompt, kept over iterations."""

import numpy as np


class PromptTracker:
    """Advantages from the last `buffer_size` rewards of each prompt (DDPO code, kvablack/ddpo-pytorch).

    Prompts with fewer than `min_count` known rewards use mean and std of the batch. `rewards` {prompt: list}
    is the state that a checkpoint has to keep.
    """

    def __init__(self, buffer_size, min_count):
        self.buffer_size, self.min_count, self.rewards = buffer_size, min_count, {}

    def update(self, prompts, rewards):
        """prompts (b), rewards (b) -> advantages (b) float64; the new rewards count already."""
        prompts, rewards = list(prompts), np.asarray(rewards, dtype=np.float64)
        for prompt in dict.fromkeys(prompts):
            new = [float(r) for p, r in zip(prompts, rewards) if p == prompt]
            self.rewards[prompt] = (self.rewards.get(prompt, []) + new)[-self.buffer_size:]
        advantages = np.empty_like(rewards)
        for n, prompt in enumerate(prompts):
            known = self.rewards[prompt] if len(self.rewards[prompt]) >= self.min_count else rewards
            advantages[n] = (rewards[n] - np.mean(known)) / (np.std(known) + 1e-6)
        return advantages


STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


def strength_curve(path, source, target, scorers, sampler_at):
    """Reward, judge and oracle on both test splits with the adapters at STRENGTHS, one repeat each; drawn as
    `path` -> {column: list}. sampler_at(strength) -> sampler. Past 1 is what no training has asked for."""
    log = {"strength": list(STRENGTHS)}
    for strength in tqdm(STRENGTHS, desc="strengths"):
        for title, domain in (("target", target), ("source", source)):
            row = evaluate(domain.splits["test"], scorers, sampler_at(strength), purpose=f"{title}_test",
                           benchmark=False)
            for name in PAIRED[:3]:
                log.setdefault(f"{title}_{name}", []).append(row[name][0])
    groups = [(f"target_{name}", f"source_{name}") for name in PAIRED[:3]]
    columns = {name: np.array(values) for name, values in log.items()}
    render.safely(render.curves, path, columns, groups, "strength")
    return log


class Mean(nn.Module):
    """Several retrieval models as one, whose score is the mean of theirs."""

    def __init__(self, models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def _join(self, parts):
        """Embeddings [(b c)] -> (b sum of c), of which the dot product is the mean of the cosines."""
        return torch.cat([F.normalize(part, dim=-1) for part in parts], -1) / math.sqrt(len(self.models))

    def embed_motion(self, features, lengths):
        """Raw features (b t d), lengths (b) -> unit embeddings (b c)"""
        return self._join([model.embed_motion(features, lengths) for model in self.models])

    def embed_text(self, captions):
        """Captions (list of b) -> unit embeddings (b c)"""
        return self._join([model.embed_text(captions) for model in self.models])

    def similarity(self, features, lengths, captions):
        """Mean cosine (b) of each motion with its caption."""
        return (self.embed_motion(features, lengths) * self.embed_text(captions)).sum(-1)
