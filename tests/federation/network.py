"""A cable between a SuperNode and the SuperLink that can be pulled out."""

import asyncio
import threading
from types import TracebackType

from superlink.onehost.processes import free_port


class Cable:
    """Forwards TCP from a port of its own to ``target_port``; use as a context manager."""

    def __init__(self, target_port: int) -> None:
        self.port, self.target_port = free_port(), target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> "Cable":
        self._thread.start()
        self.plug_in()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None
    ) -> None:
        self.pull_out()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def plug_in(self) -> None:
        """Connections are made and forwarded."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def pull_out(self) -> None:
        """Connections break, and new ones are refused."""
        asyncio.run_coroutine_threadsafe(self._break(), self._loop).result()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self.port)

    async def _break(self) -> None:
        if self._server:
            self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _forward(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            far, forth = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            back.transport.abort()
            return
        self._open |= {back, forth}
        await asyncio.gather(self._copy(near, forth), self._copy(far, back))
        self._open -= {back, forth}

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(2**16):
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()
