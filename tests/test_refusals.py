"""Wrong flags and files: one line that begins with the flag or the file, exit status 2, and nothing
is written. One table for all programs; a row is `what one types | how the error begins`, a regular
expression.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from programs import main_of

from support.programs import run_main

REFUSED = {
    "train.py": r"""
        --batch-size x | argument --batch-size: invalid int value
        --preset huge | argument --preset: invalid choice
        --batch-size 0 | --batch-size must be above 0
        --data nowhere | nowhere: no such file or folder
        --sa-k 0 | --sa-k must be 1 to 1000, not 0
        --sa-k 1001 | --sa-k must be 1 to 1000
        --sa-weight 1 | --sa-weight requires --sa-k 2 or more
        --etsdm-n 4 | --etsdm-n has no effect without --etsdm
        --etsdm --etsdm-n 0 | --etsdm-n
        --etsdm --etsdm-interval 10 --etsdm-n 20 | --etsdm-
        --etsdm --etsdm-interval 1500 | --etsdm-interval
        --etsdm --etsdm-interval nan | --etsdm-interval
        --etsdm --etsdm-interval 0 | --etsdm-interval
        --images 3 | --images must be at least one batch, --batch-size 24, not 3
        --images 100 --steps 2 | --steps and --images both set the length
        --steps 0 | --steps must be above 0, not 0
        --lr -1 | --lr must be above 0
        --lr inf | --lr must be above 0
        --lr nan | --lr must be above 0, not nan
        --muon-lr 0.1 --optimizer adam | --muon-lr has no effect without --optimizer muon
        --muon-momentum 0.9 --optimizer adam | --muon-momentum has no effect without --optimizer
        --muon-momentum 1 | --muon-momentum must be at least 0 and below 1
        --betas 0.0015 0.0195 | --betas needs another --schedule
        --schedule linear --betas 1e-4 1.5 | --betas: beta reaches 1.5 with T = 1000
        --ema 1.5 | --ema must be at least 0 and below 1
        --dropout 1 | --dropout must be at least 0 and below 1
        --image-size 90000 | --image-size must be above 0 and below 8193
        --image-size 36 | --image-size must be a multiple of 8
        --microbatch 0 | --microbatch must be at least 1
        --grad-clip -1 | --grad-clip must be 0 or more
        --schedule edm --prediction v | --prediction v cannot go with --schedule edm
        --schedule edm --continuous | --continuous has no effect with --schedule edm
        --name a/b | --name 'a/b' must be a plain name
        --name .. | --name '..' must be a plain name
        --init base --image-size 16 | --image-size is that of --init base
        --init sr | --init sr is neither a model of train.py nor imported
        --init none | no run none""",
    "papers.alternatives": """
        --lipschitz-reg 0 | --lipschitz-reg must be above 0
        --lipschitz-reg -1 | --lipschitz-reg must be 0 or more
        --lipschitz-reg inf | --lipschitz-reg must be 0 or more
        --train-times remap | --train-times remap needs --remap
        --prediction edm --remap sqrt | --remap does not work with edm
        --remap sqrt --etsdm | --remap and --etsdm are alternatives
        --sa-reuse | --sa-reuse needs --sa-k 2
        --sa-reuse --sa-k 2 --sa-weight 0 | --sa-reuse needs --sa-k 2
        --sa-reuse --sa-k 2 --lipschitz-reg 3 | --sa-reuse and --lipschitz-reg: choose one
        --schedule edm --prediction v | --prediction v cannot go with --schedule edm
        --image-size 30 | --image-size must be a multiple of""",
    "papers.superres": "video | video: the programs are train, enlarge and colour",
    "papers.superres train": """
        --image-size 36 | --image-size must be a multiple
        --image-size 8 --factor 1 | --factor 1 must be at least 2 and divide --image-size 8
        --image-size 8 --factor 3 | --factor 3 must be at least 2 and divide --image-size 8""",
    "papers.superres enlarge": """
        sr | IMAGES are missing
        plain shapes | plain is not a super-resolution run
        sr nowhere | IMAGES: nowhere: no such file or folder
        sr broken | IMAGES: .*broken(?!.*--skip-bad-images)
        sr shapes --nfe 0 | --nfe must be from 1
        sr shapes --npz | unrecognized arguments: --npz""",
    "papers.autoencoder": "draw | draw: the programs are train and reconstruct",
    "papers.autoencoder train": """
        --downsamplings 9 | --downsamplings must be 1 to 5, not 9
        --image-size 30 | --image-size must be a multiple of 4 for --downsamplings 2
        --kl-weight -1 | --kl-weight must be 0 or more
        --latent-channels 0 | --latent-channels must be at least 1
        --schedule linear | unrecognized arguments
        --sa-k 2 | unrecognized arguments
        --etsdm | unrecognized arguments""",
    "papers.autoencoder reconstruct": """
        code | RUN and IMAGES are both needed
        code shapes -n 0 | --num must be at least 1, not 0
        code shapes --out full | --out full: full exists already
        plain shapes | plain is not an autoencoder
        latent shapes | latent is not an autoencoder
        none shapes | no run none""",
    "papers.latents": """
         | AUTOENCODER is missing
        none | no run none
        plain | plain is not an autoencoder: python -m papers.autoencoder train
        code --preset celeba64 | --preset celeba64 .*4x4.*--downsamplings
        code --image-size 16 | unrecognized arguments""",
    "papers.heads": """
        npr | KIND and RUN are both needed
        sn nowhere | no run nowhere
        sn code | code is an autoencoder: a head needs a denoiser
        sn base --batch-size 0 | --batch-size must be above 0
        sn base --sa-k 2 | unrecognized arguments
        sn base --etsdm | unrecognized arguments
        sn base --image-size 8 | unrecognized arguments
        sn base --schedule linear | unrecognized arguments""",
    "sample.py": r"""
        nobody | no run nobody
        page.pt | page\.pt .*web page
        code | runs/code is an autoencoder.*python -m papers.latents code
        sr | sr enlarges images: python -m papers.superres enlarge
        latent --clip on | --clip on.*latent
        -n 0 | --num must be from 1 to 1048576, not 0
        --batch-size 0 | --batch-size must be from 1
        --nfe 0 | --nfe must be from 1
        --seed -1 | --seed must be from 0
        --eta 0.1 | --eta has no effect on ddpm
        --order 2 | --order has no effect on ddpm
        --sampler ddim --variance large | --variance has no effect on ddim
        --variance analytic --sampler heun | --variance has no effect on heun
        --churn 3 | --churn has no effect on ddpm
        --sampler heun --churn-min 1 | --churn-min has no effect without --churn""",
    "metrics.py": """
        fid a b -n 0 | --num must be from 1
        is base -n 9 --features page.pt | base: the Inception Score needs at least one image in each
        fid a b --batch-size 0 | --batch-size must be from 1
        fid a b --image-size 0 | --image-size must be
        fid a b --image-size 90000 | --image-size must be
        fid a b --seed -1 | --seed must be from 0
        fid a b --inception none | --inception
        fid sr shapes -n 4 --features page.pt | .*sr is a super-resolution run
        fid code shapes -n 4 --features page.pt | .*code is an autoencoder
        psnr a b --features x.pt2 | --features has no effect: psnr compares""",
    "gap.py": r"""
        none | no run none
        -n 1 | --num must be at least 2
        --steps 1 | --steps must be at least 2
        base -n 2 --steps 5000 | --steps 5000: base has only 1000 discrete timesteps
        --batch-size 0 | --batch-size must be at least 1
        --seed -1 | --seed must be at least 0
        --eta nan | --eta must be between 0 and 1
        --eta 2 | --eta must be between 0 and 1
        --out gap.jpg | .*must be a \.png
        base --data one.npy | --data: .* at least 2 images
        base --ideal -n 2 --steps 2 | .*fits into memory, not shapes""",
    "lipschitz.py": r"""
        none | no run none
        base --data nowhere | nowhere: no such file or folder
        -n 0 | --num must be at least 1
        --batch-size 0 | --batch-size must be at least 1
        --seed -1 | --seed must be at least 0
        --dt 0 | --dt must be at least 1e-09
        --dt nan | --dt must be at least 1e-09, not nan
        --dt inf | --dt must be at least 1e-09, not inf
        base --dt 0.5 | --dt must be a whole number: base is not
        base --dt 2000 | .*leave no t from 1 on
        base --max-t 0.5 | .*leave no t from 1 on
        --max-t nan | --max-t must
        --t 50 | --t requires --perturb
        --perturb --dt 2 | --dt requires --no-perturb
        base --perturb --t 1000 | --t must be above 0 and below 1000
        base --perturb --t 9.5 | --t must be a whole number: base is not
        --perturb --scales 0 -1 | --scales must be at least 0, not 0.0 -1.0
        base --out x.pdf | .*must be a \.png
        base --out nowhere/x.png | .*in an existing folder""",
    "papers.covariance": """
        none | no run none
        -n 0 | --num must be at least 1
        --batch-size 0 | --batch-size must be at least 1
        --seed -1 | --seed must be""",
    "papers.late": """
        base --data one.npy | --data
        base --data four.npy --t-start 2000 | --t-start must be at most 1000 for base
        base --data four.npy --edges 2.5 2.7 | --edges must be whole numbers""",
    "papers.classifier": """
        nowhere | .*nowhere.*: no such file
        set --out x.pt | --out x.pt must be a .pt2
        set --out none/x.pt2 | .*in an existing folder
        shapes --image-size 0 | --image-size must be
        set --epochs 0 | --epochs must be at least 1
        set --seed 18446744073709551616 | --seed must be""",
    "papers.figures": r"""
        schedules --out none/schedules.png | --out .* must be a \.png file in an existing folder
        schedules --out schedules.jpg | --out .* must be a \.png file in an existing folder""",
    "papers.shapes_check": """
         | IMAGES
        full -n 0 | --num""",
    "papers.experiments": """
         | NAME is missing
        none | there is no experiment none
        etsdm-sr --image-size 64 | --image-size has no effect here
        sa-table2 --features page.pt | --features has no effect here
        etsdm-figure1 --rows plain | --rows has no effect here
        sa-figure4 --columns less | --columns has no effect here
        etsdm-table1 --budget paper --data a/ --sa-weight 3 | --sa-weight has no effect here
        sa-table1 --seeds 0 | --seeds must be at least 1
        sa-table1 --features a --inception b | --features .*: give it or --inception
        sa-table1 --features none.pt2 | --features none.pt2: no such file
        sa-table1 --budget huge | argument --budget: invalid choice
        sa-table1 --data photos/ --test more/ | --test
        sa-table1 --data a/train b/train | --data: .* each set needs a different one
        sa-table1 --data d.npz:a d.npz:b | --data: .* each set needs a different one
        sa-table1 --budget gpu --image-size 32 | --image-size goes with --budget cpu
        sa-table1 --preset cifar10 | --preset .*go with --budget paper
        sa-table1 --sa-weight 0.5 | .*--sa-weight go with --budget paper
        sa-table1 --budget paper --data a/ --sa-weight 0 | --sa-weight must be above 0
        sa-table3 --budget paper --preset celeba64 | --data: .*Name a folder or zip
        etsdm-table2 --budget paper | --data: .*Name a folder or zip
        all --budget paper --data a/ | --budget paper: .*Name one experiment""",
    "benchmarks": """
        everything | argument .*invalid choice
        train --rounds 0 | --rounds must be at least 1
        train --batch-size -1 | --batch-size must be at least 1
        train --data nowhere | --data is for precision
        precision --steps 1 | --steps must be at least 200
        memory --compile | --compile is for sample, fid
        memory --json nowhere/out.json | --json: no such folder""",
}
ROWS = [
    (program, *(part.strip() for part in row.split(" | ", 1)))
    for program, rows in REFUSED.items()
    for row in rows.strip("\n").splitlines()
]


@pytest.fixture(scope="module")
def place(trained):
    """Inside the folder of trained runs, with files that are not what they should be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        for name, content in {
            "page.pt": "<html>not found</html>",
            "full/mine.txt": "kept",
            "broken/x.png": "not an image",
        }.items():
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text(content, encoding="utf-8")
        np.save("four.npy", np.zeros((4, 8, 8, 3), np.uint8))
        np.save("one.npy", np.zeros((1, 8, 8, 3), np.uint8))
        yield


def files():
    return {p: p.stat().st_mtime_ns for p in Path(".").rglob("*")}


@pytest.mark.parametrize("program, words, message", ROWS, ids=lambda v: v[:40])
def test_one_line_and_status_2(program, words, message, place, monkeypatch, capsys):
    monkeypatch.delenv("TRACEBACK", raising=False)
    before = files()
    with pytest.raises(SystemExit) as end:
        run_main(lambda: main_of(program, words))
    lines = [x for x in re.split("[\r\n]", capsys.readouterr().err) if "error: " in x]
    assert end.value.code == 2 and len(lines) == 1, lines
    assert re.match(rf"\S.*?: error: {message}", lines[0]), lines[0]
    assert before and files() == before, "nothing is written"
