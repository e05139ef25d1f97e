"""A TCP proxy that adds latency, resets connections and limits the bandwidth."""

import asyncio
import random
import threading
from contextlib import suppress
from dataclasses import dataclass

_CHUNK = 16_384


@dataclass
class Weather:
    """How bad the network is; it may be changed while connections are open."""

    latency: float = 0.0  # seconds added to every chunk
    reset_chance: float = 0.0  # per chunk, that its connection is reset
    bytes_per_second: float = 0.0  # per connection and direction; 0 is no limit


class Proxy:
    """Passes connections on from one port of 127.0.0.1 to another, in a thread of its own."""

    def __init__(self, target: int, seed: int) -> None:
        self.weather, self.resets = Weather(), 0
        self._target, self._random = target, random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        with suppress(OSError, asyncio.IncompleteReadError):
            answers, server = await asyncio.open_connection("127.0.0.1", self._target)
            ends.append(server)
            await asyncio.gather(self._pass(reader, server), self._pass(answers, writer))
        for end in ends:
            end.transport.abort()  # a reset, unless all was passed on and closed

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while chunk := await source.read(_CHUNK):
            weather = self.weather
            await asyncio.sleep(weather.latency)
            if weather.bytes_per_second:
                await asyncio.sleep(len(chunk) / weather.bytes_per_second)
            if self._random.random() < weather.reset_chance:
                self.resets += 1
                raise ConnectionResetError
            sink.write(chunk)
            await sink.drain()
        with suppress(OSError):
            sink.write_eof()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
