"""The package's metadata lives in settings.ini; this reads it."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = parser["DEFAULT"]
words = lambda key: settings.get(key, "").split()
extras = {name: words(f"{name}_requirements") for name in ("cuda", "jax", "dev")}

setup(
    name=settings["lib_name"], version=settings["version"], description=settings["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    author=settings["author"], license="Apache-2.0", keywords=settings["keywords"], python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["fcos_lite", "fcos_lite.*"]), install_requires=words("requirements"), extras_require=extras,
    entry_points={"console_scripts": words("console_scripts")},
)
