"""Write the MLP head of a reward model as StrictBot's rm.pt: a state dict of torch. Needs torch.

python scripts/recipe_rm_pt.py REWARD_MODEL rm.pt
"""

import sys

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

import jaxrlhf

_, params = jaxrlhf.load(sys.argv[1])
state = {}
for layer, number in enumerate((0, 3, 6)):  # ReLU and dropout are between them
    dense = params["score"][f"dense_{layer}"]
    state[f"head.net.{number}.weight"] = torch.tensor(np.asarray(dense["kernel"], np.float32).T.copy())
    state[f"head.net.{number}.bias"] = torch.tensor(np.asarray(dense["bias"], np.float32))
torch.save(state, sys.argv[2])
print(f"wrote {sys.argv[2]}: {', '.join(f'{name} {list(value.shape)}' for name, value in state.items())}")
