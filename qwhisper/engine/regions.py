"""A pack in two passes that are compiled and recorded as CUDA graphs: the encoder, and all that follows it.

They are joined by a tensor that keeps its place, so that the shapes of one do not multiply with those of the other.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwhisper.engine.batch import AudioPart, Batch, PackShape, TextPart
from qwhisper.engine.capture import Graphs, Outputs
from qwhisper.engine.compiled import compiling
from qwhisper.engine.forward import Heard, answer
from qwhisper.engine.shapes import power_of_two
from qwhisper.errors import ExecutionError, first_line
from qwhisper.guards.gradient_buffers import GradientBuffers
from qwhisper.memory import is_out_of_memory
from qwhisper.model.audio_layout import EncoderLayout, MelLayout, on_device
from qwhisper.model.loss import OfChunk
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration


@dataclass(frozen=True)
class EncoderInputs:
    """See `AudioPart` and `AudioLayout`."""

    row: Tensor
    mel: MelLayout
    encoder: EncoderLayout


@dataclass(frozen=True)
class LearnerInputs:
    """See `Batch`. encoder: None unless the encoder is trained. groups, positions: None for text alone."""

    text: TextPart
    encoder: EncoderInputs | None
    groups: Tensor | None
    positions: Tensor | None
    teacher: Batch | None


class Regions:
    """Runs packs of rounded shapes. count, scale: scalars on the device, see `Executor`. chunk: see `token_losses`."""

    def __init__(
        self,
        model: Qwen3AudioForConditionalGeneration,
        graphs: Graphs,
        *,
        distill_weight: float,
        count: Tensor,
        scale: Tensor,
        buffers: GradientBuffers,
        chunk: OfChunk,
    ):
        self.model, self.graphs, self.buffers, self.chunk = model, graphs, buffers, chunk
        self.distill_weight, self.count, self.scale = distill_weight, count, scale
        self._frames = torch.empty(0)  # [frames, d_model], the encoder's output for the pack, then zeros

    def run(self, batch: Batch) -> Outputs:
        """Detached loss / count, and the summed divergence from the teacher, in nats, or None without a teacher; leaves
        the gradients. batch: on the host, of a rounded shape.

        Raises ExecutionError if it can't be compiled or recorded.
        """
        batch = _without_host_borders(batch)
        try:
            with compiling():
                if batch.audio is None or self.model.model.encoder_is_trained:
                    return self._learn(_whole(batch), batch.shape)
                if batch.audio.row is None:
                    self._take_features(batch.shape, batch.audio)
                else:
                    self._reserve_frames(batch.shape, self.model.model.audio_tower.conv1.weight.dtype)
                    self._encode(batch, batch.audio)
                return self._learn(*self._after_encoder(batch, batch.audio))
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ExecutionError(first_line(error)) from error

    def _reserve_frames(self, shape: PackShape, dtype: torch.dtype) -> None:
        stack, config = self.model.config.projector_stack, self.model.config.audio_config
        needed = max(shape.encoder_frames, stack * shape.tokens)  # the silences around clips have no tokens
        if needed > len(self._frames) or dtype != self._frames.dtype:
            device = self.model.model.audio_tower.conv1.weight.device
            self.graphs.forget()  # they read and write the old one
            self._frames = torch.zeros(power_of_two(needed), config.d_model, dtype=dtype, device=device)

    def _take_features(self, shape: PackShape, audio: AudioPart) -> None:
        """Take the encoder's output from the feature cache, as exactly as the cache has it."""
        device = self.model.model.audio_tower.conv1.weight.device
        frames = on_device(audio, device).known_frames
        assert frames is not None
        self._reserve_frames(shape, frames.dtype)
        self._fill_frames(frames)

    def _encode(self, batch: Batch, audio: AudioPart) -> None:
        key = ("encoder", replace(batch.shape.audio, tokens=0))
        with torch.no_grad():
            self.graphs.run(key, _encoder_inputs(audio), self._encode_into_frames, self.buffers)

    def _encode_into_frames(self, inputs: EncoderInputs) -> Outputs:
        frames = self.model.model.encoded_row(inputs.row, inputs.mel, inputs.encoder)
        self._fill_frames(frames)
        return ()

    def _fill_frames(self, frames: Tensor) -> None:
        self._frames[: len(frames)].copy_(frames)
        self._frames[len(frames) :].zero_()

    def _after_encoder(self, batch: Batch, audio: AudioPart) -> tuple[LearnerInputs, PackShape]:
        """What does not depend on the number of encoder frames: a missing frame of a group is the row after the last
        of the tensor.
        """
        groups = audio.layout.groups
        groups = groups.masked_fill(groups == batch.shape.encoder_frames, len(self._frames))
        shape = replace(batch.shape, encoder_frames=0, mel_frames=0, windows=0, max_window=0)
        return LearnerInputs(batch.text, None, groups, audio.positions, batch.teacher), shape

    def _learn(self, inputs: LearnerInputs, key: PackShape) -> Outputs:
        return self.graphs.run(key, inputs, self._forward_backward, self.buffers)

    def _forward_backward(self, inputs: LearnerInputs) -> Outputs:
        audio = None
        if inputs.groups is not None and inputs.positions is not None:
            frames, given = self._frames, inputs.encoder
            if given is not None:
                frames = self.model.model.encoded_row(given.row, given.mel, given.encoder)
            audio = Heard(frames, inputs.groups, inputs.positions)
        tokens = answer(self.model, inputs.text, audio, inputs.teacher, self.distill_weight, self.chunk).tokens
        loss = tokens.losses.sum() / self.count
        if loss.requires_grad:
            (loss * self.scale).backward()
        return loss.detach(), None if tokens.divergences is None else tokens.divergences.sum()


def _encoder_inputs(audio: AudioPart) -> EncoderInputs:
    return EncoderInputs(*audio.unencoded)


def _whole(batch: Batch) -> LearnerInputs:
    audio = batch.audio
    if audio is None:
        return LearnerInputs(batch.text, None, None, None, batch.teacher)
    return LearnerInputs(batch.text, _encoder_inputs(audio), audio.layout.groups, audio.positions, batch.teacher)


def _without_host_borders(batch: Batch) -> Batch:
    """No kernel of a graph reads them, and compiled code would be made anew for each."""
    audio = batch.audio
    if audio is not None and audio.layout.encoder is not None:
        encoder = replace(audio.layout.encoder, cu_seq_lens_host=None)
        audio = replace(audio, layout=replace(audio.layout, encoder=encoder))
    teacher = batch.teacher and _without_host_borders(batch.teacher)
    return replace(batch, text=replace(batch.text, cu_seq_lens_host=None), audio=audio, teacher=teacher)
