"""Publishing checkpoints on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from tars_fast.support.cli import first_line
from tars_fast.types import UserError


def check_repository(name: str | None) -> None:
    """Raises UserError where `--push-to-hub` is no name of a repository; None: nothing is published."""
    if name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        raise UserError(f"--push-to-hub {name}: give OWNER/NAME, the name of a repository on the hub")


class HubRepository:
    """A model's repository, which is made where there is none, for its owner's eyes alone.

    Endpoint and token are those of huggingface_hub's environment (`HF_ENDPOINT`, `HF_TOKEN`, `hf auth login`).

    Raises:
        UserError: the hub cannot be reached, or does not let this account write there.
    """

    def __init__(self, name: str):
        from huggingface_hub import HfApi

        self.name = name
        self._hub = HfApi()
        try:
            self._hub.create_repo(name, private=True, exist_ok=True)
        # What is raised differs between releases: errors of HTTP, of names, of a token that is not there.
        except Exception as error:
            raise UserError(
                f"--push-to-hub {name}: cannot be written to ({first_line(error):.200}); log in by hf auth login, with a token "
                "that may write there"
            ) from error

    def push(self, folder: Path, card: str, message: str) -> str | None:
        """Upload a checkpoint and its model card as one commit, without the trainer's state.

        Returns:
            Why it could not be uploaded; None: it was.
        """
        from huggingface_hub import CommitOperationAdd

        # It loads torch, for which the settings that import this do not wait.
        from tars_fast.models.checkpoint import TRAINER_FILES

        held = sorted(path for path in folder.rglob("*") if path.is_file())
        left_out = {*TRAINER_FILES, "README.md"}
        paths = [path for path in held if path.relative_to(folder).parts[0] not in left_out]
        try:
            files = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
            files.append(CommitOperationAdd("README.md", card.encode()))
            self._hub.create_commit(self.name, files, commit_message=message)
        except Exception as error:
            return f"--push-to-hub {self.name}: {folder.name} could not be uploaded ({first_line(error):.200})"
        return None
