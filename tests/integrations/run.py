"""`make test-integrations`: each framework in an environment of its own, its tests, and the table of docs/frameworks.md from the results.

NAME is a file of requirements/; its tests are test_<NAME up to the first underscore>.py. Environments are made in build/integrations,
torch first, and are deleted after their tests unless --keep.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from integrations.matrix import RESULTS, read, write_page  # noqa: E402

ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "integrations"
NAMES = sorted(path.stem for path in (HERE / "requirements").glob("*.txt"))


def pip(name: str) -> list[str]:
    return [str(BUILD / name / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]


def install(name: str, torch: str) -> str | None:
    """Make the environment; None, or why pip refused. Torch is not exchanged by what comes after it."""
    home = BUILD / name
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    held = BUILD / "held.txt"
    held.write_text(f"torch=={torch}\n", encoding="utf-8")
    for what in ([f"torch=={torch}"], ["pytest>=8.2", "-r", str(HERE / "requirements" / f"{name}.txt")]):
        done = subprocess.run([*pip(name), "install", "-c", str(held), *what], capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return said[-1].removeprefix("ERROR: ") if said else f"pip ended with {done.returncode}"
    text = (HERE / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("# uninstall: "):
            subprocess.run([*pip(name), "uninstall", "--yes", *line.split()[2:]], check=True)
    return None


def test(name: str) -> bool:
    """Run the tests; their rows replace this environment's in the results when all have passed."""
    rows = BUILD / f"{name}.jsonl"
    rows.write_text("", encoding="utf-8")
    environment = os.environ | {"GALORE_INTEGRATION": str(rows), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)  # the installed package is what is tested
    tests = HERE / f"test_{name.partition('_')[0]}.py"
    quiet = ["-q", "--tb=short", "--show-capture=no", "-W", "default", "--disable-warnings"]
    command = [str(BUILD / name / "bin" / "python"), "-m", "pytest", *quiet]
    if subprocess.run([*command, str(tests)], cwd=ROOT, env=environment, check=False).returncode:
        return False
    save(name, [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()])
    return True


def save(name: str, rows: list[dict[str, object]]) -> None:
    kept = [row for row in read() if row["environment"] != name]
    lines = sorted(json.dumps({"environment": name} | row) for row in kept + rows)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all when none is given")
    parser.add_argument("--torch", default="2.13.0", help="release of torch in every environment")
    parser.add_argument("--keep", action="store_true", help="do not delete the environments; one that is there is used again")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(NAMES):
        parser.error(f"no requirements/ for {sorted(unknown)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    ended = {}
    for name in chosen.names or NAMES:
        print(f"\n{name}", flush=True)
        there = chosen.keep and (BUILD / name / "ready").is_file()
        if not there and (reason := install(name, chosen.torch)):
            ended[name] = f"not installable: {reason}"
        else:
            (BUILD / name / "ready").touch()
            subprocess.run([*pip(name), "install", "--no-deps", "--force-reinstall", str(ROOT)], check=True)
            ended[name] = "passed" if test(name) else "failed"
        if not chosen.keep:
            shutil.rmtree(BUILD / name, ignore_errors=True)
    write_page()
    print("\n" + "\n".join(f"{name}: {how}" for name, how in ended.items()))
    return int(set(ended.values()) != {"passed"})


if __name__ == "__main__":
    sys.exit(main())
