"""A model of the wrong kind is refused by what it is, before a weight of it is loaded, at every entry point."""

import shutil
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    CLIPConfig,
    Gemma3Config,
    LlavaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen2AudioConfig,
    Qwen3Config,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from qwhisper.commands.data import DataAnswerArguments, DataCheckArguments, answer, check
from qwhisper.errors import UsageError
from qwhisper.model.base_kinds import refuse_model, refuse_unpackable
from qwhisper.model.bases import resolve_model
from qwhisper.model.qwen3_audio import build_from_bases
from tests.small import text_config, write_dialogues

NOT_TEXT = [
    (WhisperConfig(architectures=["WhisperForConditionalGeneration"]), "a whisper model, an encoder-decoder"),
    (
        WhisperConfig(architectures=["WhisperForCausalLM"], is_encoder_decoder=False),
        "a whisper model, an encoder-decoder",
    ),
    (T5Config(), "a t5 model, an encoder-decoder"),
    (BartConfig(), "a bart model, an encoder-decoder"),
    (BertConfig(architectures=["BertForMaskedLM"]), "a bert model, which reads in both directions"),
    (ViTConfig(), "a vit model, which is no causal"),
    (CLIPConfig(), "a clip model, which is no causal"),
    (LlavaConfig(), "a llava model, which is no causal"),
    (Gemma3Config(), "a gemma3 model, whose text part transformers does not load alone"),
    (Wav2Vec2Config(), "a wav2vec2 model, which is no causal"),
    (Qwen2AudioConfig(), "a qwen2_audio model, an encoder-decoder"),
    (Qwen3Config(architectures=["Qwen3ForSequenceClassification"]), "a qwen3 model, with a head for SequenceClass"),
    (Qwen3Config(architectures=["Qwen3Model"]), "a qwen3 model, saved without its language-model head"),
]
OTHER_FILES = [
    (["model-q4.gguf"], "a GGUF model of llama.cpp"),
    (["adapter_config.json", "adapter_model.safetensors"], "an adapter without its model"),
    (["model_index.json"], "a diffusers pipeline"),
    (["config.json", "model.bin", "vocabulary.json"], "a CTranslate2 model, such as faster-whisper's"),
    (["ggml-base.bin"], "a GGML model of whisper.cpp"),
    (["tiny.pt"], "a PyTorch file, such as openai-whisper's"),
    (["checkpoint-3/projector.safetensors"], "a qwhisper run"),
    (["config.json", "weights.npz"], "an MLX model"),
]


def folder_of(path: Path, *files: str) -> str:
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text("{}")
    return str(path)


def ids(case) -> str:
    return case.model_type if isinstance(case, PreTrainedConfig) else str(case)[:20]


@pytest.mark.parametrize(("config", "what"), NOT_TEXT, ids=ids)
def test_what_is_no_causal_lm_is_no_text_model(tmp_path, config, what):
    config.save_pretrained(tmp_path)
    for entry in (lambda: resolve_model(str(tmp_path), "huggingface", "--text_model"),
                  lambda: refuse_model(str(tmp_path), "--text_model")):  # fmt: skip
        with pytest.raises(UsageError, match=rf"--text_model .* is {what}.*; it takes a causal language model in"):
            entry()


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "gpt2"])
def test_any_causal_lm_is_a_text_model(tmp_path, family):
    config = text_config(family)
    for architectures in (None, [AutoModelForCausalLM._model_mapping[type(config)].__name__]):
        config.architectures = architectures
        config.save_pretrained(tmp_path)
        assert resolve_model(str(tmp_path), "huggingface", "--text_model") == str(tmp_path)


QUANTISED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4 of bitsandbytes"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "int8 of bitsandbytes"),
    ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ({"quant_method": "fp8"}, "fp8"),
]


@pytest.mark.parametrize(("quantisation", "what"), QUANTISED, ids=ids)
def test_of_quantised_models_only_nf4_is_a_base(tmp_path, quantisation, what):
    Qwen3Config(quantization_config=quantisation).save_pretrained(tmp_path / "text")
    WhisperConfig(quantization_config=quantisation).save_pretrained(tmp_path / "audio")
    with pytest.raises(UsageError, match=rf"--text_model .* is quantised \({what}\), and LoRA is .* or in nf4 of bits"):
        resolve_model(str(tmp_path / "text"), "huggingface", "--text_model")
    with pytest.raises(UsageError, match=rf"--audio_model .* is quantised \({what}\); give the model in full"):
        resolve_model(str(tmp_path / "audio"), "huggingface", "--audio_model")
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    Qwen3Config(quantization_config=nf4).save_pretrained(tmp_path / "text")
    assert resolve_model(str(tmp_path / "text"), "huggingface", "--text_model") == str(tmp_path / "text")


