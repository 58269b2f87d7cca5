"""Repack a recording (.npz) as small as its parts allow, without loss; numpy.load reads the result as before.

    python tools/hardware/pack_recording.py SOURCE TARGET [--sort KEY,KEY,...]

Every array is stored by whichever of deflate, bzip2 and LZMA makes it smallest. `--sort` reorders the rows of
equally long arrays together, ascending by the first one: random (argument, result) pairs shrink by that.
The same source always gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np

from mxfp4ref._files import check_no_input, replacing

METHODS = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def pack(arrays: dict[str, np.ndarray], target: Path) -> None:
    """Write the arrays to target, each by the method that suits it best."""
    with replacing(target) as partial, zipfile.ZipFile(partial, "w") as archive:
        for key, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            member = zipfile.ZipInfo(f"{key}.npy")  # dated 1980: no clock in the bytes
            archive.writestr(member, buffer.getvalue(), compress_type=smallest(buffer.getvalue()))


def smallest(content: bytes) -> int:
    """The compression method of the zip format that makes the content smallest."""
    sizes = {}
    for method in METHODS:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr("content", content)
        sizes[method] = len(buffer.getvalue())
    return min(METHODS, key=sizes.__getitem__)


def main() -> None:
    """Repack, read back, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--sort", default="", help="keys whose rows are reordered together, by the first")
    arguments = parser.parse_args()
    check_no_input(arguments.target, [arguments.source])
    with np.load(arguments.source, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    keys = [key for key in arguments.sort.split(",") if key]
    if keys:
        order = np.argsort(arrays[keys[0]], kind="stable")
        arrays.update({key: arrays[key][order] for key in keys})
    pack(arrays, arguments.target)
    with np.load(arguments.target, allow_pickle=False) as file:
        for key, array in arrays.items():
            back = file[key]
            if back.dtype != array.dtype or not np.array_equal(back, array):
                raise SystemExit(f"{key} did not survive")
    print(f"{arguments.source.stat().st_size} -> {arguments.target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
