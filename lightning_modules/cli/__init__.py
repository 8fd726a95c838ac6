"""The `promptrl` command, also called `lightning`: `promptrl fit|validate|test|predict --config ...`.

Every run writes to `<trainer.default_root_dir>/<experiment>/version_N/`: TensorBoard events, `metrics.csv`, the
resolved `config.yaml` and `checkpoints/` (with `last.ckpt`). This room alone imports `callbacks`, and its front door
nothing slow: `--help` and misspelt keys are answered before torch is imported.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

from lightning_modules.cli.demo import serve_demo
from lightning_modules.cli.errors import complain
from lightning_modules.cli.misspelt import misspelt
from lightning_modules.cli.shipped import shipped_words

SUBCOMMANDS = ("fit", "validate", "test", "predict")
QUICKSTART = ["fit", "--config", "configs/quickstart.yaml"]
HELP = """usage: promptrl {fit,validate,test,predict} --config FILE [--config FILE ...] [--KEY VALUE ...]
       promptrl quickstart [--KEY VALUE ...]   (`lightning` is another name of `promptrl`)
       promptrl demo RUN [RUN ...] [--KEY VALUE ...]

  fit        train both agents, one of them, or flow-only (`language: null`)
  validate   score the validation prompts
  test       score fresh prompts, with intervals; images are kept
  predict    draw prompts (`--prompt TEXT`, or the data's) with and without the refiner into a folder
  quickstart fit in the small world that comes with the package: two minutes on a CPU
  demo       a page for trying prompts on runs, before and after training (`promptrl demo --help`)

  --config FILE             an experiment, such as configs/quickstart.yaml; later files are laid over earlier ones;
                            configs/... and miniature/... are the package's where the current folder has none
  --KEY VALUE               any value of it, such as --trainer.max_steps 10 or --model.init_args.group_size 4
  --ckpt_path FILE          a checkpoint to go on from (fit) or to evaluate; `last` and `best` are the experiment's
  --prompt TEXT             a prompt for predict, given once for each; with `--image FILE` where the model edits
  --print_config            the whole configuration with its defaults, and no run
  promptrl fit --help       all options of a subcommand
  --data.help CLASS         the arguments of a class (likewise --model.help, --trainer.callbacks.help)
"""


def main(args: list[str] | None = None) -> None:
    """Entry point of the `promptrl` and `lightning` scripts.

    Args:
        args: the words after the command's name; None takes the process's own.
    """
    words = shipped_words(sys.argv[1:] if args is None else args)
    if words[:1] == ["quickstart"]:
        words = shipped_words([*QUICKSTART, *words[1:]])
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # last, so that a user's folder called `rewards` hides nothing
    if not words or words[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if words[0] == "demo":
        serve_demo(words[1:])
        return
    if words[0] in SUBCOMMANDS:
        mistake = misspelt(words)
    elif words[0].startswith("-"):
        mistake = None  # the parser's to explain
    else:
        mistake = (
            f"`{words[0]}` is no command: begin with {', '.join(SUBCOMMANDS)}, quickstart or demo, such as `promptrl "
            "fit --config ...`."
        )
    if mistake is not None:
        sys.exit(complain(mistake))
    quieten()  # before the imports below, which have notices of their own
    from lightning_modules.cli.run import run  # imports torch, diffusers and Lightning: seconds

    run(words)


def quieten() -> None:
    """Silences notices that a user of this project can do nothing about."""
    import diffusers
    import transformers

    # Among them one line per caption that is longer than CLIP's 77 tokens: FLUX.1 reads the whole text by T5.
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not re.search("Tip:|stopped: `max_(steps|epochs)=", record.getMessage())
    )
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")  # our words are the command line's
    warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated.*")
    warnings.filterwarnings("ignore", message="Found .* module\\(s\\) in eval mode.*")  # ours stay so on purpose
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*logging interval.*")
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log.*sync_dist=True.*")  # it is synced
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view.*")  # which nothing writes to
    warnings.filterwarnings("ignore", message="Total length of `DataLoader` across ranks is zero.*")  # all predicted
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization.*")
    warnings.filterwarnings("ignore", message="The dirpath has changed from.*")
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty.*")
