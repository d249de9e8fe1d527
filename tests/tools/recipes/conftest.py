"""Small files in the publishers' own formats."""

import gzip
import struct
import threading
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest


class Publisher:
    """Writes data sets below a folder, a few rows each, deterministic."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.random = np.random.default_rng(0)

    def idx(self, name: str = "mnist", train: int = 60, test: int = 20, size: int = 6) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True)
        for part, rows in (("train", train), ("t10k", test)):
            images = self.random.integers(0, 256, (rows, size, size), dtype=np.uint8)
            labels = (np.arange(rows) % 10).astype(np.uint8)
            header = struct.pack(">4BIII", 0, 0, 8, 3, rows, size, size)
            (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
            header = struct.pack(">4BI", 0, 0, 8, 1, rows)
            (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
        return folder

    def cifar(self, name: str = "cifar10", rows: int = 8) -> Path:
        fine = name == "cifar100"
        folder = self.root / ("cifar-100-binary" if fine else "cifar-10-batches-bin")
        folder.mkdir(parents=True)
        files = ["train.bin", "test.bin"] if fine else [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
        for file in files:
            records = self.random.integers(0, 256, (rows, (2 if fine else 1) + 3072), dtype=np.uint8)
            records[:, 0] = np.arange(rows) % (20 if fine else 10)
            if fine:
                records[:, 1] = 90 + np.arange(rows) % 10
            (folder / file).write_bytes(records.tobytes())
        return folder

    def higgs(self, rows: int = 300) -> Path:
        folder = self.root / "higgs"
        folder.mkdir(parents=True)
        table = self.random.normal(2.0, 3.0, (rows, 29))
        table[:, 0] = np.arange(rows) % 2
        lines = [",".join(f"{value:.18e}" for value in row) for row in table]
        path = folder / "HIGGS.csv.gz"
        path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
        return path


@pytest.fixture
def publisher(tmp_path):
    return Publisher(tmp_path / "data")


@dataclass(frozen=True)
class HttpFolder:
    path: Path
    url: str


@pytest.fixture
def http_folder(tmp_path):
    """A real web server on this machine that serves one folder."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield HttpFolder(folder, f"http://127.0.0.1:{server.server_address[1]}/")
        server.shutdown()
        thread.join()
