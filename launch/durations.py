"""SLURM's formats of a duration."""

import re

from dpo.base.errors import UserError

FORMATS = "MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS"
_WITH_DAYS = re.compile(r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?")
_WITHOUT_DAYS = re.compile(r"((?P<h>\d+):(?=\d+:))?(?P<m>\d+)(:(?P<s>\d+))?")


def minutes_of(text: str) -> int:
    """Returns a duration in minutes, rounded up as SLURM does.

    Raises UserError if `text` has none of SLURM's formats, or is zero (which SLURM reads as no limit at all).
    """
    match = _WITH_DAYS.fullmatch(text) or _WITHOUT_DAYS.fullmatch(text)
    if match is None:
        raise UserError("command line: --time", f"{text!r} is not a duration of SLURM", FORMATS)
    part = {name: int(digits or 0) for name, digits in {"d": "0", **match.groupdict()}.items()}
    seconds = 86400 * part["d"] + 3600 * part["h"] + 60 * part["m"] + part["s"]
    if seconds == 0:
        raise UserError("command line: --time", f"must be above 0, got {text!r}", FORMATS)
    return -(-seconds // 60)
