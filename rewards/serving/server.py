"""A safe server for rewards: `python -m rewards.serving --config configs/rewards/<name>.yaml`.

Scorers that need other libraries than the trainer, or another GPU, run here; the client is
`rewards.serving.client.RemoteReward`.
It reads JSON and images, nothing that could run code, and listens to this machine alone unless the environment holds
a `REWARD_TOKEN`. It imports neither Lightning nor torch: only the scorers that it hosts may. Where strangers can
connect, put a proxy before it, for TLS and for bounds by client.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn

import jsonargparse
import uvicorn
from fastapi import FastAPI
from PIL import Image

from datamodules.jsonl import read_text
from datamodules.masked import masked
from datamodules.parsing import parse_yaml
from rewards.base import Reward, RewardUnavailable
from rewards.serving.connections import Connection
from rewards.serving.endpoints import create_app
from rewards.serving.requests import Limits

TOKEN_ENV = "REWARD_TOKEN"

log = logging.getLogger("rewards.serving.server")


class Parser(jsonargparse.ArgumentParser):
    """Command line parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with one line instead of the usage text."""
        _exit(message)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Parses a configuration file; ends first if its bytes are no UTF-8 text, or its text no YAML of fair size."""
        try:
            parse_yaml(read_text(os.fspath(path), "--config"), str(path))
        except ValueError as error:
            _exit(str(error))
        return super().parse_path(path, *args, **kwargs)


def build_parser() -> Parser:
    """Builds the command line parser; its options are the keys of the configuration file."""
    parser = Parser(prog="python -m rewards.serving", description="Serves rewards over HTTP.", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_argument("--rewards", type=dict[str, Reward], required=True, help="name -> reward")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="other machines need a REWARD_TOKEN set")
    parser.add_argument("--port", type=int, default=18080, help="0 takes any free port")
    parser.add_class_arguments(Limits)
    return parser


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """Binds a socket that does not listen yet, so that no client is kept waiting while models load.

    Raises:
        ValueError: if others could connect without a token, or the address is not free.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"the server has port={port}, use 0 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
        # What is checked is the very address that is bound, whatever the name resolves to later.
        if token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise ValueError(
                f"`host` is {host!r}, which others can reach, but {TOKEN_ENV} is not set: set it to a secret that "
                "server and clients share, or use host 127.0.0.1."
            )
        # Named as TCP, else asyncio leaves Nagle's algorithm on, and every answer waits 40 ms for an acknowledgement.
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server may come back at once
        bound.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error}; choose another `host` or `port`.") from error
    return bound


def read_token() -> str | None:
    """Reads the token from the environment; an empty one is none."""
    token = os.environ.get(TOKEN_ENV) or None
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(f"{TOKEN_ENV} must be printable ASCII without spaces: make one with `openssl rand -hex 32`.")
    return token


class Server(uvicorn.Server):
    """uvicorn server that drops half-sent requests when it stops, for which uvicorn alone would wait for ever."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drops half-sent requests and answers the accepted ones."""
        self.config.app.state.stopping.set()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def build_server(app: FastAPI, limits: Limits) -> Server:
    """Builds the HTTP server of an application."""
    return Server(
        uvicorn.Config(
            app,
            http=partial(Connection, limits),  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=limits.max_connections + 1,  # uvicorn counts the new one and refuses at this number
        )
    )


def run(server: Server, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, then answers what was accepted and returns."""

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn has handlers of its own while it runs and raises the signal again at the end, for these: the exit code
    # of a server that was asked to stop is 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.run(sockets=[listener])


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command `python -m rewards.serving`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    parser = build_parser()
    config = parser.parse_args(args)
    try:
        token = read_token()
        limits = Limits(**{one.name: config[one.name] for one in fields(Limits)})
        listener = bind(config.host, config.port, token)
        rewards: dict[str, Reward] = parser.instantiate(config).rewards
        if not rewards:
            raise ValueError("`rewards` is empty: name at least one reward.")
        app = create_app(rewards, limits, token)
        log.info("serving %s on http://%s:%d", ", ".join(rewards), *listener.getsockname()[:2])
        run(build_server(app, limits), listener)
    except (ValueError, OSError, RewardUnavailable) as error:
        _exit(str(error))


def _exit(message: str) -> NoReturn:
    print(f"rewards.serving.server: error: {masked(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)
