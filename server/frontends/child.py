"""A front end of several: a whole HTTP server; `python -m server.frontends.child CHANNEL BOARD`, two descriptors.

It shares its port, its engines and its board with the others, and ends when its parent does.
"""

import asyncio
import gc
import logging
import signal
import socket
import sys
from types import FrameType

from server.app import create_app
from server.board import Board, Slot
from server.config import Settings
from server.frontends.channel import Channel
from server.frontends.link import ParentLink
from server.frontends.messages import Begin, Failed, Serving, decode_to_front
from server.log_setup import set_up_log
from server.opening import open_services
from server.part import Part
from server.serve import START_ERRORS, BindError, Server, bind, run, uvicorn_config

logger = logging.getLogger(__name__)


class FrontServer(Server):
    """A signal only begins the drain: it may have gone to the whole group, and the parent knows which is the second."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if sig == signal.SIGTERM:
            self.drain()

    def stop(self) -> None:
        self.should_exit = self.force_exit = True

    def leave(self) -> None:
        """The parent is gone, and the engines with it."""
        self.should_exit = True


def main() -> int:
    """Be told what to serve, and serve it until the parent says otherwise or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it goes to the whole group of a terminal
    channel, board = (int(argument) for argument in sys.argv[1:])
    run(_main(socket.socket(fileno=channel), board))
    return 0


async def _main(end: socket.socket, board: int) -> None:
    channel = await Channel.over(end, decode_to_front)
    begin = await channel.receive()
    if not isinstance(begin, Begin):
        raise TypeError(f"the first message must be Begin, got {type(begin).__name__}")
    settings = Settings.restored(begin.settings)
    set_up_log(settings, f"front-{begin.slot}")
    link = ParentLink(channel, begin.name, settings.serve.stall_timeout)
    slot = Slot(Board(settings.serve.frontends, board), begin.slot)
    part = Part(link.siblings, slot, is_first=begin.is_first)
    serving = asyncio.create_task(_serve(settings, part, begin.port, link))
    listening = asyncio.create_task(link.listen())
    await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done() and link.server is None:  # it has not come so far that it could end by itself
        serving.cancel()
    try:
        await serving
    except asyncio.CancelledError:
        logger.info("a front end leaves before it served anything")
    except (*START_ERRORS, BindError) as error:
        channel.send(Failed(" ".join(str(error).split())))
    finally:
        listening.cancel()
        await channel.close()


async def _serve(settings: Settings, part: Part, port: int, link: ParentLink) -> None:
    # Its own socket: when it dies, the others get all that is new.
    with bind(settings.serve, port, is_shared=True) as listener:
        async with open_services(settings, link.engines(settings.serve.engines), part) as services:
            app = create_app(settings, services)
            gc.collect()  # as in `server.serve`
            gc.freeze()
            timeout = settings.serve.shutdown_timeout
            config = uvicorn_config(app, settings.http)
            server = FrontServer(config, services, timeout, lambda line: link.send(Serving(line)))
            link.server = server
            await server.serve(sockets=[listener])


if __name__ == "__main__":
    sys.exit(main())
