"""Turns raw images into a model's input: float32 pixels of its size and number of channels, normalised for it.

A raw image is the path of a file, the file's bytes, the Hub's `{"bytes": ..., "path": ...}`, an image of PIL, or uint8
pixels `[height, width, channels]` or `[channels, height, width]`. It is read when a step needs it. The arithmetic
equals transformers' `ViTImageProcessorPil`.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from llmquest_rl.data.rows import DataError, RawImage
from llmquest_rl.types import ImageFormat

PREPROCESSOR = "preprocessor_config.json"
"""The file of a model folder with the settings for normalising images."""
MODES = {1: "L", 3: "RGB"}
"""PIL's name of an image mode by the number of channels: grey, or red, green and blue."""
DEEP_MODES = ("I", "F")
"""First letters of PIL's modes with more than 8 bits per channel; a conversion would clip their values."""
CHANNELS_OF_ARRAYS = (1, 3, 4)


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Turns raw images into a model's input. Make one with `image_reader`."""

    format: ImageFormat
    mean: tuple[float, ...]
    """Mean of each channel, subtracted after rescaling."""
    std: tuple[float, ...]
    """Standard deviation of each channel; the divisor."""
    rescale: float = 1 / 255
    """Factor for the pixels' values 0 to 255."""
    resample: int = int(Image.Resampling.BILINEAR)
    """PIL's number of the filter for resizing."""

    def read(self, images: Sequence[RawImage]) -> NDArray[np.float32]:
        """Read images: `[n, channels, height, width]`.

        Raises:
            DataError: a file is missing or is not an image; the message names it and the reason.
        """
        shape = self.format
        out = np.empty((len(images), shape.channels, shape.height, shape.width), np.float32)
        for i, image in enumerate(images):
            out[i] = self._pixels(open_image(image))
        return out

    def _pixels(self, image: Image.Image) -> NDArray[np.float32]:
        """The normalised pixels `[channels, height, width]`."""
        shape = self.format
        sized = image.convert(MODES[shape.channels]).resize(
            (shape.width, shape.height), Image.Resampling(self.resample)
        )
        pixels = np.asarray(sized).reshape(shape.height, shape.width, shape.channels)
        scaled = (pixels.astype(np.float64) * self.rescale).astype(np.float32)
        mean, std = np.array([self.mean, self.std], dtype=np.float32)
        normal: NDArray[np.float32] = (scaled - mean) / std
        return normal.transpose(2, 0, 1)


def image_reader(folder: Path, format: ImageFormat) -> ImageReader:
    """The reader for a model's folder. `preprocessor_config.json` gives the normalisation, the model gives the size.

    Without that file mean and standard deviation are 0.5, as in the Vision Transformers of the Hub.

    Raises:
        DataError: the file is damaged, or asks for a step that is not implemented; the message names it.
    """
    if format.channels not in MODES:
        raise DataError(f"{folder} reads images of {format.channels} channels: expected one of {sorted(MODES)}")
    file = folder / PREPROCESSOR
    values = _read_json(file) if file.is_file() else {}
    for field in ("do_center_crop", "do_pad"):
        if values.get(field):
            raise DataError(f"{file} asks for {field}, but images are only resized: set it to false")
    normalize = values.get("do_normalize", True)
    mean = _by_channel(file, "image_mean", values.get("image_mean", 0.5) if normalize else 0.0, format.channels)
    std = _by_channel(file, "image_std", values.get("image_std", 0.5) if normalize else 1.0, format.channels)
    if 0.0 in std:
        raise DataError(f"{file}: image_std holds 0, but it is a divisor")
    rescale = float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 1.0
    resample = values.get("resample", int(Image.Resampling.BILINEAR))
    if resample not in list(Image.Resampling):
        raise DataError(f"{file} has resample {resample!r}: expected one of PIL's numbers 0 to 5")
    return ImageReader(format, mean, std, rescale, int(resample))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values


def _by_channel(file: Path, field: str, value: Any, channels: int) -> tuple[float, ...]:
    values = tuple(map(float, value)) if isinstance(value, list) else (float(value),) * channels
    if len(values) != channels:
        raise DataError(f"{file} has {len(values)} numbers in {field}, but the model reads {channels} channels")
    return values


def open_image(image: RawImage) -> Image.Image:
    """Decode an image and turn it upright, as the orientation in its EXIF data says.

    Raises:
        DataError: see `ImageReader.read`.
    """
    try:
        opened = _opened(image)
        opened.load()
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError, TypeError) as error:
        raise DataError(f"{image_name(image)}: not a readable image: {error}") from error
    if opened.mode.startswith(DEEP_MODES):
        raise DataError(f"{image_name(image)} has more than 8 bits per channel: convert it to 8 bits first")
    return opened if isinstance(image, Image.Image) else ImageOps.exif_transpose(opened)


def _opened(image: RawImage) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return Image.open(image)
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image))
    if isinstance(image, Mapping):
        return _opened(image["path"] if image.get("bytes") is None else image["bytes"])
    if isinstance(image, np.ndarray):
        return Image.fromarray(_channels_last(image))
    raise TypeError(
        f"a {type(image).__name__} is not an image: expected a path, bytes, a dict of either, a PIL image or an array"
    )


def _channels_last(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, 0 to 255, not {pixels.dtype}")
    if pixels.ndim == 3 and pixels.shape[-1] not in CHANNELS_OF_ARRAYS and pixels.shape[0] in CHANNELS_OF_ARRAYS:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[-1] not in CHANNELS_OF_ARRAYS):
        raise ValueError(f"pixels have shape {list(pixels.shape)}, expected height, width and 1, 3 or 4 channels")
    return np.ascontiguousarray(pixels)


def check_images(images: Iterable[RawImage]) -> str | None:
    """The reason why one of several raw images is unusable, or None. Only the header of a file is read."""
    return next((problem for image in images if (problem := _problem(image))), None)


def _problem(image: RawImage) -> str | None:
    try:
        opened = _opened(image)
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError, TypeError, KeyError) as error:
        return f"{image_name(image)}: not a readable image: {error}"
    if not isinstance(image, Image.Image):
        opened.close()
    return None


def image_name(image: RawImage) -> str:
    """The name of a raw image in messages."""
    if isinstance(image, Mapping) and image.get("path"):
        image = image["path"]
    return str(image) if isinstance(image, str | Path) else f"an image ({type(image).__name__})"


def image_list(value: Any, folder: Path | None = None) -> tuple[RawImage, ...]:
    """The raw images in a column's value: none, one or several. Relative paths start at `folder`."""
    is_empty = value is None or (isinstance(value, str) and not value)
    listed: Iterable[Any] = () if is_empty else value if isinstance(value, list | tuple) else (value,)
    return tuple(_placed(image, folder) for image in listed)


def _placed(image: RawImage, folder: Path | None) -> RawImage:
    if folder is None:
        return image
    if isinstance(image, str | Path):
        return str(folder / Path(image).expanduser())
    if isinstance(image, Mapping) and image.get("bytes") is None and image.get("path"):
        return str(folder / Path(image["path"]).expanduser())
    return image
