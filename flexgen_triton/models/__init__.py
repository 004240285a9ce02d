"""The mathematics: one file per model family, and the operations they are made of."""
