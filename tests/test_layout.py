"""The shape of the project: imports run one way, and no package of others than those we name."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each module may import those of the rows above its own. train.py and sample.py are programs.
ROWS = [
    {"schedules", "etsdm", "unet", "toy", "data", "readers", "runtime"},
    {"denoiser"},
    {"losses", "samplers"},
    {"train", "sample"},
]
# What the forward process is, everybody may know.
ALLOWED = {"readers": set(), "data": {"readers"}, "denoiser": ROWS[0]}
RUNTIME = {"torch", "numpy", "PIL", "scipy", "tqdm", "matplotlib"}
FILES = sorted(ROOT.glob("*.py"))


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_imports_run_one_way(path):
    ours = {p.stem for p in FILES}
    row = next((i for i, names in enumerate(ROWS) if path.stem in names), None)
    assert row is not None, f"{path.name} has no place in the order of imports: give it one here"
    allowed = ALLOWED.get(path.stem, set().union(*ROWS[:row]))
    assert imports(path) & ours <= allowed
    assert imports(path) - ours - set(sys.stdlib_module_names) <= RUNTIME


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_file_says_what_it_is_and_what_it_does_not_do(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "does not do" in " ".join(text.split()), "the header names the limits of the file"
    assert "python" in text or "import" in text or "samplers." in text, "and something to paste"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_public_functions_have_docstrings(path):
    tree = ast.parse(path.read_text())
    bare = [
        n.name
        for n in tree.body
        if isinstance(n, ast.FunctionDef | ast.ClassDef)
        and not n.name.startswith("_")
        and n.name != "main"
        and not ast.get_docstring(n)
    ]
    assert not bare
