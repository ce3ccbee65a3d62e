import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from qwhisper.data.packing import pad_samples
from qwhisper.data.windows import clip_windows
from qwhisper.model import attention
from qwhisper.model.attention import PACKED_ATTENTION
from qwhisper.model.audio_layout import encoder_layout
from qwhisper.model.lora import add_lora
from qwhisper.model.mel import packed_log_mel
from qwhisper.train.models import checkpoint_activations
from tests.model.parts import CLIPS, audio_batch, gradients, make_sample, noise
from tests.sdpa_switches import switches_of_calls
from tests.small import VOCABULARY, large_weights, small_model, text_config, whisper_config


def prompt(model, text_lengths, clip_samples=(), seed=0) -> dict:
    return pad_samples([make_sample(model, text_lengths, clip_samples, seed=seed)], pad_token_id=0, padding_side="left")


def as_input_features(model, lengths) -> dict:
    """What a processor makes of the same windows: one padded row each."""
    pieces = [packed_log_mel(torch.from_numpy(noise(n, i)), [n], 80)[0] for i, n in enumerate(lengths)]
    features = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True).transpose(1, 2)
    mask = torch.stack([torch.arange(features.shape[-1]) < len(piece) for piece in pieces])
    return {"input_features": features, "input_features_mask": mask.long()}


def test_waveforms_features_and_cached_encoder_output_give_the_same_loss():
    model = small_model()
    batch = audio_batch(model)
    waveforms, lengths = batch.pop("audio_waveforms"), batch.pop("audio_lengths")
    expected = model(**batch, audio_waveforms=waveforms, audio_lengths=lengths).loss
    torch.testing.assert_close(model(**batch, **as_input_features(model, CLIPS)).loss, expected)
    frames, frame_lengths = model.model.encode_audio(waveforms, lengths.tolist())
    cached = model(**batch, audio_features=frames, audio_lengths=torch.tensor(frame_lengths)).loss
    assert torch.equal(cached, expected)
    silent = model(**batch, audio_waveforms=torch.zeros_like(waveforms), audio_lengths=lengths).loss
    assert abs(silent - expected) > 1e-3


def test_only_one_audio_input_is_taken():
    model = small_model()
    with pytest.raises(ValueError, match=r"pass one of .*, not audio_waveforms and input_features"):
        model(**audio_batch(model), **as_input_features(model, CLIPS))


def test_tokens_of_a_clip_are_frames_num_tokens_for_clips_of_any_length():
    model = small_model()
    frames = model.config.frames
    for num_samples in (1, 800, 16_000, 31 * 16_000):
        windows = clip_windows(noise(num_samples), frames)
        tokens = model.get_audio_features(
            audio_waveforms=torch.from_numpy(np.concatenate(windows)),
            audio_lengths=torch.tensor([len(w) for w in windows]),
        ).pooler_output
        assert tokens.shape == (frames.num_tokens(num_samples), 32)


@torch.no_grad()
def test_the_second_window_of_a_long_clip_is_heard():
    model = small_model()
    waveform = noise(31 * 16_000)
    windows = clip_windows(waveform, model.config.frames)
    assert len(windows) == 2
    whole = model.get_audio_features(
        audio_waveforms=torch.from_numpy(waveform), audio_lengths=torch.tensor([len(w) for w in windows])
    )
    second = model.get_audio_features(
        audio_waveforms=torch.from_numpy(windows[1]), audio_lengths=torch.tensor([len(windows[1])])
    )
    rest = second.pooler_output.shape[0]
    torch.testing.assert_close(whole.pooler_output[-rest:], second.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("drop", "message"), [("audio", "audio gives 0 tokens"), ("placeholders", "0 audio placeholders in input_ids")]
)
def test_placeholders_and_audio_must_agree(drop, message):
    model = small_model()
    batch = audio_batch(model)
    if drop == "audio":
        del batch["audio_waveforms"], batch["audio_lengths"]
    else:
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.audio_token_id, 5)
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_a_frozen_encoder_stays_in_eval_mode_and_off_the_graph():
    model = small_model().train()
    # As the library's own enable_input_require_grads does, which others may call on the encoder.
    model.model.audio_tower.conv1.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    assert model.model.language_model.training
    assert not model.model.audio_tower.training
    model(**audio_batch(model)).loss.backward()
    assert {name for name in gradients(model) if "multi_modal_projector" not in name} == set()
    assert not model.get_audio_features(
        audio_waveforms=torch.zeros(800), audio_lengths=torch.tensor([800])
    ).last_hidden_state.requires_grad


