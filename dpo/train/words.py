"""The command line of the training program. Without torch, so that a wrong word is answered at once."""

import sys
from collections.abc import Sequence

from dpo.config import Config, load_config

DESCRIPTION = """Trains a model by Direct Preference Optimization. On one node with eight GPUs: dpo train FILE.yaml
--gpus 8, or torchrun --standalone --nproc-per-node 8 -m dpo.train --config FILE.yaml. Without torchrun, python -m
dpo.train runs on one rank."""


def read_config(words: Sequence[str] | None = None) -> Config:
    """Returns the config that the words give; None: the words of this process. Raises UserError, and SystemExit after
    --help.
    """
    return load_config(sys.argv[1:] if words is None else words, prog="dpo.train", description=DESCRIPTION)
