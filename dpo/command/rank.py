"""What torchrun's environment says of this process: pure functions of environment variables, without torch."""

from collections.abc import Mapping


def is_rank(environment: Mapping[str, str]) -> bool:
    """Returns whether torchrun, or `dpo`, has started this process as a rank of a run."""
    return "RANK" in environment


def is_main(environment: Mapping[str, str]) -> bool:
    """Returns whether this process speaks for its run: rank 0, or the only process."""
    return environment.get("RANK", "0") == "0"
