"""The same config gives the same bytes on one core and on several, with programs compiled anew or from the cache."""

import os

import pytest
import torture

TWO = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1


@pytest.mark.skipif(not TWO, reason="needs two cores to choose from")
@pytest.mark.parametrize("case", ["sft", pytest.param("ppo", marks=pytest.mark.long)])
def test_neither_cores_nor_the_cache_of_programs_change_a_run(case, tmp_path, monkeypatch):
    monkeypatch.setattr(torture, "STEPS", 2)
    bench, found = torture.Bench(tmp_path), {}
    bench.prepare()
    runs = {"compiled": {"cores": 2}, "from the cache": {"cores": 2}, "on one core": {"cores": 1, "cold": True}}
    for name, options in runs.items():
        process = bench.start(case, tmp_path / name, **options)
        torture.finish(process, tmp_path / name)
        found[name] = torture.facts(tmp_path / name)
    records, files = found["compiled"]
    assert [record["step"] for record in records] == [1, 2] and "model.safetensors" in files
    assert found["from the cache"] == found["on one core"] == found["compiled"]
    caches = [set(os.listdir(folder)) for folder in (bench.cache, tmp_path / "cold on one core")]
    assert caches[0] and caches[1], "both compiled"
