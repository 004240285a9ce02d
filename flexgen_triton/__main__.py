"""`python -m flexgen_triton COMMAND`."""

if __name__ == "__main__":
    from . import interrupts

    interrupts.loading()
    from .commands.main import main

    main()
