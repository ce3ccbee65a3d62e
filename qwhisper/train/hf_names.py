"""Names of HF's TrainingArguments that `qwhisper train` does not take: what to use instead, or why there is none.

REMOVED: names that transformers removed or renamed. NOT_TAKEN: names that it has. A test compares both with the
installed transformers, so that a new release can't add one unnoticed. NO_FLAGS: both, as the command line
reports them. Plain data, no import.
"""

REMOVED = {
    "adafactor": "transformers replaced it by `optim`; qwhisper trains with AdamW",
    "dispatch_batches": "it is gone; qwhisper reads its data itself",
    "evaluation_strategy": "it became `eval_strategy`; give --eval_file and --eval_steps",
    "fp16_backend": "it is gone; choose the number format with --dtype",
    "fp16_opt_level": "it is gone; choose the number format with --dtype",
    "fsdp_min_num_params": "transformers moved it into `fsdp_config`; qwhisper trains on one card",
    "fsdp_transformer_layer_cls_to_wrap": "transformers moved it into `fsdp_config`; qwhisper trains on one card",
    "group_by_length": "it became `train_sampling_strategy`; packs have no padding, and grouping saves nothing",
    "half_precision_backend": "it is gone; choose the number format with --dtype",
    "include_inputs_for_metrics": "transformers renamed it to `include_for_metrics`; metrics come from `qwhisper eval`",
    "include_tokens_per_second": "it is gone; metrics.jsonl has the tokens of every step",
    "jit_mode_eval": "transformers removed it; there is no replacement",
    "logging_dir": "it is gone; trackers write below --output_dir",
    "mp_parameters": "transformers removed it; there is no replacement",
    "no_cuda": "transformers renamed it to `use_cpu`; here: --device_map cpu",
    "overwrite_output_dir": "it is gone: no run is overwritten; take another --output_dir or resume",
    "past_index": "transformers removed it; there is no replacement",
    "per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
    "per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "push_to_hub_model_id": "it became `hub_model_id`; qwhisper does not upload: use `hf upload` on the checkpoint",
    "push_to_hub_organization": "it is gone; qwhisper does not upload: use `hf upload` on the checkpoint",
    "push_to_hub_token": "it became `hub_token`; qwhisper does not upload: use `hf upload` on the checkpoint",
    "ray_scope": "transformers removed it; there is no replacement",
    "save_safetensors": "it is gone; checkpoints are always safetensors",
    "sharded_ddp": "transformers replaced it by `fsdp`; qwhisper trains on one card",
    "split_batches": "transformers moved it into `accelerator_config`; qwhisper reads its data itself",
    "torchdynamo": "transformers renamed it to `torch_compile`; qwhisper chooses its kernels itself",
    "tpu_metrics_debug": "transformers removed it; there is no replacement",
    "tpu_num_cores": "transformers removed it; there is no replacement",
    "use_ipex": "transformers removed it; there is no replacement",
    "use_legacy_prediction_loop": "transformers removed it; there is no replacement",
    "use_mps_device": "it is gone; the device is chosen automatically, or by --device_map",
    "warmup_ratio": "transformers merged it into `warmup_steps`: --warmup_steps below 1 is a share of all steps",
}

_FORMAT = "the number format is --dtype bf16, fp16 or fp32"
_COMPILE = "qwhisper chooses its kernels itself and probes them at the start of a run"
_EVALUATION = "evaluation comes every --eval_steps, weighted by tokens, if there is an --eval_file"
_BEST = "the best checkpoint by evaluation loss is always kept if there is an --eval_file"
_SAVING = "checkpoints are written every --save_steps, whole and verified, so that each can be resumed"
_LOADER = "the loop reads its data itself; --dataloader_num_workers sets how many processes read ahead"
_COLUMNS = "the columns are those of the dialogue format"
_UPLOAD = "qwhisper does not upload; use `hf upload` on the checkpoint"
_ONE_CARD = "qwhisper trains on one card"
_OPTIMIZER = "qwhisper trains with AdamW (--weight_decay, --adam_beta1, --adam_beta2, --adam_epsilon)"
_OUTPUT = "the output is one line every --logging_steps, and metrics.jsonl has every step"
_TRACKER = "set it in the tracker's own environment variables"
_NANS = "qwhisper never hides a NaN: a step that is not finite is skipped and named in events.jsonl"

