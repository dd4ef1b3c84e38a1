"""Builds idle_cuda.c for the torch of this environment, and starts processes that have it for their CUDA."""

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.support.ranks import Ranks

LIBRARIES = ("libtorch_cuda", "libc10_cuda", "libtorch_python", "libtorch_cuda_linalg", "libcaffe2_nvrtc")
NAMES = re.compile(r"(?:__)?cuda[A-Z]\w+|cublas[A-Z]\w+|nccl[A-Z]\w+|cu[A-Z]\w+")
KEYWORDS = """
#define __device_builtin__
#define __cudart_builtin__
#define __host__
#define __device__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define CUDARTAPI
#define CUDART_CB
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))
"""
"""What crt/host_defines.h defines, which CUDA's headers include and the packages of pip lack."""


def missing() -> str | None:
    """Why the idle CUDA cannot be built here; None where it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: make test-cuda-host"
    if not (_headers() / "driver_types.h").is_file():
        return f"no CUDA headers at {_headers()}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "no Python.h, which Triton needs (Debian: python3-dev)"
    absent = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    return f"no {absent[0]}" if absent else None


@contextmanager
def idle_ranks(folder: Path, **environment: str) -> Iterator[Ranks]:
    """Processes that see GPUs which do nothing; the test's own process does not. Skips where it cannot be built."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    ranks = Ranks()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (build(folder) | environment).items():
            patch.setenv(name, value)
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        yield ranks
    ranks.close()


def build(folder: Path) -> dict[str, str]:
    """The idle CUDA in `folder`; the environment of a process that runs on it, with compile caches of its own."""
    (folder / "crt").mkdir(parents=True)
    (folder / "crt" / "host_defines.h").write_text(KEYWORDS)
    library, own, rest = folder / "libidle.so", Path(__file__).with_name("idle_cuda.c"), folder / "rest.c"
    _compile(library, folder, own)
    others = sorted(_called() - _functions(library, "--defined-only"))
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in others))
    _compile(library, folder, own, rest)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (folder / name).symlink_to(library)
    return {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def _headers() -> Path:
    """Of the runtime that torch's CUDA wheel brings."""
    return Path(torch.__file__).parents[1] / "nvidia" / f"cu{str(torch.version.cuda).split('.')[0]}" / "include"


def _compile(library: Path, folder: Path, *sources: Path) -> None:
    places = [f"-I{folder}", f"-I{_headers()}"]
    words = ["gcc", "-O1", "-w", "-fPIC", "-shared", *places, *map(str, sources), "-o", str(library), "-ldl"]
    subprocess.run(words, check=True)


def _called() -> set[str]:
    """The functions of CUDA, cuBLAS and NCCL that torch is linked with and that Triton's driver calls."""
    import triton

    torch_calls = [
        _functions(Path(torch.__file__).parent / "lib" / f"{name}.so", "--undefined-only") for name in LIBRARIES
    ]
    driver = Path(triton.__file__).parent / "backends" / "nvidia" / "driver.c"
    return set().union(*torch_calls) | set(re.findall(r"\b(cu[A-Z]\w+)\(", driver.read_text()))


def _functions(library: Path, which: str) -> set[str]:
    listing = subprocess.run(["nm", "-D", which, str(library)], check=True, capture_output=True, text=True).stdout
    names = (line.split()[-1].split("@")[0] for line in listing.splitlines())
    return {name for name in names if NAMES.fullmatch(name)}
