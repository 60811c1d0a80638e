"""The reference values (when they are here), and that the comparison itself would notice a wrong number."""
import io
from pathlib import Path

import numpy as np
import pytest

from tests import parity
from tests.parity.rows import Rows, cases

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
KNOWN = [path for path in sorted(GOLDEN.glob("*.npz")) if path.name.startswith(tuple(parity.CHECKS))]
DDPO = [path for path in KNOWN if path.name.startswith(("sde_", "ddim_", "lora_", "ppo_stats_"))]


def name(path):
    return path.name


@pytest.mark.parametrize("path", KNOWN, ids=name)
def test_reference_file(path):
    rows = parity.check_file(path)
    assert rows and [row for row in rows if not row[1] <= row[2]] == []


def altered(value):
    """Integers plus 2 (cosine Karras timesteps may be off by 1), else one value moved by a tenth and more."""
    if value.dtype.kind == "i":
        return value + 2
    changed = value.copy()
    changed.flat[0] = 1.1 * np.nan_to_num(changed.flat[0]) + 0.1
    return changed


@pytest.mark.parametrize("path", DDPO, ids=name)
def test_every_field_counts(path, tmp_path):
    """Each field in turn gets other values; the check has to fail, be the field an input or a result."""
    stored = cases(path)
    for case in {min(stored), max(stored)}:
        for field in stored[case].keys() - {"all_timesteps"}:  # the rows of that file are single steps
            fields = stored[case] | {field: altered(stored[case][field])}
            copy = tmp_path / path.name
            np.savez(copy, **{f"{case}/{key}": value for key, value in fields.items()})
            assert any(not row[1] <= row[2] for row in parity.check_file(copy)), (case, field)


def printed(folder, **options):
    out = io.StringIO()
    return parity.run(folder, out=out, **options), out.getvalue()


def test_an_empty_folder_fails(tmp_path):
    good, text = printed(tmp_path)
    assert not good and "no reference files" in text
    assert parity.main([str(tmp_path / "absent")]) == 1


def test_an_unknown_file_fails_and_is_named(tmp_path):
    np.savez(tmp_path / "mystery_dev.npz", x=np.zeros(2))
    good, text = printed(tmp_path)
    assert not good and "mystery_dev.npz" in text
    assert printed(tmp_path, allow_unknown=True)[0]
    assert parity.main([str(tmp_path)]) == 1 and parity.main([str(tmp_path), "--allow-unknown"]) == 0


def test_a_folder_that_a_check_knows_is_checked_and_others_are_not(tmp_path):
    np.savez(tmp_path / "mystery_dev.npz", x=np.zeros(2))
    (tmp_path / "other").mkdir()
    assert printed(tmp_path, allow_unknown=True)[0]
    (tmp_path / "official_glove_x").mkdir()
    good, text = printed(tmp_path, allow_unknown=True)
    assert not good and "official_glove_x  <InputError" in text and "other" not in text


def test_a_file_without_its_fields_fails(tmp_path):
    np.savez(tmp_path / "lora_x.npz", **{"lin/W": np.zeros((2, 2), np.float32)})
    (tmp_path / "sde_dpmpp_linear_v_x.npz").write_bytes(b"not an archive")
    good, text = printed(tmp_path)
    assert not good and text.count("FAIL") == 2 and "KeyError" in text


def test_comparison_does_not_let_nan_shape_or_infinity_pass():
    nan, inf = float("nan"), float("inf")
    for mine, theirs in (([nan], [0.0]), ([0.0], [nan]), ([inf], [1.0]), ([1.0], [inf]), ([inf], [-inf]),
                         ([1.0, 1.0], [1.0]), ([nan], [nan])):
        rows = Rows()
        rows.compare("x", mine, theirs, 1.0)
        assert rows.rows() == [("x", inf, 1.0)]
    rows = Rows()
    rows.compare("x", [inf, 2.0], [inf, 2.3], 0.2)
    assert rows.rows()[0][1] == pytest.approx(0.3 / 3.3)
