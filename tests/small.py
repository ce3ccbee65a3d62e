"""Small models and dialogues for tests: the one place that makes either.

The models have the real architectures and random weights; those on disk have a tokenizer and chat template of Qwen3's
kind.
"""

import copy
import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from qwhisper.data.collator import ConversationCollator
from qwhisper.frames import FrameArithmetic
from qwhisper.model.attention import PACKED_ATTENTION
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.loading import join
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration

TEMPLATE = Path(__file__).parents[1] / "qwhisper/demo/qwen3_chat_template.jinja"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN_ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
SPARE_ROWS = 5
# Of models without a tokenizer.
VOCABULARY = 96
IDS = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
SHAPE = IDS | {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SLIDING_WINDOW = 7


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes alone, with Qwen3's special tokens and chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_tokens(SPECIAL, special_tokens=True)
    fast.add_tokens(PLAIN_ADDED)
    fast.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return fast


def whisper_config() -> WhisperConfig:
    return WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=80,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=100, max_source_positions=1500,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip


def text_config(family: str = "qwen3", **values: Any) -> PreTrainedConfig:
    if family == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        return GPT2Config(**IDS | no_dropout | shape | values)
    if family == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        own = {"sliding_window": SLIDING_WINDOW, "layer_types": layers, "query_pre_attn_scalar": 8}
        return Gemma3TextConfig(**SHAPE | own | values)
    return {"qwen3": Qwen3Config, "llama": LlamaConfig}[family](**SHAPE | values)


def write_small_bases(folder: Path, *, hidden_size: int = 32, seed: int = 0) -> tuple[Path, Path]:
    """(audio, text) folders as the real ones are laid out: a Whisper encoder, and a Qwen3 with tied embeddings."""
    audio, text = folder / "whisper", folder / "qwen3"
    if text.exists():
        return audio, text
    torch.manual_seed(seed)
    WhisperEncoder(whisper_config()).save_pretrained(audio)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(audio)
    tokenizer = small_tokenizer()
    config = text_config(
        vocab_size=len(tokenizer) + SPARE_ROWS, hidden_size=hidden_size, intermediate_size=64, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(text)
    tokenizer.save_pretrained(text)
    return audio, text


def large_weights(module: nn.Module) -> None:
    """Draws matrices at a tenth instead of 0.02, so that attention and audio change the outputs visibly."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)


def small_model(family: str = "qwen3", **values: Any) -> Qwen3AudioForConditionalGeneration:
    """A joined model in fp32, without a tokenizer; its LM's weights are large enough that audio and attention matter.

    Its weights are those of torch's seed. One that was made before from the same seed is copied: a tenth of the time.
    A model of bases on disk is `build_from_bases(*write_small_bases(folder))`.
    """
    return made_once((family, repr(sorted(values.items()))), lambda: make_small_model(family, **values))


MADE: dict[tuple[Hashable, ...], tuple[Any, torch.Tensor]] = {}


def made_once(key: tuple[Hashable, ...], make: Callable[[], Any]) -> Any:
    """A copy of what `make` gave for the same key and the same random numbers; these go on as after `make`."""
    key = (*key, torch.get_rng_state().numpy().tobytes())
    if key not in MADE:
        MADE[key] = make(), torch.get_rng_state()
    made, rng_state = MADE[key]
    torch.set_rng_state(rng_state)
    return copy.deepcopy(made)


def make_small_model(
    family: str, *, audio_token_id: int = VOCABULARY - 1, **config_values: Any
) -> Qwen3AudioForConditionalGeneration:
    encoder = TrueLengthWhisperEncoder._from_config(
        whisper_config(), attn_implementation=PACKED_ATTENTION
    ).requires_grad_(False)
    language_model = AutoModelForCausalLM.from_config(text_config(family), attn_implementation=PACKED_ATTENTION)
    large_weights(language_model)
    language_model.requires_grad_(False)
    config = Qwen3AudioConfig(
        audio_config=encoder.config,
        text_config=language_model.config,
        audio_token_id=audio_token_id,
        projector_init_scale=1.0,
        audio_lead_silence=0.0,
        audio_tail_silence=0.0,
        **config_values,
    )
    return join(Qwen3AudioForConditionalGeneration, config, encoder.eval(), language_model)


def tone(frequency: float, seconds: float, rate: int = 16_000) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def write_dialogues(folder: Path, count: int = 12, *, name: str = "train.jsonl", first: int = 0) -> Path:
    """Dialogues of one and two turns about tones of different lengths and pitches, and a text-only one now and then."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(first, first + count):
        words = ["low", "high"][i % 2]
        clip = folder / f"clip{i}.wav"
        soundfile.write(clip, tone(200 + 600 * (i % 2), 0.1 + 0.05 * (i % 5)), 16_000)
        audio = {"type": "audio", "audio": clip.name, "transcript": words}
        messages = [
            {"role": "user", "content": [audio, {"type": "text", "text": "Pitch?"}]},
            {"role": "assistant", "content": words},
        ]
        if i % 3 == 1:
            messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"}]
        if i % 5 == 4:
            messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "hi"}]
        lines.append(json.dumps({"id": f"d{i}", "messages": messages}))
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def teach(
    text_folder: Path,
    dialogues: list[dict],
    optimizer: Callable[[nn.Module], Any],
    *,
    num_steps: int,
    noise: float = 0.0,
) -> None:
    """Trains the small Qwen3 on all of the dialogues in place, until it gives their answers.

    noise: on the embeddings, relative to their standard deviation; without it the model answers only the exact ones.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(text_folder), Qwen3ForCausalLM.from_pretrained(text_folder)
    batch = ConversationCollator(tokenizer, FrameArithmetic(), audio_token_id=len(tokenizer))(dialogues)
    del batch["valid_label_count"]

    def blur(module: nn.Module, given: tuple, found: torch.Tensor) -> torch.Tensor:
        return found + noise * found.detach().std() * torch.randn_like(found)

    torch.manual_seed(0)
    hook = model.get_input_embeddings().register_forward_hook(blur) if noise else None
    steps = optimizer(model)
    for _ in range(num_steps):
        loss = model(**batch).loss
        loss.backward()
        steps.step()
        model.zero_grad()
    if hook:
        hook.remove()
    assert loss.item() < 0.1, f"the small model has not learned: {loss.item()}"
    model.save_pretrained(text_folder)


def teach_to_read(text_folder: Path, words: list[str], *, num_steps: int = 150) -> None:
    """Trains the small Qwen3 in place, until it answers "Pitch?" with the word that stands before it."""
    dialogues = [
        {"id": word, "messages": [{"role": "user", "content": f"{word}Pitch?"}, {"role": "assistant", "content": word}]}
        for word in words
    ]
    teach(text_folder, dialogues, lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3), num_steps=num_steps)
