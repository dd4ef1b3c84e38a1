"""The code and the data of a start: versions of packages, the git commit of this one, counts of pairs."""

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from dpo import DISTRIBUTION
from dpo.pairs.report import DataReport

PACKAGE = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft", "datasets", "tokenizers")


def provenance(hosts: Sequence[str], last_step: int) -> dict[str, Any]:
    """Returns the entry of a start for `provenance.json`. `commit` is None where the package's commit is unknown.

    `hosts`: the host name of each rank.
    """
    return {
        "version": _version(DISTRIBUTION),
        **git_state(PACKAGE),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "hosts": sorted(set(hosts)),
        "ranks": len(hosts),
        "last_step": last_step,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def data_facts(report: DataReport) -> dict[str, Any]:
    """Returns the counts of a run's data for `provenance.json`: of the training and evaluation pairs, and per source of
    pairs kept, dropped by reason, and held out. A source that is no file or folder here is of the hub (`hub`).
    """
    sources = [
        {
            "key": source.key,
            "path": source.path,
            "hub": not Path(source.path).expanduser().exists(),
            "pairs": source.pairs,
            "dropped": source.dropped,
            "held_out_pairs": source.held_out_pairs,
        }
        for source in report.sources
    ]
    return {"train_pairs": report.train_pairs, "eval_pairs": report.eval_pairs, "sources": sources}


def git_state(folder: Path) -> dict[str, Any]:
    """Returns `commit` of the git checkout that contains the package, and whether it has changes (`dirty`).

    For a package that pip installed from a repository: the commit that pip recorded.
    """
    if _git(folder, "ls-files", "--error-unmatch", str(Path(__file__).relative_to(PACKAGE))) is not None:
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
        return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": bool(changes)}
    return {"commit": _installed_commit(), "dirty": False}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a file system that hangs: a run needs neither
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _installed_commit() -> str | None:
    """Returns the commit in PEP 610's direct_url.json; None where there is none."""
    try:
        text = distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    commit: str | None = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    return commit


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
