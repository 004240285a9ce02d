"""The tokens of a computation as models take them: ids, and positions on the host and on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

Ids = npt.NDArray[np.int64]
Rows = Callable[[str, Ids], Tensor]  # table name, ids [T] -> [T, width], the caller's to overwrite


class Positions:
    """The positions [T] of a computation's tokens: `ids` on the host, and on the device once they are asked for."""

    def __init__(self, ids: Ids, upload: Callable[[Ids], Tensor]) -> None:
        self.ids, self._upload = ids, upload

    @cached_property
    def on_device(self) -> Tensor:
        """[T] int32"""
        return self._upload(self.ids)
