"""--compile: the eager run's curve, and gradients that still arrive layer by layer. Compiling takes long, so most of it is slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galore_torch.engine import inductor
from galore_torch.train.checkpoint.identity import identity
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.errors import UserError
from galore_torch.train.loop.trainer import train
from galore_torch.train.model import compile as compiled
from galore_torch.train.model.llama import ModelShape, build_model
from support.whole_runs import Silent, command

Make = Callable[..., PretrainConfig]
needs_compiler = pytest.mark.skipif(not inductor.has_compiler("cpu"), reason="torch.compile finds no C++ compiler here")


@pytest.fixture(autouse=True)
def _no_graphs_for_others(recwarn: pytest.WarningsRecorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nor files: a test that is killed may leave half of one. The recorder puts back the filters of warnings, to which compiling adds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    yield
    torch._dynamo.reset()


def llama(layers: int) -> Any:
    shape = ModelShape(16, 24, layers, 2, 64, 50)
    return build_model(shape, seed=0, dtype="float32", bos_token_id=None, eos_token_id=None, activation_checkpointing=False)


def test_missing_compiler_is_one_line_before_anything_is_made(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "has_compiler", lambda device: False)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler \(install g\+\+ or clang\), which torch does not find here"):
        command(make_config(compile=True))
    assert not (tmp_path / "run").exists()


def test_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="--compile finds no list of layers in Linear"):
        compiled.compile_layers(nn.Linear(2, 2))


def test_the_layers_are_what_is_compiled() -> None:
    model = llama(2)
    compiled.compile_layers(model)
    with_graph = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    assert with_graph == {"model.layers.0", "model.layers.1"}


def test_it_decides_bits_so_a_resumed_run_keeps_it(make_config: Make, token_data: TokenData) -> None:
    saved, ours = (identity(make_config(compile=on), "adamw", 0.01, token_data) for on in (False, True))
    assert {key for key in ours if ours[key] != saved[key]} == {"compile"}


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")  # torch's own, of what compiling imports
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adamw", {"total_batch_size": 8, "activation_checkpointing": True, "loss_chunk": 7}),
        ("galore_adamw_per_layer", {}),
        ("galore_adamw_per_layer", {"total_batch_size": 8, "grad_clipping": 0.5}),
        ("lora", {}),
    ],
)
def test_curve_is_the_eager_one(name: str, settings: dict[str, Any], make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """Losses, validation losses and what is kept for the backward pass, which fusion makes less of; six steps."""
    inductor_config: Any = torch._inductor.config
    curves = []
    for on in (False, True):
        config = make_config(optimizer=name, rank=4, compile=on, **settings)
        with inductor_config.patch(fallback_random=True):  # LoRA's dropout then draws what it draws eagerly
            result, _ = train(config, name, 0.01, token_data, tmp_path, Silent())
        assert result.status == "finished"
        curves.append([loss for _, loss in result.losses + result.evals])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_gradients_arrive_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-layer updates free each gradient before the next layer's exists: the hooks of one layer run before the next one's backward."""
    in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda layer: in_place(layer, backend="aot_eager"))  # the same graphs, no code to write
    model = llama(3)
    compiled.compile_layers(model)
    alive: list[int] = []
    down = [layer.mlp.down_proj.weight for layer in model.model.layers]

    def hook(p: Tensor) -> None:
        alive.append(sum(q.grad is not None for q in down))
        p.grad = None

    for p in down:
        p.register_post_accumulate_grad_hook(hook)
    model(input_ids=torch.randint(0, 50, (2, 8))).logits.sum().backward()
    assert alive == [1, 1, 1]
