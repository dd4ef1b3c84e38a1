"""A short run of TRL's DPOTrainer: `[torchrun ...] python -m tests.bench.peer_trl JOB.json`.

Runs in the environment of trl-requirements.txt, where this project is not installed. The job is a `jobs.Job`; each rank
tells what it saw.
"""

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tests.bench.jobs import LIVE, PRECOMPUTED, Job, Told, digest, read_job, tell
from tests.bench.memory import peak_bytes, reset_peak, resident_bytes


class Trainer(DPOTrainer):
    """TRL's trainer on pairs that are token ids already, which notes the ids that it is given to train on."""

    def _prepare_dataset(self, dataset: Dataset, *others: Any) -> Dataset:
        return dataset

    def compute_loss(self, model: Any, inputs: dict[str, Any], *others: Any, **more: Any) -> Any:
        names = ("input_ids", "attention_mask", "completion_mask")
        rows = list(zip(*(inputs[name].tolist() for name in names), strict=True))
        half = len(rows) // 2  # the chosen ones, then the rejected ones
        self.seen += [digest(*split(rows[i]), split(rows[half + i])[1]) for i in range(half)]
        return super().compute_loss(model, inputs, *others, **more)


def split(row: tuple[list[int], list[int], list[int]]) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids) of a padded row."""
    kept = [(token, scored) for token, attended, scored in zip(*row, strict=True) if attended]
    return [token for token, scored in kept if not scored], [token for token, scored in kept if scored]


class Watch(TrainerCallback):
    """Takes the time at the end of every step, and the memory of the steps."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peak = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        reset_peak()
        self.times.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())
        self.peak = peak_bytes()


def arguments(job: Job, folder: str, ranks: int) -> DPOConfig:
    """TRL's settings for what this project's trainer does with the same job: no truncation, pairs in order, float32."""
    return DPOConfig(
        output_dir=folder,
        max_steps=job.steps,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.pairs_per_step // (job.micro_batch * ranks),
        train_sampling_strategy="sequential",
        max_length=None,
        precompute_ref_log_probs=job.mode == PRECOMPUTED,
        beta=job.beta,
        optim="rmsprop",
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=10.0,
        gradient_checkpointing=job.checkpointing,
        bf16=False,
        use_cpu=True,
        ddp_backend="gloo" if ranks > 1 else None,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def run(job: Job, folder: str, ranks: int) -> Told:
    """Prepares and trains."""
    imports = resident_bytes()
    tokenizer, watch = AutoTokenizer.from_pretrained(job.model), Watch()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs = Dataset.from_json(job.pairs, cache_dir=folder).select(range(job.steps * job.pairs_per_step))
    model, reference = load(job.model), load(job.model) if job.mode == LIVE and not job.adapter else None
    started = time.perf_counter()
    trainer = Trainer(
        model=model,
        ref_model=reference,
        args=arguments(job, folder, ranks),
        train_dataset=pairs,
        processing_class=tokenizer,
        callbacks=[watch],
        peft_config=adapters(job.adapter) if job.adapter else None,
    )
    if job.adapter:
        set_peft_model_state_dict(trainer.model, load_file(Path(job.adapter, "adapter_model.safetensors")))
    prepared = time.perf_counter() - started if job.mode == PRECOMPUTED else 0.0
    trainer.seen = []
    trainer.train()
    seconds = [end - begin for begin, end in itertools.pairwise(watch.times)]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Told(seconds, losses, trainer.seen, prepared, imports, watch.peak)


def load(folder: str) -> Any:
    """The model in float32 with torch's fused attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def adapters(folder: str) -> LoraConfig:
    """The config of a folder of adapters, for training."""
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = False
    return config


def main() -> None:
    """`JOB.json`, in whose folder it may write."""
    file = Path(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tell(file, run(read_job(file), str(file.parent), int(os.environ.get("WORLD_SIZE", "1"))))


if __name__ == "__main__":
    main()
