"""The Whisper encoder at true length: windows of any length up to 30 s in one row, nothing computed for padding.

`transformers.WhisperEncoder` refuses anything but 3000 mel frames; this subclass has the same parameters (and so loads
the same checkpoints) and runs the same layers. A window of 3000 frames gives what Whisper gives, to the last bit on
CPU.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence, unpad_sequence
from transformers import WhisperConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperEncoder
from transformers.utils.output_capturing import capture_outputs

from qwhisper.model.attention import IMPLEMENTATIONS, choose_attention, encoder_attention, packed_kernel
from qwhisper.model.audio_layout import EncoderLayout, with_zero_row
from qwhisper.model.half_precision import OverflowClamp


class UncopiedAttention(WhisperAttention):
    """Whisper's self-attention; without copies of queries, keys and values if its kernel is "segments".

    transformers scales the queries and copies all three into [heads, frames, head_dim]: with 19,000 frames of the turbo
    encoder each of these reads and writes 97 MB. That kernel reads them where they lie and scales in fp32. For heads of
    64 the scale is a power of two, so nothing is rounded differently.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        implementation, has_blocks = self.config._attn_implementation, kwargs.get("segment_blocks") is not None
        like_queries = hidden_states[..., : self.head_dim]
        if (
            implementation not in IMPLEMENTATIONS
            or packed_kernel(implementation, like_queries, dropout, has_blocks=has_blocks) != "segments"
        ):
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        heads = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
        out, _ = attend(self, *heads, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.out_proj(out.reshape(hidden_states.shape)), None


class TrueLengthWhisperEncoder(WhisperEncoder):
    """Whisper's encoder over packed windows. Frozen by default in training: the caller wraps it in `no_grad` then.

    Whichever attention is set, windows stay apart: layers use one of ours (`encoder_attention`), or eager attention
    over a padded batch.
    overflow: bounds and counts what would leave fp16's range.
    """

    _supports_flex_attn = False

    def __init__(self, config: WhisperConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.__class__ = UncopiedAttention  # the same parameters, drawn once
        self.overflow = OverflowClamp(self)
        choose_attention(self, encoder_attention)

    @capture_outputs
    def forward(self, mel: Tensor, layout: EncoderLayout, **kwargs) -> BaseModelOutput:
        """mel: [mel frames, num_mel_bins] of all windows, at most 2 * max_source_positions each.

        Returns last_hidden_state [encoder frames, d_model] in the encoder's dtype, ceil(mel frames / 2) for each
        window; with output_hidden_states and output_attentions also what each layer computes: [1, frames, d_model], or
        with eager attention [windows, longest, d_model] and [windows, heads, longest, longest].
        """
        if layout.max_length > self.max_source_positions:
            raise ValueError(
                f"a window of {layout.max_length} encoder frames is longer than the encoder's "
                f"{self.max_source_positions}: cut it first"
            )
        hidden_states = self._convolve(mel.to(self.conv1.weight.dtype), layout)
        hidden_states = hidden_states + self.embed_positions(layout.positions)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        if encoder_attention(self.config) == "eager":
            hidden_states = self._padded_layers(hidden_states, layout)
        else:
            packed = {
                "cu_seq_lens_q": layout.cu_seq_lens,
                "cu_seq_lens_k": layout.cu_seq_lens,
                "max_length_q": layout.max_length,
                "max_length_k": layout.max_length,
                "cu_seq_lens_host": layout.cu_seq_lens_host,
                "segment_blocks": layout.segment_blocks,
            }
            hidden_states = self._layers(hidden_states[None], None, **packed)[0]
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))

    def _layers(self, hidden_states: Tensor, attention_mask: Tensor | None, **packed) -> Tensor:
        for layer in self.layers:
            if self.training and self.layerdrop > 0.0 and torch.rand([]) < self.layerdrop:
                continue
            hidden_states = layer(hidden_states, attention_mask, **packed)
        return hidden_states

    def _padded_layers(self, hidden_states: Tensor, layout: EncoderLayout) -> Tensor:
        """hidden_states: [encoder frames, d_model]. Returns the same of the last layer."""
        assert layout.cu_seq_lens_host is not None
        lengths = torch.tensor(layout.cu_seq_lens_host).diff()
        lengths = lengths[lengths > 0]  # without unused borders
        padded = pad_sequence(hidden_states.split(lengths.tolist()), batch_first=True)
        is_padding = torch.arange(padded.shape[1]) >= lengths[:, None]
        bias = torch.zeros(is_padding.shape).masked_fill(is_padding, torch.finfo(padded.dtype).min)
        mask = bias[:, None, None, :].to(padded.device, padded.dtype)
        return torch.cat(unpad_sequence(self._layers(padded, mask), lengths, batch_first=True))

    def _convolve(self, mel: Tensor, layout: EncoderLayout) -> Tensor:
        """Both convolutions over all windows in one row. Returns [encoder frames, d_model]."""
        row = with_zero_row(mel).index_select(0, layout.mel)
        hidden_states = nn.functional.gelu(self.conv1(row.T[None]))
        hidden_states = hidden_states.masked_fill(layout.mel == mel.shape[0], 0.0)
        hidden_states = nn.functional.gelu(self.conv2(hidden_states))
        return hidden_states[0].T.index_select(0, layout.slots)
