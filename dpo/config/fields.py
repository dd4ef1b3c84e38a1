"""The keys of a run: one frozen dataclass a section, each field followed by what --help prints about it.

The docstring under a field is its documentation (jsonargparse reads it); the checks of values are in `rules.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from dpo.config.loss_facts import LOSS_FACTS, LossFacts, LossName


@dataclass(frozen=True)
class ModelConfig:
    """model: the policy, which is also the reference unless reference.path names another."""

    path: str
    """Hugging Face folder with safetensors, or hub id, of the model to start from (after supervised fine-tuning)."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null: that of model.path."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of the master weights and of the optimizer's state; float64 is for tests and needs
    parallel.reduce_dtype float64."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or the tokenizer. It can do anything that you can do."""


@dataclass(frozen=True)
class ReferenceConfig:
    """reference: the model that rewards are measured against; its log-probabilities are computed once and kept."""

    path: str | None = None
    """Folder or hub id of the reference; null: the policy's own start, model.path."""
    cache_dir: str | None = None
    """Folder of the cached log-probabilities, shared by jobs and nodes; null: $DPO_CACHE, else ~/.cache/dpo."""
    first_step_check: Literal["stop", "warn"] = "stop"
    """What a run does whose policy, before its first update, is not its own reference: end, or warn and go on (for a
    model whose own rounding is beyond the bounds, such as a mixture of experts whose routes flip)."""


@dataclass(frozen=True)
class SourceConfig:
    """Items of data.train and data.eval: one source of preference rows each."""

    path: str
    """File (.jsonl, .json, .parquet; .gz too), folder written by datasets.save_to_disk, or hub id."""
    name: str | None = None
    """Name of the hub data set's configuration; null: its default one."""
    split: str = "train"
    """Split of a hub data set or of a saved folder with several."""
    format: Literal["auto", "tokens", "grouped", "sharegpt", "preference", "hh", "shp", "tldr"] = "auto"
    """How a row is read; auto: from the names of the columns."""
    holdout: int | float | None = None
    """Only in data.train: prompts taken out of training and added to the evaluation, with all their pairs; an integer
    counts prompts, a number between 0 and 1 is a fraction of them. Chosen by a hash of train.seed and the prompt."""


@dataclass(frozen=True)
class DataConfig:
    """data: what is read and how long it may be."""

    train: list[SourceConfig]
    """Sources of the training pairs, mixed; on the command line the list is given whole, as YAML."""
    eval: list[SourceConfig] = field(default_factory=list)
    """Sources of the evaluation pairs; every pair weighs the same, and held-out pairs join them."""
    max_length: int | None = 512
    """Most tokens of prompt and completion together; completions lose their end. null: no limit."""
    max_prompt_length: int | None = 256
    """Most tokens of the prompt, which loses its start; below max_length. null: no limit."""
    order: Literal["shuffled", "sequential"] = "shuffled"
    """shuffled: a permutation of the pairs for each epoch, from train.seed; sequential: as they stand in the files."""
    on_bad_row: Literal["drop", "stop"] = "drop"
    """A pair that carries no preference (empty, identical, a tie, ...): drop and count it, or stop with an error."""
    num_proc: int | None = None
    """Processes that tokenize on a node; null: one for each core, at most 8, and 1 for small sets."""


@dataclass(frozen=True)
class BatchConfig:
    """batch: one optimizer step, the same on any number of GPUs."""

    pairs_per_step: int = 64
    """Preference pairs in one optimizer step, over all ranks together."""
    tokens_per_micro_batch: int = 16384
    """Most tokens that one rank runs in one forward and backward; changes memory and speed, not the result."""
    group_by_prompt: bool = False
    """Keep the pairs of a prompt next to each other, so that a step shares more prompts and completions."""


@dataclass(frozen=True)
class LossConfig:
    """loss: h is the difference of the log-ratios of winner and loser, in nats."""

    name: LossName = "dpo"
    """dpo: -log sigmoid(beta h); ipo: (h - 1/(2 beta))^2; hinge: max(0, 1 - beta h); robust: dpo made unbiased for
    labels flipped at rate label_smoothing; sft: cross-entropy of the winners alone, without a reference."""
    beta: float = 0.1
    """Strength of the pull to the reference, per nat, above 0; the paper has 0.1 for dialogue and 0.5 for TL;DR."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels, at least 0 and below 0.5; for dpo (conservative DPO) and robust only."""
    length_normalized: bool = False
    """Divide each log-ratio by its number of completion tokens before the loss; not for sft."""
    sft_weight: float = 0.0
    """Weight of the winners' mean cross-entropy per token, added to the loss; 0 for sft itself."""

    @property
    def facts(self) -> LossFacts:
        """What the loss reads, and which of these keys it takes."""
        return LOSS_FACTS[self.name]


