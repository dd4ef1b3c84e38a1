"""Errors about keys, flags and values that do not exist: what was probably meant, and the names that TRL has for it."""

import re
from collections.abc import Collection, Mapping, Sequence

from dpo.base.errors import UserError
from dpo.command.likeness import closest, meant
from dpo.command.line import COMMAND_LINE, SWITCHES, Option
from dpo.config.keys import KEYS, SECTIONS
from dpo.config.trl_names import NOTES, TRL_NAMES, VALUES

NUMBER_OF_RANKS = ("gpus", "gpus-per-node")
"""Our flags, of which a program has one, or none."""
OF_LAUNCHERS: Mapping[str, Sequence[str]] = {
    "num-processes": NUMBER_OF_RANKS,
    "nproc-per-node": NUMBER_OF_RANKS,
    "nproc": NUMBER_OF_RANKS,
    "num-gpus": NUMBER_OF_RANKS,
    "gpus": ("gpus-per-node",),
    "ranks": ("ranks-per-node",),
    "num-machines": ("nodes",),
    "nnodes": ("nodes",),
}
"""Flags of accelerate, torchrun and deepspeed, and of `dpo train` for `dpo submit`, and ours for the same."""


def unknown_key(place: str, key: str, names: Sequence[str]) -> UserError:
    """Returns the error about a key that is not among `names`.

    Args:
        place: the file, or `command line`.
        key: as it was given, with its section.
        names: the names that are valid at its place.
    """
    found = _from_trl(f"{place}: {key}", key)
    if found:
        return found
    section, _, name = key.partition(".")
    guess = f"{section}: {{{name}: VALUE}}" if key in KEYS else _own_name(key) or _close_key(key, names)
    return UserError(f"{place}: {key}", "unknown key" + meant(guess), ", ".join(names))


def unknown_flag(name: str, own: Collection[str], valid: str = "") -> UserError:
    """Returns the error about --NAME, which is no flag of a program that reads a config.

    Args:
        name: without dashes.
        own: the names of the program's own flags.
        valid: what is valid; empty: a list of all flags and sections.
    """
    place, flags = f"{COMMAND_LINE}: --{name}", [*own, "config", *SWITCHES]
    if name in SWITCHES:
        return UserError(place, "takes no value", f"--{name}")
    listed = f"{', '.join(f'--{flag}' for flag in flags)}, and SECTION.KEY=VALUE of {', '.join(SECTIONS)}"
    ours = [flag for flag in OF_LAUNCHERS.get(name.replace("_", "-"), ()) if flag in own]
    found = None if ours else _from_trl(place, name)
    flag = ours[0] if ours else closest(name, flags, 0.75)
    guess = f"--{flag}" if flag else None if name in OF_LAUNCHERS else _near_setting(name)
    return found or UserError(place, "unknown flag" + meant(guess), valid or listed)


def _near_setting(name: str) -> str | None:
    """Returns the key or section that was probably meant by a flag; None where none is like it."""
    return _own_name(name) or closest(name, SECTIONS, 0.75) or _close_key(name, [])


def check_setting(option: Option) -> None:
    """Raises UserError for a word NAME=VALUE, whose name lacks its section, or is TRL's."""
    setting = re.match(r"[A-Za-z]\w*(?==)", option.words[0])
    if setting:
        raise unknown_key(COMMAND_LINE, setting[0], ["FILE.yaml", "SECTION.KEY=VALUE", "--SECTION.KEY VALUE"])


def not_a_key(section: str) -> str:
    """Returns the key that is meant where a section is given a value, as in TRL's `optim: adamw_torch`; or nothing."""
    found = TRL_NAMES.get(section)
    return f"; TRL's {section} is {found.key} here ({found.note})" if found else ""


def wrong_word(key: str, value: str, names: Sequence[str]) -> tuple[str, str]:
    """Returns the fault of a word that is none of the values of a key, and the valid ones.

    Args:
        key: SECTION.KEY, perhaps of an item of a list.
        value: the word.
        names: the values that the key takes.
    """
    name = key.rpartition(".")[2].partition("[")[0]
    what, valid = f"{value!r:.60} is not a {name}", ", ".join(names)
    if (key, value) in NOTES:
        return f"{what}: {NOTES[key, value]}", valid
    return what + meant(VALUES.get(key, {}).get(value) or closest(value, names)), valid


def _from_trl(place: str, key: str) -> UserError | None:
    """Returns the error about a key that TRL has; None where it has none of this name, or ours has the same name."""
    name = _last(key)
    found = TRL_NAMES.get(name)
    if found is None or (found.key is not None and _last(found.key) == name):
        return None
    if found.key is None:
        return UserError(place, f"TRL's {name} has no counterpart: {found.note}", "leave it out")
    note = f" ({found.note})" if found.note else ""
    return UserError(place, f"unknown key; TRL's {name} is {found.key} here{note}", found.key)


def _own_name(key: str) -> str | None:
    """Returns the key of another section with the same name, if there is exactly one."""
    found = [other for other in KEYS if _last(other) == _last(key)]
    return found[0] if len(found) == 1 else None


def _close_key(key: str, names: Sequence[str]) -> str | None:
    """Returns the name that `key` resembles: one of `names`, which are valid at its place, or any key of the config."""
    before, dot, name = key.rpartition(".")
    near = closest(name, names)
    if near is not None:
        return f"{before}{dot}{near}"
    found = closest(name, [_last(other) for other in KEYS], 0.75)
    return closest(key, KEYS, 0.8) or next((other for other in KEYS if found and _last(other) == found), None)


def _last(key: str) -> str:
    return key.rpartition(".")[2].replace("-", "_")
