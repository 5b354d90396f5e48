"""The shape of the project: imports run one way, files stay short, headers teach, and no package is
used that requirements.txt does not name."""

import ast
import re
import shlex
import sys
import tomllib

import pytest

import denoiser
from conftest import ROOT
from programs import OPEN_A_RUN, PROGRAMS, find_program, parse
from support.cli import make_parser

# A top-level file may import those of the rows above its own, and support/.
ROWS = [
    {"schedules", "etsdm", "unet", "data"},
    {"config", "toy"},
    {"denoiser"},
    {"losses", "samplers"},
    {"train", "sample"},
    {"metrics"},
    {"lipschitz"},
    {"gap"},
]
# Lines of each top-level file, and of each wing; 10 % more is allowed.
BUDGET = {
    "schedules": 300, "etsdm": 80, "denoiser": 190, "losses": 130, "samplers": 340, "unet": 260,
    "data": 160, "config": 230, "train": 260, "sample": 140, "metrics": 320, "lipschitz": 170,
    "gap": 250, "toy": 110,
}  # fmt: skip
# papers: it was planned with 2,800; the networks of SA-DPM, DDIM and diffusers, read and written
# (checkpoints.py, exports.py), are 500 more, shapes_check.py 100, late.py 200, and an experiment
# for every table and figure 200.
# support: it was planned with 1,700 lines, before the readers of foreign image formats, Inception's
# layers, exported feature networks, the run folder, and folders of numbered images moved there:
# these alone are 2,000. Choosing a device, and what a GPU needs, are 220 more: copies that do not
# wait, noise drawn ahead, checkpoints that a thread writes. The estimate of memory is 100; it was
# in benchmarks, but train.py needs it.
# benchmarks: it was planned with 500; each side in a process of its own, so that the plain one runs
# without our memory settings, costs 110 of them, and the peer diffusers 60.
# The check of a GPU, which nothing else imports, is 580 more.
WINGS = {"support": 3650, "papers": 3800, "benchmarks": 1300}
TOTAL = 2900  # of the top level
THIRD_PARTY = {"torch", "numpy", "PIL", "scipy", "tqdm", "matplotlib"}
TOP = {p.stem: p for p in sorted(ROOT.glob("*.py"))}
FILES = [*TOP.values(), *(p for wing in WINGS for p in sorted((ROOT / wing).glob("*.py")))]
WITH_TEXT = [p for p in FILES if p.read_text(encoding="utf-8").count("\n") > 1]  # no empty package


