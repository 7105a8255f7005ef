"""Uploads to the hub, with a stand-in for its client: no test asks the network."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

import jaxrlhf
from jaxrlhf.errors import ConfigError, StorageError
from jaxrlhf.weights import upload


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "my export"
    folder.mkdir()
    for name in ("config.json", "README.md", "model.safetensors", "tokenizer.json", "secret.txt"):
        (folder / name).write_text("{}")
    return folder


def fake(monkeypatch, *, private=True, **broken):
    """A stand-in for HfApi whose methods named in `broken` raise; the calls that it got."""
    calls = []

    class Api:
        def create_repo(self, name, **options):
            self._call("create_repo", name, options)
            return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

        def repo_info(self, name):
            self._call("repo_info", name)
            return SimpleNamespace(private=private)

        def upload_folder(self, **options):
            self._call("upload_folder", options)

        def _call(self, method, *arguments):
            if method in broken:
                raise broken[method]
            calls.append((method, *arguments))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


def http(status: int, kind=errors.HfHubHTTPError) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error", response=response)


def test_a_new_repository_is_private_and_gets_the_files_of_an_export(monkeypatch, folder):
    calls = fake(monkeypatch)
    assert jaxrlhf.push_to_hub(folder, "hf://org/model") == "https://huggingface.co/org/model"
    assert calls[0] == ("create_repo", "org/model", {"private": True, "exist_ok": True, "repo_type": "model"})
    method, options = calls[-1]
    assert method == "upload_folder" and (options["repo_id"], options["folder_path"]) == ("org/model", folder)
    kept = [
        p.name
        for p in huggingface_hub.utils.filter_repo_objects(
            sorted(folder.iterdir()), allow_patterns=options["allow_patterns"], key=lambda path: path.name
        )
    ]
    assert kept == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def test_a_name_without_an_organisation_is_the_users(monkeypatch, folder):
    calls = fake(monkeypatch, private=False)
    assert jaxrlhf.push_to_hub(folder, "model", private=False) == "https://huggingface.co/me/model"
    assert calls[0][2]["private"] is False and calls[-1][1]["repo_id"] == "me/model"


def test_a_run_directory_means_its_export(monkeypatch, tmp_path, folder):
    calls = fake(monkeypatch)
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "export")
    jaxrlhf.push_to_hub(tmp_path / "run", "org/model")
    assert calls[-1][1]["folder_path"] == tmp_path / "run" / "export"


def test_nothing_is_uploaded_to_a_public_repository_unless_asked(monkeypatch, folder):
    calls = fake(monkeypatch, private=False)
    with pytest.raises(StorageError, match="exists and is public; nothing was uploaded.*--public"):
        jaxrlhf.push_to_hub(folder, "org/model")
    assert "upload_folder" not in [call[0] for call in calls]


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        ("create_repo", errors.LocalTokenNotFoundError("no token"), "nobody is logged in.*hf auth login"),
        ("create_repo", http(401), "nobody is logged in.*hf auth login"),
        ("create_repo", http(403), "refuses to write to org/model.*own account.*token that may write"),
        ("upload_folder", http(403), "refuses to write to org/model"),
        ("repo_info", http(404, errors.RepositoryNotFoundError), "refuses to write to org/model"),
        ("create_repo", errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set; unset it"),
        ("upload_folder", ConnectionError("no route to host"), r"could not be uploaded.*ConnectionError: no route"),
        ("upload_folder", http(500), "could not be uploaded.*500"),
    ],
)
def test_errors_say_what_to_do_and_where_the_model_is(monkeypatch, folder, method, error, says):
    fake(monkeypatch, **{method: error})
    with pytest.raises(StorageError, match=says) as caught:
        jaxrlhf.push_to_hub(folder, "org/model")
    assert f"The model stays in {folder}; `hf upload org/model '{folder}' . --private` uploads it later" in str(
        caught.value
    )
    assert len(list(folder.iterdir())) == 5


def test_the_client_itself_is_not_asked_when_offline(folder, audit):
    with audit("socket.connect") as connects, pytest.raises(StorageError, match="HF_HUB_OFFLINE is set"):
        jaxrlhf.push_to_hub(folder, "org/model")
    assert not connects


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "a/", "../x", "a--b"])
def test_impossible_names_are_refused_before_anything_is_asked(monkeypatch, folder, name):
    calls = fake(monkeypatch)
    with pytest.raises(ConfigError, match="cannot be the name of a hub repository"):
        jaxrlhf.push_to_hub(folder, name)
    assert not calls


def test_adapters_for_a_folder_of_this_machine_are_noted(tmp_path, folder):
    assert upload.notes(folder) == []
    (folder / "config.json").unlink()
    for base, noted in ((str(tmp_path), 1), ("org/base", 0)):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
        assert len(upload.notes(folder)) == noted
