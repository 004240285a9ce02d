"""`python -m flexgen_triton COMMAND`."""

from .cli import main

if __name__ == "__main__":
    main()
