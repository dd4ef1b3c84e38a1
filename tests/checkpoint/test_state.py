"""The state.json of a checkpoint that came from elsewhere, with a marker that matches."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo.base.errors import UserError
from dpo.checkpoint.marker import STATE
from dpo.checkpoint.plans import forget_plans
from dpo.checkpoint.state import read_state
from dpo.distributed.startup import open_world
from tests.support.checkpoints import remark, save, shelf_of


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of step 1."""
    with open_world(60) as world:
        yield save(shelf_of(tmp_path, None, world), 1)
    forget_plans(f"plans of {tmp_path}")


def rewrite(folder: Path, **changed: object) -> None:
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps(state | changed))
    remark(folder)


@pytest.mark.parametrize(
    "changed",
    [
        {"step": "1"},
        {"finite": 1},
        {"identity": {"model_files": None}},
        {"identity": {"model_files": 3}},
        {"identity": {"model_files": ["model.path"]}},
        {"identity": {"model_files": {"model.path": 3}}},
        {"identity": {"model_files": {"model.path": {"config.json": 3}}}},
        {"identity": {"shares": None}},
        {"identity": {"shares": 3}},
        {"identity": {"shares": {"data.train[0].weight": "0.5"}}},
        {"identity": {"shares": {"data.train[0].weight": True}}},
    ],
)
def test_a_field_of_another_form_is_told(folder: Path, changed: dict[str, object]) -> None:
    rewrite(folder, **changed)
    with pytest.raises(UserError, match=r"checkpoint\.resume: .*step-000001/state\.json: not the state of a run"):
        read_state(folder, "checkpoint.resume")


@pytest.mark.parametrize(
    "identity",
    [
        {},
        {"model_files": {}, "shares": {}},
        {"model_files": {"model.path": {"config.json": "0" * 64}}, "shares": {"data.train[0].count": 7}},
        {"shares": {"data.train[0].weight": 0.5}},
    ],
)
def test_identities_of_a_run(folder: Path, identity: dict[str, object]) -> None:
    """Checkpoints of older versions have neither."""
    rewrite(folder, identity=identity)
    assert read_state(folder, "").identity == identity
