"""Checkpoints on the hub: what huggingface_hub sends to a server that speaks the hub's protocol, on this machine."""

from __future__ import annotations

import pytest

from tars_fast.config import TrainConfig
from tars_fast.models.publish import HubRepository
from tars_fast.types import UserError


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-3"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "tekken.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    for name in ("trainer_state.pt", "README.md"):
        (folder / name).write_text("not this one")
    return folder


def test_a_checkpoint_is_one_commit_of_what_others_load(hub, checkpoint):
    repository = HubRepository("me/speech")
    assert hub.repositories["me/speech"].items() >= {"name": "speech", "organization": "me"}.items()
    asked = hub.repositories["me/speech"]
    assert asked.get("visibility", "private") == "private"
    assert asked.get("private", True) is True
    assert repository.push(checkpoint, "# the card\n", "after 3 steps") is None
    files = {"more/tekken.json": b"{}", "model.safetensors": bytes(range(256)), "README.md": b"# the card\n"}
    assert hub.commits == [("me/speech", "after 3 steps", files)]
    assert (checkpoint / "README.md").read_text() == "not this one"


def test_who_may_not_write_there_is_told_at_the_start_and_a_lost_upload_is_a_warning(hub, checkpoint, monkeypatch):
    repository = HubRepository("me/speech")
    hub.refuses = "/commit/"
    assert "--push-to-hub me/speech: checkpoint-3 could not be uploaded (" in repository.push(checkpoint, "", "after 3 steps")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(UserError, match=r"^--push-to-hub me/speech: cannot be written to \(.*401.*\); log in by hf auth login"):
        HubRepository("me/speech")


@pytest.mark.parametrize("name", ["speech", "me/speech/more", "me/", "me/speech@main"])
def test_names_of_repositories(name):
    with pytest.raises(UserError, match=f"^--push-to-hub {name}: give OWNER/NAME, the name of a repository on the hub"):
        TrainConfig(push_to_hub=name)
