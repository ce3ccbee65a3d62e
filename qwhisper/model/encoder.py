"""The Whisper encoder at true length: windows of any length up to 30 s in one row, nothing computed for padding.

`transformers.WhisperEncoder` refuses anything but 3000 mel frames; this subclass has the same parameters (and so loads
the same checkpoints) and runs the same layers. A window of 3000 frames gives what Whisper gives, to the last bit on
CPU.
"""

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from qwhisper.frames import CONV_STRIDE, encoder_frames
from qwhisper.model.attention import set_encoder_attention
from qwhisper.model.half_precision import OverflowClamp


def _slots(mel_lengths: list[int]) -> tuple[list[int], int]:
    """Where each window starts in a row for the convolutions, and that row's length, in mel frames.

    Windows start at even frames, so that the stride-2 convolution meets each at its own first frame, with at least one
    empty frame between two: the zero padding that a window alone would have.
    """
    starts, position = [], 0
    for length in mel_lengths:
        starts.append(position)
        position += length + (1 if length % 2 else 2)
    return starts, position


def _positions(starts: list[int], lengths: list[int], device) -> Tensor:
    return torch.cat([torch.arange(s, s + n, device=device) for s, n in zip(starts, lengths, strict=True)])


class TrueLengthWhisperEncoder(WhisperEncoder):
    """Whisper's encoder over packed windows. Frozen by default in training: the caller wraps it in `no_grad` then.

    Whichever attention is set, a forward pass uses one of ours (`set_encoder_attention`), so that windows stay apart.
    overflow: bounds and counts what would leave fp16's range.
    """

    def __init__(self, config: WhisperConfig):
        super().__init__(config)
        self.overflow = OverflowClamp(self)

    def forward(self, mel: Tensor, mel_lengths: list[int], **kwargs) -> Tensor:
        """mel: [sum(mel_lengths), num_mel_bins]; mel_lengths: frames of each window, at most 2 * max_source_positions.

        Returns [sum of encoder frames, d_model] in the encoder's dtype, ceil(frames / 2) for each window.
        """
        set_encoder_attention(self.config)
        limit = self.max_source_positions * CONV_STRIDE
        if max(mel_lengths) > limit:
            raise ValueError(
                f"a window of {max(mel_lengths)} mel frames is longer than the encoder's {limit}: cut it first"
            )
        hidden_states = self._convolve(mel.to(self.conv1.weight.dtype), mel_lengths)
        lengths = [encoder_frames(n) for n in mel_lengths]
        within = torch.cat([torch.arange(n, device=mel.device) for n in lengths])
        hidden_states = (hidden_states + self.embed_positions(within))[None]
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        borders = torch.tensor([0, *lengths]).cumsum(0).to(device=mel.device, dtype=torch.int32)
        packed = {
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        for layer in self.layers:
            if self.training and self.layerdrop > 0.0 and torch.rand([]) < self.layerdrop:
                continue
            hidden_states = layer(hidden_states, None, **packed)
        return self.layer_norm(hidden_states)[0]

    def _convolve(self, mel: Tensor, mel_lengths: list[int]) -> Tensor:
        """Both convolutions over all windows in one row. Returns [total encoder frames, d_model]."""
        starts, row_length = _slots(mel_lengths)
        filled = _positions(starts, mel_lengths, mel.device)
        row = mel.new_zeros(row_length, mel.shape[1]).index_copy(0, filled, mel)
        hidden_states = nn.functional.gelu(self.conv1(row.T[None]))
        empty = torch.ones(row_length, dtype=torch.bool, device=mel.device).index_fill(0, filled, False)
        hidden_states = hidden_states.masked_fill(empty, 0.0)
        hidden_states = nn.functional.gelu(self.conv2(hidden_states))
        lengths = [encoder_frames(n) for n in mel_lengths]
        kept = _positions([s // CONV_STRIDE for s in starts], lengths, mel.device)
        return hidden_states[0].T.index_select(0, kept)
