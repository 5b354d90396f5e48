"""The shape of the project: imports run one way, and no package of others than those we name."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

import benchmark
import classifier
import covariance
import experiments
import gap
import lipschitz
import metrics
import sample
import train
import unet

ROOT = Path(__file__).resolve().parents[1]
# Each module may import those of the rows above its own. train.py and sample.py are programs.
ROWS = [
    {
        "schedules",
        "etsdm",
        "unet",
        "toy",
        "inception",
        "autoencoder",
        "data",
        "files",
        "pictures",
        "readers",
        "runtime",
    },
    {"spaces"},
    {"denoiser"},
    {"covariance"},
    {"losses", "samplers"},
    {"sampling"},
    {"sources", "tasks", "settings"},
    {"gap", "lipschitz", "metrics", "classifier"},
    {"train", "sample"},
    {"plain"},
    {"benchmark", "jobs"},
    {"plans"},
    {"pages"},
    {"experiments"},
]
# What the forward process is, everybody may know.
ALLOWED = {
    "files": set(),
    "runtime": set(),
    "pictures": set(),
    "readers": {"files"},
    "data": {"readers", "pictures"},
    "inception": {"readers"},
    "autoencoder": {"unet"},
    "spaces": {"autoencoder", "data", "files"},
    "denoiser": (ROWS[0] - {"inception"}) | ROWS[1],
}
RUNTIME = {"torch", "numpy", "PIL", "scipy", "tqdm", "matplotlib"}
PROGRAMS = {
    "train": train,
    "sample": sample,
    "metrics": metrics,
    "gap": gap,
    "lipschitz": lipschitz,
    "classifier": classifier,
    "covariance": covariance,
    "benchmark": benchmark,
    "experiments": experiments,
}
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
    # plain.py measures a peer where it happens to be installed, and is silent where it is not
    peers = {"diffusers"} if path.stem == "plain" else set()
    assert imports(path) - ours - set(sys.stdlib_module_names) <= RUNTIME | peers


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_file_says_what_it_is_and_what_it_does_not_do(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "does not do" in " ".join(text.split()), "the header names the limits of the file"
    commands = re.findall(r"^    (python|torchrun|from|x = )", text, re.M)
    assert commands, "and something to paste"


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


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_text_files_have_an_encoding(path):
    """Else it is the locale's, which may lack "±", and a page is lost after hours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {k.arg: ast.unparse(k.value) for k in node.keywords}
        text = name.endswith((".read_text", ".write_text")) and name != "files.write_text"
        if name == "open" or name.endswith("fdopen"):
            mode = words.get("mode") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
            text = "b" not in mode
        text |= {"text", "universal_newlines"} & set(words) != set() and "subprocess" in name
        text |= name.endswith(("TextIOWrapper", "genfromtxt", "loadtxt"))
        assert not text or "encoding" in words, f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def header_commands():
    """Every `python -c "..."` of a file's header that needs no file of the reader's."""
    for path in FILES:
        for line in (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines():
            match = re.match(r'\s*python -c "(.*)"', line)
            if match and ".zip" not in line and ".gz" not in line:
                yield pytest.param(match[1], id=f"{path.stem}: {match[1][:40]}")


@pytest.mark.parametrize("command", list(header_commands()))
def test_commands_in_headers_run(command, capsys):
    exec(compile(command, "header", "exec"), {})
    assert capsys.readouterr().out.strip()


def readme_commands():
    for line in (ROOT / "README.md").read_text().splitlines():
        for part in line.split("#")[0].split("&&"):
            words = shlex.split(part) if re.match(r"\s*(python|torchrun) ", part) else []
            if program := next((w for w in words if w.removesuffix(".py") in PROGRAMS), None):
                yield program.removesuffix(".py"), words[words.index(program) + 1 :]


def test_readme_commands_are_accepted():
    commands = list(readme_commands())
    assert {program for program, _ in commands} >= set(PROGRAMS) - {"classifier"}
    for program, words in commands:
        args = PROGRAMS[program].parse(words)
        if program == "train" and not {"--head", "--latent"} & set(words):  # those open a run
            train.resolve(args)


def test_readme_counts_are_the_networks():
    text = (ROOT / "README.md").read_text()
    for line in unet.describe().splitlines():
        name, count = line.split()[0], line.split()[-2]
        assert f"| `{name}`" in text and count in text


def test_readme_has_every_file_in_its_reading_order():
    text = (ROOT / "README.md").read_text().split("## Reading order")[1].split("\n## ")[0]
    assert {p.name for p in FILES} <= set(re.findall(r"\]\(([a-z_]+\.py)\)", text))
