"""tutorial.ipynb: runs from top to bottom without Jupyter, shows what its text promises, and is
committed with its pictures."""

import json
import re

import matplotlib
import numpy as np
import pytest

from conftest import ROOT
from test_readme import WORDS

NOTEBOOK = json.loads((ROOT / "tutorial.ipynb").read_text(encoding="utf-8"))
CELLS = [(cell["cell_type"], "".join(cell["source"]), cell) for cell in NOTEBOOK["cells"]]
CHAPTERS = 7


def test_it_was_run_in_order_and_committed_with_its_outputs():
    code = [cell for kind, _, cell in CELLS if kind == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    drawn = sum(text.count("plt.show()") for kind, text, _ in CELLS if kind == "code")
    assert len(pictures) == drawn > CHAPTERS
    assert (ROOT / "tutorial.ipynb").stat().st_size < 1_500_000


def test_every_chapter_has_its_parts():
    text = "\n".join(text for kind, text, _ in CELLS if kind == "markdown")
    chapters = re.split(r"^# (?=\d\. )", text, flags=re.M)[1:]
    assert len(chapters) == CHAPTERS
    for i, chapter in enumerate(chapters, 1):
        for part in (
            "**The question.**",
            "**The picture",
            "**The equation.**",
            f"**Exercise {i}.**",
        ):
            assert part in chapter, f"chapter {i} lacks {part}"
    answers = [text for kind, text, _ in CELLS if kind == "code" and text.startswith("# Answer.")]
    assert len(answers) == CHAPTERS
    for link in re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / link).exists(), link


def test_plain_words_and_short_lines():
    for kind, text, _ in CELLS:
        assert not [m[0] for m in WORDS.finditer(re.sub(r"\s+", " ", text))]
        lines = [line for line in text.splitlines() if not line.startswith(("|", "$$"))]
        assert kind == "code" or max(map(len, lines)) <= 102, max(lines, key=len)


def is_gray(color):
    red, green, blue = matplotlib.colors.to_rgb(color)
    return red == green == blue


def check(figure):
    """Axes have labels with units, and lines that a black-and-white print tells apart."""
    for axes in figure.axes:
        lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 1]
        assert all(is_gray(line.get_color()) for line in lines)
        named = [line for line in lines if not line.get_label().startswith("_")]
        looks = [(line.get_linestyle(), line.get_marker(), line.get_color()) for line in named]
        assert len(set(looks)) == len(looks), "two lines that look the same"
        if axes.axison:
            beside = axes.get_ylabel() or any(
                other.get_ylabel() for other in axes.get_shared_y_axes().get_siblings(axes)
            )
            assert axes.get_xlabel() and beside


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What every cell has left behind, run as a fresh kernel would in an empty folder."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, kept = [], {"__name__": "__main__"}

    def show():
        for number in plt.get_fignums():
            figure = plt.figure(number)
            figure.canvas.draw()
            check(figure)
            drawn.append(number)
        plt.close("all")

    with pytest.MonkeyPatch.context() as patch, plt.rc_context():
        patch.chdir(tmp_path_factory.mktemp("tutorial"))
        patch.setattr(plt, "show", show)
        for i, (kind, text, _) in enumerate(CELLS):
            if kind == "code":
                exec(compile(text, f"cell {i} of tutorial.ipynb", "exec"), kept)
    kept["drawn"] = len(drawn)
    return kept


@pytest.mark.slow
def test_it_shows_what_it_says(names):
    assert names["drawn"] > CHAPTERS
    # 1, 2: the numbers of the first data; the network comes near to the least loss there is
    assert abs(names["mixture"].mean() - 0.1) < 1e-9
    assert abs(names["mixture"].variance() - 0.26) < 0.005
    assert 0.8 < names["history"][0] < 1.2 and abs(names["final"] - names["floor"]) < 0.01
    # 3: orders are slopes
    for order, slope in names["slopes"].items():
        assert abs(slope + order) < 0.45
    # 4: errors of one size
    ends, tau = names["ends"], names["tau"]
    assert abs(ends["errors add up"] + 0.27) < 0.005
    far, near = (abs(ends[k] - ends["exact"]) for k in ("errors add up", "errors cancel"))
    assert far > 20 * near
    # ... of a run, which are not those of training; their weights, and theorem 2
    assert 8 < names["on_run"][20] < 10 and names["on_run"][1000] < 0.004
    assert 0.9 < names["in_training"][20] < 1
    assert tau[2] > 500_000 * tau[1000]
    total = names["difference"].square().mean()
    for k in (1, 2, 4, 100):
        windows, single = names["bounds"](k)
        assert 10 * total < windows <= single * (1 + 1e-12)
        assert k == 1 or windows < 0.75 * single
    # ... SA-k's wider samples
    assert abs(names["wider"][2] - 4 / 3) < 0.13 and abs(names["wider"][3] - 1.5) < 0.15
    spread = names["spread"]
    usual, sa2 = ([abs(std - 0.5) for std in spread[name]] for name in ("usual loss", "SA-2"))
    assert sa2[1] < usual[1] and sa2[-1] > usual[-1]  # nearer in 10 calls, farther in 100
    assert names["moved"]["DDPM"][0] < 0.02 * names["moved"]["DDIM"][0]  # DDPM forgets
    # 5: rates of theorem 3.1 and 4.1; in σ/α nothing is steep; exactly 0 inside the parts
    for name, slope in names["powers"].items():
        assert abs(slope + (0.0 if name.endswith("mns") else 0.5)) < 0.03
    assert max(names["steepest"].values()) < 4
    assert abs(names["rate"] + 1) < 0.1 and abs(names["worst_rate"] + 0.5) < 0.1
    slope = names["learned_K"]
    assert names["largest"] == 0 and slope["t"][0] < 0.2 * slope["exact"][0]
    assert slope["exact"][39:].max() < 0.2 * slope["exact"][0]
    assert names["least"] > names["floor"] + 0.01
    # 6: the analytic width keeps the variance in any number of steps
    variances = names["variances"]
    assert all(abs(v - 0.25) < 0.02 for v in variances["Analytic-DPM"])
    assert variances["DDPM, small (β̃)"][2] < 0.15 < 0.3 < variances["DDPM, large (β)"][2]
    np.testing.assert_allclose(names["learned"], names["known"], atol=0.15)
    order = ["the data, drawn again", "NPR-DPM", "Analytic-DPM", "DDPM, small"]
    assert sorted(names["distance"], key=names["distance"].get) == order
    # 7: pictures that are near to the data, and of all kinds; what each paper's method changes
    quality, pixels = names["quality"], names["pixel_variance"]
    for name in names["networks"]:
        assert quality["other drawings"] < quality[name, 50] < quality["plain noise"] / 5
    assert all(pixels["SA-2", n] > pixels["usual", n] for n in names["calls"])
    assert all(pixels["usual", n] < names["others"].var(0).mean() for n in names["calls"])
    slope, usual = names["K"]["E-TSDM"], names["K"]["usual"]
    assert slope[names["inside"]].max() == 0 < usual.min()
    assert all(slope[t - 1] > usual.max() for t in (19, 39, 59, 79, 99))
    assert names["accuracy"] > 0.9
    assert names["counts"].min() > 0 and names["counts"][0].sum() < 48 - 6
