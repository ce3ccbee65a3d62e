from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from qwhisper.data.template import AUDIO_TOKEN, end_of_turn_ids, listening_template
from qwhisper.demo import bases, speech
from qwhisper.demo.dialogues import text_dialogues
from qwhisper.model.qwen3_audio import build_from_bases

DIALOGUES = (
    [{"role": "user", "content": "three Is it even?"}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    * 2,
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}],
)


@dataclass(frozen=True)
class Made:
    audio_model: Path
    text_model: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """Both bases after as many steps as it takes to write them."""
    folder = tmp_path_factory.mktemp("bases")
    utterances = [speech.Utterance(word, "en-us", "m1", 50, 140) for word in ("two", "six")]
    clips = [folder / f"{n}.wav" for n in range(len(utterances))]
    speech.write_clips(utterances, clips)
    bases.make_whisper_base(folder / "whisper", clips, [utterance.text for utterance in utterances], 0, num_steps=3)
    bases.make_qwen3_base(folder / "qwen3", text_dialogues(16, 0), 0, num_steps=3)
    return Made(folder / "whisper", folder / "qwen3")


def test_the_chat_template_renders_as_qwen3s_own(qwen3_tokenizer):
    real = qwen3_tokenizer
    ours = bases.CHAT_TEMPLATE.read_text(encoding="utf-8")
    comment, rest = ours.split("\n", 1)

    assert rest == real.chat_template
    assert "Apache-2.0" in comment
    for dialogue in DIALOGUES:
        for options in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
            assert real.apply_chat_template(dialogue, chat_template=ours, tokenize=False, **options) == (
                real.apply_chat_template(dialogue, tokenize=False, **options)
            )


def test_the_tokenizer_is_of_qwen3s_kind(made, qwen3_tokenizer):
    ours, real = AutoTokenizer.from_pretrained(made.text_model), qwen3_tokenizer

    assert isinstance(ours, Qwen2Tokenizer)
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == (real.eos_token, real.pad_token, real.bos_token)
    special = {token.content: token.special for token in real.added_tokens_decoder.values()}
    assert {t.content: t.special for t in ours.added_tokens_decoder.values()}.items() <= special.items()
    assert ours.decode(ours("Wie heißt 7? 中\n")["input_ids"]) == "Wie heißt 7? 中\n"
    assert ours("12")["input_ids"] == [ours.convert_tokens_to_ids("1"), ours.convert_tokens_to_ids("2")]
    for text in ("<|im_start|>user\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"):
        assert len(ours(text)["input_ids"]) == len(real(text)["input_ids"])
    assert end_of_turn_ids(ours, listening_template(ours)[0]) == [ours.convert_tokens_to_ids("<|im_end|>")]


def test_the_audio_token_takes_a_spare_row(made):
    tokenizer = AutoTokenizer.from_pretrained(made.text_model)
    model = AutoModelForCausalLM.from_pretrained(made.text_model)

    assert AUDIO_TOKEN not in tokenizer.get_vocab()
    assert len(tokenizer) < model.get_input_embeddings().weight.shape[0]


def test_whisper_has_the_real_layout_and_the_trained_encoder(made):
    with safe_open(made.audio_model / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {name.split(".")[1] for name in names} == {"encoder", "decoder"}
    assert all(name.startswith("model.") for name in names)
    whisper, info = WhisperForConditionalGeneration.from_pretrained(made.audio_model, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert WhisperFeatureExtractor.from_pretrained(made.audio_model).feature_size == whisper.config.num_mel_bins == 80


def test_the_two_bases_join_to_one_model_that_hears_and_speaks(made):
    model, processor = build_from_bases(str(made.audio_model), str(made.text_model))

    audio = torch.randn(8000).numpy() * 0.1
    batch = processor(text=[f"{AUDIO_TOKEN}Is it even?"], audio=[audio])
    out = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert out.shape[1] > batch["input_ids"].shape[1]


def test_the_same_seed_makes_the_same_language_model(made, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        bases.make_qwen3_base(tmp_path / name, text_dialogues(16, 0), seed, num_steps=3)
    folders = (made.text_model, tmp_path / "again", tmp_path / "other")
    first, again, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == again != other


@pytest.mark.slow
def test_the_encoder_learns_to_spell(tmp_path):
    utterances = speech.draw_utterances(["two", "six"], 48, held_out=False, seed=0)
    paths = [tmp_path / f"{n}.wav" for n in range(48)]
    speech.write_clips(utterances, paths)
    words = [utterance.text for utterance in utterances]
    report = bases.make_whisper_base(tmp_path / "whisper", paths, words, 0, num_steps=120, held_out=(paths, words))

    assert report["character_error_rate"] < 0.2
    assert report["word_accuracy"] > 0.8


@pytest.mark.slow
def test_the_language_model_learns_to_answer(tmp_path):
    texts = [record for record in text_dialogues(1000, 0) if record["messages"][1]["kind"] in ("number", "even")]
    texts = [record | {"messages": record["messages"][:2]} for record in texts]
    report = bases.make_qwen3_base(tmp_path / "qwen3", texts[:-50], 0, num_steps=25, held_out=texts[-50:])

    assert report["answer_accuracy"] > 0.9
    assert Path(tmp_path / "qwen3" / "chat_template.jinja").read_text() == bases.CHAT_TEMPLATE.read_text()
