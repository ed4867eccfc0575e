"""The cache of decoded images: changed sources, damaged files, killed and concurrent builds, full disks, descriptors."""
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import option
from data import cache, dataset
from data.cache import Cache, cache_folder
from system.errors import UserError
from system.files import lock, part_of
from test_data import Image, make_dataset, message, noise, raising, save

FORK = multiprocessing.get_context("fork")  # the processes of these tests need not import torch again


class Decoder:
    """Counts how often it is called."""
    calls = 0

    def __call__(self, source):
        self.calls += 1
        return np.frombuffer(source.read_bytes(), np.uint8)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path):
    """Files 0.png, 1.png ... of 1000 bytes."""
    files = [tmp_path / f"{n}.png" for n in range(6)]
    for n, file in enumerate(files):
        file.write_bytes(content(n))
    return files


def content(n):
    return noise(1000, seed=n).tobytes()


def read(folder, sources, kind="HR"):
    """What another run reads through the cache, and how many files it decodes for that."""
    store, decode = Cache(folder), Decoder()
    with store.building(kind):
        found = [bytes(store.get(source, kind, decode)) for source in sources]
    assert found == [source.read_bytes() for source in sources]
    return decode.calls


def names(folder):
    """The files of a cache but for the lock, without the random part of a name."""
    return sorted(".".join(part for part in path.name.split(".") if part in ("HR", "pack", "index") or "part" in path.name)
                  for path in folder.iterdir() if path.suffix != ".lock")


def test_a_source_is_decoded_once_into_one_file(folder, sources):
    assert [read(folder, sources) for _ in range(2)] == [6, 0]
    assert names(folder) == ["HR.index", "HR.pack"]


def test_what_was_read_before_is_read_only(folder, sources):
    read(folder, sources)
    array = Cache(folder).get(sources[0], "HR", None)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


# ---- changed sources

def replaced(path, new, how):
    """Write `new` to the file; how: what is the same as before."""
    before = path.stat()
    if how == "another file":  # cp -p, rsync -a, tar: the size and the time of the old one
        other = path.with_suffix(".new")
        other.write_bytes(new)
        other.replace(path)
    else:
        path.write_bytes(new)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (how == "time")))


@pytest.mark.parametrize("how, length", [("size", 1200), ("time", 1000), ("content", 1000), ("another file", 1000)])
def test_another_image_under_the_same_name_is_decoded(folder, sources, how, length):
    read(folder, sources)
    replaced(sources[2], noise(length, seed=9).tobytes(), how)
    assert [read(folder, sources) for _ in range(2)] == [1, 0]


def test_a_copy_of_a_dataset_need_not_be_decoded_again(folder, sources, tmp_path):
    read(folder, sources)
    (tmp_path / "HR").mkdir()
    copies = [Path(shutil.copy(source, tmp_path / "HR")) for source in sources]
    before = (folder / "HR.index").read_bytes()
    assert [read(folder, copies) for _ in range(2)] == [0, 0]
    assert (folder / "HR.index").read_bytes() != before  # so that the next run need not read the files to compare them


def test_a_run_goes_on_with_the_data_that_it_started_with(folder, sources):
    store, decode = Cache(folder), Decoder()
    first = store.get(sources[0], "HR", decode)
    replaced(sources[0], content(9), "content")
    assert bytes(store.get(sources[0], "HR", None)) == bytes(first) == content(0)


def test_an_image_that_changes_between_two_uses_is_not_mixed(folder, sources):
    store = Cache(folder)
    store.get(sources[0], "HR", Decoder())
    replaced(sources[0], content(9), "content")
    assert "changed while it was used" in message(store.get, sources[0], "LR_made_X2", Decoder())
    assert [read(folder, sources[:1], kind) for kind in ("HR", "LR_made_X2")] == [1, 1]


def test_replaced_arrays_do_not_pile_up_and_readers_keep_theirs(folder, sources):
    read(folder, sources)
    reader = Cache(folder)
    held = [reader.get(source, "HR", None) for source in sources]
    for turn in range(12):
        for n, source in enumerate(sources[:2]):
            replaced(source, content(20 + 2 * turn + n), "content")
        assert read(folder, sources) == 2
        packs = list(folder.glob("*.pack"))
        assert len(packs) <= cache.MAX_PACKS and sum(pack.stat().st_size for pack in packs) <= 2 * 6 * 1024
    assert [bytes(array) for array in held] == [content(n) for n in range(6)]
    assert read(folder, sources) == 0


