"""Programs of the first update of a run, compiled in other threads while its responses are drawn."""

import math
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax

from jaxrlhf import runtime, sharding, stopping
from jaxrlhf.compilation import compile_shapes
from jaxrlhf.types import Rollout

Arguments = tuple[Any, ...]
_unfinished: set[futures.Future[Any]] = set()


def pays_off(mesh: jax.sharding.Mesh) -> bool:
    """Return True if programs for the mesh are compiled in the background: for a CPU with more than one core, of which
    tracing and parts of XLA use only one. Not for several devices, where how programs split their results is known only
    when they are compiled."""
    return sharding.platform(mesh) == "cpu" and mesh.size == 1 and runtime.processor().cores > 1


def unfinished() -> bool:
    """Return True while programs are being compiled, for which Python would wait at its end."""
    return bool(_unfinished)


class BackgroundCompiler:
    """Compiles the `programs` annotate and update, each in a thread of its own, for an update on a rollout of these
    shapes, on a mesh of one device.

    `annotate_arguments(rollout)` and `update_arguments(experience)` give their arguments besides `spec`, arrays or
    shapes. A program that could not be compiled is compiled again when it is called, and raises its error then.
    """

    def __init__(
        self,
        programs: tuple[Any, Any],
        rollout: Rollout,
        annotate_arguments: Callable[[Rollout], Arguments],
        update_arguments: Callable[[Any], Arguments],
        spec: Any,
    ) -> None:
        (annotate, update), self._rollout = programs, rollout

        def annotation() -> None:
            arguments = annotate_arguments(rollout)
            experience, _ = jax.eval_shape(lambda *args: annotate(*args, spec=spec), *arguments)
            whole = jax.sharding.NamedSharding(spec.mesh, jax.sharding.PartitionSpec())
            experience = sharding.with_shardings(experience, jax.tree.map(lambda _: whole, experience))
            self._submit(lambda: compile_shapes(update, *update_arguments(experience), spec=spec))
            compile_shapes(annotate, *arguments, spec=spec)

        self._threads = futures.ThreadPoolExecutor(2, thread_name_prefix="compile")
        self._submitted: list[futures.Future[Any]] = []
        self._submit(annotation)

    def _submit(self, work: Callable[[], Any]) -> None:
        future = self._threads.submit(work)
        self._submitted.append(future)
        _unfinished.add(future)
        future.add_done_callback(_unfinished.discard)

    def wait(self, rollout: Rollout) -> None:
        """Wait until both are compiled, unless the rollout has other shapes (`trim` cuts short responses). Raises
        Interrupted after a request to stop, in a block that it may end."""
        drawn, expected = ([x.shape for x in jax.tree.leaves(tree)] for tree in (rollout, self._rollout))
        if drawn != expected:
            return
        for future in self._submitted:  # the first has appended the second when it is done
            stopping.wait(lambda seconds, one=future: bool(futures.wait([one], seconds).done), math.inf)

    def close(self) -> None:
        """Begin nothing else. What is being compiled cannot be stopped (`unfinished`), and Python waits for it at its
        end: with daemon threads it would abort instead, when XLA asks for the interpreter again."""
        self._threads.shutdown(wait=False, cancel_futures=True)
