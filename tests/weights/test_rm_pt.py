"""StrictBot's rm.pt: its head gives the same scores here, and a pickle stays unread."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf import models, weights
from jaxrlhf.cli import main
from jaxrlhf.config import TokenizerSource
from jaxrlhf.errors import DataError
from jaxrlhf.weights.families import ADD_EOS
from jaxrlhf.weights.rm_pt import head, read

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


class Trap:
    def __reduce__(self):
        return pytest.fail, ("the file was executed",)


def test_the_head_of_an_rm_pt_scores_as_in_torch(tiny_model, tmp_path, capsys):
    made, params = weights.load(tiny_model, init="random", key=jax.random.key(0))
    base = weights.export(tmp_path / "base", made, params, source=tiny_model)
    nn = torch.nn
    net = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 256), nn.ReLU(), nn.Dropout(0.1),
                        nn.Linear(256, 1))  # fmt: skip
    state = {f"head.net.{name}": value for name, value in net.state_dict().items()}
    torch.save(state | {"base.norm.weight": torch.ones(32)}, tmp_path / "rm.pt")
    assert main(["convert-rm", str(tmp_path / "rm.pt"), str(base), str(tmp_path / "rm")]) == 0
    shown, folder = capsys.readouterr(), tmp_path / "rm"
    assert shown.out.strip() == str(folder) and "not used: base.norm.weight" in shown.err
    model, params = jaxrlhf.load(folder)
    assert model.head == "mlp"
    hidden = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    with torch.no_grad():
        wanted = net.eval()(torch.from_numpy(hidden))[:, 0].numpy()
    np.testing.assert_allclose(models.scalar_head(params, model, jnp.asarray(hidden)), wanted, rtol=1e-5, atol=1e-6)

    prompts, completions = ["why? ", "what is it? "], ["because.", "a cat, they say."]
    tokenizer = jaxrlhf.load_tokenizer(base, TokenizerSource())
    trunk, trunk_params = jaxrlhf.load(base)

    def by_hand(prompt, completion):
        """The training code: the head on the last token of q + r."""
        ids = jnp.array([tokenizer.encode(prompt + completion)])
        states = models.forward(trunk_params, trunk, ids, jnp.ones(ids.shape, bool))[:, -1]
        with torch.no_grad():
            return float(net(torch.from_numpy(np.array(states)))[0, 0])

    wanted = [by_hand(*pair) for pair in zip(prompts, completions, strict=True)]
    np.testing.assert_allclose(jaxrlhf.score(folder, prompts, completions), wanted, rtol=1e-4, atol=1e-6)
    ended = jaxrlhf.score(folder, prompts, completions, add_eos="true")
    assert np.abs(ended - wanted).min() > 1e-4
    again = weights.export(tmp_path / "again", model, params, source=folder)
    assert ADD_EOS not in json.loads((again / "config.json").read_text()), "another head may read end tokens"

    assert main(["convert-rm", str(tmp_path / "rm.pt"), str(base), str(base)]) == 7, "the base model stays"
    assert "exists and is not empty; give a new folder" in capsys.readouterr().err
    tensors = read(tmp_path / "rm.pt")
    with pytest.raises(DataError, match=r"missing: head.net.3.bias"):
        head({name: value for name, value in tensors.items() if name != "head.net.3.bias"}, 32)
    with pytest.raises(DataError, match=r"head.net.0 has a weight \[512, 32\].*expected \[512, 24\]"):
        head(tensors, 24)
    torch.save({"head.net.0.weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(DataError, match="holds more than tensors"):
        read(tmp_path / "trap.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(DataError, match="damaged or holds more than tensors"):
        read(tmp_path / "text.pt")
