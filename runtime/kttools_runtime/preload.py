"""Expert packs brought into memory beside whatever the model does, in the order a token meets them."""

import atexit
import threading
from collections.abc import Container, Mapping

from .moe import ExpertLayer


class PackReader:
    """A thread that reads the experts of every layer, one expert at a time.

    layers: in the order of reading. skip: by layer, experts whose bytes nobody needs. It ends with the
    process: stop() runs at exit, because a thread must not come back from C++ into a dead interpreter.
    """

    def __init__(
        self, layers: Mapping[int, ExpertLayer], skip: Mapping[int, Container[int]] | None = None
    ) -> None:
        self._layers = dict(layers)
        self._skip = skip or {}
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="kttools-preload", daemon=True)

    def start(self) -> None:
        """Begins reading."""
        atexit.register(self.stop)
        self._thread.start()

    def wait(self) -> None:
        """Until all is read or stop() was called."""
        self._thread.join()

    def stop(self) -> None:
        """Ends the reading after the expert it is at (tens of megabytes) and waits for that."""
        self._is_stopped.set()
        self._thread.join()

    def _read(self) -> None:
        try:
            self._read_all()
        finally:
            atexit.unregister(self.stop)  # which would keep the layers for as long as the process lives

    def _read_all(self) -> None:
        for index, layer in self._layers.items():
            unneeded = self._skip.get(index, ())
            for expert in range(layer.num_experts):
                if self._is_stopped.is_set():
                    return
                if expert not in unneeded:
                    layer.make_resident(expert)
