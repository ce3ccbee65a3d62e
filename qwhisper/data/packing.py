"""Groups samples into packs, and turns a pack or a padded batch into tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from qwhisper.data.rows import IGNORE, Sample

Batch = dict[str, torch.Tensor | int]


def plan_packs(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group samples into packs of at most `max_tokens`: first fit, longest first; deterministic.

    Every index stands in exactly one pack; a sample longer than `max_tokens` is alone in one. Packs are in the order
    of their first index, and indices within a pack rise.
    """
    packs: list[list[int]] = []
    free_tokens: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        pack = next((n for n, free in enumerate(free_tokens) if free >= lengths[index]), len(packs))
        if pack == len(packs):
            packs.append([])
            free_tokens.append(max_tokens)
        packs[pack].append(index)
        free_tokens[pack] -= lengths[index]
    return sorted(sorted(pack) for pack in packs)


def pack_samples(samples: Sequence[Sample]) -> Batch:
    """Lay samples end to end in one row, with the keywords of transformers' packed attention.

    input_ids, labels, position_ids: int64 [1, tokens], positions restarting at 0; cu_seq_lens_q, cu_seq_lens_k: int32
    [samples + 1]; max_length_q, max_length_k: int; and what `_common` adds.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    edges = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return {
        "input_ids": torch.from_numpy(np.concatenate([sample.input_ids for sample in samples]))[None],
        "labels": torch.from_numpy(np.concatenate([sample.labels for sample in samples]))[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges.clone(),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        **_common(samples),
    }


def pad_samples(samples: Sequence[Sample], pad_token_id: int, padding_side: str = "right") -> Batch:
    """Pad to one row per sample: input_ids, attention_mask, labels int64 [samples, longest], and what `_common` adds.

    padding_side "left" is for `generate`, and leaves out labels and their count, which it refuses.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be left or right, not {padding_side!r}")
    longest = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), longest), pad_token_id, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE)
    attention_mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        columns = slice(0, length) if padding_side == "right" else slice(longest - length, longest)
        input_ids[row, columns] = torch.from_numpy(sample.input_ids)
        labels[row, columns] = torch.from_numpy(sample.labels)
        attention_mask[row, columns] = 1
    batch: Batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **_common(samples)}
    if padding_side == "left":
        del batch["labels"], batch["valid_label_count"]
    return batch


def _common(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """valid_label_count int64 []; with audio also audio_waveforms float32 [samples], all windows end to end, and
    audio_lengths int64 [windows]. Windows that are encoded already are left out.
    """
    common = {"valid_label_count": torch.tensor(sum(sample.num_supervised for sample in samples))}
    windows = [window for sample in samples for window in sample.windows if isinstance(window, np.ndarray)]
    if windows:
        common["audio_waveforms"] = torch.from_numpy(np.concatenate(windows))
        common["audio_lengths"] = torch.tensor([len(window) for window in windows])
    return common
