"""`convert` of the pickles and archives of the published benchmarks."""

import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from convert_tools import BY_SPLIT, COUNTS, assert_holds, picture, save, stacked
from PIL import Image

from bilevel.tasks import benchmarks, cifar
from bilevel.tasks.convert import convert

pytest_plugins = ("convert_tools",)  # its fixtures: by_class, by_split, out

# Pickles and archives of benchmarks


def dump(path, value, protocol=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol))


def test_mini_imagenet_cache(tmp_path, out):
    for split, names in BY_SPLIT.items():
        places = {name: list(range(3 * n, 3 * n + 3)) for n, name in enumerate(names)}
        value = {"image_data": stacked(names), "class_dict": places}
        dump(tmp_path / "data" / f"mini-imagenet-cache-{split}.pkl", value)
    with pytest.raises(ValueError, match=r"64 classes and 38400 pictures in train, got 2 and 6; .*--partial"):
        convert(tmp_path / "data", out)
    assert convert(tmp_path / "data", out, partial=True).counts() == COUNTS
    assert_holds(out)
    read = json.loads((out / "classes.json").read_text())["read"]
    path = tmp_path / "data" / "mini-imagenet-cache-val.pkl"
    assert read[f"validation: {path.name}"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "form",
    [
        "CIFAR_FS_{}.pickle",
        "FC100_{}.pickle",
        "mini_imagenet_{}.pickle",
        "miniImageNet_category_split_{}.pickle",
    ],
)
@pytest.mark.parametrize("kind", ["array", "rows", "png"])
def test_pickles_of_data_and_labels(tmp_path, out, form, kind):
    for split, names in BY_SPLIT.items():
        shape = (32, 32, 3) if kind == "rows" else (8, 8, 3)
        data = stacked(names, shape)
        if kind == "rows":  # as CIFAR has them: channels first, flat
            data = data.transpose(0, 3, 1, 2).reshape(len(data), -1)
        if kind == "png":
            data = [encoded(p) for p in data]
        phase = "train_phase_train" if "category" in form and split == "train" else split
        path = tmp_path / "data" / form.format(phase)
        dump(path, {"data": data, "labels": [label for label in range(len(names)) for _ in range(3)]})
        if phase != split:  # other pictures of the same classes, which are no split
            dump(path.with_name(form.format("train_phase_val")), {"data": data, "labels": []})
    opened = convert(tmp_path / "data", out, partial=True)
    assert opened.names == ("train/0", "train/1", "validation/0", "test/0", "test/1")
    assert_holds(out, shape=shape, named=False)


def encoded(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "must hold a dict, got list"),
        ({"x": 1}, "must hold image_data and class_dict, or data and labels, got"),
        ({"data": np.zeros((3, 4, 4, 3), np.uint8), "labels": [0]}, "has 3 pictures and 1 labels"),
        (
            {"image_data": np.zeros((3, 4, 4, 3), np.uint8), "class_dict": {"a": [0]}},
            "2 pictures are in no class",
        ),
        (
            {"image_data": np.zeros((1, 4, 4, 3), np.uint8), "class_dict": {"a": [5]}},
            "not there or another's",
        ),
        ({"data": np.zeros((1, 4, 4, 3)), "labels": [0]}, "must be a picture uint8"),
        ({"data": [b"\x89PNG\r\n\x1a\n cut"], "labels": [0]}, "class train/0.* is a damaged picture"),
    ],
)
def test_wrong_pickles_are_told(tmp_path, out, value, message):
    dump(tmp_path / "data" / "FC100_train.pickle", value)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "data", out, partial=True)


class Evil:
    def __reduce__(self):
        return print, ("it ran",)


def test_a_malicious_pickle_is_refused(tmp_path, out, capsys):
    dump(tmp_path / "data" / "FC100_train.pickle", {"data": Evil(), "labels": [0]})
    with pytest.raises(ValueError, match=r"FC100_train.pickle is not plain data: it asks for .*print"):
        convert(tmp_path / "data", out)
    assert "it ran" not in capsys.readouterr().out and not out.exists()


@pytest.mark.parametrize("kind", ["png", "opencv", "npz"])
def test_tiered_imagenet(tmp_path, out, kind):
    root = tmp_path / "data"
    for split, names in BY_SPLIT.items():
        data = stacked(names)
        if kind == "npz":
            root.mkdir(exist_ok=True)
            np.savez(root / f"{split}_images.npz", images=data)
        else:
            files = [encoded(p) for p in data]
            if kind == "opencv":  # arrays [n, 1], as cv2.imencode makes them
                files = [np.frombuffer(f, np.uint8)[:, None] for f in files]
            dump(root / f"{split}_images_png.pkl", files)
        labels = np.repeat(np.arange(len(names)), 3)
        dump(root / f"{split}_labels.pkl", {"label_specific": labels, "label_specific_str": names})
    with pytest.raises(ValueError, match="351 classes and 448695 pictures"):
        convert(root, out)
    convert(root, out, partial=True)
    assert_holds(out)
    (root / "val_labels.pkl").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_labels.pkl"):
        convert(root, tmp_path / "b", partial=True)


