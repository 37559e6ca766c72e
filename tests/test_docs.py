"""README and docs say what is so: their code runs, their commands parse, what they name exists. The oracle is the tree itself."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from galore_torch import cli
from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.config.flags import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/galore-torch/galore-torch"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
FENCE = re.compile(r"^(?P<mark><!-- not run[^\n]*-->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = {"range(100)": "range(3)", "256": "64", "rank=64": "rank=8", "rank=128": "rank=16"}  # what makes a block quick


def blocks(page: str, python: bool) -> list[str]:
    """The code of one page's Python or shell blocks, but for those whose comment says why they are not run."""
    found = FENCE.finditer(TEXTS[page])
    return [block["code"] for block in found if block["language"] == ("python" if python else "") and not block["mark"]]


def model(page: str) -> torch.nn.Module:
    """What `model` is in a page that does not make one: torch's own layer, and where the page saves it a Hugging Face model."""
    if "save_pretrained" not in TEXTS[page]:
        return torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, python=True)])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in one namespace, at small sizes; a warning fails."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": model(page), "torch": torch}
    for code in blocks(page, python=True):
        for large, small in SMALL.items():
            code = code.replace(large, small)
        exec(compile(code, page, "exec"), names)


def command_lines(page: str) -> list[str]:
    """Every line of a page's shell blocks, continued lines joined, without comments."""
    text = "\n".join(blocks(page, python=False)).replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


COMMANDS = [(page, line) for page in TEXTS for line in command_lines(page)]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_are_real(page: str, line: str) -> None:
    """Those of `galore` parse; make targets, scripts and extras exist; a line that is none of these fails."""
    words = shlex.split(line, comments=True)
    if "-m" in words and words[words.index("-m") + 1] == "galore_torch.train":
        words = ["galore", "pretrain", *words[words.index("-m") + 2 :]]
    if words[0] == "galore":
        arguments = vars(cli._parser().parse_args([cli._underscored(word) for word in words[1:]]))
        assert callable(arguments["run"])
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in words[1:] if "=" not in word)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[:2] == ["pip", "install"], f"{page}: what is {line!r}?"
        for extra in re.findall(r"\[(.*?)\]", line):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


TEST_SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("page", TEXTS)
def test_what_is_named_exists(page: str) -> None:
    """Files, tests and links into the repository."""
    text = TEXTS[page]
    code = set(re.findall(r"`([^`\n]+)`", text))
    paths = {name for name in code if re.fullmatch(r"(tests|docs|examples|benchmarks|src|slots|engine|ops|optim)/[\w/.-]+\.\w+", name)}
    paths |= set(re.findall(rf"{REPOSITORY}/(?:blob|tree)/main/([\w/.-]+)", text))
    paths |= set(re.findall(r"raw\.githubusercontent\.com/galore-torch/galore-torch/main/([\w/.-]+)", text))
    missing = [name for name in paths if not any((base / name).exists() for base in (ROOT, ROOT / "src" / "galore_torch"))]
    assert not missing
    tests = {name for name in code if re.fullmatch(r"test_\w+", name)}
    assert not [name for name in tests if f"def {name}(" not in TEST_SOURCE]


def test_links_to_a_heading_have_it() -> None:
    """`#anchor` of links to Markdown files in the repository, by GitHub's rule; links inside docs/ are mkdocs' own to check."""
    for page, text in TEXTS.items():
        for name, anchor in re.findall(rf"{REPOSITORY}/blob/main/([\w/.-]+\.md)#([\w-]+)", text):
            headings = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {name} has no heading #{anchor}"


