"""The keys of a run: one frozen dataclass per section.

The docstring under a field is the text that --help-config prints. `rules` checks the values.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from dpo.config.lora_fields import LoraConfig
from dpo.config.loss_facts import LOSS_FACTS, LossFacts, LossName


@dataclass(frozen=True)
class ModelConfig:
    """model: the policy; also the reference, unless reference.path names another model."""

    path: str
    """Hugging Face folder with safetensors, or hub id, of the model to start from, usually fine-tuned before (SFT)."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null: that of model.path."""
    dtype: Literal["float32", "float64"] = "float32"
    """Data type of the parameters that the optimizer updates and of its state; float64 is for tests and needs
    parallel.reduce_dtype float64."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or the tokenizer. That code can do anything that you can do."""


@dataclass(frozen=True)
class ReferenceConfig:
    """reference: the model that rewards are measured against; its log-probabilities are computed once and cached."""

    path: str | None = None
    """Folder or hub id of the reference; null: model.path, from which the policy starts."""
    adapter: Literal["start", "base"] = "start"
    """With lora.path and no reference.path: the reference is the model with the adapters of lora.path, from which the
    policy starts, or base, the model without them."""
    cache_dir: str | None = None
    """Folder of the cached log-probabilities, shared by jobs and nodes; null: $DPO_CACHE, else ~/.cache/dpo."""
    first_step_check: Literal["stop", "warn"] = "stop"
    """Before the first update policy and reference must agree if they are the same model. If their log-probabilities
    differ by more than rounding: stop, or warn and continue (for models with larger rounding errors of their own)."""


@dataclass(frozen=True)
class SourceConfig:
    """Items of data.train and data.eval; each is one source of preference rows."""

    path: str
    """File (JSON, JSONL, CSV or TSV, also gzipped; Parquet), folder written by datasets.save_to_disk, or hub id."""
    name: str | None = None
    """Name of the hub data set's configuration; null: its default."""
    split: str = "train"
    """Split of a hub data set or of a saved folder with several."""
    format: Literal[
        "auto", "tokens", "grouped", "sharegpt", "preference", "hh", "shp", "tldr", "judged", "arena", "helpsteer",
        "nectar", "rated", "tldr_tokens", "demonstrations",
    ] = "auto"  # fmt: skip
    """Format of the rows; auto: recognized by the names of the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """The source's own name of a column, by the name that a format knows: {prompt: question} reads the column question
    as prompt, and {unused: context} leaves context out. Two numbers of a row are read only where they are named here:
    weight, by which the loss of its pairs is multiplied (in evaluation it is 1), and margin, which is subtracted from
    beta h in the loss dpo."""
    as_chat: bool = False
    """Read prompts and answers that are texts as messages of the user and the assistant, through the chat template."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, such as {enable_thinking: false}; those of a row, in a column
    chat_template_kwargs, take precedence."""
    weight: float | None = None
    """Only in data.train: share of this source's pairs that an epoch has, round(weight x pairs) of them; 2 is each pair
    twice. null: 1, or count."""
    count: int | None = None
    """Only in data.train: number of this source's pairs that an epoch has; an alternative to weight."""
    holdout: int | float | None = None
    """Only in data.train: prompts that are moved from training to evaluation, with all their pairs; an integer is a
    number of prompts, a number between 0 and 1 a fraction of them. Chosen by a hash of train.seed and the prompt."""


@dataclass(frozen=True)
class DataConfig:
    """data: sources of preference pairs, limits of length, order."""

    train: list[SourceConfig]
    """Sources of the training pairs, mixed; on the command line give the whole list as YAML."""
    eval: list[SourceConfig] = field(default_factory=list)
    """Sources of the evaluation pairs, in addition to held-out pairs; every pair has the same weight."""
    max_length: int | None = 512
    """Maximum number of tokens of a prompt and one completion together; longer completions are cut at their end.
    null: no limit."""
    max_prompt_length: int | None = 256
    """Maximum number of tokens of a prompt, below max_length; longer prompts are cut at their start. null: no limit."""
    order: Literal["shuffled", "sequential"] = "shuffled"
    """shuffled: a new permutation of the pairs for each epoch, from train.seed; sequential: the order of the files."""
    on_bad_row: Literal["drop", "stop"] = "drop"
    """A pair without a preference (empty, identical, a tie, ...): drop and count it, or stop with an error."""
    num_proc: int | None = None
    """Processes that tokenize, per node; null: one per core, at most 8, and 1 for small data sets."""


