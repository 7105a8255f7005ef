"""StrictBot's rm.pt: its head gives the same scores here, and a pickle stays unread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf import models, weights
from jaxrlhf.errors import DataError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


class Trap:
    def __reduce__(self):
        return pytest.fail, ("the file was executed",)


def test_the_head_of_an_rm_pt_scores_as_in_torch(tiny_model, tmp_path):
    from convert_rm_pt import convert, head, read

    made, params = weights.load(tiny_model, init="random", key=jax.random.key(0))
    base = weights.export(tmp_path / "base", made, params, source=tiny_model)
    nn = torch.nn
    net = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 256), nn.ReLU(), nn.Dropout(0.1),
                        nn.Linear(256, 1))  # fmt: skip
    state = {f"head.net.{name}": value for name, value in net.state_dict().items()}
    torch.save(state | {"base.norm.weight": torch.ones(32)}, tmp_path / "rm.pt")
    folder, unexpected = convert(tmp_path / "rm.pt", str(base), tmp_path / "rm")
    assert unexpected == ["base.norm.weight"]
    model, params = jaxrlhf.load(folder)
    assert model.head == "mlp"
    hidden = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    with torch.no_grad():
        wanted = net.eval()(torch.from_numpy(hidden))[:, 0].numpy()
    np.testing.assert_allclose(models.scalar_head(params, model, jnp.asarray(hidden)), wanted, rtol=1e-5, atol=1e-6)

    tensors = read(tmp_path / "rm.pt")
    with pytest.raises(DataError, match=r"missing: head.net.3.bias"):
        head({name: value for name, value in tensors.items() if name != "head.net.3.bias"}, 32)
    with pytest.raises(DataError, match=r"head.net.0 has a weight \[512, 32\].*expected \[512, 24\]"):
        head(tensors, 24)
    torch.save({"head.net.0.weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(DataError, match="holds more than tensors"):
        read(tmp_path / "trap.pt")