def test_an_encoder_that_is_trained_is_in_train_mode_and_gets_gradients():
    model = small_model()
    model.model.audio_tower.requires_grad_(True)
    model.train()
    assert model.model.audio_tower.training
    model(**audio_batch(model)).loss.backward()
    assert model.model.audio_tower.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("part", ["layers.1.fc1", "layers.1", "layer_norm", "conv2", ""])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_part_of_the_encoder_gets_the_gradients_that_it_has_in_the_whole(part, checkpointing):
    model = small_model()
    encoder = model.model.audio_tower
    batch = audio_batch(model)
    encoder.requires_grad_(True)
    model.train()(**batch).loss.backward()
    wanted = {n: p.grad.clone() for n, p in encoder.get_submodule(part).named_parameters()}
    model.zero_grad(set_to_none=True)
    encoder.requires_grad_(False).get_submodule(part).requires_grad_(True)
    assert model.model.encoder_is_trained
    assert model.train().model.audio_tower.training
    if checkpointing:
        checkpoint_activations(model, use_reentrant=False)
    model(**batch).loss.backward()
    found = {n: p.grad for n, p in encoder.get_submodule(part).named_parameters()}
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().sum() > 0
    assert sum(p.grad is not None for p in encoder.parameters()) == len(wanted)


def test_the_gradients_of_a_full_window_are_those_of_transformers_own_encoder():
    model = small_model()
    mel = torch.randn(3000, 80)
    plain = WhisperEncoder(whisper_config())
    plain.load_state_dict(model.model.audio_tower.state_dict())
    for encoder in (model.model.audio_tower, plain):
        encoder.requires_grad_(False)
        encoder.layers[-1].requires_grad_(True)
    model.train().model.audio_tower(mel, encoder_layout([3000])).last_hidden_state.square().sum().backward()
    plain.train()(mel.T[None]).last_hidden_state.square().sum().backward()
    wanted = dict(plain.layers[-1].named_parameters())
    for name, parameter in model.model.audio_tower.layers[-1].named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-3, msg=name)


def test_lora_on_the_encoder_alone_gets_gradients():
    model = small_model()
    peft = get_peft_model(model, LoraConfig(target_modules=r".*audio_tower.*q_proj", init_lora_weights=False))
    peft.train()(**audio_batch(model)).loss.backward()
    found = gradients(model)
    assert len(found) == 4 and all("lora_" in name and grad.abs().sum() > 0 for name, grad in found.items())
    assert model.model.audio_tower.training


def test_cached_features_are_refused_where_the_encoder_should_learn_from_them():
    model = small_model().train()
    batch = audio_batch(model)
    frames, lengths = model.model.encode_audio(batch.pop("audio_waveforms"), batch.pop("audio_lengths").tolist())
    cached = {"audio_features": frames, "audio_lengths": torch.tensor(lengths)}
    assert model(**batch, **cached).loss > 0
    model.model.audio_tower.layers[-1].requires_grad_(True)
    with pytest.raises(ValueError, match="learns nothing from cached audio_features"):
        model(**batch, **cached)
    assert model.eval()(**batch, **cached).loss > 0


@pytest.mark.parametrize("part", ["model.language_model.embed_tokens", "model.language_model.norm", "lm_head"])
def test_any_part_of_the_language_model_that_is_unfrozen_gets_gradients(part):
    model = small_model()
    model.get_submodule(part).requires_grad_(True)
    model.train()(**audio_batch(model)).loss.backward()
    assert model.get_submodule(part).weight.grad.abs().sum() > 0


