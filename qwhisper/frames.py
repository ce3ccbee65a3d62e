"""How many samples, mel frames, encoder frames and placeholder tokens a clip has: one arithmetic for data and model.

Plain integers, no torch. A clip is lead silence + audio + tail silence, cut into windows of at most 30 s, each of which
the encoder sees by itself. Windows of one clip are of nearly equal length (31 s are two windows of 15.5 s, not 30 + 1),
and every window but the last is a whole number of tokens, so that a window's tokens can be computed without its
neighbours.
"""

from dataclasses import dataclass

SAMPLE_RATE = 16_000
HOP_LENGTH = 160  # samples a mel frame
N_FFT = 400  # samples an STFT window; also the shortest window that reflect padding allows for comfortably
CONV_STRIDE = 2  # mel frames an encoder frame


def mel_frames(num_samples: int) -> int:
    """Mel frames of one window; Whisper drops the STFT's last frame."""
    return max(num_samples, N_FFT) // HOP_LENGTH


def encoder_frames(num_mel_frames: int) -> int:
    """Encoder frames of one window, after the convolution of stride 2."""
    return (num_mel_frames - 1) // CONV_STRIDE + 1


@dataclass(frozen=True, kw_only=True)
class FrameArithmetic:
    """Lengths of one model's audio path.

    stack: encoder frames that the projector joins into one token.
    max_encoder_frames: positions of the encoder, 1500 for Whisper (30 s).
    lead_silence_s, tail_silence_s: seconds of silence put before and after every clip.
    """

    stack: int = 4
    max_encoder_frames: int = 1500
    lead_silence_s: float = 0.0
    tail_silence_s: float = 0.0

    def __post_init__(self):
        if self.stack < 1 or self.max_encoder_frames < self.stack:
            raise ValueError(f"stack {self.stack} does not fit an encoder of {self.max_encoder_frames} positions")
        if min(self.lead_silence_s, self.tail_silence_s) < 0:
            raise ValueError("silence must be 0 seconds or more")

    @property
    def samples_per_token(self) -> int:
        return HOP_LENGTH * CONV_STRIDE * self.stack

    @property
    def max_window_samples(self) -> int:
        return self.max_encoder_frames // self.stack * self.samples_per_token

    @property
    def lead_samples(self) -> int:
        return round(self.lead_silence_s * SAMPLE_RATE)

    @property
    def tail_samples(self) -> int:
        return round(self.tail_silence_s * SAMPLE_RATE)

    def window_lengths(self, num_samples: int) -> list[int]:
        """Samples of each window of a clip of `num_samples` samples, silence included."""
        total = max(self.lead_samples + num_samples + self.tail_samples, N_FFT)
        num_windows = -(-total // self.max_window_samples)
        tokens_per_window = -(-total // (num_windows * self.samples_per_token))
        length = tokens_per_window * self.samples_per_token
        full, rest = divmod(total, length)
        return [length] * full + ([rest] if rest else [])

    def window_tokens(self, window_samples: int) -> int:
        """Placeholder tokens of one window."""
        return -(-encoder_frames(mel_frames(window_samples)) // self.stack)

    def num_tokens(self, num_samples: int) -> int:
        """Placeholder tokens of a clip of `num_samples` samples, before silence is added."""
        return sum(self.window_tokens(n) for n in self.window_lengths(num_samples))
