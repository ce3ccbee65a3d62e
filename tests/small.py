"""Small models and dialogues for tests.

The models have the real architectures and random weights, and a tokenizer and chat template of Qwen3's kind.
"""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from qwhisper.data.collator import ConversationCollator
from qwhisper.frames import FrameArithmetic

TEMPLATE = Path(__file__).parents[1] / "qwhisper/demo/qwen3_chat_template.jinja"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN_ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
SPARE_ROWS = 5


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


def write_small_bases(folder: Path, *, hidden_size: int = 32, seed: int = 0) -> tuple[Path, Path]:
    """(audio, text) folders as the real ones are laid out."""
    audio, text = folder / "whisper", folder / "qwen3"
    if text.exists():
        return audio, text
    torch.manual_seed(seed)
    whisper = WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=80,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=100, max_source_positions=1500,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperEncoder(whisper).save_pretrained(audio)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(audio)
    tokenizer = small_tokenizer()
    qwen3 = Qwen3Config(
        vocab_size=len(tokenizer) + SPARE_ROWS, hidden_size=hidden_size, num_hidden_layers=2, intermediate_size=64,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(qwen3).save_pretrained(text)
    tokenizer.save_pretrained(text)
    return audio, text


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


def teach_to_read(text_folder: Path, words: list[str], *, num_steps: int = 150) -> None:
    """Pre-trains the small Qwen3 in place, until it answers "Pitch?" with the word that stands before it."""
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    model = Qwen3ForCausalLM.from_pretrained(text_folder)
    collator = ConversationCollator(tokenizer, FrameArithmetic(), audio_token_id=len(tokenizer))
    dialogues = [
        {"id": word, "messages": [{"role": "user", "content": f"{word}Pitch?"}, {"role": "assistant", "content": word}]}
        for word in words
    ]
    batch = collator(dialogues)
    del batch["valid_label_count"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(num_steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1, f"the small model has not learned to read: {loss.item()}"
    model.save_pretrained(text_folder)
