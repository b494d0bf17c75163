"""`convert` of class folders, lists and arrays, and what it refuses."""

import csv
import json
import warnings

import numpy as np
import pytest
from convert_tools import BY_SPLIT, COUNTS, NAMES, assert_holds, picture, save, stacked
from PIL import Image

from bilevel.tasks.convert import Layout, convert
from bilevel.tasks.found import read_splits

pytest_plugins = ("convert_tools",)  # its fixtures: by_class, by_split, out

# Folders


def test_folders_by_split(by_split, out):
    assert convert(by_split, out).counts() == COUNTS
    opened = assert_holds(out)
    assert opened.splits == ("train", "train", "validation", "test", "test")
    read = json.loads((out / "classes.json").read_text())["read"]
    assert set(read) == {"train: 6 files", "validation: 3 files", "test: 6 files"}


def splits_as(kind, folder):
    folder.mkdir()
    if kind == "json":
        (folder / "splits.json").write_text(json.dumps(BY_SPLIT))
        return folder / "splits.json"
    for split, names in BY_SPLIT.items():
        if kind == "txt":
            (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
        else:
            rows = [["filename", "label"], *([f"{i}.png", name] for name in names for i in range(3))]
            with (folder / f"{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
    return folder


@pytest.mark.parametrize("kind", ["json", "txt", "csv", "dict"])
def test_folders_with_splits(by_class, out, tmp_path, kind):
    splits = BY_SPLIT if kind == "dict" else splits_as(kind, tmp_path / "splits")
    assert convert(by_class, out, splits=splits).counts() == COUNTS
    assert_holds(out)


def test_splits_by_numbers_divide_the_classes(by_class, out):
    opened = convert(by_class, out, splits="2/1/2")
    assert opened.counts() == COUNTS
    assert sorted(opened.names) == sorted(NAMES)
    assert read_splits("2/1/2", NAMES) == dict(zip(opened.names, opened.splits, strict=True))


def test_classes_that_the_splits_do_not_name_are_left_out(by_class, out):
    assert convert(by_class, out, splits={"train": ["ant"], "test": ["eel"]}).names == ("ant", "eel")
    assert_holds(out, {"train": ["ant"], "test": ["eel"]})


def test_splits_of_pictures_are_not_splits_of_classes(by_split, out):
    """ImageFolder as it is used for ordinary classification has every class in every split."""
    save(by_split / "test" / "ant" / "9.png", picture("ant", 9))
    with pytest.raises(
        ValueError, match="in more than one split: ant; few-shot learning is tested on unseen"
    ):
        convert(by_split, out)
    assert not out.exists()
    opened = convert(by_split, out, splits={"train": ["ant"], "test": ["bee"]})  # both halves of ant together
    assert opened.counts() == {"train": (1, 4), "test": (1, 3)}


def test_folders_without_splits_say_what_to_do(by_class, out):
    with pytest.raises(ValueError, match=r"which split the classes .*ant, bee, cat, dog, eel.*64/16/20"):
        convert(by_class, out)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["ant", "fly"]}, "name classes that are not in .*: fly; it has ant"),
        ({"train": ["ant"], "test": ["ant"]}, "class ant is in two splits, train and test"),
        ({"trian": ["ant"]}, "must be one of train, validation, test, got 'trian'"),
        ({"train": "ant"}, "must list the names"),
        ({}, "the splits are empty"),
        ("4/4/4", "need 12 classes, got 5"),
        ("nowhere", "no splits at nowhere"),
    ],
)
def test_wrong_splits_are_told(by_class, out, splits, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(by_class, out, splits=splits)
    assert not out.exists()


def test_pictures_of_several_sizes_need_one(by_split, out):
    save(by_split / "val" / "cat" / "0.png", picture("cat", 0, (9, 12, 3)))
    with pytest.raises(ValueError, match=r"one shape, got \[8, 8, 3\].*class cat, \[9, 12, 3\]; give size"):
        convert(by_split, out)
    assert convert(by_split, out, Layout(size=6, fit="crop")).image_shape == (6, 6, 3)


def test_grey_among_colour_needs_channels(by_split, out):
    save(by_split / "val" / "cat" / "0.png", picture("cat", 0, (8, 8)))
    with pytest.raises(ValueError, match=r"\[8, 8, 1\].*give size and channels"):
        convert(by_split, out)
    assert convert(by_split, out, Layout(channels=3)).image_shape == (8, 8, 3)
    assert convert(by_split, out, Layout(channels=1), replace=True).image_shape == (8, 8, 1)


def test_a_damaged_picture_is_named(by_split, out):
    path = by_split / "test" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"dog/1.png is a damaged picture"):
        convert(by_split, out)
    assert not out.exists() and not [p for p in out.parent.iterdir() if p.name.startswith(".out")]


def test_files_that_are_no_pictures(by_split, out):
    (by_split / "train" / "ant" / "notes.txt").write_text("mine")
    (by_split / "train" / "ant" / ".DS_Store").write_text("")
    with pytest.warns(UserWarning, match=r"left out 1 files that are no pictures, as .*notes.txt"):
        convert(by_split, out)
    (by_split / "train" / "fly").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*fly has no pictures"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(by_split, out, replace=True)


