"""Failures of one rank on all of them, over real gloo ranks."""

import pytest

from dpo.base.errors import UserError
from dpo.distributed.collectives import on_main, together
from dpo.distributed.startup import open_world
from tests.support.ranks import Ranks

pytestmark = pytest.mark.xdist_group("ranks")

FIELDS = ("data.train[0].path", "no such file: a.jsonl", "a file")


def fail() -> None:
    """Raises the error whose fields must arrive."""
    raise UserError(*FIELDS)


def caught_together() -> tuple[type, str, str, str, str]:
    """What each rank catches where rank 1 alone fails: gathered."""
    with open_world(60) as world, pytest.raises(UserError) as caught:
        together(fail if world.rank == 1 else lambda: None)
    return _parts(caught.value)


def caught_on_main() -> tuple[type, str, str, str, str]:
    """What each rank catches where rank 0 works for all: broadcast."""
    with open_world(60) as world, pytest.raises(UserError) as caught:
        on_main(world, fail)
    return _parts(caught.value)


def _parts(error: UserError) -> tuple[type, str, str, str, str]:
    return type(error), error.place, error.what, error.valid, str(error)


@pytest.mark.parametrize("work", [caught_together, caught_on_main])
def test_an_error_has_its_fields_on_every_rank(work, ranks: Ranks) -> None:
    line = "data.train[0].path: no such file: a.jsonl; valid: a file"
    assert ranks(2, work) == [(UserError, *FIELDS, line)] * 2
