"""The command line of `python -m dpo.estimate`. Without torch, so that a wrong word is answered at once."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import UserError
from dpo.command.line import Parser, names_of, own_flags, split_words
from dpo.config import Config, load_config
from dpo.estimate.report import Report
from dpo.estimate.report_file import read_report
from dpo.machine.data_sheets import DEFAULT_MFU, SHEETS, find_sheet

DEFAULT_RANKS_PER_NODE, DEFAULT_DEVICE = 8, "h100"

DESCRIPTION = """Says whether a step fits and what it costs; needs no GPU and no weights, of a model only config.json.
The exit code is 1 where it does not fit."""


SHEET_KEYS = tuple(sheet.key for sheet in SHEETS)


@dataclass(frozen=True)
class Words:
    """The command line, before anything is computed of it."""

    own: argparse.Namespace
    """The program's own flags."""
    config: Config
    report: Report | None
    """Of --measured."""


def make_parser(prog: str = "python -m dpo.estimate") -> Parser:
    """Returns the parser of the program's own flags."""
    parser = own_flags(prog, DESCRIPTION, "--ranks 16 --device h100")
    for flag, about in {
        "--ranks": "number of GPUs of all nodes (default: parallel.shard x parallel.replicate)",
        "--ranks-per-node": f"GPUs per node (default: {DEFAULT_RANKS_PER_NODE}, or that of the report of --measured)",
        "--prompt-tokens": "tokens of every prompt (default: the lengths of the data)",
        "--completion-tokens": "tokens of every completion (default: the lengths of the data)",
    }.items():
        parser.add_argument(flag, type=int, metavar="N", help=about)
    about = f"one of {', '.join(SHEET_KEYS)}, or cpu, this machine (default: {DEFAULT_DEVICE})"
    parser.add_argument("--device", metavar="NAME", help=about)
    for flag, about in {
        "--mfu": f"share of the device's peak that the arithmetic reaches while it runs (default: {DEFAULT_MFU})",
        "--link-gb-s": "GB a second and GPU in one direction within a node (default: the device's)",
        "--node-link-gb-s": "GB a second and GPU in one direction between nodes (default: the device's)",
    }.items():
        parser.add_argument(flag, type=float, metavar="X", help=about)
    about = "report of dpo.doctor --report, whose numbers take the place of the data sheet's (default: the data sheet)"
    parser.add_argument("--measured", metavar="FILE", help=about)
    about = "file for what the run needs: seconds, memory of the hosts, bytes on disk (default: none)"
    parser.add_argument("--json", type=Path, metavar="FILE", help=about)
    return parser


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> Words:
    """Returns the command line in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help and --print_config.
    """
    own, rest = split_words(parser or make_parser(), words)
    config = load_config(rest, "dpo.estimate", own=names_of(own))
    for name, value in vars(own).items():
        if name not in ("device", "measured", "json") and value is not None and not value > 0:
            raise UserError(f"command line: --{name.replace('_', '-')}", f"must be > 0, got {value}", "a number > 0")
    if own.mfu is not None and own.mfu > 1:
        raise UserError("command line: --mfu", f"must be <= 1, got {own.mfu}", "a share of the peak, like 0.4")
    if own.device not in (None, "cpu"):
        device_key(own.device)
    return Words(own, config, read_report(own.measured) if own.measured else None)


def device_key(name: str) -> str:
    """Returns the key of the data sheet with this key, or with this name as CUDA or SLURM gives it:
    nvidia_h100_80gb_hbm3. Raises UserError where there is none.
    """
    if name in SHEET_KEYS:
        return name
    sheet = find_sheet(name.replace("_", " "))
    if sheet is None:
        raise UserError("command line: --device", f"no such device: {name}", f"{', '.join(SHEET_KEYS)}, cpu")
    return sheet.key
