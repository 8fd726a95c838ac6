"""Texts in a configuration that look like something else, such as `Rewrite: {prompt}` (YAML) or `${5}` (OmegaConf)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader
from omegaconf.errors import OmegaConfBaseException

from datamodules.parsing import check_yaml_size
from lightning_modules.cli.shipped import shipped

_TEXT = re.compile(r"--model\.(?:init_args\.)?(language|flow)\.(?:init_args\.)?(template|negative_prompt)")
_MAPPING = re.compile(r"Parser key \"(?P<key>\w+)\":\s*Expected a <class 'str'>\. Got value: [{\[]")
_KEY = re.compile(r"(?<!\\)\$\{([a-zA-Z][\w.\[\]]*)\}")
_NO_KEY = re.compile(r"(?<!\\)\$\{(?!\s*[a-zA-Z_.\[$])")


def load_config(text: str) -> Any:
    r"""Reads YAML; `${key}` counts from the file's root also below a subcommand, `${5}` and `\${key}` are text.

    Names of files that the current folder lacks and the package has become their paths.

    >>> load_config(r"{a: {b: '${c.d} ${5} \${c}'}}")
    {'a': {'b': '${..c.d} \\${5} \\${c}'}}
    """
    check_yaml_size(text, "the configuration")
    try:
        content = get_loader("yaml")(text)
    except TypeError as error:  # jsonargparse looks at the names of settings without values
        raise ValueError("the configuration has a setting whose name is a number: names are texts.") from error
    return _prepared(content, 0) if isinstance(content, dict) else content


def _prepared(content: Any, depth: int) -> Any:
    if isinstance(content, dict):
        if None in content:
            raise ValueError("the configuration has a setting without a name (`:` or `?` alone): name or delete it.")
        return {key: _prepared(value, depth + 1) for key, value in content.items()}
    if isinstance(content, list):
        return [_prepared(value, depth + 1) for value in content]
    if isinstance(content, str):
        return _KEY.sub(rf"${{{'.' * depth}\1}}", _NO_KEY.sub(r"\\${", shipped(content)))
    return content


def texts_as_configs(words: Sequence[str]) -> list[str]:
    """Writes options whose value is a text as configurations, since options' values are read as YAML.

    >>> texts_as_configs(["--model.flow.negative_prompt", "a: {b}"])
    ["--config={model: {init_args: {flow: {init_args: {negative_prompt: 'a: {b}'}}}}}"]
    """
    words, written = list(words), []
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        found = _TEXT.fullmatch(key)
        if found and (equals or words):
            own = {found[2]: value if equals else words.pop(0)}
            config = {"model": {"init_args": {found[1]: {"init_args": own}}}}
            word = "--config=" + yaml.safe_dump(config, default_flow_style=True, width=math.inf).strip()
        written.append(word)
    return written


def escaped(config: Any) -> Any:
    r"""Copies a resolved configuration with `\${` for `${` in texts, so that it can be read again."""
    if isinstance(config, str):
        return re.sub(r"(?<!\\)\$\{", r"\\${", config)
    if isinstance(config, list):
        return [escaped(value) for value in config]
    if isinstance(config, dict):
        return {key: escaped(value) for key, value in config.items()}
    if isinstance(config, Namespace):
        return Namespace(**escaped(vars(config)))
    return config


def read_as_mapping(message: str) -> str | None:
    """Returns the sentence for a text that YAML reads as a mapping or list; None for another message."""
    found = _MAPPING.search(message)
    return found and f"`{found['key']}` is a text, but YAML reads it as a mapping or a list: put it in quotes."


def no_such_key(error: OmegaConfBaseException) -> str:
    r"""Returns the sentence for a `${...}` that cannot be resolved."""
    place = re.sub(r"^(fit|validate|test|predict)\.", "", error.full_key or "")
    said = re.sub(r" \(resolved.*|(?<=')\.+", "", str(error).splitlines()[0])
    return (
        f"`{place}` in the configuration: {said}; `${{...}}` stands for another key or for `${{oc.env:NAME}}`, write "
        r"`\${...}` (in YAML without quotes or in single ones) for these characters themselves."
    )
