"""Put an exported folder on the Hugging Face Hub, as one commit, which is there completely or not at all.

The token is the environment's (`HF_TOKEN`) or that of `hf auth login`: there is no option for it, so it stands in no
command, recipe or log. What is said about an error is searched for it before anybody reads it.

    python -m hybrid_ssl.hub.push FOLDER USER/NAME public|private MESSAGE

does the same in a process of its own, for `PushesOfRun`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..monitor.redact import HIDDEN, redact
from .folder import CARD, CONFIG, HEADS, WEIGHTS, find_export


class PushError(ValueError):
    """The Hub did not take the folder: what it said, and what to do."""


def push_export(folder: Path, repo: str, *, private: bool = False, message: str | None = None) -> str:
    """Upload an export, or the newest export of a run's folder. Doing it twice changes nothing.

    Args:
        repo: `user/name`; made if it is missing.
        private: for a new repository; one that is already there has to be private, too.
        message: of the commit.

    Returns:
        address of the commit.

    Raises:
        PushError: nothing was changed on the Hub, or only a new, empty repository made.
    """
    check_repo(repo)
    folder = find_export(folder)
    token = get_token()
    if token is None:
        raise PushError("pushing needs a token that may write: set HF_TOKEN, or run `hf auth login`")
    _refuse_leaks(folder, token)
    try:
        return _upload(HfApi(token=token), folder, repo, private, message or "Upload encoder")
    except PushError:
        raise
    except Exception as error:  # of several HTTP libraries; any of them may quote the token, so none goes on as it is
        raise PushError(f"{folder.name} was not pushed to {repo}: {_plain(error, token)}") from None


def check_repo(repo: str) -> None:
    """PushError if `repo` is no name of a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PushError(f"{repo!r} is no repository of the Hub, write user/name: {error}") from error
    if "/" not in repo:
        raise PushError(f"{repo!r} is no repository of the Hub: write user/name")


def _upload(api: HfApi, folder: Path, repo: str, private: bool, message: str) -> str:
    api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise PushError(f"{repo} is public, but a private repository was asked for: make it private, or take another")
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        allow_patterns=[WEIGHTS, CONFIG, CARD, HEADS],
        delete_patterns=HEADS,  # heads of an earlier run would not fit this encoder
        commit_message=message,
    )
    return str(commit.commit_url)


def _refuse_leaks(folder: Path, token: str) -> None:
    for file in (folder / CONFIG, folder / CARD):
        text = file.read_text() if file.is_file() else ""
        if token in text or redact(text) != text:
            raise PushError(f"{file.name} of this export holds what looks like a token or password: take it out first")


def _plain(error: Exception, token: str) -> str:
    """What the Hub said, on one line, without credentials."""
    said = " ".join(str(error).split()).replace(token, HIDDEN)
    return f"{type(error).__name__}: {redact(said)[:500]}"


if __name__ == "__main__":
    try:
        print(push_export(Path(sys.argv[1]), sys.argv[2], private=sys.argv[3] == "private", message=sys.argv[4]))
    except ValueError as error:
        sys.exit(str(error))
