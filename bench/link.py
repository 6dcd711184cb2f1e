"""A TCP relay that simulates a slow link: a delay per direction, and one rate for all connections together.

python -m bench.link LISTEN_PORT TARGET_PORT DELAY_SECONDS BYTES_PER_SECOND

`tc netem` would do the same, but not every kernel has it.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress


class Link:
    """One direction: limits the rate of bytes and delays them."""

    def __init__(self, delay: float, rate: float) -> None:
        self._delay, self._rate, self._free = delay, rate, 0.0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay all bytes from one end to the other."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def deliver() -> None:
            while True:
                due, block = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not block:
                    with suppress(OSError):
                        writer.write_eof()
                    return
                writer.write(block)
                await writer.drain()

        delivery = asyncio.create_task(deliver())
        block = b"-"
        while block:
            block = await reader.read(1 << 14)
            self._free = max(self._free, loop.time()) + len(block) / self._rate
            await asyncio.sleep(max(0.0, self._free - loop.time()))
            await queue.put((loop.time() + self._delay, block))
        await delivery


async def main(listen: int, target: int, delay: float, rate: float) -> None:
    """Serve until terminated."""
    up, down = Link(delay, rate), Link(delay, rate)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * delay)  # TCP's own handshake
        there, back = await asyncio.open_connection("127.0.0.1", target)
        with suppress(ConnectionError):
            await asyncio.gather(up.carry(reader, back), down.carry(there, writer))
        for each in (writer, back):
            each.close()

    async with await asyncio.start_server(serve, "127.0.0.1", listen) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
