"""The package's metadata lives in settings.ini; this reads it."""
from configparser import ConfigParser
from pathlib import Path
from shutil import copyfile
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = parser["DEFAULT"]
words = lambda key: settings.get(key, "").split()
extras = {name: words(f"{name}_requirements") for name in ("cuda", "jax", "jax_cuda", "mlflow", "export", "dev")}

class WithWeights(build_py):
    "A wheel carries the shipped weights inside the package."
    def run(self):
        super().run()
        if self.editable_mode: return   # an editable install finds them in the checkout
        target = Path(self.build_lib) / "fcos_lite" / "shipped"
        target.mkdir(parents=True, exist_ok=True)
        for file in Path(__file__).with_name("weights").glob("*.*"):
            if file.name.endswith((".weights.h5", ".json", ".sha256")): copyfile(file, target / file.name)

setup(
    cmdclass={"build_py": WithWeights},
    name=settings["lib_name"], version=settings["version"], description=settings["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    author=settings["author"], license="Apache-2.0", keywords=settings["keywords"], python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["fcos_lite", "fcos_lite.*"]), install_requires=words("requirements"), extras_require=extras,
    entry_points={"console_scripts": words("console_scripts")},
)
