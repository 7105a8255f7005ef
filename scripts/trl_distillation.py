"""Record TRL's generalised JSD loss in tests/fixtures/trl/distillation.safetensors.

Called by make_trl_fixtures.py, or directly: python scripts/trl_distillation.py. `generalized_jsd_loss` of GKDTrainer on
one random batch of logits:

    student, teacher            [B, T, V]
    mask                        [B, T]     bool
    loss/CASE                   []
    gradient/CASE               [B, T, V]  by the student's logits

The settings of each case are JSON under `about` in the metadata.
"""

import json
import pathlib

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import trl  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file
from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures"
B, T, V = 3, 5, 11
CASES = {
    "forward": {"beta": 0.0, "temperature": 1.0},
    "reverse": {"beta": 1.0, "temperature": 1.0},
    "half": {"beta": 0.5, "temperature": 1.0},
    "low-warm": {"beta": 0.1, "temperature": 0.7},
    "high-cool": {"beta": 0.9, "temperature": 2.0},
}


def main() -> None:
    rng = np.random.default_rng(0)
    student, teacher = (2 * rng.standard_normal((B, T, V)) for _ in range(2))
    student[0, 0] *= 10  # far apart
    mask = rng.random((B, T)) < 0.7
    labels = torch.tensor(np.where(mask, 0, -100))
    arrays = {"student": student, "teacher": teacher, "mask": mask}
    for name, settings in CASES.items():
        given = torch.tensor(student, requires_grad=True)
        loss = GKDTrainer.generalized_jsd_loss(given, torch.tensor(teacher), labels, **settings)
        loss.backward()
        assert given.grad is not None
        arrays |= {f"loss/{name}": loss.detach().numpy(), f"gradient/{name}": given.grad.numpy()}
    about = {"trl": trl.__version__, "cases": CASES}
    save_file(
        {name: np.ascontiguousarray(value) for name, value in arrays.items()},
        FIXTURES / "trl" / "distillation.safetensors",
        metadata={"about": json.dumps(about)},
    )


if __name__ == "__main__":
    main()
