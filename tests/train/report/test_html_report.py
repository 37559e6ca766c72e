"""`galore report`: one file that needs nothing, every series of every run in it, whatever the runs are called or how they ended."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galore_torch import cli
from galore_torch.train.errors import UserError
from galore_torch.train.report.charts import CHARTS
from galore_torch.train.report.html import write_report
from galore_torch.train.report.listing import list_runs
from galore_torch.train.report.runs import read_runs

HOSTILE = "<img src=x onerror=alert(1)>&\"'$\\alpha$"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
in_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on PATH")
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, and the text inside each figure, by the figure's id."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.source = path, path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: dict[str, str] = {}
        self.open: list[str] = []
        self.figure = ""
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figure":
            self.figure = dict(attrs)["id"] or ""
            self.figures[self.figure] = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.figure = "" if tag == "figure" else self.figure

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.figure:
            self.figures[self.figure] += data


def updates(count: int, **more: Any) -> list[dict[str, Any]]:
    """Rows as a low-rank run writes them: a refresh at every third step, two layers."""
    rows: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        row = {"step": step, "loss": 6.0 - step / count, "lr": 0.01, "grad_norm": 1.0 + 1 / step, "tokens_seen": 100 * step}
        row |= {"tokens_per_s": 1000.0, "seconds": 0.1 + 0.01 * (step % 3 == 0), "optimizer_s": 0.02, "refreshes": int(step % 3 == 0)}
        row |= {"rss_mb": 400.0, "peak_rss_mb": 500.0}
        if step % 3 == 0:
            row["overlap"] = {f"model.layers.{step // 3 % 2}.mlp.up_proj.weight": 0.5}
        rows.append(row | more)
    rows[0]["memory_mb"] = {"weights": 20.0, "gradients": 20.0, "optimizer": 10.0, "activations": 50.0}
    return rows


def evaluation(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "eval_loss": loss, "eval_perplexity": 1.0, "eval_tokens": 10, "tokens_seen": 100 * step, "seconds": 0.5}


def write_run(folder: Path, rows: list[dict[str, Any]], tail: str = "", **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    settings = {"num_training_steps": 12, "rank": 4, "resolved": {"optimizers": [{"optimizer": "galore_adamw", "lr": 0.01}]}}
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Two whole runs, one with a hostile name, hostile settings and a hostile parameter."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [evaluation(0, 6.1), *updates(12), evaluation(12, 5.2)]
    plain = write_run(folder / "plain", rows)
    hostile = write_run(folder / HOSTILE, rows, rank=8, note="</pre><script>alert(1)</script>")
    with (hostile / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(updates(13)[-1] | {"overlap": {"<b>layer</b>": 0.5}}) + "\n")
    write_report([str(plain), str(hostile)], str(folder / "out" / "page.html"))
    return Page(folder / "out" / "page.html")


def test_sizes_that_a_resumed_run_wrote_twice_count_once(tmp_path: Path) -> None:
    """Each process measures them in its first step; the table and the picture of memory read this."""
    rows = updates(12)
    again = [*rows[:6], rows[6] | {"memory_mb": rows[0]["memory_mb"]}, *rows[7:]]
    once, twice = (write_run(tmp_path / name, each) for name, each in (("once", rows), ("twice", again)))
    first, second = read_runs([once, twice])
    assert second.memory == first.memory == {"weights": 20.0, "gradients": 20.0, "optimizer": 10.0, "activations": 50.0}


def test_needs_no_network_and_runs_no_script(page: Page) -> None:
    """No address but those inside the page and in its own data, no script, and a policy that forbids both."""
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "img"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "data", "action", "srcset"}:
                assert (value or "").startswith(("#", "data:image/png;base64,")), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import", page.source)
    policy = [attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_every_series_of_every_run_is_there(page: Page) -> None:
    assert list(page.figures) == [chart.key for chart in CHARTS]
    for key, text in page.figures.items():
        assert "Not recorded" not in text
        assert "No step" not in text
        assert "plain" in text, key
        assert HOSTILE in text, key
        if key not in ("overlap", "memory"):  # there a colour is a layer, or a part
            assert {"var(--c0)", "var(--c1)"} <= set(re.findall(r"var\(--c\d\)", svg(page, key))), key
    for word in ("step", "loss (nats per token)", "validation"):
        assert word in page.figures["loss-steps"]
    assert "training tokens" in page.figures["loss-tokens"]
    assert "time of steps and evaluations (s)" in page.figures["loss-time"]
    for word in ("layer 0", "layer 1"):
        assert word in page.figures["overlap"]
    for word in ("without a refresh: 7, median 100 ms", "with a refresh: 4, median 110 ms"):
        assert word in page.figures["step-time"]
    for word in ("weights", "gradients", "optimizer", "activations", "100 MB"):
        assert word in page.figures["memory"]


def svg(page: Page, key: str) -> str:
    return page.source.split(f'<figure id="{key}">')[1].split("</figure>")[0]


def test_hostile_names_are_text(page: Page) -> None:
    """The name, a setting and a parameter appear as they are, and no element came of them."""
    assert HOSTILE in page.text
    assert "</pre><script>alert(1)</script>" in page.text
    assert "<b>layer</b>" in page.text
    assert not {"img", "script", "b"} & {tag for tag, _ in page.elements}


def test_ids_are_unique_and_links_inside_lead_somewhere(page: Page) -> None:
    """Ten pictures in one page must not take each other's clip paths and markers."""
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", page.source)) | {a["xlink:href"][1:] for _, a in page.elements if a.get("xlink:href")}  # type: ignore[index]
    assert used
    assert used <= set(ids)


