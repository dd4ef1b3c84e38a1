"""What is built ahead, when, and what becomes of a failure."""

import threading
from contextlib import closing

import pytest

from dpo.base.prefetch import prefetch


def nothing() -> None:
    """Prepares nothing."""


def test_in_order_and_nothing_is_left_out() -> None:
    assert list(prefetch(str, range(5), nothing)) == ["0", "1", "2", "3", "4"]
    assert list(prefetch(str, [], nothing)) == []


def test_the_next_is_built_while_this_one_is_used() -> None:
    """With item 0 in hand, item 1 is built by another thread without anyone asking; item 2 is not begun before 1 is
    asked for: no more than one step's tensors wait.
    """
    built = [threading.Event() for _ in range(3)]
    threads = []

    def build(item: int) -> int:
        threads.append(threading.current_thread())
        built[item].set()
        return item

    with closing(prefetch(build, range(3), nothing)) as results:
        assert next(results) == 0
        assert built[1].wait(30)
        assert not built[2].is_set()
        assert next(results) == 1
        assert built[2].wait(30)
    assert threading.current_thread() not in threads
    assert len(set(threads)) == 1


def test_a_failure_comes_in_its_place() -> None:
    """Items 0 and 1 are good, 2 is not."""
    results = prefetch(lambda item: 1 // (2 - item), range(4), nothing)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_no_thread_is_left_behind() -> None:
    with closing(prefetch(str, range(9), nothing)) as results:
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
