"""Tar members, written byte by byte."""


def raw(name, size=0, kind=b"0", data=b"", magic=b"ustar\x0000"):
    """Return a member: a header that claims `size` bytes, and padded `data`."""
    field = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    head = bytearray(name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"0" * 11 + b"\0")
    head += b" " * 8 + kind + b"\0" * 100 + magic
    head = head.ljust(512, b"\0")
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + data.ljust(-(-len(data) // 512) * 512, b"\0")


END = bytes(1024)  # of a tar
