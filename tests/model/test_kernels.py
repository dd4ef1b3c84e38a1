"""Compiled layers: counted by kind, none after the second length; where their kernels are kept."""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from dpo.config import ParallelConfig
from dpo.model.kernels import VARIABLES, compile_layers, describe_graphs, keep_kernels, kernel_folder, num_graphs
from dpo.model.parallelize import is_compiled
from dpo.train import loop as program
from tests.model.small_layer import Layer, run_lengths
from tests.support.processes import start_program
from tests.support.runs import run, save_six_steps, six_steps


@pytest.mark.parametrize(
    ("compile", "on_cuda", "on_cpu"), [("auto", True, False), (True, True, True), (False, False, False)]
)
def test_auto_is_on_cuda(compile: object, on_cuda: bool, on_cpu: bool) -> None:
    parallel = ParallelConfig(compile=compile)  # type: ignore[arg-type]
    assert is_compiled(parallel, torch.device("cuda", 3)) is on_cuda
    assert is_compiled(parallel, torch.device("cpu")) is on_cpu


# --- graphs ----------------------------------------------------------------------------------------------------------


ANY_ORDER = (16384, 640, 8192, 1280, 8064, 512, 1024)


def test_no_length_is_compiled_after_the_second() -> None:
    """By inductor, forward and backward, to what the layer was. Without gradients there is one graph, the length being
    an unknown by then.

    Up to 4,096 tokens: inductor's backward on a CPU guards that length for so narrow a norm.
    """
    torch.compiler.reset()
    layers, plain = [Layer(None), Layer(None)], Layer(None)
    plain.load_state_dict(layers[0].state_dict())
    graphs = compile_layers(layers)
    for with_gradients in (True, False):
        run_lengths(layers, (512, 768), with_gradients)
    assert graphs == {("Layer", True): 2, ("Layer", False): 1}
    before = num_graphs()
    for with_gradients in (False, True):
        run_lengths(layers, (4096, 640, 2048, 1280, 512, 1024), with_gradients)
    assert num_graphs() == before
    rows = torch.randn(1, 768, 8)
    torch.testing.assert_close(layers[0](rows), plain(rows))
    assert layers[0].state_dict().keys() == plain.state_dict().keys()
    torch.compiler.reset()