@dataclass(frozen=True)
class BatchConfig:
    """batch: one optimizer step, the same on any number of GPUs."""

    pairs_per_step: int = 64
    """Preference pairs per optimizer step, all ranks together."""
    tokens_per_micro_batch: int = 16384
    """Maximum number of tokens per rank in one forward and backward pass; changes memory and speed, not the result."""
    group_by_prompt: bool = False
    """Keep the pairs of a prompt next to each other, so that the pairs of a step share more prompts and completions."""


@dataclass(frozen=True)
class LossConfig:
    """loss: h is the difference of the log-ratios of winner w and loser l, in nats; u is beta x a log-ratio, mean
    the log-probability per token, o its log odds, log p - log(1 - p)."""

    name: LossName = "dpo"
    """dpo: -log sigmoid(beta h); ipo: (h - 1/(2 beta))^2; hinge: max(0, 1 - beta h); robust: dpo made unbiased for
    labels flipped at rate label_smoothing; apo_zero: 1 - sigmoid(u_w) + sigmoid(u_l); apo_down: sigmoid(u_w) + 1 -
    sigmoid(u_w - u_l); dpop: -log sigmoid(beta h - dpop_lambda max(0, -u_w)); simpo: -log sigmoid(beta (mean_w -
    mean_l) - gamma); orpo: cross-entropy of the winners - beta log sigmoid(o_w - o_l); sft: cross-entropy of the
    winners alone. The last three have no reference."""
    beta: float = 0.1
    """Strength of the constraint to stay near the reference, per nat, above 0; the paper uses 0.1 (TL;DR: 0.5). For
    simpo the scale of the rewards, 2 to 10."""
    label_smoothing: float = 0.0
    """Assumed fraction of flipped labels, at least 0 and below 0.5; for dpo (conservative DPO) and robust only."""
    length_normalized: bool = False
    """Divide each log-ratio by its number of completion tokens before the loss; not for simpo, orpo and sft."""
    sft_weight: float = 0.0
    """Weight of the winners' mean cross-entropy per token, which is added to the loss; 0 for orpo and sft."""
    gamma: float = 0.5
    """Margin by which the winner's reward must exceed the loser's, at least 0; simpo only."""
    dpop_lambda: float = 50.0
    """Weight of the penalty on winners below the reference, at least 0; dpop only."""

    @property
    def facts(self) -> LossFacts:
        """Returns the inputs of the loss, and which of these keys it takes."""
        return LOSS_FACTS[self.name]


@dataclass(frozen=True)
class OptimConfig:
    """optim: the optimizer and its learning rate."""

    name: Literal["rmsprop", "adamw", "sgd"] = "rmsprop"
    """The optimizer; the paper uses rmsprop, which keeps one element per parameter (adamw two, sgd none)."""
    lr: float = 1e-6
    """Learning rate after the warm-up, above 0."""
    warmup_steps: int | float = 150
    """Warm-up, over which the learning rate rises linearly from 0; an integer is a number of steps, a number between 0
    and 1 a fraction of the run's steps; 0: no warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or falling to min_lr_ratio x lr just after the last step."""
    min_lr_ratio: float = 0.0
    """Fraction of lr to which linear and cosine fall, at least 0 and below 1."""
    weight_decay: float = 0.0
    """Weight decay as the optimizer defines it: decoupled in adamw, added to the gradient in rmsprop and sgd."""
    max_grad_norm: float | None = 10.0
    """Maximum L2 norm of the gradient, which is scaled down to it if larger; null: no limit."""
    alpha: float = 0.99
    """Decay of the running mean of squared gradients, in [0, 1); rmsprop only."""
    momentum: float = 0.0
    """Momentum, in [0, 1); rmsprop and sgd only. Above 0 it keeps one more element per parameter."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the running means of gradients and of their squares, each in [0, 1); adamw only."""
    eps: float = 1e-8
    """Added to the root of the squared mean, above 0; rmsprop and adamw only."""


