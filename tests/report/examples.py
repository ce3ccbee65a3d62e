"""One event of every kind, with the line that it prints at step 7."""

from qwhisper.report import kinds
from qwhisper.report.kinds import Event

BEGIN = kinds.Begin(
    run_id="a", qwhisper="0.1", python="3.12", torch="2.13", transformers="5.24", device="cpu", total_steps=9,
    samples_per_step=4, dialogues=12, held_out_samples=0, audio_model="whisper", text_model=None,
    max_tokens_per_pack=4096, recompute_layers=0, why_plain="the model is on cpu",
)  # fmt: skip
END = kinds.End(
    exit_code=0, reason="done", total_steps=9, skipped_steps=1, supervised_tokens=70, rewinds=0, quarantined=2
)
SKIPPED = kinds.Skipped(
    reason="gradient of lora not finite", statistics={"loss": 2.5, "lora": "nan"}, samples=["a", "b"]
)
DIAGNOSIS = {"where": "q_proj", "when": "forward", "message": "first", "inputs": [{"name": "x", "nan": 1}]}


def dropped(count: int) -> list[dict[str, str]]:
    return [{"id": f"s{number}", "source": f"data.jsonl:{number}", "not_finite": "loss"} for number in range(count)]


EXAMPLES: list[tuple[Event, str | None]] = [
    (BEGIN, None),
    (kinds.Resumed(checkpoint="run/checkpoint-7", **BEGIN.written()), None),
    (END, None),
    (kinds.OutputLost(lines=3), None),
    (
        kinds.DroppedSamples(samples=dropped(4), kept=2, not_finite=["loss"], diagnosis=DIAGNOSIS, cause="forward: …"),
        "step 7: dropped 4 of 6 samples (s0, s1, s2 …): forward: …",
    ),
    (
        kinds.DroppedSamples(samples=dropped(1), kept=3, not_finite=["loss"], diagnosis=None, cause="unknown"),
        "step 7: dropped 1 of 4 samples (s0): unknown",
    ),
    (
        kinds.NotRepeated(samples=["a"], not_finite=["loss", "gradient of lora"], diagnosis=None),
        "step 7: loss and gradient of lora not finite at first, finite sample by sample; taken",
    ),
    (kinds.NoDiagnosis(error="out of memory"), None),
    (
        SKIPPED,
        "step 8: skipped, gradient of lora not finite (events.jsonl names the samples); weights are unchanged",
    ),
    (
        kinds.Rewind(to_step=5, why="5 bad steps", bad_steps=5, lr_factor=0.5, samples=["a"], diagnosis=None),
        "step 7: 5 bad steps; back to the weights of step 5, learning rate × 0.5 from here on",
    ),
    (
        kinds.Rewind(to_step=None, why="5 bad steps", bad_steps=5, lr_factor=0.25, samples=[], diagnosis=DIAGNOSIS),
        "step 7: 5 bad steps; there is no snapshot to go back to, learning rate × 0.25 from here on",
    ),
    (kinds.NoSnapshot(error="out of memory"), None),
    (kinds.GradientSpike(times_average={"lora": 31.5}, samples=["a"]), None),
    (kinds.LearningRateChanged(dynamic_factor=0.7), None),
    (
        kinds.ActivationClampTurned(turned="on", module="q_proj", bound=8.0, values=0),
        "step 7: activation clamp on (±8 before q_proj)",
    ),
    (
        kinds.ActivationClampTurned(turned="off", module="q_proj", bound=8.0, values=12),
        "step 7: activation clamp off after 12 values (±8 before q_proj)",
    ),
    (kinds.ActivationsClamped(values={"q_proj": 12}), None),
    (kinds.EncoderOverflow(values={"layers.0": 2}), None),
    (kinds.OutOfMemory(tokens=900, max_tokens_per_pack=450), None),
    (
        kinds.NotEvaluated(error="one sample does not fit"),
        "step 7: held-out loss not measured, training continues: one sample does not fit",
    ),
    (
        kinds.SaveFailed(error="disk full", last_whole="checkpoint-5", where="the last whole checkpoint is run/…-5"),
        "step 7: not saved (disk full); the last whole checkpoint is run/…-5. Free disk space: the next save tries "
        "again",
    ),
    (
        kinds.WeightsNotFinite(checkpoint="checkpoint-7"),
        "checkpoint-7: a trained weight is not finite; no older checkpoint will be deleted",
    ),
    (
        kinds.WorkerDied(how="signal 9", samples=["a"]),
        "step 7: a process that reads data died or hung (signal 9); another continues from there",
    ),
    (
        kinds.KernelReplaced(
            kernel="varlen", case="packed row", what="the result is 3 roundings off", replaced_by="sdpa"
        ),
        "kernel varlen: the result is 3 roundings off; packed row. Replaced by sdpa",
    ),
    (
        kinds.FeaturesNotCached(error="disk full"),
        "step 7: no more features are kept in --feature_cache (disk full); the run goes on",
    ),
    (
        kinds.CachedFeaturesDamaged(clips=["a.wav"]),
        "step 7: clips encoded again because --feature_cache is damaged: 1",
    ),
    (kinds.Executes(execution="plain", why=None), None),
    (kinds.Executes(execution="plain", why="no compiler"), "packs run plain: no compiler"),
    (
        kinds.Executes(execution="captured", why=None),
        "encoder and language model are compiled in the first steps, which takes about a minute",
    ),
    (kinds.Prepared(passes=2, seconds=31.25), "step 8: prepared 2 passes in 31.2 s"),
    (kinds.Prepared(passes=1, seconds=0.5), None),
    (kinds.SampleChanged(samples=["a"], what=["left out 1 message"]), None),
    (kinds.AlarmRaised(alarm="loss_zero", about="", message="the loss is 0"), "warning: the loss is 0"),
]
