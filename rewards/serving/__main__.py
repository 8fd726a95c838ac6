"""`python -m rewards.serving`: starts the reward server."""

from rewards.serving.server import main

if __name__ == "__main__":
    main()
