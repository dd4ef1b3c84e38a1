"""The command line of `python -m dpo.doctor`. Without torch, so that a wrong word is answered at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import UserError
from dpo.command.line import Parser, names_of, own_flags, split_words
from dpo.config import Config, load_config
from dpo.config.reading import split_command_line

DESCRIPTION = """Shows on one screen whether a run would work here and how fast the machine is: devices, versions,
compiler, matrix products, all-gathers, the disks of the run folder and of the cache, the memory that the model takes
per rank, and attention against plain attention. Start it as the run would be started, alone or under torchrun. With
FILE.yaml it examines the run's mesh, folders and model, without it the defaults. The exit code is 1 where a run would
fail."""

TIMEOUT_SECONDS = 300
"""A collective that takes longer ends the program: a network that does not work must show soon."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    config: Config | None
    """None where none is given."""
    report: Path | None
    """The file of --report, which needs a config."""

    @property
    def timeout_seconds(self) -> int:
        """Returns the timeout of collectives until the devices start: for a report, data may be tokenized by then."""
        imported = TIMEOUT_SECONDS + int(os.environ.get("WORLD_SIZE", "1"))  # see `distributed.timeouts`
        if self.config is None or self.report is None:
            return imported
        return max(imported, self.config.parallel.setup_timeout_seconds)


def make_parser(prog: str = "python -m dpo.doctor") -> Parser:
    """Returns the parser of the program's own flags."""
    parser = own_flags(prog, DESCRIPTION, "--report nodes.json")
    about = "also time five steps of the config with random weights, and write all measurements as JSON, without names,"
    about += " paths or data, for dpo.estimate --measured FILE (default: no steps are timed)"
    parser.add_argument("--report", metavar="FILE", help=about)
    return parser


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> Arguments:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help and --print_config.
    """
    own, rest = split_words(parser or make_parser(), words)
    line = split_command_line(rest, names_of(own))
    is_bare = line.config is None and not line.texts and not line.switches - {"quiet"}
    if own.report is not None and (is_bare or Path(own.report).is_dir()):
        what = "needs a config, whose steps are timed" if is_bare else f"{own.report} is a folder"
        raise UserError("command line: --report", what, "--config FILE --report REPORT.json")
    config = None if is_bare else load_config(rest, "dpo.doctor", own=names_of(own))
    return Arguments(config, Path(own.report) if own.report else None)
