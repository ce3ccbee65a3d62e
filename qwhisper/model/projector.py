"""AudioProjection: stacks encoder frames and maps them into the language model's embedding space, in fp32."""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig


class ProjectorLinear(nn.Linear):
    """Marks the projector's own layers, so that the model's weight initialisation knows them from all others.

    transformers initialises by module type after construction: a plain `nn.Linear` would be drawn anew at std 0.02.
    """

    def reset_to_small_xavier(self, scale: float) -> None:
        """Xavier uniform (Glorot & Bengio, 2010, eq. 16) times `scale`; bias zero."""
        bound = scale * math.sqrt(6.0 / (self.in_features + self.out_features))
        init.uniform_(self.weight, -bound, bound)
        init.zeros_(self.bias)


class AudioProjection(nn.Module):
    """LayerNorm, dropout, two linear layers with an activation between, times `projector_scale`.

    The dropout (Srivastava et al., 2014; 0 unless configured) stands before the first layer: what a few recorded voices
    have in common with a word is then no longer read from a few of the encoder's dimensions alone.
    """

    def __init__(self, config: Qwen3AudioConfig):
        super().__init__()
        self.stack = config.projector_stack
        self.scale = config.projector_scale
        stacked_size = config.audio_config.d_model * self.stack
        hidden_size = config.get_text_config().hidden_size
        self.norm = nn.LayerNorm(stacked_size)
        self.dropout = nn.Dropout(config.projector_dropout)
        self.linear_1 = ProjectorLinear(stacked_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = ProjectorLinear(hidden_size, hidden_size)

    def stack_frames(self, hidden_states: Tensor, lengths: list[int]) -> Tensor:
        """[sum(lengths), d_model] to [tokens, stack * d_model]: each window's last group is filled up with zeros."""
        groups = [-(-n // self.stack) for n in lengths]
        pieces = hidden_states.split(lengths)
        fill = [count * self.stack - length for count, length in zip(groups, lengths, strict=True)]
        filled = torch.cat([nn.functional.pad(piece, (0, 0, 0, n)) for piece, n in zip(pieces, fill, strict=True)])
        return filled.view(sum(groups), -1)

    def forward(self, hidden_states: Tensor, lengths: list[int]) -> Tensor:
        """hidden_states: [sum(lengths), d_model], encoder frames of all windows; lengths: frames of each window.

        Returns [sum(ceil(length / stack)), hidden_size] in the projector's own dtype. Computed in that dtype even under
        autocast: half precision here is where the first NaN of such models comes from.
        """
        dtype = self.linear_1.weight.dtype
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            x = self.dropout(self.norm(self.stack_frames(hidden_states.to(dtype), lengths)))
            x = self.linear_2(self.act(self.linear_1(x)))
            return x * self.scale
