"""How commands of tests compile their programs quickly, as conftest.py has this process compile."""

QUICKLY = "--xla_backend_optimization_level=0"
ENVIRONMENT = {"XLA_FLAGS": QUICKLY}
