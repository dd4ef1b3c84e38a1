"""Compiled layers: counted by kind, none after the second length; where their kernels are kept."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from dpo.config import ParallelConfig
from dpo.model.kernels import VARIABLES, compile_layers, describe_graphs, keep_kernels, kernel_folder, num_graphs
from dpo.model.parallelize import is_compiled
from dpo.run import loop as program
from tests.support.runs import run, save_six_steps, six_steps

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("compile", "on_cuda", "on_cpu"), [("auto", True, False), (True, True, True), (False, False, False)]
)
def test_auto_is_on_cuda(compile: object, on_cuda: bool, on_cpu: bool) -> None:
    parallel = ParallelConfig(compile=compile)  # type: ignore[arg-type]
    assert is_compiled(parallel, torch.device("cuda", 3)) is on_cuda
    assert is_compiled(parallel, torch.device("cpu")) is on_cpu


# --- graphs ----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A norm, whose fusion with a reduction over the tokens guards their number on CUDA, and a product."""

    def __init__(self, window: int | None, size: int = 8):
        super().__init__()
        self.norm, self.product, self.sliding_window = nn.RMSNorm(size), nn.Linear(size, size), window

    def forward(self, rows: Tensor) -> Tensor:
        """(1, L, size) to the same shape."""
        return rows + self.product(self.norm(rows)) * (self.sliding_window or 1)


def run_lengths(layers: list[Layer], lengths: tuple[int, ...], with_gradients: bool) -> None:
    """Rows of these lengths, whose gradient is wanted as that of embeddings is."""
    for length in lengths:
        with torch.set_grad_enabled(with_gradients):
            rows = torch.randn(1, length, layers[0].norm.weight.shape[0], requires_grad=with_gradients)
            for layer in layers:
                rows = layer(rows)
        if with_gradients:
            rows.sum().backward()


ANY_ORDER = (16384, 640, 8192, 1280, 8064, 512, 1024)


def test_no_length_is_compiled_after_the_second() -> None:
    """By inductor, forward and backward. Without gradients there is one graph, the length being an unknown by then.

    Up to 4,096 tokens: inductor's backward on a CPU guards that length for so narrow a norm.
    """
    torch.compiler.reset()
    layers = [Layer(None), Layer(None)]
    graphs = compile_layers(layers)
    for with_gradients in (True, False):
        run_lengths(layers, (512, 768), with_gradients)
    assert graphs == {("Layer", True): 2, ("Layer", False): 1}
    before = num_graphs()
    for with_gradients in (False, True):
        run_lengths(layers, (4096, 640, 2048, 1280, 512, 1024), with_gradients)
    assert num_graphs() == before
    torch.compiler.reset()


def test_each_kind_of_layer_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Gemma 3, where five layers with a window are followed by one without. Two references of other sizes in the
    same process stay under torch's limit of graphs, behind which layers would run uncompiled.
    """
    torch.compiler.reset()
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda layer, options: compile_module(layer, backend="aot_eager"))
    for size in (8, 16, 24):
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


def test_a_compiled_layer_is_the_layer() -> None:
    torch.compiler.reset()
    layer, plain = Layer(None), Layer(None)
    plain.load_state_dict(layer.state_dict())
    compile_layers([layer])
    rows = torch.randn(1, 256, 8)
    torch.testing.assert_close(layer(rows), plain(rows))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    torch.compiler.reset()


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


def test_the_folder_that_inductor_sets_itself_is_not_the_users(tmp_path: Path) -> None:
    """In a process that has imported all of a run: importing inductor sets the variable to a folder in /tmp."""
    show = "from dpo import train; from dpo.model.kernels import keep_kernels; import os; keep_kernels()"
    show += "; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    environment = os.environ | {"DPO_CACHE": str(tmp_path)}
    found = {}
    for folder in (None, str(tmp_path / "mine")):
        own = {"TORCHINDUCTOR_CACHE_DIR": folder} if folder else {}
        rest = {name: value for name, value in environment.items() if name not in VARIABLES}
        done = subprocess.run([sys.executable, "-c", show], env=rest | own, capture_output=True, text=True, check=True)
        found[folder] = done.stdout.strip()
    assert found == {None: f"{tmp_path}/kernels/inductor", str(tmp_path / "mine"): str(tmp_path / "mine")}


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


def compile_once() -> None:
    """What a start does, in a process of its own: prints how many graphs it found compiled, and how many not."""
    keep_kernels()
    layer = Layer(None)
    compile_layers([layer])
    for with_gradients in (True, False):
        run_lengths([layer], (256, 384), with_gradients)
    print(json.dumps({name: counters["inductor"]["fxgraph_cache_" + name] for name in ("hit", "miss", "bypass")}))


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    """It finds every graph, forward and backward, in the folder of the first, and writes no code there."""
    environment = os.environ | {"DPO_CACHE": str(tmp_path)}
    for variable in VARIABLES:
        environment.pop(variable, None)
    code = "from tests.model.test_kernels import compile_once; compile_once()"
    found, files = [], []
    for _ in range(2):
        start = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=REPO, check=True, capture_output=True, text=True
        )
        found.append(json.loads(start.stdout))
        files.append(set((tmp_path / "kernels").rglob("*.so")))
    # Forward and backward for the first length, the same for any, forward without gradients.
    assert found == [{"hit": 0, "miss": 5, "bypass": 0}, {"hit": 5, "miss": 0, "bypass": 0}]
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
