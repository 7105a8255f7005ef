"""What a dry run says about a run directory that is there, and what it prints if it fails."""

import pytest

from jaxrlhf.config import SFTConfig
from jaxrlhf.errors import DataError
from jaxrlhf.plan import dry_run


def test_a_run_that_would_be_resumed_or_renamed_is_named(tmp_path):
    config = SFTConfig(run_dir=str(tmp_path), model={"path": "m", "merged_path": "merged"})  # type: ignore[arg-type]
    for step in ("20", "100", "corrupt-400"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    text = "\n".join(dry_run.writes(config, fresh=False))
    assert "saved at step 100: it would be resumed" in text and "the merged model to merged" in text
    assert f"renamed to {tmp_path.name}.old-N" in "\n".join(dry_run.writes(config, fresh=True))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_comes_without_the_config(tmp_path, capsys):
    with pytest.raises(DataError, match="no such folder"):
        dry_run.show(SFTConfig(model={"path": str(tmp_path / "m")}, data={"path": "d"}))  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
