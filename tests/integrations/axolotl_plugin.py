"""What docs/frameworks.md shows: an optimizer of this package in Axolotl, whose own hook `create_optimizer` nothing calls (0.19)."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from galore_torch import QGaLoreAdamW8bit, galore_param_groups


class GaLorePlugin(BasePlugin):
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        groups = galore_param_groups(trainer.model, rank=8, update_proj_gap=4, scale=1.0)
        trainer.optimizer = QGaLoreAdamW8bit(groups, lr=cfg.learning_rate)
