"""The stored format, the reader of pickles, and picture files."""

import json
import os
import pickle

import jax
import numpy as np
import pytest

from bilevel.tasks.pickles import read_pickle
from bilevel.tasks.pictures import as_array, decode, fit_size, with_channels
from bilevel.tasks.stored import load, open_stored, stored
from bilevel.tasks.storing import Examples, write_stored


def example_set(shape=(6, 5, 3)):
    """11 pictures of 4 classes, neither in order of their splits nor of their classes."""
    labels = np.array([2, 0, 1, 3, 0, 2, 1, 1, 3, 0, 2])
    pictures = np.random.default_rng(0).integers(0, 256, (len(labels), *shape), np.uint8)
    names, splits = ["ant", "bee", "cat", "dog"], ["test", "train", "validation", "train"]
    return Examples(labels, names, splits, lambda i: pictures[i], "a test"), pictures


@pytest.fixture
def folder(tmp_path):
    examples, _ = example_set()
    write_stored(tmp_path / "set", examples)
    return tmp_path / "set"


def test_what_is_stored_comes_back_by_split_and_class(folder):
    examples, pictures = example_set()
    opened = open_stored(folder, verify=True)
    assert opened.names == ("bee", "dog", "cat", "ant")
    assert opened.counts() == {"train": (2, 5), "validation": (1, 3), "test": (1, 3)}
    assert opened.image_shape == (6, 5, 3)
    seen = 0
    for split in ("train", "validation", "test"):
        images, labels = load(folder, split)
        assert isinstance(images, np.memmap)  # nothing was copied
        for label in np.unique(labels):
            number = examples.names.index(opened.names[label])
            assert examples.splits[number] == split
            np.testing.assert_array_equal(images[labels == label], pictures[examples.labels == number])
        seen += len(images)
    assert seen == len(pictures)


def test_storing_twice_gives_the_same_bytes(folder, tmp_path):
    write_stored(tmp_path / "again", example_set()[0])
    for name in os.listdir(folder):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_sampler_draws_from_one_split(folder):
    images, _ = load(folder, "train")
    task = stored("train", 2, 1, 1, folder)(jax.random.key(0))
    assert task.support[0].shape == (2, 6, 5, 3)
    allowed = {picture.tobytes() for picture in images}
    drawn = np.rint(255 * np.concatenate([task.support[0], task.query[0]])).astype(np.uint8)
    assert len({p.tobytes() for p in drawn} & allowed) == 4
    with pytest.raises(ValueError, match="one of train, validation, test, got 'tset'"):
        stored("tset", 2, 1, 1, folder)


def test_a_failure_leaves_nothing_behind(tmp_path):
    examples, pictures = example_set()

    def picture(i):
        if i == 3:
            raise ValueError("broken")
        return pictures[i]

    broken = Examples(examples.labels, examples.names, examples.splits, picture, "a test")
    with pytest.raises(ValueError, match="broken"):
        write_stored(tmp_path / "set", broken)
    assert not list(tmp_path.iterdir())


def test_progress_is_told(tmp_path):
    told = []
    write_stored(
        tmp_path / "set", example_set()[0], on_progress=lambda done, total: told.append((done, total))
    )
    assert told == [(0, 11)]
    assert "train: 2 classes, 5 pictures of 6 x 5 x 3\n" in open_stored(tmp_path / "set").summary()


def test_an_existing_folder_is_replaced_only_when_asked_and_stored(folder, tmp_path):
    with pytest.raises(FileExistsError, match="take another folder"):
        write_stored(folder, example_set()[0])
    write_stored(folder, example_set((4, 4, 1))[0], replace=True)
    assert open_stored(folder).image_shape == (4, 4, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError):
        write_stored(folder, example_set()[0], replace=True)
    assert (folder / "thesis.tex").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def objects(path):
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)