def label(path):
    return str(path.relative_to(ROOT))


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """The first names of what a file imports, wherever in it."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


# ------------------------------------------------------------------ imports


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_run_one_way(path):
    ours = set(TOP) | set(WINGS) | {"tests"}
    if path.parent == ROOT:
        row = next((i for i, names in enumerate(ROWS) if path.stem in names), None)
        assert row is not None, f"{path.name} has no place in the order of imports: give it one"
        allowed = set().union({"support"}, *ROWS[:row])
    else:
        top = set(TOP)
        allowed = {
            "support": {"support"},
            "papers": {"support", "papers"} | top,
            "benchmarks": {"support", "papers", "benchmarks"} | top,
        }[path.parent.name]
    assert imports(path) & ours <= allowed
    # plain.py measures a peer if it happens to be installed; safetensors reads diffusers' weights
    extras = {"plain.py": {"diffusers"}, "checkpoints.py": {"safetensors"},
              "exports.py": {"safetensors"}}  # fmt: skip
    peers = extras.get(path.name, set())
    assert imports(path) - ours - set(sys.stdlib_module_names) <= THIRD_PARTY | peers


def test_the_top_level_loads_papers_in_two_places_only():
    """What builds a denoiser, and what gives a sampler its variance: lazily, from fixed names."""
    found = {}
    for path in [*TOP.values(), *(ROOT / "support").glob("*.py")]:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                found[path.stem] = ast.unparse(node.args[0])
    assert found == {"denoiser": "module", "samplers": "'papers.covariance'"}
    assert set(denoiser.PARTS.values()) == {
        "papers.alternatives",
        "papers.superres",
        "papers.latents",
    }


# Arguments of many functions, each with one meaning everywhere; some may be of any class that has
# the members in use. And functions whose result has no class of ours: a program, a set, a figure.
PLAIN_NAMES = set(
    "self cls denoiser space config dist dataset model net state run stop path device sets batches"
    " argv make_objective config_class".split()
)
NO_RESULT = {"main", "load", "plot_gaps"}


@pytest.mark.parametrize("path", TOP.values(), ids=label)
def test_public_functions_have_type_hints(path):
    for node in ast.walk(tree_of(path)):
        for f in getattr(node, "body", ()) if isinstance(node, ast.Module | ast.ClassDef) else ():
            if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"):
                bare = {a.arg for a in (*f.args.args, *f.args.kwonlyargs) if not a.annotation}
                assert bare <= PLAIN_NAMES, f"{f.name}: {bare - PLAIN_NAMES}"
                assert f.returns or f.name in NO_RESULT, f.name


def closure(name):
    """The top-level files that a program reads, itself included."""
    found, new = set(), {name}
    while new:
        found |= new
        new = {n for stem in new for n in imports(TOP[stem]) & set(TOP)} - found
    return found


def test_training_reads_nine_files_and_sampling_eight():
    assert len(closure("train")) <= 9 and len(closure("sample")) <= 8


# ------------------------------------------------------------------ length


@pytest.mark.parametrize("name", [*BUDGET, *WINGS, "the top level"])
def test_files_stay_short(name):
    if name == "the top level":
        assert set(TOP) == set(BUDGET), "a new top-level file needs a concept, and a budget"
        files, budget = TOP.values(), TOTAL
    elif name in WINGS:
        files, budget = (ROOT / name).glob("*.py"), WINGS[name]
    else:
        files, budget = [TOP[name]], BUDGET[name]
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in files)
    assert lines <= 1.1 * budget, f"{name} has {lines} lines, and its budget is {budget} + 10 %"


def test_an_installation_has_every_file():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    assert set(tool["py-modules"]) == set(TOP) and set(tool["packages"]) <= set(WINGS)


# ------------------------------------------------------------------ what files say


@pytest.mark.parametrize("path", WITH_TEXT, ids=label)
def test_every_header_names_the_limits_of_its_file_and_a_command(path):
    text = ast.get_docstring(tree_of(path)) or ""
    assert "Not here" in text, "say what the file does not do"
    assert re.findall(r"^    (python|torchrun|from|x = )", text, re.M), "and something to paste"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_public_functions_have_docstrings(path):
    """Config classes have `description` instead, which --help prints."""
    bare = []
    for node in tree_of(path).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or ast.get_docstring(node):
            continue
        fields = {ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign)}
        if not (node.name.startswith("_") or node.name == "main" or "description" in fields):
            bare.append(node.name)
    assert not bare


def used_elsewhere():
    """{module: names of it that other files of the project use}."""
    found = {name: set() for name in TOP}
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and node.module in found:
                found[node.module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in found and node.value.id != path.stem:
                    found[node.value.id].add(node.attr)
    return found


def test_a_name_means_one_thing():
    """Each program has its main(). extend() is how a system of papers/ adds to a denoiser."""
    found = {}
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.setdefault(node.name, []).append(label(path))
    twice = {name: where for name, where in found.items() if len(where) > 1}
    assert set(twice) == {"main", "extend"}, twice


def test_functions_of_the_top_level_that_others_use_have_type_hints():
    """Of what they return or of what they take. The small helpers of a file need none."""
    used, bare = used_elsewhere(), []
    for name, path in TOP.items():
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef) and node.name in used[name] - {"main"}:
                hints = [node.returns, *(a.annotation for a in node.args.args)]
                bare += [f"{name}.{node.name}"] * (not any(hints))
    assert not bare


@pytest.mark.parametrize("path", FILES, ids=label)
def test_text_files_have_an_encoding(path):
    """Else it is the locale's, which may lack "±", and a page is lost after hours."""
    for node in ast.walk(tree_of(path)):
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
    """Every command of a file's header."""
    for path in FILES:
        for line in (ast.get_docstring(tree_of(path)) or "").splitlines():
            if re.match(r"\s+(python|torchrun) ", line):
                yield path, line.strip()


def python_lines():
    """Of `python -c "..."`, those that need no file of the reader's."""
    for path, line in header_commands():
        match = re.match(r'python -c "(.*)"', line)
        if match and ".zip" not in line and ".gz" not in line:
            slow = [pytest.mark.slow] if path.parent.name == "benchmarks" else []
            yield pytest.param(match[1], id=f"{label(path)}: {match[1][:40]}", marks=slow)


@pytest.mark.parametrize("command", list(python_lines()))
def test_python_lines_in_headers_run(command, capfd):
    exec(compile(command, "header", "exec"), {})
    assert capfd.readouterr().out.strip()


# ------------------------------------------------------------------ commands in texts


COMMANDS = [(path, line) for path, line in header_commands() if " -c " not in line]


@pytest.mark.parametrize("path, line", [pytest.param(*c, id=c[1][:60]) for c in COMMANDS])
def test_commands_in_headers_are_accepted(path, line, tmp_path, monkeypatch):
    if "tests/" not in line and " ..." not in line:
        monkeypatch.chdir(tmp_path)
        for name in re.findall(r"[a-z0-9]+\.pt2", line):  # feature networks must exist
            (tmp_path / name).touch()
        assert accepted(line.replace("[RUN ...]", "").replace("[flags]", ""))


def accepted(command):
    """The program of a command, if its parser takes the flags."""
    found = find_program(shlex.split(re.split("  |#|&&|;", command)[0]))
    assert found, f"no program of ours: {command}"
    program, words = found
    if program in OPEN_A_RUN or "--init" in words:
        make_parser(PROGRAMS[program]).parse_args(words)
    else:
        parse(program, words)
    return program
