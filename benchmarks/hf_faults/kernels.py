"""Attention kernels that are wrong, in the place of transformers' SDPA call, for padded batches and for packed rows."""

import math
from collections.abc import Callable

import torch
from transformers import AttentionInterface, Trainer

from hf_faults.observe import Bench, Verdict, judge
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.loader import encode_all
from qwhisper.data.packing import pack_samples
from qwhisper.frames import FrameArithmetic
from qwhisper.model import attention
from tests import wrong_kernels
from tests.test_faults.test_activations import WrongBackward


def wrong_backward(bench: Bench) -> Verdict:
    def attend(module, query, *args, **kwargs):
        hit = module.is_causal and module.layer_idx == 1
        return attention.packed_attention_forward(module, WrongBackward.apply(query) if hit else query, *args, **kwargs)

    seen = bench.train(lambda trainer: AttentionInterface.register(attention.PACKED_ATTENTION, attend))
    return judge(bench.clean(), seen)


def nan_kernel(bench: Bench) -> Verdict:
    """Batches of 64 tokens. The real kernel needs a low log-sum-exp as well; here the length is enough."""

    def plant(trainer: Trainer) -> None:
        wrong_kernels.NAN_UNDER = math.inf
        ladder = attention.PADDED_KERNELS
        ladder["sdpa"] = wrong_kernels.padded_with_nan_gradient(ladder["sdpa"])

    return judge(bench.clean(multiple_of=64), bench.train(plant, multiple_of=64))


def large_gradient(bench: Bench) -> Verdict:
    def plant(trainer: Trainer) -> None:
        honest = attention.PADDED_KERNELS["sdpa"]
        spoiled = wrong_kernels.packed_with_large_gradient(
            lambda query, module, *args, **kw: honest(module, query, *args, **kw)
        )
        attention.PADDED_KERNELS["sdpa"] = lambda module, query, *args, **kw: spoiled(query, module, *args, **kw)

    seen = bench.train(plant)
    norms = [max(run.logged("grad_norm"), default=math.nan) for run in (seen, bench.clean())]
    return judge(
        bench.clean(), seen, f"it went by wrong gradients (grad_norm up to {norms[0]:.3f} instead of {norms[1]:.3f})"
    )


def leaking_kernel(bench: Bench) -> Verdict:
    """In rows without padding, as Trainer has them from a collator that packs."""

    def plant(trainer: Trainer) -> None:
        kernels = attention.PACKED_KERNELS
        kernels["sdpa_per_segment"] = wrong_kernels.packed_that_leaks(kernels["sdpa_per_segment"])

    collator = packing_collator(bench)
    right, seen = (bench.train(which, collator=collator) for which in (None, plant))
    return judge(right, seen, "samples of a packed row were trained with a look at their neighbours")


def packing_collator(bench: Bench) -> Callable:
    script = bench.script
    encoder = DialogueEncoder(
        script.tokenizer,
        FrameArithmetic(),
        audio_token_id=script.model.model.config.audio_token_id,
        chat_template=script.tokenizer.chat_template,
    )
    samples, _ = encode_all(read_dialogues(str(bench.train_file)), encoder)

    def pack(picked: list[dict]) -> dict:
        batch = pack_samples([samples[sample["dialogue"]] for sample in picked])
        batch.pop("valid_label_count", None)
        return batch | {"dialogue": torch.tensor([sample["dialogue"] for sample in picked])}

    return pack


CASES = {
    "an attention kernel whose backward pass gives NaN in the query's gradient": wrong_backward,
    "attention kernel whose backward pass gives NaN at 64 or 192 tokens and a low log-sum-exp": nan_kernel,
    "attention kernel whose gradients are 8 times too large": large_gradient,
    "attention kernel that lets a sample see the one before it in a packed row": leaking_kernel,
}
