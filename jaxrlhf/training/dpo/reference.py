"""Log-probs of a reference that does not move: computed once, and kept in a file by what they are made of."""

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxrlhf.errors import NumericsError, first_line
from jaxrlhf.files import write_whole


def kept(
    folder: Path, key: str, shape: tuple[int, ...], compute: Callable[[], np.ndarray], say: Callable[[str], None]
) -> np.ndarray:
    """`compute()`, float32 of `shape`, or what it returned when it was last asked for under `key`, a hash of everything
    that the result depends on. Says which, and that a file cannot be used. Raises NumericsError where the result is not
    finite, and StorageError where it cannot be kept."""
    path = folder / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            found = file["logprobs"]
        if (found.shape, found.dtype) != (shape, np.float32):
            raise ValueError(f"it holds {found.dtype} {found.shape}, expected float32 {shape}")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        say(f"{path} cannot be used ({first_line(error)}): log-probs of the reference are computed anew")
    else:
        say(f"log-probs of the reference: {len(found)} rows read from {path}")
        return found
    found = np.asarray(compute(), np.float32)
    bad = np.flatnonzero(~np.isfinite(found.reshape(len(found), -1)).all(axis=1))
    if bad.size:
        raise NumericsError(
            f"log-probs of the reference are not finite in {bad.size} of {len(found)} rows (the first: row "
            f"{bad[0] + 1} of those kept): the model of model.path cannot be learnt from as it is; "
            "`jaxrlhf doctor MODEL` says more"
        )
    file = io.BytesIO()
    np.savez(file, logprobs=found)
    write_whole(path, file.getvalue())
    return found
