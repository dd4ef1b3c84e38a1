"""What a rank's machine has: the host's memory, and for its GPU the driver, C compiler, `Python.h`, the GPU itself."""

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

HIDDEN = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES with which a user asks for the CPU."""


@dataclass(frozen=True)
class Gpu:
    """What CUDA tells of this rank's GPU."""

    name: str
    capability: tuple[int, int]
    shared_bytes: int | None
    """Most shared memory that one block of threads can have; None where torch does not tell it (ROCm)."""


@dataclass(frozen=True)
class Facts:
    """What is found on a rank's machine."""

    host: str
    torch: str
    """Its version."""
    cuda: str | None
    """The version of CUDA that torch was built for; None of a build for CPUs or ROCm."""
    archs: tuple[str, ...]
    """Architectures that this torch has kernels for: sm_90, compute_120."""
    driver: str | None
    """Version of the NVIDIA driver, "unknown" where there is a GPU all the same; None without NVIDIA GPUs."""
    is_hidden: bool
    """CUDA_VISIBLE_DEVICES asks for the CPU."""
    num_gpus: int
    """GPUs that the ranks of this machine may use."""
    gpu_index: int | None
    """The number of this rank's GPU among them; None where the rank computes on the CPU."""
    cuda_error: str | None
    """Why torch cannot start CUDA; None where it can, or was not built for it."""
    gpu: Gpu | None
    """None where the rank computes on the CPU, or CUDA does not start."""
    cc: str | None
    """The variable CC."""
    compiler: str | None
    """The C compiler that Triton takes; None where there is none."""
    python_h: str
    """Where Triton looks for Python.h."""
    has_python_h: bool
    compile_error: str | None
    """What the compiler says of a module that includes Python.h; None where it compiles, or was not tried."""


# --- looked for ------------------------------------------------------------------------------------------------------


def gather_facts(device: torch.device) -> Facts:
    """What is found here, for a rank that computes on `device`. On CUDA a module is compiled: a tenth of a second."""
    compiler, python_h = find_compiler(), find_header()
    on_cuda, num_gpus = device.type == "cuda", torch.cuda.device_count()
    gpu, cuda_error = (None, None) if on_cuda else (None, find_cuda_error())
    if on_cuda and device.index < num_gpus:
        gpu, cuda_error = ask_cuda(device.index)
    complete = on_cuda and compiler is not None and python_h.is_file()
    return Facts(
        host=socket.gethostname(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        archs=tuple(torch.cuda.get_arch_list()),
        driver=find_driver(),
        is_hidden=os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN,
        num_gpus=num_gpus,
        gpu_index=device.index if on_cuda else None,
        cuda_error=cuda_error,
        gpu=gpu,
        cc=os.environ.get("CC"),
        compiler=compiler,
        python_h=str(python_h),
        has_python_h=python_h.is_file(),
        compile_error=try_compiler(str(compiler), python_h) if complete else None,
    )


ASK_SECONDS = 120
"""How long another process may take to start CUDA."""

_ASK = """
import json, sys, torch
found = torch.cuda.get_device_properties(int(sys.argv[1]))
shared_bytes = getattr(found, "shared_memory_per_block_optin", None)
print(json.dumps([found.name, found.major, found.minor, shared_bytes]))
"""


def ask_cuda(index: int) -> tuple[Gpu | None, str | None]:
    """(the GPU of this number, None), or (None, why CUDA does not start).

    Asks another process, which starts CUDA: in this one it must not be started before the input is read, since a
    process with a live CUDA state may not fork.
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
    """torch's own words, without the exception's class and the advice that follows."""
    return re.split(r"\. (?=Please|Alternatively)", re.sub(r"^\w+(Error|Exception): ", "", " ".join(text.split())))[0]


def host_memory() -> tuple[int, int]:
    """(free, all) bytes of the host, as the kernel counts what a program could still have."""
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    return int(sizes["MemAvailable"]) * 1024, int(sizes["MemTotal"]) * 1024


def find_driver(root: Path = Path("/")) -> str | None:
    """The version of the NVIDIA driver that this kernel has loaded, "unknown" where only its devices are seen."""
    file = root / "proc/driver/nvidia/version"
    if file.is_file():
        version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read_text())
        return version[0] if version else "unknown"
    return "unknown" if any((root / "dev").glob("nvidia[0-9]*")) else None


def find_cuda_error() -> str | None:
    """Why torch, where it was built for CUDA, cannot start it in this process."""
    if torch.version.cuda is None:
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as failure:
        return _first_sentence(str(failure))
    return None


def find_compiler() -> str | None:
    """The C compiler that Triton takes (`triton/runtime/build.py`): CC if that is set, else gcc, else clang."""
    wish = os.environ.get("CC")
    return shutil.which(wish) if wish is not None else shutil.which("gcc") or shutil.which("clang")


def find_header() -> Path:
    """Where Triton looks for Python.h; Debian's scheme posix_local names a folder that its packages do not fill."""
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    return Path(paths["include"], "Python.h")


def try_compiler(compiler: str, python_h: Path) -> str | None:
    """The first error of a C compiler with a module as Triton builds one; None where it has none."""
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
