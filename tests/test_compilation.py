"""Programs compiled for shapes, and the lines that say how long a program took."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf import compilation


@pytest.fixture
def lines(monkeypatch):
    monkeypatch.setattr(compilation, "SLOW", 0.0)
    return []


def test_a_program_compiled_for_shapes_is_not_compiled_again(lines):
    @jax.jit
    def program(x):
        return jnp.sin(x) @ x

    x = jax.device_put(jnp.ones((16, 16)))
    with compilation.announce(lines.append):
        compiled = compilation.compile_shapes(program, jax.ShapeDtypeStruct((16, 16), "float32"))
        assert len(lines) == 1
        for _ in range(2):
            program(x)
        assert len(lines) == 1, lines
        program(jax.device_put(jnp.ones((8, 8))))
        assert sum("jit(program)" in line for line in lines) == 2, "another shape is another program"
    assert compiled.name == "program" and compiled.memory.output_size_in_bytes == 16 * 16 * 4


def test_a_program_can_take_what_another_returns(lines):
    @jax.jit
    def first(x):
        return {"y": jnp.tanh(x)}

    @jax.jit
    def second(tree, x):
        return tree["y"] @ x

    mesh = jax.sharding.Mesh(jax.devices()[:2], ("rows",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    x = jax.device_put(jnp.ones((16, 16)), rows)
    made = compilation.compile_shapes(first, x).outputs
    compilation.compile_shapes(second, made, x)
    assert made["y"].sharding.is_equivalent_to(rows, 2)
    with compilation.announce(lines.append):
        second(first(x), x)
    assert lines == []


def test_lines_can_be_held_back_until_the_end_of_a_block(lines):
    with compilation.announce(lines.append):
        with pytest.raises(KeyboardInterrupt), compilation.held_back():
            jax.jit(lambda x: x * 5).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()
            assert lines == []
            raise KeyboardInterrupt
        assert len(lines) == 1
    with compilation.held_back():  # nobody listens
        jax.jit(lambda x: x * 6).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()
    assert len(lines) == 1


def test_a_line_names_the_program_and_whether_it_was_cached(lines, monkeypatch, tmp_path):
    def once():
        jax.jit(lambda x: jnp.cos(x) * 3).lower(jax.ShapeDtypeStruct((32,), "float32")).compile()
        jax.clear_caches()

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    try:
        with compilation.announce(lines.append):
            once()
            once()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
    assert len(lines) == 2
    assert lines[0].startswith("compiled jit(<lambda>) in 0.") and lines[0].endswith(" s of tracing")
    assert lines[1].startswith("loaded jit(<lambda>) from the cache in 0.")


def test_the_inner_block_takes_over_and_outside_there_is_silence(lines):
    inner = []
    with compilation.announce(lines.append):
        with compilation.announce(inner.append):
            jax.jit(lambda x: x + 1)(1.0)
        assert inner and not lines
        jax.jit(lambda x: x + 2)(1.0)
        assert lines
    count = len(lines)
    jax.jit(lambda x: x + 3)(1.0)
    assert len(lines) == count


def test_quick_programs_are_not_worth_a_line():
    lines = []
    with compilation.announce(lines.append):
        jax.jit(lambda x: x + 4)(1.0)
    assert lines == []


def test_importing_starts_no_thread():
    code = "import threading; from jaxrlhf import compilation; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
