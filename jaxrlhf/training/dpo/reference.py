"""Log-probs of the fixed reference, computed once and cached in a file named by their content hash."""

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxrlhf import distributed
from jaxrlhf.errors import NumericsError, first_line
from jaxrlhf.files import write_whole


def cached_logprobs(
    folder: Path, key: str, shape: tuple[int, ...], compute: Callable[[], np.ndarray], note: Callable[[str], None]
) -> np.ndarray:
    """The result of `compute()`, float32 of `shape`, or of the last call with this `key`, a hash of everything that the
    result depends on.

    `note` prints which of the two, and if the file cannot be used. Raises NumericsError if the result is not finite,
    and StorageError if it cannot be written.
    """
    path = folder / f"{key}.npz"
    known: np.ndarray | None = None
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = file["logprobs"]
        if (stored.shape, stored.dtype) != (shape, np.float32):
            raise ValueError(f"it holds {stored.dtype} {stored.shape}, expected float32 {shape}")
        known = stored
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        note(f"{path} cannot be used ({first_line(error)}): log-probs of the reference are computed anew")
    if all(distributed.gather(known is not None)):
        assert known is not None
        note(f"log-probs of the reference: {len(known)} rows read from {path}")
        return known
    logprobs = np.asarray(compute(), np.float32)
    bad = np.flatnonzero(~np.isfinite(logprobs.reshape(len(logprobs), -1)).all(axis=1))
    if bad.size:
        raise NumericsError(
            f"log-probs of the reference are not finite in {bad.size} of {len(logprobs)} rows (the first: row "
            f"{bad[0] + 1} of those kept): the model of model.path cannot be trained as it is; "
            "`jaxrlhf doctor MODEL` says more"
        )
    if distributed.is_primary():
        file = io.BytesIO()
        np.savez(file, logprobs=logprobs)
        write_whole(path, file.getvalue())
    return logprobs
