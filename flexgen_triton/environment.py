"""Settings of the process that must be made before torch is first imported. The package imports this first.

Lanes share the cores with OpenMP's threads, which by default spin at the end of every parallel region: on two cores a
disk thread then waits for a scheduler's tick (4 ms measured for a 0.4 ms region). A value set by the user stays.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
