"""Numbers that go wrong: losses, gradients, weights, moments and activations, planted into the running Trainer."""

import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from hf_faults.observe import HARMLESS, POISONED, SILENT, Bench, Plant, Seen, Verdict, judge, no_such_part
from hf_faults.plain import STEPS
from qwhisper.data.rows import IGNORE
from qwhisper.model.half_precision import OverflowClamp
from tests.small import write_dialogues
from tests.test_faults.inject import Effect, gradient_element, gradients_times
from tests.test_faults.lives import At
from tests.test_faults.test_activations import OUTLIER, plant_outlier
from tests.train.listeners import with_exchanged_clips

BAD = 3  # the dialogue d3
PEAK_STEPS, PEAK_AT = 70, 30
ALWAYS = range(10**9)
LM = "model.model.language_model"


def after_backward(effect: Effect, *, dialogues: set[int] | None = None, steps: range = ALWAYS) -> Plant:
    """`effect(trainer, loss)` after the forward and backward pass of each micro-batch with one of `dialogues` in it."""

    def plant(trainer: Trainer) -> None:
        honest = trainer.training_step

        def training_step(model, inputs, *args):
            hit = hits(trainer, inputs, dialogues, steps)
            loss = honest(model, inputs, *args)
            if hit:
                effect(trainer, loss)
            return loss

        trainer.training_step = training_step

    return plant


def hits(trainer: Trainer, inputs: dict, dialogues: set[int] | None, steps: range) -> bool:
    aimed = dialogues is None or not dialogues.isdisjoint(inputs["dialogue"].tolist())
    return aimed and trainer.state.global_step in steps


def loss_changed(change: Callable, *, dialogues: set[int] | None = None, steps: range = ALWAYS) -> Plant:
    """`change(loss)` between the forward and the backward pass, where a loss that is not finite comes from."""

    def plant(trainer: Trainer) -> None:
        honest = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            hit = hits(trainer, inputs, dialogues, steps)
            loss = honest(model, inputs, *args, **kwargs)
            return change(loss) if hit else loss

        trainer.compute_loss = compute_loss

    return plant


def at_step(step: int, act: Callable[[Trainer], object]) -> Plant:
    """`act(trainer)` at the end of that step."""
    return lambda trainer: trainer.add_callback(At(step, lambda: act(trainer)))


def before(act: Callable[[Trainer], object]) -> Plant:
    return act


def weight_of(trainer: Trainer, name: str) -> torch.Tensor:
    return next(p for full, p in trainer.model.named_parameters() if p.requires_grad and name in full).detach()


def nan_weight(trainer: Trainer, name: str = "v_proj.lora_B") -> None:
    weight_of(trainer, name).view(-1)[0] = math.nan