def test_page_follows_light_and_dark(page: Page) -> None:
    """No fixed ink or palette is left in the pictures; both schemes define the same colours."""
    for key in page.figures:
        for style in re.findall(r'style="([^"]*)"', svg(page, key)):
            assert not re.search(r"#1b1f24|#0072b2|#d55e00", style)
    light, dark = page.source.split("prefers-color-scheme: dark")[0], page.source.split("prefers-color-scheme: dark")[1]
    for name in ("--page", "--ink", "--card", "--c0", "--c6"):
        assert f"{name}:" in light
        assert f"{name}:" in dark


def test_letters_of_charts_are_readable_on_a_phone(page: Page) -> None:
    """By hand: 390 px less two margins and two paddings of 8 px is what a chart has; its letters shrink or grow with it."""
    for key in page.figures:
        width = float(re.findall(r'viewBox="0 0 ([0-9.]+) ', svg(page, key))[0])
        letters = [float(size) for size in re.findall(r"font-size: ([0-9.]+)px", svg(page, key))]
        assert letters
        assert min(letters) * (390 - 4 * 8) / width >= 9, key


def browse(page: Path, *flags: str) -> tuple[str, list[str]]:
    """(standard output, messages of the console) of a headless browser that opens `page`."""
    # Without its sandbox it runs in a container too; the page is made here.
    how = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run([BROWSER, *how, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@in_browser
def test_the_console_tells_what_the_policy_forbids(page: Page, tmp_path: Path) -> None:
    """So its silence in the next tests means something."""
    broken = tmp_path / "broken.html"
    broken.write_text(page.source.replace("</body>", "<script>1</script></body>"), encoding="utf-8")
    assert "Content Security Policy" in " ".join(browse(broken, "--dump-dom")[1])


@in_browser
def test_a_browser_sees_every_picture_and_no_markup_in_names(page: Page, tmp_path: Path) -> None:
    dom, complaints = browse(page.path, "--dump-dom")
    assert complaints == []
    (tmp_path / "dom.html").write_text(dom, encoding="utf-8")
    seen = Page(tmp_path / "dom.html")
    assert list(seen.figures) == [chart.key for chart in CHARTS]
    assert not {"img", "script"} & {tag for tag, _ in seen.elements}
    assert HOSTILE in seen.text


@in_browser
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_paints_both_runs(width: int, page: Page, tmp_path: Path) -> None:
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    _, complaints = browse(page.path, f"--window-size={width},6000", "--hide-scrollbars", f"--screenshot={shot}")
    assert complaints == []
    pixels = np.round(imread(shot)[..., :3] * 255).astype(int)
    for name in ("c0", "c1"):
        light = re.findall(rf"--{name}:\s*#([0-9a-f]{{6}})", page.source)[0]  # the first of two schemes
        painted = (pixels == [int(light[i : i + 2], 16) for i in (0, 2, 4)]).all(axis=-1).sum()
        assert painted > 1000, f"{painted} pixels of --{name}"


def test_pngs_lie_beside_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", updates(4))
    written = write_report([str(run)])
    assert written[0] == run / "report.html"
    assert {path.name for path in written[1:]} == {f"report-{chart.key}.png" for chart in CHARTS}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])


