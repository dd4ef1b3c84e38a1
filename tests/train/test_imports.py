"""What a start imports: a restart computes nothing while it does."""

import subprocess
import sys
from pathlib import Path

from dpo.config import to_yaml
from tests.support.runs import run_until, save_six_steps, six_steps

ROOT = Path(__file__).parents[2]

RUN = """
import sys
from dpo.train import program
LATE = ["datasets", "pandas", "tensorboard", "google.protobuf", "dpo.estimate.stand_in"]
imported = [name for name in LATE if name in sys.modules]
program.main()
print(imported, [name for name in LATE if name in sys.modules])
"""


def test_a_resumed_run_imports_what_it_uses(tmp_path: Path) -> None:
    """Rows in the cache are read without `datasets`; rank 0 alone needs TensorBoard, and a rehearsal its operators."""
    save_six_steps(tmp_path)
    config = six_steps(tmp_path, tmp_path / "run")
    run_until(config, 5)
    (tmp_path / "run.yaml").write_text(to_yaml(config), encoding="utf-8")
    command = [sys.executable, "-c", RUN, "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "resumed at step 4" in done.stderr, done.stderr
    assert done.stdout.splitlines() == ["[] ['tensorboard', 'google.protobuf']"], done.stderr
