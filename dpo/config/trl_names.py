"""The names of TRL's trainer for preferences and their counterparts here, for errors about unknown keys."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Counterpart:
    """The key that does here what a name does in TRL."""

    key: str | None
    """None: nothing is to be set; `note` says why."""
    note: str = ""
    """How a value is translated; empty where it is the same."""


_PAIRS = "a step has batch.pairs_per_step pairs (64) on any number of ranks"
_NO_INT8 = "frozen weights are stored in parallel.compute_dtype, or in 4 bits by lora.quantize"
_EXACT = "adapters have no dropout, since the tokens of a shared prompt belong to no one pair"
_SHARDED = "FSDP2 shards the model over all ranks by itself"

TRL_NAMES: Mapping[str, Counterpart] = {
    # models
    "model_name_or_path": Counterpart("model.path"),
    "ref_model": Counterpart("reference.path", "null takes model.path"),
    "trust_remote_code": Counterpart("model.trust_remote_code"),
    "attn_implementation": Counterpart(None, "packed rows have an attention of their own"),
    "load_in_4bit": Counterpart("lora.quantize", "nf4"),
    "load_in_8bit": Counterpart(None, _NO_INT8),
    "quantization_config": Counterpart("lora.quantize", "nf4"),
    # adapters: TRL's names, and those of a LoraConfig
    "use_peft": Counterpart("lora.rank", "a rank, 16 in TRL; null: no adapters"),
    "peft_config": Counterpart("lora.rank", "and other keys of lora"),
    "lora_r": Counterpart("lora.rank"),
    "r": Counterpart("lora.rank"),
    "lora_alpha": Counterpart("lora.alpha", "null: 2 x rank"),
    "lora_dropout": Counterpart(None, _EXACT),
    "lora_target_modules": Counterpart("lora.target_modules"),
    "lora_target_parameters": Counterpart("lora.target_parameters"),
    "lora_modules_to_save": Counterpart("lora.train_embeddings", "true: the embeddings and the head"),
    "modules_to_save": Counterpart("lora.train_embeddings", "true: the embeddings and the head"),
    "use_rslora": Counterpart("lora.rslora"),
    "use_dora": Counterpart("lora.dora"),
    "init_lora_weights": Counterpart("lora.path", "adapters start without effect, or as those of a folder"),
    "model_adapter_name": Counterpart("lora.path", "null: the adapters start at random, and change nothing"),
    "ref_adapter_name": Counterpart("reference.adapter", "start or base"),
    "force_use_ref_model": Counterpart("reference.path", "null: the model before training"),
    # data
    "dataset_name": Counterpart("data.train", "[{path: NAME}]"),
    "dataset_config": Counterpart("data.train", "[{path: NAME, name: CONFIG}]"),
    "dataset_train_split": Counterpart("data.train", "[{path: NAME, split: SPLIT}]"),
    "dataset_test_split": Counterpart("data.eval", "[{path: NAME, split: SPLIT}]"),
    "dataset_num_proc": Counterpart("data.num_proc"),
    "max_length": Counterpart("data.max_length"),
    "max_prompt_length": Counterpart("data.max_prompt_length"),
    "max_completion_length": Counterpart("data.max_length", "the limit of a prompt and one completion together"),
    "truncation_mode": Counterpart(None, "prompts are cut at their start, completions at their end"),
    "padding_free": Counterpart(None, "rows are packed, so that nothing is padded"),
    "group_by_length": Counterpart(None, "rows are packed, so that nothing is padded"),
    # a step
    "per_device_train_batch_size": Counterpart(
        "batch.tokens_per_micro_batch", f"a limit in tokens, which changes memory and speed only; {_PAIRS}"
    ),
    "per_device_eval_batch_size": Counterpart("batch.tokens_per_micro_batch", "a limit in tokens"),
    "gradient_accumulation_steps": Counterpart(None, _PAIRS),
    # loss and reference
    "loss_type": Counterpart(
        "loss.name", "sigmoid is dpo; hinge, ipo, robust, apo_zero, apo_down and sft keep their names"
    ),
    "beta": Counterpart("loss.beta"),
    "label_smoothing": Counterpart("loss.label_smoothing"),
    "rpo_alpha": Counterpart("loss.sft_weight"),
    "simpo_gamma": Counterpart("loss.gamma"),
    "reference_free": Counterpart("loss.name", "simpo, orpo and sft have no reference"),
    "precompute_ref_log_probs": Counterpart(None, "they are always computed once, and cached in reference.cache_dir"),
    # optimizer
    "learning_rate": Counterpart("optim.lr"),
    "optim": Counterpart("optim.name", "adamw_torch is adamw"),
    "lr_scheduler_type": Counterpart("optim.schedule", "constant_with_warmup is constant"),
    "warmup_ratio": Counterpart("optim.warmup_steps", "a number between 0 and 1 is a fraction of the run's steps"),
    "warmup_steps": Counterpart("optim.warmup_steps"),
    "weight_decay": Counterpart("optim.weight_decay"),
    "max_grad_norm": Counterpart("optim.max_grad_norm"),
    "adam_beta1": Counterpart("optim.betas", "[BETA1, BETA2]"),
    "adam_beta2": Counterpart("optim.betas", "[BETA1, BETA2]"),
    "adam_epsilon": Counterpart("optim.eps"),
    # precision and memory
    "bf16": Counterpart("parallel.compute_dtype", "bfloat16, which auto takes on CUDA; the weights stay float32"),
    "fp16": Counterpart("parallel.compute_dtype", "bfloat16, as there is no float16"),
    "torch_dtype": Counterpart(
        "parallel.compute_dtype", "the weights stay float32; checkpoint.export_dtype is final/'s"
    ),
    "gradient_checkpointing": Counterpart("parallel.activation_checkpointing", "true is full, false is none"),
    "torch_compile": Counterpart("parallel.compile"),
    "use_liger_kernel": Counterpart("parallel.head_memory_mib", "logits are computed in chunks of this size"),
    "deepspeed": Counterpart(None, _SHARDED),
    "fsdp": Counterpart(None, _SHARDED),
    "fsdp_config": Counterpart(None, _SHARDED),
    "ddp_timeout": Counterpart("parallel.timeout_seconds"),
    # the run
    "num_train_epochs": Counterpart("train.epochs", "an integer"),
    "max_steps": Counterpart("train.steps", "null in place of -1"),
    "seed": Counterpart("train.seed"),
    "data_seed": Counterpart("train.seed"),
    "output_dir": Counterpart("train.run_dir"),
    "run_name": Counterpart("train.run_dir"),
    "logging_dir": Counterpart("train.run_dir"),
    "logging_steps": Counterpart("train.log_every", "metrics are recorded at every step"),
    "eval_steps": Counterpart("train.eval_every"),
    "eval_strategy": Counterpart("train.eval_every", "a number of steps; null: before the first and after the last"),
    "generate_during_eval": Counterpart("eval.samples", "the number of prompts to answer, 0 for none"),
    "save_steps": Counterpart("checkpoint.save_every"),
    "save_strategy": Counterpart("checkpoint.save_every", "a number of steps; null: at the end alone"),
    "save_total_limit": Counterpart("checkpoint.keep"),
    "resume_from_checkpoint": Counterpart("checkpoint.resume", "auto, which is the default, resumes by itself"),
    "report_to": Counterpart("train.report_to", "a list"),
    "push_to_hub": Counterpart(None, "dpo push RUN REPO uploads the model of a finished run"),
    "hub_model_id": Counterpart(None, "dpo push RUN REPO uploads the model of a finished run"),
}
"""TRL's name -> ours."""

VALUES: Mapping[str, Mapping[str, str]] = {
    "loss.name": {"sigmoid": "dpo"},
    "optim.name": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adam": "adamw"},
    "optim.schedule": {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine"},
    "parallel.compute_dtype": {"bf16": "bfloat16", "fp32": "float32", "float": "float32"},
    "parallel.reduce_dtype": {"bf16": "bfloat16", "fp32": "float32"},
    "checkpoint.export_dtype": {"bf16": "bfloat16", "fp32": "float32"},
    "model.dtype": {"fp32": "float32"},
}
"""Key -> another name of one of its values -> the value."""

NOTES: Mapping[tuple[str, str], str] = {
    ("model.dtype", word): "the weights that are updated stay float32; to compute in bfloat16: parallel.compute_dtype"
    " bfloat16; to write final/ in it: checkpoint.export_dtype bfloat16"
    for word in ("bfloat16", "bf16", "float16", "fp16")
} | {("parallel.compute_dtype", word): "there is no float16; bfloat16 has its size" for word in ("float16", "fp16")}
"""(key, value) -> a sentence where the value belongs to another key."""
