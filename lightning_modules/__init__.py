"""The joint RL step, its policies, and the `lightning` command."""

from lightning_modules.late_imports import postpone

postpone()
