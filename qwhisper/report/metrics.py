"""The fields of metrics.jsonl. docs/make_event_tables.py writes docs/events.md from this file.

A record has the fields that were measured; a number that is not finite is a string ("nan", "inf" or "-inf"). * is a
group of weights: lora, projector, encoder.
"""

METRICS = {
    "step": "optimizer steps taken",
    "loss": "loss of the step's samples, nats a supervised token",
    "divergence": "Kullback-Leibler divergence from the teacher (`--distill_weight`), nats a taught token",
    "grad_norm": "norm of all gradients together, before clipping",
    "grad_norm_*": "norm of one group's gradients, before clipping",
    "grad_norm_mean": "running mean of `grad_norm`",
    "grad_norm_variance": "running variance of `grad_norm`",
    "peak_*": "norm / running average, only if the group's norm is above its adaptive bound",
    "valid_label_count": "supervised tokens of the step",
    "learning_rate_*": "learning rate of one group",
    "peak_memory_gib": "largest allocation on the GPU since the start, GiB",
    "seconds": "wall-clock time of the step, waiting for data included",
    "eval_loss": "held-out loss, nats a supervised token",
    "listening_gain": "loss with swapped audio minus loss with the true audio, nats a supervised token",
    "listening_noise": "standard error of `listening_gain`",
    "text_shift": "Kullback-Leibler divergence of the answers to text from the base model's, nats a token",
    "retention": "share of questions of kinds never trained on that are answered right on speech",
    "retention_questions": "number of those questions",
    "hearing": "share of questions of trained kinds that are answered right on speech",
}
