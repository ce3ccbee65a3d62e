import json
import shutil

import pytest
import soundfile
import torch

from qwhisper.data.dialogue import AudioClip, Message
from qwhisper.data.rows import Sample
from qwhisper.data.template import end_of_turn_ids
from qwhisper.errors import MemoryLimitError, UsageError
from qwhisper.infer.generate import (
    Answer,
    answer_prompts,
    decode_answer,
    generate_tokens,
    iterate_answers,
    load_for_inference,
)
from tests.small import tone

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def prompts(small_model, tmp_path_factory) -> list[Sample]:
    """Prompts of many lengths: no clip, one, several, in one turn and in two."""
    folder = tmp_path_factory.mktemp("clips")
    clips = []
    for n, (frequency, seconds) in enumerate([(200, 0.3), (800, 1.1), (2000, 0.05)]):
        soundfile.write(folder / f"{n}.wav", tone(frequency, seconds), 16_000)
        clips.append(AudioClip(str(folder / f"{n}.wav")))
    dialogues = [
        [Message("user", ("Hello",))],
        [Message("user", (clips[0], "Pitch?"))],
        [Message("user", (clips[1],))],
        [Message("user", ("A long question about nothing at all, without any audio. " * 4,))],
        [
            Message("user", (clips[1], clips[0], "Which is higher?")),
            Message("assistant", ("the first",)),
            Message("user", (clips[2],)),
        ],
    ]
    return [small_model[1].encode_prompt(messages) for messages in dialogues]


@pytest.fixture(scope="module")
def one_by_one(small_model, prompts) -> list[str]:
    return [answer_prompts(*small_model, [prompt], NEW_TOKENS)[0] for prompt in prompts]


@pytest.mark.parametrize("batch_size", [2, 3, 5, 8])
def test_batches_answer_as_single_prompts_do(small_model, prompts, one_by_one, batch_size):
    assert answer_prompts(*small_model, prompts, NEW_TOKENS, batch_size) == one_by_one
    assert len(set(one_by_one)) == len(prompts)  # the model tells these prompts apart, so an exchange would show


