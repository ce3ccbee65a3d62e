"""Two small base models of the real architectures, pre-trained for the demo's dialogues, saved in the real formats.

`make_whisper_base`: a Whisper whose encoder learned to spell (CTC on characters). `make_qwen3_base`: a Qwen3 that
answers the demo's questions when it can read the numbers. Neither was trained with the other.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jiwer
import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from qwhisper.data.audio import load_audio
from qwhisper.data.dialogue import parse_dialogue
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.packing import pack_samples
from qwhisper.data.rows import Sample
from qwhisper.data.windows import clip_windows
from qwhisper.demo.muon import Muon
from qwhisper.frames import FrameArithmetic
from qwhisper.model.attention import PACKED_ATTENTION, packed_row_mask
from qwhisper.model.audio_layout import encoder_layout
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.loss import supervised_loss
from qwhisper.model.mel import packed_log_mel

NUM_MEL_BINS = 80
# Silence around every clip while the encoder learns. Whisper's values would triple the length of half-second clips.
# Training on this encoder should use the same silence.
LEAD_SILENCE_S, TAIL_SILENCE_S = 0.05, 0.1
CHARACTERS = "abcdefghijklmnopqrstuvwxyz '"  # CTC's blank is 0, these follow
ENCODER_STEPS, ENCODER_BATCH, ENCODER_LR = 700, 24, 2e-3
LM_STEPS, LM_BATCH, LM_LR = 450, 16, 3e-3
MUON_LR = 0.01

CHAT_TEMPLATE = Path(__file__).with_name("qwen3_chat_template.jinja")
# Qwen3's own, in its order.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
OTHER_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
VOCABULARY_SIZE = 512  # of the byte-level BPE, before the tokens above
EMBEDDING_ROWS = 576  # more rows than tokens, as in Qwen3: <|audio_pad|> needs no resizing
SPARE_ROWS = 8  # at least, with a larger tokenizer


class TwoOptimizers:
    """Muon for the layers' matrices, AdamW for everything else; warm-up, then a linear fall to 0.

    With AdamW alone, at its best rate, the language model answers 74 % right; with both, 99 %.
    """

    def __init__(self, model: nn.Module, matrices: Callable[[str, Tensor], bool], adamw_lr: float, num_steps: int):
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        muon = Muon([p for name, p in trainable if matrices(name, p)], lr=MUON_LR)
        rest = [p for name, p in trainable if not matrices(name, p)]
        adamw = torch.optim.AdamW(rest, lr=adamw_lr, weight_decay=0.0, fused=True)
        warmup = max(1, num_steps // 20)
        self._optimizers = (muon, adamw)

        def factor(step: int) -> float:
            return min((step + 1) / warmup, (num_steps - step) / (num_steps - warmup))

        self._schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in self._optimizers]

    def step(self) -> None:
        for optimizer, scheduler in zip(self._optimizers, self._schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()


def _batches(num_samples: int, batch_size: int, num_steps: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """`num_steps` index arrays, epoch after epoch in random order; an epoch's short last batch is left out."""
    order = np.zeros(0, dtype=np.int64)
    for _ in range(num_steps):
        if len(order) < batch_size:
            order = generator.permutation(num_samples)
        batch, order = order[:batch_size], order[batch_size:]
        yield batch


# ---------------------------------------------------------------- Whisper


