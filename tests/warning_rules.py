"""Which warnings fail a test: all but those listed here where torch and transformers are those of constraints.txt.

What is left open (ResourceWarning, told by a destructor, hence as an unraisable exception) fails a test too: the
project closes its files, pipes and processes. A leak of a library is listed by its message.

With other versions what warns is not ours to choose, and all are ignored; conftest.py takes the hook from here.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
JUDGED = ("torch", "transformers")

IGNORED: Mapping[str, str] = {
    "ignore:html5lib's sanitizer:DeprecationWarning": "TensorBoard's own import, through bleach",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning": "torch's inductor, of torch's own code",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning": "torch's dynamo looks at every attribute",
    "ignore:.class 'torch.autograd.function.Function'. should not be instantiated:DeprecationWarning": (
        "torch's dynamo, of an autograd function in a compiled layer"
    ),
    "ignore:DTensor random operators may not have complete support:UserWarning": "none is used",
    "ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning": "inductor; off on purpose",
    "ignore:Synchronization debug mode is a prototype:UserWarning": "tests/gpu ask torch to raise where the host waits",
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning": "torch's dynamo, on this one bug-fix release",
    "ignore:FSDP2-wrapped module .FSDPOPTDecoderLayer. returned a view:UserWarning": "OPT writes into none",
}
"""Filters of warnings that are no faults, with the reason."""


def filters(installed: Mapping[str, str], constraints: str) -> Sequence[str]:
    """The lines for pytest's filterwarnings, the last one that matches decides; `constraints`: the file's text."""
    pinned = dict(line.split("==") for line in constraints.split())
    if any(installed[name].partition("+")[0] != pinned[name] for name in JUDGED):
        return ["ignore"]
    return ["error", *IGNORED]


def pytest_configure(config: pytest.Config) -> None:
    """Sets the filters; a test's own mark comes after them."""
    for line in filters({name: version(name) for name in JUDGED}, CONSTRAINTS.read_text()):
        config.addinivalue_line("filterwarnings", line)
