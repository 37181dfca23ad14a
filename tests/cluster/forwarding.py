"""Forwards a port of a pod over a WebSocket, as the API server and a kubelet do together (protocol v4.channel.k8s.io).

Each frame begins with a channel: 0 for data, 1 for errors. The first frame of a channel has the port (little-endian).
"""

import base64
import hashlib
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import BinaryIO

_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455
_BINARY, _CLOSE = 2, 8  # opcodes


@dataclass(frozen=True)
class Forwarding:
    """What a client asks for. All pods are processes of this machine."""

    port: int

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Accept the WebSocket, and copy in both directions until one end is closed."""
        key = hashlib.sha1(f"{handler.headers['Sec-WebSocket-Key']}{_MAGIC}".encode()).digest()
        handler.send_response(101)
        headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Protocol": "v4.channel.k8s.io"}
        for name, value in {**headers, "Sec-WebSocket-Accept": base64.b64encode(key).decode()}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.close_connection = True
        with socket.create_connection(("127.0.0.1", self.port)) as pod:
            for channel in (b"\0", b"\1"):
                handler.wfile.write(_frame(channel + struct.pack("<H", self.port)))
            threading.Thread(target=_send, args=(pod, handler.wfile), daemon=True).start()
            with suppress(OSError, EOFError):
                while (data := _receive(handler.rfile)) is not None:
                    pod.sendall(data[1:])
            with suppress(OSError):
                pod.shutdown(socket.SHUT_RDWR)


def _send(pod: socket.socket, to: BinaryIO) -> None:
    with suppress(OSError, ValueError):
        while data := pod.recv(1 << 16):
            to.write(_frame(b"\0" + data))
        to.write(_frame(b"", _CLOSE))


def _frame(data: bytes, opcode: int = _BINARY) -> bytes:
    size = bytes([len(data)]) if len(data) < 126 else b"\x7f" + struct.pack(">Q", len(data))
    return bytes([0x80 | opcode]) + size + data


def _receive(stream: BinaryIO) -> bytes | None:
    """The content of the next frame, which a client masks; None: the client closes."""
    first, size = _read(stream, 2)
    size &= 0x7F
    if size >= 126:
        size = int.from_bytes(_read(stream, 2 if size == 126 else 8), "big")
    mask = _read(stream, 4)
    data = _read(stream, size)
    if first & 0xF == _CLOSE:
        return None
    repeated = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")


def _read(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data
