"""Downloads from a server in this process, well-behaved and not; unpacking; the script as a user runs it."""
import hashlib
import io
import os
import subprocess
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import download
import numpy as np
import pytest
from download import fetch, unpack
from imageio.v2 import imwrite
from system.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SETS = "Set5", "Set14", "B100", "Urban100"
BODY = np.random.RandomState(0).bytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.body` at any address; the server's other attributes say how it misbehaves."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            return self.send_error(server.status)
        same = self.headers.get("If-Range") in (None, server.etag) or server.ignores_if_range
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and same and not server.ignores_range else 0
        total = len(server.body)
        if start >= total:
            return self.refuse_range(total)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{'*' if server.hides_total else total}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", total - start + server.overstates)
        self.end_headers()
        end = start + server.drops.pop(0) if server.drops else total
        self.wfile.write(server.body[start:end])
        server.sent.append(len(server.body[start:end]))

    def refuse_range(self, total):
        page = b"<html>no such range</html>"
        self.send_response(416)
        self.send_header("Content-Range", f"bytes */{total}")
        self.send_header("Content-Length", len(page))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.etag, server.status = BODY, '"one"', None
    server.drops, server.overstates, server.ignores_range, server.ignores_if_range = [], 0, False, False
    server.hides_total, server.asked, server.sent = False, [], []
    server.url = f"http://127.0.0.1:{server.server_port}/file.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def get(server, target, **kwargs):
    return fetch(server.url, target, pause=0.001, **kwargs)


def leave_half(server, target, size=100_000):
    """As after Ctrl-C: `size` bytes have arrived, and the call has ended."""
    server.drops, server.status = [size], None
    original, download.TRIES = download.TRIES, 1
    try:
        with pytest.raises(UserError, match="run again to go on"):
            get(server, target)
    finally:
        download.TRIES = original
    assert target.with_name("a.bin.part").read_bytes() == server.body[:size]
    server.asked.clear()
    server.sent.clear()


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("bar", [True, False])
def test_fresh(server, tmp_path, monkeypatch, bar):
    if not bar:
        monkeypatch.setattr(download, "tqdm", None)
    target = tmp_path / "new" / "a.bin"
    assert get(server, target, sha256=SHA256) == target
    assert target.read_bytes() == BODY
    assert files(tmp_path) == ["new/a.bin"]
    assert server.asked == [None]


def test_resumes_within_a_call(server, tmp_path):
    server.drops = [50_000] * 5
    assert len(server.drops) > download.TRIES  # what gains ground may go on
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert server.asked == [None, *(f"bytes={start}-" for start in range(50_000, 300_000, 50_000))]
    assert server.sent == [50_000] * 6


def test_a_size_told_only_at_first(server, tmp_path):
    server.drops, server.hides_total = [100_000, 50_000], True
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_resumes_after_an_end(server, tmp_path):
    leave_half(server, tmp_path / "a.bin")
    get(server, tmp_path / "a.bin", sha256=SHA256[:8])
    assert files(tmp_path) == ["a.bin"]
    assert server.asked == ["bytes=100000-"]
    assert server.sent == [200_000]


@pytest.mark.parametrize("rude", [False, True])
def test_restarts_when_the_file_changed(server, tmp_path, rude):
    leave_half(server, tmp_path / "a.bin")
    server.body, server.etag, server.ignores_if_range = BODY[::-1], '"two"', rude
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY[::-1]
    assert server.asked == ["bytes=100000-", *([None] if rude else [])]


@pytest.mark.parametrize("change", ["no etag", "ignores range", "other address", "no note"])
def test_restarts_when_nothing_vouches_for_the_half(server, tmp_path, change):
    if change == "no etag":
        server.etag = None
    leave_half(server, tmp_path / "a.bin")
    server.body = BODY[::-1]
    server.ignores_range = change == "ignores range"
    if change == "other address":
        server.url += "2"
    if change == "no note":
        (tmp_path / "a.bin.about.part").unlink()
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY[::-1]
    assert server.asked == ["bytes=100000-" if change == "ignores range" else None]


def test_complete_part(server, tmp_path):
    leave_half(server, tmp_path / "a.bin")
    (tmp_path / "a.bin.part").write_bytes(BODY)
    get(server, tmp_path / "a.bin", sha256=SHA256)
    assert files(tmp_path) == ["a.bin"]
    assert server.asked == ["bytes=300000-"]
    assert sum(server.sent) == 0


def test_part_longer_than_the_file(server, tmp_path):
    leave_half(server, tmp_path / "a.bin")
    (tmp_path / "a.bin.part").write_bytes(BODY + b"more")
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY


@pytest.mark.parametrize("ignores_range", [False, True])
def test_a_size_never_reached_ends(server, tmp_path, ignores_range):
    server.overstates, server.ignores_range = 5, ignores_range
    with pytest.raises(UserError) as caught:
        get(server, tmp_path / "a.bin")
    assert "times in a row" in str(caught.value)
    assert not (tmp_path / "a.bin").exists()
    assert len(server.asked) <= 2 * download.TRIES


def test_other_checksum(server, tmp_path):
    with pytest.raises(UserError, match=SHA256):
        get(server, tmp_path / "a.bin", sha256="0edfb8a3")
    assert files(tmp_path) == []


def test_checksum_must_be_one(server, tmp_path):
    for wrong in ("", "0edf", "xyzxyzxy"):
        with pytest.raises(ValueError):
            get(server, tmp_path / "a.bin", sha256=wrong)


def test_there_already(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(BODY)
    get(server, tmp_path / "a.bin", sha256=SHA256)
    assert server.asked == []
    with pytest.raises(UserError, match="move it away"):
        get(server, tmp_path / "a.bin", sha256="0" * 64)
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_server_errors(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match=r"404 \(Not Found\); look elsewhere"):
        get(server, tmp_path / "a.bin", hint="look elsewhere")
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(UserError, match="503"):
        get(server, tmp_path / "a.bin")
    assert len(server.asked) == 1 + download.TRIES
    assert files(tmp_path) == []


def test_no_connection(server, tmp_path):
    with pytest.raises(UserError, match="no connection"):
        fetch("http://127.0.0.1:9/a.bin", tmp_path / "a.bin", pause=0.001)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/a", "a.bin", "https://", "http://host:port/a",
                                 "http://host/a b"])
def test_addresses(tmp_path, url):
    with pytest.raises(UserError, match="is not an address"):
        fetch(url, tmp_path / "a.bin")


def test_no_space(server, tmp_path, monkeypatch):
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=299_999))
    with pytest.raises(UserError, match=r"0\.3 MB to fetch.*make space"):
        get(server, tmp_path / "a.bin")
    assert server.asked == [None]


def test_folder_that_cannot_be(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="file"):
        get(server, tmp_path / "file" / "a.bin")


def test_ctrl_c_keeps_what_arrived(server, tmp_path, monkeypatch):
    chunks = iter([BODY[:70_000]])

    def read(response):
        chunk = next(chunks, None)
        if chunk is None:
            raise KeyboardInterrupt
        return chunk
    with monkeypatch.context() as patch:
        patch.setattr(download, "read", read)
        with pytest.raises(KeyboardInterrupt):
            get(server, tmp_path / "a.bin")
    get(server, tmp_path / "a.bin", sha256=SHA256)
    assert server.asked == [None, "bytes=70000-"]


def png():
    file = io.BytesIO()
    imwrite(file, np.zeros((2, 2, 3), np.uint8), format="png")
    return file.getvalue()


def benchmark(lack=()):
    """{member: bytes} of a small benchmark archive, two images a set."""
    names = [f"benchmark/{name}/{kind}/{image}.png" for name in SETS for kind in ("HR", "LR_bicubic/X2", "LR_bicubic/X4")
             for image in ("a", "b")]
    return {name: png() for name in names if name not in lack}


def tar(members, mode="w:"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


KINDS = {"tar": tar, "tar.gz": lambda members: tar(members, "w:gz"), "zip": zipped}


@pytest.mark.parametrize("kind", KINDS)
def test_unpack(tmp_path, kind):
    members = {"a/b.txt": b"b" * 5000, "c.txt": b"c"}
    (tmp_path / "x").write_bytes(KINDS[kind](members))
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "mine.txt").write_bytes(b"mine")
    unpack(tmp_path / "x", tmp_path / "out")
    assert files(tmp_path / "out") == ["a/b.txt", "a/mine.txt", "c.txt"]
    assert (tmp_path / "out" / "a" / "b.txt").read_bytes() == members["a/b.txt"]
    assert sorted(os.listdir(tmp_path / "out")) == ["a", "c.txt"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:\\out.txt"])
def test_members_outside_are_refused(tmp_path, monkeypatch, kind, filtered, name):
    if not filtered:  # Python 3.10.11, 3.11.3 and before
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x").write_bytes(KINDS[kind]({"good.txt": b"", name: b"bad"}))
    with pytest.raises(UserError, match="outside"):
        unpack(folder / "x", folder)
    assert files(tmp_path) == ["folder/x"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("link")
    link.type, link.linkname = kind, "/etc/hostname"
    (tmp_path / "x").write_bytes(tar({"good.txt": b"", link: b""}))
    with pytest.raises(UserError, match="link or a device"):
        unpack(tmp_path / "x", tmp_path)
    assert os.listdir(tmp_path) == ["x"]


def spoiled(kind, how):
    content = KINDS[kind]({"a.bin": BODY[:3000], "b.bin": BODY[:3000]})
    if how == "empty":
        return b""
    if how == "page":
        return b"<html>Please log in</html>" * 100
    if how == "half":
        return content[:len(content) // 2]
    if how == "member edge":  # where the second header would begin
        return tar({"a.bin": BODY[:3000]})[:512 + 3072]
    middle = 512 + 3072 if kind == "tar" else len(content) // 3
    return content[:middle] + b"spoiled!" + content[middle + 8:]


@pytest.mark.parametrize("how", ["empty", "page", "half", "member edge", "middle"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_archives_are_deleted(tmp_path, kind, how):
    (tmp_path / "x").write_bytes(spoiled(kind, how))
    with pytest.raises(UserError, match="deleted: run again"):
        unpack(tmp_path / "x", tmp_path)
    assert os.listdir(tmp_path) == []


def overwritten(content, start, new):
    return content[:start] + new + content[start + len(new):]


SOUND_GZIP, SOUND_ZIP = KINDS["tar.gz"]({"a": b"a"}), zipped({"\u00e9": b"a"})


@pytest.mark.parametrize("content", [
    SOUND_GZIP[:-4], overwritten(SOUND_GZIP, len(SOUND_GZIP) - 8, bytes(4)), overwritten(SOUND_ZIP, 30 + 2, b"\xff"),
    SOUND_ZIP.replace("\u00e9".encode(), b"\xff\xff")], ids=["no length", "checksum", "deflate", "name"])
def test_damage_deep_inside(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="deleted: run again"):
        unpack(tmp_path / "x", tmp_path)
    assert os.listdir(tmp_path) == []


def provide(root):
    return download.provide("benchmark", root, keep=False)


def test_incomplete_data_is_fetched_and_completed(server, tmp_path, monkeypatch):
    monkeypatch.setenv("BENCHMARK_URL", server.url)
    server.body = tar(benchmark())
    mine = tmp_path / "benchmark" / "Mine" / "HR" / "m.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(png())
    assert len(provide(tmp_path)) == 4
    assert mine.exists()

    (tmp_path / "benchmark" / "B100" / "LR_bicubic" / "X4" / "a.png").unlink()
    assert len(provide(tmp_path)) == 4
    assert len(server.asked) == 2
    assert files(tmp_path) == sorted([*benchmark(), "benchmark/Mine/HR/m.png"])

    provide(tmp_path)
    assert len(server.asked) == 2
    (tmp_path / "benchmark.tar.unpacking").mkdir()  # as after a kill while it was put in place
    provide(tmp_path)
    assert len(server.asked) == 3
    assert os.listdir(tmp_path) == ["benchmark"]


@pytest.mark.parametrize("lack,message", [
    (["benchmark/B100/HR/a.png"], "benchmark/B100/LR_bicubic/X2 holds 2 PNG images, benchmark/B100/HR 1"),
    (["benchmark/Set14/HR/a.png", "benchmark/Set14/HR/b.png"], "benchmark/Set14/HR holds no PNG images")])
def test_an_archive_of_something_else(server, tmp_path, monkeypatch, lack, message):
    monkeypatch.setenv("BENCHMARK_URL", server.url)
    server.body = tar(benchmark(lack))
    with pytest.raises(UserError, match="is not the dataset benchmark: " + message):
        provide(tmp_path)
    assert os.listdir(tmp_path) == ["benchmark.tar"]


def script(*args, **env):
    env = {"PATH": os.environ["PATH"], "no_proxy": "127.0.0.1", **env}
    return subprocess.run(["bash", "scripts/download_data.sh", *map(str, args)], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=30, check=False)


def test_script(server, tmp_path):
    server.body = tar(benchmark())
    first = script("benchmark", "--dir_data", tmp_path, BENCHMARK_URL=server.url)
    assert (first.returncode, first.stderr) == (0, "")
    assert files(tmp_path) == sorted(benchmark())
    for name in SETS:
        folder = tmp_path / "benchmark" / name
        assert f"{folder}/HR: 2 images; LR: X2 X4 in {folder}/LR_bicubic\n" in first.stdout

    second = script("--dir_data", tmp_path, "benchmark", BENCHMARK_URL=server.url)
    assert second.returncode == 0
    assert len(second.stdout.splitlines()) == len(SETS)
    assert len(server.asked) == 1


def test_script_div2k_and_keep(server, tmp_path):
    members = {f"DIV2K/{folder}/0001{end}.png": png() for folder, end in (
        ("DIV2K_train_HR", ""), ("DIV2K_train_LR_bicubic/X2", "x2"))}
    server.body = tar(members)
    result = script("DIV2K", "--keep", "--dir_data", tmp_path, DIV2K_URL=server.url)
    assert (result.returncode, result.stderr) == (0, "")
    assert files(tmp_path) == ["DIV2K.tar", *sorted(members)]


def test_script_one_line_for_mistakes(server, tmp_path):
    server.status = 404
    gone = script("benchmark", "--dir_data", tmp_path, BENCHMARK_URL=server.url)
    assert gone.returncode == 2
    assert len(gone.stderr.splitlines()) == 1
    assert gone.stderr.startswith("error: ")
    assert "404" in gone.stderr
    assert "BENCHMARK_URL" in gone.stderr

    typo = script("Set5", "--dir_data", tmp_path)
    assert typo.returncode == 2
    assert typo.stderr == "error: there is no dataset Set5: there are DIV2K, benchmark\n"

    nobody = script("DIV2K", "--dir_data", "~nobody_here/data")
    assert nobody.returncode == 2
    assert nobody.stderr == "error: argument --dir_data: there is no home folder ~nobody_here\n"