@dataclass(frozen=True)
class ParallelConfig:
    """parallel: layout over ranks, precision and memory; all layouts give the same result up to rounding."""

    shard: int | None = None
    """Ranks over which one copy of the model is sharded; null: the number of ranks divided by replicate."""
    replicate: int = 1
    """Copies of the model (HSDP), best one per node; shard x replicate is the number of ranks."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Data type of the forward and backward pass; auto: bfloat16 on CUDA, model.dtype on CPU."""
    tf32: bool = False
    """Multiply float32 matrices on CUDA in TensorFloat-32: several times faster, with 10 bits of mantissa instead of
    23; only with compute_dtype float32."""
    reduce_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Data type in which gradients are summed over ranks; float64 if and only if model.dtype is float64."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Recompute activations in the backward pass to save memory: all of a layer (full), or all but every second matrix
    product (selective). auto: dpo.train chooses at its start the fastest that fits, as dpo.estimate predicts, with 8 %
    of the memory to spare; a model that is not trained recomputes nothing."""
    reshard_after_forward: bool = True
    """Reshard the parameters of a layer after its forward pass, and all-gather them again for the backward pass: less
    memory, more communication."""
    sync_gradients: Literal["auto", "every_micro_batch", "last_micro_batch"] = "auto"
    """When gradients are reduce-scattered: after every micro-batch (each rank keeps its shard alone) or once per step
    (less communication, but unsharded gradients in between). auto: every_micro_batch, unless dpo.estimate predicts that
    last_micro_batch saves more than 3 % of a step and fits with 8 % of the memory to spare."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory; slow, for models that do not fit."""
    compile: bool | Literal["auto"] = "auto"
    """Run torch.compile on each layer: takes minutes at the first start, then steps are faster; auto: on CUDA only."""
    head_memory_mib: int = 256
    """MiB for tensors as wide as the vocabulary; logits that do not fit are computed twice, chunk by chunk."""
    setup_timeout_seconds: int = 7200
    """Timeout of collectives in seconds while a rank downloads, tokenizes or hashes the input, before GPUs are used."""
    timeout_seconds: int = 1800
    """Timeout of collectives from then on, in seconds: if a rank has not joined a collective by then, the run ends."""

    @property
    def undecided(self) -> tuple[str, ...]:
        """Returns the keys that are auto and that dpo.train decides by the estimate of a step, before it builds the
        policy.
        """
        return tuple(key for key in ("activation_checkpointing", "sync_gradients") if getattr(self, key) == "auto")


@dataclass(frozen=True)
class EvalConfig:
    """eval: at every evaluation, answers of policy and reference to a few evaluation prompts, side by side."""

    samples: int = 4
    """Number of evaluation prompts to answer, the same prompts every time; 0: none. Each new token all-gathers the
    parameters once."""
    max_new_tokens: int = 128
    """Maximum number of tokens per answer."""
    temperature: float = 0.0
    """0: take the most likely token; above 0: draw from the softmax at this temperature, with train.seed."""


@dataclass(frozen=True)
class TrainConfig:
    """train: length, seed and folder of the run."""

    steps: int | None = None
    """Total number of optimizer steps; null: given by train.epochs. It is an error to set both."""
    epochs: int | None = None
    """Number of passes over the training pairs; null: 1, unless train.steps is given."""
    eval_every: int | None = 100
    """Steps between evaluations; null: only before the first step and after the last."""
    log_every: int = 10
    """Steps between lines on the terminal; metrics.jsonl and the sinks of report_to record every step."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    """Sinks that show the run beside metrics.jsonl: TensorBoard, in the run folder, and trackers, each of which needs
    its package; [] for none. On the command line: '[tensorboard, wandb]'."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose gradient, loss or a metric is NaN or infinite: stop, or skip it, without an update, and go on. Its
    pairs are written to nonfinite/ of the run folder either way."""
    max_skipped: int = 3
    """Number of steps that may be skipped in a row, at least 1; one more stops the run; on_nonfinite skip only."""
    profile_steps: tuple[int, int] | None = None
    """First and last step that torch's profiler records, in profile/ of the run folder; null: none."""
    seed: int = 0
    """Seed of the order of the pairs, the choice of held-out prompts and the sampled answers; 0 or above."""
    run_dir: str | None = None
    """Folder of the run: metrics, checkpoints, final model; null: runs/<name of the config file>."""


@dataclass(frozen=True)
class CheckpointConfig:
    """checkpoint: saving, resuming, exporting."""

    save_every: int | None = 100
    """Steps between checkpoints; null: only at the end."""
    keep: int | None = 2
    """Number of checkpoints to keep, the newest, at least 1; null: all."""
    resume: str = "auto"
    """auto: resume from the newest checkpoint in train.run_dir that is not damaged, or start if there are none; never:
    raise an error if train.run_dir has been used; else the folder of the checkpoint to resume from, and when that is
    done, from the newest in train.run_dir."""
    export_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the parameters in the exported Hugging Face folder; auto: that of model.path (float16: float32)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All keys of a run, as `config.yaml` in the run folder holds them."""

    model: ModelConfig
    """The policy."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters in place of the model's weights."""
    reference: ReferenceConfig = ReferenceConfig()
    """The reference and its cache."""
    data: DataConfig
    """Sources, lengths and order of the pairs."""
    batch: BatchConfig = BatchConfig()
    """Pairs per step, tokens per micro-batch."""
    loss: LossConfig = LossConfig()
    """The loss."""
    optim: OptimConfig = OptimConfig()
    """The optimizer and its schedule."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over ranks, precision and memory."""
    train: TrainConfig = TrainConfig()
    """Length, seed and folder of the run."""
    eval: EvalConfig = EvalConfig()
    """Sampled answers."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