def test_no_room_for_a_second_copy_is_no_error(folder, sources, monkeypatch):
    compact = cache.Store._compact

    def on_a_full_disk(self):
        with monkeypatch.context() as patch:
            patch.setattr(cache.Store, "_append", raising(UserError("no space")))
            compact(self)
    monkeypatch.setattr(cache, "MAX_PACKS", 0)
    monkeypatch.setattr(cache.Store, "_compact", on_a_full_disk)
    assert [read(folder, sources[:3]), read(folder, sources), read(folder, sources)] == [3, 3, 0]
    assert names(folder) == ["HR.index", "HR.pack", "HR.pack"]


# ---- damaged caches

def with_index(change):
    def damage(folder):
        index = folder / "HR.index"
        entries = json.loads(index.read_bytes().partition(b"\n")[2])
        entries = change(entries)
        text = json.dumps(entries).encode()
        index.write_bytes(b"%08x\n" % zlib.crc32(text) + text)
    return damage


def of_first(place, value):
    def change(entries):
        entries["0.png"][place] = value
        return entries
    return with_index(change)


def cut(name, left):
    def damage(folder):
        for file in folder.glob(name):
            file.write_bytes(file.read_bytes()[:left])
    return damage


def flip(folder):
    index = folder / "HR.index"
    text = bytearray(index.read_bytes())
    text[text.index(b",1024,")+ 4] ^= 1  # an offset
    index.write_bytes(bytes(text))


@pytest.mark.parametrize("damage, decoded", [
    (cut("*.index", 0), 6), (cut("*.index", 7), 6), (cut("*.index", 100), 6), (cut("*.index", -1), 6), (flip, 6),
    (cut("*.pack", 0), 6), (cut("*.pack", 1500), 5), (cut("*.pack", -1), 1),
    (lambda folder: [file.unlink() for file in folder.glob("*.pack")], 6),
    (lambda folder: (folder / "HR.index").unlink(), 6),
    (lambda folder: (folder / "HR.index").write_bytes(os.urandom(500)), 6),
    (with_index(lambda entries: []), 6), (with_index(lambda entries: {"0.png": None}), 6),
    (of_first(0, "../0.png"), 1), (of_first(0, "HR.00000000.pack"), 1), (of_first(0, 5), 1),
    (of_first(1, 10 ** 12), 1), (of_first(1, -8), 1), (of_first(1, "0"), 6), (of_first(1, 0.5), 6),
    (of_first(2, [2000, 1000]), 1), (of_first(2, [-5]), 1), (of_first(2, [0]), 1), (of_first(2, "x"), 6),
    (of_first(2, [2.5]), 6),
    (of_first(4, []), 0), (of_first(4, "x"), 0),
])
def test_what_is_damaged_is_made_again(folder, sources, damage, decoded):
    read(folder, sources)
    damage(folder)
    assert [read(folder, sources) for _ in range(2)] == [decoded, 0]
    assert "HR.index" in names(folder) and names(folder).count("HR.pack") <= 2


# ---- killed and interrupted builds

@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_build_goes_on_where_it_was_and_leaves_nothing(folder, sources, end, monkeypatch):
    monkeypatch.setattr(cache, "PUBLISH_EVERY", 0)

    def build():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        store = Cache(folder)
        with store.building("HR"):
            for source in sources[:4]:
                store.get(source, "HR", Decoder())
            monkeypatch.setattr(cache, "PUBLISH_EVERY", 9)
            store.get(sources[4], "HR", Decoder())  # in no index yet
            part_of(folder / "HR.index").write_bytes(b"half")
            os.kill(os.getpid(), end)
    process = FORK.Process(target=build)
    process.start()
    process.join(20)
    assert process.exitcode == -end
    assert [read(folder, sources) for _ in range(2)] == [2, 0]
    assert names(folder) == ["HR.index", "HR.pack", "HR.pack"]


