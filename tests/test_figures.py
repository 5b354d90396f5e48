"""papers/figures.py: the figures that need no run."""

import csv

import pytest
from PIL import Image

from papers import figures


@pytest.mark.slow
def test_the_schedules(tmp_path, capsys):
    out = tmp_path / "schedules.png"
    figures.main(["schedules", "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [out]
    assert str(out) in capsys.readouterr().out


def test_errors_of_one_size_add_up_or_cancel(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figures.main(["illustration"])
    out = capsys.readouterr().out
    assert Image.open("illustration.png").size[0] > 800
    with open("illustration.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 3 * 51
    ends = {r["run"]: float(r["gap"]) for r in rows if float(r["t"]) == 0}
    assert ends["ideal network"] == 0
    assert ends["errors add up"] > 10 * ends["errors cancel"] > 0, out
