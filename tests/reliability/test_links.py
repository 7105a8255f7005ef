"""A folder from elsewhere brings no file of this machine into a model, its prompts or an export."""

import shutil

import pytest

from jaxrlhf import cli, weights
from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.errors import DataError

READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "vocab.txt")
READ += ("tokenizer.model", "chat_template.jinja", "README.md", "model.safetensors", "adapter_config.json")


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def private(tmp_path):
    file = tmp_path / "private" / "notes"
    file.parent.mkdir()
    file.write_text("{{ 'a secret' }}")
    return file


@pytest.mark.parametrize("name", [*READ, "additional_chat_templates/tool.jinja", "additional_chat_templates"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_folder_is_refused_whatever_file_it_stands_for(folder, private, name, relative):
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    up = "../" * (1 + name.count("/"))
    target = private if "." in name else private.parent
    link.symlink_to(f"{up}private/{'' if target.is_dir() else 'notes'}" if relative else target)
    for read in (
        lambda: weights.load_config(folder),
        lambda: load_tokenizer(folder, TokenizerSource()),
        lambda: weights.resolve(folder, weights=False),
    ):
        with pytest.raises(DataError, match=f"{link}: a link to {private.parent}.*outside the folder") as caught:
            read()
        assert "secret" not in str(caught.value)


def test_links_inside_the_folder_and_of_the_hub_cache_are_followed(folder, tmp_path):
    (folder / "tokenizer.json").rename(folder / "other.json")
    (folder / "tokenizer.json").symlink_to("other.json")
    assert load_tokenizer(folder, TokenizerSource()).size > 3
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_tokenizer(snapshot, TokenizerSource()).size > 3
    assert weights.load_config(snapshot).hidden_size
    linked = tmp_path / "by-link"
    linked.symlink_to(folder)
    assert weights.load_config(linked).hidden_size, "the folder itself is named by the user"
    (snapshot / "README.md").symlink_to("../../refs")
    with pytest.raises(DataError, match="outside the folder"):
        weights.load_config(snapshot)


def test_export_copies_no_file_from_outside(folder, private, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "export" / "deep").mkdir(parents=True)
    (run / "config.yaml").write_text("# jaxrlhf sft, every option resolved\nmodel: {path: x}\n")
    (run / "run.json").write_text('{"method": "sft", "starts": [{"outcome": "done"}]}')
    (run / "export" / "deep" / "x").symlink_to(private)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 4
    assert "outside the folder" in capsys.readouterr().err and not list(tmp_path.glob("out*"))
