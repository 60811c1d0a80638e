"""What the tests of several readers of published folders share."""
import torch

from common import generator
from tests.test_published import STAND_INS, message


def normal(*shape, k=0):
    """Standard normal numbers, the same for the same k."""
    return torch.randn(*shape, generator=generator(0, k, "test"))


def randomise(module, k=0):
    """The module with random weights; buffers stay as they are."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, k=1000 * k + number) * 0.3)
    return module.eval().requires_grad_(False)


def refusals(load, path, other):
    """The messages of `load()` where the file at `path` is another model's (`other`), half a download, a git
    LFS pointer, a web page, or not there. All name the file; the file is put back."""
    whole, found = path.read_bytes(), {}
    contents = STAND_INS | {"half": whole[:len(whole) // 2], "empty": b""}
    for what, content in contents.items():
        path.write_bytes(content)
        found[what] = message(load)
    if other is not None:
        torch.save(other, path)
        found["other"] = message(load)
    path.unlink()
    found["missing"] = message(load)
    path.write_bytes(whole)
    for what, text in found.items():
        assert path.name in text, (what, text)
    for what in STAND_INS:
        assert f"is {what}, not the file itself" in found[what]
    return found