def test_checkpointing_gives_the_same_gradients_and_leaves_the_frozen_encoder_alone(monkeypatch):
    model = small_model()
    add_lora(model)
    large_weights(model.model.language_model)
    model.train()
    batch = audio_batch(model)
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    checkpoint_activations(model, use_reentrant=False)
    model.enable_input_require_grads()
    checkpointed = []
    for name, module in model.named_modules():
        if function := getattr(module, "_gradient_checkpointing_func", None):
            module._gradient_checkpointing_func = lambda *args, n=name, f=function: checkpointed.append(n) or f(*args)
    model(**batch).loss.backward()
    assert checkpointed == ["model.language_model.layers.0", "model.language_model.layers.1"]
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    assert gradients(model).keys() == expected.keys()


def test_input_gradients_are_asked_of_the_text_embeddings_alone():
    model = small_model()

    def hooks() -> dict[str, int]:
        return {name: len(module._forward_hooks) for name, module in model.named_modules()}

    before = hooks()
    model.enable_input_require_grads()
    assert hooks() == before | {"model.language_model.embed_tokens": 1}
    model.disable_input_require_grads()
    assert hooks() == before


def test_logits_to_keep_and_labels_decide_what_is_returned():
    model = small_model()
    batch = prompt(model, [6, 4], [3000])
    every = model(**batch).logits
    assert every.shape == (*batch["input_ids"].shape, VOCABULARY)
    assert every.dtype == torch.float32
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, every[:, -2:])
    torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([1, 3])).logits, every[:, [1, 3]])
    assert model(**batch, labels=batch["input_ids"]).logits is None


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "gpt2"])
def test_any_causal_lm_joins_learns_and_answers(family):
    model = small_model(family)
    add_lora(model)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    batch = audio_batch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    output = model.eval().generate(
        **prompt(model, [4, 3], [2000]), max_new_tokens=5, eos_token_id=None, do_sample=False
    )
    assert output.shape[1] == prompt(model, [4, 3], [2000])["input_ids"].shape[1] + 5


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"repetition_penalty": 1.3}])
def test_text_alone_is_answered_as_by_the_bare_language_model(family, settings):
    model = small_model(family)
    bare = AutoModelForCausalLM.from_config(text_config(family)).eval()
    bare.base_model.load_state_dict(model.model.language_model.state_dict())
    bare.lm_head.load_state_dict(model.lm_head.state_dict())
    inputs = prompt(model, [9])
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "suppress_tokens": [VOCABULARY - 1],
        **settings,
    }
    assert torch.equal(model.generate(**inputs, **settings), bare.generate(**inputs, **settings))


@torch.no_grad()
def test_generation_with_cache_equals_one_forward_pass_a_token():
    model = small_model()
    inputs = prompt(model, [5, 4], [5000])
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = inputs["input_ids"]
    audio = {k: inputs[k] for k in ("audio_waveforms", "audio_lengths")}
    for _ in range(6):
        logits = model(input_ids=ids, **audio).logits[:, -1]
        logits[:, model.config.audio_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(output, ids)


def test_the_placeholder_is_never_generated_whatever_else_is_suppressed():
    model = small_model()
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(32, VOCABULARY)
        model.lm_head.bias[[model.config.audio_token_id, 7, 8, 9]] = torch.tensor([300.0, 200.0, 100.0, 50.0])
    inputs = prompt(model, [5])
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert model.generate(**inputs, **settings)[0, -3:].tolist() == [7, 7, 7]
    assert model.generate(**inputs, **settings, suppress_tokens=[7])[0, -3:].tolist() == [8, 8, 8]
    model.generation_config.suppress_tokens = [7, 8]
    assert model.generate(**inputs, **settings)[0, -3:].tolist() == [9, 9, 9]


def test_a_placeholder_outside_the_vocabulary_works_in_training_and_generation():
    outside = VOCABULARY + 3
    torch.manual_seed(0)
    model = small_model(audio_token_id=outside)
    torch.manual_seed(0)
    spare = small_model(audio_token_id=VOCABULARY - 1)
    assert torch.equal(model(**audio_batch(model)).loss, spare(**audio_batch(spare)).loss)
    for settings in (
        {},
        {"repetition_penalty": 1.5},
        {"num_beams": 2, "num_return_sequences": 2},
        {"no_repeat_ngram_size": 2},
    ):
        inputs = prompt(model, [5, 4], [5000])
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, **settings)
        assert torch.equal(output[:, :-6], inputs["input_ids"].expand(len(output), -1))
        assert output[:, -6:].max() < VOCABULARY
    result = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    assert (result.sequences == outside).sum() == model.config.frames.num_tokens(5000)