def test_folders_beside_splits_are_refused(by_split, out):
    save(by_split / "extra" / "0.png", picture("x", 0))
    with pytest.raises(ValueError, match="folders of splits beside others: extra"):
        convert(by_split, out)


# Lists


@pytest.mark.parametrize(("place", "lists"), [("images", "beside"), (".", "apart"), ("images", "apart")])
def test_lists_of_pictures(tmp_path, out, place, lists):
    """The split files of Ravi and Larochelle, with pictures of all classes in one folder."""
    root = tmp_path / "data"
    where = root if lists == "beside" else tmp_path / "lists"
    where.mkdir(exist_ok=True)
    for split, names in BY_SPLIT.items():
        rows = [["filename", "label"]]
        for name in names:
            for i in range(3):
                save(root / place / f"{name}{i}.png", picture(name, i))
                rows.append([f"{name}{i}.png", name])
        where.mkdir(exist_ok=True)
        with (where / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    assert convert(root, out, splits=None if lists == "beside" else where).counts() == COUNTS
    assert_holds(out)
    with pytest.raises(
        ValueError, match="mini-imagenet has 64 classes and 38400 pictures in train, got 2 and 6"
    ):
        convert(root, tmp_path / "b", dataset="mini-imagenet", splits=None if lists == "beside" else where)
    (root / place / "dog1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"test.csv names dog1.png of class dog, which is not in"):
        convert(root, tmp_path / "b", splits=None if lists == "beside" else where)


def test_lists_of_pictures_in_folders_of_their_classes(tmp_path, out):
    root = tmp_path / "data"
    for split, names in BY_SPLIT.items():
        lines = "".join(f"{name}{i}.png,{name}\n" for name in names for i in range(3))
        for name in names:
            for i in range(3):
                save(root / "images" / name / f"{name}{i}.png", picture(name, i))
        (root / f"{split}.csv").write_text("\ufefffilename,label\n" + lines, encoding="utf-8")
    convert(root, out)
    assert_holds(out)


@pytest.mark.parametrize("every_class_named", [True, False])
def test_lists_of_json_name_paths_of_another_machine(tmp_path, out, every_class_named):
    """As the code of "A closer look at few-shot classification" leaves them."""
    root = tmp_path / "filelists" / "CUB"
    label = 0
    for split, names in (("base", BY_SPLIT["train"]), ("val", BY_SPLIT["val"]), ("novel", BY_SPLIT["test"])):
        lists = {
            "label_names": list(NAMES) if every_class_named else names,
            "image_names": [],
            "image_labels": [],
        }
        for name in names:
            for i in range(3):
                save(root / "CUB_200_2011" / "images" / name / f"{i}.png", picture(name, i))
                lists["image_names"].append(f"/home/they/filelists/CUB/CUB_200_2011/images/{name}/{i}.png")
                lists["image_labels"].append(label)
            label += 1
        (root / f"{split}.json").write_text(json.dumps(lists))
    assert convert(root, out).counts() == COUNTS
    assert_holds(out)
    (root / "CUB_200_2011" / "images" / "dog" / "1.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"novel.json names /home/they/.*dog/1.png, and no end of that"
    ):
        convert(root, tmp_path / "b")
    (root / "base.json").write_text('{"image_names": ["x"], "image_labels": []}')
    with pytest.raises(
        ValueError, match=r"base.json must hold image_names and image_labels .*1 image_names and 0"
    ):
        convert(root, tmp_path / "b")


def test_cifar_fs_as_it_was_published(tmp_path, out):
    root = tmp_path / "cifar100"
    (root / "splits" / "bertinetto").mkdir(parents=True)
    for split, names in BY_SPLIT.items():
        (root / "splits" / "bertinetto" / f"{split}.txt").write_text("".join(f"{n}\n" for n in names))
        for name in names:
            for i in range(3):
                save(root / "data" / name / f"{i}.png", picture(name, i))
    with pytest.raises(ValueError, match="cifar-fs has 64 classes and 38400 pictures in train, got 2 and 6"):
        convert(root, out)
    assert convert(root, out, partial=True).counts() == COUNTS
    assert_holds(out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\na.png,ant\n", "must have columns filename and label"),
        ("filename,label\na.png\n", "line 2 must have a filename and a label"),
        ("filename,label\n", "must have columns filename and label and a row"),
        ("filename,label\n../../secret.png,ant\n", "outside of its folder"),
    ],
)
def test_damaged_lists_are_told(tmp_path, out, text, message):
    root = tmp_path / "x" / "data"
    save(root / "a.png", picture("ant", 0))
    save(tmp_path / "secret.png", picture("ant", 0))
    (root / "train.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        convert(root, out)


# Objects in memory, saved or not


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_damaged_npz_is_told(tmp_path, out, share):
    path = tmp_path / "c.npz"
    np.savez_compressed(path, images=stacked(NAMES), labels=np.repeat(NAMES, 3))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"c.npz is damaged or no .npz of plain arrays .* get it again"):
        convert(path, out, splits=BY_SPLIT)


def test_arrays(tmp_path, out):
    images, labels = stacked(NAMES), np.repeat(NAMES, 3)
    assert convert((images, labels), out, splits=BY_SPLIT).counts() == COUNTS
    assert_holds(out)
    pairs = {s: (stacked(names), np.repeat(names, 3)) for s, names in BY_SPLIT.items()}
    assert convert(pairs, tmp_path / "b").counts() == COUNTS
    assert_holds(tmp_path / "b")
    np.savez(tmp_path / "c.npz", images=images, labels=labels)
    convert(tmp_path / "c.npz", tmp_path / "c", splits=BY_SPLIT)
    assert_holds(tmp_path / "c")
    each = {
        f"{s}_{w}": a for s, pair in pairs.items() for w, a in zip(("images", "labels"), pair, strict=True)
    }
    np.savez(tmp_path / "d.npz", **each)  # type: ignore[arg-type]
    convert(tmp_path / "d.npz", tmp_path / "d")
    assert_holds(tmp_path / "d")


def test_numbers_that_come_in_two_splits_are_refused(tmp_path, out):
    """As in MNIST, where train and test have the same ten classes."""
    parts = {"train": (stacked(NAMES), np.arange(15) // 3), "test": (stacked(NAMES), np.arange(15) // 3)}
    with pytest.raises(ValueError, match=r"in more than one split: 0, 1, 2, 3, 4; .* anew, give them names"):
        convert(parts, out)
    splits = {"train": ["0", "1"], "test": ["2", "3", "4"]}
    assert convert(parts, out, splits=splits).counts() == {"train": (2, 12), "test": (3, 18)}


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((3, 4, 4, 3)), np.arange(3)),
        (np.zeros((3, 4, 4, 3), np.uint8), np.arange(2)),
        (np.zeros((3, 48), np.uint8), np.arange(3)),
    ],
)
def test_wrong_arrays_are_told(out, images, labels):
    with pytest.raises(ValueError, match="arrays must be images uint8"):
        convert((images, labels), out, splits="1/1/1")


