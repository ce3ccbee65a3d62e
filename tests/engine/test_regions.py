"""A pack in two recorded passes gives the loss and the gradients of a plain one, and few passes serve many packs."""

import math

import pytest
import torch

from qwhisper.engine import compiled, executor
from qwhisper.engine.capture import copy_into
from qwhisper.engine.executor import Executor
from qwhisper.guards.gradient_buffers import GradientBuffers
from qwhisper.guards.gradients import drop_gradients
from qwhisper.model.lora import add_lora
from qwhisper.train.optimizer import parameter_groups
from tests.engine.test_feature_cache import cache_of
from tests.engine.test_feature_cache import samples_of as uncached_samples
from tests.imitated_graphs import ImitatedGraphs
from tests.model.parts import make_sample, with_teacher
from tests.small import large_weights, small_model


@pytest.fixture
def ready(monkeypatch):
    """A function that returns an executor in fp32 on a CPU with imitated graphs, and its gradient buffers."""

    def make(*, execution: str = "captured", teacher: bool = False, trained_encoder: bool = False, tokens: int = 4096):
        torch.manual_seed(0)
        model = small_model()
        add_lora(model)
        large_weights(model.model.language_model)
        if trained_encoder:
            model.model.audio_tower.requires_grad_(True)
        model.train()
        run = Executor(model, max_tokens_per_pack=tokens, pad_token_id=0, distill_weight=0.6 if teacher else 0.0)
        buffers = run.gradient_buffers = GradientBuffers(parameter_groups(model))
        monkeypatch.setattr(executor, "compile_layers", lambda model: None)
        monkeypatch.setattr(executor, "compiled_function", lambda function: function)
        monkeypatch.setattr(executor, "Graphs", lambda device, most, first: ImitatedGraphs(buffers, most, first))
        run.execute(execution)
        return run, buffers

    return make


def samples_of(run: Executor, seed: int, *, teacher: bool = False):
    model = run.model
    found = [
        make_sample(model, [4] * (1 + len(clips)) + [3 + seed % 3], clips, seed=seed + number)
        for number, clips in enumerate([[800, 5000], [7000 + 100 * seed], []])
    ]
    return [with_teacher(found[0], seed + 5), *found[1:]] if teacher else found


def step(run: Executor, buffers: GradientBuffers, samples) -> tuple[torch.Tensor, ...]:
    found = run.forward_backward(samples, sum(sample.num_supervised for sample in samples))
    assert found.why_plain is None
    values = (found.loss, *([] if found.divergence is None else [found.divergence]))
    gradients = [
        torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        for parameters in buffers.groups.values()
    ]
    return *values, *gradients


def assert_close(found, expected) -> None:
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6 * float(1 + other.abs().max()), rtol=1e-5)
        assert other.any()


@pytest.mark.parametrize("execution", ["compiled", "captured"])
@pytest.mark.parametrize("stored_as", ["fp16", "int8"])
def test_cached_features_take_the_place_of_the_pass_of_the_encoder(ready, tmp_path, stored_as, execution):
    run, buffers = ready(execution=execution)
    cache = cache_of(run.model, tmp_path, stored_as)
    cache.executor = run
    run.model.model.audio_tower.forward, encode = None, run.model.model.audio_tower.forward
    for clips in ([[800, 5000], [7000], []], [[7000], [800]], [[16_001], [800, 5000], [7000]]):
        samples = uncached_samples(run.model, clips)
        run.prepare(samples)
        run.model.model.audio_tower.forward = encode
        cache.complete(samples)
        run.model.model.audio_tower.forward = None
        found = step(run, buffers, samples)
        with run.plainly():
            expected = step(run, buffers, samples)
        assert_close(found, expected)
        run.prepare(samples)
        assert_close(step(run, buffers, samples), expected)
    assert execution == "compiled" or run._regions.graphs.replays > 0


@pytest.mark.parametrize("execution", ["compiled", "captured"])
@pytest.mark.parametrize(
    "options", [{}, {"teacher": True}, {"trained_encoder": True}], ids=["alone", "teacher", "trained encoder"]
)
def test_recorded_passes_give_the_loss_and_gradients_of_plain_ones(ready, options, execution):
    run, buffers = ready(execution=execution, **options)
    for seed in range(4):
        samples = samples_of(run, seed, teacher="teacher" in options)
        found = step(run, buffers, samples)
        with run.plainly():
            expected = step(run, buffers, samples)
        assert_close(found, expected)
    assert (run._regions.graphs.replays > 0) == (execution == "captured")
    assert len(run._regions.graphs.passes) <= (2 if execution == "captured" else 0)