def test_attention_of_both_parts_is_the_packed_one_by_default():
    model = small_model().model
    for part in (model.language_model, model.audio_tower):
        assert part.layers[0].self_attn.config._attn_implementation == PACKED_ATTENTION


WAYS = {
    "model": lambda model, name: model.set_attn_implementation(name),
    "without head": lambda model, name: model.model.set_attn_implementation(name),
    "by part": lambda model, name: model.set_attn_implementation({"audio_config": name, "text_config": name}),
    "parts themselves": lambda model, name: [
        part.set_attn_implementation(name) for part in (model.model.audio_tower, model.model.language_model)
    ],
    "configuration": lambda model, name: setattr(model.config, "_attn_implementation", name),
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["sdpa", "eager", "qwhisper_packed_math"])
def test_windows_stay_apart_and_cudnn_out_whichever_attention_is_set(way, name):
    model = small_model()
    large_weights(model.model.audio_tower)
    batch = pad_samples([make_sample(model, [3, 2, 4], CLIPS[:2]), make_sample(model, [5], seed=1)], 0, "left")
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    windows = [torch.from_numpy(noise(n, seed)) for seed, n in enumerate(CLIPS)]

    def results() -> list[torch.Tensor]:
        features, _ = model.model.encode_audio(torch.cat(windows), CLIPS)
        logits = model(**batch).logits[batch["attention_mask"].bool()]
        return [features, logits, model.generate(**batch, **settings)]

    expected = results()
    alone = [model.model.encode_audio(window, [len(window)])[0] for window in windows]
    torch.testing.assert_close(expected[0], torch.cat(alone), atol=1e-5, rtol=1e-5)
    WAYS[way](model, name)
    with switches_of_calls() as seen:
        found = results()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert bool(seen) == (name != "eager") and not any(one["cudnn"] for one in seen)
    for part, layer in (
        (model.model.audio_tower, model.model.audio_tower.layers[0]),
        (model.model.language_model, model.model.language_model.layers[0]),
    ):
        assert part.config._attn_implementation == name
        assert layer.self_attn.config._attn_implementation == (PACKED_ATTENTION if name == "sdpa" else name)


def test_two_models_of_a_process_use_different_kernels(monkeypatch):
    called = []

    def spy(name: str, kernel):
        return lambda *args, **keywords: called.append(name) or kernel(*args, **keywords)

    for name, kernel in list(attention.PACKED_KERNELS.items()):
        monkeypatch.setitem(attention.PACKED_KERNELS, name, spy(name, kernel))
    one = small_model()
    other = copy.deepcopy(one)
    other.set_attn_implementation("qwhisper_packed_math")
    losses = []
    for model, kernel in ((one, "sdpa_per_segment"), (other, "math_per_segment"), (one, "sdpa_per_segment")):
        called.clear()
        losses.append(model(**audio_batch(model)).loss)
        assert set(called) == {kernel} and len(called) == 4  # two layers of the encoder, two of the language model
    torch.testing.assert_close(losses[1], losses[0])


def test_a_packed_row_fills_no_cache():
    model = small_model()
    row = audio_batch(model)
    del row["labels"], row["valid_label_count"]
    assert set(model.model(**row)) == {"last_hidden_state"}
    assert len(model.model(**prompt(model, [5]))) == 2
