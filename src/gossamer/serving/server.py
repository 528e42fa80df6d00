"""Running the application: the address, signals, and an end that finishes what is under way."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from gossamer.core.errors import GossamerError, InputError

log = logging.getLogger("gossamer.serving")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def check_address(host: str, token: str | None) -> bool:
    """Whether ``host`` is this machine alone; :class:`InputError` where it is not and there is no token."""
    local = _loopback(host)
    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token):
        raise InputError("--token", must="be at least 8 printable ASCII characters without blanks", got="another")
    if not local and token is None:
        do = "give --token or set GOSSAMER_TOKEN, or leave --host out"
        raise InputError(f"--host {host}", must="have a token, as others can reach this address", got="none", do=do)
    return local


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; :class:`InputError` where the address is taken or not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {host}", must="be an address of this machine", got=error.strerror) from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(socket.SOMAXCONN)
    except OSError as error:
        found.close()
        raise _refused(host, port, error) from error
    return found


class Server(uvicorn.Server):
    """The first SIGINT or SIGTERM lets requests finish, the second ends them; neither is passed on."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        else:
            log.info("finishing what is under way; a second signal ends it at once")
        self.should_exit = True


def make_server(app: Any) -> Server:
    # requests are logged by the application, without uvicorn's own lines
    return Server(uvicorn.Config(app, access_log=False, log_level="warning", lifespan="off", server_header=False))


def run(app: Any, bound: socket.socket) -> None:
    """Serve until a signal."""
    server = make_server(app)
    server.run(sockets=[bound])
    if not server.started:
        raise GossamerError("the server", must="start", got="an error that is logged above")


@contextlib.contextmanager
def background(app: Any) -> Iterator[str]:
    """The address of a server on a free loopback port, in a thread of this process; it finishes its requests."""
    bound, server = listen("127.0.0.1", 0), make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def _loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"--host {host}", must="be an address of this machine", got=error.strerror) from error
    return all(ipaddress.ip_address(str(row[4][0]).partition("%")[0]).is_loopback for row in found)


def _refused(host: str, port: int, error: OSError) -> InputError:
    if error.errno == errno.EADDRINUSE:
        return InputError(
            f"--port {port}", must="be free", got="a port in use", do="stop what uses it, or take another"
        )
    if error.errno == errno.EACCES:
        return InputError(f"--port {port}", must="be open to you", got=error.strerror, do="take one above 1023")
    return InputError(f"--host {host}", must="be an address of this machine", got=error.strerror)
