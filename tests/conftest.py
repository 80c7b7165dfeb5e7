import os
import pytest

# JAX compiles for longer than it computes here
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

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

TINY = ("--image-size 64 --scenes 24 --epochs 2 --batch-size 4 --level-areas 256 --strides 8 16 "
        "--min-height 16 --max-height 50 "
        "--stem-filters 8 --stem-groups 2 --backbone-filters 8 8 8 8 --backbone-blocks 1 1 1 1 --backbone-groups 4 "
        "--pyramid-channels 16 --pyramid-groups 4 --tower-depth 1 --tower-channels 16 --tower-groups 4 "
        "--evaluate-every 2").split()

@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    "The folder of a tiny finished run, trained once for all tests that need one; copy it before you change it."
    import fcntl
    from fcos_lite.train import __main__ as train
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"): shared = shared.parent
    with open(shared / "tiny.lock", "w") as lock:   # the first of several workers makes it, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "tiny" / "evaluation.json").is_file():
            train.main([*TINY, "--out", str(shared / "tiny"), "--force"])
    return shared / "tiny"
