"""The demo model that ships with the package: a small OPT, prompts for it, and the text it was not trained on.

Owns the paths only; whoever wants the weights loads `DEMO_DIR` as any other checkpoint directory.
"""

from pathlib import Path

DEMO_DIR = Path(__file__).parent


def prompts() -> list[str]:
    """The shipped prompts, all of different lengths."""
    return (DEMO_DIR / "prompts.txt").read_text(encoding="utf-8").splitlines()


def heldout(directory: Path = DEMO_DIR) -> list[str]:
    """The held-out documents, each with its paragraphs on lines of their own."""
    return (directory / "heldout.txt").read_text(encoding="utf-8").strip().split("\n\n")
