"""A clip is one row of features, whatever its length and its neighbours: what vLLM's Transformers backend needs."""

from collections import Counter

import numpy as np
import pytest
import torch

from qwhisper.data.windows import clip_windows
from qwhisper.frames import mel_frames
from qwhisper.model import processing_qwen3_audio
from qwhisper.model.mel import packed_log_mel
from tests.small import tone

SECONDS = (28, 29.99, 30, 31, 60, 125)
PLACEHOLDER = "<|audio_pad|>"
AUDIO_FIELDS = {"input_features", "input_features_mask"}


@pytest.fixture(params=["whole package", "exported"])
def processor(request, joined):
    """The processor of the package, and the one that an export ships."""
    if request.param == "whole package":
        return joined[1]
    own = joined[1]
    lengths = (own.projector_stack, own.max_encoder_frames, own.audio_lead_silence, own.audio_tail_silence)
    return processing_qwen3_audio.Qwen3AudioProcessor(own.feature_extractor, own.tokenizer, *lengths, own.chat_template)


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [tone(200 + 50 * n, seconds) for n, seconds in enumerate(SECONDS)]


def separated(number: int) -> str:
    return " ".join([PLACEHOLDER] * number)


def expected_row(processor, clip) -> tuple[torch.Tensor, torch.Tensor]:
    """A row by its definition: each window's features alone, one frame of zeros between them; and its mask."""
    mel, mask = [], []
    for window in clip_windows(clip, processor.frames):
        mel += [packed_log_mel(torch.from_numpy(window), [len(window)], 80)[0], torch.zeros(1, 80)]
        mask += [1] * mel_frames(len(window)) + [0]
    return torch.cat(mel[:-1]).T, torch.tensor(mask[:-1])


