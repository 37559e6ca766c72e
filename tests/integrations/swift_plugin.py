"""What docs/frameworks.md shows: an optimizer of this package in ms-swift, for `--external_plugins FILE --optimizer galore_torch`."""

from __future__ import annotations

from typing import Any

from swift.optimizers.base import OptimizerCallback
from swift.optimizers.mapping import optimizers_map

from galore_torch import QGaLoreAdamW8bit, galore_param_groups


class GaLore(OptimizerCallback):
    def create_optimizer(self, model: Any = None) -> Any:
        trainer = self.trainer
        groups = galore_param_groups(model or trainer.model, rank=8, update_proj_gap=4, scale=1.0)
        trainer.optimizer = QGaLoreAdamW8bit(groups, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        return trainer.optimizer


optimizers_map["galore_torch"] = GaLore
