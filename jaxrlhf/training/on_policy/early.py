"""Programs of the first update of a run, compiled in other threads while its responses are drawn."""

import math
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax

from jaxrlhf import runtime, sharding, stopping
from jaxrlhf.compilation import compile_shapes

Arguments = tuple[Any, ...]
_unfinished: set[futures.Future[Any]] = set()


def gains(mesh: jax.sharding.Mesh) -> bool:
    """Return True if programs for the mesh are compiled early: for a CPU with more than one core, because compiling a
    program takes one. Not for several devices, where how programs split their results is known only when they are
    compiled."""
    return sharding.platform(mesh) == "cpu" and mesh.size == 1 and runtime.processor().cores > 1


def unfinished() -> bool:
    """Return True while programs are being compiled, for which Python would wait at its end."""
    return bool(_unfinished)


class Early:
    """Compiles `annotate` and `update`, each in a thread of its own, for a mesh of one device.

    `of_annotate()` and `of_update(experience)` give their arguments besides `spec`, arrays or shapes. What is called
    with other shapes is compiled then, and so is a program that could not be compiled here, which raises its error.
    """

    def __init__(
        self,
        programs: tuple[Any, Any],
        of_annotate: Callable[[], Arguments],
        of_update: Callable[[Any], Arguments],
        spec: Any,
    ) -> None:
        annotate, update = programs

        def annotation() -> Any:
            arguments = of_annotate()
            experience, _ = jax.eval_shape(lambda *args: annotate(*args, spec=spec), *arguments)
            whole = jax.sharding.NamedSharding(spec.mesh, jax.sharding.PartitionSpec())
            experience = sharding.with_shardings(experience, jax.tree.map(lambda _: whole, experience))
            self._begin(lambda: compile_shapes(update, *of_update(experience), spec=spec))
            compile_shapes(annotate, *arguments, spec=spec)

        self._threads = futures.ThreadPoolExecutor(2, thread_name_prefix="compile")
        self._begun: list[futures.Future[Any]] = []
        self._begin(annotation)

    def _begin(self, work: Callable[[], Any]) -> None:
        future = self._threads.submit(work)
        self._begun.append(future)
        _unfinished.add(future)
        future.add_done_callback(_unfinished.discard)

    def wait(self) -> None:
        """Wait until both are compiled. Raises Interrupted after a request to stop, in a block that it may end."""
        for future in self._begun:  # the first has appended the second when it is done
            stopping.wait(lambda seconds, one=future: bool(futures.wait([one], seconds).done), math.inf)

    def close(self) -> None:
        """Begin nothing else. What is being compiled cannot be stopped (`unfinished`)."""
        self._threads.shutdown(wait=False, cancel_futures=True)
