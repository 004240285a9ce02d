"""Memory for temporaries, handed out anew to every computation: decoding tokens allocates nothing.

Neither asks what lies in it. Both hand out views of buffers that were allocated before the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import numpy as np
import torch
from torch import Tensor

ALIGN = 256  # bytes: what torch's own allocator on a GPU aligns to, so that kernels load as widely
CPU = torch.device("cpu")


class Scratch:
    """Typed views of one buffer, one behind the other, all taken back by `begin`.

    A prompt's temporaries are large and made once: then (`begin(planned=False)`), and where there is no buffer, they
    are torch's own. `panel` is a buffer apart, whose size does not depend on the rows at work: prompts use it too.
    """

    def __init__(self, buffer: Tensor | None = None, panel: Tensor | None = None, device: torch.device = CPU) -> None:
        self._buffer, self._panel = buffer, panel
        self._device = device if buffer is None else buffer.device
        self._planned = buffer is not None
        self._used = 0
        # A token step takes what the last one took: making a view costs more than finding it.
        self._views: dict[tuple[int, torch.dtype, tuple[int, ...]], Tensor] = {}

    def begin(self, *, planned: bool = True) -> None:
        """Take everything back, for the next computation."""
        self._used = 0
        self._planned = planned and self._buffer is not None

    def forget(self) -> None:
        """Let go of the views that are kept for taking them again."""
        self._views.clear()

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A dense tensor that holds anything, valid until the end of its frame or the next `begin`."""
        if not self._planned:
            return torch.empty(shape, dtype=dtype, device=self._device)
        key = (self._used, dtype, shape)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._view(dtype, shape)
        self._used += -(-view.nbytes // ALIGN) * ALIGN
        return view

    def _view(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        assert self._buffer is not None
        end = self._used + prod(shape) * dtype.itemsize
        assert end <= len(self._buffer), f"{shape} {dtype} needs {end} bytes of scratch, there are {len(self._buffer)}"
        return self._buffer[self._used : end].view(dtype).view(shape)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Free at the end everything that was taken inside: the memory that one operation needs beside its result."""
        used = self._used
        yield
        self._used = used

    def panel(self, numbers: int) -> Tensor:
        """Return a dense fp32 tensor of this many numbers, valid until the next call."""
        if self._panel is None or not len(self._panel):
            return torch.empty(numbers, device=self._device)
        assert 4 * numbers <= len(self._panel), (numbers, len(self._panel))
        return self._panel[: 4 * numbers].view(torch.float32)


class Uploads:
    """Small tensors that the host hands the device in a token step, through pinned memory: nobody waits for the copies.

    `begin` is called at every token step, when the device is done with all that the last one was handed. Without a
    `device` buffer the host's memory is the device's.
    """

    def __init__(self, host: Tensor, device: Tensor | None) -> None:
        self._host = Scratch(host)
        self._device = None if device is None else Scratch(device)

    def begin(self, *, planned: bool) -> None:
        for scratch in (self._host, self._device):
            if scratch is not None:
                scratch.begin(planned=planned)

    def forget(self) -> None:
        for scratch in (self._host, self._device):
            if scratch is not None:
                scratch.forget()

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory to fill and `send`, valid as long as what is sent."""
        return self._host.take(*shape, dtype=dtype)

    def send(self, host: Tensor) -> Tensor:
        """The same on the device, valid until the next `begin`."""
        if self._device is None:
            return host
        return self._device.take(*host.shape, dtype=host.dtype).copy_(host, non_blocking=True)

    def numbers(self, values: Sequence[int] | np.ndarray, dtype: torch.dtype) -> Tensor:
        """A vector of integers on the device."""
        host = self.take(len(values), dtype=dtype)
        host.numpy()[:] = values
        return self.send(host)
