"""Config of reward modelling."""

from typing import Literal

from jaxrlhf.config.base import Bool, FilePath, FlipProbability, NonNegative, Positive, check_used, section
from jaxrlhf.config.sft import SupervisedConfig

_LOSSES_USING = {
    "label_smoothing": ("pairwise",),
    "margins": ("pairwise",),
    "center_rewards_coefficient": ("pairwise", "ties"),
    "nu": ("ties",),
}


@section
class RewardConfig(SupervisedConfig):
    """Reward model training on preference pairs, rankings, labels or scores."""

    method = "reward"
    run_dir: FilePath = "runs/reward"
    head: Literal["linear", "mlp"] = "linear"
    """Scalar head on the last token's hidden state."""
    frozen_trunk: Bool = False
    """Train only the head and freeze the rest of the model."""
    loss: Literal["pairwise", "ties", "ranking", "classification", "regression"] = "pairwise"
    """Training objective. pairwise: chosen/rejected pairs (Bradley-Terry). ties: pairs of which some are ties
    (Rao-Kupper), marked by a column `tie` or `tied`, or `label: tie`. ranking: a list `responses`, ordered best first
    or with a list `ranks` (Plackett-Luce). classification: responses with a good/bad `label`, or both
    responses of each pair; used as a reward, the model returns the probability of good. regression: responses with a
    numeric `score`."""
    label_smoothing: FlipProbability = 0.0
    """pairwise: assumed probability that a pair's label is flipped."""
    margins: Bool = False
    """pairwise: subtract the column `margin` from the score difference in the loss."""
    center_rewards_coefficient: NonNegative = 0.0
    """pairwise and ties: coefficient of the penalty (chosen + rejected)^2, which centres the scores around 0."""
    nu: Positive = 0.5
    """ties: score differences within [-nu, nu] count as ties."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen_trunk and self.lora.enabled:
            raise ValueError(
                "frozen_trunk is true and lora.enabled too, but adapters would train the trunk; choose one"
            )
        check_used(self, _LOSSES_USING, self.loss, f"with loss: {self.loss}")
        if self.train.packing and (self.loss != "pairwise" or self.margins):
            conflict = "margins is true" if self.margins else f"loss is {self.loss}"
            raise ValueError(
                f"train.packing is true and {conflict}: a packed row keeps the texts of its pairs, but no labels "
                "or margins; set train.packing to false"
            )
