"""Recognise a model of the wrong kind for --audio_model or --text_model by its files and configuration, before any
weight is loaded.
"""

import json
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from qwhisper.checkpoint.names import ADAPTER_CONFIG, PREFIX, PROJECTOR_FILE
from qwhisper.errors import UsageError
from qwhisper.memory import is_out_of_memory
from qwhisper.model.attention import IMPLEMENTATIONS, packed_row_mask
from qwhisper.model.audio_embedding import device_of
from qwhisper.model.pretrained import UntrustedCodeError, load_config

TAKES = {
    "--audio_model": "any Whisper checkpoint in Hugging Face format, such as openai/whisper-large-v3-turbo",
    "--text_model": "a causal language model in Hugging Face format, such as Qwen/Qwen3-0.6B",
}
NF4 = "nf4 of bitsandbytes"
# What a folder or file is, by a pattern of file names; the first match counts.
OTHER_FORMATS = (
    ("model_index.json", "a diffusers pipeline"),
    (ADAPTER_CONFIG, "an adapter without its model (merge it into its model first)"),
    (PROJECTOR_FILE, "a folder of qwhisper's trained weights (--init_from takes it)"),
    (f"{PREFIX}*/{PROJECTOR_FILE}", "a qwhisper run (--init_from takes it)"),
    ("modules.json", "a sentence-transformer"),
    ("*.gguf", "a GGUF model of llama.cpp"),
    ("ggml*.bin", "a GGML model of whisper.cpp"),
    ("vocabulary.*", "a CTranslate2 model, such as faster-whisper's"),
    ("*.nemo", "a NeMo model"),
    ("weights.npz", "an MLX model"),
    ("*.onnx", "an ONNX model"),
    ("onnx/*.onnx", "an ONNX model"),
    ("*.pt", "a PyTorch file, such as openai-whisper's"),
    ("*.pth", "a PyTorch file, such as openai-whisper's"),
)
ENCODER_DECODERS = {*MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES}
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "RewardModel")


def refuse_other_format(name: str, flag: str) -> None:
    """Raises UsageError for a local file, or for a folder of another format than Hugging Face's."""
    path = Path(name)
    if path.is_file():
        what = next((what for pattern, what in OTHER_FORMATS if path.match(pattern)), "a file")
        raise _wrong_kind(flag, name, f"{what}, not a folder")
    weights = [file for pattern in ("model*.safetensors", "pytorch_model*.bin") for file in path.glob(pattern)]
    if not path.is_dir() or (_has_model_type(path) and weights):
        # Other formats beside a whole Hugging Face model do no harm.
        return
    if found := next((what for pattern, what in OTHER_FORMATS if any(path.glob(pattern))), None):
        raise _wrong_kind(flag, name, found)


def _has_model_type(folder: Path) -> bool:
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def refuse_model(name: str, flag: str) -> None:
    """Both checks, for a command that needs only a part of the model; a folder without config.json is allowed."""
    refuse_other_format(name, flag)
    try:
        config = load_config(name, flag)
    except UntrustedCodeError:
        raise
    except UsageError:
        return
    refuse_other_kind(config, name, flag)


def refuse_other_kind(config: PreTrainedConfig, name: str, flag: str) -> None:
    """Raises UsageError unless the configuration is a Whisper's (--audio_model), a causal LM's (--text_model)."""
    if config.model_type == "qwen3_audio":
        raise _wrong_kind(flag, name, "a qwhisper model (--init_from takes its trained weights)")
    quantisation = quantisation_of(config)
    if flag == "--audio_model":
        if config.model_type != "whisper":
            raise _wrong_kind(flag, name, f"a {config.model_type} model")
        if quantisation is not None:
            raise UsageError(f"{flag} {name} is quantised ({quantisation}); give the model in full precision")
        return
    if (Path(name) / "modules.json").is_file():
        raise _wrong_kind(flag, name, f"a sentence-transformer ({config.model_type}), which makes embeddings")
    if other := _other_than_causal_lm(config):
        raise _wrong_kind(flag, name, f"a {config.model_type} model, {other}")
    if quantisation not in (None, NF4):
        raise UsageError(
            f"{flag} {name} is quantised ({quantisation}), and LoRA is trained on a model in full precision or in "
            f"{NF4}: give one of these (for 4 bits the full model with --load_in_4bit, or a folder such as *-bnb-4bit)"
        )


