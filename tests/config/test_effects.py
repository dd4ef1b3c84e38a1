"""Each key of the config changes the result of a run, or does not: the lists by which runs are compared."""

import pytest

from dpo.config.effects import CHANGING, NEUTRAL, SEED
from dpo.config.keys import KEYS


def test_every_key_stands_in_one_of_the_lists_once() -> None:
    """A new key must be classified: does a run with another value learn, or measure, something else?"""
    assert sorted(CHANGING + NEUTRAL) == sorted(KEYS)


@pytest.mark.parametrize("key", ["parallel.compute_dtype", "parallel.tf32", "data.eval", "reference.path", SEED])
def test_precision_data_and_seed_change_the_result(key: str) -> None:
    assert key in CHANGING


@pytest.mark.parametrize("key", ["batch.tokens_per_micro_batch", "parallel.shard", "data.num_proc", "train.report_to"])
def test_layout_processes_and_sinks_do_not(key: str) -> None:
    """The help of these keys says that the result is the same."""
    assert key in NEUTRAL