@dataclass(frozen=True)
class OptimConfig:
    """optim: the optimizer and its learning rate."""

    name: Literal["rmsprop", "adamw", "sgd"] = "rmsprop"
    """The optimizer; the paper's is rmsprop, which keeps one number a weight."""
    lr: float = 1e-6
    """Learning rate after the warm-up, above 0."""
    warmup_steps: int = 150
    """Steps over which the learning rate rises from 0 in a line; 0: none."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or falling to 0 just after the last step."""
    weight_decay: float = 0.0
    """Weight decay as the optimizer defines it: decoupled in adamw, added to the gradient in rmsprop and sgd."""
    max_grad_norm: float | None = 10.0
    """Gradients with a larger L2 norm are scaled down to it; null: never."""
    alpha: float = 0.99
    """Decay of the running mean of squared gradients, in [0, 1); rmsprop only."""
    momentum: float = 0.0
    """Momentum, in [0, 1); rmsprop and sgd only. Above 0 it costs one more number a weight."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the running means of gradients and of their squares, each in [0, 1); adamw only."""
    eps: float = 1e-8
    """Added to the root of the squared mean, above 0; rmsprop and adamw only."""


@dataclass(frozen=True)
class ParallelConfig:
    """parallel: where and in which precision the work runs; layouts agree to rounding."""

    shard: int | None = None
    """Ranks that one copy of the model is divided over; null: all ranks divided by replicate."""
    replicate: int = 1
    """Copies of the model (HSDP), best one a node; shard x replicate is the number of ranks."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of the forward and backward; auto: bfloat16 on CUDA, on CPU the type of the model (float32)."""
    tf32: bool = False
    """Multiply float32 matrices on CUDA in TensorFloat-32: several times faster, with 10 bits of mantissa instead of
    23; only with compute_dtype float32."""
    reduce_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type in which gradients are summed over ranks; float64 with model.dtype float64, and only then."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Recompute activations in the backward to save memory: of whole layers (full), or of all but every
    second matrix product (selective). auto: at the start dpo.train chooses the fastest that fits, by the estimate of
    dpo.estimate, with 8 % of the memory to spare; what is not trained checkpoints nothing."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward and gather them again for the backward: less memory, more
    traffic."""
    sync_gradients: Literal["auto", "every_micro_batch", "last_micro_batch"] = "auto"
    """When ranks sum their gradients: after every micro-batch (keeps only a shard of them) or once a step (less
    traffic, but unsharded gradients in between). auto: every_micro_batch, unless by the estimate the other saves over
    3 % of a step and fits with 8 % of the memory to spare."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the memory of the host; slow, for models that do not fit."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile each layer: minutes at the first start, faster steps after; auto: on CUDA."""
    head_memory_mib: int = 256
    """MiB for all that is as wide as the vocabulary; logits that do not fit are computed twice, a chunk at a time."""
    setup_timeout_seconds: int = 7200
    """Seconds that ranks wait for one that downloads, tokenizes or hashes the input, before GPUs are used."""
    timeout_seconds: int = 1800
    """Seconds after which a collective that some rank never joined ends the run, from then on."""

    @property
    def undecided(self) -> tuple[str, ...]:
        """Keys that are auto and that dpo.train decides, from all that a step needs, before it builds the policy."""
        return tuple(key for key in ("activation_checkpointing", "sync_gradients") if getattr(self, key) == "auto")


@dataclass(frozen=True)
class EvalConfig:
    """eval: answers of policy and reference to a few evaluation prompts, side by side at every evaluation."""

    samples: int = 4
    """Evaluation prompts that are answered, the same ones every time; 0: none. Each new token gathers the weights
    once."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0: the likeliest token every time; above: drawn at random, from train.seed, the softmax at this temperature."""


@dataclass(frozen=True)
class TrainConfig:
    """train: how long, and where to."""

    steps: int | None = None
    """Optimizer steps in all; null: train.epochs decides. Giving both is an error."""
    epochs: int | None = None
    """Times through the training pairs; null: 1, unless train.steps is given."""
    eval_every: int | None = 100
    """Steps between evaluations; null: only before the first step and after the last."""
    log_every: int = 10
    """Steps between lines on the terminal; metrics.jsonl and TensorBoard have every step."""
    profile_steps: tuple[int, int] | None = None
    """First and last step that torch's profiler records, into profile/ of the run folder; null: none."""
    seed: int = 0
    """Decides the order of the pairs and the held-out prompts; 0 or above."""
    run_dir: str | None = None
    """Folder of the run: metrics, checkpoints, final model; null: runs/<name of the config file>."""


@dataclass(frozen=True)
class CheckpointConfig:
    """checkpoint: saving, going on, exporting."""

    save_every: int | None = 100
    """Steps between checkpoints; null: only at the end."""
    keep: int | None = 2
    """Newest checkpoints that are kept, at least 1; null: all."""
    resume: str = "auto"
    """auto: go on from the newest complete checkpoint of train.run_dir, else start; never: a used run_dir is an error;
    or the folder of a checkpoint to go on from."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the exported Hugging Face folder."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, as `config.yaml` in the run's folder holds it."""

    model: ModelConfig
    """The policy."""
    reference: ReferenceConfig = ReferenceConfig()
    """The reference and its cache."""
    data: DataConfig
    """Sources, lengths and order of the pairs."""
    batch: BatchConfig = BatchConfig()
    """Pairs a step, tokens a micro-batch."""
    loss: LossConfig = LossConfig()
    """The loss."""
    optim: OptimConfig = OptimConfig()
    """The optimizer and its schedule."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over ranks, precision, memory."""
    train: TrainConfig = TrainConfig()
    """Length, seed and folder of the run."""
    eval: EvalConfig = EvalConfig()
    """Sampled answers."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