def quantisation_of(config: PreTrainedConfig) -> str | None:
    """How a folder's weights are saved: None in full precision, `NF4`, or a word for any other quantisation."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    values = dict(given) if isinstance(given, dict) else given.to_dict()
    eight, four = values.get("load_in_8bit"), values.get("load_in_4bit")
    if values.get("quant_method", "bitsandbytes") != "bitsandbytes" or not (eight or four):
        return str(values.get("quant_method", "unknown"))
    return f"{'int8' if eight else values.get('bnb_4bit_quant_type', 'fp4')} of bitsandbytes"


def is_prequantised(config: PreTrainedConfig) -> bool:
    """Whether a folder's weights are saved in 4 bits, which `refuse_other_kind` allows for --text_model."""
    return quantisation_of(config) == NF4


def _other_than_causal_lm(config: PreTrainedConfig) -> str | None:
    """What a model is instead; None for a causal LM, or for a multimodal model whose text part is one."""
    model_type, architectures = config.model_type, getattr(config, "architectures", None) or []
    if getattr(config, "is_encoder_decoder", False) or model_type in ENCODER_DECODERS:
        return "an encoder-decoder"
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if causal is None:
        return "which is no causal language model of transformers"
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return "which reads in both directions"
    if causal.endswith("ForConditionalGeneration"):
        return "whose text part transformers does not load alone"
    if head := next((head for head in HEADS for name in architectures if name.endswith(head)), None):
        return f"with a head for {head}"
    if architectures and all(name.endswith("Model") for name in architectures) and not config.tie_word_embeddings:
        return "saved without its language-model head"
    return None


def _wrong_kind(flag: str, name: str, what: str) -> UsageError:
    return UsageError(f"{flag} {name} is {what}; it takes {TAKES[flag]}")


def refuse_empty_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse an empty tokenizer: transformers makes one if the files are missing; it turns any text into nothing."""
    if not tokenizer("a", add_special_tokens=False).input_ids:
        raise UsageError(
            f"--text_model {name}: no tokenizer can be read there; copy its files (tokenizer.json, "
            "tokenizer_config.json) from the model that this one was made from"
        )


@torch.no_grad()
def refuse_unpackable(name: str, language_model: PreTrainedModel) -> None:
    """Refuse a model with a recurrent state: it would mix the samples of a packed row."""
    if language_model.config._attn_implementation not in IMPLEMENTATIONS:
        return
    embeddings = language_model.get_input_embeddings()
    hidden_states = embeddings(torch.arange(8, device=device_of(embeddings))[None])
    borders = torch.tensor([0, 5, 8], dtype=torch.int32, device=hidden_states.device)
    packed = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 5, "max_length_k": 5}
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=hidden_states.device)
    body = language_model.base_model
    try:
        row = body(
            inputs_embeds=hidden_states,
            attention_mask=packed_row_mask(hidden_states),
            position_ids=positions,
            use_cache=False,
            **packed,
        ).last_hidden_state[:, 5:]
        alone = body(inputs_embeds=hidden_states[:, 5:], use_cache=False).last_hidden_state
        mixed = (row - alone).abs().max() > 0.05 * alone.abs().max()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        mixed = True
    if mixed:
        raise UsageError(
            f"--text_model {name}: a {language_model.config.model_type} model does not keep the samples of one row "
            "apart, which training needs; use one with attention in every layer"
        )
