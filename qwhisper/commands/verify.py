"""`qwhisper verify`: proves that a checkpoint can be resumed (断点恢复校验)."""

from dataclasses import dataclass

from qwhisper.commands.shared_flags import (
    AUDIO_MODEL_HELP,
    CHECKPOINT_HELP,
    DEVICE_HELP,
    DTYPE_HELP,
    TEXT_MODEL_HELP,
    Dtype,
)
from qwhisper.flags import Arguments, flag, required


@dataclass(frozen=True, kw_only=True)
class VerifyArguments(Arguments):
    checkpoint: str = required(CHECKPOINT_HELP)
    audio_model: str | None = flag(None, AUDIO_MODEL_HELP)
    text_model: str | None = flag(None, TEXT_MODEL_HELP)
    device: str | None = flag(None, DEVICE_HELP)
    dtype: Dtype = flag("auto", DTYPE_HELP)


def main(arguments: VerifyArguments) -> None:
    """Print what was verified. Raises CheckpointError if a check fails."""
    from qwhisper.report.terminal import quieten_transformers
    from qwhisper.train.verification import verify

    quieten_transformers()
    proof = verify(
        arguments.checkpoint,
        device=arguments.device,
        dtype=arguments.dtype,
        audio_model=arguments.audio_model,
        text_model=arguments.text_model,
    )
    print(proof)
