import functools
import hashlib
import http.server
import io
import stat
import sys
import threading
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from bilevel.tasks import omniglot
from bilevel.tasks import omniglot_archive as archive

protocol = sys.modules["bilevel.tasks.omniglot"]  # the module; the package has the function


def png(bits):
    buffer = io.BytesIO()
    Image.fromarray(bits.reshape(105, 105).astype(np.uint8) * 255).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def drawing(number, drawer):
    return np.random.default_rng([number, drawer]).random(105 * 105) > 0.2


def write_zip(path, numbers, extra=()):
    """A zip laid out like the official ones, of random drawings; `extra` are more members."""
    with zipfile.ZipFile(path, "w") as file:
        for number in numbers:
            for drawer in range(1, 21):
                name = f"images/Alphabet/character{number % 50:02d}/{number:04d}_{drawer:02d}.png"
                file.writestr(name, png(drawing(number, drawer)))
        for name, content in extra:
            file.writestr(name, content)
    return path


@pytest.fixture(autouse=True)
def no_data_of_this_machine(request, monkeypatch, tmp_path):
    """Nothing is found but what a test puts there; tests of the real data name their folder."""
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def small_world(monkeypatch, tmp_path):
    """An Omniglot of 12 classes, 7 background and 5 evaluation, on a server of this machine."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(archive, "NUM_CLASSES", 12)
    monkeypatch.setattr(archive, "NUM_BACKGROUND", 7)
    monkeypatch.setattr(protocol, "NUM_TRAIN", 8)
    write_zip(site / "images_background.zip", range(1, 8))
    write_zip(site / "images_evaluation.zip", range(8, 13))
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in site.iterdir()}
    monkeypatch.setattr(archive, "ARCHIVES", hashes)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(protocol, "URL", f"http://127.0.0.1:{server.server_port}/")
        yield site
        server.shutdown()


# The protocol


def test_split_never_changes():
    train, test = protocol.split_classes("train"), protocol.split_classes("test")
    assert sorted([*train, *test]) == list(range(1, 1624))
    digest = hashlib.sha256(test.astype(np.int64).tobytes()).hexdigest()
    assert digest[:16] == "5663185322ddd95d"
    with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
        protocol.split_classes("val")


def test_shrinking_averages_the_ink_of_each_area():
    paper = drawing(1, 1)
    # 105 x 105 dots drawn 4 x 4 large are 420 x 420, of which a pixel covers 15 x 15
    large = np.kron(1 - paper.reshape(105, 105), np.ones((4, 4)))
    mean = large.reshape(28, 15, 28, 15).mean(axis=(1, 3))
    shrunk = protocol.shrink(np.packbits(paper)[None])
    assert shrunk.dtype == np.uint8 and shrunk.shape == (1, 28, 28)
    assert np.abs(shrunk[0] - 255 * mean).max() <= 0.51


@pytest.mark.parametrize(("split", "num_classes"), [("train", 4800), ("test", 423)])
def test_real_omniglot(data_folder, monkeypatch, split, num_classes):
    monkeypatch.setenv("BILEVEL_DATA", str(data_folder))
    sampler = omniglot(split, ways=5, shots=1, queries=15)
    assert sampler.num_classes == num_classes
    (x, y), (qx, _) = sampler(jax.random.key(0))
    assert x.shape == (5, 28, 28, 1) and qx.shape == (75, 28, 28, 1) and y.tolist() == [*range(5)]
    assert x.min() == 0 and 0.9 < x.max() <= 1 and 0.03 < x.mean() < 0.2  # thin ink on paper


def test_archive_and_packed_file_agree_bit_for_bit(data_folder):
    small = archive.read(data_folder / "images_background_small1.zip")
    whole = archive.read(data_folder / archive.PACKED)
    assert small.bits.shape == (136, 20, 1379)
    np.testing.assert_array_equal(whole.numbers, np.arange(1, 1624))
    np.testing.assert_array_equal(whole.bits[small.numbers - 1], small.bits)


def test_a_part_of_omniglot_is_split_like_the_whole(data_folder):
    path = data_folder / "images_background_small1.zip"
    train, test = (omniglot(split, 5, 1, 1, data=path) for split in ("train", "test"))
    assert train.num_classes // 4 + test.num_classes == 136
    assert set(np.asarray(test.labels)) <= set(protocol.split_classes("test"))


# Where the data come from


def test_download_leaves_the_packed_file_and_nothing_else(small_world, tmp_path, capsys):
    sampler = omniglot("train", 2, 1, 1, download=True)
    assert sampler.num_classes == 4 * 8
    assert "images_evaluation.zip" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "cache" / "bilevel").iterdir()] == [archive.PACKED]
    for path in small_world.iterdir():
        path.unlink()
    again = omniglot("train", 2, 1, 1)  # from the cache
    np.testing.assert_array_equal(again.images, sampler.images)
    expected = protocol.shrink(np.packbits(drawing(int(again.labels[0]), 1)))
    np.testing.assert_array_equal(again.images[0, ..., 0], expected)


def test_the_three_forms_of_the_data_are_the_same(small_world, tmp_path, monkeypatch):
    zips = omniglot("test", 2, 1, 1, data=small_world)
    monkeypatch.setenv("BILEVEL_DATA", str(small_world))
    np.testing.assert_array_equal(omniglot("test", 2, 1, 1).images, zips.images)
    archive.write_packed(tmp_path / archive.PACKED, protocol._merge(small_world))
    packed = omniglot("test", 2, 1, 1, data=tmp_path / archive.PACKED)
    np.testing.assert_array_equal(packed.images, zips.images)


@pytest.mark.parametrize("content", [b"not what was expected", None])
def test_a_bad_download_is_an_error_and_leaves_nothing(small_world, tmp_path, content):
    if content is None:
        (small_world / "images_evaluation.zip").unlink()  # 404
        error, message = OSError, "could not download .*images_evaluation.zip.*try again"
    else:
        (small_world / "images_evaluation.zip").write_bytes(content)
        error, message = ValueError, "images_evaluation.zip did not send the expected file"
    with pytest.raises(error, match=message):
        omniglot("train", 2, 1, 1, download=True)
    assert list((tmp_path / "cache" / "bilevel").iterdir()) == []


def test_missing_data_are_an_error_that_says_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download=True.*BILEVEL_DATA"):
        omniglot("train", 5, 1, 1)
    with pytest.raises(FileNotFoundError, match=r"no Omniglot at .*nowhere\.npz"):
        omniglot("train", 5, 1, 1, data=tmp_path / "nowhere.npz")
    with pytest.raises(FileNotFoundError, match=r"no Omniglot in folder .*expected omniglot.npz"):
        omniglot("train", 5, 1, 1, data=tmp_path)


# Damaged and hostile files


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        omniglot("train", 2, 1, 1, data=path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 10, 5000, -100])
@pytest.mark.parametrize("name", ["omniglot.npz", "mine.zip"])
def test_truncated_files_are_refused(small_world, tmp_path, name, kept):
    path = tmp_path / name
    archive.write_packed(path, protocol._merge(small_world))
    if name == "mine.zip":
        write_zip(path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, "damaged")


def test_a_flipped_byte_is_noticed(small_world, tmp_path):
    path = write_zip(tmp_path / "mine.zip", [1, 2, 3])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    refused(path, "damaged")


def test_other_npz_files_are_refused(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, images=np.zeros(3))
    refused(path, "no packed Omniglot .*background")
    np.savez(path, background=np.zeros((2, 20, 1379), np.uint8), evaluation=np.zeros(3))
    refused(path, r"`background` as uint8 \[964, 20, 1379\], got uint8 \[2, 20, 1379\]")
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    refused(path, "damaged or no packed Omniglot")


def test_an_official_name_must_have_the_official_hash(tmp_path):
    refused(write_zip(tmp_path / "images_background.zip", [1]), "SHA-256 differs")


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "images/../../evil.png", "..\\evil.png", "C:\\evil.png"]
)
def test_members_that_would_leave_their_folder_are_refused(tmp_path, name):
    folder = tmp_path / "inner"
    folder.mkdir()
    path = write_zip(folder / "mine.zip", [1, 2], [(zipfile.ZipInfo(name), b"evil")])
    refused(path, "not safe to open: .*outside its folder")
    assert not list(tmp_path.rglob("evil*"))


def test_links_are_refused(tmp_path):
    link = zipfile.ZipInfo("images/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = write_zip(tmp_path / "mine.zip", [1, 2], [(link, "/etc")])
    refused(path, "outside its folder")


def test_zip_bombs_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images/0001_01.png", bytes(1 << 21))
    refused(path, "would unpack to 2097152 bytes")
    monkeypatch.setattr(archive, "_LARGEST_ARCHIVE", 1000)
    refused(write_zip(tmp_path / "mine.zip", [1, 2]), r"it would unpack to \d+ bytes")


def test_incomplete_and_wrong_drawings_are_refused(tmp_path):
    one_more = [("images/0003_01.png", png(drawing(3, 1)))]
    refused(write_zip(tmp_path / "few.zip", [1, 2], one_more), "got 41 of 3 classes")
    refused(write_zip(tmp_path / "none.zip", []), "got 0 of 0 classes")
    refused(write_zip(tmp_path / "high.zip", [1624]), "named like 0001_01.png")
    not_png = [(f"images/0003_{drawer:02d}.png", b"GIF89a") for drawer in range(1, 21)]
    refused(write_zip(tmp_path / "gif.zip", [1, 2], not_png), "damaged drawing 0003_01.png")
    buffer = io.BytesIO()
    Image.new("1", (10, 10)).save(buffer, "PNG")
    tiny = [(f"images/0003_{drawer:02d}.png", buffer.getvalue()) for drawer in range(1, 21)]
    refused(write_zip(tmp_path / "tiny.zip", [1, 2], tiny), "10 x 10 pixels, not 105 x 105")


def test_missing_pillow_is_named(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "mine.zip", [1, 2])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install bilevel\[cli\]"):
        omniglot("train", 2, 1, 1, data=path)
