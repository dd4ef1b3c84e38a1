"""A million pairs beside ten thousand: `python -m tests.bench.million [--out bench/million] [--again]`.

Makes two sets of `format: tokens` (prompts of 20 tokens, of which a quarter come twice, completions of 10, 100 prompts
held out), fills the caches of data and reference for them, then trains five steps of 64 pairs on each, a few times in
turn, in a process of its own with warm caches (`tests.bench.first_step`), and prints a table: seconds from entering
`main` to the end of the first step, imports apart, and the process's private memory after the first step and after the
last.

The model is a Llama of one layer. The reference's rows are not computed (2 million completions would take long) but
drawn at random and written by the cache's own functions, under the name of another model: a run that starts from its
reference would notice. All other work on the way to the first step is that of a real run. `--again` takes the sets that
are there.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.bench.first_step import FirstStep

SIZES = (10_000, 1_000_000)
RUNS = 3
PROMPT, COMPLETION, VOCAB = 20, 10, 1000
ROWS_AT_ONCE = 10_000


def write_pairs(path: Path, num: int) -> None:
    """A JSONL of `num` rows of one pair each; row i has the prompt of row i - 3/4 num, if there is one."""
    with path.open("w", encoding="ascii") as file:
        for start in range(0, num, ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, num))
            rng = np.random.default_rng(start)
            answers = rng.integers(3, VOCAB, (len(rows), 2, COMPLETION)).tolist()
            for i, (chosen, rejected) in zip(rows, answers, strict=True):
                prompt = _prompt(i % (3 * num // 4))
                row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
                file.write(json.dumps(row) + "\n")


def _prompt(number: int) -> list[int]:
    """Digits of the number, then the same for all: different for different numbers, and quick."""
    return [3 + number % 997, 3 + number // 997 % 997, 3 + number // 997**2, *range(3, PROMPT)]


def write_models(out: Path) -> None:
    """model/ and reference/: two Llamas of one layer with other weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for seed, name in enumerate(("model", "reference")):
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=256, eos_token_id=2, bos_token_id=1, **shape)
        LlamaForCausalLM(config).save_pretrained(out / name)


def config_words(out: Path, num: int) -> list[str]:
    """The command line of a run on one of the sets."""
    keys = {
        "model.path": out / "model",
        "reference.path": out / "reference",
        "data.train": json.dumps([{"path": str(out / f"{num}.jsonl"), "format": "tokens", "holdout": 100}]),
        "train.steps": 5,
        "train.run_dir": out / f"run-{num}-{time.time_ns()}",
    }
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def environment(out: Path) -> dict[str, str]:
    """Caches of the benchmark's own, and one thread."""
    return os.environ | {"HF_HOME": str(out / "hf"), "DPO_CACHE": str(out / "cache"), "OMP_NUM_THREADS": "1"}


def fill(out: Path, num: int) -> None:
    """Fills the caches of one set in another process."""
    words = [sys.executable, "-m", "tests.bench.million_fill", *config_words(out, num)]
    subprocess.run(words, env=environment(out), check=True)


def measure(out: Path, num: int) -> FirstStep:
    """One run with warm caches."""
    words = [sys.executable, "-m", "tests.bench.first_step", *config_words(out, num), "--quiet"]
    done = subprocess.run(words, env=environment(out), check=True, stdout=subprocess.PIPE, text=True)
    return FirstStep(**json.loads(done.stdout.splitlines()[-1]))


def prepare(out: Path, again: bool) -> None:
    """Models, sets and caches; tells how long each took."""
    out.mkdir(parents=True, exist_ok=True)
    if not again:
        write_models(out)
    for num in SIZES:
        started = time.perf_counter()
        if not again:
            write_pairs(out / f"{num}.jsonl", num)
        written = time.perf_counter()
        fill(out, num)
        print(f"{num:,} pairs: written in {written - started:.0f} s, read, tokenized and put into the caches in "
              f"{time.perf_counter() - written:.0f} s", flush=True)  # fmt: skip


def table(results: dict[int, list[FirstStep]]) -> list[str]:
    """A line a set, the medians of its runs, and how the large one compares."""
    lines = [f"{'pairs':>10}  {'main to first step, s':>22}  {'private, first step, MB':>24}  {'at the end, MB':>15}"]
    medians = {}
    for num, runs in results.items():
        values = [(run.seconds, run.private_bytes / 1e6, run.private_bytes_at_end / 1e6) for run in runs]
        seconds, first, last = medians[num] = np.median(values, axis=0).tolist()
        lines.append(f"{num:>10,}  {seconds:>22.2f}  {first:>24.1f}  {last:>15.1f}")
    small, large = medians[SIZES[0]], medians[SIZES[1]]
    ratios = [large[i] / small[i] - 1 for i in (1, 2)]
    lines.append(f"{'':>10}  {large[0] - small[0]:>+20.2f} s  {ratios[0]:>+24.1%}  {ratios[1]:>+15.1%}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/million"))
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    out = args.out.resolve()
    prepare(out, args.again)
    results: dict[int, list[FirstStep]] = {num: [] for num in SIZES}
    for _ in range(RUNS):
        for num in SIZES:
            results[num].append(measure(out, num))
    lines = table(results)
    (out / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
