"""Numbers of samples, mel frames, encoder frames and placeholder tokens of a clip: one arithmetic for data and model.

Plain integers, no torch. A clip is cut into windows of nearly equal length (31 s become two of 15.5 s, not 30 + 1). The
encoder sees each window separately, with silence before and after it: it was never trained on speech that begins or
ends at the edge of its window. The frames of the silence are dropped before the projector, except a few after the
speech, so the silence costs the language model almost nothing.
"""

from dataclasses import dataclass

SAMPLE_RATE = 16_000
HOP_LENGTH = 160  # samples per mel frame
N_FFT = 400  # samples per STFT window; also the shortest window that reflect padding handles safely
CONV_STRIDE = 2  # mel frames per encoder frame
FRAME_SAMPLES = HOP_LENGTH * CONV_STRIDE  # 20 ms
DEFAULT_LEAD_SILENCE_S, DEFAULT_TAIL_SILENCE_S = 0.25, 1.0  # around the speech, see docs/silence.md
KEPT_SILENCE_FRAMES = 12  # after the speech: they also carry the last sounds


def resampled_length(num_frames: int, rate: int) -> int:
    """Samples at 16 kHz of `num_frames` frames at `rate`: the length of a clip, whatever length a resampler gives."""
    return -(-num_frames * SAMPLE_RATE // rate)


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
    lead_silence_s, tail_silence_s: seconds of silence before and after the speech of every window, in steps of 20 ms.
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
        if self.max_speech_samples < self.samples_per_token:
            raise ValueError(
                f"{self.lead_silence_s} and {self.tail_silence_s} s of silence leave no room for speech in a window of "
                f"{self.max_encoder_frames * FRAME_SAMPLES / SAMPLE_RATE:g} s"
            )

    @property
    def samples_per_token(self) -> int:
        """Samples of one placeholder token."""
        return FRAME_SAMPLES * self.stack

    @property
    def lead_frames(self) -> int:
        """Encoder frames of the silence before the speech."""
        return round(self.lead_silence_s * SAMPLE_RATE / FRAME_SAMPLES)

    @property
    def tail_frames(self) -> int:
        """Encoder frames of the silence after the speech."""
        return round(self.tail_silence_s * SAMPLE_RATE / FRAME_SAMPLES)

    @property
    def lead_samples(self) -> int:
        """Samples of the silence before the speech."""
        return self.lead_frames * FRAME_SAMPLES

    @property
    def silence_samples(self) -> int:
        """Samples of silence in one window, before and after the speech."""
        return (self.lead_frames + self.tail_frames) * FRAME_SAMPLES

    @property
    def max_speech_samples(self) -> int:
        """Largest number of speech samples in one window; a whole number of tokens."""
        speech_frames = self.max_encoder_frames - self.lead_frames - self.tail_frames
        return speech_frames // self.stack * self.samples_per_token

    def window_lengths(self, num_samples: int) -> list[int]:
        """Samples of each window of a clip of `num_samples` samples, silence included."""
        speech = max(num_samples, N_FFT)
        num_windows = -(-speech // self.max_speech_samples)
        tokens_per_window = -(-speech // (num_windows * self.samples_per_token))
        full, rest = divmod(speech, tokens_per_window * self.samples_per_token)
        pieces = [tokens_per_window * self.samples_per_token] * full + ([rest] if rest else [])
        return [piece + self.silence_samples for piece in pieces]

    def kept_frames(self, num_encoder_frames: int) -> slice:
        """The encoder frames of a window that reach the projector: the speech and a few frames after it."""
        end = num_encoder_frames - max(0, self.tail_frames - KEPT_SILENCE_FRAMES)
        if end <= self.lead_frames:
            raise ValueError(
                f"a window of {num_encoder_frames} encoder frames is no longer than its silence "
                f"({self.lead_frames} before, {self.tail_frames} after): make windows with `clip_windows` and this "
                "model's silence"
            )
        return slice(self.lead_frames, end)

    def mel_tokens(self, num_mel_frames: int) -> int:
        """Placeholder tokens of one window of `num_mel_frames` mel frames, those of its silence included."""
        kept = self.kept_frames(encoder_frames(num_mel_frames))
        return -(-(kept.stop - kept.start) // self.stack)

    def window_tokens(self, window_samples: int) -> int:
        """Placeholder tokens of one window, its silence included in `window_samples`."""
        return self.mel_tokens(mel_frames(window_samples))

    def num_tokens(self, num_samples: int) -> int:
        """Placeholder tokens of a clip of `num_samples` samples, before silence is added."""
        return sum(self.window_tokens(n) for n in self.window_lengths(num_samples))
