"""Picture files as arrays, all of one size. The only module of data conversion that needs Pillow."""

import io
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

Fit = Literal["stretch", "crop"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel at most


def decode(content: bytes, name: str) -> np.ndarray:
    """A picture file as an array.

    Args:
        content: the file's bytes: PNG, JPEG, BMP, GIF, WebP, PPM or TIFF.
        name: what to call it in an error.

    Returns:
        uint8 [H, W] for black and white or grey pictures, else [H, W, 3], red first; transparency is dropped.

    Raises:
        ValueError: when it is damaged, too large, or has more than 8 bits a channel.
        ImportError: when Pillow is missing.
    """
    Image = _pillow()
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} is a damaged picture or none ({first}); get it again or remove it"
        ) from error
    return _array(image, name)


def as_array(picture: Any, name: str) -> np.ndarray:
    """An array, a Pillow image, or the bytes of a picture file as uint8 [H, W] or [H, W, C]."""
    if isinstance(picture, bytes):
        return decode(picture, name)
    if hasattr(picture, "convert") and hasattr(picture, "mode"):
        return _array(picture, name)
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(
            f"{name} must be a picture uint8 [H, W] or [H, W, C], got {array.dtype} {list(array.shape)}"
        )
    return array


def fit_size(picture: np.ndarray, size: int | None, fit: Fit) -> np.ndarray:
    """The picture as `size` x `size`, by the Lanczos filter; as it is for None.

    Args:
        picture: uint8 [H, W, C].
        size: side of the result.
        fit: "stretch" changes the proportions, as the usual 84 x 84 of mini-ImageNet does; "crop" scales the
            shorter side to `size` and keeps the middle of the longer one.
    """
    height, width = picture.shape[:2]
    if size is None or (height, width) == (size, size):
        return picture
    Image = _pillow()
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        picture = picture[top : top + side, left : left + side]
    channels = [
        np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.LANCZOS))
        for channel in np.moveaxis(picture, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def with_channels(picture: np.ndarray, channels: int | None) -> np.ndarray:
    """uint8 [H, W] or [H, W, C] as [H, W, channels]; as many as it has for None.

    Grey becomes colour by repeating it, colour becomes grey by the weights of ITU-R 601.
    """
    picture = picture[..., None] if picture.ndim == 2 else picture
    if channels is None or picture.shape[2] == channels:
        return picture
    if picture.shape[2] == 1 and channels == 3:
        return np.repeat(picture, 3, axis=2)
    if picture.shape[2] == 3 and channels == 1:
        grey = picture @ np.array([0.299, 0.587, 0.114])
        return np.rint(grey).astype(np.uint8)[..., None]
    raise ValueError(f"a picture of {picture.shape[2]} channels cannot become one of {channels}; use 1 or 3")


def check_layout(size: int | None, fit: str, channels: int | None) -> None:
    """Refuse what no picture can become, before any is read."""
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be one of {', '.join(get_args(Fit))}, got {fit!r}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, or left out, got {channels}")


def is_picture(path: Path) -> bool:
    """Whether the name is one of a picture; hidden files are none."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _array(image: Any, name: str) -> np.ndarray:
    if image.mode not in _MODES:
        raise ValueError(
            f"{name} has pixels of mode {image.mode}, more than 8 bits a channel; convert it to 8 bits"
        )
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading or scaling pictures needs Pillow: pip install bilevel[cli]") from error
    return Image