def spoil_moment(trainer: Trainer, value: float) -> None:
    next(iter(trainer.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = value


nan_moment = partial(spoil_moment, value=math.nan)


def nan_activation(trainer: Trainer) -> None:
    module = trainer.model.get_submodule(f"{LM}.layers.0.mlp.up_proj")
    module.register_forward_hook(lambda module, args, out: out * math.nan if trainer.state.global_step == 2 else out)


def nan_input(trainer: Trainer) -> None:
    """A channel of NaN, as the test of the clamp plants it."""
    channel = torch.arange(32) == OUTLIER
    module = trainer.model.get_submodule(f"{LM}.layers.0.self_attn.q_proj")
    module.register_forward_pre_hook(lambda module, args: (args[0].masked_fill(channel, math.nan),))


def projector_cut_off(trainer: Trainer) -> None:
    projector = trainer.model.model.model.multi_modal_projector
    honest = projector.forward
    projector.forward = lambda *args: honest(*args).detach()


def optimizer_of_copies(trainer: Trainer) -> None:
    """The optimizer moves copies of the projector's weights."""
    own = {id(p) for name, p in trainer.model.named_parameters() if "multi_modal_projector" in name}
    for group in trainer.create_optimizer().param_groups:
        group["params"] = [torch.nn.Parameter(p.detach().clone()) if id(p) in own else p for p in group["params"]]


def flipped_frozen_bit(trainer: Trainer) -> None:
    weight = next(p for name, p in trainer.model.named_parameters() if "layers.1.mlp.down_proj" in name)
    weight.detach().view(torch.int32)[3, 5] ^= 1


def labels_masked(trainer: Trainer) -> None:
    collator = trainer.data_collator

    def masked(samples: list[dict]) -> dict:
        return collator([sample | {"labels": torch.full_like(sample["labels"], IGNORE)} for sample in samples])

    trainer.data_collator = masked


# What a finished run has come to.


def unmoved(bench: Bench, seen: Seen) -> list[str]:
    """Of LoRA and projector those that are as they were before the first step."""
    start = dict(bench.script.model.named_parameters())
    groups = {"LoRA": "lora_", "the projector": "multi_modal_projector"}
    still = {
        group: all(torch.equal(weight, start[name]) for name, weight in seen.weights.items() if part in name)
        for group, part in groups.items()
    }
    return [group for group, stands in still.items() if stands]


def not_moved(bench: Bench, plant: Plant) -> Verdict:
    seen = bench.train(plant)
    still = " and ".join(unmoved(bench, seen)) if seen.finished else ""
    losses = seen.logged("loss")
    log = f", logs loss {losses[-1]:g}" if losses and losses[-1] == 0.0 else ""
    return judge(bench.clean(), seen, f"{still or 'nothing'} did not move in {seen.steps} steps{log}")


def planted(plant: Plant, bench: Bench, silent: str = "other weights than without the fault", **values) -> Verdict:
    return judge(bench.clean(**values), bench.train(plant, **values), silent)


def lost_step(plant: Plant, bench: Bench) -> Verdict:
    """For a fault that may make the gradient vanish: counts the optimizer's steps on gradients of 0."""
    told = bench.fresh() / "vanished"
    told.write_text("0")

    class Vanished(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            vanished = all(not p.grad.any() for p in model.parameters() if p.grad is not None)
            told.write_text(str(int(told.read_text()) + vanished))

    seen = bench.train(plant, callbacks=[Vanished()])
    return judge(bench.clean(), seen, f"in {told.read_text()} of {seen.steps} steps the clip makes every gradient 0")


def outlier(bench: Bench) -> Verdict:
    seen = bench.train(before(lambda trainer: plant_outlier(trainer.model.model, 1e4)))
    calm = statistics.median(bench.clean().logged("grad_norm"))
    norms = seen.logged("grad_norm")
    times = max(norms) / calm if norms else math.nan
    return judge(bench.clean(), seen, f"grad_norm rises to {times:.0f} times its size")


def exchanged_clips(bench: Bench) -> Verdict:
    path = write_dialogues(bench.fresh(), 40)
    seen = bench.train(train_file=Path(with_exchanged_clips(str(path))))
    losses = [run.logged("loss")[-1] for run in (seen, bench.clean(train_file=path))]
    return judge(
        bench.clean(train_file=path), seen, f"its last loss is {losses[0]:.2f}, with the right clips {losses[1]:.2f}"
    )


# Peaks, rates, precision.


class Moved(TrainerCallback):
    """Writes how far each step moved the weights."""

    def __init__(self, told: Path):
        self.told = told
        self.moved: list[float] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = (p.detach() for p in model.parameters() if p.requires_grad)
        squares = sum(float((a - b).norm()) ** 2 for a, b in zip(now, self.before, strict=True))
        self.moved.append(math.sqrt(squares))
        self.told.write_text(json.dumps(self.moved))


def peak(bench: Bench) -> Verdict:
    """As the test: constant rate, one step whose gradients are a million times too large; but with the usual clip."""
    told = bench.fresh() / "moved.json"

    def plant(trainer: Trainer) -> None:
        after_backward(gradients_times(1e6), steps=range(PEAK_AT, PEAK_AT + 1))(trainer)
        trainer.add_callback(Moved(told))

    flags = {"max_steps": PEAK_STEPS, "lr_scheduler_type": "constant", "save_strategy": "no", "learning_rate": 1e-4}
    seen = bench.train(plant, limit=60, **flags)
    if not seen.finished:
        return judge(bench.clean(), seen)
    moved = json.loads(told.read_text())
    usual = sorted(moved[PEAK_AT - 10 : PEAK_AT])[5]
    after = [value / usual for value in moved[PEAK_AT:]]
    text = f"the steps from there on move the weights {min(after):.2f} to {max(after):.2f} times as far as those before"
    kind = HARMLESS if max(after) <= 3 and min(after) >= 1 / 3 else SILENT
    return Verdict(kind, f"finishes; {text}", seen.facts | {"moved": [round(value, 2) for value in after]})


def fp16_overflow(bench: Bench) -> Verdict:
    """With torch's loss scaler, which accelerate leaves out on the CPU: the path that fp16=True takes on a GPU."""
    overflow, told = gradient_element(math.inf), bench.fresh() / "scale"

    def plant(trainer: Trainer) -> None:
        accelerator = trainer.accelerator
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True

        def above_the_bound(trainer, loss) -> None:
            told.write_text(str(accelerator.scaler.get_scale()))
            if accelerator.scaler.get_scale() > 2**8:
                overflow(trainer, loss)

        after_backward(above_the_bound)(trainer)

    seen = bench.train(plant, fp16=True, max_steps=12)
    lost = sum(not math.isfinite(norm) for norm in seen.logged("grad_norm"))
    text = f"with torch's loss scaler: {lost} steps with all of their samples are lost until the loss scale fits"
    return judge(bench.clean(max_steps=12), seen, text)


def fp16_bad_sample(bench: Bench) -> Verdict:
    """With torch's loss scaler, as above."""
    told = bench.fresh() / "scale"

    def plant(trainer: Trainer) -> None:
        accelerator = trainer.accelerator
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True

        def bad(trainer, loss) -> None:
            told.write_text(str(accelerator.scaler.get_scale()))
            NAN(trainer, loss)

        after_backward(bad, dialogues={BAD})(trainer)

    seen = bench.train(plant, fp16=True, max_steps=12)
    lost = sum(not math.isfinite(norm) for norm in seen.logged("grad_norm"))
    text = f"with torch's loss scaler: each step that has it is lost ({lost} of 12), and halves the scale"
    return judge(bench.clean(max_steps=12), seen, text)


def encoder_overflow(bench: Bench) -> Verdict:
    def plant(trainer: Trainer) -> None:
        OverflowClamp.clamp_output = lambda self, *args: None  # in this child alone: the model is ours
        encoder = trainer.model.model.model.audio_tower.half()
        with torch.no_grad():
            encoder.layers[0].fc1.weight.mul_(1e7).clamp_(-6e4, 6e4)

    return judge(bench.clean(), bench.train(plant), "it is trained on features that overflowed")


def healthy_checkpoints(bench: Bench, plant: Plant, **flags) -> Verdict:
    """With one checkpoint kept, as many do: is the one that is left sound?"""
    seen = bench.train(plant, save_steps=1, save_total_limit=1, **flags)
    verdict = judge(bench.clean(), seen)
    left = [name for name, finite in seen.checkpoints.items() if finite]
    fate = f"{', '.join(left)} is sound" if left else "no sound checkpoint is left, the last one was deleted"
    return Verdict(verdict.kind, f"{verdict.outcome}; {fate}", seen.facts)


def resumed_after_nan(bench: Bench) -> Verdict:
    folder = bench.fresh()
    first = bench.train(after_backward(gradient_element(math.nan), steps=range(2, 3)), folder=folder, max_steps=4)
    seen = bench.train(folder=folder, resume=True)
    verdict = judge(bench.clean(), seen)
    if verdict.kind == POISONED:
        return Verdict(
            POISONED,
            f"the NaN weights that step {first.nan_from} left are resumed without a word: {verdict.outcome}",
            seen.facts,
        )
    return verdict


def nan_is_best(bench: Bench) -> Verdict:
    """The first of three held-out losses is NaN; the best model is to be loaded at the end."""

    def plant(trainer: Trainer) -> None:
        honest = trainer.prediction_step

        def prediction_step(*args, **kwargs):
            loss, *rest = honest(*args, **kwargs)
            return (loss * math.nan if trainer.state.global_step == 2 else loss, *rest)

        trainer.prediction_step = prediction_step

    flags = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    seen = bench.train(plant, eval_file=bench.train_file, greater_is_better=False, **flags)
    if not seen.finished:
        return judge(bench.clean(), seen)
    told = [f"{log['eval_loss']:.3f}" for log in seen.logs if "eval_loss" in log]
    best = Path(seen.best).name if seen.best else "none"
    kind = HARMLESS if best not in ("none", "checkpoint-2") else SILENT
    return Verdict(
        kind, f"finishes; logs eval_loss {', '.join(told)} and takes {best} for the best", seen.facts | {"best": best}
    )


NAN, INF = gradient_element(math.nan), gradient_element(-math.inf)
EVERY_TIME = {"dialogues": {BAD}}

CASES = {
    "a NaN weight": partial(planted, at_step(2, nan_weight)),
    "a NaN activation in a middle layer": partial(planted, before(nan_activation)),
    "an outlier channel in the first layer's activations": outlier,
    "a NaN among activations that are clamped": partial(planted, before(nan_input)),
    "the loss is detached from the graph": partial(planted, loss_changed(torch.Tensor.detach)),
    "all labels are masked": partial(not_moved, plant=before(labels_masked)),
    "the loss is exactly 0": partial(not_moved, plant=loss_changed(lambda loss: loss * 0)),
    "the projector is cut off from the loss": partial(not_moved, plant=before(projector_cut_off)),
    "the optimizer holds copies of a group's weights": partial(not_moved, plant=before(optimizer_of_copies)),
    "one bit of a frozen weight changes": partial(
        planted, at_step(3, flipped_frozen_bit), silent="the changed weight is still there at the end"
    ),
    "the clips belong to other dialogues": exchanged_clips,
    "NaN loss of one sample": partial(planted, loss_changed(lambda loss: loss * math.nan, **EVERY_TIME)),
    "infinite loss of one sample": partial(planted, loss_changed(lambda loss: loss * math.inf, **EVERY_TIME)),
    "NaN in one gradient element of one sample": partial(planted, after_backward(NAN, **EVERY_TIME)),
    "infinity in one gradient element of one sample": partial(planted, after_backward(INF, **EVERY_TIME)),
    "gradients of 1e30 from one sample": partial(lost_step, after_backward(gradients_times(1e30), **EVERY_TIME)),
    "a bad sample in a step of four": partial(
        planted, loss_changed(lambda loss: loss * math.nan, dialogues={BAD}, steps=range(2))
    ),
    "a gradient that is NaN once, and not when run again": partial(planted, after_backward(NAN, steps=range(1, 2))),
    "every sample of a step bad": partial(planted, after_backward(NAN, steps=range(2, 3))),
    "a gradient peak of 1e6": peak,
    "a non-finite norm among those that an adaptive bound is made of": lambda bench: no_such_part(
        "its clip has a fixed bound and keeps no average"
    ),
    "NaN in a weight": partial(planted, at_step(1, partial(nan_weight, name="multi_modal_projector"))),
    "NaN in Adam's second moment": partial(planted, at_step(2, nan_moment)),
    "NaN in Adam's second moment before the last step": partial(planted, at_step(STEPS - 1, nan_moment)),
    "infinity in Adam's second moment, which stops a weight and breaks none": partial(
        planted, at_step(2, partial(spoil_moment, value=math.inf)), silent="the weight no longer moves"
    ),
    "a snapshot that would be poisoned": lambda bench: no_such_part("it takes no snapshots to go back to"),
    "saves in the middle of a bad streak": lambda bench: no_such_part("it takes no snapshots to go back to"),
    "a bad sample in an fp16 run": fp16_bad_sample,
    "a few bad steps in a row": partial(planted, after_backward(NAN, steps=range(2, 4))),
    "bad steps that do not end by themselves": partial(planted, after_backward(NAN, steps=range(2, 10**6))),
    "a run that is bad again after every rewind": partial(
        healthy_checkpoints, plant=after_backward(NAN, steps=range(2, 10**6))
    ),
    "weights that are not finite at a save": partial(healthy_checkpoints, plant=at_step(3, nan_weight)),
    "a learning rate so high that the weights blow up": partial(
        planted, before(lambda trainer: None), learning_rate=1e18, max_grad_norm=0.0, max_steps=12
    ),
    "fp16 gradients that overflow": fp16_overflow,
    "values that overflow in an fp16 encoder": encoder_overflow,
    "a resume after bad steps": resumed_after_nan,
    "a held-out loss that is NaN, at the first evaluation": nan_is_best,
}  # fmt: skip