NOT_TAKEN = {
    "accelerator_config": _LOADER,
    "activation_checkpointing": "it is called --gradient_checkpointing here",
    "activation_checkpointing_kwargs": "--gradient_checkpointing needs no options",
    "auto_find_batch_size": "out of memory halves the pack, not the batch: same mathematics (--max_tokens_per_pack)",
    "average_tokens_across_devices": "the loss is always divided by the supervised tokens of the whole step",
    "batch_eval_metrics": _EVALUATION,
    "bf16": _FORMAT,
    "bf16_full_eval": _FORMAT,
    "data_seed": "one --seed decides weights and order",
    "dataloader_drop_last": "an epoch's short last batch is an ordinary batch: nothing is dropped",
    "dataloader_in_order": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "ddp_backend": _ONE_CARD,
    "ddp_broadcast_buffers": _ONE_CARD,
    "ddp_bucket_cap_mb": _ONE_CARD,
    "ddp_find_unused_parameters": _ONE_CARD,
    "ddp_static_graph": _ONE_CARD,
    "ddp_timeout": _ONE_CARD,
    "debug": "--manual_loss checks the loss; a tensor that is not finite is named automatically",
    "deepspeed": _ONE_CARD,
    "disable_tqdm": "there is no progress bar if the output is not a terminal",
    "do_eval": "give --eval_file; `qwhisper eval` evaluates a finished model",
    "do_predict": "use `qwhisper eval` or `qwhisper chat`",
    "do_train": "`qwhisper train` always trains",
    "enable_jit_checkpoint": "a stopped run always writes a checkpoint",
    "eval_accumulation_steps": _EVALUATION,
    "eval_delay": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_on_start": _EVALUATION,
    "eval_strategy": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "fp16": _FORMAT,
    "fp16_full_eval": _FORMAT,
    "fsdp": _ONE_CARD,
    "fsdp_config": _ONE_CARD,
    "full_determinism": "it is called --deterministic here",
    "gradient_checkpointing_kwargs": "--gradient_checkpointing needs no options",
    "greater_is_better": _BEST,
    "hub_always_push": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_revision": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_token": "set the environment variable HF_TOKEN",
    "ignore_data_skip": "a resumed run always continues at the sample where it stopped",
    "include_for_metrics": _EVALUATION,
    "include_num_input_tokens_seen": "metrics.jsonl has the tokens of every step",
    "label_names": _COLUMNS,
    "label_smoothing_factor": "the loss is plain cross-entropy, so that --manual_loss can check it",
    "length_column_name": _COLUMNS,
    "liger_kernel_config": _COMPILE,
    "load_best_model_at_end": _BEST,
    "local_rank": _ONE_CARD,
    "log_level": _OUTPUT,
    "log_level_replica": _OUTPUT,
    "log_on_each_node": _ONE_CARD,
    "logging_first_step": _OUTPUT,
    "logging_nan_inf_filter": _NANS,
    "logging_strategy": _OUTPUT,
    "lr_scheduler_kwargs": "only --lr_scheduler_type, --warmup_steps and the two --early_lr_ flags exist",
    "metric_for_best_model": _BEST,
    "neftune_noise_alpha": "noise on embeddings is not supported: it would also fall on the audio",
    "optim": _OPTIMIZER,
    "optim_args": _OPTIMIZER,
    "optim_target_modules": _OPTIMIZER,
    "parallelism_config": _ONE_CARD,
    "prediction_loss_only": _EVALUATION,
    "project": _TRACKER,
    "push_to_hub": _UPLOAD,
    "remove_unused_columns": _COLUMNS,
    "restore_callback_states_from_checkpoint": "a resumed run restores all of its state",
    "save_on_each_node": _ONE_CARD,
    "save_only_model": _SAVING,
    "save_strategy": _SAVING,
    "skip_memory_metrics": "metrics.jsonl has the memory of every step",
    "tf32": "only fp32 parts would use it, and they are fp32 to be exact",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "torch_empty_cache_steps": "out of memory halves the pack automatically (--max_tokens_per_pack)",
    "trackio_bucket_id": _TRACKER,
    "trackio_space_id": _TRACKER,
    "trackio_static_space_id": _TRACKER,
    "train_sampling_strategy": "samples are packed without padding, so grouping by length saves nothing",
    "use_cache": "training needs no KV cache, and `chat` always uses one",
    "use_cpu": "use --device_map cpu",
    "use_liger_kernel": _COMPILE,
}

NO_FLAGS = {name: f"is no longer a flag: {reason}" for name, reason in REMOVED.items()} | {
    name: f"of HF's TrainingArguments is not taken: {reason}" for name, reason in NOT_TAKEN.items()
}
