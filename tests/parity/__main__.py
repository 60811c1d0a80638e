"""`python -m tests.parity DIR`, see tests/parity/__init__.py."""
import sys

from tests.parity import main

sys.exit(main())
