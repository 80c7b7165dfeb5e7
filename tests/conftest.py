import os
import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")   # JAX compiles for longer than it computes here

def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run by make test-slow")

def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow: run by make test-slow"))

@pytest.fixture(scope="session", autouse=True)
def first_steps_come_sooner():
    from fcos_lite.train.trainer import disable_grappler
    disable_grappler()
