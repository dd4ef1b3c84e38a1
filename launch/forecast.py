"""What a run needs, by `python -m dpo.estimate --json`.

The estimate runs in a process of its own, since nothing in the launcher imports torch.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dpo.base.errors import UserError
from dpo.command.exits import EXIT_CODES
from dpo.config import Config
from dpo.run_folder.forecast import Forecast, read_forecast
from launch.arguments import Request

PATIENCE_SECONDS = 180.0
"""How long the estimate may take. It reads the data, and tokenizes it where `dpo.prepare` has not."""

DEVICE = "command line: --device"
"""The place of the estimate's error about a device that it does not know."""
LENGTHS = "command line: --prompt-tokens"
"""The place of its error about lengths that it does not know: those of data that only a run downloads."""


class Unknown(Exception):
    """The estimate failed; the message is the reason."""


def ask_forecast(request: Request, words: Sequence[str], config: Config) -> Forecast:
    """Returns the needs of a run. Where reading its data takes too long, or a job prepares it only later, the maximum
    lengths of the config are assumed.

    Args:
        request: gives the ranks and their device.
        words: the command line of the run.
        config: the config of the run.

    Raises:
        UserError: the estimate finds that the input is wrong, unless a job is still to prepare it.
        Unknown: the estimate fails for another reason.
    """
    assumed = _maximum_lengths(config)
    if not (request.prepare and assumed):
        with suppress(subprocess.TimeoutExpired):
            return _ask(request, words)
    if not assumed:
        raise Unknown(f"the data was not read in {PATIENCE_SECONDS:.0f} s, and data.max_length is null")
    try:
        return _ask(request, [*words, *assumed])
    except subprocess.TimeoutExpired:
        raise Unknown(f"the estimate took more than {PATIENCE_SECONDS:.0f} s") from None


def _maximum_lengths(config: Config) -> list[str]:
    """Returns the flags with which the estimate reads no data; none where the config has no maximum length."""
    longest = config.data.max_length
    if longest is None:
        return []
    prompt = config.data.max_prompt_length or longest // 2
    return ["--prompt-tokens", str(prompt), "--completion-tokens", str(longest - prompt)]


def _ask(request: Request, words: Sequence[str]) -> Forecast:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "forecast.json"
        command = [sys.executable, "-m", "dpo.estimate", *words, *_cluster(request), "--json", str(file)]
        environment = {**os.environ, **dict(request.env), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        if file.exists():
            return read_forecast(file)
    lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
    line = lines[-1].removeprefix("error: ")
    is_type_unknown = request.device is None and line.startswith(DEVICE)  # SLURM's name of a type may be any word
    is_own_limit = is_type_unknown or line.startswith(LENGTHS)
    if done.returncode == EXIT_CODES[UserError] and not request.prepare and not is_own_limit:
        raise UserError("the estimate refuses the run", f"{line} (--no-estimate submits it all the same)")
    raise Unknown(line)


def _cluster(request: Request) -> list[str]:
    """Returns the flags that describe the devices."""
    flags = ["--ranks", str(request.nodes * request.ranks_per_node), "--ranks-per-node", str(request.ranks_per_node)]
    if request.measured:
        return [*flags, "--measured", request.measured]
    named = request.device or (request.gpus or "").rpartition(":")[0]
    on_cpu = not named and not request.gpus and not any(name.startswith("g") for name, _ in request.sbatch)
    return [*flags, *(["--device", "cpu" if on_cpu else named] if on_cpu or named else [])]
