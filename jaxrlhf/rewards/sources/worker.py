"""Reward functions in a worker process."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.errors import RewardError, first_line
from jaxrlhf.rewards.functions import Signature
from jaxrlhf.rewards.sources.protocol import ScoreRequest, SourceScores
from jaxrlhf.workers import WorkerProcess


class Worker:
    """The reward function that `spec` names, in its own process. Raises RewardError or ConfigError if it cannot be
    loaded. A call that takes longer than `timeout` seconds kills the process; the next call starts a new one."""

    def __init__(self, spec: str, *, options: Mapping[str, Any] | None = None, timeout: float) -> None:
        self.name, self._timeout = spec, timeout
        serve, subject = "jaxrlhf.rewards.sources.serve", f"reward function '{spec}'"
        self._process = WorkerProcess(serve, spec, subject, options or {})
        self.signature = Signature(**self._process.first)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """True if the process has ended; the next call starts it again."""
        return self._process.ended

    def close(self) -> None:
        self._process.close()

    def __call__(self, request: ScoreRequest) -> SourceScores:
        """Raises RewardError if the function raises, times out or crashes."""
        prefix = request.error_prefix(self.name)
        if self.ended:
            self._process.start()
        self.signature.check(request.columns, prefix, per_token=request.tokens is not None)
        columns = {name: values for name, values in request.columns.items() if self.signature.wants(name)}
        line = to_json_line(request._replace(columns=columns), prefix)
        try:
            reply = self._process.exchange(line, self._timeout)
        except TimeoutError:
            raise RewardError(
                f"{prefix} did not answer {len(request.completions)} completions within {self._timeout:g} s and was "
                f"killed; raise timeout of its component in reward.components, or make it faster{request.error_suffix}"
            ) from None
        except EOFError:
            raise RewardError(f"{prefix} {self._process.exit_reason()}{request.error_suffix}") from None
        if "error" in reply:
            raise RewardError(reply["error"])
        return SourceScores(**reply)


def to_json_line(request: ScoreRequest, prefix: str) -> bytes:
    """Encode a request. Raises RewardError for a column that cannot be written as JSON."""
    try:
        return json.dumps(request._asdict(), default=to_json).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        cause = error
    for name, values in request.columns.items():
        for i, value in enumerate(values):
            try:
                json.dumps(value, default=to_json)
            except (TypeError, ValueError, RecursionError) as error:
                raise RewardError(
                    f"{prefix} is to get column '{name}', whose value {i} cannot be written as JSON "
                    f"({first_line(error)}); let the function name the columns that it needs instead of taking all, "
                    "or drop the column from the data"
                ) from error
    raise cause


def to_json(value: Any) -> Any:
    """Convert arrays, scalars of arrays and other sequences for json.dumps."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"a {type(value).__name__}")
