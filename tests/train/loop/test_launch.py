"""--nproc: what each process is told, and how all end when one does. The command is a few lines of Python, without torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from galore_torch.train.loop import launch

# Each writes down what it was told, then does what its word says: "rank:deed,rank:deed".
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
folder, deeds = Path(sys.argv[1]), dict(word.split(":") for word in sys.argv[2].split(",") if word)
rank = os.environ["RANK"]
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
(folder / rank).write_text(" ".join(os.environ[name] for name in names))
deed = deeds.get(rank, "")
if deed == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if deed == "fail":
    sys.exit(3)
if deed == "stay":
    while not stop:
        time.sleep(0.01)
    (folder / f"{rank}.asked").write_text("")
if deed == "signalled":
    while not stop:
        time.sleep(0.01)
    sys.exit(143 if rank == "0" else 1)
"""


@pytest.fixture(autouse=True)
def _command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(launch, "COMMAND", (sys.executable, str(tmp_path / "script.py"), str(tmp_path)))
    monkeypatch.setattr(launch, "_PATIENCE", 0.3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_each_process_is_told_its_place(tmp_path: Path) -> None:
    assert launch.launch([""], 3) == 0
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [words[:4] for words in told] == [["3", str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({words[4] for words in told}) == 1, "all meet at one port"


@pytest.mark.parametrize("omp", [None, "5"])
def test_threads_share_the_processors_unless_they_are_told(omp: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if omp is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert launch.launch([""], 2) == 0
    assert (tmp_path / "1").read_text().split()[5] == (omp or "3")


def test_a_killed_process_is_named_and_the_others_are_asked_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.launch(["1:die,0:stay"], 2) == 1
    assert (tmp_path / "0.asked").exists()
    assert "process 1 of 2 was ended by SIGKILL, so all have ended; go on with the same command" in capsys.readouterr().err


def test_a_failed_process_ends_all_with_its_code(tmp_path: Path) -> None:
    assert launch.launch(["1:fail,0:stay"], 2) == 3
    assert (tmp_path / "0.asked").exists()


def test_a_signal_reaches_all_and_the_code_is_the_first_ones(tmp_path: Path) -> None:
    def send() -> None:
        while not all((tmp_path / str(rank)).exists() for rank in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    assert launch.launch(["0:signalled,1:signalled"], 2) == 143
    sender.join()