def edit(**changes):
    def damage(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("images.npy", cut, "images.npy is damaged or cut off"),
        ("labels.npy", cut, "labels.npy is damaged or cut off"),
        ("labels.npy", flip, "labels.npy is not what was stored"),
        ("images.npy", objects, "images.npy is damaged or cut off .*Python objects"),
        ("images.npy", lambda p: np.save(p, np.zeros((11, 6, 5, 3))), "must hold uint8 .* got float64"),
        (
            "images.npy",
            lambda p: np.save(p, np.zeros((10, 6, 5, 3), np.uint8)),
            "images.npy 10; make it again",
        ),
        ("images.npy", lambda p: p.unlink(), "no .*images.npy, though"),
        ("classes.json", lambda p: p.unlink(), "half-written or something else"),
        ("classes.json", cut, "classes.json is damaged"),
        ("classes.json", edit(version=2), "has version 2, this bilevel reads 1"),
        ("classes.json", edit(classes=[]), "classes.json is damaged"),
        (
            "classes.json",
            edit(classes=[{"name": "a", "split": "train", "count": 11}]),
            "does not fit together",
        ),
    ],
)
def test_damage_is_told(folder, file, damage, message):
    damage(folder / file)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_stored(folder)


def test_damage_within_pictures_is_found_when_asked(folder):
    flip(folder / "images.npy")
    open_stored(folder)
    with pytest.raises(ValueError, match=r"images.npy is not what was stored"):
        open_stored(folder, verify=True)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder; make it again with `bilevel convert`"):
        open_stored(tmp_path / "nowhere")


# Pickles


