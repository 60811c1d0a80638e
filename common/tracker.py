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
