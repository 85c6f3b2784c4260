#!/usr/bin/env python3
"""Fashion-MNIST (arXiv 1708.07747, MIT licence) as parquet files, from its four `*-ubyte.gz` files.

    python tools/make_fashion_parquet.py FOLDER_WITH_GZ OUT                          all 60,000 + 10,000 images
    python tools/make_fashion_parquet.py FOLDER_WITH_GZ OUT --train 10000 --test 2000   what is embedded in the package

The `.gz` files come from https://github.com/zalandoresearch/fashion-mnist, or from Debian's package
`dataset-fashion-mnist`, which puts them into /usr/share/datasets/fashion-mnist. A smaller set takes the first images
of each class, the same number of each, and keeps the original order: no random choice that a rebuild could miss.
"""

from __future__ import annotations

import argparse
import gzip
import io
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

CLASSES = ["t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
FILES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """An array of uint8 in the IDX format: [0, 0, 8, dimensions], big-endian sizes, data."""
    with gzip.open(path) as file:
        content = file.read()
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes")
    dimensions = content[3]
    sizes = np.frombuffer(content, ">u4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes.tolist())


def first_of_each_class(labels: np.ndarray, images: int) -> np.ndarray:
    """Ascending positions of `images` images, equally many of each class."""
    share, rest = divmod(images, len(CLASSES))
    if rest or not 0 < share <= np.bincount(labels).min():
        raise ValueError(f"{images} images: the number has to be a multiple of {len(CLASSES)}, at most {len(labels)}")
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:share] for label in range(len(CLASSES))]))


def png(pixels: np.ndarray) -> bytes:
    """Losslessly compressed gray image."""
    stream = io.BytesIO()
    Pillow.fromarray(pixels).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def write_split(folder: Path, out: Path, split: str, images: int | None) -> Path:
    """Write `out`/`split`.parquet and return its path."""
    pixels = read_idx(folder / f"{FILES[split]}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{FILES[split]}-labels-idx1-ubyte.gz")
    chosen = np.arange(len(labels)) if images is None else first_of_each_class(labels, images)
    rows = {"image": [{"bytes": png(pixels[i]), "path": None} for i in chosen], "label": labels[chosen].tolist()}
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    path = out / f"{split}.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the four *-ubyte.gz files")
    parser.add_argument("out", type=Path, help="folder for train.parquet and test.parquet")
    parser.add_argument("--train", type=int, help="number of training images (default: all)")
    parser.add_argument("--test", type=int, help="number of test images (default: all)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for split, images in {"train": args.train, "test": args.test}.items():
            path = write_split(args.folder, args.out, split, images)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
