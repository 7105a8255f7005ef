"""math-verify as a reward: what is compared, a hang that is ended, and the message where it is not installed."""

import sys

import pytest

from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.rewards.functions import load
from jaxrlhf.rewards.sources.protocol import ScoreRequest
from jaxrlhf.rewards.sources.worker import Worker

SPEC = "jaxrlhf.rewards.symbolic:math_verify"


def test_equal_as_mathematics():
    pytest.importorskip("math_verify")
    said = ["it is 0.5", r"\boxed{\frac{1}{2}}", "$(x+1)x$", r"$\{2, 1\}$", "so 72", "71", "no idea", "1", r"\boxed{2"]
    answer = ["1/2", r"$\boxed{0.5}$", "x^2+x", r"\{1,2\}", "8*9\n#### 72", "72", "3", None, "2"]
    scores = load(SPEC)(ScoreRequest([""] * len(said), said, {"answer": answer})).values
    assert scores == [1, 1, 1, 1, 1, 0, 0, None, 0]
    said = [r"\boxed{4} then $5$", r"\boxed{4} or \boxed{5}", "$5$, no, 4", r"\boxed{5} " + "so " * 50 + r"\boxed{4}"]
    assert load(SPEC)(ScoreRequest([""] * 4, said, {"answer": ["4"] * 4})).values == [1, 0, 1, 1]


def test_a_comparison_that_hangs_times_out():
    pytest.importorskip("math_verify")
    worker = Worker(SPEC, timeout=1.0)
    try:
        request = ScoreRequest([""], [r"\boxed{9^{9^{9^9}}}"], {"answer": ["3"]})
        with pytest.raises(RewardError, match="did not answer 1 completions within 1 s and was killed"):
            worker(request)
    finally:
        worker.close()


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "jaxrlhf.rewards.symbolic", raising=False)
    with pytest.raises(ConfigError, match=r'math_verify needs math-verify.*pip install "jaxrlhf\[math\]"'):
        load(SPEC)
