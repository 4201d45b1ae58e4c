"""Any bytes in a tensor, exactly sized memory, AddressSanitizer and UBSan (native/hostile_tensors.cpp)."""

from pathlib import Path

from tests.engine.test_sanitizers import PROGRAM, REPO, build, execute

DECODERS = [REPO / "csrc" / "dequantize.cpp", REPO / "csrc" / "dequantize_codebook.cpp"]
HOSTILE = PROGRAM.with_name("hostile_tensors.cpp")


def test_no_tensor_makes_a_decoder_read_outside_of_it(tmp_path: Path) -> None:
    """An index mask left out of a codebook was seen by it."""
    done = execute(build([*DECODERS, HOSTILE], "address,undefined", tmp_path), "address,undefined")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-3000:]