@pytest.mark.parametrize(("config", "what"), [(Qwen3Config(), "a qwen3 model"), (Wav2Vec2Config(), "a wav2vec2 model")])
def test_what_is_no_whisper_is_no_audio_model(tmp_path, config, what):
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=rf"--audio_model .* is {what}; it takes any Whisper checkpoint"):
        resolve_model(str(tmp_path), "huggingface", "--audio_model")


@pytest.mark.parametrize(("files", "what"), OTHER_FILES, ids=ids)
@pytest.mark.parametrize("flag", ["--text_model", "--audio_model"])
def test_a_folder_in_another_format_is_named(tmp_path, files, what, flag):
    with pytest.raises(UsageError, match=rf"{flag} .* is {what}"):
        resolve_model(folder_of(tmp_path / "model", *files), "huggingface", flag)


@pytest.mark.parametrize(
    ("file", "what"), [("a.gguf", "a GGUF model of llama.cpp"), ("tiny.pt", "a PyTorch file"), ("notes", "a file")]
)
def test_a_file_is_no_folder(tmp_path, file, what):
    (tmp_path / file).write_text("x")
    with pytest.raises(UsageError, match=rf"{file} is {what}.*, not a folder; it takes"):
        resolve_model(str(tmp_path / file), "huggingface", "--text_model")


def test_other_formats_beside_a_whole_model_do_no_harm(bases, tmp_path):
    shutil.copytree(bases[1], tmp_path / "text")
    folder_of(tmp_path / "text", "model.gguf", "onnx/model.onnx", "optimizer.pt", "original/consolidated.pth")
    assert resolve_model(str(tmp_path / "text"), "huggingface", "--text_model")
    (tmp_path / "text" / "modules.json").write_text("[]")
    with pytest.raises(UsageError, match=r"a sentence-transformer \(qwen3\), which makes embeddings"):
        resolve_model(str(tmp_path / "text"), "huggingface", "--text_model")


def test_qwhispers_own_folders_are_no_base(joined, tmp_path):
    model, _ = joined
    model.save_pretrained(tmp_path / "trained")
    model.config.text_base = None
    model.save_pretrained(tmp_path / "whole")
    for flag in ("--text_model", "--audio_model"):
        for name, what in (("trained", "a folder of qwhisper's trained weights"), ("whole", "a qwhisper model")):
            with pytest.raises(UsageError, match=rf"{flag} .* is {what}"):
                resolve_model(str(tmp_path / name), "huggingface", flag)


def test_a_model_with_a_state_from_token_to_token_is_refused(tmp_path):
    shape = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = AutoModelForCausalLM.from_config(MambaConfig(**shape), attn_implementation="qwhisper_packed")
    with pytest.raises(UsageError, match=r"a mamba model does not keep the samples of one row apart"):
        refuse_unpackable("it", model)


def test_a_base_that_lacks_a_small_part_is_named(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # nothing heavy is loaded before
    for base, part, flag in (
        (bases[0], "preprocessor_config.json", "--audio_model"),
        (bases[1], "tokenizer", "--text_"),
    ):
        copy = tmp_path / Path(base).name
        shutil.copytree(base, copy)
        for file in copy.glob(f"{part}*"):
            file.unlink()
        pair = (str(copy), bases[1]) if base == bases[0] else (bases[0], str(copy))
        with pytest.raises(UsageError, match=rf"{flag}.*: no .*{part}.* can be read there"):
            build_from_bases(*pair)
    dialogues = str(write_dialogues(tmp_path / "data", 2))
    with pytest.raises(UsageError, match="no tokenizer can be read there"):
        check(DataCheckArguments(file=dialogues, text_model=str(tmp_path / "qwen3")))


def test_data_commands_refuse_the_same(bases, tmp_path):
    path = write_dialogues(tmp_path / "data", 2)
    with pytest.raises(UsageError, match=r"--text_model .* is a whisper model"):
        check(DataCheckArguments(file=str(path), text_model=bases[0]))
    with pytest.raises(UsageError, match=r"--audio_model .* is a qwen3 model"):
        check(DataCheckArguments(file=str(path), text_model=bases[1], audio_model=bases[1]))
    out = str(tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match=r"--text_model .* is a whisper model"):
        answer(DataAnswerArguments(in_file=str(path), out_file=out, text_model=bases[0]))
