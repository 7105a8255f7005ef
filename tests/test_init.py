import subprocess
import sys

import jaxrlhf


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, jaxrlhf; dir(jaxrlhf); jaxrlhf.PPOConfig;"
        "print(sorted({'jax', 'flax', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert {"load", "export", "generate", "PPOTrainer", "SFTConfig"} <= set(dir(jaxrlhf))
    for name in set(jaxrlhf.__all__) - {"__version__"}:
        assert getattr(jaxrlhf, name).__name__ == name
    assert jaxrlhf.__version__[0].isdigit()


def test_other_names_are_not():
    assert not hasattr(jaxrlhf, "PPOTrainr")
