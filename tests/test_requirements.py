"""`uv run SCRIPT` takes its packages from the script's first lines (PEP 723): they are those of requirements.txt."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
CALLED = {"PIL": "matplotlib"}  # imported under a name that is no requirement: comes with one that is
OWN = {"inspect_world_model.py": {"evaluate"}}  # a program may use the other; training scripts stand alone


def requirements() -> list[str]:
    """The lines of requirements.txt that name a package."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def block(name: str) -> dict:
    """The script's metadata, read as PEP 723 says."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    found = list(re.finditer(pattern, (ROOT / name).read_text(encoding="utf-8")))
    assert [match["type"] for match in found] == ["script"]
    return tomllib.loads("".join(line[2:] for line in found[0]["content"].splitlines(keepends=True)))


def first_lines(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").splitlines()[:5]


def test_all_scripts_begin_with_the_same_block():
    assert {"deep_spi_ppo.py", "evaluate.py", "safe_policy_improvement.py"} <= set(SCRIPTS)
    assert len({tuple(first_lines(name)) for name in SCRIPTS}) == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_asks_for_the_requirements(name):
    assert (first_lines(name)[0], first_lines(name)[-1]) == ("# /// script", "# ///")
    metadata = block(name)
    assert metadata["dependencies"] == requirements()
    assert metadata["requires-python"] == ">=3.11"  # the oldest for which the pinned EnvPool has a wheel


@pytest.mark.parametrize("name", SCRIPTS)
def test_requirements_name_all_that_is_imported(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    packages = {CALLED.get(module, module) for module in imported - sys.stdlib_module_names}
    assert packages - {"wandb"} - OWN.get(name, set()) <= {
        line.split("==")[0] for line in requirements()
    }  # wandb: only for --track
