"""One console script for all commands."""
import importlib
import sys
from fcos_lite.config import run_command

COMMANDS = {"train": "train a detector", "evaluate": "measure one", "detect": "find people in pictures", "demo": "learn, measure, look: ten minutes, no data needed"}

def usage():
    return "\n".join(["usage: fcos-lite COMMAND ...", "", *(f"  {name:10} {what}" for name, what in COMMANDS.items()), "", "fcos-lite COMMAND --help says more."])

def main(argv=None):
    "`fcos-lite train ...` is `python -m fcos_lite.train ...`."
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] not in COMMANDS:
        print(usage())
        sys.exit(0 if arguments[:1] in ([], ["-h"], ["--help"]) else 2)
    run_command(lambda: importlib.import_module(f"fcos_lite.{arguments[0]}").main(arguments[1:]))