def test_bytes_a_parameter_are_those_of_the_shapes() -> None:
    """Every number of the README's table and every row of the memory page, from the benchmark that adds up `state_spec`."""
    spec = importlib.util.spec_from_file_location("state_bytes", ROOT / "benchmarks" / "state_bytes" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = list(module.rows("7b", "bfloat16"))
    parameters = rows[0][2] / 8  # AdamW's two fp32 moments
    found = [(name, how, state / parameters) for name, how, state in rows]
    page = [[cell.strip() for cell in row.strip("| ").split("|")] for row in TEXTS["docs/memory.md"].splitlines()]
    listed = [(row[0], row[1], float(row[2])) for row in page if len(row) == 5 and re.fullmatch(r"[\d.]+", row[2])]
    assert listed == [(name, how, pytest.approx(each, abs=0.005)) for name, how, each in found]
    bytes_of = {f"{name} {how}": f"{each:.2f}" if each > 0.01 else f"{each:.1g}" for name, how, each in found}
    table = TEXTS["README.md"].partition("## Which optimizer")[2].partition("\n##")[0]
    for row, names in {
        "**`GaLoreAdamW8bit`**": ("GaLore, r = n/4 8-bit moments, bf16 basis", "GaLore, r = n/8 8-bit moments, bf16 basis"),
        "`QGaLoreAdamW8bit`": [f"Q-GaLore, r = n/{share} 8-bit moments, 4-bit basis; int8 weights" for share in (4, 8)],
        "`GaLoreAdamW`": ("GaLore, r = n/4 fp32 moments", "GaLore, r = n/8 fp32 moments"),
        "beside, as published: APOLLO with bf16 moments": ("APOLLO, r = n/4 moments in bfloat16", "APOLLO, r = n/8 moments in bfloat16"),
        "AdamW fp32, bf16, 8-bit, 4-bit; Adafactor without momentum": [
            *(f"AdamW {how} moments" for how in ("fp32", "bf16", "8-bit", "4-bit")),
            "Adafactor rows and columns, no first moment",
        ],
        "`GaLoreMuon`": (
            "GaLoreMuon, r = n/4 8-bit momentum, bf16 basis",
            "GaLoreMuon, r = n/8 8-bit momentum, bf16 basis",
            "Muon 8-bit momentum; 8-bit AdamW outside of the layers",
        ),
    }.items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {row} |")]
        assert re.findall(r"\d+\.\d+", line.replace(row, "")) == [bytes_of[name] for name in names]


def test_plan_of_llama_7b_is_what_the_command_prints() -> None:
    """Every number of the table beside the picture, from the plan itself, by formulas."""
    from galore_torch.train.commands.plan import COMPARED
    from galore_torch.train.config.config import PretrainConfig
    from galore_torch.train.plan.answer import plan_request, planned
    from galore_torch.train.plan.show import parts

    text = TEXTS["docs/plan.md"].partition("| | weights | gradients |")[2].partition("\n\n")[0]
    listed = {row.split("|")[1].strip(): re.findall(r"\d+\.\d\d", row) for row in text.splitlines()[2:]}
    found = {}
    for label, name in COMPARED.items():
        config = PretrainConfig(model_config="7b", dtype="bfloat16", batch_size=1, rank=1024, optimizer=name)
        plan = planned(plan_request(config, device="cuda"), traced=False)
        at = parts(plan)
        sizes = [at[key] for key in ("weights", "gradients", "basis", "moments")]
        sizes += [at["activations"] + at["logits"], at["transient"], plan.reserve, plan.needed]
        found[label] = [f"{size / 1e9:.2f}" for size in sizes]
    assert listed == found


def test_readme_is_read_in_a_minute() -> None:
    """At most 120 lines, and links that work on the package index as well: none is relative."""
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 120
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_options_page_lists_every_setting() -> None:
    """And the arguments that classes share: what the hook makes of the code."""
    page = hooks().on_page_markdown("<!-- options --><!-- shared arguments -->")
    assert [name for name in SETTINGS if f"`--{name}" not in page] == []
    assert [name for name in FinetuneConfig.settings() if f"`--{name}" not in page.partition("## galore finetune")[2]] == []
    for command in ("pretrain", "finetune", "plan", "eval", "export", "generate", "report", "recipes show"):
        assert f"## galore {command}\n" in page
    for name in ("rank", "update_proj_gap", "projector", "compile"):
        assert f"- **{name}**: " in page


def test_contributing_lists_the_folders_of_the_law() -> None:
    """In the law's order, none left out."""
    table = TEXTS["CONTRIBUTING.md"].partition("| folder of")[2].partition("\n\n")[0]
    listed = [row.split("|")[1].strip(" `").removeprefix("train/").removesuffix(".py") for row in table.splitlines()[2:]]
    law = re.search(r'^LAW = "(.*?)"', (ROOT / "tests" / "test_import_law.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert law is not None
    assert [{"the package's own files": "root"}.get(name, name) for name in listed] == law[1].split(" < ")


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_parser_of_options_reads_choices_and_pairs() -> None:
    """`--device cpu|cuda`, `--gap_range LEAST MOST`; a bar does not break the table."""
    parser = argparse.ArgumentParser()
    spelled = hooks().spelled
    assert spelled(parser.add_argument("--device", choices=("cpu", "cuda"))) == r"`--device cpu\|cuda`"
    assert spelled(parser.add_argument("--gap_range", nargs=2, metavar=("LEAST", "MOST"))) == "`--gap_range LEAST MOST`"
    assert spelled(parser.add_argument("-o", "--output", metavar="FILE")) == "`-o FILE` or `--output FILE`"
    assert spelled(parser.add_argument("--json", action="store_true")) == "`--json`"
    assert spelled(parser.add_argument("source", metavar="RUN")) == "`RUN`"
