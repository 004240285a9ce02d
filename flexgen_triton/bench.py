"""`python -m flexgen_triton.bench`: FlexGen's benchmark, with FlexGen's flags. Without flags: the demo."""

if __name__ == "__main__":
    from . import interrupts

    interrupts.loading()  # before what takes long to import
    from .commands.bench import main

    main()