def rows_of(page: Page) -> list[dict[str, str]]:
    """The final table, each row by its header."""
    table = page.source.split("</table>")[0]
    header, *rows = [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in table.split("<tr>")[1:]]
    return [dict(zip(header, row, strict=True)) for row in rows]


def cells(page: Page) -> dict[str, str]:
    return rows_of(page)[0]


def test_final_table(page: Page) -> None:
    """By hand: 12 steps of 100 tokens, 1.24 s of steps and two evaluations of 0.5 s; 4 of 12 refresh, 10 ms each."""
    first = cells(page)
    assert first["optimizer"] == "galore_adamw"
    assert first["status"] == "finished"
    assert (first["steps"], first["tokens"], first["validation loss"], first["perplexity"]) == ("12", "1,200", "5.2000", "181.27")
    assert (first["time"], first["state MB"], first["peak MB"]) == ("2.2 s", "10.00", "500")
    assert first["tokens/s"] == f"{1100 / (11 * 0.1 + 4 * 0.01):,.0f}"


def test_result_is_what_was_measured_after_an_update(tmp_path: Path) -> None:
    """exp(5.2) = 181.27. The loss of 6.0 before training is in the curve and nowhere in the table; `galore ls` says the same."""
    before = evaluation(0, 6.0)
    runs = {
        "a": ([before, *updates(5)], "-", "-"),  # interrupted before its first evaluation
        "b": ([before, *updates(6), evaluation(6, 5.2)], "181.27", "5.2000"),
        "c": ([before, *updates(8), evaluation(6, 5.2)], "181.27 at 6", "5.2000"),
        "d": ([before, *updates(6), evaluation(6, 800.0)], "-", "800.0000"),  # beyond a float
        "e": ([before, *updates(6), evaluation(6, 5.2) | {"eval_loss": None}], "-", "-"),
        "f": ([before, evaluation(6, 5.2)], "181.27 at 6", "5.2000"),  # steps that could not be read
    }
    page = Page(write_report([str(write_run(tmp_path / name, rows)) for name, (rows, *_) in runs.items()], str(tmp_path / "all.html"))[0])
    listed = {Path(line.split()[0]).name: line for line in list_runs(str(tmp_path)).splitlines()[1:]}
    for row, (name, (_, perplexity, loss)) in zip(rows_of(page), runs.items(), strict=True):
        assert (row["run"], row["perplexity"], row["validation loss"]) == (name, perplexity, loss)
        assert perplexity.split()[0] in listed[name].split()
        assert "403.43" not in listed[name]


@pytest.mark.parametrize(
    ("rows", "tail", "status"),
    [
        ([evaluation(0, 6.0), *updates(5)], '{"step": 6, "lo', "not finished: step 5 of 12"),  # killed while writing
        (updates(12), "", "finished"),  # no evaluation
        (updates(1), "", "not finished: step 1 of 12"),
        ([evaluation(0, 6.0)], "", "not finished: step 0 of 12"),
        ([], "", "not finished: step 0 of 12"),
        ([*updates(2), updates(3, loss=float("nan"))[-1]], "", "not finished: step 3 of 12"),
        ([*updates(2), {"step": 3, "lr": 0.01, "skipped": "the loss is nan", "seconds": 0.1}], "", "not finished: step 3 of 12"),
        (
            [{"step": 1, "loss": 6.0, "refreshes": "two", "overlap": [], "lr": None, "memory_mb": 3, "seconds": True}],
            "[]\n7\n",
            "not finished",
        ),
    ],
    ids=["killed", "no evaluation", "one step", "no step", "empty", "diverged", "skipped", "foreign values"],
)
def test_short_and_broken_runs_have_a_report(rows: list[dict[str, Any]], tail: str, status: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows, tail)
    page = Page(write_report([str(run)])[0])
    assert cells(page)["status"].startswith(status)
    assert list(page.figures) == [chart.key for chart in CHARTS]
    assert ("could not be read" in page.text) == bool(tail)
    if not rows:
        assert page.figures["loss-steps"].count("No step was written") == 1


