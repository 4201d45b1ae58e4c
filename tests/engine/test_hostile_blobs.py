"""Any bytes in a pack, exactly sized memory, AddressSanitizer and UBSan (native/hostile_blobs.cpp)."""

from pathlib import Path

import pytest

from tests.engine.test_sanitizers import PROGRAM, build, engine_sources, execute

HOSTILE = PROGRAM.with_name("hostile_blobs.cpp")


@pytest.mark.slow
def test_no_blob_makes_a_kernel_read_outside_of_it(tmp_path: Path) -> None:
    sources = [HOSTILE if source == PROGRAM else source for source in engine_sources()]
    assert HOSTILE in sources
    done = execute(build(sources, "address,undefined", tmp_path), "address,undefined")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-3000:]
