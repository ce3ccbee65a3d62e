"""Finds the flag that a user probably meant."""

import difflib
from collections.abc import Mapping, Sequence

# Names of the same thing in other trainers and papers. The first one that the verb has is used.
ELSEWHERE: dict[tuple[str, ...], str] = {
    ("per_device_train_batch_size", "batch_size"): "bs batch batch_size batchsize micro_batch_size mbs",
    ("per_device_eval_batch_size",): "eval_batch_size eval_bs",
    ("learning_rate",): "lr peak_lr max_lr base_lr",
    ("projector_learning_rate",): "projector_lr proj_lr mlp_lr",
    ("weight_decay",): "wd l2",
    ("num_train_epochs",): "epochs epoch num_epochs n_epochs max_epochs",
    ("max_steps",): "steps num_steps train_steps num_train_steps max_train_steps total_steps iterations max_iters",
    ("gradient_accumulation_steps",): "grad_accum grad_acc accum accumulation accum_steps accumulate_grad_batches gas",
    ("max_grad_norm",): "clip grad_clip clip_grad clip_grad_norm gradient_clipping gradient_clip_val grad_norm",
    ("warmup_steps",): "warmup num_warmup_steps lr_warmup_steps",
    ("lr_scheduler_type",): "scheduler lr_scheduler lr_schedule schedule",
    ("adam_beta1",): "beta1",
    ("adam_beta2",): "beta2",
    ("adam_epsilon",): "eps epsilon",
    ("text_model",): "model model_name model_name_or_path model_path model_id base_model llm lm language_model qwen",
    ("audio_model",): "whisper whisper_model encoder audio_encoder speech_encoder audio_tower",
    ("train_file",): "data data_path dataset dataset_path dataset_name train train_data train_path train_dataset "
    "training_data training_file",
    ("eval_file",): "eval_data eval_dataset eval_path valid_file valid_data validation_file val val_file val_data "
    "dev_file dev_data test_file test_data dataset data",
    ("data_root",): "audio_dir audio_root data_dir root wav_dir",
    ("output_dir", "output_json"): "o out out_dir outdir output output_path output_file save_dir save_path exp_dir",
    ("lora_r",): "lora_rank rank r lora_dim",
    ("lora_alpha",): "alpha",
    ("lora_dropout",): "dropout",
    ("lora_target_modules",): "target_modules lora_target lora_targets",
    ("use_lora",): "lora peft use_peft",
    ("load_in_4bit",): "qlora 4bit use_4bit load_4bit bits quantization quantization_bit quantize load_in_8bit",
    ("load_in_fp8",): "fp8 use_fp8 float8 load_fp8 fp8_base",
    ("dtype",): "fp16 bf16 fp32 float16 bfloat16 half amp precision mixed_precision torch_dtype",
    ("gradient_checkpointing",): "grad_checkpointing activation_checkpointing recompute",
    ("freeze_whisper",): "freeze_encoder freeze_audio_encoder freeze_audio_tower freeze_audio",
    (
        "max_length",
    ): "max_len max_seq_length max_seq_len seq_len seq_length sequence_length model_max_length cutoff_len",
    ("max_new_tokens",): "max_tokens max_length max_len num_tokens",
    ("max_samples",): "limit num_samples n_samples max_train_samples subset",
    ("save_steps",): "save_every save_interval save_freq checkpoint_every checkpoint_steps ckpt_interval",
    ("save_total_limit",): "keep keep_last max_checkpoints",
    ("eval_steps",): "eval_every eval_interval eval_freq val_check_interval",
    ("logging_steps",): "log_every log_interval log_steps log_freq print_every",
    ("resume_from_checkpoint",): "resume resume_from resume_checkpoint continue ckpt checkpoint",
    ("init_from",): "init init_checkpoint from_checkpoint pretrained warm_start",
    ("dataloader_num_workers",): "workers num_workers nw",
    ("device", "device_map"): "gpu cuda gpus device device_map",
    ("report_to",): "wandb tensorboard tracker logger log_with use_wandb",
    ("run_name",): "name exp_name experiment_name wandb_run_name",
    ("seed",): "random_seed random_state",
    ("audio",): "wav file audio_file audio_path input",
    ("text",): "prompt question message query",
    ("system",): "system_prompt system_message",
}
TYPO = 0.8  # names with at least this difflib ratio count as the same


def unknown_flag(name: str, flags: Sequence[str], no_flags: Mapping[str, str], *, dashes: str) -> str:
    """A sentence: why this name is no flag, and what to do. dashes: what precedes a flag's name where it was given."""
    if name in no_flags:
        return f"{dashes}{name} {no_flags[name]}"
    nearest = nearest_flag(name, flags)
    instead = f"; did you mean {dashes}{nearest}?" if nearest else "; --help lists all"
    return f"unknown flag {dashes}{name}{instead}"


def nearest_flag(name: str, flags: Sequence[str]) -> str | None:
    """Of `flags`, the one that `name` most probably means: a typo, a name used elsewhere, or an abbreviation."""
    if name.startswith("no_"):
        meant = nearest_flag(name.removeprefix("no_"), [flag for flag in flags if not flag.startswith("no_")])
        return f"no_{meant}" if f"no_{meant}" in flags else meant
    for ours, theirs in ELSEWHERE.items():
        if name in theirs.split():
            known = [flag for flag in ours if flag in flags]
            if known:
                return known[0]
    typo = difflib.get_close_matches(name, flags, n=1, cutoff=TYPO)
    if typo and len(name) > 3:
        return typo[0]
    positive = [flag for flag in flags if not flag.startswith("no_")]
    initials = [flag for flag in positive if len(name) > 1 and "".join(word[0] for word in flag.split("_")) == name]
    if len(initials) == 1:
        return initials[0]
    shortened = [flag for flag in positive if _abbreviates(name.split("_"), flag.split("_"))]
    if len(name) > 2 and shortened:
        return min(shortened, key=len)
    near = difflib.get_close_matches(name, flags, n=1) if len(name) > 3 else []
    return near[0] if near else None


def _abbreviates(short: Sequence[str], words: Sequence[str]) -> bool:
    """Whether every part of `short` begins one of the words, in their order."""
    left = iter(words)
    return all(any(word.startswith(part) for word in left) for part in short)