def test_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    """Killed at 6, resumed from 4: steps 5 and 6 were written twice, the second time counts."""
    (run,) = read_runs([write_run(tmp_path / "run", [*updates(6), *updates(9, lr=0.5)[4:]])])
    steps, rates = run.series("lr")
    assert steps == list(range(1, 10))
    assert rates == [0.01] * 4 + [0.5] * 5


@pytest.mark.parametrize(("steps", "status"), [(6, "interrupted"), (4, "not finished: step 6 of 12")])
def test_summary_counts_until_a_resumed_run_goes_beyond_it(steps: int, status: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates(6))
    (folder / "summary.json").write_text(json.dumps([{"optimizer": "adamw", "status": "interrupted", "steps": steps}]))
    (run,) = read_runs([folder])
    assert run.status == status


def test_comparison_is_all_its_runs(tmp_path: Path) -> None:
    """Names, optimizers and what summary.json says of each; the same run named twice is one."""
    home = tmp_path / "compare"
    for name in ("adamw-lr0.01", "adamw-lr0.0100000001"):
        write_run(home / name, updates(3))
        (home / name / "config.json").unlink()
    (home / "config.json").write_text(json.dumps({"num_training_steps": 3, "resolved": {"optimizers": [{}, {}]}}))
    records = [{"optimizer": "adamw", "lr": lr, "status": status} for lr, status in ((0.01, "finished"), (0.0100000001, "the loss is nan"))]
    (home / "summary.json").write_text(json.dumps(records))
    runs = read_runs([home, home / "adamw-lr0.01"])
    assert [(run.name, run.optimizer, run.status) for run in runs] == [
        ("adamw-lr0.01", "adamw", "finished"),
        ("adamw-lr0.0100000001", "adamw", "the loss is nan"),
    ]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / parent / "run", updates(2)) for parent in ("a", "b")])
    assert [run.name for run in runs] == ["a/run", "b/run"]


@pytest.mark.parametrize(("name", "what"), [("nowhere", "does not exist"), ("empty", "has no metrics.jsonl"), ("file", "is a file")])
def test_folder_that_is_no_run_is_named(name: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, nothing written, also where another run is good."""
    good = write_run(tmp_path / "good", updates(2))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    assert cli.main(["report", str(good), str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"galore: {tmp_path / name} is no run: it {what}; give a folder that galore pretrain wrote, such as runs/pretrain-<date>-<time>\n"
    )
    assert sorted(path.name for path in good.iterdir()) == ["config.json", "metrics.jsonl"]


def test_output_that_cannot_be(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", updates(2))
    with pytest.raises(UserError, match=r"-o .*model.safetensors is no HTML file; give a name that ends in .html"):
        write_report([str(run)], str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=r"cannot be written: .*; name another file with -o"):
        write_report([str(run)], str(run / "config.json" / "page.html"))


def test_report_of_a_real_run(make_config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the trainer's own file by the command: what it writes is what the report reads."""
    from galore_torch.train.commands.pretrain import pretrain

    pretrain(make_config(optimizer="galore_adamw", rank=4, track_subspace=True, num_training_steps=12, eval_every=6))
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'} and {len(CHARTS)} pictures beside it\n"
    page = Page(tmp_path / "page.html")
    assert not any("Not recorded" in text for text in page.figures.values())
    assert cells(page)["status"] == "finished"