def test_each_kind_of_layer_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Gemma 3, where five layers with a window are followed by one without. A reference of another size in the
    same process stays under torch's limit of graphs, behind which layers would run uncompiled.
    """
    torch.compiler.reset()
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda layer, options: compile_module(layer, backend="aot_eager"))
    for size in (8, 16):
        layers = [Layer(4, size), Layer(None, size), Layer(4, size)]
        graphs = compile_layers(layers)
        for with_gradients in (True, False):
            run_lengths(layers, (512, 768, 640), with_gradients)
        assert set(graphs) == {(kind, way) for kind in ("Layer", "Layer, window 4") for way in (True, False)}
        before = num_graphs()
        run_lengths(layers, ANY_ORDER, True)
        assert num_graphs() == before
    torch.compiler.reset()


def test_graphs_are_told_by_kind() -> None:
    counts = {("B", True): 1, ("A, window 4", True): 2, ("A, window 4", False): 1}
    wanted = "A, window 4: 2 graphs with gradients, 1 without; B: 1 graph with gradients, 0 without"
    assert describe_graphs(counts) == wanted


# --- kept ------------------------------------------------------------------------------------------------------------


def test_kernels_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user names a folder, that one stays."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    environment = {"TRITON_CACHE_DIR": "/mine"}
    keep_kernels(environment)
    assert environment == {"TRITON_CACHE_DIR": "/mine", "TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/kernels/inductor"}
    assert (tmp_path / "kernels" / "inductor").is_dir()


def test_inductor_looks_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after torch has set its own folder, as it does when its compiler is imported, before a run sets this one."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert not cache_dir().startswith(str(tmp_path))
    keep_kernels(os.environ)
    try:
        assert cache_dir() == f"{tmp_path}/kernels/inductor"
    finally:
        for variable in VARIABLES:
            os.environ.pop(variable, None)


def test_the_folder_that_inductor_sets_itself_is_not_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing inductor sets the variable to a folder in /tmp, unless the user has: this process has imported it."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    inductors = {"TORCHINDUCTOR_CACHE_DIR": default_cache_dir()}
    users = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "mine")}
    for environment, folder in ((inductors, f"{tmp_path}/kernels/inductor"), (users, str(tmp_path / "mine"))):
        keep_kernels(environment)
        assert environment["TORCHINDUCTOR_CACHE_DIR"] == folder


def no_locks(file: object, operation: int) -> None:
    """What flock does on an NFS without a lock daemon."""
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("fault", ["not a folder", "no locks"])
def test_a_folder_that_cannot_be_used_is_told_once_a_node(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kernels then lie in torch's own folder; a second policy's start and the other ranks say nothing."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "file" if fault == "not a folder" else tmp_path))
    if fault == "no locks":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    environment = {"LOCAL_RANK": "0"}
    keep_kernels(environment)
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir() == kernel_folder(environment)
    assert environment["TRITON_CACHE_DIR"] == f"{default_cache_dir()}/triton"
    (line,) = capsys.readouterr().err.splitlines()
    assert f"compiled kernels are kept in {default_cache_dir()}, not in {tmp_path}" in line
    keep_kernels(environment)
    keep_kernels({"LOCAL_RANK": "1"})
    assert capsys.readouterr().err == ""


def test_the_users_own_folder_stays_where_ours_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    environment = {"TORCHINDUCTOR_CACHE_DIR": "/mine"}
    keep_kernels(environment)
    assert kernel_folder(environment) == "/mine" and environment["TRITON_CACHE_DIR"] == "/mine/triton"
    assert "compiled kernels are kept in /mine, not in" in capsys.readouterr().err


def test_no_lock_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    keep_kernels({})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


COMPILE_ONCE = """
import json, pathlib, sys
from tests.model.small_layer import compile_once
pathlib.Path(sys.argv[1]).write_text(json.dumps(compile_once()))
"""


def test_a_second_start_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds every graph, forward and backward, in the folder of the first, and writes no code there."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    found, files = [], []
    for number in ("first", "second"):
        start = start_program(COMPILE_ONCE, [str(tmp_path / number)], tmp_path / "stderr")
        start.join()
        assert start.exitcode == 0, (tmp_path / "stderr").read_text()
        found.append(json.loads((tmp_path / number).read_text()))
        files.append(set((tmp_path / "kernels").rglob("*.so")))
    assert found == [{"hit": 0, "miss": 2, "bypass": 0}, {"hit": 2, "miss": 0, "bypass": 0}]
    assert files[0] and files[1] == files[0]


# --- what is told in a run -------------------------------------------------------------------------------------------


def test_who_compiled_is_told_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluations run before the first step and after steps 3 and 6: two graphs of each are not those of the step
    that follows it, which makes one of its own in step 4.
    """

    def compiling(name: str, graphs: int, is_time: Callable[..., bool]) -> None:
        work = getattr(program, name)

        def wrapped(*args: Any) -> Any:
            counters["stats"]["unique_graphs"] += graphs if is_time(*args) else 0
            return work(*args)

        monkeypatch.setattr(program, name, wrapped)

    compiling("evaluate", 2, lambda *args: True)
    compiling("_step", 1, lambda run, step, ahead: step == 4)
    monkeypatch.setitem(counters["stats"], "unique_graphs", 0)
    run(six_steps(save_six_steps(tmp_path), tmp_path / "run"))
    told = [line for line in capsys.readouterr().err.splitlines() if "graphs were compiled" in line]
    assert [line.partition(" more ")[0] for line in told] == [
        "WARNING: evaluation after step 0: 2",
        "WARNING: evaluation after step 3: 2",
        "WARNING: step 4: 1",
        "WARNING: evaluation after step 6: 2",
    ]
