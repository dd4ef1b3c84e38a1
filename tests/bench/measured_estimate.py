"""`python -m dpo.estimate --measured` against real steps: `python -m tests.bench.measured_estimate [--rounds 3]`.

`dpo.doctor --report` measures config A, once on one rank and once on two; from each file the seconds of a step of
configs B, C and D are predicted, and trained by `dpo.train` on as many ranks. They differ from A in lengths, width,
depth, vocabulary, tokens per micro-batch and optimizer. Every program runs as a user starts it, on one thread a rank.

Other processes only lengthen steps, and do so from minute to minute. So a round runs all programs in turn; of the
rounds the fastest of each real step counts, as the report counts its fastest, and the median of the predictions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo.estimate.lengths import find_lengths
from dpo.estimate.program import estimate, read_arguments
from dpo.model.download import find_model_config
from dpo.run_folder.files import read_metrics

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """A config: the model, the lengths of its pairs, and the step."""

    hidden: int
    layers: int
    inner: int
    vocabulary: int
    prompt: int
    completion: int
    pairs: int
    tokens_per_micro_batch: int
    optimizer: str


CASES = {
    "A": Case(512, 4, 1408, 8192, 128, 128, 6, 768, "rmsprop"),
    "B": Case(768, 3, 2048, 4096, 64, 192, 4, 2048, "adamw"),
    "C": Case(384, 8, 1024, 16384, 200, 60, 6, 640, "sgd"),
    "D": Case(640, 2, 1728, 8192, 40, 80, 10, 512, "rmsprop"),
}
MEASURED = "A"


def save(case: Case, folder: Path) -> list[str]:
    """Writes a model with random weights and pairs of random tokens, from half to the whole length; returns the keys
    of a config of five steps after one."""
    model = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.inner,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(model, dtype=torch.float32).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)

    def ids(longest: int) -> list[int]:
        return rng.integers(3, case.vocabulary, rng.integers(longest // 2, longest + 1)).tolist()

    rows = [
        {"prompt_ids": ids(case.prompt), "completion_ids": [ids(case.completion) for _ in range(2)], "pairs": [[0, 1]]}
        for _ in range(6 * case.pairs)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "model.path": folder / "model",
        "data.train": f"[{{path: {folder / 'pairs.jsonl'}, format: tokens}}]",
        "batch.pairs_per_step": case.pairs,
        "batch.tokens_per_micro_batch": case.tokens_per_micro_batch,
        "optim.name": case.optimizer,
        "train.steps": 6,
        "train.eval_every": "null",
        "eval.samples": 0,
        "checkpoint.save_every": "null",
        "reference.cache_dir": folder / "cache",
    }
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def start(ranks: int, module: str, words: Sequence[str]) -> None:
    """Runs a program under torchrun, on one thread a rank. Raises CalledProcessError with its output shown."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*torchrun, "-m", module, *words], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        done.check_returncode()


def measure(ranks: int, keys: Sequence[str], folder: Path) -> Path:
    """Returns the report of a config on so many ranks."""
    report = folder / "report.json"
    start(ranks, "dpo.doctor", [*keys, "--train.run_dir", str(folder / "run"), "--report", str(report)])
    return report


def predict(ranks: int, keys: Sequence[str], report: Path) -> float:
    """Returns the seconds of a step that `dpo.estimate` prints: on a CPU no parts overlap."""
    arguments = read_arguments([*keys, "--ranks", str(ranks), "--measured", str(report), *DECIDED])
    model_config = find_model_config(arguments.config)
    lengths = find_lengths(arguments.config, model_config, None, None)
    return estimate(arguments, model_config, lengths).speed.serial


DECIDED = ("--parallel.activation_checkpointing", "none", "--parallel.sync_gradients", "every_micro_batch")
"""What `auto` decides for these models: they fit, and a reduction costs less than 3 % of a step."""


def train(ranks: int, keys: Sequence[str], run_dir: Path) -> list[float]:
    """Returns the seconds of five steps of a run, after a first."""
    start(ranks, "dpo.train", [*keys, *DECIDED, "--train.run_dir", str(run_dir)])
    return [line["train/step_seconds"] for line in read_metrics(run_dir) if "train/step_seconds" in line][1:]


def main() -> None:
    """Prints the table after each round, and writes measured_estimate.md."""
    parser = argparse.ArgumentParser(prog="tests.bench.measured_estimate", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("bench"))
    arguments = parser.parse_args()
    found: Found = {}
    with tempfile.TemporaryDirectory() as root:
        keys = {name: save(case, Path(root, name)) for name, case in CASES.items()}
        for number in range(arguments.rounds):
            for ranks in arguments.ranks:
                folder = Path(root, f"{ranks}-{number}")
                report = measure(ranks, [*keys[MEASURED], *DECIDED], folder)
                for name in CASES:
                    seconds = train(ranks, keys[name], folder / name)
                    found.setdefault((ranks, name), []).append((predict(ranks, keys[name], report), seconds))
            print(*table(found), sep="\n", flush=True)
    lines = table(found)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "measured_estimate.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines, sep="\n")


Found = dict[tuple[int, str], list[tuple[float, list[float]]]]
"""(ranks, config) -> of each round the predicted seconds, and those of five real steps."""


def table(found: Found) -> list[str]:
    """The rounds as Markdown; seconds of a step, the mean over five."""
    lines = [
        "| ranks | config | predicted, s | real, s | ratio | ratios of the rounds |",
        "|---|---|---:|---:|---:|---|",
    ]
    for (ranks, name), rounds in found.items():
        predicted = statistics.median(seconds for seconds, _ in rounds)
        real = statistics.fmean(min(of_step) for of_step in zip(*(steps for _, steps in rounds), strict=True))
        each = ", ".join(f"{seconds / statistics.fmean(steps):.2f}" for seconds, steps in rounds)
        lines.append(f"| {ranks} | {name} | {predicted:.2f} | {real:.2f} | {predicted / real:.2f} | {each} |")
    return lines


if __name__ == "__main__":
    main()
