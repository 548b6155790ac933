"""What is installed, found by pattern: every *.py beside this file, and every folder that is a package."""
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent
setup(py_modules=sorted(path.stem for path in root.glob("*.py") if path.name != "setup.py"),
      packages=sorted(path.parent.name for path in root.glob("*/__init__.py")))
