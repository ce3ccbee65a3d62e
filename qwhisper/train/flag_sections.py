"""The flags of `qwhisper train` by section, each with its default and the reason for it. No checks, no logic.

The defaults are the stable recipe; the limits of a number (`Bounds`) exclude values that no run can use.
`TrainArguments` in `arguments.py` joins the sections and refuses wrong combinations. A default of None depends on other
flags: the help text says how, and `plan.resolve` decides it.
"""

from dataclasses import dataclass
from typing import Literal

from qwhisper.flags import MOST_SAMPLES, flag, required

MOST_STEPS = 10**9  # a year has 3 * 10**7 seconds
LEAST_RATE = 1e-9  # AdamW moves a weight by about the rate; fp32 rounds less than that away beside a weight of 0.01
RATE = "AdamW moves every weight by about the rate: nothing would move, or all of it at once"
# A bound on the norm of 10**7 gradients leaves each about 3e-4 of it; AdamW's epsilon is 1e-8.
SMALL_CLIP = "gradients that are clipped to less vanish beside AdamW's epsilon, and nothing moves"
MOST_DROPOUT = 0.9
NOTHING_PASSES = "next to nothing would pass"


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    _argument_group_name = "data"

    train_file: str = required("JSONL of dialogues to train on, one dialogue a line.")
    eval_file: str | None = flag(
        None, "JSONL of dialogues to evaluate on during training. The best checkpoint is then kept as well."
    )
    data_root: str | None = flag(
        None,
        "Folder that absolute audio paths must lie in (default: the JSONL file's own folder). Nothing outside it is "
        "read.",
    )
    max_samples: int | None = flag(None, "Use only the first N dialogues, for a dry run.", at_least=1)
    max_length: int | None = flag(
        None,
        "Tokens a dialogue may have (default: the length that the language model was made for). A longer one is cut "
        "between turns, never inside a clip, and the cut is reported.",
        at_least=1,
    )
    train_on: Literal["assistant", "last", "all"] = flag(
        "assistant",
        "What is supervised: every assistant turn, only the last one, or user text as well (the relaxed mask, for "
        "data with very few answer tokens).",
    )
    audio_lead_silence: float | None = flag(
        None,
        "Seconds of silence put before every clip (default: 0.25; with --init_from, what it was trained with). Whisper "
        "never saw speech begin at its very first frame.",
        at_least=0,
    )
    audio_tail_silence: float | None = flag(
        None,
        "Seconds of silence put after every clip (default: 1.0; with --init_from, what it was trained with). Whisper "
        "never saw speech end at the last frame: without it short clips are recognised less well.",
        at_least=0,
    )
    feature_cache: str | None = flag(
        None,
        "Folder that keeps what the frozen encoder makes of each clip. The first pass over the data fills it; later "
        "passes and runs decode no audio and run no encoder. One folder serves any number of data sets and encoders.",
    )
    feature_cache_dtype: Literal["fp16", "int8"] = flag(
        "fp16",
        "Number format in --feature_cache. int8, with a scale for each frame, takes half of the space, and rounds "
        "more coarsely than bf16 does.",
    )
    max_bad_fraction: float = flag(
        0.01,
        "Share of clips that may be unreadable, silent or not finite. Such clips are quarantined and named; above this "
        "share the run ends with exit code 3, because the data set is broken rather than one file.",
        at_least=0,
        at_most=1,
        why="it is a share",
    )


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    _argument_group_name = "models"

    audio_model: str | None = flag(
        None,
        "Whisper whose encoder listens: hub id or folder (default: openai/whisper-large-v3-turbo; on modelscope "
        "openai-mirror/…; with --init_from, the one it was trained with). Its decoder is not loaded.",
    )
    text_model: str | None = flag(
        None,
        "Language model that answers: hub id or folder of any causal LM (default: Qwen/Qwen3-8B, which fits a 32 GB "
        "card in bf16; with --init_from, the one it was trained with).",
    )
    hub: Literal["huggingface", "modelscope"] = flag(
        "huggingface",
        "Where models are downloaded from. modelscope needs `pip install modelscope`; a mirror of Hugging Face needs "
        "only the environment variable HF_ENDPOINT.",
    )
    init_from: str | None = flag(
        None,
        "Checkpoint to take the weights from, with a fresh optimizer and schedule: the second of two stages. To resume "
        "an interrupted run use --resume_from_checkpoint instead.",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = flag(
        "auto",
        "Number format of the frozen models (auto: bf16 on a GPU, fp32 on a CPU). Weights are loaded directly in it: "
        "an intermediate fp32 copy would fill a card before the first step.",
    )
    load_in_4bit: bool = flag(
        False,
        "Keep the language model's linear layers in 4 bits (NF4, bitsandbytes): 8B then needs about 6 GB instead of "
        "16. Encoder, projector, LM head and norms are not quantised. A model saved in NF4 (such as *-bnb-4bit) is in "
        "4 bits without the flag. Start with a third less learning rate.",
    )
    load_in_fp8: bool = flag(
        False,
        "Keep the language model's linear layers in fp8 (e4m3, one scale for each output): 8B then needs about 9.5 GB "
        "instead of 16, and cards with fp8 (RTX 40 and 50, H100) also compute in it. LM head, embeddings, norms, "
        "encoder and projector stay as they are. Not together with --load_in_4bit, which is smaller and slower.",
    )
    device_map: str | None = flag(
        None,
        "Device of the models: auto, cpu, cuda:1 and so on (default: the first GPU if there is one).",
    )
    whisper_cpu: bool = flag(
        False,
        "Keep the encoder on the CPU: less GPU memory, more time.",
    )
    freeze_whisper: bool = flag(
        True,
        "Don't train the encoder. It already hears; what is learned is the mapping from it into the language model.",
    )


@dataclass(frozen=True, kw_only=True)
class ProjectorFlags:
    _argument_group_name = "projector"

    projector_fp32: bool = flag(
        True,
        "Compute the projector in fp32. In fp16 it was the source of the first NaN.",
    )
    projector_scale: float | None = flag(
        None,
        "Factor on the projector's output (default: 1.0; with --init_from, the one it was trained with). Use "
        "less than 1, such as 0.7, if a 4-bit run has NaNs again.",
        at_least=1e-3,
        at_most=1e3,
        why="the language model would read nothing but zeros, or infinities",
    )
    projector_dropout: float = flag(
        0.0,
        "Dropout on the projector's input. Up to 0.5 if the data has few speakers: new voices are then heard better. "
        "At 0 every way of packing the same samples gives the same result.",
        at_least=0,
        at_most=MOST_DROPOUT,
        why=NOTHING_PASSES,
    )
    freeze_projector_steps: int | None = flag(
        None,
        "Optimizer steps in which the projector is frozen (default: 20, at most 2 % of the run; with --no_use_lora 0, "
        "since nothing else learns). It was the first to become NaN in early steps, so LoRA settles before it starts.",
        at_least=0,
        at_most=MOST_STEPS,
    )
    projector_learning_rate: float | None = flag(
        None,
        "The projector's own learning rate (default: --learning_rate). It is trained from scratch and "
        "tolerates 1e-3, the right value if it is trained alone; with small language models 3e-5 is far too slow.",
        at_least=LEAST_RATE,
        at_most=1,
        why=RATE,
    )


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    _argument_group_name = "LoRA"

    use_lora: bool = flag(
        True, "Train low-rank adapters in the language model. --no_use_lora trains the projector alone."
    )
    lora_fp32: bool = flag(
        True,
        "Keep A and B in fp32. In half precision their small early updates are lost or overflow.",
    )
    lora_r: int = flag(
        16,
        "Rank of the adapters: a higher rank can learn more and takes more memory.",
        at_least=1,
        at_most=8192,
    )
    lora_alpha: int = flag(32, "The adapters' output is multiplied by lora_alpha / lora_r.", at_least=1)
    lora_dropout: float = flag(
        0.0,
        "Dropout before the adapters. At 0 every way of packing the same samples gives the same result.",
        at_least=0,
        at_most=MOST_DROPOUT,
        why=NOTHING_PASSES,
    )
    lora_target_modules: list[str] | None = flag(
        None,
        "Names of the language model's linear layers that get an adapter, such as q_proj v_proj (default: all of "
        "them). Encoder and projector never get one.",
    )
    lora_init_scale: float = flag(
        0.1,
        "Factor on the initial A (B is zero): keeps the first updates small.",
        at_least=1e-4,
        at_most=100,
        why="the gradients of B grow with A: nothing would move, or all of it at once",
    )
    lora_grad_clip: float = flag(
        5.0,
        "Bound on the norm of LoRA's gradients alone, before the global one; 0 turns it off. A peak in LoRA "
        "then does not shrink the projector's step.",
        at_least=1e-4,
        besides=0,
        why=SMALL_CLIP,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationFlags:
    _argument_group_name = "optimization"

    learning_rate: float = flag(
        3e-5,
        "Peak learning rate: low on purpose. Raise it after a clean run.",
        at_least=LEAST_RATE,
        at_most=1,
        why=RATE,
    )
    per_device_train_batch_size: int = flag(
        1,
        "Samples per device and micro-batch. --max_tokens_per_pack decides how they are laid into packs.",
        at_least=1,
        at_most=MOST_SAMPLES,
    )
    gradient_accumulation_steps: int = flag(
        4,
        "Micro-batches per optimizer step: with the batch size this sets the samples per step, and nothing else.",
        at_least=1,
        at_most=MOST_SAMPLES,
    )
    num_train_epochs: float = flag(3.0, "Passes over the data.", above=0, at_most=1e5)
    max_steps: int = flag(
        -1,
        "Optimizer steps; above 0 it replaces --num_train_epochs.",
        at_least=1,
        at_most=MOST_STEPS,
        besides=-1,
    )
    max_grad_norm: float = flag(
        1.0, "Bound on the norm of all gradients together; 0 turns it off.", at_least=1e-4, besides=0, why=SMALL_CLIP
    )
    early_lr_factor: float = flag(
        0.2,
        "Factor on the learning rate in the first --early_lr_steps: where runs are most fragile.",
        at_least=1e-3,
        at_most=1,
        why="nothing would move in these steps; above 1 they would be the fastest, where runs are most fragile",
    )
    early_lr_steps: int | None = flag(
        None,
        "Optimizer steps with --early_lr_factor (default: 100, at most 10 % of the run). A resume continues the count.",
        at_least=0,
        at_most=MOST_STEPS,
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = flag(
        "cosine",
        "How the learning rate falls after the warm-up: to zero along a cosine, to zero linearly, or not at all.",
    )
    warmup_steps: float = flag(
        0.0,
        "Steps in which the learning rate rises from 0; below 1, a share of all steps. The early factor applies too.",
        at_least=0,
        at_most=MOST_STEPS,
    )
    weight_decay: float = flag(
        0.0,
        "AdamW's weight decay. Small adapters and a new projector don't need any.",
        at_least=0,
        at_most=10,
        why="it would keep every weight below 0.1",
    )
    adam_beta1: float = flag(
        0.9,
        "AdamW's decay rate for the mean of gradients.",
        at_least=0,
        at_most=0.9999,
        why="its memory would be longer than any run, and in fp32 it becomes 1",
    )
    adam_beta2: float = flag(
        0.999,
        "AdamW's decay rate for the mean of squared gradients.",
        at_least=0,
        at_most=0.99999,
        why="its memory would be longer than any run, and in fp32 it becomes 1",
    )
    adam_epsilon: float = flag(
        1e-8,
        "AdamW's constant against division by zero.",
        at_least=1e-16,
        at_most=1e-2,
        why="in fp32 squared gradients round to 0, and a smaller one leaves the step without a bound; beside a larger "
        "one all gradients vanish, and nothing moves",
    )
    distill_weight: float = flag(
        0.0,
        "Share of the loss, from 0 to 1, that comes from the teacher: the text model, which reads the transcripts (1: "
        "no cross-entropy at all). Keeps what the text model could do before training.",
        at_least=0,
        at_most=1,
        why="it is a share",
    )
    manual_loss: bool = flag(
        False,
        "Compute a plain fp32 loss beside the fast one, recount the mask, and stop with exit code 5 if they differ. "
        "Costs time; for the first run on new data.",
    )
    activation_clamp: str = flag(
        "auto",
        "Bound on the input of the first layer's q_proj: off, a number, or auto (±8 after three gradient spikes or "
        "skipped steps within 50 steps, off again after 200 steps without). Clamped values are counted.",
    )
    dynamic_lr: bool = flag(
        False,
        "Lower the learning rate by a third if gradient peaks come in pairs while the loss does not fall, or if the "
        "loss rises, down to a tenth of it; raise it again afterwards.",
    )
    max_bad_steps: int = flag(
        5,
        "Bad steps in a row (skipped, or with a gradient far above its running average) after which the run goes back "
        "to a snapshot at half the learning rate: one bad step comes from the data, five in a row from the weights.",
        at_least=1,
        at_most=MOST_STEPS,
    )
    max_rewinds: int = flag(
        3, "After this many rewinds, a run that is bad again stops with exit code 5.", at_least=0, at_most=MOST_STEPS
    )