def whisper_config() -> WhisperConfig:
    """Whisper's shape at width 128; the file format needs the one-layer decoder."""
    return WhisperConfig(
        d_model=128,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=128,
        num_mel_bins=NUM_MEL_BINS,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def make_whisper_base(
    out_dir: str | Path,
    clips: Sequence[str | Path],
    words: Sequence[str],
    seed: int,
    *,
    num_steps: int = ENCODER_STEPS,
    held_out: tuple[Sequence[str | Path], Sequence[str]] | None = None,
) -> dict[str, float]:
    """Train an encoder to spell what the clips say and save a whole Whisper checkpoint into `out_dir`.

    held_out: (clips, words) of voices that are not trained on. Returns "loss", the mean of the last losses, and the
    shares "character_error_rate" and "word_accuracy" on the held-out clips.
    """
    torch.manual_seed(seed)
    config = whisper_config()
    whisper = WhisperForConditionalGeneration(config)
    encoder = TrueLengthWhisperEncoder._from_config(config, attn_implementation=PACKED_ATTENTION)
    head = nn.Linear(config.d_model, 1 + len(CHARACTERS))
    features = _features(clips)
    targets = [_spell(word) for word in words]
    model = nn.ModuleDict({"encoder": encoder, "head": head}).train()
    optimizers = TwoOptimizers(model, lambda name, p: p.ndim == 2 and "layers." in name, ENCODER_LR, num_steps)
    losses = []
    for batch in _batches(len(clips), ENCODER_BATCH, num_steps, np.random.default_rng(seed)):
        log_probabilities, lengths = _spelling(encoder, head, [features[i] for i in batch])
        target = [targets[i] for i in batch]
        target_lengths = torch.tensor([len(t) for t in target])
        loss = nn.functional.ctc_loss(log_probabilities, torch.cat(target), lengths, target_lengths, zero_infinity=True)
        loss.backward()
        optimizers.step()
        losses.append(loss.item())
    model.eval()
    whisper.model.encoder.load_state_dict(encoder.state_dict())
    whisper.save_pretrained(out_dir)
    WhisperFeatureExtractor(feature_size=NUM_MEL_BINS).save_pretrained(out_dir)
    report = {"loss": float(np.mean(losses[-20:]))}
    return report | (_spelling_errors(encoder, head, *held_out) if held_out else {})


def _features(clips: Sequence[str | Path]) -> list[Tensor]:
    """Log-mel [mel frames, bins] of each clip with the demo's silence around it."""
    frames = FrameArithmetic(lead_silence_s=LEAD_SILENCE_S, tail_silence_s=TAIL_SILENCE_S)
    windows = [window for clip in clips for window in clip_windows(load_audio(clip), frames)]
    assert len(windows) == len(clips), "clips to spell must be shorter than a window"
    lengths = [len(window) for window in windows]
    mel, mel_lengths = packed_log_mel(torch.from_numpy(np.concatenate(windows)), lengths, NUM_MEL_BINS)
    return list(mel.split(mel_lengths))


def _spell(word: str) -> Tensor:
    return torch.tensor([1 + CHARACTERS.index(character) for character in word])


def _spelling(encoder: TrueLengthWhisperEncoder, head: nn.Linear, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """CTC log-probabilities [longest, clips, 1 + characters] and the encoder frames of each clip."""
    hidden = encoder(torch.cat(list(features)), encoder_layout([len(f) for f in features])).last_hidden_state
    lengths = [(len(f) + 1) // 2 for f in features]
    logits = nn.utils.rnn.pad_sequence(head(hidden).split(lengths))
    return logits.log_softmax(-1), torch.tensor(lengths)


@torch.no_grad()
def _spelling_errors(
    encoder: TrueLengthWhisperEncoder, head: nn.Linear, clips: Sequence[str | Path], words: Sequence[str]
) -> dict[str, float]:
    heard = []
    features = _features(clips)
    for start in range(0, len(features), 64):
        log_probabilities, lengths = _spelling(encoder, head, features[start : start + 64])
        for best, length in zip(log_probabilities.argmax(-1).T, lengths.tolist(), strict=True):
            symbols = torch.unique_consecutive(best[:length]).tolist()
            heard.append("".join(CHARACTERS[s - 1] for s in symbols if s))
    right = [h == w for h, w in zip(heard, words, strict=True)]
    return {"character_error_rate": jiwer.cer(list(words), heard), "word_accuracy": float(np.mean(right))}


# ---------------------------------------------------------------- Qwen3


def make_tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """A tokenizer of Qwen3's kind (byte-level BPE, its split pattern, its chat template) with a small vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # The template's own words must be frequent enough to become single tokens, as in Qwen3's vocabulary.
    texts = [*texts, *["system\n", "user\n", "assistant\n", "\n\n"] * len(texts)]
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in OTHER_TOKENS])
    return Qwen2Tokenizer(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        model_max_length=4096,
    )


def qwen3_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """Qwen3's shape at width 192 (grouped key heads, QK norm, tied embeddings with spare rows)."""
    return Qwen3Config(
        vocab_size=max(EMBEDDING_ROWS, len(tokenizer) + SPARE_ROWS),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_qwen3_base(
    out_dir: str | Path,
    texts: Sequence[dict],
    seed: int,
    *,
    num_steps: int = LM_STEPS,
    held_out: Sequence[dict] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, float]:
    """Teach a small Qwen3 to answer text dialogues (canonical records) and save it with its tokenizer into `out_dir`.

    The dialogues are rendered and masked as in training on audio. Returns "loss", the mean of the last losses, and
    "answer_accuracy", the share of answers to `held_out` dialogues that are exactly right. tokenizer: one of Qwen3's
    kind (None: make a small one from the texts).
    """
    torch.manual_seed(seed)
    dialogues = [parse_dialogue(record, record["id"], Path.cwd()) for record in texts]
    if tokenizer is None:
        tokenizer = make_tokenizer([message.text for dialogue in dialogues for message in dialogue.messages])
    dialogue_encoder = DialogueEncoder(tokenizer, FrameArithmetic(), audio_token_id=len(tokenizer))
    model = Qwen3ForCausalLM._from_config(qwen3_config(tokenizer), attn_implementation=PACKED_ATTENTION).train()
    samples = [dialogue_encoder.encode(dialogue) for dialogue in dialogues]
    optimizers = TwoOptimizers(model, lambda name, p: p.ndim == 2 and "layers." in name, LM_LR, num_steps)
    losses = []
    for batch in _batches(len(samples), LM_BATCH, num_steps, np.random.default_rng(seed)):
        loss, _ = _answer_loss(model, [samples[i] for i in batch])
        loss.backward()
        optimizers.step()
        losses.append(loss.item())
    model.eval()
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    report = {"loss": float(np.mean(losses[-20:]))}
    if held_out:
        unseen = [dialogue_encoder.encode(parse_dialogue(record, record["id"], Path.cwd())) for record in held_out]
        report["answer_accuracy"] = _answer_accuracy(model, unseen)
    return report


def _answer_loss(model: Qwen3ForCausalLM, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy over the answers' tokens, logits [answers' tokens, rows])."""
    batch: dict = pack_samples(samples)
    labels = batch.pop("labels")
    del batch["valid_label_count"]
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    output = model.model(inputs_embeds=embeddings, attention_mask=packed_row_mask(embeddings), use_cache=False, **batch)
    return supervised_loss(output.last_hidden_state, labels, model.lm_head)


@torch.no_grad()
def _answer_accuracy(model: Qwen3ForCausalLM, samples: Sequence[Sample]) -> float:
    """Share of answers that greedy decoding gives exactly, with the right answers as history."""
    right = []
    for start in range(0, len(samples), 64):
        part = samples[start : start + 64]
        likeliest = _answer_loss(model, part)[1].argmax(-1).numpy()
        answers = [sample.input_ids[begin:end] for sample in part for begin, end in sample.answer_spans]
        given = np.split(likeliest, np.cumsum([len(answer) for answer in answers])[:-1])
        right += [np.array_equal(g, answer) for g, answer in zip(given, answers, strict=True)]
    return float(np.mean(right))
