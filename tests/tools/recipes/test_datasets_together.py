"""Data sets fetched, unpacked and converted by several processes at once."""

import gzip
import os
import shutil
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from apoptosis.errors import DataError
from apoptosis.tools.recipes.datasets import DATASETS, fetch, higgs, images

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here, which is quick")


def at_once(work, processes=6):
    """Run the same in several processes, which begin together; returns how many failed."""
    begin_read, begin_write = os.pipe()
    children = []
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            os.close(begin_write)
            os.read(begin_read, 1)  # until the parent closes it
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    os.close(begin_read)
    os.close(begin_write)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def archived(publisher, name):
    folder = publisher.cifar(name)
    archive = publisher.root / DATASETS[name].sources[0].filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    return folder, archive


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_an_archive_is_unpacked_by_several_processes(publisher, name):
    folder, archive = archived(publisher, name)
    for _ in range(5):
        assert at_once(lambda: DATASETS[name].read(publisher.root, None)) == 0
        assert sorted(p.name for p in publisher.root.iterdir()) == sorted((folder.name, archive.name))
        shutil.rmtree(folder)


def test_a_folder_made_meanwhile_is_taken(publisher):
    folder, archive = archived(publisher, "cifar10")
    DATASETS["cifar10"].read(publisher.root, None)
    (own,) = {p.name for p in publisher.root.iterdir()} - {archive.name}
    assert own == folder.name
    assert images._unpack(archive, folder, ["data_batch_1.bin"]) == folder  # another process was quicker
    assert len(list(folder.iterdir())) == 6
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(OSError, match=folder.name):
        images._unpack(archive, folder, ["data_batch_1.bin"])
    assert folder.read_text() == "a file"
    assert len(list(publisher.root.iterdir())) == 2


def test_a_table_is_converted_by_several_processes(publisher):
    path = publisher.higgs()
    assert at_once(lambda: higgs.load_higgs(publisher.root, 50)) == 0
    assert len(list(path.parent.iterdir())) == 2
    train, test = higgs.load_higgs(publisher.root, 50)
    assert (len(train), len(test)) == (250, 50)


def test_a_file_is_downloaded_by_several_at_once(tmp_path, http_folder):
    (http_folder.path / "b.gz").write_bytes(b"something else")
    source = fetch.Source(
        filename="b.gz", url=http_folder.url + "b.gz", checksum="md5:6c7ba9c5a141421e1c03cb9807c97c74"
    )
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: fetch.obtain(source, (tmp_path / "new",)).read_bytes(), range(8)))
    assert set(found) == {b"something else"}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["b.gz"]


def test_all_sources_are_fetched_over_https():
    sources = [source for recipe in DATASETS.values() for source in recipe.sources]
    assert len(sources) == 11
    assert all(source.url.startswith("https://") for source in sources)


def test_pipes_in_the_place_of_data_are_refused_and_not_waited_for(publisher):
    publisher.idx()
    first = publisher.root / "mnist" / DATASETS["mnist"].sources[0].filename
    first.unlink()
    os.mkfifo(first)
    with pytest.raises(DataError, match="named pipe"):
        DATASETS["mnist"].read(publisher.root, None)
    folder = publisher.cifar()
    (folder / "test_batch.bin").unlink()
    os.mkfifo(folder / "test_batch.bin")
    with pytest.raises(DataError, match="named pipe"):
        DATASETS["cifar10"].read(publisher.root, None)


def test_an_image_file_that_announces_more_than_it_holds_is_not_read_into_memory(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(struct.pack(">4BIII", 0, 0, 8, 3, 2**31, 2**10, 2**10) + bytes(100)))
    with pytest.raises(DataError, match="announces images of shape"):
        images.read_idx(path, 3)
    path.write_bytes(gzip.compress(struct.pack(">4BIII", 0, 0, 8, 3, 2, 2, 2) + bytes(50_000_000)))
    with pytest.raises(DataError, match="holds more than 8 bytes of data"):
        images.read_idx(path, 3)


@pytest.mark.parametrize("kind", ["text", "shape", "type", "deep", "cut", "pickle"])
def test_a_converted_table_that_is_damaged_is_refused_by_name(publisher, kind):
    higgs_path = publisher.higgs()
    higgs.load_higgs(publisher.root, 50)
    (array,) = higgs_path.parent.glob("*.npy")
    good = array.read_bytes()
    if kind == "text":
        array.write_text("hello")
    elif kind == "shape":
        np.save(array, np.zeros((300, 3), np.float32))
    elif kind == "type":
        np.save(array, np.zeros((300, 29)))
    elif kind == "deep":
        header = b"(" * 9000 + b"\n"
        array.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    elif kind == "cut":
        array.write_bytes(good[:5000])
    else:
        np.save(array, np.array([[None] * 29]), allow_pickle=True)
    with pytest.raises(DataError, match=r"HIGGS-.*\.npy' is damaged .*Remove it") as caught:
        higgs.load_higgs(publisher.root, 50)
    assert "\n" not in str(caught.value)
