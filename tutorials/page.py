"""What a tutorial takes from where it runs: its size, and where its pictures go. Script and notebook share the code."""

import argparse
import os
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

SIZES = ("quick", "default", "full")
SIZE_VARIABLE = "PYRO_GS_TUTORIAL_SIZE"


class Page:
    """A tutorial that runs.

    As a script it takes ``--quick`` or ``--full`` and writes its pictures to ``--out``. In a notebook, whose command
    line is the kernel's, pictures appear below their cells and nothing is written. Without a flag the environment variable
    ``PYRO_GS_TUTORIAL_SIZE`` gives the size.

    Args:
        name: The tutorial's; pictures go to ``results/<name>`` unless ``--out`` says otherwise.
        description: For ``--help``.

    Attributes:
        size: ``"quick"`` (does it run?), ``"default"`` or ``"full"``.

    Raises:
        ValueError: If ``PYRO_GS_TUTORIAL_SIZE`` is none of the sizes.
    """

    def __init__(self, name: str, description: str) -> None:
        self.size = os.environ.get(SIZE_VARIABLE, "default")
        if self.size not in SIZES:
            raise ValueError(f"the environment variable {SIZE_VARIABLE} is {self.size!r}, not one of {', '.join(SIZES)}")
        self._folder: Path | None = None
        if "ipykernel" in sys.modules:
            return
        parser = argparse.ArgumentParser(description=description)
        size = parser.add_mutually_exclusive_group()
        size.add_argument("--full", dest="size", action="store_const", const="full", help="more of everything")
        size.add_argument("--quick", dest="size", action="store_const", const="quick", help="next to no steps: does it run?")
        parser.add_argument("--out", type=Path, default=Path("results") / name, help="folder for the pictures")
        arguments = parser.parse_args()
        self.size = arguments.size or self.size
        self._folder = arguments.out
        arguments.out.mkdir(parents=True, exist_ok=True)
        matplotlib.use("Agg")

    def show(self, name: str, figure: Figure) -> None:
        """Write a picture to ``<name>.png``; in a notebook leave it open, to be drawn below the cell."""
        if self._folder is not None:
            figure.savefig(self._folder / f"{name}.png", dpi=110)
            plt.close(figure)
