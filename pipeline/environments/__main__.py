"""`python3 -m pipeline.environments [NAME ...] [--device cpu|cuda]`: makes the locked environments. Standard library only."""

import sys

from pipeline.environments.install import main

if __name__ == "__main__":
    sys.exit(main())
