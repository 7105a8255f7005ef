"""What a traced program holds in memory, and which programs are compiled."""

import collections
import contextlib

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


def largest_array(jaxpr):
    """Bytes of the largest array that a traced program makes, loops and calls included."""
    sizes = [v.aval.size * v.aval.dtype.itemsize for eqn in jaxpr.eqns for v in eqn.outvars]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes, default=0)


@contextlib.contextmanager
def compilations():
    """Programs that jax compiled (or took from its persistent cache) in the block: name -> how often."""
    count = collections.Counter()

    def listen(event, seconds, **about):
        if event == COMPILED:
            count[about["fun_name"].removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
