"""Entry point of `python -m lightning_modules.sweep`."""

from lightning_modules.sweep.run import main

if __name__ == "__main__":
    main()