def test_a_pack_that_no_index_lists_is_removed(folder, sources):
    read(folder, sources[:3])
    (folder / "HR.0123abcd.pack").write_bytes(b"of a process that was killed before its first index")
    read(folder, sources)
    assert not (folder / "HR.0123abcd.pack").exists()


def test_an_interrupted_build_keeps_what_it_has_made(folder, sources):
    store = Cache(folder)
    with pytest.raises(KeyboardInterrupt), store.building("HR"):
        store.get(sources[0], "HR", Decoder())
        store.get(sources[1], "HR", raising(KeyboardInterrupt))
    assert names(folder) == ["HR.index", "HR.pack"] and read(folder, sources) == 5


# ---- disks and folders

def test_a_cache_that_cannot_be_written_is_explained(folder, sources):
    folder.write_text("a file where the folder should be")
    assert "--dir_cache" in message(read, folder, sources)


def test_a_full_disk_is_named_and_the_build_goes_on_later(folder, sources):
    def build(result):
        resource.setrlimit(resource.RLIMIT_FSIZE, (3500, 3500))  # an array is written in part
        with pytest.raises(UserError) as caught:
            read(folder, sources)
        result.send(str(caught.value))
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=build, args=(theirs,))
    process.start()
    theirs.close()
    text = ours.recv()
    process.join(20)
    assert text.startswith(f"{folder / 'HR.index'}: cannot write the cache (File too large)") and "\n" not in text
    assert next(folder.glob("*.pack")).stat().st_size == 2 * 1024 + 1000  # the part of an array is no longer there
    assert [read(folder, sources) for _ in range(2)] == [3, 0]


def test_the_reason_is_that_of_the_system(folder, sources, monkeypatch):
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    assert "cannot write the cache (No space left on device)" in message(read, folder, sources)
    store = Cache(folder)
    with pytest.raises(KeyboardInterrupt), store.building("HR"):  # whatever ended a build is what is reported
        store.get(sources[0], "HR", Decoder())
        raise KeyboardInterrupt
    monkeypatch.undo()
    assert read(folder, sources) == 6


def test_cache_lies_beside_the_data(tmp_path):
    assert cache_folder(tmp_path, "", tmp_path / "fallback") == tmp_path / "bin"