def same_row(inputs, row: int, features: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether a row is these features and this mask, with nothing behind them."""
    own, own_mask, length = inputs["input_features"][row], inputs["input_features_mask"][row], len(mask)
    same = torch.equal(own[:, :length], features) and torch.equal(own_mask[:length], mask)
    return same and not own[:, length:].any() and not own_mask[length:].any()


def test_a_row_holds_the_windows_of_a_clip_one_after_another(processor, clips):
    inputs = processor(text=separated(len(clips)), audio=clips)
    assert inputs["input_features"].shape[:2] == (len(clips), 80)
    assert inputs["input_features_mask"].dtype == torch.int64
    windows = [len(processor.frames.window_lengths(len(clip))) for clip in clips]
    assert windows == [1, 2, 2, 2, 3, 5]  # 30 s and the silence around them don't fit in one
    for row, clip in enumerate(clips):
        features, mask = expected_row(processor, clip)
        length = len(mask)
        torch.testing.assert_close(inputs["input_features"][row, :, :length], features)
        assert torch.equal(inputs["input_features_mask"][row, :length], mask)
        assert same_row(inputs, row, inputs["input_features"][row, :, :length], mask)


def test_a_row_and_its_tokens_depend_on_no_other_clip(processor, clips):
    alone = [processor(text=PLACEHOLDER, audio=[clip]) for clip in clips]
    order = (5, 0, 3, 3, 1, 4, 2)
    mixed = processor(text=separated(len(order)), audio=[clips[n] for n in order])
    for row, n in enumerate(order):
        assert same_row(mixed, row, alone[n]["input_features"][0], alone[n]["input_features_mask"][0])
        assert alone[n]["input_ids"].shape[1] == processor.frames.num_tokens(len(clips[n]))
    counts = [processor.frames.num_tokens(len(clips[n])) for n in order]
    assert mixed["input_ids"][0].tolist().count(processor.audio_token_id) == sum(counts)
    batch = processor(text=[PLACEHOLDER] * len(order), audio=[clips[n] for n in order])
    assert (batch["input_ids"] == processor.audio_token_id).sum(1).tolist() == counts


def backend_items(processor, clips) -> list[dict]:
    """What vLLM's Transformers backend takes of a call, restated: fields, token ids and number of embeddings of each
    clip.

    A field belongs to audio if the feature extractor names it, or names it without `_mask`. Clips of different lengths
    are processed again one by one, and the first row of each field is kept. A clip's replacement is encoded to ids, of
    which the most frequent one holds the embeddings.
    """
    inputs = processor(
        text=separated(len(clips)), audio=clips, return_tensors="pt", return_text_replacement_offsets=True
    )
    names = {name for own in processor.feature_extractor.model_input_names for name in (own, f"{own}_mask")}
    fields = {name: list(inputs[name]) for name in names}
    if len({len(clip) for clip in clips}) > 1:
        alone = [processor(text=PLACEHOLDER, audio=[clip], return_tensors="pt") for clip in clips]
        fields = {name: [output[name][0] for output in alone] for name in names}
    (offsets,) = inputs["text_replacement_offsets"]
    items = []
    for n, offset in enumerate(offsets):
        assert offset["type"] == "audio" and offset["text"] == processor.audio_token
        ids = processor.tokenizer.encode(offset["replacement"], add_special_tokens=False)
        ((token, count),) = Counter(ids).most_common(1)
        items.append(
            {name: fields[name][n] for name in names} | {"ids": ids, "token": token, "num_audio_tokens": count}
        )
    left = inputs.keys() - names
    assert left == {"input_ids", "attention_mask", "text_replacement_offsets"}  # nothing that belongs to no clip
    expanded = [i for n, item in enumerate(items) for i in [*processor.tokenizer.encode(" " * (n > 0)), *item["ids"]]]
    assert inputs["input_ids"][0].tolist() == expanded
    return items


@pytest.mark.parametrize("order", [(0,), (3,), (5,), (2, 2), (5, 5), (0, 1, 2, 3, 4, 5)], ids=str)
def test_the_backend_of_vllm_finds_the_tokens_and_the_row_of_each_clip(processor, clips, order):
    assert processor.feature_extractor.sampling_rate == 16_000
    items = backend_items(processor, [clips[n] for n in order])
    for item, n in zip(items, order, strict=True):
        assert item["token"] == processor.audio_token_id
        assert item["num_audio_tokens"] == len(item["ids"]) == processor.frames.num_tokens(len(clips[n]))
        alone = processor(text=PLACEHOLDER, audio=[clips[n]])
        for name in AUDIO_FIELDS:
            assert torch.equal(item[name], alone[name][0])


def test_offsets_say_where_each_clip_stands_before_and_after_it_is_expanded(processor):
    texts = [f"a{PLACEHOLDER}b{PLACEHOLDER}", "none", f"{PLACEHOLDER}c"]
    heard = [tone(300, 0.2), tone(400, 0.5), tone(500, 0.3)]
    tokens = [processor.frames.num_tokens(len(clip)) for clip in heard]
    expanded = [f"a{PLACEHOLDER * tokens[0]}b{PLACEHOLDER * tokens[1]}", "none", f"{PLACEHOLDER * tokens[2]}c"]
    for keywords in (
        {"return_text_replacement_offsets": True},
        {"text_kwargs": {"return_text_replacement_offsets": True}},  # deprecated in transformers, gone in 5.29
    ):
        offsets = processor(text=texts, audio=heard, **keywords)["text_replacement_offsets"]
        assert [len(found) for found in offsets] == [2, 0, 1]
        for text, whole, found in zip(texts, expanded, offsets, strict=True):
            for offset in found:
                assert text[slice(*offset["span"])] == PLACEHOLDER
                assert whole[slice(*offset["new_span"])] == offset["replacement"]
    assert "text_replacement_offsets" not in processor(text=texts, audio=heard)


def test_types_of_tokens_tell_audio_from_text(processor):
    inputs = processor(text=f"a{PLACEHOLDER}", audio=[tone(300, 0.2)], return_mm_token_type_ids=True)
    assert torch.equal(inputs["mm_token_type_ids"] == 3, inputs["input_ids"] == processor.audio_token_id)
    assert set(inputs["mm_token_type_ids"].unique().tolist()) == {0, 3}


def test_the_model_gives_each_placeholder_one_feature_whatever_stands_beside_a_clip(joined, clips):
    model, processor = joined
    model.float()

    def features(row_features, row_mask) -> torch.Tensor:
        given = {"input_features": row_features.to(model.device), "input_features_mask": row_mask.to(model.device)}
        with torch.no_grad():
            return model.get_audio_features(**given, return_dict=True).pooler_output.flatten(0, -2)

    alone = [processor(text=PLACEHOLDER, audio=[clip]) for clip in clips]
    expected = [features(inputs["input_features"], inputs["input_features_mask"]) for inputs in alone]
    assert [len(found) for found in expected] == [inputs["input_ids"].shape[1] for inputs in alone]
    mixed = processor(text=[PLACEHOLDER] * len(clips), audio=clips)
    together = features(mixed["input_features"], mixed["input_features_mask"])
    torch.testing.assert_close(together, torch.cat(expected), atol=1e-5, rtol=1e-5)
    waveforms = [torch.from_numpy(window) for clip in clips for window in clip_windows(clip, processor.frames)]
    with torch.no_grad():
        batch = mixed.to(model.device)
        text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        lengths = torch.tensor([len(window) for window in waveforms])
        as_trained = model(**text, audio_waveforms=torch.cat(waveforms).to(model.device), audio_lengths=lengths)
        as_served = model(**batch)
    torch.testing.assert_close(as_served.logits, as_trained.logits, atol=1e-4, rtol=1e-4)
