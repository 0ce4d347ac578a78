"""What the kernel knows of TCP connections (sock_diag, as `ss -ti` does), for what wrk does not tell."""

import socket
import struct

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLMSG_DONE = 3
INET_DIAG_INFO = 2
ESTABLISHED = 1


def received(port):
    """Bytes received so far on each open connection to a port, by the client's own port; None if unknown.

    wrk counts a timeout only when a late answer does arrive. A connection that is never answered leaves no trace in
    its report, so the kernel is asked.
    """
    counts = {}
    # struct inet_diag_req_v2: IPv4, TCP, with tcp_info, established connections of any address
    request = struct.pack("=BBBxI48x", socket.AF_INET, socket.IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 1 << ESTABLISHED)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as diag:
            diag.settimeout(1)
            diag.send(struct.pack("=IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, 0x301, 1, 0) + request)
            while True:
                data, at = diag.recv(1 << 20), 0
                while at < len(data):
                    length, kind = struct.unpack_from("=IH", data, at)
                    if kind != SOCK_DIAG_BY_FAMILY:
                        return counts if kind == NLMSG_DONE else None
                    source, destination = struct.unpack_from(">HH", data, at + 20)
                    attribute = at + 16 + 72
                    while destination == port and attribute < at + length:
                        size, name = struct.unpack_from("=HH", data, attribute)
                        if name == INET_DIAG_INFO:  # tcp_info, in it tcpi_bytes_received
                            counts[source] = struct.unpack_from("=Q", data, attribute + 4 + 128)[0]
                        attribute += size + 3 & ~3
                    at += length + 3 & ~3
    except (OSError, struct.error):
        return None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
