"""Labelled images of handwritten digits: those that scikit-learn brings along, or MNIST from its four files."""

from __future__ import annotations

import dataclasses
import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import sklearn.datasets
import sklearn.model_selection

# Magic number: two zero bytes, 8 for "unsigned bytes", and the number of dimensions.
_IMAGES_MAGIC, _LABELS_MAGIC = 0x0803, 0x0801


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Images as float32[rows, pixels] in 0..1, labels as int32[rows] in 0..9."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits(seed: int) -> Data:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, a quarter of each digit kept for testing."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = sklearn.model_selection.train_test_split(
        (images / images.max()).astype(np.float32),
        labels.astype(np.int32),
        test_size=0.25,
        stratify=labels,
        random_state=seed,
    )
    return Data(
        name="scikit-learn's handwritten digits",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )


def load_mnist(directory: Path) -> Data:
    """MNIST from the four IDX files under their usual names, plain or with .gz.

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: a file is not what its name says.
    """
    train_images, train_labels = _read_pair(directory, "train")
    test_images, test_labels = _read_pair(directory, "t10k")
    if train_images.shape[1] != test_images.shape[1]:
        raise ValueError(
            f"training and test images must have as many pixels, but got {train_images.shape[1]} and "
            f"{test_images.shape[1]} in {directory}."
        )
    return Data(
        name="MNIST",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )


def _read_pair(directory: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of one part, "train" or "t10k"."""
    images = _read_idx(directory, f"{part}-images-idx3-ubyte", _IMAGES_MAGIC)
    labels = _read_idx(directory, f"{part}-labels-idx1-ubyte", _LABELS_MAGIC)
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"{directory} must hold one label for each image, but got {len(images)} images and {len(labels)} labels "
            f"under {part}."
        )
    if labels.max() > 9:
        raise ValueError(f"labels must lie in 0..9, but got {labels.max()} under {part} in {directory}.")
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255), labels.astype(np.int32)


def _read_idx(directory: Path, name: str, magic: int) -> np.ndarray:
    """One IDX file: uint8[rows] or uint8[rows, height, width]."""
    path = next((path for path in (directory / name, directory / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{directory} must hold {name} or {name}.gz, but has neither. Download MNIST there.")
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} must be a gzip file, but got: {error}. Download it again.") from error
    header_size = 4 * (1 + (magic & 0xFF))
    if len(content) < header_size or int.from_bytes(content[:4], "big") != magic:
        raise ValueError(f"{path} must be an IDX file, but got one that does not begin with {magic:#010x}.")
    shape = tuple(np.frombuffer(content[4:header_size], ">u4").tolist())
    if len(content) - header_size != math.prod(shape):
        raise ValueError(
            f"{path} must hold {math.prod(shape):,} bytes behind its header, but got {len(content) - header_size:,}. "
            "Download it again."
        )
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)
