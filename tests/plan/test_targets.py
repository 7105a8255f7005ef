"""Targets and their devices: names are understood or refused with what would be right."""

import os
import subprocess
import sys

import pytest

from jaxrlhf.errors import ConfigError
from jaxrlhf.plan import targets, topology
from jaxrlhf.plan.targets import ACCELERATORS, parse
from jaxrlhf.plan.topology import MissingCompiler


@pytest.mark.parametrize(
    "name, devices, shape, near, text",
    [
        ("h100", 1, (1, 1), 1, "h100:1"),
        ("H100:8", 8, (1, 8), 8, "h100:8"),
        ("h100:64", 64, (8, 8), 8, "h100:64"),
        ("a100_40gb:4", 4, (1, 4), 4, "a100-40gb:4"),
        ("v5e", 1, (1, 1), 1, "v5e:1x1"),
        ("v5e:4x4", 16, (4, 4), 16, "v5e:4x4"),
        ("v5e:4x4:2", 32, (4, 4), 16, "v5e:4x4:2"),
        ("v5p:2x2x2", 8, (2, 2, 2), 8, "v5p:2x2x2"),
    ],
)
def test_a_name_says_how_many_devices_and_which_are_near(name, devices, shape, near, text):
    target = parse(name)
    assert (target.devices, target.shape, target.near, str(target)) == (devices, shape, near, text)
    assert parse(str(target)) == target


@pytest.mark.parametrize(
    "name, message",
    [
        ("h10:8", r"unknown accelerator 'h10' in 'h10:8'; did you mean 'h100'\?; known ones: h100, h200, a100, "),
        ("tpu", "unknown accelerator 'tpu' in 'tpu'; known ones"),
        ("h100:12", "12 GPUs are not whole hosts of 8; give fewer than 8, or a multiple of it, such as h100:8"),
        ("h100:0", "give a number of GPUs, such as h100:8"),
        ("h100:2x4", "give a number of GPUs"),
        ("v5e:16", "chips of a slice along its 2 dimensions, such as v5e:4x4"),
        ("v5e:8", "such as v5e:2x4"),
        ("v5p:64", "along its 3 dimensions, such as v5p:4x4x4"),
        ("v5p:2x2", "such as v5p:2x2x1"),
        ("v5e:4x4:0", "a second number is that of slices"),
        ("", "unknown accelerator ''"),
    ],
)
def test_what_is_no_target_is_refused_with_one_that_is(name, message):
    with pytest.raises(ConfigError, match=message):
        parse(name)


def test_figures_of_accelerators_are_in_proportion():
    """Guards against a slipped digit."""
    for one in ACCELERATORS.values():
        assert set(one.flops) == {"bfloat16", "float32", "int8"}, one.name
        assert one.flops["float32"] < one.flops["bfloat16"] <= one.flops["int8"] < 1e16
        assert one.bandwidth > 2 * one.link > 2 * one.network / 2 > 1e9
        assert 10 * targets.GIB < one.memory < 200e9
        assert 100 < one.flops["bfloat16"] / one.bandwidth < 700, "FLOPs per byte at which it is busy computing"
        assert (one.sizes is None) == (one.platform == "tpu") == (one.axes > 0)


@pytest.mark.parametrize("name, extra", [("h100:8", "plan-gpu"), ("v5e:4x4", "plan-tpu")])
def test_a_missing_compiler_is_named_with_the_command_that_installs_it(name, extra, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(topology.runtime, "version", {"jax": "0.10.2"}.get)
    with pytest.raises(
        MissingCompiler, match=rf"not installed: pip install 'jaxrlhf\[{extra}\]' \(or 'jax\[.*\]==0.10.2'"
    ):
        topology.devices(name)


def test_a_compiler_of_another_jax_is_refused_with_both_versions(monkeypatch):
    versions = {
        "jax": "0.10.2",
        "jax-cuda13-plugin": "0.10.1",
        "jax-cuda13-pjrt": "0.10.1",
        "nvidia-cudnn-cu13": "9.28",
    }
    monkeypatch.setattr(topology.runtime, "version", versions.get)
    with pytest.raises(MissingCompiler, match=r"jax-cuda13-plugin 0.10.1 does not match jax 0.10.2: pip install"):
        topology.devices("h100:8")


def missing(name: str) -> str:
    try:
        topology.check_compiler(parse(name).accelerator)
    except MissingCompiler as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "names", [["h100:16", "a100", "b200:8", "rtx4090:2"], ["v4:2x2x1", "v5e", "v5e:4x4:2", "v6e:2x4"]]
)
def test_the_compiler_makes_the_devices_of_a_target(names):
    """In a process of its own: what is set for a compiler stays set."""
    if reason := missing(names[0]):
        pytest.skip(reason)
    code = (
        "import sys\nfrom jaxrlhf.plan import targets, topology\n"
        "for target in map(targets.parse, sys.argv[1:]):\n"
        "    devices = topology.devices(target)\n"
        "    print(target, len(devices) == target.devices, devices[0].platform == target.accelerator.platform)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{parse(name)} True True" for name in names]
