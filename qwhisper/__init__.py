"""qwhisper teaches a text model to listen: Whisper encoder + AudioProjection + Qwen3, fine-tuned on one card."""

__version__ = "0.1.0"
