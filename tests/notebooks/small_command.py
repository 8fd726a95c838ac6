"""The `lightning` command with one prompt a step and two sampler steps, for the runs that notebooks start in tests."""

import sys

from lightning_modules.cli import main
from tests.short_runs import QUICK

if __name__ == "__main__":
    main([*sys.argv[1:], *QUICK, "--data.init_args.batch_size=1", "--data.init_args.train_prompts=12"])
