"""Examines a rank's machine: host memory, the GPU and its driver, the C compiler and `Python.h`."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo.machine.job import asked_gpus

HIDDEN = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs: the user asks for the CPU."""


@dataclass(frozen=True)
class Gpu:
    """Properties of this rank's GPU, as CUDA reports them."""

    name: str
    capability: tuple[int, int]
    shared_bytes: int | None
    """Maximum shared memory per thread block, in bytes; None where torch does not report it (ROCm)."""


@dataclass(frozen=True)
class Facts:
    """Facts about a rank's machine."""

    host: str
    torch: str
    """The version of torch."""
    cuda: str | None
    """The version of CUDA that torch was built for; None for a build for CPUs or ROCm."""
    archs: tuple[str, ...]
    """Architectures for which this torch has kernels: sm_90, compute_120."""
    driver: str | None
    """Version of the NVIDIA driver; "unknown" if only the device files of GPUs are seen; None without NVIDIA GPUs."""
    is_hidden: bool
    """CUDA_VISIBLE_DEVICES hides all GPUs."""
    asked: str | None
    """The environment variable that says that the job asked for GPUs, as NAME=VALUE; None: it asked for none."""
    num_gpus: int
    """Number of GPUs that the ranks of this machine may use."""
    gpu_index: int | None
    """Index of this rank's GPU, below `num_gpus` if the GPU exists; None if the rank computes on the CPU."""
    cuda_error: str | None
    """Why torch cannot start CUDA; None if CUDA starts, or torch was not built for it."""
    gpu: Gpu | None
    """This rank's GPU; None if the rank computes on the CPU, or CUDA does not start."""
    cc: str | None
    """The environment variable CC."""
    compiler: str | None
    """Path of the C compiler that Triton uses; None if there is none."""
    python_h: str
    """Path at which Triton looks for Python.h."""
    has_python_h: bool
    compile_error: str | None
    """First error of the compiler for a module that includes Python.h; None if it compiles, or was not tried."""


# --- how the facts are found -----------------------------------------------------------------------------------------


def gather_facts(device: torch.device) -> Facts:
    """Gathers the facts of this machine, for a rank that computes on `device`.

    On CUDA it starts a process that starts CUDA (`ask_cuda`), and compiles a C module in about 0.1 s.
    """
    compiler, python_h = find_compiler(), find_header()
    on_cuda, num_gpus = device.type == "cuda", torch.cuda.device_count()
    gpu, cuda_error = (None, None) if on_cuda else (None, find_cuda_error())
    if on_cuda and device.index < num_gpus:
        gpu, cuda_error = ask_cuda(device.index)
    can_compile = on_cuda and compiler is not None and python_h.is_file()
    return Facts(
        host=socket.gethostname(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        archs=tuple(torch.cuda.get_arch_list()),
        driver=find_driver(),
        is_hidden=os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN,
        asked=asked_gpus(os.environ),
        num_gpus=num_gpus,
        gpu_index=device.index if on_cuda else None,
        cuda_error=cuda_error,
        gpu=gpu,
        cc=os.environ.get("CC"),
        compiler=compiler,
        python_h=str(python_h),
        has_python_h=python_h.is_file(),
        compile_error=try_compiler(str(compiler), python_h) if can_compile else None,
    )


ASK_SECONDS = 120
"""Timeout of the process that starts CUDA for `ask_cuda`."""

_ASK = """
import json, sys, torch
gpu = torch.cuda.get_device_properties(int(sys.argv[1]))
shared_bytes = getattr(gpu, "shared_memory_per_block_optin", None)
print(json.dumps([gpu.name, gpu.major, gpu.minor, shared_bytes]))
"""


def ask_cuda(index: int) -> tuple[Gpu | None, str | None]:
    """Returns (the GPU with this index, None), or (None, why CUDA does not start).

    Another process starts CUDA and answers. This process must not start CUDA before the input is read, since reading
    forks, and a process that has started CUDA must not fork.
    """
    command = [sys.executable, "-c", _ASK, str(index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None, f"the driver did not answer in {ASK_SECONDS} s"
    if done.returncode != 0:
        return None, _first_sentence((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    name, major, minor, shared_bytes = json.loads(done.stdout.splitlines()[-1])
    return Gpu(name, (major, minor), shared_bytes), None


def _first_sentence(text: str) -> str:
    """Returns the message of a torch exception without the name of its class and without torch's advice at its end."""
    return re.split(r"\. (?=Please|Alternatively)", re.sub(r"^\w+(Error|Exception): ", "", " ".join(text.split())))[0]


def host_memory() -> tuple[int, int]:
    """Returns (available, total) memory of the host in bytes. The kernel estimates the available bytes: free memory
    and caches that it can drop.
    """
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    return int(sizes["MemAvailable"]) * 1024, int(sizes["MemTotal"]) * 1024


def find_driver(root: Path = Path("/")) -> str | None:
    """Returns the version of the loaded NVIDIA driver, "unknown" if only its device files are seen, None otherwise.

    `root` is the root of the file system, another folder in tests.
    """
    file = root / "proc/driver/nvidia/version"
    if file.is_file():
        version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read_text())
        return version[0] if version else "unknown"
    return "unknown" if any((root / "dev").glob("nvidia[0-9]*")) else None


def find_cuda_error() -> str | None:
    """Returns why a torch that was built for CUDA cannot start it in this process; None if it can, or was not built
    for CUDA. Starts CUDA in this process.
    """
    if torch.version.cuda is None:
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as failure:
        return _first_sentence(str(failure))
    return None


def find_compiler() -> str | None:
    """Returns the path of the C compiler that Triton uses (`triton/runtime/build.py`): $CC if set, else gcc, else
    clang; None if there is none.
    """
    cc = os.environ.get("CC")
    return shutil.which(cc) if cc is not None else shutil.which("gcc") or shutil.which("clang")


def find_header() -> Path:
    """Returns the path at which Triton looks for Python.h.

    The scheme posix_prefix replaces posix_local, Debian's default, whose folder Debian's own packages do not fill.
    """
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    return Path(paths["include"], "Python.h")


def try_compiler(compiler: str, python_h: Path) -> str | None:
    """Compiles a small C module as Triton does. Returns the first error of the compiler, or None if it succeeds."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "module.c")
        source.write_text("#include <dlfcn.h>\n#include <stdlib.h>\n#include <Python.h>\n")
        out = str(source.with_suffix(".so"))
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{python_h.parent}", "-o", out]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as failure:
            return f"{type(failure).__name__}: {failure}"
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
    return None if done.returncode == 0 else (lines or [f"exit code {done.returncode}"])[0].replace(folder, "")
