"""Decoding a JPEG file with a check that libjpeg has found nothing to repair in it.

libjpeg fills what is missing with grey, skips what is left over and only prints a warning, which Pillow throws
away. But its decoder can be fed in pieces, and how far it gets with each piece shows what it needed.
"""

import io
import re

from PIL import Image, JpegImagePlugin

SIGNATURE = b"\xff\xd8\xff"
MARKER = re.compile(rb"\xff+[^\x00\xff]")  # ends a stretch of pixel data: FF 00 in it stands for the byte FF
FILLER = b"\xff\x00" * 8  # eight bytes of ones, which libjpeg reads ahead; no picture needs them
# Bytes at the end of a stretch. So one byte too many passes, as webcams are known to write. As libjpeg reads up to
# eight bytes ahead, nine too many are always noticed and fewer sometimes.
HELD_BACK = 2
RESTARTS = range(0xD0, 0xD8)
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
ARITHMETIC = re.compile(rb"\xff[\xc9\xca]\x00[\x08-\x40]\x08")  # frame headers; libjpeg cannot stop within such data


class Damaged(Exception):
    """A JPEG file that libjpeg would repair."""


def open_jpeg(content: bytes) -> Image.Image:
    """The picture in a JPEG file, not decoded yet; of a file with several pictures (MPO) the first."""
    return JpegImagePlugin.JpegImageFile(io.BytesIO(content))


def load(picture: Image.Image, content: bytes) -> None:
    """Decode ``picture``, which ``open_jpeg`` has opened from ``content``.

    Raises:
        Damaged: pixel data are missing or left over, or markers are wrong.
    """
    start = picture.fp.tell()  # of the first stretch of pixel data
    if ARITHMETIC.search(content, 0, start):
        picture.load()
        return
    picture.load_prepare()
    decoder = Image._getdecoder(picture.mode, "jpeg", picture.tile[0][3], picture.decoderconfig)
    decoder.setimage(picture.im, (0, 0, *picture.size))
    _Feeder(decoder, content).feed_all(start)
    picture.tile = []  # so that Pillow does not decode it again


class _Feeder:
    """Hands the bytes of a file to Pillow's decoder piece by piece."""

    def __init__(self, decoder, content: bytes):
        self.decoder, self.content = decoder, content
        self.sent = 0
        self.left = b""  # what the decoder has been given but has not taken

    def feed(self, end: int, extra: bytes = b"") -> bool | None:
        """Give it the file up to ``end``, and ``extra``; None if the picture is complete, else whether it took all.

        Within pixel data the decoder takes all bytes only by chance, as it stops at the start of a block that it
        cannot finish. After the end of the data it takes whatever comes in search of the next marker.
        """
        piece = self.left + self.content[self.sent : end] + extra
        self.sent = end
        taken, error = self.decoder.decode(piece)
        if error < 0:
            raise Damaged
        if taken < 0:
            return None
        self.left = piece[taken:]
        return taken == len(piece)

    def feed_all(self, start: int) -> None:
        next_restart = 0
        while True:
            marker = MARKER.search(self.content, start)
            if marker is None:
                raise Damaged  # the end is missing
            kind = marker[0][-1]
            if self._feed_stretch(start, marker.start()):
                if kind != END_OF_IMAGE:
                    raise Damaged
                return
            if kind in RESTARTS:
                if kind - RESTARTS[0] != next_restart:
                    raise Damaged
                next_restart = (next_restart + 1) % 8
                start = marker.end()
                continue
            start = self._next_scan(marker.end() - 2)
            next_restart = 0
            if start is None:
                if self.feed(len(self.content)) is not None:
                    raise Damaged
                return

    def _feed_stretch(self, start: int, end: int) -> bool:
        """Feed one stretch of pixel data and check that it is as long as it should be: is the picture complete?"""
        cut = end - HELD_BACK
        if cut > start:
            taken = self.feed(cut)
            if taken:  # by chance? then one byte more is not taken
                taken = self.feed(cut + 1)
            if taken is None or taken:
                raise Damaged  # it needs less than there is
        taken = self.feed(end, FILLER)
        if taken is None:
            return True
        if not taken:
            raise Damaged  # it needs more than there is
        return False

    def _next_scan(self, position: int) -> int | None:
        """Where the pixel data go on after the marker at ``position``; None if it is the end of the picture."""
        while self.content[position : position + 1] == b"\xff":
            kind = self.content[position + 1 : position + 2]
            if kind == bytes([END_OF_IMAGE]):
                return None
            position += 2 + int.from_bytes(self.content[position + 2 : position + 4])
            if kind == bytes([START_OF_SCAN]):
                return position
        raise Damaged
