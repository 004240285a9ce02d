"""What pyproject.toml cannot say: a wheel carries the kernels inside the package, in flexgen_triton/kernels."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    """Copies the top-level kernels/ folder to where a wheel has it; an editable install finds it where it is."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "flexgen_triton" / "kernels"
            shutil.copytree("kernels", target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithKernels})
