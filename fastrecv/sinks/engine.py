"""The one door to nats-py: a connection to the first server of several that answers, by TLS and with credentials."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nats.aio.client import Client

__all__ = ["Access", "connected", "dropped", "present", "stream_made"]

_CONNECTING = 2  # seconds, for one server
_PING = 2  # seconds; a server that has not answered two of them is given up
_CLOSING = 1.0  # seconds
_DUPLICATES = 120.0  # seconds that a stream made here remembers message ids, as nats-server's own default
_NO_STREAM = 10059  # error code of JetStream's API: stream not found


@dataclass(frozen=True)
class Access:
    """Where the servers are, and who we are.

    servers : "host" or "host:port". user, password, token : as the servers' configuration has them. nkey : a file with
    the seed of an nkey ("SU..."). tls : insist on it; so does ca, a file of certificates to trust, not the system's.
    certificate, key : files of one's own, where servers verify clients.
    """

    servers: Sequence[str]
    user: str | None = None
    password: str | None = None
    token: str | None = None
    nkey: str | None = None
    tls: bool = False
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    def context(self) -> ssl.SSLContext | None:
        """What TLS is made with; None without. OSError, ValueError: a file cannot be read, or is not what it should be.

        Where `nkey` is given nkeys must be there: see present().
        """
        for path in filter(None, (self.ca, self.certificate, self.key, self.nkey)):
            Path(path).read_bytes()  # the errors of ssl do not say which file
        if self.nkey is not None:
            _check_seed(self.nkey)
        if self.certificate is None and self.key is not None:
            raise ValueError("a key without its certificate: give certificate too")
        if not (self.tls or self.ca or self.certificate):
            return None
        try:
            made = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                made.load_cert_chain(self.certificate, self.key)
        except ssl.SSLError as error:
            raise ValueError(f"{self.certificate or self.ca} and what belongs to it cannot be used: {error}") from None
        return made


def _check_seed(path: str) -> None:
    """ValueError where a file has no seed of an nkey: no server would ever take it."""
    import nkeys  # noqa: PLC0415 - optional

    try:
        nkeys.from_seed(bytearray(Path(path).read_bytes().strip()))
    except (nkeys.NkeysError, ValueError):
        raise ValueError(f"{path} has no seed of an nkey: give a file with a line like SU...") from None


def present(nkey: bool) -> None:
    """ModuleNotFoundError, which names the extra, where nats-py is not installed, or nkeys where it is needed."""
    try:
        import nats  # noqa: F401, PLC0415 - optional

        if nkey:
            import nkeys  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'fastrecv[sinks]'", name=error.name
        ) from None


async def connected(access: Access, context: ssl.SSLContext | None, failed: Callable[[Exception], None]) -> Client:
    """A connection; nats-py is not to mend it by itself, since what was on its way must be sent again in order.

    failed : is told every error of the connection. Whatever nats-py raises where no server answers.
    """
    from nats.errors import NoServersError  # noqa: PLC0415 - optional

    # pending_size 0: publish() never waits for the socket. It would swallow a cancellation, and the window bounds it.
    client: Client = _client_of(context is not None)()
    errors: list[Exception] = []

    async def told(error: Exception) -> None:
        errors.append(error)
        failed(error)

    try:
        await client.connect(
            [f"nats://{server}" for server in access.servers], error_cb=told, name="fastrecv", tls=context,
            allow_reconnect=False, max_reconnect_attempts=1, reconnect_time_wait=0, connect_timeout=_CONNECTING,
            ping_interval=_PING, pending_size=0, user=access.user, password=access.password, token=access.token,
            nkeys_seed=access.nkey,
        )  # fmt: skip
    except BaseException as error:
        await dropped(client)
        if isinstance(error, NoServersError) and errors:
            raise errors[-1] from None  # says why
        raise
    errors.clear()
    return client


async def dropped(client: Client) -> None:
    """Close a connection, whatever state it is in; one to a server that stands still would wait for it."""
    with contextlib.suppress(Exception):
        await asyncio.wait_for(client.close(), _CLOSING)
    writer = getattr(client._transport, "_bare_io_writer", None)
    if writer is not None:
        writer.transport.abort()


async def stream_made(client: Client, name: str, subjects: str) -> None:
    """Make a stream of these subjects unless there is one of that name, which stays as it is."""
    from nats.js.errors import NotFoundError, ServiceUnavailableError  # noqa: PLC0415 - optional

    jetstream = client.jetstream(timeout=_CONNECTING)
    try:
        await jetstream.stream_info(name)
    except ServiceUnavailableError as error:
        if error.err_code is not None:  # it is JetStream's own answer
            raise
        raise ConnectionError("the server has no JetStream, or it is not ready") from None
    except NotFoundError as error:
        if error.err_code != _NO_STREAM:
            raise
        await jetstream.add_stream(name=name, subjects=[subjects], duplicate_window=_DUPLICATES)


def _client_of(secure: bool) -> Any:
    """The class of connections; one that is to be secure says nothing to a server that does not ask for TLS."""
    from nats.aio.client import Client  # noqa: PLC0415 - optional

    class Secure(Client):
        def _connect_command(self) -> bytes:
            # nats-py goes by the server's word alone: somebody between could have the credentials in clear.
            if secure and not self._server_info.get("tls_required"):
                raise ConnectionError("the server offers no TLS, which was asked for")
            return super()._connect_command()

    return Secure
