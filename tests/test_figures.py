"""papers/figures.py: the figure of the schedules."""

import pytest

from papers import figures


@pytest.mark.slow
def test_the_figure(tmp_path, capsys):
    out = tmp_path / "schedules.png"
    figures.main(["--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [out]
    assert str(out) in capsys.readouterr().out


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^--out .*: there is no folder"):
        figures.main(["--out", str(tmp_path / "none" / "schedules.png")])
