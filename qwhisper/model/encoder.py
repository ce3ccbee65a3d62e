"""The Whisper encoder at true length: windows of any length up to 30 s in one row, nothing computed for padding.

`transformers.WhisperEncoder` refuses anything but 3000 mel frames; this subclass has the same parameters (and so loads
the same checkpoints) and runs the same layers. A window of 3000 frames gives what Whisper gives, to the last bit on
CPU.
"""

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from qwhisper.model.attention import set_encoder_attention
from qwhisper.model.audio_layout import EncoderLayout, with_zero_row
from qwhisper.model.half_precision import OverflowClamp


class TrueLengthWhisperEncoder(WhisperEncoder):
    """Whisper's encoder over packed windows. Frozen by default in training: the caller wraps it in `no_grad` then.

    Whichever attention is set, a forward pass uses one of ours (`set_encoder_attention`), so that windows stay apart.
    overflow: bounds and counts what would leave fp16's range.
    """

    def __init__(self, config: WhisperConfig):
        super().__init__(config)
        self.overflow = OverflowClamp(self)

    def forward(self, mel: Tensor, layout: EncoderLayout, **kwargs) -> Tensor:
        """mel: [mel frames, num_mel_bins] of all windows, at most 2 * max_source_positions each.

        Returns [encoder frames, d_model] in the encoder's dtype, ceil(mel frames / 2) for each window.
        """
        set_encoder_attention(self.config)
        if layout.max_length > self.max_source_positions:
            raise ValueError(
                f"a window of {layout.max_length} encoder frames is longer than the encoder's "
                f"{self.max_source_positions}: cut it first"
            )
        hidden_states = self._convolve(mel.to(self.conv1.weight.dtype), layout)
        hidden_states = (hidden_states + self.embed_positions(layout.positions))[None]
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        packed = {
            "cu_seq_lens_q": layout.cu_seq_lens,
            "cu_seq_lens_k": layout.cu_seq_lens,
            "max_length_q": layout.max_length,
            "max_length_k": layout.max_length,
            "cu_seq_lens_host": layout.cu_seq_lens_host,
        }
        for layer in self.layers:
            if self.training and self.layerdrop > 0.0 and torch.rand([]) < self.layerdrop:
                continue
            hidden_states = layer(hidden_states, None, **packed)
        return self.layer_norm(hidden_states)[0]

    def _convolve(self, mel: Tensor, layout: EncoderLayout) -> Tensor:
        """Both convolutions over all windows in one row. Returns [encoder frames, d_model]."""
        row = with_zero_row(mel).index_select(0, layout.mel)
        hidden_states = nn.functional.gelu(self.conv1(row.T[None]))
        hidden_states = hidden_states.masked_fill(layout.mel == mel.shape[0], 0.0)
        hidden_states = nn.functional.gelu(self.conv2(hidden_states))
        return hidden_states[0].T.index_select(0, layout.slots)
