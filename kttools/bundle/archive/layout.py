"""The payload of an archive: a plain tar of a bundle, cut into frames. All of it follows from the members.

Before a member comes one framing frame: the zeros that fill up the member before it, and its tar header.
Then its bytes, in data frames of FRAME_BYTES, the last one shorter. After the last member a framing frame
ends the tar. So a member lies in frames of its own, and a frame's place, kind and size are arithmetic: an
index cannot lie about them. Owners, times and modes are constants; there are no links and no directories.
"""

import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Content, compressed form and hashes of a frame stay in the second-level cache of the core that decodes it.
FRAME_BYTES = 1 << 20
TAR_BLOCK = 512
TAR_END = bytes(2 * TAR_BLOCK)


@dataclass(frozen=True, slots=True)
class Member:
    """One file of the archive: its path in the bundle and its size."""

    name: str
    bytes: int

    @property
    def data_frames(self) -> int:
        return -(-self.bytes // FRAME_BYTES)


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. member: index of the member it holds or introduces; offset: in that member's file.

    bytes: of content, before compression. is_data: false for framing, which belongs to the tar.
    """

    number: int
    member: int
    offset: int
    bytes: int
    is_data: bool


class Layout:
    """Frames of an archive of `members`, numbered from 0 through all of its parts."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self._framing: list[int] = []  # frame number of each member's framing; last, of the end mark
        number = 0
        for member in self.members:
            self._framing.append(number)
            number += 1 + member.data_frames
        self._framing.append(number)
        self.num_frames = number + 1

    def frame(self, number: int) -> Frame:
        """Frame `number`, 0 <= number < num_frames."""
        member = bisect_right(self._framing, number) - 1
        index = number - self._framing[member] - 1
        if index < 0:
            return Frame(number, member, 0, len(self.framing(member)), False)
        offset = index * FRAME_BYTES
        return Frame(number, member, offset, min(FRAME_BYTES, self.members[member].bytes - offset), True)

    def frames_of(self, member: int) -> range:
        """Numbers of a member's frames, its framing first."""
        return range(self._framing[member], self._framing[member + 1])

    def frames(self, first: int, count: int) -> Iterator[Frame]:
        return (self.frame(number) for number in range(first, first + count))

    def framing(self, member: int) -> bytes:
        """Content of the framing before a member; for member len(members), of the tar's end."""
        before = self.members[member - 1].bytes if member else 0
        padding = bytes(-before % TAR_BLOCK)
        if member == len(self.members):
            return padding + TAR_END
        return padding + tar_header(self.members[member])


def tar_header(member: Member) -> bytes:
    """POSIX header of a regular file: ustar, after a pax record where its fields are too small."""
    info = tarfile.TarInfo(member.name)
    info.size = member.bytes
    info.mode = 0o644
    return info.tobuf(tarfile.PAX_FORMAT)
