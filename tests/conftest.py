"""Settings for every test. Fixtures live in the file that uses them."""

import os

# Set before torch is imported: tests are tiny, and several threads on tiny tensors only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Charts are drawn without a screen.
os.environ.setdefault("MPLBACKEND", "Agg")