def test_a_png_as_long_as_a_row_of_cifar_is_still_a_png(tmp_path, out):
    for split, names in BY_SPLIT.items():
        files = [encoded(p).ljust(3072, b"\0") for p in stacked(names)]
        dump(
            tmp_path / "data" / f"{split}_images_png.pkl",
            [np.frombuffer(f, np.uint8)[:, None] for f in files],
        )
        labels = {"label_specific": np.repeat(np.arange(len(names)), 3), "label_specific_str": names}
        dump(tmp_path / "data" / f"{split}_labels.pkl", labels)
    convert(tmp_path / "data", out, partial=True)
    assert_holds(out)


FINE = [*cifar._CIFAR_FS["validation"].split()[:2], *cifar._CIFAR_FS["test"].split()[:2], "apple"]
COARSE = ["aquatic_mammals", "large_carnivores", "insects", "trees", "flowers"]


def cifar_100(root):
    """5 classes in 5 superclasses; two pictures of each in train, one in test."""
    dump(root / "meta", {"fine_label_names": FINE, "coarse_label_names": COARSE})
    for file, which in (("train", [0, 1]), ("test", [2])):
        data = np.stack([picture(name, i, (32, 32, 3)) for name in FINE for i in which])
        labels = [label for label in range(5) for _ in which]
        rows = data.transpose(0, 3, 1, 2).reshape(len(data), -1)
        dump(root / file, {"data": rows, "fine_labels": labels, "coarse_labels": labels, "filenames": []})


@pytest.mark.parametrize(
    ("dataset", "splits"),
    [
        ("cifar-fs", {"train": [4], "validation": [0, 1], "test": [2, 3]}),
        ("fc100", {"train": [3, 4], "validation": [1], "test": [0, 2]}),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_100(tmp_path, out, monkeypatch, dataset, splits, packed):
    root = tmp_path / "cifar-100-python"
    cifar_100(root)
    if packed:
        with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
            archive.add(root, root.name)
        root = tmp_path / "cifar-100-python.tar.gz"
        with pytest.raises(ValueError, match="is not the official file"):
            convert(root, out, dataset=dataset, partial=True)
        monkeypatch.setattr(cifar, "_MD5", hashlib.md5(root.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"must become cifar-fs or fc100 \(--dataset\), got 'auto'"):
        convert(root, out)
    convert(root, out, dataset=dataset, partial=True)
    # The classes of each split come in the order of CIFAR-100's numbers.
    assert_holds(out, {split: [FINE[i] for i in places] for split, places in splits.items()}, (32, 32, 3))


def test_official_lists_have_their_sizes():
    for lists, sizes in ((cifar._CIFAR_FS, (16, 20)), (cifar._FC100, (4, 4))):
        members = [lists[split].split() for split in ("validation", "test")]
        assert tuple(map(len, members)) == sizes
        assert len(set(members[0]) | set(members[1])) == sum(sizes)
    for name, parts in benchmarks.SIZES.items():
        expected = {"tiered-imagenet": 608, "cub": 200}.get(name, 100)
        assert sum(classes for classes, _ in parts) == expected


def test_cub(tmp_path, out):
    root = tmp_path / "CUB_200_2011"
    names = [f"{n:03d}.bird_{n}" for n in range(1, 9)]
    lines = {
        "images": [],
        "image_class_labels": [],
        "classes": [f"{n} {name}" for n, name in enumerate(names, 1)],
    }
    number = 0
    for n, name in enumerate(names, 1):
        for i in range(3):
            number += 1
            save(root / "images" / name / f"{i}.png", picture(name, i))
            lines["images"].append(f"{number} {name}/{i}.png")
            lines["image_class_labels"].append(f"{number} {n}")
    for name, rows in lines.items():
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="cub has 100 classes in train, got 4"):
        convert(root, out)
    convert(root, out, partial=True)
    assert_holds(out, {"train": names[::2], "validation": names[1::4], "test": names[3::4]})
    (root / "image_class_labels.txt").write_text("\n".join(lines["image_class_labels"][:-1]))
    with pytest.raises(ValueError, match=r"images.txt lists 24 pictures, image_class_labels.txt 23"):
        convert(root, out, partial=True, replace=True)
    assert_holds(out, {"train": names[::2]})  # what was there stayed
