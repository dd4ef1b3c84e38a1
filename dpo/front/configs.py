"""Lists the shipped configs, or copies one: `dpo configs`, `dpo configs NAME [OUT]`."""

import argparse
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo.base.errors import UserError
from dpo.base.files import naming
from dpo.command.exits import run_program
from dpo.command.likeness import closest, meant
from dpo.command.line import COMMAND_LINE, Parser, parse_arguments, with_quiet
from dpo.config.shipped import shipped_configs
from dpo.terminal.console import in_one_line

COLUMNS = 120
DESCRIPTION = "Lists the configs that come with the package, or copies one into the current folder."


def named_configs() -> Mapping[str, Path]:
    """Returns the shipped configs by name, without .yaml: pythia-2.8b_hh, data/hh, recipes/zephyr-7b."""
    files = shipped_configs()
    return {file.relative_to(files[0].parent).with_suffix("").as_posix(): file for file in files}


def list_configs() -> str:
    """Returns a line for each shipped config: its name and the first sentence of its comment, at most COLUMNS wide."""
    configs = named_configs()
    width = max(map(len, configs), default=0)
    sentences = {name: first_sentence(file.read_text()) for name, file in configs.items()}
    return "\n".join(
        f"{name.ljust(width)}  {textwrap.shorten(sentence, COLUMNS - width - 2, placeholder=' ...')}"
        for name, sentence in sentences.items()
    )


def first_sentence(text: str) -> str:
    """Returns the first sentence of the comment with which a YAML text begins, without its period; empty where there is
    no comment.
    """
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    joined = " ".join(line.removeprefix("#").strip() for line in comment)
    return re.split(r"\.(?:\s|$)", joined, maxsplit=1)[0]


def copy_config(name: str, out: Path) -> Path:
    """Copies a shipped config, and returns the file.

    Args:
        name: with or without .yaml.
        out: the file, or a folder that exists.

    Raises UserError where no config has this name, or the file exists.
    """
    configs = named_configs()
    source = configs.get(name.removesuffix(".yaml"))
    if source is None:
        what = f"no shipped config has this name{meant(closest(name, configs))}"
        raise UserError(f"{COMMAND_LINE}: {name}", what, "a name that `dpo configs` lists")
    file = out / source.name if out.is_dir() else out
    if file.exists():
        raise UserError(str(file), "is there already", "another OUT, or remove the file")
    with naming(file, source.stat().st_size):
        shutil.copyfile(source, file)
    return file


def make_parser(prog: str = "dpo configs") -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(prog, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a config of the list (default: print the list)")
    parser.add_argument("out", nargs="?", type=Path, default=Path(), metavar="OUT", help="file or folder (default: .)")
    return with_quiet(parser)


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help.
    """
    return parse_arguments(parser or make_parser(), words)


def main() -> None:
    """Runs `dpo configs`."""
    arguments = read_arguments()
    print(list_configs() if arguments.name is None else in_one_line(str(copy_config(arguments.name, arguments.out))))


if __name__ == "__main__":
    sys.exit(run_program(main))
