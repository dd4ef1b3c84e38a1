"""Uploads the trained model or adapters of a run, or any such folder, to the Hugging Face hub.

    python -m dpo.push RUN ORG/NAME [--private] [--revision BRANCH]

The repository and the branch are made where they do not exist. The token is that of HF_TOKEN or of `hf auth login`,
with the right to write. Nothing is removed from the repository; files of the same names are replaced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from dpo.base.errors import RunError, UserError, one_line
from dpo.base.sums import SUMS, find_fault, find_unlisted, read_sums
from dpo.base.units import shown_bytes
from dpo.checkpoint.folders import checkpoints_of
from dpo.hub.files import ADAPTERS, CONFIG_FILE, exported_files, is_of_adapters, stored_weights
from dpo.hub.ids import is_tokenizer_id
from dpo.hub.reasons import has_answered, reason_of
from dpo.push.arguments import read_arguments
from dpo.run_folder.files import FINAL
from dpo.terminal.console import say

RUN, REPO = "command line: RUN", "command line: REPO"
_TOKEN = "HF_TOKEN, or `hf auth login`, with a token that may write there"


def find_model_folder(path: Path) -> Path:
    """Returns the folder of a model or of adapters to upload: `final/` of a run folder, or `path` itself.

    Raises UserError where there is none; of a run that is not finished, it names the command that exports a checkpoint.
    """
    if not path.is_dir():
        raise UserError(RUN, f"no such folder: {path}", "a run folder or a model folder")
    for folder in (path / FINAL, path):
        if _holds_adapters(folder) or ((folder / CONFIG_FILE).is_file() and stored_weights(folder)):
            _check_sums(folder)
            return folder
    run = path.parents[1] if path.parent.name == "checkpoints" else path
    checkpoints = checkpoints_of(run)
    if not checkpoints:
        raise UserError(RUN, f"{path} has no {FINAL}/ and no checkpoint", "a run folder or a model folder")
    command = f"python -m dpo.export --checkpoint {checkpoints[-1]} --out DIR"
    raise UserError(RUN, f"{path} has no {FINAL}/: the run is not finished", f"{command}, then python -m dpo.push DIR")


def _holds_adapters(folder: Path) -> bool:
    return is_of_adapters(folder) and not ADAPTERS.missing(folder)


def _check_sums(folder: Path) -> None:
    """Raises UserError where a file of a model is not as it was exported. Other folders have no SHA256SUMS."""
    if not (folder / SUMS).exists():
        return
    names = exported_files([path.name for path in folder.iterdir()])
    fault = find_fault(folder) or find_unlisted(read_sums(folder) or {}, names)
    if fault:
        valid = f"a whole folder; or, where you have changed the file yourself, a copy of it without {SUMS}"
        raise UserError(RUN, f"{folder} is not as it was exported: {fault}", valid)


def push(folder: Path, repository: str, private: bool, revision: str | None) -> str:
    """Uploads the files of a folder, and returns the address of the repository.

    Args:
        folder: the model folder.
        repository: org/name, or a name alone, of the token's user.
        private: whether a new repository can be seen by its owners alone.
        revision: the branch, which is made where it does not exist; None: main.

    Raises:
        UserError: the token or the name is wrong.
        RunError: the hub does not answer.
    """
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    where = f"{repository}, branch {revision}" if revision else repository
    say(f"uploading {len(sizes)} files of {folder}, {shown_bytes(sum(sizes))}, to {where}")
    api = HfApi()
    with _one_line_failures(repository):
        url = api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, revision=revision, commit_message="Upload a model trained by dpo"
        )
    return str(url)


@contextmanager
def _one_line_failures(repository: str) -> Iterator[None]:
    """Raises UserError or RunError for a failure of the hub or of the network in the block."""
    try:
        yield
    except HFValidationError as failure:
        raise UserError(REPO, one_line(str(failure)), "ORG/NAME") from failure
    except LocalTokenNotFoundError as failure:
        raise UserError(REPO, f"{repository}: there is no token", _TOKEN) from failure
    except Exception as failure:  # the hub's client and its http client raise classes without a common base
        if isinstance(failure, OSError) and failure.errno is not None:
            raise
        if has_answered(failure):
            raise UserError(REPO, f"{repository}: the hub refused it ({reason_of(failure)})", _TOKEN) from failure
        raise RunError(f"{repository}: the hub does not answer ({reason_of(failure)})") from failure


def main() -> None:
    """Runs `python -m dpo.push`."""
    args = read_arguments()
    if not is_tokenizer_id(args.repo):
        raise UserError(REPO, f"not the name of a repository: {args.repo}", "ORG/NAME, or NAME alone")
    url = push(find_model_folder(args.run), args.repo, args.private, args.revision)
    say(f"the model is at {url}")
