"""`jaxrlhf verify`, and the sums of an export."""

import hashlib
import os
import pathlib
import shutil
import subprocess

import pytest

from jaxrlhf import weights
from jaxrlhf.cli import main
from jaxrlhf.errors import DataError, StorageError
from jaxrlhf.weights import sums

RECORDED = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "runs"
"""Small runs, each recorded by the version that introduced its format."""


@pytest.fixture
def export(tmp_path):
    """A model that was loaded and exported."""
    folder = RECORDED / "ppo" / "model"
    model, params = weights.load(folder)
    return weights.export(tmp_path / "export", model, params, source=folder)


def test_sums_are_those_of_sha256sum(export):
    assert (export / "SHA256SUMS").read_text().count("\n") == len(list(export.iterdir())) - 1
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=export, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "model.safetensors: OK" in done.stdout
    assert sums.digest(export / "config.json") == hashlib.sha256((export / "config.json").read_bytes()).hexdigest()


def test_an_export_as_it_was_written(export, capsys):
    assert main(["verify", str(export)]) == 0
    assert capsys.readouterr().out.startswith(f"ok      {export}: ")


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: flip(folder / "model.safetensors", -1), "model.safetensors differs"),
        (lambda folder: flip(folder / "config.json", 5), "config.json differs"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "more.py").write_text("1"), "more.py is not in SHA256SUMS"),
        (lambda folder: flip(folder / "SHA256SUMS", 0), "README.md differs|SHA256SUMS itself is damaged"),
        (lambda folder: (folder / "SHA256SUMS").write_text(""), "SHA256SUMS itself is damaged"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "has no SHA256SUMS"),
    ],
)
def test_a_damaged_export(export, capsys, damage, says):
    damage(export)
    with pytest.raises(StorageError, match=says):
        sums.check(export)
    assert main(["verify", str(export)]) == 7
    assert f"DAMAGED {export}" in capsys.readouterr().out


def test_named_pipes_are_not_waited_for(export, capsys):
    run = export.parent / "run"
    shutil.copytree(RECORDED / "ppo" / "run", run)
    for file in (export / sums.SUMS, run / "checkpoints" / "2" / "record" / "data.json"):
        file.unlink()
        os.mkfifo(file)
        assert main(["verify", str(export if file.parent == export else run)]) == 7
        assert "is a named pipe, not a file" in capsys.readouterr().out
    (export / sums.SUMS).unlink()
    card = export / "README.md"
    card.unlink()
    os.mkfifo(card)
    assert main(["verify", str(export)]) == 4


def test_a_link_out_of_an_export_is_not_followed(export, tmp_path, capsys):
    (tmp_path / "private").write_text("secret")
    (export / "notes.txt").symlink_to(tmp_path / "private")
    assert main(["verify", str(export)]) == 7
    assert "outside the folder" in capsys.readouterr().out


def test_an_export_that_never_had_sums_is_not_called_damaged(export, capsys):
    (export / sums.SUMS).unlink()
    card = export / "README.md"
    card.write_text(card.read_text().replace(sums.SENTENCE, ""))  # as earlier versions wrote it
    assert main(["verify", str(export)]) == DataError.exit_code == 4
    assert capsys.readouterr().out.startswith(f"NO SUMS {export}: ")
    card.unlink()
    assert main(["verify", str(export)]) == 4
    run = export.parent / "run"
    shutil.copytree(RECORDED / "ppo" / "run", run)
    shutil.copytree(export, run / "export")
    assert main(["verify", str(run)]) == 4
    assert "ok      " in capsys.readouterr().out
    flip(run / "checkpoints" / "2" / "record" / "data.json", 3)
    assert main(["verify", str(run)]) == 7


def test_shards_that_are_missing_or_exchanged(tmp_path, capsys):
    """Neither verified nor loaded."""
    model, params = weights.load(RECORDED / "ppo" / "model")
    folder = weights.export(tmp_path / "export", model, params, source=RECORDED / "ppo" / "model", max_shard_size=2000)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    for says in ("differs", "is missing"):
        assert main(["verify", str(folder)]) == 7 and says in capsys.readouterr().out
        with pytest.raises(DataError, match=first.name):
            weights.load(folder)
        first.unlink(missing_ok=True)


@pytest.mark.parametrize("run", sorted(path.parent.name for path in RECORDED.glob("*/run")))
def test_checkpoints_of_every_format_can_still_be_read(run, tmp_path, capsys):
    folder = shutil.copytree(RECORDED / run / "run", tmp_path / "run")
    assert main(["verify", str(folder)]) == 0
    assert main(["verify", str(folder / "checkpoints")]) == 0
    assert main(["verify", str(folder / "checkpoints" / "2")]) == 0
    out = capsys.readouterr().out
    assert out.count("ok ") == 3 and "arrays" in out
    largest = max((folder / "checkpoints" / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    for at in range(0, largest.stat().st_size, 64):  # a single byte can be one that no reader looks at
        flip(largest, at)
    assert main(["verify", str(folder)]) == 7
    assert "DAMAGED" in capsys.readouterr().out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"], "nothing is renamed"


def test_what_cannot_be_verified_is_refused(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 4
    assert main(["verify", str(tmp_path / "none")]) == 4
    assert "neither an export nor a checkpoint" in capsys.readouterr().err