def dump(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


ARRAYS = {
    "bytes": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "columns": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    "big-endian": np.arange(3, dtype=">f4"),
    "text": np.array(["a", "long name"]),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_plain_data_are_read(tmp_path, protocol):
    value = {
        **ARRAYS,
        "scalar": np.int64(7),
        "nested": {"list": [1, "two", b"three", None, 4.5, True], "tuple": (np.arange(2), [np.arange(3)])},
        "objects": np.array([np.arange(2), "x", None], dtype=object),
    }
    got = read_pickle(dump(tmp_path / "x.pkl", value, protocol))
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype
    assert got["scalar"] == 7
    assert got["nested"]["list"] == value["nested"]["list"]
    np.testing.assert_array_equal(got["nested"]["tuple"][0], [0, 1])
    np.testing.assert_array_equal(got["nested"]["tuple"][1][0], [0, 1, 2])
    assert got["objects"][1:] == ["x", None] and got["objects"][0].tolist() == [0, 1]


def test_old_spellings_are_read(tmp_path):
    """NumPy before 2 and Python 2 name the same things otherwise, and Python 2 writes bytes as text."""
    content = pickle.dumps({"data": np.arange(200, dtype=np.uint8)}, 2)
    assert b"numpy._core.multiarray" in content
    (tmp_path / "numpy1.pkl").write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    # As Python 2 pickles numpy.array([1, 200], "u1"): its content is a str, read as latin-1.
    python2 = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nq\x03U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x02\x01\xc8tb."
    )
    (tmp_path / "python2.pkl").write_bytes(python2)
    assert read_pickle(tmp_path / "python2.pkl").tolist() == [1, 200]
    np.testing.assert_array_equal(read_pickle(tmp_path / "numpy1.pkl")["data"], np.arange(200))


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch ran",), "posix.system|nt.system"),
        (eval, ("open('ran', 'w')",), "eval"),
        (getattr, (np, "load"), "getattr|numpy"),
        (np.load, ("ran",), "numpy.load|numpy.lib"),
        (np.frombuffer, (b"abcd",), "numpy"),
    ],
)
def test_a_pickle_that_runs_something_is_refused_by_name(tmp_path, monkeypatch, function, arguments, named):
    monkeypatch.chdir(tmp_path)
    try:
        content = pickle.dumps({"data": Call(function, *arguments)}, 2)
    except (TypeError, pickle.PicklingError):  # a module cannot be pickled: name the function alone
        content = b"\x80\x02cbuiltins\ngetattr\n."
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=f"not plain data: it asks for .*({named})"):
        read_pickle(tmp_path / "x.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # numpy.dtype("O") given the flags of numbers: NumPy would take the eight bytes for a pointer.
        (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x01\x85"
            b"cnumpy\ndtype\nX\x01\x00\x00\x00OK\x00K\x01\x87R(K\x03X\x01\x00\x00\x00|NNN"
            b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89C\x08AAAAAAAAtb.",
            "array of objects",
        ),
        (b"cnumpy\ndtype\nX\x0a\x00\x00\x00O4,i4,i4,i\x85R.", "not of numbers or text"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00xX\x03\x00\x00\x00zip\x86R.", "codec 'zip'"),
        # An attempt to change the reader itself.
        (b"cnumpy.core.multiarray\nscalar\nN}X\x04\x00\x00\x00callK\x01s\x86b.", "changes a function"),
        (b"cnumpy.core.multiarray\n_reconstruct\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "damaged"),
        (b"cbuiltins\ndict\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "asks for builtins.dict"),
        (b"X\x01\x00\x00\x00xQ.", "objects outside itself"),
        (b"}\x94.\x00"[:2], "damaged or no pickle"),
    ],
)
def test_forged_pickles_are_refused(tmp_path, content, message):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + content)
    with pytest.raises(ValueError, match=message):
        read_pickle(tmp_path / "x.pkl")


def test_damaged_pickles_are_told(tmp_path):
    path = dump(tmp_path / "x.pkl", {"data": np.arange(1000)})
    cut(path)
    with pytest.raises(ValueError, match=r"x.pkl is damaged or no pickle"):
        read_pickle(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_pickle(tmp_path / "y.pkl")


def test_shared_parts_are_read_once(tmp_path):
    value = []
    for _ in range(18):
        value = [value, value]  # 2^18 paths through 18 lists
    read_pickle(dump(tmp_path / "x.pkl", value))


# Pictures


def png(array, mode=None, kind="PNG"):
    import io

    from PIL import Image

    out = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(out, kind)
    return out.getvalue()


def test_pictures_are_decoded():
    colour = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    np.testing.assert_array_equal(decode(png(colour), "x"), colour)
    np.testing.assert_array_equal(decode(png(colour[..., 0]), "x"), colour[..., 0])
    assert decode(png(colour, "RGBA"), "x").shape == (5, 4, 3)
    assert decode(png(colour, "P"), "x").shape == (5, 4, 3)
    assert decode(png(colour, kind="JPEG"), "x").shape == (5, 4, 3)


def test_bad_pictures_are_told():
    content = png(np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8))
    with pytest.raises(ValueError, match=r"bird.png is a damaged picture"):
        decode(content[: len(content) // 2], "bird.png")
    with pytest.raises(ValueError, match=r"bird.png is a damaged picture or none"):
        decode(b"<html>not found</html>", "bird.png")
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        decode(png(np.zeros((4, 4), np.uint16)), "x-ray.png")
    with pytest.raises(ValueError, match="must be a picture uint8"):
        as_array(np.zeros((4, 4, 3)), "x")


def test_scaling_stretches_or_crops():
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200  # the middle square; nothing of what is cut off may leak into it
    np.testing.assert_array_equal(fit_size(wide, 4, "crop"), np.full((4, 4, 3), 200, np.uint8))
    stretched = fit_size(wide, 4, "stretch")
    assert stretched.shape == (4, 4, 3) and stretched[0, 0, 0] < 40 and stretched[0, 1, 0] > 160
    assert fit_size(wide, None, "crop") is wide


def test_channels_change_as_asked():
    grey = np.array([[10, 20]], np.uint8)
    assert with_channels(grey, None).shape == (1, 2, 1)
    np.testing.assert_array_equal(with_channels(grey, 3)[0, 1], [20, 20, 20])
    np.testing.assert_array_equal(with_channels(with_channels(grey, 3), 1)[..., 0], grey)
    with pytest.raises(ValueError, match="4 channels cannot become one of 3"):
        with_channels(np.zeros((2, 2, 4), np.uint8), 3)
