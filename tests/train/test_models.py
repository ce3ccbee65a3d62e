import warnings

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.loader import encode_all
from qwhisper.model import qwen3_audio
from qwhisper.model.bases import LoadOptions
from qwhisper.train import models
from qwhisper.train.models import build_model, checkpoint_activations, recompute_first_layers
from qwhisper.train.plan import resolve
from qwhisper.train.run import main
from qwhisper.train.session import encoder_for
from tests.train.helpers import same_bits


def test_a_second_stage_has_the_silence_that_it_is_given_or_else_the_first_ones(arguments, tmp_path):
    first = arguments(max_steps=1, audio_lead_silence=0.04, audio_tail_silence=0.1)
    main(first)
    values = {"init_from": first.output_dir, "output_dir": str(tmp_path / "second")}
    args = arguments(**values, audio_lead_silence=0.2, audio_tail_silence=None)
    model, processor = build_model(args, resolve(args, num_dialogues=1), None)
    for silence in (model.config.frames, processor.frames):
        assert (silence.lead_silence_s, silence.tail_silence_s) == (0.2, 0.1)


@pytest.mark.parametrize(("given", "made_for", "longest"), [(None, 60, 60), (50, 60, 50), (None, 10_000, 10_000)])
def test_without_a_max_length_a_dialogue_is_as_long_as_the_language_model_was_made_for(
    arguments, given, made_for, longest
):
    args = arguments(max_length=given)
    model, processor = build_model(args, resolve(args, num_dialogues=1), None)
    model.config.get_text_config().max_position_embeddings = made_for
    dialogues = read_dialogues(args.train_file)
    samples, rejections = encode_all(dialogues, encoder_for(args, processor, model))
    lengths = [len(sample.input_ids) for sample in samples]
    assert max(lengths, default=0) <= longest
    whole, _ = encode_all(dialogues, encoder_for(arguments(max_length=10_000), processor, model))
    cut = [sample for sample in whole if len(sample.input_ids) > longest]
    assert len(samples) + len(rejections) == len(whole)
    assert len(cut) == len(rejections) + sum(bool(sample.events) for sample in samples)
    assert bool(cut) == (longest < 10_000)


def test_the_copy_that_a_run_of_a_test_begins_with_is_what_the_run_would_build(bases):
    built = []
    for build in (qwen3_audio.build_from_bases, models.build_from_bases, models.build_from_bases):
        torch.manual_seed(3)
        model, _ = build(*map(str, bases), LoadOptions(), audio_lead_silence=0.0)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        built.append(weights | {"drawn next": torch.rand(3)})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert model.lm_head.weight is model.get_input_embeddings().weight
    assert same_bits(built[0], built[1]) == same_bits(built[0], built[2]) == []


def test_gradient_checkpointing_is_switched_on_without_a_warning(arguments):
    args = arguments(gradient_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model, _ = build_model(args, resolve(args, num_dialogues=1), None)
    assert all(layer.gradient_checkpointing for layer in model.model.language_model.layers)


def test_4_bit_linears_of_layers_that_are_not_computed_again_keep_no_weights(arguments):
    args = arguments()
    model, _ = build_model(args, resolve(args, num_dialogues=1), None)
    projections = [layer.self_attn.q_proj for layer in model.model.language_model.layers]
    for projection in projections:
        projection.recomputed = False
    recompute_first_layers(model, 1, args)
    assert [projection.recomputed for projection in projections] == [True, False]


def test_recompute_is_marked_in_the_4_bit_linears_of_the_layers_that_do_it():
    class Model(nn.Module):
        def gradient_checkpointing_enable(self, kwargs):
            self.layers[1].gradient_checkpointing = True

    model = Model()
    model.layers = nn.ModuleList([GradientCheckpointingLayer(), GradientCheckpointingLayer()])
    for layer in model.layers:
        layer.linear = nn.Linear(1, 1)
        layer.linear.recomputed = False
    checkpoint_activations(model, use_reentrant=False)
    assert [layer.linear.recomputed for layer in model.layers] == [False, True]
