"""What the documents name exists: links, anchors, pictures, files, modules, flags, make targets; README's code runs."""

import ast
import functools
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATHS += [ROOT / "benchmark" / "README.md"]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
GUIDES = pytest.mark.parametrize("name", TEXTS)
FOREIGN_FLAGS = {"--help", "--logdir"}  # tyro's and argparse's, TensorBoard's
EXAMPLES = {"my_agent.py", "script.py"}  # a reader's own


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a document's headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def flags_of_programs() -> set[str]:
    """Every flag that a script or a module of benchmark/ has: fields of its `Args`, or named to argparse."""
    flags = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "benchmark").rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and node.name == "Args":
                fields = [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
                flags |= {f"--{field.replace('_', '-')}" for field in fields}
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                flags |= {word.value for word in node.args if isinstance(word, ast.Constant)}
    return flags


def test_readme_takes_five_minutes():
    assert len((ROOT / "README.md").read_bytes()) <= 9_216


@GUIDES
def test_lines_fit_but_for_tables(name):
    assert not [line for line in TEXTS[name].splitlines() if len(line) > 120 and not line.startswith("|")]


@GUIDES
def test_links_and_pictures_exist(name):
    folder = (ROOT / name).parent
    links = re.findall(r"\]\(([^)]+)\)", TEXTS[name])
    assert links
    for link in links:
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        path = (folder / target).resolve() if target else ROOT / name
        assert path.is_file(), link
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), link


@GUIDES
def test_files_exist(name):
    """Seen from the top or from the document's folder."""
    places = [ROOT, (ROOT / name).parent]
    for file in re.findall(r"(?<![\w./<>*{-])([\w./]+\.(?:py|csv|md|txt|toml|cff|png))\b", TEXTS[name]):
        if Path(file).name in EXAMPLES or (file.endswith(".csv") and "/" not in file):  # a run's own episodes.csv
            continue
        assert any((place / file).is_file() for place in places), file
    for folder in re.findall(r"`(benchmark/[\w/]+)/?`", TEXTS[name]):
        assert (ROOT / folder).is_dir(), folder


@GUIDES
def test_modules_exist(name):
    for module in re.findall(r"python -m ([\w.]+)", TEXTS[name]):
        if module not in ("venv", "pip", "benchmark.NAME"):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@GUIDES
def test_make_targets_exist(name):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"(?:^ {4}|`)make ([\w-]+)", TEXTS[name], re.MULTILINE):
        assert target in targets, target


@GUIDES
def test_flags_exist(name):
    known = flags_of_programs() | FOREIGN_FLAGS
    assert {"--run-dir", "--suite"} <= known and "--no-such-flag" not in known
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", TEXTS[name]):
        assert flag in known, flag


def test_method_explains_every_metric_and_no_other():
    """Names in the scripts' source, and rows of the table. DreamSPI's are put together, and in docs/dreamspi.md."""
    named = set()
    for path in set(ROOT.glob("*.py")) - set(ROOT.glob("dream_spi*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and re.fullmatch(r"(charts|losses|world_model|spi)/\w+", str(node.value)):
                named.add(node.value)
    table = re.findall(r"^\| `(\w+/\w+)` \|", TEXTS["docs/method.md"], re.MULTILINE)
    assert sorted(table) == sorted(named)


def test_readme_code_runs(monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXTS["README.md"], re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code, names)
    assert names["log_probs"].shape == (4, 4) and names["value"].shape == (4,)
    trained = torch.load("pretrained/LunarLander-v3/agent.pt", weights_only=True)
    assert torch.equal(names["agent"].fc.weight, trained["fc.weight"])


def test_every_script_is_in_readme():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in TEXTS["README.md"], path.name
