"""Sizes of a language model and of Whisper's encoder, from their configurations alone: shapes and parameter counts.

The families Qwen3 and Whisper are built in, so that a plan needs neither files nor a network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Size = TypeVar("Size")
QWEN3_VOCABULARY = 151_936
WHISPER_POSITIONS = 1500


@dataclass(frozen=True, kw_only=True)
class TextSize:
    """A decoder with gated feed-forward layers. key_heads: of keys and of values. norms_heads: as Qwen3, it normalises
    queries and keys. tied: the head is the embedding's matrix.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int = QWEN3_VOCABULARY
    tied: bool = False
    norms_heads: bool = True

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear of one layer, by name."""
        return {
            "q_proj": (self.hidden, self.query_width),
            "k_proj": (self.hidden, self.key_width),
            "v_proj": (self.hidden, self.key_width),
            "o_proj": (self.query_width, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Of all layers; what is quantised."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding and, if it has its own matrix, the head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        norms = self.layers * (2 * self.hidden + (2 * self.head_dim if self.norms_heads else 0)) + self.hidden
        return self.linear_parameters + self.embedding_parameters + norms


@dataclass(frozen=True, kw_only=True)
class AudioSize:
    """Whisper's encoder."""

    width: int
    layers: int
    feed_forward: int
    mel_bins: int

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of all layers."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.feed_forward)

    @property
    def convolution_parameters(self) -> int:
        return 3 * self.width * (self.mel_bins + self.width)

    @property
    def parameters(self) -> int:
        biases = self.layers * (4 * self.width + self.feed_forward) + 2 * self.width  # k_proj has none
        norms = (2 * self.layers + 1) * 2 * self.width
        return self.layer_parameters + self.convolution_parameters + biases + norms + WHISPER_POSITIONS * self.width


def _qwen3(hidden: int, layers: int, intermediate: int, heads: int, *, tied: bool = False) -> TextSize:
    return TextSize(
        hidden=hidden, layers=layers, intermediate=intermediate, heads=heads, key_heads=8, head_dim=128, tied=tied
    )


def _whisper(width: int, layers: int, mel_bins: int = 80) -> AudioSize:
    return AudioSize(width=width, layers=layers, feed_forward=4 * width, mel_bins=mel_bins)


TEXT_SIZES = {
    "qwen3-0.6b": _qwen3(1024, 28, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 12288, 32),
    "qwen3-14b": _qwen3(5120, 40, 17408, 40),
    "qwen3-32b": _qwen3(5120, 64, 25600, 64),
}
AUDIO_SIZES = {
    "whisper-tiny": _whisper(384, 4),
    "whisper-base": _whisper(512, 6),
    "whisper-small": _whisper(768, 12),
    "whisper-medium": _whisper(1024, 24),
    "whisper-large": _whisper(1280, 32),
    "whisper-large-v2": _whisper(1280, 32),
    "whisper-large-v3": _whisper(1280, 32, mel_bins=128),
    "whisper-large-v3-turbo": _whisper(1280, 32, mel_bins=128),
}


# Parts of the names of repositories with quantised weights, whose config.json says in which format.
QUANTISED = ("4bit", "fp8", "awq", "gptq", "int4", "int8", "gguf")


def built_in(name: str, sizes: Mapping[str, Size]) -> Size | None:
    """The size of a hub id such as Qwen/Qwen3-8B-Base: of the longest name in the table that its last part begins with;
    None for others, and for quantised ones.
    """
    last = name.rstrip("/").rpartition("/")[2].lower()
    if any(word in last for word in QUANTISED):
        return None
    fitting = [key for key in sizes if last == key or last.startswith((f"{key}-", f"{key}."))]
    return sizes[max(fitting, key=len)] if fitting else None


def text_size(config: Any) -> TextSize:
    """Of a causal LM's configuration. Other architectures than Qwen3's are taken for a decoder of the same shapes.

    Raises ValueError for a mixture of experts and for a configuration without these shapes.
    """
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        raise ValueError("a mixture of experts has other sizes than a plain decoder")
    missing = [
        name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads") if not hasattr(config, name)
    ]
    if missing:
        raise ValueError(f"the configuration has no {', '.join(missing)}")
    hidden, heads = config.hidden_size, config.num_attention_heads
    return TextSize(
        hidden=hidden,
        layers=config.num_hidden_layers,
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,  # as in GPT-2
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        norms_heads=config.model_type.startswith("qwen3"),
    )


def audio_size(config: Any) -> AudioSize:
    """Of a Whisper configuration."""
    return AudioSize(
        width=config.d_model,
        layers=config.encoder_layers,
        feed_forward=config.encoder_ffn_dim,
        mel_bins=config.num_mel_bins,
    )
