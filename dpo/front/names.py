"""The names of `dpo NAME`. A row names its module as text, so that no program is imported before it is chosen."""

from collections.abc import Mapping
from dataclasses import dataclass

from dpo.run_folder.advice import AFTER_REFERENCE, AFTER_TRAINING, BEFORE_FIRST_STEP


@dataclass(frozen=True)
class Command:
    """A program of `dpo NAME`."""

    module: str
    """Run as by `python -m`."""
    about: str
    """One line, for `dpo --help`."""
    after_stop: str = ""
    """Advice after a stop, for a program of which `dpo` starts the ranks."""
    before_steps: str = ""
    """Words before this advice, where the run had not begun its first step."""
    starts_ranks: bool = False
    """Whether `dpo` starts the ranks of this program: it takes --gpus and --ranks."""
    has_config: bool = True
    """Whether the command line holds keys of the config."""
    has_log: bool = False
    """Whether rank 0 writes a log into the run folder of the config."""
    words: str = ""
    """The module that reads the command line; empty: `arguments` of the program's package. It imports no torch, and has
    make_parser(prog) and read_arguments(words, parser)."""

    @property
    def reader(self) -> str:
        """Returns the name of the module that reads the command line."""
        return self.words or f"{self.module}.arguments"


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "dpo.train",
        "train a model on preference pairs",
        AFTER_TRAINING,
        BEFORE_FIRST_STEP,
        starts_ranks=True,
        has_log=True,
        words="dpo.train.words",
    ),
    "prepare": Command("dpo.prepare", "download and tokenize all that a run reads, without GPUs"),
    "inspect": Command("dpo.inspect", "show the data as the trainer will see it"),
    "estimate": Command("dpo.estimate", "predict memory and time of a step on GPUs that are not here"),
    "score": Command("dpo.score", "margins and accuracy of any model on any pairs"),
    "sample": Command("dpo.sample", "answers of models side by side", has_config=False),
    "export": Command("dpo.export", "turn a checkpoint into a model folder", has_config=False),
    "replay": Command(
        "dpo.replay",
        "compute steps of a run again, and compare them to the last bit",
        "the same command starts again",
        starts_ranks=True,
        has_config=False,
    ),
    "reference": Command(
        "dpo.reference", "fill the cache of reference log-probabilities", AFTER_REFERENCE, starts_ranks=True
    ),
    "submit": Command("launch.submit", "send runs or a sweep to SLURM, or start them here", words="launch.arguments"),
    "compare": Command("launch.compare", "compare finished runs in a table", has_config=False, words="launch.compare"),
    "configs": Command(
        "dpo.front.configs", "list the shipped configs, or copy one", has_config=False, words="dpo.front.configs"
    ),
    "doctor": Command(
        "dpo.doctor", "will a run work here, and how fast", "the same command starts again", starts_ranks=True
    ),
    "report": Command("dpo.report", "one page with the curves of a run, or of several", has_config=False),
    "push": Command("dpo.push", "upload the model of a run to the Hugging Face hub", has_config=False),
    "demo": Command("dpo.demo", "a small model learns a preference on two processes", has_config=False),
    "completion": Command(
        "dpo.front.completion", "tab completion for a shell", has_config=False, words="dpo.front.completion"
    ),
}


def help_text() -> str:
    """Returns the text of `dpo --help`."""
    width = max(map(len, COMMANDS))
    rows = (f"  {name.ljust(width)}  {command.about}" for name, command in COMMANDS.items())
    lines = [
        "usage: dpo NAME [WORDS ...]",
        "",
        "  dpo train my.yaml --gpus 8 loss.beta=0.5",
        "",
        *rows,
        "",
        "dpo NAME --help shows the options of a program; dpo --version the version.",
    ]
    return "\n".join(lines)
