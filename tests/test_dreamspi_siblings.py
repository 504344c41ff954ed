"""DreamSPI's scripts stand alone, and are made to be diffed against their siblings."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import dream_spi
import dream_spi_atari

ROOT = Path(__file__).parent.parent
METHOD = {"Args", "Agent", "Transitions", "compute_loss", "train"}
LOSSES = {"reward_loss", "transition_loss"}  # ℓ_R has the done loss, ℓ_P is over classes
PAIRS = {  # where two scripts may differ under one name
    ("ppo_baseline.py", "dream_spi_atari.py"): METHOD,
    ("deep_spi_ppo_atari.py", "dream_spi_atari.py"): METHOD | LOSSES,
    ("deep_spi_ppo.py", "dream_spi.py"): METHOD | LOSSES,
    ("dream_spi_atari.py", "dream_spi.py"): {"Args", "Agent", "Games", "Transitions", "train", "Run"},
}
SCRIPTS = {"dream_spi_atari.py": dream_spi_atari, "dream_spi.py": dream_spi}


def definitions(name: str) -> dict[str, str]:
    """Source text of each top-level function and class."""
    source = (ROOT / name).read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(source, node) for node in nodes}


def sections(name: str) -> dict[int, str]:
    """Text of each numbered section."""
    parts = re.split(r"^# ==== (\d)\. .*=\n", (ROOT / name).read_text(), flags=re.MULTILINE)
    return dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_same_name_same_text(pair):
    first, second = map(definitions, pair)
    assert {name for name in first.keys() & second.keys() if first[name] != second[name]} == PAIRS[pair]


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[1] != "dream_spi.py" or "atari" not in pair[0]])
def test_environment_and_run_are_the_siblings(pair):
    first, second = map(sections, pair)
    assert first[2] == second[2] and first[6] == second[6]


def test_the_equations_are_those_of_the_atari_script():
    """But for two comments in Transitions."""
    first, second = (sections(name)[4].splitlines() for name in SCRIPTS)
    assert len(first) == len(second) and sum(a != b for a, b in zip(first, second, strict=True)) == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_form_of_the_house(name):
    source = (ROOT / name).read_text()
    banners = re.findall(r"^# ==== (\d\. [\w' ]+?) =+$", source, flags=re.MULTILINE)
    reference = re.findall(
        r"^# ==== (\d\. [\w' ]+?) =+$", (ROOT / "deep_spi_ppo_atari.py").read_text(), flags=re.MULTILINE
    )
    assert banners == reference and len(banners) == 6
    assert {"dream_spi_atari.py": 745, "dream_spi.py": 765}[name] >= len(source.splitlines())
    lines = [line.strip() for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert sum(map(len, lines)) / len(lines) <= 64
    train = definitions(name)["train"].splitlines()
    assert {"dream_spi_atari.py": 95, "dream_spi.py": 100}[name] >= len(train)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_explained(name):
    """`args.x` somewhere outside Args; and a comment beside the field, which --help shows."""
    texts = definitions(name)
    read = set(re.findall(r"\bargs\.(\w+)", "\n".join(text for key, text in texts.items() if key != "Args")))
    for field in dataclasses.fields(SCRIPTS[name].Args):
        assert field.name in read, field.name
        assert re.search(rf"^    {field.name}: .*  # \w", texts["Args"], flags=re.MULTILINE), field.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_sibling_is_imported(name):
    modules = set(re.findall(r"^(?:import|from) (\w+)", (ROOT / name).read_text(), flags=re.MULTILINE))
    local = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not modules & local


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_and_classes_are_used_and_have_docstrings(name):
    source = (ROOT / name).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("__init__", "Args"):
            assert ast.get_docstring(node), node.name
    for defined in definitions(name):
        assert len(re.findall(rf"\b{defined}\b", source)) >= 2, defined
