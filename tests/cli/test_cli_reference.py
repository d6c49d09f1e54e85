import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "cli_reference.py"


def test_the_reference_in_the_documentation_is_current():
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_check_notices_a_page_that_is_not_current(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    script["main"].__globals__["TARGET"] = tmp_path / "cli.md"
    assert script["main"](["--check"]) == 1
    assert script["main"]([]) == 0
    assert script["main"](["--check"]) == 0
    page = tmp_path / "cli.md"
    page.write_text(page.read_text().replace("--strength", "--force", 1))
    assert script["main"](["--check"]) == 1
