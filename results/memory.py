"""What a backward pass keeps alive: bytes saved for it, now and at their highest, measured by torch's hooks.

It counts what algorithms differ in, and not what allocators, threads or the machine add; so it can be
asserted to the byte.
"""
import weakref

import torch


class SavedBytes:
    """`with SavedBytes(model, reward) as saved:` counts storages that autograd saves inside; `saved.peak` is
    the largest sum at one time, `saved.now` what is alive.

    A storage counts once, however many graph nodes hold it, until the last of them is gone. Parameters and
    buffers of the modules do not count: they are there in any case. Inside torch.utils.checkpoint the
    recomputation is not seen: what it keeps, one piece at a time, has to be measured apart.
    """

    def __init__(self, *modules):
        self.now = self.peak = 0
        self.held = {}  # storage pointer -> [how many graph nodes hold it, bytes]
        self.free = {tensor.untyped_storage().data_ptr() for module in modules
                     for tensor in (*module.parameters(), *module.buffers())}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _pack(self, tensor):
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self.free:
            entry = self.held.setdefault(place, [0, storage.nbytes()])
            entry[0] += 1
            if entry[0] == 1:
                self.now += entry[1]
                self.peak = max(self.peak, self.now)
            weakref.finalize(kept, self._release, place)
        return kept

    def _release(self, place):
        entry = self.held[place]
        entry[0] -= 1
        if not entry[0]:
            self.now -= entry[1]
            del self.held[place]


class _Kept:
    """A saved tensor; it goes when the graph node that saved it lets go of it."""

    __slots__ = ("tensor", "__weakref__")

    def __init__(self, tensor):
        self.tensor = tensor