def test_several_packs_of_a_step_add_their_gradients(ready):
    run, buffers = ready(tokens=64)
    samples = [sample for seed in range(3) for sample in samples_of(run, seed)]
    assert len(run.packs(samples)) > 2
    for _ in range(3):
        found = step(run, buffers, samples)
    with run.plainly():
        assert_close(found, step(run, buffers, samples))
    assert run._regions.graphs.replays > 4


def test_a_pack_of_text_gives_the_projector_no_gradient_and_the_next_one_with_audio_does(ready):
    """The optimizer steps no parameter that no gradient reached."""
    run, buffers = ready()
    text, heard = samples_of(run, 0)[2:], samples_of(run, 1)
    projector = list(run.model.model.multi_modal_projector.parameters())
    for _ in range(3):
        step(run, buffers, text)
        assert all(p.grad is None for p in projector)
        step(run, buffers, heard)
        assert all(p.grad is not None and p.grad.any() for p in projector)
        drop_gradients(buffers.groups)


def test_count_and_loss_scale_of_a_replay_are_those_of_its_step(ready):
    run, buffers = ready()
    samples = samples_of(run, 0)
    first = [step(run, buffers, samples) for _ in range(3)][-1]
    run.loss_scale = 64.0
    scaled = step(run, buffers, samples)
    assert_close(scaled, first)
    half = run.forward_backward(samples, 2 * sum(sample.num_supervised for sample in samples))
    torch.testing.assert_close(half.loss, first[0] / 2)


def test_a_pass_that_is_not_finite_leaves_nothing_for_the_next(ready):
    run, buffers = ready()
    samples = samples_of(run, 0)
    expected = [step(run, buffers, samples) for _ in range(3)][-1]
    samples[1].windows[0][:] = math.nan
    assert not torch.isfinite(step(run, buffers, samples)[0])
    again = samples_of(run, 0)
    assert all(torch.equal(mine, other) for mine, other in zip(step(run, buffers, again), expected, strict=True))


def test_what_can_not_be_compiled_runs_plain_from_then_on(ready, monkeypatch):
    run, buffers = ready()
    samples = samples_of(run, 0)
    with run.plainly():
        expected = step(run, buffers, samples)

    def fails(*_):
        raise RuntimeError("no such kernel\nmore lines")

    monkeypatch.setattr(run._regions, "_learn", fails)
    found = run.forward_backward(samples, sum(sample.num_supervised for sample in samples))
    assert found.why_plain == "no such kernel" and run.execution == "plain"
    torch.testing.assert_close(found.loss, expected[0])
    assert_close(step(run, buffers, samples), expected)


def test_out_of_memory_halves_the_packs_and_drops_all_graphs(ready, monkeypatch):
    run, buffers = ready()
    samples = [sample for seed in range(3) for sample in samples_of(run, seed)]
    for _ in range(2):
        expected = step(run, buffers, samples)
    honest, failed = run._regions._learn, []

    def little_memory(inputs, key):
        if key.tokens > 100 and not failed.append(len(run._regions.graphs.passes)):
            raise torch.OutOfMemoryError("out of memory")
        return honest(inputs, key)

    monkeypatch.setattr(run._regions, "_learn", little_memory)
    found = run.forward_backward(samples, sum(sample.num_supervised for sample in samples))
    assert found.halvings and run.max_tokens_per_pack <= 100
    assert failed[0] > 1 and failed[1] == 1  # at first the graphs' memory was freed; the encoder had run again
    torch.testing.assert_close(found.loss, expected[0])


def test_memory_that_graphs_hold_is_freed_before_a_plain_pack_is_halved(ready, monkeypatch):
    run, buffers = ready()
    samples, honest = samples_of(run, 0), run.run_pack
    for _ in range(2):
        expected = step(run, buffers, samples)

    def beside_graphs(batch):
        if run._regions.graphs.passes:
            raise torch.OutOfMemoryError("out of memory")
        return honest(batch)

    monkeypatch.setattr(run, "run_pack", beside_graphs)
    with run.plainly():
        found = run.forward_backward(samples, sum(sample.num_supervised for sample in samples))
    assert found.halvings == [] and run.max_tokens_per_pack == 4096
    torch.testing.assert_close(found.loss, expected[0])
    assert_close(step(run, buffers, samples), expected)