def test_left_padding_leaves_the_logits_alone(small_model, prompts):
    keywords = {"return_dict_in_generate": True, "output_logits": True}
    together = generate_tokens(*small_model, prompts, 1, **keywords).logits[0]
    alone = torch.cat([generate_tokens(*small_model, [prompt], 1, **keywords).logits[0] for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_halves_the_batch(small_model, prompts, one_by_one, monkeypatch):
    model, encoder = small_model
    generate, sizes = model.generate, []

    def short_of_memory(**batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError
        return generate(**batch)

    monkeypatch.setattr(model, "generate", short_of_memory)
    assert answer_prompts(model, encoder, prompts, NEW_TOKENS, 5) == one_by_one
    assert sizes == [5, 2, 1, 1, 1, 1, 1]


def test_one_prompt_too_much_is_named(small_model, prompts, monkeypatch):
    def out_of_memory(**batch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(small_model[0], "generate", out_of_memory)
    with pytest.raises(MemoryLimitError, match=f"one prompt of {len(prompts[0].input_ids)} tokens") as caught:
        answer_prompts(*small_model, prompts[:1], NEW_TOKENS)
    assert caught.value.exit_code == 4


def test_generation_config_of_the_base_does_not_make_answers_random(small_model, prompts, one_by_one, monkeypatch):
    model, encoder = small_model
    changed = type(model.generation_config)(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0)
    monkeypatch.setattr(model, "generation_config", changed)
    assert answer_prompts(model, encoder, prompts, NEW_TOKENS) == one_by_one


def test_answer_ends_with_its_turn(small_model):
    encoder = small_model[1]
    tokenizer = encoder.tokenizer
    end = end_of_turn_ids(tokenizer, encoder.chat_template)[0]
    words = tokenizer(" seven ", add_special_tokens=False)["input_ids"]
    after = tokenizer("eight", add_special_tokens=False)["input_ids"]
    assert decode_answer(encoder, torch.tensor([*words, end, *after])) == "seven"
    assert decode_answer(encoder, torch.tensor([end])) == ""
    assert decode_answer(encoder, torch.tensor(words)) == "seven"
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert decode_answer(encoder, torch.tensor([special, *words])) == "seven"


def test_generation_stops_at_the_end_of_the_turn(small_model, prompts, monkeypatch):
    """With every other token suppressed the first token ends the turn, and the rest of the batch's width is padding."""
    model, encoder = small_model
    ends = end_of_turn_ids(encoder.tokenizer, encoder.chat_template)
    others = [i for i in range(model.config.get_text_config().vocab_size) if i not in ends]
    generated = generate_tokens(model, encoder, prompts[:2], NEW_TOKENS, suppress_tokens=others)
    assert generated.shape[1] == max(len(prompt.input_ids) for prompt in prompts[:2]) + 1


def test_answers_come_batch_by_batch_and_say_whether_they_ended(small_model, prompts, monkeypatch):
    model, encoder = small_model
    tokenizer = encoder.tokenizer
    end, pad = end_of_turn_ids(tokenizer, encoder.chat_template)[0], encoder.pad_token_id
    one, seven = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("one", "seven"))
    written = torch.tensor([[*one, end, pad], seven])

    def generate(input_ids, **keywords):
        return torch.cat([input_ids, written[: len(input_ids)].to(input_ids.device)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    short, longer, longest = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))[-3:]
    batches = list(iterate_answers(model, encoder, [prompts[i] for i in (short, longer, longest)], 5, 2))
    assert batches == [{2: Answer("one", True), 1: Answer("seven", False)}, {0: Answer("one", True)}]


def test_no_prompts_give_no_answers(small_model):
    assert answer_prompts(*small_model, [], NEW_TOKENS) == []


def test_run_folder_loads_its_newest_checkpoint_as_trained(finished_run):
    model, processor, encoder = load_for_inference(finished_run)
    again, _, _ = load_for_inference(finished_run / "checkpoint-2", device="cpu", dtype="fp32")
    older, _, _ = load_for_inference(finished_run / "checkpoint-1", dtype="bf16")
    assert not model.training
    assert encoder.chat_template == processor.chat_template
    # On a GPU "auto" rounds the bases to bf16; what was trained is in fp32 in both.
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a.cpu(), b.to(a.dtype)) for a, b in pairs)
    assert older.model.language_model.dtype == torch.bfloat16
    assert older.model.multi_modal_projector.linear_1.weight.dtype == torch.float32
    difference = older.model.multi_modal_projector.linear_1.weight - model.model.multi_modal_projector.linear_1.weight
    assert difference.abs().max() > 1e-4  # one step at 1e-2 lies between the two


def test_device_that_is_not_there_is_named_before_anything_is_loaded(finished_run, monkeypatch):
    monkeypatch.setattr("qwhisper.infer.generate.load_trained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match="no device 'foo'"):
        load_for_inference(finished_run, "foo")


def test_base_trained_on_in_4_bits_is_loaded_in_4_bits(finished_run, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = shutil.copytree(finished_run / "checkpoint-2", tmp_path / "model")
    (folder / "manifest.json").unlink()  # which would no longer fit
    told = json.loads((folder / "arguments.json").read_text())
    (folder / "arguments.json").write_text(json.dumps(told | {"load_in_4bit": True}))
    model, _, encoder = load_for_inference(folder)
    assert model.is_loaded_in_4bit
    prompt = encoder.encode_prompt([Message("user", ("Hello",))])
    generated = generate_tokens(model, encoder, [prompt], 2, return_dict_in_generate=True, output_logits=True)
    assert generated.logits[0].isfinite().all()


def test_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UsageError, match="neither a checkpoint nor a run"):
        load_for_inference(tmp_path)
