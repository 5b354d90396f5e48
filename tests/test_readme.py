"""README.md and docs/: the code blocks of docs/extending.md run and do what the text promises; the
README's lines of code are the files'; commands, counts, files and links are today's."""

import re

import pytest
import torch
from torch.testing import assert_close

import samplers
import schedules
import toy
import unet
from conftest import ROOT
from denoiser import Denoiser
from programs import PROGRAMS
from test_layout import FILES, TOP, accepted, label

README, EXTENDING = ROOT / "README.md", ROOT / "docs" / "extending.md"
# The notebook keeps the commands of its days, and its long lines.
PAGES = [README, *sorted({*(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "lab-notebook.md"})]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def text_of(path):
    return path.read_text(encoding="utf-8")


def code_of(path):
    """The Python blocks of a page."""
    return [code for language, code in FENCED.findall(text_of(path)) if language == "python"]


# ------------------------------------------------------------------ README.md


def test_the_readme_is_one_screen_and_a_few_more():
    text = text_of(README)
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1800


def test_the_readmes_code_is_the_files():
    sequence_aware, sharing = code_of(README)
    for block, name in ((sequence_aware, "losses"), (sharing, "etsdm")):
        lines = [line.strip() for line in text_of(TOP[name]).splitlines()]
        wanted = [line.strip() for line in block.splitlines()]
        assert set(wanted) <= set(lines), f"README.md and {name}.py differ"
        assert wanted == sorted(wanted, key=lines.index), "in the file's order"


def test_the_readme_names_every_top_level_file():
    table = text_of(README).split("## How to read the code")[1].split("\n## ")[0]
    assert set(re.findall(r"\]\(([a-z_]+)\.py\)", table)) == set(TOP)


# ------------------------------------------------------------------ all pages


def commands(path):
    """Commands of ours on a page: in blocks, and in sentences unless they have placeholders."""
    text = text_of(path)
    lines = [line for _, block in FENCED.findall(text) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    parts = [part.strip() for line in lines for part in line.split(" #")[0].split("&&")]
    ours = [part for part in parts if re.match(r"(python|torchrun) .*(\.py|-m )", part)]
    return [part for part in ours if not re.search(r"\.\.\.|NAME|PART|--help|tests/| -c ", part)]


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_commands_are_accepted(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in commands(path):
        for name in re.findall(r"[a-z0-9]+\.pt2", command):  # feature networks must exist
            (tmp_path / name).touch()
        assert accepted(command)


def test_every_program_has_a_command_on_some_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion16.pt2").touch()
    assert {accepted(c) for path in PAGES for c in commands(path)} == set(PROGRAMS)


def test_a_wrong_flag_is_noticed():
    with pytest.raises(SystemExit):
        accepted("torchrun train.py --no-such-flag")


def test_parameter_counts_are_the_networks():
    text = text_of(ROOT / "docs" / "presets.md")
    for line in unet.describe().splitlines():
        name, count = line.split()[0], line.split()[-2]
        assert re.search(rf"^\| `{name}`.*\| {count} \|", text, re.M)


def test_the_wings_files_are_listed():
    papers = {p.name for p in FILES if p.parent == ROOT / "papers" and p.name != "__init__.py"}
    table = text_of(EXTENDING).split("## The files of the wings")[1]
    assert papers == set(re.findall(r"\]\(\.\./papers/([a-z_]+\.py)\)", table))


OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "lab-notebook.md"]
OTHERS += [ROOT / "papers" / "results" / "README.md"]


@pytest.mark.parametrize("path", PAGES + OTHERS, ids=label)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(path))
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", PAGES + OTHERS[:1], ids=label)
def test_prose_wraps_at_100(path):
    """Also the README's tables and code; on other pages tables are as wide as they need to be."""
    text = text_of(path)
    if path != README:
        text = re.sub(r"^\|.*", "", FENCED.sub("", text), flags=re.M)
    assert not [line for line in text.splitlines() if len(line) > 100]


# ------------------------------------------------------------------ docs/extending.md


@pytest.fixture(scope="module")
def names():
    """What the blocks define, all in one namespace."""
    found = {}
    for block in code_of(EXTENDING):
        exec(compile(block, "docs/extending.md", "exec"), found)
    return found


def test_the_schedule(names):
    schedule = schedules.Schedule("sigmoid", 1000, True, *names["sigmoid_form"](1000))
    t = torch.linspace(0, 1000, 401, dtype=torch.float64)
    ab = schedule.alpha_bar(t)
    assert ab[0] == 1 and (ab.diff() < 0).all() and 0 < ab[-1] < 0.01
    assert_close(schedule.t_of_lam(schedule.lam(t[1:])), t[1:], rtol=1e-9, atol=1e-7)
    # and it samples: 2,000 draws of a Gaussian keep mean and width
    denoiser = Denoiser(toy.oracle(toy.one_gaussian(), schedule), schedule)
    x = torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = samplers.sample(denoiser, x, "ddim", 200)
    assert abs(x0.mean()) < 0.05 and abs(x0.std() - 0.5) < 0.03


def test_the_loss(names):
    schedule = schedules.make_schedule("linear")
    net = torch.nn.Conv2d(3, 3, 3, padding=1)
    denoiser = Denoiser(lambda x, c: 3 * net(x), schedule)
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(5, 3, 4, 4, generator=g) for _ in range(2))
    t = torch.tensor([1, 50, 300, 700, 1000])
    loss = names["huber_loss"](denoiser, x0, t, noise)
    r = (denoiser.predict(schedules.add_noise(schedule, x0, t, noise), t)[1] - noise).abs()
    assert (r > 1).any() and (r < 1).any()
    by_hand = torch.where(r < 1, r**2 / 2, r - 0.5).mean((1, 2, 3))
    assert loss.shape == (5,)
    assert_close(loss, by_hand, rtol=1e-5, atol=1e-6)
    loss.mean().backward()
    assert net.weight.grad.abs().sum() > 0


