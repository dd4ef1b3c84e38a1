"""Refuses the code of a model's repository where only the config of a run folder asks for it: that may be anybody's."""

from dpo.base.errors import UserError
from dpo.config import Config


def check_own_code(config: Config, is_trusted: bool, key: str) -> None:
    """Raises UserError, with the place `key`, where the config of a run folder asks for code that was not asked for on
    the command line too.
    """
    if config.model.trust_remote_code and not is_trusted:
        what = f"this run runs the code of the repository {config.model.path}"
        raise UserError(key, what, "with --trust-remote-code, if you trust it")
