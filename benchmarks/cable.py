"""A cable between two network cards that holds back what goes from one end to the other.

``python -m benchmarks.cable CARD PORT SECONDS`` makes both cards, prints a line when it has, and
carries frames until its standard input ends: at once from PORT to CARD, after SECONDS from CARD to
PORT, give or take a fifth of a millisecond as long as it gets a processor in time. Segments travel
whole, so that a gigabit a second is some thousand frames; it carries three on one core.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

# From linux/if_tun.h.
_SET_INTERFACE, _SET_OFFLOAD = 0x400454CA, 0x400454D0
_TAP, _NO_PACKET_INFO, _HEADERS = 0x0002, 0x1000, 0x4000
_CHECKSUMS, _SEGMENTS_4, _SEGMENTS_6 = 0x01, 0x02, 0x04

#: No frame is larger: a segment of 64 KB, and headers.
_LARGEST = 1 << 17


def _card(name: str) -> int:
    """A new network card; what is sent through it is read from the file, and the other way round."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, _SET_INTERFACE, struct.pack("16sH22x", name.encode(), _TAP | _NO_PACKET_INFO | _HEADERS))
    # Each frame brings what is to be done about checksums and segments, and takes it to the other end.
    fcntl.ioctl(file, _SET_OFFLOAD, _CHECKSUMS | _SEGMENTS_4 | _SEGMENTS_6)
    return file


def _read(file: int) -> bytes | None:
    try:
        return os.read(file, _LARGEST)
    except BlockingIOError:
        return None


def _write(file: int, frame: bytes) -> None:
    # A card that is not up, or has no room left, loses the frame, as cards do.
    with contextlib.suppress(OSError):
        os.write(file, frame)


def main() -> None:
    card, port = (_card(name) for name in sys.argv[1:3])
    seconds = float(sys.argv[3])
    print("ready", flush=True)
    under_way: deque[tuple[float, bytes]] = deque()
    while True:
        patience = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([sys.stdin.fileno(), card, port], [], [], patience)
        if sys.stdin.fileno() in ready:
            return
        if port in ready and (frame := _read(port)):
            _write(card, frame)
        if card in ready and (frame := _read(card)):
            under_way.append((time.monotonic() + seconds, frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _write(port, under_way.popleft()[1])


if __name__ == "__main__":
    main()
