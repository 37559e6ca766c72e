"""--gradients: the same run whichever way the matrices' gradients take. Oracle: whole gradients, kept until the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from galore_torch.optim.direct_backward import DirectLayer
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.errors import UserError
from galore_torch.train.loop import trainer
from support.whole_runs import Silent, command

Make = Callable[..., PretrainConfig]
EXACT, ROUNDED = 1e-5, 2e-3  # relative, of losses; 8-bit codes and 16-bit weights may take the neighbouring value


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers whose R is made in their backward pass, call by call."""
    names: list[str] = []
    reduce = DirectLayer.reduce

    def remembered(layer: DirectLayer, *args: Any) -> torch.Tensor:
        names.append(layer.name)
        return reduce(layer, *args)

    monkeypatch.setattr(DirectLayer, "reduce", remembered)
    return names


def curve(config: PretrainConfig, data: TokenData, folder: Path) -> list[float]:
    name, lr = config.contenders[0]
    result, model = trainer.train(config, name, lr, data, folder, Silent())
    assert result.status == "finished"
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear)), "left as they were"
    return [loss for _, loss in result.losses + result.evals]


@pytest.mark.parametrize(
    ("name", "settings", "rel"),
    [
        ("galore_adamw", {}, EXACT),
        ("galore_adamw", {"proj_type": "right", "activation_checkpointing": True}, EXACT),
        ("galore_adamw", {"proj_type": "full", "track_subspace": True}, EXACT),
        ("galore_adamw8bit", {}, ROUNDED),
        ("galore_adamw", {"dtype": "bfloat16"}, ROUNDED),
        ("galore_adafactor", {"activation_checkpointing": True}, EXACT),
    ],
)
def test_every_way_of_the_gradients_is_the_same_run(
    name: str, settings: dict[str, Any], rel: float, make_config: Make, token_data: TokenData, tmp_path: Path, reduced: list[str]
) -> None:
    """Losses over eight steps, in which every matrix is refreshed at least twice after the first."""
    common: dict[str, Any] = {"rank": 4, "num_training_steps": 8, **settings}
    full, projected, default = (
        curve(make_config(optimizer=name, gradients=way, **common), token_data, tmp_path) for way in ("full", "project", None)
    )
    assert len(reduced) == 7 * 8, "seven matrices, eight steps, and only of the default"
    per_layer = curve(make_config(optimizer=f"{name}_per_layer", **common), token_data, tmp_path)
    assert len(reduced) == 2 * 7 * 8
    for found in (projected, default, per_layer):
        assert found == pytest.approx(full, rel=rel)


@pytest.mark.parametrize("settings", [{"total_batch_size": 8}, {"grad_clipping": 0.05}])
@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_per_layer"])
def test_accumulated_and_clipped_gradients_are_the_projected_ones(
    name: str, settings: dict[str, Any], make_config: Make, token_data: TokenData, tmp_path: Path
) -> None:
    """Oracle: "project", whose full gradients exist; the norm is of the same R, the basis from the same first batch."""
    common = {"optimizer": name, "rank": 4, "num_training_steps": 8, **settings}
    direct, projected = (curve(make_config(gradients=way, **common), token_data, tmp_path) for way in ("direct", "project"))
    assert direct == pytest.approx(projected, rel=EXACT)


def test_q_galore_takes_it(make_config: Make, token_data: TokenData, tmp_path: Path, reduced: list[str]) -> None:
    config = make_config(optimizer="qgalore_adamw8bit_per_layer", rank=4, dtype="bfloat16", num_training_steps=4)
    name, lr = config.contenders[0]
    assert trainer.train(config, name, lr, token_data, tmp_path, Silent())[0].finished
    assert len(reduced) == 7 * 4


def test_matrices_left_out_at_the_start_are_one_note(
    make_config: Make, model_file: Path, reduced: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    """A head that is projected and whose weight is the embedding's."""
    model_file.write_text(json.dumps(json.loads(model_file.read_text()) | {"tie_word_embeddings": True}))
    code, said = command(make_config(optimizer="galore_adamw", rank=4, targets=("proj", "lm_head")))
    assert code == 0
    assert said.count("made in full and then projected") == 1
    assert "note: the gradients of 1 matrices are made in full and then projected" in said
    assert "(sparse): model.embed_tokens.weight = lm_head.weight" in said
    assert reduced
    assert not [warning for warning in recwarn if "made in full" in str(warning.message)]


def test_layers_left_out_during_the_run_are_one_note(make_config: Make, recwarn: pytest.WarningsRecorder) -> None:
    """A loss in chunks multiplies with the head's weight outside of the head. Oracle for the losses: whole gradients."""
    said = []
    curves = []
    for way in ("direct", "full"):
        settings = {"rank": 4, "targets": ("proj", "lm_head"), "loss_chunk": 7, "save_dir": None}
        config = make_config(optimizer="galore_adamw", gradients=way, **settings)
        code, text = command(config)
        assert code == 0
        said.append(text.count("1 matrices are used outside of their layers too"))
        curves.append([line.split("perplexity")[1] for line in text.splitlines() if "validation perplexity" in line])
    assert said == [1, 0]
    assert curves[0] == curves[1]
    assert not [warning for warning in recwarn if "made in full" in str(warning.message)]


def test_a_resumed_run_may_change_them_where_that_moves_no_weight(make_config: Make, tmp_path: Path) -> None:
    common: dict[str, Any] = {"optimizer": "galore_adamw", "rank": 4, "save_every": 3}
    assert command(make_config(**common, gradients="full"))[0] == 0
    code, said = command(make_config(**common, gradients="direct", resume="auto"))
    assert (code, "resumed    galore_adamw after step 6" in said) == (0, True)
    clipped: dict[str, Any] = common | {"grad_clipping": 0.5, "save_dir": str(tmp_path / "clipped")}
    assert command(make_config(**clipped))[0] == 0
    assert command(make_config(**clipped, gradients="project", resume="auto"))[0] == 0
    with pytest.raises(UserError, match=r"--gradients is full, but direct in .*step-000006, which would change the run; give direct"):
        command(make_config(**clipped, gradients="full", resume="auto"))
