"""Every key of the config in one of two lists: the keys that change a run's result, and the keys that do not.

Runs are compared by the first: the columns of a sweep, of `launch.compare` and of TensorBoard's HParams tab.
"""

CHANGING = (
    "loss.name", "loss.beta", "optim.lr", "lora.rank", "lora.alpha", "optim.warmup_steps", "train.seed", "model.path",
    "loss.label_smoothing", "loss.length_normalized", "loss.sft_weight", "loss.gamma", "loss.dpop_lambda",
    "optim.name", "optim.schedule",
    "optim.min_lr_ratio", "optim.weight_decay", "optim.max_grad_norm", "batch.pairs_per_step", "data.max_length",
    "train.steps", "train.epochs", "data.train", "data.eval", "data.max_prompt_length", "data.order", "reference.path",
    "lora.path", "lora.target_modules", "lora.target_parameters", "lora.exclude_modules", "lora.rslora", "lora.dora",
    "lora.train_embeddings", "lora.quantize", "reference.adapter",
    "model.tokenizer", "batch.group_by_prompt", "optim.alpha", "optim.momentum", "optim.betas", "optim.eps",
    "parallel.compute_dtype", "parallel.tf32", "parallel.reduce_dtype", "model.dtype",
)  # fmt: skip
"""Keys that change what is learnt by more than rounding in the same precision, or on what it is measured; the most
often varied first."""

NEUTRAL = (
    "model.trust_remote_code", "reference.cache_dir", "reference.first_step_check", "data.on_bad_row", "data.num_proc",
    "batch.tokens_per_micro_batch", "parallel.shard", "parallel.replicate", "parallel.activation_checkpointing",
    "parallel.reshard_after_forward", "parallel.sync_gradients", "parallel.cpu_offload", "parallel.compile",
    "parallel.head_memory_mib", "parallel.setup_timeout_seconds", "parallel.timeout_seconds", "train.eval_every",
    "train.log_every", "train.report_to", "train.on_nonfinite", "train.max_skipped", "train.profile_steps",
    "train.run_dir", "eval.samples", "eval.max_new_tokens", "eval.temperature", "checkpoint.save_every",
    "checkpoint.keep", "checkpoint.resume", "checkpoint.export_dtype",
)  # fmt: skip
"""Keys that change speed, memory, files and what is shown."""

SEED = "train.seed"
"""The key of which several runs of one setting differ."""
