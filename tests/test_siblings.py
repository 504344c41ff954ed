"""The scripts stand alone and are made to be diffed: what they share is one text, and what they promise is true."""

import ast
import io
import re
import subprocess
import tokenize
from itertools import combinations
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("ppo_baseline.py", "deep_spi_ppo_atari.py", "deepmdp_ppo_atari.py", "deep_spi_ppo.py")
SOURCES = {name: (ROOT / name).read_text() for name in SCRIPTS}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}

BUDGETS = {  # the most that there may be
    "lines": {  # of a script, all included: 5 of them are its inline metadata
        "ppo_baseline.py": 520,
        "deep_spi_ppo_atari.py": 710,
        "deepmdp_ppo_atari.py": 645,
        "deep_spi_ppo.py": 730,
    },
    "lecture": {"deep_spi_ppo_atari.py": 570},  # its lines before the run's folder
    "docstring": 25,  # its lines, in each script
    "train": 95,  # lines of that function
    "width": 70,  # mean number of characters of the lines that are neither blank nor comment: nothing is packed
    "fields": 40,  # of Args
    "gone": 26,  # lines of `diff ppo_baseline.py deep_spi_ppo_atari.py` that begin with <
    "new": 220,  # those that begin with >
}

# Where two scripts may differ under one name, because that is what they differ by.
# A class's own name stands for what of it is in no method.
METHOD = {"Args", "Agent", "Agent.__init__", "Transitions", "compute_loss", "train"}  # with or without a world model
WORLD_MODEL = {
    *("RewardModel.__init__", "RewardModel.forward"),
    *("TransitionModel", "TransitionModel.__init__", "TransitionModel.forward"),
}
ALLOWED = {
    frozenset(("ppo_baseline.py", "deep_spi_ppo_atari.py")): METHOD,
    frozenset(("ppo_baseline.py", "deepmdp_ppo_atari.py")): METHOD,
    frozenset(("deep_spi_ppo_atari.py", "deepmdp_ppo_atari.py")): METHOD - {"Agent", "Agent.__init__", "Transitions"}
    | WORLD_MODEL
    | {"RewardModel", "transition_loss", "what_the_model_knows"},
    # pixels or vectors: the same method, other environments and network sizes
    frozenset(("deep_spi_ppo_atari.py", "deep_spi_ppo.py")): METHOD - {"Agent", "compute_loss"}
    | WORLD_MODEL
    | {"Args.__post_init__", "Agent.encode", "Agent.policy_and_value", "Run.__init__"}
    | {"Games", "Games.__init__", "Games.reset", "Games.step"},
}
ARGS_ALLOWED = {  # fields whose default or help differs from `deep_spi_ppo_atari.py`'s
    "ppo_baseline.py": {"num_envs"},
    "deepmdp_ppo_atari.py": {"num_envs", "num_steps", "reward_loss_coef", "transition_loss_coef"},
    "deep_spi_ppo.py": {
        *("env_id", "total_timesteps", "num_envs", "num_steps"),
        *("precision", "learning_rate", "gamma", "num_minibatches", "clip_coef"),
    },
}


def definitions(name):
    """Source text of each top-level function, method (Class.method) and rest of a class, decorators included."""
    lines, found = SOURCES[name].splitlines(), {}

    def text(node):
        return "\n".join(lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno])

    for node in TREES[name].body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = text(node)
        elif isinstance(node, ast.ClassDef):
            methods = {f"{node.name}.{m.name}": text(m) for m in node.body if isinstance(m, ast.FunctionDef)}
            found |= methods
            found[node.name] = text(node)
            for method in methods.values():
                found[node.name] = found[node.name].replace(method, "")
    return found


def args_fields(name):
    """Line of each field of Args, with the comment that is its help."""
    body = next(node for node in TREES[name].body if getattr(node, "name", "") == "Args").body
    lines = SOURCES[name].splitlines()
    return {field.target.id: lines[field.lineno - 1] for field in body if isinstance(field, ast.AnnAssign)}


@pytest.mark.parametrize("pair", ALLOWED, ids=lambda pair: " ".join(sorted(pair)))
def test_same_name_same_text(pair):
    first, second = (definitions(name) for name in pair)
    shared = first.keys() & second.keys()
    assert {name for name in shared if first[name] != second[name]} == ALLOWED[pair]


def test_last_lines_are_the_same():
    """What runs when a script is started."""
    assert len({source.split("\n\n\nif __name__")[1] for source in SOURCES.values()}) == 1


