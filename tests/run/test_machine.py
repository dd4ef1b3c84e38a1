"""A job that asked for GPUs and has none is refused before its model is looked for and its data is read."""

from pathlib import Path
from unittest.mock import patch

import pytest

from dpo.base.errors import UserError
from dpo.run import inputs
from tests.machine.test_toolchain import CPU_JOB, NO_GPU, facts
from tests.support.runs import changed, run, six_steps


@pytest.mark.parametrize(("job", "told"), [(CPU_JOB, "asked for GPUs"), ({**NO_GPU, "driver": None}, "model.path")])
def test_gpus_are_asked_for_before_the_model(job: dict[str, object], told: str, tmp_path: Path) -> None:
    """The model and the data do not exist; without such a job this is what is told."""
    config = changed(six_steps(tmp_path, tmp_path / "run"), model__path="/nowhere")
    with (
        patch.object(inputs, "gather_facts", lambda device: facts(**job)),
        pytest.raises(UserError, match=told),
    ):
        run(config)
