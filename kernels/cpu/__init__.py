"""The kernels of the CPU: loops compiled by numba."""
