"""What a machine can do, in bytes, bytes per second and floating-point operations per second."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Hardware:
    """Capacities and rates of one machine; `matmul` lists (tokens, FLOP/s) with tokens ascending."""

    name: str
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    h2d: float
    d2h: float
    disk_read: float
    disk_write: float
    device_read: float  # bytes/s that a kernel reads from device memory
    matmul: tuple[tuple[int, float], ...]
    op_seconds: float = 20e-6

    def matmul_rate(self, tokens: int) -> float:
        """FLOP/s of a matrix product over `tokens` rows, between the measured points by linear interpolation."""
        points = self.matmul
        n = bisect_left(points, (tokens, 0.0))
        if n == 0 or n == len(points):
            return points[min(n, len(points) - 1)][1]
        (t0, r0), (t1, r1) = points[n - 1], points[n]
        return r0 + (r1 - r0) * (tokens - t0) / (t1 - t0)


# FlexGen's machine: rates that its published cost model fits (ICML 2023, section 6 and its repository's profile),
# with the pinned host-to-device rate and the physical NVMe write rate of the instance.
T4 = Hardware(
    name="T4 16 GB, 208 GB host, PCIe 3",
    gpu_bytes=15 * GIB,
    host_bytes=208 * GIB,
    disk_bytes=1500 * GIB,
    h2d=12.9e9,
    d2h=4.8e9,
    disk_read=1.6e9,
    disk_write=1.0e9,
    device_read=79e9,
    matmul=((1, 4.3e12), (144, 4.3e12), (4096, 21.2e12)),
)

PROFILES = {"t4": T4}