def test_the_sampler(names):
    """Its error falls with the square of the number of steps; DDIM's does not."""
    schedule = schedules.make_schedule("linear", continuous=True)
    denoiser = Denoiser(toy.oracle(toy.two_bumps(), schedule), schedule)
    x = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64)[:, None]
    exact = samplers.sample(denoiser, x, "dpm-solver", 1001, "logsnr")
    calls = torch.tensor([41, 81, 161, 321], dtype=torch.float64)
    errors = torch.stack([(names["adams"](denoiser, x, int(n)) - exact).abs().max() for n in calls])
    logs = calls.log() - calls.log().mean()
    assert abs(-(logs @ errors.log() / (logs @ logs)) - 2) < 0.25
    one = samplers.sample(denoiser, x, "ddim", 321, "logsnr")
    assert (one - exact).abs().max() > 5 * errors[-1]
    start = torch.randn(3, 1)  # single precision stays so
    assert names["adams"](denoiser, start, 5).dtype == torch.float32


# Words that readers stumbled over. "There is no file" may stay; "a loss that is no loss" may not.
WORDS = re.compile(
    r"\b(said|told|beside|nobody|somebody|whoever)\b|(?<!there )\b(is|are) no [a-z]+", re.I
)
# Rare words and idioms for "a separate", "again", "for any", "silently", "learned" and "always".
# The notebook may keep them.
IDIOMS = re.compile(
    r"\b(of (its|their) own|anew|whatever|wherever|in silence|learnt|by heart|for ever|save for)\b",
    re.I,
)
PROGRAM_FILES = [p for g in ("*.py", "*/*.py") for p in ROOT.glob(g) if "tests" not in p.parts]
EVERY_PAGE = [ROOT / "CONTRIBUTING.md", README, *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("path", PROGRAM_FILES + EVERY_PAGE, ids=label)
def test_plain_words(path):
    text = re.sub(r"(def |\.)beside\(", "", path.read_text(encoding="utf-8"))
    text = re.sub(r"\s+#?\s*", " ", text)
    assert not [m[0] for m in WORDS.finditer(text)]
    assert path.stem == "lab-notebook" or not [m[0] for m in IDIOMS.finditer(text)]


def test_plain_words_notices():
    assert WORDS.search("It is told what it said.") and WORDS.search("a loss that is no loss")
    assert not WORDS.search("There is no checkpoint: train first.")
    assert IDIOMS.search("Each has a file of its own.") and not IDIOMS.search("its own file")
