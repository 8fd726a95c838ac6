"""`python -m lightning_modules.cli`: the `lightning` command where another package owns its name."""

from lightning_modules.cli import main

if __name__ == "__main__":
    main()