@pytest.mark.parametrize("given", ["", "mine"])
def test_cache_of_read_only_data_lies_elsewhere(tmp_path, given):
    folders = [tmp_path / parent / "Set5" for parent in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
        folder.chmod(0o555)
    given = given and str(tmp_path / given)
    found = [cache_folder(folder, given, tmp_path / "fallback") for folder in folders]
    assert all(folder.parent == tmp_path / ("mine" if given else "fallback") for folder in found)
    assert found[0] != found[1]


@pytest.fixture
def args(tmp_path):
    def parse(*flags):
        return option.parse(["--dir_data", str(tmp_path), "--n_threads", "0", "--dir_cache", str(tmp_path / "cache"),
                             "--scale", "2", "--patch_size", "16", *flags])
    return parse


def test_read_only_data_are_read_through_the_fallback(tmp_path, args, monkeypatch):
    make_dataset(tmp_path / "A")
    (tmp_path / "A").chmod(0o555)
    monkeypatch.setattr(dataset, "default_cache", lambda: tmp_path / "fallback")
    dataset.Images("A", args("--dir_cache", ""), train=True).prepare()
    assert [path.name for path in (tmp_path / "A").iterdir()] == ["HR"]
    assert len(list((tmp_path / "fallback").rglob("*.pack"))) == 2


@pytest.mark.parametrize("ext, kinds", [("sep", ["HR.index", "LR_made_X2.index"]), ("img", [])])
def test_ext_img_does_without_a_cache(tmp_path, args, ext, kinds):
    make_dataset(tmp_path / "A")
    images = dataset.Images("A", args("--ext", ext), train=True)
    images.prepare()
    assert np.array_equal(images.lr(1), data.degrade.downscale(noise(24, 30, 3, seed=1), 2))
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.index")) == kinds


# ---- several processes

def run_together(number, target):
    """Run target(n) in processes that start at the same moment; returns their exit statuses."""
    barrier = FORK.Barrier(number)

    def run(n):
        torch.set_num_threads(1)
        barrier.wait(30)
        target(n)
    processes = [FORK.Process(target=run, args=(n,)) for n in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("lr", [False, True])
def test_runs_that_start_together_build_once_and_read_the_same(tmp_path, args, monkeypatch, lr):
    make_dataset(tmp_path / "A", number=8, lr=lr)
    record = os.open(tmp_path / "record", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    decode = dataset.read_photo
    monkeypatch.setattr(dataset, "read_photo", lambda file: os.write(record, b"d") and decode(file))
    monkeypatch.setattr(cache, "PUBLISH_EVERY", 0)
    flags = args("--data_train", "A")

    def output(images, index):
        os.write(record, b"t")
        return images.hr(index).astype(np.int16) * 3

    def train(n):
        crops = dataset.Crops(flags)
        images = crops.sets[0]
        with images.cache.building("SR_X2"):
            for index in range(len(images)):
                images.teacher_output(index, "SR_X2", partial(output, images, index))
        crops.teacher_kinds.append("SR_X2")
        batch = [crops[number] for number in range(40)]
        assert all(torch.equal(teacher, hr.short() * 3) for _, hr, teacher in batch)
        (tmp_path / f"result{n}").write_bytes(b"".join(part.numpy().tobytes() for crop in batch for part in crop))
    assert run_together(4, train) == [0] * 4
    made = (tmp_path / "record").read_bytes()
    assert made.count(b"d") == 8 * (1 + lr) and made.count(b"t") == 8  # LR is made from the decoded HR
    assert len({(tmp_path / f"result{n}").read_bytes() for n in range(4)}) == 1


@pytest.mark.parametrize("seed", range(3))
def test_killed_builders_and_others_at_the_same_time(tmp_path, folder, seed, monkeypatch):
    monkeypatch.setattr(cache, "PUBLISH_EVERY", 0)
    files = [tmp_path / f"{n}.png" for n in range(40)]
    for n, file in enumerate(files):
        file.write_bytes(content(n))

    def build(n):
        if n < 3:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, 0.02 * (n + 1) + 0.005 * seed)
        read(folder, files)
    assert run_together(5, build)[3:] == [0, 0]
    assert read(folder, files) == 0
    assert all(file.split(".")[-1] in ("index", "pack") for file in names(folder))


def test_a_process_that_waits_for_another_logs_it(folder, sources, monkeypatch):
    lines = []
    monkeypatch.setattr(cache.log, "info", lambda text, *values: lines.append(text % values))
    folder.mkdir()
    held = lock(folder / ".HR.lock", "")
    waiting = threading.Thread(target=read, args=(folder, sources))
    waiting.start()
    end = time.monotonic() + 10
    while not lines and time.monotonic() < end:
        time.sleep(0.01)
    assert not (folder / "HR.index").exists()
    held.close()
    waiting.join(10)
    assert lines == [f"waiting for another process that writes {folder / 'HR.index'}"] and read(folder, sources) == 0


def test_a_complete_cache_is_read_without_the_lock(folder, sources):
    read(folder, sources)
    with lock(folder / ".HR.lock", ""):
        assert read(folder, sources) == 0


@pytest.mark.parametrize("workers", ["0", "2"])
def test_800_images_with_teacher_outputs_take_few_descriptors(tmp_path, args, workers):
    image = Image.fromarray(noise(16, 16, 3))
    (tmp_path / "A" / "HR").mkdir(parents=True)
    for n in range(800):
        image.save(tmp_path / "A" / "HR" / f"{n}.png", compress_level=0)
    flags = args("--data_train", "A", "--batch_size", "80", "--n_threads", workers)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        crops = dataset.Crops(flags)
        images = crops.sets[0]
        with images.cache.building("SR_X2"):
            for index in range(800):
                images.teacher_output(index, "SR_X2", lambda: np.zeros((16, 16, 3), np.int16))
        crops.teacher_kinds.append("SR_X2")
        assert sum(len(hr) for _, hr, _ in data.make_batches(flags, crops, 0, 11)) == 880
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_an_image_of_the_size_of_a_photo_is_saved_as_it_is(tmp_path, folder):
    source = save(tmp_path / "photo.png", noise(300, 500, 3))
    for _ in range(2):
        assert np.array_equal(Cache(folder).get(source, "HR", data.image.read_photo), noise(300, 500, 3))