def test_halvings_before_a_failed_compilation_are_reported(ready, monkeypatch):
    run, _ = ready()
    samples = [sample for seed in range(3) for sample in samples_of(run, seed)]

    def fails(inputs, key):
        raise torch.OutOfMemoryError("out of memory") if key.tokens > 100 else RuntimeError("no such kernel")

    monkeypatch.setattr(run._regions, "_learn", fails)
    found = run.forward_backward(samples, sum(sample.num_supervised for sample in samples))
    assert found.why_plain == "no such kernel" and found.halvings


def test_a_change_of_the_model_is_noticed_once(ready):
    run, _ = ready()
    changes = [
        lambda: run.model.model.language_model.layers[0].register_forward_hook(lambda *_: None),
        lambda: setattr(run.model, "keep_last_logits", True),
        lambda: setattr(run.model.model.multi_modal_projector.dropout, "p", 0.3),
        lambda: next(run.model.model.multi_modal_projector.parameters()).requires_grad_(False),
        lambda: run.model.model.language_model.layers[1].eval(),
    ]
    assert not run.has_changed()
    for change in changes:
        change()
        assert run.has_changed() and not run.has_changed()


def test_graphs_are_dropped_before_packs_are_halved_if_clips_do_not_fit_beside_them(ready, tmp_path, monkeypatch):
    run, buffers = ready()
    for _ in range(2):
        step(run, buffers, samples_of(run, 0))
    cache = cache_of(run.model, tmp_path)
    cache.executor = run
    honest, graphs, sizes = run.model.model.encode_audio, run._regions.graphs, []

    def encode(waveforms, lengths):
        sizes.append(len(lengths))
        if graphs.passes:
            raise torch.OutOfMemoryError("out of memory")
        return honest(waveforms, lengths)

    monkeypatch.setattr(run.model.model, "encode_audio", encode)
    assert cache.complete(uncached_samples(run.model, [[800, 5000], [7000]])) == []
    assert sizes == [3, 3] and run.max_tokens_per_pack == 4096


def test_more_shapes_than_graphs_run_without_one(ready):
    run, buffers = ready()
    run._regions.graphs.most = 1
    samples = samples_of(run, 0)
    for _ in range(3):
        found = step(run, buffers, samples)
    assert len(run._regions.graphs.passes) == 1  # others keep no inputs
    assert sum(known.replay is not None for known in run._regions.graphs.passes.values()) == 1
    with run.plainly():
        assert_close(found, step(run, buffers, samples))


def test_inputs_of_other_numbers_on_the_host_are_refused(ready):
    run, _ = ready()
    batches = [run._rounded_batch(samples_of(run, seed)) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"cu_seq_lens_host is .* in the inputs of this pass"):
        copy_into(batches[0].text, batches[1].text)


def test_hooks_are_called_while_the_layers_are_not_compiled():
    model = small_model()
    ids, calls = torch.arange(4)[None], []
    compiled_layers = [layer for layer in compiled._layers(model) if "Qwen3" in type(layer).__name__]
    for layer in compiled_layers:
        layer.compile(backend="eager")
    with torch.no_grad(), compiled.compiling():
        expected = model(input_ids=ids).logits
        compiled_layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
        with compiled.uncompiled(model):
            found = model(input_ids=ids).logits
        assert len(calls) == 1 and all(layer._compiled_call_impl is not None for layer in compiled_layers)
    torch.testing.assert_close(found, expected)
    compiled.plain_layers(model)
    assert all(layer._compiled_call_impl is None for layer in compiled_layers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("teacher", [False, True], ids=["alone", "teacher"])
@pytest.mark.parametrize("execution", ["compiled", "captured"])
def test_on_a_gpu_compiled_and_captured_packs_give_the_loss_and_gradients_of_plain_ones(execution, teacher):
    """In bf16. Compiled layers round less often than plain ones do."""
    torch.manual_seed(0)
    model = small_model()
    for part in (model.model.audio_tower, model.model.language_model, model.lm_head):
        part.to(torch.bfloat16)
    add_lora(model)
    large_weights(model.model.language_model)
    model.to("cuda").train()
    run = Executor(model, max_tokens_per_pack=4096, pad_token_id=0, distill_weight=0.6 if teacher else 0.0)
    buffers = run.gradient_buffers = GradientBuffers(parameter_groups(model))
    run.execute(execution)
    for seed in range(5):
        samples = samples_of(run, seed, teacher=teacher)
        found = step(run, buffers, samples)
        with run.plainly():
            expected = step(run, buffers, samples)
        for mine, other in zip(found, expected, strict=True):
            assert (mine - other).norm() <= 0.03 * other.norm() and other.any()
    recorded = sum(known.replay is not None for known in run._regions.graphs.passes.values())
    assert (recorded > 0) == (execution == "captured")
