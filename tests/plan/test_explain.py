"""`jaxrlhf plan --explain`."""

import jax
import pytest
from support.tiny import tiny

from jaxrlhf import config, models, sharding
from jaxrlhf.cli import main
from jaxrlhf.plan import explain


def bytes_of(tree, mesh):
    """In all, and on a device, by placing real arrays."""
    placed = jax.device_put(tree, sharding.shardings(tree, mesh))
    leaves = jax.tree.leaves(placed)
    return sum(x.nbytes for x in leaves), sum(x.addressable_shards[0].data.nbytes for x in leaves)


@pytest.mark.parametrize("shape", [config.Mesh(), config.Mesh(fsdp=2, tensor=4), config.Mesh(data=2, fsdp=4)])
def test_bytes_are_those_of_placed_arrays_and_each_array_is_in_one_group(shape):
    params = models.init(tiny(qkv_bias=True, mlp_size=18), jax.random.key(0))
    mesh = sharding.make_mesh(shape)
    found = explain.groups(params, mesh)
    assert (sum(g.total for g in found), sum(g.local for g in found)) == bytes_of(params, mesh)
    paths = [path for group in found for path in group.paths]
    assert sorted(paths) == sorted(sharding.path_of(k) for k, _ in jax.tree_util.tree_leaves_with_path(params))


def test_alternatives_are_in_braces_and_what_is_left_whole_is_named():
    params = models.init(tiny(mlp_size=18), jax.random.key(0))
    mesh = sharding.make_mesh(config.Mesh(fsdp=2, tensor=4))
    text = explain.text([("parameters", "", params)], mesh)
    (line,) = (line for line in text.splitlines() if "layers/attention/{k,v}/kernel" in line)
    assert line.split()[1:6] == ["2", "x", "16", "x", "8"] and "fsdp, tensor" in line
    assert "layers/mlp/{gate,up}/kernel: dimension 2 (18) is not a multiple of tensor (4)" in text
    assert "(29)" not in text, "a vocabulary of 29 is split along the hidden size instead"


def test_the_command_names_every_part_of_a_run_and_compiles_nothing(tiny_model, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "say red", "chosen": "red", "rejected": "no"}\n' * 8)
    options = ["--model.path", str(tiny_model), "--model.init", "random", "--data.path", str(rows)]
    assert main(["plan", "--method", "dpo", "--explain", *options, "--mesh.fsdp", "4", "--train.batch_size", "8"]) == 0
    said = capsys.readouterr().out
    for part in ("fsdp 4", "parameters of the policy", "optimizer state of the policy", "{mu,nu}/embed/embedding"):
        assert part in said
    assert main(["plan", "--method", "dpo", "--explain", *options, "--devices", "v5e:2x2", "--mesh.data", "4"]) == 0
    assert "data 4" in capsys.readouterr().out
