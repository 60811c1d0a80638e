"""What several test files need of the embedded data."""
import functools

import pytest

from common.embedded import movements


@functools.lru_cache(maxsize=None)
def words_only(domain, skeleton, clips=None):
    """The clips of movements.build without their bodies, which are most of the work and are drawn last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(movements, "_joints", lambda *args: None)
        return movements.build(domain, skeleton, clips=clips)
