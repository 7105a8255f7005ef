"""The command `verify`."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxrlhf.cli.models import Options, Overrides
from jaxrlhf.errors import DataError, StorageError, visible

HELP = (
    "compare an export with its SHA256SUMS, and the checkpoints of a run with their digests; exit code 7 if anything "
    "is damaged or missing, 4 if an export has no sums to compare with"
)


def verify(options: Options, overrides: Overrides) -> int:
    """Print a line for each export and checkpoint; 7 if one of them is damaged, else 4 if one has no sums."""
    codes = {0}
    for name, check in _parts(Path(options.directory)):
        try:
            print(visible(f"ok      {name}: {check()}"), flush=True)
        except (StorageError, DataError) as error:
            codes.add(error.exit_code)
            word = "DAMAGED" if isinstance(error, StorageError) else "NO SUMS"
            print(visible(f"{word} {name}: {error}"), flush=True)
    return max(codes)


def _parts(directory: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, check) of all that can be verified in a run directory, an export, or a folder of checkpoints or one of
    them. Raises DataError if there is nothing."""
    from jaxrlhf.checkpoint import Checkpoints
    from jaxrlhf.weights import sums
    from jaxrlhf.weights.hub import CONFIG
    from jaxrlhf.weights.peft import CONFIG as ADAPTERS

    if not directory.is_dir():
        raise DataError(f"{directory} is not a folder; give a run directory, an export or a checkpoint")
    directory, only = directory.resolve(), ""
    folder = directory / "checkpoints"
    if "checkpoints" in (directory.name, directory.parent.name):
        only = "" if directory.name == "checkpoints" else directory.name
        folder = directory.parent if only else directory
    checkpoints = Checkpoints(folder, keep=1, synchronous=True)
    steps = [step for step in checkpoints.steps if only in ("", str(step))]
    marks = sums.SUMS, CONFIG, ADAPTERS
    exports = [f for f in (directory / "export", directory) if any((f / name).is_file() for name in marks)]
    if not steps and not exports:
        raise DataError(f"{directory} has neither an export nor a checkpoint")
    for export in exports:
        yield str(export), functools.partial(sums.check, export)
    for step in steps:
        yield str(folder / str(step)), functools.partial(checkpoints.verify, step)
