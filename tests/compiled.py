"""Environment that makes the tests' commands compile quickly, as conftest.py does for this process."""

QUICKLY = "--xla_backend_optimization_level=0"
ENVIRONMENT = {"XLA_FLAGS": QUICKLY}