class ClassLabel:
    def __init__(self, names):
        self.names = names


class Image_:  # stands for datasets.Image
    pass


Image_.__name__ = "Image"


class Columns:
    """What `convert` reads of a `datasets.Dataset`."""

    def __init__(self, rows, more=()):
        self.features = {"image": Image_(), "label": ClassLabel(NAMES)} | {c: ClassLabel(NAMES) for c in more}
        self.column_names = list(self.features)
        self.rows = [{"image": p, "label": NAMES.index(n)} | {c: 0 for c in more} for n, p in rows]

    def __getitem__(self, at):
        return [row[at] for row in self.rows] if isinstance(at, str) else self.rows[at]


def rows(names):
    return [(name, Image.fromarray(picture(name, i))) for name in names for i in range(3)]


def test_hugging_face_objects(tmp_path, out):
    convert(Columns(rows(NAMES)), out, splits=BY_SPLIT)
    assert_holds(out)
    with pytest.raises(ValueError, match=r"one of labels are needed, got .*'label', 'coarse'.*pass label="):
        convert(Columns(rows(NAMES), ["coarse"]), tmp_path / "b", splits=BY_SPLIT)
    convert(Columns(rows(NAMES), ["coarse"]), tmp_path / "b", splits=BY_SPLIT, label="label")
    assert_holds(tmp_path / "b")


def test_hugging_face_library(tmp_path, out):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    parts = {
        split: datasets.Dataset.from_dict(
            {"image": [p for _, p in rows(names)], "label": [n for n, _ in rows(names)]}, features=features
        )
        for split, names in BY_SPLIT.items()
    }
    data = datasets.DatasetDict(parts)
    assert convert(data, out).counts() == COUNTS
    assert_holds(out)
    data.save_to_disk(str(tmp_path / "saved"))
    convert(tmp_path / "saved", tmp_path / "b")
    assert_holds(tmp_path / "b")
    (tmp_path / "saved" / "train" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="damaged Hugging Face data set"):
        convert(tmp_path / "saved", tmp_path / "c")


# Anything else


def test_what_is_not_known_is_told(tmp_path, out):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nothing in .*empty is known: expected folders of classes"):
        convert(tmp_path / "empty", out)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        convert(tmp_path / "nowhere", out)
    (tmp_path / "x.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x.pkl is not a file that can be converted: give an .npz"):
        convert(tmp_path / "x.pkl", out)
    with pytest.raises(ValueError, match="dataset must be one of auto, mini-imagenet"):
        convert(tmp_path / "empty", out, dataset="imagenet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fit must be one of stretch, crop"):
        Layout(fit="squash")  # type: ignore[arg-type]


def test_nothing_is_read_when_the_folder_is_taken(by_split, out):
    out.mkdir()
    with pytest.raises(FileExistsError, match="take another folder"):
        convert(by_split, out)
