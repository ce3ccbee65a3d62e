"""Samples for small joined models, and reading back their gradients."""

import numpy as np
import torch
from torch import nn

from qwhisper.data.rows import Sample
from qwhisper.data.windows import clip_windows
from tests.small import VOCABULARY


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def make_sample(model, text_lengths: list[int], clip_samples: list[int] = (), *, seed: int = 0) -> Sample:
    """Text of the given lengths with a clip between each two of them; the last text is supervised."""
    generator = np.random.default_rng(seed)
    clips = [clip_windows(noise(n, seed + i), model.config.frames) for i, n in enumerate(clip_samples)]
    ids: list[int] = []
    for i, length in enumerate(text_lengths):
        ids += generator.integers(3, VOCABULARY - 2, size=length).tolist()
        if i < len(clips):
            ids += [model.config.audio_token_id] * model.config.frames.num_tokens(clip_samples[i])
    ids = np.array(ids, dtype=np.int64)
    labels = np.full_like(ids, -100)
    labels[-text_lengths[-1] :] = ids[-text_lengths[-1] :]
    labels[0] = -100
    return Sample(f"s{seed}", "test", ids, labels, [window for clip in clips for window in clip])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
