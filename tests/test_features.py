"""features.py: statistics of features, their files, and networks saved by torch.export.save."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from image_writers import pixels
from metrics_worker import export, maps

import metrics
from support import features
from support.distributed import Distributed

ALONE = Distributed(0, 1, 0, torch.device("cpu"))


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def moments(f, batch=64, dist=ALONE):
    sums = features.FeatureSums(f.shape[1])
    for part in f.split(batch):
        sums.add(part)
    return sums.moments(dist)


def test_moments_are_those_of_numpy_for_any_batch_and_order():
    x = random(101, 9) * np.arange(1, 10) + 100
    mean, cov = x.mean(0), np.cov(x, rowvar=False)
    for batch in (1, 7, 101):
        for rows in (x, x[::-1], x[np.random.default_rng(0).permutation(101)]):
            mu, sigma = moments(torch.from_numpy(rows.copy()), batch)
            assert mu.dtype == sigma.dtype == np.float64
            np.testing.assert_allclose(mu, mean, rtol=1e-13)
            np.testing.assert_allclose(sigma, cov, rtol=0, atol=1e-9 * cov.max())


def test_float32_features_are_summed_in_float64():
    """Mean 300, deviation 0.1: float32 sums of squares would lose the covariance altogether."""
    f = torch.from_numpy(300 + 0.1 * random(1000, 4)).float()
    _, sigma = moments(f)
    exact = np.cov(f.double().numpy(), rowvar=False)
    np.testing.assert_allclose(sigma, exact, rtol=0, atol=1e-6 * exact.max())


def test_sums_of_several_processes_add_up():
    x = random(31, 4)
    parts = [features.FeatureSums(4) for _ in range(3)]
    parts[0].add(torch.from_numpy(x[:20]))
    parts[2].add(torch.from_numpy(x[20:]))  # the second has no images

    class Merged:
        def all_reduce(self, tensor):  # n, then the sum, then the outer products
            name = ("n", "sum", "outer")[tensor.dim()]
            return sum(torch.as_tensor(getattr(part, name)) for part in parts)

    for part in parts:
        mu, sigma = part.moments(Merged())
        np.testing.assert_allclose(mu, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-11)


@pytest.mark.parametrize("n", [2, 7, 1000])
def test_a_set_of_equal_images_has_covariance_zero(n):
    """A collapsed model gets a score, too: what rounding leaves of its covariance is no error."""
    for seed in range(10):
        f = torch.from_numpy(abs(random(1, 128, seed=seed)) * 10).float()
        mu, sigma = moments(f.expand(n, -1), 7)
        assert not sigma.any()
        np.testing.assert_allclose(mu, f[0].double(), rtol=1e-13)
        other = random(200, 128)
        other_mu, other_sigma = other.mean(0), np.cov(other, rowvar=False)
        exact = ((mu - other_mu) ** 2).sum() + np.trace(other_sigma)
        found = metrics.frechet_distance(mu, sigma, other_mu, other_sigma)
        assert found == pytest.approx(exact, rel=1e-12)


def test_a_small_covariance_is_not_taken_for_zero():
    f = 1 + 1e-4 * random(500, 6)
    _, sigma = moments(torch.from_numpy(f))
    np.testing.assert_allclose(sigma, np.cov(f, rowvar=False), rtol=0, atol=1e-6 * 1e-8)


def test_one_image_has_no_covariance():
    refused("at least 2 images, not 1", moments, torch.zeros(1, 3))


def test_statistics_of_every_make(here):
    mu, sigma = np.arange(3.0), np.eye(3)
    ours = features.Statistics("ours.npz", mu, sigma, 50, 8, "net", "ab", "bf16")
    np.savez("ours.npz", **ours.arrays())
    np.savez("theirs.npz", mu=mu, sigma=sigma)  # pytorch-fid and EDM alike
    np.savez("openai.npz", arr_0=pixels(4, 8, 8, 3), mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    np.savez("images.npz", pixels(4, 8, 8, 3))
    read = features.read_statistics("ours.npz")
    for name, value in vars(ours).items():
        assert np.array_equal(getattr(read, name), value), name
    for name in ("theirs.npz", "openai.npz"):
        read = features.read_statistics(name)
        assert np.array_equal(read.sigma, sigma) and read.source == name
        assert read.n is read.size is read.network is read.sha256 is None
        assert read.precision == "fp32"
        assert read.arrays().keys() == {"mu", "sigma", "precision"}
    for other in ("images.npz", "nothing.npz", "images.png", "."):
        assert features.read_statistics(other) is None


def test_broken_npz_files_are_named_in_one_line(here):
    np.savez("a.npz", mu=np.zeros(50), sigma=np.eye(50))
    Path("cut.npz").write_bytes(Path("a.npz").read_bytes()[:9000])
    np.savez_compressed("b.npz", mu=random(50), sigma=np.eye(50))
    raw = bytearray(Path("b.npz").read_bytes())
    raw[150:190] = bytes(40)  # zlib has errors of its own
    Path("spoilt.npz").write_bytes(raw)
    np.save("c.npy", np.zeros(3))
    Path("c.npy").rename("array.npz")  # np.load gives an array, not an archive
    Path("page.npz").write_text("<html>not found</html>")
    Path("empty.npz").touch()
    np.savez("object.npz", mu=np.array([None]), sigma=np.eye(1))  # a pickle: never opened
    np.savez("words.npz", mu=np.array(["a"]), sigma=np.eye(1))
    np.savez("shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    for name in "cut spoilt array page empty object words shape".split():
        message = str(refused(f"^{name}.npz", features.read_statistics, f"{name}.npz"))
        assert "web page" in message or name != "page"


def test_a_network_goes_to_the_device(here, monkeypatch):
    """On a GPU the file's tensors must move along; "meta" stands in for one."""
    export("maps.pt2", maps, dynamic="N")
    move, moved = features.move_to_device_pass, []
    spy = lambda *args: moved.append(args[1]) or move(*args)  # noqa: E731
    monkeypatch.setattr(features, "move_to_device_pass", spy)
    net = features.open_exported(Path("maps.pt2"), torch.device("meta"))
    assert net(torch.zeros(3, 3, 8, 8, device="meta")).device.type == "meta"
    assert moved == ["meta"]


def test_names_of_scores():
    for network, names in {
        features.INCEPTION: ("FID", "IS"),
        "net.pt2": ("FD(net.pt2)", "IS(net.pt2)"),
        None: ("FD", "IS"),  # files of other tools
    }.items():
        net = features.FeatureNetwork(None, network, None, "none")
        assert (net.name("FID", "FD"), net.name("IS", "IS")) == names
