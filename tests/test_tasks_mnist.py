import functools
import gzip
import hashlib
import http.server
import sys
import threading

import numpy as np
import pytest

from bilevel.tasks.mnist import ARCHIVES, Mnist, mnist, read_idx

module = sys.modules["bilevel.tasks.mnist"]
NAMES = list(ARCHIVES)


def idx(array, magic=None):
    header = (magic or 0x0800 + array.ndim).to_bytes(4, "big")
    return header + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def digits(seed=0):
    """What the files of the small world hold: 30 and 20 digits."""
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (30, 20)]
    labels = [rng.integers(0, 10, n, dtype=np.uint8) for n in (30, 20)]
    return [images[0], labels[0], images[1], labels[1]]


@pytest.fixture(autouse=True)
def no_data_of_this_machine(monkeypatch, tmp_path):
    """Nothing is found but what a test puts there; the test of the real data names its folder."""
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def small_world(monkeypatch, tmp_path):
    """The four official files with few digits, on a server of this machine."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(module, "NUM_TRAIN", 30)
    monkeypatch.setattr(module, "NUM_TEST", 20)
    for name, array in zip(NAMES, digits(), strict=True):
        (site / name).write_bytes(gzip.compress(idx(array)))
    hashes = {name: hashlib.sha256((site / name).read_bytes()).hexdigest() for name in NAMES}
    monkeypatch.setattr(module, "ARCHIVES", hashes)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(module, "URL", f"http://127.0.0.1:{server.server_port}/")
        yield site
        server.shutdown()


def same(found, expected):
    assert isinstance(found, Mnist)
    for start in (0, 2):
        (x, y), (ex, ey) = found[start : start + 2], expected[start : start + 2]
        assert x.dtype == np.uint8 and y.dtype == np.int32
        rows = {(a.tobytes(), int(b)) for a, b in zip(x, y, strict=True)}
        assert rows == {(a.tobytes(), int(b)) for a, b in zip(ex, ey, strict=True)}
        assert len(x) == len(ex)


def test_the_real_one_is_the_official_one(data_folder):
    found = mnist(data_folder)
    # Figures of the official set: mean and deviation of its pixels, and its number of digits of each class.
    assert [round(float(f(found.train_images) / 255), 4) for f in (np.mean, np.std)] == [0.1307, 0.3081]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(found.train_labels).tolist() == counts
    assert np.bincount(found.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(found.train_labels[:5000], minlength=10).min() > 400  # the classes are mixed


def test_the_order_is_that_of_the_digits_not_of_the_file(small_world, tmp_path):
    x, y, *test = digits()
    order = np.argsort(y)
    np.savez(tmp_path / "mnist.npz", **dict(zip(Mnist._fields, [x[order], y[order], *test], strict=True)))
    a, b = mnist(tmp_path), mnist(small_world)
    np.testing.assert_array_equal(a.train_images, b.train_images)
    np.testing.assert_array_equal(a.train_labels, b.train_labels)
    assert (a.train_labels != np.sort(y)).any() and (a.train_labels != y).any()


def test_download_leaves_the_packed_file_and_nothing_else(small_world, tmp_path):
    same(mnist(download=True), digits())
    assert [path.name for path in (tmp_path / "cache" / "bilevel").iterdir()] == ["mnist.npz"]
    for path in small_world.iterdir():
        path.unlink()
    same(mnist(), digits())  # from the cache


def test_folder_npz_and_environment_agree(small_world, tmp_path, monkeypatch):
    same(mnist(small_world), digits())
    np.savez(tmp_path / "mine.npz", **dict(zip(Mnist._fields, digits(), strict=True)))
    same(mnist(tmp_path / "mine.npz"), digits())
    monkeypatch.setenv("BILEVEL_DATA", str(small_world))
    same(mnist(), digits())


@pytest.mark.parametrize("content", [b"not what was expected", None])
def test_a_bad_download_is_an_error_and_leaves_nothing(small_world, tmp_path, content):
    if content is None:
        (small_world / NAMES[2]).unlink()  # 404
        error, message = OSError, f"could not download .*{NAMES[2]}.*try again"
    else:
        (small_world / NAMES[2]).write_bytes(content)
        error, message = ValueError, f"{NAMES[2]} did not send the expected file"
    with pytest.raises(error, match=message):
        mnist(download=True)
    assert list((tmp_path / "cache" / "bilevel").iterdir()) == []


def test_missing_data_are_an_error_that_says_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download=True.*BILEVEL_DATA"):
        mnist()
    with pytest.raises(FileNotFoundError, match=r"no MNIST at .*nowhere\.npz"):
        mnist(tmp_path / "nowhere.npz")
    with pytest.raises(FileNotFoundError, match=r"no MNIST in folder .*expected mnist.npz"):
        mnist(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda a: gzip.compress(idx(a))[:-20], "damaged gzip"),
        (lambda a: b"no gzip", "damaged gzip"),
        (lambda a: gzip.compress(b""), "magic number 2049.*got 0"),
        (lambda a: gzip.compress(idx(a, magic=0x0D03)), "magic number 2049.*got 3331"),
        (
            lambda a: gzip.compress(idx(a)[:-5]),
            r"says it holds \[30, 28, 28\], which is 23520 bytes, got",
        ),
        (lambda a: gzip.compress(idx(a) + b"more"), "got 23524"),
        (lambda a: gzip.compress(idx(a[:29])), r"`train_images` as integers \[30, 28, 28\], got uint8 \[29,"),
        (lambda a: gzip.compress(idx(a[:, 0, 0].copy())), r"`train_images` as integers .* got uint8 \[30\]"),
    ],
)
def test_damaged_archives_are_refused(small_world, content, message):
    (small_world / NAMES[0]).write_bytes(content(digits()[0]))
    with pytest.raises(ValueError, match=message) as caught:
        mnist(small_world)
    assert str(small_world) in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_byte_is_noticed(small_world):
    content = bytearray((small_world / NAMES[0]).read_bytes())
    content[len(content) // 2] ^= 255
    (small_world / NAMES[0]).write_bytes(content)
    with pytest.raises(ValueError, match="damaged gzip"):
        read_idx(small_world / NAMES[0])


def test_other_npz_files_are_refused(small_world, tmp_path):
    parts = dict(zip(Mnist._fields, digits(), strict=True))
    path = tmp_path / "mnist.npz"
    np.savez(path, images=np.zeros(3))
    with pytest.raises(ValueError, match=r"no packed MNIST .*train_images"):
        mnist(tmp_path)
    np.savez(path, **parts | {"train_labels": parts["train_labels"] + 5})
    with pytest.raises(ValueError, match=r"`train_labels` must lie in 0\.\.9"):
        mnist(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        mnist(path)