def parts_of_train(name):
    """Text of each part of `train`, by its banner; "" is what comes before the first."""
    parts = re.split(r"^ *# ---- (.*)\n", definitions(name)["train"], flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def removed(text, *pieces):
    """The text without some pieces, each of which is in it once."""
    for piece in pieces:
        assert text.count(piece) == 1, piece
        text = text.replace(piece, "")
    return text


def test_parts_of_train_match():
    """What may differ is the update, what it needs set up, and that a vector script scales its rewards."""
    scripts = {name: parts_of_train(name) for name in SCRIPTS}
    baseline, atari, deepmdp, vector = scripts.values()
    rollout, advantages, update, logging = list(baseline)[1:]
    assert all(list(parts) == list(baseline) for parts in scripts.values())
    assert len({parts[rollout] for parts in scripts.values()}) == 1
    assert baseline[advantages] == atari[advantages] == deepmdp[advantages]
    scaled = removed(vector[advantages], "        scaled = reward_scaler.scale(rewards, is_last)\n")
    assert scaled.replace("scaled", "rewards") == atari[advantages]
    assert atari[update] == vector[update] and atari[logging] == vector[logging]
    knows = re.search(r"^        if run_world_model.*\n(?: {12}.*\n)+", atari[logging], flags=re.MULTILINE).group()
    assert "what_the_model_knows" in knows and removed(atari[logging], knows) == baseline[logging]
    assert atari[logging].replace("if run_world_model and epoch_stats", "if epoch_stats") == deepmdp[logging]


@pytest.mark.parametrize("name", ARGS_ALLOWED)
def test_same_argument_same_text(name):
    reference, fields = args_fields("deep_spi_ppo_atari.py"), args_fields(name)
    differing = {field for field in fields.keys() & reference.keys() if fields[field] != reference[field]}
    assert differing == ARGS_ALLOWED[name]


def test_sections_come_in_one_order():
    banner = re.compile(r"^ *# ==== (\d+\. [\w' ]+?) =+$", re.MULTILINE)
    reference = banner.findall(SOURCES["ppo_baseline.py"])
    assert [int(title.split(".")[0]) for title in reference] == list(range(1, 7))
    for name in SCRIPTS:
        assert banner.findall(SOURCES[name]) == reference, name


def test_the_diff_reads_as_the_difference():
    """From the baseline to Deep SPI: a handful of replaced lines, the others new."""
    command = ["diff", "ppo_baseline.py", "deep_spi_ppo_atari.py"]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8").stdout.splitlines()
    gone, new = (sum(line.startswith(sign) for line in diff) for sign in "<>")
    assert 0 < gone <= BUDGETS["gone"] and 0 < new <= BUDGETS["new"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_line_budgets(name):
    lines = SOURCES[name].splitlines()
    assert len(lines) <= BUDGETS["lines"][name]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert sum(map(len, code)) / len(code) <= BUDGETS["width"]
    assert len(definitions(name)["train"].splitlines()) <= BUDGETS["train"]
    assert len(ast.get_docstring(TREES[name]).splitlines()) <= BUDGETS["docstring"]
    lecture = next(i for i, line in enumerate(lines) if line.startswith("# ==== 6. "))
    assert lecture <= BUDGETS["lecture"].get(name, lecture)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_no_sibling(name):
    modules = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    local = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not modules & local


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_explained(name):
    fields = args_fields(name)
    assert len(fields) <= BUDGETS["fields"]
    used = definitions(name)
    reads = "\n".join(dedent(text) for key, text in used.items() if key.split(".")[0] != "Args" and "def " in text)
    # Only attribute reads outside the validation count: `args.x`.
    read = {
        node.attr
        for node in ast.walk(ast.parse(reads))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args")
    }
    assert fields.keys() == read & fields.keys()
    explanations = [text.split("  # ")[1] for text in fields.values()]
    assert all(len(text) > 10 for text in explanations) and len(set(explanations)) == len(explanations)


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_and_classes_have_docstrings(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("__init__", "forward", "Args"):
            assert ast.get_docstring(node), f"{name}: {node.name}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_name_is_unused(name):
    """Each function, class and method is used somewhere in its own script."""
    tokens = [token.string for token in tokenize.generate_tokens(io.StringIO(SOURCES[name]).readline)]
    called_by_others = {"forward", "__init__", "__post_init__"}
    for defined in {key.split(".")[-1] for key in definitions(name)} - called_by_others:
        assert tokens.count(defined) >= 2, defined


def test_every_pair_of_atari_scripts_is_held():
    atari = [name for name in SCRIPTS if name != "deep_spi_ppo.py"]
    assert {frozenset(pair) for pair in combinations(atari, 2)} <= ALLOWED.keys()
