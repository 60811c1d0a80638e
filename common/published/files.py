"""Folders of published weights: which files they need, and the statistics in them."""
import zipfile
from pathlib import Path

import numpy as np

from common import InputError
from common.datasets import Statistics
from common.runs import stand_in


def require_files(folder, names, what):
    """The folder as a Path with all these files in it; else InputError. what: which folder this should be."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name {what}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"{folder}: is not complete, missing {', '.join(missing)}; name {what}")
    return folder


def read_numbers(path, shape):
    """The array of floats in a .npy file, float64; else InputError. shape: None in it stands for any size."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        said = stand_in(path) or "is no whole .npy file of numbers; copy or download it again"
        raise InputError(f"{path}: {said}") from error
    wanted = " x ".join("any" if n is None else str(n) for n in shape)
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != len(shape) or any(
            n not in (None, have) for n, have in zip(shape, array.shape)):
        have = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise InputError(f"{path}: holds {have}, wanted {wanted} floats; is it of another data set?")
    if not np.isfinite(array).all():
        raise InputError(f"{path}: holds NaN or infinity; copy or download it again")
    return array.astype(np.float64)


def read_meta(folder, width, role):
    """Statistics in a role from the mean.npy and std.npy of a folder "meta" of published weights. width: of
    both, or None for any."""
    mean, std = (read_numbers(Path(folder) / name, (width,)) for name in ("mean.npy", "std.npy"))
    if mean.shape != std.shape:
        raise InputError(f"{Path(folder) / 'std.npy'}: has {len(std)} numbers, mean.npy has {len(mean)}; "
                         "take both from one folder")
    if (std <= 0).any():
        raise InputError(f"{Path(folder) / 'std.npy'}: has a std that is not positive; copy or download it "
                         "again")
    return Statistics(mean, std, role)
