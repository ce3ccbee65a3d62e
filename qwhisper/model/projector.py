"""AudioProjection: stacks encoder frames and maps them into the language model's embedding space, in fp32."""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from qwhisper.model.audio_layout import with_zero_row
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig


class ProjectorLinear(nn.Linear):
    """Marks the projector's own layers, so that the model's weight initialisation knows them from all others.

    transformers initialises by module type after construction: it would draw a plain `nn.Linear` again at std 0.02.
    """

    def reset_to_small_xavier(self, scale: float) -> None:
        """Xavier uniform (Glorot & Bengio, 2010, eq. 16) times `scale`; bias zero."""
        bound = scale * math.sqrt(6.0 / (self.in_features + self.out_features))
        init.uniform_(self.weight, -bound, bound)
        init.zeros_(self.bias)


class AudioProjection(nn.Module):
    """LayerNorm, dropout, two linear layers with an activation between, times `projector_scale`.

    The dropout (Srivastava et al., 2014; 0 unless configured) stands before the first layer. It stops the projector
    from recognising a word by the few encoder dimensions in which a few recorded voices agree.
    """

    is_cast_with_model = False  # while a cast of the whole model runs

    def __init__(self, config: Qwen3AudioConfig):
        super().__init__()
        self.scale = config.projector_scale
        stacked_size = config.audio_config.d_model * config.projector_stack
        hidden_size = config.get_text_config().hidden_size
        # fp32 also where a model is made in another dtype, as `from_config(dtype=...)` does
        self.norm = nn.LayerNorm(stacked_size, dtype=torch.float32)
        self.dropout = nn.Dropout(config.projector_dropout)
        self.linear_1 = ProjectorLinear(stacked_size, hidden_size, dtype=torch.float32)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = ProjectorLinear(hidden_size, hidden_size, dtype=torch.float32)

    def _apply(self, fn, recurse=True):
        """A cast of the whole model to a narrower dtype moves the projector and leaves it its own."""

        def move(tensor: Tensor) -> Tensor:
            cast = fn(tensor[:0])
            return tensor.to(cast.device) if cast.dtype.itemsize < tensor.dtype.itemsize else fn(tensor)

        return super()._apply(move if self.is_cast_with_model else fn, recurse)

    def forward(self, hidden_states: Tensor, groups: Tensor) -> Tensor:
        """hidden_states: [frames, d_model] of the encoder; groups: int64 [tokens, stack], the frames of each token; an
        index equal to the number of frames reads zeros.

        Returns [tokens, hidden_size] in the projector's own dtype. Computed in that dtype even under autocast: half
        precision here is where the first NaN of such models comes from.
        """
        dtype = self.linear_1.weight.dtype
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            stacked = with_zero_row(hidden_states).index_select(0, groups.flatten())
            x = stacked.view(groups.shape[0], -1).to(dtype)
            x = self.linear_2(self.act(self.linear_1(self.dropout(self.norm(x)))))
            return x * self.scale
