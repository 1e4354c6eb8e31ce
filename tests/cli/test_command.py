"""All parts of the command need only the package to give help, and tell misuse from failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command import adacons, assert_one_sentence

FRAMEWORKS = ("torch", "tensorflow", "keras", "numpy", "rich", "matplotlib", "horovod")


def test_the_installed_script_is_the_command():
    script = Path(sys.executable).with_name("adacons")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("adacons_hvd 0.")


def test_help_needs_nothing_but_the_package(tmp_path):
    program = f"""if True:
        import sys
        for name in {FRAMEWORKS}:
            sys.modules[name] = None        # importing it now fails
        from adacons_hvd.cli import main
        import adacons_hvd.logging
        main(["probe", "--help"])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "module:function" in done.stdout


@pytest.mark.parametrize(
    ("package", "arguments"), [("rich", ["doctor", "--no-live"]), ("matplotlib", ["plot", "run.jsonl"])]
)
def test_a_missing_extra_is_asked_for_in_a_sentence(package, arguments, tmp_path):
    (tmp_path / "run.jsonl").write_text(
        '{"steps": 1, "weights": [[1]], "norms": [[1]], "spread": [0], "fallbacks": 0, '
        '"schedule": "gather", "coefficients": {}}\n'
    )
    program = (
        f"import sys; sys.modules[{package!r}] = None; from adacons_hvd.cli import main; sys.exit(main({arguments}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert_one_sentence(done, package, "pip install 'adacons-hvd[cli]'")


def test_misuse_is_told_from_failure(tmp_path):
    assert adacons(folder=tmp_path).returncode == 2
    assert adacons("doctor", "--launchers", "slurm", folder=tmp_path).returncode == 2
    done = adacons("plot", "nowhere.jsonl", folder=tmp_path)
    assert_one_sentence(done, "nowhere.jsonl", "No such file")
    assert "Traceback" in adacons("plot", "nowhere.jsonl", "--traceback", folder=tmp_path).stderr
